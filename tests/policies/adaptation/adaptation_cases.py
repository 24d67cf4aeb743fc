"""The table of cases that every behaviour is tested on: a method joins by its rows."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One method, with options, on one base."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the method; weights are random unless they say otherwise."""
    size: tuple[int, int] = (64, 64)
    """Rows and columns of the images."""
    frozen_base: bool = True
    """Whether the method keeps its base frozen, as ``method.base``."""
    stores: bool = True
    """Whether ``base_features`` gives anything to store."""
    identity: bool = False
    """Whether the method promises the base's own output before it has learned."""
    no_decay: tuple[str, ...] = ()
    """Parts of the names of the parameters that weight decay must spare."""
    trains: bool = True
    """Whether the method has anything to train."""
    any_size: bool = True
    """Whether images of 50 x 70 pixels are taken; refused clearly where not."""


CASES = {
    "sidetune": Case("sidetune", identity=True, no_decay=("alpha",)),
    "sidetune random side": Case("sidetune", {"side_init": "random"}, no_decay=("alpha",)),
    "sidetune quiet side": Case("sidetune", {"side_init": "low_energy"}, no_decay=("alpha",)),
    "sidetune fixed alpha": Case("sidetune", {"learn_alpha": False}, identity=True),
    "sidetune vectors": Case("sidetune", {"encoder": "resnet44"}, identity=True, no_decay=("alpha",)),
    "features": Case("features", identity=True, trains=False),
    "features vectors": Case("features", {"encoder": "resnet44"}, identity=True, trains=False),
    "finetune": Case("finetune", frozen_base=False, stores=False, identity=True),
    "finetune vectors": Case("finetune", {"encoder": "fcn4"}, frozen_base=False, stores=False, identity=True),
    "scratch": Case("scratch", frozen_base=False, stores=False),
    "scratch depth": Case("scratch", {"channels": 1}, frozen_base=False, stores=False),
    "piggyback": Case("piggyback", stores=False, identity=True, no_decay=("scores",)),
    "piggyback ternary": Case(
        "piggyback",
        {"ternary": True, "mask_scale_gradients": "average", "normalisation": "affine"},
        stores=False,
        identity=True,
        no_decay=("scores",),
    ),
    "piggyback vectors": Case(
        "piggyback",
        {"encoder": "fcn4", "mask_init": "weight_based_1s", "mask_scale_gradients": "individual"},
        stores=False,
        identity=True,
        no_decay=("scores",),
    ),
    "piggyback own statistics": Case(
        "piggyback",
        {"encoder": "resnet44", "normalisation": "statistics"},
        stores=False,
        no_decay=("scores",),
    ),
    "superposition": Case("superposition", frozen_base=False, stores=False, identity=True),
    "superposition rotation": Case(
        "superposition", {"context": "rotation"}, frozen_base=False, stores=False, identity=True
    ),
    "superposition vectors": Case(
        "superposition",
        {"encoder": "resnet44", "normalisation": "task"},
        frozen_base=False,
        stores=False,
    ),
    "ewc": Case("ewc", frozen_base=False, stores=False, identity=True),
    "ewc vectors": Case(
        "ewc",
        {"encoder": "resnet44", "earlier_tasks": "online", "decay": 0.5},
        frozen_base=False,
        stores=False,
        identity=True,
    ),
}
