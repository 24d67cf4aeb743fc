"""LoRA: updates merged by hand and by PEFT, what is stored, and what layers a target means."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from policies.adaptation import LoRAConfig, make_adaptation
from policies.encoders import make_encoder, wrap_encoder

ENCODERS = ["vit_mini_tokens", "resnet_small", "resnet44", "fcn5_small"]


def images(number=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, 64, 64, 3), dtype=torch.uint8, generator=generator)


def make(encoder, **options):
    torch.manual_seed(0)
    base = make_encoder(encoder, weights="random")
    return make_adaptation("lora", base, encoder=encoder, **{"rank": 3, **options}), base.eval()


def learned(method, seed=1):
    """The method with updates that are no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in method.trainable_parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return method


def matrices(method):
    """A and B by the name of the layer they adapt."""
    delta = {name.removeprefix("adapters.task.network."): value for name, value in method.delta().items()}
    names = [name.removesuffix(".lora_A.lora.weight") for name in delta if ".lora_A." in name]
    return {
        name: (delta[f"{name}.lora_A.lora.weight"], delta[f"{name}.lora_B.lora.weight"]) for name in names
    }


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(
    ("options", "scale"), [({"alpha": 6.0}, 2.0), ({"alpha": 6.0, "rslora": True}, 6 / 3**0.5)]
)
def test_the_output_is_that_of_weights_merged_by_hand(encoder, options, scale):
    method, base = make(encoder, **options)
    learned(method).eval()
    merged = copy.deepcopy(base)
    pairs = matrices(method)
    layers = [n for n, m in base.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert set(pairs) == set(layers)
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            # A convolution's B is 1x1: behind A it mixes A's channels.
            update = torch.einsum("or,ri...->oi...", b.flatten(1), a)
            merged.get_submodule(name).weight += scale * update
        expected = merged(merged.preprocess(images()))
        plain = base(base.preprocess(images()))
    found = method(images())
    assert (found - plain).abs().mean() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_the_output_is_that_of_peft_around_a_trainable_encoder():
    from peft import LoraConfig, get_peft_model

    method, base = make("vit_mini_tokens", target="query,value", alpha=5.0)
    learned(method).eval()
    settings = LoraConfig(r=3, lora_alpha=5, target_modules=["query", "value"])
    peer = get_peft_model(nn.Sequential(base), settings).eval()
    own = dict(peer.named_parameters())
    with torch.no_grad():
        for name, pair in matrices(method).items():
            for letter, value in zip("AB", pair, strict=True):
                own[f"base_model.model.0.{name}.lora_{letter}.default.weight"].copy_(value)
        pixels = method.base.encoder.preprocess(images())
        torch.testing.assert_close(method(images()), peer(pixels), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_before_it_learns_the_output_is_the_base_s_exactly(encoder):
    method, base = make(encoder)
    with torch.no_grad():
        assert torch.equal(method(images()), base(base.preprocess(images())))
    for a, b in matrices(method).values():
        assert a.abs().sum() > 0
        assert not b.any()


def test_only_the_matrices_are_stored():
    method, base = make("vit_mini_tokens", target="attention")
    delta = method.delta()
    assert sum(value.numel() for value in delta.values()) == 6 * 4 * 3 * (96 + 96)
    assert all(".lora_A." in name or ".lora_B." in name for name in delta)
    assert set(delta) == {name for name, _ in method.named_parameters()}
    state = {k.removeprefix("base.encoder.") for k in method.state_dict() if k.startswith("base.")}
    assert state == set(base.state_dict())


def test_frozen_weights_exist_once_whatever_the_number_of_tasks():
    method, _ = make("resnet_small")
    before = sum(value.nbytes for value in method.buffers())
    method.start_task("second")
    method.start_task("third")
    assert sum(value.nbytes for value in method.buffers()) == before
    assert before == sum(value.nbytes for value in method.base.buffers())


def test_a_base_that_is_loaded_later_is_the_base_that_is_computed():
    method, _ = make("resnet_small")
    other, _ = make("resnet_small")
    with torch.no_grad():
        for value in other.base.buffers():
            value.mul_(1.1)
    learned(other)
    method.load_state_dict(other.state_dict())
    assert torch.equal(method.eval()(images()), other.eval()(images()))


def test_tasks_are_apart_and_the_first_one_stays():
    method, _ = make("vit_mini_tokens")
    learned(method).eval()
    first = method(images())
    method.start_task("second")
    assert torch.equal(method(images()), method.base(images()))
    method(images()).square().sum().backward()
    assert not any(p.requires_grad or p.grad is not None for p in method.adapters["task"].parameters())
    learned(method, seed=2)
    assert not torch.allclose(method(images()), first)
    method.start_task("task")
    assert torch.equal(method(images()), first)


def test_dropout_follows_the_mode_and_the_network_around_it_does_not():
    method, _ = make("resnet44", dropout=0.5)
    learned(method)
    torch.manual_seed(0)
    method.train()
    drops = [module for module in method.modules() if isinstance(module, nn.Dropout)]
    assert len(drops) == 43
    assert all(module.training for module in drops)
    assert not any(m.training for m in method.modules() if isinstance(m, nn.BatchNorm2d))
    assert not torch.equal(method(images()), method(images()))
    nn.Sequential(method).eval()
    assert not any(module.training for module in drops)
    assert torch.equal(method(images()), method(images()))


def test_dropout_takes_from_the_input_of_a():
    method, base = make("vit_mini_tokens", target="layers.5.mlp.fc2", dropout=0.5, alpha=3.0)
    learned(method).train()
    adapted = method.adapter.network.layers[5].mlp.fc2
    x = torch.ones(1, 384)
    frozen = base.layers[5].mlp.fc2
    adapted.base_layer.weight, adapted.base_layer.bias = frozen.weight, frozen.bias
    torch.manual_seed(3)
    found = adapted(x) - frozen(x)
    torch.manual_seed(3)
    (a, b) = matrices(method)["layers.5.mlp.fc2"]
    dropped = F.dropout(x, 0.5)
    assert 0.3 < (dropped == 0).float().mean() < 0.7
    torch.testing.assert_close(found, dropped @ a.T @ b.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("attention", {"query", "key", "value", "out"}),
        ("linear", {"query", "key", "value", "out", "fc1", "fc2"}),
        ("conv", {"patches"}),
        ("all", {"query", "key", "value", "out", "fc1", "fc2", "patches"}),
        ("fc1, patches", {"fc1", "patches"}),
        ("attention.query", {"query"}),
    ],
)
def test_a_target_means_layers(target, expected):
    encoder = make_encoder("vit_mini", weights="random")
    found = LoRAConfig(target=target).layers(encoder)
    assert {name.rpartition(".")[2] for name in found} == expected
    everywhere = sum(1 for name, _ in encoder.named_modules() if name.rpartition(".")[2] in expected)
    assert len(found) == len(set(found)) == everywhere
    method, _ = make("vit_mini", target=target)
    assert set(matrices(method)) == set(found)


def test_targets_that_the_encoder_lacks_are_refused():
    encoder = make_encoder("resnet_small", weights="random")
    with pytest.raises(
        ValueError, match="'attention': encoder 'resnet_small' has no such layers; it has 'conv'"
    ):
        LoRAConfig(target="attention").layers(encoder)
    with pytest.raises(ValueError, match=r"target 'conv3': expected one of attention.*did you mean 'conv'"):
        LoRAConfig(target="conv1,conv3").layers(encoder)
    with pytest.raises(ValueError, match="did you mean 'attention'"):
        LoRAConfig(target="atention").layers(encoder)


class TorchTransformer(nn.Module):
    """Patches, and a transformer of torch's own."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(self.patches(x).flatten(2).mT)


@pytest.mark.parametrize("target", ["all", "linear", "linear1,linear2", "conv"])
def test_torch_s_own_transformer_acts_by_what_was_learned(target):
    torch.manual_seed(0)
    method = make_adaptation("lora", wrap_encoder(TorchTransformer(), (None, 8)), target=target).eval()
    image = torch.rand(2, 16, 16, 3)
    with torch.no_grad():
        before = method(image)
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        acting = method(image)
    assert not torch.allclose(acting, before, atol=1e-2)
    learning = method(image)
    torch.testing.assert_close(learning.detach(), acting, rtol=1e-4, atol=1e-4)
    learning.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.parameters())


def test_layers_that_torch_s_own_attention_never_calls_are_no_target():
    with pytest.raises(ValueError, match="lora target 'out_proj': expected one of"):
        make_adaptation("lora", wrap_encoder(TorchTransformer(), (None, 8)), target="out_proj")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank 0: expected 1 or more"),
        ({"alpha": 0.0}, "alpha 0.0: expected more than 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**options)


def test_peft_is_imported_by_those_who_use_it():
    program = (
        "import sys, policies.adaptation; sys.exit('peft' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
