"""Every method against every behaviour; a new method joins by a row in CASES."""

import copy

import pytest
import torch
from adaptation_cases import CASES
from torch import nn

from policies.adaptation import ADAPTATIONS, make_adaptation

FROZEN = [name for name, case in CASES.items() if case.frozen_base]


def make(case):
    torch.manual_seed(0)
    row = CASES[case]
    return make_adaptation(row.method, **{"weights": "random", **row.options})


def images(method, number=3):
    channels = CASES[method].options.get("channels", 3)
    generator = torch.Generator().manual_seed(1)
    if channels == 1:
        return torch.rand(number, 64, 64, 1, generator=generator)
    return torch.randint(0, 256, (number, 64, 64, 3), dtype=torch.uint8, generator=generator)


def test_every_method_has_a_case():
    assert {row.method for row in CASES.values()} == set(ADAPTATIONS)


@pytest.mark.parametrize("case", CASES)
def test_output_has_the_declared_shape(case):
    method = make(case)
    assert method(images(case)).shape == (3, *method.output_shape(64, 64))


@pytest.mark.parametrize("case", CASES)
def test_stored_features_change_nothing(case):
    method = make(case).eval()
    image = images(case)
    stored = method.base_features(image)
    assert bool(stored) == CASES[case].stores
    for value in stored.values():
        assert value.dtype == torch.float32
        assert not value.requires_grad
    torch.testing.assert_close(method(image, stored or None), method(image), rtol=0, atol=0)


@pytest.mark.parametrize("case", FROZEN)
def test_the_base_survives_a_parent_that_thaws_and_trains_byte_for_byte(case):
    parent = nn.Sequential(make(case))
    base = parent[0].base
    before = {k: v.clone() for k, v in base.state_dict().items()}
    head = nn.LazyLinear(2)
    parent.train()
    parent.requires_grad_(True)
    head(parent(images(case)).flatten(1))
    optimizer = torch.optim.Adam([*parent.parameters(), *head.parameters()], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        head(parent(images(case)).flatten(1)).square().sum().backward()
        optimizer.step()
    assert not any(module.training for module in base.modules())
    assert not any(value.requires_grad for value in [*base.parameters(), *base.buffers()])
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_exactly_the_trainable_parameters(case):
    method = make(case).train()
    with torch.no_grad():
        # A side network that still equals its base leaves alpha without a gradient.
        for parameter in method.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    output = method(images(case))
    assert output.requires_grad == (not case.startswith("features"))
    if output.requires_grad:
        output.square().sum().backward()
    reached = {id(p) for p in method.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {id(p) for p in method.trainable_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_optimiser_groups_hold_each_trainable_parameter_once(case):
    method = make(case)
    grouped = [id(p) for group in method.parameter_groups(0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.trainable_parameters())


@pytest.mark.parametrize("case", CASES)
def test_a_saved_state_restores_the_method(case):
    method = make(case).eval()
    torch.manual_seed(99)
    row = CASES[case]
    other = make_adaptation(row.method, **{"weights": "random", **row.options}).eval()
    image = images(case)
    assert not torch.equal(other(image), method(image))
    other.load_state_dict(method.state_dict())
    torch.testing.assert_close(other(image), method(image), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_copies_are_independent(case):
    method = make(case)
    twin = copy.deepcopy(method)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert not any(torch.equal(a, b) for a, b in zip(method.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_half_precision_training_stays_near_and_finite(case):
    method = make(case).eval()
    image = images(case)
    exact = method(image)
    with torch.autocast("cpu", torch.bfloat16):
        rough = method(image)
        stored = method.base_features(image)
    assert all(value.dtype == torch.float32 for value in stored.values())
    assert torch.isfinite(rough).all()
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean() + 1e-3


@pytest.mark.parametrize("case", CASES)
def test_wrong_images_are_refused(case):
    with pytest.raises(ValueError, match=r"image of shape \(2, 64, 64, 2\)"):
        make(case)(torch.zeros(2, 64, 64, 2))


def test_pretrained_batchnorm_statistics_do_not_drift():
    resnet = make_adaptation("finetune", encoder="resnet44", weights="random").train()
    before = resnet.network.encoder.bn1.running_mean.clone()
    resnet(torch.rand(2, 32, 32, 3))
    assert torch.equal(resnet.network.encoder.bn1.running_mean, before)


def test_unknown_methods_and_options_name_the_nearest():
    with pytest.raises(ValueError, match="unknown adaptation 'side-tune'; did you mean 'sidetune'"):
        make_adaptation("side-tune")
    with pytest.raises(ValueError, match="'sidetune' has no option 'alfa'; did you mean 'alpha'"):
        make_adaptation("sidetune", alfa=0.5)
    with pytest.raises(ValueError, match="'features' has no option 'alpha'"):
        make_adaptation("features", alpha=0.5)


def test_scratch_takes_no_weights():
    with pytest.raises(ValueError, match="from scratch starts from 'random'"):
        make_adaptation("scratch", weights="default")
