"""Floor plans: rooms, doors, windows and stairs of one home, before anything has thickness or colour.

The outline is split recursively into rooms, with corridors laid along the cuts of larger groups. Several
plans are drawn for a home and the most liveable one is kept: rooms of a sensible shape, bedrooms and
bathrooms reached from a hall. Plans are in the world's horizontal plane: ``x`` and ``z`` [m].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

INNER_WALL = 0.12
"""Thickness of the walls between rooms [m]; half of it lies on each side of a room's rectangle."""
OUTER_WALL = 0.24
"""Thickness of the walls to the outside [m]."""

_AREAS = {
    "studio": (22.0, 34.0),
    "living": (18.0, 30.0),
    "kitchen": (9.0, 15.0),
    "dining": (10.0, 16.0),
    "bedroom": (10.0, 17.0),
    "study": (7.5, 12.0),
    "bath": (4.2, 7.5),
    "utility": (4.5, 7.0),
}
_PROGRAM = (
    "living",
    "bedroom",
    "bath",
    "kitchen",
    "bedroom",
    "study",
    "bedroom",
    "dining",
    "bath",
    "utility",
)
_SOCIAL = ("hall", "living", "kitchen", "dining", "studio")
_MIN_SIDE = {"bath": 1.65, "utility": 1.7, "hall": 1.15, "kitchen": 2.3}
_DOOR_MARGIN = 0.14  # from a wall's end to a door, so that the frame fits
_GRID = 0.05


@dataclass(frozen=True)
class Rect:
    """An axis-aligned rectangle in the floor plane [m]."""

    x0: float
    z0: float
    x1: float
    z1: float

    @property
    def width(self) -> float:
        """Extent along x [m]."""
        return self.x1 - self.x0

    @property
    def depth(self) -> float:
        """Extent along z [m]."""
        return self.z1 - self.z0

    @property
    def area(self) -> float:
        """Area [m2]."""
        return self.width * self.depth

    @property
    def centre(self) -> tuple[float, float]:
        """Middle point (x, z) [m]."""
        return (self.x0 + self.x1) / 2, (self.z0 + self.z1) / 2

    def inset(self, margin: float) -> Rect:
        """The rectangle shrunk by ``margin`` [m] on every side; a negative one grows it."""
        return Rect(self.x0 + margin, self.z0 + margin, self.x1 - margin, self.z1 - margin)

    def overlaps(self, other: Rect, margin: float = 1e-6) -> bool:
        """Whether the two share more than ``margin`` [m] in both directions."""
        return (
            min(self.x1, other.x1) - max(self.x0, other.x0) > margin
            and min(self.z1, other.z1) - max(self.z0, other.z0) > margin
        )

    def minus(self, hole: Rect) -> list[Rect]:
        """Rectangles that cover this one without ``hole``."""
        if not self.overlaps(hole):
            return [self]
        x0, x1 = max(self.x0, hole.x0), min(self.x1, hole.x1)
        parts = [
            Rect(self.x0, self.z0, x0, self.z1),
            Rect(x1, self.z0, self.x1, self.z1),
            Rect(x0, self.z0, x1, max(self.z0, hole.z0)),
            Rect(x0, min(self.z1, hole.z1), x1, self.z1),
        ]
        return [part for part in parts if part.width > 1e-6 and part.depth > 1e-6]


@dataclass(frozen=True)
class Side:
    """One side of a rectangle, as a line with an inward normal.

    A point on it has ``x = line`` (axis ``"x"``, running in z) or ``z = line`` (axis ``"z"``, running in x).
    """

    axis: str
    line: float
    lo: float
    hi: float
    inward: float

    @property
    def yaw(self) -> float:
        """Rotation about +Y [rad] that turns local +z to the inward normal."""
        if self.axis == "z":
            return 0.0 if self.inward > 0 else math.pi
        return math.pi / 2 if self.inward > 0 else -math.pi / 2

    def point(self, along: float, into: float = 0.0) -> tuple[float, float]:
        """World (x, z) [m] at a distance ``into`` the room."""
        across = self.line + self.inward * into
        return (across, along) if self.axis == "x" else (along, across)

    def strip(self, lo: float, hi: float, near: float, far: float) -> Rect:
        """The rectangle between two places along the side and two distances into the room."""
        (xa, za), (xb, zb) = self.point(lo, near), self.point(hi, far)
        return Rect(min(xa, xb), min(za, zb), max(xa, xb), max(za, zb))


