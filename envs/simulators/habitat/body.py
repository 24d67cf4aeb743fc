"""A worker's body of real habitat-sim.

Like :mod:`envs.simulators.workers.child`, which loads this file, it imports nothing of its own package and
keeps to Python 3.9: habitat-sim may be installed for another Python than the one that trains.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from typing import Any

import habitat_sim
import magnum as mn
import numpy as np

_TYPES = {
    "rgb": habitat_sim.SensorType.COLOR,
    "depth": habitat_sim.SensorType.DEPTH,
    "instance": habitat_sim.SensorType.SEMANTIC,
}


def sensor_specification(sensor: dict[str, Any]) -> Any:
    """habitat-sim's description of a camera, from the fields of :class:`envs.simulators.base.SensorSpec`."""
    specification = habitat_sim.CameraSensorSpec()
    specification.uuid = sensor["name"]
    specification.sensor_type = _TYPES[sensor["kind"]]
    specification.sensor_subtype = habitat_sim.SensorSubType.PINHOLE
    specification.resolution = [sensor["height"], sensor["width"]]
    specification.hfov = sensor["hfov_deg"]
    specification.position = [0.0, sensor["sensor_height"], 0.0]
    specification.orientation = [math.radians(sensor["pitch_deg"]), 0.0, 0.0]
    return specification


def configuration(scene: str, settings: dict[str, Any]) -> Any:
    """habitat-sim's configuration for one scene and one agent, as habitat-lab makes it for PointNav.

    The navigation mesh beside the scene is used if it was built for this agent with the default settings, and
    built anew otherwise.

    Args:
        scene: a file, or ``NONE``.
        settings: ``sensors`` and ``agent``, the fields of :class:`envs.simulators.base.SensorSpec` and
            :class:`envs.simulators.base.AgentSpec`; ``gpu_device_id``, -1 for the first device that renders
            without one; ``scene_dataset_config``, a file or None.
    """
    agent = settings["agent"]
    simulator = habitat_sim.SimulatorConfiguration()
    simulator.scene_id = scene
    if settings["scene_dataset_config"] is not None:
        simulator.scene_dataset_config_file = settings["scene_dataset_config"]
    simulator.gpu_device_id = settings["gpu_device_id"]
    simulator.allow_sliding = agent["allow_sliding"]
    simulator.enable_physics = False
    simulator.load_semantic_mesh = any(sensor["kind"] == "instance" for sensor in settings["sensors"])
    mesh = habitat_sim.nav.NavMeshSettings()
    mesh.set_defaults()
    mesh.agent_radius = agent["radius"]
    mesh.agent_height = agent["height"]
    mesh.agent_max_climb = agent["max_climb"]
    mesh.agent_max_slope = agent["max_slope_deg"]
    simulator.navmesh_settings = mesh
    body = habitat_sim.AgentConfiguration()
    body.radius = agent["radius"]
    body.height = agent["height"]
    body.sensor_specifications = [sensor_specification(sensor) for sensor in settings["sensors"]]
    turn = habitat_sim.ActuationSpec(amount=agent["turn_angle_deg"])
    forward = habitat_sim.ActuationSpec(amount=agent["forward_step"])
    body.action_space = {
        1: habitat_sim.ActionSpec("move_forward", forward),
        2: habitat_sim.ActionSpec("turn_left", turn),
        3: habitat_sim.ActionSpec("turn_right", turn),
    }
    return habitat_sim.Configuration(simulator, [body])


def simulator_of(scene: str, settings: dict[str, Any]) -> Any:
    """A simulator with a scene, whose pictures are those of ``Simulator(configuration(scene, settings))``.

    With a colour camera habitat-sim (0.3) computes, for each simulator, how the light of an environment map
    falls on shiny surfaces: 12 s without a GPU. Scenes that hold their light in their textures, as scans do,
    are drawn flat and never ask for it. So it is left out, and where what was loaded is not flat after all,
    which lamps or single objects make, the scene is loaded again with it.
    """
    wanted = configuration(scene, settings)
    if not any(sensor["kind"] == "rgb" for sensor in settings["sensors"]):
        return habitat_sim.Simulator(wanted)
    wanted.metadata_mediator = without_environment(wanted.sim_cfg, settings["no_map"])
    simulator = habitat_sim.Simulator(wanted)
    if _is_flat(simulator):
        return simulator
    simulator.close()
    return habitat_sim.Simulator(configuration(scene, settings))


def _is_flat(simulator: Any) -> bool:
    """Whether all that was loaded is drawn as its textures are; single objects are not taken to be."""
    objects = simulator.get_rigid_object_manager().get_num_objects()
    objects += simulator.get_articulated_object_manager().get_num_objects()
    return not objects and simulator.get_stage_initialization_template().force_flat_shading


def without_environment(simulator_configuration: Any, no_map: str) -> Any:
    """habitat-sim's knowledge of its files, with an environment map that is not there, by the name of it."""
    with tempfile.TemporaryDirectory() as folder:
        # The one place where habitat-sim looks for this setting is relative to where the process is.
        os.mkdir(os.path.join(folder, "data"))
        with open(os.path.join(folder, "data", "default.pbr_config.json"), "w") as file:
            json.dump({"ibl_envmap_filename": no_map}, file)
        before = os.open(".", os.O_RDONLY)
        os.chdir(folder)
        try:
            return habitat_sim.metadata.MetadataMediator(simulator_configuration)
        finally:
            os.fchdir(before)
            os.close(before)


