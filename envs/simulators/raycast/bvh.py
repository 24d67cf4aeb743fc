"""A bounding volume hierarchy over triangles, for kernels that walk it themselves.

Warp's own mesh query answers one ray at a time. The cameras here send thousands of rays from one point, so
the renderer walks a tree once for a block of pixels instead, and needs to see the nodes for that.
"""

# Warp compiles the source: a variable that a branch or a loop changes has to be made by int() or float(), and
# types are Warp's own.
# ruff: noqa: UP018, RUF046
# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import warp as wp

wp.set_module_options({"enable_backward": False, "max_unroll": 1})

STACK_SIZE = 96
"""Nodes that a walk down the tree may have to remember; trees are built no deeper."""
_BINS = wp.constant(16)
_MAX_LEAF = wp.constant(4)
# From this depth on nodes are halved by count, which ends after 25 more levels at the most triangles allowed.
_BALANCED_DEPTH = wp.constant(64)
_HUGE = wp.constant(3.0e38)


@wp.struct
class Node:
    """A box with two nodes below it, ``first`` and the next, or with ``count`` triangles from ``first``."""

    lower: wp.vec3
    first: wp.int32
    upper: wp.vec3
    count: wp.int32


@dataclass(frozen=True)
class Bvh:
    """A tree over triangles."""

    nodes: npt.NDArray[np.void]
    """Nodes as :class:`Node` lays them out, the root first: (K,)."""
    order: npt.NDArray[np.int32]
    """Triangles in the order in which the leaves count them: (T,) int32."""


@wp.func
def _half_area(lower: wp.vec3, upper: wp.vec3) -> float:
    size = upper - lower
    return size[0] * size[1] + size[1] * size[2] + size[2] * size[0]


@wp.func
def _bin_of(center: float, low: float, per_metre: float) -> int:
    return wp.clamp(int((center - low) * per_metre), 0, _BINS - 1)


