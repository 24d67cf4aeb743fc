"""Side-tuning: its blend, how a side network starts, tasks in sequence, and stored features."""

import pytest
import torch
from side_tuning_recording import authors_value, recording
from torch import nn

from policies.adaptation import SideTuning, SideTuningConfig
from policies.encoders import Encoder, InputSpec, make_encoder
from policies.encoders.fcn import FCN5
from policies.encoders.taskonomy import TaskonomyEncoder
from policies.weights import save_safetensors


class Toy(Encoder):
    """One convolution from images in 0..1 to a map (channels, h, w), tokens (h * w, channels) or a vector."""

    output_layers = ("conv",)

    def __init__(self, kind="map", channels=8, stride=2, size=None):
        super().__init__(InputSpec(3, size, (0.0,), (1.0,)))
        self.conv = nn.Conv2d(3, channels, 3, stride=stride)
        self.kind = kind

    def forward(self, x):
        x = self.conv(x)
        return {"map": x, "tokens": x.flatten(2).mT, "vector": x.mean((2, 3))}[self.kind]


class Normalised(Toy):
    """The same with BatchNorm, whose statistics would show if it were left to train."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(super().forward(x))


@pytest.fixture
def image():
    return torch.randint(
        0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture
def small():
    return torch.rand(3, 9, 9, 3, generator=torch.Generator().manual_seed(0))


def make(base=None, side=None, **options):
    torch.manual_seed(0)
    config = SideTuningConfig(**{"weights": "random", "side_init": "random", **options})
    return SideTuning(config, base, side).eval()


def make_stack(stack, fusion, tasks=("a", "b", "c"), base=None):
    """A method with several tasks begun, the last one current, each side network another."""
    method = make(base or Toy(), stack=stack, fusion=fusion)
    for task in tasks:
        method.start_task(task)
    return method


# Alpha = sigmoid(a) with a = 0 at first weighs the base: arXiv:1912.13503, and merge_operators.py of the
# authors' code.
def test_alpha_starts_in_the_middle_and_is_learned():
    method = make()
    assert method.alpha.item() == 0.5
    assert method.fusion.alpha.logit.item() == 0.0
    assert method.fusion.alpha.logit.requires_grad
    assert method.metrics() == {"alpha": 0.5}


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
    assert alpha["params"][0] is method.fusion.alpha.logit
    optimizer = torch.optim.SGD(method.parameter_groups(10.0), lr=0.01)
    with torch.no_grad():
        method.fusion.alpha.logit.fill_(2.0)
    for parameter in method.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert method.fusion.alpha.logit.item() == 2.0


def test_alpha_learns_towards_the_better_network(image):
    method = make()
    target = method.base(image)
    optimizer = torch.optim.SGD([method.fusion.alpha.logit], lr=1.0)
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


def test_a_distilled_side_may_be_named_as_in_the_catalogue(image):
    method = make(side_init="distilled", side_weights="fcn5_small-normals-rgb")
    shipped = make_encoder("fcn5_small").eval()
    torch.testing.assert_close(method.side(image), shipped(shipped.preprocess(image)), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"'vit_mini-normals-rgb' are for vit_mini, .* not for 'fcn5_small'"):
        make(side_init="distilled", side_weights="vit_mini-normals-rgb")


def test_a_zero_side_adds_exactly_nothing_and_learns(image):
    method = make(side_init="zero", fusion="sum").train()
    assert torch.equal(method(image), method.base(image))
    optimizer = torch.optim.SGD(method.side.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        method(image).square().sum().backward()
        optimizer.step()
    # Once the last layer has left zero, gradients pass it to all others.
    assert all(p.grad.abs().sum() > 0 for p in method.side.parameters())


@pytest.mark.parametrize("encoder", ["fcn3", "fcn4", "fcn5", "fcn8"])
def test_a_zero_side_that_would_never_learn_is_refused(encoder):
    with pytest.raises(ValueError, match=f"'zero' with '{encoder}', which no gradient reaches"):
        make(encoder=encoder, side_init="zero")


def test_base_and_side_may_differ_if_their_features_agree(image):
    method = make(encoder="resnet44", side_encoder="fcn4")
    assert method(image).shape == (4, 64)
    assert sum(p.numel() for p in method.trainable_parameters()) == 25_904 + 1


@pytest.mark.parametrize("kind", ["map", "tokens", "vector"])
@pytest.mark.parametrize("fusion", ["alpha", "film", "mlp2", "concat"])
def test_any_two_networks_fuse_whose_features_agree(kind, fusion, small):
    base = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 6, 3, stride=2))
    other = Toy(kind, 6)
    other.conv = base
    method = make(other, Toy(kind, 6), fusion=fusion)
    assert method(small).shape == (3, *method.output_shape(9, 9))
    assert method(small).shape[1:] == {"map": (6, 4, 4), "tokens": (16, 6), "vector": (6,)}[kind]


def test_a_small_convolution_stands_beside_a_transformer_whose_map_it_matches(image):
    method = make(side=Toy(channels=96, stride=8), encoder="vit_mini")
    assert method(image).shape == (4, 96, 8, 8)
    torch.testing.assert_close(method(image), 0.5 * (method.base(image) + method.side(image)))


def test_the_paper_s_networks_fuse_and_count_as_in_its_code():
    with torch.device("meta"):
        method = make(TaskonomyEncoder(), FCN5(), fusion="mlp2")
    assert method.output_shape(256, 256) == (8, 16, 16)
    # The side network, and two times a factor, two 1x1 convolutions and a GroupNorm.
    assert sum(p.numel() for p in method.parameters()) == 921_376 + 2 * (1 + 64 + 16 + 64)


def test_base_and_side_of_different_shape_are_refused_at_once():
    with pytest.raises(
        ValueError, match=r"'fcn5_small' gives features \(8, 28, 28\) and side 'fcn4' \(64,\)"
    ):
        make(encoder="fcn5_small", side_encoder="fcn4")
    with pytest.raises(ValueError, match="one shape"):
        make(Toy(channels=8), Toy(channels=6))
    with pytest.raises(ValueError, match="one shape"):
        make(Toy(stride=2), Toy(stride=3))


def test_networks_that_agree_only_on_some_images_are_refused_on_others(small):
    method = make(Toy(), Toy(size=(9, 9)))
    assert method(small).shape == (3, 8, 4, 4)
    with pytest.raises(ValueError, match="one shape"):
        method.output_shape(20, 20)
    with pytest.raises(ValueError, match="differ in shape"):
        method(torch.rand(1, 20, 20, 3))


def test_a_side_of_ones_own_starts_every_task_with_its_weights(small):
    side = Toy()
    method = make(Toy(), side, side_init="copy")
    with torch.no_grad():
        expected = side(side.preprocess(small))
        side.conv.weight.zero_()
    assert torch.equal(method.side(small), expected)
    method.start_task("next")
    assert torch.equal(method.side(small), expected)
    assert all(p.requires_grad for p in method.side.parameters())


def test_a_side_of_ones_own_may_start_otherwise(small, tmp_path):
    side = Toy()
    assert not torch.equal(make(Toy(), side, side_init="random").side.encoder.conv.weight, side.conv.weight)
    assert not make(Toy(), side, side_init="zero").side(small).any()
    student = Toy()
    save_safetensors(tmp_path / "student.safetensors", student.state_dict())
    weights = str(tmp_path / "student.safetensors")
    distilled = make(Toy(), side, side_init="distilled", side_weights=weights).side.encoder
    assert torch.equal(distilled.conv.weight, student.conv.weight)


def test_a_side_is_given_in_one_way_only():
    with pytest.raises(ValueError, match="side_encoder 'fcn5_small' besides"):
        make(Toy(), Toy(), side_encoder="fcn5_small")
    with pytest.raises(ValueError, match="fusion 'base' besides"):
        make(Toy(), Toy(), fusion="base", side_init="copy")


def test_a_side_copies_a_base_of_ones_own(small):
    base = Toy("tokens")
    method = make(base, side_init="copy", fusion="sum")
    with torch.no_grad():
        base.conv.weight.zero_()
    method.start_task("next")
    assert torch.equal(method(small), 2 * method.base(small))


def test_stored_features_of_another_shape_are_refused(image):
    with pytest.raises(ValueError, match=r"base features \(4, 3\)"):
        make()(image, {"base": torch.zeros(4, 3)})


def test_base_alone_trains_nothing_and_side_alone_needs_no_base(image):
    base = make(fusion="base", side_init="copy")
    assert torch.equal(base(image), base.base(image))
    assert not list(base.parameters())
    assert not base.delta()
    with pytest.raises(ValueError, match="has no side network"):
        base.side  # noqa: B018
    side = make(fusion="side", side_encoder="fcn4")
    assert torch.equal(side(image), side.side(image))
    assert side.output_shape(64, 64) == (64,)
    assert side.base_features(image) == {}


@pytest.mark.parametrize("fusion", ["film", "mlp", "mlp2", "resmlp2", "mlp_hidden", "concat", "alpha"])
def test_weight_decay_spares_all_of_the_fusion(fusion):
    method = make(Toy(), fusion=fusion)
    side, merge = method.parameter_groups(0.1)
    assert [id(p) for p in side["params"]] == [id(p) for p in method.side.parameters()]
    assert [id(p) for p in merge["params"]] == [id(p) for p in method.fusion.parameters()]
    assert (side["weight_decay"], merge["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 1.0, "alpha_schedule": "linear", "alpha_final": 0.2, "alpha_fraction": 0.5}, 0.6),
        ({"alpha": 1.0, "alpha_schedule": "cosine", "alpha_fraction": 0.5}, 0.5),
        ({"alpha_schedule": "map", "alpha_prior": 75.0}, 0.75),
        ({"alpha": 0.3}, 0.3),
    ],
)
def test_progress_moves_alpha_along_its_schedule(options, expected, image):
    method = make(learn_alpha=False, **options)
    method.set_progress(25, 100)
    assert method.alpha.item() == pytest.approx(expected)
    assert method.metrics() == {"alpha": method.alpha.item()}
    torch.testing.assert_close(
        method(image), expected * method.base(image) + (1 - expected) * method.side(image)
    )


def test_a_delta_holds_where_the_schedule_stood():
    options = {"learn_alpha": False, "alpha": 1.0, "alpha_schedule": "linear"}
    method, other = make(Toy(), **options), make(Toy(), **options)
    method.set_progress(40, 100)
    other.load_delta(method.delta())
    assert other.alpha.item() == pytest.approx(0.6)


def test_each_task_has_a_schedule_of_its_own():
    method = make(Toy(), learn_alpha=False, alpha=1.0, alpha_schedule="linear")
    method.set_progress(40, 100)
    method.start_task("next")
    assert method.alpha.item() == 1.0
    method.start_task("task")
    assert method.alpha.item() == pytest.approx(0.6)


def fill(encoder, name):
    with torch.no_grad():
        encoder.conv.weight.copy_(authors_value(f"{name}.conv.weight", encoder.conv.weight.shape))
        encoder.conv.bias.copy_(authors_value(f"{name}.conv.bias", encoder.conv.bias.shape))


def test_the_blend_equals_the_authors():
    recorded = recording()
    base, side = Toy(), Toy()
    for encoder, sign in ((base, 1), (side, -1)):
        with torch.no_grad():
            encoder.conv.weight.copy_(sign * authors_value("conv.weight", (8, 3, 3, 3)))
            encoder.conv.bias.copy_(authors_value("conv.bias", (8,)))
    method = make(base, side, side_init="copy")
    with torch.no_grad():
        method.fusion.alpha.logit.fill_(1.39)
    image = recorded["image"].permute(0, 2, 3, 1)
    torch.testing.assert_close(method(image), recorded["blend/output"], rtol=1e-5, atol=1e-5)


def stacked_like_the_authors(stack, base, sides):
    encoder = Toy()
    fill(encoder, base)
    method = make(encoder, stack=stack)
    for task in range(3):
        # The first task is there from the start.
        method.start_task("task" if task == 0 else str(task))
        fill(method.side.encoder, f"{sides}.{task}")
    return method


def test_dense_tasks_equal_the_authors_in_values_and_gradients():
    recorded = recording()
    image = recorded["image"].permute(0, 2, 3, 1)
    method = stacked_like_the_authors("dense", "base", "sides")
    for index, task in enumerate(method.tasks):
        method.start_task(task)
        logit = method.fusion.alpha.logit
        with torch.no_grad():
            logit.copy_(authors_value(f"merge_operators.{index}.alphas", logit.shape))
        fused = method(image)
        torch.testing.assert_close(fused, recorded[f"dense/output{index}"], rtol=1e-5, atol=1e-5)
        fused.square().sum().backward()
        for own, theirs in (
            (method.side.encoder.conv.weight, f"dense/gradient{index}"),
            (logit, f"dense/alpha_gradient{index}"),
        ):
            torch.testing.assert_close(own.grad, recorded[theirs], rtol=1e-4, atol=1e-4)


def test_boosted_stages_equal_the_authors():
    # Their weights are a softmax of one number a stage: a chain of blends by the odds of what came before.
    recorded = recording()
    image = recorded["image"].permute(0, 2, 3, 1)
    method = stacked_like_the_authors("boosted", "encoder", "side_networks")
    numbers = [authors_value(f"alphas.{name}", ()) for name in ("base", 0, 1, 2)]
    for index, task in enumerate(method.tasks):
        method.start_task(task)
        before = torch.stack(numbers[: index + 1]).logsumexp(0)
        with torch.no_grad():
            method.fusion.alpha.logit.copy_(before - numbers[index + 1])
    for index, task in enumerate(method.tasks):
        method.start_task(task)
        torch.testing.assert_close(method(image), recorded[f"boosted/output{index}"], rtol=1e-5, atol=1e-5)


def test_boosted_sums_are_base_and_all_sides_so_far(small):
    method = make_stack("boosted", "sum")
    expected = method.base(small)
    for task in method.tasks:
        method.start_task(task)
        expected = expected + method.side(small)
        torch.testing.assert_close(method(small), expected)


def test_boosted_stages_take_what_came_before_as_their_base(small):
    method = make_stack("boosted", "film", tasks=("next",))
    method.start_task("task")
    before = method(small)
    method.start_task("next")
    torch.testing.assert_close(method(small), method.fusion(before, method.side(small)))


@pytest.mark.parametrize(
    ("stack", "fusion"),
    [("single", "alpha"), ("dense", "alpha"), ("dense", "mlp2"), ("boosted", "sum"), ("boosted", "concat")],
)
def test_earlier_tasks_are_left_as_they_were(stack, fusion, small):
    parent = nn.Sequential(make_stack(stack, fusion, base=Normalised()))
    method = parent[0]
    outputs = {}
    for task in method.tasks:
        method.start_task(task)
        outputs[task] = method(small).detach()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    parent.train()
    parent.requires_grad_(True)
    optimizer = torch.optim.Adam(parent.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        parent(small).square().sum().backward()
        optimizer.step()
    changed = {k for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(name.startswith("adapters.c.") for name in changed)
    for task in ("task", "a", "b"):
        method.start_task(task)
        torch.testing.assert_close(method.eval()(small), outputs[task], rtol=0, atol=0)


@pytest.mark.parametrize("stack", ["single", "dense", "boosted"])
@pytest.mark.parametrize("fusion", ["alpha", "sum", "product", "mlp", "mlp_hidden", "resmlp2"])
def test_stored_features_of_base_and_earlier_sides_change_nothing(stack, fusion, small):
    method = make_stack(stack, fusion, tasks=("a", "b"))
    stored = method.base_features(small)
    assert list(stored) == (["base"] if stack == "single" else ["base", "side.task", "side.a"])
    assert not any(value.requires_grad for value in stored.values())
    expected = method(small)
    assert torch.equal(method(small, stored), expected)
    assert torch.equal(method(small, {"base": stored["base"]}), expected)
    for name, value in stored.items():
        assert not torch.allclose(method(small, {**stored, name: value + 1}), expected)


@pytest.mark.parametrize("stack", ["dense", "boosted"])
def test_a_stack_of_tasks_restores_from_its_delta(stack, small):
    method = make_stack(stack, "alpha")
    other = make_stack(stack, "alpha", base=Toy())
    other.base.load_state_dict(method.base.state_dict())
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter))
    delta = method.delta()
    assert {name.split(".")[2] for name in delta} == {"side", "fusion"}
    other.load_delta(delta)
    for task in method.tasks:
        method.start_task(task)
        other.start_task(task)
        assert torch.equal(other(small), method(small))


def test_a_dense_task_weighs_the_base_every_earlier_side_and_its_own():
    method = make_stack("dense", "alpha")
    assert [len(method.adapters[task].fusion.alpha()) for task in method.tasks] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha 1.5"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"alpha": 1.0}, "cannot learn"),
        ({"fusion": "add"}, "fusion 'add': expected one of alpha, base"),
        ({"fusion": "sum", "alpha": 0.8}, "alpha 0.8 with fusion 'sum', which has no alpha"),
        ({"fusion": "film", "learn_alpha": False}, "learn_alpha False with fusion 'film'"),
        ({"alpha_schedule": "step"}, "alpha_schedule 'step': expected one of constant"),
        ({"alpha_schedule": "linear"}, "with an alpha that learns; set learn_alpha=False"),
        ({"learn_alpha": False, "alpha_final": 0.1}, "alpha_final 0.1 with alpha_schedule 'constant'"),
        ({"learn_alpha": False, "alpha_fraction": 0.5}, "alpha_fraction 0.5 with alpha_schedule 'constant'"),
        ({"learn_alpha": False, "alpha_schedule": "linear", "alpha_final": -1.0}, "alpha_final -1.0"),
        ({"learn_alpha": False, "alpha_schedule": "linear", "alpha_fraction": 0.0}, "alpha_fraction 0.0"),
        ({"learn_alpha": False, "alpha_schedule": "map"}, "'map' needs the number of samples"),
        ({"learn_alpha": False, "alpha_prior": 10.0}, "'map' needs the number of samples"),
        ({"learn_alpha": False, "alpha_schedule": "map", "alpha_prior": 0.0}, "alpha_prior 0.0"),
        (
            {"learn_alpha": False, "alpha_schedule": "map", "alpha_prior": 9.0, "alpha": 0.8},
            "'map', which starts at 1",
        ),
        ({"side_init": "ones"}, "side_init 'ones'"),
        ({"side_init": "distilled"}, "needs a file"),
        ({"side_init": "copy", "side_weights": "x.safetensors"}, "others take none"),
        ({"side_init": "copy", "side_encoder": "fcn4"}, "needs a side network like the base"),
        ({"fusion": "base", "side_init": "random"}, "fusion 'base' has no side network"),
        ({"stack": "tower"}, "stack 'tower': expected one of single, dense, boosted"),
        ({"stack": "dense", "fusion": "film"}, "'film', which takes one side network"),
        ({"stack": "boosted", "fusion": "side"}, "not 'side' alone"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SideTuningConfig(**options)
