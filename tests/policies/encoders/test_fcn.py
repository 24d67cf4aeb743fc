"""The side-tuning authors' networks, against their own outputs and sizes."""

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
