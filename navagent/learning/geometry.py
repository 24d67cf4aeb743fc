"""What Taskonomy's geometric tasks (Zamir et al., CVPR 2018, arXiv:1804.08328) ask for, by geometry.

The definitions are those of the pipeline that its authors published to annotate further data (Eftekhar et
al., ICCV 2021, arXiv:2110.04994), as far as images hold what they need: it measures curvature on meshes,
which is done here on the surface that an image shows. Where a quantity is not defined, a pixel holds NaN.

All images are batches on one device: depth (N, H, W) along the optical axis [m], 0 where nothing was hit;
normals (N, H, W, 3) unit vectors in the camera's frame, x right, y up, z towards the viewer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LAMP_HALF_LIFE = 8.0
"""Distance at which the light of :func:`reshading` has lost half of its strength [m]."""
MIN_CURVATURE_RADIUS = 0.03
"""Radius of the tightest curve that :func:`principal_curvatures` tells from tighter ones [m]."""
_MAX_BEND = 6.0
_BLUR_RADIUS = 4


def rays(height: int, width: int, hfov_deg: float, device: torch.device | str = "cpu") -> Tensor:
    """Where every pixel looks, (H, W, 3) in the camera's frame, with z = -1: times depth, what it sees."""
    scale = 2 * math.tan(math.radians(hfov_deg) / 2) / width
    right = (torch.arange(width, device=device) + 0.5 - width / 2) * scale
    up = (height / 2 - 0.5 - torch.arange(height, device=device)) * scale
    return torch.stack(
        (*torch.meshgrid(right, up, indexing="xy"), -torch.ones(height, width, device=device)), 2
    )


def reshading(depth: Tensor, normals: Tensor, hfov_deg: float) -> Tensor:
    """How bright a white, matt surface is under a lamp at the camera: (N, H, W) in 0..1.

    The cosine of the angle of incidence, times D^2 / (D^2 + r^2) at distance r from the lamp, with D =
    :data:`LAMP_HALF_LIFE`: the fall-off of Blender's lamps, with which the annotators render.
    """
    ray = rays(depth.shape[1], depth.shape[2], hfov_deg, depth.device)
    length = ray.norm(dim=2)
    cosine = -(normals * ray).sum(3) / length
    fall_off = 1 / (1 + (depth * length / LAMP_HALF_LIFE).square())
    return torch.where(depth > 0, cosine.clamp(0, 1) * fall_off, torch.nan)


def principal_curvatures(depth: Tensor, normals: Tensor, hfov_deg: float) -> Tensor:
    """The two principal curvatures k1 >= k2, of which convex surfaces have positive ones: (N, 2, H, W) [1/m].

    They are the eigenvalues of the shape operator, I^-1 II, with the first and second fundamental forms from
    central differences of position and normal over three pixels. Not defined at the image's border, next to
    where nothing was hit, and where the surface ends in front of another.
    """
    ray = rays(depth.shape[1], depth.shape[2], hfov_deg, depth.device)
    position = (depth[..., None] * ray).movedim(3, 1)
    normal = normals.movedim(3, 1)
    along, down = _central(position, 3), _central(position, 2)
    along_n, down_n = _central(normal, 3), _central(normal, 2)
    first = torch.stack([(a * b).sum(1) for a, b in ((along, along), (along, down), (down, down))])
    second = torch.stack(
        [
            (along * along_n).sum(1),
            ((along * down_n).sum(1) + (down * along_n).sum(1)) / 2,
            (down * down_n).sum(1),
        ]
    )
    area = first[0] * first[2] - first[1].square()
    gauss = (second[0] * second[2] - second[1].square()) / area
    mean = (second[0] * first[2] - 2 * second[1] * first[1] + second[2] * first[0]) / (2 * area)
    spread = (mean.square() - gauss).clamp(min=0).sqrt()
    inside = torch.stack((mean + spread, mean - spread), dim=1)
    pixel = 2 * math.tan(math.radians(hfov_deg) / 2) / depth.shape[2]
    inside = torch.where(_one_surface(depth, pixel)[:, None], inside, torch.nan)
    return F.pad(inside, (1, 1, 1, 1), value=torch.nan)


def occlusion_edges(depth: Tensor) -> Tensor:
    """How much depth jumps: (N, H, W) [sqrt(m) per pixel].

    The magnitude of Sobel's gradient of the square root of depth, after a Gaussian blur of one pixel over
    what was hit. The annotators' values are these divided by sqrt(128), as they count depth in 128 m.
    """
    hit = (depth > 0).to(depth.dtype)[:, None]
    root = depth.sqrt()[:, None]
    smooth = _blur(root * hit) / _blur(hit).clamp(min=1e-6)
    smooth = F.pad(smooth, (1, 1, 1, 1), mode="replicate")
    wide = torch.tensor([1.0, 2.0, 1.0], device=depth.device) / 4
    steep = torch.tensor([-1.0, 0.0, 1.0], device=depth.device) / 2
    kernel = torch.stack((torch.outer(wide, steep), torch.outer(steep, wide)))[:, None]
    gradient = F.conv2d(smooth, kernel)
    # Both directions enter as a mean of squares, as in scikit-image, which the annotators use.
    magnitude = gradient.square().mean(1).sqrt()
    return torch.where(depth > 0, magnitude, torch.nan)


def _central(field: Tensor, dim: int) -> Tensor:
    """Half the difference of the neighbours along ``dim``, of inner pixels: (N, C, H - 2, W - 2)."""
    height, width = field.shape[2] - 2, field.shape[3] - 2
    before = field.narrow(dim, 0, field.shape[dim] - 2)
    after = field.narrow(dim, 2, field.shape[dim] - 2)
    half = (after - before) / 2
    return half[:, :, :, 1 : width + 1] if dim == 2 else half[:, :, 1 : height + 1]


def _one_surface(depth: Tensor, pixel: float) -> Tensor:
    """Whether an inner pixel and its four neighbours show one unbroken surface: (N, H - 2, W - 2) bool.

    Inverse depth is linear over a plane's image, however steep the view. Where surfaces meet at an angle its
    slope changes by a few times itself; where one ends in front of another, the difference of a single pixel
    would need a far greater one.
    """
    inverse = torch.where(depth > 0, 1 / depth, torch.nan)
    centre = inverse[:, 1:-1, 1:-1]
    bends = (
        inverse[:, 1:-1, 2:] + inverse[:, 1:-1, :-2] - 2 * centre,
        inverse[:, 2:, 1:-1] + inverse[:, :-2, 1:-1] - 2 * centre,
    )
    # A comparison with NaN is false, so that pixels beside nothing count as broken.
    smooth = [bend.abs() <= _MAX_BEND * pixel * centre for bend in bends]
    return smooth[0] & smooth[1]


def _blur(image: Tensor) -> Tensor:
    """Gaussian of one pixel's standard deviation over (N, 1, H, W), with zeros outside of the image."""
    offsets = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-offsets.square() / 2)
    kernel = kernel / kernel.sum()
    across = F.conv2d(image, kernel[None, None, None, :], padding=(0, _BLUR_RADIUS))
    return F.conv2d(across, kernel[None, None, :, None], padding=(_BLUR_RADIUS, 0))
