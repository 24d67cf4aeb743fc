"""Walls, floors, ceilings, doors, windows and stairs as geometry."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from envs.scenes.homes.layout import (
    INNER_WALL,
    OUTER_WALL,
    Floor,
    Opening,
    Plan,
    Rect,
    Room,
    Side,
    Stairs,
    sides,
)
from envs.scenes.homes.mesh import MeshBuilder
from envs.scenes.homes.style import Style

_SKIRTING = 0.09
_SHADOW = 0.45  # how far corners darken what is near them [m]
_DEEPEST = 0.72  # how dark they get
_FRAME = 0.07
_PROUD = 0.018  # how far door frames stand out from the wall


def build(plan: Plan, style: Style, mesh: MeshBuilder, rng: np.random.Generator) -> None:
    """Builds everything but the furniture."""
    for number, floor in enumerate(plan.floors):
        hole = None if plan.stairs is None else plan.stairs.rect
        for index, room in enumerate(floor.rooms):
            openings = [o for o in floor.openings if index in o.rooms]
            mesh.start(f"{room.name}/floor")
            _slab(mesh, room, floor.base, style, hole if number == 1 else None, up=True)
            mesh.start(f"{room.name}/ceiling")
            top_hole = hole if number == 0 and len(plan.floors) == 2 else None
            _slab(mesh, room, floor.base + plan.ceiling, style, top_hole, up=False)
            mesh.start(f"{room.name}/walls")
            _walls(mesh, room, floor, plan.ceiling, openings, style)
        for opening in floor.openings:
            if opening.kind == "door":
                mesh.start(f"door_{number}")
                _doorway(mesh, opening, floor.base, style)
            elif opening.kind == "window":
                mesh.start(f"window_{number}")
                _window(mesh, opening, floor, style, f"view_{int(rng.integers(2)) + 1}")
            else:
                mesh.start("entrance")
                _entrance(mesh, opening, floor, style)
    _shell(mesh, plan, style)
    if plan.stairs is not None:
        _stairs(mesh, plan, plan.stairs, style)


def _shadow(distance: float) -> float:
    """Brightness at a distance [m] from a corner."""
    t = min(max(distance / _SHADOW, 0.0), 1.0)
    return _DEEPEST + (1 - _DEEPEST) * t * (2 - t)


def _cuts(lo: float, hi: float, extra: Sequence[float] = ()) -> list[float]:
    """Where to divide an interval so that the shadows at both ends and every extra place have an edge."""
    inner = [lo + 0.15, lo + _SHADOW, hi - _SHADOW, hi - 0.15] if hi - lo > 2 * _SHADOW else [(lo + hi) / 2]
    values = sorted({round(v, 4) for v in (lo, hi, *inner, *extra) if lo - 1e-6 <= v <= hi + 1e-6})
    merged = values[:1]
    keep = {round(v, 4) for v in (*extra, lo, hi)}
    for value in values[1:]:
        if value - merged[-1] < 0.03 and value not in keep:
            continue
        merged.append(value)
    return merged


def _pairs(values: Sequence[float]) -> Iterator[tuple[float, float]]:
    return pairwise(values)


def _slab(mesh: MeshBuilder, room: Room, y: float, style: Style, hole: Rect | None, up: bool) -> None:
    """A room's floor (``up``) or ceiling, with shadows along the walls and a hole for the stairs."""
    whole = room.floor_area
    if hole is not None and not whole.overlaps(hole):
        hole = None
    xs = _cuts(whole.x0, whole.x1, () if hole is None else (hole.x0, hole.x1))
    zs = _cuts(whole.z0, whole.z1, () if hole is None else (hole.z0, hole.z1))
    material = style.floor(room.name, room.kind) if up else "ceiling"
    scale = style.scale(material)
    for x0, x1 in _pairs(xs):
        for z0, z1 in _pairs(zs):
            if hole is not None and hole.overlaps(Rect(x0, z0, x1, z1)):
                continue
            corners = [(x0, z1), (x1, z1), (x1, z0), (x0, z0)]
            if not up:
                corners.reverse()
            shade = []
            for x, z in corners:
                near_x = min(x - whole.x0, whole.x1 - x)
                near_z = min(z - whole.z0, whole.z1 - z)
                shade.append(_shadow(near_x) * _shadow(near_z) * (1.0 if up else 1.3))
            uvs = [(x / scale, z / scale) for x, z in corners]
            mesh.face([(x, y, z) for x, z in corners], material, uvs, shade)


