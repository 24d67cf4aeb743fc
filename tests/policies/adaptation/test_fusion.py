"""Fusion operators against the authors' on the same weights, and each one's own algebra."""

import re
import typing

import pytest
import torch
import torch.nn.functional as F
from side_tuning_recording import fill, recording
from torch import nn

from policies.adaptation.alpha import Alpha, AlphaSchedule, DenseAlpha
from policies.adaptation.fusion import ONE_SIDE, FusionName, Transfer, make_fusion

NAMES = typing.get_args(FusionName)
SHAPES = {"map": (8, 5, 5), "vector": (64,)}
AUTHORS = {
    r"^alpha\.logit": "alphas",
    r"^base_layer": "base_net",
    r"^side_layer": "side_net",
    r"^earlier_layers": "dense_side_nets",
    r"^hidden": "film.base_layer",
    r"^scale": "film.mult_head",
    r"^shift": "film.add_head",
}


@pytest.fixture(scope="module")
def recorded():
    return recording()


def make(name, shape, earlier=0, alpha=0.5, learned=True):
    schedule = AlphaSchedule(alpha)
    weights = DenseAlpha(schedule, learned, earlier + 1) if earlier else Alpha(schedule, learned)
    return make_fusion(name, shape, weights if name == "alpha" else None, earlier)


def authors_name(fusion):
    def rename(name):
        for own, theirs in AUTHORS.items():
            name = re.sub(own, theirs, name)
        # Their residual layer wraps the one beside the shortcut.
        return name.replace("side_net.", "side_net.net.") if fusion == "resmlp2" else name

    return rename


def features(shape, count=2, number=4):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(number, *shape, generator=generator) for _ in range(count)]


RECORDED = [
    (name, kind, stack)
    for name in NAMES
    for kind in SHAPES
    for stack in ("single", "dense")
    if name != "concat" and not (stack == "dense" and name in ONE_SIDE) and (name, kind) != ("film", "vector")
]


@pytest.mark.parametrize(("name", "kind", "stack"), RECORDED)
def test_operators_equal_the_authors_on_the_same_weights(name, kind, stack, recorded):
    base, side, *earlier = recorded[f"features/{kind}"]
    earlier = earlier if stack == "dense" else []
    fusion = make(name, SHAPES[kind], len(earlier))
    fill(fusion, authors_name(name))
    key = f"{name}/{kind}/{stack}"
    expected = recorded[f"{key}/eval"]
    torch.testing.assert_close(fusion.eval()(base, side, earlier), expected, rtol=1e-5, atol=1e-5)
    if f"{key}/train" in recorded:
        expected = recorded[f"{key}/train"]
        torch.testing.assert_close(fusion.train()(base, side, earlier), expected, rtol=1e-5, atol=1e-5)


def test_every_recorded_operator_is_compared(recorded):
    keys = {name.removesuffix("/eval") for name in recorded if name.endswith("/eval")}
    assert keys == {"/".join(row) for row in RECORDED}


def test_concat_and_its_transfer_equal_the_authors(recorded):
    base, side = (nn.Conv2d(3, 8, 3, stride=2) for _ in range(2))
    fill(base, lambda name: f"base.conv.{name}")
    fill(side, lambda name: f"side.conv.{name}")
    fusion = make("concat", (8, 4, 4))
    fill(fusion, lambda name: name)
    image = recorded["image"]
    expected = recorded["concat/output"]
    torch.testing.assert_close(fusion(base(image), side(image)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "parameters"),
    [
        # TransferConv3 of the authors' code (arXiv:1912.13503): two 3x3 convolutions from 8 to 8 channels.
        (Transfer(8, 8), 1_168),
        (make("concat", (8, 4, 4)), 16 * 8 * 9 + 8 + 8 * 8 * 9 + 8),
        (make("alpha", None), 1),
        (make("alpha", None, earlier=2), 4),
        (make("mlp", (8, 4, 4)), 1 + 64 + 16 + 64),
        (make("mlp2", (64,)), 2 * (2 * (64 * 64 + 64) + 128)),
        (make("film", (8, 4, 4)), 8 * 64 + 128 + 2 * (64 * 8 + 8)),
    ],
)
def test_operators_have_the_authors_number_of_parameters(module, parameters):
    assert sum(p.numel() for p in module.parameters()) == parameters


@pytest.mark.parametrize(
    "shape", [(8, 5, 4), (3, 2, 2), (6, 7), (5, 12), (64,), (3,), (1,), (1, 2, 2), (2, 1)]
)
@pytest.mark.parametrize("name", NAMES)
def test_fused_features_keep_their_shape_and_learn(name, shape):
    fusion = make(name, shape).train()
    base, side = features(shape)
    side.requires_grad_(True)
    fused = fusion(base, side)
    assert fused.shape == base.shape
    assert torch.isfinite(fused).all()
    if name != "base":
        fused.square().sum().backward()
        assert torch.isfinite(side.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in fusion.parameters())


