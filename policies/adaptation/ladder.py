"""Ladder side-tuning (Sung, Cho, Bansal, NeurIPS 2022, arXiv:2206.06522): a narrow network climbs the base.

Beside a frozen network runs a side network of blocks 1/r as wide. Block i takes what the one before it gave
and a tap of the base, blended by a learned gate:

    h_i = S_i(mu_i W_i f_i + (1 - mu_i) h_(i-1)),    mu_i = sigmoid(a_i / T),    h_0 = W_0 f_0

where f_i is what block i of the base gives and f_0 what its stem gives. A normalisation and a linear layer
bring the last h to the shape of the base's features. No gradient enters the base.

In the authors' code the gate weighs the side network, so their a is this module's -a.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.adaptation.base import (
    BASE,
    DEFAULT_TASK,
    Adaptation,
    AdaptationConfig,
    FrozenEncoder,
    as_blocks,
)
from policies.adaptation.layout import feature_channels, pointwise, probe_image
from policies.encoders import BlockEncoder, Encoder

_HEAD = 64
"""Channels of an attention head in usual transformers."""


@dataclass(frozen=True)
class LadderConfig(AdaptationConfig):
    """Settings of ladder side-tuning."""

    reduction: int = 8
    """How many times narrower than the base the side network is, r."""
    every: int = 3
    """A tap and a side block for every n-th block of the base, counted back from the last; 1 is the full
    ladder, and 4 the shortest in the paper ("layer dropping", 3 of 12). Stored taps shrink with it."""
    gate_temperature: float = 0.1
    """Temperature T of the gates; the lower, the faster they learn."""
    gate_init: float = 0.0
    """Where gates' a starts; 0 blends half and half, and more weighs the base more."""
    side_init: Literal["random", "pruned"] = "random"
    """How side blocks start: random, or as the largest rows and columns of the base's weights (the paper's
    structural initialisation, for transformers)."""
    output: Literal["side", "blend", "add"] = "side"
    """What the features are: the side network's alone, as in the paper; its blend with the base's by one more
    gate; or the base's plus the side network's, which start at 0."""
    store_taps: bool = True
    """Whether taps are stored with rollouts. They are larger than the features; where memory is short, the
    base can be computed anew in every pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reduction", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"ladder {name} {getattr(self, name)}: expected 1 or more")
        if not self.gate_temperature > 0:
            raise ValueError(f"ladder gate_temperature {self.gate_temperature}: expected more than 0")


class Gate(nn.Module):
    """Blends two tensors of one shape: mu x + (1 - mu) y with mu = sigmoid(a / T)."""

    def __init__(self, start: float, temperature: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(float(start)))
        self.temperature = temperature

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The blend."""
        mu = torch.sigmoid(self.a / self.temperature)
        return mu * x + (1 - mu) * y


