"""Noise of motion that belongs to a demonstration: the same whoever plays beside it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.noise import ActuationNoise
from envs.vector_env import NO_EPISODE, PointNavVectorEnv


def seed_motion(env: PointNavVectorEnv, seeds: NDArray[np.int64]) -> None:
    """Draws the motion noise of ``env``, if it has any, from the seed of each of its sampler's episodes."""
    if env.task.actuation is not None:
        env.task.actuation = EpisodeActuation(env, seeds)


class EpisodeActuation(ActuationNoise):
    """Motion noise whose numbers an episode's seed and the step decide, on any device."""

    def __init__(self, env: PointNavVectorEnv, seeds: NDArray[np.int64]) -> None:
        """``seeds`` (M,), at least 0, are those of the episodes of ``env``'s sampler."""
        super().__init__(env.noise, torch.Generator(env.simulator.device))
        self._env, self._seeds = env, seeds
        self._drawn = np.full(env.num_envs, NO_EPISODE)
        self._numbers = torch.zeros(env.num_envs, env.config.max_steps, 3, dtype=torch.float64)
        self._numbers = self._numbers.to(env.simulator.device)

    def draw(self, shape: torch.Size) -> Tensor:
        """The numbers of every agent's step: (N, 3) float64 in 0..1."""
        env = self._env
        for agent, episode in enumerate(env.current_episodes()):
            if episode not in (NO_EPISODE, self._drawn[agent]):
                self._drawn[agent] = episode
                drawn = uniform(int(self._seeds[episode]), env.config.max_steps * 3)
                self._numbers[agent] = torch.from_numpy(drawn.reshape(-1, 3))
        step = env.task.measured.steps.clamp(max=env.config.max_steps - 1)
        return self._numbers[torch.arange(len(step), device=step.device), step]


def uniform(seed: int, count: int) -> NDArray[np.float64]:
    """Numbers in 0..1 that depend on the seed alone, whatever the version of NumPy: (count,)."""
    # Only the raw output of bit generators is promised to stay the same.
    raw = np.random.Philox(key=seed).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
