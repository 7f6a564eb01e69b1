"""What a person reads: tables, two conversations side by side, one sentence.

All of it is made of what runs left on disk: results rows, metrics lines, episodes. Nothing here plays
or trains anything.
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from minitau.config import SCRIPTED
from minitau.episode import BadInput, Check, Message, Stop, Trajectory
from minitau.files import numbered_lines

# -- episodes on disk ----------------------------------------------------------------------------------


def read_episodes(folder: Path) -> dict[tuple[str, int], Trajectory]:
    """An evaluation's episodes by (task key, trial). A line that was cut by a crash is not one.

    One that broke on our side is played again by a resumed evaluation; then its second line counts.
    Raises BadInput if a line is no episode.
    """
    advice = "remove the line, and --resume plays it again"
    episodes = [t for path in sorted(folder.glob("episodes-*.jsonl")) for t in episodes_of(path, advice)]
    broken_first = sorted(episodes, key=lambda t: not t.stop.ours)
    return {(t.task.key, t.sample): t for t in broken_first}


def by_domain(played: Sequence[Trajectory]) -> list[tuple[str, list[Trajectory]]]:
    """The episodes of each domain, and of "all" where there is more than one."""
    domains = sorted({t.task.domain for t in played})
    each = [(domain, [t for t in played if t.task.domain == domain]) for domain in domains]
    return [*each, ("all", list(played))] if len(domains) > 1 else each


def tallies(played: Sequence[Trajectory]) -> dict[str, tuple[int, int]]:
    """(trials, successes) of each task that has a verdict; what broke on our side is no trial."""
    found: dict[str, tuple[int, int]] = {}
    for t in played:
        if not t.stop.ours:
            n, c = found.get(t.task.key, (0, 0))
            found[t.task.key] = (n + 1, c + t.success)
    return found


def episodes_of(path: Path, advice: str) -> list[Trajectory]:
    """Those of one file. Raises BadInput, with the number of the line and `advice`, if one is none."""
    found = []
    for number, line in numbered_lines(path):
        try:
            found.append(Trajectory.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = f"{type(error).__name__}: {error}"
            raise BadInput(f"{path}, line {number}: no episode ({why}); {advice}") from None
    return found


# -- tables --------------------------------------------------------------------------------------------


WIDTH = 120  # columns of a table; how episodes ended goes on below where it needs more


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned text, in percent, under lines that say what was evaluated and how to read it."""
    n = max(r["trials"] for r in rows)
    shown = ["pass@1", f"pass@{n}", f"pass^{n}"] if n > 1 else ["pass@1"]
    broken = any(r["errors"] for r in rows)
    lines = [["stage", "domain", "tasks", *shown, *(["broken"] if broken else []), "ended by"]]
    for r in rows:
        count = [f"{r['errors']}/{r['episodes']}"] if broken else []
        lines.append([r["stage"], r["domain"], task_counts(r, n), *(score(r, name) for name in shown), *count, ""])
    room = max(30, WIDTH - columns(aligned(lines).split("\n")[0]) + len("ended by"))
    whole = [lines[0]]
    for line, r in zip(lines[1:], rows):
        first, *more = stop_lines(r["stops"], room)
        whole += [[*line[:-1], first], *([""] * (len(line) - 1) + [rest] for rest in more)]
    return f"{caption(rows, n)}\n\n{aligned(whole)}"


def every_k(rows: Sequence[dict[str, Any]]) -> str:
    """pass@k and pass^k of one agent for each k, a domain two lines; and over how many tasks, where not over all that
    have a verdict: such a column cannot be held against others."""
    ks = range(1, rows[0]["trials"] + 1)

    def cell(row: dict[str, Any], sign: str, k: int) -> str:
        count = row["tasks_by_k"][str(k)]
        return score(row, f"pass{sign}{k}") + (f" of {count}" if 0 < count < row["tasks"] else "")

    lines = [[rows[0]["stage"], "", *(f"k={k}" for k in ks)]]
    lines += [[r["domain"], f"pass{sign}k", *(cell(r, sign, k) for k in ks)] for r in rows for sign in "@^"]
    fewer = any(0 < r["tasks_by_k"][str(k)] < r["tasks"] for r in rows for k in ks)
    note = "\nof N: over the N tasks with k trials that did not break on our side; other columns are of other tasks."
    return aligned(lines) + (note if fewer else "")


