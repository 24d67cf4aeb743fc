"""Training curves from a run's metrics, and those of several runs on one plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from envs.files import atomic_write
from navagent.evaluation.metrics import Estimate

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Theme:
    """Colours of a figure."""

    paper: str
    ink: str
    faint: str
    grid: str
    training: str
    evaluation: str
    others: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1c202c", "#6b7280", "#e6e8ee", "#8fb4f2", "#1f56c4", ("#8a8f9c", "#2a8f5c", "#8b4fc4")
)
DARK = Theme(
    "#171a21", "#e6e9f0", "#9aa3b2", "#2a2f3a", "#4c78c8", "#8ab8ff", ("#8d95a5", "#5cc793", "#c08cf0")
)


@dataclass(frozen=True)
class Panel:
    """One plot: lines of the training log, and the evaluations' points."""

    title: str
    lines: tuple[tuple[str, str], ...]
    """Key in the metrics and label, of each line."""
    evaluation: str = ""
    """Measure whose evaluations are drawn as points with their intervals."""
    limits: tuple[float | None, float | None] = (None, None)


PANELS = (
    Panel("success", (("rollout/success", "training homes"),), "success", (0.0, 1.0)),
    Panel("SPL", (("rollout/spl", "training homes"),), "spl", (0.0, 1.0)),
    Panel("reward of an episode", (("rollout/reward_sum", "training homes"),), "reward"),
    Panel(
        "losses",
        (("train/policy_loss", "policy"), ("train/value_loss", "value"), ("imitation/loss", "imitation")),
    ),
    Panel("entropy of the policy", (("train/entropy", ""),), limits=(0.0, None)),
    Panel("frames per second", (("time/frames_per_second", ""),), limits=(0.0, None)),
)


