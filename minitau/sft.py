"""Conversations in, conversations out: trajectories to train on, demonstrations to JSONL.

A conversation from a file becomes the same Trajectory that a rollout makes, rendered by the same
chat, so that SFT trains on the very ids that the policy will see and say. This file knows records
and chats, no model.

Run as a script it writes demonstrations of a world's scripted agents on training tasks,
`python -m minitau.sft --agent flawed --tasks 100 --out demonstrations.jsonl`, or says what training
would make of a file: `python -m minitau.sft --check demonstrations.jsonl --model MODEL`.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitau import cli, config
from minitau.chat import Chat, ChatError, load_chat
from minitau.conversations import Conversation, DataError, Refused, read_conversations
from minitau.envs import open_world, origin
from minitau.episode import BadInput, Completion, Demonstration, EpisodeError, Message, Task, Trajectory
from minitau.files import write_jsonl
from minitau.report import aligned
from minitau.script import progress_bar, run_script
from minitau.tasks import for_training

SHOWN = 3  # lines of a file that a summary names; the report names all

# -- a file as trajectories -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What a file holds to train on, and what became of the rest of its lines."""

    path: str
    trajectories: list[Trajectory]
    cut: list[int]  # lines that went on after the agent's last reply
    refused: list[Refused]
    untold: int  # kept conversations without `tools`: their calls were checked against nothing
    rewards: list[float]  # of the kept conversations that say what they earned

    def report(self) -> dict[str, Any]:
        """For the run's folder: every line that was cut or refused."""
        lengths = [len(t.ids) for t in self.trajectories]
        return {
            "file": self.path,
            "kept": len(self.trajectories),
            "tokens": sum(lengths),
            "tokens_said": sum(sum(t.said) for t in self.trajectories),
            "longest": max(lengths, default=0),
            "without_tools": self.untold,
            "rewards": {"1": sum(r >= 1 for r in self.rewards), "less": sum(r < 1 for r in self.rewards)},
            "cut": self.cut,
            "refused": [{"line": each.line, "why": each.why} for each in self.refused],
        }

    def summary(self) -> str:
        """The report in a few lines."""
        row = self.report()
        said = 100 * row["tokens_said"] / max(1, row["tokens"])
        lines = [
            f"{self.path}: kept {row['kept']} conversations, {row['tokens']} tokens of which the agent says "
            f"{said:.0f}%; the longest has {row['longest']}"
        ]
        if self.rewards:
            lines.append(f"{row['rewards']['1']} of {len(self.rewards)} that tell their reward earned 1")
        if self.untold:
            lines.append(f"{self.untold} list no `tools`: nobody checked that what they call exists")
        if self.cut:
            where = first_few([str(line) for line in self.cut], ", ")
            lines.append(f"cut {len(self.cut)} (what came after the agent's last reply: lines {where})")
        if self.refused:
            lines.append(f"refused {len(self.refused)} ({reasons(self.refused)})")
        return "\n".join(lines)


