"""Triangles inside the polygons of a navigation mesh that follow the floor's height, on stairs above all.

Part of the method of Recast Navigation: heights are sampled along the edges and on a grid inside a polygon,
and the samples that deviate most become corners, until all are near enough. Most floors are flat; only
polygons of regions that are not are sampled.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.scenes.polygons import PolygonMesh
from envs.scenes.voxelise import Floor

_MAX_CORNERS = 127
"""Most corners, its own included, of a polygon's triangles."""
_MAX_EDGE_SAMPLES = 31
"""Most samples along an edge."""
_UNKNOWN = -1
_BORDER_FLAG = 1

Triangle = tuple[int, int, int]


@dataclass(frozen=True)
class FloorDetail:
    """Detail triangles of all polygons, laid out as in :class:`envs.scenes.navmesh_tile.NavMeshTile`."""

    meshes: NDArray[np.int32]
    """First extra corner, extra corners, first triangle and triangles of each polygon: (P, 4)."""
    corners: NDArray[np.float32]
    """Extra corners above the floor's origin: (D, 3) [m]."""
    triangles: NDArray[np.uint8]
    """Three corners and edge flags: (T, 4)."""


def follow_floor(
    floor: Floor,
    labels: NDArray[np.int32],
    mesh: PolygonMesh,
    cell_size: float,
    cell_height: float,
    sample_distance: float,
    max_error: float,
    search_radius: int,
) -> FloorDetail:
    """Triangulates every polygon so that it follows the floor.

    Args:
        floor: The floor.
        labels: Region of each span: (N,).
        mesh: The polygons.
        cell_size: Size of a voxel on the ground plane [m].
        cell_height: Height of a voxel [m].
        sample_distance: Spacing of the samples [m]; 0 takes none.
        max_error: How far the triangles may deviate from the samples [m].
        search_radius: How far from a sample a height may be taken from [cells].
    """
    inside = labels > 0
    num = int(labels.max(initial=0)) + 1
    low = np.full(num, np.iinfo(np.int32).max)
    high = np.full(num, np.iinfo(np.int32).min)
    np.minimum.at(low, labels[inside], floor.y[inside])
    np.maximum.at(high, labels[inside], floor.y[inside])
    scale = np.array([cell_size, cell_height, cell_size])
    meshes, extra, triangles = [], [], []
    num_extra = num_triangles = 0
    for polygon, region in zip(mesh.polygons, mesh.regions.tolist(), strict=True):
        cells = mesh.corners[polygon[polygon >= 0]]
        corners = cells * scale
        heights = None
        flat = low[region] == high[region] and (cells[:, 1] == low[region]).all()
        if sample_distance > 0 and not flat:
            heights = _HeightPatch(floor, labels, cells, region, cell_size, cell_height, search_radius)
        points, hull, faces = _triangulate(corners, heights, sample_distance, max_error, cell_size * 0.1)
        on_border = set(zip(hull, [*hull[1:], hull[0]], strict=True))
        for a, b, c in faces:
            sides = ((a, b), (b, c), (c, a))
            flags = sum(_BORDER_FLAG << (2 * k) for k, side in enumerate(sides) if side in on_border)
            triangles.append((a, b, c, flags))
        added = points[len(cells) :]
        meshes.append((num_extra, len(added), num_triangles, len(faces)))
        num_extra += len(added)
        num_triangles += len(faces)
        # Recast puts samples one cell higher than corners; Habitat's meshes have it so.
        extra += [(x, y + cell_height, z) for x, y, z in added]
    return FloorDetail(
        meshes=np.array(meshes, dtype=np.int32).reshape(-1, 4),
        corners=np.array(extra, dtype=np.float32).reshape(-1, 3),
        triangles=np.array(triangles, dtype=np.uint8).reshape(-1, 4),
    )