@wp.kernel
def _build(
    lowers: wp.array(dtype=wp.vec3),
    uppers: wp.array(dtype=wp.vec3),
    order: wp.array(dtype=wp.int32),
    nodes: wp.array(dtype=Node),
    depths: wp.array(dtype=wp.int32),
    bin_lower: wp.array(dtype=wp.vec3),
    bin_upper: wp.array(dtype=wp.vec3),
    bin_count: wp.array(dtype=wp.int32),
    cost_right: wp.array(dtype=wp.float32),
    num_nodes: wp.array(dtype=wp.int32),
) -> None:
    """Splits nodes by the surface area heuristic over bins (Wald 2007), in one thread.

    Nodes are worked on in the order in which they are made, so the list of nodes is also the list of work.
    The triangles' boxes move with their numbers, so that a node's lie together.
    """
    used = int(1)
    current = int(0)
    while current < used:
        first = nodes[current].first
        count = nodes[current].count
        lower = wp.vec3(_HUGE, _HUGE, _HUGE)
        upper = -lower
        center_lower = wp.vec3(_HUGE, _HUGE, _HUGE)
        center_upper = -center_lower
        for i in range(first, first + count):
            box_lower = lowers[i]
            box_upper = uppers[i]
            lower = wp.min(lower, box_lower)
            upper = wp.max(upper, box_upper)
            center = 0.5 * (box_lower + box_upper)
            center_lower = wp.min(center_lower, center)
            center_upper = wp.max(center_upper, center)
        node = Node()
        node.lower = lower
        node.upper = upper
        node.first = first
        node.count = count
        if count > _MAX_LEAF:
            middle = first + count // 2
            best_axis = int(-1)
            best_bin = int(0)
            best_cost = float(_HUGE)
            extent = center_upper - center_lower
            if depths[current] < _BALANCED_DEPTH:
                per_metre = wp.vec3(
                    float(_BINS) / wp.max(extent[0], 1.0e-30),
                    float(_BINS) / wp.max(extent[1], 1.0e-30),
                    float(_BINS) / wp.max(extent[2], 1.0e-30),
                )
                for b in range(3 * _BINS):
                    bin_lower[b] = wp.vec3(_HUGE, _HUGE, _HUGE)
                    bin_upper[b] = wp.vec3(-_HUGE, -_HUGE, -_HUGE)
                    bin_count[b] = 0
                for i in range(first, first + count):
                    box_lower = lowers[i]
                    box_upper = uppers[i]
                    center = 0.5 * (box_lower + box_upper)
                    for axis in range(3):
                        b = axis * _BINS + _bin_of(center[axis], center_lower[axis], per_metre[axis])
                        bin_lower[b] = wp.min(bin_lower[b], box_lower)
                        bin_upper[b] = wp.max(bin_upper[b], box_upper)
                        bin_count[b] = bin_count[b] + 1
                for axis in range(3):
                    if extent[axis] > 0.0:
                        side_lower = wp.vec3(_HUGE, _HUGE, _HUGE)
                        side_upper = -side_lower
                        side_count = int(0)
                        for k in range(_BINS - 1):
                            b = _BINS - 1 - k
                            side_lower = wp.min(side_lower, bin_lower[axis * _BINS + b])
                            side_upper = wp.max(side_upper, bin_upper[axis * _BINS + b])
                            side_count = side_count + bin_count[axis * _BINS + b]
                            cost_right[b] = float(_HUGE)
                            if side_count > 0:
                                cost_right[b] = float(side_count) * _half_area(side_lower, side_upper)
                        side_lower = wp.vec3(_HUGE, _HUGE, _HUGE)
                        side_upper = -side_lower
                        side_count = int(0)
                        for b in range(_BINS - 1):
                            side_lower = wp.min(side_lower, bin_lower[axis * _BINS + b])
                            side_upper = wp.max(side_upper, bin_upper[axis * _BINS + b])
                            side_count = side_count + bin_count[axis * _BINS + b]
                            if side_count > 0 and side_count < count:
                                cost = float(side_count) * _half_area(side_lower, side_upper)
                                cost = cost + cost_right[b + 1]
                                if cost < best_cost:
                                    best_cost = cost
                                    best_axis = axis
                                    best_bin = b
                if best_axis >= 0:
                    middle = first
                    end = first + count
                    while middle < end:
                        triangle = order[middle]
                        box_lower = lowers[middle]
                        box_upper = uppers[middle]
                        center = 0.5 * (box_lower + box_upper)
                        b = _bin_of(center[best_axis], center_lower[best_axis], per_metre[best_axis])
                        if b <= best_bin:
                            middle = middle + 1
                        else:
                            end = end - 1
                            order[middle] = order[end]
                            lowers[middle] = lowers[end]
                            uppers[middle] = uppers[end]
                            order[end] = triangle
                            lowers[end] = box_lower
                            uppers[end] = box_upper
            left = Node()
            left.first = first
            left.count = middle - first
            right = Node()
            right.first = middle
            right.count = first + count - middle
            nodes[used] = left
            nodes[used + 1] = right
            depths[used] = depths[current] + 1
            depths[used + 1] = depths[current] + 1
            node.first = used
            node.count = 0
            used = used + 2
        nodes[current] = node
        current = current + 1
    num_nodes[0] = used


def build_bvh(vertices: npt.NDArray[np.float32], triangles: npt.NDArray[np.int32]) -> Bvh:
    """Builds the tree over triangles ``(T, 3)`` int32 of vertices (V, 3) float32; T is at least 1."""
    count = len(triangles)
    corners = [vertices[triangles[:, k]] for k in range(3)]
    lower = np.minimum(np.minimum(corners[0], corners[1]), corners[2])
    upper = np.maximum(np.maximum(corners[0], corners[1]), corners[2])
    root = np.zeros(2 * count, Node.numpy_dtype())
    root["count"][0] = count
    with wp.ScopedDevice("cpu"):
        nodes = wp.array(root, dtype=Node)
        order = wp.array(np.arange(count, dtype=np.int32), dtype=wp.int32)
        num_nodes = wp.zeros(1, dtype=wp.int32)
        wp.launch(
            _build,
            1,
            [
                wp.array(lower, dtype=wp.vec3),
                wp.array(upper, dtype=wp.vec3),
                order,
                nodes,
                wp.zeros(2 * count, dtype=wp.int32),
                wp.zeros(3 * _BINS, dtype=wp.vec3),
                wp.zeros(3 * _BINS, dtype=wp.vec3),
                wp.zeros(3 * _BINS, dtype=wp.int32),
                wp.zeros(_BINS, dtype=wp.float32),
                num_nodes,
            ],
        )
        return Bvh(nodes=nodes.numpy()[: int(num_nodes.numpy()[0])], order=order.numpy())
