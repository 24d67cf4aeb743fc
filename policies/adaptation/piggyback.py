"""Piggyback (Mallya et al., ECCV 2018, arXiv:1801.06519): a task is a binary mask over frozen weights.

Beside every weight W of the base's convolutions and linear layers, those of torch's attention included,
stands a real score; the layer computes with W * m, where m is 1 where the score is above a threshold and 0
elsewhere. The gradient passes the threshold as if it were not there: d score = d(W * m) * W (section 3 of the
paper). Biases stay frozen, and a finished task is stored as one bit a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from policies.adaptation.base import DEFAULT_TASK, Adaptation, AdaptationConfig, FrozenEncoder
from policies.adaptation.substitution import TaskNormalisation, call_with, dotted, layer_weights, slot
from policies.encoders import Encoder

MaskInit = Literal["constant", "uniform", "weight_based_1s"]
GradientScale = Literal["none", "average", "individual"]
Normalisation = Literal["frozen", "affine", "statistics"]


@dataclass(frozen=True)
class PiggybackConfig(AdaptationConfig):
    """Settings of Piggyback.

    Adam moves a score by about the learning rate a step, so a weight is switched off after at least
    (mask_scale - threshold) / learning rate steps: 50 with the published 5e-3 and 1e-4. To train the scores
    k times as fast as the rest at one learning rate, divide mask_scale and threshold by k.
    """

    mask_init: MaskInit = "constant"
    """How scores start: all at mask_scale, so that every weight is kept; uniform within +-mask_scale; or each
    layer's at its mean absolute weight."""
    mask_scale: float = 1e-2
    """Scores of kept weights at the start; greater than the threshold. Unused by "weight_based_1s"."""
    threshold: float = 5e-3
    """Weights with a score above it are kept."""
    ternary: bool = False
    """Whether a score below 0 turns its weight's sign instead of removing it."""
    mask_scale_gradients: GradientScale = "none"
    """What scores' gradients are divided by: nothing, the layer's mean absolute weight, or each absolute
    weight (a weight of 0 gets no gradient)."""
    normalisation: Normalisation = "frozen"
    """What tasks have to themselves in BatchNorm, GroupNorm and LayerNorm layers: nothing; scale and shift;
    or also BatchNorm's running statistics, which training then takes from each batch (suits supervised
    learning; in PPO the network that learns would differ from the one that acted)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threshold >= 0:
            raise ValueError(f"piggyback threshold {self.threshold}: expected 0 or more")
        if self.mask_init != "weight_based_1s" and not self.threshold < self.mask_scale:
            raise ValueError(
                f"piggyback mask_scale {self.mask_scale} with threshold {self.threshold}: expected a greater "
                "mask_scale, else every weight would start removed"
            )

    def kept_score(self, weight: Tensor) -> float:
        """The score at which a layer's weights are kept, at the start and after loading a mask."""
        return float(weight.abs().mean()) if self.mask_init == "weight_based_1s" else self.mask_scale


