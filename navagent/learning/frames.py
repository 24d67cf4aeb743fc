"""Images of homes with ground truth for perception tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from navagent.learning.perception import MAX_DEPTH, TASKS, Render
from policies.weights import read_safetensors, save_safetensors

SENSORS = {"rgb": 3, "depth": 1}
"""Sensors that an encoder can be trained for, and their channels."""


@dataclass(frozen=True)
class View:
    """What is looked at, and how."""

    dataset: Path
    """Folder of a data set with ``scenes/`` and ``episodes/{train,val}``."""
    sensor: str = "rgb"
    """What the image shows: "rgb" or "depth"."""
    tasks: tuple[str, ...] = ("normals",)
    """Tasks to give ground truth for, see :data:`~navagent.learning.perception.TASKS`."""
    height: int = 64
    """Image rows."""
    width: int = 64
    """Image columns."""
    hfov_deg: float = 90.0
    """Horizontal field of view [deg]."""
    sensor_height: float = 1.25
    """Height of the camera above the floor [m]."""
    device: str = "cpu"
    """Where to render."""

    def __post_init__(self) -> None:
        for name, values, known in (("sensor", (self.sensor,), SENSORS), ("task", self.tasks, TASKS)):
            for value in values:
                if value not in known:
                    raise ValueError(f"{name} {value!r}: expected one of {', '.join(known)}")


@dataclass(frozen=True)
class Frames:
    """Images and their ground truth, on the CPU."""

    image: Tensor
    """(N, H, W, 3) uint8, or depth (N, H, W, 1) float16 in 0..1."""
    targets: dict[str, Tensor]
    """By task, (N, C, H, W) float16; NaN where there is nothing to predict."""

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Frames:
        return Frames(self.image[rows], {task: target[rows] for task, target in self.targets.items()})

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Writes the frames to a file, with what they are of in its header."""
        save_safetensors(
            path, {"image": self.image, **{f"target.{k}": v for k, v in self.targets.items()}}, about
        )

    @staticmethod
    def load(path: Path) -> Frames:
        """Reads what :meth:`save` wrote."""
        tensors = read_safetensors(path).tensors
        targets = {k.removeprefix("target."): v for k, v in tensors.items() if k != "image"}
        return Frames(tensors["image"], targets)


FrameSource = Callable[[View, str, int, int], Frames]
"""Renders frames, given the view, the split, the number of frames and a seed."""


def render_frames(view: View, split: str, num_frames: int, seed: int) -> Frames:
    """Frames at random standpoints and headings in the homes of a split, equally many in each."""
    from envs.simulators.base import SensorSpec
    from envs.simulators.raycast.simulator import RaycastSimulator

    starts = split_starts(view.dataset, split)
    shape = (view.height, view.width)
    camera: dict[str, Any] = {
        "height": view.height,
        "width": view.width,
        "hfov_deg": view.hfov_deg,
        "sensor_height": view.sensor_height,
    }
    needed: set[Render] = {kind for task in view.tasks for kind in TASKS[task].needs}
    sensors = [
        SensorSpec(name=kind, kind=kind, **camera)  # type: ignore[arg-type]
        for kind in sorted({view.sensor, *needed})
    ]
    pixel = torch.uint8 if view.sensor == "rgb" else torch.float16
    frames = Frames(
        torch.empty(num_frames, *shape, SENSORS[view.sensor], dtype=pixel),
        {t: torch.empty(num_frames, TASKS[t].channels, *shape, dtype=torch.float16) for t in view.tasks},
    )
    agents = min(128, num_frames)
    generator = torch.Generator(device=view.device).manual_seed(seed)
    filled = 0
    for index, (scene, start) in enumerate(starts.items()):
        wanted = num_frames * (index + 1) // len(starts)
        if wanted == filled:
            continue
        simulator = RaycastSimulator([scene], agents, sensors, device=view.device)
        here = torch.zeros(agents, dtype=torch.int64, device=view.device)
        known = torch.tensor(start, device=view.device).expand(agents, 3)
        while filled < wanted:
            position = simulator.paths.sample(here, generator)
            yaw = torch.rand(agents, generator=generator, device=view.device) * (2 * math.pi)
            simulator.reset(torch.arange(agents, device=view.device), here, position, yaw)
            # Where an episode's agent can get to, and not the roof or the top of a table.
            inside = simulator.paths.geodesic_distance(here, known, position).isfinite()
            seen = simulator.render(inside.nonzero()[: wanted - filled, 0])
            rows = slice(filled, filled + len(seen[view.sensor]))
            frames.image[rows] = _as_image(view.sensor, seen[view.sensor]).to(frames.image)
            for task, target in frames.targets.items():
                truth = TASKS[task].target(seen.get("depth"), seen.get("normals"), view.hfov_deg)
                target[rows] = truth.to(target)
            filled = rows.stop
        simulator.close()
    return frames


def _as_image(sensor: str, pixels: Tensor) -> Tensor:
    return pixels if sensor == "rgb" else (pixels / MAX_DEPTH).clamp(0, 1)[..., None]


def split_starts(dataset: Path, split: str) -> dict[Path, tuple[float, float, float]]:
    """Scenes that the episodes of a split are set in, and where one of these starts in each."""
    from envs.episodes import find_scene, read_dataset

    episodes = read_dataset(Path(dataset) / "episodes" / split / f"{split}.json.gz")
    starts = {episode.scene_id: episode.start_position for episode in episodes}
    return {find_scene(scene, Path(dataset)): starts[scene] for scene in sorted(starts)}


def describe_dataset(dataset: Path) -> Any:
    """The settings that a data set was generated with, or the name of one that does not say."""
    about = Path(dataset) / "dataset.json"
    settings = json.loads(about.read_text()).get("settings") if about.is_file() else None
    return settings or Path(dataset).name