class HabitatBody:
    """Loads scenes, each into a simulator of its own; they share one OpenGL context."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._context = None
        if settings["sensors"]:
            # Whichever simulator comes first owns the context, so it must outlive all others.
            smallest = {**settings["sensors"][0], "kind": "depth", "height": 8, "width": 8}
            self._context = habitat_sim.Simulator(configuration("NONE", {**settings, "sensors": [smallest]}))

    def open(self, path: str) -> HabitatWorld:
        """Loads a scene."""
        return HabitatWorld(path, self.settings)


class HabitatWorld:
    """One scene in habitat-sim, with one agent that is put wherever somebody looks from."""

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        self._simulator = simulator_of(path, settings)
        self._paths = self._simulator.pathfinder
        if not self._paths.is_loaded:
            raise ValueError("habitat-sim finds no navigation mesh, and nowhere to stand in the geometry")
        self._node = self._simulator.get_agent(0).scene_node
        self._sensors = []
        for sensor in settings["sensors"]:
            camera = self._node.subtree_sensors[sensor["name"]]
            height, width, kind = sensor["height"], sensor["width"], sensor["kind"]
            if kind == "rgb":
                buffer = np.empty((height, width, 4), np.uint8)
                view = mn.MutableImageView2D(
                    mn.PixelFormat.RGBA8_UNORM, [width, height], buffer.reshape(height, -1)
                )
                read, shown = camera.render_target.read_frame_rgba, buffer[::-1, :, :3]
            elif kind == "depth":
                buffer = np.empty((height, width), np.float32)
                view = mn.MutableImageView2D(mn.PixelFormat.R32F, [width, height], buffer)
                read, shown = camera.render_target.read_frame_depth, buffer[::-1]
            else:
                buffer = np.empty((height, width), np.uint32)
                view = mn.MutableImageView2D(mn.PixelFormat.R32UI, [width, height], buffer)
                read, shown = camera.render_target.read_frame_object_id, buffer[::-1]
            # OpenGL's first row is the lowest.
            self._sensors.append((sensor["name"], camera, read, view, shown))

    def draw(self, position: np.ndarray, yaw: float, images: dict[str, np.ndarray]) -> None:
        """Draws what an agent at a position (3,) [m] with a heading [rad] sees."""
        self._node.translation = mn.Vector3(*map(float, position))
        self._node.rotation = mn.Quaternion.rotation(mn.Rad(yaw), mn.Vector3.y_axis())
        renderer = self._simulator.renderer
        for _, camera, _, _, _ in self._sensors:
            renderer.draw(camera, self._simulator)
        for name, _, read, view, shown in self._sensors:
            read(view)
            np.copyto(images[name], shown, casting="unsafe")

    def ask(self, question: str, rows: np.ndarray, **options: Any) -> np.ndarray:
        """Answers rows (M, k) by rows (M, q), see :data:`envs.simulators.workers.child.QUESTIONS`."""
        answer = getattr(self, "_" + question)
        return np.array([answer(row, **options) for row in rows], dtype=np.float32).reshape(len(rows), -1)

    def close(self) -> None:
        """Frees the scene."""
        self._sensors = []
        self._simulator.close()

    def _is_navigable(self, row: np.ndarray, max_y_delta: float) -> bool:
        return self._paths.is_navigable(row, max_y_delta)

    def _snap(self, row: np.ndarray) -> Any:
        return self._paths.snap_point(mn.Vector3(*map(float, row)))

    def _island_radius(self, row: np.ndarray) -> float:
        return self._paths.island_radius(mn.Vector3(*map(float, row)))

    def _distance_to_obstacle(self, row: np.ndarray, max_distance: float) -> float:
        return self._paths.distance_to_closest_obstacle(row, max_distance)

    def _shortest(self, row: np.ndarray) -> Any:
        path = habitat_sim.ShortestPath()
        path.requested_start = row[:3]
        path.requested_end = row[3:]
        self._paths.find_path(path)
        return path

    def _geodesic_distance(self, row: np.ndarray) -> float:
        return self._shortest(row).geodesic_distance

    def _path(self, row: np.ndarray, max_points: int) -> np.ndarray:
        points = self._shortest(row).points[:max_points]
        found = np.zeros(1 + 3 * max_points, np.float32)
        found[0] = len(points)
        if len(points):
            found[1 : 1 + 3 * len(points)] = np.asarray(points, np.float32).reshape(-1)
        return found

    def _try_step(self, row: np.ndarray, allow_sliding: bool) -> Any:
        step = self._paths.try_step if allow_sliding else self._paths.try_step_no_sliding
        return step(mn.Vector3(*map(float, row[:3])), mn.Vector3(*map(float, row[3:])))

    def _sample(self, row: np.ndarray) -> Any:
        self._paths.seed(int(row[0]))
        return self._paths.get_random_navigable_point()
