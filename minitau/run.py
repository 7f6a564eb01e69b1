"""An open run: its folder, its model, its optimizer, and the few things that every stage does with them.

The stages themselves and their losses are in train.py; this file knows no algorithm.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitau import batch, checkpoint, claim, config, memory, parallel, pretrained
from minitau.attention import has_kernel, packed_attention
from minitau.chat import Chat, load_chat
from minitau.episode import BadInput, Trajectory
from minitau.files import write_jsonl
from minitau.log import MetricsLog, check_log, metrics_of
from minitau.model import Qwen3


@dataclass
class Run:
    """What a stage works on, and where it stands."""

    dir: Path
    chat: Chat
    model: Qwen3
    optimizer: torch.optim.Optimizer
    log: MetricsLog
    step: int = 0  # the last one that a checkpoint holds
    state: dict | None = None  # what that checkpoint says


def open_run(stage: str, cfg: config.Training, keeps: Sequence[tuple[str, type]] = (), **also: str) -> Run:
    """Load model and tokenizer, claim the folder, shard, and restore the newest checkpoint if resuming.

    `keeps`: what its checkpoints' state holds beside the step. `also`: what else makes the run what it is, recorded
    with its settings.
    """
    check_log(cfg.wandb, cfg.tensorboard)
    chat = open_chat(cfg.model, cfg.dialect)
    model = pretrained.load_model(cfg.model)
    folder = Path(cfg.out)
    chat.check_vocabulary(model.cfg.vocab_size)
    played = len(list((folder / "collected").glob("round-*.jsonl")))  # RFT counts its rounds as steps

    def not_lost(before: dict[str, Any]) -> None:
        if checkpoint.latest(folder) is None:
            every = before.get("save_every", cfg.save_every)
            require_no_lost_checkpoint(folder, played + 2 * every)  # the second waits until the first is written

    claim_on_main(cfg, {"stage": stage, **also}, cfg.model, not_lost)
    spread(model, cfg)
    optimizer = adamw(model, cfg)
    state = checkpoint.load(folder, model, optimizer, keeps) if cfg.resume else None
    step = state["step"] if state is not None else 0

    def is_done(number: int) -> bool:
        return number <= step or round_file(folder, number).is_file()

    log = MetricsLog(folder, is_done=is_done, enabled=parallel.is_main(), wandb=cfg.wandb, tensorboard=cfg.tensorboard)
    if cfg.resume:
        last = next(number for number in itertools.count(1) if not is_done(number)) - 1
        say(f"{cfg.out}: going on after step {last}" if last else f"{cfg.out}: nothing to resume, starting")
    return Run(folder, chat, model, optimizer, log, step, state)


def round_file(folder: Path, number: int) -> Path:
    """Where RFT keeps the episodes of a round, the first of which is 1."""
    return folder / "collected" / f"round-{number:04d}.jsonl"


def require_no_lost_checkpoint(folder: Path, most: int) -> None:
    """Raise BadInput if a run without checkpoints has done more than `most` steps, for then it had some: to start over
    would drop what it logged."""
    steps = [row["step"] for row in metrics_of(folder / "metrics.jsonl")]
    if steps and max(steps) > most:
        raise BadInput(
            f"{folder} has the metrics of {max(steps)} steps and no checkpoint to go on from; choose another --out, or "
            "remove the folder to start over"
        )


def open_chat(model_dir: str, dialect: str) -> Chat:
    """The chat of a model's directory; one that holds no Qwen3 is refused before anything slow."""
    pretrained.read_config(model_dir)
    return load_chat(model_dir, dialect)


def claim_on_main(
    cfg: Any,
    also: dict[str, Any],
    model_dir: str = "",
    may_go_on: Callable[[dict[str, Any]], None] = lambda before: None,
) -> None:
    """Have the first rank claim cfg.out, as claim.claim_run_dir does; all ranks raise what it raises.

    also: what makes the run what it is beside its settings. model_dir: what its files hold is recorded too.
    """
    problem = ""
    if parallel.is_main():
        try:
            held = {"model_sha256": pretrained.model_sha256(Path(model_dir))} if model_dir else {}
            of_env = config.ENV_DEFAULTS.get(getattr(cfg, "env", ""), {})
            defaults = {field.name: of_env.get(field.name, field.default) for field in dataclasses.fields(cfg)}
            claim.claim_run_dir(cfg.out, cfg.resume, {**dataclasses.asdict(cfg), **also, **held}, defaults, may_go_on)
        except (BadInput, OSError) as error:
            problem = str(error)
    if problem := parallel.from_main(problem):
        raise BadInput(problem)


def open_reference(cfg: config.Training) -> Qwen3:
    """The starting model, frozen: what KL holds the policy to. Nothing is ever added to it, so that it can be kept in
    the dtype in which it is used."""
    model = pretrained.load_model(cfg.model).to(getattr(torch, cfg.dtype))
    spread(model, cfg)
    return model.requires_grad_(False)


def spread(model: Qwen3, cfg: config.Training) -> None:
    """Bring a model that was loaded to this rank's device, compiled if asked and possible, and shard it."""
    model.to(parallel.device())
    model.dtype = dtype = getattr(torch, cfg.dtype)
    if not cfg.compile:
        torch.compiler.set_stance("force_eager")  # the head too
    elif has_kernel(parallel.device(), dtype):
        model.compile_blocks()
    parallel.shard(model, model.model.layers, dtype)


def adamw(model: Qwen3, cfg: config.Training) -> torch.optim.Optimizer:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = parallel.device().type == "cuda"
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=fused)


