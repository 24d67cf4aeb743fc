"""Habitat's ``.navmesh`` files.

They hold the tiles of a navigation mesh in the layout of ``dtNavMesh`` version 7 of Recast Navigation
(https://github.com/recastnavigation/recastnavigation) behind a header of Habitat's own with the settings that
the mesh was built with.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from envs.files import atomic_write
from envs.scenes.navmesh import NavMesh, NavMeshSettings
from envs.scenes.navmesh_tile import (
    EXTERNAL_EDGE,
    MAX_CORNERS,
    MAX_POLYGONS,
    NavMeshError,
    NavMeshTile,
    build_tree,
    check_tile,
)

_NO_LINK = 0xFFFFFFFF

_SET_MAGIC = 0x4D534554  # "MSET"
_SET_VERSION = 2
_TILE_MAGIC = 0x444E4156  # "DNAV"
_TILE_VERSION = 7

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
    check_tile(tile, name)
    if num_nodes == 0:
        tile = replace(tile, tree=build_tree(tile))
    return tile


def _pack_tile(tile: NavMeshTile, reference: int, name: str) -> bytes:
    num_polygons = len(tile.polygons)
    if len(tile.vertices) >= 0xFFFF or num_polygons > MAX_POLYGONS:
        raise NavMeshError(
            f"{name}: {len(tile.vertices)} vertices and {num_polygons} polygons are too many for the file "
            f"format, which holds {0xFFFE} and {MAX_POLYGONS}; build with larger cells"
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
