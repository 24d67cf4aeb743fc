"""Residual adapters: the authors' network on the same weights, and adapters that are computed apart.

``tests/data/residual_adapters.npz`` holds what the authors' code computes
(github.com/srebuffi/residual_adapters, commit 5c51aa3, ``ResNet(BasicBlock, [1, 1, 1])`` of ``models.py``
with an eighth of its channels, under torch 2.13; nothing had to be mended): images, random weights, and the
maps before the average pool, in evaluation, of the first task's plain network ("normal") and of a second task
with adapters in series and in parallel.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from policies.adaptation import ResidualAdapters, ResidualAdaptersConfig, make_adaptation
from policies.adaptation.residual_adapters import following_batchnorms
from policies.encoders import Encoder, InputSpec, make_encoder

DATA = Path(__file__).parents[2] / "data" / "residual_adapters.npz"
FORMS = ["series", "parallel"]


@pytest.fixture(scope="module")
def recorded():
    with np.load(DATA) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def images(number=2, rows=64, columns=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, rows, columns, 3), dtype=torch.uint8, generator=generator)


def disturb(module, scale=0.1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(scale * torch.randn(value.shape, generator=generator))


def settle(encoder, seed=2):
    """Gives BatchNorm layers statistics, scales and shifts as pre-training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(0.3 * torch.randn(layer.num_features, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=generator))
    disturb(encoder)
    return encoder


