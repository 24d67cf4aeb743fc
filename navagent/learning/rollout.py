"""What a policy lived through, kept as sequences of tensors on one device.

Stable-Baselines3 stores rollouts as numpy arrays and shuffles single transitions. A recurrent policy must be
updated on whole sequences, and a frozen encoder's features are worth keeping: so here a rollout is a block of
``T`` steps of ``N`` environments, and a minibatch is the whole block of some of the environments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from envs.expert import Advice


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    episode_starts: Tensor,
    last_values: Tensor,
    last_dones: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016), (T, N).

    Args:
        rewards: (T, N), with the value of what followed already added where an episode was truncated.
        values: (T, N), the critic's estimate before each step.
        episode_starts: (T, N) bool, whether each step is the first of its episode.
        last_values: (N,), the critic's estimate after the last step.
        last_dones: (N,) bool, whether the last step ended its episode.
        gamma: Discount a step.
        gae_lambda: 0 trusts the critic after one step, 1 sums the rewards.
    """
    going_on = torch.cat((~episode_starts[1:], ~last_dones[None])).to(values.dtype)
    next_values = torch.cat((values[1:], last_values[None]))
    errors = rewards + gamma * next_values * going_on - values
    decay = gamma * gae_lambda * going_on
    advantages = torch.empty_like(values)
    running = torch.zeros_like(last_values)
    for step in range(len(values) - 1, -1, -1):
        running = errors[step] + decay[step] * running
        advantages[step] = running
    return advantages


@dataclass(frozen=True)
class SequenceBatch:
    """``T`` steps of ``B`` environments: one minibatch of an update."""

    observations: dict[str, Tensor]
    """As the environment gave them, by key: (T, B, ...)."""
    actions: Tensor
    """What was done: (T, B) int64."""
    values: Tensor
    """The critic's estimates while collecting: (T, B)."""
    log_probs: Tensor
    """Log-probabilities of ``actions`` while collecting: (T, B)."""
    advantages: Tensor
    """(T, B), not normalised."""
    returns: Tensor
    """What the critic should have said: (T, B)."""
    memory: Tensor
    """The policy's memory before the first step: (B, ...)."""
    episode_starts: Tensor
    """Whether each step is the first of its episode: (T, B) bool."""
    frozen: dict[str, Tensor] | None
    """Features of the frozen encoder, by name: (T, B, ...) float32; None when there are none to store."""
    expert_actions: Tensor | None
    """What the expert would have done: (T, B) int64; None when it was not asked."""
    expert_turns: Tensor | None
    """How many turns it would have made before its next move, see :class:`envs.expert.Advice`: (T, B)
    int16; None when nobody wants to know."""
    reference_logits: Tensor | None
    """Action logits of the policy to stay close to: (T, B, A); None when there is none."""
    samples: int
    """How many steps count, T times B; 0 for one that only stands in, where another process holds all."""


_OPTIONAL = ("expert_actions", "expert_turns", "reference_logits")
"""Fields that a batch may lack."""


