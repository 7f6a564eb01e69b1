"""Dense Qwen3 in plain PyTorch: RMSNorm, RoPE, grouped-query attention with q/k norm, SwiGLU.

Parameter names are Hugging Face's, so a checkpoint's tensors go in as they are. The model works
on packed tokens: every sequence of a micro-batch lies end to end in one dimension T, and who may
look at whom is decided by an `attend` function that the caller passes in. The trainer passes
`packed_attention(cu_seqlens)`, the local engine its KV cache. The model knows nothing of ranks,
files, tokens' meaning or losses.

Shapes: T packed tokens, N predicted tokens (N <= T), V vocabulary, D hidden, H query heads,
K key/value heads, d head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q (T,H,d), k and v (T,K,d) -> (T,H,d)

HEAD_LOGITS = 512 * 151_936  # logits that exist at once: in fp32 they are 311 MB


@dataclass(frozen=True)
class ModelConfig:
    """The part of a Qwen3 config.json that decides the numbers. Field names are Hugging Face's."""

    vocab_size: int = 151_936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 40_960


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x32 * scale).to(x.dtype)


def rope_tables(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, 1, d), of Su et al. 2021 eq. 15 in the half-split layout of Hugging Face."""
    exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
    angles = positions_T.float()[:, None] * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) of x (T, heads, d) by its position's angle."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.head_dim = cfg.head_dim
        q_size, kv_size = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, cfg.hidden_size, bias=False)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps)
        self.k_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps)

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        q = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.o_proj(attend(layer, q, k, v).flatten(-2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), cos, sin, layer, attend)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Decoder(nn.Module):
    """The part that Hugging Face names `model.`: embedding, blocks, last norm."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class Qwen3(nn.Module):
    """A dense Qwen3. `activation_checkpointing` trades a second forward of each block for memory."""

    def __init__(self, cfg: ModelConfig, activation_checkpointing: bool = False):
        super().__init__()
        self.cfg = cfg
        self.activation_checkpointing = activation_checkpointing
        self.model = Decoder(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the LM head, which is the embedding itself when they are tied."""
        return self.model.embed_tokens.weight if self.cfg.tie_word_embeddings else self.lm_head.weight

    def hidden(self, ids_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Last hidden states (T, D), normed, of packed ids at their positions in their sequences."""
        x_TD = self.model.embed_tokens(ids_T)
        cos, sin = rope_tables(positions_T, self.cfg.head_dim, self.cfg.rope_theta, x_TD.dtype)
        for i, block in enumerate(self.model.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_TD = checkpoint(block, x_TD, cos, sin, i, attend, use_reentrant=False)
            else:
                x_TD = block(x_TD, cos, sin, i, attend)
        return self.model.norm(x_TD)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, V) logits in fp32. For the few rows that an engine samples from; never for training."""
        return F.linear(hidden_ND, self.head_weight).float()

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        predict_N: Tensor,
        targets_N: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """log p(targets_N[n] | everything up to position predict_N[n]) and entropy there, (N,) fp32 each.

        Only the rows in `predict_N` meet the LM head: what the agent heard costs no vocabulary.
        """
        assert ids_T.shape == positions_T.shape and predict_N.shape == targets_N.shape
        hidden_ND = self.hidden(ids_T, positions_T, attend)[predict_N]
        return HeadLogprobs.apply(hidden_ND, self.head_weight, targets_N, temperature)


class HeadLogprobs(torch.autograd.Function):
    """Log-probability of targets and entropy under softmax(hidden @ weight.T / temperature).

    Computed some rows at a time and recomputed in backward, so that (N, V) logits never exist.
    With p = softmax(z):  d log p[t] / dz = onehot(t) - p,  d entropy / dz = -p * (log p + entropy).
    """

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float):
        logprobs_N = hidden_ND.new_empty(len(targets_N), dtype=torch.float32)
        entropy_N, lse_N = torch.empty_like(logprobs_N), torch.empty_like(logprobs_N)
        for rows in row_chunks(len(targets_N), len(weight_VD)):
            logits = F.linear(hidden_ND[rows], weight_VD).float() / temperature
            lse_N[rows] = logits.logsumexp(-1)
            logprobs_N[rows] = logits.gather(-1, targets_N[rows, None]).squeeze(-1) - lse_N[rows]
            log_p = logits - lse_N[rows, None]
            entropy_N[rows] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, lse_N, entropy_N)
        ctx.temperature = temperature
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx, grad_logprobs_N: Tensor, grad_entropy_N: Tensor):
        hidden_ND, weight_VD, targets_N, lse_N, entropy_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for rows in row_chunks(len(targets_N), len(weight_VD)):
            log_p = F.linear(hidden_ND[rows], weight_VD).float() / ctx.temperature - lse_N[rows, None]
            pull = grad_logprobs_N[rows, None] + grad_entropy_N[rows, None] * (log_p + entropy_N[rows, None])
            grad_logits = -log_p.exp() * pull
            grad_logits.scatter_add_(-1, targets_N[rows, None], grad_logprobs_N[rows, None])
            grad_logits = (grad_logits / ctx.temperature).to(weight_VD.dtype)
            grad_hidden_ND[rows] = grad_logits @ weight_VD
            grad_weight_VD += grad_logits.T @ hidden_ND[rows]
        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), None, None


def row_chunks(n: int, vocabulary: int) -> list[slice]:
    """The n rows in pieces of at most HEAD_LOGITS logits each."""
    rows = max(1, HEAD_LOGITS // vocabulary)
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def init_weights(model: Qwen3, seed: int) -> None:
    """Random weights as Hugging Face starts a Qwen3: normal(0, 0.02), norms at one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02, generator=generator)


def packed_attention(cu_seqlens: list[int], device: torch.device | str, dtype: torch.dtype) -> Attend:
    """Causal attention inside each packed sequence. `cu_seqlens` are the S+1 boundaries, from 0 to T.

    On CUDA in half precision: flash-attn when installed, else torch's own varlen kernel. Anywhere
    else one SDPA call a sequence, which is exact and fast enough for what a CPU can train.
    """
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    assert min(lengths) > 0, "an empty sequence in a packed batch"
    if torch.device(device).type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        bounds = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
        kernel = varlen_kernel()
        return lambda layer, q, k, v: kernel(q, k, v, bounds, max(lengths))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        per_sequence = zip(q.split(lengths), k.split(lengths), v.split(lengths))
        return torch.cat([causal_sdpa(*qkv) for qkv in per_sequence])

    return attend


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


def varlen_kernel() -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """The fastest packed causal attention that is installed, as kernel(q, k, v, cu_seqlens, longest)."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        # Newer torch wants to be told about grouped queries, older torch has no such argument.
        gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        return lambda q, k, v, bounds, longest: varlen_attn(
            q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), **gqa
        )
    return lambda q, k, v, bounds, longest: flash_attn_varlen_func(
        q, k, v, bounds, bounds, longest, longest, causal=True
    )
