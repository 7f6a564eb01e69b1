"""The nouns of minitau: what an episode is made of, and the two protocols it is played through.

Everything else is a verb on these records. This file imports nothing of ours, knows no model,
no tokenizer and no domain. Every record is plain data that survives a round trip through JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


class BadInput(ValueError):
    """What the user gave cannot be used. The message is one line and says what to do."""


class Stop(StrEnum):
    """Why an episode ended. Each episode has exactly one."""

    USER_STOP = "user_stop"  # the customer had what it came for, or gave up
    TRANSFER = "transfer"  # the customer was handed to a human
    AGENT_STOP = "agent_stop"  # the agent ended the conversation
    MAX_TURNS = "max_turns"  # the conversation had all the turns it gets
    MAX_TOKENS = "max_tokens"  # the context is full
    BAD_CALLS = "bad_calls"  # too many malformed replies in a row, or failed calls in all
    USER_ERROR = "user_error"  # ours: see UserError
    ENGINE_ERROR = "engine_error"  # ours: see EngineError
    ENV_ERROR = "env_error"  # ours: see EnvError

    @property
    def ours(self) -> bool:
        """True if the episode says nothing about the agent and is kept out of loss and score."""
        return self in (Stop.USER_ERROR, Stop.ENGINE_ERROR, Stop.ENV_ERROR)


class EpisodeError(Exception):
    """Something of ours, not of the agent's, broke an episode: it is counted, never trained on."""

    stop = Stop.ENV_ERROR


class UserError(EpisodeError):
    """The customer (or the endpoint that plays it) did not answer."""

    stop = Stop.USER_ERROR


class EngineError(EpisodeError):
    """The engine did not answer, after the retries it makes by itself."""

    stop = Stop.ENGINE_ERROR


class EnvError(EpisodeError):
    """The environment or its grader raised on a well-formed action."""

    stop = Stop.ENV_ERROR


@dataclass(frozen=True)
class Task:
    """One thing to do, by name. The environment of `domain` knows what it means."""

    domain: str
    split: str
    id: str

    @property
    def key(self) -> str:
        return f"{self.domain}/{self.split}/{self.id}"


@dataclass(frozen=True)
class Call:
    """One call of a tool. `arguments` is a JSON object."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Action:
    """What the agent did in one turn. Exactly one of four things:

    it spoke to the customer (`text`), called tools (`calls`, and then `text` is a thought that the
    customer does not hear), ended the conversation (`done`), or wrote what cannot be parsed (`error` says
    why; such an action is answered in the conversation and never reaches the environment).
    """

    text: str = ""
    calls: tuple[Call, ...] = ()
    done: bool = False
    error: str = ""


@dataclass(frozen=True)
class Message:
    """One message of a conversation, as text. Text is a view: the record is token ids."""

    role: str  # "user" | "assistant" | "tool" | "system"
    content: str = ""
    calls: tuple[Call, ...] = ()  # only on "assistant"


@dataclass(frozen=True)
class Opening:
    """What the agent is given before its first turn."""

    policy: str  # the text of the system message
    tools: tuple[dict[str, Any], ...]  # OpenAI function schemas
    messages: tuple[Message, ...]  # the greeting, if the domain has one, and the customer's first words
    user_seconds: float = field(default=0.0, compare=False)  # how long the customer took to say them
    stop: Stop | None = None  # if it is over before the agent's first turn
    # Whether the environment answers also a call of a tool that there is not, which else is a malformed reply.
    answers_any_call: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Observation:
    """What the agent hears after an action: `user` or `tool` messages, and `stop` once it is over."""

    messages: tuple[Message, ...] = ()
    stop: Stop | None = None
    user_seconds: float = field(default=0.0, compare=False)  # how long the customer took to answer


@dataclass(frozen=True)
class Check:
    """One thing the grader looked at. `kind` is one of action, communicate, env, db."""

    kind: str
    name: str
    passed: bool


@dataclass(frozen=True)
class Evaluation:
    """The grader's verdict. `reward` is in [0, 1] and is never changed afterwards."""

    reward: float
    checks: tuple[Check, ...] = ()
    note: str = ""  # why the grader could not replay the episode, which then earns 0


@dataclass(frozen=True)
class Demonstration:
    """An episode played by a script instead of a model: text only, nothing was sampled."""

    task: Task
    opening: Opening
    messages: tuple[Message, ...]  # what came after the opening
    evaluation: Evaluation
    stop: Stop


