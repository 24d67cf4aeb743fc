"""The catalogue of published weights: what there is, where it is, and the verified files in the cache.

Entries are data, in ``catalogue.json``. Files lie in the cache folder under the entry's name, as published.
Nothing is downloaded but by :func:`fetch`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from policies.download import DownloadError, Notice, Report, download
from policies.names import nearest

Kind = Literal["encoder", "decoder"]


class CatalogueError(ValueError):
    """Weights that are not in the catalogue, or whose file is not there or not the right one."""


@dataclass(frozen=True)
class Source:
    """Who published some of the entries, and on what terms."""

    title: str
    """What they are, in one line."""
    homepage: str
    """Where more is said about them."""
    licence: str
    """Short name of the licence."""
    licence_note: str = ""
    """What else is to know before the weights are used."""
    citations: tuple[str, ...] = ()
    """Papers to cite."""


@dataclass(frozen=True)
class Entry:
    """One file of published weights."""

    name: str
    """What selects it."""
    source: Source
    """Who published it."""
    kind: Kind
    """Whether it goes from images to features or from features to a task's output."""
    about: str
    """What it was trained for, in a few words."""
    encoders: tuple[str, ...] = ()
    """Names of the encoders that take it, see :data:`policies.encoders.ENCODERS`."""
    channels: int = 3
    """Input channels: 3 for colour, 1 for depth."""
    default: bool = False
    """Whether its encoders take it where no weights are named."""
    url: str = ""
    """Address; empty for what ships in the package."""
    shipped: str = ""
    """Path in the package ``policies``; empty for what is downloaded."""
    sha256: str | None = None
    """SHA-256 of the file, where it was published or the file was at hand."""
    git_blob: str | None = None
    """Git's SHA-1 of the file, where it was published in a repository."""
    tensors_sha256: str | None = None
    """See :func:`policies.weights.tensors_sha256`, where the file was at hand."""
    size: int | None = None
    """Size where known [bytes]."""
    note: str = ""
    """What to know about this file."""

    @property
    def path(self) -> Path:
        """Where the file lies, or would lie."""
        if self.shipped:
            return Path(__file__).parent / self.shipped
        return weights_dir() / (self.name + Path(self.url).suffix)

    @property
    def published_name(self) -> str:
        """The file's name where it was published."""
        return self.url.rpartition("/")[2] or Path(self.shipped).name


@dataclass(frozen=True)
class Fetched:
    """What :func:`fetch` found or got."""

    path: Path
    """The file, verified."""
    sha256: str
    """Its SHA-256."""
    downloaded: bool
    """Whether it had to be downloaded."""
    trusted: bool
    """Whether nothing was known to compare it with, so that its hash was recorded for later."""


def weights_dir() -> Path:
    """The folder of downloaded weights: ``weights`` in ``$NAVAGENT_CACHE``, else in ``~/.cache/navagent``."""
    return Path(os.environ.get("NAVAGENT_CACHE") or Path.home() / ".cache" / "navagent") / "weights"


def catalogue() -> dict[str, Entry]:
    """All entries by name."""
    here = Path(__file__).parent
    data = json.loads((here / "catalogue.json").read_text("utf-8"))
    sources = {name: Source(**_with_tuples(fields)) for name, fields in data["sources"].items()}
    entries = {}
    for row in data["entries"]:
        fields = {**_with_tuples(row), "source": sources[row["source"]]}
        if "shipped" in row:
            # Beside each file that ships lies its card.
            card = (here / row["shipped"]).with_suffix(".json")
            fields["sha256"] = json.loads(card.read_text("utf-8"))["sha256"]
            fields["size"] = (here / row["shipped"]).stat().st_size
        entries[row["name"]] = Entry(**fields)
    return entries


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def find_entry(name: str) -> Entry:
    """The entry of a name.

    Raises:
        CatalogueError: if there is none, with the nearest name.
    """
    entries = catalogue()
    if name not in entries:
        raise CatalogueError(
            f"there are no weights {name!r}{nearest(name, entries)} (`navagent weights list` shows all)"
        )
    return entries[name]


def default_entry(encoder: str, channels: int = 3) -> Entry | None:
    """The entry that an encoder takes where no weights are named, if there is one."""
    fitting = (
        entry
        for entry in catalogue().values()
        if entry.default and encoder in entry.encoders and entry.channels == channels
    )
    return next(fitting, None)


def catalogue_path(name: str) -> Path:
    """The file of an entry, verified.

    Raises:
        CatalogueError: if there is no such entry, or its file is not here or not the right one; says how to
            get it.
    """
    entry = find_entry(name)
    if not entry.path.is_file():
        raise CatalogueError(
            f"the weights {name!r} are not on this machine; `navagent weights fetch {name}` gets them"
        )
    problem = mismatch(entry, entry.path)
    if problem is not None:
        raise CatalogueError(f"{problem}; `navagent weights fetch {name}` sees to it")
    return entry.path


