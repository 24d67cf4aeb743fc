"""Processes that carry out the trainings of a comparison, or one that does so alone."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from typing import Protocol

import torch

from navagent.learning.transfer import Bench, Job, Outcome, TransferConfig


class Crew(Protocol):
    """Whoever does the jobs."""

    def submit(self, job: Job) -> None:
        """Gives a job."""

    def result(self) -> Outcome:
        """Waits for the next that is done."""


class _Alone:
    """Does jobs in this process."""

    def __init__(self, config: TransferConfig) -> None:
        self._bench = Bench(config)
        self._jobs: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        """See :class:`Crew`."""
        self._jobs.append(job)

    def result(self) -> Outcome:
        """See :class:`Crew`."""
        return self._bench.run(self._jobs.popleft())


class _Processes:
    """Does jobs in processes of their own, each with a single thread."""

    def __init__(self, config: TransferConfig, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._jobs: multiprocessing.Queue[Job] = context.Queue()  # type: ignore[assignment]
        self._results: multiprocessing.Queue[Outcome | str] = context.Queue()  # type: ignore[assignment]
        self._workers: list[SpawnProcess] = [
            context.Process(target=_work, args=(config, self._jobs, self._results), daemon=True)
            for _ in range(count)
        ]
        for worker in self._workers:
            worker.start()

    def submit(self, job: Job) -> None:
        """See :class:`Crew`."""
        self._jobs.put(job)

    def result(self) -> Outcome:
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
        """Ends the processes; what they have not finished is lost."""
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.join()


def _work(
    config: TransferConfig, jobs: multiprocessing.Queue[Job], results: multiprocessing.Queue[Outcome | str]
) -> None:
    # Ctrl-C reaches every process of a terminal; the first one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    bench = Bench(config)
    while True:
        try:
            results.put(bench.run(jobs.get()))
        except Exception:
            results.put(traceback.format_exc())


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def crew(config: TransferConfig, count: int) -> Iterator[Crew]:
    """Processes that do jobs, as long as the block lasts; for a count of 1, this one.

    Raises:
        RuntimeError: from :meth:`Crew.result`, if a training failed or a process ended.
    """
    if count == 1:
        yield _Alone(config)
        return
    processes = _Processes(config, count)
    try:
        yield processes
    finally:
        processes.close()
