"""Navigation meshes: what they hold, and Habitat's ``.navmesh`` files.

A navigation mesh is a floor made of convex polygons with at most six corners that share edges. Habitat stores
it as a set of Detour tiles (nearly always one), in the layout of ``dtNavMesh`` version 7 of Recast Navigation
(https://github.com/recastnavigation/recastnavigation) behind a header of its own with the settings that the
mesh was built with. The same layout is kept in memory, one :class:`NavMeshTile` a tile, and
:class:`NavMesh` offers the tiles merged into one graph.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
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

_NO_LINK = 0xFFFFFFFF

_SET_MAGIC = 0x4D534554  # "MSET"
_SET_VERSION = 2
_TILE_MAGIC = 0x444E4156  # "DNAV"
_TILE_VERSION = 7
# Polygons with less area than this cannot be stood on: Habitat disables them when it loads a mesh.
_MIN_POLYGON_AREA = 1e-5
# Edges name polygons, from 1, in the bits below EXTERNAL_EDGE.
_MAX_POLYGONS = EXTERNAL_EDGE - 2
# Beyond this distance from the origin [m], 32-bit numbers are too coarse to walk by.
_MAX_COORDINATE = 1e5

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


@dataclass(frozen=True)
class NavMeshLinks:
    """Ways from polygon to polygon across their edges, as adjacency lists in Detour's order: L links."""

    start: NDArray[np.int32]
    """Polygon p has links ``start[p]`` to ``start[p + 1]``: (P + 1,)."""
    target: NDArray[np.int32]
    """Polygon that each link leads to: (L,)."""
    edge: NDArray[np.int32]
    """Edge of the polygon that each link crosses: (L,)."""
    low: NDArray[np.int32]
    """Where the passage begins along the edge, in 255ths: (L,); 0 inside a tile."""
    high: NDArray[np.int32]
    """Where the passage ends along the edge, in 255ths: (L,); 255 inside a tile."""
    crossing: NDArray[np.int32]
    """Which of the tile's sides is crossed, in Detour's halved numbers: (L,); 0 inside a tile."""