class SideTransformerBlock(nn.Module):
    """Self-attention and a perceptron, each after a normalisation and around a shortcut: tokens (N, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        # Attention is blind to what is added to all keys.
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, D) of tokens (N, T, D)."""
        y = self.norm1(x)
        q, k, v = (
            linear(y).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class SideResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after a normalisation and ReLU, around a shortcut: maps (N, C, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(1, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(1, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, h, w) of maps (N, C, h, w)."""
        y = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(y)))


class Rung(nn.Module):
    """One step of the ladder: a tap, brought to the side network's width and blended in, and a side block.

    Args:
        config: the method's settings.
        tap: shape of the tap without the batch: (T, D) or (C, h, w).
        before: the side network's width below this rung.
    """

    def __init__(self, config: LadderConfig, tap: torch.Size, before: int) -> None:
        super().__init__()
        channels = feature_channels(tap)
        width = side_width(tap, config.reduction)
        self.down = pointwise(tap, channels, width)
        self.carry = pointwise(tap, before, width) if before != width else nn.Identity()
        self.gate = Gate(config.gate_init, config.gate_temperature)
        self.block: nn.Module
        if len(tap) == 2:
            # As many heads as the base has, as in the authors' code; where they do not divide it, fewer.
            self.block = SideTransformerBlock(width, math.gcd(width, max(1, channels // _HEAD)))
        else:
            self.block = SideResidualBlock(width)

    def forward(self, h: Tensor, tap: Tensor) -> Tensor:
        """Side features above this rung of those below it, in the rows and columns of the tap."""
        if tap.dim() == 4 and h.shape[2:] != tap.shape[2:]:
            h = F.adaptive_avg_pool2d(h, (tap.shape[2], tap.shape[3]))
        return self.block(self.gate(self.down(tap), self.carry(h)))


class LadderSide(nn.Module):
    """What ladder side-tuning trains for one task: the side network with its gates.

    Args:
        config: the method's settings.
        taps: shapes of the taps without the batch, the stem's first.
        features: shape of the base's features without the batch.
    """

    def __init__(self, config: LadderConfig, taps: Sequence[torch.Size], features: torch.Size) -> None:
        super().__init__()
        self.output = config.output
        widths = [side_width(tap, config.reduction) for tap in taps]
        self.first = pointwise(taps[0], feature_channels(taps[0]), widths[0])
        self.rungs = nn.ModuleList(
            Rung(config, tap, before) for tap, before in zip(taps[1:], widths, strict=False)
        )
        self.norm = nn.LayerNorm(widths[-1]) if len(taps[-1]) == 2 else nn.GroupNorm(1, widths[-1])
        self.up = nn.Linear(widths[-1], feature_channels(features))
        if config.output == "add":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        self.merge = Gate(config.gate_init, config.gate_temperature) if config.output == "blend" else None

    def forward(self, taps: Sequence[Tensor], features: Tensor) -> Tensor:
        """Features of the shape of the base's, of taps (N, T, D) or (N, C, h, w) and the base's features."""
        h = self.first(taps[0])
        for rung, tap in zip(self.rungs, taps[1:], strict=True):
            h = rung(h, tap)
        side = self._shaped(self.norm(h), features)
        if self.merge is not None:
            return self.merge(features, side)
        return features + side if self.output == "add" else side

    def _shaped(self, h: Tensor, features: Tensor) -> Tensor:
        """The up-projection, in the arrangement of the features."""
        if features.dim() == 2:
            return self.up(h.mean(1) if h.dim() == 3 else h.mean((2, 3)))
        if h.dim() == 3:
            # Class tokens stand before patches; where features lack them, so do these.
            places = features.shape[1] if features.dim() == 3 else features.shape[2:].numel()
            tokens = self.up(h[:, h.shape[1] - places :])
            return tokens if features.dim() == 3 else tokens.mT.unflatten(2, features.shape[2:])
        if h.shape[2:] != features.shape[2:]:
            h = F.adaptive_avg_pool2d(h, (features.shape[2], features.shape[3]))
        return self.up(h.movedim(1, 3)).movedim(3, 1)


class Ladder(Adaptation):
    """A frozen base and a narrow side network that takes a tap from its blocks."""

    config_class: ClassVar[type[AdaptationConfig]] = LadderConfig
    recomputed: ClassVar[str] = "store_taps is off"
    config: LadderConfig

    def __init__(self, config: LadderConfig, base: Encoder | None = None) -> None:
        super().__init__(config)
        self.base = FrozenEncoder(base or config.make_encoder())
        self.tapped = tuple(range(len(self._encoder.blocks) - 1, -1, -config.every))[::-1]
        """Numbers of the base's blocks that have a tap, from 0."""
        found = self._climb(probe_image(self._encoder))
        self._shapes = {name: value.shape[1:] for name, value in found.items()}
        self.start_task(DEFAULT_TASK)

    def make_adapter(self) -> LadderSide:
        """A side network in its initial state."""
        *taps, features = self._shapes.values()
        side = LadderSide(self.config, taps, features)
        if self.config.side_init == "pruned":
            self._prune(side)
        return side

    def forward(self, image: Tensor, base_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """The side network's features, see :meth:`Adaptation.forward`."""
        found = self._climb(image) if base_features is None else base_features
        return self.adapter([found[name] for name in self._shapes if name != BASE], found[BASE])

    def base_features(self, image: Tensor) -> dict[str, Tensor]:
        """The base's features, and its taps: "tap0" of the stem and "tapI" of block I, from 1."""
        return self._climb(image) if self.config.store_taps else {}

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the base's features."""
        return self._encoder.output_shape(height, width)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The side network, and its gates apart: weight decay would only pull them to the middle."""
        gates = [m.a for m in self.adapter.modules() if isinstance(m, Gate)]
        ids = {id(a) for a in gates}
        rest = [p for p in self.adapter.parameters() if id(p) not in ids]
        return [{"params": rest, "weight_decay": weight_decay}, {"params": gates, "weight_decay": 0.0}]

    @property
    def _encoder(self) -> BlockEncoder:
        return as_blocks(self.base.encoder, "a ladder")

    @torch.no_grad()
    def _climb(self, image: Tensor) -> dict[str, Tensor]:
        """Taps in the order of the blocks, then the features, of the frozen base; float32, by name."""
        encoder = self._encoder
        x = encoder.stem(encoder.preprocess(image))
        found = {"tap0": x.float()}
        for number, block in enumerate(encoder.blocks):
            x = block(x)
            if number in self.tapped:
                found[f"tap{number + 1}"] = x.float()
        found[BASE] = encoder.neck(x).float()
        return found

    def _prune(self, side: LadderSide) -> None:
        """Starts the side blocks from the base's."""
        pruned = pruned_blocks(self._encoder, self.config.reduction)
        for rung, number in zip(side.rungs, self.tapped, strict=True):
            assert isinstance(rung, Rung)
            rung.block.load_state_dict(pruned[number])


def side_width(tap: torch.Size, reduction: int) -> int:
    """Width of the side network at a tap."""
    return max(1, feature_channels(tap) // reduction)


def pruned_blocks(
    encoder: BlockEncoder, reduction: int, columns: Tensor | None = None
) -> list[dict[str, Tensor]]:
    """States of one :class:`SideTransformerBlock` for every block of a transformer.

    Layer after layer, a weight keeps the columns that are the kept rows of the layer before it, and 1/r of
    its rows, those with the largest L1 norm; query, key and value keep the same rows, by the norm of their
    elementwise product. This is the authors' structural pruning with magnitudes for importance (their Fisher
    information needs labels). It passes over shortcuts and heads, as theirs does.

    Args:
        encoder: the base; blocks have six linear layers (query, key, value, projection and two of the
            perceptron, in this order) and two normalisations.
        reduction: r.
        columns: numbers of the channels kept of what the first block takes; None chooses them by the norm of
            the first query, key and value.

    Raises:
        ValueError: if a block has other layers.
    """
    states = []
    for number, block in enumerate(encoder.blocks):
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        norms = [module for module in block.modules() if isinstance(module, nn.LayerNorm)]
        if len(linears) != 6 or len(norms) != 2:
            raise ValueError(
                f"side_init 'pruned': block {number} of encoder {encoder.name!r} has {len(linears)} linear "
                f"layers and {len(norms)} normalisations; expected a transformer's 6 and 2, use 'random'"
            )
        query, key, value, out, expand, contract = linears
        if columns is None:
            columns = _largest(query.weight * key.weight * value.weight, reduction, dim=1)
        state: dict[str, Tensor] = {}
        _keep(state, {"norm1": norms[0]}, columns, reduction)
        columns = _keep(state, {"query": query, "key": key, "value": value}, columns, reduction)
        del state["key.bias"]
        columns = _keep(state, {"out": out}, columns, reduction)
        _keep(state, {"norm2": norms[1]}, columns, reduction)
        columns = _keep(state, {"expand": expand}, columns, reduction)
        columns = _keep(state, {"contract": contract}, columns, reduction)
        states.append(state)
    return states


def _keep(
    state: dict[str, Tensor], layers: Mapping[str, nn.Module], columns: Tensor, reduction: int
) -> Tensor:
    """Adds the pruned layers to a state; the rows they keep."""
    tensors = {name: dict(layer.state_dict()) for name, layer in layers.items()}
    rows = columns
    if all(isinstance(layer, nn.Linear) for layer in layers.values()):
        for own in tensors.values():
            own["weight"] = own["weight"][:, columns]
        rows = _largest(torch.stack([own["weight"] for own in tensors.values()]).prod(0), reduction, dim=0)
    for name, own in tensors.items():
        state[f"{name}.weight"] = own["weight"][rows]
        state[f"{name}.bias"] = own["bias"][rows] if "bias" in own else own["weight"].new_zeros(len(rows))
    return rows


def _largest(weight: Tensor, reduction: int, dim: int) -> Tensor:
    """Numbers, rising, of the 1/r rows (``dim`` 0) or columns (1) of a weight with the largest L1 norm."""
    norms = weight.abs().sum(1 - dim)
    return norms.topk(max(1, len(norms) // reduction)).indices.sort().values
