"""How fast weights reach an SGLang server on the trainer's GPU, whether they arrive, and what a rollout makes of it.

    python -m benchmarks.engine --engine-command "python -m sglang.launch_server" --work /tmp/engine
    torchrun --nproc_per_node 2 -m benchmarks.engine ...        # a server a rank, weights sharded over both
    torchrun --nproc_per_node 2 -m benchmarks.engine --engine-tp 2 --parts sync,drift,trains    # one over both GPUs
    python -m benchmarks.engine --engine-gpus 1 ...             # the server on a GPU of its own, weights by NCCL

starts a server a rank with a random Qwen3 of 4B parameters, of which the trainer (fp32 weights, sharded over several
ranks, bf16 compute) holds its own copy, and prints one JSON object, of rank 0 where nothing else is said; `--parts`
chooses:

sync      seconds of a whole sync, on the rank where each takes longest; the most memory that 50 took beside what was
          there before them, and what they leave behind; where the time goes (slower, for it waits after each part)
drift     mean |engine's - trainer's log-probability| over sampled text; and what it is when one tensor of the
          engine is stale, for several tensors, each alone. By sharpness, a factor on the head's weights: a random
          head at 1 makes logits with a standard deviation of 1, so that all 151,936 tokens are nearly as likely
          (11.4 nats of entropy), at 0.5 even more so. Rounding moves logits in proportion to their size, and so the
          figures. How far a trained model's would move, whose samples are likely ones, they do not say. And how far
          each of the two is from fp32 arithmetic on the same weights, rounded to bf16
trains    a forward and backward of the trainer beside the server that was synced: the gradient's norm
rollout   output tokens/s of 64 conversations at once (a rank) through rollout.collect, beside a bare load of the same
          shape from plain threads on the same server, in turns; requests outstanding on the average; the share of
          the time in which the engine had nothing to do
sleep     what releasing the KV cache gives back, and how long it and waking take
death     rank 0's server is killed under 64 requests (a rank): seconds until all are answered
trains_on as trains, after that

`--shape tiny --engine-command "env PYTHONPATH=. python tests/fake_sglang.py"` runs the same on a CPU, to see that it
works.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.engine_load import Load, measure_rollout
from benchmarks.flags import among, at_least
from benchmarks.mfu import SHAPES, where
from benchmarks.random_run import peak_gb
from minitau import batch, config, parallel, pretrained, probe, rollout, run, tiny
from minitau.chat import Chat, load_chat
from minitau.engines import handover
from minitau.engines.launch import open_sglang
from minitau.engines.sglang import SGLangEngine
from minitau.episode import Completion, Sampling
from minitau.model import Qwen3, init_weights
from minitau.script import run_script

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
    if parallel.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        tiny.write_tokenizer(folder, ["Hello there, how can I help you today? " * 9], 300)
        pretrained.write_config(folder, shape, torch.bfloat16, folder)
    with torch.device(parallel.device()):
        model = Qwen3(shape)
    init_weights(model, 0)
    if args.shape == "tiny" and parallel.is_main():  # the stand-in starts from a file
        pretrained.save_model(folder, shape, model.named_parameters(), torch.float32, folder)
    parallel.barrier()  # the files are there
    cfg = config.GRPO(
        model=str(folder),
        out=args.work,
        engine="sglang",
        engine_command=args.engine_command,
        engine_mem=args.engine_mem,
        engine_gpus=tuple(filter(None, args.engine_gpus.split(","))),
        engine_tp=args.engine_tp,
        engine_sleep=torch.cuda.is_available() and not args.engine_gpus,
        dtype=args.dtype,
        max_tokens=16_384,
        concurrency=64,
    )
    run.spread(model, cfg)
    chat = load_chat(folder, "native")
    probed = SimpleNamespace(model=model, chat=chat)  # what minitau.probe takes of a run
    return model, chat, open_sglang(cfg, chat.stop_ids, takes_weights=True), SimpleNamespace(run=probed, cfg=cfg)


# -- weights -----------------------------------------------------------------------------------------------


def measure_sync(engine: SGLangEngine, weights: parallel.FullWeights) -> dict[str, Any]:
    """Seconds and memory of syncs; after 3 to warm up, 50 in a row, and 10 more for where the time goes."""
    for version in range(3):
        engine.sync(weights, version)
    before, allocated = left_over(engine), allocated_gb()
    reset_peak()
    mine = [sync_seconds(engine, weights, version) for version in range(3, 53)]
    peak, after = peak_gb() - allocated, left_over(engine)
    seconds = [max(each) for each in zip(*parallel.gather(mine))]
    lengths = [tensor.numel() * engine.dtype.itemsize for _, tensor in weights.parts()]
    return {
        "bytes": sum(lengths),
        "seconds_median": statistics.median(seconds),
        "seconds_min_max": [min(seconds), max(seconds)],
        "seconds_each": [round(each, 4) for each in seconds],
        "peak_extra_gb": max(parallel.gather(peak)),
        "left_over_by_50": {name: after[name] - before[name] for name in before},
        "seconds_of_parts": parts_of_sync(engine, weights),
    }


def sync_seconds(engine: SGLangEngine, weights: parallel.FullWeights, version: int) -> float:
    parallel.barrier()
    start = time.perf_counter()
    engine.sync(weights, version)
    return time.perf_counter() - start


def parts_of_sync(engine: SGLangEngine, weights: parallel.FullWeights) -> dict[str, Any]:
    """Median over 10 syncs of the seconds spent filling buckets, making handles of them, and waiting for the server
    to take them; and of the requests' number. The GPU is waited for after each fill."""
    rows = []
    for version in range(53, 63):
        spent = {"fill": 0.0, "serialise": 0.0, "request": 0.0}

        @contextlib.contextmanager
        def clock(part: str) -> Iterator[None]:
            start = time.perf_counter()
            yield
            if torch.cuda.is_available() and part == "fill":
                torch.cuda.synchronize()
            spent[part] += time.perf_counter() - start  # noqa: B023 (called within this turn)

        def filled(*args: Any, take: Callable = handover.buckets) -> Iterator[handover.Bucket]:
            source = take(*args)
            while True:
                with clock("fill"):
                    bucket = next(source, None)
                if bucket is None:
                    return
                yield bucket

        def serialised(bucket: handover.Bucket, make: Callable = handover.serialize) -> str:
            with clock("serialise"):
                return make(bucket)

        def asked(*args: Any, ask: Callable = handover.request, **named: Any) -> Any:
            sent.append(1)  # noqa: B023
            with clock("request"):
                return ask(*args, **named)

        sent: list[int] = []
        with mock.patch.multiple(handover, buckets=filled, serialize=serialised, request=asked):
            whole = sync_seconds(engine, weights, version)
        rows.append({"whole": whole, **spent, "requests": len(sent)})
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def left_over(engine: SGLangEngine) -> dict[str, float]:
    """What might leak: open files here and in the processes of the server that this rank started, if it did; memory of
    the whole GPU in use."""
    pids = [os.getpid(), *(descendants(engine.server.process.pid) if engine.server else ())]
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


