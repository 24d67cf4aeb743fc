"""Side-tuning (Zhang et al., ECCV 2020, arXiv:1912.13503): a frozen base and a small network beside it.

R(x) = alpha B(x) + (1 - alpha) S(x), with alpha = sigmoid(a) learned from a = 0 by the task's own loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from policies.adaptation.base import (
    BASE,
    DEFAULT_TASK,
    Adaptation,
    AdaptationConfig,
    FrozenEncoder,
    TrainableEncoder,
)
from policies.encoders import Encoder, make_encoder

SideInit = Literal["copy", "distilled", "random", "low_energy"]

LOW_ENERGY = 1e-2
"""Scale of a "low_energy" side network's first outputs. Exactly 0 would end all gradients at a last ReLU."""


@dataclass(frozen=True)
class SideTuningConfig(AdaptationConfig):
    """Settings of side-tuning."""

    alpha: float = 0.5
    """Initial weight of the base, in 0..1; 0.8 is the authors' "alpha8". At 0 or 1 it cannot learn."""
    learn_alpha: bool = True
    """Whether alpha learns with the task."""
    side_encoder: str | None = None
    """Encoder of the side network; None for that of the base. Both must give features of one shape."""
    side_init: SideInit = "copy"
    """How the side network starts: the base's weights, a file distilled from the base, random weights, or
    random ones scaled so that it adds almost nothing."""
    side_weights: str | None = None
    """File of a side network distilled from the base; required by, and only for, "distilled"."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"side-tuning alpha {self.alpha}: expected a value in 0..1")
        if self.learn_alpha and self.alpha in (0.0, 1.0):
            raise ValueError(f"side-tuning alpha {self.alpha} cannot learn; set learn_alpha=False with it")
        choices = ("copy", "distilled", "random", "low_energy")
        if self.side_init not in choices:
            raise ValueError(f"side_init {self.side_init!r}: expected one of {', '.join(choices)}")
        if (self.side_init == "distilled") != (self.side_weights is not None):
            raise ValueError(
                f"side_init {self.side_init!r} with side_weights {self.side_weights!r}: 'distilled' needs a "
                "file of weights, and the others take none"
            )
        if self.side_init == "copy" and self.side_encoder not in (None, self.encoder):
            raise ValueError(
                f"side_init 'copy' needs a side network like the base {self.encoder!r}, not "
                f"{self.side_encoder!r}; use 'random' or 'distilled'"
            )

    def make_side(self, base: Encoder) -> Encoder:
        """The side network in its initial state."""
        name = self.side_encoder or self.encoder
        weights = self.side_weights if self.side_init == "distilled" else "random"
        side = make_encoder(name, self.channels, weights or "random")
        if self.side_init == "copy":
            side.load_state_dict(base.state_dict())
        if self.side_init == "low_energy":
            side.scale_outputs(LOW_ENERGY)
        return side


class SideAdapter(nn.Module):
    """What side-tuning trains for one task: the side network and alpha."""

    def __init__(self, side: TrainableEncoder, alpha: float, learn_alpha: bool) -> None:
        super().__init__()
        self.side = side
        logit = math.log(alpha / (1 - alpha)) if 0.0 < alpha < 1.0 else math.copysign(math.inf, alpha - 0.5)
        start = torch.tensor(logit)
        self.alpha_logit: Tensor
        if learn_alpha:
            self.alpha_logit = nn.Parameter(start)
        else:
            self.register_buffer("alpha_logit", start)


class SideTuning(Adaptation):
    """A frozen base blended with a trainable side network."""

    config_class: ClassVar[type[AdaptationConfig]] = SideTuningConfig
    config: SideTuningConfig

    def __init__(self, config: SideTuningConfig, base: Encoder | None = None) -> None:
        super().__init__(config)
        self.base = FrozenEncoder(base or config.make_encoder())
        self.start_task(DEFAULT_TASK)

    def make_adapter(self) -> SideAdapter:
        """A side network in its initial state, and alpha."""
        config = self.config
        side = TrainableEncoder(
            config.make_side(self.base.encoder), config.side_init in ("copy", "distilled")
        )
        return SideAdapter(side, config.alpha, config.learn_alpha)

    @property
    def side(self) -> TrainableEncoder:
        """The current task's side network."""
        return self.adapter.side  # type: ignore[return-value]

    @property
    def alpha_logit(self) -> Tensor:
        """Logit of alpha."""
        return self.adapter.alpha_logit  # type: ignore[return-value]

    @property
    def alpha(self) -> Tensor:
        """Weight of the base in the blend, a scalar in 0..1."""
        return torch.sigmoid(self.alpha_logit)

    def forward(self, image: Tensor, base_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """Blend of base and side features, see :meth:`Adaptation.forward`."""
        base = self.base(image) if base_features is None else base_features[BASE]
        side = self.side(image)
        if base.shape != side.shape:
            raise ValueError(
                f"base features {tuple(base.shape)} and side features {tuple(side.shape)} differ in shape; "
                "choose a side_encoder with the base's output, or check base_features"
            )
        alpha = self.alpha
        return alpha * base + (1 - alpha) * side

    def base_features(self, image: Tensor) -> dict[str, Tensor]:
        """The frozen base's features."""
        return {BASE: self.base(image)}

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the blend, see :meth:`Adaptation.output_shape`."""
        base = self.base.encoder.output_shape(height, width)
        side = self.side.encoder.output_shape(height, width)
        if base != side:
            raise ValueError(f"base features {base} and side features {side} must have one shape")
        return base

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The side network, and alpha apart: weight decay would only pull it towards 0.5."""
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in self.side.parameters() if p.requires_grad],
                "weight_decay": weight_decay,
            }
        ]
        if isinstance(self.alpha_logit, nn.Parameter):
            groups.append({"params": [self.alpha_logit], "weight_decay": 0.0})
        return groups
