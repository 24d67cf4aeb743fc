"""Warp kernels behind :mod:`envs.scenes.pathfinder`: Detour's queries, many at a time.

Habitat asks its navigation mesh through Detour (Recast Navigation), and scores of agents are compared through
these answers, so every query here follows Detour's algorithm, its order of visiting, its limits and its
32-bit arithmetic; only the search for polygons near a point uses a grid in place of a tree. All scenes'
meshes lie end to end in the arrays of :class:`Meshes`; polygon, vertex and link indices are global.
"""

# Warp compiles the source: a variable that a loop changes has to be made by int(), float() or bool(), and both
# sides of an ``and`` are evaluated, so that conditions which guard others are nested.
# ruff: noqa: UP018, RUF046, SIM102

import warp as wp

# The same kernels must give the same answers everywhere: a fused multiply-add rounds once where Detour rounds
# twice. Nothing here is differentiated.
wp.set_module_options({"enable_backward": False, "fuse_fp": False, "fast_math": False})

# How far from a point Habitat looks for a polygon, half extents [m].
SEARCH_X = wp.constant(2.0)
SEARCH_Y = wp.constant(4.0)
# Detour scales its estimate of the remaining way by this.
HEURISTIC_SCALE = wp.constant(0.999)
# Habitat's buffers: longest corridor of polygons and most corners of a path.
MAX_CORRIDOR = 256
# Detour's room for a single move: nodes seen, and nodes waiting.
MAX_MOVE_NODES = 64
MAX_MOVE_QUEUE = wp.constant(48)
# How far Habitat pulls an end point off an edge that it shares with another island [m].
NUDGE = wp.constant(1.0e-4)
NO_DISTANCE = wp.constant(3.0e38)

# Knuth's multiplicative hash: 2^32 over the golden ratio.
HASH_FACTOR = wp.constant(wp.uint32(2654435769))

OPEN = wp.constant(1)
CLOSED = wp.constant(2)


@wp.struct
class Meshes:
    """Navigation meshes of all scenes, end to end."""

    vertices: wp.array(dtype=wp.vec3)
    """Polygon corners and extra detail vertices."""
    corners: wp.array(dtype=wp.int32)
    """Six vertices a polygon."""
    sizes: wp.array(dtype=wp.int32)
    """Corners of each polygon."""
    neighbours: wp.array(dtype=wp.int32)
    """Six a polygon: polygon across the edge, -1 for a wall, -2 where the links tell of several."""
    link_start: wp.array(dtype=wp.int32)
    """First link of each polygon, and the number of links at the end."""
    link_target: wp.array(dtype=wp.int32)
    """Polygon that a link leads to; always a walkable one."""
    link_edge: wp.array(dtype=wp.int32)
    """Edge that a link crosses."""
    link_crossing: wp.array(dtype=wp.int32)
    """Side of the tile that a link crosses; Detour keeps a search node for each."""
    link_left: wp.array(dtype=wp.vec3)
    """Left end of a link's passage."""
    link_right: wp.array(dtype=wp.vec3)
    """Right end of a link's passage."""
    detail_start: wp.array(dtype=wp.int32)
    """First detail triangle of each polygon, and the number of triangles at the end."""
    detail_triangles: wp.array(dtype=wp.vec4i)
    """Three vertices and the edge flags of each detail triangle."""
    box: wp.array(dtype=wp.vec4)
    """Lowest x and z, highest x and z of each polygon."""
    cells: wp.array(dtype=wp.vec4i)
    """First and last grid column and row that each polygon touches: x, z, x, z."""
    tree_low: wp.array(dtype=wp.vec3i)
    """Lowest corner of each polygon's box in its tile's units."""
    tree_high: wp.array(dtype=wp.vec3i)
    """Highest corner of each polygon's box in its tile's units."""
    rank: wp.array(dtype=wp.int32)
    """Order in which Detour looks at polygons."""
    tile: wp.array(dtype=wp.int32)
    """Tile of each polygon."""
    island: wp.array(dtype=wp.int32)
    """Island of each polygon, numbered through all scenes."""
    island_radius: wp.array(dtype=wp.float32)
    """Radius of each island."""
    tile_low: wp.array(dtype=wp.vec3)
    """Lowest corner of each tile."""
    tile_high: wp.array(dtype=wp.vec3)
    """Highest corner of each tile."""
    tile_place: wp.array(dtype=wp.vec4)
    """Part of the ground that each tile's place in the tile grid covers: x, z, x, z."""
    tile_scale: wp.array(dtype=wp.float32)
    """Units per metre of each tile's boxes."""
    tile_climb: wp.array(dtype=wp.float32)
    """Highest step of each tile's agent."""
    grid_low: wp.array(dtype=wp.vec2)
    """Lowest x and z of each scene's grid."""
    grid_size: wp.array(dtype=wp.vec2i)
    """Columns and rows of each scene's grid."""
    grid_start: wp.array(dtype=wp.int32)
    """Each scene's first cell in :attr:`cell_start`."""
    cell_start: wp.array(dtype=wp.int32)
    """First entry of each cell in :attr:`cell_polygons`, and at each scene's end the last one's end."""
    cell_polygons: wp.array(dtype=wp.int32)
    """Walkable polygons of each cell."""
    cell_size: wp.float32
    """Side of a cell [m]."""
    reach: wp.float32
    """Beyond this distance on the ground no polygon counts as near [m]."""


