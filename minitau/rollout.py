"""Play episodes: one, in a thread; or many, over threads and ranks.

`play` is the whole of agentic RL's data side in one loop: the engine speaks, the environment
answers, and what was sampled is kept id for id. Engine, environment and chat are arguments; this
file knows no environment and no engine by name, and no model or loss.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from minitau import parallel
from minitau.chat import Chat
from minitau.config import Episodes
from minitau.episode import (
    Engine,
    Env,
    EpisodeError,
    Message,
    Sampling,
    Stop,
    Task,
    Trajectory,
    World,
)
from minitau.reward import partial
from minitau.script import progress_bar

TEND_SECONDS = 0.2  # between two looks of the waiting thread after its engine
POLL_SECONDS = 0.02  # likewise, once its own threads are done
WAITS = ("policy", "user", "env", "evaluate")  # what an episode spends its time on
TOO_MANY_BROKEN = 0.05  # share of episodes that broke on our side above which it is said loudly


@dataclass(frozen=True)
class Limits:
    """What ends an episode that does not end by itself."""

    max_turns: int = 100  # replies of the agent
    max_tokens: int = 16_384  # of the whole conversation
    max_bad_calls: int = 3  # malformed replies in a row


def play(
    task: Task, env: Env, engine: Engine, chat: Chat, *, sampling: Sampling, limits: Limits, sample: int, seed: str
) -> Trajectory:
    """One episode from reset to verdict. Always returns, with a typed `stop`; raises only on a bug.

    `seed` fixes the customer and every draw of the agent.
    """
    trajectory = Trajectory(task, sample)
    try:
        trajectory.stop = converse(trajectory, env, engine, chat, sampling, limits, seed)
        with timed(trajectory, "evaluate"):
            trajectory.evaluation = env.evaluate(trajectory.stop)
    except EpisodeError as error:
        trajectory.stop = error.stop
        trajectory.detail = str(error)
    return trajectory


def converse(
    trajectory: Trajectory, env: Env, engine: Engine, chat: Chat, sampling: Sampling, limits: Limits, seed: str
) -> Stop:
    """Turn after turn until something stops the episode; fills in `trajectory` as it goes."""
    with timed(trajectory, "env"):
        opening = env.reset(trajectory.task, seed)
    book_user(trajectory, opening.user_seconds)
    trajectory.messages += opening.messages
    if opening.stop:
        return opening.stop
    prompt = chat.open(opening)
    bad_calls = 0
    for turn in range(limits.max_turns):
        room = limits.max_tokens - len(prompt)
        if room <= 0:
            return Stop.MAX_TOKENS  # and what was heard last stays out: no trajectory is longer than its limit
        hear(trajectory, prompt)
        with timed(trajectory, "policy"):
            completion = engine.generate(
                trajectory.ids,
                replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room)),
                session=seed,
                seed=seed_number(f"{seed}:{turn}"),
            )
        tools = None if opening.answers_any_call else opening.tools
        action = chat.parse(completion.ids, tools, cut=completion.finish == "length")
        trajectory.say(completion, action.error)
        trajectory.messages.append(Message("assistant", action.text, action.calls))
        if action.error:
            bad_calls += 1
            if bad_calls >= limits.max_bad_calls:
                return Stop.BAD_CALLS
            heard: Sequence[Message] = [Message("tool", f"Error: {action.error}")]
        else:
            bad_calls = 0
            with timed(trajectory, "env"):
                observation = env.step(action)
            book_user(trajectory, observation.user_seconds)
            heard = observation.messages
            if observation.stop:
                trajectory.messages += heard
                return observation.stop
        trajectory.messages += heard
        prompt = chat.extend(trajectory.ids, heard)
    return Stop.MAX_TURNS


def hear(trajectory: Trajectory, prompt: Sequence[int]) -> None:
    """Append what is new in `prompt`. One that does not start with every id so far is a bug: the
    model would be trained on a context that it was not sampled in."""
    so_far = len(trajectory.ids)
    assert prompt[:so_far] == trajectory.ids, "a prompt must start with all ids of the episode so far"
    trajectory.hear(prompt[so_far:])


@contextmanager
def timed(trajectory: Trajectory, what: str) -> Iterator[None]:
    """Add the wall-clock seconds of the block to trajectory.seconds[what]."""
    start = time.perf_counter()
    try:
        yield
    finally:
        trajectory.seconds[what] = trajectory.seconds.get(what, 0.0) + time.perf_counter() - start


def book_user(trajectory: Trajectory, seconds: float) -> None:
    """Count so many seconds of the environment's time as the customer's."""
    trajectory.seconds["user"] = trajectory.seconds.get("user", 0.0) + seconds
    trajectory.seconds["env"] -= seconds


def seed_number(text: str) -> int:
    """A 63-bit seed that is the same on every machine and every run, as hash() is not."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Stage:
    """All that `collect` needs besides the tasks: who plays, where, and how."""

    world: World
    engine: Engine
    chat: Chat
    sampling: Sampling
    limits: Limits
    concurrency: int  # episodes at once on one rank


def open_stage(cfg: Episodes, world: World, engine: Engine, chat: Chat) -> Stage:
    return Stage(
        world,
        engine,
        chat,
        Sampling(cfg.temperature, cfg.max_new_tokens),
        Limits(cfg.max_turns, cfg.max_tokens, cfg.max_bad_calls),
        cfg.concurrency,
    )


