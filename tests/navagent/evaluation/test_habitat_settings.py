"""A run's task in habitat-lab's words. What habitat-lab makes of them is in test_official_habitat.py."""

import math
from pathlib import Path

import pytest
import yaml

from navagent.config import ConfigError, load_config
from navagent.evaluation.habitat_settings import habitat_settings, to_hydra

EPISODES = Path("/data/homes/episodes/val/val.json.gz")


def settings(*overrides, **options):
    return habitat_settings(load_config(list(overrides)), EPISODES, Path("/data/homes"), **options)


def test_body_task_and_cameras_are_the_runs():
    found = settings(
        "sensors=rgbd",
        "sensors.height=48",
        "sensors.width=96",
        "sensors.hfov_deg=70",
        "sensors.sensor_height=0.88",
        "sensors.pitch_deg=-20",
        "sensors.min_depth=0.1",
        "sensors.max_depth=5",
        "env.max_steps=300",
        "env.success_distance=0.36",
        "env.forward_step=0.3",
        "env.turn_angle_deg=30",
        "env.allow_sliding=false",
        "env.agent_radius=0.18",
        "env.agent_height=0.88",
        "env.max_climb=0.3",
        "env.max_slope_deg=40",
        seed=7,
        gpu=2,
    )["habitat"]
    assert found["seed"] == 7
    assert found["environment"]["max_episode_steps"] == 300
    assert found["task"]["measurements"]["success"]["success_distance"] == 0.36
    simulator = found["simulator"]
    assert (simulator["forward_step_size"], simulator["turn_angle"]) == (0.3, 30)
    assert simulator["habitat_sim_v0"] == {"gpu_device_id": 2, "allow_sliding": False}
    body = simulator["agents"]["main_agent"]
    assert [body[name] for name in ("radius", "height", "max_climb", "max_slope")] == [0.18, 0.88, 0.3, 40]
    assert set(body["sim_sensors"]) == {"rgb_sensor", "depth_sensor"}
    for camera in body["sim_sensors"].values():
        assert [camera[name] for name in ("height", "width", "hfov")] == [48, 96, 70]
        assert camera["position"] == [0.0, 0.88, 0.0]
        assert camera["orientation"] == pytest.approx([-math.pi / 9, 0, 0])
        assert "noise_model" not in camera
    depth = body["sim_sensors"]["depth_sensor"]
    assert (depth["min_depth"], depth["max_depth"], depth["normalize_depth"]) == (0.1, 5, True)


def test_noise_of_the_challenges_is_asked_for():
    found = settings("experiment=challenge_2021")
    simulator = found["habitat"]["simulator"]
    cameras = simulator["agents"]["main_agent"]["sim_sensors"]
    assert cameras["rgb_sensor"]["noise_model"] == "GaussianNoiseModel"
    assert cameras["rgb_sensor"]["noise_model_kwargs"] == {"intensity_constant": 0.1}
    assert cameras["depth_sensor"]["noise_model"] == "RedwoodDepthNoiseModel"
    assert cameras["depth_sensor"]["noise_model_kwargs"] == {"noise_multiplier": 1.0}
    assert {"/habitat/simulator": "navagent_noisy_motion"} in found["defaults"]
    assert (simulator["robot"], simulator["controller"]) == ("LoCoBot", "Proportional")
    assert simulator["noise_multiplier"] == 0.5
    assert not any("navagent" in str(item) for item in settings()["defaults"])


@pytest.mark.parametrize(
    ("overrides", "sensors"),
    [
        ((), ["pointgoal_with_gps_compass_sensor"]),
        (("sensors.goal=pointgoal",), ["pointgoal_sensor"]),
        (
            ("sensors.gps=true", "sensors.compass=true"),
            ["pointgoal_with_gps_compass_sensor", "gps_sensor", "compass_sensor"],
        ),
    ],
)
def test_the_agent_is_told_what_the_run_was_told(overrides, sensors):
    names = [name for item in settings(*overrides)["defaults"] for name in item if "lab_sensors" in name]
    assert [name.rpartition(".")[2] for name in names] == sensors


def test_blind_agents_get_no_cameras():
    found = settings("sensors=blind")
    assert found["habitat"]["simulator"]["agents"]["main_agent"]["sim_sensors"] == {}
    assert not any("sim_sensors" in str(item) for item in found["defaults"])


@pytest.mark.parametrize(
    "wish", ["sensors.hfov_deg=79.5", "env.turn_angle_deg=22.5"], ids=lambda wish: wish.split("=")[0]
)
def test_degrees_that_habitat_lab_does_not_take_are_refused(wish):
    with pytest.raises(ConfigError, match=f"{wish}: habitat-lab takes whole degrees"):
        settings(wish)


def test_episodes_that_habitat_lab_cannot_unpack_are_refused():
    with pytest.raises(ConfigError, match=r"gzip val\.json"):
        habitat_settings(load_config([]), Path("/data/val.json"), Path("/data"))


def test_braces_in_a_path_are_not_taken_for_the_splits_name():
    found = habitat_settings(load_config([]), Path("/data/{odd}/val.json.gz"), Path("/data"))
    path = found["habitat"]["dataset"]["data_path"]
    assert path.format(split="val") == "/data/{odd}/val.json.gz"


def test_the_file_is_hydras_and_says_what_it_is():
    text = to_hydra(settings(), "written for\nsomebody")
    assert text.startswith("# @package _global_\n# written for\n# somebody\ndefaults:\n")
    assert yaml.safe_load(text) == settings()
