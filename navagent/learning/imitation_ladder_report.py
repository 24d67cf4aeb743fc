"""What a ladder of demonstrations found: tables, a plot and the numbers, with 95 % intervals over seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullLocator

from envs.files import atomic_write
from navagent.evaluation.curves import LIGHT
from navagent.learning.over_seeds import REFERENCE, Mean, mean, numbers, paired, signed, table_head

if TYPE_CHECKING:
    from navagent.learning.imitation_ladder import Rung

MEASURES = {"success": "success", "spl": "SPL"}
"""Attribute of a training's outcome, and what it is called."""
COLOURS = ("#1f56c4", "#1c202c", "#d1495b", "#2a8f5c", "#8a8f9c", "#8b4fc4", "#c98a1b", "#3aa6b9")
"""Of the methods' lines, in the order of the table."""
MARKERS = "osD^vPX*"
"""Of their points."""
DAGGER = "DAgger"
DIGITS = ".3f"
"""How the tables show shares."""

Key = tuple[str, int | None]
"""A method, and from how many demonstrations it learned; None for DAgger."""


@dataclass(frozen=True)
class Cell:
    """One method with one number of demonstrations."""

    method: str
    demonstrations: int | None
    """None for DAgger."""
    values: dict[str, dict[int, float]]
    """By measure and seed."""
    differences: dict[str, Mean | None]
    """By measure: from ``features`` with the same demonstrations and seeds; None where that is not there."""
    trainable: int
    """Parameters that learned."""
    seconds: float
    """Mean wall time of a training, without the evaluation."""

    def mean(self, measure: str) -> Mean:
        """Over the seeds."""
        return mean(list(self.values[measure].values()))


def cells(outcomes: Sequence[Rung]) -> dict[Key, Cell]:
    """The trainings put together by method and number of demonstrations."""
    groups: dict[Key, list[Rung]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.method, outcome.demonstrations), []).append(outcome)
    values = {
        key: {measure: {one.seed: getattr(one, measure) for one in group} for measure in MEASURES}
        for key, group in groups.items()
    }
    found = {}
    for (method, count), group in groups.items():
        reference = values.get((REFERENCE, count), {}) if method != REFERENCE else {}
        found[method, count] = Cell(
            method,
            count,
            values[method, count],
            {name: paired(values[method, count][name], reference.get(name, {})) for name in MEASURES},
            group[0].trainable,
            sum(one.seconds for one in group) / len(group),
        )
    return found


def write_report(
    out: Path, methods: Sequence[str], outcomes: Sequence[Rung], about: Mapping[str, Any]
) -> Path:
    """Writes ``table.md``, ``plot.png`` and ``results.json`` into ``out``.

    Args:
        out: the folder.
        methods: those that learned from demonstrations, in the order of the table.
        outcomes: all trainings.
        about: what else belongs to the results: settings, workers and seconds.

    Returns:
        The table.
    """
    found = cells(outcomes)
    with atomic_write(out / "results.json") as temporary:
        listed = [_as_json(cell) for cell in found.values()]
        temporary.write_text(json.dumps({**about, "cells": listed}, indent=1) + "\n")
    draw(out / "plot.png", methods, found)
    with atomic_write(out / "table.md") as temporary:
        temporary.write_text(_table(methods, outcomes, found, about))
    return out / "table.md"


def _as_json(cell: Cell) -> dict[str, Any]:
    return {
        "method": cell.method,
        "demonstrations": cell.demonstrations,
        "trainable": cell.trainable,
        "seconds": round(cell.seconds, 2),
        **{
            name: {
                "seeds": {str(seed): value for seed, value in sorted(cell.values[name].items())},
                **(numbers(cell.mean(name)) or {}),
                "difference": numbers(cell.differences[name]),
            }
            for name in MEASURES
        },
    }


def _counts(found: Mapping[Key, Cell]) -> list[int]:
    return sorted({count for _, count in found if count is not None})


