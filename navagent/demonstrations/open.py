"""Opens demonstrations for a learner, whatever kind they are.

A path is either a file of recorded demonstrations (``navagent demos record``), which the simulator replays,
or a folder of stored sequences (``navagent demos import``), which carry their observations.
"""

from __future__ import annotations

from pathlib import Path

from navagent.config import TrainConfig
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

    Raises:
        DemonstrationError: it cannot be used: missing, truncated, of another version, recorded with other
            settings than those of ``config`` (each difference is named), or in scenes that are not here or
            have changed.
        ValueError: there are fewer demonstrations than agents, or than ``count``.
    """
    raise NotImplementedError
