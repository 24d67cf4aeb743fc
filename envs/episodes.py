"""PointNav-v1 episodes: Habitat's files read, written and generated.

A split is ``SPLIT/SPLIT.json.gz`` with every episode in it, or the same file with an empty list beside a
folder ``SPLIT/content/`` that holds one ``SCENE.json.gz`` per scene. Both layouts are read the way
habitat-lab's ``PointNavDatasetV1`` reads them, and an episode is drawn by the rules of its
``pointnav_generator``.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from envs.files import atomic_write, read_unpacked
from envs.simulators.base import PathQueries

SCENE_PREFIX = "data/scene_datasets/"
"""What Habitat's published episode files put before a scene's path; stripped to find the file."""

_DEFAULT_CONTENT = "{data_path}/content/{scene}.json.gz"


class EpisodeError(ValueError):
    """An episode file, or a request to generate episodes, that cannot be used."""


@dataclass(frozen=True)
class Episode:
    """One PointNav task: where it starts, facing where, and where it should end."""

    episode_id: str
    """Name of the episode, unique within its scene."""
    scene_id: str
    """The scene as the file names it; :func:`find_scene` turns it into a path."""
    start_position: tuple[float, float, float]
    """Where the agent's feet start, in the world [m]."""
    start_rotation: tuple[float, float, float, float]
    """Starting orientation, a unit quaternion ``(x, y, z, w)``."""
    goal_position: tuple[float, float, float]
    """The goal, on the floor, in the world [m]."""
    goal_radius: float | None
    """Success radius that the file states [m]; the task's own setting decides."""
    geodesic_distance: float
    """Shortest walkable distance from start to goal as the file states it [m]; NaN where it does not."""

    @property
    def start_yaw(self) -> float:
        """Starting heading about +Y [rad], 0 looking along -Z."""
        return heading_of(self.start_rotation)


def heading_of(rotation: Sequence[float]) -> float:
    """The heading about +Y [rad], 0 looking along -Z, of a unit quaternion ``(x, y, z, w)``."""
    x, y, z, w = rotation
    # The third column of the rotation is where the agent's backward axis (+Z) points.
    return math.atan2(2.0 * (x * z + w * y), 1.0 - 2.0 * (x * x + y * y))


def read_dataset(split_file: str | Path, scenes: Sequence[str] | None = None) -> list[Episode]:
    """Reads every episode of a split.

    Args:
        split_file: the split's ``.json.gz`` (or plain ``.json``). Where a ``content/`` folder lies beside it,
            or where its ``content_scenes_path`` points, the episodes come from the files there, in order of
            name, as in Habitat.
        scenes: read only these scenes, named as their content files are, without ``.json.gz``; all when None.

    Raises:
        EpisodeError: a file is missing, truncated, not JSON or not PointNav-v1, or holds an invalid episode.
            The message names the file, the episode and the fault.
    """
    split_file = Path(split_file)
    header = _read_json(split_file)
    content = header.get("content_scenes_path", _DEFAULT_CONTENT)
    if not isinstance(content, str) or content.count("{scene}") != 1:
        raise EpisodeError(
            f"{split_file}: content_scenes_path is {_shown(content)}; expected a text with one {{scene}}, "
            f"such as {_DEFAULT_CONTENT!r}"
        )
    # Plain replacement, because str.format on a text from a file would look up attributes it names.
    before, after = content.replace("{data_path}", str(split_file.parent)).split("{scene}")
    if _is(Path(before), Path.is_dir):
        available = sorted(p.name[: -len(after)] for p in Path(before).iterdir() if p.name.endswith(after))
        names = available if scenes is None else list(scenes)
        if missing := sorted(set(names) - set(available)):
            raise EpisodeError(
                f"{before}: no episodes for scene {', '.join(missing)}; there are {_listed(available)}"
            )
        files = [Path(before) / f"{name}{after}" for name in names]
        episodes = [episode for file in files for episode in _parse(file, _read_json(file))]
    else:
        episodes = _parse(split_file, header)
        if scenes is not None:
            episodes = [episode for episode in episodes if scene_name(episode.scene_id) in set(scenes)]
    if not episodes:
        raise EpisodeError(f"{split_file}: no episodes in it, and none in {before or split_file.parent}")
    return episodes


