"""Mid-tuning: feature extraction for the first part of training, full fine-tuning for the rest.

While what follows the encoder is still random, its gradients say little about the features and would only
distort them; so it learns first, on features that can be stored, and then all learns together (Kumar et al.,
ICLR 2022, arXiv:2202.10054, who call it linear probing then fine-tuning).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from policies.adaptation.base import BASE, AdaptationConfig
from policies.adaptation.finetune import FineTuning
from policies.encoders import Encoder


@dataclass(frozen=True)
class MidTuningConfig(AdaptationConfig):
    """Settings of mid-tuning."""

    unfreeze_at: float = 0.5
    """Share of the training, 0..1, after which the encoder learns too; at 0 from the start, at 1 never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.unfreeze_at <= 1.0:
            raise ValueError(f"mid-tuning unfreeze_at {self.unfreeze_at}: expected a share in 0..1")


class MidTuning(FineTuning):
    """One pre-trained encoder that is frozen at first.

    :meth:`set_progress` unfreezes it; a training loop that does not call it trains on frozen features alone.
    The encoder's parameters are in the optimiser's groups from the start, but get no gradient while it is
    frozen, so that nothing moves them. The phase is part of the state: a training that is resumed goes on in
    the phase it was in. Once unfrozen, the encoder stays so until a further task begins, which again starts
    with a frozen encoder, as the task before left it.
    """

    config_class: ClassVar[type[AdaptationConfig]] = MidTuningConfig
    recomputed: ClassVar[str] = "all of its encoder learns by now"
    config: MidTuningConfig
    unfrozen: Tensor
    """Whether the encoder learns: () bool."""

    def __init__(self, config: MidTuningConfig, base: Encoder | None = None) -> None:
        super().__init__(config, base)
        self.register_buffer("unfrozen", torch.tensor(config.unfreeze_at == 0.0))

    def start_task(self, task: str) -> None:
        """Goes on with the one network under another name, frozen at first, see :class:`MidTuning`."""
        further = self.task not in ("", task)
        super().start_task(task)
        if further:
            self.unfrozen.fill_(self.config.unfreeze_at == 0.0)

    def set_progress(self, samples: int, total: int) -> None:
        """Unfreezes the encoder once ``unfreeze_at`` of ``total`` samples were learned from."""
        if samples >= self.config.unfreeze_at * total and self.config.unfreeze_at < 1.0:
            self.unfrozen.fill_(True)

    def forward(self, image: Tensor, base_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """The encoder's features; stored ones are used only while it is frozen."""
        # An exported graph has no branches; both phases give the same features of an image.
        if torch.compiler.is_exporting() or self.unfrozen:
            return super().forward(image)
        return self._frozen_features(image) if base_features is None else base_features[BASE]

    def base_features(self, image: Tensor) -> dict[str, Tensor]:
        """The encoder's features while it is frozen, and nothing afterwards."""
        return {} if self.unfrozen else {BASE: self._frozen_features(image)}

    def metrics(self) -> dict[str, float]:
        """Whether the encoder learns, 0 or 1."""
        return {"unfrozen": float(self.unfrozen)}

    @torch.no_grad()
    def _frozen_features(self, image: Tensor) -> Tensor:
        return self.network(image).float()
