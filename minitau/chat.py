"""Tokens in, tokens out: renders what the agent hears, parses what it said.

The checkpoint's own chat template decides the text. A conversation is rendered once, at its
opening; from then on each batch of messages becomes a *delta* of ids that is appended, so what was
sampled stays id for id where it was. This file knows two dialects and no domain:

  native       plain text speaks to the customer, <tool_call>{...}</tool_call> calls a tool
  single-call  every turn is exactly one tool call (words beside it are a thought that nobody hears);
               `respond` speaks and `done` ends the conversation

Parsing reads JSON and nothing else: no text of the model is ever evaluated.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from minitau.episode import Action, BadInput, Call, Message, Opening

DIALECTS = ("native", "single-call")
OPEN, CLOSE, THOUGHT, THOUGHT_END = "<tool_call>", "</tool_call>", "<think>", "</think>"
# What templates write around calls, results and thoughts: nobody else may.
MARKS = (OPEN, CLOSE, "<tool_response>", "</tool_response>", THOUGHT, THOUGHT_END)
MAX_DEPTH = 64  # of nested JSON in a call
SENTINEL = "sentinel-of-minitau"  # stands for the agent's reply when a delta is rendered

RESPOND = {
    "type": "function",
    "function": {
        "name": "respond",
        "description": "Say something to the customer.",
        "parameters": {
            "type": "object",
            "properties": {"content": {"type": "string"}},
            "required": ["content"],
        },
    },
}
DONE = {
    "type": "function",
    "function": {
        "name": "done",
        "description": "End the conversation.",
        "parameters": {"type": "object", "properties": {}},
    },
}
SINGLE_CALL_RULE = (
    "\n\nEvery reply must be exactly one tool call and nothing else. "
    "Speak to the customer with `respond`; end the conversation with `done`."
)


class ChatError(BadInput):
    """A tokenizer or chat template that minitau cannot speak through, in one line."""


class MalformedReply(ValueError):
    """The agent's reply is not one of the things an agent can do; the text tells it why."""


