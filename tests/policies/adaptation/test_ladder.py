"""Ladder side-tuning: the authors' arithmetic, where gradients go, and shapes over every kind of base.

``tests/data/ladder.npz`` holds what the authors' code computes (github.com/ylsung/Ladder-Side-Tuning, commit
1798e82, ``T5Stack`` of ``seq2seq/third_party/models/t5/modeling_side_t5.py`` and ``pruning_v2`` of
``seq2seq/pruning/pruning_methods.py``) under torch 2.13 and transformers 4.6.0, whose check of its own
dependencies' versions was passed over and whose packages for downloads were replaced by empty ones. In
the pruning, the dependency graph, which is built and not used, was left out, and the kept rows, which come in
the order of a Python set, were sorted. The encoder has random weights, 4 layers, 16 channels, 2 heads and
r = 4, with relative position biases at 0; "full" has a side block for every layer, "half" for the second and
fourth. The model that is pruned is its base behind a random word embedding. Recorded are the outputs of the
base's layers, the side network's weights and its output after the final normalisation. The projection up
and the blend behind it, one line each in their decoder, were not run: they are checked in closed form.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from policies.adaptation import Ladder, LadderConfig, make_adaptation
from policies.adaptation.costs import measure
from policies.adaptation.ladder import LadderSide, pruned_blocks
from policies.encoders import BlockEncoder, InputSpec

DATA = Path(__file__).parents[2] / "data" / "ladder.npz"


@pytest.fixture(scope="module")
def recorded():
    with np.load(DATA) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def part(recorded, prefix):
    return {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}


def images(number=2, rows=64, columns=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, rows, columns, 3), dtype=torch.uint8, generator=generator)


class RMSNorm(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class T5Block(nn.Module):
    """A block of T5's encoder, written from its description."""

    def __init__(self, weights, heads):
        super().__init__()
        self.weights = {name.removesuffix(".weight"): value for name, value in weights.items()}
        self.heads = heads

    def forward(self, x):
        w = self.weights
        y = RMSNorm(w["layer.0.layer_norm"])(x)
        q, k, v = (
            (y @ w[f"layer.0.SelfAttention.{name}"].T).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for name in "qkv"
        )
        attended = torch.softmax(q @ k.mT, dim=-1) @ v
        x = x + attended.transpose(1, 2).flatten(2) @ w["layer.0.SelfAttention.o"].T
        y = RMSNorm(w["layer.1.layer_norm"])(x)
        return x + F.relu(y @ w["layer.1.DenseReluDense.wi"].T) @ w["layer.1.DenseReluDense.wo"].T


@pytest.mark.parametrize(("setting", "numbers"), [("full", [0, 1, 2, 3]), ("half", [1, 3])])
def test_the_side_network_computes_what_the_authors_does(recorded, setting, numbers):
    own = part(recorded, f"{setting}/")
    taps = [own["tap0"], *(own[f"tap{number + 1}"] for number in numbers)]
    config = LadderConfig(reduction=4, gate_temperature=0.1)
    side = LadderSide(config, [tap.shape[1:] for tap in taps], taps[-1].shape[1:])
    side.first.load_state_dict(part(own, "side_first_downsample."))
    for rung, number in zip(side.rungs, numbers, strict=True):
        rung.down.load_state_dict(part(own, f"side_downsamples.{number}."))
        rung.gate.a.data = -own[f"side_gate_params.{number}"][0]
        rung.block = T5Block(part(own, f"side_block.{number}."), heads=2)
    side.norm = RMSNorm(own["final_side_layer_norm.weight"])
    side.up = nn.Identity()
    found = side(taps, taps[-1])
    assert found.abs().mean() > 0.1
    torch.testing.assert_close(found, own["side_output"], rtol=1e-5, atol=1e-5)


class PrunableBlock(nn.Module):
    def __init__(self, weights):
        super().__init__()
        for name, value in weights.items():
            key = name.removesuffix(".weight").replace(".", "_")
            layer = (
                nn.LayerNorm(16, bias=False) if value.dim() == 1 else nn.Linear(*value.T.shape, bias=False)
            )
            layer.weight.data = value
            self.add_module(key, layer)


class Blocks(BlockEncoder):
    """Given blocks behind a linear stem: images (N, H, W, 3) to tokens, one for each row of pixels."""

    def __init__(self, blocks, width=16):
        super().__init__(InputSpec(3))
        self.rows = nn.Linear(3, width)
        self.layers = nn.ModuleList(blocks)

    @property
    def blocks(self):
        return list(self.layers)

    def stem(self, x):
        return self.rows(x.mean(3).mT)

    def neck(self, x):
        return x


