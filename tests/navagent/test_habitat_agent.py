"""Runs as Habitat's agents, held to what this package's own evaluation does with them."""

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from one_room import write_one_room

from envs.simulators.base import Action
from navagent.agent_spaces import action_space, observation_space
from navagent.build import load_split, make_vector_env, policy_settings
from navagent.config import ConfigError, load_config, to_yaml
from navagent.evaluation.agents import PolicyAgent, episode_name
from navagent.evaluation.command import restore_policy
from navagent.evaluation.evaluate import evaluate_agent
from navagent.habitat_agent import NavagentAgent, ObservationError
from navagent.real_habitat import HabitatMissingError, import_habitat
from navagent.runs import Run, RunError
from policies.actor_critic import NavigationPolicy

SENSES = ("sensors=rgbd", "sensors.gps=true", "sensors.compass=true", "sensors.max_depth=5")


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return write_one_room(tmp_path_factory.mktemp("data") / "room", num_train=1, num_val=3)


@pytest.fixture(scope="module")
def make_run(room, tmp_path_factory):
    """Runs of small policies with random weights everywhere, so that every observation changes the action."""

    def make(*overrides):
        config = load_config(
            [
                "scenes=dataset",
                f"scenes.dataset={room}",
                "env.max_steps=12",
                "memory.hidden_size=16",
                "encoder.image_features=16",
                "encoder.weights=random",
                "num_threads=1",
                "device=cpu",
                *overrides,
            ]
        )
        torch.manual_seed(0)
        policy = NavigationPolicy(
            observation_space(config), action_space(config), lambda _: 0.0, **policy_settings(config, True)
        )
        for name, parameter in policy.named_parameters():
            if name.startswith(("memory.", "action_net.")):
                torch.nn.init.normal_(parameter, std=0.3)
        run = Run.create(tmp_path_factory.mktemp("runs") / "run", to_yaml(config))
        run.save_checkpoint(0, {"policy": policy.state_dict(), "frames": 0})
        return run, config

    return make


@pytest.fixture(scope="module")
def seeing(make_run):
    return make_run(*SENSES)


def environment(config):
    split = load_split(config, "val")
    return make_vector_env(
        config, split.episodes, split.scenes, 1, "once", AutoresetMode.NEXT_STEP, seed=config.seed
    )


def played_by_the_evaluation(run, config, deterministic, turn_back, seed=3):
    """What the evaluation's own agent does in each episode."""
    env = environment(config)
    policy = restore_policy(run, env.single_observation_space, env.single_action_space)
    results = evaluate_agent(env, PolicyAgent(policy, "run", deterministic, turn_back), seed)
    env.close()
    return [[Action(choice).name.lower() for choice in result.choices[:, 0]] for result in results]


def played_as_in_habitat(agent, config, seed=3):
    """What an agent with Habitat's interface does, on observations as ``habitat.Env`` gives them."""
    env, played = environment(config), []
    observations, _ = env.reset(seed=seed)
    while bool(env.active.any()):
        actions = []
        agent.reset(episode_name(seed, env.sampler.episodes[env.current_episodes()[0]]))
        while True:
            theirs = {name: value[0].numpy() for name, value in observations.items()}
            del theirs["previous_action"]
            chosen = agent.act(theirs)["action"]
            actions.append(chosen)
            action = int(env.task.policy_actions(torch.tensor([Action[chosen.upper()]])))
            observations, _, terminated, truncated, _ = env.step(np.array([action]))
            if terminated[0] or truncated[0]:
                break
        played.append(actions)
        observations, *_ = env.step(np.array([0]))  # the next episode begins
    env.close()
    return played


@pytest.mark.parametrize(("deterministic", "turn_back"), [(True, 0.0), (False, 0.0), (False, 0.5)])
def test_it_does_what_the_evaluation_does(seeing, deterministic, turn_back):
    run, config = seeing
    expected = played_by_the_evaluation(run, config, deterministic, turn_back)
    agent = NavagentAgent(run.path, device="cpu", deterministic=deterministic, turn_back=turn_back, seed=3)
    assert played_as_in_habitat(agent, config) == expected
    assert len(expected) == 3
    assert len({action for actions in expected for action in actions}) > (1 if deterministic else 2)


