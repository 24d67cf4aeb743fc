"""Any network as an encoder, so that every method of adaptation takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from policies.encoders.base import BlockEncoder, Encoder, InputSpec, device_of

Part = Callable[[nn.Module, Tensor], Tensor]
"""A part of a network's computation: of the network and what the part takes."""

_KINDS = {1: "a vector (C,)", 2: "tokens (T, D)", 3: "a map (C, h, w)"}
_TOLERANCE = 1e-3


class WrappedEncoder(Encoder):
    """A network of any class, see :func:`wrap_encoder`, which is its attribute ``module``."""

    def __init__(
        self,
        module: nn.Module,
        output_shape: Sequence[int | None],
        input_spec: InputSpec,
        name: str,
        initialise: Callable[[nn.Module], None] | None,
    ) -> None:
        super().__init__(input_spec)
        self.name = name
        self.module = module
        self.declared_shape = tuple(output_shape)
        self._initialise = initialise

    def forward(self, x: Tensor) -> Tensor:
        """Features of preprocessed images (N, C, H, W).

        Raises:
            ValueError: if they have another shape than was declared.
        """
        return self._checked(self.module(x))

    def initialise(self) -> None:
        """Draws fresh random weights, by the function that the caller gave, else as :class:`Encoder` does.

        Raises:
            ValueError: if no function was given, and some weights belong to modules that cannot reset them.
        """
        if self._initialise is not None:
            self._initialise(self.module)
            return
        kept = [
            f"{prefix}.{name}".removeprefix("module.")
            for prefix, part in self.named_modules()
            if not callable(getattr(part, "reset_parameters", None))
            for name, _ in part.named_parameters(recurse=False)
        ]
        if kept:
            raise ValueError(
                f"{self.name} cannot draw fresh weights for {', '.join(kept[:4])}"
                f"{' ...' if len(kept) > 4 else ''}: their modules have no reset_parameters; give "
                "wrap_encoder a function as initialise"
            )
        super().initialise()

    def load_tensors(self, tensors: Mapping[str, Tensor], source: str = "weights") -> None:
        """Loads tensors by the network's own names, or this encoder's; see :meth:`Encoder.load_tensors`."""
        own = self.state_dict()
        super().load_tensors({k if k in own else f"module.{k}": v for k, v in tensors.items()}, source)

    def _checked(self, features: object) -> Tensor:
        expected = self.declared_shape
        if not isinstance(features, Tensor):
            raise ValueError(
                f"{self.name} gives a {type(features).__name__}: expected one tensor; wrap it in a module "
                "that picks it out"
            )
        shape = tuple(features.shape[1:])
        if len(shape) != len(expected) or any(
            e not in (None, s) for e, s in zip(expected, shape, strict=True)
        ):
            raise ValueError(f"{self.name} gives features of shape {shape}: {expected} was declared")
        return features


class WrappedBlockEncoder(WrappedEncoder, BlockEncoder):
    """A network of any class with a chain of blocks in it, see :func:`wrap_encoder`."""

    def __init__(
        self,
        module: nn.Module,
        output_shape: Sequence[int | None],
        input_spec: InputSpec,
        name: str,
        initialise: Callable[[nn.Module], None] | None,
        blocks: Sequence[str],
        stem: Part | None,
        neck: Part | None,
    ) -> None:
        super().__init__(module, output_shape, input_spec, name, initialise)
        self._block_names = tuple(blocks)
        self._stem = stem
        self._neck = neck
        self._compared = False

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that the caller named."""
        return [self.module.get_submodule(name) for name in self._block_names]

    def stem(self, x: Tensor) -> Tensor:
        """What the first block takes, of preprocessed images (N, C, H, W)."""
        return x if self._stem is None else self._stem(self.module, x)

    def neck(self, x: Tensor) -> Tensor:
        """The features, of what the last block gives."""
        return self._checked(x if self._neck is None else self._neck(self.module, x))

    def forward(self, x: Tensor) -> Tensor:
        """Features of preprocessed images (N, C, H, W), block by block."""
        return BlockEncoder.forward(self, x)

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one image's features; the first time, compares the blocks with the whole network.

        Raises:
            ValueError: if stem, blocks and neck give something else than the network itself.
        """
        shape = super().output_shape(height, width)
        if not self._compared:
            self._compare(height, width)
            self._compared = True
        return shape

    def _compare(self, height: int, width: int) -> None:
        values = torch.linspace(0, 1, height * width * self.input_spec.channels, device=device_of(self))
        # Neither constant nor a ramp, whatever the size.
        image = (values * 1000).sin().abs().reshape(1, height, width, -1)
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                x = self.preprocess(image)
                whole, chain = self._checked(self.module(x)), self(x)
        finally:
            self.train(training)
        difference = (whole - chain).abs().max().item()
        if not difference <= _TOLERANCE * max(1.0, whole.abs().max().item()):
            raise ValueError(
                f"{self.name}: stem, blocks and neck give features that differ by {difference:.3g} from "
                "those of the whole network; name all its blocks in their order, and put what comes before "
                "and after them into stem and neck"
            )


