"""Distillation: a small student network learns to give the features of a base.

Side-tuning (Zhang et al., ECCV 2020, arXiv:1912.13503) starts its side network as such a copy of the base.
Two losses say how near the student is: the mean squared difference of the features themselves, or the
difference of what the frozen decoder of the base's own task makes of them, so that only what that task needs
has to be right ("perceptual", the one that the authors used; their code has ten epochs of Adam at 1e-4 with
weight decay 2e-6, and divides the learning rate by 10 when nothing got better for 5 epochs).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from envs.files import atomic_write
from navagent.learning.decoder import decoder_beside, read_decoder
from navagent.learning.frames import (
    SENSORS,
    Frames,
    FrameSource,
    View,
    describe_dataset,
    render_frames,
)
from navagent.learning.perception import TASKS
from navagent.learning.quality import results_table
from navagent.learning.training import Training, half_precision
from policies.adaptation import FrozenEncoder
from policies.catalogue import catalogue, catalogue_path
from policies.encoders import Encoder, default_weights, make_encoder, weights_path
from policies.encoders.taskonomy import CLASSIFICATION_TASKS, TaskonomyDecoder, TaskonomyEncoder
from policies.weights import read_weights, save_safetensors, sha256

Mode = Literal["features", "perceptual"]
LossName = Literal["l1", "l2", "cross_entropy"]

HELD_OUT = 0.1
"""Share of the train frames that only tells when to lower the learning rate."""
_CHUNK = 64


@dataclass(frozen=True)
class DistilConfig:
    """Settings of one distillation."""

    dataset: Path
    """Folder of a data set with ``scenes/`` and ``episodes/{train,val}``."""
    out: Path
    """Folder for the student and its card."""
    base: str = "resnet_small"
    """Name of the encoder to learn from."""
    base_weights: str = "default"
    """Its weights: "default", a name in the catalogue, or the path of a file."""
    student: str = "fcn5_small"
    """Name of the encoder that learns; its features must have the shape of the base's."""
    mode: Mode = "features"
    """What is compared: "features", or what a decoder makes of them ("perceptual")."""
    decoder: str | None = None
    """The decoder of the base's task: "default" for the one beside the base's weights, the file of one that a
    pre-training left, or for Taskonomy a name in the catalogue or a file ``TASK_decoder*``. "perceptual"
    needs it; with "features" it only helps to tell how near the student is."""
    sensor: str = "rgb"
    """What both look at: "rgb" or "depth"."""
    steps: int = 3000
    """Optimiser steps."""
    batch_size: int = 32
    """Frames a step."""
    train_frames: int = 10000
    """Frames rendered in train homes."""
    val_frames: int = 1000
    """Frames rendered in val homes."""
    learning_rate: float = 1e-3
    """Learning rate of Adam at the start. The authors' 1e-4 suits their millions of images."""
    weight_decay: float = 2e-6
    """Weight decay."""
    patience: int = 5
    """The learning rate falls to a tenth after more epochs than this without a better loss."""
    height: int = 64
    """Image rows."""
    width: int = 64
    """Image columns."""
    hfov_deg: float = 90.0
    """Horizontal field of view [deg]."""
    sensor_height: float = 1.25
    """Height of the camera above the floor [m]."""
    seed: int = 0
    """Seed of viewpoints, initial weights and batches."""
    device: str = "cpu"
    """Where to train."""

    def __post_init__(self) -> None:
        _ = self.view
        if self.mode not in ("features", "perceptual"):
            raise ValueError(f"mode {self.mode!r}: expected 'features' or 'perceptual'")
        if self.mode == "perceptual" and self.decoder is None:
            raise ValueError(
                "mode 'perceptual' compares what a decoder makes of features; give one, such as 'default'"
            )
        for name, least in (("steps", 1), ("batch_size", 1), ("train_frames", 2), ("val_frames", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least {least}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate {self.learning_rate}: expected a number above 0")

    @property
    def view(self) -> View:
        """What is looked at; no task's ground truth is needed."""
        return View(
            self.dataset,
            self.sensor,
            (),
            self.height,
            self.width,
            self.hfov_deg,
            self.sensor_height,
            self.device,
        )


class Perceptual(nn.Module):
    """Features compared by what a frozen decoder makes of them.

    Args:
        decoder: from features to a task's output.
        loss: how outputs are compared. For classes "cross_entropy", with what the base says as soft labels.
    """

    def __init__(self, decoder: nn.Module, loss: LossName) -> None:
        super().__init__()
        self.decoder = decoder.eval().requires_grad_(False)
        self.loss = loss

    def forward(self, student: Tensor, base: Tensor) -> Tensor:
        """How far the student's features are from the base's: ()."""
        guess, truth = self.decoder(student), self.decoder(base)
        if self.loss == "cross_entropy":
            return -(truth.softmax(1) * guess.log_softmax(1)).sum(1).mean()
        return F.l1_loss(guess, truth) if self.loss == "l1" else F.mse_loss(guess, truth)


def load_perceptual(decoder: str) -> Perceptual:
    """The comparison by a decoder, with the loss that its task is learned by.

    Args:
        decoder: the file of one that a pre-training left; or one of Taskonomy's, by its name in the catalogue
            of weights or by a file whose name begins with the task, as published.

    Raises:
        ValueError: for a file that is neither.
    """
    path = Path(decoder)
    task, published, _ = path.stem.partition("_decoder")
    if decoder in catalogue():
        path = catalogue_path(decoder)
        task = published = decoder.removeprefix("taskonomy-").removesuffix("-decoder")
    if not published:
        own, checkpoint = read_decoder(path)
        return Perceptual(own, "l2" if TASKS[checkpoint.metadata["task"]].squared else "l1")
    taskonomy = TaskonomyDecoder(task)
    taskonomy.load_tensors(read_weights(path).tensors, str(path))
    return Perceptual(taskonomy, taskonomy_loss(task))


def taskonomy_loss(task: str) -> LossName:
    """How outputs of one of Taskonomy's decoders are compared, as the side-tuning authors do."""
    if task in (*CLASSIFICATION_TASKS, "segment_semantic"):
        return "cross_entropy"
    return "l2" if task == "curvature" else "l1"


def distil(config: DistilConfig, source: FrameSource = render_frames, console: Console | None = None) -> Path:
    """Trains a student and says how near it is to the base in unseen homes.

    The folder receives ``student.safetensors``, which side-tuning takes as ``adaptation.side_weights``, and
    ``card.json``. ``state.safetensors`` lets the same call go on where it was interrupted.

    Args:
        config: the settings.
        source: renders the frames; by default the built-in simulator.
        console: where to show progress.

    Returns:
        The student's weights file.

    Raises:
        ValueError: for a base and a student whose features differ in shape, a decoder that does not fit, or a
            folder that holds another distillation.
    """
    console = console or Console()
    device = torch.device(config.device)
    out = Path(config.out)
    began = time.perf_counter()
    perceptual = _perceptual(config)
    if perceptual is not None:
        perceptual.to(device)
    base, student, untrained = _networks(config, perceptual, device)
    training, plateau = _training(config, student)
    resumed = training.resume()
    frames = source(config.view, "train", config.train_frames, config.seed)
    unseen = source(config.view, "val", config.val_frames, config.seed + 1)
    train, held_out = _split(frames, config.seed)
    if resumed:
        console.print(f"going on at step {training.step} of {config.steps}")
    distance: Callable[[Tensor, Tensor], Tensor] = F.mse_loss
    if config.mode == "perceptual" and perceptual is not None:
        distance = perceptual
    epoch = -(-len(train) // config.batch_size)

    def loss(step: int) -> Tensor:
        image = batch(config, train, step)
        return distance(features(student, image), base(image))

    def advance(step: int) -> None:
        if step % epoch == 0:
            plateau.step(_mean_distance(base, student, distance, held_out, device))

    student.train()
    training.run(loss, advance, config.steps, f"{config.student} from {config.base}", console)
    results = nearness(base, {"student": student, "untrained": untrained}, perceptual, train, unseen, device)
    weights = out / "student.safetensors"
    about = {
        "student": config.student,
        "channels": SENSORS[config.sensor],
        "parameters": sum(p.numel() for p in student.parameters()),
        "base": config.base,
        "base_sha256": base.sha256(),
        "settings": {
            k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "dataset", "device")
        },
        "dataset": describe_dataset(config.dataset),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began),
        "unseen_homes": results,
    }
    save_safetensors(weights, half_precision(student.state_dict()), about)
    with atomic_write(out / "card.json") as temporary:
        temporary.write_text(json.dumps({**about, "sha256": sha256(weights)}, indent=1) + "\n")
    console.print(results_table(f"nearness to {config.base} in unseen homes", results))
    return weights


def check(config: DistilConfig) -> None:
    """Raises where base, student and decoder do not fit together, before there are homes to look at."""
    _networks(config, _perceptual(config), torch.device("cpu"))


def _perceptual(config: DistilConfig) -> Perceptual | None:
    if config.decoder != "default":
        return None if config.decoder is None else load_perceptual(config.decoder)
    weights, channels = config.base_weights, SENSORS[config.sensor]
    if weights == "random":
        raise ValueError("base_weights 'random' have no decoder beside them; give one, or other weights")
    file = (
        default_weights(config.base, channels)
        if weights == "default"
        else weights_path(config.base, channels, weights)
    )
    decoder = decoder_beside(file)
    if decoder is None:
        raise ValueError(f"there is no decoder beside {file}, the weights of base {config.base!r}; give one")
    return load_perceptual(str(decoder))


def _networks(
    config: DistilConfig, perceptual: Perceptual | None, device: torch.device
) -> tuple[FrozenEncoder, Encoder, Encoder]:
    """The base, the student, and a student that stays untrained."""
    channels = SENSORS[config.sensor]
    base = make_encoder(config.base, channels, config.base_weights)
    if perceptual is not None and isinstance(perceptual.decoder, TaskonomyDecoder):
        if not isinstance(base, TaskonomyEncoder):
            raise ValueError(
                f"decoder {config.decoder} takes features of a Taskonomy encoder, not of {config.base!r}"
            )
        # Taskonomy's decoders know nothing of the normalisation that agents get features with.
        base.normalise_outputs = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        student = make_encoder(config.student, channels, "random")
        torch.manual_seed(config.seed)
        untrained = make_encoder(config.student, channels, "random").eval()
    shapes = [network.output_shape(config.height, config.width) for network in (base, student)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"for {config.height}x{config.width} images base {config.base!r} gives features {shapes[0]} and "
            f"student {config.student!r} {shapes[1]}; choose a student whose features have the base's shape"
        )
    return FrozenEncoder(base).to(device), student.to(device), untrained.to(device)


def _training(config: DistilConfig, student: Encoder) -> tuple[Training, ReduceLROnPlateau]:
    optimizer = torch.optim.Adam(
        student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    plateau = ReduceLROnPlateau(optimizer, factor=0.1, patience=config.patience)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "device")}
    return Training(student, optimizer, plateau, settings, Path(config.out) / "state.safetensors"), plateau


