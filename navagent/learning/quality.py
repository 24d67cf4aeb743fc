"""How good a perception network is: measures beside blind predictors, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from envs.files import atomic_write
from navagent.learning.frames import Frames
from navagent.learning.perception import TASKS

Predictor = Callable[[Tensor], Tensor]
"""From images, as sensors give them, to predictions (N, C, H, W) on the CPU."""

BLIND_FRAMES = 4000
"""How many train frames the blind predictors average at most."""


@torch.no_grad()
def measure(predict: Predictor, task: str, frames: Frames, batch_size: int = 256) -> dict[str, float]:
    """The task's measures of a predictor on frames."""
    errors = [
        TASKS[task].pixel_errors(predict(frames.image[rows]), frames.targets[task][rows].float())
        for rows in torch.arange(len(frames)).split(batch_size)
    ]
    return _rounded(TASKS[task].summary(torch.cat(errors)))


def blind_predictors(task: str, train: Frames) -> dict[str, Predictor]:
    """Two predictors that never look at the image, from train frames.

    "mean image" predicts the average target of each pixel, "constant" the average over these.
    """
    mean_image = train.targets[task][:BLIND_FRAMES].float().nanmean(dim=0)
    constant = mean_image.nanmean(dim=(1, 2), keepdim=True)
    # A pixel that no train frame has a target for is as good as any other.
    mean_image = torch.where(mean_image.isfinite(), mean_image, constant)
    return {
        "mean image": lambda image: mean_image.expand(len(image), -1, -1, -1),
        "constant": lambda image: constant.expand_as(mean_image).expand(len(image), -1, -1, -1),
    }


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in values.items()}


def results_table(title: str, results: Mapping[str, Mapping[str, float]]) -> Table:
    """Measures of several predictors, by their names, as a table for people."""
    table = Table(title=title)
    table.add_column("predictor")
    for name in next(iter(results.values())):
        table.add_column(name.replace("_", " "), justify="right")
    for predictor, values in results.items():
        shown = (f"{v:.1%}" if k.startswith("within") else f"{v:.4g}" for k, v in values.items())
        table.add_row(predictor, *shown)
    return table


def draw_predictions(path: Path, predict: Predictor, task: str, frames: Frames) -> None:
    """Rows of image, truth and prediction for a few views, as a PNG."""
    picked = torch.linspace(0, len(frames) - 1, min(8, len(frames))).long()
    image = frames.image[picked]
    with torch.no_grad():
        predicted = predict(image)
    seen = image if image.dtype == torch.uint8 else (image.float() * 255).byte().expand(-1, -1, -1, 3)
    truth = TASKS[task].pictures(frames.targets[task][picked].float())
    rows = [seen.numpy(), truth, TASKS[task].pictures(predicted)]
    picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    picture = cv2.resize(picture, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    with atomic_write(path) as temporary:
        cv2.imwrite(str(temporary), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
