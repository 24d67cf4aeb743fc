"""A residual network of the Taskonomy encoder's design at a size for reinforcement learning on a CPU.

The parts are those of Taskonomy's ResNet-50 (Zamir et al., CVPR 2018, arXiv:1804.08328): a strided stem,
residual blocks whose shortcut has no weights and drops pixels where the block is strided, and a convolution
that compresses the result to eight channels. It differs where its use does: GroupNorm takes the place of
BatchNorm, because the network that acts and the one that learns have to be the same, and blocks have two
3x3 convolutions as in the shallow networks of He et al. (arXiv:1512.03385), which take less time on a CPU
than three in a bottleneck of the same number of multiplications.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from policies.encoders.base import BlockEncoder, InputSpec

_WIDTH = 32
_GROUPS = 2


class _Block(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(_WIDTH, _WIDTH, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(_GROUPS, _WIDTH)
        self.conv2 = nn.Conv2d(_WIDTH, _WIDTH, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(_GROUPS, _WIDTH)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(x[:, :, :: self.stride, :: self.stride] + y)


class ResNetSmall(BlockEncoder):
    """A stem, seven residual blocks and a compressing neck: (N, C, 64, 64) to (N, 8, 8, 8).

    Images are taken as they come; features have an eighth of their rows and columns, rounded up. The closing
    GroupNorm puts features on the scale of ``fcn5_small``'s.

    Args:
        channels: 3 for colour, 1 for depth.
    """

    output_layers = ("groupnorm",)

    def __init__(self, channels: int = 3) -> None:
        super().__init__(InputSpec(channels))
        self.conv1 = nn.Conv2d(channels, _WIDTH, 7, 4, 3, bias=False)
        self.norm1 = nn.GroupNorm(_GROUPS, _WIDTH)
        self.layers = nn.Sequential(_Block(2), *(_Block(1) for _ in range(6)))
        self.compress1 = nn.Conv2d(_WIDTH, 8, 3, 1, 1, bias=False)
        self.groupnorm = nn.GroupNorm(_GROUPS, 8)

    @property
    def blocks(self) -> list[nn.Module]:
        """The seven residual blocks; the first halves rows and columns."""
        return list(self.layers)

    def stem(self, x: Tensor) -> Tensor:
        """First convolution: (N, C, H, W) to (N, 32, H/4, W/4)."""
        return F.relu(self.norm1(self.conv1(x)))

    def neck(self, x: Tensor) -> Tensor:
        """Compression to eight channels: (N, 32, H/8, W/8) to (N, 8, H/8, W/8)."""
        return self.groupnorm(self.compress1(x))
