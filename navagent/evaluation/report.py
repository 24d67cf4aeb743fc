"""A run on one page: ``report.html``, a single file that opens without a network."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from envs.files import atomic_write
from envs.scenes.maps import MARK, VISITED
from navagent.config import (
    AdaptationConfig,
    Command,
    TrainConfig,
    as_typed,
    flatten,
    load_config,
    meaningless,
    option_help,
    read_config,
    to_yaml,
)
from navagent.evaluation.curves import DARK, draw_curves
from navagent.evaluation.metrics import MEASURES, Estimate, from_json
from navagent.runs import Run, RunError

_KINDS = {".png": "image/png", ".mp4": "video/mp4"}
_NOT_THE_EXPERIMENT = ("run_dir", "resume", "device", "num_threads")
"""Settings that say where and how a run was computed, not what it was."""


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


_LEGEND = (
    '<span class="key" style="background:#2c62c8;margin-left:0"></span>start'
    '<span class="key" style="background:#d63e3e"></span>goal'
    '<span class="key" style="background:#40a86c"></span>shortest path'
    '<span class="key time"></span>the agent\'s path, first to last'
    f'<span class="key" style="background:{_hex(MARK)}"></span>where it left the expert. '
    "Beside each map: what it saw at the start."
)
"""Explains the colours of :func:`envs.scenes.maps.draw_map`."""


@dataclass(frozen=True)
class Evaluation:
    """One folder under ``RUN/evaluation``."""

    folder: Path
    summary: Mapping[str, Any]
    """What is in its ``summary.json``."""
    agents: Mapping[str, Mapping[str, Estimate]]
    """Measures of each agent; the first one is the run's."""


def read_evaluations(run: Run) -> list[Evaluation]:
    """The evaluations that lie in the run's folder, that of its own val split first.

    Raises:
        RunError: a ``summary.json`` is broken; the message names it.
    """
    found = []
    for file in sorted((run.path / "evaluation").glob("*/summary.json")):
        try:
            summary = json.loads(file.read_text(encoding="utf-8"))
            agents = {name: from_json(data) for name, data in summary["agents"].items()}
            if not agents:
                raise ValueError("no agent")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{file}: not an evaluation's summary ({error!r}); evaluate again or delete its folder"
            ) from None
        found.append(Evaluation(file.parent, summary, agents))
    own = read_config(run.config_path).scenes.val_split
    return sorted(found, key=lambda evaluation: evaluation.folder.name != own)


def write_report(run: Run) -> Path:
    """Writes ``report.html`` and ``curves.png`` into the run's folder, from what lies there.

    Returns:
        The page's path.
    """
    config = read_config(run.config_path)
    records = run.read_metrics()
    evaluations = read_evaluations(run)
    main = evaluations[0] if evaluations else None
    others = dict(list(main.agents.items())[1:]) if main else {}
    curves = run.path / "curves.png"
    draw_curves(records, curves, others)
    dark = run.path / ".curves-dark.png"
    try:
        draw_curves(records, dark, others, DARK)
        parts = [
            *(_evaluated(config, main, records) if main else []),
            _curves(curves, dark),
            *(_other_evaluation(evaluation) for evaluation in evaluations[1:]),
            _settings(config),
            _provenance(run, config, main),
        ]
    finally:
        dark.unlink(missing_ok=True)
    template = Template(resources.files("navagent.evaluation").joinpath("report.html").read_text("utf-8"))
    page = template.substitute(
        title=escape(run.path.resolve().name),
        lead=_lead(config, records, main),
        body="\n".join(part for part in parts if part),
        footer="Success: the agent called stop nearer to the goal than "
        f"{config.env.success_distance:g} m (geodesic). SPL: success times shortest path over own path. "
        "SoftSPL: the covered share of the distance in place of success. Intervals hold 95 %: Wilson's for "
        "success, bootstrap over episodes otherwise.",
    )
    path = run.path / "report.html"
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _evaluated(config: TrainConfig, main: Evaluation, records: list[dict[str, Any]]) -> list[str]:
    return [
        _tiles(config, main, records),
        _results(main),
        _videos(main),
        _maps(main),
        _departures(main),
    ]


def reproduce_command(config: TrainConfig) -> str:
    """The command line that trains with these settings, only what differs from the defaults named."""
    changed = (f"{name}={as_typed(value)}" for name, value in _changed(config).items())
    return shlex.join(["navagent", _verb(config), *changed])


def _verb(config: TrainConfig) -> Command:
    return "imitate" if config.algorithm.name == "imitation" else "train"


