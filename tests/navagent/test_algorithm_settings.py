"""From ``algorithm.*`` to the PPO that trains, and a run with every option stopped and resumed."""

import signal

import numpy as np
import pytest
import torch
from one_room import write_one_room
from test_train import interrupt_after, numbers, settings, silent

from envs.vector_env import PointNavVectorEnv
from navagent.build import load_split, optimizer_settings
from navagent.config import ConfigError, load_config
from navagent.learning.auxiliary import AuxiliaryConfig
from navagent.learning.lamb import Lamb
from navagent.runs import Run, read_checkpoint
from navagent.train import learning_rate, make_model, train

EVERYTHING = (
    "imitation.frames=32",
    "imitation.heading_coef=0.3",
    "algorithm.optimizer=lamb",
    "algorithm.scale_learning_rate=true",
    "algorithm.learning_rate_warmup=0.2",
    "algorithm.weight_decay=0.01",
    "algorithm.clip_range_schedule=cosine",
    "algorithm.clip_range_vf=0.3",
    "algorithm.clip_value_loss=true",
    "algorithm.normalize_returns=true",
    "algorithm.replay_epochs=2",
    "algorithm.replay_steps=16",
    "algorithm.cpc_coef=0.1",
    "algorithm.inverse_dynamics_coef=0.2",
    "algorithm.nonfinite=skip",
)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return write_one_room(tmp_path_factory.mktemp("room"), num_train=60, num_val=8)


def test_every_setting_reaches_the_algorithm(room, tmp_path):
    config = settings(room, tmp_path, *EVERYTHING, "algorithm.normalize_advantage=false")
    model = make_model(config, load_split(config, "train"))
    assert isinstance(model.policy.optimizer, Lamb)
    assert model.policy.optimizer.defaults["eps"] == 1e-5
    assert model.lr_schedule(1.0) == pytest.approx(0.5 * config.algorithm.learning_rate)
    assert [model.clip_range(done) for done in (1.0, 0.5, 0.0)] == pytest.approx([0.2, 0.1, 0.0])
    assert model.clip_range_vf(0.5) == pytest.approx(0.15)
    assert (model.clip_value_loss, model.normalize_advantage, model.nonfinite) == (True, False, "skip")
    assert model.normaliser.gamma == config.algorithm.gamma
    assert (model.replay_epochs, model.replay.capacity) == (2, 16)
    assert model.auxiliary_config == AuxiliaryConfig(0.1, 0.2, 0.3, 18)
    decays = {group["weight_decay"] for group in model.policy.optimizer.param_groups}
    assert decays == {0.0, 0.01}
    model.env.close()


def test_headings_are_told_apart_by_the_turns_of_the_task(room, tmp_path):
    config = settings(
        room, tmp_path, "imitation.frames=32", "imitation.heading_coef=1", "env.turn_angle_deg=30"
    )
    model = make_model(config, load_split(config, "train"))
    assert model.auxiliary.heading.guess.out_features == 13
    model.env.close()


def test_by_default_there_is_no_option(room, tmp_path):
    config = settings(room, tmp_path)
    model = make_model(config, load_split(config, "train"))
    assert (model.replay, model.normaliser, model.auxiliary) == (None, None, None)
    assert type(model.policy.optimizer) is torch.optim.Adam
    assert model.policy.optimizer.defaults["eps"] == 1e-5
    assert (model.clip_range_vf, model.clip_value_loss, model.nonfinite) == (None, False, "stop")
    model.env.close()


def test_the_learning_rate_grows_with_the_minibatches_of_all_processes():
    config = load_config(["experiment=large_batch"])
    # 512 agents of 32 steps in two minibatches are 8192 frames, 32 times 256.
    rate = learning_rate(config)
    assert rate(0.99) == pytest.approx(5e-4 * np.sqrt(32))
    assert rate(1.0) == pytest.approx(5e-4 * np.sqrt(32) / 2)
    assert rate(0.0) == pytest.approx(5e-4 * 0.01)
    assert learning_rate(config, processes=4)(0.99) == pytest.approx(2 * rate(0.99))
    assert learning_rate(load_config([]))(1.0) == 7e-4
    # Labels are learned in 16 minibatches, of 1024 frames each.
    assert learning_rate(load_config(["experiment=large_batch"], "imitate"))(0.99) == pytest.approx(5e-4 * 2)