@dataclass(frozen=True, eq=False)
class NavMesh:
    """A navigation mesh: what its file holds, and the same merged into one graph of P polygons.

    Build one with :func:`read_navmesh` or :meth:`from_polygons`.
    """

    settings: NavMeshSettings
    """What the mesh was built with."""
    tiles: tuple[NavMeshTile, ...]
    """The tiles, at least one."""
    origin: tuple[float, float, float]
    """Corner of the tile grid [m]."""
    tile_size: tuple[float, float]
    """Extent of a tile along x and z [m]."""
    max_tiles: int = 1
    """Room for tiles in the file's numbering."""
    max_polygons: int = 1
    """Room for polygons per tile in the file's numbering."""

    def __post_init__(self) -> None:
        if not self.tiles:
            raise NavMeshError("a navigation mesh needs at least one tile, got none")
        places = [(tile.x, tile.y, tile.layer) for tile in self.tiles]
        if len(set(places)) != len(places):
            raise NavMeshError(f"two tiles share a place in the tile grid: {places}")
        for number, tile in enumerate(self.tiles):
            _check_tile(tile, f"tile {number}")

    @classmethod
    def from_polygons(
        cls,
        settings: NavMeshSettings,
        bounds: NDArray[np.float32],
        vertices: NDArray[np.float32],
        polygons: NDArray[np.int32],
        neighbours: NDArray[np.int32],
        detail_meshes: NDArray[np.int32] | None = None,
        detail_vertices: NDArray[np.float32] | None = None,
        detail_triangles: NDArray[np.uint8] | None = None,
    ) -> NavMesh:
        """A mesh of one tile from polygons.

        Args:
            settings: What the polygons were built with.
            bounds: Lowest and highest corner of the mesh's box, (2, 3) [m].
            vertices: Corners, (V, 3) [m].
            polygons: Convex, counter-clockwise seen from above, -1 behind the last corner, (P, 6).
            neighbours: Polygon across the edge from corner j to j + 1, -1 for a wall, (P, 6).
            detail_meshes: See :class:`NavMeshTile`; without the three the polygons are triangulated as fans.
            detail_vertices: See :class:`NavMeshTile`.
            detail_triangles: See :class:`NavMeshTile`.

        Raises:
            NavMeshError: The arrays do not fit together.
        """
        polygons = np.ascontiguousarray(polygons, np.int32).reshape(-1, MAX_CORNERS)
        neighbours = np.asarray(neighbours, np.int32).reshape(-1, MAX_CORNERS)
        bounds = np.ascontiguousarray(bounds, np.float32).reshape(2, 3)
        if len(polygons) == 0:
            raise NavMeshError("a navigation mesh needs at least one polygon, got none")
        if len(polygons) > _MAX_POLYGONS:
            raise NavMeshError(
                f"{len(polygons)} polygons are too many for one tile, which holds {_MAX_POLYGONS}; "
                "build with larger cells"
            )
        if neighbours.shape != polygons.shape:
            raise NavMeshError(
                f"neighbours {neighbours.shape} must have the polygons' shape {polygons.shape}"
            )
        if detail_meshes is None or detail_vertices is None or detail_triangles is None:
            detail_meshes, detail_triangles = _fan_triangles((polygons >= 0).sum(1))
            detail_vertices = np.zeros((0, 3), np.float32)
        tile = NavMeshTile(
            vertices=np.ascontiguousarray(vertices, np.float32).reshape(-1, 3),
            polygons=polygons,
            edges=np.where(polygons >= 0, neighbours + 1, 0).astype(np.uint16),
            flags=np.full(len(polygons), WALKABLE_FLAG, np.uint16),
            area_types=np.zeros(len(polygons), np.uint8),
            detail_meshes=np.ascontiguousarray(detail_meshes, np.int32).reshape(-1, 4),
            detail_vertices=np.ascontiguousarray(detail_vertices, np.float32).reshape(-1, 3),
            detail_triangles=np.ascontiguousarray(detail_triangles, np.uint8).reshape(-1, 4),
            bounds=bounds,
            walkable_height=settings.agent_height,
            walkable_radius=settings.agent_radius,
            walkable_climb=settings.agent_max_climb,
            tree=np.zeros((0, 7), np.int32),
            tree_scale=1.0 / settings.cell_size,
        )
        _check_tile(tile, "the mesh")
        _check_winding(tile)
        tile = replace(tile, tree=_build_tree(tile))
        # A mesh of one tile has a grid of one cell, as Detour makes it.
        size = bounds[1] - bounds[0]
        return cls(
            settings=settings,
            tiles=(tile,),
            origin=(float(bounds[0, 0]), float(bounds[0, 1]), float(bounds[0, 2])),
            tile_size=(float(size[0]), float(size[2])),
            max_tiles=1,
            max_polygons=len(polygons),
        )

    @cached_property
    def bounds(self) -> NDArray[np.float32]:
        """Lowest and highest corner of the box around all tiles: (2, 3) [m]."""
        boxes = np.stack([tile.bounds for tile in self.tiles])
        return np.stack([boxes[:, 0].min(0), boxes[:, 1].max(0)])

    @cached_property
    def polygon_offsets(self) -> NDArray[np.int32]:
        """Index of each tile's first polygon, and the number of polygons at the end: (tiles + 1,)."""
        return _offsets([len(tile.polygons) for tile in self.tiles])

    @cached_property
    def vertices(self) -> NDArray[np.float32]:
        """Polygon corners of all tiles, then the extra vertices of the detail triangles: (V + D, 3) [m]."""
        corners = [tile.vertices for tile in self.tiles]
        return np.concatenate(corners + [tile.detail_vertices for tile in self.tiles])

    @cached_property
    def polygons(self) -> NDArray[np.int32]:
        """Vertices of each polygon, counter-clockwise seen from above, -1 behind the last: (P, 6)."""
        offsets = _offsets([len(tile.vertices) for tile in self.tiles])
        parts = [
            np.where(t.polygons >= 0, t.polygons + o, -1) for t, o in zip(self.tiles, offsets, strict=False)
        ]
        return np.concatenate(parts).astype(np.int32)

    @cached_property
    def sizes(self) -> NDArray[np.int32]:
        """Number of corners of each polygon: (P,)."""
        return (self.polygons >= 0).sum(1).astype(np.int32)

    @cached_property
    def polygon_tiles(self) -> NDArray[np.int32]:
        """Tile of each polygon: (P,)."""
        return np.repeat(np.arange(len(self.tiles), dtype=np.int32), np.diff(self.polygon_offsets))

    @cached_property
    def detail_starts(self) -> NDArray[np.int32]:
        """Polygon p has detail triangles ``detail_starts[p]`` to ``detail_starts[p + 1]``: (P + 1,)."""
        return _offsets(np.concatenate([tile.detail_meshes[:, 3] for tile in self.tiles]))

    @cached_property
    def detail_triangles(self) -> NDArray[np.int32]:
        """Vertices and edge flags (see :class:`NavMeshTile`) of each detail triangle, by polygon: (T, 4)."""
        corner_offsets = _offsets([len(tile.vertices) for tile in self.tiles])
        extra_offsets = _offsets([len(tile.detail_vertices) for tile in self.tiles]) + corner_offsets[-1]
        parts = []
        for tile, corner_offset, extra_offset in zip(self.tiles, corner_offsets, extra_offsets, strict=False):
            counts = tile.detail_meshes[:, 3]
            owner = np.repeat(np.arange(len(counts)), counts)
            row = (
                np.arange(len(owner))
                - np.repeat(_offsets(counts)[:-1], counts)
                + tile.detail_meshes[owner, 2]
            )
            local = tile.detail_triangles[row, :3].astype(np.int32)
            size = (tile.polygons[owner] >= 0).sum(1)[:, None]
            own = np.take_along_axis(tile.polygons[owner], np.minimum(local, size - 1), 1) + corner_offset
            extra = local - size + tile.detail_meshes[owner, :1] + extra_offset
            flags = tile.detail_triangles[row, 3:].astype(np.int32)
            parts.append(np.concatenate([np.where(local < size, own, extra), flags], 1))
        return np.concatenate(parts).astype(np.int32)

    @cached_property
    def areas(self) -> NDArray[np.float32]:
        """Area of each polygon's detail triangles: (P,) [m2]."""
        corners = self.vertices[self.detail_triangles[:, :3]].astype(np.float64)
        cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 1])
        summed = np.concatenate([[0.0], np.cumsum(0.5 * np.linalg.norm(cross, axis=1))])
        return np.diff(summed[self.detail_starts]).astype(np.float32)

    @cached_property
    def walkable(self) -> NDArray[np.bool_]:
        """Whether each polygon can be walked on; Habitat disables those without area: (P,)."""
        return self._flagged & (self.areas >= _MIN_POLYGON_AREA)

    @cached_property
    def _flagged(self) -> NDArray[np.bool_]:
        return (np.concatenate([tile.flags for tile in self.tiles]) & WALKABLE_FLAG) != 0

    @cached_property
    def links(self) -> NavMeshLinks:
        """Ways from polygon to polygon, walkable or not."""
        return _connect(self)

    @cached_property
    def neighbours(self) -> NDArray[np.int32]:
        """Polygon across each edge (the first of several at a tile's border), -1 for a wall: (P, 6)."""
        neighbours = np.full(self.polygons.shape, -1, np.int32)
        owner = np.repeat(np.arange(len(self.polygons)), np.diff(self.links.start))
        open_links = self.walkable[self.links.target]
        # Written last to first, so that the first link of an edge stays.
        order = np.flatnonzero(open_links)[::-1]
        neighbours[owner[order], self.links.edge[order]] = self.links.target[order]
        return neighbours

    @cached_property
    def islands(self) -> NDArray[np.int32]:
        """Connected area that each polygon belongs to: (P,)."""
        # As Habitat's: a search from each polygon not reached yet, which does not enter polygons that are not
        # floor, run before polygons without area are disabled.
        island = np.full(len(self.polygons), -1, np.int32)
        starts, targets, floor = self.links.start.tolist(), self.links.target.tolist(), self._flagged
        count = 0
        for first in range(len(island)):
            if island[first] >= 0:
                continue
            island[first] = count
            stack = [first]
            while stack:
                polygon = stack.pop()
                for target in targets[starts[polygon] : starts[polygon + 1]]:
                    if island[target] < 0 and floor[target]:
                        island[target] = count
                        stack.append(target)
            count += 1
        return island

    @cached_property
    def island_radii(self) -> NDArray[np.float32]:
        """Largest distance of an island's corners from their mean: (islands,) [m]."""
        corner = self.polygons >= 0
        island = np.repeat(self.islands, self.sizes)
        points = self.vertices[self.polygons[corner]].astype(np.float64)
        count = np.bincount(island)
        centre = np.stack([np.bincount(island, points[:, axis]) / count for axis in range(3)], 1)
        radii = np.zeros(len(count), np.float32)
        np.maximum.at(radii, island, np.linalg.norm(points - centre[island], axis=1).astype(np.float32))
        return radii

    @property
    def navigable_area(self) -> float:
        """Area that can be walked on [m2]."""
        return float(self.areas[self.walkable].sum(dtype=np.float64))


