"""The official evaluation with real habitat-sim and habitat-lab; skipped where they are not installed."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from envs.simulators.base import Action
from navagent.agent_spaces import action_space, observation_space
from navagent.build import load_split, make_vector_env, policy_settings
from navagent.cli import main
from navagent.config import load_config, to_yaml
from navagent.evaluation.agents import ExpertAgent, RandomAgent
from navagent.evaluation.evaluate import evaluate_agent
from navagent.evaluation.habitat_settings import habitat_settings, to_hydra
from navagent.evaluation.official import (
    AGREEMENT,
    HABITAT,
    REPLAYED,
    open_habitat,
    play,
    replay,
)
from navagent.habitat_agent import NavagentAgent
from navagent.real_habitat import HabitatMissingError, import_habitat
from navagent.runs import Run
from navagent.scenes import generate
from policies.actor_critic import NavigationPolicy

try:
    import_habitat()
except HabitatMissingError as error:
    pytest.skip(f"no real Habitat: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Generated homes, one of them for val."""
    return generate(
        tmp_path_factory.mktemp("homes") / "two", 2, 0, train_episodes=4, val_episodes=6, num_workers=1
    )


@pytest.fixture
def habitat_of(homes, tmp_path):
    """habitat-lab's environment over the val episodes from some on, for some settings."""
    opened = []

    def make(*overrides, first=0):
        config = load_config(
            ["scenes=dataset", f"scenes.dataset={homes}", "num_threads=1", "device=cpu", *overrides]
        )
        split = load_split(config, "val")
        settings = habitat_settings(config, homes / "episodes" / "val" / "val.json.gz", homes)
        file = tmp_path / "habitat.yaml"
        file.write_text(to_hydra(settings, "for a test"))
        opened.append(open_habitat(file, split, split.episodes[first:]))
        return opened[-1], config, split

    yield make
    for env in opened:
        env.close()


class Scripted:
    """Does in Habitat what was done here, episode by episode."""

    def __init__(self, scripts):
        self._scripts = scripts

    def reset(self, draws=None):
        self._left = list(self._scripts[draws])

    def act(self, observations):
        return {"action": Action(self._left.pop(0)).name.lower()}


def scripts_of(agent, config, split, seed=0):
    """What an agent does in the built-in simulator, by the name of the episode's random choices."""
    blind = dataclasses.replace(config.sensors, rgb=False, depth=False)
    calm = dataclasses.replace(config.env, actuation_noise=0.0)
    env = make_vector_env(
        dataclasses.replace(config, sensors=blind, env=calm),
        split.episodes,
        split.scenes,
        4,
        "once",
        AutoresetMode.NEXT_STEP,
    )
    results = evaluate_agent(env, agent, seed)
    env.close()
    return {f"{seed} {r.scene_id} {r.episode_id}": r.choices[:, 0] for r in results}


@pytest.mark.parametrize(
    ("agent", "overrides"),
    [
        (ExpertAgent, ()),
        (RandomAgent, ("env.max_steps=150",)),
        (RandomAgent, ("env.max_steps=150", "env.allow_sliding=false", "env.forward_step=0.4")),
        (ExpertAgent, ("env.turn_angle_deg=30", "env.success_distance=0.36", "env.agent_radius=0.18")),
    ],
    ids=["expert", "random", "random without sliding", "expert with wide turns"],
)
def test_the_same_actions_lead_to_the_same_places_and_measures(habitat_of, agent, overrides, request):
    if "env.allow_sliding=false" in overrides:
        _require_the_newer_rule(request.getfixturevalue("reference_dir"))
    env, config, split = habitat_of("sensors=blind", *overrides)
    walks = play(env, Scripted(scripts_of(agent(), config, split)), split, split.episodes, config.env)
    again = replay(walks, config, split.scenes)
    for walk, ours in zip(walks, again, strict=True):
        theirs = walk.result("habitat-lab")
        assert theirs.success == ours.success
        assert theirs.spl == pytest.approx(ours.spl, abs=AGREEMENT)
        assert theirs.soft_spl == pytest.approx(ours.soft_spl, abs=AGREEMENT)
        assert theirs.distance_to_goal == pytest.approx(ours.distance_to_goal, abs=AGREEMENT)
        assert theirs.reward == pytest.approx(ours.reward, abs=0.01)
        assert (theirs.steps, theirs.collisions) == (ours.steps, ours.collisions)
        assert np.abs(theirs.positions - ours.positions).max() < AGREEMENT
    if agent is ExpertAgent:
        assert all(walk.measured["success"] for walk in walks)


def _require_the_newer_rule(folder):
    """Skips where habitat-sim ends moves without sliding as it did before February 2026."""
    import habitat_sim

    finder, recorded = habitat_sim.PathFinder(), np.load(folder / "studio.reference.npz")
    finder.load_nav_mesh(str(folder / "studio.navmesh"))
    moves = zip(recorded["step_start"], recorded["step_target"], strict=True)
    ends = np.array([finder.try_step_no_sliding(start, target) for start, target in moves])
    if np.abs(ends - recorded["step_no_slide"]).max() > 1e-3:
        pytest.skip("this habitat-sim is older than February 2026: it ends moves without sliding otherwise")


