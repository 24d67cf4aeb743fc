"""Demonstrations to and from Minari, Gymnasium's format of data sets.

Exported are the pictures too, so that other libraries need no simulator. An observation more than actions,
as Minari has it: the last one is what the agent perceives when its episode is over. Minari is an extra of
this package, ``navagent[minari]``, and imported when it is needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from navagent import __version__
from navagent.demonstrations.recorded import DemonstrationError
from navagent.demonstrations.replay import Replay, replay_once
from navagent.demonstrations.stored import Sequence, write_sequences

_ID = "(NAMESPACE/)NAME-vN, such as navagent/expert-v0"


def _minari() -> Any:
    try:
        import h5py  # noqa: F401
        import minari
    except ImportError as error:
        raise DemonstrationError(
            f"this needs Minari, which is not installed ({error}); pip install 'navagent[minari]'"
        ) from None
    return minari


class _Columns:
    """What one agent's demonstration consists of, step by step."""

    def __init__(self) -> None:
        self.observations: list[dict[str, NDArray[Any]]] = []
        self.actions: list[int] = []
        self.rewards: list[float] = []
        self.terminated: list[bool] = []
        self.truncated: list[bool] = []


def export_minari(
    replay: Replay,
    dataset_id: str,
    *,
    jpeg: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Replays demonstrations once and writes a Minari data set of them, all of it or nothing.

    Args:
        replay: the demonstrations, with the sensors that shall be in the data set; its mode is ``"once"``.
        dataset_id: what Minari calls the data set; its folder is where Minari looks, that of the environment
            variable ``MINARI_DATASETS_PATH``, else ``~/.minari/datasets``.
        jpeg: compress colour pictures of at least 32 x 32, with loss.
        progress: called with the demonstrations that are done and all.

    Returns:
        The data set's folder.

    Raises:
        DemonstrationError: Minari is not installed, the name does not fit, or there is such a data set.
    """
    minari = _minari()
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.dataset.minari_storage import MinariStorage
    from minari.namespace import create_namespace, list_local_namespaces
    from minari.storage import get_dataset_path

    try:
        namespace, _, _ = parse_dataset_id(dataset_id)
    except (ValueError, TypeError):  # the latter where it has no version
        raise DemonstrationError(f"{dataset_id!r} is no name of a Minari data set; expected {_ID}") from None
    folder = Path(get_dataset_path(dataset_id))
    if folder.exists():
        raise DemonstrationError(
            f"{folder}: there is a data set {dataset_id!r} already; give the next version, or delete it with "
            f"`minari delete {dataset_id}`"
        )
    demonstrations, env = replay.demonstrations, replay.env
    partial = folder.parent / f".partial-{folder.name}"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "data").mkdir(parents=True)
    try:
        storage = MinariStorage.new(
            partial / "data",
            observation_space=env.single_observation_space,
            action_space=env.single_action_space,
            jpeg_encoding=jpeg,
        )
        storage.update_metadata(
            {
                "dataset_id": dataset_id,
                "minari_version": minari.__version__,
                "algorithm_name": demonstrations.header.source.agent,
                "description": "PointGoal navigation, demonstrated: replayed by navagent's simulator",
                "requirements": [f"navagent=={__version__}"],
                "navagent_rules": json.dumps(demonstrations.header.rules),
            }
        )
        for row, buffer in _episodes(replay):
            storage.update_episodes([buffer])
            done = storage.total_episodes
            episode = demonstrations.episodes[row]
            own = {
                "scene_id": episode.scene_id,
                "episode_id": episode.episode_id,
                "success": bool(demonstrations.success[row]),
            }
            storage.update_episode_metadata([own], [done - 1])
            if progress is not None:
                progress(done, len(demonstrations))
        if namespace is not None and namespace not in list_local_namespaces():
            create_namespace(namespace)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _episodes(replay: Replay) -> Iterator[tuple[int, Any]]:
    """Each demonstration's row and Minari's buffer of it, as they come to their ends."""
    from minari.data_collector.episode_buffer import EpisodeBuffer

    running: dict[int, _Columns] = {}
    for step in replay_once(replay):
        seen = _numpy(step.observations)
        last = _numpy(step.final_observations or {})
        rewards, terminated, truncated = (
            value.tolist() for value in (step.rewards, step.terminated, step.truncated)
        )
        actions = step.actions.tolist()
        for agent in np.flatnonzero(step.rows >= 0).tolist():
            if step.steps[agent] == 0:
                # Its first, or begun again: what came before it is whole, or is not wanted.
                running[agent] = _Columns()
            columns = running[agent]
            columns.observations.append({name: value[agent] for name, value in seen.items()})
            columns.actions.append(actions[agent])
            columns.rewards.append(rewards[agent])
            columns.terminated.append(terminated[agent])
            columns.truncated.append(truncated[agent])
            if not (terminated[agent] or truncated[agent]):
                continue
            columns.observations.append({name: value[agent] for name, value in last.items()})
            names = columns.observations[0]
            row = int(step.rows[agent])
            yield (
                row,
                EpisodeBuffer(
                    seed=int(replay.demonstrations.seeds[row]),
                    observations={name: np.stack([o[name] for o in columns.observations]) for name in names},
                    actions=np.array(columns.actions, dtype=np.int64),
                    rewards=columns.rewards,
                    terminations=columns.terminated,
                    truncations=columns.truncated,
                ),
            )


def _numpy(observations: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: value.cpu().numpy() for name, value in observations.items()}


def import_minari(
    dataset_id: str, folder: str | Path, *, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Copies a Minari data set into a folder of sequences that a learner reads from mapped memory.

    Any data set with PointNav's actions will do, written by :func:`export_minari` or by others: observations
    are a dictionary of arrays, named as the agent's sensors are, or one array, which is then called ``rgb``
    or ``depth`` by its channels. Where a data set does not say whether an episode succeeded, it counts as
    successful if it was terminated rather than truncated.

    Args:
        dataset_id: name of a data set where Minari looks, or the path of a data set's folder.
        folder: what to make.
        progress: called with the episodes that are done and all.

    Returns:
        The folder.

    Raises:
        DemonstrationError: there is no such data set, or it is of other spaces.
    """
    minari = _minari()
    from minari.dataset.minari_storage import MinariStorage

    path = Path(dataset_id) / "data"
    known = None
    try:
        if not path.is_dir():
            known = sorted(minari.list_local_datasets())
            path = Path(minari.storage.get_dataset_path(dataset_id)) / "data"
        raw = MinariStorage.read_raw_metadata(path)
        if not {"observation_space", "action_space"} <= set(raw):
            # Minari would make the environment that the file names, and so run whatever that is.
            raise DemonstrationError(f"{dataset_id}: does not say what its spaces are")
        data = minari.MinariDataset(path)
    except DemonstrationError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        there = "" if known is None else f"; there are {', '.join(known) or 'none'}"
        raise DemonstrationError(
            f"{dataset_id!r}: no readable Minari data set ({error}){there}; `minari download {dataset_id}` "
            "fetches published ones"
        ) from None
    actions = data.action_space
    if not isinstance(actions, spaces.Discrete) or actions.n not in (3, 4) or actions.start != 0:
        raise DemonstrationError(
            f"{dataset_id}: its actions are {actions}; expected Discrete(4) (stop, forward, left, right) or "
            "Discrete(3) (forward, left, right)"
        )
    if not data.total_episodes:
        raise DemonstrationError(f"{dataset_id}: holds no episodes")

    def episodes() -> Iterator[tuple[Any, Any]]:
        try:
            yield from zip(
                data.iterate_episodes(), data.storage.get_episode_metadata(data.episode_indices), strict=True
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DemonstrationError(
                f"{dataset_id}: truncated or damaged ({error}); copy, download or export it again"
            ) from None

    def sequences() -> Iterator[Sequence]:
        for done, (episode, about) in enumerate(episodes(), 1):
            length = len(episode)
            observations = {
                name: np.asarray(value)[:length] for name, value in _by_name(episode.observations).items()
            }
            success = about.get("success", np.any(episode.terminations))
            yield Sequence(observations, np.asarray(episode.actions, dtype=np.int64), bool(success))
            if progress is not None:
                progress(done, data.total_episodes)

    rules = _rules(dataset_id, raw.get("navagent_rules"))
    write_sequences(Path(folder), sequences(), data.total_steps, int(actions.n), f"Minari {data.id}", rules)
    return Path(folder)


def _rules(dataset_id: str, text: Any) -> dict[str, Any]:
    """What :func:`export_minari` says of the task; nothing where others have made the data set."""
    if text is None:
        return {}
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise DemonstrationError(
            f"{dataset_id}: its navagent_rules cannot be read ({error}); export it again"
        ) from None


def _by_name(observations: Any) -> dict[str, NDArray[Any]]:
    if isinstance(observations, dict):
        return observations
    value = np.asarray(observations)
    return {"depth" if value.shape[-1] == 1 else "rgb": value}
