"""Full fine-tuning: the encoder starts pre-trained and learns whole."""

from __future__ import annotations

import copy

from policies.adaptation.base import (
    DEFAULT_TASK,
    AdaptationConfig,
    TrainableEncoder,
    WholeEncoder,
    check_task_name,
)
from policies.encoders import Encoder


class FineTuning(WholeEncoder):
    """One pre-trained encoder, all of it trainable.

    A further task goes on with the same network, so that what is lost of the earlier ones can be measured.
    """

    def __init__(self, config: AdaptationConfig, base: Encoder | None = None) -> None:
        super().__init__(config)
        network = config.make_encoder() if base is None else copy.deepcopy(base)
        self.adapters[DEFAULT_TASK] = TrainableEncoder(network)
        self.start_task(DEFAULT_TASK)

    def start_task(self, task: str) -> None:
        """Goes on with the one network under another name, see :meth:`Adaptation.start_task`."""
        if self.task and task != self.task:
            check_task_name(task)
            self.adapters[task] = self.adapters.pop(self.task)
        super().start_task(task)

    def make_adapter(self) -> TrainableEncoder:
        """The one network."""
        return self.network
