"""``simulator=habitat`` up to habitat-sim itself, in whose place the built-in simulator runs in workers."""

import io
import json
import os
import signal
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from killed_training import numbers
from one_room import SHORT, write_one_room
from rich.console import Console

from envs.simulators.workers.pool import Body, WorkerDiedWarning
from envs.simulators.workers.simulator import WorkerSimulator
from navagent.build import max_resident_scenes, simulator_gpus
from navagent.cli import main
from navagent.config import ConfigError, gpu_numbers, load_config, read_config
from navagent.demonstrations.minari_exchange import export_minari
from navagent.demonstrations.open import start_replay
from navagent.demonstrations.recorded import read_demonstrations
from navagent.learning.rollout import TorchVectorEnv
from navagent.train import train

BODIES = Path(__file__).parents[1] / "envs" / "simulators" / "worker_bodies.py"


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return write_one_room(tmp_path_factory.mktemp("room"), num_train=20, num_val=4)


def put_in_place(monkeypatch, name):
    """Puts a body of the tests into habitat-sim's place in the workers."""

    def body(sensors, agent, num_workers, *_):
        settings = {"sensors": [asdict(sensor) for sensor in sensors], "agent": asdict(agent)}
        return Body("stand-in", BODIES, name, [settings] * num_workers)

    monkeypatch.setattr("envs.simulators.habitat.simulator.habitat_body", body)


@pytest.fixture
def stand_in(monkeypatch):
    """The built-in simulator in workers."""
    put_in_place(monkeypatch, "RaycastBody")


@pytest.fixture
def quick(monkeypatch):
    """Empty rooms in workers that start in no time."""
    put_in_place(monkeypatch, "EmptyBody")


def settings(room, path, *overrides):
    return load_config(
        [
            f"scenes.dataset={room}",
            f"run_dir={path}",
            "sensors=blind",
            "sensors.depth=true",
            *SHORT,
            "evaluation.final_episodes=0",
            *overrides,
        ]
    )


@pytest.fixture(scope="module")
def trained(room, tmp_path_factory):
    """A run in the built-in simulator."""
    return train(settings(room, tmp_path_factory.mktemp("runs") / "run"), Console(file=io.StringIO()))


@pytest.fixture
def killing(monkeypatch):
    """Kills workers before certain steps, counted from when it is called; answers all processes since."""
    steps, kills, processes = [], set(), set()
    original = WorkerSimulator.step

    def step(self, actions):
        steps.append(self)
        processes.update(self.process_ids)
        if len(steps) in kills:
            os.kill(self.process_ids[0], signal.SIGKILL)
        original(self, actions)
        processes.update(self.process_ids)

    def at(*numbers):
        kills.update(len(steps) + number for number in numbers)
        return processes

    monkeypatch.setattr(WorkerSimulator, "step", step)
    return at


def test_training_in_workers_learns_the_same_and_goes_on_when_resumed(
    room, tmp_path, stand_in, killing, trained
):
    processes = killing()
    asked = ("simulator=habitat", "simulator.workers=1", "algorithm.max_minutes=1e-6")
    output = Console(file=io.StringIO(), width=200)
    run = train(settings(room, tmp_path / "run", *asked), output)
    assert "habitat-sim in 1 worker processes, drawing in software" in output.file.getvalue()
    assert read_config(run.config_path).simulator.name == "habitat"
    assert int(run.checkpoint("latest").stem) == 24
    last = run.read_metrics()[-1]
    assert last["time/simulator_restarts"] == last["time/episodes_begun_again"] == 0
    resumed = train(
        load_config([f"resume={run.path}", "algorithm.max_minutes=0"]), Console(file=io.StringIO())
    )
    assert numbers(resumed) == numbers(trained)
    assert len(processes) == 2 and not any(Path(f"/proc/{each}").exists() for each in processes)