def wrap_encoder(
    module: nn.Module,
    output_shape: Sequence[int | None],
    input_spec: InputSpec | None = None,
    name: str = "",
    blocks: Sequence[str] = (),
    stem: Part | None = None,
    neck: Part | None = None,
    initialise: Callable[[nn.Module], None] | None = None,
) -> Encoder:
    """Makes an encoder of any network.

    The network is not copied. Its weights load under their own names. Declare the images that it was made
    for, so that it may be given images as sensors have them:

    >>> import torch
    >>> from torch import nn
    >>> from policies.adaptation import make_adaptation
    >>> from policies.encoders import InputSpec, wrap_encoder
    >>> network = nn.Sequential(nn.Conv2d(3, 16, 7, 4, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, 2, 1))
    >>> spec = InputSpec(size=(96, 96), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    >>> encoder = wrap_encoder(network, (8, 12, 12), spec, name="mine")
    >>> method = make_adaptation("sidetune", base=encoder)
    >>> method(torch.zeros(2, 120, 160, 3, dtype=torch.uint8)).shape
    torch.Size([2, 8, 12, 12])

    Methods that work block by block need the names of the modules that make up a chain, each of which maps
    one tensor to one, and what comes before and after it:

    >>> blocks = wrap_encoder(
    ...     network, (8, 12, 12), spec, blocks=["1", "2"], stem=lambda network, x: network[0](x)
    ... )
    >>> len(blocks.blocks)
    2

    Args:
        module: from preprocessed images (N, C, H, W) to features, one tensor. In training mode too, what it
            gives for an image should not depend on the rest of the batch, so that the network that acts is
            the one that learns.
        output_shape: of one image's features: a map (C, h, w), tokens (T, D) or a vector (C,). None stands
            for a number that depends on the size of the image.
        input_spec: the images that the network was made for; default :class:`InputSpec` ().
        name: what errors and summaries call it; default its class's name.
        blocks: names of the blocks in their order, as in ``module.named_modules()``.
        stem: what comes before the blocks; a function of the network and the preprocessed images. It is given
            the network since encoders are copied, so take layers from there. Default: nothing.
        neck: what comes after the blocks; a function of the network and what the last block gives.
        initialise: draws fresh random weights for the network; default as :meth:`Encoder.initialise`.

    Raises:
        ValueError: for a shape that features cannot have, a block that is not there, a stem or neck
            without blocks, or a network that cannot be copied. For features of another shape than was
            declared, or blocks that are not the whole network: at once where the input's size is fixed, else
            when the encoder is first used.
    """
    if len(output_shape) not in _KINDS or any(n is not None and n < 1 for n in output_shape):
        raise ValueError(f"output shape {tuple(output_shape)}: expected {', '.join(_KINDS.values())}")
    names = dict(module.named_modules())
    for block in blocks:
        if block not in names:
            raise ValueError(
                f"{type(module).__name__} has no block {block!r}; its modules are "
                f"{', '.join(n for n, _ in module.named_children())} and what they hold"
            )
    if not blocks and (stem is not None or neck is not None):
        raise ValueError("a stem or neck was given without blocks; name the blocks")
    for place, part in names.items():
        if any(isinstance(value, Tensor) and not value.is_leaf for value in vars(part).values()):
            raise ValueError(
                f"module {place!r} of {type(module).__name__} keeps a weight that it has computed, as the "
                "old torch.nn.utils.weight_norm does, and cannot be copied; use "
                "torch.nn.utils.remove_weight_norm, or torch.nn.utils.parametrizations.weight_norm instead"
            )
    spec = input_spec or InputSpec()
    name = name or type(module).__name__
    encoder: WrappedEncoder
    if blocks:
        encoder = WrappedBlockEncoder(module, output_shape, spec, name, initialise, blocks, stem, neck)
    else:
        encoder = WrappedEncoder(module, output_shape, spec, name, initialise)
    if spec.size is not None:
        encoder.output_shape(*spec.size)
    return encoder