def test_noisy_motion_errs_and_is_measured_alike(habitat_of):
    """An episode's noise is its own: it is the same where other episodes are left out."""
    noisy = ("sensors=blind", "env.actuation_noise=0.5", "env.max_steps=40")
    env, config, split = habitat_of(*noisy)
    agent = Scripted(scripts_of(ExpertAgent(), config, split))
    from navagent.evaluation.habitat_noise import NoisyMotionError

    try:
        walks = play(env, agent, split, split.episodes, config.env)
    except NoisyMotionError as error:
        pytest.skip(str(error))
    for walk, ours in zip(walks, replay(walks, config, split.scenes), strict=True):
        theirs = walk.result("habitat-lab")
        steps = np.linalg.norm(np.diff(walk.positions, axis=0), axis=1)
        moved = np.array(walk.actions) == Action.MOVE_FORWARD
        assert steps[moved & ~walk.collided].std() > 0.005
        assert theirs.success == ours.success
        assert theirs.spl == pytest.approx(ours.spl, abs=AGREEMENT)
    env, config, split = habitat_of(*noisy, first=4)
    for alone, among in zip(play(env, agent, split, split.episodes[4:], config.env), walks[4:], strict=True):
        assert np.array_equal(alone.positions, among.positions)


@pytest.mark.parametrize(
    "overrides",
    [
        ("sensors.gps=true", "sensors.compass=true"),
        (
            "sensors.goal=pointgoal",
            "sensors.height=48",
            "sensors.width=80",
            "sensors.hfov_deg=70",
            "sensors.sensor_height=0.88",
            "sensors.pitch_deg=-20",
            "sensors.min_depth=0.5",
            "sensors.max_depth=5",
        ),
    ],
    ids=["usual", "tilted"],
)
def test_an_agent_sees_there_what_it_sees_here(habitat_of, overrides):
    env, config, split = habitat_of("sensors=rgbd", *overrides)
    here = make_vector_env(config, split.episodes, split.scenes, len(split.episodes), "once")
    seen, _ = here.reset(seed=0)
    here.close()
    by_episode = {split.episodes[index].episode_id: row for row, index in enumerate(here.current_episodes())}
    for _ in split.episodes:
        there = env.reset()
        row = by_episode[env.current_episode.episode_id]
        for name in set(seen) - {"previous_action"}:
            ours, theirs = seen[name][row].numpy(), there[name]
            assert ours.shape == theirs.shape, name
            assert ours.dtype == theirs.dtype, name
            error = np.abs(ours.astype(np.float64) - theirs)
            if name == "rgb":
                assert 10 * np.log10(255**2 / np.mean(error**2)) > 25
            elif name == "depth":
                assert np.median(error) < 1e-3
            else:
                assert error.max() < 1e-3, name


@pytest.fixture(scope="module")
def run(homes, tmp_path_factory):
    """A run whose agent has random weights."""
    config = load_config(
        [
            "scenes=dataset",
            f"scenes.dataset={homes}",
            "sensors=rgbd",
            "env.max_steps=30",
            "memory.hidden_size=16",
            "encoder.image_features=16",
            "encoder.weights=random",
            "num_threads=1",
        ]
    )
    torch.manual_seed(0)
    policy = NavigationPolicy(
        observation_space(config), action_space(config), lambda _: 0.0, **policy_settings(config, True)
    )
    run = Run.create(tmp_path_factory.mktemp("runs") / "run", to_yaml(config))
    run.save_checkpoint(0, {"policy": policy.state_dict(), "frames": 0})
    return run


def test_the_command_shows_both_and_habitats_benchmark_agrees(run, capsys, monkeypatch):
    import habitat

    monkeypatch.setenv("COLUMNS", "160")
    command = ["evaluate", str(run.path), "--official", "--deterministic", "--device", "cpu"]
    assert main([*command, "simulator.gpu_ids=-1"]) == 0
    shown = capsys.readouterr().out
    assert "agrees with habitat-lab on the same actions" in shown
    out = run.path / "evaluation" / "val-official"
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["agents"]) == [f"run, {name}" for name in (HABITAT, REPLAYED, "built-in simulator")]
    assert summary["official"]["run"]["agrees"] is True
    lines = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    assert [line["agent"] for line in lines] == [name for name in summary["agents"] for _ in range(6)]
    assert "val-official" in (run.path / "report.html").read_text()

    benchmark = habitat.Benchmark(str(out / "habitat.yaml"))
    agent = NavagentAgent(run.path, device="cpu", deterministic=True)
    found = benchmark.evaluate(agent)
    official = summary["agents"][f"run, {HABITAT}"]
    for name in ("success", "spl", "soft_spl", "distance_to_goal"):
        assert found[name] == pytest.approx(official[name]["mean"], abs=1e-6), name
    benchmark._env.close()


def test_agents_that_know_more_than_habitat_tells_are_refused(run, capsys):
    assert main(["evaluate", str(run.path), "--official", "--agents", "run,expert"]) == 2
    assert "'expert' is no trained agent" in capsys.readouterr().err
