"""From an observation to one vector: adapted image features, goal, pose and previous action.

:class:`AdaptedExtractor` is a Stable-Baselines3 features extractor, so that a plain ``PPO`` can use an
adapted encoder:

    >>> from stable_baselines3 import PPO
    >>> PPO("MultiInputPolicy", env, policy_kwargs=dict(
    ...     features_extractor_class=AdaptedExtractor,
    ...     features_extractor_kwargs=dict(adaptation="sidetune")))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from policies.adaptation import Adaptation, make_adaptation

BLIND = "blind"
"""The adaptation without eyes: images are ignored, so that what vision is worth can be measured."""

POLAR_GOALS = ("pointgoal_with_gps_compass", "pointgoal")
"""Goal sensors that give distance [m] and angle [rad]."""

EMBEDDING = 32
"""Features of every sensor that is not an image, as in Habitat's baselines."""


MID_LEVEL_CHANNELS = 8
"""Channels of the maps that mid-level encoders give, such as Taskonomy's."""

COMPRESSED = 2048
"""Values to which maps of more channels are compressed, about; those of an 8 x 16 x 16 map."""


class TransferHead(nn.Module):
    """A small trainable bridge from adapted features to the policy, which ends in one linear layer.

    Before it, maps of up to 8 channels pass two residual 3x3 convolutions, side-tuning's transfer network
    (1,168 parameters for 8 channels). Maps of more channels pass a compression layer as in the policies of
    Habitat's baselines and of VC-1 (Majumdar et al., arXiv:2303.18240): a 3x3 convolution to as many channels
    as make about 2048 values, GroupNorm and ReLU. Tokens pass the same layer, each by itself, for their order
    says nothing of their places, and to no more channels than they have. Vectors pass the linear layer alone.

    Args:
        shape: of one image's features: (C, h, w), (T, D) or (C,).
        features: what they become.
    """

    def __init__(self, shape: tuple[int, ...], features: int) -> None:
        super().__init__()
        self.transfer: nn.ModuleList | None = None
        self.compression: nn.Sequential | None = None
        if len(shape) == 2:
            shape, self.compression = _compression(shape[1], (shape[0], 1), 1)
        elif len(shape) == 3 and shape[0] > MID_LEVEL_CHANNELS:
            shape, self.compression = _compression(shape[0], shape[1:], 3)
        elif len(shape) == 3:
            channels = shape[0]
            self.transfer = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.compress = nn.Linear(torch.Size(shape).numel(), features)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, features) of (N, C, h, w), (N, T, D) or (N, C)."""
        if self.compression is not None:
            x = self.compression(x.mT.unsqueeze(3) if x.dim() == 3 else x).flatten(1)
        elif self.transfer is not None:
            skip = x
            for conv in self.transfer:
                x = F.relu(conv(x))
            x = (x + skip).flatten(1)
        return F.relu(self.compress(x))


def _compression(
    channels: int, places: tuple[int, ...], kernel: int
) -> tuple[tuple[int, ...], nn.Sequential]:
    """A layer to about 2048 values, and the shape (C, h, w) that it gives for so many rows and columns."""
    chosen = max(1, round(COMPRESSED / (places[0] * places[1])))
    if kernel == 1:
        chosen = min(chosen, channels)
    layer = nn.Sequential(
        nn.Conv2d(channels, chosen, kernel, padding=kernel // 2, bias=False),
        nn.GroupNorm(1, chosen),
        nn.ReLU(),
    )
    return (chosen, *places), layer


class PolarGoal(nn.Module):
    """Embeds a goal at a distance and an angle, finely where the agent has to decide whether to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, EMBEDDING)

    def forward(self, goal: Tensor) -> Tensor:
        """Features (N, 32) of goals (N, 2): distance [m] and angle [rad]."""
        rho, phi = goal[:, 0].clamp(min=0), goal[:, 1]
        # One scale for far, middle and near: 10 m, 1 m, and the 0.2 m within which an episode succeeds. The
        # last is that border itself: millimetres decide there, which smooth scales alone take long to tell.
        scales = (rho / 10.0, torch.log1p(rho), torch.exp(-rho / 0.2), torch.sigmoid((0.2 - rho) / 0.002))
        return self.linear(torch.stack((*scales, torch.cos(phi), torch.sin(phi)), dim=1))


