"""``navagent imitate ladder``: the same demonstrations for all, exact resuming, honest numbers."""

import json
import shlex
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
from one_room import TINY, write_one_room
from test_train import interrupt_after

from navagent.cli import main
from navagent.config import load_config, read_config
from navagent.demonstrations.recorded import read_demonstrations
from navagent.learning import imitation_ladder
from navagent.learning.imitation_ladder import Job, LadderConfig, Rung, demonstrations_file
from navagent.learning.imitation_ladder_report import cells
from navagent.runs import Run

SETTINGS = (
    *TINY,
    "env.max_steps=60",
    "algorithm.total_frames=64",
    "algorithm.num_envs=4",
    "algorithm.num_steps=8",
    "evaluation.num_episodes=4",
    "evaluation.num_envs=2",
)
WHOLE = ("--sizes", "4", "--demonstrations", "12", "--methods", "blind", "--dagger", "features")


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return write_one_room(tmp_path_factory.mktemp("room"), num_train=24, num_val=4)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch, tmp_path_factory):
    cheap(monkeypatch, tmp_path_factory)


def cheap(monkeypatch, tmp_path_factory):
    """Draws no curves, keeps what is cached apart, and hides where an error came from."""
    draw = "navagent.evaluation.report.draw_curves"
    monkeypatch.setattr(draw, lambda records, path, *_: path.write_bytes(b"a picture"))
    monkeypatch.setenv("NAVAGENT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("NAVAGENT_DEBUG", "0")


def typed(room, out, *more):
    """What a user types for a ladder of seconds."""
    return ["imitate", "ladder", str(out), *WHOLE, *more, f"scenes.dataset={room}", *SETTINGS]


def rungs(out):
    """What came of every training, but for how long it took."""
    lines = (out / "runs.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.endswith("}")]
    assert len({(one["method"], one["demonstrations"], one["seed"]) for one in found}) == len(found)
    return {
        (one["method"], one["demonstrations"], one["seed"]): {
            name: value for name, value in one.items() if name != "seconds"
        }
        for one in found
    }


def without_times(table):
    """A table's text, but for the columns and the line that tell how long it took."""
    rows = [line.rpartition(" | ")[0] if line.startswith("| ") else line for line in table.splitlines()]
    return [row for row in rows if not row.startswith("Took ")]


@pytest.fixture(scope="module")
def whole(room, tmp_path_factory):
    """A ladder that nothing interrupted, climbed by one process."""
    out = tmp_path_factory.mktemp("ladder") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        cheap(patch, tmp_path_factory)
        assert main(typed(room, out, "--seeds", "2", "--workers", "1")) == 0
    return out


def test_a_ladder_leaves_table_plot_numbers_and_agents(whole):
    found = rungs(whole)
    rows = [("blind", 4), ("features", None)]
    assert set(found) == {(*row, seed) for row in rows for seed in range(2)}
    assert all(one["frames"] == 64 and one["episodes"] == 4 for one in found.values())
    assert found["features", None, 0]["trainable"] > found["blind", 4, 0]["trainable"]
    table = (whole / "table.md").read_text()
    for text in ("## success", "## SPL", "## DAgger", "4 demonstrations", "| features |", "| blind |", "±"):
        assert text in table
    picture = cv2.imread(str(whole / "plot.png"))
    assert picture.shape[1] > 800 and picture.std() > 10
    results = json.loads((whole / "results.json").read_text())
    assert len(results["cells"]) == 2 and results["settings"]["demonstrations"] == 12
    for cell in results["cells"]:
        own = [found[cell["method"], cell["demonstrations"], seed] for seed in range(2)]
        assert cell["spl"]["mean"] == pytest.approx(sum(one["spl"] for one in own) / 2)
    run = Run(whole / "runs" / "blind-4-seed1")
    assert run.checkpoint("best").is_file()
    measured = [record["eval/spl"] for record in run.read_metrics() if "eval/spl" in record]
    assert measured == [found["blind", 4, 1]["spl"]]


def test_cloning_learns_from_a_seeds_own_order_of_the_same_demonstrations(whole):
    everything = read_demonstrations(whole / "demonstrations" / "expert.demos")
    orders = []
    for seed in range(2):
        file = demonstrations_file(whole, seed)
        ordered = read_demonstrations(file)
        orders.append([episode.episode_id for episode in ordered.episodes])
        assert sorted(orders[-1]) == sorted(episode.episode_id for episode in everything.episodes)
        place = orders[-1].index(everything.episodes[3].episode_id)
        assert np.array_equal(ordered.actions(place), everything.actions(3))
        config = read_config(whole / f"runs/blind-4-seed{seed}/config.yaml")
        assert (config.imitation.demos, config.imitation.num_demos) == (str(file), 4)
        assert config.imitation.name == "behaviour_cloning"
        assert read_config(whole / f"runs/features-dagger-seed{seed}/config.yaml").imitation.name == "dagger"
    assert orders[0] != orders[1]


def test_a_ladder_stopped_in_the_middle_is_finished_by_two_processes_with_the_same_table(
    whole, room, tmp_path, monkeypatch, capsys
):
    command = typed(room, tmp_path, "--seeds", "1", "--workers", "1")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        # Every training has two rollouts: in the first training.
        interrupt_after(patch, 1, signal.SIGTERM)
        main(command)
    assert stopped.value.code == 143
    told = capsys.readouterr().out
    assert "stopped after 0 of 2 trainings; go on with\n" in told
    assert f"navagent imitate ladder {tmp_path} --sizes 4" in told
    assert not (tmp_path / "runs.jsonl").exists()
    # A crash in the middle of a line costs that line, and no training.
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"method": "fea')
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, signal.SIGINT)
        assert main(command) == 130
    assert "stopped after 1 of 2 trainings" in capsys.readouterr().out
    # More seeds join what is there.
    assert main(typed(room, tmp_path, "--seeds", "2", "--workers", "2")) == 0
    assert rungs(tmp_path) == rungs(whole)
    tables = [without_times((out / "table.md").read_text()) for out in (tmp_path, whole)]
    assert tables[0] == tables[1]