@wp.struct
class Scratch:
    """Room for one search at a time for each worker."""

    polygon: wp.array2d(dtype=wp.int32)
    """Polygon of each search node."""
    key: wp.array2d(dtype=wp.int32)
    """What the hash table finds each node by."""
    parent: wp.array2d(dtype=wp.int32)
    """Node that each node was reached from, -1 for the first."""
    flags: wp.array2d(dtype=wp.int32)
    """Whether each node waits (OPEN) or is done (CLOSED)."""
    cost: wp.array2d(dtype=wp.float32)
    """Length of the way to each node."""
    total: wp.array2d(dtype=wp.float32)
    """Length of the way through each node to the goal, estimated."""
    position: wp.array2d(dtype=wp.vec3)
    """Where each node was entered."""
    slot: wp.array2d(dtype=wp.int32)
    """Place of each node in the hash table."""
    heap: wp.array2d(dtype=wp.int32)
    """Waiting nodes, least total first."""
    table: wp.array2d(dtype=wp.int32)
    """Hash table of nodes, -1 where free; a power of two wide, and left free by every search."""
    corridor: wp.array2d(dtype=wp.int32)
    """Polygons from start to goal."""


@wp.func
def finite(p: wp.vec3) -> bool:
    """Whether a point is one: neither infinite nor not a number."""
    return wp.isfinite(p[0]) and wp.isfinite(p[1]) and wp.isfinite(p[2])


@wp.func
def corner(m: Meshes, polygon: int, index: int) -> wp.vec3:
    """One of a polygon's corners."""
    return m.vertices[m.corners[polygon * 6 + index]]


@wp.func
def lerp(a: wp.vec3, b: wp.vec3, t: float) -> wp.vec3:
    """The point at part t of the way from a to b, rounded as Detour rounds it."""
    return a + (b - a) * t


@wp.func
def on_segment(p: wp.vec3, a: wp.vec3, b: wp.vec3) -> wp.vec2:
    """Squared ground distance to a segment, and where along it the closest point lies, 0 to 1."""
    edge_x = b[0] - a[0]
    edge_z = b[2] - a[2]
    x = p[0] - a[0]
    z = p[2] - a[2]
    length = edge_x * edge_x + edge_z * edge_z
    t = edge_x * x + edge_z * z
    if length > 0.0:
        t = t / length
    t = wp.clamp(t, 0.0, 1.0)
    x = a[0] + t * edge_x - p[0]
    z = a[2] + t * edge_z - p[2]
    return wp.vec2(x * x + z * z, t)


@wp.func
def turn(a: wp.vec3, b: wp.vec3, c: wp.vec3) -> float:
    """Twice the signed ground area of a triangle."""
    return (c[0] - a[0]) * (b[2] - a[2]) - (b[0] - a[0]) * (c[2] - a[2])


@wp.func
def inside_polygon(m: Meshes, polygon: int, p: wp.vec3) -> bool:
    """Whether a point lies above or below a polygon: how often a ray along x crosses its border."""
    inside = bool(False)
    size = m.sizes[polygon]
    b = corner(m, polygon, size - 1)
    for i in range(size):
        a = corner(m, polygon, i)
        if (a[2] > p[2]) != (b[2] > p[2]):
            if p[0] < (b[0] - a[0]) * (p[2] - a[2]) / (b[2] - a[2]) + a[0]:
                inside = not inside
        b = a
    return inside


