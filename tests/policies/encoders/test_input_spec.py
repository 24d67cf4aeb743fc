"""Preprocessing against Pillow and torchvision's published formulas, and the type that networks compute in.

Tolerances are in levels of 8 bits. Pillow rounds to whole levels twice, after its pass over columns and after
its pass over rows, which moves a bilinear result by at most 0.5 + 0.5 = 1 level: the weights of the second
pass are positive and sum to 1. The absolute values of bicubic weights sum to 1.25 at most, hence 0.5 * 1.25 +
0.5 = 1.125. Images of the bicubic tests keep away from black and white, since Pillow also clips between its
passes.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from policies.encoders import Encoder, InputSpec, make_encoder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Pixels(Encoder):
    """Gives what preprocessing makes of an image."""

    def forward(self, x):
        return x


def levels(spec, image):
    """The resized image in levels of 8 bits: (N, C, h, w)."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (spec.mean, spec.std))
    encoder = Pixels(spec)
    return (encoder(encoder.preprocess(image)) * std + mean) * 255


def noise(height, width, channels=3, low=0, high=256):
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(low, high, (1, height, width, channels), dtype=torch.uint8, generator=generator)


def pillow(image, rows, columns, resample):
    resized = Image.fromarray(image[0].numpy()).resize((columns, rows), resample)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("size", [(640, 480), (300, 300), (100, 260), (37, 53)])
def test_antialiased_bilinear_is_pillows_within_its_roundings(size):
    spec = InputSpec(size=(96, 96), antialias=True)
    image = noise(*size)
    expected = pillow(image, 96, 96, Image.Resampling.BILINEAR)
    assert (levels(spec, image) - expected).abs().max() <= 1.01


@pytest.mark.parametrize("size", [(320, 240), (150, 150), (37, 53)])
def test_antialiased_bicubic_is_pillows_within_its_roundings(size):
    spec = InputSpec(size=(96, 96), interpolation="bicubic", antialias=True)
    image = noise(*size, low=80, high=176)
    expected = pillow(image, 96, 96, Image.Resampling.BICUBIC)
    assert (levels(spec, image) - expected).abs().max() <= 1.135


def test_without_antialias_large_images_alias():
    image = noise(640, 480)
    expected = pillow(image, 96, 96, Image.Resampling.BILINEAR)
    assert (levels(InputSpec(size=(96, 96)), image) - expected).abs().max() > 20


@pytest.mark.parametrize("size", [(120, 90), (90, 120), (51, 103), (64, 64), (77, 64)])
def test_shorter_side_then_centre_crop_is_dinov2s_published_preprocessing(size):
    spec = InputSpec(
        size=(56, 56),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        interpolation="bicubic",
        antialias=True,
        shorter_side=64,
    )
    image = noise(*size, low=80, high=176)
    # torchvision's Resize(64) and CenterCrop(56), written out.
    rows, columns = (int(64 * side / min(size)) for side in size)
    top, left = (round((side - 56) / 2.0) for side in (rows, columns))
    whole = pillow(image, rows, columns, Image.Resampling.BICUBIC)
    expected = whole[:, :, top : top + 56, left : left + 56]
    assert (levels(spec, image) - expected).abs().max() <= 1.135


def test_normalisation_is_torchvisions_formula():
    spec = InputSpec(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    image = noise(5, 7)
    expected = image.permute(0, 3, 1, 2) / 255
    for channel in range(3):
        expected[:, channel] = (expected[:, channel] - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
    torch.testing.assert_close(Pixels(spec).preprocess(image), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shorter_side", [None, 40])
def test_bytes_and_floats_of_one_image_are_resized_alike(interpolation, shorter_side):
    spec = InputSpec(size=(32, 32), interpolation=interpolation, antialias=True, shorter_side=shorter_side)
    image = noise(31, 45)
    seen = Pixels(spec).preprocess(image)
    torch.testing.assert_close(seen, Pixels(spec).preprocess(image.float() / 255), atol=1e-5, rtol=0)
    assert seen.shape == (1, 3, 32, 32)
    assert seen.dtype == torch.float32


def test_bicubic_overshoot_is_clipped_to_the_range_of_bytes():
    edges = torch.zeros(1, 16, 16, 1, dtype=torch.uint8)
    edges[:, :, 8:] = 255
    seen = Pixels(InputSpec(1, (33, 33), interpolation="bicubic")).preprocess(edges)
    assert seen.min() == -1
    assert seen.max() == 1


def test_depth_of_odd_size_is_resized():
    spec = InputSpec(1, (24, 24), antialias=True)
    ramp = torch.linspace(0, 1, 51)[None, :, None, None].expand(1, 51, 33, 1)
    seen = Pixels(spec).preprocess(ramp)
    assert seen.shape == (1, 1, 24, 24)
    assert (seen.diff(dim=2) > 0).all()
    torch.testing.assert_close(seen.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_integers_that_are_no_bytes_are_refused():
    with pytest.raises(ValueError, match=r"torch\.int64: expected uint8"):
        Pixels(InputSpec()).preprocess(torch.zeros(1, 4, 4, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"interpolation": "nearest"}, "interpolation 'nearest': expected one of bilinear"),
        ({"dtype": "float64"}, "dtype 'float64': expected one of float32"),
        ({"shorter_side": 256}, "shorter_side 256: expected a size"),
        ({"shorter_side": 200, "size": (224, 224)}, "shorter_side 200: expected a size"),
    ],
)
def test_wrong_declarations_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        InputSpec(**wrong)


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 11), ("bfloat16", 8)])
@pytest.mark.parametrize("name", ["resnet_small", "resnet44"])
def test_narrow_types_compute_narrowly_and_give_float32(name, dtype, digits):
    torch.manual_seed(0)
    network = make_encoder(name, weights="random").eval()
    x = network.preprocess(torch.rand(2, 32, 32, 3))
    exact = network(x)
    seen = []
    first = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    network.input_spec = replace(network.input_spec, dtype=dtype)
    features = network(x)
    assert seen == [getattr(torch, dtype)]
    assert features.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in network.parameters())
    error = (features - exact).norm() / exact.norm()
    assert 2.0**-digits / 16 < error < 2.0**-digits * 16  # some roundings of 2^-digits each
    features.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_narrow_types_compile():
    torch.manual_seed(0)
    network = make_encoder("resnet_small", weights="random").eval()
    network.input_spec = replace(network.input_spec, dtype="bfloat16")
    x = network.preprocess(torch.rand(1, 32, 32, 3))
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x), atol=0.05, rtol=0.05)