def allocated_gb() -> float:
    return torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def measure_drift(engine: SGLangEngine, weights: parallel.FullWeights, both: SimpleNamespace) -> dict[str, Any]:
    """What drift_of says at each sharpness. The head is the embedding as well, and is left as it was."""
    head, found = parallel.local(both.run.model.model.embed_tokens.weight), {}
    kept = head.clone()
    for version, sharpness in enumerate((1.0, 0.5), 100):
        head.copy_(kept * sharpness)
        engine.sync(weights, version)
        found[f"sharpness_{sharpness:g}"] = drift_of(engine, both, version)
    head.copy_(kept)
    engine.sync(weights, 102)
    found["from_fp32"] = from_fp32(engine, weights, both, 102)
    return found


@torch.no_grad()
def from_fp32(
    engine: SGLangEngine, weights: parallel.FullWeights, both: SimpleNamespace, version: int
) -> dict[str, float]:
    """Mean |log-probability - that in fp32| of engine and trainer, over what the engine samples: if theirs were one
    and the same they could still not be nearer to each other than the engine is to fp32."""
    with torch.device(parallel.device()):
        exact = Qwen3(both.run.model.cfg)
    dtype = getattr(torch, both.cfg.dtype)
    exact.load_state_dict({name: tensor.to(dtype).float() for name, tensor in weights})
    mbs = [probe.sampled(engine, both.run, version) for _ in range(4)]
    gaps: dict[str, list[torch.Tensor]] = {"engine": [], "trainer": [], "engine_from_trainer": []}
    for mb in mbs:
        exact_N = probe.forward(exact, mb, 1.0, "float32")[0]
        ours_N = probe.forward(both.run.model, mb, 1.0, both.cfg.dtype)[0]
        gaps["engine"].append(mb.rollout_N - exact_N)
        gaps["trainer"].append(ours_N - exact_N)
        gaps["engine_from_trainer"].append(mb.rollout_N - ours_N)
    return {name: float(torch.cat(each).abs().mean()) for name, each in gaps.items()}


