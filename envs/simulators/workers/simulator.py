"""A simulator whose scenes live in worker processes, behind the interface of those that need none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.scenes.scene import SceneError
from envs.simulators.base import Action, AgentSpec, PathQueries, SensorSpec, Simulator
from envs.simulators.common import (
    ahead,
    check_actions,
    check_poses,
    check_queries,
    check_scenes,
    cut_short,
    followed,
    turned,
)
from envs.simulators.workers import child
from envs.simulators.workers.pool import Body, WorkerPool

_ROWS = 4096
"""Rows of a question that a worker is asked at once."""
_CORNERS = 1 << 16
"""Corners of paths that a worker answers with at once."""


class WorkerSimulator(Simulator):
    """N agents over K scenes that worker processes load, draw and answer questions about.

    Each worker serves an equal share of the agents, and loads a scene when the first of them is in it. Agents
    that have moved are drawn at once, while the task is still being judged, where the last pictures were
    looked at too. What dies is started again, see :class:`envs.simulators.workers.pool.WorkerPool`, and still
    answers what it was asked, since all that an agent does is known here; :meth:`take_deaths` tells of it.

    Args:
        scenes: The resident scenes.
        num_agents: Number of agents N.
        sensors: The cameras that every agent carries.
        body: What the workers are, and how many.
        agent: The body that every agent has.
        device: Where tensors live.
        max_restarts: How many deaths of workers are made good before one is an error.

    Raises:
        SimulatorError: The workers do not start.
    """

    def __init__(
        self,
        scenes: Sequence[str | Path],
        num_agents: int,
        sensors: Sequence[SensorSpec],
        body: Body,
        agent: AgentSpec | None = None,
        device: str | torch.device = "cpu",
        max_restarts: int = 10,
    ) -> None:
        if not 1 <= len(body.settings) <= num_agents:
            raise ValueError(f"{len(body.settings)} workers for {num_agents} agents: expected 1 to as many")
        self.num_agents = num_agents
        self.sensors = tuple(sensors)
        self.agent = AgentSpec() if agent is None else agent
        self.device = torch.device(device)
        self.scenes: tuple[Path, ...] = ()
        self._numbers: dict[Path, int] = {}
        self._next_number = 0
        self.scene = torch.zeros(num_agents, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(num_agents, 3, device=self.device)
        self.yaw = torch.zeros(num_agents, device=self.device)
        self.collided = torch.zeros(num_agents, dtype=torch.bool, device=self.device)
        self._pool = WorkerPool(body, self.sensors, num_agents, max_restarts)
        self._home = np.arange(num_agents) * len(self._pool) // num_agents
        self._questions = Questions(self._pool, self.device)
        self.paths: PathQueries = self._questions
        # Agents whose newest pose nobody was asked to draw, and requests that are under way at each worker.
        self._stale = np.ones(num_agents, dtype=bool)
        self._drawing: list[list[int]] = [[] for _ in range(len(self._pool))]
        self._looked_at = self._hurry = False
        try:
            self.load_scenes(scenes)
        except BaseException:
            self.close()
            raise

    @property
    def restarts(self) -> int:  # type: ignore[override]
        """How often a worker died and was started again."""
        return self._pool.restarts

    @property
    def process_ids(self) -> list[int]:  # type: ignore[override]
        """Process ids of the workers as they are now."""
        return self._pool.process_ids

    def load_scenes(self, scenes: Sequence[str | Path]) -> None:
        """Makes exactly these scenes resident, keeping those that already are.

        Workers load a scene when they first need it. Agents follow their scene to its new index; those whose
        scene is gone stand in scene 0 until they are reset.

        Raises:
            SceneError: there is no such file.
        """
        names = [Path(scene) for scene in scenes]
        check_scenes(names)
        for name in names:
            if not name.is_file():
                raise SceneError(f"{name}: no such file")
        numbers = {}
        for name in names:
            if name in self._numbers:
                numbers[name] = self._numbers[name]
            else:
                numbers[name] = self._next_number
                self._next_number += 1
        gone = [number for name, number in self._numbers.items() if name not in numbers]
        self._settle()
        self._pool.set_scenes({number: name.absolute() for name, number in numbers.items()})
        if self.scenes:
            lost = torch.tensor([name not in numbers for name in self.scenes], device=self.device)[self.scene]
            self._stale |= lost.cpu().numpy()
            self.scene = followed(self.scene, self.scenes, names)
        self.scenes, self._numbers = tuple(names), numbers
        self._questions.set_scenes(list(numbers.values()), gone)

    def reset(self, agents: Tensor, scene: Tensor, position: Tensor, yaw: Tensor) -> None:
        """Puts agents ``(M,)`` int64 into scenes (M,) at positions (M, 3) [m] with headings (M,) [rad]."""
        if not len(agents):
            return
        check_poses(len(agents), len(self.scenes), scene, position, yaw)
        agents = agents.to(self.device)
        self.scene = self.scene.index_copy(0, agents, scene.to(self.scene))
        self.position = self.position.index_copy(0, agents, position.to(self.position))
        self.yaw = self.yaw.index_copy(0, agents, yaw.to(self.yaw))
        self.collided = self.collided.index_fill(0, agents, False)
        rows = agents.cpu().numpy()
        self._questions.set_homes(scene.cpu().numpy(), self._home[rows])
        self._stale[rows] = True
        if self._hurry:
            self._draw(rows)

    def step(self, actions: Tensor) -> None:
        """Moves every agent by its action ``(N,)`` int64 and updates position, yaw and collided."""
        actions = actions.to(self.device)
        check_actions(actions, self.num_agents)
        position, yaw = self.position, self.yaw
        self.yaw = turned(yaw, actions, self.agent)
        self.collided = torch.zeros_like(self.collided)
        movers = (actions == Action.MOVE_FORWARD).nonzero().squeeze(1)
        if len(movers):
            start = position[movers]
            target = ahead(start, self.yaw[movers], self.agent)
            end = self._questions.try_step(
                self.scene[movers],
                start,
                target,
                self.agent.allow_sliding,
                self._home[movers.cpu().numpy()],
            )
            self.position = position.index_copy(0, movers, end)
            self.collided = self.collided.index_copy(0, movers, cut_short(start, target, end))
        moved = (self.position != position).any(dim=1) | (self.yaw != yaw)
        self._stale |= moved.cpu().numpy()
        self._hurry, self._looked_at = self._looked_at, False
        if self._hurry:
            self._draw(np.arange(self.num_agents))

    def render(self, agents: Tensor | None = None) -> dict[str, Tensor]:
        """What the agents' sensors see, all of them or those of indices ``(M,)``, in fresh tensors."""
        self._looked_at = True
        if not self.sensors:
            return {}
        rows = np.arange(self.num_agents) if agents is None else agents.cpu().numpy()
        self._draw(rows)
        self._settle(np.unique(self._home[rows]).tolist())
        images = self._pool.images
        # Indexing with numbers copies.
        chosen = {name: array.copy() if agents is None else array[rows] for name, array in images.items()}
        return {name: torch.from_numpy(array).to(self.device) for name, array in chosen.items()}

    def take_deaths(self) -> NDArray[np.bool_]:
        """Which agents' worker died and was started again since this was last asked: (N,) bool."""
        return np.isin(self._home, self._pool.take_deaths())

    def close(self) -> None:
        """Ends the workers; calling it twice is harmless."""
        self._pool.close()

    def _draw(self, agents: NDArray[np.intp]) -> None:
        """Has those of some agents drawn whose pictures are old, without waiting for it."""
        agents = agents[self._stale[agents]]
        if not len(agents) or not self.sensors:
            return
        poses = np.zeros(len(agents), child.POSE)
        poses["agent"] = agents
        poses["scene"] = self._questions.numbers[self.scene.cpu().numpy()[agents]]
        poses["position"] = self.position.cpu().numpy()[agents]
        poses["yaw"] = self.yaw.cpu().numpy()[agents]
        homes = self._home[agents]
        for worker in np.unique(homes).tolist():
            payload = poses[homes == worker].tobytes()
            self._drawing[worker].append(self._pool.send(worker, child.DRAW, payload))
        self._stale[agents] = False

    def _settle(self, workers: Sequence[int] | None = None) -> None:
        """Waits until workers, or all, have drawn what they were asked for."""
        chosen = range(len(self._drawing)) if workers is None else workers
        under_way = [(worker, request) for worker in chosen for request in self._drawing[worker]]
        for worker in chosen:
            self._drawing[worker] = []
        try:
            self._pool.wait(under_way)
        except BaseException:
            self._stale[:] = True
            raise


