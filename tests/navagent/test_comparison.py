"""The comparison: fair choices, exact resuming, and numbers that are what the trainings gave."""

import dataclasses
import io
import json
import math
from functools import partial

import cv2
import pytest
import torch
from rich.console import Console
from transfer_world import tilted_walls

from navagent.learning.comparison import ComparisonConfig, Plan, compare
from navagent.learning.comparison_report import cells
from navagent.learning.crew import crew
from navagent.learning.frames import View
from navagent.learning.over_seeds import mean
from navagent.learning.trainings import Ledger
from navagent.learning.transfer import Base, Bench, Job, Outcome, Row, TransferConfig

QUIET = Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(tmp_path, **settings):
    defaults = {
        "dataset": tmp_path / "homes",
        "out": tmp_path / "out",
        "images": (6, 10),
        "seeds": 2,
        "methods": ("features", "finetune"),
        "bases": ("fcn5_small",),
        "steps": 2,
        "batch_size": 4,
        "test_frames": 4,
        "workers": 1,
    }
    return ComparisonConfig(**{**defaults, **settings})


def outcome(row="features", images=10, seed=0, rate=3e-4, error=0.1, phase="final"):
    return Outcome(phase, "fcn5_small", row, images, seed, rate, {"mean_error": error}, 7, 2.0)


def errors(out):
    found = json.loads((out / "results.json").read_text())["cells"]
    return {(cell["row"], cell["images"]): cell["errors"] for cell in found}


def test_the_learning_rate_with_the_least_held_out_error_is_taken(tmp_path):
    plan = Plan(config(tmp_path, methods=("features",)))
    plan.add("fcn5_small", Row("features", "features"))
    assert plan.total == 2 + 4
    choices = [plan.next(), plan.next()]
    assert [(job.phase, job.images, job.seed) for job in choices] == [("choose", 10, 0)] * 2
    assert plan.next() is None
    plan.take(outcome(rate=3e-4, error=0.3, phase="choose"))
    assert plan.next() is None
    plan.take(outcome(rate=3e-3, error=0.2, phase="choose"))
    jobs = [plan.next() for _ in range(4)]
    assert {job.learning_rate for job in jobs} == {3e-3}
    assert sorted((job.images, job.seed) for job in jobs) == [(6, 0), (6, 1), (10, 0), (10, 1)]
    assert plan.next() is None


def test_a_learning_rate_that_diverges_is_not_taken(tmp_path):
    plan = Plan(config(tmp_path))
    plan.add("fcn5_small", Row("features", "features"))
    plan.take(outcome(rate=3e-4, error=None, phase="choose"))
    plan.take(outcome(rate=3e-3, error=0.2, phase="choose"))
    assert {(job.phase, job.learning_rate) for job in iter(plan.next, None)} == {("final", 3e-3)}


def test_trainings_of_other_methods_and_seeds_are_passed_over(tmp_path):
    plan = Plan(config(tmp_path))
    plan.add("fcn5_small", Row("features", "features"))
    plan.take(outcome(row="lora"))
    plan.take(outcome(seed=5))
    plan.take(outcome(images=99))
    assert plan.done == 0


def test_a_comparison_leaves_table_plot_and_numbers(tmp_path):
    settings = config(tmp_path)
    table = compare(settings, tilted_walls, QUIET).read_text()
    for text in ("| features |", "| finetune |", "6 images", "10 images", "mean image", "±"):
        assert text in table
    assert cv2.imread(str(settings.out / "plot.png")).shape[1] > 500
    results = json.loads((settings.out / "results.json").read_text())
    assert len(results["cells"]) == 4
    assert set(results["baselines"]) == {"normals", "reshading"}
    finals = [run for run in Ledger(settings.out / "runs.jsonl", Outcome).read() if run.phase == "final"]
    for cell in results["cells"]:
        own = [r for r in finals if (r.row, r.images) == (cell["row"], cell["images"])]
        assert cell["error"]["mean"] == pytest.approx(sum(r.error("reshading") for r in own) / 2)
    assert not (settings.out / "frames").exists()


