"""Side-tuning (Zhang et al., ECCV 2020, arXiv:1912.13503): a frozen base and a small network beside it.

R(x) = alpha B(x) + (1 - alpha) S(x), with alpha = sigmoid(a) learned from a = 0 by the task's own loss; or
another fusion of :mod:`policies.adaptation.fusion`. Each task has a side network and a fusion of its own,
over the one base. Tasks may also build on each other: by "dense" fusion with the side networks of all earlier
tasks, or as a "boosted" stack, in which what the stages before gave together is the base of the next.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from policies.adaptation.alpha import Alpha, AlphaSchedule, AlphaScheduleName, DenseAlpha
from policies.adaptation.base import (
    BASE,
    DEFAULT_TASK,
    Adaptation,
    AdaptationConfig,
    FrozenEncoder,
    TrainableEncoder,
)
from policies.adaptation.fusion import (
    ANY_SHAPE,
    ONE_SIDE,
    Fusion,
    FusionName,
    make_fusion,
)
from policies.adaptation.layout import PROBE, feature_channels
from policies.encoders import Encoder, make_encoder, weights_path
from policies.weights import read_weights

SideInit = Literal["copy", "distilled", "random", "low_energy", "zero"]
Stack = Literal["single", "dense", "boosted"]

LOW_ENERGY = 1e-2
"""Scale of a "low_energy" side network's first outputs."""