class _MaskedWeight(torch.autograd.Function):
    """W * m(score), straight-through: backward takes m as the score itself."""

    @staticmethod
    def forward(
        ctx: Any, score: Tensor, weight: Tensor, threshold: float, ternary: bool, scale: GradientScale
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.scale = scale
        return weight * _mask(score, threshold, ternary)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        # The weight over its absolute value is its sign, which also settles 0 over 0.
        factor = weight.sign() if ctx.scale == "individual" else weight
        gradient = gradients[0] * factor
        if ctx.scale == "average":
            gradient = gradient / weight.abs().mean()
        return gradient, None, None, None, None


def _mask(score: Tensor, threshold: float, ternary: bool) -> Tensor:
    """1, 0 or, if ternary, -1, of the score's shape and type."""
    kept = (score > threshold).to(score.dtype)
    return kept - (score < 0).to(score.dtype) if ternary else kept


def pack_bits(bits: Tensor) -> Tensor:
    """Booleans (n,) as bytes (ceil(n / 8),) uint8, the first in the highest bit, as ``numpy.packbits``."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8))
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return (padded.view(-1, 8) << places).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` booleans of what :func:`pack_bits` gave."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> places) & 1).flatten()[:count].bool()


class MaskAdapter(nn.Module):
    """What Piggyback trains for one task: a score a weight and, if asked, normalisation layers."""

    def __init__(self, config: PiggybackConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.scores = nn.ParameterDict()
        self.normalisation = (
            None
            if config.normalisation == "frozen"
            else TaskNormalisation(encoder, config.normalisation == "statistics")
        )
        for name, weight in layer_weights(encoder, "Piggyback").items():
            score = torch.full_like(weight, config.kept_score(weight))
            if config.mask_init == "uniform":
                score.uniform_(-config.mask_scale, config.mask_scale)
            self.scores[slot(name)] = nn.Parameter(score)

    def masks(self) -> dict[str, Tensor]:
        """The task's masks by the weights' dotted names: 1, 0 or, if ternary, -1, float."""
        config = self.config
        return {
            dotted(key): _mask(score.detach(), config.threshold, config.ternary)
            for key, score in self.scores.items()
        }

    def masked(self, encoder: Encoder) -> dict[str, Tensor]:
        """Masked weights by dotted name, with gradients to the scores."""
        config = self.config
        return {
            dotted(key): _MaskedWeight.apply(
                score,
                encoder.get_buffer(dotted(key)),
                config.threshold,
                config.ternary,
                config.mask_scale_gradients,
            )
            for key, score in self.scores.items()
        }

    def packed_masks(self) -> dict[str, Tensor]:
        """The masks by slot, uint8: a bit a weight; two if ternary, "kept" and "turned"."""
        packed = {}
        for name, mask in self.masks().items():
            bits = mask.flatten() != 0
            if self.config.ternary:
                bits = torch.stack([bits, mask.flatten() < 0], dim=1).flatten()
            packed[slot(name)] = pack_bits(bits)
        return packed

    @torch.no_grad()
    def load_packed_masks(self, packed: Mapping[str, Tensor], encoder: Encoder) -> None:
        """Sets scores to where new ones are kept, to 0 where removed, below 0 where turned."""
        for key, score in self.scores.items():
            kept_score = self.config.kept_score(encoder.get_buffer(dotted(key)))
            bits = packed[key].to(score.device)
            if self.config.ternary:
                kept, turned = unpack_bits(bits, 2 * score.numel()).view(-1, 2).unbind(1)
                mask = kept * (1.0 - 2.0 * turned)
            else:
                mask = unpack_bits(bits, score.numel()).float()
            score.copy_((kept_score * mask).view_as(score))


class Piggyback(Adaptation):
    """A frozen base of which every task sees the weights that its mask keeps.

    :meth:`delta` holds masks, packed. A method that loads one computes the same, but scores start again from
    as far above or below the threshold as new ones do: training goes on as with fresh scores in that mask.
    To resume training exactly, keep ``state_dict``, which holds the scores.
    """

    config_class: ClassVar[type[AdaptationConfig]] = PiggybackConfig
    recomputed: ClassVar[str] = "its masks change what the layers compute"
    config: PiggybackConfig

    def __init__(self, config: PiggybackConfig, base: Encoder | None = None, restored: bool = False) -> None:
        super().__init__(config, restored=restored)
        self.base = FrozenEncoder(base or config.make_encoder())
        self.start_task(DEFAULT_TASK)

    @classmethod
    def to_restore(cls, config: AdaptationConfig, base: Encoder) -> Self:
        """See :meth:`Adaptation.to_restore`."""
        assert isinstance(config, PiggybackConfig)
        return cls(config, base, restored=True)

    def make_adapter(self) -> MaskAdapter:
        """Scores in their initial state.

        Raises:
            ValueError: if a layer would start without any of its weights.
        """
        for name, weight in layer_weights(self.base.encoder, "Piggyback").items():
            score = self.config.kept_score(weight)
            if not (self._restored or score > self.config.threshold):
                raise ValueError(
                    f"mask_init 'weight_based_1s': the mean absolute weight {score:.3g} of {name} is not "
                    f"above the threshold {self.config.threshold}: all of the layer would start removed; "
                    "lower the threshold"
                )
        return MaskAdapter(self.config, self.base.encoder)

    def masks(self) -> dict[str, Tensor]:
        """The current task's masks by the weights' names in the encoder: 1, 0 or, if ternary, -1."""
        return self._adapter(self.task).masks()

    def metrics(self) -> dict[str, float]:
        """Share of the weights that the current mask keeps, turned or not, and that it turns."""
        mask = torch.cat([mask.flatten() for mask in self.masks().values()])
        kept = {"kept": (mask != 0).float().mean().item()}
        return kept | {"turned": (mask < 0).float().mean().item()} if self.config.ternary else kept

    def forward(self, image: Tensor, base_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """The masked encoder's features, see :meth:`Adaptation.forward`."""
        adapter = self._adapter(self.task)
        encoder = self.base.encoder
        return call_with(encoder, image, adapter.masked(encoder), adapter.normalisation)

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the encoder's features."""
        return self.base.encoder.output_shape(height, width)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Scores without weight decay, which would remove all weights, and normalisation layers with it."""
        adapter = self._adapter(self.task)
        groups = [{"params": list(adapter.scores.values()), "weight_decay": 0.0}]
        if adapter.normalisation is not None:
            groups.append({"params": list(adapter.normalisation.parameters()), "weight_decay": weight_decay})
        return groups

    def delta(self) -> dict[str, Tensor]:
        """Masks of all tasks, packed as ``adapters.TASK.masks.WEIGHT``, and their normalisation layers."""
        stored = {
            name: value
            for name, value in super().delta().items()
            if not any(name.startswith(f"adapters.{task}.scores.") for task in self.tasks)
        }
        for task in self.tasks:
            packed = self._adapter(task).packed_masks()
            stored |= {f"adapters.{task}.masks.{key}": value for key, value in packed.items()}
        return stored

    def load_delta(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes masks, see :meth:`Adaptation.load_delta`."""
        for name, value in tensors.items():
            if ".masks." in name and value.dtype != torch.uint8:
                raise ValueError(f"{name} is {value.dtype}; expected packed bits, torch.uint8")
        super().load_delta(tensors)
        for task in self.tasks:
            own = f"adapters.{task}.masks."
            packed = {k.removeprefix(own): v for k, v in tensors.items() if k.startswith(own)}
            self._adapter(task).load_packed_masks(packed, self.base.encoder)

    def _adapter(self, task: str) -> MaskAdapter:
        adapter = self.adapters[task]
        assert isinstance(adapter, MaskAdapter)
        return adapter
