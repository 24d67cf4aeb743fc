"""Trainable copies of a frozen encoder, whole or divided at its blocks."""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import nn

from policies.encoders import BlockEncoder


def parameter_names(encoder: nn.Module) -> frozenset[str]:
    """Names of an encoder's parameters, to be noted before it is frozen."""
    return frozenset(name for name, _ in encoder.named_parameters(remove_duplicate=False))


def trainable_copy(frozen: BlockEncoder, learned: Collection[str]) -> BlockEncoder:
    """A copy of a frozen encoder in which the tensors named in ``learned`` are parameters again.

    Args:
        frozen: the encoder inside of a :class:`~policies.adaptation.base.FrozenEncoder`.
        learned: what :func:`parameter_names` gave before the encoder was frozen.
    """
    encoder = copy.deepcopy(frozen)
    for prefix, module in encoder.named_modules():
        for name, value in list(module.named_buffers(recurse=False)):
            if (f"{prefix}.{name}" if prefix else name) in learned:
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(value))
    return encoder


def detach_blocks(encoder: BlockEncoder) -> list[nn.Module]:
    """Takes an encoder's blocks out of it; what is left still computes ``stem`` and ``neck``."""
    blocks = list(encoder.blocks)
    taken = {id(block) for block in blocks}
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in taken:
                setattr(parent, name, nn.Identity())
    return blocks
