"""Reading and writing network weights without ever running code that a file brings along.

``.safetensors`` files hold tensors only. Older ``.pth`` files are pickles, programs that the usual reader
would execute; :mod:`policies.pickled` reads them instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from policies.pickled import Placeholder, WeightsError, read_pickled

__all__ = [
    "Checkpoint",
    "WeightsError",
    "convert_to_safetensors",
    "read_pth",
    "read_safetensors",
    "read_weights",
    "save_safetensors",
    "sha256",
    "tensors_sha256",
    "untrained_reason",
]

# A network has some hundreds of modules, a few deep; a module may be part of several others.
_MOST_MODULES = 100_000
_DEEPEST_MODULE = 100
_LONGEST_NAME = 1000
# Tensors may share memory; with memory of its own for each, they stay within so many times the file.
_MOST_SHARING = 16


@dataclass
class Checkpoint:
    """Tensors of a weights file by parameter name, and the plain values beside them."""

    tensors: dict[str, Tensor]
    """Parameters and buffers on the CPU, without a ``module.`` prefix."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Numbers and strings stored beside the tensors, such as the epoch."""


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors, by name, type, shape and bytes: 64 hexadecimal digits.

    The same for the same values wherever they are stored. Counters of BatchNorm do not enter: no output
    depends on them.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.endswith("num_batches_tracked"):
            continue
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_pth(path: str | Path) -> Checkpoint:
    """Reads the tensors of a ``.pth`` file of any age without executing it.

    Accepts state dictionaries, checkpoints with a ``state_dict`` entry, and whole pickled modules, in torch's
    legacy and zip formats.

    Raises:
        WeightsError: if the file is missing, truncated, no weights file, or names anything beyond tensors,
            plain containers and classes that are not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    content = read_pickled(path)
    try:
        tensors = _named_tensors(content)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    if not tensors:
        raise WeightsError(f"{path}: holds no named tensors; expected a state dictionary or a module")
    if sum(value.nbytes for value in tensors.values()) > _MOST_SHARING * path.stat().st_size:
        raise WeightsError(f"{path}: its tensors are far larger together than the file; refused")
    metadata = (
        {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, (int, float, str))}
        if isinstance(content, Mapping)
        else {}
    )
    return Checkpoint({k.removeprefix("module."): v for k, v in tensors.items()}, metadata)


def _named_tensors(content: Any) -> dict[str, Tensor]:
    """Tensors by dotted name in a state dictionary, a checkpoint around one, or a pickled module."""
    for _ in range(_DEEPEST_MODULE):
        if isinstance(content, Placeholder):
            return _module_tensors(content)
        if not isinstance(content, Mapping):
            return {}
        keys = ("state_dict", "model_state_dict", "model")
        inner = next((content[k] for k in keys if isinstance(content.get(k), (Mapping, Placeholder))), None)
        if inner is None:
            return {k: v for k, v in content.items() if isinstance(v, Tensor)}
        content = inner
    raise WeightsError(f"dictionaries nested more than {_DEEPEST_MODULE} deep; refused")


def _module_tensors(module: Placeholder) -> dict[str, Tensor]:
    """Parameters and buffers of a pickled module and of all modules in it, by dotted name."""
    found: dict[str, Tensor] = {}
    waiting = [(module, "", 0)]
    for _ in range(_MOST_MODULES):
        if not waiting:
            return found
        module, prefix, depth = waiting.pop()
        if depth > _DEEPEST_MODULE or len(prefix) > _LONGEST_NAME:
            raise WeightsError(f"modules nested more than {_DEEPEST_MODULE} deep, or in themselves; refused")
        groups = [_mapping(_mapping(module.state).get(g)) for g in ("_parameters", "_buffers", "_modules")]
        for group in groups[:2]:
            found |= {prefix + name: value for name, value in group.items() if isinstance(value, Tensor)}
        children = [(v, f"{prefix}{name}.", depth + 1) for name, v in groups[2].items()]
        waiting += [child for child in reversed(children) if isinstance(child[0], Placeholder)]
    raise WeightsError(f"more than {_MOST_MODULES} modules; refused")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def read_safetensors(path: str | Path) -> Checkpoint:
    """Reads a ``.safetensors`` file: tensors and the strings of its header.

    Raises:
        WeightsError: if the file is missing, damaged or truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    try:
        with safe_open(path, framework="pt") as archive:
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
            return Checkpoint(tensors, dict(archive.metadata() or {}))
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a readable safetensors file, or truncated ({error})") from error


def read_weights(path: str | Path) -> Checkpoint:
    """Reads a ``.safetensors`` or torch weights file, and warns where it looks untrained."""
    path = Path(path)
    checkpoint = read_safetensors(path) if path.suffix == ".safetensors" else read_pth(path)
    reason = untrained_reason(checkpoint.tensors)
    if reason:
        warnings.warn(f"{path}: these weights look untrained: {reason}", UserWarning, stacklevel=2)
    return checkpoint


def untrained_reason(tensors: Mapping[str, Tensor]) -> str | None:
    """Why weights look untrained, or None: every normalisation layer still has scale 1 and shift 0.

    Training moves these values in its first steps, so a file with all of them at their initial value has most
    likely never been trained.
    """
    scales = {
        name: value
        for name, value in tensors.items()
        if name.endswith(".weight") and value.dim() == 1 and f"{name.removesuffix('weight')}bias" in tensors
    }
    if not scales:
        return None
    untouched = all(
        bool((scale == 1).all()) and not bool(tensors[f"{name.removesuffix('weight')}bias"].any())
        for name, scale in scales.items()
    )
    moved = any(value.any() for name, value in tensors.items() if name.endswith("running_mean"))
    if untouched and not moved:
        return f"all {len(scales)} normalisation layers have scale 1 and shift 0, as at initialisation"
    return None


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes tensors and JSON-ready metadata as safetensors, in one atomic move."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-", suffix=".safetensors")
    os.close(handle)
    temporary = Path(name)
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, header)
        umask = os.umask(0)
        os.umask(umask)
        # The temporary file is private; the finished one gets the permissions of a plain open.
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def convert_to_safetensors(source: str | Path, target: str | Path) -> Checkpoint:
    """Rewrites a published ``.pth`` file as safetensors, noting its origin and SHA-256 in the header."""
    checkpoint = read_weights(source)
    # Views into one storage become separate tensors, since safetensors refuses shared memory.
    tensors = {name: value.clone() for name, value in checkpoint.tensors.items()}
    save_safetensors(
        target,
        tensors,
        {**checkpoint.metadata, "source": Path(source).name, "source_sha256": sha256(source)},
    )
    return Checkpoint(tensors, checkpoint.metadata)
