"""A training whose disk fills up, for a process of its own: the disk and its limits are the process's."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import subprocess
from pathlib import Path

from killed_training import UPDATE, numbers, toy_trainer
from rich.console import Console

from navagent import train
from navagent.runs import Run, RunError

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
CHECKPOINT = 1 << 20
"""A toy checkpoint is larger than this [bytes]."""
NO_TINY_DISK = 99
"""Exit status where the system does not let a process mount a file system for itself."""


class TinyDisk:
    """A file system in memory that only this process sees, with room for a few checkpoints."""

    reason = os.strerror(errno.ENOSPC)

    def __init__(self, folder):
        libc = ctypes.CDLL(None, use_errno=True)
        flags = CLONE_NEWNS if os.getuid() == 0 else CLONE_NEWNS | CLONE_NEWUSER
        user = os.getuid()
        if libc.unshare(flags):
            raise SystemExit(NO_TINY_DISK)
        if user:
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={12 * CHECKPOINT}", "tmpfs", str(folder)]
        if subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode:
            raise SystemExit(NO_TINY_DISK)
        if subprocess.run(mount, capture_output=True).returncode:
            raise SystemExit(NO_TINY_DISK)
        self.ballast = folder / "ballast"

    def fill(self):
        with self.ballast.open("ab", buffering=0) as file:
            for piece in (1 << 16, 1 << 8, 1):
                try:
                    while True:
                        file.write(b"0" * piece)
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    def free(self):
        self.ballast.unlink()


class LimitedFiles:
    """Files may be large enough for the metrics, but not for a checkpoint."""

    reason = os.strerror(errno.EFBIG)

    def __init__(self, folder):
        folder.mkdir()
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (CHECKPOINT // 2, self.before[1]))

    def free(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def fill_and_free(disk_class, folder):
    """The disk is full for a while: training goes on, and in the end nothing is missing."""
    disk = disk_class(folder)
    trainer = toy_trainer(folder / "run")
    trainer.console = Console(file=open(folder.with_suffix(".txt"), "w"), width=400)  # noqa: SIM115
    run, updates = trainer.run, []
    original = trainer.on_update_end

    def on_update_end():
        updates.append(trainer.model.num_timesteps)
        if len(updates) == 3:
            disk.fill()
        if len(updates) == 8:
            # What was saved before is whole, and its metrics are too.
            assert run.load_checkpoint("latest")["frames"] == 2 * UPDATE
            assert [record["frames"] for record in run.read_metrics()][:2] == updates[:2]
            disk.free()
        return original()

    trainer.on_update_end = on_update_end
    trainer.stop_after = 10 * UPDATE
    trainer.train()
    trainer.console.file.flush()
    told = " ".join(folder.with_suffix(".txt").read_text().split())
    assert f"the checkpoint of 96 frames cannot be written: {disk.reason} (the newest one is of 64" in told
    assert "Training goes on; the next try is in" in told
    whole = toy_trainer(folder.with_suffix(".whole"))
    whole.stop_after = 10 * UPDATE
    whole.train()
    assert numbers(run) == numbers(whole.run)
    assert [int(file.stem) for file in run.checkpoints()] == [9 * UPDATE, 10 * UPDATE]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.tensorboard_dir), {"scalars": 0}).Reload()
    assert sorted({event.step for event in board.Scalars("train/loss")}) == updates


def fill_for_good(disk_class, folder):
    """The disk stays full: after a while training ends, and the last good checkpoint can be resumed."""
    disk = disk_class(folder)
    train.UNSAVED_MINUTES = 0.0
    trainer = toy_trainer(folder / "run")
    original = trainer.on_update_end

    def on_update_end():
        if trainer.model.num_timesteps == 3 * UPDATE:
            disk.fill()
        return original()

    trainer.on_update_end = on_update_end
    try:
        trainer.train()
    except RunError as error:
        message = str(error)
    assert f"cannot be written: {disk.reason}" in message
    assert message.endswith(f"Make room, then go on with `navagent train resume={folder / 'run'}`")
    disk.free()
    run = Run(folder / "run")
    assert run.load_checkpoint("latest")["frames"] == 2 * UPDATE
    assert len(list(run.checkpoint_dir.iterdir())) == len(run.checkpoints())
    resumed = toy_trainer(folder / "run")
    resumed.load(run.load_checkpoint())
    resumed.stop_after = 5 * UPDATE
    resumed.train()
    assert run.load_checkpoint("latest")["frames"] == 5 * UPDATE