def micro_batches(cfg: config.Training, samples: Sequence[batch.Sample]) -> list[batch.MicroBatch]:
    """This rank's part of a global batch, packed, on its device."""
    return batch.micro_batches(
        samples,
        budget=cfg.micro_batch_tokens,
        rank=parallel.rank(),
        world_size=parallel.world_size(),
        device=parallel.device(),
    )


def forward(
    model: Qwen3, mb: batch.MicroBatch, temperature: float, dtype: str, weights_N: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Log-probabilities of what the agent said, and entropies there: (N,) each; with weights as Qwen3.forward."""
    attends = packed_attention(mb.cu_seqlens, mb.ids_T.device, getattr(torch, dtype))
    found = model(mb.ids_T, mb.positions_T, attends, mb.predict_N, mb.targets_N, temperature, weights_N)
    if not torch.is_grad_enabled():
        parallel.reshard(model)  # else the next forward would find weights from before the next step
    return found


def update(
    run: Run,
    cfg: config.Training,
    mbs: Sequence[batch.MicroBatch],
    loss_of: Callable[[batch.MicroBatch], tuple[Tensor, dict[str, Tensor]]],
    lr: float,
) -> dict[str, float]:
    """One optimizer step: the loss, per-token means over the global batch, and the gradient norm.

    `loss_of` returns a micro-batch's part of the loss and sums over its tokens. A gradient that is
    not finite would poison every weight and, soon, every checkpoint: that step is skipped, on all
    ranks because the norm is global, and shows in the log as `skipped`.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    dtype = getattr(torch, cfg.dtype)
    run.model.keep = memory.tokens_to_keep(cfg.recompute, run.model, run.optimizer, cfg.micro_batch_tokens, dtype)
    sums: dict[str, Tensor] = {}
    for mb in mbs:
        loss, shown = loss_of(mb)
        parallel.backward(loss)
        for name, value in {"loss": loss, "n": (mb.weights_N > 0).sum(), **shown}.items():
            sums[name] = sums.get(name, 0) + value.detach().double()
    grad_norm = parallel.clipped_step(run.model, run.optimizer, cfg.max_grad_norm)
    if not math.isfinite(grad_norm):
        say("a gradient was not finite: this step is skipped")
    run.optimizer.zero_grad()  # now: until the next update an engine on the same GPU can use the memory
    totals = parallel.sum_over_ranks({name: float(value) for name, value in sums.items()})
    n = max(1.0, totals.pop("n"))
    means = {name: value if name == "loss" else value / n for name, value in totals.items()}
    return {**means, "grad_norm": grad_norm, "skipped": float(not math.isfinite(grad_norm)), "lr": lr}


def save(run: Run, cfg: config.Training, step: int, state: dict) -> None:
    """Begin to write a checkpoint of this step: checkpoint.wait_until_copied before the weights change."""
    dtype, source = getattr(torch, cfg.dtype), Path(cfg.model)
    checkpoint.begin(run.dir, step, run.model, run.optimizer, state, dtype=dtype, tokenizer_dir=source, keep=cfg.keep)


def export(run: Run) -> None:
    """RUN/model: what the newest checkpoint holds, under a name that stays."""
    checkpoint.finish()
    if parallel.is_main():
        scratch, place = run.dir / ".model.tmp", run.dir / "model"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir()
            for file in (checkpoint.latest(run.dir) / "model").iterdir():
                shutil.copy2(file, scratch)
            shutil.rmtree(place, ignore_errors=True)
            scratch.rename(place)
        except OSError:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    parallel.barrier()
    say(f"the trained model is in {run.dir / 'model'}")


def save_trajectories(
    run: Run,
    cfg: config.Training,
    step: int,
    played: Sequence[Trajectory],
    chunks: Sequence[Sequence[batch.Sample]],
    old: Sequence[Tensor],
) -> None:
    """RUN/trajectories/step-000001.jsonl: every episode of the step, and what the update knew of it.

    Those that were trained on have their advantage, and in `old_logprobs` the trainer's log-probability of each token
    said. chunks: the samples of each update; old: the (N,) of each of this rank's micro-batches, in their order.
    """
    logprobs = trainer_logprobs(cfg, chunks, old)
    if not parallel.is_main():
        return
    samples = {id(s.trajectory): (s.advantage, each) for s, each in zip(itertools.chain(*chunks), logprobs)}
    folder = run.dir / "trajectories"
    folder.mkdir(exist_ok=True)

    def row(t: Trajectory) -> dict[str, object]:
        advantage, each = samples.get(id(t), (None, None))
        return {"step": step, "advantage": advantage, "old_logprobs": each, "trajectory": t.to_json()}

    write_jsonl(folder / f"step-{step:06d}.jsonl", map(row, played))


def trainer_logprobs(
    cfg: config.Training, chunks: Sequence[Sequence[batch.Sample]], old: Sequence[Tensor]
) -> list[list[float] | None]:
    """One log-probability for each token said, of each sample of the chunks, in their order and on every rank."""
    values, mine, first = iter(old), {}, 0
    for chunk in chunks:
        found = batch.by_sample(
            chunk,
            values,
            budget=cfg.micro_batch_tokens,
            rank=parallel.rank(),
            world_size=parallel.world_size(),
        )
        mine |= {first + i: each for i, each in found.items()}
        first += len(chunk)
    everyone = {i: each for part in parallel.gather(mine) for i, each in part.items()}
    return [everyone.get(i) for i in range(first)]


def say(text: str) -> None:
    """One line on the console, once for all ranks."""
    if parallel.is_main():
        print(text, flush=True)
