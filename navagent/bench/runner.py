"""Takes learners by turns through the same work, each in a process of its own.

In a round every learner does one update (a rollout and what is learned of it) while all others wait, so that
whatever else the machine is doing hits all alike.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from navagent.build import Split
from navagent.config import TrainConfig
from navagent.learning.crew import end_with_parent


@dataclass(frozen=True)
class Entry:
    """One learner with one network and number of agents."""

    contestant: str
    """Its name in :data:`navagent.bench.contestants.CONTESTANTS`."""
    label: str
    """What it is called in tables; several entries of one learner may differ in settings."""
    network: str
    """The network's name."""
    config: TrainConfig
    """All settings, the number of agents and steps included."""

    @property
    def frames(self) -> int:
        """Frames of one update."""
        return self.config.algorithm.num_envs * self.config.algorithm.num_steps


@dataclass
class Measurement:
    """What was measured of one entry."""

    contestant: str
    label: str
    network: str
    agents: int
    steps: int
    frames: int
    """Frames of one update."""
    seconds: list[float] = field(default_factory=list)
    """Of each update."""
    stages: list[dict[str, float]] = field(default_factory=list)
    """Seconds of each update by stage; the rest is none of them."""
    parameters: int = 0
    """That learn."""
    peak_bytes: int = 0
    """Most memory that the process had at once."""
    peak_gpu_bytes: int = 0
    """Most memory that its tensors had at once on a GPU; 0 without."""
    problem: str | None = None
    """Why it was not measured; None if it was."""
    broken: bool = False
    """Whether that is a fault, and not for lack of such a network."""


class _Process:
    """One learner in a process of its own."""

    def __init__(self, entry: Entry, split: Split) -> None:
        algorithm = entry.config.algorithm
        self.result = Measurement(
            entry.contestant,
            entry.label,
            entry.network,
            algorithm.num_envs,
            algorithm.num_steps,
            entry.frames,
        )
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(entry, split, other), daemon=True)
        self.process.start()
        other.close()

    def receive(self) -> bool:
        """Waits until it asks for its next turn; False if it failed instead."""
        try:
            kind, *message = self.connection.recv()
            while kind == "warning":
                # Whoever shows warnings shows each once, whoever it came from.
                warnings.warn(message[0], stacklevel=2)
                kind, *message = self.connection.recv()
        except EOFError:
            self.process.join()
            self._failed(
                f"its process ended with status {self.process.exitcode}, perhaps for want of memory", True
            )
            return False
        if kind == "turn":
            seconds, stages, self.result.parameters = message
            self.result.seconds.append(seconds)
            self.result.stages.append(stages)
            return True
        if kind == "memory":
            self.result.peak_bytes, self.result.peak_gpu_bytes = message
            return True
        self._failed(message[0], kind == "error")
        return False

    def _failed(self, problem: str, broken: bool) -> None:
        self.result.problem, self.result.broken = problem, broken

    def go(self) -> None:
        """Gives it a turn."""
        self.connection.send(True)

    def end(self) -> None:
        """Lets it end by itself and tell how much memory it took."""
        if self.result.problem is None:
            self.connection.send(False)
            self.receive()
            self.process.join()

    def kill(self) -> None:
        """Ends it at once, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def measure(
    entries: Sequence[Entry],
    split: Split,
    updates: int,
    warm_up: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Measurement]:
    """Measures entries side by side.

    Args:
        entries: the learners; each gets a process of its own, all of them at the same time.
        split: the episodes they play.
        updates: how many updates of each are measured.
        warm_up: how many come before that do not count.
        progress: called with the label of each entry before it begins to start, and before each turn.
    """
    processes: list[_Process] = []
    try:
        for entry in entries:
            progress(entry.label)
            processes.append(_Process(entry, split))
        going = [process for process in processes if process.receive()]
        for _ in range(warm_up + updates):
            for process in list(going):
                progress(process.result.label)
                process.go()
                if not process.receive():
                    going.remove(process)
        for process in processes:
            process.end()
    finally:
        for process in processes:
            process.kill()
    for process in processes:
        # What was reported before the first turn is no update.
        del process.result.seconds[: 1 + warm_up], process.result.stages[: 1 + warm_up]
    return [process.result for process in processes]


def _work(entry: Entry, split: Split, connection: Connection) -> None:
    """A learner's process: trains, and asks for its turns through the pipe."""
    # Ctrl-C reaches every process of a terminal; the first one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch

    from navagent.bench.contestants import CONTESTANTS, CannotTakePartError

    def warn(message: Warning | str, *_: object, **__: object) -> None:
        connection.send(("warning", str(message)))

    warnings.showwarning = warn
    begun = time.perf_counter()

    def turn(stages: dict[str, float], parameters: int) -> bool:
        nonlocal begun
        connection.send(("turn", time.perf_counter() - begun, stages, parameters))
        answer = bool(connection.recv())
        begun = time.perf_counter()
        return answer

    try:
        CONTESTANTS[entry.contestant].train(entry.config, split, turn)
    except CannotTakePartError as error:
        connection.send(("cannot", str(error)))
    except Exception:
        connection.send(("error", traceback.format_exc()))
    else:
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
        connection.send(("memory", peak_bytes(), gpu))


def peak_bytes() -> int:
    """Most memory that this process has had at once."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Unlike getrusage, this does not remember the process that started it.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