def _table(
    methods: Sequence[str], outcomes: Sequence[Rung], found: Mapping[Key, Cell], about: Mapping[str, Any]
) -> str:
    settings = about["settings"]
    counts = _counts(found)
    seeds, episodes = len({one.seed for one in outcomes}), max(one.episodes for one in outcomes)
    lines = [
        "# Behaviour cloning from few and from many demonstrations",
        "",
        f"In {episodes} unseen episodes of task {settings['env.name']}, mean over {seeds} seeds ± half of "
        f"the 95 % interval (Student's t), and the paired difference to {REFERENCE!r} with the same "
        "demonstrations, in bold where its interval leaves out 0. Every training has "
        f"{outcomes[0].frames:,} frames, whatever there is to learn from. With so many comparisons, some in "
        "bold are chance.",
    ]
    heads = [head for count in counts for head in (f"{count:,} demonstrations", "difference")]
    for measure, name in MEASURES.items():
        lines += table_head(name, ["method", "trainable", *heads, "seconds"])
        for method in methods:
            own = [found[method, count] for count in counts]
            values = [
                f"{cell.mean(measure):{DIGITS}} | {signed(cell.differences[measure], DIGITS)}" for cell in own
            ]
            seconds = sum(cell.seconds for cell in own) / len(own)
            lines.append(f"| {method} | {own[0].trainable:,} | {' | '.join(values)} | {seconds:.0f} |")
    lines += _dagger_table(found, counts)
    lines += ["", f"Took {about['seconds'] / 60:.1f} minutes with {about['workers']} processes."]
    return "\n".join(lines) + "\n"


def _dagger_table(found: Mapping[Key, Cell], counts: Sequence[int]) -> list[str]:
    """DAgger beside behaviour cloning from most demonstrations."""
    beside = [cell for cell in found.values() if cell.demonstrations is None]
    if not beside:
        return []
    heads = [f"{name} {kind}" for name in MEASURES.values() for kind in ("cloned", DAGGER, "difference")]
    lines = table_head(
        f"{DAGGER} with as many frames, beside cloning from {counts[-1]:,} demonstrations", ["method", *heads]
    )
    for cell in beside:
        cloned = found.get((cell.method, counts[-1]))
        values = []
        for measure in MEASURES:
            gap = paired(cell.values[measure], cloned.values[measure]) if cloned else None
            before = f"{cloned.mean(measure):{DIGITS}}" if cloned else ""
            values += [before, f"{cell.mean(measure):{DIGITS}}", signed(gap, DIGITS)]
        lines.append(f"| {cell.method} | {' | '.join(values)} |")
    return [*lines, "", "Each of its frames is a new one, labelled by the expert where the learner went."]


def draw(path: Path, methods: Sequence[str], found: Mapping[Key, Cell]) -> None:
    """Draws success and SPL against the number of demonstrations: a line a method, with its interval."""
    theme, counts = LIGHT, _counts(found)
    figure = Figure(figsize=(11.5, 4.4), dpi=110, facecolor=theme.paper)
    FigureCanvasAgg(figure)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    panels = figure.subplots(1, len(MEASURES))
    for axes, (measure, name) in zip(panels, MEASURES.items(), strict=True):
        _draw_panel(axes, measure, methods, found, counts)
        axes.set_title(name, color=theme.ink, fontsize=10, loc="left", fontweight="bold")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right upper",
        fontsize=8,
        frameon=False,
        labelcolor=theme.ink,
    )
    figure.supxlabel(
        "demonstrations; mean of the seeds in unseen homes, with its 95 % interval",
        color=theme.ink,
        fontsize=9,
    )
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", facecolor=theme.paper)


def _draw_panel(
    axes: Axes, measure: str, methods: Sequence[str], found: Mapping[Key, Cell], counts: Sequence[int]
) -> None:
    theme = LIGHT
    axes.set_facecolor(theme.paper)
    ticks = {float(count): f"{count:,}" for count in counts}
    beyond = counts[-1] * 2.2
    for place, method in enumerate(dict.fromkeys([*methods, *(method for method, _ in found)])):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        means = {count: found[method, count].mean(measure) for count in counts if (method, count) in found}
        if means:
            axes.plot(
                list(means),
                [one.value for one in means.values()],
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.6,
                label=method,
            )
            low = [max(0.0, one.value - (one.half_width or 0.0)) for one in means.values()]
            high = [min(1.0, one.value + (one.half_width or 0.0)) for one in means.values()]
            axes.fill_between(list(means), low, high, color=colour, alpha=0.1, linewidth=0)
        if (method, None) in found:
            beside = found[method, None].mean(measure)
            axes.errorbar(
                beyond,
                beside.value,
                yerr=beside.half_width,
                fmt=marker,
                color=colour,
                markersize=6,
                markerfacecolor=theme.paper,
                capsize=3,
                label=f"{method} by {DAGGER}",
            )
            ticks[beyond] = DAGGER
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-0.02, 1.02)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.tick_params(colors=theme.faint, labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
