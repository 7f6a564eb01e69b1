"""The host's own memory, which a checkpoint's copy takes: what is left of it, and how it is given back. It knows Linux;
elsewhere nothing is known to be left.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

SHARE = 0.5  # part of what is free that a copy may take: others want some too


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


def trim() -> None:
    """Give the system back what this process has freed: glibc keeps blocks of less than 32 MB, and a checkpoint's copy
    is made of many. Nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
