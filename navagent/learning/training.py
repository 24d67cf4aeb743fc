"""A supervised training that shows how far it is, and goes on exactly where it was interrupted."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from policies.weights import read_safetensors, save_safetensors

SECONDS_BETWEEN_SAVES = 30.0
"""How much work a crash can cost."""


class Training:
    """Modules, their optimiser and schedule, and how many steps they have made.

    Args:
        modules: what learns.
        optimizer: over their parameters.
        scheduler: sets the learning rate.
        settings: what a training that goes on must have in common with the one that was interrupted.
        path: file that keeps the state.
    """

    def __init__(
        self,
        modules: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        settings: Mapping[str, Any],
        path: Path,
    ) -> None:
        self.modules = modules
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.settings = json.dumps(settings, sort_keys=True, default=str)
        self.path = path
        self.step = 0

    def run(
        self,
        loss: Callable[[int], Tensor],
        advance: Callable[[int], None],
        steps: int,
        name: str,
        console: Console,
    ) -> None:
        """Trains up to step ``steps`` and saves.

        Args:
            loss: the loss () of a step, counted from 0.
            advance: moves the schedule on, given the steps made.
            steps: where to stop.
            name: what is shown.
            console: where.
        """
        saved = time.monotonic()
        columns = (
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps · loss {task.fields[loss]:.3g}"),
            TimeRemainingColumn(),
        )
        try:
            with Progress(*columns, console=console) as progress:
                bar = progress.add_task(name, total=steps, completed=self.step, loss=math.nan)
                while self.step < steps:
                    value = self._update(loss(self.step))
                    advance(self.step)
                    if self.step % 20 == 0:
                        progress.update(bar, completed=self.step, loss=float(value))
                    if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                        self.save()
                        saved = time.monotonic()
                progress.update(bar, completed=self.step)
        except KeyboardInterrupt:
            self.save()
            console.print(f"stopped at step {self.step}; the same command goes on from there")
            raise
        self.save()

    def _update(self, loss: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def save(self) -> None:
        """Writes everything that going on needs."""
        tensors = {f"modules.{name}": value for name, value in self.modules.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        about = {"step": self.step, "settings": self.settings, "schedule": self.scheduler.state_dict()}
        save_safetensors(self.path, tensors, about)

    def resume(self) -> bool:
        """Takes up the saved state; False where there is none.

        Raises:
            ValueError: if it was saved with other settings.
        """
        if not self.path.exists():
            return False
        checkpoint = read_safetensors(self.path)
        if checkpoint.metadata.get("settings") != self.settings:
            raise ValueError(
                f"{self.path.parent} holds a training with other settings; choose another folder, or delete "
                f"{self.path.name} to start anew"
            )
        self.step = int(checkpoint.metadata["step"])
        modules = {}
        state = self.optimizer.state_dict()
        for name, value in checkpoint.tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "modules":
                modules[rest] = value
            else:
                index, _, key = rest.partition(".")
                state["state"].setdefault(int(index), {})[key] = value
        self.modules.load_state_dict(modules)
        self.scheduler.load_state_dict(json.loads(checkpoint.metadata["schedule"]))
        for group, rate in zip(state["param_groups"], self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.optimizer.load_state_dict(state)
        return True


def warm_cosine(progress: float) -> float:
    """Share of the peak learning rate at a share of the training: a linear start, then a cosine down to 0."""
    warm = 0.05
    if progress < warm:
        return (progress + 1e-3) / warm
    return 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))


def half_precision(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in half precision, which loses far less than a step of training moves.

    Statistics of BatchNorm stay as they are: a variance can be too small for it, a counter too large.
    """
    kept = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value if name.endswith(kept) else value.half() for name, value in tensors.items()}
