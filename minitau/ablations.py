"""What the ablations compare, and what may be said of a comparison.

Every setting is the demo's GRPO but for what stands here. Nothing in this file runs anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minitau.report import interval, percent

DEFAULT = "default"
ENOUGH = 3  # seeds; of fewer nothing is said
ROUND = "--engine-round 3"  # a drift as between engines in bf16 or 8 bits and their trainers
UNCORRECTED = "--importance-cap 0 --sequence-low 0 --sequence-high 1e9"


@dataclass(frozen=True)
class Setting:
    """One row: GRPO runs of several seeds that differ from another row's in one thing."""

    group: str  # what --only calls it, together with its like
    name: str  # of its folder
    label: str
    flags: str = ""  # beside those of the demo's GRPO
    against: str = DEFAULT  # the setting that it is compared with
    start: str = "rft"  # where its model comes from: the given rft or sft, or a pipeline in a dialect of its own
    dialect: str = "native"
    note: str = ""


SETTINGS = (
    Setting("default", DEFAULT, "the default"),
    Setting("shaping", "shaping-none", "shaping: none", "--shaping none"),
    Setting("shaping", "shaping-additive", "shaping: additive", "--shaping additive"),
    Setting("group-std", "no-group-std", "group's standard deviation: off", "--no-divide-by-std"),
    Setting("curriculum", "no-curriculum", "curriculum: off", "--no-curriculum"),
    Setting("dynamic-sampling", "no-dynamic-sampling", "dynamic sampling: off", "--no-dynamic-sampling"),
    Setting("aggregation", "sequence-mean", "aggregation: sequence-mean", "--aggregation sequence-mean"),
    Setting("aggregation", "dr-grpo", "aggregation: dr-grpo", "--aggregation dr-grpo"),
    Setting("group-size", "group-size-4", "groups of 4", "--group-size 4 --tasks-per-step 16"),
    Setting("group-size", "group-size-16", "groups of 16", "--group-size 16 --tasks-per-step 4"),
    Setting("importance", "rounded", "rounded engine, corrected", ROUND),
    Setting(
        "importance",
        "rounded-uncorrected",
        "rounded engine, not corrected",
        f"{ROUND} {UNCORRECTED}",
        against="rounded",
    ),
    Setting(
        "dialect",
        "single-call",
        "dialect: single-call",
        start="single-call",
        dialect="single-call",
        note="has an SFT and an RFT of its own, made once: what chance did to them counts here as the dialect's, and "
        "so does that the base model in the repository has met native calls only",
    ),
    Setting(
        "rft",
        "no-rft",
        "SFT, then GRPO",
        start="sft",
        note="starts from the model that RFT started from, and plays RFT's episodes in addition",
    ),
)
GROUPS = tuple(dict.fromkeys(setting.group for setting in SETTINGS))


def by_name(name: str) -> Setting:
    return next(setting for setting in SETTINGS if setting.name == name)


# -- what may be said --------------------------------------------------------------------------------------


def sentence(reference: str, change: Mapping[str, Any] | None) -> str:
    """What a difference (see pooled.gain) to `reference` shows, and no more.

    A difference is claimed only if its interval, which is over tasks, lies on one side of 0, and every seed by itself
    does as well: the interval does not know how much seeds differ.
    """
    if not change or not change["seeds"]:
        return f"Not compared: there is no seed that {reference} has as well."
    n = len(change["seeds"])
    if n < ENOUGH:
        return f"Nothing can be said yet: {n} of {ENOUGH} seeds."
    low, high = change["ci95"]
    if low <= 0 <= high:
        return (
            f"No difference to {reference} that {n} seeds show; "
            f"it may be up to {percent(abs(low))} points worse or {percent(high)} better."
        )
    better = low > 0
    if not all(value > 0 if better else value < 0 for value in change["by_seed"].values()):
        side = "above" if better else "below"
        return f"No difference to {reference} that {n} seeds show; the interval lies {side} 0, but the seeds disagree."
    word, size = ("Better", (low, high)) if better else ("Worse", (-high, -low))
    return f"{word} than {reference} by {' to '.join(map(percent, size))} points, and in each of {n} seeds."


# -- the table ---------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Mapping[str, Any]], command: str) -> str:
    """The rows (see ablate.row) as a table, under what must be known to read it."""
    head = ["setting", "flags", "pass@1 [95%]", "by seed", "episodes", "difference [95%]", "commit", "what it shows"]
    lines = [head, ["---"] * len(head)]
    lines += [cells(row) for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = [f"* *{row['label']}* {by_name(row['setting']).note}." for row in rows if by_name(row["setting"]).note]
    drifts = [f"{row['label']} {row['drift']:.2g}" for row in rows if row["group"] in ("default", "importance")]
    if drifts:
        notes.append(f"* Mean drift between engine and trainer, in nats a token: {', '.join(drifts)}.")
    return "\n\n".join([caption(rows), f"`{command}`", table, "\n".join(notes)]).rstrip() + "\n"


def cells(row: Mapping[str, Any]) -> list[str]:
    change = row["difference"]
    shown = "" if change is None else f"{100 * change['gain']:+.1f} [{interval(change['ci95'])}]"
    return [
        row["label"],
        f"`{row['flags']}`" if row["flags"] else "",
        f"{percent(row['pass@1'])} [{interval(row['ci95'])}]",
        " ".join(f"{seed}: {percent(value)}" for seed, value in row["by_seed"].items()),
        "..".join(map(str, sorted({min(row["episodes"].values()), max(row["episodes"].values())}))),
        shown,
        ", ".join(row["commits"]),
        row["sentence"],
    ]


def caption(rows: Sequence[Mapping[str, Any]]) -> str:
    tasks, trials = ("..".join(map(str, sorted({row[name] for row in rows}))) for name in ("tasks", "trials"))
    return (
        f"pass@1 in percent on {tasks} held-out tasks, {trials} trials each at temperature 1, over all seeds; "
        "intervals by bootstrap over tasks. Episodes are those that a seed's run played; it ends after the step that "
        "reaches its budget. A difference is in points, task by task over the seeds that both have, to the default "
        "or to the row that is named. Its interval knows tasks and not seeds, so better or worse is said only if each "
        "seed by itself shows it too; and of twenty rows in which nothing differs, about one has an interval without 0."
    )
