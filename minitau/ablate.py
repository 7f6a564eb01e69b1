"""Does a setting do what its name says? GRPO on courier from one model, one setting changed at a time, several seeds.

    python -m minitau.ablate --model outputs/demo/rft/model --seeds 0,1,2 --jobs 8 --out outputs/ablate

Every run, and every evaluation of one, is a command of its own with a log in OUT/logs. What is finished is not done
twice; what was interrupted goes on where it was. --only and --seeds split the work; commands know OUT's paths relative
to it, so that it may be copied to another machine and back. OUT/results.json and OUT/table.md hold what OUT has.
"""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitau import cli, demo, parts, report
from minitau.ablations import DEFAULT, GROUPS, SETTINGS, Setting, by_name, markdown, sentence
from minitau.claim import claim_for
from minitau.config import setting
from minitau.episode import BadInput, Trajectory
from minitau.files import write_json
from minitau.log import metrics_of
from minitau.parts import ROOT, Part
from minitau.pooled import episodes_played, gain, pooled
from minitau.script import run_script

MARKER = ".minitau-ablate"
OWN = demo.Demo()  # sizes and seed of a pipeline that has to be made
# About how long one core takes: seconds of an episode in training and in evaluation; of SFT and RFT in all.
TRAIN, EVALUATE, PIPELINE = 0.11, 0.06, 700.0
TEST_TASKS = 64  # of a domain


@dataclass(frozen=True, kw_only=True)
class Ablations:
    """GRPO with one setting changed at a time."""

    model: str = setting("", "the RFT model that runs start from, in its run's folder: of a demo, OUT/rft/model")
    sft: str = setting("", "for rft: the SFT model that RFT started from; of a demo, it is found")
    base: str = setting("models/base", "for dialect: what its own SFT starts from, relative to the repository")
    out: str = setting("outputs/ablate", "folder of all of it")
    seeds: tuple[str, ...] = setting(("0", "1", "2"), "comma-separated; more may be added later")
    only: tuple[str, ...] = setting(GROUPS, "which settings to run, by group")
    jobs: int = setting(1, "commands at once; each gets its share of the cores")
    episodes: int = setting(3840, "training episodes of a run, the same for all; 40 steps of the demo play as many")
    tasks: int = setting(0, "test tasks a domain in each evaluation, four trials each; 0 is all")
    plan: bool = setting(False, "only show what would be run, and about how long it would take")


# -- where runs start ----------------------------------------------------------------------------------------


def chosen(cfg: Ablations) -> list[Setting]:
    return [each for each in SETTINGS if each.group in cfg.only]


def sources(cfg: Ablations) -> dict[str, tuple[Path, str]]:
    """What must be copied into OUT/start, by its place there: from where, and the flag that says so."""
    rft = Path(cfg.model).resolve()
    sft = Path(cfg.sft).resolve() if cfg.sft else rft.parent.parent / "sft" / "model"
    starts = {each.start for each in chosen(cfg)}
    wanted = {"rft/model": (rft, "--model")}
    if "sft" in starts:
        wanted["sft/model"] = (sft, "--sft, or leave rft out of --only")
    if "single-call" in starts:
        wanted["base"] = (ROOT / cfg.base, "--base, or leave dialect out of --only")
    return wanted


def budget(cfg: Ablations, one: Setting) -> int:
    """Training episodes of each of a setting's runs. Raises BadInput if RFT's are not known."""
    if one.start != "sft":
        return cfg.episodes
    rft = Path(cfg.model).resolve().parent
    if not (played := episodes_played(rft)):
        demo.weights(Path(cfg.model).resolve(), "--model")  # first of all there must be a model
        raise BadInput(
            f"{rft} holds no metrics.jsonl of an RFT run, whose episodes no-rft gets; leave rft out of --only"
        )
    return cfg.episodes + played


def prepare(cfg: Ablations, out: Path) -> None:
    """Claim OUT and copy into it what runs start from. Raises BadInput if it holds other models or settings."""
    found = {place: demo.weights(*source) for place, source in sources(cfg).items()}  # before anything is written
    sizes = {"episodes": cfg.episodes, "tasks": cfg.tasks, "flags": demo.FLAGS}
    claim_for(MARKER, out, json.loads(json.dumps(sizes)), resume=True)
    for place, hashes in found.items():
        source, target = sources(cfg)[place][0], out / "start" / place
        if target.is_dir():
            if demo.weights(target, "--out") != hashes:
                raise BadInput(f"{out} was begun with another {place} than {source}; choose another --out")
            continue
        scratch = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(source, scratch)
        scratch.rename(target)  # whole or not at all
    metrics = Path(cfg.model).resolve().parent / "metrics.jsonl"
    copy = out / "start" / "rft" / "metrics.jsonl"
    if metrics.is_file() and not copy.is_file():
        shutil.copyfile(metrics, copy)  # so that OUT/start/rft/model is as good a --model as the one given


