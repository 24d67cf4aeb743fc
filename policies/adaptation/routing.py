"""Discrete decisions that learn by gradient descent, and the network that takes them from an image.

Forward, a decision is hard: 0 or 1 exactly. Backward, it is the soft one beneath it, drawn with the same
noise: the straight-through Gumbel-Softmax (Jang et al., ICLR 2017, arXiv:1611.01144; Maddison et al., ICLR
2017, arXiv:1611.00712).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPSILON = 1e-20
"""Keeps both logarithms of a Gumbel draw finite, as in SpotTune's released code."""

PolicyNorm = Literal["group", "batch"]


def gumbel(uniform: Tensor) -> Tensor:
    """Draws of the standard Gumbel distribution from draws of the uniform one in 0..1, of any shape."""
    return -torch.log(-torch.log(uniform + _EPSILON) + _EPSILON)


def choose_path(logits: Tensor, temperature: float, noise: Tensor | None = None) -> Tensor:
    """Decides between two paths, several times for each image.

    Args:
        logits: (..., 2), of path 0 and path 1.
        temperature: of the softmax whose gradient is used; high ones share it more evenly.
        noise: Gumbel draws (..., 2), with which path 1 is drawn with its softmax probability; None decides
            for the likelier one.

    Returns:
        (...) float32: 1 for path 1 and 0 for path 0, with the gradient of the softmax.
    """
    scores = logits.float() if noise is None else logits.float() + noise
    soft = torch.softmax(scores / temperature, dim=-1)[..., 1]
    # Equal scores give path 0, the first.
    hard = (scores[..., 1] > scores[..., 0]).float()
    return _straight_through(hard, soft)


def choose_subset(logits: Tensor, count: int, temperature: float, noise: Tensor | None = None) -> Tensor:
    """Decides for exactly ``count`` of L things.

    Forward, it takes those of the highest scores: with Gumbel noise a draw without replacement (Kool et al.,
    ICML 2019, arXiv:1903.06059). Backward, it is the relaxed draw of Xie and Ermon (IJCAI 2019,
    arXiv:1901.10517), a sum of ``count`` softmaxes, each with what the ones before took made less likely.
    For ``count`` 1 this is the straight-through Gumbel-Softmax.

    Args:
        logits: (L,).
        count: 1..L.
        temperature: of the softmaxes.
        noise: Gumbel draws (L,), or None for the likeliest.

    Returns:
        (L,) float32: 1 for ``count`` of them and 0 for the rest, with the gradient of the relaxed draw.
    """
    scores = logits.float() if noise is None else logits.float() + noise
    # A stable sort, so that equal scores give one answer on every machine: the first.
    chosen = torch.argsort(scores.detach(), descending=True, stable=True)[:count]
    hard = torch.zeros_like(scores).index_fill(0, chosen, 1.0)
    left, soft = scores / temperature, torch.zeros_like(scores)
    for _ in range(count):
        drawn = torch.softmax(left, dim=0)
        soft = soft + drawn
        left = left + torch.log((1 - drawn).clamp_min(torch.finfo(drawn.dtype).tiny))
    return _straight_through(hard, soft)


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    # The difference is exactly 0. Adding to `soft` what it lacks would leave 0.99999994 for some ones, and
    # the other path would leak in.
    return hard + (soft - soft.detach())


class PolicyNetwork(nn.Module):
    """The small residual network that routes: one block in each of three stages, from the image itself.

    Its design is that of SpotTune's released code, with a first convolution of ``width`` channels and stages
    of 2, 4 and 8 times as many. The released one has width 32 and takes images of 64 to 72 pixels.

    Args:
        channels: of the image.
        decisions: how many to take.
        width: channels of the first convolution.
        size: images of more rows or columns are averaged down to this many.
        norm: "batch" is the released code's BatchNorm. With it, decisions in training depend on what else is
            in the batch, and are not those of evaluation; with "group" (one group) they are the same.
    """

    def __init__(self, channels: int, decisions: int, width: int, size: int, norm: PolicyNorm) -> None:
        super().__init__()
        self.decisions = decisions
        self.size = size
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.norm = _norm(norm, width)
        self.blocks = nn.Sequential(*(_PolicyBlock(width << stage, norm) for stage in range(3)))
        self.last_norm = _norm(norm, 8 * width)
        self.linear = nn.Linear(8 * width, 2 * decisions)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, decisions, 2) of preprocessed images (N, C, H, W)."""
        rows, columns = (min(side, self.size) for side in x.shape[2:])
        if (rows, columns) != tuple(x.shape[2:]):
            x = F.adaptive_avg_pool2d(x, (rows, columns))
        # No ReLU after the first convolution, as in the released code.
        x = self.blocks(self.norm(self.conv(x)))
        x = F.relu(self.last_norm(x)).mean(dim=(2, 3))
        return self.linear(x).unflatten(1, (self.decisions, 2))


class _PolicyBlock(nn.Module):
    """Halves rows and columns and doubles channels; the shortcut averages, and adds channels of zeros."""

    def __init__(self, inputs: int, norm: PolicyNorm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, 2 * inputs, 3, 2, 1, bias=False)
        self.norm1 = _norm(norm, 2 * inputs)
        self.conv2 = nn.Conv2d(2 * inputs, 2 * inputs, 3, 1, 1, bias=False)
        self.norm2 = _norm(norm, 2 * inputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        # Rounded up as the convolution does, which for even sizes changes nothing.
        shortcut = F.avg_pool2d(x, 2, ceil_mode=True)
        return F.relu(y + torch.cat((shortcut, torch.zeros_like(shortcut)), dim=1))


def _norm(kind: PolicyNorm, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(1, channels)
