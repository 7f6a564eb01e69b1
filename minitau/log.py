"""One metrics dict a step, one write: a line of JSON, a line on the console, W&B or TensorBoard if asked.

Also the clock that says where a step's seconds went. It knows numbers and names, nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import itertools
import json
import math
import os
import select
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from minitau.episode import BadInput, EpisodeError

FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or this user's part of it


class Clock:
    """Wall-clock seconds of the phases of one step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def report(self) -> dict[str, Any]:
        """seconds: each phase and the step's `total`; share: each phase's part of the total."""
        total = time.perf_counter() - self.start
        return {
            "seconds": {**self.seconds, "total": total},
            "share": {name: seconds / total for name, seconds in self.seconds.items()},
        }


def progress_bar(
    what: str, total: int | None, unit: str, *, done: int = 0, leave: bool = False, shown: bool = True
) -> tqdm:
    """A tqdm bar that does not fill a log file when nobody is watching."""
    every = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm(desc=what, total=total, unit=unit, initial=done, leave=leave, disable=not shown, mininterval=every)


def run_script(name: str, body: Callable[[list[str]], None], argv: list[str], *, resume: str = "") -> int:
    """Run a script's `body` on its flags; its exit status. `resume`: how an interrupted one goes on.

    What a user can mend is one line on stderr, clear of any progress bar that still stands there: 2
    for bad input, 1 for what the system refused or the world broke, 130 for ctrl-C and SIGTERM.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        body(argv)
        sys.stdout.flush()
    except BadInput as error:
        status, line = 2, str(error)
    except (FileExistsError, NotADirectoryError) as error:
        status, line = 2, f"{error.filename or error}: a file is where a folder is needed; choose another place"
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
        return 0
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


def check_log(wandb: bool, tensorboard: bool) -> None:
    """Raise BadInput for a log that is asked for and not installed."""
    for package, asked in (("wandb", wandb), ("tensorboard", tensorboard)):
        if asked and importlib.util.find_spec(package) is None:
            raise BadInput(f"--{package}: it is not installed; pip install {package}")


class MetricsLog:
    """Appends to RUN/metrics.jsonl; on a resumed run first drops the lines of steps that are not done.

    Those steps will be run again, and a step must not stand there twice. Ranks other than the
    first pass enabled=False and write nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        is_done: Callable[[int], bool],
        enabled: bool,
        wandb: bool = False,
        tensorboard: bool = False,
    ):
        self.path = run_dir / "metrics.jsonl"
        self.enabled = enabled
        self.bar = progress_bar("", None, "step", shown=False)
        self.wandb = self.tensorboard = None
        if not enabled:
            return
        kept = [row for row in metrics_of(self.path) if is_done(row["step"])]
        write_jsonl(self.path, kept)
        if wandb:
            import wandb as module

            known = run_dir / "wandb_id"  # by which a resumed run goes on as the same one
            if not known.is_file():
                known.write_text(uuid.uuid4().hex)
            self.wandb = module.init(
                project="minitau",
                name=run_dir.name,
                dir=str(run_dir),
                id=known.read_text(),
                resume="allow",
                config=json.loads((run_dir / "config.json").read_text()),
            )
            # Of W&B's own steps those that come again, after a run was killed, would be lost.
            self.wandb.define_metric("*", step_metric="step")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What is there of a step that comes again, and of those after it, is not shown.
            again = next(step for step in itertools.count(1) if not is_done(step))
            self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=again)

    def start(self, what: str, total: int, done: int) -> None:
        """Show a bar of `total` steps, `done` of them behind us."""
        self.bar = progress_bar(what, total, "step", done=done, leave=True, shown=self.enabled)

    def finish(self) -> None:
        self.bar.close()

    def write(self, metrics: dict[str, Any], headline: tuple[str, ...]) -> None:
        """Record one step; `headline` names the values that the console shows."""
        if not self.enabled:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(metrics), allow_nan=False) + "\n")
        self.bar.set_postfix({name: f"{metrics[name]:.3g}" for name in headline}, refresh=False)
        self.bar.update()
        flat = dict(flatten(metrics))
        if self.wandb:
            self.wandb.log(flat)
        if self.tensorboard:
            for name, value in flat.items():
                self.tensorboard.add_scalar(name, value, metrics["step"])


def finite(value: Any) -> Any:
    """`value`, a number or dicts and lists of such, with None for what is not finite: JSON cannot say it."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metrics_of(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics.jsonl, as they stand there. Raises BadInput with the number of a line that is none."""
    rows = []
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line)
            usable = isinstance(row, dict) and isinstance(row.get("step"), int)
        except (ValueError, RecursionError):
            usable = False
        if not usable:
            raise BadInput(f"{path}, line {number}: not a step's metrics; remove the line to go on without it")
        rows.append(row)
    return rows


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a JSONL file with their numbers, without empty ones, and without the last one if a crash cut it in
    half. Raises BadInput if it is no text."""
    if not path.is_file():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    try:
        return [(number, line) for number, line in enumerate(whole.decode("utf-8").split("\n"), 1) if line.strip()]
    except UnicodeDecodeError as error:
        number = whole.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}, line {number}: not UTF-8; remove the line to go on without it") from None


def whole_lines(path: Path) -> list[str]:
    """Those lines without their numbers."""
    return [line for _, line in numbered_lines(path)]


def open_to_append(path: Path) -> TextIO:
    """Open a JSONL file to append to; a last line that a crash cut in half is dropped first."""
    whole = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (the caller closes it)
    file.truncate(whole)
    return file


def file_sha256(path: str | Path) -> str:
    """What a file holds, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where the block writes what `path` is to be: a reader sees the old file or the new one, never half of one, and
    nothing is left of one that failed."""
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSONL whole or not at all."""
    with written_whole(path) as scratch, open(scratch, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def flatten(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """("reward_by_domain/desk", 0.5) and so on for every number in nested dicts."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, value
