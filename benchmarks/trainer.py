"""How fast the trainer is at a 4B model's shape, what memory it takes, and whether its numbers are right.

    python -m benchmarks.trainer --parts speed,memory,numbers --out trainer.json
    torchrun --nproc_per_node 2 -m benchmarks.trainer --parts speed,ranks    # over two GPUs

Random weights, fp32 master weights and AdamW, bf16 compute, through train.sft_loss and run.update as they are. Prints
one JSON object:

speed     seconds of a step (forward, loss, backward, clipping, AdamW) on 16,384 packed tokens of mixed lengths a rank,
          all of them predicted, one micro-batch; tokens/s of all ranks, MFU (see mfu.py) and peak memory of one, for
          several settings; where the time goes by kind of kernel
memory    the same for 32,768 tokens; and the peak of the head alone for three vocabularies
numbers   differences of log-probabilities and gradients to transformers' model in fp32 on the same weights; compiled or
          not, recomputed or not
ranks     differences of log-probabilities and gradients between all ranks with a part of a batch each, weights sharded,
          and one process with all of it; in fp32 and in bf16
Differences (see same_numbers.py) are held against its TOLERANCES: what exceeds them is named, and the exit status is 1.

`--shape tiny` runs the same on a CPU, to see that it works.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import train
from benchmarks import same_numbers
from benchmarks.engine_load import busy_seconds
from benchmarks.flags import among, at_least
from benchmarks.mfu import SHAPES, mfu, where
from benchmarks.random_run import free_everything, lengths_of, micro_batch, open_run, peak_gb, settings, synchronize
from minitau import attention, batch, config, memory, parallel, run
from minitau.head import HeadLogprobs, WeightedLogprobs
from minitau.model import ModelConfig
from minitau.script import run_script

# -- speed -------------------------------------------------------------------------------------------------


def measure_steps(
    opened: SimpleNamespace, cfg: config.SFT, lengths: list[int], steps: int, micro_batches: int = 1
) -> dict[str, Any]:
    """Median step after two to warm up, of that many micro-batches of these lengths."""
    shape, seconds = opened.model.cfg, []
    free_everything()

    def loss_of(mb: batch.MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return train.sft_loss(opened.model, mb, cfg.dtype)

    start_all = time.perf_counter()
    for step in range(2 + steps):
        first = 1000 * parallel.rank() + 100 * step
        mbs = [micro_batch(shape, lengths, seed=first + i) for i in range(micro_batches)]
        synchronize()
        start = time.perf_counter()
        result = run.update(opened, cfg, mbs, loss_of, 1e-6)
        synchronize()
        seconds.append(time.perf_counter() - start)
        if step == 1:
            warm = time.perf_counter() - start_all
    median = statistics.median(seconds[2:])
    return {
        "seconds": seconds[2:],
        "median": median,
        "tokens_per_second": parallel.world_size() * micro_batches * sum(lengths) / median,
        "mfu": mfu(shape, lengths, median / micro_batches),
        "peak_gb": peak_gb(),
        "recomputed_blocks": opened.model.recomputed(sum(lengths)),
        "warm_up_seconds": warm,
        "loss": result["loss"],
        "grad_norm": result["grad_norm"],
    }


def kernel_times(opened: SimpleNamespace, cfg: config.SFT, lengths: list[int]) -> dict[str, Any]:
    """Milliseconds of one step on the GPU: in which at least one kernel ran, by kind of kernel, by stream, and of the
    longest kernels by name and by what asked for them; and the longest times in which none ran, by the kernels around
    them. Kernels of several streams run at once, so their sum may be more than the step."""
    mb = micro_batch(opened.model.cfg, lengths)
    synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run.update(opened, cfg, [mb], lambda mb: train.sft_loss(opened.model, mb, cfg.dtype), 1e-6)
        synchronize()
    kinds: dict[str, float] = defaultdict(float)
    names: dict[str, float] = defaultdict(float)
    streams: dict[str, float] = defaultdict(float)
    spans = []
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() != torch.autograd.DeviceType.CUDA or event.name().startswith(RANGES):
            continue
        spent = event.duration_ns() / 1e6
        kinds[kind_of(event.name())] += spent
        names[event.name()[:90]] += spent
        streams[f"stream {event.device_resource_id()}, {kind_of(event.name())}"] += spent
        spans.append((event.start_ns() / 1e6, event.start_ns() / 1e6 + spent, event.name()[:60]))
    asked = [each for each in profiler.key_averages() if each.device_type == torch.autograd.DeviceType.CPU]
    asked.sort(key=lambda each: -each.self_device_time_total)
    return {
        "busy": busy_seconds([span[:2] for span in spans]),
        "longest_gaps": gaps(spans)[:12],
        "by_kind": dict(kinds),
        "by_stream_and_kind": dict(streams),
        "longest": dict(sorted(names.items(), key=lambda pair: -pair[1])[:25]),
        "asked_for_by": {each.key[:90]: each.self_device_time_total / 1e3 for each in asked[:25]},
    }


def gaps(spans: list[tuple[float, float, str]]) -> list[tuple[float, str, str]]:
    """The times between spans, the longest first: how long, what ended before it, and what came next."""
    found, until, last = [], math.inf, ""
    for start, end, name in sorted(spans):
        if start > until:
            found.append((start - until, last, name))
        if end > until or math.isinf(until):
            until, last = end, name
    return sorted(found, reverse=True)


RANGES = ("FSDP::", "Optimizer.", "nccl:", "## Call", "Torch-Compiled")  # no kernels, but what torch was doing
KINDS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas"),
    "attention": ("flash", "attn"),
    "AdamW": ("adam",),
    "compiled": ("triton",),
    "copies": ("memcpy", "memset", "copy", "cat", "split"),
}


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    if "flash" in name or "attn" in name:  # before cutlass, in whose names it stands as well
        return "attention"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def measure_speed(args: argparse.Namespace) -> dict[str, Any]:
    lengths = lengths_of(args)
    found: dict[str, Any] = {"lengths": lengths}
    cfg = settings(args, lengths)
    opened = open_run(args, cfg)
    for recompute in ("auto", "all"):
        each = settings(args, lengths, recompute=recompute)
        found[f"recompute {recompute}"] = measure_steps(opened, each, lengths, args.steps)
    if torch.cuda.is_available():
        found["kernels_ms"] = kernel_times(opened, cfg, lengths)
    if args.kernels and torch.cuda.is_available():
        attention.kernel = lambda: attention.torch_varlen
        torch._dynamo.reset()
        found["torch's attention"] = measure_steps(opened, cfg, lengths, args.steps)
        attention.kernel = KERNEL
    if args.eager:
        torch.compiler.set_stance("force_eager")
        opened.model.compiled = False  # for what it keeps
        found["not compiled"] = measure_steps(opened, cfg, lengths, args.steps)
        torch.compiler.set_stance("default")
    return found


KERNEL = attention.kernel


# -- memory ------------------------------------------------------------------------------------------------


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Twice the tokens in a micro-batch, two of them a step; and the head's peak, which should not grow with the
    vocabulary."""
    lengths = [2 * n for n in lengths_of(args)]
    cfg = settings(args, lengths)
    opened = open_run(args, cfg)
    found = {"step": measure_steps(opened, cfg, lengths, 2, micro_batches=2)}
    shape = opened.model.cfg
    everything = settings(args, lengths, recompute="all")
    found["all recomputed"] = measure_steps(opened, everything, lengths, 1, micro_batches=2)
    found["needs_gb"] = {k: v / 1e9 for k, v in vars(memory.needs(shape, sum(lengths), 1)).items()}
    del opened
    free_everything()
    for name, weighted in (("head_extra_gb", False), ("head_of_sft_extra_gb", True)):
        found[name] = {
            str(size): head_extra_gb(shape, size, sum(lengths), getattr(torch, args.dtype), weighted)
            for size in (shape.vocab_size // 4, shape.vocab_size, 4 * shape.vocab_size)
        }
    return found


def head_extra_gb(shape: ModelConfig, vocabulary: int, tokens: int, dtype: torch.dtype, weighted: bool) -> float:
    """Peak memory of the head's forward and backward, less its inputs and the gradient of its weight. weighted: of
    SFT's, which knows the weights of its log-probabilities before."""
    device = parallel.device()
    hidden = torch.randn(tokens, shape.hidden_size, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, shape.hidden_size, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    for _ in range(2):
        hidden.grad = weight.grad = None
        free_everything()
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        if weighted:
            mean, *_ = WeightedLogprobs.apply(
                hidden, weight, targets, torch.full((tokens,), 1 / tokens).to(device), 1.0
            )
        else:
            mean = HeadLogprobs.apply(hidden, weight, targets, 1.0)[0].mean()
        mean.backward()
        peak = peak_gb() - before / 1e9
    of_weight = weight.numel() * (4 + dtype.itemsize) / 1e9  # its gradient, as sum in fp32 and as result
    return peak - of_weight


# -- the command -------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "speed": measure_speed,
    "memory": measure_memory,
    "numbers": same_numbers.measure_numbers,
    "ranks": same_numbers.measure_ranks,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=among(PARTS), default=["speed", "memory", "numbers"], help="comma-separated")
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=at_least(1), default=5, help="timed steps of each setting")
    parser.add_argument("--kernels", action="store_true", help="speed: with torch's attention as well")
    parser.add_argument("--eager", action="store_true", help="speed: not compiled as well")
    parser.add_argument("--out", default="", help="file for the JSON, written after each part")
    args = parser.parse_args(argv)
    parallel.start()
    result: dict[str, Any] = {"shape": args.shape, **where(), "exceeded": []}
    if torch.cuda.is_available():
        result["attention"] = attention.kernel().__name__
    for part in args.parts:
        result[part] = PARTS[part](args)
        result["exceeded"] += itertools.chain(*parallel.gather(same_numbers.exceeded(part, result[part])))
        free_everything()
        if args.out and parallel.is_main():
            Path(args.out).write_text(json.dumps(result, indent=1))
    parallel.stop()
    if parallel.is_main():
        print(json.dumps(result, indent=1))
    return int(bool(result["exceeded"]))


if __name__ == "__main__":
    sys.exit(run_script("benchmarks.trainer", main, sys.argv[1:]))
