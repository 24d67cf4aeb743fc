"""ResNet-44 against the side-tuning authors' outputs."""

import numpy as np
import torch

from policies.encoders import ENCODERS, make_encoder


def test_published_size():
    assert sum(p.numel() for p in ENCODERS["resnet44"](3).parameters()) == 657_936


def test_gives_the_authors_outputs(reference_dir, weights_dir):
    recorded = np.load(reference_dir / "encoders.npz")
    network = make_encoder("resnet44", weights=weights_dir / "resnet44_cifar.pth").eval()
    with torch.no_grad():
        features = network(torch.from_numpy(recorded["cifar_input"]))
    np.testing.assert_allclose(features.numpy(), recorded["resnet44_cifar"], atol=1e-4)
