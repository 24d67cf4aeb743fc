"""Videos of episodes: what the agent saw, beside the map of where it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from envs.files import atomic_write

FRAMES_PER_SECOND = 10
CODEC = "vp09"
"""VP9: OpenCV's wheels can encode it, and browsers play it."""
SUFFIX = ".mp4"
MAX_DEPTH = 10.0
"""Depth [m] at which pictures of depth reach their farthest colour."""

_GAP, _MARGIN, _BAR = 12, 14, 46
_PAPER, _INK = (255, 255, 255), (28, 32, 44)
_GOOD, _BAD = (38, 132, 84), (190, 60, 52)


def depth_picture(depth: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Depth (H, W) [m] as colours (H, W, 3) RGB, near bright, far dark; grey where nothing was hit."""
    shade = np.clip(1.0 - depth / MAX_DEPTH, 0.0, 1.0)
    colours = cv2.applyColorMap((shade * 225 + 20).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1].copy()
    colours[depth <= 0] = (150, 150, 150)
    return colours


def fitted(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The picture scaled to fit (height, width), its shape kept, centred on paper."""
    scale = min(height / image.shape[0], width / image.shape[1])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small = cv2.resize(image, size, interpolation=method)
    canvas = np.full((height, width, 3), _PAPER, dtype=np.uint8)
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    canvas[top : top + size[1], left : left + size[0]] = small
    return canvas


def frame(
    panels: Iterable[tuple[str, NDArray[np.uint8]]],
    caption: str,
    verdict: str = "",
    success: bool = False,
    size: int = 360,
) -> NDArray[np.uint8]:
    """One frame: labelled panels side by side over a line of text.

    Args:
        panels: label and picture (H, W, 3) uint8 RGB of each panel.
        caption: what is going on.
        verdict: how it ended, at the right.
        success: colours the verdict.
        size: height and width of a panel [pixels].

    Returns:
        (size + bar, width, 3) uint8 RGB, both sides even as video codecs want them.
    """
    pictures = []
    for label, picture in panels:
        panel = fitted(picture, size, size)
        if label:
            (length, height), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_DUPLEX, 0.42, 1)
            corner = panel[8 : 8 + height + 12, 8 : 8 + length + 14]
            corner[:] = (corner * 0.35).astype(np.uint8)
            _text(panel, label, (15, 8 + height + 6), 0.42, (255, 255, 255))
        pictures.append(panel)
    width = _MARGIN * 2 + len(pictures) * size + (len(pictures) - 1) * _GAP
    canvas = np.full((_MARGIN + size + _BAR, width, 3), _PAPER, dtype=np.uint8)
    for index, panel in enumerate(pictures):
        left = _MARGIN + index * (size + _GAP)
        canvas[_MARGIN : _MARGIN + size, left : left + size] = panel
    baseline = _MARGIN + size + 29
    _text(canvas, caption, (_MARGIN, baseline), 0.5, _INK)
    if verdict:
        (length, _), _ = cv2.getTextSize(verdict, cv2.FONT_HERSHEY_DUPLEX, 0.55, 1)
        _text(canvas, verdict, (width - _MARGIN - length, baseline), 0.55, _GOOD if success else _BAD)
    return canvas[: canvas.shape[0] // 2 * 2, : canvas.shape[1] // 2 * 2]


def _text(
    canvas: NDArray[np.uint8], text: str, at: tuple[int, int], scale: float, colour: tuple[int, int, int]
) -> None:
    # OpenCV's fonts know ASCII alone.
    plain = text.encode("ascii", "replace").decode()
    cv2.putText(canvas, plain, at, cv2.FONT_HERSHEY_DUPLEX, scale, colour, 1, cv2.LINE_AA)


def write_video(
    frames: Iterable[NDArray[np.uint8]], path: str | Path, frames_per_second: int = FRAMES_PER_SECOND
) -> None:
    """Writes frames (H, W, 3) uint8 RGB, all of one even size, as VP9 in an .mp4 that browsers play.

    Raises:
        ValueError: there are no frames, or their sizes differ or are odd.
        OSError: OpenCV on this machine cannot encode VP9.
    """
    iterator: Iterator[NDArray[np.uint8]] = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"{path}: a video needs at least one frame")
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise ValueError(f"{path}: frames of {height}x{width} pixels; both sides must be even")
    with atomic_write(path) as temporary:
        code = cv2.VideoWriter.fourcc(*CODEC)
        writer = cv2.VideoWriter(str(temporary), cv2.CAP_FFMPEG, code, frames_per_second, (width, height))
        if not writer.isOpened():
            raise OSError(
                f"{path}: this OpenCV ({cv2.__version__}) cannot encode VP9; "
                "the wheel opencv-python-headless from PyPI can"
            )
        try:
            image: NDArray[np.uint8] | None = first
            while image is not None:
                if image.shape != first.shape:
                    raise ValueError(f"{path}: a frame of shape {image.shape} after {first.shape}")
                writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
                image = next(iterator, None)
        finally:
            writer.release()
