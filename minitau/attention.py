"""Causal attention inside each sequence of a packed batch, by the fastest kernel that is installed.

Shapes: T packed tokens, S sequences that lie end to end in them, H query heads, K key/value heads, d head size.
This file knows no model.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from itertools import pairwise, repeat

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (T,H,d), k and v (T,K,d) -> (T,H,d)
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]  # q, k, v, cu_seqlens (S+1), longest -> (T,H,d)


def packed_attention(cu_seqlens: list[int], device: torch.device | str, dtype: torch.dtype) -> Iterable[Attend]:
    """What attends in each layer: the same everywhere. `cu_seqlens` are the S+1 boundaries, from 0 to T.

    All sequences in one kernel where there is one, else one SDPA call a sequence, which is exact and fast enough for
    what a CPU can train.
    """
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    assert min(lengths) > 0, "an empty sequence in a packed batch"
    if has_kernel(device, dtype):
        # From pinned memory, so that the host does not wait for what the GPU has still to do.
        bounds = torch.tensor(cu_seqlens, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)
        packed, longest = kernel(), max(lengths)
        return repeat(lambda q, k, v: packed(q, k, v, bounds, longest))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        per_sequence = zip(q.split(lengths), k.split(lengths), v.split(lengths))
        return torch.cat([causal_sdpa(*qkv) for qkv in per_sequence])

    return repeat(attend)


def has_kernel(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Is there a `kernel` for these? torch.compile can take it, and nothing else, into a graph for any lengths."""
    return torch.device(device).type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (Tq,H,d) are the last Tq positions of k and v (Tk,K,d); returns (Tq,H,d)."""
    mask = None
    if len(q) not in (1, len(k)):
        mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=len(q) == len(k),
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


@functools.cache
def kernel() -> Kernel:
    """The fastest that is installed: flash-attn-4, which needs a Hopper GPU or newer, flash-attn 2, or torch's own."""
    if installed("flash_attn.cute") and torch.cuda.get_device_capability() >= (9, 0):
        return flash_attn_4
    if installed("flash_attn.flash_attn_interface"):
        return flash_attn_2
    return torch_varlen


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """torch's own."""
    from torch.nn.attention.varlen import varlen_attn

    # Newer torch wants to be told about grouped queries, older torch has no such argument.
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), **gqa)


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Package flash-attn (Dao 2023)."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, causal=True)


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Package flash-attn-4."""
    return flash_attn_4_forward(q, k, v, bounds, longest)[0]


# flash-attn-4 is no operator of torch's: as one, torch.compile can put it into a block's graph without looking inside.


@torch.library.custom_op("minitau::flash_attn_4", mutates_args=())
def flash_attn_4_forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The output (T,H,d), and the log-sum-exp (H,T) in fp32 that backward needs."""
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        causal=True,
        return_lse=True,
    )
    return out, lse


@flash_attn_4_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("minitau::flash_attn_4_backward", mutates_args=())
def flash_attn_4_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv = _flash_attn_bwd(
        q,
        k,
        v,
        out,
        grad,
        lse,
        causal=True,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
    )
    return dq, dk, dv


@flash_attn_4_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)  # strides too are as theirs


def save_for_backward(ctx, inputs, output) -> None:
    q, k, v, bounds, ctx.longest = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)


def backward(ctx, grad: Tensor, grad_lse: Tensor | None):
    *saved, bounds = ctx.saved_tensors
    return *flash_attn_4_backward(grad.contiguous(), *saved, bounds, ctx.longest), None, None


flash_attn_4_forward.register_autograd(backward, setup_context=save_for_backward)
