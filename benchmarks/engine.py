"""How fast weights reach an SGLang server on the trainer's GPU, whether they arrive, and what a rollout makes of it.

    python benchmarks/engine.py --engine-command "python -m sglang.launch_server" --work /tmp/engine

starts one server with a random Qwen3 of 4B parameters, of which the trainer (fp32 weights under FSDP2, bf16
compute) holds its own copy, and prints one JSON object:

sync      seconds of a whole sync, the most memory it took beside the model's, and what 50 in a row leave behind
drift     mean |engine's - trainer's log-probability| over sampled text; and what it is when one tensor of the
          engine is stale, for several tensors, each alone
rollout   output tokens/s of 64 conversations at once through rollout.collect, beside a bare load of the same shape
          from plain threads on the same server; the share of the time in which the engine had nothing to do
sleep     what releasing the KV cache gives back, and how long it and waking take
death     the server is killed under 64 requests: seconds until all are answered

`--shape tiny` with tests/fake_sglang.py runs the same on a CPU, to see that it works.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import os
import signal
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch

from minitau import batch, checkpoint, config, parallel, probe, rollout, tiny
from minitau.chat import Chat, load_chat
from minitau.engines.launch import open_sglang
from minitau.engines.sglang import SGLangEngine
from minitau.episode import Action, Completion, Evaluation, Message, Observation, Opening, Sampling, Stop, Task
from minitau.model import ModelConfig, Qwen3

SHAPES = {
    "4b": ModelConfig(),
    "tiny": ModelConfig(2048, 64, 128, 2, 2, 1, 32),
}
# One tensor of each kind, from layers early and late.
PERTURBED = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.{middle}.self_attn.v_proj.weight",
    "model.layers.{middle}.mlp.gate_proj.weight",
    "model.layers.{last}.mlp.down_proj.weight",
    "model.layers.{last}.self_attn.k_norm.weight",
    "model.norm.weight",
)


# -- the model on both sides -------------------------------------------------------------------------------


def open_both(args: argparse.Namespace) -> tuple[Qwen3, Chat, SGLangEngine, SimpleNamespace]:
    """The trainer's model, a chat, and an engine without weights. The tokenizer is a small one: ids are ids."""
    folder, shape = Path(args.work) / "model", SHAPES[args.shape]
    tiny.write_tokenizer(folder_made(folder), ["Hello there, how can I help you today? " * 9], 300)
    checkpoint.write_config(folder, shape, torch.bfloat16, folder)
    with torch.device(parallel.device()):
        model = Qwen3(shape)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.02)
            model.model.embed_tokens.weight.mul_(args.sharpness)  # of what it samples: it is the head as well
    if args.shape == "tiny":  # the stand-in starts from a file
        checkpoint.save_pretrained(folder, shape, model.named_parameters(), torch.float32, folder)
    parallel.shard(model, model.model.layers, getattr(torch, args.dtype))
    cfg = config.GRPO(
        model=str(folder),
        out=args.work,
        engine="sglang",
        engine_command=args.engine_command,
        engine_mem=args.engine_mem,
        engine_sleep=torch.cuda.is_available(),
        dtype=args.dtype,
        max_tokens=16_384,
        concurrency=64,
    )
    chat = load_chat(folder, "native")
    run = SimpleNamespace(model=model, chat=chat)  # what minitau.probe takes of a run
    return model, chat, open_sglang(cfg, chat.stop_ids, takes_weights=True), SimpleNamespace(run=run, cfg=cfg)


def folder_made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# -- weights -----------------------------------------------------------------------------------------------


def measure_sync(engine: SGLangEngine, weights: parallel.FullWeights) -> dict[str, Any]:
    """Seconds and memory of syncs; after 3 to warm up, 50 in a row."""
    for version in range(3):
        engine.sync(weights, version)
    before = left_over(engine)
    reset_peak()
    seconds = []
    for version in range(3, 53):
        start = time.perf_counter()
        engine.sync(weights, version)
        seconds.append(time.perf_counter() - start)
    after = left_over(engine)
    return {
        "bytes": sum(tensor.numel() for _, tensor in weights) * 2,
        "seconds_median": statistics.median(seconds),
        "seconds_min_max": [min(seconds), max(seconds)],
        "peak_extra_gb": peak_extra_gb(),
        "left_over_by_50": {name: after[name] - before[name] for name in before},
    }


