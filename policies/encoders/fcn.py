"""The small fully convolutional encoders of side-tuning (Zhang et al., ECCV 2020, arXiv:1912.13503).

Parameter names follow the published checkpoints, so these load unchanged. All convolutions are without bias;
GroupNorm has two groups.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from policies.encoders.base import Encoder, InputSpec

CIFAR_MEAN = (0.485, 0.456, 0.406)
"""Colour mean that the authors' CIFAR networks were trained with."""
CIFAR_STD = (0.229, 0.224, 0.225)
"""Colour deviation that the authors' CIFAR networks were trained with."""


def _block(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 0, norm: bool = True
) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)]
    if norm:
        layers.append(nn.GroupNorm(2, outputs))
    return nn.Sequential(*layers, nn.ReLU())


class FCN3(Encoder):
    """Three layers: (N, C, 256, 256) to (N, 8, 16, 16) as published, (N, C, 32, 32) to (N, 8, 2, 2).

    Args:
        channels: 3 for colour, 1 for depth.
        size: rows and columns to which images are resized; None takes them as they come.
    """

    output_layers = ("conv3.0",)

    def __init__(self, channels: int = 3, size: tuple[int, int] | None = (256, 256)) -> None:
        super().__init__(InputSpec(channels, size))
        self.conv1 = _block(channels, 64, kernel=8, stride=4, padding=1)
        self.conv2 = _block(64, 256, stride=2, padding=2)
        self.conv3 = _block(256, 8, stride=2, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features of preprocessed images (N, C, H, W)."""
        return self.conv3(self.conv2(self.conv1(x)))


class FCN4(Encoder):
    """Four layers and a global average, for CIFAR: (N, C, 32, 32) to (N, 64)."""

    output_layers = ("conv5.0",)

    def __init__(self, channels: int = 3) -> None:
        colour = channels == 3
        super().__init__(
            InputSpec(channels, (32, 32), CIFAR_MEAN if colour else (0.5,), CIFAR_STD if colour else (0.5,))
        )
        self.conv1 = _block(channels, 16, padding=1)
        self.conv2 = _block(16, 16, stride=2)
        self.conv3 = _block(16, 32, stride=2)
        # The authors' fourth layer is named conv5.
        self.conv5 = _block(32, 64, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features of preprocessed images (N, C, H, W)."""
        return self.conv5(self.conv3(self.conv2(self.conv1(x)))).mean(dim=(2, 3))


class FCN5(Encoder):
    """Five layers and a skip connection from the second: (N, C, 256, 256) to (N, 8, 16, 16) as published,
    (N, C, 32, 32) to (N, 8, 2, 2).

    Args:
        channels: 3 for colour, 1 for depth.
        widths: output channels of the first four layers.
        stride3: stride of the third layer and of the skip connection beside it.
        size: rows and columns to which images are resized; None takes them as they come.
        normalise_outputs: whether a GroupNorm of two groups follows the sum.
    """

    def __init__(
        self,
        channels: int = 3,
        widths: tuple[int, int, int, int] = (64, 256, 256, 64),
        stride3: int = 2,
        size: tuple[int, int] | None = (256, 256),
        normalise_outputs: bool = False,
    ) -> None:
        super().__init__(InputSpec(channels, size))
        first, second, third, fourth = widths
        self.conv1 = _block(channels, first, kernel=8, stride=4, padding=2)
        self.conv2 = _block(first, second, stride=2, padding=1)
        self.conv3 = _block(second, third, stride=stride3, padding=1)
        self.conv4 = _block(third, fourth, padding=1)
        self.conv5 = _block(fourth, 8, padding=1)
        self.skip = _block(second, 8, stride=stride3, padding=1)
        self.output_layers = ("groupnorm",) if normalise_outputs else ("conv5.1", "skip.1")
        self.groupnorm = nn.GroupNorm(2, 8) if normalise_outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Features of preprocessed images (N, C, H, W)."""
        early = self.conv2(self.conv1(x))
        return self.groupnorm(self.conv5(self.conv4(self.conv3(early))) + self.skip(early))


def fcn5_small(channels: int = 3) -> FCN5:
    """FCN5's design at a size for reinforcement learning on a CPU: (N, C, 64, 64) to (N, 8, 8, 8)."""
    return FCN5(channels, widths=(32, 64, 64, 32), stride3=1, size=None, normalise_outputs=True)


class FCN8(Encoder):
    """Eight layers and three skip connections: (N, C, 256, 256) to (N, 8, 16, 16) as published,
    (N, C, 32, 32) to (N, 8, 2, 2).

    Args:
        channels: 3 for colour, 1 for depth.
        size: rows and columns to which images are resized; None takes them as they come.
    """

    output_layers = ("conv8.1", "skip3.1")

    def __init__(self, channels: int = 3, size: tuple[int, int] | None = (256, 256)) -> None:
        super().__init__(InputSpec(channels, size))
        self.conv1 = _block(channels, 64, kernel=8, stride=4, padding=2)
        self.conv2 = _block(64, 128, stride=2, padding=1)
        self.conv3 = _block(128, 256, stride=2, padding=1)
        self.conv4 = _block(256, 256, padding=1)
        self.conv5 = _block(256, 256, padding=1)
        self.conv6 = _block(256, 256, padding=1)
        self.conv7 = _block(256, 128, padding=1)
        self.conv8 = _block(128, 8, padding=1)
        self.skip1 = _block(128, 256, stride=2, padding=1)
        self.skip2 = _block(256, 256, padding=1)
        self.skip3 = _block(256, 8, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features of preprocessed images (N, C, H, W)."""
        x = self.conv2(self.conv1(x))
        x = self.conv4(self.conv3(x)) + self.skip1(x)
        x = self.conv6(self.conv5(x)) + self.skip2(x)
        return self.conv8(self.conv7(x)) + self.skip3(x)


SMALL_IMAGE_FCNS: dict[str, Callable[[int], Encoder]] = {
    "fcn3_cifar": partial(FCN3, size=(32, 32)),
    "fcn5_cifar": partial(FCN5, size=(32, 32)),
    "fcn8_cifar": partial(FCN8, size=(32, 32)),
}
"""The encoders for images of 256 x 256 pixels, for images of 32 x 32 without enlarging these. The authors
used only FCN4 at this size."""
