"""Bodies of worker processes for tests; they run there, loaded by file."""

import os
import signal
import sys
import time

import numpy as np


class FlatBody:
    """Empty square rooms, 10 m wide, where pixels and answers are simple functions of what was asked."""

    def __init__(self, settings):
        if settings.get("absent"):
            import a_simulator_that_nobody_has  # noqa: F401
        if settings.get("mute"):
            os._exit(3)

    def open(self, path):
        with open(path) as file:
            return FlatWorld(file.read())


class FlatWorld:
    """The scene's file says how it behaves: an accident that happens once, as long as its file is there."""

    def __init__(self, text):
        if text == "broken":
            raise ValueError("not a scene at all")
        self.accident, _, self.fuse = text.partition(" ")

    def draw(self, position, yaw, images):
        self._happen("draw")
        for image in images.values():
            image[...] = position[0] if image.dtype == np.float32 else position[2]

    def ask(self, question, rows, **options):
        self._happen("ask")
        if question == "try_step":
            return np.clip(rows[:, 3:], -5, 5)
        if question == "geodesic_distance":
            return np.linalg.norm(rows[:, :3] - rows[:, 3:], axis=1)[:, None]
        if question == "path":
            found = np.zeros((len(rows), 1 + 3 * options["max_points"]))
            found[:, 0], found[:, 1:7] = 2, rows
            return found
        return np.repeat(rows[:, :1], 3 if question in ("snap", "sample") else 1, axis=1)

    def close(self):
        pass

    def _happen(self, where):
        accident, _, place = self.accident.partition("@")
        if place != where or not os.path.exists(self.fuse):
            return
        if not accident.startswith("always"):
            os.unlink(self.fuse)
        print("the lamp went out", file=sys.stderr, flush=True)
        if accident.endswith("segv"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if accident.endswith("raise"):
            raise RuntimeError("no more light")
        if accident.endswith("memory"):
            raise MemoryError("4 GB too few")
        if accident.endswith("sleep"):
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)


class EmptyBody(FlatBody):
    """The same rooms for whatever scene is asked for; nothing happens there, and they are there at once."""

    def open(self, path):
        return FlatWorld("")


class RaycastBody:
    """The built-in simulator with one agent a scene."""

    def __init__(self, settings):
        self.settings = settings

    def open(self, path):
        from envs.simulators.base import AgentSpec, SensorSpec
        from envs.simulators.raycast import RaycastSimulator

        sensors = [SensorSpec(**sensor) for sensor in self.settings["sensors"]]
        agent = AgentSpec(**self.settings["agent"])
        return RaycastWorld(RaycastSimulator([path], 1, sensors, agent, num_threads=1))


class RaycastWorld:
    def __init__(self, simulator):
        self.simulator = simulator

    def draw(self, position, yaw, images):
        import torch

        self.simulator.reset(
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            torch.tensor(np.array(position))[None],
            torch.tensor([yaw], dtype=torch.float32),
        )
        for name, image in self.simulator.render().items():
            images[name][...] = image[0].numpy()

    def ask(self, question, rows, **options):
        import torch

        scene = torch.zeros(len(rows), dtype=torch.int64)
        if question == "sample":
            generator = torch.Generator().manual_seed(int(rows[0, 0]))
            return self.simulator.paths.sample(scene, generator).numpy()
        points = [torch.tensor(part) for part in np.split(np.array(rows), rows.shape[1] // 3, axis=1)]
        answer = getattr(self.simulator.paths, question)(scene, *points, **options)
        if question == "path":
            corners, count = answer
            return torch.cat([count[:, None].float(), corners.flatten(1)], dim=1).numpy()
        return answer.float().reshape(len(rows), -1).numpy()

    def close(self):
        self.simulator.close()
