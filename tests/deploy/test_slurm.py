"""The SLURM script, with stand-ins for SLURM's commands that do to processes what SLURM 22.05 did.

The signal before the time limit goes to the tasks and not to the script, srun's status is the highest of
theirs, and a cluster with ``KillOnBadExit`` ends tasks that are still saving when the first one is done.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "train.sbatch"

# Starts a process for each task, and exits with their highest status. Unless its options say otherwise, as if
# the cluster had KillOnBadExit, and as if the job had been sent with --export=NONE.
SRUN = """
import itertools, os, pathlib, subprocess, sys, time
options = list(itertools.takewhile(lambda word: word.startswith("--"), sys.argv[1:]))
command = sys.argv[1 + len(options) :]
pathlib.Path(os.environ["SRUN_LOG"]).write_text(" ".join(options))
kept = os.environ if "--export=ALL" in options else {k: v for k, v in os.environ.items() if "SLURM" in k}
tasks = [
    subprocess.Popen(command, env={**kept, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n % 2)})
    for n in range(int(os.environ["SLURM_NTASKS"]))
]
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks) and "--kill-on-bad-exit=0" not in options:
        for task in tasks:
            task.kill()
    time.sleep(0.02)
statuses = [task.returncode for task in tasks]
sys.exit(max(128 - status if status < 0 else status for status in statuses))
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("node1", "node2", sep="\\n")
else:
    open(os.environ["SCONTROL_LOG"], "a").write(" ".join(sys.argv[1:]) + "\\n")
"""
# In place of the interpreter: says what it was asked for, and does as a training does.
PYTHON = """
import os, pathlib, signal, sys, time
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS".split()
rank = int(os.environ["RANK"])

def save(number, frame):
    # The first one writes what all have, and the others are gone before.
    time.sleep(1.0 if rank == 0 else 0.0)
    sys.exit(75 if number == signal.SIGUSR1 else 143)

signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, save)
text = " ".join([str(os.getpid()), *(os.environ[name] for name in names), "|", *sys.argv[1:]])
file = pathlib.Path(os.environ["TASKS"], str(rank))
file.with_suffix(".part").write_text(text)
file.with_suffix(".part").rename(file)
ends = os.environ["ENDS"].split(",")
if ends[0] != "signal":
    sys.exit(int(ends[min(rank, len(ends) - 1)]))
while True:
    signal.pause()
"""


@pytest.fixture
def job(tmp_path):
    """Runs the script as a job.

    ``ends`` has the statuses of its processes, of which the last is that of all others; or they wait for a
    ``signal``, which they get.
    """
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "fake-python": PYTHON}.items():
        # -S: none of them needs more than the standard library.
        (commands / name).write_text(f"#!{sys.executable} -S\n{text}")
        (commands / name).chmod(0o755)
    folder = tmp_path / "tasks"
    folder.mkdir()

    def run(*words, ends="0", number=None):
        for file in folder.iterdir():
            file.unlink()
        environment = os.environ | {
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": "fake-python",
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS": "4",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_CPUS_PER_TASK": "8",
            "SRUN_LOG": str(tmp_path / "srun.log"),
            "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
            "TASKS": str(folder),
            "ENDS": "signal" if number else ends,
        }
        process = subprocess.Popen(["bash", str(SCRIPT), *words], env=environment, start_new_session=True)
        if number:
            deadline = time.monotonic() + 60
            while len(list(folder.glob("[0-3]"))) < 4:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
            for file in folder.glob("[0-3]"):
                os.kill(int(file.read_text().split()[0]), number)
        process.wait(timeout=60)
        tasks = {file.name: file.read_text().partition(" ")[2] for file in folder.glob("[0-3]")}
        log = tmp_path / "scontrol.log"
        return process.returncode, tasks, log.read_text() if log.exists() else ""

    return run


def test_every_task_learns_its_place_and_the_settings_and_has_the_jobs_cores(job, tmp_path):
    folder = tmp_path / "my runs" / "one"
    status, tasks, requeued = job(str(folder), "experiment=quick", "env.name=a b")
    assert (status, requeued) == (0, "")
    for rank in range(4):
        place, _, command = tasks[str(rank)].partition(" | ")
        assert place == f"{rank} {rank % 2} 4 2 node1 23456 8"
        assert command == f"-m navagent train run_dir={folder} experiment=quick env.name=a b"
    # Since SLURM 22.05 a step does not take it from its job.
    assert "--cpus-per-task=8" in (tmp_path / "srun.log").read_text().split()


def test_after_the_signal_the_job_is_queued_again_when_all_have_saved_and_then_the_run_goes_on(job, tmp_path):
    folder = tmp_path / "run"
    status, _, requeued = job(str(folder), "experiment=quick", number=signal.SIGUSR1)
    assert (status, requeued) == (75, "requeue 123456\n")
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    _, tasks, _ = job(str(folder), "experiment=quick")
    assert shlex.split(tasks["3"].partition(" | ")[2]) == ["-m", "navagent", "train", f"resume={folder}"]


def test_a_job_that_was_cancelled_is_not_queued_again(job, tmp_path):
    assert job(str(tmp_path / "run"), number=signal.SIGTERM)[::2] == (143, "")


@pytest.mark.parametrize(("ends", "status"), [("1", 1), ("2", 2), ("1,137", 137), ("75,137", 137)])
def test_a_job_that_failed_is_not_queued_again(job, tmp_path, ends, status):
    assert job(str(tmp_path / "run"), ends=ends)[::2] == (status, "")


def test_without_a_folder_it_says_how_it_is_called(job):
    assert job("experiment=quick")[0] == 2