class Compass(nn.Module):
    """Embeds a heading without the jump at half a turn."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, EMBEDDING)

    def forward(self, heading: Tensor) -> Tensor:
        """Features (N, 32) of headings (N, 1) [rad]."""
        return self.linear(torch.cat((torch.cos(heading), torch.sin(heading)), dim=1))


class DiscreteEmbedding(nn.Module):
    """Embeds an index, given as such or one-hot, as Stable-Baselines3 hands it to an extractor."""

    def __init__(self, space: spaces.Discrete) -> None:
        super().__init__()
        self.first = int(space.start)
        self.embedding = nn.Embedding(int(space.n), EMBEDDING)

    def forward(self, index: Tensor) -> Tensor:
        """Features (N, 32) of indices (N,) or one-hot vectors (N, n) or (N, 1, n)."""
        if index.is_floating_point():
            return index.flatten(1) @ self.embedding.weight
        return self.embedding(index.long().reshape(-1) - self.first)


class AdaptedExtractor(BaseFeaturesExtractor):
    """Stable-Baselines3 features extractor around adapted encoders.

    Every image in the observation gets an encoder and an adaptation of its own, chosen by its channels.
    Images may come as (N, H, W, C) or, where the observation space says so, (N, C, H, W); uint8, or float
    with values in 0..1.

    Args:
        observation_space: a ``Dict``, or a ``Box`` that is one image.
        encoder: name of the encoder, see :data:`policies.encoders.ENCODERS`.
        weights: its weights, "default", "random" or a path; or one of these for each image by its name.
            None leaves it to the method.
        adaptation: name of the method, see :data:`policies.adaptation.ADAPTATIONS`, or "blind".
        adaptation_options: further settings of the method.
        image_features: length of the vector each image becomes.
        restored: whether all weights are going to come from a saved state, so that no file of weights is
            read.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        encoder: str = "fcn5_small",
        weights: str | Mapping[str, str] | None = None,
        adaptation: str = "sidetune",
        adaptation_options: Mapping[str, Any] | None = None,
        image_features: int = 256,
        restored: bool = False,
    ) -> None:
        parts = (
            dict(observation_space.spaces)
            if isinstance(observation_space, spaces.Dict)
            else {"image": observation_space}
        )
        blind = adaptation == BLIND
        images = {k: s for k, s in parts.items() if isinstance(s, spaces.Box) and len(s.shape) == 3}
        vectors = {k: s for k, s in parts.items() if k not in images}
        dims = len(vectors) * EMBEDDING + (0 if blind else len(images) * image_features)
        if dims == 0:
            raise ValueError(
                f"nothing to see or sense in {observation_space}; a blind agent needs at least a goal sensor"
            )
        super().__init__(observation_space, dims)
        self.adaptations = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.embeddings = nn.ModuleDict()
        self._channels_first: dict[str, bool] = {}
        for key, space in {} if blind else images.items():
            height, width, channels, self._channels_first[key] = _image_layout(key, space.shape)
            options = {"encoder": encoder, "channels": channels, **(adaptation_options or {})}
            chosen = weights.get(key) if isinstance(weights, Mapping) else weights
            if chosen is not None:
                options["weights"] = chosen
            method = make_adaptation(adaptation, restored=restored, **options)
            self.adaptations[key] = method
            self.heads[key] = TransferHead(method.output_shape(height, width), image_features)
        self.image_dims = len(self.adaptations) * image_features
        """How many of the features, the first ones, are of images."""
        for key, sensor in vectors.items():
            self.embeddings[key] = _embedding(key, sensor)
        for module in (*self.heads.modules(), *self.embeddings.modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.orthogonal_(module.weight, gain=2**0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def apply(self, fn: Callable[[nn.Module], None]) -> AdaptedExtractor:
        """Leaves all weights as they are.

        Stable-Baselines3 initialises a whole policy anew through this method, pre-trained networks included.
        Heads and embeddings are orthogonal from the start, as it would make them.
        """
        return self

    def forward(
        self, observations: Tensor | dict[str, Tensor], frozen: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Features (N, features_dim).

        Args:
            observations: by name, each (N, ...).
            frozen: what :meth:`frozen_features` gave for these observations, to not compute it again.
        """
        observed = self._by_name(observations)
        features = []
        for key, method in self.adaptations.items():
            own = f"{key}/"
            stored = {n.removeprefix(own): v for n, v in (frozen or {}).items() if n.startswith(own)}
            adapted = method(self._image(key, observed[key]), stored or None)
            features.append(self.heads[key](adapted))
        for key, embedding in self.embeddings.items():
            value = observed[key]
            features.append(embedding(value if isinstance(embedding, DiscreteEmbedding) else value.float()))
        return torch.cat(features, dim=1)

    def frozen_features(self, observations: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
        """What learning never changes, each (N, ...) float32, as "image/feature"; empty if nothing."""
        observed = self._by_name(observations)
        found = {}
        for key, method in self._methods():
            for name, value in method.base_features(self._image(key, observed[key])).items():
                found[f"{key}/{name}"] = value
        return found

    def penalty(self) -> Tensor:
        """What the methods add to the training loss: ()."""
        penalties = [method.penalty() for _, method in self._methods()]
        return torch.stack(penalties).sum() if penalties else torch.zeros(())

    def set_progress(self, samples: int, total: int) -> None:
        """Tells the methods how far training is, see :meth:`Adaptation.set_progress`."""
        for _, method in self._methods():
            method.set_progress(samples, total)

    def noises(self) -> dict[str, list[str]]:
        """What makes the network that learns differ from the one that acted, by image, if anything does."""
        return {key: found for key, method in self._methods() if (found := method.noises())}

    def metrics(self) -> dict[str, float]:
        """What is worth watching while the methods learn, as "image/name"."""
        return {
            f"{key}/{name}": value
            for key, method in self._methods()
            for name, value in method.metrics().items()
        }

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups: each adaptation's own, and one for heads and embeddings."""
        groups: list[dict[str, Any]] = []
        for _, method in self._methods():
            groups += method.parameter_groups(weight_decay)
        rest = [*self.heads.parameters(), *self.embeddings.parameters()]
        return [*groups, {"params": rest, "weight_decay": weight_decay}]

    def _methods(self) -> Iterator[tuple[str, Adaptation]]:
        for key, method in self.adaptations.items():
            assert isinstance(method, Adaptation)
            yield key, method

    def _by_name(self, observations: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
        return {"image": observations} if isinstance(observations, Tensor) else observations

    def _image(self, key: str, image: Tensor) -> Tensor:
        return image.permute(0, 2, 3, 1) if self._channels_first[key] else image


def _image_layout(key: str, shape: tuple[int, ...]) -> tuple[int, int, int, bool]:
    """Height, width, channels and whether channels come first."""
    if shape[2] in (1, 3):
        return shape[0], shape[1], shape[2], False
    if shape[0] in (1, 3):
        return shape[1], shape[2], shape[0], True
    raise ValueError(f"observation {key!r} has shape {shape}; expected an image with 1 or 3 channels")


def _embedding(key: str, space: spaces.Space[Any]) -> nn.Module:
    if isinstance(space, spaces.Discrete):
        return DiscreteEmbedding(space)
    if isinstance(space, spaces.Box) and len(space.shape) == 1:
        if key in POLAR_GOALS and space.shape == (2,):
            return PolarGoal()
        if key == "compass" and space.shape == (1,):
            return Compass()
        return nn.Linear(space.shape[0], EMBEDDING)
    raise ValueError(f"observation {key!r} is {space}; expected an image, a vector or a discrete value")
