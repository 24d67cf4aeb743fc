"""How fast habitat-sim is through the workers of this package.

    python benchmarks/habitat_workers.py                              # halls of 1,000 and 100,000 triangles
    python benchmarks/habitat_workers.py --scene apartment.glb --sizes 64 256 --processes 1 2 4

Beside it are habitat-lab's own ``VectorEnv``, one environment a process as it has it, and the built-in
simulator on as many threads. All play the same PointNav episodes with random moves and turns, and see depth;
steps/s counts agents' steps, with goal sensor, reward, measures and new episodes. Contestants take turns,
round after round, and medians are shown: machines are noisy. Needs habitat-sim and habitat-lab.

Without a GPU, Mesa draws on the processor, and in each process on as many threads as there are cores. The
workers here have their share of the cores; ``VectorEnv`` is shown as it comes and with the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from simulator import hall, in_turns, show

from envs.episodes import generate_episodes, write_dataset
from envs.files import atomic_write
from envs.make import load_split
from envs.sampler import EpisodeSampler
from envs.scenes.gltf import load_scene
from envs.scenes.homes.export import to_glb
from envs.scenes.homes.mesh import Surface
from envs.scenes.homes.style import Paint
from envs.scenes.navmesh_build import build_navmesh, navmesh_for
from envs.scenes.navmesh_file import write_navmesh
from envs.scenes.pathfinder import PathFinder
from envs.simulators.base import AgentSpec, SensorSpec
from envs.simulators.habitat import HabitatSimulator
from envs.simulators.raycast import RaycastSimulator
from envs.task import PointNavConfig
from envs.vector_env import PointNavVectorEnv
from navagent.config import load_config
from navagent.evaluation.habitat_settings import habitat_settings, to_hydra

OBSERVATIONS = ("depth", "pointgoal_with_gps_compass")
MOVES = (1, 4)
"""Forward, left and right; stopping ends an episode, and a random agent would do nothing else."""


def write_hall(folder: Path, num_triangles: int, navmesh: Path) -> Path:
    """Writes a hall as a scene with a navigation mesh that fits halls of any number of triangles."""
    scene = hall(num_triangles)
    surfaces, materials = {}, {}
    for number, material in enumerate(scene.materials):
        assert material.texture is not None
        materials[str(number)] = Paint(material.texture[..., :3], 1.0)
        used, triangles = np.unique(scene.triangles[scene.material_ids == number], return_inverse=True)
        surfaces[str(number)] = {
            str(number): Surface(
                scene.vertices[used],
                scene.uvs[used],
                np.full((len(used), 4), 255, np.uint8),
                triangles.reshape(-1, 3).astype(np.uint32),
            )
        }
    file = folder / f"hall{num_triangles}.glb"
    file.write_bytes(to_glb(surfaces, materials))
    up = {"render_asset": file.name, "up": [0, 1, 0], "front": [0, 0, -1]}
    file.with_suffix(".stage_config.json").write_text(json.dumps(up))
    if not navmesh.is_file():
        write_navmesh(build_navmesh(scene.vertices, scene.ground, AgentSpec()), navmesh)
    file.with_suffix(".navmesh").write_bytes(navmesh.read_bytes())
    return file


def write_episodes(scene: Path, folder: Path) -> Path:
    """Writes 200 episodes in a scene; returns the split's file."""
    paths = PathFinder([navmesh_for(scene, AgentSpec())])
    file = folder / scene.stem / "val" / "val.json.gz"
    write_dataset(generate_episodes(paths, 0, scene.name, 200, seed=0), file)
    return file


