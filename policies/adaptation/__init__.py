"""Methods that adapt a perception encoder, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from policies.adaptation.base import (
    Adaptation,
    AdaptationConfig,
    FrozenEncoder,
    TrainableEncoder,
    set_learning_rate,
)
from policies.adaptation.ewc import EWC, EWCConfig
from policies.adaptation.feature_extraction import FeatureExtraction
from policies.adaptation.finetune import FineTuning
from policies.adaptation.hierarchical_side_tuning import HierarchicalSideTuning, HierarchicalSideTuningConfig
from policies.adaptation.ladder import Ladder, LadderConfig
from policies.adaptation.lora import LoRA, LoRAConfig
from policies.adaptation.mid_tuning import MidTuning, MidTuningConfig
from policies.adaptation.piggyback import Piggyback, PiggybackConfig
from policies.adaptation.progressive import Progressive, ProgressiveConfig
from policies.adaptation.residual_adapters import ResidualAdapters, ResidualAdaptersConfig
from policies.adaptation.scratch import Scratch, ScratchConfig
from policies.adaptation.side_tuning import SideTuning, SideTuningConfig
from policies.adaptation.spottune import SpotTune, SpotTuneConfig
from policies.adaptation.superposition import Superposition, SuperpositionConfig
from policies.encoders import Encoder, make_encoder
from policies.names import nearest

__all__ = [
    "ADAPTATIONS",
    "EWC",
    "Adaptation",
    "AdaptationConfig",
    "EWCConfig",
    "FeatureExtraction",
    "FineTuning",
    "FrozenEncoder",
    "HierarchicalSideTuning",
    "HierarchicalSideTuningConfig",
    "Ladder",
    "LadderConfig",
    "LoRA",
    "LoRAConfig",
    "MidTuning",
    "MidTuningConfig",
    "Piggyback",
    "PiggybackConfig",
    "Progressive",
    "ProgressiveConfig",
    "ResidualAdapters",
    "ResidualAdaptersConfig",
    "Scratch",
    "ScratchConfig",
    "SideTuning",
    "SideTuningConfig",
    "SpotTune",
    "SpotTuneConfig",
    "Superposition",
    "SuperpositionConfig",
    "TrainableEncoder",
    "make_adaptation",
    "set_learning_rate",
]

ADAPTATIONS: dict[str, type[Adaptation]] = {
    "sidetune": SideTuning,
    "features": FeatureExtraction,
    "finetune": FineTuning,
    "scratch": Scratch,
    "piggyback": Piggyback,
    "superposition": Superposition,
    "ewc": EWC,
    "spottune": SpotTune,
    "ladder": Ladder,
    "residual_adapters": ResidualAdapters,
    "lora": LoRA,
    "hst": HierarchicalSideTuning,
    "midtune": MidTuning,
    "progressive": Progressive,
}
"""Methods by the name that selects them."""


def make_adaptation(
    name: str, base: Encoder | None = None, *, restored: bool = False, **options: Any
) -> Adaptation:
    """Builds a method.

    Args:
        name: a key of :data:`ADAPTATIONS`.
        base: the pre-trained network to adapt, which is copied; None makes it from ``encoder``, ``weights``
            and ``channels``.
        restored: whether all weights are going to come from a saved state, so that no file of weights is
            read, see :meth:`Adaptation.to_restore`.
        options: fields of the method's configuration.

    Raises:
        ValueError: for an unknown method or option, naming the nearest known one, or a wrong value.
    """
    if name not in ADAPTATIONS:
        raise ValueError(
            f"unknown adaptation {name!r}{nearest(name, ADAPTATIONS)} (known: {', '.join(ADAPTATIONS)})"
        )
    method = ADAPTATIONS[name]
    fields = [field.name for field in dataclasses.fields(method.config_class)]
    for option in options:
        if option not in fields:
            raise ValueError(
                f"adaptation {name!r} has no option {option!r}{nearest(option, fields)} "
                f"(known: {', '.join(fields)})"
            )
    config = method.config_class(**options)
    if restored:
        return method.to_restore(config, base or make_encoder(config.encoder, config.channels, "random"))
    return method(config, base)  # type: ignore[call-arg,arg-type]
