"""pass@k and pass^k of one agent on one split.

    python eval.py --model MODEL --out RUN                         a trained policy
    python eval.py --agent gold --env tau2 --domains retail --out RUN   a script: gold, refuse, transfer

Every finished episode is a line in RUN/episodes-0.jsonl (a file a rank) at once, so that an interrupted evaluation
goes on with --resume; RUN/results.json has a row a domain and one for all.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minitau import checkpoint, config, parallel, rollout
from minitau.engines import open_engine
from minitau.envs import open_world
from minitau.episode import BadInput, EnvError, Stop, Task, Trajectory, World
from minitau.estimators import bootstrap_interval, mean_over_tasks, pass_at_k, pass_hat_k
from minitau.log import open_to_append, progress_bar, run_script
from minitau.report import by_domain, read_episodes, table, tallies
from minitau.run import claim_run_dir, open_chat

TOO_MANY_ERRORS = 0.05  # share of broken episodes above which a score should not be trusted


def evaluate(cfg: config.Evaluation) -> list[dict[str, Any]]:
    """Play what is not played yet; the table's rows, one a domain and one for all."""
    world = open_world(cfg)
    tasks = [task for domain in cfg.domains for task in world.tasks(domain, cfg.split)[: cfg.tasks or None]]
    jobs = rollout.group_jobs(tasks, cfg.num_trials)
    policy = open_policy(cfg) if cfg.agent == "policy" else None
    folder = Path(cfg.out)
    claim_run_dir(cfg.out, cfg.resume, {"script": "eval.py", **dataclasses.asdict(cfg)})
    done = {key for key, trajectory in read_episodes(folder).items() if not trajectory.stop.ours}
    done = parallel.from_main(done)  # the others may see what the first rank already appends
    missing = [(task, sample) for task, sample in jobs if (task.key, sample) not in done]
    start = time.perf_counter()
    # Each rank appends to a file of its own, so that no two processes write into one line.
    with open_to_append(folder / f"episodes-{parallel.rank()}.jsonl") as file:

        def keep(trajectory: Trajectory) -> None:
            file.write(json.dumps(trajectory.to_json(), ensure_ascii=False) + "\n")
            file.flush()

        if policy:
            engine = open_engine(cfg, policy[0], policy[1].stop_ids)
            engine.sync(parallel.full_weights(policy[0]), version=0)
            stage = rollout.open_stage(cfg, world, engine, policy[1])
            rollout.collect(missing, stage, seed=f"{cfg.seed}:eval", label="evaluating", on_done=keep)
            engine.close()
        elif parallel.is_main():
            play_script(cfg, world, missing, keep)
    parallel.barrier()
    seconds = time.perf_counter() - start
    played = list(read_episodes(folder).values())
    return [row(cfg, name, of, seconds) for name, of in by_domain(played)]


def open_policy(cfg: config.Evaluation) -> tuple[Any, Any]:
    if not cfg.model:
        raise BadInput("--model is needed to evaluate a policy; --agent gold, refuse or transfer needs none")
    chat = open_chat(cfg.model, cfg.dialect)
    model = checkpoint.load_model(cfg.model).to(parallel.device(), getattr(torch, cfg.dtype))
    chat.check_vocabulary(model.cfg.vocab_size)
    return model.requires_grad_(False), chat


def play_script(
    cfg: config.Evaluation, world: World, jobs: Sequence[tuple[Task, int]], keep: Callable[[Trajectory], None]
) -> None:
    """Play the world's own script for each job. It samples nothing, so there are no ids to keep."""
    progress = progress_bar(cfg.agent, len(jobs), "episode")
    for task, sample in jobs:
        progress.update()
        trajectory = Trajectory(task, sample)
        try:
            script = world.demonstrate(task, cfg.agent, seed=f"{cfg.seed}:eval:{task.key}:{sample}")
            trajectory.messages = [*script.opening.messages, *script.messages]
            trajectory.stop, trajectory.evaluation = script.stop, script.evaluation
        except EnvError as error:
            trajectory.stop, trajectory.detail = Stop.ENV_ERROR, str(error)
        keep(trajectory)
    progress.close()


def row(cfg: config.Evaluation, domain: str, played: list[Trajectory], seconds: float) -> dict[str, Any]:
    """One line of the table. Episodes that broke on our side are counted apart, not in the score.

    `seconds` is the wall-clock time of this command, all domains together.
    """
    pairs = list(tallies(played).values())
    ks = range(1, cfg.num_trials + 1)
    return {
        "stage": cfg.stage or cfg.agent,
        "domain": domain,
        "split": cfg.split,
        "tasks": len(pairs),
        "trials": cfg.num_trials,
        **{f"pass@{k}": mean_over_tasks(pairs, pass_at_k, k) for k in ks},
        **{f"pass^{k}": mean_over_tasks(pairs, pass_hat_k, k) for k in ks},
        "ci95": bootstrap_interval(pairs),
        "seconds": round(seconds, 1),
        "stops": dict(sorted(Counter(t.stop.value for t in played).items())),
        "errors": sum(t.stop.ours for t in played),
        "model": cfg.model,
        "temperature": cfg.temperature,
        "seed": cfg.seed,
    }


def main(argv: list[str]) -> None:
    cfg = config.parse(config.Evaluation, "eval.py", "pass@k and pass^k of one agent.", argv)
    if not cfg.out:
        raise BadInput("--out is needed")
    parallel.start()
    try:
        rows = evaluate(cfg)
    finally:
        parallel.stop()
    if parallel.is_main():
        checkpoint.write_json(Path(cfg.out) / "results.json", rows)
        print(table(rows))
        played = sum(rows[-1]["stops"].values())
        if rows[-1]["errors"] > TOO_MANY_ERRORS * played:
            print(f"eval.py: {rows[-1]['errors']} of {played} EPISODES BROKE ON OUR SIDE: do not trust this score")


if __name__ == "__main__":
    sys.exit(run_script("eval.py", main, sys.argv[1:], resume="the same command with --resume goes on"))
