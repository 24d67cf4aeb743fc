"""The ``navagent`` command, one verb each.

Nothing heavy is imported before a verb needs it: ``navagent --help`` takes a moment, not seconds.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import NoReturn

from navagent.installation import ShadowedPackageError, check_packages

BAD_INPUT = 2
"""Exit status where what was asked for cannot be done."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

OVERVIEW = """\
navagent: visual navigation agents whose frozen perception encoders are adapted by small
trainable networks, in Habitat PointGoal navigation.

usage: navagent VERB [ARGUMENTS]      navagent VERB --help      navagent --version

{verbs}

Start here:
  navagent train                          make homes, train, evaluate, report: on two CPU cores
                                          in at most 45 minutes
  navagent train experiment=quick         the same in about two minutes, to see that it works
  navagent evaluate RUN                   measure a trained agent; RUN is its folder under runs/
  open RUN/report.html                    what came of it, on one page
"""


class _UsageError(ValueError):
    """A command line that does not parse."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors name the nearest right option and leave the exit to :func:`main`."""

    def error(self, message: str) -> NoReturn:
        words = message.split()
        for word in words:
            options = list(self._option_string_actions)
            close = difflib.get_close_matches(word.split("=")[0], options, n=1) if word[:1] == "-" else []
            if close and close[0] not in words:
                message += f"; did you mean {close[0]}?"
                break
        raise _UsageError(f"{message} (see `{self.prog} --help`)")