def test_what_is_drawn_depends_on_the_seed_and_the_number_of_the_episode(seeing):
    run, config = seeing
    images = {name: space.sample() for name, space in observation_space(config).spaces.items()}
    images |= {"pointgoal_with_gps_compass": np.array([2.0, 0.5], np.float32)}
    images |= {"gps": np.zeros(2, np.float32)}

    def played(seed, episodes=2):
        agent, taken = NavagentAgent(run.path, device="cpu", seed=seed), []
        for _ in range(episodes):
            agent.reset()
            taken.append([agent.act(images)["action"] for _ in range(10)])
        return taken

    assert played(0) == played(0)
    assert played(0) != played(1)
    assert played(0)[0] != played(0)[1]


def test_depth_in_metres_is_brought_into_the_range_of_the_run(seeing):
    """The same images in metres, some beyond the range, give the same logits."""
    run, config = seeing
    rng = np.random.default_rng(0)
    metres = rng.uniform(0.0, 8.0, (64, 64, 1)).astype(np.float32)
    others = {
        "rgb": rng.integers(0, 256, (64, 64, 3), np.uint8),
        "pointgoal_with_gps_compass": np.array([2.0, 0.5], np.float32),
        "gps": np.zeros(2, np.float32),
        "compass": np.zeros(1, np.float32),
    }
    unit = NavagentAgent(run.path, device="cpu", deterministic=True)
    plain = NavagentAgent(run.path, device="cpu", deterministic=True, depth_in_metres=True)
    unit.act(others | {"depth": np.clip(metres / config.sensors.max_depth, 0, 1)})
    plain.act(others | {"depth": metres})
    assert torch.allclose(unit._agent.memory, plain._agent.memory, atol=1e-6)
    plain.reset()
    plain.act(others | {"depth": metres / 2})
    assert not torch.allclose(unit._agent.memory, plain._agent.memory, atol=1e-3)


def test_an_agent_without_a_stop_action_stops_near_the_goal(make_run):
    run, _ = make_run("env=side-tuning", "sensors=blind")
    agent = NavagentAgent(run.path, device="cpu")
    far, near = (
        {"pointgoal_with_gps_compass": np.array([distance, 0.0], np.float32)} for distance in (0.21, 0.19)
    )
    assert agent.act(far)["action"] in ("move_forward", "turn_left", "turn_right")
    assert agent.act(near) == {"action": "stop"}


def test_an_agent_that_cannot_tell_when_to_stop_is_refused(make_run):
    run, _ = make_run("env=side-tuning", "sensors=blind", "sensors.goal=pointgoal")
    with pytest.raises(ConfigError, match=r"no stop action.*pointgoal"):
        NavagentAgent(run.path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("depth", None, r"no observation 'depth'.*rgb.*depth_sensor"),
        ("gps", None, r"no observation 'gps'.*gps_sensor"),
        ("depth", np.zeros((64, 64), np.float32), r"'depth' has shape \(64, 64\).*\(64, 64, 1\)"),
        ("rgb", np.zeros((480, 640, 3), np.uint8), r"'rgb' has shape.*height and width to 64 and 64"),
        ("rgb", np.zeros((64, 64, 3), np.float32), r"'rgb' is of type float32.*uint8"),
        ("depth", np.zeros((64, 64, 1), np.uint8), r"'depth' is of type uint8"),
        ("depth", np.full((64, 64, 1), 3.0, np.float32), r"from 3 to 3.*depth_in_metres=True"),
        ("depth", np.full((64, 64, 1), np.nan, np.float32), "not finite"),
        ("pointgoal_with_gps_compass", np.zeros(3, np.float32), r"shape \(3,\).*dimensionality to 2"),
        ("pointgoal_with_gps_compass", np.array([-1.0, 4.0], np.float32), "goal_format to POLAR"),
    ],
)
def test_observations_that_do_not_fit_are_refused_by_name(seeing, name, value, message):
    run, _ = seeing
    observations = {
        "rgb": np.zeros((64, 64, 3), np.uint8),
        "depth": np.zeros((64, 64, 1), np.float32),
        "pointgoal_with_gps_compass": np.array([2.0, 0.5], np.float64),
        "gps": np.zeros(2, np.float32),
        "compass": np.zeros(1, np.float32),
        "objectgoal": np.array([1]),
    }
    agent = NavagentAgent(run.path, device="cpu")
    agent.act(observations)
    if value is None:
        del observations[name]
    else:
        observations[name] = value
    with pytest.raises(ObservationError, match=message):
        agent.act(observations)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(RunError, match="not the folder of a run"):
        NavagentAgent(tmp_path)


def test_it_is_habitats_own_kind_of_agent_where_habitat_is():
    try:
        import_habitat()
    except HabitatMissingError as error:
        pytest.skip(f"no real Habitat: {error}")
    import habitat

    assert issubclass(NavagentAgent, habitat.Agent)
