"""What an agent of some settings observes and does, as Gymnasium's spaces, without any environment."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces

from envs.sensors import TASK_SENSORS
from envs.vector_env import camera_space
from navagent.build import cameras, observation_names, task_rules
from navagent.config import TrainConfig


def observation_space(config: TrainConfig) -> spaces.Dict:
    """The observation space of one agent, as its environment has it."""
    seen = {camera.name: camera for camera in cameras(config)}

    def space(name: str) -> spaces.Space[Any]:
        if name in seen:
            return camera_space(seen[name])
        if name in TASK_SENSORS:
            return TASK_SENSORS[name][0]
        return spaces.Discrete(task_rules(config).num_actions + 1)

    return spaces.Dict({name: space(name) for name in observation_names(config)})


def action_space(config: TrainConfig) -> spaces.Discrete:
    """The action space of one agent, as its environment has it."""
    return spaces.Discrete(task_rules(config).num_actions)
