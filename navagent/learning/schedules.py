"""What changes while training goes on: the learning rate, the clip range and how far away goals are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

DecaySchedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Decay:
    """A number that falls while training goes on, callable as Stable-Baselines3 wants it.

    >>> Decay(0.2, "linear")(0.25)
    0.05
    """

    initial: float
    """At the start."""
    schedule: DecaySchedule = "constant"
    """How it falls: not at all, along a line, or along half a cosine."""
    final_fraction: float = 0.0
    """What is left of ``initial`` at the end, 0..1."""

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule {self.schedule!r} is not one of constant, linear, cosine")
        if not self.initial > 0:
            raise ValueError(f"initial value {self.initial} must be greater than 0")

    def __call__(self, progress_remaining: float) -> float:
        """The value when ``progress_remaining`` goes from 1 at the start to 0 at the end."""
        remaining = min(1.0, max(0.0, progress_remaining))
        if self.schedule == "constant":
            return self.initial
        if self.schedule == "cosine":
            remaining = 0.5 * (1.0 - math.cos(math.pi * remaining))
        return self.initial * (self.final_fraction + (1.0 - self.final_fraction) * remaining)


@dataclass(frozen=True)
class LearningRate(Decay):
    """A learning rate, which may climb before it falls.

    >>> LearningRate(1e-3, "linear", warmup=0.01)(1.0)
    0.0005
    """

    warmup: float = 0.0
    """Share of the training in which the rate climbs from half of ``initial`` to all of it, as in BPS
    (Shacklett et al. 2021); it falls over the rest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup {self.warmup} must be at least 0 and less than 1")

    def __call__(self, progress_remaining: float) -> float:
        """See :meth:`Decay.__call__`."""
        done = min(1.0, max(0.0, 1.0 - progress_remaining))
        if done < self.warmup:
            return self.initial * (0.5 + 0.5 * done / self.warmup)
        if self.warmup:
            progress_remaining /= 1.0 - self.warmup
        return super().__call__(progress_remaining)


REFERENCE_BATCH = 256
"""Frames of a minibatch for which learning rates are stated."""


def square_root_scale(batch: int) -> float:
    """By how much a minibatch of ``batch`` frames raises the learning rate: sqrt(batch / 256), at least 1.

    The rule that You et al. (2020) and BPS (Shacklett et al. 2021) use with Lamb.
    """
    return max(1.0, math.sqrt(batch / REFERENCE_BATCH))


class PathLengthCurriculum:
    """Short paths first: the longest geodesic distance to a goal grows while training goes on.

    ``linear`` grows it evenly over the first ``frames`` frames. ``success`` multiplies it by ``growth``
    whenever the share of successful episodes since it last grew reaches ``threshold``.
    """

    def __init__(
        self,
        start: float,
        end: float,
        frames: int,
        mode: Literal["linear", "success"] = "linear",
        threshold: float = 0.75,
        growth: float = 1.25,
        min_episodes: int = 100,
    ) -> None:
        """Lengths [m]; ``min_episodes`` is how many episodes a success rate must rest on."""
        if not 0 < start <= end:
            raise ValueError(
                f"curriculum start {start} m must be greater than 0 and at most its end, {end} m"
            )
        if mode not in ("linear", "success"):
            raise ValueError(f"curriculum mode {mode!r} is not one of linear, success")
        self.start, self.end, self.frames, self.mode = start, end, frames, mode
        self.threshold, self.growth, self.min_episodes = threshold, growth, min_episodes
        self.max_geodesic = start
        """Longest path at present [m]."""
        self._episodes = 0
        self._successes = 0.0

    def update(self, frames: int, successes: list[float]) -> float:
        """Says how long paths may be after ``frames`` frames, given the newest episodes' success (0 or 1)."""
        if self.mode == "linear":
            done = 1.0 if self.frames <= 0 else min(1.0, frames / self.frames)
            self.max_geodesic = self.start + (self.end - self.start) * done
            return self.max_geodesic
        self._episodes += len(successes)
        self._successes += sum(successes)
        if self._episodes >= self.min_episodes:
            if self._successes / self._episodes >= self.threshold:
                self.max_geodesic = min(self.end, self.max_geodesic * self.growth)
            self._episodes, self._successes = 0, 0.0
        return self.max_geodesic

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here."""
        return {
            "max_geodesic": self.max_geodesic,
            "episodes": self._episodes,
            "successes": self._successes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state."""
        self.max_geodesic = float(state["max_geodesic"])
        self._episodes = int(state["episodes"])
        self._successes = float(state["successes"])
