"""Vision transformers (Dosovitskiy et al., arXiv:2010.11929)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.encoders.base import BlockEncoder, Encoder, InputSpec

Output = Literal["map", "tokens", "cls"]
"""Patch tokens as a map (D, h, w), all tokens (T, D), or the class token (D,)."""


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Self-attention and a perceptron, each after a normalisation and around a shortcut: tokens (N, T, D)."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attention = _Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = _MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, D) of tokens (N, T, D)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(BlockEncoder):
    """Patches as tokens behind a class token, through blocks that keep their number and width.

    Args:
        input_spec: the images it takes.
        patch: rows and columns of pixels in a patch.
        dim: width of a token, D.
        depth: number of blocks.
        heads: attention heads of a block.
        grid: rows and columns of patches that the position embeddings are made for. They are interpolated
            (bicubic) for images with more patches, or fewer.
        eps: added to variances in normalisations.
        output: "map" for the patch tokens as a map (N, D, h, w), "tokens" for all tokens (N, 1 + h * w, D)
            with the class token first, "cls" for the class token (N, D).
    """

    output_layers = ("norm",)

    def __init__(
        self,
        input_spec: InputSpec,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        grid: tuple[int, int],
        eps: float = 1e-6,
        output: Output = "map",
    ) -> None:
        super().__init__(input_spec)
        self.patch = patch
        self.grid = grid
        self.output = output
        self.patches = nn.Conv2d(input_spec.channels, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim))
        self.layers = nn.ModuleList(TransformerBlock(dim, heads, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps)
        # The neck has to know how many rows the patches had; tokens do not say.
        self._seen = grid

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks."""
        return list(self.layers)

    def stem(self, x: Tensor) -> Tensor:
        """Class and patch tokens with their positions: (N, C, H, W) to (N, 1 + h * w, D).

        Raises:
            ValueError: if the patches do not fill the image.
        """
        height, width = x.shape[2:]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"image of {height} x {width} pixels: {self.name} takes multiples of its patches, "
                f"{self.patch} pixels"
            )
        x = self.patches(x)
        self._seen = (x.shape[2], x.shape[3])
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).mT), dim=1)
        return x + self._positions(*self._seen)

    def neck(self, x: Tensor) -> Tensor:
        """Normalised tokens (N, 1 + h * w, D), in the form that was chosen."""
        x = self.norm(x)
        if self.output == "tokens":
            return x
        if self.output == "cls":
            return x[:, 0]
        return x[:, 1:].mT.unflatten(2, self._seen)

    def initialise(self) -> None:
        """Draws fresh random weights: normal with deviation 0.02, biases 0, as in timm and transformers."""
        super().initialise()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def _positions(self, rows: int, columns: int) -> Tensor:
        if (rows, columns) == self.grid:
            return self.positions
        cls, patches = self.positions[:, :1], self.positions[:, 1:]
        patches = patches.mT.unflatten(2, self.grid)
        patches = F.interpolate(patches, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat((cls, patches.flatten(2).mT), dim=1)


def _vit_mini(channels: int, output: Output) -> VisionTransformer:
    spec = InputSpec(channels)
    return VisionTransformer(spec, patch=8, dim=96, depth=6, heads=4, grid=(8, 8), output=output)


VISION_TRANSFORMERS: dict[str, Callable[[int], Encoder]] = {
    "vit_mini": partial(_vit_mini, output="map"),
    "vit_mini_tokens": partial(_vit_mini, output="tokens"),
    "vit_mini_cls": partial(_vit_mini, output="cls"),
}
"""Vision transformers by name, each called with the number of input channels."""
