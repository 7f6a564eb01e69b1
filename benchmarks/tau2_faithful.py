"""Are episodes on our cached databases the same as on tau2-bench's own, and how much faster are they?

    python -m benchmarks.tau2_faithful --tasks 40      # a domain; 0 is all of its tasks

plays every task four times (its reference, a refusal, the reference without its last action, the
reference with one argument exchanged), each with tau2's own constructor of the domain and with
ours. Everything else is the same code: our Env, tau2's tools, tau2's grader. What must be equal:
all messages, raw tool outputs included, all hashes of both databases, inside the grader as well,
and the verdict. Prints one JSON object; exits with 1 if anything differed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.flags import at_least
from minitau.envs.tau2 import Tau2, Tau2Env
from minitau.envs.tau2.domain import open_domain
from minitau.envs.tau2.install import load
from minitau.envs.tau2.scripts import Reader, script
from minitau.episode import Action, Call, Stop, Task
from minitau.script import run_script

DOMAINS = ("airline", "retail", "telecom")
SCRIPTS = ("gold", "refuse", "gold without its last action", "gold with one argument exchanged")
Step = tuple[Action, dict[str, Any] | None]  # what the agent does, and what the customer answers to words


def steps_of(task: Task, agent: str) -> list[Step]:
    """A script, each action beside the customer's answer."""
    actions, lines = script(task, agent)
    answers = iter(lines[1:])
    return [(action, None if action.calls else next(answers)) for action in actions]


def calls_in(steps: list[Step]) -> list[int]:
    """Where, in `steps`, either side calls a tool."""
    return [i for i, (action, answer) in enumerate(steps) if action.calls or "tool_calls" in (answer or {})]


def arguments_of(step: Step) -> dict[str, Any]:
    action, answer = step
    return action.calls[0].arguments if action.calls else answer["tool_calls"][0].arguments


def with_arguments(step: Step, arguments: dict[str, Any]) -> Step:
    action, answer = step
    if action.calls:
        return replace(action, calls=(Call(action.calls[0].name, arguments),)), answer
    (call,) = answer["tool_calls"]
    return action, {"tool_calls": [call.model_copy(update={"arguments": arguments})]}


def variant(name: str, task: Task, spare: dict[str, list[Any]]) -> list[Step]:
    """The steps of one script. `spare` has values that other references give to arguments of a name."""
    if name == "refuse":
        return steps_of(task, "refuse")
    steps = steps_of(task, "gold")
    calls = calls_in(steps)
    if name == "gold without its last action" and calls:
        del steps[calls[-1]]
    if name == "gold with one argument exchanged":
        rng = random.Random(task.key)
        places = [(i, key) for i in calls for key in sorted(arguments_of(steps[i]))]
        if places:
            i, key = rng.choice(places)
            others = [value for value in spare[key] if value != arguments_of(steps[i])[key]] or ["nothing like it"]
            steps[i] = with_arguments(steps[i], {**arguments_of(steps[i]), key: rng.choice(others)})
    return steps


def spare_values(tasks: list[Task]) -> dict[str, list[Any]]:
    spare: dict[str, list[Any]] = {}
    for task in tasks:
        steps = steps_of(task, "gold")
        for i in calls_in(steps):
            for key, value in arguments_of(steps[i]).items():
                spare.setdefault(key, []).append(value)
    return spare


@contextmanager
def tau2s_own(domain: str) -> Iterator[None]:
    """Inside, our name for the domain leads to tau2's own constructor."""
    constructors, ours = load().registry._domains, open_domain(domain).constructor
    kept = constructors[ours]
    constructors[ours] = constructors[domain]
    try:
        yield
    finally:
        constructors[ours] = kept


@contextmanager
def hashes_noted() -> Iterator[list[str | None]]:
    """All hashes of databases that are computed inside, in their order."""
    from tau2.environment.environment import Environment

    noted: list[str | None] = []
    kept = Environment.get_db_hash, Environment.get_user_db_hash

    def noting(method: Any) -> Any:
        def note(self: Any) -> str | None:
            noted.append(method(self))
            return noted[-1]

        return note

    Environment.get_db_hash, Environment.get_user_db_hash = map(noting, kept)
    try:
        yield noted
    finally:
        Environment.get_db_hash, Environment.get_user_db_hash = kept


