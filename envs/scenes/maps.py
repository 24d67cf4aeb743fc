"""Top-down maps: where an agent can walk on one floor, and what it did there.

A map looks straight down: world +X is to the right of the image and world +Z is down, so that an agent with
yaw 0 (looking along -Z) faces the top. Everything is drawn larger and averaged down, so that thin paths and
slanted walls come out smooth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

BACKGROUND = (255, 255, 255)
OBSTACLE = (198, 203, 212)
WALKABLE = (238, 240, 244)
OTHER_LEVEL = (219, 226, 238)
OUTLINE = (104, 112, 128)
SHORTEST_PATH = (64, 168, 108)
START = (44, 98, 200)
GOAL = (214, 62, 62)
AGENT = (28, 32, 44)
MARK = (232, 120, 24)
VISITED = (168, 186, 214)

_SUPERSAMPLING = 3
"""Each output pixel averages this many pixels squared."""
_SAME_FLOOR = 0.35
"""Polygons within this height of the floor [m] decide which connected areas the map shows."""
_LEVEL = 1.0
"""Polygons of those areas farther than this from the floor [m] are drawn as leading elsewhere."""
_OTHER_STOREY = 2.2
"""Polygons farther than this from the floor [m] belong to another storey's map."""


class WalkableMesh(Protocol):
    """What a map needs of a navigation mesh."""

    @property
    def vertices(self) -> NDArray[np.float32]:
        """Corners of the polygons: (V, 3) float32 [m]."""

    @property
    def polygons(self) -> NDArray[np.int32]:
        """Vertex indices of each polygon, padded with -1: (P, 6) int32."""

    @property
    def islands(self) -> NDArray[np.int32]:
        """Connected area that each polygon belongs to: (P,) int32."""


@dataclass(frozen=True)
class TopDownMap:
    """One floor seen from above."""

    grid: NDArray[np.bool_]
    """Where the agent's centre may be: (rows, columns) bool."""
    image: NDArray[np.uint8]
    """The empty map in colour: (rows, columns, 3) uint8 RGB."""
    origin: tuple[float, float]
    """World x and z of the image's upper left corner [m]."""
    metres_per_pixel: float
    """Size of one pixel [m]."""
    height: float
    """Height of the floor shown [m]."""
    _fine: NDArray[np.uint8] = field(repr=False)
    """The empty map before averaging: (rows * s, columns * s, 3) uint8 RGB."""

    def world_to_pixel(self, points: ArrayLike) -> NDArray[np.float64]:
        """Column and row, as fractions from the image's upper left corner, of points (..., 3) [m].

        Returns (..., 2) float64; a pixel's centre lies at half integers.
        """
        points = np.asarray(points, dtype=np.float64)
        return (points[..., [0, 2]] - np.asarray(self.origin)) / self.metres_per_pixel

    def pixel_to_world(self, pixels: ArrayLike) -> NDArray[np.float64]:
        """Points on the floor shown (..., 3) [m] at columns and rows (..., 2)."""
        pixels = np.asarray(pixels, dtype=np.float64)
        plane = pixels * self.metres_per_pixel + np.asarray(self.origin)
        return np.stack([plane[..., 0], np.full(plane.shape[:-1], self.height), plane[..., 1]], axis=-1)


def floor_heights(mesh: WalkableMesh, min_area: float = 4.0) -> list[float]:
    """Heights [m] of the floors of a navigation mesh, lowest first.

    A floor is a height around which at least ``min_area`` [m2] is walkable and level, within 0.5 m. A roof
    that an agent could stand on is one too, as it is to Habitat.
    """
    low, high = _polygon_extents(mesh)
    level_area = np.where(high - low <= _SAME_FLOOR, _polygon_areas(mesh), 0.0)
    heights, members = np.unique(np.round(_polygon_heights(mesh), 2), return_inverse=True)
    areas = np.bincount(members.ravel(), level_area, minlength=len(heights))
    floors: list[float] = []
    while len(heights):
        # The height around which most area lies is a floor; take its polygons away and look again.
        near = np.abs(heights[:, None] - heights[None]) <= 0.5
        mass = near @ areas
        if mass.max() < min_area:
            break
        level = near[int(mass.argmax())]
        centre = heights[level][int(areas[level].argmax())]
        floors.append(float(centre))
        left = np.abs(heights - centre) > _LEVEL
        heights, areas = heights[left], areas[left]
    return sorted(floors)


