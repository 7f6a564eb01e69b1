"""Look at a run's episodes: a list, one as a conversation, two side by side, or all of them as one page.

    python -m minitau.view RUN                                  every episode, a line each
    python -m minitau.view RUN --reward '<1' --sort tokens      those wanted, in the order wanted
    python -m minitau.view RUN --show 12 --each-token           one, down to the tokens
    python -m minitau.view RUN --show 12,15                     two attempts beside each other
    python -m minitau.view RUN --html FILE                      all of that in a browser

RUN is the folder of a GRPO run, of an RFT run or of an evaluation. Nothing in it is changed.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitau import catalogue, cli, page, report
from minitau.catalogue import COLUMNS, TEXTS, Entry, Record, Token, Words
from minitau.config import setting
from minitau.episode import BadInput, Turn
from minitau.script import run_script

MOST = 2000  # letters shown of one message, unless all are asked for
WIDEST = 160  # columns; longer lines are hard to read
TEXT_WIDTH = 40  # of a text in the list
FORMS = {"reward": ".2f", "advantage": "+.2f"}  # of its numbers that are not what they look like in JSON
COLOURS = {"customer": 36, "agent": 1, "thought": 2, "call": 33, "result": 2, "passed": 32, "failed": 31, "token": 2}


@dataclass(frozen=True, kw_only=True)
class View:
    """What to look at, and how. A number is given as 3, '<1', '>=2' or 2..5, a text as a part of it or '!part'."""

    step: str = setting("", "only episodes of these steps (of RFT: rounds)")
    domain: str = setting("", "only of this domain")
    task: str = setting("", "only of the tasks with this in their id")
    attempt: str = setting("", "only these attempts")
    reward: str = setting("", "only with such a reward; an episode without a verdict has none")
    advantage: str = setting("", "only with such an advantage")
    stop: str = setting("", "only those that ended so")
    turns: str = setting("", "only with so many replies of the agent")
    tokens: str = setting("", "only with so many tokens")
    sort: str = setting("", "list by this column", COLUMNS)
    descending: bool = setting(False, "the largest first; without --sort the latest first")
    limit: int = setting(500, "episodes listed, or written to a page, at most; 0 is all")
    show: tuple[str, ...] = setting((), "the number of an episode to read, or of two to compare, as the list has it")
    unfold: bool = setting(False, "with one: also what the agent was given first, policy and tools")
    each_token: bool = setting(False, "with one: every sampled token and what the trainer made of it")
    full: bool = setting(False, f"do not cut messages of more than {MOST} letters")
    html: str = setting("", "write the list and its conversations to this file, as one page")
    tokenizer: str = setting("", "a model's folder, if the run's own model is gone")


# -- the list ------------------------------------------------------------------------------------------------


def list_text(title: str, shown: Sequence[Entry], found: int, total: int) -> str:
    """A table of episodes under a line that says how many there are."""
    lines = [["#", *COLUMNS], *(list_line(entry) for entry in shown)]
    widths = [max(report.columns(line[i]) for line in lines) for i in range(len(lines[0]))]
    numbers = [name not in TEXTS for name in ("#", *COLUMNS)]

    def padded(text: str, width: int, right: bool) -> str:
        space = " " * (width - report.columns(text))
        return space + text if right else text + space

    rows = ["  ".join(map(padded, line, widths, numbers)).rstrip() for line in lines]
    more = f"; {len(shown)} are shown, see --limit" if len(shown) < found else ""
    return "\n".join([f"{title}: {found} of {total} episodes{more}", "", *rows])


def list_line(entry: Entry) -> list[str]:
    return [str(entry.number), *(cell(name, getattr(entry, name)) for name in COLUMNS)]


def cell(column: str, value: str | float | None) -> str:
    if isinstance(value, str):
        first, *more = report.wrap(value, TEXT_WIDTH)
        return first + ("…" if more else "")
    if value is None:
        return "-"
    return format(value, FORMS.get(column, ".2f" if isinstance(value, float) else "d"))


def title_of(run: Path, settings: Mapping[str, Any]) -> str:
    """The run's folder, and what it says of itself."""
    names = ("stage", "env", "model", "seed")
    said = [f"{name} {settings[name]}" for name in names if settings.get(name) not in (None, "")]
    return f"{run} ({', '.join(said)})" if said else str(run)


# -- one episode ---------------------------------------------------------------------------------------------


def show(record: Record, cfg: View, words: Words, settings: Mapping[str, Any], width: int, colour: bool) -> str:
    """One episode: what it came to, its checks, and the conversation."""
    t, most = record.trajectory, 0 if cfg.full else MOST
    lines = [*report.wrap(title(record.entry), width), *report.wrap(facts(record), width)]
    for check in t.evaluation.checks if t.evaluation else ():
        label = "passed" if check.passed else "failed"
        lines += painted(report.labelled(label, f"{check.kind}: {check.name}", width, most), label, colour)
    if not t.evaluation or t.evaluation.note or not t.evaluation.checks:
        lines += report.wrap(t.evaluation.note if t.evaluation and t.evaluation.note else report.verdict(t)[0], width)
    lines.append("-" * width)
    given = catalogue.given_before(t)
    if cfg.unfold:
        text = words.together(given) or "the run's tokenizer is gone; --tokenizer MODEL names another"
        lines += [line for part in text.split("\n") for line in report.wrap(part, width)] + ["-" * width]
    elif given:
        lines += report.labelled("policy", f"folded away, with the tools {len(given)} tokens; see --unfold", width)
    replies = catalogue.tokens_by_turn(record, settings) if cfg.each_token else []
    for label, text, turn in said_in_turn(record):
        lines += painted(report.labelled(label, text, width, most), label, colour)
        if turn is not None and t.turns[turn].error:
            lines += painted(report.labelled("failed", t.turns[turn].error, width, most), "failed", colour)
        if turn is not None and replies:
            table = token_table(replies[turn], t.turns[turn], record.entry.advantage, words)
            lines += painted([" " * report.LABEL + line for line in table], "token", colour)
    return "\n".join(lines)


