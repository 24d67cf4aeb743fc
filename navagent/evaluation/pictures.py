"""Pictures of evaluated episodes: the map with the agent's path, the view it started with, and the video."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.scenes.maps import TopDownMap, draw_map, draw_places, floor_heights, top_down_map
from envs.scenes.pathfinder import PathFinder
from envs.simulators.base import SensorSpec
from envs.simulators.raycast import RaycastSimulator
from navagent.build import agent_spec, set_threads, training_device
from navagent.config import TrainConfig
from navagent.evaluation.results import EpisodeResult
from navagent.evaluation.video import FRAMES_PER_SECOND, depth_picture, frame

Image = NDArray[np.uint8]

_BATCH = 16
"""Frames that are rendered in one call."""
_MAX_FRAMES = 300
"""Frames of a video; longer episodes skip steps evenly."""
_HOLD_SECONDS = 1.5
"""How long the last frame stays."""


class Studio:
    """Draws what happened in one scene.

    The cameras have the agent's place and field of view but more pixels, so that people see something too.

    Args:
        scene: The scene's file.
        config: Settings of the run whose agent is shown.
        size: Longer side of camera pictures [pixels].
        map_size: Longer side of maps [pixels].
    """

    def __init__(self, scene: Path, config: TrainConfig, size: int = 360, map_size: int = 640) -> None:
        sensors = config.sensors
        scale = size / max(sensors.height, sensors.width)
        height, width = max(2, round(sensors.height * scale)), max(2, round(sensors.width * scale))
        place = (height, width, sensors.hfov_deg, sensors.sensor_height, sensors.pitch_deg)
        cameras = [SensorSpec("rgb", "rgb", *place)]
        if sensors.depth:
            cameras.append(SensorSpec("depth", "depth", *place))
        self.simulator = RaycastSimulator(
            [scene],
            _BATCH,
            cameras,
            agent_spec(config),
            device=str(training_device(config.device)),
            num_threads=set_threads(config.num_threads),
        )
        assert isinstance(self.simulator.paths, PathFinder)
        self.navmesh = self.simulator.paths.navmeshes[0]
        self.config = config
        self._map_size = map_size
        # Rooms smaller than a floor must be still have a height.
        self._floors = floor_heights(self.navmesh) or [float(np.median(self.navmesh.vertices[:, 1]))]
        self._maps: dict[float, TopDownMap] = {}

    def close(self) -> None:
        """Frees the simulator."""
        self.simulator.close()

    def map(self, result: EpisodeResult) -> Image:
        """Map of the floor that the episode ends on, with its whole path: (H, W, 3) uint8 RGB."""
        return self._map(result, len(result.positions) - 1)

    def departures(self, results: Sequence[EpisodeResult]) -> Image:
        """Map of where agents were in some episodes of this scene, and where they left the expert's action.

        It shows the floor on which most of that was: (H, W, 3) uint8 RGB.
        """
        places = np.concatenate([result.positions[:-1] for result in results])
        choices = np.concatenate([result.choices for result in results])
        left = choices[:, 0] != choices[:, 1]
        counted = left if left.any() else np.ones_like(left)
        distances = np.abs(places[:, 1, None] - np.array(self._floors)[None])
        own = distances.argmin(axis=1)
        floor = int(np.bincount(own[counted], minlength=len(self._floors)).argmax())
        here = own == floor
        return draw_places(self._floor(self._floors[floor]), places[here], places[here & left])

    def view(self, result: EpisodeResult) -> Image:
        """What a colour camera saw at the start: (H, W, 3) uint8 RGB."""
        return next(self._views(result, [0]))["rgb"]

    def video(self, result: EpisodeResult) -> Iterator[Image]:
        """Frames of the episode: camera pictures and the map so far, side by side."""
        last = len(result.positions) - 1
        steps = np.unique(np.linspace(0, last, min(last + 1, _MAX_FRAMES)).round().astype(int)).tolist()
        distances = self._distances(result)
        verdict = f"success, SPL {result.spl:.2f}" if result.success else "no success"
        scene = Path(result.scene_id).stem
        picture = np.empty((0, 0, 3), np.uint8)
        for step, views in zip(steps, self._views(result, steps), strict=True):
            left = f"{distances[step]:.1f} m to go" if math.isfinite(distances[step]) else "off the map"
            picture = frame(
                [*self._panels(views), ("", self._map(result, step))],
                f"{scene}   step {step}/{last}   {left}",
                verdict if step == last else "",
                result.success,
            )
            yield picture
        for _ in range(round(_HOLD_SECONDS * FRAMES_PER_SECOND)):
            yield picture

    def _panels(self, views: Mapping[str, Image]) -> list[tuple[str, Image]]:
        sensors = self.config.sensors
        labels = {"rgb": "colour" if sensors.rgb else "colour (the agent does not see it)", "depth": "depth"}
        return [(labels[name], image) for name, image in views.items()]

    def _views(self, result: EpisodeResult, steps: list[int]) -> Iterator[dict[str, Image]]:
        """The cameras' pictures at some steps, by name."""
        device = self.simulator.device
        for first in range(0, len(steps), _BATCH):
            chosen = steps[first : first + _BATCH]
            agents = torch.arange(len(chosen), device=device)
            self.simulator.reset(
                agents,
                torch.zeros_like(agents),
                torch.from_numpy(result.positions[chosen]).to(device),
                torch.from_numpy(result.yaws[chosen]).to(device),
            )
            images = {name: image.cpu().numpy() for name, image in self.simulator.render(agents).items()}
            for index in range(len(chosen)):
                yield {
                    name: depth_picture(image[index]) if name == "depth" else image[index].copy()
                    for name, image in images.items()
                }

    def _distances(self, result: EpisodeResult) -> list[float]:
        """Geodesic distance to the goal at every step: (steps + 1) [m]."""
        positions = torch.from_numpy(result.positions).to(self.simulator.device)
        goal = self._point(result.goal).expand_as(positions).contiguous()
        scene = torch.zeros(len(positions), dtype=torch.int64, device=positions.device)
        distances: list[float] = self.simulator.paths.geodesic_distance(scene, positions, goal).tolist()
        return distances

    def _map(self, result: EpisodeResult, step: int) -> Image:
        floor = self._floor(float(result.positions[step, 1]))
        left = result.choices[:step]
        departs = left[:, 0] != left[:, 1]
        scene = torch.zeros(1, dtype=torch.int64, device=self.simulator.device)
        corners, count = self.simulator.paths.path(scene, self._point(result.start), self._point(result.goal))
        return draw_map(
            floor,
            start=result.start,
            goal=result.goal,
            agent_path=result.positions[: step + 1],
            shortest_path=corners[0, : int(count[0])].cpu().numpy(),
            agent_yaw=float(result.yaws[step]),
            success_distance=self.config.env.success_distance,
            marks=result.positions[: len(left)][departs],
        )

    def _floor(self, height: float) -> TopDownMap:
        """Map of the floor nearest to a height [m]."""
        nearest = min(self._floors, key=lambda floor: abs(floor - height))
        if nearest not in self._maps:
            self._maps[nearest] = top_down_map(self.navmesh, nearest, size=self._map_size)
        return self._maps[nearest]

    def _point(self, point: tuple[float, float, float]) -> Tensor:
        return torch.tensor([point], dtype=torch.float32, device=self.simulator.device)
