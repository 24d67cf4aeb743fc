import warnings

import cv2
import pytest
from rich.console import Console

from envs.episodes import read_dataset
from envs.scenes.homes import generate_home
from envs.scenes.homes.dataset import FORMAT
from envs.scenes.scene import SceneError
from navagent import scenes


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    (folder / "home.glb").write_bytes(generate_home(2, 2).to_glb())
    (folder / "home.stage_config.json").write_text('{"up": [0, 1, 0], "front": [0, 0, -1]}')
    return folder / "home.glb"


def test_a_data_set_is_generated_with_progress(tmp_path):
    console = Console(record=True, force_terminal=True, width=80)
    out = scenes.generate(
        tmp_path / "homes", 2, 1, train_episodes=3, val_episodes=2, num_workers=1, console=console
    )
    assert len(read_dataset(out / "episodes/train/train.json.gz")) == 3
    assert len(read_dataset(out / "episodes/val/val.json.gz")) == 2
    assert "making homes" in console.export_text()


def test_cached_homes_are_named_by_what_they_are(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(scenes, "generate", lambda out, num, seed, **_: asked.append((num, seed)) or out)
    folder = scenes.generated_dataset(40, 7, tmp_path)
    assert folder == tmp_path / "homes" / f"v{FORMAT}-seed7-num40"
    assert asked == [(40, 7)]


def test_a_scene_is_drawn_as_one_picture(home, tmp_path):
    out = scenes.show(home, tmp_path / "sub/sheet.png", num_views=2)
    picture = cv2.imread(str(out))
    assert picture.shape[0] > 500 and picture.shape[1] > 800
    # Colour above depth on the right: both show something.
    colour, depth = picture[64:304, -336:-16], picture[308:548, -336:-16]
    for part in (colour, depth):
        assert part.std(axis=(0, 1)).max() > 10


def test_the_same_seed_draws_the_same_picture(home, tmp_path):
    first, again = (
        scenes.show(home, tmp_path / name, num_views=1).read_bytes() for name in ("a.png", "b.png")
    )
    assert first == again


def test_a_recorded_scene_is_drawn_with_its_own_mesh(reference_dir, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scenes.show(reference_dir / "loft.glb", tmp_path / "loft.png", num_views=1)


def test_what_cannot_be_drawn_is_refused(home, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.png"):
        scenes.show(home, tmp_path / "sheet.txt")
    with pytest.raises(ValueError, match="num_views is 0"):
        scenes.show(home, tmp_path / "sheet.png", num_views=0)
    with pytest.raises(SceneError, match=r"none\.glb"):
        scenes.show(tmp_path / "none.glb", tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())
