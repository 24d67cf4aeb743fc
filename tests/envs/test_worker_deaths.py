"""What becomes of episodes whose simulator's worker dies: real processes, really killed."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from envs.gym_env import PointNavEnv
from envs.sampler import EpisodeSampler
from envs.sb3 import SB3VecEnv
from envs.simulators.base import Action, SensorSpec
from envs.simulators.workers.pool import Body, WorkerDiedWarning
from envs.simulators.workers.simulator import WorkerSimulator
from envs.task import PointNavConfig
from envs.vector_env import PointNavVectorEnv

STOP, FORWARD, LEFT = int(Action.STOP), int(Action.MOVE_FORWARD), int(Action.TURN_LEFT)
BODIES = Path(__file__).parent / "simulators" / "worker_bodies.py"
pytestmark = pytest.mark.filterwarnings("ignore::envs.simulators.workers.pool.WorkerDiedWarning")


@pytest.fixture
def make(tmp_path, episode):
    """Environments of 4 agents, two in each of 2 workers; every episode starts elsewhere."""
    made = []
    room = tmp_path / "room.flat"
    room.touch()

    def env(num_envs=4, workers=2, mode="endless", config=None, num=12, **settings):
        episodes = [
            episode(n, "room", (0.5 + 0.25 * n, 0.0, 2.0), 0.0, (0.0, 0.0, -4.0 + 0.1 * n))
            for n in range(num)
        ]
        sampler = EpisodeSampler(episodes, num_envs, {"room": room}, mode=mode)
        body = Body("flat", BODIES, "FlatBody", [{}] * workers)
        depth = SensorSpec("depth", "depth", height=2, width=2)
        simulator = WorkerSimulator([room], num_envs, [depth], body)
        observations = ["depth", "gps", "pointgoal", "previous_action"]
        settings.setdefault("depth_range", (0.0, 1.0))
        made.append(
            PointNavVectorEnv(simulator, config or PointNavConfig(), sampler, observations, **settings)
        )
        return made[-1]

    yield env
    for each in made:
        each.close()


def kill(env, worker):
    process = env.simulator.process_ids[worker]
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)


def actions(*wanted):
    return torch.tensor(wanted)


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def rows(observations, *agents):
    return {name: value[list(agents)] for name, value in observations.items()}


def at_start(env, agent):
    """Whether an agent is at the start of its episode, with nothing done."""
    episode = env.sampler.episodes[env.current_episodes()[agent]]
    return (
        tuple(env.simulator.position[agent].tolist()) == episode.start_position
        and env.simulator.yaw[agent] == 0
        and env.task.measured.steps[agent] == 0
        and env.task.measured.path_length[agent] == 0
        and bool(env.active[agent])
    )


def test_same_step_begins_the_same_episodes_again(make):
    env, calm = make(final_observations="truncated"), make(workers=1)
    first, _ = env.reset(seed=0)
    calm.reset(seed=0)
    before = env.current_episodes()
    for turn in (actions(FORWARD, LEFT, FORWARD, LEFT), actions(FORWARD, FORWARD, LEFT, LEFT)):
        env.step(turn)
        calm.step(turn)
    kill(env, 1)
    forward = actions(*[FORWARD] * 4)
    with pytest.warns(
        WorkerDiedWarning, match="Started again .1 of at most 10 times.; its agents' episodes begin"
    ):
        observations, rewards, terminated, truncated, infos = env.step(forward)
    undisturbed, their_rewards, *_ = calm.step(forward)
    assert not terminated.any() and truncated.tolist() == [False, False, True, True]
    assert set(infos) == {"interrupted", "_interrupted", "final_obs", "_final_obs"}
    for mask in ("interrupted", "_interrupted", "_final_obs"):
        assert infos[mask].tolist() == [False, False, True, True]
    assert torch.equal(rewards, their_rewards)
    # The last observations are those that an undisturbed twin has, and so are those of the others.
    assert same(infos["final_obs"], undisturbed)
    assert same(rows(observations, 0, 1), rows(undisturbed, 0, 1))
    assert same(rows(observations, 2, 3), rows(first, 2, 3))
    assert env.current_episodes() == before
    assert at_start(env, 2) and at_start(env, 3) and not at_start(env, 0)
    assert env.simulator.restarts == 1 and env.interruptions == 2
    # All go on; nobody has skipped an episode.
    *_, infos = env.step(actions(LEFT, LEFT, LEFT, LEFT))
    assert infos == {}
    env.step(actions(*[STOP] * 4))
    for _ in range(2):
        calm.step(actions(*[STOP] * 4))
        assert env.current_episodes() == calm.current_episodes()
        env.step(actions(*[STOP] * 4))
    assert env.interruptions == 2


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_other_modes_show_the_last_observation_and_then_begin_again(make, mode):
    env, calm = make(autoreset_mode=mode), make(workers=1, autoreset_mode=mode)
    first, _ = env.reset(seed=0)
    calm.reset(seed=0)
    before = env.current_episodes()
    forward, left = actions(*[FORWARD] * 4), actions(*[LEFT] * 4)
    env.step(forward)
    calm.step(forward)
    kill(env, 0)
    observations, _, terminated, truncated, infos = env.step(left)
    undisturbed = calm.step(left)[0]
    assert not terminated.any() and truncated.tolist() == [True, True, False, False]
    assert set(infos) == {"interrupted", "_interrupted"}
    assert same(observations, undisturbed)
    assert env.active.tolist() == [False, False, True, True]
    undisturbed = calm.step(forward)[0]
    if mode == AutoresetMode.NEXT_STEP:
        # Goes on from a saved state here too.
        saved = env.state_dict()
        env = make(autoreset_mode=mode)
        assert same(env.load_state_dict(saved), observations)
        observations, rewards, _, truncated, infos = env.step(forward)
        assert rewards[:2].tolist() == [0, 0] and infos == {} and not truncated.any()
        assert same(rows(observations, 2, 3), rows(undisturbed, 2, 3))
    else:
        with pytest.raises(ValueError, match=r"agents \[0, 1\] have ended"):
            env.step(forward)
        observations, _ = env.reset(options={"reset_mask": np.array([True, True, False, False])})
    assert same(rows(observations, 0, 1), rows(first, 0, 1))
    assert env.current_episodes() == before and at_start(env, 0) and at_start(env, 1)
    assert env.active.all()


def test_a_state_of_an_earlier_version_goes_on(make):
    env = make(workers=1, autoreset_mode=AutoresetMode.NEXT_STEP)
    env.reset(seed=0)
    env.step(actions(STOP, LEFT, LEFT, LEFT))
    saved = env.state_dict()
    following = env.step(actions(*[LEFT] * 4))[0]
    del saved["again"]
    env.load_state_dict(saved)
    assert same(env.step(actions(*[LEFT] * 4))[0], following)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_an_episode_that_ended_by_itself_in_that_step_has_ended(make, mode):
    """Agent 2 stops and agent 3 is at its last step; of their worker nobody else is in an episode's midst."""
    env = make(autoreset_mode=mode, config=PointNavConfig(max_steps=3))
    calm = make(workers=1, autoreset_mode=mode, config=PointNavConfig(max_steps=3))
    script = [(STOP, FORWARD, FORWARD, FORWARD), (LEFT, LEFT, LEFT, LEFT), (LEFT, LEFT, STOP, FORWARD)]
    for each in (env, calm):
        each.reset(seed=0)
    for step, turn in enumerate(script):
        if step == 2:
            kill(env, 1)
        ours, theirs = env.step(actions(*turn)), calm.step(actions(*turn))
    assert ours[2].tolist() == [False, False, True, False]
    assert ours[3].tolist() == theirs[3].tolist() == [False, True, False, True]
    assert same(ours[0], theirs[0])
    assert "interrupted" not in ours[4] and ours[4]["_episode"].tolist() == [False, True, True, True]
    assert same(ours[4]["episode"], theirs[4]["episode"])
    assert env.current_episodes() == calm.current_episodes()
    assert env.simulator.restarts == 1 and env.interruptions == 0


