"""Batched questions about navigation meshes: where agents can stand, how far things are, how moves end."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import warp as wp
from numpy.typing import NDArray
from torch import Tensor

from envs.scenes import detour_mesh, detour_moves, detour_paths
from envs.scenes.detour_mesh import Meshes, Scratch
from envs.scenes.navmesh import NavMesh
from envs.simulators.common import check_queries
from envs.warp_runtime import start_warp

# Nodes that Habitat gives a search; longer searches count as failed there, and so here.
_MAX_NODES = 2048
# Side of a cell of the grid that finds polygons near a point [m], where the mesh is not huge.
_CELL_SIZE = 0.5
# Entries of a grid that are always allowed, besides 64 a polygon.
_GRID_ENTRIES = 1_000_000
# Fewer queries than this, about half a millisecond, are not worth a thread of their own.
_MIN_QUERIES_PER_THREAD = 512
# Searches at a time on a GPU, each with about 100 kB of scratch memory.
_GPU_WORKERS = 2048


class PathFinder:
    """Navigation queries over several meshes, answered as Habitat's path finder does (``PathQueries``).

    Row ``i`` of a batch asks mesh ``scene[i]``; rows do not influence each other. On the CPU a large batch is
    split over threads; calls from several threads wait for each other.

    Args:
        navmeshes: The meshes that ``scene`` indexes.
        device: Where inputs and outputs live, and where queries run.
        num_threads: Threads that large batches are split over on the CPU.

    Example::

        paths = PathFinder([read_navmesh("apartment.navmesh")])
        scene = torch.zeros(2, dtype=torch.int64)
        start = paths.sample(scene, torch.Generator().manual_seed(0))
        end = paths.try_step(scene, start, start + torch.tensor([0.25, 0.0, 0.0]), allow_sliding=True)
    """

    device: torch.device
    """Where inputs and outputs live."""
    navmeshes: tuple[NavMesh, ...]
    """The meshes that ``scene`` indexes."""

    def __init__(
        self, navmeshes: Sequence[NavMesh], device: str | torch.device = "cpu", num_threads: int = 2
    ) -> None:
        if not navmeshes:
            raise ValueError("PathFinder needs at least one navigation mesh, got none")
        if num_threads < 1:
            raise ValueError(f"num_threads {num_threads} must be at least 1")
        self.navmeshes = tuple(navmeshes)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        start_warp()
        self._warp_device = wp.device_from_torch(self.device)
        self._num_threads = num_threads if self.device.type == "cpu" else 1
        self._executor: ThreadPoolExecutor | None = None
        self._executor_process = 0
        self._lock = threading.Lock()
        # Compiled here (once a machine; then cached on disk), before threads could all try to.
        block = 1 if self.device.type == "cpu" else 256
        for module in (detour_mesh, detour_moves, detour_paths):
            wp.load_module(module, device=self._warp_device, block_dim=block)
        self._meshes = _upload(self.navmeshes, self._warp_device)
        # A search has a node for each polygon, or one for each of a polygon's four crossings between tiles.
        most = max(len(m.polygons) * (4 if len(m.tiles) > 1 else 1) for m in self.navmeshes)
        self._num_nodes = max(detour_moves.MAX_MOVE_NODES, min(_MAX_NODES, most))
        self._scratch = self._make_scratch(self._num_threads)
        self._island_radius = wp.to_torch(self._meshes.island_radius)
        self._polygon_island = wp.to_torch(self._meshes.island).long()
        self._surface = _surface(self.navmeshes, self.device)

    def is_navigable(self, scene: Tensor, points: Tensor, max_y_delta: float = 0.5) -> Tensor:
        """Whether an agent can stand at each point, at most ``max_y_delta`` [m] above or below: (N,) bool."""
        polygon, closest = self._project(scene, points)
        beside = torch.linalg.vector_norm((points - closest)[:, [0, 2]], dim=1)
        return (polygon >= 0) & ((points - closest)[:, 1].abs() <= max_y_delta) & (beside <= 1e-2)

    def snap(self, scene: Tensor, points: Tensor) -> Tensor:
        """Closest navigable point: (N, 3) float32 [m], NaN where none is within 2 m (4 m up or down)."""
        polygon, closest = self._project(scene, points)
        return torch.where((polygon >= 0)[:, None], closest, torch.nan)

    def island_radius(self, scene: Tensor, points: Tensor) -> Tensor:
        """Radius of the connected area that each point lies in: (N,) float32 [m], 0 off the mesh."""
        polygon, _ = self._project(scene, points)
        radius = self._island_radius[self._polygon_island[polygon.clamp(min=0).long()]]
        return torch.where(polygon >= 0, radius, 0.0)

    def distance_to_obstacle(self, scene: Tensor, points: Tensor, max_distance: float = 2.0) -> Tensor:
        """Distance to the closest obstacle: (N,) float32 [m].

        At most ``max_distance``, and infinite where there is no floor near, as Habitat has it.
        """
        if not 0.0 <= max_distance < float("inf"):
            raise ValueError(f"max_distance {max_distance} must be a finite number of metres, at least 0")
        scene, points = self._checked(scene, points=points)
        distance = torch.empty(len(scene), device=self.device)
        self._launch(
            detour_paths.obstacle_kernel,
            len(scene),
            [_view(scene), _points(points), float(max_distance), _view(distance)],
        )
        return distance

    def geodesic_distance(self, scene: Tensor, start: Tensor, goal: Tensor) -> Tensor:
        """Length of the shortest walkable path: (N,) float32 [m], infinite where there is none."""
        return self._paths(scene, start, goal, 0)[0]

    def path(
        self, scene: Tensor, start: Tensor, goal: Tensor, max_points: int = 128
    ) -> tuple[Tensor, Tensor]:
        """Corners of the shortest path, start and goal included.

        Returns:
            Points (N, max_points, 3) float32 [m], zero behind the last, and how many of them count (N,)
            int64, 0 where there is no path. A path of more corners keeps its first ``max_points``.
        """
        if max_points < 2:
            raise ValueError(f"max_points {max_points} must be at least 2, for start and goal")
        _, count, points = self._paths(scene, start, goal, max_points)
        return points, count.clamp(max=max_points)

    def try_step(self, scene: Tensor, start: Tensor, target: Tensor, allow_sliding: bool) -> Tensor:
        """Where a move from start straight to target ends: (N, 3) float32 [m].

        A move between unconnected areas, or off the mesh altogether, stays at the start.
        """
        scene, start, target = self._checked(scene, start=start, target=target)
        end = torch.empty_like(start)
        self._launch(
            detour_moves.step_kernel,
            len(scene),
            [_view(scene), _points(start), _points(target), bool(allow_sliding), _points(end)],
        )
        return end

    def sample(self, scene: Tensor, generator: torch.Generator) -> Tensor:
        """A navigable point for each row, drawn uniformly by area: (N, 3) float32 [m]."""
        (scene,) = self._checked(scene)
        surface = self._surface
        drawn = torch.rand((3, len(scene)), generator=generator, device=generator.device, dtype=torch.float64)
        drawn = drawn.to(self.device)
        low, high = surface.area[surface.start[scene]], surface.area[surface.start[scene + 1]]
        if bool((high <= low).any()):
            raise ValueError(f"scene {int(scene[high <= low][0])} has no walkable area to draw points from")
        triangle = torch.searchsorted(surface.area, low + drawn[0] * (high - low), right=True) - 1
        triangle = triangle.clamp(min=surface.start[scene], max=surface.start[scene + 1] - 1)
        corners = surface.corners[triangle]
        # A square root spreads points evenly over a triangle.
        root = drawn[1].sqrt()[:, None]
        side = drawn[2][:, None]
        point = (1 - root) * corners[:, 0] + root * ((1 - side) * corners[:, 1] + side * corners[:, 2])
        return point.float()

    def _paths(
        self, scene: Tensor, start: Tensor, goal: Tensor, max_points: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        scene, start, goal = self._checked(scene, start=start, goal=goal)
        distance = torch.empty(len(scene), device=self.device)
        count = torch.empty(len(scene), dtype=torch.int64, device=self.device)
        points = torch.zeros((len(scene), max_points, 3), device=self.device)
        # Warp cannot view a tensor without elements.
        none = wp.empty((1, 0), dtype=wp.vec3, device=self._warp_device)
        corners = _points(points) if points.numel() else none
        self._launch(
            detour_paths.path_kernel,
            len(scene),
            [_view(scene), _points(start), _points(goal), _view(distance), _view(count), corners],
        )
        return distance, count, points

    def _project(self, scene: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        scene, points = self._checked(scene, points=points)
        polygon = torch.empty(len(scene), dtype=torch.int32, device=self.device)
        closest = torch.empty_like(points)
        self._launch(
            detour_mesh.project_kernel,
            len(scene),
            [_view(scene), _points(points), _view(polygon), _points(closest)],
        )
        return polygon, closest

    def _checked(self, scene: Tensor, **points: Tensor) -> list[Tensor]:
        return check_queries(self.device, len(self.navmeshes), scene, **points)

    def _launch(self, kernel: wp.Kernel, count: int, arguments: list) -> None:
        """Runs a kernel over all queries, on the GPU at once, on the CPU split over threads."""
        if count == 0:
            return
        searches = kernel is not detour_mesh.project_kernel
        with self._lock:
            if self.device.type == "cuda":
                workers = min(count, _GPU_WORKERS)
                if searches and self._scratch.table.shape[0] < workers:
                    self._scratch = self._make_scratch(workers)
                scratch = [self._scratch, 0] if searches else []
                with wp.ScopedStream(wp.stream_from_torch(torch.cuda.current_stream(self.device))):
                    wp.launch(
                        kernel,
                        workers,
                        [self._meshes, *scratch, workers, 0, count, *arguments],
                        device=self._warp_device,
                        record_tape=False,
                    )
                return

            def run(worker: int, first: int, last: int) -> None:
                scratch = [self._scratch, worker] if searches else []
                wp.launch(
                    kernel,
                    1,
                    [self._meshes, *scratch, 1, first, last, *arguments],
                    device=self._warp_device,
                    record_tape=False,
                )

            threads = max(1, min(self._num_threads, count // _MIN_QUERIES_PER_THREAD))
            edges = [count * part // threads for part in range(threads + 1)]
            # The last part runs here.
            started = [
                self._pool().submit(run, worker, edges[worker], edges[worker + 1])
                for worker in range(threads - 1)
            ]
            run(threads - 1, edges[-2], edges[-1])
            for part in started:
                part.result()

    def _pool(self) -> ThreadPoolExecutor:
        # Threads do not survive a fork; a child process needs its own.
        if self._executor is None or self._executor_process != os.getpid():
            self._executor = ThreadPoolExecutor(self._num_threads, thread_name_prefix="pathfinder")
            self._executor_process = os.getpid()
        return self._executor

    def _make_scratch(self, workers: int) -> Scratch:
        scratch = Scratch()
        nodes = self._num_nodes
        table = 2 << (nodes - 1).bit_length()

        def room(dtype: type, width: int = nodes) -> wp.array:
            return wp.zeros((workers, width), dtype=dtype, device=self._warp_device)

        for name in ("polygon", "key", "parent", "flags", "slot", "heap"):
            setattr(scratch, name, room(wp.int32))
        scratch.cost, scratch.total = room(wp.float32), room(wp.float32)
        scratch.position = room(wp.vec3)
        scratch.table = wp.full((workers, table), -1, dtype=wp.int32, device=self._warp_device)
        scratch.corridor = room(wp.int32, detour_paths.MAX_CORRIDOR)
        return scratch


@dataclass(frozen=True)
class _Surface:
    """Walkable detail triangles of all scenes, for sampling."""

    corners: Tensor
    """(T, 3, 3) float64 [m]."""
    area: Tensor
    """Area of all triangles before each, and of all of them: (T + 1,) float64 [m2]."""
    start: Tensor
    """First triangle of each scene, and the number of triangles: (scenes + 1,) int64."""


def _surface(navmeshes: Sequence[NavMesh], device: torch.device) -> _Surface:
    corners, counts = [], []
    for mesh in navmeshes:
        walkable = np.repeat(mesh.walkable, np.diff(mesh.detail_starts))
        corners.append(mesh.vertices[mesh.detail_triangles[walkable, :3]].astype(np.float64))
        counts.append(len(corners[-1]))
    points = torch.from_numpy(np.concatenate(corners)).to(device)
    area = torch.linalg.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]).norm(dim=1) / 2
    zero = torch.zeros(1, dtype=torch.float64, device=device)
    return _Surface(
        corners=points,
        area=torch.cat([zero, area.cumsum(0)]),
        start=torch.tensor([0, *np.cumsum(counts).tolist()], device=device),
    )


def _view(tensor: Tensor, dtype: type | None = None) -> Any:
    """A tensor's memory as a Warp kernel takes it; the tensor has to outlive the launch."""
    return wp.from_torch(tensor, dtype=dtype, return_ctype=True)


