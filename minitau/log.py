"""One metrics dict a step, one write: a line of JSON, a line on the console, W&B or TensorBoard if asked.

Also the clock that says where a step's seconds went. It knows numbers and names, nothing else.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitau.episode import BadInput
from minitau.files import numbered_lines, write_jsonl
from minitau.script import progress_bar


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


def finite(value: Any) -> Any:
    """`value`, a number or dicts and lists of such, with None for what is not finite: JSON cannot say it."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flatten(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """("reward_by_domain/desk", 0.5) and so on for every number in nested dicts."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, value
