import io
import json
import struct
import time

import numpy as np
import pytest
import torch
from full_disk import NO_TINY_DISK, LimitedFiles, TinyDisk, fill_and_free, fill_for_good
from learning_world import LineVecEnv, LineWorld, RecurrentPolicy, SeeingWorld
from safetensors.torch import save_file
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger

from navagent.learning.imitation import ImitationConfig
from navagent.learning.ppo import PPO
from navagent.learning.schedules import LearningRate
from navagent.runs import CheckpointError, Run, RunError, pack, read_checkpoint, unpack, write_checkpoint
from policies.actor_critic import NavigationPolicy


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", "seed: 0\n")


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_nested_state_comes_back_as_it_was(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "tensors": {"a": shared, "view": shared[2:4], "half": torch.ones(2, dtype=torch.float16)},
        "empty": torch.zeros(3, 0),
        "scalar": torch.tensor(3),
        "optimizer": {0: {"step": torch.tensor(1.0)}, 7: [1, 2.5, None, True, "text"]},
        "random": np.random.default_rng(0).bit_generator.state,
        "legacy": np.random.RandomState(0).get_state(),
        "nested": (1, (2, [3, {}])),
        "infinite": float("inf"),
    }
    write_checkpoint(tmp_path / "a.safetensors", state)
    assert same(read_checkpoint(tmp_path / "a.safetensors"), state)


def test_what_json_cannot_hold_is_refused_by_its_place():
    with pytest.raises(TypeError, match="/policy/1: a set cannot be saved"):
        pack({"policy": [1, {2}]})


@pytest.mark.parametrize(
    "structure", [{"call": "os.system"}, {"tensor": "a", "array": "b"}, {"tensor": "missing"}, {"items": [3]}]
)
def test_unknown_structures_are_refused(structure):
    with pytest.raises((KeyError, TypeError, ValueError)):
        unpack({"a": torch.zeros(1)}, structure)


def broken_files(folder):
    good = folder / "good.safetensors"
    write_checkpoint(good, {"weights": torch.arange(1000.0)})
    whole = good.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])

    def with_header(change):
        changed = json.loads(json.dumps(header))
        change(changed)
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    def state(text):
        return with_header(lambda h: h["__metadata__"].update(state=text))

    yield "cut short", whole[:-100], "not a whole safetensors file"
    yield "header cut short", whole[:20], "not a whole safetensors file"
    yield "empty", b"", "not a whole safetensors file"
    yield "huge header", struct.pack("<Q", 2**62) + whole[8:], "not a whole safetensors file"
    yield "pickle", b"\x80\x04cos\nsystem\n(S'true'\ntR.", "not a whole safetensors file"
    outside = with_header(lambda h: h["/weights"].update(data_offsets=[0, 10**9]))
    yield "offsets outside", outside, "not a whole safetensors file"
    wrong = "does not describe a checkpoint"
    yield "not json", state("{"), wrong
    yield "missing tensor", state('{"items": [["a", {"tensor": "b"}]]}'), wrong
    yield "not a mapping", state("3"), wrong
    yield "deep", state("[" * 100_000 + "]" * 100_000), wrong
    yield "unhashable key", state('{"items": [[[], 1]]}'), wrong
    yield "newer", with_header(lambda h: h["__metadata__"].update(version="99")), "version '99'"


def test_broken_and_hostile_checkpoints_are_refused_with_their_name(tmp_path):
    count = 0
    for name, content, message in broken_files(tmp_path):
        file = tmp_path / "bad.safetensors"
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            read_checkpoint(file)
        assert str(file) in str(caught.value), name
        count += 1
    assert count == 12


