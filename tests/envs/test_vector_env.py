from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from envs.noise import NoiseConfig
from envs.sampler import EpisodeSampler
from envs.simulators.base import Action
from envs.task import PointNavConfig
from envs.vector_env import PointNavVectorEnv

STOP, FORWARD, LEFT = int(Action.STOP), int(Action.MOVE_FORWARD), int(Action.TURN_LEFT)
SENSORS = ["rgb", "depth", "pointgoal_with_gps_compass", "gps", "compass", "previous_action"]


@pytest.fixture
def make(flat_simulator, episode, rgb, depth):
    """Environments in three rooms, of episodes that start at different places and headings."""

    def env(num_envs=3, config=None, num=9, sampling=None, **settings):
        rng = np.random.default_rng(0)
        scenes = [f"room{index}.glb" for index in range(3)]
        episodes = []
        for number in range(num):
            start, goal = rng.uniform(-4, 4, (2, 3)) * [1, 0, 1]
            yaw = rng.uniform(-3, 3)
            episodes.append(episode(number, scenes[number % 3], tuple(start), yaw, tuple(goal)))
        files = {scene: Path(scene) for scene in scenes}
        sampler = EpisodeSampler(episodes, num_envs, files, **(sampling or {}))
        simulator = flat_simulator(num_envs, [rgb, depth], scenes=scenes)
        settings.setdefault("observations", SENSORS)
        return PointNavVectorEnv(simulator, config or PointNavConfig(), sampler, **settings)

    return env


def script(env, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(env.single_action_space.n, (env.num_envs,), generator=generator) for _ in range(steps)
    ]


