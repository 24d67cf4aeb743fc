"""What the commands do: training, imitation, evaluation, reports."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from navagent.installation import check_packages

# Threads of OpenMP that wait for each other spin at first. Where anything else runs on the same cores, they
# spin away the time of those they wait for, and training becomes ten and more times slower. It must be said
# before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# The command checks for itself, and says it without a traceback.
if not (sys.argv and Path(sys.argv[0]).name in ("-m", "navagent")):
    check_packages()


def __getattr__(name: str) -> str:
    if name == "__version__":
        # Reading a distribution's metadata takes longer than everything else here.
        from importlib.metadata import version

        return version("navagent")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
