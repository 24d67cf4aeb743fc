"""Which polygons of a navigation mesh an agent can cross between, inside tiles and over their borders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.scenes.navmesh_tile import EXTERNAL_EDGE, NavMeshTile, offsets_of


@dataclass(frozen=True)
class NavMeshLinks:
    """Ways from polygon to polygon across their edges, as adjacency lists in Detour's order: L links."""

    start: NDArray[np.int32]
    """Polygon p has links ``start[p]`` to ``start[p + 1]``: (P + 1,)."""
    target: NDArray[np.int32]
    """Polygon that each link leads to: (L,)."""
    edge: NDArray[np.int32]
    """Edge of the polygon that each link crosses: (L,)."""
    low: NDArray[np.int32]
    """Where the passage begins along the edge, in 255ths: (L,); 0 inside a tile."""
    high: NDArray[np.int32]
    """Where the passage ends along the edge, in 255ths: (L,); 255 inside a tile."""
    crossing: NDArray[np.int32]
    """Which of the tile's sides is crossed, in Detour's halved numbers: (L,); 0 inside a tile."""


_Link = tuple[int, int, int, int, int]
"""Target, edge, low, high and crossing of a link."""


def connect(tiles: Sequence[NavMeshTile]) -> NavMeshLinks:
    """Links inside tiles by their edges, and across borders wherever two open edges overlap.

    Args:
        tiles: The tiles of a mesh; their polygons are numbered one tile after the other.
    """
    *offsets, total = offsets_of([len(tile.polygons) for tile in tiles]).tolist()
    # Per polygon, Detour lists links across borders, latest first, before those inside the tile, by edge.
    inside: list[list[_Link]] = [[] for _ in range(total)]
    across: list[list[_Link]] = [[] for _ in range(total)]
    for tile, offset in zip(tiles, offsets, strict=True):
        internal = (tile.edges != 0) & ((tile.edges & EXTERNAL_EDGE) == 0)
        for polygon, edge in np.argwhere(internal).tolist():
            target = offset + int(tile.edges[polygon, edge]) - 1
            inside[offset + polygon].append((target, edge, 0, 255, 0))
    if len(tiles) > 1:
        _connect_borders(tiles, offsets, across)
    rows = [list(reversed(a)) + b for a, b in zip(across, inside, strict=True)]
    flat = np.array([link for row in rows for link in row], np.int32).reshape(-1, 5)
    columns = [np.ascontiguousarray(flat[:, column]) for column in range(5)]
    return NavMeshLinks(offsets_of([len(row) for row in rows]), *columns)


# Neighbouring column and row on each of a tile's eight sides.
_SIDES = ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1))


def _connect_borders(tiles: Sequence[NavMeshTile], offsets: list[int], across: list[list[_Link]]) -> None:
    """Adds links across tile borders, in the order in which Detour would while adding tile after tile."""
    # Open edges of each tile by side: polygon, edge and the two ends.
    borders: list[dict[int, list[tuple[int, int, NDArray[np.float32], NDArray[np.float32]]]]] = []
    for tile in tiles:
        sides: dict[int, list[tuple[int, int, NDArray[np.float32], NDArray[np.float32]]]] = {}
        for polygon, edge in np.argwhere((tile.edges & EXTERNAL_EDGE) != 0).tolist():
            size = int((tile.polygons[polygon] >= 0).sum())
            ends = tile.vertices[tile.polygons[polygon, [edge, (edge + 1) % size]]]
            side = int(tile.edges[polygon, edge]) & 0xFF
            sides.setdefault(side, []).append((polygon, edge, ends[0], ends[1]))
        borders.append(sides)

    def link(source: int, target: int, only_side: int | None) -> None:
        climb = tiles[target].walkable_climb
        offset, target_offset = offsets[source], offsets[target]
        edges = [(s, *e) for s, es in borders[source].items() for e in es if only_side in (None, s)]
        for side, polygon, edge, a, b in sorted(edges, key=lambda e: (e[1], e[2])):
            found: dict[int, tuple[float, float]] = {}
            for other, _, c, d in borders[target].get((side + 4) % 8, []):
                overlap = _overlap(side, a, b, c, d, climb)
                if overlap is not None and other not in found and len(found) < 4:
                    found[other] = overlap
            along = 2 if side in (0, 4) else 0
            for other, (low, high) in found.items():
                ends = sorted((t - a[along]) / (b[along] - a[along]) for t in (low, high))
                span = [int(np.floor(np.clip(end, 0.0, 1.0) * 255.0 + 0.5)) for end in ends]
                across[offset + polygon].append((target_offset + other, edge, span[0], span[1], side >> 1))

    earlier: dict[tuple[int, int], list[int]] = {}
    for new, tile in enumerate(tiles):
        for side in (None, *range(8)):
            step = (0, 0) if side is None else _SIDES[side]
            for old in earlier.get((tile.x + step[0], tile.y + step[1]), []):
                link(new, old, side)
                link(old, new, None if side is None else (side + 4) % 8)
        earlier.setdefault((tile.x, tile.y), []).append(new)


def _overlap(
    side: int,
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    c: NDArray[np.float32],
    d: NDArray[np.float32],
    climb: float,
) -> tuple[float, float] | None:
    """Where edges a-b and c-d of facing borders overlap along the border, if an agent could step across."""
    across, along = (0, 2) if side in (0, 4) else (2, 0)
    if abs(float(a[across]) - float(c[across])) > 0.01:
        return None
    (a0, a1), (c0, c1) = (sorted(pair, key=lambda p: float(p[along])) for pair in ((a, b), (c, d)))
    # Shrunk a little, so that edges which only touch at their ends are not connected.
    low = max(float(a0[along]), float(c0[along])) + 0.01
    high = min(float(a1[along]), float(c1[along])) - 0.01
    if low > high:
        return None

    def height(start: NDArray[np.float32], end: NDArray[np.float32], at: float) -> float:
        part = (at - float(start[along])) / (float(end[along]) - float(start[along]))
        return float(start[1]) + part * (float(end[1]) - float(start[1]))

    at_low = height(c0, c1, low) - height(a0, a1, low)
    at_high = height(c0, c1, high) - height(a0, a1, high)
    if at_low * at_high >= 0 and min(abs(at_low), abs(at_high)) > 2 * climb:
        return None
    return max(float(a0[along]), float(c0[along])), min(float(a1[along]), float(c1[along]))