def _points(tensor: Tensor) -> Any:
    return _view(tensor, wp.vec3)


def _upload(navmeshes: Sequence[NavMesh], device: wp.Device) -> Meshes:
    """All meshes end to end on the device."""
    parts: dict[str, list[NDArray]] = {}
    total = dict.fromkeys(("vertex", "polygon", "tile", "link", "detail", "island", "cell", "entry"), 0)
    for mesh in navmeshes:
        arrays = _mesh_arrays(mesh, total)
        for name, array in arrays.items():
            parts.setdefault(name, []).append(array)
        total["vertex"] += len(mesh.vertices)
        total["polygon"] += len(mesh.polygons)
        total["tile"] += len(mesh.tiles)
        total["link"] += len(arrays["link_target"])
        total["detail"] += len(arrays["detail_triangles"])
        total["island"] += len(mesh.island_radii)
        total["cell"] += len(arrays["cell_start"])
        total["entry"] += len(arrays["cell_polygons"])
    meshes = Meshes()
    parts["link_start"].append(np.array([total["link"]], np.int32))
    parts["detail_start"].append(np.array([total["detail"]], np.int32))
    for name, arrays_of_scenes in parts.items():
        setattr(meshes, name, _to_warp(np.concatenate(arrays_of_scenes), device))
    # Detour's boxes are rounded outwards by at most two units and one more for the polygon's own.
    coarsest = min(tile.tree_scale for mesh in navmeshes for tile in mesh.tiles)
    meshes.reach = wp.float32(2.0 + min(4.0 / coarsest, 2.0))
    return meshes


