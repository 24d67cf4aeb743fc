"""PointNav as it was published, by name: body, rules, cameras and noise of each variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from envs.noise import NoiseConfig
from envs.simulators.base import AgentSpec, SensorKind, SensorSpec
from envs.task import PointNavConfig


@dataclass(frozen=True)
class Variant:
    """One published form of the task. Defaults are Habitat's PointNav benchmark of 2019."""

    agent: AgentSpec = field(default_factory=AgentSpec)
    """The body and how it moves."""
    task: PointNavConfig = field(default_factory=PointNavConfig)
    """What ends an episode and what it earns."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """How noisy cameras and motion are."""
    observations: tuple[str, ...] = ("rgb", "depth", "pointgoal_with_gps_compass")
    """What the agent is given."""
    height: int = 256
    """Image rows."""
    width: int = 256
    """Image columns."""
    hfov_deg: float = 90.0
    """Horizontal field of view [deg]."""
    sensor_height: float = 1.25
    """Height of the cameras above the feet [m]."""
    pitch_deg: float = 0.0
    """Tilt of the cameras [deg]; negative looks down."""
    depth_range: tuple[float, float] = (0.0, 10.0)
    """Depths that map to 0 and 1 [m]."""

    def cameras(self, names: Sequence[str]) -> tuple[SensorSpec, ...]:
        """Cameras for those of the names that are kinds of camera, each named after its kind."""
        return tuple(
            SensorSpec(
                name=kind,
                kind=kind,
                height=self.height,
                width=self.width,
                hfov_deg=self.hfov_deg,
                sensor_height=self.sensor_height,
                pitch_deg=self.pitch_deg,
            )
            for kind in get_args(SensorKind)
            if kind in names
        )


HABITAT_2019 = Variant()

_CHALLENGE_2020 = Variant(
    agent=AgentSpec(radius=0.18, height=0.88, turn_angle_deg=30.0, allow_sliding=False),
    task=PointNavConfig(success_distance=0.36),
    noise=NoiseConfig(rgb=0.1, depth=1.0, actuation=0.5),
    observations=("rgb", "depth", "pointgoal"),
    height=360,
    width=640,
    hfov_deg=70.0,
    sensor_height=0.88,
    depth_range=(0.1, 10.0),
)

VARIANTS: dict[str, Variant] = {
    "habitat-2019": HABITAT_2019,
    "pointnav-v1": HABITAT_2019,
    "challenge-2020": _CHALLENGE_2020,
    "challenge-2021": replace(_CHALLENGE_2020, pitch_deg=-20.0),
    "ddppo": replace(HABITAT_2019, task=PointNavConfig(success_bonus="spl")),
    "side-tuning": replace(
        HABITAT_2019,
        task=PointNavConfig(success_reward=10.0, stop="automatic"),
        observations=("rgb", "pointgoal_with_gps_compass"),
    ),
}
"""By name: the benchmark of 2019 (``habitat-2019``, also ``pointnav-v1``); the Habitat challenges (wide
turns, no sliding, LoCoBot's body, noise, and no GPS or compass); DD-PPO's (success pays 2.5 times SPL); and
the side-tuning paper's (three actions, stop is called for the agent, success pays 10)."""


def variant(name: str) -> Variant:
    """A published variant.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant {name!r} is not one of {', '.join(VARIANTS)}")
    return VARIANTS[name]
