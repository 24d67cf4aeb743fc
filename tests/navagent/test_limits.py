"""What is left to this process, with files as kernels and containers write them."""

import os

import pytest

from envs.cores import usable_cores
from navagent.limits import available_memory, cpu_quota


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_tightest_limit_of_machine_container_and_job_counts(tmp_path):
    assert available_memory(tmp_path) is None
    write(tmp_path, {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:  800 kB\n"})
    assert available_memory(tmp_path) == 800 * 1024
    group = "sys/fs/cgroup/job/step"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job/step\n",
            f"{group}/memory.max": "max\n",
            f"{group}/memory.current": "1000\n",
            f"{group}/memory.stat": "anon 1\ninactive_file 50\n",
            "sys/fs/cgroup/job/memory.max": "5000\n",
            "sys/fs/cgroup/job/memory.current": "1000\n",
            "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 50\n",
        },
    )
    assert available_memory(tmp_path) == 4050
    write(tmp_path, {f"{group}/memory.max": "900\n"})
    assert available_memory(tmp_path) == 0


def test_limits_of_older_kernels_and_of_containers_own_groups_count(tmp_path):
    top = "sys/fs/cgroup/memory"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n",
            f"{top}/memory.limit_in_bytes": "7000\n",
            f"{top}/memory.usage_in_bytes": "3000\n",
            f"{top}/memory.stat": "total_inactive_file 10\n",
        },
    )
    assert available_memory(tmp_path) == 4010


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/job/cpu.max": "200000 100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_the_tightest_quota_of_processor_time_counts(files, cores, tmp_path):
    write(tmp_path, files)
    assert cpu_quota(tmp_path) == cores


def test_this_process_may_run_on_as_many_cores_as_its_affinity_says():
    assert usable_cores() == len(os.sched_getaffinity(0)) >= 1
