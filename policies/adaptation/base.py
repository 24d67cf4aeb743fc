"""The interface of every method that adapts a perception encoder, and the frozen network they start from."""

from __future__ import annotations

import copy
import dataclasses
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from policies.adaptation.substitution import TaskNormalisation
from policies.encoders import BlockEncoder, Encoder, make_encoder
from policies.encoders.base import device_of
from policies.weights import tensors_sha256

DEFAULT_TASK = "task"
"""Name of the first task, the only one outside of incremental learning."""

BASE = "base"
"""Name of the base's output among stored features."""


@dataclass(frozen=True)
class AdaptationConfig:
    """Which encoder a method adapts. Each method extends this with its own settings."""

    encoder: str = "fcn5_small"
    """Name of the encoder, see :data:`policies.encoders.ENCODERS`."""
    weights: str = "default"
    """Pre-trained weights: "default", "random", a name in the catalogue, or the path of a file."""
    channels: int = 3
    """Input channels: 3 for colour, 1 for depth."""

    def __post_init__(self) -> None:
        """Refuses words that a setting does not list, and numbers that are not finite."""
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if typing.get_origin(hint) is typing.Literal and value not in typing.get_args(hint):
                listed = ", ".join(typing.get_args(hint))
                raise ValueError(f"{field.name} {value!r}: expected one of {listed}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name} {value}: expected a finite number")

    def make_encoder(self) -> Encoder:
        """The encoder with its pre-trained weights."""
        return make_encoder(self.encoder, self.channels, self.weights)


class FrozenEncoder(nn.Module):
    """An encoder that nothing can train: always in evaluation mode, its weights no parameters.

    The weights become buffers. So ``requires_grad_(True)`` or ``train()`` on a module around this one cannot
    thaw it, and an optimiser over ``parameters()`` never sees them, while ``state_dict`` still holds them.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).eval()
        for module in self.encoder.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach().clone())
        super().train(False)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stays in evaluation mode whatever is asked."""
        return self

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Features, float32, of images (N, H, W, channels) as sensors give them; without gradients.

        Methods that work inside of the network use :attr:`encoder`, through which gradients flow.
        """
        return self.encoder(self.encoder.preprocess(image)).float()

    def sha256(self) -> str:
        """SHA-256 of the weights, by name, type, shape and bytes: 64 hexadecimal digits."""
        return tensors_sha256(self.encoder.state_dict())


class TrainableEncoder(nn.Module):
    """An encoder that learns, on images as sensors give them.

    Args:
        encoder: the network.
        keep_statistics: whether BatchNorm layers keep the statistics they were pre-trained with. Without
            it, the network that learns would differ from the one that acted, and PPO's ratio would not start
            at 1.
    """

    def __init__(self, encoder: Encoder, keep_statistics: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self._keep_statistics = keep_statistics

    def train(self, mode: bool = True) -> TrainableEncoder:
        """Sets the mode of all layers but pre-trained BatchNorm ones."""
        super().train(mode)
        if self._keep_statistics:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Features of images (N, H, W, channels)."""
        return self.encoder(self.encoder.preprocess(image))


