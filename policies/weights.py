"""Reading and writing network weights without ever running code that a file brings along.

``.safetensors`` files hold tensors only. Older ``.pth`` files are pickles, programs that the usual reader
would execute; :func:`read_pth` walks them with a reader of its own that can build tensors and plain
containers, puts an inert :class:`Placeholder` where the file names a class of a package that is not
installed, and refuses every other name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickle
import struct
import sys
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What the pickle machine and its handlers raise on bytes that are not a valid program.
_MALFORMED = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    MemoryError,
    struct.error,
    RuntimeError,
)


class WeightsError(ValueError):
    """A weights file that cannot be read, is not what it should be, or tries to run code."""


class Placeholder:
    """Stands, inert, where a pickle names a class that is not installed; keeps the state given to it."""

    origin = ""
    """Dotted name of the class that the file asked for."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        """Takes whatever arguments the file gives."""
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.items: dict[Any, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__.setdefault("items", {})[key] = value

    def append(self, value: Any) -> None:
        """Takes a list item that the file adds, and drops it."""

    def extend(self, values: Any) -> None:
        """Takes list items that the file adds, and drops them."""


@dataclass
class Checkpoint:
    """Tensors of a weights file by parameter name, and the plain values beside them."""

    tensors: dict[str, Tensor]
    """Parameters and buffers on the CPU, without a ``module.`` prefix."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Numbers and strings stored beside the tensors, such as the epoch."""


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


class _Storages:
    """Storages of a pickle by key: views of one flat tensor each, filled in when their bytes are read."""

    def __init__(self) -> None:
        self.by_key: dict[str, Tensor] = {}

    def empty(self, key: str, dtype: torch.dtype, numel: int, available: int) -> Tensor:
        size = numel * dtype.itemsize
        if numel < 0 or size > available:
            raise WeightsError(
                f"storage {key!r} claims {size} bytes, but the file holds {available}: it is truncated"
            )
        return self.by_key.setdefault(key, torch.zeros(numel, dtype=dtype))


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    """A strided view of a storage; torch refuses one that reaches beyond it."""
    return torch.as_strided(storage, tuple(size), tuple(stride), offset)


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    """A parameter, as the plain tensor that it wraps."""
    return data


