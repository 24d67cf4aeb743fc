"""Processes that learn together. gloo on the CPU only: NCCL needs a CUDA device for every process."""

import io
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import learning_ranks
import pytest
import torch
from learning_ranks import Crew
from learning_world import RecurrentPolicy
from one_room import TINY, write_one_room
from rich.console import Console
from torch.nn import functional

from envs.episodes import Episode
from envs.vector_env import PointNavVectorEnv
from navagent import distributed
from navagent.build import Split, set_threads, share_of_scenes
from navagent.cli import main
from navagent.config import ConfigError, TrainConfig, load_config
from navagent.distributed import Launch, Ranks, Stragglers
from navagent.evaluation.results import read_results
from navagent.learning.rollout import generalized_advantages
from navagent.memory_estimate import own_part
from navagent.preemption import REQUEUE_STATUS
from navagent.runs import CheckpointError, Run, write_checkpoint
from navagent.train import train


@pytest.fixture
def together(processes, tmp_path):
    """Starts ranks that do some work together."""
    crews = []

    def start(work, size=2, **settings):
        folder = tmp_path / f"crew{len(crews)}"
        folder.mkdir()
        crews.append(Crew(processes, folder, size, learning_ranks.take_part, work, settings))
        return crews[-1]

    yield start
    for crew in crews:
        crew.kill()


def close(one, other, atol=1e-5):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def agree(records, expected, rel, abs):
    """Whether the same was logged, numbers up to rounding."""
    assert [record.keys() for record in records] == [record.keys() for record in expected]
    for record, other in zip(records, expected, strict=True):
        for name, value in other.items():
            if not isinstance(value, str):
                value = pytest.approx(value, rel=rel, abs=abs)
            assert record[name] == value, (record["frames"], name)


# What a process knows of the others ---------------------------------------------------------------------


def test_without_others_nothing_is_sent_and_no_number_changes():
    ranks, values = Ranks(), torch.randn(7)
    assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
    assert ranks.share([1, 2, 3]) == [1, 2, 3]
    assert ranks.sum(values) is values and ranks.rows(values) is values
    assert ranks.gather("a") == ["a"] and ranks.broadcast("a") == "a" and ranks.largest([2]) == [2]
    mean, deviation = ranks.mean_std(values)
    assert torch.equal(mean, values.mean()) and torch.equal(deviation, values.std())
    assert torch.equal(ranks.variance(values), values.var())
    assert ranks.average({"loss": values[0]}, 5) == ({"loss": values[0]}, 1.0)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_in_order_are_the_whole_and_differ_by_one_at_most(size):
    parts = []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        parts.append(ranks.share(range(7)))
    assert list(itertools.chain(*parts)) == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_learns_its_place_from_torchruns_variables():
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    there = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    assert Launch.read(told | there) == Launch(3, 4, 1, 2, "node1", 29500, hosted=False)
    assert Launch.read(told | there | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).hosted
    for alone in ({}, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "8"}, {"WORLD_SIZE": ""}):
        assert Launch.read(alone) is None
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT is not set: start them with torchrun"):
        Launch.read(told)


