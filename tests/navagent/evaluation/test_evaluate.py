import math
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from envs.sampler import EpisodeSampler
from envs.simulators.base import Action, AgentSpec
from envs.simulators.workers.pool import Body, WorkerDiedWarning
from envs.simulators.workers.simulator import WorkerSimulator
from envs.task import PointNavConfig
from envs.vector_env import PointNavVectorEnv
from navagent.evaluation.agents import (
    BASELINES,
    ExpertAgent,
    ForwardAgent,
    GoalAgent,
    PolicyAgent,
    RandomAgent,
    unless_sure,
)
from navagent.evaluation.departures import by_scene, departures
from navagent.evaluation.evaluate import evaluate_agent, spread


def test_every_episode_is_evaluated_once_and_in_order(flat_env, make_episode):
    episodes = [make_episode(n, goal=(0.0, 0.0, -1.0 - 0.25 * n)) for n in range(11)]
    for num_envs in (1, 4, 11, 16):
        results = evaluate_agent(flat_env(episodes, num_envs), ExpertAgent())
        assert [result.episode_id for result in results] == [str(n) for n in range(11)]
        assert [result.geodesic_distance for result in results] == [1.0 + 0.25 * n for n in range(11)]


def test_straight_ahead_has_the_measures_of_a_straight_path(flat_env, make_episode):
    """Eight moves of 0.25 m reach a goal 2 m ahead, the last one just not: stop is called at 0 m, after 8."""
    (result,) = evaluate_agent(flat_env([make_episode(0)]), ForwardAgent())
    assert result.success
    assert result.spl == pytest.approx(1.0)
    assert result.path_length == pytest.approx(2.0)
    assert result.steps == 9
    assert result.collisions == 0
    assert result.distance_to_goal == pytest.approx(0.0, abs=1e-6)
    assert result.reward == pytest.approx(2.0 + 2.5 - 9 * 0.01, abs=1e-5)


def test_tracks_hold_every_pose_from_the_start_to_the_end(flat_env, make_episode):
    episodes = [make_episode(n, goal=(0.0, 0.0, -1.0 - 0.5 * n), yaw=math.pi / 2) for n in range(7)]
    for result in evaluate_agent(flat_env(episodes, 3), ExpertAgent()):
        assert result.positions.shape == (result.steps + 1, 3)
        assert result.yaws.shape == (result.steps + 1,)
        assert result.positions[0].tolist() == list(result.start)
        assert result.yaws[0] == pytest.approx(math.pi / 2)
        moved = np.linalg.norm(np.diff(result.positions, axis=0), axis=1)
        assert moved.sum() == pytest.approx(result.path_length, abs=1e-4)
        assert np.linalg.norm(result.positions[-1] - result.goal) == pytest.approx(
            result.distance_to_goal, abs=1e-5
        )


def test_results_do_not_depend_on_the_size_of_the_batch(flat_env, make_episode):
    rng = np.random.default_rng(0)
    goals = [(float(x), 0.0, float(z)) for x, z in rng.uniform(-4, 4, (9, 2))]
    episodes = [make_episode(n, goal=goal, yaw=float(n)) for n, goal in enumerate(goals)]
    assert evaluate_agent(flat_env(episodes, 2), GoalAgent()) == evaluate_agent(
        flat_env(episodes, 9), GoalAgent()
    )


def test_an_episode_that_is_not_finished_ends_at_the_limit(flat_env, make_episode):
    (result,) = evaluate_agent(flat_env([make_episode(0, goal=(4.0, 0.0, 0.0))]), ForwardAgent())
    assert not result.success
    assert result.spl == 0.0
    assert result.steps == 40
    assert result.collisions == 20


def test_the_expert_never_leaves_itself(flat_env, make_episode):
    episodes = [make_episode(n, goal=(2.0, 0.0, -1.0 - 0.5 * n)) for n in range(4)]
    for result in evaluate_agent(flat_env(episodes, 3), ExpertAgent()):
        assert (result.departures, result.departed) == (0, 0.0)
        assert result.choices.shape == (result.steps, 2)
        assert result.choices[-1].tolist() == [Action.STOP, Action.STOP]


