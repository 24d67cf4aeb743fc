import io
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_training import numbers
from one_room import TINY, write_one_room
from rich.console import Console

from envs.simulators.raycast.simulator import RaycastSimulator
from envs.vector_env import PointNavVectorEnv
from navagent import preemption
from navagent.build import load_split, make_vector_env
from navagent.cli import main
from navagent.config import ConfigError, load_config, read_config, to_yaml
from navagent.evaluation.agents import PolicyAgent
from navagent.evaluation.command import load_policy
from navagent.evaluation.pictures import Studio
from navagent.learning.ppo import PPO
from navagent.memory_estimate import plan_memory
from navagent.preemption import REQUEUE_STATUS
from navagent.progress import duration, measures_line
from navagent.runs import CheckpointError, Run, RunError
from navagent.train import Trainer, make_model, plan, train
from policies.encoders import make_encoder
from policies.weights import save_safetensors

FRAMES = 6 * 32


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return write_one_room(tmp_path_factory.mktemp("room"), num_train=60, num_val=8)


@pytest.fixture(autouse=True)
def _without_curves(monkeypatch):
    """Drawing curves takes most of the time of so short a run; the run that is looked at has real ones."""
    draw = "navagent.evaluation.report.draw_curves"
    monkeypatch.setattr(draw, lambda records, path, *_: Path(path).write_bytes(b"a picture"))


def words(room, path, *overrides):
    """What is typed after ``navagent train``."""
    return [
        f"scenes.dataset={room}",
        f"run_dir={path}",
        *TINY,
        "env.max_steps=12",
        "env.rgb_noise=0.1",
        "env.actuation_noise=0.5",
        f"algorithm.total_frames={FRAMES}",
        "algorithm.num_envs=4",
        "algorithm.num_steps=8",
        "algorithm.num_minibatches=2",
        "imitation.frames=64",
        "algorithm.anchor_coef=0.1",
        "algorithm.anchor_frames=1000",
        "algorithm.curriculum=linear",
        "algorithm.curriculum_fraction=1.0",
        "algorithm.curriculum_end=4",
        "algorithm.curriculum_start=1.5",
        "evaluation.every_frames=96",
        "evaluation.num_episodes=4",
        "evaluation.num_envs=2",
        "evaluation.final_episodes=0",
        *overrides,
    ]


def settings(room, path, *overrides):
    return load_config(words(room, path, *overrides))


def silent():
    return Console(file=io.StringIO())


def interrupt_after(monkeypatch, updates, number=signal.SIGINT):
    """Sends this process a signal while the given update's rollout ends."""
    seen = []
    original = Trainer._on_rollout_end

    def hook(self):
        seen.append(self)
        if len(seen) == updates:
            os.kill(os.getpid(), number)
        original(self)

    monkeypatch.setattr(Trainer, "_on_rollout_end", hook)


@pytest.fixture(scope="module")
def whole(room, tmp_path_factory):
    output = silent()
    run = train(settings(room, tmp_path_factory.mktemp("runs") / "whole"), output)
    return run, output.file.getvalue()


def test_a_run_leaves_a_folder_that_explains_itself(whole):
    run, output = whole
    for name in ("config.yaml", "versions.json", "metrics.jsonl", "curves.png", "report.html"):
        assert (run.path / name).stat().st_size > 0, name
    assert list(run.tensorboard_dir.glob("events.*"))
    assert int(run.checkpoint("latest").stem) == FRAMES
    assert (run.checkpoint_dir / "best.safetensors").is_file()
    for told in ("learned", "frozen", "unseen", "192 frames (64 taught by an expert", str(run.path)):
        assert told in " ".join(output.split()), told


def test_metrics_hold_a_line_an_update_and_one_an_evaluation(whole):
    run, _ = whole
    records = run.read_metrics()
    updates = [record for record in records if "train/loss" in record]
    assert [record["frames"] for record in updates] == [32 * k for k in range(1, 7)]
    assert [record["rollout/phase"] for record in updates] == ["imitation"] * 2 + ["ppo"] * 4
    assert [record["frames"] for record in records if "eval/spl" in record] == [96, 192]
    shares = [
        value for key, value in updates[-1].items() if key.startswith("time/") and key.endswith("_share")
    ]
    assert sum(shares) == pytest.approx(1.0)
    assert updates[0]["rollout/max_geodesic"] == 1.5
    assert updates[-1]["rollout/max_geodesic"] > 3.0