def flat(value):
    """All leaves of nested dictionaries and tuples, for comparison."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in flat(item)]
    if isinstance(value, tuple):
        return [leaf for item in value for leaf in flat(item)]
    return [torch.as_tensor(value) if not isinstance(value, list) else value]


def same(a, b):
    return all(
        x == y if isinstance(x, list) else torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True)
    )


def test_observations_lie_in_the_declared_space(make):
    env = make(output="numpy")
    observations, _ = env.reset(seed=0)
    assert env.observation_space.contains(observations)
    for actions in script(env, 20):
        observations = env.step(actions)[0]
        assert env.observation_space.contains(observations)


def test_torch_and_numpy_output_are_equal(make):
    by_torch, by_numpy = make(output="torch"), make(output="numpy")
    assert same(by_torch.reset(seed=3), by_numpy.reset(seed=3))
    for actions in script(by_torch, 30):
        ours, theirs = by_torch.step(actions), by_numpy.step(actions.numpy())
        assert isinstance(theirs[1], np.ndarray) and isinstance(ours[1], torch.Tensor)
        assert same(ours, theirs)


@pytest.mark.parametrize("noise", [NoiseConfig(), NoiseConfig(rgb=0.1, depth=1.0, actuation=0.5)])
def test_same_seed_same_trajectory(make, noise):
    env = make(noise=noise, config=PointNavConfig(max_steps=10))
    runs = [[env.reset(seed=5), *(env.step(actions) for actions in script(env, 40))] for _ in range(2)]
    assert all(same(a, b) for a, b in zip(*runs, strict=True))
    assert not same(env.reset(seed=6), runs[0][0])


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_saved_state_goes_on_exactly(make, mode):
    settings = {
        "noise": NoiseConfig(rgb=0.1, depth=1.0, actuation=0.5),
        "config": PointNavConfig(max_steps=7),
        "sampling": {"max_resident_scenes": 2, "scene_steps": 5},
        "autoreset_mode": mode,
    }
    first, second = make(**settings), make(**settings)
    first.reset(seed=1)
    for actions in script(first, 23):
        last = first.step(actions)[0]
    second.reset(seed=99)
    assert same(second.load_state_dict(first.state_dict()), last)
    for actions in script(first, 40, seed=1):
        assert same(first.step(actions), second.step(actions))


def test_same_step_autoreset_gives_the_new_episode_and_keeps_the_last_observation(make):
    env = make(output="torch")
    observations, _ = env.reset(seed=0)
    actions = torch.tensor([FORWARD, STOP, LEFT])
    before = env.current_episodes()
    new, _, terminated, _, infos = env.step(actions)
    assert terminated.tolist() == [False, True, False]
    assert infos["_final_obs"].tolist() == [False, True, False]
    last = infos["final_obs"]
    # The agent that stopped saw what it had seen; the others' final observation is the current one.
    assert torch.equal(last["rgb"][1], observations["rgb"][1])
    assert last["previous_action"].tolist() == [2, 1, 3]
    assert new["previous_action"].tolist() == [2, 0, 3]
    for name in new:
        assert torch.equal(last[name][[0, 2]], new[name][[0, 2]]), name
    episode = env.sampler.episodes[env.current_episodes()[1]]
    assert env.simulator.position[1].tolist() == pytest.approx(episode.start_position)
    ended = env.sampler.episodes[before[1]]
    assert infos["episode_id"] == [None, ended.episode_id, None]
    assert infos["final_info"]["scene_id"] == [None, ended.scene_id, None]
    assert infos["episode"]["l"].tolist() == [0, 1, 0]


def test_next_step_autoreset_ignores_the_action_after_the_end(make):
    env = make(autoreset_mode=AutoresetMode.NEXT_STEP)
    env.reset(seed=0)
    _, _, terminated, _, infos = env.step(torch.tensor([FORWARD, STOP, LEFT]))
    assert terminated.tolist() == [False, True, False] and "final_obs" not in infos
    assert env.active.tolist() == [True, False, True]
    new, reward, terminated, _, infos = env.step(torch.tensor([FORWARD, FORWARD, LEFT]))
    assert reward[1] == 0 and not terminated.any() and infos == {}
    assert new["previous_action"].tolist() == [2, 0, 3]
    episode = env.sampler.episodes[env.current_episodes()[1]]
    assert env.simulator.position[1].tolist() == pytest.approx(episode.start_position)


def test_disabled_autoreset_waits_for_a_reset_by_mask(make):
    env = make(autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    env.step(torch.tensor([FORWARD, STOP, LEFT]))
    with pytest.raises(ValueError, match=r"agents \[1\] have ended"):
        env.step(torch.tensor([FORWARD, FORWARD, LEFT]))
    others = env.simulator.position[[0, 2]]
    env.reset(options={"reset_mask": np.array([False, True, False])})
    assert torch.equal(env.simulator.position[[0, 2]], others)
    assert env.active.all()
    env.step(torch.tensor([FORWARD, FORWARD, LEFT]))


def test_each_episode_once_then_agents_stand_still(make):
    env = make(sampling={"mode": "once"}, num=8)
    env.reset(seed=0)
    seen = []
    while env.active.any():
        infos = env.step(env.expert_actions())[4]
        if "_episode" in infos:
            seen += [name for name in infos["episode_id"] if name is not None]
    assert sorted(seen) == [str(number) for number in range(8)]
    before = env.simulator.position.clone()
    _, reward, terminated, truncated, infos = env.step(torch.full((3,), FORWARD))
    assert not reward.any() and not (terminated | truncated).any() and infos == {}
    assert torch.equal(env.simulator.position, before)


@pytest.mark.parametrize("sampling", [{"mode": "once"}, {}])
def test_rotating_scenes_show_every_agent_its_own_scene(make, sampling):
    env = make(sampling={**sampling, "max_resident_scenes": 2, "scene_steps": 4}, num=12)
    env.reset(seed=0)
    shown = set()
    for _ in range(300):
        if not env.active.any():
            break
        env.step(env.expert_actions())
        for agent in torch.nonzero(env.active).flatten().tolist():
            scene = env.sampler.episodes[env.current_episodes()[agent]].scene_id
            assert str(env.simulator.scenes[env.simulator.scene[agent]]) == scene
            shown.add(scene)
    assert shown == {"room0.glb", "room1.glb", "room2.glb"}
    assert all(len(scenes) == 2 for scenes in env.simulator.loads[1:])


def test_one_agent_gets_each_episode_of_rotating_scenes_at_its_reset(make):
    env = make(1, sampling={"mode": "once", "max_resident_scenes": 2}, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    seen = env.current_episodes()
    for _ in range(8):
        env.reset(options={"reset_mask": [True]})
        assert env.active.all()
        seen += env.current_episodes()
    assert sorted(seen) == list(range(9))
    env.reset(options={"reset_mask": [True]})
    assert not env.active.any()


def test_curriculum_applies_to_new_episodes(make):
    env = make(num=30)
    env.reset(seed=0)
    env.set_max_geodesic(3.0)
    env.step(torch.full((3,), STOP))
    assert (env.task.measured.start_distance <= 3.0).all()


def test_blind_agents_are_not_rendered(make):
    env = make(observations=["pointgoal_with_gps_compass"])
    env.simulator.render = None  # would fail if called
    env.reset(seed=0)
    env.step(torch.full((3,), FORWARD))


def test_three_actions_where_stop_is_automatic(make):
    env = make(config=PointNavConfig(stop="automatic"), sampling={"mode": "once"})
    assert env.single_action_space.n == 3 and env.single_observation_space["previous_action"].n == 4
    env.reset(seed=0)
    success = []
    while env.active.any():
        infos = env.step(env.expert_actions())[4]
        if "_episode" in infos:
            success += infos["episode"]["success"][infos["_episode"]].tolist()
    assert success == [1.0] * 9


def test_frames_are_what_the_first_colour_camera_sees(make):
    env = make(render_mode="rgb_array")
    observations, _ = env.reset(seed=0)
    frames = env.render()
    assert len(frames) == 3
    assert all(
        np.array_equal(frame, obs.numpy()) for frame, obs in zip(frames, observations["rgb"], strict=True)
    )


def test_depth_is_scaled_to_its_range(make):
    env = make(depth_range=(1.0, 5.0))
    observations, _ = env.reset(seed=0)
    metres = env.simulator.position[:, 0] + 5.0
    expected = ((metres - 1.0) / 4.0).clamp(0.0, 1.0)
    assert torch.allclose(observations["depth"][:, 0, 0, 0], expected, atol=1e-6)


@pytest.mark.parametrize(
    "actions",
    [torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0, 1, 4]), np.array([-1, 0, 0])],
)
def test_wrong_actions_are_refused(make, actions):
    env = make()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="actions"):
        env.step(actions)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"observations": ["sonar"]}, "'sonar' is not one of rgb, depth"),
        ({"output": "jax"}, "jax"),
        ({"render_mode": "human"}, "human"),
        ({"depth_range": (2.0, 1.0)}, "depth_range"),
    ],
)
def test_wrong_settings_are_refused(make, settings, match):
    with pytest.raises(ValueError, match=match):
        make(**settings)


def test_closing_closes_the_simulator_once(make):
    env = make()
    env.close()
    env.close()
    assert env.simulator.closed == 1