def _changed(config: TrainConfig) -> dict[str, Any]:
    """The settings of the experiment that differ from the defaults, by dotted name.

    A method's settings are held against its own defaults: other methods lack them, or mean another thing.
    """
    verb = _verb(config)
    reinforced = verb == "train" and config.start_from is not None
    start = load_config(["experiment=reinforce"] if reinforced else [], verb)
    usual = start.adaptation.name
    defaults = flatten(dataclasses.replace(start, adaptation=AdaptationConfig(config.adaptation.name)))
    defaults["adaptation.name"] = usual
    # An experiment may speak of what this run does not look at; on a command line that would be refused.
    dead = meaningless(config)
    return {
        name: value
        for name, value in flatten(config).items()
        if value != defaults[name] and name not in _NOT_THE_EXPERIMENT and name not in dead
    }


def data_uri(path: Path) -> str:
    """A file as a ``data:`` address."""
    return f"data:{_KINDS[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _lead(config: TrainConfig, records: list[dict[str, Any]], main: Evaluation | None) -> str:
    seen = " and ".join(
        word for word, there in (("colour", config.sensors.rgb), ("depth", config.sensors.depth)) if there
    )
    eyes = f"sees {seen} at {config.sensors.width}×{config.sensors.height}" if seen else "sees nothing"
    adapted = option_help("adaptation", config.adaptation.name).rstrip(".")
    body = f"An agent that {eyes}" + (f" ({adapted})" if seen else "") + "."
    if main is None:
        return body + " It has not been evaluated yet."
    if "run" not in main.agents:
        return body
    ours = main.agents["run"]
    success = ours["success"]
    homes = (
        "homes it had never seen"
        if _unseen(config, main)
        else f"homes of {escape(str(main.summary['split']))}"
    )
    return (
        f"{body} In {homes} it reached the goal in <b>{success.mean:.0%}</b> of "
        f"{_count(main.summary['episodes'], 'episode')}, with an SPL of <b>{ours['spl'].mean:.2f}</b>."
    )


def _unseen(config: TrainConfig, evaluation: Evaluation) -> bool:
    """Whether an evaluation is on the run's own val split, which shares no home with its train split."""
    scenes = config.scenes
    return evaluation.summary["split"] == scenes.val_split != scenes.train_split


def _tile(name: str, value: str, more: str) -> str:
    return (
        f'<div class="tile"><div class="name">{escape(name)}</div><div class="value">{escape(value)}</div>'
        f'<div class="more">{escape(more)}</div></div>'
    )