def drift_of(engine: SGLangEngine, both: SimpleNamespace, version: int) -> dict[str, Any]:
    """The probe's figure, with all weights right, and with one tensor of the engine stale.

    Stale: the trainer's has moved since by as much as its own standard deviation; a norm, whose weights are ones,
    by half of that.
    """
    named = dict(both.run.model.named_parameters())
    layers = both.run.model.cfg.num_hidden_layers
    right = [probe.probe(engine, both.run, both.cfg, version) for _ in range(4)]
    stale = {}
    for name in (name.format(middle=layers // 2, last=layers - 1) for name in PERTURBED):
        mine = parallel.local(named[name])
        kept = mine.clone()
        with torch.no_grad():
            mine.add_(torch.randn_like(mine) * (0.5 if mine.ndim == 1 else kept.std()))
        stale[name] = probe.probe(engine, both.run, both.cfg, version)
        with torch.no_grad():
            mine.copy_(kept)
    again = probe.probe(engine, both.run, both.cfg, version)
    return {"mean": statistics.fmean(right), "each": right, "one_tensor_stale": stale, "and_right_again": again}


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
    """Kill rank 0's server while 64 requests run there, and as many on every other rank."""
    engine.stop_ids = []
    replies: list[Completion] = []

    def ask(i: int) -> None:
        replies.append(engine.generate([7 + i, 8, 9], Sampling(1.0, 256), session=str(i), seed=i))

    if parallel.is_main():
        victim = next(descendants(engine.server.process.pid))
        threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
    start = time.perf_counter()
    rollout.in_threads(ask, parallel.SharedQueue("death", 64, each_rank=True), 64, engine)
    return {
        "seconds": time.perf_counter() - start,
        "answered": len(replies),
        "deaths": engine.deaths,
        "versions": sorted({reply.weight_version for reply in replies}),
    }


def train_a_little(both: SimpleNamespace) -> float:
    """A forward and a backward: the gradient's norm."""
    model, ids = both.run.model, torch.arange(5, 2005, device=parallel.device()) % both.run.model.cfg.vocab_size
    rows = torch.arange(len(ids) - 1, device=ids.device)
    mb = batch.MicroBatch(ids, torch.arange(len(ids), device=ids.device), [0, len(ids)], rows, ids[1:], *[rows] * 4)
    logprobs_N, _ = probe.forward(model, mb, 1.0, both.cfg.dtype)
    parallel.backward(-logprobs_N.mean())
    norm = parallel.clip_grad_norm(model, 1e9)
    model.zero_grad()
    return norm


def load_of(shape: str) -> Load:
    return Load(64, 4096, 10, 64, 96) if shape == "4b" else Load(8, 64, 3, 8, 12)


PARTS: dict[str, Callable[[SimpleNamespace], Any]] = {
    "sync": lambda at: measure_sync(at.engine, at.weights),
    "drift": lambda at: measure_drift(at.engine, at.weights, at.both),
    "trains": lambda at: train_a_little(at.both),
    "rollout": lambda at: measure_rollout(at.engine, at.chat, load_of(at.args.shape), at.args.trials),
    "sleep": lambda at: measure_sleep(at.engine, at.weights),
    "death": lambda at: measure_death(at.engine),
    "trains_on": lambda at: train_a_little(at.both),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-command", default="")
    parser.add_argument("--engine-mem", type=float, default=0.4)
    parser.add_argument("--engine-gpus", default="", help="as train.py's")
    parser.add_argument("--engine-tp", type=at_least(1), default=1, help="as train.py's")
    parser.add_argument("--parts", type=among(PARTS), default=list(PARTS), help="comma-separated, in the order wanted")
    parser.add_argument("--trials", type=at_least(1), default=6, help="rollout: of each load, in turns")
    parser.add_argument("--work", default="outputs/benchmark-engine", help="folder for the model's config and the log")
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args(argv)
    parallel.start()
    start = time.perf_counter()
    model, chat, engine, both = open_both(args)
    at = SimpleNamespace(args=args, engine=engine, chat=chat, both=both)
    at.weights = parallel.FullWeights(model, getattr(torch, args.dtype))
    result: dict[str, Any] = {"shape": args.shape, "engine_gpus": args.engine_gpus, "tp": args.engine_tp, **where()}
    result["start_seconds"] = time.perf_counter() - start
    try:
        engine.sync(at.weights, 0)
        for name in args.parts:
            result[name] = PARTS[name](at)
            result["seconds"] = time.perf_counter() - start
            if parallel.is_main():
                (Path(args.work) / "engine.json").write_text(json.dumps(result, indent=1))  # if it breaks off
    finally:
        engine.close()
    parallel.stop()
    if parallel.is_main():
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(run_script("benchmarks.engine", main, sys.argv[1:]))
