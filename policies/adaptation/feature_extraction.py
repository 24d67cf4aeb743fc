"""Feature extraction: the frozen encoder as it is; only what follows learns."""

from __future__ import annotations

from torch import Tensor

from policies.adaptation.base import Adaptation, AdaptationConfig, FrozenEncoder


class FeatureExtraction(Adaptation):
    """The frozen base alone."""

    def __init__(self, config: AdaptationConfig) -> None:
        super().__init__()
        self.base = FrozenEncoder(config.make_encoder())

    def forward(self, image: Tensor, base_features: Tensor | None = None) -> Tensor:
        """The base's features, see :meth:`Adaptation.forward`."""
        return self.base(image) if base_features is None else base_features

    def base_features(self, image: Tensor) -> Tensor:
        """The frozen base's features."""
        return self.base(image)

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the base's features."""
        return self.base.encoder.output_shape(height, width)
