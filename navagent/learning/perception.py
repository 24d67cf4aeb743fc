"""Taskonomy-style perception tasks, by name: what each asks for, how it is learned, and how it is judged."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from navagent.learning.geometry import (
    MIN_CURVATURE_RADIUS,
    occlusion_edges,
    principal_curvatures,
    reshading,
)

MAX_DEPTH = 10.0
"""Depth images are clipped and divided by this [m], as the depth sensor of the task is."""
THRESHOLDS_DEG = (11.25, 22.5, 30.0)
"""Angular errors under which the share of pixels is told, as the literature does."""

Render = Literal["depth", "normals"]


class PerceptionTask(ABC):
    """What an image is to be turned into, pixel by pixel; NaN where there is nothing to predict."""

    channels: ClassVar[int]
    """Values of a pixel."""
    needs: ClassVar[tuple[Render, ...]]
    """What has to be rendered for it."""
    measure: ClassVar[str]
    """The measure that counts, one of those that :meth:`summary` gives; less is better."""
    unit: ClassVar[str]
    """Its unit."""
    squared: ClassVar[bool] = False
    """Whether the loss is the mean squared error; else it is the mean absolute one."""
    mirrored: ClassVar[tuple[int, ...]] = ()
    """Channels that change their sign when the image is mirrored."""

    @abstractmethod
    def target(self, depth: Tensor | None, normals: Tensor | None, hfov_deg: float) -> Tensor:
        """Ground truth (N, C, H, W).

        Args:
            depth: (N, H, W) [m]; None where :attr:`needs` does not name it.
            normals: (N, H, W, 3); None where :attr:`needs` does not name them.
            hfov_deg: horizontal field of view [deg].
        """

    @abstractmethod
    def errors(self, guess: Tensor, target: Tensor) -> Tensor:
        """What :meth:`summary` needs of predicted and true pixels, both (P, C): (P, ...)."""

    @abstractmethod
    def summary(self, errors: Tensor) -> dict[str, float]:
        """Measures by name, over the errors of all pixels."""

    @abstractmethod
    def colours(self, values: Tensor) -> Tensor:
        """Values (N, C, H, W) as colours in 0..1, (N, 3, H, W)."""

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean error of what was predicted, (N, C, H, W), over the pixels with a target: ()."""
        valid = target.isfinite().all(dim=1, keepdim=True)
        gap = prediction - target.nan_to_num()
        gap = gap.square() if self.squared else gap.abs()
        return (gap * valid).sum() / (valid.sum() * target.shape[1]).clamp(min=1)

    def mirror(self, target: Tensor) -> Tensor:
        """The target (N, C, H, W) of the mirrored images."""
        target = target.flip(3)
        for channel in self.mirrored:
            target[:, channel] *= -1
        return target

    def pixel_errors(self, guess: Tensor, target: Tensor) -> Tensor:
        """:meth:`errors` of the pixels of images (N, C, H, W) that have a target."""
        valid = target.isfinite().all(dim=1)
        return self.errors(guess.movedim(1, 3)[valid], target.movedim(1, 3)[valid])

    def pictures(self, values: Tensor) -> NDArray[np.uint8]:
        """Values (N, C, H, W) as colours (N, H, W, 3); black where there is no value."""
        valid = values.isfinite().all(dim=1, keepdim=True)
        shown = self.colours(values.nan_to_num()).clamp(0, 1) * valid
        return (shown * 255).byte().movedim(1, 3).numpy()


class Normals(PerceptionTask):
    """Unit normals of surfaces in the camera's frame (Taskonomy's normal)."""

    channels = 3
    needs = ("normals",)
    measure = "mean_deg"
    unit = "deg"
    mirrored = (0,)

    def target(self, depth: Tensor | None, normals: Tensor | None, hfov_deg: float) -> Tensor:
        """Normals (N, 3, H, W)."""
        assert normals is not None
        target = normals.movedim(3, 1)
        return torch.where((target != 0).any(dim=1, keepdim=True), target, torch.nan)

    def errors(self, guess: Tensor, target: Tensor) -> Tensor:
        """Angle between the vectors [deg]: (P,)."""
        return torch.rad2deg(torch.arccos(F.cosine_similarity(guess, target, dim=1).clamp(-1, 1)))

    def summary(self, errors: Tensor) -> dict[str, float]:
        """Mean and median angle, and the share of pixels under each of :data:`THRESHOLDS_DEG`."""
        shares = {f"within_{limit}_deg": float((errors < limit).float().mean()) for limit in THRESHOLDS_DEG}
        return {"mean_deg": float(errors.mean()), "median_deg": float(errors.median()), **shares}

    def colours(self, values: Tensor) -> Tensor:
        """Directions as red, green and blue."""
        return F.normalize(values, dim=1) * 0.5 + 0.5


