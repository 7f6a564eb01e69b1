"""Conversations as data sets publish them, read into one record; broken files are named, line by line."""

import json
import time

import pytest

from minitau.conversations import DataError, Refused, Untrainable, conversation, read_conversations
from minitau.episode import BadInput, Call, Message

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Please hold 787."},
    {"role": "assistant", "content": "Shall I?"},
    {"role": "user", "content": "Yes."},
    {"role": "assistant", "content": "Done."},
]
HOLD = {"type": "function", "function": {"name": "hold", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def read(tmp_path):
    """Reads what a file with these lines (rows or raw bytes) holds, and what it refuses."""

    def reader(*lines):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
        return read_conversations(path)

    return reader


@pytest.mark.parametrize("key", ["messages", "prompt"])
def test_both_keys_are_read(read, key):
    (given,), _ = read({key: TALK})
    assert given.opening.policy == "Be kind." and given.opening.tools == ()
    assert given.opening.messages == (Message("user", "Please hold 787."),)
    assert given.messages == (Message("assistant", "Shall I?"), Message("user", "Yes."), Message("assistant", "Done."))
    assert given.line == 1


def test_blank_lines_are_skipped_and_lines_are_counted_as_an_editor_does(read):
    assert [given.line for given in read({"messages": TALK}, b"", b"  ", {"prompt": TALK})[0]] == [1, 4]


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
    "a reply apart from its prompt": {"prompt": TALK[:2], "completion": TALK[2:]},
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
    with pytest.raises(DataError, match="a folder; give JSONL"):
        read_conversations(tmp_path)


# -- the ways to write a conversation --------------------------------------------------------------------------

# One conversation: a call, its result, words. Every data set below writes it in its own way.
ASKED = Message("user", "Please hold 787.")
HELD = (Message("assistant", "", (Call("hold", {"parcel": "787"}),)), Message("tool", '{"ok": 1}'))
GOODBYE = Message("assistant", "It is held.")
CALL = {"name": "hold", "arguments": {"parcel": "787"}}
ASK, BYE = {"role": "user", "content": ASKED.content}, {"role": "assistant", "content": GOODBYE.content}
RESULT = {"role": "tool", "tool_call_id": "1", "name": "hold", "content": '{"ok": 1}'}
OPENAI = [ASK, {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": CALL}]}, RESULT, BYE]
IN_TEXT = {"role": "assistant", "content": f"<tool_call>{json.dumps(CALL)}</tool_call>"}
BLOCK = '<tool_response>\n{"ok": 1}\n</tool_response>'
SHAREGPT = [
    {"from": "human", "value": ASKED.content},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": '{"ok": 1}'},
    {"from": "gpt", "value": GOODBYE.content},
]
PARTS = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in (ASK, RESULT, BYE)]
PUBLISHED = {
    "OpenAI": {"messages": OPENAI},
    "arguments as text": {
        "messages": [ASK, {"role": "assistant", "tool_calls": [{**CALL, "arguments": '{"parcel":"787"}'}]}, *OPENAI[2:]]
    },
    "function_call": {
        "messages": [ASK, {"role": "assistant", "function_call": CALL}, {**RESULT, "role": "function"}, BYE]
    },
    "content in parts": {"messages": [PARTS[0], OPENAI[1], PARTS[1], PARTS[2]]},
    "messages as text": {"messages": json.dumps(OPENAI)},
    "Hermes": {"conversations": [SHAREGPT[0], {"from": "gpt", "value": IN_TEXT["content"]},
                                 {"from": "tool", "value": BLOCK}, SHAREGPT[3]]},
    "ShareGPT": {"conversations": SHAREGPT, "system": "Be kind."},
    "ms-swift": {
        "messages": [ASK, {"role": "tool_call", "content": json.dumps(CALL)}, {**RESULT, "role": "tool_response"}, BYE]
    },
    "results in blocks": {"prompt": [ASK, IN_TEXT, {"role": "user", "content": BLOCK}, BYE], "response": ""},
    "results in words": {
        "prompt": [ASK, IN_TEXT, {"role": "user", "content": "Tool result for hold(parcel='787'):\n{\"ok\": 1}"},
                   {"role": "assistant", "content": '<tool_call>{"name": "respond", "arguments": '
                                                    '{"content": "It is held."}}</tool_call>'}]
    },
}  # fmt: skip


@pytest.mark.parametrize("row", PUBLISHED.values(), ids=PUBLISHED)
def test_published_ways_to_write_a_conversation_are_one(row):
    given = conversation(row, 1)
    assert given.opening.messages == (ASKED,)
    assert given.messages == (*HELD, GOODBYE)
    assert given.opening.policy == row.get("system", "")


@pytest.mark.parametrize("tools", [[HOLD], json.dumps([HOLD]), [HOLD["function"]], json.dumps([HOLD["function"]])])
def test_tools_are_read_with_and_without_their_wrapper_and_as_text(tools):
    assert conversation({"messages": TALK, "tools": tools}, 1).opening.tools == (HOLD,)


def test_a_system_prompt_beside_the_messages_does_not_replace_one_among_them():
    assert conversation({"messages": TALK, "system": "Be quick."}, 1).opening.policy == "Be kind."


def test_calls_in_a_row_are_one_reply_only_where_a_row_is_nothing_but_a_call():
    calls = [{"from": "function_call", "value": json.dumps({"name": name, "arguments": {}})} for name in "ab"]
    rows = [SHAREGPT[0], *calls, SHAREGPT[2], SHAREGPT[2], calls[0], SHAREGPT[3]]
    given = conversation({"conversations": rows}, 1)
    both = Message("assistant", "", (Call("a", {}), Call("b", {})))
    assert given.messages == (both, HELD[1], HELD[1], Message("assistant", "", (Call("a", {}),)), GOODBYE)
    at_once = {"from": "function_call", "value": json.dumps([{"name": name, "arguments": {}} for name in "ab"])}
    assert conversation({"conversations": [SHAREGPT[0], at_once, SHAREGPT[3]]}, 1).messages[0] == both
    apart = [ASK, OPENAI[1], OPENAI[1], BYE]  # two replies, as a rollout would have them
    assert conversation({"messages": apart}, 1).messages == (HELD[0], HELD[0], GOODBYE)


def test_words_about_results_are_words():
    told = "Tool result for hold(parcel='787'):\nok"
    given = conversation({"messages": [ASK, BYE, {"role": "user", "content": told}, BYE]}, 1)
    assert given.messages[1] == Message("user", told)  # nothing was called


def test_words_and_thoughts_stay_beside_their_call():
    text = "<think>Which one?</think>\n" + IN_TEXT["content"]
    (reply, *_) = conversation({"messages": [ASK, {"role": "assistant", "content": text}, RESULT, BYE]}, 1).messages
    assert reply == Message("assistant", "<think>Which one?</think>", HELD[0].calls)


def test_a_call_inside_a_thought_was_not_made():
    block = IN_TEXT["content"]
    thought = f"<think>\nI could write {block}, but the customer did not confirm.\n</think>\n\n"
    speaks = '<tool_call>{"name": "respond", "arguments": {"content": "It is held."}}</tool_call>'
    for text, expected in (
        (thought + "Shall I?", Message("assistant", thought + "Shall I?")),
        (f"{thought}Moment.\n{block}", Message("assistant", thought + "Moment.", HELD[0].calls)),
        (thought + speaks, Message("assistant", thought + "It is held.")),
    ):
        (reply, *_) = conversation({"messages": [ASK, {"role": "assistant", "content": text}, ASK, BYE]}, 1).messages
        assert reply == expected


def test_a_call_of_respond_is_speech_unless_it_is_a_tool_or_has_words_beside_it():
    block = '<tool_call>{"name": "respond", "arguments": {"content": "It is held."}}</tool_call>'

    def reply(text, tools=()):
        return conversation({"messages": [ASK, {"role": "assistant", "content": text}], "tools": tools}, 1).messages[0]

    assert reply(block) == GOODBYE
    respond = Call("respond", {"content": "It is held."})
    assert reply("A thought. " + block) == Message("assistant", "A thought.", (respond,))
    assert reply(block, [{"name": "respond"}]) == Message("assistant", "", (respond,))


# -- what is not trained on ------------------------------------------------------------------------------------

REFUSED = {
    "nobody answers": ({"messages": TALK[:2]}, "the agent never answers"),
    "nobody asks": ({"messages": [TALK[0], TALK[2]]}, "the customer never speaks"),
    "only a policy": ({"messages": TALK[:1]}, "the customer never speaks"),
    "only a greeting": ({"messages": [TALK[2], TALK[1]]}, "the agent never answers"),
    "a test task": ({"messages": TALK, "task": "retail/test/5"}, "retail/test/5 is not of the train split"),
    "a test task that says it is none": (
        {"messages": TALK, "task": "retail/test/5", "origin": {"test_tasks": "none"}},
        "retail/test/5 is not of the train split",
    ),
    "an episode of an evaluation": (
        {"messages": TALK, "task": {"domain": "retail", "split": "test", "id": "5"}},
        "is not of the train split",
    ),
    "a task of no split": ({"messages": TALK, "task": "telecom/full/[a]b/c"}, "is not of the train split"),
}


@pytest.mark.parametrize("row, why", REFUSED.values(), ids=REFUSED)
def test_a_line_with_nothing_to_train_on_is_refused_and_the_others_are_read(read, row, why):
    with pytest.raises(Untrainable, match=why.replace("[", ".")):
        conversation(row, 1)
    good = {"messages": TALK, "task": "retail/train/5", "reward": 1.0}
    kept, refused = read(good, b"", row, good)
    assert [given.line for given in kept] == [1, 4] and kept[0].reward == 1.0
    assert [each.line for each in refused] == [3] and why in refused[0].why and isinstance(refused[0], Refused)


def test_what_is_almost_a_list_of_results_is_read_at_once():
    text = "<tool_response>1</tool_response>" * 40 + " and more"
    began = time.process_time()
    talk = conversation({"messages": [*TALK, {"role": "user", "content": text}, TALK[2]]}, 1)
    assert time.process_time() - began < 1 and talk.messages[-2] == Message("user", text)


def test_a_pool_without_its_test_tasks_is_trained_on():
    row = {"messages": TALK, "task": "telecom/full/[a]b/c", "origin": {"test_tasks": "none"}}
    assert conversation(row, 1).messages


def test_a_task_of_somebody_elses_is_none_of_ours():
    for task in ("retail", 5, "summarise/this", None, {"id": 3}):
        assert conversation({"messages": TALK, "task": task}, 1).messages


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
