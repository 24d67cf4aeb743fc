"""The side-tuning paper's ladder: behaviour cloning by several methods from few and many demonstrations.

The expert's demonstrations are recorded once. For each seed they are put into an order of its own, and a rung
of the ladder is the first so many of them, so that fewer are always among more, and all methods learn from
the same. Every training is one that ``navagent imitate imitation=behaviour_cloning`` does, for as many frames
and steps of the optimiser whatever there is to learn from, and ends with an evaluation on the same unseen
episodes. It leaves a run's folder and a line of ``runs.jsonl``; the same call goes on from there.

DAgger (Ross et al. 2011) stands beside it: as many frames and steps of the optimiser, but each frame is a new
one, where learner and expert came together, with the expert's label.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from envs.cores import usable_cores
from envs.files import cache_dir
from navagent.agent_spaces import action_space, observation_space
from navagent.build import check_perception, policy_settings
from navagent.config import (
    CLONING_ALONE,
    DAGGER_ALONE,
    ConfigError,
    ScenesConfig,
    TrainConfig,
    flatten,
    load_config,
)
from navagent.demonstrations.record import in_turn
from navagent.demonstrations.recorded import DemonstrationSet
from navagent.learning.demonstrated import record_expert
from navagent.learning.imitation_ladder_report import write_report
from navagent.learning.trainings import Ledger, carry_out, claim, interruptible
from navagent.progress import counting
from navagent.runs import Run
from navagent.scenes import generated_dataset
from policies.adaptation import ADAPTATIONS
from policies.names import nearest

BLIND = "blind"
"""The method without cameras."""
KNOWN = (*(name for name, method in ADAPTATIONS.items() if not method.needs_earlier_task), BLIND)
"""Methods that a ladder can have."""
RESERVED = (
    "adaptation",
    "algorithm",
    "algorithm.name",
    "imitation",
    "imitation.name",
    "imitation.demos",
    "imitation.num_demos",
    "run_dir",
    "resume",
    "start_from",
    "seed",
)
"""Settings that are the ladder's own."""
EACH_ITS_OWN = ("imitation.name", "run_dir", "seed", "device", "num_threads")
"""Settings in which the trainings of a ladder may differ, besides those of the methods."""


