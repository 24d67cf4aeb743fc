"""Folders, disks, shared memory and processors, with real file systems that are too small or closed."""

import subprocess
from pathlib import Path

import pytest

from envs.cores import usable_cores
from navagent.doctor import machine
from navagent.doctor.machine import folder, judge_memory, judge_processors, shared_memory


@pytest.fixture
def mounted(tmp_path):
    """Mounts small file systems in memory, where this user may."""
    places = []

    def mount(options):
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"this user cannot mount file systems: {done.stderr.strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


def test_a_folder_that_is_still_to_be_made_is_judged_by_the_one_it_will_be_in(tmp_path):
    (finding,) = folder("runs", tmp_path / "a" / "b", "run_dir")
    assert finding.level in ("ok", "warning")
    assert "free" in finding.found
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_written_name_what_chooses_another(tmp_path, mounted):
    (tmp_path / "file").write_text("")
    closed = [Path("/proc/navagent"), tmp_path / "file" / "runs", mounted("size=1m,ro")]
    for path in closed:
        (finding,) = folder("cache", path, "NAVAGENT_CACHE")
        assert finding.level == "problem"
        assert f"{path} cannot be written" in finding.found
        assert "NAVAGENT_CACHE" in finding.mend


def test_disks_that_are_full_or_nearly_are_told_apart(mounted):
    (finding,) = folder("runs", mounted("size=1m"), "run_dir")
    assert (finding.level, finding.name) == ("problem", "runs")
    assert "1 MB free" in finding.found
    (finding,) = folder("runs", mounted("size=400m"), "run_dir")
    assert finding.level == "warning"


def test_a_containers_small_shared_memory_is_told_with_the_option_that_gives_more(mounted):
    (finding,) = shared_memory(mounted("size=64m"))
    assert finding.level == "warning"
    assert "64 MB of 64 MB free" in finding.found
    assert "--shm-size" in finding.mend
    (finding,) = shared_memory(mounted("size=512k"))
    assert finding.level == "problem"
    assert "No space left" in finding.found
    (finding,) = shared_memory(mounted("size=80m"))
    assert finding.level == "ok"


def test_no_shared_memory_at_all_is_a_problem(tmp_path):
    (finding,) = shared_memory(tmp_path / "shm")
    assert finding.level == "problem"


@pytest.mark.parametrize(
    ("cores", "quota", "threads", "level", "words"),
    [
        (2, None, "", "ok", "2 cores; 2 threads"),
        (8, None, "2", "ok", "8 cores; 2 threads (OMP_NUM_THREADS=2)"),
        (64, 4.0, "", "warning", "64 cores, limited to the time of 4; 64 threads"),
        (64, 4.0, "4", "ok", "limited to the time of 4; 4 threads"),
        (64, 0.5, "1", "ok", "limited to the time of 0.5; 1 thread"),
        (2, None, "16", "warning", "2 cores; 16 threads (OMP_NUM_THREADS=16)"),
    ],
)
def test_threads_that_have_no_cores_are_told(cores, quota, threads, level, words):
    finding = judge_processors(cores, quota, threads)
    assert finding.level == level
    assert words in finding.found
    assert (level == "warning") == ("num_threads=" in finding.mend)


def test_this_machine_is_looked_at(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (cores,) = machine.processors()
    assert f"{usable_cores()} core" in cores.found
    (free,) = machine.memory()
    assert free.name == "memory"


def test_too_little_memory_is_a_problem_and_little_a_warning():
    free = [judge_memory(size).level for size in (None, 500 << 20, 2 << 30, 16 << 30)]
    assert free == ["ok", "problem", "warning", "ok"]
