"""A data set of generated homes in Habitat's format, on disk.

``OUT/scenes/NAME/`` holds a home's ``.glb``, ``.stage_config.json``, ``.navmesh`` and ``home.json``;
``OUT/episodes/{train,val}/`` the PointNav-v1 episodes; ``OUT/homes.scene_dataset_config.json`` lets
habitat-sim open all of it; ``OUT/dataset.json`` says how it was made, and is there only when all else
is.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs.cores import usable_cores
from envs.episodes import generate_episodes, write_dataset, write_index
from envs.files import atomic_write
from envs.scenes.homes import Home, generate_home
from envs.scenes.navmesh import NavMesh
from envs.scenes.navmesh_build import build_navmesh
from envs.scenes.navmesh_file import write_navmesh
from envs.scenes.pathfinder import PathFinder
from envs.simulators.base import AgentSpec

FORMAT = 1
"""Raised whenever the same settings would give other homes: old folders are not taken for new ones."""

# Rooms and storeys of twenty homes: 15 % have two floors. Each twenty come in an order of their own.
_SIZES = (
    *((rooms, 1) for rooms in (1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 7, 8, 10)),
    (6, 2),
    (7, 2),
    (9, 2),
)
_ATTEMPTS = 20


class HomesError(ValueError):
    """A data set of homes that cannot be written where or as it was asked for."""


@dataclass(frozen=True)
class HomesSpec:
    """What a data set of homes is made from; equal settings make equal files."""

    num: int = 40
    """Homes in all; every fifth is for validation."""
    seed: int = 0
    """Where every draw comes from."""
    train_episodes: int = 500
    """Episodes in each training home."""
    val_episodes: int = 25
    """Episodes in each validation home."""

    def __post_init__(self) -> None:
        if self.num < 2:
            raise HomesError(
                f"num is {self.num}; expected at least 2 homes, one to train and one to validate"
            )
        if self.seed < 0:
            raise HomesError(f"seed is {self.seed}; expected 0 or more")
        for name in ("train_episodes", "val_episodes"):
            if getattr(self, name) < 1:
                raise HomesError(f"{name} is {getattr(self, name)}; expected at least 1 episode in each home")

    def split(self, index: int) -> str:
        """``train`` or ``val``: the split that home ``index`` belongs to."""
        return "val" if index % 5 == 4 or (self.num < 5 and index == self.num - 1) else "train"

    def size(self, index: int) -> tuple[int, int]:
        """Rooms and storeys of home ``index``."""
        block, place = divmod(index, len(_SIZES))
        order = np.random.default_rng([self.seed, block, 1]).permutation(len(_SIZES))
        return _SIZES[order[place]]

    def describe(self) -> dict[str, Any]:
        """The settings as they stand in ``dataset.json``."""
        return {"format": FORMAT, "agent": asdict(AgentSpec()), **asdict(self)}


def home_name(index: int) -> str:
    """Name of home ``index``, such as ``home_007``."""
    return f"home_{index:03d}"


def is_complete(out: str | Path, spec: HomesSpec) -> bool:
    """Whether a folder holds exactly the data set of these settings, whole."""
    try:
        described = json.loads((Path(out) / "dataset.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and described.get("settings") == json.loads(
        json.dumps(spec.describe())
    )


def write_homes(
    out: str | Path,
    spec: HomesSpec | None = None,
    *,
    num_workers: int | None = None,
    on_home: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes a data set of homes; does nothing where the same one is there already.

    Homes are collected in a hidden folder beside ``out``, which takes ``out``'s place when all are done: a
    folder of that name is never half a data set. What an interrupted call has made is used by the next one
    with the same settings, and two calls at once help each other.

    Args:
        out: folder to make.
        spec: what to make; 40 homes of seed 0 when None.
        num_workers: processes; by default as many as cores, at most 8. They are started afresh (``spawn``),
            so a script that calls this without ``num_workers=1`` needs ``if __name__ == "__main__":``.
        on_home: called with the number of homes that are done and of all homes.

    Returns:
        ``out``.

    Raises:
        HomesError: ``out`` is a file, or a folder with something else in it.
    """
    out, spec = Path(out).absolute(), spec or HomesSpec()
    if is_complete(out, spec):
        return out
    _refuse_occupied(out, spec)
    digest = hashlib.sha256(json.dumps(spec.describe(), sort_keys=True).encode()).hexdigest()[:10]
    partial = out.parent / f".{out.name}.partial-{digest}"
    (partial / "scenes").mkdir(parents=True, exist_ok=True)
    missing = [k for k in range(spec.num) if not (partial / "scenes" / home_name(k)).is_dir()]
    try:
        for done, _ in enumerate(
            _write_missing(partial, spec, missing, num_workers), spec.num - len(missing) + 1
        ):
            if on_home is not None:
                on_home(done, spec.num)
        _write_rest(partial, spec)
        if out.is_dir():
            out.rmdir()  # empty, as checked above
        partial.rename(out)
    except OSError:
        # Another process may have finished the same folder first.
        if not is_complete(out, spec):
            raise
    return out


