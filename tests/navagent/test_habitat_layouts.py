"""Gibson's, Matterport3D's, HM3D's, habitat-test-scenes' and our own folders, in real habitat-sim.

Their scenes may not be passed on, so a generated home lies where theirs do, under their names. Runs where
habitat_sim imports, or where HABITAT_PYTHON names a Python in which it does.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from one_room import SHORT

from envs.episodes import read_dataset, write_dataset
from envs.simulators.base import SensorSpec
from envs.simulators.habitat import HabitatSimulator
from navagent.cli import main
from navagent.config import load_config, to_yaml
from navagent.runs import Run
from navagent.scenes import generate

PYTHON = os.environ.get("HABITAT_PYTHON")
pytestmark = [
    pytest.mark.skipif(
        PYTHON is None and importlib.util.find_spec("habitat_sim") is None,
        reason="habitat_sim is not installed here, and HABITAT_PYTHON names no Python that has it",
    ),
    pytest.mark.timeout(900),
]
HABITAT = [] if PYTHON is None else [f"simulator.python={PYTHON}"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a data set keeps things, under ``data/``."""

    scene: str
    """A scene's file below ``scene_datasets/``; its navigation mesh lies beside it."""
    scene_id: str
    """What its episodes call it."""
    episodes: str
    """The split's file below ``datasets/pointnav/``."""
    per_scene: bool = False
    """Whether every scene's episodes have a file of their own."""
    config: str | None = None
    """A description of the data set below ``scene_datasets/``."""


LAYOUTS = {
    "gibson": Layout(
        "gibson/Cantwell.glb", "gibson/Cantwell.glb", "gibson/v1/{split}/{split}.json.gz", per_scene=True
    ),
    "test scenes": Layout(
        "habitat-test-scenes/skokloster-castle.glb",
        "data/scene_datasets/habitat-test-scenes/skokloster-castle.glb",
        "habitat-test-scenes/v1/{split}/{split}.json.gz",
    ),
    "mp3d": Layout(
        "mp3d/2azQ1b91cZZ/2azQ1b91cZZ.glb",
        "mp3d/2azQ1b91cZZ/2azQ1b91cZZ.glb",
        "mp3d/v1/{split}/{split}.json.gz",
        per_scene=True,
        config="mp3d/mp3d.scene_dataset_config.json",
    ),
    "hm3d": Layout(
        "hm3d/val/00800-TEEsavR23oF/TEEsavR23oF.basis.glb",
        "hm3d/val/00800-TEEsavR23oF/TEEsavR23oF.basis.glb",
        "hm3d/v1/{split}/{split}.json.gz",
        per_scene=True,
        config="hm3d/hm3d_annotated_basis.scene_dataset_config.json",
    ),
}
# What the descriptions of these data sets say of their stages.
STAGES = {
    "paths": {".glb": ["*/*.glb", "*/*/*.glb"]},
    "default_attributes": {
        "shader_type": "flat",
        "up": [0, 0, 1],
        "front": [0, 1, 0],
        "origin": [0, 0, 0],
        "semantic_descriptor_filename": "%%CONFIG_NAME_AS_ASSET_FILENAME%%.semantic.txt",
        "semantic_asset": "%%CONFIG_NAME_AS_ASSET_FILENAME%%.semantic.glb",
        "has_semantic_textures": True,
    },
}


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """One generated home to train in and one to evaluate in."""
    folder = tmp_path_factory.mktemp("homes") / "two"
    return generate(folder, 2, 0, train_episodes=6, val_episodes=6, num_workers=1)


def z_up(glb: bytes) -> bytes:
    """The same scene with its up along the file's +Z, as in those data sets."""
    (length,) = struct.unpack_from("<I", glb, 12)
    scene = json.loads(glb[20 : 20 + length])
    root = {
        "matrix": [1, 0, 0, 0, 0, 0, 1, 0, 0, -1, 0, 0, 0, 0, 0, 1],
        "children": scene["scenes"][0]["nodes"],
    }
    scene["scenes"][0]["nodes"] = [len(scene["nodes"])]
    scene["nodes"].append(root)
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    body = struct.pack("<I4s", len(text), b"JSON") + text + glb[20 + length :]
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


def only_home(homes: Path, split: str):
    """A split's one scene and its episodes."""
    episodes = read_dataset(homes / "episodes" / split / f"{split}.json.gz")
    return homes / episodes[0].scene_id, episodes