def caption(rows: Sequence[dict[str, Any]], n: int) -> str:
    """What the rows have in common, and how to read them."""

    def common(name: str, of: Sequence[dict[str, Any]]) -> str:
        values = {str(r[name]) for r in of}
        return values.pop() if len(values) == 1 else ""

    models = [r for r in rows if r["model"]]
    what = [f"{common('env', rows)}, split {common('split', rows)}, {n} trials a task, seed {common('seed', rows)}"]
    if model := common("model", models):
        what.append(f"policy {model}")
    if temperature := common("temperature", models):
        what.append("greedy" if float(temperature) == 0 else f"temperature {float(temperature):g}")
    if customer := common("user_model", models):
        sampled = f" at temperature {common('user_temperature', models)}" if customer != SCRIPTED else ""
        what.append(f"customer {customer}{sampled}")
    how = ["Percent [95% interval by bootstrap over tasks]; a domain's score is the mean over its tasks"]
    if any(r["domain"] == "all" for r in rows):
        how.append("all: the mean over all tasks")
    if n > 1:
        how.append(f"pass@{n}: one of {n} trials succeeds, pass^{n}: all {n} do")
    wrapped = [line for text in (", ".join(what), "; ".join(how)) for line in textwrap.wrap(f"{text}.", WIDTH)]
    return "\n".join(wrapped)


def task_counts(row: dict[str, Any], n: int) -> str:
    """How many tasks count, of how many, and for pass@n and pass^n where that is another number."""
    tasks, played, full = row["tasks"], row["tasks_played"], row["tasks_by_k"][str(n)]
    text = str(tasks) if tasks == played else f"{tasks} of {played}"
    return text if full == tasks else f"{text}, k={n}: {full}"


def score(row: dict[str, Any], name: str) -> str:
    """45.8 [35,57]; a dash where no task had trials enough."""
    if row.get(name) is None:
        return "-"
    low, high = row["intervals"][name]
    return f"{percent(row[name])} [{100 * low:.0f},{100 * high:.0f}]"


def stop_lines(stops: dict[str, int], room: int) -> list[str]:
    """Each reason to stop with its share of the episodes, most frequent first, in lines of `room` columns."""
    total = sum(stops.values())
    ranked = sorted(stops.items(), key=lambda item: (-item[1], item[0]))
    shares = [f"{name}\u00a0{100 * count / total:.0f}%" for name, count in ranked]  # no line ends inside of one
    return [line.replace("\u00a0", " ") for line in textwrap.wrap(", ".join(shares), room)] or [""]


