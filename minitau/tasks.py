"""Which tasks: list them, choose some, keep the choice in a file that the scripts take as --task-file.

    python -m minitau.tasks --env tau2 --domains retail,airline --split train --screen --out train.jsonl

A line of the file is one task, {"env", "domain", "split", "id"}, and whatever else is known of it; once it is
screened also "pays_for_nothing": the scripts that do nothing and earn its reward all the same. Everything that
trains takes its tasks from `for_training`, and so never one of the test split. Nothing here knows a model.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minitau import cli, config
from minitau.envs import open_world
from minitau.episode import BadInput, Task, World
from minitau.files import file_sha256, write_jsonl
from minitau.report import aligned
from minitau.script import progress_bar, run_script

FLOORS = ("refuse", "transfer")  # the scripts that do nothing for the customer

# Tasks in their order, each with the scripts of FLOORS that it pays; None if nobody has looked.
Chosen = dict[Task, tuple[str, ...] | None]


# -- what the scripts call -----------------------------------------------------------------------------


def for_training(cfg: config.Tasks, world: World, say: Callable[[str], None] = print) -> Chosen:
    """The tasks of --task-file, or the first --tasks of --split, domains in turn; none of the test split.

    A split that also has test tasks is used without them, which `say` is told; a file that has any is
    refused: whoever wrote it meant something else. Raises BadInput.
    """
    if cfg.task_file:
        return read(cfg.task_file, cfg.env, world, training=True)
    columns = []
    for domain in cfg.domains:
        held, tasks = held_out(world, domain), world.tasks(domain, cfg.split)
        columns.append([task for task in tasks if task.id not in held])
        if left_out := len(tasks) - len(columns[-1]):
            say(f"{domain}: {left_out} of {len(tasks)} tasks of --split {cfg.split} are test tasks and left out")
    # In turn, so that few tasks are a fair sample.
    tasks = [task for row in itertools.zip_longest(*columns) for task in row if task is not None]
    if not tasks:
        raise BadInput(f"--split {cfg.split} holds nothing to train on: test tasks are for evaluation")
    return dict.fromkeys(tasks[: cfg.tasks or None])


def for_evaluation(cfg: config.Evaluation, world: World) -> list[Task]:
    """The tasks of --task-file, or the first --tasks of each domain's --split. Raises BadInput."""
    if cfg.task_file:
        return list(read(cfg.task_file, cfg.env, world))
    return [task for domain in cfg.domains for task in world.tasks(domain, cfg.split)[: cfg.tasks or None]]


def fingerprint(cfg: config.Tasks) -> dict[str, Any]:
    """What a run records of its files beside their names: they may change, its tasks and policies may not."""
    found: dict[str, Any] = {"task_file_sha256": file_sha256(cfg.task_file)} if cfg.task_file else {}
    if cfg.policy:
        found["policy_sha256"] = [file_sha256(each.rpartition("=")[2]) for each in cfg.policy]
    return found


def held_out(world: World, domain: str) -> set[str]:
    """The ids of a domain's test split; a domain may have none."""
    try:
        return {task.id for task in world.tasks(domain, "test")}
    except BadInput:
        return set()


def pays_for_nothing(world: World, task: Task) -> tuple[str, ...]:
    """The scripts that do nothing and are rewarded for `task` all the same."""
    scripts = ((agent, world.demonstrate(task, agent, seed="screen")) for agent in FLOORS)
    return tuple(agent for agent, script in scripts if script.evaluation.reward >= 1.0)


def screen(world: World, tasks: Sequence[Task]) -> Chosen:
    """pays_for_nothing of each task, with a progress bar: tau2's grader takes up to a second a script."""
    progress = progress_bar("screening", len(tasks), "task")
    found: Chosen = {}
    for task in tasks:
        found[task] = pays_for_nothing(world, task)
        progress.update()
    progress.close()
    return found


# -- the file ------------------------------------------------------------------------------------------


