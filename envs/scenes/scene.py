"""A textured triangle scene in the world frame, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

Wrap = Literal["repeat", "clamp", "mirror"]
"""What a texture shows outside the unit square: itself again, its border, or its mirror image."""
Filter = Literal["linear", "nearest"]
"""Whether to blend the nearest two of a kind or to take the nearest."""


class SceneError(ValueError):
    """A scene that cannot be used; the message names the file and the fault."""


@dataclass(frozen=True)
class Material:
    """How a surface is coloured: factor times texture times vertex colour, unlit, as Habitat does."""

    name: str
    """Name in the file, or a number where it has none."""
    base_color: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """Factor on the stored texture values, RGBA in 0..1."""
    texture: npt.NDArray[np.uint8] | None = None
    """Image (H, W, 4) uint8, sRGB as stored, first row at v = 0; None for a plain colour."""
    wrap_s: Wrap = "repeat"
    """How the texture goes on to the left and right."""
    wrap_t: Wrap = "repeat"
    """How the texture goes on above and below."""
    magnify: Filter = "linear"
    """How texels make up a pixel smaller than they are."""
    minify: Filter = "linear"
    """How texels of one mip level make up a pixel larger than they are."""
    mipmaps: Filter | None = "linear"
    """How mip levels make up a pixel; None to use the finest alone."""


@dataclass(frozen=True)
class Scene:
    """Triangles with colours, in the world frame: metres, +Y up."""

    name: str
    """Short name, the file's stem."""
    path: Path
    """The file it was read from."""
    vertices: npt.NDArray[np.float32]
    """Corners in the world frame: (V, 3) float32 [m]."""
    triangles: npt.NDArray[np.int32]
    """Indices of corners, counter-clockwise seen from the front: (T, 3) int32."""
    uvs: npt.NDArray[np.float32]
    """Texture coordinates, v down from the image's first row: (V, 2) float32."""
    colors: npt.NDArray[np.float32]
    """Vertex colours RGBA in 0..1, 1 where the file has none: (V, 4) float32."""
    material_ids: npt.NDArray[np.int32]
    """Index into :attr:`materials` of each triangle: (T,) int32."""
    instance_ids: npt.NDArray[np.int32]
    """Number of the object that each triangle belongs to, from 1: (T,) int32."""
    materials: tuple[Material, ...]
    """What :attr:`material_ids` index."""
    instance_names: tuple[str, ...]
    """Name of instance ``i + 1`` at index ``i``."""
    solid_triangles: npt.NDArray[np.int32] | None = None
    """What Habitat makes navigation meshes of, (S, 3) int32, where that is not :attr:`triangles`: those of
    triangle lists, wound as the file has them even where a node mirrors them."""

    @property
    def num_triangles(self) -> int:
        """Number of triangles T."""
        return len(self.triangles)

    @property
    def ground(self) -> npt.NDArray[np.int32]:
        """Triangles to build a navigation mesh from: (S, 3) int32."""
        return self.triangles if self.solid_triangles is None else self.solid_triangles

    @property
    def bounds(self) -> npt.NDArray[np.float32]:
        """Lowest and highest corner of the axis-aligned box around the scene: (2, 3) float32 [m]."""
        return np.stack([self.vertices.min(axis=0), self.vertices.max(axis=0)])
