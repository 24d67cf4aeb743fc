"""Furniture: every piece a function that builds it out of boxes and prisms.

A piece is built in its own frame: its back stands at ``z = 0`` and it looks along +z, it is centred on
``x = 0``, and its feet are at ``y = 0``. ``size`` is its width, depth and height [m].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from envs.scenes.homes.mesh import Colour, MeshBuilder

Size = tuple[float, float, float]
Build = Callable[[MeshBuilder, np.random.Generator, Size], None]


@dataclass(frozen=True)
class Piece:
    """A kind of furniture: how large it may be and what builds it."""

    build: Build
    width: tuple[float, float]
    depth: tuple[float, float]
    height: tuple[float, float]
    front: float = 0.0
    """Free depth that it needs before it [m]."""

    def draw_size(self, rng: np.random.Generator) -> Size:
        """A width, depth and height [m] within its ranges."""
        w, d, h = (round(float(rng.uniform(*span)), 2) for span in (self.width, self.depth, self.height))
        return w, d, h


def _cloth(rng: np.random.Generator) -> str:
    return f"cloth_{int(rng.integers(3)) + 1}"


def _wood(rng: np.random.Generator) -> str:
    return "wood" if rng.random() < 0.6 else "wood_dark"


def _tone(rng: np.random.Generator, low: float = 0.75) -> Colour:
    r, g, b = (float(v) for v in rng.uniform(low, 1.0, 3))
    return r, g, b


def _legs(
    mesh: MeshBuilder, x: float, z0: float, z1: float, height: float, thick: float, material: str
) -> None:
    for sx in (-x, x - thick):
        for z in (z0, z1 - thick):
            mesh.box((sx, 0, z), (sx + thick, height, z + thick), material, skip="Yy")


def table(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A table with four legs; often something stands on it."""
    w, d, h = size
    wood = _wood(rng)
    _legs(mesh, w / 2 - 0.04, 0.04, d - 0.04, h - 0.04, 0.06, wood)
    mesh.box((-w / 2, h - 0.045, 0), (w / 2, h, d), wood)
    if rng.random() < 0.7:
        mesh.prism((0, d / 2), h, h + 0.12, 0.06, 0.13, "pot", 8, _tone(rng))


