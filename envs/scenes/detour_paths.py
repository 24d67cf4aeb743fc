"""Shortest paths and distances to walls: Detour's searches over polygons. See :mod:`detour_mesh`."""

# Warp compiles the source: a variable that a loop changes has to be made by int(), float() or bool(), and
# both sides of an ``and`` are evaluated, so conditions that guard others are nested. Types are Warp's own.
# ruff: noqa: UP018, RUF046, SIM102
# mypy: ignore-errors

import warp as wp

from envs.scenes.detour_mesh import (
    CLOSED,
    OPEN,
    Meshes,
    Scratch,
    closest_in_polygon,
    corner,
    nearest_polygon,
    on_segment,
)

# The same kernels must give the same answers everywhere: a fused multiply-add rounds once where Detour rounds
# twice. Nothing here is differentiated.
wp.set_module_options({"enable_backward": False, "fuse_fp": False, "fast_math": False, "max_unroll": 1})

# Detour scales its estimate of the remaining way by this.
HEURISTIC_SCALE = wp.constant(0.999)
# Habitat's buffers: longest corridor of polygons and most corners of a path.
MAX_CORRIDOR = 256
# Knuth's multiplicative hash: 2^32 over the golden ratio.
HASH_FACTOR = wp.constant(wp.uint32(2654435769))


@wp.func
def turn(a: wp.vec3, b: wp.vec3, c: wp.vec3) -> float:
    """Twice the signed ground area of a triangle."""
    return (c[0] - a[0]) * (b[2] - a[2]) - (b[0] - a[0]) * (c[2] - a[2])


@wp.func
def hash_slot(key: int, width: int) -> int:
    """Where in a hash table of a power of two of places to look for a key first."""
    mixed = wp.uint32(key) * HASH_FACTOR
    return int(mixed >> wp.uint32(16)) & (width - 1)


@wp.func
def search_node(s: Scratch, worker: int, count: int, polygon: int, crossing: int) -> int:
    """A polygon's search node: one seen before, else ``count``, a new one; -1 if there is no room."""
    key = polygon * 4 + crossing
    width = s.table.shape[1]
    slot = hash_slot(key, width)
    node = s.table[worker, slot]
    while node >= 0:
        if s.key[worker, node] == key:
            return node
        slot = (slot + 1) & (width - 1)
        node = s.table[worker, slot]
    if count >= s.polygon.shape[1]:
        return -1
    s.table[worker, slot] = count
    s.slot[worker, count] = slot
    s.key[worker, count] = key
    s.polygon[worker, count] = polygon
    s.parent[worker, count] = -1
    s.flags[worker, count] = 0
    s.cost[worker, count] = 0.0
    s.total[worker, count] = 0.0
    return count


@wp.func
def forget_nodes(s: Scratch, worker: int, count: int) -> None:
    """Frees the hash table for the next search."""
    for i in range(count):
        s.table[worker, s.slot[worker, i]] = -1


@wp.func
def heap_rise(s: Scratch, worker: int, place: int, node: int) -> None:
    """Moves a node up the heap from a free place to where it belongs."""
    at = place
    total = s.total[worker, node]
    while at > 0:
        above = (at - 1) // 2
        other = s.heap[worker, above]
        if not (s.total[worker, other] > total):
            break
        s.heap[worker, at] = other
        at = above
    s.heap[worker, at] = node


@wp.func
def heap_pop(s: Scratch, worker: int, size: int) -> int:
    """Takes the least node off a heap that has ``size`` nodes before."""
    least = s.heap[worker, 0]
    last = s.heap[worker, size - 1]
    at = int(0)
    below = int(1)
    while below < size - 1:
        if below + 1 < size - 1:
            if s.total[worker, s.heap[worker, below]] > s.total[worker, s.heap[worker, below + 1]]:
                below += 1
        s.heap[worker, at] = s.heap[worker, below]
        at = below
        below = at * 2 + 1
    heap_rise(s, worker, at, last)
    return least


