"""What Habitat is asked about a scene: places to look from, paths, moves, points and walks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from navagent.recordings import Answers

QUESTIONS = (
    "view_position",
    "view_yaw",
    "geodesic_start",
    "geodesic_end",
    "step_start",
    "step_target",
    "query_point",
    "obstacle_point",
    "rollout_slide_actions",
    "rollout_stop_actions",
)
"""The arrays of a recording that are questions alone."""
ROLLOUTS = ("slide", "stop")
"""Walks that slide along walls, and walks that stop at them; their first row says where they start."""


@dataclass(frozen=True)
class Counts:
    """How much is asked about each scene."""

    views: int = 24
    """Places to look from."""
    geodesics: int = 600
    """Pairs of points whose distance is asked."""
    steps: int = 3000
    """Single moves."""
    points: int = 4000
    """Points that may be off the floor or off the mesh."""
    obstacles: int = 800
    """Points whose distance to the closest obstacle is asked."""
    rollouts: int = 16
    """Walks of each kind."""
    rollout_steps: int = 150
    """Actions of each walk."""


def draw_questions(
    sample: Callable[[int], NDArray[np.float32]],
    bounds: NDArray[np.float32],
    seed: int,
    counts: Counts | None = None,
) -> Answers:
    """Draws questions about one scene; the same seed and the same points give the same ones.

    Args:
        sample: gives so many points (N, 3) [m], drawn uniformly from where an agent can stand.
        bounds: lowest and highest corner (2, 3) of where agents can stand [m].
        seed: where every other draw comes from.
        counts: how many of each.

    Returns:
        The arrays of :data:`QUESTIONS`, and of each walk the first ``position`` (K, 1, 3) and
        ``rotation_xyzw`` (K, 1, 4).
    """
    counts = counts or Counts()
    numbers = np.random.default_rng(seed)

    def turn(count: int) -> NDArray[np.float64]:
        return numbers.uniform(-math.pi, math.pi, count)

    questions: Answers = {
        "view_position": sample(counts.views),
        "view_yaw": turn(counts.views),
        "geodesic_start": sample(counts.geodesics),
        "geodesic_end": sample(counts.geodesics),
        "obstacle_point": sample(counts.obstacles),
        "step_start": sample(counts.steps),
        "query_point": _points(sample(counts.points), bounds, numbers),
    }
    # Mostly the forward step of the benchmark; some other lengths, so that the answer cannot lean on it.
    length = np.where(numbers.random(counts.steps) < 2 / 3, 0.25, numbers.uniform(0.05, 0.75, counts.steps))
    heading = turn(counts.steps)
    away = np.stack([np.sin(heading), np.zeros(counts.steps), np.cos(heading)], axis=1) * length[:, None]
    questions["step_target"] = questions["step_start"] + away
    for kind in ROLLOUTS:
        half = turn(counts.rollouts) / 2
        none = np.zeros(counts.rollouts)
        rotations = np.stack([none, np.sin(half), none, np.cos(half)], axis=1)
        questions |= {
            f"rollout_{kind}_actions": numbers.choice(
                3, (counts.rollouts, counts.rollout_steps), p=(0.6, 0.2, 0.2)
            ).astype(np.int8),
            f"rollout_{kind}_position": sample(counts.rollouts)[:, None],
            f"rollout_{kind}_rotation_xyzw": rotations[:, None],
        }
    return {
        name: values if values.dtype == np.int8 else np.ascontiguousarray(values, np.float32)
        for name, values in questions.items()
    }


def _points(
    floor: NDArray[np.float32], bounds: NDArray[np.float32], numbers: np.random.Generator
) -> NDArray[np.float64]:
    """Points around and inside the bounds; the first half of them at the height of a floor point (N, 3)."""
    points = numbers.uniform(bounds[0] - 0.5, bounds[1] + 0.5, floor.shape)
    half = len(floor) // 2
    points[:half, 1] = floor[:half, 1]
    return points
