"""PPO with a recurrent policy as one plain script: what a researcher who starts from CleanRL would have.

The design is that of CleanRL's ``ppo_atari_lstm.py`` (Huang et al., JMLR 2022): a NumPy vector environment,
tensors allocated once, a Python loop over time through the recurrent network both while collecting and in the
update, minibatches of whole environments. The losses are Stable-Baselines3's, so that all learners compared
do the same work. Unlike them, and like CleanRL, an episode cut short counts as ended.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical

from navagent.config import AlgorithmConfig
from policies.actor_critic import NavigationPolicy
from policies.memory import NoMemory, RecurrentMemory

State = Tensor | tuple[Tensor, Tensor]
"""State of a recurrent network: (layers, N, H); of an LSTM, hidden and cell state."""


@dataclass
class Rollout:
    """``T`` steps of ``N`` environments."""

    observations: dict[str, Tensor]
    """By name: (T, N, ...)."""
    actions: Tensor
    """(T, N) int64."""
    log_probs: Tensor
    """(T, N)."""
    values: Tensor
    """(T, N)."""
    starts: Tensor
    """1 where a step is the first of its episode: (T, N)."""
    advantages: Tensor
    """(T, N)."""
    state: State
    """The recurrent state before the first step."""


class PlainAgent:
    """Runs the layers of a :class:`NavigationPolicy` step by step, and trains them."""

    def __init__(self, policy: NavigationPolicy, config: AlgorithmConfig) -> None:
        memory = policy.memory
        if not isinstance(memory, RecurrentMemory | NoMemory):
            raise ValueError("the plain loop knows the memories gru, lstm and none")
        self.policy = policy
        self.rnn: nn.RNNBase | None = memory.rnn if isinstance(memory, RecurrentMemory) else None
        self.config = config

    def initial_state(self, count: int) -> State:
        """The recurrent state of ``count`` environments before anything was seen."""
        if self.rnn is None:
            return torch.zeros(0, count, 0, device=self.policy.device)
        zeros = torch.zeros(self.rnn.num_layers, count, self.rnn.hidden_size, device=self.policy.device)
        return (zeros, zeros.clone()) if isinstance(self.rnn, nn.LSTM) else zeros

    def through_time(
        self, observations: dict[str, Tensor], state: State, starts: Tensor
    ) -> tuple[Tensor, State]:
        """Hidden states (T, N, H) of observations (T, N, ...), and the recurrent state after them."""
        steps, count = starts.shape
        flat = {name: value.flatten(0, 1) for name, value in observations.items()}
        features = self.policy.features_extractor(flat).reshape(steps, count, -1)
        if self.rnn is None:
            return self.policy.memory.sequence(features, torch.empty(0), starts), state
        hidden = []
        for x, start in zip(features, starts, strict=True):
            going_on = (1.0 - start)[None, :, None]
            if isinstance(state, tuple):
                state = (going_on * state[0], going_on * state[1])
            else:
                state = going_on * state
            output, state = self.rnn(x[None], state)
            hidden.append(output)
        return torch.cat(hidden), state

    def step(
        self, observations: dict[str, Tensor], state: State, starts: Tensor
    ) -> tuple[Categorical, Tensor, State]:
        """Distribution over actions, values (N,) and the next state, of one step of N environments."""
        once = {name: value[None] for name, value in observations.items()}
        hidden, state = self.through_time(once, state, starts[None])
        return Categorical(logits=self.policy.action_net(hidden[0])), self._values(hidden[0]), state

    def _values(self, hidden: Tensor) -> Tensor:
        return self.policy.value_net(hidden).squeeze(-1)

    def update(self, rollout: Rollout) -> None:
        """The epochs of PPO over one rollout."""
        config, policy = self.config, self.policy
        count = rollout.actions.shape[1]
        returns = rollout.advantages + rollout.values
        parts = np.arange(count)
        for _ in range(config.epochs):
            np.random.shuffle(parts)
            for chosen in np.array_split(parts, min(config.num_minibatches, count)):
                envs = torch.as_tensor(chosen, device=policy.device)
                state = rollout.state
                part = (state[0][:, envs], state[1][:, envs]) if isinstance(state, tuple) else state[:, envs]
                observations = {name: value[:, envs] for name, value in rollout.observations.items()}
                hidden, _ = self.through_time(observations, part, rollout.starts[:, envs])
                distribution = Categorical(logits=policy.action_net(hidden))
                ratio = (distribution.log_prob(rollout.actions[:, envs]) - rollout.log_probs[:, envs]).exp()
                advantages = rollout.advantages[:, envs]
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                low, high = 1 - config.clip_range, 1 + config.clip_range
                policy_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(low, high)).mean()
                value_loss = (self._values(hidden) - returns[:, envs]).square().mean()
                entropy = distribution.entropy().mean()
                loss = policy_loss - config.ent_coef * entropy + config.vf_coef * value_loss
                policy.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
                policy.optimizer.step()

    def train(
        self,
        envs: VectorEnv[Any, Any, Any],
        turn: Callable[[], bool],
        stage: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Collects and updates in turn as long as ``turn``, asked before each rollout, says so.

        ``stage`` measures the time of what runs within it.
        """
        steps, count, device = self.config.num_steps, envs.num_envs, self.policy.device
        seen = _tensors(envs.reset()[0], device)
        observations = {
            name: torch.zeros((steps, *value.shape), dtype=value.dtype, device=device)
            for name, value in seen.items()
        }
        actions = torch.zeros(steps, count, dtype=torch.int64, device=device)
        log_probs, values, rewards, starts = (torch.zeros(steps, count, device=device) for _ in range(4))
        state, start = self.initial_state(count), torch.ones(count, device=device)
        while turn():
            before = state
            for step in range(steps):
                with stage("policy"):
                    for name, value in seen.items():
                        observations[name][step] = value
                    starts[step] = start
                    with torch.no_grad():
                        distribution, values[step], state = self.step(seen, state, start)
                        actions[step] = distribution.sample()
                        log_probs[step] = distribution.log_prob(actions[step])
                    chosen = actions[step].cpu().numpy()
                with stage("simulate"):
                    following, reward, terminated, truncated, _ = envs.step(chosen)
                with stage("policy"):
                    seen = _tensors(following, device)
                    rewards[step] = torch.as_tensor(reward, dtype=torch.float32, device=device)
                    done = np.logical_or(terminated, truncated)
                    start = torch.as_tensor(done, dtype=torch.float32, device=device)
            with stage("policy"), torch.no_grad():
                _, last_values, _ = self.step(seen, state, start)
                advantages = self.advantages(rewards, values, starts, last_values, start)
            with stage("update"):
                self.update(Rollout(observations, actions, log_probs, values, starts, advantages, before))

    def advantages(
        self, rewards: Tensor, values: Tensor, starts: Tensor, last_values: Tensor, last_start: Tensor
    ) -> Tensor:
        """Generalised advantage estimates (T, N); the last two arguments (N,) follow the last step."""
        advantages = torch.zeros_like(rewards)
        following, next_value, next_start = torch.zeros_like(last_values), last_values, last_start
        for step in reversed(range(len(rewards))):
            going_on = 1.0 - next_start
            error = rewards[step] + self.config.gamma * next_value * going_on - values[step]
            following = error + self.config.gamma * self.config.gae_lambda * going_on * following
            advantages[step] = following
            next_value, next_start = values[step], starts[step]
        return advantages


def _tensors(observations: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.tensor(value, device=device) for name, value in observations.items()}