def test_foreign_safetensors_files_are_told_apart(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of a navagent run"):
        read_checkpoint(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        read_checkpoint(tmp_path / "missing.safetensors")


def test_newest_checkpoints_and_the_best_are_kept(run):
    for frames in (100, 200, 300, 400):
        path = run.save_checkpoint(frames, {"frames": frames}, keep=2)
        if frames == 100:
            run.mark_best(path)
    assert [int(file.stem) for file in run.checkpoints()] == [300, 400]
    assert run.load_checkpoint("latest")["frames"] == 400
    assert run.load_checkpoint("best")["frames"] == 100
    assert run.load_checkpoint(300)["frames"] == run.load_checkpoint("300")["frames"] == 300
    with pytest.raises(CheckpointError, match=r"no checkpoint 100; .* by frames, 300, 400"):
        run.load_checkpoint(100)
    run.mark_best(run.checkpoint("latest"))
    assert run.load_checkpoint("best")["frames"] == 400
    assert not list(run.checkpoint_dir.glob(".partial*"))


def test_without_a_best_one_the_latest_is_the_best(run):
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        run.checkpoint("best")
    run.save_checkpoint(7, {"frames": 7})
    assert run.load_checkpoint("best")["frames"] == 7


def test_a_crash_while_writing_leaves_the_old_checkpoint(run, monkeypatch):
    run.save_checkpoint(5, {"frames": 5})

    def crash(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", crash)
    with pytest.raises(OSError, match="No space left"):
        run.save_checkpoint(5, {"frames": 6})
    assert run.load_checkpoint()["frames"] == 5
    assert len(list(run.checkpoint_dir.iterdir())) == 1


def test_metrics_are_lines_and_are_taken_back_to_a_checkpoint(run):
    for frames in (10, 20, 30):
        run.append_metrics({"frames": frames, "loss": float("nan") if frames == 20 else 0.5})
    with run.metrics_path.open("a") as file:
        file.write('{"frames": 40, "lo')
    assert [record["frames"] for record in run.read_metrics()] == [10, 20, 30]
    run.truncate_metrics(20)
    run.append_metrics({"frames": 30, "loss": 1.0})
    assert run.read_metrics() == [
        {"frames": 10, "loss": 0.5},
        {"frames": 20, "loss": None},
        {"frames": 30, "loss": 1.0},
    ]


def test_a_run_says_what_it_ran_on_and_is_never_overwritten(run):
    assert run.config_path.read_text() == "seed: 0\n"
    assert run.versions["torch"].startswith(torch.__version__.split("+")[0])
    assert {"python", "navagent", "warp-lang", "stable-baselines3", "commit", "cpu"} <= set(run.versions)
    with pytest.raises(RunError, match="there is a run already; give another run_dir, or resume="):
        Run.create(run.path, "")
    with pytest.raises(RunError, match="not the folder of a run"):
        Run(run.path / "nothing")
    (run.path / "versions.json").write_text("{")
    with pytest.raises(RunError, match=r"versions\.json: not JSON"):
        _ = run.versions


@pytest.mark.parametrize("disk", [TinyDisk, LimitedFiles], ids=["tiny disk", "limited files"])
@pytest.mark.parametrize("story", [fill_and_free, fill_for_good])
def test_a_full_disk_is_reported_and_the_last_good_checkpoint_stays(tmp_path, processes, disk, story):
    process = processes.start(story, disk, tmp_path / "disk")
    process.join()
    if process.exitcode == NO_TINY_DISK:
        pytest.skip("this system does not let a process mount a file system for itself")
    assert process.exitcode == 0


def test_metrics_stay_whole_lines_where_the_disk_takes_no_more(run, monkeypatch):
    run.append_metrics({"frames": 10})

    class Full(io.FileIO):
        def write(self, data):
            super().write(data[:5])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(run.metrics_path), "open", lambda path, mode, buffering: Full(path, "a"))
    with pytest.raises(OSError, match="No space left"):
        run.append_metrics({"frames": 20})
    monkeypatch.undo()
    run.append_metrics({"frames": 30})
    assert [record["frames"] for record in run.read_metrics()] == [10, 30]


def claim(folder, seconds):
    with Run(folder).claimed():
        time.sleep(seconds)


def test_one_training_at_a_time_has_a_folder_and_clears_what_a_killed_one_left(run, processes):
    run.save_checkpoint(5, {"frames": 5})
    process = processes.start(claim, run.path, 60)
    while not (run.path / ".lock").exists() or not (run.path / ".lock").read_text():
        time.sleep(0.01)
    with (
        pytest.raises(RunError, match=rf"process {process.pid} on .* is training in this folder"),
        run.claimed(),
    ):
        pass
    process.kill()
    process.join()
    for name in (".partial-abc-000000000009.safetensors", ".tmpXyZ"):
        (run.checkpoint_dir / name).write_bytes(b"half")
    (run.path / ".partial-abc-metrics.jsonl").write_bytes(b"half")
    with run.claimed():
        assert [file.name for file in run.checkpoint_dir.iterdir()] == ["000000000005.safetensors"]
        assert not list(run.path.glob(".partial*"))


def test_packed_state_does_not_change_with_its_original(tmp_path):
    weights, list_of = torch.zeros(3), [1]
    packed = pack({"weights": weights, "array": weights.numpy(), "list": list_of})
    weights += 1
    list_of.append(2)
    write_checkpoint(tmp_path / "a.safetensors", packed)
    state = read_checkpoint(tmp_path / "a.safetensors")
    assert state["weights"].tolist() == state["array"].tolist() == [0, 0, 0]
    assert state["list"] == [1]


def learner(seed=0):
    return PPO(
        RecurrentPolicy,
        LineVecEnv(LineWorld(num_envs=4)),
        n_steps=8,
        n_minibatches=2,
        n_epochs=2,
        seed=seed,
        device="cpu",
        imitation=ImitationConfig(frames=128, anchor_coef=0.5, anchor_frames=1000),
    )


@pytest.mark.parametrize("saved_at", [64, 192], ids=["while imitating", "in ppo"])
def test_training_goes_on_from_a_checkpoint_exactly_as_it_would_have(run, saved_at):
    straight = learner()
    straight.learn(saved_at)
    run.save_checkpoint(saved_at, straight.training_state())
    straight.learn(320 - saved_at, reset_num_timesteps=False)

    # Another process would have used its random numbers otherwise.
    torch.manual_seed(12345)
    resumed = learner(seed=9)
    resumed.load_training_state(run.load_checkpoint())
    resumed.learn(320 - saved_at, reset_num_timesteps=False)
    assert resumed.num_timesteps == straight.num_timesteps == 320
    assert list(resumed.recent_episodes) == list(straight.recent_episodes)
    for name, value in straight.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name]), name
    for name in ("rewards", "actions", "values", "log_probs"):
        assert torch.equal(straight.rollout_buffer[name], resumed.rollout_buffer[name])


