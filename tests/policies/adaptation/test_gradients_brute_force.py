"""Gradients of methods that work inside of a network, against finite differences in double precision."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from policies.adaptation import make_adaptation
from policies.encoders import BlockEncoder, InputSpec


class _Smooth(nn.Module):
    """A residual block without corners, where finite differences would be wrong."""

    def __init__(self, width, stride):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride, 1)
        self.norm = nn.BatchNorm2d(width)
        self.stride = stride

    def forward(self, x):
        return x[:, :, :: self.stride, :: self.stride] + torch.tanh(self.norm(self.conv(x)))


class _Transformer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.mlp = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (linear(self.norm(x)) for linear in self.attention)
        x = x + F.scaled_dot_product_attention(q, k, v)
        return x + torch.tanh(self.mlp(x))


class _Double(BlockEncoder):
    """A base in double precision, of maps or tokens: images (N, 4, 6, 3)."""

    def __init__(self, tokens):
        super().__init__(InputSpec(3))
        self.first = nn.Conv2d(3, 4, 2, 2) if tokens else nn.Conv2d(3, 4, 3, 1, 1)
        self.tokens = tokens
        blocks = [_Transformer(4) for _ in range(2)] if tokens else [_Smooth(4, 1), _Smooth(4, 2)]
        self.layers = nn.ModuleList(blocks)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
        self.double()

    def preprocess(self, image):
        # Contiguous: torch 2.13 crashes on CPUs where GroupNorm's input, with channels last, needs no
        # gradient but its scale does, as when one parameter is checked at a time.
        return super().preprocess(image).double().contiguous()

    @property
    def blocks(self):
        return list(self.layers)

    def stem(self, x):
        x = torch.tanh(self.first(x))
        return x.flatten(2).mT if self.tokens else x

    def neck(self, x):
        return x


CASES = {
    "ladder of maps": ("ladder", {"reduction": 2, "every": 1, "gate_temperature": 1.0}, False),
    "ladder of tokens": ("ladder", {"reduction": 1, "every": 1, "output": "blend"}, True),
    "ladder added": ("ladder", {"reduction": 2, "every": 2, "output": "add"}, False),
    "residual adapters in parallel": ("residual_adapters", {"form": "parallel"}, False),
    "residual adapters in series": ("residual_adapters", {"form": "series"}, False),
    "residual adapters in series alone": (
        "residual_adapters",
        {"form": "series", "normalisation": "frozen"},
        False,
    ),
    "lora of convolutions": ("lora", {"rank": 2}, False),
    "lora of attention": ("lora", {"rank": 2, "target": "attention", "rslora": True}, True),
}


def projections(method, name, entries, few, image, stored):
    """Features along two random directions, where some entries of the parameter ``name`` are ``few``."""
    whole = method.get_parameter(name).detach()
    changed = whole.flatten().index_put((entries,), few).view_as(whole)
    output = functional_call(method, {name: changed}, (image, stored)).flatten()
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, len(output), dtype=torch.float64, generator=generator) @ output


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_parameters_are_those_of_finite_differences(case):
    name, options, tokens = CASES[case]
    torch.manual_seed(0)
    method = make_adaptation(name, _Double(tokens), **options).double().eval()
    with torch.no_grad():
        for value in method.trainable_parameters():
            value.add_(0.2 * torch.randn_like(value))
    image = torch.randint(0, 256, (2, 4, 6, 3), dtype=torch.uint8)
    # Stored features are single precision; in double precision they take the same way.
    stored = {k: v.double() for k, v in method.base_features(image).items()} or None
    learned = {n: p for n, p in method.named_parameters() if p.requires_grad}
    assert learned
    for parameter_name, parameter in learned.items():
        entries = torch.linspace(0, parameter.numel() - 1, 5).long().unique()
        few = parameter.detach().flatten()[entries].requires_grad_(True)
        compute = partial(projections, method, parameter_name, entries, image=image, stored=stored)
        assert torch.autograd.gradcheck(compute, (few,), eps=1e-6, atol=1e-6, rtol=1e-4), parameter_name
        compute(few).sum().backward()
        assert few.grad.abs().sum() > 1e-6, parameter_name
