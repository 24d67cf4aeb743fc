"""Feature extraction: the frozen encoder as it is; only what follows learns."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from policies.adaptation.base import BASE, DEFAULT_TASK, Adaptation, AdaptationConfig, FrozenEncoder
from policies.encoders import Encoder


class FeatureExtraction(Adaptation):
    """The frozen base alone."""

    def __init__(self, config: AdaptationConfig, base: Encoder | None = None) -> None:
        super().__init__(config)
        self.base = FrozenEncoder(base or config.make_encoder())
        self.start_task(DEFAULT_TASK)

    def make_adapter(self) -> nn.Module:
        """Nothing that learns."""
        return nn.Module()

    def forward(self, image: Tensor, base_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """The base's features, see :meth:`Adaptation.forward`."""
        return self.base(image) if base_features is None else base_features[BASE]

    def base_features(self, image: Tensor) -> dict[str, Tensor]:
        """The frozen base's features."""
        return {BASE: self.base(image)}

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the base's features."""
        return self.base.encoder.output_shape(height, width)
