"""What every simulator does alike: checks of what it is asked, turns, and what counts as a collision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from envs.simulators.base import Action, AgentSpec

_BLOCKED = 1e-5
"""Habitat calls a move a collision if its squared length falls short of the asked one's by more [m2]."""


def turned(yaw: Tensor, actions: Tensor, agent: AgentSpec) -> Tensor:
    """Headings (N,) [rad] after the turns among actions (N,)."""
    way = (actions == Action.TURN_LEFT).float() - (actions == Action.TURN_RIGHT).float()
    headings = yaw + math.radians(agent.turn_angle_deg) * way
    # Kept near 0, where single precision is finest.
    return torch.remainder(headings + math.pi, 2.0 * math.pi) - math.pi


def ahead(start: Tensor, yaw: Tensor, agent: AgentSpec) -> Tensor:
    """Where one move forward from (M, 3) with headings (M,) would end if nothing were in the way [m]."""
    forward = torch.stack([-torch.sin(yaw), torch.zeros_like(yaw), -torch.cos(yaw)], dim=1)
    return start + agent.forward_step * forward


def cut_short(start: Tensor, target: Tensor, end: Tensor) -> Tensor:
    """Which moves from start towards target (M, 3) that end at end collided, as Habitat has it: (M,) bool."""
    moved, asked = ((point - start).square().sum(dim=1) for point in (end, target))
    return moved + _BLOCKED < asked


def check_actions(actions: Tensor, num_agents: int) -> None:
    """Refuses actions that are not ``(num_agents,)`` numbers of :class:`~envs.simulators.base.Action`.

    Raises:
        ValueError: with what they are.
    """
    if tuple(actions.shape) != (num_agents,):
        raise ValueError(f"actions have shape {tuple(actions.shape)}, expected ({num_agents},)")
    if not bool(((actions >= 0) & (actions < len(Action))).all()):
        raise ValueError(f"actions {actions.tolist()} must lie in 0..{len(Action) - 1}")


def check_poses(count: int, num_scenes: int, scene: Tensor, position: Tensor, yaw: Tensor) -> None:
    """Refuses poses that ``count`` agents cannot be put at in ``num_scenes`` scenes.

    Raises:
        ValueError: with what is wrong with them.
    """
    expected = {"scene": (count,), "position": (count, 3), "yaw": (count,)}
    for name, value in (("scene", scene), ("position", position), ("yaw", yaw)):
        if tuple(value.shape) != expected[name]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected[name]}")
    if int(scene.min()) < 0 or int(scene.max()) >= num_scenes:
        raise ValueError(f"scenes {scene.tolist()} must lie in 0..{num_scenes - 1}")
    if not bool(torch.isfinite(position).all() and torch.isfinite(yaw).all()):
        raise ValueError("positions and yaws must be finite; NaN is what snap() answers off the mesh")


def check_queries(device: torch.device, num_scenes: int, scene: Tensor, **points: Tensor) -> list[Tensor]:
    """Scene indices (N,) and points (N, 3) of a batch of navigation queries, contiguous, after checks.

    Raises:
        ValueError: types, shapes or devices do not fit.
        IndexError: there is no such scene.
    """
    if scene.ndim != 1 or scene.dtype != torch.int64 or scene.device != device:
        raise ValueError(
            f"scene must be (N,) int64 on {device}, got {tuple(scene.shape)} {scene.dtype} on {scene.device}"
        )
    for name, value in points.items():
        if value.shape != (len(scene), 3) or value.dtype != torch.float32 or value.device != device:
            raise ValueError(
                f"{name} must be ({len(scene)}, 3) float32 on {device}, a row for each scene index, "
                f"got {tuple(value.shape)} {value.dtype} on {value.device}"
            )
    if len(scene):
        low, high = (int(end) for end in scene.aminmax())
        if low < 0 or high >= num_scenes:
            wrong = low if low < 0 else high
            raise IndexError(f"scene {wrong} is not one of the {num_scenes} resident scenes")
    return [scene.contiguous(), *(value.detach().contiguous() for value in points.values())]


def check_scenes(names: Sequence[Path]) -> None:
    """Refuses an empty list of scenes, or one that names a scene twice.

    Raises:
        ValueError: with the names.
    """
    if not names:
        raise ValueError("at least one scene must be resident, got none")
    if len(set(names)) != len(names):
        raise ValueError(f"scenes {[str(name) for name in names]} must differ")


def followed(scene: Tensor, before: Sequence[Path], after: Sequence[Path]) -> Tensor:
    """Scene indices (N,) of agents when other scenes become resident; 0 for those whose scene is gone."""
    place = {name: index for index, name in enumerate(after)}
    moved = [place.get(name, 0) for name in before]
    return torch.tensor(moved, device=scene.device)[scene]