def _tiles(config: TrainConfig, main: Evaluation, records: list[dict[str, Any]]) -> str:
    agent, ours = next(iter(main.agents.items()))
    of = "" if agent == "run" else f" of {agent}"
    tiles = []
    for name, label in (("success", "success"), ("spl", "SPL")):
        value = ours[name]
        tiles.append(_tile(label + of, f"{value.mean:.2f}", f"95 %: {value.low:.2f} – {value.high:.2f}"))
    if records:
        seconds = max((_number(record.get("time/trained_seconds")) for record in records), default=0.0)
        frames = records[-1]["frames"]
        tiles.append(_tile("frames trained on", _short(frames), f"in {_span(seconds)}" if seconds else ""))
    over = ours["success"].over_scenes
    more = f"success over homes: {over[0]:.2f} – {over[1]:.2f}" if over else ""
    tiles.append(
        _tile(
            "unseen homes" if _unseen(config, main) else "homes",
            str(main.summary["scenes"]),
            more or _count(main.summary["episodes"], "episode"),
        )
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _count(number: Any, word: str) -> str:
    return f"{escape(str(number))} {word}" + ("" if number == 1 else "s")


def _span(seconds: float) -> str:
    """A span of time, roughly."""
    for size, word in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {word}"
    return f"{seconds:.0f} seconds"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def _results(evaluation: Evaluation) -> str:
    cells = ['<div class="head"></div><div class="head">success</div><div class="head">SPL</div>']
    for index, (name, measures) in enumerate(evaluation.agents.items()):
        cells.append(f'<div class="who">{escape(name)}</div>')
        for measure in ("success", "spl"):
            value = measures[measure]
            low, width = 100 * value.low, max(100 * (value.high - value.low), 0.3)
            cells.append(
                f'<div class="bar{" ours" if index == 0 else ""}">'
                f'<div class="fill" style="width:{100 * value.mean:.1f}%"></div>'
                f'<div class="whisker" style="left:{low:.1f}%;width:{width:.1f}%"></div>'
                f'<div class="number">{value.mean:.3f}</div></div>'
            )
    summary = evaluation.summary
    return (
        f'<section><h2>Results</h2><p class="note">'
        f"{_count(summary['episodes'], 'episode')} of "
        f"{escape(str(summary['split']))} in {_count(summary['scenes'], 'home')}; {actions_taken(summary)}; "
        f"seed {escape(str(summary['seed']))}. Whiskers are 95 % intervals.</p>"
        f'<div class="bars">{"".join(cells)}</div>{_table(evaluation)}{_differences(evaluation)}</section>'
    )


def turned_back(summary: Mapping[str, Any]) -> float:
    """From which probability on agents turned back at once; an evaluation of an earlier version lacks it."""
    return float(summary.get("turn_back", 0.0))


def actions_taken(summary: Mapping[str, Any]) -> str:
    """How an evaluation's actions were taken, in words."""
    words = "the most probable actions" if summary["deterministic"] else "actions drawn from the policy"
    surely = turned_back(summary)
    return f"{words}, turning back at once only from a probability of {surely:g} on" if surely else words


def _table(evaluation: Evaluation) -> str:
    # An evaluation of an earlier version may lack some.
    agents = evaluation.agents.values()
    shown = [
        measure
        for measure in MEASURES
        if all(measure.name in measures for measures in agents)
        and any(measures[measure.name].count for measures in agents)
    ]
    heads = "".join(
        f"<th>{escape(measure.label)}{f' [{measure.unit}]' if measure.unit else ''}</th>" for measure in shown
    )
    rows = []
    for name, measures in evaluation.agents.items():
        cells = []
        for measure in shown:
            value, digits = measures[measure.name], measure.digits
            interval = f"{value.low:.{digits}f} – {value.high:.{digits}f}"
            cells.append(f"<td>{value.mean:.{digits}f}<small>{interval}</small></td>")
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th>agent</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _differences(evaluation: Evaluation) -> str:
    differences = evaluation.summary.get("difference") or {}
    ours = next(iter(evaluation.agents))
    sentences = []
    for name, data in differences.items():
        spl = from_json(data)["spl"]
        sentences.append(
            f"{escape(ours)} − {escape(name)}: SPL {spl.mean:+.3f} ({spl.low:+.3f} to {spl.high:+.3f})"
        )
    if not sentences:
        return ""
    return f'<p class="note" style="margin-top:12px">On the same episodes, {"; ".join(sentences)}.</p>'


def _verdict(result: Mapping[str, Any]) -> str:
    if result["success"]:
        return f'<span class="verdict yes">success</span>, SPL {result["spl"]:.2f}'
    left = result["distance_to_goal"]
    away = f", {left:.1f} m away" if left is not None else ""
    return f'<span class="verdict no">no success</span>{away}'


def _caption(result: Mapping[str, Any]) -> str:
    scene = escape(Path(str(result["scene_id"])).stem)
    return (
        f"<figcaption>{_verdict(result)}<br>{scene} · {result['geodesic_distance']:.1f} m to the goal, "
        f"walked {result['path_length']:.1f} m in {_count(result['steps'], 'step')}</figcaption>"
    )


def _videos(evaluation: Evaluation) -> str:
    figures = []
    for picture in _with(evaluation, "video"):
        uri = data_uri(evaluation.folder / picture["video"])
        figures.append(
            f'<figure><video controls loop muted autoplay playsinline src="{uri}"></video>'
            f"{_caption(picture['result'])}</figure>"
        )
    if not figures:
        return ""
    return (
        '<section><h2>Watch it</h2><p class="note">What the agent saw, larger than it did, beside where it '
        "was. The episodes are spread evenly over the split, not picked by how they went.</p>"
        f'<div class="videos">{"".join(figures)}</div></section>'
    )


def _maps(evaluation: Evaluation) -> str:
    figures = []
    for picture in _with(evaluation, "map"):
        plan, view = (data_uri(evaluation.folder / picture[name]) for name in ("map", "view"))
        figures.append(
            f'<figure><img class="plan" alt="map with the path" src="{plan}"><div>'
            f'<img class="view" alt="what it saw first" src="{view}">'
            f"{_caption(picture['result'])}</div></figure>"
        )
    if not figures:
        return ""
    return (
        f'<section><h2>Where it went</h2><p class="note">{_LEGEND}</p>'
        f'<div class="maps">{"".join(figures)}</div></section>'
    )


def _departures(evaluation: Evaluation) -> str:
    left = evaluation.summary.get("departures")
    if not left or left.get("share") is None:
        return ""
    told = [
        f"{left[name]:.1%} in episodes that {what} their goal"
        for name, what in (("share_in_success", "reached"), ("share_in_failure", "missed"))
        if left.get(name) is not None
    ]
    return (
        '<section><h2>Where it leaves the expert</h2><p class="note">'
        f"At <b>{left['share']:.1%}</b> of its steps the agent did something else than the expert: "
        f"{', '.join(told)}. Another way can be as short, so not every departure is an error.</p>"
        f"{_choices(left['actions'], left['counts'])}{_departure_maps(evaluation, left)}</section>"
    )


def _choices(names: Iterable[str], counts: Iterable[list[int]]) -> str:
    """What the agent did for each action of the expert's, as a table of shares."""
    names = [escape(str(name)) for name in names]
    rows = []
    for index, (name, row) in enumerate(zip(names, counts, strict=True)):
        steps = sum(row)
        if not steps:
            continue
        shares = [f"{count / steps:.1%}" for count in row]
        shares[index] = f"<b>{shares[index]}</b>"
        cells = "".join(f"<td>{share}</td>" for share in shares)
        rows.append(f"<tr><td>{name} ({_short(steps)} steps)</td>{cells}</tr>")
    heads = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<div class="scroll"><table><thead><tr><th>where the expert would, the agent did</th>{heads}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _departure_maps(evaluation: Evaluation, left: Mapping[str, Any]) -> str:
    figures = []
    for home in _with(evaluation, "map", left.get("homes", [])):
        scene, uri = escape(Path(str(home["scene_id"])).stem), data_uri(evaluation.folder / home["map"])
        figures.append(
            f'<figure><img class="plan" alt="map of departures" src="{uri}"><figcaption>{scene}: '
            f"{home['share']:.1%} of its steps, {_count(home['episodes'], 'episode')}</figcaption></figure>"
        )
    if not figures:
        return ""
    return (
        f'<p class="note" style="margin-top:12px"><span class="key" style="background:{_hex(MARK)};'
        'margin-left:0"></span>where it left the expert, in the homes where it did so most'
        f'<span class="key" style="background:{_hex(VISITED)}"></span>where it was</p>'
        f'<div class="places">{"".join(figures)}</div>'
    )


def _with(
    evaluation: Evaluation, kind: str, pictures: Iterable[Mapping[str, Any]] | None = None
) -> Iterable[Mapping[str, Any]]:
    """The pictures of a kind whose file is there: of episodes, unless others are given."""
    folder = evaluation.folder.resolve()
    of_episodes = pictures is None
    for picture in evaluation.summary.get("pictures", []) if pictures is None else pictures:
        if kind not in picture:
            continue
        names = ("map", "view") if kind == "map" and of_episodes else (kind,)
        files = [(folder / str(picture.get(name))).resolve() for name in names]
        # A summary that came from elsewhere must not put other files on the page.
        if all(file.is_file() and file.is_relative_to(folder) and file.suffix in _KINDS for file in files):
            yield picture


def _curves(light: Path, dark: Path) -> str:
    return (
        "<section><h2>How it learned</h2><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{data_uri(dark)}">'
        f'<img class="curves" alt="training curves" src="{data_uri(light)}"></picture></section>'
    )


def _other_evaluation(evaluation: Evaluation) -> str:
    title = escape(evaluation.folder.name)
    return f"<section><h2>Also evaluated: {title}</h2>{_table(evaluation)}</section>"


def _settings(config: TrainConfig) -> str:
    changed = [
        f"<li>{escape(name)} = <b>{escape(as_typed(value))}</b></li>"
        for name, value in _changed(config).items()
    ]
    told = "Those that differ from the defaults:" if changed else "All are the defaults."
    return (
        f'<section><h2>Settings</h2><p class="note">{told}</p><ul class="chips">{"".join(changed)}</ul>'
        f"<details><summary>every setting</summary><pre>{escape(to_yaml(config))}</pre></details></section>"
    )


def _provenance(run: Run, config: TrainConfig, main: Evaluation | None) -> str:
    commands = [reproduce_command(config)]
    if main is not None:
        commands.append(str(main.summary["command"]))
    rows = {"seed": config.seed, **run.versions}
    if main is not None:
        rows |= {
            "evaluated": main.summary["when"],
            "checkpoint": ", ".join(main.summary["checkpoints"].values()),
        }
    listed = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in rows.items()
        if value is not None
    )
    shown = escape("\n".join(commands))
    return (
        f'<section><h2>Do it again</h2><pre>{shown}</pre><p class="note">The same seed on the same machine '
        f"gives the same run; other hardware or versions give another one of the same kind.</p>"
        f"<dl>{listed}</dl></section>"
    )
