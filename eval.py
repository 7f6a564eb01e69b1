"""pass@k and pass^k of one agent on one split, beside what doing nothing earns there.

    python eval.py --model MODEL --out RUN                         a trained policy
    python eval.py --agent gold --env tau2 --domains retail --out RUN   a script: gold, refuse, transfer

Every finished episode is a line in RUN/episodes-0.jsonl (a file a rank) at once, so that an interrupted evaluation
goes on with --resume; RUN/results.json has a row a domain and one for all. RUN/floors holds the episodes of the
scripts that do nothing, RUN/tau2 the results as tau2-bench's own tools read them.
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

from minitau import cli, config, parallel, pretrained, rollout, tau2_results
from minitau.chat import Chat
from minitau.engines import check_engine, open_engine
from minitau.envs import open_world
from minitau.episode import BadInput, EpisodeError, Task, Trajectory, World
from minitau.estimators import bootstrap_interval, counted, mean_over_tasks, pass_at_k, pass_hat_k
from minitau.files import open_to_append, write_json
from minitau.model import Qwen3
from minitau.report import by_domain, every_k, read_episodes, table, tallies
from minitau.run import claim_on_main, open_chat
from minitau.script import progress_bar, run_script
from minitau.tasks import FLOORS, fingerprint, for_evaluation


def evaluate(cfg: config.Evaluation) -> tuple[list[dict[str, Any]], list[Trajectory]]:
    """Play what is not played yet.

    Returns the table's rows, of each agent one a domain and one for all, floors first; and the agent's episodes.
    """
    if cfg.model and cfg.agent != "policy":
        raise BadInput(f"--agent {cfg.agent} plays without a model; leave out that or --model")
    world = open_world(cfg)
    tasks = for_evaluation(cfg, world)
    policy = open_policy(cfg) if cfg.agent == "policy" else None
    folder = Path(cfg.out)
    claim_on_main(cfg, {"script": "eval.py", **fingerprint(cfg)}, cfg.model if policy else "")
    start = time.perf_counter()
    rows = []
    for floor in FLOORS if policy and cfg.floors else ():
        # Once each: what they earn does not depend on the seed, so every further trial would be the same.
        played = play(cfg, world, rollout.group_jobs(tasks, 1), floor, folder / "floors" / floor)
        again = [dataclasses.replace(t, sample=i) for t in played for i in range(cfg.num_trials)]
        rows += [row(cfg, floor, domain, of, time.perf_counter() - start) for domain, of in by_domain(again)]
    jobs = rollout.group_jobs(tasks, cfg.num_trials)
    played = play(cfg, world, jobs, cfg.agent, folder, policy)
    seconds = time.perf_counter() - start
    return rows + [row(cfg, cfg.agent, domain, of, seconds) for domain, of in by_domain(played)], played


def play(
    cfg: config.Evaluation,
    world: World,
    jobs: Sequence[tuple[Task, int]],
    agent: str,
    folder: Path,
    policy: tuple[Qwen3 | None, Chat] | None = None,
) -> list[Trajectory]:
    """Play the (task, trial) of `jobs` that `folder` does not hold yet, and return all that it then holds.

    What broke on our side is played again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = None
    if parallel.is_main():
        done = {key for key, trajectory in read_episodes(folder).items() if not trajectory.stop.ours}
    done = parallel.from_main(done)
    missing = [(task, sample) for task, sample in jobs if (task.key, sample) not in done]
    # Each rank appends to a file of its own, so that no two processes write into one line.
    with open_to_append(folder / f"episodes-{parallel.rank()}.jsonl") as file:

        def keep(trajectory: Trajectory) -> None:
            file.write(json.dumps(trajectory.to_json(), ensure_ascii=False) + "\n")
            file.flush()

        if policy and missing:
            model, chat = policy
            engine = open_engine(cfg, model, chat.stop_ids)
            if model:
                engine.sync(parallel.FullWeights(model), version=0)
            stage = rollout.open_stage(cfg, world, engine, chat)
            rollout.collect(missing, stage, seed=f"{cfg.seed}:eval", label="evaluating", on_done=keep)
            engine.close()
        elif not policy:
            play_script(cfg, world, missing[parallel.rank() :: parallel.world_size()], agent, keep)
    parallel.barrier()
    return list(read_episodes(folder).values())


def open_policy(cfg: config.Evaluation) -> tuple[Qwen3 | None, Chat]:
    """The model, unless the engine reads it for itself, and its chat. Raises BadInput."""
    if not cfg.model:
        raise BadInput("--model is needed to evaluate a policy; --agent gold, refuse or transfer needs none")
    chat = open_chat(cfg.model, cfg.dialect)
    chat.check_vocabulary(pretrained.read_config(cfg.model).vocab_size)
    check_engine(cfg, takes_weights=False)
    if cfg.engine == "sglang":
        return None, chat  # the server reads the weights itself
    model = pretrained.load_model(cfg.model).to(parallel.device(), getattr(torch, cfg.dtype))
    return model.requires_grad_(False), chat


