import math
from dataclasses import replace

import pytest
import torch
from learning_world import LineVecEnv, LineWorld, MemorylessPolicy, RecurrentPolicy

from navagent.distributed import Ranks
from navagent.learning.imitation import (
    Anchor,
    ExpertMixture,
    ImitationConfig,
    divergence,
    imitation_loss,
    imitation_objective,
    inflection_weights,
)
from navagent.learning.imitator import Imitator
from navagent.learning.ppo import PPO
from navagent.learning.rollout import SequenceBuffer


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


class LeakyPolicy(MemorylessPolicy):
    """Remembers h = leak * h + x, from 0 in every episode; its logits are h times four weights."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.leak = torch.nn.Parameter(torch.tensor(0.7))
        self.weights = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.5, 0.1]))
        self.optimizer = torch.optim.SGD([self.leak, self.weights], lr=1.0)

    def initial_memory(self, n):
        return torch.zeros(n)

    def act(self, obs, memory, episode_starts, deterministic=False, frozen=None):
        memory = self.leak * memory * ~episode_starts + obs["offset"][:, 0]
        distribution = torch.distributions.Categorical(logits=memory[:, None] * self.weights)
        actions = distribution.sample()
        nothing = torch.zeros(len(memory))
        return actions, nothing, nothing, memory, {}, distribution.logits

    def evaluate_sequences(self, obs, actions, memory, episode_starts, frozen=None):
        memories = []
        for step, starts in enumerate(episode_starts):
            memory = self.leak * memory * ~starts + obs["offset"][step, :, 0]
            memories.append(memory)
        nothing = torch.zeros(actions.shape)
        return nothing, nothing, nothing, torch.stack(memories)[..., None] * self.weights


def loss_by_hand(leak, weights, batch, inflection_weight):
    """The loss of some sequences in plain Python, from the memory that each began with."""
    total = counted = 0.0
    steps, envs = batch.expert_actions.shape
    for env in range(envs):
        memory = batch.memory[env].item()
        for step in range(steps):
            if batch.episode_starts[step, env]:
                memory = 0.0
            memory = leak * memory + batch.observations["offset"][step, env, 0].item()
            label = batch.expert_actions[step, env].item()
            entropy = math.log(sum(math.exp(memory * w) for w in weights)) - memory * weights[label]
            weight = 1.0
            if step and not batch.episode_starts[step, env] and label != batch.expert_actions[step - 1, env]:
                weight = inflection_weight
            total, counted = total + weight * entropy, counted + weight
    return total / counted


def test_loss_and_gradient_of_a_sequence_with_resets_are_those_computed_by_hand():
    model = Imitator(
        LeakyPolicy,
        LineVecEnv(LineWorld(num_envs=3, max_steps=4)),
        n_steps=7,
        n_minibatches=1,
        n_epochs=1,
        learning_rate=1.0,
        max_grad_norm=1e9,
        vf_coef=0.0,
        seed=0,
        device="cpu",
        imitation=ImitationConfig(frames=42, final_share=0.5, inflection_weight=2.5),
    )
    model.learn(21)
    model._total_timesteps = 42
    callback = model._setup_learn(21, None, reset_num_timesteps=False)[1]
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, 7)
    (batch,) = model.rollout_buffer.minibatches(1)
    # Episodes that go on from the rollout before, with what is remembered of them, and others that begin.
    going_on = ~batch.episode_starts[0]
    assert (batch.memory[going_on] != 0).all()
    assert going_on.any()
    assert batch.episode_starts[1:].any()
    policy = model.policy
    numbers = [policy.leak.item(), *policy.weights.tolist()]
    loss, record = imitation_objective(
        policy.evaluate_sequences(batch.observations, batch.actions, batch.memory, batch.episode_starts)[3],
        torch.zeros_like(batch.returns),
        replace(batch, returns=torch.zeros_like(batch.returns)),
        model.imitation,
        0.5,
    )
    by_hand = loss_by_hand(numbers[0], numbers[1:], batch, 2.5)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert record["imitation/loss"].item() == pytest.approx(by_hand, rel=1e-5)
    # Back-propagation ends where the rollout began: what was remembered then is a number like others.
    gradient = []
    for place in range(5):
        ends = []
        for change in (1e-5, -1e-5):
            moved = [number + change * (index == place) for index, number in enumerate(numbers)]
            ends.append(loss_by_hand(moved[0], moved[1:], batch, 2.5))
        gradient.append((ends[0] - ends[1]) / 2e-5)
    model._current_progress_remaining = 1.0
    model.train()
    after = [policy.leak.item(), *policy.weights.tolist()]
    assert [b - a for a, b in zip(after, numbers, strict=True)] == pytest.approx(gradient, abs=2e-5)


def test_what_pads_a_rollout_that_ended_early_is_not_learned():
    generator = torch.Generator().manual_seed(0)

    def step(envs=3):
        offsets = torch.randn(envs, 2, generator=generator)
        labels = torch.randint(0, 4, (envs,), generator=generator)
        return offsets, labels, torch.rand(envs, generator=generator) < 0.3

    def filled(buffer, steps):
        buffer.start(torch.ones(3))
        for offsets, labels, starts in steps:
            nothing = torch.zeros(3)
            buffer.add({"offset": offsets}, labels, nothing, starts, nothing, nothing, expert_actions=labels)
        buffer.finish(torch.zeros(3), torch.zeros(3, dtype=torch.bool), 0.9, 0.9)
        return next(buffer.minibatches(1))

    steps = [step() for _ in range(4)]
    padded = SequenceBuffer(9, 3)
    filled(
        padded, [(offsets * 1e6, labels, starts) for offsets, labels, starts in (step() for _ in range(9))]
    )
    batch, exact = filled(padded, steps), filled(SequenceBuffer(4, 3), steps)
    assert batch.samples == 12
    losses = []
    for each in (batch, exact):
        logits = each.observations["offset"][..., :1] * torch.tensor([0.3, -0.2, 0.5, 0.1])
        losses.append(imitation_loss(logits, each.expert_actions, each.episode_starts, 2.5)[0])
    assert losses[0] == losses[1]
    # Without memory, each step's logits are the offset times the weights.
    assert losses[0].item() == pytest.approx(loss_by_hand(0.0, [0.3, -0.2, 0.5, 0.1], batch, 2.5), rel=1e-5)


class OneOfTwo(Ranks):
    """A process whose sums another one adds to."""

    size = 2

    def __init__(self, weights, steps):
        self.others = torch.tensor([weights, steps])

    def sum(self, values):
        return values + self.others


def test_sequences_of_several_processes_weigh_as_in_one_and_stand_ins_nothing():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 4, generator=generator)
    expert = torch.randint(0, 4, (5, 4), generator=generator)
    starts = torch.rand(5, 4, generator=generator) < 0.2
    whole, _ = imitation_loss(logits, expert, starts, 3.0)
    weights = inflection_weights(expert, starts, 3.0)
    parts = (slice(0, 3), slice(3, 4))
    mean = 0.0
    for own, other in (parts, parts[::-1]):
        ranks = OneOfTwo(weights[:, other].sum().item(), weights[:, other].numel())
        samples = weights[:, own].numel()
        loss, _ = imitation_loss(logits[:, own], expert[:, own], starts[:, own], 3.0, ranks, samples)
        mean += loss * samples / weights.numel()
    torch.testing.assert_close(mean, whole)
    # Where the other process's sequence only stands in, all is as if there were this one.
    alone, _ = imitation_loss(logits, expert, starts, 3.0, OneOfTwo(0.0, 0.0), weights.numel())
    torch.testing.assert_close(alone, whole)


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


def test_the_anchors_weight_falls_along_a_line_after_the_critics_frames():
    config = ImitationConfig(frames=100, critic_warmup_frames=50, anchor_coef=0.4, anchor_frames=200)
    weights = [config.anchor_weight(frames) for frames in (0, 99, 100, 149, 150, 200, 250, 350, 10**6)]
    assert weights == pytest.approx([0, 0, 0.4, 0.4, 0.4, 0.3, 0.2, 0, 0])
    assert [config.critic_alone(frames) for frames in (99, 100, 149, 150)] == [False, True, True, False]
    assert ImitationConfig(anchor_coef=0.4).anchor_weight(0) == 0


def test_the_anchor_adds_its_weight_times_the_divergence_to_the_loss():
    """KL(reference || policy) of an even reference is -log A - mean log p, and its gradient p - 1 / A."""
    model = learner(frames=256, anchor_coef=0.4, anchor_frames=1024)
    model.learn(512)
    assert model.imitation.anchor_weight(model.num_timesteps) == pytest.approx(0.3)
    batch = next(model.rollout_buffer.minibatches(1))
    values, log_probs, entropy, logits = (
        part.detach()
        for part in model.policy.evaluate_sequences(
            batch.observations, batch.actions, batch.memory, batch.episode_starts, batch.frozen
        )
    )
    logits.requires_grad_(True)
    evaluation = (values, log_probs, entropy, logits)
    without, _ = model._objective(evaluation, replace(batch, reference_logits=None))
    even = replace(batch, reference_logits=torch.zeros_like(logits))
    loss, record = model._objective(evaluation, even)
    probabilities = torch.log_softmax(logits.detach(), -1)
    divergence_by_hand = -math.log(4) - probabilities.mean()
    torch.testing.assert_close(record["imitation/divergence"], divergence_by_hand)
    torch.testing.assert_close(loss - without, 0.3 * divergence_by_hand)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, 0.3 * (probabilities.exp() - 0.25) / batch.samples)


class CriticPolicy(RecurrentPolicy):
    """One that tells which parameters are its critic's own."""

    def critic_parameters(self):
        return self.critic.parameters()


def test_in_the_critics_frames_it_alone_takes_the_step_of_its_square_error():
    model = PPO(
        CriticPolicy,
        LineVecEnv(LineWorld(num_envs=4)),
        n_steps=8,
        n_minibatches=1,
        n_epochs=1,
        learning_rate=0.1,
        max_grad_norm=1e9,
        vf_coef=0.5,
        seed=0,
        device="cpu",
        imitation=ImitationConfig(critic_warmup_frames=32),
    )
    model.policy.optimizer = torch.optim.SGD(model.policy.optimizer.param_groups[0]["params"], lr=0.1)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(32)
    batch = next(model.rollout_buffer.minibatches(1))
    # With a weight of 1/2, the gradient of the mean square in the bias is the mean error.
    error = (batch.values - batch.returns).mean()
    after = model.policy.state_dict()
    torch.testing.assert_close(after["critic.bias"], before["critic.bias"] - 0.1 * error)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"critic.weight", "critic.bias"}
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