@pytest.mark.parametrize(
    ("updates", "number"),
    [
        pytest.param(1, signal.SIGINT, id="Ctrl-C while imitating"),
        pytest.param(3, signal.SIGTERM, id="SIGTERM when an evaluation is due"),
        pytest.param(4, signal.SIGTERM, id="SIGTERM in ppo"),
        pytest.param(6, signal.SIGINT, id="Ctrl-C in the last update"),
    ],
)
def test_stopped_and_resumed_gives_the_same_numbers_as_uninterrupted(
    whole, room, tmp_path, monkeypatch, updates, number
):
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    output = silent()
    with monkeypatch.context() as patch, pytest.raises(expected) as caught:
        interrupt_after(patch, updates, number)
        train(settings(room, tmp_path / "stopped"), output)
    if expected is SystemExit:
        assert caught.value.code == 143
    stopped = Run(tmp_path / "stopped")
    assert (stopped.path / "report.html").is_file()
    assert stopped.read_metrics()[-1]["frames"] == 32 * updates
    text = " ".join(output.file.getvalue().split())
    assert f"navagent train resume={stopped.path}" in text
    resumed = train(load_config([f"resume={stopped.path}"]), silent())
    assert numbers(resumed) == numbers(whole[0])


def stop_during(monkeypatch, owner, name, call, number, raises=None):
    """Sends this process a signal at the beginning of the given call of a function."""
    original, calls = getattr(owner, name), []

    def hook(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, hook)
    return calls


STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: REQUEUE_STATUS}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_an_evaluation_is_dropped_on_a_signal_and_done_again(whole, room, tmp_path, monkeypatch, number):
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with monkeypatch.context() as patch, pytest.raises(expected) as caught:
        calls = stop_during(patch, PolicyAgent, "act", 3, number)
        train(settings(room, tmp_path / "run"), silent())
    assert len(calls) == 3
    if number in STATUS:
        assert caught.value.code == STATUS[number]
    run = Run(tmp_path / "run")
    assert int(run.checkpoint("latest").stem) == run.read_metrics()[-1]["frames"] == 96
    assert not any("eval/spl" in record for record in run.read_metrics())
    assert numbers(train(load_config([f"resume={run.path}"]), silent())) == numbers(whole[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        pytest.param(PointNavVectorEnv, "step", 8 + 8 + 3, id="in a rollout"),
        # The estimate of memory has taken three steps, and imitation four in each epoch.
        pytest.param(torch.optim.Adam, "step", 3 + 2 * 2 * 4 + 2, id="in an update"),
    ],
)
def test_what_a_signal_cannot_wait_for_is_given_up_and_done_again(
    whole, room, tmp_path, monkeypatch, owner, name, call, number
):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(preemption, "PATIENCE_SECONDS", 0.0)
        patch.setattr("navagent.train.KEPT_FROM_SECONDS", 0.0)
        calls = stop_during(patch, owner, name, call, number)
        train(settings(room, tmp_path / "run"), silent())
    assert caught.value.code == STATUS[number]
    assert len(calls) == call
    run = Run(tmp_path / "run")
    assert int(run.checkpoint("latest").stem) == 64
    assert numbers(train(load_config([f"resume={run.path}"]), silent())) == numbers(whole[0])


