"""Worker processes: started, asked, listened to, and started again when they die."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from envs.simulators.base import SensorSpec, SimulatorError
from envs.simulators.workers import child

PATIENCE = 600.0
"""Seconds after which a worker that does not answer is taken for dead; large scenes take minutes to load."""
START_PATIENCE = 600.0
"""The same of one that starts."""
SAME_REQUEST = 3
"""A request at which workers died so often in a row is not made again."""
_ENDING_SECONDS = 5.0
"""How long a process may take to end after it has closed its connection."""


class WorkerDiedWarning(RuntimeWarning):
    """A worker process died, and another one took its place."""


@dataclass(frozen=True)
class Body:
    """What the workers are: see :mod:`envs.simulators.workers.child`."""

    name: str
    """How messages call it."""
    file: Path
    """The Python file that makes it."""
    factory: str
    """Name of the callable in that file, which gets the settings."""
    settings: Sequence[Mapping[str, Any]]
    """Settings of each worker, as JSON can hold them; there are as many workers."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the workers that are not set otherwise."""
    python: str | None = None
    """The Python that runs them; the one that runs this if None."""
    advice: str = ""
    """What to do where they do not start, or die too often."""
    hidden: Sequence[str] = ()
    """Modules that the workers can do without, and would load if they found them."""
    grumbles: Sequence[str] = ()
    """What is in lines that mean nothing, and are left out of a worker's last words."""


@dataclass
class _Worker:
    """One process and what is between it and us."""

    number: int
    process: subprocess.Popen[bytes]
    connection: socket.socket
    said: int
    """Descriptor of the file that its standard output and error go to."""
    scenes: bytes = b"{}"
    """The message that told it last which scenes there are."""
    pending: dict[int, bytes] = field(default_factory=dict)
    """Messages that it has not answered, by the number of the request, oldest first."""
    answers: dict[int, bytes] = field(default_factory=dict)
    """Answers that nobody took yet, by the number of the request."""
    refusals: dict[int, str] = field(default_factory=dict)
    """Reasons of requests that were refused."""
    received: bytearray = field(default_factory=bytearray)
    """The beginning of an answer that is still coming."""
    deaths: int = 0
    """How often it died since its last answer."""
    silence: float = 0.0
    """Seconds without an answer after which it was killed here; 0 if it was not."""


