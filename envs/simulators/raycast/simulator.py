"""The built-in simulator: agents that walk on navigation meshes and see by ray casting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from envs.scenes.gltf import load_scene
from envs.scenes.navmesh import NavMesh
from envs.scenes.navmesh_build import build_navmesh, navmesh_for
from envs.scenes.pathfinder import PathFinder
from envs.scenes.scene import Scene
from envs.simulators.base import Action, AgentSpec, SensorSpec, Simulator
from envs.simulators.common import (
    ahead,
    check_actions,
    check_poses,
    check_scenes,
    cut_short,
    followed,
    turned,
)
from envs.simulators.raycast.renderer import Renderer


class RaycastSimulator(Simulator):
    """N agents over K scenes, batched, on the CPU or a CUDA device.

    Scenes are files, or scenes in memory, which get a navigation mesh of their own. Every agent starts in
    scene 0 at the origin; :meth:`reset` puts it somewhere. ``position``, ``yaw``, ``scene`` and ``collided``
    are the whole state; they are replaced, never written into, so what was read from them stays as it was.

    Example::

        simulator = RaycastSimulator([Path("apartment.glb")], 2, [SensorSpec("depth", "depth")])
        scene = torch.zeros(2, dtype=torch.int64)
        start = simulator.paths.sample(scene, torch.Generator().manual_seed(0))
        simulator.reset(torch.arange(2), scene, start, torch.zeros(2))
        simulator.step(torch.tensor([Action.MOVE_FORWARD, Action.TURN_LEFT]))
        depth = simulator.render()["depth"]  # (2, 128, 128) [m]

    Args:
        scenes: The resident scenes.
        num_agents: Number of agents N.
        sensors: The cameras that every agent carries.
        agent: The body that every agent has.
        device: Where tensors live and kernels run.
        num_threads: Threads that share the work on the CPU.
    """

    def __init__(
        self,
        scenes: Sequence[str | Path | Scene],
        num_agents: int,
        sensors: Sequence[SensorSpec],
        agent: AgentSpec | None = None,
        device: str | torch.device = "cpu",
        num_threads: int = 2,
    ) -> None:
        if num_agents < 1:
            raise ValueError(f"num_agents {num_agents} must be at least 1")
        self.num_agents = num_agents
        self.sensors = tuple(sensors)
        self.agent = AgentSpec() if agent is None else agent
        self._num_threads = num_threads
        self._renderer = Renderer(self.sensors, device, num_threads)
        self.device = self._renderer.device
        self.scenes: tuple[Path, ...] = ()
        self._navmeshes: dict[Path, NavMesh] = {}
        self.scene = torch.zeros(num_agents, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(num_agents, 3, device=self.device)
        self.yaw = torch.zeros(num_agents, device=self.device)
        self.collided = torch.zeros(num_agents, dtype=torch.bool, device=self.device)
        self.load_scenes(scenes)

    def load_scenes(self, scenes: Sequence[str | Path | Scene]) -> None:
        """Makes exactly these scenes resident, keeping those that already are.

        Agents follow their scene to its new index; those whose scene is gone stand in scene 0 until they are
        reset. If a scene cannot be loaded, nothing changes.
        """
        wanted = [scene if isinstance(scene, Scene) else Path(scene) for scene in scenes]
        names = [scene.path if isinstance(scene, Scene) else scene for scene in wanted]
        check_scenes(names)
        loaded: list[Scene | Path] = []
        navmeshes: dict[Path, NavMesh] = {}
        for name, scene in zip(names, wanted, strict=True):
            if isinstance(scene, Path) and scene in self._navmeshes:
                loaded.append(scene)
                navmeshes[name] = self._navmeshes[name]
                continue
            # The scene first: its errors say more than those of a mesh built from it.
            loaded.append(scene if isinstance(scene, Scene) else load_scene(scene))
            navmeshes[name] = (
                build_navmesh(scene.vertices, scene.ground, self.agent)
                if isinstance(scene, Scene)
                else navmesh_for(scene, self.agent)
            )
        paths = PathFinder(list(navmeshes.values()), device=self.device, num_threads=self._num_threads)
        self._renderer.load_scenes(loaded)
        if self.scenes:
            self.scene = followed(self.scene, self.scenes, names)
        self.scenes, self.paths, self._navmeshes = tuple(names), paths, navmeshes

    def reset(self, agents: Tensor, scene: Tensor, position: Tensor, yaw: Tensor) -> None:
        """Puts agents ``(M,)`` int64 into scenes (M,) at positions (M, 3) [m] with headings (M,) [rad]."""
        count = len(agents)
        if not count:
            return
        check_poses(count, len(self.scenes), scene, position, yaw)
        agents = agents.to(self.device)
        self.scene = self.scene.index_copy(0, agents, scene.to(self.scene))
        self.position = self.position.index_copy(0, agents, position.to(self.position))
        self.yaw = self.yaw.index_copy(0, agents, yaw.to(self.yaw))
        self.collided = self.collided.index_fill(0, agents, False)

    def step(self, actions: Tensor) -> None:
        """Moves every agent by its action ``(N,)`` int64 and updates position, yaw and collided."""
        actions = actions.to(self.device)
        check_actions(actions, self.num_agents)
        self.yaw = turned(self.yaw, actions, self.agent)
        self.collided = torch.zeros_like(self.collided)
        movers = (actions == Action.MOVE_FORWARD).nonzero().squeeze(1)
        if not len(movers):
            return
        start = self.position[movers]
        target = ahead(start, self.yaw[movers], self.agent)
        end = self.paths.try_step(self.scene[movers], start, target, self.agent.allow_sliding)
        self.position = self.position.index_copy(0, movers, end)
        self.collided = self.collided.index_copy(0, movers, cut_short(start, target, end))

    def render(self, agents: Tensor | None = None) -> dict[str, Tensor]:
        """What the agents' sensors see, all of them or those of indices ``(M,)``, in fresh tensors."""
        if agents is None:
            return self._renderer.render(self.scene, self.position, self.yaw)
        agents = agents.to(self.device)
        return self._renderer.render(self.scene[agents], self.position[agents], self.yaw[agents])

    def close(self) -> None:
        """Frees scenes and threads; calling it twice is harmless."""
        self._renderer.close()
