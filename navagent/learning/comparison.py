"""The comparison of all adaptation methods by transfer to another perception task, resumable and in parallel.

Learning rates come first: each method's is chosen from the same few, on a held-out part of the middle number
of images of the first seed. Then every method is trained on every number of images for every seed. Each
finished training is a line of ``runs.jsonl``; the same call goes on from there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from envs.cores import usable_cores
from navagent.learning.comparison_report import write_report
from navagent.learning.frames import FrameSource, View, describe_dataset, render_frames
from navagent.learning.perception import TASKS
from navagent.learning.trainings import Ledger, carry_out, claim, interruptible
from navagent.learning.transfer import BASE_TASK, Base, Bench, Job, Outcome, Row, TransferConfig, rows
from policies.names import nearest
from policies.weights import sha256


@dataclass(frozen=True)
class ComparisonConfig:
    """Settings of a comparison. By default it takes less than half an hour on two cores."""

    dataset: Path
    """Folder of a data set with ``scenes/`` and ``episodes/{train,val}``, best of homes that no base saw."""
    out: Path
    """Folder for the results."""
    task: str = "reshading"
    """What methods learn, see :data:`~navagent.learning.perception.TASKS`."""
    images: tuple[int, ...] = (50, 500, 5000)
    """Numbers of training images."""
    seeds: int = 3
    """How often each is done."""
    methods: tuple[str, ...] = ()
    """Names of the rows of the table, see :func:`~navagent.learning.transfer.rows`; empty for all."""
    bases: tuple[str, ...] = ("resnet_small", "vit_mini")
    """Networks to adapt: names of encoders that ship with weights, or NAME=FOLDER of a pre-training."""
    learning_rates: tuple[float, ...] = (3e-4, 3e-3)
    """Peak learning rates of Adam to choose from, for what a method trains; the decoder has its own."""
    steps: int = 240
    """Optimiser steps of each training. The defaults see 1,920 images: of 5,000, none comes twice."""
    batch_size: int = 8
    """Images a step."""
    test_frames: int = 400
    """Images in unseen homes."""
    workers: int = 0
    """Processes, each with one thread; 0 for one a core."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r}: expected one of {', '.join(TASKS)}")
        if not self.images or min(self.images) < 2:
            raise ValueError(f"images {self.images}: expected numbers of 2 or more")
        for name in ("seeds", "steps", "batch_size", "test_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates {self.learning_rates}: expected numbers above 0")
        if self.workers < 0:
            raise ValueError(f"workers {self.workers}: expected 0 or more")
        known = [row.name for row in rows()]
        for method in self.methods:
            if method not in known:
                raise ValueError(
                    f"method {method!r} is not compared{nearest(method, known)} (known: {'; '.join(known)})"
                )

    @property
    def chosen_rows(self) -> list[Row]:
        """What is compared."""
        return [row for row in rows() if not self.methods or row.name in self.methods]