class ConvNorm(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.norm(self.conv(x))


class Block(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.first = ConvNorm(inputs, 2 * inputs, 2)
        self.second = ConvNorm(2 * inputs, 2 * inputs, 1)

    def forward(self, x):
        shortcut = F.avg_pool2d(x, 2)
        shortcut = torch.cat((shortcut, 0 * shortcut), 1)
        return F.relu(self.second(F.relu(self.first(x))) + shortcut)


class TheirResNet(Encoder):
    """The network of the paper, written from its description: three strided blocks, 4 to 32 channels."""

    def __init__(self):
        super().__init__(InputSpec(3))
        self.first = ConvNorm(3, 4, 1)
        self.layers = nn.Sequential(Block(4), Block(8), Block(16))
        self.last = nn.BatchNorm2d(32)

    def forward(self, x):
        return F.relu(self.last(self.layers(self.first(x))))


PLACES = {
    "first": "pre_layers_conv",
    **{
        f"layers.{i}.{ours}": f"layer{i + 1}.0.{theirs}"
        for i in range(3)
        for ours, theirs in (("first", "conv1"), ("second", "conv2.1"))
    },
}
PARTS = ("weight", "bias", "running_mean", "running_var")
EPS = 1e-5


def their_base(recorded):
    encoder = TheirResNet()
    tensors = {f"last.{part}": recorded[f"normal/end_bns.0.0.{part}"] for part in PARTS}
    for ours, theirs in PLACES.items():
        tensors[f"{ours}.conv.weight"] = recorded[f"normal/{theirs}.conv.weight"]
        tensors |= {f"{ours}.norm.{part}": recorded[f"normal/{theirs}.bns.0.{part}"] for part in PARTS}
    encoder.load_tensors(tensors)
    return encoder.eval()


def their_task(recorded, form, base):
    """The second task as tensors of ours: A by convolution; scale, shift, mean and variance by layer."""
    task = f"{form}_adapters"
    filters, norms = {}, {"last": [recorded[f"{task}/end_bns.1.0.{part}"] for part in PARTS]}
    for ours, theirs in PLACES.items():
        if form == "parallel":
            filters[ours] = recorded[f"{task}/{theirs}.parallel_conv.1.conv.weight"][:, :, 0, 0]
            norms[f"{ours}.norm"] = [recorded[f"{task}/{theirs}.bns.1.{part}"] for part in PARTS]
            continue
        adapter = f"{task}/{theirs}.bns.1.0.conv"
        scale, shift, mean, variance = (recorded[f"{adapter}.0.{part}"] for part in PARTS)
        matrix = recorded[f"{adapter}.1.weight"][:, :, 0, 0] * (scale / (variance + EPS).sqrt())
        constant = recorded[f"{adapter}.1.weight"][:, :, 0, 0] @ shift - matrix @ mean
        # Ours divides by the deviation of the base's layer, not the adapter's own, and adds no constant.
        filters[ours] = matrix * (base.get_buffer(f"{ours}.norm.running_var") + EPS).sqrt()
        weight, bias, after, variance = (recorded[f"{task}/{theirs}.bns.1.1.{part}"] for part in PARTS)
        norms[f"{ours}.norm"] = [weight, bias, after - constant, variance]
    return filters, norms


@pytest.mark.parametrize("form", FORMS)
def test_the_network_computes_what_the_authors_does(recorded, form):
    image = (recorded["image"].permute(0, 2, 3, 1) + 1) / 2
    base = their_base(recorded)
    with torch.no_grad():
        torch.testing.assert_close(
            base(base.preprocess(image)), recorded["normal/features"], rtol=1e-5, atol=1e-5
        )
    method = ResidualAdapters(ResidualAdaptersConfig(form=form, normalisation="statistics"), base).eval()
    filters, norms = their_task(recorded, form, base)
    adapter = method.adapter
    for name, value in filters.items():
        adapter.filters[f"{name}.conv".replace(".", "/")].data = value
    for name, values in norms.items():
        for part, value in zip(PARTS, values, strict=True):
            getattr(adapter.normalisation, f"{name}.{part}".replace(".", "/")).data = value
    torch.testing.assert_close(method(image), recorded[f"{form}_adapters/features"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_scale_and_shift_express_what_statistics_of_the_task_do(recorded, form):
    image = (recorded["image"].permute(0, 2, 3, 1) + 1) / 2
    base = their_base(recorded)
    method = ResidualAdapters(ResidualAdaptersConfig(form=form), base).eval()
    filters, norms = their_task(recorded, form, base)
    adapter = method.adapter
    for name, value in filters.items():
        adapter.filters[f"{name}.conv".replace(".", "/")].data = value
    for name, (weight, bias, mean, variance) in norms.items():
        own_mean = base.get_buffer(f"{name}.running_mean")
        own_deviation = (base.get_buffer(f"{name}.running_var") + EPS).sqrt()
        scale = weight / (variance + EPS).sqrt()
        centre = own_mean.clone()
        if form == "series" and name != "last":
            centre += filters[name.removesuffix(".norm")] @ (own_mean / own_deviation)
        getattr(adapter.normalisation, f"{name}.weight".replace(".", "/")).data = scale * own_deviation
        getattr(adapter.normalisation, f"{name}.bias".replace(".", "/")).data = bias + scale * (centre - mean)
    torch.testing.assert_close(method(image), recorded[f"{form}_adapters/features"], rtol=1e-5, atol=1e-5)


class OneConv(Encoder):
    def __init__(self, kernel, stride, padding, dilation, **options):
        super().__init__(InputSpec(3))
        self.conv = nn.Conv2d(3, 5, kernel, stride, padding, dilation, **options)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        (3, 1, 1, 1),
        (3, 2, 1, 1),
        (8, 4, 2, 1),
        (7, 4, 3, 1),
        (3, 1, 2, 2),
        (5, 2, 4, 2),
        (5, 3, 0, 1),
        ((1, 3), (1, 2), (0, 1), 1),
        ((5, 3), (2, 1), (2, 0), (1, 2)),
    ],
)
def test_a_parallel_adapter_is_a_1x1_convolution_of_the_same_stride(kernel, stride, padding, dilation):
    torch.manual_seed(0)
    base = OneConv(kernel, stride, padding, dilation).eval()
    method = ResidualAdapters(ResidualAdaptersConfig(), base)
    filters = method.adapter.filters["conv"]
    filters.data = torch.randn(5, 3)
    image = images(2, 21, 34)
    with torch.no_grad():
        x = base.preprocess(image)
        y = base(x)
        beside = F.conv2d(x, filters[:, :, None, None], stride=stride)
        expected = y + beside[:, :, : y.shape[2], : y.shape[3]]
    assert not torch.allclose(y, expected, atol=0.1)
    torch.testing.assert_close(method(image), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_in_series_takes_the_bias_too():
    torch.manual_seed(0)
    base = OneConv(3, 2, 1, 1).eval()
    method = ResidualAdapters(ResidualAdaptersConfig(form="series"), base)
    filters = method.adapter.filters["conv"]
    filters.data = torch.randn(5, 5)
    with torch.no_grad():
        y = base(base.preprocess(images()))
        expected = y + F.conv2d(y, filters[:, :, None, None])
    torch.testing.assert_close(method(images()), expected, rtol=1e-5, atol=1e-5)


def computed_apart(encoder, adapter, form, image):
    """Features with adapters that run behind or beside their convolutions, and the task's normalisation."""
    encoder = copy.deepcopy(encoder)
    names = {module: name for name, module in encoder.named_modules()}
    followers = {names[conv]: names[norm] for conv, norm in pairs(encoder).items()}

    def adapt(module, inputs, output):
        filters = adapter.filters[names[module].replace(".", "/")][:, :, None, None]
        if form == "parallel":
            # Contiguous: torch 2.13's backward pass of a strided 1x1 convolution of three channels that
            # come last writes where it should not, on some processors.
            return output + F.conv2d(inputs[0].contiguous(), filters, stride=module.stride)
        norm = encoder.get_submodule(followers[names[module]]) if names[module] in followers else None
        if norm is None:
            return output + F.conv2d(output, filters)
        plain = F.batch_norm(output, norm.running_mean, norm.running_var, eps=norm.eps)
        return output + F.conv2d(plain, filters)

    for module in list(encoder.modules()):
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(adapt)
    if adapter.normalisation is not None:
        for name, value in adapter.normalisation.named_parameters():
            layer, _, kind = name.replace("/", ".").rpartition(".")
            encoder.get_submodule(layer)._buffers.pop(kind, None)
            encoder.get_submodule(layer).register_parameter(kind, value)
    return encoder(encoder.preprocess(image))


def pairs(encoder):
    """BatchNorm layers by the convolution before them, by the names they have in our networks."""
    modules = dict(encoder.named_modules())
    return {
        module: modules[other]
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d)
        for other in (name.replace("conv", "bn"), name.replace("conv", "norm"))
        if isinstance(modules.get(other), nn.BatchNorm2d)
    }


@pytest.mark.parametrize("normalisation", ["frozen", "affine"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoder", ["resnet44", "resnet_small", "fcn5_small", "fcn8"])
def test_folded_adapters_and_their_gradients_are_those_computed_apart(encoder, form, normalisation):
    torch.manual_seed(0)
    base = settle(make_encoder(encoder, weights="random")).eval()
    method = ResidualAdapters(ResidualAdaptersConfig(form=form, normalisation=normalisation), base).eval()
    disturb(method.adapter, 0.05)
    image = images(1)
    found = method(image)
    found.square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in method.parameters()]
    method.zero_grad()
    expected = computed_apart(method.base.encoder, method.adapter, form, image)
    expected.square().mean().backward()
    assert not torch.allclose(found, method.base(image), atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    for gradient, parameter in zip(gradients, method.parameters(), strict=True):
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-3 * scale + 1e-7)


def test_batchnorm_layers_are_matched_to_the_convolutions_before_them():
    encoder = make_encoder("resnet44", weights="random")
    expected = {name: name.replace("conv", "bn") for name, _ in encoder.named_modules() if "conv" in name}
    assert len(expected) == 43
    assert following_batchnorms(encoder) == expected
    assert following_batchnorms(make_encoder("resnet_small", weights="random")) == {}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())


def test_statistics_of_the_task_follow_its_batches_and_the_base_keeps_its_own():
    torch.manual_seed(0)
    base = settle(make_encoder("resnet44", weights="random"))
    for form in FORMS:
        method = ResidualAdapters(ResidualAdaptersConfig(form=form, normalisation="statistics"), base)
        digest = method.base.sha256()
        image = images(8)
        torch.testing.assert_close(method.eval()(image), method.base(image), rtol=0, atol=0)
        method.train()
        before = method.adapter.normalisation.tensors()["bn1.running_mean"].clone()
        method(image)
        x = method.base.encoder.conv1(method.base.encoder.preprocess(image))
        expected = 0.9 * before + 0.1 * x.mean((0, 2, 3))
        torch.testing.assert_close(method.adapter.normalisation.tensors()["bn1.running_mean"], expected)
        assert method.base.sha256() == digest
        assert not any(module.training for module in method.base.modules())


@pytest.mark.parametrize("form", FORMS)
def test_a_second_task_starts_as_the_base_and_leaves_the_first_alone(form):
    method = make_adaptation("residual_adapters", encoder="resnet_small", weights="random", form=form)
    image = images()
    disturb(method.adapter)
    first = method(image)
    method.start_task("second")
    assert torch.equal(method(image), method.base(image))
    method(image).square().sum().backward()
    assert not any(p.requires_grad or p.grad is not None for p in method.adapters["task"].parameters())
    disturb(method.adapter)
    method.start_task("task")
    assert torch.equal(method(image), first)


def test_parallel_adapters_of_3x3_convolutions_are_a_ninth_of_them():
    method = make_adaptation(
        "residual_adapters", encoder="resnet44", weights="random", normalisation="frozen"
    )
    convolutions = [m for m in method.base.encoder.modules() if isinstance(m, nn.Conv2d)]
    total = sum(conv.weight.numel() for conv in convolutions)
    assert sum(p.numel() for p in method.parameters()) * 9 == total
    assert len(list(method.parameters())) == len(convolutions)


def test_a_vision_transformer_is_refused():
    with pytest.raises(ValueError, match="encoder 'vit_mini' has none; choose a convolutional network"):
        make_adaptation("residual_adapters", encoder="vit_mini", weights="random")


def test_convolutions_in_groups_are_refused():
    class Grouped(OneConv):
        def __init__(self):
            super().__init__(3, 1, 1, 1)
            self.conv = nn.Conv2d(3, 6, 3, groups=3)

    with pytest.raises(ValueError, match="convolution 'conv' of encoder 'Grouped' has 3 groups"):
        ResidualAdapters(ResidualAdaptersConfig(), Grouped())


@pytest.mark.parametrize(("padding", "dilation"), [(1, 2), (3, 1), ("same", 1)])
def test_convolutions_without_a_tap_for_the_adapter_are_refused(padding, dilation):
    base = OneConv(3, 1, padding, dilation)
    with pytest.raises(ValueError, match="has no tap over the pixels"):
        ResidualAdapters(ResidualAdaptersConfig(), base)
    method = ResidualAdapters(ResidualAdaptersConfig(form="series"), base)
    torch.testing.assert_close(method(images(1, 9, 9)), method.base(images(1, 9, 9)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "serial"}, "form 'serial': expected one of series, parallel"),
        ({"normalisation": "batch"}, "normalisation 'batch': expected one of frozen, affine, statistics"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ResidualAdaptersConfig(**options)