def sides(rect: Rect) -> tuple[Side, Side, Side, Side]:
    """The four sides of a rectangle, inward normals +z, -z, +x, -x."""
    return (
        Side("z", rect.z0, rect.x0, rect.x1, 1.0),
        Side("z", rect.z1, rect.x0, rect.x1, -1.0),
        Side("x", rect.x0, rect.z0, rect.z1, 1.0),
        Side("x", rect.x1, rect.z0, rect.z1, -1.0),
    )


@dataclass(frozen=True)
class Room:
    """One room: what it is for and the rectangle between its walls' middle lines."""

    name: str
    kind: str
    rect: Rect

    @property
    def floor_area(self) -> Rect:
        """The rectangle between the walls' surfaces."""
        return self.rect.inset(INNER_WALL / 2)


@dataclass(frozen=True)
class Opening:
    """A hole in a wall: a door to another room, or a window or the entrance to the outside.

    It spans ``lo`` to ``hi`` along the wall's line and ``bottom`` to ``top`` above the floor [m].
    """

    kind: str
    axis: str
    line: float
    lo: float
    hi: float
    bottom: float
    top: float
    rooms: tuple[int, ...]
    """Indices of the one or two rooms it opens into."""


@dataclass(frozen=True)
class Stairs:
    """A straight flight from the lower floor to the upper, rising towards +z within ``rect``."""

    rect: Rect
    rises: int
    height: float
    open_side: float
    """+1 where the open side looks to +x, -1 to -x."""

    @property
    def rise(self) -> float:
        """Height of one step [m]."""
        return self.height / self.rises

    @property
    def tread(self) -> float:
        """Depth of one step [m]."""
        return self.rect.depth / (self.rises - 1)


@dataclass(frozen=True)
class Floor:
    """One storey."""

    base: float
    """Height of its floor [m]."""
    rooms: tuple[Room, ...]
    openings: tuple[Opening, ...]


@dataclass(frozen=True)
class Plan:
    """A whole home's plan."""

    outline: Rect
    ceiling: float
    """Height of every room [m]."""
    floors: tuple[Floor, ...]
    stairs: Stairs | None


@dataclass
class _Split:
    """Rooms and halls that a recursive split has made so far."""

    rooms: list[tuple[str, Rect]] = field(default_factory=list)


def draw_plan(rooms: int, floors: int, rng: np.random.Generator) -> Plan:
    """Draws a home's plan.

    Args:
        rooms: 1 (a studio) to 10 rooms; halls and a studio's bathroom come on top.
        floors: 1, or 2 joined by stairs; two need at least 5 rooms.
        rng: where every choice comes from.

    Raises:
        ValueError: rooms or floors out of range.
    """
    if not 1 <= rooms <= len(_PROGRAM):
        raise ValueError(f"rooms is {rooms}; expected 1 (a studio) to {len(_PROGRAM)}")
    if floors not in (1, 2) or (floors == 2 and rooms < 5):
        raise ValueError(
            f"floors is {floors} for {rooms} rooms; expected 1, or 2 for homes of at least 5 rooms"
        )
    ceiling = round(float(rng.uniform(2.45, 2.8)), 2)
    kinds = _program(rooms, rng)
    return _two_floors(kinds, ceiling, rng) if floors == 2 else _one_floor(kinds, ceiling, rng)


def _program(rooms: int, rng: np.random.Generator) -> list[tuple[str, float]]:
    """Kinds and wanted areas [m2] of a home's rooms."""
    kinds = ["studio", "bath"] if rooms <= 2 else list(_PROGRAM[:rooms])
    if rooms == 1:
        kinds = ["studio"]
    if rooms == 6 and rng.random() < 0.5:
        kinds[5] = "dining"
    elif rooms == 3 and rng.random() < 0.3:
        kinds[0] = "studio"
        kinds[1] = "kitchen"
    scale = rng.uniform(0.9, 1.15)
    program = [(kind, float(rng.uniform(*_AREAS[kind]) * scale)) for kind in kinds]
    if rooms == 2:
        program.append(("hall", 3.2))  # beside the bathroom, which alone would be a sliver of the studio
    return program


