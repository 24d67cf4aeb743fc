"""Vision transformers against the models and image processors of ``transformers``, on files it writes."""

import numpy as np
import pytest
import torch
from PIL import Image

from policies.encoders import ENCODERS, InputSpec, make_encoder
from policies.encoders.vit import VisionTransformer
from policies.weights import read_weights

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
DECODER = {
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 8,
}
FAMILIES = ("vit", "vit classifier", "mae", "dinov2")


def tiny(family, output="tokens"):
    dino = family == "dinov2"
    return VisionTransformer(
        InputSpec(), 8, 24, 3, 2, (4, 4), eps=1e-6 if dino else 1e-12, layer_scale=dino, output=output
    ).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def published(request, tmp_path_factory):
    """The family, a function from images to all tokens, and the file that holds the network."""
    transformers = pytest.importorskip("transformers")
    family = request.param
    torch.manual_seed(0)
    if family == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(intermediate_size=96, **TINY))
    elif family == "vit classifier":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(intermediate_size=96, **TINY))
    elif family == "mae":
        config = transformers.ViTMAEConfig(intermediate_size=96, mask_ratio=0.0, **TINY, **DECODER)
        model = transformers.ViTMAEForPreTraining(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**TINY))
    # Initial values hide mistakes: scales are 1, shifts 0, and attention is nearly even.
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("published")
    model.eval().save_pretrained(folder)
    inner = getattr(model, "vit", model)

    def tokens(x):
        if family == "dinov2":
            return inner(x).last_hidden_state
        # In order, where training would shuffle the patches.
        patches = x.shape[2] * x.shape[3] // 64
        order = {"noise": torch.arange(patches).float().expand(len(x), -1)} if family == "mae" else {}
        return inner(x, interpolate_pos_encoding=True, **order).last_hidden_state

    return family, tokens, folder / "model.safetensors"


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (64, 64)])
def test_gives_the_tokens_of_transformers_from_the_same_file(published, size):
    family, tokens, file = published
    network = tiny(family)
    network.load_tensors(read_weights(file).tensors)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(network(x), tokens(x), atol=2e-5, rtol=1e-4)


def test_files_lose_nothing_but_heads(published):
    family, _, file = published
    network = tiny(family)
    network.load_tensors(read_weights(file).tensors)
    stored = read_weights(file).tensors
    kept = [v for k, v in stored.items() if not k.startswith(("decoder", "classifier", "pooler"))]
    mask_token = family == "dinov2"
    assert sum(v.numel() for v in kept) - 24 * mask_token == sum(p.numel() for p in network.parameters())


def test_own_files_load_too(tmp_path):
    one, other = tiny("dinov2"), tiny("dinov2")
    one.initialise()
    other.load_tensors(one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_file_of_another_network_is_refused(published):
    family, _, file = published
    if family == "dinov2":
        with pytest.raises(ValueError, match=r"unexpected: layers\.0\.scale1\.factor"):
            tiny("vit").load_tensors(read_weights(file).tensors)
    else:
        with pytest.raises(ValueError, match=r"missing: layers\.0\.scale1\.factor"):
            tiny("dinov2").load_tensors(read_weights(file).tensors)


@pytest.mark.parametrize(
    ("name", "model", "config"),
    [
        ("vit_base", "ViTModel", "ViTConfig"),
        ("mae_base", "ViTMAEModel", "ViTMAEConfig"),
        ("dinov2_small", "Dinov2Model", "Dinov2Config"),
        ("dinov2_base", "Dinov2Model", "Dinov2Config"),
    ],
)
def test_published_sizes(name, model, config):
    transformers = pytest.importorskip("transformers")
    options = {}
    if model == "ViTModel":
        options = {"add_pooling_layer": False}
    sizes = {"image_size": 518} if model == "Dinov2Model" else {}
    if name == "dinov2_small":
        sizes |= {"hidden_size": 384, "num_attention_heads": 6}
    with torch.device("meta"):
        peer = getattr(transformers, model)(getattr(transformers, config)(**sizes), **options)
        own = ENCODERS[name](3)
    count = sum(p.numel() for k, p in peer.named_parameters() if "mask_token" not in k)
    assert sum(p.numel() for p in own.parameters()) == count
    assert own.layers[0].attention.heads == peer.config.num_attention_heads
    assert (own.patch, own.norm.eps) == (peer.config.patch_size, peer.config.layer_norm_eps)


@pytest.mark.parametrize("name", ["vit_base", "mae_base", "dinov2_small", "dinov2_base"])
@pytest.mark.parametrize("size", [(64, 64), (256, 256), (300, 420)])
def test_preprocessing_is_the_published_one(name, size):
    pytest.importorskip("transformers")
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    # As the hub's preprocessor_config.json of each says.
    if name == "vit_base":
        processor = ViTImageProcessorPil()
    elif name == "mae_base":
        processor = ViTImageProcessorPil(**imagenet)
    else:
        processor = BitImageProcessorPil(
            size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, **imagenet
        )
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 9), size=size, mode="bicubic")[0]
    image = (smooth.clamp(0, 1) * 255).byte().movedim(0, 2)
    expected = processor(Image.fromarray(image.numpy()), return_tensors="np")["pixel_values"][0]
    with torch.device("meta"):
        network = ENCODERS[name](3)
    got = network.preprocess(image[None])[0]
    assert got.shape == (3, 224, 224)
    # Pillow rounds to whole bytes, once for rows and once for columns.
    byte = 1 / 255 / min(network.input_spec.std)
    np.testing.assert_allclose(got.numpy(), expected, atol=1.6 * byte)


