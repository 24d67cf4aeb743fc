"""Progressive neural networks (Rusu et al., 2016, arXiv:1606.04671): a column a task, tied to all before.

The first column is the frozen base. Each task adds a column of the base's design, and frozen columns lend it
what they know through lateral connections U (equation 1 of the paper):

    h_i^(k) = f(W_i^(k) h_{i-1}^(k) + sum over j < k of U_i^(k:j) h_{i-1}^(j))

Here a layer is a block of the encoder, so that the sum is taken at its input, shortcut included:
h_i^(k) = block_i^(k)(h_{i-1}^(k) + sum over j < k of U_i^(k:j) h_{i-1}^(j)). The stem gives h_0, and the neck
takes lateral connections as the blocks do. Nothing is forgotten, and everything learned is there to be used;
the price is a column a task, and connections that grow with the square of their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.adaptation.base import (
    DEFAULT_TASK,
    Adaptation,
    AdaptationConfig,
    FrozenEncoder,
    TrainableEncoder,
    as_blocks,
)
from policies.adaptation.copies import parameter_names, trainable_copy
from policies.adaptation.layout import feature_channels, pointwise, probe_image
from policies.encoders import BlockEncoder, Encoder


@dataclass(frozen=True)
class ProgressiveConfig(AdaptationConfig):
    """Settings of progressive neural networks."""

    column_init: Literal["random", "copy"] = "random"
    """How a column starts: with random weights and connections, as in the paper, or as a copy of the base
    with connections of weight 0, hence with the base's output. BatchNorm in a random column learns its
    statistics from the batches: in PPO the network that learns would differ from the one that acted."""
    lateral: Literal["linear", "nonlinear"] = "linear"
    """Connections by one linear layer for each earlier column (the paper's equation 1), or by its adapters
    (equation 2): they join all earlier columns, reduce them to the channels of one, and have two layers."""
    store_taps: bool = False
    """Whether what the base's blocks give is stored with rollouts, so that passes of learning spare the base,
    a quarter of their work. It is many times the image: 90 kB for 64 x 64 pixels, 12 kB, in resnet_small."""


class LinearLateral(nn.Module):
    """Connections into one block: the sum over earlier columns j of U_j h_j.

    Args:
        columns: number of earlier columns.
        shape: of one image's h, tokens (T, D) or a map (C, h, w).
    """

    def __init__(self, columns: int, shape: torch.Size) -> None:
        super().__init__()
        channels = feature_channels(shape)
        # Without a bias, here and below, since the block that follows has its own.
        self.u = nn.ModuleList(pointwise(shape, channels, channels, bias=False) for _ in range(columns))

    def forward(self, earlier: Sequence[Tensor]) -> Tensor:
        """Of what each earlier column gave at this depth, what is added to this one's, of the same shape."""
        return torch.stack([u(h) for u, h in zip(self.u, earlier, strict=True)]).sum(0)

    def silence(self) -> None:
        """Sets the last weights to 0."""
        for u in self.u:
            nn.init.zeros_(u.weight)  # type: ignore[arg-type]


class NonlinearLateral(nn.Module):
    """Connections into one block by an adapter: U f(V [alpha_1 h_1, alpha_2 h_2, ...]), f being ReLU.

    V joins the earlier columns and reduces them to the channels of one. The learned scalars alpha make up for
    different scales, and start small. Arguments are those of :class:`LinearLateral`.
    """

    def __init__(self, columns: int, shape: torch.Size) -> None:
        super().__init__()
        channels = feature_channels(shape)
        self.alpha = nn.Parameter(torch.empty(columns).uniform_(0.01, 0.1))
        self.v = pointwise(shape, columns * channels, channels, bias=False)
        self.u = pointwise(shape, channels, channels, bias=False)
        self._channel_dim = -1 if len(shape) == 2 else 1

    def forward(self, earlier: Sequence[Tensor]) -> Tensor:
        """Of what each earlier column gave at this depth, what is added to this one's, of the same shape."""
        scaled = [alpha * h for alpha, h in zip(self.alpha, earlier, strict=True)]
        return self.u(F.relu(self.v(torch.cat(scaled, dim=self._channel_dim))))

    def silence(self) -> None:
        """Sets the last weights to 0."""
        nn.init.zeros_(self.u.weight)


class Column(nn.Module):
    """What one task trains: a network of the base's design, and connections from all earlier columns.

    Args:
        network: the column itself.
        laterals: connections into each block and the neck.
    """

    def __init__(self, network: TrainableEncoder, laterals: Sequence[nn.Module]) -> None:
        super().__init__()
        self.network = network
        self.laterals = nn.ModuleList(laterals)

    def taps(self, pixels: Tensor, earlier: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """What stem and blocks give, as later columns take it.

        Args:
            pixels: preprocessed images (N, C, H, W).
            earlier: what stem and blocks of each earlier column gave.
        """
        encoder = self._encoder
        found = [encoder.stem(pixels)]
        for depth, block in enumerate(encoder.blocks):
            found.append(block(self._joined(depth, found, earlier)))
        return found

    def forward(self, pixels: Tensor, earlier: Sequence[Sequence[Tensor]]) -> Tensor:
        """Features of preprocessed images, see :meth:`taps`."""
        found = self.taps(pixels, earlier)
        return self._encoder.neck(self._joined(len(found) - 1, found, earlier))

    def _joined(self, depth: int, own: Sequence[Tensor], earlier: Sequence[Sequence[Tensor]]) -> Tensor:
        return own[depth] + self.laterals[depth]([taps[depth] for taps in earlier])

    @property
    def _encoder(self) -> BlockEncoder:
        return as_blocks(self.network.encoder, "a progressive network")


class Progressive(Adaptation):
    """A frozen base and a column for each task beside it, all earlier ones frozen.

    A task's column is fed by those of the tasks begun before it, so the order of tasks is part of the method.
    Going back to an earlier task computes it as it was learned; training it further would change what later
    columns build on.

    BatchNorm layers of a copied column keep their statistics, and those of a random one learn their own, as
    in training from scratch; columns of earlier tasks are in evaluation mode.
    """

    config_class: ClassVar[type[AdaptationConfig]] = ProgressiveConfig
    recomputed: ClassVar[str] = "store_taps is off"
    config: ProgressiveConfig

    def __init__(self, config: ProgressiveConfig, base: Encoder | None = None) -> None:
        super().__init__(config)
        encoder = as_blocks(base or config.make_encoder(), "a progressive network")
        self._learned = parameter_names(encoder)
        self.base = FrozenEncoder(encoder)
        taps = self._base_taps(encoder.preprocess(probe_image(encoder)))
        self._joints = [tap.shape[1:] for tap in taps]
        self.start_task(DEFAULT_TASK)

    def make_adapter(self) -> Column:
        """A column in its initial state, with connections from the base and all tasks begun before."""
        network = trainable_copy(self._frozen, self._learned)
        copied = self.config.column_init == "copy"
        if not copied:
            network.initialise()
        kind = LinearLateral if self.config.lateral == "linear" else NonlinearLateral
        laterals = [kind(1 + len(self.adapters), joint) for joint in self._joints]
        if copied:
            for lateral in laterals:
                lateral.silence()
        return Column(TrainableEncoder(network, keep_statistics=copied), laterals)

    def start_task(self, task: str) -> None:
        """Begins a column, or goes back to one, see :meth:`Adaptation.start_task`."""
        super().start_task(task)
        self.train(self.training)

    def train(self, mode: bool = True) -> Progressive:
        """Sets the mode of the current task's column; the others stay in evaluation mode."""
        super().train(mode)
        for task, column in self.adapters.items():
            column.train(mode and task == self.task)
        return self

    def forward(self, image: Tensor, base_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """Features of the current task's column, see :meth:`Adaptation.forward`."""
        pixels = self._frozen.preprocess(image)
        if base_features is None:
            earlier = [self._base_taps(pixels)]
        else:
            earlier = [[base_features[f"tap{depth}"] for depth in range(len(self._joints))]]
        with torch.no_grad():
            for task in self.tasks[: self.tasks.index(self.task)]:
                earlier.append(self._column(task).taps(pixels, earlier))
        return self._column(self.task)(pixels, earlier)

    def base_features(self, image: Tensor) -> dict[str, Tensor]:
        """With ``store_taps``, what the base's stem ("tap0") and blocks ("tap1", ...) give."""
        if not self.config.store_taps:
            return {}
        pixels = self._frozen.preprocess(image)
        return {f"tap{depth}": tap.float() for depth, tap in enumerate(self._base_taps(pixels))}

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the base's features, which columns share."""
        return self.base.encoder.output_shape(height, width)

    @property
    def _frozen(self) -> BlockEncoder:
        return as_blocks(self.base.encoder, "a progressive network")

    def _column(self, task: str) -> Column:
        column = self.adapters[task]
        assert isinstance(column, Column)
        return column

    @torch.no_grad()
    def _base_taps(self, pixels: Tensor) -> list[Tensor]:
        encoder = self._frozen
        found = [encoder.stem(pixels)]
        for block in encoder.blocks:
            found.append(block(found[-1]))
        return found
