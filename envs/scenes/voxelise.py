"""Voxels of a scene, and the places among them where an agent can stand.

The first half of the method of Recast Navigation (https://github.com/recastnavigation/recastnavigation),
which Habitat builds its navigation meshes with: triangles become columns of solid spans, the tops of spans
become floor where the slope, the headroom and the step down allow it, and the floor shrinks by the agent's
radius. Sizes are counted in cells from here on, so that the outcome agrees with Habitat's cell by cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import warp as wp
from numpy.typing import NDArray

from envs.scenes import navmesh_kernels as kernels
from envs.scenes.navmesh_tile import NavMeshError
from envs.warp_runtime import start_warp

NO_SPAN = -1
"""Neighbour of a span on a side where no step leads."""

SIDES = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Offset in x and z of the cell on each side; one side on is counter-clockwise seen from above."""

_MAX_COLUMNS = 1 << 26
_MAX_HEIGHT = 8191
_MAX_PIECES = 1 << 28
"""Cells that all triangles together may pass through, each a few numbers of memory."""
_OPEN = 0xFFFF
_FAR = 255


@dataclass(frozen=True)
class VoxelSettings:
    """Sizes of the voxels and of the agent, the latter in voxels."""

    cell_size: float
    """Size of a voxel on the ground plane [m]."""
    cell_height: float
    """Height of a voxel [m]."""
    walkable_height: int
    """Headroom that the agent needs [cells]."""
    walkable_climb: int
    """Highest step that the agent can climb [cells]."""
    walkable_radius: int
    """Distance that the agent's centre keeps from walls [cells]."""
    walkable_slope_deg: float
    """Steepest floor that the agent can walk [deg]."""


@dataclass(frozen=True)
class Floor:
    """Tops of solid spans with headroom: N of them, in order of z, then x, then height."""

    origin: NDArray[np.float32]
    """Lowest corner of the grid: (3,) [m]."""
    top: NDArray[np.float32]
    """Highest corner of the geometry: (3,) [m]."""
    width: int
    """Cells along x."""
    depth: int
    """Cells along z."""
    column_start: NDArray[np.int32]
    """First span of each column ``x + z * width``, and N at the end: (width * depth + 1,)."""
    x: NDArray[np.int32]
    """Cell along x of each span: (N,)."""
    z: NDArray[np.int32]
    """Cell along z of each span: (N,)."""
    y: NDArray[np.int32]
    """Height of the floor of each span above the origin: (N,) [cells]."""
    neighbours: NDArray[np.int32]
    """Span that a step to each of the four :data:`SIDES` leads to, :data:`NO_SPAN` where none: (N, 4)."""
    walkable: NDArray[np.bool_]
    """Whether the agent's centre may be there: (N,)."""


def find_floor(vertices: NDArray[np.float32], triangles: NDArray[np.int32], settings: VoxelSettings) -> Floor:
    """Where an agent can stand in a scene.

    Args:
        vertices: (V, 3) [m], world, +Y up.
        triangles: Vertex indices (T, 3). Which way round they are wound decides which face is up.
        settings: Sizes of voxels and agent.

    Raises:
        NavMeshError: The scene is too large for voxels of this size.
    """
    start_warp()
    origin, top = vertices.min(axis=0), vertices.max(axis=0)
    size = np.float32(settings.cell_size)
    # In single precision throughout, as Recast does: walls often lie exactly between two cells.
    with np.errstate(over="ignore"):  # what overflows is too large
        extent = top - origin
        cells = np.maximum(extent[[0, 2]] / size + np.float32(0.5), np.float32(1))
        height_cells = extent[1] / np.float32(settings.cell_height)
    if float(cells[0]) * float(cells[1]) > _MAX_COLUMNS or height_cells > _MAX_HEIGHT:
        raise NavMeshError(_too_large(extent, settings))
    width, depth = int(cells[0]), int(cells[1])
    starts, lows, highs, areas = _solid_spans(vertices, triangles, settings, origin, top, width, depth)
    columns = width * depth
    spans = [kernels.integers(part) for part in (starts, lows, highs)]
    area = kernels.integers(areas)
    kept = wp.empty_like(area)
    counts = wp.zeros(columns, dtype=wp.int32, device="cpu")
    height, climb = settings.walkable_height, settings.walkable_climb
    wp.launch(kernels.walk_over_low_obstacles, columns, [*spans, climb, area], device="cpu")
    wp.launch(
        kernels.avoid_ledges_and_low_ceilings,
        columns,
        [*spans, area, width, depth, height, climb, kept, counts],
        device="cpu",
    )
    column_start = np.zeros(columns + 1, dtype=np.int32)
    np.cumsum(counts.numpy(), out=column_start[1:])
    total = int(column_start[-1])
    firsts = kernels.integers(column_start)
    y, room = (wp.empty(total, dtype=wp.int32, device="cpu") for _ in range(2))
    neighbours = wp.empty((total, 4), dtype=wp.int32, device="cpu")
    wp.launch(kernels.collect_floor, columns, [*spans, kept, firsts, y, room], device="cpu")
    wp.launch(
        kernels.connect, columns, [firsts, y, room, width, depth, height, climb, neighbours], device="cpu"
    )
    links = neighbours.numpy()
    column = np.repeat(np.arange(columns, dtype=np.int32), np.diff(column_start))
    distance = boundary_distance(links, np.ones(total, dtype=bool), stop_at=_FAR)
    return Floor(
        origin=origin,
        top=top,
        width=width,
        depth=depth,
        column_start=column_start,
        x=column % width,
        z=column // width,
        y=y.numpy(),
        neighbours=links,
        walkable=distance >= 2 * settings.walkable_radius,
    )


