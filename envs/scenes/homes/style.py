"""What a home is made of: one set of materials, drawn from its seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.scenes.homes import textures
from envs.scenes.homes.textures import Rgb, Texture, hsv

_WALL_HUES = (
    (0.10, 0.06, 0.95),  # warm white
    (0.14, 0.18, 0.93),  # cream
    (0.28, 0.16, 0.82),  # sage
    (0.57, 0.20, 0.84),  # blue-grey
    (0.05, 0.28, 0.86),  # apricot
    (0.02, 0.40, 0.72),  # terracotta
    (0.75, 0.13, 0.87),  # lavender
    (0.48, 0.22, 0.80),  # sea green
    (0.13, 0.42, 0.88),  # ochre
    (0.95, 0.14, 0.90),  # rose
    (0.60, 0.38, 0.62),  # slate blue
    (0.00, 0.00, 0.80),  # light grey
)
_WOODS = ((0.075, 0.55, 0.78), (0.06, 0.62, 0.55), (0.05, 0.6, 0.38), (0.09, 0.4, 0.88), (0.03, 0.65, 0.48))
_CLOTH = (
    (0.6, 0.5, 0.55),
    (0.02, 0.6, 0.65),
    (0.3, 0.4, 0.5),
    (0.11, 0.5, 0.85),
    (0.0, 0.0, 0.45),
    (0.8, 0.3, 0.6),
)
_WET = ("kitchen", "bath", "utility")


@dataclass(frozen=True)
class Paint:
    """One material: its texture's pixels and how many metres one repeat covers."""

    pixels: np.ndarray
    """(S, S, 3) uint8."""
    scale: float
    """Metres that one repeat covers."""


