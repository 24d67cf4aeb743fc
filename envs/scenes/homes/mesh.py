"""Coloured, textured polygons, gathered by object and material."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Colour = tuple[float, float, float]
Point = tuple[float, float, float]
WHITE: Colour = (1.0, 1.0, 1.0)
_Face = tuple[Sequence[Sequence[float]], Sequence[Sequence[float]], Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Surface:
    """Triangles of one object that share a material."""

    positions: np.ndarray
    """(V, 3) float32, world [m]."""
    uvs: np.ndarray
    """(V, 2) float32."""
    colors: np.ndarray
    """(V, 4) uint8, multiplied with the texture."""
    triangles: np.ndarray
    """(T, 3) uint32 into the vertices."""


class MeshBuilder:
    """Collects faces in a local frame, shades them and files them under the current object.

    There are no lights where these scenes are seen, so shape has to show in the colours: every face is
    darkened by its direction to one soft light, and furniture and walls get darker towards the floor and the
    corners.
    """

    def __init__(self, light: Sequence[float] = (0.35, 0.85, 0.4)) -> None:
        """Starts empty.

        Args:
            light: direction towards the light, any length.
        """
        length = math.sqrt(sum(v * v for v in light))
        self._light = (light[0] / length, light[1] / length, light[2] / length)
        self._faces: dict[str, dict[str, list[_Face]]] = {}
        self._current: dict[str, list[_Face]] = {}
        self._turn = (1.0, 0.0)
        self._origin: Point = (0.0, 0.0, 0.0)

    def start(self, name: str, origin: Sequence[float] = (0.0, 0.0, 0.0), yaw: float = 0.0) -> None:
        """Begins an object: what follows is in its frame, at ``origin`` [m] and turned by ``yaw`` [rad].

        A name that was used before gets a number.
        """
        unique, number = name, 2
        while unique in self._faces:
            unique, number = f"{name}_{number}", number + 1
        self._current = self._faces.setdefault(unique, {})
        # Rounded, so that quarter turns are exact.
        self._turn = (round(math.cos(yaw), 12), round(math.sin(yaw), 12))
        self._origin = (origin[0], origin[1], origin[2])

    def face(
        self,
        corners: Sequence[Sequence[float]],
        material: str,
        uvs: Sequence[Sequence[float]],
        shade: Sequence[float] | float | None = None,
        tint: Colour = WHITE,
    ) -> None:
        """Adds a convex polygon, counter-clockwise as seen from outside.

        Args:
            corners: (K, 3) points in the object's frame [m].
            material: its material's name.
            uvs: (K, 2) texture coordinates.
            shade: brightness of each corner; by default darker within 0.4 m of the floor.
            tint: colour that multiplies the texture.
        """
        # Plain arithmetic: faces are small and many, and numpy's overhead would take most of the time.
        (c, s), (ox, oy, oz) = self._turn, self._origin
        world = [(c * x + s * z + ox, y + oy, c * z - s * x + oz) for x, y, z in corners]
        (ax, ay, az), (bx, by, bz), (dx, dy, dz) = world[:3]
        ux, uy, uz, vx, vy, vz = bx - ax, by - ay, bz - az, dx - ax, dy - ay, dz - az
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        length = math.sqrt(nx * nx + ny * ny + nz * nz)
        if length < 1e-12:
            return
        bright = self.facing((nx / length, ny / length, nz / length))
        if shade is None:
            shades = [0.8 + 0.2 * min(max(y / 0.4, 0.0), 1.0) for _, y, _ in corners]
        else:
            shades = [shade] * len(world) if isinstance(shade, int | float) else list(shade)
        levels = [min(max(bright * value, 0.0), 1.0) for value in shades]
        colors = [(level * tint[0], level * tint[1], level * tint[2], 1.0) for level in levels]
        self._current.setdefault(material, []).append((world, uvs, colors))

    def facing(self, normal: Point) -> float:
        """Brightness of a surface with this unit normal: 0.62 facing away from the light to 1 towards it."""
        (nx, ny, nz), (lx, ly, lz) = normal, self._light
        return 0.62 + 0.38 * (0.5 + 0.5 * (nx * lx + ny * ly + nz * lz))

    def box(
        self,
        lo: Sequence[float],
        hi: Sequence[float],
        material: str,
        tint: Colour = WHITE,
        scale: float = 1.0,
        skip: str = "",
        stretch: bool = False,
    ) -> None:
        """Adds an axis-aligned box.

        Args:
            lo: its lowest corner, in the object's frame [m].
            hi: its highest corner [m].
            material: its material's name.
            tint: colour that multiplies the texture.
            scale: metres that one repeat of the texture covers.
            skip: faces to leave out, of ``xXyYzZ`` (lower case is the low side).
            stretch: show the whole texture once on every face instead.
        """
        (x0, y0, z0), (x1, y1, z1) = lo, hi
        faces = {
            "x": ([(x0, y0, z0), (x0, y0, z1), (x0, y1, z1), (x0, y1, z0)], 2, 1),
            "X": ([(x1, y0, z1), (x1, y0, z0), (x1, y1, z0), (x1, y1, z1)], 2, 1),
            "y": ([(x0, y0, z0), (x1, y0, z0), (x1, y0, z1), (x0, y0, z1)], 0, 2),
            "Y": ([(x0, y1, z1), (x1, y1, z1), (x1, y1, z0), (x0, y1, z0)], 0, 2),
            "z": ([(x1, y0, z0), (x0, y0, z0), (x0, y1, z0), (x1, y1, z0)], 0, 1),
            "Z": ([(x0, y0, z1), (x1, y0, z1), (x1, y1, z1), (x0, y1, z1)], 0, 1),
        }
        unit = [(0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)]
        for key, (corners, u, v) in faces.items():
            if key not in skip:
                uvs = unit if stretch else [(c[u] / scale, -c[v] / scale) for c in corners]
                self.face(corners, material, uvs, tint=tint)

    def prism(
        self,
        centre: tuple[float, float],
        y0: float,
        y1: float,
        r0: float,
        r1: float,
        material: str,
        sides: int = 8,
        tint: Colour = WHITE,
    ) -> None:
        """Adds an upright prism, cone or cup: radius ``r0`` at height ``y0``, ``r1`` at ``y1`` [m]."""
        angles = [2 * math.pi * k / sides for k in range(sides)]
        x, z = centre
        low = [(x + r0 * math.sin(a), y0, z + r0 * math.cos(a)) for a in angles]
        high = [(x + r1 * math.sin(a), y1, z + r1 * math.cos(a)) for a in angles]
        for k in range(sides):
            n = (k + 1) % sides
            u0, u1 = 2 * k / sides, 2 * (k + 1) / sides
            corners, uvs = [low[k], low[n], high[n], high[k]], [(u0, 1.0), (u1, 1.0), (u1, 0.0), (u0, 0.0)]
            if r0 < 1e-6:
                corners, uvs = [low[k], high[n], high[k]], [uvs[0], uvs[2], uvs[3]]
            elif r1 < 1e-6:
                corners, uvs = [low[k], low[n], high[k]], [uvs[0], uvs[1], uvs[3]]
            self.face(corners, material, uvs, tint=tint)
        for ring, radius in ((high, r1), (low[::-1], r0)):
            if radius > 1e-6:
                self.face(ring, material, [(p[0] - x + 0.5, p[2] - z + 0.5) for p in ring], tint=tint)

    def objects(self) -> dict[str, dict[str, Surface]]:
        """Every object's surfaces by material, in the order they were begun."""
        return {
            name: {material: _merge(faces) for material, faces in by_material.items()}
            for name, by_material in self._faces.items()
            if by_material
        }


def _merge(faces: list[_Face]) -> Surface:
    triangles: list[tuple[int, int, int]] = []
    start = 0
    for world, _, _ in faces:
        triangles += [(start, start + k, start + k + 1) for k in range(1, len(world) - 1)]
        start += len(world)
    colors = np.array([value for face in faces for value in face[2]])
    return Surface(
        positions=np.array([point for face in faces for point in face[0]], np.float32),
        uvs=np.array([uv for face in faces for uv in face[1]], np.float32),
        colors=np.round(colors * 255.0).astype(np.uint8),
        triangles=np.array(triangles, np.uint32),
    )