def test_side_blocks_start_from_the_rows_and_columns_that_the_authors_keep(recorded):
    base, kept = part(recorded, "pruning/base/block."), part(recorded, "pruning/side/block.")
    order = [
        *(f"layer.0.SelfAttention.{name}.weight" for name in "qkvo"),
        *("layer.1.DenseReluDense.wi.weight", "layer.1.DenseReluDense.wo.weight"),
        *("layer.0.layer_norm.weight", "layer.1.layer_norm.weight"),
    ]
    encoder = Blocks([PrunableBlock({name: base[f"{i}.{name}"] for name in order}) for i in range(4)])
    # They begin with the channels of the word embedding.
    embedding = recorded["pruning/shared.weight"].abs().sum(0)
    columns = embedding.argsort(descending=True)[:4].sort().values
    names = ["query", "key", "value", "out", "expand", "contract", "norm1", "norm2"]
    states = pruned_blocks(encoder, 4, columns)
    assert len(states) == 4
    for i, state in enumerate(states):
        for ours, theirs in zip(names, order, strict=True):
            assert torch.equal(state[f"{ours}.weight"], kept[f"{i}.{theirs}"]), (i, ours)
            assert ours == "key" or not state[f"{ours}.bias"].any()


def test_pruned_side_blocks_are_in_place_for_the_tapped_blocks_only():
    torch.manual_seed(0)
    method = make_adaptation(
        "ladder", encoder="vit_mini_tokens", weights="random", side_init="pruned", every=4, reduction=6
    )
    states = pruned_blocks(method.base.encoder, 6)
    assert method.tapped == (1, 5)
    for rung, number in zip(method.adapter.rungs, method.tapped, strict=True):
        assert all(torch.equal(v, states[number][k]) for k, v in rung.block.state_dict().items())
        biased = method.base.encoder.blocks[number].mlp.fc1
        # Each kept row is a row of the base's.
        weight = rung.block.expand.weight
        assert weight.shape == (64, 16)
        assert set(weight.flatten().tolist()) <= set(biased.weight.flatten().tolist())


@pytest.mark.parametrize(
    ("every", "tapped"), [(1, tuple(range(12))), (2, (1, 3, 5, 7, 9, 11)), (4, (3, 7, 11)), (50, (11,))]
)
def test_taps_are_counted_back_from_the_last_block(every, tapped):
    base = Blocks([nn.Linear(16, 16) for _ in range(12)])
    method = Ladder(LadderConfig(every=every), base)
    assert method.tapped == tapped
    stored = method.base_features(images())
    assert list(stored) == ["tap0", *(f"tap{number + 1}" for number in tapped), "base"]


def test_the_ladder_is_the_blend_of_the_paper():
    torch.manual_seed(0)
    base = Blocks([nn.Linear(16, 16) for _ in range(2)]).eval()
    method = Ladder(LadderConfig(reduction=4, every=1, gate_temperature=0.5), base)
    side = method.adapter
    for rung, a in zip(side.rungs, (0.3, -0.7), strict=True):
        rung.block = nn.Tanh()
        rung.gate.a.data.fill_(a)
    side.norm = nn.Identity()
    image = images()
    with torch.no_grad():
        f0 = base.stem(base.preprocess(image))
        f1 = base.layers[0](f0)
        f2 = base.layers[1](f1)
        w0, (w1, w2), up = side.first, [rung.down for rung in side.rungs], side.up
        mu1, mu2 = 1 / (1 + np.exp(-0.6)), 1 / (1 + np.exp(1.4))
        h0 = f0 @ w0.weight.T + w0.bias
        h1 = torch.tanh(mu1 * (f1 @ w1.weight.T + w1.bias) + (1 - mu1) * h0)
        h2 = torch.tanh(mu2 * (f2 @ w2.weight.T + w2.bias) + (1 - mu2) * h1)
        expected = h2 @ up.weight.T + up.bias
    torch.testing.assert_close(method(image), expected, rtol=1e-5, atol=1e-5)


def test_a_new_side_network_blends_half_and_half():
    method = make_adaptation("ladder", encoder="resnet_small", weights="random")
    assert all(torch.sigmoid(rung.gate.a / rung.gate.temperature) == 0.5 for rung in method.adapter.rungs)


def bytes_and_flops(name, depth, every=None):
    base = Blocks([nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(depth)])
    options = {} if every is None else {"every": every, "reduction": 4}
    cost = measure(make_adaptation(name, base, **options), 16, 16)
    return cost.learn_bytes, cost.backward_flops


def test_what_backpropagation_keeps_and_computes_does_not_grow_with_the_base():
    assert bytes_and_flops("ladder", 2, 1) == bytes_and_flops("ladder", 12, 6)
    # The same measure sees a method through whose base gradients flow grow with it.
    few, many = bytes_and_flops("finetune", 2), bytes_and_flops("finetune", 12)
    assert many[0] > 5 * few[0]
    assert many[1] > 5 * few[1]


