"""Navigation meshes: polygons to walk on, what joins them, and what they were built with.

A navigation mesh is a floor made of convex polygons with at most six corners that share edges. Habitat stores
it as a set of Detour tiles (nearly always one). The same layout is kept in memory, one
:class:`~envs.scenes.navmesh_tile.NavMeshTile` a tile, and :class:`NavMesh` offers the tiles merged into one
graph. :mod:`envs.scenes.navmesh_file` reads and writes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from envs.scenes.navmesh_links import NavMeshLinks, connect
from envs.scenes.navmesh_tile import (
    MAX_CORNERS,
    MAX_POLYGONS,
    MIN_POLYGON_AREA,
    WALKABLE_FLAG,
    NavMeshError,
    NavMeshTile,
    build_tree,
    check_tile,
    check_winding,
    fan_triangles,
    offsets_of,
)


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
            check_tile(tile, f"tile {number}")

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
        if len(polygons) > MAX_POLYGONS:
            raise NavMeshError(
                f"{len(polygons)} polygons are too many for one tile, which holds {MAX_POLYGONS}; "
                "build with larger cells"
            )
        if neighbours.shape != polygons.shape:
            raise NavMeshError(
                f"neighbours {neighbours.shape} must have the polygons' shape {polygons.shape}"
            )
        if detail_meshes is None or detail_vertices is None or detail_triangles is None:
            detail_meshes, detail_triangles = fan_triangles((polygons >= 0).sum(1))
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
        check_tile(tile, "the mesh")
        check_winding(tile)
        tile = replace(tile, tree=build_tree(tile))
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
        return offsets_of([len(tile.polygons) for tile in self.tiles])

    @cached_property
    def vertices(self) -> NDArray[np.float32]:
        """Polygon corners of all tiles, then the extra vertices of the detail triangles: (V + D, 3) [m]."""
        corners = [tile.vertices for tile in self.tiles]
        return np.concatenate(corners + [tile.detail_vertices for tile in self.tiles])

    @cached_property
    def polygons(self) -> NDArray[np.int32]:
        """Vertices of each polygon, counter-clockwise seen from above, -1 behind the last: (P, 6)."""
        offsets = offsets_of([len(tile.vertices) for tile in self.tiles])
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
        return offsets_of(np.concatenate([tile.detail_meshes[:, 3] for tile in self.tiles]))

    @cached_property
    def detail_triangles(self) -> NDArray[np.int32]:
        """Vertices and edge flags (see :class:`NavMeshTile`) of each detail triangle, by polygon: (T, 4)."""
        corner_offsets = offsets_of([len(tile.vertices) for tile in self.tiles])
        extra_offsets = offsets_of([len(tile.detail_vertices) for tile in self.tiles]) + corner_offsets[-1]
        parts = []
        for tile, corner_offset, extra_offset in zip(self.tiles, corner_offsets, extra_offsets, strict=False):
            counts = tile.detail_meshes[:, 3]
            owner = np.repeat(np.arange(len(counts)), counts)
            row = (
                np.arange(len(owner))
                - np.repeat(offsets_of(counts)[:-1], counts)
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
        return self._flagged & (self.areas >= MIN_POLYGON_AREA)

    @cached_property
    def _flagged(self) -> NDArray[np.bool_]:
        return (np.concatenate([tile.flags for tile in self.tiles]) & WALKABLE_FLAG) != 0

    @cached_property
    def links(self) -> NavMeshLinks:
        """Ways from polygon to polygon, walkable or not."""
        return connect(self.tiles)

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
