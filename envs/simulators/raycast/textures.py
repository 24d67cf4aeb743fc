"""Textures of a scene packed into flat arrays with their mip levels, as the render kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from envs.scenes.scene import Filter, Material, Wrap

WRAP_CODES: dict[Wrap, int] = {"repeat": 0, "clamp": 1, "mirror": 2}
"""How the kernels number the wrap modes."""
MIPMAP_CODES: dict[Filter | None, int] = {"linear": 0, "nearest": 1, None: 2}
"""How the kernels number the ways to use mip levels."""


@dataclass(frozen=True)
class TexturePack:
    """All mip levels of all textures of a scene."""

    texels: npt.NDArray[np.uint32]
    """Texels of all levels, row by row, red in the lowest byte: (P,) uint32."""
    levels: npt.NDArray[np.int32]
    """First texel, width, height of each level, finest first, and 0: (L, 4) int32."""
    first_level: npt.NDArray[np.int32]
    """Row in :attr:`levels` of each material's finest level: (M,) int32."""
    num_levels: npt.NDArray[np.int32]
    """How many levels each material has, 0 for a plain colour: (M,) int32."""


def mip_levels(image: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    """An image and its halvings down to one texel, each the mean of 2x2 texels of the one before.

    The mean is of the stored values, without sRGB conversion, and rounds to whole numbers at each level, as
    OpenGL's ``generateMipmap`` does on the textures that Habitat makes. Where a size is odd, new texels are
    the old image at their middle, interpolated between the nearest two, as with Mesa's OpenGL.

    Args:
        image: (H, W, 4) uint8.
    """
    levels = [image]
    while max(image.shape[:2]) > 1:
        halved = _halve(_halve(image.astype(np.float32), 0), 1)
        image = (halved + 0.5).astype(np.uint8)
        levels.append(image)
    return levels


def _halve(values: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """Halves one axis, rounded down but not below 1, by linear interpolation."""
    size = values.shape[axis]
    if size == 1:
        return values
    half = size // 2
    middle = (np.arange(half, dtype=np.float32) + 0.5) * np.float32(size / half) - 0.5
    before = middle.astype(np.int64)
    weight = (middle - before).reshape(-1, *[1] * (values.ndim - 1))
    values = np.moveaxis(values, axis, 0)
    return np.moveaxis(values[before] * (1 - weight) + values[before + 1] * weight, 0, axis)


def pack_textures(materials: Sequence[Material]) -> TexturePack:
    """Packs the textures of a scene's materials; materials that share an image share its texels."""
    texels: list[npt.NDArray[np.uint32]] = []
    levels: list[tuple[int, int, int, int]] = []
    first: list[int] = []
    count: list[int] = []
    known: dict[int, tuple[int, int]] = {}
    total = 0
    for material in materials:
        if material.texture is None:
            first.append(0)
            count.append(0)
            continue
        key = id(material.texture)
        if key not in known:
            images = mip_levels(material.texture)
            known[key] = len(levels), len(images)
            for image in images:
                texels.append(np.ascontiguousarray(image).view("<u4").ravel())
                levels.append((total, image.shape[1], image.shape[0], 0))
                total += image.shape[0] * image.shape[1]
        first.append(known[key][0])
        count.append(known[key][1])
    if total >= 2**31:
        raise ValueError(f"the textures of a scene hold {total} texels, more than {2**31 - 1}")
    return TexturePack(
        texels=np.concatenate(texels) if texels else np.zeros(0, np.uint32),
        levels=np.array(levels, np.int32).reshape(-1, 4),
        first_level=np.array(first, np.int32),
        num_levels=np.array(count, np.int32),
    )
