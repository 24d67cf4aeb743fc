"""What every perception encoder has: declared input, preprocessing on the device, and an output shape."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class InputSpec:
    """The image that an encoder was made for, as data."""

    channels: int = 3
    """3 for colour, 1 for depth."""
    size: tuple[int, int] | None = None
    """Rows and columns that the network gets, or None to take images as they come."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from values in 0..1; one for all channels, or one a channel."""
    std: tuple[float, ...] = (0.5,)
    """Divides what is left."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized."""
    antialias: bool = False
    """Whether the filter widens as an image shrinks, as Pillow's does."""
    shorter_side: int | None = None
    """Pixels to which the shorter side is resized, keeping the aspect, before ``size`` is cut from the
    centre; None resizes to ``size`` itself, whatever the aspect."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type in which a call of the encoder computes. Weights and features stay float32."""

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"encoder input channels {self.channels}: expected 3 (colour) or 1 (depth)")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"encoder input {name} {values}: expected 1 or {self.channels} values")
        for name, value, known in (
            ("interpolation", self.interpolation, ("bilinear", "bicubic")),
            ("dtype", self.dtype, ("float32", "float16", "bfloat16")),
        ):
            if value not in known:
                raise ValueError(f"encoder input {name} {value!r}: expected one of {', '.join(known)}")
        if self.shorter_side is not None and (self.size is None or max(self.size) > self.shorter_side):
            raise ValueError(
                f"encoder input shorter_side {self.shorter_side}: expected a size to cut from it that is no "
                f"larger, got size {self.size}"
            )

    def resize(self, pixels: Tensor, maximum: float) -> Tensor:
        """Brings images to the size that the network gets, without rounding to whole bytes.

        Args:
            pixels: (N, C, H, W), values in 0..maximum.
            maximum: 1 or 255.

        Returns:
            (N, C, rows, columns), values in 0..maximum; ``pixels`` themselves where they have this size.
        """
        if self.size is None:
            return pixels
        target = self.size
        if self.shorter_side is not None:
            height, width = pixels.shape[2:]
            shorter = min(height, width)
            target = (height * self.shorter_side // shorter, width * self.shorter_side // shorter)
        if tuple(pixels.shape[2:]) != target:
            pixels = F.interpolate(
                pixels, size=target, mode=self.interpolation, align_corners=False, antialias=self.antialias
            )
            if self.interpolation == "bicubic":
                # Bicubic filters overshoot at edges; image libraries clip to what a byte can hold.
                pixels = pixels.clamp(0.0, maximum)
        if target != self.size:
            rows, columns = self.size
            # Halves round to the even number, as in torchvision's centre crop.
            top, left = round((target[0] - rows) / 2), round((target[1] - columns) / 2)
            pixels = pixels[:, :, top : top + rows, left : left + columns]
        return pixels


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Checks that tensors are those of a module, all of them and no others.

    Raises:
        ValueError: naming the tensors that are missing, unexpected or of another shape.
    """
    own = module.state_dict()
    # Files from before BatchNorm counted its batches lack the counter; it does not enter the output.
    missing = [k for k in own if k not in tensors and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in tensors if k not in own]
    wrong = [
        f"{k} {tuple(tensors[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in tensors and tensors[k].shape != own[k].shape
    ]
    faults = [
        f"{kind}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if names
    ]
    if faults:
        raise ValueError(f"{source} does not fit {type(module).__name__}: " + "; ".join(faults))


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Loads tensors into a module by name, see :func:`check_tensors`."""
    check_tensors(module, tensors, source)
    own = module.state_dict()
    module.load_state_dict({**own, **{k: v.to(own[k].dtype) for k, v in tensors.items()}})


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module's tensors are; None if it has none."""
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), None)


