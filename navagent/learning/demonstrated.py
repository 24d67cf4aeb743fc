"""Demonstrations as an environment: whatever an agent wants to do, what was demonstrated happens.

So a learner collects demonstrations as it collects its own rollouts, with its memory carried along, and
behaviour cloning needs no loop of its own: the expert's action in each state is the one that was taken there.
"""

from __future__ import annotations

from typing import Any

import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from navagent.demonstrations.stream import DemonstratedStep, DemonstrationStream

Observations = dict[str, Tensor]


class DemonstratedVectorEnv(VectorEnv[Observations, Any, Any]):
    """N agents that follow a stream of demonstrations.

    Rewards are 0 and nothing is measured: what a demonstration was worth is not part of it. Where one ends,
    the next one begins with the same step.

    Args:
        stream: The demonstrations; closed with this environment.
    """

    output = "torch"
    autoreset_mode = AutoresetMode.SAME_STEP

    def __init__(self, stream: DemonstrationStream) -> None:
        self.stream = stream
        self.num_envs = stream.num_envs
        self.metadata = {"autoreset_mode": self.autoreset_mode}
        self.single_observation_space = stream.single_observation_space
        self.single_action_space = stream.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._actions = torch.zeros(self.num_envs, dtype=torch.int64, device=stream.device)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """The stream's next step, which is its first if it is new; a seed does not change its order."""
        return self._next().observations, {}

    def step(self, actions: Any) -> tuple[Observations, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Does what was demonstrated; ``actions`` (N,) are ignored."""
        step = self._next()
        nothing = torch.zeros(self.num_envs, device=self.stream.device)
        never = torch.zeros(self.num_envs, dtype=torch.bool, device=self.stream.device)
        return step.observations, nothing, step.episode_starts, never, {}

    def _next(self) -> DemonstratedStep:
        step = next(self.stream)
        self._actions = step.actions
        return step

    def expert_actions(self) -> Tensor:
        """What was done in the present states: (N,) int64."""
        return self._actions

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here."""
        return {"stream": self.stream.state_dict(), "actions": self._actions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state."""
        self.stream.load_state_dict(state["stream"])
        self._actions = state["actions"].to(self.stream.device)

    def close_extras(self, **kwargs: Any) -> None:
        """Closes the stream."""
        self.stream.close()
