"""Asks what may crash: every question is put to a process of its own, and its last words are kept."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROBE = Path(__file__).with_name("probe.py")
PATIENCE = 120.0
"""Seconds after which a process that does not answer is ended."""


@dataclass(frozen=True)
class Answer:
    """What came of one task of :mod:`navagent.doctor.probe`."""

    facts: dict[str, Any] = field(default_factory=dict)
    """What it found."""
    error: str = ""
    """Why there are no facts: the exception, or how the process ended and what it said last."""


def ask(
    *tasks: str, environment: Mapping[str, str] | None = None, patience: float = PATIENCE
) -> dict[str, Answer]:
    """Carries out tasks in another process, one after another, as far as it lives.

    If it dies in a task, that is the task's answer, and a new process goes on with those after it.

    Args:
        tasks: as :data:`navagent.doctor.probe.TASKS` names them.
        environment: variables that differ from this process's.
        patience: seconds for each process.
    """
    answers: dict[str, Answer] = {}
    while left := [task for task in tasks if task not in answers]:
        answers |= _one_process(left, environment or {}, patience)
    return answers


def _one_process(tasks: Sequence[str], environment: Mapping[str, str], patience: float) -> dict[str, Answer]:
    """The answers of one process: at least one, to the first task."""
    # The child looks for packages where this process does, wherever it was started from and however.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    with tempfile.TemporaryFile() as written, tempfile.TemporaryFile() as said:
        begun = time.monotonic()
        process = subprocess.Popen(
            # -P keeps the probe's own folder out of that path.
            [sys.executable, "-P", "-X", "faulthandler", str(PROBE), str(written.fileno()), *tasks],
            env={**os.environ, **environment, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            pass_fds=(written.fileno(),),
        )
        try:
            process.wait(patience)
            end = _ending(process.returncode)
        except subprocess.TimeoutExpired:
            end = f"no answer in {time.monotonic() - begun:.0f} s"
        finally:
            process.kill()
            process.wait()
        answers: dict[str, Answer] = {}
        unfinished = tasks[0]
        for line in _read(written).splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # cut short as the process was killed
            if "begin" in event:
                unfinished = event["begin"]
            else:
                answers[event["done"]] = Answer(event.get("facts", {}), event.get("error", ""))
        if unfinished not in answers:
            answers[unfinished] = Answer(error=": ".join(filter(None, (end, _last_words(_read(said))))))
        return answers


def _read(file: Any) -> str:
    file.seek(0)
    text: str = file.read().decode(errors="replace")
    return text


def _ending(status: int) -> str:
    if status >= 0:
        return f"the process ended with status {status}"
    try:
        return f"the process was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"the process was killed by signal {-status}"


def _last_words(text: str) -> str:
    """The end of what a process said, and the line that it was at where Python's fault handler tells."""
    words, _, trace = text.partition("\nCurrent thread")
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    place = re.search(r'File "(.+?)", line (\d+)', trace)
    if place is not None:
        lines.append(f"at {place[1]}:{place[2]}")
    return " | ".join(lines[-4:])