class _HeightPatch:
    """Heights of one region around one polygon, and of the floor next to it."""

    def __init__(
        self,
        floor: Floor,
        labels: NDArray[np.int32],
        cells: NDArray[np.int64],
        region: int,
        cell_size: float,
        cell_height: float,
        search_radius: int,
    ) -> None:
        self.cell_size, self.cell_height, self.radius = cell_size, cell_height, search_radius
        limits = np.array([floor.width, floor.depth])
        self.low = np.maximum(cells[:, [0, 2]].min(axis=0) - 1, 0)
        shape = np.minimum(cells[:, [0, 2]].max(axis=0) + 1, limits) - self.low
        self.heights = np.full(tuple(shape), _UNKNOWN, dtype=np.int64)
        rows = (np.arange(self.low[1], self.low[1] + shape[1]) * floor.width + self.low[0])[:, None]
        firsts, lasts = floor.column_start[rows[:, 0]], floor.column_start[rows[:, 0] + shape[0]]
        spans = np.concatenate([np.arange(a, b) for a, b in zip(firsts, lasts, strict=True)])
        spans = spans[labels[spans] == region]
        self.heights[floor.x[spans] - self.low[0], floor.z[spans] - self.low[1]] = floor.y[spans]
        links = floor.neighbours[spans]
        edge = ((links >= 0) & (labels[links] != region)).any(axis=1)
        self._spread(floor, spans[edge].tolist())

    def _spread(self, floor: Floor, seeds: list[int]) -> None:
        """Fills the cells around the region with the floor that one can step to from it."""
        queue = deque(seeds)
        width, depth = self.heights.shape
        while queue:
            for span in floor.neighbours[queue.popleft()].tolist():
                if span < 0:
                    continue
                x, z = int(floor.x[span] - self.low[0]), int(floor.z[span] - self.low[1])
                if 0 <= x < width and 0 <= z < depth and self.heights[x, z] == _UNKNOWN:
                    self.heights[x, z] = floor.y[span]
                    queue.append(span)

    def at(self, x: float, y: float, z: float) -> float:
        """Height of the floor at a point, or ``y`` where none is known near it [m]."""
        column, row = np.clip(
            np.floor(np.array([x, z]) / self.cell_size + 0.01).astype(int) - self.low,
            0,
            np.array(self.heights.shape) - 1,
        ).tolist()
        height = self.heights[column, row]
        for ring in range(1, self.radius + 1):
            if height != _UNKNOWN:
                break
            near = self.heights[
                max(column - ring, 0) : column + ring + 1, max(row - ring, 0) : row + ring + 1
            ]
            near = near[near != _UNKNOWN]
            if len(near):
                height = near[np.abs(near * self.cell_height - y).argmin()]
        return y if height == _UNKNOWN else float(height) * self.cell_height


def _triangulate(
    corners: NDArray[np.float64],
    heights: _HeightPatch | None,
    distance: float,
    max_error: float,
    jitter: float,
) -> tuple[list[tuple[float, float, float]], list[int], list[Triangle]]:
    """Points (a polygon's corners first), those on the border in order, and triangles."""
    points = [tuple(corner) for corner in corners.tolist()]
    count = len(points)
    if heights is None:
        hull = list(range(count))
        return points, hull, _fan(points, hull, count)
    hull = []
    for last in range(count):
        first = (last - 1) % count
        hull.append(first)
        for sample in _edge_samples(corners[first], corners[last], heights, distance, max_error):
            if len(points) < _MAX_CORNERS:
                hull.append(len(points))
                points.append(sample)
    faces = _fan(points, hull, count)
    if _thickness(corners[:, [0, 2]]) < 2 * distance:
        return points, hull, faces
    samples = _grid_samples(corners, heights, distance, jitter)
    while len(samples) and len(points) < _MAX_CORNERS:
        vertices = np.array(points)
        error = _height_errors(samples, vertices, np.array(faces))
        worst = int(error.argmax())
        if error[worst] <= max_error:
            break
        points.append(tuple(samples[worst].tolist()))
        faces = _insert(points, faces, len(points) - 1)
        samples = np.delete(samples, worst, axis=0)
    return points, hull, faces