def collect(
    jobs: Sequence[tuple[Task, int]],
    stage: Stage,
    *,
    seed: str,
    label: str,
    on_done: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """Play every (task, sample) of `jobs`, in their order, on every rank the whole list.

    All ranks take from one queue, so a slow episode holds up one thread and nobody else. `seed` must
    be new for each call and the same on every rank. `on_done` is called on the rank that played an
    episode, one at a time. Raises what a thread raised: that is a bug, not an episode's failure.
    """
    queue = parallel.SharedQueue(seed, len(jobs))
    played: dict[int, Trajectory] = {}
    lock = threading.Lock()
    workers = min(stage.concurrency, math.ceil(len(jobs) / parallel.world_size()))
    total = len(jobs) if parallel.world_size() == 1 else None
    progress = progress_bar(label, total, "episode", shown=parallel.is_main())

    def work(index: int) -> None:
        task, sample = jobs[index]
        trajectory = play(
            task,
            stage.world.env(),
            stage.engine,
            stage.chat,
            sampling=stage.sampling,
            limits=stage.limits,
            sample=sample,
            seed=f"{seed}:{task.key}:{sample}",
        )
        with lock:
            played[index] = trajectory
            progress.update()
            if on_done:
                on_done(trajectory)

    in_threads(work, queue, workers, stage.engine)
    progress.close()
    everyone = {index: t for part in parallel.gather(played, beside="rollout") for index, t in part.items()}
    return [everyone[index] for index in range(len(jobs))]


def in_threads(work: Callable[[int], None], queue: parallel.SharedQueue, count: int, engine: Engine) -> None:
    """Do `work` on what `queue` hands out, in `count` threads a rank, until those of all ranks are done.

    Meanwhile this thread tends the engine. Raises what a thread raised; this rank's others take nothing more then.
    """
    problems: list[BaseException] = []

    def run() -> None:
        try:
            while not problems and (index := queue.take()) is not None:
                work(index)
        except BaseException as error:
            problems.append(error)
        finally:
            engine.leave()

    threads = [threading.Thread(target=run, name=f"episode-{i}", daemon=True) for i in range(count)]
    for _ in threads:
        engine.join()  # before the first one asks, so that the engine knows how many will
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(TEND_SECONDS)
            engine.tend()
    if problems:
        raise problems[0]
    queue.leave()
    while not queue.left():
        time.sleep(POLL_SECONDS)
        engine.tend()
    engine.tend()  # nobody asks any more: now all ranks see the same announcements, and answer what is left of them


def require_verdicts(trajectories: Sequence[Trajectory]) -> str:
    """A warning if more than TOO_MANY_BROKEN of the episodes broke on our side, else "".

    Raises EpisodeError if most did, or the agent had room for a reply in none: nothing can be learned or said from the
    rest.
    """
    require_room(trajectories)
    broken = [t for t in trajectories if t.stop.ours]
    if len(broken) <= TOO_MANY_BROKEN * len(trajectories):
        return ""
    why = f"the first by {broken[0].stop.value}: {broken[0].detail}"
    count = f"{len(broken)} of {len(trajectories)} episodes broke on our side"
    if 2 * len(broken) > len(trajectories):
        raise EpisodeError(f"{count}; {why}; mend that and go on with --resume")
    return f"WARNING: {count} and are left out; {why}"


def require_room(trajectories: Sequence[Trajectory]) -> None:
    """Raises EpisodeError if each conversation was full before the agent's first reply."""
    if trajectories and all(t.stop == Stop.MAX_TOKENS and not t.turns for t in trajectories):
        raise EpisodeError("no conversation had room for a reply: what each opens with is too long; raise --max-tokens")


def group_jobs(tasks: Sequence[Task], group_size: int) -> list[tuple[Task, int]]:
    """`group_size` attempts at each task, a task's attempts side by side."""
    return [(task, sample) for task in tasks for sample in range(group_size)]


def groups_of(trajectories: Sequence[Trajectory], group_size: int) -> list[list[Trajectory]]:
    """The inverse of group_jobs: one list of `group_size` trajectories a task."""
    return [list(trajectories[i : i + group_size]) for i in range(0, len(trajectories), group_size)]


def summary(trajectories: Sequence[Trajectory]) -> dict[str, object]:
    """What a step's metrics say of its episodes. Means are over episodes with a verdict."""
    graded = [t for t in trajectories if not t.stop.ours]
    domains = sorted({t.task.domain for t in graded})

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    return {
        "episodes": len(trajectories),
        "reward": mean([t.reward for t in graded]),
        "pass_rate": mean([t.success for t in graded]),
        "partial": mean([partial(t.evaluation, t.task.domain) for t in graded]),
        "reward_by_domain": {d: mean([t.reward for t in graded if t.task.domain == d]) for d in domains},
        "tokens": sum(len(t.ids) for t in trajectories),
        "tokens_said": sum(sum(t.said) for t in trajectories),
        "length_mean": mean([len(t.ids) for t in graded]),
        "length_max": max((len(t.ids) for t in trajectories), default=0),
        "turns_mean": mean([len(t.turns) for t in graded]),
        "episode_seconds": {name: mean([t.seconds.get(name, 0.0) for t in graded]) for name in WAITS},
        "bad_replies": sum(bool(turn.error) for t in trajectories for turn in t.turns),
        "grader_failed": sum(bool(t.evaluation and t.evaluation.note) for t in trajectories),
        "stops": dict(sorted(Counter(t.stop.value for t in trajectories).items())),
        "weight_versions": sorted({turn.weight_version for t in trajectories for turn in t.turns}),
    }
