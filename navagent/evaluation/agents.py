"""Who can be evaluated: a trained policy, the expert, and the simple agents that results are held against."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from envs.sensors import point_goal
from envs.simulators.base import Action
from envs.vector_env import PointNavVectorEnv


class Agent(ABC):
    """Chooses the actions of N agents at once."""

    name: str
    """How tables call it."""

    def begin(self, env: PointNavVectorEnv, seed: int) -> None:
        """Gets ready for the N agents of ``env``."""
        self.env = env
        self.generator = torch.Generator(env.simulator.device).manual_seed(seed)

    @abstractmethod
    def act(self, observations: dict[str, Any], episode_starts: Tensor) -> Tensor:
        """The actions in the environment's action space: (N,) int64.

        Args:
            observations: by name, each (N, ...).
            episode_starts: whether an agent's episode starts with this step: (N,) bool.
        """


class PolicyAgent(Agent):
    """A trained :class:`policies.actor_critic.NavigationPolicy`."""

    def __init__(self, policy: Any, name: str = "run", deterministic: bool = False) -> None:
        self.policy, self.name, self.deterministic = policy, name, deterministic

    def begin(self, env: PointNavVectorEnv, seed: int) -> None:
        """Clears the memory; the policy draws from torch's own generator, which is seeded here."""
        super().begin(env, seed)
        self.policy.set_training_mode(False)
        self.memory = self.policy.initial_memory(env.num_envs)
        torch.manual_seed(seed)

    @torch.inference_mode()
    def act(self, observations: dict[str, Any], episode_starts: Tensor) -> Tensor:
        """The policy's actions, drawn or the most probable ones."""
        answer = self.policy.act(observations, self.memory, episode_starts, self.deterministic)
        self.memory = answer[3]
        actions: Tensor = answer[0].clone()
        return actions


class ExpertAgent(Agent):
    """Follows the shortest path, which it knows: what a perfect navigator with these actions can reach."""

    name = "expert"

    def act(self, observations: dict[str, Any], episode_starts: Tensor) -> Tensor:
        """The actions of :class:`envs.expert.ShortestPathFollower`."""
        return self.env.expert_actions()


class _GoalAgent(Agent):
    """Stops where the goal is within the success distance as the crow flies, as Habitat's simple agents."""

    def act(self, observations: dict[str, Any], episode_starts: Tensor) -> Tensor:
        """Stop at the goal, else the move of this agent."""
        task, simulator = self.env.task, self.env.simulator
        goal = point_goal(task.goal, simulator.position, simulator.yaw)
        at_goal = goal[:, 0] <= self.env.config.success_distance
        moves = torch.where(at_goal, int(Action.STOP), self._move(goal))
        return task.policy_actions(moves)

    @abstractmethod
    def _move(self, goal: Tensor) -> Tensor:
        """Where to go, given the goal's distance [m] and angle to the left [rad]: (N, 2) to (N,) int64."""


class RandomAgent(_GoalAgent):
    """Moves forward, left or right with equal probability.

    Like Habitat's ``RandomAgent`` it knows when to stop, so that it measures luck in finding the goal, not in
    calling stop.
    """

    name = "random"

    def _move(self, goal: Tensor) -> Tensor:
        return torch.randint(
            int(Action.MOVE_FORWARD),
            int(Action.TURN_RIGHT) + 1,
            (len(goal),),
            generator=self.generator,
            device=goal.device,
        )


class ForwardAgent(_GoalAgent):
    """Always moves forward: Habitat's ``ForwardOnlyAgent``."""

    name = "forward"

    def _move(self, goal: Tensor) -> Tensor:
        return torch.full((len(goal),), int(Action.MOVE_FORWARD), dtype=torch.int64, device=goal.device)


class GoalAgent(_GoalAgent):
    """Turns to the goal and walks straight at it: Habitat's ``GoalFollower``. What needs no eyes at all."""

    name = "goal"
    _AHEAD = math.radians(15.0)

    def _move(self, goal: Tensor) -> Tensor:
        angle = goal[:, 1]
        turn = torch.where(angle > 0, int(Action.TURN_LEFT), int(Action.TURN_RIGHT))
        # A turn wider than the tolerance would swing to and fro across the goal for ever.
        ahead = max(self._AHEAD, 0.51 * math.radians(self.env.simulator.agent.turn_angle_deg))
        return torch.where(angle.abs() < ahead, int(Action.MOVE_FORWARD), turn)


BASELINES: dict[str, type[Agent]] = {
    agent.name: agent for agent in (RandomAgent, ForwardAgent, GoalAgent, ExpertAgent)
}
"""The agents that need no training, by name."""
