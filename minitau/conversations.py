"""Conversations from files: JSONL as data sets publish it, read into one record.

A row holds a list of messages under `messages`, `prompt` or `conversations`, and the tools beside it.
Data sets differ in how they write calls, results and names; `conversation` brings what is plain
enough into `Message`s and refuses the rest. This file knows no tokens and no model.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitau.chat import MalformedReply, read_reply, thought_and_reply
from minitau.episode import BadInput, Call, Message, Opening

# The names of the four roles, and those that ShareGPT, LLaMA-Factory, ms-swift and OpenAI give them.
ROLES = {
    **{name: "system" for name in ("system", "developer")},
    **{name: "user" for name in ("user", "human")},
    **{name: "assistant" for name in ("assistant", "gpt", "function_call", "tool_call")},
    **{name: "tool" for name in ("tool", "function", "observation", "tool_response")},
}
CALLS = ("function_call", "tool_call")  # roles whose content is a call, or a list of calls, as JSON
# One result, and nothing but results. No block holds another's tags: else a text that is almost one takes for ever.
RESULT = re.compile(r"<tool_response>((?:(?!</?tool_response>).)*)</tool_response>", re.DOTALL)
RESULTS = re.compile(rf"\s*(?:{RESULT.pattern}\s*)+", re.DOTALL)
# How the published pipeline for tau2-bench tells the agent a result, in the customer's name.
TOLD = re.compile(r"Tool result for \w+\(.*?\):\s*\n(.*)", re.DOTALL)


class DataError(BadInput):
    """A file that is not what it should be: its name, the line, and what is wrong with it."""


class Untrainable(ValueError):
    """A well-formed conversation that must not, or cannot, be trained on."""


@dataclass(frozen=True)
class Conversation:
    """A conversation from a file: what the agent was given, then who said what."""

    opening: Opening
    messages: tuple[Message, ...]
    line: int
    reward: float | None = None  # what the file says that it earned


@dataclass(frozen=True)
class Refused:
    """A line that is left out, and why."""

    line: int
    why: str


def read_conversations(path: str | Path) -> tuple[list[Conversation], list[Refused]]:
    """All conversations of a JSONL file, and the lines that hold none to train on.

    Raises DataError naming the first line that is malformed: a broken file may be broken everywhere.
    """
    if not Path(path).is_file():
        what = "a folder" if Path(path).is_dir() else "no such file"
        raise DataError(f"{path}: {what}; give JSONL with one conversation a line")
    conversations, refused = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                json.dumps(row, ensure_ascii=False).encode()  # half a character (a lone surrogate) fails here
                conversations.append(conversation(row, number))
            except Untrainable as error:
                refused.append(Refused(number, str(error)))
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: {error}") from None
    if not conversations and not refused:
        raise DataError(f"{path}: no conversations in it")
    return conversations, refused


def conversation(row: Any, line: int) -> Conversation:
    """One row as a Conversation. Raises Untrainable, or ValueError saying what is malformed.

    The opening is the system message, a greeting if the agent spoke first (it was given, not
    chosen, so it is not trained on), and what the customer said before the agent's first reply.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    tools = read_tools(row.get("tools"))
    messages = read_messages(row, {tool["function"]["name"] for tool in tools})
    policy = messages.pop(0).content if messages[0].role == "system" else ""
    first_user = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if first_user is None:
        raise Untrainable("the customer never speaks")
    start = next((i for i, m in enumerate(messages) if m.role == "assistant" and i > first_user), None)
    if start is None:
        raise Untrainable("the agent never answers")
    if is_held_out(row.get("task"), row.get("origin")):
        raise Untrainable(f"task {str(row['task'])[:80]} is not of the train split")
    reward = row.get("reward")
    opening = Opening(policy, tools, tuple(messages[:start]))
    return Conversation(opening, tuple(messages[start:]), line, reward if isinstance(reward, (int, float)) else None)


def is_held_out(key: Any, origin: Any) -> bool:
    """True for the name of a task that may be a test task: its key, domain/split/id, or the three by name.

    That is one in any split but train, as tau2's base and full hold test tasks; unless it comes from where
    they were left out, as the origin of our own demonstrations says.
    """
    if isinstance(key, dict):
        split = key.get("split", "train")
    else:
        split = key.split("/")[1] if isinstance(key, str) and key.count("/") >= 2 else "train"
    left_out = isinstance(origin, dict) and origin.get("test_tasks") == "none"
    return split == "test" or (split != "train" and not left_out)


# -- the ways to write a row ----------------------------------------------------------------------------------


def read_tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """Schemas as OpenAI writes them; some data sets write the list as text, or each without its wrapper."""
    if isinstance(tools, str) and tools.strip():
        tools = from_text(tools, "`tools`")
    wrapped = [
        {"type": "function", "function": tool} if isinstance(tool, dict) and "function" not in tool else tool
        for tool in (tools if isinstance(tools, list) else [])
    ]
    if (tools and not isinstance(tools, list)) or not all(is_schema(tool) for tool in wrapped):
        raise ValueError('`tools` is not a list of schemas {"type": "function", "function": {"name": ..., ...}}')
    return tuple(wrapped)


