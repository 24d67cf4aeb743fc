import dataclasses

import pytest

from envs.variants import variant
from navagent.build import agent_spec, noise, observation_names, task_rules, training_device
from navagent.config import (
    GROUPS,
    AdaptationConfig,
    ConfigError,
    TrainConfig,
    adaptation_settings,
    default_options,
    load_config,
    option_help,
    options,
    read_config,
    settings,
    to_yaml,
    write_config,
)
from policies.adaptation import ADAPTATIONS
from policies.adaptation.options import method_options
from policies.encoders import ENCODERS

PLAIN = (int, float, bool, str, int | None, float | None, bool | None, str | None)


def test_composed_defaults_are_the_dataclasses_own():
    """`--help` shows the dataclasses' defaults, so the YAML files of the default options must not differ."""
    assert load_config([]) == TrainConfig()


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_of_every_group_composes(group, tmp_path):
    assert default_options()[group] in options(group)
    for option in options(group):
        assert option_help(group, option)
        extra = [f"scenes.dataset={tmp_path}"] if option == "dataset" else []
        # Cloning does not come before PPO.
        extra += ["algorithm=imitation"] if group == "imitation" else []
        config = load_config([f"{group}={option}", *extra])
        if group in ("simulator", "env", "encoder", "adaptation", "memory", "algorithm", "imitation"):
            assert getattr(config, group).name == option


def test_every_setting_can_be_set_and_has_a_line_of_help():
    leaves = list(settings())
    assert all(leaf.help for leaf in leaves)
    own = {f"adaptation.{option.name}" for option in method_options("sidetune")} | {"adaptation.name"}
    values = {
        leaf.name: "null" if leaf.default is None else str(leaf.default)
        for leaf in leaves
        if not leaf.name.startswith("adaptation.") or leaf.name in own
    }
    assert load_config([f"{name}={value}" for name, value in values.items()]) == TrainConfig()


@pytest.mark.parametrize("method", ADAPTATIONS)
def test_every_option_of_every_method_can_be_set_and_stays_a_default(method):
    options = method_options(method)
    assert all(option.help and option.type in PLAIN for option in options)
    values = {o.name: "null" if o.default is None else str(o.default) for o in options}
    config = load_config([f"adaptation={method}", *(f"adaptation.{k}={v}" for k, v in values.items())])
    assert config.adaptation == AdaptationConfig(method)
    assert adaptation_settings(config.adaptation) == {"name": method, **{o.name: o.default for o in options}}


def test_names_of_methods_and_networks_are_those_that_exist():
    choices = {leaf.name: leaf.choices for leaf in settings()}
    assert set(choices["adaptation.name"]) == set(ADAPTATIONS) == set(options("adaptation"))
    assert set(choices["encoder.name"]) == set(ENCODERS)


def test_a_setting_of_another_method_is_refused_with_its_owner():
    with pytest.raises(ConfigError, match=r"adaptation.alpha is no .*finetune'.* one of sidetune"):
        load_config(["adaptation=finetune", "adaptation.alpha=0.3"])


def test_options_of_a_method_come_back_from_their_file(tmp_path):
    config = load_config(["adaptation.alpha=0.25", "adaptation.learn_alpha=false"])
    assert config.adaptation.options == {"alpha": 0.25, "learn_alpha": False}
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", options("env"))
def test_variants_of_the_task_are_those_of_the_environments(name):
    config, published = load_config([f"env={name}"]), variant(name)
    assert task_rules(config) == published.task
    assert agent_spec(config) == published.agent
    assert noise(config) == published.noise


@pytest.mark.parametrize("year", [2020, 2021])
def test_the_challenges_cameras_are_those_of_the_environments(year):
    config, published = load_config([f"experiment=challenge_{year}"]), variant(f"challenge-{year}")
    sensors = config.sensors
    for setting in ("hfov_deg", "sensor_height", "pitch_deg"):
        assert getattr(sensors, setting) == getattr(published, setting)
    assert sensors.width / sensors.height == published.width / published.height
    assert (sensors.min_depth, sensors.max_depth) == published.depth_range
    assert set(observation_names(config)) == {*published.observations, "previous_action"}