def pooled_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of several seeds together (see study.pooled) as aligned text, in percent."""
    n = max(r["trials"] for r in rows)
    head = ["stage", "domain", "tasks", "episodes", "pass@1", "95% of pass@1", "by seed", f"pass@{n}", f"pass^{n}"]
    lines = [head]
    for r in rows:
        seeds = " ".join(f"{seed}:{percent(value)}" for seed, value in r["by_seed"].items())
        scores = [percent(r["pass@1"]), interval(r["ci95"]), seeds, percent(r[f"pass@{n}"]), percent(r[f"pass^{n}"])]
        lines.append([r["stage"], r["domain"], str(r["tasks"]), str(r["episodes"]), *scores])
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def interval(ends: Sequence[float]) -> str:
    return "..".join(percent(end) for end in ends)


# -- what changed, in one sentence ----------------------------------------------------------------------

# A rate is named if it moved by more standard errors than this. About twenty rates are looked at
# together: at two standard errors, one of them would seem to move where nothing did.
NOISE = 3.0
CHECKS_NAMED, STOPS_NAMED = 4, 3
Rates = dict[tuple[str, str], dict[str, list[bool]]]  # (check or stop, its name) -> task key -> outcomes


def changes(before: Sequence[Trajectory], after: Sequence[Trajectory]) -> str:
    """One sentence: the checks whose pass rate moved most, and the reasons to stop whose share did.

    Both are evaluations of the same tasks; what broke on our side is left out. A rate is the mean over
    tasks of each task's own rate. It has moved if the mean of the tasks' differences is more than
    NOISE of its standard errors: trials of one task resemble each other, so tasks are what is counted.
    """
    rates = outcomes(before), outcomes(after)
    moved = {key: move for key in rates[0].keys() & rates[1].keys() if (move := moves(*(r[key] for r in rates)))}
    largest = sorted(moved, key=lambda key: (-abs(moved[key][1] - moved[key][0]), key))
    checks = [key for key in largest if key[0] == "check"][:CHECKS_NAMED]
    stops = [key for key in largest if key[0] == "stop"][:STOPS_NAMED]

    def up(keys: Sequence[tuple[str, str]], wanted: bool) -> str:
        chosen = [key for key in keys if (moved[key][1] > moved[key][0]) == wanted]
        return ", ".join(f"{key[1]} ({moved[key][0]:.0%} to {moved[key][1]:.0%})" for key in chosen)

    parts = [
        f"{what} {names}"
        for what, names in (
            ("more often right:", up(checks, True)),
            ("less often right:", up(checks, False)),
            ("more episodes ended by", up(stops, True)),
            ("fewer episodes ended by", up(stops, False)),
        )
        if names
    ]
    tasks = len({t.task for t in before} & {t.task for t in after})
    rule = f"{NOISE:g} standard errors of the difference over {tasks} tasks"
    if not parts:
        return f"No check's pass rate and no reason to stop moved by more than {rule}."
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]} (named is what moved most, and by more than {rule})."


def outcomes(played: Sequence[Trajectory]) -> Rates:
    """What each episode with a verdict did, by check and by reason to stop."""
    rates: Rates = {("stop", stop.value): {} for stop in Stop if not stop.ours}
    for t in played:
        if t.stop.ours:
            continue
        for stop in Stop:
            if not stop.ours:
                rates["stop", stop.value].setdefault(t.task.key, []).append(t.stop == stop)
        for check in t.evaluation.checks if t.evaluation else ():
            rates.setdefault(("check", group_of(check)), {}).setdefault(t.task.key, []).append(check.passed)
    return rates


def group_of(check: Check) -> str:
    """The name under which a check is counted together with its like in other tasks."""
    match check.kind:
        case "action":
            return f"calling {check.name.partition('(')[0]}"
        case "communicate":
            return "saying what had to be said"
        case _:
            return f"{check.kind}: {check.name}"


def moves(before: dict[str, list[bool]], after: dict[str, list[bool]]) -> tuple[float, float] | None:
    """The two rates over the tasks that both have, if they differ by more than noise; else None."""
    tasks = before.keys() & after.keys()
    if not tasks:
        return None
    pairs = [(statistics.fmean(before[task]), statistics.fmean(after[task])) for task in sorted(tasks)]
    # One imaginary task that did not move: a few tasks that all moved alike would else seem free of noise.
    differences = [0.0, *(new - old for old, new in pairs)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    if abs(statistics.fmean(differences)) <= NOISE * error:
        return None
    return statistics.fmean(old for old, _ in pairs), statistics.fmean(new for _, new in pairs)


# -- two conversations -----------------------------------------------------------------------------------

NARROW = 80  # a terminal with fewer columns shows two conversations one under the other
BAR = " | "
LABEL = 10  # columns of the speaker's name


def side_by_side(
    before: Trajectory, after: Trajectory, titles: tuple[str, str], width: int = 120, most: int = 0
) -> str:
    """Two episodes as two columns of text, `width` columns in all; one under the other if that is narrow.

    Above each stand its title, reward and stop, below it the checks that failed. The policy is left out.
    `most`: letters shown of one message, 0 for all.
    """
    one_column = width < NARROW
    column = max(LABEL + 10, width if one_column else (width - len(BAR)) // 2)
    left, right = (parts(t, title, column, most) for t, title in zip((before, after), titles))
    if one_column:
        return "\n".join(line for part in (*left, [""], *right) for line in part)
    rows = [row for both in zip(left, right) for row in zip_longest(*both, fillvalue="")]
    return "\n".join(f"{a}{' ' * (column - columns(a))}{BAR}{b}".rstrip() for a, b in rows)


def parts(t: Trajectory, title: str, column: int, most: int = 0) -> list[list[str]]:
    """Head, conversation and foot of an episode, each as lines of at most `column` columns."""
    stop = t.stop.value if t.stop else "nothing"
    head = [*wrap(title, column), *wrap(f"reward {t.reward:.2f}, ended by {stop}", column), "-" * column]
    body = []
    for label, text in spoken(t):
        body += labelled(label, text, column, most)
    return [head, body, ["-" * column, *(line for text in verdict(t) for line in wrap(text, column))]]


def labelled(label: str, text: str, column: int, most: int = 0) -> list[str]:
    """What one speaker said, as lines of at most `column` columns with its name before the first."""
    lines = wrap(shortened(text, most), column - LABEL)
    return [f"{label.ljust(LABEL)}{lines[0]}", *(" " * LABEL + line for line in lines[1:])]


def shortened(text: str, most: int) -> str:
    """The first `most` letters of `text`, and how many more there are; all of it if `most` is 0."""
    left = len(text) - most
    return f"{text[:most]} [... {left:,} more letters]" if most and left > 0 else text


def spoken(t: Trajectory) -> Iterator[tuple[str, str]]:
    """Who said what, in order: customer and agent, the agent's calls and their results."""
    for message in t.messages:
        yield from spoken_in(message)


