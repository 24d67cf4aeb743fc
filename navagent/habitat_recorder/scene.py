"""One scene in real habitat-sim, asked through habitat-sim's own Python interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import habitat_sim
import magnum as mn
import numpy as np
from numpy.typing import NDArray

from envs.scenes.navmesh import NavMeshSettings
from envs.simulators.base import Action, AgentSpec, SensorSpec
from envs.simulators.habitat.body import configuration
from navagent.habitat_recorder.questions import ROLLOUTS
from navagent.recordings import Answers, RecordingError
from navagent.reference import OBSTACLE_LIMIT

# The settings that Habitat has as numbers, in its order; the others are switches that nobody changes.
_SETTINGS = tuple(field.name for field in fields(NavMeshSettings) if isinstance(field.default, float))


class Habitat:
    """habitat-sim, in which one scene is opened after another.

    Whatever it prepares for colour, seconds of work where it renders in software, is prepared only once.

    Args:
        gpu: device that renders; -1 for software.
    """

    def __init__(self, gpu: int = -1) -> None:
        self._gpu = gpu
        self._simulator: habitat_sim.Simulator | None = None

    def open(
        self,
        path: Path,
        agent: AgentSpec,
        cameras: Sequence[SensorSpec],
        mesh: dict[str, Any] | None = None,
    ) -> HabitatScene:
        """Opens a scene in place of the one before.

        Args:
            path: the ``.glb`` file.
            agent: the body that walks there.
            cameras: what it sees with.
            mesh: other settings of the navigation mesh than Habitat's, by their names.

        Raises:
            RecordingError: Habitat cannot load it, or finds nowhere to stand.
        """
        settings = {
            "sensors": [asdict(camera) for camera in cameras],
            "agent": asdict(agent),
            "gpu_device_id": self._gpu,
            "scene_dataset_config": None,
        }
        wanted = configuration(str(path), settings)
        try:
            if self._simulator is None:
                self._simulator = habitat_sim.Simulator(wanted)
            else:
                self._simulator.reconfigure(wanted)
        except (AssertionError, RuntimeError, ValueError) as error:  # its C++ parts raise all of them
            raise RecordingError(f"{path.name}: Habitat cannot load it: {error}") from error
        return HabitatScene(self._simulator, path, agent, cameras, mesh or {})

    def close(self) -> None:
        """Frees what was opened."""
        if self._simulator is not None:
            self._simulator.close()


class HabitatScene:
    """One scene, with a navigation mesh that Habitat has just built; :meth:`Habitat.open` gives it."""

    def __init__(
        self,
        simulator: habitat_sim.Simulator,
        path: Path,
        agent: AgentSpec,
        cameras: Sequence[SensorSpec],
        mesh: dict[str, Any],
    ) -> None:
        self._agent, self._cameras = agent, tuple(cameras)
        self._simulator = simulator
        self.paths = simulator.pathfinder
        wanted = habitat_sim.nav.NavMeshSettings()
        wanted.set_defaults()
        body = {
            "agent_radius": agent.radius,
            "agent_height": agent.height,
            "agent_max_climb": agent.max_climb,
            "agent_max_slope": agent.max_slope_deg,
        }
        chosen = {**mesh, **body}
        for name in _SETTINGS:
            if name in chosen:
                setattr(wanted, name, float(chosen[name]))
        # Built anew whatever lies beside the scene, so that the description tells how.
        if not self._simulator.recompute_navmesh(self.paths, wanted) or not self.paths.navigable_area > 0:
            raise RecordingError(
                f"{path}: Habitat finds nowhere to stand for an agent of radius {agent.radius:g} m and "
                f"height {agent.height:g} m"
            )

    def describe(self, name: str) -> dict[str, Any]:
        """What NAME.json says of the scene, the agent, the navigation mesh and the sensors."""
        mesh = self.paths.nav_mesh_settings
        return {
            "scene": name,
            "agent_radius": _short(self._agent.radius),
            "agent_height": _short(self._agent.height),
            "sensor_height": self._cameras[0].sensor_height,
            "navmesh": {setting: float(getattr(mesh, setting)) for setting in _SETTINGS},
            "navigable_area": float(self.paths.navigable_area),
            "bounds": self.bounds.tolist(),
            "forward_step": self._agent.forward_step,
            "turn_angle_deg": self._agent.turn_angle_deg,
            "sensors": [
                {
                    "name": camera.name,
                    "kind": camera.kind,
                    "height": camera.height,
                    "width": camera.width,
                    "hfov_deg": camera.hfov_deg,
                    "sensor_height": camera.sensor_height,
                }
                for camera in self._cameras
            ],
        }

    @property
    def bounds(self) -> NDArray[np.float32]:
        """Lowest and highest corner of where agents can stand: (2, 3) [m]."""
        return np.array([list(corner) for corner in self.paths.get_bounds()], np.float32)

    def sample(self, count: int) -> NDArray[np.float32]:
        """Points that Habitat draws from where agents can stand: (count, 3) [m]; seed ``paths`` first."""
        points = [self.paths.get_random_navigable_point() for _ in range(count)]
        return np.array(points, np.float32).reshape(count, 3)

    def answer(self, questions: Answers, on_answer: Callable[[int], object]) -> Answers:
        """The questions with Habitat's answers to them; ``on_answer`` is told how many came."""
        answers = dict(questions)

        def ask(name: str, question: Callable[..., Any], dtype: type, *keys: str) -> None:
            rows = [question(*asked) for asked in zip(*(questions[key] for key in keys), strict=True)]
            answers[name] = np.array(rows, dtype)
            on_answer(len(rows))

        ask("geodesic_distance", self._distance, np.float32, "geodesic_start", "geodesic_end")
        ask("step_slide", _by_vectors(self.paths.try_step), np.float32, "step_start", "step_target")
        ask(
            "step_no_slide",
            _by_vectors(self.paths.try_step_no_sliding),
            np.float32,
            "step_start",
            "step_target",
        )
        ask("query_is_navigable", self.paths.is_navigable, np.bool_, "query_point")
        ask("query_snapped", _by_vectors(self.paths.snap_point), np.float32, "query_point")
        ask("query_island_radius", _by_vectors(self.paths.island_radius), np.float32, "query_point")
        ask("obstacle_distance", self._obstacle, np.float32, "obstacle_point")
        for kind in ROLLOUTS:
            answers |= self._walk(kind, questions, on_answer)
        return answers | self._look(questions["view_position"], questions["view_yaw"], on_answer)

    def _distance(self, start: NDArray[np.float32], end: NDArray[np.float32]) -> float:
        path = habitat_sim.ShortestPath()
        path.requested_start, path.requested_end = start, end
        self.paths.find_path(path)
        return float(path.geodesic_distance)

    def _obstacle(self, point: NDArray[np.float32]) -> float:
        return float(self.paths.distance_to_closest_obstacle(point, OBSTACLE_LIMIT))

    def _look(
        self, positions: NDArray[np.float32], yaws: NDArray[np.float32], on_answer: Callable[[int], object]
    ) -> Answers:
        """What every camera sees from each pose."""
        seen: dict[str, list[NDArray[Any]]] = {camera.name: [] for camera in self._cameras}
        # In double precision: a rounding here moves far pixels by half a millimetre.
        for position, half in zip(positions, yaws.astype(np.float64) / 2, strict=True):
            self._put(position, np.array([0.0, np.sin(half), 0.0, np.cos(half)]))
            images = self._simulator.get_sensor_observations()
            for camera in self._cameras:
                image = images[camera.name]
                seen[camera.name].append(image[..., :3].copy() if camera.kind == "rgb" else image.copy())
            on_answer(1)
        return {f"view_{name}": np.stack(images) for name, images in seen.items()}

    def _walk(self, kind: str, questions: Answers, on_answer: Callable[[int], object]) -> Answers:
        """Where each walk went, from its first pose."""
        agent = self._simulator.get_agent(0)
        self._simulator.config.sim_cfg.allow_sliding = kind == "slide"
        positions, rotations, collided = [], [], []
        for row, actions in enumerate(questions[f"rollout_{kind}_actions"]):
            start = questions[f"rollout_{kind}_position"][row, 0]
            self._put(start, questions[f"rollout_{kind}_rotation_xyzw"][row, 0])
            states = [agent.get_state()]
            for action in actions:
                # The recordings count actions from forward.
                collided.append(agent.act(int(action) + int(Action.MOVE_FORWARD)))
                states.append(agent.get_state())
            positions.append([state.position for state in states])
            rotations.append([_xyzw(state.rotation) for state in states])
            on_answer(len(actions))
        return {
            f"rollout_{kind}_position": np.array(positions, np.float32),
            f"rollout_{kind}_rotation_xyzw": np.array(rotations, np.float32),
            f"rollout_{kind}_collided": np.array(collided, np.bool_).reshape(len(positions), -1),
        }

    def _put(self, position: NDArray[np.float32], rotation_xyzw: NDArray[Any]) -> None:
        state = habitat_sim.AgentState(position=position, rotation=rotation_xyzw)
        self._simulator.get_agent(0).set_state(state)


def _short(number: float) -> float:
    """The number as a person typed it, where it went through single precision since."""
    return float(str(np.float32(number)))


def _xyzw(rotation: Any) -> list[float]:
    return [rotation.x, rotation.y, rotation.z, rotation.w]


def _by_vectors(question: Callable[..., Any]) -> Callable[..., Any]:
    """A question of the path finder that takes magnum's vectors only, for rows of an array."""
    return lambda *rows: question(*(mn.Vector3(*map(float, row)) for row in rows))
