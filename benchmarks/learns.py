"""Does a model learn on a GPU? From random weights: SFT on demonstrations, then GRPO through SGLang.

    python -m benchmarks.learns courier --engine-command "$SGLANG" --out DIR
    python -m benchmarks.learns retail --ranks 2 --engine-command "$SGLANG" --out DIR

with SGLANG="python -m sglang.launch_server --attention-backend triton", because the heads are of size 32. `courier` is
the small world that comes with minitau, and its demonstrator makes mistakes; `retail` is tau2-bench's, with the
scripted customer, and its demonstrations are right. Every command is shown on stderr as it would be typed; what is done
is not done again. Draws DIR/curve.png, and prints one JSON object: of both stages the steps and seconds, and of GRPO's
reward the first and the last, the mean of the first and last ten steps, and by how much a line through all rises.

`--shape tiny --engine-command "env PYTHONPATH=. python tests/fake_sglang.py"` runs the same on a CPU, to see that it
works.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.flags import at_least
from benchmarks.mfu import where
from minitau import memory, parts, plot, pretrained
from minitau.claim import claim_for
from minitau.files import written_whole
from minitau.log import metrics_of
from minitau.script import run_script

MARKER = ".minitau-learns"  # says that a folder is such a run's
ENDS = 10  # steps at either end of a run


class Recipe(NamedTuple):
    """What each command is told beside its paths."""

    world: str  # of model and demonstrations
    model: str
    demonstrations: tuple[str, ...]  # a file each
    sft: str
    grpo: str


RECIPES = {
    "courier": Recipe(
        world="",
        model="--layers 11 --hidden 640 --heads 20",
        demonstrations=tuple(f"--agent flawed --seed {seed}" for seed in range(4)),
        sft="--dtype bfloat16 --lr 8e-4 --batch-size 128 --epochs 6 --micro-batch-tokens 49152",
        grpo="--dtype bfloat16 --engine-mem 0.3 --lr 3e-5 --tasks 264 --tasks-per-step 16 --group-size 8 "
        "--max-rounds 2 --kl 0 --weight-decay 0.01 --no-screen --concurrency 128 --steps 40",
    ),
    "retail": Recipe(
        world="--env tau2 --domains retail",
        model="--layers 12 --hidden 640 --heads 20 --vocab 4096 --max-tokens 12288",
        demonstrations=("--agent gold",),
        sft="--dtype bfloat16 --lr 6e-4 --weight-decay 0.01 --batch-size 16 --epochs 56 --micro-batch-tokens 49152",
        # --negative-weight 0: successes alone teach. What else was tried stands in the README.
        grpo="--user-model script --dtype bfloat16 --engine-mem 0.25 --lr 3e-5 --negative-weight 0 "
        "--tasks-per-step 34 --group-size 8 --max-rounds 1 --no-curriculum --kl 0 --entropy 0 --weight-decay 0.01 "
        "--max-new-tokens 256 --max-tokens 12288 --max-bad-calls 1 --concurrency 192 "
        "--micro-batch-tokens 49152 --steps 50",
    ),
}
NOTHING = Recipe("", "", ("",), "", "")
TINY = Recipe(
    world="",
    model="--layers 2 --hidden 64 --heads 2 --vocab 1280 --corpus-tasks 3",
    demonstrations=("--tasks 8",),
    sft="--dtype float32 --batch-size 4 --epochs 1",
    grpo="--dtype float32 --tasks-per-step 2 --group-size 2 --max-new-tokens 16 --concurrency 4 --steps 2",
)
ADDED = {"real": NOTHING, "tiny": TINY}  # by --shape; of a flag that is there twice the later counts


# -- what is run -----------------------------------------------------------------------------------------------


def learn(args: argparse.Namespace, out: Path) -> None:
    """Model, demonstrations, SFT and GRPO, each in its place in `out` and unless it is there. Raises BadInput if one
    fails."""
    recipe, added, seed = RECIPES[args.world], ADDED[args.shape], f"--seed {args.seed}"
    model, data, sft, grpo = out / "model", out / "demonstrations.jsonl", out / "sft", out / "grpo"
    if not (model / "config.json").is_file():
        python("-m", "minitau.tiny", "--out", model, flags=(recipe.world, recipe.model, added.model, seed))
    if not data.is_file():
        texts = []
        for number, agent in enumerate(recipe.demonstrations):
            file = out / f"demonstrations-{number}.jsonl"
            if not file.is_file():
                python("-m", "minitau.sft", "--out", file, flags=(recipe.world, agent, *added.demonstrations))
            texts.append(file.read_text(encoding="utf-8"))
        with written_whole(data) as scratch:
            scratch.write_text("".join(texts), encoding="utf-8")
    if not (sft / "model").is_dir():
        stage = ("train.py", "--stage", "sft", "--model", model, "--data", data, "--out", sft, "--resume")
        python(*stage, flags=(recipe.sft, added.sft, seed))
    if not (grpo / "model").is_dir():
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", args.ranks, "train.py")
        script = torchrun if args.ranks > 1 else ("train.py",)
        stage = ("--stage", "grpo", "--model", sft / "model", "--out", grpo, "--resume")
        engine = ("--engine", "sglang", "--engine-command", args.engine_command)
        python(*script, *stage, *engine, flags=(recipe.world, recipe.grpo, added.grpo, seed))


def python(*words: Any, flags: Sequence[str]) -> None:
    parts.run([*map(str, words), *" ".join(flags).split()], to=sys.stderr)


# -- what came of it -------------------------------------------------------------------------------------------


def report(out: Path) -> dict[str, Any]:
    """Steps and seconds of both stages, and how GRPO's reward went."""
    steps = {stage: metrics_of(out / stage / "metrics.jsonl") for stage in ("sft", "grpo")}
    found: dict[str, Any] = {"parameters": memory.parameters(pretrained.read_config(out / "model"))}
    for stage, lines in steps.items():
        found[stage] = {"steps": len(lines), "seconds": sum(line["seconds"]["total"] for line in lines)}
    episodes = [line["episodes"] for line in steps["grpo"]]
    found["grpo"] |= {"episodes": sum(episodes), "fewest_a_step": min(episodes), "most_a_step": max(episodes)}
    rewards = [line["reward"] for line in steps["grpo"]]
    ends = {"first": rewards[0], "last": rewards[-1]}
    means = {f"first_{ENDS}": statistics.fmean(rewards[:ENDS]), f"last_{ENDS}": statistics.fmean(rewards[-ENDS:])}
    return found | {"reward": ends | means | rise(rewards)}


