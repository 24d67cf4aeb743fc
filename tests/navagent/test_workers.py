"""Environments of a user's own, in worker processes that break down."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from learning_world import LineVecEnv, LineWorld, MemorylessPolicy
from stable_baselines3.common.vec_env import SubprocVecEnv, VecMonitor

from navagent.learning.ppo import PPO
from navagent.learning.workers import watched_workers


class FallingEnv(gymnasium.Env):
    """At some step something happens to it."""

    observation_space = LineWorld().single_observation_space
    action_space = gymnasium.spaces.Discrete(4)

    def __init__(self, happens, how):
        self.left, self.how = happens, how

    def observe(self):
        return {"offset": np.zeros(2, np.float32), "image": np.zeros((4, 4, 3), np.uint8)}

    def happen(self):
        self.left -= 1
        if self.left != 0:
            return
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "exit":
            os._exit(3)
        raise IndexError("the roof came down")

    def reset(self, *, seed=None, options=None):
        self.happen()
        return self.observe(), {}

    def step(self, action):
        self.happen()
        return self.observe(), 0.0, False, False, {}


def train_in_workers(folder, happens, how):
    """In a session of its own, so that whatever is left of it can be found."""
    os.setsid()
    (folder / "session").write_text(str(os.getpid()))
    with (folder / "log").open("w") as log:
        os.dup2(log.fileno(), 2)
    makers = [partial(FallingEnv, happens if number == 1 else -1, how) for number in range(3)]
    # Forked: no other way is as fast, and in no other do workers keep each other's pipes open.
    env = VecMonitor(SubprocVecEnv(makers, start_method="fork"))
    model = PPO(MemorylessPolicy, env, n_steps=8, n_minibatches=1, n_epochs=1, device="cpu")
    try:
        model.learn(10**6)
    finally:
        # What users do, and what would hang.
        env.close()


def members(session):
    """Processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[3]) == session and words[0] not in "ZX":
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize(
    ("happens", "how", "told"),
    [
        pytest.param(13, "raise", "worker 1 of 3 ended with status 1", id="raises in a step"),
        pytest.param(1, "raise", "worker 1 of 3 ended with status 1", id="raises at the start"),
        pytest.param(13, "kill", "worker 1 of 3 was ended by SIGKILL, as by the system when", id="is killed"),
        pytest.param(13, "exit", "worker 1 of 3 ended with status 3", id="exits"),
    ],
)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_worker_that_breaks_down_ends_the_training_in_seconds_and_nothing_is_left(
    tmp_path, processes, happens, how, told
):
    begun = time.monotonic()
    process = processes.start(train_in_workers, tmp_path, happens, how)
    process.join(60)
    assert process.exitcode == 1
    assert time.monotonic() - begun < 20
    said = (tmp_path / "log").read_text()
    assert told in said
    if how == "raise":
        # The worker's own words come first.
        assert "in happen" in said and "IndexError: the roof came down" in said
        assert said.index("IndexError: the roof came down") < said.index("WorkerLostError")
    if happens > 1:
        assert "the training broke off after 33 frames" in said
    assert "EOFError" not in said and "ConnectionResetError" not in said
    assert members(int((tmp_path / "session").read_text())) == []


def test_a_connection_of_something_else_that_breaks_is_told_as_it_is():
    env = LineVecEnv(LineWorld())
    with pytest.raises(ConnectionResetError, match="the license server"), watched_workers(env):
        raise ConnectionResetError("the license server")
