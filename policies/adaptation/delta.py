"""Delta files: what a method has learned, without the frozen network that it was learned on.

A delta is a safetensors file with :meth:`Adaptation.delta` as its tensors and, as JSON in its header, how to
build the method again: its name and settings, its tasks, and which base it belongs to, by name and hash. The
base itself is not in it, so ten tasks on one base take what the ten have learned and no more.

Example:
    >>> save_delta(method, "curtains.safetensors")
    >>> method = load_delta("curtains.safetensors")
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from policies.adaptation import ADAPTATIONS, Adaptation, AdaptationConfig, FrozenEncoder
from policies.adaptation.side_tuning import SideTuning
from policies.encoders import Encoder, make_encoder
from policies.names import nearest
from policies.weights import WeightsError, read_safetensors, save_safetensors, tensors_sha256

FORMAT = "navagent-delta"
"""What the header's ``format`` says."""
VERSION = 1
"""Version of the format; raised when older readers would misunderstand a file."""


@dataclass(frozen=True)
class Delta:
    """What a delta file holds."""

    method: str
    """Name of the method, a key of :data:`policies.adaptation.ADAPTATIONS`."""
    config: Mapping[str, Any]
    """Settings of the method by name."""
    tasks: tuple[str, ...]
    """The tasks begun, in their order."""
    task: str
    """The task that was computed last."""
    base: str | None
    """Name of the frozen base's encoder; None for methods that have none."""
    base_sha256: str | None
    """See :meth:`FrozenEncoder.sha256`."""
    package: str
    """Version of navagent that wrote the file."""
    tensors: Mapping[str, Tensor]
    """What :meth:`Adaptation.delta` gave."""


def save_delta(method: Adaptation, path: str | Path) -> None:
    """Writes what a method has learned, in all its tasks, in one atomic move.

    Raises:
        ValueError: if the method is none of :data:`policies.adaptation.ADAPTATIONS`, so that nobody could
            build it again.
    """
    names = [name for name, known in ADAPTATIONS.items() if known is type(method)]
    if not names:
        raise ValueError(f"{type(method).__name__} has no name in ADAPTATIONS, which a delta file would need")
    base = getattr(method, "base", None)
    # Clones: safetensors refuses tensors that share memory.
    tensors = {name: value.detach().clone() for name, value in method.delta().items()}
    about = {
        "method": names[0],
        "config": dataclasses.asdict(method.config),
        "tasks": list(method.tasks),
        "task": method.task,
        "base": base.encoder.name if isinstance(base, FrozenEncoder) else None,
        "base_sha256": base.sha256() if isinstance(base, FrozenEncoder) else None,
        "package": _package_version(),
        "tensors_sha256": tensors_sha256(tensors),
    }
    save_safetensors(path, tensors, {"format": FORMAT, "version": VERSION, "delta": about})


def read_delta(path: str | Path) -> Delta:
    """Reads a delta file, without building the method.

    Raises:
        WeightsError: if it is missing, damaged, no delta file, or of a newer version.
    """
    file = read_safetensors(path)
    header = file.metadata
    if header.get("format") != FORMAT:
        raise WeightsError(
            f"{path}: a safetensors file, but no delta of navagent; expected format {FORMAT!r}"
        )
    if header.get("version") != str(VERSION):
        raise WeightsError(
            f"{path}: delta version {header.get('version')!r}, but this navagent reads version {VERSION}; "
            "use the navagent that wrote it"
        )
    try:
        about = json.loads(header["delta"])
        tensors_hash = about.pop("tensors_sha256")
        delta = Delta(**{**about, "tasks": tuple(about["tasks"]), "tensors": file.tensors})
        texts = (delta.method, delta.task, delta.package, *delta.tasks)
        if not (isinstance(delta.config, dict) and all(isinstance(text, str) for text in texts)):
            raise TypeError("values of the wrong types")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path}: its header is damaged ({type(error).__name__}: {error})") from error
    if tensors_sha256(file.tensors) != tensors_hash:
        raise WeightsError(f"{path}: its tensors are not those that were saved: the file is damaged")
    return delta


def load_delta(path: str | Path, base: Encoder | None = None, side: Encoder | None = None) -> Adaptation:
    """Builds a method as it was when its delta was saved.

    Args:
        path: a file of :func:`save_delta`.
        base: the network that the delta belongs to, which is copied; None makes it from the settings that the
            method had, if its weights ship, were fetched, or lie where they did.
        side: for side-tuning that was given a side network of its own, one of the same design; its weights
            are the delta's.

    Raises:
        WeightsError: if the file cannot be read, or belongs to another base or to a method that is not known.
    """
    delta = read_delta(path)
    if delta.method not in ADAPTATIONS:
        raise WeightsError(
            f"{path}: made by the unknown method {delta.method!r}{nearest(delta.method, ADAPTATIONS)}"
            f"{_written_by(delta)}"
        )
    kind = ADAPTATIONS[delta.method]
    fields = [field.name for field in dataclasses.fields(kind.config_class)]
    unknown = [name for name in delta.config if name not in fields]
    if unknown:
        raise WeightsError(
            f"{path}: {delta.method!r} has no setting {unknown[0]!r}{nearest(unknown[0], fields)}"
            f"{_written_by(delta)}"
        )
    try:
        config = kind.config_class(**delta.config)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: {error}{_written_by(delta)}") from error
    if base is None:
        base = _make_base(path, delta, config)
    if delta.base is not None:
        found = tensors_sha256(base.state_dict())
        if found != delta.base_sha256:
            random = "; its weights were random, so that no other is like it" * (config.weights == "random")
            raise WeightsError(
                f"{path}: made for {delta.base} {str(delta.base_sha256)[:8]}..., not {base.name} "
                f"{found[:8]}...{random}; {_GIVE_BASE}"
            )
    if side is not None and not issubclass(kind, SideTuning):
        raise WeightsError(f"{path}: made by the method {delta.method!r}, which takes no side network")
    try:
        own = {} if side is None else {"side": side}
        method = kind.to_restore(config, base, **own)
        for task in (*delta.tasks, delta.task):
            method.start_task(task)
        method.load_delta(delta.tensors)
    except (ValueError, RuntimeError) as error:
        raise WeightsError(f"{path}: {error}{_written_by(delta)}") from error
    return method


_GIVE_BASE = "give the network that it belongs to, as load_delta(path, base=...)"


def _make_base(path: str | Path, delta: Delta, config: AdaptationConfig) -> Encoder:
    """The base by the method's own settings; where all weights are in the delta, the network is enough."""
    try:
        if delta.base is None:
            return make_encoder(config.encoder, config.channels, "random")
        return config.make_encoder()
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path}: its base cannot be made: {error}; {_GIVE_BASE}") from error


def _written_by(delta: Delta) -> str:
    """Where the reader and the writer differ, what may be why."""
    own = _package_version()
    return "" if delta.package == own else f" (written by navagent {delta.package}, read by {own})"


def _package_version() -> str:
    try:
        return metadata.version("navagent")
    except metadata.PackageNotFoundError:
        return "unknown"
