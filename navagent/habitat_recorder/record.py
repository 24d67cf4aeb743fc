"""Makes a folder of recordings of real Habitat, anew or by asking again what another folder asked."""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.episodes import Episode, find_scene, scene_name, write_dataset
from envs.simulators.base import AgentSpec, SensorSpec
from navagent.habitat_recorder.questions import QUESTIONS, ROLLOUTS, Counts, draw_questions
from navagent.real_habitat import HabitatMissingError, import_habitat
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
    from navagent.habitat_recorder.scene import Habitat, HabitatScene

SPLIT = "val"
"""Name of the split that recorded episodes are in."""

OnProgress = Callable[[str, int, int], object]
"""Told the scene's name, how many answers came, and how many there will be."""


@dataclass(frozen=True)
class RecordOptions:
    """What is recorded of every scene."""

    agent: AgentSpec = field(default_factory=AgentSpec)
    """The body that walks."""
    sensor_height: float = 1.25
    """Height of the cameras above the feet [m]."""
    seed: int = 0
    """Where the questions come from."""
    episodes: int = 20
    """PointNav episodes in each scene; with 0, habitat-lab is not needed."""
    gpu: int = -1
    """Device that renders; -1 for software."""
    counts: Counts = field(default_factory=Counts)
    """How much is asked."""

    def cameras(self) -> tuple[SensorSpec, ...]:
        """The cameras of a new recording."""
        height = self.sensor_height
        return (
            SensorSpec("depth128", "depth", 128, 128, 90.0, height),
            SensorSpec("rgb128", "rgb", 128, 128, 90.0, height),
            SensorSpec("depth64x96", "depth", 64, 96, 70.0, height),
        )


@dataclass(frozen=True)
class _Plan:
    """What is asked about one scene."""

    source: Path
    agent: AgentSpec
    cameras: tuple[SensorSpec, ...]
    mesh: dict[str, Any] = field(default_factory=dict)
    """Settings of an earlier recording's navigation mesh."""
    questions: Answers | None = None
    """Those of an earlier recording; None where they are drawn."""
    episodes: list[Episode] | None = None
    """Those of an earlier recording; None where they are drawn."""
    traces: list[dict[str, Any]] | None = None
    """Those of an earlier recording, whose actions are done again."""


def find_glbs(scenes: str | Path) -> dict[str, Path]:
    """The ``.glb`` files of a folder and the folders in it, or one such file, by the scenes' names.

    Raises:
        RecordingError: there are none, or two have one name.
    """
    scenes = Path(scenes)
    if not scenes.exists():
        raise RecordingError(f"{scenes} does not exist; give a .glb file or a folder of them")
    files = sorted(scenes.rglob("*.glb")) if scenes.is_dir() else [scenes]
    if not files or files[0].suffix != ".glb":
        raise RecordingError(f"{scenes} holds no scene: expected a .glb file, or a folder with such files")
    found: dict[str, Path] = {}
    for file in files:
        name = scene_name(file.name)
        if name in found:
            raise RecordingError(
                f"{found[name]} and {file} are both named {name}; record them into two folders"
            )
        found[name] = file.resolve()
    return found


def plan_again(recordings: str | Path) -> dict[str, _Plan]:
    """What a folder of recordings asked, to ask it again.

    Raises:
        RecordingError: it holds no recordings, or broken ones.
    """
    folder = Path(recordings)
    names = sorted(path.name.removesuffix(".reference.npz") for path in folder.glob("*.reference.npz"))
    if not names:
        raise RecordingError(f"--again: {folder} holds no recordings to make again (no NAME.reference.npz)")
    traces, episodes = read_traces(folder), read_episodes(folder)
    plans: dict[str, _Plan] = {}
    for name in names:
        description = read_description(folder / f"{name}.json")
        cameras = cameras_of(description)
        answers = read_answers(folder / f"{name}.reference.npz", cameras)
        starts = [f"rollout_{kind}_{what}" for kind in ROLLOUTS for what in ("position", "rotation_xyzw")]
        if missing := sorted({*QUESTIONS, *starts} - answers.keys()):
            raise RecordingError(f"--again: {folder / name}.reference.npz lacks {', '.join(missing)}")
        questions = {key: answers[key] for key in QUESTIONS} | {key: answers[key][:, :1] for key in starts}
        questions |= {key: questions[key].astype(np.int8) for key in questions if key.endswith("_actions")}
        own = [episode for (scene, _), episode in episodes.items() if scene == name]
        played = traces.get(name, [])
        known = {episode.episode_id for episode in own}
        if unknown := [trace.get("episode_id") for trace in played if trace.get("episode_id") not in known]:
            raise RecordingError(f"--again: traces of {name} name episodes that are not there: {unknown[:5]}")
        source = find_scene(f"{name}.glb", folder)
        agent, mesh = agent_of(description, True), description["navmesh"]
        plans[name] = _Plan(source, agent, cameras, mesh, questions, own, played)
    return plans


