"""Does GRPO help, and is it GRPO that helps? The whole demo with several seeds, and what it must be compared with.

Every seed plays one demo. Then, from the same RFT model and with as many training episodes as its
GRPO run played: rejection fine-tuning once more, GRPO without the curriculum, and GRPO whose rewards
go to attempts drawn by lot. The first seed's GRPO is also run on two ranks. All of it is evaluated alike.

    python -m minitau.study --seeds 0,1,2 --jobs 4 --out outputs/study

Every seed's demo and every arm is a command of its own with a log in OUT/logs. What is finished is
not done twice; what was interrupted goes on where it was.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitau import cli, config, demo, parts, report, tasks
from minitau.claim import claim_for
from minitau.config import setting
from minitau.envs import open_world
from minitau.episode import BadInput, Trajectory
from minitau.files import write_json
from minitau.parts import Part
from minitau.pooled import episodes_played, gain, pooled, together
from minitau.script import run_script

MARKER = ".minitau-study"
STAGES = (*tasks.FLOORS, "base", "sft", "rft", "grpo")  # of a demo, in order
ARMS = ("more-rft", "no-curriculum", "shuffled")  # of every seed
TWO_RANKS = "two-ranks"  # of the first seed
AGAIN = 1_000_000  # what a second RFT adds to the seed: with the first one's it would sample the same once more
RFT_SAMPLES = 4  # attempts at each task, unless the training tasks are too few for the budget
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py")


@dataclass(frozen=True, kw_only=True)
class Study(demo.Sizes):
    """Demos of several seeds, and their controls."""

    out: str = setting("outputs/study", "folder of the whole study")
    seeds: tuple[str, ...] = setting(("0", "1", "2"), "comma-separated; more may be added later")
    jobs: int = setting(1, "demos and arms at once; each gets its share of the cores")
    arm: str = setting(
        "", "do this arm of the first of --seeds, here and now (a study calls itself so)", (*ARMS, TWO_RANKS)
    )


# -- one arm -----------------------------------------------------------------------------------------------


def play_arm(cfg: demo.Demo, arm: str) -> None:
    """Train one arm from the RFT model of a finished demo, and evaluate it as that demo's stages were."""
    start, out = demo.folder(cfg) / "rft" / "model", demo.folder(cfg)
    if not (out / "results.json").is_file():
        raise BadInput(f"{out} holds no finished demo, which the arm {arm} starts from")
    budget = episodes_played(out / "grpo")
    # Every step plays something, so that many steps are enough to use up the budget.
    size = ("--steps", str(budget), "--episodes", str(budget))
    match arm:
        case "more-rft":
            number, samples = spread(budget, training_tasks())
            again = dataclasses.replace(cfg, seed=cfg.seed + AGAIN)
            model = demo.train(again, arm, "rft", start, "--tasks", str(number), "--samples", str(samples))
        case "no-curriculum":
            model = demo.train(cfg, arm, "grpo", start, *size, "--no-curriculum")
        case "shuffled":
            model = demo.train(cfg, arm, "grpo", start, *size, "--shuffle-rewards")
        case _:
            model = demo.train(cfg, arm, "grpo", start, "--steps", str(cfg.steps), script=TORCHRUN)
    demo.evaluate(cfg, arm, "--model", str(model))


def spread(budget: int, available: int) -> tuple[int, int]:
    """Tasks and attempts at each, together at least `budget` episodes and as few more as can be."""
    samples = max(RFT_SAMPLES, math.ceil(budget / available))
    return max(1, math.ceil(budget / samples)), samples


def training_tasks() -> int:
    settings = config.RFT()
    return len(tasks.for_training(settings, open_world(settings)))


# -- all of them -------------------------------------------------------------------------------------------


def demo_of(cfg: Study, seed: str) -> demo.Demo:
    """The settings of one seed's demo."""
    sizes = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(demo.Sizes)}
    return demo.Demo(**{**sizes, "resume": True}, out=str(Path(cfg.out).resolve() / f"seed-{seed}"), seed=int(seed))


def demo_part(cfg: Study, seed: str) -> Part:
    one = demo_of(cfg, seed)
    command = ("-m", "minitau.demo", "--seed", seed, "--out", one.out, *size_flags(cfg))
    return Part(seed, "demo", command, Path(one.out) / "results.json")


