"""A local engine that samples from rounded weights: the drift of a low-precision engine, made on purpose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from minitau.engines.local import LocalEngine


class RoundedEngine(LocalEngine):
    """A LocalEngine whose model is its own, not the trainer's, and holds weights rounded to `bits` bits."""

    def __init__(self, *args: Any, bits: int, **sizes: Any):
        self.bits = bits
        super().__init__(*args, **sizes)

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        super().sync(((name, rounded(tensor, self.bits)) for name, tensor in weights), version)


@torch.no_grad()
def rounded(tensor: Tensor, bits: int) -> Tensor:
    """A copy in which each row (along the last axis) holds at most 2^bits - 1 different values, evenly spaced around 0.

    The largest of a row stays as it is; no number moves by more than that one / (2^bits - 2).
    """
    steps = 2 ** (bits - 1) - 1  # from 0 to the largest
    largest = tensor.float().abs().amax(-1, keepdim=True)
    size = torch.where(largest > 0, largest / steps, 1.0)
    return ((tensor / size).round() * size).to(tensor.dtype)
