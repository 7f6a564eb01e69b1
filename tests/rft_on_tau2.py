"""train.py with a policy that knows some solutions, for tests/test_rft_tau2.py to run, to kill and to run on two ranks.

A tiny random model solves no task of tau2-bench, so RFT would keep nothing. Here the engine is scripted: everything
else (environment, grader, customer behind HTTP, chat, rounds on disk, training) is what train.py uses.
"""

import itertools
import sys
import threading

import pytest

import train
from minitau.envs import open_world
from minitau.episode import Completion, Message, Task
from minitau.script import run_script

SORRY = Message("assistant", "I am sorry, I cannot help you.")


class Solves:
    """Attempt 0 at a task does what the reference does, without its last call in every second task of a domain;
    all other attempts refuse at once. Who is not heard out repeats its last words."""

    def __init__(self, world, chat):
        self.world, self.chat, self.lock = world, chat, threading.Lock()
        self.replies = {}  # session -> what is still to be said

    def join(self):
        pass

    def leave(self):
        pass

    def sync(self, weights, version):
        for _ in weights:
            pass

    def close(self):
        pass

    def tend(self):
        pass

    def generate(self, prompt_ids, sampling, *, session, seed):
        with self.lock:
            if session not in self.replies:
                key, _, sample = session.split(":", 3)[3].rpartition(":")  # seed:rft:round:task:sample
                plan = self.plan(Task(*key.split("/", 2)), int(sample))
                self.replies[session] = itertools.chain(plan, itertools.repeat(plan[-1]))
            ids = tuple(self.chat.write(next(self.replies[session])))
        return Completion(ids, (-0.5,) * len(ids), "stop", 0)

    def plan(self, task, sample):
        if sample:
            return [SORRY]
        told = [m for m in self.world.demonstrate(task, "gold", "").messages if m.role == "assistant"]
        whole = self.world.tasks(task.domain, "train").index(task) % 2 == 0
        return told if whole else [*told[:-2], told[-1]]


def main(argv):
    world = open_world(train.cli.parse_stage(argv)[1])
    chat = train.open_chat(argv[argv.index("--model") + 1], "native")
    with pytest.MonkeyPatch.context() as patch:  # a test also calls this in its own process
        patch.setattr(train, "open_engine", lambda cfg, model, stop_ids: Solves(world, chat))
        train.main(argv)


if __name__ == "__main__":
    sys.exit(run_script("train.py", main, sys.argv[1:]))
