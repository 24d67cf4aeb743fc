import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3
from stable_baselines3.common.evaluation import evaluate_policy

import envs.make
from envs.episodes import EpisodeError
from envs.gym_env import PointNavEnv
from envs.make import load_split, make_env, make_vector_env, split_file
from envs.noise import NoiseConfig
from envs.registration import ENV_ID, register_envs
from envs.sb3 import SB3VecEnv
from envs.variants import VARIANTS
from envs.vector_env import PointNavVectorEnv


@pytest.fixture(scope="module")
def studio(reference_dir):
    """Settings of environments in one of the recorded scenes."""
    episodes, _ = load_split(reference_dir / "pointnav", "val", reference_dir)
    here = [episode for episode in episodes if episode.scene_id == "studio.glb"]
    return {
        "dataset": reference_dir / "pointnav",
        "split": "val",
        "scenes_dir": reference_dir,
        "episodes": here,
        "num_threads": 1,
    }


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("make", ["gym.make('{id}', {more})", "gym.make_vec('{id}', num_envs=2, {more})"])
def test_gymnasium_finds_the_environment_without_an_import(make):
    call = make.format(id=f"envs:{ENV_ID}", more="dataset='nowhere'")
    code = f"import gymnasium as gym\ntry:\n    {call}\nexcept ValueError as e:\n    print(type(e).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "EpisodeError\n", done.stderr


def test_registering_twice_is_harmless():
    before = gym.registry[ENV_ID]
    register_envs()
    assert gym.registry[ENV_ID] is before


def test_gymnasiums_check_passes_without_warnings(studio, no_warnings):
    env = gym.make(ENV_ID, render_mode="rgb_array", **studio)
    check_env(env.unwrapped)
    env.close()


def test_stable_baselines3s_check_passes_without_warnings(studio, no_warnings):
    env = gym.make(ENV_ID, **studio)
    check_env_for_sb3(env.unwrapped)
    env.close()


def test_make_vec_gives_the_batched_environment(studio):
    env = gym.make_vec(ENV_ID, num_envs=3, vectorization_mode="vector_entry_point", **studio)
    assert isinstance(env, PointNavVectorEnv) and env.num_envs == 3
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    observations, _ = env.reset(seed=0)
    assert env.observation_space.contains(observations)
    env.close()


def test_single_and_batched_environments_agree(studio):
    names = ("depth", "pointgoal_with_gps_compass", "previous_action")
    single = make_env(observations=names, **studio)
    batch = make_vector_env(1, observations=names, **studio)
    a, _ = single.reset(seed=2)
    b, _ = batch.reset(seed=2)
    for action in [1, 1, 2, 1, 3, 1]:
        assert all(np.array_equal(a[name], b[name][0]) for name in names)
        a, reward, terminated, _, info = single.step(action)
        b, rewards, *_ = batch.step([action])
        assert reward == rewards[0] and not terminated
        assert info["distance_to_goal"] == batch.measures()["distance_to_goal"].item()


def test_the_expert_solves_the_single_environment(studio):
    env = make_env(observations=["pointgoal_with_gps_compass"], **studio)
    for _ in range(3):
        env.reset()
        done = False
        while not done:
            _, _, terminated, truncated, info = env.step(env.expert_action())
            done = terminated or truncated
        assert info["success"] == 1 and info["spl"] > 0.9


def test_unseeded_environments_differ(studio):
    first, second = ({make_env(**studio).reset()[1]["episode_id"] for _ in range(4)} for _ in range(2))
    assert len(first | second) > 1


def test_a_single_environment_says_when_each_episode_was_handed_out(studio):
    settings = studio | {"episodes": studio["episodes"][:2]}
    env = make_env(observations=["pointgoal_with_gps_compass"], mode="once", **settings)
    assert [env.reset(seed=0)[1]["episode_id"], env.reset()[1]["episode_id"]] == [
        episode.episode_id for episode in settings["episodes"]
    ]
    with pytest.raises(ValueError, match="all 2 episodes were handed out"):
        env.reset()
    assert env.reset(seed=0)[1]["episode_id"] == settings["episodes"][0].episode_id