def arm_parts(cfg: Study, seed: str) -> list[Part]:
    """What follows a seed's demo."""
    arms = (*ARMS, TWO_RANKS) if seed == cfg.seeds[0] else ARMS
    flags = ("--seeds", seed, "--out", str(Path(cfg.out).resolve()), *size_flags(cfg))
    out = Path(demo_of(cfg, seed).out)
    return [
        Part(
            seed,
            arm,
            ("-m", "minitau.study", "--arm", arm, *flags),
            proof=out / f"eval-{arm}" / "results.json",
            needs=(out / "results.json",),
            processes=2 if arm == TWO_RANKS else 1,
        )
        for arm in arms
    ]


def size_flags(cfg: Study) -> list[str]:
    names = [field.name for field in dataclasses.fields(demo.Sizes) if field.name != "resume"]
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(cfg, name)))]


# -- what came of it ---------------------------------------------------------------------------------------


def summary(cfg: Study) -> dict[str, Any]:
    """Everything that is finished, over all seeds. Raises BadInput if nothing is.

    rows: see `pooled`; sampled: training episodes of each stage after RFT, by seed; gains: what GRPO's
    pass@1 is above another stage's, over the seeds that have both; changes: report.changes.
    """
    played: dict[str, dict[str, list[Trajectory]]] = {}
    sampled: dict[str, dict[str, int]] = {}
    for stage in (*STAGES, *ARMS, TWO_RANKS):
        for seed in cfg.seeds:
            out = Path(demo_of(cfg, seed).out)
            if (out / f"eval-{stage}" / "results.json").is_file():
                played.setdefault(stage, {})[seed] = list(report.read_episodes(out / f"eval-{stage}").values())
                if stage == "grpo" or stage not in STAGES:
                    sampled.setdefault(stage, {})[seed] = episodes_played(out / stage)
    if not played:
        raise BadInput(f"nothing in {cfg.out} is finished")
    gains = [gain(played[stage], played["grpo"], stage) for stage in played if stage != "grpo" and "grpo" in played]
    changed = {
        f"{stage} to grpo": report.changes(together(played[stage]), together(played["grpo"]))
        for stage in ("sft", "rft")
        if {stage, "grpo"} <= played.keys()
    }
    rows = [row for stage, by_seed in played.items() for row in pooled(stage, by_seed)]
    return {"rows": rows, "sampled": sampled, "gains": gains, "changes": changed}


def as_text(result: dict[str, Any]) -> str:
    """The summary as a person reads it."""
    lines = [report.pooled_table(result["rows"]), ""]
    for stage, counts in result["sampled"].items():
        lines.append(f"{stage}: training episodes by seed {' '.join(f'{seed}:{n}' for seed, n in counts.items())}")
    lines.append("")
    for each in result["gains"]:
        points = f"{100 * each['gain']:+.1f} points of pass@1 ({report.interval(each['ci95'])})"
        lines.append(f"grpo over {each['over']}: {points}, seeds {' '.join(each['seeds'])}")
    lines.append("")
    lines += [f"From {name}: {sentence}" for name, sentence in result["changes"].items()]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    cfg = cli.parse(Study, "minitau.study", "Demos of several seeds, and their controls.", list(argv))
    parts.check(cfg.seeds, cfg.jobs)
    if cfg.arm:
        return play_arm(demo_of(cfg, cfg.seeds[0]), cfg.arm)
    out = Path(cfg.out).resolve()
    claim_for(MARKER, out, demo.identity(cfg, "out", "seeds", "jobs", "arm"), cfg.resume)
    demos = [demo_part(cfg, seed) for seed in cfg.seeds]
    arms = [part for seed in cfg.seeds for part in arm_parts(cfg, seed)]
    failed = parts.play([*demos, *arms], out / "logs", cfg.jobs)
    parts.require_something([*demos, *arms], failed, out / "logs")
    result = summary(cfg)
    text = as_text(result)
    write_json(out / "results.json", result)
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{out / 'results.json'} and {out / 'table.txt'} are written")
    if failed:
        raise BadInput(f"not all is done ({'; '.join(map(str, failed))} failed); the same command goes on")


if __name__ == "__main__":
    sys.exit(run_script("minitau.study", main, sys.argv[1:], resume="the same command goes on where it was"))