@wp.func
def heap_update(s: Scratch, worker: int, size: int, node: int) -> None:
    """Moves a waiting node up the heap after its total has shrunk."""
    for i in range(size):
        if s.heap[worker, i] == node:
            heap_rise(s, worker, i, node)
            return


@wp.func
def heap_open(s: Scratch, worker: int, size: int, node: int) -> int:
    """Lets a node wait at its new total, whether it waits already or not; returns the heap's size then."""
    if s.flags[worker, node] == OPEN:
        heap_update(s, worker, size, node)
        return size
    s.flags[worker, node] = OPEN
    heap_rise(s, worker, size, node)
    return size + 1


@wp.func
def portal(m: Meshes, polygon: int, target: int) -> int:
    """First link from a polygon to another."""
    for link in range(m.link_start[polygon], m.link_start[polygon + 1]):
        if m.link_target[link] == target:
            return link
    return -1


@wp.func
def search_corridor(
    m: Meshes, s: Scratch, worker: int, first: int, last: int, start: wp.vec3, goal: wp.vec3
) -> int:
    """A* over polygons, through the middles of their edges: length of the corridor, 0 if none was found."""
    if first == last:
        s.corridor[worker, 0] = first
        return 1
    count = search_node(s, worker, 0, first, 0) + 1
    s.position[worker, 0] = start
    s.total[worker, 0] = wp.length(goal - start) * HEURISTIC_SCALE
    s.flags[worker, 0] = OPEN
    s.heap[worker, 0] = 0
    waiting = int(1)
    found = int(-1)
    full = bool(False)
    while waiting > 0:
        node = heap_pop(s, worker, waiting)
        waiting -= 1
        s.flags[worker, node] = CLOSED
        polygon = s.polygon[worker, node]
        if polygon == last:
            found = node
            break
        came_from = int(-1)
        if s.parent[worker, node] >= 0:
            came_from = s.polygon[worker, s.parent[worker, node]]
        position = s.position[worker, node]
        for link in range(m.link_start[polygon], m.link_start[polygon + 1]):
            target = m.link_target[link]
            if target == came_from:
                continue
            other = search_node(s, worker, count, target, m.link_crossing[link])
            if other < 0:
                full = True
                continue
            if other == count:
                count += 1
                s.position[worker, other] = (m.link_left[link] + m.link_right[link]) * 0.5
            entry = s.position[worker, other]
            cost = s.cost[worker, node] + wp.length(entry - position)
            total = float(0.0)
            if target == last:
                cost = cost + wp.length(goal - entry)
                total = cost
            else:
                total = cost + wp.length(goal - entry) * HEURISTIC_SCALE
            state = s.flags[worker, other]
            if state != 0 and total >= s.total[worker, other]:
                continue
            s.parent[worker, other] = node
            s.cost[worker, other] = cost
            s.total[worker, other] = total
            waiting = heap_open(s, worker, waiting, other)
    length = int(0)
    # Habitat takes a search that ran out of nodes for no path, even if it found one.
    if found >= 0 and not full:
        node = found
        while node >= 0:
            length += 1
            node = s.parent[worker, node]
        if length > wp.static(MAX_CORRIDOR):
            length = 0
        else:
            node = found
            place = length - 1
            while node >= 0:
                s.corridor[worker, place] = s.polygon[worker, node]
                place -= 1
                node = s.parent[worker, node]
    forget_nodes(s, worker, count)
    return length


@wp.func
def same_point(a: wp.vec3, b: wp.vec3) -> bool:
    """Detour's test, closer than 1/16384 m."""
    return wp.length_sq(b - a) < 3.7252903e-09


