"""Pre-training of a perception encoder on a Taskonomy-style task (Zamir et al., CVPR 2018, arXiv:1804.08328).

The simulator gives exact ground truth, so that an encoder and a small decoder learn together to predict
surface normals, or depth, from the images of homes in the train split. How good they are is told on homes of
the val split, which they never saw, beside predictors that never look at the image. The encoder is what later
gets frozen.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from envs.files import atomic_write
from policies.encoders import ENCODERS, Encoder, make_encoder
from policies.weights import read_safetensors, save_safetensors, sha256

SENSORS = {"rgb": 3, "depth": 1}
"""Sensors that an encoder can be trained for, and their channels."""
TASKS = {"normals": 3, "depth": 1}
"""Tasks (Taskonomy's normal and depth_zbuffer), and what a pixel of theirs holds."""
MAX_DEPTH = 10.0
"""Depth images are clipped and divided by this [m], as the depth sensor of the task is."""
THRESHOLDS_DEG = (11.25, 22.5, 30.0)
"""Angular errors under which the share of pixels is told, as the literature does."""


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
    """What it learns to predict: "normals" or "depth"."""
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
        for name, value, known in (
            ("encoder", self.encoder, ENCODERS),
            ("sensor", self.sensor, SENSORS),
            ("task", self.task, TASKS),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r}: expected one of {', '.join(known)}")
        for name in ("steps", "batch_size", "train_frames", "val_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate {self.learning_rate}: expected more than 0")


@dataclass(frozen=True)
class Frames:
    """Images and their ground truth."""

    image: Tensor
    """(N, H, W, 3) uint8, or depth (N, H, W, 1) float16 in 0..1."""
    target: Tensor
    """(N, C, H, W) float16: unit normals in the camera's frame, or log(1 + depth [m]); 0 where nothing is."""


FrameSource = Callable[[PretrainConfig, str, int, int], Frames]
"""Renders frames, given settings, the split, the number of frames and a seed."""


class Decoder(nn.Module):
    """From a feature map (N, C, h, w) back to the image's size, doubling it by pixel shuffles.

    Kept small, so that what the task needs has to be in the features.
    """

    def __init__(self, channels: int, doublings: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(channels, 64, 3, padding=1, bias=False),
            nn.GroupNorm(2, 64),
            nn.ReLU(),
        ]
        width = 64
        for _ in range(doublings - 1):
            layers += [
                nn.Conv2d(width, 64, 3, padding=1, bias=False),
                nn.GroupNorm(2, 64),
                nn.ReLU(),
                nn.PixelShuffle(2),
            ]
            width = 16
        layers += [nn.Conv2d(width, outputs * 4, 3, padding=1), nn.PixelShuffle(2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Predictions (N, outputs, H, W)."""
        return self.layers(features)


def pretrain(
    config: PretrainConfig, source: FrameSource | None = None, console: Console | None = None
) -> Path:
    """Trains an encoder, says how good it is on unseen homes, and leaves it in ``config.out``.

    The folder receives ``encoder.safetensors``, ``decoder.safetensors``, ``card.json`` (settings and results)
    and ``unseen.png`` (image, truth and prediction). ``state.safetensors`` lets the same call go on where it
    was interrupted.

    Args:
        config: the settings.
        source: renders the frames; None for the built-in simulator on ``config.dataset``.
        console: where to show progress.

    Returns:
        The encoder's weights file.

    Raises:
        ValueError: for an encoder whose output is no map that doublings bring to the image's size, or a
            folder that holds another pre-training.
    """
    source = source or render_frames
    console = console or Console()
    device = torch.device(config.device)
    out = Path(config.out)
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = make_encoder(config.encoder, SENSORS[config.sensor], "random").to(device)
        decoder = _make_decoder(encoder, config).to(device)
    training = _Training(config, encoder, decoder)
    resumed = training.resume(out / "state.safetensors")
    train = source(config, "train", config.train_frames, config.seed)
    val = source(config, "val", config.val_frames, config.seed + 1)
    if resumed:
        console.print(f"going on at step {training.step} of {config.steps}")
    try:
        training.run(train, out / "state.safetensors", console)
    except KeyboardInterrupt:
        training.save(out / "state.safetensors")
        console.print(f"stopped at step {training.step}; the same command goes on from there")
        raise
    results = evaluate(encoder, decoder, config, train, val)
    weights = out / "encoder.safetensors"
    about = {
        "encoder": config.encoder,
        "channels": SENSORS[config.sensor],
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "task": config.task,
        "settings": {
            k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "dataset", "device")
        },
        "dataset": _describe(config.dataset),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began),
        "unseen_homes": results,
    }
    save_safetensors(weights, _half(encoder.state_dict()), about)
    save_safetensors(out / "decoder.safetensors", decoder.state_dict(), about)
    with atomic_write(out / "card.json") as temporary:
        temporary.write_text(json.dumps({**about, "sha256": sha256(weights)}, indent=1) + "\n")
    _draw(out / "unseen.png", encoder, decoder, config, val)
    console.print(results_table(config.task, results))
    return weights


class _Training:
    """Network, optimiser and position in the schedule."""

    def __init__(self, config: PretrainConfig, encoder: Encoder, decoder: Decoder) -> None:
        self.config = config
        self.modules = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
        self.optimizer = torch.optim.Adam(
            self.modules.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.step = 0

    def run(self, frames: Frames, state: Path, console: Console) -> None:
        """Trains to the last step, saving now and then."""
        saved = time.monotonic()
        columns = (
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps · loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
        )
        self.modules.train()
        with Progress(*columns, console=console) as progress:
            name = f"{self.config.task} from {self.config.sensor}"
            bar = progress.add_task(name, total=self.config.steps, completed=self.step, loss=math.nan)
            while self.step < self.config.steps:
                loss = self._update(*self._batch(frames))
                if self.step % 20 == 0:
                    progress.update(bar, completed=self.step, loss=float(loss))
                if time.monotonic() - saved > 30:
                    self.save(state)
                    saved = time.monotonic()
            progress.update(bar, completed=self.step)
        self.save(state)

    def _update(self, image: Tensor, target: Tensor) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * _schedule(self.step / self.config.steps)
        loss = masked_l1(_predict(self.modules["encoder"], self.modules["decoder"], image), target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def _batch(self, frames: Frames) -> tuple[Tensor, Tensor]:
        """Frames of this step, half of them mirrored. Seed and step decide which, as if never interrupted."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        rows = torch.randint(len(frames.image), (config.batch_size,), generator=generator)
        image = frames.image[rows].to(config.device)
        target = frames.target[rows].to(config.device).float()
        half = config.batch_size // 2
        image[:half] = image[:half].flip(2)
        target[:half] = target[:half].flip(3)
        if config.task == "normals":
            target[:half, 0] *= -1
        return image, target

    def save(self, path: Path) -> None:
        """Writes everything that going on needs."""
        tensors = {f"modules.{k}": v for k, v in self.modules.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
        save_safetensors(path, tensors, {"step": self.step, "settings": _fingerprint(self.config)})

    def resume(self, path: Path) -> bool:
        """Takes up a saved state; False where there is none."""
        if not path.exists():
            return False
        checkpoint = read_safetensors(path)
        if checkpoint.metadata.get("settings") != _fingerprint(self.config):
            raise ValueError(
                f"{path.parent} holds a pre-training with other settings; choose another folder, or delete "
                f"{path.name} to start anew"
            )
        self.step = int(checkpoint.metadata["step"])
        modules = {k.removeprefix("modules."): v for k, v in checkpoint.tensors.items() if k[0] == "m"}
        self.modules.load_state_dict(modules)
        state = self.optimizer.state_dict()
        for name, value in checkpoint.tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, _, key = rest.partition(".")
                state["state"].setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(state)
        return True


def _half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in half precision, which loses far less than a step of training moves.

    Statistics of BatchNorm stay as they are: a variance can be too small for it, a counter too large.
    """
    kept = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value if name.endswith(kept) else value.half() for name, value in tensors.items()}


def masked_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over the pixels where the target (N, C, H, W) is not zero."""
    hit = (target != 0).any(dim=1, keepdim=True)
    return ((prediction - target).abs() * hit).sum() / (hit.sum() * target.shape[1]).clamp(min=1)


def _schedule(progress: float) -> float:
    """Share of the peak learning rate: a linear start, then a cosine down to 0."""
    warm = 0.05
    if progress < warm:
        return (progress + 1e-3) / warm
    return 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))


def _predict(encoder: nn.Module, decoder: nn.Module, image: Tensor) -> Tensor:
    assert isinstance(encoder, Encoder)
    return decoder(encoder(encoder.preprocess(image)))


def _make_decoder(encoder: Encoder, config: PretrainConfig) -> Decoder:
    shape = encoder.output_shape(config.height, config.width)
    fits = len(shape) == 3 and config.height * shape[2] == config.width * shape[1]
    factor = config.height / shape[1] if fits else 0.0
    if factor < 2 or 2 ** round(math.log2(factor)) != factor:
        raise ValueError(
            f"encoder {config.encoder!r} gives features {shape} for {config.height}x{config.width} images; "
            "pre-training needs a map that doublings bring back to the image's size"
        )
    return Decoder(shape[0], round(math.log2(factor)), TASKS[config.task])


def evaluate(
    encoder: Encoder, decoder: Decoder, config: PretrainConfig, train: Frames, val: Frames
) -> dict[str, dict[str, float]]:
    """Quality on the val frames, of the network and of two predictors that never look at the image.

    "constant" predicts one value everywhere, "mean image" the average of the train targets for each pixel:
    the floor below, the ceiling above.
    """
    encoder.eval()
    decoder.eval()
    mean_image = train.target[:4000].float().mean(dim=0)
    mean_value = mean_image.mean(dim=(1, 2), keepdim=True).expand_as(mean_image)
    sums: dict[str, list[Tensor]] = {"network": [], "mean image": [], "constant": []}
    for rows in torch.arange(len(val.image)).split(256):
        target = val.target[rows].float()
        with torch.no_grad():
            predicted = _predict(encoder, decoder, val.image[rows].to(config.device)).cpu()
        for name, guess in (
            ("network", predicted),
            ("mean image", mean_image.expand_as(target)),
            ("constant", mean_value.expand_as(target)),
        ):
            sums[name].append(_errors(config.task, guess, target))
    return {name: _summary(config.task, torch.cat(errors)) for name, errors in sums.items()}


def _errors(task: str, guess: Tensor, target: Tensor) -> Tensor:
    """Error of every pixel that was hit: angle [deg], or depth [m] beside true depth (2 columns)."""
    hit = (target != 0).any(dim=1)
    guess, target = guess.movedim(1, 3)[hit], target.movedim(1, 3)[hit]
    if task == "normals":
        cosine = F.cosine_similarity(guess, target, dim=1).clamp(-1, 1)
        return torch.rad2deg(torch.arccos(cosine))
    return torch.cat((torch.expm1(guess), torch.expm1(target)), dim=1)


def _summary(task: str, errors: Tensor) -> dict[str, float]:
    if task == "normals":
        shares = {f"within_{limit}_deg": float((errors < limit).float().mean()) for limit in THRESHOLDS_DEG}
        return _rounded({"mean_deg": float(errors.mean()), "median_deg": float(errors.median()), **shares})
    guess, truth = errors[:, 0].clamp(min=1e-3), errors[:, 1]
    ratio = torch.maximum(guess / truth, truth / guess)
    return _rounded(
        {
            "mean_m": float((guess - truth).abs().mean()),
            "relative": float(((guess - truth).abs() / truth).mean()),
            "within_1.25": float((ratio < 1.25).float().mean()),
        }
    )


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def results_table(task: str, results: dict[str, dict[str, float]]) -> Table:
    """The results as a table for people."""
    table = Table(title=f"{task} on unseen homes")
    table.add_column("predictor")
    for name in results["network"]:
        table.add_column(name.replace("_", " "), justify="right")
    for predictor, values in results.items():
        shown = (f"{v:.1%}" if k.startswith("within") else f"{v:.2f}" for k, v in values.items())
        table.add_row(predictor, *shown)
    return table


def _fingerprint(config: PretrainConfig) -> str:
    """The settings that a resumed training must share, as JSON."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "device")}
    return json.dumps({**settings, "dataset": str(config.dataset)}, sort_keys=True)


def _describe(dataset: Path) -> Any:
    """The settings that a data set was generated with, or the name of one that does not say."""
    about = Path(dataset) / "dataset.json"
    settings = json.loads(about.read_text()).get("settings") if about.is_file() else None
    return settings or Path(dataset).name


def render_frames(config: PretrainConfig, split: str, num_frames: int, seed: int) -> Frames:
    """Frames at random standpoints and headings in the homes of a split, equally many in each."""
    from envs.simulators.base import SensorSpec
    from envs.simulators.raycast.simulator import RaycastSimulator

    starts = split_starts(config.dataset, split)
    shape = (config.height, config.width)
    view: dict[str, Any] = {
        "height": config.height,
        "width": config.width,
        "hfov_deg": config.hfov_deg,
        "sensor_height": config.sensor_height,
    }
    kinds = {config.sensor, config.task}
    sensors = [SensorSpec(name=kind, kind=kind, **view) for kind in sorted(kinds)]  # type: ignore[arg-type]
    pixel = torch.uint8 if config.sensor == "rgb" else torch.float16
    frames = Frames(
        torch.empty(num_frames, *shape, SENSORS[config.sensor], dtype=pixel),
        torch.empty(num_frames, TASKS[config.task], *shape, dtype=torch.float16),
    )
    agents = min(128, num_frames)
    generator = torch.Generator(device=config.device).manual_seed(seed)
    filled = 0
    for index, (scene, start) in enumerate(starts.items()):
        wanted = num_frames * (index + 1) // len(starts)
        if wanted == filled:
            continue
        simulator = RaycastSimulator([scene], agents, sensors, device=config.device)
        here = torch.zeros(agents, dtype=torch.int64, device=config.device)
        known = torch.tensor(start, device=config.device).expand(agents, 3)
        while filled < wanted:
            position = simulator.paths.sample(here, generator)
            yaw = torch.rand(agents, generator=generator, device=config.device) * (2 * math.pi)
            simulator.reset(torch.arange(agents, device=config.device), here, position, yaw)
            # Where an episode's agent can get to, and not the roof or the top of a table.
            inside = simulator.paths.geodesic_distance(here, known, position).isfinite()
            seen = simulator.render(inside.nonzero()[: wanted - filled, 0])
            rows = slice(filled, filled + len(seen[config.task]))
            frames.image[rows] = _as_image(config.sensor, seen[config.sensor]).to(frames.image)
            frames.target[rows] = _as_target(config.task, seen[config.task]).to(frames.target)
            filled = rows.stop
        simulator.close()
    return frames


def _as_image(sensor: str, pixels: Tensor) -> Tensor:
    return pixels if sensor == "rgb" else (pixels / MAX_DEPTH).clamp(0, 1)[..., None]


def _as_target(task: str, pixels: Tensor) -> Tensor:
    return pixels.movedim(3, 1) if task == "normals" else torch.log1p(pixels)[:, None]


def split_starts(dataset: Path, split: str) -> dict[Path, tuple[float, float, float]]:
    """Scenes that the episodes of a split are set in, and where one of these starts in each."""
    from envs.episodes import find_scene, read_dataset

    episodes = read_dataset(Path(dataset) / "episodes" / split / f"{split}.json.gz")
    starts = {episode.scene_id: episode.start_position for episode in episodes}
    return {find_scene(scene, Path(dataset)): starts[scene] for scene in sorted(starts)}


def _draw(path: Path, encoder: Encoder, decoder: Decoder, config: PretrainConfig, val: Frames) -> None:
    """Rows of image, truth and prediction for a few unseen views."""
    picked = torch.linspace(0, len(val.image) - 1, min(8, len(val.image))).long()
    image = val.image[picked]
    with torch.no_grad():
        predicted = _predict(encoder, decoder, image.to(config.device)).cpu()
    target = val.target[picked].float()
    seen = image if config.sensor == "rgb" else (image.float() * 255).byte().expand(-1, -1, -1, 3)
    rows = [seen.numpy(), _colours(config.task, target), _colours(config.task, predicted)]
    picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    picture = cv2.resize(picture, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    with atomic_write(path) as temporary:
        cv2.imwrite(str(temporary), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))


def _colours(task: str, values: Tensor) -> np.ndarray:
    """Values (N, C, H, W) as colours (N, H, W, 3) uint8."""
    if task == "normals":
        shown = F.normalize(values, dim=1) * 0.5 + 0.5
    else:
        shown = (values / math.log1p(MAX_DEPTH)).clamp(0, 1).expand(-1, 3, -1, -1)
    return (shown * 255).byte().movedim(1, 3).numpy()
