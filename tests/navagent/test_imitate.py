"""``navagent imitate``: DAgger, behaviour cloning, and PPO that begins as an imitated agent."""

import dataclasses
import io
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from one_room import TINY, write_one_room, write_rooms
from rich.console import Console
from test_train import interrupt_after, numbers

from navagent.cli import main
from navagent.config import ConfigError, TrainConfig, load_config
from navagent.demonstrations.recorded import read_demonstrations
from navagent.evaluation.report import reproduce_command
from navagent.learning.demonstrated import demonstrations_of
from navagent.runs import CheckpointError, Origin, Run, read_checkpoint
from navagent.train import begin_as, teaching, train
from policies.adaptation.base import FrozenEncoder

FRAMES = 4 * 32


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return write_one_room(tmp_path_factory.mktemp("room"), num_train=24, num_val=4)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch, tmp_path_factory):
    draw = "navagent.evaluation.report.draw_curves"
    monkeypatch.setattr(draw, lambda records, path, *_: path.write_bytes(b"a picture"))
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def words(room, path, *overrides):
    return [
        f"scenes.dataset={room}",
        f"run_dir={path}",
        *TINY,
        "env.max_steps=60",
        f"algorithm.total_frames={FRAMES}",
        "algorithm.num_envs=4",
        "algorithm.num_steps=8",
        "evaluation.every_frames=0",
        "evaluation.num_episodes=4",
        "evaluation.num_envs=2",
        "evaluation.final_episodes=0",
        *overrides,
    ]


def silent():
    return Console(file=io.StringIO(), width=200)


def imitate(room, path, *overrides, console=None):
    return train(load_config(words(room, path, *overrides), "imitate"), console or silent())


METHODS = {
    "dagger online": (),
    "dagger aggregated, exponential": (
        "imitation.schedule=exponential",
        "imitation.decay=0.5",
        "algorithm.replay_epochs=2",
        "algorithm.replay_steps=20",
    ),
    "dagger on all rollouts alike, lstm": (
        "algorithm.epochs=0",
        "algorithm.replay_epochs=4",
        "algorithm.replay_steps=32",
        "memory=lstm",
    ),
    "cloning": ("imitation=behaviour_cloning", "imitation.num_demos=10", "memory=frame_stack"),
    "cloning with stored features": (
        "imitation=behaviour_cloning",
        "imitation.num_demos=10",
        "imitation.store_features=true",
    ),
    "stop is automatic": ("env.stop=automatic", "memory=none", "imitation.schedule=constant"),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_imitation_that_was_stopped_goes_on_as_if_it_had_not_been(room, tmp_path, monkeypatch, method):
    whole = imitate(room, tmp_path / "whole", *METHODS[method])
    records = [record for record in whole.read_metrics() if "imitation/loss" in record]
    assert [record["rollout/phase"] for record in records] == ["imitation"] * 4
    assert ("replay/agreement" in records[-1]) == ("aggregated" in method)
    assert records[-1]["imitation/loss"] < records[0]["imitation/loss"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_after(patch, 2, signal.SIGTERM)
        output = silent()
        imitate(room, tmp_path / "stopped", *METHODS[method], console=output)
    stopped = Run(tmp_path / "stopped")
    assert len(stopped.read_metrics()) == 2
    assert f"navagent imitate resume={stopped.path}" in " ".join(output.file.getvalue().split())
    resumed = train(load_config([f"resume={stopped.path}"], "imitate"), silent())
    assert numbers(resumed) == numbers(whole)
    assert "navagent imitate" in reproduce_command(load_config([f"resume={whole.path}"]))


def test_cloning_records_its_own_demonstrations_once_and_says_so(room, tmp_path):
    console = silent()
    asked = "imitation=behaviour_cloning", "imitation.num_demos=10", f"algorithm.total_frames={32}"
    imitate(room, tmp_path / "first", *asked, console=console)
    file = demonstrations_of(load_config(words(room, tmp_path / "x", *asked), "imitate"))
    assert len(read_demonstrations(file)) == 10
    told = " ".join(console.file.getvalue().split())
    assert f"demonstrations {file}" in told
    assert "by behaviour cloning from 10 demonstrations" in told
    before = file.stat().st_mtime_ns
    imitate(room, tmp_path / "fewer", *asked[:1], "imitation.num_demos=5", asked[2])
    assert file.stat().st_mtime_ns == before
    # Asked for by name, they are the same.
    named = imitate(room, tmp_path / "named", *asked, f"imitation.demos={file}")
    assert numbers(named) == numbers(Run(tmp_path / "first"))


def test_the_expert_is_asked_in_the_simulator_that_is_chosen(room, tmp_path, monkeypatch):
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path))
    asked = []
    record = "navagent.learning.demonstrated.record_demonstrations"
    monkeypatch.setattr(record, lambda options, progress: asked.append(options.settings))
    monkeypatch.setattr("navagent.learning.demonstrated.read_demonstrations", lambda path: None)
    cloning = words(room, tmp_path, "imitation=behaviour_cloning")
    habitat = "simulator=habitat", "simulator.workers=3"
    files = {demonstrations_of(load_config([*cloning, *more], "imitate")) for more in ((), habitat)}
    assert len(files) == 2
    assert not any(word.startswith("simulator.") for word in asked[0])
    assert {"simulator.name=habitat", "simulator.workers=3"} < set(asked[1])
    assert load_config(asked[1]).simulator.workers == 3
    # How many processes do it does not change what is done.
    assert demonstrations_of(load_config([*cloning, "simulator=habitat"], "imitate")) in files


