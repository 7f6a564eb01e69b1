"""What a run would need of the memory of GPUs that nobody has rented yet, by part, and what to change if it is more.

memory.py knows what training needs; here it shares a GPU with engine, customers and reference. `peak_bytes` is what a
benchmark can hold against the peak of training. GB are 1e9 bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from minitau import config, memory
from minitau.memory import ADAM, GRADIENT, HALF, MASTER, SLACK
from minitau.model import ModelConfig
from minitau.pace import BESIDE, CONTEXT, GPUS, RESERVED, Gpu, cache_bytes, length

ADVICE = 6  # ways out that are told, if there are more


class Part(NamedTuple):
    """A line of the plan."""

    name: str
    amount: float  # bytes or seconds
    how: str  # the formula with its inputs


@dataclass(frozen=True)
class Case:
    """What is planned."""

    stage: str
    cfg: Any  # config.SFT, RFT or GRPO
    shape: ModelConfig
    told: config.DryRun

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.told.gpu]

    @property
    def ranks(self) -> int:
        return self.told.gpus - len(self.own_gpus)

    @property
    def own_gpus(self) -> tuple[str, ...]:
        """GPUs that hold nothing but an engine."""
        return getattr(self.cfg, "engine_gpus", ())

    @property
    def tp(self) -> int:
        """GPUs that one engine is spread over."""
        return getattr(self.cfg, "engine_tp", 1)

    @property
    def engines(self) -> int:
        return (len(self.own_gpus) or self.ranks) // self.tp

    @property
    def samples(self) -> bool:
        return self.stage != "sft"

    @property
    def guest(self) -> bool:
        """Is there an engine on every GPU that trains?"""
        return self.samples and not self.own_gpus

    @property
    def customers(self) -> bool:
        """Is there a server of customers on a GPU that trains?"""
        simulated = self.samples and self.cfg.env == "tau2" and self.cfg.user_model != config.SCRIPTED
        return simulated and self.told.user_mem > 0

    @property
    def limit(self) -> int:
        """Tokens of the longest conversation that is trained on."""
        return min(self.cfg.max_tokens, self.cfg.micro_batch_tokens)

    @property
    def reference(self) -> bool:
        return self.stage == "grpo" and self.cfg.kl > 0


def peak_bytes(shape: ModelConfig, tokens: int, ranks: int, recomputed: int) -> int:
    """What training alone takes at its height: as torch.cuda.max_memory_allocated() over updates of at least two
    micro-batches of `tokens`, with so many blocks recomputed."""
    of_block = tokens * bytes_to_keep(shape) + memory.kept_weights(shape, ranks)
    return memory.needs(shape, tokens, ranks).total + (shape.num_hidden_layers - recomputed) * of_block


def bytes_to_keep(shape: ModelConfig, compiled: bool = True) -> int:
    """What it takes not to recompute one token in one block."""
    return memory.kept_by_block(shape, compiled) - memory.kept_by_recomputed(shape)


def lodgers(case: Case) -> list[Part]:
    """What is on a GPU that trains before training and the engine are: driver, processes, customers."""
    count = 1 + case.guest + case.customers
    how = f"{RESERVED / 1e9:g} + {CONTEXT / 1e9:g} for each process ({count})"
    parts = [Part("driver, CUDA contexts", RESERVED + count * CONTEXT, how)]
    if case.customers:
        share = case.told.user_mem * case.gpu.memory
        how = f"--user-mem {case.told.user_mem:g} x {gb(case.gpu.memory)} + {BESIDE / 1e9:g} beside"
        parts.append(Part("customers' server", share + BESIDE, how))
    return parts


def engine(case: Case) -> list[Part]:
    """An engine's share of a GPU: it takes --engine-mem of what is free when it starts, weights and cache in one. Of
    both each of its GPUs holds as much."""
    weights, over = HALF * memory.parameters(case.shape) / case.tp, f" / {case.tp} GPUs" if case.tp > 1 else ""
    there = total(lodgers(case)) + sharded(case) if case.guest else RESERVED + CONTEXT
    free = case.gpu.memory - there
    cache = max(0.0, case.cfg.engine_mem * free - weights)
    how = f"--engine-mem {case.cfg.engine_mem:g} x {gb(free)} free at its start, less weights"
    held = f"{tokens_in(case, cache):,.0f} tokens" + (f" on {case.tp} GPUs" if case.tp > 1 else "")
    return [
        Part("engine: weights", weights, f"2 bytes x {count_of(case.shape)}{over}"),
        Part("engine: KV cache", cache, f"{how}: {held}"),
        Part("engine: beside them", BESIDE, "CUDA graphs, workspace"),
    ]


def cache_after_a_restart(case: Case) -> float:
    """Bytes of the cache of an engine that starts beside an optimizer with its moments: with --resume, or because it
    died. It takes the same part of less."""
    moments = ADAM * memory.parameters(case.shape) / case.ranks if case.guest and case.stage == "grpo" else 0.0
    return max(0.0, engine(case)[1].amount - case.cfg.engine_mem * moments)


def tokens_in(case: Case, cache: float) -> float:
    """Whole tokens that an engine's cache holds, of which each of its GPUs has so many bytes."""
    return cache * case.tp // cache_bytes(case.shape)


