"""Whole trainings in several processes, in the real simulator, as ``navagent train`` does them."""

import json
import random
import signal
import time
from itertools import count
from pathlib import Path

import learning_ranks
import pytest
from killed_training import numbers
from learning_ranks import Crew
from one_room import TINY, write_one_room, write_rooms

from navagent.evaluation.results import read_results
from navagent.runs import Run

FRAMES = 256
KILLS = 4
SETTINGS = [
    *TINY,
    "env.max_steps=12",
    "algorithm.num_envs=2",
    f"algorithm.total_frames={FRAMES}",
    "algorithm.num_steps=8",
    "algorithm.num_minibatches=2",
    "algorithm.normalize_returns=true",
    "imitation.frames=64",
    "algorithm.anchor_coef=0.1",
    "algorithm.anchor_frames=1000",
    "algorithm.curriculum_start=1.5",
    "evaluation.every_frames=96",
    "evaluation.num_episodes=4",
    "evaluation.num_envs=2",
    "evaluation.baselines=random",
    "evaluation.videos=0",
    "evaluation.maps=0",
]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms")
    room = write_one_room(folder / "one", num_train=60, num_val=6)
    return write_rooms(room, folder / "three", ("attic", "hall", "kitchen"))


@pytest.fixture
def trained(processes, tmp_path):
    """Starts ``navagent train`` in two processes."""
    crews = []

    def start(*words):
        folder = tmp_path / f"crew{len(crews)}"
        folder.mkdir()
        crews.append(Crew(processes, folder, 2, learning_ranks.type_command, ["train", *words]))
        return crews[-1]

    yield start
    for crew in crews:
        crew.kill()


def memory(pid):
    """What a process has mapped; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def test_with_sharded_scenes_each_process_plays_in_its_own_and_all_is_counted(trained, rooms, tmp_path):
    folder, final = tmp_path / "run", ["distributed.scenes=sharded", "evaluation.final_episodes=6"]
    crew = trained(f"scenes.dataset={rooms}", f"run_dir={folder}", *SETTINGS, *final)
    assert crew.statuses() == [0, 0], crew.said(0) + crew.said(1)
    assert crew.said(0).count("report  ") == 1 and crew.said(1) == ""
    played = [
        [json.loads(line) for line in (crew.folder / f"{rank}.played").read_text().splitlines()]
        for rank in (0, 1)
    ]
    for steps, own in zip(played, ({"attic"}, {"hall", "kitchen"}), strict=True):
        assert {scene for scenes, _ in steps for scene in scenes} == {f"{name}.glb" for name in own}
        assert {Path(scene).stem for _, ended in steps for scene, _ in ended} == own
    run = Run(folder)
    updates = [record for record in run.read_metrics() if "rollout/episodes" in record]
    assert [record["frames"] for record in updates] == [32 * n for n in range(1, FRAMES // 32 + 1)]
    # Eight steps of both processes are a rollout.
    successes = []
    for number, record in enumerate(updates):
        ended = [
            success
            for steps in played
            for _, ended in steps[8 * number : 8 * number + 8]
            for _, success in ended
        ]
        assert record["rollout/episodes"] == len(ended)
        successes += ended
        if successes:
            newest = successes[-100:]
            assert record["rollout/success"] == pytest.approx(sum(newest) / len(newest))
    assert len(successes) > 20
    evaluation = folder / "evaluation" / "val"
    results = read_results(evaluation / "episodes.jsonl")
    summary = json.loads((evaluation / "summary.json").read_text())
    assert summary["episodes"] == 6 and summary["scenes"] == 3
    for agent in ("run", "random"):
        own = [result for result in results if result.agent == agent]
        assert len({(result.scene_id, result.episode_id) for result in own}) == 6
        spl = sum(result.spl for result in own) / 6
        assert summary["agents"][agent]["spl"]["mean"] == pytest.approx(spl)
    assert (folder / "report.html").is_file()


def test_processes_killed_at_random_moments_leave_a_run_that_goes_on_exactly(trained, rooms, tmp_path):
    settings = [f"scenes.dataset={rooms}", *SETTINGS, "evaluation.final_episodes=0"]
    begun = time.monotonic()
    whole = trained(f"run_dir={tmp_path / 'whole'}", *settings)
    assert whole.statuses() == [0, 0], whole.said(0) + whole.said(1)
    pace = time.monotonic() - begun

    rng = random.Random(0)
    run, kills = None, 0
    for _ in count():
        crew = trained(
            *([f"run_dir={tmp_path / 'run'}", *settings] if run is None else [f"resume={run.path}"]),
            # Checkpoints come seldom: what was done after one is done again.
            f"checkpoint.every_minutes={rng.choice((1e-9, 60))}",
        )
        if kills == KILLS:
            break
        # Before they have met, only who started them can know that one is gone.
        while not (tmp_path / "run" / "config.yaml").exists() or "memory" not in crew.said(0):
            assert None in crew.statuses(0.02), crew.said(0) + crew.said(1)
        # What they do not have can't stay when they are gone.
        assert not any("/dev/shm" in memory(process.pid) for process in crew.processes)
        time.sleep(rng.uniform(0.0, pace / 2))
        lost = rng.randrange(2)
        crew.processes[lost].kill()
        killed = time.monotonic()
        statuses = crew.statuses()
        run = Run(tmp_path / "run")
        if statuses[lost] == 0:
            # It was done before.
            break
        kills += 1
        assert time.monotonic() - killed < 20
        left = 1 - lost
        assert statuses[lost] == -signal.SIGKILL
        # One that had just ended by itself has nothing to say.
        assert statuses[left] == 1, crew.said(left)
        pid = crew.processes[lost].pid
        assert f"rank {lost} (process {pid}) is gone without a word: killed" in crew.said(left)
        assert "Traceback" not in crew.said(left)
        for checkpoint in run.checkpoints():
            assert len(run.load_checkpoint(int(checkpoint.stem))["ranks"]) == 2
    assert crew.statuses() == [0, 0], crew.said(0) + crew.said(1)
    assert kills >= 2
    assert numbers(run) == numbers(Run(tmp_path / "whole"))
    states = [each.load_checkpoint(FRAMES) for each in (run, Run(tmp_path / "whole"))]
    for name, value in states[0]["policy"].items():
        assert value.equal(states[1]["policy"][name]), name