def top_down_map(
    mesh: WalkableMesh, height: float | None = None, size: int = 600, margin: float = 0.4
) -> TopDownMap:
    """Map of the floor at a height.

    Args:
        mesh: Navigation mesh of the scene.
        height: Height of the floor [m]; None takes the lowest one.
        size: Length of the image's longer side [pixels].
        margin: Free border around what is walkable [m].

    Raises:
        ValueError: Nothing is walkable near the height.
    """
    if height is None:
        floors = floor_heights(mesh) or floor_heights(mesh, min_area=0.0)
        if not floors:
            raise ValueError("the navigation mesh has no polygons, so there is no floor to draw")
        height = floors[0]
    heights = _polygon_heights(mesh)
    # A point on stairs lies within the heights of their polygons, not near their mean.
    low, high = _polygon_extents(mesh)
    on_floor = (low - _SAME_FLOOR <= height) & (height <= high + _SAME_FLOOR)
    if not on_floor.any():
        known = ", ".join(f"{floor:.1f}" for floor in floor_heights(mesh)) or "none"
        raise ValueError(
            f"nothing is walkable within {_SAME_FLOOR} m of height {height:.2f} m; floors: {known}"
        )
    shown = np.isin(mesh.islands, np.unique(mesh.islands[on_floor])) & (
        np.abs(heights - height) <= _OTHER_STOREY
    )
    corners = [mesh.vertices[polygon[polygon >= 0]] for polygon in mesh.polygons[shown]]
    every = np.concatenate(corners)[:, [0, 2]]
    lower, upper = every.min(axis=0) - margin, every.max(axis=0) + margin
    metres_per_pixel = float((upper - lower).max() / size)
    columns, rows = np.maximum(np.ceil((upper - lower) / metres_per_pixel - 1e-6).astype(int), 1)

    scale = _SUPERSAMPLING / metres_per_pixel
    walkable = np.zeros((rows * _SUPERSAMPLING, columns * _SUPERSAMPLING), dtype=np.uint8)
    elsewhere = np.zeros_like(walkable)
    for polygon, y in zip(corners, heights[shown], strict=True):
        pixels = _fixed_point((polygon[:, [0, 2]] - lower) * scale)
        layer = walkable if abs(y - height) <= _LEVEL else elsewhere
        cv2.fillPoly(layer, [pixels], 255, lineType=cv2.LINE_8, shift=_SHIFT)
    fine = _paint_floor(walkable, elsewhere, outline=max(1, round(0.9 * _SUPERSAMPLING)), wall=0.3 * scale)
    image = cv2.resize(fine, (int(columns), int(rows)), interpolation=cv2.INTER_AREA)
    free = np.maximum(walkable, elsewhere)
    coverage = cv2.resize(free, (int(columns), int(rows)), interpolation=cv2.INTER_AREA)
    return TopDownMap(
        grid=coverage > 127,
        image=image.astype(np.uint8),
        origin=(float(lower[0]), float(lower[1])),
        metres_per_pixel=metres_per_pixel,
        height=float(height),
        _fine=fine,
    )


