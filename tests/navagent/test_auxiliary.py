"""``cpca.npz``: the loss and gradients of habitat-baselines' ``CPCA`` on random numbers.

Recorded with ``habitat_baselines/rl/ppo/cpc_aux_loss.py`` and ``rl/models/action_embedding.py`` of
github.com/facebookresearch/habitat-lab at 0fb6f43 on torch 2.13, with ``k=4, time_subsample=100,
future_subsample=3, num_negatives=4`` and random weights; its imports of habitat were replaced by empty
classes, and ``torch.multinomial`` by the recorded choice. Each episode was given one more frame of constant
numbers, as its masks leave the last frame out. Its masked mean is a mean over all places times the share of
valid ones, so its loss is ours times that share squared.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from envs.expert import NO_MOVE
from navagent.learning.auxiliary import (
    AuxiliaryConfig,
    AuxiliaryLosses,
    Choice,
    ContrastivePrediction,
    Heading,
    InverseDynamics,
    masked_mean,
    steps_left,
)

RECORDED = Path(__file__).parent.parent / "data" / "cpca.npz"
STEPS, ENVS, FEATURES, HIDDEN, ACTIONS = 9, 4, 5, 6, 4


@pytest.fixture
def block():
    """Features, hidden, actions and episode starts of a block in which episodes end."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(STEPS, ENVS, FEATURES, generator=generator)
    hidden = torch.randn(STEPS, ENVS, HIDDEN, generator=generator).tanh()
    actions = torch.randint(0, ACTIONS, (STEPS, ENVS), generator=generator)
    starts = torch.zeros(STEPS, ENVS, dtype=torch.bool)
    starts[[0, 4, 2, 3, 8], [0, 0, 1, 1, 3]] = True
    return features, hidden, actions, starts


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def contrastive(**settings):
    torch.manual_seed(0)
    config = AuxiliaryConfig(cpc_coef=0.1, **{"horizon": 3, "futures": 2, "negatives": 3, **settings})
    return ContrastivePrediction(config, FEATURES, HIDDEN, ACTIONS)


def test_loss_and_gradients_are_those_of_habitats_cpca():
    with np.load(RECORDED) as recorded:
        data = {name: torch.from_numpy(recorded[name]) for name in recorded.files}
    loss = ContrastivePrediction(
        AuxiliaryConfig(horizon=4, futures=3, negatives=4), FEATURES, HIDDEN, ACTIONS
    )
    loss.load_state_dict(
        {name.removeprefix("weights/"): value for name, value in data.items() if "weights/" in name}
    )
    features, hidden = data["features"].requires_grad_(True), data["hidden"].requires_grad_(True)
    choice = Choice(data["starts"], data["left"], data["futures"], data["negatives"])
    share = (choice.futures < choice.left[:, None]).float().mean()
    ours = 0.1 * share.square() * loss(features, hidden, data["actions"], choice)
    ours.backward()
    close = {"rtol": 1e-5, "atol": 1e-9}
    torch.testing.assert_close(ours.detach(), data["loss"], **close)
    torch.testing.assert_close(features.grad, data["features_gradient"], **close)
    torch.testing.assert_close(hidden.grad, data["hidden_gradient"], **close)
    torch.testing.assert_close(loss.predictor.weight_hh_l0.grad, data["recurrent_gradient"], **close)


def test_the_contrastive_loss_is_its_definition_written_out(block):
    features, hidden, actions, starts = block
    network = contrastive()
    choice = network.choose(starts, generator())
    right, wrong = [], []
    for index, row in enumerate(choice.starts.tolist()):
        time, env = divmod(row, ENVS)
        state = (hidden[time, env][None], hidden[time, env][None])
        for ahead in range(3):
            if time + ahead + 1 >= STEPS or starts[time + ahead + 1, env]:
                break
            output, state = network.predictor(
                network.action_embedding(actions[time + ahead, env])[None], state
            )

            def score(image, output=output):
                return network.score(network.of_prediction(output) + network.of_image(image)[None])

            for place in (choice.futures[index] == ahead).nonzero().flatten().tolist():
                right.append(functional.logsigmoid(score(features[time + ahead + 1, env])))
                others = features.flatten(0, 1)[choice.negatives[index, place]]
                wrong.extend(functional.logsigmoid(-score(other)) for other in others)
    assert len(right) > 10
    expected = -torch.cat(right).mean() - torch.cat(wrong).mean()
    torch.testing.assert_close(network(features, hidden, actions, choice), expected)