def test_gpus_talk_by_nccl_where_every_process_has_its_own(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    own, shared = [{"gpu": "node1 A"}, {"gpu": "node1 B"}], [{"gpu": "node1 A"}, {"gpu": "node1 A"}]
    assert distributed._backend(own) == "cpu:gloo,cuda:nccl"
    # All choose alike, also those whose own GPU nobody shares.
    assert distributed._backend([*own, *shared]) == "gloo"
    assert distributed._backend([{"gpu": None}, *own]) == "gloo"
    assert distributed._identity(torch.device("cpu"))["gpu"] is None
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert distributed._backend(own) == "gloo"


def test_every_operation_over_ranks_answers_what_all_their_numbers_say(together):
    one, two = together(learning_ranks.add_up).answers()
    assert one["share"] + two["share"] == list("abcdefg")
    assert one["gather"][1]["pair"] == (1, float("inf")) and one["gather"][1]["none"] is None
    assert [len(each["x"]) for each in one["gather"]] == [0, 1] and two["gather"] == []
    assert one["rows"].tolist() == [0, 1, 2] and two["rows"].tolist() == [3, 4, 5]
    values = torch.cat((one["values"], two["values"]))
    for rank in (one, two):
        assert rank["sum"].tolist() == [3.0, 20.0]
        assert rank["largest"] == [1, 0, 5]
        assert [each["from"] for each in rank["broadcast"]] == [0, 1]
        assert rank["broadcast"][1]["x"].tolist() == [1, 1]
        torch.testing.assert_close(rank["mean_std"], (values.mean(), values.std()))
        torch.testing.assert_close(rank["variance"], values.var())
        torch.testing.assert_close(rank["of first"], (one["values"].mean(), one["values"].std()))
        assert rank["average"][0] == {"a": torch.tensor(2.75), "b": torch.tensor(1.0)}
        assert rank["nan"].isnan()
        assert rank["nothing"][0]["a"] == 7.0
        assert rank["gradients"][0].tolist() == [[3.0] * 3] * 2
        assert rank["gradients"][1] is None
        assert rank["gradients"][2].tolist() == [0.0, 1.0, 2.0, 3.0]
        # Statistics of a layer that does not train stay as they are.
        assert rank["statistics"][0].tolist() == [0.5] * 3 and rank["statistics"][1].tolist() == [2.5] * 3
    assert (one["average"][1], two["average"][1]) == (0.25, 0.75)
    assert (one["nothing"][1], two["nothing"][1]) == (1.0, 0.0)
    assert (one["statistics"][2].tolist(), two["statistics"][2].tolist()) == ([0.0] * 3, [1.0] * 3)
    assert all(torch.equal(value, two["copied"][name]) for name, value in one["copied"].items())
    generator = torch.Generator().manual_seed(1)
    for rank in (one, two):
        assert torch.equal(rank["drawn"][0], torch.rand(3, generator=generator.manual_seed(1)))
    assert torch.equal(one["drawn"][1], two["drawn"][1])


def test_what_is_made_once_is_made_by_one_process_before_the_others_come(together, tmp_path):
    together(learning_ranks.take_turns, size=3, folder=tmp_path).answers()
    done = float((tmp_path / "done").read_text())
    assert float((tmp_path / "in0").read_text()) < done
    assert all(float((tmp_path / f"in{rank}").read_text()) >= done for rank in (1, 2))


# Learning -----------------------------------------------------------------------------------------------

TEACHING = {"frames": 10**6, "inflection_weight": 3.0, "mixing_fraction": 0.5}
CASES = {
    "ppo": {},
    "one minibatch": {"n_minibatches": 1},
    "a minibatch for every agent": {"n_minibatches": 6},
    "three processes": {"size": 3, "sync_frac": 1.0},
    "early stop": {"target_kl": 1e-5, "n_epochs": 5},
    "imitation": {"imitation": TEACHING},
    "imitation, then ppo near it": {
        "imitation": TEACHING | {"frames": 60, "anchor_coef": 0.5, "anchor_frames": 500}
    },
    "normalised returns": {"normalize_returns": True},
    "replayed rollouts": {"replay_epochs": 1, "replay_steps": 20},
}


@pytest.mark.parametrize("case", CASES)
def test_processes_learn_what_one_with_all_of_their_agents_does(together, case):
    settings = {"frames": 4 * 48, "everyone": 6, **CASES[case]}
    size = settings.pop("size", 2)
    crew = together(learning_ranks.learn, size=size, **settings)
    alone = learning_ranks.learn(Ranks(), **settings)
    answers = crew.answers()
    for answer in answers:
        close(answer["first"], alone["first"])
        close(answer["last"], alone["last"], atol=1e-4)
        assert answer["frames"] == alone["frames"] == 4 * 48
        assert answer["episodes"] == alone["episodes"] and len(answer["episodes"]) > 10
        agree(answer["numbers"], alone["numbers"], rel=1e-3, abs=1e-4)
    # The policies of the ranks are not only close.
    for name, value in answers[0]["last"].items():
        assert all(torch.equal(value, other["last"][name]) for other in answers[1:])
    if case == "early stop":
        assert alone["numbers"][0]["train/n_updates"] < settings["n_epochs"]


def test_running_statistics_of_layers_that_train_are_the_mean_over_ranks(together):
    answers = together(learning_ranks.learn, frames=48, everyone=6, policy=learning_ranks.Agent).answers()
    one, two = (answer["statistics"] for answer in answers)
    assert torch.equal(one["norm.running_mean"], two["norm.running_mean"])
    assert torch.equal(one["norm.running_var"], two["norm.running_var"])
    assert one["norm.running_mean"] != 0


def test_going_on_is_exact_with_as_many_processes_and_refused_with_others(together, tmp_path):
    settings = {"everyone": 6, "imitation": TEACHING | {"frames": 48}}
    crews = [together(learning_ranks.learn, frames=frames, **settings) for frames in (96, 192)]
    half, whole = crews[0].answers()[0], crews[1].answers()[0]
    state = tmp_path / "state.safetensors"
    write_checkpoint(state, half["state"])
    others = together(learning_ranks.refuse, size=3, state=state, **settings)
    for answer in together(learning_ranks.go_on, state=state, frames=96, **settings).answers():
        assert answer["frames"] == 192
        assert all(torch.equal(value, whole["last"][name]) for name, value in answer["last"].items())
    assert "the agents of 2 processes, and these are 3; go on with 2 (torchrun" in others.answers()[0]
    with pytest.raises(ValueError, match="the agents of 2 processes, and these are 1"):
        learning_ranks.make(Ranks(), **settings).load_training_state(half["state"])


# Stragglers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waits", "length"), [(5, 5), (1, 2)], ids=["after five of eight", "a quarter at least"]
)
def test_a_rank_that_others_wait_for_learns_from_what_it_has_and_counts_for_as_much(together, waits, length):
    fast, slow = together(learning_ranks.fall_behind, waits=waits).answers()
    assert [len(rank["rollout"]["actions"]) for rank in (fast, slow)] == [8, length]
    assert fast["frames"] == slow["frames"] == 2 * (8 + length)

    # The same update written out, over all steps of both as they are.
    policy = learning_ranks.make(Ranks()).policy
    policy.load_state_dict(fast["before"], strict=False)
    assert isinstance(policy, RecurrentPolicy)
    steps = []
    for rank in (fast, slow):
        lived = rank["rollout"]
        offset, memory, starts = rank["following"]
        seen = {"offset": lived["obs/offset"], "image": lived["obs/image"]}
        # Its image says how many steps the world has made.
        image = torch.full((2, 4, 4, 3), len(lived["actions"]), dtype=torch.uint8)
        last = {"offset": offset, "image": image}
        with torch.no_grad():
            future = policy.act(last, memory, starts, True)[1]
        advantages = generalized_advantages(
            lived["rewards"], lived["values"], lived["episode_starts"], future, starts, 0.99, 0.95
        )
        torch.testing.assert_close(rank["advantages"], advantages, atol=1e-5, rtol=0)
        values, log_probs, entropy, _ = policy.evaluate_sequences(
            seen, lived["actions"], rank["memory"], lived["episode_starts"]
        )
        ratio = (log_probs - lived["log_probs"]).exp()
        steps.append([each.flatten() for each in (advantages, ratio, values, rank["returns"], entropy)])
    advantages, ratio, values, returns, entropy = (torch.cat(column) for column in zip(*steps, strict=True))
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    gain = torch.min(advantages * ratio, advantages * ratio.clamp(0.8, 1.2))
    loss = -gain.mean() - 0.01 * entropy.mean() + 0.5 * functional.mse_loss(values, returns)
    optimizer = policy.optimizer
    optimizer.param_groups[0]["lr"] = 3e-4
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.grad is not None], 0.5)
    optimizer.step()
    expected = dict(policy.named_parameters())
    moved = max((fast["after"][name] - value).abs().max() for name, value in fast["before"].items())
    assert moved > 1e-4
    for rank in (fast, slow):
        close(rank["after"], {name: value.detach() for name, value in expected.items()}, atol=1e-6)
        assert rank["numbers"][0]["train/loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_nobody_is_stopped_where_all_ranks_are_needed():
    ranks = Ranks()
    for size, fraction, needed in ((2, 0.6, 2), (5, 0.6, 3), (8, 0.6, 5), (4, 1.0, 4), (2, 0.5, 1)):
        ranks.size = size
        assert Stragglers(ranks, fraction, 8).needed == needed
    ranks.size = 2
    watch = Stragglers(ranks, 0.6, 8)
    watch.begin()
    watch.done()
    assert not any(watch.must_stop(step) for step in range(8))
    with pytest.raises(ValueError, match=r"sync_frac 1.5 must be greater than 0 and at most 1"):
        Stragglers(ranks, 1.5, 8)


# What goes wrong ----------------------------------------------------------------------------------------


def test_ranks_skip_the_same_minibatches_and_stop_at_the_same_one(together):
    skipping = together(learning_ranks.blow, mode="skip")
    stopping = together(learning_ranks.blow, mode="stop")
    one, two = skipping.answers()
    assert one["skipped"] == two["skipped"] == 2
    assert all(torch.equal(value, two["last"][name]) for name, value in one["last"].items())
    assert stopping.statuses() == [1, 1]
    tracebacks = [rank for rank in (0, 1) if "FloatingPointError" in stopping.said(rank)]
    assert len(tracebacks) == 1, "what all find at once is said once"


def test_observations_that_one_rank_replaced_are_counted_for_all(together):
    answers = together(learning_ranks.look_through_holes).answers()
    assert [answer["own"] for answer in answers] == [0, 2]
    assert [answer["logged"] for answer in answers] == [2, 2]


def test_all_go_on_where_the_disk_is_full_for_a_while_and_end_where_it_stays_full(together, tmp_path):
    for name in ("while", "good"):
        (tmp_path / name).mkdir()
    saving = together(learning_ranks.save_on_a_full_disk, folder=tmp_path / "while", refusals=3, minutes=60)
    ending = together(learning_ranks.save_on_a_full_disk, folder=tmp_path / "good", refusals=9, minutes=0)
    assert saving.answers() == [{"frames": 320, "saved": 320}] * 2
    assert Run(tmp_path / "while" / "run").load_checkpoint("latest")["frames"] == 320
    assert ending.statuses() == [1, 1]
    for rank in (0, 1):
        assert "the checkpoint of 64 frames cannot be written: No space left" in ending.said(rank)
    assert Run(tmp_path / "good" / "run").load_checkpoint("latest")["frames"] == 0


def test_a_crash_ends_all_with_the_traceback_and_the_episode_of_the_one_that_crashed(together):
    crew = together(learning_ranks.come_to_grief, how="raise")
    assert crew.statuses() == [1, 1]
    guilty, other = crew.said(1), crew.said(0)
    assert "in happen" in guilty and "IndexError: the roof came down" in guilty
    assert "rank 1 of 2 broke off after 80 frames, with its agents in" in guilty
    assert "agent 1: line3.glb episode 3" in guilty
    assert "navagent: rank 0 of 2 ends: rank 1 failed: IndexError: the roof came down" in other
    assert "Traceback" not in other


@pytest.mark.parametrize("told", [[0, 1], [1]], ids=["both", "one"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_a_long_update_saves_what_it_began_with_and_ends_all(together, tmp_path, told, number):
    crew = together(learning_ranks.train_slowly, folder=tmp_path)
    # Into the second update, before which nothing but the very first state was saved.
    while not (tmp_path / "run" / "metrics.jsonl").exists() and crew.processes[0].is_alive():
        time.sleep(0.02)
    time.sleep(0.5)
    for rank in told:
        os.kill(crew.processes[rank].pid, number)
    status = 143 if number == signal.SIGTERM else REQUEUE_STATUS
    assert crew.statuses() == [status, status], crew.said(0) + crew.said(1)
    state = Run(tmp_path / "run").load_checkpoint("latest")
    assert state["frames"] == 64 and len(state["ranks"]) == 2


@pytest.mark.parametrize(
    ("told", "number"), [([0, 1], signal.SIGTERM), ([1], signal.SIGTERM), ([0], signal.SIGUSR1)]
)
def test_a_signal_in_an_evaluation_ends_that_of_all(together, tmp_path, told, number):
    crew = together(learning_ranks.examine, folder=tmp_path)
    begun = [tmp_path / "run" / f"evaluating{rank}" for rank in (0, 1)]
    while not all(file.exists() for file in begun) and crew.processes[0].is_alive():
        time.sleep(0.02)
    for rank in told:
        os.kill(crew.processes[rank].pid, number)
    status = 143 if number == signal.SIGTERM else REQUEUE_STATUS
    assert crew.statuses() == [status, status], crew.said(0) + crew.said(1)
    # By themselves, and not because their time was over.
    assert not any("ended in the middle" in crew.said(rank) for rank in (0, 1))
    assert Run(tmp_path / "run").load_checkpoint("latest")["frames"] == 64


def test_a_killed_rank_ends_all_and_its_neighbour_says_where_it_was(together):
    crew = together(learning_ranks.come_to_grief, how="kill")
    assert crew.statuses() == [1, -signal.SIGKILL]
    said = crew.said(0)
    assert (
        f"rank 1 (process {crew.processes[1].pid}) is gone without a word: killed, or out of memory" in said
    )
    assert "its last rollout began after 64 frames, with its agents in" in said
    assert "agent 0: line2.glb episode 2" in said
    assert "Traceback" not in said


def test_a_rank_that_hears_nothing_is_ended_too(together):
    crew = together(learning_ranks.be_stuck)
    assert crew.statuses() == [1, -signal.SIGKILL]


@pytest.mark.parametrize("watched", [True, False])
def test_a_rank_that_is_killed_while_they_meet_is_not_waited_for(processes, tmp_path, watched):
    crew = Crew(processes, tmp_path, 2, learning_ranks.die_while_meeting, watched)
    # What is not noticed is waited for an hour.
    assert crew.statuses() == [1, -signal.SIGKILL]
    assert "is gone without a word: killed" in crew.said(0)


def test_an_error_that_all_make_is_said_once(together):
    crew = together(learning_ranks.fail_alike, size=3)
    assert crew.statuses() == [1, 1, 1]
    assert (
        sum(
            "there is no such thing" in crew.said(rank) and "Traceback" in crew.said(rank)
            for rank in range(3)
        )
        == 1
    )


# Settings -----------------------------------------------------------------------------------------------


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert set_threads(0) == max(1, cores // 2)
    # As torchrun sets it.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert set_threads(0) == 1
    torch.set_num_threads(threads)


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    assert own_part(4096) == 4096
    told = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert own_part(4096) == 2048
    assert own_part(None) is None


@pytest.fixture
def split(tmp_path):
    """Five scenes of a megabyte, with three episodes each."""
    scenes = {f"scene{n}": tmp_path / f"scene{n}.glb" for n in range(5)}
    for path in scenes.values():
        path.write_bytes(bytes(1 << 20))
    episodes = tuple(
        Episode(str(n), f"scene{n % 5}", (0.0, 0.0, 0.0), 0.0, (0.0, 0.0, -1.0), 0.2, 1.0) for n in range(15)
    )
    return Split("train", episodes, scenes)


def test_each_process_plays_in_scenes_of_its_own_where_all_are_too_many(split, monkeypatch):
    config, parts = TrainConfig(), []
    for rank in range(2):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, 2
        assert share_of_scenes(config, split, ranks) is split
        with monkeypatch.context() as patch:
            patch.setattr("navagent.build.SHARED_SCENES_BYTES", 4 << 20)
            part = share_of_scenes(config, split, ranks)
        config.distributed.scenes = "sharded"
        assert share_of_scenes(config, split, ranks) == part
        config.distributed.scenes = "auto"
        assert {episode.scene_id for episode in part.episodes} == set(part.scenes)
        parts.append(part)
    assert not set(parts[0].scenes) & set(parts[1].scenes)
    assert parts[0].scenes | parts[1].scenes == split.scenes
    assert sorted(parts[0].episodes + parts[1].episodes, key=lambda e: int(e.episode_id)) == list(
        split.episodes
    )
    ranks.size = 6
    config.distributed.scenes = "sharded"
    with pytest.raises(ConfigError, match="5 scenes for 6 processes"):
        share_of_scenes(config, split, ranks)


# The command --------------------------------------------------------------------------------------------


def test_a_training_that_breaks_off_shows_where_its_agents_were(tmp_path, monkeypatch):
    room = write_one_room(tmp_path / "room", num_train=60, num_val=8)
    step = PointNavVectorEnv.step

    def falling(env, actions):
        if env.steps_made == 10:
            raise ValueError("the roof came down")
        env.steps_made += 1
        return step(env, actions)

    monkeypatch.setattr(PointNavVectorEnv, "steps_made", 0, raising=False)
    monkeypatch.setattr(PointNavVectorEnv, "step", falling)
    with pytest.raises(ValueError, match="the roof came down") as caught:
        main(["train", *words(room, tmp_path / "run", "algorithm.num_envs=2")])
    (note,) = caught.value.__notes__
    assert "the training broke off after 20 frames, with its agents in" in note
    assert "agent 1: scenes/room/room.glb episode" in note


def words(room, path, *overrides):
    return [
        f"scenes.dataset={room}",
        f"run_dir={path}",
        *TINY,
        "env.max_steps=12",
        "algorithm.total_frames=320",
        "algorithm.num_steps=8",
        "algorithm.num_minibatches=2",
        "imitation.frames=64",
        "algorithm.anchor_coef=0.1",
        "algorithm.anchor_frames=1000",
        "algorithm.curriculum=linear",
        "algorithm.curriculum_end=4",
        "algorithm.curriculum_start=1.5",
        "evaluation.every_frames=160",
        "evaluation.num_episodes=5",
        "evaluation.num_envs=2",
        "evaluation.final_episodes=0",
        *overrides,
    ]


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*command, *arguments],
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def processes_of(token):
    """Processes whose command names a run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if token in command:
            found.append(int(folder.name))
    return found


def numbers(run):
    return [
        {key: value for key, value in record.items() if not key.startswith(("time/", "rollout/cut_short"))}
        for record in run.read_metrics()
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_torchrun_trains_as_one_process_stops_on_a_signal_and_goes_on(tmp_path):
    room = write_one_room(tmp_path / "room", num_train=60, num_val=8)
    folder = tmp_path / "two"
    process = torchrun("-m", "navagent", "train", *words(room, folder, "algorithm.num_envs=2"))
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    # What they do not have can't stay when they have ended.
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in processes_of(str(folder))]
    assert len(maps) >= 2 and not any("/dev/shm" in text for text in maps)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert "saving and stopping" in output and f"navagent train resume={folder}" in output, output
    run = Run(folder)
    stopped = run.load_checkpoint("latest")["frames"]
    assert 32 <= stopped < 320
    assert processes_of(str(folder)) == []

    with pytest.raises(CheckpointError, match="the agents of 2 processes, and these are 1; go on with 2"):
        train(load_config([f"resume={folder}"]), Console(file=io.StringIO()))

    final = ["evaluation.final_episodes=5", "evaluation.baselines=random", "evaluation.videos=0"]
    process = torchrun("-m", "navagent", "train", f"resume={folder}", *final)
    # Meanwhile, one process with the agents of both.
    whole = train(
        load_config(words(room, tmp_path / "one", "algorithm.num_envs=4", *final)),
        Console(file=io.StringIO()),
    )
    output, _ = process.communicate()
    assert process.returncode == 0, output
    # One of them speaks and writes.
    assert output.count("going on after") == 1 and output.count("report  ") == 1
    assert len(numbers(run)) == 12
    agree(numbers(run), numbers(whole), rel=1e-4, abs=1e-5)
    mine, other = (each.load_checkpoint(320)["policy"] for each in (run, whole))
    close(mine, other, atol=1e-5)
    tables = [read_results(each.path / "evaluation" / "val" / "episodes.jsonl") for each in (run, whole)]
    assert len(tables[0]) == 2 * 5
    for result, expected in zip(*tables, strict=True):
        assert (result.agent, result.episode_id) == (expected.agent, expected.episode_id)
        assert (result.spl, result.steps) == (pytest.approx(expected.spl, abs=1e-4), expected.steps)
    assert processes_of(str(folder)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_crash_under_torchrun_is_told_and_leaves_nothing(tmp_path):
    process = torchrun(learning_ranks.__file__, "come to grief", str(tmp_path))
    output, _ = process.communicate()
    assert process.returncode == 1
    assert "IndexError: the roof came down" in output and "in happen" in output, output
    assert "rank 1 of 2 broke off after 80 frames, with its agents in" in output
    assert "agent 1: line3.glb episode 3" in output
    assert "navagent: rank 0 of 2 ends: rank 1 failed: IndexError: the roof came down" in output
    assert processes_of(str(tmp_path)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_when_torchrun_is_killed_its_processes_save_and_end(tmp_path):
    process = torchrun(learning_ranks.__file__, "train slowly", str(tmp_path))
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    assert len(processes_of(str(tmp_path))) == 3
    process.kill()
    killed = time.monotonic()
    while (left := processes_of(str(tmp_path))) and time.monotonic() - killed < 20:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate()
    assert not left, output
    assert "saving and stopping" in output
    assert Run(tmp_path / "run").load_checkpoint("latest")["frames"] >= 64