class SequenceBuffer:
    """A rollout of ``num_steps`` steps of ``num_envs`` environments.

    Storage is allocated once, at the first step, with the shapes and types that the environment and the
    policy really use (an image stays uint8), and is reused by every later rollout.
    """

    def __init__(
        self,
        num_steps: int,
        num_envs: int,
        device: torch.device | str = "cpu",
        feature_dtype: torch.dtype = torch.float32,
        first_env: int = 0,
        total_envs: int | None = None,
    ) -> None:
        """``feature_dtype`` is how frozen features are stored; half precision halves their memory.

        Where several processes hold a rollout together, this one's environments are ``first_env`` and the
        following of ``total_envs``.
        """
        self.num_steps = num_steps
        self.num_envs = num_envs
        self.first_env = first_env
        self.total_envs = num_envs if total_envs is None else total_envs
        self.device = torch.device(device)
        self.feature_dtype = feature_dtype
        self.length = 0
        """Steps stored so far."""
        self.memory: Tensor | None = None
        self.advantages: Tensor | None = None
        self.returns: Tensor | None = None
        self._blocks: dict[str, Tensor] = {}
        self._optional: dict[str, bool] = dict.fromkeys(_OPTIONAL, False)

    @property
    def full(self) -> bool:
        """Whether every step of the rollout is there."""
        return self.length == self.num_steps

    @property
    def has_expert_actions(self) -> bool:
        """Whether this rollout carries the expert's actions."""
        return self._optional["expert_actions"]

    @property
    def num_bytes(self) -> int:
        """Size of the storage [bytes]."""
        return sum(block.numel() * block.element_size() for block in self._blocks.values())

    def start(self, memory: Tensor) -> None:
        """Empties the buffer for a rollout that begins with the policy's ``memory`` (N, ...)."""
        # A clone made outside inference mode may take part in autograd; what the policy returned may not.
        self.memory = memory.clone()
        self.length = 0
        self.advantages = self.returns = None
        self._optional = dict.fromkeys(self._optional, False)
        self._frozen: set[str] = set()

    def _store(self, name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
        block = self._blocks.get(name)
        if block is None:
            block = torch.empty(
                (self.num_steps, *value.shape), dtype=dtype or value.dtype, device=self.device
            )
            self._blocks[name] = block
        block[self.length].copy_(value)

    def add(
        self,
        observations: dict[str, Tensor],
        actions: Tensor,
        rewards: Tensor,
        episode_starts: Tensor,
        values: Tensor,
        log_probs: Tensor,
        frozen: dict[str, Tensor] | None = None,
        expert_actions: Tensor | None = None,
        expert_turns: Tensor | None = None,
        reference_logits: Tensor | None = None,
    ) -> None:
        """Appends one step of every environment; each argument's first dimension is N."""
        if self.full:
            raise RuntimeError(f"the rollout already holds all of its {self.num_steps} steps; call start()")
        for key, value in observations.items():
            self._store("obs/" + key, value)
        for key, value in (frozen or {}).items():
            self._store("frozen/" + key, value, self.feature_dtype)
            self._frozen.add("frozen/" + key)
        self._store("actions", actions, torch.int64)
        self._store("rewards", rewards, torch.float32)
        self._store("episode_starts", episode_starts, torch.bool)
        self._store("values", values, torch.float32)
        self._store("log_probs", log_probs, torch.float32)
        given = (expert_actions, expert_turns, reference_logits)
        for name, optional in zip(_OPTIONAL, given, strict=True):
            if optional is not None:
                self._store(name, optional)
                self._optional[name] = True
        self.length += 1

    def add_to_last_rewards(self, envs: Tensor, amounts: Tensor) -> None:
        """Adds (M,) ``amounts`` to the newest rewards of environments (M,): the value after a truncation."""
        self._blocks["rewards"][self.length - 1].index_add_(0, envs, amounts)

    def __getitem__(self, name: str) -> Tensor:
        """The block (T, N, ...) stored under ``name``: rewards, values, actions, obs/KEY, frozen/KEY, ...

        T counts the steps stored so far.
        """
        return self._blocks[name][: self.length]

    def finish(self, last_values: Tensor, last_dones: Tensor, gamma: float, gae_lambda: float) -> None:
        """Computes advantages and returns; ``last_values`` and ``last_dones`` (N,) follow the last step.

        A rollout may end before it is full.
        """
        if self.length == 0:
            raise RuntimeError(f"the rollout holds 0 of its {self.num_steps} steps; call add() first")
        values = self["values"]
        self.advantages = generalized_advantages(
            self["rewards"],
            values,
            self["episode_starts"],
            last_values,
            last_dones,
            gamma,
            gae_lambda,
        )
        self.returns = self.advantages + values

    def minibatches(self, count: int, generator: torch.Generator | None = None) -> Iterator[SequenceBatch]:
        """Splits the environments at random into ``count`` groups of (nearly) equal size, one pass over all.

        With one minibatch nothing is copied or shuffled. ``generator`` lives on the CPU. Processes that hold
        a rollout together split all of its environments, in the same way if their generators are in the same
        state, and each gets those of a group that it holds; where it holds none, another environment stands
        in, of which nothing counts.
        """
        if not 1 <= count <= self.total_envs:
            raise ValueError(
                f"num_minibatches {count} must lie between 1 and the number of environments, "
                f"{self.total_envs}: a minibatch is made of whole sequences"
            )
        if self.advantages is None:
            raise RuntimeError("call finish() before minibatches()")
        if count == 1:
            yield self._batch(None)
            return
        order = torch.randperm(self.total_envs, generator=generator) - self.first_env
        for envs in order.tensor_split(count):
            here = envs[(envs >= 0) & (envs < self.num_envs)]
            if len(here):
                yield self._batch(here.to(self.device))
            else:
                stand_in = torch.zeros(1, dtype=torch.int64, device=self.device)
                yield replace(self._batch(stand_in), samples=0)

    def _batch(self, envs: Tensor | None) -> SequenceBatch:
        def pick(block: Tensor) -> Tensor:
            return block if envs is None else block.index_select(1, envs)

        def pick_optional(name: str) -> Tensor | None:
            return pick(blocks[name]) if self._optional[name] else None

        blocks = {name: block[: self.length] for name, block in self._blocks.items()}
        assert self.memory is not None and self.advantages is not None and self.returns is not None
        frozen = {
            name.removeprefix("frozen/"): pick(block).float()
            for name, block in blocks.items()
            if name in self._frozen
        }
        return SequenceBatch(
            observations={
                name.removeprefix("obs/"): pick(block)
                for name, block in blocks.items()
                if name.startswith("obs/")
            },
            actions=pick(blocks["actions"]),
            values=pick(blocks["values"]),
            log_probs=pick(blocks["log_probs"]),
            advantages=pick(self.advantages),
            returns=pick(self.returns),
            memory=self.memory if envs is None else self.memory.index_select(0, envs),
            episode_starts=pick(blocks["episode_starts"]),
            frozen=frozen or None,
            expert_actions=pick_optional("expert_actions"),
            expert_turns=pick_optional("expert_turns"),
            reference_logits=pick_optional("reference_logits"),
            samples=self.length * (self.num_envs if envs is None else len(envs)),
        )


@dataclass(frozen=True)
class StepResult:
    """What one step of every environment answered."""

    observations: dict[str, Tensor]
    """By key: (N, ...); where an episode ended, the first of the next one."""
    rewards: Tensor
    """(N,) float32."""
    dones: Tensor
    """Whether an episode ended: (N,) bool."""
    truncated: Tensor
    """Whether it ended for lack of time, not by its own rules: (N,) bool."""
    final_observations: dict[str, Tensor] | None
    """The last observations of truncated episodes, by key: (M, ...) for the M true rows of ``truncated``, in
    order; None when M is 0."""
    episodes: list[dict[str, float]]
    """Measures of the episodes that ended, by name; ``r`` is the sum of rewards and ``l`` the steps."""


class TensorEnv(Protocol):
    """What the collector asks of an environment: tensors in, tensors out."""

    num_envs: int

    def step(self, actions: Tensor) -> StepResult:
        """Does (N,) int64 ``actions`` and starts the next episode where one ended."""

    def expert_advice(self) -> Advice:
        """What an expert says now."""

    def frozen_features(self) -> dict[str, Tensor] | None:
        """What the policy's frozen encoder makes of the present observations, by name: (N, ...) float32.

        None where the environment does not know it.
        """

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state."""


class TorchVectorEnv:
    """A :class:`gymnasium.vector.VectorEnv` of tensors that resets within the step, as a TensorEnv.

    Episodes' measures come from ``infos["episode"]`` (tensors (N,) by name) where ``infos["_episode"]`` is
    true.
    """

    def __init__(self, env: Any, device: torch.device) -> None:
        """``env`` is the vector environment; ``device`` is where the policy lives."""
        self.env = env
        self.num_envs: int = env.num_envs
        self.device = device

    def step(self, actions: Tensor) -> StepResult:
        """See :class:`TensorEnv`."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        device = self.device
        terminated, truncated = terminated.to(device), truncated.to(device)
        dones = terminated | truncated
        truncated = truncated & ~terminated
        final: dict[str, Tensor] | None = None
        episodes: list[dict[str, float]] = []
        if bool(dones.any()):
            if bool(truncated.any()):
                final = {key: value.to(device)[truncated] for key, value in infos["final_obs"].items()}
            if "episode" in infos:
                ended = infos["_episode"].cpu()
                measures = {
                    name: value.cpu()[ended].tolist()
                    for name, value in infos["episode"].items()
                    if isinstance(value, Tensor)
                }
                episodes = [
                    dict(zip(measures, row, strict=True)) for row in zip(*measures.values(), strict=True)
                ]
        return StepResult(
            observations={key: value.to(device) for key, value in observations.items()},
            rewards=rewards.to(device, torch.float32),
            dones=dones,
            truncated=truncated,
            final_observations=final,
            episodes=episodes,
        )

    def expert_advice(self) -> Advice:
        """That of the environment, or the actions alone from one that tells no more."""
        return _advice_of(self.env, self.device)

    def frozen_features(self) -> dict[str, Tensor] | None:
        """Those that the environment has stored, as one that plays demonstrations may."""
        stored = getattr(self.env, "stored_features", None)
        return None if stored is None else {name: value.to(self.device) for name, value in stored.items()}

    def state_dict(self) -> dict[str, Any]:
        """See :class:`TensorEnv`."""
        return self.env.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`TensorEnv`."""
        self.env.load_state_dict(state)


class NumpyVectorEnv:
    """Any Stable-Baselines3 VecEnv with a Dict observation space, as a TensorEnv."""

    def __init__(self, env: VecEnv, device: torch.device) -> None:
        """``device`` is where the policy lives."""
        self.env = env
        self.num_envs = env.num_envs
        self.device = device

    def tensors(self, observations: Any) -> dict[str, Tensor]:
        """Numpy observations by key as tensors on the device; copied, as environments reuse their arrays."""
        return {key: torch.tensor(value, device=self.device) for key, value in observations.items()}

    def step(self, actions: Tensor) -> StepResult:
        """See :class:`TensorEnv`."""
        observations, rewards, dones, infos = self.env.step(actions.cpu().numpy())
        truncated = np.array(
            [bool(done and info.get("TimeLimit.truncated")) for done, info in zip(dones, infos, strict=True)]
        )
        final = None
        if truncated.any():
            rows = [infos[row]["terminal_observation"] for row in np.flatnonzero(truncated)]
            final = self.tensors({key: np.stack([row[key] for row in rows]) for key in rows[0]})
        return StepResult(
            observations=self.tensors(observations),
            rewards=torch.tensor(rewards, dtype=torch.float32, device=self.device),
            dones=torch.tensor(dones, dtype=torch.bool, device=self.device),
            truncated=torch.tensor(truncated, device=self.device),
            final_observations=final,
            episodes=[
                dict(info["episode"])
                for done, info in zip(dones, infos, strict=True)
                if done and "episode" in info
            ],
        )

    def expert_advice(self) -> Advice:
        """That of its tensor environments, or what ``expert_actions`` of each environment answers."""
        batched = getattr(self.env, "vector_envs", None)
        if batched is not None:
            return join_advice([_advice_of(env, self.device) for env in batched])
        answers = self.env.env_method("expert_actions")
        return Advice(torch.as_tensor(np.asarray(answers), dtype=torch.int64, device=self.device), None)

    def frozen_features(self) -> dict[str, Tensor] | None:
        """None, always."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Refuses: a plain VecEnv cannot say where it is."""
        raise TypeError(
            f"{type(self.env).__name__} cannot save its state, so training on it cannot be resumed exactly: "
            "use envs.sb3.SB3VecEnv over an environment with torch output"
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuses, like :meth:`state_dict`."""
        self.state_dict()


def _advice_of(env: Any, device: torch.device) -> Advice:
    ask = getattr(env, "expert_advice", None)
    advice = Advice(env.expert_actions(), None) if ask is None else ask()
    turns = None if advice.turns is None else advice.turns.to(device)
    return Advice(advice.actions.to(device), turns)


def join_advice(parts: Sequence[Advice]) -> Advice:
    """What is said of several groups of agents as one of all."""
    turns = [part.turns for part in parts if part.turns is not None]
    told = len(turns) == len(parts)
    return Advice(torch.cat([part.actions for part in parts]), torch.cat(turns) if told else None)


def tensor_envs(env: VecEnv, device: torch.device) -> list[TensorEnv]:
    """The fastest ways to step ``env``: by the tensors of its ``vector_envs``, else through numpy."""
    if not isinstance(env.observation_space, spaces.Dict):
        raise TypeError(
            f"the environment's observations are {type(env.observation_space).__name__}, expected Dict: "
            "wrap them in a gymnasium.spaces.Dict"
        )
    vector_envs = getattr(env, "vector_envs", ())
    if vector_envs and all(vector_env.output == "torch" for vector_env in vector_envs):
        return [TorchVectorEnv(vector_env, device) for vector_env in vector_envs]
    return [NumpyVectorEnv(env, device)]
