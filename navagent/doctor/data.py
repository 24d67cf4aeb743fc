"""What settings name: habitat-sim, data sets, the homes in the cache, and where runs are written.

Runs in a process of its own, since reading settings imports the encoders and PyTorch with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from navagent.doctor.findings import Finding

if TYPE_CHECKING:
    from navagent.config import TrainConfig

READ_WHOLE = 8 << 20
"""Episode files of a split that are together no larger than this are all read [bytes]."""
SAMPLE = 3
"""How many of the smallest ones are read otherwise."""


def look(overrides: Sequence[str]) -> dict[str, Any]:
    """What there is to say of the data that some settings name.

    Args:
        overrides: as ``navagent train`` takes them.

    Returns:
        ``findings``, each as a dictionary, and the folders ``cache`` and ``runs``.

    Raises:
        navagent.config.ConfigError: the settings do not exist or do not fit.
    """
    from envs.files import cache_dir
    from navagent.config import load_config
    from navagent.doctor.habitat import drawing

    config = load_config(overrides)
    found = [*drawing(config), *_data_set(config), *_cached_homes(cache_dir() / "homes")]
    runs = Path(config.run_dir).parent if config.run_dir else Path("runs")
    return {"findings": [asdict(each) for each in found], "cache": str(cache_dir()), "runs": str(runs)}


def _data_set(config: TrainConfig) -> Iterable[Finding]:
    from envs.episodes import EpisodeError

    scenes = config.scenes
    if scenes.dataset == "generated":
        return  # made when it is needed, see _cached_homes()
    for split in dict.fromkeys((scenes.train_split, scenes.val_split)):
        name = f"data set, {split}"
        try:
            yield Finding(name, "ok", _split(config, split))
        except EpisodeError as error:
            mend = "docs/habitat.md says how the folders lie; scenes.dataset and scenes.scenes_dir name them"
            yield Finding(name, "problem", str(error), mend)


def _split(config: TrainConfig, name: str) -> str:
    """What there is of a split, of which small ones are read whole and of large ones some files."""
    from envs.episodes import find_scenes, read_dataset
    from envs.make import split_file

    dataset = Path(config.scenes.dataset).expanduser()
    file = split_file(dataset, name)
    content = sorted((file.parent / "content").glob("*.json.gz"), key=lambda each: each.stat().st_size)
    total = sum(each.stat().st_size for each in (file, *content))
    chosen = None
    if total > READ_WHOLE and content:
        chosen = [each.name.removesuffix(".json.gz") for each in content[:SAMPLE]]
    episodes = read_dataset(file, chosen)
    where = Path(config.scenes.scenes_dir).expanduser() if config.scenes.scenes_dir else dataset
    found = find_scenes(episodes, where)
    read = f"{len(episodes):,} episodes in {len(found)} scenes"
    return f"{file}: {read}" + (f", the smallest of {len(content)} files" if chosen else "")


def _cached_homes(folder: Path) -> Iterable[Finding]:
    name = "generated homes"
    sets = sorted(each for each in folder.glob("v*") if each.is_dir() and any(each.iterdir()))
    for each in sets:
        if not (each / "dataset.json").is_file():
            yield Finding(
                name, "problem", f"{each} holds no whole data set", "delete it; it will be made again"
            )
    unfinished = [each.name for each in folder.glob(".v*.partial-*")]
    found = f"{len(sets)} data set{'s' * (len(sets) != 1)} in {folder}"
    if not sets:
        found = f"none yet in {folder}: the first training makes them"
    if unfinished:
        found += f"; {len(unfinished)} begun, which the same settings go on with"
    yield Finding(name, "ok", found)
