"""Faster ways to compute: what they change, what they leave as it is, and what a device lacks."""

import pytest
import torch
from learning_world import LineVecEnv, LineWorld
from stable_baselines3.common.callbacks import BaseCallback

from envs.expert import Advice
from navagent.learning.auxiliary import AuxiliaryConfig
from navagent.learning.fast_paths import FastPaths
from navagent.learning.imitation import ImitationConfig
from navagent.learning.ppo import PPO
from policies.actor_critic import NavigationPolicy

CPU = torch.device("cpu")


class PairVecEnv(LineVecEnv):
    """Two worlds, as Stable-Baselines3 sees them one after the other."""

    def __init__(self, worlds):
        super().__init__(worlds[0])
        self.worlds = self.vector_envs = tuple(worlds)
        self.num_envs = sum(world.num_envs for world in worlds)

    def reset(self):
        parts = [LineVecEnv(world).reset() for world in self.worlds]
        return {key: torch.cat([torch.as_tensor(part[key]) for part in parts]).numpy() for key in parts[0]}


def agent(env, **settings):
    policy = {"encoder": "fcn4", "weights": "random", "adaptation": "scratch", "hidden_size": 16}
    return PPO(
        NavigationPolicy,
        env,
        **{"n_steps": 8, "n_minibatches": 2, "seed": 0, "device": "cpu", "policy_kwargs": policy} | settings,
    )


def worlds(seed=3):
    return [LineWorld(num_envs=2, seed=seed), LineWorld(num_envs=4, seed=seed + 1)]


def test_overlapping_groups_store_what_each_world_and_the_policy_answered():
    model = agent(PairVecEnv(worlds()))
    model.learn(8 * 6)
    buffer = model.rollout_buffer
    # The worlds once more, one at a time, by the actions that were stored.
    for world, rows in zip(worlds(), (slice(0, 2), slice(2, 6)), strict=True):
        observations = {key: torch.as_tensor(value) for key, value in LineVecEnv(world).reset().items()}
        dones = torch.ones(world.num_envs, dtype=torch.bool)
        for step in range(8):
            for key, value in observations.items():
                assert torch.equal(buffer[f"obs/{key}"][step, rows], value)
            assert torch.equal(buffer["episode_starts"][step, rows], dones)
            observations, rewards, terminated, truncated, _ = world.step(buffer["actions"][step, rows])
            dones = terminated | truncated
            kept = ~(truncated & ~terminated)
            assert torch.equal(buffer["rewards"][step, rows][kept], rewards.float()[kept])


def test_what_overlapping_groups_stored_of_the_policy_is_what_it_says_of_whole_sequences():
    model = agent(PairVecEnv(worlds()), learning_rate=0.0, n_epochs=1, n_minibatches=1)
    model.learn(8 * 6)
    batch = next(model.rollout_buffer.minibatches(1))
    with torch.no_grad():
        values, log_probs, _, _ = model.policy.evaluate_sequences(
            batch.observations, batch.actions, batch.memory, batch.episode_starts
        )
    torch.testing.assert_close(values, batch.values, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_probs, batch.log_probs, rtol=0, atol=1e-5)


class TellingWorld(LineWorld):
    """Its expert tells how far it is to the goal, too."""

    def expert_advice(self):
        return Advice(self.expert_actions(), self.offset.to(torch.int16))


def test_overlapping_groups_store_what_each_worlds_expert_says():
    pair = [TellingWorld(num_envs=2, seed=3), TellingWorld(num_envs=4, seed=4)]
    lesson = {"imitation": ImitationConfig(frames=96), "auxiliary": AuxiliaryConfig(heading_coef=1.0)}
    model = agent(PairVecEnv(pair), **lesson)
    model.learn(8 * 6)
    offset = model.rollout_buffer["obs/offset"][..., 0]
    assert torch.equal(model.rollout_buffer["expert_turns"].float(), offset)
    assert torch.equal(model.rollout_buffer["expert_actions"], torch.sign(offset).long() % 3)
    with pytest.raises(ValueError, match="heading_coef learns the turns that an expert plans"):
        agent(PairVecEnv(worlds()), **lesson).learn(8 * 6)


