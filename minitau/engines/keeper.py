"""Runs a command and takes it down, children and all, once whoever started it is gone.

    python keeper.py COMMAND ...     stdin: a pipe whose other end only the starter holds

A process that is killed outright cannot end its servers, and a server that nobody owns holds a GPU for ever. But a
pipe closes in whatever way its owner dies, and that is what is waited for here. Run as a file, it imports nothing
of ours, so that it stands in a moment. The starter gives it a process group of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 5.0  # seconds from "please end" to the end


def keep(command: list[str]) -> int:
    """Run `command` until it ends or stdin does; its exit status."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the group's signals below are for the others in it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=default_signals)
    threading.Thread(target=end_when_orphaned, daemon=True).start()
    status = child.wait()
    os.killpg(0, signal.SIGTERM)  # what it may have left behind
    return status


def default_signals() -> None:
    """In the child: ignored signals would be inherited."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_when_orphaned() -> None:
    """Wait for the end of stdin, then end the whole group, this process last."""
    while os.read(0, 1):  # (sys.stdin has a lock, which a thread must not hold when the interpreter ends)
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