class Questions:
    """Navigation queries that workers answer (``PathQueries``).

    Questions about a scene go to the workers that have it loaded, in equal shares.
    """

    def __init__(self, pool: WorkerPool, device: torch.device) -> None:
        self.device = device
        self.numbers: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        """The workers' number of each resident scene."""
        self._pool = pool
        self._holders: dict[int, list[int]] = {}

    def set_scenes(self, numbers: Sequence[int], gone: Sequence[int]) -> None:
        """Takes over the workers' numbers of the resident scenes, and which ones are no longer there."""
        self.numbers = np.array(numbers, dtype=np.int64)
        for number in gone:
            self._holders.pop(number, None)

    def set_homes(self, scene: NDArray[np.int64], workers: NDArray[np.int64]) -> None:
        """Takes note that workers (M,) have agents in scenes (M,)."""
        for number, worker in set(zip(self.numbers[scene].tolist(), workers.tolist(), strict=True)):
            holders = self._holders.setdefault(number, [])
            if worker not in holders:
                holders.append(worker)

    def is_navigable(self, scene: Tensor, points: Tensor, max_y_delta: float = 0.5) -> Tensor:
        """Whether an agent can stand at each point: (N,) bool."""
        return self._ask("is_navigable", scene, {"points": points}, max_y_delta=max_y_delta)[:, 0] > 0

    def snap(self, scene: Tensor, points: Tensor) -> Tensor:
        """Closest navigable point: (N, 3) float32 [m], NaN where there is none near."""
        return self._ask("snap", scene, {"points": points})

    def island_radius(self, scene: Tensor, points: Tensor) -> Tensor:
        """Radius of the connected area a point lies in: (N,) float32 [m], 0 off the mesh."""
        return self._ask("island_radius", scene, {"points": points})[:, 0]

    def distance_to_obstacle(self, scene: Tensor, points: Tensor, max_distance: float = 2.0) -> Tensor:
        """Distance to the closest obstacle, at most ``max_distance``: (N,) float32 [m]."""
        answer = self._ask("distance_to_obstacle", scene, {"points": points}, max_distance=max_distance)
        return answer[:, 0]

    def geodesic_distance(self, scene: Tensor, start: Tensor, goal: Tensor) -> Tensor:
        """Length of the shortest walkable path: (N,) float32 [m], infinite where there is none."""
        return self._ask("geodesic_distance", scene, {"start": start, "goal": goal})[:, 0]

    def path(
        self, scene: Tensor, start: Tensor, goal: Tensor, max_points: int = 128
    ) -> tuple[Tensor, Tensor]:
        """Corners of the shortest path (N, max_points, 3) float32 [m], and how many count (N,) int64."""
        if max_points < 2:
            raise ValueError(f"max_points {max_points} must be at least 2, for start and goal")
        answer = self._ask("path", scene, {"start": start, "goal": goal}, max_points=max_points)
        return answer[:, 1:].reshape(len(answer), max_points, 3).contiguous(), answer[:, 0].long()

    def try_step(
        self,
        scene: Tensor,
        start: Tensor,
        target: Tensor,
        allow_sliding: bool,
        workers: NDArray[np.int64] | None = None,
    ) -> Tensor:
        """Where a move from start straight to target ends: (N, 3) float32 [m]; ``workers`` (N,) are asked."""
        points = {"start": start, "target": target}
        return self._ask("try_step", scene, points, workers, allow_sliding=bool(allow_sliding))

    def sample(self, scene: Tensor, generator: torch.Generator) -> Tensor:
        """A uniformly drawn navigable point for each row: (N, 3) float32 [m]."""
        (scene,) = check_queries(self.device, len(self.numbers), scene)
        # Single precision holds these exactly.
        seeds = torch.randint(1 << 24, (len(scene), 1), generator=generator, device=generator.device)
        return self._answers("sample", scene, seeds.float().cpu().numpy(), None, {})

    def _ask(
        self,
        question: str,
        scene: Tensor,
        points: dict[str, Tensor],
        workers: NDArray[np.int64] | None = None,
        **options: float | bool,
    ) -> Tensor:
        scene, *checked = check_queries(self.device, len(self.numbers), scene, **points)
        rows = torch.cat(checked, dim=1).cpu().numpy()
        return self._answers(question, scene, rows, workers, options)

    def _answers(
        self,
        question: str,
        scene: Tensor,
        rows: NDArray[np.float32],
        workers: NDArray[np.int64] | None,
        options: dict[str, float | bool],
    ) -> Tensor:
        """Rows of answers (M, q) float32 to rows of questions (M, k)."""
        numbers = self.numbers[scene.cpu().numpy()]
        workers = self._route(numbers) if workers is None else workers
        width = child.answer_width(question, options)
        limit = min(_ROWS, max(1, 3 * _CORNERS // width))
        found = np.empty((len(rows), width), dtype=np.float32)
        left = {worker: np.flatnonzero(workers == worker) for worker in np.unique(workers).tolist()}
        while left:
            # A worker gets its next rows when it has answered: two that both write would wait for ever.
            asked = {worker: own[:limit] for worker, own in left.items()}
            sent = [
                (worker, self._ask_one(worker, question, options, numbers[own], rows[own]))
                for worker, own in asked.items()
            ]
            for own, answer in zip(asked.values(), self._pool.wait(sent), strict=True):
                found[own] = np.frombuffer(answer, "<f4").reshape(len(own), width)
            left = {worker: own[limit:] for worker, own in left.items() if len(own) > limit}
        return torch.from_numpy(found).to(self.device)

    def _ask_one(
        self,
        worker: int,
        question: str,
        options: dict[str, float | bool],
        numbers: NDArray[np.int64],
        rows: NDArray[np.float32],
    ) -> int:
        """Asks one worker, and returns the request's number."""
        payload = child.question_payload(question, options, numbers, rows)
        return self._pool.send(worker, child.ASK, payload)

    def _route(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which worker to ask about each of scenes (M,): one that has it loaded, if any."""
        workers = np.empty(len(numbers), dtype=np.int64)
        for number in np.unique(numbers).tolist():
            rows = np.flatnonzero(numbers == number)
            holders = self._holders.setdefault(number, [number % len(self._pool)])
            workers[rows] = np.array(holders)[np.arange(len(rows)) % len(holders)]
        return workers