@dataclass(frozen=True)
class Sampling:
    """How the engine draws tokens. Log-probabilities are those of softmax(logits / temperature)."""

    temperature: float = 1.0  # 0 is greedy; its log-probabilities are those at temperature 1
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Completion:
    """What the engine sampled: `ids` includes the stop token; `logprobs` has one number an id."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str  # "stop" | "length"
    weight_version: int  # of the weights that sampled it


@dataclass(frozen=True)
class Turn:
    """Where one completion stands in a trajectory: ids[start:end] were sampled by the agent."""

    start: int
    end: int
    weight_version: int
    error: str = ""  # why the reply could not be parsed, if it could not


@dataclass
class Trajectory:
    """One episode, as the trainer sees it and as the disk keeps it.

    `ids` is the whole conversation, append-only, exactly as it went through the engine. `said`
    marks the ids that the agent sampled (the only ones with a loss); `logprobs` holds the
    sampler's log-probability there and 0.0 elsewhere. The three have the same length.
    """

    task: Task
    sample: int  # which attempt at this task, 0..G-1
    ids: list[int] = field(default_factory=list)
    said: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    stop: Stop | None = None
    evaluation: Evaluation | None = None  # None when `stop.ours`
    detail: str = ""  # the error's text when `stop.ours`
    seconds: dict[str, float] = field(default_factory=dict)  # wall clock: policy, user, env, evaluate

    @property
    def reward(self) -> float:
        """The grader's reward; 0.0 for an episode without a verdict."""
        return self.evaluation.reward if self.evaluation else 0.0

    @property
    def success(self) -> bool:
        return self.reward >= 1.0

    def turn_of(self) -> dict[int, int]:
        """Which turn each of the agent's messages is, by their indices.

        Assistant messages before the first turn are the domain's greeting, which nobody sampled; a script has no turns.
        """
        said = [i for i, message in enumerate(self.messages) if message.role == "assistant"]
        return dict(zip(said[len(said) - len(self.turns) :], range(len(self.turns))))

    def hear(self, ids: Sequence[int]) -> None:
        """Append ids that the agent did not sample."""
        self.ids += ids
        self.said += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)

    def say(self, completion: Completion, error: str = "") -> None:
        """Append a completion, id for id, with the sampler's log-probabilities."""
        start = len(self.ids)
        self.ids += completion.ids
        self.said += [True] * len(completion.ids)
        self.logprobs += completion.logprobs
        self.turns.append(Turn(start, len(self.ids), completion.weight_version, error))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Trajectory:
        """The inverse of to_json. Raises KeyError, TypeError, ValueError or AttributeError on anything else."""
        task, evaluation = Task(**row["task"]), row["evaluation"]
        if not all(isinstance(name, str) for name in (task.domain, task.split, task.id)):
            raise TypeError("a task's domain, split and id are texts")
        if len({len(row[name]) for name in ("ids", "said", "logprobs")}) != 1:
            raise ValueError("ids, said and logprobs are not of one length")
        if not all(isinstance(value, (int, float)) for value in row["seconds"].values()):
            raise TypeError("seconds are numbers")
        turns = [Turn(**turn) for turn in row["turns"]]
        if not all(isinstance(place, int) for turn in turns for place in (turn.start, turn.end)):
            raise TypeError("a turn's start and end are whole numbers")
        if evaluation is not None:
            if not isinstance(evaluation["reward"], (int, float)):
                raise TypeError("a reward is a number")
            checks = tuple(Check(**check) for check in evaluation["checks"])
            evaluation = Evaluation(evaluation["reward"], checks, evaluation["note"])
        return cls(
            **{
                **row,
                "task": task,
                "turns": turns,
                "messages": [message_from_json(message) for message in row["messages"]],
                "stop": None if row["stop"] is None else Stop(row["stop"]),
                "evaluation": evaluation,
            }
        )


def message_from_json(row: dict[str, Any]) -> Message:
    if not isinstance(row["role"], str) or not isinstance(row["content"], str):
        raise TypeError("a message's role and content are texts")
    return Message(row["role"], row["content"], tuple(Call(**call) for call in row["calls"]))


class Env(Protocol):
    """One live episode of a domain. Made fresh for each episode, used by one thread, may block."""

    def reset(self, task: Task, seed: str) -> Opening:
        """Start `task`. The same task and seed give the same customer. If the opening has a `stop` the episode is over,
        and graded without a step. Raises UserError, EnvError."""

    def step(self, action: Action) -> Observation:
        """Do what the agent did. A tool's own error is a `tool` message; raises UserError, EnvError."""

    def evaluate(self, stop: Stop) -> Evaluation:
        """Grade the episode that ended with `stop`. Raises EnvError if the grader itself fails, but not
        where it cannot replay the episode: an agent that breaks the replay must not get out of the loss that way."""


class World(Protocol):
    """A set of domains: names its tasks, makes an Env an episode, and plays its own scripts."""

    def tasks(self, domain: str, split: str) -> list[Task]:
        """All tasks, always in the same order. Raises BadInput, naming what exists, if unknown."""

    def env(self) -> Env:
        """A new environment for one episode."""

    def demonstrate(self, task: Task, agent: str, seed: str) -> Demonstration:
        """Play `task` with a script (gold, refuse, transfer, ...). Raises BadInput if unknown."""


class Engine(Protocol):
    """Samples from the policy. Thread-safe: many episodes ask at once and block."""

    def join(self) -> None:
        """One more thread will be asking. A batching engine may wait for all who joined."""

    def leave(self) -> None:
        """One asking thread fewer."""

    def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str, seed: int) -> Completion:
        """Continue `prompt_ids`. `session` names the episode, so that its prefix can stay cached;
        the draw depends on `seed`, not on who else is being served. Raises EngineError."""

    def sync(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """Take over (Hugging Face name, tensor) pairs in place, and forget what older ones cached."""

    def tend(self, version: int | None = None) -> None:
        """Called now and then, on every rank, by a thread that waits while others ask: what the engine
        cannot do in theirs. `version`: of the weights as they are now, if they changed since the last sync."""

    def sleep(self) -> None:
        """Give back memory that is not needed until the next sync; nothing may be asked before it."""

    def close(self) -> None:
        """Give back what the engine holds."""
