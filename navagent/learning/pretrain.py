"""Pre-training of a perception encoder on a Taskonomy-style task (Zamir et al., CVPR 2018, arXiv:1804.08328).

The simulator gives exact ground truth, so that an encoder and a small decoder learn together to predict
surface normals, or another task, from the images of homes in the train split. How good they are is told on
homes of the val split, which they never saw, beside predictors that never look at the image. The encoder is
what later gets frozen.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from envs.files import atomic_write
from navagent.learning.decoder import decoder_for
from navagent.learning.frames import (
    SENSORS,
    Frames,
    FrameSource,
    View,
    describe_dataset,
    render_frames,
)
from navagent.learning.perception import TASKS
from navagent.learning.quality import blind_predictors, draw_predictions, measure, results_table
from navagent.learning.training import Training, half_precision, warm_cosine
from policies.encoders import ENCODERS, Encoder, make_encoder
from policies.weights import save_safetensors, sha256


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of one pre-training."""

    dataset: Path
    """Folder of a data set with ``scenes/`` and ``episodes/{train,val}``."""
    out: Path
    """Folder for the weights, the card and the picture."""
    encoder: str = "fcn5_small"
    """Name of the encoder."""
    sensor: str = "rgb"
    """What the encoder looks at: "rgb" or "depth"."""
    task: str = "normals"
    """What it learns to predict, see :data:`~navagent.learning.perception.TASKS`."""
    steps: int = 4000
    """Optimiser steps."""
    batch_size: int = 64
    """Frames a step."""
    train_frames: int = 10000
    """Frames rendered in train homes."""
    val_frames: int = 2000
    """Frames rendered in val homes."""
    learning_rate: float = 2e-3
    """Peak learning rate of Adam, reached after a twentieth of the steps; then it falls to 0 as a cosine."""
    weight_decay: float = 2e-6
    """Weight decay, that of the side-tuning authors."""
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
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder {self.encoder!r}: expected one of {', '.join(ENCODERS)}")
        _ = self.view
        for name in ("steps", "batch_size", "train_frames", "val_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate {self.learning_rate}: expected more than 0")

    @property
    def view(self) -> View:
        """What is looked at."""
        return View(
            self.dataset,
            self.sensor,
            (self.task,),
            self.height,
            self.width,
            self.hfov_deg,
            self.sensor_height,
            self.device,
        )


def pretrain(
    config: PretrainConfig, source: FrameSource = render_frames, console: Console | None = None
) -> Path:
    """Trains an encoder, says how good it is on unseen homes, and leaves it in ``config.out``.

    The folder receives ``encoder.safetensors``, ``decoder.safetensors``, ``card.json`` (settings and results)
    and ``unseen.png`` (image, truth and prediction). ``state.safetensors`` lets the same call go on where it
    was interrupted.

    Args:
        config: the settings.
        source: renders the frames; by default the built-in simulator.
        console: where to show progress.

    Returns:
        The encoder's weights file.

    Raises:
        ValueError: for an encoder whose output is no map that doublings bring to the image's size, or a
            folder that holds another pre-training.
    """
    console = console or Console()
    device = torch.device(config.device)
    out = Path(config.out)
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = make_encoder(config.encoder, SENSORS[config.sensor], "random").to(device)
        shape = encoder.output_shape(config.height, config.width)
        whose = f"encoder {config.encoder!r}"
        decoder = decoder_for(shape, config.height, config.width, TASKS[config.task].channels, whose)
        modules = nn.ModuleDict({"encoder": encoder, "decoder": decoder.to(device)})
    training = _training(config, modules)
    resumed = training.resume()
    train = source(config.view, "train", config.train_frames, config.seed)
    val = source(config.view, "val", config.val_frames, config.seed + 1)
    if resumed:
        console.print(f"going on at step {training.step} of {config.steps}")

    def predict(image: Tensor) -> Tensor:
        return decoder(encoder(encoder.preprocess(image.to(device)))).cpu()

    def loss(step: int) -> Tensor:
        image, target = batch(config, train, step)
        return TASKS[config.task].loss(decoder(encoder(encoder.preprocess(image))), target)

    modules.train()
    name = f"{config.task} from {config.sensor}"
    training.run(loss, lambda _: training.scheduler.step(), config.steps, name, console)
    modules.eval()
    predictors = {"network": predict, **blind_predictors(config.task, train)}
    results = {name: measure(predictor, config.task, val) for name, predictor in predictors.items()}
    weights = _store(config, encoder, decoder, results, time.perf_counter() - began)
    draw_predictions(out / "unseen.png", predict, config.task, val)
    console.print(results_table(f"{config.task} on unseen homes", results))
    return weights


def _training(config: PretrainConfig, modules: nn.Module) -> Training:
    optimizer = torch.optim.Adam(
        modules.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = LambdaLR(optimizer, lambda step: warm_cosine(step / config.steps))
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "device")}
    return Training(modules, optimizer, schedule, settings, Path(config.out) / "state.safetensors")


def batch(config: PretrainConfig, frames: Frames, step: int) -> tuple[Tensor, Tensor]:
    """Images and targets of a step, half of them mirrored.

    Seed and step alone decide which, so that an interrupted training goes on as if it had not been.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    rows = torch.randint(len(frames), (config.batch_size,), generator=generator)
    image = frames.image[rows].to(config.device)
    target = frames.targets[config.task][rows].to(config.device).float()
    half = config.batch_size // 2
    image[:half] = image[:half].flip(2)
    target[:half] = TASKS[config.task].mirror(target[:half])
    return image, target


def _store(
    config: PretrainConfig,
    encoder: Encoder,
    decoder: nn.Module,
    results: dict[str, dict[str, float]],
    seconds: float,
) -> Path:
    out = Path(config.out)
    weights = out / "encoder.safetensors"
    about = {
        "encoder": config.encoder,
        "channels": SENSORS[config.sensor],
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "task": config.task,
        "settings": {
            k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "dataset", "device")
        },
        "dataset": describe_dataset(config.dataset),
        "torch": torch.__version__,
        "seconds": round(seconds),
        "unseen_homes": results,
    }
    save_safetensors(weights, half_precision(encoder.state_dict()), about)
    save_safetensors(out / "decoder.safetensors", half_precision(decoder.state_dict()), about)
    with atomic_write(out / "card.json") as temporary:
        temporary.write_text(json.dumps({**about, "sha256": sha256(weights)}, indent=1) + "\n")
    return weights
