"""Procedural homes: furnished, textured houses to navigate, drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from envs.scenes.homes.building import build
from envs.scenes.homes.export import to_glb
from envs.scenes.homes.furnish import furnish
from envs.scenes.homes.layout import Plan, draw_plan, shifted
from envs.scenes.homes.mesh import MeshBuilder, Surface
from envs.scenes.homes.style import Paint, Style

__all__ = ["Home", "generate_home"]


@dataclass(frozen=True)
class Home:
    """One generated home, in the world's frame: metres, +Y up, its middle at the origin."""

    plan: Plan
    """Rooms, openings and stairs."""
    objects: Mapping[str, Mapping[str, Surface]]
    """Geometry by material, by object, such as ``bedroom_1/wardrobe``."""
    materials: Mapping[str, Paint]
    """Textures by name."""

    @property
    def num_triangles(self) -> int:
        """Number of triangles in all."""
        return sum(len(s.triangles) for surfaces in self.objects.values() for s in surfaces.values())

    def geometry(self) -> tuple[np.ndarray, np.ndarray]:
        """Vertices (V, 3) float32 [m] and triangles (T, 3) int32 of everything."""
        surfaces = [s for by_material in self.objects.values() for s in by_material.values()]
        starts = np.cumsum([0] + [len(s.positions) for s in surfaces[:-1]])
        triangles = [
            s.triangles.astype(np.int32) + np.int32(k) for s, k in zip(surfaces, starts, strict=True)
        ]
        return np.concatenate([s.positions for s in surfaces]), np.concatenate(triangles)

    def to_glb(self) -> bytes:
        """The home as a binary glTF 2.0 file."""
        return to_glb(self.objects, self.materials)


def generate_home(seed: int | tuple[int, ...], rooms: int = 5, floors: int = 1) -> Home:
    """Draws a home; the same arguments give the same home.

    Args:
        seed: one number or several.
        rooms: 1 (a studio) to 10 rooms; halls, and some bathrooms of two-storey homes, come on top.
        floors: 1, or 2 joined by stairs (at least 5 rooms).

    Raises:
        ValueError: rooms or floors out of range.
    """
    # One stream for each stage, so that a change to one leaves the others as they are.
    for_plan, for_style, for_building, for_furniture = (
        np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4)
    )
    plan = draw_plan(rooms, floors, for_plan)
    plan = shifted(plan, *plan.outline.centre)
    style = Style(for_style)
    azimuth = float(for_building.uniform(0, 2 * math.pi))
    mesh = MeshBuilder(light=(0.55 * math.cos(azimuth), 0.8, 0.55 * math.sin(azimuth)))
    build(plan, style, mesh, for_building)
    furnish(plan, mesh, for_furniture)
    return Home(plan, mesh.objects(), style.materials)
