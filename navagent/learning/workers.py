"""Worker processes of Stable-Baselines3's ``SubprocVecEnv`` that end before their time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

_PATIENCE = 5.0
"""So long a worker may take to end, after its connection has or it was told to [s]."""


class WorkerLostError(RuntimeError):
    """A worker of the environment has ended; the message says which one, and how."""


@contextmanager
def watched_workers(env: VecEnv) -> Iterator[None]:
    """Where a worker of ``env`` fails in this block, ends the others too and says which one it was.

    By itself a ``SubprocVecEnv`` tells of a broken pipe, or waits for ever where its workers were forked,
    since they hold each other's pipes; and the others stay. What a worker raised, it shows itself, on
    standard error. Environments without such workers pass through as they are.

    Raises:
        WorkerLostError: a worker has failed.
    """
    pool: Any = env.unwrapped
    if not isinstance(pool, SubprocVecEnv) or pool.closed:
        yield
        return
    watch = _Watch(pool)
    watch.start()
    try:
        yield
    except (EOFError, ConnectionError) as broken:
        watch.stop()
        error = WorkerLostError(_explain(pool, watch.failed or _end(pool)))
        for note in getattr(broken, "__notes__", ()):
            error.add_note(note)
        raise error from None
    finally:
        watch.stop()


class _Watch(threading.Thread):
    """Ends all workers when one has failed: then no pipe is open any more, and who reads from one is told."""

    def __init__(self, pool: Any) -> None:
        super().__init__(name="watch over workers", daemon=True)
        self.failed: dict[int, int] = {}
        """Exit statuses of the workers that have failed, by number."""
        self._pool = pool
        self._hears, self._tells = Pipe(duplex=False)

    def stop(self) -> None:
        """Ends the watch."""
        self._tells.close()
        self.join()

    def run(self) -> None:
        """Waits until a worker has failed, or until :meth:`stop`."""
        running = {process.sentinel: process for process in self._pool.processes}
        while running:
            ready = wait([self._hears, *running])
            if self._hears in ready:
                return
            for sentinel in ready:
                process = running.pop(sentinel)
                process.join(_PATIENCE)
                if process.exitcode:
                    self.failed = _end(self._pool)
                    return


def _end(pool: Any) -> dict[int, int]:
    """Ends all workers; returns the exit statuses of those that had failed by themselves, by number."""
    wait([process.sentinel for process in pool.processes], _PATIENCE)
    failed = {number: process.exitcode for number, process in enumerate(pool.processes) if process.exitcode}
    for process in pool.processes:
        process.terminate()
    for process in pool.processes:
        process.join(_PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
    # Closing it would ask workers that are gone.
    pool.waiting, pool.closed = False, True
    return failed


def _explain(pool: Any, failed: dict[int, int]) -> str:
    count = len(pool.processes)
    ends = [f"worker {number} of {count} {_how(status)}" for number, status in failed.items()]
    return (
        f"{' and '.join(ends) or 'a worker hung up'}, and {type(pool).__name__} cannot go on without it: "
        "look for the worker's own traceback on standard error, above this one. The other workers were ended"
    )


def _how(status: int) -> str:
    if status > 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    return f"was ended by {name}" + (", as by the system when memory runs out" if name == "SIGKILL" else "")
