"""The Stable-Baselines3 actor-critic of a navigating agent: adapted features, memory, actor and critic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from policies.adaptation import set_learning_rate
from policies.extractor import AdaptedExtractor
from policies.memory import make_memory

Observation = dict[str, Tensor]


class NavigationPolicy(ActorCriticPolicy):
    """Actor and critic over adapted image features, goal, previous action, and a memory of the past.

    One agent's memory is a tensor of shape :attr:`memory_shape`; it resets to zero where an episode starts,
    before the step. Without memory the policy also runs under a plain ``stable_baselines3.PPO``.

    Args:
        observation_space: a ``Dict`` space, see :class:`~policies.extractor.AdaptedExtractor`.
        action_space: ``Discrete``.
        lr_schedule: learning rate by remaining progress.
        use_sde: unsupported, part of Stable-Baselines3's signature.
        encoder: name of the perception encoder.
        weights: its weights: "default", "random", a path, or one of these for each image by its name; None
            leaves it to the method.
        adaptation: name of the method that adapts it, or "blind".
        adaptation_options: further settings of that method.
        image_features: length of the vector each image becomes.
        restored: whether all weights are going to come from a saved state, so that no file of weights is
            read.
        memory: "gru", "lstm", "frame_stack" or "none".
        hidden_size: length of what memory puts out.
        layers: layers of a recurrent memory.
        frames: steps that a frame stack sees.
        weight_decay: of all trainable parameters but those a method exempts, such as alpha.
        optimizer_class: the optimiser.
        optimizer_kwargs: its further settings; None gives Adam an eps of 1e-5.
    """

    features_extractor: AdaptedExtractor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        use_sde: bool = False,
        *,
        encoder: str = "fcn5_small",
        weights: str | Mapping[str, str] | None = None,
        adaptation: str = "sidetune",
        adaptation_options: Mapping[str, Any] | None = None,
        image_features: int = 256,
        restored: bool = False,
        memory: str = "gru",
        hidden_size: int = 256,
        layers: int = 1,
        frames: int = 4,
        weight_decay: float = 0.0,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(action_space, spaces.Discrete):
            raise ValueError(f"action space {action_space}: navigation needs a Discrete one")
        if use_sde:
            raise ValueError("use_sde explores continuous actions; navigation's actions are discrete")
        self._memory_settings: dict[str, Any] = {
            "memory": memory,
            "hidden_size": hidden_size,
            "layers": layers,
            "frames": frames,
        }
        self._weight_decay = weight_decay
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            features_extractor_class=AdaptedExtractor,
            features_extractor_kwargs={
                "encoder": encoder,
                "weights": weights,
                "adaptation": adaptation,
                "adaptation_options": adaptation_options,
                "image_features": image_features,
                "restored": restored,
            },
            normalize_images=False,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        settings = self._memory_settings
        self.memory = make_memory(
            settings["memory"],
            self.features_dim,
            settings["hidden_size"],
            settings["layers"],
            settings["frames"],
        )
        assert isinstance(self.action_space, spaces.Discrete)
        self.action_net = nn.Linear(self.memory.features, int(self.action_space.n))
        self.value_net = nn.Linear(self.memory.features, 1)
        # A small gain lets every action start about equally likely.
        nn.init.orthogonal_(self.action_net.weight, gain=0.01)
        nn.init.orthogonal_(self.value_net.weight, gain=1.0)
        nn.init.zeros_(self.action_net.bias)
        nn.init.zeros_(self.value_net.bias)
        self.optimizer = self.optimizer_class(
            self.parameter_groups(self._weight_decay),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )
        set_learning_rate(self.optimizer.param_groups, lr_schedule(1))  # type: ignore[call-arg]

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups of all trainable parameters."""
        rest = [*self.memory.parameters(), *self.action_net.parameters(), *self.value_net.parameters()]
        return [
            *self.features_extractor.parameter_groups(weight_decay),
            {"params": rest, "weight_decay": weight_decay},
        ]

    def critic_parameters(self) -> list[nn.Parameter]:
        """What only the critic's estimates depend on; it shares everything else with the policy."""
        return list(self.value_net.parameters())

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """Shape of one agent's memory."""
        return self.memory.shape

    def initial_memory(self, num_agents: int) -> Tensor:
        """Memory before an episode's first step: zeros (num_agents, *memory_shape)."""
        return torch.zeros(num_agents, *self.memory_shape, device=self.device)

    def frozen_features(self, obs: Observation) -> dict[str, Tensor]:
        """What learning never changes about observations (N, ...), as "image/feature".

        Each is float32 and worth storing once a frame; empty where the method trains its whole encoder.
        """
        return self.features_extractor.frozen_features(obs)

    def penalty(self) -> Tensor:
        """What the adaptation adds to the training loss: (), 0 for most methods."""
        return self.features_extractor.penalty()

    def metrics(self) -> dict[str, float]:
        """What is worth watching while the adaptation learns, as "image/name"."""
        return self.features_extractor.metrics()

    def set_progress(self, samples: int, total: int) -> None:
        """Tells the adaptation that ``samples`` of ``total`` frames were seen; between updates only."""
        self.features_extractor.set_progress(samples, total)

    def act(
        self,
        obs: Observation,
        memory: Tensor,
        episode_starts: Tensor,
        deterministic: bool = False,
        frozen: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor], Tensor]:
        """One step of N agents.

        Args:
            obs: by name, each (N, ...).
            memory: (N, *memory_shape).
            episode_starts: (N,) bool, whether an episode starts with this step.
            deterministic: whether to take the likeliest action instead of drawing one.
            frozen: what :meth:`frozen_features` gave for ``obs``; None computes it.

        Returns:
            actions (N,) int64, values (N,), log-probabilities (N,), new memory (N, *memory_shape), frozen
            features by name, and logits (N, num_actions).
        """
        stored = self.frozen_features(obs) if frozen is None else dict(frozen)
        features = self.features_extractor(obs, stored)
        hidden, next_memory = self.memory.step(features, memory, episode_starts)
        logits = self.action_net(hidden).float()
        log_probs = torch.log_softmax(logits, dim=1)
        drawn = log_probs.argmax(dim=1) if deterministic else torch.multinomial(log_probs.exp(), 1)[:, 0]
        values = self.value_net(hidden)[:, 0].float()
        taken = log_probs.gather(1, drawn[:, None])[:, 0]
        return drawn, values, taken, next_memory.to(memory.dtype), stored, logits

    def evaluate_sequences(
        self,
        obs: Observation,
        actions: Tensor | None,
        memory: Tensor,
        episode_starts: Tensor,
        frozen: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Values and action probabilities along T steps of B agents, episode starts inside included.

        Args:
            obs: by name, each (T, B, ...).
            actions: (T, B) int64 taken, or None.
            memory: (B, *memory_shape) before the first step.
            episode_starts: (T, B) bool.
            frozen: stored frozen features by name, each (T, B, ...); None computes them.

        Returns:
            values (T, B), log-probabilities of the actions (T, B) or None, entropies (T, B), and logits
            (T, B, num_actions).
        """
        _, hidden = self.sequence_features(obs, memory, episode_starts, frozen)
        return self.evaluate_hidden(hidden, actions)

    @property
    def sequence_dims(self) -> tuple[int, int]:
        """E and H, the lengths of what :meth:`sequence_features` answers; E is 0 if there are no images."""
        return self.features_extractor.image_dims, self.memory.features

    def sequence_features(
        self,
        obs: Observation,
        memory: Tensor,
        episode_starts: Tensor,
        frozen: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What T steps of B agents look like, (T, B, E), and what memory makes of them, (T, B, H).

        The arguments are those of :meth:`evaluate_sequences`. The first answer is of the images alone.
        """
        steps, batch = episode_starts.shape
        flat = {name: value.flatten(0, 1) for name, value in obs.items()}
        stored = None if frozen is None else {name: value.flatten(0, 1) for name, value in frozen.items()}
        features = self.features_extractor(flat, stored).reshape(steps, batch, -1)
        seen = features[..., : self.features_extractor.image_dims]
        return seen, self.memory.sequence(features, memory, episode_starts)

    def evaluate_hidden(
        self, hidden: Tensor, actions: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """What :meth:`evaluate_sequences` answers, of the memory's output (T, B, H) and actions (T, B)."""
        logits = self.action_net(hidden).float()
        log_probs = torch.log_softmax(logits, dim=2)
        entropy = -(log_probs.exp() * log_probs).sum(dim=2)
        taken = None if actions is None else log_probs.gather(2, actions.long()[..., None])[..., 0]
        return self.value_net(hidden)[..., 0].float(), taken, entropy, logits

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Actions for numpy observations, of one agent or a batch, as Stable-Baselines3's algorithms call it.

        Args:
            observation: as the environment gave it.
            state: what the last call returned; None before the first.
            episode_start: (N,), whether an episode starts with this step; None for no agent (the first call
                starts from zeros anyway).
            deterministic: whether to take the likeliest action instead of drawing one.

        Returns:
            actions (N,), or () for a single observation, and the state to hand to the next call.
        """
        self.set_training_mode(False)
        obs, batched = self.obs_to_tensor(observation)
        assert isinstance(obs, dict)
        agents = len(next(iter(obs.values())))
        memory = self.initial_memory(agents)
        if state is not None:
            memory = torch.as_tensor(state[0], device=self.device)
        starts = np.zeros(agents, dtype=bool) if episode_start is None else np.asarray(episode_start)
        starts = np.broadcast_to(starts, (agents,)).astype(bool)
        with torch.no_grad():
            actions, _, _, memory, _, _ = self.act(
                obs, memory, torch.as_tensor(starts, device=self.device), deterministic
            )
        chosen = actions.cpu().numpy()
        return (chosen if batched else chosen[0]), (memory.cpu().numpy(),)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions, values and log-probabilities of a policy without memory, for a plain PPO."""
        obs, memory, starts = self._without_memory(obs)
        actions, values, log_probs, *_ = self.act(obs, memory, starts, deterministic)
        return actions, values[:, None], log_probs

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, log-probabilities and entropies of a policy without memory, for a plain PPO."""
        obs, memory, starts = self._without_memory(obs)
        values, log_probs, entropy, _ = self.evaluate_sequences(
            {name: value[None] for name, value in obs.items()},
            actions.reshape(1, -1),
            memory,
            starts[None],
        )
        assert log_probs is not None
        return values[0][:, None], log_probs[0], entropy[0]

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """Values (N, 1) of a policy without memory, for a plain PPO."""
        return self.forward(obs, deterministic=True)[1]

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        """Distribution over actions of a policy without memory, for a plain PPO."""
        obs, memory, starts = self._without_memory(obs)
        return self.action_dist.proba_distribution(self.act(obs, memory, starts, True)[5])

    def _without_memory(self, obs: PyTorchObs) -> tuple[Observation, Tensor, Tensor]:
        kind = self._memory_settings["memory"]
        if kind != "none":
            raise ValueError(
                f"memory {kind!r} needs the state that act, evaluate_sequences and predict carry; "
                "under a plain stable_baselines3 algorithm use memory='none'"
            )
        assert isinstance(obs, dict)
        agents = len(next(iter(obs.values())))
        return obs, self.initial_memory(agents), torch.zeros(agents, dtype=torch.bool, device=self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
            "weight_decay": self._weight_decay,
            **self._memory_settings,
            **self.features_extractor_kwargs,
            "restored": True,
        }
