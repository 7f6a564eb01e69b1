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
Differences are held against TOLERANCES: what exceeds them is named, and the exit status is 1.

`--shape tiny` runs the same on a CPU, to see that it works.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import train
from benchmarks.engine_load import busy_seconds
from benchmarks.mfu import LENGTHS, SHAPES, among, mfu, where
from minitau import attention, batch, config, memory, parallel, run
from minitau.attention import has_kernel
from minitau.head import HeadLogprobs, WeightedLogprobs
from minitau.model import ModelConfig, Qwen3, init_weights

# -- a run without a folder --------------------------------------------------------------------------------


def lengths_of(args: argparse.Namespace) -> list[int]:
    return list(LENGTHS) if args.shape == "4b" else [64, 32, 16]


def settings(args: argparse.Namespace, lengths: list[int], **also: Any) -> config.SFT:
    return config.SFT(dtype=args.dtype, micro_batch_tokens=sum(lengths), **also)


def open_run(args: argparse.Namespace, cfg: config.SFT) -> SimpleNamespace:
    """What run.update takes of a run: a random model, sharded, and its optimizer."""
    model = random_model(SHAPES[args.shape])
    run.spread(model, cfg)
    return SimpleNamespace(model=model, optimizer=run.adamw(model, cfg))


def random_model(shape: ModelConfig) -> Qwen3:
    """In fp32 on this process's device, and drawn there: a CPU would take a minute."""
    with torch.device(parallel.device()):
        model = Qwen3(shape)
    init_weights(model, 0)
    return model


def micro_batch(cfg: ModelConfig, lengths: list[int], seed: int = 0) -> batch.MicroBatch:
    """Random ids; every token but the first of a sequence is predicted."""
    device = parallel.device()
    generator = torch.Generator(device).manual_seed(seed)
    ids_T = torch.randint(5, cfg.vocab_size, (sum(lengths),), generator=generator, device=device)
    positions_T = torch.cat([torch.arange(n, device=device) for n in lengths])
    targets_N = positions_T.nonzero().squeeze(1)
    values_N = torch.zeros(len(targets_N), device=device)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    weights_N = torch.full_like(values_N, 1 / (len(targets_N) * parallel.world_size()))
    sequence_N = torch.zeros_like(targets_N)
    return batch.MicroBatch(
        ids_T, positions_T, bounds, targets_N - 1, ids_T[targets_N], sequence_N, values_N, values_N, weights_N
    )


def free_everything() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


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


# -- numbers -----------------------------------------------------------------------------------------------


def measure_numbers(args: argparse.Namespace) -> dict[str, Any]:
    """Log-probabilities of the same weights and tokens, and the gradient of their mean, computed several ways."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape, device = SHAPES[args.shape], parallel.device()
    lengths = [2048, 512, 64] if args.shape == "4b" else lengths_of(args)
    mb = micro_batch(shape, lengths)
    exact = random_model(shape)
    with torch.device(device):
        theirs_cfg = Qwen3Config(**vars(shape), attn_implementation="sdpa")
        theirs = Qwen3ForCausalLM(theirs_cfg).float()
    theirs.load_state_dict(exact.state_dict(), strict=False)
    theirs.tie_weights()
    frequencies = theirs.model.rotary_emb.inv_freq.clone()
    found: dict[str, Any] = {"lengths": lengths}
    reference = of_transformers(theirs, mb)
    reference.mean().backward()
    reference = reference.detach()
    gradient_of_theirs = taken_gradient(theirs)
    with torch.no_grad():
        theirs.bfloat16().model.rotary_emb.inv_freq = frequencies  # which transformers keeps in fp32 when it loads
        found["transformers in bf16"] = difference(of_transformers(theirs, mb), reference)
    del theirs
    free_everything()
    gradient32, logprobs = gradient_of(exact, [mb], "float32")
    found["fp32"] = difference(logprobs, reference) | {
        "gradient_relative_to_transformers": relative(gradient32, gradient_of_theirs)
    }
    half = exact.bfloat16()
    if device.type == "cuda":
        half.compile_blocks()
    gradients = {}
    for name, keep, stance, weighted in (
        ("compiled", float("inf"), "default", False),
        ("compiled, once more", float("inf"), "default", False),  # attention's backward adds up in any order
        ("compiled, recomputed", 0, "default", False),
        ("compiled, SFT's head", float("inf"), "default", True),
        ("eager", float("inf"), "force_eager", False),
    ):
        torch.compiler.set_stance(stance)
        half.keep = keep
        gradients[name], logprobs = gradient_of(half, [mb], "bfloat16", weighted=weighted)
        found[f"bf16, {name}"] = difference(logprobs, reference) | {
            "gradient_relative_to_fp32": relative(gradients[name], gradient32),
            "gradient_relative_to_compiled": relative(gradients[name], gradients["compiled"]),
        }
    torch.compiler.set_stance("default")
    return found


def of_transformers(model: Any, mb: batch.MicroBatch) -> Tensor:
    """Sequence by sequence; (N,)."""
    found, ids_by_sequence = [], mb.ids_T.split([b - a for a, b in zip(mb.cu_seqlens, mb.cu_seqlens[1:])])
    for ids in ids_by_sequence:
        log_p = model(ids[None]).logits[0].float().log_softmax(-1)
        found.append(log_p[:-1].gather(1, ids[1:, None])[:, 0])
    return torch.cat(found)


def gradient_of(
    model: Qwen3,
    mbs: Sequence[batch.MicroBatch],
    dtype: str,
    backward: Callable[[Tensor], None] = Tensor.backward,
    tokens: int = 0,
    weighted: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradient of the mean log-probability, see taken_gradient; and the log-probabilities of the last micro-batch.
    tokens: over which it is the mean, if not those of `mbs`. weighted: by SFT's head, to which weights come first."""
    model.zero_grad()
    tokens = tokens or sum(len(each.targets_N) for each in mbs)
    for mb in mbs:
        if weighted:
            mean, logprobs_N, _ = run.forward(model, mb, 1.0, dtype, torch.full_like(mb.weights_N, 1 / tokens))
        else:
            logprobs_N, _ = run.forward(model, mb, 1.0, dtype)
            mean = logprobs_N.sum() / tokens
        backward(mean)
    return taken_gradient(model), logprobs_N.detach()


