"""Runs an agent through episodes, each exactly once, and keeps what came of them."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from envs.episodes import Episode
from envs.vector_env import PointNavVectorEnv
from navagent.distributed import RankLostError, Ranks
from navagent.evaluation.agents import Agent
from navagent.evaluation.results import EpisodeResult
from navagent.progress import episodes_of, in_lines


def evaluate_agent(
    env: PointNavVectorEnv,
    agent: Agent,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[EpisodeResult]:
    """Evaluates ``agent`` on every episode of ``env``'s sampler.

    The expert is asked at every step what it would do, and whether the agent does something else is counted.
    What an episode comes to does not depend on the others, nor on how many agents play side by side: random
    actions belong to the episode and its step. Only noise of cameras and motion is drawn for the whole batch.
    So an episode that begins again, since a process of the simulator died, comes to what it would have come
    to; of what the agent had done of it before, nothing is kept.

    Args:
        env: hands out each episode once (``EpisodeSampler(mode="once")``), with next-step autoreset: the last
            step of an episode then shows where it ended.
        agent: who acts.
        seed: seed of the actions that the agent draws, and of noise.
        progress: called with the number of finished episodes and of all whenever some finish.

    Returns:
        A result an episode, in the sampler's order.

    Raises:
        ValueError: if the environment does not hand out each episode once with next-step autoreset.
    """
    if env.sampler.mode != "once" or env.autoreset_mode != AutoresetMode.NEXT_STEP:
        raise ValueError(
            f"evaluation needs a sampler with mode 'once' and next-step autoreset, not "
            f"{env.sampler.mode!r} and {env.autoreset_mode.value!r}"
        )
    episodes = env.sampler.episodes
    results: dict[int, EpisodeResult] = {}
    with torch.random.fork_rng(), _located(env, agent, results):
        # Seeded, so that noise does not depend on what was evaluated before.
        observations, _ = env.reset(seed=seed)
        agent.begin(env, seed)
        started = torch.zeros_like(env.active)
        # Poses of all agents before each step, and the step at which each agent's episode started.
        poses: list[NDArray[np.float32]] = []
        # What all agents did and what the expert would have done at each step, (N, 2).
        choices: list[NDArray[np.int64]] = []
        since = np.zeros(env.num_envs, dtype=np.int64)
        while len(results) < len(episodes):
            active = env.active
            starts = active & ~started
            started = active
            now = len(poses)
            poses.append(_poses(env))
            since[starts.cpu().numpy()] = now
            current = env.current_episodes()
            start_distance = env.task.measured.start_distance.tolist()
            actions = agent.act(observations, starts)
            both = torch.stack([actions.to(env.simulator.device), env.expert_actions()], 1)
            choices.append(env.task.simulator_actions(both).cpu().numpy())
            observations, *_, infos = env.step(actions)
            if "_episode" not in infos:
                continue
            final = _poses(env)
            measures = {name: value.tolist() for name, value in infos["episode"].items()}
            for index in torch.nonzero(torch.as_tensor(infos["_episode"])).flatten().tolist():
                episode = episodes[current[index]]
                chosen = np.stack([step[index] for step in choices[since[index] :]])
                track = np.stack([*(step[index] for step in poses[since[index] :]), final[index]])
                results[current[index]] = EpisodeResult(
                    agent=agent.name,
                    scene_id=episode.scene_id,
                    episode_id=episode.episode_id,
                    success=bool(measures["success"][index]),
                    spl=measures["spl"][index],
                    soft_spl=measures["soft_spl"][index],
                    distance_to_goal=measures["distance_to_goal"][index],
                    geodesic_distance=start_distance[index],
                    path_length=measures["path_length"][index],
                    steps=int(measures["steps"][index]),
                    collisions=int(measures["collisions"][index]),
                    reward=measures["reward_sum"][index],
                    start=episode.start_position,
                    goal=episode.goal_position,
                    positions=track[:, :3],
                    yaws=track[:, 3],
                    departures=int((chosen[:, 0] != chosen[:, 1]).sum()),
                    choices=chosen,
                )
            if progress is not None:
                progress(len(results), len(episodes))
    return [results[index] for index in range(len(episodes))]


@contextmanager
def _located(env: PointNavVectorEnv, agent: Agent, results: Sized) -> Iterator[None]:
    """Lets an unforeseen error say where the agents were."""
    try:
        yield
    except RankLostError:
        raise
    except Exception as error:
        place = f"the evaluation of {agent.name!r} broke off after {len(results):,} episodes"
        error.add_note(in_lines(place, episodes_of(env)))
        raise


def gathered(results: Sequence[EpisodeResult], ranks: Ranks) -> list[EpisodeResult]:
    """The results of all ranks, in their order, at rank 0; an empty list at the others."""
    names = [item.name for item in dataclasses.fields(EpisodeResult)]
    parts = ranks.gather([{name: getattr(result, name) for name in names} for result in results])
    return [EpisodeResult(**values) for part in parts for values in part]


def spread(episodes: Sequence[Episode], count: int) -> list[Episode]:
    """``count`` of the episodes, as evenly over the scenes as they allow, in their order."""
    by_scene: dict[str, list[int]] = defaultdict(list)
    for index, episode in enumerate(episodes):
        by_scene[episode.scene_id].append(index)
    # First every scene's first episode, then every scene's second, and so on.
    turns = sorted((turn, index) for own in by_scene.values() for turn, index in enumerate(own))
    return [episodes[index] for index in sorted(index for _, index in turns[:count])]


def _poses(env: PointNavVectorEnv) -> NDArray[np.float32]:
    """Position and heading of all agents: (N, 4)."""
    simulator = env.simulator
    return torch.cat([simulator.position, simulator.yaw[:, None]], dim=1).cpu().numpy().copy()
