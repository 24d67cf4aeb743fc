"""``navagent bench``: how fast training is, beside other learners on the same machine.

Nothing heavy is imported before an action needs it.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from navagent.arguments import (
    BAD_INPUT,
    UsageError,
    add_options,
    command_parser,
    name_list,
    number_list,
)
from navagent.bench.networks import DEFAULT_NETWORKS, NETWORKS
from policies.names import nearest

FAILED = 1
"""Exit status where a learner broke down while it was measured."""

HELP = """\
usage: navagent bench train [NAME=VALUE ...] [--scene FILE] [--networks NAMES] [--agents N,N] [--quick] ...

train     frames per second of this package's PPO, of Stable-Baselines3's and of a plain loop of CleanRL's
          kind, with the same environments and networks, and where the time goes

examples:
  navagent bench train --quick
  navagent bench train --scene apartment.glb --agents 4,16,64

`navagent bench train --help` tells more."""

QUICK = {"networks": ("simple_cnn_lstm",), "agents": (4,), "steps": 32, "updates": 2, "warm_up": 1}
"""What ``--quick`` measures, where nothing else is given."""


def bench(arguments: Sequence[str]) -> int:
    """Runs an action, and returns the exit status."""
    if not arguments or arguments[0] in ("--help", "-h"):
        print(HELP)
        return 0 if arguments else BAD_INPUT
    if arguments[0] not in ACTIONS:
        raise UsageError(
            f"bench: there is no action {arguments[0]!r}{nearest(arguments[0], list(ACTIONS))} "
            f"(actions: {', '.join(ACTIONS)}; see `navagent bench --help`)"
        )
    return ACTIONS[arguments[0]](arguments[1:])


def _train(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "bench train",
        "Measures learners side by side: each in a process of its own, an update at a time by turns, with "
        "the same environments, network, optimiser, minibatches and epochs. Shows frames per second from end "
        "to end, the share of each stage and the most memory, and writes them to a folder as Markdown and "
        "JSON. Run it while the machine does nothing else.",
        """
        navagent bench train --quick
        navagent bench train --scene apartment.glb --agents 4,16,64
        navagent bench train --networks sidetune_resnet44 --contestants navagent,uncached
        navagent bench train --variant "fast: speed=fast" --networks simple_cnn_lstm
        navagent bench train --networks settings --contestants navagent --agents 32 sensors=rgbd
        """,
    )
    parser.epilog = f"{NAMES_HELP}\n\n{parser.epilog}"
    parser.add_argument(
        "settings", metavar="NAME=VALUE", nargs="*", help="settings of `navagent train` for everybody"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for the results (default: runs/bench-DATE-TIME)")
    add_options(
        parser,
        ("scene", "FILE", Path, "a .glb or .gltf file to play in (default: a generated home)"),
        ("networks", "NAMES", name_list, f"with commas (default: {','.join(DEFAULT_NETWORKS)})"),
        ("contestants", "NAMES", name_list, "learners, with commas (default: all)"),
        ("agents", "N,N", number_list, "numbers of agents (default: 4,16,64,256)"),
        ("steps", "N", int, "steps of a rollout (default: 128; fewer where that is more than 8,192 frames)"),
        ("updates", "N", int, "updates of each learner that count (default: 5)"),
        ("warm-up", "N", int, "updates of each before those (default: 2)"),
    )
    parser.add_argument(
        "--variant",
        metavar="'NAME: SETTING ...'",
        dest="variants",
        type=_variant,
        action="append",
        default=[],
        help="this package's PPO once more with settings that differ; may be given several times",
    )
    parser.add_argument("--quick", action="store_true", help="a minute's try with next to no updates")
    values = vars(parser.parse_intermixed_args(arguments))
    quick, out = values.pop("quick"), values.pop("out")
    for word in values["settings"]:
        if "=" not in word:
            raise UsageError(
                f"{word!r} is not of the form NAME=VALUE; learners and networks follow --contestants and "
                "--networks (see `navagent bench train --help`)"
            )
    values = {"networks": DEFAULT_NETWORKS, **(QUICK if quick else {}), **values}
    from rich.console import Console

    from navagent.bench.training import BenchConfig, run

    out = Path(out or f"runs/bench-{datetime.now():%Y%m%d-%H%M%S}")
    values["settings"], values["variants"] = tuple(values["settings"]), tuple(values["variants"])
    console = Console()
    command = shlex.join(["navagent", "bench", "train", *arguments])
    results = run(BenchConfig(out=out, **values), command, console)
    print(f"results  {out / 'results.md'}\nnumbers  {out / 'results.json'}")
    return FAILED if any(result.broken for result in results) else 0


ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {"train": _train}
"""Each action of ``navagent bench`` with what runs it."""

NAMES_HELP = "\n".join(
    [
        "learners:",
        "  navagent            this package's PPO",
        "  uncached            the same without stored features, for networks with a frozen part",
        "  sb3                 stable_baselines3.PPO, or sb3_contrib.RecurrentPPO for an LSTM, as they are",
        "  plain               a plain loop of CleanRL's kind",
        "",
        "networks:",
        *(f"  {name:18}  {network.title}" for name, network in NETWORKS.items()),
    ]
)
"""What ``--help`` says of names."""


def _variant(text: str) -> tuple[str, tuple[str, ...]]:
    name, colon, settings = text.partition(":")
    words = tuple(shlex.split(settings))
    if not (colon and name.strip() and words and all("=" in word for word in words)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a name, a colon and settings, such as 'fast: speed=fast'"
        )
    return name.strip(), words