@pytest.mark.parametrize("stop", ["called", "automatic"])
def test_departures_are_counted_where_they_happen(flat_env, make_episode, stop):
    """The goal lies to the left: the expert turns there first, and who walks on leaves it at every step."""
    config = PointNavConfig(max_steps=20, stop=stop)
    episodes = [make_episode(0, goal=(-2.0, 0.0, 0.0)), make_episode(1, goal=(0.0, 0.0, -2.0))]
    aside, ahead = evaluate_agent(flat_env(episodes, 2, config), ForwardAgent())
    assert aside.departures == aside.steps == 20
    assert set(aside.choices[:, 0]) == {Action.MOVE_FORWARD}
    assert aside.choices[0].tolist() == [Action.MOVE_FORWARD, Action.TURN_LEFT]
    assert ahead.success
    assert ahead.departures == 0
    both = departures([aside, ahead])
    assert both.counts[Action.TURN_LEFT, Action.MOVE_FORWARD] > 0
    assert both.counts.sum() == aside.steps + ahead.steps
    assert both.share == pytest.approx(aside.steps / (aside.steps + ahead.steps))
    assert (both.share_in_success, both.share_in_failure) == (0.0, 1.0)
    assert list(by_scene([ahead, aside])) == sorted({aside.scene_id, ahead.scene_id})


def test_scenes_come_by_how_often_the_expert_was_left(make_result):
    left, kept = np.array([[1, 2]] * 3), np.array([[1, 1]] * 3)
    results = [
        make_result(0, scene="a", choices=kept),
        make_result(1, scene="b", choices=left),
        make_result(2, scene="c", choices=np.concatenate([left, kept])),
    ]
    assert list(by_scene(results)) == ["b", "c", "a"]
    assert math.isnan(departures([]).share)
    assert departures([]).to_json()["share"] is None


