"""Navigation meshes on the device, and the geometry of Detour's queries: what lies where on a floor.

Habitat asks its navigation mesh through Detour (Recast Navigation), and scores of agents are compared through
these answers, so here and in :mod:`detour_moves` and :mod:`detour_paths` every query follows Detour's
algorithm, its order of visiting, its limits and its 32-bit arithmetic; only the search for polygons near a
point uses a grid in place of a tree. All scenes' meshes lie end to end in the arrays of :class:`Meshes`;
polygon, vertex and link indices are global.

Every kernel is launched with one thread a worker; worker ``w`` answers queries ``first + w``,
``first + w + workers`` and so on below ``last``. That bounds the memory for searches, and lets the CPU run
one worker a thread.
"""

# Warp compiles the source: a variable that a loop changes has to be made by int(), float() or bool(), and
# both sides of an ``and`` are evaluated, so conditions that guard others are nested. Types are Warp's own.
# ruff: noqa: UP018, RUF046, SIM102
# mypy: ignore-errors

import warp as wp

# The same kernels must give the same answers everywhere: a fused multiply-add rounds once where Detour rounds
# twice. Nothing here is differentiated.
wp.set_module_options({"enable_backward": False, "fuse_fp": False, "fast_math": False, "max_unroll": 1})

# How far from a point Habitat looks for a polygon, half extents [m].
SEARCH_X = wp.constant(2.0)
SEARCH_Y = wp.constant(4.0)
NO_DISTANCE = wp.constant(3.0e38)

# States of a search node.
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
    grid_cell: wp.array(dtype=wp.float32)
    """Side of a cell of each scene's grid [m]."""
    grid_size: wp.array(dtype=wp.vec2i)
    """Columns and rows of each scene's grid."""
    grid_start: wp.array(dtype=wp.int32)
    """Each scene's first cell in :attr:`cell_start`."""
    cell_start: wp.array(dtype=wp.int32)
    """First entry of each cell in :attr:`cell_polygons`, and at each scene's end the last one's end."""
    cell_polygons: wp.array(dtype=wp.int32)
    """Walkable polygons of each cell."""
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
    cell_size = m.grid_cell[scene]
    along_x = p[0] - low[0]
    along_z = p[2] - low[1]
    # Written so that a point that is not a number is far away, too.
    near = (
        along_x >= -m.reach
        and along_z >= -m.reach
        and along_x <= float(size[0]) * cell_size + m.reach
        and along_z <= float(size[1]) * cell_size + m.reach
        and wp.isfinite(p[1])
    )
    if not near:
        return best, best_point
    column = int(wp.floor(along_x / cell_size))
    row = int(wp.floor(along_z / cell_size))
    in_x = along_x - float(column) * cell_size
    in_z = along_z - float(row) * cell_size
    to_border = wp.min(wp.min(in_x, cell_size - in_x), wp.min(in_z, cell_size - in_z))
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
        further = to_border + float(ring) * cell_size
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