# -- what is run ---------------------------------------------------------------------------------------------


def all_parts(cfg: Ablations, out: Path) -> list[Part]:
    """Every command of the chosen settings and seeds, in order."""
    settings = chosen(cfg)
    found = single_call(out) if any(each.start == "single-call" for each in settings) else []
    for each in settings:
        for seed in cfg.seeds:
            found += run_parts(cfg, out, each, seed)
    return found


def model_of(one: Setting) -> Path:
    """What a setting's runs start from, in OUT."""
    place = {"rft": "rft/model", "sft": "sft/model", "single-call": "single-call/rft/model"}[one.start]
    return Path("start") / place


def run_parts(cfg: Ablations, out: Path, one: Setting, seed: str) -> list[Part]:
    """A run and its evaluation."""
    place, model, number = Path(one.name) / f"seed-{seed}", model_of(one), str(budget(cfg, one))
    dialect = () if one.dialect == "native" else ("--dialect", one.dialect)
    # Every step plays something, so that as many steps are enough to use up the budget.
    size = ("--steps", number, "--episodes", number, "--keep", "1")
    train = demo.train_flags("grpo", model, place / "run", seed, *size, *dialect, *one.flags.split())
    trained = place / "run" / "model"
    evaluate = demo.eval_flags(one.name, place / "eval", cfg.tasks, seed, "--model", str(trained), *dialect)
    proof = out / trained / "config.json"
    return [
        Part(seed, one.name, ("-m", "train", *train), proof, needs=(out / model / "config.json",)),
        Part(
            seed, f"{one.name}-eval", ("-m", "eval", *evaluate), out / place / "eval" / "results.json", needs=(proof,)
        ),
    ]


def single_call(out: Path) -> list[Part]:
    """Demonstrations, SFT and RFT as the demo makes them, in the single-call dialect."""
    place, dialect = Path("start") / "single-call", ("--dialect", "single-call")
    data, sft, rft = place / "demonstrations.jsonl", place / "sft", place / "rft"
    source = ("--agent", "flawed", "--tasks", str(OWN.demonstrations), "--seed", str(OWN.seed), "--out", str(data))
    learn = ("--data", str(data), "--epochs", str(OWN.sft_epochs), *dialect)
    sample = ("--tasks", str(OWN.rft_tasks), *dialect)
    proofs = [out / data, *(out / run / "model" / "config.json" for run in (sft, rft))]
    commands = [
        ("-m", "minitau.sft", *source),
        ("-m", "train", *demo.train_flags("sft", Path("start") / "base", sft, OWN.seed, *learn)),
        ("-m", "train", *demo.train_flags("rft", sft / "model", rft, OWN.seed, *sample)),
    ]
    names = [f"single-call-{what}" for what in ("demonstrations", "sft", "rft")]
    needs = [(), *((proof,) for proof in proofs[:-1])]
    return [Part("", *each) for each in zip(names, commands, proofs, needs)]


def plan(cfg: Ablations, out: Path) -> str:
    """Every command that is not done, and about how long they take."""
    todo = [part for part in all_parts(cfg, out) if not part.proof.is_file()]
    names = {part.what for part in todo}
    runs = [
        each for each in chosen(cfg) for seed in cfg.seeds if not run_parts(cfg, out, each, seed)[0].proof.is_file()
    ]
    tasks = min(cfg.tasks or TEST_TASKS, TEST_TASKS) * 3
    evaluations = sum(part.what.endswith("-eval") for part in todo)
    seconds = sum(TRAIN * budget(cfg, each) for each in runs) + EVALUATE * 4 * tasks * evaluations
    seconds += PIPELINE * ("single-call-rft" in names)
    lines = [f"# {part}\npython {shlex.join(part.command)}" for part in todo]
    total = len(chosen(cfg)) * len(cfg.seeds)
    lines.append(
        f"In {out}, with PYTHONPATH={ROOT}: {len(todo)} commands, {len(runs)} of {total} GRPO runs among them; some "
        f"{seconds / 3600:.1f} hours of one core."
    )
    return "\n\n".join(lines)


# -- what came of it -----------------------------------------------------------------------------------------


