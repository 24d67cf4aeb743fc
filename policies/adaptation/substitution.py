"""Computing an encoder with tensors that a task puts in place of the encoder's own.

Masks, contexts and a task's own normalisation leave the encoder's modules as they are: the encoder is called
with other weights by name, so that any encoder serves unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.func import functional_call

from policies.encoders import Encoder

_NORMALISATION = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
_APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def slot(name: str) -> str:
    """A tensor's dotted name as the name of an attribute, which has no dots."""
    return name.replace(".", "/")


def dotted(slot: str) -> str:
    """The tensor's name for what :func:`slot` gave."""
    return slot.replace("/", ".")


def own_weight(encoder: Encoder, name: str, method: str) -> Tensor:
    """A layer's weight by dotted name, if it is a tensor that another can be put in the place of.

    Raises:
        ValueError: if the layer computes it from others.
    """
    layer, _, weight = name.rpartition(".")
    module = encoder.get_submodule(layer)
    found = {**module._parameters, **module._buffers}.get(weight)
    if found is None:
        raise ValueError(
            f"{method}: layer {layer!r} of encoder {encoder.name!r} computes its {weight} from other "
            "tensors, as weight_norm does; make it a plain one first, by "
            "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.remove_weight_norm"
        )
    return found


def layer_weights(encoder: Encoder, method: str) -> dict[str, Tensor]:
    """Weights of convolutions, linear layers and torch's attention, by dotted name, (outputs, inputs, ...).

    Raises:
        ValueError: naming the ``method`` and the layer that computes its weight from other tensors.
    """
    names = []
    for layer, module in encoder.named_modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            names.append(f"{layer}.weight")
        elif isinstance(module, nn.MultiheadAttention):
            # One matrix for queries, keys and values, or three where their inputs differ in width.
            joined = ("in_proj_weight",) if module.in_proj_weight is not None else _APART
            names += [f"{layer}.{weight}" for weight in joined]
    return {name: own_weight(encoder, name, method) for name in names}


class TaskNormalisation(nn.Module):
    """One task's tensors for the normalisation layers of an encoder, which start as the encoder has them.

    Args:
        encoder: the network.
        statistics: whether the task has running statistics of BatchNorm layers too, besides scale and shift
            of every BatchNorm, GroupNorm and LayerNorm.
    """

    def __init__(self, encoder: nn.Module, statistics: bool) -> None:
        super().__init__()
        self.statistics = statistics
        for layer, module in encoder.named_modules():
            if not isinstance(module, _NORMALISATION):
                continue
            for part in ("weight", "bias"):
                value = getattr(module, part, None)
                if value is not None:
                    self.register_parameter(slot(f"{layer}.{part}"), nn.Parameter(value.detach().clone()))
            for part in _STATISTICS if statistics else ():
                value = getattr(module, part, None)
                if value is not None:
                    self.register_buffer(slot(f"{layer}.{part}"), value.clone())

    @property
    def by_batch(self) -> bool:
        """Whether layers normalise by the batch in training mode: BatchNorm with statistics of its own."""
        return next(self.buffers(), None) is not None

    def tensors(self) -> dict[str, Tensor]:
        """The task's tensors by dotted name."""
        return {dotted(name): value for name, value in [*self.named_parameters(), *self.named_buffers()]}


def call_with(
    encoder: Encoder, image: Tensor, tensors: Mapping[str, Tensor], normalisation: TaskNormalisation | None
) -> Tensor:
    """Features of images (N, H, W, C), with some of the encoder's tensors replaced.

    Args:
        encoder: the network; it keeps its own tensors and its mode.
        image: as sensors give them.
        tensors: replacements by dotted name.
        normalisation: further replacements. In training mode, with statistics of its own, BatchNorm layers
            normalise by the batch and update these statistics.
    """
    pixels = encoder.preprocess(image)
    own = {} if normalisation is None else normalisation.tensors()
    by_batch = normalisation is not None and normalisation.statistics and normalisation.training
    with _batch_statistics(encoder) if by_batch else nullcontext():
        # Layers that share a weight have replacements of their own.
        return functional_call(encoder, {**tensors, **own}, (pixels,), tie_weights=False)


@contextmanager
def _batch_statistics(encoder: nn.Module) -> Iterator[None]:
    """BatchNorm layers in training mode, for one call and they alone; the rest keeps its mode."""
    layers = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode
