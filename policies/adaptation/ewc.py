"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv:1612.00796).

Fine-tuning in which weights that mattered for earlier tasks are held by springs: the loss of a new task gets
coef / 2 * sum_i F_i (w_i - w*_i)^2 (equation 3), where w* are the weights at the end of the earlier task and
F is the diagonal of its Fisher information.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Literal

import torch
from torch import Tensor

from policies.adaptation.base import AdaptationConfig
from policies.adaptation.finetune import FineTuning
from policies.encoders import Encoder

EarlierTasks = Literal["sum", "online"]


@dataclass(frozen=True)
class EWCConfig(AdaptationConfig):
    """Settings of elastic weight consolidation.

    Side-tuning's experiments have it as a baseline, with coefficients of 1 to 1e5. Their code has no factor
    1/2, and squares the mean gradients of mini-batches, which makes a smaller F than single samples do: their
    numbers are a place to search from, no more.
    """

    coef: float = 1e4
    """How stiff the springs are, 0 or more."""
    fisher_samples: int = 1000
    """At most so many samples enter the estimate of F."""
    earlier_tasks: EarlierTasks = "sum"
    """Springs after several tasks: one for each, to the weights at that task's end; or a single one to the
    latest weights, with F added up ("online", Schwarz et al. 2018, arXiv:1805.06370)."""
    decay: float = 1.0
    """What "online" multiplies the earlier F by at the end of each task, in 0..1; 1 for "sum"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.coef >= 0:
            raise ValueError(f"ewc coef {self.coef}: expected 0 or more")
        if self.fisher_samples < 1:
            raise ValueError(f"ewc fisher_samples {self.fisher_samples}: expected 1 or more")
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"ewc decay {self.decay}: expected a value in 0..1")
        if self.earlier_tasks == "sum" and self.decay != 1.0:
            raise ValueError(
                f"ewc decay {self.decay} with earlier_tasks 'sum', which forgets nothing; use 'online'"
            )


class EWC(FineTuning):
    """Fine-tuning with a penalty on moving the weights that earlier tasks need.

    There is no penalty until :meth:`finish_task` was called. For one new task on a pre-trained encoder, call
    it first of all, with losses of the task of the pre-training; then start the new task.

    The heads that come after the encoder are no part of this: one for each task, they do not interfere.
    """

    config_class: ClassVar[type[AdaptationConfig]] = EWCConfig
    needs_earlier_task: ClassVar[bool] = True
    config: EWCConfig
    importance: Tensor
    """Sum of the earlier tasks' diagonal Fisher information: (parameters,)."""
    anchor: Tensor
    """Where the springs pull to: (parameters,)."""
    tension: Tensor
    """What springs to different weights keep of (w - w*)^2 F at the anchor: ()."""

    def __init__(self, config: EWCConfig, base: Encoder | None = None) -> None:
        super().__init__(config, base)
        weights = self._weights().detach()
        self.register_buffer("importance", torch.zeros_like(weights))
        self.register_buffer("anchor", weights.clone())
        self.register_buffer("tension", torch.zeros((), dtype=weights.dtype))

    def fisher(self, losses: Iterable[Tensor]) -> Tensor:
        """Diagonal Fisher information of the encoder's parameters: mean squared gradients, (parameters,).

        Args:
            losses: negative log-likelihoods (), one a sample, computed in evaluation mode; a generator is
                asked for no more than ``fisher_samples`` of them. With labels or actions drawn from the
                model's own distribution this estimates the Fisher information, with those of the data the
                empirical Fisher.

        Raises:
            ValueError: without losses, or for ones of another shape, not connected to the encoder, or with
                gradients that are no numbers.
        """
        parameters = list(self.network.parameters())
        total = torch.zeros_like(self.importance)
        count = 0
        for loss in islice(losses, self.config.fisher_samples):
            if loss.dim() != 0:
                raise ValueError(f"loss of shape {tuple(loss.shape)}: expected one scalar a sample")
            if not loss.requires_grad:
                raise ValueError(f"loss {count} is not connected to parameters; compute it with gradients")
            # Losses of one batch share a graph, so it has to outlive the first of them.
            gradients = torch.autograd.grad(
                loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            total += _vector(gradients).square()
            count += 1
        if count == 0:
            raise ValueError("no losses to estimate the Fisher information from; expected one a sample")
        if not torch.isfinite(total).all():
            raise ValueError(f"gradients of {count} losses are not all finite; check the losses")
        return total / count

    def finish_task(self, losses: Iterable[Tensor]) -> None:
        """Ties the weights to where they are now, each as firmly as the current task needs it.

        Args:
            losses: see :meth:`fisher`.
        """
        new = self.fisher(losses)
        with torch.no_grad():
            weights = self._weights()
            if self.config.earlier_tasks == "online":
                self.importance.mul_(self.config.decay).add_(new)
                self.anchor.copy_(weights)
                return
            # Two quadratics are one, around their weighted mean, plus what they differ by there.
            total = self.importance + new
            share = torch.where(total > 0, new / total, 1.0)
            gap = weights - self.anchor
            self.tension += (self.importance * share * gap.square()).sum()
            self.anchor += share * gap
            self.importance.copy_(total)

    def penalty(self) -> Tensor:
        """coef / 2 * sum_i F_i (w_i - w*_i)^2, summed over the finished tasks: ()."""
        gap = self._weights() - self.anchor
        return self.config.coef / 2 * ((self.importance * gap.square()).sum() + self.tension)

    def _weights(self) -> Tensor:
        return _vector(self.network.parameters())


def _vector(tensors: Iterable[Tensor]) -> Tensor:
    """All values in one vector; reshaped, since gradients may lie in memory in any order."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