def test_a_single_environment_needs_a_batch_of_one(studio):
    with pytest.raises(ValueError, match="not 2, numpy"):
        PointNavEnv(make_vector_env(2, **studio))
    with pytest.raises(ValueError, match="num_envs belongs to the batched"):
        make_env(num_envs=2)


def test_plain_ppo_trains_and_is_evaluated_on_it(studio):
    env = SB3VecEnv(make_vector_env(4, **studio))
    model = PPO("MultiInputPolicy", env, n_steps=32, batch_size=64, n_epochs=1, seed=0)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(256)
    assert model.num_timesteps == 256
    assert not all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    assert model.ep_info_buffer and "spl" in model.ep_info_buffer[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewards, lengths = evaluate_policy(model, env, n_eval_episodes=2, return_episode_rewards=True)
    assert len(rewards) == len(lengths) == 2
    env.close()


def test_sb3_infos_of_ended_episodes(studio):
    env = SB3VecEnv(make_vector_env(2, **studio))
    env.seed(0)
    before = env.reset()
    observations, rewards, dones, infos = env.step(np.array([0, 1]))
    assert dones.tolist() == [True, False] and infos[1] == {}
    info = infos[0]
    assert np.array_equal(info["terminal_observation"]["rgb"], before["rgb"][0])
    assert not np.array_equal(observations["rgb"][0], before["rgb"][0])
    assert info["episode"]["r"] == pytest.approx(rewards[0]) and info["episode"]["l"] == 1
    assert info["TimeLimit.truncated"] is False and info["is_success"] is False
    with pytest.raises(ValueError, match="SAME_STEP, not NEXT_STEP"):
        SB3VecEnv(make_vector_env(1, autoreset_mode=AutoresetMode.NEXT_STEP, **studio))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs(studio, name, monkeypatch, tmp_path):
    # Bodies other than the recorded mesh's get a mesh of their own.
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path))
    variant = VARIANTS[name]
    env = make_vector_env(2, variant=name, observations=variant.observations, height=16, width=16, **studio)
    env.reset(seed=0)
    for _ in range(5):
        observations, *_ = env.step(env.expert_actions())
    assert env.observation_space.contains(observations)
    assert env.simulator.sensors[0].hfov_deg == variant.hfov_deg


def test_published_values_of_the_variants():
    challenge = VARIANTS["challenge-2021"]
    assert challenge.agent.turn_angle_deg == 30 and not challenge.agent.allow_sliding
    assert (challenge.agent.radius, challenge.agent.height) == (0.18, 0.88)
    assert challenge.task.success_distance == 0.36 and challenge.pitch_deg == -20
    assert (challenge.width, challenge.height, challenge.hfov_deg) == (640, 360, 70)
    assert challenge.noise == NoiseConfig(rgb=0.1, depth=1.0, actuation=0.5)
    assert challenge.observations == ("rgb", "depth", "pointgoal")
    assert VARIANTS["ddppo"].task.success_bonus == "spl"
    side_tuning = VARIANTS["side-tuning"].task
    assert (side_tuning.stop, side_tuning.success_reward, side_tuning.num_actions) == ("automatic", 10.0, 3)
    assert VARIANTS["pointnav-v1"] == VARIANTS["habitat-2019"]
    with pytest.raises(ValueError, match="'habitat' is not one of habitat-2019"):
        make_vector_env(1, variant="habitat")


def test_without_a_data_set_the_cached_homes_are_used(studio, monkeypatch, reference_dir):
    monkeypatch.setattr(envs.make, "default_dataset", lambda: studio["dataset"])
    settings = {name: value for name, value in studio.items() if name != "dataset"}
    assert make_vector_env(1, **settings).sampler.episodes == tuple(studio["episodes"])


def test_splits_are_found_in_every_layout(tmp_path):
    for path in ("a/episodes/val/val.json.gz", "b/val/val.json.gz"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
        assert split_file(tmp_path / path.split("/")[0], "val") == tmp_path / path
    template = str(tmp_path / "b" / "{split}" / "{split}.json.gz")
    assert split_file(template, "val") == tmp_path / "b/val/val.json.gz"
    with pytest.raises(EpisodeError, match=r"no episodes of split 'test'.*episodes/test/test\.json\.gz"):
        split_file(tmp_path / "a", "test")
