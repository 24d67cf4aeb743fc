"""Masks, their gradients and their storage.

``tests/data/piggyback.npz`` was recorded with the authors' layers (github.com/arunmallya/piggyback, commit
5a6094c4, ``src/modnets/layers.py``): a grouped ``ElementWiseConv2d`` with stride, ReLU and an
``ElementWiseLinear``, with random weights, and scores on both sides of the threshold, on it and at 0. Mended
for today's torch, without touching the arithmetic: ``Binarizer`` and ``Ternarizer`` are static autograd
functions that take the threshold as an argument. Gradients were scaled after the backward pass as
``do_batch`` in ``src/main.py`` does.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from policies.adaptation import Piggyback, PiggybackConfig
from policies.adaptation.piggyback import pack_bits, unpack_bits
from policies.encoders import Encoder, InputSpec, make_encoder

RECORDED = Path(__file__).parents[2] / "data" / "piggyback.npz"


class Toy(Encoder):
    """The network of the recording."""

    def __init__(self):
        super().__init__(InputSpec())
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3)
        self.linear = nn.Linear(96, 5)

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).flatten(1))


class Normalised(Encoder):
    """One of each kind of normalisation."""

    def __init__(self):
        super().__init__(InputSpec())
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.batch = nn.BatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)
        self.layer = nn.LayerNorm(4)

    def forward(self, x):
        return self.layer(self.group(self.batch(self.conv(x))).mean(dim=(2, 3)))


class Wide(Encoder):
    """One linear layer for images of 2 x 2 pixels."""

    def __init__(self):
        super().__init__(InputSpec())
        self.linear = nn.Linear(12, 1)

    def forward(self, x):
        return self.linear(x.flatten(1))


def make(base=None, **options):
    torch.manual_seed(0)
    return Piggyback(PiggybackConfig(weights="random", **options), base or Toy())


@pytest.fixture
def image():
    return torch.rand(3, 8, 8, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def recorded():
    with np.load(RECORDED) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def set_scores(method, **scores):
    with torch.no_grad():
        for name, value in scores.items():
            method.adapter.scores[f"{name}/weight"].copy_(value)


@pytest.mark.parametrize("scale", ["none", "average", "individual"])
@pytest.mark.parametrize("threshold", ["binarizer", "ternarizer"])
def test_outputs_and_gradients_are_those_of_the_authors_layers(recorded, threshold, scale):
    base = Toy()
    base.load_state_dict({name: recorded[name] for name in base.state_dict()})
    method = make(base, ternary=threshold == "ternarizer", mask_scale_gradients=scale)
    set_scores(method, conv=recorded["conv.score"], linear=recorded["linear.score"])
    output = method(recorded["image"])
    torch.testing.assert_close(output, recorded[f"{threshold}.output"], rtol=1e-5, atol=1e-5)
    (output * recorded["target"]).sum().backward()
    for layer in ("conv", "linear"):
        torch.testing.assert_close(
            method.adapter.scores[f"{layer}/weight"].grad,
            recorded[f"{threshold}.{scale}.{layer}.gradient"],
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("encoder", ["fcn5_small", "resnet44"])
@pytest.mark.parametrize("options", [{}, {"ternary": True}, {"mask_init": "weight_based_1s"}])
def test_all_weights_kept_is_the_base_exactly(encoder, options):
    torch.manual_seed(0)
    base = make_encoder(encoder, weights="random").eval()
    method = make(base, **options)
    image = torch.rand(2, 64, 64, 3)
    assert all((mask == 1).all() for mask in method.masks().values())
    assert torch.equal(method(image), method.base(image))


def test_gradients_of_scores_are_those_of_the_masked_weights_times_the_weights(image):
    method = make()
    set_scores(method, conv=torch.randn(6, 1, 3, 3), linear=torch.randn(5, 96))
    method(image).square().sum().backward()
    brute = copy.deepcopy(method.base.encoder)
    masked = {}
    for name, mask in method.masks().items():
        masked[name] = (brute.get_buffer(name) * mask).requires_grad_()
    x = F.conv2d(brute.preprocess(image), masked["conv.weight"], brute.conv.bias, 2, 1, 1, 3)
    F.linear(torch.relu(x).flatten(1), masked["linear.weight"], brute.linear.bias).square().sum().backward()
    for name, value in masked.items():
        score = method.adapter.scores[name.replace(".", "/")]
        torch.testing.assert_close(score.grad, value.grad * brute.get_buffer(name))
        # Weights that are switched off hear how they would matter.
        assert score.grad[method.masks()[name] == 0].abs().sum() > 0


def test_training_flips_bits_and_leaves_every_weight_as_it_was(image):
    method = make()
    before = {k: v.clone() for k, v in method.base.state_dict().items()}
    target = torch.randn(3, 5)
    optimizer = torch.optim.Adam(method.parameter_groups(0.1), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        (method(image) - target).square().sum().backward()
        optimizer.step()
    removed = sum(int((mask == 0).sum()) for mask in method.masks().values())
    assert 0 < removed < sum(mask.numel() for mask in method.masks().values())
    assert all(torch.equal(value, before[name]) for name, value in method.base.state_dict().items())


@pytest.mark.parametrize(("score", "mask", "ternary"), [
    (5e-3, 0, 0), (5.001e-3, 1, 1), (0.0, 0, 0), (-1e-9, 0, -1), (1e-2, 1, 1), (-1e-2, 0, -1),
])  # fmt: skip
def test_a_weight_is_kept_above_the_threshold_only(score, mask, ternary):
    for option, expected in ((False, mask), (True, ternary)):
        method = make(ternary=option)
        set_scores(method, conv=torch.tensor(score), linear=torch.tensor(score))
        assert all((found == expected).all() for found in method.masks().values())


def test_the_shares_of_kept_and_turned_weights_are_reported():
    for ternary, expected in ((False, {"kept": 0.25}), (True, {"kept": 0.5, "turned": 0.25})):
        method = make(Wide(), ternary=ternary)
        assert method.metrics()["kept"] == 1.0
        set_scores(method, linear=torch.tensor([-0.01, 0.004, 0.0, 0.01]).repeat(3).view(1, 12))
        assert method.metrics() == expected


def test_no_weight_is_removed_before_fifty_steps_of_the_published_rate(image):
    method = make()
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-4)
    removed = []
    for _ in range(60):
        optimizer.zero_grad()
        # A loss whose gradients keep their signs.
        sum((score * method.masks()[name.replace("/", ".")].add(1)).sum()
            for name, score in method.adapter.scores.items()).backward()  # fmt: skip
        optimizer.step()
        removed.append(any((mask == 0).any() for mask in method.masks().values()))
    assert 49 <= removed.index(True) <= 51


def test_a_tenth_of_scale_and_threshold_is_ten_times_the_learning_rate(image):
    target = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    masks = []
    for factor in (1.0, 0.1):
        method = make(mask_scale=1e-2 * factor, threshold=5e-3 * factor)
        optimizer = torch.optim.Adam(method.parameters(), lr=2e-3 * factor)
        for _ in range(8):
            optimizer.zero_grad()
            (method(image) - target).square().sum().backward()
            optimizer.step()
        masks.append(torch.cat([mask.flatten() for mask in method.masks().values()]))
    assert (masks[0] == 0).any()
    assert torch.equal(*masks)


def test_scores_never_decay_even_if_asked():
    method = make(Normalised(), normalisation="affine")
    scores, normalisation = method.parameter_groups(0.5)
    assert scores["weight_decay"] == 0.0
    assert normalisation["weight_decay"] == 0.5
    assert {id(p) for p in scores["params"]} == {id(p) for p in method.adapter.scores.values()}


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_bits_are_packed_as_numpy_packs_them(count):
    bits = torch.rand(count, generator=torch.Generator().manual_seed(count)) > 0.5
    packed = pack_bits(bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == np.packbits(bits.numpy()).tolist()
    assert torch.equal(unpack_bits(packed, count), bits)


@pytest.mark.parametrize(("ternary", "bits"), [(False, 1), (True, 2)])
def test_a_task_is_stored_in_a_bit_a_weight_or_two(ternary, bits):
    method = make(make_encoder("resnet44", weights="random"), ternary=ternary)
    delta = method.delta()
    weights = {name: mask.numel() for name, mask in method.masks().items()}
    assert len(weights) == 43
    assert set(delta) == {f"adapters.task.masks.{name.replace('.', '/')}" for name in weights}
    for name, count in weights.items():
        stored = delta[f"adapters.task.masks.{name.replace('.', '/')}"]
        assert stored.dtype == torch.uint8
        assert stored.nbytes == -(-count * bits // 8)
    # 32 (or 16) times less than the weights themselves.
    total = 4 * sum(weights.values())
    assert sum(value.nbytes for value in delta.values()) == pytest.approx(total * bits / 32, rel=1e-3)


@pytest.mark.parametrize("options", [
    {}, {"ternary": True}, {"mask_init": "uniform"}, {"mask_init": "weight_based_1s", "ternary": True},
])  # fmt: skip
def test_a_stored_mask_comes_back_the_same_with_fresh_scores(options, image):
    method, other = make(**options), make(**options)
    set_scores(method, conv=0.02 * torch.randn(6, 1, 3, 3), linear=0.02 * torch.randn(5, 96))
    other.load_delta(method.delta())
    for name, mask in method.masks().items():
        assert set(mask.unique().tolist()) == ({-1.0, 0.0, 1.0} if options.get("ternary") else {0.0, 1.0})
        assert torch.equal(other.masks()[name], mask)
        start = 1e-2 if options.get("mask_init") != "weight_based_1s" else other.base.encoder.get_buffer(name)
        kept = start if isinstance(start, float) else float(start.abs().mean())
        score = other.adapter.scores[name.replace(".", "/")]
        torch.testing.assert_close(score.detach(), kept * mask, rtol=0, atol=0)
    assert torch.equal(other(image), method(image))
    resumed = make(**options)
    resumed.load_state_dict(method.state_dict())
    assert torch.equal(resumed.adapter.scores["conv/weight"], method.adapter.scores["conv/weight"])


def test_masks_that_are_no_packed_bits_are_refused():
    method = make()
    wrong = {name: value.float() for name, value in method.delta().items()}
    with pytest.raises(ValueError, match=r"masks.conv/weight is torch.float32; expected packed bits"):
        method.load_delta(wrong)
    binary = make(ternary=True)
    with pytest.raises(ValueError, match=r"masks.conv/weight \(7,\) instead of \(14,\)"):
        binary.load_delta(method.delta())


def test_several_tasks_share_one_base_and_keep_their_own_outputs(image):
    method = make(Normalised(), normalisation="statistics").eval()
    outputs = {}
    for number, task in enumerate(("task", "second", "third")):
        method.start_task(task)
        torch.testing.assert_close(method(image), method.base(image), rtol=0, atol=0)
        set_scores(method, conv=torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(number)))
        outputs[task] = method(image)
        assert {n.split(".")[1] for n, p in method.named_parameters() if p.requires_grad} == {task}
    for task, output in outputs.items():
        method.start_task(task)
        assert torch.equal(method(image), output)
        assert sum(torch.equal(output, other) for other in outputs.values()) == 1
    fresh = make(method.base.encoder, normalisation="statistics").eval()
    fresh.start_task("third")
    fresh.start_task("second")
    fresh.load_delta(method.delta())
    torch.testing.assert_close(fresh(image), outputs["second"], rtol=0, atol=0)


@pytest.mark.parametrize(("option", "parameters", "buffers"), [
    ("frozen", 0, 0), ("affine", 6, 0), ("statistics", 6, 3),
])  # fmt: skip
def test_normalisation_belongs_to_the_task_as_far_as_asked(option, parameters, buffers):
    method = make(Normalised(), normalisation=option)
    own = method.adapter.normalisation
    assert (0 if own is None else len(list(own.parameters()))) == parameters
    assert (0 if own is None else len(list(own.buffers()))) == buffers
    assert len(method.delta()) == 1 + parameters + buffers


def test_statistics_of_a_task_follow_its_batches_in_training_only(image):
    base = Normalised()
    method = make(base, normalisation="statistics").train()
    own = method.adapter.normalisation
    with torch.no_grad():
        maps = base.conv(base.preprocess(image))
    expected = 0.9 * base.batch.running_mean + 0.1 * maps.mean(dim=(0, 2, 3))
    trained = method(image)
    torch.testing.assert_close(own.get_buffer("batch/running_mean"), expected)
    assert torch.equal(method.base.encoder.batch.running_mean, base.batch.running_mean)
    assert not any(module.training for module in method.base.modules())
    batch = base.train()(base.preprocess(image))
    torch.testing.assert_close(trained, batch)
    before = own.get_buffer("batch/running_mean").clone()
    assert not torch.allclose(method.eval()(image), trained)
    assert torch.equal(own.get_buffer("batch/running_mean"), before)


def test_a_failing_pass_leaves_the_base_in_evaluation_mode():
    method = make(Normalised(), normalisation="statistics").train()
    with pytest.raises(RuntimeError):
        method(torch.rand(1, 2, 2, 3))
    assert not any(module.training for module in method.base.modules())


def test_uniform_scores_start_on_both_sides_of_the_threshold():
    method = make(mask_init="uniform")
    scores = torch.cat([score.flatten() for score in method.adapter.scores.values()])
    assert scores.abs().max() <= 1e-2
    # Of -0.01..0.01, a quarter is above 0.005.
    kept = torch.cat([mask.flatten() for mask in method.masks().values()]).mean()
    assert kept == pytest.approx(0.25, abs=0.06)


def test_weights_of_zero_get_no_gradient_that_is_no_number(image):
    base = Toy()
    with torch.no_grad():
        base.linear.weight[:, :10] = 0
    method = make(base, mask_scale_gradients="individual")
    method(image).sum().backward()
    gradient = method.adapter.scores["linear/weight"].grad
    assert torch.isfinite(gradient).all()
    assert not gradient[:, :10].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_init": "ones"}, "mask_init 'ones': expected one of constant"),
        ({"mask_scale_gradients": "mean"}, "mask_scale_gradients 'mean'"),
        ({"normalisation": "train"}, "normalisation 'train'"),
        ({"threshold": -1.0}, "threshold -1.0: expected 0 or more"),
        ({"threshold": float("nan")}, "threshold nan"),
        ({"mask_scale": 5e-3}, "every weight would start removed"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PiggybackConfig(**options)


def test_weight_based_scores_below_the_threshold_are_refused():
    with pytest.raises(ValueError, match=r"0\.0\d+ of linear\.weight is not above the threshold 0\.06"):
        make(mask_init="weight_based_1s", threshold=0.06)
