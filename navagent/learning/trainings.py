"""Many trainings: planned, carried out by several processes, written down one by one, and taken up again."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from envs.files import atomic_write
from navagent.learning.crew import Bench, JobT, crew
from navagent.preemption import Stopped, StopSignals
from navagent.progress import SECONDS_BETWEEN_LINES


class Outcome(Protocol):
    """What came of a training: a dataclass of what JSON can hold."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def label(self) -> str:
        """Which training it was, in a few words."""


JobT_co = TypeVar("JobT_co", covariant=True)
DoneT = TypeVar("DoneT", bound=Outcome)
DoneT_contra = TypeVar("DoneT_contra", bound=Outcome, contravariant=True)


class Plan(Protocol[JobT_co, DoneT_contra]):
    """Which trainings there are, and which of them can start."""

    @property
    def total(self) -> int:
        """Trainings in all."""

    @property
    def done(self) -> int:
        """Trainings done."""

    def next(self) -> JobT_co | None:
        """A training that can start, each only once; None if none can now."""

    def take(self, outcome: DoneT_contra, /) -> None:
        """Notes what came of a training; those that are not of this plan are passed over."""


class Ledger(Generic[DoneT]):
    """The finished trainings, one a line."""

    def __init__(self, path: Path, kind: type[DoneT]) -> None:
        """``kind`` is the dataclass of the outcomes."""
        self.path, self._kind = path, kind

    def read(self) -> list[DoneT]:
        """All whole lines; one that a crash cut short is left out."""
        found = []
        if self.path.is_file():
            for line in self.path.read_text("utf-8").splitlines():
                try:
                    found.append(self._kind(**json.loads(line)))
                except (ValueError, TypeError):
                    continue
        return found

    def append(self, outcome: DoneT) -> None:
        """Adds a line, so that it is on the disk when this returns."""
        cut_short = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut_short else "") + json.dumps(asdict(outcome)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def claim(out: Path, settings: Mapping[str, Any], what: str, addable: str) -> None:
    """Writes what all trainings of a folder have in common to its ``settings.json``.

    Args:
        out: the folder.
        settings: what they have in common, of what JSON can hold.
        what: what the folder is for, with its article.
        addable: what may be added from call to call.

    Raises:
        ValueError: the folder holds trainings with other settings; the message names those that differ.
    """
    path = out / "settings.json"
    text = json.dumps(settings, indent=1) + "\n"
    if not path.is_file():
        with atomic_write(path) as temporary:
            temporary.write_text(text)
        return
    found, wanted = json.loads(path.read_text("utf-8")), json.loads(text)
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        different = "; ".join(f"{name} {found.get(name)}, not {wanted.get(name)}" for name in names[:4])
        raise ValueError(
            f"{out} holds {what} with other settings ({different}); choose another folder. More {addable} "
            "can be added to it"
        )


@contextlib.contextmanager
def interruptible(plan: Plan[Any, Any], console: Console, command: str | None = None) -> Iterator[None]:
    """Within the block, Ctrl-C, SIGTERM and SIGUSR1 stop what is done, and it is said how to go on.

    Args:
        plan: knows how far it is.
        console: where that is said.
        command: what to type; the same command again if None.
    """
    try:
        with StopSignals(lambda text: console.print(text, highlight=False)):
            yield
    except (KeyboardInterrupt, Stopped):
        how = "the same command goes on" if command is None else f"go on with\n  {command}"
        console.print(
            f"stopped after {plan.done} of {plan.total} trainings; {how}", highlight=False, soft_wrap=True
        )
        raise


def carry_out(
    plan: Plan[JobT, DoneT],
    ledger: Ledger[DoneT],
    make_bench: Callable[[], Bench[JobT, DoneT]],
    workers: int,
    console: Console,
) -> None:
    """Has all trainings of a plan done that are not, and written down; shows how far it is.

    Args:
        plan: which trainings there are.
        ledger: where those that are done are written down.
        make_bench: see :func:`navagent.learning.crew.crew`.
        workers: processes.
        console: where progress is shown.

    Raises:
        RuntimeError: a training failed.
    """
    for outcome in ledger.read():
        plan.take(outcome)
    if plan.done == plan.total:
        return
    columns = (
        TextColumn("{task.description:36.36}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("trainings"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    told = time.monotonic()
    with (
        crew(make_bench, workers) as team,
        Progress(*columns, console=console, speed_estimate_period=3600) as bar,
    ):
        shown = bar.add_task("starting", total=plan.total, completed=plan.done)
        running = 0
        while True:
            while running < workers and (job := plan.next()) is not None:
                team.submit(job)
                running += 1
            if not running:
                return
            outcome = team.result()
            running -= 1
            ledger.append(outcome)
            plan.take(outcome)
            bar.update(shown, completed=plan.done, description=outcome.label)
            if not console.is_terminal and time.monotonic() - told >= SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                console.print(f"{plan.done} of {plan.total} trainings: {outcome.label}", highlight=False)
