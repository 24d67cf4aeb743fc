"""``navagent imitate ladder``: behaviour cloning from few and from many demonstrations, by several methods.

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from navagent.arguments import add_options, command_parser, name_list

SHORT: dict[str, Any] = {"experiment": "ladder_short", "sizes": (49, 500, "all"), "demonstrations": 5000}
"""What ``--short`` asks for, where nothing else is given."""


def ladder(arguments: Sequence[str]) -> int:
    """Climbs the ladder, and returns the exit status."""
    parser = command_parser(
        "imitate ladder",
        "The side-tuning paper's ladder: behaviour cloning from 49, 500, 5,000 and all demonstrations by "
        "several methods, and DAgger with as many frames beside it. Success and SPL in unseen homes over "
        "seeds, with 95 % intervals: a table, a plot and the numbers. The expert is recorded once, and all "
        "methods learn from the same demonstrations, for as many frames: overnight, some ten hours, on two "
        "cores, or with --short half an hour. Ctrl-C and SIGTERM save and stop; the same command goes on.",
        """
        navagent imitate ladder runs/ladder
        navagent imitate ladder runs/ladder --short
        navagent imitate ladder runs/ladder --methods sidetune,lora,blind --dagger sidetune,lora
        navagent imitate ladder runs/depth --sizes 49,all sensors=depth algorithm.total_frames=1e6
        """,
    )
    parser.add_argument("out", metavar="OUT", help="folder for the results and the trained agents")
    parser.add_argument(
        "settings",
        metavar="SETTING=VALUE",
        nargs="*",
        help="settings of `navagent imitate` for all trainings (default: experiment=ladder)",
    )
    add_options(
        parser,
        ("sizes", "N,N", _sizes, "numbers of demonstrations, or all (default: 49,500,5000,all)"),
        ("demonstrations", "N", int, "how many the expert records, which are all (default: 10000)"),
        ("methods", "NAMES", name_list, "default: sidetune,features,finetune,scratch,blind"),
        ("dagger", "NAMES", _methods, "methods that learn by DAgger too, or none (default: sidetune)"),
        ("seeds", "N", int, "how often each is done (default: 3)"),
        ("workers", "N", int, "processes with one thread each (default: one a core)"),
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="sizes 49, 500 and 5,000, which are all, and experiment=ladder_short: half an hour on two cores",
    )
    values = vars(parser.parse_intermixed_args(arguments))
    out, settings, short = Path(values.pop("out")), tuple(values.pop("settings")), values.pop("short")
    from rich.console import Console

    from navagent.learning.imitation_ladder import LadderConfig, climb

    if short:
        values = {**SHORT, **values}
    config = LadderConfig(out=out, settings=settings, **values)
    table = climb(config, Console(), shlex.join(["navagent", "imitate", "ladder", *arguments]))
    print(f"table  {table}\nplot   {table.with_name('plot.png')}")
    return 0


def _methods(text: str) -> tuple[str, ...]:
    return () if text == "none" else name_list(text)


def _sizes(text: str) -> tuple[int | Literal["all"], ...]:
    words = name_list(text)
    if not words or not all(word == "all" or word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers or all, with commas, such as 49,all")
    return tuple("all" if word == "all" else int(word) for word in words)
