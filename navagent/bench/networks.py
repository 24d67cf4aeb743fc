"""The networks that learners are compared on, as settings of ``navagent train``."""

from __future__ import annotations

from dataclasses import dataclass

HABITAT = (
    "sensors=depth",
    "imitation.frames=0",
    "algorithm.epochs=2",
    "algorithm.num_minibatches=2",
    "algorithm.learning_rate=2.5e-4",
    "algorithm.learning_rate_schedule=constant",
    "algorithm.max_grad_norm=0.2",
    "algorithm.num_steps=128",
)
"""What networks share: depth alone, and habitat-baselines' settings of DD-PPO (``ddppo_pointnav.yaml``)."""


@dataclass(frozen=True)
class Network:
    """A policy's network."""

    title: str
    """What it is, in a few words."""
    settings: tuple[str, ...]
    """Settings of ``navagent train`` that make it."""
    frozen: bool = False
    """Whether a part of it never changes, so that its features can be stored."""


NETWORKS: dict[str, Network] = {
    "simple_cnn": Network(
        "SimpleCNN, no memory",
        (*HABITAT, "adaptation=scratch", "encoder=simple_cnn", "memory=none", "memory.hidden_size=512"),
    ),
    "simple_cnn_gru": Network(
        "SimpleCNN, GRU 512",
        (*HABITAT, "adaptation=scratch", "encoder=simple_cnn", "memory=gru", "memory.hidden_size=512"),
    ),
    "simple_cnn_lstm": Network(
        "SimpleCNN, LSTM 512",
        (*HABITAT, "adaptation=scratch", "encoder=simple_cnn", "memory=lstm", "memory.hidden_size=512"),
    ),
    "resnet18_lstm": Network(
        "ResNet-18, two-layer LSTM 512",
        (
            *HABITAT,
            "adaptation=scratch",
            "encoder=resnet18",
            "memory=lstm",
            "memory.hidden_size=512",
            "memory.num_layers=2",
        ),
    ),
    "sidetune_resnet44": Network(
        "side-tuning: frozen ResNet-44, FCN4 beside it, LSTM 512",
        (
            *HABITAT,
            "adaptation=sidetune",
            "encoder=resnet44",
            "adaptation.side_encoder=fcn4",
            "adaptation.side_init=random",
            "memory=lstm",
            "memory.hidden_size=512",
        ),
        frozen=True,
    ),
    "sidetune_small": Network(
        "side-tuning: frozen small ResNet, small FCN5 beside it, LSTM 512",
        (
            *HABITAT,
            "adaptation=sidetune",
            "encoder=resnet_small",
            "encoder.weights=random",
            "adaptation.side_encoder=fcn5_small",
            "adaptation.side_init=random",
            "memory=lstm",
            "memory.hidden_size=512",
        ),
        frozen=True,
    ),
    "settings": Network("as the settings say", ()),
}
"""Networks by the name that selects them. The side-tuning authors' own pairs are ResNet-44 with FCN4 (iCIFAR)
and, larger, Taskonomy's ResNet-50 with FCN5 (navigation)."""

DEFAULT_NETWORKS = ("simple_cnn_gru", "simple_cnn_lstm", "resnet18_lstm", "sidetune_resnet44")
"""What is measured where nothing is named."""