def _plain_defaultdict(*_: Any) -> dict[Any, Any]:
    return {}


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): _plain_defaultdict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): torch.Size,
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGE_TYPES.items()},
    **{
        (module, name): kind
        for module in ("builtins", "__builtin__")
        for name, kind in {"dict": dict, "list": list, "set": set, "tuple": tuple}.items()
    },
}
# Python 2 module names that a pickle may use for what Python 3 has under another.
_OLD_STDLIB = {"__builtin__", "commands", "copy_reg", "cPickle", "popen2", "urllib2", "exceptions"}


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO, storages: _Storages, available: int) -> None:
        # latin1 reads every byte string that Python 2 may have written.
        super().__init__(stream, encoding="latin1")
        self._storages = storages
        self._available = available

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module, name))
        if allowed is not None:
            return allowed
        package = module.partition(".")[0]
        network_part = module.startswith(("torch.nn.", "torch.optim."))
        installed = package in sys.stdlib_module_names or package in _OLD_STDLIB or _is_installed(package)
        if installed and not network_part:
            raise WeightsError(
                f"the file asks for {module}.{name}, which is not needed to read tensors; refused, as "
                "running it could do anything. Use a file from a source that you trust, best safetensors"
            )
        return type("Placeholder", (Placeholder,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        # Old files keep a module's class beside its source code; the class is a placeholder by now.
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise WeightsError(f"unknown persistent object {str(pid)[:80]}; expected a tensor storage")
        kind, key, numel = pid[1], str(pid[2]), int(pid[4])
        if not isinstance(kind, _StorageType):
            raise WeightsError(f"storage {key!r} has an unknown type {kind!r}")
        return self._storages.empty(key, kind.dtype, numel, self._available)


def _is_installed(package: str) -> bool:
    """Whether a top-level package could be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
    storages = _Storages()
    try:
        if zipfile.is_zipfile(path):
            content = _read_zip(path, storages)
        else:
            with path.open("rb") as stream:
                content = _read_legacy(stream, storages, path.stat().st_size)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except _MALFORMED as error:
        raise WeightsError(
            f"{path}: not a readable torch file, or truncated ({type(error).__name__}: {error})"
        ) from error
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{path}: damaged zip archive ({error})") from error
    tensors = _named_tensors(content)
    if not tensors:
        raise WeightsError(f"{path}: holds no named tensors; expected a state dictionary or a module")
    metadata = (
        {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, (int, float, str))}
        if isinstance(content, Mapping)
        else {}
    )
    return Checkpoint({k.removeprefix("module."): v for k, v in tensors.items()}, metadata)


def _read_legacy(stream: BinaryIO, storages: _Storages, available: int) -> Any:
    """Four pickles (magic, version, machine, content), then storage keys and each storage's bytes."""
    magic = _TensorUnpickler(stream, storages, available).load()
    if magic != _MAGIC:
        raise WeightsError("does not start with torch's magic number; expected a file written by torch.save")
    for _ in range(2):
        _TensorUnpickler(stream, storages, available).load()
    content = _TensorUnpickler(stream, storages, available).load()
    keys = _TensorUnpickler(stream, storages, available).load()
    for key in keys:
        storage = storages.by_key.get(str(key))
        header = stream.read(8)
        if storage is None or len(header) < 8:
            raise WeightsError(f"storage {key!r} is missing: the file is truncated")
        (numel,) = struct.unpack("<q", header)
        if numel != storage.numel():
            raise WeightsError(f"storage {key!r} holds {numel} values; its tensors need {storage.numel()}")
        _fill(storage, stream.read(storage.nbytes), key)
    return content


def _read_zip(path: Path, storages: _Storages) -> Any:
    """``NAME/data.pkl`` and one ``NAME/data/KEY`` a storage."""
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise WeightsError(f"zip archive with {len(pickles)} data.pkl entries; expected 1")
        prefix = pickles[0].removesuffix("data.pkl")
        available = sum(entry.file_size for entry in archive.infolist())
        with archive.open(pickles[0]) as stream:
            content = _TensorUnpickler(stream, storages, available).load()  # type: ignore[arg-type]
        for key, storage in storages.by_key.items():
            _fill(storage, archive.read(f"{prefix}data/{key}"), key)
    return content


def _fill(storage: Tensor, data: bytes, key: Any) -> None:
    if len(data) < storage.nbytes:
        raise WeightsError(
            f"storage {key!r} has {len(data)} of {storage.nbytes} bytes: the file is truncated"
        )
    if storage.numel():
        storage.copy_(torch.frombuffer(bytearray(data[: storage.nbytes]), dtype=storage.dtype))


def _named_tensors(content: Any) -> dict[str, Tensor]:
    """Tensors by dotted name in a state dictionary, a checkpoint around one, or a pickled module."""
    if isinstance(content, Placeholder):
        return _module_tensors(content, "")
    if not isinstance(content, Mapping):
        return {}
    for key in ("state_dict", "model_state_dict", "model"):
        inner = content.get(key)
        if isinstance(inner, (Mapping, Placeholder)):
            return _named_tensors(inner)
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _module_tensors(module: Placeholder, prefix: str) -> dict[str, Tensor]:
    state = getattr(module, "state", None)
    if not isinstance(state, Mapping):
        return {}
    found: dict[str, Tensor] = {}
    for group in ("_parameters", "_buffers"):
        for name, value in (state.get(group) or {}).items():
            if isinstance(value, Tensor):
                found[prefix + str(name)] = value
    for name, child in (state.get("_modules") or {}).items():
        if isinstance(child, Placeholder):
            found |= _module_tensors(child, f"{prefix}{name}.")
    return found


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
