"""How side-tuning puts base and side features together (Zhang et al., ECCV 2020, arXiv:1912.13503).

B are the base's features, S the side network's; both are maps (N, C, h, w), tokens (N, T, D) or vectors
(N, C), and so is what comes out:

=============  ==================================================================
"base"         B
"side"         S
"sum"          B + S
"product"      B * S
"alpha"        alpha B + (1 - alpha) S
"film"         B * (m(S) + S) + (a(S) + S), feature-wise linear modulation
"mlp"          f(B) + S
"mlp2"         f(B) + g(S)
"resmlp2"      f(B) + S + g(S)
"mlp_hidden"   relu(f(B) + S)
"concat"       transfer(normalise([B, S]))
=============  ==================================================================

For maps of 8 channels and vectors of 64 the layers f, g, m and a are those of the authors' code; other widths
follow the same rule. Tokens are treated as a map of T x 1 pixels with D channels, on which every layer works
token by token; only normalisation sees them together. For vectors the authors have f and g alone, so "film"
and "concat" treat a vector as a map of one pixel.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.adaptation.alpha import Alpha, DenseAlpha
from policies.adaptation.layout import VectorBatchNorm, feature_channels

FusionName = Literal[
    "alpha", "base", "side", "sum", "product", "film", "mlp", "mlp2", "resmlp2", "mlp_hidden", "concat"
]

ONE_SIDE = ("base", "side", "film", "concat")
"""Fusions that take no side networks of earlier tasks, as in the authors' code."""


