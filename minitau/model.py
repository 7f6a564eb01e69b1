"""Dense Qwen3 in plain PyTorch: RMSNorm, RoPE, grouped-query attention with q/k norm, SwiGLU.

Parameter names are Hugging Face's, so a checkpoint's tensors go in as they are. The model works
on packed tokens: every sequence of a micro-batch lies end to end in one dimension T, and who may
look at whom is decided by the functions that the caller passes in, one a layer. The trainer passes
`packed_attention(cu_seqlens)`, the local engine its KV cache. The model knows nothing of ranks,
files, tokens' meaning or losses.

Shapes: T packed tokens, N predicted tokens (N <= T), V vocabulary, D hidden, H query heads,
K key/value heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minitau.attention import Attend
from minitau.head import HeadLogprobs, WeightedLogprobs


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
    """x / rms(x) * weight over the last dimension, in fp32 and rounded once (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (rounded(self.weight, x.dtype) * (x32 * scale)).to(x.dtype)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight.to(dtype), also where it is compiled into one kernel with what reads it in fp32: there the compiler would
    leave the rounding out, and one GPU would train with norms that no engine and no export has."""
    return weight if weight.dtype == dtype else round_weight(weight, dtype)


@torch.library.custom_op("minitau::round_weight", mutates_args=())
def round_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype)


@round_weight.register_fake
def _(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


def keep_dtype(ctx, inputs, output) -> None:
    ctx.dtype = inputs[0].dtype


round_weight.register_autograd(lambda ctx, grad: (grad.to(ctx.dtype), None), setup_context=keep_dtype)


class Linear(nn.Linear):
    """x @ weight.T without bias, in x's dtype: a master weight in fp32 is rounded as it is used."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rope_tables(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, 1, d) in fp32, of Su et al. 2021 eq. 15 in the half-split layout of Hugging Face."""
    exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
    angles = positions_T.float()[:, None] * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) of x (T, heads, d) by its position's angle: in fp32, as engines do."""
    x32 = x.float()
    left, right = x32.chunk(2, dim=-1)
    return (x32 * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.head_dim = cfg.head_dim
        q_size, kv_size = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = Linear(cfg.hidden_size, q_size)
        self.k_proj = Linear(cfg.hidden_size, kv_size)
        self.v_proj = Linear(cfg.hidden_size, kv_size)
        self.o_proj = Linear(q_size, cfg.hidden_size)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps)
        self.k_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps)

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.o_proj(attend(q, k, v).flatten(-2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(cfg.hidden_size, cfg.intermediate_size)
        self.up_proj = Linear(cfg.hidden_size, cfg.intermediate_size)
        self.down_proj = Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(
        self, x_TD: Tensor, more_TD: Tensor, cos: Tensor, sin: Tensor, attend: Attend, again: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The residual stream of which `more` is still to be added to x, to the same: (T, D) each. The next block adds
        it, because that sum and the norm that follows are one kernel.

        again: keep the sum alone, and compute the rest a second time in backward. Inside the block, so that what shards
        it or compiles it is outside: its weights are gathered once for both, and the compiler leaves out of the second
        time what no gradient needs, such as the last matrix product.
        """
        x_TD = x_TD + more_TD
        if not again:
            return self.compute(x_TD, cos, sin, attend)

        def once_more(x_TD: Tensor) -> tuple[Tensor, Tensor]:
            return self.compute(x_TD, cos, sin, attend)

        # There is no randomness in a block: no random state to keep, which would be a wait for the GPU.
        return checkpoint(once_more, x_TD, use_reentrant=False, preserve_rng_state=False)

    def compute(self, x_TD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), cos, sin, attend)
        return x_TD, self.mlp(self.post_attention_layernorm(x_TD))


class Decoder(nn.Module):
    """The part that Hugging Face names `model.`: embedding, blocks, last norm."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class Qwen3(nn.Module):
    """A dense Qwen3.

    dtype: of the computation, to which weights are rounded as they are used; None: the weights' own.
    keep: for how many tokens, summed over blocks, backward may find the activations kept; the first blocks of a
    forward that has more compute theirs a second time in backward.
    """

    def __init__(self, cfg: ModelConfig, keep: float = math.inf, dtype: torch.dtype | None = None):
        super().__init__()
        self.cfg = cfg
        self.keep = keep
        self.dtype = dtype
        self.compiled = False
        self.model = Decoder(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the LM head, which is the embedding itself when they are tied."""
        return self.model.embed_tokens.weight if self.cfg.tie_word_embeddings else self.lm_head.weight

    def compile_blocks(self) -> None:
        """Fuse what lies between the matrix products of a block: compiled once, at the first forward, for all blocks
        and any number of tokens. Before sharding, and only where attention is a kernel: the graph takes in nothing that
        depends on sequences."""
        self.compiled = True
        for block in self.model.layers:
            block.forward = torch.compile(block.forward, dynamic=True, fullgraph=True)

    def recomputed(self, tokens: int) -> int:
        """How many blocks of a forward of so many tokens are computed again in its backward."""
        blocks = len(self.model.layers)
        return blocks - int(min(blocks, self.keep / tokens))

    def hidden(self, ids_T: Tensor, positions_T: Tensor, attends: Iterable[Attend]) -> Tensor:
        """Last hidden states (T, D), normed, of packed ids at their positions in their sequences."""
        x_TD = self.model.embed_tokens(ids_T)
        x_TD = x_TD.to(self.dtype or x_TD.dtype)
        more_TD = torch.zeros_like(x_TD, requires_grad=x_TD.requires_grad)  # as later ones: one graph for all blocks
        cos, sin = rope_tables(positions_T, self.cfg.head_dim, self.cfg.rope_theta)
        # The first ones: backward comes to them when what the others kept is gone.
        again = self.recomputed(len(ids_T)) if torch.is_grad_enabled() else 0
        for i, (block, attend) in enumerate(zip(self.model.layers, attends)):
            x_TD, more_TD = block(x_TD, more_TD, cos, sin, attend, i < again)
        return self.model.norm(x_TD + more_TD)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, V) logits in fp32. For the few rows that an engine samples from; never for training."""
        return F.linear(hidden_ND, self.head_weight.to(hidden_ND.dtype)).float()

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        attends: Iterable[Attend],
        predict_N: Tensor,
        targets_N: Tensor,
        temperature: float = 1.0,
        weights_N: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """log p(targets_N[n] | everything up to position predict_N[n]) and entropy there, (N,) fp32 each.

        With weights_N before them sum(weights_N * log p), and only this has a gradient, for less than through the
        others. Only the rows in `predict_N` meet the LM head: what the agent heard costs no vocabulary.
        """
        assert ids_T.shape == positions_T.shape and predict_N.shape == targets_N.shape
        hidden_ND = self.hidden(ids_T, positions_T, attends).index_select(0, predict_N)
        if weights_N is not None and torch.is_grad_enabled():
            return WeightedLogprobs.apply(hidden_ND, self.head_weight, targets_N, weights_N, temperature)
        found = HeadLogprobs.apply(hidden_ND, self.head_weight, targets_N, temperature)
        return found if weights_N is None else ((weights_N * found[0]).sum(), *found)


def init_weights(model: Qwen3, seed: int) -> None:
    """Random weights as Hugging Face starts a Qwen3: normal(0, 0.02), norms at one. Drawn where the model is."""
    generator = torch.Generator(model.head_weight.device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