@wp.func
def alike(a: float, b: float) -> bool:
    """Magnum's comparison of floats, by which Habitat tells that start and goal are one."""
    difference = wp.abs(a - b)
    if a == 0.0 or b == 0.0 or difference < 1.0e-5:
        return difference < 1.0e-5
    return difference / (wp.abs(a) + wp.abs(b)) < 1.0e-5


@wp.func
def pull_string(
    m: Meshes,
    s: Scratch,
    worker: int,
    query: int,
    length: int,
    start: wp.vec3,
    goal: wp.vec3,
    points: wp.array2d(dtype=wp.vec3),
) -> tuple[int, float]:
    """Shortest path inside a corridor by the funnel algorithm: number of corners, length of the path.

    Corners are written to row ``query`` of points as far as it has room. 0 corners if there are too many.
    """
    room = points.shape[1]
    from_point = closest_in_polygon(m, s.corridor[worker, 0], start)
    to_point = closest_in_polygon(m, s.corridor[worker, length - 1], goal)
    if room > 0:
        points[query, 0] = from_point
    count = int(1)
    distance = float(0.0)
    latest = from_point
    apex = from_point
    left = from_point
    right = from_point
    left_index = int(0)
    right_index = int(0)
    # A corner that is the goal itself ends the path before the corridor does.
    left_is_goal = bool(False)
    right_is_goal = bool(False)
    done = bool(False)
    i = int(0)
    if length == 1:
        i = 1
    # Every corner sends the search back; a broken mesh must not send it round for ever.
    rounds = int(0)
    while i < length and not done and rounds < wp.static(MAX_CORRIDOR * MAX_CORRIDOR):
        rounds += 1
        new_left = to_point
        new_right = to_point
        at_goal = i + 1 >= length
        skip = bool(False)
        if not at_goal:
            link = portal(m, s.corridor[worker, i], s.corridor[worker, i + 1])
            new_left = m.link_left[link]
            new_right = m.link_right[link]
            if i == 0:
                # Starting on the portal: go through.
                found = on_segment(apex, new_left, new_right)
                skip = found[0] < 1.0e-6
        corner_found = bool(False)
        corner_index = int(0)
        corner_is_goal = bool(False)
        new_apex = apex
        if not skip and turn(apex, right, new_right) <= 0.0:
            if same_point(apex, right) or turn(apex, left, new_right) > 0.0:
                right = new_right
                right_index = i
                right_is_goal = at_goal
            else:
                corner_found = True
                new_apex = left
                corner_index = left_index
                corner_is_goal = left_is_goal
        if not skip and not corner_found and turn(apex, left, new_left) >= 0.0:
            if same_point(apex, left) or turn(apex, right, new_left) < 0.0:
                left = new_left
                left_index = i
                left_is_goal = at_goal
            else:
                corner_found = True
                new_apex = right
                corner_index = right_index
                corner_is_goal = right_is_goal
        if corner_found:
            apex = new_apex
            if not same_point(latest, apex):
                if count < room:
                    points[query, count] = apex
                count += 1
                distance = distance + wp.length(latest - apex)
                latest = apex
                if count >= wp.static(MAX_CORRIDOR):
                    return 0, float(wp.inf)
                if corner_is_goal:
                    done = True
            left = apex
            right = apex
            left_index = corner_index
            right_index = corner_index
            i = corner_index
        i += 1
    if not done and not same_point(latest, to_point):
        if count < room:
            points[query, count] = to_point
        count += 1
        distance = distance + wp.length(latest - to_point)
        if count >= wp.static(MAX_CORRIDOR):
            return 0, float(wp.inf)
    return count, distance


