"""Who can be evaluated: a trained policy, the expert, and the simple agents that results are held against."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor

from envs.episodes import Episode
from envs.sensors import point_goal
from envs.simulators.base import Action
from envs.vector_env import PREVIOUS_ACTION, PointNavVectorEnv


class Draws(Protocol):
    """Random numbers for agents' choices, step by step."""

    def draw(self, episode_starts: Tensor) -> Tensor:
        """The next step's numbers, exponentially distributed: (N, choices).

        ``episode_starts`` (N,) bool says for whom an episode starts with this step.
        """


def seeded_numbers(name: str, steps: int, choices: int) -> Tensor:
    """Exponentially distributed numbers that belong to ``name`` alone: (steps, choices)."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
    return torch.zeros(steps, choices).exponential_(generator=torch.Generator().manual_seed(seed))


def episode_name(seed: int, episode: Episode) -> str:
    """What the random numbers of an episode belong to."""
    return f"{seed} {episode.scene_id} {episode.episode_id}"


class EpisodeNoise:
    """Random numbers that belong to an episode and its step, whoever plays it, beside whom, in which process.

    So an episode's result does not change with the number of agents, nor with the other episodes.
    """

    def __init__(self, env: PointNavVectorEnv, seed: int, choices: int) -> None:
        """``choices`` numbers a step for each agent of ``env``."""
        self._env, self._seed = env, seed
        self._numbers = torch.zeros(env.num_envs, env.config.max_steps, choices)
        self._step = torch.zeros(env.num_envs, dtype=torch.int64)

    def draw(self, episode_starts: Tensor) -> Tensor:
        """See :class:`Draws`."""
        env = self._env
        for agent in episode_starts.nonzero().flatten().tolist():
            episode = env.sampler.episodes[env.current_episodes()[agent]]
            steps, choices = self._numbers.shape[1:]
            self._numbers[agent] = seeded_numbers(episode_name(self._seed, episode), steps, choices)
            self._step[agent] = 0
        now = self._step.clamp(max=self._numbers.shape[1] - 1)
        self._step += 1
        return self._numbers[torch.arange(len(now)), now].to(env.simulator.device)


class Agent(ABC):
    """Chooses the actions of N agents at once."""

    name: str
    """How tables call it."""

    def begin(self, env: PointNavVectorEnv, seed: int) -> None:
        """Gets ready for the N agents of ``env``; ``seed`` is of what is drawn at random."""
        self.env = env
        self.noise: Draws = EpisodeNoise(env, seed, env.config.num_actions)

    @abstractmethod
    def act(self, observations: dict[str, Any], episode_starts: Tensor) -> Tensor:
        """The actions in the environment's action space: (N,) int64.

        Args:
            observations: by name, each (N, ...).
            episode_starts: whether an agent's episode starts with this step: (N,) bool.
        """


def unless_sure(probabilities: Tensor, previous: Tensor, turn_back: float) -> Tensor:
    """Probabilities without that of turning back at once, where it is below ``turn_back``.

    Who cannot see the way may find left as good as right at every step, and so turns to and fro until time
    is out. Whoever goes on turning sees more, and who is sure may still turn back.

    Args:
        probabilities: of the actions, the last two of which turn left and right: (N, num_actions).
        previous: the last action and 1, or 0 at an episode's start: (N,).
        turn_back: from 0, which leaves all as they are, to 1.

    Returns:
        (N, num_actions), in which rows need not add up to 1.
    """
    kept = probabilities.clone()
    left, right = probabilities.shape[1] - 2, probabilities.shape[1] - 1
    for turn, back in ((left, right), (right, left)):
        kept[(previous == turn + 1) & (probabilities[:, back] < turn_back), back] = 0.0
    return kept


class PolicyAgent(Agent):
    """A trained :class:`policies.actor_critic.NavigationPolicy`.

    Args:
        policy: the policy.
        name: how tables call it.
        deterministic: whether it takes its most probable action or draws one.
        turn_back: see :func:`unless_sure`.
    """

    def __init__(
        self, policy: Any, name: str = "run", deterministic: bool = False, turn_back: float = 0.0
    ) -> None:
        self.policy, self.name, self.deterministic, self.turn_back = policy, name, deterministic, turn_back

    def begin(self, env: PointNavVectorEnv, seed: int) -> None:
        """Clears the memory."""
        super().begin(env, seed)
        self.start(env.num_envs, self.noise)

    def start(self, num_agents: int, noise: Draws) -> None:
        """Clears the memory of N agents, in whatever world they are; ``noise`` draws their actions."""
        self.noise = noise
        self.policy.set_training_mode(False)
        self.memory = self.policy.initial_memory(num_agents)

    @torch.inference_mode()
    def act(self, observations: dict[str, Any], episode_starts: Tensor) -> Tensor:
        """The policy's actions, drawn or the most probable ones."""
        answer = self.policy.act(observations, self.memory, episode_starts, deterministic=True)
        self.memory = answer[3]
        likely = torch.softmax(answer[5].float(), dim=1)
        if self.turn_back:
            likely = unless_sure(likely, observations[PREVIOUS_ACTION], self.turn_back)
        if not self.deterministic:
            # The largest p / q with exponentially distributed q falls on each action with probability p.
            likely = likely / self.noise.draw(episode_starts)
        return likely.argmax(dim=1)


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
        moves = torch.where(at_goal, int(Action.STOP), self._move(goal, episode_starts))
        return task.policy_actions(moves)

    @abstractmethod
    def _move(self, goal: Tensor, episode_starts: Tensor) -> Tensor:
        """Where to go: (N,) int64.

        ``goal`` (N, 2) is the goal's distance [m] and angle to the left [rad].
        """


class RandomAgent(_GoalAgent):
    """Moves forward, left or right with equal probability.

    Like Habitat's ``RandomAgent`` it knows when to stop, so that it measures luck in finding the goal, not in
    calling stop.
    """

    name = "random"

    def _move(self, goal: Tensor, episode_starts: Tensor) -> Tensor:
        moves = int(Action.TURN_RIGHT) - int(Action.MOVE_FORWARD) + 1
        # Each of several numbers of one distribution is the least equally often.
        return int(Action.MOVE_FORWARD) + self.noise.draw(episode_starts)[:, :moves].argmin(dim=1)


class ForwardAgent(_GoalAgent):
    """Always moves forward: Habitat's ``ForwardOnlyAgent``."""

    name = "forward"

    def _move(self, goal: Tensor, episode_starts: Tensor) -> Tensor:
        return torch.full((len(goal),), int(Action.MOVE_FORWARD), dtype=torch.int64, device=goal.device)


class GoalAgent(_GoalAgent):
    """Turns to the goal and walks straight at it: Habitat's ``GoalFollower``. What needs no eyes at all."""

    name = "goal"
    _AHEAD = math.radians(15.0)

    def _move(self, goal: Tensor, episode_starts: Tensor) -> Tensor:
        angle = goal[:, 1]
        turn = torch.where(angle > 0, int(Action.TURN_LEFT), int(Action.TURN_RIGHT))
        # A turn wider than the tolerance would swing to and fro across the goal for ever.
        ahead = max(self._AHEAD, 0.51 * math.radians(self.env.simulator.agent.turn_angle_deg))
        return torch.where(angle.abs() < ahead, int(Action.MOVE_FORWARD), turn)


BASELINES: dict[str, type[Agent]] = {
    agent.name: agent for agent in (RandomAgent, ForwardAgent, GoalAgent, ExpertAgent)
}
"""The agents that need no training, by name."""
