import multiprocessing
import os
import sys
import time
from multiprocessing import forkserver

import pytest

PRELOADED = (
    "pytest",
    "killed_training",
    "navagent.evaluation.metrics",
    "safetensors.torch",
    "torch._dynamo",  # imported by the first optimiser
    "torch.profiler",
    "torch.utils.tensorboard",
)


class Processes:
    """Starts processes in milliseconds: what they need to import was imported before they are forked."""

    def __init__(self):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            forkserver.ensure_running()
        # The first process waits until all is imported.
        self.finish(time.monotonic)

    def start(self, work, *arguments):
        process = self._context.Process(target=work, args=arguments)
        process.start()
        return process

    def finish(self, work, *arguments, status=0):
        """Does some work in a process of its own; returns how long it took [s]."""
        begun = time.monotonic()
        process = self.start(work, *arguments)
        process.join()
        assert process.exitcode == status
        return time.monotonic() - begun


@pytest.fixture(scope="session")
def processes():
    return Processes()


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """A machine that is busy with other things must not end the tests' own process after a signal."""
    from navagent import preemption

    monkeypatch.setattr(preemption, "GRACE_SECONDS", 240.0)
    monkeypatch.setattr(preemption, "LAST_SECONDS", 240.0)