def _to_warp(array: NDArray, device: wp.Device) -> wp.array:
    """A Warp array of numbers, or of vectors where the NumPy array has columns."""
    integer = np.issubdtype(array.dtype, np.integer)
    if array.ndim == 1:
        dtype: type = wp.int32 if integer else wp.float32
    elif integer:
        dtype = {2: wp.vec2i, 3: wp.vec3i, 4: wp.vec4i}[array.shape[1]]
    else:
        dtype = {2: wp.vec2, 3: wp.vec3, 4: wp.vec4}[array.shape[1]]
    return wp.array(array, dtype=dtype, device=device)


def _mesh_arrays(mesh: NavMesh, before: dict[str, int]) -> dict[str, NDArray]:
    """One mesh's share of :class:`Meshes`; ``before`` counts what earlier meshes hold."""
    polygon, num_polygons = before["polygon"], len(mesh.polygons)
    # Links to polygons that cannot be walked on are walls.
    owner = np.repeat(np.arange(num_polygons), np.diff(mesh.links.start))
    kept = mesh.walkable[mesh.links.target]
    owner, target, edge = owner[kept], mesh.links.target[kept], mesh.links.edge[kept]
    left, right = _portals(mesh, owner, target, edge, mesh.links.low[kept], mesh.links.high[kept])
    ways = np.zeros((num_polygons, 6), np.int32)
    np.add.at(ways, (owner, edge), 1)
    neighbours = np.full((num_polygons, 6), -1, np.int32)
    neighbours[owner, edge] = target + polygon
    neighbours[ways > 1] = -2
    corners = mesh.vertices[np.where(mesh.polygons >= 0, mesh.polygons, mesh.polygons[:, :1])]
    box = np.concatenate([corners[:, :, [0, 2]].min(1), corners[:, :, [0, 2]].max(1)], 1)
    tree_low, tree_high, rank = _tree_leaves(mesh)
    return {
        "vertices": mesh.vertices,
        "corners": (np.maximum(mesh.polygons, 0) + before["vertex"]).ravel(),
        "sizes": mesh.sizes,
        "neighbours": neighbours.ravel(),
        "link_start": np.searchsorted(owner, np.arange(num_polygons)).astype(np.int32) + before["link"],
        "link_target": target + polygon,
        "link_edge": edge,
        "link_crossing": mesh.links.crossing[kept],
        "link_left": left,
        "link_right": right,
        "detail_start": mesh.detail_starts[:-1] + before["detail"],
        "detail_triangles": mesh.detail_triangles + np.array([before["vertex"]] * 3 + [0], np.int32),
        "box": box,
        "tree_low": tree_low,
        "tree_high": tree_high,
        "rank": rank,
        "tile": mesh.polygon_tiles + before["tile"],
        "island": mesh.islands + before["island"],
        "island_radius": mesh.island_radii,
        "tile_low": np.stack([tile.bounds[0] for tile in mesh.tiles]),
        "tile_high": np.stack([tile.bounds[1] for tile in mesh.tiles]),
        "tile_place": _tile_places(mesh),
        "tile_scale": np.array([tile.tree_scale for tile in mesh.tiles], np.float32),
        "tile_climb": np.array([tile.walkable_climb for tile in mesh.tiles], np.float32),
        **_grid(box, mesh.walkable, rank, before),
    }