def record(
    scenes: str | Path,
    out: str | Path,
    options: RecordOptions | None = None,
    again: bool = False,
    on_progress: OnProgress = lambda scene, done, total: None,
) -> Path:
    """Writes what real Habitat answers about some scenes into the new folder ``out``.

    The folder appears when all is recorded; what a killed process left is cleared away by the next one. The
    same scenes, options and Habitat give the same answers.

    Args:
        scenes: a ``.glb`` file, or a folder of them.
        out: folder to make.
        options: what to ask; of these only ``gpu`` counts where ``again``.
        again: ``scenes`` is a folder of recordings: ask what they asked, of the same agent with the same
            cameras, and do the same actions in the same episodes.
        on_progress: told how far it is.

    Returns:
        ``out``.

    Raises:
        RecordingError: Habitat is missing, ``scenes`` holds none, ``out`` is occupied, or a scene cannot be
            walked in.
    """
    options, out = options or RecordOptions(), Path(out).absolute()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise RecordingError(f"{out} exists already; give the name of a new folder")
    if again:
        plans = plan_again(scenes)
    else:
        agent, cameras = options.agent, options.cameras()
        plans = {name: _Plan(file, agent, cameras) for name, file in find_glbs(scenes).items()}
    try:
        import_habitat(lab=any(_num_episodes(plan, options) for plan in plans.values()))
    except HabitatMissingError as error:
        without = "; --episodes 0 records without it" if error.package == "habitat-lab" else ""
        raise RecordingError(f"{error}{without}") from None
    from navagent.habitat_recorder.scene import Habitat

    partial = out.parent / f".partial-{out.name}"
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    partial.mkdir(parents=True)
    try:
        episodes: list[Episode] = []
        traces: dict[str, list[dict[str, Any]]] = {}
        with contextlib.closing(Habitat(options.gpu)) as habitat:
            for name, plan in plans.items():
                traces[name] = _record_scene(habitat, partial, name, plan, options, episodes, on_progress)
        if episodes:
            text = json.dumps(traces).encode()
            (partial / "pointnav_traces.json.gz").write_bytes(gzip.compress(text, mtime=0))
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _num_episodes(plan: _Plan, options: RecordOptions) -> int:
    return options.episodes if plan.traces is None else len(plan.traces)


def _record_scene(
    habitat: Habitat,
    folder: Path,
    name: str,
    plan: _Plan,
    options: RecordOptions,
    episodes: list[Episode],
    on_progress: OnProgress,
) -> list[dict[str, Any]]:
    """Records one scene, adds its episodes to those of the others, and returns what happened along them."""
    glb = folder / f"{name}.glb"
    _copy_scene(plan.source, glb)
    num_episodes = _num_episodes(plan, options)
    scene = habitat.open(glb, plan.agent, plan.cameras, plan.mesh)
    questions = plan.questions or _draw(scene, options)
    total, done = _num_answers(questions) + num_episodes, 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(name, done, total)

    advance(0)
    scene.paths.save_nav_mesh(str(glb.with_suffix(".navmesh")))
    (folder / f"{name}.json").write_text(json.dumps(scene.describe(name), indent=1) + "\n", encoding="utf-8")
    answers = scene.answer(questions, advance)
    np.savez_compressed(folder / f"{name}.reference.npz", **answers)  # type: ignore[arg-type]
    if not num_episodes:
        return []
    from navagent.habitat_recorder.task import draw_episodes, play_episodes, task_config

    height = plan.cameras[0].sensor_height
    config = task_config(folder, glb, SPLIT, plan.agent, height, options.gpu, options.seed)
    episodes += draw_episodes(config, num_episodes) if plan.episodes is None else plan.episodes
    write_dataset(episodes, folder / "pointnav" / SPLIT / f"{SPLIT}.json.gz")
    return play_episodes(config, plan.traces, advance)


def _draw(scene: HabitatScene, options: RecordOptions) -> Answers:
    scene.paths.seed(options.seed)
    return draw_questions(scene.sample, scene.bounds, options.seed, options.counts)


def _num_answers(questions: Answers) -> int:
    """How many answers :meth:`HabitatScene.answer` counts."""
    size = {name: len(values) for name, values in questions.items()}
    walked = sum(questions[f"rollout_{kind}_actions"].size for kind in ROLLOUTS)
    # Two answers to each move, three to each point.
    asked = size["geodesic_start"] + 2 * size["step_start"] + 3 * size["query_point"] + size["obstacle_point"]
    return asked + walked + size["view_position"]


def _copy_scene(source: Path, glb: Path) -> None:
    """Copies a scene, and the settings beside it that Habitat loads with it."""
    shutil.copyfile(source, glb)
    stage = source.with_suffix(".stage_config.json")
    if stage.is_file():
        shutil.copyfile(stage, glb.with_suffix(".stage_config.json"))