def test_groups_and_settings_of_the_command_line_win_over_defaults():
    config = load_config(["adaptation=finetune", "sensors=depth", "algorithm.total_frames=2e6"])
    assert config.adaptation.name == "finetune"
    assert (config.sensors.rgb, config.sensors.depth) == (False, True)
    assert config.algorithm.total_frames == 2_000_000
    assert isinstance(config.algorithm.total_frames, int)


def test_a_setting_wins_over_the_experiment_and_the_experiment_over_groups():
    config = load_config(["experiment=quick", "algorithm.num_envs=8"])
    assert config.algorithm.num_envs == 8
    assert config.scenes.num == 4
    assert not load_config(["experiment=blind"]).sensors.rgb


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("2e6", 2_000_000), ("1_000", 1000), ("64.0", 64), ("9007199254740993", 2**53 + 1)],
)
def test_whole_numbers_are_taken_as_people_write_them(text, value):
    assert load_config([f"algorithm.total_frames={text}"]).algorithm.total_frames == value


@pytest.mark.parametrize(
    "path", ["a b", "a=b,c", "it's", 'say "x"', "back\\slash", "end\\", "\\'", "{a: [1", "ü"]
)
def test_text_is_taken_as_typed(path):
    assert load_config([f"run_dir={path}"]).run_dir == path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adaptaton=finetune", "no setting adaptaton; did you mean 'adaptation'"),
        ("adaptation=finetun", r"options .*features, finetune, .*; did you mean 'finetune'"),
        ("env=habitat2019", "did you mean 'habitat-2019'"),
        ("algorithm.total_frame=3", "did you mean 'algorithm.total_frames'"),
        ("total_frames=3", "did you mean 'algorithm.total_frames'"),
        ("algoritm.gamma=1", "did you mean 'algorithm.gamma'"),
        ("zzzzzz=1", "no setting zzzzzz .*navagent train --help"),
        ("env.stop=auto", "env.stop=auto is not one of called, automatic; did you mean 'automatic'"),
        ("algorithm.total_frames=2.5", "algorithm.total_frames=2.5 does not fit: expected a whole number"),
        ("algorithm.total_frames=1,2", "expected a whole number"),
        ("algorithm.total_frames=", "expected a whole number"),
        ("algorithm.gamma=high", "algorithm.gamma=high does not fit: expected a number"),
        ("algorithm.gamma=nan", "expected a number"),
        ("algorithm.learning_rate=1e999", "expected a number"),
        ("algorithm.gamma=1.5", "algorithm.gamma=1.5 is out of range: expected at most 1"),
        ("algorithm.learning_rate=0", "expected above 0"),
        ("sensors.rgb=yes", "sensors.rgb=yes does not fit: expected true or false"),
        ("algorithm.target_kl=-1", "expected above 0"),
        ("run_dir=", "expected text or null"),
        ("seed=null", "expected a whole number"),
        ("seed", "not of the form NAME=VALUE"),
        ("+seed=1", "without '\\+'"),
        ("~seed=1", "without '~'"),
        ("seed.x=1", "no setting seed.x"),
        ("algorithm.num_envs=2", "num_minibatches=8 is more than algorithm.num_envs=2"),
        ("algorithm.replay_epochs=3", "replay_epochs=3 and algorithm.replay_steps=0: past rollouts need"),
        ("algorithm.optimizer=lam", "algorithm.optimizer=lam is not one of adam, amsgrad, lamb"),
        ("algorithm.nonfinite=stopp", "did you mean 'stop'"),
        ("algorithm.curriculum_end=1", "curriculum_end=1.0 is less than"),
        ("scenes.dataset=/no/such/folder", "scenes.dataset=/no/such/folder is not a folder"),
        ("scenes.dataset=generatd", "did you mean 'generated'"),
        ("encoder.weights=/no/such.safetensors", "encoder.weights=/no/such.safetensors is not a file"),
        ("adaptation.side_init=distilled", "needs a file of weights"),
        ("adaptation.alpha=1", "adaptation=sidetune: .*alpha 1.0 cannot learn"),
        ("adaptation.side_encoder=fcn4", "'copy' needs a side network like the base 'fcn5_small'"),
        ("adaptation.alfa=1", "no setting adaptation.alfa; did you mean 'adaptation.alpha'"),
        ("memory.num_frames=1", "expected at least 2"),
        ("sensors.min_depth=10", "sensors.max_depth=10.0 must be more than sensors.min_depth=10.0"),
        ("device=gpu", "not one of auto, cpu, cuda"),
        ("resume=/no/such/run", "not the folder of a run"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config([override])


@pytest.mark.parametrize("device", ["gpu", "", "cpu:1", "cuda:", "cuda:x", "mps"])
def test_unknown_devices_are_refused(device):
    with pytest.raises(ConfigError, match="is not one of auto, cpu, cuda, cuda:N"):
        training_device(device)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"device 'cuda:999': PyTorch finds \d+ CUDA devices"):
        training_device("cuda:999")