def _walls(
    mesh: MeshBuilder, room: Room, floor: Floor, ceiling: float, openings: list[Opening], style: Style
) -> None:
    material = style.wall(room.name, room.kind)
    tiled = room.kind == "kitchen"
    for outer, side in zip(sides(room.rect), sides(room.floor_area), strict=True):
        own = [o for o in openings if o.axis == side.axis and abs(o.line - outer.line) < 1e-6]
        along = _cuts(side.lo, side.hi, [v for o in own for v in (o.lo, o.hi)])
        heights = [_SKIRTING, *(v for o in own for v in (o.bottom, o.top) if v > 0)]
        heights += [1.5] if tiled else []
        for v0, v1 in _pairs(_cuts(0.0, ceiling, heights)):
            paint = "trim" if v1 <= _SKIRTING + 1e-6 else "wall_tiles" if tiled and v1 <= 1.5001 else material
            scale = style.scale(paint)
            for u0, u1 in _pairs(along):
                if any(
                    o.lo - 1e-3 <= u0 and u1 <= o.hi + 1e-3 and o.bottom - 1e-3 <= v0 and v1 <= o.top + 1e-3
                    for o in own
                ):
                    continue
                corners, shade, uvs = [], [], []
                # Counter-clockwise as seen from the room: along the side's tangent, then up.
                a, b = (u0, u1) if _forward(side) else (u1, u0)
                for u, v in ((a, v0), (b, v0), (b, v1), (a, v1)):
                    x, z = side.point(u)
                    corners.append((x, floor.base + v, z))
                    ends = _shadow(min(u - side.lo, side.hi - u))
                    shade.append(ends * _shadow(v + 0.1) * _shadow(ceiling - v + 0.15))
                    uvs.append(((u if _forward(side) else -u) / scale, -v / scale))
                mesh.face(corners, paint, uvs, shade)


def _forward(side: Side) -> bool:
    """Whether ``along`` grows to the right for someone who looks at the wall from the room."""
    return side.inward > 0 if side.axis == "z" else side.inward < 0


def _point(opening: Opening, along: float, y: float, across: float) -> tuple[float, float, float]:
    at = opening.line + across
    return (at, y, along) if opening.axis == "x" else (along, y, at)


def _block(
    mesh: MeshBuilder,
    opening: Opening,
    along: tuple[float, float],
    height: tuple[float, float],
    across: tuple[float, float],
    material: str,
    skip: str = "",
) -> None:
    """A box given along, up and across an opening's wall."""
    lo = _point(opening, along[0], height[0], across[0])
    hi = _point(opening, along[1], height[1], across[1])
    mesh.box(lo, hi, material, skip=skip)


def _doorway(mesh: MeshBuilder, door: Opening, base: float, style: Style) -> None:
    """The floor, the lining and the frame of a door that stands open."""
    half = INNER_WALL / 2
    corners = [_point(door, u, base, v) for u, v in ((door.lo, -half), (door.hi, -half), (door.hi, half))]
    corners.append(_point(door, door.lo, base, half))
    if door.axis == "z":
        corners.reverse()
    mesh.face(corners, "wood_dark", [(c[0], c[2]) for c in corners], shade=0.9)
    depth = (-half - _PROUD, half + _PROUD)
    top = base + door.top
    # Lining and frame in one: boards that stand out from the wall on both sides and overlap the wall's edge.
    thin = 0.012
    _block(mesh, door, (door.lo, door.lo + thin), (base, top - thin), depth, "trim", skip="y")
    _block(mesh, door, (door.hi - thin, door.hi), (base, top - thin), depth, "trim", skip="y")
    _block(mesh, door, (door.lo, door.hi), (top - thin, top), depth, "trim")
    for a, b in ((-half - _PROUD, -half), (half, half + _PROUD)):
        _block(mesh, door, (door.lo - _FRAME, door.lo), (base, top + _FRAME), (a, b), "trim", skip="y")
        _block(mesh, door, (door.hi, door.hi + _FRAME), (base, top + _FRAME), (a, b), "trim", skip="y")
        _block(mesh, door, (door.lo, door.hi), (top, top + _FRAME), (a, b), "trim")


