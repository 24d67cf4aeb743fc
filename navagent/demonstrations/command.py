"""``navagent demos``: demonstrations recorded, looked at, replayed, and exchanged with Minari.

Nothing heavy is imported before an action needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from navagent.arguments import BAD_INPUT, UsageError, command_parser
from policies.names import nearest

if TYPE_CHECKING:
    from navagent.config import TrainConfig
    from navagent.demonstrations.recorded import DemonstrationSet, Header
    from navagent.demonstrations.replay import Replay

HELP = """\
usage: navagent demos record FILE [--agent expert|keyboard|RUN] [--number N] [SETTING=VALUE ...]
       navagent demos info FILE [--json]
       navagent demos replay FILE [--tolerance M] [SETTING=VALUE ...]
       navagent demos export FILE DATASET [SETTING=VALUE ...]
       navagent demos import DATASET FOLDER

record   demonstrations of the expert, of a trained agent, or of a person at the keyboard
info     what a file holds
replay   do again what was recorded and check that every state is the same, bit by bit
export   write a Minari data set, with the pictures, for other libraries
import   copy a Minari data set into a folder that can be learned from

examples:
  navagent demos record demos/expert.demos --number 500
  navagent demos record demos/mine.demos --agent keyboard --number 10
  navagent demos info demos/expert.demos
  navagent demos export demos/expert.demos navagent/expert-v0 sensors.height=128 sensors.width=128