def _parser(verb: str, description: str, examples: str) -> _Parser:
    return _Parser(
        prog=f"navagent {verb}",
        description=textwrap.fill(description, 96),
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip("\n"), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _train_help() -> str:
    """Every group, option and setting of ``navagent train``, with its default and what it is for."""
    from navagent.config import GROUPS, as_typed, options, settings

    width = max(100, min(shutil.get_terminal_size().columns, 120))
    lines = [
        "usage: navagent train [GROUP=OPTION ...] [NAME=VALUE ...] [--show-config]",
        "",
        *textwrap.wrap(
            "Makes (or reads) homes, trains an agent in them with PPO, evaluates it on homes it has never "
            "seen, and leaves a folder that explains itself under runs/. Ctrl-C saves and stops; the same "
            "command with resume=RUN goes on.",
            width,
        ),
        "",
        "examples:",
        "  navagent train",
        "  navagent train experiment=quick",
        "  navagent train adaptation=finetune sensors=depth algorithm.total_frames=2e6",
        "  navagent train scenes=dataset scenes.dataset=DATA scenes.scenes_dir=SCENES",
        "  navagent train resume=runs/RUN",
        "",
        "options:",
        "  --show-config   print the settings that the command line asks for, as YAML, and stop",
        "  --help          show this and stop",
        "",
        "groups, each with its options (the file configs/GROUP/OPTION.yaml in the package):",
    ]
    for group in GROUPS:
        lines += textwrap.wrap(
            f"  {group + '=':14}{' | '.join(options(group))}", width, subsequent_indent=" " * 16
        )
    lines += ["", "settings, with their defaults:"]
    leaves = list(settings())
    column = 2 + min(44, max(len(f"{leaf.name}={as_typed(leaf.default)}") for leaf in leaves))
    section = ""
    for leaf in leaves:
        if leaf.name.partition(".")[0] != section and "." in leaf.name:
            lines.append("")
            section = leaf.name.partition(".")[0]
        head = f"  {leaf.name}={as_typed(leaf.default)}"
        help_text = leaf.help + (f": {' | '.join(leaf.choices)}" if leaf.choices else "")
        if len(head) > column:
            lines.append(head)
            head = ""
        pad = " " * (column + 2)
        lines += textwrap.wrap(help_text, width, initial_indent=f"{head:{column + 2}}", subsequent_indent=pad)
    return "\n".join(lines)


def _train(arguments: Sequence[str]) -> int:
    flags = [word for word in arguments if word.startswith("-")]
    if {"--help", "-h"} & set(flags):
        print(_train_help())
        return 0
    for flag in flags:
        if flag != "--show-config":
            hint = _nearest(flag, ["--show-config", "--help"])
            if not hint and "=" in flag:
                hint = f"; settings are written without dashes: {flag.lstrip('-')}"
            raise _UsageError(f"unknown option {flag}{hint} (see `navagent train --help`)")
    from navagent.config import load_config, to_yaml

    config = load_config([word for word in arguments if not word.startswith("-")])
    if flags:
        print(to_yaml(config), end="")
        return 0
    from navagent.train import train

    train(config)
    return 0


def _evaluate(arguments: Sequence[str]) -> int:
    parser = _parser(
        "evaluate",
        "Measures a trained agent on a split of PointNav episodes: a table with 95 % intervals, one JSON "
        "line an episode, maps with its paths, videos, and other agents beside it.",
        """
        navagent evaluate runs/RUN
        navagent evaluate runs/RUN --agents run,random,expert --episodes 500 --videos 4
        navagent evaluate runs/RUN --dataset gibson/v1/val/val.json.gz --scenes scene_datasets
        """,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a training run")
    where = parser.add_argument_group("episodes")
    where.add_argument(
        "--split", metavar="NAME", help="split of the run's own data set (default: its val split)"
    )
    where.add_argument("--dataset", metavar="FILE", help="another PointNav-v1 file, .json.gz")
    where.add_argument("--scenes", metavar="DIR", help="folder that the file's scene ids start from")
    where.add_argument(
        "--episodes", metavar="N", type=int, help="at most so many episodes, evenly over scenes"
    )
    who = parser.add_argument_group("agents")
    who.add_argument(
        "--agents",
        metavar="NAMES",
        default="run,random,expert",
        help="with commas: run, random, forward, goal, expert, or the folder of another run "
        "(default: %(default)s)",
    )
    who.add_argument(
        "--checkpoint", metavar="WHICH", default="best", help="best, latest or a number of frames"
    )
    sampling = who.add_mutually_exclusive_group()
    sampling.add_argument(
        "--sampled", dest="deterministic", action="store_false", help="draw actions (default)"
    )
    sampling.add_argument("--deterministic", action="store_true", help="take the most probable action")
    who.add_argument("--seed", metavar="N", type=int, default=0, help="seed of drawn actions and intervals")
    what = parser.add_argument_group("output")
    what.add_argument("--out", metavar="DIR", help="folder of the results (default: RUN/evaluation/SPLIT)")
    what.add_argument("--maps", metavar="K", type=int, default=8, help="maps with the path (default: 8)")
    what.add_argument("--videos", metavar="K", type=int, default=2, help="videos (default: 2)")
    what.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    options = parser.parse_args(arguments)
    from navagent.evaluation.command import EvaluateOptions, evaluate_run

    evaluate_run(EvaluateOptions(**vars(options)))
    return 0


VERBS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (_train, "train an agent: homes, PPO, evaluation, report"),
    "evaluate": (_evaluate, "measure a trained agent, with maps, videos and other agents beside it"),
}
"""Each verb with what runs it and one line on what it is for."""


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        width = max(len(verb) for verb in VERBS)
        print(
            OVERVIEW.format(
                verbs="\n".join(f"  {verb:{width}}   {line}" for verb, (_, line) in VERBS.items())
            )
        )
        return 0 if arguments else BAD_INPUT
    if arguments[0] == "--version":
        import navagent

        print(f"navagent {navagent.__version__}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        raise _UsageError(
            f"there is no verb {verb!r}{_nearest(verb, list(VERBS))} (verbs: {', '.join(VERBS)}; "
            f"see `navagent --help`)"
        )
    return VERBS[verb][0](arguments[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    An error is one message on standard error; the environment variable ``NAVAGENT_DEBUG=1`` shows where it
    came from.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        check_packages()
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has gone; Python's own flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ShadowedPackageError) as error:
        if os.environ.get("NAVAGENT_DEBUG", "0") not in ("", "0"):
            raise
        print(f"navagent: {error}", file=sys.stderr)
        return BAD_INPUT
