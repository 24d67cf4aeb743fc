"""Contexts, what they do to weights, and what tasks keep of them.

``tests/data/superposition.npz`` was recorded with the layers of side-tuning's authors
(github.com/jozhang97/side-tuning, commit dea34569, ``tlkit/models/superposition.py``): ``HashConv2d``, ReLU
and ``BinaryHashLinear``, with a period of 3 contexts and random weights. Only two imports that these classes
do not use were taken out. Their linear layer works with as many outputs as inputs only.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from policies.adaptation import Superposition, SuperpositionConfig
from policies.adaptation.superposition import bind, draw_context
from policies.encoders import Encoder, InputSpec, make_encoder

RECORDED = Path(__file__).parents[2] / "data" / "superposition.npz"


class Toy(Encoder):
    """The network of the recording."""

    def __init__(self):
        super().__init__(InputSpec())
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).flatten(1))


class Normalised(Encoder):
    """A convolution and batch normalisation."""

    def __init__(self):
        super().__init__(InputSpec())
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).mean(dim=(2, 3))


class Wide(Encoder):
    """One linear layer over many pixels."""

    def __init__(self):
        super().__init__(InputSpec())
        self.linear = nn.Linear(768, 4, bias=False)

    def forward(self, x):
        return self.linear(x.flatten(1))


def make(base=None, **options):
    torch.manual_seed(0)
    return Superposition(SuperpositionConfig(weights="random", **options), base or Toy())


@pytest.fixture
def image():
    return torch.rand(3, 8, 8, 3, generator=torch.Generator().manual_seed(0))


def test_outputs_and_gradients_are_those_of_the_authors_layers():
    with np.load(RECORDED) as archive:
        recorded = {name: torch.from_numpy(archive[name]) for name in archive.files}
    base = Toy()
    base.load_state_dict({name: recorded[name] for name in base.state_dict()})
    method = make(base)
    for time, task in enumerate(("task", "second", "third")):
        method.start_task(task)
        for layer in ("conv", "linear"):
            method.adapter.get_buffer(f"{layer}/weight").copy_(recorded[f"{layer}.context"][:, time])
        method.zero_grad()
        output = method(recorded["image"])
        torch.testing.assert_close(output, recorded[f"{time}.output"], rtol=1e-5, atol=1e-5)
        (output * recorded["target"]).sum().backward()
        for layer in ("conv", "linear"):
            weight = method.network.encoder.get_parameter(f"{layer}.weight")
            expected = recorded[f"{time}.{layer}.gradient"]
            torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encoder", ["fcn5_small", "resnet44"])
@pytest.mark.parametrize("context", ["binary", "rotation"])
def test_the_first_task_starts_as_the_base_exactly(encoder, context):
    torch.manual_seed(0)
    base = make_encoder(encoder, weights="random").eval()
    image = torch.rand(2, 64, 64, 3)
    assert torch.equal(make(base, context=context)(image), base(base.preprocess(image)))


@pytest.mark.parametrize("inputs", [2, 9, 27])
def test_a_rotation_is_an_orthogonal_matrix_of_pairs(inputs):
    context = draw_context("rotation", 0, 1, "layer", inputs)
    weight = torch.randn(5, inputs)
    rotation = torch.eye(inputs)
    for pair, (cosine, sine) in enumerate(context.tolist()):
        at = slice(2 * pair, 2 * pair + 2)
        rotation[at, at] = torch.tensor([[cosine, sine], [-sine, cosine]])
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(inputs))
    torch.testing.assert_close(bind(weight, context), weight @ rotation)
    # Turning the inputs back is the same as turning the weights.
    x = torch.randn(4, inputs)
    torch.testing.assert_close(x @ bind(weight, context).T, (x @ rotation.T) @ weight.T)


def test_a_binary_context_works_on_the_inputs_of_a_layer():
    method = make(Wide())
    method.start_task("second")
    image = torch.rand(3, 16, 16, 3)
    context = method.adapter.get_buffer("linear/weight")
    assert set(context.tolist()) == {-1.0, 1.0}
    encoder = method.network.encoder
    x = encoder.preprocess(image).flatten(1)
    torch.testing.assert_close(method(image), (x * context) @ encoder.linear.weight.T)


@pytest.mark.parametrize("kind", ["binary", "rotation"])
def test_contexts_are_random_in_every_layer_task_and_seed(kind):
    keys = [(0, 1, "a"), (0, 1, "b"), (0, 2, "a"), (1, 1, "a"), (1, 2, "a"), (11, 2, "a"), (1, 12, "a")]
    contexts = [draw_context(kind, seed, index, layer, 4096).flatten() for seed, index, layer in keys]
    bound = 4 / len(contexts[0]) ** 0.5
    for number, context in enumerate(contexts):
        assert context.mean().abs() < bound
        for other in contexts[:number]:
            assert (context * other).mean().abs() < bound


def test_contexts_are_drawn_from_a_hash_that_no_release_changes():
    # SHAKE-256 of "0 1 conv.weight" starts with the bits 1001 0000 0110.
    expected = [-1, 1, 1, -1, 1, 1, 1, 1, 1, -1, -1, 1]
    assert draw_context("binary", 0, 1, "conv.weight", 12).tolist() == expected
    stream = hashlib.shake_256(b"0 1 conv.weight").digest(8)
    angles = [2 * math.pi * int.from_bytes(stream[at : at + 4], "little") / 2**32 for at in (0, 4)]
    expected = [part(angle) for angle in angles for part in (math.cos, math.sin)]
    found = draw_context("rotation", 0, 1, "conv.weight", 4)
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_all_tasks_train_the_shared_weights(image):
    method = make()
    method.start_task("second")
    before = method.network.encoder.linear.weight.clone()
    first = method(image)
    optimizer = torch.optim.SGD(method.parameter_groups(0.0), lr=0.01)
    method(image).square().sum().backward()
    optimizer.step()
    assert not torch.equal(method.network.encoder.linear.weight, before)
    assert not torch.equal(method(image), first)
    assert method.tasks == ("task", "second")


def test_learning_one_task_disturbs_another_less_than_fine_tuning_does():
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(64, 16, 16, 3, generator=generator)
    # The same images mean other things in the second task.
    targets = torch.randn(2, 64, 4, generator=generator)

    def forgotten(second):
        method = make(Wide())
        for number, task in enumerate(("task", second)):
            method.start_task(task)
            optimizer = torch.optim.SGD(method.parameter_groups(0.0), lr=0.02)
            for _ in range(60):
                optimizer.zero_grad()
                (method(images) - targets[number]).square().mean(0).sum().backward()
                optimizer.step()
            assert (method(images) - targets[number]).square().mean() < 0.1
        method.start_task("task")
        return (method(images) - targets[0]).square().mean().item()

    assert forgotten("second") < 0.2 < 1.0 < forgotten("task")


@pytest.mark.parametrize("context", ["binary", "rotation"])
def test_a_delta_holds_the_seed_and_draws_the_same_contexts_again(context, image):
    method = make(context=context, context_seed=7)
    method.start_task("second")
    method.start_task("third")
    delta = method.delta()
    contexts = {name: value for name, value in delta.items() if name.startswith("adapters.")}
    assert {name: value.tolist() for name, value in contexts.items()} == {
        "adapters.task.key": [7, 0],
        "adapters.second.key": [7, 1],
        "adapters.third.key": [7, 2],
    }
    # Another seed and another order: what is stored counts.
    other = make(context=context)
    other.start_task("third")
    other.start_task("second")
    other.load_delta(delta)
    for task in method.tasks:
        method.start_task(task)
        other.start_task(task)
        assert torch.equal(other(image), method(image))


def test_a_saved_state_draws_the_same_contexts_again(image):
    method, other = make(context_seed=7), make()
    for one in (method, other):
        one.start_task("second")
    assert not torch.equal(other(image), method(image))
    other.load_state_dict(method.state_dict())
    assert torch.equal(other(image), method(image))


def test_a_task_may_have_normalisation_of_its_own(image):
    base = Normalised()
    method = make(base, normalisation="task").train()
    method.start_task("second")
    before = method.adapters["task"].normalisation.get_buffer("norm/running_mean").clone()
    shared = method.network.encoder.norm.running_mean.clone()
    method(image).square().sum().backward()
    own = method.adapter.normalisation
    assert not torch.equal(own.get_buffer("norm/running_mean"), shared)
    assert torch.equal(method.adapters["task"].normalisation.get_buffer("norm/running_mean"), before)
    assert torch.equal(method.network.encoder.norm.running_mean, shared)
    trained = {n for n, p in method.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in method.named_parameters() if p.requires_grad}
    assert trained == {
        "network.encoder.conv.weight",
        "network.encoder.conv.bias",
        "adapters.second.normalisation.norm/weight",
        "adapters.second.normalisation.norm/bias",
    }


def test_shared_normalisation_keeps_its_statistics(image):
    method = make(Normalised()).train()
    before = method.network.encoder.norm.running_mean.clone()
    method(image)
    assert torch.equal(method.network.encoder.norm.running_mean, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "complex"}, "context 'complex': expected one of binary, rotation"),
        ({"context_seed": -1}, "context_seed -1"),
        ({"normalisation": "own"}, "normalisation 'own'"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SuperpositionConfig(**options)