def said_in_turn(record: Record) -> Iterator[tuple[str, str, int | None]]:
    """Who said what, and after the last thing of each reply of the agent, which of its turns that was."""
    t = record.trajectory
    turn_of = t.turn_of()
    for i, message in enumerate(t.messages):
        said = list(report.spoken_in(message))
        for label, text in said[:-1]:
            yield label, text, None
        for label, text in said[-1:]:
            yield label, text, turn_of.get(i)


def title(entry: Entry) -> str:
    when = "" if entry.step is None else f"step {entry.step}, "
    return f"{entry.number}: {when}{entry.key}, attempt {entry.attempt}"


def facts(record: Record) -> str:
    entry, t = record.entry, record.trajectory
    reward = "no reward" if entry.reward is None else f"reward {entry.reward:.2f}"
    advantage = "" if entry.advantage is None else f"advantage {entry.advantage:+.3f}, "
    size = f"{entry.turns} turns, {entry.tokens} tokens of which it said {sum(t.said)}"
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in t.seconds.items())
    return f"{reward}, {advantage}ended by {entry.stop or 'nothing'}, {size}" + (f", {seconds}" if seconds else "")


def token_table(tokens: Sequence[Token], turn: Turn, advantage: float | None, words: Words) -> list[str]:
    """A line a token, under a head. A dash stands for what the run did not keep."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    head = f"weights of step {turn.weight_version}"
    lines = [f"{head:24} {'logprob':>9} {'advantage':>9} {'weight':>7} {'drift':>10}"]
    for token in tokens:
        text = report.wrap(repr(words.each(token.id)), 24)[0]
        text += " " * (24 - report.columns(text))
        numbers = f"{token.logprob:9.4f} {number(advantage, '+.3f'):>9} {number(token.weight, '.4f'):>7}"
        lines.append(f"{text} {numbers} {number(token.drift, '+.2e'):>10}")
    return lines


def painted(lines: Sequence[str], label: str, colour: bool) -> list[str]:
    """The lines in the colour of what they are, where the terminal has colours."""
    return [f"\x1b[{COLOURS[label]}m{line}\x1b[0m" for line in lines] if colour else list(lines)


# -- the command ---------------------------------------------------------------------------------------------


def find(entries: Sequence[Entry], number: str) -> Record:
    if not number.isdecimal() or not 1 <= int(number) <= len(entries):
        raise BadInput(f"--show {number}: the episodes here have the numbers 1 to {len(entries)}")
    return catalogue.read(entries[int(number) - 1])


def main(argv: Sequence[str]) -> None:
    run, *flags = argv if argv and not argv[0].startswith("-") else ["", *argv]
    what = "Look at a run's episodes: python -m minitau.view RUN. Flags follow the folder."
    cfg = cli.parse(View, "minitau.view", what, flags)
    if not run or not Path(run).is_dir():
        raise BadInput(f"{run}: no such folder of a run" if run else "which run? python -m minitau.view RUN")
    if cfg.limit < 0:
        raise BadInput(f"--limit is {cfg.limit}; it must be a number from 0 up")
    if len(cfg.show) > 2:
        raise BadInput("--show takes the number of one episode, or of two to compare")
    if cfg.show and cfg.html:
        raise BadInput("--show prints episodes here, --html writes them to a page: leave one out")
    if cfg.html and (Path(cfg.html).is_dir() or not Path(cfg.html).absolute().parent.is_dir()):
        raise BadInput(f"--html {cfg.html}: name a file, in a folder that is there")
    folder = Path(run)
    entries, settings = catalogue.catalogue(folder), catalogue.settings_of(folder)
    width = max(40, min(WIDEST, shutil.get_terminal_size((120, 24)).columns))
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if cfg.show:
        records = [find(entries, number) for number in cfg.show]
        if len(records) == 1:
            words = Words(folder, settings, cfg.tokenizer)
            return print(show(records[0], cfg, words, settings, width, colour))
        titles = tuple(title(record.entry) for record in records)
        pair = [record.trajectory for record in records]
        return print(report.side_by_side(*pair, titles, width, 0 if cfg.full else MOST))
    conditions = {name: getattr(cfg, name) for name in COLUMNS if hasattr(cfg, name)}
    found = catalogue.chosen(entries, conditions, cfg.sort, cfg.descending)
    shown = found[: cfg.limit] if cfg.limit else found
    if cfg.html:
        words = Words(folder, settings, cfg.tokenizer)
        size = page.write(Path(cfg.html), title_of(folder, settings), shown, words, settings)
        return print(f"{cfg.html}: {len(shown)} of {len(entries)} episodes, {size / 1e6:.1f} MB")
    print(list_text(title_of(folder, settings), shown, len(found), len(entries)))


if __name__ == "__main__":
    sys.exit(run_script("minitau.view", main, sys.argv[1:]))