def spoken_in(message: Message) -> Iterator[tuple[str, str]]:
    """The same of one message; nothing of the policy."""
    match message.role:
        case "user":
            yield "customer", message.content
        case "tool":
            yield "result", message.content
        case "assistant":
            if message.content or not message.calls:  # beside calls, text is a thought that no customer hears
                yield "thought" if message.calls else "agent", message.content or "(no words)"
            for call in message.calls:
                yield "call", f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})"


def verdict(t: Trajectory) -> list[str]:
    """What the grader found wrong, a line each."""
    if not t.evaluation:
        return [f"no verdict: {t.detail}"]
    failed = [f"failed {check.kind}: {check.name}" for check in t.evaluation.checks if not check.passed]
    return failed or ["all checks passed" if t.evaluation.checks else "nothing was checked"]


def wrap(text: str, width: int) -> list[str]:
    """`text` as lines of at most `width` columns; at least one line. A longer word is cut.

    A model or a customer wrote it, so nothing in it may steer the terminal: whatever cannot be
    printed is dropped.
    """
    lines = []
    for whole in text.splitlines() or [""]:
        line, used = "", 0
        for word in "".join(c if c.isprintable() else " " if c.isspace() else "" for c in whole).split():
            if line and used + 1 + columns(word) > width:
                lines.append(line)
                line, used = "", 0
            if line:
                line, used = f"{line} ", used + 1
            for c in word:
                if used + columns(c) > width:
                    lines.append(line)
                    line, used = "", 0
                line, used = line + c, used + columns(c)
        lines.append(line)
    return lines


def columns(text: str) -> int:
    """How many columns of a terminal `text` takes: East Asian letters and most emoji take two, accents none."""
    accents = ("Mn", "Me")
    wide = ("W", "F")
    return sum(
        0 if unicodedata.category(c) in accents else 2 if unicodedata.east_asian_width(c) in wide else 1 for c in text
    )