def test_one_ends_beside_one_that_begins_again(make):
    env = make()
    observations, _ = env.reset(seed=0)
    env.step(actions(*[FORWARD] * 4))
    before = env.current_episodes()
    kill(env, 1)
    new, _, terminated, truncated, infos = env.step(actions(STOP, LEFT, STOP, FORWARD))
    assert terminated.tolist() == [True, False, True, False]
    assert truncated.tolist() == infos["interrupted"].tolist() == [False, False, False, True]
    assert infos["_episode"].tolist() == [True, False, True, False]
    assert infos["episode"]["steps"].tolist() == [2, 0, 2, 0] and infos["episode_id"][3] is None
    assert infos["_final_obs"].tolist() == [True, False, True, True]
    assert infos["final_obs"]["previous_action"].tolist() == [STOP + 1, LEFT + 1, STOP + 1, FORWARD + 1]
    assert new["previous_action"].tolist() == [0, LEFT + 1, 0, 0]
    assert same(rows(new, 3), rows(observations, 3))
    after = env.current_episodes()
    assert after[0] != before[0] and after[2] != before[2] and after[1::2] == before[1::2]


def test_a_death_while_final_observations_are_drawn_counts_too(make, monkeypatch):
    """All of worker 1 has ended but agent 3; its worker dies when agent 2's last picture is asked for."""
    env = make()
    first, _ = env.reset(seed=0)
    env.step(actions(*[FORWARD] * 4))
    original, asked = env.simulator.render, []

    def render(agents=None):
        asked.append(agents)
        if len(asked) == 1:
            assert agents.tolist() == [2]
            # Its pictures were drawn ahead: others must be.
            env.simulator._settle()
            env.simulator._stale[:] = True
            kill(env, 1)
        return original(agents)

    monkeypatch.setattr(env.simulator, "render", render)
    new, *_, infos = env.step(actions(LEFT, LEFT, STOP, LEFT))
    assert infos["interrupted"].tolist() == [False, False, False, True]
    assert infos["_episode"].tolist() == [False, False, True, False]
    assert same(rows(new, 3), rows(first, 3))
    assert infos["final_obs"]["gps"][3].tolist() != first["gps"][3].tolist()


