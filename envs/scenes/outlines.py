"""Outlines of regions, simplified, with their holes cut open.

Part of the method of Recast Navigation. Corners lie on the grid between cells, so all tests are exact in
integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import warp as wp
from numpy.typing import NDArray

from envs.scenes import navmesh_kernels as kernels
from envs.scenes.regions import trace_borders
from envs.scenes.voxelise import Floor


@dataclass(frozen=True)
class Outline:
    """A closed polygon around one region."""

    corners: NDArray[np.int64]
    """x, y and z of each corner (n, 3) [cells], counter-clockwise seen from above. Corners are passed twice
    where a hole was cut open."""
    region: int
    """The region inside."""


def trace_outlines(
    floor: Floor, labels: NDArray[np.int32], max_error: float, max_length: int
) -> list[Outline]:
    """Simplified outlines of all regions; those of neighbouring regions share corners and edges.

    Args:
        floor: The floor.
        labels: Region of each span (N,), 0 outside.
        max_error: How far an outline may deviate from the border of the floor [cells].
        max_length: Edges along the border of the floor are cut if longer [cells].
    """
    borders = trace_borders(floor.neighbours, labels)
    corners = _border_corners(floor, borders.spans, borders.sides)
    beyond = floor.neighbours[borders.spans, borders.sides]
    behind = np.where(beyond >= 0, labels[beyond], 0)
    kept = wp.zeros(len(corners), dtype=wp.int32, device="cpu")
    parts = (corners[:, 0], corners[:, 2], behind, borders.starts)
    wp.launch(
        kernels.simplify,
        len(borders.starts) - 1,
        [
            *(kernels.integers(part) for part in parts),
            max_error**2,
            max_length**2,
            kept,
        ],
        device="cpu",
    )
    keep = kept.numpy() == 1
    outer: list[Outline] = []
    holes: dict[int, list[NDArray[np.int64]]] = {}
    for first, last in zip(borders.starts[:-1].tolist(), borders.starts[1:].tolist(), strict=True):
        loop = corners[first:last][keep[first:last]]
        distinct = (loop[:, [0, 2]] != np.roll(loop[:, [0, 2]], -1, axis=0)).any(axis=1)
        loop = loop[distinct]
        if len(loop) < 3:
            continue
        region = int(labels[borders.spans[first]])
        if _doubled_area(loop) < 0:
            holes.setdefault(region, []).append(loop)
        else:
            outer.append(Outline(loop, region))
    # A region has one outline; should simplification have torn off another, the last one takes the holes.
    owner = {outline.region: index for index, outline in enumerate(outer)}
    for region, loops in holes.items():
        if region in owner:
            index = owner[region]
            outer[index] = Outline(_cut_holes(outer[index].corners, loops), region)
    return outer


def side_of(a: NDArray[np.int64], b: NDArray[np.int64], c: NDArray[np.int64]) -> NDArray[np.int64]:
    """Twice the signed area of triangles a, b, c (..., 2): negative where c lies to the left of a to b."""
    return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (c[..., 0] - a[..., 0]) * (
        b[..., 1] - a[..., 1]
    )


def crosses_any(
    start: NDArray[np.int64],
    end: NDArray[np.int64],
    firsts: NDArray[np.int64],
    seconds: NDArray[np.int64],
    proper_only: bool = False,
) -> NDArray[np.bool_]:
    """Whether segments start - end (..., 2) touch an edge firsts - seconds (E, 2), those at their ends apart.

    ``proper_only`` counts only edges that are crossed in their interior.
    """
    start, end = start[..., None, :], end[..., None, :]
    first, second = side_of(start, end, firsts), side_of(start, end, seconds)
    third, fourth = side_of(firsts, seconds, start), side_of(firsts, seconds, end)
    # Products of signs, because products of areas could overflow.
    first, second, third, fourth = (np.sign(part) for part in (first, second, third, fourth))
    touches = (first * second < 0) & (third * fourth < 0)
    if not proper_only:
        touches |= (first == 0) & _between(start, end, firsts)
        touches |= (second == 0) & _between(start, end, seconds)
        touches |= (third == 0) & _between(firsts, seconds, start)
        touches |= (fourth == 0) & _between(firsts, seconds, end)
    shared = (start == firsts).all(-1) | (start == seconds).all(-1)
    shared |= (end == firsts).all(-1) | (end == seconds).all(-1)
    return np.asarray((touches & ~shared).any(axis=-1))


def in_cone(
    before: NDArray[np.int64], at: NDArray[np.int64], after: NDArray[np.int64], target: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether segments from a polygon's corners ``at`` to a target leave into its inside (..., 2)."""
    convex = side_of(before, at, after) <= 0
    inside_convex = (side_of(at, target, before) < 0) & (side_of(target, at, after) < 0)
    outside_reflex = (side_of(at, target, after) <= 0) & (side_of(target, at, before) <= 0)
    return np.where(convex, inside_convex, ~outside_reflex)