def write_dataset(episodes: Iterable[Episode], split_file: str | Path, per_scene: bool = True) -> None:
    """Writes a split in Habitat's format; the same episodes give the same bytes.

    Args:
        episodes: what to write, in any order of scenes.
        split_file: the split's ``.json.gz``.
        per_scene: write one file a scene into ``content/`` and leave ``split_file`` empty, as Habitat's large
            data sets are; else everything goes into ``split_file``.

    Raises:
        EpisodeError: no episodes, or ``content/`` holds other scenes, which would be read with this split.
    """
    split_file = Path(split_file)
    by_scene: dict[str, list[Episode]] = {}
    everything = list(episodes)
    for episode in everything:
        by_scene.setdefault(scene_name(episode.scene_id), []).append(episode)
    if not everything:
        raise EpisodeError(f"{split_file}: no episodes to write")
    content = split_file.parent / "content"
    expected = {f"{name}.json.gz" for name in by_scene} if per_scene else set()
    stale = sorted(p.name for p in content.glob("*.json.gz") if p.name not in expected)
    if stale or (content.is_dir() and not per_scene):
        raise EpisodeError(
            f"{content} exists and would be read as part of {split_file.name} "
            f"({_listed(stale) if stale else 'empty'}); remove the folder or write elsewhere"
        )
    if not per_scene:
        _write_json(split_file, {"episodes": [_to_json(episode) for episode in everything]})
        return
    for name, own in by_scene.items():
        _write_json(content / f"{name}.json.gz", {"episodes": [_to_json(episode) for episode in own]})
    # Last, so that a split whose own file exists is whole.
    write_index(split_file)


def write_index(split_file: str | Path) -> None:
    """Writes the empty list that stands beside a ``content/`` folder."""
    _write_json(Path(split_file), {"episodes": []})


def scene_name(scene_id: str) -> str:
    """A scene's short name: its file name up to the first dot, as Habitat names content files."""
    return Path(scene_id).name.split(".")[0]


def find_scene(scene_id: str, scenes_dir: str | Path) -> Path:
    """The file of a scene that an episode names.

    Habitat's prefix ``data/scene_datasets/`` is stripped and the rest is joined to ``scenes_dir``; an
    absolute path stands for itself.

    Raises:
        EpisodeError: no such file; the message lists what was tried.
    """
    scenes_dir = Path(scenes_dir)
    stripped = scene_id.removeprefix(SCENE_PREFIX)
    # Habitat joins the two; the others are where people keep a data set whose folders they moved.
    tried = [scenes_dir / stripped, scenes_dir / scene_id, scenes_dir / Path(stripped).name]
    tried = list(dict.fromkeys(tried))
    for path in tried:
        if _is(path, Path.is_file):
            return path
    raise EpisodeError(
        f"scene {scene_id[:200]!r} not found; tried {', '.join(str(path)[:400] for path in tried)}. "
        "Give the folder that holds the scenes as scenes_dir"
    )


def find_scenes(episodes: Iterable[Episode], scenes_dir: str | Path) -> dict[str, Path]:
    """The file of every scene that episodes name, by the name; see :func:`find_scene`."""
    names = dict.fromkeys(episode.scene_id for episode in episodes)
    return {name: find_scene(name, scenes_dir) for name in names}