@pytest.mark.parametrize("channels", [3, 1])
def test_small_one_gives_a_map_at_an_eighth_of_the_image(channels):
    network = make_encoder("vit_mini", channels, "random")
    assert network.output_shape(64, 64) == (96, 8, 8)
    assert network.output_shape(48, 80) == (96, 6, 10)


def test_forms_of_the_output_are_parts_of_one_another():
    torch.manual_seed(0)
    networks = {name: make_encoder(name, weights="random") for name in ("vit_mini", "vit_mini_tokens")}
    networks["vit_mini_cls"] = make_encoder("vit_mini_cls", weights="random")
    for network in networks.values():
        network.load_state_dict(networks["vit_mini"].state_dict())
    x = torch.randn(2, 3, 24, 40)
    seen = {name: network(x) for name, network in networks.items()}
    tokens = seen["vit_mini_tokens"]
    assert tokens.shape == (2, 16, 96)
    assert torch.equal(seen["vit_mini_cls"], tokens[:, 0])
    # Row by row: the second row of patches begins at the sixth patch.
    assert torch.equal(seen["vit_mini"][:, :, 1, 0], tokens[:, 1 + 5])


def test_images_that_patches_do_not_fill_are_refused():
    with pytest.raises(ValueError, match="50 x 70 pixels: vit_mini takes multiples"):
        make_encoder("vit_mini", weights="random").output_shape(50, 70)


def test_random_weights_are_drawn_anew_and_are_usable():
    torch.manual_seed(0)
    one, other = (make_encoder("vit_mini", weights="random") for _ in range(2))
    assert not torch.equal(one.positions, other.positions)
    assert 0.015 < float(one.positions.detach().std()) < 0.025
    assert float(one(torch.randn(2, 3, 64, 64)).detach().std()) > 0.5


def test_gradients_pass_through_a_network_whose_weights_are_frozen():
    network = tiny("dinov2").requires_grad_(False)
    x = network.stem(torch.randn(2, 3, 32, 32)).requires_grad_()
    y = x
    for block in network.blocks:
        y = block(y)
    network.neck(y).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().amax(dim=2).gt(0).all()


def test_compiles_to_the_same_function():
    network = tiny("dinov2", "map")
    network.initialise()
    x = torch.randn(2, 3, 24, 40)
    torch.testing.assert_close(torch.compile(network, backend="aot_eager")(x), network(x))


def test_computes_in_bfloat16_close_to_float32():
    network = tiny("dinov2", "map")
    network.initialise()
    x = torch.randn(2, 3, 32, 32)
    expected = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = network(x)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.float(), expected, atol=0.1, rtol=0.1)
