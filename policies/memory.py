"""What an agent remembers: recurrent networks, a stack of past features, or nothing.

A memory is one tensor (N, *shape). It is zero before an episode's first step, and every call takes the flags
that say where episodes start, so that sequences may run across episode ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


class Memory(nn.Module, ABC):
    """From features to features that know the past."""

    shape: tuple[int, ...]
    """Shape of one agent's memory."""
    features: int
    """Length of the output."""

    @abstractmethod
    def step(self, x: Tensor, memory: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """One step of every agent.

        Args:
            x: (N, inputs).
            memory: (N, *shape).
            starts: (N,) bool, whether an episode starts with this step.

        Returns:
            output (N, features) and the new memory (N, *shape).
        """

    @abstractmethod
    def sequence(self, x: Tensor, memory: Tensor, starts: Tensor) -> Tensor:
        """The same as ``step`` along time, in one pass.

        Args:
            x: (T, B, inputs).
            memory: (B, *shape) before the first step.
            starts: (T, B) bool.

        Returns:
            (T, B, features).
        """


class RecurrentMemory(Memory):
    """GRU or LSTM. The LSTM's memory holds its hidden state, then its cell state.

    Args:
        kind: "gru" or "lstm".
        inputs: length of the input.
        features: length of the hidden state.
        layers: number of stacked layers.
    """

    def __init__(self, kind: str, inputs: int, features: int, layers: int = 1) -> None:
        super().__init__()
        self._lstm = kind == "lstm"
        self._layers = layers
        self.features = features
        self.shape = (layers * (2 if self._lstm else 1), features)
        self.rnn: nn.RNNBase = (nn.LSTM if self._lstm else nn.GRU)(inputs, features, layers)
        for name, parameter in self.rnn.named_parameters():
            if "weight" in name:
                # One orthogonal block a gate.
                for gate in parameter.chunk(4 if self._lstm else 3):
                    nn.init.orthogonal_(gate)
            else:
                nn.init.zeros_(parameter)

    def step(self, x: Tensor, memory: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Memory.step`."""
        memory = memory * ~starts[:, None, None]
        output, state = self._run(x[None], self._split(memory))
        state = torch.cat(state) if self._lstm else state
        return output[0], state.transpose(0, 1)

    def sequence(self, x: Tensor, memory: Tensor, starts: Tensor) -> Tensor:
        """See :meth:`Memory.sequence`.

        Columns are cut where episodes start. The pieces, longest first, form one packed sequence, which the
        recurrent network runs in a single call; only pieces that continue an episode get the given memory.
        """
        steps, batch = starts.shape
        cuts = starts.clone()
        cuts[0] = True
        # Rows in (batch, time) order, where the steps of a piece are neighbours.
        first = cuts.t().reshape(-1).nonzero()[:, 0]
        lengths = torch.diff(first, append=first.new_tensor([steps * batch]))
        order = torch.argsort(lengths, descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        piece = torch.repeat_interleave(torch.arange(len(first), device=first.device), lengths)
        offset = torch.arange(steps * batch, device=first.device) - first[piece]
        packing = torch.argsort(offset * len(first) + rank[piece])
        counts = torch.bincount(offset, minlength=1).cpu()

        beginnings = first[order]
        column = beginnings // steps
        resumes = (beginnings % steps == 0) & ~starts[0, column]
        state = memory[column] * resumes[:, None, None]

        rows = x.transpose(0, 1).reshape(steps * batch, -1)
        packed = PackedSequence(rows[packing], counts)
        output = self._run(packed, self._split(state))[0].data
        unpacking = torch.empty_like(packing)
        unpacking[packing] = torch.arange(len(packing), device=packing.device)
        return output[unpacking].reshape(batch, steps, -1).transpose(0, 1)

    def _run(self, x: Tensor | PackedSequence, state: Tensor | tuple[Tensor, Tensor]) -> tuple[Any, Any]:
        if not x.is_cuda:
            return self.rnn(x, state)
        # Under autocast cuDNN computes in float16 even where bfloat16 is asked for, and there the gradients
        # of a loss that nobody scales vanish.
        with torch.autocast("cuda", enabled=False):
            return self.rnn(x.float(), state)

    def _split(self, memory: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        state = memory.transpose(0, 1).contiguous()
        return (state[: self._layers], state[self._layers :]) if self._lstm else state


class FrameStackMemory(Memory):
    """The features of the last few steps, newest first, through one layer. Zero before an episode's start.

    Args:
        inputs: length of the input.
        features: length of the output.
        frames: how many steps are seen at once, the present one included.
    """

    def __init__(self, inputs: int, features: int, frames: int = 4) -> None:
        super().__init__()
        self.features = features
        self.frames = frames
        self.shape = (frames - 1, inputs)
        self.mix = nn.Linear(frames * inputs, features)
        nn.init.orthogonal_(self.mix.weight, gain=2**0.5)
        nn.init.zeros_(self.mix.bias)

    def step(self, x: Tensor, memory: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Memory.step`."""
        stack = torch.cat((x[:, None], memory * ~starts[:, None, None]), dim=1)
        return F.relu(self.mix(stack.flatten(1))), stack[:, :-1]

    def sequence(self, x: Tensor, memory: Tensor, starts: Tensor) -> Tensor:
        """See :meth:`Memory.sequence`."""
        steps = x.shape[0]
        past = memory.transpose(0, 1).flip(0)  # oldest first
        history = torch.cat((past, x))
        episode = torch.cat((starts.new_zeros(len(past), starts.shape[1]), starts)).long().cumsum(0)
        now = slice(len(past), None)
        stack = []
        for lag in range(self.frames):
            earlier = slice(len(past) - lag, len(past) - lag + steps)
            same = episode[earlier] == episode[now]
            stack.append(history[earlier] * same[..., None])
        return F.relu(self.mix(torch.cat(stack, dim=2)))


class NoMemory(Memory):
    """One layer over the present alone; its memory is an empty tensor (N, 0)."""

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        self.features = features
        self.shape = (0,)
        self.mix = nn.Linear(inputs, features)
        nn.init.orthogonal_(self.mix.weight, gain=2**0.5)
        nn.init.zeros_(self.mix.bias)

    def step(self, x: Tensor, memory: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Memory.step`."""
        return F.relu(self.mix(x)), memory

    def sequence(self, x: Tensor, memory: Tensor, starts: Tensor) -> Tensor:
        """See :meth:`Memory.sequence`."""
        return F.relu(self.mix(x))


def make_memory(kind: str, inputs: int, features: int, layers: int = 1, frames: int = 4) -> Memory:
    """Builds a memory: "gru", "lstm", "frame_stack" or "none".

    ``layers`` counts for recurrent memories and ``frames`` for the frame stack.
    """
    if features < 1 or layers < 1 or frames < 2:
        raise ValueError(
            f"memory with hidden_size {features}, {layers} layers and {frames} frames: expected at least "
            "1, 1 and 2"
        )
    if kind in ("gru", "lstm"):
        return RecurrentMemory(kind, inputs, features, layers)
    if kind == "frame_stack":
        return FrameStackMemory(inputs, features, frames)
    if kind == "none":
        return NoMemory(inputs, features)
    raise ValueError(f"unknown memory {kind!r}; expected gru, lstm, frame_stack or none")