def _too_large(extent: NDArray[np.float32], settings: VoxelSettings) -> str:
    size = " x ".join(f"{length:.1f}" for length in extent)
    return (
        f"the scene is {size} m, too large for voxels of {settings.cell_size} m by {settings.cell_height} m; "
        "check its scale (stage config) or take larger voxels"
    )


def boundary_distance(
    neighbours: NDArray[np.int32], inside: NDArray[np.bool_], stop_at: int = _OPEN
) -> NDArray[np.int32]:
    """Distance of each span to the nearest one that is not surrounded by spans inside: (N,) [half cells].

    A chamfer distance: 2 for a step to a side, 3 for one to a corner. Spans that are not inside have distance
    0 from themselves, but those beside them are boundary either way.

    Args:
        neighbours: (N, 4) spans on the four sides.
        inside: (N,) whether a span counts.
        stop_at: Distances are cut off here.
    """
    reached = (neighbours >= 0) & inside[neighbours]
    same = reached.all(axis=1) & inside
    distance = kernels.integers(np.where(same, stop_at, 0))
    wp.launch(kernels.chamfer, 1, [kernels.integers(neighbours), distance], device="cpu")
    return distance.numpy()


def _solid_spans(
    vertices: NDArray[np.float32],
    triangles: NDArray[np.int32],
    settings: VoxelSettings,
    origin: NDArray[np.float32],
    top: NDArray[np.float32],
    width: int,
    depth: int,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Solid spans of every column, lowest first.

    Returns the first span of each column (columns + 1,) and of each span the lowest cell, one past the
    highest cell and whether its top is walkable. Spans do not fill a column's whole range: the rest have
    high 0.
    """
    corners: wp.array = wp.array(vertices, dtype=wp.vec3, device="cpu")
    indices = kernels.integers(triangles)
    slope = float(np.cos(np.radians(settings.walkable_slope_deg)))
    grid = [
        wp.vec3(*origin),
        float(top[1] - origin[1]),
        settings.cell_size,
        settings.cell_height,
        width,
        depth,
    ]
    counts = wp.zeros(len(triangles), dtype=wp.int32, device="cpu")
    nothing = wp.empty(0, dtype=wp.int32, device="cpu")
    wp.launch(
        kernels.rasterise,
        len(triangles),
        [corners, indices, *grid, slope, nothing, counts, nothing, nothing, nothing, nothing],
        device="cpu",
    )
    offsets = np.zeros(len(triangles) + 1, dtype=np.int64)
    np.cumsum(counts.numpy(), out=offsets[1:])
    if offsets[-1] > _MAX_PIECES:
        raise NavMeshError(_too_large(top - origin, settings))
    pieces = [wp.empty(int(offsets[-1]), dtype=wp.int32, device="cpu") for _ in range(4)]
    wp.launch(
        kernels.rasterise,
        len(triangles),
        [corners, indices, *grid, slope, kernels.integers(offsets), counts, *pieces],
        device="cpu",
    )
    column, low, high, area = (piece.numpy() for piece in pieces)
    order = np.argsort(column, kind="stable")
    starts = np.searchsorted(column[order], np.arange(width * depth + 1)).astype(np.int32)
    spans = [kernels.integers(part[order]) for part in (low, high, area)]
    first = kernels.integers(starts)
    wp.launch(kernels.merge_spans, width * depth, [first, *spans, settings.walkable_climb], device="cpu")
    return starts, *(part.numpy() for part in spans)
