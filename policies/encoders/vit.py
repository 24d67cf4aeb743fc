"""Vision transformers: ViT, MAE and DINOv2 as published, and a small one for work on a CPU.

- ViT (Dosovitskiy et al., arXiv:2010.11929)
- MAE (He et al., arXiv:2111.06377), its encoder without masking
- DINOv2 (Oquab et al., arXiv:2304.07193), with LayerScale (Touvron et al., arXiv:2103.17239)

All of them are one network with other sizes. It reads the files of the Hugging Face hub as they are, and
gives what the models of ``transformers`` give. That library takes seconds to import, and renames its layers
between versions, while methods work on single blocks here; so a model of that library, of any size, becomes
this network by :func:`policies.encoders.hub.from_transformers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.encoders.base import BlockEncoder, Encoder, InputSpec

Output = Literal["map", "tokens", "cls"]
"""Patch tokens as a map (D, h, w), all tokens (T, D), or the class token (D,)."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# From names in files of the hub to names here. The second kind of block is DINOv2's.
_NAMES = (
    (r"^(vit|dinov2)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "positions"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patches."),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.", ".attention."),
    (r"\.attention\.output\.dense\.", ".attention.out."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".scale\1.factor"),
    (r"^layernorm\.", "norm."),
)
# What files hold beside the encoder: MAE's decoder, DINOv2's token for masked patches, classifiers.
_UNUSED = re.compile(r"^(decoder|pooler|classifier)\.|^embeddings\.mask_token$")


class Attention(nn.Module):
    """Attention with several heads (Vaswani et al., arXiv:1706.03762): of tokens to themselves, or to others.

    Args:
        dim: width of a token, D.
        heads: attention heads, which share the width.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Tokens (N, T, D) of tokens (N, T, D) and the ones they look at, (N, S, D); themselves if None."""
        context = x if context is None else context
        q, k, v = (
            linear(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear, tokens in ((self.query, x), (self.key, context), (self.value, context))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with GELU between them, token by token, four times as wide inside: (N, T, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, D) of tokens (N, T, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class _LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class TransformerBlock(nn.Module):
    """Self-attention and a perceptron, each after a normalisation and beside a shortcut: tokens (N, T, D).

    Args:
        dim: width of a token, D.
        heads: attention heads.
        eps: added to variances in normalisations.
        layer_scale: whether what is added to the shortcut is scaled channel by channel.
    """

    def __init__(self, dim: int, heads: int, eps: float, layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attention = Attention(dim, heads)
        self.scale1 = _LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = MLP(dim)
        self.scale2 = _LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, D) of tokens (N, T, D)."""
        x = x + self.scale1(self.attention(self.norm1(x)))
        return x + self.scale2(self.mlp(self.norm2(x)))


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
        layer_scale: whether blocks have LayerScale.
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
        layer_scale: bool = False,
        output: Output = "map",
    ) -> None:
        super().__init__(input_spec)
        self.patch = patch
        self.grid = grid
        self.output = output
        self.patches = nn.Conv2d(input_spec.channels, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim))
        self.layers = nn.ModuleList(TransformerBlock(dim, heads, eps, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps)
        # The neck has to know how many rows the patches had; tokens do not say.
        self._seen = grid

    @property
    def blocks(self) -> list[TransformerBlock]:
        """The transformer blocks."""
        return cast(list[TransformerBlock], list(self.layers))

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

    def load_tensors(self, tensors: Mapping[str, Tensor], source: str = "weights") -> None:
        """Loads tensors by the names of the hub's files or its own, see :meth:`Encoder.load_tensors`."""
        super().load_tensors({_own_name(k): v for k, v in tensors.items() if not _UNUSED.match(k)}, source)

    def _positions(self, rows: int, columns: int) -> Tensor:
        if (rows, columns) == self.grid:
            return self.positions
        cls, patches = self.positions[:, :1], self.positions[:, 1:]
        patches = patches.mT.unflatten(2, self.grid)
        patches = F.interpolate(patches, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat((cls, patches.flatten(2).mT), dim=1)


def _own_name(name: str) -> str:
    for pattern, own in _NAMES:
        name = re.sub(pattern, own, name)
    return name


def _vit_mini(channels: int, output: Output) -> VisionTransformer:
    spec = InputSpec(channels)
    return VisionTransformer(spec, patch=8, dim=96, depth=6, heads=4, grid=(8, 8), output=output)


def _vit_base(channels: int, output: Output) -> VisionTransformer:
    spec = InputSpec(channels, (224, 224), antialias=True)
    return VisionTransformer(
        spec, patch=16, dim=768, depth=12, heads=12, grid=(14, 14), eps=1e-12, output=output
    )


def _mae_base(channels: int, output: Output) -> VisionTransformer:
    spec = InputSpec(channels, (224, 224), *_imagenet(channels), antialias=True)
    return VisionTransformer(
        spec, patch=16, dim=768, depth=12, heads=12, grid=(14, 14), eps=1e-12, output=output
    )


def _dinov2(channels: int, output: Output, dim: int, heads: int) -> VisionTransformer:
    spec = InputSpec(
        channels, (224, 224), *_imagenet(channels), interpolation="bicubic", antialias=True, shorter_side=256
    )
    # Pre-training ended on images of 518 pixels, hence 37 x 37 positions.
    return VisionTransformer(
        spec, patch=14, dim=dim, depth=12, heads=heads, grid=(37, 37), layer_scale=True, output=output
    )


def _imagenet(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of ImageNet's colours, and what stands for them where there are none."""
    return (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,), (0.5,))


_FORMS: dict[str, Output] = {"": "map", "_tokens": "tokens", "_cls": "cls"}

VISION_TRANSFORMERS: dict[str, Callable[[int], Encoder]] = {
    name + suffix: partial(make, output=output)
    for name, make in (
        ("vit_mini", _vit_mini),
        ("vit_base", _vit_base),
        ("mae_base", _mae_base),
        ("dinov2_small", partial(_dinov2, dim=384, heads=6)),
        ("dinov2_base", partial(_dinov2, dim=768, heads=12)),
    )
    for suffix, output in _FORMS.items()
}
"""Vision transformers by name, each called with the number of input channels.

The name alone gives the patch tokens as a map, with ``_tokens`` all tokens, with ``_cls`` the class token.
"""
