"""Folders of memory-mapped arrays: made whole or not at all, verified when opened.

::

    FOLDER/about.json          what the arrays are of, and the type, shape and hash of each
    FOLDER/array-000.npy ...
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.files import atomic_write
from navagent.demonstrations.recorded import DemonstrationError
from policies.weights import sha256

ABOUT = "about.json"
VERSION = 1


class ArrayWriter:
    """Arrays of a folder that is being made, filled row by row."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, str] = {}
        self._open: dict[str, NDArray[Any]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> NDArray[Any]:
        """A new array to write into, on the disk."""
        file = f"array-{len(self._files):03d}.npy"
        self._files[name] = file
        made = np.lib.format.open_memmap(self._folder / file, mode="w+", dtype=np.dtype(dtype), shape=shape)
        self._open[name] = made
        return made

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._open[name]

    def finish(self, about: Mapping[str, Any]) -> None:
        """Writes all to the disk, with what it is of."""
        listed = {}
        for name, file in self._files.items():
            array = self._open.pop(name)
            array.flush()  # type: ignore[attr-defined]
            listed[name] = {
                "file": file,
                "shape": list(array.shape),
                "dtype": str(array.dtype),
                "sha256": sha256(self._folder / file),
            }
        with atomic_write(self._folder / ABOUT) as temporary:
            temporary.write_text(
                json.dumps({**about, "version": VERSION, "arrays": listed}, indent=1, sort_keys=True),
                encoding="utf-8",
            )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[ArrayWriter | None]:
    """Gives a writer of ``folder``, and moves what it wrote there if the block succeeds.

    Gives None where the folder exists, perhaps because another process has just made it: only one makes it,
    and the others wait. What a killed process left is cleared away.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".partial-{folder.name}"
    with (folder.parent / f".{folder.name}.lock").open("a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks has one process only
            fcntl.lockf(lock, fcntl.LOCK_EX)
        if folder.exists():
            yield None
            return
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield ArrayWriter(partial)
            partial.rename(folder)
            # Whoever waited for it, or comes later with a lock of its own, finds the folder.
            Path(lock.name).unlink(missing_ok=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def read_about(folder: Path, kind: str) -> dict[str, Any]:
    """What the arrays of a folder are of.

    Raises:
        DemonstrationError: there is no such folder, or it is of another version or broken.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        found, version = about["kind"], about["version"]
    except FileNotFoundError:
        raise DemonstrationError(f"{folder}: not a folder of {kind}: it has no {ABOUT}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DemonstrationError(f"{folder / ABOUT}: cannot be read ({error!r}); make {kind} anew") from None
    if found != kind or version != VERSION:
        raise DemonstrationError(
            f"{folder}: holds {found!r} of version {version!r}, expected {kind!r} of version {VERSION}; make "
            "it anew with this navagent"
        )
    return dict(about)


def open_arrays(folder: Path, about: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The arrays of a folder, mapped into memory, after their bytes were compared with their hashes.

    Raises:
        DemonstrationError: one is missing, truncated or damaged.
    """
    arrays = {}
    for name, one in about["arrays"].items():
        path = folder / Path(str(one["file"])).name
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            damaged = (
                list(array.shape) != one["shape"]
                or str(array.dtype) != one["dtype"]
                or sha256(path) != one["sha256"]
            )
        except (OSError, ValueError, EOFError) as error:
            raise DemonstrationError(
                f"{path}: truncated or missing ({error}); delete {folder} and make it anew"
            ) from None
        if damaged:
            raise DemonstrationError(f"{path}: its contents have changed; delete {folder} and make it anew")
        arrays[name] = array
    return arrays
