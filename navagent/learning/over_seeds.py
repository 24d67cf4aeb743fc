"""Means over seeds with their intervals, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

REFERENCE = "features"
"""The method that others are held against."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    value: float
    """The mean; infinite if a training diverged."""
    half_width: float | None
    """Half of the 95 % interval of Student's t; None for one seed."""

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        """``spec`` is that of both numbers; by default they have four and two digits."""
        if not math.isfinite(self.value):
            return "diverged"
        width = "" if self.half_width is None else f" ± {format(self.half_width, spec or '.2g')}"
        return format(self.value, spec or ".4g") + width

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half_width is not None and abs(self.value) > self.half_width


def mean(values: Sequence[float]) -> Mean:
    """The mean of one value a seed, with its interval."""
    count = len(values)
    average = sum(values) / count
    if count < 2 or not math.isfinite(average):
        return Mean(average, None)
    deviation = math.sqrt(sum((value - average) ** 2 for value in values) / (count - 1))
    return Mean(average, float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Mean | None:
    """The mean difference of values by seed, over the seeds that both have; None if there is none."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return mean(differences) if differences else None


def signed(difference: Mean | None, spec: str = "") -> str:
    """A difference as a cell of a table, in bold where its interval leaves out 0.

    ``spec`` formats it, see :class:`Mean`.
    """
    if difference is None or not math.isfinite(difference.value):
        return ""
    text = f"{'+' if difference.value > 0 else ''}{difference:{spec}}"
    return f"**{text}**" if difference.sure else text


def table_head(title: str, columns: Sequence[str]) -> list[str]:
    """The lines of a Markdown table before its first row: names to the left, numbers to the right."""
    marks = "|:--|" + "--:|" * (len(columns) - 1)
    return ["", f"## {title}", "", f"| {' | '.join(columns)} |", marks]


def numbers(value: Mean | None) -> dict[str, float | None] | None:
    """A mean as JSON can hold it."""
    if value is None or not math.isfinite(value.value):
        return None
    return {"mean": value.value, "half_width": value.half_width}
