"""Rewards in units of how much returns vary, so that one learning rate fits tasks of any reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """What is known of numbers that were seen: float64 scalars."""

    count: Tensor
    """How many."""
    mean: Tensor
    """Their mean."""
    m2: Tensor
    """Sum of their squared distances from the mean."""

    @classmethod
    def of(cls, numbers: Tensor) -> Moments:
        """The moments of all of ``numbers``."""
        numbers = numbers.double()
        mean = numbers.mean()
        count = torch.tensor(float(numbers.numel()), dtype=torch.float64, device=numbers.device)
        return cls(count, mean, (numbers - mean).square().sum())

    @property
    def sums(self) -> Tensor:
        """Count, sum and sum of squares: (3,), which add up over several sets of numbers."""
        total = self.mean * self.count
        return torch.stack((self.count, total, self.m2 + total * self.mean))

    @classmethod
    def from_sums(cls, sums: Tensor) -> Moments:
        """The inverse of :attr:`sums`."""
        count, total, squares = sums
        return cls(count, total / count, squares - total * total / count)

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of numbers together (Chan et al. 1979); their order does not matter."""
        count = self.count + other.count
        distance = other.mean - self.mean
        return Moments(
            count,
            self.mean + distance * other.count / count,
            self.m2 + other.m2 + distance.square() * self.count * other.count / count,
        )

    @property
    def variance(self) -> Tensor:
        """The variance of the numbers as they are, ()."""
        return self.m2 / self.count


class ReturnNormaliser(nn.Module):
    """Divides rewards by the running standard deviation of discounted returns.

    The statistics are those of ``stable_baselines3``'s ``VecNormalize``: every step's discounted sum of past
    rewards, over all environments. They are taken once a rollout, so that several processes can put theirs
    together (:meth:`measure`, then :meth:`update` with the sum of everyone's :attr:`Moments.sums`), and a
    rollout's rewards are divided by what was known when it began.
    """

    moments: Tensor
    """Count, mean and squared distances of the returns seen so far: (3,) float64."""
    returns: Tensor
    """Discounted sum of the present episode's rewards, by environment: (N,) float64."""

    def __init__(self, num_envs: int, gamma: float, limit: float = 10.0, epsilon: float = 1e-8) -> None:
        """``gamma`` discounts; normalised rewards are cut at ``limit``; ``epsilon`` adds to the variance."""
        super().__init__()
        self.gamma, self.limit, self.epsilon = gamma, limit, epsilon
        # The first guess, a variance of 1, weighs as much as a ten thousandth of a number.
        self.register_buffer("moments", torch.tensor([1e-4, 0.0, 1e-4], dtype=torch.float64))
        # Not in the state: where a policy is loaded into other environments, their episodes begin anew.
        returns = torch.zeros(num_envs, dtype=torch.float64)
        self.register_buffer("returns", returns, persistent=False)

    def forward(self, rewards: Tensor) -> Tensor:
        """Normalised rewards, of the shape and type of ``rewards``."""
        deviation = (self.moments[2] / self.moments[0] + self.epsilon).sqrt()
        return (rewards / deviation).clamp(-self.limit, self.limit).to(rewards.dtype)

    def measure(self, rewards: Tensor, dones: Tensor) -> Moments:
        """The moments of the returns along a rollout; goes on with the sums of unfinished episodes.

        ``rewards`` (T, N) as the environment gave them; ``dones`` (T, N) bool, whether each step ended its
        episode.
        """
        seen = torch.empty(rewards.shape, dtype=torch.float64, device=rewards.device)
        returns = self.returns
        for step, reward in enumerate(rewards):
            returns = returns * self.gamma + reward
            seen[step] = returns
            returns = returns * ~dones[step]
        self.returns.copy_(returns)
        return Moments.of(seen)

    def update(self, moments: Moments) -> None:
        """Takes in what one or several processes measured."""
        total = Moments(*self.moments) + moments
        self.moments.copy_(torch.stack((total.count, total.mean, total.m2)))
