"""The whole pipeline on one CPU: base, SFT, RFT, GRPO, and an evaluation of held-out tasks after each.

It runs the same train.py and eval.py that a node with eight GPUs runs, as commands that it prints.
Every step goes on where it was, so that the demo itself can be interrupted and started again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitau import cli, config, parts, picture, report
from minitau.claim import claim_for
from minitau.config import setting
from minitau.envs import open_world
from minitau.episode import BadInput, Task, Trajectory
from minitau.files import file_sha256, write_json
from minitau.log import metrics_of
from minitau.parts import ROOT
from minitau.script import run_script
from minitau.tasks import FLOORS

MARKER = ".minitau-demo"  # says that a folder is a demo's

# What each stage adds to its script's defaults; sizes are flags of the demo's own.
COMMON = "--micro-batch-tokens 8192 --max-tokens 2048"
FLAGS = {
    "sft": f"--lr 1e-3 --batch-size 8 --save-every 100 {COMMON}",
    # --no-screen, here and below: courier's tasks that pay for a transfer are those in which it is right.
    "rft": f"--lr 3e-4 --batch-size 8 --no-screen {COMMON}",
    # 264 tasks are 88 a family. Of all 3072, 40 steps of 8 or 16 draws would hardly meet one again, and the
    # curriculum, which goes by earlier visits, would have nothing to choose by; far fewer it learns by heart.
    "grpo": "--lr 1e-4 --tasks 264 --tasks-per-step 8 --group-size 8 --max-rounds 2 --kl 0 --weight-decay 0.01 "
    f"--no-screen {COMMON}",
    "eval": "--temperature 1 --num-trials 4",
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What one pipeline is made of."""

    base: str = setting("models/base", "the model to start from, relative to the repository")
    resume: bool = setting(True, "go on where an earlier one in --out was; --no-resume starts over")
    tasks: int = setting(22, "test tasks a domain in each evaluation, four trials each")
    demonstrations: int = setting(0, "conversations of a flawed scripted agent for SFT; 0 is one a training task")
    sft_epochs: int = setting(2, "passes over them")
    rft_tasks: int = setting(48, "training tasks that RFT samples, four times each")
    steps: int = setting(40, "GRPO steps of 8 tasks x 8 samples")


@dataclass(frozen=True, kw_only=True)
class Demo(Sizes):
    """The pipeline in a quarter of an hour on two cores."""

    out: str = setting("outputs/demo", "folder of the whole demo")
    seed: int = setting(0, "of everything")


# -- the pipeline ----------------------------------------------------------------------------------------


def pipeline(cfg: Demo) -> list[dict[str, Any]]:
    """Every stage and its evaluation, in order; all rows of the table."""
    out = folder(cfg)
    base, data = ROOT / cfg.base, out / "demonstrations.jsonl"
    if not data.is_file():
        source = ("--agent", "flawed", "--tasks", str(cfg.demonstrations), "--seed", str(cfg.seed))
        run("-m", "minitau.sft", *source, "--out", str(data))
    rows = []
    for floor in FLOORS:
        rows += evaluate(cfg, floor, "--agent", floor)
    rows += evaluate(cfg, "base", "--model", str(base))
    model = train(cfg, "sft", "sft", base, "--data", str(data), "--epochs", str(cfg.sft_epochs))
    rows += evaluate(cfg, "sft", "--model", str(model))
    model = train(cfg, "rft", "rft", model, "--tasks", str(cfg.rft_tasks))
    rows += evaluate(cfg, "rft", "--model", str(model))
    model = train(cfg, "grpo", "grpo", model, "--steps", str(cfg.steps))
    return rows + evaluate(cfg, "grpo", "--model", str(model))


def folder(cfg: Demo) -> Path:
    return Path(cfg.out).resolve()


def train(cfg: Demo, name: str, stage: str, model: Path, *flags: str, script: Sequence[str] = ("train.py",)) -> Path:
    """Train one stage in OUT/name unless that is done; the model it made."""
    out = folder(cfg) / name
    if not (out / "model").is_dir():
        run(*script, *train_flags(stage, model, out, cfg.seed, *flags))
    return out / "model"


def train_flags(stage: str, model: Path, out: Path, seed: int | str, *flags: str) -> list[str]:
    """What train.py is told: the demo's settings of a stage, unless `flags` say otherwise."""
    places = ["--stage", stage, "--model", str(model), "--out", str(out), "--resume"]
    return [*places, *FLAGS[stage].split(), "--seed", str(seed), *flags]


