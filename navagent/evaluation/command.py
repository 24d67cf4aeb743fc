"""``navagent evaluate``: agents on a split, their table, and the pictures and report of it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import cv2
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from envs.episodes import Episode
from envs.files import atomic_write
from envs.make import split_file
from envs.vector_env import PointNavVectorEnv
from navagent.build import (
    Split,
    check_simulator,
    dataset_dir,
    make_vector_env,
    policy_settings,
    read_split,
    scenes_dir,
    training_device,
)
from navagent.config import (
    SIMULATORS,
    ConfigError,
    SensorsConfig,
    SimulatorConfig,
    TrainConfig,
    load_config,
    nearest,
    read_config,
)
from navagent.distributed import Ranks, joined
from navagent.evaluation.agents import BASELINES, Agent, PolicyAgent
from navagent.evaluation.departures import by_scene, departures
from navagent.evaluation.evaluate import evaluate_agent, gathered, spread
from navagent.evaluation.metrics import paired_difference, results_table, summarise, to_json
from navagent.evaluation.pictures import Studio
from navagent.evaluation.report import write_report
from navagent.evaluation.results import EpisodeResult, write_results
from navagent.evaluation.video import SUFFIX, write_video
from navagent.runs import CheckpointError, Run
from policies.actor_critic import NavigationPolicy

DEPARTURE_MAPS = 6
"""Homes, at most, that a map shows where the agent left the expert."""
DRAWN_SCENES = (".glb", ".gltf")
"""Scenes that the built-in simulator reads, which draws maps and videos; habitat-sim plays in others too."""


@dataclass(frozen=True)
class EvaluateOptions:
    """What ``navagent evaluate`` is asked for."""

    run: str
    """Folder of the run."""
    split: str | None = None
    """Split of the run's own data set; its val split if None."""
    dataset: str | None = None
    """Another PointNav-v1 file, in place of a split."""
    scenes: str | None = None
    """Folder that the file's scene ids start from; by default the run's scenes."""
    episodes: int | None = None
    """At most so many episodes, spread over the scenes; all if None."""
    agents: str = "run,random,expert"
    """Who is evaluated, with commas: ``run``, a name of :data:`BASELINES`, a run's folder or NAME=FOLDER."""
    checkpoint: str = "best"
    """``best``, ``latest`` or a number of frames."""
    deterministic: bool = False
    """Whether policies take their most probable action."""
    turn_back: float | None = None
    """From which probability on policies turn back at once; the run's ``evaluation.turn_back`` if None."""
    seed: int = 0
    """Seed of drawn actions and of intervals."""
    out: str | None = None
    """Folder of the results; ``RUN/evaluation/SPLIT`` if None."""
    maps: int = 8
    """Episodes with a map."""
    videos: int = 2
    """Episodes with a video."""
    device: str = "auto"
    """cpu, cuda or auto."""
    simulator: str | None = None
    """``raycast`` or ``habitat``; the run's own if None."""
    official: bool = False
    """Whether habitat-lab's own environment and measures are asked too, see
    :mod:`navagent.evaluation.official`."""
    settings: tuple[str, ...] = ()
    """Settings of the simulator that are not the run's own, ``simulator.NAME=VALUE`` each."""

    def __post_init__(self) -> None:
        if self.episodes is not None and self.episodes < 1:
            raise ConfigError(f"--episodes {self.episodes} must be at least 1")
        if self.turn_back is not None and not 0 <= self.turn_back <= 1:
            raise ConfigError(f"--turn-back {self.turn_back} must lie between 0 and 1, as a probability does")
        for name in ("maps", "videos", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} {getattr(self, name)} must be at least 0")
        if self.split is not None and self.dataset is not None:
            raise ConfigError(
                "--split names a split of the run's own data set: give it or --dataset, not both"
            )
        if self.scenes is not None and self.dataset is None:
            raise ConfigError("--scenes goes with --dataset")
        if self.official and self.simulator is not None:
            raise ConfigError("--official measures in both simulators: leave --simulator out")
        if self.simulator not in (None, *SIMULATORS):
            raise ConfigError(f"--simulator {self.simulator} is not one of {', '.join(SIMULATORS)}")
        if self.dataset is not None and not Path(self.dataset).is_file():
            raise ConfigError(f"--dataset {self.dataset} is not a file")
        if self.scenes is not None and not Path(self.scenes).is_dir():
            raise ConfigError(f"--scenes {self.scenes} is not a folder")


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    name: str
    """How the table calls it."""
    run: Run | None
    """The run it was trained in; None for agents without training."""


