"""What runs in a worker process.

This file imports nothing of its own package and keeps to Python 3.9, since the simulator may be installed for
another Python than the one that trains. It is run as a script, with one argument: JSON of

- ``socket``, ``memory``: file descriptors of the connection and of the memory for images;
- ``sensors``: a list of dictionaries, the fields of :class:`envs.simulators.base.SensorSpec`;
- ``num_agents``: of all workers together;
- ``body``: file and name of a callable that makes the worker's body of the dictionary ``settings``;
- ``hidden``: modules that are not to be found here, though they are installed.

A body has ``open(path)``, which loads a scene and returns its world. A world has

- ``draw(position, yaw, images)``: draws what an agent sees there into ``images``, an array a sensor;
- ``ask(question, rows, **options)``: answers rows (M, k) float32 by rows (M, q) float32; the questions and
  what their rows hold are those of :data:`QUESTIONS`;
- ``close()``.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import traceback
from typing import Any

import numpy as np

HEADER = struct.Struct("<BQQ")
"""Before each message: its kind, the number of the request that it makes or answers, and its length."""

SCENES, DRAW, ASK = 1, 2, 3
"""Kinds of requests: which scenes there are; draw agents; answer questions."""
DONE, REFUSED = 4, 5
"""Kinds of answers: with what was asked for; with the reason why not."""

POSE = np.dtype([("agent", "<i4"), ("scene", "<i4"), ("position", "<f4", 3), ("yaw", "<f4")])
"""One agent to be drawn: its number, its scene's, where it is [m] and its heading [rad]."""

QUESTIONS = {
    "is_navigable": (3, 1),
    "snap": (3, 3),
    "island_radius": (3, 1),
    "distance_to_obstacle": (3, 1),
    "geodesic_distance": (6, 1),
    "path": (6, None),
    "try_step": (6, 3),
    "sample": (1, 3),
}
"""Numbers in a row of each question and of its answer: points of three coordinates each, or one number.

``path`` answers with how many corners count, and as many corners as the option ``max_points`` says;
``sample`` is asked with a seed.
"""

_TYPES = {"rgb": ("u1", 3), "depth": ("<f4", 0), "normals": ("<f4", 3), "instance": ("<i4", 0)}
_IDLE_SECONDS = 5.0
"""How often a worker that waits looks whether its parent still lives."""


def layout(sensors: list[dict[str, Any]], num_agents: int) -> tuple[dict[str, tuple[int, tuple, str]], int]:
    """Where each sensor's images lie in the shared memory: offset, shape and type; and how long that is."""
    places, offset = {}, 0
    for sensor in sensors:
        kind, channels = _TYPES[sensor["kind"]]
        shape = (num_agents, sensor["height"], sensor["width"]) + ((channels,) if channels else ())
        places[sensor["name"]] = (offset, shape, kind)
        offset += int(np.prod(shape)) * np.dtype(kind).itemsize
        offset += -offset % 64
    return places, max(offset, 1)


def images(memory: mmap.mmap, sensors: list[dict[str, Any]], num_agents: int) -> dict[str, np.ndarray]:
    """The arrays of all agents' images, (num_agents, height, width) or with channels behind."""
    places, _ = layout(sensors, num_agents)
    return {name: np.ndarray(shape, kind, memory, offset) for name, (offset, shape, kind) in places.items()}


def answer_width(question: str, options: dict[str, Any]) -> int:
    """Numbers in a row of the answer."""
    return QUESTIONS[question][1] or 1 + 3 * int(options["max_points"])


def question_payload(question: str, options: dict[str, Any], scenes: np.ndarray, rows: np.ndarray) -> bytes:
    """A request of kind :data:`ASK`: rows (M, k) about scenes (M,)."""
    head = json.dumps([question, options, len(rows)]).encode() + b"\n"
    return head + scenes.astype("<i4").tobytes() + rows.astype("<f4").tobytes()


def read_question(payload: bytes) -> tuple[str, dict[str, Any], np.ndarray, np.ndarray]:
    """What :func:`question_payload` was given."""
    head, _, body = payload.partition(b"\n")
    question, options, count = json.loads(head)
    scenes = np.frombuffer(body, "<i4", count)
    return question, options, scenes, np.frombuffer(body, "<f4", offset=4 * count).reshape(count, -1)


