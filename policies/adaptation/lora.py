"""LoRA (Hu et al., ICLR 2022, arXiv:2106.09685), as PEFT computes it: low-rank updates of frozen weights.

A layer with the frozen weight W computes W x + (alpha / r) B A x (section 4.1 of the paper), where A (r, I)
is drawn at random and B (O, r) starts at 0. Convolutions get a convolution A of their own form to r channels
and a 1x1 convolution B.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from policies.adaptation.base import DEFAULT_TASK, Adaptation, AdaptationConfig, FrozenEncoder
from policies.adaptation.substitution import own_weight
from policies.encoders import Encoder
from policies.names import nearest


@dataclass(frozen=True)
class LoRAConfig(AdaptationConfig):
    """Settings of LoRA."""

    rank: int = 8
    """Rank r of the updates."""
    alpha: float = 16.0
    """Updates are scaled by alpha / rank."""
    dropout: float = 0.0
    """Probability with which an input of A is dropped in training. In PPO the network that learns would
    differ from the one that acted."""
    target: str = "all"
    """Layers to adapt: "attention" for the linear layers of attention, "linear", "conv", "all" for both, or
    the ends of layers' names, separated by commas, such as "query,value". None of these are layers inside of
    torch.nn.MultiheadAttention, which does not call them."""
    rslora: bool = False
    """Whether updates are scaled by alpha / sqrt(rank) instead (Kalajdzievski, arXiv:2312.03732)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"lora rank {self.rank}: expected 1 or more")
        if not self.alpha > 0:
            raise ValueError(f"lora alpha {self.alpha}: expected more than 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora dropout {self.dropout}: expected a value in 0..1, below 1")

    def layers(self, encoder: Encoder) -> list[str]:
        """Dotted names of the layers of ``encoder`` that :attr:`target` means.

        Raises:
            ValueError: if it means none.
        """
        known = {n: m for n, m in encoder.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        # torch's own attention computes with the weights of its output layer without calling it.
        for prefix, module in encoder.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                known.pop(f"{prefix}.out_proj")
        linear = [name for name, module in known.items() if isinstance(module, nn.Linear)]
        groups = {
            "attention": [n for n in linear if "attention" in n.lower() or "attn" in n.lower()],
            "linear": linear,
            "conv": [name for name in known if name not in linear],
            "all": list(known),
        }
        if self.target in groups:
            if not groups[self.target]:
                has = ", ".join(f"{kind!r}" for kind, names in groups.items() if names)
                raise ValueError(
                    f"lora target {self.target!r}: encoder {encoder.name!r} has no such layers; it has {has}"
                )
            return groups[self.target]
        found: list[str] = []
        for end in (part.strip() for part in self.target.split(",")):
            names = [name for name in known if f".{name}".endswith(f".{end}")]
            if not names:
                ends = [*groups, *known, *(name.rpartition(".")[2] for name in known)]
                raise ValueError(
                    f"lora target {end!r}: expected one of {', '.join(groups)}, or the end of the name of a "
                    f"linear or convolutional layer of encoder {encoder.name!r}{nearest(end, ends)}"
                )
            found += [name for name in names if name not in found]
        return found


class LoRAAdapter(nn.Module):
    """What LoRA trains for one task: the matrices A and B of every adapted layer.

    PEFT puts them into a copy of the encoder, in which every other tensor gives way to an empty one that is
    not stored. A call lends the frozen tensors to it, so that they exist once, whatever the number of tasks.

    Args:
        config: the method's settings.
        encoder: the frozen network.
    """

    def __init__(self, config: LoRAConfig, encoder: Encoder) -> None:
        super().__init__()
        # PEFT brings transformers with it, which takes seconds to import.
        from peft import LoraConfig, inject_adapter_in_model

        settings = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            use_rslora=config.rslora,
            target_modules=config.layers(encoder),
        )
        network = copy.deepcopy(encoder)
        for name in settings.target_modules or ():
            layer = network.get_submodule(name)
            # PEFT asks the parameters for their device; as buffers, the frozen weights would not answer.
            weight = own_weight(network, f"{name}.weight", "LoRA")
            del layer.weight
            layer.weight = nn.Parameter(weight, requires_grad=False)
        self.network = inject_adapter_in_model(settings, network, adapter_name="lora")
        for module in self.network.modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                # Where no gradient is asked for, torch takes a short way past the layers and so past A and B,
                # but only if it knows the activation.
                module.activation_relu_or_gelu = 0
        self._frozen: dict[str, str] = {}
        for prefix, module in self.network.named_modules():
            wrapped = prefix.endswith(".base_layer")
            own = module.named_parameters(recurse=False) if wrapped else ()
            for name, _ in [*own, *module.named_buffers(recurse=False)]:
                delattr(module, name)
                module.register_buffer(name, torch.empty(0), persistent=False)
                path = f"{prefix}.{name}" if prefix else name
                self._frozen[path] = path.replace(".base_layer.", ".")
        self.train(True)

    def train(self, mode: bool = True) -> LoRAAdapter:
        """Sets the mode of LoRA's dropout; the network around it stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        for name, module in self.network.named_modules():
            if name.endswith(".lora_dropout"):
                module.train(mode)
        return self

    def forward(self, encoder: Encoder, image: Tensor) -> Tensor:
        """Features of images (N, H, W, C), with the frozen tensors of ``encoder``."""
        own = dict(encoder.named_buffers(remove_duplicate=False))
        frozen = {path: own[name] for path, name in self._frozen.items()}
        return functional_call(self.network, frozen, (encoder.preprocess(image),))


class LoRA(Adaptation):
    """A frozen network with low-rank updates of its linear and convolutional layers."""

    config_class: ClassVar[type[AdaptationConfig]] = LoRAConfig
    recomputed: ClassVar[str] = "its matrices change what the layers compute"
    config: LoRAConfig

    def __init__(self, config: LoRAConfig, base: Encoder | None = None) -> None:
        super().__init__(config)
        self.base = FrozenEncoder(base or config.make_encoder())
        self.start_task(DEFAULT_TASK)

    def make_adapter(self) -> LoRAAdapter:
        """Updates that are 0, with A drawn at random."""
        return LoRAAdapter(self.config, self.base.encoder)

    def forward(self, image: Tensor, base_features: Mapping[str, Tensor] | None = None) -> Tensor:
        """The adapted encoder's features, see :meth:`Adaptation.forward`."""
        return self.adapter(self.base.encoder, image)

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the encoder's features."""
        return self.base.encoder.output_shape(height, width)
