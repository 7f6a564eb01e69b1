"""Which task next: one sampler for all ranks.

Every rank holds the same sampler, feeds it the same outcomes and so draws the same tasks; nothing
is sent. It goes into the checkpoint with `state_dict`. It knows tasks by their keys and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random
from typing import Any

from minitau.episode import Task

FLOOR = 0.1  # weight of a task that is always or never solved, or always breaks: it must stay reachable
MEMORY = 0.8  # old outcomes fade to this part at each visit, because the policy that made them is gone


class Curriculum:
    """Draws tasks whose success rate is near one half most often, where samples differ most.

    Tasks that were never drawn come first: until each of them was, it changes nothing.

    tasks: what may be drawn. enabled=False draws uniformly. seed: together with the step it
    decides every draw, so a resumed run draws what the uninterrupted one would have.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int, enabled: bool = True):
        self.tasks = list(tasks)
        self.seed = seed
        self.enabled = enabled
        self.tallies: dict[str, list[float]] = {}  # task key -> [solved, attempts], both fading

    def draw(self, step: int, n: int, exclude: Collection[Task] = (), round: int = 0) -> list[Task]:
        """`n` different tasks (fewer if there are no more), none of them in `exclude`."""
        rng = Random(f"{self.seed}:{step}:{round}:draw")
        choices = [task for task in self.tasks if task not in exclude]
        # Efraimidis & Spirakis 2006: the n largest u^(1/w) are a weighted draw without replacement.
        keys = {task: rng.random() ** (1.0 / self.weight(task)) for task in choices}
        return sorted(choices, key=lambda t: (self.enabled and t.key not in self.tallies, keys[t]), reverse=True)[:n]

    def weight(self, task: Task) -> float:
        """In [FLOOR, 1]; 4 p (1 - p) is the variance of an outcome, scaled to 1 where p is one half."""
        if not self.enabled or task.key not in self.tallies:
            return 1.0
        if self.tallies[task.key][1] == 0:
            return FLOOR  # no attempt has counted yet, and most often none ever will
        p = self.success_rate(task)
        return max(FLOOR, 4 * p * (1 - p))

    def success_rate(self, task: Task) -> float:
        """Estimate in (0, 1), pulled towards one half by half an imaginary attempt."""
        solved, attempts = self.tallies.get(task.key, (0.0, 0.0))
        return (solved + 0.25) / (attempts + 0.5)

    def update(self, task: Task, outcomes: Sequence[bool]) -> None:
        """Count the outcomes of one visit. An empty list (all attempts were lost) says nothing of how hard the task is,
        but that it was seen: a task that always breaks must not come before the others at every step."""
        solved, attempts = self.tallies.setdefault(task.key, [0.0, 0.0])
        if outcomes:
            self.tallies[task.key] = [MEMORY * solved + sum(outcomes), MEMORY * attempts + len(outcomes)]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes; what happens afterwards does not change it."""
        return {"tallies": dict(self.tallies)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tallies = {key: list(tally) for key, tally in state["tallies"].items()}