class Style:
    """A home's materials by name, and which of them each room has."""

    def __init__(self, rng: np.random.Generator) -> None:
        """Draws the whole set."""
        self.materials: dict[str, Paint] = {}
        self._room_walls: dict[str, str] = {}
        self._room_floors: dict[str, str] = {}
        self._rng = rng
        woods = [_near(rng, _WOODS[i]) for i in rng.permutation(len(_WOODS))[:3]]
        cloths = [_near(rng, _CLOTH[i]) for i in rng.permutation(len(_CLOTH))[:3]]
        self._add("ceiling", textures.plaster, hsv(0.12, 0.03, 0.97), 2.0)
        self._add("trim", textures.plain, hsv(0.1, 0.04, 0.96) if rng.random() < 0.65 else woods[1], 1.0)
        self._add("door", textures.wood, woods[2], 1.0)
        self._add("exterior", textures.brick, _near(rng, (0.03, 0.5, 0.62)), 1.0)
        self._add("wood", textures.wood, woods[0], 1.2)
        self._add("wood_dark", textures.wood, woods[1], 1.2)
        self._add("front", textures.fronts, woods[0] if rng.random() < 0.5 else hsv(0.1, 0.05, 0.93), 1.0)
        kitchen = _WALL_HUES[int(rng.integers(len(_WALL_HUES)))]
        self._add("kitchen_front", textures.fronts, _near(rng, kitchen), 1.0)
        self._add("worktop", textures.stone, hsv(rng.random(), 0.1, rng.choice([0.3, 0.6, 0.9])), 1.0)
        for index, cloth in enumerate(cloths):
            self._add(f"cloth_{index + 1}", textures.fabric, cloth, 0.8)
        self._add("linen", textures.fabric, hsv(rng.random(), 0.05, 0.95), 0.8)
        self._add("white", textures.plain, hsv(0.55, 0.02, 0.96), 1.0)
        self._add("metal", textures.plain, hsv(0.6, 0.05, 0.66), 1.0)
        self._add("dark", textures.plain, hsv(0.6, 0.08, 0.16), 1.0)
        self._add("leaves", textures.leaves, _near(rng, (0.31, 0.6, 0.52)), 0.5)
        self._add("pot", textures.plaster, _near(rng, _WALL_HUES[5]), 0.5)
        self._add("books", textures.books, hsv(0, 0, 1), 1.0)
        self._add("screen", textures.screen, hsv(0, 0, 1), 1.0)
        self._add("mirror", textures.mirror, hsv(0, 0, 1), 1.0)
        for index in range(2):
            self._add(
                f"rug_{index + 1}", textures.rug, _near(rng, _CLOTH[int(rng.integers(len(_CLOTH)))]), 1.0
            )
            self._add(f"view_{index + 1}", textures.view, hsv(0, 0, 1), 1.0)
        for index in range(4):
            frame = woods[index % 3] if index % 2 else hsv(0.1, 0.1, 0.15)
            self._add(f"painting_{index + 1}", textures.painting, frame, 1.0)
        self._floors = self._draw_floors(woods)
        self._walls = self._draw_walls()

    def wall(self, room: str, kind: str) -> str:
        """Material of a room's walls."""
        if room not in self._room_walls:
            names = self._walls["wet" if kind in ("bath", "utility") else "dry"]
            self._room_walls[room] = names[int(self._rng.integers(len(names)))]
        return self._room_walls[room]

    def floor(self, room: str, kind: str) -> str:
        """Material of a room's floor."""
        if room not in self._room_floors:
            group = "wet" if kind in _WET else "soft" if kind in ("bedroom", "study") else "main"
            names = self._floors[group]
            self._room_floors[room] = names[int(self._rng.integers(len(names)))]
        return self._room_floors[room]

    def scale(self, material: str) -> float:
        """Metres that one repeat of a material covers."""
        return self.materials[material].scale

    def _add(self, name: str, texture: Texture, colour: Rgb, scale: float) -> str:
        self.materials[name] = Paint(texture(self._rng, colour), scale)
        return name

    def _draw_floors(self, woods: list[Rgb]) -> dict[str, list[str]]:
        rng = self._rng
        wooden: Texture = textures.planks if rng.random() < 0.7 else textures.parquet
        main = self._add("floor_main", wooden, woods[int(rng.integers(3))], float(rng.uniform(1.0, 1.6)))
        tone = _near(rng, _WALL_HUES[int(rng.integers(len(_WALL_HUES)))])
        tiled: Texture = (textures.tiles, textures.checker, textures.stone)[int(rng.integers(3))]
        wet = self._add("floor_tiles", tiled, tone, float(rng.uniform(1.0, 1.6)))
        bath = self._add("floor_bath", textures.tiles, _near(rng, (rng.random(), 0.15, 0.8)), 1.0)
        carpet = self._add(
            "floor_carpet", textures.carpet, _near(rng, _CLOTH[int(rng.integers(len(_CLOTH)))]), 0.8
        )
        return {"main": [main], "wet": [wet, bath], "soft": [main, carpet, carpet]}

    def _draw_walls(self) -> dict[str, list[str]]:
        rng = self._rng
        dry = []
        for index, pick in enumerate(rng.permutation(len(_WALL_HUES))[:5]):
            tone = _near(rng, _WALL_HUES[pick])
            kinds: list[Texture] = [
                textures.plaster,
                textures.plaster,
                textures.wallpaper,
                textures.wallpaper,
            ]
            kinds.append(textures.brick if rng.random() < 0.5 else textures.panelling)
            scale = float(rng.uniform(0.9, 1.4))
            dry.append(self._add(f"wall_{index + 1}", kinds[index], tone, scale))
        tone = _near(rng, (rng.random(), 0.22, 0.88))
        return {"dry": dry, "wet": [self._add("wall_tiles", textures.tiles, tone, 1.0)]}


def _near(rng: np.random.Generator, colour: tuple[float, float, float]) -> Rgb:
    """A colour close to one given as hue, saturation and value."""
    hue, saturation, value = colour
    return hsv(
        hue + rng.uniform(-0.02, 0.02), saturation * rng.uniform(0.85, 1.15), value * rng.uniform(0.93, 1.05)
    )
