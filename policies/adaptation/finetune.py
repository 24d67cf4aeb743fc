"""Full fine-tuning: the encoder starts pre-trained and learns whole."""

from __future__ import annotations

from policies.adaptation.base import AdaptationConfig, TrainableEncoder, WholeEncoder


class FineTuning(WholeEncoder):
    """One pre-trained encoder, all of it trainable."""

    def __init__(self, config: AdaptationConfig) -> None:
        super().__init__()
        self.network = TrainableEncoder(config.make_encoder())
