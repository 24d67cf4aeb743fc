"""Demonstrations as an environment: whatever an agent wants to do, what was demonstrated happens.

So a learner collects demonstrations as it collects its own rollouts, with its memory carried along, and
behaviour cloning needs no loop of its own: the expert's action in each state is the one that was taken there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from envs.files import cache_dir
from navagent.build import Split
from navagent.config import TrainConfig, as_typed, flatten
from navagent.demonstrations.open import open_features, open_stream
from navagent.demonstrations.recorded import DemonstrationError, DemonstrationSet, read_demonstrations
from navagent.demonstrations.recording import RecordOptions, record_demonstrations
from navagent.demonstrations.stream import DemonstratedStep, DemonstrationStream
from navagent.distributed import Ranks

Observations = dict[str, Tensor]

OWN_DEMONSTRATIONS = 1000
"""How many the expert records where the settings name neither demonstrations nor a number."""


class DemonstratedVectorEnv(VectorEnv[Observations, Any, Any]):
    """N agents that follow a stream of demonstrations.

    Rewards are 0 and nothing is measured: what a demonstration was worth is not part of it. Where one ends,
    the next one begins with the same step.

    Args:
        stream: The demonstrations; closed with this environment.
    """

    output = "torch"
    autoreset_mode = AutoresetMode.SAME_STEP

    def __init__(self, stream: DemonstrationStream) -> None:
        self.stream = stream
        self.num_envs = stream.num_envs
        self.metadata = {"autoreset_mode": self.autoreset_mode}
        self.single_observation_space = stream.single_observation_space
        self.single_action_space = stream.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._actions = torch.zeros(self.num_envs, dtype=torch.int64, device=stream.device)
        self.stored_features: dict[str, Tensor] | None = None
        """What frozen encoders make of the present observations, by name: (N, ...); None where not stored."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """The stream's next step, which is its first if it is new; a seed does not change its order."""
        return self._next().observations, {}

    def step(self, actions: Any) -> tuple[Observations, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Does what was demonstrated; ``actions`` (N,) are ignored."""
        step = self._next()
        nothing = torch.zeros(self.num_envs, device=self.stream.device)
        never = torch.zeros(self.num_envs, dtype=torch.bool, device=self.stream.device)
        return step.observations, nothing, step.episode_starts, never, {}

    def _next(self) -> DemonstratedStep:
        step = next(self.stream)
        self._actions, self.stored_features = step.actions, step.frozen
        return step

    def expert_actions(self) -> Tensor:
        """What was done in the present states: (N,) int64."""
        return self._actions

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here."""
        return {
            "stream": self.stream.state_dict(),
            "actions": self._actions,
            "features": self.stored_features,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state."""
        self.stream.load_state_dict(state["stream"])
        self._actions = state["actions"].to(self.stream.device)
        self.stored_features = state.get("features")

    def close_extras(self, **kwargs: Any) -> None:
        """Closes the stream."""
        self.stream.close()


def demonstrations_of(config: TrainConfig) -> Path:
    """The demonstrations that the settings name; where they name none, the expert's, recorded into the cache.

    What is there already is not recorded again, and an interrupted recording goes on.
    """
    imitation = config.imitation
    if imitation.demos is not None:
        return Path(imitation.demos).expanduser()
    world = ["scenes", "env"]
    if config.simulator.name != "raycast":
        world += ["simulator.name", "simulator.scene_dataset_config"]
    key = hashlib.sha256("\n".join(_typed(config, *world)).encode()).hexdigest()[:16]
    path = cache_dir() / "demonstrations" / f"expert-{key}.demos"
    record_expert(config, path, imitation.num_demos or OWN_DEMONSTRATIONS)
    return path


def record_expert(
    config: TrainConfig, path: Path, number: int, progress: Callable[[int, int], None] | None = None
) -> DemonstrationSet:
    """The demonstrations of a file, to which the expert's are added until there are ``number``.

    Args:
        config: the world; where the homes and episodes are, and where to compute.
        path: the file; it need not be there.
        number: how many there shall be at least.
        progress: called with the demonstrations that are done and all.

    Raises:
        DemonstrationError: the file holds others than these, or the world has fewer episodes.
    """
    if path.exists() and len(found := read_demonstrations(path)) >= number:
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    work = ["scenes", "env", "device", "num_threads"]
    if config.simulator.name != "raycast":
        # What another simulator does could differ from a replay in this one.
        work.append("simulator")
    record_demonstrations(RecordOptions(str(path), tuple(_typed(config, *work)), number=number), progress)
    return read_demonstrations(path)


def _typed(config: TrainConfig, *names: str) -> list[str]:
    """Settings, or those of whole groups, as they are typed."""
    return [
        f"{name}={as_typed(value)}"
        for name, value in flatten(config).items()
        if {name, name.partition(".")[0]} & set(names)
    ]


def demonstrated_env(config: TrainConfig, ranks: Ranks) -> DemonstratedVectorEnv:
    """The settings' demonstrations as an environment of ``algorithm.num_envs`` agents, in each of ``ranks``.

    Raises:
        DemonstrationError: they cannot be used, see :func:`navagent.demonstrations.open.open_stream`.
        ValueError: there are fewer demonstrations than agents, or than ``imitation.num_demos``.
    """
    with ranks.one_before_others():
        path = demonstrations_of(config)
    number = config.imitation.num_demos
    if config.imitation.demos is None:
        # The file may hold more, of an earlier run, and hardly ever the expert misses the goal.
        number = min(number or OWN_DEMONSTRATIONS, int(read_demonstrations(path).success.sum()))
    stream = open_stream(config, path, config.algorithm.num_envs, count=number, seed=config.seed, ranks=ranks)
    return DemonstratedVectorEnv(stream)


def check_unseen(env: DemonstratedVectorEnv, train: Split, val: Split) -> None:
    """Refuses demonstrations in homes that are to be unseen ones.

    Raises:
        DemonstrationError: names the first such home.
    """
    seen = sorted(env.stream.scene_ids & (val.scenes.keys() - train.scenes.keys()))
    if seen:
        raise DemonstrationError(
            f"demonstrations take place in {len(seen)} homes of split {val.name!r} ({seen[0]}), which the "
            f"agent is evaluated in as unseen ones: take demonstrations of split {train.name!r}, or another "
            "scenes.val_split"
        )


def store_features(env: DemonstratedVectorEnv, config: TrainConfig, policy: Any, ranks: Ranks) -> int:
    """Has the features of the policy's frozen encoders computed once, and handed over with every step.

    Call it when the policy has its weights: they decide where the features are kept.

    Returns:
        The size of the features on the disk [bytes]; 0 where the policy has none that never change.

    Raises:
        DemonstrationError: they cannot be stored, see
            :func:`navagent.demonstrations.features.stored_features`.
    """
    with ranks.one_before_others():
        features = open_features(config, demonstrations_of(config), policy)
    if features is None:
        return 0
    env.stream.use_features(features)
    return features.num_bytes
