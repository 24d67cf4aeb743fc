"""The file of recorded demonstrations: episodes, actions and hashes of the states, no pictures.

One safetensors file, written anew and moved into place whenever more is recorded, so that it is whole at any
moment, however recording ends. Its header is one JSON text: the version, the rules that a replay needs (the
agent's body, what ends an episode, noise of motion), where the episodes come from, and the hash of every
scene. A step takes one byte, every :data:`BLOCK` steps 24 more, a demonstration some 150.

The states are what is hashed: position and heading before every action, in single precision, chained by
FNV-1a in 64 bits from the first step on and noted every :data:`BLOCK` steps. So a replay that differs is
told to a range of steps. The last state of each block is kept too, for replays that cannot be bit-equal.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.episodes import Episode
from envs.files import atomic_write
from envs.simulators.base import Action
from navagent.config import EnvConfig, TrainConfig
from policies.weights import tensors_sha256

FORMAT = "navagent-demonstrations"
VERSION = 1
BLOCK = 32
"""Steps from one noted hash to the next."""

RULES = (
    "max_steps",
    "success_distance",
    "stop",
    "forward_step",
    "turn_angle_deg",
    "allow_sliding",
    "agent_radius",
    "agent_height",
    "max_climb",
    "max_slope_deg",
    "actuation_noise",
)
"""Settings of ``env`` that decide where actions lead; rewards and cameras' noise may differ at a replay."""

_BASIS = -0x340D631B7BDDDCDB  # FNV-1a's offset basis and prime, the former as a signed number
_PRIME = 0x100000001B3


class DemonstrationError(ValueError):
    """Demonstrations that cannot be used; the message names the file, what was expected and what to do."""


class StateHash:
    """The running hash of N agents' states, from the start of each one's demonstration."""

    def __init__(self, num_agents: int, device: torch.device) -> None:
        self.value = torch.full((num_agents,), _BASIS, dtype=torch.int64, device=device)
        """(N,) int64."""

    def add(self, states: Tensor, starts: Tensor) -> Tensor:
        """Adds states (N, 4) float32; ``starts`` (N,) bool says whose demonstration begins with this one.

        Returns the hashes, (N,) int64.
        """
        value = self.value.masked_fill(starts, _BASIS)
        words = states.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        for word in words.unbind(dim=1):
            value = (value ^ word) * _PRIME
        self.value = value
        return value


@dataclass(frozen=True)
class Demonstration:
    """One demonstration, as it was recorded."""

    episode: Episode
    """What was to be done."""
    seed: int
    """Of the noise of motion."""
    actions: NDArray[np.uint8]
    """What was done, :class:`~envs.simulators.base.Action`: (L,)."""
    hashes: NDArray[np.int64]
    """Hash of the states up to the end of each block: (blocks,)."""
    states: NDArray[np.float32]
    """Last state of each block, position [m] and heading [rad]: (blocks, 4)."""
    success: bool
    """Whether it reached its goal."""
    spl: float
    """Success weighted by path length."""
    distance_to_goal: float
    """Geodesic distance to the goal at the end [m]."""
    path_length: float
    """Length of the path [m]."""
    collisions: int
    """Steps that ended in a collision."""


@dataclass(frozen=True)
class SceneHash:
    """A scene that demonstrations take place in."""

    scene_id: str
    """As the episodes name it."""
    sha256: str
    """Of its files, see :func:`navagent.demonstrations.scene_files.scene_sha256`."""


@dataclass(frozen=True)
class Source:
    """Where demonstrations come from. The same source gives the same demonstrations."""

    agent: str
    """``expert``, ``keyboard``, or the name of a run."""
    checkpoint: str | None
    """SHA-256 of the run's checkpoint; None for others."""
    deterministic: bool
    """Whether the run's most probable actions were taken."""
    dataset: str
    """Folder of the data set, or ``generated``."""
    homes: int
    """How many homes were generated."""
    homes_seed: int
    """Seed of the generated homes."""
    scenes_dir: str | None
    """Folder of the scenes, where it is not the data set's own."""
    split: str
    """Which of its episodes."""
    seed: int
    """Of the episodes' order, of noise and of drawn actions."""
    num_envs: int
    """Agents side by side."""


@dataclass(frozen=True)
class Header:
    """What holds for all demonstrations of a file."""

    rules: dict[str, Any]
    """The settings named in :data:`RULES`."""
    source: Source
    """Where they come from."""
    scenes: tuple[SceneHash, ...]
    """All scenes of the split."""
    wanted: int
    """How many were asked for; a recording that was interrupted holds fewer."""
    recorded_on: dict[str, Any]
    """Versions and machine that it was begun with."""

    def settings(self, config: TrainConfig) -> TrainConfig:
        """``config`` under the rules of the recording."""
        return dataclasses.replace(config, env=dataclasses.replace(config.env, **self.rules))


