"""Processors, memory, shared memory, disks, and the folders that are written to."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from envs.cores import usable_cores
from navagent.doctor.findings import Finding, Level
from navagent.limits import available_memory, cpu_quota, size

LITTLE_DISK = 200 << 20
"""Free space with which not even a few checkpoints fit [bytes]."""
SCARCE_DISK = 5 << 30
"""Free space with which a long training with videos may not end [bytes]."""
LITTLE_MEMORY = 1 << 30
"""Memory that PyTorch and a small simulator need [bytes]."""
SCARCE_MEMORY = 4 << 30
"""Memory below which the default training does not fit [bytes]."""
DOCKERS_SHARED = 64 << 20
"""Shared memory of a container that was not given more [bytes]."""


def processors() -> Iterable[Finding]:
    """Cores, threads, and what a container's limit makes of them."""
    yield judge_processors(usable_cores(), cpu_quota(), os.environ.get("OMP_NUM_THREADS", ""))


def judge_processors(cores: int, quota: float | None, omp_threads: str) -> Finding:
    """What to say of a number of cores, a quota of processor time in cores, and ``OMP_NUM_THREADS``."""
    name = "processors"
    threads = int(omp_threads) if omp_threads.isdigit() and int(omp_threads) else cores
    limit = "" if quota is None else f", limited to the time of {quota:g}"
    found = f"{cores} core{'s' * (cores != 1)}{limit}; {threads} thread{'s' * (threads != 1)}"
    if omp_threads:
        found += f" (OMP_NUM_THREADS={omp_threads})"
    allowed = cores if quota is None else max(1, min(cores, round(quota)))
    if threads > allowed:
        mend = f"more threads than cores are slower: num_threads={allowed}, or OMP_NUM_THREADS={allowed}"
        return Finding(name, "warning", found, mend)
    return Finding(name, "ok", found)


def memory() -> Iterable[Finding]:
    """The host's memory."""
    yield judge_memory(available_memory())


def judge_memory(free: int | None) -> Finding:
    """What to say of so much memory [bytes]; None is unknown."""
    if free is None:
        return Finding("memory", "ok", "the system does not tell how much is free")
    level: Level = "problem" if free < LITTLE_MEMORY else "warning" if free < SCARCE_MEMORY else "ok"
    mend = "" if level == "ok" else "give the container or job more, or train with smaller algorithm.num_envs"
    return Finding("memory", level, f"{size(free)} free for this process", mend)


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterable[Finding]:
    """Memory that processes share, through files in ``folder``."""
    name = "shared memory"
    more = "docker run --shm-size=1g, or in Kubernetes an emptyDir of medium Memory at /dev/shm"
    try:
        disk = shutil.disk_usage(folder)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="navagent-doctor-") as file:
            os.posix_fallocate(file.fileno(), 0, 1 << 20)
    except OSError as error:
        found = f"{folder}: not to be used: {error.strerror or error}"
        mend = f"several processes and habitat-sim's workers need it: {more}"
        yield Finding(name, "problem", found, mend)
        return
    found = f"{folder}: {size(disk.free)} of {size(disk.total)} free"
    if disk.free <= DOCKERS_SHARED:
        mend = f"enough for one process; for several, and for habitat-sim's workers: {more}"
        yield Finding(name, "warning", found, mend)
    else:
        yield Finding(name, "ok", found)


def folder(name: str, path: Path, setting: str) -> Iterable[Finding]:
    """Whether a folder can be written to, and how much fits there.

    Args:
        name: what the folder is for.
        path: the folder, which need not exist yet.
        setting: what chooses another one.
    """
    there = path.expanduser().absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        if not there.is_dir():
            raise NotADirectoryError(20, f"{there} is not a folder", str(there))
        with tempfile.NamedTemporaryFile(dir=there, prefix=".navagent-doctor-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(there).free
    except OSError as error:
        mend = f"let this user write there, or choose another folder: {setting}"
        yield Finding(name, "problem", f"{path} cannot be written: {error.strerror or error}", mend)
        return
    level: Level = "problem" if free < LITTLE_DISK else "warning" if free < SCARCE_DISK else "ok"
    mend = "" if level == "ok" else f"make room, or choose another folder: {setting}"
    yield Finding(name, level, f"{path}: {size(free)} free", mend)