def series(records: Records, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Frames and values of the records that hold a finite number under ``key``: (K,) each."""
    points = [
        (float(record["frames"]), float(record[key]))
        for record in records
        if isinstance(record.get(key), (int, float)) and math.isfinite(record[key])
    ]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def draw_curves(
    records: Records,
    path: str | Path,
    baselines: Mapping[str, Mapping[str, Estimate]] | None = None,
    theme: Theme = LIGHT,
) -> None:
    """Draws the training curves of a run as PNG.

    Args:
        records: lines of ``metrics.jsonl``.
        path: where to write the picture.
        baselines: summaries of other agents, drawn as horizontal lines.
        theme: colours.
    """
    shown = [
        panel
        for panel in PANELS
        if any(len(series(records, key)[0]) for key, _ in panel.lines)
        or len(series(records, f"eval/{panel.evaluation}")[0])
    ]
    columns = min(3, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = _figure(4.1 * columns, 2.9 * rows, theme)
    if not shown:
        figure.text(0.5, 0.5, "no update yet", ha="center", color=theme.faint)
    for index, panel in enumerate(shown):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_panel(axes, panel, records, baselines or {}, theme)
    _save(figure, path, theme)


@dataclass(frozen=True)
class Curve:
    """What evaluations found of one agent while it was trained, and at the end."""

    name: str
    records: Records
    """Lines of ``metrics.jsonl``."""
    before: int = 0
    """Frames that were trained before the first line."""
    final: Mapping[str, Estimate] | None = None
    """Measures of the final evaluation."""
    final_frames: float | None = None
    """Frames behind the agent of the final evaluation, which may be an earlier one; all frames if None."""
    beginning: tuple[Curve, ...] = ()
    """Those of the runs that it began as, drawn dashed."""

    @property
    def frames(self) -> float:
        """Frames trained in all."""
        return self.before + max((float(record["frames"]) for record in self.records), default=0.0)


COLOURS = ("#1f56c4", "#d9730d", "#2a8f5c", "#8b4fc4", "#c2378f", "#8a6d1a", "#2596a8", "#6b7280")
"""Of the curves of several runs, by turns; they differ in brightness too."""


def draw_comparison(curves: Sequence[Curve], path: str | Path, theme: Theme = LIGHT) -> None:
    """Draws success and SPL on unseen homes against all frames that an agent was trained on, as PNG."""
    figure = _figure(10.6, 4.4, theme)
    for index, (measure, title) in enumerate((("success", "success"), ("spl", "SPL"))):
        axes = figure.add_subplot(1, 2, index + 1)
        _prepare(axes, f"{title} in unseen homes, 95 % intervals", theme)
        for number, curve in enumerate(curves):
            colour = COLOURS[number % len(COLOURS)]
            for earlier in curve.beginning:
                _draw_evaluations(axes, measure, earlier.records, colour, None, earlier.before, dashed=True)
            _draw_evaluations(axes, measure, curve.records, colour, None, curve.before)
            # Named even where nothing was evaluated while training.
            axes.plot([], [], color=colour, marker="o", markersize=4, linewidth=1.6, label=curve.name)
            if curve.final is not None:
                frames = curve.frames if curve.final_frames is None else curve.final_frames
                _draw_final(axes, curve.final[measure], frames, colour)
        axes.set_xlabel("frames in all (diamonds: final evaluation)", color=theme.faint)
        axes.xaxis.label.set_fontsize(8)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlim(left=0)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, max(1, len(labels))),
        fontsize=8,
        frameon=False,
        labelcolor=theme.ink,
    )
    _save(figure, path, theme)


def _draw_final(axes: Axes, value: Estimate, frames: float, colour: str) -> None:
    if math.isfinite(value.mean):
        spread = [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]
        axes.errorbar(
            [frames],
            [value.mean],
            yerr=spread,
            color=colour,
            marker="D",
            markersize=7,
            markerfacecolor="none",
            linewidth=0,
            elinewidth=1,
            capsize=3,
        )


def _figure(width: float, height: float, theme: Theme) -> Figure:
    """An empty figure of so many inches."""
    figure = Figure(figsize=(width, height), dpi=110, facecolor=theme.paper)
    FigureCanvasAgg(figure)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    return figure


def _save(figure: Figure, path: str | Path, theme: Theme) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", facecolor=theme.paper)


def _prepare(axes: Axes, title: str, theme: Theme) -> None:
    """What the axes of all plots over frames have in common."""
    axes.set_facecolor(theme.paper)
    axes.set_title(title, color=theme.ink, fontsize=10, loc="left", fontweight="bold")
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.tick_params(colors=theme.faint, labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("frames", color=theme.faint, fontsize=8)


def _draw_panel(
    axes: Axes,
    panel: Panel,
    records: Records,
    baselines: Mapping[str, Mapping[str, Estimate]],
    theme: Theme,
) -> None:
    _prepare(axes, panel.title, theme)
    _shade_imitation(axes, records, theme)
    colours = (theme.training, *theme.others[1:], theme.others[0])
    for (key, label), colour in zip(panel.lines, colours, strict=False):
        frames, values = series(records, key)
        if len(frames):
            axes.plot(frames, values, color=colour, linewidth=1.4, label=label or None)
    if panel.evaluation:
        _draw_evaluations(axes, panel.evaluation, records, theme.evaluation, "unseen homes, 95 %")
        for (name, summary), colour in zip(baselines.items(), theme.others, strict=False):
            level = summary[panel.evaluation].mean
            if math.isfinite(level):
                axes.axhline(level, color=colour, linewidth=1.2, linestyle=(0, (5, 3)), label=name)
    low, high = panel.limits
    if low is not None and high is not None:
        axes.set_ylim(low - 0.02 * (high - low), high + 0.02 * (high - low))
    elif low is not None:
        axes.set_ylim(bottom=low)
    axes.set_xlim(left=0)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, frameon=False, labelcolor=theme.ink, loc="best")


def evaluations(records: Records, measure: str) -> NDArray[np.float64]:
    """Frames, mean, and lower and upper end of the interval, of each evaluation while training: (K, 4)."""
    names = ("frames", f"eval/{measure}", f"eval/{measure}_low", f"eval/{measure}_high")
    done = [record for record in records if isinstance(record.get(names[1]), (int, float))]
    rows = [[record.get(name) for name in names] for record in done]
    # What is not known is None, which becomes NaN.
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _draw_evaluations(
    axes: Axes,
    measure: str,
    records: Records,
    colour: str,
    label: str | None,
    before: int = 0,
    dashed: bool = False,
) -> None:
    """Draws the evaluations of a run, ``before`` frames further right."""
    frames, means, low, high = evaluations(records, measure).T
    if not len(frames):
        return
    axes.errorbar(
        before + frames,
        means,
        yerr=np.nan_to_num(np.stack([means - low, high - means]).clip(min=0)),
        color=colour,
        marker="o",
        markersize=2.5 if dashed else 4,
        linewidth=1.6,
        linestyle=(0, (4, 3)) if dashed else "solid",
        elinewidth=1,
        capsize=2,
        label=label,
    )


def _shade_imitation(axes: Axes, records: Records, theme: Theme) -> None:
    """Marks the frames in which the expert taught."""
    taught = [record["frames"] for record in records if record.get("rollout/phase") == "imitation"]
    if taught:
        axes.axvspan(0, max(taught), color=theme.grid, alpha=0.55, linewidth=0)
        axes.annotate(
            "imitation",
            (0, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -10),
            textcoords="offset points",
            color=theme.faint,
            fontsize=7,
        )
