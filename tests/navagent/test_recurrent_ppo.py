"""With an LSTM, an update is that of :class:`sb3_contrib.RecurrentPPO`, episode starts inside included."""

import numpy as np
import pytest
import torch
from learning_world import LineVecEnv, LineWorld
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentMultiInputActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates

from navagent.learning.ppo import PPO

HIDDEN = 12


class Lstm(RecurrentMultiInputActorCriticPolicy):
    """sb3_contrib's recurrent policy, with the methods that sequences need."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, lstm_hidden_size=HIDDEN, **kwargs)

    def penalty(self):
        return torch.zeros(())

    def metrics(self):
        return {}

    def set_progress(self, samples, total):
        pass

    def initial_memory(self, n):
        # Hidden and cell state of the actor's and the critic's network.
        return torch.zeros(n, 4, HIDDEN)

    def _states(self, memory):
        h, c, vh, vc = (memory[:, i][None].contiguous() for i in range(4))
        return RNNStates((h, c), (vh, vc))

    def act(self, obs, memory, episode_starts, deterministic=False, frozen=None):
        out = self(obs, self._states(memory), episode_starts.float(), deterministic)
        actions, values, log_probs, states = out
        after = torch.stack([s[0] for s in (*states.pi, *states.vf)], dim=1)
        return actions, values.flatten(), log_probs, after, {}, torch.zeros(len(actions), 4)

    def evaluate_sequences(self, obs, actions, memory, episode_starts, frozen=None):
        # sb3_contrib lays sequences out one environment after the other.
        steps, envs = actions.shape
        flat = {key: value.transpose(0, 1).flatten(0, 1) for key, value in obs.items()}
        out = self.evaluate_actions(
            flat, actions.T.flatten(), self._states(memory), episode_starts.T.flatten().float()
        )
        values, log_probs, entropy = (value.view(envs, steps).T for value in out)
        return values, log_probs, entropy, torch.zeros(steps, envs, 4)


@pytest.mark.parametrize("clip_range_vf", [None, 0.1])
def test_with_an_lstm_training_equals_sb3_contrib(monkeypatch, clip_range_vf):
    # Their buffer begins its minibatch at a random place, and cuts the sequence that it falls into.
    monkeypatch.setattr(np.random, "randint", lambda *_: 0)
    shared = {
        "n_steps": 16,
        "n_epochs": 3,
        "learning_rate": 1e-3,
        "gamma": 0.95,
        "gae_lambda": 0.9,
        "ent_coef": 0.01,
        "vf_coef": 0.4,
        "clip_range_vf": clip_range_vf,
        "max_grad_norm": 0.3,
        "seed": 0,
        "device": "cpu",
    }
    worlds = [LineVecEnv(LineWorld(num_envs=4, max_steps=5)) for _ in range(2)]
    ours = PPO(Lstm, worlds[0], n_minibatches=1, **shared)
    theirs = RecurrentPPO(Lstm, worlds[1], batch_size=64, **shared)
    for one, other in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    begin = [value.clone() for value in ours.policy.parameters()]
    for model in (ours, theirs):
        torch.manual_seed(1)
        model.learn(3 * 64)
    starts = ours.rollout_buffer["episode_starts"]
    assert starts[1:].any()
    assert np.array_equal(starts.numpy(), theirs.rollout_buffer.episode_starts.astype(bool).reshape(4, 16).T)
    for one, other in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert max((a - b).abs().max() for a, b in zip(begin, ours.policy.parameters(), strict=True)) > 1e-3