def test_a_signal_while_homes_are_loading_or_reports_are_drawn_ends_at_once(
    whole, room, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        stop_during(patch, RaycastSimulator, "load_scenes", 1, signal.SIGUSR1)
        train(settings(room, tmp_path / "run"), silent())
    assert caught.value.code == REQUEUE_STATUS
    assert not (tmp_path / "run").exists()
    shutil.copytree(whole[0].path, tmp_path / "copy")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        calls = stop_during(patch, Studio, "map", 2, signal.SIGTERM)
        train(load_config([f"resume={tmp_path / 'copy'}", "evaluation.final_episodes=3"]), silent())
    assert caught.value.code == 143
    assert len(calls) == 2
    # Asked again, it does what was left.
    train(load_config([f"resume={tmp_path / 'copy'}", "evaluation.final_episodes=3"]), silent())
    assert (tmp_path / "copy" / "evaluation" / "val" / "summary.json").is_file()


def test_a_run_killed_before_its_first_checkpoint_begins_when_it_is_resumed(whole, room, tmp_path):
    run = Run.create(tmp_path / "run", to_yaml(settings(room, tmp_path / "run")))
    assert numbers(train(load_config([f"resume={run.path}"]), silent())) == numbers(whole[0])
    # Where checkpoints were taken away, it does not begin over what there was.
    for file in run.checkpoint_dir.iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        train(load_config([f"resume={run.path}"]), silent())


@pytest.mark.filterwarnings("ignore:.*look untrained")
def test_a_run_goes_on_without_the_files_that_its_weights_started_from(room, tmp_path):
    files = {}
    for name in ("base", "side"):
        files[name] = tmp_path / f"{name}.safetensors"
        save_safetensors(files[name], make_encoder("fcn5_small", weights="random").state_dict())
    asked = [
        f"encoder.weights={files['base']}",
        "adaptation.side_init=distilled",
        f"adaptation.side_weights={files['side']}",
        "evaluation.every_frames=0",
    ]
    straight = train(settings(room, tmp_path / "straight", *asked), silent())
    train(settings(room, tmp_path / "run", *asked, "algorithm.max_minutes=1e-6"), silent())
    for file in files.values():
        file.unlink()
    resumed = train(load_config([f"resume={tmp_path / 'run'}", "algorithm.max_minutes=0"]), silent())
    assert numbers(resumed) == numbers(straight)
    # What it started from is still told.
    assert read_config(resumed.config_path).encoder.weights == str(files["base"])


SIDE = "features_extractor.adaptations.rgb.adapters.task.side.encoder."


@pytest.mark.filterwarnings("ignore:.*look untrained")
def test_statistics_of_a_distilled_side_network_stay_after_resuming_too(room, tmp_path):
    side = make_encoder("resnet44", weights="random")
    with torch.no_grad():
        for name, value in side.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
    file = tmp_path / "side.safetensors"
    save_safetensors(file, side.state_dict())
    asked = [
        "encoder=resnet44",
        "encoder.weights=random",
        "adaptation.side_init=distilled",
        f"adaptation.side_weights={file}",
        "algorithm.total_frames=16",
        "algorithm.num_envs=2",
        "algorithm.num_steps=4",
        "algorithm.epochs=1",
        "imitation.frames=0",
        "algorithm.anchor_coef=0",
        "algorithm.anchor_frames=0",
        "evaluation.every_frames=0",
    ]
    straight = train(settings(room, tmp_path / "straight", *asked), silent())
    train(settings(room, tmp_path / "run", *asked, "algorithm.max_minutes=1e-6"), silent())
    file.unlink()
    resumed = train(load_config([f"resume={tmp_path / 'run'}", "algorithm.max_minutes=0"]), silent())
    assert int(resumed.checkpoint("latest").stem) == 16
    assert numbers(resumed) == numbers(straight)
    learned = resumed.load_checkpoint("latest")["policy"]
    statistics = [name for name in side.state_dict() if "running_" in name]
    assert all(torch.equal(learned[SIDE + name], side.state_dict()[name]) for name in statistics)
    # Whoever loads the agent to train it further is in the same position.
    config = read_config(resumed.config_path)
    split = load_split(config, "val")
    env = make_vector_env(config, split.episodes, split.scenes, 1)
    policy = load_policy(resumed, env, "latest").train()
    assert not any(
        module.training
        for module in policy.features_extractor.adaptations["rgb"].side.modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    )
    env.close()


def test_the_plan_tells_memory_and_what_becomes_of_frozen_features(whole):
    text = " ".join(whole[1].split())
    assert re.search(r"memory +\d+ MB beside the [\d.,]+ [MG]B held now: a rollout \d MB", text), text
    assert "rgb: frozen features are stored once a frame" in text


def test_a_training_that_cannot_fit_is_refused_with_advice_and_leaves_nothing(room, tmp_path, monkeypatch):
    monkeypatch.setattr("navagent.memory_estimate.available_memory", lambda: 64 << 20)
    with pytest.raises(ConfigError, match=r"not fit into memory.* algorithm\.num_steps=\d+ needs \d+ MB"):
        train(settings(room, tmp_path / "run", "algorithm.num_steps=65536"), silent())
    assert not (tmp_path / "run").exists()


def test_the_command_says_by_its_status_that_it_was_stopped(room, tmp_path, monkeypatch, capsys):
    interrupt_after(monkeypatch, 1)
    assert main(["train", *words(room, tmp_path / "run")]) == 130
    assert "navagent train resume=" in capsys.readouterr().out


@pytest.mark.parametrize("number", STATUS)
def test_the_command_asks_by_its_status_to_be_queued_again_or_not(room, tmp_path, monkeypatch, number):
    interrupt_after(monkeypatch, 1, number)
    with pytest.raises(SystemExit) as caught:
        main(["train", *words(room, tmp_path / "run")])
    assert caught.value.code == STATUS[number]


def test_work_after_the_last_checkpoint_is_taken_back_and_done_again(whole, room, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole[0].path, copy)
    run = Run(copy)
    # As after a crash: the newest checkpoint is older than the newest metrics, whose last line is cut short.
    run.checkpoint("latest").unlink()
    with run.metrics_path.open("a") as file:
        file.write('{"frames": 22')
    assert int(run.checkpoint("latest").stem) == 96
    resumed = train(load_config([f"resume={copy}"]), silent())
    assert numbers(resumed) == numbers(whole[0])


def test_a_second_interrupt_stops_at_once(room, tmp_path, monkeypatch):
    original = Trainer._on_rollout_end

    def hook(self):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        original(self)

    monkeypatch.setattr(Trainer, "_on_rollout_end", hook)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(settings(room, tmp_path / "run"), silent())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_can_be_resumed_to_train_longer(whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole[0].path, copy)
    run = train(load_config([f"resume={copy}", f"algorithm.total_frames={FRAMES + 32}"]), silent())
    assert int(run.checkpoint("latest").stem) == FRAMES + 32
    # Who goes on once more, or reads the report, is told of the budget that the run has now.
    assert load_config([f"resume={copy}"]).algorithm.total_frames == FRAMES + 32
    assert read_config(run.config_path).resume is None


def test_evaluations_can_be_asked_for_and_given_up_on_resuming(whole, tmp_path):
    for every, expected in ((0, [96, 192]), (32, [96, 192, 224, 256])):
        copy = tmp_path / str(every)
        shutil.copytree(whole[0].path, copy)
        longer = f"algorithm.total_frames={FRAMES + 64}"
        run = train(load_config([f"resume={copy}", longer, f"evaluation.every_frames={every}"]), silent())
        evaluated = [record["frames"] for record in run.read_metrics() if "eval/spl" in record]
        assert evaluated == expected


def test_a_limit_in_minutes_ends_the_training(room, tmp_path):
    run = train(settings(room, tmp_path / "run", "algorithm.max_minutes=1e-6"), silent())
    assert int(run.checkpoint("latest").stem) == 32
    resumed = train(load_config([f"resume={run.path}"]), silent())
    assert int(resumed.checkpoint("latest").stem) == 32


def test_the_algorithm_saves_loads_and_predicts_as_stable_baselines3s_do(room, tmp_path):
    config = settings(room, tmp_path / "run")
    model = make_model(config, load_split(config, "train"))
    model.learn(64)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=model.env, device="cpu")
    observations, states = model.env.reset(), (None, None)
    starts = np.ones(4, dtype=bool)
    for _ in range(5):
        (actions, one), (again, other) = (
            agent.predict(observations, state, starts, deterministic=True)
            for agent, state in zip((model, loaded), states, strict=True)
        )
        assert actions.tolist() == again.tolist()
        assert np.array_equal(one[0], other[0])
        observations, _, starts, _ = model.env.step(actions)
        states = (one, other)
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.num_timesteps == 96
    model.env.close()