def generate_episodes(
    paths: PathQueries,
    scene_index: int,
    scene_id: str,
    num: int,
    seed: int,
    *,
    min_distance: float = 1.0,
    max_distance: float = 30.0,
    max_height_difference: float = 0.5,
    straight_ratio: float = 1.1,
    min_island_radius: float = 1.5,
    retries: int = 10,
    goal_radius: float = 0.2,
) -> list[Episode]:
    """Draws episodes in one scene by the rules of habitat-lab's ``pointnav_generator``.

    A goal is drawn uniformly from the navigable area. Up to ``retries`` starts are drawn for it, and the
    first that keeps every rule makes an episode: both on islands of radius >= ``min_island_radius`` [m],
    heights that differ by at most ``max_height_difference`` [m], a geodesic distance between ``min_distance``
    and ``max_distance`` [m]; where the geodesic distance is less than ``straight_ratio`` times the Euclidean
    one, the start survives with probability ``20 (ratio - 0.98)^2`` only, which thins out straight-line
    episodes. The heading is uniform.

    Args:
        paths: navigation queries over the resident scenes; every query covers many candidates at once.
        scene_index: the scene's index in ``paths``.
        scene_id: what the episodes call it.
        num: how many episodes.
        seed: the same seed gives the same episodes.
        min_distance, max_distance, max_height_difference: rules above.
        straight_ratio, min_island_radius, retries: rules above.
        goal_radius: success radius to note in the episodes [m].

    Raises:
        EpisodeError: the scene hardly has episodes that keep the rules.
    """
    if num < 1:
        raise EpisodeError(f"{scene_id}: {num} episodes were asked for; expected at least 1")
    generator = torch.Generator(device=paths.device).manual_seed(seed)
    episodes: list[Episode] = []
    drawn = 0
    while len(episodes) < num:
        if drawn > 100 * (num + 10):
            raise EpisodeError(
                f"{scene_id}: only {len(episodes)} of {num} episodes found after {drawn} goals; the "
                f"navigable area is too small for distances of {min_distance} to {max_distance} m on islands "
                f"of radius >= {min_island_radius} m"
            )
        batch = (num - len(episodes)) * 5 // 4 + 16
        drawn += batch
        scene = torch.full((batch,), scene_index, dtype=torch.int64, device=paths.device)
        goals = paths.sample(scene, generator)
        starts = torch.zeros_like(goals)
        distances = torch.zeros(batch, device=paths.device)
        found = torch.zeros(batch, dtype=torch.bool, device=paths.device)
        open_rows = (paths.island_radius(scene, goals) >= min_island_radius).nonzero()[:, 0]
        for _ in range(retries):
            if not len(open_rows):
                break
            start = paths.sample(scene[open_rows], generator)
            distance, ok = _keeps_rules(
                paths,
                scene[open_rows],
                start,
                goals[open_rows],
                (min_distance, max_distance),
                max_height_difference,
                straight_ratio,
                min_island_radius,
                generator,
            )
            rows = open_rows[ok]
            starts[rows], distances[rows], found[rows] = start[ok], distance[ok], True
            open_rows = open_rows[~ok]
        rows = found.nonzero()[:, 0]
        yaws = torch.rand(len(rows), generator=generator, device=paths.device, dtype=torch.float64)
        for row, turn in zip(rows.tolist(), yaws.tolist(), strict=True):
            half = math.pi * turn
            episodes.append(
                Episode(
                    episode_id=str(len(episodes)),
                    scene_id=scene_id,
                    start_position=_triple(starts[row].tolist()),
                    start_rotation=(0.0, math.sin(half), 0.0, math.cos(half)),
                    goal_position=_triple(goals[row].tolist()),
                    goal_radius=goal_radius,
                    geodesic_distance=float(distances[row]),
                )
            )
            if len(episodes) == num:
                break
    return episodes


