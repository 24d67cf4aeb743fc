"""Schedules under a plain Stable-Baselines3 algorithm."""

import pytest
from stable_baselines3 import PPO
from test_extractor import TinyWorld

from policies.extractor import AdaptedExtractor
from policies.sb3_progress import AdaptationProgress


def agent(**options):
    return PPO("MultiInputPolicy", TinyWorld(), n_steps=8, batch_size=8, n_epochs=1, device="cpu", **options)


def test_the_method_is_told_before_every_rollout(monkeypatch):
    extractor = {"weights": "random", "adaptation": "features", "image_features": 8}
    model = agent(
        policy_kwargs={
            "features_extractor_class": AdaptedExtractor,
            "features_extractor_kwargs": extractor,
            "normalize_images": False,
        }
    )
    told = []
    monkeypatch.setattr(
        AdaptedExtractor, "set_progress", lambda self, samples, total: told.append((samples, total))
    )
    model.learn(24, callback=AdaptationProgress())
    assert told == [(0, 24), (8, 24), (16, 24)]


def test_another_extractor_is_refused():
    with pytest.raises(ValueError, match="CombinedExtractor; AdaptationProgress needs an AdaptedExtractor"):
        agent().learn(8, callback=AdaptationProgress())