def _split(frames: Frames, seed: int) -> tuple[Frames, Frames]:
    """Frames to learn from, and those held out; both from all homes."""
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed))
    count = max(1, round(HELD_OUT * len(frames)))
    return frames[order[count:]], frames[order[:count]]


def batch(config: DistilConfig, frames: Frames, step: int) -> Tensor:
    """Images of a step, half of them mirrored; seed and step alone decide which."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    rows = torch.randint(len(frames), (config.batch_size,), generator=generator)
    image = frames.image[rows].to(config.device)
    half = config.batch_size // 2
    image[:half] = image[:half].flip(2)
    return image


def features(encoder: Encoder, image: Tensor) -> Tensor:
    """Float32 features of images as sensors give them."""
    return encoder(encoder.preprocess(image)).float()


@torch.no_grad()
def _mean_distance(
    base: FrozenEncoder,
    student: Encoder,
    distance: Callable[[Tensor, Tensor], Tensor],
    frames: Frames,
    device: torch.device,
) -> float:
    student.eval()
    total = 0.0
    for image in frames.image.split(_CHUNK):
        image = image.to(device)
        total += float(distance(features(student, image), base(image))) * len(image)
    student.train()
    return total / len(frames)


@torch.no_grad()
def nearness(
    base: FrozenEncoder,
    students: dict[str, Encoder],
    perceptual: Perceptual | None,
    train: Frames,
    unseen: Frames,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """How near students come to the base's features in unseen homes, beside the base's mean feature.

    "r2" is the share of the features' variance about their mean in train homes that a student explains,
    "cosine" the mean cosine between an image's features, "decoder_error" the loss of what the decoder makes
    of them, for cross-entropy less what the base's own outputs have. The mean feature is taken over up to
    1,000 train frames.
    """
    mean = torch.cat([base(image.to(device)) for image in train.image[:1000].split(_CHUNK)]).mean(0)
    guesses: dict[str, Callable[[Tensor], Tensor]] = {
        name: lambda image, student=student: features(student.eval(), image)  # type: ignore[misc]
        for name, student in students.items()
    }
    guesses["mean feature"] = lambda image: mean.expand(len(image), *mean.shape)
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in guesses}
    variance = 0.0
    for image in unseen.image.split(_CHUNK):
        image = image.to(device)
        truth = base(image)
        variance += float((truth - mean).square().sum())
        least = float(perceptual(truth, truth)) if perceptual is not None else 0.0
        for name, guess in guesses.items():
            given = guess(image)
            cosine = F.cosine_similarity(given.flatten(1), truth.flatten(1)).sum()
            error = float(perceptual(given, truth)) - least if perceptual is not None else 0.0
            sums[name] += torch.tensor([(given - truth).square().sum(), cosine, error * len(image)])
    results = {}
    for name, (squares, cosine, error) in ((name, values.tolist()) for name, values in sums.items()):
        results[name] = {"r2": 1 - squares / max(variance, 1e-12), "cosine": cosine / len(unseen)}
        if perceptual is not None:
            results[name]["decoder_error"] = error / len(unseen)
    return {name: {k: float(f"{v:.5g}") for k, v in values.items()} for name, values in results.items()}
