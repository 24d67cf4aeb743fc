"""Alpha blending, and how a side network starts."""

import pytest
import torch

from policies.adaptation import SideTuning, SideTuningConfig
from policies.encoders import make_encoder
from policies.weights import save_safetensors


@pytest.fixture
def image():
    return torch.randint(
        0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def make(**options):
    torch.manual_seed(0)
    return SideTuning(SideTuningConfig(**{"weights": "random", "side_init": "random", **options})).eval()


def test_alpha_starts_in_the_middle_and_is_learned():
    method = make()
    assert method.alpha.item() == 0.5
    assert method.alpha_logit.item() == 0.0
    assert method.alpha_logit.requires_grad


def test_alpha8_is_a_sigmoid_of_1_39():
    method = make(alpha=0.8)
    assert method.alpha.item() == pytest.approx(0.8, abs=1e-6)
    assert method.alpha_logit.item() == pytest.approx(1.39, abs=0.005)


@pytest.mark.parametrize(("alpha", "part"), [(1.0, "base"), (0.0, "side")])
def test_at_its_ends_the_blend_is_one_network_exactly(alpha, part, image):
    method = make(alpha=alpha, learn_alpha=False)
    assert torch.equal(method(image), getattr(method, part)(image))


def test_alpha_weighs_the_base(image):
    method = make(alpha=0.7)
    expected = 0.7 * method.base(image) + 0.3 * method.side(image)
    torch.testing.assert_close(method(image), expected)


def test_weight_decay_spares_alpha():
    method = make()
    side, alpha = method.parameter_groups(0.1)
    assert side["weight_decay"] == 0.1
    assert alpha["weight_decay"] == 0.0
    assert alpha["params"][0] is method.alpha_logit
    optimizer = torch.optim.SGD(method.parameter_groups(10.0), lr=0.01)
    with torch.no_grad():
        method.alpha_logit.fill_(2.0)
    for parameter in method.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert method.alpha_logit.item() == 2.0


def test_alpha_learns_towards_the_better_network(image):
    method = make()
    target = method.base(image)
    optimizer = torch.optim.SGD([method.alpha_logit], lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        (method(image) - target).square().mean().backward()
        optimizer.step()
    assert method.alpha.item() > 0.55


def test_a_copied_side_starts_as_the_base(image):
    method = make(side_init="copy")
    assert torch.equal(method(image), method.base(image))


def test_a_quiet_side_starts_near_zero_and_can_learn(image):
    method = make(side_init="low_energy")
    assert method.side(image).abs().mean() < 0.02 * method.base(image).abs().mean()
    method(image).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in method.side.parameters())


def test_a_distilled_side_starts_from_its_file(image, tmp_path):
    torch.manual_seed(7)
    student = make_encoder("fcn5_small", weights="random").eval()
    with torch.no_grad():
        student.groupnorm.weight.mul_(2)
    save_safetensors(tmp_path / "student.safetensors", student.state_dict())
    method = make(side_init="distilled", side_weights=str(tmp_path / "student.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(method.side(image), student(student.preprocess(image)), rtol=0, atol=0)


def test_base_and_side_may_differ_if_their_features_agree(image):
    method = make(encoder="resnet44", side_encoder="fcn4")
    assert method(image).shape == (4, 64)
    assert sum(p.numel() for p in method.trainable_parameters()) == 25_904 + 1


def test_base_and_side_of_different_shape_are_refused(image):
    method = make(encoder="fcn5_small", side_encoder="fcn4")
    with pytest.raises(ValueError, match="one shape"):
        method.output_shape(64, 64)
    with pytest.raises(ValueError, match="differ in shape"):
        method(image)


def test_stored_features_of_another_shape_are_refused(image):
    with pytest.raises(ValueError, match=r"base features \(4, 3\)"):
        make()(image, {"base": torch.zeros(4, 3)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha 1.5"),
        ({"alpha": 1.0}, "cannot learn"),
        ({"side_init": "zero"}, "side_init 'zero'"),
        ({"side_init": "distilled"}, "needs a file"),
        ({"side_init": "copy", "side_weights": "x.safetensors"}, "others take none"),
        ({"side_init": "copy", "side_encoder": "fcn4"}, "needs a side network like the base"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SideTuningConfig(**options)
