"""habitat-sim in worker processes, each on a GPU of its own or rendering in software."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from envs.cores import usable_cores
from envs.simulators.base import AgentSpec, SensorSpec
from envs.simulators.workers.pool import Body, WorkerPool
from envs.simulators.workers.simulator import WorkerSimulator

NO_MAP = "flat-scenes-need-no-environment.hdr"
"""The name of no file: see :func:`envs.simulators.habitat.body.simulator_of`."""
SOFTWARE = -1
"""The number of no GPU: Mesa renders on the processor."""

_ADVICE = (
    "docs/habitat.md says what its errors mean, and `navagent doctor` looks at the installation. Where "
    "memory runs out, use fewer simulator.workers or simulator.resident_scenes. Where habitat-sim is "
    "missing, install it into the environment of this Python, or name the Python that has it "
    "(simulator.python=FILE)"
)


def habitat_body(
    sensors: Sequence[SensorSpec],
    agent: AgentSpec,
    num_workers: int,
    gpu_ids: Sequence[int] = (SOFTWARE,),
    scene_dataset_config: str | Path | None = None,
    python: str | None = None,
) -> Body:
    """What workers of habitat-sim are.

    Args:
        sensors: The cameras of each agent.
        agent: The agents' body.
        num_workers: How many processes.
        gpu_ids: GPUs that the workers are spread over, by CUDA's numbers; :data:`SOFTWARE` is none.
        scene_dataset_config: Habitat's ``*.scene_dataset_config.json`` that the scenes belong to, if any.
        python: The Python that has habitat-sim; the one that runs this if None.

    Raises:
        ValueError: habitat-sim has no such camera, or a number is out of range.
    """
    if num_workers < 1 or not gpu_ids or min(gpu_ids) < SOFTWARE:
        raise ValueError(
            f"{num_workers} workers on GPUs {list(gpu_ids)}: expected at least 1, on -1, 0, 1 ..."
        )
    for sensor in sensors:
        if sensor.kind == "normals":
            raise ValueError(
                f"sensor {sensor.name!r}: habitat-sim draws rgb, depth and instance, not normals"
            )
    dataset = None if scene_dataset_config is None else str(Path(scene_dataset_config).absolute())
    shared = {
        "sensors": [asdict(s) for s in sensors],
        "agent": asdict(agent),
        "scene_dataset_config": dataset,
        "no_map": NO_MAP,
    }
    cores = usable_cores()
    environment = {
        # Errors are still told.
        "HABITAT_SIM_LOG": "quiet",
        "MAGNUM_LOG": "quiet",
        "OMP_NUM_THREADS": "1",
    }
    if set(gpu_ids) == {SOFTWARE}:
        # Mesa would give each worker as many threads as there are cores; 0 draws on the worker's own.
        environment["LP_NUM_THREADS"] = str(cores // num_workers if cores // num_workers > 1 else 0)
    settings = [{**shared, "gpu_device_id": gpu_ids[k % len(gpu_ids)]} for k in range(num_workers)]
    file = Path(__file__).with_name("body.py")
    # habitat-sim takes PyTorch where it is, which costs each worker seconds and 200 MB for nothing.
    hidden = ["torch"]
    # It complains of the file that is not there, and of each scene that has no semantic annotations.
    grumbles = [NO_MAP, "SSD Load Failure"]
    return Body("habitat-sim", file, "HabitatBody", settings, environment, python, _ADVICE, hidden, grumbles)


class HabitatSimulator(WorkerSimulator):
    """N agents over K scenes in habitat-sim.

    Example::

        simulator = HabitatSimulator([Path("home.glb")], 8, [SensorSpec("depth", "depth")], num_workers=2)
        scene = torch.zeros(8, dtype=torch.int64)
        start = simulator.paths.sample(scene, torch.Generator().manual_seed(0))
        simulator.reset(torch.arange(8), scene, start, torch.zeros(8))
        depth = simulator.render()["depth"]  # (8, 128, 128) [m]

    Args:
        scenes: The resident scenes.
        num_agents: Number of agents N.
        sensors: The cameras that every agent carries: rgb, depth or instance.
        agent: The body that every agent has.
        num_workers: Processes that share the agents; at most one for each is started.
        gpu_ids: GPUs that they are spread over; -1 is none.
        scene_dataset_config: Habitat's description of the data set that the scenes belong to, if any.
        python: The Python that has habitat-sim; the one that runs this if None.
        device: Where tensors live.
        max_restarts: How many deaths of workers are made good before one is an error.

    Raises:
        SimulatorError: habitat-sim does not start; in its words.
    """

    def __init__(
        self,
        scenes: Sequence[str | Path],
        num_agents: int,
        sensors: Sequence[SensorSpec],
        agent: AgentSpec | None = None,
        num_workers: int = 1,
        gpu_ids: Sequence[int] = (SOFTWARE,),
        scene_dataset_config: str | Path | None = None,
        python: str | None = None,
        device: str | torch.device = "cpu",
        max_restarts: int = 10,
    ) -> None:
        agent = AgentSpec() if agent is None else agent
        workers = max(1, min(num_workers, num_agents))
        body = habitat_body(sensors, agent, workers, gpu_ids, scene_dataset_config, python)
        super().__init__(scenes, num_agents, sensors, body, agent, device, max_restarts)


def check_habitat(
    sensors: Sequence[SensorSpec],
    gpu_ids: Sequence[int] = (SOFTWARE,),
    python: str | None = None,
    scene_dataset_config: str | Path | None = None,
) -> None:
    """Starts habitat-sim once on each of some GPUs, without a scene.

    Raises:
        SimulatorError: it does not start; in its words, and with what to do.
    """
    gpus = sorted(set(gpu_ids))
    body = habitat_body(sensors, AgentSpec(), len(gpus), gpus, scene_dataset_config, python)
    WorkerPool(body, sensors, 1).close()
