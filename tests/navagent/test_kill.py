import random
import time

import pytest
from killed_training import EVALUATE_EVERY, UPDATE, live, numbers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from navagent.runs import Run

KILLS = 50


def half_written(run):
    return [file for file in run.path.rglob("*") if file.name.startswith((".partial", ".tmp"))]


def test_a_run_killed_fifty_times_goes_on_each_time_and_learns_what_it_would_have(tmp_path, processes):
    rng = random.Random(0)
    # The first life of a run takes longer, and is no measure of the rest.
    pace = min(processes.finish(live, tmp_path / "pace", count * UPDATE) for count in (1, 3))
    run, caught_writing, begun = None, 0, -1
    for _ in range(KILLS):
        process = processes.start(live, tmp_path / "killed")
        time.sleep(rng.uniform(0.0, 2 * pace))
        process.kill()
        process.join()
        assert process.exitcode == -9
        if run is None and not (tmp_path / "killed" / "config.yaml").exists():
            continue
        run = Run(tmp_path / "killed")
        caught_writing += bool(half_written(run))
        if begun < 0 and not run.checkpoints():
            assert not run.read_metrics()
            continue
        frames = run.load_checkpoint("latest")["frames"]
        assert frames == int(run.checkpoint("latest").stem) >= begun
        begun = frames
        # At most the update under way is lost, and whatever is marked as the best is whole.
        assert max([record["frames"] for record in run.read_metrics()], default=0) - frames in (0, UPDATE)
        assert run.load_checkpoint("best")["frames"] <= frames
    assert begun >= 2 * EVALUATE_EVERY
    assert caught_writing >= 1

    # One more life clears away what the last one left, and learns a little more.
    end = begun + 3 * UPDATE
    for folder in ("killed", "whole"):
        processes.finish(live, tmp_path / folder, end)
    whole = Run(tmp_path / "whole")
    assert not half_written(run)
    assert numbers(run) == numbers(whole)
    states = [each.load_checkpoint("latest") for each in (run, whole)]
    for name, value in states[0]["policy"].items():
        assert value.equal(states[1]["policy"][name]), name
    assert run.load_checkpoint("best")["frames"] == whole.load_checkpoint("best")["frames"]
    assert shown(run, "train/loss") == logged(run, "train/loss")
    assert shown(run, "eval/spl") == logged(run, "eval/spl")


def shown(run, tag):
    """A curve as TensorBoard shows it, pieced together from all lives."""
    board = EventAccumulator(str(run.tensorboard_dir), {"scalars": 0}).Reload()
    return [(event.step, pytest.approx(event.value)) for event in board.Scalars(tag)]


def logged(run, tag):
    return [(record["frames"], record[tag]) for record in run.read_metrics() if tag in record]
