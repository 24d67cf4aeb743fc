"""PointNav episodes played in real habitat-lab: its benchmark's task, with small cameras and few steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import habitat
import numpy as np
from habitat.config.default_structured_configs import CollisionsMeasurementConfig, SoftSPLMeasurementConfig
from habitat.core.environments import RLTaskEnv
from habitat.datasets.pointnav.pointnav_generator import generate_pointnav_episode
from habitat.sims import make_sim
from habitat.tasks.nav.shortest_path_follower import ShortestPathFollower

from envs.episodes import Episode
from envs.simulators.base import Action, AgentSpec
from navagent.recordings import RecordingError

BENCHMARK = "benchmark/nav/pointnav/pointnav_gibson.yaml"
"""The configuration of habitat-lab that is played."""
MAX_STEPS = 120
"""Most actions of an episode."""
PICTURE_SIZE = 32
"""Rows and columns of the depth camera, which nothing in a trace depends on."""
RANDOM_SHARE = 0.4
"""Share of random actions in every second trace."""
GOAL = "pointgoal_with_gps_compass"
"""Name of the goal sensor whose readings are recorded."""


def task_config(
    folder: Path, scene: Path, split: str, agent: AgentSpec, sensor_height: float, gpu: int, seed: int
) -> Any:
    """habitat-lab's configuration of the benchmark, for one scene of a folder of recordings.

    Raises:
        RecordingError: habitat-lab turns by whole degrees only.
    """
    if agent.turn_angle_deg != round(agent.turn_angle_deg):
        raise RecordingError(
            f"{scene}: turn_angle_deg is {agent.turn_angle_deg:g}; habitat-lab takes whole degrees only"
        )
    config = habitat.get_config(BENCHMARK)
    with habitat.config.read_write(config):
        config.habitat.seed = seed
        # habitat-lab puts the split's name wherever there are braces.
        config.habitat.dataset.data_path = (
            str(folder).replace("{", "{{").replace("}", "}}") + "/pointnav/{split}/{split}.json.gz"
        )
        config.habitat.dataset.split = split
        config.habitat.dataset.scenes_dir = str(folder)
        config.habitat.dataset.content_scenes = [scene.stem]
        config.habitat.environment.max_episode_steps = MAX_STEPS
        config.habitat.environment.iterator_options.shuffle = False
        config.habitat.environment.iterator_options.max_scene_repeat_steps = -1
        config.habitat.task.measurements.soft_spl = SoftSPLMeasurementConfig()
        config.habitat.task.measurements.collisions = CollisionsMeasurementConfig()
        simulator = config.habitat.simulator
        simulator.scene = str(scene)
        simulator.forward_step_size = agent.forward_step
        simulator.turn_angle = round(agent.turn_angle_deg)
        simulator.habitat_sim_v0.gpu_device_id = gpu
        simulator.habitat_sim_v0.allow_sliding = agent.allow_sliding
        body = simulator.agents.main_agent
        body.radius, body.height = agent.radius, agent.height
        body.max_climb, body.max_slope = agent.max_climb, agent.max_slope_deg
        # Nothing in a trace depends on pictures, and textures take a renderer in software seconds to prepare.
        del body.sim_sensors["rgb_sensor"]
        for camera in body.sim_sensors.values():
            camera.height = camera.width = PICTURE_SIZE
            camera.position = [0.0, sensor_height, 0.0]
    return config


def draw_episodes(config: Any, count: int) -> list[Episode]:
    """Episodes that habitat-lab's own generator draws in the configuration's scene."""
    np.random.seed(config.habitat.seed)  # the generator draws from NumPy's global numbers
    simulator = make_sim(config.habitat.simulator.type, config=config.habitat.simulator)
    try:
        simulator.seed(config.habitat.seed)
        drawn = list(generate_pointnav_episode(simulator, count, is_gen_shortest_path=False))
    finally:
        simulator.close()
    name = Path(config.habitat.simulator.scene).name
    return [_as_ours(number, name, episode) for number, episode in enumerate(drawn)]


def _as_ours(number: int, scene_id: str, episode: Any) -> Episode:
    """An episode of habitat-lab's, without the files' optional parts."""
    x, y, z = map(float, episode.start_position)
    goal_x, goal_y, goal_z = map(float, episode.goals[0].position)
    turn_x, turn_y, turn_z, turn_w = map(float, episode.start_rotation)
    return Episode(
        episode_id=str(number),
        scene_id=scene_id,
        start_position=(x, y, z),
        start_rotation=(turn_x, turn_y, turn_z, turn_w),
        goal_position=(goal_x, goal_y, goal_z),
        goal_radius=None,
        geodesic_distance=float(episode.info["geodesic_distance"]),
    )


def play_episodes(
    config: Any, again: Sequence[dict[str, Any]] | None, on_trace: Callable[[int], object]
) -> list[dict[str, Any]]:
    """What habitat-lab says along every episode of the configuration's scene, in the order of the file.

    Even episodes follow Habitat's shortest path; odd ones mix in :data:`RANDOM_SHARE` random actions.

    Args:
        config: of :func:`task_config`.
        again: traces whose actions are done again, in place of those.
        on_trace: told 1 after each.
    """
    data = habitat.make_dataset(config.habitat.dataset.type, config=config.habitat.dataset)
    if again is not None:
        by_name = {episode.episode_id: episode for episode in data.episodes}
        data.episodes = [by_name[trace["episode_id"]] for trace in again]
    count = len(data.episodes)
    with contextlib.closing(RLTaskEnv(config.habitat, data)) as env:
        env.seed(config.habitat.seed)
        follower = ShortestPathFollower(
            env.habitat_env.sim,
            config.habitat.task.measurements.success.success_distance,
            return_one_hot=False,
        )
        numbers = np.random.default_rng(config.habitat.seed)

        def expert() -> Iterator[int]:
            while True:
                yield int(follower.get_next_action(env.habitat_env.current_episode.goals[0].position))

        def noisy() -> Iterator[int]:
            for best in expert():
                wander = numbers.random() < RANDOM_SHARE
                yield int(numbers.integers(Action.MOVE_FORWARD, len(Action))) if wander else best

        traces = []
        for number in range(count):
            policy = "noisy" if number % 2 else "expert"
            actions: Iterator[int] = noisy() if number % 2 else expert()
            if again is not None:
                policy, actions = again[number].get("policy", policy), iter(again[number]["actions"])
            traces.append(_play(env, actions, Path(config.habitat.simulator.scene).stem, policy))
            on_trace(1)
    return traces


def _play(env: Any, actions: Iterator[int], scene: str, policy: str) -> dict[str, Any]:
    observations = env.reset()
    trace: dict[str, Any] = {
        "episode_id": env.habitat_env.current_episode.episode_id,
        "scene": scene,
        "policy": policy,
        "actions": [],
        "pointgoal": [],
        "distance_to_goal": [],
        "reward": [],
        "position": [],
    }

    def note(observations: dict[str, Any]) -> dict[str, Any]:
        measures: dict[str, Any] = env.habitat_env.get_metrics()
        trace["pointgoal"].append([float(value) for value in observations[GOAL]])
        trace["distance_to_goal"].append(float(measures["distance_to_goal"]))
        trace["position"].append([float(value) for value in env.habitat_env.sim.get_agent_state().position])
        return measures

    measures = note(observations)
    done = False
    while not done and (action := next(actions, None)) is not None:
        observations, reward, done, _ = env.step(action)
        trace["actions"].append(action)
        trace["reward"].append(float(reward))
        measures = note(observations)
    trace["metrics"] = {
        "success": float(measures["success"]),
        "spl": float(measures["spl"]),
        "soft_spl": float(measures["soft_spl"]),
        "distance_to_goal": float(measures["distance_to_goal"]),
        "collisions": int(measures["collisions"]["count"]),
    }
    return trace
