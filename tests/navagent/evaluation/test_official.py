"""The official evaluation without Habitat: walks done again here, and how results are compared."""

import dataclasses
import importlib.util

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from envs.episodes import heading_of
from envs.simulators.base import Action
from navagent.build import load_split, make_vector_env
from navagent.cli import main
from navagent.config import ConfigError, load_config, to_yaml
from navagent.evaluation.agents import ExpertAgent, RandomAgent
from navagent.evaluation.command import EvaluateOptions, evaluate_run
from navagent.evaluation.evaluate import evaluate_agent
from navagent.evaluation.official import BUILT_IN, HABITAT, REPLAYED, Walk, compare, replay
from navagent.runs import Run
from navagent.scenes import generate


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Two small generated homes."""
    return generate(
        tmp_path_factory.mktemp("homes") / "two", 2, 0, train_episodes=4, val_episodes=6, num_workers=1
    )


def settings_of(homes, *overrides):
    return load_config(
        ["scenes=dataset", f"scenes.dataset={homes}", "env.max_steps=60", "num_threads=1", *overrides]
    )


def walked(config, agent, split):
    """What an agent did in the built-in simulator, as if it had been in Habitat."""
    blind = dataclasses.replace(config.sensors, rgb=False, depth=False)
    env = make_vector_env(
        dataclasses.replace(config, sensors=blind),
        split.episodes,
        split.scenes,
        4,
        "once",
        AutoresetMode.NEXT_STEP,
    )
    results = evaluate_agent(env, agent)
    env.close()
    return results, [
        as_walk(episode, result) for episode, result in zip(split.episodes, results, strict=True)
    ]


def as_walk(episode, result):
    measured = {name: getattr(result, name) for name in ("success", "spl", "soft_spl", "distance_to_goal")}
    collided = np.zeros(result.steps, bool)
    collided[: result.collisions] = True
    return Walk(
        episode,
        tuple(Action(choice) for choice in result.choices[:, 0]),
        result.positions,
        result.yaws,
        collided,
        result.geodesic_distance,
        measured,
        result.reward,
    )


@pytest.mark.parametrize("agent", [ExpertAgent, RandomAgent])
def test_the_same_actions_give_the_same_result(homes, agent):
    config = settings_of(homes)
    split = load_split(config, "val")
    results, walks = walked(config, agent(), split)
    again = replay(walks[::-1], config, split.scenes)[::-1]
    for first, second in zip(results, again, strict=True):
        assert dataclasses.replace(second, agent=first.agent) == first
        assert np.array_equal(first.positions, second.positions)


def test_noisy_motion_is_followed_and_not_drawn_again(homes):
    """The walk's own places, measured anew: noise drawn again would lead elsewhere."""
    config = settings_of(homes, "env.actuation_noise=0.5")
    split = load_split(config, "val")
    results, walks = walked(config, ExpertAgent(), split)
    for first, second in zip(results, replay(walks, config, split.scenes), strict=True):
        assert np.allclose(first.positions, second.positions)
        assert second.spl == pytest.approx(first.spl, abs=1e-5)
        assert (second.success, second.steps, second.collisions) == (
            first.success,
            first.steps,
            first.collisions,
        )


def test_a_walk_as_a_result_has_habitats_numbers(homes):
    config = settings_of(homes)
    results, walks = walked(config, ExpertAgent(), load_split(config, "val"))
    for result, walk in zip(results, walks, strict=True):
        found = walk.result("run, habitat-lab")
        for name in (
            "success",
            "spl",
            "soft_spl",
            "distance_to_goal",
            "steps",
            "collisions",
            "geodesic_distance",
        ):
            assert getattr(found, name) == getattr(result, name), name
        assert found.path_length == pytest.approx(result.path_length, abs=1e-4)


def three(make_result, spl, again=None, own=None):
    """An agent's three evaluations of as many episodes as there are numbers."""
    made = [
        [make_result(number, success=value > 0, spl=value) for number, value in enumerate(values)]
        for values in (spl, again or spl, own or spl)
    ]
    return dict(zip((HABITAT, REPLAYED, BUILT_IN), made, strict=True))


def test_agreement_is_of_every_episode(make_result):
    assert compare(three(make_result, [0.5, 0.0, 0.8], [0.5009, 0.0, 0.8])).agrees
    # The means are the same, and the episodes are not.
    found = compare(three(make_result, [0.5, 0.6, 0.8], [0.6, 0.5, 0.8]))
    assert not found.agrees
    assert found.disagreeing == ("homes/home_001.glb 0", "homes/home_001.glb 1")
    assert found.apart["spl"] == pytest.approx(0.1)
    assert "DISAGREES" in str(found)
    assert found.to_json()["agrees"] is False


def test_means_are_held_against_each_others_intervals(make_result):
    rng = np.random.default_rng(0)
    values = rng.uniform(0.6, 1.0, 100).tolist()
    near = compare(three(make_result, values, own=values[::-1]))
    assert near.within == {"success": True, "spl": True}
    assert near.difference["spl"].mean == pytest.approx(0.0)
    lower = compare(three(make_result, values, own=[value - 0.2 for value in values]))
    assert lower.within == {"success": True, "spl": False}
    assert lower.difference["spl"].mean == pytest.approx(0.2)
    assert "spl: habitat-lab minus the built-in simulator +0.200" in str(lower)


def test_distances_that_no_path_covers_agree_where_both_have_none(make_result):
    infinite = [make_result(0, spl=float("nan"))]
    assert compare({HABITAT: infinite, REPLAYED: infinite, BUILT_IN: infinite}).agrees


@pytest.mark.parametrize("turn", [0.0, 1.0, -2.5, 3.0])
def test_headings_are_those_of_quaternions(turn):
    assert heading_of((0.0, np.sin(turn / 2), 0.0, np.cos(turn / 2))) == pytest.approx(turn)


@pytest.mark.skipif(
    importlib.util.find_spec("habitat_sim") is not None, reason="habitat-sim is installed here"
)
def test_without_habitat_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NAVAGENT_DEBUG", "0")
    run = Run.create(tmp_path / "run", to_yaml(load_config([])))
    assert main(["evaluate", str(run.path), "--official", "--device", "cpu"]) == 2
    message = capsys.readouterr().err
    assert "--official: habitat-sim is needed and does not import here" in message
    assert "No module named 'habitat_sim'" in message
    assert "docs/habitat.md" in message
    with pytest.raises(ConfigError, match="navagent doctor"):
        evaluate_run(EvaluateOptions(str(run.path), official=True, device="cpu"))