def test_episodes_at_their_start_lose_nothing_and_those_under_way_do(make):
    env = make(autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    kill(env, 0)
    env.expert_actions()  # finds it dead before the first step
    kill(env, 1)
    env.reset()  # and this one when all start anew
    before = env.current_episodes()
    *_, truncated, infos = env.step(actions(*[FORWARD] * 4))
    assert env.simulator.restarts == 2 and env.interruptions == 0 and infos == {} and not truncated.any()
    # Only agent 0 of worker 0 is reset when that dies: agent 1 notices with its next step.
    env.simulator._settle()
    kill(env, 0)
    env.reset(options={"reset_mask": np.array([True, False, False, False])})
    *_, truncated, infos = env.step(actions(*[FORWARD] * 4))
    assert truncated.tolist() == infos["interrupted"].tolist() == [False, True, False, False]
    assert env.current_episodes()[1:] == before[1:]


def test_a_death_in_between_is_the_next_steps(make):
    env = make()
    env.reset(seed=0)
    env.step(actions(*[FORWARD] * 4))
    kill(env, 0)
    env.expert_actions()
    assert env.simulator.restarts == 1 and not at_start(env, 0)
    *_, infos = env.step(actions(STOP, LEFT, LEFT, LEFT))
    assert infos["_episode"].tolist() == [True, False, False, False]
    assert infos["interrupted"].tolist() == [False, True, False, False]
    assert env.step(actions(*[LEFT] * 4))[4] == {}


def test_episodes_that_are_handed_out_once_are_finished_once(make):
    env = make(mode="once", num=9, config=PointNavConfig(max_steps=12))
    env.reset(seed=0)
    finished, interrupted = [], 0
    for step in range(60):
        if not env.active.any():
            break
        if step in (2, 3, 13, 15):
            kill(env, step % 2)
        current = env.current_episodes()
        *_, infos = env.step(actions(*[FORWARD] * 4))
        finished += [current[agent] for agent in np.flatnonzero(infos.get("_episode", torch.zeros(4)))]
        interrupted += int(infos.get("interrupted", torch.zeros(4)).sum())
        if "_episode" in infos:
            assert (infos["episode"]["steps"][infos["_episode"]] == 12).all()
    assert sorted(finished) == list(range(9))
    assert env.simulator.restarts == 4 and interrupted == env.interruptions > 4


def test_stable_baselines_is_told_of_no_episode(make):
    env = SB3VecEnv(make(output="numpy"))
    first = env.reset()
    env.step(np.array([FORWARD] * 4))
    kill(env.vector_envs[0], 1)
    observations, _, dones, infos = env.step(np.array([STOP, FORWARD, FORWARD, STOP]))
    assert dones.tolist() == [True, False, True, True]
    assert set(infos[2]) == {"terminal_observation", "TimeLimit.truncated", "interrupted"}
    assert infos[2]["TimeLimit.truncated"] and infos[2]["interrupted"] and infos[1] == {}
    assert infos[2]["terminal_observation"]["previous_action"] == FORWARD + 1
    assert infos[3]["episode"]["l"] == 2 and "interrupted" not in infos[3]
    assert np.array_equal(observations["depth"][2], first["depth"][2])
    kill(env.vector_envs[0], 0)
    *_, dones, infos = env.step(np.array([FORWARD] * 4))  # where nobody's episode ends
    assert dones.tolist() == [True, True, False, False] and infos[1]["interrupted"] and infos[2] == {}


def test_a_single_environment_is_reset_to_the_same_episode(make):
    env = PointNavEnv(make(1, 1, output="numpy", autoreset_mode=AutoresetMode.DISABLED))
    first, before = env.reset(seed=3)
    *_, info = env.step(FORWARD)
    assert "interrupted" not in info
    kill(env.vector_env, 0)
    *_, terminated, truncated, info = env.step(FORWARD)
    assert truncated and not terminated and info["interrupted"] and info["steps"] == 2
    again, info = env.reset()
    assert info == before and all(np.array_equal(first[name], again[name]) for name in first)
    env.step(STOP)
    assert env.reset()[1]["episode_id"] != before["episode_id"]
