"""DAgger on a track whose answers are known: the mixture, the aggregate, and what both are for.

On the track the right action is 0, beside it 1, and action 2 is right nowhere. Whoever does what is right is
on the track next, and whoever does not beside it.
"""

import itertools

import pytest
import torch
from gymnasium import spaces
from learning_world import LineVecEnv, LineWorld, MemorylessPolicy
from scipy import stats
from stable_baselines3.common.callbacks import BaseCallback

from navagent.learning.aggregate import Aggregate
from navagent.learning.imitation import ImitationConfig
from navagent.learning.imitator import Imitator
from navagent.learning.rollout import SequenceBuffer

HORIZON = 20
TREMBLE = 0.1


class Track(LineWorld):
    """N cars on a track; ``offset`` is 1 beside it."""

    def __init__(self, num_envs, max_steps=HORIZON):
        super().__init__(num_envs, max_steps)
        self.single_action_space = spaces.Discrete(3)

    def _new(self, which, first=False):
        if first:
            self.offset, self.steps, self.total = (torch.zeros(self.num_envs) for _ in range(3))
        self.offset = torch.where(which, 0.0, self.offset)
        self.steps = torch.where(which, 0.0, self.steps)

    def expert_actions(self):
        return self.offset.long()

    def step(self, actions):
        self.offset = (actions != self.expert_actions()).float()
        self.steps = self.steps + 1
        cut = self.steps >= self.max_steps
        infos = {}
        if cut.any():
            lengths = self.steps.clone()
            episode = {name: lengths for name in ("success", "reward_sum", "steps", "r", "l")}
            infos = {"episode": episode, "_episode": cut, "final_obs": self.observations()}
            self._new(cut)
        nothing = torch.zeros(self.num_envs)
        return self.observations(), nothing, torch.zeros_like(cut), cut, infos


class TrackPolicy(MemorylessPolicy):
    """A table of logits, for on the track and beside it; ``blind`` has one row for both.

    It does what is likeliest, but its hand trembles: now and then it does action 2.
    """

    def __init__(self, *args, blind=False, tremble=TREMBLE, **kwargs):
        super().__init__(*args, **kwargs)
        self.tremble = tremble
        self.table = torch.nn.Parameter(torch.zeros(1 if blind else 2, 3))
        self.optimizer = torch.optim.Adam([self.table], lr=1.0)

    def logits(self, obs):
        return self.table[(obs["offset"][..., 0] > 0).long().clamp(max=len(self.table) - 1)]

    def act(self, obs, memory, episode_starts, deterministic=False, frozen=None):
        logits = self.logits(obs)
        trembles = torch.rand(len(logits)) < self.tremble
        actions = torch.where(trembles, 2, logits.argmax(-1))
        nothing = torch.zeros(len(logits))
        return actions, nothing, nothing, memory, {}, logits

    def evaluate_sequences(self, obs, actions, memory, episode_starts, frozen=None):
        logits = self.logits(obs)
        nothing = torch.zeros(actions.shape)
        return nothing, nothing, nothing, logits


def imitator(num_envs=200, n_steps=HORIZON, max_steps=HORIZON, policy=None, n_epochs=4, **settings):
    teaching = {"alone_fraction": 0.0, "final_share": 0.0, "segment_steps": 1.0, "inflection_weight": 1.0}
    return Imitator(
        TrackPolicy,
        LineVecEnv(Track(num_envs, max_steps)),
        n_steps=n_steps,
        n_minibatches=1,
        n_epochs=n_epochs,
        learning_rate=0.1,
        max_grad_norm=1e9,
        vf_coef=0.0,
        seed=0,
        device="cpu",
        policy_kwargs=policy or {},
        imitation=ImitationConfig(**teaching | settings.pop("imitation")),
        **settings,
    )


def steps_beside_the_track(model, episodes=4000):
    """How many of the steps of an episode the learner alone is beside the track, on average."""
    world = Track(episodes)
    world.reset(0)
    beside = 0.0
    for _ in range(HORIZON):
        beside += world.offset.sum().item() / episodes
        with torch.no_grad():
            actions = model.policy.act(world.observations(), torch.zeros(episodes, 0), None)[0]
        world.step(actions)
    return beside