def lay_out(homes: Path, data: Path, layout: Layout) -> tuple[Path, Path]:
    """Puts the val home where a data set's scene lies; returns the scenes' folder and the episodes' file."""
    home, episodes = only_home(homes, "val")
    scene = data / "scene_datasets" / layout.scene
    scene.parent.mkdir(parents=True)
    scene.write_bytes(z_up(home.read_bytes()))
    shutil.copyfile(home.with_suffix(".navmesh"), scene.with_suffix(".navmesh"))
    if layout.config is not None:
        (data / "scene_datasets" / layout.config).write_text(json.dumps({"stages": STAGES}))
    for split in ("train", "val"):
        file = data / "datasets" / "pointnav" / layout.episodes.format(split=split)
        named = [dataclasses.replace(episode, scene_id=layout.scene_id) for episode in episodes]
        write_dataset(named, file, per_scene=layout.per_scene)
    return data / "scene_datasets", file


def write_run(path, *overrides):
    """A run that nobody trained, whose settings evaluations take."""
    asked = ["sensors=depth", "sensors.height=24", "sensors.width=24", "num_threads=1", "device=cpu"]
    return Run.create(path, to_yaml(load_config([*asked, *overrides])))


def evaluated(run, *arguments):
    """The expert's episodes in each simulator."""
    found = {}
    for simulator, settings in (("raycast", []), ("habitat", [*HABITAT, "simulator.workers=1"])):
        out = run.path / "found" / simulator
        asked = ["evaluate", str(run.path), "--agents", "expert", "--maps", "0", "--videos", "0"]
        extra = [word for word in arguments if simulator == "habitat" or not word.startswith("simulator.")]
        asked += ["--device", "cpu", "--simulator", simulator, "--out", str(out), *extra, *settings]
        assert main(asked) == 0
        lines = (out / "episodes.jsonl").read_text().splitlines()
        found[simulator] = [json.loads(line) for line in lines]
    return found["raycast"], found["habitat"]


def assert_alike(here, there, episodes, scene_id):
    """The same episodes of the same lengths, in which the expert fares alike."""
    assert [(e["scene_id"], e["episode_id"]) for e in there] == [(scene_id, e.episode_id) for e in episodes]
    assert [(e["scene_id"], e["episode_id"]) for e in here] == [(scene_id, e.episode_id) for e in episodes]
    for ours, theirs, episode in zip(here, there, episodes, strict=True):
        assert theirs["geodesic_distance"] == pytest.approx(ours["geodesic_distance"], rel=1e-3)
        assert theirs["geodesic_distance"] == pytest.approx(episode.geodesic_distance, rel=1e-3)
        assert theirs["success"] and ours["success"]
        assert theirs["spl"] == pytest.approx(ours["spl"], abs=0.02)


@pytest.mark.parametrize("name", LAYOUTS)
def test_evaluations_find_a_data_sets_scenes_and_episodes(homes, tmp_path, name):
    layout = LAYOUTS[name]
    _, episodes = only_home(homes, "val")
    scenes, file = lay_out(homes, tmp_path / "data", layout)
    run = write_run(tmp_path / "run", f"scenes.dataset={homes}")
    config = [] if layout.config is None else [f"simulator.scene_dataset_config={scenes / layout.config}"]
    here, there = evaluated(run, "--dataset", str(file), "--scenes", str(scenes), *config)
    assert_alike(here, there, episodes, layout.scene_id)


def test_evaluations_find_generated_homes(homes, tmp_path):
    home, episodes = only_home(homes, "val")
    run = write_run(tmp_path / "run", f"scenes.dataset={homes}")
    here, there = evaluated(run)
    assert_alike(here, there, episodes, f"scenes/{home.stem}/{home.name}")


