"""Which of the sampled episodes rejection fine-tuning trains on, and what it lost. Pure functions of episodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from minitau.episode import Trajectory
from minitau.report import aligned
from minitau.reward import partial


def reject(groups: Iterable[Sequence[Trajectory]], min_partial: float) -> list[Trajectory]:
    """What RFT trains on: of each task every attempt with reward 1, else the best partial one.

    An unsolved task keeps its best attempt if its partial score reaches `min_partial`; among equals
    the first. Episodes that broke on our side are never kept, nor those without a reply to imitate.
    """
    kept: list[Trajectory] = []
    for group in groups:
        graded = [t for t in group if not t.stop.ours and any(without_mistakes(t).said)]
        solved = [t for t in graded if t.success]
        if solved:
            kept += solved
        elif graded:
            best = max(graded, key=lambda t: partial(t.evaluation, t.task.domain))
            if partial(best.evaluation, best.task.domain) >= min_partial:
                kept.append(best)
    return kept


def without_mistakes(t: Trajectory) -> Trajectory:
    """`t` with its malformed replies as context only: GRPO's advantage may speak against them, imitation cannot."""
    said = list(t.said)
    for turn in t.turns:
        if turn.error:
            said[turn.start : turn.end] = [False] * (turn.end - turn.start)
    return replace(t, said=said)


def kept_rows(groups: Iterable[Sequence[Trajectory]], kept: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """What rejection kept and lost, a row a domain and one of "all". Means are over episodes with a verdict.

    tasks = solved + partial + lost; of the lost ones, `broken` had no attempt with a verdict.
    """
    groups = [list(group) for group in groups]
    chosen, passed = {t.task for t in kept}, {t.task for t in kept if t.success}
    rows = []
    domains = list(dict.fromkeys(group[0].task.domain for group in groups))
    for domain in [*domains, "all"] if len(domains) > 1 else domains:
        ours = [group for group in groups if domain in ("all", group[0].task.domain)]
        graded = [t for group in ours for t in group if not t.stop.ours]
        solved = sum(group[0].task in passed for group in ours)
        lost = sum(group[0].task not in chosen for group in ours)
        rows.append(
            {
                "domain": domain,
                "tasks": len(ours),
                "solved": solved,
                "partial": len(ours) - solved - lost,
                "lost": lost,
                "broken": sum(all(t.stop.ours for t in group) for group in ours),
                "attempts": sum(map(len, ours)),
                "attempts_broken": sum(map(len, ours)) - len(graded),
                "kept": sum(domain in ("all", t.task.domain) for t in kept),
                "reward": sum(t.reward for t in graded) / max(1, len(graded)),
                "partial_score": sum(partial(t.evaluation, t.task.domain) for t in graded) / max(1, len(graded)),
            }
        )
    return rows


def kept_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return aligned([[name.replace("_", " ") for name in rows[0]], *cells])