def test_cloning_fails_quadratically_in_the_horizon_and_dagger_linearly():
    """Ross et al. 2011, section 2: who never saw the states that its own errors lead to stays in them."""
    frames = 10 * 200 * HORIZON
    cloned = imitator(imitation={"frames": frames, "schedule": "constant"})
    cloned.learn(frames)
    assert (cloned.rollout_buffer["obs/offset"][..., 0] == 0).all()
    # After its first tremble it never comes back: 1 - (1 - e)^t of all are beside the track at step t.
    lost = sum(1 - (1 - TREMBLE) ** step for step in range(HORIZON))
    assert steps_beside_the_track(cloned) == pytest.approx(lost, rel=0.03)
    taught = imitator(imitation={"frames": frames, "schedule": "exponential", "decay": 0.5})
    taught.learn(frames)
    assert taught.policy.table.argmax(-1).tolist() == [0, 1]
    # It comes back at once, unless it trembles again.
    assert steps_beside_the_track(taught) == pytest.approx((HORIZON - 1) * TREMBLE, rel=0.05)


DECAY = 0.5
SHARES = [DECAY**iteration for iteration in range(4)]
"""Ross et al.'s mixing rate p^(i - 1) of iterations 1 to 4."""
STEPS = 50
# The first state of an iteration was left by who acted last in the one before.
BESIDE = [
    ((1 - before) + (STEPS - 1) * (1 - now)) / STEPS
    for before, now in zip([1, *SHARES[:-1]], SHARES, strict=True)
]
"""Share of an iteration's states that are beside the track, where the learner always does what is wrong."""


class LabelsOfRollouts(BaseCallback):
    """Notes the share of states beside the track, where the expert's label is 1, in each rollout."""

    def __init__(self):
        super().__init__()
        self.shares = []

    def _on_step(self):
        return True

    def on_update_end(self):
        self.shares.append(self.model.rollout_buffer["expert_actions"].float().mean().item())
        return True


def always_wrong(**settings):
    """Four iterations of a learner that sees nothing and always does action 2, whatever it has learned."""
    frames = 4 * 200 * STEPS
    model = imitator(
        n_steps=STEPS,
        max_steps=10**6,
        policy={"blind": True, "tremble": 1.0},
        imitation={
            "frames": frames,
            "schedule": "exponential",
            "decay": DECAY,
            "iteration_frames": frames // 4,
        },
        **settings,
    )
    watch = LabelsOfRollouts()
    model.learn(frames, callback=watch)
    return model, watch.shares


def test_the_mixture_visits_states_as_its_rate_says():
    _, shares = always_wrong()
    assert shares == pytest.approx(BESIDE, abs=0.015)


def test_what_is_learned_online_fits_the_newest_iteration_and_aggregated_all_of_them():
    """What fits labels best where nothing is seen is how often each one comes, in what is learned from."""

    def learned(model):
        return torch.softmax(model.policy.table[0], -1)[1].item()

    online, shares = always_wrong(n_epochs=60)
    assert learned(online) == pytest.approx(shares[-1], abs=0.01)
    aggregated, shares = always_wrong(n_epochs=0, replay_epochs=60, replay_steps=4 * STEPS)
    # A minibatch has a quarter of all sequences, and the share of labels in it varies by 0.02.
    assert learned(aggregated) == pytest.approx(sum(shares) / 4, abs=0.04)
    assert len(aggregated.aggregate) == 4 * 200
    # Where there is room for half of them, it is an even half.
    half, shares = always_wrong(n_epochs=0, replay_epochs=60, replay_steps=2 * STEPS)
    assert learned(half) == pytest.approx(sum(shares) / 4, abs=0.05)
    assert len(half.aggregate) == 2 * 200


def rollout(number, num_envs=4, steps=3, length=3):
    """A finished rollout in which every number tells rollout, environment and step."""
    buffer = SequenceBuffer(steps, num_envs)
    envs = 100.0 * number + 10 * torch.arange(num_envs)
    buffer.start(envs[:, None])
    for step in range(length):
        stamp = envs + step
        starts = torch.full((num_envs,), step == 1)
        buffer.add(
            {"x": stamp[:, None]},
            stamp.long(),
            stamp,
            starts,
            stamp,
            stamp,
            {"f": stamp},
            stamp.long(),
            stamp.to(torch.int16),
        )
    buffer.finish(torch.zeros(num_envs), torch.zeros(num_envs, dtype=torch.bool), 0.9, 0.9)
    return buffer


