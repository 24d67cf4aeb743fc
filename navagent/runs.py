"""A training run's folder: its settings, versions, measures and checkpoints.

::

    RUN/config.yaml                       the resolved settings
    RUN/versions.json                     what it ran on
    RUN/origin.json                       of a run that began as another's agent: which, after how many frames
    RUN/metrics.jsonl                     one line an update
    RUN/checkpoints/000001048576.safetensors   by frames; best.safetensors is the best one
    RUN/tensorboard/  RUN/evaluation/  RUN/curves.png  RUN/report.html

A checkpoint is one safetensors file: arrays as tensors, everything else as JSON in its header. Nothing in it
is ever executed, so a checkpoint from a stranger is at worst refused.

A process that writes here may be killed at any moment. Every file but the metrics is written beside its place
and moved there, and a last line of the metrics that was cut short does not count; so there is always either
the old state or the new one. Metrics are on the disk before the checkpoint that follows them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from envs.cores import usable_cores
from envs.files import atomic_write

FORMAT = "navagent-checkpoint"
VERSION = 1
_PACKAGES = (
    "navagent",
    "torch",
    "warp-lang",
    "numpy",
    "gymnasium",
    "stable-baselines3",
    "safetensors",
    "opencv-python-headless",
)


class RunError(ValueError):
    """A run's folder that is not there or not usable; the message names it and what to do."""


class CheckpointError(RunError):
    """A checkpoint that is missing, broken, not ours, or of another agent."""


class Packed(NamedTuple):
    """Nested state, copied to the CPU: what happens to the original later does not show in it."""

    tensors: dict[str, Tensor]
    """Tensors and arrays by their place in the state."""
    structure: Any
    """The rest, as JSON can hold it."""


def pack(state: Any) -> Packed:
    """Splits nested state into tensors by name and a structure that JSON can hold.

    Takes dictionaries, lists, tuples, tensors, numpy arrays, numbers, text, booleans and None.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> Any:
        if value is None or isinstance(value, (bool, str, int, float)):
            return value
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Tensor):
            # safetensors refuses tensors that share memory: each gets its own.
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {"tensor": name}
        if isinstance(value, np.ndarray):
            tensors[name] = torch.from_numpy(np.ascontiguousarray(value)).clone()
            return {"array": name}
        if isinstance(value, Mapping):
            # Keys need not be text: an optimiser counts its parameters.
            return {"items": [[walk(k, name), walk(v, f"{name}/{k}")] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            items = [walk(item, f"{name}/{index}") for index, item in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        raise TypeError(f"{name or 'state'}: a {type(value).__name__} cannot be saved in a checkpoint")

    structure = walk(state, "")
    return Packed(tensors, structure)


def unpack(tensors: Mapping[str, Tensor], structure: Any) -> Any:
    """The inverse of :func:`pack`. Raises KeyError, TypeError or ValueError on what it did not write."""
    if isinstance(structure, list):
        return [unpack(tensors, item) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if len(structure) != 1:
        raise ValueError(f"a structure with the keys {sorted(structure)[:4]} is not one of ours")
    kind, value = next(iter(structure.items()))
    if kind == "tensor":
        return tensors[value]
    if kind == "array":
        return tensors[value].numpy()
    if kind == "tuple":
        return tuple(unpack(tensors, item) for item in value)
    if kind == "items":
        return {unpack(tensors, key): unpack(tensors, item) for key, item in value}
    raise ValueError(f"a structure of kind {kind!r} is not one of ours")


def write_checkpoint(path: str | Path, state: dict[str, Any] | Packed) -> None:
    """Saves nested ``state`` as one safetensors file, all of it or nothing.

    Raises:
        OSError: it cannot be written, as on a full disk; what was there before still is.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors, structure = state if isinstance(state, Packed) else pack(state)
    header = {"format": FORMAT, "version": str(VERSION), "state": json.dumps(structure)}
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=header)
    except SafetensorError as error:
        # The library tells of the system's errors by their text alone.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads what :func:`write_checkpoint` saved, onto the CPU.

    Raises:
        CheckpointError: if the file is missing, cut short, not a checkpoint, or of a newer version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path}: a safetensors file, but not a checkpoint of a navagent run; weights alone are "
                    "given as encoder.weights or adaptation.side_weights"
                )
            if header.get("version") != str(VERSION):
                raise CheckpointError(
                    f"{path}: checkpoint version {header.get('version')!r}, this navagent reads version "
                    f"{VERSION}; use the navagent that wrote it (its versions.json says which)"
                )
            structure = json.loads(header.get("state", ""))
            # safetensors' tensors are views of one mapped file, which may be replaced: copy them.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        state = unpack(tensors, structure)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); it may have been cut short while copying. "
            "Take another one of the same run; where it is the newest, delete it to go on from the one before"
        ) from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: its header does not describe a checkpoint ({error!r})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: its header does not describe a checkpoint")
    return state


