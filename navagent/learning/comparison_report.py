"""What a comparison found: a table, a plot and the numbers, with 95 % intervals over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from envs.files import atomic_write
from navagent.evaluation.curves import LIGHT
from navagent.learning.over_seeds import REFERENCE, Mean, mean, numbers, paired, signed, table_head
from navagent.learning.perception import TASKS
from navagent.learning.transfer import BASE_TASK, Outcome, Row


@dataclass(frozen=True)
class Cell:
    """One method on one base with one number of images."""

    base: str
    row: str
    images: int
    errors: dict[int, float]
    """By seed."""
    learning_rate: float
    """The one that was chosen."""
    trainable: int
    """Parameters that learn, without the decoder."""
    seconds: float
    """Mean wall time of a training, evaluation included."""
    difference: Mean | None
    """From ``features`` with the same seeds; None where that was not compared."""

    @property
    def error(self) -> Mean:
        """Over the seeds."""
        return mean(list(self.errors.values()))


def cells(task: str, outcomes: Sequence[Outcome]) -> dict[tuple[str, str, int], Cell]:
    """The finished trainings, put together by base, row and number of images."""
    groups: dict[tuple[str, str, int], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.phase == "final":
            groups.setdefault((outcome.base, outcome.row, outcome.images), []).append(outcome)
    errors = {key: {o.seed: o.error(task) for o in group} for key, group in groups.items()}
    found = {}
    for (base, row, images), group in groups.items():
        own, reference = errors[base, row, images], errors.get((base, REFERENCE, images), {})
        found[base, row, images] = Cell(
            base,
            row,
            images,
            own,
            group[0].learning_rate,
            group[0].trainable,
            sum(o.seconds for o in group) / len(group),
            paired(own, reference) if row != REFERENCE else None,
        )
    return found


def write_report(
    out: Path,
    task: str,
    compared: Sequence[Row],
    outcomes: Sequence[Outcome],
    baselines: Mapping[str, Mapping[str, Mapping[str, float]]],
    about: Mapping[str, Any],
) -> Path:
    """Writes ``table.md``, ``plot.png`` and ``results.json`` into ``out``.

    Args:
        out: the folder.
        task: what was learned.
        compared: the rows, in the order of the table.
        outcomes: all trainings.
        baselines: measures in unseen homes by task and predictor.
        about: what else belongs to the results.

    Returns:
        The table.
    """
    found = cells(task, outcomes)
    floor = {name: values[TASKS[task].measure] for name, values in baselines[task].items()}
    with atomic_write(out / "results.json") as temporary:
        temporary.write_text(
            json.dumps(
                {**about, "baselines": baselines, "cells": [_as_json(c) for c in found.values()]}, indent=1
            )
            + "\n"
        )
    draw(out / "plot.png", task, [row.name for row in compared], found, floor)
    with atomic_write(out / "table.md") as temporary:
        temporary.write_text(_table(task, compared, found, baselines, about))
    return out / "table.md"


def _as_json(cell: Cell) -> dict[str, Any]:
    return {
        "base": cell.base,
        "row": cell.row,
        "images": cell.images,
        "errors": {str(s): e if math.isfinite(e) else None for s, e in sorted(cell.errors.items())},
        "error": numbers(cell.error),
        "difference": numbers(cell.difference),
        "learning_rate": cell.learning_rate,
        "trainable": cell.trainable,
        "seconds": round(cell.seconds, 2),
    }


def _table(
    task: str,
    compared: Sequence[Row],
    found: Mapping[tuple[str, str, int], Cell],
    baselines: Mapping[str, Mapping[str, Mapping[str, float]]],
    about: Mapping[str, Any],
) -> str:
    kind, settings = TASKS[task], about["settings"]
    images = sorted({key[2] for key in found})
    lines = [
        f"# {task} from a base that knows {BASE_TASK}",
        "",
        f"{kind.measure.replace('_', ' ')} in unseen homes [{kind.unit}], less is better: mean over "
        f"{about['seeds']} seeds ± half of the 95 % interval (Student's t), and the paired difference to "
        f"{REFERENCE!r}, in bold where its interval leaves out 0. Every training has {settings['steps']} "
        f"steps of {settings['batch_size']} images. The decoder learns at one peak rate for all, the method "
        f"at the better of {' and '.join(f'{rate:g}' for rate in settings['learning_rates'])} on held-out "
        "training images. With so many comparisons, some in bold are chance.",
    ]
    for base in dict.fromkeys(key[0] for key in found):
        heads = [head for number in images for head in (f"{number:,} images", "difference")]
        lines += table_head(base, ["method", "trainable", "rate", *heads, "seconds"])
        for row in compared:
            own = [found[base, row.name, number] for number in images if (base, row.name, number) in found]
            if not own:
                continue
            values = [f"{cell.error} | {signed(cell.difference)}" for cell in own]
            seconds = sum(cell.seconds for cell in own) / len(own)
            lines.append(
                f"| {row.name} | {own[0].trainable:,} | {own[0].learning_rate:g} | {' | '.join(values)} "
                f"| {seconds:.1f} |"
            )
    lines += ["", "| what never learns | error |", "|:--|--:|"]
    for of, measures in baselines.items():
        name, unit = TASKS[of].measure, TASKS[of].unit
        lines += [
            f"| {of}: {predictor} | {values[name]:.4g} {unit} |" for predictor, values in measures.items()
        ]
    lines += ["", *(f"{s['row']} on {s['base']}: left out, {s['reason']}." for s in about["skipped"])]
    lines += ["", f"Took {about['seconds'] / 60:.1f} minutes with {about['workers']} processes."]
    return "\n".join(lines) + "\n"


def draw(
    path: Path,
    task: str,
    compared: Sequence[str],
    found: Mapping[tuple[str, str, int], Cell],
    floor: Mapping[str, float],
) -> None:
    """Draws errors with their intervals: a row of panels a base, one a number of images, a line a method."""
    bases = list(dict.fromkeys(key[0] for key in found))
    images = sorted({key[2] for key in found})
    theme = LIGHT
    tall = max(len(compared), 4) * 0.24 + 0.7
    figure = Figure(
        figsize=(3.2 * len(images) + 2.2, tall * len(bases) + 0.9), dpi=110, facecolor=theme.paper
    )
    FigureCanvasAgg(figure)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.1))
    panels = figure.subplots(len(bases), len(images), squeeze=False, sharex=True)
    for line, base in zip(panels, bases, strict=True):
        order = _order(base, compared, found)
        for axes, number in zip(line, images, strict=True):
            _draw_panel(axes, [found[base, row, number] for row in order if (base, row, number) in found])
            axes.set_title(f"{base}, {number:,} images", color=theme.ink, fontsize=10)
            axes.axvline(min(floor.values()), color=theme.faint, linestyle=":", linewidth=1.2)
            if axes is not line[0]:
                axes.set_yticklabels([])
    kind = TASKS[task]
    figure.supxlabel(
        f"{task}: {kind.measure.replace('_', ' ')} in unseen homes [{kind.unit}], less is better\n"
        f"points: mean of seeds with 95 % interval; line: {REFERENCE}; dots: best blind predictor",
        color=theme.ink,
        fontsize=9,
    )
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", facecolor=theme.paper)


def _order(base: str, compared: Sequence[str], found: Mapping[tuple[str, str, int], Cell]) -> list[str]:
    """Rows from the best to the worst, by their mean error over all numbers of images."""
    errors: dict[str, list[float]] = {}
    for (of, row, _), cell in found.items():
        if of == base:
            errors.setdefault(row, []).append(cell.error.value)
    return sorted((row for row in compared if row in errors), key=lambda r: sum(errors[r]) / len(errors[r]))


def _draw_panel(axes: Axes, shown: Sequence[Cell]) -> None:
    theme = LIGHT
    axes.set_facecolor(theme.paper)
    for place, cell in enumerate(shown):
        error = cell.error
        if not math.isfinite(error.value):
            continue
        reference = cell.row == REFERENCE
        if reference:
            axes.axvline(error.value, color=theme.training, linewidth=1.2, zorder=1)
        colour = theme.evaluation if not reference else theme.ink
        axes.errorbar(
            error.value,
            place,
            xerr=error.half_width,
            fmt="o",
            color=colour,
            markersize=4,
            capsize=2,
            zorder=2,
        )
    axes.set_yticks(range(len(shown)), [cell.row for cell in shown], fontsize=8, color=theme.ink)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.grid(axis="x", color=theme.grid)
    axes.tick_params(axis="x", labelsize=8, colors=theme.faint)
    for spine in axes.spines.values():
        spine.set_color(theme.grid)
