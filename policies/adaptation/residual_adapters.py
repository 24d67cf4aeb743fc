"""Residual adapters: a task adds 1x1 convolutions to the frozen spatial convolutions of a network.

The series form (Rebuffi, Bilen, Vedaldi, NeurIPS 2017, arXiv:1705.08045) filters what a convolution gives,
y = z + A N(z) with z = W * x, where N is a normalisation; the parallel form (the same authors, CVPR 2018,
arXiv:1803.10082) filters what it takes, y = W * x + A * x. In both, normalisation layers are the task's own.

Either adapter is linear, so it never runs by itself: it is folded into the weights that the frozen network
is called with. A 1x1 convolution beside one with a k x k kernel and the same stride is that kernel's tap over
the same pixel, and one behind it multiplies all taps. What acts is as fast as the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.adaptation.base import DEFAULT_TASK, Adaptation, AdaptationConfig, FrozenEncoder
from policies.adaptation.layout import PROBE
from policies.adaptation.substitution import TaskNormalisation, call_with, dotted, own_weight, slot
from policies.encoders import Encoder


@dataclass(frozen=True)
class ResidualAdaptersConfig(AdaptationConfig):
    """Settings of residual adapters."""

    form: Literal["series", "parallel"] = "parallel"
    """Whether adapters filter what convolutions give (2017) or what they take (2018)."""
    normalisation: Literal["frozen", "affine", "statistics"] = "affine"
    """What tasks have to themselves in BatchNorm, GroupNorm and LayerNorm layers: nothing; scale and shift;
    or also BatchNorm's running statistics, which training then takes from each batch, as in the papers (suits
    supervised learning; in PPO the network that learns would differ from the one that acted). In evaluation
    "affine" can express all that "statistics" can."""


class ResidualAdapter(nn.Module):
    """What residual adapters train for one task: a 1x1 convolution for every spatial one, 0 at first.

    Args:
        config: the method's settings.
        encoder: the frozen network.
        batchnorms: for the series form, what :func:`following_batchnorms` gave.
    """

    def __init__(
        self, config: ResidualAdaptersConfig, encoder: Encoder, batchnorms: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.form = config.form
        self.batchnorms = dict(batchnorms)
        self.filters = nn.ParameterDict()
        self.normalisation = (
            None
            if config.normalisation == "frozen"
            else TaskNormalisation(encoder, config.normalisation == "statistics")
        )
        for name, conv in spatial_convolutions(encoder).items():
            if self.form == "parallel":
                _tap(conv)
            inputs = conv.in_channels if self.form == "parallel" else conv.out_channels
            self.filters[slot(name)] = nn.Parameter(conv.weight.new_zeros(conv.out_channels, inputs))

    def folded(self, encoder: Encoder) -> dict[str, Tensor]:
        """The encoder's tensors with the adapters folded into them, by dotted name."""
        tensors = {} if self.normalisation is None else self.normalisation.tensors()
        for key, filters in self.filters.items():
            name = dotted(key)
            conv = encoder.get_submodule(name)
            assert isinstance(conv, nn.Conv2d)
            if self.form == "parallel":
                tensors[f"{name}.weight"] = conv.weight + _at_tap(filters, conv)
                continue
            if name in self.batchnorms:
                filters = self._normalised(filters, self.batchnorms[name], encoder, tensors)
            tensors[f"{name}.weight"] = conv.weight + torch.einsum("oz,zihw->oihw", filters, conv.weight)
            if conv.bias is not None:
                tensors[f"{name}.bias"] = conv.bias + filters @ conv.bias
        return tensors

    def _normalised(self, filters: Tensor, name: str, encoder: Encoder, tensors: dict[str, Tensor]) -> Tensor:
        """A / deviation, where A (z - mean) / deviation goes to a BatchNorm layer; its shift takes the mean.

        Statistics of the task's own follow what the adapter gives, and need no shift.
        """
        layer = encoder.get_submodule(name)
        assert isinstance(layer, nn.BatchNorm2d)
        mean, variance = encoder.get_buffer(f"{name}.running_mean"), encoder.get_buffer(f"{name}.running_var")
        inverse = torch.rsqrt(variance + layer.eps)
        filters = filters * inverse
        if self.normalisation is None or not self.normalisation.statistics:
            scale = tensors.get(f"{name}.weight", layer.weight)
            shift = tensors.get(f"{name}.bias", layer.bias)
            tensors[f"{name}.bias"] = shift - scale * inverse * (filters @ mean)
        return filters