class Encoder(nn.Module):
    """A network from an image to a feature map (N, C, h, w), tokens (N, T, D) or a vector (N, C)."""

    name: str = ""
    """The name it was made by, see :data:`policies.encoders.ENCODERS`; its class's where there is none."""
    output_layers: tuple[str, ...] = ()
    """Layers whose weights scale the output linearly, if there are such."""

    def __init__(self, input_spec: InputSpec) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.input_spec = input_spec

    def preprocess(self, image: Tensor) -> Tensor:
        """Turns images as sensors give them into what :meth:`forward` takes, on their own device.

        Args:
            image: (N, H, W, C), uint8, or float with values in 0..1.

        Returns:
            (N, C, h, w) float32, normalised and, where the encoder has a fixed size, resized.
        """
        spec = self.input_spec
        if image.dim() != 4 or image.shape[3] != spec.channels:
            raise ValueError(
                f"image of shape {tuple(image.shape)}: expected (N, H, W, {spec.channels}) for "
                f"{type(self).__name__} with {spec.channels} input channel(s)"
            )
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise ValueError(f"image of {image.dtype}: expected uint8, or a float type with values in 0..1")
        # A permuted (N, H, W, C) tensor is already in the channels-last layout that convolutions like best.
        pixels = image.permute(0, 3, 1, 2).float()
        scale = 255.0 if image.dtype == torch.uint8 else 1.0
        pixels = spec.resize(pixels, scale)
        mean = pixels.new_tensor(spec.mean)[:, None, None] * scale
        std = pixels.new_tensor(spec.std)[:, None, None] * scale
        return (pixels / std).sub_(mean / std)

    def __call__(self, x: Tensor) -> Tensor:
        """Calls :meth:`forward` in the type that :attr:`InputSpec.dtype` declares.

        Autocasting keeps the weights float32, so that copies of an encoder can learn in full precision.
        Methods that compute block by block do not come through here; they follow their caller's autocasting.

        Args:
            x: preprocessed images (N, C, H, W).

        Returns:
            What :meth:`forward` gives; float32 where the declared type is narrower.
        """
        if self.input_spec.dtype == "float32":
            return super().__call__(x)
        with torch.autocast(x.device.type, getattr(torch, self.input_spec.dtype)):
            return super().__call__(x).float()

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one image's features for images of height x width pixels: (C, h, w), (T, D) or (C,)."""
        image = torch.zeros(1, height, width, self.input_spec.channels, device=device_of(self))
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                shape = self(self.preprocess(image)).shape[1:]
        except RuntimeError as error:
            raise ValueError(f"{type(self).__name__} cannot take {height}x{width} images: {error}") from error
        finally:
            self.train(training)
        return tuple(shape)

    def initialise(self) -> None:
        """Draws fresh random weights: Xavier's for convolutions, each layer's own default for the rest."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def scale_outputs(self, factor: float) -> None:
        """Multiplies the output by ``factor``, by scaling the weights of the last layers."""
        if not self.output_layers:
            raise ValueError(f"{type(self).__name__} has no layer that scales its output alone")
        with torch.no_grad():
            for name in self.output_layers:
                for parameter in self.get_submodule(name).parameters():
                    parameter.mul_(factor)

    def load_tensors(self, tensors: Mapping[str, Tensor], source: str = "weights") -> None:
        """Loads tensors by name, all of them and no others.

        Raises:
            ValueError: naming the tensors that are missing, unexpected or of another shape.
        """
        load_tensors(self, tensors, source)


class BlockEncoder(Encoder):
    """An encoder that is a stem, a chain of blocks and a neck.

    Methods that work block by block (routing, ladders, columns, adapters) take any of these. A block maps one
    tensor to one: maps (N, C, h, w) in a convolutional network, tokens (N, T, D) in a transformer. Names of
    parameters are free, so that published files load unchanged; ``blocks`` only lists modules that have a
    place elsewhere in the network.
    """

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in the order in which they are computed."""

    @abstractmethod
    def stem(self, x: Tensor) -> Tensor:
        """What the first block takes, of preprocessed images (N, C, H, W)."""

    @abstractmethod
    def neck(self, x: Tensor) -> Tensor:
        """The features, of what the last block gives."""

    def forward(self, x: Tensor) -> Tensor:
        """Features of preprocessed images (N, C, H, W)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.neck(x)
