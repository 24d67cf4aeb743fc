import math

import pytest
import stable_baselines3
import torch
from learning_world import LineVecEnv, LineWorld, MemorylessPolicy, RecurrentPolicy
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.policies import MultiInputActorCriticPolicy

from navagent.learning.imitation import ImitationConfig
from navagent.learning.ppo import PPO
from navagent.learning.schedules import LearningRate, PathLengthCurriculum


def make(policy=RecurrentPolicy, num_envs=4, seed=0, max_steps=12, expose_torch=True, **settings):
    env = LineVecEnv(LineWorld(num_envs=num_envs, max_steps=max_steps), expose_torch)
    defaults = {"n_steps": 8, "n_minibatches": 2, "n_epochs": 2, "device": "cpu"}
    return PPO(policy, env, seed=seed, **{**defaults, **settings})


def parameters(model):
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


@pytest.mark.parametrize("expose_torch", [True, False], ids=["tensors", "numpy"])
@pytest.mark.parametrize("options", [{}, {"clip_range_vf": 0.1}, {"normalize_advantage": False}])
def test_without_memory_training_equals_stable_baselines3(expose_torch, options):
    shared = {
        "n_steps": 16,
        "n_epochs": 3,
        "learning_rate": 1e-3,
        "gamma": 0.95,
        "gae_lambda": 0.9,
        "ent_coef": 0.01,
        "vf_coef": 0.4,
        "max_grad_norm": 0.3,
        **options,
    }
    ours = make(MemorylessPolicy, max_steps=5, expose_torch=expose_torch, n_minibatches=1, **{**shared})
    env = LineVecEnv(LineWorld(num_envs=4, max_steps=5))
    theirs = stable_baselines3.PPO(MemorylessPolicy, env, batch_size=64, seed=0, device="cpu", **shared)
    for one, other in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    for model in (ours, theirs):
        torch.manual_seed(1)
        model.learn(3 * 64)
    # The same rollouts, episodes cut short included: this also holds the bootstrapping against theirs, which
    # have environments before steps.
    returns = torch.from_numpy(theirs.rollout_buffer.returns).view(4, 16).T
    torch.testing.assert_close(ours.rollout_buffer.returns, returns, atol=1e-5, rtol=1e-5)
    for one, other in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_sequences_are_evaluated_as_they_were_lived():
    model = make(n_steps=16, max_steps=5)
    model.learn(3 * 64)
    buffer = model.rollout_buffer
    before = buffer["log_probs"].clone()
    # A rollout collected by the present policy, before any update of it.
    model.collect_rollouts(model.env, _silent(model), buffer, 16)
    assert not torch.equal(before, buffer["log_probs"])
    for batch in buffer.minibatches(2, model.generator):
        values, log_probs, _, _ = model.policy.evaluate_sequences(
            batch.observations, batch.actions, batch.memory, batch.episode_starts, batch.frozen
        )
        torch.testing.assert_close(log_probs, batch.log_probs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, batch.values, atol=1e-5, rtol=1e-5)


def _silent(model):
    class Silent(BaseCallback):
        def _on_step(self):
            return True

    callback = Silent()
    callback.init_callback(model)
    return callback


def test_the_update_never_runs_the_frozen_base():
    model = make()
    model.learn(32)
    calls = model.policy.base_calls
    model.train()
    assert model.policy.base_calls == calls
    frozen = model.policy.base.weight.clone()
    model.learn(64)
    assert torch.equal(model.policy.base.weight, frozen)


def test_storing_features_in_half_precision_hardly_changes_the_values():
    model = make(feature_dtype=torch.float16)
    model.learn(32)
    assert model.rollout_buffer["frozen/image"].dtype == torch.float16
    stored = next(model.rollout_buffer.minibatches(1)).frozen["image"]
    again = model.policy._frozen({"image": model.rollout_buffer["obs/image"]})
    torch.testing.assert_close(stored, again, atol=1e-3, rtol=1e-3)


def test_learns_to_walk_to_the_goal_and_stop():
    model = make(
        num_envs=32,
        n_steps=16,
        n_epochs=4,
        learning_rate=LearningRate(3e-3, "linear"),
        gamma=0.95,
        ent_coef=0.01,
    )
    model.learn(16_000)
    assert len(model.recent_episodes) == 100
    assert sum(episode["success"] for episode in model.recent_episodes) / 100 >= 0.9


def test_same_seed_same_training_other_seed_another():
    def run(seed):
        model = make(seed=seed)
        model.learn(128)
        return torch.cat([value.flatten().float() for value in parameters(model).values()])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_save_and_load_give_the_same_policy_and_train_on(tmp_path):
    model = make()
    model.learn(64)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=LineVecEnv(LineWorld()), device="cpu")
    for name, value in parameters(model).items():
        assert torch.equal(value, loaded.policy.state_dict()[name])
    assert loaded.num_timesteps == 64
    assert loaded.n_minibatches == 2
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded.num_timesteps == 128
    assert set(model.get_parameters()) == {"policy", "policy.optimizer"}


def test_callbacks_see_every_step_and_can_stop(tmp_path):
    class Watch(BaseCallback):
        updates = 0

        def _on_step(self):
            assert self.locals["rewards"].shape == (4,)
            return self.n_calls < 20

        def on_update_end(self):
            self.updates += 1
            return True

    watch = Watch()
    model = make()
    model.learn(1000, callback=[watch, CheckpointCallback(8, str(tmp_path))])
    assert watch.n_calls == 20
    assert watch.updates == 2
    assert model.num_timesteps == 80
    assert len(list(tmp_path.glob("*.zip"))) == 2