@dataclass(frozen=True)
class LadderConfig:
    """Settings of a ladder."""

    out: Path
    """Folder for the results."""
    settings: tuple[str, ...] = ()
    """Settings of ``navagent imitate`` for all trainings, as typed."""
    experiment: str = "ladder"
    """What they start from, if they name no experiment."""
    sizes: tuple[int | Literal["all"], ...] = (49, 500, 5000, "all")
    """Numbers of demonstrations."""
    demonstrations: int = 10_000
    """How many are recorded."""
    methods: tuple[str, ...] = ("sidetune", "features", "finetune", "scratch", BLIND)
    """Names of methods, see :data:`KNOWN`."""
    dagger: tuple[str, ...] = ("sidetune",)
    """Methods that learn by DAgger too."""
    seeds: int = 3
    """How often each is done: with other demonstrations, initial weights and order."""
    workers: int = 0
    """Processes; 0 for one a core."""

    def __post_init__(self) -> None:
        if not self.sizes or any(size != "all" and size < 1 for size in self.sizes):
            raise ValueError(f"sizes {self.sizes}: expected numbers from 1 on, or all")
        counts = self.counts
        if len(set(counts)) < len(counts):
            raise ValueError(f"sizes {self.sizes}: expected each once, and all is {self.demonstrations}")
        if max(counts) > self.demonstrations:
            raise ValueError(
                f"size {max(counts)} is more than there are: demonstrations {self.demonstrations}; record "
                "more, or use all"
            )
        for name, least in (("demonstrations", 1), ("seeds", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least {least}")
        for what in ("methods", "dagger"):
            given = getattr(self, what)
            for method in given:
                if method not in KNOWN:
                    raise ValueError(
                        f"{what}: there is no method {method!r} for a ladder{nearest(method, KNOWN)} (known: "
                        f"{', '.join(KNOWN)})"
                    )
            if len(set(given)) < len(given):
                raise ValueError(f"{what} {','.join(given)}: expected each once")
        if not self.methods:
            raise ValueError("methods are none: expected one at least")
        for word in self.settings:
            name = word.partition("=")[0].strip()
            if name in RESERVED or name.startswith("adaptation."):
                raise ValueError(
                    f"{word}: the ladder sets {name} itself, by its methods, sizes and seeds; leave it out"
                )

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of demonstrations."""
        return tuple(self.demonstrations if size == "all" else size for size in self.sizes)

    @property
    def jobs(self) -> list[Job]:
        """All trainings, a whole ladder of each seed after the other."""
        counts = sorted(self.counts)
        return [
            Job(method, count, seed)
            for seed in range(self.seeds)
            for count in (*counts, None)
            for method in (self.methods if count else self.dagger)
        ]

    def words(self, job: Job) -> list[str]:
        """The settings of a training, as they are typed after ``navagent imitate``."""
        named = {word.partition("=")[0].strip() for word in self.settings}
        # Those of the other way to learn would mean nothing, and be refused.
        dead = CLONING_ALONE if job.demonstrations is None else DAGGER_ALONE
        given = [word for word in self.settings if word.partition("=")[0].strip() not in dead]
        if job.method == BLIND:
            cameras = ("sensors", "sensors.rgb", "sensors.depth")
            given = [word for word in given if word.partition("=")[0].strip() not in cameras]
            given.append("sensors=blind")
        else:
            given.append(f"adaptation={job.method}")
        if "experiment" not in named:
            given.append(f"experiment={self.experiment}")
        if "num_threads" not in named:
            # Every process has one thread; and one process has the same numbers as several.
            given.append("num_threads=1")
        if job.demonstrations is None:
            given.append("imitation=dagger")
        else:
            file = demonstrations_file(self.out, job.seed)
            given.append("imitation=behaviour_cloning")
            if file.is_file():
                given.append(f"imitation.demos={file}")
            if job.demonstrations < self.demonstrations:
                given.append(f"imitation.num_demos={job.demonstrations}")
        return [*given, f"seed={job.seed}", f"run_dir={self.out / 'runs' / job.name}"]


@dataclass(frozen=True)
class Job:
    """One training."""

    method: str
    """What adapts the encoder."""
    demonstrations: int | None
    """How many are learned from; None for DAgger."""
    seed: int
    """Of demonstrations, initial weights and order."""

    @property
    def name(self) -> str:
        """Name of its run's folder."""
        return f"{self.method}-{self.demonstrations or 'dagger'}-seed{self.seed}"

    @property
    def label(self) -> str:
        """Which it is, in words."""
        source = "DAgger" if self.demonstrations is None else f"{self.demonstrations:,} demonstrations"
        return f"{self.method}, {source}, seed {self.seed}"


@dataclass(frozen=True)
class Rung(Job):
    """What came of a training."""

    success: float
    """Share of the unseen episodes that ended at the goal."""
    spl: float
    """Success weighted by path length, mean over the unseen episodes."""
    episodes: int
    """How many these were."""
    frames: int
    """Frames learned from, each as often as it came."""
    trainable: int
    """Parameters that learned."""
    seconds: float
    """Wall time of the training, without the evaluation."""

    @property
    def job(self) -> Job:
        """Which training it was."""
        return Job(self.method, self.demonstrations, self.seed)


class LadderBench:
    """Carries out trainings."""

    def __init__(self, config: LadderConfig) -> None:
        self.config = config

    def run(self, job: Job) -> Rung:
        """Trains and evaluates; goes on with a training that was stopped."""
        from navagent.train import train

        words = self.config.words(job)
        folder = self.config.out / "runs" / job.name
        if (folder / "config.yaml").is_file():
            words = [f"resume={folder}"]
        settings = load_config(words, "imitate")
        run = train(settings, Console(quiet=True))
        return outcome(job, settings, run)


def outcome(job: Job, config: TrainConfig, run: Run) -> Rung:
    """What came of a run that is done."""
    from policies.actor_critic import NavigationPolicy

    records = run.read_metrics()
    measured = [record for record in records if "eval/spl" in record][-1]
    times = [record["time/trained_seconds"] for record in records if "time/trained_seconds" in record]
    policy = NavigationPolicy(
        observation_space(config),
        action_space(config),
        lambda _: 0.0,
        **policy_settings(config, restored=True),
    )
    return Rung(
        job.method,
        job.demonstrations,
        job.seed,
        success=measured["eval/success"],
        spl=measured["eval/spl"],
        episodes=measured["eval/episodes"],
        frames=measured["frames"],
        trainable=sum(p.numel() for p in policy.parameters() if p.requires_grad),
        seconds=round(times[-1], 3),
    )


class LadderPlan:
    """Which trainings there are, and what came of those that are done."""

    def __init__(self, jobs: list[Job]) -> None:
        self.outcomes: dict[Job, Rung] = {}
        """What came of the trainings of this plan."""
        self._jobs = set(jobs)
        self._waiting = deque(jobs)

    @property
    def total(self) -> int:
        """Trainings in all."""
        return len(self._jobs)

    @property
    def done(self) -> int:
        """Trainings done."""
        return len(self.outcomes)

    def next(self) -> Job | None:
        """A training that was not given yet; None if there is none."""
        while self._waiting:
            job = self._waiting.popleft()
            if job not in self.outcomes:
                return job
        return None

    def take(self, outcome: Rung) -> None:
        """Notes what came of a training; those of other ladders are passed over."""
        if outcome.job in self._jobs:
            self.outcomes[outcome.job] = outcome


def climb(config: LadderConfig, console: Console | None = None, command: str | None = None) -> Path:
    """Trains every method on every number of demonstrations, and reports success and SPL on unseen homes.

    The folder receives ``table.md``, ``plot.png``, ``results.json``, ``runs.jsonl``, ``settings.json``, the
    demonstrations under ``demonstrations/`` and the trained agents under ``runs/``.

    Args:
        config: the settings.
        console: where to show progress.
        command: what to type to go on after an interruption; the same again if None.

    Returns:
        The table.

    Raises:
        ConfigError: for settings that do not fit.
        ValueError: for a folder that holds another ladder.
        RuntimeError: if a training failed.
    """
    console = console or Console()
    began = time.perf_counter()
    out, workers = config.out, config.workers or usable_cores()
    plan = LadderPlan(config.jobs)
    with interruptible(plan, console, command):
        shared = common_settings(config)
        claim(out, shared, "a ladder", "methods, sizes or seeds")
        record_demonstrations(config, console)
        carry_out(plan, Ledger(out / "runs.jsonl", Rung), partial(LadderBench, config), workers, console)
    about = {"settings": shared, "workers": workers, "seconds": round(time.perf_counter() - began)}
    table = write_report(out, config.methods, list(plan.outcomes.values()), about)
    console.print(table.read_text("utf-8"), highlight=False, markup=False, soft_wrap=True)
    return table


def common_settings(config: LadderConfig) -> dict[str, Any]:
    """What all trainings have in common, by name, after a look at each kind of them.

    Raises:
        ConfigError: a training would be refused.
    """
    for job in config.jobs:
        if job.seed:
            break
        settings = load_config(config.words(job), "imitate")
        agents = settings.algorithm.num_envs
        if job.demonstrations is not None and job.demonstrations < agents:
            raise ConfigError(
                f"{job.demonstrations} demonstrations are too few for algorithm.num_envs={agents} agents "
                f"side by side, which follow one each; set algorithm.num_envs={job.demonstrations} or less"
            )
        if not settings.evaluation.every_frames:
            raise ConfigError(
                "evaluation.every_frames=0 would leave the trainings without an evaluation; leave it out to "
                "have one at the end"
            )
        if job.demonstrations in (None, max(config.counts)):
            check_perception(settings)
    flat = flatten(load_config(config.words(Job("features", None, 0)), "imitate"))
    shared = {
        name: value
        for name, value in flat.items()
        if not name.startswith("adaptation.") and name not in EACH_ITS_OWN
    }
    return {"demonstrations": config.demonstrations, **shared}


def record_demonstrations(config: LadderConfig, console: Console) -> None:
    """Makes the homes, records the expert, and puts its demonstrations into each seed's order."""
    settings = load_config(config.words(Job("features", None, 0)), "imitate")
    # No training runs beside it.
    settings = dataclasses.replace(settings, num_threads=0)
    if settings.scenes.dataset == ScenesConfig().dataset:
        generated_dataset(settings.scenes.num, settings.scenes.seed, cache_dir(), console)
    file = config.out / "demonstrations" / "expert.demos"
    console.print(f"demonstrations  {file}", highlight=False, soft_wrap=True)
    with counting("recording") as progress:
        recorded = record_expert(settings, file, config.demonstrations, progress)
    for seed in range(config.seeds):
        ordered = demonstrations_file(config.out, seed)
        if not ordered.is_file():
            in_order(recorded, seed).save(ordered)


def demonstrations_file(out: Path, seed: int) -> Path:
    """Where a seed's demonstrations are, in its order."""
    return out / "demonstrations" / f"seed{seed}.demos"


def in_order(demonstrations: DemonstrationSet, seed: int) -> DemonstrationSet:
    """Those that reached their goal, such that any first so many are spread evenly over the scenes."""
    chosen = demonstrations.chosen()
    order = in_turn(chosen.episodes, seed)
    return DemonstrationSet.of(chosen.header, [chosen[index] for index in order])
