"""Checkpoints to resume from: written beside the training, whole or not at all, and read again exactly.

One is a folder, `RUN/checkpoints/step-000010/`, with `state.json` (step, curriculum, whatever else the stage keeps),
`state/` (fp32 weights and optimizer, a shard a rank) and `model/` (a Hugging Face directory that eval.py, transformers
and SGLang load: see pretrained.py). It is written beside its place under another name and renamed when whole, so a
crash leaves the previous one as it was; and by a thread, from a copy in the host's memory, so that the training goes on
meanwhile: only the next change of the weights waits for that copy.
No random state is kept because there is none: every draw is seeded by (seed, step, task, sample).
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minitau import host, memory, parallel, pretrained
from minitau.files import write_json
from minitau.model import Qwen3
from minitau.pretrained import CheckpointError


class NotWritten(OSError):
    """A checkpoint could not be written: a full disk, most often."""


class Writing(threading.Thread):
    """A checkpoint on its way to the disk. All ranks write, each in such a thread.

    `write` gets what it calls once it needs the weights no more.
    """

    def __init__(self, write: Callable[[Callable[[], None]], Path]):
        super().__init__(name="checkpoint", daemon=True)
        self.write = write
        self.copied = threading.Event()
        self.place: Path | None = None
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            parallel.use_device()
            self.place = self.write(self.copied.set)
        except BaseException as error:
            self.problem = error
        finally:
            self.copied.set()
            host.trim()  # of the copy, which is gone by now


UNDER_WAY: list[Writing] = []  # what this process writes: one at most


def begin(
    run_dir: Path,
    step: int,
    model: Qwen3,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    dtype: torch.dtype,
    tokenizer_dir: Path,
    keep: int,
) -> None:
    """Begin to write the checkpoint of `step`, which in the end drops all but the newest `keep`.

    Until `wait_until_copied`, neither weights nor optimizer may change. Raises NotWritten for the one before.
    """
    finish()
    shards = parallel.state_of(model, optimizer)

    def fill(folder: Path, kept: dict[str, Any]) -> None:
        parallel.save_state(folder / "state", kept)
        whole = parallel.weights_on_main(kept["model"], dtype)
        try:
            if parallel.is_main():
                pretrained.save_model(folder / "model", model.cfg, whole, dtype, tokenizer_dir)
                write_json(folder / "state.json", {"step": step, **state})
        finally:
            deque(whole, maxlen=0)  # the others give what they hold; the first rank takes it also if the disk does not

    def copy_and_write(copied: Callable[[], None]) -> Path:
        kept = shards
        if copy_fits(model):
            kept = copy_on_host(shards)
            copied()
        return write(run_dir, step, lambda folder: fill(folder, kept), keep)

    UNDER_WAY.append(Writing(copy_and_write))
    UNDER_WAY[0].start()


def copy_fits(model: Qwen3) -> bool:
    """True, on all ranks or none, if the host has room for a copy of weights and optimizer: of all ranks, as if they
    were all on the host that has least. In the thread of checkpoints."""
    mine = (memory.MASTER + memory.ADAM) * sum(parallel.local(each).numel() for each in model.parameters())
    found = parallel.gather((mine, host.free()), beside="checkpoint")
    return sum(size for size, _ in found) <= host.SHARE * min(free for _, free in found)


def copy_on_host(shards: dict[str, Any]) -> dict[str, Any]:
    """A copy of what parallel.state_of gave, in this host's memory. Other threads go on meanwhile."""
    copy, pairs = parallel.places_on_host(shards)
    host.copy_into(pairs, parallel.ranks_here())
    return copy


def wait_until_copied() -> None:
    """Wait until weights and optimizer may change: what `begin` began is in the host's memory, or on the disk where
    that is too small. All ranks do it together. Raises NotWritten, as `finish`, if it has failed by then."""
    if not UNDER_WAY:
        return
    writing = UNDER_WAY[0]
    writing.copied.wait()
    alone = writing.problem and not isinstance(writing.problem, NotWritten)  # the other ranks do not hear of it
    if alone or all(parallel.gather(not writing.is_alive())):
        finish()


def finish() -> Path | None:
    """Wait for what `begin` began, if it did: the checkpoint that is now whole.

    Raises NotWritten, when what was half written has been removed, if the disk is full; the
    earlier checkpoints are untouched.
    """
    if not UNDER_WAY:
        return None
    writing = UNDER_WAY[0]
    with uninterrupted():
        writing.join()
        UNDER_WAY.clear()
    if writing.problem:
        raise writing.problem
    return writing.place


def write(run_dir: Path, step: int, fill: Callable[[Path], None], keep: int) -> Path:
    """Have all ranks fill a folder, and give it its name. In the thread of checkpoints, or where there is no other."""

    def gather(item: str) -> list[str]:
        return parallel.gather(item, beside="checkpoint")

    place = run_dir / "checkpoints" / f"step-{step:06d}"
    scratch = place.with_name(f".{place.name}.tmp")
    if parallel.is_main():
        for leftover in place.parent.glob(".step-*.tmp"):  # of a crash, of whichever step
            shutil.rmtree(leftover, ignore_errors=True)
    gather("removed")
    problem = ""
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        fill(scratch)
    except OSError as error:
        problem = str(error)
    if problems := [p for p in gather(problem) if p]:
        if parallel.is_main():
            shutil.rmtree(scratch, ignore_errors=True)
        advice = f"free some space and go on from {latest(run_dir) or 'the start'} with --resume"
        raise NotWritten(f"checkpoint of step {step} was not written ({problems[0]}); {advice}")
    if parallel.is_main():
        if place.exists():  # a resumed run came by the same step again
            shutil.rmtree(place)
        scratch.rename(place)
        for old in all_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    gather("named")
    return place


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let ctrl-C wait until the block is done: what is written is worth the wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = {number: signal.signal(number, lambda *_: caught.append(1)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    whole = (path for path in (run_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit())
    return sorted(whole, key=lambda path: int(path.name[5:]))


def latest(run_dir: Path) -> Path | None:
    found = all_checkpoints(run_dir)
    return found[-1] if found else None


def load(
    run_dir: Path, model: Qwen3, optimizer: torch.optim.Optimizer, keeps: Sequence[tuple[str, type]] = ()
) -> dict[str, Any] | None:
    """Restore the newest checkpoint in place; its state, or None if there is none yet. Raises CheckpointError if it is
    damaged, or its state lacks something of `keeps`."""
    place = latest(run_dir)
    if place is None:
        return None
    try:
        state = json.loads((place / "state.json").read_text())
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError("state.json does not say at which step")
        if missing := [name for name, kind in keeps if not isinstance(state.get(name), kind)]:
            raise ValueError(f"state.json has no {missing[0]}")
        parallel.load_state(place / "state", model, optimizer)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        advice = "remove it to go on from the one before"
        if len(all_checkpoints(run_dir)) == 1:
            advice = "it is the only one: choose another --out, or remove the run to start over"
        raise CheckpointError(f"{place}: cannot be read ({why}); {advice}") from None
    return state
