"""Generated homes to navigate, and pictures of scenes: what ``navagent scenes`` does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from envs.files import atomic_write

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from envs.scenes.navmesh import NavMesh
    from envs.simulators.base import AgentSpec, PathQueries


def generate(
    out: str | Path,
    num: int = 40,
    seed: int = 0,
    *,
    train_episodes: int = 500,
    val_episodes: int = 25,
    num_workers: int | None = None,
    console: Console | None = None,
) -> Path:
    """Writes ``num`` homes with episodes into the folder ``out``, in Habitat's format, and shows progress.

    The same numbers give the same files. A folder that holds this data set already is left as it is; an
    interrupted call is taken up where it stopped.

    Args:
        out: folder to make.
        num: homes, every fifth of them for validation.
        seed: where every draw comes from.
        train_episodes: episodes in each training home.
        val_episodes: episodes in each validation home.
        num_workers: processes; by default one a core, at most 8.
        console: where to show progress; nowhere when None.

    Returns:
        The folder.

    Raises:
        envs.scenes.homes.dataset.HomesError: a number is out of range, or ``out`` holds something else.
    """
    from envs.scenes.homes.dataset import HomesSpec, is_complete, write_homes

    spec = HomesSpec(num, seed, train_episodes, val_episodes)
    if console is None or is_complete(out, spec):
        return write_homes(out, spec, num_workers=num_workers)
    columns = (
        TextColumn("[bold]making homes"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("homes", total=num)
        return write_homes(
            out, spec, num_workers=num_workers, on_home=lambda done, _: progress.update(task, completed=done)
        )


def generated_dataset(num: int, seed: int, cache_dir: str | Path, console: Console | None = None) -> Path:
    """The folder of ``num`` homes of this seed in a cache, generated where it is not there yet."""
    from envs.scenes.homes.dataset import FORMAT

    # The format is in the name, so that a newer version makes its own folder and leaves the old one.
    return generate(Path(cache_dir) / "homes" / f"v{FORMAT}-seed{seed}-num{num}", num, seed, console=console)


def show(
    scene: str | Path,
    out: str | Path,
    *,
    num_views: int = 6,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Draws a scene's map, a floor each, and views from some of its places, as one PNG.

    Args:
        scene: a ``.glb`` or ``.gltf`` file.
        out: the picture to write, ``.png``.
        num_views: how many places to look from; every one shows colour above and depth below.
        seed: where the places come from.
        device: where to render.

    Returns:
        ``out``.

    Raises:
        ValueError: ``out`` is not a PNG's name, or ``num_views`` is less than 1.
        envs.scenes.scene.SceneError: the scene cannot be read.
        envs.scenes.navmesh_tile.NavMeshError: nothing in it can be walked on.
    """
    import cv2

    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out} must end in .png")
    if num_views < 1:
        raise ValueError(f"num_views is {num_views}; expected at least 1")
    scene = Path(scene)
    overview = _look(scene, num_views, seed, device)
    sheet = _contact_sheet(scene.name, overview)
    done, data = cv2.imencode(".png", np.ascontiguousarray(sheet[..., ::-1]))
    if not done:
        raise RuntimeError(f"OpenCV could not encode the {sheet.shape} picture as PNG")
    with atomic_write(out) as temporary:
        temporary.write_bytes(data.tobytes())
    return out


@dataclass(frozen=True)
class _Overview:
    """What a contact sheet shows."""

    navmesh: NavMesh
    position: NDArray[np.float32]
    """Where each view is taken from: (V, 3) [m]."""
    yaw: NDArray[np.float32]
    """Heading of each view: (V,) [rad]."""
    rgb: NDArray[np.uint8]
    """(V, H, W, 3)."""
    depth: NDArray[np.float32]
    """(V, H, W) [m], 0 where nothing was hit."""
    triangles: int


