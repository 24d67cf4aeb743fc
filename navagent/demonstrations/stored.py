"""Demonstrations that carry their observations: folders of arrays, from Minari or anywhere.

Nothing is simulated: a learner reads what was stored, from memory-mapped files. ``episodes`` are the rows of
the arrays one after another, each with as many steps as ``about.json`` says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from envs.episodes import Episode
from envs.sampler import EpisodeSampler
from envs.vector_env import PREVIOUS_ACTION
from navagent.agent_spaces import observation_space
from navagent.build import training_device
from navagent.config import TrainConfig
from navagent.demonstrations.arrays import open_arrays, read_about, writing
from navagent.demonstrations.recorded import DemonstrationError, check_rules
from navagent.demonstrations.replay import check_enough
from navagent.demonstrations.stream import DemonstratedStep, DemonstrationStream
from navagent.distributed import Ranks

KIND = "stored sequences"
_ACTIONS = "actions"
_OBSERVATION = "observations/"


@dataclass(frozen=True)
class Sequence:
    """One demonstration with all that was observed."""

    observations: dict[str, NDArray[Any]]
    """Before each action, by name: (L, ...)."""
    actions: NDArray[np.int64]
    """(L,)."""
    success: bool
    """Whether it reached its goal."""


@dataclass(frozen=True)
class StoredSequences:
    """Sequences of a folder, mapped into memory."""

    path: Path
    """The folder."""
    observations: dict[str, NDArray[Any]]
    """By name: (steps, ...)."""
    actions: NDArray[np.int64]
    """(steps,)."""
    lengths: NDArray[np.int64]
    """Steps of each sequence: (M,)."""
    success: NDArray[np.bool_]
    """Which reached their goal: (M,)."""
    num_actions: int
    """How many actions there are."""
    source: str
    """Where they come from."""
    rules: dict[str, Any]
    """Settings of ``env`` that they were recorded with, as far as they are known."""
    sha256: str
    """SHA-256 of all that they are: 64 hexadecimal digits."""

    def __len__(self) -> int:
        return len(self.lengths)


def write_sequences(
    folder: Path,
    sequences: Iterable[Sequence],
    steps: int,
    num_actions: int,
    source: str,
    rules: Mapping[str, Any] | None = None,
) -> None:
    """Writes sequences of ``steps`` steps together into a folder, all of them or nothing.

    Args:
        folder: what to make.
        sequences: what is written.
        steps: of all of them.
        num_actions: how many actions there are.
        source: where they come from.
        rules: settings of ``env`` that they were recorded with, by name; None where nothing is known.

    Raises:
        DemonstrationError: the folder is there already, a sequence does not fit the others, or there are
            none.
    """
    lengths: list[int] = []
    success: list[bool] = []
    done = 0
    with writing(folder) as writer:
        if writer is None:
            raise DemonstrationError(f"{folder}: exists already; give another folder, or delete it")
        for sequence in sequences:
            rows = slice(done, done + len(sequence.actions))
            columns = {_OBSERVATION + name: value for name, value in sequence.observations.items()}
            for name, value in (columns | {_ACTIONS: sequence.actions}).items():
                if name not in writer and not lengths:
                    writer.array(name, (steps, *value.shape[1:]), value.dtype)
                if name not in writer or writer[name][rows].shape != value.shape:
                    raise DemonstrationError(
                        f"sequence {len(lengths)}: {name} has shape {value.shape}, which does not fit the "
                        "sequences before it"
                    )
                writer[name][rows] = value
            done = rows.stop
            lengths.append(len(sequence.actions))
            success.append(sequence.success)
        if not done or done != steps:
            raise DemonstrationError(f"{source}: holds {done} steps, expected {steps} and at least 1")
        writer.finish(
            {
                "kind": KIND,
                "lengths": lengths,
                "success": success,
                "num_actions": num_actions,
                "source": source,
                "rules": dict(rules or {}),
            }
        )


def read_sequences(path: str | Path) -> StoredSequences:
    """Opens a folder of stored sequences.

    Raises:
        DemonstrationError: it is none, of another version, or damaged.
    """
    path = Path(path)
    about = read_about(path, KIND)
    arrays = open_arrays(path, about)
    try:
        lengths = np.array(about["lengths"], dtype=np.int64)
        success = np.array(about["success"], dtype=bool)
        actions, num_actions, source = arrays[_ACTIONS], int(about["num_actions"]), str(about["source"])
        rules = dict(about.get("rules", {}))
        sound = (
            lengths.min() > 0
            and len(success) == len(lengths)
            and 0 <= actions.min() <= actions.max() < num_actions
            and all(len(array) == lengths.sum() for array in arrays.values())
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DemonstrationError(
            f"{path}: not a sound folder of {KIND} ({error!r}); import it again"
        ) from None
    if not sound:
        raise DemonstrationError(
            f"{path}: lengths, actions and arrays do not fit each other; import it again"
        )
    observations = {
        name.removeprefix(_OBSERVATION): array
        for name, array in arrays.items()
        if name.startswith(_OBSERVATION)
    }
    content = json.dumps([about[name] for name in ("arrays", "lengths", "success")], sort_keys=True)
    return StoredSequences(
        path,
        observations,
        actions,
        lengths,
        success,
        num_actions,
        source,
        rules,
        hashlib.sha256(content.encode()).hexdigest(),
    )


class StoredStream(DemonstrationStream):
    """A stream of stored sequences, see :class:`~navagent.demonstrations.stream.DemonstrationStream`.

    Args:
        config: which observations are wanted, of which shape, and where.
        sequences: what is read.
        num_envs: agents side by side.
        count: use only the first so many.
        successful: leave out sequences that did not reach their goal.
        seed: of the order.
        ranks: the processes that share the stream.

    Raises:
        DemonstrationError: an observation is missing or of another shape, or they were recorded with other
            settings.
        ValueError: there are fewer sequences than agents, or than ``count``.
    """

    def __init__(
        self,
        config: TrainConfig,
        sequences: StoredSequences,
        num_envs: int,
        count: int | None = None,
        successful: bool = True,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        ranks = ranks or Ranks()
        rows = np.flatnonzero(sequences.success) if successful else np.arange(len(sequences))
        if not 1 <= (len(rows) if count is None else count) <= len(rows):
            raise ValueError(
                f"{sequences.path}: {count} sequences were asked for and there are {len(rows)}"
                f"{' successful ones' * successful}; ask for 1 to {len(rows)}"
            )
        rows = rows[:count]
        check_enough(len(rows), num_envs * ranks.size)
        self.num_envs = num_envs
        self.num_demonstrations = len(rows)
        self.steps_per_pass = int(sequences.lengths[rows].sum())
        self.scene_ids = frozenset()
        self.device = training_device(config.device)
        self._sequences = sequences
        self._rows = rows
        self._first = np.cumsum(sequences.lengths) - sequences.lengths
        self.single_action_space = spaces.Discrete(3 if config.env.stop == "automatic" else 4)
        if self.single_action_space.n != sequences.num_actions:
            raise DemonstrationError(
                f"{sequences.path}: has {sequences.num_actions} actions and the agent "
                f"{self.single_action_space.n}: set env.stop to 'called' for 4 actions, 'automatic' for 3"
            )
        check_rules(sequences.path, sequences.rules, config)
        self.single_observation_space = _space(config, sequences)
        self._agents = num_envs * ranks.size
        self._given = 0
        # The order is the environments' own; where the sequences took place does not matter for it.
        nowhere = Episode("", "", (0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0), None, 0.0)
        self._sampler = EpisodeSampler(
            [nowhere] * len(rows),
            num_envs,
            {"": sequences.path},
            seed=seed,
            first_agent=ranks.rank * num_envs,
            total_agents=self._agents,
        )
        self._current = np.array(self._sampler.next(range(num_envs)), dtype=np.int64)
        self._steps = np.zeros(num_envs, dtype=np.int64)

    @property
    def steps_taken(self) -> int:
        """See :class:`~navagent.demonstrations.stream.DemonstrationStream`."""
        return self._given * self._agents

    def __next__(self) -> DemonstratedStep:
        """See :class:`~navagent.demonstrations.stream.DemonstrationStream`."""
        lengths = self._sequences.lengths[self._rows]
        if self._given:
            self._steps += 1
            ended = np.flatnonzero(self._steps == lengths[self._current])
            self._current[ended] = self._sampler.next(ended.tolist())
            self._steps[ended] = 0
        self._given += 1
        places = self._first[self._rows[self._current]] + self._steps
        observations = {name: self._observe(name, places) for name in self.single_observation_space}
        return DemonstratedStep(
            observations=observations,
            actions=torch.from_numpy(np.asarray(self._sequences.actions[places])).to(self.device),
            episode_starts=torch.from_numpy(self._steps == 0).to(self.device),
            demonstrations=torch.from_numpy(self._current.copy()),
            steps=torch.from_numpy(self._steps.copy()),
        )

    def _observe(self, name: str, places: NDArray[np.int64]) -> Tensor:
        if name in self._sequences.observations:
            value = np.asarray(self._sequences.observations[name][places])
        else:
            # The action before is known without having been observed.
            before = self._sequences.actions[np.maximum(places - 1, 0)]
            value = np.where(self._steps == 0, 0, before + 1)
        return torch.from_numpy(value).to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~navagent.demonstrations.stream.DemonstrationStream`."""
        return {
            "sampler": self._sampler.state_dict(),
            "current": self._current.tolist(),
            "steps": self._steps.tolist(),
            "given": self._given,
            "sequences": self._sequences.sha256,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~navagent.demonstrations.stream.DemonstrationStream`."""
        # States of earlier versions do not say of what they are.
        if state.get("sequences", self._sequences.sha256) != self._sequences.sha256:
            raise ValueError(
                f"the saved state is of other sequences than {self._sequences.path} has; go on with the same "
                "folder, unchanged"
            )
        self._sampler.load_state_dict(state["sampler"])
        self._current = np.array(state["current"], dtype=np.int64)
        self._steps = np.array(state["steps"], dtype=np.int64)
        self._given = int(state["given"])

    def close(self) -> None:
        """Nothing is held but mapped files."""


def _space(config: TrainConfig, sequences: StoredSequences) -> spaces.Dict:
    """The observation space of an agent of ``config``; refuses sequences that do not give it."""
    wanted = dict(observation_space(config).spaces)
    wanted[PREVIOUS_ACTION] = spaces.Discrete(sequences.num_actions + 1)
    for name, space in wanted.items():
        found = sequences.observations.get(name)
        if found is None and name == PREVIOUS_ACTION:
            continue
        there = ", ".join(f"{key} {array.shape[1:]}" for key, array in sequences.observations.items())
        if found is None or found.shape[1:] != space.shape or found.dtype != space.dtype:
            has = "is not there" if found is None else f"is {found.dtype} {found.shape[1:]}"
            raise DemonstrationError(
                f"{sequences.path}: the agent needs observation {name!r}, {space.dtype} {space.shape}, which "
                f"{has}; the sequences have {there}: set sensors to these"
            )
    return spaces.Dict(wanted)