def sharded(case: Case) -> float:
    """Bytes of weights on a rank when training begins: the model's, and those of the reference that KL needs."""
    return (MASTER + HALF * case.reference) * memory.parameters(case.shape) / case.ranks


def resting(case: Case) -> list[Part]:
    """What training holds also while nothing trains, but for what the engine has."""
    needs, of = memory.needs(case.shape, case.cfg.micro_batch_tokens, case.ranks, case.cfg.compile), ranks_of(case)
    parts = [
        Part("weights", needs.weights, f"{MASTER} bytes x {count_of(case.shape)}{of}"),
        Part("optimizer", needs.optimizer, f"{ADAM} bytes x {count_of(case.shape)}{of}"),
    ]
    if case.reference:
        how = f"for --kl: {HALF} bytes x {count_of(case.shape)}{of}"
        parts.append(Part("reference", HALF * memory.parameters(case.shape) / case.ranks, how))
    return parts


def memory_parts(case: Case) -> list[Part]:
    """What the GPU that holds most has on it at the height of an update, by part; without kept activations."""
    tokens, shape = case.cfg.micro_batch_tokens, case.shape
    needs = memory.needs(shape, tokens, case.ranks, case.cfg.compile)
    asleep = getattr(case.cfg, "engine_sleep", False)
    there = case.guest and case.stage == "grpo"  # RFT's has gone when training begins
    servers = [part for part in engine(case) if not (asleep and "cache" in part.name)] if there else []
    return [
        *lodgers(case),
        *servers,
        *resting(case),
        Part("gradients", needs.gradients, f"{GRADIENT} bytes x {count_of(shape)}{ranks_of(case)}"),
        Part("gathered", needs.gathered, "bf16 of embeddings and two blocks, two blocks' gradients"),
        Part("kept inputs", needs.inputs, f"{tokens:,} tokens x {needs.inputs // tokens:,} bytes"),
        Part("working", needs.working, "the backward of the head, or of a block that is recomputed"),
        Part("left alone", SLACK * case.gpu.memory, f"{SLACK:g} x {gb(case.gpu.memory)}"),
    ]


def playing_parts(case: Case) -> list[Part]:
    """What a GPU that trains has on it while the engine there plays, by part. RFT has no optimizer yet."""
    return [*lodgers(case), *engine(case), *resting(case)[: 1 if case.stage == "rft" else None]]


def room(case: Case) -> float:
    """Bytes for kept activations; below 0 it does not fit."""
    return case.gpu.memory - total(memory_parts(case))


def keep(case: Case) -> float:
    """For how many tokens, summed over blocks, a GPU has room: what memory.tokens_to_keep would find there."""
    if case.cfg.recompute != "auto":
        return 0.0 if case.cfg.recompute == "all" else math.inf
    return max(0.0, (room(case) - weights_to_keep(case)) / bytes_to_keep(case.shape, case.cfg.compile))


def weights_to_keep(case: Case) -> int:
    """Bytes beside those of tokens, if no block is recomputed."""
    return case.shape.num_hidden_layers * memory.kept_weights(case.shape, case.ranks)