def _look(scene: Path, num_views: int, seed: int, device: str) -> _Overview:
    import torch

    from envs.scenes.gltf import load_scene
    from envs.scenes.navmesh_build import navmesh_for
    from envs.simulators.base import SensorSpec
    from envs.simulators.raycast.simulator import RaycastSimulator

    height, width = 240, 320
    sensors = (
        SensorSpec("rgb", "rgb", height, width, hfov_deg=90.0),
        SensorSpec("depth", "depth", height, width, hfov_deg=90.0),
    )
    loaded = load_scene(scene)  # first, because its errors say most about a file
    simulator = RaycastSimulator([scene], num_views, sensors, _agent_of(scene), device=device)
    try:
        position, yaw = _viewpoints(simulator.paths, num_views, seed)
        everyone = torch.arange(num_views, device=simulator.device)
        simulator.reset(everyone, torch.zeros_like(everyone), position, yaw)
        frames = simulator.render()
        return _Overview(
            navmesh=navmesh_for(scene, simulator.agent),
            position=position.cpu().numpy(),
            yaw=yaw.cpu().numpy(),
            rgb=frames["rgb"].cpu().numpy(),
            depth=frames["depth"].cpu().numpy(),
            triangles=len(loaded.triangles),
        )
    finally:
        simulator.close()


def _agent_of(scene: Path) -> AgentSpec:
    """The agent that the navigation mesh beside a scene was made for; the usual one where there is none."""
    from envs.scenes.navmesh_file import read_navmesh
    from envs.simulators.base import AgentSpec

    beside = scene.with_suffix(".navmesh")
    if not beside.is_file():
        return AgentSpec()
    settings = read_navmesh(beside).settings
    return AgentSpec(
        radius=settings.agent_radius,
        height=settings.agent_height,
        max_climb=settings.agent_max_climb,
        max_slope_deg=settings.agent_max_slope,
    )


def _viewpoints(paths: PathQueries, count: int, seed: int) -> tuple[Any, Any]:
    """Positions (count, 3) and headings (count,) that are far apart and look where there is much to see."""
    import torch

    generator = torch.Generator(device=paths.device).manual_seed(seed)
    points = paths.sample(torch.zeros(300, dtype=torch.int64, device=paths.device), generator)
    scene = torch.zeros(len(points), dtype=torch.int64, device=paths.device)
    radius = paths.island_radius(scene, points)
    points = points[radius >= 0.9 * radius.max()]  # not on a bed or a table
    # How far one can walk each way says how far one can see; a view's worth is that over its whole width.
    turns = 16
    yaws = torch.arange(turns, device=paths.device) * (2 * math.pi / turns)
    ahead = torch.stack([-yaws.sin(), torch.zeros_like(yaws), -yaws.cos()], dim=1)
    starts = points.repeat_interleave(turns, dim=0)
    scene = torch.zeros(len(starts), dtype=torch.int64, device=paths.device)
    ends = paths.try_step(scene, starts, starts + 5.0 * ahead.repeat(len(points), 1), False)
    free = (ends - starts).norm(dim=1).view(-1, turns)
    # Capped, because one long way through a door shows less than a room's whole width.
    free = free.clamp(max=3.0).sqrt()
    weights = ((0, 1.0), (1, 1.0), (-1, 1.0), (2, 0.8), (-2, 0.8))
    worth = sum((weight * free.roll(shift, 1) for shift, weight in weights), torch.zeros_like(free)) ** 2
    best, facing = worth.max(dim=1)
    chosen = [int(best.argmax())]
    gap = (points - points[chosen[0]]).norm(dim=1)
    while len(chosen) < count:
        # Places near another one count for little, however good the view.
        chosen.append(int((best * gap.clamp(max=3.0)).argmax()))
        gap = torch.minimum(gap, (points - points[chosen[-1]]).norm(dim=1))
    return points[chosen], yaws[facing[chosen]]


_PAPER, _INK, _FAINT = (250, 250, 248), (40, 42, 46), (120, 124, 130)
_GAP = 16
_VIEW = (320, 240)