@wp.func
def closest_on_detail_edges(m: Meshes, polygon: int, p: wp.vec3, border_only: bool) -> wp.vec3:
    """Closest point, on the ground plane, on the edges of a polygon's detail triangles."""
    least = float(NO_DISTANCE)
    closest = p
    for t in range(m.detail_start[polygon], m.detail_start[polygon + 1]):
        triangle = m.detail_triangles[t]
        j = int(2)
        for k in range(3):
            on_border = (triangle[3] >> (2 * j)) & 1
            # An edge inside the polygon belongs to two triangles and is looked at in one.
            if on_border != 0 or (not border_only and triangle[j] >= triangle[k]):
                a = m.vertices[triangle[j]]
                b = m.vertices[triangle[k]]
                found = on_segment(p, a, b)
                if found[0] < least:
                    least = found[0]
                    closest = lerp(a, b, found[1])
            j = k
    return closest


@wp.func
def height_inside(m: Meshes, polygon: int, p: wp.vec3) -> float:
    """Height of the floor at a point above or below a polygon."""
    for t in range(m.detail_start[polygon], m.detail_start[polygon + 1]):
        triangle = m.detail_triangles[t]
        a = m.vertices[triangle[0]]
        to_c = m.vertices[triangle[2]] - a
        to_b = m.vertices[triangle[1]] - a
        to_p = p - a
        scale = to_c[0] * to_b[2] - to_c[2] * to_b[0]
        if wp.abs(scale) >= 1.0e-6:
            u = to_b[2] * to_p[0] - to_b[0] * to_p[2]
            v = to_c[0] * to_p[2] - to_c[2] * to_p[0]
            if scale < 0.0:
                scale = -scale
                u = -u
                v = -v
            if u >= 0.0 and v >= 0.0 and u + v <= scale:
                return a[1] + (to_c[1] * u + to_b[1] * v) / scale
    # Rounding can leave a point between two triangles.
    return closest_on_detail_edges(m, polygon, p, False)[1]


@wp.func
def in_search_box(m: Meshes, polygon: int, p: wp.vec3) -> bool:
    """Whether Detour's tree would offer a polygon for a point: boxes overlap in whole units of the tile."""
    tile = m.tile[polygon]
    place = m.tile_place[tile]
    if (
        p[0] + SEARCH_X < place[0]
        or p[2] + SEARCH_X < place[1]
        or p[0] - SEARCH_X >= place[2]
        or p[2] - SEARCH_X >= place[3]
    ):
        return False
    low = m.tile_low[tile]
    high = m.tile_high[tile]
    scale = m.tile_scale[tile]
    extent = wp.vec3(SEARCH_X, SEARCH_Y, SEARCH_X)
    tree_low = m.tree_low[polygon]
    tree_high = m.tree_high[polygon]
    for axis in range(3):
        least = wp.clamp(p[axis] - extent[axis], low[axis], high[axis]) - low[axis]
        most = wp.clamp(p[axis] + extent[axis], low[axis], high[axis]) - low[axis]
        if (int(scale * least) & 65534) > tree_high[axis] or (int(scale * most + 1.0) | 1) < tree_low[axis]:
            return False
    return True


