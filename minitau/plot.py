"""A run's curves as one picture; several seeds of the same settings become their mean with an interval.

    python -m minitau.plot RUN [RUN ...] --out FILE

Runs that differ in nothing but the seed, and in settings that a resumed run may change, are drawn together: at every
step that all of them have, the mean over seeds and its 95% interval by Student's t. It is made of config.json and
metrics.jsonl alone.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitau import catalogue, cli, report
from minitau.claim import FREE_ON_RESUME
from minitau.config import setting
from minitau.episode import BadInput
from minitau.files import written_whole
from minitau.log import metrics_of
from minitau.script import run_script

# See student(): from 1 degree of freedom on; the last one stands for all after it.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee")
PHASES = {"rollout": "#4477aa", "logprobs": "#66ccee", "update": "#ee6677", "sync": "#ccbb44", "checkpoint": "#bbbbbb"}
# Title, metric, the metric that is drawn dashed beside it, and how the axis is made.
PANELS = (
    ("reward (dashed: partial credit)", "reward", "partial", {"ylim": (0, 1)}),
    ("pass rate", "pass_rate", "", {"ylim": (0, 1)}),
    ("drift, nats per token", "drift", "", {"yscale": "log"}),
    ("entropy, nats per token", "entropy", "", {"ylim": (0, None)}),
    ("tokens of an episode (dashed: longest)", "length_mean", "length_max", {"ylim": (0, None)}),
)
# Settings that do not change what is computed: those that a resumed run may change, but for how long it is.
MEANS = FREE_ON_RESUME - {"steps", "episodes"}
Point = tuple[int, float, float]  # step, mean, half of the interval's width


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What becomes of the curves."""

    out: str = setting("curves.png", "the picture, a PNG")
    together: bool = setting(False, "all RUNs are seeds of one thing, whatever their settings say")


# -- what is drawn -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Runs that are seeds of one thing: its name, and each one's metrics lines."""

    name: str
    runs: list[list[dict[str, Any]]]

    def __str__(self) -> str:
        n = len(self.runs)
        return f"{self.name}, mean of {n} seeds and its 95% interval" if n > 1 else self.name


