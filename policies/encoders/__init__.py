"""Perception encoders by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from policies.encoders.base import BlockEncoder, Encoder, InputSpec
from policies.encoders.fcn import FCN3, FCN4, FCN5, FCN8, fcn5_small
from policies.encoders.resnet_cifar import ResNet44
from policies.encoders.resnet_small import ResNetSmall
from policies.encoders.taskonomy import TASKONOMY_ENCODERS
from policies.encoders.vit import VISION_TRANSFORMERS
from policies.weights import read_weights

__all__ = ["ENCODERS", "BlockEncoder", "Encoder", "InputSpec", "default_weights", "make_encoder"]

ENCODERS: dict[str, Callable[[int], Encoder]] = {
    "fcn3": FCN3,
    "fcn4": FCN4,
    "fcn5": FCN5,
    "fcn5_small": fcn5_small,
    "fcn8": FCN8,
    "resnet44": ResNet44,
    "resnet_small": ResNetSmall,
    **TASKONOMY_ENCODERS,
    **VISION_TRANSFORMERS,
}
"""Encoders by the name that selects them; each is called with the number of input channels."""

_SHIPPED = {
    ("fcn5_small", 3): "fcn5_small-normals-rgb.safetensors",
    ("fcn5_small", 1): "fcn5_small-normals-depth.safetensors",
    ("resnet_small", 3): "resnet_small-normals-rgb.safetensors",
}


def default_weights(name: str, channels: int = 3) -> Path:
    """The pre-trained weights that ship in the package for an encoder.

    Raises:
        ValueError: if none ship for this encoder and input.
    """
    file = _SHIPPED.get((name, channels))
    if file is None:
        raise ValueError(
            f"no default weights ship for encoder {name!r} with {channels} input channel(s); give the path "
            "of a weights file, or 'random'"
        )
    return Path(__file__).parent / "weights" / file


def make_encoder(name: str, channels: int = 3, weights: str | Path = "default") -> Encoder:
    """Builds an encoder.

    Args:
        name: a key of :data:`ENCODERS`.
        channels: 3 for colour, 1 for depth.
        weights: ``"default"`` for those that ship in the package, ``"random"`` for a fresh Xavier
            initialisation, or the path of a ``.safetensors`` or ``.pth`` file.

    Raises:
        ValueError: for an unknown name, or weights that are unreadable or do not fit.
    """
    if name not in ENCODERS:
        near = difflib.get_close_matches(name, ENCODERS, 1, 0)
        raise ValueError(f"unknown encoder {name!r}; did you mean {near[0]!r}? Known: {', '.join(ENCODERS)}")
    encoder = ENCODERS[name](channels)
    encoder.name = name
    if str(weights) == "random":
        encoder.initialise()
        return encoder
    path = default_weights(name, channels) if str(weights) == "default" else Path(weights)
    encoder.load_tensors(read_weights(path).tensors, str(path))
    return encoder
