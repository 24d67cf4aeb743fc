"""Navigation meshes: what they hold, and Habitat's ``.navmesh`` files.

A navigation mesh is a floor made of convex polygons with at most six corners that share edges. Habitat stores
it as a set of Detour tiles (nearly always one), in the layout of ``dtNavMesh`` version 7 of Recast Navigation
(https://github.com/recastnavigation/recastnavigation) behind a header of its own with the settings that the
mesh was built with. The same layout is kept in memory, one :class:`NavMeshTile` a tile, and
:class:`NavMesh` offers the tiles merged into one graph.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from envs.files import atomic_write

MAX_CORNERS = 6
"""Most corners that a polygon can have (Detour's ``DT_VERTS_PER_POLYGON``)."""

EXTERNAL_EDGE = 0x8000
"""Bit of :attr:`NavMeshTile.edges` that marks an edge on the border of the tile; the low byte is the side."""

WALKABLE_FLAG = 1
"""Bit of :attr:`NavMeshTile.flags` that a polygon needs to be walked on."""

NO_LINK = 0xFFFFFFFF

_SET_MAGIC = 0x4D534554  # "MSET"
_SET_VERSION = 2
_TILE_MAGIC = 0x444E4156  # "DNAV"
_TILE_VERSION = 7
# Polygons with less area than this cannot be stood on: Habitat disables them when it loads a mesh.
_MIN_POLYGON_AREA = 1e-5

_SET_HEADER = struct.Struct("<3i3f2f2i")
_SETTINGS = struct.Struct("<13f4?")
_TILE_PREFIX = struct.Struct("<Ii")
_TILE_HEADER = struct.Struct("<5iI9i3f3f3ff")
_POLYGON = np.dtype(
    [
        ("first_link", "<u4"),
        ("vertices", "<u2", MAX_CORNERS),
        ("edges", "<u2", MAX_CORNERS),
        ("flags", "<u2"),
        ("size", "u1"),
        ("area_and_type", "u1"),
    ]
)
_LINK = np.dtype(
    [("target", "<u4"), ("next", "<u4"), ("edge", "u1"), ("side", "u1"), ("low", "u1"), ("high", "u1")]
)
_DETAIL = np.dtype(
    [
        ("vertex_base", "<u4"),
        ("triangle_base", "<u4"),
        ("vertex_count", "u1"),
        ("triangle_count", "u1"),
        ("padding", "<u2"),
    ]
)
_TREE_NODE = np.dtype([("low", "<u2", 3), ("high", "<u2", 3), ("index", "<i4")])


class NavMeshError(ValueError):
    """A navigation mesh that cannot be read, written or used."""


@dataclass(frozen=True)
class NavMeshSettings:
    """What a navigation mesh was built with, in Habitat's order and with Habitat's defaults."""

    cell_size: float = 0.05
    """Size of a voxel on the ground plane [m]."""
    cell_height: float = 0.2
    """Height of a voxel [m]."""
    agent_height: float = 1.5
    """Height of the agent's cylinder [m]."""
    agent_radius: float = 0.1
    """Radius of the agent's cylinder [m]; the mesh keeps this far from walls."""
    agent_max_climb: float = 0.2
    """Highest step that the agent can climb [m]."""
    agent_max_slope: float = 45.0
    """Steepest floor that the agent can walk [deg]."""
    region_min_size: float = 20.0
    """Smaller separate regions are dropped: side of a square [cells]."""
    region_merge_size: float = 20.0
    """Smaller regions are merged with their neighbours: side of a square [cells]."""
    edge_max_len: float = 12.0
    """Longest edge along the border of the mesh [m]."""
    edge_max_error: float = 1.3
    """How far a border may deviate from the voxels [cells]."""
    verts_per_poly: float = 6.0
    """Most corners of a polygon."""
    detail_sample_dist: float = 6.0
    """Spacing of the samples for the floor's height [cells]."""
    detail_sample_max_error: float = 1.0
    """How far the detail triangles may deviate from the floor's height [cells]."""
    filter_low_hanging_obstacles: bool = True
    """Whether obstacles no higher than the climb are walked over."""
    filter_ledge_spans: bool = True
    """Whether ledges are avoided."""
    filter_walkable_low_height_spans: bool = True
    """Whether places lower than the agent are avoided."""
    include_static_objects: bool = False
    """Whether static objects were part of the geometry."""


@dataclass(frozen=True, eq=False)
class NavMeshTile:
    """One tile: V vertices, P polygons, T detail triangles that give the floor its height inside polygons."""

    vertices: NDArray[np.float32]
    """Polygon corners: (V, 3) [m], world."""
    polygons: NDArray[np.int32]
    """Vertices of each polygon, clockwise seen from above, -1 behind the last: (P, 6)."""
    edges: NDArray[np.uint16]
    """What lies behind the edge from corner j to j + 1: (P, 6). 0 a wall, k + 1 polygon k of this tile,
    ``EXTERNAL_EDGE | side`` another tile (side 0 +x, 2 +z, 4 -x, 6 -z)."""
    flags: NDArray[np.uint16]
    """Abilities needed to walk each polygon: (P,); :data:`WALKABLE_FLAG` is set on floor."""
    area_types: NDArray[np.uint8]
    """Kind of floor, 0 to 63: (P,)."""
    detail_meshes: NDArray[np.int32]
    """First extra vertex, extra vertices, first triangle and triangles of each polygon: (P, 4)."""
    detail_vertices: NDArray[np.float32]
    """Extra vertices of the detail triangles: (D, 3) [m]."""
    detail_triangles: NDArray[np.uint8]
    """Three corners and the edge flags of each detail triangle: (T, 4). Corners below the polygon's size are
    its own, later ones count its extra vertices; bit 2 k of the flags is set where the triangle's edge
    from corner k lies on the polygon's border."""
    bounds: NDArray[np.float32]
    """Lowest and highest corner of the tile's box: (2, 3) [m]."""
    walkable_height: float
    """Height of the agent [m]."""
    walkable_radius: float
    """Radius of the agent [m]."""
    walkable_climb: float
    """Highest step that the agent can climb [m]."""
    tree: NDArray[np.int32]
    """Bounding volume tree in depth-first order, (B, 7): lowest and highest corner in units of
    ``1 / tree_scale`` from the tile's lowest corner, then a leaf's polygon or minus the nodes to skip."""
    tree_scale: float
    """Units of the tree per metre."""
    x: int = 0
    """Column in the tile grid."""
    y: int = 0
    """Row in the tile grid."""
    layer: int = 0
    """Layer in the tile grid."""
    user_id: int = 0
    """Free for the builder's use."""
    reference: int = 0
    """Detour's own name for the tile (``dtTileRef``); 0 lets the writer choose."""