def left_over(engine: SGLangEngine) -> dict[str, float]:
    """What might leak: open files here and in the server's processes, memory of the whole GPU in use."""
    pids = [os.getpid(), *descendants(engine.server.process.pid)]
    files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
    if not torch.cuda.is_available():
        return {"files": files, "gpu_mb": 0.0}
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return {"files": files, "gpu_mb": (total - free) / 1e6}


def descendants(pid: int) -> Iterator[int]:
    for task in os.listdir(f"/proc/{pid}/task"):
        for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
            yield int(child)
            yield from descendants(int(child))


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_extra_gb() -> float:
    """The most that was allocated here since reset_peak, beside what is allocated now."""
    if not torch.cuda.is_available():
        return 0.0
    return (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()) / 1e9


def measure_drift(engine: SGLangEngine, weights: parallel.FullWeights, both: SimpleNamespace) -> dict[str, Any]:
    """The probe's figure, with all weights right, and with one tensor of the engine stale.

    Stale: the trainer's has moved since by as much as its own standard deviation; a norm, whose weights are ones,
    by half of that.
    """
    named = dict(both.run.model.named_parameters())
    layers = both.run.model.cfg.num_hidden_layers
    engine.sync(weights, 100)
    right = [probe.probe(engine, both.run, both.cfg, 100) for _ in range(4)]
    stale = {}
    for name in (name.format(middle=layers // 2, last=layers - 1) for name in PERTURBED):
        mine = parallel.local(named[name])
        kept = mine.clone()
        with torch.no_grad():
            mine.add_(torch.randn_like(mine) * (0.5 if mine.ndim == 1 else kept.std()))
        forget_gathered(both.run.model)
        stale[name] = probe.probe(engine, both.run, both.cfg, 100)
        with torch.no_grad():
            mine.copy_(kept)
        forget_gathered(both.run.model)
    again = probe.probe(engine, both.run, both.cfg, 100)
    return {"mean": statistics.fmean(right), "each": right, "one_tensor_stale": stale, "and_right_again": again}


def forget_gathered(model: Qwen3) -> None:
    """Iterating the weights gives back what a forward without backward left gathered: the root's, as they were."""
    for _ in parallel.FullWeights(model):
        pass


# -- rollout -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Load:
    """64 conversations that look like tau2's: a policy and tools that all share, then turns."""

    conversations: int
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


def measure_rollout(engine: SGLangEngine, chat: Chat, load: Load) -> dict[str, Any]:
    """Ours and the bare load, in turns, twice after one each to warm up."""
    vocabulary = engine.vocab_size
    asked: list[tuple[float, float]] = []
    plain = engine.generate

    def timed(*args: Any, **named: Any) -> Completion:
        start = time.perf_counter()
        completion = plain(*args, **named)
        asked.append((start, time.perf_counter()))
        return completion

    tasks = [Task("load", "", str(i)) for i in range(load.conversations)]
    world = SimpleNamespace(env=lambda: LoadEnv(load))
    sampling, limits = Sampling(1.0, load.said), rollout.Limits(max_turns=load.turns, max_tokens=16_384)
    stage = rollout.Stage(world, engine, LoadChat(chat, load, vocabulary), sampling, limits, load.conversations)
    ours, bare, idle = [], [], []
    engine.stop_ids = []  # so that every reply has its length
    for number in range(3):
        engine.control("flush_cache", {})
        asked.clear()
        engine.generate = timed
        start = time.perf_counter()
        played = rollout.collect([(task, 0) for task in tasks], stage, seed=f"load:{number}", label="load")
        end = time.perf_counter()
        engine.generate = plain
        assert not [t for t in played if t.stop.ours], played[0].detail
        ours.append(sum(sum(t.said) for t in played) / (end - start))
        idle.append(1 - busy_seconds(asked) / (end - start))
        engine.control("flush_cache", {})
        start = time.perf_counter()
        count = bare_load(engine, load)
        bare.append(count / (time.perf_counter() - start))
    engine.stop_ids = sorted(chat.stop_ids)
    return {
        "load": dataclasses.asdict(load),
        "ours_tokens_per_second": ours[1:],
        "bare_tokens_per_second": bare[1:],
        "ratio": sum(ours[1:]) / sum(bare[1:]),
        "engine_waits_share": statistics.fmean(idle[1:]),
    }


def busy_seconds(spans: Sequence[tuple[float, float]]) -> float:
    """How long at least one of the spans lasted."""
    total, until = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def bare_load(engine: SGLangEngine, load: Load) -> int:
    """The same prompts and lengths from threads that do nothing else; the number of output tokens."""
    shared = load.shared_ids(engine.vocab_size)
    heard = [[load.heard_ids(c, t, engine.vocab_size) for t in range(load.turns)] for c in range(load.conversations)]
    host, port = engine.url.removeprefix("http://").split(":")
    params = {"temperature": 1.0, "max_new_tokens": load.said, "stop_token_ids": [], "sampling_seed": 0}

    def converse(c: int) -> int:
        connection = http.client.HTTPConnection(host, int(port), timeout=600)
        ids, count = list(shared), 0
        for t in range(load.turns):
            ids += heard[c][t]
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
        return sum(pool.map(converse, range(load.conversations)))


# -- sleep and death ---------------------------------------------------------------------------------------


def measure_sleep(engine: SGLangEngine, weights: parallel.FullWeights) -> dict[str, Any]:
    awake = left_over(engine)["gpu_mb"]
    to_sleep = timed(engine.sleep)
    asleep = left_over(engine)["gpu_mb"]
    to_wake = timed(engine.wake)
    engine.sync(weights, 200)
    again = left_over(engine)["gpu_mb"]
    return {
        "sleep_seconds": to_sleep,
        "wake_seconds": to_wake,
        "gives_mb": awake - asleep,
        "not_back_mb": awake - again,
    }


def timed(do: Callable[[], Any]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def measure_death(engine: SGLangEngine) -> dict[str, Any]:
    """Kill the server while 64 requests run."""
    engine.stop_ids = []
    replies: list[Completion] = []

    def ask(i: int) -> None:
        replies.append(engine.generate([7 + i, 8, 9], Sampling(1.0, 256), session=str(i), seed=i))

    victim = next(descendants(engine.server.process.pid))
    threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
    start = time.perf_counter()
    rollout.in_threads(ask, parallel.SharedQueue("death", 64), 64, engine)
    return {
        "seconds": time.perf_counter() - start,
        "answered": len(replies),
        "deaths": engine.deaths,
        "versions": sorted({reply.weight_version for reply in replies}),
    }


def train_a_little(both: SimpleNamespace) -> float:
    """After all of it, a forward and backward still work: the gradient's norm."""
    model, ids = both.run.model, torch.arange(5, 2005, device=parallel.device()) % both.run.model.cfg.vocab_size
    rows = torch.arange(len(ids) - 1, device=ids.device)
    mb = batch.MicroBatch(ids, torch.arange(len(ids), device=ids.device), [0, len(ids)], rows, ids[1:], *[rows] * 4)
    logprobs_N, _ = probe.forward(model, mb, 1.0, both.cfg.dtype)
    parallel.backward(-logprobs_N.mean())
    norm = parallel.clip_grad_norm(model, 1e9)
    model.zero_grad()
    return norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-command", default="")
    parser.add_argument("--engine-mem", type=float, default=0.4)
    parser.add_argument("--work", default="outputs/benchmark-engine", help="folder for the model's config and the log")
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--sharpness", type=float, default=1.0, help="factor on the head's weights")
    args = parser.parse_args()
    big = args.shape == "4b"
    load = Load(64, 4096, 10, 64, 96) if big else Load(8, 64, 3, 8, 12)
    parallel.start()
    start = time.perf_counter()
    model, chat, engine, both = open_both(args)
    weights = parallel.FullWeights(model, getattr(torch, args.dtype))
    result: dict[str, Any] = {"shape": args.shape, "start_seconds": time.perf_counter() - start}
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()

    def add(name: str, measured: Any) -> None:
        result[name] = measured
        (Path(args.work) / "engine.json").write_text(json.dumps(result, indent=1))  # what is there if it breaks off

    try:
        add("sync", measure_sync(engine, weights))
        add("drift", measure_drift(engine, weights, both))
        add("rollout", measure_rollout(engine, chat, load))
        add("sleep", measure_sleep(engine, weights))
        add("death", measure_death(engine))
        add("trains_on", train_a_little(both))
    finally:
        engine.close()
        parallel.stop()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