def chair(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A dining chair, looking along +z."""
    w, d, h = size
    wood = _wood(rng)
    _legs(mesh, w / 2, 0.0, d, 0.43, 0.045, wood)
    mesh.box((-w / 2, 0.43, 0), (w / 2, 0.48, d), _cloth(rng) if rng.random() < 0.5 else wood)
    mesh.box((-w / 2, 0.48, 0), (-w / 2 + 0.045, h, 0.045), wood)
    mesh.box((w / 2 - 0.045, 0.48, 0), (w / 2, h, 0.045), wood)
    mesh.box((-w / 2 + 0.045, h - 0.3, 0.005), (w / 2 - 0.045, h, 0.035), wood)


def dining_set(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A table with chairs pushed in along both long sides, all within ``size``."""
    w, d, h = size
    reach = 0.36  # how far a chair stands out from under the table
    wood = _wood(rng)
    z0, z1 = reach, d - reach
    _legs(mesh, w / 2 - 0.05, z0 + 0.05, z1 - 0.05, h - 0.045, 0.07, wood)
    mesh.box((-w / 2, h - 0.045, z0), (w / 2, h, z1), wood)
    mesh.prism((0, d / 2), h, h + 0.1, 0.05, 0.15, "pot", 8, _tone(rng))
    seats = max(1, int(w / 0.62))
    seat_wood, cover = _wood(rng), _cloth(rng)
    for k in range(seats):
        x = -w / 2 + w * (k + 0.5) / seats
        for back, away in ((0.02, 1.0), (d - 0.02, -1.0)):
            lo, hi = sorted((back, back + away * 0.42))
            _legs_at(mesh, x - 0.2, x + 0.2, lo, hi, 0.43, seat_wood)
            mesh.box((x - 0.21, 0.43, lo), (x + 0.21, 0.475, hi), cover)
            b0, b1 = sorted((back, back + away * 0.04))
            mesh.box((x - 0.21, 0.475, b0), (x + 0.21, 0.92, b1), seat_wood)


def _legs_at(
    mesh: MeshBuilder, x0: float, x1: float, z0: float, z1: float, height: float, material: str
) -> None:
    for x in (x0, x1 - 0.04):
        for z in (z0, z1 - 0.04):
            mesh.box((x, 0, z), (x + 0.04, height, z + 0.04), material, skip="Yy")


def sofa(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A sofa or armchair with arms and cushions."""
    w, d, h = size
    cover = _cloth(rng)
    arm = 0.16
    mesh.box((-w / 2 + 0.02, 0.05, 0.02), (w / 2 - 0.02, 0.3, d - 0.02), cover, (0.9, 0.9, 0.9))
    mesh.box((-w / 2, 0.05, 0), (w / 2, h, 0.2), cover)
    for x in (-w / 2, w / 2 - arm):
        mesh.box((x, 0.05, 0.2), (x + arm, 0.58, d), cover)
    seats = max(1, round((w - 2 * arm) / 0.68))
    step = (w - 2 * arm) / seats
    tone = _tone(rng, 0.85)
    for k in range(seats):
        x = -w / 2 + arm + k * step
        mesh.box((x + 0.01, 0.3, 0.2), (x + step - 0.01, 0.44, d - 0.01), cover, tone)
        mesh.box((x + 0.03, 0.44, 0.2), (x + step - 0.03, h - 0.08, 0.34), cover, tone)


def bed(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A bed, headboard at the back."""
    w, d, h = size
    wood, cover = _wood(rng), _cloth(rng)
    mesh.box((-w / 2, 0, 0), (w / 2, h, 0.07), wood if rng.random() < 0.6 else cover)
    mesh.box((-w / 2, 0.08, 0.07), (w / 2, 0.3, d), wood)
    mesh.box((-w / 2 + 0.03, 0.3, 0.08), (w / 2 - 0.03, 0.5, d - 0.03), "linen")
    start = d * float(rng.uniform(0.3, 0.45))
    mesh.box((-w / 2 + 0.01, 0.22, start), (w / 2 - 0.01, 0.55, d - 0.01), cover)
    pillows = 2 if w > 1.2 else 1
    for k in range(pillows):
        x = -w / 2 + w * (k + 0.5) / pillows
        mesh.box((x - 0.29, 0.5, 0.14), (x + 0.29, 0.63, 0.52), "linen", (0.93, 0.95, 1.0))


def _fronts(
    mesh: MeshBuilder,
    x0: float,
    x1: float,
    y0: float,
    y1: float,
    z: float,
    columns: int,
    rows: int,
    material: str,
) -> None:
    """Doors or drawers on a front plane."""
    unit = [(0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)]
    for i in range(columns):
        for j in range(rows):
            a, b = x0 + (x1 - x0) * i / columns, x0 + (x1 - x0) * (i + 1) / columns
            c, d = y0 + (y1 - y0) * j / rows, y0 + (y1 - y0) * (j + 1) / rows
            mesh.face([(a, c, z), (b, c, z), (b, d, z), (a, d, z)], material, unit)


def cabinet(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """Anything with doors or drawers: chest, sideboard, wardrobe, nightstand."""
    w, d, h = size
    wood = _wood(rng)
    mesh.box((-w / 2, 0.06, 0), (w / 2, h, d - 0.02), wood, skip="Z")
    mesh.box((-w / 2 + 0.02, 0, 0.02), (w / 2 - 0.02, 0.06, d - 0.06), "dark", skip="yY")
    if h > 1.4:
        columns, rows = max(1, round(w / 0.5)), 1
    else:
        columns, rows = max(1, round(w / 0.7)), max(1, round(h / 0.28))
    _fronts(mesh, -w / 2, w / 2, 0.06, h, d - 0.02, columns, rows, "front")
    mesh.box((-w / 2 - 0.01, h, 0), (w / 2 + 0.01, h + 0.03, d), wood)
    if h < 1.2 and rng.random() < 0.5:
        x = float(rng.uniform(-0.3, 0.3)) * w
        mesh.prism((x, d / 2), h + 0.03, h + 0.25, 0.05, 0.08, "pot", 6, _tone(rng))


def bookshelf(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """An open shelf with rows of books."""
    w, d, h = size
    wood = _wood(rng)
    t = 0.03
    mesh.box((-w / 2, 0, 0), (-w / 2 + t, h, d), wood)
    mesh.box((w / 2 - t, 0, 0), (w / 2, h, d), wood)
    mesh.box((-w / 2 + t, 0, 0), (w / 2 - t, h, 0.02), wood, (0.75, 0.75, 0.75))
    boards = max(2, round(h / 0.36))
    for k in range(boards + 1):
        y = (h - t) * k / boards
        mesh.box((-w / 2 + t, y, 0.02), (w / 2 - t, y + t, d), wood)
        if k < boards and rng.random() < 0.85:
            inner = w - 2 * t - 0.02
            long = inner * float(rng.uniform(0.55, 1.0))
            top = y + t + (h - t) / boards * 0.82
            x0 = -w / 2 + t + 0.01
            unit = [(0.0, 1.0), (long / 0.9, 1.0), (long / 0.9, 0.0), (0.0, 0.0)]
            front = d - 0.05
            corners = [
                (x0, y + t, front),
                (x0 + long, y + t, front),
                (x0 + long, top, front),
                (x0, top, front),
            ]
            mesh.face(corners, "books", unit)
            mesh.box((x0, y + t, 0.03), (x0 + long, top - 0.02, front - 0.01), "dark", skip="yzZ")


def desk(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A desk with a drawer block, a monitor and a lamp."""
    w, d, h = size
    wood = _wood(rng)
    mesh.box((-w / 2, h - 0.04, 0), (w / 2, h, d), wood)
    side = 1.0 if rng.random() < 0.5 else -1.0
    x0, x1 = sorted((side * (w / 2 - 0.02), side * (w / 2 - 0.42)))
    mesh.box((x0, 0, 0.05), (x1, h - 0.04, d - 0.05), wood, skip="Z")
    _fronts(mesh, x0, x1, 0, h - 0.04, d - 0.05, 1, 3, "front")
    for z in (0.05, d - 0.1):
        x = -side * (w / 2 - 0.06)
        mesh.box((x - 0.03, 0, z), (x + 0.03, h - 0.04, z + 0.05), wood)
    _screen(mesh, -side * 0.1 * w, h, 0.18, 0.5, 0.3)


def _screen(mesh: MeshBuilder, x: float, y: float, z: float, w: float, h: float) -> None:
    mesh.box((x - 0.1, y, z - 0.06), (x + 0.1, y + 0.02, z + 0.1), "dark")
    mesh.box((x - 0.02, y + 0.02, z - 0.02), (x + 0.02, y + 0.1, z), "dark")
    mesh.box((x - w / 2, y + 0.08, z), (x + w / 2, y + 0.08 + h, z + 0.03), "dark", skip="Z")
    front = z + 0.03
    corners = [(x - w / 2, y + 0.08, front), (x + w / 2, y + 0.08, front)]
    corners += [(x + w / 2, y + 0.08 + h, front), (x - w / 2, y + 0.08 + h, front)]
    mesh.face(corners, "screen", [(0, 1), (1, 1), (1, 0), (0, 0)], shade=1.0)


def television(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A low board with a television on it."""
    w, d, h = size
    low = 0.45
    cabinet(mesh, np.random.default_rng(int(rng.integers(2**31))), (w, d, low - 0.03))
    _screen(mesh, 0, low, d / 2, min(w * 0.8, 1.3), h - low - 0.08)


def plant(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A potted plant."""
    w, _, h = size
    r = w / 2
    mesh.prism((0, r), 0, 0.32, r * 0.5, r * 0.7, "pot", 8, _tone(rng))
    if rng.random() < 0.5:
        for k in range(3):
            y = 0.3 + (h - 0.3) * k / 3.2
            mesh.prism((0, r), y, y + (h - 0.3) * 0.5, r * (1 - 0.25 * k), 0.0, "leaves", 7, _tone(rng, 0.85))
        return
    mesh.prism((0, r), 0.3, h * 0.6, 0.03, 0.03, "wood_dark", 5)
    for _ in range(5):
        x, z = (float(v) for v in rng.uniform(-0.45, 0.45, 2) * r)
        y = float(rng.uniform(0.5, 0.8)) * h
        tone = _tone(rng, 0.8)
        mesh.prism((x, r + z), y - 0.16, y, 0.0, r * 0.55, "leaves", 6, tone)
        mesh.prism((x, r + z), y, y + 0.2 * h, r * 0.55, 0.0, "leaves", 6, tone)


def floor_lamp(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A standing lamp."""
    w, _, h = size
    r = w / 2
    mesh.prism((0, r), 0, 0.03, r * 0.8, r * 0.75, "metal", 10)
    mesh.prism((0, r), 0.03, h - 0.3, 0.015, 0.015, "metal", 5)
    mesh.prism(
        (0, r), h - 0.34, h, r, r * 0.65, "linen", 10, (1.0, 0.93, 0.75) if rng.random() < 0.7 else _tone(rng)
    )


def kitchen(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A kitchen run: fridge, base cupboards with sink and hob, wall cupboards and a hood."""
    w, d, h = size
    fridge = 0.62 if w > 2.1 else 0.0
    x0 = -w / 2 + fridge
    if fridge:
        tone = (1.0, 1.0, 1.0) if rng.random() < 0.5 else (0.45, 0.47, 0.5)
        mesh.box((-w / 2, 0, 0), (x0 - 0.02, 1.82, d + 0.02), "white", tone)
        mesh.box((-w / 2 + 0.03, 0.65, d + 0.02), (x0 - 0.05, 0.67, d + 0.025), "dark")
        mesh.box((x0 - 0.1, 0.75, d + 0.02), (x0 - 0.08, 1.25, d + 0.05), "metal")
    mesh.box((x0, 0.1, 0), (w / 2, 0.88, d - 0.03), "kitchen_front", skip="Z")
    mesh.box((x0, 0, 0), (w / 2, 0.1, d - 0.08), "dark", skip="yY")
    columns = max(2, round((w - fridge) / 0.6))
    _fronts(mesh, x0, w / 2, 0.1, 0.88, d - 0.03, columns, 1, "kitchen_front")
    mesh.box((x0, 0.88, 0), (w / 2, 0.92, d), "worktop")
    cell = (w / 2 - x0) / columns
    hob = x0 + cell * (int(rng.integers(columns)) + 0.5)
    sink = x0 + cell * ((round((hob - x0) / cell - 0.5) + columns // 2) % columns + 0.5)
    mesh.box((hob - 0.26, 0.92, 0.06), (hob + 0.26, 0.93, d - 0.08), "dark")
    mesh.box((sink - 0.25, 0.92, 0.08), (sink + 0.25, 0.925, d - 0.12), "metal", (0.8, 0.85, 0.9))
    mesh.prism((sink, 0.06), 0.92, 1.16, 0.015, 0.015, "metal", 5)
    mesh.box((sink - 0.012, 1.15, 0.06), (sink + 0.012, 1.17, 0.24), "metal")
    top = min(h, 2.15)
    if h > 1.5:
        for k in range(columns):
            a, b = x0 + cell * k, x0 + cell * (k + 1)
            if a < hob < b:
                mesh.box((hob - 0.25, 1.6, 0), (hob + 0.25, 1.72, 0.45), "metal")
                mesh.box((hob - 0.12, 1.72, 0), (hob + 0.12, top, 0.25), "metal")
                continue
            mesh.box((a, 1.45, 0), (b, top, 0.33), "kitchen_front", skip="Z")
            _fronts(mesh, a, b, 1.45, top, 0.33, 1, 1, "kitchen_front")


def bathtub(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A bathtub, long side to the wall."""
    w, d, h = size
    rim = 0.07
    mesh.box((-w / 2, 0, 0), (w / 2, h, rim), "white")
    mesh.box((-w / 2, 0, d - rim), (w / 2, h, d), "white")
    mesh.box((-w / 2, 0, rim), (-w / 2 + rim, h, d - rim), "white", skip="zZ")
    mesh.box((w / 2 - rim, 0, rim), (w / 2, h, d - rim), "white", skip="zZ")
    mesh.box((-w / 2 + rim, 0.0, rim), (w / 2 - rim, 0.18, d - rim), "white", (0.75, 0.85, 0.9), skip="yxXzZ")
    mesh.prism((w / 2 - 0.16, rim / 2), h, h + 0.16, 0.02, 0.02, "metal", 6)
    del rng


def toilet(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A toilet with its cistern."""
    w, d, h = size
    mesh.box((-w / 2, 0.38, 0), (w / 2, h, 0.18), "white")
    mesh.box((-w * 0.3, 0, 0.05), (w * 0.3, 0.36, d * 0.75), "white", (0.95, 0.95, 0.95))
    mesh.prism((0, d - w * 0.55), 0.2, 0.38, w * 0.35, w * 0.5, "white", 8)
    lid = (0.95, 0.95, 0.97) if rng.random() < 0.7 else _tone(rng, 0.5)
    mesh.prism((0, d - w * 0.55), 0.38, 0.42, w * 0.5, w * 0.48, "white", 8, lid)


def washbasin(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A washbasin on a cupboard, with a mirror above."""
    w, d, h = size
    mesh.box((-w / 2, 0.15, 0), (w / 2, 0.78, d - 0.05), "front", skip="Z")
    _fronts(mesh, -w / 2, w / 2, 0.15, 0.78, d - 0.05, 2 if w > 0.7 else 1, 1, "front")
    mesh.box((-w / 2 - 0.01, 0.78, 0), (w / 2 + 0.01, 0.88, d), "white")
    mesh.box((-w / 2 + 0.1, 0.88, 0.12), (w / 2 - 0.1, 0.885, d - 0.06), "white", (0.7, 0.78, 0.82))
    mesh.prism((0, 0.07), 0.88, 1.02, 0.02, 0.02, "metal", 6)
    mesh.box((-w * 0.42, 1.15, 0), (w * 0.42, max(h, 1.8), 0.03), "metal", skip="Z")
    corners = [(-w * 0.42, 1.15, 0.03), (w * 0.42, 1.15, 0.03), (w * 0.42, max(h, 1.8), 0.03)]
    mesh.face([*corners, (-w * 0.42, max(h, 1.8), 0.03)], "mirror", [(0, 1), (1, 1), (1, 0), (0, 0)])
    del rng


def shower(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A shower tray with a frosted screen and a head."""
    w, d, h = size
    mesh.box((-w / 2, 0, 0), (w / 2, 0.12, d), "white")
    mesh.box((-w / 2, 0.12, d - 0.03), (w / 2, h, d), "mirror", scale=0.8)
    mesh.prism((w * 0.3, 0.05), 0.12, 2.0, 0.015, 0.015, "metal", 5)
    mesh.prism((w * 0.3, 0.16), 1.96, 2.0, 0.11, 0.03, "metal", 8)
    del rng


def washing_machine(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A washing machine or dryer."""
    w, d, h = size
    mesh.box((-w / 2, 0, 0), (w / 2, h, d), "white")
    mesh.box((-w / 2 + 0.02, h - 0.13, d), (w / 2 - 0.02, h - 0.02, d + 0.005), "metal")
    ring = [(0.2 * np.sin(a), 0.42 + 0.2 * np.cos(a), d + 0.004) for a in -np.arange(10) * np.pi / 5]
    mesh.face(
        ring, "screen" if rng.random() < 0.5 else "dark", [(p[0] + 0.5, 0.5 - p[1]) for p in ring], shade=1.0
    )


def shelf_rack(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A storage rack with boxes."""
    w, d, h = size
    for x in (-w / 2, w / 2 - 0.04):
        for z in (0.0, d - 0.04):
            mesh.box((x, 0, z), (x + 0.04, h, z + 0.04), "metal")
    for k in range(4):
        y = 0.1 + (h - 0.15) * k / 3
        mesh.box((-w / 2, y, 0), (w / 2, y + 0.03, d), "metal")
        if k < 3:
            x = -w / 2 + 0.06
            while x < w / 2 - 0.35:
                long, tall = float(rng.uniform(0.22, 0.4)), float(rng.uniform(0.18, 0.38))
                if rng.random() < 0.75:
                    mesh.box(
                        (x, y + 0.03, 0.04), (x + long, y + 0.03 + tall, d - 0.06), _cloth(rng), _tone(rng)
                    )
                x += long + 0.08


def coat_stand(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A coat stand with coats on it."""
    w, _, h = size
    r = w / 2
    mesh.prism((0, r), 0, 0.04, r * 0.9, r * 0.8, "wood_dark", 8)
    mesh.prism((0, r), 0.04, h, 0.025, 0.02, "wood_dark", 6)
    mesh.prism((0, r), 0.75, h - 0.12, r * 0.8, 0.06, _cloth(rng), 7, _tone(rng))


def rug(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A rug, flat on the floor."""
    w, d, h = size
    material = f"rug_{int(rng.integers(2)) + 1}"
    corners = [(-w / 2, h, d), (w / 2, h, d), (w / 2, h, 0), (-w / 2, h, 0)]
    mesh.face(corners, material, [(0, 1), (1, 1), (1, 0), (0, 0)], shade=0.97)
    mesh.box((-w / 2, 0, 0), (w / 2, h, d), "dark", skip="yY")


def ceiling_lamp(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A lamp that hangs from the ceiling; ``y = 0`` is the ceiling."""
    w, _, h = size
    mesh.prism((0, 0), -h, 0, 0.012, 0.012, "dark", 4)
    tone = (1.0, 0.95, 0.8) if rng.random() < 0.6 else _tone(rng, 0.6)
    if rng.random() < 0.5:
        mesh.prism((0, 0), -h - 0.18, -h, w / 2, w / 5, "linen", 9, tone)
    else:
        mesh.prism((0, 0), -h - 0.14, -h, w / 5, w / 2, "white", 9, tone)


def picture(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A framed picture on the wall."""
    w, d, h = size
    mesh.box((-w / 2, 0, 0), (w / 2, h, d), "dark", skip="Zz")
    corners = [(-w / 2, 0, d), (w / 2, 0, d), (w / 2, h, d), (-w / 2, h, d)]
    material = f"painting_{int(rng.integers(4)) + 1}"
    mesh.face(corners, material, [(0, 1), (1, 1), (1, 0), (0, 0)], shade=1.0)


def radiator(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """A ribbed radiator, under a window."""
    w, d, h = size
    ribs = max(3, int(w / 0.14))
    for k in range(ribs):
        x = -w / 2 + w * k / ribs
        mesh.box((x + 0.015, 0.12, 0.02), (x + w / ribs - 0.015, h, d), "white", skip="z")
    mesh.box((-w / 2, 0.16, 0.03), (w / 2, h - 0.05, d - 0.03), "white", (0.85, 0.85, 0.85), skip="z")
    del rng


def curtain(mesh: MeshBuilder, rng: np.random.Generator, size: Size) -> None:
    """One side of a pair of curtains, in three folds."""
    w, d, h = size
    cover = "linen" if rng.random() < 0.4 else _cloth(rng)
    for k in range(3):
        x = -w / 2 + w * k / 3
        deep = d if k % 2 else d * 0.6
        mesh.box((x, 0.0, 0.0), (x + w / 3, h, deep), cover, scale=0.5)


PIECES: dict[str, Piece] = {
    "dining_set": Piece(dining_set, (1.2, 2.0), (1.5, 1.75), (0.73, 0.77)),
    "table": Piece(table, (0.8, 1.2), (0.6, 0.8), (0.72, 0.77)),
    "coffee_table": Piece(table, (0.8, 1.2), (0.5, 0.65), (0.38, 0.46)),
    "chair": Piece(chair, (0.42, 0.48), (0.44, 0.5), (0.85, 1.0)),
    "sofa": Piece(sofa, (1.7, 2.4), (0.85, 0.95), (0.78, 0.9), front=0.5),
    "armchair": Piece(sofa, (0.85, 1.0), (0.8, 0.9), (0.8, 0.95), front=0.4),
    "double_bed": Piece(bed, (1.5, 1.85), (2.0, 2.15), (0.85, 1.15), front=0.4),
    "single_bed": Piece(bed, (0.9, 1.1), (1.95, 2.1), (0.75, 1.0), front=0.3),
    "nightstand": Piece(cabinet, (0.4, 0.5), (0.36, 0.42), (0.45, 0.55)),
    "chest": Piece(cabinet, (0.8, 1.2), (0.42, 0.5), (0.75, 1.05), front=0.4),
    "sideboard": Piece(cabinet, (1.2, 1.8), (0.4, 0.46), (0.75, 0.9), front=0.4),
    "wardrobe": Piece(cabinet, (1.0, 2.0), (0.55, 0.62), (1.95, 2.2), front=0.5),
    "shoe_cabinet": Piece(cabinet, (0.6, 1.0), (0.25, 0.32), (0.8, 1.1), front=0.5),
    "bookshelf": Piece(bookshelf, (0.8, 1.4), (0.28, 0.35), (1.4, 2.1), front=0.4),
    "desk": Piece(desk, (1.1, 1.5), (0.6, 0.7), (0.72, 0.76), front=0.5),
    "television": Piece(television, (1.2, 1.8), (0.4, 0.46), (1.15, 1.35), front=0.4),
    "plant": Piece(plant, (0.4, 0.6), (0.4, 0.6), (0.8, 1.6)),
    "floor_lamp": Piece(floor_lamp, (0.34, 0.42), (0.34, 0.42), (1.5, 1.75)),
    "kitchen": Piece(kitchen, (2.4, 3.6), (0.62, 0.66), (2.1, 2.15), front=0.7),
    "kitchenette": Piece(kitchen, (1.8, 2.3), (0.62, 0.66), (2.1, 2.15), front=0.7),
    "bathtub": Piece(bathtub, (1.5, 1.7), (0.7, 0.78), (0.54, 0.6), front=0.4),
    "shower": Piece(shower, (0.85, 1.0), (0.85, 0.95), (1.9, 2.0), front=0.4),
    "toilet": Piece(toilet, (0.36, 0.4), (0.62, 0.7), (0.78, 0.9), front=0.4),
    "washbasin": Piece(washbasin, (0.55, 0.9), (0.45, 0.5), (1.8, 1.95), front=0.5),
    "washing_machine": Piece(washing_machine, (0.6, 0.62), (0.58, 0.62), (0.85, 0.88), front=0.4),
    "shelf_rack": Piece(shelf_rack, (0.9, 1.3), (0.4, 0.45), (1.6, 1.95), front=0.4),
    "coat_stand": Piece(coat_stand, (0.4, 0.5), (0.4, 0.5), (1.6, 1.8)),
    "rug": Piece(rug, (1.2, 2.2), (0.9, 1.6), (0.012, 0.015)),
    "runner": Piece(rug, (1.6, 2.6), (0.6, 0.7), (0.01, 0.012)),
    "ceiling_lamp": Piece(ceiling_lamp, (0.35, 0.55), (0.35, 0.55), (0.15, 0.35)),
    "picture": Piece(picture, (0.4, 0.9), (0.02, 0.03), (0.4, 0.7)),
    "radiator": Piece(radiator, (0.6, 1.1), (0.1, 0.12), (0.55, 0.65)),
    "curtain": Piece(curtain, (0.22, 0.32), (0.08, 0.1), (2.1, 2.3)),
}
"""Every kind of furniture by name."""
