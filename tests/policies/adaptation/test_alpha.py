"""Alpha: its schedules in closed form, and what a checkpoint keeps of it."""

import math

import pytest
import torch

from policies.adaptation.alpha import Alpha, AlphaSchedule, DenseAlpha


def test_a_learned_alpha_is_the_sigmoid_of_its_logit():
    assert Alpha(AlphaSchedule(0.5), learned=True).logit.item() == 0.0
    alpha = Alpha(AlphaSchedule(0.8), learned=True)
    assert alpha().item() == pytest.approx(0.8, abs=1e-6)
    # The authors' "alpha8" rounds its logit to 1.39.
    assert alpha.logit.item() == pytest.approx(1.39, abs=0.005)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (AlphaSchedule(0.7), [0.7] * 5),
        (AlphaSchedule(1.0, "linear"), [1.0, 0.75, 0.5, 0.25, 0.0]),
        (AlphaSchedule(1.0, "linear", final=0.2, fraction=0.5), [1.0, 0.6, 0.2, 0.2, 0.2]),
        (AlphaSchedule(0.0, "linear", final=1.0), [0.0, 0.25, 0.5, 0.75, 1.0]),
        (AlphaSchedule(1.0, "cosine"), [0.5 + 0.5 * math.cos(math.pi * p / 4) for p in range(5)]),
        (AlphaSchedule(0.9, "cosine", final=0.1, fraction=0.25), [0.9, 0.1, 0.1, 0.1, 0.1]),
        (AlphaSchedule(kind="map", prior=300.0), [300 / (300 + n) for n in (0, 100, 200, 300, 400)]),
    ],
)
def test_schedules_follow_their_formulas(schedule, expected):
    assert [schedule(n, 400) for n in (0, 100, 200, 300, 400)] == pytest.approx(expected, abs=1e-12)


def test_map_is_the_posterior_mean_of_a_prior_worth_k_samples():
    prior, k = 2.0, 5
    observed = torch.tensor([7.0, 1.0, 4.0])
    alpha = AlphaSchedule(kind="map", prior=k)(len(observed), 100)
    together = torch.cat([torch.full((k,), prior), observed])
    assert alpha * prior + (1 - alpha) * observed.mean().item() == pytest.approx(together.mean().item())


def test_training_beyond_its_end_leaves_a_schedule_at_its_end():
    assert AlphaSchedule(1.0, "linear", final=0.3)(900, 400) == pytest.approx(0.3)
    assert AlphaSchedule(1.0, "cosine", final=0.3)(900, 400) == pytest.approx(0.3)


@pytest.mark.parametrize(("samples", "total"), [(-1, 10), (0, 0), (5, -1)])
def test_impossible_progress_is_refused(samples, total):
    with pytest.raises(ValueError, match=f"progress of {samples} in {total}"):
        AlphaSchedule(1.0, "linear")(samples, total)


def test_a_scheduled_alpha_is_no_parameter_and_survives_a_checkpoint():
    alpha = Alpha(AlphaSchedule(1.0, "linear"), learned=False)
    assert not list(alpha.parameters())
    alpha.set_progress(30, 100)
    other = Alpha(AlphaSchedule(1.0, "linear"), learned=False)
    other.load_state_dict(alpha.state_dict())
    assert other().item() == alpha().item() == pytest.approx(0.7)


def test_progress_does_not_touch_a_learned_alpha():
    alpha = Alpha(AlphaSchedule(0.8), learned=True)
    alpha.set_progress(50, 100)
    assert alpha().item() == pytest.approx(0.8)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("sides", [1, 2, 5])
def test_dense_weights_sum_to_one_and_start_by_the_odds_of_alpha(sides, learned):
    weights = DenseAlpha(AlphaSchedule(0.8), learned, sides)().detach()
    assert weights.shape == (sides + 1,)
    assert weights.sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(weights[0] / weights[1:], torch.full((sides,), 4.0))


def test_dense_weights_start_equal_as_the_authors_do():
    torch.testing.assert_close(DenseAlpha(AlphaSchedule(), True, 3)(), torch.full((4,), 0.25))


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, [1, 0, 0]), (0.0, [0, 0.5, 0.5])])
def test_dense_weights_are_finite_at_the_ends(alpha, expected):
    assert DenseAlpha(AlphaSchedule(alpha), False, 2)().tolist() == expected


def test_a_scheduled_dense_alpha_moves_all_weights():
    alpha = DenseAlpha(AlphaSchedule(1.0, "linear"), False, 2)
    alpha.set_progress(50, 100)
    torch.testing.assert_close(alpha(), torch.full((3,), 1 / 3))


def test_a_whole_number_is_as_good_as_any_other():
    assert Alpha(AlphaSchedule(1), learned=False).value.dtype == torch.float32