def _between(a: NDArray[np.int64], b: NDArray[np.int64], c: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether c, which lies on the line through a and b, lies between them (..., 2)."""
    return ((a - c) * (b - c)).sum(axis=-1) <= 0


def _border_corners(floor: Floor, spans: NDArray[np.int32], sides: NDArray[np.int32]) -> NDArray[np.int64]:
    """Corner at the end of each border step (E, 3) [cells], as high as the highest of the spans around it."""

    def step(at: NDArray[np.int32], side: NDArray[np.int32]) -> NDArray[np.int32]:
        return np.where(at >= 0, floor.neighbours[at, side], -1)

    turn = (sides + 1) % 4
    ahead, aside = step(spans, sides), step(spans, turn)
    height = floor.y[spans].astype(np.int64)
    for other in (ahead, aside, step(ahead, turn), step(aside, sides)):
        height = np.maximum(height, np.where(other >= 0, floor.y[other], 0))
    x = floor.x[spans] + ((sides == 1) | (sides == 2))
    z = floor.z[spans] + ((sides == 0) | (sides == 1))
    return np.stack([x, height, z], axis=1).astype(np.int64)


def _doubled_area(loop: NDArray[np.int64]) -> int:
    x, z = loop[:, 0], loop[:, 2]
    return int((x * np.roll(z, 1) - np.roll(x, 1) * z).sum())


def _cut_holes(outline: NDArray[np.int64], holes: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Joins holes to the outline by the shortest free bridges, from left to right."""
    leftmost = [int(np.lexsort((hole[:, 2], hole[:, 0]))[0]) for hole in holes]
    order = sorted(range(len(holes)), key=lambda k: tuple(holes[k][leftmost[k]][[0, 2]].tolist()))
    for rank, index in enumerate(order):
        hole = holes[index]
        flat = outline[:, [0, 2]]
        before, after = np.roll(flat, 1, axis=0), np.roll(flat, -1, axis=0)
        loops = [flat, *(holes[other][:, [0, 2]] for other in order[rank:])]
        firsts = np.concatenate(loops)
        seconds = np.concatenate([np.roll(loop, -1, axis=0) for loop in loops])
        for turn in range(len(hole)):
            corner = (leftmost[index] + turn) % len(hole)
            target = hole[corner, [0, 2]]
            visible = np.flatnonzero(in_cone(before, flat, after, target))
            lengths = ((flat[visible] - target) ** 2).sum(axis=1)
            visible = visible[np.argsort(lengths, kind="stable")]
            free = ~crosses_any(flat[visible], np.broadcast_to(target, flat[visible].shape), firsts, seconds)
            if free.any():
                at = int(visible[int(free.argmax())])
                bridge = [np.roll(outline, -at, axis=0), outline[at : at + 1]]
                outline = np.concatenate([*bridge, np.roll(hole, -corner, axis=0), hole[corner : corner + 1]])
                break
    return outline
