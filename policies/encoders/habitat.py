"""The encoders of habitat-baselines' PointNav agents, which are trained with the policy from random weights.

Both give what the policy's head turns into a vector: with it they have the layers and sizes of ``SimpleCNN``
(the encoder of ``PointNavBaselinePolicy``; the layers of Mnih et al., Nature 2015, with 32 channels at the
end) and of ``ResNetEncoder`` with the backbone "resnet18" (of ``PointNavResNetPolicy``; Wijmans et al., ICLR
2020, arXiv:1911.00357). There each has one network for all images together; here every image has its own.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from policies.encoders.base import BlockEncoder, Encoder, InputSpec

BASE_PLANES = 32
"""Channels of ResNet-18's first layers, half of those in He et al."""


class SimpleCNN(Encoder):
    """Three convolutions: (N, C, 64, 64) to (N, 512), the values of a map of 32 channels.

    Images of H x W pixels give 32 h w values; 36 x 36 is the least. The policy's head adds the linear layer
    and ReLU that end the published network.

    Args:
        channels: 3 for colour, 1 for depth.
    """

    output_layers = ("conv3",)

    def __init__(self, channels: int = 3) -> None:
        super().__init__(InputSpec(channels, mean=(0.0,), std=(1.0,)))
        self.conv1 = nn.Conv2d(channels, 32, 8, 4)
        self.conv2 = nn.Conv2d(32, 64, 4, 2)
        self.conv3 = nn.Conv2d(64, 32, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features of preprocessed images (N, C, H, W)."""
        # As published, no ReLU follows the last convolution.
        return self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))).flatten(1)


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        groups = BASE_PLANES // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.downsample: nn.Module = nn.Identity()
        if inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(groups, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class ResNet18(BlockEncoder):
    """Eight residual blocks with GroupNorm behind a 2x2 average: (N, C, 64, 64) to (N, 256, 1, 1).

    Features have a 64th of the images' rows and columns, rounded up. The policy's head adds the layer that
    compresses the map, and the linear layer and ReLU that end the published network. Depth is taken as it
    comes. Where there is colour, Habitat normalises images by their running mean and variance; here, by
    constants, so that the network that learns is the one that acted.

    Args:
        channels: 3 for colour, 1 for depth.
    """

    def __init__(self, channels: int = 3) -> None:
        colour = channels == 3
        super().__init__(InputSpec(channels, mean=(0.5 if colour else 0.0,), std=(0.5 if colour else 1.0,)))
        self.conv1 = nn.Conv2d(channels, BASE_PLANES, 7, 2, 3, bias=False)
        self.norm1 = nn.GroupNorm(BASE_PLANES // 2, BASE_PLANES)
        widths = [BASE_PLANES * 2**stage for stage in range(4)]
        self.layers = nn.Sequential()
        inputs = BASE_PLANES
        for stage, outputs in enumerate(widths):
            self.layers.append(_BasicBlock(inputs, outputs, 1 if stage == 0 else 2))
            self.layers.append(_BasicBlock(outputs, outputs, 1))
            inputs = outputs

    @property
    def blocks(self) -> list[nn.Module]:
        """The eight residual blocks; the third, fifth and seventh halve rows and columns."""
        return list(self.layers)

    def stem(self, x: Tensor) -> Tensor:
        """Average, first convolution and maximum: (N, C, H, W) to (N, 32, H/8, W/8)."""
        return F.max_pool2d(F.relu(self.norm1(self.conv1(F.avg_pool2d(x, 2)))), 3, 2, 1)

    def neck(self, x: Tensor) -> Tensor:
        """What the last block gives, as it is: (N, 256, H/64, W/64)."""
        return x