class Diary(BaseCallback, KVWriter):
    """Keeps every logged number, and the state after each update."""

    def __init__(self):
        super().__init__()
        self.lines, self.states = [], {}

    def _on_training_start(self):
        self.model.set_logger(Logger(None, [self]))

    def write(self, values, excluded, step=0):
        self.lines.append(
            {key: value for key, value in values.items() if not key.startswith("time/")} | {"frames": step}
        )

    def _on_step(self):
        return True

    def on_update_end(self):
        self.states[self.model.num_timesteps] = pack(self.model.training_state())
        return True


AGENTS = {
    "annealed alpha, GRU": ("gru", "sidetune", {"learn_alpha": False, "alpha_schedule": "cosine"}, {}),
    "alpha by samples, frame stack": (
        "frame_stack",
        "sidetune",
        {"learn_alpha": False, "alpha_schedule": "map", "alpha_prior": 20.0},
        {},
    ),
    "mid-tuning, LSTM of two layers": ("lstm", "midtune", {"unfreeze_at": 0.5}, {"layers": 2}),
    "drawn routes, no memory": ("none", "spottune", {"evaluation": "sample"}, {"encoder": "resnet_small"}),
    "masks, frame stack": ("frame_stack", "piggyback", {"encoder": "resnet_small"}, {}),
    "from scratch, GRU": ("gru", "scratch", {}, {"encoder": "resnet_small"}),
    "ladder, LSTM": ("lstm", "ladder", {"reduction": 4}, {"encoder": "resnet_small"}),
    "superposition, GRU": ("gru", "superposition", {}, {}),
}
STEPS, UPDATES = 16, 6


def seeing_learner(name, seed=0):
    memory, adaptation, options, settings = AGENTS[name]
    options = dict(options)
    settings = {"encoder": options.pop("encoder", "fcn5_small"), **settings}
    return PPO(
        NavigationPolicy,
        LineVecEnv(SeeingWorld(num_envs=4)),
        learning_rate=LearningRate(1e-3, "cosine"),
        n_steps=STEPS // 4,
        n_minibatches=2,
        n_epochs=1,
        seed=seed,
        device="cpu",
        imitation=ImitationConfig(frames=2 * STEPS, anchor_coef=0.5, anchor_frames=1000),
        policy_kwargs={
            "weights": "random",
            "memory": memory,
            "hidden_size": 8,
            "image_features": 8,
            "adaptation": adaptation,
            "adaptation_options": options,
            **settings,
        },
    )


@pytest.mark.parametrize("name", AGENTS)
def test_interrupted_after_any_update_every_kind_of_agent_logs_what_it_would_have(name):
    whole = Diary()
    seeing_learner(name).learn(UPDATES * STEPS, callback=whole)
    assert len(whole.lines) == UPDATES
    for done in range(1, UPDATES):
        torch.manual_seed(12345)
        resumed, rest = seeing_learner(name, seed=9), Diary()
        resumed.load_training_state(unpack(*whole.states[done * STEPS]))
        resumed.learn((UPDATES - done) * STEPS, callback=rest, reset_num_timesteps=False)
        assert rest.lines == whole.lines[done:]
        last, expected = (diary.states[UPDATES * STEPS] for diary in (rest, whole))
        assert last.structure == expected.structure
        for place, value in expected.tensors.items():
            assert torch.equal(last.tensors[place], value), place