def _side_of(opening: Opening, floor: Floor) -> float:
    """+1 where the room of an outer opening lies on the positive side of its wall, else -1."""
    x, z = floor.rooms[opening.rooms[0]].rect.centre
    return 1.0 if (x if opening.axis == "x" else z) > opening.line else -1.0


def _recess(
    mesh: MeshBuilder, opening: Opening, base: float, inward: float, back: float, material: str
) -> None:
    """The four sides of a hole in an outer wall, from the room's surface to ``back`` [m] behind the line."""
    near, far = inward * INNER_WALL / 2, -inward * back
    lo, hi = opening.lo, opening.hi
    bottom, top = base + opening.bottom, base + opening.top
    ring = [(lo, bottom), (hi, bottom), (hi, top), (lo, top)]
    for (ua, ya), (ub, yb) in zip(ring, [*ring[1:], ring[0]], strict=True):
        corners = [_point(opening, u, y, v) for u, y, v in ((ua, ya, near), (ub, yb, near), (ub, yb, far))]
        corners.append(_point(opening, ua, ya, far))
        if (inward > 0) == (opening.axis == "x"):
            corners.reverse()
        mesh.face(corners, material, [(0, 0), (1, 0), (1, 1), (0, 1)], shade=(1.0, 1.0, 0.8, 0.8))


def _panel(
    mesh: MeshBuilder, opening: Opening, base: float, inward: float, back: float, material: str, repeat: float
) -> None:
    """An upright sheet that fills an opening, seen from the room."""
    lo, hi = opening.lo, opening.hi
    if (inward > 0) == (opening.axis == "x"):
        lo, hi = hi, lo
    across = -inward * back
    bottom, top = base + opening.bottom, base + opening.top
    corners = [_point(opening, u, y, across) for u, y in ((lo, bottom), (hi, bottom), (hi, top), (lo, top))]
    wide = abs(hi - lo) / (top - bottom) * repeat
    mesh.face(corners, material, [(0, 1), (wide, 1), (wide, 0), (0, 0)], shade=1.25)


def _window(mesh: MeshBuilder, window: Opening, floor: Floor, style: Style, outlook: str) -> None:
    base, inward = floor.base, _side_of(window, floor)
    _recess(mesh, window, base, inward, 0.1, "trim")
    _panel(mesh, window, base, inward, 0.1, outlook, 0.8)
    a, b = sorted((-inward * 0.1, -inward * 0.05))
    bottom, top = base + window.bottom, base + window.top
    bar = 0.05
    for u in (window.lo, window.hi - bar):
        _block(mesh, window, (u, u + bar), (bottom, top), (a, b), "trim")
    for y in (bottom, top - bar):
        _block(mesh, window, (window.lo + bar, window.hi - bar), (y, y + bar), (a, b), "trim")
    for k in range(1, max(1, round((window.hi - window.lo) / 0.7))):
        u = window.lo + (window.hi - window.lo) * k / round((window.hi - window.lo) / 0.7)
        _block(mesh, window, (u - 0.025, u + 0.025), (bottom + bar, top - bar), (a, b), "trim")
    # The sill stands out into the room.
    sill = sorted((inward * INNER_WALL / 2, inward * (INNER_WALL / 2 + 0.06)))
    _block(
        mesh,
        window,
        (window.lo - 0.05, window.hi + 0.05),
        (bottom - 0.03, bottom),
        (sill[0], sill[1]),
        "trim",
    )


