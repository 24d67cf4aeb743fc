"""Partition of the walkable floor into simple regions, by watershed.

Part of the method of Recast Navigation: the floor's distance from its border is flooded from the deepest
places down, and basins that meet become regions, small ones joined with a neighbour. A region's outline
can be turned into polygons on its own, because no region lies above itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import warp as wp
from numpy.typing import NDArray

from envs.scenes import navmesh_kernels as kernels
from envs.scenes.voxelise import Floor, boundary_distance

_EXPANSIONS = 8
"""How often a region may grow into newly flooded cells before they can become a region of their own."""
_FAR = 1 << 30


@dataclass(frozen=True)
class Borders:
    """Closed walks around regions, with the region on the left: E steps in C walks."""

    spans: NDArray[np.int32]
    """Span inside the region at each step: (E,)."""
    sides: NDArray[np.int32]
    """Side of that span that the border runs along: (E,)."""
    starts: NDArray[np.int32]
    """First step of each walk, and E at the end: (C + 1,)."""


def partition_floor(floor: Floor, min_cells: int, merge_cells: int) -> NDArray[np.int32]:
    """Region of each span, 1 .. R without gaps, 0 where the floor is not walkable: (N,).

    Args:
        floor: The floor.
        min_cells: Connected floor with fewer cells is dropped.
        merge_cells: Regions with fewer cells are joined with a neighbour where possible.
    """
    return _merge_regions(floor, _watershed(floor), min_cells, merge_cells)


def trace_borders(neighbours: NDArray[np.int32], labels: NDArray[np.int32]) -> Borders:
    """Walks around all regions of a labelling (N,) with 0 outside; regions of a single cell are left out."""
    beyond = np.where(neighbours >= 0, labels[neighbours], 0)
    edge = (beyond != labels[:, None]) & (labels > 0)[:, None]
    edge[edge.all(axis=1)] = False
    spans, sides = (part.astype(np.int32) for part in np.nonzero(edge))
    # The next step turns left at the corner of the span, goes straight on along the next one, or turns right.
    following = np.full(len(spans), -1, dtype=np.int64)
    at, side = spans, (sides + 1) % 4
    for _ in range(3):
        found = (following < 0) & (at >= 0) & edge[at, side]
        following[found] = 4 * at[found].astype(np.int64) + side[found]
        at = np.where(at >= 0, neighbours[at, side], -1)
        side = (side - 1) % 4
    rank = np.full(4 * len(labels), -1, dtype=np.int32)
    rank[4 * spans.astype(np.int64) + sides] = np.arange(len(spans), dtype=np.int32)
    successor = kernels.integers(np.where(following >= 0, rank[following], -1))
    order = wp.empty(len(spans), dtype=wp.int32, device="cpu")
    starts = wp.empty(len(spans) + 1, dtype=wp.int32, device="cpu")
    visited = wp.zeros(len(spans), dtype=wp.int32, device="cpu")
    count = wp.zeros(1, dtype=wp.int32, device="cpu")
    wp.launch(kernels.follow, 1, [successor, visited, order, starts, count], device="cpu")
    walk = order.numpy()
    return Borders(spans[walk], sides[walk], starts.numpy()[: int(count.numpy()[0]) + 1])


def _watershed(floor: Floor) -> NDArray[np.int32]:
    """Region of each span before small ones are joined: (N,)."""
    total = len(floor.y)
    sharp = boundary_distance(floor.neighbours, floor.walkable)
    depth = _blur(floor.neighbours, sharp)
    inside = (floor.neighbours >= 0) & floor.walkable[floor.neighbours] & floor.walkable[:, None]
    neighbours = np.where(inside, floor.neighbours, -1)
    # One more entry than spans, so that neighbour -1 reads label 0.
    labels = wp.zeros(total + 1, dtype=wp.int32, device="cpu")
    growth = wp.zeros(total + 1, dtype=wp.int32, device="cpu")
    label, grown = labels.numpy(), growth.numpy()
    flood_inputs = [kernels.integers(part) for part in (neighbours, depth)]
    stack = wp.empty(total + 1, dtype=wp.int32, device="cpu")
    next_region = kernels.integers([1])

    walkable = np.flatnonzero(floor.walkable)
    walkable = walkable[np.argsort(-(depth[walkable] >> 1), kind="stable")]
    revealed = -(depth[walkable] >> 1)
    waiting = np.empty(0, dtype=np.int64)
    level = (int(sharp.max(initial=0)) + 1) & ~1
    shown = 0
    while level > 0:
        level = max(level - 2, 0)
        until = int(np.searchsorted(revealed, -(level >> 1), side="right"))
        waiting = np.concatenate([waiting, walkable[shown:until]])
        shown = until
        waiting = waiting[label[waiting] == 0]
        _expand(waiting, neighbours, label, grown, _EXPANSIONS if level > 0 else None)
        waiting = waiting[label[waiting] == 0]
        if len(waiting):
            seeds = kernels.integers(waiting)
            wp.launch(
                kernels.flood,
                1,
                [seeds, *flood_inputs, max(level - 2, 0), labels, growth, stack, next_region],
                device="cpu",
            )
    _expand(walkable[label[walkable] == 0], neighbours, label, grown, None)
    return label[:total].copy()


def _blur(neighbours: NDArray[np.int32], distance: NDArray[np.int32]) -> NDArray[np.int32]:
    """Mean of each distance and the eight around it, so that ripples do not become regions: (N,)."""
    total = distance.copy()
    for side in range(4):
        beside = neighbours[:, side]
        corner = np.where(beside >= 0, neighbours[beside, (side + 1) % 4], -1)
        total += np.where(beside >= 0, distance[beside], distance)
        total += np.where(corner >= 0, distance[corner], distance)
    return np.where(distance > 2, (total + 5) // 9, distance)


def _expand(
    spans: NDArray[np.int64],
    neighbours: NDArray[np.int32],
    label: NDArray[np.int32],
    grown: NDArray[np.int32],
    iterations: int | None,
) -> None:
    """Lets regions grow into unlabelled spans, in rounds; None goes on until nothing changes."""
    done = 0
    while len(spans) and done != iterations:
        around = neighbours[spans]
        distance = np.where(label[around] > 0, grown[around] + 2, _FAR)
        best = distance.argmin(axis=1)[:, None]
        nearest = np.take_along_axis(distance, best, axis=1)[:, 0]
        reached = nearest < _FAR
        if not reached.any():
            return
        taken = spans[reached]
        label[taken] = label[np.take_along_axis(around, best, axis=1)[reached, 0]]
        grown[taken] = nearest[reached]
        spans = spans[~reached]
        done += 1


def _merge_regions(
    floor: Floor, labels: NDArray[np.int32], min_cells: int, merge_cells: int
) -> NDArray[np.int32]:
    """Drops small separate floor and joins small regions with their smallest fitting neighbour."""
    num = int(labels.max(initial=0)) + 1
    cells = np.bincount(labels, minlength=num).tolist()
    above, overlapping = _stacked_regions(floor, labels, num)
    around: list[list[int]] = [[] for _ in range(num)]
    borders = trace_borders(floor.neighbours, labels)
    beyond = floor.neighbours[borders.spans, borders.sides]
    beyond_label = np.where(beyond >= 0, labels[beyond], 0)
    for first, last in zip(borders.starts[:-1].tolist(), borders.starts[1:].tolist(), strict=True):
        region = int(labels[borders.spans[first]])
        if not around[region]:
            steps = beyond_label[first:last]
            around[region] = steps[np.flatnonzero(steps != np.roll(steps, 1))].tolist() or [int(steps[0])]

    merged_into = list(range(num))
    _drop_small(around, cells, min_cells, merged_into)

    def root(region: int) -> int:
        while merged_into[region] != region:
            region = merged_into[region]
        return region

    def neighbours_of(region: int) -> list[int]:
        roots = [root(other) for other in around[region]]
        around[region] = [
            r for r, before in zip(roots, [*roots[-1:], *roots[:-1]], strict=True) if r != before
        ]
        if not around[region]:
            around[region] = roots[:1]
        return around[region]

    def fits(region: int, other: int) -> bool:
        meets_once = neighbours_of(region).count(other) <= 1
        return meets_once and other not in {root(stacked) for stacked in above[region]}

    changed = True
    while changed:
        changed = False
        for region in range(1, num):
            if merged_into[region] != region or overlapping[region] or cells[region] == 0:
                continue
            beside = neighbours_of(region)
            if cells[region] > merge_cells and 0 in beside:
                continue
            target, fewest = region, _FAR
            for other in beside:
                if other in (0, region) or overlapping[other] or cells[other] >= fewest:
                    continue
                if fits(region, other) and fits(other, region):
                    target, fewest = other, cells[other]
            if target == region or region not in neighbours_of(target):
                continue
            # The two walks become one where the regions meet.
            ours, theirs = beside, neighbours_of(target)
            here, there = ours.index(target), theirs.index(region)
            around[target] = theirs[there + 1 :] + theirs[:there] + ours[here + 1 :] + ours[:here]
            above[target] |= above[region]
            cells[target] += cells[region]
            cells[region] = 0
            merged_into[region] = target
            changed = True

    roots = np.array([root(region) for region in range(num)])
    kept = np.unique(roots[roots > 0])
    new_label = np.zeros(num, dtype=np.int32)
    new_label[roots > 0] = np.searchsorted(kept, roots[roots > 0]) + 1
    return new_label[labels]


def _drop_small(around: list[list[int]], cells: list[int], min_cells: int, merged_into: list[int]) -> None:
    """Merges the regions of connected floor with too few cells into region 0, which is nothing."""
    visited = [False] * len(around)
    for seed in range(1, len(around)):
        if visited[seed] or cells[seed] == 0:
            continue
        visited[seed] = True
        connected, stack = [], [seed]
        while stack:
            region = stack.pop()
            connected.append(region)
            for other in around[region]:
                if other and not visited[other]:
                    visited[other] = True
                    stack.append(other)
        if sum(cells[region] for region in connected) < min_cells:
            for region in connected:
                merged_into[region] = 0
                cells[region] = 0


def _stacked_regions(
    floor: Floor, labels: NDArray[np.int32], num: int
) -> tuple[list[set[int]], NDArray[np.bool_]]:
    """Which regions lie above or below each region, and which lie above themselves."""
    column = floor.x + floor.z * floor.width
    above: list[set[int]] = [set() for _ in range(num)]
    overlapping = np.zeros(num, dtype=bool)
    for gap in range(1, int(np.diff(floor.column_start).max(initial=1))):
        same = column[gap:] == column[:-gap]
        pairs = np.stack([labels[:-gap][same], labels[gap:][same]], axis=1)
        for low, high in np.unique(pairs[(pairs > 0).all(axis=1)], axis=0).tolist():
            if low == high:
                overlapping[low] = True
            above[low].add(high)
            above[high].add(low)
    return above, overlapping
