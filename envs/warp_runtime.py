"""Starts Warp, which every kernel of this package runs on."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from functools import cache

import warp as wp

_NO_DRIVER = b"Could not find or load the NVIDIA CUDA driver"


@cache
def start_warp() -> None:
    """Initialises Warp and leaves out what it says about itself: its greeting, and that there is no GPU.

    Warp prints the latter from C, in every process on a machine without a driver and at any log level, so
    what is written to standard error meanwhile is held back, and passed on but for that line. Who asks for
    CUDA where there is none still gets PyTorch's error.
    """
    # Older and newer releases are asked in turn not to announce themselves.
    wp.config.quiet = True  # type: ignore[attr-defined]
    wp.config.log_level = 30
    with ExitStack() as held:
        try:
            said = held.enter_context(tempfile.TemporaryFile())
            standard_error = os.dup(2)
        except OSError:  # no standard error to keep clean, or no room to hold it back
            wp.init()
            return
        held.callback(os.close, standard_error)
        _flush()
        os.dup2(said.fileno(), 2)
        try:
            wp.init()
        finally:
            _flush()
            os.dup2(standard_error, 2)
            said.seek(0)
            for line in said:
                if _NO_DRIVER not in line:
                    os.write(2, line)


def _flush() -> None:
    if sys.stderr is not None:
        sys.stderr.flush()
