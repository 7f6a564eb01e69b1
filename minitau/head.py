"""Log-probabilities and entropies of tokens under the LM head, without ever holding (N, V) logits.

Shapes: N predicted tokens, V vocabulary, D hidden. The rows are taken some at a time, in forward and again in
backward, so that the memory depends on neither N nor V: so many logits exist at once as LOGITS says of the device.
This file knows no model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# On a GPU in bf16 they are 1.24 GB, and their gradient as much: fewer at a time, and the sum of the weight's gradients
# is read and written too often. On a CPU, in fp32, a quarter of that.
LOGITS = {"cuda": 4096 * 151_936, "cpu": 512 * 151_936}


class HeadLogprobs(torch.autograd.Function):
    """log p(targets) and entropy, (N,) fp32 each, under p = softmax(z) with z = hidden @ weight.T / temperature.

    d log p[t] / dz = onehot(t) - p,  d entropy / dz = -p * (log p + entropy).

    A weight in fp32 is rounded to the dtype of `hidden`, and its gradient is fp32.
    """

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float):
        ctx.weight_dtype, weight_VD = weight_VD.dtype, weight_VD.to(hidden_ND.dtype)
        found = [hidden_ND.new_empty(len(targets_N), dtype=torch.float32) for _ in range(3)]
        for rows in row_chunks(targets_N, len(weight_VD)):
            logits = F.linear(hidden_ND[rows], weight_VD)
            of_rows = fused(statistics, logits.device.type)(logits, targets_N[rows], temperature)
            for each, of_row in zip(found, of_rows):
                each[rows] = of_row
        logprobs_N, _, entropy_N = found
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, *found)
        ctx.temperature = temperature
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx, grad_logprobs_N: Tensor, grad_entropy_N: Tensor):
        hidden_ND, weight_VD, targets_N, *found = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for rows in row_chunks(targets_N, len(weight_VD)):
            logits = F.linear(hidden_ND[rows], weight_VD)
            columns = [each[rows] for each in (*found, grad_logprobs_N, grad_entropy_N)]
            grad_logits = gradient(logits, targets_N[rows], *columns, ctx.temperature)
            torch.mm(grad_logits, weight_VD, out=grad_hidden_ND[rows])
            accumulate(grad_weight_VD, grad_logits.T, hidden_ND[rows])
        return grad_hidden_ND, grad_weight_VD.to(ctx.weight_dtype), None, None


class WeightedLogprobs(torch.autograd.Function):
    """sum(weights * log p(targets)), and what HeadLogprobs gives, of which only that sum has a gradient.

    A loss whose weights are known beforehand meets the head once: forward has the logits at hand when it can compute
    the gradients as well, all but a factor.
    """

    @staticmethod
    def forward(
        ctx, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.weight_dtype, weight_VD = weight_VD.dtype, weight_VD.to(hidden_ND.dtype)
        logprobs_N, entropy_N = (torch.empty_like(weights_N) for _ in range(2))
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for rows in row_chunks(targets_N, len(weight_VD)):
            logits = F.linear(hidden_ND[rows], weight_VD)
            found = fused(statistics, logits.device.type)(logits, targets_N[rows], temperature)
            logprobs_N[rows], _, entropy_N[rows] = found
            weights = weights_N[rows]
            grad_logits = gradient(logits, targets_N[rows], *found, weights, torch.zeros_like(weights), temperature)
            torch.mm(grad_logits, weight_VD, out=grad_hidden_ND[rows])
            accumulate(grad_weight_VD, grad_logits.T, hidden_ND[rows])
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.mark_non_differentiable(logprobs_N, entropy_N)
        return (weights_N * logprobs_N).sum(), logprobs_N, entropy_N

    @staticmethod
    def backward(ctx, grad_sum: Tensor, *_: Tensor):
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return grad_hidden_ND * grad_sum, grad_weight_VD.mul_(grad_sum).to(ctx.weight_dtype), None, None, None


def gradient(
    logits_NV: Tensor,
    targets_N: Tensor,
    logprobs_N: Tensor,
    lse_N: Tensor,
    entropy_N: Tensor,
    grad_logprobs_N: Tensor,
    grad_entropy_N: Tensor,
    temperature: float,
) -> Tensor:
    """The gradient of the logits, in their dtype, from that of the log-probabilities and entropies."""
    of_rows = [entropy_N, grad_logprobs_N, grad_entropy_N, temperature]
    grad_logits = fused(nontarget_logits_grad, logits_NV.device.type)(logits_NV, lse_N, *of_rows)
    grad_target = nontarget_grad(logprobs_N, *of_rows) + grad_logprobs_N / temperature
    return grad_logits.scatter_(-1, targets_N[:, None], grad_target[:, None].to(grad_logits.dtype))


def statistics(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target), log-sum-exp and entropy, (N,) fp32 each."""
    z = logits_NV.float() / temperature
    lse_N = z.logsumexp(-1)
    logprobs_N = z.gather(-1, targets_N[:, None]).squeeze(-1) - lse_N
    log_p = z - lse_N[:, None]
    return logprobs_N, lse_N, -(log_p.exp() * log_p).sum(-1)


def nontarget_grad(
    log_p: Tensor, entropy: Tensor, grad_logprob: Tensor, grad_entropy: Tensor, temperature: float
) -> Tensor:
    """The gradient of logits that are no targets: all in fp32, of any shapes that fit each other."""
    return -log_p.exp() * (grad_logprob + grad_entropy * (log_p + entropy)) / temperature


def nontarget_logits_grad(logits_NV: Tensor, lse_N: Tensor, *of_rows: Any) -> Tensor:
    """`nontarget_grad` for (N, V) logits, in their dtype. At the targets themselves it is wrong."""
    *columns, temperature = of_rows
    log_p = logits_NV.float() / temperature - lse_N[:, None]
    return nontarget_grad(log_p, *(each[:, None] for each in columns), temperature).to(logits_NV.dtype)


def accumulate(sum_VD: Tensor, a_VN: Tensor, b_ND: Tensor) -> None:
    """sum_VD += a @ b, of which the sum is fp32: on a GPU in one pass over it, and without rounding the product."""
    if a_VN.is_cuda and a_VN.dtype != torch.float32:
        torch.addmm(sum_VD, a_VN, b_ND, out_dtype=torch.float32, out=sum_VD)
    else:
        sum_VD += a_VN @ b_ND


@functools.cache
def fused(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`function` as one kernel that reads its (N, V) input once or twice, on a GPU: compiled for one V and any N."""
    return torch.compile(function) if device == "cuda" else function


def row_chunks(targets_N: Tensor, vocabulary: int) -> list[slice]:
    """The N rows in pieces of at most LOGITS logits each."""
    n, rows = len(targets_N), max(1, LOGITS[targets_N.device.type] // vocabulary)
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]