def _keeps_rules(
    paths: PathQueries,
    scene: Tensor,
    start: Tensor,
    goal: Tensor,
    distance_range: tuple[float, float],
    max_height_difference: float,
    straight_ratio: float,
    min_island_radius: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Geodesic distance (N,) [m] and whether each start (N, 3) makes an episode with its goal (N, 3)."""
    distance = paths.geodesic_distance(scene, start, goal)
    low, high = distance_range
    ratio = distance / (start - goal).norm(dim=-1).clamp_min(1e-9)
    chance = torch.rand(len(start), generator=generator, device=start.device)
    ok = (start[:, 1] - goal[:, 1]).abs() <= max_height_difference
    ok &= (distance >= low) & (distance <= high)
    ok &= (ratio >= straight_ratio) | (chance <= 20.0 * (ratio - 0.98) ** 2)
    ok &= paths.island_radius(scene, start) >= min_island_radius
    return distance, ok


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a ``.json.gz`` or ``.json`` file."""
    try:
        data = read_unpacked(path)
    except FileNotFoundError:
        raise EpisodeError(f"{path}: no such episode file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise EpisodeError(f"{path}: truncated or damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise EpisodeError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise EpisodeError(f"{path}: {error}") from None
    try:
        value = json.loads(data)
    except RecursionError:
        raise EpisodeError(f"{path}: JSON nested too deeply for an episode file") from None
    except ValueError as error:  # bad JSON, bad UTF-8, or an integer of thousands of digits
        raise EpisodeError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise EpisodeError(f"{path}: holds a JSON {type(value).__name__}; expected an object with 'episodes'")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    data = json.dumps(value, allow_nan=False).encode()
    # No name and no time in the header, so that equal episodes make equal files.
    with atomic_write(path) as temporary:
        temporary.write_bytes(gzip.compress(data, compresslevel=9, mtime=0))


def _parse(path: Path, value: dict[str, Any]) -> list[Episode]:
    entries = value.get("episodes")
    if not isinstance(entries, list):
        raise EpisodeError(f"{path}: 'episodes' is {_shown(entries)}; expected a list")
    episodes = []
    seen: set[tuple[str, str]] = set()
    for index, entry in enumerate(entries):
        episode = _parse_episode(f"{path}: episode {index}", entry)
        key = (episode.scene_id, episode.episode_id)
        if key in seen:
            raise EpisodeError(
                f"{path}: episode {index}: episode_id {episode.episode_id!r} occurs twice in scene "
                f"{episode.scene_id!r}; ids must be unique within a scene"
            )
        seen.add(key)
        episodes.append(episode)
    return episodes


def _parse_episode(where: str, entry: Any) -> Episode:
    if not isinstance(entry, dict):
        raise EpisodeError(f"{where}: is {_shown(entry)}; expected an object")
    for key in ("episode_id", "scene_id", "start_position", "start_rotation", "goals"):
        if key not in entry:
            raise EpisodeError(f"{where}: has no {key!r}; expected a PointNav-v1 episode")
    identity = entry["episode_id"]
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise EpisodeError(f"{where}: episode_id is {_shown(identity)}; expected text or a whole number")
    where = f"{where} (id {str(identity)[:40]!r})"
    scene = entry["scene_id"]
    if not isinstance(scene, str) or not scene or "\0" in scene:
        raise EpisodeError(f"{where}: scene_id is {_shown(scene)}; expected the path of a scene")
    rotation = _numbers(f"{where}: start_rotation", entry["start_rotation"], 4)
    norm = math.hypot(*rotation)
    if abs(norm - 1.0) > 1e-2:
        raise EpisodeError(
            f"{where}: start_rotation {rotation} has length {norm:.6g}; "
            "expected a unit quaternion [x, y, z, w]"
        )
    goals = entry["goals"]
    if not isinstance(goals, list) or not goals or not isinstance(goals[0], dict):
        raise EpisodeError(
            f"{where}: goals is {_shown(goals)}; expected a list with at least one goal object"
        )
    radius = goals[0].get("radius")
    if radius is not None and _number(f"{where}: goal radius", radius) < 0:
        raise EpisodeError(f"{where}: goal radius is {radius}; expected at least 0, or null")
    info = entry.get("info") or {}
    if not isinstance(info, dict):
        raise EpisodeError(f"{where}: info is {_shown(info)}; expected an object")
    stated = info.get("geodesic_distance")
    distance = math.nan if stated is None else _number(f"{where}: geodesic_distance", stated)
    if distance < 0:
        raise EpisodeError(f"{where}: geodesic_distance is {distance}; expected at least 0")
    x, y, z, w = rotation
    return Episode(
        episode_id=str(identity),
        scene_id=scene,
        start_position=_triple(_numbers(f"{where}: start_position", entry["start_position"], 3)),
        start_rotation=(x, y, z, w),
        goal_position=_triple(_numbers(f"{where}: goal position", goals[0].get("position"), 3)),
        goal_radius=None if radius is None else float(radius),
        geodesic_distance=distance,
    )


def _to_json(episode: Episode) -> dict[str, Any]:
    """The episode with every field that habitat-lab's ``NavigationEpisode`` takes."""
    stated = not math.isnan(episode.geodesic_distance)
    return {
        "episode_id": episode.episode_id,
        "scene_id": episode.scene_id,
        "start_position": list(episode.start_position),
        "start_rotation": list(episode.start_rotation),
        "info": {"geodesic_distance": episode.geodesic_distance} if stated else {},
        "goals": [{"position": list(episode.goal_position), "radius": episode.goal_radius}],
        "start_room": None,
        "shortest_paths": None,
    }


def _number(what: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise EpisodeError(f"{what} is {_shown(value)}; expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise EpisodeError(f"{what} is {_shown(value)}; expected a finite number")
    return number


def _numbers(what: str, value: Any, count: int) -> list[float]:
    if not isinstance(value, list) or len(value) != count:
        raise EpisodeError(f"{what} is {_shown(value)}; expected {count} numbers")
    return [_number(what, item) for item in value]


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = values
    return float(x), float(y), float(z)


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    """Whether there is a file or folder of a name from a file, which may be longer than any name can be."""
    try:
        return kind(path)
    except OSError:
        return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown or "none"
