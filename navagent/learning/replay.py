"""Past rollouts to learn from again: the off-policy epochs of the side-tuning paper's PPO.

Zhang et al. (2020, arXiv:1912.13503) update on the newest rollout and on others that a ring still holds, each
epoch on one window of as many steps, at a random place that is the same for all environments. Before an
epoch, the critic as it is now says what the window's states are worth, and its advantages and returns follow
from this and the stored rewards. PPO's ratio is that of the present policy to the one that acted, whose
log-probabilities are stored. So does their code; two things are otherwise here. An episode that was cut short
is worth what the critic said at the time, instead of nothing; and an epoch goes over all of a window, where
theirs goes over as many transitions as a rollout has steps, however many environments there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from navagent.learning.rollout import SequenceBuffer


class Replay:
    """The last ``capacity`` steps of every environment, in a ring that is allocated once.

    Args:
        capacity: steps that are kept; at least two more than a rollout has.
        window: an empty buffer for one rollout, into which windows are laid.
    """

    def __init__(self, capacity: int, window: SequenceBuffer) -> None:
        if capacity < window.num_steps + 2:
            raise ValueError(
                f"replay_steps {capacity} must be at least two more than n_steps, {window.num_steps}: "
                "otherwise there is no past to learn from"
            )
        self.capacity = capacity
        self.window = window
        self.filled = 0
        """Steps in the ring."""
        self._next = 0
        self._unfinished = 0
        self._newest = 0
        self._blocks: dict[str, Tensor] = {}
        self._following: dict[str, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Size of the ring and of the window [bytes]."""
        ring = sum(block.numel() * block.element_size() for block in self._blocks.values())
        return ring + self.window.num_bytes

    def start(self) -> None:
        """Begins a rollout; one that was broken off is forgotten."""
        self._next = (self._next - self._unfinished) % self.capacity
        self.filled -= self._unfinished
        self._unfinished = 0

    def add(
        self,
        observations: dict[str, Tensor],
        actions: Tensor,
        episode_starts: Tensor,
        log_probs: Tensor,
        memory: Tensor,
        frozen: dict[str, Tensor] | None = None,
    ) -> None:
        """Appends one step of every environment; each argument's first dimension is N.

        ``memory`` is the policy's before the step; the rest is as :meth:`SequenceBuffer.add` has it.
        """
        step = _named(observations, memory, episode_starts)
        step |= {"actions": actions, "log_probs": log_probs, "rewards": torch.zeros_like(log_probs)}
        step |= {
            f"frozen/{key}": value.to(self.window.feature_dtype) for key, value in (frozen or {}).items()
        }
        if step.keys() != self._blocks.keys():
            # The very first step, or the first of a method that had frozen more until now.
            self._allocate(step)
        for name, value in step.items():
            self._blocks[name][self._next].copy_(value)
        self._next = (self._next + 1) % self.capacity
        self._unfinished += 1
        self.filled = min(self.capacity, self.filled + 1)

    def _allocate(self, step: dict[str, Tensor]) -> None:
        self._blocks = {
            name: torch.empty((self.capacity, *value.shape), dtype=value.dtype, device=self.window.device)
            for name, value in step.items()
        }
        self._next = self._unfinished = self.filled = 0

    def finish(
        self, rewards: Tensor, observations: dict[str, Tensor], memory: Tensor, episode_starts: Tensor
    ) -> None:
        """Ends a rollout with its rewards (T, N), in which the worth of episodes cut short is included.

        The other arguments are what the next step will begin with, each (N, ...).
        """
        self._newest, self._unfinished = self._unfinished, 0
        self._blocks["rewards"][self._places(self._newest, self._newest)] = rewards
        self._following = _named(observations, memory, episode_starts)

    def newest(self, policy: Any, gamma: float, gae_lambda: float, parts: int) -> SequenceBuffer:
        """The newest rollout, with advantages and returns by ``policy``'s present critic.

        The policy is asked in ``parts`` groups of environments, to bound what that takes.
        """
        return self._lay(policy, self._newest, gamma, gae_lambda, parts)

    def past(
        self, policy: Any, gamma: float, gae_lambda: float, parts: int, generator: torch.Generator
    ) -> SequenceBuffer:
        """A window that begins before the newest rollout, likewise; the newest while the ring is not full.

        ``generator`` lives on the CPU and draws where the window begins.
        """
        # Always one draw, so that processes with rollouts of other lengths draw as many.
        drawn = torch.rand((), generator=generator).item()
        if self.filled < self.capacity:
            return self.newest(policy, gamma, gae_lambda, parts)
        nearest = self._newest + 1
        behind = nearest + int(drawn * (self.capacity - nearest))
        return self._lay(policy, behind, gamma, gae_lambda, parts)

    def _places(self, behind: int, length: int) -> Tensor:
        """Places in the ring of ``length`` steps, the first of them ``behind`` the next one."""
        steps = torch.arange(length, device=self.window.device)
        return (self._next - behind + steps) % self.capacity

    def _lay(self, policy: Any, behind: int, gamma: float, gae_lambda: float, parts: int) -> SequenceBuffer:
        length = self._newest
        places = self._places(behind, length)
        blocks = {name: block[places] for name, block in self._blocks.items()}
        if behind == length:
            following = self._following
        else:
            following = {
                name: block[(places[-1] + 1) % self.capacity] for name, block in self._blocks.items()
            }
        envs = self.window.num_envs
        groups = torch.arange(envs, device=self.window.device).tensor_split(min(parts, envs))
        values = torch.cat([_values(policy, blocks, envs) for envs in groups], dim=1)
        last = torch.cat([_value(policy, following, envs) for envs in groups])
        window = self.window
        window.start(blocks["memory"][0])
        for step in range(length):
            window.add(
                {name: block[step] for name, block in _part(blocks, "obs/").items()},
                blocks["actions"][step],
                blocks["rewards"][step],
                blocks["episode_starts"][step],
                values[step],
                blocks["log_probs"][step],
                {name: block[step] for name, block in _part(blocks, "frozen/").items()},
            )
        window.finish(last, following["episode_starts"], gamma, gae_lambda)
        return window

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on with the next rollout."""
        following = (self._next - self._unfinished) % self.capacity
        filled = self.filled - self._unfinished
        # Steps lie at the beginning until the ring was full once.
        used = following if following >= filled else self.capacity
        kept = {name: block[:used] for name, block in self._blocks.items()}
        return {"blocks": kept, "next": following, "filled": filled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state."""
        self._allocate({name: block[0] for name, block in state["blocks"].items()})
        for name, block in state["blocks"].items():
            self._blocks[name][: len(block)].copy_(block)
        self._next, self.filled = int(state["next"]), int(state["filled"])