def test_a_folder_with_another_ladder_is_left_alone(whole, room, capsys):
    before = (whole / "table.md").read_text()
    assert main([*typed(room, whole), "algorithm.weight_decay=0.5"]) == 2
    assert "a ladder with other settings (algorithm.weight_decay 0.0, not 0.5)" in capsys.readouterr().err
    assert (whole / "table.md").read_text() == before


def rung(method, count, seed, spl):
    return Rung(method, count, seed, success=spl, spl=spl, episodes=4, frames=32, trainable=7, seconds=1.0)


def test_differences_are_to_features_with_the_same_demonstrations_and_seed():
    found = cells(
        [rung("features", count, seed, 0.1 * seed + count / 100) for count in (4, 8) for seed in range(3)]
        + [rung("sidetune", count, seed, 0.1 * seed + 0.3) for count in (4, 8) for seed in range(3)]
        + [rung("sidetune", None, 0, 0.9)]
    )
    assert found["sidetune", 4].differences["spl"].value == pytest.approx(0.26)
    assert found["sidetune", 8].differences["spl"].value == pytest.approx(0.22)
    assert found["sidetune", 4].differences["spl"].half_width == pytest.approx(0.0, abs=1e-9)
    assert found["sidetune", 4].mean("success").half_width > 0.2
    assert found["features", 4].differences["spl"] is None
    assert found["sidetune", None].differences["spl"] is None


def test_settings_reach_the_trainings_they_mean_something_for(tmp_path):
    given = (
        "imitation.share=0.5",
        "imitation.store_features=true",
        "sensors=depth",
        "sensors.height=32",
        "algorithm.vf_coef=0.1",
    )
    config = LadderConfig(tmp_path, given)
    cloning, dagger = config.words(Job("lora", 49, 2)), config.words(Job("blind", None, 2))
    assert given[0] in dagger and given[0] not in cloning
    assert given[1] in cloning and given[1] not in dagger
    assert given[4] in dagger and given[4] not in cloning
    for words in (cloning, dagger):
        assert load_config(words, "imitate").run_dir == words[-1].removeprefix("run_dir=")
    assert {"adaptation=lora", "sensors=depth", "imitation.num_demos=49", "seed=2"} <= set(cloning)
    assert {"sensors=blind", "sensors.height=32", "imitation=dagger"} <= set(dagger)
    assert "sensors=depth" not in dagger
    assert "experiment=ladder" in cloning
    assert (
        "experiment=quick" not in LadderConfig(tmp_path, ("experiment=quick",)).words(Job("lora", 49, 2))[1:]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "49,many"], "'49,many' is not whole numbers or all"),
        (["--sizes", "49,49"], "expected each once"),
        (["--sizes", "20000"], "size 20000 is more than there are"),
        (["--methods", "sidetun"], "did you mean 'sidetune'?"),
        (["--methods", "ewc"], "no method 'ewc'"),
        (["--dagger", "blnd"], "did you mean 'blind'?"),
        (["--seeds", "0"], "seeds 0: expected at least 1"),
        (["--worker", "2"], "did you mean --workers?"),
        (["adaptation=lora"], "the ladder sets adaptation itself"),
        (["imitation.num_demos=7"], "the ladder sets imitation.num_demos itself"),
        (["algorithm.nmu_envs=7"], "did you mean 'algorithm.num_envs'?"),
        (["--sizes", "9"], "9 demonstrations are too few for algorithm.num_envs=32"),
        (["evaluation.every_frames=0"], "evaluation.every_frames=0 would leave"),
    ],
)
def test_wrong_arguments_are_one_message_and_status_2(arguments, message, capsys, tmp_path):
    assert main(["imitate", "ladder", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_guides_ladders_are_what_it_says(tmp_path, monkeypatch):
    guide = Path(__file__).resolve().parents[2] / "docs" / "imitation.md"
    asked = []
    monkeypatch.setattr(
        imitation_ladder, "climb", lambda config, *_: asked.append(config) or tmp_path / "table.md"
    )
    lines = [line for line in guide.read_text().splitlines() if line.startswith("navagent imitate ladder")]
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0
    whole, short, depth = asked
    assert (whole.counts, whole.seeds, whole.dagger) == ((49, 500, 5000, 10000), 3, ("sidetune",))
    assert (short.counts, short.experiment) == ((49, 500, 5000), "ladder_short")
    assert (depth.settings, depth.counts) == (("sensors=depth",), (49, 10000))
    frames = [
        load_config(config.words(Job("features", 49, 0)), "imitate").algorithm.total_frames
        for config in (whole, short)
    ]
    assert all(f"{number:,}" in guide.read_text() for number in frames)


def test_help_says_how_long_it_takes(capsys):
    with pytest.raises(SystemExit) as answer:
        main(["imitate", "ladder", "--help"])
    assert answer.value.code == 0
    told = capsys.readouterr().out
    assert "--short" in told and "hours" in told and "examples:" in told