def read(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics lines. Raises BadInput if there are none."""
    lines = metrics_of(folder / "metrics.jsonl")
    if not lines:
        raise BadInput(f"{folder} holds no metrics: there is no finished step in {folder / 'metrics.jsonl'}")
    return lines


def groups_of(folders: Sequence[Path], together: bool = False) -> list[Group]:
    """The runs by what they have in common, in the order given; named by what tells the groups apart. Raises BadInput
    where not even the seed does: the same thing twice says nothing of other seeds."""
    found: dict[str, list[Path]] = {}
    settings = {folder: identity(folder) for folder in folders}
    for folder in folders:
        key = "" if together else json.dumps(settings[folder], sort_keys=True)
        found.setdefault(key, []).append(folder)
    differing = sorted(
        name
        for name in set().union(*settings.values())
        if len({json.dumps(of.get(name)) for of in settings.values()}) > 1
    )
    groups = []
    for members in found.values():
        of_seed: dict[Any, Path] = {}
        for folder in () if together else members:
            if (seed := catalogue.settings_of(folder).get("seed")) in of_seed:
                raise BadInput(f"{of_seed[seed]} and {folder} have the same settings and seed; leave one out")
            of_seed[seed] = folder
        first = settings[members[0]]
        said = ", ".join(f"{name} {first.get(name, '-')}" for name in differing) if len(found) > 1 else ""
        name = said if said and len(said) <= 40 else common_name(members)
        groups.append(Group(name, [read(folder) for folder in members]))
    for name_of in (common_path, lambda members: str(members[0])):  # where one name is of several groups
        names = [group.name for group in groups]
        groups = [
            group if names.count(group.name) == 1 else Group(name_of(members), group.runs)
            for group, members in zip(groups, found.values())
        ]
    return groups


def common_name(folders: Sequence[Path]) -> str:
    """The folders' name, without the number if that is what tells seeds apart."""
    first, *others = (folder.resolve().name for folder in folders)
    return first if set(others) <= {first} else first.rstrip("0123456789").rstrip("-_.") or first


def common_path(folders: Sequence[Path]) -> str:
    """The path of the first, with a star for what tells the others from it."""
    first, *others = (folder.parts for folder in folders)
    shared = (all(each[i : i + 1] == (part,) for each in others) for i, part in enumerate(first))
    return str(Path(*(part if same else "*" for part, same in zip(first, shared))))


def identity(folder: Path) -> dict[str, Any]:
    """What makes a run what it is, beside its seed. A model is known by its path, in which `seed-N` of this seed is
    none."""
    settings = catalogue.settings_of(folder)
    seed = settings.get("seed")
    kept = {name: value for name, value in settings.items() if name not in {*MEANS, "seed", "model_sha256"}}
    return {
        name: value.replace(f"seed-{seed}", "seed-*") if isinstance(value, str) else value
        for name, value in kept.items()
    }


def curve(group: Group, metric: str) -> list[Point]:
    """The mean over a group's runs at every step that all of them have; the interval is 0 wide for a single run."""
    of_run = [{line["step"]: line[metric] for line in lines if usable(line.get(metric))} for lines in group.runs]
    points = []
    for step in sorted(set.intersection(*(set(each) for each in of_run))):
        values = [each[step] for each in of_run]
        points.append((step, statistics.fmean(values), half_width(values)))
    return points


def usable(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def half_width(values: Sequence[float]) -> float:
    """Half the 95% interval of the mean of what different seeds gave; 0 for one value, of which nothing can be said."""
    n = len(values)
    if n < 2:
        return 0.0
    return student(n - 1) * statistics.stdev(values) / math.sqrt(n)


def student(degrees: int) -> float:
    """Critical value of Student's t, two-sided 95%; beyond ten degrees of freedom a little too large."""
    return T95[min(degrees, len(T95)) - 1]


def shares(group: Group) -> dict[str, float]:
    """Each phase's part of all the seconds that the group's runs took, without those too small to see."""
    told = [line["seconds"] for lines in group.runs for line in lines if isinstance(line.get("seconds"), dict)]
    seconds = [each for each in told if all(map(usable, each.values()))]
    total = sum(each.get("total", 0.0) for each in seconds)
    parts = {name: sum(each.get(name, 0.0) for each in seconds) / total for name in PHASES} if total else {}
    return {name: share for name, share in parts.items() if share >= 0.005}


# -- the picture ---------------------------------------------------------------------------------------------


def draw(path: Path, groups: Sequence[Group]) -> None:
    """Write the PNG: a panel a metric that any run has, and one of where the time went. Raises BadInput if none has."""
    panels = [panel for panel in PANELS if any(curve(group, panel[1]) for group in groups)]
    if not panels:
        raise BadInput(f"no step of these runs has any of {', '.join(panel[1] for panel in PANELS)}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = math.ceil((len(panels) + 1) / 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(10, 2.75 * rows), layout="constrained", squeeze=False)
    places = axes.flatten().tolist()
    for place, panel in zip(places, panels):
        draw_panel(place, groups, *panel)
    draw_shares(places[len(panels)], groups)
    for place in places[len(panels) + 1 :]:
        place.set_axis_off()
    if len(groups) > 1 or len(groups[0].runs) > 1:
        handles, labels = places[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(2, len(groups)), frameon=False)
    with written_whole(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
    pyplot.close(figure)


def draw_panel(axes: Any, groups: Sequence[Group], title: str, metric: str, beside: str, axis: dict[str, Any]) -> None:
    """One metric by step: each group's mean as a line, its interval as a band."""
    for number, group in enumerate(groups):
        colour = COLOURS[number % len(COLOURS)]
        for name, style in ((metric, "-"), (beside, "--")):
            if points := curve(group, name):
                steps, means, halves = zip(*points)
                solid = style == "-"
                few = "." if len(steps) == 1 else ""  # one step is no line
                label = str(group) if solid else None
                axes.plot(steps, means, style, marker=few, color=colour, linewidth=1.8 if solid else 1.0, label=label)
                if solid and any(halves):
                    low, high = zip(*((mean - half, mean + half) for mean, half in zip(means, halves)))
                    axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set(**axis)
    axes.set_xlabel("step", fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_shares(axes: Any, groups: Sequence[Group]) -> None:
    """Where the seconds went: a bar a group, cut by phase."""
    for number, group in enumerate(groups):
        left = 0.0
        for phase, share in shares(group).items():
            axes.barh(number, share, left=left, color=PHASES[phase], height=0.6, label=phase)
            if share >= 0.08:
                axes.text(left + share / 2, number, f"{share:.0%}", ha="center", va="center", fontsize=8)
            left += share
    axes.set_title("where the time went", fontsize=10, loc="left")
    names = [report.wrap(group.name, 22)[0] for group in groups] if len(groups) > 1 else [""]
    axes.set_yticks(range(len(groups)), names)
    axes.set(xlim=(0, 1), ylim=(len(groups) - 0.4 + 0.9, -0.6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    found = dict(zip(*reversed(axes.get_legend_handles_labels())))
    axes.legend(found.values(), found.keys(), loc="lower center", ncols=3, frameon=False, fontsize=8, columnspacing=1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)


def main(argv: Sequence[str]) -> None:
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    what = "Draw the curves of runs: python -m minitau.plot RUN [RUN ...]. Flags follow the folders."
    cfg = cli.parse(Plot, "minitau.plot", what, list(argv[count:]))
    folders = [Path(name) for name in dict.fromkeys(argv[:count])]
    if not folders:
        raise BadInput("which runs? python -m minitau.plot RUN [RUN ...]")
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise BadInput(f"{missing[0]}: no such folder")
    out = Path(cfg.out)
    if out.suffix.lower() != ".png" or out.is_dir() or not out.absolute().parent.is_dir():
        raise BadInput(f"--out {cfg.out}: name a file that ends in .png, in a folder that is there")
    groups = groups_of(folders, cfg.together)
    draw(out, groups)
    print(f"{cfg.out}: {'; '.join(f'{group} ({steps_of(group)} steps)' for group in groups)}")


def steps_of(group: Group) -> int:
    """How many steps every run of the group has."""
    return len(set.intersection(*({line["step"] for line in lines} for lines in group.runs)))


if __name__ == "__main__":
    sys.exit(run_script("minitau.plot", main, sys.argv[1:]))
