"""A training on the toy world that a test runs in processes of its own, to kill them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from learning_world import LineVecEnv, LineWorld, RecurrentPolicy
from rich.console import Console

from navagent.build import Split
from navagent.config import CheckpointConfig, EvaluationConfig, TrainConfig, to_yaml
from navagent.evaluation.results import EpisodeResult
from navagent.learning.imitation import ImitationConfig
from navagent.learning.ppo import PPO
from navagent.preemption import StopSignals
from navagent.runs import Run
from navagent.train import Trainer

NUM_ENVS, NUM_STEPS = 4, 8
UPDATE = NUM_ENVS * NUM_STEPS
"""Frames of one update."""
EVALUATE_EVERY = 7 * UPDATE


class HeavyPolicy(RecurrentPolicy):
    """With a megabyte that does nothing but make checkpoints take their time."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("ballast", torch.randn(1 << 18))


class ToyTrainer(Trainer):
    """Saves after every update, may stop after so many frames, and measures the policy by its parameters."""

    stop_after = 10**9

    def on_update_end(self):
        return super().on_update_end() and self.model.num_timesteps < self.stop_after

    def _measure(self):
        weights = torch.cat([p.detach().flatten() for p in self.model.policy.parameters()])
        spl = float(weights.abs().mean() * 1e3 % 1)
        point, track = (0.0, 0.0, 0.0), np.zeros((1, 3), np.float32)
        return [
            EpisodeResult(
                agent="run",
                scene_id="toy",
                episode_id=str(number),
                success=True,
                spl=spl,
                soft_spl=spl,
                distance_to_goal=0.0,
                geodesic_distance=1.0,
                path_length=1.0,
                steps=1,
                collisions=0,
                reward=0.0,
                start=point,
                goal=point,
                positions=track,
                yaws=track[:, 0],
            )
            for number in range(2)
        ]


def toy_config():
    config = TrainConfig(
        evaluation=EvaluationConfig(every_frames=EVALUATE_EVERY),
        checkpoint=CheckpointConfig(every_minutes=1e-9, keep=2),
    )
    config.algorithm.total_frames = 10**9
    return config


def toy_trainer(folder, stop=None, config=None):
    """The trainer of the run in ``folder``: a new one, or one that goes on."""
    torch.set_num_threads(1)
    config = config or toy_config()
    folder = Path(folder)
    run = Run(folder) if (folder / "config.yaml").exists() else Run.create(folder, to_yaml(config))
    model = PPO(
        HeavyPolicy,
        LineVecEnv(LineWorld(num_envs=NUM_ENVS)),
        n_steps=NUM_STEPS,
        n_minibatches=2,
        n_epochs=1,
        seed=0,
        device="cpu",
        imitation=ImitationConfig(frames=20 * UPDATE, anchor_coef=0.5, anchor_frames=10**6),
    )
    return ToyTrainer(config, run, model, Split("val", (), {}), Console(file=io.StringIO()), stop)


def live(folder, stop_after=10**9):
    """One life: begins the run or goes on with it, until it is killed or has had ``stop_after`` frames."""
    with StopSignals(lambda text: None) as stop:
        trainer = toy_trainer(folder, stop)
        trainer.stop_after = stop_after
        with trainer.run.claimed():
            if trainer.run.checkpoints() or trainer.run.read_metrics():
                trainer.load(trainer.run.load_checkpoint("latest"))
            trainer.train()


def numbers(run):
    """Every logged number that does not measure time."""
    return [
        {key: value for key, value in record.items() if not key.startswith("time/")}
        for record in run.read_metrics()
    ]
