"""What PPO can be told beside what Stable-Baselines3's can: each option alone, and all of them resumed."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from learning_world import LineVecEnv, LineWorld, MemorylessPolicy, RecurrentPolicy
from stable_baselines3.common.callbacks import BaseCallback

from navagent.learning.auxiliary import AuxiliaryConfig
from navagent.learning.imitation import ImitationConfig
from navagent.learning.lamb import Lamb
from navagent.learning.ppo import PPO
from navagent.learning.schedules import Decay, LearningRate
from navagent.memory_estimate import Shape, footprint, need
from navagent.runs import pack, read_checkpoint, unpack
from policies.actor_critic import NavigationPolicy

SMALL_POLICY = {
    "encoder": "fcn5_small",
    "weights": "random",
    "image_features": 8,
    "memory": "gru",
    "hidden_size": 8,
    "adaptation": "sidetune",
}


class PictureWorld(LineWorld):
    """The line with images large enough for an encoder; an agent sees how far its goal is."""

    def __init__(self, **settings):
        super().__init__(**settings)
        space = dict(self.single_observation_space.spaces)
        self.single_observation_space = spaces.Dict(
            {**space, "image": spaces.Box(0, 255, (16, 16, 3), np.uint8)}
        )

    def observations(self):
        shade = (self.offset * 30 + 128).to(torch.uint8)
        return {**super().observations(), "image": shade[:, None, None, None].expand(-1, 16, 16, 3).clone()}


class BrokenWorld(LineWorld):
    """The line, where from one step to another the first agent's offset or reward is not a number."""

    def __init__(self, what="offset", first=10, last=10, **settings):
        super().__init__(**settings)
        self.what, self.first, self.last = what, first, last

    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        if self.first <= self.clock <= self.last:
            if self.what == "reward":
                rewards = rewards.clone()
                rewards[0] = float("inf")
            else:
                observations["offset"][0, 1] = float("nan")
        return observations, rewards, *rest


def make(policy=RecurrentPolicy, world=None, seed=0, **settings):
    env = LineVecEnv(world or LineWorld(num_envs=4, max_steps=5))
    defaults = {"n_steps": 8, "n_minibatches": 2, "n_epochs": 2, "device": "cpu"}
    return PPO(policy, env, seed=seed, **{**defaults, **settings})


def make_seeing(**settings):
    kwargs = {**SMALL_POLICY, **settings.pop("policy_kwargs", {})}
    return make(NavigationPolicy, PictureWorld(num_envs=4, max_steps=5), policy_kwargs=kwargs, **settings)


def logged(model):
    """What the newest update told the logger."""
    return dict(model.logger.name_to_value)


def trained(model, frames):
    model.learn(frames, log_interval=0)
    return model


def vector(model):
    return torch.cat([value.detach().flatten() for value in model.policy.parameters()])


# Clipping


def test_the_clipped_value_loss_is_that_of_ppo2():
    model = trained(make(clip_value_loss=True, clip_range=0.1, n_minibatches=1), 32)
    batch = next(model.rollout_buffer.minibatches(1))
    values = batch.values + torch.randn(batch.values.shape, generator=torch.Generator().manual_seed(0))
    expected = []
    for new, old, target in zip(
        values.flatten().tolist(),
        batch.values.flatten().tolist(),
        batch.returns.flatten().tolist(),
        strict=True,
    ):
        moved = old + min(max(new - old, -0.1), 0.1)
        expected.append(max((new - target) ** 2, (moved - target) ** 2))
    loss = model._value_loss(values, batch, 0.1)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("clip_range_vf", [None, 0.3])
