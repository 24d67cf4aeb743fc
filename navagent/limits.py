"""What the machine, the container or job, and the shell leave to this process: memory and processors."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int | None:
    """What this process may still take of the host's memory [bytes]; None where the system does not tell.

    The least of what the machine has left, what the container or job has left (cgroups, versions 1 and 2),
    and what ``ulimit -v`` leaves.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    limits = [*_machine(root), *_groups_memory(root)]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY and root == Path("/"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits.append(address_space - pages * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(limits)) if limits else None


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processor time that the container or job may take, in cores; None where it has no limit.

    Unlike :func:`envs.cores.usable_cores` it is enforced by making threads wait, so more threads than this
    are slower than fewer.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    quotas = [quota for folder in _groups(root, "cpu") for quota in _quota(folder)]
    return min(quotas, default=None)


def size(count: float) -> str:
    """Bytes in words: ``12 MB``, ``3.4 GB``, in powers of 1024."""
    if count < 2**30:
        return f"{count / 2**20:,.0f} MB"
    return f"{count / 2**30:,.1f} GB"


def _machine(root: Path) -> Iterable[int]:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of those around it, for each hierarchy that has them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        # In a container the path may be one of the host's; the container's own group is then the top.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder
            if folder == top:
                break


def _groups_memory(root: Path) -> Iterable[int]:
    """What each limit on this process's group, or on one around it, leaves."""
    second = ("memory.max", "memory.current", "inactive_file")
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for folder in _groups(root, "memory"):
        for files in (second, first):
            left = _left(folder, *files)
            if left is not None:
                yield left


def _left(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    try:
        allowed, used = ((folder / name).read_text().strip() for name in (limit, usage))
        statistics = (folder / "memory.stat").read_text().split()
    except OSError:
        return None
    if not allowed.isdigit():
        return None  # "max"
    # Pages of files are given up for anything else.
    reclaimable = int(statistics[statistics.index(cache) + 1]) if cache in statistics else 0
    return int(allowed) - int(used) + reclaimable


def _quota(folder: Path) -> Iterator[float]:
    """The limit of one group, in either version's words: microseconds of each period, or none."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            words = " ".join((folder / name).read_text() for name in files).split()
        except OSError:
            continue
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            yield int(words[0]) / int(words[1])
