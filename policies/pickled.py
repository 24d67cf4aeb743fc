"""Torch's pickled files, read without running them.

A pickle is a program for a small stack machine. Python's own machine can be told to call any function, so
:func:`read_pickled` has a machine of its own. It knows tensors, numbers, texts, lists, tuples and
dictionaries. Names of classes that are not installed become inert :class:`Placeholder` objects; any other
name is refused. What a file can make it do grows with the bytes that it has, whatever it claims.
"""

from __future__ import annotations

import codecs
import errno
import importlib.util
import io
import math
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_MAGIC = 0x1950A86A20F9469CFC6C
_MOST_DIMENSIONS = 32
# Bytes. Arithmetic with numbers as long as a file would take for ever.
_LONGEST_NUMBER = 16
# What the machine raises on bytes that are no valid program, and torch on numbers that fit no tensor.
_MALFORMED = (
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    MemoryError,
    struct.error,
    RuntimeError,
)


class WeightsError(ValueError):
    """A weights file that cannot be read, is not what it should be, or tries to run code."""


class Placeholder:
    """Stands, inert, where a pickle names a class that is not installed; keeps the state given to it."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        """Dotted name of the class that the file asked for."""
        self.state: Any = None
        """What the file gives as the object's attributes."""


class _Storages:
    """Storages of a pickle by key: one flat tensor each, filled in when their bytes are read.

    Args:
        available: bytes that the file has, which all storages together cannot exceed.
    """

    def __init__(self, available: int) -> None:
        self.by_key: dict[str, Tensor] = {}
        self._available = available

    def get(self, key: str, dtype: torch.dtype, numel: int) -> Tensor:
        """The storage ``key``, made where it is new: (numel,)."""
        storage = self.by_key.get(key)
        if storage is None:
            size = numel * dtype.itemsize
            if not 0 <= size <= self._available:
                raise WeightsError(
                    f"storage {key[:40]!r} claims {size} bytes, but the file has {self._available} left: it "
                    "is truncated"
                )
            self._available -= size
            storage = self.by_key[key] = torch.zeros(numel, dtype=dtype)
        elif (storage.dtype, storage.numel()) != (dtype, numel):
            raise WeightsError(f"storage {key[:40]!r} is described in two ways that differ")
        return storage


@dataclass(frozen=True)
class _Name:
    """A class or function that a file names, as the one thing that it may do here."""

    origin: str
    make: Callable[[_Machine, Any], Any]
    """What comes of calling it with a tuple of arguments."""
    dtype: torch.dtype | None = None
    """For the type of a storage: that of its elements."""


def _dict(machine: _Machine, arguments: Any) -> dict[str, Any]:
    """A dictionary, of a list of pairs if there is one."""
    made: dict[str, Any] = {}
    for pairs in arguments:
        if isinstance(pairs, (list, tuple)):
            # One list can be given many times at two bytes each.
            machine.spend(len(pairs))
            for key, value in pairs:
                _put(made, key, value)
    return made


def _items(machine: _Machine, arguments: Any) -> Any:
    """A list, tuple, set or size: the items themselves."""
    return arguments[0] if arguments and isinstance(arguments[0], (list, tuple)) else []


def _tensor(machine: _Machine, arguments: Any) -> Tensor:
    """A strided view of a storage; torch refuses one that reaches beyond it."""
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, Tensor) or len(size) > _MOST_DIMENSIONS:
        raise WeightsError("a tensor without a storage, or with too many dimensions")
    if math.prod(size) > storage.numel():
        raise WeightsError(f"a tensor claims {math.prod(size)} values, but its storage has {storage.numel()}")
    # Offsets count from the storage's own beginning, which may be a part of another.
    return torch.as_strided(storage, tuple(size), tuple(stride), storage.storage_offset() + offset)


def _first(machine: _Machine, arguments: Any) -> Any:
    """A parameter: the tensor that it wraps."""
    return arguments[0]


def _no_call(machine: _Machine, arguments: Any) -> Any:
    raise WeightsError("calls the type of a storage, as no file of tensors does")


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
_KNOWN: Mapping[str, Callable[[_Machine, Any], Any]] = {
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.Size": _items,
    **{
        f"{module}.{name}": make
        for module in ("builtins", "__builtin__")
        for name, make in (
            ("dict", _dict),
            ("list", _items),
            ("tuple", _items),
            ("set", _items),
            ("frozenset", _items),
        )
    },
}
# Installed, and found beside the tensors of honest checkpoints: settings, scores, devices. Nothing here needs
# them, so they stay placeholders.
_IGNORED = {
    "argparse.Namespace",
    "torch.device",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
}
# Python 2 module names that a pickle may use for what Python 3 has under another.
_OLD_STDLIB = {"__builtin__", "commands", "copy_reg", "cPickle", "popen2", "urllib2", "exceptions"}


