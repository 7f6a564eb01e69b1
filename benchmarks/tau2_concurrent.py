"""Do many episodes wait for their customers all at once?

    python -m benchmarks.tau2_concurrent --episodes 128 --gym 16

starts an OpenAI-compatible endpoint in a process of its own that takes 300 ms a reply, and plays
real episodes against it: tau2's own user simulator through litellm, our Env, the official grader.
The agent answers at once, from a script: the reference solution, with words before every call. So
all that is measured is waiting for customers, and what gets in its way. Two things are printed:

many   --episodes of them through minitau.rollout.collect, a thread each, beside the longest one
       (the one with the most requests to its customer) played alone in this process just before
gym    --gym of them through tau2's own gym, stepped as the published pipeline does, by coroutines
       of one event loop that block in env.step; and the same ones through rollout.collect

Prints one JSON object. The gym needs: pip install gymnasium
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from benchmarks.flags import at_least
from minitau import config
from minitau.envs.tau2 import Tau2
from minitau.envs.tau2.scripts import script
from minitau.episode import Action, Completion, Message, Opening, Sampling, Task
from minitau.rollout import Limits, Stage, collect
from minitau.script import run_script
from minitau.tasks import for_training

DOMAINS = ("airline", "retail", "telecom")
LIMITS = Limits(max_turns=200, max_tokens=10_000)
MAX_STEPS = 2000  # as tau2 counts them
CALL, BYE = "CALL ", "Goodbye."  # in the agent's words: what the endpoint goes by


# --- the endpoint, in a process of its own ---


class Customer(BaseHTTPRequestHandler):
    """Does what the agent's words say, leaves when it is told goodbye, and takes its time over each reply."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # one packet a reply: in several, each would wait for the one before it to be acknowledged
    seconds = 0.3

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(self.seconds)
        heard = asked["messages"][-1]
        words, call = heard["content"] or "", None
        if heard["role"] == "user" and CALL in words:
            call = json.loads(words.split(CALL, 1)[1])
        message: dict[str, Any] = {"role": "assistant", "content": "###STOP###" if BYE in words else "Please go on."}
        if call:
            function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
            message = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "customer", "choices": [choice]}
        data = json.dumps({**reply, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


class Endpoint(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True


def serve() -> None:
    server = Endpoint(("127.0.0.1", 0), Customer)
    print(server.server_port, flush=True)
    server.serve_forever()


@contextmanager
def endpoint() -> Iterator[str]:
    """Its address, while it runs."""
    process = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        process.kill()
        process.wait()


# --- the agent: a script that stands where engine and chat do ---


def reference(task: Task) -> list[Action]:
    """The reference solution with words before every call, in words that the endpoint understands."""
    actions, lines = script(task, "gold")
    answers, talk = iter(lines[1:]), []
    for action in actions:
        if action.calls:
            talk += [Action("One moment, please."), action]
            continue
        answer = next(answers)
        if "tool_calls" in answer:
            (call,) = answer["tool_calls"]
            order = json.dumps({"name": call.name, "arguments": call.arguments})
            talk.append(Action(f"Please do this on your side. {CALL}{order}"))
        else:
            talk.append(Action(action.text if action is not actions[-1] else f"{action.text}\n{BYE}"))
    return talk


class Scripted:
    """Engine and Chat at once: token n of a conversation stands for the agent's n-th action of that task."""

    def __init__(self, tasks: Sequence[Task]):
        self.actions: list[Action] = []
        self.first: dict[str, int] = {}  # task -> where its actions begin
        for task in tasks:
            self.first[task.key] = len(self.actions)
            self.actions += reference(task)
        self.turns: Counter[str] = Counter()
        self.lock = threading.Lock()

    def join(self) -> None: ...

    def leave(self) -> None: ...

    def tend(self) -> None: ...

    def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str, seed: int) -> Completion:
        with self.lock:
            turn, self.turns[session] = self.turns[session], self.turns[session] + 1
        key = session.split(":", 1)[1].rsplit(":", 1)[0]  # the session is seed:task:sample
        return Completion((self.first[key] + turn,), (0.0,), "stop", 0)

    def open(self, opening: Opening) -> list[int]:
        return [0]

    def extend(self, ids: list[int], messages: Sequence[Message]) -> list[int]:
        return [*ids, 0]

    def parse(self, ids: Sequence[int], tools: Any, cut: bool) -> Action:
        return self.actions[ids[-1]]


def play(world: Tau2, tasks: Sequence[Task], agent: Scripted, label: str) -> dict[str, Any]:
    """All of them at once, a thread each, as training does it."""
    stage = Stage(world, agent, agent, Sampling(), LIMITS, concurrency=len(tasks))  # type: ignore[arg-type]
    wall, cpu = time.perf_counter(), time.process_time()
    played = collect([(task, 0) for task in tasks], stage, seed=label, label=label)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rewards = [episode.reward for episode in played]
    details = sorted({episode.detail for episode in played if episode.detail})
    return {"seconds": wall, "cpu_seconds": cpu, "rewards_of_1": rewards.count(1.0), "errors": details}


# --- tau2's own gym ---


def play_in_gym(url: str, tasks: Sequence[Task]) -> dict[str, Any]:
    """The same episodes, each a coroutine, all in one event loop, where every reset and step blocks the loop."""
    from tau2.gym.gym_agent import AgentGymEnv

    async def episode(task: Task) -> float:
        args = {"temperature": 0.7, "api_base": url, "api_key": "none"}
        env = AgentGymEnv(task.domain, task.id, max_steps=MAX_STEPS, user_llm="openai/customer", user_llm_args=args)
        env.reset()
        for action in reference(task):
            await asyncio.sleep(0)  # here the published pipeline awaits its engine
            call = action.calls[0] if action.calls else None
            text = json.dumps({"name": call.name, "arguments": call.arguments}) if call else action.text
            _, reward, over, _, _ = env.step(text)
            if over:
                return reward
        return 0.0

    async def all_of_them() -> list[float]:
        return await asyncio.gather(*map(episode, tasks))

    wall, cpu = time.perf_counter(), time.process_time()
    rewards = asyncio.run(all_of_them())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": wall, "cpu_seconds": cpu, "rewards_of_1": rewards.count(1.0)}


def requests_of(task: Task) -> int:
    """How often an episode asks its customer: first words, an answer to all words, and one after every own call."""
    return 1 + sum(1 + (CALL in action.text) for action in reference(task) if not action.calls)


def training_tasks(world: Tau2, n: int) -> list[Task]:
    return list(for_training(config.GRPO(env="tau2", domains=DOMAINS, tasks=n), world))


def measure(episodes: int, gym: int) -> dict[str, Any]:
    with endpoint() as url:
        world = Tau2(user_model="openai/customer", user_api_base=url, user_temperature=0.7, max_steps=MAX_STEPS)
        tasks = training_tasks(world, episodes)
        agent, longest = Scripted(tasks), max(tasks, key=requests_of)
        play(world, [min(tasks, key=requests_of)], agent, "warm")  # imports, connections
        alone = play(world, [longest], agent, "alone")
        many = play(world, tasks, agent, "many")
        report = {
            "episodes": len(tasks), "requests": sum(map(requests_of, tasks)),
            "longest_alone": {"requests": requests_of(longest), **alone}, "many": many,
            "many / longest_alone": many["seconds"] / alone["seconds"],
        }  # fmt: skip
        if gym:
            chosen = training_tasks(world, gym)
            threads, loop = play(world, chosen, agent, "few"), play_in_gym(url, chosen)
            report |= {"gym_episodes": gym, "gym, threads": threads, "gym, one event loop": loop}
            report["event loop / threads"] = loop["seconds"] / threads["seconds"]
    return report


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=at_least(1), default=128)
    parser.add_argument("--gym", type=at_least(0), default=16, help="episodes both ways; 0 leaves the gym out")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        return serve()
    if args.gym:
        try:
            import gymnasium  # noqa: F401
        except ImportError:
            sys.exit("tau2's gym needs gymnasium: pip install gymnasium, or leave it out with --gym 0")
    report = measure(args.episodes, args.gym)
    report["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    print(json.dumps(report, indent=1, default=str))


if __name__ == "__main__":
    sys.exit(run_script("benchmarks.tau2_concurrent", main, sys.argv[1:]))
