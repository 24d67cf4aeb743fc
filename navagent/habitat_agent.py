"""Agents of this package as Habitat's own: its benchmark and challenges can run them.

Habitat need not be installed to import this; where it is, the class is a ``habitat.Agent``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from envs.simulators.base import Action
from envs.vector_env import PREVIOUS_ACTION
from navagent.agent_spaces import action_space, observation_space
from navagent.build import training_device
from navagent.config import ConfigError, TrainConfig, read_config
from navagent.evaluation.agents import PolicyAgent, seeded_numbers
from navagent.evaluation.command import restore_policy
from navagent.runs import Run

if TYPE_CHECKING:

    class _Base:
        """Habitat's abstract agent."""

else:
    try:
        from habitat.core.agent import Agent as _Base
    except Exception:  # an installation that is broken raises anything
        _Base = object

GOAL = "pointgoal_with_gps_compass"
_ROUNDING = 1e-3  # by which an observation may lie outside of its range

_HOW_TO_GET = {
    "rgb": "habitat.simulator.agents.main_agent.sim_sensors.rgb_sensor",
    "depth": "habitat.simulator.agents.main_agent.sim_sensors.depth_sensor",
    GOAL: "habitat.task.lab_sensors.pointgoal_with_gps_compass_sensor",
    "pointgoal": "habitat.task.lab_sensors, a sensor of type PointGoalSensor",
    "gps": "habitat.task.lab_sensors.gps_sensor",
    "compass": "habitat.task.lab_sensors.compass_sensor",
}
"""Where Habitat's settings have the sensor that gives an observation."""


class ObservationError(ValueError):
    """An observation that is missing, or not what the agent was trained on."""


