"""Tiles of a navigation mesh, as Detour keeps them: what they hold, and whether it fits together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_CORNERS = 6
"""Most corners that a polygon can have (Detour's ``DT_VERTS_PER_POLYGON``)."""

EXTERNAL_EDGE = 0x8000
"""Bit of :attr:`NavMeshTile.edges` that marks an edge on the border of the tile; the low byte is the side."""

WALKABLE_FLAG = 1
"""Bit of :attr:`NavMeshTile.flags` that a polygon needs to be walked on."""

MIN_POLYGON_AREA = 1e-5
"""Polygons with less area cannot be stood on: Habitat disables them when it loads a mesh [m2]."""

MAX_POLYGONS = EXTERNAL_EDGE - 2
"""Most polygons of a tile: edges name them, from 1, in the bits below :data:`EXTERNAL_EDGE`."""

# Beyond this distance from the origin [m], 32-bit numbers are too coarse to walk by.
_MAX_COORDINATE = 1e5


class NavMeshError(ValueError):
    """A navigation mesh that cannot be read, written or used."""


@dataclass(frozen=True, eq=False)
class NavMeshTile:
    """One tile: V vertices, P polygons, T detail triangles that give the floor its height inside polygons."""

    vertices: NDArray[np.float32]
    """Polygon corners: (V, 3) [m], world."""
    polygons: NDArray[np.int32]
    """Vertices of each polygon, counter-clockwise seen from above, -1 behind the last: (P, 6)."""
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


def offsets_of(counts: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int32]:
    """Where each of several runs begins that lie end to end, and the length of all."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def check_tile(tile: NavMeshTile, name: str) -> None:
    """Checks that every index of a tile points at something and every number is finite."""
    num_vertices, num_polygons = len(tile.vertices), len(tile.polygons)
    sizes = (tile.polygons >= 0).sum(1)
    if num_polygons == 0:
        raise NavMeshError(f"{name}: has no polygons")
    if (sizes < 3).any():
        raise NavMeshError(f"{name}: polygon {int((sizes < 3).argmax())} has fewer than 3 corners")
    if tile.polygons.max() >= num_vertices:
        raise NavMeshError(f"{name}: a polygon names vertex {tile.polygons.max()} of {num_vertices}")
    internal = tile.edges[(tile.edges & EXTERNAL_EDGE) == 0]
    if len(internal) and internal.max() > num_polygons:
        raise NavMeshError(f"{name}: an edge leads to polygon {internal.max() - 1} of {num_polygons}")
    for what, lengths in (
        ("edges", len(tile.edges)),
        ("flags", len(tile.flags)),
        ("area_types", len(tile.area_types)),
        ("detail_meshes", len(tile.detail_meshes)),
    ):
        if lengths != num_polygons:
            raise NavMeshError(f"{name}: has {lengths} {what} for {num_polygons} polygons")
    numbers = (tile.walkable_height, tile.walkable_radius, tile.walkable_climb, tile.tree_scale)
    arrays = (tile.vertices, tile.detail_vertices, tile.bounds, np.array(numbers))
    if not all(np.isfinite(array).all() for array in arrays) or tile.tree_scale <= 0:
        raise NavMeshError(f"{name}: holds numbers that are not finite")
    if max(float(np.abs(array).max(initial=0)) for array in arrays[:3]) > _MAX_COORDINATE:
        raise NavMeshError(f"{name}: reaches further than {_MAX_COORDINATE:.0f} m from the origin")
    if (tile.bounds[1] < tile.bounds[0]).any():
        raise NavMeshError(f"{name}: the bounds {tile.bounds.tolist()} are upside down")
    details = tile.detail_meshes.astype(np.int64)
    if (details < 0).any() or (details[:, 0] + details[:, 1]).max() > len(tile.detail_vertices):
        raise NavMeshError(
            f"{name}: a detail mesh reaches past the {len(tile.detail_vertices)} detail vertices"
        )
    if (details[:, 3] < 1).any() or (details[:, 2] + details[:, 3]).max() > len(tile.detail_triangles):
        raise NavMeshError(
            f"{name}: a detail mesh is empty or reaches past {len(tile.detail_triangles)} detail triangles"
        )
    counts = details[:, 3]
    rows = np.repeat(details[:, 2] - offsets_of(counts)[:-1], counts) + np.arange(counts.sum())
    if (tile.detail_triangles[rows, :3].max(1) >= np.repeat(sizes + details[:, 1], counts)).any():
        raise NavMeshError(f"{name}: a detail triangle names a vertex that its polygon does not have")
    if len(tile.tree) and (tile.tree[:, 6].max() >= num_polygons):
        raise NavMeshError(f"{name}: the tree names polygon {tile.tree[:, 6].max()} of {num_polygons}")


def check_winding(tile: NavMeshTile) -> None:
    """Checks that no polygon is wound clockwise seen from above."""
    corners = tile.vertices[np.where(tile.polygons >= 0, tile.polygons, tile.polygons[:, :1])].astype(
        np.float64
    )
    following = np.roll(corners, -1, axis=1)
    areas = (corners[..., 2] * following[..., 0] - corners[..., 0] * following[..., 2]).sum(1) / 2
    if (areas < -MIN_POLYGON_AREA).any():
        raise NavMeshError(
            f"polygon {int(areas.argmin())} is wound clockwise seen from above; reverse its corners and edges"
        )


def fan_triangles(sizes: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Detail meshes that split each polygon into a fan about its first corner."""
    triangles = []
    for size in sizes:
        for corner in range(2, int(size)):
            flags = 1 << 2  # The edge away from the fan's centre is always on the border.
            if corner == 2:
                flags |= 1 << 0
            if corner == size - 1:
                flags |= 1 << 4
            triangles.append((0, corner - 1, corner, flags))
    counts = sizes - 2
    meshes = np.zeros((len(sizes), 4), np.int32)
    meshes[:, 2], meshes[:, 3] = offsets_of(counts)[:-1], counts
    return meshes, np.array(triangles, np.uint8).reshape(-1, 4)


def _tree_boxes(tile: NavMeshTile) -> NDArray[np.int64]:
    """Box of each polygon and its detail vertices in the tree's units: (P, 6)."""
    boxes = np.zeros((len(tile.polygons), 6), np.int64)
    for index, (polygon, detail) in enumerate(zip(tile.polygons, tile.detail_meshes, strict=True)):
        points = np.concatenate(
            [tile.vertices[polygon[polygon >= 0]], tile.detail_vertices[detail[0] : detail[0] + detail[1]]]
        )
        scaled = (points - tile.bounds[0]) * np.float32(tile.tree_scale)
        boxes[index, :3] = np.floor(scaled.min(0))
        boxes[index, 3:] = np.floor(scaled.max(0))
    return boxes.clip(0, 0xFFFF)


def build_tree(tile: NavMeshTile) -> NDArray[np.int32]:
    """A bounding volume tree: halved along the longest axis until each leaf holds a polygon."""
    boxes = _tree_boxes(tile)
    nodes: list[list[int]] = []

    def split(members: NDArray[np.int64]) -> None:
        node = [*boxes[members, :3].min(0).tolist(), *boxes[members, 3:].max(0).tolist(), int(members[0])]
        place = len(nodes)
        nodes.append(node)
        if len(members) == 1:
            return
        axis = int(np.argmax([node[3 + axis] - node[axis] for axis in range(3)]))
        members = members[np.argsort(boxes[members, axis], kind="stable")]
        split(members[: len(members) // 2])
        split(members[len(members) // 2 :])
        node[6] = place - len(nodes)

    split(np.arange(len(boxes)))
    return np.array(nodes, np.int32)
