"""Noise of real sensors and motors, batched: colour, depth and motion, as in the Habitat challenges.

Every model draws from the ``torch.Generator`` it is given, so that its state can be saved with the episode's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from envs.simulators.base import Action, Simulator

Robot = Literal["LoCoBot", "LoCoBot-Lite"]
Controller = Literal["ILQR", "Proportional", "Movebase"]


@dataclass(frozen=True)
class NoiseConfig:
    """How noisy sensing and motion are; 0 switches a model off. Defaults are exact."""

    rgb: float = 0.0
    """Standard deviation of the Gaussian noise of colours, of 1; the challenges use 0.1."""
    depth: float = 0.0
    """Strength of the Redwood depth noise; 1 is the real sensor."""
    actuation: float = 0.0
    """Strength of the motion noise; 1 is the real robot, the challenges use 0.5."""
    robot: Robot = "LoCoBot"
    """Whose motion noise."""
    controller: Controller = "Proportional"
    """Which of the robot's controllers; the challenges use Proportional."""

    def __post_init__(self) -> None:
        for field in ("rgb", "depth", "actuation"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field} noise {getattr(self, field)} must be at least 0")
        if (self.robot, self.controller) not in PYROBOT:
            known = ", ".join(f"{robot}/{controller}" for robot, controller in PYROBOT)
            raise ValueError(f"no motion noise for {self.robot!r}/{self.controller!r}; there are {known}")


class MotionNoise(NamedTuple):
    """Mean and variance of three errors: along the move [m], to its right [m], in heading [rad]."""

    mean: tuple[float, float, float]
    variance: tuple[float, float, float]


PYROBOT: dict[tuple[str, str], tuple[MotionNoise, MotionNoise]] = {
    ("LoCoBot", "ILQR"): (
        MotionNoise((0.014, 0.009, 0.008), (0.006, 0.005, 0.004)),
        MotionNoise((0.003, 0.003, 0.023), (0.002, 0.003, 0.012)),
    ),
    ("LoCoBot", "Proportional"): (
        MotionNoise((0.017, 0.042, 0.031), (0.007, 0.023, 0.026)),
        MotionNoise((0.001, 0.005, 0.043), (0.001, 0.004, 0.017)),
    ),
    ("LoCoBot", "Movebase"): (
        MotionNoise((0.074, 0.036, 0.189), (0.019, 0.033, 0.038)),
        MotionNoise((0.002, 0.003, 0.219), (0.0, 0.002, 0.019)),
    ),
    ("LoCoBot-Lite", "ILQR"): (
        MotionNoise((0.142, 0.023, 0.031), (0.008, 0.008, 0.028)),
        MotionNoise((0.002, 0.002, 0.122), (0.001, 0.002, 0.03)),
    ),
    ("LoCoBot-Lite", "Proportional"): (
        MotionNoise((0.135, 0.043, 0.049), (0.007, 0.009, 0.009)),
        MotionNoise((0.002, 0.002, 0.054), (0.002, 0.001, 0.061)),
    ),
    ("LoCoBot-Lite", "Movebase"): (
        MotionNoise((0.192, 0.117, 0.128), (0.055, 0.144, 0.143)),
        MotionNoise((0.002, 0.001, 0.173), (0.001, 0.001, 0.025)),
    ),
}
"""Errors of a forward move and of a turn, by robot and controller, as PyRobot measured them."""

_LEAST_SHARE = 0.05  # a noisy move never undoes more than 95 % of what was asked for
_COLLISION_EPS = 1e-5  # [m2] squared length by which a move must be cut short to count as a collision


