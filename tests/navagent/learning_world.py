"""A tiny world and tiny policies on which learning code can be tested in seconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import MultiInputActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn


class LineWorld:
    """Agents on a line must walk to a goal and stop there: a torch vector environment with SAME_STEP resets.

    Actions as in PointNav: 0 stops, 1 steps right, 2 steps left, 3 does nothing. Observations: ``offset`` (N,
    2) goal minus position and a recognisable number (environment plus step / 1000), ``image`` (N, 4, 4, 3)
    uint8.
    """

    output = "torch"

    def __init__(self, num_envs: int = 4, max_steps: int = 12, span: int = 4, seed: int = 0) -> None:
        self.num_envs = num_envs
        self.max_steps, self.span = max_steps, span
        self.single_observation_space = spaces.Dict(
            {
                "offset": spaces.Box(-np.inf, np.inf, (2,), np.float32),
                # Not up to 255: Stable-Baselines3 would want a large image for its own encoder.
                "image": spaces.Box(0, 254, (4, 4, 3), np.uint8),
            }
        )
        self.single_action_space = spaces.Discrete(4)
        self.max_geodesic = float(span)
        self.generator = torch.Generator().manual_seed(seed)
        self.clock = 0
        self._new(torch.ones(num_envs, dtype=torch.bool), first=True)

    def _new(self, which: Tensor, first: bool = False) -> None:
        if first:
            n = self.num_envs
            self.offset, self.steps, self.total = torch.zeros(n), torch.zeros(n), torch.zeros(n)
        farthest = max(1, min(self.span, int(self.max_geodesic)))
        distance = torch.randint(1, farthest + 1, (self.num_envs,), generator=self.generator)
        sign = torch.randint(0, 2, (self.num_envs,), generator=self.generator) * 2 - 1
        self.offset = torch.where(which, (distance * sign).float(), self.offset)
        self.steps = torch.where(which, 0.0, self.steps)
        self.total = torch.where(which, 0.0, self.total)

    def set_max_geodesic(self, metres: float) -> None:
        self.max_geodesic = metres

    def observations(self) -> dict[str, Tensor]:
        stamp = torch.arange(self.num_envs) + self.clock / 1000
        image = torch.full((self.num_envs, 4, 4, 3), self.clock % 255, dtype=torch.uint8)
        return {"offset": torch.stack((self.offset, stamp), -1), "image": image}

    def reset(self, seed: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if seed is not None:
            self.generator.manual_seed(seed)
        self._new(torch.ones(self.num_envs, dtype=torch.bool), first=True)
        return self.observations(), {}

    def expert_actions(self) -> Tensor:
        return torch.where(self.offset == 0, 0, torch.where(self.offset > 0, 1, 2))

    def step(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Any]]:
        self.clock += 1
        before = self.offset.abs()
        self.offset = self.offset - (actions == 1).float() + (actions == 2).float()
        stopped = actions == 0
        success = stopped & (self.offset == 0)
        rewards = before - self.offset.abs() - 0.01 + 2.5 * success
        self.steps, self.total = self.steps + 1, self.total + rewards
        truncated = (self.steps >= self.max_steps) & ~stopped
        done = stopped | truncated
        infos: dict[str, Any] = {}
        if done.any():
            infos = {
                "episode": {
                    "success": success.float(),
                    "spl": success.float(),
                    "steps": self.steps.clone(),
                    "reward_sum": self.total.clone(),
                    "r": self.total.clone(),
                    "l": self.steps.clone(),
                },
                "_episode": done,
                "final_obs": self.observations(),
            }
            self._new(done)
        return self.observations(), rewards, stopped, truncated, infos

    def state_dict(self) -> dict[str, Any]:
        return {
            "offset": self.offset,
            "steps": self.steps,
            "total": self.total,
            "clock": self.clock,
            "max_geodesic": self.max_geodesic,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.offset, self.steps, self.total = state["offset"], state["steps"], state["total"]
        self.clock, self.max_geodesic = state["clock"], state["max_geodesic"]
        self.generator.set_state(state["generator"])


class SeeingWorld(LineWorld):
    """The line world for policies with eyes: where the goal is shows in an image of ``size`` rows, too."""

    def __init__(self, size: int = 32, **settings: Any) -> None:
        self.size = size
        super().__init__(**settings)
        self.single_observation_space = spaces.Dict(
            {
                "pointgoal": spaces.Box(-np.inf, np.inf, (2,), np.float32),
                "rgb": spaces.Box(0, 255, (size, size, 3), np.uint8),
            }
        )

    def observations(self) -> dict[str, Tensor]:
        places = torch.arange(self.size)
        image = places.view(1, -1, 1, 1) * (self.offset.view(-1, 1, 1, 1) + 4) + places.view(1, 1, -1, 1)
        return {
            "pointgoal": torch.stack((self.offset.abs(), self.offset), -1),
            "rgb": image.remainder(256).to(torch.uint8).repeat(1, 1, 1, 3),
        }


class LineVecEnv(VecEnv):
    """The world as Stable-Baselines3 sees it; ``vector_envs`` gives the tensors."""

    def __init__(self, world: LineWorld, expose_torch: bool = True) -> None:
        self.world = world
        if expose_torch:
            self.vector_envs = (world,)
        super().__init__(world.num_envs, world.single_observation_space, world.single_action_space)

    def reset(self) -> dict[str, np.ndarray]:
        observations, _ = self.world.reset(self._seeds[0])
        self._reset_seeds()
        return {key: value.numpy() for key, value in observations.items()}

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = torch.as_tensor(actions)

    def step_wait(self) -> Any:
        observations, rewards, terminated, truncated, infos = self.world.step(self.actions)
        dones = terminated | truncated
        rows: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for row in dones.nonzero().flatten().tolist():
            rows[row] = {
                "terminal_observation": {k: v[row].numpy() for k, v in infos["final_obs"].items()},
                "TimeLimit.truncated": bool(truncated[row]),
                "episode": {
                    "r": float(infos["episode"]["reward_sum"][row]),
                    "l": int(infos["episode"]["steps"][row]),
                    "t": 0.0,
                },
            }
        observations = {key: value.numpy() for key, value in observations.items()}
        return observations, rewards.numpy(), dones.numpy(), rows

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "render_mode":
            return [None] * self.num_envs
        return [getattr(self.world, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self.world, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return list(getattr(self.world, method_name)(*args, **kwargs))

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


class MemorylessPolicy(MultiInputActorCriticPolicy):
    """A plain Stable-Baselines3 policy with the methods that sequences need."""

    def penalty(self):
        return torch.zeros(())

    def metrics(self):
        return {}

    def set_progress(self, samples, total):
        self.progress = (samples, total)

    def initial_memory(self, n: int) -> Tensor:
        return torch.zeros(n, 0)

    def act(self, obs, memory, episode_starts, deterministic=False, frozen=None):
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        logits = distribution.distribution.logits
        return actions, self.predict_values(obs).flatten(), distribution.log_prob(actions), memory, {}, logits

    def evaluate_sequences(self, obs, actions, memory, episode_starts, frozen=None):
        steps, envs = actions.shape
        flat = {key: value.flatten(0, 1) for key, value in obs.items()}
        values, log_probs, entropy = self.evaluate_actions(flat, actions.flatten())
        logits = self.get_distribution(flat).distribution.logits
        shape = (steps, envs)
        return values.view(shape), log_probs.view(shape), entropy.view(shape), logits.view(*shape, -1)


class RecurrentPolicy(MultiInputActorCriticPolicy):
    """Offset and a frozen feature of the image into a GRU cell."""

    def penalty(self):
        return torch.zeros(())

    def metrics(self):
        return {}

    def set_progress(self, samples, total):
        self.progress = (samples, total)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.base = nn.Linear(48, 5).requires_grad_(False)
        self.inputs = nn.Linear(1 + 5, 24)
        self.cell = nn.GRUCell(24, 24)
        self.actor, self.critic = nn.Linear(24, 4), nn.Linear(24, 1)
        self.base_calls = 0
        trained = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=1e-3, eps=1e-5)

    def initial_memory(self, n: int) -> Tensor:
        return torch.zeros(n, 24)

    def _frozen(self, obs: dict[str, Tensor]) -> Tensor:
        self.base_calls += 1
        with torch.no_grad():
            return self.base(obs["image"].flatten(-3).float() / 255)

    def _step(self, obs: dict[str, Tensor], features: Tensor, memory: Tensor, starts: Tensor) -> Tensor:
        memory = memory * (~starts).float()[:, None]
        inputs = torch.cat((obs["offset"][:, :1], features), -1)
        return self.cell(torch.tanh(self.inputs(inputs)), memory)

    def act(self, obs, memory, episode_starts, deterministic=False, frozen=None):
        features = frozen["image"] if frozen else self._frozen(obs)
        memory = self._step(obs, features, memory, episode_starts)
        logits = torch.log_softmax(self.actor(memory), -1)
        distribution = torch.distributions.Categorical(logits=logits)
        actions = logits.argmax(-1) if deterministic else distribution.sample()
        value = self.critic(memory)[:, 0]
        return actions, value, distribution.log_prob(actions), memory, {"image": features}, logits

    def evaluate_sequences(self, obs, actions, memory, episode_starts, frozen=None):
        features = frozen["image"] if frozen else self._frozen(obs)
        outputs = []
        for step in range(len(episode_starts)):
            row = {key: value[step] for key, value in obs.items()}
            memory = self._step(row, features[step], memory, episode_starts[step])
            outputs.append(memory)
        stacked = torch.stack(outputs)
        logits = torch.log_softmax(self.actor(stacked), -1)
        distribution = torch.distributions.Categorical(logits=logits)
        log_probs = None if actions is None else distribution.log_prob(actions)
        return self.critic(stacked)[..., 0], log_probs, distribution.entropy(), logits
