"""Holds the built-in simulator and the task against recordings of real Habitat.

:mod:`navagent.recordings` reads them; here they are compared, and the figures held against their bars.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.episodes import Episode
from envs.sensors import point_goal, wrap_angle
from envs.simulators.base import Action, PathQueries, SensorSpec
from envs.task import Measures, PointNavConfig
from navagent.recordings import (
    Answers,
    RecordingError,
    agent_of,
    cameras_of,
    read_answers,
    read_description,
    read_episodes,
    read_traces,
)

if TYPE_CHECKING:
    from envs.scenes.scene import Scene
    from envs.simulators.raycast.simulator import RaycastSimulator

OBSTACLE_LIMIT = 10.0
"""The recorded distances to obstacles are capped at this [m]."""
TASK_TOLERANCE = 0.001
"""What the task may be off by, in every quantity's own unit."""
_NO_NUMBER = 1e9  # stands for errors that are none, because JSON has neither infinity nor NaN
_COLLISION_EPS = 1e-5  # [m2] Habitat's: squared length by which a move must be cut short


@dataclass(frozen=True)
class Row:
    """One figure and its bar."""

    scene: str
    """Name of the scene."""
    what: str
    """What was compared."""
    value: float | None
    """How near the simulator came; None where the folder holds no recording of it."""
    bar: float
    """What it must reach."""
    direction: Literal["<=", ">="]
    """Whether the value must lie below the bar or above it."""
    unit: str
    """Unit of value and bar."""

    @property
    def passed(self) -> bool | None:
        """Whether the bar is reached; None where nothing was recorded."""
        if self.value is None:
            return None
        return self.value <= self.bar if self.direction == "<=" else self.value >= self.bar


def run(folder: str | Path, as_json: bool = False) -> int:
    """Prints the table of :func:`check_reference`, or the same as JSON.

    Returns:
        Exit status: 0 where every bar is reached, 1 where one is missed, 2 where the folder cannot be used.
    """
    try:
        rows = check_reference(folder)
    except RecordingError as error:
        print(f"navagent reference: {error}", file=sys.stderr)
        return 2
    passed = all(row.passed is not False for row in rows)
    if as_json:
        figures = [asdict(row) | {"passed": row.passed} for row in rows]
        print(json.dumps({"folder": str(folder), "passed": passed, "rows": figures}, indent=2))
    else:
        print_table(rows, "The built-in simulator beside real Habitat")
    return 0 if passed else 1


