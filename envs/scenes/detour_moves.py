"""How moves end: Detour's walk along a floor, and Habitat's step on top of it. See :mod:`detour_mesh`."""

# Warp compiles the source: a variable that a loop changes has to be made by int(), float() or bool(), and
# both sides of an ``and`` are evaluated, so conditions that guard others are nested. Types are Warp's own.
# ruff: noqa: UP018, RUF046, SIM102
# mypy: ignore-errors

import warp as wp

from envs.scenes.detour_mesh import (
    CLOSED,
    NO_DISTANCE,
    Meshes,
    Scratch,
    corner,
    finite,
    height_inside,
    inside_polygon,
    lerp,
    nearest_polygon,
    on_segment,
)

# The same kernels must give the same answers everywhere: a fused multiply-add rounds once where Detour rounds
# twice. Nothing here is differentiated.
wp.set_module_options({"enable_backward": False, "fuse_fp": False, "fast_math": False, "max_unroll": 1})

# Detour's room for a single move: nodes seen, and nodes waiting.
MAX_MOVE_NODES = 64
MAX_MOVE_QUEUE = wp.constant(48)
# How far Habitat pulls an end point off an edge that it shares with another island [m].
NUDGE = wp.constant(1.0e-4)


@wp.func
def visit_in_move(m: Meshes, s: Scratch, worker: int, count: int, polygon: int) -> int:
    """A polygon's node in a move's search: one seen before, else ``count``, a new one; -1 if full."""
    for i in range(count):
        if s.polygon[worker, i] == polygon:
            return i
    if count >= wp.static(MAX_MOVE_NODES):
        return -1
    s.polygon[worker, count] = polygon
    s.flags[worker, count] = 0
    return count


@wp.func
def move_along_surface(
    m: Meshes, s: Scratch, worker: int, first: int, start: wp.vec3, end: wp.vec3
) -> tuple[int, wp.vec3]:
    """Moves along the floor towards a point, sliding along walls: where it ends, and the last search node.

    The floor is searched breadth first within reach of the move; the end is the target if a polygon that is
    reached holds it, else the point of a wall seen that is nearest to the target. -1 if there was neither.
    """
    best_node = int(-1)
    best_point = start
    best_distance = float(NO_DISTANCE)
    centre = lerp(start, end, 0.5)
    radius = wp.length(end - start) / 2.0 + 0.001
    s.polygon[worker, 0] = first
    s.parent[worker, 0] = -1
    s.flags[worker, 0] = CLOSED
    s.heap[worker, 0] = 0
    count = int(1)
    head = int(0)
    tail = int(1)
    while head < tail:
        node = s.heap[worker, head]
        head += 1
        polygon = s.polygon[worker, node]
        if inside_polygon(m, polygon, end):
            best_node = node
            best_point = end
            break
        size = m.sizes[polygon]
        j = size - 1
        for i in range(size):
            a = corner(m, polygon, j)
            b = corner(m, polygon, i)
            neighbour = m.neighbours[polygon * 6 + j]
            if neighbour == -1:
                found = on_segment(end, a, b)
                if found[0] < best_distance:
                    best_distance = found[0]
                    best_point = lerp(a, b, found[1])
                    best_node = node
            else:
                # One polygon across the edge, or at a tile's border those of the links over it.
                link = m.link_start[polygon]
                last = link + 1
                if neighbour == -2:
                    last = m.link_start[polygon + 1]
                while link < last:
                    if neighbour >= 0 or m.link_edge[link] == j:
                        target = neighbour
                        if neighbour == -2:
                            target = m.link_target[link]
                        other = visit_in_move(m, s, worker, count, target)
                        if other == count:
                            count += 1
                        if other >= 0:
                            if s.flags[worker, other] == 0 and tail - head < MAX_MOVE_QUEUE:
                                found = on_segment(centre, a, b)
                                if found[0] <= radius * radius:
                                    s.parent[worker, other] = node
                                    s.flags[worker, other] = CLOSED
                                    s.heap[worker, tail] = other
                                    tail += 1
                    link += 1
            j = i
    return best_node, best_point


@wp.func
def stop_at_wall(
    m: Meshes, s: Scratch, worker: int, last: int, start: wp.vec3, end: wp.vec3, reached: wp.vec3
) -> wp.vec3:
    """Where a straight move meets a wall of the polygons that the slide went through, else ``reached``."""
    best_point = reached
    best_distance = float(NO_DISTANCE)
    node = last
    while node >= 0:
        polygon = s.polygon[worker, node]
        size = m.sizes[polygon]
        for j in range(size):
            if m.neighbours[polygon * 6 + j] == -1:
                a = corner(m, polygon, j)
                b = corner(m, polygon, (j + 1) % size)
                wall = b - a
                way = end - start
                offset = a - start
                scale = wall[0] * way[2] - wall[2] * way[0]
                if wp.abs(scale) >= 1.0e-6:
                    along_wall = (way[0] * offset[2] - way[2] * offset[0]) / scale
                    along_way = (wall[0] * offset[2] - wall[2] * offset[0]) / scale
                    if along_wall >= 0.0 and along_wall <= 1.0 and along_way >= 0.0 and along_way <= 1.0:
                        hit = lerp(a, b, along_wall)
                        distance = (hit[0] - end[0]) * (hit[0] - end[0]) + (hit[2] - end[2]) * (
                            hit[2] - end[2]
                        )
                        if distance < best_distance:
                            best_distance = distance
                            best_point = hit
        node = s.parent[worker, node]
    return best_point


@wp.func
def step(
    m: Meshes, s: Scratch, worker: int, scene: int, start: wp.vec3, target: wp.vec3, slide: bool
) -> wp.vec3:
    """Habitat's ``try_step``: where a move from start straight to target ends."""
    if not finite(target):
        return start
    first, on_floor = nearest_polygon(m, scene, start)
    goal, _unused = nearest_polygon(m, scene, target)
    if first < 0 or goal < 0:
        return start
    if m.island[first] != m.island[goal]:
        return start
    node, end = move_along_surface(m, s, worker, first, on_floor, target)
    if node < 0:
        return start
    if not slide:
        end = stop_at_wall(m, s, worker, node, on_floor, target, end)
    polygon = s.polygon[worker, node]
    if inside_polygon(m, polygon, end):
        end = wp.vec3(end[0], height_inside(m, polygon, end), end[2])
    # The end may lie on an edge shared with another island, from where the next move would start over there.
    landed, _unused_too = nearest_polygon(m, scene, end)
    lost = bool(True)
    if landed >= 0:
        lost = m.island[landed] != m.island[first]
    if lost:
        centre = wp.vec3(0.0, 0.0, 0.0)
        size = m.sizes[polygon]
        for i in range(size):
            centre += corner(m, polygon, i)
        end = end + NUDGE * wp.normalize(centre / float(size) - end)
    return end


@wp.kernel
def step_kernel(
    m: Meshes,
    s: Scratch,
    worker: int,
    workers: int,
    first: int,
    last: int,
    scene: wp.array(dtype=wp.int64),
    start: wp.array(dtype=wp.vec3),
    target: wp.array(dtype=wp.vec3),
    slide: bool,
    end: wp.array(dtype=wp.vec3),
) -> None:
    """Where each move ends."""
    query = first + wp.tid()
    while query < last:
        end[query] = step(m, s, worker + wp.tid(), int(scene[query]), start[query], target[query], slide)
        query += workers
