"""Conversations as the ids that SFT trains on, with a report of what was left out; demonstrations as files."""

import json
import sys
from pathlib import Path

import pytest

import train
from minitau import sft
from minitau.chat import load_chat
from minitau.config import SFT, Check, Demonstrations
from minitau.conversations import DataError, read_conversations
from minitau.envs.courier import Courier
from minitau.envs.courier.tools import schemas
from minitau.envs.courier.world import CourierEnv
from minitau.episode import (
    BadInput,
    Call,
    Completion,
    Demonstration,
    Evaluation,
    Message,
    Opening,
    Sampling,
    Stop,
    Task,
    Trajectory,
)
from minitau.files import write_jsonl
from minitau.rollout import Limits, play
from minitau.script import run_script
from minitau.sft import to_trajectory

WORLD = Courier()
HOLD = {"parcel": "787"}
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Please hold 787."},
    {"role": "assistant", "content": "Shall I?"},
    {"role": "user", "content": "Yes."},
    {"role": "assistant", "content": "Done."},
]


@pytest.fixture(scope="module")
def chats(tiny_dir):
    return {dialect: load_chat(tiny_dir, dialect) for dialect in ("native", "single-call")}


@pytest.fixture
def chat(chats):
    return chats["native"]


@pytest.fixture
def read(tmp_path):
    """Reads what a file with these lines (rows or raw bytes) holds."""

    def reader(*lines):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
        return read_conversations(path)[0]

    return reader


def said_texts(trajectory, chat):
    """What the trajectory marks as said, reply by reply, decoded."""
    texts, ids = [], []
    for token, said in zip([*trajectory.ids, -1], [*trajectory.said, False]):
        if said:
            ids.append(token)
        elif ids:
            texts.append(chat.decode(ids))
            ids = []
    return texts


# -- conversations as trajectories ---------------------------------------------------------------------------


def test_a_greeting_is_given_and_not_learned(read, chat):
    greeting = {"role": "assistant", "content": "Hello, how can I help?"}
    (given,) = read({"messages": [TALK[0], greeting, *TALK[1:]]})
    assert [m.role for m in given.opening.messages] == ["assistant", "user"]
    trajectory = to_trajectory(given, chat)
    assert said_texts(trajectory, chat) == ["Shall I?<|im_end|>", "Done.<|im_end|>"]
    assert "Hello, how can I help?" in chat.decode(trajectory.ids)


def test_a_policy_is_not_needed_and_several_first_messages_are_heard(read, chat):
    (given,) = read({"messages": [TALK[1], TALK[3], TALK[4]]})
    assert given.opening.policy == "" and len(given.opening.messages) == 2
    assert said_texts(to_trajectory(given, chat), chat) == ["Done.<|im_end|>"]