def test_scenes_made_of_parts_are_played_in_and_not_drawn(homes, tmp_path, capsys):
    home, episodes = only_home(homes, "val")
    folder, here = tmp_path / "set", "set/home.scene_instance.json"
    folder.mkdir()
    for suffix in (".glb", ".stage_config.json", ".navmesh"):
        shutil.copyfile(home.with_suffix(suffix), folder / home.with_suffix(suffix).name)
    files = {
        here: {"stage_instance": {"template_name": home.stem}, "navmesh_instance": "floor"},
        "set/set.scene_dataset_config.json": {
            "stages": {"paths": {".json": ["*.stage_config.json"]}},
            "scene_instances": {"paths": {".json": ["*.scene_instance.json"]}},
            "navmesh_instances": {"floor": f"{home.stem}.navmesh"},
        },
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    file = tmp_path / "episodes" / "val" / "val.json.gz"
    write_dataset([dataclasses.replace(episode, scene_id=here) for episode in episodes], file)
    run = write_run(tmp_path / "run", f"scenes.dataset={homes}")
    asked = ["evaluate", str(run.path), "--dataset", str(file), "--scenes", str(tmp_path), "--device", "cpu"]
    asked += ["--agents", "expert", "--maps", "1", "--videos", "0", "--out", str(tmp_path / "out")]
    config = f"simulator.scene_dataset_config={folder / 'set.scene_dataset_config.json'}"
    assert main([*asked, "--simulator", "habitat", config, "simulator.workers=1", *HABITAT]) == 0
    assert "pictures only of scenes that are one .glb file" in capsys.readouterr().out
    played = [json.loads(line) for line in (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()]
    assert len(played) == len(episodes) and all(each["success"] for each in played)
    assert main(asked) == 2
    assert "simulator=habitat" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hm3d", "generated"])
def test_agents_train_in_a_data_set(homes, tmp_path, name):
    asked = [f"scenes.dataset={homes}"]
    if name != "generated":
        layout = LAYOUTS[name]
        scenes, file = lay_out(homes, tmp_path / "data", layout)
        asked = [
            "scenes=dataset",
            f"scenes.dataset={file.parents[1]}",
            f"scenes.scenes_dir={scenes}",
            f"simulator.scene_dataset_config={scenes / layout.config}",
        ]
    run = tmp_path / "run"
    asked += [
        "simulator=habitat",
        *HABITAT,
        "simulator.workers=1",
        f"run_dir={run}",
        "sensors=depth",
        *SHORT,
        "evaluation.final_episodes=3",
        "evaluation.baselines=expert",
        "evaluation.maps=0",
        "evaluation.videos=0",
        "num_threads=1",
        "device=cpu",
    ]
    assert main(["train", *asked]) == 0
    lines = Run(run).read_metrics()
    assert lines[-1]["frames"] == 48 and lines[-1]["time/simulator_restarts"] == 0
    assert (run / "report.html").is_file()


def test_the_description_of_a_data_set_is_what_habitat_goes_by(homes, tmp_path):
    """A scene of which only the description says that its up is +Y is seen upright with it alone."""
    home, episodes = only_home(homes, "val")
    scene = tmp_path / "set" / "odd" / "odd.glb"
    scene.parent.mkdir(parents=True)
    for suffix in (".glb", ".navmesh"):
        shutil.copyfile(home.with_suffix(suffix), scene.with_suffix(suffix))
    stages = {"paths": {".glb": ["*/*.glb"]}, "default_attributes": {"up": [0, 1, 0], "front": [0, 0, -1]}}
    description = tmp_path / "set" / "odd.scene_dataset_config.json"
    description.write_text(json.dumps({"stages": stages}))
    upright = seen(home, episodes[0])
    assert np.array_equal(seen(scene, episodes[0], description), upright)
    assert not np.array_equal(seen(scene, episodes[0]), upright)


def seen(scene, episode, description=None):
    """Depth at an episode's start."""
    cameras = [SensorSpec("depth", "depth", 24, 24)]
    simulator = HabitatSimulator([scene], 1, cameras, scene_dataset_config=description, python=PYTHON)
    try:
        start = torch.tensor([episode.start_position])
        simulator.reset(
            torch.tensor([0]), torch.tensor([0]), start, torch.tensor([episode.start_yaw]).float()
        )
        return simulator.render()["depth"].numpy()
    finally:
        simulator.close()


def test_a_description_that_is_none_is_refused_before_training(homes, tmp_path, capsys):
    broken = tmp_path / "broken.scene_dataset_config.json"
    broken.write_text("not JSON")
    settings = ["simulator=habitat", *HABITAT, f"simulator.scene_dataset_config={broken}", "device=cpu"]
    run = tmp_path / "run"
    assert main(["train", f"scenes.dataset={homes}", f"run_dir={run}", *settings]) == 2
    assert "broken.scene_dataset_config.json" in capsys.readouterr().err
    assert not run.exists()
