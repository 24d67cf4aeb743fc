"""Proximal policy optimisation (Schulman et al. 2017) on whole sequences, as a Stable-Baselines3 algorithm.

What differs from :class:`stable_baselines3.PPO`: rollouts stay tensors on the device; the policy may have a
memory, so a minibatch is whole sequences of some environments; features of a frozen encoder are stored with
the rollout and handed back in the update; and an expert may teach first (:mod:`navagent.learning.imitation`).
On a policy without memory and with one minibatch, an update is the same as Stable-Baselines3's.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.nn import functional

from navagent.learning.imitation import (
    Anchor,
    ExpertMixture,
    ImitationConfig,
    divergence,
    imitation_objective,
)
from navagent.learning.rollout import SequenceBatch, SequenceBuffer, TensorEnv, tensor_env

_POLICY_METHODS = ("initial_memory", "act", "evaluate_sequences", "penalty", "metrics", "set_progress")


class PPO(OnPolicyAlgorithm):
    """PPO for policies with memory over frozen features, with an optional imitation phase before it.

    The policy class must be a Stable-Baselines3 policy that also has ``initial_memory``, ``act``,
    ``evaluate_sequences``, ``penalty``, ``metrics`` and ``set_progress``, as
    :class:`policies.actor_critic.NavigationPolicy` has. Callbacks, loggers, ``save``, ``load`` and
    ``predict`` are Stable-Baselines3's. A callback may also define ``on_update_end() -> bool``, called after
    each update; returning False ends the training.
    """

    policy_aliases: ClassVar[dict[str, Any]] = {}
    rollout_buffer: SequenceBuffer  # type: ignore[assignment]

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
        """
        self.n_minibatches = n_minibatches
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.feature_dtype = feature_dtype
        self.imitation = imitation or ImitationConfig()
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

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        # The base class would transpose images to channels first; the encoder declares its own preprocessing.
        if isinstance(env, VecEnv):
            return env
        return OnPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def _setup_model(self) -> None:
        missing = [name for name in _POLICY_METHODS if not hasattr(self.policy_class, name)]
        if missing:
            raise TypeError(
                f"policy {self.policy_class.__name__} lacks {', '.join(missing)}: use "
                "policies.actor_critic.NavigationPolicy or a policy with the same methods"
            )
        for name, count in (
            ("n_minibatches", self.n_minibatches),
            ("imitation num_minibatches", self.imitation.num_minibatches),
        ):
            if count is not None and not 1 <= count <= self.n_envs:
                raise ValueError(
                    f"{name} {count} must lie between 1 and the number of environments, {self.n_envs}"
                )
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)
        self.rollout_buffer = SequenceBuffer(self.n_steps, self.n_envs, self.device, self.feature_dtype)
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
        ).to(self.device)
        self.generator = torch.Generator().manual_seed(0 if self.seed is None else self.seed)
        """Draws the order of environments in minibatches and who acts while imitating."""
        assert isinstance(self.action_space, spaces.Discrete)
        # PointNav's STOP is action 0 of four; with three actions stopping is automatic.
        stop_action = 0 if self.action_space.n == 4 else None
        self.mixture = ExpertMixture(self.imitation, self.n_envs, stop_action, self.generator)
        self.anchor: Anchor | None = None
        self.stage_seconds: dict[str, float] = defaultdict(float)
        """Time spent since the last log, by stage: simulate, expert, policy, update [s]."""
        self.recent_episodes: deque[dict[str, float]] = deque(maxlen=self._stats_window_size)
        """Measures of the newest episodes."""
        self.episodes_of_rollout: list[dict[str, float]] = []
        """Measures of the episodes that ended in the newest rollout."""
        self._frames_logged = 0
        self._memory: Tensor | None = None
        self._tensor_env: TensorEnv | None = None

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "generator",
            "mixture",
            "anchor",
            "_memory",
            "_tensor_env",
            "_last_obs",
            "_last_episode_starts",
        ]

    @property
    def phase(self) -> str:
        """``imitation`` or ``ppo``: what the next rollout is for."""
        return "imitation" if self.num_timesteps < self.imitation.frames else "ppo"

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.stage_seconds[name] += time.perf_counter() - start

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        assert self.env is not None
        self._tensor_env = tensor_env(self.env, self.device)
        begins = reset_num_timesteps or self._last_obs is None
        answer = super()._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        if begins:
            observations: Any = self._last_obs
            tensors: Any = {
                key: torch.tensor(value, device=self.device) for key, value in observations.items()
            }
            starts: Any = torch.ones(self.n_envs, dtype=torch.bool, device=self.device)
            policy: Any = self.policy
            self._last_obs, self._last_episode_starts = tensors, starts
            self._memory = policy.initial_memory(self.n_envs).to(self.device)
        return answer

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> PPO:
        """Collects and updates in turn until ``total_timesteps`` frames are done or a callback says stop."""
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        self._frames_logged = self.num_timesteps
        callback.on_training_start(locals(), globals())
        assert self.env is not None
        iteration = 0
        while self.num_timesteps < total_timesteps:
            if not self.collect_rollouts(self.env, callback, self.rollout_buffer, self.n_steps):
                break
            iteration += 1
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            self.train()
            if log_interval and iteration % log_interval == 0:
                self.dump_logs(iteration)
            if not _after_update(callback):
                break
        callback.on_training_end()
        return self

    def collect_rollouts(  # type: ignore[override]
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: SequenceBuffer, n_rollout_steps: int
    ) -> bool:
        """Fills ``rollout_buffer`` with ``n_rollout_steps`` steps; False if a callback ended it before."""
        policy: Any = self.policy
        environment = self._tensor_env
        assert environment is not None and self._memory is not None
        observations: Any = self._last_obs
        starts: Any = self._last_episode_starts
        imitating = self.phase == "imitation"
        if not imitating and self.anchor is None and self.imitation.anchor_weight(self.num_timesteps) > 0:
            self.anchor = Anchor(policy, self._memory)
        if self.anchor is not None and self.imitation.anchor_weight(self.num_timesteps) == 0:
            self.anchor = None
        policy.set_training_mode(False)
        policy.set_progress(self.num_timesteps, self._total_timesteps)
        rollout_buffer.start(self._memory)
        self.episodes_of_rollout = []
        callback.on_rollout_start()
        rewards = dones = None
        for _ in range(n_rollout_steps):
            with self._stage("policy"), torch.inference_mode():
                actions, values, log_probs, memory, frozen, _ = policy.act(observations, self._memory, starts)
                reference = self.anchor.logits(observations, starts, frozen) if self.anchor else None
            expert = None
            # A copy made outside inference mode: environments may keep it and change it in place.
            executed = actions.clone()
            if imitating:
                with self._stage("expert"):
                    expert = environment.expert_actions()
                    executed = self.mixture.choose(executed, expert, starts, self.num_timesteps)
            with self._stage("simulate"):
                result = environment.step(executed)
            with self._stage("policy"):
                rollout_buffer.add(
                    observations,
                    executed,
                    result.rewards,
                    starts,
                    values,
                    log_probs,
                    frozen,
                    expert_actions=expert,
                    reference_logits=reference,
                )
                if result.final_observations is not None:
                    # An episode cut short has a future: the critic says what it was worth.
                    cut = result.truncated.nonzero().flatten()
                    future = self._values(
                        result.final_observations, memory[cut], torch.zeros_like(cut, dtype=torch.bool)
                    )
                    rollout_buffer.add_to_last_rewards(cut, self.gamma * future)
            self._memory, observations, starts = memory, result.observations, result.dones
            self._last_obs, self._last_episode_starts = observations, starts
            self.num_timesteps += self.n_envs
            self._remember(result.episodes)
            rewards, dones = result.rewards, result.dones
            infos = [{"episode": episode} for episode in result.episodes]
            callback.update_locals(locals())
            if not callback.on_step():
                return False
        with self._stage("policy"):
            last_values = self._values(observations, self._memory, starts)
            rollout_buffer.finish(last_values, starts, self.gamma, self.gae_lambda)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _values(self, observations: dict[str, Tensor], memory: Tensor, starts: Tensor) -> Tensor:
        """The critic's estimates (M,) before a step."""
        policy: Any = self.policy
        with torch.inference_mode():
            answer = policy.act(observations, memory, starts, deterministic=True)
        return answer[1].clone()

    def _remember(self, episodes: list[dict[str, float]]) -> None:
        assert self.ep_info_buffer is not None and self.ep_success_buffer is not None
        for episode in episodes:
            self.recent_episodes.append(episode)
            self.episodes_of_rollout.append(episode)
            self.ep_info_buffer.append(episode)
            if "success" in episode:
                self.ep_success_buffer.append(episode["success"])

    def training_state(self) -> dict[str, Any]:
        """Everything that decides how training goes on, as nested tensors and plain values.

        Meant for the moment between an update and the next rollout: rollouts are not part of it.
        """
        assert self._tensor_env is not None
        return {
            "frames": self.num_timesteps,
            "updates": self._n_updates,
            "policy": self.policy.state_dict(),
            "optimizer": self.policy.optimizer.state_dict(),
            "anchor": self.anchor.state_dict() if self.anchor else None,
            "memory": self._memory,
            "observations": self._last_obs,
            "episode_starts": self._last_episode_starts,
            "expert_acts": self.mixture.expert_acts,
            "recent_episodes": list(self.recent_episodes),
            "environment": self._tensor_env.state_dict(),
            "random": {
                "minibatches": self.generator.get_state(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
                "numpy": np.random.get_state(),
                "python": random.getstate(),
            },
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`training_state`; then call ``learn`` with ``reset_num_timesteps=False``.

        Raises KeyError, TypeError, ValueError or RuntimeError if the state is of another agent or
        environment.
        """
        assert self.env is not None
        self._tensor_env = tensor_env(self.env, self.device)
        self.policy.load_state_dict(state["policy"])
        self.policy.optimizer.load_state_dict(state["optimizer"])
        self.num_timesteps = int(state["frames"])
        self._n_updates = int(state["updates"])
        self._memory = state["memory"].to(self.device)
        self._last_obs = {key: value.to(self.device) for key, value in state["observations"].items()}
        self._last_episode_starts = state["episode_starts"].to(self.device)
        self.anchor = None
        if state["anchor"] is not None:
            self.anchor = Anchor(self.policy, self._memory)
            self.anchor.load_state_dict(state["anchor"])
            self.anchor.memory = self.anchor.memory.to(self.device)
        self.mixture.expert_acts = state["expert_acts"]
        self.recent_episodes.clear()
        self.recent_episodes.extend(state["recent_episodes"])
        self._tensor_env.load_state_dict(state["environment"])
        generators = state["random"]
        self.generator.set_state(generators["minibatches"])
        torch.set_rng_state(generators["torch"])
        if self.device.type == "cuda" and generators["cuda"]:
            torch.cuda.set_rng_state_all(generators["cuda"])
        np.random.set_state(generators["numpy"])
        random.setstate(generators["python"])

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
                    loss, record = imitation_objective(logits, values, batch, self.imitation, self.vf_coef)
                else:
                    loss, record = self._ppo_objective(values, log_probs, entropy, logits, batch)
                loss = loss + policy.penalty()
                record["train/loss"] = loss.detach()
                record["train/entropy"] = entropy.detach().mean()
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
                loss.backward()
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
        spread = buffer.returns.var()
        unexplained = (buffer.returns - buffer["values"]).var() / spread
        self.logger.record("train/explained_variance", (1 - unexplained).item() if spread > 0 else 0.0)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _ppo_objective(
        self, values: Tensor, log_probs: Tensor, entropy: Tensor, logits: Tensor, batch: SequenceBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """PPO's loss of one minibatch, and what to log; the policy's answers are (T, B)."""
        advantages = batch.advantages
        if self.normalize_advantage and advantages.numel() > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

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

    def dump_logs(self, iteration: int = 0) -> None:
        """Writes means over the newest episodes, times by stage, and the update's losses."""
        stages = sum(self.stage_seconds.values())
        frames = self.num_timesteps - self._frames_logged
        self._frames_logged = self.num_timesteps
        self.logger.record("time/frames_per_second", frames / stages if stages > 0 else 0.0)
        for stage, seconds in self.stage_seconds.items():
            self.logger.record(f"time/{stage}_seconds", seconds)
            self.logger.record(f"time/{stage}_share", seconds / stages if stages > 0 else 0.0)
        self.stage_seconds.clear()
        phase = "imitation" if self.rollout_buffer.has_expert_actions else "ppo"
        self.logger.record("rollout/phase", phase, exclude="tensorboard")
        self.logger.record("rollout/episodes", len(self.episodes_of_rollout))
        names: dict[str, list[float]] = defaultdict(list)
        for episode in self.recent_episodes:
            for name, value in episode.items():
                names[name].append(value)
        for name, numbers in names.items():
            if name not in ("r", "l", "t"):
                self.logger.record(f"rollout/{name}", sum(numbers) / len(numbers))
        if names and "reward_sum" not in names:
            self.logger.record("rollout/reward_sum", sum(names["r"]) / len(names["r"]))
        self.logger.dump(step=self.num_timesteps)


def _after_update(callback: BaseCallback) -> bool:
    """Tells callbacks that have ``on_update_end`` that an update is done; False if one says stop."""
    if isinstance(callback, CallbackList):
        return all([_after_update(child) for child in callback.callbacks])
    hook = getattr(callback, "on_update_end", None)
    return True if hook is None else bool(hook())