`navagent demos record --help` and so on tell more."""


def demos(arguments: Sequence[str]) -> int:
    """Runs an action, and returns the exit status."""
    if not arguments or arguments[0] in ("--help", "-h"):
        print(HELP)
        return 0 if arguments else BAD_INPUT
    if arguments[0] not in ACTIONS:
        raise UsageError(
            f"demos: there is no action {arguments[0]!r}{nearest(arguments[0], list(ACTIONS))} "
            f"(actions: {', '.join(ACTIONS)}; see `navagent demos --help`)"
        )
    return ACTIONS[arguments[0]](arguments[1:])


def _settings(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "settings", metavar="SETTING=VALUE", nargs="*", help=f"settings of `navagent train`: {what}"
    )


def _record(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "demos record",
        "Records demonstrations into a file: episodes, actions, and hashes of the states, from which the "
        "simulator makes the pictures again with any sensor. Ctrl-C stops; the same command goes on, and a "
        "larger --number adds to the file. What is in the file at any moment can be used.",
        """
        navagent demos record demos/expert.demos --number 500
        navagent demos record demos/expert.demos --number all env.turn_angle_deg=30
        navagent demos record demos/agent.demos --agent runs/RUN --number 100 --split val
        navagent demos record demos/mine.demos --agent keyboard --number 10
        """,
    )
    parser.add_argument("file", metavar="FILE", help="file to make, or to go on with")
    _settings(parser, "scenes.*, env.*, simulator.*, experiment and, for the keyboard, sensors.*")
    parser.add_argument(
        "--agent",
        default="expert",
        metavar="WHO",
        help="expert (the shortest path; default), keyboard, or the folder of a run",
    )
    parser.add_argument(
        "--number", metavar="N", default="500", help="demonstrations in the end, or all (default: 500)"
    )
    parser.add_argument("--split", metavar="NAME", help="split of the data set (default: scenes.train_split)")
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of order, noise, drawn actions (default: 0)"
    )
    parser.add_argument(
        "--num-envs", metavar="N", type=int, default=16, help="agents side by side (default: 16)"
    )
    run = parser.add_argument_group("a trained agent")
    run.add_argument("--checkpoint", metavar="WHICH", default="best", help="best, latest or frames")
    run.add_argument("--deterministic", action="store_true", help="take the most probable action")
    parser.add_argument(
        "--display",
        choices=("auto", "terminal", "window"),
        default="auto",
        help="where a person looks (default: a window if one can be opened, else the terminal)",
    )
    options = parser.parse_intermixed_args(arguments)
    from navagent.config import ConfigError

    if options.number != "all" and not (options.number.isdecimal() and int(options.number)):
        raise ConfigError(f"--number {options.number} is neither a whole number from 1 on nor all")
    for name, least in (("seed", 0), ("num_envs", 1)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {least}")
    from navagent.demonstrations.recording import KEYBOARD, RecordOptions, record_demonstrations
    from navagent.progress import counting

    values = vars(options)
    number = None if options.number == "all" else int(options.number)
    # A person's display tells how many are done, and a bar would draw over it.
    shown = contextlib.nullcontext() if options.agent == KEYBOARD else counting("recording")
    with _stoppable(options.file), shown as progress:
        path, wanted, held = record_demonstrations(
            RecordOptions(**{**values, "number": number, "settings": tuple(options.settings)}), progress
        )
    rest = "" if held >= wanted else f" of {wanted}; the same command goes on"
    print(f"{path}: {held} demonstrations{rest}")
    return 0


@contextlib.contextmanager
def _stoppable(file: str) -> Iterator[None]:
    """Within the block, Ctrl-C, SIGTERM and SIGUSR1 end a recording, and it is said what is kept of it."""
    from navagent.demonstrations.recorded import read_demonstrations
    from navagent.preemption import Stopped, StopSignals

    try:
        with StopSignals(lambda text: print(text, file=sys.stderr)):
            yield
    except (KeyboardInterrupt, Stopped):
        kept = "nothing is recorded yet"
        if Path(file).is_file():
            demonstrations = read_demonstrations(file)
            kept = f"{len(demonstrations)} demonstrations of {demonstrations.header.wanted}"
        print(f"{file}: {kept}; the same command goes on", file=sys.stderr)
        raise


def _info(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "demos info",
        "Says what a file of demonstrations holds: how many, by whom, where, under which rules, how good.",
        """
        navagent demos info demos/expert.demos
        navagent demos info demos/expert.demos --json
        """,
    )
    parser.add_argument("file", metavar="FILE", help="file of demonstrations")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    from navagent.demonstrations.recorded import read_demonstrations

    summary = summarise(options.file, read_demonstrations(options.file))
    if options.json:
        print(json.dumps(summary, indent=1))
        return 0
    for name, value in summary.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name.replace('_', ' '):16} {shown}")
    return 0


def summarise(path: str | Path, demonstrations: DemonstrationSet) -> dict[str, Any]:
    """What a file of demonstrations holds, as JSON can have it."""
    import numpy as np

    from envs.simulators.base import Action

    header, steps = demonstrations.header, demonstrations.steps
    total = int(steps.sum())
    actions = [demonstrations.actions(index) for index in range(len(demonstrations))]
    counts = np.bincount(np.concatenate(actions), minlength=len(Action)) if actions else np.zeros(len(Action))
    where = dataclasses.asdict(header.source)
    agent = where.pop("agent")
    if where["checkpoint"] is None:
        del where["deterministic"]
    if where["dataset"] != "generated":
        del where["homes"], where["homes_seed"]
    return {
        "file": str(path),
        "bytes": Path(path).stat().st_size,
        "demonstrations": len(demonstrations),
        "wanted": header.wanted,
        "complete": len(demonstrations) >= header.wanted,
        "agent": agent,
        "success": round(float(demonstrations.success.mean()), 4) if total else None,
        "spl": round(float(demonstrations.column("spl").mean()), 4) if total else None,
        "steps": total,
        "steps_each": (
            {"least": int(steps.min()), "median": int(np.median(steps)), "most": int(steps.max())}
            if total
            else {}
        ),
        "actions": {action.name.lower(): int(counts[action]) for action in Action},
        "scenes": len({episode.scene_id for episode in demonstrations.episodes}),
        "source": {name: value for name, value in where.items() if value is not None},
        "rules": header.rules,
        "recorded_on": {name: value for name, value in header.recorded_on.items() if value is not None},
        "sha256": demonstrations.sha256,
    }


def _replay(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "demos replay",
        "Does every demonstration again in the simulator and compares the states with the recorded hashes. "
        "The first difference is told with its demonstration and steps. The sensors are free: with cameras, "
        "it says how fast demonstrations can be learned from.",
        """
        navagent demos replay demos/expert.demos
        navagent demos replay demos/expert.demos sensors.rgb=true sensors.height=128 sensors.width=128
        navagent demos replay demos/expert.demos --dataset homes
        """,
    )
    parser.add_argument("file", metavar="FILE", help="file of demonstrations")
    _settings(parser, "sensors.*, noise of cameras, simulator.*, device, num_threads (default: no cameras)")
    _where(parser)
    parser.add_argument(
        "--num-envs", metavar="N", type=int, default=32, help="agents side by side (default: 32)"
    )
    parser.add_argument(
        "--tolerance",
        metavar="M",
        type=float,
        default=0.0,
        help="allow states to differ by so much [m, rad] (default: 0, bit-equal)",
    )
    options = parser.parse_intermixed_args(arguments)
    from navagent.demonstrations.replay import replay_once
    from navagent.progress import counting

    looks = any(word.startswith("sensors") for word in options.settings)
    replay = _start(options, options.settings if looks else ["sensors=blind", *options.settings])
    demonstrations = replay.demonstrations
    steps = done = 0
    total = len(demonstrations)
    begin = time.perf_counter()
    with counting("replaying") as progress:
        for step in replay_once(replay):
            steps += int((step.rows >= 0).sum())
            done += int((step.terminated | step.truncated).sum())
            progress(done, total)
    seconds = time.perf_counter() - begin
    replay.close()
    equal = "bit-equal" if not options.tolerance else f"within {options.tolerance:g} m and rad"
    print(f"{total} demonstrations, {steps} steps: all states {equal}; {steps / seconds:,.0f} steps/s")
    return 0


def _export(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "demos export",
        "Replays demonstrations and writes them as a Minari data set, with the observations of the sensors "
        "that the settings ask for. Needs navagent[minari].",
        """
        navagent demos export demos/expert.demos navagent/expert-v0
        navagent demos export demos/expert.demos navagent/expert-v1 sensors=depth sensors.height=128
        """,
    )
    parser.add_argument("file", metavar="FILE", help="file of demonstrations")
    parser.add_argument("dataset_id", metavar="DATASET", help="Minari's name for it, (NAMESPACE/)NAME-vN")
    _settings(parser, "sensors.*, noise of cameras, simulator.*, device, num_threads")
    _where(parser)
    parser.add_argument(
        "--num-envs", metavar="N", type=int, default=16, help="agents side by side (default: 16)"
    )
    parser.add_argument(
        "--jpeg", action="store_true", help="compress colour pictures, with loss (default: as they are)"
    )
    options = parser.parse_intermixed_args(arguments)
    from navagent.demonstrations.minari_exchange import export_minari
    from navagent.progress import counting

    replay = _start(options, options.settings)
    try:
        with counting("exporting") as progress:
            folder = export_minari(replay, options.dataset_id, jpeg=options.jpeg, progress=progress)
    finally:
        replay.close()
    print(f"{folder}\nread it with\n  minari.load_dataset({options.dataset_id!r})")
    return 0


def _import(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "demos import",
        "Copies a Minari data set, ours or another's with the same spaces, into a folder of arrays that are "
        "mapped into memory while an agent learns from them. Needs navagent[minari].",
        """
        navagent demos import navagent/expert-v0 demos/expert
        """,
    )
    parser.add_argument("dataset_id", metavar="DATASET", help="Minari's name, or a data set's folder")
    parser.add_argument("folder", metavar="FOLDER", help="folder to make")
    options = parser.parse_args(arguments)
    from navagent.demonstrations.minari_exchange import import_minari
    from navagent.progress import counting

    with counting("importing") as progress:
        print(import_minari(options.dataset_id, options.folder, progress=progress))
    return 0


OF_REPLAYS = ("sensors", "env.rgb_noise", "env.depth_noise", "simulator", "device", "num_threads")
"""Settings that decide what is perceived in a replay, and where it is computed."""

ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {
    "record": _record,
    "info": _info,
    "replay": _replay,
    "export": _export,
    "import": _import,
}
"""Each action of ``navagent demos`` with what runs it."""


def _where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset", metavar="DIR", help="folder of the data set (default: that of the recording)"
    )
    parser.add_argument(
        "--scenes", metavar="DIR", help="folder of the scenes, where it is not the data set's"
    )


def _start(options: argparse.Namespace, settings: Sequence[str]) -> Replay:
    """A replay of the whole file with the sensors of the settings, in the recording's scenes."""
    from navagent.config import ConfigError, check_named, load_config
    from navagent.demonstrations.open import start_replay
    from navagent.demonstrations.recorded import read_demonstrations

    if options.num_envs < 1:
        raise ConfigError(f"--num-envs {options.num_envs} must be at least 1")
    check_named(
        settings,
        OF_REPLAYS,
        "a replay has the rules and the body of the recording, and its scenes unless --dataset or --scenes "
        "says where they are",
    )
    demonstrations = read_demonstrations(options.file)
    config = in_its_scenes(load_config(settings), demonstrations.header, options.dataset, options.scenes)
    tolerance = getattr(options, "tolerance", 0.0)
    return start_replay(config, demonstrations, options.num_envs, tolerance=tolerance)


def in_its_scenes(
    config: TrainConfig, header: Header, dataset: str | None = None, scenes: str | None = None
) -> TrainConfig:
    """``config`` with the data set of a recording, or with the one that is given."""
    source = header.source
    where = dataclasses.replace(
        config.scenes,
        dataset=dataset or source.dataset,
        num=source.homes,
        seed=source.homes_seed,
        scenes_dir=scenes or (None if dataset else source.scenes_dir),
    )
    return dataclasses.replace(config, scenes=where)
