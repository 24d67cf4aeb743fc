"""Warp kernels that build navigation meshes: voxels by column or triangle, walks over the floor in one go.

They run on the CPU, where a kernel is compiled code that may be as serial as the method is.
"""

# Warp compiles the source: a variable that a loop changes has to be made by int() or float(), functions have
# no return type, and what type a name has is Warp's to say, not mypy's.
# ruff: noqa: UP018, RUF046, ANN201
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
import warp as wp
from numpy.typing import ArrayLike

# A fused multiply-add rounds once where Recast rounds twice, and walls often lie exactly between two cells.
wp.set_module_options({"enable_backward": False, "fuse_fp": False, "fast_math": False})

OPEN = wp.constant(0xFFFF)
"""Height of the ceiling where there is none [cells]."""

Polygon = wp.types.vector(length=24, dtype=wp.float32)
"""Up to eight corners, x, y and z of each."""


def integers(values: ArrayLike) -> wp.array:
    """Values as a Warp array of 32-bit integers; shares the memory of an int32 array."""
    return wp.array(np.asarray(values, dtype=np.int32), dtype=wp.int32, device="cpu", copy=False)


@wp.func
def split(polygon: Polygon, count: int, axis: int, at: float):
    """Cuts a convex polygon by the plane where a coordinate equals ``at``: the parts below and above."""
    below = Polygon()
    above = Polygon()
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
def rasterise(
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
    rest = Polygon()
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
        row, num_row, rest_z, num_z = split(rest, num_rest, 2, origin[2] + float(z) * cell_size + cell_size)
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
                cell, num_cell, rest_x, num_x = split(
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
def merge_spans(
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
def walk_over_low_obstacles(
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
def avoid_ledges_and_low_ceilings(
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
            ceiling = int(OPEN)
            if i + 1 < end and high[i + 1] > 0:
                ceiling = low[i + 1]
            drop = int(OPEN)
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
                            n_ceiling = int(OPEN)
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
def collect_floor(
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
            ceiling = int(OPEN)
            if i + 1 < end and high[i + 1] > 0:
                ceiling = low[i + 1]
            y[slot] = high[i]
            room[slot] = wp.min(ceiling - high[i], 255)
            slot += 1


@wp.kernel
def connect(
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
def chamfer(neighbours: wp.array2d(dtype=wp.int32), distance: wp.array(dtype=wp.int32)) -> None:
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


@wp.kernel
def flood(
    seeds: wp.array(dtype=wp.int32),
    neighbours: wp.array2d(dtype=wp.int32),
    depth: wp.array(dtype=wp.int32),
    level: int,
    labels: wp.array(dtype=wp.int32),
    growth: wp.array(dtype=wp.int32),
    stack: wp.array(dtype=wp.int32),
    next_region: wp.array(dtype=wp.int32),
) -> None:
    """Starts a region at each seed that has none yet and floods it, down to a level, away from other regions.

    In one thread: regions stop where those before them are.
    """
    region = int(next_region[0])
    for s in range(seeds.shape[0]):
        if labels[seeds[s]] == 0:
            labels[seeds[s]] = region
            growth[seeds[s]] = 0
            stack[0] = seeds[s]
            height = int(1)
            size = int(0)
            while height > 0:
                height -= 1
                at = stack[height]
                meets = int(0)
                for side in range(4):
                    beside = neighbours[at, side]
                    if beside >= 0:
                        if labels[beside] != 0 and labels[beside] != region:
                            meets = 1
                        corner = neighbours[beside, (side + 1) % 4]
                        if corner >= 0 and labels[corner] != 0 and labels[corner] != region:
                            meets = 1
                if meets == 1:
                    labels[at] = 0
                else:
                    size += 1
                    for side in range(4):
                        beside = neighbours[at, side]
                        if beside >= 0 and depth[beside] >= level and labels[beside] == 0:
                            labels[beside] = region
                            growth[beside] = 0
                            stack[height] = beside
                            height += 1
            if size > 0:
                region += 1
    next_region[0] = region


@wp.kernel
def follow(
    successor: wp.array(dtype=wp.int32),
    visited: wp.array(dtype=wp.int32),
    order: wp.array(dtype=wp.int32),
    starts: wp.array(dtype=wp.int32),
    count: wp.array(dtype=wp.int32),
) -> None:
    """Lists the steps of every walk one after another, in one thread."""
    written = int(0)
    walks = int(0)
    for first in range(successor.shape[0]):
        if visited[first] == 0:
            starts[walks] = written
            walks += 1
            step = int(first)
            while step >= 0:
                if visited[step] == 1:
                    step = -1
                else:
                    visited[step] = 1
                    order[written] = step
                    written += 1
                    step = successor[step]
    starts[walks] = written
    count[0] = walks


@wp.func
def squared_distance(x: int, z: int, ax: int, az: int, bx: int, bz: int):
    """Squared distance of point (x, z) from the segment a - b."""
    along_x = float(bx - ax)
    along_z = float(bz - az)
    length = along_x * along_x + along_z * along_z
    at = along_x * float(x - ax) + along_z * float(z - az)
    if length > 0.0:
        at = at / length
    at = wp.clamp(at, 0.0, 1.0)
    off_x = float(ax) + at * along_x - float(x)
    off_z = float(az) + at * along_z - float(z)
    return off_x * off_x + off_z * off_z


@wp.kernel
def simplify(
    x: wp.array(dtype=wp.int32),
    z: wp.array(dtype=wp.int32),
    behind: wp.array(dtype=wp.int32),
    starts: wp.array(dtype=wp.int32),
    max_error: float,
    max_length: float,
    kept: wp.array(dtype=wp.int32),
) -> None:
    """Marks the corners of each border walk that its outline keeps."""
    walk = wp.tid()
    first = starts[walk]
    count = starts[walk + 1] - first
    # Where another region begins to lie behind the border, both outlines need a corner.
    anchors = int(0)
    for i in range(count):
        if behind[first + i] != behind[first + (i + 1) % count]:
            kept[first + i] = 1
            anchors += 1
    if anchors == 0:
        low = int(0)
        high = int(0)
        for i in range(count):
            here = first + i
            if x[here] < x[first + low] or (x[here] == x[first + low] and z[here] < z[first + low]):
                low = i
            if x[here] > x[first + high] or (x[here] == x[first + high] and z[here] > z[first + high]):
                high = i
        kept[first + low] = 1
        kept[first + high] = 1
    begin = int(0)
    while kept[first + begin] == 0:
        begin += 1
    # Between two kept corners, keep the farthest if it is too far, and look again.
    for phase in range(2):
        a = int(begin)
        going = int(1)
        while going == 1:
            steps = int(1)
            while kept[first + (a + steps) % count] == 0:
                steps += 1
            b = (a + steps) % count
            split = int(-1)
            ax = x[first + a]
            az = z[first + a]
            bx = x[first + b]
            bz = z[first + b]
            forward = int(0)
            if bx > ax or (bx == ax and bz > az):
                forward = 1
            if phase == 0:
                # Both regions at a border look from the same end, so that ties go the same way.
                probe = (a + 1) % count
                if forward == 0:
                    probe = (b + count - 1) % count
                if behind[first + probe] == 0:
                    farthest = float(0.0)
                    for step in range(1, steps):
                        here = (a + step) % count
                        if forward == 0:
                            here = (a + steps - step) % count
                        away = float(0.0)
                        if forward == 1:
                            away = squared_distance(x[first + here], z[first + here], ax, az, bx, bz)
                        else:
                            away = squared_distance(x[first + here], z[first + here], bx, bz, ax, az)
                        if away > farthest:
                            farthest = away
                            split = here
                    if farthest <= max_error:
                        split = -1
            elif behind[first + (a + 1) % count] == 0 and steps > 1:
                dx = float(bx - ax)
                dz = float(bz - az)
                if max_length > 0.0 and dx * dx + dz * dz > max_length:
                    split = (a + (steps + 1 - forward) / 2) % count
            if split >= 0:
                kept[first + split] = 1
            else:
                a = b
                if a == begin:
                    going = 0
