"""Faster ways to compute the same: reduced precision, memory layout, compiled kernels; options, all off.

A device that lacks one is told so by name, and goes on without it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

CompileMode = Literal["none", "default", "reduce-overhead", "max-autotune"]
"""Modes of :func:`torch.compile`; ``reduce-overhead`` replays CUDA graphs, ``none`` does not compile."""


@dataclass(frozen=True)
class FastPaths:
    """How a policy is computed, while it acts and while it learns."""

    precision: torch.dtype = torch.float32
    """Of convolutions and matrix products: with bfloat16 they round, under torch's autocast; parameters,
    losses, and what a rollout stores keep their precision."""
    channels_last: bool = False
    """Whether images and convolutions are laid out (N, H, W, C) in memory, as fast kernels want them."""
    compile: CompileMode = "none"
    """Whether :func:`torch.compile` makes kernels of the features extractor, and in what mode."""
    tf32: bool = False
    """Whether CUDA devices may round the factors of float32 products to 10 bits (TF32)."""

    def __post_init__(self) -> None:
        if self.precision not in (torch.float32, torch.bfloat16):
            raise ValueError(f"precision {self.precision} is not one of torch.float32, torch.bfloat16")
        if self.compile not in get_args(CompileMode):
            raise ValueError(f"compile {self.compile!r} is not one of {', '.join(get_args(CompileMode))}")

    def available(self, device: torch.device) -> tuple[FastPaths, list[str]]:
        """Those of these that ``device`` has, and a sentence about each other one."""
        found, missing = self, []
        if found.precision == torch.bfloat16 and not _has_bfloat16(device):
            found = replace(found, precision=torch.float32)
            missing.append(
                f"precision bfloat16 needs {_BFLOAT16[device.type]}, and would be slow without: float32 it is"
            )
        if found.tf32 and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)):
            found = replace(found, tf32=False)
            missing.append(f"tf32 needs a CUDA device of 2020 or later, and this is {device}: left out")
        if found.compile == "reduce-overhead" and device.type != "cuda":
            found = replace(found, compile="default")
            missing.append(
                f"compile reduce-overhead makes CUDA graphs, and this is {device}: compiled without them"
            )
        if found.compile != "none" and (reason := _cannot_compile(device)):
            found = replace(found, compile="none")
            missing.append(f"compile does not work here ({reason}): left out")
        return found, missing

    def prepare(self, policy: Any, device: torch.device) -> None:
        """Lays out and compiles ``policy``, a Stable-Baselines3 policy on ``device``, in place."""
        extractor: nn.Module = policy.features_extractor
        if self.tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        if self.channels_last:
            extractor.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compile != "none":
            # What the compiler does not take is computed as it is written.
            torch._dynamo.config.suppress_errors = True
            extractor.compile(mode=self.compile)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """In this context, meant for one call of the policy, products have the precision asked for."""
        if device.type == "cuda" and self.compile in _CUDA_GRAPHS:
            # What was computed before is done with. A minibatch that was left out, or after which an update
            # ended early, would else keep its graphs waiting for a backward pass, and nothing be replayed.
            torch.compiler.cudagraph_mark_step_begin()
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16)


_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes that record and replay CUDA graphs on a CUDA device."""
_BFLOAT16 = {
    "cpu": "a CPU with AVX512-BF16 or AMX instructions",
    "cuda": "a CUDA device of 2020 or later",
}


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _cannot_compile(device: torch.device) -> str:
    """Why :func:`torch.compile` fails here, such as for want of a C++ compiler; empty if it works."""
    try:
        torch.compile(lambda x: torch.relu(x) + 1)(torch.ones(8, device=device))
    except Exception as error:
        return str(error).strip().splitlines()[0]
    return ""
