"""The one interface between the PointNav task and whatever simulates the world.

Frames and units, everywhere in this package: metres, +Y up, right-handed; heading ``yaw`` [rad] turns about
+Y, and at yaw 0 the agent looks along -Z. A point ``p`` in the agent's frame is ``R_y(yaw) @ p + position``
in the world. An agent's position is where its feet are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

SensorKind = Literal["rgb", "depth", "normals", "instance"]


class SimulatorError(ChildProcessError):
    """A simulator in other processes does not start or cannot go on; the message says why in their words."""


class Action(IntEnum):
    """PointNav's discrete actions, in Habitat's order."""

    STOP = 0
    MOVE_FORWARD = 1
    TURN_LEFT = 2
    TURN_RIGHT = 3


@dataclass(frozen=True)
class SensorSpec:
    """One camera fixed to the agent.

    Pixels are square and their centres lie at half integers: the ray through row ``r``, column ``c`` leaves
    along ``((c + 0.5) / width - 0.5) * 2 * tan(hfov / 2)`` to the right, and so on.
    """

    name: str
    """Key of this sensor in what :meth:`Simulator.render` returns."""
    kind: SensorKind
    """What a pixel holds."""
    height: int = 128
    """Image rows."""
    width: int = 128
    """Image columns."""
    hfov_deg: float = 90.0
    """Horizontal field of view [deg]."""
    sensor_height: float = 1.25
    """Height of the camera above the agent's feet [m]."""
    pitch_deg: float = 0.0
    """Rotation about the camera's right axis [deg]; negative looks down."""

    def __post_init__(self) -> None:
        if self.kind not in ("rgb", "depth", "normals", "instance"):
            raise ValueError(
                f"sensor {self.name!r}: kind {self.kind!r} is not one of rgb, depth, normals, instance"
            )
        if self.height < 1 or self.width < 1:
            raise ValueError(f"sensor {self.name!r}: size {self.height}x{self.width} must be at least 1x1")
        if not 0.0 < self.hfov_deg < 180.0:
            raise ValueError(f"sensor {self.name!r}: hfov_deg {self.hfov_deg} must lie between 0 and 180")
        for field in ("sensor_height", "pitch_deg"):
            if not math.isfinite(getattr(self, field)):
                raise ValueError(f"sensor {self.name!r}: {field} {getattr(self, field)} must be a number")


@dataclass(frozen=True)
class AgentSpec:
    """The agent's body and how it moves. Defaults are those of Habitat's PointNav benchmark."""

    radius: float = 0.1
    """Radius of the agent's cylinder [m]."""
    height: float = 1.5
    """Height of the agent's cylinder [m]."""
    max_climb: float = 0.2
    """Highest step that the agent can climb [m]."""
    max_slope_deg: float = 45.0
    """Steepest floor that the agent can walk [deg]."""
    forward_step: float = 0.25
    """Length of one forward move [m]."""
    turn_angle_deg: float = 10.0
    """Angle of one turn [deg]."""
    allow_sliding: bool = True
    """Whether a blocked move slides along the wall, or stops at it."""

    def __post_init__(self) -> None:
        for field in ("radius", "height", "forward_step", "turn_angle_deg"):
            if not 0.0 < getattr(self, field) < math.inf:
                raise ValueError(f"agent {field} {getattr(self, field)} must be a number greater than 0")
        if not 0.0 <= self.max_climb < math.inf:
            raise ValueError(f"agent max_climb {self.max_climb} must be a number, at least 0")
        if not 0.0 <= self.max_slope_deg <= 90.0:
            raise ValueError(f"agent max_slope_deg {self.max_slope_deg} must lie between 0 and 90")


