"""Learning from whole sequences: one loop over minibatches, and the update from an expert's labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import Tensor, nn

from navagent.distributed import Ranks
from navagent.learning.algorithm import SequenceAlgorithm
from navagent.learning.auxiliary import AuxiliaryConfig, AuxiliaryLosses
from navagent.learning.fast_paths import FastPaths
from navagent.learning.imitation import ImitationConfig, imitation_objective
from navagent.learning.nonfinite import NonFinite
from navagent.learning.rollout import SequenceBatch

Evaluation = tuple[Tensor, Tensor, Tensor, Tensor]
"""Values, log-probabilities of what was done, entropies, each (T, B), and logits (T, B, A)."""

Objective = Callable[[Evaluation, SequenceBatch], tuple[Tensor, dict[str, Tensor]]]
"""From what a policy says of a minibatch: the loss (), and what to log."""

Pass = tuple[Iterable[SequenceBatch], str]
"""Minibatches to go through once, and the prefix of what is logged of them, such as ``train/``."""


class SequenceLearner(SequenceAlgorithm):
    """Updates the policy on minibatches of whole sequences: by an expert's labels where there are any.

    A subclass defines :meth:`_update`, and may use :meth:`_learn_labels` for it.
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
        normalize_returns: bool = False,
        ent_coef: float = 0.01,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        replay_epochs: int = 0,
        replay_steps: int = 0,
        auxiliary: AuxiliaryConfig | None = None,
        nonfinite: NonFinite = "stop",
        feature_dtype: torch.dtype = torch.float32,
        imitation: ImitationConfig | None = None,
        ranks: Ranks | None = None,
        sync_frac: float = 0.6,
        fast_paths: FastPaths | None = None,
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
            n_epochs: Passes over the newest rollout in each update.
            normalize_returns: Whether rewards are divided by how much discounted returns vary, see
                :class:`navagent.learning.normalise.ReturnNormaliser`.
            replay_epochs: Passes over past rollouts in each update.
            replay_steps: Steps of every environment that are kept for them; 0 without.
            auxiliary: Further losses for the policy's features, see :mod:`navagent.learning.auxiliary`.
            nonfinite: Whether to ``stop`` at numbers that are not finite or to ``skip`` and count them, see
                :mod:`navagent.learning.nonfinite`.
            feature_dtype: How frozen features are stored.
            imitation: The expert's part; None for none.
            ranks: The processes that learn together, each with environments of its own; this one if None.
            sync_frac: When this share of the ranks has its rollout, the others stop theirs early.
            fast_paths: Faster ways to compute the policy; None for none.
        """
        self.n_minibatches = n_minibatches
        self.n_epochs = n_epochs
        self.normalize_returns = normalize_returns
        self.replay_epochs = replay_epochs
        self.replay_steps = replay_steps
        self.auxiliary_config = auxiliary or AuxiliaryConfig()
        self.nonfinite = nonfinite
        self.feature_dtype = feature_dtype
        self.imitation = imitation or ImitationConfig()
        self.ranks = ranks or Ranks()
        self.sync_frac = sync_frac
        self.fast_paths = fast_paths or FastPaths()
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
        super()._setup_model()
        self.auxiliary: AuxiliaryLosses | None = None
        if self.auxiliary_config.wanted:
            self.auxiliary = self._make_auxiliary()

    @property
    def wants_turns(self) -> bool:
        """Whether they are learned from."""
        return self.auxiliary_config.heading_coef > 0

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
        """Updates the policy on the newest rollout."""
        with self._stage("update"):
            self._update()

    def _update(self) -> None:
        """Learns from the newest rollout."""
        raise NotImplementedError

    def _learn_labels(self) -> None:
        """Learns the expert's labels of the newest rollout, and the critic its returns."""

        def objective(evaluation: Evaluation, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
            values, _, _, logits = evaluation
            return imitation_objective(logits, values, batch, self.imitation, self.vf_coef, self.ranks)

        self.policy.set_training_mode(True)
        self._optimise(self._label_passes(), objective)

    @property
    def label_minibatches(self) -> int:
        """Into how many groups of environments a rollout is split to learn its labels."""
        return self.imitation.num_minibatches or self.n_minibatches

    def _label_passes(self) -> Iterator[Pass]:
        """What labels are learned from: the newest rollout, ``n_epochs`` times."""
        for _ in range(self.n_epochs):
            yield self.rollout_buffer.minibatches(self.label_minibatches, self.generator), "train/"

    def _optimise(
        self,
        passes: Iterable[Pass],
        objective: Objective,
        enough: Callable[[dict[str, Tensor], str], bool] = lambda *_: False,
    ) -> None:
        """Takes a step of the optimiser for each minibatch of each pass, and logs what came of it.

        ``enough`` is asked, before a step, with what is logged of a minibatch and the prefix of its pass;
        True ends the update.
        """
        policy: Any = self.policy
        self._update_learning_rate(policy.optimizer)
        parameters = [p for group in policy.optimizer.param_groups for p in group["params"]]
        records: dict[str, list[Tensor]] = defaultdict(list)
        skipped = self.guard.skipped_minibatches
        moved = stopped = False
        for batches, kind in passes:
            for batch in batches:
                evaluation, extra, record = self._evaluate(batch)
                loss, losses = objective(evaluation, batch)
                loss = loss + policy.penalty() + extra
                record |= losses
                record["train/loss"] = loss.detach()
                record["train/entropy"] = evaluation[2].detach().mean()
                record, share = self.ranks.average(record, batch.samples)
                if not self.guard.accepts(record, batch, policy, self.num_timesteps):
                    continue
                for name, value in record.items():
                    records[_renamed(name, kind)].append(value)
                if enough(record, kind):
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

    def _evaluate(self, batch: SequenceBatch) -> tuple[Evaluation, Tensor | float, dict[str, Tensor]]:
        """What the policy says of a minibatch, the auxiliary losses of it, and what to log of them."""
        policy: Any = self.policy
        autocast = self.fast_paths.autocast(self.device)
        if self.auxiliary is None:
            with autocast:
                evaluation = policy.evaluate_sequences(
                    batch.observations, batch.actions, batch.memory, batch.episode_starts, batch.frozen
                )
            return evaluation, 0.0, {}
        with autocast:
            features, hidden = policy.sequence_features(
                batch.observations, batch.memory, batch.episode_starts, batch.frozen
            )
            evaluation = policy.evaluate_hidden(hidden, batch.actions)
        if self.wants_turns and batch.expert_actions is not None and batch.expert_turns is None:
            raise ValueError(
                "heading_coef learns the turns that an expert plans, and this environment's does not tell "
                "them: use envs.vector_env.PointNavVectorEnv, or a heading_coef of 0"
            )
        # A generator of its own: ranks whose minibatches differ draw differently often.
        seed = torch.randint(2**62, (), generator=self.generator).item()
        generator = torch.Generator().manual_seed(int(seed) + self.ranks.rank)
        loss, record = self.auxiliary(
            features.float(),
            hidden.float(),
            batch.actions,
            batch.episode_starts,
            batch.expert_turns,
            generator,
        )
        return evaluation, loss, record

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
        self.logger.record("train/explained_variance", (1 - unexplained).item() if spread > 0 else 0.0)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")


@contextmanager
def alone(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block, of all parameters of the optimiser only ``parameters`` get gradients."""
    kept = {id(parameter) for parameter in parameters}
    resting = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and id(parameter) not in kept
    ]
    for parameter in resting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)


def _renamed(name: str, kind: str) -> str:
    """What is logged under ``name`` of a pass over the newest rollout, for a pass of another ``kind``."""
    if kind == "train/":
        return name
    return name.replace("train/", kind).replace("imitation/", kind)
