"""What came of one episode."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.files import atomic_write

_NOT_SAVED = ("positions", "yaws", "choices")


@dataclass(frozen=True)
class EpisodeResult:
    """The measures of one episode, and the way the agent went."""

    agent: str
    """Name of the agent."""
    scene_id: str
    """The scene, as the episode's file names it."""
    episode_id: str
    """The episode, as its file names it."""
    success: bool
    """Whether the agent stopped nearer to the goal than the success distance."""
    spl: float
    """Success weighted by path length, 0..1."""
    soft_spl: float
    """SPL with the covered share of the distance in place of success, 0..1."""
    distance_to_goal: float
    """Geodesic distance to the goal at the end [m]."""
    geodesic_distance: float
    """Geodesic distance to the goal at the start [m]."""
    path_length: float
    """Length of the agent's path [m]."""
    steps: int
    """Actions taken."""
    collisions: int
    """Steps that ended in a collision."""
    reward: float
    """Sum of the rewards."""
    start: tuple[float, float, float]
    """Where the agent started [m]."""
    goal: tuple[float, float, float]
    """Where it was to go [m]."""
    positions: NDArray[np.float32] = field(
        default_factory=lambda: np.empty((0, 3), np.float32), repr=False, compare=False
    )
    """Where the agent was before each action and at the end: (steps + 1, 3) float32 [m]; not saved."""
    yaws: NDArray[np.float32] = field(
        default_factory=lambda: np.empty(0, np.float32), repr=False, compare=False
    )
    """Where it looked: (steps + 1,) float32 [rad]; not saved."""
    departures: int | None = None
    """Actions that were not the expert's in the same place; None where the expert was not asked."""
    choices: NDArray[np.int64] = field(
        default_factory=lambda: np.empty((0, 2), np.int64), repr=False, compare=False
    )
    """What the agent did and what the expert would have done, at each step, as
    :class:`~envs.simulators.base.Action`: (steps, 2); not saved."""

    @property
    def departed(self) -> float:
        """Share of its actions that were not the expert's; NaN where that is not known."""
        return math.nan if self.departures is None or not self.steps else self.departures / self.steps

    def to_json(self) -> dict[str, Any]:
        """What one line of ``episodes.jsonl`` holds; JSON has no infinity, so what is not finite is null."""
        line: dict[str, Any] = {}
        for item in fields(self):
            if item.name in _NOT_SAVED:
                continue
            value = getattr(self, item.name)
            line[item.name] = None if isinstance(value, float) and not math.isfinite(value) else value
        return line


def write_results(results: Iterable[EpisodeResult], path: str | Path) -> None:
    """Writes one JSON line an episode."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for result in results:
            file.write(json.dumps(result.to_json()) + "\n")


def read_results(path: str | Path) -> list[EpisodeResult]:
    """Reads what :func:`write_results` wrote.

    Raises:
        ValueError: a line is not such a result; the message names the file and the line.
    """
    path = Path(path)
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            data = json.loads(line)
            for name in ("distance_to_goal", "geodesic_distance"):
                data[name] = math.inf if data[name] is None else data[name]
            data["start"], data["goal"] = tuple(data["start"]), tuple(data["goal"])
            results.append(EpisodeResult(**data))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not an episode's result: {error}") from None
    return results
