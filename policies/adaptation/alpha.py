"""Alpha of side-tuning (Zhang et al., ECCV 2020, arXiv:1912.13503): how much the base weighs in a blend.

R(x) = alpha B(x) + (1 - alpha) S(x). Alpha is learned as a logit by the task's own loss, held, or moved along
a schedule; the authors' published code has the first two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

AlphaScheduleName = Literal["constant", "linear", "cosine", "map"]


@dataclass(frozen=True)
class AlphaSchedule:
    """Alpha against the number of samples that were learned from.

    >>> AlphaSchedule(1.0, "linear", final=0.2, fraction=0.5)(samples=25, total=100)
    0.6
    >>> AlphaSchedule(kind="map", prior=300)(samples=100, total=100)
    0.75
    """

    start: float = 0.5
    """Alpha before anything was learned from, in 0..1; "map" starts at 1 instead."""
    kind: AlphaScheduleName = "constant"
    """``start`` for ever; from ``start`` to ``final`` along a line or half a cosine; or k / (k + N)."""
    final: float = 0.0
    """Where the line and the cosine end, in 0..1."""
    fraction: float = 1.0
    """The part of training over which they go there, in 0..1 without 0."""
    prior: float = 1.0
    """k of "map", greater than 0: as many samples as the base is worth. After N samples alpha is k / (k + N),
    as in the maximum a-posteriori mean of a prior worth k observations and N of the task."""

    def __call__(self, samples: int, total: int) -> float:
        """Alpha after ``samples`` of ``total``; beyond the end it stays where it is.

        Raises:
            ValueError: if ``samples`` is negative or ``total`` not positive.
        """
        if samples < 0 or total <= 0:
            raise ValueError(f"progress of {samples} in {total} samples: expected 0 or more, of 1 or more")
        if self.kind == "map":
            return self.prior / (self.prior + samples)
        if self.kind == "constant":
            return self.start
        done = min(1.0, samples / (self.fraction * total))
        if self.kind == "cosine":
            done = 0.5 * (1.0 - math.cos(math.pi * done))
        return self.start + (self.final - self.start) * done


class Alpha(nn.Module):
    """The weight of the base against one side network, a scalar in 0..1.

    Learned, it is ``sigmoid(logit)``; otherwise the buffer ``value``, so that a checkpoint holds where the
    schedule stood.
    """

    def __init__(self, schedule: AlphaSchedule, learned: bool) -> None:
        super().__init__()
        self.schedule = schedule
        self.learned = learned
        if learned:
            self.logit = nn.Parameter(torch.tensor(_logit(schedule.start)))
        else:
            self.value: Tensor
            self.register_buffer("value", torch.tensor(float(schedule(0, 1))))

    def forward(self) -> Tensor:
        """Alpha: ()."""
        return torch.sigmoid(self.logit) if self.learned else self.value

    def set_progress(self, samples: int, total: int) -> None:
        """Moves a scheduled alpha on, see :class:`AlphaSchedule`."""
        if not self.learned:
            self.value.fill_(self.schedule(samples, total))


class DenseAlpha(Alpha):
    """The weights of the base and of several side networks, which sum to 1.

    Learned, they are the softmax of one logit each. Alpha starts the base's logit, so it says what the base
    weighs against any one side network; the sides begin as equals.
    """

    def __init__(self, schedule: AlphaSchedule, learned: bool, sides: int) -> None:
        super().__init__(schedule, learned)
        self.sides = sides
        if learned:
            start = torch.zeros(sides + 1)
            start[0] = _logit(schedule.start)
            self.logit = nn.Parameter(start)

    def forward(self) -> Tensor:
        """Weights of the base and of each side network: (1 + sides,)."""
        if self.learned:
            return torch.softmax(self.logit, dim=0)
        # The same softmax by its odds, which stays finite at 0 and 1.
        odds = torch.stack([self.value, *[1 - self.value] * self.sides])
        return odds / odds.sum()


def _logit(alpha: float) -> float:
    return math.log(alpha / (1.0 - alpha))
