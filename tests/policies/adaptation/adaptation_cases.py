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
    "sidetune annealed alpha": Case(
        "sidetune", {"alpha": 0.9, "learn_alpha": False, "alpha_schedule": "cosine", "side_init": "random"}
    ),
    "sidetune base": Case("sidetune", {"fusion": "base"}, identity=True, trains=False),
    "sidetune side": Case("sidetune", {"fusion": "side"}, identity=True, stores=False),
    "sidetune sum": Case("sidetune", {"fusion": "sum", "side_init": "zero"}, identity=True),
    "sidetune product": Case("sidetune", {"fusion": "product"}),
    "sidetune film": Case("sidetune", {"fusion": "film"}, no_decay=("fusion",)),
    "sidetune mlp": Case("sidetune", {"fusion": "mlp"}, no_decay=("fusion",)),
    "sidetune mlp2": Case("sidetune", {"fusion": "mlp2"}, no_decay=("fusion",)),
    "sidetune mlp hidden": Case("sidetune", {"fusion": "mlp_hidden"}, no_decay=("fusion",)),
    "sidetune concat": Case("sidetune", {"fusion": "concat"}, no_decay=("fusion",)),
    "sidetune dense": Case("sidetune", {"stack": "dense"}, identity=True, no_decay=("alpha",)),
    "sidetune boosted": Case(
        "sidetune", {"stack": "boosted", "fusion": "sum", "side_init": "zero"}, identity=True
    ),
    "sidetune vectors resmlp2": Case(
        "sidetune",
        {"encoder": "resnet44", "fusion": "resmlp2", "side_encoder": "fcn4", "side_init": "random"},
        no_decay=("fusion",),
    ),
    "sidetune tokens": Case(
        "sidetune",
        {"encoder": "vit_mini_tokens", "fusion": "mlp2"},
        no_decay=("fusion",),
        any_size=False,
    ),
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
    "piggyback transformer": Case(
        "piggyback",
        {"encoder": "vit_mini_cls", "normalisation": "affine"},
        stores=False,
        identity=True,
        no_decay=("scores",),
        any_size=False,
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
    "superposition transformer": Case(
        "superposition",
        {"encoder": "vit_mini_cls"},
        frozen_base=False,
        stores=False,
        identity=True,
        any_size=False,
    ),
    "ewc": Case("ewc", frozen_base=False, stores=False, identity=True),
    "ewc vectors": Case(
        "ewc",
        {"encoder": "resnet44", "earlier_tasks": "online", "decay": 0.5},
        frozen_base=False,
        stores=False,
        identity=True,
    ),
    "ewc transformer": Case(
        "ewc",
        {"encoder": "vit_mini_cls"},
        frozen_base=False,
        stores=False,
        identity=True,
        any_size=False,
    ),
    "spottune": Case("spottune", {"encoder": "resnet_small"}, stores=False, identity=True),
    "spottune vectors": Case(
        "spottune", {"encoder": "resnet44", "policy_norm": "batch"}, stores=False, identity=True
    ),
    "spottune tokens": Case(
        "spottune",
        {"encoder": "vit_mini_cls", "train_ends": True},
        stores=False,
        identity=True,
        any_size=False,
    ),
    "spottune global": Case(
        "spottune",
        {"encoder": "resnet_small", "global_k": 4},
        stores=False,
        identity=True,
        no_decay=("logits",),
    ),
    "ladder": Case("ladder", {"encoder": "resnet_small", "reduction": 4}, no_decay=("gate",)),
    "ladder added": Case(
        "ladder",
        {"encoder": "resnet_small", "every": 2, "output": "add"},
        identity=True,
        no_decay=("gate",),
    ),
    "ladder blended vectors": Case(
        "ladder",
        {"encoder": "resnet44", "reduction": 4, "every": 5, "output": "blend", "store_taps": False},
        stores=False,
        no_decay=("gate", "merge"),
    ),
    "ladder tokens": Case(
        "ladder",
        {"encoder": "vit_mini_tokens", "side_init": "pruned", "gate_temperature": 1.0},
        no_decay=("gate",),
        any_size=False,
    ),
    "residual adapters": Case(
        "residual_adapters",
        {"encoder": "resnet_small"},
        stores=False,
        identity=True,
        no_decay=("normalisation",),
    ),
    "residual adapters in series": Case(
        "residual_adapters",
        {"encoder": "resnet44", "form": "series"},
        stores=False,
        identity=True,
        no_decay=("normalisation",),
    ),
    "residual adapters without norms": Case(
        "residual_adapters",
        {"form": "series", "normalisation": "frozen"},
        stores=False,
        identity=True,
    ),
    "lora": Case("lora", {"encoder": "resnet_small", "rank": 4}, stores=False, identity=True),
    "lora vectors": Case(
        "lora",
        {"encoder": "fcn4", "rank": 2, "rslora": True, "target": "conv"},
        stores=False,
        identity=True,
    ),
    "lora tokens": Case(
        "lora",
        {"encoder": "vit_mini_tokens", "target": "attention"},
        stores=False,
        identity=True,
        any_size=False,
    ),
    "lora with dropout": Case(
        "lora",
        {"encoder": "vit_mini", "target": "query,value", "dropout": 0.1},
        stores=False,
        identity=True,
        any_size=False,
    ),
    "hst": Case(
        "hst",
        {"encoder": "vit_mini"},
        stores=False,
        no_decay=(".bias", "norm", "stem.conv.1."),
        any_size=False,
    ),
    "hst map": Case(
        "hst",
        {"encoder": "vit_mini_tokens", "output": "map", "depths": "1,2,2,1", "registers": 2},
        stores=False,
        no_decay=(".bias", "norm", "stem.conv.1."),
        any_size=False,
    ),
    "hst as published": Case(
        "hst",
        {"encoder": "vit_mini_cls", "norm": "batch", "drop_path": 0.1},
        stores=False,
        no_decay=(".bias", "norm", "stem.conv.1."),
        any_size=False,
    ),
    "midtune": Case("midtune", {"unfreeze_at": 0.0}, frozen_base=False, stores=False, identity=True),
    "midtune while frozen": Case(
        "midtune", {"encoder": "resnet44", "unfreeze_at": 1.0}, frozen_base=False, identity=True, trains=False
    ),
    "progressive": Case("progressive", {"encoder": "resnet_small"}, stores=False),
    "progressive copied": Case(
        "progressive",
        {"encoder": "resnet_small", "column_init": "copy", "store_taps": True},
        identity=True,
    ),
    "progressive tokens": Case(
        "progressive",
        {"encoder": "vit_mini_cls", "column_init": "copy", "lateral": "nonlinear"},
        stores=False,
        identity=True,
        any_size=False,
    ),
}