def gaussian_rgb(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Adds Gaussian noise of standard deviation sigma (of 1) to a uint8 image, as Habitat does."""
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    noisy = (image / 255.0 + sigma * noise).clamp(0.0, 1.0) * 255.0
    return noisy.to(torch.uint8)


def redwood_depth(depth: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """The Redwood model of a PrimeSense depth camera, as Habitat uses it.

    Pixels are displaced by a quarter of a pixel (standard deviation), the image is halved in resolution, and
    the disparity gets noise and is rounded to an eighth; beyond 10 m nothing is seen. Left out is the table
    of one camera's lens distortion (a factor of depth within a few per cent of 1) that Habitat also applies.

    Args:
        depth: (N, height, width) [m], 0 where nothing was hit.
        strength: multiplies the displacement and the disparity noise; the rounding stays.
        generator: source of the noise.

    Returns:
        Depth with noise, (N, height, width) [m], 0 where the camera would see nothing.
    """
    count, height, width = depth.shape
    noise = torch.randn(3, count, height, width, generator=generator, device=depth.device)
    rows = torch.arange(height, device=depth.device)[None, :, None]
    columns = torch.arange(width, device=depth.device)[None, None, :]
    row = ((rows + noise[0] * (0.25 * strength)).clamp(0, height - 1) + 0.5).long()
    column = ((columns + noise[1] * (0.25 * strength)).clamp(0, width - 1) + 0.5).long()
    view = torch.arange(count, device=depth.device)[:, None, None]
    seen = depth[view, row - row % 2, column - column % 2]
    disparity = torch.round((35.130 / seen + noise[2] * (0.027778 * strength)) * 8.0)
    noisy = 35.130 * 8.0 / disparity
    return torch.where((seen > 1e-5) & (seen < 10.0) & (disparity > 1e-5), noisy, 0.0)


def truncated_normal(mean: Tensor, deviation: Tensor, low: Tensor, high: Tensor, share: Tensor) -> Tensor:
    """Normal distributions cut at low and high, both in standard deviations from the mean.

    ``share``, uniform in 0..1, says how much of each distribution lies below the value.
    """
    below, above = torch.special.ndtr(low), torch.special.ndtr(high)
    return mean + deviation * torch.special.ndtri(below + share * (above - below))


class ActuationNoise:
    """Moves agents as a real robot would: every move and turn with errors along, across and in heading.

    The errors are normal, cut at three standard deviations and where one would undo more than 95 % of what
    was asked, as in Habitat's ``pyrobotnoisy`` actions; the translation is then filtered through the
    navigation mesh, so that a turn can collide too.

    Args:
        config: robot, controller and strength.
        generator: source of the noise, on the simulator's device.
    """

    def __init__(self, config: NoiseConfig, generator: torch.Generator) -> None:
        self.strength = config.actuation
        self.generator = generator
        self._forward, self._turn = PYROBOT[config.robot, config.controller]

    def step(self, simulator: Simulator, actions: Tensor) -> Tensor:
        """Moves every agent by its action (N,) int64 and returns who collided: (N,) bool."""
        agent, yaw, position = simulator.agent, simulator.yaw, simulator.position
        forward = actions == int(Action.MOVE_FORWARD)
        left = actions == int(Action.TURN_LEFT)
        turning = left | (actions == int(Action.TURN_RIGHT))
        acting = forward | turning
        angle = math.radians(agent.turn_angle_deg)

        # Columns: along the move, to its right, heading; what is asked for bounds how far back it may go.
        asked = torch.stack(
            [agent.forward_step * forward, torch.zeros_like(yaw), angle * turning], dim=1
        ).double()
        mean = self._choose(forward, self._forward.mean, self._turn.mean)
        deviation = self._choose(forward, self._forward.variance, self._turn.variance).sqrt()
        back = -(1.0 - _LEAST_SHARE) * asked
        low = torch.where(asked > 0, (back - mean) / deviation.clamp(min=1e-12), -3.0).clamp(-3.0, 3.0)
        error = truncated_normal(mean, deviation, low, torch.full_like(low, 3.0), self.draw(mean.shape))
        along, right, turned = (asked + self.strength * error).mul(acting[:, None]).float().unbind(dim=1)
        # A move forward veers either way as drawn; a turn errs in the direction of the turn.
        turned = torch.where(actions == int(Action.TURN_RIGHT), -turned, turned)

        sin, cos = torch.sin(yaw), torch.cos(yaw)
        zero = torch.zeros_like(yaw)
        move = torch.stack([-sin * along + cos * right, zero, -cos * along - sin * right], dim=1)
        end = simulator.paths.try_step(simulator.scene, position, position + move, agent.allow_sliding)
        end = torch.where(acting[:, None], end, position)
        collided = acting & ((end - position).square().sum(1) + _COLLISION_EPS < move.square().sum(1))
        agents = torch.arange(simulator.num_agents, device=simulator.device)
        simulator.reset(agents, simulator.scene.clone(), end, yaw + turned)
        return collided

    def draw(self, shape: torch.Size) -> Tensor:
        """Uniform numbers in 0..1, (N, 3) float64: a subclass may take them from elsewhere."""
        device = self.generator.device
        return torch.rand(shape, generator=self.generator, device=device, dtype=torch.float64)

    @staticmethod
    def _choose(forward: Tensor, of_move: tuple[float, ...], of_turn: tuple[float, ...]) -> Tensor:
        values = torch.tensor([of_turn, of_move], dtype=torch.float64, device=forward.device)
        return values[forward.long()]