@contextmanager
def mesa_threads(count: int | None) -> Iterator[None]:
    """Lets Mesa draw on so many threads in processes that are started meanwhile."""
    before = os.environ.pop("LP_NUM_THREADS", None)
    if count is not None:
        os.environ["LP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        os.environ.pop("LP_NUM_THREADS", None)
        if before is not None:
            os.environ["LP_NUM_THREADS"] = before


def habitat_lab(
    stack: ExitStack, file: Path, scene: Path, size: int, processes: int, gpu: int, threads: int | None
) -> Callable[[], int]:
    """A job: one step of habitat-lab's ``VectorEnv``."""
    import habitat
    from habitat.gym import make_gym_from_config

    config = load_config(["sensors=depth", f"sensors.height={size}", f"sensors.width={size}"])
    settings = habitat_settings(config, file, scene.parent, gpu=gpu)
    settings["habitat"]["environment"]["iterator_options"] = {"cycle": True, "shuffle": True}
    written = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "habitat.yaml"
    written.write_text(to_hydra(settings, "What the benchmark runs."))
    asked = habitat.get_config(str(written))
    with mesa_threads(threads):
        envs = habitat.VectorEnv(
            make_gym_from_config,
            [(asked,)] * processes,
            # Workers that are forked from a server would have the environment variables of the first ones.
            multiprocessing_start_method="spawn",
        )
    stack.callback(envs.close)
    envs.reset()
    generator = np.random.default_rng(0)

    def step() -> int:
        found = envs.step(generator.integers(*MOVES, processes).tolist())
        depth = np.stack([observations["depth"] for observations, *_ in found])
        assert depth.shape == (processes, size, size, 1)
        return processes

    return step


def here(
    stack: ExitStack, file: Path, scene: Path, size: int, processes: int, gpu: int, agents: int, kind: str
) -> Callable[[], int]:
    """A job: one step of this package's environment over one of its simulators."""
    episodes, scenes = load_split(file, "val", scene.parent)
    sampler = EpisodeSampler(episodes, agents, scenes)
    sensors = [SensorSpec("depth", "depth", size, size)]
    simulator: Any
    if kind == "habitat":
        simulator = HabitatSimulator([scene], agents, sensors, num_workers=processes, gpu_ids=[gpu])
    else:
        simulator = RaycastSimulator([scene], agents, sensors, num_threads=processes)
    env = PointNavVectorEnv(simulator, PointNavConfig(), sampler, OBSERVATIONS)
    stack.callback(env.close)
    env.reset(seed=0)
    generator = torch.Generator().manual_seed(0)

    def step() -> int:
        env.step(torch.randint(*MOVES, (agents,), generator=generator))
        return agents

    return step


def measure(arguments: argparse.Namespace, scene: Path, file: Path, size: int, processes: int) -> dict:
    """Rates of all contestants in one configuration."""
    share = (os.cpu_count() or 1) // processes
    with ExitStack() as stack:
        where = (stack, file, scene, size, processes, arguments.gpu)
        jobs = {"habitat_lab": habitat_lab(*where, None)}
        if arguments.gpu < 0:
            jobs["habitat_lab_same_threads"] = habitat_lab(*where, share if share > 1 else 0)
        for agents in arguments.agents:
            jobs[f"workers_{agents}_agents_each"] = here(*where, agents * processes, "habitat")
        most = max(arguments.agents)
        jobs[f"built_in_{most}_agents_each"] = here(*where, most * processes, "raycast")
        rates = in_turns(jobs, arguments.rounds, arguments.seconds)
    lab = max(rate for name, rate in rates.items() if name.startswith("habitat_lab"))
    row: dict[str, Any] = {
        "triangles": load_scene(scene).num_triangles,
        "size": size,
        "processes": processes,
        **rates,
    }
    for agents in arguments.agents:
        row[f"{agents}_each_over_lab"] = rates[f"workers_{agents}_agents_each"] / lab
    return row


def main() -> None:
    """Runs the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scene", type=Path, action="append", help="scene file, in place of halls")
    parser.add_argument("--triangles", type=int, nargs="+", default=[1_000, 100_000], help="of the halls")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], help="sides of images")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="workers")
    parser.add_argument("--agents", type=int, nargs="+", default=[1, 8], help="agents of each worker here")
    parser.add_argument("--gpu", type=int, default=-1, help="device that draws; -1 is software")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contestant takes")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--all", action="store_true", help="every combination; otherwise one thing changes")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    for name, value in (("HABITAT_SIM_LOG", "quiet"), ("MAGNUM_LOG", "quiet"), ("GLOG_minloglevel", "2")):
        os.environ.setdefault(name, value)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scenes = arguments.scene or [
            write_hall(folder, count, folder / "hall.navmesh") for count in arguments.triangles
        ]
        scenes = [scene.absolute() for scene in scenes]
        files = {scene: write_episodes(scene, folder) for scene in scenes}
        everything = [(s, size, n) for s in scenes for size in arguments.sizes for n in arguments.processes]
        usual = (scenes[0], arguments.sizes[0], arguments.processes[min(1, len(arguments.processes) - 1)])
        for chosen in everything:
            if not arguments.all and sum(a != b for a, b in zip(chosen, usual, strict=True)) > 1:
                continue
            scene, size, processes = chosen
            rows.append(measure(arguments, scene, files[scene], size, processes))
            print(json.dumps(rows[-1]), flush=True)
    title = (
        f"PointNav with depth in habitat-sim, {'software' if arguments.gpu < 0 else f'GPU {arguments.gpu}'}"
    )
    show(rows, title)
    if arguments.out is not None:
        report = {
            "title": title,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "rows": rows,
        }
        with atomic_write(arguments.out) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
