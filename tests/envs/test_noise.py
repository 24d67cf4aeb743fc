import math

import pytest
import torch

from envs.noise import ActuationNoise, NoiseConfig, gaussian_rgb, redwood_depth, truncated_normal
from envs.simulators.base import Action


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_colour_noise_has_the_asked_deviation_and_no_bias():
    grey = torch.full((4, 64, 64, 3), 128, dtype=torch.uint8)
    noisy = gaussian_rgb(grey, 0.1, generator()).float() / 255
    assert noisy.mean().item() == pytest.approx(128 / 255, abs=0.004)
    assert noisy.std().item() == pytest.approx(0.1, abs=0.003)


def test_depth_is_quantised_as_disparity_and_blind_beyond_ten_metres():
    depth = torch.tensor([1.0, 3.0, 9.9, 10.0, 0.0]).reshape(5, 1, 1).expand(5, 8, 8)
    quiet = redwood_depth(depth, 0.0, generator())
    levels = 35.130 * 8 / quiet[:3]
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    assert torch.allclose(quiet[:3], depth[:3], rtol=0.02)
    assert (quiet[3:] == 0).all()


def test_depth_noise_grows_with_distance():
    depth = torch.tensor([1.0, 4.0, 8.0]).reshape(3, 1, 1).expand(3, 64, 64)
    spread = redwood_depth(depth, 1.0, generator()).std(dim=(1, 2))
    assert spread[0] < spread[1] < spread[2]


def test_truncated_normal_stays_within_its_bounds_and_has_its_mean():
    count = 20000
    mean, deviation = torch.full((count,), 2.0).double(), torch.full((count,), 0.5).double()
    share = torch.rand(count, generator=generator(), dtype=torch.float64)
    drawn = truncated_normal(mean, deviation, -3 * torch.ones(count), 3 * torch.ones(count), share)
    assert drawn.min() >= 0.5 and drawn.max() <= 3.5
    assert drawn.mean().item() == pytest.approx(2.0, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.5, rel=0.03)


@pytest.fixture
def moved(flat_simulator):
    def move(action, count=4000, **noise):
        simulator = flat_simulator(count, half_size=100.0)
        actuation = ActuationNoise(NoiseConfig(**noise), generator())
        collided = actuation.step(simulator, torch.full((count,), int(action)))
        return simulator, collided

    return move


def test_forward_errors_have_the_published_means(moved):
    simulator, collided = moved(Action.MOVE_FORWARD, actuation=1.0, controller="ILQR")
    ahead, right = -simulator.position[:, 2], simulator.position[:, 0]
    # The cut at 95 % of the step moves the mean along the move a little up.
    assert ahead.mean().item() == pytest.approx(0.25 + 0.014, abs=0.01)
    assert right.mean().item() == pytest.approx(0.009, abs=0.005)
    assert simulator.yaw.mean().item() == pytest.approx(0.008, abs=0.005)
    assert right.std().item() == pytest.approx(math.sqrt(0.005), rel=0.05)
    assert ahead.min() >= 0.05 * 0.25 - 1e-6
    assert not collided.any()


def test_turns_err_in_their_own_direction(moved):
    left, _ = moved(Action.TURN_LEFT, actuation=1.0)
    right, _ = moved(Action.TURN_RIGHT, actuation=1.0)
    # The same draws, so exact mirror images: on average the robot turns too far, whichever way.
    assert torch.allclose(left.yaw, -right.yaw)
    assert left.yaw.mean() > math.radians(10)
    assert (left.yaw > 0).all()


def test_strength_scales_the_errors(moved):
    full, _ = moved(Action.MOVE_FORWARD, actuation=1.0)
    half, _ = moved(Action.MOVE_FORWARD, actuation=0.5)
    assert torch.allclose(half.yaw, full.yaw / 2, atol=1e-6)


def test_stop_does_not_move(moved):
    simulator, collided = moved(Action.STOP, actuation=1.0)
    assert (simulator.position == 0).all() and (simulator.yaw == 0).all() and not collided.any()


def test_noisy_moves_into_a_wall_collide(flat_simulator):
    simulator = flat_simulator(100, half_size=0.05)
    actuation = ActuationNoise(NoiseConfig(actuation=0.5), generator())
    collided = actuation.step(simulator, torch.full((100,), int(Action.MOVE_FORWARD)))
    assert collided.float().mean() > 0.9
    assert (simulator.position.abs() <= 0.05 + 1e-6).all()


@pytest.mark.parametrize("wrong", [{"rgb": -0.1}, {"depth": math.nan}, {"robot": "Roomba"}])
def test_wrong_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=r"rgb|depth|Roomba"):
        NoiseConfig(**wrong)