def test_nothing_is_predicted_across_the_end_of_an_episode(block):
    features, hidden, actions, starts = block
    network = contrastive(starts=100, futures=3)
    choice = network.choose(starts, generator())
    features.requires_grad_(True)
    predictions = network(features, hidden, actions, choice)
    # What a start's predictions depend on: only its own episode's actions count.
    for row, left in zip(choice.starts.tolist(), choice.left.tolist(), strict=True):
        time, env = divmod(row, ENVS)
        assert not starts[time + 1 : time + 1 + left, env].any()
        assert time + 1 + left == STEPS or starts[time + 1 + left, env]
    changed = actions.clone()
    changed[3, 0] = (changed[3, 0] + 1) % ACTIONS  # the last action of an episode leads nowhere
    assert torch.equal(network(features, hidden, changed, choice), predictions)
    changed[2, 0] = (changed[2, 0] + 1) % ACTIONS
    assert not torch.equal(network(features, hidden, changed, choice), predictions)


def test_choices_keep_to_their_numbers(block):
    starts = block[3]
    network = contrastive(starts=2, negatives=50)
    firsts = set()
    for seed in range(20):
        choice = network.choose(starts, generator(seed))
        firsts |= set(choice.starts.tolist())
        episodes = starts.long().cumsum(0) * ENVS + torch.arange(ENVS)
        counts = episodes.flatten()[choice.starts].unique(return_counts=True)[1]
        assert counts.max() == 2
        assert (choice.left > 0).all()
        assert len(choice.starts.unique()) == len(choice.starts)
        assert all(len(set(row)) == 2 for row in choice.futures.tolist())
        assert choice.futures.max() < 3
        targets = choice.starts[:, None] + (choice.futures + 1) * ENVS
        assert (choice.negatives != targets[..., None]).all()
        assert choice.negatives.min() >= 0
        assert choice.negatives.max() < STEPS * ENVS
    possible = (steps_left(starts).flatten() > 0).nonzero().flatten().tolist()
    assert firsts == set(possible), "every step with a future is a start at some time"


def test_steps_left_count_to_the_end_of_the_episode_or_block(block):
    starts = block[3]
    left = steps_left(starts)
    for time, env in itertools.product(range(STEPS), range(ENVS)):
        following = [later for later in range(time + 1, STEPS) if starts[later, env]]
        assert left[time, env] == (following[0] if following else STEPS) - time - 1


def test_a_block_of_one_step_episodes_has_no_contrastive_loss(block):
    features, hidden, actions, _ = block
    network = contrastive()
    starts = torch.ones(STEPS, ENVS, dtype=torch.bool)
    assert network(features, hidden, actions, network.choose(starts, generator())) == 0


def test_contrastive_prediction_learns_which_image_follows_which_action():
    torch.manual_seed(0)
    config = AuxiliaryConfig(cpc_coef=1.0, horizon=3, negatives=8)
    network = ContrastivePrediction(config, ACTIONS, HIDDEN, ACTIONS)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    starts = torch.zeros(12, 16, dtype=torch.bool)
    draws = generator()
    losses = []
    for _ in range(150):
        actions = torch.randint(0, ACTIONS, (12, 16), generator=draws)
        # The next image shows the action before it.
        features = torch.zeros(12, 16, ACTIONS)
        features[1:] = functional.one_hot(actions[:-1], ACTIONS).float()
        loss = network(features, torch.zeros(12, 16, HIDDEN), actions, network.choose(starts, draws))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # A quarter of the wrong images look right, so that four of five that do are: no guess beats this.
    best = -np.log(0.8) - 0.25 * np.log(0.2)
    assert losses[0] > 1.3
    assert best - 0.15 < np.mean(losses[-10:]) < best + 0.15


def test_inverse_dynamics_is_cross_entropy_over_steps_that_end_no_episode(block):
    features, _, actions, starts = block
    torch.manual_seed(0)
    network = InverseDynamics(FEATURES, HIDDEN, ACTIONS)
    losses, rights = [], []
    for time, env in itertools.product(range(STEPS - 1), range(ENVS)):
        if not starts[time + 1, env]:
            logits = network.guess(torch.cat((features[time, env], features[time + 1, env])))
            losses.append(functional.cross_entropy(logits, actions[time, env]))
            rights.append(float(logits.argmax() == actions[time, env]))
    loss, agreement = network(features, actions, starts)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert agreement == pytest.approx(np.mean(rights))