@wp.func
def wall_distance(m: Meshes, s: Scratch, worker: int, first: int, centre: wp.vec3, radius: float) -> float:
    """Ground distance to the nearest wall that can be walked to, at most ``radius``."""
    count = search_node(s, worker, 0, first, 0) + 1
    s.position[worker, 0] = centre
    s.flags[worker, 0] = OPEN
    s.heap[worker, 0] = 0
    waiting = int(1)
    least = radius * radius
    while waiting > 0:
        node = heap_pop(s, worker, waiting)
        waiting -= 1
        s.flags[worker, node] = CLOSED
        polygon = s.polygon[worker, node]
        came_from = int(-1)
        if s.parent[worker, node] >= 0:
            came_from = s.polygon[worker, s.parent[worker, node]]
        size = m.sizes[polygon]
        for j in range(size):
            if m.neighbours[polygon * 6 + j] == -1:
                found = on_segment(centre, corner(m, polygon, j), corner(m, polygon, (j + 1) % size))
                least = wp.min(least, found[0])
        for link in range(m.link_start[polygon], m.link_start[polygon + 1]):
            target = m.link_target[link]
            if target == came_from:
                continue
            edge = m.link_edge[link]
            found = on_segment(centre, corner(m, polygon, edge), corner(m, polygon, (edge + 1) % size))
            if found[0] > least:
                continue
            other = search_node(s, worker, count, target, 0)
            if other < 0:
                continue
            if other == count:
                count += 1
                s.position[worker, other] = (m.link_left[link] + m.link_right[link]) * 0.5
            state = s.flags[worker, other]
            if state == CLOSED:
                continue
            total = s.total[worker, node] + wp.length(s.position[worker, node] - s.position[worker, other])
            if state == OPEN and total >= s.total[worker, other]:
                continue
            s.parent[worker, other] = node
            s.total[worker, other] = total
            waiting = heap_open(s, worker, waiting, other)
    forget_nodes(s, worker, count)
    return wp.sqrt(least)


@wp.kernel
def path_kernel(
    m: Meshes,
    s: Scratch,
    worker: int,
    workers: int,
    first: int,
    last: int,
    scene: wp.array(dtype=wp.int64),
    start: wp.array(dtype=wp.vec3),
    goal: wp.array(dtype=wp.vec3),
    distance: wp.array(dtype=wp.float32),
    count: wp.array(dtype=wp.int64),
    points: wp.array2d(dtype=wp.vec3),
) -> None:
    """Length of each shortest path, infinite where there is none, its number of corners and the corners."""
    query = first + wp.tid()
    while query < last:
        a = start[query]
        b = goal[query]
        length = float(wp.inf)
        corners = int(0)
        from_polygon, from_point = nearest_polygon(m, int(scene[query]), a)
        to_polygon, to_point = nearest_polygon(m, int(scene[query]), b)
        if from_polygon >= 0 and to_polygon >= 0:
            if (
                alike(from_point[0], to_point[0])
                and alike(from_point[1], to_point[1])
                and alike(from_point[2], to_point[2])
            ):
                length = 0.0
                corners = 2
                if points.shape[1] > 0:
                    points[query, 0] = from_point
                if points.shape[1] > 1:
                    points[query, 1] = to_point
            elif m.island[from_polygon] == m.island[to_polygon]:
                w = worker + wp.tid()
                polygons = search_corridor(m, s, w, from_polygon, to_polygon, from_point, to_point)
                if polygons > 0:
                    corners, length = pull_string(m, s, w, query, polygons, a, b, points)
        distance[query] = length
        count[query] = wp.int64(corners)
        query += workers


@wp.kernel
def obstacle_kernel(
    m: Meshes,
    s: Scratch,
    worker: int,
    workers: int,
    first: int,
    last: int,
    scene: wp.array(dtype=wp.int64),
    point: wp.array(dtype=wp.vec3),
    radius: float,
    distance: wp.array(dtype=wp.float32),
) -> None:
    """Distance from each point to the nearest wall, infinite off the mesh."""
    query = first + wp.tid()
    while query < last:
        polygon, at = nearest_polygon(m, int(scene[query]), point[query])
        distance[query] = wp.inf
        if polygon >= 0:
            distance[query] = wall_distance(m, s, worker + wp.tid(), polygon, at, radius)
        query += workers
