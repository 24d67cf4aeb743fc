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

    Several batched environments count as one with the agents of all, in order.

    Infos of ended episodes hold ``terminal_observation``, ``TimeLimit.truncated``, ``is_success``, and an
    ``episode`` like ``Monitor``'s, ``r``, ``l`` and ``t``, with the task's measures beside them. An episode
    that begins again because its simulator's process died has only the first two, and ``interrupted``.

    Args:
        vector_envs: the batched environments, with same-step autoreset and the same observations and
            actions. They stay at hand as :attr:`vector_envs`, for algorithms that take their tensors directly
            or step one while the policy acts in another.

    Raises:
        ValueError: there are none, or one does not fit.
    """

    def __init__(self, *vector_envs: PointNavVectorEnv) -> None:
        if not vector_envs:
            raise ValueError("expected at least one batched environment, got none")
        first = vector_envs[0]
        for vector_env in vector_envs:
            if vector_env.autoreset_mode != AutoresetMode.SAME_STEP:
                raise ValueError(
                    f"Stable-Baselines3 needs autoreset_mode SAME_STEP, not {vector_env.autoreset_mode.name}"
                )
            if vector_env.single_observation_space != first.single_observation_space:
                raise ValueError(
                    f"observations {vector_env.single_observation_space} differ from the first environment's "
                    f"{first.single_observation_space}"
                )
            if vector_env.single_action_space != first.single_action_space:
                raise ValueError(
                    f"actions {vector_env.single_action_space} differ from the first environment's "
                    f"{first.single_action_space}"
                )
        self.vector_envs = vector_envs
        num_envs = sum(vector_env.num_envs for vector_env in vector_envs)
        # Where each environment's agents end.
        self._ends = np.cumsum([vector_env.num_envs for vector_env in vector_envs])
        self._actions = np.zeros(num_envs, dtype=np.int64)
        self._started = time.monotonic()
        super().__init__(num_envs, first.single_observation_space, first.single_action_space)

    def reset(self) -> Observations:
        """Starts new episodes, from the seed given to :meth:`seed` if there was one since the last reset."""
        parts = [_numpy(vector_env.reset(seed=self._seeds[0])[0]) for vector_env in self.vector_envs]
        self._reset_seeds()
        self._reset_options()
        return _together(parts)

    def step_async(self, actions: np.ndarray) -> None:
        """Keeps actions (N,) for :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Takes the step: observations, rewards (N,), dones (N,), and an info for each agent."""
        parts = np.split(self._actions, self._ends[:-1])
        answers = [self._step(*part) for part in zip(self.vector_envs, parts, strict=True)]
        observations, rewards, dones, infos = zip(*answers, strict=True)
        return (
            _together(observations),
            np.concatenate(rewards),
            np.concatenate(dones),
            [info for part in infos for info in part],
        )

    def _step(self, vector_env: PointNavVectorEnv, actions: np.ndarray) -> VecEnvStepReturn:
        observations, rewards, terminated, truncated, batch = vector_env.step(actions)
        terminated, truncated = _numpy(terminated), _numpy(truncated)
        done = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(vector_env.num_envs)]
        if done.any():
            final = _numpy(batch["final_obs"])
            interrupted = _numpy(batch.get("interrupted", np.zeros_like(done)))
            elapsed = round(time.monotonic() - self._started, 6)
            for agent in np.flatnonzero(done):
                infos[agent] = {
                    "terminal_observation": {name: value[agent].copy() for name, value in final.items()},
                    "TimeLimit.truncated": bool(truncated[agent]),
                }
                if interrupted[agent]:
                    infos[agent]["interrupted"] = True
                    continue
                measures = {name: value[agent].item() for name, value in batch["episode"].items()}
                infos[agent] |= {
                    "episode": measures | {"t": elapsed},
                    "is_success": bool(measures["success"]),
                    "episode_id": batch["episode_id"][agent],
                    "scene_id": batch["scene_id"][agent],
                }
        return _numpy(observations), _numpy(rewards), done, infos

    def close(self) -> None:
        """Closes the batched environments."""
        for vector_env in self.vector_envs:
            vector_env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """What every agent sees: N times (height, width, 3) uint8."""
        return [
            image
            for vector_env in self.vector_envs
            for image in vector_env.render() or [None] * vector_env.num_envs
        ]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the batched environment that each index lives in."""
        return [getattr(self._home(index), attr_name) for index in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets an attribute of the batched environments, which agents share."""
        if indices is not None:
            raise ValueError(f"agents share an environment: {attr_name!r} cannot be set for some of them")
        for vector_env in self.vector_envs:
            setattr(vector_env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Calls a method of the batched environments once each; every index gets its environment's result."""
        homes = [self._home(index) for index in self._get_indices(indices)]
        results = {
            id(home): getattr(home, method_name)(*method_args, **method_kwargs)
            for home in dict.fromkeys(homes)
        }
        return [results[id(home)] for home in homes]

    def _home(self, index: int) -> PointNavVectorEnv:
        """The batched environment that an agent lives in."""
        return self.vector_envs[int(np.searchsorted(self._ends, index % self.num_envs, side="right"))]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """False, but for ``Monitor``, whose ``episode`` info this environment gives itself."""
        return [wrapper_class is Monitor] * len(list(self._get_indices(indices)))


def _together(parts: Sequence[Any]) -> Any:
    """Observations of several environments as those of one."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _numpy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _numpy(item) for name, item in value.items()}
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value
