"""The environments' names in Gymnasium's registry."""

from __future__ import annotations

import gymnasium as gym

ENV_ID = "navagent/PointNav-v0"


def register_envs() -> None:
    """Registers ``navagent/PointNav-v0``, single and batched; calling it twice is harmless.

    Importing :mod:`envs` does this, and so does an ``envs:`` before the name (Gymnasium 1.x no longer loads
    packages' entry points by itself). Keyword arguments of ``gymnasium.make`` and ``make_vec`` are those of
    :func:`envs.make.make_env` and :func:`envs.make.make_vector_env`.
    """
    if ENV_ID not in gym.registry:
        gym.register(
            ENV_ID,
            entry_point="envs.make:make_env",
            vector_entry_point="envs.make:make_vector_env",
        )