@dataclass(frozen=True)
class SideTuningConfig(AdaptationConfig):
    """Settings of side-tuning."""

    fusion: FusionName = "alpha"
    """How base B and side S are put together: alpha B + (1 - alpha) S; B or S alone; their sum or product;
    film, which scales and shifts B by S; small networks f and g as f(B) + S (mlp), f(B) + g(S) (mlp2),
    f(B) + S + g(S) (resmlp2), relu(f(B) + S) (mlp_hidden); or both side by side through two convolutions
    (concat). For vectors f and g hold BatchNorm: in PPO the network that learns would differ from the one
    that acted."""
    alpha: float = 0.5
    """Initial weight of the base, in 0..1; 0.8 is the authors' "alpha8". At 0 or 1 it cannot learn."""
    learn_alpha: bool = True
    """Whether alpha learns with the task."""
    alpha_schedule: AlphaScheduleName = "constant"
    """What an alpha that is not learned does: stay, go to alpha_final along a line or a cosine, or fall
    from 1 as k / (k + N) with the number N of samples seen (map)."""
    alpha_final: float = 0.0
    """Where the schedules linear and cosine end, in 0..1."""
    alpha_fraction: float = 1.0
    """Part of the training over which linear and cosine go there, above 0 and up to 1."""
    alpha_prior: float | None = None
    """k of the schedule map, the number of samples that the base is worth; required by, and only for, map."""
    side_encoder: str | None = None
    """Encoder of the side network; None for that of the base. Both must give features of one shape."""
    side_init: SideInit = "copy"
    """How the side network starts: the base's weights, a file distilled from the base, random weights, random
    ones scaled so that it adds almost nothing, or exactly nothing. The last needs a side network that does
    not end in a ReLU, for no gradient passes one at 0. BatchNorm in a side network that starts random learns
    its statistics from the batches: in PPO the network that learns would differ from the one that acted."""
    side_weights: str | None = None
    """Weights of a side network distilled from the base, a file or a name in the catalogue; required by, and
    only for, "distilled"."""
    stack: Stack = "single"
    """How tasks in sequence relate: each with the base alone; each fused with the base and the side networks
    of all earlier tasks (dense; weights by softmax where the fusion is alpha); or each on top of what the
    earlier ones gave together (boosted; with the fusion sum, B + S1 + ... + St). Earlier ones are frozen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_alpha()
        self._check_side()
        if self.stack != "single" and self.fusion in ("base", "side"):
            raise ValueError(
                f"stack {self.stack!r} needs a fusion of base and side, not {self.fusion!r} alone"
            )
        if self.stack == "dense" and self.fusion in ONE_SIDE:
            raise ValueError(
                f"stack 'dense' with fusion {self.fusion!r}, which takes one side network; use stack "
                "'boosted', or the fusion 'alpha', 'sum', 'product' or one of the mlps"
            )

    def _check_alpha(self) -> None:
        own = [f for f in fields(self) if f.name == "learn_alpha" or f.name.startswith("alpha")]
        set_here = [f.name for f in own if getattr(self, f.name) != f.default]
        if self.fusion != "alpha" and set_here:
            raise ValueError(
                f"{set_here[0]} {getattr(self, set_here[0])} with fusion {self.fusion!r}, which has no "
                "alpha; leave it out, or use fusion 'alpha'"
            )
        for name in ("alpha", "alpha_final"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"side-tuning {name} {getattr(self, name)}: expected a value in 0..1")
        if not 0.0 < self.alpha_fraction <= 1.0:
            raise ValueError(f"alpha_fraction {self.alpha_fraction}: expected a value above 0 and up to 1")
        if self.learn_alpha and self.alpha in (0.0, 1.0):
            raise ValueError(f"side-tuning alpha {self.alpha} cannot learn; set learn_alpha=False with it")
        if self.learn_alpha and self.alpha_schedule != "constant":
            raise ValueError(
                f"alpha_schedule {self.alpha_schedule!r} with an alpha that learns; set learn_alpha=False "
                "with it"
            )
        if self.alpha_schedule not in ("linear", "cosine"):
            for name in [n for n in set_here if n in ("alpha_final", "alpha_fraction")]:
                raise ValueError(
                    f"{name} {getattr(self, name)} with alpha_schedule {self.alpha_schedule!r}: only "
                    "'linear' and 'cosine' have an end"
                )
        if (self.alpha_schedule == "map") != (self.alpha_prior is not None):
            raise ValueError(
                f"alpha_schedule {self.alpha_schedule!r} with alpha_prior {self.alpha_prior}: 'map' needs "
                "the number of samples that the base is worth, and the others take none"
            )
        if self.alpha_prior is not None and not self.alpha_prior > 0:
            raise ValueError(f"alpha_prior {self.alpha_prior}: expected a number of samples above 0")
        if self.alpha_schedule == "map" and "alpha" in set_here:
            raise ValueError(f"alpha {self.alpha} with alpha_schedule 'map', which starts at 1; leave it out")

    def _check_side(self) -> None:
        if (self.side_init == "distilled") != (self.side_weights is not None):
            raise ValueError(
                f"side_init {self.side_init!r} with side_weights {self.side_weights!r}: 'distilled' needs a "
                "file of weights, and the others take none"
            )
        if self.side_init == "copy" and self.side_encoder not in (None, self.encoder):
            raise ValueError(
                f"side_init 'copy' needs a side network like the base {self.encoder!r}, not "
                f"{self.side_encoder!r}; use 'random' or 'distilled'"
            )
        if self.fusion == "base" and (self.side_encoder is not None or self.side_init != "copy"):
            raise ValueError("fusion 'base' has no side network; leave out side_encoder and side_init")

    def make_alpha(self, earlier: int) -> Alpha:
        """Alpha in its initial state, for a task after ``earlier`` others."""
        # Schedules that have no prior do not look at it.
        schedule = AlphaSchedule(
            self.alpha, self.alpha_schedule, self.alpha_final, self.alpha_fraction, self.alpha_prior or 1.0
        )
        if self.stack == "dense":
            return DenseAlpha(schedule, self.learn_alpha, earlier + 1)
        return Alpha(schedule, self.learn_alpha)


class SideAdapter(nn.Module):
    """What side-tuning trains for one task: the side network, if there is one, and the fusion."""

    def __init__(self, side: TrainableEncoder | None, fusion: Fusion) -> None:
        super().__init__()
        self.side = side
        self.fusion = fusion


class SideTuning(Adaptation):
    """A frozen base fused with a trainable side network.

    In a dense or boosted stack the side networks of the tasks begun before the current one stay as they are,
    in evaluation mode and without gradients. Training an earlier task again changes the later ones.

    Args:
        config: the settings.
        base: the network to adapt, which is copied; None makes it by the configuration.
        side: the network that every task's side network begins as a copy of, with the weights it has unless
            ``side_init`` gives it others; None takes ``side_encoder``, or the base's design.
        restored: whether all weights come from a saved state: until then, tasks need no file of a distilled
            side network.

    Raises:
        ValueError: if base and side cannot be fused, or the side cannot start as the settings say.
    """

    config_class: ClassVar[type[AdaptationConfig]] = SideTuningConfig
    recomputed: ClassVar[str] = "without the base, all that is left learns"
    config: SideTuningConfig

    def __init__(
        self,
        config: SideTuningConfig,
        base: Encoder | None = None,
        side: Encoder | None = None,
        restored: bool = False,
    ) -> None:
        super().__init__(config, restored=restored)
        if side is not None and (config.side_encoder is not None or config.fusion == "base"):
            taken = "fusion 'base'" if config.fusion == "base" else f"side_encoder {config.side_encoder!r}"
            raise ValueError(f"a side network was given, and {taken} besides; leave out one of them")
        self.base = FrozenEncoder(base or config.make_encoder())
        # In a tuple, so that they are no part of this network.
        self._designs = (base, copy.deepcopy(side))
        self.start_task(DEFAULT_TASK)

    @classmethod
    def to_restore(cls, config: AdaptationConfig, base: Encoder, side: Encoder | None = None) -> Self:
        """See :meth:`Adaptation.to_restore`; ``side`` is of the design that the side network was given in."""
        assert isinstance(config, SideTuningConfig)
        return cls(config, base, side, restored=True)

    def make_adapter(self) -> SideAdapter:
        """A side network and a fusion in their initial state."""
        config = self.config
        side = None if config.fusion == "base" else self._make_side()
        # Each shape costs a pass through a network, so it is asked for only where it matters.
        shape = None if config.fusion in ANY_SHAPE else self.base.encoder.output_shape(*PROBE)
        another = config.side_encoder is not None or self._designs[1] is not None
        if side is not None and another and config.fusion != "side":
            _check_shapes(self.base.encoder, side)
        earlier = len(self.adapters)
        fusion = make_fusion(
            config.fusion,
            shape,
            config.make_alpha(earlier) if config.fusion == "alpha" else None,
            earlier if config.stack == "dense" else 0,
        )
        pretrained = config.side_init in ("copy", "distilled")
        return SideAdapter(None if side is None else TrainableEncoder(side, pretrained), fusion)

    def _make_side(self) -> Encoder:
        config = self.config
        base, own = self._designs
        design = own if own is not None else base if config.side_encoder is None else None
        if design is None:
            side = make_encoder(config.side_encoder or config.encoder, config.channels, "random")
        else:
            side = copy.deepcopy(design)
            if config.side_init in ("random", "low_energy", "zero"):
                side.initialise()
        if config.side_init == "copy" and own is None:
            Encoder.load_tensors(side, self.base.encoder.state_dict(), "the base")
        elif config.side_weights is not None and not self._restored:
            path = weights_path(side.name, side.input_spec.channels, config.side_weights)
            side.load_tensors(read_weights(path).tensors, str(path))
        elif config.side_init == "low_energy":
            side.scale_outputs(LOW_ENERGY)
        elif config.side_init == "zero" and not self._restored:
            _silence(side)
        return side

    def start_task(self, task: str) -> None:
        """Begins or selects a task, see :meth:`Adaptation.start_task`."""
        super().start_task(task)
        self.train(self.training)

    def train(self, mode: bool = True) -> SideTuning:
        """Sets the mode of the current task; what belongs to others stays in evaluation mode."""
        super().train(mode)
        for name, adapter in self.adapters.items():
            if name != self.task:
                adapter.eval()
        return self

    @property
    def side(self) -> TrainableEncoder:
        """The current task's side network.

        Raises:
            ValueError: with fusion "base", which has none.
        """
        side = self.adapter.side
        if side is None:
            raise ValueError("fusion 'base' has no side network")
        return side  # type: ignore[return-value]

    @property
    def fusion(self) -> Fusion:
        """The current task's fusion."""
        return self.adapter.fusion  # type: ignore[return-value]

    @property
    def alpha(self) -> Tensor | None:
        """Weight of the base in the blend, a scalar in 0..1; None where the fusion is no blend."""
        return self.fusion.base_weight()

    def set_progress(self, samples: int, total: int) -> None:
        """Moves a scheduled alpha of the current task on, see :meth:`Adaptation.set_progress`."""
        self.fusion.set_progress(samples, total)

    def metrics(self) -> dict[str, float]:
        """Alpha, where the fusion is a blend."""
        alpha = self.alpha
        return {} if alpha is None else {"alpha": alpha.item()}

    def forward(self, image: Tensor, base_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """Base and side features fused, see :meth:`Adaptation.forward`."""
        config = self.config
        if config.fusion == "side":
            return self.side(image)
        frozen = self._frozen_features(image, base_features or {})
        base = frozen.pop(BASE)
        if config.fusion == "base":
            return base
        side = self.side(image)
        for name, features in ((BASE, base), *frozen.items()):
            if features.shape != side.shape:
                raise ValueError(
                    f"{name} features {tuple(features.shape)} and side features {tuple(side.shape)} differ "
                    "in shape; choose a side_encoder with the base's output, or check base_features"
                )
        if config.stack == "boosted":
            return self.fusion(self._boosted(base, frozen), side)
        return self.fusion(base, side, list(frozen.values()))

    def base_features(self, image: Tensor) -> dict[str, Tensor]:
        """The base's features and, in a stack, the side networks' of earlier tasks, as "side.TASK"."""
        return {} if self.config.fusion == "side" else self._frozen_features(image, {})

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the fused features, see :meth:`Adaptation.output_shape`."""
        if self.config.fusion == "side":
            return self.side.encoder.output_shape(height, width)
        base = self.base.encoder.output_shape(height, width)
        if self.config.fusion != "base":
            side = self.side.encoder.output_shape(height, width)
            if base != side:
                raise ValueError(f"base features {base} and side features {side} must have one shape")
        return base

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The side network, and the fusion apart: weight decay would only pull alpha towards 0.5."""
        learning = [(n, p) for n, p in self.adapter.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in learning if n.startswith("side.")], "weight_decay": weight_decay},
            {"params": [p for n, p in learning if n.startswith("fusion.")], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def _earlier(self) -> tuple[str, ...]:
        """The tasks that the current one builds on."""
        return () if self.config.stack == "single" else self.tasks[: self.tasks.index(self.task)]

    def _frozen_features(self, image: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is frozen for the current task, by name, base first; what is not in ``stored`` is computed."""
        found = {BASE: stored[BASE] if BASE in stored else self.base(image)}
        for task in self._earlier():
            name = f"side.{task}"
            if name in stored:
                found[name] = stored[name]
            else:
                with torch.no_grad():
                    found[name] = self.adapters[task].side(image).float()  # type: ignore[union-attr,operator]
        return found

    @torch.no_grad()
    def _boosted(self, base: Tensor, sides: Mapping[str, Tensor]) -> Tensor:
        """What the stages before the current one give together."""
        for task, side in zip(self._earlier(), sides.values(), strict=True):
            base = self.adapters[task].fusion(base, side).float()  # type: ignore[union-attr,operator]
        return base


def _check_shapes(base: Encoder, side: Encoder) -> None:
    """Refuses a side network whose features cannot have the base's shape.

    Where only one of them resizes its images, rows and columns depend on images that are not known yet.
    """
    shapes = base.output_shape(*PROBE), side.output_shape(*PROBE)
    comparable = (base.input_spec.size is None) == (side.input_spec.size is None)
    same = len({len(shape) for shape in shapes}) == len({feature_channels(shape) for shape in shapes}) == 1
    if not same or (comparable and shapes[0] != shapes[1]):
        raise ValueError(
            f"base {base.name!r} gives features {shapes[0]} and side {side.name!r} {shapes[1]}: they must "
            "have one shape; choose another side_encoder"
        )


def _silence(side: Encoder) -> None:
    """Makes the output of a side network exactly zero, if it can learn from there.

    A layer of zeros learns as long as gradients reach it, and the layers before it follow as soon as it has
    left zero. Before a ReLU none ever would.
    """
    side.scale_outputs(0.0)
    last = [p for name in side.output_layers for p in side.get_submodule(name).parameters()]
    mode = side.training
    side.eval()
    rows, columns = PROBE
    ramp = torch.linspace(0, 1, rows * columns, device=last[0].device).reshape(1, rows, columns, 1)
    with torch.enable_grad():
        output = side(side.preprocess(ramp.expand(-1, -1, -1, side.input_spec.channels)))
        gradients = torch.autograd.grad(output.sum(), last, allow_unused=True)
    side.train(mode)
    if not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
        raise ValueError(
            f"side_init 'zero' with {side.name!r}, which no gradient reaches at exactly zero, as its output "
            "ends in a ReLU: it would never learn; use 'low_energy'"
        )
