"""Environments from a data set's folder and plain settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from gymnasium.vector import AutoresetMode

from envs.episodes import Episode, EpisodeError, find_scenes, read_dataset
from envs.files import cache_dir
from envs.gym_env import PointNavEnv
from envs.noise import NoiseConfig
from envs.sampler import EpisodeSampler
from envs.simulators.base import AgentSpec, Simulator
from envs.task import PointNavConfig
from envs.variants import variant as published
from envs.vector_env import PointNavVectorEnv

_DEFAULT_HOMES = 10  # enough for variety, few enough to make while one waits


def default_dataset() -> Path:
    """A small data set of generated homes in the cache, made where it is not there yet."""
    from envs.scenes.homes.dataset import FORMAT, HomesSpec, write_homes

    spec = HomesSpec(num=_DEFAULT_HOMES)
    folder = cache_dir() / "homes" / f"v{FORMAT}-seed{spec.seed}-num{spec.num}"
    # One process: a caller's script need not be safe to start again, as new processes would require.
    return write_homes(folder, spec, num_workers=1)


def split_file(dataset: str | Path, split: str) -> Path:
    """The episode file of a split: ``DATASET/episodes/SPLIT/SPLIT.json.gz``, or without ``episodes/``.

    ``dataset`` may also be an episode file itself, with ``{split}`` in its path or without, as in Habitat's
    ``data_path`` settings.

    Raises:
        EpisodeError: there is none.
    """
    if str(dataset).endswith((".json.gz", ".json")):
        tried = [Path(str(dataset).replace("{split}", split))]
    else:
        tried = [Path(dataset, *inner, split, f"{split}.json.gz") for inner in (("episodes",), ())]
    for path in tried:
        if path.is_file():
            return path
    raise EpisodeError(f"no episodes of split {split!r} in {dataset}: tried {', '.join(map(str, tried))}")


def load_split(
    dataset: str | Path, split: str, scenes_dir: str | Path | None = None
) -> tuple[list[Episode], dict[str, Path]]:
    """Episodes of a split, and the file of each scene that they name.

    Args:
        dataset: as for :func:`split_file`.
        split: its name.
        scenes_dir: folder that the scenes' names are relative to; the data set's own where None.

    Raises:
        EpisodeError: the episodes or a scene cannot be found or read; the message says which.
    """
    episodes = read_dataset(split_file(dataset, split))
    return episodes, find_scenes(episodes, scenes_dir or dataset)


def make_vector_env(
    num_envs: int = 8,
    dataset: str | Path | None = None,
    split: str = "train",
    scenes_dir: str | Path | None = None,
    variant: str = "habitat-2019",
    observations: Sequence[str] = ("rgb", "pointgoal_with_gps_compass"),
    height: int | None = 64,
    width: int | None = 64,
    hfov_deg: float | None = None,
    sensor_height: float | None = None,
    pitch_deg: float | None = None,
    task: PointNavConfig | None = None,
    agent: AgentSpec | None = None,
    noise: NoiseConfig | None = None,
    seed: int = 0,
    mode: Literal["endless", "once"] = "endless",
    episodes: Sequence[Episode] | None = None,
    max_geodesic: float | None = None,
    max_resident_scenes: int | None = None,
    device: str = "cpu",
    num_threads: int = 2,
    output: Literal["torch", "numpy"] = "numpy",
    autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
    render_mode: str | None = None,
    habitat: Mapping[str, Any] | None = None,
) -> PointNavVectorEnv:
    """Makes a batched environment on the built-in simulator, or on habitat-sim.

    Args:
        num_envs: number of agents.
        dataset: as for :func:`split_file`; a few generated homes, made once and kept in the cache, where
            None.
        split: which episodes.
        scenes_dir: folder that the scenes' names are relative to; the data set's own where None.
        variant: name of a published variant, which every setting below that is None is taken from.
        observations: cameras (``rgb``, ``depth``, ``normals``, ``instance``), goal sensors and
            ``previous_action``.
        height: image rows.
        width: image columns.
        hfov_deg: horizontal field of view [deg].
        sensor_height: height of the cameras above the feet [m].
        pitch_deg: tilt of the cameras [deg].
        task: rules.
        agent: body and moves.
        noise: of cameras and motion.
        seed: of the order of episodes and of the noise, until a reset names another.
        mode: endless streams of episodes, or each ``"once"``.
        episodes: use these of the split's episodes instead of all.
        max_geodesic: leave out longer episodes [m].
        max_resident_scenes: keep at most this many scenes in memory and rotate through them.
        device: where to simulate, such as ``"cpu"`` or ``"cuda"``.
        num_threads: of the simulator on the CPU.
        output: ``"numpy"`` arrays or ``"torch"`` tensors.
        autoreset_mode: as Gymnasium defines it.
        render_mode: ``"rgb_array"``, or None.
        habitat: simulate with habitat-sim, with these options of
            :class:`envs.simulators.habitat.HabitatSimulator`, such as ``num_workers`` and ``gpu_ids``.

    Raises:
        EpisodeError: episodes or a scene are missing or broken.
        ValueError: a setting does not fit.
    """
    overrides: dict[str, Any] = {
        "height": height,
        "width": width,
        "hfov_deg": hfov_deg,
        "sensor_height": sensor_height,
        "pitch_deg": pitch_deg,
        "task": task,
        "agent": agent,
        "noise": noise,
    }
    chosen = replace(
        published(variant), **{name: value for name, value in overrides.items() if value is not None}
    )
    everything, scenes = load_split(dataset or default_dataset(), split, scenes_dir)
    sampler = EpisodeSampler(
        everything if episodes is None else episodes,
        num_envs,
        scenes,
        seed=seed,
        mode=mode,
        max_resident_scenes=max_resident_scenes,
    )
    if max_geodesic is not None:
        sampler.set_max_geodesic(max_geodesic)
    what = (sampler.resident_scenes, num_envs, chosen.cameras(observations), chosen.agent)
    simulator: Simulator
    if habitat is None:
        from envs.simulators.raycast.simulator import RaycastSimulator

        simulator = RaycastSimulator(*what, device=device, num_threads=num_threads)
    else:
        from envs.simulators.habitat import HabitatSimulator

        simulator = HabitatSimulator(*what, device=device, **habitat)
    return PointNavVectorEnv(
        simulator,
        chosen.task,
        sampler,
        observations,
        output=output,
        autoreset_mode=autoreset_mode,
        noise=chosen.noise,
        depth_range=chosen.depth_range,
        render_mode=render_mode,
    )


def make_env(**settings: Any) -> PointNavEnv:
    """Makes a single environment; settings are those of :func:`make_vector_env` but for the batch's."""
    for name in ("num_envs", "output", "autoreset_mode"):
        if name in settings:
            raise ValueError(f"{name} belongs to the batched environment: use make_vector_env")
    return PointNavEnv(make_vector_env(1, output="numpy", autoreset_mode=AutoresetMode.DISABLED, **settings))
