"""The interface of every method that adapts a perception encoder, and the frozen network they start from."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from policies.encoders import Encoder, make_encoder


@dataclass(frozen=True)
class AdaptationConfig:
    """Which encoder a method adapts. Each method extends this with its own settings."""

    encoder: str = "fcn5_small"
    """Name of the encoder, see :data:`policies.encoders.ENCODERS`."""
    weights: str = "default"
    """Pre-trained weights: "default", "random", or the path of a file."""
    channels: int = 3
    """Input channels: 3 for colour, 1 for depth."""

    def make_encoder(self) -> Encoder:
        """The encoder with its pre-trained weights."""
        return make_encoder(self.encoder, self.channels, self.weights)


class FrozenEncoder(nn.Module):
    """An encoder that nothing can train: always in evaluation mode, its weights no parameters.

    The weights become buffers. So ``requires_grad_(True)`` or ``train()`` on a module around this one cannot
    thaw it, and an optimiser over ``parameters()`` never sees them, while ``state_dict`` still holds them.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).eval()
        for module in self.encoder.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach().clone())
        super().train(False)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stays in evaluation mode whatever is asked."""
        return self

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Features (N, C, h, w) or (N, C), float32, of images (N, H, W, channels) as sensors give them."""
        return self.encoder(self.encoder.preprocess(image)).float()


class TrainableEncoder(nn.Module):
    """An encoder that learns, on images as sensors give them.

    Args:
        encoder: the network.
        keep_statistics: whether BatchNorm layers keep the statistics they were pre-trained with. Without
            it, the network that learns would differ from the one that acted, and PPO's ratio would not start
            at 1.
    """

    def __init__(self, encoder: Encoder, keep_statistics: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self._keep_statistics = keep_statistics

    def train(self, mode: bool = True) -> TrainableEncoder:
        """Sets the mode of all layers but pre-trained BatchNorm ones."""
        super().train(mode)
        if self._keep_statistics:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Features (N, C, h, w) or (N, C) of images (N, H, W, channels)."""
        return self.encoder(self.encoder.preprocess(image))


class Adaptation(nn.Module, ABC):
    """From images to features that suit the task, by one method."""

    config_class: ClassVar[type[AdaptationConfig]] = AdaptationConfig

    @abstractmethod
    def forward(self, image: Tensor, base_features: Tensor | None = None) -> Tensor:
        """Adapted features.

        Args:
            image: (N, H, W, C) uint8, or float with values in 0..1.
            base_features: what :meth:`base_features` gave for these images, to not compute it again.

        Returns:
            (N, C, h, w) or (N, C).
        """

    @abstractmethod
    def base_features(self, image: Tensor) -> Tensor | None:
        """What never changes for an image and so can be stored: float32, or None where nothing can be."""

    @abstractmethod
    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one image's adapted features for images of height x width pixels."""

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that learning changes."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups of the trainable parameters; methods exempt from decay what it would distort."""
        return [{"params": list(self.trainable_parameters()), "weight_decay": weight_decay}]


class WholeEncoder(Adaptation):
    """What fine-tuning and training from scratch share: one encoder, all of which learns."""

    network: TrainableEncoder

    def forward(self, image: Tensor, base_features: Tensor | None = None) -> Tensor:
        """The encoder's features, see :meth:`Adaptation.forward`."""
        return self.network(image)

    def base_features(self, image: Tensor) -> None:
        """Nothing: every feature changes as the encoder learns."""
        return None

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the encoder's features."""
        return self.network.encoder.output_shape(height, width)
