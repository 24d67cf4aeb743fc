"""habitat-lab's simulator with the motion noise of the Habitat challenges, which habitat-lab 0.3 left out.

habitat-sim has it still, as ``pyrobot_noisy`` actions. Importing this module imports Habitat, and makes the
simulator known to it; :mod:`navagent.evaluation.habitat_settings` asks for it where motion is noisy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import habitat_sim
import numpy as np
from habitat.config.default_structured_configs import SimulatorConfig
from habitat.core.registry import registry
from habitat.sims.habitat_simulator.habitat_simulator import HabitatSim
from hydra.core.config_store import ConfigStore

from navagent.evaluation.habitat_settings import NOISY_MOTION


class NoisyMotionError(ValueError):
    """Noisy actions of habitat-sim that break down."""


@dataclass
class NoisyMotionConfig(SimulatorConfig):
    """habitat-lab's settings of a simulator, and those of its noise."""

    type: str = NOISY_MOTION
    """Name that habitat-lab knows the simulator by."""
    robot: str = "LoCoBot"
    """Whose motion noise."""
    controller: str = "Proportional"
    """Which of the robot's controllers."""
    noise_multiplier: float = 1.0
    """Strength; 1 is the real robot."""


@registry.register_simulator(name=NOISY_MOTION)
class NoisyMotionSim(HabitatSim):
    """habitat-lab's simulator whose moves and turns err as a LoCoBot's do."""

    def create_sim_config(self, _sensor_suite: Any) -> Any:
        """The settings of habitat-sim, with its noisy actions in place of the exact ones."""
        config, wanted = super().create_sim_config(_sensor_suite), self.habitat_config
        for agent in config.agents:
            for action in agent.action_space.values():
                if action.actuation is not None:
                    action.name = f"pyrobot_noisy_{action.name}"
                    action.actuation = habitat_sim.PyRobotNoisyActuationSpec(
                        amount=action.actuation.amount,
                        robot=wanted.robot,
                        controller=wanted.controller,
                        noise_multiplier=wanted.noise_multiplier,
                    )
        return config

    def step(self, action: Any) -> Any:
        """As habitat-lab's.

        Raises:
            NoisyMotionError: habitat-sim's noise does not work with this version of NumPy.
        """
        try:
            return super().step(action)
        except TypeError as error:
            raise NoisyMotionError(
                f"habitat-sim's noisy actions do not work here with NumPy {np.__version__} ({error}): use "
                "NumPy below 2.4, with a build of habitat-sim that takes it"
            ) from error


ConfigStore.instance().store(group="habitat/simulator", name=NOISY_MOTION, node=NoisyMotionConfig)
