"""What the benchmarks at a 4B model's shape share: the shapes, the packed lengths, and model FLOPs utilisation."""

from __future__ import annotations

from collections.abc import Sequence

from minitau import pace
from minitau.model import ModelConfig

SHAPES = {"4b": ModelConfig(), "tiny": ModelConfig(2048, 64, 128, 2, 2, 1, 32)}
LENGTHS = (8192, 4096, 2048, 1024, 512, 256, 128, 64, 64)  # 16,384 tokens: one micro-batch


def mfu(shape: ModelConfig, lengths: Sequence[int], seconds: float) -> float:
    """The part of a GPU's peak that an update on packed sequences of these lengths made use of, all of whose tokens
    were predicted: from 0 to 1. What is computed twice counts once (see pace.flops)."""
    return pace.flops(shape, lengths, sum(lengths)) / seconds / pace.PEAK_FLOPS