def is_schema(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def read_messages(row: dict[str, Any], tools: set[str]) -> list[Message]:
    """The messages of a row, whatever they are called in it. There is at least one."""
    rows = row.get("messages") or row.get("prompt") or row.get("conversations")
    if isinstance(rows, str):
        rows = from_text(rows, "the list of messages")
    if not isinstance(rows, list) or not rows:
        raise ValueError("no list of messages under `messages`, `prompt` or `conversations`")
    if not row.get("messages") and (row.get("completion") or row.get("response")):
        raise ValueError("the reply stands apart from its `prompt`; write both as one list under `messages`")
    messages: list[Message] = []
    if isinstance(row.get("system"), str) and role_of(rows[0]) != "system":
        messages.append(Message("system", row["system"]))
    calling = False  # the row before was nothing but a call
    for each in rows:
        was_calling, calling = calling, isinstance(each, dict) and name_of(each) in CALLS
        for message in split_results(read_message(plain(each)), after=messages[-1:]):
            message = with_calls(message, tools)
            if calling and was_calling:  # calls in a row are one reply that makes them all
                message = Message("assistant", messages[-1].content, messages.pop().calls + message.calls)
            messages.append(message)
    return messages


def name_of(row: dict[str, Any]) -> Any:
    return row.get("role", row.get("from"))


def role_of(row: Any) -> str | None:
    name = name_of(row) if isinstance(row, dict) else None
    return ROLES.get(name) if isinstance(name, str) else None


def plain(row: Any) -> Any:
    """A message with the four roles, its content as text and its calls as `tool_calls`, if it can be told."""
    role = role_of(row)
    if role is None:
        return row  # read_message says what is wrong with it
    content = row.get("content", row.get("value"))
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    calls = row.get("tool_calls") or ([row["function_call"]] if row.get("function_call") else [])
    if name_of(row) in CALLS and isinstance(content, str):
        calls, content = from_text(content, "a call"), ""
        calls = calls if isinstance(calls, list) else [calls]
    return {"role": role, "content": content, "tool_calls": calls}


def read_message(row: Any) -> Message:
    """A message as OpenAI writes it. Raises ValueError."""
    if not isinstance(row, dict) or row.get("role") not in ("system", "user", "assistant", "tool"):
        raise ValueError(f"a message needs a role (system, user, assistant or tool): {json.dumps(row)[:80]}")
    content = "" if row.get("content") is None else row["content"]
    if not isinstance(content, str):
        raise ValueError(f"the content of a message is not text: {json.dumps(content)[:80]}")
    calls = row.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(f"`tool_calls` is not a list: {json.dumps(calls)[:80]}")
    return Message(row["role"], content, tuple(read_call(each) for each in calls))


def read_call(row: Any) -> Call:
    """A tool call as OpenAI writes it, its arguments an object or an object's JSON."""
    function = row.get("function", row) if isinstance(row, dict) else None
    arguments = function.get("arguments", {}) if isinstance(function, dict) else None
    if isinstance(arguments, str):
        arguments = from_text(arguments, "the arguments of a call") if arguments.strip() else {}
    if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool call needs a name and arguments: {json.dumps(row)[:80]}")
    return Call(function["name"], arguments)


def split_results(message: Message, after: list[Message]) -> list[Message]:
    """Tool results that a data set wrote into a customer's message, as the tools' messages they are."""
    if message.role in ("user", "tool") and RESULTS.fullmatch(message.content):
        return [Message("tool", result.strip()) for result in RESULT.findall(message.content)]
    told = TOLD.fullmatch(message.content) if message.role == "user" and after and after[0].calls else None
    return [Message("tool", told[1])] if told else [message]


def with_calls(message: Message, tools: set[str]) -> Message:
    """An agent's message whose calls stand in its text, behind its thought, as <tool_call> blocks, with calls instead.

    Then each dialect can write it in its own way: a call of `respond` is speech in the native one. A
    text that cannot be read stays as it is, and is refused when its ids are read back.
    """
    if message.role != "assistant" or message.calls:
        return message
    thought, reply = thought_and_reply(message.content)  # what stands in a thought was not called
    if "<tool_call>" not in reply:
        return message
    if thought:
        thought += reply[: len(reply) - len(reply.lstrip())]  # it keeps what is between it and the words
    try:
        words, calls = read_reply(reply)
    except MalformedReply:
        return message
    said = calls[0].arguments.get("content") if len(calls) == 1 and calls[0].name == "respond" else None
    if isinstance(said, str) and not words and "respond" not in tools:
        return Message("assistant", thought + said)
    return Message("assistant", (thought + words).rstrip(), calls)


def from_text(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is text, but not JSON ({error}): {text[:60]!r}") from None
