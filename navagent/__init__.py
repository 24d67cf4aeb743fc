"""What the commands do: training, imitation, evaluation, reports."""

from __future__ import annotations

import sys
from pathlib import Path

from navagent.installation import check_packages

# The command checks for itself, and says it without a traceback.
if not (sys.argv and Path(sys.argv[0]).name in ("-m", "navagent")):
    check_packages()


def __getattr__(name: str) -> str:
    if name == "__version__":
        # Reading a distribution's metadata takes longer than everything else here.
        from importlib.metadata import version

        return version("navagent")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
