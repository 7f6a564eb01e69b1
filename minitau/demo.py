"""The whole pipeline on one CPU: base, SFT, RFT, GRPO, and an evaluation of held-out tasks after each.

It runs the same train.py and eval.py that a node with eight GPUs runs, as commands that it prints.
Every step goes on where it was, so that the demo itself can be interrupted and started again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitau import checkpoint, config, report
from minitau.config import setting
from minitau.episode import BadInput
from minitau.log import run_script, whole_lines

ROOT = Path(__file__).resolve().parent.parent
MARKER = ".minitau-demo"  # says that a folder is a demo's


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The pipeline in a quarter of an hour on two cores."""

    out: str = setting("outputs/demo", "folder of the whole demo")
    resume: bool = setting(True, "go on where an earlier demo in --out was; --no-resume starts over")
    seed: int = setting(0, "of everything")
    tasks: int = setting(18, "test tasks a domain in each evaluation")
    demonstrations: int = setting(0, "conversations of a flawed scripted agent for SFT; 0 is one a training task")
    sft_epochs: int = setting(10, "passes over them")
    rft_tasks: int = setting(96, "training tasks that RFT samples, four times each")
    steps: int = setting(16, "GRPO steps of 8 tasks x 8 samples")


def run(*command: str) -> None:
    """Run one of the project's scripts, shown as it would be typed. Raises BadInput if it fails."""
    print("\n$ python " + " ".join(command), flush=True)
    status = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
    if status:
        raise BadInput(f"the step above ended with status {status}; the same command goes on from there")


def train(stage: str, out: Path, model: Path, *flags: str) -> Path:
    """Train one stage unless that is done; the model it made."""
    if not (out / "model").is_dir():
        run("train.py", "--stage", stage, "--model", str(model), "--out", str(out), "--resume", *flags)
    return out / "model"


def evaluate(cfg: Demo, name: str, *flags: str) -> list[dict[str, Any]]:
    """Evaluate on held-out tasks unless that is done; the table's rows."""
    out = Path(cfg.out).resolve() / f"eval-{name}"
    if not (out / "results.json").is_file():
        tasks = ("--tasks", str(cfg.tasks), "--num-trials", "4", "--seed", str(cfg.seed))
        run("eval.py", "--stage", name, "--out", str(out), "--resume", *tasks, *flags)
    return json.loads((out / "results.json").read_text())


def pipeline(cfg: Demo) -> list[dict[str, Any]]:
    """Every stage and its evaluation, in order; all rows of the table."""
    out = Path(cfg.out).resolve()
    seed = ("--seed", str(cfg.seed))
    base, data = out / "base", out / "demonstrations.jsonl"
    if not (base / "config.json").is_file():
        run("-m", "minitau.tiny", "--out", str(base), "--layers", "2", *seed)
    if not data.is_file():
        run("-m", "minitau.sft", "--agent", "flawed", "--tasks", str(cfg.demonstrations), "--out", str(data), *seed)
    rows = []
    for floor in ("refuse", "transfer"):
        rows += evaluate(cfg, floor, "--agent", floor)
    rows += evaluate(cfg, "base", "--model", str(base))
    common = ("--batch-size", "8", "--micro-batch-tokens", "8192", "--max-tokens", "2048", *seed)
    epochs = ("--epochs", str(cfg.sft_epochs))
    model = train(
        "sft", out / "sft", base, "--data", str(data), "--lr", "3e-3", *epochs, "--save-every", "100", *common
    )
    rows += evaluate(cfg, "sft", "--model", str(model))
    model = train("rft", out / "rft", model, "--tasks", str(cfg.rft_tasks), "--lr", "3e-4", *common)
    rows += evaluate(cfg, "rft", "--model", str(model))
    size = ("--steps", str(cfg.steps), "--tasks-per-step", "8", "--group-size", "8", "--max-rounds", "2")
    model = train("grpo", out / "grpo", model, "--lr", "1e-4", *size, *common[2:])
    return rows + evaluate(cfg, "grpo", "--model", str(model))


def claim(cfg: Demo, out: Path) -> None:
    """Make the demo's folder. One that holds something else is neither used nor, above all, removed."""
    marker = out / MARKER
    if out.exists() and any(out.iterdir()) and not marker.is_file():
        raise BadInput(f"{out} is not empty and holds no demo; choose another --out")
    if not cfg.resume:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({**dataclasses.asdict(cfg), "out": "", "resume": True})
    if marker.is_file() and marker.read_text() != settings:
        raise BadInput(f"{out} holds a demo with other settings; --no-resume starts over, or choose another --out")
    marker.write_text(settings)


def main(argv: list[str]) -> None:
    start = time.perf_counter()
    cfg = config.parse(Demo, "make demo", "base, SFT, RFT and GRPO on one CPU.", argv)
    out = Path(cfg.out).resolve()
    claim(cfg, out)
    rows = pipeline(cfg)
    checkpoint.write_json(out / "results.json", rows)
    stages = ("sft", "rft", "grpo")
    curves = {stage: [json.loads(line) for line in whole_lines(out / stage / "metrics.jsonl")] for stage in stages}
    report.draw(out / "learning.png", rows, curves)
    print(f"\n{report.table(rows)}\n")
    print(f"{out / 'results.json'} and {out / 'learning.png'} are written; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    sys.exit(run_script("make demo", main, sys.argv[1:], resume="the same command goes on where it was"))