def sequences(batch):
    """The first stamp of each sequence of a batch, after looking whether all of it belongs together."""
    first = batch.memory[:, 0]
    steps = torch.arange(len(batch.actions), dtype=torch.float32)[:, None]
    for block in (batch.observations["x"][..., 0], batch.actions, batch.log_probs, batch.expert_actions):
        assert torch.equal(block.float(), first + steps)
    assert torch.equal(batch.frozen["f"], first + steps)
    assert torch.equal(batch.expert_turns, (first + steps).to(torch.int16))
    assert (batch.episode_starts == (steps == 1)).all()
    assert batch.samples == batch.actions.numel()
    return first.tolist()


def test_sequences_come_whole_and_none_twice_before_all_came_once():
    generator = torch.Generator().manual_seed(0)
    aggregate = Aggregate(100, 3, torch.device("cpu"))
    for number in range(3):
        aggregate.add(rollout(number), generator)
    assert len(aggregate) == 12
    drawn = [sequences(batch) for batch in aggregate.draw([5, 4, 3, 5, 5, 2], generator)]
    assert [len(each) for each in drawn] == [5, 4, 3, 5, 5, 2]
    flat = list(itertools.chain(*drawn))
    every = [100.0 * number + 10 * env for number in range(3) for env in range(4)]
    assert sorted(flat[:12]) == sorted(flat[12:]) == every
    assert flat[:12] != flat[12:]
    # A process without a share of a minibatch gets one of which nothing counts.
    empty, whole = aggregate.draw([0, 2], generator)
    assert (empty.samples, whole.samples) == (0, 6)


def test_what_is_kept_of_more_than_there_is_room_for_is_an_even_sample():
    counts = torch.zeros(6)
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        aggregate = Aggregate(8, 3, torch.device("cpu"))
        for number in range(6):
            aggregate.add(rollout(number), generator)
        (batch,) = aggregate.draw([8], generator)
        kept = torch.tensor(sequences(batch))
        assert len(kept.unique()) == 8
        counts += torch.bincount((kept // 100).long(), minlength=6)
    # Of a fixed number without replacement, each rollout's share varies less than chi-square allows.
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


def test_a_saved_aggregate_goes_on_as_the_first():
    def drawn(aggregate, generator):
        aggregate.add(rollout(7), generator)
        return [sequences(batch) for batch in aggregate.draw([3, 3], generator)]

    generator = torch.Generator().manual_seed(0)
    first = Aggregate(6, 3, torch.device("cpu"))
    for number in range(3):
        first.add(rollout(number), generator)
    second = Aggregate(6, 3, torch.device("cpu"))
    second.load_state_dict(first.state_dict())
    state = generator.get_state()
    wanted = drawn(first, generator)
    generator.set_state(state)
    assert drawn(second, generator) == wanted


def test_rollouts_that_ended_early_or_have_no_labels_are_not_aggregated():
    generator = torch.Generator().manual_seed(0)
    aggregate = Aggregate(8, 3, torch.device("cpu"))
    aggregate.add(rollout(0, length=2), generator)
    assert len(aggregate) == 0
    with pytest.raises(RuntimeError, match="nothing was added yet"):
        next(aggregate.draw([1], generator))
    unlabelled = rollout(0)
    unlabelled.start(torch.zeros(4, 1))
    nothing = torch.zeros(4)
    for _ in range(3):
        unlabelled.add({"x": nothing[:, None]}, nothing.long(), nothing, nothing > 0, nothing, nothing)
    unlabelled.finish(nothing, nothing > 0, 0.9, 0.9)
    with pytest.raises(ValueError, match="carries no expert actions"):
        aggregate.add(unlabelled, generator)
    with pytest.raises(ValueError, match="replay_steps 10 hold no rollout of n_steps 20"):
        imitator(imitation={"frames": 1}, replay_epochs=1, replay_steps=10)
