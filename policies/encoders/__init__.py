"""Perception encoders by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from policies.catalogue import catalogue, catalogue_path, default_entry, find_entry
from policies.encoders.base import BlockEncoder, Encoder, InputSpec
from policies.encoders.fcn import FCN3, FCN4, FCN5, FCN8, SMALL_IMAGE_FCNS, fcn5_small
from policies.encoders.habitat import ResNet18, SimpleCNN
from policies.encoders.resnet_cifar import ResNet44
from policies.encoders.resnet_small import ResNetSmall
from policies.encoders.taskonomy import TASKONOMY_ENCODERS, TaskonomySet
from policies.encoders.vit import VISION_TRANSFORMERS
from policies.encoders.wrap import wrap_encoder
from policies.names import nearest
from policies.weights import read_weights

__all__ = [
    "ENCODERS",
    "BlockEncoder",
    "Encoder",
    "InputSpec",
    "default_weights",
    "make_encoder",
    "wrap_encoder",
]

ENCODERS: dict[str, Callable[[int], Encoder]] = {
    "fcn3": FCN3,
    "fcn4": FCN4,
    "fcn5": FCN5,
    "fcn5_small": fcn5_small,
    "fcn8": FCN8,
    **SMALL_IMAGE_FCNS,
    "resnet18": ResNet18,
    "resnet44": ResNet44,
    "resnet_small": ResNetSmall,
    "simple_cnn": SimpleCNN,
    **TASKONOMY_ENCODERS,
    **VISION_TRANSFORMERS,
}
"""Encoders by the name that selects them; each is called with the number of input channels."""


def default_weights(name: str, channels: int = 3) -> Path:
    """The file of an encoder's default pre-trained weights, see :mod:`policies.catalogue`.

    Raises:
        ValueError: if there are none for this encoder and input, or they were not fetched yet.
    """
    entry = default_entry(name, channels)
    if entry is None:
        raise ValueError(
            f"no default weights ship for encoder {name!r} with {channels} input channel(s); give a name out "
            "of `navagent weights list`, the path of a weights file, or 'random'"
        )
    return catalogue_path(entry.name)


def weights_path(name: str, channels: int, weights: str) -> Path:
    """The file of an encoder's weights, given by their name in the catalogue or by a path.

    Raises:
        ValueError: for a name that is not in the catalogue, whose file is not here, or whose weights are for
            another encoder.
    """
    path = Path(weights).expanduser()
    if weights not in catalogue() and (path.exists() or path.name != weights or path.suffix):
        return path
    entry = find_entry(weights)
    if name not in entry.encoders or channels != entry.channels:
        raise ValueError(
            f"weights {weights!r} are for {', '.join(entry.encoders) or 'a decoder'} with {entry.channels} "
            f"input channel(s), not for {name!r} with {channels}"
        )
    return catalogue_path(weights)


def make_encoder(name: str, channels: int = 3, weights: str | Path = "default") -> Encoder:
    """Builds an encoder.

    Args:
        name: a key of :data:`ENCODERS`.
        channels: 3 for colour, 1 for depth.
        weights: ``"default"`` for those that ship in the package or were fetched, ``"random"`` for a fresh
            Xavier initialisation, a name in :func:`policies.catalogue.catalogue`, or the path of a
            ``.safetensors`` or ``.pth`` file.

    Raises:
        ValueError: for an unknown name, or weights that are unreadable or do not fit.
    """
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}{nearest(name, ENCODERS)} (known: {', '.join(ENCODERS)})")
    encoder = ENCODERS[name](channels)
    encoder.name = name
    if str(weights) == "random":
        encoder.initialise()
        return encoder
    if str(weights) == "default" and isinstance(encoder, TaskonomySet):
        paths = [default_weights(f"taskonomy_{task}", channels) for task in encoder.tasks]
        encoder.load_members([read_weights(path).tensors for path in paths])
        return encoder
    default = str(weights) == "default"
    path = default_weights(name, channels) if default else weights_path(name, channels, str(weights))
    encoder.load_tensors(read_weights(path).tensors, str(path))
    return encoder