class StopsIn(BaseCallback):
    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def _on_step(self):
        self.left -= 1
        return self.left > 0


def test_a_training_stopped_between_groups_goes_on_where_its_worlds_are():
    pair = worlds()
    model = agent(PairVecEnv(pair))
    model.learn(8 * 6, callback=StopsIn(3))
    here = [world.observations() for world in pair]
    for key, value in model._last_obs.items():
        assert torch.equal(value, torch.cat([part[key] for part in here]))


def test_an_error_in_one_groups_world_ends_the_training_as_it_is():
    pair = worlds()

    def broken(actions):
        raise RuntimeError("the scene is gone")

    pair[1].step = broken
    with pytest.raises(RuntimeError, match="the scene is gone"):
        agent(PairVecEnv(pair)).learn(8 * 6)
    assert torch.get_num_threads() >= 1


def test_cores_are_shared_while_groups_overlap_and_given_back():
    seen = []

    class Watch(BaseCallback):
        def _on_step(self):
            seen.append(torch.get_num_threads())
            return True

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        agent(PairVecEnv(worlds())).learn(8 * 6, callback=Watch())
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_bfloat16_acts_and_learns_nearly_alike_and_keeps_what_is_stored_in_float32():
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no bfloat16 instructions")
    plain = agent(LineVecEnv(LineWorld(4, seed=0)))
    fast = agent(LineVecEnv(LineWorld(4, seed=0)), fast_paths=FastPaths(precision=torch.bfloat16))
    for model in (plain, fast):
        model._setup_learn(64)
    assert fast._memory.dtype == torch.float32
    obs, memory, starts = plain._last_obs, plain._memory, plain._last_episode_starts
    with torch.no_grad():
        exact = plain.policy.act(obs, memory, starts, deterministic=True)
        with fast.fast_paths.autocast(CPU):
            rounded = fast.policy.act(obs, memory, starts, deterministic=True)
    assert [answer.dtype for answer in rounded[1:4]] == [torch.float32] * 3
    assert not torch.equal(exact[3], rounded[3])
    torch.testing.assert_close(exact[1], rounded[1], rtol=0.05, atol=0.05)
    fast.learn(64)
    assert all(p.dtype == torch.float32 for p in fast.policy.parameters())
    assert all(bool(p.isfinite().all()) for p in fast.policy.parameters())


def test_layout_changes_nothing_but_rounding():
    plain = agent(LineVecEnv(LineWorld(4, seed=0)))
    fast = agent(LineVecEnv(LineWorld(4, seed=0)), fast_paths=FastPaths(channels_last=True))
    plain.learn(32)
    batch = next(plain.rollout_buffer.minibatches(1))
    fast.policy.load_state_dict(plain.policy.state_dict())
    gradients = []
    for model in (plain, fast):
        model.policy.zero_grad()
        values, log_probs, _, _ = model.policy.evaluate_sequences(
            batch.observations, batch.actions, batch.memory, batch.episode_starts
        )
        (values.mean() + log_probs.mean()).backward()
        gradients.append([p.grad for p in model.policy.parameters() if p.grad is not None])
    strides = [p.stride() for p in fast.policy.parameters() if p.dim() == 4]
    assert strides != [p.stride() for p in plain.policy.parameters() if p.dim() == 4]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_a_cpu_says_what_it_lacks_and_goes_on_without(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no compiler")))
    wished = FastPaths(torch.bfloat16, channels_last=True, compile="reduce-overhead", tf32=True)
    found, messages = wished.available(CPU)
    assert found == FastPaths(channels_last=True)
    told = "\n".join(messages)
    for word in (
        "bfloat16 needs a CPU with",
        "tf32 needs",
        "reduce-overhead makes CUDA graphs",
        "no compiler",
    ):
        assert word in told


def test_what_a_device_has_is_kept_without_a_word():
    assert FastPaths(channels_last=True).available(CPU) == (FastPaths(channels_last=True), [])


@pytest.mark.parametrize("wrong", [{"precision": torch.float16}, {"compile": "fast"}])
def test_unknown_wishes_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FastPaths(**wrong)
