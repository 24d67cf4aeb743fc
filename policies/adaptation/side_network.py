"""The side network of hierarchical side-tuning: a pyramid of maps that draws on every block of a ViT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.encoders.vit import MLP, Attention

SideNorm = Literal["group", "batch"]
"""How the stem is normalised: over all of an image's channels and pixels, or each channel over the batch."""


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv:1603.09382): leaves a branch out for some samples in training.

    Args:
        rate: probability, in 0..1, with which the branch is left out; it is scaled up where it is not.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Of a branch's output (N, ...)."""
        if not self.training or self.rate == 0.0:
            return x
        kept = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) >= self.rate
        return x * kept.to(x.dtype) / (1.0 - self.rate)


class SideBlock(nn.Module):
    """Meta-Global injection, Fine-Grained injection, and a perceptron.

    Args:
        dim: width of a side token, d.
        heads: heads of the cross-attention.
        drop_path: rate of :class:`DropPath` for both residual branches.
    """

    def __init__(self, dim: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, 1e-6)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        self.mlp = MLP(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, registers: Tensor, features: Tensor) -> Tensor:
        """Side tokens (N, L, d) of side tokens and what one block of the ViT gave, bridged to their width.

        Args:
            x: (N, L, d).
            registers: the block's Meta-Registers (N, R, d).
            features: the block's patch features at the side tokens' resolution (N, L, d).
        """
        # Registers and GlobalT, the mean of the features: attention costs as little as L (R + 1).
        context = torch.cat((registers, features.mean(dim=1, keepdim=True)), dim=1)
        x = x + self.drop_path(self.attention(self.norm1(x), context)) + features
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _Embed(nn.Module):
    """A convolution, then a normalisation of every pixel's channels."""

    def __init__(self, conv: nn.Module, dim: int) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).movedim(1, 3)).movedim(3, 1)


def _stem(channels: int, dim: int, norm: SideNorm) -> _Embed:
    """Quarters rows and columns."""
    conv = nn.Sequential(
        nn.Conv2d(channels, dim, 3, 2, 1, bias=False),
        nn.BatchNorm2d(dim) if norm == "batch" else nn.GroupNorm(1, dim),
        nn.ReLU(),
        nn.Conv2d(dim, dim, 2, 2),
    )
    return _Embed(conv, dim)


class SideNetwork(nn.Module):
    """Stem, overlapping patch embeddings and stages of :class:`SideBlock`, one for each block of the ViT.

    Args:
        channels: of the image.
        width: of the ViT's tokens, D.
        dims: width of each stage, d.
        heads: of each stage.
        depths: blocks of each stage; the ViT's blocks are handed out in this order.
        norm: of the stem.
        drop_path: rate at the last block; it rises from 0 at the first one, linearly.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        dims: Sequence[int],
        heads: Sequence[int],
        depths: Sequence[int],
        norm: SideNorm,
        drop_path: float,
    ) -> None:
        super().__init__()
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.stem = _stem(channels, dims[0], norm)
        self.embeds = nn.ModuleList(_Embed(nn.Conv2d(a, b, 3, 2, 1), b) for a, b in pairwise(dims))
        # One for all blocks of a stage, and for their registers as well as their features.
        self.bridges = nn.ModuleList(nn.Linear(width, dim) for dim in dims)
        self.register_norms = nn.ModuleList(
            nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
            for dim, depth in zip(dims, depths, strict=True)
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(SideBlock(dim, count, next(rates)) for _ in range(depth))
            for dim, count, depth in zip(dims, heads, depths, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim, 1e-6) for dim in dims)
        self.apply(_initialise)

    def forward(self, image: Tensor, registers: Sequence[Tensor], features: Sequence[Tensor]) -> list[Tensor]:
        """One map a stage, (N, d, h, w), at strides 4, 8, 16 and so on.

        Args:
            image: preprocessed (N, C, H, W).
            registers: of each block of the ViT, (N, R, D).
            features: of each block of the ViT, as a map (N, D, rows, columns).
        """
        maps: list[Tensor] = []
        sources = zip(registers, features, strict=True)
        for stage, blocks in enumerate(self.blocks):
            x = self.embeds[stage - 1](maps[-1]) if stage else self.stem(image)
            size = x.shape[2:]
            bridge, norms = self.bridges[stage], self.register_norms[stage]
            assert isinstance(blocks, nn.ModuleList)
            assert isinstance(norms, nn.ModuleList)
            x = x.flatten(2).mT
            for block, norm in zip(blocks, norms, strict=True):
                register, feature = next(sources)
                # Bilinear weights sum to 1, so that bridging first gives the same; it is cheaper by far.
                bridged = bridge(feature.flatten(2).mT).mT.unflatten(2, feature.shape[2:])
                bridged = F.interpolate(bridged, size=size, mode="bilinear", align_corners=False)
                x = block(x, norm(bridge(register)), bridged.flatten(2).mT)
            maps.append(self.norms[stage](x).mT.unflatten(2, size))
        return maps


def _initialise(module: nn.Module) -> None:
    """Weights as the authors draw them; normalisations are at 1 and 0 already."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        rows, columns = module.kernel_size
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / (rows * columns * module.out_channels)))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
