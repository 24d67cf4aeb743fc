"""Signals that ask a training to stop: Ctrl-C, SIGTERM and SIGUSR1.

Clusters give a process some 30 seconds between the first signal and the last. What may be dropped (loading
scenes, an evaluation, drawing the report) is dropped at once. An update comes to its end if it does so soon.
For anything that takes longer, a thread of its own keeps the time, since Python sees a signal only between
two of its instructions, and a single call into a library can take minutes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

REQUEUE_STATUS = 75
"""Exit status after SIGUSR1: the job should be queued again, to go on where it stopped. 75 is EX_TEMPFAIL of
``sysexits.h``, a failure that passes. SLURM queues a job again where its script calls ``scontrol requeue`` on
this status, or where ``RequeueExit`` of ``slurm.conf`` lists it."""

PATIENCE_SECONDS = 5.0
"""So long after SIGTERM or SIGUSR1 the update in progress may still come to its end."""

GRACE_SECONDS = 10.0
"""So long the program may take to stop by itself; then the process is ended, saved as far as it can be."""

LAST_SECONDS = 17.0
"""So long it may take where nothing can be saved from outside, because updates had been short so far."""

URGENT = (signal.SIGTERM, signal.SIGUSR1)
"""Signals after which a process has seconds to live; a person who presses Ctrl-C waits."""


class Stopped(SystemExit):
    """Raised where SIGTERM or SIGUSR1 ends the work in hand; carries the exit status."""


class StopSignals:
    """While entered, takes SIGINT, SIGTERM and SIGUSR1 and ends the program as each of them asks.

    A signal raises :class:`Stopped`, or KeyboardInterrupt after Ctrl-C, wherever the program is; inside of
    :meth:`deferred` it is only noted, and the program looks at :attr:`number` when it can stop. A second
    Ctrl-C always raises KeyboardInterrupt. Outside of the main thread, where Python takes no signals, it does
    nothing.

    Example::

        with StopSignals(print) as stop:
            load()
            with stop.deferred():
                while stop.number is None:
                    update()
            save()
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """``say`` tells the user what happens, on another thread."""
        self._say = say
        self.number: int | None = None
        """The first signal that came; None while none has."""
        self.saving = threading.Lock()
        """Held while a checkpoint is written, so that the process is not ended meanwhile."""
        self.last_resort: Callable[[], bool] | None = None
        """Saves, from another thread, what :attr:`GRACE_SECONDS` were not enough for, and says whether all is
        safe now. None where nothing needs to be saved."""
        self._asked_at: float | None = None
        self._deferred = False
        self._over = threading.Event()
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe, written = os.pipe()
        os.set_blocking(written, False)
        # Written by the signal itself, even while the main thread is inside of a library.
        self._written, self._fd_before = written, signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
        self._watcher.start()
        for number in (signal.SIGINT, *URGENT):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._before:
            return
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._written, b"\0")
        self._watcher.join()
        os.close(self._pipe)
        os.close(self._written)

    @property
    def status(self) -> int:
        """The exit status that the first signal asks for, as shells have it."""
        if self.number == signal.SIGUSR1:
            return REQUEUE_STATUS
        return 128 + (self.number or 0)

    @property
    def pressing(self) -> bool:
        """Whether a signal came so long ago that the work in hand must be dropped."""
        return self._asked_at is not None and time.monotonic() - self._asked_at >= PATIENCE_SECONDS

    def error(self) -> BaseException:
        """What ends the program as the first signal asks: KeyboardInterrupt, or Stopped."""
        return KeyboardInterrupt() if self.number == signal.SIGINT else Stopped(self.status)

    def ask(self, number: int) -> None:
        """Notes a signal; one that came to another process of this training may be handed on here."""
        if self.number is None:
            self.number = number
        if number in URGENT and self._asked_at is None:
            self._asked_at = time.monotonic()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In this block signals are only noted."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """In this block, within a deferred one, signals raise again; one that was noted before does too."""
        before, self._deferred = self._deferred, False
        try:
            if self.number is not None:
                raise self.error()
            yield
        finally:
            self._deferred = before

    def _take(self, number: int, frame: FrameType | None) -> None:
        again = self.number is not None
        self.ask(number)
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt
        if not self._deferred:
            raise self.error()

    def _watch(self) -> None:
        """Tells that a signal came, and keeps its time."""
        while True:
            for number in os.read(self._pipe, 64):
                if number == 0:
                    return
                # Said here: a handler that printed while the main thread prints would raise.
                if number == signal.SIGINT and self._deferred:
                    self._tell("stopping after this update, then saving; Ctrl-C again stops at once")
                elif number in URGENT:
                    self._tell(f"{signal.Signals(number).name}: saving and stopping")
                    self.ask(number)
                    self._end_in_time()
                    return

    def _tell(self, text: str) -> None:
        # With a full disk behind standard output, stopping is still what counts.
        with contextlib.suppress(OSError, ValueError):
            self._say(text)

    def _end_in_time(self) -> None:
        if self._over.wait(GRACE_SECONDS):
            return
        with self.saving:
            if self._over.is_set():
                return
            safe = True
            if self.last_resort is not None:
                try:
                    safe = self.last_resort()
                except Exception:
                    # A disk that is full: the checkpoint before is still there.
                    traceback.print_exc()
            if safe:
                self._end()
        if not self._over.wait(LAST_SECONDS - GRACE_SECONDS):
            with self.saving:
                self._end()

    def _end(self) -> None:
        # Not through Python's streams: the main thread may hold them.
        with contextlib.suppress(OSError):
            os.write(2, b"navagent: ended in the middle of what it was doing; all that is saved is whole\n")
        os._exit(self.status)