def _resolve(module: str, name: str) -> _Name:
    """What a name in a file stands for.

    Raises:
        WeightsError: if it could be had, and is not needed to read tensors.
    """
    origin = f"{module}.{name}"
    if module == "torch" and name in _STORAGE_TYPES:
        return _Name(origin, _no_call, _STORAGE_TYPES[name])
    if origin in _KNOWN:
        return _Name(origin, _KNOWN[origin])
    package = module.partition(".")[0]
    harmless = origin in _IGNORED or module.startswith(("torch.nn.", "torch.optim."))
    installed = package in sys.stdlib_module_names or package in _OLD_STDLIB or _is_installed(package)
    if installed and not harmless:
        raise WeightsError(
            f"the file asks for {origin[:200]}, which is not needed to read tensors; refused, as running it "
            "could do anything. Use a file from a source that you trust, best safetensors"
        )
    return _Name(origin, lambda machine, arguments: Placeholder(origin))


def _is_installed(package: str) -> bool:
    """Whether a top-level package could be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _put(target: dict[str, Any], key: Any, value: Any) -> None:
    """Adds an item under a text. Others name no tensors; and hashing a tuple can take for ever."""
    if isinstance(key, str):
        target[key] = value


class _Machine:
    """The stack machine: runs one pickle from a stream.

    Args:
        stream: where the program is read from.
        storages: the storages that tensors refer to.
        available: bytes that the file has.
    """

    def __init__(self, stream: BinaryIO, storages: _Storages, available: int) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self._stream = stream
        self._storages = storages
        self._available = self._budget = available

    def run(self) -> Any:
        """The one value that the program leaves."""
        while (code := self.read(1)) != b".":
            step = _STEPS.get(code)
            if step is None:
                raise WeightsError(f"pickle instruction {code!r} is not needed to read tensors; refused")
            step(self)
        return self.stack.pop()

    def spend(self, items: int) -> None:
        """Counts work that bytes of the file do not bound."""
        self._budget -= items
        if self._budget < 0:
            raise WeightsError("copies its lists more often than the file is long; refused")

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        data = self._stream.read(size) if 0 <= size <= self._available else b""
        if len(data) != size:
            raise EOFError("the program ends too early")
        return data

    def line(self) -> bytes:
        """The rest of a line."""
        data = self._stream.readline()
        if data[-1:] != b"\n":
            raise EOFError("the program ends too early")
        return data[:-1]

    def number(self, layout: str) -> Any:
        """A number in the layout of :mod:`struct`."""
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]

    def items(self) -> list[Any]:
        """Takes everything above the topmost mark."""
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def pop(self, count: int) -> tuple[Any, ...]:
        """Takes the topmost values, in the order in which they were pushed."""
        taken = tuple(self.stack[-count:])
        if len(taken) < count:
            raise IndexError("the stack is empty")
        del self.stack[-count:]
        return taken

    def call(self, name: Any, arguments: Any) -> None:
        """Pushes what a named class or function makes of its arguments."""
        if not isinstance(name, _Name):
            raise WeightsError(f"calls {type(name).__name__}, which is no class")
        self.stack.append(name.make(self, arguments))

    def fill(self, items: list[Any]) -> None:
        """Adds items to the list or set on top; objects of missing classes ignore them."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Placeholder):
            raise WeightsError(f"adds items to {type(target).__name__}")

    def fill_pairs(self, items: list[Any]) -> None:
        """Adds keys and values to the dictionary on top; objects of missing classes ignore them."""
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                _put(target, key, value)
        elif not isinstance(target, Placeholder):
            raise WeightsError(f"adds pairs to {type(target).__name__}")

    def build(self) -> None:
        """Gives the object on top its attributes; only those of missing classes are of use."""
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target.state = state
        elif not isinstance(target, (dict, Tensor)):
            raise WeightsError(f"sets attributes of {type(target).__name__}")

    def persistent(self, pid: Any) -> None:
        """Pushes what torch stores outside of the program: a storage, or a module's class."""
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            # Old files keep the class beside its source code.
            self.stack.append(pid[1])
            return
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise WeightsError("unknown persistent object; expected a tensor's storage")
        kind, key, numel = pid[1], pid[2], pid[4]
        dtype = kind.dtype if isinstance(kind, _Name) else None
        if dtype is None or not isinstance(key, (str, int)) or not isinstance(numel, int):
            raise WeightsError("a tensor's storage has an unknown type")
        storage = self._storages.get(str(key), dtype, numel)
        if len(pid) == 6 and pid[5] is not None:
            _, offset, size = pid[5]
            storage = storage.narrow(0, offset, size)
        self.stack.append(storage)


