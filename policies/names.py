"""What errors say about a name that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], likeness: float = 0.5) -> str:
    """``"; did you mean 'x'?"`` for the known name most like ``name``, as the end of a message.

    Empty where none is as much like it: ``likeness`` is 1 for the same and 0 for anything.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return f"; did you mean {close[0]!r}?" if close else ""