def test_settings_come_back_from_their_file(tmp_path):
    config = load_config(["algorithm.learning_rate=1e-5", "run_dir=ü: [x]", "seed=3"])
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_file_written_by_hand_may_say_1e_4(tmp_path):
    (tmp_path / "config.yaml").write_text("algorithm:\n  learning_rate: 1e-4\n  total_frames: 2e6\n")
    config = read_config(tmp_path / "config.yaml")
    assert config.algorithm.learning_rate == 1e-4
    assert config.algorithm.total_frames == 2_000_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: !!python/object/apply:os.system ['true']", "not YAML"),
        ("seed: [1", "not YAML"),
        ("[" * 100_000, "not YAML"),
        ("\x00", "not YAML"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
        ("seed: {a: 1}", "seed=.* does not fit"),
        ("algorithm: 3", "algorithm=3 does not fit"),
        ("algorithm: {gama: 1}", "did you mean 'algorithm.gamma'"),
        ("1: 2", "no setting 1"),
        ("seed: ${oc.env:HOME}", "seed=.* does not fit"),
    ],
)
def test_a_broken_or_hostile_file_is_refused(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)


@pytest.fixture
def run(tmp_path):
    """A run's folder that was trained on depth with another budget."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = load_config(["sensors=depth", "algorithm.total_frames=5000", f"run_dir={folder}"])
    write_config(config, folder / "config.yaml")
    return folder


def test_resume_takes_the_runs_own_settings(run):
    config = load_config([f"resume={run}"])
    assert config.sensors.depth
    assert config.algorithm.total_frames == 5000
    assert (config.resume, config.run_dir) == (str(run), str(run))


def test_resume_accepts_the_same_command_and_a_longer_budget(run):
    config = load_config(["sensors=depth", "algorithm.total_frames=9000", f"resume={run}"])
    assert config.algorithm.total_frames == 9000
    assert dataclasses.replace(config.sensors) == config.sensors
    assert config.sensors.depth


def test_resume_accepts_the_runs_own_folder_by_name_and_no_other(run, tmp_path):
    assert load_config([f"run_dir={run}", f"resume={run}"]).run_dir == str(run)
    with pytest.raises(ConfigError, match=r"run_dir=.*other is another folder than resume="):
        load_config([f"run_dir={tmp_path / 'other'}", f"resume={run}"])


@pytest.mark.parametrize("override", ["sensors=rgb", "seed=4", "experiment=blind", "algorithm.gamma=0.9"])
def test_resume_refuses_what_would_make_it_another_experiment(run, override):
    with pytest.raises(ConfigError, match="another experiment"):
        load_config([override, f"resume={run}"])


def test_yaml_shows_every_setting():
    text = to_yaml(TrainConfig())
    own = {f"adaptation.{option.name}" for option in method_options("sidetune")} | {"adaptation.name"}
    for leaf in settings():
        if not leaf.name.startswith("adaptation.") or leaf.name in own:
            assert leaf.name.rsplit(".", 1)[-1] + ":" in text