@pytest.mark.parametrize("encoder", ["resnet_small", "resnet44", "vit_mini"])
def test_no_graph_leads_into_the_base(encoder):
    method = make_adaptation("ladder", encoder=encoder, weights="random", reduction=4).train()
    # Even a base whose tensors were thawed by force is behind a wall.
    for value in method.base.buffers():
        if value.is_floating_point():
            value.requires_grad_(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = method(images())
    output.square().sum().backward()
    assert all(value.grad is None for value in method.base.buffers())
    base = {value.data_ptr() for value in method.base.buffers()}
    assert kept
    assert not any(tensor.data_ptr() in base for tensor in kept)


def test_the_side_network_follows_the_rows_columns_and_widths_of_a_convolutional_base():
    method = make_adaptation("ladder", encoder="resnet44", weights="random", reduction=4, every=7)
    stored = method.base_features(images())
    assert [tuple(stored[name].shape[1:]) for name in stored] == [
        (16, 32, 32),
        (16, 32, 32),
        (32, 16, 16),
        (64, 8, 8),
        (64,),
    ]
    seen = []
    for rung in method.adapter.rungs:
        rung.block.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    assert method(images()).shape == (2, 64)
    assert seen == [(4, 32, 32), (8, 16, 16), (16, 8, 8)]


@pytest.mark.parametrize(
    ("encoder", "shape"),
    [("vit_mini", (96, 8, 8)), ("vit_mini_tokens", (65, 96)), ("vit_mini_cls", (96,))],
)
@pytest.mark.parametrize("output", ["side", "blend", "add"])
def test_features_have_the_shape_of_the_base_s_in_every_form(encoder, shape, output):
    method = make_adaptation("ladder", encoder=encoder, weights="random", output=output)
    assert method(images()).shape == (2, *shape)
    # Rectangles, so that rows and columns are not confused.
    assert method(images(2, 32, 64)).shape == (2, *method.output_shape(32, 64))


def test_patches_of_the_side_network_stay_in_their_places():
    method = make_adaptation("ladder", encoder="vit_mini", weights="random", every=6).eval()
    method.adapter.norm = nn.Identity()
    method.adapter.up = nn.Identity()
    taken = []
    method.adapter.rungs[-1].block.register_forward_hook(lambda module, inputs, output: taken.append(output))
    found = method(images())
    for row, column in [(0, 0), (2, 5), (7, 7)]:
        assert torch.equal(found[:, :, row, column], taken[0][:, 1 + 8 * row + column])


@pytest.mark.parametrize(("gate", "part"), [(40.0, "base"), (-40.0, "side")])
def test_the_last_gate_weighs_the_base(gate, part):
    method = make_adaptation(
        "ladder", encoder="resnet_small", weights="random", output="blend", gate_temperature=1.0
    ).eval()
    image = images()
    whole = method(image)
    method.adapter.merge.a.data.fill_(gate)
    ends = {"base": method.base(image)}
    method.adapter.merge, merge = None, method.adapter.merge
    method.adapter.output, ends["side"] = "side", method(image)
    torch.testing.assert_close(whole, (ends["base"] + ends["side"]) / 2)
    method.adapter.merge = merge
    torch.testing.assert_close(method(image), ends[part], rtol=1e-6, atol=1e-6)


def test_tasks_have_side_networks_of_their_own_and_the_first_one_stays():
    method = make_adaptation("ladder", encoder="resnet_small", weights="random").eval()
    image = images()
    before = method(image)
    method.start_task("second")
    method(image).square().sum().backward()
    assert not any(p.requires_grad or p.grad is not None for p in method.adapters["task"].parameters())
    with torch.no_grad():
        for parameter in method.trainable_parameters():
            parameter.add_(1)
    method.start_task("task")
    assert torch.equal(method(image), before)


def test_taps_are_not_stored_where_memory_is_short():
    assert (
        make_adaptation("ladder", encoder="resnet_small", weights="random", store_taps=False).base_features(
            images()
        )
        == {}
    )


def test_the_side_network_of_a_vit_base_has_a_known_number_of_parameters():
    base = Blocks([nn.Linear(768, 768) for _ in range(4)], width=768)
    side = Ladder(LadderConfig(reduction=8, every=2), base).adapter
    d = 96
    block = 4 * d * d + 3 * d + (4 * d * d + 4 * d) + (4 * d * d + d) + 4 * d
    rung = (768 * d + d) + 1 + block
    assert sum(p.numel() for p in side.parameters()) == (768 * d + d) + 2 * rung + 2 * d + (d * 768 + 768)
    assert [rung.block.heads for rung in side.rungs] == [12, 12]


def test_encoders_without_blocks_are_refused():
    with pytest.raises(ValueError, match="a ladder works block by block, and encoder 'fcn5_small' has none"):
        make_adaptation("ladder", weights="random")


def test_pruning_of_convolutional_blocks_is_refused():
    with pytest.raises(ValueError, match="block 0 of encoder 'resnet_small' has 0 linear"):
        make_adaptation("ladder", encoder="resnet_small", weights="random", side_init="pruned")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 0}, "reduction 0: expected 1 or more"),
        ({"every": 0}, "every 0: expected 1 or more"),
        ({"gate_temperature": 0.0}, "gate_temperature 0.0"),
        ({"side_init": "fisher"}, "side_init 'fisher': expected one of random, pruned"),
        ({"output": "both"}, "output 'both': expected one of side, blend, add"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LadderConfig(**options)


def test_a_gate_may_start_at_a_whole_number():
    method = make_adaptation("ladder", encoder="resnet_small", weights="random", gate_init=1)
    assert {gate.item() for name, gate in method.named_parameters() if name.endswith(".a")} == {1.0}
