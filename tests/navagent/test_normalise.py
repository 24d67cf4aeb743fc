import numpy as np
import pytest
import torch
from learning_world import LineVecEnv, LineWorld
from stable_baselines3.common.vec_env import VecNormalize

from navagent.learning.normalise import Moments, ReturnNormaliser


def test_statistics_and_rewards_are_those_of_vec_normalize():
    theirs = VecNormalize(LineVecEnv(LineWorld(num_envs=3, max_steps=5)), norm_obs=False, gamma=0.9)
    theirs.reset()
    ours = ReturnNormaliser(3, gamma=0.9)
    generator = np.random.default_rng(0)
    for _ in range(4):
        rewards, dones = [], []
        for _ in range(7):
            _, _, done, _ = theirs.step(generator.integers(0, 4, 3))
            rewards.append(torch.from_numpy(theirs.get_original_reward()))
            dones.append(torch.from_numpy(done))
        ours.update(ours.measure(torch.stack(rewards), torch.stack(dones)))
        count, mean, m2 = ours.moments.tolist()
        assert count == pytest.approx(theirs.ret_rms.count)
        assert mean == pytest.approx(theirs.ret_rms.mean, abs=1e-12)
        assert m2 / count == pytest.approx(theirs.ret_rms.var, rel=1e-9)
        raw = generator.normal(0, 20, 3).astype(np.float32)
        np.testing.assert_allclose(ours(torch.from_numpy(raw)), theirs.normalize_reward(raw), rtol=1e-6)
    assert torch.stack(dones).any(), "episodes must have ended for the sums to begin anew"


def test_before_anything_was_seen_rewards_stay_as_they_are():
    rewards = torch.tensor([1.0, -2.5, 3.0])
    torch.testing.assert_close(ReturnNormaliser(3, 0.9)(rewards), rewards)


def test_rewards_are_cut_at_the_limit():
    normaliser = ReturnNormaliser(2, 0.9, limit=3.0)
    assert normaliser(torch.tensor([100.0, -100.0])).tolist() == [3.0, -3.0]


def test_moments_of_parts_add_up_to_those_of_all_in_any_order():
    numbers = torch.randn(60, generator=torch.Generator().manual_seed(0)) * 3 + 7
    parts = [Moments.of(part) for part in numbers.split([5, 1, 30, 24])]
    for order in (parts, parts[::-1]):
        total = order[0] + order[1] + order[2] + order[3]
        assert total.count == 60
        torch.testing.assert_close(total.mean, numbers.double().mean())
        torch.testing.assert_close(total.variance, numbers.double().var(unbiased=False))


def test_two_halves_put_together_are_one_whole():
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(9, 6, generator=generator)
    dones = torch.rand(9, 6, generator=generator) < 0.3
    whole, left, right = ReturnNormaliser(6, 0.95), ReturnNormaliser(3, 0.95), ReturnNormaliser(3, 0.95)
    for _ in range(2):
        whole.update(whole.measure(rewards, dones))
        measured = left.measure(rewards[:, :3], dones[:, :3]), right.measure(rewards[:, 3:], dones[:, 3:])
        shared = Moments.from_sums(measured[0].sums + measured[1].sums)
        for part in (left, right):
            part.update(shared)
            torch.testing.assert_close(part.moments, whole.moments)
    torch.testing.assert_close(torch.cat((left.returns, right.returns)), whole.returns)


def test_the_state_holds_what_was_learned_but_not_unfinished_episodes():
    normaliser = ReturnNormaliser(2, 0.9)
    normaliser.update(normaliser.measure(torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.bool)))
    other = ReturnNormaliser(5, 0.9)
    other.load_state_dict(normaliser.state_dict())
    assert torch.equal(other.moments, normaliser.moments)
    assert other.returns.tolist() == [0.0] * 5
