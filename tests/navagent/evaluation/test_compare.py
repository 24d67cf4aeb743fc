"""``navagent compare``, as it is typed, on runs whose numbers are known."""

import json

import cv2
import numpy as np
import pytest

from navagent.cli import main
from navagent.config import load_config, to_yaml
from navagent.evaluation.compare import CompareOptions, compare_runs
from navagent.evaluation.curves import Curve, draw_comparison, evaluations
from navagent.evaluation.metrics import summarise, to_json
from navagent.evaluation.results import write_results
from navagent.runs import Origin, Run, RunError, write_checkpoint

EPISODES = 24


@pytest.fixture
def make_run(tmp_path, make_result):
    """A finished run: SPL of the evaluations while training, and of all episodes of the last one."""

    def make(
        name,
        curve,
        final,
        origin=None,
        overrides=(),
        episodes=EPISODES,
        agent="run",
        sampled=True,
        turn_back=0.0,
    ):
        run = Run.create(tmp_path / name, to_yaml(load_config(list(overrides))), origin)
        for frames, spl in curve.items():
            values = {"eval/spl": spl, "eval/spl_low": spl - 0.1, "eval/spl_high": spl + 0.1}
            run.append_metrics({"frames": frames, **values, "eval/success": spl})
        results = [
            make_result(n, agent, success=n % 4 != 0, spl=final + n % 2 / 10, scene=f"homes/home_{n % 6}.glb")
            for n in range(episodes)
        ]
        out = run.path / "evaluation" / "val"
        out.mkdir(parents=True)
        write_results(results, out / "episodes.jsonl")
        summary = {
            "split": "val",
            "deterministic": not sampled,
            "turn_back": turn_back,
            "checkpoints": {"run": "best.safetensors"},
            "agents": {agent: to_json(summarise(results))},
        }
        (out / "summary.json").write_text(json.dumps(summary))
        return run

    return make


@pytest.fixture
def runs(make_run):
    """Imitation alone, reward alone, and reward after imitation at the same budget."""
    imitated = make_run("imitated", {400: 0.5, 1000: 0.6, 2000: 0.6}, 0.6)
    origin = Origin(str(imitated.path), "best.safetensors", 1000)
    both = make_run("both", {0: 0.6, 500: 0.55, 1000: 0.8}, 0.8, origin, ["start_from=" + str(imitated.path)])
    return both, imitated, make_run("reward", {1000: 0.1, 2000: 0.4}, 0.3)