def test_an_update_with_the_clipped_value_loss_is_cleanrls(clip_range_vf):
    settings = {"n_minibatches": 1, "n_epochs": 3, "learning_rate": 1e-2, "ent_coef": 0.02, "vf_coef": 0.4}
    model = make(MemorylessPolicy, clip_value_loss=True, clip_range_vf=clip_range_vf, **settings)
    reference = make(MemorylessPolicy, **settings)
    torch.manual_seed(0)
    model.learn(32)
    torch.manual_seed(0)
    reference._setup_learn(32)
    silent = _Silent()
    silent.init_callback(reference)
    reference.collect_rollouts(reference.env, silent, reference.rollout_buffer, 8)
    batch, policy = next(reference.rollout_buffer.minibatches(1)), reference.policy
    limit = 0.2 if clip_range_vf is None else clip_range_vf
    for _ in range(3):
        # As cleanrl/ppo.py has it, with the mean square instead of half of it.
        newvalue, newlogprob, entropy, _ = policy.evaluate_sequences(
            batch.observations, batch.actions, batch.memory, batch.episode_starts
        )
        ratio = (newlogprob - batch.log_probs).exp()
        advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
        pg_loss = torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2)).mean()
        v_loss_unclipped = (newvalue - batch.returns) ** 2
        v_clipped = batch.values + torch.clamp(newvalue - batch.values, -limit, limit)
        v_loss = torch.max(v_loss_unclipped, (v_clipped - batch.returns) ** 2).mean()
        loss = pg_loss - 0.02 * entropy.mean() + v_loss * 0.4
        policy.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        policy.optimizer.param_groups[0]["lr"] = 1e-2
        policy.optimizer.step()
    for one, other in zip(model.policy.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


class _Silent(BaseCallback):
    def _on_step(self):
        return True


def test_clip_ranges_follow_their_schedules():
    model = make(clip_range=Decay(0.2, "linear"), clip_range_vf=Decay(0.4, "cosine"))
    seen = []

    class Watch(_Silent):
        def on_update_end(self):
            seen.append(logged(self.model)["train/clip_range"])
            return True

    model.learn(128, callback=Watch(), log_interval=0)
    assert seen == pytest.approx([0.15, 0.1, 0.05, 0.0])
    assert model.clip_range_vf(0.5) == pytest.approx(0.2)
    batch = next(model.rollout_buffer.minibatches(1))
    model._current_progress_remaining = 0.5
    loss = model._value_loss(batch.values + 5.0, batch, 0.1)
    torch.testing.assert_close(loss, (batch.values + 0.2 - batch.returns).square().mean())


def test_a_learning_rate_climbs_before_it_falls():
    rate = LearningRate(1.0, "linear", warmup=0.2)
    assert [rate(1 - done) for done in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.5, 0.75, 1.0, 0.5, 0.0])
    assert LearningRate(1.0, "cosine", 0.01, 0.5)(0.25) == pytest.approx(0.01 + 0.99 * 0.5)
    with pytest.raises(ValueError, match=r"warmup 1\.0 must be at least 0 and less than 1"):
        LearningRate(1.0, warmup=1.0)


# Normalised returns


def test_rewards_are_divided_by_what_was_known_when_the_rollout_began():
    plain, normalised = (
        make(n_epochs=1, learning_rate=1e-9),
        make(n_epochs=1, learning_rate=1e-9, normalize_returns=True),
    )
    deviations = []

    class Watch(_Silent):
        def _on_rollout_start(self):
            _, _, m2 = moments = self.model.normaliser.moments.clone()
            deviations.append((m2 / moments[0]).sqrt().item())

    rewards = {}
    for model in (plain, normalised):
        torch.manual_seed(0)
        model.learn(96, callback=Watch() if model is normalised else None)
        # Without what an episode cut short was still worth.
        buffer = model.rollout_buffer
        ends = torch.cat((buffer["episode_starts"][1:], model._last_episode_starts[None]))
        rewards[model] = buffer["rewards"][~ends]
    assert deviations[0] == 1
    assert abs(deviations[2] - 1) > 0.05
    torch.testing.assert_close(rewards[normalised] * deviations[2], rewards[plain], rtol=1e-5, atol=1e-6)


def test_saved_statistics_of_returns_are_loaded(tmp_path):
    model = trained(make(normalize_returns=True), 64)
    model.save(tmp_path / "model")
    assert "normaliser" in model.get_parameters()
    loaded = PPO.load(tmp_path / "model", env=LineVecEnv(LineWorld()), device="cpu")
    assert torch.equal(loaded.normaliser.moments, model.normaliser.moments)
    assert model.normaliser.moments[0] == pytest.approx(64, abs=1e-3)


# Replay


def test_every_update_has_its_epochs_in_random_order():
    orders = []

    def watched(self):
        orders.append([])
        for window, kind in PPO._epochs(self):
            orders[-1].append(kind)
            yield window, kind

    model = make(n_epochs=2, replay_epochs=3, replay_steps=16)
    model._epochs = lambda: watched(model)
    model.learn(8 * 32)
    assert all(sorted(order) == ["replay/"] * 3 + ["train/"] * 2 for order in orders)
    assert len({tuple(order) for order in orders}) > 2
    assert model._n_updates == 8 * 5


