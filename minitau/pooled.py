"""What several seeds' runs and evaluations say together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitau import report
from minitau.episode import Trajectory
from minitau.estimators import bootstrap_difference, bootstrap_interval, mean_over_tasks, pass_at_k, pass_hat_k
from minitau.log import metrics_of

BySeed = Mapping[str, Sequence[Trajectory]]  # an evaluation's episodes of each seed


def episodes_played(run: Path) -> int:
    """How many training episodes a run sampled, by its metrics."""
    return sum(line.get("episodes", 0) for line in metrics_of(run / "metrics.jsonl"))


def pooled(stage: str, by_seed: BySeed) -> list[dict[str, Any]]:
    """A row a domain and one for all. pass@1 is over all seeds' trials, its interval over tasks: a task is drawn
    with the trials of every seed; how much seeds differ, `by_seed` shows, and the interval does not know. pass@k
    and pass^k are of one agent, so they are means over the seeds."""
    rows = []
    domains = {seed: dict(report.by_domain(played)) for seed, played in by_seed.items()}
    trials = max(t.sample + 1 for played in by_seed.values() for t in played)
    for domain, everything in report.by_domain(together(by_seed)):
        of_seed = {seed: list(report.tallies(domains[seed].get(domain, [])).values()) for seed in by_seed}
        pairs = list(report.tallies(everything).values())
        row = {
            "stage": stage,
            "domain": domain,
            "tasks": len(pairs),
            "trials": trials,
            "episodes": len(everything),
            "pass@1": mean_over_tasks(pairs, pass_at_k, 1),
            "ci95": bootstrap_interval(pairs),
            "by_seed": {seed: mean_over_tasks(found, pass_at_k, 1) for seed, found in of_seed.items()},
        }
        for k in range(2, trials + 1):
            for name, estimator in (("pass@", pass_at_k), ("pass^", pass_hat_k)):
                each = [mean_over_tasks(found, estimator, k) for found in of_seed.values()]
                known = [value for value in each if value is not None]
                row[f"{name}{k}"] = sum(known) / len(known) if known else None
        stops = Counter(t.stop.value for t in everything)
        rows.append({**row, "stops": dict(sorted(stops.items())), "errors": sum(t.stop.ours for t in everything)})
    return rows


def gain(before: BySeed, after: BySeed, stage: str) -> dict[str, Any]:
    """How far `after`'s pass@1 is above that of `before`, which is called `stage`, over the seeds that have both.

    ci95 is over tasks, each with the trials of every seed; it does not know how much seeds differ, which by_seed shows.
    """
    seeds = [seed for seed in before if seed in after]

    def over(some: Sequence[str]) -> tuple[float, list[float]]:
        old, new = (report.tallies(together({seed: of[seed] for seed in some})) for of in (before, after))
        return bootstrap_difference([(old[task], new[task]) for task in old if task in new])

    value, ci95 = over(seeds)
    return {"over": stage, "seeds": seeds, "gain": value, "ci95": ci95, "by_seed": {s: over([s])[0] for s in seeds}}


def together(by_seed: BySeed) -> list[Trajectory]:
    return [t for played in by_seed.values() for t in played]