def _one_floor(kinds: list[tuple[str, float]], ceiling: float, rng: np.random.Generator) -> Plan:
    best: tuple[float, Plan] | None = None
    for attempt in range(400):
        # Crowded programs get a little more room with every plan that failed.
        area = sum(a for _, a in kinds) * ((1.12 if len(kinds) > 3 else 1.02) + 0.0025 * attempt)
        aspect = rng.uniform(1.0, 1.7)
        width, depth = _snap(math.sqrt(area * aspect)), _snap(math.sqrt(area / aspect))
        outline = Rect(0.0, 0.0, width, depth)
        split = _Split()
        _divide(outline, _shuffled(kinds, rng), split, rng, corridor=rng.uniform(1.25, 1.6))
        drawn = _finish_floor(0.0, split.rooms, ceiling, rng, stairs=None, entrance=True)
        if drawn is None:
            continue
        cost, floor = drawn
        if best is None or cost < best[0]:
            best = (cost, Plan(outline, ceiling, (floor,), None))
        if best[0] < 1.0 or (attempt > 25 and best[0] < 6.0) or attempt > 80:
            break
    if best is None:  # 400 tries in a row have no plan with a probability too small to meet
        raise RuntimeError(f"no floor plan found for rooms {[kind for kind, _ in kinds]}")
    return best[1]


def _two_floors(kinds: list[tuple[str, float]], ceiling: float, rng: np.random.Generator) -> Plan:
    """Two storeys of the same outline: a hall with the stairs runs through, rooms on both of its sides."""
    storey = ceiling + 0.3
    rises = math.ceil(storey / 0.17)
    tread = round(float(rng.uniform(0.26, 0.29)), 2)
    run = (rises - 1) * tread
    lower = [r for r in kinds if r[0] not in ("bedroom", "bath")]
    upper = [r for r in kinds if r[0] in ("bedroom", "bath")]
    # The lower floor wants a bathroom, the upper one at least two rooms; move what is missing.
    if sum(r[0] == "bath" for r in upper) > 1:
        lower.append(upper.pop(max(i for i, r in enumerate(upper) if r[0] == "bath")))
    while len(lower) < 3:
        lower.append(("bath", float(rng.uniform(*_AREAS["bath"]))))
    while len(upper) < len(lower) - 1:
        upper.append(("bedroom", float(rng.uniform(*_AREAS["bedroom"]))))
    best: tuple[float, Plan] | None = None
    for attempt in range(400):
        hall_width = _snap(float(rng.uniform(2.45, 2.8)))
        depth = _snap(max(run + 2.3, float(rng.uniform(7.4, 9.4))))
        wanted = max(sum(a for _, a in lower), sum(a for _, a in upper) * 0.9)
        share = float(rng.uniform(0.38, 0.62))
        wings = max(wanted / depth, 5.6) * (1 + 0.003 * attempt)
        left, right = _snap(wings * share), _snap(wings * (1 - share))
        outline = Rect(0.0, 0.0, left + hall_width + right, depth)
        hall = Rect(left, 0.0, left + hall_width, depth)
        wing_rects = (Rect(0.0, 0.0, left, depth), Rect(hall.x1, 0.0, outline.x1, depth))
        open_side = 1.0 if rng.random() < 0.5 else -1.0
        start = _snap(float(rng.uniform(1.15, depth - run - 1.15))) if depth - run > 2.31 else 1.15
        inner = hall.inset(INNER_WALL / 2)
        x0 = inner.x0 if open_side > 0 else inner.x1 - 1.0
        stairs = Stairs(Rect(x0, start, x0 + 1.0, start + run), rises, storey, open_side)
        floors, total = [], 0.0
        for number, kinds_here in enumerate((lower, upper)):
            split = _Split([("hall", hall)])
            order = _shuffled(kinds_here, rng)
            cut = _best_cut(order, left / (left + right))
            for wing, group in zip(wing_rects, (order[:cut], order[cut:]), strict=True):
                mean = sum(a for _, a in group) / len(group)
                # A wing's rooms share its width, which would make slivers of the small ones.
                evened = [(kind, 0.5 * area + 0.5 * mean) for kind, area in group]
                _divide(wing, evened, split, rng, corridor=None)
            drawn = _finish_floor(
                number * storey, split.rooms, ceiling, rng, stairs=stairs, entrance=number == 0
            )
            if drawn is None:
                break
            total += drawn[0]
            floors.append(drawn[1])
        if len(floors) < 2:
            continue
        if best is None or total < best[0]:
            best = (total, Plan(outline, ceiling, tuple(floors), stairs))
        if best[0] < 2.0 or (attempt > 30 and best[0] < 9.0) or attempt > 90:
            break
    if best is None:
        raise RuntimeError(f"no two-storey plan found for rooms {[kind for kind, _ in kinds]}")
    return best[1]


