"""Puts furniture into rooms so that every door stays reachable.

Each room keeps a coarse map of where an agent's centre may stand. A piece is accepted only if what stays free
is in one part that holds every door; otherwise another place is tried, and after a few the piece is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from envs.scenes.homes.furniture import PIECES, Size
from envs.scenes.homes.layout import Floor, Opening, Plan, Rect, Room, Side, sides
from envs.scenes.homes.mesh import MeshBuilder

_CELL = 0.1
_BODY = 0.26  # half the width of the ways that stay free [m]; wider than any usual agent's radius
_PROGRAMS: dict[str, tuple[str, ...]] = {
    "studio": (
        "double_bed", "kitchenette", "sofa", "wardrobe", "nightstand", "television", "desk", "coffee_table",
        "bookshelf", "rug", "plant", "floor_lamp",
    ),
    "living": (
        "sofa", "television", "coffee_table", "bookshelf", "armchair", "rug", "sideboard", "plant",
        "floor_lamp", "armchair", "plant",
    ),
    "kitchen": ("kitchen", "dining_set", "sideboard", "plant"),
    "dining": ("dining_set", "sideboard", "bookshelf", "plant", "floor_lamp"),
    "bedroom": (
        "double_bed", "nightstand", "nightstand", "wardrobe", "chest", "desk", "rug", "armchair", "plant",
    ),
    "study": ("desk", "bookshelf", "bookshelf", "armchair", "floor_lamp", "rug", "chest", "plant"),
    "bath": ("washbasin", "toilet", "bathtub", "shower", "washing_machine"),
    "utility": ("washing_machine", "washing_machine", "shelf_rack", "shelf_rack", "chest"),
    "hall": ("shoe_cabinet", "coat_stand", "runner", "plant"),
}  # fmt: skip
_SMALLER = {
    "kitchen": "kitchenette",
    "double_bed": "single_bed",
    "bathtub": "shower",
    "dining_set": "table",
    "sofa": "armchair",
}
_FREE_STANDING = ("dining_set", "coffee_table", "table")
_FLAT = ("rug", "runner")


@dataclass
class _RoomState:
    """What is known about one room while it is furnished."""

    room: Room
    floor: Rect
    base: float
    openings: list[Opening]
    keep_clear: list[Rect] = field(default_factory=list)
    """Areas before doors that nothing may stand in."""
    taken: list[tuple[Rect, float]] = field(default_factory=list)
    """Footprints and heights of what stands already."""
    placed: dict[str, list[tuple[Rect, Side, float]]] = field(default_factory=dict)
    """Footprint, wall and place along it by kind."""


def furnish(plan: Plan, mesh: MeshBuilder, rng: np.random.Generator) -> None:
    """Furnishes every room of a home."""
    for number, floor in enumerate(plan.floors):
        for index, room in enumerate(floor.rooms):
            state = _start(plan, number, floor, index)
            if plan.stairs is not None and room.kind == "hall":
                _ceiling_and_walls(mesh, state, plan.ceiling, rng)
                continue
            _furnish_room(mesh, state, rng)
            _ceiling_and_walls(mesh, state, plan.ceiling, rng)


def _start(plan: Plan, number: int, floor: Floor, index: int) -> _RoomState:
    room = floor.rooms[index]
    openings = [o for o in floor.openings if index in o.rooms]
    state = _RoomState(room, room.floor_area, floor.base, openings)
    for side, line in zip(sides(state.floor), sides(room.rect), strict=True):
        for o in openings:
            if o.axis == line.axis and abs(o.line - line.line) < 1e-6 and o.kind != "window":
                state.keep_clear.append(side.strip(o.lo - 0.12, o.hi + 0.12, 0.0, 0.85))
    if plan.stairs is not None and room.kind == "hall":
        state.taken.append((plan.stairs.rect, 3.0 if number == 0 else 1.0))
    return state


def _furnish_room(mesh: MeshBuilder, state: _RoomState, rng: np.random.Generator) -> None:
    kind = state.room.kind
    narrow = min(state.floor.width, state.floor.depth)
    for position, name in enumerate(_PROGRAMS[kind]):
        essential = position < (3 if kind in ("bath", "kitchen", "studio") else 2)
        if not essential and rng.random() < 0.25:
            continue
        slim = name in _FLAT or (name == "shoe_cabinet" and narrow >= 1.35)
        if kind == "hall" and narrow < 1.9 and not slim:
            continue
        if name == "shower" and "bathtub" in state.placed:
            continue
        if not _try_piece(mesh, state, name, rng) and name in _SMALLER:
            _try_piece(mesh, state, _SMALLER[name], rng)
        if name == "desk" and "desk" in state.placed:
            _chair_at_desk(mesh, state, rng)


def _try_piece(mesh: MeshBuilder, state: _RoomState, name: str, rng: np.random.Generator) -> bool:
    """Tries some places for one piece; whether one was found."""
    piece = PIECES[name]
    room_sides = sides(state.floor)
    for _ in range(14):
        w, d, h = piece.draw_size(rng)
        if name in _FLAT:
            return _lay_rug(mesh, state, name, (w, d, h), rng)
        chosen = _place(state, name, room_sides, (w, d), rng)
        if chosen is None:
            continue
        side, along, into = chosen
        foot = side.strip(along - w / 2, along + w / 2, into, into + d)
        front = side.strip(along - w / 2, along + w / 2, into, into + d + piece.front)
        if not _fits(state, foot, front, h, side, along, w, into):
            continue
        if not _stays_connected(state, foot):
            continue
        state.taken.append((foot, h))
        state.placed.setdefault(name, []).append((foot, side, along))
        x, z = side.point(along, into)
        mesh.start(f"{state.room.name}/{name}", (x, state.base, z), side.yaw)
        piece.build(mesh, rng, (w, d, h))
        return True
    return False


def _place(
    state: _RoomState,
    name: str,
    room_sides: tuple[Side, ...],
    size: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[Side, float, float] | None:
    """A wall, a place along it and a distance from it where a piece could stand."""
    w, d = size
    side = room_sides[int(rng.integers(4))]
    length, deep = side.hi - side.lo, _depth_from(state.floor, side)
    into = 0.015
    if name == "nightstand" and ("double_bed" in state.placed or "single_bed" in state.placed):
        foot, side, at = (state.placed.get("double_bed") or state.placed["single_bed"])[0]
        half = (foot.width if side.axis == "z" else foot.depth) / 2
        along = at + (1 if rng.random() < 0.5 else -1) * (half + 0.04 + w / 2)
    elif name == "coffee_table" and "sofa" in state.placed:
        foot, side, along = state.placed["sofa"][0]
        into = (foot.depth if side.axis == "z" else foot.width) + 0.015 + float(rng.uniform(0.3, 0.45))
    elif name == "television" and "sofa" in state.placed:
        _, opposite, along = state.placed["sofa"][0]
        side = next(s for s in room_sides if s.axis == opposite.axis and s.inward != opposite.inward)
        along += float(rng.uniform(-0.4, 0.4))
    elif name in _FREE_STANDING:
        # In the middle, where the room lets one walk all around, else pushed to one side.
        slack = deep - d
        into = (
            float(rng.uniform(0.3, 0.7)) * slack
            if slack > 1.3
            else 0.015
            if rng.random() < 0.5
            else slack / 2
        )
        along = side.lo + length * float(rng.uniform(0.35, 0.65))
    else:
        if length < w + 0.05:
            return None
        draw = rng.random()
        low, high = side.lo + w / 2 + 0.02, side.hi - w / 2 - 0.02
        along = low if draw < 0.3 else high if draw < 0.6 else low + (high - low) * float(rng.random())
        if name == "double_bed" and length > w + 1.0:
            along = side.lo + length * float(rng.uniform(0.4, 0.6))
    if not side.lo + w / 2 <= along <= side.hi - w / 2 or into + d > deep:
        return None
    return side, along, into


def _depth_from(floor: Rect, side: Side) -> float:
    return floor.depth if side.axis == "z" else floor.width


def _fits(
    state: _RoomState,
    foot: Rect,
    front: Rect,
    height: float,
    side: Side,
    along: float,
    width: float,
    into: float,
) -> bool:
    """Whether a piece collides with nothing, blocks no door and covers no window."""
    if any(foot.overlaps(zone) for zone in state.keep_clear):
        return False
    if any(foot.overlaps(other) or front.overlaps(other) for other, _ in state.taken):
        return False
    lo, hi = along - width / 2, along + width / 2
    return not any(
        o.axis == side.axis
        and abs(o.line - side.line) < 0.2
        and o.lo < hi
        and lo < o.hi
        and o.kind == "window"
        and height > o.bottom
        and into < 0.3
        for o in state.openings
    )


def _stays_connected(state: _RoomState, foot: Rect) -> bool:
    """Whether an agent still reaches every door and nearly all the free floor with one more piece."""
    floor = state.floor
    columns, rows = max(1, int(floor.width / _CELL)), max(1, int(floor.depth / _CELL))
    x = floor.x0 + (np.arange(columns) + 0.5) * floor.width / columns
    z = floor.z0 + (np.arange(rows) + 0.5) * floor.depth / rows
    free = np.zeros((rows, columns), bool)
    free[
        np.ix_(
            (z > floor.z0 + _BODY) & (z < floor.z1 - _BODY), (x > floor.x0 + _BODY) & (x < floor.x1 - _BODY)
        )
    ] = True
    doors = [o for o in state.openings if o.kind == "door"]
    goals = []
    for door in doors:
        # The way through the door itself is free whatever the margin along the wall says.
        way = Rect(door.line - 0.5, door.lo + 0.2, door.line + 0.5, door.hi - 0.2)
        if door.axis == "z":
            way = Rect(door.lo + 0.2, door.line - 0.5, door.hi - 0.2, door.line + 0.5)
        inside = np.ix_((z > way.z0) & (z < way.z1), (x > way.x0) & (x < way.x1))
        free[inside] = True
        goals.append(inside)
    for other, height in (*state.taken, (foot, 1.0)):
        if height > 0.03:
            grown = other.inset(-_BODY)
            free[np.ix_((z > grown.z0) & (z < grown.z1), (x > grown.x0) & (x < grown.x1))] = False
    labels, count = ndimage.label(free)
    if count == 0:
        return False
    sizes = np.bincount(labels.ravel())[1:]
    main = int(np.argmax(sizes)) + 1
    if sizes[main - 1] < 0.93 * sizes.sum():
        return False
    return all((labels[goal] == main).any() for goal in goals)


def _lay_rug(mesh: MeshBuilder, state: _RoomState, name: str, size: Size, rng: np.random.Generator) -> bool:
    """Lays a rug where nothing stands on its edge, as large as the room allows."""
    floor = state.floor
    w, d, h = size
    turned = floor.depth > floor.width
    long, short = max(floor.width, floor.depth), min(floor.width, floor.depth)
    w, d = min(w, long - 0.5), min(d, short - 0.5)
    for _ in range(6):
        u, v = (float(value) for value in rng.uniform(0.4, 0.6, 2))
        x, z = floor.x0 + u * floor.width, floor.z0 + v * floor.depth
        wide, deep = (d, w) if turned else (w, d)
        rect = Rect(x - wide / 2, z - deep / 2, x + wide / 2, z + deep / 2)
        if any(rect.overlaps(other) and other_height > 0.6 for other, other_height in state.taken):
            continue
        if any(rect.overlaps(zone) for zone in state.keep_clear) and name == "rug" and rng.random() < 0.5:
            continue
        yaw = math.pi / 2 if turned else 0.0
        origin = (rect.x0, state.base, z) if turned else (x, state.base, rect.z0)
        mesh.start(f"{state.room.name}/{name}", origin, yaw)
        PIECES[name].build(mesh, rng, (w, d, h))
        return True
    return False


def _chair_at_desk(mesh: MeshBuilder, state: _RoomState, rng: np.random.Generator) -> None:
    """Puts a chair before a desk that has none, facing it."""
    if len(state.placed.get("chair", [])) >= len(state.placed["desk"]):
        return
    foot, side, along = state.placed["desk"][-1]
    w, d, h = PIECES["chair"].draw_size(rng)
    deep = foot.depth if side.axis == "z" else foot.width
    into = deep - 0.12
    rect = side.strip(along - w / 2, along + w / 2, into, into + d)
    if any(rect.overlaps(other) and other is not foot for other, _ in state.taken):
        return
    if any(rect.overlaps(zone) for zone in state.keep_clear) or not _stays_connected(state, rect):
        return
    state.taken.append((rect, h))
    state.placed.setdefault("chair", []).append((rect, side, along))
    x, z = side.point(along, into + d)
    mesh.start(f"{state.room.name}/chair", (x, state.base, z), side.yaw + math.pi)
    PIECES["chair"].build(mesh, rng, (w, d, h))


def _ceiling_and_walls(
    mesh: MeshBuilder, state: _RoomState, ceiling: float, rng: np.random.Generator
) -> None:
    """Hangs lamps, pictures and curtains, and puts radiators under windows."""
    floor = state.floor
    stairs = [rect for rect, height in state.taken if height >= 3.0]
    x, z = floor.centre
    if not stairs:
        w, d, h = PIECES["ceiling_lamp"].draw_size(rng)
        mesh.start(f"{state.room.name}/ceiling_lamp", (x, state.base + ceiling, z))
        PIECES["ceiling_lamp"].build(mesh, rng, (w, d, min(h, ceiling - 2.25)))
    outer = sides(state.room.rect)
    for side, line in zip(sides(floor), outer, strict=True):
        own = [o for o in state.openings if o.axis == line.axis and abs(o.line - line.line) < 1e-6]
        for o in own:
            if o.kind == "window":
                _dress_window(mesh, state, side, o, rng)
        if state.room.kind in ("bath", "kitchen", "utility") or rng.random() < 0.3:
            continue
        _hang_picture(mesh, state, side, own, rng)


def _tall(state: _RoomState, side: Side, lo: float, hi: float, depth: float, height: float) -> bool:
    """Whether something higher than ``height`` stands in a strip before a wall."""
    strip = side.strip(lo, hi, 0.0, depth)
    return any(strip.overlaps(rect) and tall > height for rect, tall in state.taken)


def _dress_window(
    mesh: MeshBuilder, state: _RoomState, side: Side, window: Opening, rng: np.random.Generator
) -> None:
    middle = (window.lo + window.hi) / 2
    w, d, h = PIECES["radiator"].draw_size(rng)
    w = min(w, window.hi - window.lo)
    foot = side.strip(middle - w / 2, middle + w / 2, 0.0, d)
    blocked = any(foot.overlaps(rect) for rect, _ in state.taken)
    if rng.random() < 0.7 and not blocked and not any(foot.overlaps(zone) for zone in state.keep_clear):
        x, z = side.point(middle)
        mesh.start(f"{state.room.name}/radiator", (x, state.base, z), side.yaw)
        PIECES["radiator"].build(mesh, rng, (w, d, min(h, window.bottom - 0.1)))
    if state.room.kind in ("bath", "kitchen", "utility", "hall") or rng.random() < 0.35:
        return
    w, d, h = PIECES["curtain"].draw_size(rng)
    h = window.top + 0.12
    seed = int(rng.integers(2**31))
    for along in (window.lo - w / 2 - 0.02, window.hi + w / 2 + 0.02):
        lo, hi = along - w / 2, along + w / 2
        near = [o for o in state.openings if o is not window and o.axis == side.axis]
        near = [o for o in near if abs(o.line - side.line) < 0.2 and o.lo < hi and lo < o.hi]
        if lo < side.lo or hi > side.hi or near or _tall(state, side, lo, hi, 0.12, 0.05):
            continue
        x, z = side.point(along)
        mesh.start(f"{state.room.name}/curtain", (x, state.base, z), side.yaw)
        PIECES["curtain"].build(mesh, np.random.default_rng(seed), (w, d, h))


def _hang_picture(
    mesh: MeshBuilder, state: _RoomState, side: Side, own: list[Opening], rng: np.random.Generator
) -> None:
    w, d, h = PIECES["picture"].draw_size(rng)
    for _ in range(4):
        if side.hi - side.lo < w + 0.4:
            return
        along = float(rng.uniform(side.lo + w / 2 + 0.2, side.hi - w / 2 - 0.2))
        lo, hi = along - w / 2 - 0.3, along + w / 2 + 0.3
        if any(o.lo < hi and lo < o.hi for o in own) or _tall(state, side, lo, hi, 0.5, 1.2):
            continue
        x, z = side.point(along)
        mesh.start(f"{state.room.name}/picture", (x, state.base + 1.6 - h / 2, z), side.yaw)
        PIECES["picture"].build(mesh, rng, (w, d, h))
        return