def _entrance(mesh: MeshBuilder, entrance: Opening, floor: Floor, style: Style) -> None:
    """The closed front door."""
    base, inward = floor.base, _side_of(entrance, floor)
    _recess(mesh, entrance, base, inward, 0.0, "trim")
    _panel(mesh, entrance, base, inward, 0.0, "door", 1.0)
    a, b = sorted((0.0, inward * 0.03))
    for y0, y1 in ((0.15, 0.9), (1.1, 1.95)):
        for u0, u1 in ((0.12, 0.46), (0.54, 0.88)):
            u = (entrance.lo + u0 * 1.0, entrance.lo + u1 * (entrance.hi - entrance.lo))
            _block(mesh, entrance, u, (base + y0, base + y1), (a, b), "door")
    knob = entrance.hi - 0.09
    a, b = sorted((0.0, inward * 0.08))
    _block(mesh, entrance, (knob - 0.06, knob + 0.02), (base + 1.0, base + 1.03), (a, b), "metal")
    half = inward * INNER_WALL / 2
    a, b = sorted((half, half + inward * _PROUD))
    top = base + entrance.top
    for lo, hi in ((entrance.lo - _FRAME, entrance.lo), (entrance.hi, entrance.hi + _FRAME)):
        _block(mesh, entrance, (lo, hi), (base, top + _FRAME), (a, b), "trim")
    _block(mesh, entrance, (entrance.lo, entrance.hi), (top, top + _FRAME), (a, b), "trim")


def _shell(mesh: MeshBuilder, plan: Plan, style: Style) -> None:
    """The outer faces of the outer walls."""
    mesh.start("exterior")
    grown = plan.outline.inset(-OUTER_WALL / 2)
    top = plan.floors[-1].base + plan.ceiling + 0.1
    scale = style.scale("exterior")
    for side in sides(grown):
        lo, hi = (side.hi, side.lo) if _forward(side) else (side.lo, side.hi)
        corners, uvs = [], []
        for u, y in ((lo, -0.1), (hi, -0.1), (hi, top), (lo, top)):
            x, z = side.point(u)
            corners.append((x, y, z))
            uvs.append((u / scale, -y / scale))
        mesh.face(corners, "exterior", uvs, shade=1.0)


def _stairs(mesh: MeshBuilder, plan: Plan, stairs: Stairs, style: Style) -> None:
    """The steps, the edges of the hole above them and the parapet that guards it."""
    rect = stairs.rect
    mesh.start("stairs")
    for k in range(stairs.rises - 1):
        z0 = rect.z0 + k * stairs.tread
        z1 = rect.z1 if k == stairs.rises - 2 else z0 + stairs.tread
        wood = (0.93, 0.93, 0.93) if k % 2 else (1.0, 1.0, 1.0)
        mesh.box((rect.x0, 0, z0), (rect.x1, (k + 1) * stairs.rise, z1), "wood", tint=wood)
    mesh.start("stairwell")
    low, high = plan.ceiling, stairs.height
    for side in sides(rect):
        # Seen from inside the hole, as walls are from a room.
        a, b = (side.lo, side.hi) if _forward(side) else (side.hi, side.lo)
        corners, uvs = [], []
        for u, y in ((a, low), (b, low), (b, high), (a, high)):
            x, z = side.point(u)
            corners.append((x, y, z))
            uvs.append((u, -y))
        mesh.face(corners, "trim", uvs, shade=0.9)
    mesh.start("parapet")
    thick, tall = 0.08, 0.95
    x0 = rect.x1 if stairs.open_side > 0 else rect.x0 - thick
    mesh.box((x0, high, rect.z0 - thick), (x0 + thick, high + tall, rect.z1), "trim")
    mesh.box((rect.x0, high, rect.z0 - thick), (rect.x1, high + tall, rect.z0), "trim")
    mesh.box(
        (x0 - 0.02, high + tall, rect.z0 - thick), (x0 + thick + 0.02, high + tall + 0.04, rect.z1), "wood"
    )
    if not math.isclose(stairs.rise * stairs.rises, stairs.height, abs_tol=1e-6):
        raise RuntimeError("stairs do not reach the upper floor")