def test_broken_and_foreign_checkpoints_are_refused_before_training(whole, room, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole[0].path, copy)
    newest = Run(copy).checkpoint("latest")
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        train(load_config([f"resume={copy}"]), silent())
    other = train(
        settings(room, tmp_path / "other", "memory.hidden_size=8", "algorithm.total_frames=32"), silent()
    )
    newest.unlink()
    shutil.copy(other.checkpoint("latest"), newest)
    before = (copy / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match="does not fit the settings of"):
        train(load_config([f"resume={copy}"]), silent())
    assert (copy / "metrics.jsonl").read_text() == before


def test_a_run_is_never_overwritten_and_missing_splits_are_named(whole, room, tmp_path):
    with pytest.raises(RunError, match="there is a run already"):
        train(settings(room, whole[0].path), silent())
    with pytest.raises(ValueError, match="'testing'"):
        train(settings(room, tmp_path / "run", "scenes.val_split=testing"), silent())
    with pytest.raises(ValueError, match="no default weights ship for encoder 'fcn8'"):
        train(settings(room, tmp_path / "run", "encoder.name=fcn8", "encoder.weights=default"), silent())
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="not the folder of a run"):
        load_config([f"resume={tmp_path}"])


def test_saved_settings_are_those_asked_for(whole):
    config = read_config(whole[0].config_path)
    assert config.algorithm.total_frames == FRAMES
    assert config.memory.hidden_size == 16
    assert json.loads((whole[0].path / "versions.json").read_text())["torch"]