def check_reference(folder: str | Path, device: str = "cpu") -> list[Row]:
    """Compares the simulator with every recording of a folder.

    Args:
        folder: with scenes, their ``.json`` and ``.reference.npz``, and the task's traces.
        device: where to simulate.

    Raises:
        RecordingError: the folder holds no recordings, or something in it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RecordingError(f"{folder} is not a folder; give one with recordings (NAME.glb, NAME.json, ...)")
    described = {path.stem for path in folder.glob("*.json") if path.with_suffix(".glb").is_file()}
    recorded = {path.name.removesuffix(".reference.npz") for path in folder.glob("*.reference.npz")}
    names = sorted(described | recorded)
    if not names:
        raise RecordingError(f"{folder} holds no scene with recordings (no NAME.glb beside a NAME.json)")
    traces, episodes = read_traces(folder), read_episodes(folder)
    rows: list[Row] = []
    for name in names:
        description = read_description(folder / f"{name}.json")
        try:
            rows += _check_scene(folder, name, description, device)
            rows += _check_task(name, traces.get(name), episodes, description)
        except RecordingError:
            raise
        except KeyError as error:
            raise RecordingError(f"scene {name} of {folder}: its recordings lack {error}") from error
        except (TypeError, ValueError, OSError) as error:
            raise RecordingError(f"scene {name} of {folder}: {error}") from error
    if all(row.value is None for row in rows):
        raise RecordingError(f"{folder} holds scenes, but nothing that Habitat answered about them")
    return rows


def _check_scene(folder: Path, name: str, description: dict[str, Any], device: str) -> Iterator[Row]:
    from envs.scenes.gltf import load_scene
    from envs.simulators.raycast.simulator import RaycastSimulator

    path = folder / f"{name}.glb"
    cameras = cameras_of(description)
    answers = read_answers(folder / f"{name}.reference.npz", cameras)
    num_views = len(answers["view_yaw"]) if "view_yaw" in answers else 1

    def simulator(num_agents: int, sensors: tuple[SensorSpec, ...], sliding: bool) -> RaycastSimulator:
        return RaycastSimulator([path], num_agents, sensors, agent_of(description, sliding), device=device)

    sim = simulator(num_views, cameras, True)
    yield from _check_views(name, sim, cameras, answers)
    yield from _check_paths(name, sim.paths, answers)
    sim.close()
    for kind, sliding in (("slide", True), ("stop", False)):
        count = math.prod(answers.get(f"rollout_{kind}_actions", np.zeros((1, 1))).shape)
        sim = simulator(count, (), sliding)
        yield from _check_moves(name, sim, kind, answers)
        sim.close()
    yield _check_built_mesh(name, load_scene(path), description, answers, device)


def _check_views(
    name: str, sim: RaycastSimulator, cameras: tuple[SensorSpec, ...], answers: Answers
) -> Iterator[Row]:
    """What the cameras see at the recorded poses."""
    images: dict[str, NDArray[Any]] = {}
    if "view_position" in answers:
        agents = torch.arange(sim.num_agents, device=sim.device)
        position = torch.from_numpy(answers["view_position"]).to(sim.device)
        yaw = torch.from_numpy(answers["view_yaw"]).to(sim.device)
        sim.reset(agents, torch.zeros_like(agents), position, yaw)
        images = {camera: image.cpu().numpy() for camera, image in sim.render().items()}
    for camera in cameras:
        recorded = answers.get(f"view_{camera.name}")
        error = None
        if recorded is not None:
            error = np.abs(images[camera.name].astype(np.float64) - recorded)
        if camera.kind == "depth":
            for what, bar, unit, figure in (
                ("median error", 1e-4, "m", lambda e: np.median(e)),
                ("99th percentile error", 1e-3, "m", lambda e: np.percentile(e, 99)),
                ("pixels off by more than 0.05 m", 0.05, "%", lambda e: 100 * np.mean(e > 0.05)),
            ):
                yield _row(name, f"{camera.name}: {what}", bar, "<=", unit, figure, error)
        elif camera.kind == "rgb":
            yield _row(name, f"{camera.name}: PSNR", 29.0, ">=", "dB", _psnr, error)


def _check_paths(name: str, paths: PathQueries, answers: Answers) -> Iterator[Row]:
    """Distances, navigable points and obstacles."""

    def ask(key: str, query: Callable[[Tensor, Tensor], Tensor]) -> NDArray[Any] | None:
        if key not in answers:
            return None
        points = torch.from_numpy(answers[key]).to(paths.device)
        return query(torch.zeros(len(points), dtype=torch.int64, device=paths.device), points).cpu().numpy()

    def geodesic(scene: Tensor, start: Tensor) -> Tensor:
        return paths.geodesic_distance(
            scene, start, torch.from_numpy(answers["geodesic_end"]).to(paths.device)
        )

    ours, theirs = ask("geodesic_start", geodesic), answers.get("geodesic_distance")
    relative, agree = None, None
    if ours is not None and theirs is not None:
        both = np.isfinite(ours) & np.isfinite(theirs)
        relative = np.abs(ours[both] - theirs[both]) / np.maximum(theirs[both], 1e-6)
        agree = np.isfinite(ours) == np.isfinite(theirs)
    yield _row(
        name, "geodesic: median relative error", 0.3, "<=", "%", lambda e: 100 * np.median(e), relative
    )
    yield _row(
        name,
        "geodesic: 99th percentile relative error",
        3.0,
        "<=",
        "%",
        lambda e: 100 * np.percentile(e, 99),
        relative,
    )
    yield _row(name, "geodesic: finite or not agrees", 99.5, ">=", "%", _share, agree)

    for sliding, key in ((True, "step_slide"), (False, "step_no_slide")):

        def move(scene: Tensor, start: Tensor, sliding: bool = sliding) -> Tensor:
            target = torch.from_numpy(answers["step_target"]).to(paths.device)
            return paths.try_step(scene, start, target, sliding)

        near = _within(ask("step_start", move), answers.get(key), 0.01)
        what = "sliding" if sliding else "not sliding"
        yield _row(name, f"one move, {what}: within 0.01 m", 99.0, ">=", "%", _share, near)

    ours, theirs = ask("query_point", paths.is_navigable), answers.get("query_is_navigable")
    agree = None if ours is None or theirs is None else ours == theirs
    yield _row(name, "navigable or not: agrees", 99.0, ">=", "%", _share, agree)
    near = _within(ask("query_point", paths.snap), answers.get("query_snapped"), 0.02)
    yield _row(name, "snapped point: within 0.02 m", 99.0, ">=", "%", _share, near)

    def obstacle(scene: Tensor, points: Tensor) -> Tensor:
        return paths.distance_to_obstacle(scene, points, OBSTACLE_LIMIT)

    ours, theirs = ask("obstacle_point", obstacle), answers.get("obstacle_distance")
    near = None
    if ours is not None and theirs is not None:
        near = _within(ours[:, None], theirs[:, None], 0.03)
    yield _row(name, "distance to obstacle: within 0.03 m", 95.0, ">=", "%", _share, near)


def _check_moves(name: str, sim: RaycastSimulator, kind: str, answers: Answers) -> Iterator[Row]:
    """One step of the simulator from every state of the recorded rollouts."""
    near, agree = None, None
    if (actions := answers.get(f"rollout_{kind}_actions")) is not None:
        before = answers[f"rollout_{kind}_position"][:, :-1].reshape(-1, 3)
        after = answers[f"rollout_{kind}_position"][:, 1:].reshape(-1, 3)
        x, y, z, w = answers[f"rollout_{kind}_rotation_xyzw"][:, :-1].reshape(-1, 4).T
        yaw = np.arctan2(2 * (x * z + w * y), 1 - 2 * (x * x + y * y))
        agents = torch.arange(sim.num_agents, device=sim.device)
        sim.reset(
            agents,
            torch.zeros_like(agents),
            torch.from_numpy(np.ascontiguousarray(before)).to(sim.device),
            torch.from_numpy(yaw.astype(np.float32)).to(sim.device),
        )
        # The recordings count actions from forward, which is 1 here.
        shifted = actions.reshape(-1) + int(Action.MOVE_FORWARD)
        sim.step(torch.from_numpy(shifted).to(sim.device))
        near = _within(sim.position.cpu().numpy(), after, 0.01)
        agree = sim.collided.cpu().numpy() == answers[f"rollout_{kind}_collided"].reshape(-1)
    what = "sliding" if kind == "slide" else "not sliding"
    yield _row(name, f"one action, {what}: within 0.01 m", 99.0, ">=", "%", _share, near)
    yield _row(name, f"one action, {what}: collided agrees", 99.0, ">=", "%", _share, agree)


def _check_built_mesh(
    name: str, scene: Scene, description: dict[str, Any], answers: Answers, device: str
) -> Row:
    """The navigation mesh that geometry alone gives."""
    from envs.scenes.navmesh_build import build_navmesh
    from envs.scenes.pathfinder import PathFinder

    agree = None
    if "query_point" in answers and "query_is_navigable" in answers:
        settings = description["navmesh"]
        mesh = build_navmesh(
            scene.vertices,
            scene.ground,
            agent_of(description, True),
            cell_size=settings["cell_size"],
            cell_height=settings["cell_height"],
        )
        paths = PathFinder([mesh], device=device)
        points = torch.from_numpy(answers["query_point"]).to(paths.device)
        ours = paths.is_navigable(torch.zeros(len(points), dtype=torch.int64, device=paths.device), points)
        agree = ours.cpu().numpy() == answers["query_is_navigable"]
    return _row(name, "mesh from geometry: navigable agrees", 97.0, ">=", "%", _share, agree)


TASK_QUANTITIES = {
    "pointgoal": "goal sensor",
    "reward": "reward",
    "distance_to_goal": "distance to goal",
    "success": "success",
    "spl": "SPL",
    "soft_spl": "SoftSPL",
    "collisions": "collisions",
}


def _check_task(
    name: str,
    traces: list[dict[str, Any]] | None,
    episodes: dict[tuple[str, str], Episode],
    description: dict[str, Any],
) -> Iterator[Row]:
    """The task's sensors, rewards and measures along the recorded positions and geodesic distances."""
    errors: dict[str, list[float]] = {quantity: [] for quantity in TASK_QUANTITIES}
    for trace in traces or []:
        episode = episodes.get((name, str(trace["episode_id"])))
        if episode is None:
            raise RecordingError(f"trace of scene {name}: there is no episode {trace['episode_id']} of it")
        for quantity, error in _trace_errors(trace, episode, description):
            errors[quantity].append(error if math.isfinite(error) else _NO_NUMBER)
    for quantity, title in TASK_QUANTITIES.items():
        found = np.array(errors[quantity]) if errors[quantity] else None
        unit = {"pointgoal": "m, rad", "distance_to_goal": "m"}.get(quantity, "")
        yield _row(name, f"task: {title}, largest error", TASK_TOLERANCE, "<=", unit, np.max, found)