@pytest.mark.parametrize("name", ["film", "mlp", "mlp2", "resmlp2", "mlp_hidden"])
def test_tokens_fuse_as_a_map_of_as_many_pixels_does(name):
    base, side = features((8, 3, 4))
    on_map, on_tokens = make(name, (8, 3, 4)), make(name, (12, 8))
    on_tokens.load_state_dict(on_map.state_dict())
    fused = on_tokens(base.flatten(2).mT, side.flatten(2).mT)
    torch.testing.assert_close(fused.mT.unflatten(2, (3, 4)), on_map(base, side))


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_tokens_does_not_matter(name):
    fusion = make(name, (5, 6))
    base, side = features((5, 6))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(fusion(base[:, order], side[:, order]), fusion(base, side)[:, order])


def test_tokens_and_vectors_are_transferred_one_by_one():
    base, side = features((6,))
    fusion = make("concat", (6,))
    weights = {k: v.squeeze() for k, v in fusion.transfer.state_dict().items()}
    both = F.group_norm(torch.cat([base, side], 1), 2)
    hidden = F.relu(F.linear(both, weights["conv1.weight"], weights["conv1.bias"]))
    expected = F.relu(F.linear(hidden, weights["conv2.weight"], weights["conv2.bias"])) + both[:, :6]
    torch.testing.assert_close(fusion(base, side), expected)


@pytest.mark.parametrize("shape", [(8, 3, 3), (5, 6), (4,)])
def test_neutral_sides_leave_the_base_as_it_is(shape):
    base, side = features(shape)
    assert torch.equal(make("base", shape)(base, side), base)
    assert torch.equal(make("side", shape)(base, side), side)
    assert torch.equal(make("sum", shape)(base, torch.zeros_like(base)), base)
    assert torch.equal(make("product", shape)(base, torch.ones_like(base)), base)
    assert torch.equal(make("alpha", shape, alpha=1.0, learned=False)(base, side), base)
    assert torch.equal(make("alpha", shape, alpha=0.0, learned=False)(base, side), side)
    assert torch.equal(make("alpha", shape)(base, base), base)


def test_alpha_learns_by_the_derivative_of_the_blend():
    base, side = (x.double() for x in features((8, 3, 3)))
    side.requires_grad_(True)
    fusion = make("alpha", None, alpha=0.8).double()
    fusion(base, side).square().sum().backward()
    blend = 0.8 * base + 0.2 * side.detach()
    expected = (2 * blend * (base - side.detach())).sum() * 0.8 * 0.2
    torch.testing.assert_close(fusion.alpha.logit.grad, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(side.grad, 2 * blend * 0.2, rtol=1e-6, atol=1e-9)


def test_product_learns_by_the_base():
    base, side = features((4, 2, 2))
    side.requires_grad_(True)
    make("product", None)(base, side).sum().backward()
    assert torch.equal(side.grad, base)


def test_film_without_its_heads_scales_and_shifts_by_the_side():
    fusion = make("film", (8, 3, 3))
    for head in (fusion.scale, fusion.shift):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    base, side = features((8, 3, 3))
    torch.testing.assert_close(fusion(base, side), base * side + side)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mlp", lambda s: s), ("mlp_hidden", F.relu), ("mlp2", torch.zeros_like), ("resmlp2", lambda s: s)],
)
def test_with_silent_layers_the_side_enters_as_it_should(name, expected):
    fusion = make(name, (8, 3, 3))
    for layer in (fusion.base_layer, fusion.side_layer):
        for parameter in list(layer.parameters())[-1:]:
            nn.init.zeros_(parameter)
    base, side = features((8, 3, 3))
    torch.testing.assert_close(fusion(base, side), expected(side))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONE_SIDE])
def test_every_earlier_side_counts(name):
    base, side, first, second = features((8, 3, 3), 4)
    fusion = make(name, (8, 3, 3), earlier=2)
    fused = fusion(base, side, [first, second])
    for others in ([first + 1, second], [first, second + 1]):
        assert not torch.allclose(fusion(base, side, others), fused)


def test_a_batch_of_one_passes_batchnorm_in_training_by_kept_statistics():
    fusion = make("mlp2", (4,)).train()
    base, side = features((4,), number=6)
    fusion(base, side)
    alone = fusion(base[:1], side[:1])
    torch.testing.assert_close(alone, fusion.eval()(base, side)[:1])


def test_only_blends_have_an_alpha():
    for name in NAMES:
        weight = make(name, (8, 3, 3)).base_weight()
        assert (weight is None) == (name != "alpha")
    assert make("alpha", None, earlier=3).base_weight().item() == pytest.approx(0.2)