def test_before_the_policy_moved_the_newest_window_is_the_rollout():
    model = make(replay_epochs=1, replay_steps=30, n_epochs=1, learning_rate=1e-2)
    model.learn(32 * 5)
    callback = _Silent()
    callback.init_callback(model)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 8)
    rollout = model.rollout_buffer
    assert rollout["episode_starts"][1:].any()
    window = model.replay.newest(model.policy, model.gamma, model.gae_lambda, 2)
    for name in ("actions", "rewards", "log_probs", "episode_starts", "obs/offset", "frozen/image"):
        assert torch.equal(window[name], rollout[name]), name
    torch.testing.assert_close(window["values"], rollout["values"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(window.advantages, rollout.advantages, atol=1e-5, rtol=1e-5)
    assert torch.equal(window.memory, rollout.memory)


def test_past_windows_are_further_from_the_policy_and_logged_apart():
    model = trained(make(replay_epochs=4, replay_steps=64, n_epochs=1, learning_rate=0.02), 32 * 10)
    log = logged(model)
    assert log["replay/approx_kl"] > log["train/approx_kl"] > 0
    assert {"replay/loss", "replay/policy_loss", "replay/grad_norm"} <= log.keys()


def test_a_divergence_of_past_windows_ends_no_update():
    settings = {"replay_epochs": 6, "replay_steps": 64, "learning_rate": 0.02, "n_epochs": 1}
    model = trained(make(**settings), 32 * 10)
    limit = logged(model)["replay/approx_kl"] / 3
    held = trained(make(**settings, target_kl=limit), 32 * 10)
    assert held._n_updates > 6 * 10 / 2
    assert logged(held).get("replay/approx_kl", 1.0) > 1.5 * limit


def test_what_an_expert_did_is_never_replayed():
    imitation = ImitationConfig(frames=96)
    model = trained(make(replay_epochs=2, replay_steps=64, imitation=imitation), 96)
    assert model.replay.filled == 0
    assert model._n_updates == 3 * 2
    trained(model, 160)
    assert model.replay.filled == 16


def test_learns_from_replay():
    world = LineWorld(num_envs=32, max_steps=8, span=2)
    model = make(world=world, replay_epochs=2, replay_steps=32, learning_rate=6e-3, gamma=0.9)
    model.learn(4000)
    assert sum(episode["success"] for episode in model.recent_episodes) >= 90


def test_the_memory_of_replay_is_counted_before_it_is_taken():
    model = make_seeing(replay_epochs=1, replay_steps=20, feature_dtype=torch.float16)
    policy = footprint(model)
    counted = need(policy, Shape(4, 8, 2, 2, 20))
    without = need(policy, Shape(4, 8, 2, 2))
    trained(model, 32 * 3)
    ring = model.replay.num_bytes - model.replay.window.num_bytes
    assert counted.replay == ring + 2 * counted.rollout
    assert counted.saving - without.saving == 2 * ring
    assert counted.device - without.device == counted.replay
    assert without.replay == 0


def test_replay_of_a_wrong_size_is_refused():
    with pytest.raises(ValueError, match="replay_epochs 3 and replay_steps 0: expected both"):
        make(replay_epochs=3)
    with pytest.raises(ValueError, match="replay_steps 9 must be at least two more than n_steps, 8"):
        make(replay_epochs=3, replay_steps=9)


# Auxiliary losses

BOTH = AuxiliaryConfig(cpc_coef=0.1, inverse_dynamics_coef=0.2, negatives=5)


def test_auxiliary_losses_train_their_networks_and_what_the_images_become():
    model = make_seeing(auxiliary=BOTH, policy_kwargs={"weight_decay": 0.01})
    before = {name: value.clone() for name, value in model.auxiliary.state_dict().items()}
    trained(model, 32)
    assert all(not torch.equal(value, before[name]) for name, value in model.auxiliary.state_dict().items())
    log = logged(model)
    assert {"auxiliary/cpc_loss", "auxiliary/inverse_dynamics_loss"} <= log.keys()
    batch = next(model.rollout_buffer.minibatches(1))
    (_, _, _, _), loss, _ = model._evaluate(batch)
    model.policy.zero_grad()
    loss.backward()
    side = [p for p in model.policy.features_extractor.adaptations.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in side)
    assert model.policy.memory.rnn.weight_hh_l0.grad.abs().sum() > 0
    assert model.policy.action_net.weight.grad is None


def test_auxiliary_networks_join_the_optimiser_and_leave_the_policy_as_it_is():
    plain, helped = (
        make_seeing(auxiliary=each, policy_kwargs={"weight_decay": 0.03}) for each in (None, BOTH)
    )
    assert plain.policy.state_dict().keys() == helped.policy.state_dict().keys()
    assert torch.equal(vector(plain), vector(helped))
    groups = helped.policy.optimizer.param_groups
    assert len(groups) == len(plain.policy.optimizer.param_groups) + 1
    assert groups[-1]["weight_decay"] == 0.03
    assert {id(p) for p in groups[-1]["params"]} == {id(p) for p in helped.auxiliary.parameters()}
    alphas = [group for group in groups if any(p.dim() == 0 for p in group["params"])]
    assert alphas
    assert all(group["weight_decay"] == 0 for group in alphas)


def test_the_policy_says_the_same_with_and_without_auxiliary_losses():
    model = trained(make_seeing(auxiliary=BOTH), 32)
    batch = next(model.rollout_buffer.minibatches(1))
    evaluation, _, _ = model._evaluate(batch)
    plain = model.policy.evaluate_sequences(
        batch.observations, batch.actions, batch.memory, batch.episode_starts, batch.frozen
    )
    assert all(torch.equal(one, other) for one, other in zip(evaluation, plain, strict=True))


def test_auxiliary_networks_are_saved_and_loaded(tmp_path):
    model = trained(make_seeing(auxiliary=BOTH), 32)
    assert set(model.get_parameters()) == {"policy", "policy.optimizer", "auxiliary"}
    model.save(tmp_path / "model")
    env = LineVecEnv(PictureWorld(num_envs=4))
    loaded = PPO.load(tmp_path / "model", env=env, device="cpu")
    for name, value in model.auxiliary.state_dict().items():
        assert torch.equal(value, loaded.auxiliary.state_dict()[name])
    trained(loaded, 32)


def test_policies_that_cannot_help_are_refused():
    with pytest.raises(TypeError, match="policy RecurrentPolicy lacks sequence_dims"):
        make(auxiliary=BOTH)
    with pytest.raises(ValueError, match="this policy sees none"):
        make_seeing(auxiliary=BOTH, policy_kwargs={"adaptation": "blind"})


# Lamb


def test_lamb_trains_the_policy_in_its_groups():
    kwargs = {
        "optimizer_class": Lamb,
        "optimizer_kwargs": {"eps": 1e-5, "min_trust": 0.02},
        "weight_decay": 0.01,
    }
    model = make_seeing(policy_kwargs=kwargs, learning_rate=1e-2)
    before = vector(model).clone()
    trained(model, 64)
    groups = model.policy.optimizer.param_groups
    assert all(group["min_trust"] == 0.02 for group in groups)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}
    assert not torch.equal(before, vector(model))


# Numbers that are not finite


@pytest.mark.parametrize(("what", "named"), [("offset", "'offset'"), ("reward", "'reward'")])
def test_an_observation_that_is_not_finite_stops_the_training_and_is_kept(what, named, tmp_path):
    model = make(world=BrokenWorld(what, max_steps=5))
    model.guard.folder = tmp_path
    with pytest.raises(
        FloatingPointError, match=f"{named} of agents 0 holds numbers that are not finite"
    ) as e:
        model.learn(200)
    file = tmp_path / "nonfinite-000000000036.safetensors"
    assert str(file) in str(e.value)
    saved = read_checkpoint(file)["observations"]
    assert saved["offset"].isnan().sum() == (what == "offset")
    assert saved["reward"].isinf().sum() == (what == "reward")
    assert vector(model).isfinite().all()


@pytest.mark.parametrize("what", ["offset", "reward"])
def test_observations_that_are_not_finite_are_taken_for_zero_and_counted(what):
    model = trained(make(world=BrokenWorld(what, 10, 12), nonfinite="skip"), 200)
    assert model.guard.replaced_observations == 3
    assert model.rollout_buffer["obs/offset"].isfinite().all()
    assert vector(model).isfinite().all()
    model.dump_logs()
    assert model.guard.state_dict() == {"skipped_minibatches": 0, "replaced_observations": 3}


def test_finite_numbers_pass_untouched_even_if_their_sum_is_not():
    model = make()
    numbers = {"depth": torch.full((4, 3), 3e38), "image": torch.zeros(4, 2, dtype=torch.uint8)}
    assert model.guard.observations(numbers, 0) is numbers
    numbers["depth"][2, 1] = float("-inf")
    with pytest.raises(FloatingPointError, match="'depth' of agents 2 holds"):
        model.guard.observations(numbers, 0)


def test_the_batch_of_a_loss_that_is_not_finite_is_kept_with_what_made_it(tmp_path):
    model = trained(make(n_minibatches=1), 32)
    model.guard.folder = tmp_path
    before = {name: value.clone() for name, value in model.policy.named_parameters()}
    model.rollout_buffer.returns[3, 2] = float("inf")
    with pytest.raises(FloatingPointError, match=r"loss or its gradient is not finite.*what it was is in"):
        model.train()
    saved = read_checkpoint(tmp_path / "nonfinite-000000000032.safetensors")
    assert saved["losses"]["train/value_loss"] == float("inf")
    assert saved["losses"]["train/loss"] == float("inf")
    batch = next(model.rollout_buffer.minibatches(1))
    assert saved["batch"]["returns"][3, 2] == float("inf")
    assert torch.equal(saved["batch"]["actions"], batch.actions)
    assert torch.equal(saved["batch"]["observations"]["image"], batch.observations["image"])
    assert torch.equal(saved["batch"]["frozen"]["image"], batch.frozen["image"])
    assert "base.weight" not in saved["policy"]
    for name, value in saved["policy"].items():
        assert torch.equal(value, before[name])


def test_a_disk_that_is_full_does_not_hide_the_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("navagent.learning.nonfinite.write_checkpoint", full)
    model = make(world=BrokenWorld(max_steps=5))
    model.guard.folder = tmp_path
    with pytest.raises(FloatingPointError, match=r"could not be saved \(No space left on device\)"):
        model.learn(200)


def test_minibatches_that_are_not_finite_are_skipped_and_counted():
    model = trained(make(n_minibatches=4, n_epochs=3, nonfinite="skip"), 32)
    steps = {int(state["step"]) for state in model.policy.optimizer.state.values()}
    model.rollout_buffer.returns[0, 0] = float("nan")
    model.train()
    assert model.guard.skipped_minibatches == 3
    after = {int(state["step"]) for state in model.policy.optimizer.state.values()}
    assert after == {step + 9 for step in steps}
    assert vector(model).isfinite().all()
    assert np.isfinite(logged(model)["train/loss"])


def test_gradients_that_are_not_finite_are_skipped_and_counted(monkeypatch):
    model = trained(make(nonfinite="skip"), 32)
    before = vector(model).clone()
    evaluate, calls = model.policy.evaluate_sequences, []

    def edgy(*arguments):
        values, *rest = evaluate(*arguments)
        calls.append(None)
        # The square root of 0 is finite, its derivative is not.
        return (values + (values * 0).sqrt() if len(calls) == 2 else values, *rest)

    monkeypatch.setattr(model.policy, "evaluate_sequences", edgy)
    model.train()
    assert model.guard.skipped_minibatches == 1
    assert vector(model).isfinite().all()
    assert not torch.equal(before, vector(model))


def test_an_update_of_which_nothing_is_left_is_an_error():
    model = trained(make(nonfinite="skip"), 32)
    before = vector(model).clone()
    model.rollout_buffer.returns.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="all would be skipped for ever"):
        model.train()
    assert torch.equal(before, vector(model))


def test_another_choice_is_refused():
    with pytest.raises(ValueError, match="nonfinite 'ignore' is not one of stop, skip"):
        make(nonfinite="ignore")


# Resuming


def test_with_every_option_a_resumed_training_is_the_uninterrupted_one():
    def fresh():
        return make_seeing(
            clip_value_loss=True,
            clip_range=Decay(0.2, "linear"),
            normalize_returns=True,
            replay_epochs=2,
            replay_steps=20,
            auxiliary=BOTH,
            nonfinite="skip",
            policy_kwargs={"optimizer_class": Lamb, "weight_decay": 0.01},
        )

    straight = fresh()
    states = []

    class Watch(_Silent):
        def on_update_end(self):
            states.append(pack(self.model.training_state()))
            return True

    straight.learn(32 * 6, callback=Watch())
    for updates in (1, 4):
        resumed = fresh()
        resumed.load_training_state(unpack(*states[updates - 1]))
        resumed.learn(32 * (6 - updates), reset_num_timesteps=False)
        assert torch.equal(vector(resumed), vector(straight))
        one, other = pack(resumed.training_state()), states[-1]
        assert one.tensors.keys() == other.tensors.keys()
        for name, value in one.tensors.items():
            assert torch.equal(value, other.tensors[name]), name
