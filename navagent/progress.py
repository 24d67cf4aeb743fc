"""What a person sees while an agent trains: one live line in a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0
"""How often a line is written where the output is not a terminal."""


def duration(seconds: float) -> str:
    """A span of time as ``1:02:03`` or ``2:03``."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def measures_line(record: Mapping[str, Any]) -> str:
    """The measures of the newest episodes that a record of metrics holds, as text."""
    parts = []
    for name, label, digits in (
        ("imitation/agreement", "like the expert", 2),
        ("rollout/success", "success", 2),
        ("rollout/spl", "SPL", 2),
        ("rollout/reward_sum", "reward", 2),
        ("rollout/max_geodesic", "paths to", 0),
    ):
        value = record.get(name)
        if value is not None:
            parts.append(f"{label} {value:.{digits}f}" + (" m" if name.endswith("geodesic") else ""))
    return "  ".join(parts)


AGENTS_LISTED = 16
"""So many agents' episodes are told one by one."""


def episodes_of(env: Any, first: int = 0) -> list[str]:
    """Which episode each agent of a PointNav vector environment is in, as text.

    Agents count from ``first``; those without an episode are left out.
    """
    episodes = env.sampler.episodes
    return [
        f"agent {agent}: {episodes[index].scene_id} episode {episodes[index].episode_id}"
        for agent, index in enumerate(env.current_episodes(), first)
        if index >= 0
    ]


def in_lines(place: str, agents: Sequence[str]) -> str:
    """Where something happened: a place in the training or evaluation, and agents' episodes below it."""
    listed = list(agents[:AGENTS_LISTED])
    if len(agents) > len(listed):
        listed.append(f"and {len(agents) - len(listed):,} more")
    return "\n  ".join([f"{place}, with its agents in", *listed])


class TrainingProgress:
    """Shows phase, frames, speed, measures and time left."""

    def __init__(self, console: Console, total_frames: int, start_frames: int = 0) -> None:
        """``start_frames`` were trained before, by the run that is resumed."""
        self.console = console
        self.total_frames = total_frames
        self.frames = start_frames
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = -SECONDS_BETWEEN_LINES
        if console.is_terminal:
            self._live = Progress(
                TextColumn("[bold]{task.description:<9}"),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[line]}"),
                console=console,
            )
            self._task = self._live.add_task(
                "starting", total=total_frames, completed=start_frames, line="..."
            )

    def __enter__(self) -> TrainingProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, phase: str, frames: int, record: Mapping[str, Any], seconds_left: float) -> None:
        """Shows the newest record of metrics."""
        self.frames = frames
        rate = record.get("time/frames_per_second", 0.0)
        line = (
            f"{frames:,} of {self.total_frames:,} frames  {rate:,.0f}/s  {measures_line(record)}  "
            f"{duration(seconds_left)} left"
        )
        if self._live is not None and self._task is not None:
            self._live.update(self._task, description=phase, completed=frames, line=line)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.console.print(f"{phase}: {line}", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Writes a line that stays."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def waiting(self, what: str) -> None:
        """Says what is being done instead of training just now."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, description=what)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's standard error, to be told how many are done and of how many."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