def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = config(tmp_path, out=tmp_path / "whole")
    compare(whole, tilted_walls, QUIET)
    settings = config(tmp_path)
    run, done = Bench.run, []

    def interrupted(self, job):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(job.key)
        return run(self, job)

    monkeypatch.setattr(Bench, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(settings, tilted_walls, QUIET)
    # A crash in the middle of a line costs that line.
    with (settings.out / "runs.jsonl").open("a") as file:
        file.write('{"phase": "fin')
    rest = []
    monkeypatch.setattr(Bench, "run", lambda self, job: rest.append(job.key) or run(self, job))
    compare(settings, tilted_walls, QUIET)
    assert len(done) == 5
    assert len(set(done + rest)) == len(done + rest) == 4 + 8
    assert errors(settings.out) == errors(whole.out)


def test_a_finished_comparison_is_not_trained_again_but_takes_more_seeds(tmp_path, monkeypatch):
    settings = config(tmp_path)
    compare(settings, tilted_walls, QUIET)
    run, jobs = Bench.run, []
    monkeypatch.setattr(Bench, "run", lambda self, job: jobs.append(job) or run(self, job))
    compare(settings, tilted_walls, QUIET)
    assert jobs == []
    compare(dataclasses.replace(settings, seeds=3), tilted_walls, QUIET)
    assert {job.seed for job in jobs} == {2}
    assert len(jobs) == 4


def test_processes_find_what_one_process_finds_and_say_what_went_wrong(tmp_path):
    bases = (Base.find("fcn5_small"),)
    shared = TransferConfig(View(tmp_path), "reshading", tmp_path / "frames", bases, (6,), 1, 2, 4, 4)
    shared.render(tilted_walls, lambda text: None)
    job = Job("fcn5_small", Row("features", "features"), 6, 0, 3e-4, "final")
    bench = partial(Bench, shared)
    with crew(bench, 1) as alone, crew(bench, 2) as crowd:
        alone.submit(job)
        crowd.submit(job)
        assert crowd.result().measures == alone.result().measures
        crowd.submit(dataclasses.replace(job, seed=7))
        with pytest.raises(RuntimeError, match=r"train-7.safetensors: no such weights file"):
            crowd.result()


def test_methods_that_do_not_take_the_base_are_named_in_the_table(tmp_path):
    settings = config(tmp_path, methods=("features", "spottune"), images=(6,), seeds=1)
    table = compare(settings, tilted_walls, QUIET).read_text()
    assert "spottune on fcn5_small: left out" in table
    assert "| spottune |" not in table


def test_a_folder_with_another_comparison_is_left_alone(tmp_path):
    settings = config(tmp_path, images=(6,), seeds=1, methods=("features",))
    compare(settings, tilted_walls, QUIET)
    with pytest.raises(ValueError, match=r"other settings \(steps 2, not 3\)"):
        compare(dataclasses.replace(settings, steps=3), tilted_walls, QUIET)


def test_the_interval_is_students():
    # The 97.5 % point of t with 2 degrees of freedom is 4.302653.
    three = mean([1.0, 2.0, 3.0])
    assert three.value == 2.0
    assert three.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert mean([1.0]).half_width is None
    assert not three.sure
    assert mean([-2.0, -2.1, -1.9]).sure


def test_differences_are_paired_by_seed():
    runs = [outcome("features", seed=s, error=0.1 * (s + 1)) for s in range(3)]
    runs += [outcome("lora", seed=s, error=0.1 * (s + 1) - 0.02) for s in range(3)]
    cell = cells("reshading", runs)["fcn5_small", "lora", 10]
    assert cell.error.half_width > 0.2
    assert cell.difference.value == pytest.approx(-0.02)
    assert cell.difference.half_width == pytest.approx(0.0, abs=1e-12)
    assert cells("reshading", runs)["fcn5_small", "features", 10].difference is None


def test_a_cell_that_diverged_is_called_so():
    cell = cells("reshading", [outcome(error=None), outcome(seed=1)])["fcn5_small", "features", 10]
    assert str(cell.error) == "diverged"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"task": "shading"}, "task 'shading'"),
        ({"images": ()}, "images"),
        ({"images": (1,)}, "images"),
        ({"methods": ("finetun",)}, "did you mean 'finetune'"),
        ({"steps": 0}, "steps 0"),
        ({"learning_rates": (0.0,)}, "learning_rates"),
        ({"workers": -1}, "workers -1"),
    ],
)
def test_wrong_settings_are_refused(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **wrong)
