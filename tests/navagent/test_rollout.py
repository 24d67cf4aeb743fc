import pytest
import torch
from learning_world import LineVecEnv, LineWorld

from navagent.learning.rollout import SequenceBuffer, generalized_advantages, tensor_envs


def brute_force_advantage(rewards, values, starts, last_value, last_done, gamma, lam, t):
    """Exponentially weighted n-step advantages from step t, written out as the definition has them."""
    length = len(rewards)
    total, weight = 0.0, 1.0
    for k in range(t, length):
        ends = last_done if k == length - 1 else starts[k + 1]
        follows = last_value if k == length - 1 else values[k + 1]
        total += weight * (rewards[k] + (0.0 if ends else gamma * follows) - values[k])
        if ends:
            break
        weight *= gamma * lam
    return total


def test_advantages_equal_the_definition_written_out():
    generator = torch.Generator().manual_seed(0)
    steps, envs, gamma, lam = 13, 5, 0.97, 0.9
    rewards = torch.randn(steps, envs, generator=generator, dtype=torch.float64)
    values = torch.randn(steps, envs, generator=generator, dtype=torch.float64)
    starts = torch.rand(steps, envs, generator=generator) < 0.25
    last_values = torch.randn(envs, generator=generator, dtype=torch.float64)
    last_dones = torch.tensor([True, False, True, False, False])
    got = generalized_advantages(rewards, values, starts, last_values, last_dones, gamma, lam)
    for env in range(envs):
        for t in range(steps):
            want = brute_force_advantage(
                rewards[:, env].tolist(),
                values[:, env].tolist(),
                starts[:, env].tolist(),
                last_values[env].item(),
                bool(last_dones[env]),
                gamma,
                lam,
                t,
            )
            assert got[t, env].item() == pytest.approx(want, abs=1e-12)


def test_with_lambda_one_advantages_are_discounted_returns_minus_values():
    rewards = torch.tensor([[1.0], [2.0], [4.0]])
    values = torch.tensor([[0.5], [0.25], [0.125]])
    starts = torch.zeros(3, 1, dtype=torch.bool)
    got = generalized_advantages(
        rewards, values, starts, torch.tensor([8.0]), torch.tensor([False]), 0.5, 1.0
    )
    returns = torch.tensor([[1 + 0.5 * (2 + 0.5 * (4 + 0.5 * 8))], [2 + 0.5 * (4 + 0.5 * 8)], [4 + 0.5 * 8]])
    torch.testing.assert_close(got, returns - values)


def fill_with_identifiable_data(buffer: SequenceBuffer) -> None:
    """Every number says from which step and environment it is: step + environment / 100."""
    envs = torch.arange(buffer.num_envs)
    buffer.start(envs[:, None].float())
    for step in range(buffer.num_steps):
        stamp = step + envs / 100
        buffer.add(
            observations={"image": (step * 10 + envs).to(torch.uint8)[:, None], "goal": stamp[:, None]},
            actions=step * 100 + envs,
            rewards=stamp,
            episode_starts=(envs + step) % 3 == 0,
            values=stamp * 2,
            log_probs=stamp * 3,
            frozen={"base": stamp[:, None].expand(-1, 4)},
            expert_actions=step * 100 + envs + 7,
            expert_turns=(envs - step).to(torch.int16),
        )
    buffer.finish(torch.zeros(buffer.num_envs), torch.zeros(buffer.num_envs, dtype=torch.bool), 0.9, 0.8)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_all_transitions_visited_exactly_once_in_one_epoch(count):
    buffer = SequenceBuffer(5, 6)
    fill_with_identifiable_data(buffer)
    batches = list(buffer.minibatches(count, torch.Generator().manual_seed(1)))
    assert len(batches) == count
    seen = torch.cat([batch.actions.flatten() for batch in batches]).sort().values
    expected = torch.cat([step * 100 + torch.arange(6) for step in range(5)])
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("count", [1, 3])
def test_everything_in_a_minibatch_is_of_the_same_transition(count):
    buffer = SequenceBuffer(5, 6)
    fill_with_identifiable_data(buffer)
    for batch in buffer.minibatches(count, torch.Generator().manual_seed(2)):
        steps, envs = batch.actions // 100, batch.actions % 100
        assert torch.equal(steps, torch.arange(5)[:, None].expand_as(steps)), "sequences keep their order"
        stamp = steps + envs / 100
        torch.testing.assert_close(batch.observations["goal"][..., 0], stamp)
        assert torch.equal(batch.observations["image"][..., 0], (steps * 10 + envs).to(torch.uint8))
        torch.testing.assert_close(batch.values, stamp * 2)
        torch.testing.assert_close(batch.log_probs, stamp * 3)
        torch.testing.assert_close(batch.frozen["base"][..., 3], stamp)
        assert torch.equal(batch.expert_actions, batch.actions + 7)
        assert torch.equal(batch.expert_turns, (envs - steps).to(torch.int16))
        assert torch.equal(batch.memory[:, 0], envs[0].float())
        assert torch.equal(batch.episode_starts, (envs + steps) % 3 == 0)
        torch.testing.assert_close(batch.returns, batch.advantages + batch.values)