def summary(out: Path) -> list[dict[str, Any]]:
    """A row of each setting that has a finished evaluation in OUT, of whatever seeds. Raises BadInput if none has."""
    played = {each.name: evaluated(out / each.name) for each in SETTINGS}
    rows = [row(out, each, played) for each in SETTINGS if played[each.name]]
    if not rows:
        raise BadInput(f"nothing in {out} is finished")
    return rows


def evaluated(folder: Path) -> dict[str, list[Trajectory]]:
    """The episodes of a setting's finished evaluations, by seed."""
    done = {
        path.parent.parent.name.removeprefix("seed-"): path.parent for path in folder.glob("seed-*/eval/results.json")
    }
    return {seed: list(report.read_episodes(done[seed]).values()) for seed in sorted(done, key=int)}


def row(out: Path, one: Setting, played: dict[str, dict[str, list[Trajectory]]]) -> dict[str, Any]:
    """pass@1 and what goes with it (see pooled.pooled), the difference to another setting (see pooled.gain), what the
    runs played and how far their engine drifted, by which commits; and what all that shows."""
    by_seed = played[one.name]
    whole = pooled(one.name, by_seed)[-1]
    other = by_name(one.against)
    change = None
    if one.name != one.against and by_seed.keys() & played[other.name].keys():
        change = gain(played[other.name], by_seed, other.name)
    runs = {seed: out / one.name / f"seed-{seed}" / "run" for seed in by_seed}
    logs = [out / "logs" / f"seed-{seed}-{what}.txt" for seed in by_seed for what in (one.name, f"{one.name}-eval")]
    reference = other.label if other.name == DEFAULT else f'"{other.label}"'
    return {
        "setting": one.name,
        "group": one.group,
        "label": one.label,
        "flags": one.flags or (f"--dialect {one.dialect}" if one.dialect != "native" else ""),
        **{name: whole[name] for name in ("tasks", "trials", "pass@1", "ci95", "by_seed", "errors")},
        "episodes": {seed: episodes_played(run) for seed, run in runs.items()},
        "drift": statistics.fmean(drift for run in runs.values() for drift in drifts(run)),
        "commits": list(dict.fromkeys(name for log in logs for name in parts.commits(log))),
        "difference": change,
        "sentence": "What others are compared with." if one.name == DEFAULT else sentence(reference, change),
    }


def drifts(run: Path) -> list[float]:
    """Mean |engine's - trainer's log-probability| of each step; of one in which all episodes broke there is none."""
    lines = metrics_of(run / "metrics.jsonl")
    return [line["drift"] for line in lines if line.get("drift") is not None] or [0.0]


def check(cfg: Ablations) -> None:
    """Raise BadInput for settings that cannot work."""
    parts.check(cfg.seeds, cfg.jobs)
    if not cfg.model:
        raise BadInput("--model is needed: the RFT model that runs start from, as outputs/demo/rft/model")
    if unknown := [name for name in cfg.only if name not in GROUPS]:
        raise BadInput(f"--only {','.join(unknown)}: there is no such group; there are {', '.join(GROUPS)}")
    if cfg.episodes < 1:
        raise BadInput(f"--episodes is {cfg.episodes}; it must be at least 1")


def main(argv: Sequence[str]) -> None:
    cfg = cli.parse(Ablations, "minitau.ablate", "GRPO with one setting changed at a time.", list(argv))
    check(cfg)
    out = Path(cfg.out).resolve()
    commands = all_parts(cfg, out)  # says what is missing before anything is written
    if cfg.plan:
        return print(plan(cfg, out))
    prepare(cfg, out)
    failed = parts.play(commands, out / "logs", cfg.jobs, cwd=out)
    parts.require_something(commands, failed, out / "logs")
    rows = summary(out)
    seeds = ",".join(dict.fromkeys(seed for each in rows for seed in each["by_seed"]))
    sizes = f"--episodes {cfg.episodes} --tasks {cfg.tasks}"
    command = f"python -m minitau.ablate --model MODEL --seeds {seeds} {sizes} --out OUT"
    text = markdown(rows, command)
    write_json(out / "results.json", {"command": command, "rows": rows})
    (out / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{out / 'results.json'} and {out / 'table.md'} are written")
    if failed:
        raise BadInput(f"not all is done ({'; '.join(map(str, failed))} failed); the same command goes on")


if __name__ == "__main__":
    sys.exit(run_script("minitau.ablate", main, sys.argv[1:], resume="the same command goes on where it was"))
