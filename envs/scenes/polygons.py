"""Convex polygons from outlines: ears are cut off, and the triangles joined again while they stay convex.

Part of the method of Recast Navigation. Corners lie on the grid between cells, so all tests are exact in
integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.scenes.navmesh_tile import MAX_CORNERS
from envs.scenes.outlines import Outline, crosses_any, in_cone

_SAME_HEIGHT = 2
"""Corners of different outlines at the same place are one if no farther apart in height than this [cells]."""


@dataclass(frozen=True)
class PolygonMesh:
    """Convex polygons that share edges: V corners, P polygons."""

    corners: NDArray[np.int64]
    """x, y and z of each corner: (V, 3) [cells]."""
    polygons: NDArray[np.int32]
    """Corners of each polygon, counter-clockwise seen from above, -1 behind the last: (P, 6)."""
    neighbours: NDArray[np.int32]
    """Polygon across the edge from corner j to j + 1, -1 where there is none: (P, 6)."""
    regions: NDArray[np.int32]
    """Region that each polygon lies in: (P,)."""


def polygonise(outlines: Sequence[Outline]) -> PolygonMesh:
    """Cuts outlines into convex polygons of at most six corners and finds which of them touch."""
    corners: list[tuple[int, int, int]] = []
    at_place: dict[tuple[int, int], list[int]] = {}
    polygons: list[list[int]] = []
    regions: list[int] = []
    for outline in outlines:
        triangles = _cut_ears(outline.corners[:, [0, 2]])
        index = []
        for x, y, z in outline.corners.tolist():
            near = at_place.setdefault((x, z), [])
            known = next((k for k in near if abs(corners[k][1] - y) <= _SAME_HEIGHT), None)
            if known is None:
                known = len(corners)
                corners.append((x, y, z))
                near.append(known)
            index.append(known)
        pieces = [[index[k] for k in triangle] for triangle in triangles]
        pieces = _join_convex([piece for piece in pieces if len(set(piece)) == 3], corners)
        polygons += pieces
        regions += [outline.region] * len(pieces)
    padded = np.full((len(polygons), MAX_CORNERS), -1, dtype=np.int32)
    for row, polygon in enumerate(polygons):
        padded[row, : len(polygon)] = polygon
    return PolygonMesh(
        corners=np.array(corners, dtype=np.int64).reshape(-1, 3),
        polygons=padded,
        neighbours=_find_neighbours(polygons),
        regions=np.array(regions, dtype=np.int32),
    )


def _cut_ears(flat: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Triangles of a simple polygon (n, 2), shortest cuts first; only some where it is not simple."""
    left = np.arange(len(flat))

    def is_ear(tips: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the corners at places ``tips`` of what is left can be cut off."""
        ring = flat[left]
        count = len(ring)
        before, at, after = ring[(tips - 1) % count], ring[tips % count], ring[(tips + 1) % count]
        before_two, after_two = ring[(tips - 2) % count], ring[(tips + 2) % count]
        inside = in_cone(before_two, before, at, after) & in_cone(at, after, after_two, before)
        ears = np.array(inside)
        if inside.any():
            free = ~crosses_any(before[inside], after[inside], ring, np.roll(ring, -1, axis=0))
            ears[inside] = free
        return ears

    ears = is_ear(np.arange(len(left)))
    triangles: list[tuple[int, int, int]] = []
    while len(left) > 3:
        count = len(left)
        tips = np.flatnonzero(ears)
        if len(tips) == 0:
            tips = _loose_ears(flat[left])
            if len(tips) == 0:
                return triangles
        spans = flat[left[(tips + 1) % count]] - flat[left[(tips - 1) % count]]
        # Among equals, the one whose cut begins first.
        shortest = (spans**2).sum(axis=1)
        first = tips[np.lexsort(((tips - 1) % count, shortest))[0]]
        triangles.append((int(left[first - 1]), int(left[first]), int(left[(first + 1) % count])))
        left, ears = np.delete(left, first), np.delete(ears, first)
        beside = np.array([first - 1, first]) % (count - 1)
        ears[beside] = is_ear(beside)
    triangles.append((int(left[0]), int(left[1]), int(left[2])))
    return triangles


def _loose_ears(ring: NDArray[np.int64]) -> NDArray[np.int64]:
    """Corners that may be cut off along edges of the ring, for rings that touch themselves."""
    before, after = np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0)
    step = after - ring
    behind = ring - before
    turn = behind[:, 0] * step[:, 1] - step[:, 0] * behind[:, 1]
    free = ~crosses_any(before, after, ring, after, proper_only=True)
    return np.flatnonzero((turn <= 0) & free)


def _join_convex(pieces: list[list[int]], corners: list[tuple[int, int, int]]) -> list[list[int]]:
    """Joins polygons across their longest common edges while the outcome is convex and small enough."""
    owners: dict[tuple[int, int], set[int]] = {}
    for number, piece in enumerate(pieces):
        for edge in _edges(piece):
            owners.setdefault(edge, set()).add(number)
    polygons: dict[int, list[int]] = dict(enumerate(pieces))
    values: dict[tuple[int, int], int] = {}

    def consider(first: int, second: int) -> None:
        pair = (min(first, second), max(first, second))
        value = _joined(polygons[pair[0]], polygons[pair[1]], corners)
        values[pair] = value[0] if value else 0

    for sharing in owners.values():
        for first in sharing:
            for second in sharing:
                if first < second:
                    consider(first, second)
    while values:
        (first, second), value = max(values.items(), key=lambda item: (item[1], -item[0][0], -item[0][1]))
        found = _joined(polygons[first], polygons[second], corners)
        if value <= 0 or found is None:
            break
        for number in (first, second):
            for edge in _edges(polygons[number]):
                owners[edge].discard(number)
        values = {pair: v for pair, v in values.items() if not {first, second} & set(pair)}
        polygons[first] = found[1]
        del polygons[second]
        for edge in _edges(found[1]):
            for other in owners[edge]:
                consider(first, other)
        for edge in _edges(found[1]):
            owners[edge].add(first)
    return list(polygons.values())


def _joined(
    first: list[int], second: list[int], corners: list[tuple[int, int, int]]
) -> tuple[int, list[int]] | None:
    """Squared length of the edge that two polygons share and the polygon without it; None if not allowed."""
    if len(first) + len(second) - 2 > MAX_CORNERS:
        return None
    shared = None
    second_edges = _edges(second)
    for i, edge in enumerate(_edges(first)):
        if edge in second_edges:
            shared = (i, second_edges.index(edge))
    if shared is None:
        return None
    i, j = shared
    n, m = len(first), len(second)
    turns = (
        (first[i - 1], first[i], second[(j + 2) % m]),
        (second[j - 1], second[j], first[(i + 2) % n]),
    )
    for a, b, c in turns:
        (ax, _, az), (bx, _, bz), (cx, _, cz) = corners[a], corners[b], corners[c]
        if (bx - ax) * (cz - az) - (cx - ax) * (bz - az) >= 0:
            return None
    (ax, _, az), (bx, _, bz) = corners[first[i]], corners[first[(i + 1) % n]]
    polygon = [first[(i + 1 + k) % n] for k in range(n - 1)] + [second[(j + 1 + k) % m] for k in range(m - 1)]
    return (bx - ax) ** 2 + (bz - az) ** 2, polygon


def _edges(polygon: list[int]) -> list[tuple[int, int]]:
    """Edges of a polygon, each with the lower corner first."""
    return [(a, b) if a < b else (b, a) for a, b in zip(polygon, [*polygon[1:], polygon[0]], strict=True)]


def _find_neighbours(polygons: list[list[int]]) -> NDArray[np.int32]:
    """Polygon across each edge, (P, 6); an edge joins two polygons that pass it in opposite directions."""
    neighbours = np.full((len(polygons), MAX_CORNERS), -1, dtype=np.int32)
    upward: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, polygon in enumerate(polygons):
        for place, (a, b) in enumerate(zip(polygon, [*polygon[1:], polygon[0]], strict=True)):
            if a < b:
                upward.setdefault((a, b), []).append((number, place))
    for number, polygon in enumerate(polygons):
        for place, (a, b) in enumerate(zip(polygon, [*polygon[1:], polygon[0]], strict=True)):
            if a > b:
                for other, other_place in reversed(upward.get((b, a), [])):
                    if neighbours[other, other_place] < 0 and other != number:
                        neighbours[other, other_place] = number
                        neighbours[number, place] = other
                        break
    return neighbours
