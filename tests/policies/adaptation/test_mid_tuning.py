"""Frozen features first, full fine-tuning afterwards."""

import copy

import pytest
import torch

from policies.adaptation import MidTuning, MidTuningConfig
from policies.encoders import make_encoder


def make(**options):
    torch.manual_seed(0)
    return MidTuning(MidTuningConfig(**{"weights": "random", **options}))


@pytest.fixture
def image():
    return torch.randint(
        0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_it_starts_as_the_base_and_unfreezing_changes_no_output(image):
    base = make_encoder("resnet_small", weights="random").eval()
    method = MidTuning(MidTuningConfig(), base)
    before = method(image)
    torch.testing.assert_close(before, base(base.preprocess(image)).detach(), rtol=0, atol=0)
    method.set_progress(1, 1)
    torch.testing.assert_close(method(image), before, rtol=0, atol=0)


def test_it_switches_when_its_share_of_the_training_is_done(image):
    method = make(unfreeze_at=0.25)
    phases = []
    for samples in range(0, 101, 5):
        method.set_progress(samples, 100)
        phases.append(bool(method.base_features(image)))
        assert method.metrics() == {"unfrozen": float(not phases[-1])}
    assert phases == [True] * 5 + [False] * 16


@pytest.mark.parametrize(("share", "frozen"), [(0.0, False), (1.0, True)])
def test_at_its_ends_it_is_fine_tuning_or_feature_extraction(share, frozen, image):
    method = make(unfreeze_at=share)
    for _ in range(2):
        assert bool(method.base_features(image)) == frozen
        assert method(image).requires_grad == (not frozen)
        method.set_progress(100, 100)


@pytest.mark.parametrize("mode", [True, False])
def test_gradients_reach_all_parameters_in_the_second_phase_and_none_in_the_first(mode, image):
    method = make(encoder="resnet44").train(mode)
    parameters = list(method.trainable_parameters())
    assert len(parameters) == len(list(method.parameters()))
    assert not method(image).requires_grad
    assert not method(image, method.base_features(image)).requires_grad
    method.set_progress(1, 2)
    method(image).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in parameters)


def test_an_optimiser_made_at_the_start_moves_it_in_the_second_phase_alone(image):
    method = make().train()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    head = torch.nn.Linear(8 * 8 * 8, 1)
    groups = [*method.parameter_groups(0.1), {"params": head.parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)

    def updates(count):
        for _ in range(count):
            optimizer.zero_grad()
            head(method(image).flatten(1)).square().mean().backward()
            optimizer.step()

    updates(3)
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    method.set_progress(1, 2)
    updates(1)
    names = {name for name, _ in method.named_parameters()}
    assert not any(torch.equal(v, before[k]) for k, v in method.state_dict().items() if k in names)


def test_stored_features_are_used_while_it_is_frozen_and_never_afterwards(image):
    method = make()
    stored = {"base": torch.zeros_like(method.base_features(image)["base"])}
    assert torch.equal(method(image, stored), stored["base"])
    method.set_progress(1, 2)
    assert torch.equal(method(image, stored), method(image))


def test_the_phase_is_part_of_the_state():
    method = make()
    method.set_progress(1, 2)
    for restored in (make(), copy.deepcopy(make())):
        restored.load_state_dict(method.state_dict())
        assert restored.unfrozen
    other = make()
    other.load_delta(method.delta())
    assert other.unfrozen


def test_a_longer_training_does_not_freeze_it_again():
    method = make()
    method.set_progress(50, 100)
    method.set_progress(50, 1000)
    assert method.unfrozen


def test_a_further_task_begins_frozen_with_what_was_learned(image):
    method = make()
    method.set_progress(1, 2)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1)
    learned = method(image)
    method.start_task("second")
    assert method.base_features(image)
    torch.testing.assert_close(method(image), learned, rtol=0, atol=0)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_wrong_settings_are_refused(share):
    with pytest.raises(ValueError, match=f"unfreeze_at {share}"):
        MidTuningConfig(unfreeze_at=share)
