"""How fast the built-in simulator is.

    python benchmarks/simulator.py                              # a generated hall, up to a million triangles
    python benchmarks/simulator.py --apartment apartment.glb    # the whole batched step against its own rays

A step moves every agent (forward with collisions, or a turn) and renders it; steps/s counts agents' steps.
Configurations take turns, round after round, and medians are shown: machines are noisy.

With ``--apartment`` the step of ``PointNavVectorEnv`` (render, move, task; 64x64 depth) is set beside two
casts of the same rays, from the same poses, on the same number of threads: a plain Warp kernel with one mesh
query a ray, and this package's renderer by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import warp as wp
from rich.console import Console
from rich.table import Table

from envs.episodes import generate_episodes
from envs.files import atomic_write
from envs.sampler import EpisodeSampler
from envs.scenes.gltf import load_scene
from envs.scenes.scene import Material, Scene
from envs.simulators.base import AgentSpec, SensorSpec
from envs.simulators.raycast.renderer import Renderer
from envs.simulators.raycast.simulator import RaycastSimulator
from envs.task import PointNavConfig
from envs.vector_env import PointNavVectorEnv


@wp.kernel
def bare_cast(
    mesh: wp.uint64,
    position: wp.array(dtype=wp.vec3),
    heading: wp.array(dtype=wp.vec2),
    size: int,
    step: float,
    lift: float,
    start: int,
    depth: wp.array(dtype=wp.float32),
):
    """Depth of square images, one mesh query a pixel and nothing else."""
    pixel = start + wp.tid()
    agent = pixel // (size * size)
    x = (float(pixel % size) + 0.5 - 0.5 * float(size)) * step
    y = (0.5 * float(size) - float((pixel // size) % size) - 0.5) * step
    sin_yaw = heading[agent][0]
    cos_yaw = heading[agent][1]
    direction = wp.vec3(x * cos_yaw - sin_yaw, y, -x * sin_yaw - cos_yaw)
    hit = wp.mesh_query_ray(mesh, position[agent] + wp.vec3(0.0, lift, 0.0), direction, 1000.0)
    distance = float(0.0)  # noqa: UP018
    if hit.result:
        distance = hit.t
    depth[pixel] = distance


class BareCast:
    """The plain Warp ray cast: a SAH tree, one launch on each thread."""

    def __init__(self, scene: Scene, size: int, lift: float, num_threads: int, device: str) -> None:
        self.mesh = wp.Mesh(
            wp.array(scene.vertices, dtype=wp.vec3, device=device),
            wp.array(scene.triangles.ravel(), dtype=wp.int32, device=device),
            bvh_constructor="sah",
        )
        self.size, self.lift, self.device = size, lift, device
        self.threads = num_threads if device == "cpu" else 1
        self.pool = ThreadPoolExecutor(self.threads)

    def __call__(self, position: torch.Tensor, yaw: torch.Tensor) -> torch.Tensor:
        """Depth (N, size, size) seen from some poses."""
        depth = torch.empty(len(yaw), self.size, self.size, device=position.device)
        heading = torch.stack([torch.sin(yaw), torch.cos(yaw)], dim=1)
        flat = wp.from_torch(depth.view(-1))
        arrays = wp.from_torch(position.contiguous(), dtype=wp.vec3), wp.from_torch(heading, dtype=wp.vec2)
        # Slices as fine as the renderer's, so that neither waits longer for its last one.
        share = -(-depth.numel() // (2 * self.threads))

        def run(start: int) -> None:
            count = min(share, depth.numel() - start)
            inputs = [self.mesh.id, *arrays, self.size, 2.0 / self.size, self.lift, start, flat]
            wp.launch(bare_cast, count, inputs, device=self.device)

        list(self.pool.map(run, range(0, depth.numel(), share)))
        return depth


def hall(num_triangles: int) -> Scene:
    """A textured hall of 12 x 12 m with four pillars, its surfaces cut into that many triangles or more."""
    boxes = [((-6, 0, -6), (6, 3, 6), True)]
    boxes += [((x - 0.5, 0, z - 0.5), (x + 0.5, 3, z + 0.5), False) for x in (-3, 3) for z in (-3, 3)]
    cuts = max(1, math.ceil(math.sqrt(num_triangles / (2 * 6 * len(boxes)))))
    parts: dict[str, list[np.ndarray]] = {"vertices": [], "triangles": [], "uvs": []}
    line = np.linspace(0.0, 1.0, cuts + 1)
    u, v = (axis.ravel() for axis in np.meshgrid(line, line, indexing="ij"))
    corner = (np.arange(cuts)[:, None] * (cuts + 1) + np.arange(cuts)).reshape(-1, 1)
    cells = (corner + np.array([0, cuts + 1, cuts + 2, 0, cuts + 2, 1])).reshape(-1, 3)
    for low, high, inwards in boxes:
        for axis in range(3):
            for end in (low, high):
                first, second = (axis + 1) % 3, (axis + 2) % 3
                grid = np.zeros((len(u), 3))
                grid[:, axis] = end[axis]
                grid[:, first] = low[first] + u * (high[first] - low[first])
                grid[:, second] = low[second] + v * (high[second] - low[second])
                flip = (end is low) != inwards
                parts["triangles"].append(
                    (cells[:, ::-1] if flip else cells) + sum(map(len, parts["vertices"]))
                )
                parts["vertices"].append(grid)
                parts["uvs"].append(grid[:, [first, second]])
    sides = len(parts["triangles"])
    rng = np.random.default_rng(0)
    textures = [np.full((256, 256, 4), 255, np.uint8) for _ in range(sides)]
    for texture in textures:
        texture[..., :3] = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    count = sum(map(len, parts["vertices"]))
    each = np.repeat(np.arange(sides), [len(part) for part in parts["triangles"]]).astype(np.int32)
    return Scene(
        name=f"hall{num_triangles}",
        path=Path(f"hall{num_triangles}.glb"),
        vertices=np.concatenate(parts["vertices"]).astype(np.float32),
        triangles=np.concatenate(parts["triangles"]).astype(np.int32),
        uvs=np.concatenate(parts["uvs"]).astype(np.float32),
        colors=np.ones((count, 4), np.float32),
        material_ids=each,
        instance_ids=each + 1,
        materials=tuple(Material(str(i), texture=texture) for i, texture in enumerate(textures)),
        instance_names=tuple(map(str, range(sides))),
    )


def in_turns(jobs: dict[str, Callable[[], int]], rounds: int, seconds: float) -> dict[str, float]:
    """Median rate of each job, in the units that it counts, over rounds in which all take a turn."""
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(rounds):
        for name, job in jobs.items():
            start, done = time.perf_counter(), 0
            while done == 0 or time.perf_counter() - start < seconds:
                done += job()
            rates[name].append(done / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def sync(device: str) -> None:
    """Waits for a GPU, so that time counts work done and not work queued."""
    if device != "cpu":
        torch.cuda.synchronize()


def stepper(scene: Scene, agents: int, sensor: SensorSpec, threads: int, device: str) -> Callable[[], int]:
    """A job: one random step of all agents, and their images."""
    simulator = RaycastSimulator([scene], agents, [sensor], device=device, num_threads=threads)
    generator = torch.Generator(device=device).manual_seed(0)
    here = torch.zeros(agents, dtype=torch.int64, device=device)
    yaw = torch.rand(agents, generator=generator, device=device) * 2 * math.pi
    everyone = torch.arange(agents, device=device)
    simulator.reset(everyone, here, simulator.paths.sample(here, generator), yaw)

    def step() -> int:
        simulator.step(torch.randint(1, 4, (agents,), generator=generator, device=device))
        simulator.render()
        sync(device)
        return agents

    return step


def by_configuration(arguments: argparse.Namespace) -> list[dict]:
    """Steps/s while one of resolution, agents, triangles changes."""
    base = {"triangles": 1_000, "agents": 32, "size": 64, "kind": "depth"}
    rows = [base | {"size": size, "kind": kind} for kind in ("depth", "rgb") for size in (64, 128, 256)]
    rows += [base | {"agents": agents} for agents in (1, 8, 128, 512)]
    rows += [base | {"triangles": triangles, "kind": kind} for triangles in (100_000, 1_000_000) for kind in
             ("depth", "rgb")]  # fmt: skip
    halls = {count: hall(count) for count in {row["triangles"] for row in rows}}
    jobs = {
        str(number): stepper(
            halls[row["triangles"]],
            row["agents"],
            SensorSpec("camera", row["kind"], row["size"], row["size"]),
            arguments.threads,
            arguments.device,
        )
        for number, row in enumerate(rows)
    }
    rates = in_turns(jobs, arguments.rounds, arguments.seconds)
    for number, row in enumerate(rows):
        row["triangles"] = halls[row["triangles"]].num_triangles
        row["steps_per_s"] = rates[str(number)]
        row["million_rays_per_s"] = rates[str(number)] * row["size"] ** 2 / 1e6
    return rows


def against_bare_cast(arguments: argparse.Namespace) -> list[dict]:
    """Rates of the whole PointNav step and of two bare casts of the same rays, in frames/s."""
    path: Path = arguments.apartment
    about = path.with_suffix(".json")
    body = json.loads(about.read_text()) if about.is_file() else {}
    agent = AgentSpec(radius=body.get("agent_radius", 0.1), height=body.get("agent_height", 1.5))
    lift = body.get("sensor_height", 1.25)
    scene, threads, device, size = load_scene(path), arguments.threads, arguments.device, 64
    rows = []
    for agents in (8, 32, 128):
        sensor = SensorSpec("depth", "depth", size, size, 90.0, lift)
        simulator = RaycastSimulator([path], agents, [sensor], agent, device, threads)
        episodes = generate_episodes(simulator.paths, 0, path.name, 200, seed=0)
        sampler = EpisodeSampler(episodes, agents, {path.name: path})
        observations = ["depth", "pointgoal_with_gps_compass"]
        env = PointNavVectorEnv(simulator, PointNavConfig(), sampler, observations)
        env.reset(seed=0)
        generator = torch.Generator(device=device).manual_seed(0)
        bare = BareCast(scene, size, lift, threads, device)
        renderer = Renderer([sensor], device, threads)
        renderer.load_scenes([scene])

        def step(env=env, generator=generator, agents=agents) -> int:
            # Stopping ends an episode; a random agent would do nothing else.
            env.step(torch.randint(1, 4, (agents,), generator=generator, device=device))
            sync(device)
            return agents

        def mesh_query(bare=bare, simulator=simulator, agents=agents) -> int:
            bare(simulator.position, simulator.yaw)
            sync(device)
            return agents

        def blocks(renderer=renderer, simulator=simulator, agents=agents) -> int:
            renderer.render(simulator.scene, simulator.position, simulator.yaw)
            sync(device)
            return agents

        jobs = {"step": step, "mesh_query": mesh_query, "renderer": blocks}
        rates = in_turns(jobs, arguments.rounds, arguments.seconds)
        rows.append(
            {
                "agents": agents,
                "step_frames_per_s": rates["step"],
                "mesh_query_frames_per_s": rates["mesh_query"],
                "renderer_frames_per_s": rates["renderer"],
                "step_over_mesh_query": rates["step"] / rates["mesh_query"],
                "step_over_renderer": rates["step"] / rates["renderer"],
            }
        )
        env.close()
    return rows


def show(rows: list[dict], title: str) -> None:
    """Prints rows as a table."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_format(value) for value in row.values()))
    Console().print(table)


def _format(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else value


def main() -> None:
    """Runs the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--apartment", type=Path, help="scene file for the comparison with a bare ray cast")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads on the CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each configuration takes")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a turn")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.apartment is None:
        rows, title = by_configuration(arguments), "Simulator: move and render"
    else:
        rows, title = (
            against_bare_cast(arguments),
            f"PointNav step against bare casts, {arguments.apartment.name}",
        )
    show(rows, f"{title}, {arguments.threads} threads, {arguments.device}")
    if arguments.out is not None:
        report = {
            "title": title,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "threads": arguments.threads,
            "device": arguments.device,
            "warp": wp.config.version,
            "torch": torch.__version__,
            "rows": rows,
        }
        with atomic_write(arguments.out) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
