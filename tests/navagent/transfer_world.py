"""Frames for transfer in which the image tells the geometry, without any rendering."""

import torch

from navagent.learning.frames import Frames
from navagent.learning.perception import TASKS


def tilted_walls(view, split, num_frames, seed):
    """Walls whose brightness says how far they are turned away, and whose colour how far off they are."""
    generator = torch.Generator().manual_seed(seed + (split == "val"))
    size = (view.height, view.width)
    turned, far = torch.rand(2, num_frames, 1, 1, generator=generator).expand(-1, -1, *size)
    slope = torch.linspace(0.8, 1.2, view.width)
    angle = turned * slope * 1.2
    normals = torch.stack((angle.sin(), torch.zeros_like(angle), angle.cos()), dim=3)
    image = torch.stack((turned * slope, far * slope.flip(0), 0.5 * (turned + far)), dim=3)
    depth = 0.5 + 6 * far
    targets = {task: TASKS[task].target(depth, normals, view.hfov_deg).half() for task in view.tasks}
    return Frames((image.clamp(0, 1) * 255).to(torch.uint8), targets)
