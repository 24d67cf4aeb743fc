"""Perception tasks: their losses, measures and pictures."""

import math

import pytest
import torch

from navagent.learning.geometry import principal_curvatures, reshading
from navagent.learning.perception import TASKS


def surfaces():
    """Depth (2, 12, 12) and normals (2, 12, 12, 3) of a bumpy wall."""
    torch.manual_seed(0)
    depth = 2 + 0.1 * torch.rand(2, 12, 12)
    normals = torch.nn.functional.normalize(
        torch.randn(2, 12, 12, 3) * 0.2 + torch.tensor([0.0, 0, 1]), dim=3
    )
    return depth, normals


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_at_its_best_where_the_prediction_is_the_target(name):
    task = TASKS[name]
    target = task.target(*surfaces(), 60.0)
    assert target.shape == (2, task.channels, 12, 12)
    perfect = target.nan_to_num()
    wrong = perfect + 0.3 * torch.randn_like(perfect)
    assert task.loss(perfect, target) == 0.0
    assert task.loss(wrong, target) > 0.0
    best, worse = (task.summary(task.pixel_errors(guess, target)) for guess in (perfect, wrong))
    assert best[task.measure] == pytest.approx(0.0, abs=0.05)
    assert worse[task.measure] > best[task.measure]
    assert task.pictures(target).shape == (2, 12, 12, 3)


@pytest.mark.parametrize("name", TASKS)
def test_the_mirrored_target_is_that_of_the_mirrored_world(name):
    depth, normals = surfaces()
    mirrored = TASKS[name].target(depth.flip(2), normals.flip(2) * torch.tensor([-1.0, 1, 1]), 60.0)
    expected = TASKS[name].mirror(TASKS[name].target(depth, normals, 60.0))
    torch.testing.assert_close(mirrored, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_pixels_without_a_surface_do_not_count():
    target = torch.full((1, 3, 2, 2), torch.nan)
    target[0, :, 0, 0] = torch.tensor([0.0, 0.0, 1.0])
    prediction = torch.full_like(target, 5.0)
    prediction[0, :, 0, 0] = torch.tensor([0.0, 0.0, 0.4])
    prediction.requires_grad_()
    loss = TASKS["normals"].loss(prediction, target)
    assert loss.item() == pytest.approx(0.6 / 3)
    loss.backward()
    assert prediction.grad[0, :, 1].abs().sum() == 0
    assert TASKS["normals"].pixel_errors(prediction, target).shape == (1,)


def test_curvature_is_learned_by_squares_and_the_others_by_absolute_errors():
    target = torch.zeros(1, 2, 1, 1)
    assert TASKS["curvature"].loss(target + 0.3, target).item() == pytest.approx(0.09)
    assert TASKS["reshading"].loss(target + 0.3, target).item() == pytest.approx(0.3)


def test_angles_are_those_between_vectors():
    truth = torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 1, 4)
    angles = torch.tensor([0.0, 10.0, 90.0, 180.0])
    guess = torch.stack((angles.deg2rad().sin(), angles * 0, angles.deg2rad().cos())).reshape(1, 3, 1, 4) * 3
    errors = TASKS["normals"].pixel_errors(guess, truth)
    torch.testing.assert_close(errors, angles, rtol=0, atol=0.05)


def test_depth_is_judged_in_metres():
    truth = torch.log1p(torch.tensor([1.0, 2.0, 4.0])).reshape(1, 1, 1, 3)
    guess = torch.log1p(torch.tensor([1.5, 2.0, 3.0])).reshape(1, 1, 1, 3)
    summary = TASKS["depth"].summary(TASKS["depth"].pixel_errors(guess, truth))
    assert summary["mean_m"] == pytest.approx(0.5)
    assert summary["relative"] == pytest.approx((0.5 + 0.25) / 3)
    assert summary["within_1.25"] == pytest.approx(1 / 3)


def test_curvature_is_clipped_at_three_centimetres_and_judged_per_metre():
    depth, normals = surfaces()
    raw = principal_curvatures(depth, normals, 60.0)
    target = TASKS["curvature"].target(depth, normals, 60.0)
    torch.testing.assert_close(target, (raw * 0.03).clamp(-1, 1), equal_nan=True)
    assert target.nan_to_num().abs().max() <= 1
    errors = TASKS["curvature"].pixel_errors(target.nan_to_num() + 0.03, target)
    assert TASKS["curvature"].summary(errors)["rmse_per_m"] == pytest.approx(1.0, rel=1e-3)


def test_reshading_is_the_lamps_light():
    depth, normals = surfaces()
    target = TASKS["reshading"].target(depth, normals, 60.0)
    assert torch.equal(target[:, 0], reshading(depth, normals, 60.0))
    assert 0 <= target.min() < target.max() <= 1


def test_pictures_are_black_where_there_is_nothing():
    target = TASKS["depth"].target(torch.tensor([[[0.0, math.e]]]), None, 90.0)
    picture = TASKS["depth"].pictures(target)
    assert picture[0, 0, 0].tolist() == [0, 0, 0]
    assert picture[0, 0, 1, 0] > 0
