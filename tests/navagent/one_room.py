"""A data set of one empty room with walls of four colours, for tests that train in the real simulator."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import trimesh

from envs.episodes import generate_episodes, read_dataset, write_dataset
from envs.scenes.navmesh_build import navmesh_for
from envs.scenes.navmesh_file import write_navmesh
from envs.scenes.pathfinder import PathFinder
from envs.simulators.base import AgentSpec

TINY = (
    "encoder.weights=random",
    "encoder.image_features=16",
    "memory.hidden_size=16",
    "sensors.height=16",
    "sensors.width=16",
)
"""Settings of an agent that is trained in no time."""

SHORT = (
    "sensors.height=36",
    "sensors.width=36",
    "encoder=simple_cnn",
    "adaptation=scratch",
    "encoder.image_features=8",
    "memory.hidden_size=8",
    "env.max_steps=12",
    "algorithm.total_frames=48",
    "algorithm.num_envs=3",
    "algorithm.num_steps=8",
    "algorithm.num_minibatches=1",
    "imitation.frames=0",
    "evaluation.every_frames=0",
)
"""Settings of two rollouts of a small network that sees through a convolution and learns by reward."""

WALL_COLOURS = ((200, 40, 40), (50, 70, 200), (40, 160, 60), (210, 190, 40))


def write_one_room(folder: Path, size: float = 4.0, num_train: int = 200, num_val: int = 20) -> Path:
    """Writes scene and episodes in the layout of generated data sets; returns the folder."""
    scene = folder / "scenes" / "room" / "room.glb"
    scene.parent.mkdir(parents=True)
    half, height = size / 2, 2.5
    # The file's up is +Z, as of scenes without a stage configuration.
    quads = [([[-half, -half, 0], [half, -half, 0], [half, half, 0], [-half, half, 0]], (150, 120, 90))]
    for turn, colour in enumerate(WALL_COLOURS):
        corners = np.array([[half, half, 0], [half, -half, 0], [half, -half, height], [half, half, height]])
        angle = turn * np.pi / 2
        rotation = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
        quads.append((corners @ np.transpose(rotation), colour))
    pieces = [
        trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], vertex_colors=[(*colour, 255)] * 4, process=False)
        for corners, colour in quads
    ]
    trimesh.Scene(pieces).export(scene)
    navmesh = navmesh_for(scene, AgentSpec(), cache_dir=folder / "cache")
    write_navmesh(navmesh, scene.with_suffix(".navmesh"))
    for seed, (split, count) in enumerate({"train": num_train, "val": num_val}.items()):
        # In an empty room every path is straight.
        episodes = generate_episodes(
            PathFinder([navmesh]), 0, "scenes/room/room.glb", count, seed, straight_ratio=0.0
        )
        write_dataset(episodes, folder / "episodes" / split / f"{split}.json.gz")
    return folder


def write_rooms(room: Path, folder: Path, names: tuple[str, ...]) -> Path:
    """Writes a data set in which the room of another has several names, and the episodes go on in turns."""
    for name in names:
        scene = folder / "scenes" / name / f"{name}.glb"
        scene.parent.mkdir(parents=True)
        for suffix in (".glb", ".navmesh"):
            shutil.copy(room / "scenes" / "room" / f"room{suffix}", scene.with_suffix(suffix))
    for split in ("train", "val"):
        file = Path("episodes") / split / f"{split}.json.gz"
        episodes = [
            dataclasses.replace(episode, scene_id="scenes/{0}/{0}.glb".format(names[number % len(names)]))
            for number, episode in enumerate(read_dataset(room / file))
        ]
        write_dataset(episodes, folder / file)
    return folder
