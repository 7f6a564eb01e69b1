"""64 conversations at once that look like tau2's, through minitau's rollout and through bare threads.

What they say is random; what counts is how much of it a server generates in a second when our loop is in between.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import statistics
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random
from types import SimpleNamespace
from typing import Any

from minitau import parallel, rollout
from minitau.chat import Chat
from minitau.engines.sglang import SGLangEngine
from minitau.episode import Action, Completion, Evaluation, Message, Observation, Opening, Sampling, Stop, Task


@dataclasses.dataclass(frozen=True)
class Load:
    """64 conversations that look like tau2's: a policy and tools that all share, then turns."""

    conversations: int  # at once, a rank
    shared: int  # tokens
    turns: int
    said: int  # tokens of a reply
    heard: int  # tokens between two replies

    def heard_ids(self, conversation: int, turn: int, vocabulary: int) -> list[int]:
        rng = Random(f"{conversation}:{turn}")
        return [rng.randrange(5, vocabulary) for _ in range(self.heard)]

    def shared_ids(self, vocabulary: int) -> list[int]:
        rng = Random("shared")
        return [rng.randrange(5, vocabulary) for _ in range(self.shared)]


class LoadChat:
    """Turns the load's turns into ids; parses as the real chat does, but takes every reply for words."""

    def __init__(self, chat: Chat, load: Load, vocabulary: int):
        self.chat, self.load, self.vocabulary = chat, load, vocabulary

    def open(self, opening: Opening) -> list[int]:
        own = self.load.heard_ids(int(opening.policy), 0, self.vocabulary)
        return self.load.shared_ids(self.vocabulary) + own

    def extend(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        conversation, turn = map(int, messages[0].content.split())
        return [*ids, *self.load.heard_ids(conversation, turn, self.vocabulary)]

    def parse(self, ids: Sequence[int], tools: Any, cut: bool = False) -> Action:
        self.chat.parse([i % 256 for i in ids], tools)
        return Action(text="words")


class LoadEnv:
    """A customer and tools that answer at once."""

    def __init__(self, load: Load):
        self.load = load

    def reset(self, task: Task, seed: str) -> Opening:
        self.task, self.turn = task, 0
        return Opening(task.id, (), ())

    def step(self, action: Action) -> Observation:
        self.turn += 1
        over = Stop.USER_STOP if self.turn == self.load.turns else None
        return Observation((Message("user", f"{self.task.id} {self.turn}"),), over)

    def evaluate(self, stop: Stop) -> Evaluation:
        return Evaluation(1.0)


def measure_rollout(engine: SGLangEngine, chat: Chat, load: Load, trials: int) -> dict[str, Any]:
    """Ours and the bare load, in turns that begin with the one or the other, after a short one each to warm up."""
    engine.stop_ids = []  # so that every reply has its length
    short = dataclasses.replace(load, turns=2)
    play_ours(engine, chat, short, "warm")
    play_bare(engine, short)
    ours, bare, outstanding, idle = [], [], [], []
    for number in range(trials):
        for mine in (True, False) if number % 2 == 0 else (False, True):
            if not mine:
                bare.append(play_bare(engine, load))
                continue
            speed, spans, seconds = play_ours(engine, chat, load, str(number))
            ours.append(speed)
            outstanding.append(sum(end - start for start, end in spans) / seconds)
            idle.append(1 - busy_seconds(spans) / seconds)
    engine.stop_ids = sorted(chat.stop_ids)
    return {
        "load": dataclasses.asdict(load),
        "ours_tokens_per_second": ours,
        "bare_tokens_per_second": bare,
        "ours_median": statistics.median(ours),
        "bare_median": statistics.median(bare),
        "ours_spread": (max(ours) - min(ours)) / statistics.median(ours),
        "bare_spread": (max(bare) - min(bare)) / statistics.median(bare),
        "ratio_median_of_pairs": statistics.median(mine / theirs for mine, theirs in zip(ours, bare)),
        "outstanding_requests_mean": statistics.fmean(outstanding),
        "engine_waits_share": statistics.fmean(idle),
    }


Spans = list[tuple[float, float]]  # of requests: from when to when


def play_ours(engine: SGLangEngine, chat: Chat, load: Load, name: str) -> tuple[float, Spans, float]:
    """Output tokens/s of all ranks through rollout.collect, this rank's requests, and the seconds of it all."""
    spans: Spans = []
    plain = engine.generate

    def timed(*args: Any, **named: Any) -> Completion:
        start = time.perf_counter()
        completion = plain(*args, **named)
        spans.append((start, time.perf_counter()))
        return completion

    jobs = [(Task("load", "", str(i)), 0) for i in range(load.conversations * parallel.world_size())]
    world = SimpleNamespace(env=lambda: LoadEnv(load))
    sampling, limits = Sampling(1.0, load.said), rollout.Limits(max_turns=load.turns, max_tokens=16_384)
    talk = LoadChat(chat, load, engine.vocab_size)
    stage = rollout.Stage(world, engine, talk, sampling, limits, load.conversations)
    engine.control("flush_cache", {})
    engine.generate = timed
    parallel.barrier()
    start = time.perf_counter()
    played = rollout.collect(jobs, stage, seed=f"load:{name}", label="load")
    seconds = time.perf_counter() - start
    del engine.generate  # the method's own again
    assert not [t for t in played if t.stop.ours], played[0].detail
    said = sum(sum(t.said) for t in played)
    # (Nearly: a server knows the model's own end of text too, which one of 152k random tokens in a row may be.)
    assert said > 0.99 * len(jobs) * load.turns * load.said, "replies end early"
    return said / seconds, spans, seconds


def play_bare(engine: SGLangEngine, load: Load) -> float:
    """Output tokens/s of all ranks when nothing of ours is in between."""
    talks = [parallel.rank() * load.conversations + i for i in range(load.conversations)]
    heard = [[load.heard_ids(c, t, engine.vocab_size) for t in range(load.turns)] for c in talks]
    engine.control("flush_cache", {})
    parallel.barrier()
    start = time.perf_counter()
    said = bare_load(engine, load, heard)
    said = parallel.sum_over_ranks({"said": said})["said"]
    return said / (time.perf_counter() - start)


def busy_seconds(spans: Sequence[tuple[float, float]]) -> float:
    """How long at least one of the spans lasted."""
    total, until = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def bare_load(engine: SGLangEngine, load: Load, heard: Sequence[Sequence[list[int]]]) -> int:
    """Converse from threads that do nothing else, with what is heard by conversation and turn; the number of output
    tokens."""
    shared = load.shared_ids(engine.vocab_size)
    host, port = engine.url.removeprefix("http://").split(":")
    params = {"temperature": 1.0, "max_new_tokens": load.said, "stop_token_ids": [], "sampling_seed": 0}

    def converse(turns: Sequence[list[int]]) -> int:
        connection = http.client.HTTPConnection(host, int(port), timeout=600)
        ids, count = list(shared), 0
        for turn in turns:
            ids += turn
            body = {
                "input_ids": ids,
                "sampling_params": params,
                "return_logprob": True,
                "rid": uuid.uuid4().hex,
            }
            connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
            reply = json.loads(connection.getresponse().read())
            ids, count = ids + reply["output_ids"], count + len(reply["output_ids"])
        return count

    with ThreadPoolExecutor(load.conversations) as pool:
        return sum(pool.map(converse, heard))
