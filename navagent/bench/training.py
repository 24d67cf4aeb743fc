"""``navagent bench train``: several learners on the same environments and networks, by turns."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from navagent.arguments import UsageError
from navagent.bench.contestants import CONTESTANTS
from navagent.bench.networks import NETWORKS
from navagent.bench.report import show, show_bars, write
from navagent.bench.runner import Entry, Measurement, measure
from navagent.build import Split, agent_spec, load_split, set_threads, training_device
from navagent.config import TrainConfig, load_config
from navagent.runs import versions
from policies.names import nearest

MOST_FRAMES = 8192
"""Where nothing is said of steps, rollouts of many agents are so short that they have this many frames."""
LEAST_STEPS = 16
"""But no shorter than this."""
SCENE_EPISODES = 500
"""How many episodes are drawn in a scene that is given."""


@dataclass(frozen=True)
class BenchConfig:
    """What is to be measured."""

    out: Path
    """Folder of the results."""
    settings: tuple[str, ...] = ()
    """Settings of ``navagent train`` that hold for all, after those of the networks."""
    scene: Path | None = None
    """A scene to play in; the settings' data set, by default one generated home, if None."""
    networks: tuple[str, ...] = ("simple_cnn_gru",)
    """Names in :data:`~navagent.bench.networks.NETWORKS`."""
    contestants: tuple[str, ...] = tuple(CONTESTANTS)
    """Names in :data:`~navagent.bench.contestants.CONTESTANTS`."""
    variants: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Further entries of this package's PPO: what to call each, and the settings that it differs by."""
    agents: tuple[int, ...] = (4, 16, 64, 256)
    """Numbers of agents."""
    steps: int | None = None
    """Steps of a rollout; None leaves it to the settings, with less for many agents."""
    updates: int = 5
    """Updates of each that count."""
    warm_up: int = 2
    """Updates of each before those."""

    def __post_init__(self) -> None:
        for kind, names, known in (
            ("network", self.networks, list(NETWORKS)),
            ("contestant", self.contestants, list(CONTESTANTS)),
        ):
            if not names:
                raise UsageError(f"no {kind} is named; expected some of {', '.join(known)}")
            for name in names:
                if name not in known:
                    raise UsageError(
                        f"there is no {kind} {name!r}{nearest(name, known)} ({kind}s: {', '.join(known)})"
                    )
        labels = [label for label, _ in self.variants]
        for label in labels:
            if label in CONTESTANTS or labels.count(label) > 1:
                raise UsageError(f"a variant needs a name of its own, and {label!r} is taken")
        if not self.agents or min(self.agents) < 1:
            raise UsageError(f"agents {', '.join(map(str, self.agents))}: expected numbers of at least 1")
        for name, value, least in (
            ("steps", self.steps, 2),
            ("updates", self.updates, 1),
            ("warm-up", self.warm_up, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} {value}: expected at least {least}")
        if self.scene is not None and not self.scene.is_file():
            raise UsageError(f"scene {self.scene}: no such file; expected a .glb or .gltf file")


def train_config(bench: BenchConfig, network: str, agents: int, own: Sequence[str] = ()) -> TrainConfig:
    """All settings of one entry; ``own`` are those of a variant."""
    home = [] if network == "settings" else ["scenes.num=2"]
    config = load_config([*home, *NETWORKS[network].settings, *bench.settings, *own])
    algorithm = config.algorithm
    steps = bench.steps
    if steps is None:
        steps = min(algorithm.num_steps, max(LEAST_STEPS, MOST_FRAMES // agents))
    minibatches = min(algorithm.num_minibatches, agents)
    return dataclasses.replace(
        config,
        algorithm=dataclasses.replace(
            algorithm, num_envs=agents, num_steps=steps, num_minibatches=minibatches
        ),
    )


def entries(bench: BenchConfig, network: str, agents: int) -> list[Entry]:
    """Who is measured with a network and a number of agents."""
    config = train_config(bench, network, agents)
    found = [
        Entry(name, name, network, config)
        for name in bench.contestants
        if NETWORKS[network].frozen or not CONTESTANTS[name].frozen_only
    ]
    for label, own in bench.variants:
        found.append(Entry("navagent", label, network, train_config(bench, network, agents, own)))
    return found


def make_split(bench: BenchConfig, config: TrainConfig) -> Split:
    """The episodes that everybody plays: of the scene that is given, or of the settings' data set."""
    if bench.scene is None:
        return load_split(config, config.scenes.train_split)
    from envs.episodes import generate_episodes
    from envs.simulators.raycast.simulator import RaycastSimulator

    name = bench.scene.name
    simulator = RaycastSimulator([bench.scene], 1, [], agent_spec(config), num_threads=1)
    try:
        episodes = generate_episodes(simulator.paths, 0, name, SCENE_EPISODES, config.seed)
    finally:
        simulator.close()
    return Split("train", tuple(episodes), {name: bench.scene.resolve()})


def run(bench: BenchConfig, command: str, console: Console) -> list[Measurement]:
    """Measures all, shows and writes the results, after each network and number of agents anew.

    Args:
        bench: what is to be measured.
        command: the command line, for the results.
        console: where to show progress and tables.

    Raises:
        KeyboardInterrupt: after Ctrl-C; what was measured until then is written.
    """
    # Whatever is wrong with a setting should be known before anything is measured.
    cells = [entries(bench, network, agents) for network in bench.networks for agents in bench.agents]
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    splits: dict[str, Split] = {}
    results: list[Measurement] = []
    turns = sum(len(cell) for cell in cells) * (1 + bench.warm_up + bench.updates)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as live:
        task = live.add_task("starting", total=turns)
        for cell in cells:
            first = cell[0]
            agents = first.config.algorithm.num_envs
            key = str((first.config.scenes, first.config.env))
            if key not in splits:
                live.update(task, description="episodes")
                splits[key] = make_split(bench, first.config)

            def progress(label: str, where: str = f"{first.network}, {agents} agents") -> None:
                live.update(task, advance=1, description=f"{where}: {label}")

            found = measure(cell, splits[key], bench.updates, bench.warm_up, progress)
            results += found
            show(found, live.console)
            for each in found:
                if each.broken and each.problem is not None:
                    live.console.print(
                        f"{each.label} failed:\n{each.problem}", markup=False, highlight=False, soft_wrap=True
                    )
            write(results, _facts(bench, command, first.config, load), bench.out)
    show_bars(results, console)
    return results


def _facts(bench: BenchConfig, command: str, config: TrainConfig, load: float | None) -> dict[str, Any]:
    """How it was measured."""
    algorithm = config.algorithm
    scene = bench.scene.name if bench.scene else f"{config.scenes.dataset} homes, {config.scenes.num}"
    passes = f"{algorithm.epochs} passes over it in {algorithm.num_minibatches} minibatches"
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "scene": f"{scene}, {config.sensors.width}x{config.sensors.height} pixels",
        "device": str(training_device(config.device)),
        "threads": set_threads(config.num_threads),
        "epochs": passes,
        "updates": bench.updates,
        "warm_up": bench.warm_up,
        "settings": list(bench.settings),
        "variants": {label: list(own) for label, own in bench.variants},
        "load": load,
        "versions": versions(),
    }
