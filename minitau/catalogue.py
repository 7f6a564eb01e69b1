"""Every episode that a run left on disk: which there are, which are wanted, and each one whole again.

GRPO keeps its episodes in RUN/trajectories, RFT in RUN/collected, an evaluation in RUN/episodes-*.jsonl. A run may
hold more than fits into memory, so a list keeps a few numbers of each episode and where its line begins. This file
knows files and numbers, not how anybody looks at them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitau.episode import BadInput, Trajectory

SOURCES = ("trajectories/step-*.jsonl", "collected/round-*.jsonl", "episodes-*.jsonl")


@dataclass(frozen=True)
class Entry:
    """What a list says of an episode. None where there is no such number."""

    number: int  # in the order of the files, from 1
    step: int | None  # of GRPO, or round of RFT
    domain: str
    split: str
    task: str
    attempt: int
    reward: float | None  # None without a verdict
    advantage: float | None  # None if it was not trained on
    stop: str
    turns: int
    tokens: int
    path: Path
    offset: int  # of its line in that file, in bytes

    @property
    def key(self) -> str:
        return f"{self.domain}/{self.split}/{self.task}"


@dataclass(frozen=True)
class Record:
    """An episode with what the trainer made of it."""

    entry: Entry
    trajectory: Trajectory
    old_logprobs: list[float] | None  # the trainer's, of each token said; None if it was not trained on


COLUMNS = ("step", "domain", "task", "attempt", "reward", "advantage", "stop", "turns", "tokens")
TEXTS = ("domain", "task", "stop")  # the others are numbers

# -- reading -------------------------------------------------------------------------------------------------


def catalogue(run: Path) -> list[Entry]:
    """All episodes of a run, in the order of its files. Raises BadInput if there are none."""
    files = [path for pattern in SOURCES for path in sorted(run.glob(pattern))]
    if not files:
        inside = sorted({path.relative_to(run).parts[0] for pattern in SOURCES for path in run.glob(f"*/{pattern}")})
        hint = f"; these in it do: {', '.join(inside)}" if inside else ""
        raise BadInput(f"{run} holds no episodes of GRPO, RFT or an evaluation{hint}")
    found = []
    for path in files:
        for line, offset, row in lines_of(path):
            try:
                found.append(entry_of(len(found) + 1, path, offset, row))
            except BadInput as error:
                raise BadInput(f"{path}, line {line}: {error}; remove the line to see the others") from None
    return found


def lines_of(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Each line after its number and where it begins; one that a crash cut in half, or that is being written, is
    none."""
    with open(path, "rb") as file:
        offset = 0
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n") and line.strip():
                yield number, offset, line
            offset += len(line)


def entry_of(number: int, path: Path, offset: int, line: bytes) -> Entry:
    step, advantage, _, t = read_line(path, line)
    return Entry(
        number=number,
        step=step,
        domain=t.task.domain,
        split=t.task.split,
        task=t.task.id,
        attempt=t.sample,
        reward=t.evaluation.reward if t.evaluation else None,
        advantage=advantage,
        stop=t.stop.value if t.stop else "",
        turns=len(t.turns),
        tokens=len(t.ids),
        path=path,
        offset=offset,
    )


def read_line(path: Path, line: bytes) -> tuple[int | None, float | None, list[float] | None, Trajectory]:
    """Step, advantage, the trainer's log-probabilities and the episode. Raises BadInput if it is none."""
    try:
        row = json.loads(line)
        if "trajectory" in row:
            t, step, advantage = Trajectory.from_json(row["trajectory"]), row["step"], row["advantage"]
            if not isinstance(step, int) or not isinstance(advantage, (int, float, type(None))):
                raise TypeError("step and advantage are numbers")
            return step, advantage, row.get("old_logprobs"), t
        of_round = re.fullmatch(r"round-(\d+)", path.stem)
        return int(of_round[1]) if of_round else None, None, None, Trajectory.from_json(row)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"no episode ({type(error).__name__}: {error})") from None


def read(entry: Entry) -> Record:
    with open(entry.path, "rb") as file:
        file.seek(entry.offset)
        _, _, old_logprobs, trajectory = read_line(entry.path, file.readline())
    return Record(entry, trajectory, old_logprobs)


def settings_of(run: Path) -> dict[str, Any]:
    """What the run wrote of itself; nothing if it did not."""
    path = run / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise BadInput(f"{path} is not a run's settings; remove it to see the run without them") from None
    return settings if isinstance(settings, dict) else {}


# -- choosing ------------------------------------------------------------------------------------------------

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
COMPARISON = re.compile(rf"(<=|>=|<|>|=)?\s*({NUMBER})")
RANGE = re.compile(rf"({NUMBER})?\s*\.\.\s*({NUMBER})?")
HOW = "a number, <1, >=2, or 2..5 with one end left out if you like"


