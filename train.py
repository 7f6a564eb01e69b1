"""minitau's three stages, each a loop to be read from top to bottom.

    python train.py --stage sft  --model MODEL --data FILE --out RUN
    python train.py --stage rft  --model MODEL --out RUN
    torchrun --nproc_per_node 8 train.py --stage grpo --model MODEL --out RUN
    python train.py --stage grpo --model MODEL --preset tau2-4b --dry-run    # what memory and time it would take

RUN/model is the result, a Hugging Face directory; RUN/metrics.jsonl has one line a step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from minitau import batch, checkpoint, cli, config, grpo, parallel, plan, rejection, report, reward, rollout, sft
from minitau.ahead import Player
from minitau.curriculum import Curriculum
from minitau.engines import check_engine, open_engine
from minitau.envs import open_world
from minitau.episode import BadInput, Task, Trajectory, World
from minitau.files import file_sha256, write_json, write_jsonl
from minitau.log import Clock
from minitau.model import Qwen3
from minitau.probe import sync
from minitau.run import (
    Run,
    export,
    forward,
    micro_batches,
    open_chat,
    open_reference,
    open_run,
    round_file,
    save,
    save_trajectories,
    say,
    update,
)
from minitau.script import run_script
from minitau.tasks import Chosen, fingerprint, for_training, screen

Group = tuple[list[Trajectory], list[float]]  # the attempts at one task, and their shaped rewards

# -- the three stages --------------------------------------------------------------------------------


def train_sft(cfg: config.SFT) -> None:
    """Supervised fine-tuning: conversations from a file, cross-entropy on what the agent said."""
    chat = open_chat(cfg.model, cfg.dialect)
    data = sft.load(cfg.data, chat, min(cfg.max_tokens, cfg.micro_batch_tokens))
    say(data.summary())
    sft.require_enough(data, cfg.max_refused)  # before the folder is claimed
    run = open_run("sft", cfg, data_sha256=file_sha256(cfg.data))
    if parallel.is_main():
        write_json(run.dir / "data_report.json", data.report())
    fit(run, cfg, data.trajectories)


def train_rft(cfg: config.RFT) -> None:
    """Rejection fine-tuning: sample every task, keep the good episodes, SFT on exactly the ids of their replies."""
    check_engine(cfg)
    world = open_world(cfg)
    chosen = for_training(cfg, world, say)
    run = open_run("rft", cfg, **fingerprint(cfg))
    tasks = screened(cfg, chosen, world, run)
    rounds = [tasks[i : i + cfg.round_tasks] for i in range(0, len(tasks), cfg.round_tasks)]
    groups = collect_rounds(run, cfg, world, rounds)
    kept = rejection.reject(groups, cfg.min_partial)
    report_kept(run, groups, kept)
    if not kept:
        say("no episode was good enough to train on: the result is the model that this stage started from")
        save(run, cfg, len(rounds), {})
        return export(run)
    fit(run, cfg, list(map(rejection.without_mistakes, kept)), steps_before=len(rounds))


def train_grpo(cfg: config.GRPO) -> None:
    """GRPO: draw tasks, play groups of episodes, compare inside each group, update, sync, repeat."""
    check_engine(cfg)
    world = open_world(cfg)
    chosen = for_training(cfg, world, say)
    run = open_run("grpo", cfg, keeps=(("curriculum", dict), ("episodes", int)), **fingerprint(cfg))
    tasks = screened(cfg, chosen, world, run)
    if len(tasks) < cfg.tasks_per_step:
        say(f"there are {len(tasks)} tasks only: a step has so many instead of --tasks-per-step {cfg.tasks_per_step}")
    curriculum = Curriculum(tasks, seed=cfg.seed, enabled=cfg.curriculum)
    if run.state:
        curriculum.load_state_dict(run.state["curriculum"])
    episodes = run.state["episodes"] if run.state else 0
    reference = open_reference(cfg) if cfg.kl else None
    engine = open_engine(cfg, run.model, run.chat.stop_ids, cfg.engine_round)
    stage = rollout.open_stage(cfg, world, engine, run.chat)
    player = Player(lambda step: draw_groups(cfg, step, curriculum, stage))
    sync(engine, run, cfg, version=run.step)
    run.log.start("GRPO", cfg.steps, run.step)
    clock = Clock()
    for step in range(run.step + 1, cfg.steps + 1):
        if spent(cfg, episodes):
            break
        with clock.phase("rollout"):
            groups, played, drawn = player.take(step)
        if warning := rollout.require_verdicts(played):
            say(warning)
        engine.sleep()
        episodes += len(played)
        state = {"curriculum": curriculum.state_dict(), "episodes": episodes}  # as of this batch, not of the next
        last = step == cfg.steps or spent(cfg, episodes)
        if cfg.ahead and not last:
            player.start(step + 1)
        if cfg.shuffle_rewards:
            groups = shuffled(groups, seed=f"{cfg.seed}:{step}:shuffle")
        chunks = [chunk for part in split(groups, cfg.updates_per_step) if (chunk := weigh(cfg, part))]
        updates = [micro_batches(cfg, chunk) for chunk in chunks]
        with clock.phase("logprobs"):
            if reference:
                updates = [[score(reference, mb, cfg, "reference_N") for mb in mbs] for mbs in updates]
            if cfg.updates_per_step > 1:
                updates = [[score(run.model, mb, cfg, "old_N") for mb in mbs] for mbs in updates]
        with clock.phase("checkpoint"):
            checkpoint.wait_until_copied()  # of weights that now change: most often it is long since
        old: list[Tensor] = []  # what the trainer thought of every token before its update: kept for people to read
        with clock.phase("update"):
            loss_of = partial(grpo_loss, run.model, cfg=cfg, record=old)
            losses = [update(run, cfg, mbs, loss_of, cfg.lr) for mbs in updates]
        with clock.phase("rollout"):  # no weights change under a request
            player.wait(partial(engine.tend, step))
        with clock.phase("sync"):
            drift_of_sync = sync(engine, run, cfg, version=step)
        metrics = {
            "step": step,
            **rollout.summary(played),
            **drawn,
            "staleness": staleness(played, step - 1),
            **mean_of(losses),
            **drift_of_sync,
            **clock.report(),
        }
        run.log.write(metrics, ("reward", "partial", "zero_variance_share"))
        save_trajectories(run, cfg, step, played, chunks, old)
        clock = Clock()
        if step % cfg.save_every == 0 or last:
            with clock.phase("checkpoint"):  # written while the next batch is played, and counted with that step
                save(run, cfg, step, state)
    run.log.finish()
    engine.close()
    export(run)


# -- what a GRPO step is made of -----------------------------------------------------------------------


def draw_groups(
    cfg: config.GRPO, step: int, curriculum: Curriculum, stage: rollout.Stage
) -> tuple[list[Group], list[Trajectory], dict[str, float]]:
    """Play until there are `tasks_per_step` groups that teach something, or rounds or tasks are used up.

    Returns the batch, every trajectory played, and for the metrics how many groups and rounds it took and which part of
    the groups taught nothing. A batch that is still short is filled with such groups: they have no advantage, but they
    keep its size, and so the meaning of the learning rate.
    """
    groups: list[Group] = []
    teaches: list[bool] = []
    for number in range(cfg.max_rounds if cfg.dynamic_sampling else 1):
        drawn = {group[0].task for group, _ in groups}
        tasks = curriculum.draw(step, cfg.tasks_per_step - sum(teaches), exclude=drawn, round=number)
        jobs = rollout.group_jobs(tasks, cfg.group_size)
        played = rollout.collect(jobs, stage, seed=f"{cfg.seed}:{step}:{number}", label=f"step {step}")
        if number == 0:
            rollout.require_verdicts(played)  # a customer who is gone would be asked for every round's episodes
        for task, group in zip(tasks, rollout.groups_of(played, cfg.group_size)):
            counted = [counts(t) for t in group]
            curriculum.update(task, [t.success for t in group if counts(t)])
            shaped = reward.shape(
                [t.reward for t in group],
                [reward.partial(t.evaluation, task.domain) for t in group],
                counted,
                shaping=cfg.shaping,
                alpha=cfg.alpha,
                scale=reward.domain_scale(task.domain),
            )
            groups.append((group, shaped))
            teaches.append(reward.differs(shaped, counted))
        if sum(teaches) >= cfg.tasks_per_step or len(groups) == len(curriculum.tasks):
            break
    graded = [any(map(counts, group)) for group, _ in groups]
    best = sorted(range(len(groups)), key=lambda i: (not teaches[i], not graded[i]))[: cfg.tasks_per_step]
    flat = 1 - sum(teaches) / max(1, sum(graded))
    share = {"groups": len(groups), "zero_variance_share": flat, "rounds": number + 1}
    return [groups[i] for i in sorted(best)], [t for group, _ in groups for t in group], share


def counts(t: Trajectory) -> bool:
    """Whether an episode says something of the policy: it did not break on our side, and the agent had a turn (else
    there was no room for one, or the customer left before it)."""
    return any(t.said) and not t.stop.ours


def spent(cfg: config.GRPO, episodes: int) -> bool:
    """True once `episodes` have used up a budget that was given."""
    return 0 < cfg.episodes <= episodes


def staleness(played: Sequence[Trajectory], version: int) -> float:
    """The mean, over replies, of how many steps the weights that sampled one are behind `version`, which it trains."""
    behind = [version - turn.weight_version for t in played for turn in t.turns]
    return sum(behind) / max(1, len(behind))


def shuffled(groups: Sequence[Group], seed: str) -> list[Group]:
    """The groups with the rewards of each given to its attempts by lot: see --shuffle-rewards.

    What the curriculum and the metrics say is not touched: they look at the trajectories.
    """
    rng = Random(seed)
    return [(group, reward.shuffled(shaped, [counts(t) for t in group], rng)) for group, shaped in groups]


def split(groups: Sequence[Group], parts: int) -> list[Sequence[Group]]:
    """The batch dealt out to `parts` of about the same size (fewer if there are fewer groups). Groups come in the order
    in which their tasks were drawn, new ones first and those of later rounds last: each part gets of all of them."""
    parts = min(parts, len(groups))
    return [groups[i::parts] for i in range(parts)]


def weigh(cfg: config.GRPO, groups: Sequence[Group]) -> list[batch.Sample]:
    """The trajectories of one optimizer step, each with its advantage and its tokens' weight in the loss.

    Those that do not count stay out, also of what the others are compared with.
    """
    shaped_PG = torch.tensor([shaped for _, shaped in groups], dtype=torch.float64)
    counted_PG = torch.tensor([[counts(t) for t in group] for group, _ in groups])
    advantages_PG = grpo.advantages(shaped_PG, counted_PG, divide_by_std=cfg.divide_by_std)
    advantages_PG = grpo.asymmetric(advantages_PG, cfg.negative_weight)
    trajectories = [t for group, _ in groups for t in group]
    pairs = [(t, a) for t, a in zip(trajectories, advantages_PG.flatten().tolist()) if counts(t)]
    said_S = torch.tensor([sum(t.said) for t, _ in pairs])
    weights_S = grpo.token_weights(said_S, cfg.aggregation, max_tokens=cfg.max_tokens)
    return [batch.Sample(t, advantage, weight) for (t, advantage), weight in zip(pairs, weights_S.tolist())]


def mean_of(losses: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the updates of a step; empty if there was none, because no episode had a turn of the agent."""
    return {name: sum(each[name] for each in losses) / len(losses) for name in (losses[0] if losses else ())}


