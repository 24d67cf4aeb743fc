"""Whether the packages that Python finds are the ones installed with this one."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("envs", "policies", "configs")
"""The packages installed beside ``navagent``; their names are common enough to meet others'."""


class ShadowedPackageError(ImportError):
    """Another package or folder of the same name stands before one of ours on Python's search path."""


def check_packages() -> None:
    """Raises :class:`ShadowedPackageError` if one of our packages is hidden by somebody else's.

    ``python -m`` and scripts put a folder of the user's first on the search path, and a folder named ``envs``
    in it would be taken for ours.
    """
    ours = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        spec = sys.modules[name].__spec__ if name in sys.modules else find_spec(name)
        if spec is None:
            raise ShadowedPackageError(
                f"navagent's package {name!r} is missing from {ours}: install navagent again", name=name
            )
        if spec.submodule_search_locations is not None:
            found = [Path(folder).resolve() for folder in spec.submodule_search_locations]
        else:
            found = [Path(spec.origin or "").resolve()]
        if ours / name not in found:
            raise ShadowedPackageError(
                f"{found[0]} hides navagent's own package {name!r} at {ours / name}: rename it, or run from "
                f"another folder (the `navagent` command, unlike `python -m navagent`, does not look into "
                f"the working folder)",
                name=name,
            )
