"""Proximal policy optimisation (Schulman et al. 2017) on whole sequences, as a Stable-Baselines3 algorithm.

What differs from :class:`stable_baselines3.PPO`: the policy may have a memory, so a minibatch is whole
sequences of some environments; features of a frozen encoder are stored with the rollout and handed back in
the update; and an expert may teach first (:mod:`navagent.learning.imitation`). Rollouts are collected by
:mod:`navagent.learning.algorithm`. On a policy without memory and with one minibatch, an update is the same
as Stable-Baselines3's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
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
from navagent.learning.auxiliary import AuxiliaryConfig, AuxiliaryLosses
from navagent.learning.imitation import ImitationConfig, divergence, imitation_objective
from navagent.learning.nonfinite import NonFinite
from navagent.learning.rollout import SequenceBatch, SequenceBuffer


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
        clip_value_loss: bool = False,
        normalize_advantage: bool = True,
        normalize_returns: bool = False,
        ent_coef: float = 0.01,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        target_kl: float | None = None,
        replay_epochs: int = 0,
        replay_steps: int = 0,
        auxiliary: AuxiliaryConfig | None = None,
        nonfinite: NonFinite = "stop",
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
            clip_range, clip_range_vf: Or schedules of them, see :class:`navagent.learning.schedules.Decay`.
            clip_value_loss: Whether the value loss is the larger of what it is with and without clipping, as
                in PPO2 and CleanRL, with ``clip_range`` where ``clip_range_vf`` is None. Without this,
                ``clip_range_vf`` clips as in Stable-Baselines3. Both are the mean square, not half of it.
            normalize_returns: Whether rewards are divided by how much discounted returns vary, see
                :class:`navagent.learning.normalise.ReturnNormaliser`.
            replay_epochs: Epochs over past rollouts in each update, beside the ``n_epochs`` over the newest
                and in random order with them, see :mod:`navagent.learning.replay`.
            replay_steps: Steps of every environment that are kept for them; 0 without.
            auxiliary: Further losses for the policy's features, see :mod:`navagent.learning.auxiliary`.
            nonfinite: Whether to ``stop`` at numbers that are not finite or to ``skip`` and count them, see
                :mod:`navagent.learning.nonfinite`.
            feature_dtype: How frozen features are stored.
            imitation: The expert's part; None for none.
            ranks: The processes that learn together, each with environments of its own; this one if None.
            sync_frac: When this share of the ranks has its rollout, the others stop theirs early.
        """
        self.n_minibatches = n_minibatches
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.clip_value_loss = clip_value_loss
        self.normalize_advantage = normalize_advantage
        self.normalize_returns = normalize_returns
        self.target_kl = target_kl
        self.replay_epochs = replay_epochs
        self.replay_steps = replay_steps
        self.auxiliary_config = auxiliary or AuxiliaryConfig()
        self.nonfinite = nonfinite
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
        if bool(self.replay_epochs) != bool(self.replay_steps) or self.replay_epochs < 0:
            raise ValueError(
                f"replay_epochs {self.replay_epochs} and replay_steps {self.replay_steps}: expected "
                "both to be 0, or neither"
            )
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)
        super()._setup_model()
        self.auxiliary: AuxiliaryLosses | None = None
        if self.auxiliary_config.wanted:
            self.auxiliary = self._make_auxiliary()

    def _make_auxiliary(self) -> AuxiliaryLosses:
        """The auxiliary losses, their networks in the policy's optimiser."""
        policy: Any = self.policy
        if not hasattr(policy, "sequence_features"):
            raise TypeError(
                f"policy {type(policy).__name__} lacks sequence_dims, sequence_features and evaluate_hidden, "
                "which auxiliary losses need: use policies.actor_critic.NavigationPolicy"
            )
        assert isinstance(self.action_space, spaces.Discrete)
        features, hidden = policy.sequence_dims
        losses = AuxiliaryLosses(self.auxiliary_config, features, hidden, int(self.action_space.n))
        self.ranks.copy_from_first(losses.to(self.device))
        # They decay as actor and critic do, which are in the last group.
        decay = policy.optimizer.param_groups[-1]["weight_decay"]
        policy.optimizer.add_param_group({"params": list(losses.parameters()), "weight_decay": decay})
        return losses

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, tensors = super()._get_torch_save_params()
        return [*modules, *(["auxiliary"] if self.auxiliary else [])], tensors

    def training_state(self) -> dict[str, Any]:
        """See :meth:`SequenceAlgorithm.training_state`."""
        auxiliary = self.auxiliary.state_dict() if self.auxiliary else None
        return super().training_state() | {"auxiliary": auxiliary}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """See :meth:`SequenceAlgorithm.load_training_state`."""
        super().load_training_state(state)
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(state["auxiliary"])

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
        skipped = self.guard.skipped_minibatches
        moved = stopped = False
        for rollout, kind in self._epochs(imitating):
            for batch in rollout.minibatches(minibatches, self.generator):
                (values, log_probs, entropy, logits), extra, record = self._evaluate(batch)
                if imitating:
                    loss, losses = imitation_objective(
                        logits, values, batch, self.imitation, self.vf_coef, self.ranks
                    )
                else:
                    loss, losses = self._ppo_objective(values, log_probs, entropy, logits, batch)
                loss = loss + policy.penalty() + extra
                record |= losses
                record["train/loss"] = loss.detach()
                record["train/entropy"] = entropy.detach().mean()
                record, share = self.ranks.average(record, batch.samples)
                if not self.guard.accepts(record, batch, policy, self.num_timesteps):
                    continue
                for name, value in record.items():
                    records[name.replace("train/", kind)].append(value)
                if (
                    self.target_kl is not None
                    and kind == "train/"
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
                record["train/grad_norm"] = norm
                if not self.guard.accepts(record, batch, policy, self.num_timesteps):
                    continue
                records[f"{kind}grad_norm"].append(norm)
                policy.optimizer.step()
                moved = True
            self._n_updates += 1
            if stopped:
                break
        if not moved and self.guard.skipped_minibatches > skipped:
            raise FloatingPointError(
                f"no minibatch after {self.num_timesteps} frames had a finite loss and gradient: all would "
                "be skipped for ever. Lower the learning rate or max_grad_norm"
            )
        self._log_update(records)

    def _epochs(self, imitating: bool) -> Iterator[tuple[SequenceBuffer, str]]:
        """What each epoch learns from, and where in the log its losses go: by default the newest rollout."""
        if self.replay is None or imitating:
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

    def _evaluate(self, batch: SequenceBatch) -> tuple[Any, Tensor | float, dict[str, Tensor]]:
        """What the policy says of a minibatch, the auxiliary losses of it, and what to log of them."""
        policy: Any = self.policy
        if self.auxiliary is None:
            evaluation = policy.evaluate_sequences(
                batch.observations, batch.actions, batch.memory, batch.episode_starts, batch.frozen
            )
            return evaluation, 0.0, {}
        features, hidden = policy.sequence_features(
            batch.observations, batch.memory, batch.episode_starts, batch.frozen
        )
        # A generator of its own: ranks whose minibatches differ draw differently often.
        seed = torch.randint(2**62, (), generator=self.generator).item()
        generator = torch.Generator().manual_seed(int(seed) + self.ranks.rank)
        loss, record = self.auxiliary(features, hidden, batch.actions, batch.episode_starts, generator)
        return policy.evaluate_hidden(hidden, batch.actions), loss, record

    def _log_update(self, records: dict[str, list[Tensor]]) -> None:
        policy: Any = self.policy
        for name, history in records.items():
            self.logger.record(name, torch.stack(history).mean().item())
        for name, value in policy.metrics().items():
            self.logger.record(f"adaptation/{name}", value)
        buffer = self.rollout_buffer
        assert buffer.returns is not None
        self.ranks.average_statistics(policy)
        spread = self.ranks.variance(buffer.returns)
        unexplained = self.ranks.variance(buffer.returns - buffer["values"]) / spread
        self.logger.record("train/clip_range", self.clip_range(self._current_progress_remaining))  # type: ignore[operator]
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
