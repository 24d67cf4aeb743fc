# ruff: noqa: UP018, RUF046 - Warp takes a name for a constant unless int() or float() makes it a variable.
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

from envs.scenes.navmesh import NavMeshError

wp.set_module_options({"enable_backward": False})

NO_SPAN = -1
"""Neighbour of a span on a side where no step leads."""

SIDES = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Offset in x and z of the cell on each side; one side on is clockwise seen from above."""

_MAX_COLUMNS = 1 << 27
_MAX_HEIGHT = 8191
_OPEN = 0xFFFF
_FAR = 255

_Polygon = wp.types.vector(length=24, dtype=wp.float32)


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
    origin, top = vertices.min(axis=0), vertices.max(axis=0)
    size = np.float32(settings.cell_size)
    # In single precision throughout, as Recast does: walls often lie exactly between two cells.
    width, depth = (
        int(cells) for cells in ((top - origin)[[0, 2]] / size + np.float32(0.5)).astype(np.int64)
    )
    if width * depth > _MAX_COLUMNS or (top[1] - origin[1]) / settings.cell_height > _MAX_HEIGHT:
        extent = " x ".join(f"{length:.1f}" for length in top - origin)
        raise NavMeshError(
            f"the scene is {extent} m, too large for voxels of {settings.cell_size} m by "
            f"{settings.cell_height} m; check its scale (stage config) or take larger voxels"
        )
    width, depth = max(width, 1), max(depth, 1)
    starts, lows, highs, areas = _solid_spans(vertices, triangles, settings, origin, top, width, depth)
    columns = width * depth
    spans = [wp.array(part, dtype=wp.int32, device="cpu") for part in (starts, lows, highs)]
    area = wp.array(areas, dtype=wp.int32, device="cpu")
    kept = wp.empty_like(area)
    counts = wp.zeros(columns, dtype=wp.int32, device="cpu")
    height, climb = settings.walkable_height, settings.walkable_climb
    wp.launch(_walk_over_low_obstacles, columns, [*spans, climb, area], device="cpu")
    wp.launch(
        _avoid_ledges_and_low_ceilings,
        columns,
        [*spans, area, width, depth, height, climb, kept, counts],
        device="cpu",
    )
    column_start = np.zeros(columns + 1, dtype=np.int32)
    np.cumsum(counts.numpy(), out=column_start[1:])
    total = int(column_start[-1])
    firsts = wp.array(column_start, dtype=wp.int32, device="cpu")
    y, room = (wp.empty(total, dtype=wp.int32, device="cpu") for _ in range(2))
    neighbours = wp.empty((total, 4), dtype=wp.int32, device="cpu")
    wp.launch(_collect_floor, columns, [*spans, kept, firsts, y, room], device="cpu")
    wp.launch(_connect, columns, [firsts, y, room, width, depth, height, climb, neighbours], device="cpu")
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
    distance = wp.array(np.where(same, stop_at, 0), dtype=wp.int32, device="cpu")
    wp.launch(_chamfer, 1, [wp.array(neighbours, dtype=wp.int32, device="cpu"), distance], device="cpu")
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
    corners = wp.array(vertices, dtype=wp.vec3, device="cpu")
    indices = wp.array(triangles, dtype=wp.int32, device="cpu")
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
        _rasterise,
        len(triangles),
        [corners, indices, *grid, slope, nothing, counts, nothing, nothing, nothing, nothing],
        device="cpu",
    )
    offsets = np.zeros(len(triangles) + 1, dtype=np.int32)
    np.cumsum(counts.numpy(), out=offsets[1:])
    pieces = [wp.empty(int(offsets[-1]), dtype=wp.int32, device="cpu") for _ in range(4)]
    wp.launch(
        _rasterise,
        len(triangles),
        [corners, indices, *grid, slope, wp.array(offsets, dtype=wp.int32, device="cpu"), counts, *pieces],
        device="cpu",
    )
    column, low, high, area = (piece.numpy() for piece in pieces)
    order = np.argsort(column, kind="stable")
    starts = np.searchsorted(column[order], np.arange(width * depth + 1)).astype(np.int32)
    spans = [wp.array(part[order], dtype=wp.int32, device="cpu") for part in (low, high, area)]
    first = wp.array(starts, dtype=wp.int32, device="cpu")
    wp.launch(_merge_spans, width * depth, [first, *spans, settings.walkable_climb], device="cpu")
    return starts, *(part.numpy() for part in spans)


@wp.func
def _split(polygon: _Polygon, count: int, axis: int, at: float):  # noqa: ANN202
    """Cuts a convex polygon by the plane where a coordinate equals ``at``: the parts below and above."""
    below = _Polygon()
    above = _Polygon()
    num_below = int(0)
    num_above = int(0)
    before = int(count - 1)
    for i in range(count):
        ahead = at - polygon[3 * i + axis]
        behind = at - polygon[3 * before + axis]
        if (ahead >= 0.0 and behind < 0.0) or (ahead < 0.0 and behind >= 0.0):
            share = behind / (behind - ahead)
            for k in range(3):
                start = polygon[3 * before + k]
                value = start + (polygon[3 * i + k] - start) * share
                below[3 * num_below + k] = value
                above[3 * num_above + k] = value
            num_below += 1
            num_above += 1
            if ahead > 0.0:
                for k in range(3):
                    below[3 * num_below + k] = polygon[3 * i + k]
                num_below += 1
            elif ahead < 0.0:
                for k in range(3):
                    above[3 * num_above + k] = polygon[3 * i + k]
                num_above += 1
        else:
            if ahead >= 0.0:
                for k in range(3):
                    below[3 * num_below + k] = polygon[3 * i + k]
                num_below += 1
            if ahead <= 0.0:
                for k in range(3):
                    above[3 * num_above + k] = polygon[3 * i + k]
                num_above += 1
        before = i
    return below, num_below, above, num_above


@wp.kernel
def _rasterise(
    vertices: wp.array(dtype=wp.vec3),
    triangles: wp.array2d(dtype=wp.int32),
    origin: wp.vec3,
    height: float,
    cell_size: float,
    cell_height: float,
    width: int,
    depth: int,
    min_up: float,
    offsets: wp.array(dtype=wp.int32),
    counts: wp.array(dtype=wp.int32),
    column: wp.array(dtype=wp.int32),
    low: wp.array(dtype=wp.int32),
    high: wp.array(dtype=wp.int32),
    area: wp.array(dtype=wp.int32),
) -> None:
    """Counts the cells that each triangle passes through or, given offsets, writes what it fills there."""
    triangle = wp.tid()
    a = vertices[triangles[triangle, 0]]
    b = vertices[triangles[triangle, 1]]
    c = vertices[triangles[triangle, 2]]
    normal = wp.normalize(wp.cross(b - a, c - a))
    walkable = int(0)
    if normal[1] > min_up:
        walkable = 1
    per_cell = 1.0 / cell_size
    per_height = 1.0 / cell_height
    rest = _Polygon()
    for k in range(3):
        rest[k] = a[k]
        rest[3 + k] = b[k]
        rest[6 + k] = c[k]
    num_rest = int(3)
    z_low = wp.min(a[2], wp.min(b[2], c[2])) - origin[2]
    z_high = wp.max(a[2], wp.max(b[2], c[2])) - origin[2]
    z_first = wp.clamp(int(z_low * per_cell), 0, depth - 1)
    z_last = wp.clamp(int(z_high * per_cell), 0, depth - 1)
    written = int(0)
    for z in range(z_first, z_last + 1):
        row, num_row, rest_z, num_z = _split(rest, num_rest, 2, origin[2] + float(z) * cell_size + cell_size)
        rest = rest_z
        num_rest = num_z
        if num_row >= 3:
            x_low = row[0]
            x_high = row[0]
            for i in range(1, num_row):
                x_low = wp.min(x_low, row[3 * i])
                x_high = wp.max(x_high, row[3 * i])
            x_first = wp.clamp(int((x_low - origin[0]) * per_cell), 0, width - 1)
            x_last = wp.clamp(int((x_high - origin[0]) * per_cell), 0, width - 1)
            for x in range(x_first, x_last + 1):
                cell, num_cell, rest_x, num_x = _split(
                    row, num_row, 0, origin[0] + float(x) * cell_size + cell_size
                )
                row = rest_x
                num_row = num_x
                if num_cell >= 3:
                    if offsets.shape[0] > 0:
                        y_low = cell[1]
                        y_high = cell[1]
                        for i in range(1, num_cell):
                            y_low = wp.min(y_low, cell[3 * i + 1])
                            y_high = wp.max(y_high, cell[3 * i + 1])
                        y_low = wp.clamp(y_low - origin[1], 0.0, height)
                        y_high = wp.clamp(y_high - origin[1], 0.0, height)
                        slot = offsets[triangle] + written
                        bottom = wp.clamp(int(wp.floor(y_low * per_height)), 0, 8191)
                        column[slot] = x + z * width
                        low[slot] = bottom
                        high[slot] = wp.clamp(int(wp.ceil(y_high * per_height)), bottom + 1, 8191)
                        area[slot] = walkable
                    written += 1
    counts[triangle] = written


@wp.kernel
def _merge_spans(
    first: wp.array(dtype=wp.int32),
    low: wp.array(dtype=wp.int32),
    high: wp.array(dtype=wp.int32),
    area: wp.array(dtype=wp.int32),
    climb: int,
) -> None:
    """Joins the spans of a column that touch, in place and in the order of their triangles."""
    column = wp.tid()
    start = first[column]
    count = int(0)
    for i in range(start, first[column + 1]):
        bottom = low[i]
        top = high[i]
        walkable = area[i]
        # Spans begin .. end - 1 touch the new one and become part of it.
        begin = int(start)
        while begin < start + count and high[begin] < bottom:
            begin += 1
        end = int(begin)
        while end < start + count and low[end] <= top:
            bottom = wp.min(bottom, low[end])
            top = wp.max(top, high[end])
            # The top stays walkable if a walkable surface lies within the agent's step of it.
            if wp.abs(top - high[end]) <= climb:
                walkable = wp.max(walkable, area[end])
            end += 1
        if end == begin:
            k = int(start + count)
            while k > begin:
                low[k] = low[k - 1]
                high[k] = high[k - 1]
                area[k] = area[k - 1]
                k -= 1
            count += 1
        elif end > begin + 1:
            for k in range(end, start + count):
                low[k - end + begin + 1] = low[k]
                high[k - end + begin + 1] = high[k]
                area[k - end + begin + 1] = area[k]
            count -= end - begin - 1
        low[begin] = bottom
        high[begin] = top
        area[begin] = walkable
    for i in range(start + count, first[column + 1]):
        high[i] = 0


@wp.kernel
def _walk_over_low_obstacles(
    first: wp.array(dtype=wp.int32),
    low: wp.array(dtype=wp.int32),
    high: wp.array(dtype=wp.int32),
    climb: int,
    area: wp.array(dtype=wp.int32),
) -> None:
    """Makes walkable what is no higher than a step above floor in the same column: kerbs, door sills."""
    column = wp.tid()
    previous = int(0)
    for i in range(first[column], first[column + 1]):
        walkable = area[i]
        # Decided on what the triangles said, so that a stack of steps does not become walkable.
        if walkable == 0 and previous == 1 and high[i] > 0 and high[i] - high[i - 1] <= climb:
            area[i] = 1
        previous = walkable


@wp.kernel
def _avoid_ledges_and_low_ceilings(
    first: wp.array(dtype=wp.int32),
    low: wp.array(dtype=wp.int32),
    high: wp.array(dtype=wp.int32),
    area: wp.array(dtype=wp.int32),
    width: int,
    depth: int,
    height: int,
    climb: int,
    kept: wp.array(dtype=wp.int32),
    counts: wp.array(dtype=wp.int32),
) -> None:
    """Keeps the walkable tops with headroom that neither lie at a drop nor on a slope steeper than a step."""
    column = wp.tid()
    x = column % width
    z = column // width
    count = int(0)
    end = first[column + 1]
    for i in range(first[column], end):
        kept[i] = 0
        if area[i] == 1 and high[i] > 0:
            floor = high[i]
            ceiling = int(_OPEN)
            if i + 1 < end and high[i + 1] > 0:
                ceiling = low[i + 1]
            drop = int(_OPEN)
            lowest = int(floor)
            highest = int(floor)
            for side in range(4):
                nx = x
                nz = z
                if side == 0:
                    nx = x - 1
                elif side == 1:
                    nz = z + 1
                elif side == 2:
                    nx = x + 1
                else:
                    nz = z - 1
                if nx < 0 or nz < 0 or nx >= width or nz >= depth:
                    drop = -climb - 1
                else:
                    # Below the lowest span of the next column lies the open: a fall if the agent fits in.
                    n_column = nx + nz * width
                    n_end = first[n_column + 1]
                    n_floor = int(-climb)
                    for j in range(first[n_column] - 1, n_end):
                        is_solid = int(1)
                        if j >= first[n_column]:
                            n_floor = high[j]
                            if n_floor == 0:
                                is_solid = 0
                        if is_solid == 1:
                            n_ceiling = int(_OPEN)
                            if j + 1 < n_end and high[j + 1] > 0:
                                n_ceiling = low[j + 1]
                            if j < first[n_column]:
                                if wp.min(ceiling, n_ceiling) - floor >= height:
                                    drop = -climb - 1
                            elif wp.min(ceiling, n_ceiling) - wp.max(floor, n_floor) >= height:
                                drop = wp.min(drop, n_floor - floor)
                                if wp.abs(n_floor - floor) <= climb:
                                    lowest = wp.min(lowest, n_floor)
                                    highest = wp.max(highest, n_floor)
            if drop >= -climb and highest - lowest <= climb and ceiling - floor >= height:
                kept[i] = 1
                count += 1
    counts[column] = count


@wp.kernel
def _collect_floor(
    first: wp.array(dtype=wp.int32),
    low: wp.array(dtype=wp.int32),
    high: wp.array(dtype=wp.int32),
    kept: wp.array(dtype=wp.int32),
    out_first: wp.array(dtype=wp.int32),
    y: wp.array(dtype=wp.int32),
    room: wp.array(dtype=wp.int32),
) -> None:
    """Writes the height of each kept top and the headroom above it."""
    column = wp.tid()
    slot = int(out_first[column])
    end = first[column + 1]
    for i in range(first[column], end):
        if kept[i] == 1:
            ceiling = int(_OPEN)
            if i + 1 < end and high[i + 1] > 0:
                ceiling = low[i + 1]
            y[slot] = high[i]
            room[slot] = wp.min(ceiling - high[i], 255)
            slot += 1


@wp.kernel
def _connect(
    first: wp.array(dtype=wp.int32),
    y: wp.array(dtype=wp.int32),
    room: wp.array(dtype=wp.int32),
    width: int,
    depth: int,
    height: int,
    climb: int,
    neighbours: wp.array2d(dtype=wp.int32),
) -> None:
    """Finds where a step to each side leads: the lowest floor within a step that leaves headroom between."""
    column = wp.tid()
    x = column % width
    z = column // width
    for i in range(first[column], first[column + 1]):
        for side in range(4):
            neighbours[i, side] = -1
            nx = x
            nz = z
            if side == 0:
                nx = x - 1
            elif side == 1:
                nz = z + 1
            elif side == 2:
                nx = x + 1
            else:
                nz = z - 1
            if nx >= 0 and nz >= 0 and nx < width and nz < depth:
                n_column = nx + nz * width
                for j in range(first[n_column], first[n_column + 1]):
                    if neighbours[i, side] < 0:
                        bottom = wp.max(y[i], y[j])
                        top = wp.min(y[i] + room[i], y[j] + room[j])
                        if top - bottom >= height and wp.abs(y[i] - y[j]) <= climb:
                            neighbours[i, side] = j


@wp.kernel
def _chamfer(neighbours: wp.array2d(dtype=wp.int32), distance: wp.array(dtype=wp.int32)) -> None:
    """Two sweeps of the chamfer distance over all spans, in one thread: each value builds on those before."""
    count = distance.shape[0]
    for i in range(count):
        nearest = distance[i]
        # Corners are reached through a side: (-1, 0) then (-1, -1), (0, -1) then (1, -1).
        for turn in range(2):
            side = 0 + 3 * turn
            corner = 3 - turn
            j = neighbours[i, side]
            if j >= 0:
                nearest = wp.min(nearest, distance[j] + 2)
                k = neighbours[j, corner]
                if k >= 0:
                    nearest = wp.min(nearest, distance[k] + 3)
        distance[i] = nearest
    for step in range(count):
        i = count - 1 - step
        nearest = distance[i]
        for turn in range(2):
            side = 2 - turn
            corner = 1 - turn
            j = neighbours[i, side]
            if j >= 0:
                nearest = wp.min(nearest, distance[j] + 2)
                k = neighbours[j, corner]
                if k >= 0:
                    nearest = wp.min(nearest, distance[k] + 3)
        distance[i] = nearest