def _divide(
    rect: Rect,
    kinds: list[tuple[str, float]],
    split: _Split,
    rng: np.random.Generator,
    corridor: float | None,
) -> None:
    """Splits a rectangle among rooms in proportion to their areas; larger groups get a corridor."""
    if not kinds:
        return
    if len(kinds) == 1:
        split.rooms.append((kinds[0][0], rect))
        return
    half = len(kinds) // 2 + int(rng.integers(-1, 2))
    cut = min(max(half, 1), len(kinds) - 1)
    first, second = kinds[:cut], kinds[cut:]
    ratio = sum(a for _, a in first) / sum(a for _, a in kinds)
    along_x = rect.width > rect.depth
    if 0.8 < rect.width / rect.depth < 1.25 and rng.random() < 0.5:
        along_x = not along_x
    gap = 0.0
    if corridor is not None and len(kinds) >= 4:
        gap = _snap(corridor)
        along_x = not along_x  # a corridor runs the long way through
    if along_x:
        at = _snap(rect.x0 + ratio * (rect.width - gap))
        parts = Rect(rect.x0, rect.z0, at, rect.z1), Rect(at + gap, rect.z0, rect.x1, rect.z1)
        hall = Rect(at, rect.z0, at + gap, rect.z1)
    else:
        at = _snap(rect.z0 + ratio * (rect.depth - gap))
        parts = Rect(rect.x0, rect.z0, rect.x1, at), Rect(rect.x0, at + gap, rect.x1, rect.z1)
        hall = Rect(rect.x0, at, rect.x1, at + gap)
    if gap:
        split.rooms.append(("hall", hall))
    for part, group in zip(parts, (first, second), strict=True):
        _divide(part, group, split, rng, corridor if len(group) >= 5 else None)


def _finish_floor(
    base: float,
    drawn: list[tuple[str, Rect]],
    ceiling: float,
    rng: np.random.Generator,
    stairs: Stairs | None,
    entrance: bool,
) -> tuple[float, Floor] | None:
    """Names rooms and cuts doors and windows; the plan's cost too, or None where a room cannot be reached."""
    cost = 0.0
    rooms: list[Room] = []
    counts: dict[str, int] = {}
    for kind, rect in drawn:
        short, long = sorted((rect.width, rect.depth))
        if short < _MIN_SIDE.get(kind, 2.5):
            return None
        if kind != "hall":
            cost += 3.0 * max(0.0, long / short - 1.7)
        counts[kind] = counts.get(kind, 0) + 1
        level = "upper_" if base > 0 else ""
        rooms.append(Room(f"{level}{kind}_{counts[kind]}", kind, rect))
    doors = _cut_doors(rooms, rng, stairs)
    if doors is None:
        return None
    door_cost, openings = doors
    openings += _cut_outside(rooms, openings, ceiling, rng, stairs, entrance, base > 0)
    return cost + door_cost, Floor(base, tuple(rooms), tuple(openings))


def _shared_wall(a: Rect, b: Rect) -> tuple[str, float, float, float] | None:
    """Axis, line and interval of the wall that two rooms share."""
    for one, other in ((a, b), (b, a)):
        if abs(one.x1 - other.x0) < 1e-6 and min(a.z1, b.z1) - max(a.z0, b.z0) > 1e-6:
            return "x", one.x1, max(a.z0, b.z0), min(a.z1, b.z1)
        if abs(one.z1 - other.z0) < 1e-6 and min(a.x1, b.x1) - max(a.x0, b.x0) > 1e-6:
            return "z", one.z1, max(a.x0, b.x0), min(a.x1, b.x1)
    return None


