"""Navigation meshes from geometry, with the steps and settings that Habitat uses.

Habitat builds its meshes with Recast Navigation; the same is done here: :mod:`envs.scenes.voxelise` finds the
floor, :mod:`envs.scenes.regions` divides it, :mod:`envs.scenes.outlines` and :mod:`envs.scenes.polygons` turn
the parts into convex polygons, and :mod:`envs.scenes.floor_detail` lets those follow the floor's height.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import astuple
from math import ceil, floor
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from numpy.typing import ArrayLike, NDArray

from envs import files
from envs.scenes.floor_detail import follow_floor
from envs.scenes.gltf import load_scene
from envs.scenes.navmesh import NavMesh, NavMeshSettings
from envs.scenes.navmesh_file import read_navmesh, write_navmesh
from envs.scenes.navmesh_tile import EXTERNAL_EDGE, NavMeshError
from envs.scenes.outlines import trace_outlines
from envs.scenes.polygons import polygonise
from envs.scenes.regions import partition_floor
from envs.scenes.voxelise import VoxelSettings, find_floor
from envs.simulators.base import AgentSpec

_BUILDER_VERSION = 2
"""Part of a cached mesh's key: meshes built by older code with another outcome are built anew."""
_SAME_SIZE = 1e-3
"""Agents whose radius and height differ by less [m] share a navigation mesh."""


def build_navmesh(
    vertices: ArrayLike,
    triangles: ArrayLike,
    agent: AgentSpec,
    cell_size: float = 0.05,
    cell_height: float = 0.2,
) -> NavMesh:
    """Navigation mesh of a scene for an agent.

    Args:
        vertices: Corners (V, 3) [m], world, +Y up.
        triangles: Indices of corners (T, 3), counter-clockwise seen from the front: floor faces up.
        agent: Radius, height, climb and slope.
        cell_size: Size of a voxel on the ground plane [m].
        cell_height: Height of a voxel [m]; climbs are rounded down to it, heights up.

    Raises:
        NavMeshError: The geometry is empty, broken or too large, or the agent can stand nowhere in it.
    """
    if cell_size <= 0 or cell_height <= 0:
        raise NavMeshError(f"cell_size {cell_size} and cell_height {cell_height} must be greater than 0")
    points, faces = _checked_geometry(vertices, triangles)
    settings = NavMeshSettings(
        cell_size=cell_size,
        cell_height=cell_height,
        agent_height=agent.height,
        agent_radius=agent.radius,
        agent_max_climb=agent.max_climb,
        agent_max_slope=agent.max_slope_deg,
    )
    voxels = _voxel_settings(settings)
    ground = find_floor(points, faces, voxels)
    labels = partition_floor(
        ground, min_cells=int(settings.region_min_size**2), merge_cells=int(settings.region_merge_size**2)
    )
    if not labels.any():
        raise NavMeshError(_nowhere_to_stand(points, faces, agent, bool(len(ground.y)), voxels))
    outlines = trace_outlines(
        ground,
        labels,
        max_error=settings.edge_max_error,
        max_length=int(np.float32(settings.edge_max_len) / np.float32(cell_size)),
    )
    mesh = polygonise(outlines)
    if not len(mesh.polygons):
        raise NavMeshError(_nowhere_to_stand(points, faces, agent, bool(len(ground.y)), voxels))
    if len(mesh.polygons) >= EXTERNAL_EDGE or len(mesh.corners) > 0xFFFE:
        raise NavMeshError(
            f"the navigation mesh would have {len(mesh.polygons)} polygons and {len(mesh.corners)} corners, "
            f"more than Detour's {EXTERNAL_EDGE - 1} and {0xFFFE}; take larger voxels than {cell_size} m"
        )
    detail = follow_floor(
        ground,
        labels,
        mesh,
        cell_size=cell_size,
        cell_height=cell_height,
        sample_distance=cell_size * settings.detail_sample_dist,
        max_error=cell_height * settings.detail_sample_max_error,
        search_radius=max(1, ceil(settings.edge_max_error)),
    )
    scale = np.array([cell_size, cell_height, cell_size], dtype=np.float32)
    # Recast's box leaves room for the agent above the highest point.
    top = ground.top + np.array([0, voxels.walkable_height * cell_height, 0], dtype=np.float32)
    return NavMesh.from_polygons(
        settings=settings,
        bounds=np.stack([ground.origin, top]),
        vertices=ground.origin + mesh.corners.astype(np.float32) * scale,
        polygons=mesh.polygons,
        neighbours=mesh.neighbours,
        detail_meshes=detail.meshes,
        detail_vertices=ground.origin + detail.corners,
        detail_triangles=detail.triangles,
    )


