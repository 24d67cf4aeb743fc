"""Means with 95 % intervals, and the table that shows them.

A rate (success) has Wilson's interval, any other measure a percentile bootstrap's over episodes. Both answer
"what would other episodes in these homes give?". Episodes that share a home are alike, so
:attr:`Estimate.over_scenes` resamples whole homes and answers "what would other homes give?"; it is the wider
one, and the one to quote when a claim is about unseen homes in general.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.markup import escape
from rich.table import Table

from navagent.evaluation.results import EpisodeResult

CONFIDENCE = 0.95
RESAMPLES = 5000
MIN_SCENES = 5
"""Resampling fewer scenes than this says next to nothing."""
COMPACT = ("success", "spl", "distance_to_goal", "steps")
"""Measures that fit into a narrow terminal."""


@dataclass(frozen=True)
class Measure:
    """One column of the table."""

    name: str
    """Attribute of :class:`EpisodeResult`."""
    label: str
    unit: str = ""
    rate: bool = False
    """Whether every episode gives 0 or 1."""
    digits: int = 2


MEASURES = (
    Measure("success", "success", rate=True, digits=3),
    Measure("spl", "SPL", digits=3),
    Measure("soft_spl", "SoftSPL", digits=3),
    Measure("distance_to_goal", "distance left", "m"),
    Measure("path_length", "path", "m"),
    Measure("steps", "steps", digits=0),
    Measure("collisions", "collisions", digits=1),
    Measure("reward", "reward"),
    Measure("departed", "left the expert", digits=3),
)


@dataclass(frozen=True)
class Estimate:
    """A mean over episodes and what it could as well have been."""

    mean: float
    low: float
    """Lower end of the 95 % interval over episodes."""
    high: float
    """Upper end of the 95 % interval over episodes."""
    count: int
    """Episodes that gave a finite value."""
    over_scenes: tuple[float, float] | None = None
    """95 % interval over whole scenes; None where there are fewer than :data:`MIN_SCENES`."""


def wilson_interval(successes: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a rate (Wilson 1927): sensible for few episodes and at 0 and 1 too."""
    if not 0 <= successes <= count or count < 1:
        raise ValueError(f"{successes} successes of {count} episodes is not a rate")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / count
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    values: ArrayLike,
    seed: int = 0,
    groups: Sequence[Any] | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron 1979).

    Args:
        values: one value an episode (n,).
        seed: seed of the resampling.
        groups: what each episode belongs to (n,); whole groups are then resampled.
        confidence: share of resampled means that the interval holds.
        resamples: number of resampled means.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"a mean needs a list of values, got shape {array.shape}")
    sums: NDArray[np.float64] = array
    sizes: NDArray[np.float64] = np.ones(len(array))
    if groups is not None:
        labels = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)[1]
        sums = np.bincount(labels, weights=array).astype(np.float64)
        sizes = np.bincount(labels).astype(np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, min(resamples, 2_000_000 // len(sums)))
    for first in range(0, resamples, chunk):
        drawn = generator.integers(len(sums), size=(min(chunk, resamples - first), len(sums)))
        means[first : first + chunk] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def estimate(results: Sequence[EpisodeResult], measure: Measure, seed: int = 0) -> Estimate:
    """Mean and intervals of one measure over episodes."""
    values = np.array([getattr(result, measure.name) for result in results], dtype=np.float64)
    finite = np.isfinite(values)
    values = values[finite]
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, 0)
    if measure.rate:
        low, high = wilson_interval(int(values.sum()), len(values))
    else:
        low, high = bootstrap_interval(values, seed)
    scenes = [result.scene_id for result, kept in zip(results, finite, strict=True) if kept]
    return Estimate(float(values.mean()), low, high, len(values), _over_scenes(values, scenes, seed))


def _over_scenes(values: ArrayLike, scenes: Sequence[str], seed: int) -> tuple[float, float] | None:
    if len(set(scenes)) < MIN_SCENES:
        return None
    return bootstrap_interval(values, seed, groups=scenes)


def summarise(results: Sequence[EpisodeResult], seed: int = 0) -> dict[str, Estimate]:
    """Every measure's estimate, by name."""
    return {measure.name: estimate(results, measure, seed) for measure in MEASURES}


def paired_difference(
    ours: Sequence[EpisodeResult], theirs: Sequence[EpisodeResult], name: str, seed: int = 0
) -> Estimate:
    """How much higher one agent's measure is than another's on the same episodes.

    Taking the difference episode by episode cancels how hard the episodes are, so that it shows differences
    which two separate intervals would hide.
    """
    other = {(result.scene_id, result.episode_id): getattr(result, name) for result in theirs}
    both = [result for result in ours if (result.scene_id, result.episode_id) in other]
    if not both:
        raise ValueError("the two agents have no episode in common")
    values = [getattr(result, name) - other[result.scene_id, result.episode_id] for result in both]
    low, high = bootstrap_interval(values, seed)
    scenes = [result.scene_id for result in both]
    return Estimate(float(np.mean(values)), low, high, len(values), _over_scenes(values, scenes, seed))


def results_table(
    summaries: Mapping[str, Mapping[str, Estimate]], title: str, width: int | None = None
) -> Table:
    """The summaries of several agents as a table: the mean, and below it the interval.

    Args:
        summaries: measures of each agent, by name.
        title: what stands above.
        width: columns of the terminal; a narrow one gets the most important measures only.
    """
    shown = [measure for measure in MEASURES if width is None or width >= 120 or measure.name in COMPACT]
    caption = "mean and 95 % interval over episodes"
    if len(shown) < len(MEASURES):
        caption += "; all measures are in summary.json"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("agent", overflow="fold")
    for measure in shown:
        label = measure.label + (f" [{measure.unit}]" if measure.unit else "")
        table.add_column(escape(label), justify="right", no_wrap=True)
    for agent, summary in summaries.items():
        cells = []
        for measure in shown:
            value, digits = summary[measure.name], measure.digits
            cells.append(
                f"{value.mean:.{digits}f}\n[dim]{value.low:.{digits}f}–{value.high:.{digits}f}[/dim]"
                if value.count
                else "–"
            )
        table.add_row(escape(agent), *cells, end_section=True)
    return table


def to_json(summary: Mapping[str, Estimate]) -> dict[str, dict[str, Any]]:
    """A summary as plain data."""
    return {name: asdict(value) for name, value in summary.items()}


def from_json(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
    """What :func:`to_json` made, back."""
    return {
        name: Estimate(
            mean=float(value["mean"]),
            low=float(value["low"]),
            high=float(value["high"]),
            count=int(value["count"]),
            over_scenes=None
            if value["over_scenes"] is None
            else (float(value["over_scenes"][0]), float(value["over_scenes"][1])),
        )
        for name, value in data.items()
    }


def scalars(summary: Mapping[str, Estimate], prefix: str = "eval/") -> dict[str, float]:
    """A summary as flat numbers for a log: ``eval/spl``, ``eval/spl_low``, ``eval/spl_high`` and so on."""
    flat: dict[str, float] = {}
    for name, value in summary.items():
        flat |= {
            f"{prefix}{name}": value.mean,
            f"{prefix}{name}_low": value.low,
            f"{prefix}{name}_high": value.high,
        }
    return flat
