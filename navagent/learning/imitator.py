"""Imitation as a Stable-Baselines3 algorithm: DAgger and behaviour cloning on whole sequences.

Who acts, and what labels cost, is in :mod:`navagent.learning.imitation`; rollouts are collected as PPO's are,
so that a policy with memory is trained by back-propagation through time that is truncated at their ends. With
an environment that plays demonstrations (:mod:`navagent.learning.demonstrated`) and a mixture that is all
expert, this is behaviour cloning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from navagent.learning.aggregate import Aggregate
from navagent.learning.updates import Pass, SequenceLearner


class Imitator(SequenceLearner):
    """Learns the expert's action in every state that is visited, to the end of the training.

    Online, each rollout is learned from once it is complete, and then dropped. With ``replay_steps``, the
    sequences of all rollouts are aggregated as far as these allow, and each update makes ``replay_epochs``
    passes over as many of them as a rollout has, beside ``n_epochs`` over the newest rollout; with 0 of
    those, all rollouts count alike, as in Ross et al.

    The policy class must be one that :class:`navagent.learning.ppo.PPO` takes too; ``imitation.frames`` is
    how long the training is meant to be, for the schedule of the mixture.
    """

    replay: None
    """Past rollouts are kept in :attr:`aggregate`."""

    @property
    def phase(self) -> str:
        """``imitation``, always."""
        return "imitation"

    def _make_replay(self) -> None:
        return None

    def _setup_model(self) -> None:
        super()._setup_model()
        self.aggregate: Aggregate | None = None
        if self.replay_steps:
            capacity = self.n_envs * (self.replay_steps // self.n_steps)
            if capacity == 0:
                raise ValueError(
                    f"replay_steps {self.replay_steps} hold no rollout of n_steps {self.n_steps}: expected "
                    "at least as many"
                )
            self.aggregate = Aggregate(capacity, self.n_steps, self.device, self.feature_dtype)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "aggregate"]

    def _update(self) -> None:
        if self.aggregate is not None:
            self.aggregate.add(self.rollout_buffer, self._own_generator())
        self._learn_labels()

    def _own_generator(self) -> torch.Generator:
        """Random numbers of this rank's own: others may draw more of them."""
        seed = torch.randint(2**62, (), generator=self.generator).item()
        return torch.Generator().manual_seed(int(seed) + self.ranks.rank)

    def _label_passes(self) -> Iterator[Pass]:
        yield from super()._label_passes()
        if self.aggregate is None:
            return
        kind = "replay/" if self.n_epochs else "train/"
        for _ in range(self.replay_epochs):
            # The groups that a rollout would be split into; this rank brings as many as are its own.
            order = torch.randperm(self.n_envs * self.ranks.size, generator=self.generator)
            own = order // self.n_envs == self.ranks.rank
            sizes = [int(part.sum()) for part in own.tensor_split(self.label_minibatches)]
            generator = self._own_generator()
            if len(self.aggregate):
                yield self.aggregate.draw(sizes, generator), kind
            else:
                # All of this rank's rollouts ended early so far.
                yield self.rollout_buffer.minibatches(self.label_minibatches, generator), kind

    def training_state(self) -> dict[str, Any]:
        """See :meth:`navagent.learning.algorithm.SequenceAlgorithm.training_state`."""
        own = self.aggregate.state_dict() if self.aggregate is not None else None
        return super().training_state() | {"aggregates": self.ranks.gather(own)}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """See :meth:`navagent.learning.algorithm.SequenceAlgorithm.load_training_state`."""
        super().load_training_state(state)
        if self.aggregate is not None:
            self.aggregate.load_state_dict(state["aggregates"][self.ranks.rank])