def _edge_samples(
    first: NDArray[np.float64],
    last: NDArray[np.float64],
    heights: _HeightPatch,
    distance: float,
    max_error: float,
) -> list[tuple[float, float, float]]:
    """Samples that an edge needs to follow the floor, from first to last.

    Both polygons at an edge look along it the same way, so that their triangles meet without a gap.
    """
    forward = (first[0], first[2]) < (last[0], last[2])
    start, end = (first, last) if forward else (last, first)
    steps = min(1 + int(np.hypot(*(end - start)[[0, 2]]) / distance), _MAX_EDGE_SAMPLES)
    line = start + (end - start) * np.linspace(0, 1, steps + 1)[:, None]
    line[:, 1] = [heights.at(*point) for point in line.tolist()]
    kept = [0, steps]
    at = 0
    while at < len(kept) - 1:
        a, b = kept[at], kept[at + 1]
        between = line[a + 1 : b]
        along = line[b] - line[a]
        share = np.clip((between - line[a]) @ along / max(float(along @ along), 1e-12), 0, 1)
        away = np.linalg.norm(line[a] + share[:, None] * along - between, axis=1)
        # A cell's height is the smallest difference there is, so rounding must not count as one.
        if len(away) and away.max() > max_error * (1 + 1e-6):
            kept.insert(at + 1, a + 1 + int(away.argmax()))
        else:
            at += 1
    inner = [tuple(line[k].tolist()) for k in kept[1:-1]]
    return inner if forward else inner[::-1]


def _grid_samples(
    corners: NDArray[np.float64], heights: _HeightPatch, distance: float, jitter: float
) -> NDArray[np.float64]:
    """Samples on a grid at least half its spacing inside a convex polygon: (S, 3) [m].

    They are moved by up to ``jitter`` [m], because four points on a circle have no best triangulation.
    """
    flat = corners[:, [0, 2]]
    low = np.floor(flat.min(axis=0) / distance).astype(int)
    high = np.ceil(flat.max(axis=0) / distance).astype(int)
    grid = np.stack(np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True))), axis=-1)
    grid = grid.reshape(-1, 2) * distance
    ahead = np.roll(flat, -1, axis=0) - flat
    normal = np.stack([-ahead[:, 1], ahead[:, 0]], axis=1) / np.linalg.norm(ahead, axis=1)[:, None]
    inside = ((grid[:, None] - flat) * normal).sum(axis=2)
    # Whichever way the corners go round, the polygon's middle is inside.
    inside *= np.sign(((flat.mean(axis=0) - flat) * normal).sum(axis=1))
    grid = grid[(inside > distance / 2).all(axis=1)]
    middle = (corners[:, 1].min() + corners[:, 1].max()) / 2
    samples = np.array([(x, heights.at(x, middle, z), z) for x, z in grid.tolist()]).reshape(-1, 3)
    number = np.arange(len(samples))
    for axis, prime in ((0, 0x8DA6B343), (2, 0xD8163841)):
        samples[:, axis] += jitter * (((number * prime) & 0xFFFF) / 32767.5 - 1)
    return samples


def _fan(points: list[tuple[float, float, float]], hull: list[int], count: int) -> list[Triangle]:
    """Triangles of a convex polygon with points on its edges, from its shortest corner to both sides."""
    size = len(hull)

    def length(a: int, b: int) -> float:
        (ax, _, az), (bx, _, bz) = points[hull[a % size]], points[hull[b % size]]
        return float(np.hypot(ax - bx, az - bz))

    tips = [k for k in range(size) if hull[k] < count]
    start = min(tips, key=lambda k: length(k - 1, k) + length(k, k + 1) + length(k + 1, k - 1))
    left, right = (start + 1) % size, (start - 1) % size
    faces = [(hull[start], hull[left], hull[right])]
    while (left + 1) % size != right:
        next_left, next_right = (left + 1) % size, (right - 1) % size
        if length(left, next_left) + length(next_left, right) < length(right, next_right) + length(
            left, next_right
        ):
            faces.append((hull[left], hull[next_left], hull[right]))
            left = next_left
        else:
            faces.append((hull[left], hull[next_right], hull[right]))
            right = next_right
    return faces