def rules_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide where actions lead."""
    return {name: getattr(config.env, name) for name in RULES}


def check_rules(path: str | Path, rules: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuses demonstrations at ``path`` whose rules are not those of ``config``.

    Raises:
        DemonstrationError: names each difference.
    """
    own = rules_of(config)
    different = [
        f"env.{name}={rules[name]} (not {own[name]})"
        for name in RULES
        if name in rules and rules[name] != own[name]
    ]
    if different:
        raise DemonstrationError(
            f"{path}: recorded with other settings than those asked for: {', '.join(different)}; use the "
            "settings of the recording, or record demonstrations with these"
        )


_ARRAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    # By name: which count gives the length, type, and what follows the first dimension.
    "demonstration.scene": ("int32", ()),
    "demonstration.start": ("float64", (3,)),
    "demonstration.rotation": ("float64", (4,)),
    "demonstration.goal": ("float64", (3,)),
    "demonstration.radius": ("float64", ()),
    "demonstration.geodesic": ("float64", ()),
    "demonstration.seed": ("int64", ()),
    "demonstration.steps": ("int32", ()),
    "demonstration.success": ("uint8", ()),
    "demonstration.spl": ("float32", ()),
    "demonstration.distance_to_goal": ("float32", ()),
    "demonstration.path_length": ("float32", ()),
    "demonstration.collisions": ("int32", ()),
    "step.action": ("uint8", ()),
    "block.hash": ("int64", ()),
    "block.state": ("float32", (4,)),
}


