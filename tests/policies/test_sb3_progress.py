"""Schedules under a plain Stable-Baselines3 algorithm."""

import pytest
import torch
from stable_baselines3 import PPO
from test_extractor import TinyWorld

from policies.encoders import make_encoder
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


def test_a_plain_algorithm_leaves_pre_trained_weights_as_they_are():
    for adaptation in ("features", "finetune"):
        model = agent(
            policy_kwargs={
                "features_extractor_class": AdaptedExtractor,
                "features_extractor_kwargs": {"adaptation": adaptation, "image_features": 8},
                "normalize_images": False,
            }
        )
        for key, channels in (("rgb", 3), ("depth", 1)):
            method = model.policy.features_extractor.adaptations[key]
            encoder = method.base.encoder if adaptation == "features" else method.network.encoder
            pretrained = make_encoder("fcn5_small", channels).state_dict()
            assert all(torch.equal(v, pretrained[k]) for k, v in encoder.state_dict().items())


def test_another_extractor_is_refused():
    with pytest.raises(ValueError, match="CombinedExtractor; AdaptationProgress needs an AdaptedExtractor"):
        agent().learn(8, callback=AdaptationProgress())
