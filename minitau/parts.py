"""Commands, one or several at once: those of play() have a log each, what is finished is not done twice, and nobody is
left running."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from minitau.episode import BadInput

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 20.0  # seconds that an interrupted script gets to end by itself


@dataclass(frozen=True)
class Part:
    """One command, of a seed or of none: done once `proof` is there, and not begun before all of `needs` are."""

    seed: str
    what: str
    command: tuple[str, ...]  # after "python", as typed in the folder that play() is given
    proof: Path
    needs: tuple[Path, ...] = ()
    processes: int = 1  # that it starts, and that share its cores

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.what}" if self.seed else self.what

    def log(self, logs: Path) -> Path:
        return logs / (f"seed-{self.seed}-{self.what}.txt" if self.seed else f"{self.what}.txt")


def check(seeds: Sequence[str], jobs: int) -> None:
    """Raise BadInput for --seeds and --jobs that cannot work."""
    if not seeds or not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise BadInput(f"--seeds {','.join(seeds)}: different whole numbers from 0 up are needed")
    if large := [seed for seed in seeds if int(seed) >= 1 << 63]:
        raise BadInput(f"--seeds {large[0]}: it must fit 64 bits")
    if jobs < 1:
        raise BadInput(f"--jobs is {jobs}; it must be at least 1")


def play(parts: Sequence[Part], logs: Path, jobs: int, cwd: Path = ROOT) -> list[Part]:
    """Run every part that is not done, up to `jobs` at once, in order as far as their needs allow; those that failed.

    What needs something that failed is not begun.
    """
    waiting, failed = list(parts), []
    running: dict[Part, tuple[subprocess.Popen, float]] = {}
    try:
        while True:
            for part in [each for each in waiting if all(path.is_file() for path in each.needs)]:
                if part.proof.is_file():
                    print(f"{part}: done before", flush=True)
                elif len(running) < jobs:
                    running[part] = (start(part, logs, jobs, cwd), time.perf_counter())
                else:
                    continue
                waiting.remove(part)
            if not running:
                return failed
            time.sleep(0.1)
            for part, (process, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[part]
                if process.returncode or not part.proof.is_file():
                    failed.append(part)
                    print(f"{part}: failed with status {process.returncode}; see {part.log(logs)}", flush=True)
                else:
                    print(f"{part}: done in {time.perf_counter() - since:.0f} s", flush=True)
    finally:
        for process, _ in running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # also to the scripts that it runs
        for process, _ in running.values():
            end(process)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it runs may not have heard


def require_something(all_parts: Sequence[Part], failed: Sequence[Part], logs: Path) -> None:
    """Raise BadInput if some have failed and nothing is done."""
    if failed and not any(part.proof.is_file() for part in all_parts):
        raise BadInput(f"nothing is done: {failed[0]} failed, and {failed[0].log(logs)} says why")


def run(command: Sequence[str], to: TextIO | None = None, **environment: str) -> None:
    """Run one command in the repository, and show it first. That line and the command's stdout go to `to`, stdout if
    None. Raises BadInput if it fails."""
    print(f"\n$ python {shlex.join(command)}", file=to, flush=True)
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, env=os.environ | environment, stdout=to) as process:
        try:
            status = process.wait()
        except BaseException:
            end(process)
            raise
    if status:
        raise BadInput(f"the step above ended with status {status}; the same command goes on from there")


def start(part: Part, logs: Path, jobs: int, cwd: Path) -> subprocess.Popen:
    """Run a part in a group of its own with its share of the cores; the command and what it says go to its log."""
    threads = len(os.sched_getaffinity(0)) // jobs // part.processes
    log = part.log(logs)
    log.parent.mkdir(exist_ok=True)
    print(f"{part}: started; it writes to {log}", flush=True)
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{COMMAND}{shlex.join(part.command)}{COMMIT}{commit()}\n")
        file.flush()
        return subprocess.Popen(
            [sys.executable, *part.command],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": str(max(1, threads)), "PYTHONPATH": python_path()},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


COMMAND, COMMIT = "$ python ", "   # commit "  # around what the first line of a log says


def commits(log: Path) -> list[str]:
    """The commits by which a part was run, in order, as its log says; one that was interrupted may have several."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    found = [line.rpartition(COMMIT)[2] for line in text.split("\n") if line.startswith(COMMAND) and COMMIT in line]
    return list(dict.fromkeys(found))


def commit() -> str:
    """The commit of this code, marked if files differ from it; "unknown" where git cannot say."""
    git = ("git", "-C", str(ROOT))
    try:
        name, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name} with changes" if changed else name


def python_path() -> str:
    """So that a command finds minitau from whatever folder it runs in."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def end(process: subprocess.Popen) -> None:
    """Wait for a script that is being interrupted as we are; if it is not, ask it to end, and then make it."""
    for more in (process.terminate, process.kill):
        try:
            process.wait(PATIENCE)
            return
        except subprocess.TimeoutExpired:
            more()
