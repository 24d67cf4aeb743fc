"""Schedules of an adaptation under a plain Stable-Baselines3 algorithm."""

from __future__ import annotations

from stable_baselines3.common.callbacks import BaseCallback

from policies.extractor import AdaptedExtractor


class AdaptationProgress(BaseCallback):
    """Tells an adaptation how far training is, for a ``learn(callback=...)`` of Stable-Baselines3.

    Methods with a schedule need it: an alpha that is annealed, a base that is unfrozen half-way.
    :class:`navagent.learning.ppo.PPO` does this by itself.

    Raises:
        ValueError: if the policy's features extractor is not an :class:`AdaptedExtractor`.
    """

    def _extractor(self) -> AdaptedExtractor:
        extractor = self.model.policy.features_extractor
        if not isinstance(extractor, AdaptedExtractor):
            raise ValueError(
                f"the policy's features extractor is a {type(extractor).__name__}; AdaptationProgress "
                "needs an AdaptedExtractor, see policy_kwargs"
            )
        return extractor

    def _on_training_start(self) -> None:
        self._extractor()

    def _on_rollout_start(self) -> None:
        self._extractor().set_progress(self.model.num_timesteps, self.model._total_timesteps)

    def _on_step(self) -> bool:
        return True
