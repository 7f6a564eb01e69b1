"""Agents and customers that follow a script: demonstrations and floors without any model."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from minitau.envs.tau2.domain import find
from minitau.envs.tau2.gold import TRANSFER, gold
from minitau.envs.tau2.install import load
from minitau.episode import Action, BadInput, Call, Task

SCRIPTS = ("gold", "refuse", "transfer")


class Reader:
    """A customer that reads its lines, and says what its own tools showed it. It has the two methods
    of tau2's user simulator that an episode calls. It repeats its last line, which ends the conversation."""

    def __init__(self, lines: Sequence[dict[str, Any]]):
        self._lines = itertools.chain(lines, itertools.repeat(lines[-1]))

    def get_init_state(self, heard: list[Any]) -> Any:
        return SimpleNamespace(messages=heard)

    def generate_next_message(self, heard: Any, state: Any) -> tuple[Any, Any]:
        if heard.role == "tool":
            said = {"content": f"I did that. It says: {heard.tool_messages[0].content}"}
        else:
            said = copy.deepcopy(next(self._lines))  # episodes share lines, and may change their messages
        return load().message.UserMessage(role="user", **said), state


def script(task: Task, agent: str) -> tuple[list[Action], list[dict[str, Any]]]:
    """What the agent does, turn by turn, and what the customer answers to its words. Raises BadInput."""
    spec = find(task)
    told = spec.user_scenario.instructions
    plea = told if isinstance(told, str) else f"{told.reason_for_call}\n{told.known_info or ''}"
    lines: list[dict[str, Any]] = [{"content": plea}]
    transfer = Call(TRANSFER, {"summary": "This customer needs a human agent."})
    if agent == "refuse":
        return [Action("I am sorry, I cannot help you with that.")], [*lines, {"content": "###STOP###"}]
    if agent == "transfer":
        goodbye = Action("You are being transferred to a human agent.")
        return [Action(calls=(transfer,)), goodbye], [*lines, {"content": "###TRANSFER###"}]
    if agent != "gold":
        raise BadInput(f"unknown agent {agent!r}: tau2 has {', '.join(SCRIPTS)}")

    actions, answers = gold(task, plea)
    return actions, [*lines, *answers]


@functools.cache
def gold_lines(task: Task) -> Sequence[dict[str, Any]]:
    """What the gold script's customer says. Shared by all who ask: nobody changes it. Raises BadInput."""
    return tuple(script(task, "gold")[1])