def play(world: Tau2, task: Task, steps: list[Step]) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """What must be equal of one episode, and (wall, CPU) seconds of its reset and its evaluation."""
    random.seed(task.key)  # telecom draws the id of a new bill from the global generator
    plea = script(task, "refuse")[1][0]
    env = Tau2Env(world, Reader([plea, *(answer for _, answer in steps if answer)]))
    seconds = {}
    with timed(seconds, "reset"):
        opening = env.reset(task, "0")
    seen = [env.step(action) for action, _ in steps]
    with hashes_noted() as hashes:
        env._environment.get_db_hash(), env._environment.get_user_db_hash()
        with timed(seconds, "evaluate"):
            verdict = env.evaluate(seen[-1].stop or Stop.USER_STOP)
    record = [(m.role, m.content, [(c.name, c.arguments) for c in m.tool_calls or ()] if m.role != "tool" else m.error)
              for m in env._record]  # fmt: skip
    return {"opening": opening, "seen": seen, "record": record, "hashes": hashes, "verdict": verdict}, seconds


@contextmanager
def timed(seconds: dict[str, tuple[float, float]], what: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.thread_time()
    yield
    seconds[what] = time.perf_counter() - wall, time.thread_time() - cpu


def compare(world: Tau2, tasks: list[Task]) -> tuple[list[str], list[dict[str, dict[str, tuple[float, float]]]]]:
    """Play all variants of `tasks`, all of one domain, both ways. The episodes that differed, and the times."""
    different, times, spare = [], [], spare_values(tasks)
    for task in tasks:
        for name in SCRIPTS:
            steps = variant(name, task, spare)
            ours, our_seconds = play(world, task, steps)
            with tau2s_own(task.domain):
                theirs, their_seconds = play(world, task, steps)
            if ours != theirs:
                parts = [part for part in ours if ours[part] != theirs[part]]
                different.append(f"{task.key}, {name}: {', '.join(parts)}")
            times.append({"tau2": their_seconds, "minitau": our_seconds})
    return different, times


def summary(times: list[dict[str, dict[str, tuple[float, float]]]]) -> dict[str, Any]:
    """Milliseconds of reset and evaluate: median and maximum, wall clock and CPU; speedups are ratios of medians."""
    result: dict[str, Any] = {}
    for what in ("reset", "evaluate"):
        for who in ("tau2", "minitau"):
            wall, cpu = zip(*(episode[who][what] for episode in times))
            numbers = {"median": median(wall), "max": max(wall), "cpu_median": median(cpu), "cpu_max": max(cpu)}
            result[f"{what}_ms, {who}"] = {name: round(1000 * value, 2) for name, value in numbers.items()}
        theirs, ours = (result[f"{what}_ms, {who}"]["median"] for who in ("tau2", "minitau"))
        result[f"{what} speedup"] = round(theirs / ours, 1)
    return result


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", type=at_least(0), default=40, help="of each domain, spread over its base split; 0 is all"
    )
    parser.add_argument("--domains", default=",".join(DOMAINS))
    args = parser.parse_args(argv)
    world, report, differed = Tau2(), {}, []
    for domain in args.domains.split(","):
        tasks = world.tasks(domain, "base")
        tasks = tasks[:: max(1, len(tasks) // args.tasks)][: args.tasks] if args.tasks else tasks
        gc.collect()
        different, times = compare(world, tasks)
        differed += different
        report[domain] = {"episodes": len(times), "identical": len(times) - len(different), **summary(times)}
    total = {key: sum(part[key] for part in report.values()) for key in ("episodes", "identical")}
    machine = (
        f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, Python {platform.python_version()}"
    )
    print(json.dumps({**total, "different": differed, "scripts": SCRIPTS, "machine": machine, **report}, indent=1))
    return bool(differed)


if __name__ == "__main__":
    sys.exit(run_script("benchmarks.tau2_faithful", main, sys.argv[1:]))
