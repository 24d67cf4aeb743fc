"""Files: written so that a crash never leaves half of one, unpacked with a limit, kept in a cache."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The largest published episodes unpack to about 3 GB, JSON to some ten times its packed size; what asks for
# more memory is a decompression bomb.
_MOST_UNPACKED = 4 << 30
_MAX_RATIO = 100
_ALWAYS_ALLOWED = 64 << 20


def cache_dir() -> Path:
    """Where what can be made again is kept: ``$NAVAGENT_CACHE``, else ``~/.cache/navagent``."""
    return Path(os.environ.get("NAVAGENT_CACHE") or Path.home() / ".cache" / "navagent")


def read_unpacked(path: str | Path) -> bytes:
    """What a file holds, unpacked where it is a gzip file, by its contents and not its name.

    Raises:
        ValueError: it unpacks to far more than any data would.
        EOFError: it is truncated.
        zlib.error: it is damaged.
        OSError: it cannot be read, or is no sound gzip file.
    """
    with Path(path).open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        size = raw.seek(0, os.SEEK_END)
        raw.seek(0)
        limit = min(_MOST_UNPACKED, max(_MAX_RATIO * size, _ALWAYS_ALLOWED))
        with gzip.GzipFile(fileobj=raw) if packed else raw as stream:
            data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"its {size} bytes unpack to more than {limit}, as no sound file's do")
    return data


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` and moves it into place if the block succeeds.

    The temporary file has the target's suffixes, so that writers which choose a format by name work. Readers
    see the old file or the whole new one, never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-", suffix="-" + path.name)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private; the finished one gets the permissions a plain open would have given.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
