"""What a check finds, and the guard that every check runs under."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]

LEVELS: tuple[Level, ...] = ("ok", "warning", "problem")
"""From good to bad: fine; works, but not as well as it could or not everything; does not work."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer."""

    name: str
    """What was looked at."""
    level: Level
    """How it is, see :data:`LEVELS`."""
    found: str
    """What is there, in the words of whoever refused where something did."""
    mend: str = ""
    """What to do; empty where all is well."""


Check = Callable[[], Iterable[Finding]]
"""A check looks at one thing and may take seconds; it runs beside others, in a thread."""


def examine(checks: Mapping[str, Check]) -> list[Finding]:
    """What the checks find, in their order. A check that breaks is itself a finding, never an error."""
    with ThreadPoolExecutor(max_workers=max(1, len(checks))) as pool:
        running = {name: pool.submit(_guarded, name, check) for name, check in checks.items()}
        return [finding for future in running.values() for finding in future.result()]


def worst(findings: Sequence[Finding]) -> Level:
    """The worst level of some findings."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def _guarded(name: str, check: Check) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}:{last.lineno}"
        return [
            Finding(
                name,
                "problem",
                f"the check itself broke: {type(error).__name__}: {error} ({where})",
                "install navagent again; if it stays, report this line",
            )
        ]
