"""What is said of data sets, the homes in the cache, and settings."""

import pytest

from envs.episodes import Episode, write_dataset
from navagent.config import ConfigError
from navagent.doctor import data
from navagent.doctor.data import look


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def dataset(tmp_path):
    """A data set of three scenes, as Habitat lays them out."""
    folder = tmp_path / "gibson"
    for split, names in (("train", ("one", "two")), ("val", ("three",))):
        episodes = [
            Episode(
                episode_id=str(number),
                scene_id=f"gibson/{name}.glb",
                start_position=(0.0, 0.0, 0.0),
                start_rotation=(0.0, 0.0, 0.0, 1.0),
                goal_position=(1.0, 0.0, 0.0),
                goal_radius=None,
                geodesic_distance=1.0,
            )
            for name in names
            for number in range(5)
        ]
        write_dataset(episodes, folder / split / f"{split}.json.gz")
    scenes = tmp_path / "scenes" / "gibson"
    scenes.mkdir(parents=True)
    for name in ("one", "two", "three"):
        (scenes / f"{name}.glb").write_bytes(b"glTF")
    return folder, scenes


def found(*settings):
    return {each["name"]: each for each in look(settings)["findings"]}


def settings(dataset):
    folder, scenes = dataset
    return "scenes=dataset", f"scenes.dataset={folder}", f"scenes.scenes_dir={scenes.parent}"


def test_a_whole_data_set_is_counted(dataset):
    lines = found(*settings(dataset))
    assert lines["data set, train"]["level"] == lines["data set, val"]["level"] == "ok"
    assert lines["data set, train"]["found"].endswith("10 episodes in 2 scenes")


def test_a_large_data_set_is_looked_at_in_parts(dataset, monkeypatch):
    monkeypatch.setattr(data, "READ_WHOLE", 1)
    monkeypatch.setattr(data, "SAMPLE", 1)
    lines = found(*settings(dataset))
    assert lines["data set, train"]["found"].endswith("5 episodes in 1 scenes, the smallest of 2 files")


def test_missing_scenes_damaged_files_and_missing_splits_are_named(dataset):
    folder, scenes = dataset
    (scenes / "three.glb").unlink()
    content = next((folder / "train" / "content").iterdir())
    content.write_bytes(content.read_bytes()[:40])
    lines = found(*settings(dataset))
    assert lines["data set, train"]["level"] == lines["data set, val"]["level"] == "problem"
    assert "truncated or damaged gzip" in lines["data set, train"]["found"]
    assert "three.glb" in lines["data set, val"]["found"]
    assert "docs/habitat.md" in lines["data set, val"]["mend"]
    lines = found(*settings(dataset), "scenes.val_split=test")
    assert "no episodes of split 'test'" in lines["data set, test"]["found"]


def test_homes_in_the_cache_are_counted_and_broken_ones_named(cache):
    assert "none yet" in found()["generated homes"]["found"]
    for name in ("v3-seed0-num40", ".v3-seed1-num2.partial-abc"):
        (cache / "homes" / name / "scenes").mkdir(parents=True)
    assert found()["generated homes"] == {
        "name": "generated homes",
        "level": "ok",
        "found": f"1 data set in {cache / 'homes'}; 1 begun, which the same settings go on with",
        "mend": "",
    }
    look_again = look(())["findings"]
    assert [each["level"] for each in look_again] == ["problem", "ok"]
    assert "v3-seed0-num40 holds no whole data set" in look_again[0]["found"]


def test_the_folders_that_settings_name_are_looked_at(cache):
    folders = look(("run_dir=/data/runs/first",))
    assert (folders["cache"], folders["runs"]) == (str(cache), "/data/runs")
    assert look(())["runs"] == "runs"


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"scenes\.datset"):
        look(("scenes.datset=x",))
