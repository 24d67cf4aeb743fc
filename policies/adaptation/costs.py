"""What each method costs on a base: parameters, bytes, operations and memory, counted and not timed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from policies.adaptation.base import Adaptation
from policies.encoders.base import device_of

ADAM_COPIES = 3
"""Tensors of a parameter's size that Adam needs beside it: its gradient and two moments."""


@dataclass(frozen=True)
class Cost:
    """Costs of one method on one base, for images of one size."""

    trainable: int
    """Parameters that learn, without a policy or a decoder behind the features."""
    stored_bytes: int
    """Bytes that one further task adds to what is stored; the whole delta where a method has but one task."""
    act_flops: float
    """Floating-point operations of one image's features in evaluation, multiplication and addition apart."""
    learn_flops: float
    """The same for the forward pass of learning, from stored base features where the method has any."""
    backward_flops: float
    """The same for the backward pass."""
    cached: bool
    """Whether base features can be stored once and used in every pass of learning."""
    learn_bytes: int
    """Memory of learning on a batch: activations kept for the backward pass, gradients and Adam's moments."""


def measure(method: Adaptation, height: int, width: int, batch_size: int = 32) -> Cost:
    """Costs of a method with one task begun; memory is given for batches of ``batch_size`` images.

    Operations are those of convolutions, matrix products and attention, as torch's counter has them, on two
    images, once in evaluation and once in training. A method with a schedule is counted at the end of it. All
    is done on a copy of the method.
    """
    method = copy.deepcopy(method)
    method.set_progress(1, 1)
    channels = method.config.channels
    shape = (2, height, width, channels)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, device=device_of(method))
    method.eval()
    with torch.no_grad():
        act = _flops(lambda: method(image)) / 2
        stored = method.base_features(image)
    method.train()
    output: list[Tensor] = []
    learn = _flops(lambda: output.append(method(image, stored or None))) / 2
    # What is kept once, such as masked weights, told from what is kept for each image.
    two = _saved_bytes(method, image, stored)
    twice = {name: torch.cat((value, value)) for name, value in stored.items()}
    four = _saved_bytes(method, torch.cat((image, image)), twice)
    each = (four - two) // 2
    backward = 0.0
    if output[0].requires_grad:
        backward = _flops(lambda: output[0].float().square().sum().backward()) / 2
    trainable = sum(p.numel() for p in method.trainable_parameters())
    parameter_bytes = sum(p.nbytes for p in method.trainable_parameters())
    return Cost(
        trainable=trainable,
        stored_bytes=_further_bytes(method),
        act_flops=act,
        learn_flops=learn,
        backward_flops=backward,
        cached=bool(stored),
        learn_bytes=two + (batch_size - 2) * each + ADAM_COPIES * parameter_bytes,
    )


def _flops(compute: object) -> float:
    assert callable(compute)
    # The counter knows attention by its products, not by the fused kernels of every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compute()
    return float(counter.get_total_flops())


def _further_bytes(method: Adaptation) -> int:
    before = _bytes(method.delta())
    if not method.several_tasks:
        return before
    method.start_task("further")
    after = _bytes(method.delta())
    # A method that goes on with the one network stores all of it again for a task that must not be lost.
    return after - before or before


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in tensors.values())


def _saved_bytes(method: Adaptation, image: Tensor, stored: dict[str, Tensor]) -> int:
    saved = _SavedBytes(method)
    with saved:
        method(image, stored or None)
    return saved.total


class _SavedBytes:
    """Counts the memory that autograd keeps for the backward pass, weights aside."""

    def __init__(self, module: nn.Module) -> None:
        self.total = 0
        own: Iterable[Tensor] = [*module.parameters(), *module.buffers()]
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._kept: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            # Held, so that its address is not given to another tensor meanwhile.
            self._kept.append(tensor)
            self.total += storage.nbytes()
        return tensor

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._kept.clear()