def read_navmesh(path: str | Path) -> NavMesh:
    """Reads Habitat's ``.navmesh``, version 1 or 2.

    Raises:
        NavMeshError: The file is absent, truncated, of another kind, or inconsistent; names file and fault.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NavMeshError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return _parse(data)
    except NavMeshError as error:
        raise NavMeshError(f"{path}: {error}") from error


def write_navmesh(navmesh: NavMesh, path: str | Path) -> None:
    """Writes Habitat's ``.navmesh``, version 2, whole or not at all.

    Raises:
        NavMeshError: The mesh is too large for the format, which counts vertices and polygons of a tile in 16
            bits and the detail triangles of a polygon in 8.
    """
    tiles = []
    tile_bits = _bits(navmesh.max_tiles)
    polygon_bits = _bits(navmesh.max_polygons)
    for number, tile in enumerate(navmesh.tiles):
        reference = tile.reference or (1 << (tile_bits + polygon_bits)) | (number << polygon_bits)
        body = _pack_tile(tile, reference, f"tile {number}")
        tiles.append(_TILE_PREFIX.pack(reference, len(body)) + body)
    header = _SET_HEADER.pack(
        _SET_MAGIC,
        _SET_VERSION,
        len(tiles),
        *navmesh.origin,
        *navmesh.tile_size,
        navmesh.max_tiles,
        navmesh.max_polygons,
    )
    with atomic_write(path) as temporary:
        temporary.write_bytes(header + _SETTINGS.pack(*astuple(navmesh.settings)) + b"".join(tiles))


def _bits(count: int) -> int:
    """Bits that number ``count`` things, as Detour lays out its references."""
    return max(count - 1, 0).bit_length()


def _offsets(counts: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int32]:
    """Where each of several runs begins that lie end to end, and the length of all."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


