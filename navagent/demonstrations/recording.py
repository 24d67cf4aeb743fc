"""What ``navagent demos record`` is asked for, and who then acts: the expert, a run's agent or a person."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from envs.vector_env import PointNavVectorEnv
from navagent.build import check_simulator, load_split
from navagent.config import (
    ConfigError,
    ScenesConfig,
    SensorsConfig,
    TrainConfig,
    check_named,
    load_config,
    read_config,
)
from navagent.demonstrations.keyboard import Display, KeyboardAgent, open_display
from navagent.demonstrations.record import record
from navagent.demonstrations.recorded import Source
from navagent.evaluation.agents import Agent, ExpertAgent, PolicyAgent
from navagent.evaluation.command import load_policy
from navagent.runs import Run
from policies.names import nearest
from policies.weights import sha256

EXPERT, KEYBOARD = "expert", "keyboard"

WORLD = ("scenes", "simulator", "env", "experiment", "device", "num_threads")
"""Settings that decide what is recorded of the expert."""


@dataclass(frozen=True)
class RecordOptions:
    """What ``navagent demos record`` is asked for."""

    file: str
    """The file to make or to go on with."""
    settings: tuple[str, ...] = ()
    """Settings of ``navagent train``, as typed."""
    agent: str = EXPERT
    """``expert``, ``keyboard`` or the folder of a run."""
    number: int | None = 500
    """Demonstrations in the end; one of each episode if None."""
    split: str | None = None
    """Split of the data set; the one to train on if None."""
    seed: int = 0
    """Of the episodes' order, of noise and of drawn actions."""
    num_envs: int = 16
    """Agents side by side; a person plays one."""
    checkpoint: str = "best"
    """Which of the run's."""
    deterministic: bool = False
    """Whether the run's most probable actions are taken."""
    display: Literal["auto", "terminal", "window"] = "auto"
    """Where a person looks."""


def record_demonstrations(
    options: RecordOptions,
    progress: Callable[[int, int], None] | None = None,
    make_display: Callable[[Literal["auto", "terminal", "window"]], Display] = open_display,
) -> tuple[Path, int, int]:
    """Records what the options ask for.

    Args:
        options: what is asked for.
        progress: called with the demonstrations that are done and all.
        make_display: gives a person's display.

    Returns:
        The file, how many demonstrations it shall hold, and how many it holds.

    Raises:
        DemonstrationError, ConfigError, RunError: something does not fit; see there.
    """
    run = _run(options)
    _check_options(options, run)
    config = _config_of(run, options.settings) if run is not None else _config_for(options)
    check_simulator(config)
    split = load_split(config, options.split or config.scenes.train_split)
    number = len(split.episodes) if options.number is None else options.number
    scenes = config.scenes
    source = Source(
        agent=options.agent if run is None else run.path.resolve().name,
        checkpoint=None if run is None else sha256(run.checkpoint(options.checkpoint)),
        deterministic=options.deterministic,
        dataset=_absolute(scenes),
        homes=scenes.num,
        homes_seed=scenes.seed,
        scenes_dir=None if scenes.scenes_dir is None else str(Path(scenes.scenes_dir).expanduser().resolve()),
        split=split.name,
        seed=options.seed,
        num_envs=1 if options.agent == KEYBOARD else options.num_envs,
    )
    part = None
    display: Display | None = None
    if run is not None:

        def make_agent(env: PointNavVectorEnv) -> Agent:
            policy = load_policy(run, env, options.checkpoint)
            return PolicyAgent(policy, source.agent, options.deterministic)

    elif options.agent == KEYBOARD:
        display, part = make_display(options.display), 1
        config = _for_person(config, display)
        held = [0]
        told, bar = progress, display

        def progress(done: int, total: int) -> None:
            held[0] = done
            if told is not None:
                told(done, total)

        def make_agent(env: PointNavVectorEnv) -> Agent:
            return KeyboardAgent(bar, told=lambda: f"{held[0] + 1} of {number}: ")

    else:
        config = dataclasses.replace(config, sensors=SensorsConfig(rgb=False, depth=False))

        def make_agent(env: PointNavVectorEnv) -> Agent:
            return ExpertAgent()

    try:
        held_now = record(
            options.file, config, split, source, make_agent, number, part=part, progress=progress
        )
    finally:
        if display is not None:
            display.close()
    return Path(options.file), number, len(held_now)


def _run(options: RecordOptions) -> Run | None:
    """The run whose agent acts, None where none does."""
    if options.agent in (EXPERT, KEYBOARD):
        return None
    if not Path(options.agent).is_dir():
        raise ConfigError(
            f"--agent {options.agent!r} is no agent{nearest(options.agent, [EXPERT, KEYBOARD])} (known: "
            "expert, keyboard, or the folder of a run)"
        )
    return Run(options.agent)


def _check_options(options: RecordOptions, run: Run | None) -> None:
    """Refuses options that are another agent's."""
    if run is None and (options.deterministic or options.checkpoint != RecordOptions.checkpoint):
        raise ConfigError(
            f"--checkpoint and --deterministic are for a trained agent, not for --agent {options.agent}: "
            "leave them out, or give the folder of a run"
        )
    if options.agent != KEYBOARD and options.display != RecordOptions.display:
        raise ConfigError(f"--display {options.display} is for --agent keyboard: leave it out")


def _config_for(options: RecordOptions) -> TrainConfig:
    """The settings of a world in which the expert or a person acts."""
    keyboard = options.agent == KEYBOARD
    check_named(
        options.settings,
        (*WORLD, "sensors") if keyboard else WORLD,
        f"a recording of {'a person' if keyboard else 'the expert'} does not depend on it (--seed is of "
        "order, noise and drawn actions)",
    )
    return load_config(options.settings)


def _config_of(run: Run, settings: tuple[str, ...]) -> TrainConfig:
    """The settings of a run's agent, in the scenes that the command line asks for."""
    config = read_config(run.config_path)
    check_named(
        settings, ("scenes", "device", "num_threads"), "a trained agent keeps its senses, body and task"
    )
    if not settings:
        return config
    asked = load_config(settings)
    names = {word.partition("=")[0].strip() for word in settings}
    scenes = asked.scenes
    if "scenes" not in names:
        own = {item.name for item in dataclasses.fields(scenes) if f"scenes.{item.name}" in names}
        scenes = dataclasses.replace(config.scenes, **{name: getattr(scenes, name) for name in own})
    return dataclasses.replace(
        config,
        scenes=scenes,
        device=asked.device if "device" in names else config.device,
        num_threads=asked.num_threads if "num_threads" in names else config.num_threads,
    )


def _for_person(config: TrainConfig, display: Display) -> TrainConfig:
    """The settings with a colour camera of the display's size; what is recorded has no pictures."""
    height, width = display.size
    sensors = dataclasses.replace(config.sensors, rgb=True, depth=False, height=height, width=width)
    env = dataclasses.replace(config.env, rgb_noise=0.0)
    return dataclasses.replace(config, sensors=sensors, env=env)


def _absolute(scenes: ScenesConfig) -> str:
    """The data set's folder, as it can be found from anywhere."""
    if scenes.dataset == ScenesConfig().dataset:
        return scenes.dataset
    return str(Path(scenes.dataset).expanduser().resolve())