def test_training_goes_on_when_workers_are_killed_and_counts_what_begins_again(
    room, tmp_path, monkeypatch, quick, killing
):
    """Three agents in one worker, which dies while the expert teaches and later: episodes begin again."""
    deaths = (1, 5, 12)
    processes = killing(*deaths)
    results = []
    original = TorchVectorEnv.step

    def step(self, actions):
        results.append(original(self, actions))
        return results[-1]

    monkeypatch.setattr(TorchVectorEnv, "step", step)
    asked = ("simulator=habitat", "simulator.workers=1", "imitation.frames=24")
    with pytest.warns(WorkerDiedWarning, match=r"stand-in worker 0 .* was killed by SIGKILL"):
        run = train(settings(room, tmp_path / "run", *asked), Console(file=io.StringIO()))
    assert int(run.checkpoint("latest").stem) == 48 and len(results) == 16
    begun_again = 0
    for result in (results[number - 1] for number in deaths):
        # Cut short for the learner, with a last observation; finished for nobody.
        assert result.dones.all()
        cut = int(result.truncated.sum())
        assert cut == 3 - len(result.episodes) == len(result.final_observations["depth"])
        begun_again += cut
    for number, result in enumerate(results, 1):
        since = max((death for death in deaths if death < number), default=0)
        assert all(episode["l"] <= number - since for episode in result.episodes)
    last = run.read_metrics()[-1]
    assert last["time/simulator_restarts"] == 3 and last["time/episodes_begun_again"] == begun_again > 4
    assert len(processes) == 4 and not any(Path(f"/proc/{each}").exists() for each in processes)


def test_a_python_without_habitat_sim_is_refused_with_advice_before_homes_are_made(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path / "cache"))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho ModuleNotFoundError: No module named \\'habitat_sim\\' >&2\nexit 1\n")
    python.chmod(0o755)
    asked = ["train", "simulator=habitat", f"simulator.python={python}", f"run_dir={tmp_path / 'run'}"]
    assert main(asked) == 2
    told = capsys.readouterr().err
    assert "simulator=habitat: habitat-sim worker 0" in told and "No module named 'habitat_sim'" in told
    assert "docs/habitat.md" in told and "navagent doctor" in told and "Traceback" not in told
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("auto", None), ("0", [0]), ("[0,1]", [0, 1]), ("0, 1,3", [0, 1, 3]), ("-1", [-1])],
)
def test_gpus_are_named_by_their_numbers(text, numbers):
    assert gpu_numbers(text) == numbers


@pytest.mark.parametrize("text", ["-2", "0,,1", "gpu0", "[]", "0;1"])
def test_what_names_no_gpus_is_refused(text):
    with pytest.raises(ConfigError, match="expected numbers like 0,1"):
        load_config(["simulator=habitat", f"simulator.gpu_ids={text}"])


