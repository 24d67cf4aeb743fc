"""Learning from an expert that can be asked anywhere: DAgger, and staying close to what was learned.

DAgger (Ross et al. 2011) lets a mixture of expert and learner act, beta_i of the expert and 1 - beta_i of the
learner in iteration i, and has the expert label every state that the mixture visits. The expert's share falls
from one iteration to the next, so that the learner ends up being corrected where it goes by itself; an
iteration is a rollout. Behaviour cloning is the mixture that is all expert. Labels are learned by
cross-entropy in which the steps where the expert changes its action weigh more (inflection weighting, Wijmans
et al. 2019). The critic learns the observed returns at the same time, so that PPO can take over the same
policy with the same optimiser.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from navagent.distributed import Ranks
from navagent.learning.rollout import SequenceBatch

MixingSchedule = Literal["linear", "exponential", "constant"]


@dataclass(frozen=True)
class ImitationConfig:
    """When an expert teaches, and how."""

    frames: int = 0
    """Frames of imitation before PPO takes over, or of all; 0 means PPO alone."""
    schedule: MixingSchedule = "linear"
    """How the expert's part of the behaviour falls from ``initial_share``: along a line, by a factor from one
    iteration to the next (Ross et al. 2011), or not at all."""
    initial_share: float = 1.0
    """The expert's part of the behaviour at first."""
    mixing_fraction: float = 0.5
    """Share of ``frames`` over which a line falls to ``final_share``."""
    decay: float = 0.99
    """The factor from one iteration to the next; with 0 the expert acts in the first iteration alone, the
    choice without parameters of Ross et al."""
    iteration_frames: int = 1
    """Frames of an iteration: those of a rollout."""
    final_share: float = 0.25
    """What the expert's part never falls below, unless it began there. With none, a learner that is stuck
    stays so until its episode times out, and most of what it learns from is being stuck."""
    segment_steps: float = 16.0
    """Who acts is drawn at the start of an episode and anew after so many steps on average."""
    inflection_weight: float = 2.0
    """Weight of a step at which the expert's action differs from the one before; others weigh 1."""
    alone_fraction: float = 0.2
    """Share of ``frames``, the last ones, in which the learner acts alone, so that the critic knows what the
    learner's own behaviour is worth when PPO takes over. Before that, the learner's STOP is carried out only
    where the expert would stop too: a beginner would end its episodes before it has seen anything."""
    critic_warmup_frames: int = 0
    """Frames of PPO, the first ones, in which the critic alone learns and the policy stays as it is."""
    num_minibatches: int | None = None
    """Into how many groups of environments a rollout is split to learn labels; as many as for PPO if None.
    Labels bear small minibatches, and the more updates of the parameters teach much faster."""
    anchor_coef: float = 0.0
    """Weight in PPO's loss of the divergence from the imitated policy, when PPO takes over."""
    anchor_frames: int = 0
    """Frames of PPO, after those of the critic alone, over which ``anchor_coef`` falls to 0."""

    def __post_init__(self) -> None:
        if self.schedule not in ("linear", "exponential", "constant"):
            raise ValueError(
                f"imitation schedule {self.schedule!r} is not one of linear, exponential, constant"
            )
        for name in ("segment_steps", "iteration_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"imitation {name} {getattr(self, name)} must be at least 1")
        for name in ("initial_share", "mixing_fraction", "decay", "final_share", "alone_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"imitation {name} {getattr(self, name)} must lie between 0 and 1")
        for name in ("frames", "critic_warmup_frames", "anchor_frames"):
            if getattr(self, name) < 0:
                raise ValueError(f"imitation {name} {getattr(self, name)} must not be negative")
        if self.inflection_weight <= 0:
            raise ValueError(f"inflection_weight {self.inflection_weight} must be greater than 0")

    def learner_alone(self, frames: int) -> bool:
        """Whether the learner acts alone, after ``frames`` frames."""
        return frames >= (1.0 - self.alone_fraction) * self.frames

    def expert_share(self, frames: int) -> float:
        """Probability that the expert acts, after ``frames`` frames."""
        if self.learner_alone(frames):
            return 0.0
        if self.schedule == "constant":
            return self.initial_share
        if self.schedule == "exponential":
            share = self.initial_share * self.decay ** (frames // self.iteration_frames)
            return max(share, min(self.initial_share, self.final_share))
        mixing_frames = self.frames * self.mixing_fraction
        if frames >= mixing_frames:
            return self.final_share
        return self.initial_share - (self.initial_share - self.final_share) * frames / mixing_frames

    def critic_alone(self, frames: int) -> bool:
        """Whether only the critic learns, after ``frames`` frames."""
        return 0 <= frames - self.frames < self.critic_warmup_frames

    def anchor_weight(self, frames: int) -> float:
        """Weight of the divergence from the imitated policy, after ``frames`` frames.

        It does not fall while the critic alone learns.
        """
        since = frames - self.frames
        if since < 0 or self.anchor_frames == 0:
            return 0.0
        fallen = max(0, since - self.critic_warmup_frames) / self.anchor_frames
        return self.anchor_coef * max(0.0, 1.0 - fallen)


class ExpertMixture:
    """Decides at each step whether the expert or the learner acts, environment by environment."""

    def __init__(
        self,
        config: ImitationConfig,
        num_envs: int,
        stop_action: int | None,
        generator: torch.Generator,
        ranks: Ranks | None = None,
    ) -> None:
        """``stop_action`` is the index of STOP, None if there is none; ``generator`` is on the CPU.

        Of ``ranks``, each has ``num_envs`` environments.
        """
        self.config = config
        self.ranks = ranks or Ranks()
        self.num_envs = num_envs
        self.stop_action = stop_action
        self.generator = generator
        self.expert_acts = torch.zeros(num_envs, dtype=torch.bool)
        self._draws = torch.ones(2, num_envs)

    def draw(self) -> None:
        """Draws what decides the next step of every environment; to be called before :meth:`choose`."""
        everyone = self.num_envs * self.ranks.size
        draws = [self.ranks.rows(torch.rand(everyone, generator=self.generator)) for _ in range(2)]
        self._draws = torch.stack(draws)

    def choose(
        self,
        actions: Tensor,
        expert: Tensor,
        episode_starts: Tensor,
        frames: int,
        envs: slice = slice(None),
    ) -> Tensor:
        """What is carried out, (M,) int64, given what learner and expert want to do, each (M,) int64.

        M environments are asked about, those of ``envs``: all unless said otherwise.
        """
        drawn = self._draws[0, envs] < self.config.expert_share(frames)
        over = self._draws[1, envs] < 1 / self.config.segment_steps
        alone = self.config.learner_alone(frames)
        redraw = episode_starts.cpu() | over | alone
        acts = torch.where(redraw, drawn, self.expert_acts[envs])
        self.expert_acts[envs] = acts
        chosen = torch.where(acts.to(actions.device), expert, actions)
        if self.stop_action is not None and not alone:
            too_early = (chosen == self.stop_action) & (expert != self.stop_action)
            chosen = torch.where(too_early, expert, chosen)
        return chosen


def inflection_weights(expert: Tensor, episode_starts: Tensor, weight: float) -> Tensor:
    """Weight of each step, (T, B): ``weight`` where the expert's action differs from the step before, else 1.

    The first step of a block or of an episode has no step before it and weighs 1.
    """
    changes = torch.zeros_like(expert, dtype=torch.bool)
    changes[1:] = (expert[1:] != expert[:-1]) & ~episode_starts[1:]
    return torch.where(changes, weight, 1.0)


def imitation_loss(
    logits: Tensor,
    expert: Tensor,
    episode_starts: Tensor,
    inflection_weight: float,
    ranks: Ranks | None = None,
    samples: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Inflection-weighted cross-entropy, and the share of steps at which the likeliest action is the
    expert's.

    ``logits`` (T, B, A), ``expert`` (T, B) int64, ``episode_starts`` (T, B) bool; both results are scalars.
    Of several ``ranks``, ``samples`` of whose steps count, the mean of the losses, weighted by samples, is
    the loss of all their steps together.
    """
    weights = inflection_weights(expert, episode_starts, inflection_weight)
    losses = functional.cross_entropy(logits.flatten(0, 1), expert.flatten(), reduction="none")
    agreement = (logits.detach().argmax(-1) == expert).float().mean()
    steps = weights.numel()
    counts = torch.stack((weights.sum(), weights.new_tensor(steps)))
    whole, everyone = (ranks or Ranks()).sum(counts * 0 if samples == 0 else counts)
    return (losses * weights.flatten()).sum() / (whole * (steps / everyone)), agreement


def divergence(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence KL(reference || policy) of action logits (T, B, A): a scalar."""
    reference = torch.log_softmax(reference_logits, -1)
    return (reference.exp() * (reference - torch.log_softmax(logits, -1))).sum(-1).mean()


class Anchor:
    """The policy as imitation left it, run beside the learner to say what it would have done.

    It shares the learner's frozen parameters and takes the frozen features that the learner has computed, so
    that a step costs one pass of its trainable parts.
    """

    def __init__(self, policy: nn.Module, memory: Tensor) -> None:
        """Copies ``policy``'s trainable parts; ``memory`` (N, ...) is the learner's at this moment."""
        shared: dict[int, Any] = {id(p): p for p in policy.parameters() if not p.requires_grad}
        shared[id(policy.optimizer)] = None
        self.policy = copy.deepcopy(policy, memo=shared)
        self.policy.requires_grad_(False)
        # The line above reached the shared parameters too, which were frozen already: nothing changed for
        # them.
        self.policy.set_training_mode(False)  # type: ignore[operator]
        self.memory = memory.clone()

    def logits(
        self,
        observations: dict[str, Tensor],
        episode_starts: Tensor,
        frozen: dict[str, Tensor] | None,
        envs: slice = slice(None),
    ) -> Tensor:
        """Its action logits (M, A) for the newest observations of ``envs``; advances its memory of them."""
        answer = self.policy.act(  # type: ignore[operator]
            observations, self.memory[envs], episode_starts, deterministic=True, frozen=frozen
        )
        self.memory[envs] = answer[3]
        return answer[5]

    def state_dict(self) -> dict[str, Any]:
        """Its trainable parts and memory."""
        return {"policy": self.policy.state_dict(), "memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state."""
        self.policy.load_state_dict(state["policy"])
        self.memory = state["memory"].clone()


def imitation_objective(
    logits: Tensor,
    values: Tensor,
    batch: SequenceBatch,
    config: ImitationConfig,
    vf_coef: float,
    ranks: Ranks | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one minibatch in the imitation phase, and what to log: labels plus the critic's regression.

    ``logits`` (T, B, A) and ``values`` (T, B) are the policy's; ``batch`` carries the expert's actions. Of
    several ``ranks``, each brings its part of the minibatch.
    """
    if batch.expert_actions is None:
        raise ValueError("this rollout carries no expert actions: collect it with an expert")
    action_loss, agreement = imitation_loss(
        logits, batch.expert_actions, batch.episode_starts, config.inflection_weight, ranks, batch.samples
    )
    value_loss = functional.mse_loss(values, batch.returns)
    return action_loss + vf_coef * value_loss, {
        "imitation/loss": action_loss.detach(),
        "imitation/agreement": agreement,
        "train/value_loss": value_loss.detach(),
    }
