"""The picture of a pipeline: scores by stage, loss and reward by step.

It is made of what runs left on disk, results rows and metrics lines, and plays or trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitau.files import written_whole

DOMAIN_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee")


def draw(path: Path, rows: Sequence[dict[str, Any]], curves: dict[str, list[dict[str, Any]]]) -> None:
    """Write a PNG with three panels: pass@1 by stage, SFT loss by step, GRPO reward by step.

    rows: results of the stages, in order; curves: metrics lines under "sft", "rft" and "grpo".
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (scores, loss, reward) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    draw_scores(scores, rows)
    for name in ("sft", "rft"):
        points = [(line["step"], line["loss"]) for line in curves.get(name, []) if "loss" in line]
        if points:
            loss.plot(*zip(*points), label=name.upper())
    loss.set(title="Supervised loss", xlabel="step", ylabel="nats per token")
    loss.legend(frameon=False)
    draw_reward(reward, curves.get("grpo", []))
    for axes in (scores, loss, reward):
        axes.spines[["top", "right"]].set_visible(False)
    with written_whole(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
    pyplot.close(figure)


def draw_scores(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """pass@1 over all domains with its 95% interval, and each domain as a dot."""
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    domains = sorted({row["domain"] for row in rows} - {"all"})
    for i, stage in enumerate(stages):
        for row in (row for row in rows if row["stage"] == stage):
            if row["domain"] == "all":
                low, high = row["ci95"]
                mean = row["pass@1"]
                axes.bar(i, mean, color="#cccccc", width=0.6)
                axes.errorbar(i, mean, yerr=[[mean - low], [high - mean]], color="black", capsize=4)
            else:
                number = domains.index(row["domain"])
                offset = 0.12 * (number - (len(domains) - 1) / 2)
                colour = DOMAIN_COLOURS[number % len(DOMAIN_COLOURS)]
                axes.plot(i + offset, row["pass@1"], "o", color=colour, label=row["domain"] if i == 0 else None)
    axes.set(title="pass@1 on held-out tasks", ylim=(0, 1))
    axes.set_xticks(range(len(stages)), stages)
    axes.legend(frameon=False)


def draw_reward(axes: Any, lines: Sequence[dict[str, Any]]) -> None:
    """Mean reward of each GRPO step, and how many of its groups taught nothing."""
    steps = [line["step"] for line in lines]
    axes.plot(steps, [line["reward"] for line in lines], label="reward")
    axes.plot(steps, [line["partial"] for line in lines], label="partial credit")
    axes.plot(
        steps, [line["zero_variance_share"] for line in lines], ":", color="grey", label="groups without a difference"
    )
    axes.set(title="GRPO on training tasks", xlabel="step", ylim=(0, 1))
    axes.legend(frameon=False)
