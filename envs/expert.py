"""The expert: follows the shortest path with discrete actions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from envs.sensors import in_agent_frame
from envs.simulators.base import Action, AgentSpec, PathQueries

_COLLISION_COST = 0.25  # of one forward step's progress; a collision is worse than a slightly longer way
_STUCK_COST = 2.0  # the same without sliding, where an agent that touched a wall can hardly leave it
_CLOSE_COST = 0.2  # without sliding, for standing at a wall, less the farther up to _CLOSE
_CLOSE = 0.1  # [m]
_TURN_COST = 0.0125  # of one forward step's progress; among equal ways the one with fewer turns
_SIDEWAYS = 2  # turns to either side of the bearing that are tried out
_ENOUGH = 0.5  # of one forward step's progress; less sends the search all around
_NEAR_CORNER = 0.05  # [m] a corner this close counts as reached

NO_MOVE = 2**15 - 1
"""Stands for the number of turns before the next move forward where none is to come."""


class Advice(NamedTuple):
    """What an expert says of N agents."""

    actions: Tensor
    """The best action of each: (N,) int64."""
    turns: Tensor | None
    """How many turns to the left come before its next move forward, negative ones to the right, cut off at
    half a circle; :data:`NO_MOVE` where it stops. (N,) int16; None from an expert that does not tell."""


def half_circle(turn_angle_deg: float) -> int:
    """How many turns of an angle [deg] face an agent about."""
    return math.ceil(180 / turn_angle_deg - 1e-6)


class ShortestPathFollower:
    """Chooses, for a batch of agents, the action that follows the shortest path to the goal best.

    In the manner of Habitat's ``GreedyGeodesicFollower``: a number of turns and then a move forward is tried
    out on the navigation mesh, and the one that shortens the geodesic distance most wins. Where Habitat tries
    every direction, this looks only about the bearing of the path's next corner, and all around only where
    nothing there helps; so it labels thousands of frames a second. Without sliding, where a touched wall
    holds an agent fast, it looks two moves ahead, which is slower. It keeps no state: any agent, any time.

    Args:
        paths: queries on the resident scenes.
        agent: step length, turn angle and sliding.
        goal_radius: stop is the action strictly within this geodesic distance of the goal [m].
    """

    def __init__(self, paths: PathQueries, agent: AgentSpec, goal_radius: float = 0.2) -> None:
        self.paths = paths
        self.agent = agent
        self.goal_radius = goal_radius
        self._turn = math.radians(agent.turn_angle_deg)
        self._half_circle = half_circle(agent.turn_angle_deg)

    def advice(
        self, scene: Tensor, position: Tensor, yaw: Tensor, goal: Tensor, active: Tensor | None = None
    ) -> Advice:
        """The best :class:`~envs.simulators.base.Action` of each agent, and the turns that are to come.

        Args:
            scene: (N,) int64.
            position: (N, 3) [m].
            yaw: (N,) [rad].
            goal: (N, 3) [m].
            active: agents that need an action, all when None: (N,) bool. The others get stop, and so do
                agents from which no path leads to the goal.
        """
        distance = self.paths.geodesic_distance(scene, position, goal)
        actions = torch.full_like(scene, int(Action.STOP))
        planned = torch.full_like(scene, NO_MOVE, dtype=torch.int16)
        walking = torch.isfinite(distance) & (distance >= self.goal_radius)
        if active is not None:
            walking &= active
        rows = torch.nonzero(walking).squeeze(1)
        if rows.numel():
            turns = self._turns(scene[rows], position[rows], yaw[rows], goal[rows], distance[rows])
            most = min(self._half_circle, NO_MOVE - 1)
            planned[rows] = turns.clamp(-most, most).to(torch.int16)
            ahead = torch.full_like(turns, int(Action.MOVE_FORWARD))
            left, right = torch.full_like(turns, int(Action.TURN_LEFT)), int(Action.TURN_RIGHT)
            actions[rows] = torch.where(turns == 0, ahead, torch.where(turns > 0, left, right))
        return Advice(actions, planned)

    def _turns(self, scene: Tensor, position: Tensor, yaw: Tensor, goal: Tensor, distance: Tensor) -> Tensor:
        """How many turns to the left should come before the next move forward: (M,) int64."""
        bearing = torch.round(self._bearing(scene, position, yaw, goal) / self._turn).long()
        # The directions tried are the same whichever way the agent faces, so that it never turns to and fro.
        tried = bearing[:, None] + torch.arange(-_SIDEWAYS, _SIDEWAYS + 1, device=bearing.device)
        turns, score = self._best(tried, scene, position, yaw, goal, distance)
        rows = torch.nonzero(score < _ENOUGH).squeeze(1)
        if rows.numel():
            around = torch.arange(-self._half_circle, self._half_circle + 1, device=bearing.device)
            turns[rows], _ = self._best(
                around.expand(rows.numel(), -1),
                scene[rows],
                position[rows],
                yaw[rows],
                goal[rows],
                distance[rows],
            )
        return turns

    def _bearing(self, scene: Tensor, position: Tensor, yaw: Tensor, goal: Tensor) -> Tensor:
        """Angle to the left at which the path's next corner lies: (M,) [rad]."""
        corners, count = self.paths.path(scene, position, goal, max_points=8)
        offset = corners - position[:, None]
        far = torch.hypot(offset[..., 0], offset[..., 2]) > _NEAR_CORNER
        far &= torch.arange(corners.shape[1], device=corners.device) < count[:, None]
        # argmax finds the first; where no corner is far, the last one must do.
        first = torch.where(far.any(1), far.int().argmax(1), (count - 1).clamp(min=0))
        corner = corners[torch.arange(len(first), device=first.device), first]
        ahead, right = in_agent_frame(corner, position, yaw)
        return -torch.atan2(right, ahead)

    def _best(
        self, turns: Tensor, scene: Tensor, position: Tensor, yaw: Tensor, goal: Tensor, distance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best of the turns (M, K) before a move: (M,) int64, and its score in steps won: (M,)."""
        step = self.agent.forward_step
        heading = yaw[:, None] + turns * self._turn
        end, after, collided = self._move(scene, position, heading, goal)
        score = (distance[:, None] - after) / step
        if self.agent.allow_sliding:
            score -= _COLLISION_COST * collided
        else:
            onward = self._onward(scene, end, heading, goal, after)
            cost = _STUCK_COST * collided + _CLOSE_COST * self._closeness(scene, end)
            score = torch.where(after < self.goal_radius, score, 0.5 * (score + onward) - cost)
        score -= _TURN_COST * turns.abs()
        chosen = score.argmax(dim=1, keepdim=True)
        return turns.gather(1, chosen).squeeze(1), score.gather(1, chosen).squeeze(1)

    def _onward(
        self, scene: Tensor, start: Tensor, heading: Tensor, goal: Tensor, distance: Tensor
    ) -> Tensor:
        """What the best second move wins from starts (M, K, 3), in steps: (M, K); at worst one is lost.

        Without sliding an agent that touches a wall can hardly leave it, so a move counts for what it leads
        to.
        """
        count = heading.shape[1]
        around = torch.arange(2 * self._half_circle, device=heading.device) * self._turn
        _, after, collided = self._move(
            scene.repeat_interleave(count),
            start.flatten(0, 1),
            heading.reshape(-1, 1) + around,
            goal.repeat_interleave(count, dim=0),
        )
        gain = (distance.reshape(-1, 1) - after) / self.agent.forward_step
        return torch.where(collided, -1.0, gain).amax(dim=1).reshape_as(heading)

    def _closeness(self, scene: Tensor, points: Tensor) -> Tensor:
        """How close points (M, K, 3) lie to a wall: (M, K), 1 at it and 0 from _CLOSE on."""
        flat = scene.repeat_interleave(points.shape[1])
        wall = self.paths.distance_to_obstacle(flat, points.flatten(0, 1), _CLOSE)
        return 1.0 - wall.clamp(max=_CLOSE).reshape(points.shape[:2]) / _CLOSE

    def _move(
        self, scene: Tensor, position: Tensor, heading: Tensor, goal: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Moves forward from positions (M, 3) along each of the headings (M, K).

        Returns where that ends (M, K, 3), the geodesic distance from there (M, K) and whether it collided (M,
        K).
        """
        step, count = self.agent.forward_step, heading.shape[1]
        move = torch.stack([-torch.sin(heading), torch.zeros_like(heading), -torch.cos(heading)], -1) * step
        start = position.repeat_interleave(count, dim=0)
        scenes = scene.repeat_interleave(count)
        end = self.paths.try_step(scenes, start, start + move.flatten(0, 1), self.agent.allow_sliding)
        collided = (end - start).norm(dim=1) + 1e-5 < step
        after = self.paths.geodesic_distance(scenes, end, goal.repeat_interleave(count, dim=0))
        return end.reshape_as(move), after.reshape_as(heading), collided.reshape_as(heading)
