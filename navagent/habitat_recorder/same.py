"""Holds one folder of recordings against another that asked the same: do two Habitats answer alike?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navagent.habitat_recorder.questions import ROLLOUTS
from navagent.recordings import RecordingError, cameras_of, read_answers, read_description, read_traces
from navagent.reference import Row

NEAR = 1e-4
"""How far apart two answers in metres may be to count as the same [m]."""
SHARE = 99.5
"""Share of answers that must be the same, where a rounding can tip one over [%]."""
STOP_SHARE = 98.5
"""The same of moves that stop at walls [%]: in February 2026 habitat-sim found another way to say where they
end (pull request 2616), and left its version at 0.3.3. Up to one move in 80 ends elsewhere since."""

_SHARES = {
    "geodesic_distance": SHARE,
    "query_island_radius": SHARE,
    "obstacle_distance": SHARE,
    "step_slide": SHARE,
    "step_no_slide": STOP_SHARE,
    "query_snapped": SHARE,
}


def compare_recordings(before: str | Path, after: str | Path) -> list[Row]:
    """Compares the answers of two folders, scene by scene.

    Args:
        before: a folder of recordings.
        after: another one with the same questions.

    Returns:
        The figures with their bars, without those that ``before`` does not hold.

    Raises:
        RecordingError: a file is missing or broken in one of them.
    """
    before, after = Path(before), Path(after)
    traces = read_traces(before), read_traces(after)
    rows: list[Row] = []
    for path in sorted(before.glob("*.reference.npz")):
        name = path.name.removesuffix(".reference.npz")
        descriptions = [read_description(folder / f"{name}.json") for folder in (before, after)]
        cameras = cameras_of(descriptions[0])
        old, new = (read_answers(folder / path.name, cameras) for folder in (before, after))
        if missing := sorted(old.keys() - new.keys()):
            raise RecordingError(f"{after / path.name} lacks {', '.join(missing)}, which {path} has")
        rows += [row for row in _compare_scene(name, descriptions, old, new) if row.value is not None]
        rows += _compare_traces(name, *(found.get(name, []) for found in traces))
    return rows


def _compare_scene(
    name: str, descriptions: list[dict[str, Any]], old: dict[str, NDArray[Any]], new: dict[str, NDArray[Any]]
) -> Iterator[Row]:
    def row(what: str, bar: float, unit: str, key: str, figure: Callable[..., float]) -> Row:
        value = figure(old[key], new[key]) if key in old else None
        return Row(name, what, value, bar, ">=" if bar > 50 else "<=", unit)

    areas = [float(description["navigable_area"]) for description in descriptions]
    yield Row(name, "navigable area", abs(areas[0] - areas[1]), 1e-3, "<=", "m2")
    for camera in cameras_of(descriptions[0]):
        key = f"view_{camera.name}"
        if camera.kind == "depth":
            yield row(f"{camera.name}: pixels within {NEAR:g} m", SHARE, "%", key, _near)
        else:
            yield row(f"{camera.name}: mean difference", 1.0, "levels of 255", key, _mean)
    for key, share in _SHARES.items():
        yield row(f"{key}: within {NEAR:g} m", share, "%", key, _near)
    yield row("query_is_navigable: the same", SHARE, "%", "query_is_navigable", _same)
    for kind in ROLLOUTS:
        yield from _compare_walks(name, kind, old, new)


def _compare_walks(
    name: str, kind: str, old: dict[str, NDArray[Any]], new: dict[str, NDArray[Any]]
) -> Iterator[Row]:
    """What came of the actions that both did in the same place: after one contact, walks go separate ways."""
    if f"rollout_{kind}_position" not in old:
        return
    state = [
        np.concatenate([found[f"rollout_{kind}_{what}"] for what in ("position", "rotation_xyzw")], axis=2)
        for found in (old, new)
    ]
    alike = np.asarray((_apart(*state) <= NEAR).all(axis=2))
    here, there = alike[:, :-1], alike[:, 1:]
    collided = old[f"rollout_{kind}_collided"] == new[f"rollout_{kind}_collided"]
    share = SHARE if kind == "slide" else STOP_SHARE
    for what, same in ((f"action ends within {NEAR:g} m", there), ("collides or not, the same", collided)):
        value = 100.0 * float(np.mean(same[here])) if here.any() else 0.0
        yield Row(name, f"rollout_{kind}: {what}", value, share, ">=", "%")


def _compare_traces(name: str, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> Iterator[Row]:
    if not old:
        return
    pairs = list(zip(old, new, strict=False))
    alike = len(old) == len(new) and all(a["actions"] == b["actions"] for a, b in pairs)
    yield Row(name, "traces: the same actions", 100.0 * alike, 100.0, ">=", "%")
    if not alike:
        return
    for key in ("pointgoal", "reward", "distance_to_goal", "position"):
        worst = [np.max(_apart(np.array(a[key], np.float64), np.array(b[key], np.float64))) for a, b in pairs]
        yield Row(name, f"traces: {key}, largest difference", float(max(worst)), 1e-3, "<=", "")
    for key in ("success", "spl", "soft_spl", "distance_to_goal", "collisions"):
        worst = [abs(a["metrics"][key] - b["metrics"][key]) for a, b in pairs]
        yield Row(name, f"traces: {key} at the end, largest difference", float(max(worst)), 1e-3, "<=", "")


def _apart(old: NDArray[Any], new: NDArray[Any]) -> NDArray[Any]:
    """Absolute differences, 0 between two that are equally infinite."""
    with np.errstate(invalid="ignore"):
        return np.where(old == new, 0.0, np.abs(old.astype(np.float64) - new))


def _near(old: NDArray[Any], new: NDArray[Any]) -> float:
    # What is not a number in both is the same; where it is in one only, it is not.
    alike = (_apart(old, new) <= NEAR) | (np.isnan(old) & np.isnan(new))
    is_points = alike.ndim == 2  # else numbers, or pictures
    return 100.0 * float(np.mean(alike.all(axis=1) if is_points else alike))


def _mean(old: NDArray[Any], new: NDArray[Any]) -> float:
    return float(np.mean(_apart(old, new)))


def _same(old: NDArray[Any], new: NDArray[Any]) -> float:
    return 100.0 * float(np.mean(old == new))