class Chat:
    """The bridge between messages and ids for one tokenizer and one dialect. Thread-safe.

    tokenizer: a transformers tokenizer with a chat template whose assistant messages end with its
    eos token. dialect: one of DIALECTS. Raises ChatError if the template cannot be continued.
    """

    def __init__(self, tokenizer: Any, dialect: str = "native"):
        if dialect not in DIALECTS:
            raise ChatError(f"unknown dialect {dialect!r}; choose from {', '.join(DIALECTS)}")
        if not getattr(tokenizer, "chat_template", None) or tokenizer.eos_token_id is None:
            missing = "chat template" if tokenizer.eos_token_id is not None else "eos token"
            raise ChatError(f"the tokenizer has no {missing}; use a chat checkpoint's")
        self.tokenizer = tokenizer
        self.dialect = dialect
        self.eos_id: int = tokenizer.eos_token_id
        # A reply may also end with a plain end of text, as Qwen3's generation config allows.
        vocabulary = tokenizer.get_vocab()
        self.stop_ids = frozenset({self.eos_id, vocabulary.get("<|endoftext|>", self.eos_id)})
        self.lock = threading.Lock()  # fast tokenizers are not safe to share between threads
        for role in ("user", "tool"):  # a template that cannot do this fails here, not in an episode
            if SENTINEL not in (delta := self.delta_text([Message(role, SENTINEL)])):
                raise ChatError(f"the chat template drops {role} messages")
        self.opens_thought = delta.rstrip().endswith(THOUGHT)  # as the templates of models do that always think

    def check_vocabulary(self, size: int) -> None:
        """Raise ChatError if the tokenizer has ids that a model of `size` tokens does not."""
        if len(self.tokenizer) > size:
            raise ChatError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model {size}; they do not belong together"
            )

    # -- rendering: what the agent hears ----------------------------------------------------------

    def open(self, opening: Opening) -> list[int]:
        """Ids of everything up to where the agent's first reply begins."""
        policy, tools = opening.policy, list(opening.tools)
        if self.dialect == "single-call":
            if {"respond", "done"} & {tool["function"]["name"] for tool in tools}:
                raise ChatError("a tool of this domain is called respond or done, as single-call's own are")
            policy, tools = policy + SINGLE_CALL_RULE, [*tools, RESPOND, DONE]
        messages = [Message("system", policy), *opening.messages]
        return self.encode(self.render([self.as_dict(m) for m in messages], tools, reply_next=True))

    def extend(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """The whole next prompt: `ids`, unchanged, then `messages`, then the head of the next reply.

        `ids` ends with what the agent said. If it did not stop by itself (cut at a length, or ended
        with end of text), its message is closed with eos first.
        """
        close = [] if ids[-1] == self.eos_id else [self.eos_id]
        return [*ids, *close, *self.encode(self.delta_text(messages))]

    def delta_text(self, messages: Sequence[Message]) -> str:
        """What the template writes between the eos of one reply and the beginning of the next."""
        before = [{"role": "user", "content": "x"}, {"role": "assistant", "content": SENTINEL}]
        text = self.render(before + [self.as_dict(m) for m in messages], None, reply_next=True)
        _, found, after = text.partition(SENTINEL)
        eos = self.tokenizer.eos_token
        if not found or not after.startswith(eos):
            raise ChatError(f"the chat template does not end an assistant message with {eos!r}")
        return after.removeprefix(eos)

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, reply_next: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=reply_next,
                enable_thinking=False,  # Qwen3's hybrid template; others ignore it
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:  # those that templates can raise
            raise ChatError(f"the chat template fails: {' '.join(str(error).split())}") from None

    def encode(self, text: str) -> list[int]:
        with self.lock:
            return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        with self.lock:
            return self.tokenizer.decode(ids, skip_special_tokens=False)

    def as_dict(self, message: Message) -> dict[str, Any]:
        """A message as templates take it. Control tokens are the template's alone to write, and marks
        are not for customers and tools to write: there a space breaks them up."""
        text = self.write_text(message) if message.role == "assistant" else message.content
        marks = MARKS if message.role in ("user", "tool") else ()
        for token in (*self.tokenizer.all_special_tokens, *marks):
            text = text.replace(token, token[0] + " " + token[1:])
        text = text.encode("utf-8", "replace").decode()  # half a character would break the tokenizer
        return {"role": message.role, "content": text}

    # -- the agent's side: what it said, and how a demonstration would say it ----------------------

    def write(self, message: Message) -> list[int]:
        """Ids of an assistant message as this dialect would have sampled it, eos included."""
        text = self.as_dict(message)["content"]
        if self.opens_thought:  # a demonstration goes on with its own, or ends it
            thinks = text.lstrip().startswith(THOUGHT)
            text = text.lstrip().removeprefix(THOUGHT).lstrip("\n") if thinks else f"{THOUGHT_END}\n\n{text}"
        return [*self.encode(text), self.eos_id]

    def write_text(self, message: Message) -> str:
        calls = message.calls
        if self.dialect == "single-call" and not calls and OPEN not in message.content:
            return call_text(Call("respond", {"content": message.content}))
        if self.dialect == "single-call" and len(calls) > 1:
            raise ChatError(f"a reply has {len(calls)} calls, the single-call dialect has one")
        parts = [message.content] if message.content else []
        return "\n".join(parts + [call_text(call) for call in calls])

    def parse(self, ids: Sequence[int], tools: Sequence[dict[str, Any]] | None, cut: bool = False) -> Action:
        """What the agent did by saying `ids`. Never raises: a reply that is no action has `.error`.

        `tools` are the schemas of the opening, if a call of any other tool is to be an error; `cut` says that the
        reply hit its length limit.
        """
        said = [i for i in ids if i not in self.stop_ids]
        text = self.decode(said)
        try:
            if cut:
                raise MalformedReply("the reply was too long and was cut off; be brief")
            return self.parse_text(text, None if tools is None else {tool["function"]["name"] for tool in tools})
        except MalformedReply as error:
            return Action(text=text, error=str(error))

    def parse_text(self, text: str, names: set[str] | None) -> Action:
        """The action that `text` is, of the tools of these names, or of any. Raises MalformedReply with what to tell
        the agent."""
        _, reply = thought_and_reply(text, self.opens_thought)
        spoken, calls = read_reply(reply)
        if self.dialect == "single-call":
            return single_call(calls, names)
        for call in calls:
            check_name(call, names)
        if not calls and not spoken:
            raise MalformedReply("the reply was empty; say something or call a tool")
        return Action(text=spoken, calls=calls)


def call_text(call: Call) -> str:
    body = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def single_call(calls: tuple[Call, ...], names: set[str] | None) -> Action:
    if len(calls) != 1:
        raise MalformedReply(f"a reply must be exactly one tool call, this one had {len(calls)}")
    call = calls[0]
    if call.name == "done":
        return Action(done=True)
    if call.name == "respond":
        content = call.arguments.get("content")
        if not isinstance(content, str) or not content.strip():
            raise MalformedReply("respond needs `content`, a text that is not empty")
        return Action(text=content)
    check_name(call, None if names is None else names | {"respond", "done"})
    return Action(calls=calls)


def check_name(call: Call, names: set[str] | None) -> None:
    if names is not None and call.name not in names:
        raise MalformedReply(f"there is no tool {call.name!r}; the tools are: {', '.join(sorted(names))}")


def thought_and_reply(text: str, opened: bool = False) -> tuple[str, str]:
    """The thought that `text` begins with or, `opened`, in ("" if with none), and the reply behind it. A </think>
    inside a call is only text."""
    end = text.find(THOUGHT_END)
    call = text.find(OPEN)
    if end < 0 or (0 <= call < end and not opened and not text.lstrip().startswith(THOUGHT)):
        return "", text
    behind = end + len(THOUGHT_END)
    return text[:behind], text[behind:]


def read_reply(text: str) -> tuple[str, tuple[Call, ...]]:
    """What is spoken, and the calls. Raises MalformedReply.

    The JSON itself decides where a call ends, so that a mark inside an argument is only text.
    """
    spoken, calls, at = [], [], 0
    while (start := text.find(OPEN, at)) >= 0:
        spoken.append(text[at:start])
        if CLOSE not in text[start:]:
            raise MalformedReply(f"a {OPEN} was opened but not closed")
        call, end = read_call(text, start + len(OPEN))
        if not text[end:].lstrip().startswith(CLOSE):
            raise MalformedReply(f"a {OPEN} is not closed by {CLOSE} right behind its JSON")
        calls.append(call)
        at = text.index(CLOSE, end) + len(CLOSE)
    spoken.append(text[at:])
    words = "".join(spoken).strip()
    if CLOSE in words:
        raise MalformedReply(f"a {CLOSE} was written, but its call not opened by {OPEN}")
    return words, tuple(calls)


def read_call(text: str, at: int) -> tuple[Call, int]:
    """The JSON object {"name": str, "arguments": object} at text[at:], and where it ends."""
    start = at + len(text[at:]) - len(text[at:].lstrip())
    try:
        row, end = DECODER.raw_decode(text, start)
        # Lone surrogates pass the JSON reader and break every file and tokenizer after it.
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise MalformedReply(f"a tool call is not valid JSON: {str(error)[:100]}") from None
    if depth(row) > MAX_DEPTH:
        raise MalformedReply(f"a tool call is nested more than {MAX_DEPTH} deep")
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise MalformedReply('a tool call must be {"name": ..., "arguments": {...}}')
    arguments = row.get("arguments", {})
    if not isinstance(arguments, dict):
        raise MalformedReply("the arguments of a tool call must be a JSON object")
    return Call(row["name"], arguments), end


def depth(value: Any) -> int:
    """How deep JSON is nested; not recursive, because the model chooses the depth."""
    deepest, level = 0, [value]
    while level:
        deepest += 1
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list))]
        level = [item for values in inner for item in values]
    return deepest


def refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def load_chat(model_dir: str | Path, dialect: str) -> Chat:
    """The Chat of a Hugging Face directory. Raises ChatError in one line."""
    from transformers import AutoTokenizer

    folder = Path(model_dir)
    if not (folder / "tokenizer_config.json").is_file():
        raise ChatError(f"{model_dir}: no tokenizer_config.json here; give a Hugging Face model directory")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ChatError(f"{model_dir}: tokenizer.json is missing; is the download complete?")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except Exception as error:  # what a damaged file makes of transformers is anybody's guess
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ChatError(f"{model_dir}: tokenizer cannot be loaded ({why})") from None
    try:
        return Chat(tokenizer, dialect)
    except ChatError as error:
        raise ChatError(f"{model_dir}: {error}") from None
