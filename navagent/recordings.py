"""Reads folders of recordings: what real Habitat answered about some scenes.

Such a folder has, for every scene NAME, ``NAME.glb`` (with ``NAME.navmesh`` and, where the scene is not Z-up,
``NAME.stage_config.json``), ``NAME.json`` with the agent and the sensors, and ``NAME.reference.npz`` with
Habitat's answers; and for the task ``pointnav_traces.json.gz`` beside the episodes in ``pointnav/SPLIT``.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.episodes import Episode, EpisodeError, read_dataset
from envs.files import read_unpacked
from envs.simulators.base import AgentSpec, SensorSpec

Answers = dict[str, NDArray[Any]]
"""What Habitat was asked and answered, by the names of the arrays."""


class RecordingError(ValueError):
    """A folder of recordings that is missing or broken; the message names the file and the fault."""


def cameras_of(description: dict[str, Any]) -> tuple[SensorSpec, ...]:
    """The cameras whose pictures can be compared."""
    return tuple(
        SensorSpec(
            name=sensor["name"],
            kind=sensor["kind"],
            height=sensor["height"],
            width=sensor["width"],
            hfov_deg=float(sensor["hfov_deg"]),
            sensor_height=float(sensor["sensor_height"]),
        )
        for sensor in description["sensors"]
        if sensor["kind"] in ("depth", "rgb")
    )


def agent_of(description: dict[str, Any], sliding: bool) -> AgentSpec:
    """The agent that the recordings were made with, sliding along walls or not."""
    settings = description["navmesh"]
    return AgentSpec(
        radius=settings["agent_radius"],
        height=settings["agent_height"],
        max_climb=settings["agent_max_climb"],
        max_slope_deg=settings["agent_max_slope"],
        forward_step=description["forward_step"],
        turn_angle_deg=description["turn_angle_deg"],
        allow_sliding=sliding,
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_unpacked(path))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise RecordingError(f"{path} cannot be read as JSON: {error}") from error


def read_description(path: Path) -> dict[str, Any]:
    """What NAME.json says of the agent and its sensors, with every number in place."""
    description = _read_json(path)

    def check(owner: Any, what: str, keys: tuple[str, ...]) -> None:
        if not isinstance(owner, dict):
            raise RecordingError(f"{path}: {what} is {owner!r}, expected an object")
        for key in keys:
            value = owner.get(key)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise RecordingError(f"{path}: {key} of {what} is {value!r}, expected a number")

    check(description, "the scene", ("forward_step", "turn_angle_deg"))
    agent = ("agent_radius", "agent_height", "agent_max_climb", "agent_max_slope")
    check(description.get("navmesh"), "navmesh", (*agent, "cell_size", "cell_height"))
    sensors = description.get("sensors")
    if not isinstance(sensors, list):
        raise RecordingError(f"{path}: sensors is {sensors!r}, expected a list")
    for number, sensor in enumerate(sensors):
        check(sensor, f"sensor {number}", ("height", "width", "hfov_deg", "sensor_height"))
    return description


def read_answers(path: Path, cameras: tuple[SensorSpec, ...]) -> Answers:
    """The recordings that can be compared, floats in single precision.

    Answers whose question is missing are left out. The rest must have the shapes that belong together.
    """
    try:
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz archive, or only the beginning of one")
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise RecordingError(f"{path} cannot be read as recordings: {error}") from error
    answers: Answers = {}
    for questions, replies in _layout(found, cameras):
        if all(name in found and found[name].size for name in questions):
            for name, shape in (questions | replies).items():
                if name in found:
                    answers[name] = _sound(path, name, found[name], shape, name in questions)
    return answers


Shapes = dict[str, tuple[int, ...]]


def _layout(found: Answers, cameras: tuple[SensorSpec, ...]) -> Iterator[tuple[Shapes, Shapes]]:
    """Questions and Habitat's replies that belong together, with their shapes."""

    def count(name: str) -> int:
        return len(found[name]) if name in found and found[name].ndim else 0

    n = count("view_position")
    images = {
        f"view_{camera.name}": (n, camera.height, camera.width, *([3] if camera.kind == "rgb" else []))
        for camera in cameras
    }
    yield {"view_position": (n, 3), "view_yaw": (n,)}, images
    n = count("geodesic_start")
    yield {"geodesic_start": (n, 3), "geodesic_end": (n, 3)}, {"geodesic_distance": (n,)}
    n = count("step_start")
    yield {"step_start": (n, 3), "step_target": (n, 3)}, {"step_slide": (n, 3), "step_no_slide": (n, 3)}
    n = count("query_point")
    replies = {"query_is_navigable": (n,), "query_snapped": (n, 3), "query_island_radius": (n,)}
    yield {"query_point": (n, 3)}, replies
    n = count("obstacle_point")
    yield {"obstacle_point": (n, 3)}, {"obstacle_distance": (n,)}
    for kind in ("slide", "stop"):
        actions = found.get(f"rollout_{kind}_actions", np.zeros((0, 0)))
        n, steps = actions.shape if actions.ndim == 2 else (0, 0)
        shapes = {"actions": (n, steps), "position": (n, steps + 1, 3), "rotation_xyzw": (n, steps + 1, 4)}
        shapes["collided"] = (n, steps)
        yield {f"rollout_{kind}_{name}": shape for name, shape in shapes.items()}, {}


def _sound(
    path: Path, name: str, values: NDArray[Any], shape: tuple[int, ...], is_question: bool
) -> NDArray[Any]:
    """One array in the type that the simulator takes; questions and pictures must be finite."""
    if values.shape != shape:
        raise RecordingError(f"{path}: {name} has shape {values.shape}, expected {shape}")
    whole = name.endswith(("_actions", "_collided", "_is_navigable"))
    if values.dtype.kind not in ("biu" if whole else "fiu"):
        raise RecordingError(f"{path}: {name} holds {values.dtype}, expected {'whole ' * whole}numbers")
    if name.endswith("_actions"):
        if values.min() < 0 or values.max() > 2:
            raise RecordingError(f"{path}: {name} go from {values.min()} to {values.max()}, expected 0 to 2")
        return values.astype(np.int64)
    if whole:
        return values.astype(bool)
    if (is_question or name.startswith("view_")) and not np.isfinite(values).all():
        raise RecordingError(f"{path}: {name} holds numbers that are not finite")
    return np.ascontiguousarray(values, np.float32)


def read_traces(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Episodes that were played in Habitat, by scene; none where the folder has no such file."""
    path = folder / "pointnav_traces.json.gz"
    if not path.is_file():
        return {}
    traces = _read_json(path)
    if not isinstance(traces, dict):
        raise RecordingError(f"{path} holds {type(traces).__name__}, expected a dictionary of scenes")
    for name, found in traces.items():
        if not isinstance(found, list) or not all(isinstance(trace, dict) for trace in found):
            raise RecordingError(f"{path}: scene {name} is not a list of traces")
    return traces


def read_episodes(folder: Path) -> dict[tuple[str, str], Episode]:
    """Episodes by the name of their scene and their own."""
    episodes: dict[tuple[str, str], Episode] = {}
    for split in sorted((folder / "pointnav").glob("*/*.json.gz")):
        try:
            found = read_dataset(split)
        except EpisodeError as error:
            raise RecordingError(str(error)) from error
        episodes |= {(Path(episode.scene_id).stem, episode.episode_id): episode for episode in found}
    return episodes