def navmesh_for(scene_path: str | Path, agent: AgentSpec, cache_dir: str | Path | None = None) -> NavMesh:
    """Navigation mesh of a scene file for an agent: the one beside it if it fits, else one built and kept.

    A ``X.navmesh`` beside ``X.glb`` is used if it was built for an agent of this radius and height; Habitat
    would use it whatever it was built for. Others are built once and cached, by the contents of the scene and
    its stage config, and the agent.

    Args:
        scene_path: The scene's file.
        agent: Radius, height, climb and slope.
        cache_dir: Folder of built meshes; None takes ``$NAVAGENT_CACHE/navmesh``, or
            ``~/.cache/navagent/navmesh`` where that variable is not set.

    Raises:
        NavMeshError: The mesh beside the scene is broken, or the agent can stand nowhere.
        SceneError: The scene is missing or broken.
    """
    scene_path = Path(scene_path)
    beside = scene_path.with_suffix(".navmesh")
    if beside.is_file():
        mesh = read_navmesh(beside)
        if _fits(mesh.settings, agent):
            return mesh
        warnings.warn(
            f"{beside} was built for an agent of radius {mesh.settings.agent_radius:.3g} m and height "
            f"{mesh.settings.agent_height:.3g} m, this one has radius {agent.radius:.3g} m and height "
            f"{agent.height:.3g} m; a navigation mesh is built from the geometry instead",
            stacklevel=2,
        )
    folder = files.cache_dir() / "navmesh" if cache_dir is None else Path(cache_dir)
    cached = folder / f"{_cache_key(scene_path, agent)}.navmesh"
    if cached.is_file():
        try:
            return read_navmesh(cached)
        except NavMeshError as error:
            warnings.warn(f"building the navigation mesh of {scene_path} anew: {error}", stacklevel=2)
    scene = load_scene(scene_path)
    try:
        mesh = build_navmesh(scene.vertices, scene.ground, agent)
    except NavMeshError as error:
        raise NavMeshError(f"{scene_path}: {error}") from error
    try:
        write_navmesh(mesh, cached)
    except OSError as error:
        # A cache is a convenience: read-only homes and full disks must not stop anybody.
        warnings.warn(f"cannot keep the navigation mesh of {scene_path}: {error}", stacklevel=2)
    return mesh


def _voxel_settings(settings: NavMeshSettings) -> VoxelSettings:
    """Sizes in voxels, rounded in single precision as Habitat rounds them."""
    size, height = np.float32(settings.cell_size), np.float32(settings.cell_height)
    return VoxelSettings(
        cell_size=settings.cell_size,
        cell_height=settings.cell_height,
        walkable_height=ceil(np.float32(settings.agent_height) / height),
        walkable_climb=floor(np.float32(settings.agent_max_climb) / height),
        walkable_radius=ceil(np.float32(settings.agent_radius) / size),
        walkable_slope_deg=settings.agent_max_slope,
    )


