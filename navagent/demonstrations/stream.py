"""What a learner reads: an endless, shuffled stream of demonstrated steps of N agents in lock-step.

::

    stream = open_stream(config, "demos/expert.demos", num_envs=16)  # of demonstrations.open
    memory = policy.initial_memory(stream.num_envs)
    while stream.passes < 10:                        # times that every demonstration was seen, on average
        block = stream.block(64)                     # 64 steps of 16 agents, (T, N, ...)
        values, logits, ... = policy.evaluate_sequences(
            block.observations, block.actions, memory, block.episode_starts, block.frozen)

Where an agent's demonstration ends, its next step is the first of another one, and ``episode_starts`` says
so: there is no padding, and truncated back-propagation carries the memory from block to block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from gymnasium import spaces
from torch import Tensor

from navagent.demonstrations.recorded import DemonstrationError

if TYPE_CHECKING:
    from envs.vector_env import PointNavVectorEnv
    from navagent.demonstrations.features import StoredFeatures


@dataclass(frozen=True)
class DemonstratedStep:
    """One step of every agent."""

    observations: dict[str, Tensor]
    """What the agent perceives before it acts, by name: (N, ...), as the environment gives it."""
    actions: Tensor
    """What was done then, in the environment's action space: (N,) int64."""
    episode_starts: Tensor
    """Whether this is the first step of a demonstration: (N,) bool."""
    demonstrations: Tensor
    """Which demonstration the step belongs to, a row of the set: (N,) int64, on the CPU."""
    steps: Tensor
    """Which of its steps this is, from 0: (N,) int64, on the CPU."""
    frozen: dict[str, Tensor] | None = None
    """Stored features of the frozen encoder, by name as ``policy.frozen_features`` gives them: (N, ...)
    float32; None where the stream has none."""


@dataclass(frozen=True)
class DemonstratedBlock:
    """``T`` steps of every agent: the fields of :class:`DemonstratedStep`, stacked to (T, N, ...)."""

    observations: dict[str, Tensor]
    """By name: (T, N, ...)."""
    actions: Tensor
    """(T, N) int64."""
    episode_starts: Tensor
    """(T, N) bool."""
    demonstrations: Tensor
    """(T, N) int64, on the CPU."""
    steps: Tensor
    """(T, N) int64, on the CPU."""
    frozen: dict[str, Tensor] | None = None
    """By name: (T, N, ...) float32, or None."""


class DemonstrationStream(ABC):
    """Endless steps of demonstrations for N agents side by side, in an order that the seed decides.

    All agents follow the same shuffle of the demonstrations, each from its own place, and a new shuffle when
    they come around: no agent walks behind another, and every demonstration is seen equally often. The first
    step that a new stream gives starts a demonstration for every agent.
    """

    num_envs: int
    """Number of agents N."""
    num_demonstrations: int
    """Demonstrations that the stream goes through."""
    steps_per_pass: int
    """Steps of all of them together."""
    scene_ids: frozenset[str]
    """Scenes that they take place in; none where that is not known."""
    simulated: PointNavVectorEnv | None = None
    """The environment that replays them; None where nothing is simulated."""
    single_observation_space: spaces.Dict
    """Of one agent; what a policy is built for."""
    single_action_space: spaces.Discrete
    """Of one agent."""
    device: torch.device
    """Where its tensors live."""

    @property
    @abstractmethod
    def steps_taken(self) -> int:
        """Steps given so far, of all agents (and of the processes that share the stream) together."""

    @property
    def passes(self) -> float:
        """How often every demonstration was seen so far, on average."""
        return self.steps_taken / self.steps_per_pass

    def __iter__(self) -> Iterator[DemonstratedStep]:
        return self

    @abstractmethod
    def __next__(self) -> DemonstratedStep:
        """The next step of every agent; there always is one.

        Raises:
            DemonstrationError: what is replayed is not what was recorded; names demonstration and steps.
        """

    def block(self, steps: int) -> DemonstratedBlock:
        """The next ``steps`` steps, stacked."""
        if steps < 1:
            raise ValueError(f"a block of {steps} steps; expected at least 1")
        taken = [next(self) for _ in range(steps)]
        observations = {
            name: torch.stack([step.observations[name] for step in taken]) for name in taken[0].observations
        }
        frozen = None
        if taken[0].frozen is not None:
            frozen = {
                name: torch.stack([step.frozen[name] for step in taken if step.frozen is not None])
                for name in taken[0].frozen
            }
        return DemonstratedBlock(
            observations,
            torch.stack([step.actions for step in taken]),
            torch.stack([step.episode_starts for step in taken]),
            torch.stack([step.demonstrations for step in taken]),
            torch.stack([step.steps for step in taken]),
            frozen,
        )

    def use_features(self, features: StoredFeatures) -> None:
        """Gives stored features with every step from now on.

        Raises:
            DemonstrationError: the stream is not one of recorded demonstrations.
        """
        raise DemonstrationError("features are stored for recorded demonstrations only")

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly after the newest step: nested, tensors and what JSON holds."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a :meth:`state_dict` of a stream over the same demonstrations with as many agents.

        Raises:
            ValueError: demonstrations or agents differ.
        """

    @abstractmethod
    def close(self) -> None:
        """Frees what the stream holds; calling it twice is harmless."""
