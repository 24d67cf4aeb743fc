"""A run's task as settings of habitat-lab (0.3), the file that its ``get_config`` and its benchmark read.

The file is Hydra's: it takes habitat-lab's own schemas for the task, the sensors and the measures, and says
what the run has otherwise. So habitat-lab checks every name and every type in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from envs.noise import NoiseConfig
from navagent.build import agent_spec, cameras, noise, task_rules
from navagent.config import ConfigError, TrainConfig

MEASURES = ("distance_to_goal", "success", "spl", "soft_spl", "collisions", "distance_to_goal_reward")
"""Measures of habitat-lab that are taken, in the order in which they need each other."""
NOISY_MOTION = "navagent_noisy_motion"
"""Name of the simulator with noisy motion: see :mod:`navagent.evaluation.habitat_noise`."""

_AGENT = "habitat.simulator.agents.main_agent"
_ACTIONS = ("stop", "move_forward", "turn_left", "turn_right")
_SENSORS = {
    "pointgoal_with_gps_compass": "pointgoal_with_gps_compass_sensor",
    "pointgoal": "pointgoal_sensor",
    "gps": "gps_sensor",
    "compass": "compass_sensor",
}
# habitat-lab has a schema for the goal from where the agent is, and none for the same from its start.
_SCHEMAS = {"pointgoal_sensor": "pointgoal_with_gps_compass_sensor"}


def habitat_settings(
    config: TrainConfig, episodes: Path, scenes_dir: Path, seed: int = 0, gpu: int = -1
) -> dict[str, Any]:
    """The settings as nested data, Hydra's list of defaults included.

    Args:
        config: The run's settings.
        episodes: The split's file, ``.json.gz``.
        scenes_dir: Folder that its scene ids start from.
        seed: Of habitat-lab's random numbers.
        gpu: Device that habitat-sim renders on; -1 takes what there is, and without a GPU the processor.

    Raises:
        ConfigError: habitat-lab cannot express a setting; the message names it.
    """
    if not episodes.name.endswith(".gz"):
        raise ConfigError(
            f"{episodes}: habitat-lab reads packed episodes only; pack them: gzip {episodes.name}"
        )
    rules, spec, wanted = task_rules(config), agent_spec(config), config.sensors
    told = [
        _SENSORS[name]
        for name in (wanted.goal, "gps", "compass")
        if name == wanted.goal or getattr(wanted, name)
    ]
    eyes = {f"{camera.kind}_sensor": camera for camera in cameras(config)}
    simulator = "habitat/simulator"
    defaults: list[Any] = [
        {"/habitat": "habitat_config_base"},
        {"/habitat/task": "task_config_base"},
        {"/habitat/task/actions": list(_ACTIONS)},
        {"/habitat/task/measurements": list(MEASURES)},
        *(
            {f"/habitat/task/lab_sensors@habitat.task.lab_sensors.{name}": _SCHEMAS.get(name, name)}
            for name in told
        ),
        {f"/{simulator}/agents@{_AGENT}": "agent_base"},
        *({f"/{simulator}/sim_sensors@{_AGENT}.sim_sensors.{name}": name} for name in eyes),
        {"/habitat/dataset": "dataset_config_schema"},
        "_self_",
    ]
    if config.env.actuation_noise:
        defaults.insert(1, {f"/{simulator}": NOISY_MOTION})
    goal = {"pointgoal_sensor": {"type": "PointGoalSensor"}} if wanted.goal == "pointgoal" else {}
    return {
        "defaults": defaults,
        "habitat": {
            "seed": seed,
            "environment": {
                "max_episode_steps": rules.max_steps,
                # Each episode once, in the order of the file.
                "iterator_options": {"cycle": False, "shuffle": False, "max_scene_repeat_steps": -1},
            },
            "task": {
                "type": "Nav-v0",
                "goal_sensor_uuid": wanted.goal,
                "reward_measure": "distance_to_goal_reward",
                "success_measure": "spl",
                "success_reward": rules.success_reward,
                "slack_reward": rules.slack_reward,
                "end_on_success": True,
                "measurements": {"success": {"success_distance": rules.success_distance}},
                **({"lab_sensors": goal} if goal else {}),
            },
            "simulator": {
                "forward_step_size": spec.forward_step,
                "turn_angle": _whole("env.turn_angle_deg", spec.turn_angle_deg),
                **_motion_noise(noise(config)),
                "habitat_sim_v0": {"gpu_device_id": gpu, "allow_sliding": spec.allow_sliding},
                "agents": {
                    "main_agent": {
                        "radius": spec.radius,
                        "height": spec.height,
                        "max_climb": spec.max_climb,
                        "max_slope": spec.max_slope_deg,
                        "sim_sensors": {
                            name: {
                                "height": camera.height,
                                "width": camera.width,
                                "hfov": _whole("sensors.hfov_deg", camera.hfov_deg),
                                "position": [0.0, camera.sensor_height, 0.0],
                                "orientation": [math.radians(camera.pitch_deg), 0.0, 0.0],
                                **_of_kind(camera.kind, config),
                            }
                            for name, camera in eyes.items()
                        },
                    }
                },
            },
            "dataset": {
                "type": "PointNav-v1",
                "split": episodes.name.split(".")[0],
                # habitat-lab puts the split's name wherever there are braces.
                "data_path": str(episodes.resolve()).replace("{", "{{").replace("}", "}}"),
                "scenes_dir": str(scenes_dir.resolve()),
            },
        },
    }


def to_hydra(settings: Mapping[str, Any], comment: str) -> str:
    """The text of a file with such settings, which says what it is in its first lines."""
    lines = "\n".join(f"# {line}" for line in comment.splitlines())
    return f"# @package _global_\n{lines}\n{yaml.safe_dump(settings, sort_keys=False)}"


def _of_kind(kind: str, config: TrainConfig) -> dict[str, Any]:
    """What only colour cameras or only depth cameras have."""
    wanted = noise(config)
    if kind == "rgb":
        return _noise_model("GaussianNoiseModel", "intensity_constant", wanted.rgb)
    depths = {"min_depth": config.sensors.min_depth, "max_depth": config.sensors.max_depth}
    return (
        depths
        | {"normalize_depth": True}
        | _noise_model("RedwoodDepthNoiseModel", "noise_multiplier", wanted.depth)
    )


def _noise_model(name: str, strength: str, value: float) -> dict[str, Any]:
    return {"noise_model": name, "noise_model_kwargs": {strength: value}} if value else {}


def _motion_noise(wanted: NoiseConfig) -> dict[str, Any]:
    if not wanted.actuation:
        return {}
    return {"robot": wanted.robot, "controller": wanted.controller, "noise_multiplier": wanted.actuation}


def _whole(name: str, value: float) -> int:
    if value != round(value):
        raise ConfigError(f"{name}={value:g}: habitat-lab takes whole degrees only, such as {round(value)}")
    return round(value)
