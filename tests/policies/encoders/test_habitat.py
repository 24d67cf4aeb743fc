"""The encoders of habitat-baselines: layers and sizes of the published definitions.

Facts from facebookresearch/habitat-lab, habitat-baselines/habitat_baselines: rl/models/simple_cnn.py
(convolutions 8x8 stride 4 to 32, 4x4 stride 2 to 64, 3x3 stride 1 to 32, all with bias and without padding,
ReLU after the first two; then a linear layer and ReLU), rl/ddppo/policy/resnet.py (ResNet of basic blocks
[2, 2, 2, 2], convolutions without bias) and rl/ddppo/policy/resnet_policy.py (32 base planes in groups of 16,
a 2x2 average before them, 3x3 compression without bias to round(2048 / (h w)) channels in one group, linear
layer and ReLU).
"""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from policies.encoders import make_encoder
from policies.extractor import TransferHead


def with_head(name, channels, size=64, features=512):
    torch.manual_seed(0)
    encoder = make_encoder(name, channels, "random")
    return encoder, TransferHead(encoder.output_shape(size, size), features)


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize("channels", [1, 3])
def test_simple_cnn_has_the_published_layers(channels):
    encoder, head = with_head("simple_cnn", channels)
    reference = nn.Sequential(
        nn.Conv2d(channels, 32, (8, 8), (4, 4)),
        nn.ReLU(),
        nn.Conv2d(32, 64, (4, 4), (2, 2)),
        nn.ReLU(),
        nn.Conv2d(64, 32, (3, 3), (1, 1)),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 512),
        nn.ReLU(),
    )
    ours = [*encoder.state_dict().values(), *head.state_dict().values()]
    reference.load_state_dict(dict(zip(reference.state_dict(), ours, strict=True)))
    image = torch.rand(3, 64, 64, channels)
    expected = reference(image.permute(0, 3, 1, 2))
    torch.testing.assert_close(head(encoder(encoder.preprocess(image))), expected)


def block(inputs, outputs):
    shortcut = inputs * outputs + 2 * outputs if inputs != outputs else 0
    return 9 * inputs * outputs + 9 * outputs * outputs + 4 * outputs + shortcut


@pytest.mark.parametrize(("size", "cells", "compressed"), [(64, 1, 2048), (128, 2, 512), (256, 4, 128)])
def test_resnet18_has_the_published_number_of_parameters(size, cells, compressed):
    encoder, head = with_head("resnet18", 1, size)
    stem = 49 * 32 + 2 * 32
    widths = [32, 32, 32, 64, 64, 128, 128, 256, 256]
    blocks = sum(block(*pair) for pair in itertools.pairwise(widths))
    assert encoder.output_shape(size, size) == (256, cells, cells)
    assert parameters(encoder) == stem + blocks
    ending = 9 * 256 * compressed + 2 * compressed + (compressed * cells * cells + 1) * 512
    assert parameters(head) == ending


def test_resnet18_computes_what_its_definition_says():
    encoder, _ = with_head("resnet18", 1)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    weights = encoder.state_dict()

    def norm(x, name):
        return functional.group_norm(x, 16, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def conv(x, name, stride=1):
        kernel = weights[f"{name}.weight"]
        return functional.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2)

    image = torch.rand(2, 64, 64, 1)
    x = functional.avg_pool2d(image.permute(0, 3, 1, 2), 2)
    x = functional.relu(norm(conv(x, "conv1", 2), "norm1"))
    x = functional.max_pool2d(x, 3, 2, 1)
    for number in range(8):
        name, stride = f"layers.{number}", 2 if number in (2, 4, 6) else 1
        y = functional.relu(norm(conv(x, f"{name}.conv1", stride), f"{name}.norm1"))
        y = norm(conv(y, f"{name}.conv2"), f"{name}.norm2")
        if number in (2, 4, 6):
            x = norm(conv(x, f"{name}.downsample.0", 2), f"{name}.downsample.1")
        x = functional.relu(x + y)
    torch.testing.assert_close(encoder(encoder.preprocess(image)), x)


def test_resnet18_gives_each_block_a_map_and_has_no_running_statistics():
    encoder, _ = with_head("resnet18", 3)
    x = encoder.preprocess(torch.rand(2, 64, 64, 3))
    assert torch.equal(encoder.train()(x), encoder.eval()(x))
    y = encoder.stem(x)
    shapes = []
    for each in encoder.blocks:
        y = each(y)
        shapes.append(tuple(y.shape[1:]))
    assert shapes == [(32, 8, 8)] * 2 + [(64, 4, 4)] * 2 + [(128, 2, 2)] * 2 + [(256, 1, 1)] * 2
    assert torch.equal(encoder.neck(y), encoder(x))


@pytest.mark.parametrize("name", ["simple_cnn", "resnet18"])
@pytest.mark.parametrize("size", [(64, 96), (61, 83)])
def test_images_of_other_sizes_are_taken_as_they_come(name, size):
    encoder = make_encoder(name, 1, "random")
    features = encoder(encoder.preprocess(torch.rand(2, *size, 1)))
    assert tuple(features.shape[1:]) == encoder.output_shape(*size)


def test_too_small_an_image_is_refused_by_name():
    with pytest.raises(ValueError, match="SimpleCNN cannot take 20x20 images"):
        make_encoder("simple_cnn", 1, "random").output_shape(20, 20)
