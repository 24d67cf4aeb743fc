"""What to do about numbers that are not finite: stop with what caused them on disk, or skip and count them.

One such number in an observation makes a memory, and in a loss a whole policy, of no use for good.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from navagent.distributed import Ranks
from navagent.learning.rollout import SequenceBatch, StepResult
from navagent.runs import write_checkpoint

NonFinite = Literal["stop", "skip"]


class FiniteGuard:
    """Looks at every observation before the policy does, and at every loss and gradient before the optimiser.

    Args:
        mode: ``stop`` raises FloatingPointError. ``skip`` leaves out minibatches whose loss or gradient is
            not finite, takes 0 for what is not finite in observations and rewards, and counts both.
        rank: number of this process among several, for the names of files.
    """

    def __init__(self, mode: NonFinite = "stop", rank: int | None = None) -> None:
        if mode not in ("stop", "skip"):
            raise ValueError(f"nonfinite {mode!r} is not one of stop, skip")
        self.mode = mode
        self.rank = rank
        self.folder: Path | None = None
        """Where batches are saved for inspection; None for nowhere."""
        self.skipped_minibatches = 0
        """Minibatches left out so far."""
        self.replaced_observations = 0
        """Steps of an agent so far of which an observation or the reward was not finite."""

    def observations(self, observations: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
        """Finite observations, by name (N, ...), after ``frames`` frames."""
        if _all_finite(observations):
            return observations
        return self._replaced(observations, frames)

    def step(self, result: StepResult, frames: int, first: int = 0) -> StepResult:
        """The answer of an environment, its observations and rewards finite; agents count from ``first``."""
        numbers = result.observations | {"reward": result.rewards}
        if not _all_finite(numbers):
            agents = torch.arange(len(result.rewards), device=result.rewards.device)
            numbers = self._replaced(numbers, frames, first + agents)
            rewards = numbers.pop("reward")
            result = dataclasses.replace(result, observations=numbers, rewards=rewards)
        final = result.final_observations
        if final is not None and not _all_finite(final):
            agents = result.truncated.nonzero().flatten()
            final = self._replaced(final, frames, first + agents)
            result = dataclasses.replace(result, final_observations=final)
        return result

    def _replaced(
        self, numbers: dict[str, Tensor], frames: int, agents: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Numbers with 0 for what is not finite; their rows are of ``agents``, of all if None."""
        faults = {
            name: ~value.flatten(1).isfinite().all(1) if value.dim() > 1 else ~value.isfinite()
            for name, value in numbers.items()
        }
        rows = torch.stack(list(faults.values())).any(0)
        if not bool(rows.any()):
            # Finite numbers whose sum is not.
            return numbers
        if self.mode == "stop":
            names = " and ".join(repr(name) for name, fault in faults.items() if bool(fault.any()))
            found = rows.nonzero().flatten() if agents is None else agents[rows]
            listed = ", ".join(map(str, found.tolist()[:8]))
            saved = self._save(frames, {"observations": numbers})
            raise FloatingPointError(
                f"{names} of agents {listed} holds numbers that are not finite after {frames} frames{saved}. "
                "Look at the sensor and the scene, or set nonfinite to skip to take 0 for them"
            )
        self.replaced_observations += int(rows.sum())
        return {name: value.nan_to_num(0.0, 0.0, 0.0) for name, value in numbers.items()}

    def accepts(
        self, record: Mapping[str, Tensor], batch: SequenceBatch, policy: nn.Module, frames: int
    ) -> bool:
        """Whether a minibatch may change ``policy``: its loss, and its gradient where known, are finite.

        ``record`` holds ``train/loss`` and perhaps ``train/grad_norm``, beside what else is worth knowing.

        Raises:
            FloatingPointError: if not, and the mode is ``stop``.
        """
        watched = [record[name] for name in ("train/loss", "train/grad_norm") if name in record]
        if all(bool(value.isfinite()) for value in watched):
            return True
        if self.mode == "skip":
            self.skipped_minibatches += 1
            return False
        numbers = {name: value.item() for name, value in record.items()}
        trained = {name: value for name, value in policy.named_parameters() if value.requires_grad}
        tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        saved = self._save(frames, {"losses": numbers, "batch": tensors, "policy": trained})
        parts = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
        raise FloatingPointError(
            f"the loss or its gradient is not finite after {frames} frames ({parts}); the policy was not "
            f"changed by this minibatch{saved}. Lower the learning rate or max_grad_norm, or look for "
            "infinite rewards or observations"
        )

    def _save(self, frames: int, state: dict[str, Any]) -> str:
        """Saves ``state`` for inspection, and says in a part of a sentence where it is."""
        if self.folder is None:
            return ""
        rank = "" if self.rank is None else f"-rank{self.rank}"
        path = self.folder / f"nonfinite-{frames:012d}{rank}.safetensors"
        try:
            write_checkpoint(path, state)
        except OSError as error:
            return f"; what it was could not be saved ({error.strerror})"
        return f"; what it was is in {path}, for navagent.runs.read_checkpoint"

    def counts(self, ranks: Ranks) -> dict[str, int]:
        """The counts over all ``ranks``, which ask together.

        They leave out the same minibatches, but each has observations of its own.
        """
        replaced = ranks.sum(torch.tensor(self.replaced_observations))
        return self.state_dict() | {"replaced_observations": int(replaced)}

    def state_dict(self) -> dict[str, Any]:
        """The counts of this process."""
        return {
            "skipped_minibatches": self.skipped_minibatches,
            "replaced_observations": self.replaced_observations,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from saved counts."""
        self.skipped_minibatches = int(state["skipped_minibatches"])
        self.replaced_observations = int(state["replaced_observations"])


def _all_finite(numbers: dict[str, Tensor]) -> bool:
    """Whether the sum of all numbers is finite, which it is not if one of them is not; one look at each."""
    sums = [value.sum(dtype=torch.float32) for value in numbers.values() if value.is_floating_point()]
    return not sums or bool(torch.stack(sums).sum().isfinite())
