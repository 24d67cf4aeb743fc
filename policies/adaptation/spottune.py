"""SpotTune (Guo et al., CVPR 2019, arXiv:1811.08737): each image chooses the blocks that are fine-tuned.

Every block F of the frozen network has a trainable copy F^, and a small policy network decides from the image
which of the two computes: x_l = I_l(x) F^_l(x_{l-1}) + (1 - I_l(x)) F_l(x_{l-1}), with I_l in {0, 1}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from policies.adaptation.base import (
    DEFAULT_TASK,
    Adaptation,
    AdaptationConfig,
    FrozenEncoder,
    as_blocks,
)
from policies.adaptation.copies import detach_blocks, parameter_names, trainable_copy
from policies.adaptation.routing import PolicyNetwork, PolicyNorm, choose_path, choose_subset, gumbel
from policies.encoders import BlockEncoder, Encoder


@dataclass(frozen=True)
class SpotTuneConfig(AdaptationConfig):
    """Settings of SpotTune."""

    temperature: float = 5.0
    """Of the softmax through which routing learns; the authors' code keeps it at 5."""
    noise: bool = True
    """Whether routing is drawn in training (Gumbel noise), as published, and not the likeliest. In
    reinforcement learning the agent acts by the likeliest, so that with noise the network that learns is not
    the one that acted and PPO's ratio does not start at 1; without noise nothing explores other routes.
    `navagent train adaptation=spottune` sets it to false."""
    evaluation: Literal["argmax", "sample"] = "argmax"
    """Routes in evaluation: the likeliest, or drawn, as the authors' code does."""
    global_k: int | None = None
    """Fine-tunes the same blocks for every image, this many and the best ones; None routes each image."""
    policy_width: int = 8
    """Channels of the policy network's first convolution; 32 is the authors', with 1.2 million parameters."""
    policy_size: int = 32
    """Rows and columns to which the policy network's images are averaged down; 64 is the authors'."""
    policy_norm: PolicyNorm = "group"
    """Normalisation in the policy network: "batch" is the authors'; with it, routes in training depend on the
    batch and are not those of evaluation."""
    policy_rate: float = 1.0
    """Learning rate of what chooses the routes, as a multiple of the blocks', above 0; the authors' is 0.1,
    for SGD. Plain stable_baselines3 algorithms give all parameters one rate."""
    train_ends: bool = False
    """Whether what comes before and after the blocks learns too, as a copy; the authors' does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"SpotTune temperature {self.temperature}: expected a value above 0")
        if not self.policy_rate > 0:
            raise ValueError(f"SpotTune policy_rate {self.policy_rate}: expected a value above 0")
        for name, least in (("policy_width", 1), ("policy_size", 8)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"SpotTune {name} {value}: expected at least {least}")
        if self.global_k is not None:
            if self.global_k < 1:
                raise ValueError(f"SpotTune global_k {self.global_k}: expected at least 1 block, or None")
            if self.evaluation == "sample":
                raise ValueError(
                    f"SpotTune evaluation 'sample' with global_k {self.global_k}: every image takes the "
                    "same blocks, so there is nothing to draw; use evaluation 'argmax'"
                )


class SpotTuneAdapter(nn.Module):
    """What SpotTune trains for one task: copies of the blocks, and what chooses among them.

    Copies keep the BatchNorm statistics they were pre-trained with, as
    :class:`~policies.adaptation.base.TrainableEncoder` does and for its reason.
    """

    def __init__(self, config: SpotTuneConfig, copied: BlockEncoder) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(detach_blocks(copied))
        self.ends: BlockEncoder | None = copied if config.train_ends else None
        self.policy: PolicyNetwork | None = None
        if config.global_k is None:
            self.policy = PolicyNetwork(
                copied.input_spec.channels,
                len(self.blocks),
                config.policy_width,
                config.policy_size,
                config.policy_norm,
            )
        else:
            self.logits = nn.Parameter(torch.zeros(len(self.blocks)))

    def train(self, mode: bool = True) -> SpotTuneAdapter:
        """Sets the mode of all layers but pre-trained BatchNorm ones."""
        super().train(mode)
        for part in (self.blocks, self.ends):
            for module in part.modules() if part is not None else ():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


class SpotTune(Adaptation):
    """A frozen base whose blocks may each be exchanged for a fine-tuned copy.

    In training both paths are computed and mixed, so that routing learns too. In evaluation each image passes
    one path of each block, and the other is not computed for it.

    Frozen means frozen: in the authors' code the BatchNorm layers of the frozen path go on to learn, and here
    they do not. The blocks' copies start as the base, so that at first the output is the base's, whatever the
    routes.

    With ``global_k`` one vector of logits, shared by all images, takes the policy network's place, and
    exactly k blocks are fine-tuned. The released code lacks this variant; how it learns here is our choice, a
    straight-through draw without replacement, see :func:`~policies.adaptation.routing.choose_subset`. All
    copies learn in training; only the chosen k are computed in evaluation and are in :meth:`delta`. The other
    copies of a loaded method are the base's blocks again.

    Nothing is stored for a rollout: routes depend on parameters that learn, and what precedes the first
    route, the stem, is less to compute than to keep. It is a single layer, and for 64 x 64 pixels gives 33 kB
    in ``resnet_small`` for an image of 12 kB.
    """

    config_class: ClassVar[type[AdaptationConfig]] = SpotTuneConfig
    recomputed: ClassVar[str] = "what learns chooses the routes"
    config: SpotTuneConfig

    def __init__(self, config: SpotTuneConfig, base: Encoder | None = None) -> None:
        super().__init__(config)
        encoder = as_blocks(base or config.make_encoder(), "SpotTune")
        number = len(encoder.blocks)
        if config.global_k is not None and config.global_k > number:
            raise ValueError(
                f"SpotTune global_k {config.global_k}: encoder {encoder.name!r} has {number} blocks"
            )
        self._learned = parameter_names(encoder)
        self.base = FrozenEncoder(encoder)
        self._tuned_share: Tensor | None = None
        self.start_task(DEFAULT_TASK)

    def make_adapter(self) -> SpotTuneAdapter:
        """Copies of the base's blocks, and a policy network with random weights."""
        return SpotTuneAdapter(self.config, trainable_copy(self._frozen, self._learned))

    @property
    def adapter(self) -> SpotTuneAdapter:
        """What the current task trains."""
        return self.adapters[self.task]  # type: ignore[return-value]

    @property
    def _frozen(self) -> BlockEncoder:
        return as_blocks(self.base.encoder, "SpotTune")

    def forward(self, image: Tensor, base_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """Features of the chosen blocks, see :meth:`Adaptation.forward`."""
        pixels = self._frozen.preprocess(image)
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            routes = self._routes(pixels)
        ends = self.adapter.ends or self._frozen
        paths = list(zip(self._frozen.blocks, self.adapter.blocks, strict=True))
        x = ends.stem(pixels)
        if self.training:
            self._tuned_share = routes.detach().mean()
            for route, (frozen, tuned) in zip(routes.unbind(1), paths, strict=True):
                x = _mix(route, frozen(x), tuned(x))
        elif torch.compiler.is_exporting():
            # What an exported graph computes is the same for every image: both paths.
            for route, (frozen, tuned) in zip(routes.unbind(1), paths, strict=True):
                x = _mix(route, frozen(x), tuned(x))
        else:
            for rows, (frozen, tuned) in zip(_rows(routes), paths, strict=True):
                x = _one_path_each(rows, frozen, tuned, x)
        return ends.neck(x)

    def routes(self, image: Tensor) -> Tensor:
        """The path of each image (N, H, W, C) through each block: (N, L), 1 fine-tuned, 0 frozen.

        Drawn anew by each call where routes are drawn, and with the gradient that routing learns by.
        """
        return self._routes(self._frozen.preprocess(image))

    def _routes(self, pixels: Tensor) -> Tensor:
        config, adapter = self.config, self.adapter
        drawn = config.noise if self.training else config.evaluation == "sample"
        if adapter.policy is not None:
            logits = adapter.policy(pixels).float()
            return choose_path(logits, config.temperature, _noise(logits) if drawn else None)
        assert config.global_k is not None
        noise = _noise(adapter.logits) if drawn else None
        chosen = choose_subset(adapter.logits, config.global_k, config.temperature, noise)
        return chosen.expand(len(pixels), -1)

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the base's features."""
        return self.base.encoder.output_shape(height, width)

    def noises(self) -> list[str]:
        """See :meth:`Adaptation.noises`."""
        drawn = self.config.noise or self.config.evaluation == "sample"
        return [*super().noises(), *["routes are drawn"] * drawn]

    def metrics(self) -> dict[str, float]:
        """Share of the newest training batch's passes through blocks that took the fine-tuned copy."""
        return {} if self._tuned_share is None else {"tuned_share": float(self._tuned_share)}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The blocks, and what chooses among them apart, for its learning rate.

        The logits of ``global_k`` do not decay, which would only make them all alike.
        """
        policy = self.adapter.policy
        choosing = [self.adapter.logits] if policy is None else list(policy.parameters())
        ids = {id(parameter) for parameter in choosing}
        return [
            {
                "params": [p for p in self.trainable_parameters() if id(p) not in ids],
                "weight_decay": weight_decay,
            },
            {
                "params": choosing,
                "weight_decay": 0.0 if policy is None else weight_decay,
                "lr_scale": self.config.policy_rate,
            },
        ]

    def chosen_blocks(self, task: str | None = None) -> list[int]:
        """With ``global_k``, the blocks that a task (None: the current one) fine-tunes, in their order."""
        if self.config.global_k is None:
            raise ValueError("without global_k each image chooses its own blocks; see routes(image)")
        logits = dict(self._adapters())[task or self.task].logits.detach()
        return choose_subset(logits, self.config.global_k, 1.0).nonzero().flatten().tolist()

    def delta(self) -> dict[str, Tensor]:
        """What the method adds to its base; with ``global_k`` the chosen copies alone."""
        full = super().delta()
        if self.config.global_k is None:
            return full
        unchosen = tuple(
            f"adapters.{task}.blocks.{index}."
            for task, adapter in self._adapters()
            for index in set(range(len(adapter.blocks))) - set(self.chosen_blocks(task))
        )
        return {name: value for name, value in full.items() if not name.startswith(unchosen)}

    def load_delta(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`delta` gave, see :meth:`Adaptation.load_delta`."""
        if self.config.global_k is None:
            super().load_delta(tensors)
            return
        # The logits say of which copies the rest should be.
        before = {f"adapters.{task}.logits": adapter.logits.clone() for task, adapter in self._adapters()}
        given = {n: tensors[n] for n, v in before.items() if n in tensors and tensors[n].shape == v.shape}
        self.load_state_dict(given, strict=False)
        try:
            super().load_delta(tensors)
        except ValueError:
            self.load_state_dict(before, strict=False)
            raise
        for task, adapter in self._adapters():
            for index, frozen in enumerate(self._frozen.blocks):
                if index not in self.chosen_blocks(task):
                    adapter.blocks[index].load_state_dict(frozen.state_dict())

    def _adapters(self) -> Iterator[tuple[str, SpotTuneAdapter]]:
        for task, adapter in self.adapters.items():
            assert isinstance(adapter, SpotTuneAdapter)
            yield task, adapter


def _noise(logits: Tensor) -> Tensor:
    return gumbel(torch.rand_like(logits))


def _mix(route: Tensor, frozen: Tensor, tuned: Tensor) -> Tensor:
    """Each row of ``tuned`` where ``route`` (N,) is 1, and of ``frozen`` where it is 0.

    The paper adds the shortcut outside of the sum, x_l = I F^(x) + (1 - I) F(x) + x. Here, as in the authors'
    code, both paths are whole blocks, each with its shortcut and last ReLU. The values are the same, since I
    is 0 or 1 and the shortcut counts once. So is the gradient of I, which multiplies the difference of the
    paths, where blocks end in the sum; where they end in a ReLU, it is the difference behind that.
    """
    weight = route.to(frozen.dtype).view(-1, *[1] * (frozen.dim() - 1))
    return frozen * (1 - weight) + tuned * weight


def _rows(routes: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each block, which rows of the batch take the frozen path and which the fine-tuned one."""
    # One copy to the CPU, where asking how many rows there are does not wait for the device at each block.
    decisions = (routes > 0.5).cpu()
    return [
        ((~decision).nonzero().flatten().to(routes.device), decision.nonzero().flatten().to(routes.device))
        for decision in decisions.unbind(1)
    ]


def _one_path_each(rows: tuple[Tensor, Tensor], frozen: nn.Module, tuned: nn.Module, x: Tensor) -> Tensor:
    """The block's output for ``x`` (N, ...), each row computed by its own path alone."""
    if len(rows[1]) == 0:
        return frozen(x)
    if len(rows[0]) == 0:
        return tuned(x)
    parts = torch.cat((frozen(x.index_select(0, rows[0])), tuned(x.index_select(0, rows[1]))))
    return parts.index_select(0, torch.argsort(torch.cat(rows)))