def test_progress_is_told_up_to_the_last_episode(flat_env, make_episode):
    told = []
    env = flat_env([make_episode(n) for n in range(5)], 2)
    evaluate_agent(env, ExpertAgent(), progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (5, 5)
    assert told == sorted(told)


def test_random_actions_depend_on_the_seed_alone(flat_env, make_episode):
    env = flat_env([make_episode(n, goal=(3.0, 0.0, 3.0)) for n in range(4)], 2)
    before = torch.get_rng_state()
    first = evaluate_agent(env, RandomAgent(), seed=1)
    assert evaluate_agent(env, RandomAgent(), seed=1) == first
    assert evaluate_agent(env, RandomAgent(), seed=2) != first
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("changes", [{"autoreset_mode": AutoresetMode.SAME_STEP}, {"mode": "endless"}])
def test_an_environment_that_would_repeat_or_hide_episodes_is_refused(flat_env, make_episode, changes):
    with pytest.raises(ValueError, match="mode 'once' and next-step autoreset"):
        evaluate_agent(flat_env([make_episode(0)], **changes), ExpertAgent())


@pytest.mark.parametrize("name", sorted(BASELINES))
@pytest.mark.parametrize("stop", ["called", "automatic"])
def test_every_baseline_acts_with_and_without_a_stop_action(flat_env, make_episode, name, stop):
    config = PointNavConfig(max_steps=60, stop=stop)
    episodes = [make_episode(n, yaw=1.0 * n) for n in range(3)]
    results = evaluate_agent(flat_env(episodes, 2, config), BASELINES[name]())
    assert [result.agent for result in results] == [name] * 3
    if name in ("goal", "expert"):
        assert all(result.success for result in results)


def test_goal_agent_does_not_swing_across_the_goal_with_wide_turns(flat_env, make_episode):
    env = flat_env([make_episode(0, yaw=0.27)], 1, agent=AgentSpec(turn_angle_deg=30.0))
    (result,) = evaluate_agent(env, GoalAgent())
    assert result.success


class DicePolicy:
    """Draws its actions with fixed probabilities."""

    logits = torch.tensor([0.02, 0.5, 0.3, 0.18]).log()

    def set_training_mode(self, mode):
        pass

    def initial_memory(self, num_agents):
        return torch.zeros(num_agents, 0)

    def act(self, observations, memory, episode_starts, deterministic):
        logits = self.logits.expand(len(memory), 4)
        return logits.argmax(dim=1), None, None, memory, {}, logits


@pytest.mark.parametrize("make", [RandomAgent, lambda: PolicyAgent(DicePolicy())])
def test_drawn_actions_belong_to_the_episode_not_to_the_batch_or_the_process(flat_env, make_episode, make):
    episodes = [make_episode(n, goal=(3.0, 0.0, 3.0)) for n in range(7)]
    whole = evaluate_agent(flat_env(episodes, 7), make(), seed=3)
    assert len({result.steps for result in whole} | {result.path_length for result in whole}) > 2
    assert evaluate_agent(flat_env(episodes, 2), make(), seed=3) == whole
    parts = [evaluate_agent(flat_env(part, 3), make(), seed=3) for part in (episodes[:4], episodes[4:])]
    assert parts[0] + parts[1] == whole


def test_a_policys_actions_are_drawn_with_its_probabilities(flat_env, make_episode):
    env = flat_env([make_episode(n) for n in range(50)], 50, PointNavConfig(max_steps=200))
    agent = PolicyAgent(DicePolicy())
    agent.begin(env, 0)
    env.reset()
    starts = torch.ones(50, dtype=torch.bool)
    drawn = []
    for _ in range(200):
        drawn.append(agent.act({}, starts))
        starts = torch.zeros_like(starts)
    shares = torch.bincount(torch.cat(drawn), minlength=4) / 10_000
    torch.testing.assert_close(shares, DicePolicy.logits.exp(), atol=0.02, rtol=0)


@pytest.mark.parametrize("num_actions", [3, 4])
def test_only_who_is_sure_turns_back_at_once(num_actions):
    """Against the rule step by step; of three actions, stop is not one."""
    names = ["stop", "forward", "left", "right"][-num_actions:]
    back = {"left": "right", "right": "left"}
    probabilities = torch.rand(200, num_actions, generator=torch.Generator().manual_seed(0))
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    previous = torch.arange(200) % (num_actions + 1)
    kept = unless_sure(probabilities, previous, 0.4)
    changed = 0
    for before, last, after in zip(probabilities, previous.tolist(), kept, strict=True):
        expected = before.clone()
        opposite = back.get(names[last - 1]) if last else None
        if opposite is not None and before[names.index(opposite)] < 0.4:
            expected[names.index(opposite)] = 0.0
            changed += 1
        assert torch.equal(after, expected)
    assert 30 < changed < 100
    assert torch.equal(unless_sure(probabilities, previous, 0.0), probabilities)


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_agent_that_is_not_sure_goes_on_turning(flat_env, make_episode, deterministic):
    env = flat_env([make_episode(n) for n in range(50)], 50, PointNavConfig(max_steps=200))
    agent = PolicyAgent(DicePolicy(), "run", deterministic, turn_back=0.4)
    agent.begin(env, 0)
    env.reset()
    starts = torch.ones(50, dtype=torch.bool)
    previous = torch.full((50,), 3)  # a turn to the left
    after_left = []
    for _ in range(200):
        chosen = agent.act({"previous_action": previous}, starts)
        after_left.append(chosen[previous == 3])
        previous = chosen + 1
        starts = torch.zeros_like(starts)
    taken = torch.cat(after_left)
    if deterministic:
        assert (taken == 1).all()
    else:
        shares = torch.bincount(taken, minlength=4) / len(taken)
        expected = torch.tensor([0.02, 0.5, 0.3, 0.0]) / 0.82
        torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)


def test_random_agent_moves_in_all_ways_and_stops_only_at_the_goal(flat_env, make_episode):
    env = flat_env([make_episode(0, goal=(4.0, 0.0, 4.0))], 1, PointNavConfig(max_steps=400))
    (result,) = evaluate_agent(env, RandomAgent())
    assert result.steps == 400 or result.success
    turns = np.sign(np.round(np.diff(result.yaws), 6))
    shares = [(turns == way).mean() for way in (-1, 0, 1)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.08)


class MemoryPolicy:
    """Counts the steps of an episode in its memory and stops at the ninth; walks straight before."""

    def set_training_mode(self, mode):
        self.mode = mode

    def initial_memory(self, num_agents):
        return torch.full((num_agents, 1), 100.0)

    def act(self, observations, memory, episode_starts, deterministic):
        memory = torch.where(episode_starts[:, None], 0.0, memory) + 1
        actions = torch.where(memory[:, 0] >= 9, 0, 1)
        return actions, None, None, memory, {}, torch.nn.functional.one_hot(actions, 4) * 1000