def test_progress_in_words():
    assert duration(59.6) == "1:00"
    assert duration(3725) == "1:02:05"
    record = {"rollout/success": 0.5, "rollout/spl": 0.25, "rollout/max_geodesic": 7.5}
    assert measures_line(record) == "success 0.50  SPL 0.25  paths to 8 m"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["adaptation=residual_adapters", "encoder=vit_mini"], "encoder 'vit_mini' has none"),
        (["adaptation=hst", "encoder=resnet_small"], "encoder 'resnet_small' is none; choose vit_mini"),
        (["adaptation=spottune"], "block by block, and encoder 'fcn5_small' has none"),
        (["encoder=vit_mini", "sensors.height=50"], "50"),
        (["adaptation.side_encoder=fcn4", "adaptation.side_init=random"], "they must have one shape"),
        (["adaptation.side_init=zero", "encoder=fcn5", "encoder.weights=random"], "ends in a ReLU"),
        (["encoder.weights=other.safetensors"], "other.safetensors does not fit FCN5"),
        (["adaptation=ewc"], "no earlier task: it would be plain fine-tuning. Use adaptation=finetune"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*look untrained")
def test_methods_encoders_and_weights_that_do_not_fit_are_refused_before_homes_are_made(
    asked, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_safetensors("other.safetensors", make_encoder("fcn4", weights="random").state_dict())
    random_state = torch.get_rng_state()
    assert main(["train", *asked, f"run_dir={tmp_path / 'run'}"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert message in told
    assert "adaptation=" in told
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_agent_learns_by_the_routes_that_it_acted_by_and_is_told_where_it_does_not(room, tmp_path):
    asked = ["adaptation=spottune", "encoder=resnet_small", "algorithm.total_frames=32"]
    output = silent()
    run = train(settings(room, tmp_path / "run", *asked, "evaluation.every_frames=0"), output)
    assert read_config(run.config_path).adaptation.options == {"noise": False}
    assert "notice" not in output.file.getvalue()
    config = settings(
        room, tmp_path / "drawn", *asked, "adaptation.noise=true", "adaptation.policy_norm=batch"
    )
    model = make_model(config, load_split(config, "train"))
    memory = plan_memory(config, model, [])
    split = load_split(config, "val")
    output = silent()
    output.print(plan(config, run, model, split, split, memory))
    told = " ".join(output.file.getvalue().split())
    assert (
        "is not the one that acted (rgb: BatchNorm takes its statistics from the batch, routes are drawn)"
        in told
    )
    model.env.close()


def test_what_chooses_routes_learns_at_its_own_rate_under_the_schedule_and_after_resuming(room, tmp_path):
    asked = [
        "adaptation=spottune",
        "encoder=resnet_small",
        "encoder.weights=random",
        "adaptation.policy_rate=0.1",
        "algorithm.learning_rate=1e-3",
        "algorithm.learning_rate_schedule=linear",
        "algorithm.total_frames=64",
        "imitation.frames=0",
        "algorithm.anchor_coef=0",
        "algorithm.anchor_frames=0",
        "algorithm.epochs=1",
        "algorithm.num_minibatches=1",
        "evaluation.every_frames=0",
    ]
    rates, moves = [], []
    step = torch.optim.Adam.step

    def watched(self, *arguments, **options):
        groups = self.param_groups
        before = [[p.detach().clone() for p in group["params"]] for group in groups]
        step(self, *arguments, **options)
        rates.append([group["lr"] for group in groups])
        moves.append(
            [
                max(
                    float((p.detach() - old).abs().max())
                    for p, old in zip(group["params"], olds, strict=True)
                )
                for group, olds in zip(groups, before, strict=True)
            ]
        )

    config = settings(room, tmp_path / "run", *asked)
    model = make_model(config, load_split(config, "train"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", watched)
        model.learn(96)
    # The schedule has come a third of the way after the first of three rollouts.
    assert rates[0] == pytest.approx([2e-3 / 3, 2e-4 / 3, 2e-3 / 3, 2e-3 / 3])
    assert rates[1] == pytest.approx([rate / 2 for rate in rates[0]])
    # Adam's steps are at most about the learning rate. Routes matter from the second on, when copies differ.
    assert moves[0][0] == pytest.approx(rates[0][0], rel=0.02)
    assert 0.5 * rates[1][1] < moves[1][1] < 1.1 * rates[1][1]
    other = make_model(config, load_split(config, "train"))
    other.load_training_state(model.training_state())
    other.set_logger(model.logger)
    other._update_learning_rate(other.policy.optimizer)
    blocks, choosing, *rest = (group["lr"] for group in other.policy.optimizer.param_groups)
    assert choosing == pytest.approx(0.1 * blocks)
    assert set(rest) == {blocks}
    for each in (model, other):
        each.env.close()


def test_weights_that_were_not_fetched_are_named_before_homes_are_made(tmp_path, monkeypatch):
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path))
    config = load_config(["encoder=dinov2_small", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match="navagent weights fetch dinov2-small"):
        train(config, Console(quiet=True))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "homes").exists()