def _door_cost(a: str, b: str) -> float:
    """How odd a door between two kinds of room is."""
    pair = {a, b}
    if "hall" in pair:
        return 0.0
    if "bath" in pair:
        return 1.5 if pair & {"bedroom", "studio"} else 4.0
    if pair <= set(_SOCIAL):
        return 0.3
    if pair & set(_SOCIAL):
        return 1.0
    return 6.0


def _cut_doors(
    rooms: list[Room], rng: np.random.Generator, stairs: Stairs | None
) -> tuple[float, list[Opening]] | None:
    """Doors along a cheapest spanning tree of the rooms, and a few more that close loops."""
    candidates = []
    for i, a in enumerate(rooms):
        for j in range(i + 1, len(rooms)):
            wall = _shared_wall(a.rect, rooms[j].rect)
            if wall is None:
                continue
            spans = _free_spans(wall, [], stairs)
            if spans:
                oddness = _door_cost(a.kind, rooms[j].kind)
                candidates.append((oddness + 0.2 * float(rng.random()), i, j, wall))
    candidates.sort(key=lambda c: c[:3])
    group = list(range(len(rooms)))
    openings: list[Opening] = []
    cost = 0.0
    extra = []
    for oddness, i, j, wall in candidates:
        if group[i] == group[j]:
            extra.append((i, j, wall))
            continue
        door = _place_door(i, j, wall, rooms, openings, rng, stairs)
        if door is None:
            return None
        openings.append(door)
        cost += oddness
        merged = group[j]
        group = [group[i] if g == merged else g for g in group]
    if len(set(group)) > 1:
        return None
    for i, j, wall in extra:
        kinds = {rooms[i].kind, rooms[j].kind}
        chance = 0.55 if kinds <= set(_SOCIAL) else 0.2 if kinds & {"living", "study"} else 0.0
        if "bath" not in kinds and rng.random() < chance:
            door = _place_door(i, j, wall, rooms, openings, rng, stairs)
            if door is not None:
                openings.append(door)
    return cost, openings


def _free_spans(
    wall: tuple[str, float, float, float],
    openings: list[Opening],
    stairs: Stairs | None,
    margin: float = _DOOR_MARGIN,
    least: float = 0.85,
) -> list[tuple[float, float]]:
    """Intervals of a wall, at least ``least`` [m] long, that are free of other openings and of the stairs."""
    axis, line, lo, hi = wall
    spans = [(lo + INNER_WALL / 2 + margin, hi - INNER_WALL / 2 - margin)]
    blocked = [(o.lo - 0.2, o.hi + 0.2) for o in openings if o.axis == axis and abs(o.line - line) < 1e-6]
    if stairs is not None:
        near = stairs.rect.inset(-INNER_WALL)
        if axis == "x" and near.x0 < line < near.x1:
            blocked.append((stairs.rect.z0 - 0.75, stairs.rect.z1 + 0.75))
        elif axis == "z" and near.z0 < line < near.z1:
            blocked.append((stairs.rect.x0 - 0.2, stairs.rect.x1 + 0.2))
    for start, end in blocked:
        spans = [
            part
            for a, b in spans
            for part in ((a, min(b, start)), (max(a, end), b))
            if part[1] - part[0] > 1e-6
        ]
    return [span for span in spans if span[1] - span[0] >= least - 1e-9]


def _place_door(
    i: int,
    j: int,
    wall: tuple[str, float, float, float],
    rooms: list[Room],
    openings: list[Opening],
    rng: np.random.Generator,
    stairs: Stairs | None,
) -> Opening | None:
    spans = _free_spans(wall, openings, stairs)
    if not spans:
        return None
    lo, hi = max(spans, key=lambda s: s[1] - s[0])
    both_halls = rooms[i].kind == rooms[j].kind == "hall"
    width = 1.1 if both_halls else float(rng.choice([0.85, 0.9, 0.95, 1.0, 1.1]))
    width = min(width, hi - lo)
    # Doors sit near a corner more often than not, which leaves walls for furniture.
    draw = rng.random()
    place = 0.0 if draw < 0.35 else 1.0 if draw < 0.7 else float(rng.random())
    start = _snap(lo + place * (hi - lo - width))
    start = min(max(start, lo), hi - width)
    axis, line = wall[:2]
    return Opening("door", axis, line, start, start + width, 0.0, float(rng.choice([2.0, 2.05, 2.1])), (i, j))