def test_a_policys_memory_starts_anew_with_each_episode(flat_env, make_episode):
    policy = MemoryPolicy()
    results = evaluate_agent(flat_env([make_episode(n) for n in range(7)], 2), PolicyAgent(policy))
    assert [result.steps for result in results] == [9] * 7
    assert all(result.success for result in results)
    assert policy.mode is False


BODIES = Path(__file__).parents[2] / "envs" / "simulators" / "worker_bodies.py"


class CountingDicePolicy(MemoryPolicy):
    """Draws its way, and stops at the ninth step."""

    def act(self, observations, memory, episode_starts, deterministic):
        actions, _, _, memory, _, logits = super().act(observations, memory, episode_starts, deterministic)
        drawn = DicePolicy.logits.index_fill(0, torch.tensor([0]), -1000.0)
        return actions, None, None, memory, {}, torch.where(actions[:, None] == 0, logits, drawn)


def test_killed_workers_change_no_result(make_episode, tmp_path, monkeypatch):
    """Three agents in two workers, of which one dies now and then, play eleven episodes in two rooms."""
    files = {name: tmp_path / name for name in ("a", "b")}
    for file in files.values():
        file.touch()
    episodes = [make_episode(n, scene="ab"[n // 6], goal=(0.5 * n, 0.0, -2.0 - 0.1 * n)) for n in range(11)]
    kills = []
    original = WorkerSimulator.step

    def step(self, actions):
        original(self, actions)
        if kills and kills[0] == self.steps:
            kills.pop(0)
            os.kill(self.process_ids[self.steps % 2], signal.SIGKILL)
        self.steps += 1

    monkeypatch.setattr(WorkerSimulator, "step", step)
    found = []
    for kills in ([], [0, 3, 4, 15]):
        sampler = EpisodeSampler(episodes, 3, files, mode="once")
        body = Body("flat", BODIES, "FlatBody", [{}] * 2)
        simulator = WorkerSimulator(sampler.resident_scenes, 3, [], body)
        simulator.steps = 0
        env = PointNavVectorEnv(
            simulator,
            PointNavConfig(max_steps=20),
            sampler,
            ["pointgoal"],
            autoreset_mode=AutoresetMode.NEXT_STEP,
        )
        expected = len(kills)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WorkerDiedWarning)
            found.append(evaluate_agent(env, PolicyAgent(CountingDicePolicy()), seed=3))
        assert simulator.restarts == expected and (env.interruptions > expected) == (expected > 0)
        env.close()
    calm, killed = found
    assert [result.to_json() for result in killed] == [result.to_json() for result in calm]
    assert [(result.episode_id, result.steps) for result in killed] == [(str(n), 9) for n in range(11)]
    assert len({result.path_length for result in killed}) > 3
    for ours, theirs in zip(killed, calm, strict=True):
        for name in ("positions", "yaws", "choices"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))


def test_spread_takes_evenly_from_the_scenes(make_episode):
    episodes = [make_episode(n, scene="abc"[n // 4]) for n in range(12)]
    chosen = spread(episodes, 5)
    assert [episode.episode_id for episode in chosen] == ["0", "1", "4", "5", "8"]
    assert spread(episodes, 99) == episodes


class Collapsing(ForwardAgent):
    """Breaks off at its fourth step."""

    steps = 0

    def act(self, observations, starts):
        self.steps += 1
        if self.steps == 4:
            raise IndexError("the roof came down")
        return super().act(observations, starts)


def test_an_evaluation_that_breaks_off_says_in_which_episodes(flat_env, make_episode):
    goals = [0.25, *[5.0] * 19]
    episodes = [make_episode(n, goal=(0.0, 0.0, -z)) for n, z in enumerate(goals)]
    with pytest.raises(IndexError, match="the roof came down") as caught:
        evaluate_agent(flat_env(episodes, 18), Collapsing())
    (note,) = caught.value.__notes__
    place, *agents = note.split("\n  ")
    assert place == "the evaluation of 'forward' broke off after 1 episodes, with its agents in"
    assert agents[0].startswith("agent 0:") and agents[0].endswith("episode 18")
    assert agents[1].endswith("episode 1") and agents[-1] == "and 2 more"
