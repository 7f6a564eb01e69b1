"""What training needs of a GPU's memory, in bytes, and how many activations may be kept.

The formulas know a model's shape and how it is trained; `tokens_to_keep` asks the GPU what is free. They hold for
bf16 compute over fp32 master weights (in fp32 nothing takes more than twice as much); benchmarks/trainer.py measures
what they say.

Letters: D hidden, I intermediate, H and K query and key/value heads of size d, V vocabulary, L layers; T tokens of a
micro-batch, W ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from minitau import head, parallel
from minitau.model import ModelConfig, Qwen3

MASTER, ADAM, GRADIENT = 4, 8, 4  # bytes a parameter, in fp32, divided among the ranks
HALF = 2  # bytes of a number in bf16
SLACK = 0.04  # part of the GPU that is left alone: the allocator's gaps, and what libraries take


def block_parameters(cfg: ModelConfig) -> int:
    """Parameters of one block."""
    heads = cfg.num_attention_heads + cfg.num_key_value_heads
    attention = 2 * cfg.hidden_size * heads * cfg.head_dim
    return attention + 3 * cfg.hidden_size * cfg.intermediate_size + 2 * cfg.hidden_size + 2 * cfg.head_dim


def parameters(cfg: ModelConfig) -> int:
    """Parameters of the model; a tied embedding counts once."""
    embeddings = (1 if cfg.tie_word_embeddings else 2) * cfg.vocab_size * cfg.hidden_size
    return cfg.num_hidden_layers * block_parameters(cfg) + embeddings + cfg.hidden_size


def kept_by_block(cfg: ModelConfig, compiled: bool = True) -> int:
    """Bytes a token that one block keeps for its backward: what its matrix products and attention took in and gave.

    Not compiled it keeps also what its norms compute in fp32, and one step more of SwiGLU.
    """
    query, key = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    if not compiled:
        in_fp32 = 4 * (4 * cfg.hidden_size + 2 * (query + key) + cfg.num_attention_heads)
        return in_fp32 + HALF * (2 * cfg.hidden_size + 2 * (query + key) + 4 * cfg.intermediate_size)
    residuals = 4 * cfg.hidden_size  # before and after each norm
    attention = 2 * (query + key) + key + query  # before and after norm and RoPE; the values; the output
    return HALF * (residuals + attention + 3 * cfg.intermediate_size) + 4 * cfg.num_attention_heads


def kept_by_recomputed(cfg: ModelConfig) -> int:
    """Bytes a token that a block keeps which is computed again: what enters it."""
    return HALF * cfg.hidden_size


def kept_weights(cfg: ModelConfig, ranks: int) -> int:
    """Bytes that a block keeps beside them: its weights in bf16, where one GPU rounds them as it uses them. (Several
    gather them a second time.)"""
    return HALF * block_parameters(cfg) if ranks == 1 else 0


@dataclass(frozen=True)
class Needs:
    """Bytes on one GPU at the height of an update."""

    weights: int  # master weights, this rank's part
    optimizer: int
    gradients: int
    gathered: int  # bf16 copies of weights in use, and a block's gradients
    inputs: int  # of each block, and of the head
    working: int  # of the head's backward, or of a block's beside what it kept, whichever is more

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def needs(cfg: ModelConfig, tokens: int, ranks: int, compiled: bool = True) -> Needs:
    """What training on micro-batches of `tokens` over `ranks` GPUs needs if every block is computed again in backward,
    from the second micro-batch of an update on: before it there are no gradients."""
    whole, block, embedding = parameters(cfg), block_parameters(cfg), cfg.vocab_size * cfg.hidden_size
    in_use = whole - (cfg.num_hidden_layers - 2) * block  # two blocks at a time
    # The logits in bf16 and their gradient; what is not compiled holds four more of them at a time, in fp32.
    of_logit = 2 * HALF + (0 if compiled else 16)
    of_head = of_logit * min(head.LOGITS["cuda"], tokens * cfg.vocab_size) + (4 + HALF) * embedding
    return Needs(
        weights=MASTER * whole // ranks,
        optimizer=ADAM * whole // ranks,
        gradients=GRADIENT * whole // ranks,
        gathered=HALF * (in_use + 2 * block),
        inputs=tokens * (cfg.num_hidden_layers + 4) * kept_by_recomputed(cfg),
        working=max(of_head, tokens * 3 * kept_by_block(cfg, compiled) // 2),
    )


def tokens_to_keep(
    recompute: str, model: Qwen3, optimizer: torch.optim.Optimizer, tokens: int, dtype: torch.dtype
) -> float:
    """For how many tokens, summed over blocks, this GPU has room to keep activations, now, before an update.

    recompute: as --recompute. tokens: of a micro-batch at most. dtype: of the compute.
    """
    device = model.head_weight.device
    if recompute != "auto" or device.type != "cuda":
        return 0.0 if recompute == "all" else math.inf
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    own = sum(parallel.local(parameter).numel() for parameter in model.parameters())
    need, wide = needs(model.cfg, tokens, parallel.world_size(), model.compiled), dtype.itemsize / HALF
    to_come = own * (GRADIENT + (0 if optimizer.state else ADAM)) + wide * (need.gathered + need.inputs + need.working)
    if dtype != torch.float32:  # as if all blocks kept theirs
        to_come += model.cfg.num_hidden_layers * kept_weights(model.cfg, parallel.world_size())
    room = free - to_come - SLACK * total
    return max(0.0, room / wide / (kept_by_block(model.cfg, model.compiled) - kept_by_recomputed(model.cfg)))
