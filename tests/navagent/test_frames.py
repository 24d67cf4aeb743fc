"""Frames: from where agents can walk, the same for the same seed, with ground truth that fits the image."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from envs.episodes import read_dataset, write_dataset
from navagent.learning.frames import Frames, View, render_frames
from navagent.learning.geometry import rays
from navagent.learning.perception import MAX_DEPTH


@pytest.fixture(scope="module")
def studio(reference_dir, tmp_path_factory):
    """A data set of one scene that Habitat was recorded in."""
    homes = tmp_path_factory.mktemp("homes")
    for suffix in ("glb", "navmesh", "stage_config.json"):
        shutil.copy(reference_dir / f"studio.{suffix}", homes)
    recorded = read_dataset(reference_dir / "pointnav" / "val" / "val.json.gz")
    # Habitat's own episodes start on the roof, too.
    start = next(e for e in recorded if Path(e.scene_id).stem == "studio" and e.start_position[1] < 1.0)
    episodes = [dataclasses.replace(start, scene_id="studio.glb")]
    write_dataset(episodes, homes / "episodes" / "train" / "train.json.gz")
    return homes


def test_a_missing_data_set_is_named(tmp_path):
    with pytest.raises((ValueError, OSError), match="homes"):
        render_frames(View(tmp_path / "homes"), "train", 4, 0)


def test_frames_come_from_where_agents_can_walk(studio):
    view = View(studio, tasks=("normals", "depth"), height=32, width=32)
    frames = render_frames(view, "train", 20, 0)
    normals, depth = (frames.targets[task].float() for task in view.tasks)
    assert frames.image.shape == (20, 32, 32, 3)
    assert normals.isfinite().float().mean() > 0.99
    lengths = normals.norm(dim=1)[normals.isfinite().all(1)]
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=2e-3)
    # The camera stands upright: floors show at the bottom of the picture and no ceilings.
    lowest = normals[:, 1, -1]
    assert (lowest > 0.99).float().mean() > 0.3
    assert not (lowest < -0.99).any()
    # It stands 1.25 m above these floors, or rather above their navigation mesh, which is a little higher.
    height = -torch.expm1(depth[:, 0, -1]) * rays(32, 32, 90.0)[-1, :, 1]
    assert 1.25 <= height[lowest > 0.99].median() < 1.4


def test_the_same_seed_gives_the_same_frames_and_another_seed_others(studio):
    view = View(studio, height=16, width=16)
    first, again, other = (render_frames(view, "train", 6, seed) for seed in (0, 0, 1))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.targets["normals"].nan_to_num(), again.targets["normals"].nan_to_num())
    assert not torch.equal(first.image, other.image)


def test_tasks_do_not_change_where_one_looks_from(studio):
    views = [
        View(studio, tasks=tasks, height=16, width=16) for tasks in (("normals",), ("curvature", "depth"))
    ]
    normals, others = (render_frames(view, "train", 6, 0) for view in views)
    assert torch.equal(normals.image, others.image)
    assert others.targets["curvature"].shape == (6, 2, 16, 16)


def test_depth_images_show_the_depth_that_is_the_target(studio):
    frames = render_frames(View(studio, "depth", ("depth",), 32, 32), "train", 8, 0)
    truth = torch.expm1(frames.targets["depth"][:, 0].float()).nan_to_num()
    seen = frames.image[..., 0].float() * MAX_DEPTH
    torch.testing.assert_close(seen, truth.clamp(max=MAX_DEPTH), rtol=0.02, atol=0.02)


def test_frames_are_stored_and_read_back(tmp_path):
    frames = Frames(
        torch.randint(255, (3, 4, 4, 3), dtype=torch.uint8), {"depth": torch.rand(3, 1, 4, 4).half()}
    )
    frames.save(tmp_path / "frames.safetensors", {"seed": 3})
    read = Frames.load(tmp_path / "frames.safetensors")
    assert torch.equal(read.image, frames.image)
    assert torch.equal(read.targets["depth"], frames.targets["depth"])
    assert torch.equal(read[1:].image, frames.image[1:])


@pytest.mark.parametrize(
    ("wrong", "message"), [({"sensor": "sonar"}, "sensor 'sonar'"), ({"tasks": ("edges",)}, "task 'edges'")]
)
def test_unknown_views_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        View(Path("homes"), **wrong)
