"""Opens demonstrations for a learner, whatever kind they are.

A path is either a file of recorded demonstrations (``navagent demos record``), which the simulator replays,
or a folder of stored sequences (``navagent demos import``), which carry their observations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from navagent.build import scenes_dir
from navagent.config import TrainConfig
from navagent.demonstrations.features import StoredFeatures, stored_features
from navagent.demonstrations.recorded import (
    DemonstrationError,
    DemonstrationSet,
    check_rules,
    read_demonstrations,
)
from navagent.demonstrations.replay import Replay, ReplayStream
from navagent.demonstrations.scene_files import checked_scenes
from navagent.demonstrations.stored import StoredStream, read_sequences
from navagent.demonstrations.stream import DemonstrationStream
from navagent.distributed import Ranks


def open_stream(
    config: TrainConfig,
    path: str | Path,
    num_envs: int,
    *,
    count: int | None = None,
    successful: bool = True,
    seed: int = 0,
    ranks: Ranks | None = None,
    tolerance: float = 0.0,
    features: StoredFeatures | None = None,
) -> DemonstrationStream:
    """The stream of the demonstrations at ``path``, as the agent of ``config`` perceives them.

    Args:
        config: Sensors, device and threads are taken from here. The agent's body, the task's rules and the
            motion noise are the recording's and must agree.
        path: A file of recorded demonstrations or a folder of stored sequences.
        num_envs: Agents side by side, in each process.
        count: Use only the first so many, so that fewer are always among more; all if None.
        successful: Leave out demonstrations that did not reach their goal (before counting).
        seed: Of the order, and of the cameras' noise.
        ranks: The processes that share the stream; None for one.
        tolerance: How far replayed states may lie from the recorded ones [m, rad]; with 0 they must be
            bit-equal.
        features: Of :func:`open_features`, to be given with every step.

    Raises:
        DemonstrationError: it cannot be used: missing, truncated, of another version, recorded with other
            settings than those of ``config`` (each difference is named), or in scenes that are not here or
            have changed.
        ValueError: there are fewer demonstrations than agents, or than ``count``.
    """
    if Path(path).is_dir():
        if features is not None:
            raise DemonstrationError(f"{path}: features are stored for recorded demonstrations only")
        sequences = read_sequences(path)
        return StoredStream(
            config, sequences, num_envs, count=count, successful=successful, seed=seed, ranks=ranks
        )
    chosen = _fitting(config, path).chosen(count, successful)
    return ReplayStream(
        config,
        chosen,
        checked_scenes(chosen, scenes_dir(config)),
        num_envs,
        seed=seed,
        ranks=ranks,
        tolerance=tolerance,
        features=features,
    )


def open_features(
    config: TrainConfig,
    path: str | Path,
    policy: Any,
    num_envs: int = 16,
    *,
    tolerance: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> StoredFeatures | None:
    """The features that ``policy``'s frozen encoders give for the demonstrations at ``path``.

    They are computed once, kept in the cache and mapped into memory; ``algorithm.feature_dtype`` is how.

    Args:
        config: The settings that the policy was made from.
        path: A file of recorded demonstrations.
        policy: A :class:`policies.actor_critic.NavigationPolicy`.
        num_envs: Agents side by side while computing.
        tolerance: As in :func:`open_stream`.
        progress: Called with the steps done and all steps.

    Returns:
        The features, or None where the policy has none that never change.

    Raises:
        DemonstrationError: as :func:`open_stream`, or the cameras are noisy.
    """
    demonstrations = _fitting(config, path)
    replay = functools.partial(start_replay, config, demonstrations, num_envs, tolerance=tolerance)
    dtype = getattr(torch, config.algorithm.feature_dtype)
    return stored_features(policy, config, demonstrations, replay, dtype, progress=progress)


def start_replay(
    config: TrainConfig, demonstrations: DemonstrationSet, num_envs: int, *, tolerance: float = 0.0
) -> Replay:
    """A replay of each of some demonstrations once, in the scenes of ``config``, whose hashes are checked."""
    scenes = checked_scenes(demonstrations, scenes_dir(config))
    agents = min(num_envs, len(demonstrations))
    return Replay(config, demonstrations, scenes, agents, mode="once", tolerance=tolerance)


def _fitting(config: TrainConfig, path: str | Path) -> DemonstrationSet:
    """The demonstrations of a file, if they were recorded as ``config`` would have it."""
    demonstrations = read_demonstrations(path)
    check_rules(path, demonstrations.header.rules, config)
    if not len(demonstrations):
        raise DemonstrationError(
            f"{path}: holds no demonstrations yet; go on recording with the same command"
        )
    return demonstrations