def play_script(
    cfg: config.Evaluation,
    world: World,
    jobs: Sequence[tuple[Task, int]],
    agent: str,
    keep: Callable[[Trajectory], None],
) -> None:
    """Play the world's own script for each job. It samples nothing, so there are no ids to keep."""
    progress = progress_bar(agent, len(jobs), "episode", shown=parallel.is_main())
    for task, sample in jobs:
        trajectory = Trajectory(task, sample)
        try:
            script = world.demonstrate(task, agent, seed=f"{cfg.seed}:eval:{task.key}:{sample}")
            trajectory.messages = [*script.opening.messages, *script.messages]
            trajectory.stop, trajectory.evaluation = script.stop, script.evaluation
        except EpisodeError as error:
            trajectory.stop, trajectory.detail = error.stop, str(error)
        keep(trajectory)
        progress.update()
    progress.close()


def row(cfg: config.Evaluation, agent: str, domain: str, played: list[Trajectory], seconds: float) -> dict[str, Any]:
    """One line of the table. Episodes that broke on our side are counted apart, not in the score.

    tasks          those with a verdict, of `tasks_played`; those with at least k, by k, are `tasks_by_k`
    pass@k, pass^k  means over the tasks that have k verdicts; None if none has
    intervals      95%, by bootstrap over those tasks, of each of them; `ci95` is that of pass@1
    unreliable     so many episodes broke on our side that the score should not be trusted
    seconds        wall clock of this command until the last episode, all domains together
    """
    found = tallies(played)
    pairs = list(found.values())
    ks = range(1, cfg.num_trials + 1)
    estimates = [(f"pass{sign}{k}", of, k) for sign, of in (("@", pass_at_k), ("^", pass_hat_k)) for k in ks]
    intervals = {name: bootstrap_interval(pairs, of, k) for name, of, k in estimates}
    errors = sum(t.stop.ours for t in played)
    customer = cfg.user_model if cfg.env == "tau2" and agent == "policy" else ""
    return {
        "stage": cfg.stage or cfg.agent if agent == cfg.agent else agent,
        "env": cfg.env,
        "domain": domain,
        "split": "+".join(sorted({t.task.split for t in played})),
        "tasks": len(pairs),
        "tasks_played": len({t.task.key for t in played}),
        "tasks_by_k": {str(k): counted(pairs, k) for k in ks},
        "trials": cfg.num_trials,
        "episodes": len(played),
        **{name: mean_over_tasks(pairs, of, k) for name, of, k in estimates},
        "ci95": intervals["pass@1"],
        "intervals": intervals,
        "seconds": round(seconds, 1),
        "stops": dict(sorted(Counter(t.stop.value for t in played).items())),
        "errors": errors,
        "grader_failed": sum(bool(t.evaluation and t.evaluation.note) for t in played),
        "unreliable": errors > rollout.TOO_MANY_BROKEN * len(played),
        "model": cfg.model if agent == "policy" else "",
        "temperature": cfg.temperature,
        "seed": cfg.seed,
        "user_model": customer,
        "user_temperature": cfg.user_temperature if customer not in ("", config.SCRIPTED) else None,
    }


def main(argv: list[str]) -> None:
    cfg = cli.parse(config.Evaluation, "eval.py", "pass@k and pass^k of one agent.", argv)
    if not cfg.out:
        raise BadInput("--out is needed")
    if cfg.greedy:
        cfg = dataclasses.replace(cfg, greedy=False, temperature=0.0)
    parallel.start()
    rows, played = evaluate(cfg)
    parallel.stop()
    if parallel.is_main():
        print(table(rows))
        if cfg.num_trials > 2:  # else the table has them all
            print(f"\n{every_k([row for row in rows if row['stage'] == rows[-1]['stage']])}")
        rollout.require_room(played)
        if rows[-1]["pass@1"] is None:
            raise EpisodeError(f"no episode has a verdict; the first broke by {played[0].detail}; --resume plays again")
        write_json(Path(cfg.out) / "results.json", rows)
        for each in (each for each in rows if each["unreliable"]):
            where = f"{each['stage']} on {each['domain']}: {each['errors']} of {each['episodes']}"
            print(f"eval.py: {where} EPISODES BROKE ON OUR SIDE: do not trust this score; --resume plays them again")
        if cfg.env == "tau2":
            tau2_results.write(Path(cfg.out) / "tau2", played, cfg)


if __name__ == "__main__":
    sys.exit(run_script("eval.py", main, sys.argv[1:], resume="the same command with --resume goes on"))
