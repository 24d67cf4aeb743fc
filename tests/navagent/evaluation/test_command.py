import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console

from navagent.build import load_split, make_vector_env, policy_settings
from navagent.config import ConfigError, load_config, to_yaml
from navagent.evaluation.command import (
    EvaluateOptions,
    as_command,
    evaluate_run,
    parse_agents,
    split_name,
)
from navagent.evaluation.results import read_results
from navagent.runs import CheckpointError, Run, RunError
from navagent.scenes import generate
from policies.actor_critic import NavigationPolicy


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Two small generated homes."""
    return generate(
        tmp_path_factory.mktemp("homes") / "two", 2, 0, train_episodes=4, val_episodes=4, num_workers=1
    )


def untrained_run(folder, homes, *overrides):
    """A run whose only checkpoint is its policy before the first update."""
    overrides = [
        "scenes=dataset",
        f"scenes.dataset={homes}",
        "env.max_steps=30",
        "memory.hidden_size=16",
        "encoder.weights=random",
        "num_threads=1",
        "evaluation.num_envs=4",
        *overrides,
    ]
    config = load_config(overrides)
    run = Run.create(folder, to_yaml(config))
    split = load_split(config, "val")
    env = make_vector_env(config, split.episodes, split.scenes, 2)
    torch.manual_seed(0)
    policy = NavigationPolicy(
        env.single_observation_space, env.single_action_space, lambda _: 0.0, **policy_settings(config)
    )
    env.close()
    run.save_checkpoint(0, {"policy": policy.state_dict(), "frames": 0})
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, homes):
    folder = tmp_path_factory.mktemp("runs")
    return untrained_run(folder / "seeing", homes), untrained_run(folder / "blind", homes, "sensors=blind")


def test_an_evaluation_leaves_table_lines_maps_videos_and_report(runs, homes):
    """The whole of ``navagent evaluate`` over generated homes, with two policies of different senses."""
    seeing, blind = runs
    console = Console(record=True, width=160)
    options = EvaluateOptions(
        run=str(seeing.path), agents=f"run,expert,random,blind={blind.path}", maps=2, videos=1, device="cpu"
    )
    out = evaluate_run(options, console)
    assert out == seeing.path / "evaluation" / "val"
    lines = read_results(out / "episodes.jsonl")
    assert [line.agent for line in lines] == ["run"] * 4 + ["expert"] * 4 + ["random"] * 4 + ["blind"] * 4
    assert all(line.steps <= 30 for line in lines)

    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["agents"]) == ["run", "expert", "random", "blind"]
    assert summary["agents"]["run"]["steps"]["mean"] == pytest.approx(
        np.mean([line.steps for line in lines[:4]])
    )
    assert sum("map" in picture for picture in summary["pictures"]) == 2
    maps = [cv2.imread(str(file)) for file in sorted((out / "maps").glob("*.png"))]
    assert all(image is not None and image.std() > 5 for image in maps)
    # Every step of the expert's is its own; another's is one of both.
    assert summary["agents"]["expert"]["departed"]["mean"] == 0
    left = summary["departures"]
    assert np.sum(left["counts"]) == sum(line.steps for line in lines[:4])
    assert sum(line.departures for line in lines[:4]) == np.sum(left["counts"]) - np.trace(left["counts"])
    for home in left["homes"]:
        assert cv2.imread(str(out / home["map"])).std() > 5
    assert left["homes"]
    (video,) = (out / "videos").iterdir()
    assert cv2.VideoCapture(str(video)).read()[0]

    table = console.export_text()
    for name in summary["agents"]:
        assert re.search(rf"\b{name}\b", table)
    report = (seeing.path / "report.html").read_text()
    assert report.count("data:video/mp4;base64,") == 1
    assert "Where it leaves the expert" in report
    assert "http" not in report


def test_the_same_seed_gives_the_same_episodes(runs):
    options = EvaluateOptions(run=str(runs[1].path), agents="run", episodes=3, maps=0, videos=0, device="cpu")
    first = (evaluate_run(options) / "episodes.jsonl").read_text()
    assert (evaluate_run(options) / "episodes.jsonl").read_text() == first
    assert first.count("\n") == 3


def test_agents_turn_back_as_the_run_says_unless_asked_otherwise(homes, tmp_path):
    """Two agents of the same weights, whose runs differ in that: all are evaluated as the first run says."""
    settings = ("sensors=blind", "env.stop=automatic")
    careful = untrained_run(tmp_path / "careful", homes, *settings, "evaluation.turn_back=0.9")
    free = untrained_run(tmp_path / "free", homes, *settings)

    def evaluated(run, asked=None):
        options = EvaluateOptions(
            run=str(run.path),
            agents=f"careful={careful.path},free={free.path}",
            turn_back=asked,
            maps=0,
            videos=0,
            device="cpu",
        )
        out = evaluate_run(options)
        lines = [(line.path_length, line.reward) for line in read_results(out / "episodes.jsonl")]
        assert len(lines) == 8
        assert lines[:4] == lines[4:]
        summary = json.loads((out / "summary.json").read_text())
        return summary["turn_back"], lines, (run.path / "report.html").read_text()

    words = "turning back at once only from a probability of 0.9 on"
    surely, as_careful, report = evaluated(careful)
    assert surely == 0.9 and words in report
    surely, as_free, report = evaluated(free)
    assert surely == 0.0 and words not in report
    assert as_careful != as_free
    assert evaluated(free, 0.9)[:2] == (0.9, as_careful)
    assert evaluated(careful, 0.0)[:2] == (0.0, as_free)


def test_episode_files_are_told_apart_by_their_folders():
    assert split_name(Path("/data/gibson/v1/val/val.json.gz")) == "gibson-v1-val"
    assert split_name(Path("/data/homes/episodes/val/val.json.gz")) == "homes-episodes-val"
    assert split_name(Path("/data/val.json")) == split_name(Path("/val.json.gz")) == "val"


def test_an_episode_file_from_elsewhere_gets_a_folder_of_its_own(runs, homes, tmp_path):
    options = EvaluateOptions(
        run=str(runs[1].path),
        dataset=str(homes / "episodes" / "train" / "train.json.gz"),
        scenes=str(homes),
        agents="expert",
        maps=0,
        videos=0,
        device="cpu",
    )
    out = evaluate_run(options)
    assert out == runs[1].path / "evaluation" / "two-episodes-train"
    assert len(read_results(out / "episodes.jsonl")) == 4


def test_a_checkpoint_of_other_settings_is_refused_by_its_file(runs, homes, tmp_path):
    run = untrained_run(tmp_path / "run", homes)
    (tmp_path / "run" / "config.yaml").write_text(
        run.config_path.read_text().replace("hidden_size: 16", "hidden_size: 24")
    )
    with pytest.raises(CheckpointError, match=r"000000000000\.safetensors: does not fit the settings"):
        evaluate_run(EvaluateOptions(run=str(run.path), agents="run", device="cpu"))


def test_a_missing_checkpoint_is_found_before_anything_runs(runs, tmp_path):
    run = Run.create(tmp_path / "run", runs[0].config_path.read_text())
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        evaluate_run(EvaluateOptions(run=str(run.path), agents="random,run"))
    with pytest.raises(RunError, match="no-run"):
        evaluate_run(EvaluateOptions(run=str(tmp_path / "no-run")))


@pytest.mark.parametrize(
    ("agents", "message"),
    [
        ("run,exprt", "'exprt' is no agent; did you mean 'expert'"),
        ("run,run", "'run' is there twice"),
        ("a=/no/such/run", "/no/such/run"),
        (" , ", "names no agent"),
    ],
)
def test_agents_that_do_not_exist_are_refused(runs, agents, message):
    with pytest.raises(ValueError, match=message):
        parse_agents(agents, runs[0])


def test_agents_are_named_as_asked(runs):
    seeing, blind = runs
    contenders = parse_agents(f"run, expert,{blind.path},other={blind.path}", seeing)
    assert [contender.name for contender in contenders] == ["run", "expert", "blind", "other"]
    assert contenders[1].run is None
    assert contenders[3].run.path == blind.path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": 0}, "--episodes 0 must be at least 1"),
        ({"maps": -1}, "--maps -1"),
        ({"split": "val", "dataset": "x"}, "not both"),
        ({"scenes": "x"}, "--scenes goes with --dataset"),
        ({"dataset": "/no/such.json.gz"}, "is not a file"),
        ({"turn_back": 60.0}, r"--turn-back 60.0 must lie between 0 and 1"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateOptions(run="x", **changes)


def test_the_command_names_what_differs_from_the_defaults():
    options = EvaluateOptions(run="a b", deterministic=True, turn_back=0.6, episodes=7)
    assert as_command(options) == "navagent evaluate 'a b' --episodes 7 --deterministic --turn-back 0.6"