class WorkerPool:
    """Processes that draw and answer, and the memory that they draw into.

    A worker that dies is reported by a :class:`WorkerDiedWarning` in its own words, started again, and asked
    again what it had not answered: whoever waits for the answer only waits longer.

    Args:
        body: What the workers are.
        sensors: What they draw.
        num_agents: For how many agents.
        max_restarts: How many deaths are made good before one is an error.

    Raises:
        SimulatorError: The workers do not start.
    """

    def __init__(
        self, body: Body, sensors: Sequence[SensorSpec], num_agents: int, max_restarts: int = 10
    ) -> None:
        self.body = body
        self.max_restarts = max_restarts
        self.restarts = 0
        """Deaths that were made good."""
        self._died: list[int] = []
        self._sensors = [asdict(sensor) for sensor in sensors]
        self._num_agents = num_agents
        _, length = child.layout(self._sensors, num_agents)
        self._memory = _nameless_file("navagent-images")
        os.ftruncate(self._memory, length)
        self.images: dict[str, np.ndarray] = child.images(
            mmap.mmap(self._memory, length), self._sensors, num_agents
        )
        """What was drawn last for each agent, by sensor: (num_agents, height, width) or with channels."""
        self._requests = 0
        self._workers: list[_Worker] = []
        self._closed = False
        try:
            for number in range(len(body.settings)):
                self._workers.append(self._start(number))
            for worker in self._workers:
                if not self._ready(worker):
                    raise SimulatorError(f"{self._obituary(worker)}{self._advice()}")
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def process_ids(self) -> list[int]:
        """Of the workers as they are now."""
        return [worker.process.pid for worker in self._workers]

    def take_deaths(self) -> list[int]:
        """Numbers of the workers that died and were started again since this was last asked."""
        died, self._died = self._died, []
        return died

    def set_scenes(self, files: Mapping[int, Path]) -> None:
        """Tells all workers which scenes there are, by number; each loads one when it needs it."""
        payload = json.dumps({str(number): str(path) for number, path in files.items()}).encode()
        sent = []
        for worker in self._workers:
            worker.scenes = payload
            sent.append((worker.number, self.send(worker.number, child.SCENES, payload)))
        self.wait(sent)

    def send(self, number: int, kind: int, payload: bytes) -> int:
        """Makes a request of a worker and returns the request's number."""
        if self._closed:
            raise SimulatorError(f"{self.body.name}: the workers have been closed")
        worker = self._workers[number]
        self._requests += 1
        message = child.HEADER.pack(kind, self._requests, len(payload)) + payload
        worker.pending[self._requests] = message
        try:
            worker.connection.sendall(message)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is dead; who waits for the answer finds that out
        except BaseException:
            # Who was interrupted here may have sent a part of it.
            _end(worker)
            raise
        return self._requests

    def wait(self, requests: Iterable[tuple[int, int]]) -> list[bytes]:
        """The answers to requests, each given by its worker's number and its own, in their order.

        Raises:
            SimulatorError: a request was refused, or too many workers have died.
        """
        wanted = list(requests)
        try:
            for number, request in wanted:
                self._listen(self._workers[number], request)
        except BaseException:
            # Who waited was interrupted, and an answer may have come in part: others will give it whole.
            for worker in self._workers:
                if worker.pending:
                    _end(worker)
            raise
        for number, request in wanted:
            if request in (refusals := self._workers[number].refusals):
                raise SimulatorError(f"{self.body.name}: {refusals.pop(request)}")
        return [self._workers[number].answers.pop(request) for number, request in wanted]

    def close(self) -> None:
        """Ends all processes; calling it twice is harmless."""
        if self._closed:
            return
        self._closed = True
        for worker in self._workers:
            _end(worker)
            worker.connection.close()
            os.close(worker.said)
        os.close(self._memory)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self.close()

    # Processes ------------------------------------------------------------------------------------------

    def _start(self, number: int) -> _Worker:
        body = self.body
        ours, theirs = socket.socketpair()
        said = _nameless_file("navagent-worker-output")
        environment = {**body.environment, **os.environ}
        if body.python is None:
            # Where this process looks for packages, however it was started.
            environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        else:
            # Those of another Python are not for this one.
            environment.pop("PYTHONPATH", None)
        given = {
            "socket": theirs.fileno(),
            "memory": self._memory,
            "sensors": self._sensors,
            "num_agents": self._num_agents,
            "body": [str(body.file), body.factory],
            "settings": dict(body.settings[number]),
            "hidden": list(body.hidden),
        }
        try:
            process = subprocess.Popen(
                [body.python or sys.executable, "-X", "faulthandler", child.__file__, json.dumps(given)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=(theirs.fileno(), self._memory),
            )
        except OSError as error:
            raise SimulatorError(
                f"{body.name}: {body.python or sys.executable} does not start: {error.strerror or error}"
            ) from None
        finally:
            theirs.close()
        return _Worker(number, process, ours, said, pending={0: b""})

    def _ready(self, worker: _Worker) -> bool:
        """Waits until a new worker says that it works; False where it died before."""
        while 0 in worker.pending:
            if not self._receive(worker, START_PATIENCE):
                return False
        del worker.answers[0]
        return True

    def _listen(self, worker: _Worker, request: int) -> None:
        """Waits until a request is answered, by whichever process that takes."""
        while request in worker.pending:
            if worker.process.returncode is not None:
                # It was ended here, while somebody else waited.
                self._replace(worker)
            elif not self._receive(worker, PATIENCE):
                worker.deaths += 1
                self._replace(worker, self._obituary(worker))

    def _replace(self, worker: _Worker, death: str = "") -> None:
        """Starts a worker again after its death, or after it was ended here, and asks it again."""
        while True:
            if death:
                self._account_for(worker, death)
            fresh = self._start(worker.number)
            worker.connection.close()
            os.close(worker.said)
            worker.process, worker.connection, worker.said = fresh.process, fresh.connection, fresh.said
            worker.silence = 0.0
            worker.received.clear()
            unanswered = worker.pending
            worker.pending = {0: b""}
            try:
                alive = self._ready(worker)
            finally:
                worker.pending = unanswered
            if alive:
                break
            worker.deaths += 1
            death = self._obituary(worker)
        scenes = child.HEADER.pack(child.SCENES, 0, len(worker.scenes)) + worker.scenes
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for message in [scenes, *unanswered.values()]:
                worker.connection.sendall(message)

    def _account_for(self, worker: _Worker, death: str) -> None:
        """Counts a death and reports it; raises where it was one too many."""
        too_many = ""
        if worker.deaths >= SAME_REQUEST:
            too_many = f"it died {worker.deaths} times in a row without an answer"
        elif self.restarts >= self.max_restarts:
            too_many = f"that was done {self.restarts} times, as often as is allowed"
        if too_many:
            self.close()
            raise SimulatorError(f"{death}. It is not started again: {too_many}{self._advice()}")
        self.restarts += 1
        self._died.append(worker.number)
        warnings.warn(
            f"{death}. Started again ({self.restarts} of at most {self.max_restarts} times); its agents' "
            "episodes begin again",
            WorkerDiedWarning,
            stacklevel=2,
        )

    def _receive(self, worker: _Worker, patience: float) -> bool:
        """Takes what a worker has sent, at least one answer; False where it is dead."""
        poll = select.poll()
        poll.register(worker.connection, select.POLLIN)
        while not self._parse(worker):
            if not poll.poll(1000 * patience):
                worker.silence = patience
                worker.process.kill()
                return False
            try:
                data = worker.connection.recv(1 << 20)
            except ConnectionResetError:
                return False
            if not data:
                return False
            worker.received += data
        return True

    def _parse(self, worker: _Worker) -> bool:
        """Sorts whole answers out of what was received; whether there was one."""
        found, received, begin = False, worker.received, 0
        while len(received) - begin >= child.HEADER.size:
            kind, number, length = child.HEADER.unpack_from(received, begin)
            end = begin + child.HEADER.size + length
            if len(received) < end:
                break
            payload = bytes(received[begin + child.HEADER.size : end])
            if worker.pending.pop(number, None) is not None:
                found = True
                worker.answers[number] = payload
                if kind == child.REFUSED:
                    worker.refusals[number] = payload.decode(errors="replace")
                if number:
                    worker.deaths = 0
            begin = end
        del received[:begin]
        return found

    def _obituary(self, worker: _Worker) -> str:
        """How a worker ended, and what it said last."""
        try:
            status = worker.process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            status = worker.process.wait()
        how = f"gave no answer for {worker.silence:g} s and was ended" if worker.silence else ending(status)
        words = last_words(worker.said, self.body.grumbles)
        told = f": {words}" if words else ", without a word"
        return f"{self.body.name} worker {worker.number} (process {worker.process.pid}) {how}{told}"

    def _advice(self) -> str:
        return f". {self.body.advice}" if self.body.advice else ""


def ending(status: int) -> str:
    """How a process ended, of its exit status as :mod:`subprocess` has it."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hints = {"SIGKILL": ", as happens where memory runs out", "SIGSEGV": ", a segmentation fault"}
    return f"was killed by {name}{hints.get(name, '')}"


def last_words(said: int, grumbles: Sequence[str] = ()) -> str:
    """The end of what a process wrote to a file descriptor; of an error in Python, where and which it was.

    Lines that hold one of ``grumbles`` are left out.
    """
    size = os.fstat(said).st_size
    text = os.pread(said, 1 << 14, max(0, size - (1 << 14))).decode(errors="replace")
    text, _, trace = text.partition("\nCurrent thread")
    place = re.search(r'File "(.+?)", line (\d+) in (\w+)', trace)
    before, traceback, raised = text.rpartition("Traceback (most recent call last):")
    if traceback:
        # Lines of the trace itself are indented.
        text = "\n".join(line for line in raised.splitlines() if not line.startswith(" ")) or before
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not any(grumble in line for grumble in grumbles)]
    if place is not None:
        lines.append(f"in {place[3]}, {place[1]}:{place[2]}")
    return " | ".join(lines[-4:])


def _end(worker: _Worker) -> None:
    """Kills a worker: it holds nothing that would have to be saved."""
    worker.process.kill()
    worker.process.wait()


def _nameless_file(purpose: str) -> int:
    """A descriptor of a file that is gone when nobody has it open any more, whoever is killed."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create(purpose)
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    # So that processes do not write over what others wrote.
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
    return file