class Adaptation(nn.Module, ABC):
    """From images to features that suit the task, by one method.

    What one task learns is one module in :attr:`adapters`; the frozen base beside it, if the method has one,
    is :attr:`base`. Most uses have the one task that a new object starts with. For tasks in sequence,
    :meth:`start_task` begins the next: the optimiser has to be made anew then, since only the parameters of
    the task that was started last learn.

    A subclass sets :attr:`base` (or other networks that tasks share), then starts :data:`DEFAULT_TASK`.
    """

    config_class: ClassVar[type[AdaptationConfig]] = AdaptationConfig
    """The method's settings."""
    several_tasks: ClassVar[bool] = True
    """Whether the method keeps what one task learned apart from the next."""
    needs_earlier_task: ClassVar[bool] = False
    """Whether the method is full fine-tuning unless it learned, or was told the losses of, a task before."""
    recomputed: ClassVar[str] = "its features depend on what learns"
    """Why :meth:`base_features` gives nothing to store, where it gives nothing; for the log."""
    base: FrozenEncoder
    """The frozen encoder; absent where the method has none."""

    def __init__(self, config: AdaptationConfig, *, restored: bool = False) -> None:
        super().__init__()
        self.config = config
        # Whether all weights are still to come from a saved state.
        self._restored = restored
        self.adapters = nn.ModuleDict()
        self.task = ""

    @classmethod
    def to_restore(cls, config: AdaptationConfig, base: Encoder) -> Self:
        """The method before :meth:`load_state_dict` or :meth:`load_delta` gives it all of its weights.

        It has the settings that it was begun with, since some of them say how it goes on. The files that they
        name are not read, and weights are not looked at before they are there.

        Args:
            config: the settings.
            base: a network of the base's design, whatever its weights.
        """
        return cls(config, base)  # type: ignore[call-arg,arg-type]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._restored = False

    @abstractmethod
    def make_adapter(self) -> nn.Module:
        """What a new task trains, in its initial state."""

    def __call__(self, image: Tensor, base_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """Calls :meth:`forward`.

        Raises:
            ValueError: if stored features are not of as many images as are given.
        """
        for name, value in (base_features or {}).items():
            if len(value) != len(image):
                raise ValueError(
                    f"stored features {name!r} of shape {tuple(value.shape)} with images of shape "
                    f"{tuple(image.shape)}: expected what base_features gave for these {len(image)} images"
                )
        return super().__call__(image, base_features or None)

    @abstractmethod
    def forward(self, image: Tensor, base_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """Features adapted to the current task.

        Args:
            image: (N, H, W, C) uint8, or float with values in 0..1.
            base_features: what :meth:`base_features` gave for these images, to not compute it again; nothing,
                or None, computes all of it.

        Returns:
            (N, C, h, w), (N, T, D) or (N, C).
        """

    @abstractmethod
    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one image's adapted features for images of height x width pixels."""

    def base_features(self, image: Tensor) -> dict[str, Tensor]:
        """What never changes for an image and so can be stored: float32, by name; may be empty."""
        return {}

    @property
    def adapter(self) -> nn.Module:
        """What the current task trains."""
        return self.adapters[self.task]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks begun so far, in their order."""
        return tuple(self.adapters)

    def start_task(self, task: str) -> None:
        """Makes ``task`` the one that is computed and that learns; a new name begins a new task.

        Gradients of the other tasks are dropped: an optimiser that still held them would go on to move them.

        Raises:
            ValueError: for a second task where the method has but one, or a name that cannot be stored.
        """
        if task not in self.adapters:
            check_task_name(task)
            if self.adapters and not self.several_tasks:
                raise ValueError(
                    f"{type(self).__name__} adapts to one task, {self.task!r}; "
                    f"make another object for {task!r}"
                )
            adapter = self.make_adapter().train(self.training)
            self.adapters[task] = adapter.to(device_of(self))
        self.task = task
        for name, other in self.adapters.items():
            for parameter in other.parameters():
                parameter.requires_grad_(name == task)
                parameter.grad = None if name != task else parameter.grad

    def finish_task(self, losses: Iterable[Tensor]) -> None:
        """Ends the training of the current task, for methods that note which parameters mattered for it.

        Args:
            losses: scalar losses, one each for samples of the task's data, connected to the parameters.
        """

    def penalty(self) -> Tensor:
        """A term that the training loss has to include: (), 0 for most methods."""
        return torch.zeros((), device=device_of(self))

    def set_progress(self, samples: int, total: int) -> None:
        """Tells how far training is, for methods with a schedule: ``samples`` of ``total`` were learned from.

        Called between updates, never between the collecting of samples and the learning from them.
        """

    def noises(self) -> list[str]:
        """What makes an image's features in training others than in evaluation, in words; mostly nothing.

        In reinforcement learning the network that learns is then not quite the one that acted.
        """
        mode = self.training
        self.train()
        learning = [module for module in self.modules() if module.training]
        self.train(mode)
        found = []
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in learning) or any(
            isinstance(m, TaskNormalisation) and m.by_batch for m in learning
        ):
            found.append("BatchNorm takes its statistics from the batch")
        if any(
            (isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0)
            or (isinstance(m, nn.MultiheadAttention) and m.dropout > 0)
            for m in learning
        ):
            found.append("dropout leaves inputs out at random")
        return found

    def metrics(self) -> dict[str, float]:
        """What is worth watching while the method learns, by name: alpha, or the share of a mask."""
        return {}

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that learning changes."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups of the trainable parameters; methods exempt from decay what it would distort.

        A group may have an "lr_scale", see :func:`set_learning_rate`.
        """
        return [{"params": list(self.trainable_parameters()), "weight_decay": weight_decay}]

    def delta(self) -> dict[str, Tensor]:
        """What the method adds to its base, as it is stored: its state without the frozen encoder."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("base.")}

    def load_delta(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`delta` gave, on the same base and with the same tasks begun.

        Raises:
            ValueError: if the tensors are not those of this method and setting.
        """
        own = self.delta()
        faults = [f"missing {name}" for name in own if name not in tensors]
        faults += [f"unexpected {name}" for name in tensors if name not in own]
        faults += [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
            for name, value in own.items()
            if name in tensors and tensors[name].shape != value.shape
        ]
        if faults:
            raise ValueError(f"these tensors do not fit {type(self).__name__}: {'; '.join(faults[:4])}")
        self.load_state_dict(dict(tensors), strict=False)


class WholeEncoder(Adaptation):
    """What fine-tuning and training from scratch share: an encoder, all of which learns."""

    recomputed: ClassVar[str] = "all of its encoder learns"

    @property
    def network(self) -> TrainableEncoder:
        """The encoder of the current task."""
        network = self.adapter
        assert isinstance(network, TrainableEncoder)
        return network

    def forward(self, image: Tensor, base_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """The encoder's features, see :meth:`Adaptation.forward`."""
        return self.network(image)

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the encoder's features."""
        return self.network.encoder.output_shape(height, width)


def check_task_name(task: str) -> None:
    """Refuses a task's name that no state could hold.

    Raises:
        ValueError: for an empty name, one with dots, or one that torch's containers have for themselves.
    """
    if not task or "." in task or hasattr(nn.ModuleDict(), task):
        raise ValueError(f"task {task!r}: expected a name without dots, and none of torch's own words")


def set_learning_rate(groups: Iterable[dict[str, Any]], rate: float) -> None:
    """Gives every group of an optimiser ``rate`` times its "lr_scale", which is 1 where it has none."""
    for group in groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def as_blocks(encoder: Encoder, method: str) -> BlockEncoder:
    """The encoder, if it has blocks for ``method`` to work on.

    Raises:
        ValueError: if it has none.
    """
    if not isinstance(encoder, BlockEncoder):
        raise ValueError(
            f"{method} works block by block, and encoder {encoder.name!r} has none; choose a residual "
            "network or a vision transformer"
        )
    return encoder