def condition(column: str, text: str) -> Callable[[Any], bool]:
    """What a value of `column` must be. Of a text: to have `text` in it, or with a ! before it, not to.

    Of a number: see HOW. page/list.js reads the same words in the same way. Raises BadInput.
    """
    text = text.strip()
    if column in TEXTS:
        wanted, negated = text.removeprefix("!").strip().lower(), text.startswith("!")
        return lambda value: (wanted in value.lower()) != negated
    if (found := RANGE.fullmatch(text)) and (found[1] or found[2]):
        low, high = float(found[1] or -math.inf), float(found[2] or math.inf)
        return lambda value: value is not None and low <= value <= high
    if not (found := COMPARISON.fullmatch(text)):
        raise BadInput(f"--{column} {text!r} is not {HOW}")
    limit = float(found[2])
    match found[1]:
        case "<":
            return lambda value: value is not None and value < limit
        case "<=":
            return lambda value: value is not None and value <= limit
        case ">":
            return lambda value: value is not None and value > limit
        case ">=":
            return lambda value: value is not None and value >= limit
        case _:
            return lambda value: value is not None and value == limit


def chosen(
    entries: Sequence[Entry], conditions: Mapping[str, str], sort: str = "", descending: bool = False
) -> list[Entry]:
    """The entries that meet every condition (column -> its text), by the column `sort` if that is given.

    Entries without the number that is sorted by come last, those that are equal in the order of the files.
    """
    tests = [(column, condition(column, text)) for column, text in conditions.items() if text.strip()]
    found = [entry for entry in entries if all(test(getattr(entry, column)) for column, test in tests)]
    if not sort:
        return found[::-1] if descending else found
    without = [entry for entry in found if getattr(entry, sort) is None]
    having = [entry for entry in found if getattr(entry, sort) is not None]
    return sorted(having, key=lambda entry: getattr(entry, sort), reverse=descending) + without


# -- every token ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """One that the agent sampled. None where the run did not keep it."""

    id: int
    logprob: float  # the sampler's
    weight: float | None  # importance weight of its loss
    drift: float | None  # the trainer's log-probability minus the sampler's


def tokens_by_turn(record: Record, settings: Mapping[str, Any]) -> list[list[Token]]:
    """The tokens of each reply. `settings` are the run's: they say how weights were capped and masked."""
    t = record.trajectory
    said = [i for i, says in enumerate(t.said) if says]
    old = record.old_logprobs if record.old_logprobs and len(record.old_logprobs) == len(said) else None
    drifts = [a - t.logprobs[i] for a, i in zip(old, said)] if old else [None] * len(said)
    weights = importance_weights(old, [t.logprobs[i] for i in said], settings) if old else [None] * len(said)
    tokens = {i: Token(t.ids[i], t.logprobs[i], w, d) for i, w, d in zip(said, weights, drifts)}
    return [[tokens[i] for i in range(turn.start, turn.end) if i in tokens] for turn in t.turns]


def importance_weights(
    old: Sequence[float], rollout: Sequence[float], settings: Mapping[str, Any]
) -> list[float] | list[None]:
    """The weight of each of these tokens of one trajectory in train.grpo_loss; each None if settings do not say how."""
    if not {"importance_cap", "sequence_low", "sequence_high"} <= settings.keys():
        return [None] * len(old)
    import torch  # takes seconds, which a list of episodes need not wait for

    from minitau import grpo

    old_N, rollout_N = torch.tensor(old), torch.tensor(rollout)
    of_one = torch.zeros(len(old), dtype=torch.long)
    weights_N = grpo.sequence_mask(old_N, rollout_N, of_one, settings["sequence_low"], settings["sequence_high"])
    if settings["importance_cap"]:
        weights_N = weights_N * grpo.truncated_importance(old_N, rollout_N, settings["importance_cap"])
    return weights_N.tolist()


class Words:
    """Token ids as text, one by one or together, by the tokenizer of a run."""

    def __init__(self, run: Path, settings: Mapping[str, Any], given: str = ""):
        """`given`: a model's folder to use instead. Raises BadInput if it holds no tokenizer."""
        steps = sorted((run / "checkpoints").glob("step-*/model"), reverse=True)
        places = [Path(given)] if given else [run / "model", *steps, Path(str(settings.get("model") or run))]
        files = [place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file()]
        if given and not files:
            raise BadInput(f"--tokenizer {given} holds no tokenizer.json")
        self.tokenizer = None
        self.known: dict[int, str] = {}
        if files:
            from tokenizers import Tokenizer

            try:
                self.tokenizer = Tokenizer.from_file(str(files[0]))
            except Exception as error:  # it raises nothing narrower
                why = " ".join(str(error).split())
                raise BadInput(f"{files[0]}: damaged ({why}); --tokenizer MODEL names another") from None

    def __bool__(self) -> bool:
        return self.tokenizer is not None

    def together(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False) if self.tokenizer else ""

    def each(self, id: int) -> str:
        """One token's text; its number where there is no tokenizer, or no such token."""
        if id not in self.known:
            self.known[id] = self.together([id]) or f"<{id}>"
        return self.known[id]


def given_before(t: Trajectory) -> list[int]:
    """What the agent was given before its first reply: policy, tools, and what the customer said first."""
    return t.ids[: t.turns[0].start] if t.turns else list(t.ids)


def as_row(entry: Entry) -> list[Any]:
    """Number, split and columns, as JSON takes them."""
    values = dataclasses.asdict(entry)
    return [values[name] for name in ("number", "split", *COLUMNS)]
