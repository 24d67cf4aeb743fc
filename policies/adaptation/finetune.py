"""Full fine-tuning: the encoder starts pre-trained and learns whole."""

from __future__ import annotations

from torch import Tensor

from policies.adaptation.base import Adaptation, AdaptationConfig, TrainableEncoder


class FineTuning(Adaptation):
    """One pre-trained encoder, all of it trainable."""

    def __init__(self, config: AdaptationConfig) -> None:
        super().__init__()
        self.network = TrainableEncoder(config.make_encoder())

    def forward(self, image: Tensor, base_features: Tensor | None = None) -> Tensor:
        """The encoder's features, see :meth:`Adaptation.forward`."""
        return self.network(image)

    def base_features(self, image: Tensor) -> None:
        """Nothing: every feature changes as the encoder learns."""
        return None

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the encoder's features."""
        return self.network.encoder.output_shape(height, width)