def _trace_errors(
    trace: dict[str, Any], episode: Episode, description: dict[str, Any]
) -> Iterator[tuple[str, float]]:
    """Largest error of each quantity along one trace."""
    where = f"trace of episode {episode.episode_id} in {episode.scene_id}"
    steps = len(trace["actions"])
    if steps == 0:
        raise RecordingError(f"{where}: it has no actions")

    def recorded(key: str, *shape: int) -> Tensor:
        try:
            values = torch.tensor(trace[key], dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: numbers beyond any type
            raise RecordingError(f"{where}: {key} does not hold numbers alone: {error}") from error
        if values.shape != shape:
            raise RecordingError(
                f"{where}: {key} has shape {tuple(values.shape)}, expected {shape} for {steps} actions"
            )
        return values

    actions = recorded("actions", steps)
    if not torch.isin(actions, torch.arange(len(Action)).float()).all():
        raise RecordingError(f"{where}: actions {sorted(set(trace['actions']))} must be 0, 1, 2 or 3")
    position = recorded("position", steps + 1, 3)
    distance = recorded("distance_to_goal", steps + 1)
    pointgoal, reward = recorded("pointgoal", steps + 1, 2), recorded("reward", steps)
    measures = Measures(1, PointNavConfig())
    measures.reset(torch.tensor([0]), position[:1], distance[:1])
    rewards, distances = [], [measures.distance.clone()]
    for step, action in enumerate(actions.tolist()):
        here, there = position[step], position[step + 1]
        cut_short = (there - here).square().sum() + _COLLISION_EPS < description["forward_step"] ** 2
        collided = torch.tensor([action == Action.MOVE_FORWARD and bool(cut_short)])
        stop = torch.tensor([action == Action.STOP])
        rewards.append(measures.update(there[None], distance[step + 1 : step + 2], stop, collided))
        distances.append(measures.distance.clone())

    turns = (actions == Action.TURN_LEFT).double() - (actions == Action.TURN_RIGHT).double()
    turned = torch.cat([torch.zeros(1, dtype=torch.float64), turns.cumsum(0)])
    yaw = (episode.start_yaw + math.radians(description["turn_angle_deg"]) * turned).float()
    goal = torch.tensor(episode.goal_position).expand_as(position)
    off = point_goal(goal, position, yaw) - pointgoal
    yield "pointgoal", float(torch.stack([off[:, 0], wrap_angle(off[:, 1])]).abs().max())
    yield "reward", float((torch.cat(rewards) - reward).abs().max())
    # Where both are infinite they agree.
    ours = torch.cat(distances)
    yield "distance_to_goal", float(torch.where(ours == distance, 0.0, (ours - distance).abs()).max())
    ended = measures.as_dict()
    for quantity in ("success", "spl", "soft_spl", "collisions"):
        yield quantity, abs(float(ended[quantity]) - float(trace["metrics"][quantity]))


def _row(
    scene: str,
    what: str,
    bar: float,
    direction: Literal["<=", ">="],
    unit: str,
    figure: Callable[[NDArray[Any]], Any],
    errors: NDArray[Any] | None,
) -> Row:
    value = None if errors is None or not errors.size else float(figure(errors))
    return Row(scene, what, value, bar, direction, unit)


def _share(agrees: NDArray[Any]) -> float:
    return 100.0 * float(np.mean(agrees))


def _psnr(error: NDArray[Any]) -> float:
    # Never 0, so that the figure stays finite: JSON has no infinity.
    mean_square = max(float(np.mean(np.square(error))), 1e-10)
    return 10.0 * math.log10(255.0**2 / mean_square)


def _within(ours: NDArray[Any] | None, theirs: NDArray[Any] | None, tolerance: float) -> NDArray[Any] | None:
    """Which rows are as near as tolerance; not finite agrees with not finite only."""
    if ours is None or theirs is None:
        return None
    finite = np.isfinite(ours).all(axis=1), np.isfinite(theirs).all(axis=1)
    with np.errstate(invalid="ignore"):
        near = np.linalg.norm(ours - theirs, axis=1) <= tolerance
    return np.where(finite[0] & finite[1], near, finite[0] == finite[1])


def print_table(rows: list[Row], title: str) -> None:
    """Prints figures with their bars, and how many reach them."""
    from rich.console import Console
    from rich.table import Table

    table = Table("scene", "what", title=title)
    for column in ("measured", "bar"):
        table.add_column(column, justify="right")
    table.add_column("")
    previous = rows[0].scene
    for row in rows:
        if row.scene != previous:
            table.add_section()
        previous = row.scene
        value = "not recorded" if row.value is None else f"{row.value:.6g} {row.unit}".rstrip()
        verdict = {True: "[green]pass[/]", False: "[bold red]FAIL[/]", None: "[dim]-[/]"}[row.passed]
        table.add_row(row.scene, row.what, value, f"{row.direction} {row.bar:g} {row.unit}".rstrip(), verdict)
    console = Console()
    if not console.is_terminal:
        console.width = 120  # in a file or a pipe, lines need not fold
    console.print(table)
    failed = sum(row.passed is False for row in rows)
    measured = sum(row.passed is not None for row in rows)
    console.print(f"{measured - failed} of {measured} figures reach their bar")
