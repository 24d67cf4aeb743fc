"""``navagent compare``: finished runs beside each other, on one plot and in one table.

What a run was trained on counts from the very beginning: one that began as another's agent (``start_from``)
has that run's frames behind it, and its curve begins there. So learning in two stages is held against one
stage at the same budget.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from envs.files import atomic_write
from navagent.config import ConfigError, TrainConfig, as_typed, flatten, read_config
from navagent.evaluation.curves import Curve, draw_comparison, evaluations
from navagent.evaluation.metrics import Estimate, paired_difference, summarise, to_json
from navagent.evaluation.report import actions_taken, read_evaluations, turned_back
from navagent.evaluation.results import EpisodeResult, read_results
from navagent.runs import Run, read_checkpoint

COMPARED = ("success", "spl")
"""Measures that are compared."""
OF_REWARD = ("name", "slack_reward", "progress_reward", "success_reward", "success_bonus")
"""Settings of ``env`` that change what an agent learns from, and not what it is measured by."""
SAME_BUDGET = 0.01
"""Budgets that differ by no more than this share of the largest are called the same."""


@dataclass(frozen=True)
class CompareOptions:
    """What ``navagent compare`` is asked for."""

    runs: tuple[str, ...]
    """Folders of the runs, or NAME=FOLDER; the first one is held against each of the others."""
    out: str = "comparison"
    """Folder for table, plot and numbers."""
    split: str | None = None
    """Evaluation that is compared, a folder under RUN/evaluation; that of the run's val split if None."""


@dataclass(frozen=True)
class Contestant:
    """One run with what was measured of it."""

    name: str
    run: Run
    config: TrainConfig
    results: list[EpisodeResult]
    """Of the final evaluation."""
    summary: Mapping[str, Any]
    """What else that evaluation says of itself."""
    curve: Curve

    @property
    def deterministic(self) -> bool:
        """Whether the most probable actions were taken."""
        return bool(self.summary["deterministic"])

    @property
    def turn_back(self) -> float:
        """From which probability on it turned back at once."""
        return turned_back(self.summary)

    @property
    def began(self) -> tuple[float, float, float] | None:
        """SPL of an agent that began as another's, its lowest since, and after how many frames in all.

        None for an agent of its own, and where it was not measured at its beginning.
        """
        rows = evaluations(self.curve.records, "spl")
        if not self.curve.before or not len(rows) or rows[0, 0] != 0:
            return None
        lowest = int(rows[:, 1].argmin())
        return float(rows[0, 1]), float(rows[lowest, 1]), self.curve.before + float(rows[lowest, 0])


