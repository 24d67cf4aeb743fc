"""The command line of ``navagent doctor``: all checks, a table or JSON, and a status."""

from __future__ import annotations

import json
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from navagent.arguments import UsageError, command_parser
from navagent.doctor import habitat, machine, software
from navagent.doctor.child import Answer, ask
from navagent.doctor.findings import Check, Finding, Level, examine, worst

UNSOUND = 1
"""Exit status where something does not work."""

CONFIG_ERROR = "ConfigError: "
"""How the probe calls settings that do not fit: a mistake of the command line, not of the installation."""

MARKS: dict[Level, str] = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}
"""How the table calls each level."""


def doctor(arguments: Sequence[str]) -> int:
    """``navagent doctor``; returns the exit status: 1 where there is a problem."""
    parser = command_parser(
        "doctor",
        "Checks the whole installation and says what is wrong and how to mend it: Python, the libraries and "
        "their versions, PyTorch and CUDA, Warp, habitat-sim and habitat-lab, EGL, data sets, disks, memory, "
        "processors. Exit status 1 where something does not work.",
        """
        navagent doctor
        navagent doctor scenes=dataset scenes.dataset=data/datasets/pointnav/gibson/v1
        navagent doctor --json
        """,
    )
    parser.add_argument(
        "settings",
        metavar="NAME=VALUE",
        nargs="*",
        help="settings of the training that is meant, as `navagent train` takes them: their data sets and "
        "folders are looked at",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    task = "data:" + json.dumps(options.settings)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, task)
        findings = examine(checks(lambda: asked.result()[task]))
    error = asked.result()[task].error
    if error.startswith(CONFIG_ERROR):
        raise UsageError(error.removeprefix(CONFIG_ERROR))
    if options.json:
        answer = {"status": worst(findings), "checks": [asdict(finding) for finding in findings]}
        print(json.dumps(answer, indent=1))
    else:
        show(findings)
    return UNSOUND if worst(findings) == "problem" else 0


def checks(data: Callable[[], Answer]) -> dict[str, Check]:
    """All checks by name, in the order in which they are shown.

    Args:
        data: waits for the answer of :func:`navagent.doctor.probe.data`.
    """
    return {
        "Python": software.python,
        "navagent": software.own_packages,
        "libraries": software.libraries,
        "Habitat": habitat.habitat,
        "EGL": habitat.egl,
        "processors": machine.processors,
        "memory": machine.memory,
        "shared memory": machine.shared_memory,
        "data": lambda: _data_and_folders(data()),
    }


def _data_and_folders(answer: Answer) -> Iterable[Finding]:
    if answer.error:
        yield Finding("data", "problem", f"the settings cannot be read: {answer.error}", software.INSTALL)
        return
    yield from (Finding(**found) for found in answer.facts["findings"])
    yield from machine.folder("cache", Path(answer.facts["cache"]), "the environment variable NAVAGENT_CACHE")
    yield from machine.folder("runs", Path(answer.facts["runs"]), "run_dir=FOLDER, or another working folder")
    yield from machine.folder(
        "temporary files", Path(tempfile.gettempdir()), "the environment variable TMPDIR"
    )


def show(findings: Sequence[Finding]) -> None:
    """Prints a table, and below it what to do, one thing after another."""
    width = max(len(finding.name) for finding in findings)
    window = max(80, shutil.get_terminal_size((110, 24)).columns)
    indent = " " * (width + 11)
    for finding in findings:
        head = f"{finding.name:{width}}  {MARKS[finding.level]:9}"
        lines = [_wrapped(finding.found, window, head, indent)]
        if finding.mend:
            lines.append(_wrapped(f"-> {finding.mend}", window, indent, indent + "   "))
        print("\n".join(lines))
    counts = {level: sum(finding.level == level for finding in findings) for level in MARKS}
    if counts["problem"]:
        problems, warnings = counts["problem"], counts["warning"]
        print(f"\n{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}")
    elif counts["warning"]:
        print(f"\nnavagent works here; {counts['warning']} warning{'s' * (counts['warning'] != 1)}")
    else:
        print("\nnavagent works here")


def _wrapped(text: str, width: int, first: str, rest: str) -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