def evaluate(cfg: Demo, name: str, *flags: str) -> list[dict[str, Any]]:
    """Evaluate on held-out tasks in OUT/eval-name unless that is done; the table's rows."""
    out = folder(cfg) / f"eval-{name}"
    if not (out / "results.json").is_file():
        run("eval.py", *eval_flags(name, out, cfg.tasks, cfg.seed, *flags))
    return json.loads((out / "results.json").read_text())


def eval_flags(name: str, out: Path, tasks: int, seed: int | str, *flags: str) -> list[str]:
    """What eval.py is told: the demo's settings of an evaluation whose row is called `name`."""
    places = ["--stage", name, "--out", str(out), "--resume"]
    # The floors have rows of their own, once for all stages.
    return [*places, "--no-floors", *FLAGS["eval"].split(), "--tasks", str(tasks), "--seed", str(seed), *flags]


def run(*command: str) -> None:
    """Run one of the project's scripts. On a CPU everywhere, for there it repeats: a GPU would hardly be faster with a
    model this small."""
    parts.run(command, CUDA_VISIBLE_DEVICES="")


# -- its folder --------------------------------------------------------------------------------------------


def identity(cfg: Sizes, *leave_out: str) -> dict[str, Any]:
    """What makes a pipeline what it is: its settings, the stages' flags, the weights it starts from.

    Raises BadInput if there is no model to start from.
    """
    hashes = weights(ROOT / cfg.base, "--base")
    kept = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in ("resume", *leave_out)}
    return json.loads(json.dumps({**kept, "flags": FLAGS, "weights": hashes}))


def weights(model: Path, flag: str) -> dict[str, str]:
    """What a model's files of weights hold, by name. Raises BadInput, which names `flag`, if there is no model."""
    if not (model / "config.json").is_file():
        raise BadInput(f"{model} holds no model (there is no config.json in it); choose another {flag}")
    return {path.name: file_sha256(path) for path in sorted(model.glob("*.safetensors"))}


# -- what it shows -----------------------------------------------------------------------------------------


def tasks_in_turn(cfg: Sizes) -> list[Task]:
    """The tasks of each evaluation, one of each family in turn."""
    settings = config.Evaluation()
    world = open_world(settings)
    families = [world.tasks(domain, settings.split)[: cfg.tasks or None] for domain in settings.domains]
    return [task for row in itertools.zip_longest(*families) for task in row if task is not None]


def choose(
    tasks: Sequence[Task],
    before: Mapping[tuple[str, int], Trajectory],
    after: Mapping[tuple[str, int], Trajectory],
) -> tuple[Task, bool]:
    """The first of `tasks` whose first trial failed before and succeeded after, and True.

    The first task, and False, if there is none. Episodes that broke on our side show neither.
    """
    for task in tasks:
        old, new = before.get((task.key, 0)), after.get((task.key, 0))
        if old and new and not old.stop.ours and not old.success and new.success:
            return task, True
    return tasks[0], False


def comparison(cfg: Demo, width: int) -> str:
    """What GRPO changed: one sentence, and one conversation before and after it."""
    before, after = (report.read_episodes(folder(cfg) / f"eval-{stage}") for stage in ("rft", "grpo"))
    task, found = choose(tasks_in_turn(cfg), before, after)
    caption = f"Test task {task.domain}/{task.id}, before and after GRPO. "
    if found:
        caption += "Chosen as the first one, families in turn, whose first trial failed before and succeeded after."
    else:
        caption += "It is the first one: there is none whose first trial failed before and succeeded after."
    old, new = before[task.key, 0], after[task.key, 0]
    shown = report.side_by_side(old, new, ("after RFT, before GRPO", "after GRPO"), width)
    changed = report.changes(list(before.values()), list(after.values()))
    return f"From RFT to GRPO: {changed}\n\n{caption}\n\n{shown}"


def main(argv: list[str]) -> None:
    start = time.perf_counter()
    cfg = cli.parse(Demo, "make demo", "base, SFT, RFT and GRPO on one CPU.", argv)
    out = folder(cfg)
    claim_for(MARKER, out, identity(cfg, "out"), cfg.resume)
    rows = pipeline(cfg)
    stages = ("sft", "rft", "grpo")
    curves = {stage: metrics_of(out / stage / "metrics.jsonl") for stage in stages}
    picture.draw(out / "learning.png", rows, curves)
    print(f"\n{report.table(rows)}\n")
    print(f"{comparison(cfg, width=min(140, shutil.get_terminal_size((120, 24)).columns))}\n")
    write_json(out / "results.json", rows)  # last: it says that the demo is done
    print(f"{out / 'results.json'} and {out / 'learning.png'} are written; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    sys.exit(run_script("make demo", main, sys.argv[1:], resume="the same command goes on where it was"))
