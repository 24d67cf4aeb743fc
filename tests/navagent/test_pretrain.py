"""Pre-training: it learns, resumes exactly, and says how good it is."""

import dataclasses
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from envs.episodes import read_dataset, write_dataset
from navagent.learning import pretrain as module
from navagent.learning.pretrain import Frames, PretrainConfig, masked_l1, pretrain, render_frames
from policies.encoders import ENCODERS, Encoder, InputSpec, make_encoder
from policies.weights import read_safetensors

QUIET = Console(file=io.StringIO())


def stripes(config, split, num_frames, seed):
    """Images of one colour on each side; the colours say the normals, and the depth."""
    generator = torch.Generator().manual_seed(seed)
    size = (config.height, config.width)
    levels = torch.rand(num_frames, 2, generator=generator)
    left = (torch.arange(size[1]) < size[1] // 2).float()
    level = levels[:, :1] * left + levels[:, 1:] * (1 - left)
    level = level[:, None, :].expand(-1, *size)
    channels = 3 if config.sensor == "rgb" else 1
    image = level[..., None].expand(-1, -1, -1, channels)
    image = (image * 255).to(torch.uint8) if config.sensor == "rgb" else image.half()
    angle = level * math.pi / 2
    normals = torch.stack((torch.zeros_like(angle), angle.sin(), angle.cos()), dim=1)
    target = normals if config.task == "normals" else torch.log1p(level * 5 + 0.1)[:, None]
    return Frames(image.contiguous(), target.half())


def config(tmp_path, **settings):
    defaults = {
        "dataset": tmp_path / "homes",
        "out": tmp_path / "out",
        "steps": 40,
        "batch_size": 16,
        "train_frames": 64,
        "val_frames": 32,
        "height": 32,
        "width": 32,
    }
    return PretrainConfig(**{**defaults, **settings})


def result(settings):
    return json.loads((settings.out / "card.json").read_text())["unseen_homes"]


@pytest.mark.parametrize("sensor", ["rgb", "depth"])
def test_learns_normals_better_than_blind_predictors(sensor, tmp_path):
    settings = config(tmp_path, sensor=sensor, steps=120)
    weights = pretrain(settings, stripes, QUIET)
    results = result(settings)
    assert results["network"]["mean_deg"] < 0.7 * results["constant"]["mean_deg"]
    assert results["network"]["within_22.5_deg"] > results["constant"]["within_22.5_deg"]
    encoder = make_encoder("fcn5_small", 3 if sensor == "rgb" else 1, weights)
    assert encoder.output_shape(32, 32) == (8, 4, 4)
    assert weights.stat().st_size < 500_000
    assert (settings.out / "unseen.png").stat().st_size > 0


def test_learns_depth_better_than_blind_predictors(tmp_path):
    settings = config(tmp_path, task="depth")
    pretrain(settings, stripes, QUIET)
    results = result(settings)
    assert results["network"]["mean_m"] < 0.8 * results["constant"]["mean_m"]


class Normalised(Encoder):
    """A small encoder with BatchNorm, as residual networks have."""

    def __init__(self, channels):
        super().__init__(InputSpec(channels))
        self.layers = nn.Sequential(nn.Conv2d(channels, 8, 8, stride=8), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        return self.layers(x * 1e-4)


def test_statistics_of_batchnorm_are_stored_exactly(tmp_path, monkeypatch):
    monkeypatch.setitem(ENCODERS, "normalised", Normalised)
    settings = config(tmp_path, encoder="normalised", steps=100)
    stored = read_safetensors(pretrain(settings, stripes, QUIET)).tensors
    state = read_safetensors(settings.out / "state.safetensors").tensors
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(stored[f"layers.1.{name}"], state[f"modules.encoder.layers.1.{name}"])
    assert stored["layers.1.num_batches_tracked"] == 100
    assert stored["layers.0.weight"].dtype == torch.float16
    make_encoder("normalised", 3, settings.out / "encoder.safetensors")


@pytest.mark.parametrize("name", [name for name in ("resnet_small", "vit_mini") if name in ENCODERS])
def test_small_networks_with_blocks_learn(name, tmp_path):
    settings = config(tmp_path, encoder=name, height=64, width=64, steps=30, learning_rate=1e-3)
    make_encoder(name, 3, pretrain(settings, stripes, QUIET))
    results = result(settings)
    assert results["network"]["mean_deg"] < 0.9 * results["constant"]["mean_deg"]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    runs = [
        read_safetensors(pretrain(config(tmp_path, out=tmp_path / name, seed=seed, steps=3), stripes, QUIET))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, second, third = (run.tensors for run in runs)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["conv1.0.weight"], third["conv1.0.weight"])


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole = read_safetensors(pretrain(config(tmp_path, out=tmp_path / "whole", steps=8), stripes, QUIET))
    settings = config(tmp_path, steps=8)
    update = module._Training._update

    def interrupted(self, *batch):
        if self.step == 5:
            raise KeyboardInterrupt
        return update(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(module._Training, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(settings, stripes, QUIET)
    assert read_safetensors(settings.out / "state.safetensors").metadata["step"] == "5"
    resumed = read_safetensors(pretrain(settings, stripes, QUIET))
    assert all(torch.equal(whole.tensors[k], v) for k, v in resumed.tensors.items())


def test_a_folder_with_another_pretraining_is_left_alone(tmp_path):
    settings = config(tmp_path, steps=2)
    pretrain(settings, stripes, QUIET)
    with pytest.raises(ValueError, match="other settings"):
        pretrain(dataclasses.replace(settings, seed=5), stripes, QUIET)


def test_pixels_without_a_surface_do_not_count():
    target = torch.zeros(1, 3, 2, 2)
    target[0, :, 0, 0] = torch.tensor([0.0, 0.0, 1.0])
    prediction = target + 5.0
    prediction[0, :, 0, 0] = torch.tensor([0.0, 0.0, 0.4])
    assert masked_l1(prediction, target).item() == pytest.approx(0.6 / 3)


def test_angles_are_those_between_vectors():
    truth = torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 1, 4)
    angles = torch.tensor([0.0, 10.0, 90.0, 180.0])
    guess = torch.stack((angles.deg2rad().sin(), angles * 0, angles.deg2rad().cos())).reshape(1, 3, 1, 4) * 3
    torch.testing.assert_close(module._errors("normals", guess, truth), angles, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"encoder": "fcn9"}, "encoder 'fcn9'"),
        ({"sensor": "sonar"}, "sensor 'sonar'"),
        ({"task": "edges"}, "task 'edges'"),
        ({"steps": 0}, "steps 0"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_wrong_settings_are_refused(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **wrong)


@pytest.mark.parametrize("wrong", [{"encoder": "fcn4"}, {"height": 40, "width": 56}])
def test_encoders_without_a_fitting_map_are_refused(wrong, tmp_path):
    settings = config(tmp_path, **{"encoder": "fcn5", **wrong})
    with pytest.raises(ValueError, match="needs a map"):
        pretrain(settings, stripes, QUIET)


def test_a_missing_data_set_is_named(tmp_path):
    with pytest.raises((ValueError, OSError), match="homes"):
        render_frames(config(tmp_path), "train", 4, 0)


@pytest.mark.parametrize(("sensor", "task"), [("rgb", "normals"), ("depth", "depth")])
def test_frames_come_from_where_agents_can_walk(sensor, task, reference_dir, tmp_path):
    homes = tmp_path / "homes"
    homes.mkdir()
    for suffix in ("glb", "navmesh", "stage_config.json"):
        shutil.copy(reference_dir / f"studio.{suffix}", homes)
    recorded = read_dataset(reference_dir / "pointnav" / "val" / "val.json.gz")
    # Habitat's own episodes start on the roof, too.
    start = next(e for e in recorded if Path(e.scene_id).stem == "studio" and e.start_position[1] < 1.0)
    episodes = [dataclasses.replace(start, scene_id="studio.glb")]
    write_dataset(episodes, homes / "episodes" / "train" / "train.json.gz")
    settings = config(tmp_path, sensor=sensor, task=task)
    frames = render_frames(settings, "train", 20, 0)
    again = render_frames(settings, "train", 20, 0)
    assert torch.equal(frames.image, again.image)
    assert torch.equal(frames.target, again.target)
    hit = (frames.target != 0).any(1)
    assert hit.float().mean() > 0.99
    if task == "normals":
        assert frames.image.shape == (20, 32, 32, 3)
        lengths = frames.target.float().norm(dim=1)[hit]
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=2e-3)
        # The camera stands upright: floors show at the bottom of the picture and no ceilings.
        lowest = frames.target[:, 1, -1]
        assert (lowest > 0.99).float().mean() > 0.3
        assert not (lowest < -0.99).any()
    else:
        seen = frames.image[..., 0].float() * module.MAX_DEPTH
        torch.testing.assert_close(seen, torch.expm1(frames.target[:, 0].float()), rtol=0.02, atol=0.02)