class DemonstrationSet:
    """Demonstrations in the order of their recording, all or some of a file's.

    Example::

        demonstrations = read_demonstrations("expert.demos")
        few = demonstrations.select(np.arange(49))
        print(few[0].episode, few[0].actions)
    """

    def __init__(
        self, header: Header, ids: Sequence[str], arrays: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]
    ) -> None:
        """``ids`` and ``arrays`` are of the whole file; ``rows`` are its demonstrations that count."""
        self.header = header
        self._ids = tuple(ids)
        self._arrays = dict(arrays)
        self.rows = np.asarray(rows, dtype=np.int64)
        """Which of the file's demonstrations these are: (M,)."""
        steps = self._arrays["demonstration.steps"].astype(np.int64)
        blocks = -(-steps // BLOCK)
        self._first_step = np.cumsum(steps) - steps
        self._first_block = np.cumsum(blocks) - blocks
        self._num_blocks = blocks

    @classmethod
    def of(cls, header: Header, demonstrations: Sequence[Demonstration]) -> DemonstrationSet:
        """The set of these demonstrations."""
        number = {scene.scene_id: index for index, scene in enumerate(header.scenes)}
        columns: dict[str, list[Any]] = {name: [] for name in _ARRAYS}
        for one in demonstrations:
            episode = one.episode
            radius = np.nan if episode.goal_radius is None else episode.goal_radius
            for name, value in (
                ("scene", number[episode.scene_id]),
                ("start", episode.start_position),
                ("rotation", episode.start_rotation),
                ("goal", episode.goal_position),
                ("radius", radius),
                ("geodesic", episode.geodesic_distance),
                ("seed", one.seed),
                ("steps", len(one.actions)),
                *((name, getattr(one, name)) for name in ("success", "spl", "distance_to_goal")),
                *((name, getattr(one, name)) for name in ("path_length", "collisions")),
            ):
                columns[f"demonstration.{name}"].append(value)
            columns["step.action"].extend(one.actions)
            columns["block.hash"].extend(one.hashes)
            columns["block.state"].extend(one.states)
        arrays = {
            name: np.array(columns[name], dtype=kind).reshape(-1, *shape)
            for name, (kind, shape) in _ARRAYS.items()
        }
        ids = [one.episode.episode_id for one in demonstrations]
        return cls(header, ids, arrays, np.arange(len(demonstrations)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Demonstration:
        row = self.rows[index]
        own = {name: self._arrays[f"demonstration.{name}"][row] for name in ("seed", "success", "spl")}
        own |= {
            name: self._arrays[f"demonstration.{name}"][row]
            for name in ("distance_to_goal", "path_length", "collisions")
        }
        blocks = slice(self._first_block[row], self._first_block[row] + self._num_blocks[row])
        return Demonstration(
            self.episodes[index],
            int(own["seed"]),
            self.actions(index),
            self._arrays["block.hash"][blocks],
            self._arrays["block.state"][blocks],
            bool(own["success"]),
            float(own["spl"]),
            float(own["distance_to_goal"]),
            float(own["path_length"]),
            int(own["collisions"]),
        )

    @cached_property
    def episodes(self) -> tuple[Episode, ...]:
        """The episode of each demonstration."""
        made = []
        columns = {name.partition(".")[2]: array for name, array in self._arrays.items()}
        for row in self.rows.tolist():
            radius = float(columns["radius"][row])
            made.append(
                Episode(
                    episode_id=self._ids[row],
                    scene_id=self.header.scenes[columns["scene"][row]].scene_id,
                    start_position=tuple(columns["start"][row].tolist()),
                    start_rotation=tuple(columns["rotation"][row].tolist()),
                    goal_position=tuple(columns["goal"][row].tolist()),
                    goal_radius=None if np.isnan(radius) else radius,
                    geodesic_distance=float(columns["geodesic"][row]),
                )
            )
        return tuple(made)

    @property
    def steps(self) -> NDArray[np.int64]:
        """Length of each demonstration: (M,)."""
        return self._arrays["demonstration.steps"][self.rows].astype(np.int64)

    @property
    def seeds(self) -> NDArray[np.int64]:
        """Seed of each demonstration's noise of motion: (M,)."""
        return self._arrays["demonstration.seed"][self.rows]

    @property
    def success(self) -> NDArray[np.bool_]:
        """Which demonstrations reached their goal: (M,)."""
        return self._arrays["demonstration.success"][self.rows] != 0

    @property
    def first_steps(self) -> NDArray[np.int64]:
        """Place of each demonstration's first step among all steps of the file: (M,)."""
        return self._first_step[self.rows]

    @property
    def file_steps(self) -> int:
        """Steps of the whole file."""
        return len(self._arrays["step.action"])

    def column(self, name: str) -> NDArray[Any]:
        """``spl``, ``distance_to_goal``, ``path_length`` or ``collisions`` of each demonstration: (M,)."""
        return self._arrays[f"demonstration.{name}"][self.rows]

    def actions(self, index: int) -> NDArray[np.uint8]:
        """The actions of a demonstration: (L,)."""
        row = self.rows[index]
        first = self._first_step[row]
        return self._arrays["step.action"][first : first + self._arrays["demonstration.steps"][row]]

    def select(self, indices: NDArray[np.int64]) -> DemonstrationSet:
        """Some of these demonstrations, in the order of ``indices``."""
        return DemonstrationSet(self.header, self._ids, self._arrays, self.rows[indices])

    def chosen(self, count: int | None = None, successful: bool = True) -> DemonstrationSet:
        """The first ``count`` of them, or all; of those that reached their goal, or of all.

        Raises:
            ValueError: there are fewer.
        """
        rows = np.flatnonzero(self.success) if successful else np.arange(len(self))
        if count is not None and not 1 <= count <= len(rows):
            kind = "successful demonstrations" if successful else "demonstrations"
            raise ValueError(
                f"{count} demonstrations were asked for and there are {len(rows)} {kind}: ask for 1 to "
                f"{len(rows)}, or record more (the same `navagent demos record` with a larger --number)"
            )
        return self.select(rows[:count])

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the whole file's demonstrations: 64 hexadecimal digits."""
        return _content_hash(self._ids, self._arrays)

    def save(self, path: str | Path) -> None:
        """Writes the whole set, all of it or nothing; equal sets give equal bytes.

        Raises:
            OSError: it cannot be written; what was there before still is.
        """
        from safetensors.numpy import save

        header = {
            "format": FORMAT,
            "version": VERSION,
            **dataclasses.asdict(self.header),
            "episode_ids": self._ids,
            "sha256": self.sha256,
        }
        # One entry: the library writes several in no fixed order.
        text = json.dumps(header, sort_keys=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(save(self._arrays, {FORMAT: text}))


def _content_hash(ids: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> str:
    names = np.frombuffer(json.dumps(list(ids)).encode(), np.uint8)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return tensors_sha256({**tensors, "ids": torch.from_numpy(names.copy())})


def read_demonstrations(path: str | Path) -> DemonstrationSet:
    """Reads a file of demonstrations, and checks that it is whole and makes sense.

    Raises:
        DemonstrationError: it is missing, truncated, damaged, of another version or something else.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        raise DemonstrationError(
            f"{path}: a folder; expected a file that `navagent demos record` made. Only `imitation.demos=` "
            "takes folders, those of `navagent demos import`"
        )
    if not path.is_file():
        raise DemonstrationError(
            f"{path}: there is no such file of demonstrations; `navagent demos record {path}` makes one"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(FORMAT)
            if text is None:
                raise DemonstrationError(
                    f"{path}: a safetensors file, but not of demonstrations; expected one that "
                    "`navagent demos record` wrote"
                )
            header, ids, content = _parse_header(path, text)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DemonstrationError(
            f"{path}: truncated, damaged, or no file of demonstrations ({error}); copy it again from where "
            "it was recorded, or record it again"
        ) from None
    except OSError as error:
        raise DemonstrationError(f"{path}: cannot be read: {error.strerror or error}") from None
    _check_arrays(path, arrays, len(ids), len(header.scenes))
    if _content_hash(ids, arrays) != content:
        raise DemonstrationError(
            f"{path}: damaged: its contents do not have the hash in its header; copy it again from where it "
            "was recorded, or record it again"
        )
    return DemonstrationSet(header, ids, arrays, np.arange(len(ids)))


def _parse_header(path: Path, text: str) -> tuple[Header, list[str], str]:
    """The header, the episodes' ids and the contents' hash."""
    try:
        found = json.loads(text)
        version = found["version"]
        if version != VERSION:
            raise DemonstrationError(
                f"{path}: demonstrations of version {version!r}, this navagent reads version {VERSION}; use "
                f"the navagent that recorded it ({found.get('recorded_on', {}).get('navagent')}), or record "
                "it again"
            )
        header = Header(
            rules=_checked_rules(found["rules"]),
            source=Source(**found["source"]),
            scenes=tuple(SceneHash(**scene) for scene in found["scenes"]),
            wanted=int(found["wanted"]),
            recorded_on=dict(found["recorded_on"]),
        )
        ids, content = found["episode_ids"], found["sha256"]
        if not (isinstance(ids, list) and all(isinstance(name, str) for name in ids)):
            raise ValueError("episode_ids is no list of texts")
        if not all(isinstance(s.scene_id, str) and isinstance(s.sha256, str) for s in header.scenes):
            raise ValueError("scenes are no texts")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, DemonstrationError):
            raise
        raise DemonstrationError(
            f"{path}: its header does not describe demonstrations ({error!r}); record it again"
        ) from None
    return header, ids, content


def _checked_rules(rules: Mapping[str, Any]) -> dict[str, Any]:
    usual = EnvConfig()
    for name in RULES:
        kind = type(getattr(usual, name))
        if kind is float and type(rules[name]) is int:
            continue
        if type(rules[name]) is not kind:
            raise ValueError(f"rule {name} is {rules[name]!r}, expected {kind.__name__}")
    if set(rules) != set(RULES):
        raise ValueError(f"unknown rules {sorted(set(rules) - set(RULES))}")
    return dict(rules)


def _check_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], count: int, num_scenes: int) -> None:
    def refuse(fault: str) -> None:
        raise DemonstrationError(f"{path}: {fault}; it is damaged: record it again")

    if set(arrays) != set(_ARRAYS):
        refuse(f"holds arrays {sorted(arrays)}, expected {sorted(_ARRAYS)}")
    for name, (kind, shape) in _ARRAYS.items():
        array = arrays[name]
        if array.dtype != kind or array.shape[1:] != shape:
            refuse(f"{name} is {array.dtype} {array.shape}, expected {kind} {('N', *shape)}")
        if name.startswith("demonstration.") and len(array) != count:
            refuse(f"{name} has {len(array)} rows for {count} demonstrations")
    steps = arrays["demonstration.steps"].astype(np.int64)
    scene = arrays["demonstration.scene"]
    if count and steps.min() < 1:
        refuse("a demonstration has no steps")
    for name, length in (("step", int(steps.sum())), ("block", int((-(-steps // BLOCK)).sum()))):
        for array_name in (key for key in _ARRAYS if key.startswith(name + ".")):
            if len(arrays[array_name]) != length:
                refuse(f"{array_name} has {len(arrays[array_name])} rows, expected {length}")
    if count and not 0 <= scene.min() <= scene.max() < num_scenes:
        refuse(f"names scenes {scene.min()} to {scene.max()} of {num_scenes}")
    if len(arrays["step.action"]) and arrays["step.action"].max() >= len(Action):
        refuse(f"holds an action {arrays['step.action'].max()}, expected 0 to {len(Action) - 1}")
    for name in ("start", "rotation", "goal"):
        if not np.isfinite(arrays[f"demonstration.{name}"]).all():
            refuse(f"{name} of an episode is not finite")
