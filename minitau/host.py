"""The host's own memory, which a checkpoint's copy takes: what is left of it, how it is filled, how it is given back.
It knows Linux; elsewhere nothing is known to be left.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

SHARE = 0.5  # part of what is free that a copy may take: others want some too
CORES = 0.5  # part of this host's cores that are at it meanwhile
HOP = 64 << 20  # bytes of each of the two pinned buffers through which a GPU's tensors come


def free(root: Path = Path("/")) -> int:
    """Bytes of the host's own memory that can still be had, within the limits of this process's control groups (a
    container's, a job's); 0 if the system does not say. `root` is where /proc and /sys are."""
    try:
        left = 1024 * named(root / "proc/meminfo")["MemAvailable:"]
    except (OSError, KeyError, ValueError):
        return 0
    groups = []
    with contextlib.suppress(OSError):  # a kernel without control groups
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in groups:
        if controllers == "":  # version 2 has one tree for all
            left = min([left, *left_of_limits(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "")])
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            left = min([left, *left_of_limits(root / "sys/fs/cgroup/memory", path, *names)])
    return left


def left_of_limits(top: Path, path: str, limit: str, used: str, total: str) -> Iterator[int]:
    """Bytes left of each limit from a group up to the top, where a container sees its own; what a group's files keep in
    memory is given up when needed."""
    group = top / path.lstrip("/")
    for place in (group, *group.parents):
        if place.is_relative_to(top):
            with contextlib.suppress(OSError, KeyError, ValueError):  # "max" is no limit
                files = named(place / "memory.stat")[f"{total}inactive_file"]
                yield int((place / limit).read_text()) - int((place / used).read_text()) + files


def named(path: Path) -> dict[str, int]:
    """The numbers of a file of the kernel's with a name and a number a line."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1}


def copy_into(pairs: Sequence[tuple[Tensor, Tensor]], processes: int) -> None:
    """Copy to the first of each pair, contiguous and in this memory, not pinned, the second, of a GPU or not.

    `processes` of this host do it at the same time, and share CORES.
    """
    for place, tensor in pairs:
        if not tensor.is_cuda:
            place.copy_(tensor)
    of_gpu = [pair for pair in pairs if pair[1].is_cuda]
    if not of_gpu:
        return
    threads, cores = torch.get_num_threads(), int(CORES * len(os.sched_getaffinity(0))) // processes
    torch.set_num_threads(max(1, cores))  # torchrun allows one; of this thread, and of those that begin meanwhile
    try:
        hop(of_gpu)
    finally:
        torch.set_num_threads(threads)


def hop(of_gpu: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy a GPU's tensors through two pinned buffers: it fills one while cores empty the other, which is for the most
    part to be given new pages.

    If a GPU copies into such places itself one core does that, a fifth as fast, and all other Python threads stand
    still until a tensor is there; to pin the places takes as long.
    """
    buffers = itertools.cycle([torch.empty(HOP, dtype=torch.uint8, pin_memory=True) for _ in range(2)])
    on_the_way: deque[tuple[Tensor, Tensor, torch.cuda.Event]] = deque()
    stream = torch.cuda.Stream()
    # What is to be copied was computed on the default stream, this thread's current one as it is the training's. What
    # comes there afterwards is not waited for.
    stream.wait_stream(torch.cuda.current_stream())

    def land() -> None:
        place, buffer, arrived = on_the_way.popleft()
        arrived.synchronize()
        place.copy_(buffer)

    with torch.cuda.stream(stream):
        for place, piece in pieces(of_gpu):
            if len(on_the_way) == 2:
                land()
            buffer = next(buffers)[: len(piece)]
            buffer.copy_(piece, non_blocking=True)
            on_the_way.append((place, buffer, stream.record_event()))
        while on_the_way:
            land()


def pieces(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The bytes of either, at most HOP at a time."""
    for place, tensor in pairs:
        there, here = (flat.view(-1).view(torch.uint8) for flat in (place, tensor.contiguous()))
        yield from zip(there.split(HOP), here.split(HOP))


def trim() -> None:
    """Give the system back what this process has freed: glibc keeps blocks of less than 32 MB, and a checkpoint's copy
    is made of many. Nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
