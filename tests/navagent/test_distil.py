"""Distillation: the student comes near its base, resumes exactly, and starts side-tuning's side network."""

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from navagent.learning import distil as module
from navagent.learning.decoder import Decoder
from navagent.learning.distil import DistilConfig, Perceptual, check, distil, load_perceptual
from navagent.learning.frames import Frames
from policies.adaptation import make_adaptation
from policies.encoders import ENCODERS, Encoder, InputSpec, make_encoder
from policies.encoders.taskonomy import TaskonomyDecoder
from policies.weights import read_safetensors, save_safetensors

QUIET = Console(file=io.StringIO())


def blobs(view, split, num_frames, seed):
    """Smooth colour images, since there is something to see in them at every scale."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num_frames, 3 if view.sensor == "rgb" else 1, 4, 4, generator=generator)
    size = (view.height, view.width)
    image = nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1).movedim(1, 3)
    image = (image * 255).to(torch.uint8) if view.sensor == "rgb" else image.half()
    return Frames(image.contiguous(), {})


def config(tmp_path, **settings):
    defaults = {
        "dataset": tmp_path / "homes",
        "out": tmp_path / "out",
        "base": "fcn5_small",
        "student": "resnet_small",
        "steps": 40,
        "batch_size": 8,
        "train_frames": 60,
        "val_frames": 20,
        "height": 32,
        "width": 32,
    }
    return DistilConfig(**{**defaults, **settings})


@pytest.fixture
def decoder_file(tmp_path):
    """A decoder as a pre-training leaves it."""
    torch.manual_seed(0)
    path = tmp_path / "decoder.safetensors"
    save_safetensors(path, Decoder(8, 3, 3).state_dict(), {"task": "normals"})
    return path


def results(settings):
    return json.loads((settings.out / "card.json").read_text())["unseen_homes"]


class Patches(Encoder):
    """An encoder that is learned within a few steps: a linear map of each 8x8 patch."""

    def __init__(self, channels):
        super().__init__(InputSpec(channels))
        self.conv = nn.Conv2d(channels, 8, 8, stride=8)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("mode", ["features", "perceptual"])
def test_a_student_comes_near_to_its_base(mode, tmp_path, decoder_file, monkeypatch):
    monkeypatch.setitem(ENCODERS, "patches", Patches)
    torch.manual_seed(1)
    save_safetensors(tmp_path / "base.safetensors", make_encoder("patches", 3, "random").state_dict())
    settings = config(
        tmp_path,
        base="patches",
        base_weights=str(tmp_path / "base.safetensors"),
        student="patches",
        mode=mode,
        decoder=str(decoder_file),
        steps=150,
        learning_rate=1e-2,
    )
    distil(settings, blobs, QUIET)
    nearness = results(settings)
    student, floor, untrained = (nearness[k] for k in ("student", "mean feature", "untrained"))
    assert student["decoder_error"] < 0.3 * min(floor["decoder_error"], untrained["decoder_error"])
    if mode == "features":
        assert student["r2"] > 0.9
        assert student["cosine"] > max(0.95, floor["cosine"], untrained["cosine"])


def test_a_copy_of_the_base_is_told_to_be_perfect(decoder_file):
    base = module.FrozenEncoder(make_encoder("fcn5_small"))
    frames = blobs(DistilConfig(".", ".", height=32, width=32).view, "val", 10, 0)
    students = {"copy": make_encoder("fcn5_small")}
    nearness = module.nearness(
        base, students, load_perceptual(str(decoder_file)), frames, frames, torch.device("cpu")
    )
    assert nearness["copy"] == {"r2": 1.0, "cosine": pytest.approx(1.0, abs=1e-5), "decoder_error": 0.0}
    assert nearness["mean feature"]["r2"] == pytest.approx(0.0, abs=1e-4)


def test_side_tuning_starts_with_the_distilled_student(tmp_path):
    settings = config(tmp_path, base="resnet_small", base_weights="random", student="fcn5_small", steps=3)
    # Random weights of the base differ from call to call; what matters here is the file that comes out.
    weights = distil(settings, blobs, QUIET)
    base = make_encoder("resnet_small", 3, "random")
    options = {"side_encoder": "fcn5_small", "side_init": "distilled", "side_weights": str(weights)}
    method = make_adaptation("sidetune", base, encoder="resnet_small", **options)
    student = make_encoder("fcn5_small", 3, weights)
    image = blobs(settings.view, "val", 2, 0).image
    torch.testing.assert_close(method.side(image), student(student.preprocess(image)))


def test_an_interrupted_distillation_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    # So many epochs without patience that the learning rate has fallen before and falls again after.
    settings = {"steps": 30, "train_frames": 10, "batch_size": 4, "patience": 0, "learning_rate": 0.1}
    whole = read_safetensors(distil(config(tmp_path, out=tmp_path / "whole", **settings), blobs, QUIET))
    again = config(tmp_path, **settings)
    batch = module.batch

    def interrupted(config, frames, step):
        if step == 20:
            raise KeyboardInterrupt
        return batch(config, frames, step)

    with monkeypatch.context() as patch:
        patch.setattr(module, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distil(again, blobs, QUIET)
    schedule = json.loads(read_safetensors(again.out / "state.safetensors").metadata["schedule"])
    assert schedule["_last_lr"][0] < 0.1
    resumed = read_safetensors(distil(again, blobs, QUIET))
    assert all(torch.equal(whole.tensors[k], v) for k, v in resumed.tensors.items())


def test_the_base_is_not_trained(tmp_path):
    settings = config(tmp_path, steps=3)
    distil(settings, blobs, QUIET)
    card = json.loads((settings.out / "card.json").read_text())
    assert card["base_sha256"] == module.FrozenEncoder(make_encoder("fcn5_small")).sha256()


def test_outputs_are_compared_by_the_loss_of_their_task(tmp_path, decoder_file):
    normals, curvature = load_perceptual(str(decoder_file)), tmp_path / "c.safetensors"
    save_safetensors(curvature, Decoder(8, 3, 2).state_dict(), {"task": "curvature"})
    assert normals.loss == "l1"
    assert load_perceptual(str(curvature)).loss == "l2"
    published = {"curvature": "l2", "denoising": "l1", "class_object": "cross_entropy"}
    assert {task: module.taskonomy_loss(task) for task in published} == published


def test_taskonomys_decoders_are_read_by_the_task_in_their_name(tmp_path):
    decoder = TaskonomyDecoder("class_scene")
    path = tmp_path / "class_scene_decoder-1234.safetensors"
    save_safetensors(path, {k: v + 0.5 for k, v in decoder.state_dict().items()})
    perceptual = load_perceptual(str(path))
    assert perceptual.loss == "cross_entropy"
    assert perceptual(torch.zeros(1, 8, 16, 16), torch.zeros(1, 8, 16, 16)).shape == ()


def test_soft_labels_have_the_least_cross_entropy_at_the_base_itself():
    perceptual = Perceptual(nn.Identity(), "cross_entropy")
    logits = torch.randn(4, 7)
    least = perceptual(logits, logits)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    torch.testing.assert_close(least, entropy)
    assert perceptual(logits + torch.randn(4, 7), logits) > least


def test_the_decoder_that_ships_with_a_base_is_found(tmp_path):
    settings = config(
        tmp_path, base="resnet_small", student="fcn5_small", mode="perceptual", decoder="default"
    )
    distil(dataclasses.replace(settings, steps=2), blobs, QUIET)
    assert results(settings)["student"]["decoder_error"] > 0
    check(dataclasses.replace(settings, base_weights="resnet_small-normals-rgb"))
    with pytest.raises(ValueError, match="'random' have no decoder beside them"):
        check(dataclasses.replace(settings, base_weights="random"))
    with pytest.raises(ValueError, match=r"no decoder beside .*fcn5_small-normals-rgb.safetensors"):
        distil(config(tmp_path, out=tmp_path / "other", decoder="default"), blobs, QUIET)


def test_decoders_stay_as_they_are(decoder_file, tmp_path):
    perceptual = load_perceptual(str(decoder_file))
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())
    student = torch.randn(2, 8, 4, 4, requires_grad=True)
    perceptual(student, torch.randn(2, 8, 4, 4)).backward()
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "perceptual"}, "give one, such as"),
        ({"mode": "logits"}, "mode 'logits'"),
        ({"steps": 0}, "steps 0"),
        ({"learning_rate": float("nan")}, "learning_rate nan"),
        ({"learning_rate": float("inf")}, "learning_rate inf"),
        ({"sensor": "sonar"}, "sensor 'sonar'"),
        ({"student": "vit_mini"}, r"base 'fcn5_small' gives features \(8, 4, 4\) and student 'vit_mini'"),
    ],
)
def test_wrong_settings_are_refused(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        distil(config(tmp_path, **wrong), blobs, QUIET)


def test_a_file_that_is_no_decoder_is_refused(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_safetensors(path, make_encoder("fcn5_small").state_dict())
    with pytest.raises(ValueError, match=r"encoder.safetensors: not a decoder"):
        load_perceptual(str(path))