def read(path: str, env: str, world: World, *, training: bool = False) -> Chosen:
    """The tasks of a file, in its order. Raises BadInput naming the first line that cannot be used."""
    if Path(path).is_dir():
        raise BadInput(f"--task-file {path}: a folder; give a JSONL file of tasks")
    if not Path(path).is_file():
        raise BadInput(f"--task-file {path}: no such file; write one with python -m minitau.tasks --out {path}")
    chosen: Chosen = {}
    places: dict[tuple[str, str], int] = {}  # a task may be in several splits, and is one task all the same
    known: dict[tuple[str, str], set[str]] = {}
    held: dict[str, set[str]] = {}
    for number, row in rows(path):
        try:
            task, pays = task_of(row, env)
            if (task.domain, task.split) not in known:
                known[task.domain, task.split] = {each.id for each in world.tasks(task.domain, task.split)}
                held[task.domain] = held_out(world, task.domain)
            if task.id not in known[task.domain, task.split]:
                raise BadInput(f"no task {task.id!r} in {task.domain}'s split {task.split}")
            if training and task.id in held[task.domain]:
                raise BadInput(f"{task.key} is a test task, which nothing may train on; write with --without-test")
            first = places.setdefault((task.domain, task.id), number)
            if first != number:
                raise BadInput(f"{task.domain}'s task {task.id!r} stands in line {first} already")
        except BadInput as error:
            raise BadInput(f"{path}, line {number}: {error}") from None
        chosen[task] = pays
    if not chosen:
        raise BadInput(f"{path}: no tasks in it")
    return chosen


def rows(path: str) -> Iterator[tuple[int, Any]]:
    """(line number, row) of a JSONL file. Raises BadInput."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise BadInput(f"{path}, line {number}: not JSON ({error})") from None


def task_of(row: Any, env: str) -> tuple[Task, tuple[str, ...] | None]:
    """The task of one row, and its mark. What else stands in the row is the writer's own. Raises BadInput."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("domain", "split", "id")):
        raise BadInput('not a task: it needs "domain", "split" and "id", all of them text')
    if row.get("env", env) != env:
        raise BadInput(f"a task of --env {row['env']}, and this is --env {env}")
    pays = row.get("pays_for_nothing")
    if pays is not None and not (isinstance(pays, list) and all(isinstance(each, str) for each in pays)):
        raise BadInput('"pays_for_nothing" is not a list of scripts')
    return Task(row["domain"], row["split"], row["id"]), None if pays is None else tuple(pays)


def to_rows(env: str, chosen: Chosen) -> Iterator[dict[str, Any]]:
    """The inverse of task_of, for all tasks."""
    for task, pays in chosen.items():
        row = {"env": env, "domain": task.domain, "split": task.split, "id": task.id}
        yield row if pays is None else {**row, "pays_for_nothing": list(pays)}


# -- the script ----------------------------------------------------------------------------------------


def listed(cfg: config.Listing, world: World) -> list[Task]:
    """The tasks that the filters leave. Raises BadInput if that is none."""
    try:
        found = re.compile(cfg.match).search
    except re.error as error:
        raise BadInput(f"--match {cfg.match}: not a regular expression ({error})") from None
    tasks: list[Task] = []
    for domain in cfg.domains:
        held = held_out(world, domain) if cfg.without_test else set()
        fits = [task for task in world.tasks(domain, cfg.split) if task.id not in held and found(task.id)]
        tasks += fits[: cfg.tasks or None]
    if not tasks:
        raise BadInput("no task is left; choose another --split or --match")
    return tasks


def summary(chosen: Chosen) -> str:
    """How many tasks there are, by domain, and how many of them pay for nothing."""
    each = Counter(task.domain for task in chosen)
    line = f"{len(chosen)} tasks ({', '.join(f'{domain} {n}' for domain, n in each.items())})"
    if None in chosen.values():
        return line
    return f"{line}, {sum(map(bool, chosen.values()))} of them pay for refusing or transferring at once"


def as_table(chosen: Chosen) -> str:
    lines = [["domain", "split", "id"], *([task.domain, task.split, task.id] for task in chosen)]
    if None not in chosen.values():
        marks = ["pays for nothing", *(",".join(pays or ()) or "-" for pays in chosen.values())]
        lines = [[*line, mark] for line, mark in zip(lines, marks)]
    return aligned(lines)


def main(argv: list[str]) -> None:
    cfg = cli.parse(config.Listing, "python -m minitau.tasks", "List tasks, or keep them in a file.", argv)
    if cfg.out and Path(cfg.out).exists():
        raise BadInput(f"{cfg.out} exists already; choose another --out")
    world = open_world(config.Demonstrations(env=cfg.env))  # all that is played here are scripts
    tasks = listed(cfg, world)
    chosen = screen(world, tasks) if cfg.screen else dict.fromkeys(tasks)
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(Path(cfg.out), to_rows(cfg.env, chosen))
        print(f"{cfg.out}: {summary(chosen)}")
    else:
        print(f"{as_table(chosen)}\n{summary(chosen)}")


if __name__ == "__main__":
    sys.exit(run_script("minitau.tasks", main, sys.argv[1:]))
