"""What the host's memory has left, how it is filled, and that what is freed goes back."""

import os
from pathlib import Path

import pytest
import torch

from minitau import host


@pytest.mark.parametrize("where", ["", "slurm", "slurm/job_7"], ids=["container's", "all jobs'", "own"])
def test_what_the_host_has_left(tmp_path, where):
    """Of the machine, and of a group of processes where its limit is nearer; what it keeps of files can be had back."""
    assert host.free(tmp_path) == 0  # the system does not say
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\nHugePages_Total: 0\n")
    assert host.free(tmp_path) == 4000 * 1024
    (tmp_path / "proc/self/cgroup").write_text("0::/slurm/job_7\n")
    assert host.free(tmp_path) == 4000 * 1024
    group = tmp_path / "sys/fs/cgroup" / where
    group.mkdir(parents=True)
    for limit, free in (("max", 4000 * 1024), ("1000000", 1_000_000 - 600_000 + 50_000), ("9000000", 4000 * 1024)):
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text("600000\n")
        (group / "memory.stat").write_text("anon 500000\ninactive_file 50000\n")
        assert host.free(tmp_path) == free


def test_what_a_limit_of_control_groups_of_version_1_leaves(tmp_path):
    group = tmp_path / "sys/fs/cgroup/memory/job"
    for folder in (group, tmp_path / "proc/self"):
        folder.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable:    4000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("9:cpu,cpuacct:/job\n8:memory:/job\n0::/\n")
    (group / "memory.limit_in_bytes").write_text("1000000\n")
    (group / "memory.usage_in_bytes").write_text("600000\n")
    (group / "memory.stat").write_text("cache 9\ninactive_file 7\ntotal_inactive_file 50000\n")
    assert host.free(tmp_path) == 450_000


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_tensors_are_copied_byte_by_byte(monkeypatch):
    """On a GPU in pieces: see test_gpu.py."""
    monkeypatch.setattr(host, "HOP", 1 << 10)
    tensors = [torch.randn(3, 1000), torch.tensor(7.0), torch.randn(0, 5), torch.randn(20, 30).t(), torch.arange(512)]
    places = [torch.full(tensor.shape, -1, dtype=tensor.dtype) for tensor in tensors]
    pairs = list(zip(places, tensors))
    host.copy_into(pairs, 1)
    assert all(torch.equal(place, tensor) for place, tensor in pairs)
    pieces = list(host.pieces(pairs))
    assert [len(there) for there, _ in pieces] == [1024] * 11 + [736, 4, 0, 1024, 1024, 352] + [1024] * 4
    for place in places:
        place.zero_()
    for there, here in pieces:
        there.copy_(here)
    assert all(torch.equal(place, tensor) for place, tensor in pairs)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no /proc")
def test_what_is_freed_goes_back_to_the_system():
    """Blocks as a checkpoint's copy has them; glibc has seen larger ones go, and keeps such since."""
    for size in (30, 30):
        torch.zeros(size << 20, dtype=torch.uint8)
    blocks = [torch.ones(5 << 20, dtype=torch.uint8) for _ in range(40)]
    last = blocks.pop()  # what lies behind the others, so that they are no end of a heap
    before = resident()
    blocks.clear()
    host.trim()
    assert before - resident() > 150 << 20 and last.all()


def test_this_host_says_what_it_has_left():
    assert host.free() > 1e8
