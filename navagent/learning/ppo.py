"""Proximal policy optimisation (Schulman et al. 2017) on whole sequences, as a Stable-Baselines3 algorithm.

What differs from :class:`stable_baselines3.PPO`: the policy may have a memory, so a minibatch is whole
sequences of some environments; features of a frozen encoder are stored with the rollout and handed back in
the update; and an expert may teach first (:mod:`navagent.learning.imitation`). Rollouts are collected by
:mod:`navagent.learning.algorithm`. On a policy without memory and with one minibatch, an update is the same
as Stable-Baselines3's.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor
from torch.nn import functional

from navagent.distributed import Ranks
from navagent.learning.algorithm import SequenceAlgorithm
from navagent.learning.imitation import ImitationConfig, divergence, imitation_objective
from navagent.learning.rollout import SequenceBatch


class PPO(SequenceAlgorithm):
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
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 128,
        n_minibatches: int = 2,
        n_epochs: int = 3,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.01,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        target_kl: float | None = None,
        feature_dtype: torch.dtype = torch.float32,
        imitation: ImitationConfig | None = None,
        ranks: Ranks | None = None,
        sync_frac: float = 0.6,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        """See :class:`stable_baselines3.PPO` for the settings of the same name. Those that differ:

        Args:
            policy: The policy class.
            env: An SB3 VecEnv, stepped by tensors where it can, or a Gymnasium environment.
            learning_rate: Or a schedule of it, see :class:`navagent.learning.schedules.LearningRate`.
            n_steps: Length of a rollout T; also how far gradients flow back through time.
            n_minibatches: Into how many groups of environments a rollout is split.
            feature_dtype: How frozen features are stored.
            imitation: The expert's part; None for none.
            ranks: The processes that learn together, each with environments of its own; this one if None.
            sync_frac: When this share of the ranks has its rollout, the others stop theirs early.
        """
        self.n_minibatches = n_minibatches
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.feature_dtype = feature_dtype
        self.imitation = imitation or ImitationConfig()
        self.ranks = ranks or Ranks()
        self.sync_frac = sync_frac
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            device=device,
            seed=seed,
            _init_setup_model=_init_setup_model,
            supported_action_spaces=(spaces.Discrete,),
        )

    def _setup_model(self) -> None:
        for name, count in (
            ("n_minibatches", self.n_minibatches),
            ("imitation num_minibatches", self.imitation.num_minibatches),
        ):
            everyone = self.n_envs * self.ranks.size
            if count is not None and not 1 <= count <= everyone:
                raise ValueError(
                    f"{name} {count} must lie between 1 and the number of environments, {everyone}"
                )
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)
        super()._setup_model()

    def train(self) -> None:
        """Updates the policy on the newest rollout: by PPO, or by the expert's labels while imitating."""
        with self._stage("update"):
            self._update()

    def _update(self) -> None:
        policy: Any = self.policy
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        # Whatever is trained on labels was collected with them.
        imitating = self.rollout_buffer.has_expert_actions
        minibatches = self.n_minibatches
        if imitating and self.imitation.num_minibatches is not None:
            minibatches = self.imitation.num_minibatches
        parameters = [p for group in policy.optimizer.param_groups for p in group["params"]]
        records: dict[str, list[Tensor]] = defaultdict(list)
        stopped = False
        for _ in range(self.n_epochs):
            for batch in self.rollout_buffer.minibatches(minibatches, self.generator):
                values, log_probs, entropy, logits = policy.evaluate_sequences(
                    batch.observations, batch.actions, batch.memory, batch.episode_starts, batch.frozen
                )
                if imitating:
                    loss, record = imitation_objective(
                        logits, values, batch, self.imitation, self.vf_coef, self.ranks
                    )
                else:
                    loss, record = self._ppo_objective(values, log_probs, entropy, logits, batch)
                loss = loss + policy.penalty()
                record["train/loss"] = loss.detach()
                record["train/entropy"] = entropy.detach().mean()
                record, share = self.ranks.average(record, batch.samples)
                self._check_finite(record)
                for name, value in record.items():
                    records[name].append(value)
                if (
                    self.target_kl is not None
                    and not imitating
                    and record["train/approx_kl"].item() > 1.5 * self.target_kl
                ):
                    stopped = True
                    break
                policy.optimizer.zero_grad(set_to_none=True)
                (loss * share).backward()
                self.ranks.add_gradients(parameters)
                norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm).detach()
                # A finite loss can have gradients that are not, as of a square root at 0.
                self._check_finite({**record, "train/grad_norm": norm})
                records["train/grad_norm"].append(norm)
                policy.optimizer.step()
            self._n_updates += 1
            if stopped:
                break
        for name, history in records.items():
            self.logger.record(name, torch.stack(history).mean().item())
        for name, value in policy.metrics().items():
            self.logger.record(f"adaptation/{name}", value)
        buffer = self.rollout_buffer
        assert buffer.returns is not None
        self.ranks.average_statistics(policy)
        spread = self.ranks.variance(buffer.returns)
        unexplained = self.ranks.variance(buffer.returns - buffer["values"]) / spread
        self.logger.record("train/explained_variance", (1 - unexplained).item() if spread > 0 else 0.0)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _ppo_objective(
        self, values: Tensor, log_probs: Tensor, entropy: Tensor, logits: Tensor, batch: SequenceBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """PPO's loss of one minibatch, and what to log; the policy's answers are (T, B)."""
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

        if self.clip_range_vf is not None:
            limit = self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]
            values = batch.values + (values - batch.values).clamp(-limit, limit)
        value_loss = functional.mse_loss(values, batch.returns)

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

    def _check_finite(self, record: dict[str, Tensor]) -> None:
        watched = [record[name] for name in ("train/loss", "train/grad_norm") if name in record]
        if all(bool(value.isfinite()) for value in watched):
            return
        parts = ", ".join(f"{name} {value.item():g}" for name, value in record.items())
        raise FloatingPointError(
            f"the loss or its gradient is not finite after {self.num_timesteps} frames ({parts}); the policy "
            "was not changed by this minibatch. Lower the learning rate or max_grad_norm, or look for "
            "infinite rewards or observations"
        )
