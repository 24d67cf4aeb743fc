"""Losses beside PPO's that make a policy's features and memory know its world.

Two look at whole sequences, at what the images became and at what the memory made of it, and never across
the end of an episode. Only images are predicted or compared: the other inputs hold the goal, and the previous
action, which would give the answer away. The third asks the memory for more of what an expert knows than the
action that it would take now.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from envs.expert import NO_MOVE


@dataclass(frozen=True)
class AuxiliaryConfig:
    """Which losses are added, and how much they weigh; 0 leaves a loss out."""

    cpc_coef: float = 0.0
    """Weight of action-conditional contrastive prediction (CPC|A); Habitat's baselines give it 0.1."""
    inverse_dynamics_coef: float = 0.0
    """Weight of guessing the action between two images."""
    heading_coef: float = 0.0
    """Weight of foretelling the direction of the expert's next move."""
    half_circle: int = 18
    """Turns in half a circle, for ``heading_coef``."""
    horizon: int = 20
    """CPC|A: how many steps into the future are predicted."""
    starts: int = 6
    """CPC|A: from how many steps of an episode, at most, a prediction starts."""
    futures: int = 2
    """CPC|A: how many of a start's predictions are scored."""
    negatives: int = 20
    """CPC|A: against how many other images each of them is scored."""

    def __post_init__(self) -> None:
        for name in ("cpc_coef", "inverse_dynamics_coef", "heading_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"auxiliary {name} {getattr(self, name)} must not be negative")
        if self.heading_coef and not 1 <= self.half_circle < NO_MOVE:
            raise ValueError(f"auxiliary half_circle {self.half_circle}: expected 1 to {NO_MOVE - 1} turns")
        if not 1 <= self.futures <= self.horizon or self.starts < 1 or self.negatives < 1:
            raise ValueError(
                f"auxiliary horizon {self.horizon}, starts {self.starts}, futures {self.futures} and "
                f"negatives {self.negatives}: expected at least 1 of each, and futures within the horizon"
            )

    @property
    def wanted(self) -> bool:
        """Whether there is any loss to add."""
        return self.looks or self.heading_coef > 0

    @property
    def looks(self) -> bool:
        """Whether any of them is about images."""
        return self.cpc_coef > 0 or self.inverse_dynamics_coef > 0


class AuxiliaryLosses(nn.Module):
    """The wanted losses with the networks that they need, trained together with the policy.

    Args:
        config: which losses.
        features: E, how many numbers images become at each step.
        hidden: H, how many numbers the memory puts out.
        num_actions: A.
    """

    def __init__(self, config: AuxiliaryConfig, features: int, hidden: int, num_actions: int) -> None:
        super().__init__()
        if config.looks and features == 0:
            raise ValueError("auxiliary losses predict images, and this policy sees none; set them to 0")
        self.config = config
        self.cpc = ContrastivePrediction(config, features, hidden, num_actions) if config.cpc_coef else None
        self.inverse_dynamics = (
            InverseDynamics(features, hidden, num_actions) if config.inverse_dynamics_coef else None
        )
        self.heading = Heading(hidden, config.half_circle) if config.heading_coef else None

    def forward(
        self,
        features: Tensor,
        hidden: Tensor,
        actions: Tensor,
        episode_starts: Tensor,
        expert_turns: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, (), and what to log.

        ``features`` (T, B, E) of the images and ``hidden`` (T, B, H) of the memory, both before ``actions``
        (T, B) int64; ``episode_starts`` (T, B) bool; ``expert_turns`` (T, B) int16, None where no expert was
        asked; ``generator`` lives on the CPU.
        """
        features, hidden = features.float(), hidden.float()
        total = features.new_zeros(())
        record = {}
        if self.cpc is not None:
            choice = self.cpc.choose(episode_starts, generator)
            loss = self.cpc(features, hidden, actions, choice)
            total = total + self.config.cpc_coef * loss
            record["auxiliary/cpc_loss"] = loss.detach()
        if self.inverse_dynamics is not None:
            loss, agreement = self.inverse_dynamics(features, actions, episode_starts)
            total = total + self.config.inverse_dynamics_coef * loss
            record["auxiliary/inverse_dynamics_loss"] = loss.detach()
            record["auxiliary/inverse_dynamics_agreement"] = agreement
        if self.heading is not None and expert_turns is not None:
            loss, agreement = self.heading(hidden, expert_turns)
            total = total + self.config.heading_coef * loss
            record["auxiliary/heading_loss"] = loss.detach()
            record["auxiliary/heading_agreement"] = agreement
        return total, record


def steps_left(episode_starts: Tensor) -> Tensor:
    """How many later steps of its episode the block holds, (T, B), for ``episode_starts`` (T, B) bool."""
    length = len(episode_starts)
    times = torch.arange(length, device=episode_starts.device)[:, None]
    starts = torch.where(episode_starts, times, length)
    # The next start at or after each step; an episode goes on until the one after its own step.
    coming = starts.flip(0).cummin(0).values.flip(0)
    following = torch.cat((coming[1:], torch.full_like(coming[:1], length)))
    return following - times - 1


def masked_mean(losses: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``losses`` where ``valid``, of the same shape, is true; 0 where it is true nowhere."""
    return torch.where(valid, losses, 0.0).sum() / valid.sum().clamp(min=1)


@dataclass(frozen=True)
class Choice:
    """What a contrastive loss looks at in T steps of B environments; a row is ``step * B + env``."""

    starts: Tensor
    """Rows from which predictions start: (S,)."""
    left: Tensor
    """How many later steps of the episode there are after each: (S,)."""
    futures: Tensor
    """Which predictions are scored, 0 for the one a step ahead: (S, F)."""
    negatives: Tensor
    """Rows that each of them is scored against: (S, F, M)."""


class ContrastivePrediction(nn.Module):
    """CPC|A (Guo et al. 2018, arXiv:1811.06407): what the memory and coming actions say of coming images.

    From the memory at step t, a second recurrent network follows the actions t, t + 1, ... and after each is
    asked which image comes next: the true one or one of some others in the minibatch. The networks are those
    of habitat-baselines' ``CPCA``. It differs from that code where the code departs from its own meaning: the
    last image of an episode can be a target too, an episode's first step can be a start, and losses are means
    over what is valid, not these means times the share that is.

    Args:
        config: how much of a block is looked at.
        features: E, how many numbers images become.
        hidden: H, how many numbers the memory puts out.
        num_actions: A.
    """

    def __init__(self, config: AuxiliaryConfig, features: int, hidden: int, num_actions: int) -> None:
        super().__init__()
        self.config = config
        self.action_embedding = nn.Embedding(num_actions, 32)
        self.predictor = nn.LSTM(32, hidden)
        self.of_prediction = nn.Linear(hidden, hidden)
        self.of_image = nn.Linear(features, hidden, bias=False)
        self.score = nn.Sequential(
            nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Flatten(-2)
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.orthogonal_(parameter)
            else:
                nn.init.zeros_(parameter)

    def choose(self, episode_starts: Tensor, generator: torch.Generator) -> Choice:
        """Draws starts, futures and negatives for a block with ``episode_starts`` (T, B) bool."""
        config, device = self.config, episode_starts.device
        length, batch = episode_starts.shape
        left = steps_left(episode_starts).flatten()
        # Up to so many starts of each episode: those of the smallest random keys.
        episode = (episode_starts.cumsum(0) * batch + torch.arange(batch, device=device)).flatten()
        keys = torch.rand(length * batch, generator=generator).to(device)
        order = torch.where(left > 0, keys, 2.0).argsort()
        order = order[episode[order].argsort(stable=True)]
        _, counts = episode[order].unique_consecutive(return_counts=True)
        place = torch.arange(len(order), device=device)
        place = place - (counts.cumsum(0) - counts).repeat_interleave(counts)
        starts = order[(place < config.starts) & (left[order] > 0)]

        shape = (len(starts), config.futures, config.negatives)
        futures = torch.rand(len(starts), config.horizon, generator=generator).argsort(1)[:, : shape[1]]
        futures = futures.to(device)
        # Any image but the true one: rows from the true one on stand for the next.
        negatives = torch.randint(length * batch - 1, shape, generator=generator).to(device)
        targets = starts[:, None] + (futures + 1) * batch
        negatives = negatives + (negatives >= targets[..., None])
        return Choice(starts, left[starts], futures, negatives)

    def forward(self, features: Tensor, hidden: Tensor, actions: Tensor, choice: Choice) -> Tensor:
        """The loss, (), of images (T, B, E), memory (T, B, H) and actions (T, B) at what was chosen."""
        if len(choice.starts) == 0:
            return features.new_zeros(())
        batch = features.shape[1]
        ahead = torch.arange(self.config.horizon, device=features.device)[:, None]
        # Beyond the end of an episode nothing is scored: any row will do.
        rows = torch.where(ahead < choice.left, choice.starts + ahead * batch, choice.starts)
        belief = hidden.flatten(0, 1)[choice.starts][None]
        predictions, _ = self.predictor(self.action_embedding(actions.flatten()[rows]), (belief, belief))
        scored = predictions[choice.futures, torch.arange(len(belief[0]), device=features.device)[:, None]]

        valid = choice.futures < choice.left[:, None]
        targets = choice.starts[:, None] + (choice.futures + 1) * batch
        targets = torch.where(valid, targets, choice.starts[:, None])
        # Every image is transformed once, however often it is compared.
        images = self.of_image(features.flatten(0, 1))
        queries = self.of_prediction(scored)
        right = self.score(queries + images[targets])
        wrong = self.score(queries[:, :, None] + images[choice.negatives])
        return masked_mean(functional.softplus(-right), valid) + masked_mean(
            functional.softplus(wrong), valid[..., None].expand_as(wrong)
        )


class InverseDynamics(nn.Module):
    """Guesses the action from the image before and the image after it (Pathak et al. 2017, arXiv:1705.05363).

    Args:
        features: E, how many numbers images become.
        hidden: width of the layer between.
        num_actions: A.
    """

    def __init__(self, features: int, hidden: int, num_actions: int) -> None:
        super().__init__()
        self.guess = nn.Sequential(nn.Linear(2 * features, hidden), nn.ReLU(), nn.Linear(hidden, num_actions))
        for layer in self.guess:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, gain=2**0.5)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor, actions: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and the share of right guesses, both (), over steps that end no episode.

        ``features`` (T, B, E), ``actions`` (T, B) int64, ``episode_starts`` (T, B) bool.
        """
        logits = self.guess(torch.cat((features[:-1], features[1:]), dim=2))
        valid = ~episode_starts[1:]
        losses = functional.cross_entropy(logits.flatten(0, 1), actions[:-1].flatten(), reduction="none")
        right = (logits.detach().argmax(2) == actions[:-1]).float()
        return masked_mean(losses, valid.flatten()), masked_mean(right, valid)


class Heading(nn.Module):
    """Foretells from the memory in which direction the expert's next move forward goes, in turns from here.

    An action says which way to turn, this also how far, and so where the way lies. It is what the expert
    knows when it labels a state with an action, and costs nothing more.

    Args:
        hidden: H, how many numbers the memory puts out.
        half_circle: turns in half a circle, S.
    """

    def __init__(self, hidden: int, half_circle: int) -> None:
        super().__init__()
        self.half_circle = half_circle
        self.guess = nn.Linear(hidden, 2 * half_circle + 1)
        nn.init.orthogonal_(self.guess.weight, gain=0.01)
        nn.init.zeros_(self.guess.bias)

    def forward(self, hidden: Tensor, expert_turns: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and the share of right guesses, both (), over steps with a move to come.

        ``hidden`` (T, B, H); ``expert_turns`` (T, B) int16 in -S..S, or :data:`envs.expert.NO_MOVE`.
        """
        logits = self.guess(hidden)
        valid = expert_turns != NO_MOVE
        label = torch.where(valid, expert_turns.long() + self.half_circle, 0)
        losses = functional.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none")
        right = (logits.detach().argmax(2) == label).float()
        return masked_mean(losses, valid.flatten()), masked_mean(right, valid)
