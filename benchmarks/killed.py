"""Does a 4B model's training that was killed go on as if it had not been? On as many GPUs, and on one.

    python -m benchmarks.killed --ranks 2 --work DIR

makes a random Qwen3-4B, runs `torchrun --nproc_per_node RANKS train.py --stage sft` on courier's demonstrations and
kills every rank (SIGKILL) once the checkpoint of step 4 is whole: two steps and more have followed by then, while it
was written. The same command with --resume does those two again, and is killed; and once more on one GPU. Prints one
JSON object, which is written to DIR/killed.json after each run: what its two steps found, and how long it took from the
command to its first step.

On as many ranks the first step's loss has to be the same number, which it is only if every weight is. All that follows
has been through a backward pass, whose sums are in no fixed order on a GPU: it is to be as near as that (`NEAR`), and
without the optimizer's moments the second step's loss is elsewhere. Status 1 if it is not so.

`--shape tiny --dtype float32` runs the same on a CPU, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.flags import at_least
from benchmarks.mfu import SHAPES, where
from benchmarks.random_run import free_everything, random_model
from minitau import checkpoint, parts, pretrained, tiny
from minitau.episode import BadInput
from minitau.log import metrics_of
from minitau.script import run_script

HELD = 4  # the step whose checkpoint is gone on from
LOOK = 2  # steps after it that are compared
NEAR = {"loss": 2e-4, "grad_norm": 1e-2}  # relative, of bf16 whose sums were in another order
BATCH = 32  # conversations a step, of some 330 tokens each


# -- what is run -----------------------------------------------------------------------------------------------


def make_model(folder: Path, shape: str) -> None:
    """Write a random Qwen3 of that shape, whose tokenizer knows courier's words."""
    tiny.write_tokenizer(folder, tiny.world_texts(tiny.Tiny(corpus_tasks=20)), min(2048, SHAPES[shape].vocab_size))
    model = random_model(SHAPES[shape])
    pretrained.save_model(folder, model.cfg, model.named_parameters(), torch.bfloat16, folder)


def train(args: argparse.Namespace, ranks: int, flags: list[str], ready: Callable[[], bool]) -> float:
    """Run SFT on so many ranks, and kill it once it is `ready`; seconds from the command until then. Raises BadInput if
    it ends before."""
    work = args.work
    flags = ["--data", str(work / "data.jsonl"), "--out", str(run_of(args)), "--dtype", args.dtype, *flags]
    flags += ["--lr", str(args.lr), "--batch-size", str(BATCH), "--epochs", "1", "--no-compile"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "train.py"]
    command = [sys.executable, *torchrun, "--stage", "sft", "--model", str(work / "model"), *flags]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=parts.ROOT, stdout=sys.stderr)
    try:
        while not ready():
            if process.poll() is not None and not ready():
                raise BadInput(f"train.py ended with status {process.returncode}; its last words are above")
            time.sleep(0.2)
        return time.perf_counter() - start
    finally:
        for pid in children(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()  # torchrun finds its ranks dead


def run_of(args: argparse.Namespace) -> Path:
    return args.work / "run"


def children(pid: int) -> list[int]:
    """The processes that one has started, of all its threads; none if it has ended."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(each) for file in files for each in file.read_text().split()]


# -- what is looked at -----------------------------------------------------------------------------------------


def steps_of(run: Path) -> list[dict[str, Any]]:
    """What a run has logged of the steps that are compared, as far as it has."""
    return [line for line in metrics_of(run / "metrics.jsonl") if HELD < line["step"] <= HELD + LOOK]


def found_in(steps: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {name: [step[name] for step in steps] for name in NEAR}


def straight(args: argparse.Namespace) -> dict[str, Any]:
    """Train from the beginning, and past the checkpoint."""
    place = run_of(args) / "checkpoints" / f"step-{HELD:06d}"
    flags = ["--save-every", str(HELD), "--keep", "99"]
    seconds = train(args, args.ranks, flags, lambda: place.is_dir() and len(steps_of(run_of(args))) == LOOK)
    return {"ranks": args.ranks, "seconds": seconds, **found_in(steps_of(run_of(args)))}


def resumed(args: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Go on from the checkpoint of step HELD, whatever came after it."""
    run = run_of(args)
    for place in checkpoint.all_checkpoints(run):
        if int(place.name[5:]) > HELD:  # where steps take no time the run was killed too late
            shutil.rmtree(place)
    before = steps_of(run)

    def ready() -> bool:
        steps = steps_of(run)
        return len(steps) == LOOK and steps[0] != before[0]  # their seconds are never the same

    seconds = train(args, ranks, ["--save-every", "999", "--keep", "99", "--resume"], ready)
    steps = steps_of(run)
    started = seconds - sum(step["seconds"]["total"] for step in steps)
    return {"ranks": ranks, "seconds_until_first_step": started, **found_in(steps)}


def agrees(found: dict[str, Any], first: dict[str, Any]) -> bool:
    """Whether a resumed run found what the first did: see above."""
    same = found["ranks"] != first["ranks"] or found["loss"][0] == first["loss"][0]
    return same and all(
        abs(a - b) <= limit * abs(b) for name, limit in NEAR.items() for a, b in zip(found[name], first[name])
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=at_least(1), default=2, help="GPUs of the run that is killed")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--work", type=Path, default="outputs/benchmark-killed", help="folder for model, data and run")
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    args = parser.parse_args(argv)
    args.work = args.work.resolve()
    work, run = args.work, run_of(args)
    if run.exists():
        raise BadInput(f"{run} is another run's, whose steps would be taken for this one's; choose another --work")
    if not (work / "model" / "config.json").is_file():
        make_model(work / "model", args.shape)
        free_everything()
    if not (work / "data.jsonl").is_file():
        parts.run(["-m", "minitau.sft", "--tasks", "300", "--out", str(work / "data.jsonl")], to=sys.stderr)
    first = straight(args)
    result: dict[str, Any] = {"shape": args.shape, **where(), "lr": args.lr, "straight": first, "resumed": []}
    for ranks in dict.fromkeys((args.ranks, 1)):
        result["resumed"].append(resumed(args, ranks))
        result["agrees"] = all(agrees(each, first) for each in result["resumed"])
        (work / "killed.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    return int(not result["agrees"])


if __name__ == "__main__":
    sys.exit(run_script("benchmarks.killed", main, sys.argv[1:]))