def _refuse_occupied(out: Path, spec: HomesSpec) -> None:
    if out.is_file():
        raise HomesError(f"{out} is a file; give the name of a new folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        found = json.loads((out / "dataset.json").read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise HomesError(
            f"{out} is not empty and holds no data set of homes; give a new folder, or empty this one"
        ) from None
    wanted = json.loads(json.dumps(spec.describe()))
    differ = sorted(key for key in {*wanted, *found} if found.get(key) != wanted.get(key))
    shown = ", ".join(f"{key} {found.get(key)} instead of {wanted.get(key)}" for key in differ)
    raise HomesError(
        f"{out} holds a data set made with other settings ({shown}); give another folder, or delete it"
    )


def _write_missing(
    partial: Path, spec: HomesSpec, missing: list[int], num_workers: int | None
) -> Iterator[int]:
    """Writes homes and yields their indices as they are done."""
    cores = usable_cores()
    workers = num_workers if num_workers is not None else min(cores, 8)
    workers = min(workers, len(missing) // 3)  # starting a process costs as much as three homes
    if workers < 2:
        for index in missing:
            write_home(partial, spec, index)
            yield index
        return
    context = multiprocessing.get_context("spawn")
    # Ctrl-C reaches every process of a terminal; the first one alone answers to it, and ends the others.
    deaf = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=signal.signal, initargs=deaf) as pool:
        futures = {pool.submit(_work, partial, spec, index): index for index in missing}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            for future in futures:
                future.cancel()


def _work(folder: Path, spec: HomesSpec, index: int) -> None:
    """Writes a home in a process of its own, on one thread."""
    torch.set_num_threads(1)
    write_home(folder, spec, index)


