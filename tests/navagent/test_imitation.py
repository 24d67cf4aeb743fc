import pytest
import torch
from learning_world import LineVecEnv, LineWorld, RecurrentPolicy

from navagent.learning.imitation import (
    Anchor,
    ExpertMixture,
    ImitationConfig,
    divergence,
    imitation_loss,
    inflection_weights,
)
from navagent.learning.ppo import PPO


def choose(mix, *step):
    mix.draw()
    return mix.choose(*step)


def mixture(num_envs=1000, stop_action=0, **settings):
    config = ImitationConfig(**{"frames": 100, "final_share": 0.0, **settings})
    return ExpertMixture(config, num_envs, stop_action, torch.Generator().manual_seed(0))


def test_the_experts_share_falls_and_at_last_the_learner_is_alone():
    config = ImitationConfig(frames=100, mixing_fraction=0.5, final_share=0.2, alone_fraction=0.1)
    assert [config.expert_share(frames) for frames in (0, 25, 50, 89, 90)] == [1.0, 0.6, 0.2, 0.2, 0.0]
    assert ImitationConfig(frames=100, mixing_fraction=0.0, final_share=0.3).expert_share(0) == 0.3


def test_behaviour_is_the_experts_at_first_and_the_learners_at_last():
    mix = mixture()
    learner, expert = torch.full((1000,), 2), torch.full((1000,), 1)
    starts = torch.ones(1000, dtype=torch.bool)
    assert torch.equal(choose(mix, learner, expert, starts, 0), expert)
    half = (choose(mix, learner, expert, starts, 25) == expert).float().mean().item()
    assert 0.45 < half < 0.55
    # It ends at once, also for those whose turn the expert's was.
    assert torch.equal(choose(mix, learner, expert, ~starts, 80), learner)


def test_who_acts_is_drawn_anew_after_so_many_steps_on_average():
    mix = mixture(mixing_fraction=0.0, final_share=0.5, segment_steps=20)
    learner, expert = torch.full((1000,), 2), torch.full((1000,), 1)
    starts = torch.ones(1000, dtype=torch.bool)
    before = choose(mix, learner, expert, starts, 0)
    changes = 0
    for _ in range(100):
        now = choose(mix, learner, expert, ~starts, 0)
        changes += int((now != before).sum())
        before = now
    # A new draw changes who acts half of the time.
    assert changes == pytest.approx(100 * 1000 / 20 / 2, rel=0.1)


def test_at_first_the_learner_stops_only_where_the_expert_would():
    learner, expert = torch.tensor([0, 0, 3]), torch.tensor([1, 0, 0])
    starts = torch.ones(3, dtype=torch.bool)
    assert choose(mixture(3), learner, expert, starts, 79).tolist() == [1, 0, 3]
    # Near the end of imitation it stops as it likes.
    assert choose(mixture(3), learner, expert, starts, 80).tolist() == [0, 0, 3]
    # With automatic stopping, action 0 is a move like the others.
    assert choose(mixture(3, stop_action=None), learner, expert, starts, 79).tolist() == [0, 0, 3]


def test_inflections_are_changes_of_the_experts_action_within_an_episode():
    expert = torch.tensor([[1], [1], [2], [2], [1], [3]])
    starts = torch.tensor([[True], [False], [False], [False], [True], [False]])
    assert inflection_weights(expert, starts, 5.0).flatten().tolist() == [1, 1, 5, 1, 1, 5]


def test_the_loss_is_the_weighted_mean_of_cross_entropies():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, 4, generator=generator)
    expert = torch.randint(0, 4, (6, 3), generator=generator)
    starts = torch.rand(6, 3, generator=generator) < 0.2
    loss, agreement = imitation_loss(logits, expert, starts, 3.0)
    weights = inflection_weights(expert, starts, 3.0)
    entropies = -torch.log_softmax(logits, -1).gather(-1, expert[..., None])[..., 0]
    torch.testing.assert_close(loss, (weights * entropies).sum() / weights.sum())
    assert agreement == (logits.argmax(-1) == expert).float().mean()


def test_divergence_is_zero_for_equals_and_as_torch_has_it():
    logits, other = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    assert divergence(logits, logits).abs() < 1e-6
    want = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=other)
    ).mean()
    torch.testing.assert_close(divergence(logits, other), want)


def learner(**imitation):
    env = LineVecEnv(LineWorld(num_envs=16))
    return PPO(
        RecurrentPolicy,
        env,
        n_steps=16,
        n_epochs=4,
        learning_rate=3e-3,
        gamma=0.95,
        seed=0,
        device="cpu",
        imitation=ImitationConfig(**imitation),
    )


def test_imitation_alone_learns_the_experts_actions_and_the_critic_its_returns():
    model = learner(frames=8_192)
    model.learn(8_192)
    batch = next(model.rollout_buffer.minibatches(1))
    values, _, _, logits = model.policy.evaluate_sequences(
        batch.observations, batch.actions, batch.memory, batch.episode_starts, batch.frozen
    )
    assert (logits.argmax(-1) == batch.expert_actions).float().mean() > 0.97
    unexplained = (batch.returns - values).var() / batch.returns.var()
    assert unexplained < 0.4
    assert sum(episode["success"] for episode in model.recent_episodes) >= 90


def test_the_anchor_stays_as_it_was_and_shares_what_is_frozen():
    model = learner(frames=512, anchor_coef=1.0, anchor_frames=100_000)
    model.learn(512)
    imitated = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(1024, reset_num_timesteps=False)
    assert isinstance(model.anchor, Anchor)
    for name, value in model.anchor.policy.state_dict().items():
        assert torch.equal(value, imitated[name])
    assert model.anchor.policy.base.weight is model.policy.base.weight
    assert not torch.equal(model.policy.actor.weight, imitated["actor.weight"])
    assert all(parameter.requires_grad for parameter in model.policy.actor.parameters())


def test_a_heavy_anchor_keeps_the_policy_where_imitation_left_it():
    def moved(coefficient):
        model = learner(frames=512, anchor_coef=coefficient, anchor_frames=10**9)
        model.learn(512 + 2048)
        reference = model.rollout_buffer["reference_logits"]
        _, _, _, logits = model.policy.evaluate_sequences(
            {key: model.rollout_buffer["obs/" + key] for key in ("offset", "image")},
            model.rollout_buffer["actions"],
            model.rollout_buffer.memory,
            model.rollout_buffer["episode_starts"],
            None,
        )
        return divergence(reference, logits).item()

    assert moved(100.0) < 0.2 * moved(1e-6)


def test_wrong_settings_are_refused_by_name():
    with pytest.raises(ValueError, match=r"segment_steps 0\.5 must be at least 1"):
        ImitationConfig(segment_steps=0.5)
    with pytest.raises(ValueError, match=r"mixing_fraction 1\.5 must lie between 0 and 1"):
        ImitationConfig(mixing_fraction=1.5)
    with pytest.raises(ValueError, match=r"inflection_weight 0\.0 must be greater than 0"):
        ImitationConfig(inflection_weight=0.0)
