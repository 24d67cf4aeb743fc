"""The side-tuning authors' networks, against their own outputs and sizes.

``tests/data/encoders_authors.npz`` was recorded with torch 2.13 and the authors' classes FCN3, FCN4Reshaped,
FCN5, FCN8 (``tlkit/models/student_models.py``) and ResnetiCifar44NoLinear (``resnet_cifar.py``) of
github.com/jozhang97/side-tuning, commit dea3456, as they are: outputs for two images of 32 x 32 pixels, in
evaluation mode, on the weights of :func:`fill` with seeds 1 to 5.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from policies.encoders import ENCODERS, make_encoder
from policies.encoders.fcn import FCN5


def count(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "parameters", "shape"),
    [("fcn4", 25_904, (64,)), ("fcn5", 921_376, (8, 16, 16)), ("fcn8", 3_361_440, (8, 16, 16))],
)
def test_published_sizes(name, parameters, shape):
    network = ENCODERS[name](3)
    assert count(network) == parameters
    assert network.output_shape(64, 64) == shape


def test_fcn3_gives_eight_channels():
    assert ENCODERS["fcn3"](3).output_shape(256, 256) == (8, 16, 16)


def fill(network, seed):
    """Weights and statistics of a random generator whose numbers stay the same from version to version."""
    source = np.random.RandomState(seed)
    state = network.state_dict()
    for name in sorted(state):
        if name.endswith("num_batches_tracked"):
            continue
        value = state[name]
        drawn = source.uniform(-1, 1, size=tuple(value.shape))
        if value.dim() > 1:
            drawn = drawn * (3 / np.prod(value.shape[1:])) ** 0.5
        elif name.endswith(("running_var", "weight")):
            drawn = 1 + drawn / 2
        else:
            drawn = drawn / 4
        value.copy_(torch.from_numpy(drawn.astype(np.float32)))


@torch.no_grad()
@pytest.mark.parametrize(
    ("theirs", "ours", "seed"),
    [
        ("fcn3", "fcn3_cifar", 1),
        ("fcn4", "fcn4", 2),
        ("fcn5", "fcn5_cifar", 3),
        ("fcn8", "fcn8_cifar", 4),
        ("resnet44", "resnet44", 5),
    ],
)
def test_images_of_32_pixels_give_the_authors_outputs(theirs, ours, seed):
    recorded = np.load(Path(__file__).parents[2] / "data" / "encoders_authors.npz")
    network = ENCODERS[ours](3).eval()
    fill(network, seed)
    image = torch.from_numpy(recorded["input"])
    assert network.preprocess(torch.zeros(1, 32, 32, 3)).shape[1:] == image.shape[1:]  # not resized
    np.testing.assert_allclose(network(image).numpy(), recorded[theirs], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*untrained")
def test_fcn5_gives_the_authors_outputs(reference_dir, weights_dir):
    recorded = np.load(reference_dir / "encoders.npz")
    network = make_encoder("fcn5", weights=weights_dir / "curvature-distilled.pth").eval()
    with torch.no_grad():
        features = network(network.preprocess(torch.from_numpy(recorded["image_uint8"])))
    np.testing.assert_allclose(features.numpy(), recorded["fcn5"], atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*untrained")
def test_fcn5_with_normalised_outputs_gives_the_authors_outputs(reference_dir, weights_dir):
    recorded = np.load(reference_dir / "encoders.npz")
    plain = make_encoder("fcn5", weights=weights_dir / "reshading-distilled.pth")
    network = FCN5(normalise_outputs=True).eval()
    # The published file was made without the last normalisation, which starts as scale 1 and shift 0.
    norm = {"groupnorm.weight": torch.ones(8), "groupnorm.bias": torch.zeros(8)}
    network.load_tensors({**plain.state_dict(), **norm})
    with torch.no_grad():
        features = network(network.preprocess(torch.from_numpy(recorded["image_uint8"])))
    np.testing.assert_allclose(features.numpy(), recorded["fcn5_normalised"], atol=1e-4)


def test_small_fcn5_is_small_and_keeps_a_map_of_eight_by_eight():
    network = ENCODERS["fcn5_small"](3)
    assert network.output_shape(64, 64) == (8, 8, 8)
    assert count(network) <= 250_000


@pytest.mark.parametrize("size", [(64, 96), (48, 48), (128, 128)])
def test_small_fcn5_takes_images_of_any_size(size):
    channels, rows, columns = ENCODERS["fcn5_small"](1).output_shape(*size)
    assert (channels, rows, columns) == (8, size[0] // 8, size[1] // 8)