def test_inverse_dynamics_never_looks_across_the_end_of_an_episode(block):
    features, _, actions, starts = block
    features.requires_grad_(True)
    network = InverseDynamics(FEATURES, HIDDEN, ACTIONS)
    network(features, actions, starts)[0].backward()
    alone = starts & (steps_left(starts) == 0)
    assert alone.any()
    assert (features.grad[alone] == 0).all()
    assert (features.grad[~alone & (steps_left(starts) > 0)] != 0).any(1).all()


def test_masked_mean_of_nothing_is_zero_and_has_a_gradient_of_zero():
    losses = torch.ones(3, requires_grad=True)
    mean = masked_mean(losses, torch.zeros(3, dtype=torch.bool))
    mean.backward()
    assert mean == 0
    assert losses.grad.tolist() == [0, 0, 0]


def test_losses_are_added_by_their_weight(block):
    config = AuxiliaryConfig(cpc_coef=0.1, inverse_dynamics_coef=0.3)
    losses = AuxiliaryLosses(config, FEATURES, HIDDEN, ACTIONS)
    total, record = losses(*block, None, generator())
    expected = 0.1 * record["auxiliary/cpc_loss"] + 0.3 * record["auxiliary/inverse_dynamics_loss"]
    torch.testing.assert_close(total.detach(), expected)
    alone = AuxiliaryLosses(AuxiliaryConfig(inverse_dynamics_coef=1.0), FEATURES, HIDDEN, ACTIONS)
    assert alone.cpc is None
    assert set(alone(*block, None, generator())[1]) == {
        "auxiliary/inverse_dynamics_loss",
        "auxiliary/inverse_dynamics_agreement",
    }


def test_the_same_seed_chooses_the_same(block):
    losses = AuxiliaryLosses(AuxiliaryConfig(cpc_coef=0.1), FEATURES, HIDDEN, ACTIONS)
    assert losses(*block, None, generator(3))[0] == losses(*block, None, generator(3))[0]
    assert losses(*block, None, generator(3))[0] != losses(*block, None, generator(4))[0]


def test_the_heading_loss_is_that_of_a_softmax_over_all_turns_where_a_move_is_to_come():
    torch.manual_seed(0)
    heading = Heading(HIDDEN, half_circle=3)
    torch.nn.init.normal_(heading.guess.weight)
    hidden = torch.randn(3, 2, HIDDEN)
    turns = torch.tensor([[-3, 3], [NO_MOVE, 0], [1, NO_MOVE]], dtype=torch.int16)
    loss, agreement = heading(hidden, turns)
    total, right = 0.0, 0
    for step, env, turn in [(0, 0, -3), (0, 1, 3), (1, 1, 0), (2, 0, 1)]:
        scores = (heading.guess.weight @ hidden[step, env] + heading.guess.bias).tolist()
        total += math.log(sum(math.exp(score) for score in scores)) - scores[turn + 3]
        right += scores.index(max(scores)) == turn + 3
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)
    assert agreement.item() == pytest.approx(right / 4)
    assert heading(hidden, torch.full_like(turns, NO_MOVE))[0] == 0
    # The memory learns from it, where a move is to come.
    hidden.requires_grad_(True)
    heading(hidden, turns)[0].backward()
    assert torch.equal((hidden.grad != 0).all(2), turns != NO_MOVE)


def test_the_heading_is_asked_of_agents_without_images_where_an_expert_told_it(block):
    features, hidden, actions, starts = block
    losses = AuxiliaryLosses(AuxiliaryConfig(heading_coef=0.5), 0, HIDDEN, ACTIONS)
    turns = torch.zeros_like(actions, dtype=torch.int16)
    total, record = losses(features, hidden, actions, starts, turns, generator())
    torch.testing.assert_close(total.detach(), 0.5 * record["auxiliary/heading_loss"])
    assert losses(features, hidden, actions, starts, None, generator()) == (0, {})


def test_wrong_settings_and_policies_without_images_are_refused():
    with pytest.raises(ValueError, match="cpc_coef -1 must not be negative"):
        AuxiliaryConfig(cpc_coef=-1)
    with pytest.raises(ValueError, match="horizon 3, starts 6, futures 4"):
        AuxiliaryConfig(horizon=3, futures=4)
    with pytest.raises(ValueError, match="half_circle 0: expected 1 to 32766 turns"):
        AuxiliaryConfig(heading_coef=1.0, half_circle=0)
    with pytest.raises(ValueError, match="this policy sees none"):
        AuxiliaryLosses(AuxiliaryConfig(cpc_coef=0.1), 0, HIDDEN, ACTIONS)