def draw_map(
    floor: TopDownMap,
    *,
    start: ArrayLike | None = None,
    goal: ArrayLike | None = None,
    agent_path: ArrayLike | None = None,
    shortest_path: ArrayLike | None = None,
    agent_yaw: float | None = None,
    success_distance: float | None = None,
    marks: ArrayLike | None = None,
) -> NDArray[np.uint8]:
    """The map with an episode drawn on it.

    Args:
        floor: The empty map.
        start: Where the agent began (3,) [m]: a blue ring.
        goal: Where it was to go (3,) [m]: a red dot.
        agent_path: Where it was at each step (T, 3) [m]: a line from violet at first to yellow at last. The
            agent is drawn at its end.
        shortest_path: Corners of the shortest path (K, 3) [m]: a thin green line.
        agent_yaw: Heading of the agent at the path's end [rad]: draws an arrow there, else a dot.
        success_distance: How near the goal the agent had to stop [m]: a circle around the goal.
        marks: Places on the way that deserve a look (M, 3) [m]: an orange ring around each.

    Returns:
        (rows, columns, 3) uint8 RGB. Points that are not finite are left out.
    """
    canvas = floor._fine.copy()
    unit = _SUPERSAMPLING * max(floor.image.shape[:2]) / 600.0  # One pixel of a 600-pixel map.
    shortest = _pixels(floor, shortest_path)
    if len(shortest) > 1:
        _polyline(canvas, shortest, SHORTEST_PATH, 2.2 * unit)
    if success_distance is not None:
        for centre in _pixels(floor, goal):
            radius = success_distance / floor.metres_per_pixel * _SUPERSAMPLING
            _disc(canvas, centre, radius, _mix(GOAL, WALKABLE, 0.75))
    path = _pixels(floor, agent_path)
    if len(path) > 1:
        steps = np.linspace(0, 1, len(path) - 1)
        colours = _time_colours(steps)
        _polyline(canvas, path, (255, 255, 255), 5.6 * unit)
        for first, last, colour in zip(path[:-1], path[1:], colours, strict=True):
            _polyline(canvas, np.stack([first, last]), colour, 3.4 * unit)
    for centre in _pixels(floor, marks):
        _ring(canvas, centre, 5.0 * unit, MARK, 1.8 * unit)
    for centre in _pixels(floor, start):
        _disc(canvas, centre, 7.0 * unit, (255, 255, 255))
        _disc(canvas, centre, 5.6 * unit, START)
        _disc(canvas, centre, 2.6 * unit, (255, 255, 255))
    for centre in _pixels(floor, goal):
        _disc(canvas, centre, 7.0 * unit, (255, 255, 255))
        _disc(canvas, centre, 5.6 * unit, GOAL)
    if len(path):
        _agent(canvas, path[-1], agent_yaw, unit)
    rows, columns = floor.image.shape[:2]
    return np.asarray(cv2.resize(canvas, (columns, rows), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def draw_places(floor: TopDownMap, visited: ArrayLike, marked: ArrayLike) -> NDArray[np.uint8]:
    """The map with many places on it.

    Args:
        floor: The empty map.
        visited: Places (V, 3) [m], in pale blue.
        marked: Places that matter (M, 3) [m], in orange, the stronger the more lie together.

    Returns:
        (rows, columns, 3) uint8 RGB. Points that are not finite are left out.
    """
    canvas = floor._fine.astype(np.float32)
    unit = _SUPERSAMPLING * max(floor.image.shape[:2]) / 600.0
    for points, colour, share, radius in ((visited, VISITED, 0.35, 2.6), (marked, MARK, 0.3, 3.6)):
        layer = _density(canvas.shape[:2], _pixels(floor, points), radius * unit)
        strength = (1.0 - (1.0 - share) ** layer)[..., None]
        canvas = canvas * (1.0 - strength) + np.array(colour, np.float32) * strength
    rows, columns = floor.image.shape[:2]
    small = cv2.resize(canvas, (columns, rows), interpolation=cv2.INTER_AREA)
    return np.rint(small).astype(np.uint8)


def _density(shape: tuple[int, ...], pixels: NDArray[np.float64], radius: float) -> NDArray[np.float32]:
    """How many discs around points (N, 2) cover each pixel of an image: (rows, columns)."""
    size = max(1, round(radius))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * size + 1, 2 * size + 1)).astype(np.float32)
    rows, columns = shape[:2]
    counts = np.zeros((rows, columns), np.float32)
    inside = (pixels >= 0).all(axis=1) & (pixels < (columns, rows)).all(axis=1)
    places, repeats = np.unique(pixels[inside].astype(int), axis=0, return_counts=True)
    counts[places[:, 1], places[:, 0]] = repeats
    return cv2.filter2D(counts, -1, disc, borderType=cv2.BORDER_CONSTANT).astype(np.float32, copy=False)


_SHIFT = 4
"""OpenCV takes fixed-point coordinates with this many fractional bits."""


def _fixed_point(pixels: NDArray[np.float64]) -> NDArray[np.int32]:
    """Coordinates from the image's corner as OpenCV wants them: fixed-point, from a pixel's centre."""
    return np.rint((pixels - 0.5) * (1 << _SHIFT)).astype(np.int32)


def _polygon_heights(mesh: WalkableMesh) -> NDArray[np.float64]:
    """Mean height of each polygon's corners: (P,) [m]."""
    present = mesh.polygons >= 0
    ys = np.where(present, mesh.vertices[:, 1][mesh.polygons], 0.0)
    return np.asarray(ys.sum(axis=1) / np.maximum(present.sum(axis=1), 1), dtype=np.float64)