class NavagentAgent(_Base):
    """A trained run as an agent with Habitat's interface.

    Example::

        import habitat
        from navagent.habitat_agent import NavagentAgent

        agent = NavagentAgent("runs/RUN")
        print(habitat.Benchmark("runs/RUN/evaluation/val-official/habitat.yaml").evaluate(agent))

    ``navagent evaluate RUN --official`` writes that file.

    An agent of a task in which stop is called for it (``env.stop=automatic``) has no such action, and Habitat
    calls none for it: it stops where the goal is nearer than the success distance as the crow flies.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        checkpoint: str | int = "best",
        device: str = "auto",
        deterministic: bool | None = None,
        turn_back: float | None = None,
        seed: int = 0,
        depth_in_metres: bool = False,
    ) -> None:
        """Loads the agent.

        Args:
            run: The run's folder.
            checkpoint: ``best``, ``latest`` or a number of frames.
            device: Where it thinks: cpu, cuda, cuda:N, or auto.
            deterministic: Whether it takes its most probable action or draws one; as the run was evaluated
                (``evaluation.deterministic``) if None.
            turn_back: From which probability on, 0 to 1, it turns back right after a turn; as the run was
                evaluated (``evaluation.turn_back``) if None.
            seed: Of the actions that it draws.
            depth_in_metres: Whether Habitat gives depth in metres (``normalize_depth: False``), and not in
                0..1 over its own range, which must then be the run's.

        Raises:
            RunError: There is no such run or checkpoint, or it is broken.
            ConfigError: Stop must be called for the agent, and it cannot tell where the goal is.
        """
        self.config: TrainConfig = read_config(Run(run).config_path)
        """The run's settings."""
        if self.config.env.stop == "automatic" and self.config.sensors.goal != GOAL:
            raise ConfigError(
                f"{run}: its agent has no stop action (env.stop=automatic), Habitat calls no stop for it, "
                f"and with sensors.goal={self.config.sensors.goal} it cannot tell when it is at the goal"
            )
        self.seed = seed
        """Of the actions that it draws."""
        self.depth_in_metres = depth_in_metres
        """Whether depth comes in metres."""
        self._space = observation_space(self.config)
        self._device = training_device(device)
        policy = restore_policy(Run(run), self._space, action_space(self.config), checkpoint)
        own = self.config.evaluation
        self._agent = PolicyAgent(
            policy.to(self._device),
            Path(run).resolve().name,
            own.deterministic if deterministic is None else deterministic,
            own.turn_back if turn_back is None else turn_back,
        )
        self._episodes = 0
        self.reset()

    @property
    def deterministic(self) -> bool:
        """Whether it takes its most probable action."""
        return self._agent.deterministic

    def reset(self, draws: str | None = None) -> None:
        """Forgets the last episode.

        Args:
            draws: What the episode's random choices belong to, so that they can be had again; the seed and
                how many episodes there were before if None, for Habitat does not say which one begins.
        """
        name = f"{self.seed} {self._episodes}" if draws is None else draws
        steps, choices = self.config.env.max_steps, int(action_space(self.config).n)
        self._numbers = seeded_numbers(name, steps, choices)
        self._episodes += 1
        self._step = 0
        self._previous = 0
        self._agent.start(1, self)

    def act(self, observations: Mapping[str, Any]) -> dict[str, str]:
        """The next action, by the name that Habitat's tasks have for it: ``{"action": "move_forward"}``.

        Args:
            observations: By Habitat's names, as ``habitat.Env`` gives them; others than those the agent was
                trained on are ignored.

        Raises:
            ObservationError: One is missing, has another shape or type, or lies outside of its range.
        """
        seen = {name: self._observed(name, observations) for name in self._space.spaces}
        start = torch.tensor([self._step == 0], device=self._device)
        chosen = int(self._agent.act(seen, start)[0])
        self._step += 1
        self._previous = chosen + 1
        action = Action(chosen)
        if self.config.env.stop == "automatic":
            near = float(seen[GOAL][0, 0]) < self.config.env.success_distance
            action = Action.STOP if near else Action(chosen + int(Action.MOVE_FORWARD))
        return {"action": action.name.lower()}

    def draw(self, episode_starts: Tensor) -> Tensor:
        """The next step's random numbers: see :class:`navagent.evaluation.agents.Draws`."""
        step = min(self._step, len(self._numbers) - 1)
        return self._numbers[step : step + 1].to(self._device)

    def _observed(self, name: str, observations: Mapping[str, Any]) -> Tensor:
        """One observation as the policy takes it: (1, ...)."""
        if name == PREVIOUS_ACTION:
            return torch.tensor([self._previous], device=self._device)
        if name not in observations:
            raise ObservationError(
                f"there is no observation {name!r} among those that Habitat gave "
                f"({', '.join(map(str, observations)) or 'none'}): the agent was trained with it, so add "
                f"{_HOW_TO_GET[name]} to Habitat's settings"
            )
        space = self._space[name]
        assert isinstance(space, spaces.Box)
        value = np.asarray(observations[name])
        if value.shape != space.shape:
            raise ObservationError(
                f"observation {name!r} has shape {value.shape}, and the agent was trained on {space.shape}"
                + _shape_hint(name, space.shape)
            )
        if (value.dtype == np.uint8) != (space.dtype == np.uint8) or not np.issubdtype(
            value.dtype, np.number
        ):
            raise ObservationError(
                f"observation {name!r} is of type {value.dtype}, and the agent was trained on {space.dtype}"
            )
        if space.dtype != np.uint8:
            value = self._in_range(name, value.astype(np.float32), space)
        return torch.from_numpy(np.array(value)[None]).to(self._device)

    def _in_range(self, name: str, value: np.ndarray, space: spaces.Box) -> np.ndarray:
        """Numbers (float32) once they are found to be what they are said to be."""
        if not np.isfinite(value).all():
            raise ObservationError(f"observation {name!r} holds numbers that are not finite")
        if name == "depth" and self.depth_in_metres:
            near, far = self.config.sensors.min_depth, self.config.sensors.max_depth
            return ((np.clip(value, near, far) - near) / (far - near)).astype(np.float32)
        if (value < space.low - _ROUNDING).any() or (value > space.high + _ROUNDING).any():
            raise ObservationError(
                f"observation {name!r} goes from {value.min():g} to {value.max():g}, outside of what the "
                "agent was trained on" + _range_hint(name)
            )
        return value


def _shape_hint(name: str, shape: tuple[int, ...]) -> str:
    if name in ("rgb", "depth"):
        return f": set {_HOW_TO_GET[name]}'s height and width to {shape[0]} and {shape[1]}"
    return f": set dimensionality to {shape[0]} in {_HOW_TO_GET[name]}"


def _range_hint(name: str) -> str:
    if name == "depth":
        return ", 0..1: where Habitat gives metres (normalize_depth: False), say depth_in_metres=True"
    if name in (GOAL, "pointgoal"):
        return f", a distance and an angle within {math.pi:.4g}: set goal_format to POLAR"
    return ""