@torch.no_grad()
def score(model: Qwen3, mb: batch.MicroBatch, cfg: config.GRPO, name: str) -> batch.MicroBatch:
    """`mb` with the log-probabilities of `model` under `name`."""
    return dataclasses.replace(mb, **{name: forward(model, mb, cfg.temperature, cfg.dtype)[0]})


def grpo_loss(
    model: Qwen3, mb: batch.MicroBatch, cfg: config.GRPO, record: list[Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's part of the loss, and sums over its tokens of what the log shows.

    The ratio that is clipped is to `old`, the trainer before this batch's updates, also where an older policy sampled
    the batch (--ahead): that is what truncated importance corrects for. Of a single update old is the policy itself.
    The log-probabilities before the update are also appended to `record`.
    """
    logprobs_N, entropy_N = forward(model, mb, cfg.temperature, cfg.dtype)
    old_N = logprobs_N.detach() if mb.old_N is None else mb.old_N
    if record is not None:
        record.append(old_N)
    policy_N, clipped_N = grpo.policy_loss(
        logprobs_N, old_N, mb.advantages_N, clip_low=cfg.clip_low, clip_high=cfg.clip_high
    )
    live_N = (mb.weights_N > 0).float()
    kept_N = live_N * grpo.sequence_mask(old_N, mb.rollout_N, mb.sequence_N, cfg.sequence_low, cfg.sequence_high)
    policy_N = policy_N * kept_N
    if cfg.importance_cap:
        policy_N = policy_N * grpo.truncated_importance(old_N, mb.rollout_N, cfg.importance_cap)
    loss_N = policy_N - cfg.entropy * entropy_N
    kl_N = torch.zeros_like(loss_N)
    if mb.reference_N is not None:
        kl_N = grpo.k3(logprobs_N, mb.reference_N)
        loss_N = loss_N + cfg.kl * kl_N
    sums = {
        "entropy": entropy_N,
        "kl": kl_N,
        "clip_share": clipped_N.float(),
        "drift": (old_N - mb.rollout_N).abs(),
        "drift_k3": grpo.k3(mb.rollout_N, old_N),
        "masked_share": 1 - kept_N,
        "ratio": (logprobs_N - old_N).exp(),
    }
    return (mb.weights_N * loss_N).sum(), {name: (live_N * each).sum() for name, each in sums.items()}


def sft_loss(model: Qwen3, mb: batch.MicroBatch, dtype: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy on what the agent said."""
    weighted, _, entropy_N = forward(model, mb, 1.0, dtype, mb.weights_N)
    return -weighted, {"entropy": ((mb.weights_N > 0) * entropy_N).sum()}


# -- what the stages are made of -------------------------------------------------------------------------


def screened(cfg: config.RFT | config.GRPO, chosen: Chosen, world: World, run: Run) -> list[Task]:
    """The tasks that do not pay an agent for doing nothing; all of them without --screen.

    Sampling finds what is rewarded, and idleness is found first: those tasks would teach it. What a task
    file does not say is found once, and kept in RUN/screened.json.
    """
    if not cfg.screen:
        return list(chosen)
    path = run.dir / "screened.json"
    if parallel.is_main() and not path.is_file():
        unknown = [task for task, pays in chosen.items() if pays is None]
        found = {**chosen, **(screen(world, unknown) if unknown else {})}
        write_json(path, [task.key for task, pays in found.items() if pays])
    parallel.barrier()
    free = set(read_screened(path))
    say(f"left out {len(free)} of {len(chosen)} tasks that pay for refusing or transferring at once")
    kept = [task for task in chosen if task.key not in free]
    if not kept:
        raise BadInput("every task pays for doing nothing; choose others, or add --no-screen")
    return kept


def read_screened(path: Path) -> list[str]:
    """The tasks' keys in RUN/screened.json. Raises BadInput if it is damaged."""
    try:
        return list(map(str, json.loads(path.read_text())))
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path}: damaged ({error}); remove it, and --resume finds those tasks again") from None


TOO_LATE = "There is a checkpoint of after the rounds, so none is played again: choose another --out to start over"


def collect_rounds(run: Run, cfg: config.RFT, world: World, rounds: Sequence[Sequence[Task]]) -> list[list[Trajectory]]:
    """All attempts at all tasks, a list a task. Each round goes to disk whole, and is played only once."""
    stage = None
    groups = []
    run.log.start("collecting", len(rounds), len(list((run.dir / "collected").glob("round-*.jsonl"))))
    for number, tasks in enumerate(rounds, 1):
        path = round_file(run.dir, number)
        jobs = rollout.group_jobs(tasks, cfg.samples)
        if not path.is_file():
            if run.step:
                raise BadInput(f"{path} is gone. {TOO_LATE}")
            stage = stage or rollout.open_stage(cfg, world, open_engine(cfg, run.model, run.chat.stop_ids), run.chat)
            clock = Clock()
            with clock.phase("sync"):  # also forgets cached prefixes: a round repeats bit for bit
                drift = sync(stage.engine, run, cfg, version=0)
            with clock.phase("rollout"):
                played = rollout.collect(jobs, stage, seed=f"{cfg.seed}:rft:{number}", label=f"round {number}")
            if warning := rollout.require_verdicts(played):
                say(warning)
            metrics = {"step": number, **rollout.summary(played), **drift, **clock.report()}
            run.log.write(metrics, ("reward", "partial"))
            if parallel.is_main():
                path.parent.mkdir(exist_ok=True)
                write_jsonl(path, (t.to_json() for t in played))
            parallel.barrier()
        advice = TOO_LATE if run.step else f"remove {path.name}, and --resume plays that round again"
        played = report.episodes_of(path, advice)
        if [(t.task, t.sample) for t in played] != jobs:
            raise BadInput(f"{path}: these are not the {len(jobs)} episodes of its round; {advice}")
        groups += rollout.groups_of(played, cfg.samples)
    run.log.finish()
    if stage:
        stage.engine.close()
    return groups


def report_kept(run: Run, groups: Sequence[Sequence[Trajectory]], kept: Sequence[Trajectory]) -> None:
    """Say what rejection kept and lost, by domain, here and in RUN/rft_report.json."""
    rows = rejection.kept_rows(groups, kept)
    say(rejection.kept_table(rows))
    if parallel.is_main():
        write_json(run.dir / "rft_report.json", rows)


def fit(run: Run, cfg: config.SFT | config.RFT, trajectories: list[Trajectory], steps_before: int = 0) -> None:
    """The SFT loop: `epochs` shuffled passes over trajectories, then the model is written.

    `steps_before` are the run's steps that were no optimizer steps.
    """
    if not trajectories:
        raise BadInput("nothing to train on: no conversation was kept")
    per_epoch = math.ceil(len(trajectories) / cfg.batch_size)
    total = per_epoch * cfg.epochs
    first = max(run.step, steps_before) + 1
    run.log.start("SFT", total, first - steps_before - 1)
    clock = Clock()
    for step in range(first, steps_before + total + 1):
        done = step - steps_before - 1
        epoch, position = divmod(done, per_epoch)
        order = Random(f"{cfg.seed}:{epoch}:order").sample(trajectories, len(trajectories))
        chosen = order[position * cfg.batch_size : (position + 1) * cfg.batch_size]
        said = max(1, sum(sum(t.said) for t in chosen))
        with clock.phase("checkpoint"):
            checkpoint.wait_until_copied()  # of weights that now change
        with clock.phase("update"):
            mbs = micro_batches(cfg, [batch.Sample(t, weight=1.0 / said) for t in chosen])
            losses = update(run, cfg, mbs, lambda mb: sft_loss(run.model, mb, cfg.dtype), cosine(done, total, cfg))
        tokens = sum(len(t.ids) for t in chosen)
        metrics = {"step": step, "epoch": epoch, "tokens": tokens, "tokens_said": said, **losses, **clock.report()}
        run.log.write(metrics, ("loss", "grad_norm", "lr"))
        clock = Clock()
        if step % cfg.save_every == 0 or step == steps_before + total:
            with clock.phase("checkpoint"):
                save(run, cfg, step, {})
    run.log.finish()
    export(run)


def cosine(done: int, total: int, cfg: config.SFT | config.RFT) -> float:
    """Learning rate of step `done` of `total`: a linear rise over the warm-up, then a cosine to 0."""
    warmup = max(1, round(cfg.warmup * total))
    if done < warmup:
        return cfg.lr * (done + 1) / warmup
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, total - warmup)))


def main(argv: list[str]) -> None:
    stage, cfg, dry_run = cli.parse_stage(argv)
    if dry_run:
        return plan.show(stage, cfg, dry_run)
    parallel.start()
    try:
        {"sft": train_sft, "rft": train_rft, "grpo": train_grpo}[stage](cfg)
    except torch.OutOfMemoryError as error:
        what = ". ".join(str(error).split(". ")[:2])  # that it is out of memory, and what it asked for
        raise OSError(
            f"{what}; go on with --resume --recompute all, or leave an engine on the same GPU less (--engine-mem); or "
            "start anew with fewer --micro-batch-tokens"
        ) from error
    finally:
        try:
            checkpoint.finish()  # what was begun is worth the wait
        except Exception as error:  # every stage has ended with one that was whole, or with an error of its own
            say(f"train.py: {error}")
    parallel.stop()


if __name__ == "__main__":
    sys.exit(run_script("train.py", main, sys.argv[1:], resume="the same command with --resume goes on"))