def _checked_geometry(
    vertices: ArrayLike, triangles: ArrayLike
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Geometry as arrays, without triangles that have no area."""
    points = np.asarray(vertices, dtype=np.float32).reshape(-1, 3)
    faces = np.asarray(triangles, dtype=np.int32).reshape(-1, 3)
    if not len(faces):
        raise NavMeshError("the scene has no triangles, so there is no floor to walk on")
    if faces.min() < 0 or faces.max() >= len(points):
        raise NavMeshError(
            f"triangle corners {faces.min()} to {faces.max()} must index {len(points)} vertices"
        )
    if not np.isfinite(points[faces]).all():
        bad = int((~np.isfinite(points[faces]).all(axis=(1, 2))).sum())
        raise NavMeshError(f"{bad} of {len(faces)} triangles have corners that are not finite")
    # Habitat lays its voxels from the lowest corner of all triangles, also of those without area.
    used, flat = np.unique(faces, return_inverse=True)
    points, faces = points[used], flat.reshape(-1, 3).astype(np.int32)
    a, b, c = (points[faces[:, k]] for k in range(3))
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows has area, and is too large later on
        faces = faces[(np.cross(b - a, c - a) != 0).any(axis=1)]
    if not len(faces):
        raise NavMeshError("no triangle of the scene has any area, so there is no floor to walk on")
    return points, faces


def _nowhere_to_stand(
    points: NDArray[np.float32],
    faces: NDArray[np.int32],
    agent: AgentSpec,
    any_floor: bool,
    voxels: VoxelSettings,
) -> str:
    """Why there is no navigation mesh, and what to try."""
    a, b, c = (points[faces[:, k]].astype(np.float64) for k in range(3))
    normal = np.cross(b - a, c - a)
    area = np.linalg.norm(normal, axis=1) / 2
    level = area @ (normal[:, 1] > 2 * area * np.cos(np.radians(agent.max_slope_deg)))
    extent = " x ".join(f"{length:.2f}" for length in points.max(axis=0) - points.min(axis=0))
    message = (
        f"the agent (radius {agent.radius} m, height {agent.height} m, climb {agent.max_climb} m, slope "
        f"{agent.max_slope_deg} deg) can stand nowhere in the scene ({extent} m)"
    )
    if any_floor:
        return (
            f"{message}: {level:.1f} m2 face up, but every connected part is less than "
            f"{(20 * voxels.cell_size) ** 2:.1f} m2 once {agent.radius} m from the walls are taken off"
        )
    upward = [area @ (normal[:, axis] > 2 * area * 0.7) for axis in range(3)]
    if level < max(upward[0], upward[2]) / 4:
        return f"{message}: only {level:.1f} m2 face up; is its up axis another? A stage_config.json tells it"
    return (
        f"{message}: {level:.1f} m2 face up, but nowhere with {agent.height} m above and level ground around"
    )


def _fits(settings: NavMeshSettings, agent: AgentSpec) -> bool:
    return (
        abs(settings.agent_radius - agent.radius) < _SAME_SIZE
        and abs(settings.agent_height - agent.height) < _SAME_SIZE
    )


def _cache_key(scene_path: Path, agent: AgentSpec) -> str:
    """Digest of everything that a built mesh depends on."""
    digest = hashlib.sha256()
    body = (agent.radius, agent.height, agent.max_climb, agent.max_slope_deg)
    digest.update(repr((_BUILDER_VERSION, body, astuple(NavMeshSettings()))).encode())
    for path in (scene_path, scene_path.with_suffix(".stage_config.json"), *separate_buffers(scene_path)):
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def separate_buffers(scene_path: Path) -> list[Path]:
    """Files that a ``.gltf`` keeps its geometry in; a ``.glb`` holds its own."""
    if scene_path.suffix.lower() != ".gltf":
        return []
    try:
        buffers = json.loads(scene_path.read_text(encoding="utf-8"))["buffers"]
        uris = [str(buffer["uri"]) for buffer in buffers]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # The scene's reader says what is wrong with it.
    return [scene_path.parent / unquote(uri) for uri in uris if not uri.startswith("data:")]
