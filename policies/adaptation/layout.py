"""Maps (C, h, w), tokens (T, D) and vectors (C,) alike: their channels, and layers of these alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.encoders.base import Encoder, device_of

PROBE = (224, 224)
"""Rows and columns of the image by which a network is looked at before any image is known: whole patches of
every usual size."""


def probe_image(encoder: Encoder) -> Tensor:
    """An image of zeros (1, H, W, channels) of :data:`PROBE`'s size, on the encoder's device."""
    return torch.zeros(1, *PROBE, encoder.input_spec.channels, device=device_of(encoder))


def feature_channels(shape: Sequence[int]) -> int:
    """Channels of one image's features of shape (C, h, w), (T, D) or (C,)."""
    return shape[1] if len(shape) == 2 else shape[0]


def pointwise(shape: Sequence[int], inputs: int, outputs: int, bias: bool = True) -> nn.Linear | nn.Conv2d:
    """A linear layer of the channels of tokens (T, D) or maps (C, h, w), whichever the shape is of."""
    if len(shape) == 2:
        return nn.Linear(inputs, outputs, bias=bias)
    return nn.Conv2d(inputs, outputs, 1, bias=bias)


class VectorBatchNorm(nn.BatchNorm1d):
    """BatchNorm of vectors that takes a batch of one in training too: with the statistics kept so far."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised vectors (N, C) of vectors (N, C)."""
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)