def compare_runs(options: CompareOptions, console: Console | None = None) -> Path:
    """Compares runs; writes ``table.md``, ``plot.png`` and ``results.json``, and returns their folder.

    Raises:
        ConfigError: fewer than two runs, a name twice, or runs that were evaluated on different episodes or
            under different rules; the message says in what they differ.
        RunError: a folder is no run's, or what lies in it is broken.
    """
    console = console or Console()
    if len(options.runs) < 2:
        raise ConfigError(f"{len(options.runs)} run to compare; expected two or more, RUN or NAME=RUN each")
    contestants: list[Contestant] = []
    for word in options.runs:
        one = _contestant(word, options.split)
        if one.name in [other.name for other in contestants]:
            raise ConfigError(f"{one.name!r} is there twice; give one another name, NAME={one.run.path}")
        contestants.append(one)
    first, *others = contestants
    for other in others:
        _check_alike(first, other)
    differences = {
        other.name: {name: paired_difference(first.results, other.results, name) for name in COMPARED}
        for other in others
    }
    out = Path(options.out)
    table = _table(contestants, differences)
    results = {
        "episodes": len(first.results),
        "scenes": len({result.scene_id for result in first.results}),
        "runs": {one.name: _numbers(one) for one in contestants},
        "difference": {name: to_json(each) for name, each in differences.items()},
    }
    for file, text in (("table.md", table), ("results.json", json.dumps(results, indent=1) + "\n")):
        with atomic_write(out / file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    draw_comparison([one.curve for one in contestants], out / "plot.png")
    console.print(table, highlight=False, markup=False, soft_wrap=True)
    console.print(f"results  {out}", highlight=False, markup=False, soft_wrap=True)
    return out


def _contestant(word: str, split: str | None) -> Contestant:
    """The run that a word of the command line means."""
    name, equals, folder = word.partition("=")
    run = Run(Path(folder if equals else word).expanduser())
    config = read_config(run.config_path)
    wanted = split or config.scenes.val_split
    found = {evaluation.folder.name: evaluation for evaluation in read_evaluations(run)}
    if wanted not in found:
        there = f" (there are {', '.join(found)})" if found else ""
        raise ConfigError(
            f"{run.path}: no evaluation of {wanted!r}{there}; do it with `navagent evaluate {run.path}`"
        )
    evaluation = found[wanted]
    results = [one for one in read_results(evaluation.folder / "episodes.jsonl") if one.agent == "run"]
    if not results:
        raise ConfigError(
            f"{evaluation.folder}: an evaluation of {', '.join(evaluation.agents)}, not of the run's own "
            f"agent; do it with `navagent evaluate {run.path}`"
        )
    name = name if equals else run.path.resolve().name
    before, beginning = _beginning(run, config)
    evaluated = _frames_of(run, str(evaluation.summary["checkpoints"]["run"]))
    final_frames = None if evaluated is None else before + evaluated
    curve = Curve(name, run.read_metrics(), before, summarise(results), final_frames, beginning)
    return Contestant(name, run, config, results, evaluation.summary, curve)


def _frames_of(run: Run, checkpoint: str) -> int | None:
    """Frames of the run that are in a checkpoint of it; None where that is gone."""
    file = run.checkpoint_dir / checkpoint
    if file.stem.isdigit():
        return int(file.stem)
    return int(read_checkpoint(file)["frames"]) if file.is_file() else None


def _beginning(run: Run, config: TrainConfig) -> tuple[int, tuple[Curve, ...]]:
    """Frames before a run's first, and curves of the runs that it began as, where they are still there."""
    origin = run.origin
    if origin is None:
        if config.start_from is not None:
            raise ConfigError(
                f"{run.path}: it began as start_from={config.start_from}, and an earlier navagent has not "
                f"noted after how many frames N; write "
                f'{{"run": "{config.start_from}", "checkpoint": "best.safetensors", "frames": N}} to '
                f"{run.path / 'origin.json'}"
            )
        return 0, ()
    folder = Path(origin.run)
    if not (folder / "config.yaml").is_file():
        return origin.frames, ()
    earlier = Run(folder)
    before = earlier.origin.frames if earlier.origin is not None else 0
    if before >= origin.frames or _rules(read_config(earlier.config_path)) != _rules(config):
        return origin.frames, ()
    # It may have been trained further since.
    records = [one for one in earlier.read_metrics() if before + one["frames"] <= origin.frames]
    _, older = _beginning(earlier, read_config(earlier.config_path))
    return origin.frames, (*older, Curve(folder.name, records, before))


def _rules(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide in which homes, and by which rules, a run is evaluated."""
    rules = {
        name: value
        for name, value in flatten(config).items()
        if name == "simulator.name"
        or (name.partition(".")[0] == "env" and name.partition(".")[2] not in OF_REWARD)
    }
    scenes = config.scenes
    if scenes.dataset == "generated":
        rules |= {"scenes.num": scenes.num, "scenes.seed": scenes.seed}
    dataset = scenes.dataset if scenes.dataset == "generated" else str(Path(scenes.dataset).resolve())
    return rules | {"scenes.dataset": dataset, "scenes.val_split": scenes.val_split}


def _check_alike(one: Contestant, other: Contestant) -> None:
    """Refuses two runs whose numbers do not mean the same."""
    ours, theirs = _rules(one.config), _rules(other.config)
    different = [
        f"{name}={as_typed(theirs.get(name))}, not {as_typed(ours.get(name))}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if different:
        raise ConfigError(
            f"{other.run.path} was evaluated in other homes or under other rules than {one.run.path}: "
            f"{'; '.join(different)}. Train both alike, or measure both agents on one data set: `navagent "
            f"evaluate {one.run.path} --dataset FILE --agents run,{other.name}={other.run.path}`"
        )
    if one.deterministic != other.deterministic:
        most, drawn = (one, other) if one.deterministic else (other, one)
        raise ConfigError(
            f"{most.run.path} was evaluated by its most probable actions and {drawn.run.path} by drawn ones; "
            f"evaluate both alike: `navagent evaluate {drawn.run.path} --deterministic`"
        )
    if one.turn_back != other.turn_back:
        free, careful = (one, other) if one.turn_back < other.turn_back else (other, one)
        raise ConfigError(
            f"{one.run.path} was evaluated with a turn_back of {one.turn_back:g} and {other.run.path} with "
            f"{other.turn_back:g}; evaluate both alike: `navagent evaluate {free.run.path} --turn-back "
            f"{careful.turn_back:g}`"
        )
    episodes = [
        {(result.scene_id, result.episode_id, result.start, result.goal) for result in each.results}
        for each in (one, other)
    ]
    if episodes[0] != episodes[1]:
        counts = [len(each) for each in episodes]
        raise ConfigError(
            f"{one.run.path} and {other.run.path} were evaluated on different episodes: on {counts[0]} and "
            f"{counts[1]}, of which {len(episodes[0] & episodes[1])} are the same. Evaluate both on as many: "
            f"`navagent evaluate RUN --episodes {min(counts)}`"
        )


def _numbers(one: Contestant) -> dict[str, Any]:
    """What ``results.json`` tells of a run."""
    assert one.curve.final is not None
    rows = {measure: evaluations(one.curve.records, measure) for measure in COMPARED}
    origin = one.run.origin
    return {
        "folder": str(one.run.path),
        "began_as": None if origin is None else origin.run,
        "frames_before": one.curve.before,
        "frames": int(one.curve.frames),
        "checkpoint": one.summary["checkpoints"]["run"],
        "checkpoint_frames": one.curve.final_frames,
        "measures": to_json(one.curve.final),
        "while_training": {
            "episodes": one.config.evaluation.num_episodes,
            "frames": (one.curve.before + rows["spl"][:, 0]).astype(int).tolist(),
            **{measure: found[:, 1].tolist() for measure, found in rows.items()},
        },
    }


def _table(contestants: Sequence[Contestant], differences: dict[str, dict[str, Estimate]]) -> str:
    """The comparison in words, as Markdown."""
    first = contestants[0]
    scenes = len({result.scene_id for result in first.results})
    lines = [
        f"Final evaluation of each run: the same {len(first.results)} episodes in {scenes} "
        f"home{'s' * (scenes != 1)}, {actions_taken(first.summary)}; "
        "95 % intervals over episodes and, where there are enough, over homes.",
        "",
        "| run | frames in all | success | over homes | SPL | over homes |",
        "|---|---|---|---|---|---|",
    ]
    for one in contestants:
        assert one.curve.final is not None
        frames = f"{one.curve.frames:,.0f}"
        if one.curve.before:
            frames += f" ({one.curve.before:,} of them before)"
        cells = [cell for name in COMPARED for cell in _cells(one.curve.final[name], "")]
        lines.append(f"| {' | '.join([one.name, frames, *cells])} |")
    lines += [
        "",
        f"{first.name} minus another, episode by episode; an interval without 0 is a difference:",
        "",
        "| minus | success | over homes | SPL | over homes |",
        "|---|---|---|---|---|",
    ]
    for name, each in differences.items():
        cells = [cell for measure in COMPARED for cell in _cells(each[measure], "+")]
        lines.append(f"| {' | '.join([name, *cells])} |")
    notes = _notes(contestants)
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def _cells(value: Estimate, sign: str) -> tuple[str, str]:
    """A mean with its interval over episodes, and its interval over homes."""

    def interval(low: float, high: float) -> str:
        return f"{low:{sign}.3f} to {high:{sign}.3f}"

    homes = interval(*value.over_scenes) if value.over_scenes else "too few"
    return f"{value.mean:{sign}.3f} ({interval(value.low, value.high)})", homes


def _notes(contestants: Sequence[Contestant]) -> list[str]:
    """What a reader of the table should know besides, a line each."""
    notes = []
    frames = [one.curve.frames for one in contestants]
    if max(frames) - min(frames) > SAME_BUDGET * max(frames):
        notes.append(f"- The budgets differ: {min(frames):,.0f} to {max(frames):,.0f} frames.")
    for one in contestants:
        evaluated = one.curve.final_frames
        if evaluated is not None and evaluated < one.curve.frames:
            notes.append(
                f"- Of {one.name} the agent after {evaluated:,.0f} frames was evaluated, the best by then; "
                f"`navagent evaluate {one.run.path} --checkpoint latest` takes the last."
            )
        if one.began is not None:
            start, lowest, when = one.began
            notes.append(
                f"- {one.name} began with an SPL of {start:.3f}; its lowest since is {lowest:.3f}, after "
                f"{when:,.0f} frames."
            )
    counts = {one.name: one.config.evaluation.num_episodes for one in contestants}
    if len(set(counts.values())) == 1:
        notes.append(
            f"- Evaluations while training, in the plot, are of {counts[contestants[0].name]} episodes."
        )
    else:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        notes.append(
            f"- Evaluations while training, in the plot, are of different numbers of episodes: {listed}."
        )
    return notes