def test_an_update_callback_can_end_the_training():
    class Once(BaseCallback):
        def _on_step(self):
            return True

        def on_update_end(self):
            return False

    model = make()
    model.learn(1000, callback=Once())
    assert model.num_timesteps == 32


def test_a_loss_that_is_not_finite_is_an_error_and_changes_nothing():
    model = make()
    model.learn(32)
    before = parameters(model)
    model.rollout_buffer.returns[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"not finite after 32 frames .*train/value_loss nan"):
        # One minibatch holds the bad number for certain.
        model.n_minibatches = 1
        model.train()
    for name, value in parameters(model).items():
        assert torch.equal(value, before[name])


def test_a_gradient_that_is_not_finite_is_an_error_and_changes_nothing(monkeypatch):
    model = make()
    model.learn(32)
    before = parameters(model)
    evaluate = model.policy.evaluate_sequences

    def edgy(*arguments):
        values, *rest = evaluate(*arguments)
        # The square root of 0 is finite, its derivative is not.
        return (values + (values * 0).sqrt(), *rest)

    monkeypatch.setattr(model.policy, "evaluate_sequences", edgy)
    with pytest.raises(FloatingPointError, match="train/grad_norm nan"):
        model.train()
    for name, value in parameters(model).items():
        assert torch.equal(value, before[name])


def test_target_kl_ends_an_update_early():
    free = make(learning_rate=0.05, n_epochs=10)
    free.learn(32)
    held = make(learning_rate=0.05, n_epochs=10, target_kl=1e-3)
    held.learn(32)
    assert free._n_updates == 10
    assert held._n_updates < 10


def test_gradients_are_clipped_and_weight_decay_groups_are_kept():
    class Grouped(MemorylessPolicy):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            weights = [p for p in self.parameters() if p.ndim > 1]
            rest = [p for p in self.parameters() if p.ndim <= 1]
            groups = [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
            self.optimizer = torch.optim.AdamW(groups, lr=1e-3)

    model = make(Grouped, learning_rate=LearningRate(1e-2, "cosine"))
    model.learn(64)
    groups = model.policy.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[0]["lr"] == groups[1]["lr"] < 1e-2


def test_wrong_policies_and_sizes_are_refused():
    with pytest.raises(
        TypeError, match="MultiInputActorCriticPolicy lacks initial_memory, act, evaluate_sequences"
    ):
        make(MultiInputActorCriticPolicy)
    with pytest.raises(
        ValueError, match="n_minibatches 5 must lie between 1 and the number of environments, 4"
    ):
        make(n_minibatches=5)
    with pytest.raises(ValueError, match="imitation num_minibatches 5 must lie between 1 and"):
        make(imitation=ImitationConfig(num_minibatches=5))


def test_imitation_hands_over_to_ppo_in_one_training():
    phases = []

    class Watch(BaseCallback):
        def _on_step(self):
            return True

        def on_update_end(self):
            phases.append((self.model.rollout_buffer.has_expert_actions, self.model.anchor is not None))
            return True

    model = make(imitation=ImitationConfig(frames=96, anchor_coef=1.0, anchor_frames=64))
    optimizer = model.policy.optimizer
    model.learn(256, callback=Watch())
    assert phases == [(True, False)] * 3 + [(False, True)] * 2 + [(False, False)] * 3
    assert model.policy.optimizer is optimizer
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert max(steps) == 8 * 2 * 2, "one optimiser goes through both phases"


def test_learning_rates_fall_as_named():
    assert LearningRate(1.0)(0.3) == 1.0
    assert LearningRate(1.0, "linear", 0.1)(0.0) == pytest.approx(0.1)
    assert LearningRate(1.0, "linear")(0.25) == pytest.approx(0.25)
    assert LearningRate(1.0, "cosine")(0.5) == pytest.approx(0.5)
    # Where a straight line is at a quarter.
    assert LearningRate(1.0, "cosine")(0.25) == pytest.approx((1 + math.cos(0.75 * math.pi)) / 2)
    with pytest.raises(ValueError, match="'square' is not one of constant, linear, cosine"):
        LearningRate(1.0, "square")


def test_the_linear_curriculum_grows_evenly_and_then_stays():
    curriculum = PathLengthCurriculum(3.0, 30.0, frames=1000)
    assert curriculum.update(0, []) == 3.0
    assert curriculum.update(500, []) == pytest.approx(16.5)
    assert curriculum.update(5000, []) == 30.0


def test_the_success_curriculum_waits_for_success():
    curriculum = PathLengthCurriculum(4.0, 9.0, frames=0, mode="success", growth=2.0, min_episodes=10)
    assert curriculum.update(1, [1.0] * 9) == 4.0
    assert curriculum.update(2, [0.0]) == 8.0
    assert curriculum.update(3, [0.0] * 10) == 8.0
    other = PathLengthCurriculum(4.0, 9.0, frames=0, mode="success", growth=2.0, min_episodes=10)
    other.load_state_dict(curriculum.state_dict())
    assert other.update(4, [1.0] * 10) == curriculum.update(4, [1.0] * 10) == 9.0
    with pytest.raises(ValueError, match=r"start 5\.0 m must be greater than 0 and at most its end, 4\.0 m"):
        PathLengthCurriculum(5.0, 4.0, frames=1)
