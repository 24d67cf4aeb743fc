"""Downloads that end with the right file or with none: resumed, retried, checked, moved into place whole."""

from __future__ import annotations

import email.utils
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.message import Message
from pathlib import Path
from typing import IO, BinaryIO

Report = Callable[[int, int | None], None]
"""Is told the bytes that are there and, if known, the bytes of the whole file."""
Notice = Callable[[str], None]
"""Is told what a person should know: that another try follows, that another process is waited for."""

_CHUNK = 1 << 20
# So many bytes between two failures, and the line is taken to work: failures are counted anew.
_PROGRESS = 1 << 20
_LONGEST_PAUSE = 120.0
_WORTH_ANOTHER_TRY = {408, 425, 429, 500, 502, 503, 504}


class DownloadError(OSError):
    """A file that could not be fetched, with the reason and what to do."""


class _StartAgainError(Exception):
    """What the server sends does not go on from what is there."""


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirections, but not from an encrypted address to one that is not."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """The request that follows, see the base class."""
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise DownloadError(f"{req.full_url} leads to {newurl}, which is not encrypted; refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(
    url: str,
    target: str | Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    check: Callable[[Path], None] | None = None,
    report: Report | None = None,
    notice: Notice | None = None,
    attempts: int = 5,
    pause: float = 1.0,
    timeout: float = 30.0,
) -> str:
    """Fetches ``url`` into the file ``target``, which is replaced if it exists.

    The bytes go to a partial file beside it. If its hash is known, it survives an interruption, and the next
    call goes on from there. Processes that fetch one target wait for each other, and the later ones take the
    file that the first has fetched.

    Args:
        url: an http or https address.
        target: the file to make; its folder is made too.
        sha256: what its SHA-256 must be, 64 hexadecimal digits, where it is known.
        size: its size where it is known [bytes].
        check: is given the complete partial file, and raises ValueError if it must not be taken.
        report: see :data:`Report`.
        notice: see :data:`Notice`.
        attempts: tries in a row without progress before it is given up.
        pause: before the second try; doubles with each further one [s]. A server that asks for a longer one
            gets it.
        timeout: how long the server may stay silent [s].

    Returns:
        The file's SHA-256.

    Raises:
        DownloadError: if it cannot be fetched or written, or is not the file that was expected.
        ValueError: from ``check``.
    """
    target = Path(target)
    before = _identity(target)
    with _partial_file(target, sha256 is not None, notice or _say_nothing) as (part, stream):
        if _identity(target) not in (before, None):
            # Another process has fetched it while this one waited.
            with target.open("rb") as finished:
                digest = hashlib.file_digest(finished, "sha256").hexdigest()
            if sha256 in (None, digest):
                return digest
        transfer = _Transfer(url, target.parent, stream, size, timeout, report, notice or _say_nothing)
        if sha256 is None:
            transfer.start_again()
        elif transfer.take_up():
            # Whatever was left there may be of another file; then a second try begins at nothing.
            transfer.run(attempts, pause)
            if transfer.sha256() != sha256:
                transfer.notice("what was left of an earlier download is of no use; starting again")
                transfer.start_again()
        if not transfer.complete:
            transfer.run(attempts, pause)
        digest = transfer.sha256()
        if sha256 not in (None, digest):
            part.unlink()
            raise DownloadError(
                f"{url} is not the file that was expected: its SHA-256 is {digest}, and should be {sha256}. "
                "Nothing was kept of it"
            )
        if check is not None:
            try:
                check(part)
            except ValueError:
                part.unlink()
                raise
        os.fsync(stream.fileno())
        part.replace(target)
    return digest


def _say_nothing(text: str) -> None:
    """Where nobody wants to know."""


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from one that replaces it; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


@contextmanager
def _partial_file(target: Path, keep: bool, notice: Notice) -> Iterator[tuple[Path, BinaryIO]]:
    """The partial file of ``target``, open and locked: no other process has it.

    What is left in it at the end stays for the next call if ``keep``.
    """
    part = target.parent / f".partial-{target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stream = _locked(part, notice)
    except OSError as error:
        raise _cannot_write(target.parent, error) from error
    with stream:
        try:
            yield part, stream
        finally:
            if _same_file(part, stream) and not (keep and os.fstat(stream.fileno()).st_size):
                part.unlink()


def _locked(part: Path, notice: Notice) -> BinaryIO:
    while True:
        stream = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                notice(f"another process is fetching {part.name.removeprefix('.partial-')}; waiting for it")
                fcntl.flock(stream, fcntl.LOCK_EX)
            # The process before may have moved the file to its place, and this would be a lock on that.
            if _same_file(part, stream):
                return stream
        except BaseException:
            stream.close()
            raise
        stream.close()


def _same_file(part: Path, stream: BinaryIO) -> bool:
    try:
        return os.path.samestat(part.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _cannot_write(folder: Path, error: OSError) -> DownloadError:
    return DownloadError(
        f"cannot write in {folder}: {error.strerror or error}. Make room or set NAVAGENT_CACHE to another "
        "folder; nothing half-written was left"
    )


class _Transfer:
    """One file on its way from an address to an open partial file."""

    def __init__(
        self,
        url: str,
        folder: Path,
        stream: BinaryIO,
        size: int | None,
        timeout: float,
        report: Report | None,
        notice: Notice,
    ) -> None:
        self.complete = False
        self.notice = notice
        self._url = url
        self._folder = folder
        self._stream = stream
        self._size = size
        self._timeout = timeout
        self._report = report
        self._done = 0
        self._total = size
        self._digest = hashlib.sha256()
        self._version: str | None = None
        self._open = urllib.request.build_opener(_HttpsOnly).open

    def sha256(self) -> str:
        """SHA-256 of what is there, 64 hexadecimal digits."""
        return self._digest.hexdigest()

    def start_again(self) -> None:
        """Drops what is there."""
        if os.fstat(self._stream.fileno()).st_size:
            self._stream.truncate(0)
        self._stream.seek(0)
        self._done = 0
        self._digest = hashlib.sha256()
        self.complete = False

    def take_up(self) -> bool:
        """Goes on from what an earlier call has left; whether that is anything."""
        self._stream.seek(0)
        while chunk := self._stream.read(_CHUNK):
            self._digest.update(chunk)
            self._done += len(chunk)
        return self._done > 0

    def run(self, attempts: int, pause: float) -> None:
        """Receives what is missing, with as many tries as it takes."""
        failures = 0
        while not self.complete:
            before = self._done
            try:
                self._receive()
            except _StartAgainError:
                self.start_again()
                failures, wait = failures + 1, 0.0
                reason = "the server cannot go on from the middle of the file"
            except DownloadError:
                raise
            except (OSError, http.client.HTTPException) as error:
                failures = 1 if self._done - before >= _PROGRESS else failures + 1
                wait = max(pause * 2 ** (failures - 1), _asked_pause(error))
                reason = self._reason(error)
            else:
                continue
            if failures >= attempts or wait > _LONGEST_PAUSE:
                where = f" after {self._done} of {self._total} bytes" if self._done and self._total else ""
                raise DownloadError(f"{self._url}: {reason}{where}; gave up after {failures} tries")
            self.notice(f"{reason}; trying again in {wait:.0f} s")
            time.sleep(wait)

    def _reason(self, error: Exception) -> str:
        """Why a try failed.

        Raises:
            DownloadError: if another try would fail too.
        """
        if isinstance(error, urllib.error.HTTPError):
            if error.code not in _WORTH_ANOTHER_TRY:
                hint = {
                    401: "; it may ask for a login or for consent to a licence: open it in a browser",
                    403: "; it may ask for a login or for consent to a licence: open it in a browser",
                    404: "; it may have moved: look at its page",
                }.get(error.code, "")
                raise DownloadError(f"{self._url}: HTTP status {error.code} {error.reason}{hint}") from error
            return f"HTTP status {error.code} {error.reason}"
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"{self._url}: {cause.verify_message}; behind a proxy with a certificate of its own, name it "
                "in SSL_CERT_FILE"
            ) from error
        return str(cause) or type(cause).__name__

    def _receive(self) -> None:
        """One try: asks for what is missing, and writes it as it comes."""
        request = urllib.request.Request(
            self._url, headers={"User-Agent": "navagent", "Accept-Encoding": "identity"}
        )
        if self._done:
            request.add_header("Range", f"bytes={self._done}-")
            if self._version:
                request.add_header("If-Range", self._version)
        try:
            response = self._open(request, timeout=self._timeout)
        except urllib.error.HTTPError as error:
            if error.code == 416 and self._done:
                # There is nothing after the last byte; or what is here is longer than the file.
                self.complete = _range(error.headers) == (None, self._done)
                if not self.complete:
                    raise _StartAgainError from None
                return
            raise
        with response:
            if response.status == 206:
                start, self._total = _range(response.headers)
                if start != self._done:
                    raise _StartAgainError
            else:
                self.start_again()
                length = response.headers.get("Content-Length", "")
                self._total = int(length) if length.isdecimal() else None
            self._version = _version(response.headers)
            self._expect()
            while chunk := response.read(_CHUNK):
                self._write(chunk)
        if self._total is not None and self._done < self._total:
            raise ConnectionError(f"the connection was lost at {self._done} of {self._total} bytes")
        self.complete = True

    def _expect(self) -> None:
        """Compares what the server announces with what is known, and with the room on the disk."""
        if self._size is not None and self._total not in (None, self._size):
            raise DownloadError(f"{self._url} has {self._total} bytes; {self._size} were expected")
        self._total = self._total or self._size
        free = shutil.disk_usage(self._folder).free
        if self._total is not None and self._total - self._done > free:
            self.start_again()
            raise DownloadError(
                f"no room in {self._folder}: {self._url} has {self._total} bytes, and {free} are free. Make "
                "room or set NAVAGENT_CACHE to another folder"
            )
        if self._report is not None:
            self._report(self._done, self._total)

    def _write(self, chunk: bytes) -> None:
        if self._total is not None and self._done + len(chunk) > self._total:
            self.start_again()
            raise DownloadError(f"{self._url} sends more than the {self._total} bytes that it should have")
        left = memoryview(chunk)
        try:
            while left:
                left = left[self._stream.write(left) :]
        except OSError as error:
            self.start_again()
            raise _cannot_write(self._folder, error) from error
        self._digest.update(chunk)
        self._done += len(chunk)
        if self._report is not None:
            self._report(self._done, self._total)


def _range(headers: Message) -> tuple[int | None, int | None]:
    """First byte and size of the whole file in a Content-Range header, each None where it does not say."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers.get("Content-Range", "").strip())
    if match is None:
        return None, None
    start, total = match.groups()
    return (None if start is None else int(start)), (int(total) if total.isdecimal() else None)


def _version(headers: Message) -> str | None:
    """What names this version of the file to the server, so that it never sends the rest of another."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified")


def _asked_pause(error: Exception) -> float:
    """How long the server asks to wait [s], in seconds or by a date."""
    asked = error.headers.get("Retry-After", "") if isinstance(error, urllib.error.HTTPError) else ""
    if asked.isdecimal():
        return float(asked)
    try:
        return (email.utils.parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return 0.0
