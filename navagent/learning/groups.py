"""Groups of agents stepped side by side: while one's world is simulated, the policy acts in another.

Double-buffered sampling, as in Sample Factory (Petrenko et al. 2020) and Large Batch Simulation (Shacklett
et al. 2021): with two groups, neither the simulator nor the policy waits for the other. A group's simulator
works in a thread of its own, which runs beside the policy as far as it leaves the interpreter to others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from envs.expert import Advice
from navagent.learning.rollout import StepResult, TensorEnv, join_advice

Stage = Callable[[str], AbstractContextManager[None]]
"""Measures what is done inside, by name."""


@dataclass(frozen=True)
class Decision:
    """What a policy made of a step of M environments."""

    observations: dict[str, Tensor]
    """What it saw, by key: (M, ...)."""
    starts: Tensor
    """Whether an episode starts with this step: (M,) bool."""
    actions: Tensor
    """What is carried out: (M,) int64."""
    values: Tensor
    """The critic's estimates: (M,)."""
    log_probs: Tensor
    """Log-probabilities of what the policy chose: (M,)."""
    memory: Tensor
    """The policy's memory before the step: (M, ...)."""
    next_memory: Tensor
    """And after it: (M, ...)."""
    frozen: dict[str, Tensor]
    """Features that learning never changes, by name: (M, ...)."""
    expert: Advice | None
    """What the expert says; None without one."""
    reference_logits: Tensor | None
    """What an earlier policy would do: (M, A); None without one."""


class AgentGroup:
    """Some of a rollout's environments, stepped together."""

    def __init__(self, env: TensorEnv, first: int, worker: ThreadPoolExecutor | None) -> None:
        """``first`` is the number of its first environment; ``worker`` steps it, this thread if None."""
        self.env = env
        self.envs = slice(first, first + env.num_envs)
        """Which of all environments these are."""
        self._worker = worker
        self._decision: Decision | None = None
        self._answer: Future[tuple[StepResult, Advice | None]] | None = None
        self._expert: Advice | None = None

    @property
    def busy(self) -> bool:
        """Whether a step was begun and not yet ended."""
        return self._decision is not None

    def expert_advice(self, stage: Stage) -> Advice:
        """What the expert says now."""
        if self._expert is None:
            with stage("expert"):
                self._expert = self.env.expert_advice()
        return self._expert

    def begin(self, decision: Decision, ask_expert: bool) -> None:
        """Begins a step; with ``ask_expert``, a worker asks what the expert would do after it."""
        self._decision = decision
        self._expert = None
        if self._worker is not None:
            self._answer = self._worker.submit(self._step, decision.actions, ask_expert)

    def _step(self, actions: Tensor, ask_expert: bool) -> tuple[StepResult, Advice | None]:
        result = self.env.step(actions)
        return result, self.env.expert_advice() if ask_expert else None

    def end(self, stage: Stage) -> tuple[Decision, StepResult]:
        """Waits for the step that was begun."""
        decision = self._decision
        assert decision is not None
        self._decision = None
        with stage("simulate"):
            if self._answer is None:
                return decision, self.env.step(decision.actions)
            result, self._expert = self._answer.result()
        return decision, result

    def abandon(self) -> None:
        """Waits for a step whose answer nobody wants any more, and drops what it raised."""
        if self._answer is not None and self._decision is not None:
            self._answer.exception()
        self._decision = self._answer = self._expert = None


def agent_groups(environments: Sequence[TensorEnv]) -> list[AgentGroup]:
    """A group for each environment; where there are several, each has a thread of its own."""
    groups = []
    first = 0
    for environment in environments:
        worker = None
        if len(environments) > 1:
            worker = ThreadPoolExecutor(1, "simulator")
        groups.append(AgentGroup(environment, first, worker))
        first += environment.num_envs
    return groups


def join_decisions(decisions: Sequence[Decision]) -> Decision:
    """The decisions of several groups as one of all."""
    if len(decisions) == 1:
        return decisions[0]
    advice = [decision.expert for decision in decisions if decision.expert is not None]
    return Decision(
        observations=_join_named([decision.observations for decision in decisions]),
        starts=torch.cat([decision.starts for decision in decisions]),
        actions=torch.cat([decision.actions for decision in decisions]),
        values=torch.cat([decision.values for decision in decisions]),
        log_probs=torch.cat([decision.log_probs for decision in decisions]),
        memory=torch.cat([decision.memory for decision in decisions]),
        next_memory=torch.cat([decision.next_memory for decision in decisions]),
        frozen=_join_named([decision.frozen for decision in decisions]),
        expert=join_advice(advice) if advice else None,
        reference_logits=_join_optional([decision.reference_logits for decision in decisions]),
    )


def join_results(results: Sequence[StepResult]) -> StepResult:
    """The answers of several groups' environments as one of all."""
    if len(results) == 1:
        return results[0]
    finals = [result.final_observations for result in results if result.final_observations is not None]
    return StepResult(
        observations=_join_named([result.observations for result in results]),
        rewards=torch.cat([result.rewards for result in results]),
        dones=torch.cat([result.dones for result in results]),
        truncated=torch.cat([result.truncated for result in results]),
        final_observations=_join_named(finals) if finals else None,
        episodes=[episode for result in results for episode in result.episodes],
    )


def _join_named(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _join_optional(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
