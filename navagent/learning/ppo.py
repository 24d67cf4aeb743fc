"""Proximal policy optimisation (Schulman et al. 2017) on whole sequences, as a Stable-Baselines3 algorithm.

What differs from :class:`stable_baselines3.PPO`: the policy may have a memory, so a minibatch is whole
sequences of some environments; features of a frozen encoder are stored with the rollout and handed back in
the update; and an expert may teach first (:mod:`navagent.learning.imitation`). Rollouts are collected by
:mod:`navagent.learning.algorithm`. On a policy without memory and with one minibatch, an update is the same
as Stable-Baselines3's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor
from torch.nn import functional

from navagent.learning.imitation import divergence
from navagent.learning.rollout import SequenceBatch, SequenceBuffer
from navagent.learning.updates import Evaluation, Pass, SequenceLearner, alone


class PPO(SequenceLearner):
    """PPO for policies with memory over frozen features, with an optional imitation phase before it.

    The policy class must be a Stable-Baselines3 policy that also has ``initial_memory``, ``act``,
    ``evaluate_sequences``, ``penalty``, ``metrics`` and ``set_progress``, as
    :class:`policies.actor_critic.NavigationPolicy` has. Callbacks, loggers, ``save``, ``load`` and
    ``predict`` are Stable-Baselines3's. A callback may also define ``on_update_end() -> bool``, called after
    each update; returning False ends the training.
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        clip_value_loss: bool = False,
        normalize_advantage: bool = True,
        target_kl: float | None = None,
        **settings: Any,
    ) -> None:
        """Names of settings are :class:`stable_baselines3.PPO`'s where it has them.

        Args:
            policy: The policy class.
            env: An SB3 VecEnv, stepped by tensors where it can, or a Gymnasium environment.
            clip_range, clip_range_vf: Or schedules of them, see :class:`navagent.learning.schedules.Decay`.
            clip_value_loss: Whether the value loss is the larger of what it is with and without clipping, as
                in PPO2 and CleanRL, with ``clip_range`` where ``clip_range_vf`` is None. Without this,
                ``clip_range_vf`` clips as in Stable-Baselines3. Both are the mean square, not half of it.
            normalize_advantage: Whether a minibatch's advantages get mean 0 and deviation 1.
            target_kl: An update ends early where the divergence passes 1.5 times this.
            **settings: What :class:`navagent.learning.updates.SequenceLearner` takes. Passes over past
                rollouts come in random order with those over the newest, see
                :mod:`navagent.learning.replay`.
        """
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.clip_value_loss = clip_value_loss
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        super().__init__(policy, env, **settings)

    def _setup_model(self) -> None:
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)
        super()._setup_model()
        if self.imitation.critic_warmup_frames and not hasattr(self.policy, "critic_parameters"):
            raise TypeError(
                f"policy {type(self.policy).__name__} lacks critic_parameters, which critic_warmup_frames "
                "needs: use policies.actor_critic.NavigationPolicy"
            )

    def _update(self) -> None:
        """By PPO, by the expert's labels while imitating, or the critic alone."""
        if self.rollout_phase == "imitation":
            self._learn_labels()
        elif self.rollout_phase == "critic":
            self._learn_critic()
        else:
            self.policy.set_training_mode(True)
            self._optimise(self._passes(), self._objective, self._diverged)
        if self.imitation.anchor_frames and self.rollout_phase != "imitation":
            self.logger.record("imitation/anchor_weight", self.imitation.anchor_weight(self.num_timesteps))
        self.logger.record("train/clip_range", self.clip_range(self._current_progress_remaining))  # type: ignore[operator]

    def _diverged(self, record: dict[str, Tensor], kind: str) -> bool:
        """Whether the policy has moved far enough from the one that acted."""
        if self.target_kl is None or kind != "train/":
            return False
        return record["train/approx_kl"].item() > 1.5 * self.target_kl

    def _learn_critic(self) -> None:
        """Lets the critic's own parameters learn the newest rollout; the policy, and what both share, stay.

        After imitation it does not know what the policy is worth, and its advantages would spoil the policy.
        """
        policy: Any = self.policy

        def objective(evaluation: Evaluation, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
            clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
            loss = self._value_loss(evaluation[0], batch, clip_range)
            return self.vf_coef * loss, {"train/value_loss": loss.detach()}

        policy.set_training_mode(False)
        newest = (
            (self.rollout_buffer.minibatches(self.n_minibatches, self.generator), "train/")
            for _ in range(self.n_epochs)
        )
        with alone(policy.optimizer, policy.critic_parameters()):
            self._optimise(newest, objective)

    def _passes(self) -> Iterator[Pass]:
        for rollout, kind in self._epochs():
            yield rollout.minibatches(self.n_minibatches, self.generator), kind

    def _epochs(self) -> Iterator[tuple[SequenceBuffer, str]]:
        """What each epoch learns from, and where in the log its losses go: by default the newest rollout."""
        if self.replay is None:
            for _ in range(self.n_epochs):
                yield self.rollout_buffer, "train/"
            return
        arguments = self.policy, self.gamma, self.gae_lambda, self.n_minibatches
        for epoch in torch.randperm(self.n_epochs + self.replay_epochs, generator=self.generator).tolist():
            self.policy.set_training_mode(False)
            if epoch < self.n_epochs:
                window, kind = self.replay.newest(*arguments), "train/"
            else:
                window, kind = self.replay.past(*arguments, self.generator), "replay/"
            self.policy.set_training_mode(True)
            yield window, kind

    def _objective(self, evaluation: Evaluation, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """PPO's loss of one minibatch, and what to log."""
        values, log_probs, entropy, logits = evaluation
        advantages = batch.advantages
        if self.normalize_advantage and (advantages.numel() > 1 or self.ranks.size > 1):
            mean, deviation = self.ranks.mean_std(advantages, batch.samples > 0)
            advantages = (advantages - mean) / (deviation + 1e-8)

        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        log_ratio = log_probs - batch.log_probs
        ratio = log_ratio.exp()
        unclipped = advantages * ratio
        clipped = advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
        policy_loss = -torch.min(unclipped, clipped).mean()

        value_loss = self._value_loss(values, batch, clip_range)

        loss = policy_loss - self.ent_coef * entropy.mean() + self.vf_coef * value_loss
        with torch.no_grad():
            # The low-variance estimate of the divergence, http://joschu.net/blog/kl-approx.html.
            approx_kl = ((log_ratio.exp() - 1) - log_ratio).mean()
            clip_fraction = ((ratio - 1).abs() > clip_range).float().mean()
        record = {
            "train/policy_loss": policy_loss.detach(),
            "train/value_loss": value_loss.detach(),
            "train/approx_kl": approx_kl,
            "train/clip_fraction": clip_fraction,
        }
        weight = self.imitation.anchor_weight(self.num_timesteps)
        if batch.reference_logits is not None and weight > 0:
            distance = divergence(batch.reference_logits, logits)
            loss = loss + weight * distance
            record["imitation/divergence"] = distance.detach()
        return loss, record

    def _value_loss(self, values: Tensor, batch: SequenceBatch, clip_range: float) -> Tensor:
        """The mean square of what the critic is wrong by, (), clipped as the settings say."""
        limit = clip_range
        if self.clip_range_vf is not None:
            limit = self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]
        clipped = batch.values + (values - batch.values).clamp(-limit, limit)
        if self.clip_value_loss:
            errors = torch.max((values - batch.returns).square(), (clipped - batch.returns).square())
            return errors.mean()
        return functional.mse_loss(values if self.clip_range_vf is None else clipped, batch.returns)
