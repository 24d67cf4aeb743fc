import io
import math

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from navagent.evaluation.metrics import (
    MEASURES,
    Measure,
    bootstrap_interval,
    estimate,
    from_json,
    paired_difference,
    results_table,
    summarise,
    to_json,
    wilson_interval,
)
from navagent.evaluation.results import EpisodeResult, read_results, write_results


def result(index, success=True, spl=0.5, scene="a", agent="run", **changes):
    values = dict(
        agent=agent,
        scene_id=scene,
        episode_id=str(index),
        success=success,
        spl=spl,
        soft_spl=spl,
        distance_to_goal=0.1,
        geodesic_distance=5.0,
        path_length=6.0,
        steps=40,
        collisions=2,
        reward=3.0,
        start=(0.0, 0.0, 0.0),
        goal=(1.0, 0.0, 2.0),
    )
    return EpisodeResult(**{**values, **changes})


@pytest.mark.parametrize(("successes", "count"), [(0, 1), (0, 20), (20, 20), (3, 7), (75, 100), (499, 1000)])
def test_wilson_interval_is_scipys(successes, count):
    expected = stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "count"), [(1, 0), (3, 2), (-1, 5)])
def test_wilson_interval_refuses_what_is_no_rate(successes, count):
    with pytest.raises(ValueError, match="not a rate"):
        wilson_interval(successes, count)


def test_bootstrap_interval_is_scipys_up_to_resampling_noise():
    values = np.random.default_rng(0).exponential(size=60)
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    ours = bootstrap_interval(values, seed=2, resamples=20_000)
    assert ours == pytest.approx((expected.low, expected.high), abs=0.05 * values.std())


def test_bootstrap_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(3).normal(2.0, 1.0, size=4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    expected = (values.mean() - half, values.mean() + half)
    assert bootstrap_interval(values) == pytest.approx(expected, abs=0.05 * half * 2)


def test_bootstrap_interval_depends_on_the_seed_alone():
    values = np.arange(30.0)
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)


def test_interval_over_groups_of_one_is_the_interval_over_episodes():
    values = np.random.default_rng(0).random(25)
    groups = [f"{index:02d}" for index in range(25)]
    assert bootstrap_interval(values, groups=groups) == pytest.approx(bootstrap_interval(values))


def test_interval_over_groups_sees_that_equal_episodes_tell_nothing_new():
    """Ten scenes whose episodes all agree are ten observations, however many the episodes."""
    per_scene = np.random.default_rng(1).random(10)
    values, groups = np.repeat(per_scene, 50), np.repeat(np.arange(10), 50)
    assert bootstrap_interval(values, groups=groups) == pytest.approx(bootstrap_interval(per_scene))
    low, high = bootstrap_interval(values)
    wide_low, wide_high = bootstrap_interval(values, groups=groups)
    assert wide_high - wide_low > 5 * (high - low)


def test_estimate_is_the_mean_inside_its_interval_and_skips_what_is_infinite():
    results = [
        result(index, distance_to_goal=distance) for index, distance in enumerate([1.0, math.inf, 2.0])
    ]
    value = estimate(results, Measure("distance_to_goal", "distance"))
    assert value.mean == 1.5
    assert value.count == 2
    assert 1.0 <= value.low <= value.mean <= value.high <= 2.0
    assert value.over_scenes is None


def test_summary_holds_every_measure_and_survives_json():
    results = [
        result(index, success=index % 3 == 0, spl=index / 10, scene="ab"[index % 2]) for index in range(9)
    ]
    summary = summarise(results)
    assert list(summary) == [measure.name for measure in MEASURES]
    assert summary["success"].mean == pytest.approx(1 / 3)
    assert from_json(to_json(summary)) == summary


def test_paired_difference_cancels_how_hard_the_episodes_are():
    hard = np.random.default_rng(0).random(50)
    ours = [result(index, spl=value + 0.01) for index, value in enumerate(hard)]
    theirs = [result(index, spl=value, agent="other") for index, value in enumerate(hard)][::-1]
    difference = paired_difference(ours, theirs, "spl")
    assert difference.mean == pytest.approx(0.01)
    assert 0 < difference.low <= difference.high < 0.02


def test_paired_difference_needs_episodes_in_common():
    with pytest.raises(ValueError, match="no episode in common"):
        paired_difference([result(0)], [result(1)], "spl")


def test_table_shows_means_and_intervals():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(results_table({"run": summarise([result(0), result(1, success=False)])}, "val"))
    text = console.export_text()
    assert "0.500" in text
    low, high = wilson_interval(1, 2)
    assert f"{low:.3f}–{high:.3f}" in text


def test_results_come_back_from_their_file(tmp_path):
    results = [result(0), result(1, success=False, distance_to_goal=math.inf)]
    write_results(results, tmp_path / "episodes.jsonl")
    assert read_results(tmp_path / "episodes.jsonl") == results


@pytest.mark.parametrize("line", ["{", "[]", '{"agent": "run"}', "null"])
def test_a_broken_line_of_results_is_named(tmp_path, line):
    path = tmp_path / "episodes.jsonl"
    write_results([result(0)], path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"episodes\.jsonl, line 2"):
        read_results(path)
