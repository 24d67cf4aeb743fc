"""Records demonstrations: of the expert, of a trained agent, of a person."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from envs.episodes import Episode
from envs.sampler import EpisodeSampler
from envs.simulators.base import Action
from envs.vector_env import NO_EPISODE, PointNavVectorEnv
from navagent.build import Split, sampled_env
from navagent.config import TrainConfig
from navagent.demonstrations.motion import seed_motion
from navagent.demonstrations.recorded import (
    BLOCK,
    Demonstration,
    DemonstrationError,
    DemonstrationSet,
    Header,
    SceneHash,
    Source,
    StateHash,
    read_demonstrations,
    rules_of,
)
from navagent.demonstrations.scene_files import scene_sha256
from navagent.evaluation.agents import Agent
from navagent.runs import versions

_PART = 4
"""Demonstrations an agent does, on average, before the next part is begun with all agents anew."""
_SECONDS_BETWEEN_SAVES = 5.0
_SYSTEM = ("navagent", "torch", "warp-lang", "platform", "cpu", "gpu")


class StartOverError(Exception):
    """The person wants to begin the episode anew."""


class LeaveError(Exception):
    """The person has had enough."""


class PartSampler(EpisodeSampler):
    """Hands out the episodes of one part of a list, in their order, to whoever is free."""

    def __init__(self, episodes: Sequence[Episode], num_agents: int, scenes: dict[str, Path]) -> None:
        self.part = range(0)
        """The episodes that the next reset starts with."""
        super().__init__(episodes, num_agents, scenes, mode="once")

    def restart(self, seed: int | None = None) -> None:
        """Starts the part anew."""
        super().restart(seed)
        self._left = iter(self.part)

    def next(self, agents: Iterable[int]) -> list[int]:
        """Index of the next episode of each agent, -1 where none is left."""
        return [next(self._left, NO_EPISODE) for _ in agents]


def in_turn(episodes: Sequence[Episode], seed: int) -> list[int]:
    """Indices of the episodes in an order such that any first so many are spread evenly over the scenes.

    It is random otherwise, by the seed.
    """
    seen: dict[str, int] = defaultdict(int)
    turns: list[tuple[int, int]] = []
    shuffled = np.random.default_rng([seed, 0xDE]).permutation(len(episodes)).tolist()
    for place, index in enumerate(shuffled):
        scene = episodes[index].scene_id
        turns.append((seen[scene], place))
        seen[scene] += 1
    return [shuffled[place] for _, place in sorted(turns)]


def demonstration_seed(seed: int, number: int) -> int:
    """The seed of a demonstration's noise of motion: 0 to 2^63 - 1."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def record(
    path: str | Path,
    config: TrainConfig,
    split: Split,
    source: Source,
    make_agent: Callable[[PointNavVectorEnv], Agent],
    number: int,
    *,
    part: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DemonstrationSet:
    """Records ``number`` demonstrations into the file ``path``, or what a file that is there still lacks.

    Episodes are played in parts; a part is a matter of the source and its place alone, so that it does not
    matter what was recorded when. What a network does is kept by whole parts, for who plays beside it changes
    its last bits; the expert and a person are kept one by one.

    Args:
        path: the file.
        config: the world and what the agent perceives.
        split: the episodes.
        source: where the demonstrations come from, for the file.
        make_agent: the agent, for the environment that it will act in.
        number: how many demonstrations the file shall hold.
        part: demonstrations a part; four an agent if None. With one, which a person plays, each is saved as
            soon as it is done.
        progress: called with the demonstrations that are done and all.

    Returns:
        What the file holds now: fewer than asked for where the person left.

    Raises:
        DemonstrationError: the file holds demonstrations of another source, or there are too few episodes.
    """
    path = Path(path)
    if not 1 <= number <= len(split.episodes):
        raise DemonstrationError(
            f"{number} demonstrations were asked for and split {split.name!r} has {len(split.episodes)} "
            f"episodes: ask for 1 to {len(split.episodes)}, or give another split"
        )
    system = versions()
    header = Header(
        rules=rules_of(config),
        source=source,
        scenes=tuple(SceneHash(name, scene_sha256(file)) for name, file in split.scenes.items()),
        wanted=number,
        recorded_on={name: system[name] for name in _SYSTEM} | {"simulator": config.simulator.name},
    )
    done: list[Demonstration] = []
    if path.exists():
        before = read_demonstrations(path)
        _check_same(path, before.header, header)
        if len(before) >= number:
            return before
        header = dataclasses.replace(before.header, wanted=number)
        done = [before[index] for index in range(len(before))]
    planned = [split.episodes[index] for index in in_turn(split.episodes, source.seed)[:number]]
    scenes = {name: split.scenes[name] for name in dict.fromkeys(e.scene_id for e in planned)}
    num_envs = min(source.num_envs, number)
    sampler = PartSampler(planned, num_envs, scenes)
    env = sampled_env(config, sampler, AutoresetMode.NEXT_STEP)
    seed_motion(env, np.array([demonstration_seed(source.seed, n) for n in range(number)]))
    # What a person did is not done again by itself.
    pause = 0.0 if part == 1 else _SECONDS_BETWEEN_SAVES
    part = part or _PART * source.num_envs
    saved, saved_at = len(done), time.monotonic()
    try:
        agent = make_agent(env)
        if progress is not None:
            progress(len(done), number)
        while len(done) < number:
            begin = len(done)
            sampler.part = range(begin, min((begin // part + 1) * part, number))
            waiting: list[Demonstration] = []
            with contextlib.suppress(StartOverError):
                for one in _play(env, agent, source.seed):
                    waiting.append(one)
                    if source.checkpoint is None or len(waiting) == len(sampler.part):
                        done += waiting
                        waiting = []
                    if progress is not None:
                        progress(len(done) + len(waiting), number)
                    if len(done) > saved and time.monotonic() - saved_at >= pause:
                        DemonstrationSet.of(header, done).save(path)
                        saved, saved_at = len(done), time.monotonic()
    except LeaveError:
        pass
    finally:
        env.close()
        if len(done) > saved:
            DemonstrationSet.of(header, done).save(path)
    return DemonstrationSet.of(header, done)


def _check_same(path: Path, found: Header, wanted: Header) -> None:
    """Raises where a file's demonstrations come from elsewhere than those to be added."""
    ours, theirs = dataclasses.asdict(wanted.source), dataclasses.asdict(found.source)
    if wanted.source.checkpoint is None:
        # Who else plays changes what a network computes in its last bits, and nothing for others.
        theirs["num_envs"] = ours["num_envs"]
    different = [
        f"{name} {theirs[name]!r}, not {ours[name]!r}" for name in ours if ours[name] != theirs[name]
    ]
    different += [
        f"env.{name} {found.rules[name]!r}, not {value!r}"
        for name, value in wanted.rules.items()
        if found.rules[name] != value
    ]
    if found.scenes != wanted.scenes:
        different.append("other scenes")
    if different:
        raise DemonstrationError(
            f"{path}: holds demonstrations of another kind ({'; '.join(different)}): give another file, or "
            "the settings that it was begun with"
        )


def _play(env: PointNavVectorEnv, agent: Agent, seed: int) -> Iterator[Demonstration]:
    """Demonstrations of the part that ``env``'s sampler is set to, in its order, as they are there."""
    sampler, simulator = env.sampler, env.simulator
    assert isinstance(sampler, PartSampler)
    part = sampler.part
    offset = 0 if env.config.stop == "called" else int(Action.MOVE_FORWARD)
    found: dict[int, Demonstration] = {}
    # The cameras' noise too is a matter of the part alone.
    observations, _ = env.reset(seed=demonstration_seed(seed, part.start) >> 32)
    agent.begin(env, seed)
    hashes = StateHash(env.num_envs, simulator.device)
    started = torch.zeros_like(env.active)
    since = np.zeros(env.num_envs, dtype=np.int64)
    poses: list[NDArray[np.float32]] = []
    values: list[NDArray[np.int64]] = []
    taken: list[NDArray[np.int64]] = []
    given = part.start
    while given < part.stop:
        active = env.active
        starts = active & ~started
        started = active
        since[starts.cpu().numpy()] = len(poses)
        states = torch.cat([simulator.position, simulator.yaw[:, None]], dim=1)
        poses.append(states.cpu().numpy())
        values.append(hashes.add(states, starts).cpu().numpy())
        current = env.current_episodes()
        actions = agent.act(observations, starts)
        taken.append(actions.cpu().numpy() + offset)
        observations, *_, infos = env.step(actions)
        # What an agent did of an episode that begins again is no demonstration.
        if "_episode" not in infos:
            continue
        measures = {name: value.tolist() for name, value in infos["episode"].items()}
        for index in torch.nonzero(torch.as_tensor(infos["_episode"])).flatten().tolist():
            steps = slice(int(since[index]), len(poses))
            length = steps.stop - steps.start
            ends = steps.start + np.minimum(np.arange(BLOCK, length + BLOCK, BLOCK), length) - 1
            number = current[index]
            found[number] = Demonstration(
                episode=sampler.episodes[number],
                seed=demonstration_seed(seed, number),
                actions=np.array([row[index] for row in taken[steps]], dtype=np.uint8),
                hashes=np.array([values[end][index] for end in ends], dtype=np.int64),
                states=np.array([poses[end][index] for end in ends], dtype=np.float32),
                success=bool(measures["success"][index]),
                spl=measures["spl"][index],
                distance_to_goal=measures["distance_to_goal"][index],
                path_length=measures["path_length"][index],
                collisions=int(measures["collisions"][index]),
            )
        while given in found:
            yield found.pop(given)
            given += 1