def _polygon_extents(mesh: WalkableMesh) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Heights of the lowest and the highest corner of each polygon: (P,) each [m]."""
    filled = np.where(mesh.polygons >= 0, mesh.polygons, mesh.polygons[:, :1])
    heights = mesh.vertices[:, 1][filled].astype(np.float64)
    return heights.min(axis=1), heights.max(axis=1)


def _polygon_areas(mesh: WalkableMesh) -> NDArray[np.float64]:
    """Area of each polygon seen from above: (P,) [m2]."""
    polygons = mesh.polygons
    # A polygon's missing corners repeat its first one, which adds nothing to the shoelace sum.
    filled = np.where(polygons >= 0, polygons, polygons[:, :1])
    x, z = mesh.vertices[filled][..., 0], mesh.vertices[filled][..., 2]
    cross = x * np.roll(z, -1, axis=1) - np.roll(x, -1, axis=1) * z
    return np.abs(cross.sum(axis=1, dtype=np.float64)) / 2


def _paint_floor(
    walkable: NDArray[np.uint8], elsewhere: NDArray[np.uint8], outline: int, wall: float
) -> NDArray[np.uint8]:
    """Colours the walkable area, the obstacles it encloses and the walls around it."""
    free = walkable | elsewhere
    canvas = np.empty((*free.shape, 3), dtype=np.uint8)
    canvas[:] = BACKGROUND
    # What lies between walkable areas, or within a wall's width of one, is an obstacle; the rest is outside.
    solid = (cv2.distanceTransform(255 - free, cv2.DIST_L2, 5) <= wall).astype(np.uint8) * 255
    contours, _ = cv2.findContours(solid, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(solid, contours, -1, 255, thickness=cv2.FILLED)
    canvas[solid > 0] = OBSTACLE
    canvas[elsewhere > 0] = OTHER_LEVEL
    canvas[walkable > 0] = WALKABLE
    edges, _ = cv2.findContours(free, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, edges, -1, OUTLINE, thickness=outline)
    return canvas


def _pixels(floor: TopDownMap, points: ArrayLike | None) -> NDArray[np.float64]:
    """Supersampled columns and rows of the finite ones of points (N, 3) or (3,): (M, 2)."""
    if points is None:
        return np.empty((0, 2))
    array = np.asarray(points, dtype=np.float64).reshape(-1, 3)
    return floor.world_to_pixel(array[np.isfinite(array).all(axis=1)]) * _SUPERSAMPLING


def _polyline(
    canvas: NDArray[np.uint8], pixels: NDArray[np.float64], colour: tuple[int, int, int], width: float
) -> None:
    cv2.polylines(
        canvas, [_fixed_point(pixels)], False, colour, max(1, round(width)), cv2.LINE_AA, shift=_SHIFT
    )


def _disc(
    canvas: NDArray[np.uint8], centre: NDArray[np.float64], radius: float, colour: tuple[int, int, int]
) -> None:
    column, row = _fixed_point(centre)
    size = max(1, round(radius * (1 << _SHIFT)))
    cv2.circle(canvas, (int(column), int(row)), size, colour, cv2.FILLED, cv2.LINE_AA, shift=_SHIFT)


def _ring(
    canvas: NDArray[np.uint8],
    centre: NDArray[np.float64],
    radius: float,
    colour: tuple[int, int, int],
    width: float,
) -> None:
    column, row = _fixed_point(centre)
    size = max(1, round(radius * (1 << _SHIFT)))
    cv2.circle(canvas, (int(column), int(row)), size, colour, max(1, round(width)), cv2.LINE_AA, shift=_SHIFT)


def _agent(canvas: NDArray[np.uint8], centre: NDArray[np.float64], yaw: float | None, unit: float) -> None:
    """A dart that points where the agent looks, or a dot."""
    if yaw is None or not np.isfinite(yaw):
        _disc(canvas, centre, 5.4 * unit, (255, 255, 255))
        _disc(canvas, centre, 4.2 * unit, AGENT)
        return
    forward = np.array([-np.sin(yaw), -np.cos(yaw)])
    right = np.array([-forward[1], forward[0]])
    dart = np.array([[12.0, 0.0], [-7.0, 7.5], [-3.0, 0.0], [-7.0, -7.5]]) * unit
    corners = _fixed_point(centre + dart[:, :1] * forward + dart[:, 1:] * right)
    cv2.polylines(
        canvas, [corners], True, (255, 255, 255), max(1, round(3 * unit)), cv2.LINE_AA, shift=_SHIFT
    )
    cv2.fillPoly(canvas, [corners], AGENT, cv2.LINE_AA, shift=_SHIFT)


def _mix(colour: tuple[int, int, int], other: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue


def _time_colours(times: NDArray[np.float64]) -> list[tuple[int, int, int]]:
    """RGB colours for times in 0..1, from violet through red to yellow, even in lightness."""
    ramp = np.rint(np.clip(times, 0, 1) * 215 + 25).astype(np.uint8)[None]
    colours = cv2.applyColorMap(ramp, cv2.COLORMAP_PLASMA)[0, :, ::-1]
    return [(int(red), int(green), int(blue)) for red, green, blue in colours]
