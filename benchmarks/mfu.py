"""What the trainer's benchmarks share: the shapes, the packed lengths, and how many FLOPs a training step is worth.

A shape is a dict in Hugging Face's names, so that ModelConfig(**shape) and Qwen3Config(**shape) both take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200 (SXM), as its datasheet has it
LENGTHS = (8192, 4096, 2048, 1024, 512, 256, 128, 64, 64)  # 16,384 tokens: one micro-batch
SHAPES: dict[str, dict[str, Any]] = {
    "4b": {
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
}


def parameters(shape: dict[str, Any]) -> int:
    """How many a dense Qwen3 of this shape has; a tied embedding counts once."""
    hidden, head_dim = shape["hidden_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * head_dim, shape["num_key_value_heads"] * head_dim
    attention = hidden * (queries + 2 * keys) + queries * hidden + 2 * head_dim
    block = attention + 3 * hidden * shape["intermediate_size"] + 2 * hidden
    embeddings = shape["vocab_size"] * hidden * (1 if shape["tie_word_embeddings"] else 2)
    return shape["num_hidden_layers"] * block + embeddings + hidden


def step_flops(shape: dict[str, Any], lengths: Sequence[int]) -> float:
    """FLOPs of a forward and backward over packed sequences: 6 N T + 6 L H d sum(len^2).

    Causal attention is counted at half, and nothing that is computed again for the backward counts.
    """
    attention = shape["num_hidden_layers"] * shape["num_attention_heads"] * shape["head_dim"]
    return 6.0 * parameters(shape) * sum(lengths) + 6.0 * attention * sum(n * n for n in lengths)


def mfu(shape: dict[str, Any], lengths: Sequence[int], seconds: float, gpus: int = 1) -> float:
    """The part of the GPUs' peak that a step of these seconds made use of, from 0 to 1."""
    return step_flops(shape, lengths) / seconds / (gpus * PEAK_FLOPS)