def rise(values: Sequence[float]) -> dict[str, float]:
    """By how much the line of least squares rises from the first of `values` to the last, and half the width of the 95%
    interval of that, as if they were independent. Nothing if they are too few to tell."""
    n = len(values)
    if n < 3:
        return {}
    slope, intercept = statistics.linear_regression(range(n), values)
    beside = sum((value - intercept - slope * x) ** 2 for x, value in enumerate(values)) / (n - 2)
    spread = n * (n * n - 1) / 12  # the sum of (x - mean)^2
    error = math.sqrt(beside / spread)
    return {"rises_by": slope * (n - 1), "give_or_take": plot.student(n - 2) * error * (n - 1)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=RECIPES)
    parser.add_argument("--engine-command", required=True, help="SGLang's, as train.py has it")
    parser.add_argument("--ranks", type=at_least(1), default=1, help="GPUs of GRPO")
    parser.add_argument("--seed", type=int, default=0, help="of weights and both stages; demonstrations have their own")
    parser.add_argument("--out", default="outputs/benchmark-learns", help="folder for models, runs and the picture")
    parser.add_argument("--no-resume", action="store_true", help="start over, instead of going on where it was")
    parser.add_argument("--shape", choices=ADDED, default="real")
    args = parser.parse_args(argv)
    out = Path(args.out).resolve()
    told = {name: getattr(args, name) for name in ("world", "shape", "ranks", "seed")} | {"commit": parts.commit()}
    claim_for(MARKER, out, told, not args.no_resume)
    learn(args, out)
    plot.draw(out / "curve.png", plot.groups_of([out / "grpo"]))
    print(json.dumps({**told, **where(), **report(out)}, indent=1))


if __name__ == "__main__":
    sys.exit(run_script("benchmarks.learns", main, sys.argv[1:]))
