"""``navagent reference record``: what is typed, what is shown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from navagent.arguments import BAD_INPUT, command_parser

DIFFERENT = 1
"""Exit status where Habitat answers otherwise than in the recordings that were made again."""


def record_command(arguments: Sequence[str]) -> int:
    """Runs ``navagent reference record``; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    from envs.simulators.base import AgentSpec
    from navagent.habitat_recorder.record import RecordOptions, record
    from navagent.recordings import RecordingError

    drawn = {name: getattr(options, name) for name in _DRAWN if getattr(options, name) is not None}
    if options.again and drawn:
        given = ", ".join("--" + name.replace("_", "-") for name in drawn)
        parser.error(f"--again asks what was asked before, so {given} cannot be given")
    default = RecordOptions()
    body = default.agent
    try:
        wanted = RecordOptions(
            agent=AgentSpec(drawn.get("radius", body.radius), drawn.get("height", body.height)),
            sensor_height=drawn.get("sensor_height", default.sensor_height),
            seed=drawn.get("seed", default.seed),
            episodes=drawn.get("episodes", default.episodes),
            gpu=options.gpu,
        )
        with _Shown() as shown:
            out = record(options.scenes, options.out, wanted, options.again, shown.progress)
        print(f"{out}: recorded {', '.join(shown.scenes)}")
        print(f"hold the simulator against it: navagent reference {options.out}")
        return _compare(options.scenes, str(out)) if options.again else 0
    except (RecordingError, ValueError) as error:
        print(f"navagent reference record: {error}", file=sys.stderr)
        return BAD_INPUT


_DRAWN = ("radius", "height", "sensor_height", "seed", "episodes")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "reference record",
        "Writes what real Habitat answers about scenes: pictures, distances, moves, walks, and PointNav "
        "episodes with their rewards and measures. `navagent reference OUT` then holds the built-in "
        "simulator against it, on machines without Habitat too. Needs habitat-sim, and habitat-lab for "
        "episodes. "
        "With --again, exit status 1 where an answer differs from the recorded one.",
        """
        navagent reference record data/scene_datasets/gibson/Cantwell.glb cantwell
        navagent reference record data/scene_datasets/habitat-test-scenes test-scenes --episodes 50
        navagent reference record homes/scenes homes-recorded --radius 0.18 --height 0.88 --sensor-height 0.88
        navagent reference record cantwell cantwell-again --again
        """,
    )
    parser.add_argument("scenes", metavar="SCENES", help="a .glb file, or a folder of them")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument(
        "--again",
        action="store_true",
        help="SCENES is a folder of recordings: ask what they asked, and compare the answers",
    )
    what = parser.add_argument_group("what is recorded")
    what.add_argument("--radius", type=float, metavar="M", help="radius of the agent [m] (default: 0.1)")
    what.add_argument("--height", type=float, metavar="M", help="height of the agent [m] (default: 1.5)")
    what.add_argument(
        "--sensor-height", type=float, metavar="M", help="cameras above the feet [m] (default: 1.25)"
    )
    what.add_argument(
        "--episodes",
        type=_at_least(0),
        metavar="N",
        help="PointNav episodes in each scene (default: 20); with 0, habitat-lab is not needed",
    )
    what.add_argument("--seed", type=_at_least(0), metavar="N", help="of what is asked (default: 0)")
    parser.add_argument(
        "--gpu",
        type=_at_least(-1),
        default=-1,
        metavar="N",
        help="device that renders (default: -1, software)",
    )
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def _compare(before: str, after: str) -> int:
    from navagent.habitat_recorder.same import compare_recordings
    from navagent.reference import print_table

    rows = compare_recordings(before, after)
    print_table(rows, "Recorded again, beside the earlier recordings")
    return 0 if all(row.passed for row in rows) else DIFFERENT


class _Shown:
    """A bar for the scene that is being recorded where somebody watches, else a line a scene."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._console = console
        self.scenes: dict[str, TaskID] = {}

    def __enter__(self) -> _Shown:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def progress(self, scene: str, done: int, total: int) -> None:
        """Shows how far a scene is."""
        if scene not in self.scenes:
            self.scenes[scene] = self._bars.add_task(scene, total=total)
            if not self._console.is_terminal:
                self._console.print(f"recording {scene}", highlight=False)
        self._bars.update(self.scenes[scene], completed=done)
