"""DAgger's data set: what was visited in all iterations so far, as far as there is room for it.

In DAgger (Ross et al. 2011, algorithm 3.1) each iteration's states are added to one growing data set, and the
next policy is trained on all of it. Here a policy takes some steps of its optimiser between two iterations,
on sequences drawn evenly from the set; and where the set is full, a new sequence takes the place of one at
random, so that what is kept stays an even sample of everything visited (reservoir sampling, Vitter 1985).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from navagent.learning.rollout import SequenceBatch, SequenceBuffer

_STEPS = ("actions", "values", "log_probs", "advantages", "returns", "episode_starts", "expert_actions")
"""Fields of a batch that have a value a step, (T, B)."""


class Aggregate:
    """Sequences with their labels: the steps of one environment in one rollout, each as long as a rollout.

    A sequence keeps the memory that the learner had before it, as it was then. The critic's part of it is
    what the behaviour of its own iteration earned.

    Args:
        capacity: sequences that are kept.
        num_steps: steps T of each.
        device: where they are kept.
        feature_dtype: how frozen features are stored.
    """

    def __init__(
        self, capacity: int, num_steps: int, device: torch.device, feature_dtype: torch.dtype = torch.float32
    ) -> None:
        if capacity < 1:
            raise ValueError(f"an aggregate of {capacity} sequences; expected at least 1")
        self.capacity = capacity
        self.num_steps = num_steps
        self.device = device
        self.feature_dtype = feature_dtype
        self.seen = 0
        """Sequences added so far."""
        self._blocks: dict[str, Tensor] = {}

    def __len__(self) -> int:
        """Sequences that are kept."""
        return min(self.seen, self.capacity)

    @property
    def num_bytes(self) -> int:
        """Size of the storage [bytes]."""
        return sum(block.numel() * block.element_size() for block in self._blocks.values())

    def add(self, rollout: SequenceBuffer, generator: torch.Generator) -> None:
        """Adds every environment's sequence of a finished rollout with labels.

        A rollout that ended early, because other processes were done, is left out. ``generator`` lives on the
        CPU.
        """
        if not rollout.full:
            return
        (batch,) = rollout.minibatches(1)
        sequences = self._by_sequence(batch)
        if sequences.keys() != self._blocks.keys():
            # The very first rollout, or the first of a method that had frozen more until now.
            self._allocate({name: value[0] for name, value in sequences.items()})
        for index in range(rollout.num_envs):
            place = self.seen
            if place >= self.capacity:
                place = int(torch.randint(self.seen + 1, (), generator=generator))
            self.seen += 1
            if place < self.capacity:
                for name, value in sequences.items():
                    self._blocks[name][place].copy_(value[index])

    def _by_sequence(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Everything in a batch by name, each (B, T, ...), but the memory (B, ...)."""
        if batch.expert_actions is None:
            raise ValueError("this rollout carries no expert actions: collect it with an expert")
        steps = {name: getattr(batch, name) for name in _STEPS}
        if batch.expert_turns is not None:
            steps["expert_turns"] = batch.expert_turns
        steps |= {f"obs/{name}": value for name, value in batch.observations.items()}
        for name, value in (batch.frozen or {}).items():
            steps[f"frozen/{name}"] = value.to(self.feature_dtype)
        return {"memory": batch.memory} | {name: value.transpose(0, 1) for name, value in steps.items()}

    def _allocate(self, sequence: dict[str, Tensor]) -> None:
        self._blocks = {
            name: torch.empty((self.capacity, *value.shape), dtype=value.dtype, device=self.device)
            for name, value in sequence.items()
        }
        self.seen = 0

    def draw(self, sizes: list[int], generator: torch.Generator) -> Iterator[SequenceBatch]:
        """Minibatches of so many sequences each, drawn evenly from all that are kept.

        None comes twice before all have come once. A size of 0 gives a batch that only stands in.
        ``generator`` lives on the CPU.
        """
        if not len(self):
            raise RuntimeError("nothing was added yet; call add() before draw()")
        wanted = sum(sizes)
        orders = [torch.randperm(len(self), generator=generator) for _ in range(-(-wanted // len(self)))]
        order = torch.cat(orders) if orders else torch.zeros(0, dtype=torch.int64)
        first = 0
        for size in sizes:
            if size:
                yield self._batch(order[first : first + size].to(self.device))
                first += size
            else:
                stand_in = torch.zeros(1, dtype=torch.int64, device=self.device)
                yield replace(self._batch(stand_in), samples=0)

    def _batch(self, places: Tensor) -> SequenceBatch:
        picked = {name: block.index_select(0, places) for name, block in self._blocks.items()}
        memory = picked.pop("memory")
        steps = {name: value.transpose(0, 1).contiguous() for name, value in picked.items()}
        frozen = {
            name.removeprefix("frozen/"): value.float()
            for name, value in steps.items()
            if name.startswith("frozen/")
        }
        return SequenceBatch(
            observations={
                name.removeprefix("obs/"): value for name, value in steps.items() if name.startswith("obs/")
            },
            memory=memory,
            frozen=frozen or None,
            expert_turns=steps.get("expert_turns"),
            reference_logits=None,
            samples=self.num_steps * len(places),
            **{name: steps[name] for name in _STEPS},
        )

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here."""
        return {"seen": self.seen, "blocks": {name: b[: len(self)] for name, b in self._blocks.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state."""
        if state["blocks"]:
            self._allocate({name: block[0] for name, block in state["blocks"].items()})
        for name, block in state["blocks"].items():
            self._blocks[name][: len(block)].copy_(block)
        self.seen = int(state["seen"])
