"""What an agent is told besides what its cameras see: the goal, its position and its heading, as in Habitat.

All functions are batched over agents: positions (N, 3) [m], headings (N,) [rad], in the world frame of
:mod:`envs.simulators.base`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from envs.task import PointNavTask


def in_agent_frame(point: Tensor, position: Tensor, yaw: Tensor) -> tuple[Tensor, Tensor]:
    """How far points (N, 3) lie ahead of agents and to their right: two (N,) [m]."""
    x, _, z = (point - position).unbind(dim=1)
    sin, cos = torch.sin(yaw), torch.cos(yaw)
    return -x * sin - z * cos, x * cos - z * sin


def point_goal(goal: Tensor, position: Tensor, yaw: Tensor) -> Tensor:
    """The goal in polar coordinates of the ground plane: (N, 2), distance [m] and angle to the left [rad]."""
    ahead, right = in_agent_frame(goal, position, yaw)
    return torch.stack([torch.hypot(ahead, right), -torch.atan2(right, ahead)], dim=1)


def wrap_angle(angle: Tensor) -> Tensor:
    """The same angle in -pi..pi."""
    return torch.atan2(torch.sin(angle), torch.cos(angle))


def _pointgoal_with_gps_compass(task: PointNavTask) -> Tensor:
    return point_goal(task.goal, task.simulator.position, task.simulator.yaw)


def _pointgoal(task: PointNavTask) -> Tensor:
    return point_goal(task.goal, task.start_position, task.start_yaw)


def _gps(task: PointNavTask) -> Tensor:
    return torch.stack(in_agent_frame(task.simulator.position, task.start_position, task.start_yaw), dim=1)


def _compass(task: PointNavTask) -> Tensor:
    return wrap_angle(task.simulator.yaw - task.start_yaw)[:, None]


def _heading(task: PointNavTask) -> Tensor:
    return wrap_angle(task.simulator.yaw)[:, None]


_FAR = float(np.finfo(np.float32).max)


def _box(*bounds: tuple[float, float]) -> spaces.Box:
    low, high = np.array(bounds, dtype=np.float32).T
    return spaces.Box(low, high, dtype=np.float32)


TASK_SENSORS: dict[str, tuple[spaces.Box, Callable[[PointNavTask], Tensor]]] = {
    "pointgoal_with_gps_compass": (_box((0.0, _FAR), (-math.pi, math.pi)), _pointgoal_with_gps_compass),
    "pointgoal": (_box((0.0, _FAR), (-math.pi, math.pi)), _pointgoal),
    "gps": (_box((-_FAR, _FAR), (-_FAR, _FAR)), _gps),
    "compass": (_box((-math.pi, math.pi)), _compass),
    "heading": (_box((-math.pi, math.pi)), _heading),
}
"""By Habitat's names: a sensor's space and what computes it for every agent, (N, size) float32.

``pointgoal_with_gps_compass`` is the goal from where the agent is, ``pointgoal`` from where it started;
``gps`` is the agent's position ahead and to the right of its start, ``compass`` its heading relative to the
start, ``heading`` its heading in the world.
"""
