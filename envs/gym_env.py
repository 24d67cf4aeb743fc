"""PointNav as a single Gymnasium environment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from envs.vector_env import NO_EPISODE, Observations, PointNavVectorEnv


class PointNavEnv(gym.Env[Observations, np.int64]):
    """One agent that navigates to points: a :class:`~envs.vector_env.PointNavVectorEnv` of one.

    Every step's info holds the measures so far, as Habitat's does: ``distance_to_goal``, ``success``,
    ``spl``, ``soft_spl``, ``collisions``, ``path_length``, and ``episode_id`` and ``scene_id``. Where the
    simulator's process died, the episode is truncated, the info holds ``interrupted`` (true) and the measures
    are no result: the next reset begins the same episode again.

    Args:
        env: a batch of one with numpy output and autoreset disabled.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - Gymnasium's own interface

    def __init__(self, env: PointNavVectorEnv) -> None:
        if env.num_envs != 1 or env.output != "numpy" or env.autoreset_mode != AutoresetMode.DISABLED:
            raise ValueError(
                f"a single environment needs 1 agent, numpy output and autoreset disabled, not "
                f"{env.num_envs}, {env.output}, {env.autoreset_mode}"
            )
        self.vector_env = env
        self.observation_space = env.single_observation_space
        self.action_space = env.single_action_space
        self.render_mode = env.render_mode
        self._started = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Starts the next episode; with a seed, the first of that seed's stream.

        Raises:
            ValueError: the sampler hands out each episode once and has none left.
        """
        super().reset(seed=seed)
        if seed is None and not self._started:
            # As Gymnasium has it, an environment that was never seeded differs from run to run.
            seed = int(self.np_random.integers(2**31))
        self._started = True
        observations, _ = self.vector_env.reset(
            seed=seed, options={"reset_mask": [True]} if seed is None else None
        )
        if self.vector_env.current_episodes()[0] == NO_EPISODE:
            raise ValueError(
                f"all {len(self.vector_env.sampler.episodes)} episodes were handed out, each once; "
                "reset with a seed to start from the first again"
            )
        return self._first(observations), self._info()

    def step(self, action: Any) -> tuple[Observations, float, bool, bool, dict[str, Any]]:
        """Takes one action: 0 stop, 1 forward, 2 left, 3 right; without stop where that is automatic."""
        observations, reward, terminated, truncated, infos = self.vector_env.step(np.array([action]))
        return (
            self._first(observations),
            float(reward[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            self._info() | ({"interrupted": True} if "interrupted" in infos else {}),
        )

    def render(self) -> np.ndarray | None:
        """What the agent sees: (height, width, 3) uint8."""
        frames = self.vector_env.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Closes the simulator; calling it twice is harmless."""
        self.vector_env.close()

    def expert_action(self) -> int:
        """What the shortest-path follower would do now."""
        return int(self.vector_env.expert_actions()[0])

    def _first(self, observations: Observations) -> Observations:
        return {name: value[0] for name, value in observations.items()}

    def _info(self) -> dict[str, Any]:
        episode = self.vector_env.sampler.episodes[self.vector_env.current_episodes()[0]]
        measures = {name: value.item() for name, value in self.vector_env.measures().items()}
        return measures | {"episode_id": episode.episode_id, "scene_id": episode.scene_id}
