"""Conversations from files, demonstrations to files, and what rejection fine-tuning keeps."""

import json
import sys
from pathlib import Path

import pytest
from conftest import trajectory as finished

from minitau import sft
from minitau.chat import load_chat
from minitau.envs.courier import Courier
from minitau.envs.courier.tools import schemas
from minitau.envs.courier.world import CourierEnv
from minitau.episode import BadInput, Call, Check, Completion, Message, Sampling, Stop, Trajectory
from minitau.log import run_script, write_jsonl
from minitau.rollout import Limits, play
from minitau.sft import DataError, conversation, read_conversations, to_trajectory

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
        return read_conversations(path)

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


# -- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["messages", "prompt"])
def test_both_keys_are_read(read, key):
    (given,) = read({key: TALK})
    assert given.opening.policy == "Be kind." and given.opening.tools == ()
    assert given.opening.messages == (Message("user", "Please hold 787."),)
    assert given.messages == (Message("assistant", "Shall I?"), Message("user", "Yes."), Message("assistant", "Done."))
    assert given.line == 1


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


def test_blank_lines_are_skipped_and_lines_are_counted_as_an_editor_does(read):
    assert [given.line for given in read({"messages": TALK}, b"", b"  ", {"prompt": TALK})] == [1, 4]


BROKEN = {
    "not JSON": b'{"messages": [',
    "not UTF-8": b'{"messages": "\xff"}',
    "not an object": [1],
    "no messages": {"text": "x"},
    "empty messages": {"messages": []},
    "messages are text": {"messages": "hello"},
    "a message is text": {"messages": ["hello"]},
    "unknown role": {"messages": [{"role": "robot", "content": "x"}, *TALK]},
    "no role": {"messages": [{"content": "x"}, *TALK]},
    "content is a list": {"messages": [{"role": "user", "content": [{"type": "text"}]}, *TALK]},
    "nobody answers": {"messages": TALK[:2]},
    "nobody asks": {"messages": [TALK[0], TALK[2]]},
    "only a policy": {"messages": TALK[:1]},
    "only a greeting": {"messages": [TALK[2], TALK[1]]},
    "a call without a name": {"messages": [*TALK[:2], {"role": "assistant", "tool_calls": [{"arguments": {}}]}]},
    "a call with a list": {
        "messages": [*TALK[:2], {"role": "assistant", "tool_calls": [{"name": "hold", "arguments": "[1]"}]}]
    },
    "a call that is no JSON": {
        "messages": [*TALK[:2], {"role": "assistant", "tool_calls": [{"name": "hold", "arguments": "787"}]}]
    },
    "a call that is text": {"messages": [*TALK[:2], {"role": "assistant", "tool_calls": ["hold"]}]},
    "calls are a number": {"messages": [*TALK[:2], {"role": "assistant", "tool_calls": 5}]},
    "tools are text": {"messages": TALK, "tools": "hold"},
    "nested too deep": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "half a character": {"messages": [{"role": "user", "content": "\ud800"}, *TALK]},
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_named_in_one_line(read, broken):
    with pytest.raises(DataError) as caught:
        read({"messages": TALK}, b"", broken, {"messages": TALK})
    assert isinstance(caught.value, BadInput)
    message = str(caught.value)
    assert "data.jsonl, line 3: " in message and "\n" not in message and len(message) < 400


def test_nothing_to_read_is_named(read, tmp_path):
    with pytest.raises(DataError, match="no conversations"):
        read()
    with pytest.raises(DataError, match="no conversations"):
        read(b"", b" ")
    with pytest.raises(DataError, match="no such file"):
        read_conversations(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read_conversations(tmp_path)  # a folder


# -- conversations as trajectories ---------------------------------------------------------------------------


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
    conversations = read_conversations(path)
    assert len(conversations) == len(tasks)
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


def test_the_script_writes_what_training_reads(tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "demonstrations.jsonl"
    monkeypatch.setattr("sys.argv", ["sft", "--agent", "gold", "--tasks", "7", "--out", str(path)])
    assert run_script("minitau.sft", sft.main, sys.argv[1:]) == 0
    assert "7 demonstrations, 7 of them earn the reward" in capsys.readouterr().out
    assert len(read_conversations(path)) == 7
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


# -- rejection -----------------------------------------------------------------------------------------------


def attempt(reward=0.0, passed=(), sample=0, stop=Stop.USER_STOP):
    """An attempt with one check of kind `action` for each of `passed`."""
    checks = [Check("action", str(i), each) for i, each in enumerate(passed)]
    return finished([1, 2], [False, True], reward=reward, checks=checks, sample=sample, stop=stop)


def test_a_solved_task_keeps_every_success_and_nothing_else():
    group = [attempt(1.0, (True,), 0), attempt(0.0, (True,), 1), attempt(1.0, (False,), 2)]
    assert sft.reject([group], 0.6) == [group[0], group[2]]


def test_an_unsolved_task_keeps_its_first_best_attempt_if_it_is_good_enough():
    group = [attempt(0.0, (True, False), 0), attempt(0.0, (True, True, False), 1), attempt(0.0, (True, True, False), 2)]
    kept = sft.reject([group], 0.6)
    assert len(kept) == 1 and kept[0] is group[1]
    assert sft.reject([group], 2 / 3) == [group[1]]  # "from this partial score on"
    assert sft.reject([group], 0.7) == []
    assert sft.reject([group[:1]], 0.6) == []


def test_what_broke_on_our_side_is_never_kept():
    broken = [attempt(stop=stop) for stop in (Stop.USER_ERROR, Stop.ENGINE_ERROR, Stop.ENV_ERROR)]
    assert sft.reject([broken], 0.0) == []
    good = attempt(0.0, (True, True), 1)
    assert sft.reject([[*broken, good]], 0.6) == [good]
    assert sft.reject([], 0.6) == [] and sft.reject([[]], 0.6) == []


def test_the_groups_keep_their_order():
    groups = [[attempt(1.0, (), i)] for i in range(5)]
    assert [t.sample for t in sft.reject(groups, 0.6)] == list(range(5))


def test_tool_results_that_a_data_set_wrote_as_a_users_are_the_tools():
    block = "<tool_response>\n{}\n</tool_response>"
    rows = [
        {"role": "system", "content": "Write calls in <tool_call> tags."},
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'},
        {"role": "user", "content": block.format('{"a": 1}') + "\n" + block.format("two\nlines")},
        {"role": "assistant", "content": "Here."},
        {"role": "user", "content": "I said <tool_response> and no more."},
        {"role": "assistant", "content": "Yes."},
    ]
    given = conversation({"messages": rows}, 1)
    assert [(m.role, m.content) for m in given.messages][1:3] == [("tool", '{"a": 1}'), ("tool", "two\nlines")]
    assert given.messages[4] == Message("user", rows[5]["content"])