def _cut_outside(
    rooms: list[Room],
    doors: list[Opening],
    ceiling: float,
    rng: np.random.Generator,
    stairs: Stairs | None,
    entrance: bool,
    upper: bool,
) -> list[Opening]:
    """Windows in the outer walls, and the entrance."""
    openings: list[Opening] = []
    order = sorted(
        range(len(rooms)),
        key=lambda i: {"hall": 0, "living": 1, "studio": 1, "kitchen": 2}.get(rooms[i].kind, 3),
    )
    for index in order:
        room = rooms[index]
        for side in sides(room.rect):
            neighbours = [
                wall
                for other in rooms
                if other is not room and (wall := _shared_wall(room.rect, other.rect)) is not None
                if wall[0] == side.axis and abs(wall[1] - side.line) < 1e-6
            ]
            if neighbours:  # the outline is a rectangle, so a side is outer as a whole or not at all
                continue
            wall = (side.axis, side.line, side.lo, side.hi)
            if entrance and room.kind in ("hall", "living", "studio"):
                spans = _free_spans(wall, openings, stairs, least=1.0)
                if spans:
                    lo, hi = spans[0]
                    start = lo + float(rng.random()) * (hi - lo - 1.0)
                    openings.append(
                        Opening("entrance", side.axis, side.line, start, start + 1.0, 0.0, 2.1, (index,))
                    )
                    entrance = False
            for lo, hi in _free_spans(
                wall, doors + openings, None if upper else stairs, margin=0.3, least=0.7
            ):
                width = min(float(rng.uniform(0.9, 2.0)), hi - lo)
                count = 2 if hi - lo > 2 * width + 1.2 else 1
                bottom, top = (1.35, 2.05) if room.kind == "bath" else (float(rng.uniform(0.75, 0.95)), 2.15)
                if room.kind == "bath":
                    width = min(width, 0.8)
                for k in range(count):
                    middle = lo + (hi - lo) * (k + 0.5) / count
                    openings.append(
                        Opening(
                            "window",
                            side.axis,
                            side.line,
                            middle - width / 2,
                            middle + width / 2,
                            bottom,
                            min(top, ceiling - 0.25),
                            (index,),
                        )
                    )
    return openings


def _best_cut(kinds: list[tuple[str, float]], share: float) -> int:
    """Where to cut a list of rooms so that the first part has about ``share`` of the area."""
    areas = np.cumsum([a for _, a in kinds])
    return int(np.clip(np.argmin(np.abs(areas / areas[-1] - share)) + 1, 1, len(kinds) - 1))


def _shuffled(kinds: list[tuple[str, float]], rng: np.random.Generator) -> list[tuple[str, float]]:
    return [kinds[i] for i in rng.permutation(len(kinds))]


def _snap(value: float) -> float:
    return round(round(value / _GRID) * _GRID, 2)


def shifted(plan: Plan, x: float, z: float) -> Plan:
    """The plan moved so that the point (x, z) becomes the origin."""

    def move(rect: Rect) -> Rect:
        return Rect(rect.x0 - x, rect.z0 - z, rect.x1 - x, rect.z1 - z)

    floors = tuple(
        replace(
            floor,
            rooms=tuple(replace(room, rect=move(room.rect)) for room in floor.rooms),
            openings=tuple(
                replace(
                    o,
                    line=o.line - (x if o.axis == "x" else z),
                    lo=o.lo - (z if o.axis == "x" else x),
                    hi=o.hi - (z if o.axis == "x" else x),
                )
                for o in floor.openings
            ),
        )
        for floor in plan.floors
    )
    stairs = None if plan.stairs is None else replace(plan.stairs, rect=move(plan.stairs.rect))
    return replace(plan, outline=move(plan.outline), floors=floors, stairs=stairs)
