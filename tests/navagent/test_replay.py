"""``replay.npz``: windows of a ring of eleven steps as the side-tuning paper's storage gives them.

Recorded with ``RolloutSensorDictReplayBuffer`` of ``evkit/rl/storage/rollout.py`` in
github.com/jozhang97/side-tuning on torch 2.13: sixteen steps of two environments in rollouts of four, random
numbers, a critic that is linear in observation and state. Its ``SensorDict`` was replaced by a dictionary,
``parallel_apply`` by a loop and the random start by the recorded one. ``returns_K`` are the returns of the
window that begins K steps back.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from navagent.learning.replay import Replay
from navagent.learning.rollout import SequenceBuffer, generalized_advantages

RECORDED = Path(__file__).parent.parent / "data" / "replay.npz"
CAPACITY, STEPS, ENVS = 11, 4, 2


class LinearCritic:
    """Values linear in what is seen and remembered; counts the environments it is asked about."""

    def __init__(self, of_sight, of_memory):
        self.of_sight, self.of_memory = of_sight, of_memory
        self.widths = []

    def values(self, obs, memory, starts, frozen):
        assert frozen is None or torch.equal(frozen["double"], obs["x"] * 2)
        return obs["x"] @ self.of_sight + (memory * ~starts[..., None]) @ self.of_memory

    def act(self, obs, memory, starts, deterministic=False, frozen=None):
        return None, self.values(obs, memory, starts, frozen)

    def evaluate_sequences(self, obs, actions, memory, starts, frozen=None):
        self.widths.append(actions.shape[1])
        # Recorded memories do not follow from each other: only the first step's is used, as in the window.
        states = torch.zeros(*actions.shape, memory.shape[-1])
        states[0] = memory
        return (self.values(obs, states, starts, frozen),)


class StoredStates(LinearCritic):
    """Knows the recorded states of later steps, as their storage hands them over."""

    def __init__(self, data):
        super().__init__(data["w"], data["u"])
        self.data = data

    def evaluate_sequences(self, obs, actions, memory, starts, frozen=None):
        states = torch.stack(
            [self.data["states"][(self.data["obs"] == x).all(-1)][0] for x in obs["x"].flatten(0, 1)]
        )
        return (self.values(obs, states.view(*actions.shape, -1), starts, frozen),)


@pytest.fixture(scope="module")
def data():
    with np.load(RECORDED) as recorded:
        return {name: torch.from_numpy(recorded[name]) for name in recorded.files}


def fill(replay, data, rollouts, frozen=False):
    """Puts whole rollouts of the recording into the ring."""
    for first in range(STEPS * rollouts[0], STEPS * rollouts[1], STEPS):
        replay.start()
        for step in range(first, first + STEPS):
            replay.add(
                {"x": data["obs"][step]},
                data["actions"][step],
                data["starts"][step],
                data["logp"][step],
                data["states"][step],
                {"double": data["obs"][step] * 2} if frozen else None,
            )
        last = first + STEPS
        replay.finish(
            data["rewards"][first:last], {"x": data["obs"][last]}, data["states"][last], data["starts"][last]
        )
    return replay


def empty(capacity=CAPACITY, **settings):
    return Replay(capacity, SequenceBuffer(STEPS, ENVS, **settings))


def at(behind, monkeypatch):
    """Makes the next window begin so many steps back."""
    nearest = STEPS + 1
    drawn = (behind - nearest + 0.5) / (CAPACITY - nearest)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(drawn))


@pytest.mark.parametrize("behind", [4, 5, 7, 8, 10])
def test_windows_have_the_papers_returns_and_log_probabilities(data, behind, monkeypatch):
    replay = fill(empty(), data, (0, 4))
    policy = StoredStates(data)
    if behind == STEPS:
        window = replay.newest(policy, 0.9, 0.8, 1)
    else:
        at(behind, monkeypatch)
        window = replay.past(policy, 0.9, 0.8, 1, torch.Generator())
    torch.testing.assert_close(window.returns, data[f"returns_{behind}"], atol=1e-5, rtol=1e-5)
    lived = slice(16 - behind, 16 - behind + STEPS)
    batch = next(window.minibatches(1))
    assert torch.equal(batch.log_probs, data["logp"][lived])
    assert torch.equal(batch.actions, data["actions"][lived])
    assert torch.equal(batch.episode_starts, data["starts"][lived])
    assert torch.equal(batch.observations["x"], data["obs"][lived])
    assert torch.equal(batch.memory, data["states"][lived.start])


def test_past_windows_begin_anywhere_before_the_newest_rollout(data):
    replay = fill(empty(), data, (0, 4))
    policy = LinearCritic(data["w"], data["u"])
    generator = torch.Generator().manual_seed(0)
    begun = set()
    for _ in range(60):
        window = replay.past(policy, 0.9, 0.8, 1, generator)
        first = (data["obs"] == window["obs/x"][0]).all(-1).all(-1).nonzero().item()
        assert torch.equal(window["obs/x"], data["obs"][first : first + STEPS])
        begun.add(16 - first)
    assert begun == {5, 6, 7, 8, 9, 10}


def test_until_the_ring_is_full_every_window_is_the_newest_rollout(data):
    replay = fill(empty(), data, (0, 2))
    policy = LinearCritic(data["w"], data["u"])
    assert replay.filled == 8
    window = replay.past(policy, 0.9, 0.8, 1, torch.Generator())
    assert torch.equal(window["obs/x"], data["obs"][4:8])
    fill(replay, data, (2, 3))
    assert replay.filled == CAPACITY


def test_advantages_are_those_of_the_present_critic(data, monkeypatch):
    replay = fill(empty(), data, (0, 4))
    at(9, monkeypatch)
    for policy in (LinearCritic(data["w"], data["u"]), LinearCritic(-data["w"], 3 * data["u"])):
        window = replay.past(policy, 0.95, 0.7, 1, torch.Generator())
        memory = torch.zeros(STEPS, *data["states"].shape[1:])
        memory[0] = data["states"][7]
        values = policy.values({"x": data["obs"][7:11]}, memory, data["starts"][7:11], None)
        following = policy.values({"x": data["obs"][11]}, data["states"][11], data["starts"][11], None)
        expected = generalized_advantages(
            data["rewards"][7:11], values, data["starts"][7:11], following, data["starts"][11], 0.95, 0.7
        )
        torch.testing.assert_close(window.advantages, expected)
        torch.testing.assert_close(window["values"], values)


def test_the_critic_is_asked_in_parts_that_make_no_difference(data, monkeypatch):
    replay = fill(empty(), data, (0, 4))
    policy = LinearCritic(data["w"], data["u"])
    at(6, monkeypatch)
    whole = replay.past(policy, 0.9, 0.8, 1, torch.Generator()).advantages.clone()
    # More parts than environments are those of several processes.
    for count in (2, 5):
        policy.widths.clear()
        parts = replay.past(policy, 0.9, 0.8, count, torch.Generator()).advantages
        assert policy.widths == [1, 1]
        torch.testing.assert_close(whole, parts)


def test_frozen_features_are_kept_in_their_own_type(data):
    replay = fill(
        empty(feature_dtype=torch.float16), {**data, "obs": data["obs"].half().float()}, (0, 3), True
    )
    window = replay.newest(LinearCritic(data["w"], data["u"]), 0.9, 0.8, 1)
    assert window["frozen/double"].dtype == torch.float16
    assert replay.state_dict()["blocks"]["frozen/double"].dtype == torch.float16


def test_when_other_features_are_frozen_the_past_is_given_up(data):
    replay = fill(empty(), data, (0, 3), frozen=True)
    fill(replay, data, (3, 4))
    assert replay.filled == STEPS
    assert torch.equal(
        replay.newest(LinearCritic(data["w"], data["u"]), 0.9, 0.8, 1)["obs/x"], data["obs"][12:16]
    )


@pytest.mark.parametrize("rollouts", [1, 3])
def test_a_rollout_broken_off_is_forgotten(data, rollouts):
    straight, broken = fill(empty(), data, (0, rollouts)), fill(empty(), data, (0, rollouts))
    restored = empty()
    broken.start()
    step = 4 * rollouts
    for offset in range(3):
        broken.add(
            {"x": torch.full((ENVS, 3), 9.0)},
            data["actions"][step + offset],
            data["starts"][step + offset],
            data["logp"][step + offset],
            data["states"][step + offset],
        )
    restored.load_state_dict(broken.state_dict())
    for replay in (straight, broken, restored):
        fill(replay, data, (rollouts, 4))
    policy = LinearCritic(data["w"], data["u"])
    for draws in range(8):
        windows = [
            replay.past(policy, 0.9, 0.8, 1, torch.Generator().manual_seed(draws))["obs/x"].clone()
            for replay in (straight, broken, restored)
        ]
        assert torch.equal(windows[0], windows[1])
        assert torch.equal(windows[0], windows[2])


@pytest.mark.parametrize("rollouts", [2, 3])
def test_a_restored_ring_goes_on_as_the_first(data, rollouts):
    first = fill(empty(), data, (0, rollouts))
    second = empty()
    second.load_state_dict(first.state_dict())
    for replay in (first, second):
        fill(replay, data, (rollouts, 4))
    policy = LinearCritic(data["w"], data["u"])
    for draws in range(8):
        windows = []
        for replay in (first, second):
            window = replay.past(policy, 0.9, 0.8, 1, torch.Generator().manual_seed(draws))
            windows.append((window["obs/x"].clone(), window.returns.clone()))
        assert all(torch.equal(one, other) for one, other in zip(*windows, strict=True))


def test_memory_is_bounded_and_counted(data):
    replay = fill(empty(), data, (0, 1))
    before = replay.num_bytes
    # Per step and environment: three numbers seen, two remembered, action, log-probability, reward, start.
    assert before == CAPACITY * ENVS * (3 * 4 + 2 * 4 + 8 + 4 + 4 + 1)
    fill(replay, data, (1, 4))
    assert replay.num_bytes == before
    replay.newest(LinearCritic(data["w"], data["u"]), 0.9, 0.8, 1)
    assert replay.num_bytes == before + replay.window.num_bytes > before


def test_a_ring_too_short_for_a_past_is_refused():
    with pytest.raises(ValueError, match="replay_steps 5 must be at least two more than n_steps, 4"):
        empty(5)