def first_few(items: Sequence[str], separator: str) -> str:
    more = [f"{len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return separator.join([*items[:SHOWN], *more])


def reasons(refused: Sequence[Refused]) -> str:
    return first_few([f"line {each.line}: {each.why}" for each in refused], "; ")


def load(path: str, chat: Chat, max_tokens: int) -> Data:
    """The conversations of a JSONL file as trajectories of at most `max_tokens`.

    Refused, and counted, is what would teach something wrong: a reply that this chat itself would call
    malformed (no such tool, broken JSON, nothing said), a task that is kept for testing; and what
    cannot be trained on. Raises DataError naming the first line that is malformed.
    """
    conversations, refused = read_conversations(path)
    kept: list[tuple[Conversation, Trajectory]] = []
    for given in conversations:
        try:
            trajectory = to_trajectory(given, chat)
            why = mistake(given, trajectory, chat)
        except ChatError as error:
            why = str(error)
        if not why and len(trajectory.ids) > max_tokens:
            why = f"{len(trajectory.ids)} tokens, the limit is {max_tokens}"
        if why:
            refused.append(Refused(given.line, why))
        else:
            kept.append((given, trajectory))
    return Data(
        path=str(path),
        trajectories=[trajectory for _, trajectory in kept],
        cut=[given.line for given, _ in kept if given.messages[-1].role != "assistant"],
        refused=sorted(refused, key=lambda each: each.line),
        untold=sum(not given.opening.tools for given, _ in kept),
        rewards=[given.reward for given, _ in kept if given.reward is not None],
    )


def mistake(given: Conversation, trajectory: Trajectory, chat: Chat) -> str:
    """What is wrong with a reply, as this chat would tell its agent, or that it calls no tool; empty if nothing is."""
    called = {call.name for message in given.messages for call in message.calls}
    tools = given.opening.tools or [{"function": {"name": name}} for name in called]
    for number, turn in enumerate(trajectory.turns, 1):
        action = chat.parse(trajectory.ids[turn.start : turn.end], tools)
        if action.error:
            return f"the agent's reply {number}: {action.error[:200]}"
    return ""


def require_enough(data: Data, max_refused: float) -> None:
    """Raise DataError if nothing was kept, or too much was refused to be an accident."""
    n = len(data.trajectories) + len(data.refused)
    if not data.trajectories or len(data.refused) > max_refused * n:
        raise DataError(
            f"{data.path}: refused {len(data.refused)} of {n} conversations, --max-refused is {max_refused:g}; "
            f"{reasons(data.refused)}; `python -m minitau.sft --check` lists them all"
        )


def to_trajectory(given: Conversation, chat: Chat) -> Trajectory:
    """The ids of a conversation as a rollout would have made them; `said` marks the agent's replies.

    Messages in a row that are not the agent's are heard together; each of the agent's is a reply of its
    own, its words before its calls. What comes after the last one is left out: nothing follows from it.
    Raises ChatError if the chat's template or dialect cannot say it.
    """
    trajectory = Trajectory(Task("file", "train", str(given.line)), 0)
    trajectory.messages = [*given.opening.messages, *given.messages]
    trajectory.hear(chat.open(given.opening))
    heard: list[Message] = []
    for message in given.messages:
        if message.role != "assistant":
            heard.append(message)
            continue
        if trajectory.turns:
            trajectory.hear(chat.extend(trajectory.ids, heard)[len(trajectory.ids) :])
        ids = chat.write(message)
        trajectory.say(Completion(tuple(ids), (0.0,) * len(ids), "stop", 0))
        heard = []
    return trajectory


# -- demonstrations as a file ---------------------------------------------------------------------------------


def to_row(demonstration: Demonstration) -> dict[str, Any]:
    """A demonstration as a row that read_conversations reads."""
    opening = demonstration.opening
    messages = [Message("system", opening.policy), *opening.messages, *demonstration.messages]
    return {
        "task": demonstration.task.key,
        "reward": demonstration.evaluation.reward,
        "tools": list(opening.tools),
        "messages": [message_row(message) for message in messages],
    }


def message_row(message: Message) -> dict[str, Any]:
    calls = [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in message.calls
    ]
    return {"role": message.role, "content": message.content} | ({"tool_calls": calls} if calls else {})


def flaws(demonstration: Demonstration) -> list[str]:
    """Why a demonstration that is meant to be right should not be learned from."""
    found = ["no reward"] if demonstration.evaluation.reward < 1 else []
    if sum(message.role == "assistant" for message in demonstration.messages) < 2:
        found.append("only a goodbye")  # the agent says that it is done, and has done nothing
    if guessed(demonstration):
        found.append("guessed ids")  # a script may know the solution; an agent that copies it will invent
    return found


def guessed(demonstration: Demonstration) -> list[str]:
    """The ids in the agent's calls that nothing before them told it. (An id is a word with a digit in it.)"""
    opening = demonstration.opening
    told = " ".join([opening.policy, json.dumps(opening.tools), *(m.content for m in opening.messages)]).lower()
    unknown = []
    for message in demonstration.messages:
        texts = [text for call in message.calls for text in strings(call.arguments)]
        words = [word for text in texts for word in re.findall(r"\w{4,}", text.lower())]
        unknown += [word for word in words if any(c.isdigit() for c in word) and word not in told]
        if message.role != "assistant":  # to say an id is not to be told it
            told += " " + message.content.lower()
    return unknown


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


def demonstrations_table(played: Sequence[Demonstration], kept: Sequence[Demonstration]) -> str:
    """By domain: what was played, what it earned, and what is written."""
    lines = [["domain", "tasks", "reward 1", "no reward", "only a goodbye", "guessed ids", "dropped calls", "written"]]
    for domain in dict.fromkeys(d.task.domain for d in played):
        ours = [d for d in played if d.task.domain == domain]
        found = Counter(flaw for d in ours for flaw in flaws(d))
        # What the reference does and the script did not: reads of things that do not exist.
        unmade = sum(not check.passed for d in ours for check in d.evaluation.checks if check.kind == "action")
        counts = [
            len(ours),
            sum(d.evaluation.reward >= 1 for d in ours),
            *(found[flaw] for flaw in lines[0][3:6]),
            unmade,
            sum(d.task.domain == domain for d in kept),
        ]
        lines.append([domain, *map(str, counts)])
    return aligned(lines)


def demonstrate(cfg: config.Demonstrations) -> None:
    """Play training tasks with a script and write what is worth learning from, whole or not at all."""
    out = Path(cfg.out)
    if out.exists():
        raise BadInput(f"{cfg.out} exists already; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before the work
    world = open_world(cfg)
    tasks = for_training(cfg, world)  # also those that pay for doing nothing: where that is right, it is to be learned
    played, broken = [], []
    progress = progress_bar("demonstrating", len(tasks), "task")
    for task in tasks:
        try:
            played.append(world.demonstrate(task, cfg.agent, seed=f"{cfg.seed}:{task.key}"))
        except EpisodeError as error:
            broken.append(f"{task.key}: {error}")
        progress.update()
    progress.close()
    if broken:
        print(f"left out {len(broken)} tasks that broke on our side: {first_few(broken, '; ')}")
    # What another agent than gold does wrong is what it is asked for.
    kept = [d for d in played if cfg.agent != "gold" or cfg.keep_all or not flaws(d)]
    about = {"source": f"minitau's {cfg.agent} script", **origin(cfg.env), "test_tasks": "none", "customer": "a script"}
    rows = [{**to_row(d), "flaws": flaws(d) if cfg.agent == "gold" else [], "origin": about} for d in kept]
    write_jsonl(out, rows)
    print(demonstrations_table(played, kept))
    print(f"{out}: {len(kept)} demonstrations, {sum(d.evaluation.reward >= 1 for d in kept)} of them earn the reward")


def main(argv: list[str]) -> None:
    if any(flag.split("=")[0] == "--check" for flag in argv):
        cfg = cli.parse(config.Check, "python -m minitau.sft", "Say what training would make of a file.", argv)
        if not cfg.check or not cfg.model:
            raise BadInput("--check FILE and --model DIR are both needed")
        data = load(cfg.check, load_chat(cfg.model, cfg.dialect), cfg.max_tokens)
        print(data.summary())
        for each in data.refused:
            print(f"line {each.line}: {each.why}")
        return
    about = "Write demonstrations to train on; with --check FILE --model DIR, look at such a file instead."
    cfg = cli.parse(config.Demonstrations, "python -m minitau.sft", about, argv)
    if not cfg.out:
        raise BadInput("--out is needed")
    demonstrate(cfg)


if __name__ == "__main__":
    sys.exit(run_script("minitau.sft", main, sys.argv[1:]))