def test_minibatches_differ_between_epochs_and_repeat_with_the_seed():
    buffer = SequenceBuffer(2, 8)
    fill_with_identifiable_data(buffer)

    def order(generator):
        return torch.cat([batch.actions[0] for batch in buffer.minibatches(4, generator)]).tolist()

    generator = torch.Generator().manual_seed(0)
    first, second = order(generator), order(generator)
    assert first != second
    assert order(torch.Generator().manual_seed(0)) == first


def test_storage_keeps_the_observations_types_and_is_reused():
    buffer = SequenceBuffer(3, 2, feature_dtype=torch.float16)
    fill_with_identifiable_data(buffer)
    assert buffer["obs/image"].dtype == torch.uint8
    assert buffer["frozen/base"].dtype == torch.float16
    assert next(buffer.minibatches(1)).frozen["base"].dtype == torch.float32
    place, size = buffer["obs/image"].data_ptr(), buffer.num_bytes
    fill_with_identifiable_data(buffer)
    assert buffer["obs/image"].data_ptr() == place
    assert buffer.num_bytes == size


def test_a_rollout_without_expert_does_not_show_the_last_ones_labels():
    buffer = SequenceBuffer(1, 2)
    fill_with_identifiable_data(buffer)
    assert buffer.has_expert_actions
    buffer.start(torch.zeros(2, 1))
    assert not buffer.has_expert_actions
    nothing = torch.zeros(2)
    buffer.add({"x": nothing}, nothing.long(), nothing, nothing > 0, nothing, nothing)
    buffer.finish(nothing, nothing > 0, 0.9, 0.8)
    (batch,) = buffer.minibatches(1)
    assert batch.expert_actions is None and batch.expert_turns is None


def test_misuse_is_refused_with_what_to_do():
    buffer = SequenceBuffer(2, 3)
    buffer.start(torch.zeros(3, 1))
    with pytest.raises(RuntimeError, match="holds 0 of its 2 steps"):
        buffer.finish(torch.zeros(3), torch.zeros(3, dtype=torch.bool), 0.9, 0.9)
    fill_with_identifiable_data(buffer)
    with pytest.raises(
        ValueError, match="num_minibatches 4 must lie between 1 and the number of environments, 3"
    ):
        next(buffer.minibatches(4))
    with pytest.raises(RuntimeError, match="already holds all of its 2 steps"):
        buffer.add({}, torch.zeros(3), *[torch.zeros(3)] * 4)


def test_numpy_and_tensor_environments_give_the_same_steps():
    def steps(expose_torch):
        env = LineVecEnv(LineWorld(num_envs=5, max_steps=4, seed=3), expose_torch)
        stepper = tensor_envs(env, torch.device("cpu"))[0]
        generator = torch.Generator().manual_seed(0)
        return [stepper.step(torch.randint(0, 4, (5,), generator=generator)) for _ in range(20)]

    truncations = 0
    for fast, plain in zip(steps(True), steps(False), strict=True):
        for key in fast.observations:
            assert torch.equal(fast.observations[key], plain.observations[key])
        assert torch.equal(fast.rewards, plain.rewards)
        assert torch.equal(fast.dones, plain.dones)
        assert torch.equal(fast.truncated, plain.truncated)
        assert [episode["r"] for episode in fast.episodes] == [episode["r"] for episode in plain.episodes]
        assert (fast.final_observations is None) == (plain.final_observations is None)
        if fast.final_observations is not None:
            truncations += 1
            for key in fast.final_observations:
                assert torch.equal(fast.final_observations[key], plain.final_observations[key])
    assert truncations > 0


@pytest.mark.parametrize("output", ["torch", "numpy"])
def test_a_batched_environments_expert_is_asked_once_for_all(output):
    world = LineWorld(num_envs=5, seed=3)
    world.output = output
    stepper = tensor_envs(LineVecEnv(world), torch.device("cpu"))[0]
    advice = stepper.expert_advice()
    assert advice.actions.tolist() == world.expert_actions().tolist()
    assert advice.turns is None