def test_workers_of_several_processes_are_spread_over_the_gpus(monkeypatch):
    config = load_config(["simulator=habitat", "simulator.gpu_ids=[4,5,6]", "device=cpu"])
    assert simulator_gpus(config, 2) == [4, 5, 6]
    for name, value in (("RANK", 1), ("LOCAL_RANK", 1), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert simulator_gpus(config, 2) == [6, 4, 5]
    assert simulator_gpus(load_config(["simulator=habitat", "device=cpu"]), 2) == [-1]


def test_only_so_many_scenes_are_resident_that_workers_can_hold_them(tmp_path):
    files = []
    for index in range(8):
        files.append(tmp_path / f"{index}.glb")
        with files[-1].open("wb") as file:
            file.truncate(64 << 20)
    assert max_resident_scenes(load_config([]), files) is None
    asked = load_config(["simulator=habitat"])
    assert max_resident_scenes(asked, files[:4]) is None
    assert max_resident_scenes(asked, files) == 4
    assert max_resident_scenes(load_config(["simulator=habitat", "simulator.resident_scenes=3"]), files) == 3


def test_settings_of_habitat_sim_mean_nothing_to_the_built_in_simulator():
    with pytest.raises(ConfigError, match=r"simulator\.workers=4 means nothing with simulator=raycast"):
        load_config(["simulator.workers=4"])
    with pytest.raises(ConfigError, match="resident_scenes=1 is too few"):
        load_config(["simulator=habitat", "simulator.resident_scenes=1"])
    with pytest.raises(ConfigError, match=r"simulator\.python=/no/python is not a file"):
        load_config(["simulator=habitat", "simulator.python=/no/python"])


def test_evaluation_takes_another_simulator_than_the_run_was_trained_in(trained, stand_in, capsys):
    quiet = ["--agents", "run", "--maps", "0", "--videos", "0"]
    assert main(["evaluate", str(trained.path), *quiet]) == 0
    assert main(["evaluate", str(trained.path), "--simulator", "habitat", *quiet]) == 0
    assert "val-habitat" in capsys.readouterr().out
    names = ("val", "val-habitat")
    here, there = (trained.path / "evaluation" / name / "episodes.jsonl" for name in names)
    assert here.read_text() == there.read_text()  # the stand-in is the built-in simulator
    evaluate = ["evaluate", str(trained.path), "--simulator", "habitat"]
    assert main([*evaluate, "simulator.workers=1", "--out", str(trained.path / "one"), *quiet]) == 0
    assert (trained.path / "one" / "episodes.jsonl").read_text() == here.read_text()
    assert "--simulator habitat" in (summary := (trained.path / "one" / "summary.json").read_text())
    assert "simulator.workers=1" in json.loads(summary)["command"]
    capsys.readouterr()
    for asked, told in (
        ([*evaluate, "env.max_steps=4"], "env.max_steps: only settings of habitat-sim can be given here"),
        ([*evaluate, "simulator.name=raycast"], "--simulator chooses the simulator"),
        ([*evaluate, "simulator.worker=1"], "simulator.workers"),
        ([*evaluate[:2], "simulator.workers=1"], "means nothing with simulator=raycast"),
    ):
        assert main(asked) == 2
        assert told in capsys.readouterr().err
    assert main(["evaluate", str(trained.path), "--simulator", "unity"]) == 2
    assert "--simulator unity is not one of raycast, habitat" in capsys.readouterr().err


def test_an_evaluation_whose_workers_are_killed_comes_to_the_same(trained, tmp_path, quick, killing, capsys):
    asked = ["evaluate", str(trained.path), "--agents", "run,random", "--maps", "0", "--videos", "0"]
    asked += ["--simulator", "habitat", "simulator.workers=1", "--out"]
    assert main([*asked, str(tmp_path / "calm")]) == 0
    assert "deaths" not in capsys.readouterr().out
    killing(2, 6, 22)
    assert main([*asked, str(tmp_path / "killed")]) == 0
    output = capsys.readouterr()
    assert output.err.count("its agents' episodes begin again") == 3
    calm, killed = (tmp_path / name / "episodes.jsonl" for name in ("calm", "killed"))
    assert len(calm.read_text().splitlines()) == 8
    assert killed.read_text() == calm.read_text()
    calm, killed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("calm", "killed"))
    assert calm["agents"] == killed["agents"] and calm["departures"] == killed["departures"]
    assert calm["simulator_restarts"] == calm["episodes_begun_again"] == 0
    assert killed["simulator_restarts"] == 3
    told = f"workers, all started again; episodes that began again: {killed['episodes_begun_again']}"
    assert killed["episodes_begun_again"] > 4 and f"3 of the simulator's {told}" in output.out


def test_demonstrations_are_whole_whoever_is_killed(room, tmp_path, monkeypatch, quick, killing, capsys):
    """Recorded, replayed and exported with deaths: the same as without, and nothing of what was in vain."""
    import minari

    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    workers = ["simulator=habitat", "simulator.workers=1", "num_threads=1"]
    config = load_config([f"scenes.dataset={room}", *workers, "sensors=depth", "sensors.height=8"])
    files = [tmp_path / f"{name}.demos" for name in ("calm", "killed")]
    for file in files:
        kills = (4, 11) if file == files[1] else ()
        count = ["--number", "6", "--num-envs", "3"]
        killing(*kills)
        assert main(["demos", "record", str(file), *count, f"scenes.dataset={room}", *workers]) == 0
        assert capsys.readouterr().err.count("episodes begin again") == len(kills)
        killing(*kills)
        replay = start_replay(config, read_demonstrations(file), 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WorkerDiedWarning)
            export_minari(replay, f"navagent/{file.stem}-v0")
        assert replay.env.interruptions >= 2 * len(kills)
        replay.close()
    assert files[0].read_bytes() == files[1].read_bytes()
    calm, killed = (episodes_of(minari.load_dataset(f"navagent/{file.stem}-v0")) for file in files)
    assert len(calm) == 6 and calm.keys() == killed.keys()
    for name, episode in calm.items():
        theirs = killed[name]
        for part in ("actions", "rewards", "terminations", "truncations"):
            assert np.array_equal(getattr(episode, part), getattr(theirs, part))
        for sensor, values in episode.observations.items():
            assert np.array_equal(values, theirs.observations[sensor])


def episodes_of(dataset):
    """The episodes of a Minari data set by their ids."""
    about = dataset.storage.get_episode_metadata(range(dataset.total_episodes))
    return {each["episode_id"]: episode for each, episode in zip(about, dataset, strict=True)}
