"""The scenes that demonstrations take place in: found, and known again by their hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from envs.episodes import EpisodeError, find_scene
from envs.scenes.navmesh_build import separate_buffers
from navagent.demonstrations.recorded import DemonstrationError, DemonstrationSet
from policies.weights import sha256


def scene_sha256(path: Path) -> str:
    """SHA-256 over all files that the simulator reads of a scene: 64 hexadecimal digits.

    These are the scene itself, buffers beside it, its navigation mesh and its stage configuration.
    """
    digest = hashlib.sha256()
    beside = (path.with_suffix(".navmesh"), path.with_suffix(".stage_config.json"))
    for file in (path, *beside, *separate_buffers(path)):
        if file.is_file():
            digest.update(f"{file.suffix} {sha256(file)}\n".encode())
    return digest.hexdigest()


def checked_scenes(demonstrations: DemonstrationSet, scenes_dir: Path) -> dict[str, Path]:
    """The file of each scene of some demonstrations, by its id, found under ``scenes_dir``.

    Raises:
        DemonstrationError: a scene is missing, or is not the one of the recording.
    """
    known = {scene.scene_id: scene.sha256 for scene in demonstrations.header.scenes}
    return {
        scene_id: _checked(scene_id, known[scene_id], scenes_dir)
        for scene_id in _in_order(episode.scene_id for episode in demonstrations.episodes)
    }


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _checked(scene_id: str, expected: str, scenes_dir: Path) -> Path:
    try:
        path = find_scene(scene_id, scenes_dir)
    except EpisodeError as error:
        raise DemonstrationError(f"a scene of the demonstrations is not here: {error}") from None
    found = scene_sha256(path)
    if found != expected:
        raise DemonstrationError(
            f"{path}: another scene than the demonstrations were recorded in: its files' SHA-256 is "
            f"{found[:12]}..., that of scene {scene_id!r} was {expected[:12]}...; give the folder of the "
            "scenes of the recording, or record demonstrations in these"
        )
    return path
