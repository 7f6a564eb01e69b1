"""pass@k, pass^k and their uncertainty, from n trials of each task. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb

import numpy as np

Estimator = Callable[[int, int, int], float]  # (trials, successes, k) of one task


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that at least one of k trials succeeds, given c successes in n.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, eq. 1). Needs 1 <= k <= n.
    """
    assert 0 <= c <= n and 1 <= k <= n
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


def pass_hat_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that all of k trials succeed, given c successes in n.

    C(c, k) / C(n, k) (Yao et al. 2024, tau-bench, the estimator of pass^k). Needs 1 <= k <= n.
    """
    assert 0 <= c <= n and 1 <= k <= n
    return comb(c, k) / comb(n, k)


def counted(tallies: Sequence[tuple[int, int]], k: int) -> int:
    """How many tasks have k trials or more, and so count for pass@k and pass^k."""
    return sum(n >= k for n, _ in tallies)


def mean_over_tasks(tallies: Sequence[tuple[int, int]], estimator: Estimator, k: int) -> float | None:
    """Mean of an estimator over tasks' (trials, successes); tasks with fewer than k trials cannot count."""
    values = [estimator(n, c, k) for n, c in tallies if n >= k]
    return sum(values) / len(values) if values else None


def bootstrap_interval(
    tallies: Sequence[tuple[int, int]],
    estimator: Estimator = pass_at_k,
    k: int = 1,
    *,
    draws: int = 10_000,
    seed: int = 0,
) -> list[float]:
    """95% percentile interval [low, high] of mean_over_tasks under resampling of tasks; [0, 1] if none counts.

    Tasks, not episodes, are drawn again: trials of one task resemble each other. Where all tasks
    have the same value, resampling shows no spread at all, and `unseen` stands in. Where nearly all
    have, it shows too little, and fewer than 95% of such intervals hold the truth.
    """
    values = [estimator(n, c, k) for n, c in tallies if n >= k]
    return resampled(values, 0.0, draws, seed) if values else [0.0, 1.0]


def bootstrap_difference(
    pairs: Sequence[tuple[tuple[int, int], tuple[int, int]]], *, draws: int = 10_000, seed: int = 0
) -> tuple[float, list[float]]:
    """pass@1 of the second minus that of the first, and its 95% percentile interval under resampling of tasks.

    pairs: both (trials, successes) of each task. A task's two rates are drawn together, because a task
    that is hard for one agent is hard for the other. Where every task moved alike, resampling shows no
    spread at all, and `unseen` stands in.
    """
    gaps = sorted(new[1] / new[0] - old[1] / old[0] for old, new in pairs if old[0] and new[0])
    if not gaps:
        return 0.0, [-1.0, 1.0]
    return float(np.mean(gaps)), resampled(gaps, -1.0, draws, seed)


def resampled(values: Sequence[float], least: float, draws: int, seed: int) -> list[float]:
    """95% percentile interval of the mean of `values`, which are between `least` and 1, under resampling of them.

    To draw n of n values again is to draw how often each different one is there; of those there are few.
    """
    different, times = np.unique(values, return_counts=True)
    n = len(values)
    if len(different) == 1:
        return unseen(float(different[0]), n, least)
    means = np.random.default_rng(seed).multinomial(n, times / n, size=draws) @ different / n
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(low), float(high)]


def unseen(value: float, n: int, least: float) -> list[float]:
    """What the mean over all tasks may be where each of `n` had the same `value`, which is between `least` and 1.

    A share of tasks that none of n was drawn from is at most 1 - 0.025^(1/n) (the exact binomial bound,
    Clopper & Pearson 1934), and the tasks in it may have any value: all of them `least`, or all of them 1.
    """
    share = 1.0 - 0.025 ** (1.0 / n)
    return [value - share * (value - least), value + share * (1.0 - value)]
