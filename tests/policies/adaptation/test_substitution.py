"""Layers whose weights tasks replace: torch's own attention, shared weights, computed weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from policies.adaptation import make_adaptation
from policies.adaptation.superposition import bind, draw_context
from policies.encoders import InputSpec, wrap_encoder


class Attending(nn.Module):
    """Patches as tokens, which look at each other, or at narrower ones."""

    def __init__(self, narrow=False):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.narrow = nn.Linear(8, 4) if narrow else None
        widths = {"kdim": 4, "vdim": 4} if narrow else {}
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **widths)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        context = x if self.narrow is None else self.narrow(x)
        return x + self.attention(x, context, context, need_weights=False)[0]


class TorchTransformer(nn.Module):
    """Patches, and a transformer of torch's own."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(self.patches(x).flatten(2).mT)


NETWORKS = {
    "attention": Attending,
    "attention to another width": lambda: Attending(narrow=True),
    "transformer": TorchTransformer,
}


@pytest.fixture
def image():
    return torch.rand(3, 16, 16, 3, generator=torch.Generator().manual_seed(0))


def matrices(network):
    """Names of everything that multiplies inputs."""
    return [name for name, value in network.named_parameters() if value.dim() > 1]


def computed(network, image):
    return network(image.permute(0, 3, 1, 2))


def plain(network):
    """An encoder that takes values in 0..1 as they are."""
    spec = InputSpec(mean=(0.0,), std=(1.0,))
    return wrap_encoder(network, (None, 8), spec).eval()


@pytest.mark.parametrize("kind", NETWORKS)
def test_masks_remove_weights_of_torch_s_attention_as_of_other_layers(kind, image):
    torch.manual_seed(0)
    network = NETWORKS[kind]().eval()
    method = make_adaptation("piggyback", plain(network)).eval()
    assert {name.removeprefix("module.") for name in method.masks()} == set(matrices(network))
    method(image).square().sum().backward()
    assert all(score.grad.abs().sum() > 0 for score in method.parameters())
    with torch.no_grad():
        for score in method.parameters():
            score.uniform_(-1, 1)
        masked = copy.deepcopy(network)
        for name in matrices(network):
            masked.get_parameter(name).mul_(method.masks()[f"module.{name}"])
        # Without gradients torch takes a short way through its transformer.
        torch.testing.assert_close(method(image), computed(masked, image), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(method(image), computed(masked, image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("context", ["binary", "rotation"])
def test_contexts_turn_the_inputs_of_torch_s_attention_as_of_other_layers(kind, context, image):
    torch.manual_seed(0)
    network = NETWORKS[kind]().eval()
    method = make_adaptation("superposition", plain(network), context=context).eval()
    torch.testing.assert_close(method(image), computed(network, image), rtol=1e-5, atol=1e-5)
    method.start_task("second")
    bound = copy.deepcopy(network)
    for name in matrices(network):
        weight = network.get_parameter(name).detach()
        drawn = draw_context(context, 0, 1, f"module.{name}", weight[0].numel())
        bound.get_parameter(name).data.copy_(bind(weight, drawn))
    torch.testing.assert_close(method(image), computed(bound, image), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(method(image), computed(network, image), atol=1e-2)


class Shared(nn.Module):
    """Two convolutions of one weight."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.stem(x)).relu())


def test_layers_that_share_a_weight_have_contexts_of_their_own(image):
    torch.manual_seed(0)
    network = Shared()
    encoder = wrap_encoder(network, (8, None, None), InputSpec(mean=(0.0,), std=(1.0,)))
    method = make_adaptation("superposition", encoder)
    torch.testing.assert_close(method(image), computed(network, image), rtol=1e-5, atol=1e-5)
    method.start_task("second")
    apart = copy.deepcopy(network)
    apart.second.weight = nn.Parameter(network.first.weight.detach().clone())
    for name in ("stem", "first", "second"):
        weight = apart.get_parameter(f"{name}.weight")
        drawn = draw_context("binary", 0, 1, f"module.{name}.weight", weight[0].numel())
        weight.data.copy_(bind(weight.detach(), drawn))
    expected = computed(apart, image)
    torch.testing.assert_close(method(image), expected, rtol=1e-5, atol=1e-5)
    # The shared weight learns from both of its places.
    method(image).square().sum().backward()
    expected.square().sum().backward()
    total = sum(
        bind(apart.get_parameter(f"{name}.weight").grad, method.adapter.get_buffer(f"module/{name}/weight"))
        for name in ("first", "second")
    )
    torch.testing.assert_close(method.network.encoder.module.first.weight.grad, total, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "computes", [weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm]
)
@pytest.mark.parametrize("method", ["piggyback", "superposition", "lora", "residual_adapters"])
def test_layers_that_compute_their_weights_are_refused_with_what_to_do(method, computes):
    network = nn.Sequential(computes(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        # Else the old weight_norm would keep it from being copied.
        network(torch.rand(1, 3, 8, 8))
    encoder = wrap_encoder(network, (8, None, None), name="mine")
    with pytest.raises(
        ValueError, match=r"layer 'module.0' of encoder 'mine' computes its weight .*remove_param"
    ):
        make_adaptation(method, encoder)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_networks_that_the_old_weight_norm_keeps_from_being_copied_are_refused_with_what_to_do():
    network = nn.Sequential(nn.Identity(), weight_norm(nn.Conv2d(3, 8, 3)))
    network(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"module '1' of Sequential .*remove_weight_norm"):
        wrap_encoder(network, (8, None, None))
    torch.nn.utils.remove_weight_norm(network[1])
    make_adaptation("piggyback", wrap_encoder(network, (8, None, None)))


def test_superposition_refuses_layers_that_hold_inputs_before_outputs():
    encoder = wrap_encoder(nn.Sequential(nn.ConvTranspose2d(3, 8, 3)), (8, None, None))
    with pytest.raises(ValueError, match=r"layer 'module.0' .* is a transposed convolution"):
        make_adaptation("superposition", encoder)
