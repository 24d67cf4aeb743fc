"""What surrounds the update of an on-policy algorithm on whole sequences: collecting, logging, resuming.

What differs from Stable-Baselines3's on-policy algorithms: rollouts stay tensors on the device; the policy
may have a memory; features of a frozen encoder are stored with the rollout; and an expert may act and label.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.optim import Optimizer

from navagent.distributed import RankLostError, Ranks, Stragglers
from navagent.learning.fast_paths import FastPaths
from navagent.learning.groups import AgentGroup, Decision, agent_groups, join_decisions, join_results
from navagent.learning.imitation import Anchor, ExpertMixture, ImitationConfig
from navagent.learning.nonfinite import FiniteGuard, NonFinite
from navagent.learning.normalise import Moments, ReturnNormaliser
from navagent.learning.replay import Replay
from navagent.learning.rollout import SequenceBuffer, StepResult, tensor_envs
from navagent.learning.workers import watched_workers
from navagent.progress import episodes_of, in_lines
from navagent.runs import RunError
from policies.adaptation import set_learning_rate

_POLICY_METHODS = ("initial_memory", "act", "evaluate_sequences", "penalty", "metrics", "set_progress")


class SequenceAlgorithm(OnPolicyAlgorithm):
    """Collects rollouts of whole sequences and hands them to ``train``, which a subclass defines.

    The policy class must be a Stable-Baselines3 policy that also has ``initial_memory``, ``act``,
    ``evaluate_sequences``, ``penalty``, ``metrics`` and ``set_progress``, as
    :class:`policies.actor_critic.NavigationPolicy` has. A subclass sets the attributes below before it calls
    the constructor of :class:`OnPolicyAlgorithm`.
    """

    policy_aliases: ClassVar[dict[str, Any]] = {}
    rollout_buffer: SequenceBuffer  # type: ignore[assignment]
    feature_dtype: torch.dtype
    """How frozen features are stored."""
    imitation: ImitationConfig
    """The expert's part."""
    ranks: Ranks
    """The processes that learn together, each with as many environments."""
    sync_frac: float
    """Share of the ranks whose finished rollouts end those of the others."""
    normalize_returns: bool
    """Whether rewards are divided by how much returns vary."""
    replay_steps: int
    """Steps of every environment that are kept to learn from again; 0 for none."""
    nonfinite: NonFinite
    """What to do about numbers that are not finite."""
    fast_paths: FastPaths
    """How the policy is computed."""

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
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.stragglers = Stragglers(self.ranks, self.sync_frac, self.n_steps)
        self.rollout_buffer = self._empty_buffer()
        self.replay = self._make_replay()
        self.normaliser: ReturnNormaliser | None = None
        if self.normalize_returns:
            self.normaliser = ReturnNormaliser(self.n_envs, self.gamma).to(self.device)
        self.guard = FiniteGuard(self.nonfinite, self.ranks.rank if self.ranks.size > 1 else None)
        """Looks for numbers that are not finite; a ``folder`` set on it gets what caused them."""
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
        ).to(self.device)
        self.ranks.copy_from_first(self.policy)
        self.fast_paths.prepare(self.policy, self.device)
        self.generator = torch.Generator().manual_seed(0 if self.seed is None else self.seed)
        """Draws the order of environments in minibatches and who acts while imitating."""
        assert isinstance(self.action_space, spaces.Discrete)
        # PointNav's STOP is action 0 of four; with three actions stopping is automatic.
        stop_action = 0 if self.action_space.n == 4 else None
        self.mixture = ExpertMixture(self.imitation, self.n_envs, stop_action, self.generator, self.ranks)
        self.anchor: Anchor | None = None
        self.rollout_phase = self.phase
        """What the newest rollout was for, as :attr:`phase` has it."""
        self.stage_seconds: dict[str, float] = defaultdict(float)
        """Time spent since the last log, by stage: simulate, expert, policy, update [s]."""
        self.recent_episodes: deque[dict[str, float]] = deque(maxlen=self._stats_window_size)
        """Measures of the newest episodes."""
        self.episodes_of_rollout: list[dict[str, float]] = []
        """Measures of the episodes that ended in the newest rollout."""
        self._frames_logged = 0
        self._memory: Tensor | None = None
        self._groups: list[AgentGroup] = []

    def _make_replay(self) -> Replay | None:
        return Replay(self.replay_steps, self._empty_buffer()) if self.replay_steps else None

    def _update_learning_rate(self, optimizers: list[Optimizer] | Optimizer) -> None:
        # Stable-Baselines3 gives all groups one rate; a method may want another for a part of it.
        super()._update_learning_rate(optimizers)
        rate = self.lr_schedule(self._current_progress_remaining)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            set_learning_rate(optimizer.param_groups, rate)

    def _empty_buffer(self) -> SequenceBuffer:
        return SequenceBuffer(
            self.n_steps,
            self.n_envs,
            self.device,
            self.feature_dtype,
            first_env=self.ranks.rank * self.n_envs,
            total_envs=self.ranks.size * self.n_envs,
        )

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, tensors = super()._get_torch_save_params()
        return [*modules, *(["normaliser"] if self.normaliser else [])], tensors

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "replay",
            "guard",
            "ranks",
            "stragglers",
            "generator",
            "mixture",
            "anchor",
            "_memory",
            "_groups",
            "_last_obs",
            "_last_episode_starts",
        ]

    @property
    def phase(self) -> str:
        """What the next rollout is for: ``imitation``, ``critic``, which learns alone, or ``ppo``."""
        if self.num_timesteps < self.imitation.frames:
            return "imitation"
        return "critic" if self.imitation.critic_alone(self.num_timesteps) else "ppo"

    @property
    def wants_turns(self) -> bool:
        """Whether rollouts carry the turns that the expert plans, beside its actions."""
        return False

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
        self._groups = agent_groups(tensor_envs(self.env, self.device))
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
            tensors = self.guard.observations(tensors, self.num_timesteps)
            self._last_obs, self._last_episode_starts = tensors, starts
            if self.normaliser is not None:
                self.normaliser.returns.zero_()
            self._memory = policy.initial_memory(self.n_envs).to(self.device)
        return answer

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "run",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SequenceAlgorithm:
        """Collects and updates in turn until ``total_timesteps`` frames are done or a callback says stop."""
        assert self.env is not None
        with watched_workers(self.env):
            total_timesteps, callback = self._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
            )
            self._frames_logged = self.num_timesteps
            callback.on_training_start(locals(), globals())
            iteration = 0
            while self.num_timesteps < total_timesteps:
                with self._located():
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
        """Fills ``rollout_buffer`` with ``n_rollout_steps`` steps; False if a callback ended it before.

        It gets fewer steps where the other ranks are done and wait.
        """
        policy: Any = self.policy
        assert self._memory is not None
        self.rollout_phase = self.phase
        imitating = self.rollout_phase == "imitation"
        if not imitating and self.anchor is None and self.imitation.anchor_weight(self.num_timesteps) > 0:
            self.anchor = Anchor(policy, self._memory)
        if self.anchor is not None and self.imitation.anchor_weight(self.num_timesteps) == 0:
            self.anchor = None
        policy.set_training_mode(False)
        policy.set_progress(self.num_timesteps, self._total_timesteps)
        rollout_buffer.start(self._memory)
        # Log-probabilities of what an expert did are no behaviour to compare a policy with.
        replay = None if imitating else self.replay
        if replay is not None:
            replay.start()
        self.episodes_of_rollout = []
        lived: list[tuple[Tensor, Tensor, list[dict[str, float]]]] = []
        frames_before = self.num_timesteps
        callback.on_rollout_start()
        self._tell_whereabouts()
        self.stragglers.begin()
        rewards = dones = None
        with self._shared_cores(), closing(self._steps(n_rollout_steps, imitating)) as steps:
            for result in steps:
                lived.append((result.rewards, result.dones, result.episodes))
                # As if every rank were as far; it is counted exactly when the rollout is over.
                self.num_timesteps += self.n_envs * self.ranks.size
                if self.ranks.size == 1:
                    self._remember(result.episodes)
                rewards, dones = result.rewards, result.dones
                infos = [{"episode": episode} for episode in result.episodes]
                callback.update_locals(locals())
                if not callback.on_step():
                    return False
        observations: Any = self._last_obs
        starts: Any = self._last_episode_starts
        with self._stage("policy"):
            last_values = self._values(observations, self._memory, starts)
            rollout_buffer.finish(last_values, starts, self.gamma, self.gae_lambda)
            if replay is not None:
                replay.finish(rollout_buffer["rewards"], observations, self._memory, starts)
        if self.ranks.size > 1:
            self.stragglers.done()
            with self._stage("wait"):
                self._meet(frames_before, [episodes for _, _, episodes in lived])
        if self.normaliser is not None:
            measured = self.normaliser.measure(
                torch.stack([rewards for rewards, _, _ in lived]),
                torch.stack([dones for _, dones, _ in lived]),
            )
            self.normaliser.update(Moments.from_sums(self.ranks.sum(measured.sums)))
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    @contextmanager
    def _shared_cores(self) -> Iterator[None]:
        """Leaves half of the threads to the simulator, where it works beside the policy on a CPU."""
        threads = torch.get_num_threads()
        if len(self._groups) > 1 and self.device.type == "cpu":
            torch.set_num_threads(max(1, threads // 2))
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _steps(self, count: int, imitating: bool) -> Generator[StepResult, None, None]:
        """Does ``count`` steps and stores each in the rollout; fewer where the other ranks are done and wait.

        A group's next step begins as soon as its last one has ended, when those of the other groups are still
        being simulated: a step is whole, and answered, when all groups have ended it.
        """
        groups = self._groups
        observations: Any = self._last_obs
        here = [{key: value[group.envs] for key, value in observations.items()} for group in groups]
        assert self._memory is not None and self._last_episode_starts is not None
        memories = [self._memory[group.envs] for group in groups]
        starts: list[Any] = [self._last_episode_starts[group.envs] for group in groups]
        ended: list[tuple[Decision, StepResult]] = []
        begun = 0
        frames = self.num_timesteps
        try:
            while True:
                for index, group in enumerate(groups):
                    if group.busy:
                        decision, result = group.end(self._stage)
                        result = self.guard.step(result, self.num_timesteps, group.envs.start)
                        here[index], starts[index] = result.observations, result.dones
                        memories[index] = decision.next_memory
                        ended.append((decision, result))
                    if len(ended) == len(groups):
                        yield self._store(ended)
                        ended = []
                    if group is groups[0]:
                        # Asked when its step is done: the other ranks may have waited for that one.
                        going_on = begun < count and not self.stragglers.must_stop(begun)
                        if going_on:
                            noise = self._draw_step(imitating)
                    if going_on:
                        own_noise = None if noise is None else noise[group.envs]
                        where = here[index], memories[index], starts[index]
                        decision = self._decide(group, *where, frames, imitating, own_noise)
                        group.begin(decision, ask_expert=imitating and begun + 1 < count)
                if not going_on:
                    return
                begun += 1
                frames += self.n_envs * self.ranks.size
        except GeneratorExit:
            # Whoever goes on after this finds these agents a step ahead.
            for group in groups:
                if group.busy:
                    decision, result = group.end(self._stage)
                    for key, value in result.observations.items():
                        observations = self._last_obs
                        observations[key][group.envs] = value
                    self._last_episode_starts[group.envs] = result.dones  # type: ignore[call-overload]
                    self._memory[group.envs] = decision.next_memory
            raise
        finally:
            for group in groups:
                group.abandon()

    def _draw_step(self, imitating: bool) -> Tensor | None:
        """Draws what all groups' next decisions share: who acts, and the noise of several ranks' actions.

        Several ranks draw actions from random numbers that they draw together, as one process with the agents
        of all of them would: exponentials (N, A) of this rank. None where the policy draws by itself.
        """
        if imitating:
            self.mixture.draw()
        if self.ranks.size == 1:
            return None
        assert isinstance(self.action_space, spaces.Discrete)
        everyone = (self.ranks.size * self.n_envs, int(self.action_space.n))
        return self.ranks.rows(torch.empty(everyone, device=self.device).exponential_())

    def _decide(
        self,
        group: AgentGroup,
        observations: dict[str, Tensor],
        memory: Tensor,
        starts: Tensor,
        frames: int,
        imitating: bool,
        noise: Tensor | None,
    ) -> Decision:
        """What the agents of a group do next, after ``frames`` frames."""
        policy: Any = self.policy
        reference = None
        with self._stage("policy"), torch.inference_mode(), self.fast_paths.autocast(self.device):
            actions, values, log_probs, next_memory, frozen, logits = policy.act(
                observations,
                memory,
                starts,
                deterministic=noise is not None,
                frozen=group.env.frozen_features(),
            )
            if noise is not None:
                # What torch.multinomial does, so that one process and several draw the same.
                log_probs = torch.log_softmax(logits.float(), dim=1)
                actions = (log_probs.exp() / noise).argmax(dim=1)
                log_probs = log_probs.gather(1, actions[:, None])[:, 0]
            if self.anchor is not None:
                reference = self.anchor.logits(observations, starts, frozen, group.envs)
        # A copy made outside inference mode: environments may keep it and change it in place.
        executed = actions.clone()
        expert = None
        if imitating:
            expert = group.expert_advice(self._stage)
            with self._stage("expert"):
                executed = self.mixture.choose(executed, expert.actions, starts, frames, group.envs)
        return Decision(
            observations,
            starts,
            executed,
            values,
            log_probs,
            memory,
            next_memory,
            frozen,
            expert,
            reference,
        )

    def _store(self, parts: list[tuple[Decision, StepResult]]) -> StepResult:
        """Appends a step that all groups have ended to the rollout, and goes on to the next."""
        with self._stage("policy"):
            decision = join_decisions([decision for decision, _ in parts])
            expert = decision.expert
            result = join_results([result for _, result in parts])
            buffer = self.rollout_buffer
            buffer.add(
                decision.observations,
                decision.actions,
                self.normaliser(result.rewards) if self.normaliser else result.rewards,
                decision.starts,
                decision.values,
                decision.log_probs,
                decision.frozen,
                expert_actions=None if expert is None else expert.actions,
                expert_turns=expert.turns if expert is not None and self.wants_turns else None,
                reference_logits=decision.reference_logits,
            )
            if result.final_observations is not None:
                # An episode cut short has a future: the critic says what it was worth.
                cut = result.truncated.nonzero().flatten()
                future = self._values(
                    result.final_observations,
                    decision.next_memory[cut],
                    torch.zeros_like(cut, dtype=torch.bool),
                )
                buffer.add_to_last_rewards(cut, self.gamma * future)
            if self.replay is not None and decision.expert is None:
                self.replay.add(
                    decision.observations,
                    decision.actions,
                    decision.starts,
                    decision.log_probs,
                    decision.memory,
                    decision.frozen,
                )
        self._memory = decision.next_memory
        last_obs: Any = result.observations
        starts: Any = result.dones
        self._last_obs, self._last_episode_starts = last_obs, starts
        return result

    def _meet(self, frames_before: int, ended: list[list[dict[str, float]]]) -> None:
        """At the end of a rollout, lets all ranks know what they have done together.

        ``ended`` holds the measures of the episodes that ended in each step.
        """
        ranks = self.ranks
        steps = [0.0] * ranks.size
        steps[ranks.rank] = len(ended)
        steps = ranks.largest(steps)
        self.num_timesteps = frames_before + self.n_envs * int(sum(steps))
        # The rank that drew most is the one whose random numbers nobody has used yet.
        ranks.align_random(self.generator, self.device, steps.index(max(steps)))
        # In the order in which one process would have seen them.
        everyones = ranks.gather(ended)
        together = [
            episode
            for step in range(int(max(steps)))
            for rank in everyones
            for episode in (rank[step] if step < len(rank) else [])
        ]
        self._remember(ranks.broadcast(together))
        self.logger.record("rollout/cut_short", sum(number < self.n_steps for number in steps) / ranks.size)

    def _whereabouts(self) -> str:
        """Where this process's agents are, as far as their environment can tell."""
        place = f"after {self.num_timesteps:,} frames"
        agents = []
        for group in self._groups:
            env: Any = getattr(group.env, "env", None)
            if not hasattr(env, "current_episodes"):
                return place
            agents += episodes_of(env, group.envs.start)
        return in_lines(place, agents)

    def _tell_whereabouts(self) -> None:
        if self.ranks.size > 1:
            self.ranks.tell(f"its last rollout began {self._whereabouts()}")

    @contextmanager
    def _located(self) -> Iterator[None]:
        """Lets an unforeseen error say where the agents were."""
        try:
            yield
        except (FloatingPointError, RankLostError, RunError):
            raise
        except Exception as error:
            who = f"rank {self.ranks.rank} of {self.ranks.size}" if self.ranks.size > 1 else "the training"
            error.add_note(f"{who} broke off {self._whereabouts()}")
            raise

    def _values(self, observations: dict[str, Tensor], memory: Tensor, starts: Tensor) -> Tensor:
        """The critic's estimates (M,) before a step."""
        policy: Any = self.policy
        with torch.inference_mode(), self.fast_paths.autocast(self.device):
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

        Meant for the moment between an update and the next rollout: rollouts are not part of it. All ranks
        call it together; rank 0 gets the state of all of them, the others only their own.
        """
        own = {
            "memory": self._memory,
            "observations": self._last_obs,
            "episode_starts": self._last_episode_starts,
            "expert_acts": self.mixture.expert_acts,
            "anchor_memory": self.anchor.memory if self.anchor else None,
            "environments": [group.env.state_dict() for group in self._groups],
            "nonfinite": self.guard.state_dict(),
            "replay": self.replay.state_dict() if self.replay else None,
            "returns": self.normaliser.returns if self.normaliser else None,
            "random": {
                "minibatches": self.generator.get_state(),
                "torch": torch.get_rng_state(),
                # Of its own device only: whoever goes on may see fewer, or under other numbers.
                "cuda": [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [],
                "numpy": np.random.get_state(),
                "python": random.getstate(),
            },
        }
        return {
            "frames": self.num_timesteps,
            "updates": self._n_updates,
            "policy": self.policy.state_dict(),
            "optimizer": self.policy.optimizer.state_dict(),
            "anchor": self.anchor.state_dict() if self.anchor else None,
            "normaliser": self.normaliser.state_dict() if self.normaliser else None,
            "recent_episodes": list(self.recent_episodes),
            "ranks": self.ranks.gather(own),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`training_state`; then call ``learn`` with ``reset_num_timesteps=False``.

        Raises KeyError, TypeError, ValueError or RuntimeError if the state is of another agent or
        environment, or of another number of ranks.
        """
        assert self.env is not None
        if len(state["ranks"]) != self.ranks.size:
            before = len(state["ranks"])
            how = f"torchrun --nproc-per-node={before}" if before > 1 else "no torchrun"
            raise ValueError(
                f"it holds the agents of {before} process{'es' * (before > 1)}, and these are "
                f"{self.ranks.size}; go on with {before} ({how})"
            )
        state = state | state["ranks"][self.ranks.rank]
        self._groups = agent_groups(tensor_envs(self.env, self.device))
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
            self.anchor.memory = state["anchor_memory"].to(self.device)
        self.mixture.expert_acts = state["expert_acts"]
        self.recent_episodes.clear()
        self.recent_episodes.extend(state["recent_episodes"])
        # Stable-Baselines3's own windows, for callbacks that look into them.
        window, episodes = self._stats_window_size, state["recent_episodes"]
        self.ep_info_buffer = deque(episodes, maxlen=window)
        self.ep_success_buffer = deque((e["success"] for e in episodes if "success" in e), maxlen=window)
        for group, environment in zip(self._groups, state["environments"], strict=True):
            group.env.load_state_dict(environment)
        self.guard.load_state_dict(state["nonfinite"])
        if self.replay is not None:
            self.replay.load_state_dict(state["replay"])
        if self.normaliser is not None:
            self.normaliser.load_state_dict(state["normaliser"])
            self.normaliser.returns.copy_(state["returns"])
        generators = state["random"]
        self.generator.set_state(generators["minibatches"])
        torch.set_rng_state(generators["torch"])
        if self.device.type == "cuda":
            for generator_state in generators["cuda"]:
                torch.cuda.set_rng_state(generator_state, self.device)
        np.random.set_state(generators["numpy"])
        random.setstate(generators["python"])

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
        self.logger.record("rollout/phase", self.rollout_phase, exclude="tensorboard")
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
        if self.nonfinite == "skip":
            for name, count in self.guard.counts(self.ranks).items():
                self.logger.record(f"nonfinite/{name}", count)
        self.logger.dump(step=self.num_timesteps)


def _after_update(callback: BaseCallback) -> bool:
    """Tells callbacks that have ``on_update_end`` that an update is done; False if one says stop."""
    if isinstance(callback, CallbackList):
        return all([_after_update(child) for child in callback.callbacks])
    hook = getattr(callback, "on_update_end", None)
    return True if hook is None else bool(hook())
