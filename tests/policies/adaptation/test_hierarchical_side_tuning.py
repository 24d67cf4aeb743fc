"""Hierarchical side-tuning.

``tests/data/hst.npz`` was recorded with the authors' code (github.com/AFeng-x/HST, commit ee89571):
``models.vit_hsn.ViT_HSN`` without a classifier, on images of 24 x 40 pixels in patches of 8, with tokens of
width 16, five blocks of two heads, side widths 4, 6, 8, 12 with 2, 3, 4, 6 heads, and depths 2, 1, 1, 1. To
run it without timm 0.6.5, the few functions that it takes from there (DropPath, trunc_normal_, to_2tuple,
named_apply) were put in their place, and thop and ipdb, which it imports and does not need, were left empty;
the model's files are unchanged. All weights were moved from their initial values by normal noise of deviation
0.2, and BatchNorm's statistics drawn. Recorded are the output of each stage's norm and of ``fc_norm`` in
evaluation, the latter in training too, which parameters ``freeze_vit`` leaves trainable, and the norms of
their gradients.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from policies.adaptation import HierarchicalSideTuning, HierarchicalSideTuningConfig, make_adaptation
from policies.adaptation.side_network import DropPath, SideBlock
from policies.encoders import ENCODERS, InputSpec, make_encoder
from policies.encoders.vit import VisionTransformer

RECORDED = Path(__file__).parents[2] / "data" / "hst.npz"
TINY = {"dims": "4,6,8,12", "heads": "2,3,4,6"}

# The authors' names and those here: of the frozen transformer, of the adapter.
BASE_NAMES = (
    (r"^pos_embed$", "positions"),
    (r"^patch_embed\.proj\.", "patches."),
    (r"^blocks\.", "layers."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"^norm\.", "norm."),
)
ADAPTER_NAMES = (
    (r"^blocks\.(\d+)\.(norm\d)", r"tuned.\1.\2"),
    (r"^m_embeddings\.(\d+)$", r"tuned.\1.registers"),
    (r"^m_patch_embed1\.", "side.stem."),
    (r"^m_patch_embed(\d)\.proj", lambda m: f"side.embeds.{int(m[1]) - 2}.conv"),
    (r"^m_patch_embed(\d)\.norm", lambda m: f"side.embeds.{int(m[1]) - 2}.norm"),
    (r"^m_block(\d)\.", lambda m: f"side.blocks.{int(m[1]) - 1}."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.attn\.q\.", ".attention.query."),
    (r"\.attn\.k\.", ".attention.key."),
    (r"\.attn\.v\.", ".attention.value."),
    (r"^m_norm(\d)", lambda m: f"side.norms.{int(m[1]) - 1}"),
    (r"^T_Bridge_(\d)", lambda m: f"side.bridges.{int(m[1]) - 1}"),
    # The recording's depths are 2, 1, 1, 1.
    (r"^m_proj_norm1", "side.register_norms.0.0"),
    (r"^m_proj_norm2", "side.register_norms.0.1"),
    (r"^m_proj_norm(\d)", lambda m: f"side.register_norms.{int(m[1]) - 2}.0"),
    (r"^fc_norm\.", "norm."),
)


def renamed(name, rules):
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def tiny_base(depth=5, layer_scale=False, patch=8, grid=(3, 5)):
    torch.manual_seed(0)
    base = VisionTransformer(InputSpec(), patch, 16, depth, 2, grid, layer_scale=layer_scale)
    base.initialise()
    return base


def tiny(base=None, **options):
    torch.manual_seed(1)
    return make_adaptation("hst", base or tiny_base(), **{**TINY, **options})


def image(number=3, rows=24, columns=40):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (number, rows, columns, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture
def recorded():
    """The recording, and our method with its weights."""
    content = dict(np.load(RECORDED))
    weights = {
        k.removeprefix("weights/"): torch.from_numpy(v)
        for k, v in content.items()
        if k.startswith("weights/")
    }
    base = tiny_base()
    frozen, adapter = base.state_dict(), {}
    for name, value in weights.items():
        if re.match(r"m_|T_|fc_norm", name) or re.match(r"blocks\.\d+\.norm", name):
            adapter[renamed(name, ADAPTER_NAMES)] = value
        elif ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                frozen[renamed(name, BASE_NAMES).replace("attn.qkv", f"attention.{part}")] = third
        else:
            frozen[renamed(name, BASE_NAMES)] = value
    base.load_state_dict(frozen)
    method = tiny(base, norm="batch")
    own = method.adapter.state_dict()
    missing = [k for k in own if k not in adapter and not k.endswith("num_batches_tracked")]
    assert not missing
    method.adapter.load_state_dict({**own, **adapter})
    return content, method


def test_gives_the_maps_and_features_of_the_authors_code(recorded):
    content, method = recorded
    pixels = torch.from_numpy(content["image"])
    method.eval()
    for index, own in enumerate(method.multi_scale(pixels)):
        expected = content[f"stage{index + 1}"]
        np.testing.assert_allclose(own.flatten(2).mT.detach().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(method(pixels).detach().numpy(), content["features_eval"], atol=1e-5)
    method.train()
    # Batch statistics of few values magnify rounding.
    np.testing.assert_allclose(method(pixels).detach().numpy(), content["features_train"], atol=1e-4)


def test_learns_what_the_authors_code_learns_by_the_same_gradients(recorded):
    content, method = recorded
    method.eval()
    (method(torch.from_numpy(content["image"])) * torch.from_numpy(content["target"])).sum().backward()
    expected = {
        renamed(str(name), ADAPTER_NAMES): float(norm)
        for name, norm in zip(content["trainable"], content["gradient_norms"], strict=True)
    }
    own = {name: float(p.grad.norm()) for name, p in method.adapter.named_parameters()}
    assert own.keys() == expected.keys()
    for name, norm in own.items():
        assert norm == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def part(name):
    for start, kind in (
        ("side.bridges", "bridges"),
        ("side.stem", "stem"),
        ("side.embeds", "patch embeddings"),
        ("side.blocks", "blocks"),
        ("side.norms", "norms"),
        ("side.register_norms", "norms"),
    ):
        if name.startswith(start):
            return kind
    return "registers" if name.endswith("registers") else "ViT norms"


PUBLISHED = {
    "bridges": 166_104,
    "stem": 5_120,
    "patch embeddings": 83_496,
    "blocks": 462_312,
    "norms": 1_728,
    "registers": 9_216,
    "ViT norms": 36_864,
}
"""Parameters by part as the authors' code has them on ViT-B/16."""


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("name", ["vit_base", "mae_base", "dinov2_base"])
def test_published_size(name, norm):
    with torch.device("meta"):
        method = HierarchicalSideTuning(
            HierarchicalSideTuningConfig(encoder=name, norm=norm), ENCODERS[name](3)
        )
    sizes = Counter()
    for parameter, value in method.adapter.named_parameters():
        sizes[part(parameter)] += value.numel()
    assert sizes == PUBLISHED
    assert sum(p.numel() for p in method.trainable_parameters()) == 764_840


