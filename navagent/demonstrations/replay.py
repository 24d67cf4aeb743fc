"""Replays recorded demonstrations in the simulator, and checks that it goes where they went."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from envs.sampler import EpisodeSampler
from envs.simulators.base import Action
from navagent.build import sampled_env
from navagent.config import TrainConfig
from navagent.demonstrations.features import StoredFeatures
from navagent.demonstrations.motion import seed_motion
from navagent.demonstrations.recorded import BLOCK, DemonstrationError, DemonstrationSet, StateHash
from navagent.demonstrations.stream import DemonstratedStep, DemonstrationStream
from navagent.distributed import Ranks
from navagent.runs import versions

_IDLE = -1


class Replay:
    """N agents that do again what was demonstrated, step by step.

    Args:
        config: sensors, device and threads; everything else is the recording's.
        demonstrations: what is replayed.
        scenes: file of each of their scenes, by id.
        num_envs: agents side by side.
        mode: endless streams, or each demonstration once.
        seed: of the streams' order and of the cameras' noise.
        ranks: the processes that share the streams.
        tolerance: how far states may lie from the recorded ones at the end of each block [m, rad]; with 0
            every state must be bit-equal.
    """

    def __init__(
        self,
        config: TrainConfig,
        demonstrations: DemonstrationSet,
        scenes: dict[str, Path],
        num_envs: int,
        mode: Literal["endless", "once"] = "endless",
        seed: int = 0,
        ranks: Ranks | None = None,
        tolerance: float = 0.0,
    ) -> None:
        if not tolerance >= 0:
            raise ValueError(f"tolerance {tolerance} must be at least 0")
        config = demonstrations.header.settings(config)
        self.demonstrations = demonstrations
        self.tolerance = tolerance
        ranks = ranks or Ranks()
        sampler = EpisodeSampler(
            demonstrations.episodes,
            num_envs,
            scenes,
            seed=seed,
            mode=mode,
            first_agent=ranks.rank * num_envs,
            total_agents=ranks.size * num_envs,
        )
        self.env = sampled_env(config, sampler)
        self._simulator = config.simulator.name
        seed_motion(self.env, demonstrations.seeds)
        self.rows = np.full(num_envs, _IDLE, dtype=np.int64)
        """Which demonstration each agent does, -1 where it is idle: (N,)."""
        self.steps = np.zeros(num_envs, dtype=np.int64)
        """Which of its steps comes next: (N,)."""
        self._length = demonstrations.steps
        lists = [demonstrations.actions(index) for index in range(len(demonstrations))]
        self._actions = np.concatenate(lists).astype(np.int64)
        self._first = np.cumsum(self._length) - self._length
        self._offset = 0 if self.env.config.stop == "called" else int(Action.MOVE_FORWARD)
        self._hash = StateHash(num_envs, self.env.simulator.device)
        self.seed = seed

    def begin(self) -> dict[str, Tensor]:
        """Starts the first demonstrations and returns the first observations, (N, ...) by name."""
        observations, _ = self.env.reset(seed=self.seed)
        self.steps[:] = 0
        self._arrive()
        return observations

    @property
    def active(self) -> NDArray[np.bool_]:
        """Which agents have a demonstration: (N,)."""
        return self.rows != _IDLE

    def actions(self) -> Tensor:
        """What each agent does next, in the environment's action space: (N,) int64."""
        places = np.where(self.active, self._first[self.rows] + self.steps, 0)
        actions = np.where(self.active, self._actions[places] - self._offset, 0)
        return torch.from_numpy(actions).to(self.env.simulator.device)

    def advance(self) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Any]]:
        """Does the next step of every agent; returns what the environment's ``step`` does.

        A demonstration that is interrupted by the death of a simulator's process begins again.

        Raises:
            DemonstrationError: a demonstration goes elsewhere, or ends at another step, than it did.
        """
        outcome = self.env.step(self.actions())
        infos = outcome[-1]
        nobody = torch.zeros(len(self.rows), dtype=torch.bool)
        ended = infos.get("_episode", nobody).cpu().numpy()
        again = infos.get("interrupted", nobody).cpu().numpy()
        expected = self.active & (self.steps + 1 == self._length[self.rows])
        if (wrong := np.flatnonzero((ended != expected) & ~again)).size:
            agent = int(wrong[0])
            how = "ends early" if ended[agent] else "does not end"
            self._refuse(agent, int(self.steps[agent]) // BLOCK, f"{how} at step {self.steps[agent]}")
        if ended.any():
            self._check_paths(np.flatnonzero(ended), infos["episode"]["path_length"].cpu().numpy())
        self.steps = np.where(ended | again, 0, self.steps + 1)
        self._arrive()
        return outcome

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly."""
        return {
            "env": self.env.state_dict(),
            "steps": self.steps.tolist(),
            "hash": self._hash.value.clone(),
            "demonstrations": self.demonstrations.sha256,
        }

    def load_state_dict(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """Goes on from a saved state, and returns the observations at that moment."""
        if state["demonstrations"] != self.demonstrations.sha256:
            raise ValueError(
                "the saved state is of a replay of other demonstrations; go on with the same file, unchanged"
            )
        observations: dict[str, Tensor] = self.env.load_state_dict(state["env"])
        self.steps = np.array(state["steps"], dtype=np.int64)
        self._hash.value = state["hash"].to(self.env.simulator.device).clone()
        self.rows = np.array(self.env.current_episodes(), dtype=np.int64)
        return observations

    def close(self) -> None:
        """Closes the simulator."""
        self.env.close()

    def _arrive(self) -> None:
        """Takes note of where the agents are now, and compares it where a block ends."""
        self.rows = np.array(self.env.current_episodes(), dtype=np.int64)
        simulator = self.env.simulator
        states = torch.cat([simulator.position, simulator.yaw[:, None]], dim=1)
        starts = torch.from_numpy(self.steps == 0).to(states.device)
        value = self._hash.add(states, starts)
        following = self.steps + 1
        ends = self.active & ((following % BLOCK == 0) | (following == self._length[self.rows]))
        if not ends.any():
            return
        hashes, places = value.cpu().numpy(), states.cpu().numpy()
        for agent in np.flatnonzero(ends).tolist():
            recorded = self.demonstrations[int(self.rows[agent])]
            block = int(self.steps[agent]) // BLOCK
            if self.tolerance:
                off = float(_distance(places[agent], recorded.states[block]))
                if not off <= self.tolerance:
                    self._refuse(agent, block, f"the agent is {off:.3g} m or rad off")
            elif hashes[agent] != recorded.hashes[block]:
                off = float(_distance(places[agent], recorded.states[block]))
                self._refuse(agent, block, f"the states differ, {off:.3g} m or rad at the end of these steps")

    def _check_paths(self, agents: NDArray[np.int64], lengths: NDArray[np.float32]) -> None:
        """Compares the ends of demonstrations, whose last states nobody observes, by the paths' lengths."""
        recorded = self.demonstrations.column("path_length")
        for agent in agents.tolist():
            row = int(self.rows[agent])
            off = abs(float(lengths[agent]) - float(recorded[row]))
            if off > self.tolerance * self._length[row]:
                last = int(self._length[row] - 1)
                self._refuse(agent, last // BLOCK, f"the path is {off:.3g} m longer or shorter")

    def _refuse(self, agent: int, block: int, fault: str) -> None:
        row = int(self.rows[agent])
        episode = self.demonstrations.episodes[row]
        steps = f"{block * BLOCK} to {min((block + 1) * BLOCK, int(self._length[row])) - 1}"
        recorded = self.demonstrations.header.recorded_on
        here = versions() | {"simulator": self._simulator}
        changed = [
            f"{name} {recorded[name]} then and {here[name]} now"
            for name in recorded
            if name in here and recorded[name] != here[name]
        ]
        raise DemonstrationError(
            f"demonstration {int(self.demonstrations.rows[row])} (scene {episode.scene_id!r}, episode "
            f"{episode.episode_id!r}) is not replayed as it was recorded: in steps {steps} {fault}. "
            + (f"Recorded on another system: {', '.join(changed)}. " if changed else "")
            + "Record it again here, or allow small differences with a tolerance"
        )


def _distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The largest difference of positions [m] and headings [rad] of two states (4,)."""
    turn = np.abs((one[3] - other[3] + np.pi) % (2 * np.pi) - np.pi)
    return float(np.max([*np.abs(one[:3] - other[:3]), turn]))


@dataclass(frozen=True)
class ReplayedStep:
    """One step of every agent, seen from behind."""

    observations: dict[str, Tensor]
    """Before the action, by name: (N, ...)."""
    actions: Tensor
    """(N,) int64."""
    rows: NDArray[np.int64]
    """The demonstration, -1 for agents that are idle: (N,)."""
    steps: NDArray[np.int64]
    """Which of its steps this was: (N,)."""
    rewards: Tensor
    """(N,) float32."""
    terminated: Tensor
    """(N,) bool."""
    truncated: Tensor
    """(N,) bool; false where a demonstration was interrupted, and its first step comes again."""
    final_observations: dict[str, Tensor] | None
    """Where a demonstration ended, what the agent perceives last, by name: (N, ...); None where none did."""


def replay_once(replay: Replay) -> Iterator[ReplayedStep]:
    """Every demonstration of ``replay``, whose mode is ``"once"``, step by step and from start to end."""
    observations = replay.begin()
    while replay.active.any():
        rows, steps, actions = replay.rows, replay.steps.copy(), replay.actions()
        following, rewards, terminated, truncated, infos = replay.advance()
        if "interrupted" in infos:
            truncated = truncated & ~infos["interrupted"]
        yield ReplayedStep(
            observations, actions, rows, steps, rewards, terminated, truncated, infos.get("final_obs")
        )
        observations = following


class ReplayStream(DemonstrationStream):
    """A stream of recorded demonstrations that the simulator replays, at any resolution, with any sensor.

    Arguments are those of :class:`Replay`.

    Raises:
        ValueError: there are fewer demonstrations than agents.
    """

    def __init__(
        self,
        config: TrainConfig,
        demonstrations: DemonstrationSet,
        scenes: dict[str, Path],
        num_envs: int,
        seed: int = 0,
        ranks: Ranks | None = None,
        tolerance: float = 0.0,
        features: StoredFeatures | None = None,
    ) -> None:
        ranks = ranks or Ranks()
        check_enough(len(demonstrations), num_envs * ranks.size)
        self._replay = Replay(
            config, demonstrations, scenes, num_envs, "endless", seed, ranks, tolerance=tolerance
        )
        env = self._replay.env
        assert isinstance(env.single_observation_space, spaces.Dict)
        assert isinstance(env.single_action_space, spaces.Discrete)
        self.num_envs = num_envs
        self.num_demonstrations = len(demonstrations)
        self.steps_per_pass = int(demonstrations.steps.sum())
        self.scene_ids = frozenset(episode.scene_id for episode in demonstrations.episodes)
        self.simulated = env
        self.single_observation_space = env.single_observation_space
        self.single_action_space = env.single_action_space
        self.device = env.simulator.device
        self._features = features
        self._first_steps = demonstrations.first_steps
        self._agents = num_envs * ranks.size
        self._given = 0
        self._observations = self._replay.begin()

    @property
    def steps_taken(self) -> int:
        """See :class:`DemonstrationStream`."""
        return self._given * self._agents

    def __next__(self) -> DemonstratedStep:
        """See :class:`DemonstrationStream`."""
        replay = self._replay
        if self._given:
            self._observations = replay.advance()[0]
        self._given += 1
        frozen = None
        if self._features is not None:
            frozen = self._features.read(self._first_steps[replay.rows] + replay.steps, self.device)
        return DemonstratedStep(
            observations=self._observations,
            actions=replay.actions(),
            episode_starts=torch.from_numpy(replay.steps == 0).to(self.device),
            demonstrations=torch.from_numpy(replay.rows.copy()),
            steps=torch.from_numpy(replay.steps.copy()),
            frozen=frozen,
        )

    def use_features(self, features: StoredFeatures) -> None:
        """See :class:`DemonstrationStream`."""
        self._features = features

    def state_dict(self) -> dict[str, Any]:
        """See :class:`DemonstrationStream`."""
        return {"replay": self._replay.state_dict(), "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`DemonstrationStream`."""
        self._observations = self._replay.load_state_dict(state["replay"])
        self._given = int(state["given"])

    def close(self) -> None:
        """See :class:`DemonstrationStream`."""
        self._replay.close()


def check_enough(demonstrations: int, agents: int) -> None:
    """Refuses more agents than demonstrations: some would do the same at the same time."""
    if agents > demonstrations:
        raise ValueError(
            f"{agents} agents side by side for {demonstrations} demonstrations: some would learn the same "
            f"twice; use at most {demonstrations} agents, or more demonstrations"
        )
