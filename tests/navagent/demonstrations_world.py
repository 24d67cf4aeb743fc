"""Demonstrations in one room, for tests."""

from __future__ import annotations

import dataclasses

from navagent.build import load_split
from navagent.config import load_config
from navagent.demonstrations.record import record
from navagent.demonstrations.recorded import Source
from navagent.evaluation.agents import ExpertAgent

SENSORS = ("sensors.height=16", "sensors.width=16")


def settings(room, *words):
    """Settings of a small agent in a room."""
    return load_config([f"scenes.dataset={room}", "device=cpu", "num_threads=1", *SENSORS, *words])


def source_of(config, **changes):
    """Where the expert's demonstrations come from."""
    source = Source(
        agent="expert",
        checkpoint=None,
        deterministic=False,
        dataset=config.scenes.dataset,
        homes=40,
        homes_seed=0,
        scenes_dir=None,
        split="train",
        seed=0,
        num_envs=4,
    )
    return dataclasses.replace(source, **changes)


def record_expert(path, config, number=20, make_agent=lambda env: ExpertAgent(), progress=None, **changes):
    """Records the expert without cameras."""
    blind = dataclasses.replace(config, sensors=dataclasses.replace(config.sensors, rgb=False))
    split = load_split(config, "train")
    source = source_of(config, **changes)
    return record(path, blind, split, source, make_agent, number, part=8, progress=progress)
