"""Parameter superposition (Cheung et al., NeurIPS 2019, arXiv:1902.05522): many models in one set of weights.

Tasks share all weights W, and every task has a fixed random context c over the inputs of each convolution and
linear layer: the layer computes with W * c. What other tasks wrote into W appears to a task as noise that
their contexts scatter, so that learning one task disturbs the rest little.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from policies.adaptation.base import DEFAULT_TASK, Adaptation, AdaptationConfig, TrainableEncoder
from policies.adaptation.substitution import TaskNormalisation, call_with, dotted, layer_weights, slot
from policies.encoders import Encoder

ContextKind = Literal["binary", "rotation"]
Normalisation = Literal["shared", "task"]


@dataclass(frozen=True)
class SuperpositionConfig(AdaptationConfig):
    """Settings of parameter superposition."""

    context: ContextKind = "binary"
    """What a task's context does to a layer's inputs: turns signs at random, or rotates pairs of inputs by
    random angles, which is the paper's complex context on real numbers."""
    context_seed: int = 0
    """Seed of the contexts."""
    normalisation: Normalisation = "shared"
    """Whether tasks share the normalisation layers, with BatchNorm's pre-trained statistics, or each has its
    own scale, shift and running statistics. The statistics fit the pre-trained weights, hence the first task
    only: with several tasks and BatchNorm choose "task". In training mode it normalises by the batch, so with
    PPO the network that learns would differ from the one that acted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.context_seed < 2**63:
            raise ValueError(f"context_seed {self.context_seed}: expected 0..2^63 - 1")


def bind(weight: Tensor, context: Tensor) -> Tensor:
    """A layer's weights as one task sees them.

    Args:
        weight: (outputs, ...), the rest holding n inputs.
        context: (n,) factors, or (n // 2, 2) cosines and sines of the angles of neighbouring inputs; a last
            input without neighbour is left as it is.

    Returns:
        Of the weight's shape.
    """
    flat = weight.flatten(1)
    if context.dim() == 1:
        return (flat * context).view_as(weight)
    paired = 2 * len(context)
    first, second = flat[:, :paired].unflatten(1, (-1, 2)).unbind(2)
    cosine, sine = context.unbind(1)
    turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=2)
    return torch.cat([turned.flatten(1), flat[:, paired:]], dim=1).view_as(weight)


def draw_context(kind: ContextKind, seed: int, index: int, layer: str, inputs: int) -> Tensor:
    """One task's context for one layer, see :func:`bind`; that of task 0 changes nothing.

    Drawn from a hash, so that a stored seed gives the same context in every release and on every machine.

    Args:
        kind: "binary" for factors 1 and -1, "rotation" for uniform angles.
        seed: which family of contexts.
        index: number of the task.
        layer: name of the layer.
        inputs: inputs of one output.
    """
    numbers = inputs if kind == "binary" else inputs // 2
    if index == 0:
        return torch.ones(numbers) if kind == "binary" else torch.tensor([[1.0, 0.0]]).repeat(numbers, 1)
    source = hashlib.shake_256(f"{seed} {index} {layer}".encode())
    if kind == "binary":
        bits = np.unpackbits(np.frombuffer(source.digest(-(-numbers // 8)), np.uint8))[:numbers]
        return torch.from_numpy(1.0 - 2.0 * bits.astype(np.float32))
    turns = np.frombuffer(source.digest(4 * numbers), "<u4") / 2.0**32
    angles = torch.from_numpy(2 * math.pi * turns)
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


class ContextAdapter(nn.Module):
    """What one task has to itself: contexts, stored as the seed and the number they are drawn from."""

    key: Tensor
    """Seed and number of the task: (2,) int64."""

    def __init__(self, config: SuperpositionConfig, encoder: Encoder, index: int) -> None:
        super().__init__()
        self._kind = config.context
        weights = layer_weights(encoder, "superposition")
        for name in weights:
            layer = encoder.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, nn.modules.conv._ConvTransposeNd):
                raise ValueError(
                    f"superposition: layer {name.rpartition('.')[0]!r} of encoder {encoder.name!r} is a "
                    "transposed convolution, whose weight holds inputs before outputs; expected convolutions "
                    "and linear layers"
                )
        self._inputs = {slot(name): weight[0].numel() for name, weight in weights.items()}
        self.register_buffer("key", torch.tensor([config.context_seed, index]))
        self._draw(config.context_seed, index)
        self.normalisation = (
            TaskNormalisation(encoder, statistics=True) if config.normalisation == "task" else None
        )

    def bound(self, encoder: Encoder) -> dict[str, Tensor]:
        """The encoder's weights as the task sees them, by dotted name."""
        return {
            dotted(name): bind(encoder.get_parameter(dotted(name)), self.get_buffer(name))
            for name in self._inputs
        }

    def _draw(self, seed: int, index: int) -> None:
        for name, inputs in self._inputs.items():
            context = draw_context(self._kind, seed, index, dotted(name), inputs)
            self.register_buffer(name, context.to(self.key.device), persistent=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._draw(*self.key.tolist())


class Superposition(Adaptation):
    """One network that all tasks train, each through its own contexts.

    The context of the first task changes nothing, so that it starts as the pre-trained encoder. Later tasks
    start as that network seen through random contexts, and so from what is all but random features.
    """

    config_class: ClassVar[type[AdaptationConfig]] = SuperpositionConfig
    recomputed: ClassVar[str] = "all of its encoder learns"
    config: SuperpositionConfig

    def __init__(self, config: SuperpositionConfig, base: Encoder | None = None) -> None:
        super().__init__(config)
        self.network = TrainableEncoder(config.make_encoder() if base is None else copy.deepcopy(base))
        self.start_task(DEFAULT_TASK)
        adapter = self._adapter
        if adapter.normalisation is not None:
            # Tasks start from the shared normalisation layers but never train them.
            for name in dict(adapter.normalisation.named_parameters()):
                self.network.encoder.get_parameter(dotted(name)).requires_grad_(False)

    def make_adapter(self) -> ContextAdapter:
        """The contexts of the next task."""
        return ContextAdapter(self.config, self.network.encoder, len(self.adapters))

    def forward(self, image: Tensor, base_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """Features of the network that the task's contexts select, see :meth:`Adaptation.forward`."""
        encoder, adapter = self.network.encoder, self._adapter
        return call_with(encoder, image, adapter.bound(encoder), adapter.normalisation)

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the encoder's features."""
        return self.network.encoder.output_shape(height, width)

    @property
    def _adapter(self) -> ContextAdapter:
        adapter = self.adapter
        assert isinstance(adapter, ContextAdapter)
        return adapter
