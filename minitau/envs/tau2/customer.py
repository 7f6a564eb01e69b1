"""The customer: tau2's own simulator, asked until it answers, and no longer than that makes sense."""

from __future__ import annotations

import functools
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minitau.envs.tau2.install import OWN_HTTP, load
from minitau.episode import Stop, UserError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds; each pause is about twice the one before it
AGAIN = (408, 409, 429)  # timeout, conflict, too many requests: the errors from 400 to 499 that pass by themselves
HINTS = {  # the commonest mistakes
    400: "a provider that litellm does not know, as a server of one's own is openai/NAME; or a request too long",
    401: "is the key in the environment, as in OPENAI_API_KEY?",
    404: "is --user-api-base right, with its /v1, and the model's name?",
}


class Customer:
    """One conversation of `player`, which is tau2's simulator or has its two methods.

    `name` is what an error calls it; `retries` is how often a request is made again.
    """

    def __init__(self, player: Any, heard: list[Any], *, name: str, retries: int):
        self._player, self._name, self._retries = player, name, retries
        self._state = player.get_init_state(heard)
        self.seconds = 0.0  # wall clock of all its answers

    def answer(self, heard: Any) -> Any:
        """The customer's next message, words or calls of its own tools, as tau2's UserMessage.

        Raises UserError after the last attempt.
        """
        start = time.perf_counter()
        try:
            return self._answer(heard)
        finally:
            self.seconds += time.perf_counter() - start

    def _answer(self, heard: Any) -> Any:
        known, reason = len(self._state.messages), ""
        for attempt in range(self._retries + 1):
            try:
                with connection_for(self._player):
                    said, self._state = self._player.generate_next_message(heard, self._state)
                if said.is_tool_call() or said.has_text_content():
                    return writable(said)
                reason, wait = "its message was empty", 0.0
            except Exception as error:
                status = getattr(error, "status_code", None)
                reason = told(error)
                if status and 400 <= status < 500 and status not in AGAIN:
                    break  # asking again cannot help: no key, no such model, too long
                wait = asked_to_wait(error)
            del self._state.messages[known:]  # tau2 has noted the question, and will do so again
            if attempt < self._retries:
                time.sleep(pause(attempt, wait))
        raise UserError(f"the customer, {self._name}, did not answer: {reason}")


def told(error: BaseException) -> str:
    """An error by its name and status alone, as its text may repeat a key or an address.

    Where no server listens, litellm speaks of a server's error 500.
    """
    cause: BaseException | None = error
    while cause := cause.__cause__ or cause.__context__:
        if type(cause).__name__ == "ConnectError":
            return "nothing listens at its address; is --user-api-base right, and the server up?"
    status = getattr(error, "status_code", None)
    hint = f"; {HINTS[status]}" if status in HINTS else ""
    return type(error).__name__ + (f" (status {status}{hint})" if status else "")


def writable(said: Any) -> Any:
    """A message without half characters (lone surrogates), which no file can hold and some models send."""
    said.content = said.content and whole(said.content)
    for call in said.tool_calls or ():
        call.arguments = json.loads(whole(json.dumps(call.arguments, ensure_ascii=False)))
    return said


def whole(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@contextmanager
def connection_for(player: Any) -> Iterator[None]:
    """Lend tau2's simulator a connection that no other episode uses meanwhile, where litellm can take one.

    By itself litellm sends all requests to OpenAI-compatible endpoints through one pool, which keeps 20
    connections and looks at each of them, under one lock, before and after every request.
    """
    if not (hasattr(player, "llm_args") and takes_connection(player.llm)):
        yield
        return
    try:
        connection = _idle.pop()  # as append, one step that no other thread can come between
    except IndexError:
        connection = new_connection()
    player.llm_args["client"] = connection
    try:
        yield
    finally:
        del player.llm_args["client"]
        _idle.append(connection)


_idle: list[Any] = []  # connections, kept open for whoever asks next


def new_connection() -> Any:
    from litellm.llms.custom_httpx import http_handler

    return http_handler.HTTPHandler(ssl_verify=certificates())


@functools.cache
def certificates() -> Any:
    """What litellm checks servers against: read from disk once, and not by a hundred threads at once."""
    from litellm.llms.custom_httpx import http_handler

    return http_handler.get_ssl_configuration()


@functools.cache
def takes_connection(model: str) -> bool:
    import litellm

    return litellm.get_llm_provider(model)[1] == "openai" and os.environ[OWN_HTTP].lower() == "true"


def without_price(model: str) -> None:
    """Tell litellm that a model it has never heard of costs nothing, which is what tau2 notes for it anyway.

    Else litellm looks for its price anew after every reply, under all names that it might go by: an eighth of a
    request's CPU. Prices that it knows stay as they are.
    """
    import litellm

    try:
        if litellm.get_llm_provider(model)[1] != "openai":
            return  # to say what it knows of others' models, litellm may ask their servers
        litellm.get_model_info(model)
    except litellm.BadRequestError:
        return  # it does not know the provider: the first request will say so
    except Exception:  # no price, in an exception that is another one in other versions
        what = ("input_cost_per_token", "output_cost_per_token")
        cached = ("cache_read_input_token_cost", "cache_creation_input_token_cost")
        free = dict.fromkeys((*what, *cached), 0.0)  # all four, or it warns
        litellm.register_model({model: {**free, "litellm_provider": "openai", "mode": "chat"}})


def pause(attempt: int, asked: float) -> float:
    """Seconds to wait after failed attempt 0, 1, ...: growing, and by lot, so that a hundred episodes that failed
    together do not come back together; and no less than the server `asked` for."""
    grown = FIRST_PAUSE * 2**attempt * random.uniform(0.5, 1.5)
    return min(max(grown, asked * random.uniform(1.0, 1.25)), LONGEST_PAUSE)


def asked_to_wait(error: Exception) -> float:
    """Seconds that the answer's Retry-After names; 0 if it has none, or a date instead."""
    headers = getattr(error, "litellm_response_headers", None) or {}
    try:
        return max(float(headers.get("retry-after", 0)), 0.0)
    except ValueError:
        return 0.0


def how_it_ends(words: str) -> Stop | None:
    """How the customer's words end the conversation, if they do."""
    user = load().user
    if user.TRANSFER in words:
        return Stop.TRANSFER
    return Stop.USER_STOP if user.STOP in words or user.OUT_OF_SCOPE in words else None