class Deaths(NamedTuple):
    """What befell the simulator's processes during an evaluation."""

    restarts: int
    """Deaths of processes that were started again."""
    begun_again: int
    """Episodes that began again because of them."""


def evaluate_run(
    options: EvaluateOptions, console: Console | None = None, ranks: Ranks | None = None
) -> Path:
    """Evaluates a run and others beside it; returns the folder of the results.

    Writes ``summary.json``, ``episodes.jsonl``, ``maps/``, ``views/`` and ``videos/`` there, and the run's
    ``report.html`` anew. With ``official``, see :func:`navagent.evaluation.official.evaluate_official`.

    Args:
        options: What is asked for.
        console: Where the table is shown; standard output if None.
        ranks: The processes that share the episodes; those that ``torchrun`` started, if None.
    """
    if ranks is None:
        with joined(lambda: training_device(options.device)) as together:
            return evaluate_run(options, console, together)
    console = console or Console()
    if options.official:
        from navagent.evaluation.official import evaluate_official

        return evaluate_official(options, console, ranks)
    run = Run(options.run)
    own = read_config(run.config_path)
    config = _world(options, own)
    contenders = parse_agents(options.agents, run)
    # A broken checkpoint should be found before the first agent has run for minutes.
    checkpoints = {c.name: c.run.checkpoint(options.checkpoint) for c in contenders if c.run is not None}
    check_simulator(config)
    split = read_split(*split_source(options, config))
    episodes = spread(split.episodes, options.episodes or len(split.episodes))
    scenes = {episode.scene_id: split.scenes[episode.scene_id] for episode in episodes}
    results, deaths = evaluate_contenders(contenders, config, ranks.share(episodes), scenes, options)
    results = {name: gathered(found, ranks) for name, found in results.items()}
    counts = ranks.gather(list(deaths))
    # Another simulator's numbers do not take the place of the run's own.
    other = "" if options.simulator in (None, own.simulator.name) else f"-{options.simulator}"
    name = f"{split.name}{other}"
    out = Path(options.out) if options.out else run.path / "evaluation" / name
    if not ranks.first:
        return out
    restarts, begun_again = (sum(count) for count in zip(*counts, strict=True))
    out.mkdir(parents=True, exist_ok=True)
    summaries = {name: summarise(found, options.seed) for name, found in results.items()}
    shown = contenders[0]
    shown_config = config if shown.run is None else contender_config(shown.run, config)
    drawable = [r for r in results[shown.name] if split.scenes[r.scene_id].suffix in DRAWN_SCENES]
    pictures = _draw(drawable, split, shown_config, options, out)
    left = departures(results[shown.name]).to_json()
    left["homes"] = _draw_departures(drawable, split, shown_config, options, out)
    first, *others = results.values()
    summary = what_was_evaluated(options, config, name, episodes, checkpoints) | {
        "simulator": config.simulator.name,
        "simulator_restarts": restarts,
        "episodes_begun_again": begun_again,
        "agents": {name: to_json(summary) for name, summary in summaries.items()},
        "difference": {
            found[0].agent: to_json(
                {name: paired_difference(first, found, name, options.seed) for name in ("success", "spl")}
            )
            for found in others
        },
        "departures": left,
        "pictures": pictures,
    }
    write_evaluation(out, summary, [result for found in results.values() for result in found])
    title = f"{run.path.name} on {name}: {len(episodes)} episodes in {len(scenes)} scenes"
    console.print(results_table(summaries, title, console.width))
    if len(drawable) < len(results[shown.name]):
        console.print("pictures only of scenes that are one .glb file: the built-in simulator draws them")
    if restarts:
        console.print(
            f"deaths   {restarts} of the simulator's workers, all started again; "
            f"episodes that began again: {begun_again}",
            soft_wrap=True,
        )
    report = write_report(run)
    console.print(f"results  {out}\nreport   {report}", soft_wrap=True)
    return out


