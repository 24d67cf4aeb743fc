"""Processes that carry out many trainings, or one that does so alone."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol, TypeVar

import torch

JobT = TypeVar("JobT")
OutcomeT = TypeVar("OutcomeT")
JobT_contra = TypeVar("JobT_contra", contravariant=True)
OutcomeT_co = TypeVar("OutcomeT_co", covariant=True)

SAVING_SECONDS = 8.0
"""So long may a job take to save itself when the crew is sent home."""


class Bench(Protocol[JobT_contra, OutcomeT_co]):
    """Where jobs are done; it keeps what they have in common."""

    def run(self, job: JobT_contra, /) -> OutcomeT_co:
        """Does a job."""


class Crew(Protocol[JobT_contra, OutcomeT_co]):
    """Whoever does the jobs."""

    def submit(self, job: JobT_contra, /) -> None:
        """Gives a job."""

    def result(self) -> OutcomeT_co:
        """Waits for the next that is done."""


class _Alone(Crew[JobT, OutcomeT]):
    """Does jobs in this process."""

    def __init__(self, make_bench: Callable[[], Bench[JobT, OutcomeT]]) -> None:
        self._bench = make_bench()
        self._jobs: deque[JobT] = deque()

    def submit(self, job: JobT, /) -> None:
        """See :class:`Crew`."""
        self._jobs.append(job)

    def result(self) -> OutcomeT:
        """See :class:`Crew`."""
        return self._bench.run(self._jobs.popleft())


class _Processes(Crew[JobT, OutcomeT]):
    """Does jobs in processes of their own, each with a single thread."""

    def __init__(self, make_bench: Callable[[], Bench[JobT, OutcomeT]], count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._jobs: multiprocessing.Queue[JobT] = context.Queue()  # type: ignore[assignment]
        self._results: multiprocessing.Queue[OutcomeT | str] = context.Queue()  # type: ignore[assignment]
        self._workers: list[SpawnProcess] = [
            context.Process(target=_work, args=(make_bench, self._jobs, self._results), daemon=True)
            for _ in range(count)
        ]
        for worker in self._workers:
            worker.start()

    def submit(self, job: JobT, /) -> None:
        """See :class:`Crew`."""
        self._jobs.put(job)

    def result(self) -> OutcomeT:
        """See :class:`Crew`."""
        while True:
            try:
                answer = self._results.get(timeout=1.0)
            except queue.Empty:
                for worker in self._workers:
                    if worker.exitcode is not None:
                        raise RuntimeError(
                            f"a worker ended with status {worker.exitcode}, perhaps for want of memory; the "
                            "same command goes on, best with fewer workers"
                        ) from None
                continue
            if isinstance(answer, str):
                raise RuntimeError(f"a training failed:\n{answer}")
            return answer

    def close(self) -> None:
        """Ends the processes; what they have not finished is lost, but for what a job itself saves."""
        for worker in self._workers:
            worker.terminate()
        until = time.monotonic() + SAVING_SECONDS
        for worker in self._workers:
            worker.join(max(0.0, until - time.monotonic()))
            worker.kill()
            worker.join()


def _work(
    make_bench: Callable[[], Bench[Any, Any]],
    jobs: multiprocessing.Queue[Any],
    results: multiprocessing.Queue[Any],
) -> None:
    # Ctrl-C reaches every process of a terminal; the first one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    bench = make_bench()
    while True:
        try:
            results.put(bench.run(jobs.get()))
        except KeyboardInterrupt:
            # A job that takes signals itself has stopped by Ctrl-C, and saved what it had.
            return
        except Exception:
            results.put(traceback.format_exc())


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def crew(make_bench: Callable[[], Bench[JobT, OutcomeT]], count: int) -> Iterator[Crew[JobT, OutcomeT]]:
    """Processes that do jobs, as long as the block lasts; for a count of 1, this one.

    Args:
        make_bench: called in each process; it must survive being sent there, as a function of a module does.
        count: how many processes.

    Raises:
        RuntimeError: from :meth:`Crew.result`, if a training failed or a process ended.
    """
    if count == 1:
        yield _Alone(make_bench)
        return
    processes = _Processes(make_bench, count)
    try:
        yield processes
    finally:
        processes.close()