def write_home(folder: str | Path, spec: HomesSpec, index: int) -> None:
    """Writes one home and its episodes into a data set's folder, the scene's folder last and whole."""
    folder = Path(folder)
    name = home_name(index)
    home, navmesh, attempt = _navigable_home(spec, index)
    split = spec.split(index)
    scene_id = f"scenes/{name}/{name}.glb"
    paths = PathFinder([navmesh], num_threads=1)
    episodes = generate_episodes(
        paths,
        0,
        scene_id,
        spec.train_episodes if split == "train" else spec.val_episodes,
        _number(spec.seed, index, 2),
        # Beds and tables are islands of their own, and some are larger than Habitat's limit of 1.5 m.
        min_island_radius=max(1.5, 0.9 * float(navmesh.island_radii.max())),
    )
    write_dataset(episodes, folder / "episodes" / split / "content" / f"{name}.json.gz", per_scene=False)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}-"))
    try:
        (temporary / f"{name}.glb").write_bytes(home.to_glb())
        write_navmesh(navmesh, temporary / f"{name}.navmesh")
        stage = {
            "render_asset": f"{name}.glb",
            "nav_asset": f"{name}.navmesh",
            "up": [0.0, 1.0, 0.0],
            "front": [0.0, 0.0, -1.0],
        }
        _write_text(temporary / f"{name}.stage_config.json", stage)
        about = {
            "name": name,
            "split": split,
            "seed": [spec.seed, index, attempt],
            "rooms": [room.name for floor in home.plan.floors for room in floor.rooms],
            "floors": len(home.plan.floors),
            "triangles": home.num_triangles,
            "navigable_area": round(float(navmesh.navigable_area), 2),
        }
        _write_text(temporary / "home.json", about)
        temporary.chmod(0o755)
        # Fails where another process was faster, whose files are the same.
        with suppress(OSError):
            temporary.rename(folder / "scenes" / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _navigable_home(spec: HomesSpec, index: int) -> tuple[Home, NavMesh, int]:
    """The first home of this index's own series in which an agent can walk into every room."""
    rooms, floors = spec.size(index)
    for attempt in range(_ATTEMPTS):
        home = generate_home((spec.seed, index, attempt), rooms, floors)
        navmesh = build_navmesh(*home.geometry(), AgentSpec())
        if min(reachable_shares(home, navmesh).values()) > 0.1:
            return home, navmesh, attempt
    raise RuntimeError(
        f"home {index} of seed {spec.seed}: {_ATTEMPTS} homes in a row have a room without a way in"
    )


def reachable_shares(home: Home, navmesh: NavMesh) -> dict[str, float]:
    """The part of each room's floor that an agent can walk to from the home's largest open area.

    What furniture covers is not reachable, so 1 means an empty room; 0 means that there is no way in.
    """
    paths = PathFinder([navmesh], num_threads=1)
    grids: dict[str, torch.Tensor] = {}
    for floor in home.plan.floors:
        for room in floor.rooms:
            area = room.floor_area
            x = torch.arange(area.x0 + 0.1, area.x1 - 0.05, 0.2)
            z = torch.arange(area.z0 + 0.1, area.z1 - 0.05, 0.2)
            grid = torch.cartesian_prod(x, torch.tensor([floor.base + 0.1]), z)
            grids[room.name] = grid
    points = torch.cat(list(grids.values()))
    scene = torch.zeros(len(points), dtype=torch.int64)
    on_floor = paths.is_navigable(scene, points, max_y_delta=0.25)
    radius = torch.where(on_floor, paths.island_radius(scene, points), 0.0)
    root = points[radius.argmax()].expand_as(points)
    reached = on_floor & paths.geodesic_distance(scene, root, points).isfinite()
    parts = reached.float().split([len(grid) for grid in grids.values()])
    return {name: float(part.mean()) for name, part in zip(grids, parts, strict=True)}


def _write_rest(partial: Path, spec: HomesSpec) -> None:
    """Writes what describes the data set as a whole, ``dataset.json`` last."""
    names = [home_name(k) for k in range(spec.num)]
    for split in ("train", "val"):
        write_index(partial / "episodes" / split / f"{split}.json.gz")
    config = {
        "stages": {"paths": {".json": ["scenes/*"]}},
        "navmesh_instances": {name: f"scenes/{name}/{name}.navmesh" for name in names},
    }
    _write_text(partial / "homes.scene_dataset_config.json", config)
    homes = [json.loads((partial / "scenes" / name / "home.json").read_text()) for name in names]
    for leftover in partial.glob(".home_*"):  # of workers that were killed
        shutil.rmtree(leftover, ignore_errors=True)
    _write_text(partial / "dataset.json", {"settings": spec.describe(), "homes": homes})


def _write_text(path: Path, value: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def _number(*key: int) -> int:
    """A seed that depends on all the numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
