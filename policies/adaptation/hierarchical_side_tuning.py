"""Hierarchical side-tuning (Lin et al., arXiv:2310.05393): a pyramid beside a frozen vision transformer.

Every block of the transformer gets one fresh learned token, the Meta-Register, that gathers what the task
needs and is read behind the block. Registers and patch features pass small bridges into a side network
(:mod:`policies.adaptation.side_network`) that makes maps at strides 4, 8, 16 and 32 of them. The
normalisations of the transformer's blocks are tuned too, as copies of the task's own. Both sit inside of the
network, so that gradients traverse the whole backbone: the method is sparing with parameters, not with
memory, and there is nothing to store for an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.adaptation.base import DEFAULT_TASK, Adaptation, AdaptationConfig, FrozenEncoder
from policies.adaptation.layout import VectorBatchNorm
from policies.adaptation.side_network import DropPath, SideNetwork, SideNorm
from policies.encoders import Encoder
from policies.encoders.vit import TransformerBlock, VisionTransformer

STAGES = 4
"""Stages of the side network: strides 4, 8, 16 and 32."""


@dataclass(frozen=True)
class HierarchicalSideTuningConfig(AdaptationConfig):
    """Settings of hierarchical side-tuning."""

    dims: str = "32,48,64,72"
    """Channels of the four maps; the authors' for recognition."""
    heads: str = "2,4,8,12"
    """Heads of the cross-attention in each stage; they divide its channels."""
    depths: str | None = None
    """Blocks of the transformer that each stage draws on, such as "3,3,3,3", the authors'; None shares them
    out evenly, the earlier stages first."""
    registers: int = 1
    """Meta-Registers a block. The authors saw no gain from more."""
    output: Literal["pooled", "map"] = "pooled"
    """The mean of the coarsest map, or all four maps side by side at stride 8."""
    norm: SideNorm = "group"
    """Normalisation in the stem and of the pooled output: each image by itself, or "batch" as published. With
    that one, features in training depend on the batch and are not those of evaluation: it suits supervised
    learning, while in PPO the network that learns would not be the one that acted."""
    drop_path: float = 0.0
    """Rate at which the last blocks of both networks are left out in training, in 0..1 without 1; 0, 0.1 and
    0.2 are the authors'. Like "batch", for supervised learning only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        dims, heads = _numbers("dims", self.dims), _numbers("heads", self.heads)
        for dim, count in zip(dims, heads, strict=True):
            if dim % count:
                raise ValueError(f"heads {self.heads!r} with dims {self.dims!r}: {count} do not divide {dim}")
        if self.depths is not None:
            _numbers("depths", self.depths)
        if self.registers < 1:
            raise ValueError(f"registers {self.registers}: expected at least 1")
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path {self.drop_path}: expected a rate in 0..1, below 1")

    def stage_depths(self, blocks: int) -> tuple[int, ...]:
        """How many of a transformer's blocks each stage draws on.

        Raises:
            ValueError: if they do not add up, or are too few to share out.
        """
        if self.depths is None:
            if blocks < STAGES:
                raise ValueError(
                    f"hierarchical side-tuning needs a transformer of {STAGES} blocks or more, got {blocks}"
                )
            return tuple((blocks + STAGES - 1 - stage) // STAGES for stage in range(STAGES))
        depths = _numbers("depths", self.depths)
        if sum(depths) != blocks:
            raise ValueError(
                f"depths {self.depths!r} make {sum(depths)}: expected all {blocks} blocks of the encoder"
            )
        return depths


def _numbers(name: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != STAGES or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} {text!r}: expected {STAGES} whole numbers above 0, such as '1,2,3,4'")
    return tuple(int(part) for part in parts)


class TunedBlock(nn.Module):
    """What a task adds to one block of the transformer: registers, and normalisations of its own.

    Args:
        block: the frozen block, whose normalisations are copied.
        registers: number of registers.
        drop_path: rate of :class:`DropPath` for the block's residual branches.
    """

    def __init__(self, block: TransformerBlock, registers: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = _trainable(block.norm1), _trainable(block.norm2)
        self.registers = nn.Parameter(
            block.norm1.weight.new_empty(1, registers, *block.norm1.normalized_shape)
        )
        nn.init.xavier_uniform_(self.registers)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, block: TransformerBlock) -> tuple[Tensor, Tensor]:
        """Registers (N, R, D) and tokens (N, T, D) behind the block, of tokens (N, T, D) before it."""
        count = self.registers.shape[1]
        x = torch.cat((self.registers.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.drop_path(block.scale1(block.attention(self.norm1(x))))
        x = x + self.drop_path(block.scale2(block.mlp(self.norm2(x))))
        return x[:, :count], x[:, count:]


def _trainable(norm: nn.LayerNorm) -> nn.LayerNorm:
    """A copy whose weights are parameters, where the frozen one's are buffers."""
    copy = nn.LayerNorm(norm.normalized_shape, norm.eps, device=norm.weight.device)
    copy.load_state_dict(norm.state_dict())
    return copy