def test_small_transformers_get_narrower_bridges():
    with torch.device("meta"):
        method = HierarchicalSideTuning(
            HierarchicalSideTuningConfig(encoder="dinov2_small"), ENCODERS["dinov2_small"](3)
        )
    wide, narrow, dims = 768, 384, 32 + 48 + 64 + 72
    less = (wide - narrow) * (dims + 12 + 12 * 4)
    assert sum(p.numel() for p in method.trainable_parameters()) == 764_840 - less


def test_of_the_transformer_only_block_norms_are_tuned_and_as_copies():
    base = tiny_base()
    for module in base.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight)
    method = tiny(base)
    for tuned, block in zip(method.adapter.tuned, base.blocks, strict=True):
        assert {n for n, _ in tuned.named_parameters()} == {
            "registers",
            "norm1.weight",
            "norm1.bias",
            "norm2.weight",
            "norm2.bias",
        }
        assert torch.equal(tuned.norm1.weight, block.norm1.weight)
        assert torch.equal(tuned.norm2.weight, block.norm2.weight)
    before = {k: v.clone() for k, v in method.base.state_dict().items()}
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.1)
    method(image()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(method.adapter.tuned[0].norm1.weight, base.blocks[0].norm1.weight)
    assert all(torch.equal(v, before[k]) for k, v in method.base.state_dict().items())


def test_tuned_norms_take_the_place_of_the_frozen_ones():
    one, other = tiny().eval(), tiny().eval()
    with torch.no_grad():
        one.adapter.tuned[1].norm1.weight.mul_(2)
        other.base.encoder.layers[1].norm1.weight.mul_(2)
    assert not torch.allclose(one(image()), other(image()))
    torch.testing.assert_close(other(image()), tiny().eval()(image()))


@pytest.mark.parametrize("registers", [1, 3])
def test_side_blocks_look_at_registers_and_one_global_token(registers):
    method = tiny(registers=registers).eval()
    seen = []
    for stage in method.adapter.side.blocks:
        for block in stage:
            block.attention.register_forward_pre_hook(lambda _, given: seen.append(given[1].shape[1]))
    method(image())
    assert seen == [registers + 1] * 5


def test_global_token_is_the_mean_of_the_features():
    torch.manual_seed(0)
    block = SideBlock(8, 2, 0.0)
    contexts = []
    block.attention.register_forward_pre_hook(lambda _, given: contexts.append(given[1]))
    x, registers, features = torch.randn(2, 6, 8), torch.randn(2, 1, 8), torch.randn(2, 6, 8)
    block(x, registers, features)
    torch.testing.assert_close(contexts[0][:, 0], registers[:, 0])
    torch.testing.assert_close(contexts[0][:, 1], features.mean(1))


def test_registers_are_fresh_at_every_block_and_leave_with_it():
    method = tiny().eval()
    lengths = []
    for block in method.base.encoder.layers:
        block.attention.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    method(image())
    assert lengths == [1 + 1 + 3 * 5] * 5


def test_layer_scale_of_the_base_is_applied():
    base = tiny_base(layer_scale=True)
    plain = tiny(base).eval()(image())
    with torch.no_grad():
        base.layers[0].scale2.factor.mul_(3)
    assert not torch.allclose(tiny(base).eval()(image()), plain)


def test_gradients_traverse_the_backbone_to_the_first_block():
    method = tiny()
    method(image()).square().sum().backward()
    first = method.adapter.tuned[0]
    assert first.registers.grad.abs().sum() > 0
    assert first.norm1.weight.grad.abs().sum() > 0
    assert method.base_features(image()) == {}


@pytest.mark.parametrize("size", [(24, 40), (64, 64), (8, 8)])
def test_maps_have_strides_4_to_32_and_meet_at_8(size):
    method = tiny(output="map").eval()
    maps = method.multi_scale(image(2, *size))
    rows, columns = size
    for index, (own, dim) in enumerate(zip(maps, (4, 6, 8, 12), strict=True)):
        stride = 4 * 2**index
        assert own.shape == (2, dim, -(-rows // stride), -(-columns // stride))
    features = method(image(2, *size))
    assert features.shape == (2, 4 + 6 + 8 + 12, rows // 8, columns // 8)
    assert method.output_shape(*size) == features.shape[1:]
    torch.testing.assert_close(features[:, 4:10], maps[1])
    coarse = F.interpolate(maps[3], size=features.shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(features[:, 18:], coarse)


def test_patches_of_14_pixels_give_the_same_strides():
    method = tiny(tiny_base(patch=14, grid=(3, 3))).eval()
    assert [tuple(m.shape[2:]) for m in method.multi_scale(image(1, 42, 42))] == [
        (10, 10),
        (5, 5),
        (3, 3),
        (2, 2),
    ]


@pytest.mark.parametrize(
    ("blocks", "depths"), [(12, (3, 3, 3, 3)), (6, (2, 2, 1, 1)), (5, (2, 1, 1, 1)), (4, (1, 1, 1, 1))]
)
def test_blocks_are_shared_out_evenly(blocks, depths):
    assert HierarchicalSideTuningConfig().stage_depths(blocks) == depths


def test_depths_can_be_chosen():
    method = tiny(depths="1, 1, 1, 2")
    assert [len(stage) for stage in method.adapter.side.blocks] == [1, 1, 1, 2]


@pytest.mark.parametrize("training", [True, False])
def test_features_of_an_image_do_not_depend_on_the_batch_unless_asked(training):
    method, published = tiny().train(training), tiny(norm="batch").train(training)
    torch.testing.assert_close(method(image())[:2], method(image(2)))
    same = torch.allclose(published(image(3))[:2], published(image(2)), atol=1e-4)
    assert same != training


def test_drop_path_leaves_out_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.2)
    x = torch.ones(20_000, 2, 3)
    y = drop(x)
    kept = y[:, 0, 0] > 0
    assert torch.equal(y, torch.where(kept, 1.25, 0.0)[:, None, None].expand_as(y))
    assert float(kept.float().mean()) == pytest.approx(0.8, abs=0.01)
    assert drop.eval()(x) is x


def test_drop_path_rises_along_both_networks():
    method = tiny(drop_path=0.2)
    expected = pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert [tuned.drop_path.rate for tuned in method.adapter.tuned] == expected
    assert [block.drop_path.rate for stage in method.adapter.side.blocks for block in stage] == expected
    torch.testing.assert_close(method.eval()(image()), tiny().eval()(image()))
    method.train()
    assert not torch.equal(method(image()), method(image()))


def test_weight_decay_spares_vectors_as_published():
    method = tiny()
    decayed, spared = (group["params"] for group in method.parameter_groups(0.05))
    names = {id(p): n for n, p in method.adapter.named_parameters()}
    assert all(p.dim() <= 1 for p in spared)
    assert all(p.dim() > 1 for p in decayed)
    assert "tuned.0.registers" in {names[id(p)] for p in decayed}


def test_initial_weights_are_the_authors():
    method = make_adaptation("hst", tiny_base(), depths="2,1,1,1")
    bound = (6 / (2 * 16)) ** 0.5
    registers = torch.cat([tuned.registers.flatten() for tuned in method.adapter.tuned])
    assert float(registers.detach().abs().max()) <= bound
    assert float(registers.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.15)
    side = method.adapter.side
    assert float(side.blocks[3][0].mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(side.bridges[2].weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not side.bridges[2].bias.any()
    convolution = side.embeds[1].conv.weight.detach()
    assert float(convolution.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


def test_each_task_has_a_side_network_of_its_own():
    method = tiny().eval()
    first = method(image())
    method.start_task("second")
    with torch.no_grad():
        for parameter in method.adapter.parameters():
            parameter.add_(0.1)
    assert not torch.allclose(method(image()), first)
    method.start_task("task")
    assert torch.equal(method(image()), first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": "32,48,64"}, "dims '32,48,64': expected 4 whole numbers"),
        ({"heads": "2,4,8,x"}, "heads '2,4,8,x': expected 4 whole numbers"),
        ({"heads": "3,4,8,12"}, "3 do not divide 32"),
        ({"depths": "0,2,2,2"}, "depths '0,2,2,2': expected 4 whole numbers above 0"),
        ({"depths": "3,3,3,3"}, "make 12: expected all 6 blocks"),
        ({"registers": 0}, "registers 0"),
        ({"drop_path": 1.0}, "drop_path 1.0"),
        ({"output": "maps"}, "output 'maps': expected one of pooled, map"),
        ({"norm": "layer"}, "norm 'layer': expected one of group, batch"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_adaptation("hst", encoder="vit_mini", weights="random", **options)


def test_other_encoders_are_refused():
    with pytest.raises(ValueError, match=r"vision transformer, and encoder 'resnet_small' is none"):
        make_adaptation("hst", make_encoder("resnet_small", weights="random"))
    with pytest.raises(ValueError, match="needs a transformer of 4 blocks or more, got 3"):
        tiny(tiny_base(depth=3))
