"""What the benchmarks train: a model of random weights with its optimizer, no folder and no data; and micro-batches of
random ids. Must not know what is measured."""

from __future__ import annotations

import argparse
import gc
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.mfu import LENGTHS, SHAPES
from minitau import batch, config, parallel, run
from minitau.model import ModelConfig, Qwen3, init_weights


def lengths_of(args: argparse.Namespace) -> list[int]:
    return list(LENGTHS) if args.shape == "4b" else [64, 32, 16]


def settings(args: argparse.Namespace, lengths: list[int], **also: Any) -> config.SFT:
    return config.SFT(dtype=args.dtype, micro_batch_tokens=sum(lengths), **also)


def open_run(args: argparse.Namespace, cfg: config.SFT) -> SimpleNamespace:
    """What run.update takes of a run: a random model, sharded, and its optimizer."""
    model = random_model(SHAPES[args.shape])
    run.spread(model, cfg)
    return SimpleNamespace(model=model, optimizer=run.adamw(model, cfg))


def random_model(shape: ModelConfig) -> Qwen3:
    """In fp32 on this process's device, and drawn there: a CPU would take a minute."""
    with torch.device(parallel.device()):
        model = Qwen3(shape)
    init_weights(model, 0)
    return model


def micro_batch(cfg: ModelConfig, lengths: list[int], seed: int = 0) -> batch.MicroBatch:
    """Random ids; every token but the first of a sequence is predicted."""
    device = parallel.device()
    generator = torch.Generator(device).manual_seed(seed)
    ids_T = torch.randint(5, cfg.vocab_size, (sum(lengths),), generator=generator, device=device)
    positions_T = torch.cat([torch.arange(n, device=device) for n in lengths])
    targets_N = positions_T.nonzero().squeeze(1)
    values_N = torch.zeros(len(targets_N), device=device)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    weights_N = torch.full_like(values_N, 1 / (len(targets_N) * parallel.world_size()))
    sequence_N = torch.zeros_like(targets_N)
    return batch.MicroBatch(
        ids_T, positions_T, bounds, targets_N - 1, ids_T[targets_N], sequence_N, values_N, values_N, weights_N
    )


def free_everything() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