def _sized(layout: str, decode: Callable[[bytes], Any]) -> Callable[[_Machine], None]:
    """An instruction with a length and so many bytes."""
    return lambda machine: machine.stack.append(decode(machine.read(machine.number(layout))))


def _plain(layout: str) -> Callable[[_Machine], None]:
    """An instruction with a number."""
    return lambda machine: machine.stack.append(machine.number(layout))


def _text(decode: Callable[[bytes], Any]) -> Callable[[_Machine], None]:
    """An instruction with a line of text."""
    return lambda machine: machine.stack.append(decode(machine.line()))


def _new(make: Callable[[], Any]) -> Callable[[_Machine], None]:
    """An instruction that pushes a fresh value."""
    return lambda machine: machine.stack.append(make())


def _gather(make: Callable[[list[Any]], Any]) -> Callable[[_Machine], None]:
    """An instruction that makes one value of everything above the mark."""
    return lambda machine: machine.stack.append(make(machine.items()))


def _tuple(count: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.pop(count))


def _get(index: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.memo[index(machine)])


def _remember(index: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    return lambda machine: machine.memo.__setitem__(index(machine), machine.stack[-1])


def _integer(line: bytes) -> int | bool:
    if line in (b"00", b"01"):
        return line == b"01"
    return int(line.rstrip(b"L"))


def _long(data: bytes) -> int:
    if len(data) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _latin1(data: bytes) -> str:
    """Python 2's byte strings; every one of them is valid."""
    return data.decode("latin1")


def _quoted(line: bytes) -> str:
    line = line.strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise ValueError("a string without quotes")
    return _latin1(codecs.escape_decode(line[1:-1])[0])


def _pairs(items: list[Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in zip(items[::2], items[1::2], strict=True):
        _put(made, key, value)
    return made


def _stack_global(machine: _Machine) -> None:
    module, name = machine.pop(2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise WeightsError("a class whose name is no text")
    machine.stack.append(_resolve(module, name))


def _global(machine: _Machine) -> _Name:
    return _resolve(_utf8(machine.line()), _utf8(machine.line()))


def _object(machine: _Machine) -> None:
    name, *arguments = machine.items()
    machine.call(name, arguments)


# Instructions of protocols 0 to 5, see pickletools; without extension codes, out-of-band buffers and
# persistent objects named by a line of text, which torch never writes.
_STEPS: Mapping[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda machine: machine.read(1),
    b"\x95": lambda machine: machine.read(8),
    b"(": lambda machine: machine.marks.append(len(machine.stack)),
    b"0": lambda machine: machine.pop(1),
    b"1": lambda machine: machine.items(),
    b"2": lambda machine: machine.stack.append(machine.stack[-1]),
    b"N": _new(lambda: None),
    b"\x88": _new(lambda: True),
    b"\x89": _new(lambda: False),
    b"I": _text(_integer),
    b"L": _text(_integer),
    b"J": _plain("<i"),
    b"K": _plain("<B"),
    b"M": _plain("<H"),
    b"\x8a": _sized("<B", _long),
    b"\x8b": _sized("<i", _long),
    b"F": _text(float),
    b"G": _plain(">d"),
    b"S": _text(_quoted),
    b"T": _sized("<i", _latin1),
    b"U": _sized("<B", _latin1),
    b"B": _sized("<I", bytes),
    b"C": _sized("<B", bytes),
    b"\x8e": _sized("<Q", bytes),
    b"V": _text(lambda line: line.decode("raw-unicode-escape")),
    b"X": _sized("<I", _utf8),
    b"\x8c": _sized("<B", _utf8),
    b"\x8d": _sized("<Q", _utf8),
    b"]": _new(list),
    b"a": lambda machine: machine.fill(list(machine.pop(1))),
    b"e": lambda machine: machine.fill(machine.items()),
    b"l": _gather(list),
    b")": _new(tuple),
    b"t": _gather(tuple),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"}": _new(dict),
    b"d": _gather(_pairs),
    b"s": lambda machine: machine.fill_pairs(list(machine.pop(2))),
    b"u": lambda machine: machine.fill_pairs(machine.items()),
    b"\x8f": _new(list),
    b"\x90": lambda machine: machine.fill(machine.items()),
    b"\x91": _gather(list),
    b"c": lambda machine: machine.stack.append(_global(machine)),
    b"\x93": _stack_global,
    b"i": lambda machine: machine.call(_global(machine), machine.items()),
    b"o": _object,
    b"R": lambda machine: machine.call(*machine.pop(2)),
    b"\x81": lambda machine: machine.call(*machine.pop(2)),
    b"\x92": lambda machine: machine.call(*machine.pop(3)[:2]),
    b"b": lambda machine: machine.build(),
    b"g": _get(lambda machine: int(machine.line())),
    b"h": _get(lambda machine: machine.number("<B")),
    b"j": _get(lambda machine: machine.number("<I")),
    b"p": _remember(lambda machine: int(machine.line())),
    b"q": _remember(lambda machine: machine.number("<B")),
    b"r": _remember(lambda machine: machine.number("<I")),
    b"\x94": _remember(lambda machine: len(machine.memo)),
    b"Q": lambda machine: machine.persistent(machine.pop(1)[0]),
}


def read_pickled(path: Path) -> Any:
    """What ``torch.save`` wrote to a file: tensors in plain containers and in :class:`Placeholder` objects.

    Reads torch's zip format and the older one of pickles in a row. Dictionaries keep what is stored under
    texts.

    Raises:
        WeightsError: if the file is damaged or truncated, or asks for more than tensors.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        with path.open("rb") as stream:
            return _read_legacy(stream, path.stat().st_size)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{path}: damaged zip archive ({error})") from error
    except OSError as error:
        # A damaged directory can send zipfile to a place before the file's beginning.
        if error.errno != errno.EINVAL:
            raise
        raise WeightsError(f"{path}: damaged zip archive ({error})") from error
    except _MALFORMED as error:
        if tarfile.is_tarfile(path):
            raise WeightsError(
                f"{path}: a tar archive, as the first versions of PyTorch wrote; load it there and save its "
                "state dictionary anew"
            ) from None
        raise WeightsError(
            f"{path}: not a readable torch file, or truncated ({type(error).__name__}: {error})"
        ) from error


def _read_legacy(stream: BinaryIO, available: int) -> Any:
    """Four pickles (magic, version, machine, content), then storage keys and each storage's bytes."""
    storages = _Storages(available)
    if _Machine(stream, storages, available).run() != _MAGIC:
        raise WeightsError("does not start with torch's magic number; expected a file written by torch.save")
    _Machine(stream, storages, available).run()
    about = _Machine(stream, storages, available).run()
    if isinstance(about, dict) and about.get("little_endian") is False:
        raise WeightsError("was written by a machine whose bytes are in the other order")
    content = _Machine(stream, storages, available).run()
    keys = _Machine(stream, storages, available).run()
    missing = set(storages.by_key)
    for key in keys:
        storage = storages.by_key.get(str(key)) if isinstance(key, (str, int)) else None
        header = stream.read(8)
        if storage is None or len(header) < 8 or str(key) not in missing:
            raise WeightsError("a storage is missing: the file is truncated")
        (numel,) = struct.unpack("<q", header)
        if numel != storage.numel():
            raise WeightsError(f"storage {key!r} holds {numel} values; its tensors need {storage.numel()}")
        _fill(storage, stream.read(storage.nbytes), str(key))
        missing.remove(str(key))
    if missing:
        raise WeightsError(f"storage {min(missing)!r} is missing: the file is truncated")
    return content


def _read_zip(path: Path) -> Any:
    """``NAME/data.pkl`` and one ``NAME/data/KEY`` a storage. Nothing is unpacked to the disk."""
    available = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > available:
                raise WeightsError(
                    f"zip archive whose entry {entry.filename[:40]!r} is compressed or larger than the file, "
                    "as torch never writes it; refused"
                )
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise WeightsError(f"zip archive with {len(pickles)} data.pkl entries; expected 1")
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
            raise WeightsError("was written by a machine whose bytes are in the other order")
        storages = _Storages(available)
        content = _Machine(io.BytesIO(archive.read(pickles[0])), storages, available).run()
        for key, storage in storages.by_key.items():
            _fill(storage, archive.read(f"{prefix}data/{key}"), key)
    return content


def _fill(storage: Tensor, data: bytes, key: str) -> None:
    if len(data) < storage.nbytes:
        raise WeightsError(
            f"storage {key[:40]!r} has {len(data)} of {storage.nbytes} bytes: the file is truncated"
        )
    if storage.numel():
        storage.copy_(torch.frombuffer(bytearray(data[: storage.nbytes]), dtype=storage.dtype))
