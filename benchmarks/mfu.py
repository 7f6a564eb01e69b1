"""What the benchmarks at a 4B model's shape share: the shapes, the packed lengths, model FLOPs utilisation, and where
they run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minitau import pace, parallel
from minitau.model import ModelConfig

SHAPES = {"4b": ModelConfig(), "tiny": ModelConfig(2048, 64, 128, 2, 4, 2, 32)}
LENGTHS = (8192, 4096, 2048, 1024, 512, 256, 128, 64, 64)  # 16,384 tokens: one micro-batch


def where() -> dict[str, str | int]:
    """What a figure depends on: how many processes compute it, torch, and the GPU if there is one."""
    found: dict[str, str | int] = {"processes": parallel.world_size(), "torch": torch.__version__}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def mfu(shape: ModelConfig, lengths: Sequence[int], seconds: float) -> float:
    """The part of a GPU's peak that an update on packed sequences of these lengths made use of, all of whose tokens
    were predicted: from 0 to 1. What is computed twice counts once (see pace.flops)."""
    return pace.flops(shape, lengths, sum(lengths)) / seconds / pace.PEAK_FLOPS