@pytest.mark.parametrize("arguments", [HOLD, json.dumps(HOLD)], ids=["object", "JSON string"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["OpenAI", "bare"])
def test_tool_calls_are_read(read, chat, arguments, wrapped):
    call = {"name": "hold", "arguments": arguments}
    if wrapped:
        call = {"id": "call_1", "type": "function", "function": call}
    rows = [*TALK[:2], {"role": "assistant", "content": None, "tool_calls": [call]}]
    rows += [{"role": "tool", "tool_call_id": "call_1", "content": '{"receipt":"832"}'}, TALK[4]]
    (given,) = read({"messages": rows, "tools": list(schemas("desk"))})
    assert given.messages[0] == Message("assistant", "", (Call("hold", HOLD),))
    assert given.messages[1] == Message("tool", '{"receipt":"832"}')
    assert given.opening.tools == schemas("desk")
    written = '<tool_call>\n{"name": "hold", "arguments": {"parcel": "787"}}\n</tool_call><|im_end|>'
    assert said_texts(to_trajectory(given, chat), chat) == [written, "Done.<|im_end|>"]


def test_exactly_what_the_agent_says_is_marked(read, chat):
    rows = [*TALK, {"role": "user", "content": "Thank you."}]
    trajectory = to_trajectory(read({"messages": rows, "tools": list(schemas("desk"))})[0], chat)
    assert said_texts(trajectory, chat) == ["Shall I?<|im_end|>", "Done.<|im_end|>"]
    assert len(trajectory.ids) == len(trajectory.said) == len(trajectory.logprobs)
    assert [trajectory.said[turn.start : turn.end] for turn in trajectory.turns] == [
        [True] * (turn.end - turn.start) for turn in trajectory.turns
    ]
    # Every reply stands where the policy will begin its own, and nothing follows the last one.
    for turn in trajectory.turns:
        assert chat.decode(trajectory.ids[: turn.start]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert trajectory.said[-1] and "Thank you." not in chat.decode(trajectory.ids)


def test_replies_in_a_row_are_each_one_reply(read, chat):
    (given,) = read({"messages": [*TALK[:3], {"role": "assistant", "content": "Hello?"}, *TALK[3:]]})
    trajectory = to_trajectory(given, chat)
    assert said_texts(trajectory, chat) == ["Shall I?<|im_end|>", "Hello?<|im_end|>", "Done.<|im_end|>"]
    assert "Shall I?<|im_end|>\n<|im_start|>assistant\nHello?" in chat.decode(trajectory.ids)


@pytest.mark.parametrize("dialect", ["native", "single-call"])
def test_results_in_a_row_are_heard_together_and_words_stand_before_their_call(chats, read, dialect):
    chat = chats[dialect]
    call = {"role": "assistant", "content": "One moment.", "tool_calls": [{"name": "hold", "arguments": HOLD}]}
    results = [{"role": "tool", "content": each} for each in ("first", "second")]
    rows = [TALK[1], call, *results, {"role": "user", "content": "And?"}, call, TALK[4]]
    (given,) = read({"messages": rows, "tools": list(schemas("desk"))})
    trajectory = to_trajectory(given, chat)
    block = '<tool_call>\n{"name": "hold", "arguments": {"parcel": "787"}}\n</tool_call>'
    done = "Done." if dialect == "native" else block.replace('hold", "arguments": {"parcel": "787"}', DONE)
    assert said_texts(trajectory, chat) == [f"One moment.\n{block}<|im_end|>"] * 2 + [done + "<|im_end|>"]
    assert trajectory.ids == [
        *chat.open(given.opening),
        *chat.write(given.messages[0]),
        *chat.extend([chat.eos_id], given.messages[1:4])[1:],
        *chat.write(given.messages[4]),
        *chat.extend([chat.eos_id], [])[1:],
        *chat.write(given.messages[5]),
    ]


DONE = 'respond", "arguments": {"content": "Done."}'


class Repeats:
    """An engine that says prepared replies in turn."""

    def __init__(self, replies):
        self.replies = iter(replies)

    def generate(self, prompt_ids, sampling, *, session, seed):
        ids = tuple(next(self.replies))
        return Completion(ids, (-0.5,) * len(ids), "stop", 0)


@pytest.mark.parametrize("dialect", ["native", "single-call"])
@pytest.mark.parametrize("agent", ["gold", "flawed"])
def test_a_demonstration_trains_on_the_ids_that_a_rollout_saying_the_same_has(chats, tmp_path, dialect, agent):
    chat, path = chats[dialect], tmp_path / "data.jsonl"
    tasks = [task for domain in ("desk", "claims", "locker") for task in WORLD.tasks(domain, "train")[:8]]
    played = [WORLD.demonstrate(task, agent, seed="7") for task in tasks]
    write_jsonl(path, map(sft.to_row, played))
    assert list(tmp_path.iterdir()) == [path]  # no scratch file is left
    conversations, refused = read_conversations(path)
    assert len(conversations) == len(tasks) and not refused
    for task, demonstration, given in zip(tasks, played, conversations):
        assert given.opening == demonstration.opening and given.messages == demonstration.messages
        learned = to_trajectory(given, chat)
        engine = Repeats([chat.write(m) for m in demonstration.messages if m.role == "assistant"])
        options = {"sampling": Sampling(1.0, 500), "limits": Limits(40, 10_000, 3), "sample": 0, "seed": "7"}
        rollout = play(task, CourierEnv(), engine, chat, **options)
        assert rollout.evaluation == demonstration.evaluation and rollout.stop == demonstration.stop
        last = rollout.turns[-1].end  # a rollout that ran out of turns also heard the last answer
        assert learned.ids == rollout.ids[:last] and learned.said == rollout.said[:last]
        assert [(t.start, t.end) for t in learned.turns] == [(t.start, t.end) for t in rollout.turns]
        assert Trajectory.from_json(json.loads(json.dumps(learned.to_json()))) == learned


# -- what training makes of a file --------------------------------------------------------------------------------


def row(*messages, **also):
    return {"messages": [*TALK[:2], *messages], "tools": list(schemas("desk")), **also}


def calls(*names, content=""):
    return {"role": "assistant", "content": content, "tool_calls": [{"name": n, "arguments": HOLD} for n in names]}


def write(path, *rows):
    write_jsonl(path, rows)
    return str(path)


WRONG = {  # what is refused in which dialects, and why
    "no such tool": (row(calls("fly")), ("native", "single-call"), "reply 1: there is no tool 'fly'"),
    "nothing said": (row(TALK[2], {"role": "assistant", "content": " "}), ("native", "single-call"), "reply 2: "),
    "broken call": (row({"role": "assistant", "content": "<tool_call>{'name'"}), ("native", "single-call"), "reply 1"),
    "not a number": (row({"role": "assistant", "tool_calls": [{"name": "hold", "arguments": '{"a": NaN}'}]}),
                     ("native", "single-call"), "NaN is not a JSON number"),
    "two calls": (row(calls("hold", "look")), ("single-call",), "2 calls, the single-call dialect has one"),
    "respond": (row(calls("respond", content="Hm.")), ("native", "single-call"), "respond"),
    "done": (row(calls("done")), ("native",), "there is no tool 'done'"),
    "long": (row({"role": "assistant", "content": "787 " * 400}), ("native", "single-call"), "the limit is 600"),
    "test task": (row(TALK[4], task="desk/test/1"), ("native", "single-call"), "desk/test/1"),
    "silent agent": (row(), ("native", "single-call"), "the agent never answers"),
}  # fmt: skip


@pytest.mark.parametrize("dialect", ["native", "single-call"])
@pytest.mark.parametrize("wrong, dialects, why", WRONG.values(), ids=WRONG)
def test_what_would_teach_a_mistake_is_refused_and_named(chats, tmp_path, dialect, wrong, dialects, why):
    good = row(calls("hold"), TALK[4])
    data = sft.load(write(tmp_path / "data.jsonl", good, wrong, good), chats[dialect], 600)
    if dialect not in dialects:
        assert len(data.trajectories) == 3 and not data.refused
        return
    assert len(data.trajectories) == 2
    assert [each.line for each in data.refused] == [2] and why in data.refused[0].why
    assert f"refused 1 (line 2: {data.refused[0].why})" in data.summary() and "\n" not in data.refused[0].why


def test_a_file_is_reported_by_line(chat, tmp_path):
    rows = [
        row(TALK[4], reward=1.0, task="desk/train/1"),
        row(TALK[4], {"role": "user", "content": "Thank you."}, reward=0.0),
        row(calls("fly")),
        {"messages": [*TALK[:2], {**calls("fly")}, TALK[4]]},  # lists no tools: who knows what it may call
        row(TALK[4], {"role": "user", "content": "Thank you."}),
    ]
    data = sft.load(write(tmp_path / "data.jsonl", *rows), chat, 600)
    report = data.report()
    assert report["kept"] == 4 and report["cut"] == [2, 5] and report["without_tools"] == 1
    assert report["rewards"] == {"1": 1, "less": 1}
    assert [each["line"] for each in report["refused"]] == [3]
    lengths = [len(t.ids) for t in data.trajectories]
    assert report["tokens"] == sum(lengths) and report["longest"] == max(lengths)
    assert report["tokens_said"] == sum(sum(t.said) for t in data.trajectories)
    summary = data.summary()
    assert "kept 4 conversations" in summary and "lines 2, 5)" in summary and "1 of 2 that tell their reward" in summary
    assert "1 list no `tools`" in summary and json.loads(json.dumps(report)) == report
    many = sft.load(write(tmp_path / "many.jsonl", *[rows[2]] * 9, rows[0]), chat, 600)
    assert "refused 9 (line 1: " in many.summary() and many.summary().endswith("6 more)")
    with pytest.raises(DataError, match=r"refused 9 of 10 conversations, --max-refused is 0.8; line 1: "):
        sft.require_enough(many, 0.8)
    sft.require_enough(many, 0.9)
    with pytest.raises(DataError, match="refused 1 of 1"):
        sft.require_enough(sft.load(write(tmp_path / "none.jsonl", rows[2]), chat, 600), 1.0)


def test_training_reports_its_data_and_does_not_start_on_a_bad_file(tiny_dir, tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", *[row(calls("hold"), TALK[4])] * 9, row(calls("fly")))
    out = tmp_path / "run"
    flags = ["--stage", "sft", "--model", str(tiny_dir), "--data", data, "--out", str(out), "--epochs", "1"]
    assert run_script("train.py", train.main, [*flags, "--max-refused", "0.05"]) == 2
    assert "refused 1 of 10 conversations" in capsys.readouterr().err and not out.exists()
    assert run_script("train.py", train.main, flags) == 0
    assert "refused 1 (line 10: the agent's reply 1: there is no tool 'fly'" in capsys.readouterr().out
    report = json.loads((out / "data_report.json").read_text())
    assert report["kept"] == 9 and report["refused"][0]["line"] == 10


def test_a_file_can_be_looked_at_without_training(tiny_dir, tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", row(TALK[4]), *[row(calls("fly"))] * 5)
    assert run_script("minitau.sft", sft.main, ["--check", data, "--model", str(tiny_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "kept 1 conversations" in lines[0] and [line.split(":")[0] for line in lines[-5:]] == [
        f"line {n}" for n in range(2, 7)
    ]
    assert run_script("minitau.sft", sft.main, [f"--check={data}"]) == 2
    assert "--model DIR" in capsys.readouterr().err
    Path(data).write_text("{\n")
    assert run_script("minitau.sft", sft.main, ["--check", data, "--model", str(tiny_dir)]) == 2
    assert "data.jsonl, line 1: " in capsys.readouterr().err
    for name in ("dialect", "max_tokens"):  # it looks as training does
        assert getattr(Check(), name) == getattr(SFT(), name)


# -- demonstrations -----------------------------------------------------------------------------------------------


def played(*messages, reward=1.0, split="train", told="I am 4471."):
    opening = Opening("Help.", schemas("desk"), (Message("user", told),))
    task = Task("desk", split, "0")
    return Demonstration(task, opening, tuple(messages), Evaluation(reward), Stop.USER_STOP)


BYE = Message("assistant", "Done.")


def test_a_demonstration_that_teaches_the_wrong_thing_is_known():
    def look(*ids):
        return Message("assistant", calls=(Call("look", {"ids": [{"id": each} for each in ids], "n": 12345}),))

    assert sft.flaws(played(look("4471"), Message("tool", "owner U_99"), look("#U_99", "some words"), BYE)) == []
    assert sft.flaws(played(look("4471"), BYE, reward=0.5)) == ["no reward"]
    assert sft.flaws(played(BYE)) == ["only a goodbye"]
    early = played(look("U_99"), Message("tool", "owner U_99"), look("U_99"), BYE)
    assert sft.flaws(early) == ["guessed ids"] and sft.guessed(early) == ["u_99"]
    assert sft.guessed(played(look("4472"), BYE, told="I am 4471. No, 4472.")) == []
    said = (Message("assistant", "May I look at U_99?"), Message("user", "Yes."), look("U_99"), BYE)
    assert sft.guessed(played(*said)) == ["u_99"], "who says an id has not been told it"


class Prepared:
    """A world with prepared demonstrations, or one that fails at some task."""

    def __init__(self, *demonstrations):
        self.demonstrations = demonstrations

    def tasks(self, domain, split):
        n = len(self.demonstrations) if split == self.demonstrations[0].task.split else 0
        return [Task(domain, split, str(i)) for i in range(n)]

    def demonstrate(self, task, agent, seed):
        found = self.demonstrations[int(task.id)]
        if isinstance(found, BaseException):
            raise found
        return found


GOOD = played(Message("assistant", "And?"), BYE)


def test_gold_leaves_out_what_should_not_be_learned_unless_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sft, "open_world", lambda cfg: Prepared(GOOD, played(BYE), played(BYE, BYE, reward=0.0)))
    options = {"domains": ("desk",)}
    written = {}
    for name, also in {"gold": {}, "all": {"keep_all": True}, "flawed": {"agent": "flawed"}}.items():
        sft.demonstrate(Demonstrations(out=str(tmp_path / name), **options, **also))
        written[name] = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        table = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert table[1] == ["desk", "3", "2", "1", "1", "0", "0", str(len(written[name]))]
    assert [len(rows) for rows in written.values()] == [1, 3, 3]
    assert [each["flaws"] for each in written["all"]] == [[], ["only a goodbye"], ["no reward"]]
    assert written["gold"][0]["origin"] == {
        "source": "minitau's gold script", "env": "courier", "test_tasks": "none", "customer": "a script",
    }  # fmt: skip


def test_no_demonstration_of_a_test_task_is_ever_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "open_world", lambda cfg: Prepared(played(BYE, BYE, split="test")))
    with pytest.raises(BadInput, match="holds nothing to train on"):
        sft.demonstrate(Demonstrations(out=str(tmp_path / "d.jsonl"), domains=("desk",)))
    assert not (tmp_path / "d.jsonl").exists()


def test_an_interrupted_command_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "open_world", lambda cfg: Prepared(GOOD, KeyboardInterrupt()))
    out = tmp_path / "d.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sft.demonstrate(Demonstrations(out=str(out), domains=("desk",)))
    assert list(tmp_path.iterdir()) == []


def test_the_script_writes_what_training_reads(tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "demonstrations.jsonl"
    monkeypatch.setattr("sys.argv", ["sft", "--agent", "gold", "--tasks", "7", "--out", str(path)])
    assert run_script("minitau.sft", sft.main, sys.argv[1:]) == 0
    assert "7 demonstrations, 7 of them earn the reward" in capsys.readouterr().out
    assert len(read_conversations(path)[0]) == 7
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["task"].split("/")[0] for row in rows[:3]] == ["desk", "claims", "locker"]
    assert all(row["reward"] == 1.0 for row in rows)
    again = path.with_name("again.jsonl")
    assert run_script("minitau.sft", sft.main, ["--agent", "gold", "--tasks", "7", "--out", str(again)]) == 0
    assert again.read_bytes() == path.read_bytes()  # the same seed writes the same bytes
    assert run_script("minitau.sft", sft.main, sys.argv[1:]) == 2  # and writes over nothing
    monkeypatch.setattr("sys.argv", ["sft", "--agent", "gold", "--domains", "moon", "--out", str(path)])
    assert run_script("minitau.sft", sft.main, sys.argv[1:]) == 2
    monkeypatch.setattr("sys.argv", ["sft", "--agent", "gold"])
    assert run_script("minitau.sft", sft.main, sys.argv[1:]) == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if "minitau.sft: " in line]
    assert len(lines) == 3


def test_rows_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": "é\u2028"}])
    before = path.read_bytes()

    def rows():
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(Path(path), rows())
    assert path.read_bytes() == before and json.loads(before) == {"a": "é\u2028"}
