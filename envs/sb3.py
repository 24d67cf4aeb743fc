"""PointNav as a Stable-Baselines3 ``VecEnv``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn

from envs.vector_env import Observations, PointNavVectorEnv


class SB3VecEnv(VecEnv):
    """Adapter of :class:`~envs.vector_env.PointNavVectorEnv` for Stable-Baselines3: numpy in, numpy out.

    Infos of ended episodes hold ``terminal_observation``, ``TimeLimit.truncated``, ``is_success``, and an
    ``episode`` like ``Monitor``'s, ``r``, ``l`` and ``t``, with the task's measures beside them.

    Args:
        vector_env: the batched environment, with same-step autoreset. It stays at hand as
            :attr:`vector_env`, for algorithms that take its tensors directly.
    """

    def __init__(self, vector_env: PointNavVectorEnv) -> None:
        if vector_env.autoreset_mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                f"Stable-Baselines3 needs autoreset_mode SAME_STEP, not {vector_env.autoreset_mode.name}"
            )
        self.vector_env = vector_env
        self._actions = np.zeros(vector_env.num_envs, dtype=np.int64)
        self._started = time.monotonic()
        super().__init__(
            vector_env.num_envs, vector_env.single_observation_space, vector_env.single_action_space
        )

    def reset(self) -> Observations:
        """Starts new episodes, from the seed given to :meth:`seed` if there was one since the last reset."""
        observations, _ = self.vector_env.reset(seed=self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        return _numpy(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """Keeps actions (N,) for :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Takes the step: observations, rewards (N,), dones (N,), and an info for each agent."""
        observations, rewards, terminated, truncated, batch = self.vector_env.step(self._actions)
        terminated, truncated = _numpy(terminated), _numpy(truncated)
        done = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if done.any():
            final = _numpy(batch["final_obs"])
            episode = _numpy(batch["episode"])
            elapsed = round(time.monotonic() - self._started, 6)
            for agent in np.flatnonzero(done):
                measures = {name: value[agent].item() for name, value in episode.items()}
                infos[agent] = {
                    "terminal_observation": {name: value[agent].copy() for name, value in final.items()},
                    "TimeLimit.truncated": bool(truncated[agent]),
                    "episode": measures | {"t": elapsed},
                    "is_success": bool(measures["success"]),
                    "episode_id": batch["episode_id"][agent],
                    "scene_id": batch["scene_id"][agent],
                }
        return _numpy(observations), _numpy(rewards), done, infos

    def close(self) -> None:
        """Closes the batched environment."""
        self.vector_env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """What every agent sees: N times (height, width, 3) uint8."""
        return self.vector_env.render() or [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the batched environment, once for each index."""
        return [getattr(self.vector_env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets an attribute of the batched environment, which all agents share."""
        if indices is not None:
            raise ValueError(
                f"the agents share one environment: {attr_name!r} cannot be set for some of them"
            )
        setattr(self.vector_env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Calls a method of the batched environment once; every index gets the same result."""
        result = getattr(self.vector_env, method_name)(*method_args, **method_kwargs)
        return [result] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """False, but for ``Monitor``, whose ``episode`` info this environment gives itself."""
        return [wrapper_class is Monitor] * len(list(self._get_indices(indices)))


def _numpy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _numpy(item) for name, item in value.items()}
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value
