"""Where an agent leaves the expert: how often, for which actions, in which episodes and homes.

The expert is asked in every state that the agent comes to, so what is counted is how the agent acts where it
goes itself. Leaving is not always a loss: another way can be as short, and turning back mends an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.simulators.base import Action
from navagent.evaluation.results import EpisodeResult

ACTIONS = tuple(action.name.lower().replace("_", " ") for action in Action)
"""Names of the simulator's actions, by their number."""


@dataclass(frozen=True)
class Departures:
    """What became of the expert's advice in some episodes."""

    counts: NDArray[np.int64]
    """Steps at which the expert would have done the row's action and the agent did the column's: (A, A)."""
    share_in_success: float
    """Share of steps that left the expert in episodes that reached their goal; NaN where none did."""
    share_in_failure: float
    """The same in those that did not."""

    @property
    def share(self) -> float:
        """Share of all steps at which the agent left the expert; NaN where there are none."""
        return _share(self.counts)

    def to_json(self) -> dict[str, Any]:
        """This as plain data; what is not known is null."""
        shares = {
            "share": self.share,
            "share_in_success": self.share_in_success,
            "share_in_failure": self.share_in_failure,
        }
        known = {name: None if np.isnan(value) else value for name, value in shares.items()}
        return {"actions": list(ACTIONS), "counts": self.counts.tolist(), **known}


def departures(results: Sequence[EpisodeResult]) -> Departures:
    """Sums up what agents did beside what the expert would have done."""
    return Departures(
        _counts(results),
        _share(_counts([result for result in results if result.success])),
        _share(_counts([result for result in results if not result.success])),
    )


def by_scene(results: Sequence[EpisodeResult]) -> Mapping[str, list[EpisodeResult]]:
    """The results of each scene, the scene in which agents left the expert most often first."""
    scenes: dict[str, list[EpisodeResult]] = defaultdict(list)
    for result in results:
        scenes[result.scene_id].append(result)
    return dict(sorted(scenes.items(), key=lambda item: (-np.nan_to_num(_share(_counts(item[1]))), item[0])))


def _counts(results: Sequence[EpisodeResult]) -> NDArray[np.int64]:
    counts = np.zeros((len(ACTIONS), len(ACTIONS)), np.int64)
    for result in results:
        np.add.at(counts, (result.choices[:, 1], result.choices[:, 0]), 1)
    return counts


def _share(counts: NDArray[np.int64]) -> float:
    steps = counts.sum()
    return float(1 - counts.trace() / steps) if steps else float("nan")