def compare(
    config: ComparisonConfig, source: FrameSource = render_frames, console: Console | None = None
) -> Path:
    """Trains every method on every base, and reports errors, intervals and differences.

    The folder receives ``table.md``, ``plot.png``, ``results.json``, ``runs.jsonl`` and ``settings.json``.
    The rendered images are in ``frames/`` until all is done.

    Args:
        config: the settings.
        source: renders the images; by default the built-in simulator.
        console: where to show progress.

    Returns:
        The table.

    Raises:
        ValueError: for a base without weights, or a folder that holds another comparison.
        RuntimeError: if a training failed.
    """
    console = console or Console()
    began = time.perf_counter()
    out = Path(config.out)
    bases = tuple(Base.find(text) for text in config.bases)
    _claim(out, config, bases)
    shared = TransferConfig(
        View(config.dataset),
        config.task,
        out / "frames",
        bases,
        config.images,
        config.seeds,
        config.steps,
        config.batch_size,
        config.test_frames,
    )
    shared.render(source, lambda text: console.print(text, highlight=False))
    bench = Bench(shared)
    plan = Plan(config)
    for base in bases:
        for row in config.chosen_rows:
            reason = bench.refusal(base.name, row)
            if reason is None:
                plan.add(base.name, row)
            else:
                plan.skipped.append({"base": base.name, "row": row.name, "reason": reason})
                console.print(f"{row.name} on {base.name} is left out: {reason}", highlight=False)
    workers = config.workers or usable_cores()
    with interruptible(plan, console):
        carry_out(plan, Ledger(out / "runs.jsonl", Outcome), partial(Bench, shared), workers, console)
    table = write_report(
        out,
        config.task,
        config.chosen_rows,
        list(plan.outcomes.values()),
        bench.baselines(),
        {
            "settings": json.loads((out / "settings.json").read_text("utf-8")),
            "seeds": config.seeds,
            "skipped": plan.skipped,
            "workers": workers,
            "seconds": round(time.perf_counter() - began),
        },
    )
    shutil.rmtree(shared.frames)
    console.print(table.read_text("utf-8"), highlight=False, markup=False, soft_wrap=True)
    return table


class Plan:
    """Which trainings there are, which of them can start, and what came of those that are done."""

    def __init__(self, config: ComparisonConfig) -> None:
        self.config = config
        self.skipped: list[dict[str, str]] = []
        """Methods that do not take a base, and why."""
        self.outcomes: dict[tuple[Any, ...], Outcome] = {}
        """What came of the trainings of this plan, by key."""
        self._ready: deque[Job] = deque()
        self._members: dict[tuple[str, str], Row] = {}
        self._given: set[tuple[Any, ...]] = set()

    def add(self, base: str, row: Row) -> None:
        """Plans all trainings of a method on a base."""
        self._members[base, row.name] = row
        self._ready.extend(self._choices(base, row))

    @property
    def total(self) -> int:
        """Trainings in all."""
        config = self.config
        return len(self._members) * (len(config.learning_rates) + len(config.images) * config.seeds)

    @property
    def done(self) -> int:
        """Trainings done."""
        return len(self.outcomes)

    def take(self, outcome: Outcome) -> None:
        """Notes what came of a training; other comparisons' are passed over."""
        row = self._members.get((outcome.base, outcome.row))
        if row is None:
            return
        if outcome.phase == "final":
            if outcome.images in self.config.images and outcome.seed < self.config.seeds:
                self.outcomes[outcome.key] = outcome
            return
        self.outcomes[outcome.key] = outcome
        choices = [self.outcomes.get(job.key) for job in self._choices(outcome.base, row)]
        errors = [choice.error(self.config.task) for choice in choices if choice is not None]
        if len(errors) == len(choices):
            rate = self.config.learning_rates[errors.index(min(errors))]
            self._ready.extend(
                Job(outcome.base, row, images, seed, rate, "final")
                for seed in range(self.config.seeds)
                for images in self.config.images
            )

    def next(self) -> Job | None:
        """A training that can start; None if none can now."""
        while self._ready:
            job = self._ready.popleft()
            if job.key not in self.outcomes and job.key not in self._given:
                self._given.add(job.key)
                return job
        return None

    def _choices(self, base: str, row: Row) -> list[Job]:
        images = sorted(self.config.images)[len(self.config.images) // 2]
        return [Job(base, row, images, 0, rate, "choose") for rate in self.config.learning_rates]


def _claim(out: Path, config: ComparisonConfig, bases: Sequence[Base]) -> None:
    """Writes what a comparison's trainings have in common; refuses a folder with others."""
    settings = {
        "task": config.task,
        "base_task": BASE_TASK,
        "images": list(config.images),
        "bases": {base.name: sha256(base.weights) for base in bases},
        "learning_rates": list(config.learning_rates),
        "steps": config.steps,
        "batch_size": config.batch_size,
        "test_frames": config.test_frames,
        "dataset": describe_dataset(config.dataset),
    }
    claim(out, settings, "a comparison", "methods or seeds")