class PathQueries(Protocol):
    """Batched questions about where agents can stand and walk; row ``i`` asks scene ``scene[i]``.

    ``scene``: (N,) int64 index of a resident scene; points: (N, 3) float32 [m]; all on :attr:`device`.
    """

    device: torch.device

    def is_navigable(self, scene: Tensor, points: Tensor, max_y_delta: float = 0.5) -> Tensor:
        """Whether an agent can stand at each point: (N,) bool."""

    def snap(self, scene: Tensor, points: Tensor) -> Tensor:
        """Closest navigable point: (N, 3) float32 [m], NaN where there is none near."""

    def island_radius(self, scene: Tensor, points: Tensor) -> Tensor:
        """Radius of the connected area a point lies in: (N,) float32 [m], 0 off the mesh."""

    def distance_to_obstacle(self, scene: Tensor, points: Tensor, max_distance: float = 2.0) -> Tensor:
        """Distance to the closest obstacle, at most ``max_distance``: (N,) float32 [m]."""

    def geodesic_distance(self, scene: Tensor, start: Tensor, goal: Tensor) -> Tensor:
        """Length of the shortest walkable path: (N,) float32 [m], infinite where there is none."""

    def path(
        self, scene: Tensor, start: Tensor, goal: Tensor, max_points: int = 128
    ) -> tuple[Tensor, Tensor]:
        """Corners of the shortest path, start and goal included.

        Returns points (N, max_points, 3) float32 [m] and how many of them count (N,) int64, 0 where there is
        no path.
        """

    def try_step(self, scene: Tensor, start: Tensor, target: Tensor, allow_sliding: bool) -> Tensor:
        """Where a move from start straight to target ends: (N, 3) float32 [m]."""

    def sample(self, scene: Tensor, generator: torch.Generator) -> Tensor:
        """A uniformly drawn navigable point for each row: (N, 3) float32 [m]."""


class Simulator(ABC):
    """N agents, each in one of the resident scenes, that move and see in one batched call."""

    num_agents: int
    """Number of agents N."""
    device: torch.device
    """Where every tensor below lives."""
    sensors: tuple[SensorSpec, ...]
    """The cameras that every agent carries."""
    agent: AgentSpec
    """The body that every agent has."""
    scenes: tuple[Path, ...]
    """Files of the resident scenes; ``scene`` indexes this."""
    paths: PathQueries
    """Navigation queries over the resident scenes."""
    scene: Tensor
    """Scene of each agent: (N,) int64."""
    position: Tensor
    """Position of each agent's feet: (N, 3) float32 [m]."""
    yaw: Tensor
    """Heading of each agent: (N,) float32 [rad]."""
    collided: Tensor
    """Whether the last forward move was cut short: (N,) bool."""
    restarts: int = 0
    """How often a process of this simulator died and was started again."""
    process_ids: Sequence[int] = ()
    """Process ids of this simulator's workers, where it has any."""

    @abstractmethod
    def load_scenes(self, scenes: Sequence[Path]) -> None:
        """Makes exactly these scenes resident, keeping those that already are."""

    @abstractmethod
    def reset(self, agents: Tensor, scene: Tensor, position: Tensor, yaw: Tensor) -> None:
        """Puts agents ``(M,)`` int64 into scenes (M,) at positions (M, 3) with headings (M,)."""

    @abstractmethod
    def step(self, actions: Tensor) -> None:
        """Moves every agent by its action (N,) int64 and updates position, yaw and collided."""

    @abstractmethod
    def render(self, agents: Tensor | None = None) -> dict[str, Tensor]:
        """What the agents' sensors see, all of them or those of indices (M,), by sensor name; fresh tensors.

        rgb (N, height, width, 3) uint8; depth (N, height, width) float32 along the optical axis [m], 0 where
        nothing was hit; normals (N, height, width, 3) float32 unit vectors in the camera's frame (x right,
        y up, z towards the viewer), 0 where nothing was hit; instance (N, height, width) int32, 0 where
        nothing was hit.
        """

    def take_deaths(self) -> NDArray[np.bool_]:
        """Which agents' process died and was started again since this was last asked: (N,) bool.

        The agents are where they were all the same, and can go on; always none where there are no processes.
        """
        return np.zeros(self.num_agents, dtype=bool)

    @abstractmethod
    def close(self) -> None:
        """Frees what the simulator holds; calling it twice is harmless."""
