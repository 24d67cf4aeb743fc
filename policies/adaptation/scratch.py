"""From scratch: the same encoder with random weights, to measure what pre-training is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from policies.adaptation.base import AdaptationConfig, TrainableEncoder, WholeEncoder


@dataclass(frozen=True)
class ScratchConfig(AdaptationConfig):
    """Settings of training from scratch, which takes no pre-trained weights."""

    weights: str = "random"
    """Always "random"."""

    def __post_init__(self) -> None:
        if self.weights != "random":
            raise ValueError(
                f"weights {self.weights!r}: training from scratch starts from 'random'; use the method "
                "'finetune' for pre-trained weights"
            )


class Scratch(WholeEncoder):
    """One encoder with random weights, all of it trainable."""

    config_class: ClassVar[type[AdaptationConfig]] = ScratchConfig

    def __init__(self, config: ScratchConfig) -> None:
        super().__init__()
        self.network = TrainableEncoder(config.make_encoder(), keep_statistics=False)