def fetch(
    name: str,
    *,
    offline: bool = False,
    report: Report | None = None,
    notice: Notice | None = None,
    pause: float = 1.0,
) -> Fetched:
    """Gets the file of an entry, from the cache or from its address.

    A file that somebody put in its place by hand is taken if it is the right one. Where no hash is known, the
    first file is trusted if it is readable, and its hash is recorded beside it for all later checks.

    Args:
        name: the entry's name.
        offline: never open a connection; also set by the environment variable ``NAVAGENT_OFFLINE``.
        report: see :data:`policies.download.Report`.
        notice: see :data:`policies.download.Notice`.
        pause: see :func:`policies.download.download`.

    Raises:
        CatalogueError: if there is no such entry, or a file is not the right one.
        DownloadError: if it cannot be downloaded or written; says how to put it in its place by hand.
    """
    entry = find_entry(name)
    path = entry.path
    if path.is_file():
        problem = mismatch(entry, path)
        if problem is None:
            return Fetched(path, _sha256(path), downloaded=False, trusted=False)
        if expected_sha256(entry) is None and entry.git_blob is None:
            _check_readable(path)
            return Fetched(path, _record(entry, _sha256(path)), downloaded=False, trusted=True)
        if entry.shipped:
            raise CatalogueError(f"{problem}; install navagent again")
        if notice is not None:
            notice(f"{problem}; fetching it again")
    if offline or os.environ.get("NAVAGENT_OFFLINE", "0") not in ("", "0"):
        raise DownloadError(f"offline, and the weights {name!r} are not on this machine. {_by_hand(entry)}")
    expected = expected_sha256(entry)
    try:
        digest = download(
            entry.url,
            path,
            sha256=expected,
            size=entry.size,
            check=lambda part: _check(entry, part),
            report=report,
            notice=notice,
            pause=pause,
        )
    except DownloadError as error:
        recorded = f" (recorded in {_record_path(entry)}; remove it to trust anew)"
        known = recorded if expected and not entry.sha256 else ""
        raise DownloadError(f"{error}{known}. {_by_hand(entry)}") from error
    if entry.sha256 is None:
        _record(entry, digest)
    return Fetched(path, digest, downloaded=True, trusted=expected is None and entry.git_blob is None)


def _by_hand(entry: Entry) -> str:
    size = f"{entry.size} bytes, " if entry.size else ""
    digest = expected_sha256(entry) or "unknown"
    return (
        f"Without a network here, get\n  {entry.url}\n  ({size}SHA-256 {digest})\n"
        f"elsewhere and put it here:\n  {entry.path}\nThen `navagent weights fetch {entry.name}` checks it"
    )


def expected_sha256(entry: Entry) -> str | None:
    """The SHA-256 that the file must have: the catalogue's, else the one recorded when it first came."""
    if entry.sha256 is not None:
        return entry.sha256
    try:
        return _record_path(entry).read_text("ascii").split()[0]
    except (FileNotFoundError, IndexError, UnicodeDecodeError):
        return None


def _record_path(entry: Entry) -> Path:
    """The record of a hash, in the format of the command ``sha256sum``."""
    return entry.path.with_name(entry.path.name + ".sha256")


def _record(entry: Entry, digest: str) -> str:
    """Notes the hash of a file beside it, for entries whose hash nobody published."""
    target = _record_path(entry)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".partial-")
    with os.fdopen(handle, "w", encoding="ascii") as stream:
        stream.write(f"{digest}  {entry.path.name}\n")
    Path(name).chmod(entry.path.stat().st_mode & 0o777)
    Path(name).replace(target)
    return digest


def mismatch(entry: Entry, path: Path) -> str | None:
    """Why a file is not that of an entry, or is not known to be; None if it is the right one."""
    expected = expected_sha256(entry)
    if expected is not None:
        digest = _sha256(path)
        origin = "in the catalogue" if entry.sha256 else f"recorded in {_record_path(entry).name}"
        return None if digest == expected else f"{path} has SHA-256 {digest}; {origin} it is {expected}"
    if entry.git_blob is not None:
        blob = _git_blob(path)
        return None if blob == entry.git_blob else f"{path} is git blob {blob}, not {entry.git_blob}"
    return f"{path} was put there by hand, and its hash is not recorded yet"


def _check(entry: Entry, part: Path) -> None:
    """What a fresh download has to pass where no SHA-256 was published.

    Raises:
        CatalogueError: if it is not the published file, or no weights file.
    """
    if entry.sha256 is not None:
        return
    if entry.git_blob is not None and _git_blob(part) != entry.git_blob:
        raise CatalogueError(
            f"{entry.url} is not the file that was published: it is git blob {_git_blob(part)}, and should "
            f"be {entry.git_blob}. Nothing was kept of it"
        )
    _check_readable(part)


def _check_readable(path: Path) -> None:
    from policies.weights import WeightsError, read_weights

    try:
        read_weights(path)
    except WeightsError as error:
        raise CatalogueError(f"this is no weights file, and was not taken: {error}") from error


def _sha256(path: Path) -> str:
    from policies.weights import sha256

    return sha256(path)


def _git_blob(path: Path) -> str:
    """The name that git gives to a file's content: SHA-1 of its size and bytes."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
