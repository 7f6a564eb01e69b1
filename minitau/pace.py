"""How long the parts of a step take on GPUs that nobody has rented yet: rates that were measured, and arithmetic.

`update_seconds` and `round_seconds` are what a benchmark can hold against its clock. This file loads and measures
nothing; it knows a model by its shape, and no settings but those of the dry run. Letters as in memory.py.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Sequence
from random import Random
from typing import NamedTuple

from minitau import batch, config, memory
from minitau.memory import HALF
from minitau.model import ModelConfig


class Gpu(NamedTuple):
    name: str
    memory: int  # bytes, as nvidia-smi has them
    bandwidth: float  # bytes a second, as the datasheet has it


# The two differ here in these two numbers only: their matrix units are the same, and so are the rates below.
GPUS = {"h100": Gpu("H100 80GB", 81_559 << 20, 3.35e12), "h200": Gpu("H200", 143_771 << 20, 4.8e12)}
PEAK_FLOPS = 989e12  # dense bf16 of either, datasheet
# Measured, each on H200s with random weights of the 4B shape:
MFU_KEPT = 0.539  # benchmarks/trainer.py --parts speed, one GPU, 16k tokens, nothing recomputed; AdamW is in it
MFU_RECOMPUTED = 0.442  # the same, every block recomputed
MFU_FORWARD = 0.62  # of log-probabilities: benchmarks/whole_step.py, on two GPUs
# Of SGLang 0.5.16 on one H200, seen once by hand: 64 at once, each of 4096 cached and 512 new tokens, say 256.
DECODE = 0.98  # part of the bandwidth at which it reads weights and cache: 5.7k tokens/s
PREFILL = 0.426  # part of the peak, for 2 FLOP a weight of the blocks: 58k tokens/s; 4.7k are said a second with both
SHARED = 2.4  # times as long as alone takes a reply beside customers' servers on the same GPUs, and
LATENCY = 0.26  # seconds more: by how long an episode waited for its replies in seven steps of benchmarks/whole_step.py
EVICTED = 3.5  # times what a cache has no room for is lost: see `part_lost`
SYNC = 8.04e9 / 0.067  # bytes/s to a server: benchmarks/engine.py, one GPU
PROBE = 0.45  # seconds to see that weights arrived: benchmarks/whole_step.py, two GPUs; see minitau/probe.py
GATHER = 4.02e9 / 0.012  # bytes/s that a GPU gets of others' FSDP2 shards: the same, two GPUs with NVLink
SEVERAL = 0.95  # of one GPU's speed where FSDP2 moves weights and gradients: benchmarks/trainer.py, two GPUs
COPY = 24.1e9 / 4.2  # bytes/s of a rank's weights and optimizer to the host: benchmarks/checkpoints.py, two ranks
DISK = 56.3e9 / 51.1  # bytes/s of a checkpoint from there, all ranks together: the same, one machine's disk
# Not measured yet:
RESERVED = 0.6e9  # bytes of a GPU that its driver keeps
CONTEXT = 0.5e9  # of each process that uses a GPU
BESIDE = 2e9  # of a server of SGLang: CUDA graphs and workspace, which --engine-mem does not count


def flops(shape: ModelConfig, lengths: Sequence[int], said: int) -> float:
    """FLOP of forward and backward over packed sequences of these lengths, with `said` rows at the head: 6 for each
    weight that a token meets, and 6 L H d len^2 of causal attention, which is counted at half. Nothing that is computed
    again counts."""
    blocks = shape.num_hidden_layers * memory.block_parameters(shape)
    attention = shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    head = shape.vocab_size * shape.hidden_size
    return 6.0 * (blocks * sum(lengths) + head * said + attention * sum(n * n for n in lengths))


def mfu(again: float) -> float:
    """Model FLOPs utilisation of training, from 0 to 1, if the part `again` of the blocks is recomputed."""
    return MFU_KEPT + again * (MFU_RECOMPUTED - MFU_KEPT)


def recomputed(shape: ModelConfig, keep: float, tokens: int) -> int:
    """How many blocks of a forward of so many tokens are computed again in its backward, as Qwen3.recomputed has it."""
    return shape.num_hidden_layers - int(min(shape.num_hidden_layers, keep / tokens))


def update_seconds(
    shape: ModelConfig,
    lengths: Sequence[int],
    said: Sequence[int],
    *,
    budget: int,
    ranks: int = 1,
    keep: float = math.inf,
    forward_only: bool = False,
) -> float:
    """Seconds of an optimizer step, or of log-probabilities alone, on trajectories of these lengths, of which the agent
    said so many tokens. The ranks take a micro-batch together, so that the longest of them counts.

    budget: --micro-batch-tokens. keep: see Qwen3.keep.
    """
    bins = batch.plan(lengths, budget, ranks)

    def seconds(indices: Sequence[int]) -> float:
        packed = [lengths[i] for i in indices]
        again = recomputed(shape, keep, sum(packed)) / shape.num_hidden_layers if packed else 0.0
        work = flops(shape, packed, sum(said[i] for i in indices)) / PEAK_FLOPS
        return work / 3 / MFU_FORWARD if forward_only else work / (mfu(again) * (SEVERAL if ranks > 1 else 1))

    return sum(max(seconds(of_rank) for of_rank in at_once) for at_once in zip(*bins))


def cache_bytes(shape: ModelConfig) -> int:
    """Bytes a token in an engine's KV cache."""
    return 2 * HALF * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim


def turns_of(count: int, mean: float, longest: int) -> list[int]:
    """Replies in each of `count` conversations: evenly spaced quantiles of longest x u^(longest / mean - 1), whose
    mean is `mean`."""
    power = longest / min(mean, longest) - 1
    return [max(1, round(longest * ((i + 0.5) / count) ** power)) for i in range(count)]


def length(told: config.DryRun, turns: int) -> int:
    return told.opening_tokens + turns * (told.said_tokens + told.heard_tokens)


def reply_seconds(
    shape: ModelConfig,
    gpu: Gpu,
    contexts: Sequence[int],
    told: config.DryRun,
    *,
    lost: float = 0.0,
    tp: int = 1,
    shared: bool = False,
) -> float:
    """Seconds until one reply in each of the conversations of these lengths is there, on one engine.

    Decoding: every token that is said reads all weights and cache once, but of an embedding apart from the head its own
    row. Prefill: what was heard meets all blocks, and so does the part of each conversation, its opening aside, that
    the cache has `lost`. Over `tp` GPUs both are divided as if these had nothing to say to each other, which nobody has
    measured here. shared: with customers on the same GPUs.
    """
    looked_up = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    reads = HALF * (memory.parameters(shape) - looked_up) + sum(contexts) * cache_bytes(shape)
    blocks = shape.num_hidden_layers * memory.block_parameters(shape)
    prefill = tp * PREFILL * PEAK_FLOPS / (2 * blocks)  # tokens a second
    said = told.said_tokens * reads / (tp * DECODE * gpu.bandwidth)
    grown = sum(contexts) - len(contexts) * told.opening_tokens
    alone = said + (len(contexts) * told.heard_tokens + lost * grown) / prefill
    return SHARED * alone + LATENCY if shared else alone


def part_lost(lengths: Collection[int], opening: int, cache: float, openings: int) -> float:
    """Which part of conversations of these lengths, their openings aside, a cache of so many tokens has lost by their
    next turn.

    There are so many different openings, and somebody has just used each of them: they stay. Of the rest what was used
    least recently goes first, which is what comes back next, so that more is lost than there is no room for: EVICTED
    times as much, which is fitted to the rollouts of three steps of 100 messages (benchmarks/whole_step.py) and stands
    for all that makes them longer there. By the engines' logs it was less that was read again.
    """
    grown = sum(lengths) - len(lengths) * opening
    room = cache - min(openings, len(lengths)) * opening
    return min(1.0, EVICTED * (1 - room / grown)) if grown > max(0.0, room) else 0.0


def round_seconds(
    shape: ModelConfig,
    gpu: Gpu,
    turns: Sequence[int],
    at_once: int,
    told: config.DryRun,
    rng: Random,
    *,
    cache: float = math.inf,
    openings: int = 1,
    tp: int = 1,
    shared: bool = False,
) -> float:
    """Seconds of conversations of so many replies on one engine, at most `at_once` at a time, one starting where
    another ends, each at its own pace.

    A reply and the wait for its customer take longer or shorter than the mean as if each token could be the last
    (`vary`), so that the longest conversation, for which all wait, is one of long replies. A reply goes on beside those
    that others are given at that time. cache: tokens that the engine keeps, of all who play and of so many different
    openings: see `part_lost`.
    """
    waiting, now = list(turns), 0.0
    playing: list[tuple[float, int, int, int]] = []  # when its turn ends, its number, replies done by then, and in all
    lengths: dict[int, int] = {}  # tokens of those who play, by number
    answered: dict[int, float] = {}  # when each one's reply is there
    while waiting or playing:
        asking: list[tuple[int, int, int]] = []
        while waiting and len(lengths) < at_once:
            number = len(waiting)
            lengths[number], answered[number] = length(told, 0), math.inf
            asking.append((number, 0, waiting.pop(0)))
        if not asking:
            now, number, done, of = heapq.heappop(playing)
            if done == of:
                del lengths[number], answered[number]
                continue
            lengths[number], answered[number] = length(told, done), math.inf
            asking = [(number, done, of)]
        for number, done, of in asking:
            beside = [lengths[other] for other, until in answered.items() if until > now]
            lost = part_lost(lengths.values(), told.opening_tokens, cache, openings)
            reply = reply_seconds(shape, gpu, beside, told, lost=lost, tp=tp, shared=shared) * vary(rng)
            answered[number] = now + reply
            heapq.heappush(playing, (now + reply + told.user_seconds * vary(rng), number, done + 1, of))
    return now


def vary(rng: Random) -> float:
    """Exponential with mean 1."""
    return rng.expovariate(1.0)