def problems(case: Case) -> list[str]:
    """What does not fit, a sentence each."""
    found, have, shape = [], case.gpu.memory, case.shape
    if (left := room(case)) < 0:
        found.append(f"an update needs {gb(-left)} more than a GPU has, even with every block recomputed")
    elif case.cfg.recompute == "none":
        kept = case.cfg.micro_batch_tokens * bytes_to_keep(shape, case.cfg.compile)
        wanted = shape.num_hidden_layers * kept + weights_to_keep(case)
        if wanted > left:
            found.append(f"--recompute none needs {gb(wanted - left)} more than a GPU has")
    if (mean := length(case.told, case.told.turns)) > case.limit:
        found.append(f"conversations of {mean:,} tokens are longer than the limit of {case.limit:,}")
    loading = total(lodgers(case)) + sharded(case) + MASTER * memory.parameters(shape) * (1 - 1 / case.ranks)
    if loading > have:
        found.append(f"loading puts whole fp32 weights on each GPU, {gb(loading - have)} more than it has")
    if case.samples:
        tokens = tokens_in(case, cache_after_a_restart(case))
        if tokens < case.cfg.max_tokens:
            when = " once it has to start again beside the optimizer" if case.guest and case.stage == "grpo" else ""
            found.append(
                f"the engine's cache holds {tokens:,.0f} tokens{when}, not one conversation of --max-tokens "
                f"{case.cfg.max_tokens:,}"
            )
        if case.own_gpus and (alone := RESERVED + CONTEXT + total(engine(case))) > have:
            found.append(f"an engine alone on its GPU needs {gb(alone - have)} more than it has")
        awake = total(playing_parts(case))
        if case.guest and awake > have:
            found.append(f"a rollout beside the resting trainer needs {gb(awake - have)} more than a GPU has")
    return found


def changes(case: Case) -> dict[str, dict[str, Any]]:
    """What may be changed to make it fit, mildest first: how it is typed, and the settings that it is."""
    cfg = case.cfg
    found: dict[str, dict[str, Any]] = {}
    if cfg.recompute == "none":
        found["--recompute auto"] = {"recompute": "auto"}
    if case.guest and case.stage == "grpo" and not (cfg.engine_sleep or cfg.ahead):
        found["--engine-sleep"] = {"engine_sleep": True}
    if case.samples:
        found |= {f"--engine-mem {part:g}": {"engine_mem": part} for part in (0.2, 0.6, 0.8)}
    if case.customers:
        found["customers elsewhere (--user-mem 0)"] = {"user_mem": 0.0}
    half = cfg.micro_batch_tokens // 2
    while half // 2 >= cfg.max_tokens and room(changed(case, {"micro_batch_tokens": half})) < 0:
        half //= 2  # of far too many half is too many as well
    found[f"--micro-batch-tokens {half} --max-tokens {min(half, cfg.max_tokens)}"] = {
        "micro_batch_tokens": half,
        "max_tokens": min(half, cfg.max_tokens),
    }
    if case.reference:
        found["--kl 0"] = {"kl": 0.0}
    return found


def changed(case: Case, settings: dict[str, Any]) -> Case:
    """The case with some of its settings, or of what it was told, replaced."""
    told = {name: value for name, value in settings.items() if hasattr(case.told, name)}
    cfg = {name: value for name, value in settings.items() if name not in told}
    return dataclasses.replace(
        case, cfg=dataclasses.replace(case.cfg, **cfg), told=dataclasses.replace(case.told, **told)
    )


def advice(case: Case) -> list[str]:
    """With what everything fits: the smallest sets of changes on these GPUs, and the first other GPUs. Empty if with
    none of them."""
    possible, enough = changes(case), []
    for size in (1, 2, 3):
        for names in itertools.combinations(possible, size):
            settings = {name: value for each in names for name, value in possible[each].items()}
            distinct = len(settings) == sum(len(possible[each]) for each in names)
            if distinct and not problems(changed(case, settings)):
                enough.append(" with ".join(names))
        if enough:
            break
    hardware = [{"gpu": "h200"}] if case.told.gpu == "h100" else []
    if not case.own_gpus:
        hardware += [{"gpus": gpus} for gpus in (2, 4, 8) if gpus > case.told.gpus and gpus % case.tp == 0]
    others = [each for each in hardware if not problems(changed(case, each))]
    return enough[:ADVICE] + [f"--{name} {value}" for each in others[:2] for name, value in each.items()]


def total(parts: Sequence[Part]) -> float:
    return sum(part.amount for part in parts)


def gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def count_of(shape: ModelConfig) -> str:
    return f"{memory.parameters(shape) / 1e9:.2f}e9"


def ranks_of(case: Case) -> str:
    return f" / {case.ranks} ranks" if case.ranks > 1 else ""