@wp.func
def nearest_polygon(m: Meshes, scene: int, p: wp.vec3) -> tuple[int, wp.vec3]:
    """Polygon nearest to a point, -1 where there is none near, and the closest point on it.

    A polygon right above or below the point and within climbing height counts as distance 0. Of equally near
    ones the first in Detour's tree counts.
    """
    best = int(-1)
    best_rank = int(0)
    best_distance = float(NO_DISTANCE)
    best_point = p
    low = m.grid_low[scene]
    size = m.grid_size[scene]
    along_x = p[0] - low[0]
    along_z = p[2] - low[1]
    # Written so that a point that is not a number is far away, too.
    near = (
        along_x >= -m.reach
        and along_z >= -m.reach
        and along_x <= float(size[0]) * m.cell_size + m.reach
        and along_z <= float(size[1]) * m.cell_size + m.reach
        and wp.isfinite(p[1])
    )
    if not near:
        return best, best_point
    column = int(wp.floor(along_x / m.cell_size))
    row = int(wp.floor(along_z / m.cell_size))
    in_x = along_x - float(column) * m.cell_size
    in_z = along_z - float(row) * m.cell_size
    to_border = wp.min(wp.min(in_x, m.cell_size - in_x), wp.min(in_z, m.cell_size - in_z))
    ring = int(0)
    searching = bool(True)
    while searching:
        for z in range(wp.max(row - ring, 0), wp.min(row + ring + 1, size[1])):
            step = int(1)
            if wp.abs(z - row) != ring:
                step = 2 * ring
            x = column - ring
            while x <= column + ring:
                if x >= 0 and x < size[0]:
                    cell = m.grid_start[scene] + z * size[0] + x
                    for entry in range(m.cell_start[cell], m.cell_start[cell + 1]):
                        polygon = m.cell_polygons[entry]
                        # A polygon lies in many cells; it is looked at in the one nearest to the point.
                        cells = m.cells[polygon]
                        if (
                            wp.clamp(column, cells[0], cells[2]) == x
                            and wp.clamp(row, cells[1], cells[3]) == z
                        ):
                            box = m.box[polygon]
                            off_x = wp.max(wp.max(box[0] - p[0], p[0] - box[2]), 0.0)
                            off_z = wp.max(wp.max(box[1] - p[2], p[2] - box[3]), 0.0)
                            if off_x * off_x + off_z * off_z <= best_distance:
                                distance = float(0.0)
                                closest = p
                                if inside_polygon(m, polygon, p):
                                    closest = wp.vec3(p[0], height_inside(m, polygon, p), p[2])
                                    above = wp.abs(p[1] - closest[1]) - m.tile_climb[m.tile[polygon]]
                                    if above > 0.0:
                                        distance = above * above
                                else:
                                    closest = closest_on_detail_edges(m, polygon, p, True)
                                    distance = wp.length_sq(p - closest)
                                rank = m.rank[polygon]
                                if distance < best_distance or (
                                    distance == best_distance and rank < best_rank
                                ):
                                    if in_search_box(m, polygon, p):
                                        best = polygon
                                        best_rank = rank
                                        best_distance = distance
                                        best_point = closest
                x += step
        # Everything in the next ring is at least this far away.
        further = to_border + float(ring) * m.cell_size
        ring += 1
        if further > m.reach or further * further > best_distance:
            searching = False
    return best, best_point


@wp.func
def closest_in_polygon(m: Meshes, polygon: int, p: wp.vec3) -> wp.vec3:
    """The point itself above or below a polygon, else the closest point of its border."""
    if inside_polygon(m, polygon, p):
        return p
    least = float(NO_DISTANCE)
    closest = p
    size = m.sizes[polygon]
    # Border j runs from corner j to j + 1; Detour takes the first of equally near ones.
    for j in range(size):
        a = corner(m, polygon, j)
        b = corner(m, polygon, (j + 1) % size)
        found = on_segment(p, a, b)
        if found[0] < least:
            least = found[0]
            closest = lerp(a, b, found[1])
    return closest


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
        above = (at - 1) / 2
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
            s.flags[worker, other] = OPEN
            if state == OPEN:
                heap_update(s, worker, waiting, other)
            else:
                heap_rise(s, worker, waiting, other)
                waiting += 1
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
    while i < length and not done:
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
            s.flags[worker, other] = OPEN
            if state == OPEN:
                heap_update(s, worker, waiting, other)
            else:
                heap_rise(s, worker, waiting, other)
                waiting += 1
    forget_nodes(s, worker, count)
    return wp.sqrt(least)


# Every kernel is launched with one thread a worker; worker w answers queries first + w, first + w + workers and
# so on below ``last``. That bounds the scratch memory, and lets the CPU run one worker a thread.


@wp.kernel
def project_kernel(
    m: Meshes,
    workers: int,
    first: int,
    last: int,
    scene: wp.array(dtype=wp.int64),
    point: wp.array(dtype=wp.vec3),
    polygon: wp.array(dtype=wp.int32),
    closest: wp.array(dtype=wp.vec3),
) -> None:
    """Nearest polygon of each point, -1 where there is none, and the closest point on it."""
    query = first + wp.tid()
    while query < last:
        found, at = nearest_polygon(m, int(scene[query]), point[query])
        polygon[query] = found
        closest[query] = at
        query += workers


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
