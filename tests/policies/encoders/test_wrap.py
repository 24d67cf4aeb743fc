"""Networks of any class as encoders, alone and under every method of adaptation."""

import copy
import doctest

import pytest
import torch
from torch import nn

from policies.adaptation import ADAPTATIONS, make_adaptation
from policies.encoders import BlockEncoder, InputSpec, wrap, wrap_encoder

SPEC = InputSpec(size=(32, 32), mean=(0.4,), std=(0.2,))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1, 1)
        self.norm = nn.GroupNorm(2, width)

    def forward(self, x):
        return x + torch.relu(self.norm(self.conv(x)))


class Maps(nn.Module):
    """Has children whose names mean something else in an encoder."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(Residual(8) for _ in range(3))
        self.name = nn.Conv2d(8, 6, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.name(x)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.cls = nn.Parameter(torch.zeros(1, 1, 16))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )

    def embed(self, x):
        x = self.patches(x).flatten(2).mT
        return torch.cat((self.cls.expand(len(x), -1, -1), x), dim=1)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


def wrapped_maps(spec=SPEC, shape=(6, 8, 8), **changes):
    parts = {
        "blocks": [f"blocks.{i}" for i in range(3)],
        "stem": lambda network, x: network.stem(x),
        "neck": lambda network, x: network.name(x),
    }
    torch.manual_seed(0)
    return wrap_encoder(Maps(), shape, spec, **{**parts, **changes})


def wrapped_tokens(**changes):
    torch.manual_seed(0)
    stem = {"blocks": ["layers.0", "layers.1"], "stem": lambda network, x: network.embed(x)}
    return wrap_encoder(Tokens(), (17, 16), SPEC, **{**stem, **changes})


def wrapped_vectors():
    torch.manual_seed(0)
    pooled = nn.Sequential(Maps(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return wrap_encoder(pooled, (6,), SPEC)


def pictures(batch=2, size=(40, 30)):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8, generator=generator)


def test_example_runs():
    assert doctest.testmod(wrap).attempted > 0
    assert doctest.testmod(wrap).failed == 0


@pytest.mark.parametrize(
    ("make", "shape"), [(wrapped_maps, (6, 8, 8)), (wrapped_tokens, (17, 16)), (wrapped_vectors, (6,))]
)
def test_features_are_the_networks_own(make, shape):
    encoder = make().eval()
    x = encoder.preprocess(pictures())
    assert x.shape == (2, 3, 32, 32)
    torch.testing.assert_close(encoder(x), encoder.module(x))
    assert encoder(x).shape == (2, *shape)
    assert encoder.output_shape(40, 30) == shape


# Hierarchical side-tuning is made for one class of network, and feature extraction has nothing to train.
@pytest.mark.parametrize("method", [name for name in ADAPTATIONS if name not in ("hst", "features")])
def test_every_method_adapts_a_network_with_blocks(method):
    encoder = wrapped_tokens() if method == "lora" else wrapped_maps()
    before = copy.deepcopy(encoder.state_dict())
    adapted = make_adaptation(method, base=encoder, **{"midtune": {"unfreeze_at": 0.0}}.get(method, {}))
    features = adapted.train()(pictures())
    assert features.shape == (2, *adapted.output_shape(40, 30))
    features.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.trainable_parameters())
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("make", [wrapped_maps, wrapped_tokens, wrapped_vectors])
@pytest.mark.parametrize("method", ["sidetune", "features", "finetune", "piggyback"])
def test_maps_tokens_and_vectors_adapt_without_blocks_named(make, method):
    encoder = make()
    plain = wrap_encoder(encoder.module, encoder.declared_shape, SPEC)
    assert not isinstance(plain, BlockEncoder)
    adapted = make_adaptation(method, base=plain)
    assert adapted(pictures()).shape == (2, *encoder.declared_shape)


def test_methods_that_need_blocks_refuse_a_network_without_by_its_name():
    plain = wrap_encoder(Maps(), (6, 8, 8), SPEC, name="mine")
    with pytest.raises(ValueError, match="encoder 'mine' has none"):
        make_adaptation("spottune", base=plain)


@pytest.mark.parametrize("declared", [(6, 8, 9), (6,), (6, 64), (5, None, None)])
def test_features_of_another_shape_than_declared_are_refused_at_once(declared):
    with pytest.raises(ValueError, match=r"Maps gives features of shape \(6, 8, 8\): .* was declared"):
        wrap_encoder(Maps(), declared, SPEC)


def test_features_of_another_shape_are_refused_when_images_come_where_no_size_is_fixed():
    encoder = wrap_encoder(Maps(), (6, 8, 8))
    assert encoder.output_shape(32, 32) == (6, 8, 8)
    with pytest.raises(ValueError, match=r"shape \(6, 16, 8\): \(6, 8, 8\) was declared"):
        encoder(torch.zeros(1, 3, 64, 32))


def test_numbers_that_depend_on_the_images_size_are_declared_as_none():
    encoder = wrap_encoder(Maps(), (6, None, None))
    assert encoder.output_shape(64, 32) == (6, 16, 8)


@pytest.mark.parametrize("declared", [(), (1, 2, 3, 4), (0, 8, 8)])
def test_shapes_that_features_cannot_have_are_refused(declared):
    with pytest.raises(ValueError, match=r"expected a vector \(C,\), tokens \(T, D\), a map \(C, h, w\)"):
        wrap_encoder(Maps(), declared)


def test_networks_that_give_no_tensor_are_refused():
    class Several(Maps):
        def forward(self, x):
            return {"features": super().forward(x)}

    with pytest.raises(ValueError, match="Several gives a dict: expected one tensor"):
        wrap_encoder(Several(), (6, 8, 8), SPEC)


def test_blocks_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"Maps has no block 'block.0'; its modules are stem, blocks, name"):
        wrapped_maps(blocks=["block.0"])
    with pytest.raises(ValueError, match="without blocks"):
        wrapped_maps(blocks=[])


def test_blocks_that_are_not_the_whole_network_are_refused():
    with pytest.raises(ValueError, match=r"differ by .* from those of the whole network"):
        wrapped_maps(blocks=["blocks.0", "blocks.2"])
    encoder = wrapped_maps(InputSpec(), (6, None, None), blocks=["blocks.0", "blocks.2"])
    with pytest.raises(ValueError, match=r"differ by .* from those of the whole network"):
        encoder.output_shape(16, 16)


@pytest.mark.parametrize("make", [wrapped_maps, wrapped_vectors])
def test_weights_load_by_the_networks_own_names_and_by_the_encoders(make):
    encoder, other = make(), make()
    other.initialise()
    own = {name: value.clone() for name, value in other.module.state_dict().items()}
    encoder.load_tensors(own)
    x = encoder.preprocess(pictures())
    assert torch.equal(encoder(x), other(x))
    encoder.initialise()
    assert not torch.equal(encoder(x), other(x))
    encoder.load_tensors(other.state_dict())
    assert torch.equal(encoder(x), other(x))
    with pytest.raises(ValueError, match=r"my\.pth does not fit"):
        encoder.load_tensors({**own, "more": torch.zeros(1)}, "my.pth")


def test_copies_compute_with_their_own_weights():
    encoder = wrapped_maps()
    twin = copy.deepcopy(encoder)
    x = encoder.preprocess(pictures())
    before = encoder(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(encoder(x), before)
    assert not twin(x).any()


def test_weights_that_cannot_be_drawn_afresh_are_named_unless_a_function_does_it():
    with pytest.raises(
        ValueError, match=r"Tokens cannot draw fresh weights for cls, .*give wrap_encoder a function"
    ):
        wrapped_tokens().initialise()

    def draw(network):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.fill_(0.25)

    encoder = wrapped_tokens(initialise=draw)
    encoder.initialise()
    assert all((p == 0.25).all() for p in encoder.parameters())
