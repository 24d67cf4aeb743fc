"""Pre-training: it learns, resumes exactly, and says how good it is."""

import dataclasses
import io
import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from navagent.learning import pretrain as module
from navagent.learning.decoder import read_decoder
from navagent.learning.frames import Frames
from navagent.learning.perception import TASKS
from navagent.learning.pretrain import PretrainConfig, pretrain
from policies.encoders import ENCODERS, Encoder, InputSpec, make_encoder
from policies.weights import read_safetensors

QUIET = Console(file=io.StringIO())


def stripes(view, split, num_frames, seed):
    """Images of one colour on each side; the colours say the normals, and the depth."""
    generator = torch.Generator().manual_seed(seed)
    size = (view.height, view.width)
    levels = torch.rand(num_frames, 2, generator=generator)
    left = (torch.arange(size[1]) < size[1] // 2).float()
    level = levels[:, :1] * left + levels[:, 1:] * (1 - left)
    level = level[:, None, :].expand(-1, *size)
    channels = 3 if view.sensor == "rgb" else 1
    image = level[..., None].expand(-1, -1, -1, channels)
    image = (image * 255).to(torch.uint8) if view.sensor == "rgb" else image.half()
    angle = level * math.pi / 2
    normals = torch.stack((torch.zeros_like(angle), angle.sin(), angle.cos()), dim=3)
    targets = {
        task: TASKS[task].target(level * 5 + 0.1, normals, view.hfov_deg).half() for task in view.tasks
    }
    return Frames(image.contiguous(), targets)


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


@pytest.mark.parametrize("name", ["resnet_small", "vit_mini"])
def test_small_networks_with_blocks_can_be_pretrained(name, tmp_path):
    settings = config(tmp_path, encoder=name, steps=3, task="curvature")
    encoder = make_encoder(name, 3, pretrain(settings, stripes, QUIET))
    state = read_safetensors(settings.out / "state.safetensors").tensors
    for key, value in encoder.state_dict().items():
        torch.testing.assert_close(value, state[f"modules.encoder.{key}"], rtol=1e-3, atol=1e-6)
    decoder, _ = read_decoder(settings.out / "decoder.safetensors")
    images = stripes(settings.view, "val", 2, 0).image
    assert decoder(encoder(encoder.preprocess(images))).shape == (2, 2, 32, 32)


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
    batch = module.batch

    def interrupted(config, frames, step):
        if step == 5:
            raise KeyboardInterrupt
        return batch(config, frames, step)

    with monkeypatch.context() as patch:
        patch.setattr(module, "batch", interrupted)
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