class HierarchicalAdapter(nn.Module):
    """What hierarchical side-tuning trains for one task.

    Args:
        config: the method's settings.
        encoder: the frozen transformer.
    """

    def __init__(self, config: HierarchicalSideTuningConfig, encoder: VisionTransformer) -> None:
        super().__init__()
        blocks = encoder.blocks
        dims = _numbers("dims", config.dims)
        rates = torch.linspace(0, config.drop_path, len(blocks), device="cpu").tolist()
        self.tuned = nn.ModuleList(
            TunedBlock(block, config.registers, rate) for block, rate in zip(blocks, rates, strict=True)
        )
        self.side = SideNetwork(
            encoder.input_spec.channels,
            encoder.cls_token.shape[2],
            dims,
            _numbers("heads", config.heads),
            config.stage_depths(len(blocks)),
            config.norm,
            config.drop_path,
        )
        self.norm = (
            VectorBatchNorm(dims[-1], eps=1e-6, affine=False)
            if config.norm == "batch"
            else nn.LayerNorm(dims[-1], 1e-6, elementwise_affine=False)
        )

    def maps(self, image: Tensor, encoder: VisionTransformer) -> list[Tensor]:
        """The side network's maps (N, d, h, w) of preprocessed images (N, C, H, W)."""
        grid = (image.shape[2] // encoder.patch, image.shape[3] // encoder.patch)
        tokens = encoder.stem(image)
        registers, features = [], []
        for tuned, block in zip(self.tuned, encoder.blocks, strict=True):
            register, tokens = tuned(tokens, block)
            registers.append(register)
            features.append(tokens[:, 1:].mT.unflatten(2, grid))
        return self.side(image, registers, features)

    def pooled(self, coarsest: Tensor) -> Tensor:
        """The mean (N, d) of a map (N, d, h, w), normalised."""
        return self.norm(coarsest.mean(dim=(2, 3)))


class HierarchicalSideTuning(Adaptation):
    """Hierarchical side-tuning of a vision transformer.

    Args:
        config: the method's settings.
        base: the transformer to adapt, which is copied; None makes it from the settings.

    Raises:
        ValueError: for an encoder that is no vision transformer.
    """

    config_class: ClassVar[type[AdaptationConfig]] = HierarchicalSideTuningConfig
    recomputed: ClassVar[str] = "its tokens learn, and pass through the base's blocks"
    config: HierarchicalSideTuningConfig

    def __init__(self, config: HierarchicalSideTuningConfig, base: Encoder | None = None) -> None:
        super().__init__(config)
        encoder = base or config.make_encoder()
        if not isinstance(encoder, VisionTransformer):
            raise ValueError(
                f"hierarchical side-tuning reads the tokens of a vision transformer, and encoder "
                f"{encoder.name!r} is none; choose vit_mini, vit_base, mae_base, dinov2_small or dinov2_base"
            )
        self.base = FrozenEncoder(encoder)
        self.start_task(DEFAULT_TASK)

    def make_adapter(self) -> HierarchicalAdapter:
        """Registers, normalisations, bridges and side network, as the authors initialise them."""
        return HierarchicalAdapter(self.config, self._encoder)

    def forward(self, image: Tensor, base_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """The pooled vector (N, d), or the maps side by side (N, sum of d, h, w) at stride 8."""
        maps = self.multi_scale(image)
        if self.config.output == "pooled":
            return self._adapter.pooled(maps[-1])
        size = maps[1].shape[2:]
        resized = (F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps)
        return torch.cat(list(resized), dim=1)

    def multi_scale(self, image: Tensor) -> list[Tensor]:
        """The four maps (N, d, h, w), strides 4, 8, 16 and 32, for a decoder that predicts every pixel.

        Args:
            image: (N, H, W, C) uint8, or float with values in 0..1. Strides count pixels of the size to
                which the encoder resizes it.
        """
        encoder = self._encoder
        return self._adapter.maps(encoder.preprocess(image), encoder)

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(d,) of the last stage, or (sum of d, h, w)."""
        dims, encoder = _numbers("dims", self.config.dims), self._encoder
        pixels = encoder.preprocess(
            encoder.cls_token.new_zeros(1, height, width, encoder.input_spec.channels)
        )
        encoder.stem(pixels)  # refuses sizes that it cannot take
        if self.config.output == "pooled":
            return (dims[-1],)
        # A stem that quarters, then a convolution that halves, both as strides and paddings round.
        rows, columns = ((((side + 1) // 2) // 2 + 1) // 2 for side in pixels.shape[2:])
        return (sum(dims), rows, columns)

    def noises(self) -> list[str]:
        """See :meth:`Adaptation.noises`."""
        found = super().noises()
        return [*found, "drop_path leaves blocks out at random"] if self.config.drop_path else found

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Biases and normalisations without decay, all else, registers too, with it, as published."""
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        spared = [p for n, p in named if p.dim() <= 1 or n.endswith(".bias")]
        return [
            {"params": [p for n, p in named if p.dim() > 1], "weight_decay": weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ]

    @property
    def _encoder(self) -> VisionTransformer:
        encoder = self.base.encoder
        assert isinstance(encoder, VisionTransformer)
        return encoder

    @property
    def _adapter(self) -> HierarchicalAdapter:
        adapter = self.adapter
        assert isinstance(adapter, HierarchicalAdapter)
        return adapter
