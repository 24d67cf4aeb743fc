"""Renders the views of many agents over several scenes in one call."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import warp as wp
from torch import Tensor

from envs.scenes.scene import Scene
from envs.simulators.base import SensorKind, SensorSpec
from envs.simulators.raycast import kernels
from envs.simulators.raycast.bvh import Node, build_bvh
from envs.simulators.raycast.textures import MIPMAP_CODES, WRAP_CODES, pack_textures
from envs.warp_runtime import start_warp

_CHANNELS: dict[SensorKind, tuple[int, ...]] = {"rgb": (3,), "depth": (), "normals": (3,), "instance": ()}
_DTYPES: dict[SensorKind, torch.dtype] = {
    "rgb": torch.uint8,
    "depth": torch.float32,
    "normals": torch.float32,
    "instance": torch.int32,
}
_FEW_RAYS = 8192
"""Below this many rays a second thread costs more than it brings."""
_Run = Callable[[int, int], None]
"""Renders bands ``start`` to ``start + count``."""


class ResidentScene:
    """A scene laid out on a device for the kernels."""

    def __init__(self, scene: Scene, device: wp.Device) -> None:
        self.path = scene.path
        bvh = build_bvh(scene.vertices, scene.triangles)
        pack = pack_textures(scene.materials)
        surfaces: Any = np.zeros(len(scene.materials), kernels.Surface.numpy_dtype())  # type: ignore[attr-defined]
        surfaces["color"] = np.clip([material.base_color[:3] for material in scene.materials], 0.0, None)
        surfaces["is_tinted"] = (surfaces["color"] != 1.0).any(axis=1)
        surfaces["first_level"] = pack.first_level
        surfaces["num_levels"] = pack.num_levels
        surfaces["wrap_s"] = [WRAP_CODES[material.wrap_s] for material in scene.materials]
        surfaces["wrap_t"] = [WRAP_CODES[material.wrap_t] for material in scene.materials]
        surfaces["magnify_nearest"] = [material.magnify == "nearest" for material in scene.materials]
        surfaces["minify_nearest"] = [material.minify == "nearest" for material in scene.materials]
        surfaces["mipmaps"] = [MIPMAP_CODES[material.mipmaps] for material in scene.materials]
        count = scene.num_triangles
        has_tints = bool((scene.colors[:, :3] != 1.0).any())
        with wp.ScopedDevice(device):
            data: Any = kernels.SceneData()
            data.nodes = wp.array(bvh.nodes, dtype=Node)
            data.corners = wp.empty(3 * count, dtype=wp.vec3)
            data.faces = wp.empty(count, dtype=kernels.Face)
            data.tints = wp.empty(count if has_tints else 0, dtype=kernels.Tint)
            data.surfaces = wp.array(surfaces, dtype=kernels.Surface)
            data.levels = wp.array(pack.levels, dtype=wp.vec4i)
            data.texels = wp.array(pack.texels, dtype=wp.uint32)
            wp.launch(
                kernels.prepare_faces,
                count,
                [
                    wp.array(bvh.order, dtype=wp.int32),
                    wp.array(scene.vertices, dtype=wp.vec3),
                    wp.array(scene.triangles, dtype=wp.int32),
                    wp.array(scene.uvs, dtype=wp.vec2),
                    wp.array(scene.colors, dtype=wp.vec4),
                    wp.array(scene.material_ids, dtype=wp.int32),
                    wp.array(scene.instance_ids, dtype=wp.int32),
                    data.corners,
                    data.faces,
                    data.tints,
                ],
            )
        self.data = data
        """The arrays; they live as long as this object."""


class Renderer:
    """Cameras that look into resident scenes.

    Sensors with the same size, field of view, height and pitch share one cast; what no sensor asks for is not
    computed. On the CPU the work is cut into slices that ``num_threads`` threads take in turn (a Warp launch
    runs on the thread that makes it and leaves the interpreter free); pixels do not depend on the slicing.

    Every call returns fresh tensors, so that results may be kept without copying them.
    """

    def __init__(
        self, sensors: Sequence[SensorSpec], device: str | torch.device = "cpu", num_threads: int = 2
    ) -> None:
        if len({sensor.name for sensor in sensors}) != len(sensors):
            raise ValueError(f"sensor names {[sensor.name for sensor in sensors]} must differ")
        if num_threads < 1:
            raise ValueError(f"num_threads {num_threads} must be at least 1")
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        start_warp()
        self._warp_device = wp.device_from_torch(self.device)
        # Compiled here (once a machine; then cached on disk), before threads could all try to.
        wp.load_module(kernels, device=self._warp_device, block_dim=1 if self.device.type == "cpu" else 256)
        self.sensors = tuple(sensors)
        self._groups: dict[tuple[float, ...], list[SensorSpec]] = {}
        for sensor in sensors:
            key = (sensor.height, sensor.width, sensor.hfov_deg, sensor.sensor_height, sensor.pitch_deg)
            self._groups.setdefault(key, []).append(sensor)
        self._num_threads = num_threads if self.device.type == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None
        self._pool_process = 0
        # Few large blocks keep a CPU thread's work together; a GPU needs many threads instead.
        self._tile = 8 if self.device.type == "cpu" else 2
        self._resident: list[ResidentScene] = []
        self._scene_table: Any = None

    @property
    def scenes(self) -> tuple[Path, ...]:
        """Files of the resident scenes."""
        return tuple(scene.path for scene in self._resident)

    def load_scenes(self, scenes: Sequence[Scene | Path]) -> None:
        """Makes exactly these scenes resident, in this order.

        A path stands for a scene that is resident already. Scenes that are not named are freed.
        """
        known = {scene.path: scene for scene in self._resident}
        with self._stream():
            self._resident = [
                ResidentScene(scene, self._warp_device) if isinstance(scene, Scene) else known[scene]
                for scene in scenes
            ]
            self._scene_table = wp.array(
                [scene.data for scene in self._resident], dtype=kernels.SceneData, device=self._warp_device
            )

    def _stream(self) -> AbstractContextManager[Any]:
        """Makes Warp queue its work behind torch's."""
        if self.device.type == "cpu":
            return nullcontext()
        return wp.ScopedStream(wp.stream_from_torch(torch.cuda.current_stream(self.device)))

    def render(self, scene: Tensor, position: Tensor, yaw: Tensor) -> dict[str, Tensor]:
        """What cameras at these poses see, by sensor name, as :meth:`Simulator.render` describes it.

        Args:
            scene: index of each agent's scene, (N,) int64.
            position: each agent's feet, (N, 3) float32 [m].
            yaw: each agent's heading, (N,) float32 [rad].
        """
        num_agents = len(scene)
        if num_agents:
            lowest, highest = (int(end) for end in scene.aminmax())
            if lowest < 0 or highest >= len(self._resident):
                raise ValueError(
                    f"scenes {lowest}..{highest} are asked for, {len(self._resident)} are resident"
                )
        views: Any = kernels.Views()
        views.scene = wp.from_torch(scene.contiguous(), dtype=wp.int64)
        views.position = wp.from_torch(position.contiguous(), dtype=wp.vec3)
        heading = torch.stack([torch.sin(yaw), torch.cos(yaw)], dim=1)
        views.heading = wp.from_torch(heading, dtype=wp.vec2)
        result: dict[str, Tensor] = {}
        with self._stream():
            for sensors in self._groups.values():
                result |= self._render_group(sensors, views, num_agents)
        return {sensor.name: result[sensor.name] for sensor in self.sensors}

    def _render_group(
        self, sensors: Sequence[SensorSpec], views: kernels.Views, num_agents: int
    ) -> dict[str, Tensor]:
        """Images of sensors that share their rays."""
        spec = sensors[0]
        camera: Any = kernels.Camera()
        camera.height, camera.width = spec.height, spec.width
        camera.step = 2.0 * math.tan(math.radians(spec.hfov_deg) / 2.0) / spec.width
        camera.lift = spec.sensor_height
        camera.sin_pitch = math.sin(math.radians(spec.pitch_deg))
        camera.cos_pitch = math.cos(math.radians(spec.pitch_deg))
        shape = (num_agents, spec.height, spec.width)
        if 3 * math.prod(shape) >= 2**31:
            raise ValueError(f"{shape} pixels are too many for one call; render fewer agents at a time")
        columns, rows = -(-spec.width // self._tile), -(-spec.height // self._tile)
        inverse_depth = torch.empty(shape, device=self.device)
        hit_face = torch.empty(shape, dtype=torch.int32, device=self.device)
        nearness = wp.from_torch(inverse_depth.view(-1))
        face = wp.from_torch(hit_face.view(-1))
        world = [self._scene_table, views, camera]
        # Pixels in one thread: a row on the CPU, where the threads run one after the other.
        span = spec.width if self.device.type == "cpu" else 1

        images: dict[str, Tensor] = {}
        shaders: list[tuple[Any, int, list[Any], list[Any]]] = []
        for sensor in sensors:
            image = torch.empty(
                shape + _CHANNELS[sensor.kind], dtype=_DTYPES[sensor.kind], device=self.device
            )
            flat = wp.from_torch(image.view(-1))
            if sensor.kind == "depth":
                shaders.append((kernels.shade_depth, 1, [], [nearness, face, flat]))
            elif sensor.kind == "normals":
                flat = wp.from_torch(image.view(-1, 3), dtype=wp.vec3)
                shaders.append((kernels.shade_normals, 1, world, [face, flat]))
            elif sensor.kind == "instance":
                shaders.append((kernels.shade_instance, 1, world, [face, flat]))
            else:
                shaders.append((kernels.shade_rgb, span, [*world, span], [nearness, face, flat]))
            images[sensor.name] = image

        def run(start: int, count: int) -> None:
            wp.launch(
                kernels.cast,
                count * columns,
                [*world, self._tile, start * columns, nearness, face],
                device=self._warp_device,
            )
            first = self._first_pixel(start, rows, spec)
            end = self._first_pixel(start + count, rows, spec)
            for kernel, pixels, before, after in shaders:
                wp.launch(kernel, (end - first) // pixels, [*before, first, *after], device=self._warp_device)

        if num_agents:
            self._in_slices(num_agents * rows, inverse_depth.numel(), run)
        return images

    def _first_pixel(self, band: int, rows: int, spec: SensorSpec) -> int:
        """Index of the first pixel of a band, a row of blocks; bands are counted over all agents."""
        agent, row = divmod(band, rows)
        return (agent * spec.height + row * self._tile) * spec.width

    def _in_slices(self, bands: int, rays: int, run: _Run) -> None:
        """Runs bands 0 to ``bands``, on all threads if there is enough to do for them."""
        if self._num_threads == 1 or rays < _FEW_RAYS:
            run(0, bands)
            return
        if self._pool is None or self._pool_process != os.getpid():
            # A forked process inherits the pool, but not its threads.
            self._pool = ThreadPoolExecutor(self._num_threads - 1, thread_name_prefix="render")
            self._pool_process = os.getpid()
        # Two slices a thread even out what takes longer; more would cost more in launches than it saves.
        size = -(-bands // (2 * self._num_threads))
        starts = iter(range(0, bands, size))
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    start = next(starts, -1)
                if start < 0:
                    return
                run(start, min(size, bands - start))

        others = [self._pool.submit(work) for _ in range(self._num_threads - 1)]
        work()
        for other in others:
            other.result()

    def close(self) -> None:
        """Frees scenes and threads; calling it twice is harmless."""
        self._resident = []
        self._scene_table = None
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