def _contact_sheet(title: str, overview: _Overview) -> NDArray[np.uint8]:
    """Maps on the left, views in colour and depth on the right."""
    count = len(overview.position)
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    tile = 2 * _VIEW[1] + 4
    body = rows * tile + (rows - 1) * _GAP
    maps = _maps(overview, body)
    left = max(plan.shape[1] for plan in maps)
    body = max(body, sum(len(plan) + _GAP for plan in maps) - _GAP)
    width = _GAP * 2 + left + columns * (_VIEW[0] + _GAP)
    sheet = np.full((64 + body + _GAP, width, 3), _PAPER, np.uint8)
    _write(sheet, title, (_GAP, 34), 0.8, _INK, 2)
    facts = (
        f"{overview.triangles:,} triangles, {overview.navmesh.navigable_area:.0f} m2 to walk, "
        f"{len(maps)} {'floor' if len(maps) == 1 else 'floors'}"
    )
    _write(sheet, facts, (_GAP, 56), 0.45, _FAINT, 1)
    top = 64
    for plan in maps:
        sheet[top : top + len(plan), _GAP : _GAP + plan.shape[1]] = plan
        top += len(plan) + _GAP
    for index in range(count):
        row, column = divmod(index, columns)
        x = 2 * _GAP + left + column * (_VIEW[0] + _GAP)
        y = 64 + row * (tile + _GAP)
        sheet[y : y + _VIEW[1], x : x + _VIEW[0]] = overview.rgb[index]
        sheet[y + _VIEW[1] + 4 : y + tile, x : x + _VIEW[0]] = _depth_colours(overview.depth[index])
        _badge(sheet, (x + 16, y + 16), index + 1)
    return sheet


def _maps(overview: _Overview, height: int) -> list[NDArray[Any]]:
    """A map of every floor with the viewpoints on it, together about ``height`` pixels high."""
    import cv2

    from envs.scenes.maps import floor_heights, top_down_map

    floors = floor_heights(overview.navmesh) or [float(overview.position[0, 1])]
    size = int(np.clip((height + _GAP) // len(floors) - _GAP, 300, 800))
    maps: list[NDArray[Any]] = []
    for number, level in enumerate(floors):
        picture = top_down_map(overview.navmesh, level, size)
        plan: NDArray[Any] = picture.image.copy()
        for index, (position, yaw) in enumerate(zip(overview.position, overview.yaw, strict=True)):
            if abs(position[1] - level) < 1.0:
                _mark(plan, picture.world_to_pixel(position), float(yaw), index + 1)
        if len(floors) > 1:
            plan = cv2.copyMakeBorder(plan, 22, 0, 0, 0, cv2.BORDER_CONSTANT, value=_PAPER)
            _write(plan, f"floor {number + 1}", (0, 14), 0.45, _FAINT, 1)
        maps.append(plan)
    return maps


def _depth_colours(depth: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Depth (H, W) [m] as colour (H, W, 3): near is bright, 8 m and beyond dark, nothing black."""
    import cv2

    near = np.clip(1.0 - depth / 8.0, 0.0, 1.0)
    colours = cv2.applyColorMap((near * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    return np.where((depth > 0)[..., None], colours, 0).astype(np.uint8)


def _mark(plan: NDArray[Any], pixel: NDArray[np.float64], yaw: float, number: int) -> None:
    """Draws a numbered viewpoint with the cone that it sees."""
    import cv2

    centre = (round(float(pixel[0])), round(float(pixel[1])))
    # North of the map is -Z, which is where yaw 0 looks.
    angle = math.degrees(-yaw) - 90.0
    cone = plan.copy()
    cv2.ellipse(cone, centre, (44, 44), angle, -45, 45, (255, 196, 60), -1, cv2.LINE_AA)
    cv2.addWeighted(cone, 0.45, plan, 0.55, 0, dst=plan)
    _badge(plan, centre, number)


def _badge(image: NDArray[Any], centre: tuple[int, int], number: int) -> None:
    import cv2

    cv2.circle(image, centre, 11, (255, 255, 255), -1, cv2.LINE_AA)
    cv2.circle(image, centre, 10, _INK, -1, cv2.LINE_AA)
    text = str(number)
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.42, 1)
    _write(image, text, (centre[0] - width // 2, centre[1] + height // 2), 0.42, (255, 255, 255), 1)


def _write(
    image: NDArray[Any],
    text: str,
    at: tuple[int, int],
    size: float,
    colour: tuple[int, int, int],
    thickness: int,
) -> None:
    import cv2

    cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, colour, thickness, cv2.LINE_AA)