CLONING = ("imitation=behaviour_cloning", "imitation.num_demos=4")


@pytest.mark.parametrize(
    "asked",
    [
        ("adaptation=spottune", "encoder=resnet_small", "memory=lstm"),
        ("adaptation=hst", "encoder=vit_mini", "env.stop=automatic"),
        ("adaptation=finetune", "sensors=depth", *CLONING),
        ("sensors=blind", "memory=none", *CLONING),
    ],
    ids=lambda asked: asked[0],
)
def test_any_agent_is_imitated(room, tmp_path, asked):
    run = imitate(room, tmp_path / "run", "algorithm.total_frames=32", "imitation.minibatches=2", *asked)
    (record,) = run.read_metrics()
    assert 0 < record["imitation/loss"] < 3
    assert record["train/grad_norm"] > 0


@pytest.fixture(scope="module")
def demos(room, tmp_path_factory):
    """Six demonstrations of eight that were wanted: the recording was interrupted."""
    file = tmp_path_factory.mktemp("demos") / "expert.demos"
    world = ["demos", "record", str(file), f"scenes.dataset={room}", "env.max_steps=60"]
    assert main([*world, "--number", "6"]) == 0
    held = read_demonstrations(file)
    held.header = dataclasses.replace(held.header, wanted=8)
    held.save(file)
    return file


def test_a_partly_recorded_set_can_be_cloned(room, tmp_path, demos):
    console = silent()
    asked = "imitation=behaviour_cloning", f"imitation.demos={demos}", "algorithm.total_frames=32"
    run = imitate(room, tmp_path / "run", *asked, console=console)
    assert "from 6 demonstrations" in " ".join(console.file.getvalue().split())
    assert [record["frames"] for record in run.read_metrics()] == [32]


def truncated(file, room):
    file.write_bytes(file.read_bytes()[:-100])
    return room


def of_another_version(file, room):
    file.write_bytes(file.read_bytes().replace(b'\\"version\\": 1', b'\\"version\\": 7'))
    return room


def of_another_scene(file, room):
    other = file.parent / "other"
    shutil.copytree(room, other)
    scene = other / "scenes" / "room" / "room.glb"
    scene.write_bytes(scene.read_bytes() + b"more")
    return other