class _Reader:
    """Takes records from a buffer, never past its end."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._position = 0

    def take(self, size: int, what: str) -> memoryview:
        left = len(self._data) - self._position
        if size < 0 or size > left:
            raise NavMeshError(f"{what} needs {size} bytes, but the file has {left} left (truncated?)")
        part = self._data[self._position : self._position + size]
        self._position += size
        return part

    def array(self, dtype: np.dtype, count: int, what: str) -> NDArray:
        if count < 0:
            raise NavMeshError(f"{what}: the count {count} is negative")
        # Records are aligned to four bytes, as Detour lays them out.
        part = self.take((dtype.itemsize * count + 3) // 4 * 4, what)
        return np.frombuffer(part, dtype, count)


def _parse(data: bytes) -> NavMesh:
    reader = _Reader(data)
    magic, version, num_tiles, *numbers = _SET_HEADER.unpack(reader.take(_SET_HEADER.size, "the header"))
    if magic != _SET_MAGIC:
        raise NavMeshError(f"starts with {data[:4]!r}, a navigation mesh starts with b'TESM'")
    if not 1 <= version <= _SET_VERSION:
        raise NavMeshError(f"is of version {version}, only 1 and 2 can be read")
    origin, tile_size, max_tiles, max_polygons = numbers[:3], numbers[3:5], numbers[5], numbers[6]
    if not np.isfinite(numbers[:5]).all() or tile_size[0] <= 0 or tile_size[1] <= 0:
        raise NavMeshError(f"the tile grid is at {origin} with tiles of {tile_size} m")
    settings = None
    if version >= 2:
        settings = NavMeshSettings(*_SETTINGS.unpack(reader.take(_SETTINGS.size, "the settings")))
        if not np.isfinite(astuple(settings)).all():
            raise NavMeshError(f"the settings hold numbers that are not finite: {settings}")
    tiles = []
    for number in range(num_tiles):
        reference, size = _TILE_PREFIX.unpack(reader.take(_TILE_PREFIX.size, f"the header of tile {number}"))
        if reference == 0 or size == 0:  # Habitat stops here too.
            break
        body = reader.take(size, f"tile {number}")
        tiles.append(_unpack_tile(_Reader(bytes(body)), reference, f"tile {number}"))
    if not tiles:
        raise NavMeshError("holds no tiles")
    if settings is None:
        tile = tiles[0]
        settings = NavMeshSettings(
            cell_size=1.0 / tile.tree_scale,
            agent_height=tile.walkable_height,
            agent_radius=tile.walkable_radius,
            agent_max_climb=tile.walkable_climb,
        )
    return NavMesh(
        settings=settings,
        tiles=tuple(tiles),
        origin=(origin[0], origin[1], origin[2]),
        tile_size=(tile_size[0], tile_size[1]),
        max_tiles=max_tiles,
        max_polygons=max_polygons,
    )


def _unpack_tile(reader: _Reader, reference: int, name: str) -> NavMeshTile:
    header = _TILE_HEADER.unpack(reader.take(_TILE_HEADER.size, f"{name}: the header"))
    magic, version, x, y, layer, user_id = header[:6]
    num_polygons, num_vertices, num_links, num_details, num_detail_vertices = header[6:11]
    num_triangles, num_nodes, num_connections, _ = header[11:15]
    if magic != _TILE_MAGIC:
        raise NavMeshError(f"{name}: the magic number is {magic & 0xFFFFFFFF:#x} instead of {_TILE_MAGIC:#x}")
    if version != _TILE_VERSION:
        raise NavMeshError(f"{name}: is of Detour version {version}, only {_TILE_VERSION} can be read")
    if num_connections != 0:
        raise NavMeshError(f"{name}: has {num_connections} off-mesh connections, which Habitat does not use")
    if num_details != num_polygons:
        raise NavMeshError(f"{name}: has {num_details} detail meshes for {num_polygons} polygons")
    three = np.dtype(("<f4", 3))
    vertices = reader.array(three, num_vertices, f"{name}: {num_vertices} vertices")
    polygons = reader.array(_POLYGON, num_polygons, f"{name}: {num_polygons} polygons")
    reader.array(_LINK, num_links, f"{name}: {num_links} links")
    details = reader.array(_DETAIL, num_details, f"{name}: {num_details} detail meshes")
    detail_vertices = reader.array(
        three, num_detail_vertices, f"{name}: {num_detail_vertices} detail vertices"
    )
    triangles = reader.array(np.dtype(("u1", 4)), num_triangles, f"{name}: {num_triangles} detail triangles")
    nodes = reader.array(_TREE_NODE, num_nodes, f"{name}: {num_nodes} tree nodes")
    if (polygons["area_and_type"] >> 6).any():
        raise NavMeshError(f"{name}: has polygons that are off-mesh connections, which Habitat does not use")
    if (polygons["size"] > MAX_CORNERS).any():
        raise NavMeshError(f"{name}: a polygon has {polygons['size'].max()} corners, at most 6 are possible")
    inside = np.arange(MAX_CORNERS) < polygons["size"][:, None]
    tile = NavMeshTile(
        vertices=vertices.astype(np.float32),
        polygons=np.where(inside, polygons["vertices"].astype(np.int32), -1),
        edges=np.where(inside, polygons["edges"], 0).astype(np.uint16),
        flags=polygons["flags"].astype(np.uint16),
        area_types=(polygons["area_and_type"] & 0x3F).astype(np.uint8),
        detail_meshes=np.stack(
            [details[key].astype(np.int64) for key in ("vertex_base", "vertex_count", "triangle_base")]
            + [details["triangle_count"].astype(np.int64)],
            1,
        )
        .clip(max=2**31 - 1)
        .astype(np.int32),
        detail_vertices=detail_vertices.astype(np.float32),
        detail_triangles=triangles.astype(np.uint8),
        bounds=np.array(header[18:24], np.float32).reshape(2, 3),
        walkable_height=header[15],
        walkable_radius=header[16],
        walkable_climb=header[17],
        tree=np.concatenate([nodes["low"], nodes["high"], nodes["index"][:, None]], 1).astype(np.int32),
        tree_scale=header[24],
        x=x,
        y=y,
        layer=layer,
        user_id=user_id,
        reference=reference,
    )
    _check_tile(tile, name)
    if num_nodes == 0:
        tile = replace(tile, tree=_build_tree(tile))
    return tile


def _check_tile(tile: NavMeshTile, name: str) -> None:
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
    rows = np.repeat(details[:, 2] - _offsets(counts)[:-1], counts) + np.arange(counts.sum())
    if (tile.detail_triangles[rows, :3].max(1) >= np.repeat(sizes + details[:, 1], counts)).any():
        raise NavMeshError(f"{name}: a detail triangle names a vertex that its polygon does not have")
    if len(tile.tree) and (tile.tree[:, 6].max() >= num_polygons):
        raise NavMeshError(f"{name}: the tree names polygon {tile.tree[:, 6].max()} of {num_polygons}")


def _check_winding(tile: NavMeshTile) -> None:
    corners = tile.vertices[np.where(tile.polygons >= 0, tile.polygons, tile.polygons[:, :1])].astype(
        np.float64
    )
    following = np.roll(corners, -1, axis=1)
    areas = (corners[..., 2] * following[..., 0] - corners[..., 0] * following[..., 2]).sum(1) / 2
    if (areas < -_MIN_POLYGON_AREA).any():
        raise NavMeshError(
            f"polygon {int(areas.argmin())} is wound clockwise seen from above; reverse its corners and edges"
        )


def _fan_triangles(sizes: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
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
    meshes[:, 2], meshes[:, 3] = _offsets(counts)[:-1], counts
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


def _build_tree(tile: NavMeshTile) -> NDArray[np.int32]:
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


def _pack_tile(tile: NavMeshTile, reference: int, name: str) -> bytes:
    num_polygons = len(tile.polygons)
    if len(tile.vertices) >= 0xFFFF or num_polygons > _MAX_POLYGONS:
        raise NavMeshError(
            f"{name}: {len(tile.vertices)} vertices and {num_polygons} polygons are too many for the file "
            f"format, which holds {0xFFFE} and {_MAX_POLYGONS}; build with larger cells"
        )
    if (tile.detail_meshes[:, [1, 3]] > 0xFF).any():
        raise NavMeshError(f"{name}: a polygon has more than 255 detail vertices or triangles")
    sizes = (tile.polygons >= 0).sum(1)
    external = (tile.edges & EXTERNAL_EDGE) != 0
    polygons = np.zeros(num_polygons, _POLYGON)
    polygons["vertices"] = np.maximum(tile.polygons, 0)
    polygons["edges"] = tile.edges
    polygons["flags"] = tile.flags
    polygons["size"] = sizes
    polygons["area_and_type"] = tile.area_types
    # Detour makes the links anew when it opens the file; what it needs is room for them. They are written as
    # it leaves them, one list a polygon, allocated from the last edge to the first.
    links = np.zeros(int(sizes.sum() + 2 * external.sum()), _LINK)
    links["next"] = np.arange(1, len(links) + 1)
    links["next"][-1] = _NO_LINK
    used = 0
    for polygon in range(num_polygons):
        first = _NO_LINK
        for edge in range(int(sizes[polygon]) - 1, -1, -1):
            if tile.edges[polygon, edge] != 0 and not external[polygon, edge]:
                target = reference | (int(tile.edges[polygon, edge]) - 1)
                links[used] = (target, first, edge, 0xFF, 0, 0)
                first = used
                used += 1
        polygons["first_link"][polygon] = first
    details = np.zeros(num_polygons, _DETAIL)
    for column, key in enumerate(("vertex_base", "vertex_count", "triangle_base", "triangle_count")):
        details[key] = tile.detail_meshes[:, column]
    nodes = np.zeros(len(tile.tree), _TREE_NODE)
    nodes["low"], nodes["high"], nodes["index"] = tile.tree[:, :3], tile.tree[:, 3:6], tile.tree[:, 6]
    header = _TILE_HEADER.pack(
        _TILE_MAGIC,
        _TILE_VERSION,
        tile.x,
        tile.y,
        tile.layer,
        tile.user_id,
        num_polygons,
        len(tile.vertices),
        len(links),
        num_polygons,
        len(tile.detail_vertices),
        len(tile.detail_triangles),
        len(nodes),
        0,
        num_polygons,
        tile.walkable_height,
        tile.walkable_radius,
        tile.walkable_climb,
        *tile.bounds.ravel().tolist(),
        tile.tree_scale,
    )
    parts = (tile.vertices, polygons, links, details, tile.detail_vertices, tile.detail_triangles, nodes)
    return header + b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


def _connect(navmesh: NavMesh) -> NavMeshLinks:
    """Links inside tiles by their edges, and across borders wherever two open edges overlap."""
    # Per polygon, Detour lists links across borders, latest first, before those inside the tile, by edge.
    inside: list[list[tuple[int, int, int, int, int]]] = [[] for _ in range(len(navmesh.polygons))]
    across: list[list[tuple[int, int, int, int, int]]] = [[] for _ in range(len(navmesh.polygons))]
    for tile, offset in zip(navmesh.tiles, navmesh.polygon_offsets.tolist(), strict=False):
        internal = (tile.edges != 0) & ((tile.edges & EXTERNAL_EDGE) == 0)
        for polygon, edge in np.argwhere(internal).tolist():
            target = offset + int(tile.edges[polygon, edge]) - 1
            inside[offset + polygon].append((target, edge, 0, 255, 0))
    if len(navmesh.tiles) > 1:
        _connect_borders(navmesh, across)
    rows = [list(reversed(a)) + b for a, b in zip(across, inside, strict=True)]
    flat = np.array([link for row in rows for link in row], np.int32).reshape(-1, 5)
    columns = [np.ascontiguousarray(flat[:, column]) for column in range(5)]
    return NavMeshLinks(_offsets([len(row) for row in rows]), *columns)


# Neighbouring column and row on each of a tile's eight sides.
_SIDES = ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1))


def _connect_borders(navmesh: NavMesh, across: list[list[tuple[int, int, int, int, int]]]) -> None:
    """Adds links across tile borders, in the order in which Detour would while adding tile after tile."""
    # Open edges of each tile by side: polygon, edge and the two ends.
    borders: list[dict[int, list[tuple[int, int, NDArray[np.float32], NDArray[np.float32]]]]] = []
    for tile in navmesh.tiles:
        sides: dict[int, list[tuple[int, int, NDArray[np.float32], NDArray[np.float32]]]] = {}
        for polygon, edge in np.argwhere((tile.edges & EXTERNAL_EDGE) != 0).tolist():
            size = int((tile.polygons[polygon] >= 0).sum())
            ends = tile.vertices[tile.polygons[polygon, [edge, (edge + 1) % size]]]
            side = int(tile.edges[polygon, edge]) & 0xFF
            sides.setdefault(side, []).append((polygon, edge, ends[0], ends[1]))
        borders.append(sides)

    def link(source: int, target: int, only_side: int | None) -> None:
        climb = navmesh.tiles[target].walkable_climb
        offset, target_offset = navmesh.polygon_offsets[[source, target]].tolist()
        edges = [(s, *e) for s, es in borders[source].items() for e in es if only_side in (None, s)]
        for side, polygon, edge, a, b in sorted(edges, key=lambda e: (e[1], e[2])):
            found: dict[int, tuple[float, float]] = {}
            for other, _, c, d in borders[target].get((side + 4) % 8, []):
                overlap = _overlap(side, a, b, c, d, climb)
                if overlap is not None and other not in found and len(found) < 4:
                    found[other] = overlap
            along = 2 if side in (0, 4) else 0
            for other, (low, high) in found.items():
                ends = sorted((t - a[along]) / (b[along] - a[along]) for t in (low, high))
                span = [int(np.floor(np.clip(end, 0.0, 1.0) * 255.0 + 0.5)) for end in ends]
                across[offset + polygon].append((target_offset + other, edge, span[0], span[1], side >> 1))

    earlier: dict[tuple[int, int], list[int]] = {}
    for new, tile in enumerate(navmesh.tiles):
        for side in (None, *range(8)):
            step = (0, 0) if side is None else _SIDES[side]
            for old in earlier.get((tile.x + step[0], tile.y + step[1]), []):
                link(new, old, side)
                link(old, new, None if side is None else (side + 4) % 8)
        earlier.setdefault((tile.x, tile.y), []).append(new)


def _overlap(
    side: int,
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    c: NDArray[np.float32],
    d: NDArray[np.float32],
    climb: float,
) -> tuple[float, float] | None:
    """Where edges a-b and c-d of facing borders overlap along the border, if an agent could step across."""
    across, along = (0, 2) if side in (0, 4) else (2, 0)
    if abs(float(a[across]) - float(c[across])) > 0.01:
        return None
    (a0, a1), (c0, c1) = (sorted(pair, key=lambda p: float(p[along])) for pair in ((a, b), (c, d)))
    # Shrunk a little, so that edges which only touch at their ends are not connected.
    low = max(float(a0[along]), float(c0[along])) + 0.01
    high = min(float(a1[along]), float(c1[along])) - 0.01
    if low > high:
        return None

    def height(start: NDArray[np.float32], end: NDArray[np.float32], at: float) -> float:
        part = (at - float(start[along])) / (float(end[along]) - float(start[along]))
        return float(start[1]) + part * (float(end[1]) - float(start[1]))

    at_low = height(c0, c1, low) - height(a0, a1, low)
    at_high = height(c0, c1, high) - height(a0, a1, high)
    if at_low * at_high >= 0 and min(abs(at_low), abs(at_high)) > 2 * climb:
        return None
    return max(float(a0[along]), float(c0[along])), min(float(a1[along]), float(c1[along]))