def test_what_a_user_types_leaves_table_plot_and_numbers(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    both, imitated, reward = (str(run.path) for run in runs)
    assert main(["compare", both, imitated, f"ppo={reward}", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in told
    assert str(tmp_path / "out") in told
    assert "the same 24 episodes in 6 homes, actions drawn from the policy" in table
    assert "| both | 2,000 (1,000 of them before) | 0.750 (0.551 to 0.880) |" in table
    assert "| ppo | 2,000 | 0.750" in table
    # Paired, the difference of each episode is the same: there is nothing to be unsure of.
    assert "| imitated | +0.000 (+0.000 to +0.000) |" in table
    assert "| +0.200 (+0.200 to +0.200) | +0.200 to +0.200 |" in table
    assert "| +0.500 (+0.500 to +0.500) |" in table
    assert "both began with an SPL of 0.600; its lowest since is 0.550, after 1,500 frames" in table
    assert "are of 64 episodes" in table
    assert "budgets differ" not in table
    assert cv2.imread(str(tmp_path / "out" / "plot.png")).std() > 5
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["runs"]) == ["both", "imitated", "ppo"]
    assert found["runs"]["both"]["frames_before"] == 1000
    assert found["runs"]["both"]["while_training"]["frames"] == [1000, 1500, 2000]
    assert found["runs"]["both"]["measures"]["spl"]["mean"] == pytest.approx(0.85)
    assert found["difference"]["ppo"]["spl"]["mean"] == pytest.approx(0.5)


def test_a_run_goes_on_where_the_one_that_it_began_as_was(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "navagent.evaluation.compare.draw_comparison", lambda curves, path: drawn.extend(curves)
    )
    compare_runs(CompareOptions(tuple(str(run.path) for run in runs), str(tmp_path / "out")))
    both, imitated, _ = drawn
    assert (both.before, both.frames, imitated.before, imitated.frames) == (1000, 2000, 0, 2000)
    # Of the run that it began as, what had been trained by then.
    (earlier,) = both.beginning
    assert [record["frames"] for record in earlier.records] == [400, 1000]
    assert imitated.beginning == ()


def test_frames_are_counted_through_all_runs_even_where_they_are_gone(make_run, tmp_path):
    first = make_run("first", {100: 0.1}, 0.1)
    second = make_run("second", {200: 0.2}, 0.2, Origin(str(first.path), "best.safetensors", 100))
    third = make_run("third", {400: 0.4}, 0.4, Origin(str(second.path), "best.safetensors", 300))
    gone = make_run("gone", {400: 0.4}, 0.4, Origin("/no/longer/there", "best.safetensors", 5000))
    out = compare_runs(CompareOptions((str(third.path), str(gone.path)), str(tmp_path / "out")))
    found = json.loads((out / "results.json").read_text())["runs"]
    assert (found["third"]["frames"], found["gone"]["frames"]) == (700, 5400)
    assert "The budgets differ: 700 to 5,400 frames" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": 23}, "on 24 and 23, of which 23 are the same. Evaluate both on as many"),
        ({"overrides": ["scenes.num=150"]}, "scenes.num=150, not 40"),
        ({"overrides": ["env.turn_angle_deg=30"]}, "env.turn_angle_deg=30.0, not 10.0"),
        ({"agent": "expert"}, "an evaluation of expert, not of the run's own agent"),
        ({"sampled": False}, "by its most probable actions"),
        ({"turn_back": 0.6}, "/one --turn-back 0.6"),
        ({"overrides": ["scenes.val_split=test"]}, "no evaluation of 'test' (there are val)"),
    ],
)
def test_runs_that_were_evaluated_otherwise_are_refused(
    make_run, tmp_path, capsys, monkeypatch, changes, message
):
    monkeypatch.setenv("NAVAGENT_DEBUG", "0")
    one = make_run("one", {100: 0.5}, 0.5)
    other = make_run("other", {100: 0.5}, 0.5, **changes)
    assert main(["compare", str(one.path), str(other.path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_agent_that_was_evaluated_may_be_an_earlier_one(runs, tmp_path, capsys):
    both, imitated, _ = runs
    assert main(["compare", str(both.path), str(imitated.path), "--out", str(tmp_path / "unknown")]) == 0
    assert "was evaluated, the best by then" not in capsys.readouterr().out
    for run, frames in ((both, 500), (imitated, 2000)):
        write_checkpoint(run.checkpoint_dir / "best.safetensors", {"frames": frames})
    assert main(["compare", str(both.path), str(imitated.path), "--out", str(tmp_path / "known")]) == 0
    said = capsys.readouterr().out
    assert "Of both the agent after 1,500 frames was evaluated" in said
    assert "Of imitated" not in said
    found = json.loads((tmp_path / "known" / "results.json").read_text())["runs"]
    assert {name: one["checkpoint_frames"] for name, one in found.items()} == {"both": 1500, "imitated": 2000}
    drawn = [cv2.imread(str(tmp_path / name / "plot.png")) for name in ("unknown", "known")]
    assert not np.array_equal(*drawn)


def test_what_agents_learned_from_and_how_long_may_differ(make_run, tmp_path):
    one = make_run("one", {}, 0.5)
    other = make_run(
        "other", {100: 0.5}, 0.5, overrides=["env.success_reward=10", "evaluation.num_episodes=9"]
    )
    out = compare_runs(CompareOptions((str(one.path), str(other.path)), str(tmp_path / "out")))
    assert "different numbers of episodes: one 64, other 9" in (out / "table.md").read_text()


def test_wrong_arguments_are_one_message_and_status_2(make_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NAVAGENT_DEBUG", "0")
    one = str(make_run("one", {100: 0.5}, 0.5).path)
    for arguments, message in (
        ([], "required: RUN"),
        ([one], "expected two or more"),
        ([one, one], "'one' is there twice; give one another name"),
        ([one, "no-such-run"], "no-such-run: not the folder of a run"),
        ([one, f"x={one}", "--split", "gibson-v1-val"], "no evaluation of 'gibson-v1-val'"),
        ([one, f"x={one}", "--outt", "y"], "did you mean --out?"),
    ):
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_beginning_of_which_nothing_is_known_is_told(make_run, tmp_path):
    one = make_run("one", {100: 0.5}, 0.5)
    other = make_run("other", {100: 0.5}, 0.5, overrides=[f"start_from={one.path}"])
    with pytest.raises(ValueError, match="has not noted after how many frames N; write"):
        compare_runs(CompareOptions((str(one.path), str(other.path)), str(tmp_path / "out")))


def test_evaluations_are_read_from_the_metrics(run):
    assert evaluations(run.read_metrics(), "success").tolist() == [
        [5000, 0.4, 0.3, 0.5],
        [10000, 0.4, 0.3, 0.5],
    ]
    # One whose interval is not known.
    assert np.isnan(evaluations(run.read_metrics(), "spl")[:, 2:]).all()
    assert evaluations([], "spl").shape == (0, 4)


def test_every_curve_adds_to_the_plot(run, make_result, tmp_path):
    final = summarise([make_result(n) for n in range(9)])
    curves = [Curve(f"run {n}", run.read_metrics(), 2000 * n, final) for n in range(3)]
    inked = []
    for count in (1, 2, 3):
        draw_comparison(curves[:count], tmp_path / "plot.png")
        inked.append(int((cv2.imread(str(tmp_path / "plot.png")).min(axis=2) < 200).sum()))
    assert inked[0] < inked[1] < inked[2]


@pytest.mark.parametrize("text", ["", "[]", '{"run": "x"}', '{"run": "x", "checkpoint": "y", "frames": "9"}'])
def test_a_broken_note_of_the_beginning_is_named(make_run, tmp_path, text):
    one, other = make_run("one", {}, 0.5), make_run("other", {}, 0.5)
    (other.path / "origin.json").write_text(text)
    with pytest.raises(RunError, match=r"origin\.json: does not say what the run began as"):
        compare_runs(CompareOptions((str(one.path), str(other.path)), str(tmp_path / "out")))
