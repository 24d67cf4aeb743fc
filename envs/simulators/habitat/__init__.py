"""Real habitat-sim behind the interface of the built-in simulator, in worker processes."""

from envs.simulators.habitat.simulator import HabitatSimulator, check_habitat, habitat_body

__all__ = ["HabitatSimulator", "check_habitat", "habitat_body"]
