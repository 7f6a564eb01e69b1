"""Whether the trainer's numbers are right at a 4B model's shape: log-probabilities and gradients computed several ways,
and how far they may be apart. benchmarks/trainer.py runs it (--parts numbers,ranks)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.mfu import SHAPES
from benchmarks.random_run import free_everything, lengths_of, micro_batch, random_model
from minitau import batch, config, parallel, run
from minitau.attention import has_kernel
from minitau.model import Qwen3


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
