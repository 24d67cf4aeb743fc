import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from envs.sampler import EpisodeSampler
from envs.task import PointNavConfig
from envs.vector_env import PointNavVectorEnv
from navagent.config import TrainConfig, to_yaml
from navagent.evaluation.results import EpisodeResult
from navagent.runs import Run

# The empty rooms that the environments' own tests use.
_spec = importlib.util.spec_from_file_location(
    "flat_world", Path(__file__).parents[2] / "envs" / "conftest.py"
)
flat_world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(flat_world)


@pytest.fixture
def flat_env():
    """Makes environments of empty 10 m rooms that hand out each episode once."""

    def make(
        episodes, num_envs=3, config=None, autoreset_mode=AutoresetMode.NEXT_STEP, mode="once", **simulator
    ):
        scenes = {episode.scene_id: Path(episode.scene_id) for episode in episodes}
        sampler = EpisodeSampler(episodes, num_envs, scenes, mode=mode)
        world = flat_world.FlatSimulator(num_envs, scenes=list(scenes), **simulator)
        config = config or PointNavConfig(max_steps=40)
        observations = ["pointgoal_with_gps_compass", "previous_action"]
        return PointNavVectorEnv(world, config, sampler, observations, autoreset_mode=autoreset_mode)

    return make


@pytest.fixture
def make_episode():
    """Makes episodes in empty rooms; by default the goal lies 2 m straight ahead."""
    return flat_world.make_episode


@pytest.fixture
def make_result():
    """Makes results of recognisable values."""

    def make(number=0, agent="run", success=True, scene="homes/home_001.glb", spl=0.5, **changes):
        values = {
            "agent": agent,
            "scene_id": scene,
            "episode_id": str(number),
            "success": success,
            "spl": spl,
            "soft_spl": spl,
            "distance_to_goal": 0.1,
            "geodesic_distance": 5.0,
            "path_length": 6.0,
            "steps": 40,
            "collisions": 2,
            "reward": 3.0,
            "start": (0.0, 0.0, 0.0),
            "goal": (1.0, 0.0, 2.0),
        }
        return EpisodeResult(**{**values, **changes})

    return make


@pytest.fixture
def run(tmp_path):
    """A run's folder after ten updates and two evaluations."""
    run = Run.create(tmp_path / "run <b>&", to_yaml(TrainConfig(seed=7)))
    rng = np.random.default_rng(0)
    for update in range(1, 11):
        record = {
            "frames": update * 1000,
            "rollout/phase": "imitation" if update < 3 else "ppo",
            "rollout/success": update / 20,
            "rollout/spl": update / 30,
            "train/policy_loss": float(rng.normal()),
            "time/frames_per_second": 500.0,
            "time/trained_seconds": update * 2.0,
            "train/entropy": math.nan,
        }
        if update % 5 == 0:
            record |= {
                "eval/success": 0.4,
                "eval/success_low": 0.3,
                "eval/success_high": 0.5,
                "eval/spl": 0.3,
            }
        run.append_metrics(record)
    return run
