"""What the command line's parsers share. Imports nothing heavy."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Callable
from typing import NoReturn

BAD_INPUT = 2
"""Exit status where what was asked for cannot be done."""


class UsageError(ValueError):
    """A command line that does not parse."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors name the nearest right option and leave the exit to the caller."""

    def error(self, message: str) -> NoReturn:
        words = [word.rstrip(":") for word in message.split()]
        for word in words:
            options = list(self._option_string_actions)
            close = difflib.get_close_matches(word.split("=")[0], options, n=1) if word[:1] == "-" else []
            if close and close[0] not in words:
                message += f"; did you mean {close[0]}?"
                break
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def command_parser(verb: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of one verb, or of one action of a verb.

    Args:
        verb: what follows ``navagent``.
        description: what it does.
        examples: command lines, one a line.
    """
    return _Parser(
        prog=f"navagent {verb}",
        description=textwrap.fill(description, 96),
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip("\n"), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_options(
    parser: argparse.ArgumentParser, *options: tuple[str, str, Callable[[str], object], str]
) -> None:
    """Adds options that are absent from what is parsed where they are not given, so that a config's hold.

    Each has its name without dashes, what stands for its value, how that is read, and its help.
    """
    for name, metavar, kind, line in options:
        parser.add_argument(f"--{name}", metavar=metavar, type=kind, default=argparse.SUPPRESS, help=line)


def training_command(sensor: str, encoder: str, weights: str) -> str:
    """The command that trains an agent which sees through an encoder with these weights."""
    return f"navagent train sensors={sensor} encoder.name={encoder} encoder.weights={weights}"


def name_list(text: str) -> tuple[str, ...]:
    """The names of an option that takes several, with commas."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} holds no name; expected one, or several with commas")
    return names


def number_list(text: str) -> tuple[int, ...]:
    """The whole numbers of an option that takes several, with commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas, such as 4,16") from None
