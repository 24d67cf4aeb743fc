"""The PointNav task: what an agent is rewarded for and measured by, batched over agents.

Definitions are those of habitat-lab 0.3 (``tasks/nav/nav.py``, ``core/environments.py``), so that numbers can
be compared with the literature's; :class:`PointNavConfig` holds the options in which published variants
differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from envs.simulators.base import Action, Simulator

MOVED_ATOL = 1e-4
MOVED_RTOL = 1e-5
"""An agent counts as moved where a coordinate changed by more than ATOL + RTOL * |new|, as in Habitat."""


@dataclass(frozen=True)
class PointNavConfig:
    """What ends an episode and what it earns. Defaults are Habitat's PointNav benchmark."""

    max_steps: int = 500
    """Actions after which an episode is cut off."""
    success_distance: float = 0.2
    """Success needs a geodesic distance to the goal strictly below this [m]."""
    slack_reward: float = -0.01
    """Reward of every step."""
    progress_reward: float = 1.0
    """Reward per metre by which the geodesic distance to the goal shrank."""
    success_reward: float = 2.5
    """Reward of success."""
    success_bonus: Literal["constant", "spl"] = "constant"
    """Whether the success reward is paid in full (habitat-lab) or times SPL (the DD-PPO paper)."""
    stop: Literal["called", "automatic"] = "called"
    """Whether the agent must call stop (Discrete(4)), or stop is called for it within the success distance
    (Discrete(3), the side-tuning paper)."""

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"max_steps {self.max_steps} must be at least 1")
        if not self.success_distance > 0:
            raise ValueError(f"success_distance {self.success_distance} must be greater than 0")
        if self.success_bonus not in ("constant", "spl"):
            raise ValueError(f"success_bonus {self.success_bonus!r} is not one of constant, spl")
        if self.stop not in ("called", "automatic"):
            raise ValueError(f"stop {self.stop!r} is not one of called, automatic")

    @property
    def num_actions(self) -> int:
        """Number of actions of a policy: 4, or 3 without stop."""
        return 4 if self.stop == "called" else 3


