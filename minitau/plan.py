"""--dry-run: what a run would need, before anybody rents the GPUs: memory of a GPU by part, seconds of a step by part.

Arithmetic on a model's config.json, the run's settings and config.DryRun; nothing is loaded, started or measured. The
memory is budget.py's, the formulas of time and the rates in them are pace.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from statistics import fmean
from typing import Any

from minitau import config, host, memory, pace, pretrained
from minitau.budget import (
    Case,
    Part,
    advice,
    bytes_to_keep,
    count_of,
    engine,
    gb,
    keep,
    memory_parts,
    playing_parts,
    problems,
    room,
    tokens_in,
    total,
)
from minitau.engines import launch
from minitau.episode import BadInput
from minitau.memory import ADAM, HALF, MASTER
from minitau.model import ModelConfig

DRAWS = 16  # of a round of conversations, whose mean is what it takes
WORTH_A_WORD = 0.05  # of a rollout, if it is lost because a cache is too small
MOST = 100_000  # conversations of a step or a round that are gone through one by one


def longest(case: Case) -> int:
    """Replies in the longest conversation that the limits allow (a step of tau2's is a message of either side)."""
    cfg, told = case.cfg, case.told
    room = max(1, (case.limit - told.opening_tokens) // (told.said_tokens + told.heard_tokens))
    return min(room, most_turns(cfg))


def most_turns(cfg: Any) -> float:
    """Replies that the limits of playing allow; a file of conversations has none."""
    if isinstance(cfg, config.SFT):
        return math.inf
    return min(cfg.max_turns, cfg.max_steps // 2) if cfg.env == "tau2" else cfg.max_turns


def at_once(case: Case, conversations: int) -> int:
    """Conversations that one engine serves at a time: what --concurrency allows."""
    allowed = min(case.cfg.concurrency, math.ceil(conversations / case.ranks))
    return min(allowed * math.ceil(case.ranks / case.engines), math.ceil(conversations / case.engines))


def rollout(case: Case, rounds: Sequence[int], attempts: int) -> Part:
    """Rounds of so many tasks, one after the other. It says if much of that is due to a cache that is too small, which
    --engine-mem, --engine-sleep and --concurrency can mend."""
    most, held = at_once(case, rounds[0] * attempts), tokens_in(case, engine(case)[1].amount)
    seconds = rollout_seconds(case, rounds, attempts, held)
    over = f" over {case.tp} GPUs, as if they had nothing to say to each other" if case.tp > 1 else ""
    how = (
        f"{' + '.join(map(str, rounds))} tasks x {attempts}, {many(case.engines, 'engine')}{over}, "
        f"{most} at once on each, {longest(case)} turns at most"
    )
    if held < most * pace.length(case.told, longest(case)):  # else it loses nothing
        lost = seconds - rollout_seconds(case, rounds, attempts, math.inf)
        if lost > WORTH_A_WORD * seconds:
            how += f"; {lost:.0f} s of it by what a cache of {held:,.0f} tokens loses"
    return Part("rollout", seconds, how)


def rollout_seconds(case: Case, rounds: Sequence[int], attempts: int, cache: float) -> float:
    """Each round takes as long as the engine that takes longest, on the mean of so many DRAWS of who plays where and
    how long replies are. cache: tokens that an engine keeps."""
    engines, seconds, rng = case.engines, 0.0, Random(0)
    has = {"cache": cache, "openings": len(case.cfg.domains), "tp": case.tp, "shared": case.customers and case.guest}

    def slowest(turns: Sequence[int]) -> float:
        most, shuffled = at_once(case, len(turns)), rng.sample(turns, len(turns))
        shares = (shuffled[i::engines] for i in range(engines))
        return max(pace.round_seconds(case.shape, case.gpu, share, most, case.told, rng, **has) for share in shares)

    for tasks in rounds:
        turns = pace.turns_of(tasks * attempts, case.told.turns, longest(case))
        seconds += fmean(slowest(turns) for _ in range(DRAWS))
    return seconds


def updates(case: Case, conversations: int, parts: int = 1) -> list[Part]:
    """The update, in so many optimizer steps, and before it the log-probabilities that GRPO needs."""
    cfg, told, shape = case.cfg, case.told, case.shape
    turns = pace.turns_of(conversations, told.turns, longest(case))
    turns = Random(0).sample(turns, len(turns))
    passes = case.reference + (parts > 1)
    seconds = [0.0, 0.0]
    for i in range(parts):
        lengths = [pace.length(told, n) for n in turns[i::parts]]
        said = [n * told.said_tokens for n in turns[i::parts]]
        how = {"budget": cfg.micro_batch_tokens, "ranks": case.ranks}
        seconds[0] += passes * pace.update_seconds(shape, lengths, said, **how, forward_only=True)
        seconds[1] += pace.update_seconds(shape, lengths, said, **how, keep=keep(case))
    tokens = sum(pace.length(told, n) for n in turns)
    again = pace.recomputed(shape, keep(case), cfg.micro_batch_tokens)
    speed = f"{case.ranks} x {pace.PEAK_FLOPS / 1e12:.0f} TFLOP/s x MFU {pace.mfu(again / shape.num_hidden_layers):.2f}"
    several = f" x {pace.SEVERAL:g}" if case.ranks > 1 else ""
    how = f"{passes} x a third of the update's FLOP, at MFU {pace.MFU_FORWARD:g}"
    scoring = Part("log-probabilities", seconds[0], how)
    flop = pace.flops(shape, [pace.length(told, n) for n in turns], told.said_tokens * sum(turns))
    how = (
        f"{tokens:,} tokens, {flop / 1e15:.1f} PFLOP / ({speed}{several}), {again} of {shape.num_hidden_layers} blocks "
        "recomputed"
    )
    return [*([scoring] if passes else []), Part("update", seconds[1], how)]


def sync(case: Case) -> Part:
    size = HALF * memory.parameters(case.shape)
    seconds, how = size / pace.SYNC, f"{gb(size)} / {gb(pace.SYNC)}/s to the server"
    if case.ranks > 1:
        theirs = size * (case.ranks - 1) / case.ranks
        seconds, how = seconds + theirs / pace.GATHER, f"{how}, {gb(theirs)} / {gb(pace.GATHER)}/s to gather shards"
    return Part("weight sync", seconds + pace.PROBE, f"{how}, {pace.PROBE:g} s to see that they arrived")


def state_bytes(shape: ModelConfig) -> int:
    """Bytes of a checkpoint's fp32 weights and optimizer."""
    return (MASTER + ADAM) * memory.parameters(shape)


def checkpoint_bytes(shape: ModelConfig) -> int:
    """Bytes of all of it, with the Hugging Face directory."""
    return state_bytes(shape) + HALF * memory.parameters(shape)


def saving(case: Case, step: float, beside: float = 0.0) -> Part:
    """What a step waits for checkpoints: an update for its copy, which is made while the next batch is played, for
    `beside` seconds; and a checkpoint for the one before, which is written while steps of `step` seconds go on."""
    state, size, every = state_bytes(case.shape) / case.ranks, checkpoint_bytes(case.shape), case.cfg.save_every
    copying, writing = state / pace.COPY, size / pace.DISK
    waits = max(0.0, copying - beside, copying + writing - every * step)
    less = f" - {beside:.0f} s of a rollout" if beside else ""
    how = f"{gb(state)} / {gb(pace.COPY)}/s to copy{less}; {gb(size)} / {gb(pace.DISK)}/s to write beside {every} steps"
    return Part("checkpoint", waits / every, how)


def step_parts(case: Case) -> list[Part]:
    """Seconds by part: of an optimizer step of SFT or RFT, or of a whole step of GRPO."""
    cfg = case.cfg
    if case.stage != "grpo":
        training = updates(case, cfg.batch_size)
        return [*training, saving(case, total(training))]
    rounds = rounds_of(case)
    training = updates(case, rounds[0] * cfg.group_size, cfg.updates_per_step)
    playing = rollout(case, rounds, cfg.group_size)
    beside = playing.amount - (total(training) if cfg.ahead else 0.0)  # with --ahead it had begun before the update
    parts = [playing, *training, sync(case)]
    return [*parts, saving(case, step_seconds(case, parts), max(0.0, beside))]


def rounds_of(case: Case) -> list[int]:
    """How many tasks each round of a batch draws: those that it wants, then one for each that taught nothing, as long
    as there are others."""
    cfg, left = case.cfg, case.cfg.tasks or math.inf
    flat = case.told.flat_groups if cfg.dynamic_sampling else 0.0
    rounds = []
    for number in range(cfg.max_rounds if flat else 1):
        rounds.append(min(math.ceil(cfg.tasks_per_step * flat**number), left))
        left -= rounds[-1]
        if not left:
            break
    return rounds


def step_seconds(case: Case, parts: Sequence[Part]) -> float:
    """With --ahead the rollout of one batch goes on beside the training on another."""
    seconds = {part.name: part.amount for part in parts}
    if getattr(case.cfg, "ahead", 0):
        beside = [seconds.pop(name, 0.0) for name in ("log-probabilities", "update")]
        seconds["rollout"] = max(seconds["rollout"], sum(beside))
    return sum(seconds.values())


# -- what is printed ------------------------------------------------------------------------------------------


def many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def table(title: str, parts: Sequence[Part], unit: float = 1.0) -> list[str]:
    return [title, *(f"  {part.name:<24}{part.amount / unit:>8.2f}  {part.how}".rstrip() for part in parts), ""]


def text(case: Case) -> str:
    """The whole plan. It holds also where it does not fit, but for the times."""
    cfg, told, shape, gpu = case.cfg, case.told, case.shape, case.gpu
    mean = pace.length(told, told.turns)
    lines = [
        f"Computed, not measured: {case.stage} of {count_of(shape)} parameters on {told.gpus} x {gpu.name} "
        f"({gb(gpu.memory)}, {gpu.bandwidth / 1e12:g} TB/s each).",
        f"Assumed of conversations: {told.opening_tokens:,} + {told.turns} turns x ({told.said_tokens} said + "
        f"{told.heard_tokens} heard) = {mean:,} tokens on average, a customer of {told.user_seconds:g} s a turn.",
        "",
    ]
    left = room(case)
    keeps = shape.num_hidden_layers - pace.recomputed(shape, keep(case), cfg.micro_batch_tokens)
    weights = f" and {gb(of_block)} of weights a block" if (of_block := memory.kept_weights(shape, case.ranks)) else ""
    each = f"{bytes_to_keep(shape):,} bytes a token{weights}"
    how = f"{keeps} of {shape.num_hidden_layers} blocks, {each}; the others recompute"
    parts = [*memory_parts(case), Part("left for activations", left, how)]
    lines += table("Memory of the GPU that holds most, during an update, GB", parts, 1e9)
    if case.guest and (case.stage == "rft" or cfg.engine_sleep):  # else an update needs all that and more
        playing = playing_parts(case)
        rest = Part("left", gpu.memory - total(playing), "")
        lines += table("Memory of the same GPU while the engine plays, GB", [*playing, rest], 1e9)
    if case.own_gpus:
        own = [
            Part(
                "driver, CUDA context",
                pace.RESERVED + pace.CONTEXT,
                f"{pace.RESERVED / 1e9:g} + {pace.CONTEXT / 1e9:g}",
            ),
            *engine(case),
        ]
        lines += table(f"Memory of each of GPUs {','.join(case.own_gpus)}, GB", own, 1e9)
    loading = case.ranks * MASTER * memory.parameters(shape)
    copy = state_bytes(shape) / host.SHARE
    disk = (cfg.keep + 1) * checkpoint_bytes(shape) + HALF * memory.parameters(shape)
    lines += [
        f"Of the node's own memory: {gb(loading)} to load {many(case.ranks, 'rank')}; later {gb(copy)} free, or "
        "updates wait until checkpoints are on the disk",
        f"Of its disk: {gb(disk)} for {cfg.keep} + 1 checkpoints and the model",
        "",
    ]
    if not problems(case):
        lines += times(case)
    return "\n".join(lines)


def times(case: Case) -> list[str]:
    """Seconds of a step, and of what else the stage does."""
    cfg, parts = case.cfg, step_parts(case)
    seconds = step_seconds(case, parts)
    lines = []
    if case.stage == "rft":
        tasks = min(cfg.round_tasks, cfg.tasks or cfg.round_tasks)
        playing = [rollout(case, [tasks], cfg.samples), sync(case)]
        whole = Part("in all", total(playing), f"for {tasks * cfg.samples} conversations")
        lines += table("Time of a round of collecting, s", [*playing, whole])
    how = "rollout beside the update (--ahead)" if getattr(cfg, "ahead", 0) else "one after the other"
    if case.stage == "grpo":
        steps = cfg.steps
        if cfg.episodes:
            steps = min(steps, math.ceil(cfg.episodes / (sum(rounds_of(case)) * cfg.group_size)))
        how += f"; {many(steps, 'step')}: {steps * seconds / 3600:.1f} hours"
    lines += table("Time of a step, s", [*parts, Part("in all", seconds, how)])
    return [
        *lines,
        "Not counted: starting (loading, compilation, servers), grading, and customers who have to be asked again.",
        "H100 and H200 differ here in memory and bandwidth only.",
        *([] if case.cfg.compile else ["Times are those of compiled blocks; without --compile they are longer."]),
    ]


def show(stage: str, cfg: Any, told: config.DryRun) -> None:
    """Print the plan. Raises BadInput for what cannot be planned and, after it, for what does not fit."""
    case = Case(stage, cfg, pretrained.read_config(cfg.model), told)
    check(case)
    print(text(case))
    if found := problems(case):
        short = pace.length(told, told.turns) <= case.limit
        alone = "a smaller model" if short else "shorter conversations, or more --max-tokens and --micro-batch-tokens"
        enough = "; or ".join(advice(case)) or alone
        raise BadInput(f"it does not fit: {', and '.join(found)}. Enough would be: {enough}")
    print("It fits.")


def check(case: Case) -> None:
    """Raise BadInput for what this file knows no figures of."""
    cfg, gpus = case.cfg, case.own_gpus
    if cfg.dtype != "bfloat16":
        raise BadInput("--dry-run knows the figures of bf16 on GPUs: add --dtype bfloat16, or --preset tau2-4b")
    if case.samples and cfg.engine != "sglang":
        raise BadInput("--dry-run knows the figures of SGLang as the engine: add --engine sglang, or --preset tau2-4b")
    if case.samples and cfg.engine_url:
        raise BadInput("--dry-run does not know where the servers of --engine-url are; name their GPUs: --engine-gpus")
    if case.stage == "grpo":
        most = cfg.tasks_per_step * cfg.group_size
    else:
        most = max(cfg.batch_size, cfg.round_tasks * cfg.samples if case.stage == "rft" else 0)
    if most > MOST:
        raise BadInput(
            f"--dry-run looks at every conversation of a step, of which there are {most:,}; at most {MOST:,}"
        )
    if case.tp > 1:
        launch.gpu_groups(gpus, case.tp)
        launch.check_tp(case.tp, 0 if gpus else case.ranks, case.shape)
    if gpus and not 1 <= len(gpus) // case.tp <= case.ranks:
        least = "as many" if case.tp == 1 else f"one for every {case.tp}"
        raise BadInput(
            f"--engine-gpus takes {len(gpus)} of --gpus {case.told.gpus}; at least {least} must be left to train on"
        )
    if (turns := case.told.turns) > most_turns(cfg):
        raise BadInput(f"--turns is {turns}; the limits end a conversation after {most_turns(cfg)} replies")
    if wrong := [gpu for gpu in gpus if not case.ranks <= int(gpu) < case.told.gpus]:
        free = f"{case.ranks} to {case.told.gpus - 1}"
        raise BadInput(f"--engine-gpus {wrong[0]}: ranks train on the first {case.ranks} GPUs; servers may have {free}")
