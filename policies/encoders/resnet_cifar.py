"""ResNet-44 for CIFAR-10 (He et al., arXiv:1512.03385, section 4.2) without its classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.encoders.base import BlockEncoder, InputSpec
from policies.encoders.fcn import CIFAR_MEAN, CIFAR_STD


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.extra = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        # Shortcut without parameters ("option A"): every other pixel, new channels zero on both sides.
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(x + y)


def _stage(inputs: int, outputs: int, stride: int, blocks: int = 7) -> nn.Sequential:
    return nn.Sequential(
        _BasicBlock(inputs, outputs, stride),
        *(_BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)),
    )


class ResNet44(BlockEncoder):
    """Three stages of seven residual blocks and a global average: (N, C, 32, 32) to (N, 64)."""

    def __init__(self, channels: int = 3) -> None:
        colour = channels == 3
        super().__init__(
            InputSpec(channels, (32, 32), CIFAR_MEAN if colour else (0.5,), CIFAR_STD if colour else (0.5,))
        )
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1)
        self.layer2 = _stage(16, 32, 2)
        self.layer3 = _stage(32, 64, 2)

    @property
    def blocks(self) -> list[nn.Module]:
        """The 21 residual blocks."""
        return [*self.layer1, *self.layer2, *self.layer3]

    def stem(self, x: Tensor) -> Tensor:
        """First convolution: (N, C, 32, 32) to (N, 16, 32, 32)."""
        return F.relu(self.bn1(self.conv1(x)))

    def neck(self, x: Tensor) -> Tensor:
        """Global average: (N, 64, 8, 8) to (N, 64)."""
        return torch.mean(x, dim=(2, 3))