class Depth(PerceptionTask):
    """log(1 + depth [m]) along the optical axis (Taskonomy's depth_zbuffer)."""

    channels = 1
    needs = ("depth",)
    measure = "mean_m"
    unit = "m"

    def target(self, depth: Tensor | None, normals: Tensor | None, hfov_deg: float) -> Tensor:
        """Logarithms (N, 1, H, W)."""
        assert depth is not None
        return torch.where(depth > 0, torch.log1p(depth), torch.nan)[:, None]

    def errors(self, guess: Tensor, target: Tensor) -> Tensor:
        """Predicted and true depth [m]: (P, 2)."""
        return torch.cat((torch.expm1(guess), torch.expm1(target)), dim=1)

    def summary(self, errors: Tensor) -> dict[str, float]:
        """Mean error, its share of the depth, and the share of pixels within a factor of 1.25."""
        guess, truth = errors[:, 0].clamp(min=1e-3), errors[:, 1]
        ratio = torch.maximum(guess / truth, truth / guess)
        return {
            "mean_m": float((guess - truth).abs().mean()),
            "relative": float(((guess - truth).abs() / truth).mean()),
            "within_1.25": float((ratio < 1.25).float().mean()),
        }

    def colours(self, values: Tensor) -> Tensor:
        """The farther, the brighter."""
        return (values / math.log1p(MAX_DEPTH)).expand(-1, 3, -1, -1)


class Reshading(PerceptionTask):
    """Brightness under a lamp at the camera, in 0..1 (Taskonomy's reshading)."""

    channels = 1
    needs = ("depth", "normals")
    measure = "mean_error"
    unit = "of white"

    def target(self, depth: Tensor | None, normals: Tensor | None, hfov_deg: float) -> Tensor:
        """Brightness (N, 1, H, W)."""
        assert depth is not None
        assert normals is not None
        return reshading(depth, normals, hfov_deg)[:, None]

    def errors(self, guess: Tensor, target: Tensor) -> Tensor:
        """Differences: (P, 1)."""
        return guess - target

    def summary(self, errors: Tensor) -> dict[str, float]:
        """Mean absolute error and root of the mean squared error."""
        return {"mean_error": float(errors.abs().mean()), "rmse": float(errors.square().mean().sqrt())}

    def colours(self, values: Tensor) -> Tensor:
        """Shades of grey."""
        return values.expand(-1, 3, -1, -1)


class Curvature(PerceptionTask):
    """Principal curvatures k1 >= k2 times 0.03 m, clipped to -1..1 (Taskonomy's principal_curvature)."""

    channels = 2
    needs = ("depth", "normals")
    measure = "rmse_per_m"
    unit = "1/m"
    # The loss of the side-tuning authors for this task.
    squared = True

    def target(self, depth: Tensor | None, normals: Tensor | None, hfov_deg: float) -> Tensor:
        """Scaled curvatures (N, 2, H, W)."""
        assert depth is not None
        assert normals is not None
        return (principal_curvatures(depth, normals, hfov_deg) * MIN_CURVATURE_RADIUS).clamp(-1, 1)

    def errors(self, guess: Tensor, target: Tensor) -> Tensor:
        """Differences [1/m]: (P, 2)."""
        return (guess - target) / MIN_CURVATURE_RADIUS

    def summary(self, errors: Tensor) -> dict[str, float]:
        """Root of the mean squared error, and mean absolute error."""
        return {
            "rmse_per_m": float(errors.square().mean().sqrt()),
            "mean_per_m": float(errors.abs().mean()),
        }

    def colours(self, values: Tensor) -> Tensor:
        """k1 in red and k2 in green, grey where flat, with a third of the range for all of the contrast."""
        shown = (values * 3).clamp(-1, 1) * 0.5 + 0.5
        return torch.cat((shown, torch.full_like(shown[:, :1], 0.5)), dim=1)


class OcclusionEdges(PerceptionTask):
    """Jumps of depth [sqrt(m) per pixel] (Taskonomy's edge_occlusion)."""

    channels = 1
    needs = ("depth",)
    measure = "mean_error"
    unit = "sqrt(m) per pixel"

    def target(self, depth: Tensor | None, normals: Tensor | None, hfov_deg: float) -> Tensor:
        """Jumps (N, 1, H, W)."""
        assert depth is not None
        return occlusion_edges(depth)[:, None]

    def errors(self, guess: Tensor, target: Tensor) -> Tensor:
        """Differences: (P, 1)."""
        return guess - target

    def summary(self, errors: Tensor) -> dict[str, float]:
        """Mean absolute error and root of the mean squared error."""
        return {"mean_error": float(errors.abs().mean()), "rmse": float(errors.square().mean().sqrt())}

    def colours(self, values: Tensor) -> Tensor:
        """Shades of grey, white from jumps of 0.3 on."""
        return (values / 0.3).expand(-1, 3, -1, -1)


TASKS: dict[str, PerceptionTask] = {
    "normals": Normals(),
    "depth": Depth(),
    "reshading": Reshading(),
    "curvature": Curvature(),
    "edge_occlusion": OcclusionEdges(),
}
"""Tasks by the name that selects them."""