def _portals(
    mesh: NavMesh, owner: NDArray, target: NDArray, edge: NDArray, low: NDArray, high: NDArray
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Ends of the passage through each link; of several to one polygon Detour only ever uses the first."""
    _, first, which = np.unique(owner * len(mesh.polygons) + target, return_index=True, return_inverse=True)
    edge, low, high = (array[first][which] for array in (edge, low, high))
    a = mesh.vertices[mesh.polygons[owner, edge]]
    b = mesh.vertices[mesh.polygons[owner, (edge + 1) % mesh.sizes[owner]]]
    unit = np.float32(1.0) / np.float32(255.0)
    part = ((low != 0) | (high != 255))[:, None]
    left = np.where(part, a + (b - a) * (low.astype(np.float32) * unit)[:, None], a)
    right = np.where(part, a + (b - a) * (high.astype(np.float32) * unit)[:, None], b)
    return left, right


def _tree_leaves(mesh: NavMesh) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Box of each polygon in its tile's units, and the order in which Detour comes across polygons."""
    num_polygons = len(mesh.polygons)
    low, high = np.zeros((num_polygons, 3), np.int32), np.zeros((num_polygons, 3), np.int32)
    # A polygon that no leaf names is never found by Detour; here it would come last.
    rank = np.full(num_polygons, num_polygons, np.int32)
    place = 0
    for number in sorted(range(len(mesh.tiles)), key=lambda n: (mesh.tiles[n].y, mesh.tiles[n].x, -n)):
        tile = mesh.tiles[number]
        leaves = tile.tree[tile.tree[:, 6] >= 0]
        # Habitat's trees end in an unused node, which reads as a second leaf of polygon 0.
        _, first = np.unique(leaves[:, 6], return_index=True)
        leaves = leaves[np.sort(first)]
        polygons = leaves[:, 6] + mesh.polygon_offsets[number]
        low[polygons], high[polygons] = leaves[:, :3], leaves[:, 3:6]
        rank[polygons] = place + np.arange(len(leaves))
        place += len(leaves)
    return low, high, rank


def _tile_places(mesh: NavMesh) -> NDArray[np.float32]:
    x = np.array([tile.x for tile in mesh.tiles]) * mesh.tile_size[0] + mesh.origin[0]
    z = np.array([tile.y for tile in mesh.tiles]) * mesh.tile_size[1] + mesh.origin[2]
    return np.stack([x, z, x + mesh.tile_size[0], z + mesh.tile_size[1]], 1).astype(np.float32)


def _grid(
    box: NDArray[np.float32], walkable: NDArray[np.bool_], rank: NDArray[np.int32], before: dict[str, int]
) -> dict[str, NDArray]:
    """A grid over the ground that lists the walkable polygons of each cell."""
    # Cells hold polygons that come near their border, so that rounding cannot lose one.
    margin = 1e-3
    low, high = box[:, :2].astype(np.float64) - margin, box[:, 2:].astype(np.float64) + margin
    corner = low.min(0).astype(np.float32)
    cell_size = _CELL_SIZE
    while True:
        size = np.floor((high.max(0) - corner) / cell_size).astype(np.int64) + 1
        first = np.floor((low - corner) / cell_size).astype(np.int64).clip(0, size - 1)
        last = np.floor((high - corner) / cell_size).astype(np.int64).clip(0, size - 1)
        entries = int(size.prod()) + int((last - first + 1).prod(1).sum())
        if entries <= _GRID_ENTRIES + 64 * len(box):
            break
        cell_size *= 2
    cells, polygons = [], []
    for index in np.argsort(rank, kind="stable"):
        if walkable[index]:
            columns = np.arange(first[index, 0], last[index, 0] + 1)
            rows = np.arange(first[index, 1], last[index, 1] + 1)
            cells.append((rows[:, None] * size[0] + columns).ravel())
            polygons.append(np.full(cells[-1].shape, index))
    # The empty arrays stand in where no polygon is walkable.
    cell, polygon = (np.concatenate([np.zeros(0, np.int64), *part]) for part in (cells, polygons))
    order = np.argsort(cell, kind="stable")
    counts = np.bincount(cell, minlength=int(size.prod()))
    return {
        "cells": np.concatenate([first, last], 1).astype(np.int32),
        "grid_low": corner[None],
        "grid_cell": np.array([cell_size], np.float32),
        "grid_size": size[None].astype(np.int32),
        "grid_start": np.array([before["cell"]], np.int32),
        "cell_start": (np.concatenate([[0], np.cumsum(counts)]) + before["entry"]).astype(np.int32),
        "cell_polygons": (polygon[order] + before["polygon"]).astype(np.int32),
    }
