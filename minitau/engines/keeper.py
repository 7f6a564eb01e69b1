"""Runs a command and takes it down, children and all, once whoever started it is gone.

    python keeper.py COMMAND ...     stdin: a pipe whose other end only the starter holds

A process that is killed outright cannot end its servers, and a server that nobody owns holds a GPU for ever. But a
pipe closes in whatever way its owner dies, and that is what is waited for here. Run as a file, it imports nothing
of ours, so that it stands in a moment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 5.0  # seconds from "please end" to the end
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent dies


def keep(command: list[str]) -> int:
    """Run `command` in a process group of its own until it ends, stdin does, or this process is asked to end; its exit
    status."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    die_along = prctl and (lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL))  # if this process is killed outright
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=die_along)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", flush=True)
        return 127
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: threading.Thread(target=end, args=(child.pid,), daemon=True).start())
    threading.Thread(target=end_when_orphaned, args=(child.pid,), daemon=True).start()
    status = child.wait()
    end(child.pid)  # what it left behind
    return status


def end_when_orphaned(group: int) -> None:
    """Wait for the end of stdin, then end the group."""
    while os.read(0, 1):  # (sys.stdin has a lock, which a thread must not hold when the interpreter ends)
        pass
    end(group)


def end(group: int) -> None:
    """Ask every process of the group to end, and after GRACE seconds make it."""
    deadline = time.monotonic() + GRACE
    try:
        os.killpg(group, signal.SIGTERM)
        while time.monotonic() < deadline:
            os.killpg(group, 0)  # raises once nobody is left
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