def versions() -> dict[str, Any]:
    """What this process runs on: Python, packages, commit, processor and accelerator."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["commit"] = _commit()
    found["cpu"] = _processor()
    found["cpu_cores"] = usable_cores()
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def _commit() -> str | None:
    """The commit of the checkout this package runs from, with ``+changes`` where files differ from it."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    git = ["git", "-C", str(folder)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode != 0:
        return None
    changes = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    )
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Origin:
    """What the agent of a run began as."""

    run: str
    """Folder of the run whose agent it was."""
    checkpoint: str
    """Name of the checkpoint's file."""
    frames: int
    """Frames that were trained before: by that run, and by those that it began as in its turn."""


class Run:
    """The folder of one training run.

    Example::

        run = Run("runs/20261121-120000-sidetune-rgb")
        state = run.load_checkpoint("best")
    """

    def __init__(self, path: str | Path) -> None:
        """Opens the run at ``path``; raises RunError where there is none."""
        self.path = Path(path)
        if not self.config_path.is_file():
            raise RunError(f"{self.path}: not the folder of a run: it has no config.yaml")

    @classmethod
    def create(cls, path: str | Path, config: str, origin: Origin | None = None) -> Run:
        """Makes the folder, with the resolved settings ``config`` as YAML text; refuses one in use.

        ``origin`` is what its agent begins as, None for an agent of its own.
        """
        path = Path(path)
        if (path / "config.yaml").exists():
            raise RunError(
                f"{path}: there is a run already; give another run_dir, or resume={path} to go on with it"
            )
        with atomic_write(path / "versions.json") as temporary:
            temporary.write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")
        if origin is not None:
            with atomic_write(path / "origin.json") as temporary:
                temporary.write_text(json.dumps(asdict(origin), indent=2) + "\n", encoding="utf-8")
        with atomic_write(path / "config.yaml") as temporary:
            temporary.write_text(config, encoding="utf-8")
        return cls(path)

    def write_config(self, config: str) -> None:
        """Replaces the resolved settings by those of ``config``, YAML text."""
        with atomic_write(self.config_path) as temporary:
            temporary.write_text(config, encoding="utf-8")

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps other trainings out of the folder, and clears away what a killed one had half written.

        The claim ends with the block or with the process, however that ends. File systems that cannot lock
        files are trusted to have one training only.

        Raises:
            RunError: another process trains in this folder.
        """
        with (self.path / ".lock").open("a+b", buffering=0) as file:
            try:
                # Not flock: a process forked from this one would hold that for ever.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                owner = file.read(200).decode(errors="replace") or "another process"
                raise RunError(
                    f"{self.path}: {owner} is training in this folder; wait for its end, or stop it first"
                ) from None
            except OSError:
                pass
            with contextlib.suppress(OSError):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}".encode())
            # In checkpoints/ whatever is hidden: safetensors writes to files with names of its own.
            leftovers = [*self.checkpoint_dir.glob(".*"), *self.path.glob(".partial-*-metrics.jsonl")]
            for leftover in [*leftovers, *self.path.glob(".partial-*-config.yaml")]:
                with contextlib.suppress(OSError):
                    leftover.unlink()
            yield

    @property
    def config_path(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        """One JSON object a line, one line an update; ``frames`` counts the frames trained on."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoint_dir(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    @property
    def tensorboard_dir(self) -> Path:
        """Where TensorBoard looks."""
        return self.path / "tensorboard"

    @property
    def versions(self) -> dict[str, Any]:
        """What the run started on."""
        file = self.path / "versions.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise RunError(f"{file}: not JSON ({error}); delete it to do without") from None
        return found if isinstance(found, dict) else {}

    @property
    def origin(self) -> Origin | None:
        """What its agent began as; None for an agent of its own."""
        file = self.path / "origin.json"
        if not file.is_file():
            return None
        try:
            found = Origin(**json.loads(file.read_text(encoding="utf-8")))
            if not isinstance(found.frames, int):
                raise TypeError(f"frames are {found.frames!r}")
        except (ValueError, TypeError) as error:
            raise RunError(f"{file}: does not say what the run began as ({error})") from None
        return found

    @property
    def trained_frames(self) -> int:
        """Frames that it has trained itself, as far as its metrics tell."""
        return max((record["frames"] for record in self.read_metrics()), default=0)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Adds one line to the metrics; numbers that are not finite become null, as JSON has none.

        Raises:
            OSError: it cannot be written, as on a full disk; the metrics are then as they were before.
        """
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        line = (json.dumps(clean) + "\n").encode()
        with self.metrics_path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.metrics_path))
            except BaseException:
                # Half a line would spoil the next one too.
                file.truncate(before)
                raise

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every whole line of the metrics; a line cut short by a crash is left out."""
        if not self.metrics_path.is_file():
            return []
        records = []
        for line in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "frames" in record:
                records.append(record)
        return records

    def truncate_metrics(self, frames: int) -> None:
        """Takes back the lines after ``frames`` frames: what a resumed run will do again."""
        kept = [record for record in self.read_metrics() if record["frames"] <= frames]
        with atomic_write(self.metrics_path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def checkpoints(self) -> list[Path]:
        """Checkpoints by frames, oldest first; not ``best.safetensors``."""
        return sorted(
            (file for file in self.checkpoint_dir.glob("*.safetensors") if file.stem.isdigit()),
            key=lambda file: int(file.stem),
        )

    def checkpoint(self, which: str | int = "latest") -> Path:
        """The file of checkpoint ``latest``, ``best`` or after so many frames."""
        numbered = self.checkpoints()
        if which == "best":
            best = self.checkpoint_dir / "best.safetensors"
            if best.is_file():
                return best
            which = "latest"
        if which == "latest":
            if not numbered:
                raise CheckpointError(f"{self.path}: the run has no checkpoint yet")
            return numbered[-1]
        for file in numbered:
            if file.stem.isdigit() and str(which).isdigit() and int(file.stem) == int(which):
                return file
        there = ", ".join(str(int(file.stem)) for file in numbered) or "none"
        raise CheckpointError(
            f"{self.path}: no checkpoint {which!r}; there are best, latest and, by frames, {there}"
        )

    def save_checkpoint(self, frames: int, state: dict[str, Any] | Packed, keep: int = 3) -> Path:
        """Writes a checkpoint and deletes all but the ``keep`` newest; the best one stays besides.

        Raises:
            OSError: it cannot be written, as on a full disk; the checkpoints before are then untouched.
        """
        path = self.checkpoint_dir / f"{frames:012d}.safetensors"
        if self.metrics_path.exists():
            # After a power cut too, no checkpoint should know of updates that the metrics do not.
            with self.metrics_path.open("rb") as metrics:
                os.fsync(metrics.fileno())
        write_checkpoint(path, state)
        for old in self.checkpoints()[:-keep]:
            old.unlink()
        return path

    def mark_best(self, checkpoint: Path) -> None:
        """Makes ``checkpoint`` the best one."""
        with atomic_write(self.checkpoint_dir / "best.safetensors") as temporary:
            temporary.unlink()
            try:
                # Two names for one file take no more space than one.
                os.link(checkpoint, temporary)
            except OSError:
                shutil.copyfile(checkpoint, temporary)

    def load_checkpoint(self, which: str | int = "latest") -> dict[str, Any]:
        """The state saved in a checkpoint. Raises CheckpointError where there is none or it is broken."""
        return read_checkpoint(self.checkpoint(which))
