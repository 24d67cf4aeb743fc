"""From scratch: the same encoder with random weights, to measure what pre-training is worth."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from policies.adaptation.base import DEFAULT_TASK, AdaptationConfig, TrainableEncoder, WholeEncoder
from policies.encoders import Encoder


@dataclass(frozen=True)
class ScratchConfig(AdaptationConfig):
    """Settings of training from scratch, which takes no pre-trained weights."""

    weights: str = "random"
    """Always "random"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights != "random":
            raise ValueError(
                f"weights {self.weights!r}: training from scratch starts from 'random'; use the method "
                "'finetune' for pre-trained weights"
            )


class Scratch(WholeEncoder):
    """One encoder with random weights, all of it trainable.

    Its BatchNorm layers, if it has any, learn their statistics from the batches. With PPO the network that
    learns would then differ from the one that acted.
    """

    config_class: ClassVar[type[AdaptationConfig]] = ScratchConfig

    def __init__(self, config: ScratchConfig, base: Encoder | None = None) -> None:
        super().__init__(config)
        # In a tuple, so that it is no part of this network.
        self._design = (config.make_encoder() if base is None else base,)
        self.start_task(DEFAULT_TASK)

    def make_adapter(self) -> TrainableEncoder:
        """A network of its own for each task, with random weights."""
        network = copy.deepcopy(self._design[0])
        network.initialise()
        return TrainableEncoder(network, keep_statistics=False)