class Child:
    """The worker's side of the connection."""

    def __init__(self, given: dict[str, Any], body: Any) -> None:
        self.body = body
        self.connection = socket.socket(fileno=given["socket"])
        _, length = layout(given["sensors"], given["num_agents"])
        self.images = images(mmap.mmap(given["memory"], length), given["sensors"], given["num_agents"])
        self.files: dict[int, str] = {}
        self.worlds: dict[int, Any] = {}
        # Poses that are still to be drawn, and after the last of a request its number.
        self.backlog: collections.deque = collections.deque()

    def serve(self) -> None:
        """Answers requests until the parent goes. Questions come before what is still to be drawn."""
        parent, poll = os.getppid(), select.poll()
        poll.register(self.connection, select.POLLIN)
        self.answer(DONE, 0)
        while True:
            if poll.poll(0 if self.backlog else 1000 * _IDLE_SECONDS):
                if not self.take():
                    return
            elif self.backlog:
                self.draw_one()
            elif os.getppid() != parent:
                return

    def take(self) -> bool:
        """Takes one request; False where there will be no more."""
        head = self.read(HEADER.size)
        if head is None:
            return False
        kind, number, length = HEADER.unpack(head)
        payload = self.read(length)
        if payload is None:
            return False
        if kind == DRAW:
            self.backlog.extend(np.frombuffer(payload, POSE))
            self.backlog.append(number)
        elif kind == ASK:
            try:
                self.answer(DONE, number, self.asked(*read_question(payload)))
            except _RefusedError as error:
                self.answer(REFUSED, number, str(error).encode())
        else:
            self.set_scenes({int(key): path for key, path in json.loads(payload).items()})
            self.answer(DONE, number)
        return True

    def read(self, length: int) -> bytes | None:
        """So many bytes; None where the parent has gone."""
        data = bytearray(length)
        left = memoryview(data)
        while left:
            count = self.connection.recv_into(left)
            if not count:
                return None
            left = left[count:]
        return bytes(data)

    def answer(self, kind: int, number: int, payload: bytes = b"") -> None:
        """Sends an answer."""
        self.connection.sendall(HEADER.pack(kind, number, len(payload)) + payload)

    def set_scenes(self, files: dict[int, str]) -> None:
        """Takes over which scenes there are; closes those that are no longer among them."""
        self.files = files
        for number in [number for number in self.worlds if number not in files]:
            self.worlds.pop(number).close()

    def world(self, number: int) -> Any:
        """The world of a scene, loaded where it is not yet."""
        if number not in self.worlds:
            path = self.files[number]
            try:
                self.worlds[number] = self.body.open(path)
            except MemoryError:
                raise
            except Exception as error:
                traceback.print_exc()
                raise _RefusedError(f"{path}: {type(error).__name__}: {error}") from error
            # What it grumbled about while it loaded well would be taken for its last words.
            os.ftruncate(2, 0)
        return self.worlds[number]

    def asked(self, question: str, options: dict[str, Any], scenes: np.ndarray, rows: np.ndarray) -> bytes:
        """Answers to rows (M, k) about scenes (M,)."""
        first = int(scenes[0])
        if (scenes == first).all():
            return self.world(first).ask(question, rows, **options).astype("<f4").tobytes()
        found = np.empty((len(rows), answer_width(question, options)), "<f4")
        for number in np.unique(scenes):
            own = scenes == number
            found[own] = self.world(int(number)).ask(question, rows[own], **options)
        return found.tobytes()

    def draw_one(self) -> None:
        """Draws the next agent, or says that a request's last one is drawn."""
        pose = self.backlog.popleft()
        if isinstance(pose, int):
            self.answer(DONE, pose)
            return
        views = {name: array[pose["agent"]] for name, array in self.images.items()}
        try:
            self.world(int(pose["scene"])).draw(pose["position"], float(pose["yaw"]), views)
        except _RefusedError as error:
            while not isinstance(self.backlog[0], int):
                self.backlog.popleft()
            self.answer(REFUSED, self.backlog.popleft(), str(error).encode())


class _RefusedError(Exception):
    """A scene that cannot be loaded."""


class _Hidden:
    """Keeps modules from being found: what takes them only where they are does without."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Raises for a hidden module, and leaves all others to whoever else looks."""
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}")


def load(file: str, name: str) -> Any:
    """The object of a name in a Python file, which need not belong to a package."""
    spec = importlib.util.spec_from_file_location("worker_body", file)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["worker_body"] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return getattr(module, name)


def main() -> None:
    """Makes the body and serves; whatever goes wrong is said on standard error, and ends the process."""
    # Its own folder is no place to look for packages.
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != os.path.dirname(__file__)]
    # These are for the parent, who saves before it stops, and needs its workers for that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    given = json.loads(sys.argv[1])
    sys.meta_path.insert(0, _Hidden(given["hidden"]))  # type: ignore[arg-type]
    try:
        Child(given, load(*given["body"])(given["settings"])).serve()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent has gone
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Nothing is to be saved, and graphics libraries are known to hang at their end.
    os._exit(0)


if __name__ == "__main__":
    main()