class Measures:
    """Habitat's measures of N agents' episodes, from what is fed in: it asks no simulator anything.

    After :meth:`reset` and every :meth:`update` the attributes hold the values of the episodes so far.
    """

    STATE = (
        "steps",
        "start_distance",
        "distance",
        "path_length",
        "collisions",
        "success",
        "reward_sum",
        "position",
        "measured_position",
    )

    def __init__(self, num_agents: int, config: PointNavConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.steps = torch.zeros(num_agents, dtype=torch.int64, device=device)
        """Actions taken: (N,) int64."""
        self.start_distance = torch.zeros(num_agents, device=device)
        """Geodesic distance to the goal at reset: (N,) [m]."""
        self.distance = torch.zeros(num_agents, device=device)
        """Geodesic distance to the goal: (N,) [m]."""
        self.path_length = torch.zeros(num_agents, device=device)
        """Sum of the Euclidean displacements of all steps: (N,) [m]."""
        self.collisions = torch.zeros(num_agents, dtype=torch.int64, device=device)
        """Steps that ended in a collision: (N,) int64."""
        self.success = torch.zeros(num_agents, dtype=torch.bool, device=device)
        """Whether stop was called within the success distance at the last step: (N,) bool."""
        self.reward_sum = torch.zeros(num_agents, device=device)
        """Sum of the rewards: (N,)."""
        self.position = torch.zeros(num_agents, 3, device=device)
        """Where the agents were at the last update: (N, 3) [m]."""
        self.measured_position = torch.zeros(num_agents, 3, device=device)
        """Where the agents were when :attr:`distance` was last taken over: (N, 3) [m]."""

    def reset(self, agents: Tensor, position: Tensor, distance: Tensor) -> None:
        """Starts episodes of agents (M,) at positions (M, 3) with geodesic distances to the goal (M,)."""
        for name in ("steps", "path_length", "collisions", "success", "reward_sum"):
            getattr(self, name).index_fill_(0, agents, 0)
        self.start_distance[agents] = distance
        self.distance[agents] = distance
        self.position[agents] = position
        self.measured_position[agents] = position

    def moved(self, position: Tensor) -> Tensor:
        """Which agents' distance to the goal must be measured anew at positions (N, 3): (N,) bool.

        Habitat keeps the old distance while the agent is where it was measured, within a tolerance; this
        matters after many tiny slides.
        """
        tolerance = MOVED_ATOL + MOVED_RTOL * position.abs()
        return ((position - self.measured_position).abs() > tolerance).any(dim=1)

    def update(
        self,
        position: Tensor,
        distance: Tensor,
        stop: Tensor,
        collided: Tensor,
        active: Tensor | None = None,
    ) -> Tensor:
        """Takes one step's outcome and returns its reward: (N,).

        Args:
            position: where the agents are now: (N, 3) [m].
            distance: geodesic distance to the goal from there: (N,) [m]; ignored for agents that have not
                :meth:`moved`.
            stop: which agents called stop: (N,) bool.
            collided: whose move was cut short: (N,) bool.
            active: agents that take part, all when None: (N,) bool. The others' values stay, their reward is
                0.
        """
        config = self.config
        moved = self.moved(position)
        if active is None:
            active = torch.ones_like(moved)
        moved = moved & active
        distance = torch.where(moved, distance, self.distance)
        # Off the mesh the distance is infinite; such a step neither gains nor loses.
        progress = torch.nan_to_num(self.distance - distance, nan=0.0, posinf=0.0, neginf=0.0)
        step_length = torch.linalg.vector_norm(position - self.position, dim=1)
        self.path_length += torch.where(active, step_length, 0.0)
        self.distance = distance
        self.position = torch.where(active[:, None], position, self.position)
        self.measured_position = torch.where(moved[:, None], position, self.measured_position)
        self.steps += active
        self.collisions += collided & active
        self.success = torch.where(active, stop & (distance < config.success_distance), self.success)

        bonus = self.spl if config.success_bonus == "spl" else self.success
        reward = config.slack_reward + config.progress_reward * progress + config.success_reward * bonus
        reward = torch.where(active, reward, 0.0)
        self.reward_sum += reward
        return reward

    @property
    def spl(self) -> Tensor:
        """Success weighted by path length: (N,) in 0..1."""
        return torch.where(self.success, self._efficiency, 0.0)

    @property
    def soft_spl(self) -> Tensor:
        """SPL with the share of the distance that was covered in place of success: (N,) in 0..1."""
        covered = torch.nan_to_num(1.0 - self.distance / self.start_distance, nan=0.0, neginf=0.0)
        return covered.clamp(min=0.0) * self._efficiency

    @property
    def _efficiency(self) -> Tensor:
        longer = torch.maximum(self.start_distance, self.path_length)
        # An episode that starts on its goal and stops there has walked the best path there is; of one that
        # starts where no path leads to the goal nobody can say.
        efficiency = torch.where(longer > 0, self.start_distance / longer, 1.0)
        return torch.nan_to_num(efficiency, nan=0.0)

    def as_dict(self) -> dict[str, Tensor]:
        """Every measure by name, (N,) each; fresh tensors."""
        return {
            "success": self.success.float(),
            "spl": self.spl,
            "soft_spl": self.soft_spl,
            "distance_to_goal": self.distance.clone(),
            "collisions": self.collisions.clone(),
            "path_length": self.path_length.clone(),
            "steps": self.steps.clone(),
            "reward_sum": self.reward_sum.clone(),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """All that is needed to go on; tensors only."""
        return {name: getattr(self, name).clone() for name in self.STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from a :meth:`state_dict` of the same number of agents."""
        for name in self.STATE:
            current = getattr(self, name)
            setattr(self, name, state[name].to(current.device, current.dtype).reshape(current.shape).clone())


class Motion(Protocol):
    """What moves agents in place of the simulator's exact moves, as :class:`envs.noise.ActuationNoise`."""

    def step(self, simulator: Simulator, actions: Tensor) -> Tensor:
        """Moves every agent by its action (N,) int64 and returns who collided: (N,) bool."""


class TaskStep(NamedTuple):
    """Outcome of one step of every agent."""

    reward: Tensor
    """(N,) float32."""
    terminated: Tensor
    """Whose episode ended by stop: (N,) bool."""
    truncated: Tensor
    """Whose episode was cut off at the step limit: (N,) bool."""


class PointNavTask:
    """PointNav over any simulator.

    Args:
        simulator: where the agents live; the task moves them.
        config: the variant's rules.
        actuation: motion in place of the simulator's exact moves.
    """

    def __init__(
        self,
        simulator: Simulator,
        config: PointNavConfig | None = None,
        actuation: Motion | None = None,
    ) -> None:
        self.simulator = simulator
        self.config = config or PointNavConfig()
        self.actuation = actuation
        num_agents, device = simulator.num_agents, simulator.device
        self.measured = Measures(num_agents, self.config, device)
        self.goal = torch.zeros(num_agents, 3, device=device)
        """Goal of each agent: (N, 3) [m]."""
        self.start_position = torch.zeros(num_agents, 3, device=device)
        """Where each episode started: (N, 3) [m]."""
        self.start_yaw = torch.zeros(num_agents, device=device)
        """Heading at the start: (N,) [rad]."""
        self.active = torch.zeros(num_agents, dtype=torch.bool, device=device)
        """Agents with an episode in progress: (N,) bool. The others stand still."""

    def reset(self, agents: Tensor, scene: Tensor, position: Tensor, yaw: Tensor, goal: Tensor) -> None:
        """Starts episodes of agents (M,) in scenes (M,), at positions and headings, to goals (M, 3)."""
        self.simulator.reset(agents, scene, position, yaw)
        self.goal[agents] = goal
        self.start_position[agents] = position
        self.start_yaw[agents] = yaw
        self.active[agents] = True
        distance = self.simulator.paths.geodesic_distance(scene, position, goal)
        self.measured.reset(agents, self.simulator.position[agents], distance)

    def step(self, actions: Tensor) -> TaskStep:
        """Moves the agents by policy actions (N,) int64 and judges the outcome.

        An agent whose episode ends here is no longer :attr:`active`; its measures stay until its reset.
        """
        simulator, config, active = self.simulator, self.config, self.active
        base_actions = torch.where(active, self.simulator_actions(actions), int(Action.STOP))
        if self.actuation is None:
            simulator.step(base_actions)
            collided = simulator.collided
        else:
            collided = self.actuation.step(simulator, base_actions)

        position = simulator.position
        measures = self.measured
        distance = measures.distance.clone()
        moved = torch.nonzero(measures.moved(position) & active).squeeze(1)
        if moved.numel():
            distance[moved] = simulator.paths.geodesic_distance(
                simulator.scene[moved], position[moved], self.goal[moved]
            )
        if config.stop == "called":
            stop = active & (base_actions == int(Action.STOP))
        else:
            stop = active & (distance < config.success_distance)
        reward = measures.update(position, distance, stop, collided, active)
        truncated = active & ~stop & (measures.steps >= config.max_steps)
        self.active = active & ~stop & ~truncated
        return TaskStep(reward, stop, truncated)

    def measures(self) -> dict[str, Tensor]:
        """The measures of the episodes so far, (N,) each: ``success, spl, soft_spl, distance_to_goal,
        collisions, path_length, steps, reward_sum``."""
        return self.measured.as_dict()

    def simulator_actions(self, actions: Tensor) -> Tensor:
        """Turns indices of this task's action space (N,) into :class:`Action`: (N,) int64."""
        return actions if self.config.stop == "called" else actions + int(Action.MOVE_FORWARD)

    def policy_actions(self, base_actions: Tensor) -> Tensor:
        """Turns simulator actions (N,) into indices of this task's action space: (N,) int64.

        Without a stop action, stop becomes a move forward: the episode ends by itself at the goal.
        """
        if self.config.stop == "called":
            return base_actions
        return (base_actions - int(Action.MOVE_FORWARD)).clamp(min=0)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, the agents' poses included; nested, tensors only."""
        simulator = self.simulator
        return {
            "scene": simulator.scene.clone(),
            "position": simulator.position.clone(),
            "yaw": simulator.yaw.clone(),
            "goal": self.goal.clone(),
            "start_position": self.start_position.clone(),
            "start_yaw": self.start_yaw.clone(),
            "active": self.active.clone(),
            "measures": self.measured.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`; the scenes it was saved with must be resident, in that order."""
        simulator = self.simulator
        saved = state["scene"].shape[0]
        if saved != simulator.num_agents:
            raise ValueError(f"the saved state has {saved} agents and the simulator {simulator.num_agents}")

        def here(name: str) -> Tensor:
            value: Tensor = state[name]
            return value.to(simulator.device).clone()

        agents = torch.arange(simulator.num_agents, device=simulator.device)
        simulator.reset(agents, here("scene"), here("position"), here("yaw"))
        self.goal = here("goal")
        self.start_position = here("start_position")
        self.start_yaw = here("start_yaw")
        self.active = here("active")
        self.measured.load_state_dict(state["measures"])