def _thickness(flat: NDArray[np.float64]) -> float:
    """Distance across a polygon (n, 2) at its thinnest [m]."""
    ahead = np.roll(flat, -1, axis=0) - flat
    normal = np.stack([-ahead[:, 1], ahead[:, 0]], axis=1) / np.linalg.norm(ahead, axis=1)[:, None]
    return float(np.abs(((flat[:, None] - flat) * normal).sum(axis=2)).max(axis=0).min())


def _height_errors(
    samples: NDArray[np.float64], points: NDArray[np.float64], faces: NDArray[np.int64]
) -> NDArray[np.float64]:
    """How far each sample (S, 3) is above or below the triangles (T, 3) of points (V, 3): (S,) [m]."""
    a, b, c = (points[faces[:, k]] for k in range(3))
    first, second, to = b - a, c - a, samples[:, None] - a
    area = first[:, 0] * second[:, 2] - first[:, 2] * second[:, 0]
    area = np.where(np.abs(area) < 1e-12, np.nan, area)
    u = (to[..., 0] * second[:, 2] - to[..., 2] * second[:, 0]) / area
    v = (first[:, 0] * to[..., 2] - first[:, 2] * to[..., 0]) / area
    inside = (u >= -1e-4) & (v >= -1e-4) & (u + v <= 1 + 1e-4)
    error = np.where(inside, np.abs(to[..., 1] - u * first[:, 1] - v * second[:, 1]), np.inf)
    nearest = error.min(axis=1)
    return np.where(np.isfinite(nearest), nearest, 0.0)


def _insert(points: list[tuple[float, float, float]], faces: list[Triangle], new: int) -> list[Triangle]:
    """Adds a point inside a triangulation and flips edges until it is a Delaunay triangulation again."""

    def turn(a: int, b: int, c: int) -> float:
        (ax, _, az), (bx, _, bz), (cx, _, cz) = points[a], points[b], points[c]
        return (bx - ax) * (cz - az) - (cx - ax) * (bz - az)

    def in_circle(a: int, b: int, c: int, d: int) -> bool:
        rows = [(points[k][0] - points[d][0], points[k][2] - points[d][2]) for k in (a, b, c)]
        matrix = np.array([(x, z, x * x + z * z) for x, z in rows])
        return float(np.linalg.det(matrix)) * np.sign(turn(a, b, c)) > 1e-12

    def holds(face: Triangle) -> float:
        whole = turn(*face)
        if whole == 0:
            return -np.inf
        return min(turn(face[k], face[(k + 1) % 3], new) / whole for k in range(3))

    home = max(faces, key=holds)
    left = [face for face in faces if face is not home]
    left += [(home[k], home[(k + 1) % 3], new) for k in range(3)]
    suspects = [(home[k], home[(k + 1) % 3]) for k in range(3)]
    while suspects:
        a, b = suspects.pop()
        near = next((face for face in left if {a, b, new} == set(face)), None)
        far = next((face for face in left if {a, b} <= set(face) and new not in face), None)
        if near is None or far is None:
            continue
        tip = next(k for k in far if k not in (a, b))
        if in_circle(*near, tip):
            left = [face for face in left if face is not near and face is not far]
            # Both keep the order of corners that the triangle at the new point had.
            left += [(a, tip, new), (tip, b, new)]
            suspects += [(a, tip), (tip, b)]
    return left