class ResidualAdapters(Adaptation):
    """A frozen network whose spatial convolutions have 1x1 convolutions of the task beside or behind them.

    In the series form N is the BatchNorm layer that follows the convolution in the base, with the statistics
    it was pre-trained with and without scale and shift, which A and the layer after it can express. A
    convolution that no BatchNorm layer follows, as in networks with GroupNorm, has no N.
    """

    config_class: ClassVar[type[AdaptationConfig]] = ResidualAdaptersConfig
    recomputed: ClassVar[str] = "its adapters lie between the base's layers"
    config: ResidualAdaptersConfig

    def __init__(self, config: ResidualAdaptersConfig, base: Encoder | None = None) -> None:
        super().__init__(config)
        self.base = FrozenEncoder(base or config.make_encoder())
        encoder = self.base.encoder
        self._batchnorms = following_batchnorms(encoder) if config.form == "series" else {}
        self.start_task(DEFAULT_TASK)

    def make_adapter(self) -> ResidualAdapter:
        """Adapters that do nothing yet, and copies of the base's normalisation layers."""
        return ResidualAdapter(self.config, self.base.encoder, self._batchnorms)

    def forward(self, image: Tensor, base_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """The adapted encoder's features, see :meth:`Adaptation.forward`."""
        adapter, encoder = self._adapter, self.base.encoder
        norms = adapter.normalisation
        by_batch = norms if norms is not None and norms.statistics else None
        return call_with(encoder, image, adapter.folded(encoder), by_batch)

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the encoder's features."""
        return self.base.encoder.output_shape(height, width)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The 1x1 convolutions; and apart the normalisation layers, which decay would pull to 0."""
        adapter = self._adapter
        groups = [{"params": list(adapter.filters.values()), "weight_decay": weight_decay}]
        if adapter.normalisation is not None:
            groups.append({"params": list(adapter.normalisation.parameters()), "weight_decay": 0.0})
        return groups

    @property
    def _adapter(self) -> ResidualAdapter:
        adapter = self.adapter
        assert isinstance(adapter, ResidualAdapter)
        return adapter


def spatial_convolutions(encoder: Encoder) -> dict[str, nn.Conv2d]:
    """Convolutions whose windows overlap, by dotted name; a vision transformer's patches do not.

    Raises:
        ValueError: if there are none, one is divided into groups, which a 1x1 convolution would mix, or one
            computes its weight from other tensors.
    """
    found = {
        name: module
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Conv2d)
        and any(k > s for k, s in zip(module.kernel_size, module.stride, strict=True))
    }
    if not found:
        raise ValueError(
            f"residual adapters go to spatial convolutions, and encoder {encoder.name!r} has none; choose a "
            "convolutional network, or 'lora'"
        )
    for name, conv in found.items():
        own_weight(encoder, f"{name}.weight", "residual adapters")
        if conv.groups != 1:
            raise ValueError(
                f"residual adapters: convolution {name!r} of encoder {encoder.name!r} has {conv.groups} "
                "groups; expected 1"
            )
    return found


def following_batchnorms(encoder: Encoder) -> dict[str, str]:
    """Names of BatchNorm layers by the name of the convolution whose output they take, found by a call."""
    found: dict[str, str] = {}
    given: list[tuple[str, Tensor]] = []
    hooks = []

    def watch(name: str, module: nn.Module) -> None:
        def gave(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            given.append((name, output))

        def took(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.update({conv: name for conv, output in given if output is inputs[0]})

        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(gave))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats and module.affine:
            hooks.append(module.register_forward_pre_hook(took))

    for name, module in encoder.named_modules():
        watch(name, module)
    try:
        encoder.output_shape(*PROBE)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _at_tap(filters: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution (O, I) as one with the kernel of ``conv`` (O, I, h, w), for the same stride."""
    (height, width), (top, left) = conv.kernel_size, _tap(conv)
    return F.pad(filters[:, :, None, None], (left, width - 1 - left, top, height - 1 - top))


def _tap(conv: nn.Conv2d) -> tuple[int, int]:
    """Row and column of the kernel that lie where a 1x1 kernel of the same stride, without padding, lies."""
    if isinstance(conv.padding, str) or any(
        p % d or p // d >= k for p, d, k in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
    ):
        raise ValueError(
            f"residual adapters: {conv} has no tap over the pixels of a 1x1 convolution beside it; use the "
            "form 'series'"
        )
    return conv.padding[0] // conv.dilation[0], conv.padding[1] // conv.dilation[1]