class Fusion(nn.Module, ABC):
    """An operator on the features of the base and of a side network, of one shape."""

    @abstractmethod
    def forward(self, base: Tensor, side: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        """The fused features.

        Args:
            base: (N, C, h, w), (N, T, D) or (N, C).
            side: the same shape.
            earlier: features of the side networks of earlier tasks, each of the same shape, as many as the
                operator was made for.
        """

    def base_weight(self) -> Tensor | None:
        """What the base weighs in a blend, () in 0..1; None for operators that are no blend."""
        return None

    def set_progress(self, samples: int, total: int) -> None:
        """Tells how far training is, for operators with a schedule."""


class BaseOnly(Fusion):
    """The base's features."""

    def forward(self, base: Tensor, side: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        """See :meth:`Fusion.forward`."""
        return base


class SideOnly(Fusion):
    """The side network's features."""

    def forward(self, base: Tensor, side: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        """See :meth:`Fusion.forward`."""
        return side


class Sum(Fusion):
    """The sum of all features."""

    def forward(self, base: Tensor, side: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        """See :meth:`Fusion.forward`."""
        fused = base + side
        for features in earlier:
            fused = fused + features
        return fused


class Product(Fusion):
    """The product of all features, element by element."""

    def forward(self, base: Tensor, side: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        """See :meth:`Fusion.forward`."""
        fused = base * side
        for features in earlier:
            fused = fused * features
        return fused


class AlphaBlend(Fusion):
    """A weighted mean of base and side."""

    def __init__(self, alpha: Alpha) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, base: Tensor, side: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        """See :meth:`Fusion.forward`."""
        alpha = self.alpha()
        return alpha * base + (1 - alpha) * side

    def base_weight(self) -> Tensor:
        """Alpha: ()."""
        return self.alpha()

    def set_progress(self, samples: int, total: int) -> None:
        """Moves a scheduled alpha on."""
        self.alpha.set_progress(samples, total)


class DenseBlend(Fusion):
    """A weighted mean of the base, the earlier side networks in their order, and the side network."""

    def __init__(self, alpha: DenseAlpha) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, base: Tensor, side: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        """See :meth:`Fusion.forward`."""
        first, *others = self.alpha().unbind()
        fused = first * base
        for weight, features in zip(others, (*earlier, side), strict=True):
            fused = fused + weight * features
        return fused

    def base_weight(self) -> Tensor:
        """The base's weight: ()."""
        return self.alpha()[0]

    def set_progress(self, samples: int, total: int) -> None:
        """Moves a scheduled alpha on."""
        self.alpha.set_progress(samples, total)


class FiLM(Fusion):
    """Scales and shifts the base's features by what two heads make of the side network's.

    The heads share a hidden layer of 64 channels, whatever the width of the features.
    """

    HIDDEN = 64

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Conv2d(channels, self.HIDDEN, 1, bias=False), nn.GroupNorm(2, self.HIDDEN), nn.ReLU()
        )
        self.scale = nn.Conv2d(self.HIDDEN, channels, 1)
        self.shift = nn.Conv2d(self.HIDDEN, channels, 1)

    def forward(self, base: Tensor, side: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        """See :meth:`Fusion.forward`."""
        features = _as_map(side)
        hidden = self.hidden(features)
        fused = _as_map(base) * (self.scale(hidden) + features) + (self.shift(hidden) + features)
        return _like(fused, base)


class MLP(Fusion):
    """A small network on the base's features, added to the side network's, to which one may apply as well.

    Args:
        shape: of one image's features.
        side: whether S enters as it is, through a layer of its own, or through one beside a shortcut.
        rectified: whether a ReLU follows the sum.
        earlier: number of side networks of earlier tasks; each gets a layer of its own.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        side: Literal["plain", "layer", "residual"] = "plain",
        rectified: bool = False,
        earlier: int = 0,
    ) -> None:
        super().__init__()
        self.base_layer = _layer(shape)
        self.side_layer = nn.Identity() if side == "plain" else _layer(shape)
        self.earlier_layers = nn.ModuleList(_layer(shape) for _ in range(earlier))
        self.residual = side == "residual"
        self.rectified = rectified

    def forward(self, base: Tensor, side: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        """See :meth:`Fusion.forward`."""
        fused = self.base_layer(base) + self.side_layer(side)
        if self.residual:
            fused = fused + side
        for layer, features in zip(self.earlier_layers, earlier, strict=True):
            fused = fused + layer(features)
        return F.relu(fused) if self.rectified else fused


class Concat(Fusion):
    """Normalised features of both, one behind the other, and a transfer network back to as many channels.

    Maps pass 3x3 convolutions, tokens and vectors are transferred one by one.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        channels = feature_channels(shape)
        self.transfer = Transfer(2 * channels, channels, kernel=3 if len(shape) == 3 else 1)
        # 8 groups for the authors' maps; at least two values each, even where a feature is one number.
        self.groups = math.gcd(8, channels)

    def forward(self, base: Tensor, side: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        """See :meth:`Fusion.forward`."""
        both = torch.cat([_as_map(base), _as_map(side)], dim=1)
        return _like(self.transfer(F.group_norm(both, self.groups)), base)


class Transfer(nn.Module):
    """Side-tuning's transfer network: two convolutions with ReLU, and a shortcut beside them.

    It has 1,168 parameters for 8 to 8 channels.

    Args:
        inputs: channels of what it takes.
        outputs: channels of what it gives; the shortcut passes as many of the first inputs.
        kernel: rows and columns of the convolutions.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, outputs, h, w) of (N, inputs, h, w)."""
        transferred = F.relu(self.conv2(F.relu(self.conv1(x))))
        return transferred + x[:, : transferred.shape[1]]


_WITHOUT_LAYERS: dict[str, Callable[[], Fusion]] = {
    "base": BaseOnly,
    "side": SideOnly,
    "sum": Sum,
    "product": Product,
}

ANY_SHAPE = ("alpha", *_WITHOUT_LAYERS)
"""Fusions that fit features of any shape; the others have layers made for one number of channels."""


def make_fusion(
    name: FusionName,
    shape: tuple[int, ...] | None = None,
    alpha: Alpha | None = None,
    earlier: int = 0,
) -> Fusion:
    """Builds an operator.

    Args:
        name: see the table above.
        shape: of one image's features, (C, h, w), (T, D) or (C,); not needed by those in :data:`ANY_SHAPE`.
        alpha: the weights of "alpha", which for earlier side networks must be a :class:`DenseAlpha`.
        earlier: number of side networks of earlier tasks; 0 for those in :data:`ONE_SIDE`.
    """
    if name == "alpha":
        assert alpha is not None
        return DenseBlend(alpha) if isinstance(alpha, DenseAlpha) else AlphaBlend(alpha)
    if name in _WITHOUT_LAYERS:
        return _WITHOUT_LAYERS[name]()
    assert shape is not None
    match name:
        case "film":
            return FiLM(feature_channels(shape))
        case "concat":
            return Concat(shape)
        case "mlp2":
            return MLP(shape, "layer", earlier=earlier)
        case "resmlp2":
            return MLP(shape, "residual", earlier=earlier)
        case _:
            return MLP(shape, rectified=name == "mlp_hidden", earlier=earlier)


class _Scale(nn.Module):
    """One learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.9]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class _Pointwise(nn.Sequential):
    """Layers of 1x1 convolutions, on maps or token by token."""

    def forward(self, x: Tensor) -> Tensor:
        return _like(super().forward(_as_map(x)), x)


def _layer(shape: tuple[int, ...]) -> nn.Module:
    """The layers f and g for features of one shape."""
    channels = feature_channels(shape)
    if len(shape) == 1:
        return nn.Sequential(
            nn.Linear(channels, channels), VectorBatchNorm(channels), nn.ReLU(), nn.Linear(channels, channels)
        )
    return _Pointwise(
        _Scale(),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.GroupNorm(math.gcd(2, channels), channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
    )


def _as_map(x: Tensor) -> Tensor:
    """A map (N, C, h, w) as it is, tokens (N, T, D) as (N, D, T, 1), a vector (N, C) as (N, C, 1, 1)."""
    if x.dim() == 4:
        return x
    return x.transpose(1, 2)[..., None] if x.dim() == 3 else x[:, :, None, None]


def _like(fused: Tensor, features: Tensor) -> Tensor:
    """A map that :func:`_as_map` made, back in the layout of ``features``."""
    if features.dim() == 4:
        return fused
    return fused[..., 0].transpose(1, 2) if features.dim() == 3 else fused[:, :, 0, 0]