def test_with_stored_features_the_frozen_encoder_is_done_before_training(room, tmp_path, demos, monkeypatch):
    asked = "imitation=behaviour_cloning", f"imitation.demos={demos}", "algorithm.total_frames=64"
    plain = imitate(room, tmp_path / "plain", *asked)
    images = []
    original = FrozenEncoder.forward
    monkeypatch.setattr(
        FrozenEncoder, "forward", lambda self, image: images.append(len(image)) or original(self, image)
    )
    console = silent()
    stored = imitate(room, tmp_path / "stored", *asked, "imitation.store_features=true", console=console)
    told = " ".join(console.file.getvalue().split())
    assert "stored features" in told
    for one, other in zip(plain.read_metrics(), stored.read_metrics(), strict=True):
        assert one["imitation/loss"] == pytest.approx(other["imitation/loss"], rel=1e-4)
    # Every step of the demonstrations once, and not those of training; beside it, what plans the training.
    steps = int(read_demonstrations(demos).steps.sum())
    assert steps <= sum(images) < steps + 64
    images.clear()
    imitate(room, tmp_path / "again", *asked, "imitation.store_features=true")
    assert sum(images) < 64
    other = imitate(
        room,
        tmp_path / "other",
        *asked,
        "imitation.store_features=true",
        "adaptation=finetune",
        console=console,
    )
    assert "stored features nothing, for the agent has none" in " ".join(console.file.getvalue().split())
    assert other.read_metrics()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncated, "truncated, damaged, or no file of demonstrations"),
        (of_another_version, "demonstrations of version 7, this navagent reads version 1"),
        (of_another_scene, "scenes/room/room.glb"),
    ],
)
def test_demonstrations_that_do_not_fit_are_refused_by_name(
    room, tmp_path, demos, capsys, monkeypatch, change, message
):
    monkeypatch.setenv("NAVAGENT_DEBUG", "0")
    file = tmp_path / "mine.demos"
    shutil.copy(demos, file)
    world = change(file, room)
    asked = words(world, tmp_path / "run", "imitation=behaviour_cloning", f"imitation.demos={file}")
    assert main(["imitate", *asked]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("navagent: ")
    assert not (tmp_path / "run").exists()


def test_demonstrations_in_homes_that_are_to_be_unseen_are_refused(room, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NAVAGENT_DEBUG", "0")
    file = tmp_path / "mine.demos"
    homes, others = (write_rooms(room, tmp_path / name, (name,)) for name in ("seen", "unseen"))
    shutil.rmtree(homes / "episodes" / "val")
    for folder in (Path("episodes", "val"), Path("scenes", "unseen")):
        shutil.copytree(others / folder, homes / folder)
    world = [f"scenes.dataset={homes}", "env.max_steps=60"]
    for split, status in (("val", 2), ("train", 0)):
        file.unlink(missing_ok=True)
        assert main(["demos", "record", str(file), "--split", split, "--number", "4", *world]) == 0
        cloning = "imitation=behaviour_cloning", f"imitation.demos={file}", "algorithm.total_frames=32"
        assert main(["imitate", *words(homes, tmp_path / "run", *cloning)]) == status
    told = capsys.readouterr().err
    assert "1 homes of split 'val' (scenes/unseen/unseen.glb)" in told and "scenes.val_split" in told


def test_more_agents_than_demonstrations_are_refused(room, tmp_path):
    with pytest.raises(ValueError, match="4 agents side by side for 3 demonstrations"):
        imitate(room, tmp_path / "run", "imitation=behaviour_cloning", "imitation.num_demos=3")
    assert not (tmp_path / "run").exists()


def test_the_settings_of_the_mixture_reach_it(room, tmp_path):
    asked = words(
        room, tmp_path, "imitation.schedule=exponential", "imitation.decay=0.25", "imitation.share=0.5"
    )
    config = teaching(load_config([*asked, "imitation.final_share=0.1", "imitation.alone=0.25"], "imitate"))
    assert [config.expert_share(frames) for frames in (0, 31, 32, 64, 95, 96)] == [
        0.5,
        0.5,
        0.125,
        0.1,
        0.1,
        0.0,
    ]
    before_ppo = words(room, tmp_path, "imitation.frames=50", "algorithm.num_minibatches=2")
    assert teaching(load_config(before_ppo)).frames == 50


@pytest.fixture(scope="module")
def imitated(room, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        draw = "navagent.evaluation.report.draw_curves"
        patch.setattr(draw, lambda records, path, *_: path.write_bytes(b"a picture"))
        return imitate(room, tmp_path_factory.mktemp("runs") / "imitated", "evaluation.every_frames=128")


REINFORCED = (
    f"algorithm.total_frames={4 * 32}",
    "algorithm.num_envs=4",
    "algorithm.num_steps=8",
    "algorithm.num_minibatches=2",
    "algorithm.critic_warmup_frames=64",
    "algorithm.anchor_frames=64",
    "evaluation.every_frames=0",
    "evaluation.num_episodes=4",
    "evaluation.num_envs=2",
    "evaluation.final_episodes=0",
)


def reinforced(imitated, path, *overrides):
    return load_config([f"start_from={imitated.path}", f"run_dir={path}", *REINFORCED, *overrides])


def test_ppo_begins_as_the_imitated_agent_and_its_critic_learns_first(imitated, tmp_path, monkeypatch):
    policies = []
    from navagent.train import Trainer

    original = Trainer.on_update_end

    def watched(self):
        policies.append({name: value.clone() for name, value in self.model.policy.state_dict().items()})
        return original(self)

    monkeypatch.setattr(Trainer, "on_update_end", watched)
    run = train(reinforced(imitated, tmp_path / "run"), silent())
    began = read_checkpoint(imitated.checkpoint("best"))["policy"]
    for state in policies[:2]:
        moved = {name for name in began if not torch.equal(state[name], began[name])}
        assert moved == {"value_net.weight", "value_net.bias"}
    assert not torch.equal(policies[2]["action_net.weight"], began["action_net.weight"])
    records = [record for record in run.read_metrics() if "train/loss" in record]
    assert [record["rollout/phase"] for record in records] == ["critic"] * 2 + ["ppo"] * 2
    assert run.origin == Origin(str(imitated.path.resolve()), "best.safetensors", FRAMES)
    # The pull begins where the critic has learned, and falls.
    assert "imitation/divergence" not in records[0]
    assert "imitation/divergence" in records[2]
    weights = [record["imitation/anchor_weight"] for record in records]
    assert weights[0] == weights[1] == pytest.approx(0.3)
    assert weights[1] > weights[2] > weights[3]


def test_the_frames_of_all_runs_that_an_agent_comes_from_are_noted(imitated, tmp_path):
    model = SimpleNamespace(policy=SimpleNamespace(load_state_dict=lambda state: None))

    def origin(of):
        return begin_as(model, dataclasses.replace(TrainConfig(), start_from=str(of)))

    assert origin(imitated.path) == Origin(str(imitated.path.resolve()), "best.safetensors", FRAMES)
    second = Run.create(tmp_path / "second", imitated.config_path.read_text(), origin(imitated.path))
    file = second.save_checkpoint(300, {"policy": {}, "frames": 300})
    second.append_metrics({"frames": 500})
    assert origin(second.path).frames == FRAMES + 500
    # Behind one of its checkpoints by name, there is only what was trained until then.
    assert origin(file).frames == FRAMES + 300


def test_an_imitated_agent_is_measured_before_it_is_reinforced(imitated, tmp_path):
    run = train(reinforced(imitated, tmp_path / "run", "evaluation.every_frames=64"), silent())
    evaluated = [record["frames"] for record in run.read_metrics() if "eval/spl" in record]
    assert evaluated == [0, 64, 128]
    stopped = load_config([f"resume={run.path}", f"algorithm.total_frames={5 * 32}"])
    train(stopped, silent())
    again = [record["frames"] for record in run.read_metrics() if "eval/spl" in record]
    assert again == [0, 64, 128, 160]


def test_reinforcing_is_resumed_exactly(imitated, tmp_path, monkeypatch):
    whole = train(reinforced(imitated, tmp_path / "whole"), silent())
    for updates in (1, 3):
        path = tmp_path / str(updates)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            interrupt_after(patch, updates, signal.SIGTERM)
            train(reinforced(imitated, path), silent())
        assert numbers(train(load_config([f"resume={path}"]), silent())) == numbers(whole)


def test_the_agents_settings_are_those_of_the_run_it_begins_as(imitated, room, tmp_path):
    config = reinforced(imitated, tmp_path)
    assert (config.sensors.height, config.memory.hidden_size, config.env.max_steps) == (16, 16, 60)
    assert config.scenes.dataset == str(room)
    assert (config.imitation.frames, config.algorithm.anchor_coef) == (0, 0.3)
    assert reinforced(imitated, tmp_path, "env.max_steps=20").env.max_steps == 20
    file = imitated.checkpoint("latest")
    assert load_config([f"start_from={file}"]).sensors.height == 16
    # Another experiment is taken as it is.
    assert load_config([f"start_from={file}", "experiment=quick"]).algorithm.anchor_coef == 0.0
    # DAgger can go on where cloning ended.
    assert load_config([f"start_from={file}"], "imitate").algorithm.name == "imitation"
    for word in ("sensors=depth", "memory=lstm", "adaptation.alpha=0.25", "env.stop=automatic"):
        with pytest.raises(ConfigError, match=r"which the agent of start_from=.* has; leave it out"):
            reinforced(imitated, tmp_path, word)


def test_what_is_no_run_is_not_begun_from(imitated, tmp_path):
    with pytest.raises(ConfigError, match="neither the folder of a run nor one of its"):
        load_config(["start_from=/no/such/run"])
    empty = Run.create(tmp_path / "empty", imitated.config_path.read_text())
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(reinforced(empty, tmp_path / "run"), silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imitation=dager"], "did you mean 'dagger'?"),
        (["imitation.decay=1.5"], "imitation.decay=1.5 is out of range: expected below 1"),
        (["imitation.schedule=cubic"], "not one of linear, exponential, constant"),
        (["algorithm.clip_range=0.3"], "algorithm.clip_range=0.3 means nothing with algorithm=imitation"),
        (["imitation.frames=7"], "imitation.frames=7 means nothing with algorithm=imitation"),
        (["imitation.demos=x"], "imitation.demos=x means nothing with imitation=dagger"),
        (
            ["imitation=behaviour_cloning", "imitation.demos=/no.demos"],
            "imitation.demos=/no.demos is not there",
        ),
        (
            ["imitation=behaviour_cloning", "imitation.decay=0.5"],
            "means nothing with imitation=behaviour_cloning",
        ),
        (["algorithm=ppo"], "algorithm=ppo learns by reward, and `navagent imitate` from an expert alone"),
        (
            ["algorithm.num_minibatches=4"],
            "algorithm.num_minibatches=4 means nothing with algorithm=imitation",
        ),
        (["imitation.decay=0.9"], "imitation.decay=0.9 means nothing with imitation.schedule=linear"),
        (
            ["imitation.schedule=exponential", "imitation.mixing=0.3"],
            "imitation.mixing=0.3 means nothing with imitation.schedule=exponential",
        ),
        (
            ["imitation.schedule=constant", "imitation.final_share=0"],
            "imitation.final_share=0.0 means nothing with imitation.schedule=constant",
        ),
        (
            ["imitation=behaviour_cloning", "algorithm.vf_coef=0.1"],
            "algorithm.vf_coef=0.1 means nothing with imitation=behaviour_cloning",
        ),
        (
            ["imitation=behaviour_cloning", "imitation.heading_coef=1"],
            "imitation.heading_coef=1.0 means nothing with imitation=behaviour_cloning",
        ),
        (["imitation=behaviour_cloning", "algorithm.curriculum=linear"], "plays none"),
        (["imitation.store_features=true"], "means nothing with imitation=dagger"),
        (
            ["imitation=behaviour_cloning", "imitation.store_features=true", "env.rgb_noise=0.1"],
            "imitation.store_features=true with noisy cameras",
        ),
        (["algorithm.epochs=0"], "algorithm.epochs=0 learns nothing from the newest rollout"),
        (["algorithm.replay_steps=9"], "replay_epochs=0 and algorithm.replay_steps=9"),
        (["--frames=3"], "see `navagent imitate --help`"),
    ],
)
def test_wrong_arguments_are_one_message_and_status_2(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("NAVAGENT_DEBUG", "0")
    assert main(["imitate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_an_expert_its_settings_mean_nothing(capsys, monkeypatch):
    monkeypatch.setenv("NAVAGENT_DEBUG", "0")
    settings = ("imitation.share=0.5", "imitation.inflection_weight=3.0", "imitation.heading_coef=1.0")
    for word in (*settings, "algorithm.anchor_coef=0.1"):
        assert main(["train", "imitation.frames=0", word]) == 2
        assert f"{word} means nothing with imitation.frames=0" in capsys.readouterr().err


def test_fewer_agents_than_ppo_has_minibatches_are_imitated(room, tmp_path):
    run = imitate(room, tmp_path / "run", "algorithm.num_envs=1", "algorithm.total_frames=8")
    (record,) = run.read_metrics()
    assert record["frames"] == 8 and record["imitation/loss"] > 0


def test_cloning_does_not_come_before_ppo_in_one_run(capsys, monkeypatch):
    monkeypatch.setenv("NAVAGENT_DEBUG", "0")
    assert main(["train", "imitation=behaviour_cloning"]) == 2
    assert "then `navagent train start_from=RUN`" in capsys.readouterr().err


def test_help_shows_the_verbs_own_defaults(capsys):
    assert main(["imitate", "--help"]) == 0
    told = capsys.readouterr().out
    assert "* algorithm=imitation" in told
    assert "scenes.num=150" in told
    assert "imitation.alone=0.0" in told
    assert main(["train", "--help"]) == 0
    told = capsys.readouterr().out
    assert "* algorithm=ppo" in told
    assert "scenes.num=40" in told
