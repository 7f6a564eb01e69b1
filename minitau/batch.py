"""From trajectories to packed micro-batches of at most a given number of tokens, balanced over ranks.

A trajectory is never cut: it lies whole in one micro-batch. Position t predicts token t + 1, so
what the agent said at ids[t + 1] has its log-probability at row t. All ranks get the same number
of micro-batches, because each one is a collective forward; a rank short of work gets an empty one.
This file knows records and tensors, no model and no loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitau.episode import BadInput, Trajectory


class BatchError(BadInput):
    """A trajectory that fits in no micro-batch, in one line that says what to change."""


@dataclass(frozen=True)
class MicroBatch:
    """S trajectories packed end to end. T tokens; N of them were said by the agent."""

    ids_T: Tensor
    positions_T: Tensor  # of each token in its own trajectory
    cu_seqlens: list[int]  # S + 1 boundaries
    predict_N: Tensor  # rows of T whose next token was said by the agent
    targets_N: Tensor  # that token
    sequence_N: Tensor  # which of the S trajectories it belongs to
    rollout_N: Tensor  # the sampler's log-probability of it
    advantages_N: Tensor
    weights_N: Tensor  # of its loss in the global sum; see grpo.token_weights
    old_N: Tensor | None = None  # the trainer's log-probability before this batch's updates
    reference_N: Tensor | None = None  # the reference model's


@dataclass(frozen=True)
class Sample:
    """A trajectory with what the loss needs to know of it."""

    trajectory: Trajectory
    advantage: float = 1.0
    weight: float = 0.0  # of each of its said tokens


def plan(lengths: Sequence[int], budget: int, world_size: int) -> list[list[list[int]]]:
    """Which trajectories go where: plan[rank][micro-batch] is a list of indices into `lengths`.

    No micro-batch exceeds `budget` tokens, every rank has as many, and the longest go first to
    whichever micro-batch is emptiest (Graham 1969), which keeps them and the ranks even. Raises
    BatchError if one trajectory alone is longer than the budget.
    """
    if lengths and max(lengths) > budget:
        raise BatchError(
            f"a trajectory of {max(lengths)} tokens is longer than --micro-batch-tokens {budget}; raise it"
        )
    per_rank = max(1, math.ceil(sum(lengths) / budget / world_size))
    while True:
        bins: list[list[int]] = [[] for _ in range(per_rank * world_size)]
        sizes = [0] * len(bins)
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            emptiest = min(range(len(bins)), key=sizes.__getitem__)
            bins[emptiest].append(index)
            sizes[emptiest] += lengths[index]
        if max(sizes) <= budget:
            return [bins[rank::world_size] for rank in range(world_size)]
        per_rank += 1


def pack(samples: Sequence[Sample], device: torch.device | str) -> MicroBatch:
    """One micro-batch of whole trajectories, less those in which the agent said nothing.

    Without any it costs a forward of two tokens and weighs 0.
    """
    ids: list[int] = []
    positions: list[int] = []
    cu_seqlens = [0]
    rows: list[tuple[int, int, int, float, float, float]] = []
    speaking = [sample for sample in samples if any(sample.trajectory.said)]
    for number, sample in enumerate(speaking):
        trajectory = sample.trajectory
        base = len(ids)
        for t in range(1, len(trajectory.ids)):
            if trajectory.said[t]:
                logprob = trajectory.logprobs[t]
                rows.append((base + t - 1, trajectory.ids[t], number, logprob, sample.advantage, sample.weight))
        ids += trajectory.ids
        positions += range(len(trajectory.ids))
        cu_seqlens.append(len(ids))
    if not rows:
        ids, positions, cu_seqlens = [0, 0], [0, 1], [0, 2]
        rows = [(0, 0, 0, 0.0, 0.0, 0.0)]
    predict, targets, sequence, rollout, advantage, weight = zip(*rows)

    def integers(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    def floats(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return MicroBatch(
        ids_T=integers(ids),
        positions_T=integers(positions),
        cu_seqlens=cu_seqlens,
        predict_N=integers(predict),
        targets_N=integers(targets),
        sequence_N=integers(sequence),
        rollout_N=floats(rollout),
        advantages_N=floats(advantage),
        weights_N=floats(weight),
    )


def micro_batches(
    samples: Sequence[Sample], *, budget: int, rank: int, world_size: int, device: torch.device | str
) -> list[MicroBatch]:
    """This rank's micro-batches of the global batch `samples`, which is the same on every rank."""
    bins = plan([len(s.trajectory.ids) for s in samples], budget, world_size)[rank]
    return [pack([samples[i] for i in indices], device) for indices in bins]


def by_sample(
    samples: Sequence[Sample], values: Iterator[Tensor], *, budget: int, rank: int, world_size: int
) -> dict[int, list[float]]:
    """The way back from `micro_batches`: index in `samples` -> one value for each token said there, this rank's only.

    values: gives the (N,) tensor of each micro-batch, in their order; what follows them is left in it.
    """
    bins = plan([len(s.trajectory.ids) for s in samples], budget, world_size)[rank]
    found = {}
    for indices, values_N in zip(bins, values):
        said = [sum(samples[i].trajectory.said[1:]) for i in indices]
        if sum(said):  # else nobody spoke in it, and its only row stands for nothing
            parts = values_N.float().cpu().split(said)
            found |= {i: part.tolist() for i, part in zip(indices, parts, strict=True)}
    return found
