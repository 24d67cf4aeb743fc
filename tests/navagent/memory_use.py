"""What a training really takes, measured in a process of its own."""

from __future__ import annotations

import ctypes
import json
import threading
import time
from pathlib import Path

import torch
from learning_world import LineVecEnv, SeeingWorld

from navagent.learning.ppo import PPO
from navagent.memory_estimate import Shape, footprint, held_bytes, need
from policies.actor_critic import NavigationPolicy

M_MMAP_THRESHOLD = -3


def learner(num_envs, num_steps, num_minibatches, size=64, feature_dtype=torch.float32, **policy):
    return PPO(
        NavigationPolicy,
        LineVecEnv(SeeingWorld(size=size, num_envs=num_envs)),
        n_steps=num_steps,
        n_minibatches=num_minibatches,
        n_epochs=1,
        seed=0,
        device="cpu",
        feature_dtype=feature_dtype,
        policy_kwargs={"weights": "random", "hidden_size": 64, "image_features": 64, **policy},
    )


def shape_of(model):
    return Shape(model.n_envs, model.n_steps, model.n_minibatches, model.feature_dtype.itemsize)


def measure(settings, returns_memory, file):
    """Writes what one rollout and its update were estimated to take and what they took [bytes]."""
    torch.set_num_threads(1)
    if returns_memory:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    # What the first update of a process allocates once for all.
    learner(2, 4, 2, **{k: v for k, v in settings.items() if isinstance(v, str)}).learn(8)
    model = learner(**settings)
    estimate = need(footprint(model), shape_of(model)).device
    before = most = held_bytes()
    over = threading.Event()

    def watch():
        nonlocal most
        while not over.is_set():
            most = max(most, held_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model.learn(model.n_envs * model.n_steps)
    over.set()
    watcher.join()
    Path(file).write_text(json.dumps([estimate, most - before]))