def what_was_evaluated(
    options: EvaluateOptions,
    config: TrainConfig,
    split: str,
    episodes: Sequence[Episode],
    checkpoints: Mapping[str, Path],
) -> dict[str, Any]:
    """What a ``summary.json`` says besides the results."""
    return {
        "split": split,
        "dataset": options.dataset or config.scenes.dataset,
        "task": config.env.name,
        "episodes": len(episodes),
        "scenes": len({episode.scene_id for episode in episodes}),
        "seed": options.seed,
        "deterministic": options.deterministic,
        "turn_back": turn_back(options, config),
        "checkpoints": {name: file.name for name, file in checkpoints.items()},
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": as_command(options),
    }


def write_evaluation(out: Path, summary: Mapping[str, Any], results: Sequence[EpisodeResult]) -> None:
    """Writes ``summary.json`` and ``episodes.jsonl`` into an evaluation's folder."""
    write_results(results, out / "episodes.jsonl")
    with atomic_write(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _world(options: EvaluateOptions, own: TrainConfig) -> TrainConfig:
    """A run's settings with the device and the simulator of the options."""
    simulator = asked_simulator(options, own, options.simulator or own.simulator.name)
    return dataclasses.replace(own, device=options.device, simulator=simulator)


def asked_simulator(options: EvaluateOptions, own: TrainConfig, name: str) -> SimulatorConfig:
    """A run's settings of the simulator ``name``, with those that the options give in place of its own.

    Raises:
        ConfigError: one of these is no setting of the simulator, does not fit, or means nothing to it.
    """
    prefix = "simulator."
    words = [setting.partition("=")[0] for setting in options.settings]
    for word in words:
        if not word.startswith(prefix) or word == f"{prefix}name":
            raise ConfigError(
                f"{word}: only settings of habitat-sim can be given here, such as {prefix}gpu_ids=0; "
                "--simulator chooses the simulator"
            )
    asked = load_config([f"simulator={name}", *options.settings]).simulator
    given = {key: getattr(asked, key) for word in words if (key := word.removeprefix(prefix))}
    return dataclasses.replace(own.simulator, name=name, **given)


def turn_back(options: EvaluateOptions, config: TrainConfig) -> float:
    """From which probability on policies turn back at once: what is asked for, or the run's own."""
    return config.evaluation.turn_back if options.turn_back is None else options.turn_back


def as_command(options: EvaluateOptions) -> str:
    """The command line that asks for these options."""
    words = ["navagent", "evaluate", options.run]
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        if item.name in ("run", "settings") or value == item.default:
            continue
        flag = f"--{item.name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return shlex.join([*words, *options.settings])


def parse_agents(text: str, run: Run) -> list[Contender]:
    """The agents that ``--agents`` names, in order.

    Raises:
        ConfigError: for a name that is no agent, with the nearest one, or one given twice.
    """
    known = ["run", *BASELINES]
    contenders: list[Contender] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, equals, folder = word.partition("=")
        if equals:
            contender = Contender(name, Run(folder))
        elif word == "run":
            contender = Contender("run", run)
        elif word in BASELINES:
            contender = Contender(word, None)
        elif Path(word).is_dir():
            contender = Contender(Path(word).resolve().name, Run(word))
        else:
            raise ConfigError(
                f"--agents: {word!r} is no agent{nearest(word, known)} (known: {', '.join(known)}, a run's "
                f"folder, or NAME=FOLDER)"
            )
        if contender.name in [other.name for other in contenders]:
            raise ConfigError(
                f"--agents: {contender.name!r} is there twice; give one another name, NAME=FOLDER"
            )
        contenders.append(contender)
    if not contenders:
        raise ConfigError(f"--agents names no agent (known: {', '.join(known)}, or a run's folder)")
    return contenders


def split_source(options: EvaluateOptions, config: TrainConfig) -> tuple[Path, Path, str]:
    """The file of the episodes, the folder that their scenes' ids start from, and the split's name."""
    if options.dataset is None:
        name = options.split or config.scenes.val_split
        return split_file(dataset_dir(config), name), scenes_dir(config), name
    file = Path(options.dataset).resolve()
    scenes = options.scenes or config.scenes.scenes_dir or file.parent.parent.parent
    return file, Path(scenes).expanduser(), split_name(file)


def split_name(file: Path) -> str:
    """What the split in an episode file is called; the folders above tell gibson/v1/val from mp3d/v1/val."""
    name = file.name.removesuffix(".gz").removesuffix(".json")
    above = file.parent.parent
    return "-".join(dict.fromkeys(filter(None, (above.parent.name, above.name, name))))


def contender_config(run: Run, config: TrainConfig) -> TrainConfig:
    """The settings under which a run's agent is evaluated: its own senses, but the task of ``config``, and
    its way to choose."""
    own = read_config(run.config_path)
    return dataclasses.replace(
        own,
        env=config.env,
        evaluation=config.evaluation,
        scenes=config.scenes,
        simulator=config.simulator,
        device=config.device,
        num_threads=config.num_threads,
    )


def load_policy(run: Run, env: PointNavVectorEnv, checkpoint: str | int = "best") -> NavigationPolicy:
    """The policy saved in a run's checkpoint, ready to act in ``env``; see :func:`restore_policy`."""
    policy = restore_policy(run, env.single_observation_space, env.single_action_space, checkpoint)
    return policy.to(env.simulator.device)


def restore_policy(
    run: Run,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    checkpoint: str | int = "best",
) -> NavigationPolicy:
    """The policy saved in a run's checkpoint, on the CPU, for an agent of these spaces.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not fit the run's settings or the spaces.
    """
    config = read_config(run.config_path)
    # All weights are in the checkpoint; the files they started from may be gone.
    policy = NavigationPolicy(
        observation_space, action_space, lambda _: 0.0, **policy_settings(config, restored=True)
    )
    state = run.load_checkpoint(checkpoint)
    try:
        policy.load_state_dict(state["policy"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{run.checkpoint(checkpoint)}: does not fit the settings in {run.config_path}: {error}"
        ) from None
    return policy


def evaluation_progress() -> Progress:
    """Bars of finished episodes, where somebody watches."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    return Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal)


def evaluate_contenders(
    contenders: Sequence[Contender],
    config: TrainConfig,
    episodes: list[Episode],
    scenes: dict[str, Path],
    options: EvaluateOptions,
) -> tuple[dict[str, list[EpisodeResult]], Deaths]:
    """Results of each contender by name, and what happened meanwhile; the baselines share an environment."""
    if not episodes:
        # There are more processes than episodes.
        return {contender.name: [] for contender in contenders}, Deaths(0, 0)
    scenes = {episode.scene_id: scenes[episode.scene_id] for episode in episodes}
    num_envs = min(config.evaluation.num_envs, len(episodes))
    # Who does not look needs no cameras.
    blind = dataclasses.replace(config, sensors=SensorsConfig(rgb=False, depth=False))
    shared: PointNavVectorEnv | None = None

    def environment(settings: TrainConfig) -> PointNavVectorEnv:
        return make_vector_env(
            settings, episodes, scenes, num_envs, "once", AutoresetMode.NEXT_STEP, seed=options.seed
        )

    results: dict[str, list[EpisodeResult]] = {}
    restarts = begun_again = 0

    def close(env: PointNavVectorEnv) -> None:
        nonlocal restarts, begun_again
        restarts += env.simulator.restarts
        begun_again += env.interruptions
        env.close()

    with evaluation_progress() as progress:
        for contender in contenders:
            task = progress.add_task(contender.name, total=len(episodes))
            if contender.run is None:
                env = shared = shared or environment(blind)
                agent: Agent = BASELINES[contender.name]()
            else:
                env = environment(contender_config(contender.run, config))
                policy = load_policy(contender.run, env, options.checkpoint)
                agent = PolicyAgent(policy, contender.name, options.deterministic, turn_back(options, config))
            try:
                results[contender.name] = evaluate_agent(
                    env,
                    agent,
                    options.seed,
                    lambda done, _, task=task: progress.update(task, completed=done),  # type: ignore[misc]
                )
            finally:
                if env is not shared:
                    close(env)
    if shared is not None:
        close(shared)
    return results, Deaths(restarts, begun_again)


def _draw(
    results: list[EpisodeResult], split: Split, config: TrainConfig, options: EvaluateOptions, out: Path
) -> list[dict[str, Any]]:
    """Draws maps, views and videos of episodes chosen evenly, whatever came of them; lists the files."""
    count = min(max(options.maps, options.videos), len(results))
    if count == 0:
        return []
    chosen = [results[index * len(results) // count] for index in range(count)]
    for folder in ("maps", "views", "videos"):
        for old in (out / folder).glob("*"):
            old.unlink()
    pictures: list[dict[str, Any]] = []
    videos = {index * count // max(options.videos, 1) for index in range(min(options.videos, count))}
    studio: Studio | None = None
    scene_shown = ""
    for index, result in enumerate(chosen):
        if studio is None or scene_shown != result.scene_id:
            if studio is not None:
                studio.close()
            studio, scene_shown = Studio(split.scenes[result.scene_id], config), result.scene_id
        stem = f"{index:03d}-{Path(result.scene_id).stem}-{safe_name(result.episode_id)}"
        picture: dict[str, Any] = {"result": result.to_json()}
        if index < options.maps:
            picture["map"] = _write_png(out / "maps" / f"{stem}.png", studio.map(result), out)
            picture["view"] = _write_png(out / "views" / f"{stem}.png", studio.view(result), out)
        if index in videos:
            path = out / "videos" / f"{stem}{SUFFIX}"
            write_video(studio.video(result), path)
            picture["video"] = path.relative_to(out).as_posix()
        pictures.append(picture)
    if studio is not None:
        studio.close()
    return pictures


def _draw_departures(
    results: list[EpisodeResult], split: Split, config: TrainConfig, options: EvaluateOptions, out: Path
) -> list[dict[str, Any]]:
    """Draws where the agent left the expert, in the homes in which it did so most; lists the files."""
    folder = out / "departures"
    for old in folder.glob("*"):
        old.unlink()
    drawn: list[dict[str, Any]] = []
    for index, (scene, own) in enumerate(by_scene(results).items()):
        if index == min(options.maps, DEPARTURE_MAPS):
            break
        studio = Studio(split.scenes[scene], config)
        path = folder / f"{index:03d}-{safe_name(Path(scene).stem)}.png"
        file = _write_png(path, studio.departures(own), out)
        studio.close()
        share = departures(own).to_json()["share"]
        drawn.append({"scene_id": scene, "share": share, "episodes": len(own), "map": file})
    return drawn


def safe_name(name: str) -> str:
    """An episode's id as a file name may hold it; it comes from a file that anyone may have written."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:40]


def _write_png(path: Path, image: Any, out: Path) -> str:
    with atomic_write(path) as temporary:
        cv2.imwrite(str(temporary), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return path.relative_to(out).as_posix()