def _named(observations: dict[str, Tensor], memory: Tensor, episode_starts: Tensor) -> dict[str, Tensor]:
    named = {f"obs/{key}": value for key, value in observations.items()}
    return named | {"memory": memory, "episode_starts": episode_starts}


def _part(blocks: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): block for name, block in blocks.items() if name.startswith(prefix)}


@torch.no_grad()
def _values(policy: Any, blocks: dict[str, Tensor], envs: Tensor) -> Tensor:
    """The critic's estimates (T, B) along a window of some environments."""
    chosen = {name: block[:, envs] for name, block in blocks.items()}
    frozen = {name: block.float() for name, block in _part(chosen, "frozen/").items()}
    return policy.evaluate_sequences(
        _part(chosen, "obs/"),
        chosen["actions"],
        chosen["memory"][0],
        chosen["episode_starts"],
        frozen or None,
    )[0]


@torch.no_grad()
def _value(policy: Any, step: dict[str, Tensor], envs: Tensor) -> Tensor:
    """The critic's estimates (B,) before one step of some environments."""
    chosen = {name: value[envs] for name, value in step.items()}
    frozen = {name: value.float() for name, value in _part(chosen, "frozen/").items()}
    answer = policy.act(
        _part(chosen, "obs/"),
        chosen["memory"],
        chosen["episode_starts"],
        deterministic=True,
        frozen=frozen or None,
    )
    return answer[1]