def taken_gradient(model: Any) -> Tensor:
    """What backward left at some weights of every kind, as one fp32 vector on the CPU; the model has it no more. Of
    transformers' model likewise: its weights have the same names."""
    last = len(model.model.layers) - 1
    names = ("embed_tokens", "layers.0.", f"layers.{last // 2}.", f"layers.{last}.", "model.norm")
    weights = sorted((name, weight) for name, weight in model.named_parameters() if any(n in name for n in names))
    found = torch.cat([parallel.whole(weight.grad, None).flatten().float().cpu() for _, weight in weights])
    model.zero_grad()
    return found


def measure_ranks(args: argparse.Namespace) -> dict[str, Any]:
    """Every rank computes everything alone first, so that each can compare what it has."""
    shape = SHAPES[args.shape]
    lengths = [2048, 512, 64] if args.shape == "4b" else lengths_of(args)
    mbs = [micro_batch(shape, lengths, seed=rank) for rank in range(parallel.world_size())]
    tokens, mine = sum(len(mb.targets_N) for mb in mbs), mbs[parallel.rank()]
    found: dict[str, Any] = {"lengths": lengths}
    for dtype in ("float32", "bfloat16"):
        cfg = config.SFT(dtype=dtype)
        alone = random_model(shape)
        alone.dtype = getattr(torch, dtype)
        if has_kernel(parallel.device(), alone.dtype):
            alone.compile_blocks()
        with torch.no_grad():
            logprobs, _ = run.forward(alone, mine, 1.0, dtype)
        gradient, _ = gradient_of(alone, mbs, dtype)
        again, _ = gradient_of(alone, mbs, dtype)
        del alone
        free_everything()
        model = random_model(shape)
        run.spread(model, cfg)
        sharded, logprobs_too = gradient_of(model, [mine], dtype, parallel.backward, tokens)
        found[dtype] = difference(logprobs_too, logprobs) | {
            "gradient_relative_to_one_process": relative(sharded, gradient),
            "one_process_once_more": relative(again, gradient),
        }
        del model
        free_everything()
    return found


def difference(found: Tensor, reference: Tensor) -> dict[str, float]:
    gaps = (found.float() - reference.float()).abs()
    return {"mean": float(gaps.mean()), "max": float(gaps.max())}


def relative(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


# Of log-probabilities in nats a token, of gradients relative to their norm. In fp32 the same sums are added up in
# another order; in bf16, with 8 bits, two ways to compute the same may differ by what rounding makes of either.
TOLERANCES = {
    "numbers": {
        "fp32": {"mean": 1e-4, "gradient_relative_to_transformers": 1e-3},
        "transformers in bf16": {"mean": 0.06},
        "bf16, compiled": {"mean": 0.06, "gradient_relative_to_fp32": 0.12},
        "bf16, compiled, once more": {"gradient_relative_to_compiled": 0.05},
        "bf16, compiled, recomputed": {"mean": 0.06, "gradient_relative_to_compiled": 0.12},
        "bf16, compiled, SFT's head": {"mean": 0.06, "gradient_relative_to_compiled": 0.05},
        "bf16, eager": {"mean": 0.06, "gradient_relative_to_compiled": 0.12},
    },
    "ranks": {
        "float32": {"mean": 1e-5, "gradient_relative_to_one_process": 1e-4},
        "bfloat16": {"mean": 0.06, "gradient_relative_to_one_process": 0.12},
    },
}


def exceeded(part: str, found: dict[str, Any]) -> list[str]:
    """Which of a part's figures are above their tolerance, or no numbers."""
    return [
        f"{part}, {way}: {figure} is {found[way][figure]:.3g}, more than {most:g}"
        for way, figures in TOLERANCES.get(part, {}).items()
        for figure, most in figures.items()
        if not found[way][figure] <= most
    ]


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "speed": measure_speed,
    "memory": measure_memory,
    "numbers": measure_numbers,
    "ranks": measure_ranks,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=among(PARTS), default=["speed", "memory", "numbers"], help="comma-separated")
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each setting")
    parser.add_argument("--kernels", action="store_true", help="speed: with torch's attention as well")
    parser.add_argument("--eager", action="store_true", help="speed: not compiled as well")
    parser.add_argument("--out", default="", help="file for the JSON, written after each part")
    args = parser.parse_args()
    parallel.start()
    result: dict[str, Any] = {"shape": args.shape, **where(), "exceeded": []}
    if torch.cuda.is_available():
        result["attention"] = attention.kernel().__name__
    try:
        for part in args.parts:
            result[part] = PARTS[part](args)
            result["exceeded"] += itertools.chain(*parallel.gather(exceeded(part, result[part])))
            free_everything()
            if args.out and parallel.is_main():
                Path(args.out).write_text(json.dumps(result, indent=1))
    finally:
        parallel.stop()
    if parallel.is_main():
        print(json.dumps(result, indent=1))
    return int(bool(result["exceeded"]))


if __name__ == "__main__":
    sys.exit(main())
