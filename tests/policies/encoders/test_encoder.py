"""What all encoders share: declared input, preprocessing, loading by name."""

import pytest
import torch

from policies.encoders import ENCODERS, InputSpec, default_weights, make_encoder
from policies.weights import save_safetensors


@pytest.fixture
def network():
    torch.manual_seed(0)
    return make_encoder("fcn5_small", weights="random")


def test_bytes_and_floats_of_one_image_are_the_same_input(network):
    image = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    torch.testing.assert_close(network.preprocess(image), network.preprocess(image.float() / 255))


def test_preprocessing_spans_minus_one_to_one_and_leaves_its_input_alone(network):
    image = torch.rand(1, 8, 8, 3)
    image[0, 0, 0] = torch.tensor([0.0, 0.5, 1.0])
    kept = image.clone()
    seen = network.preprocess(image)
    torch.testing.assert_close(seen[0, :, 0, 0], torch.tensor([-1.0, 0.0, 1.0]))
    assert torch.equal(image, kept)


def test_fixed_size_encoders_resize():
    assert ENCODERS["fcn5"](3).preprocess(torch.zeros(1, 64, 48, 3)).shape == (1, 3, 256, 256)


@pytest.mark.parametrize("shape", [(2, 64, 64, 1), (2, 3, 64, 64), (64, 64, 3), (2, 64, 64, 4)])
def test_images_of_another_shape_are_refused(network, shape):
    with pytest.raises(ValueError, match="expected \\(N, H, W, 3\\)"):
        network.preprocess(torch.zeros(shape))


def test_images_too_small_are_refused():
    with pytest.raises(ValueError, match="2x2"):
        ENCODERS["fcn5_small"](3).output_shape(2, 2)


@pytest.mark.parametrize("wrong", [{"channels": 2}, {"mean": (0.5, 0.5)}])
def test_wrong_input_declarations_are_refused(wrong):
    with pytest.raises(ValueError, match="encoder input"):
        InputSpec(**wrong)


def test_unknown_encoder_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'fcn5_small'"):
        make_encoder("fcn5small")


def test_weights_of_another_network_are_refused_by_tensor(network, weights_dir):
    with pytest.raises(ValueError, match=r"resnet44_cifar.pth does not fit FCN5: missing: conv1.0.weight"):
        make_encoder("fcn5_small", weights=weights_dir / "resnet44_cifar.pth")


def test_weights_may_lie_in_the_home_folder(network, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with torch.no_grad():
        network.conv1[1].weight.mul_(2)
    save_safetensors(tmp_path / "mine.safetensors", network.state_dict())
    read = make_encoder("fcn5_small", weights="~/mine.safetensors")
    assert torch.equal(read.conv1[1].weight, network.conv1[1].weight)


def test_weights_of_another_width_are_refused_by_shape(network):
    tensors = {**network.state_dict(), "conv1.0.weight": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"wrong shape: conv1.0.weight \(3, 3\) instead of \(32, 3, 8, 8\)"):
        network.load_tensors(tensors)


@pytest.mark.parametrize(
    ("name", "channels"), [("fcn5_small", 3), ("fcn5_small", 1), ("resnet_small", 3), ("vit_mini", 3)]
)
@pytest.mark.filterwarnings("error")
def test_default_weights_are_trained_and_small(name, channels):
    file = default_weights(name, channels)
    assert file.stat().st_size <= 1_500_000
    shipped = make_encoder(name, channels)  # a warning about untrained weights fails here
    assert all(torch.isfinite(p).all() for p in shipped.parameters())


def test_encoders_without_shipped_weights_say_so():
    with pytest.raises(ValueError, match="no default weights ship for encoder 'fcn8'"):
        make_encoder("fcn8")


@pytest.mark.parametrize("name", ["fcn3", "fcn4", "fcn5", "fcn5_small", "fcn8", "resnet_small", "vit_mini"])
def test_scaling_outputs_scales_them_linearly(name):
    torch.manual_seed(0)
    network = make_encoder(name, weights="random").eval()
    image = network.preprocess(torch.rand(1, 64, 64, 3))
    with torch.no_grad():
        before = network(image)
        network.scale_outputs(0.25)
        torch.testing.assert_close(network(image), before * 0.25)