def test_the_side_tuning_papers_agent_has_its_published_settings():
    config = load_config(["experiment=side_tuning_paper"])
    algorithm = config.algorithm
    assert (algorithm.num_steps, algorithm.epochs) == (512, 5)
    assert (algorithm.replay_epochs, algorithm.replay_steps) == (10, 1024)
    assert (algorithm.clip_range, algorithm.ent_coef, algorithm.vf_coef) == (0.1, 1e-4, 1e-3)
    assert (algorithm.gamma, algorithm.gae_lambda, algorithm.max_grad_norm) == (0.99, 0.95, 0.5)
    assert (algorithm.learning_rate, algorithm.learning_rate_schedule) == (1e-4, "constant")
    assert optimizer_settings(algorithm.optimizer)["optimizer_kwargs"] == {"eps": 1e-5, "amsgrad": True}
    assert (config.memory.name, config.memory.num_frames) == ("frame_stack", 4)
    assert (config.env.stop, config.env.success_reward) == ("automatic", 10.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("replay_epochs=1", "replay_steps=65"), "replay_steps=65 holds no past .* expected at least 66"),
        (("cpc_coef=0.1",), "cpc_coef=0.1 is about images, and the agent sees none"),
        (("inverse_dynamics_coef=1",), "inverse_dynamics_coef=1.0 is about images"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(["sensors=blind", *(f"algorithm.{word}" for word in words)])


def test_auxiliary_losses_of_single_steps_are_refused():
    with pytest.raises(ConfigError, match="cpc_coef looks at two steps at least"):
        load_config(["algorithm.num_steps=1", "algorithm.cpc_coef=0.1"])


@pytest.fixture(scope="module")
def whole(room, tmp_path_factory):
    return train(settings(room, tmp_path_factory.mktemp("runs") / "whole", *EVERYTHING), silent())


def test_a_run_logs_what_its_options_do(whole):
    newest = [record for record in whole.read_metrics() if "train/loss" in record][-1]
    expected = {
        "replay/approx_kl",
        "replay/value_loss",
        "auxiliary/cpc_loss",
        "auxiliary/inverse_dynamics_loss",
        "nonfinite/skipped_minibatches",
        "nonfinite/replaced_observations",
        "train/clip_range",
    }
    assert expected <= newest.keys()
    # Only an expert can say where its way goes.
    labelled = [record for record in whole.read_metrics() if "imitation/loss" in record]
    assert labelled and all(record["auxiliary/heading_loss"] > 0 for record in labelled)
    assert "auxiliary/heading_loss" not in newest
    assert newest["nonfinite/skipped_minibatches"] == 0


@pytest.mark.parametrize("updates", [2, 4])
def test_with_every_option_a_stopped_run_goes_on_as_if_it_had_not_been(
    whole, room, tmp_path, monkeypatch, updates
):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_after(patch, updates, signal.SIGTERM)
        train(settings(room, tmp_path / "stopped", *EVERYTHING), silent())
    stopped = Run(tmp_path / "stopped")
    assert len([record for record in stopped.read_metrics() if "train/loss" in record]) == updates
    resumed = train(load_config([f"resume={stopped.path}"]), silent())
    assert numbers(resumed) == numbers(whole)


def test_what_stopped_a_run_is_in_its_folder(room, tmp_path, monkeypatch):
    step, calls = PointNavVectorEnv.step, []

    def broken(self, actions):
        observations, *rest = step(self, actions)
        calls.append(None)
        if len(calls) == 11:
            observations["pointgoal_with_gps_compass"][2, 1] = float("nan")
        return observations, *rest

    monkeypatch.setattr(PointNavVectorEnv, "step", broken)
    with pytest.raises(FloatingPointError, match="'pointgoal_with_gps_compass' of agents 2 holds") as error:
        train(settings(room, tmp_path / "run"), silent())
    (file,) = (tmp_path / "run").glob("nonfinite-*.safetensors")
    assert str(file) in str(error.value)
    goal = read_checkpoint(file)["observations"]["pointgoal_with_gps_compass"]
    assert goal.isnan().nonzero().tolist() == [[2, 1]]
