"""Lamb (You et al. 2020, arXiv:1904.00962): Adam for large batches, its step scaled layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MAX_NORM = 10.0
"""A layer whose weights are longer than this moves as if they were so long (the paper's phi)."""


class Lamb(Optimizer):
    """Layer-wise moments: algorithm 2 of You et al. (2020), bounded as in BPS (Shacklett et al. 2021).

    A layer ``x`` with gradient moments ``m`` and ``v``, both corrected for their start at zero, moves by

    ::

        r = m / (sqrt(v) + eps) + weight_decay * x
        trust = min(|x|, 10) / |r|      between min_trust and 1 / min_trust, 1 where a norm is 0
        x <- x - lr * trust * r

    Biases, normalisation's scales and single numbers such as alpha are no layers: for parameters of fewer
    than two dimensions the trust is 1, which makes the step AdamW's.

    Args:
        params: parameters or groups of them; a group may have its own ``lr`` and ``weight_decay``.
        lr: learning rate.
        betas: how slowly the moments forget.
        eps: keeps the division finite.
        weight_decay: decoupled decay, within what the trust scales.
        min_trust: bound of the trust, above 0 and at most 1; 1 makes every step AdamW's.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        min_trust: float = 0.01,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas {betas} must be at least 0 and less than 1")
        if not 0.0 < min_trust <= 1.0:
            raise ValueError(f"min_trust {min_trust} must be greater than 0 and at most 1")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "min_trust": min_trust,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Moves every parameter that has a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        steps = state["step"].item()
        beta1, beta2 = group["betas"]
        first = state["exp_avg"].lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = (second / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        update = (first / (1 - beta1**steps)).div_(deviation)
        if group["weight_decay"]:
            update.add_(parameter, alpha=group["weight_decay"])
        if parameter.dim() > 1:
            update.mul_(trust_ratio(parameter, update, group["min_trust"]))
        parameter.add_(update, alpha=-group["lr"])


def trust_ratio(parameter: Tensor, update: Tensor, min_trust: float) -> Tensor:
    """How far along ``update`` a layer may go, (): its length against the update's, within bounds."""
    length, reach = parameter.norm(), update.norm()
    # No branch on the numbers: it would wait for the device at every layer.
    ratio = (length.clamp(max=MAX_NORM) / reach).clamp(min_trust, 1.0 / min_trust)
    return torch.where((length > 0) & (reach > 0), ratio, torch.ones_like(ratio))
