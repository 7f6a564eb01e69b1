"""What every script is to its user: an exit status, one line where something is wrong, and a bar."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Callable

from tqdm import tqdm

from minitau.episode import BadInput, EpisodeError

FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or this user's part of it


def run_script(name: str, body: Callable[[list[str]], int | None], argv: list[str], *, resume: str = "") -> int:
    """Run a script's `body` on its flags; its exit status, which is what `body` returns if it does. `resume`: how an
    interrupted one goes on.

    What a user can mend is one line on stderr, clear of any progress bar that still stands there: 2
    for bad input, 1 for what the system refused or the world broke, 130 for ctrl-C and SIGTERM.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        done = body(argv)
        sys.stdout.flush()
    except BadInput as error:
        status, line = 2, str(error)
    except (FileExistsError, NotADirectoryError) as error:
        status, line = 2, f"{error.filename or error}: a file is where a folder is needed; choose another place"
    except IsADirectoryError as error:  # of two places the second is what was to be written
        place = error.filename2 or error.filename
        status, line = 2, f"{place}: a folder is where a file is needed; remove it, or choose another place"
    except OSError as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            return 128 + signal.SIGPIPE
        full = "; free some space" + (f", then {resume}" if resume else "") if error.errno in FULL else ""
        status, line = 1, f"{error}{full}"
    except EpisodeError as error:
        status, line = 1, str(error)
    except KeyboardInterrupt:
        status, line = 130, f"interrupted; {resume}" if resume else "interrupted"
    else:
        return done or 0
    tqdm.write(f"{name}: {' '.join(line.split())}", file=sys.stderr)
    if status == 130 and threading.active_count() > 1:
        # Episodes still run in their threads; an orderly exit would pull the interpreter from under them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def nobody_reads() -> bool:
    """Whether whoever read our stdout has gone, as `head` does that has seen enough. Then nothing more goes there."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)
    except (OSError, ValueError):  # it is no file of the system's
        return False
    gone = any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
    return gone


def progress_bar(
    what: str, total: int | None, unit: str, *, done: int = 0, leave: bool = False, shown: bool = True
) -> tqdm:
    """A tqdm bar that does not fill a log file when nobody is watching."""
    every = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm(desc=what, total=total, unit=unit, initial=done, leave=leave, disable=not shown, mininterval=every)
