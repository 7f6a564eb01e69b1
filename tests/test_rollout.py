"""Episodes: every way one can end, tokens kept id for id, and many at once.

The world is the real courier, the chat the real chat. The engine is scripted here (it fits the Engine protocol and
says prepared replies), because a random model never reaches most ends; the last tests use the real engine.
"""

import dataclasses
import itertools
import json
import random
import threading
import time

import pytest
from conftest import trajectory as finished

import train
from minitau import config, rollout
from minitau.chat import Chat, load_chat
from minitau.engines.local import LocalEngine
from minitau.envs.courier import Courier
from minitau.envs.courier.world import CourierEnv
from minitau.episode import (
    Call,
    Completion,
    EngineError,
    EnvError,
    Evaluation,
    Message,
    Sampling,
    Stop,
    Task,
    Trajectory,
    Turn,
    UserError,
)
from minitau.pretrained import load_model
from minitau.rollout import Limits, Stage, collect, play

WORLD = Courier()
SAMPLING = Sampling(1.0, 200)
LIMITS = Limits(max_turns=24, max_tokens=4096, max_bad_calls=3)


class ScriptedEngine:
    """Says, in every session, what `replies(prompt_ids, turn)` returns: ids, or an error to raise.

    Keeps everything that it was asked and that it answered, so that a test can hold a trajectory against it.
    """

    def __init__(self, replies, version=3):
        self.replies, self.version = replies, version
        self.asked = {}  # session -> its prompts
        self.said = {}  # session -> its completions
        self.joined = self.most_joined = 0
        self.lock = threading.Lock()

    def join(self):
        with self.lock:
            self.joined += 1
            self.most_joined = max(self.most_joined, self.joined)

    def leave(self):
        with self.lock:
            self.joined -= 1

    def tend(self):
        pass

    def generate(self, prompt_ids, sampling, *, session, seed):
        with self.lock:
            turn = len(self.asked.setdefault(session, []))
            self.asked[session].append(list(prompt_ids))
        reply = self.replies(prompt_ids, turn)
        if isinstance(reply, Exception):
            raise reply
        ids = tuple(reply)[: sampling.max_new_tokens]
        rng = random.Random(seed)
        finish = "stop" if len(ids) == len(reply) else "length"
        completion = Completion(ids, tuple(-rng.random() for _ in ids), finish, self.version)
        with self.lock:
            self.said.setdefault(session, []).append(completion)
        return completion

    def sync(self, weights, version):
        raise NotImplementedError

    def close(self):
        pass


@pytest.fixture(scope="module")
def chat(tiny_dir):
    return load_chat(tiny_dir, "native")


@pytest.fixture(scope="module")
def single(tiny_dir):
    return load_chat(tiny_dir, "single-call")


def script(*replies):
    """Prepared replies, one a turn; the last one again and again."""
    return lambda _, turn: replies[min(turn, len(replies) - 1)]


def reply(chat, text="", *calls):
    return chat.write(Message("assistant", text, calls))


def gold(chat, task, seed):
    """The replies of the gold script against the very customer that `seed` makes."""
    played = WORLD.demonstrate(task, "gold", seed)
    return [chat.write(message) for message in played.messages if message.role == "assistant"]


def run(chat, replies, *, task=None, env=None, limits=LIMITS, sampling=SAMPLING, seed="seed"):
    """One episode with a scripted engine. What every episode owes, whatever its end, is asserted here."""
    engine = ScriptedEngine(replies)
    task = task or WORLD.tasks("desk", "train")[0]
    played = play(task, env or CourierEnv(), engine, chat, sampling=sampling, limits=limits, sample=1, seed=seed)
    check_tokens(played, engine.asked.get(seed, []), engine.said.get(seed, []))
    assert played.task == task and played.sample == 1 and played.stop is not None
    assert (played.evaluation is None) == played.stop.ours == bool(played.detail)
    assert Trajectory.from_json(json.loads(json.dumps(played.to_json()))) == played
    return played


def check_tokens(played, asked, said):
    """The trajectory is exactly what went through the engine: id for id, with its logprobs, and append-only."""
    assert len(played.ids) == len(played.said) == len(played.logprobs)
    assert len(played.turns) == len(said)
    heard = [not i for i in played.said]
    for prompt, completion, turn in zip(asked, said, played.turns):
        assert prompt == played.ids[: turn.start]  # so each prompt starts with all ids before it
        assert tuple(played.ids[turn.start : turn.end]) == completion.ids
        assert tuple(played.logprobs[turn.start : turn.end]) == completion.logprobs
        assert all(played.said[turn.start : turn.end])
        assert turn.weight_version == completion.weight_version == 3
        heard[turn.start : turn.end] = [True] * (turn.end - turn.start)
    assert all(heard)  # nothing else is marked as said
    assert all(x == 0.0 for x, said_it in zip(played.logprobs, played.said) if not said_it)


# -- every end -----------------------------------------------------------------------------------------------


def test_a_gold_agent_serves_its_customer_and_is_paid(chat):
    for domain in ("desk", "claims", "locker"):
        task = WORLD.tasks(domain, "train")[0]
        played = run(chat, script(*gold(chat, task, "seed")), task=task)
        script_says = WORLD.demonstrate(task, "gold", "seed")
        assert played.stop == script_says.stop == Stop.USER_STOP
        assert played.evaluation == script_says.evaluation and played.reward == 1.0 and played.success
        assert played.messages == [*script_says.opening.messages, *script_says.messages]
        assert set(played.seconds) == {"env", "user", "policy", "evaluate"} and played.seconds["user"] == 0.0


def test_transfer_ends_an_episode_and_is_paid_only_where_it_is_right(chat):
    wrong = run(chat, script(reply(chat, "", Call("transfer", {}))))
    assert wrong.stop == Stop.TRANSFER and wrong.reward == 0.0 and wrong.evaluation.checks
    right = [t for t in WORLD.tasks("desk", "train") if WORLD.demonstrate(t, "gold", "seed").stop == Stop.TRANSFER]
    played = run(chat, script(*gold(chat, right[0], "seed")), task=right[0])
    assert played.stop == Stop.TRANSFER and played.reward == 1.0


def test_the_agent_may_end_the_conversation(single):
    played = run(single, script(reply(single, "Hello."), reply(single, "", Call("done", {}))))
    assert played.stop == Stop.AGENT_STOP and played.reward == 0.0 and len(played.turns) == 2
    task = WORLD.tasks("desk", "train")[0]
    served = run(single, script(*gold(single, task, "seed")), task=task)
    assert served.stop == Stop.USER_STOP and served.reward == 1.0  # the other dialect serves as well


def test_a_customer_who_leaves_before_the_agents_first_turn(chat):
    class Leaves(CourierEnv):
        def reset(self, task, seed):
            return dataclasses.replace(super().reset(task, seed), stop=Stop.USER_STOP)

    played = run(chat, script(reply(chat, "Hello?")), env=Leaves())
    assert played.stop == Stop.USER_STOP and played.evaluation.checks and not played.turns and not played.ids
    assert not train.counts(played) and train.counts(run(chat, script(reply(chat, "Hm."))))


def test_calls_of_no_tool_reach_an_environment_that_answers_them(chat):
    class Answers(CourierEnv):
        def reset(self, task, seed):
            return dataclasses.replace(super().reset(task, seed), answers_any_call=True)

    played = run(chat, script(*[reply(chat, "", Call("fly", {}), Call("look", {"parcel": "1"}))] * 5), env=Answers())
    assert played.stop == Stop.MAX_TURNS and not any(turn.error for turn in played.turns)
    answers = [m.content for m in played.messages if m.role == "tool"]
    assert answers[:2] == ["Error: there is no such tool", "Error: unknown parcel"]


def test_turns_run_out(chat):
    played = run(chat, script(reply(chat, "Your phone and PIN, please?")), limits=Limits(2, 4096, 3))
    assert played.stop == Stop.MAX_TURNS and len(played.turns) == 2
    assert played.reward == 0.0 and played.evaluation.checks


def test_a_customer_who_gets_nowhere_leaves(chat):
    played = run(chat, script(reply(chat, "Hm.")))
    assert played.stop == Stop.USER_STOP and played.reward == 0.0
    assert played.messages[-1].content == "This leads nowhere. Goodbye."


def test_the_context_fills(chat):
    opening = len(chat.open(CourierEnv().reset(WORLD.tasks("desk", "train")[0], "seed")))
    played = run(chat, script(reply(chat, "Your phone and PIN, please?")), limits=Limits(24, opening + 30, 3))
    assert played.stop == Stop.MAX_TOKENS and played.reward == 0.0 and played.turns


def test_no_trajectory_is_longer_than_its_limit(chat):
    # --micro-batch-tokens may be as small as --max-tokens: a longer trajectory fits no micro-batch and ends the run.
    env = CourierEnv()
    opening = len(chat.open(env.reset(WORLD.tasks("desk", "train")[0], "seed")))
    for room in range(1, 90, 4):
        played = run(chat, script(reply(chat, "Your phone and PIN, please?")), limits=Limits(3, opening + room, 3))
        assert len(played.ids) <= opening + room
    # A policy that does not even fit leaves no room to say anything.
    played = run(chat, script(reply(chat, "Hm.")), limits=Limits(3, opening - 5, 3))
    assert played.stop == Stop.MAX_TOKENS and not played.turns and len(played.ids) <= opening - 5


def test_the_last_reply_gets_only_the_room_that_is_left(chat):
    opening = len(chat.open(CourierEnv().reset(WORLD.tasks("desk", "train")[0], "seed")))
    played = run(chat, script(chat.encode("Hello " * 40)), limits=Limits(24, opening + 7, 3))
    assert played.turns[0].end - played.turns[0].start == 7


def test_malformed_replies_end_an_episode_after_some_in_a_row(chat):
    for most in (1, 2, 3):
        played = run(chat, script(reply(chat, "<tool_call>{")), limits=Limits(24, 4096, most))
        assert played.stop == Stop.BAD_CALLS and len(played.turns) == most
        assert played.reward == 0.0 and played.evaluation.checks
        assert all(turn.error for turn in played.turns)


def test_malformed_replies_are_answered_and_trained_on_and_a_good_one_resets_the_count(chat):
    bad, good = reply(chat, "", Call("fly", {})), reply(chat, "Your phone and PIN, please?")
    played = run(chat, script(bad, bad, good, bad, bad, bad))
    assert played.stop == Stop.BAD_CALLS
    assert [bool(turn.error) for turn in played.turns] == [True, True, False, True, True, True]
    assert "fly" in played.turns[0].error
    # run() has asserted that every reply is marked as said; the answers are heard, as results of a tool.
    answers = [m for m in played.messages if m.content.startswith("Error: there is no tool")]
    assert len(answers) == 4 and {m.role for m in answers} == {"tool"}  # nothing follows the last reply
    heard = chat.decode([i for i, said in zip(played.ids, played.said) if not said])
    assert heard.count("Error: there is no tool 'fly'; the tools are: ") == 4


def test_a_reply_cut_at_its_length_is_answered_and_closed(chat):
    long, good = chat.encode("please " * 50), reply(chat, "Your phone and PIN, please?")
    played = run(chat, script(long, good), sampling=Sampling(1.0, 20), limits=Limits(2, 4096, 3))
    first = played.turns[0]
    assert "too long" in played.turns[0].error and first.end - first.start == 20
    assert played.ids[first.end] == chat.eos_id and not played.said[first.end]  # ours, not the agent's


def test_an_unknown_error_of_a_tool_is_the_agents_business(chat):
    played = run(chat, script(reply(chat, "", Call("hold", {"parcel": "899"})), reply(chat, "Sorry.")))
    assert played.turns[0].error == "" and played.messages[3] == Message("tool", "Error: unknown parcel")


class Broken(CourierEnv):
    """Courier with one method that raises `error` at its `after`-th call."""

    def __init__(self, method, error, after=0):
        self.method, self.error, self.count = method, error, itertools.count(-after)

    def might(self, method):
        if method == self.method and next(self.count) >= 0:
            raise self.error

    def reset(self, task, seed):
        self.might("reset")
        return super().reset(task, seed)

    def step(self, action):
        self.might("step")
        return super().step(action)

    def evaluate(self, stop):
        self.might("evaluate")
        return super().evaluate(stop)


@pytest.mark.parametrize(
    ("error", "stop"), [(UserError("no answer"), Stop.USER_ERROR), (EnvError("no answer"), Stop.ENV_ERROR)]
)
@pytest.mark.parametrize(("method", "after", "turns"), [("reset", 0, 0), ("step", 0, 1), ("step", 1, 2)])
def test_what_breaks_on_our_side_ends_an_episode_without_a_verdict(chat, error, stop, method, after, turns):
    talk = script(reply(chat, "Your phone and PIN, please?"))
    played = run(chat, talk, env=Broken(method, error, after))
    assert played.stop == stop and played.detail == "no answer" and played.reward == 0.0
    assert len(played.turns) == turns  # what was said until then is kept for whoever looks into it


def test_an_environment_that_does_not_know_the_task_is_an_env_error(chat):
    assert run(chat, script([]), task=Task("desk", "train", "no such task")).stop == Stop.ENV_ERROR


def test_a_grader_that_raises_gives_no_verdict(chat):
    played = run(chat, script(reply(chat, "Hm.")), env=Broken("evaluate", EnvError("no grader")))
    assert played.stop == Stop.ENV_ERROR and played.evaluation is None


def test_a_dead_engine_is_an_engine_error(chat):
    hello = reply(chat, "Your phone and PIN, please?")
    played = run(chat, script(hello, EngineError("gone")))
    assert played.stop == Stop.ENGINE_ERROR and played.detail == "gone" and len(played.turns) == 1


def test_a_more_particular_error_counts_as_what_it_is(chat):
    class Timeout(UserError):
        pass

    assert run(chat, script([5]), env=Broken("reset", Timeout("60 s"))).stop == Stop.USER_ERROR


def test_a_bug_is_raised_and_no_stop(chat):
    with pytest.raises(ZeroDivisionError):
        run(chat, script(reply(chat, "Hm.")), env=Broken("step", ZeroDivisionError("ours")))


def test_a_chat_that_tokenises_again_is_caught(chat, tiny_dir):
    class Again(Chat):
        def extend(self, ids, messages):
            whole = super().extend(ids, messages)
            return self.encode(self.decode(whole))

    again = Again(chat.tokenizer)
    word = chat.encode("please")
    letters = [i for letter in "please" for i in chat.encode(letter)]
    assert len(word) < len(letters) and chat.decode(word) == chat.decode(letters)
    spelled = [*letters, chat.eos_id]  # as a model may sample it, and no tokenizer writes it
    assert run(chat, script(spelled), limits=Limits(2, 4096, 3)).turns
    with pytest.raises(AssertionError, match="prompt"):
        run(again, script(spelled), limits=Limits(2, 4096, 3))


# -- many at once --------------------------------------------------------------------------------------------


class Rooms:
    """A World that is courier, but its environments come from `make`."""

    def __init__(self, make):
        self.env = make


def stage(chat, replies, *, world=WORLD, concurrency=8, limits=LIMITS):
    return Stage(world, ScriptedEngine(replies), chat, SAMPLING, limits, concurrency)


def some_jobs(n, group_size=2):
    return rollout.group_jobs(WORLD.tasks("desk", "train")[:n], group_size)


class SlowEnv(CourierEnv):
    def step(self, action):
        time.sleep(0.2)  # a customer who thinks
        return dataclasses.replace(super().step(action), user_seconds=0.2)


def test_what_the_customer_takes_is_not_the_environments(chat):
    played = collect(
        some_jobs(1), stage(chat, script(reply(chat, "Hm.")), world=Rooms(SlowEnv)), seed="s", label="test"
    )
    for t in played:
        turns = len(t.turns)
        assert t.seconds["user"] == pytest.approx(0.2 * turns) and turns > 1
        assert 0 <= t.seconds["env"] < 0.1 * turns
    shown = rollout.summary(played)["episode_seconds"]
    assert shown["user"] == pytest.approx(sum(t.seconds["user"] for t in played) / len(played))
    assert set(shown) == {"policy", "user", "env", "evaluate"} and shown["env"] < shown["user"]


def test_slow_customers_are_waited_for_all_at_once(chat):
    hm = script(reply(chat, "Hm."))
    start = time.perf_counter()
    played = collect(some_jobs(8), stage(chat, hm, world=Rooms(SlowEnv), concurrency=16), seed="s", label="test")
    seconds = time.perf_counter() - start
    serial = 0.2 * sum(len(t.turns) for t in played)
    assert len(played) == 16 and serial > 3.0
    assert seconds < serial / 4


def test_results_come_in_the_order_of_the_jobs_whoever_is_slow(chat):
    class Uneven(CourierEnv):
        def step(self, action):
            time.sleep(random.random() * 0.01)
            return super().step(action)

    jobs = some_jobs(6, 3)
    where = stage(chat, script(reply(chat, "Hm.")), world=Rooms(Uneven), concurrency=5)
    done, inside = [], threading.Lock()

    def on_done(trajectory):
        assert inside.acquire(blocking=False), "on_done is called one at a time"
        time.sleep(0.002)
        done.append(trajectory)
        inside.release()

    played = collect(jobs, where, seed="s", label="test", on_done=on_done)
    assert [(t.task, t.sample) for t in played] == jobs
    assert len(done) == len(jobs) and {id(t) for t in done} == {id(t) for t in played}
    assert where.engine.joined == 0 and where.engine.most_joined == 5
    # Attempts at one task meet different customers and draw different numbers.
    assert len(where.engine.asked) == len(jobs)
    groups = rollout.groups_of(played, 3)
    assert [len(group) for group in groups] == [3] * 6 and all(len({t.task for t in g}) == 1 for g in groups)
    assert all(len({t.logprobs[t.turns[0].start] for t in group}) == 3 for group in groups)


def test_more_threads_than_jobs_and_no_jobs_at_all(chat):
    where = stage(chat, script(reply(chat, "Hm.")), concurrency=50)
    assert len(collect(some_jobs(1), where, seed="s", label="test")) == 2
    assert where.engine.most_joined == 2
    assert collect([], where, seed="s2", label="test") == []


@pytest.mark.parametrize("where", ["environment", "on_done", "engine"])
def test_a_bug_in_a_thread_is_raised_and_nobody_is_left_waiting(chat, where):
    bug = ZeroDivisionError("ours")
    count = itertools.count()
    hm = reply(chat, "Hm.")
    replies = (lambda _, turn: bug if next(count) == 9 else hm) if where == "engine" else script(hm)
    world = Rooms(lambda: Broken("step", bug, after=1)) if where == "environment" else WORLD

    def on_done(_):
        if where == "on_done" and next(count) == 3:
            raise bug

    at = stage(chat, replies, world=world, concurrency=4)
    with pytest.raises(ZeroDivisionError):
        collect(some_jobs(10), at, seed="s", label="test", on_done=on_done)
    assert at.engine.joined == 0  # all have left: an engine with infinite patience would wait for ever
    assert len(at.engine.asked) < 20  # and nobody began another episode for nothing


def test_a_broken_episode_does_not_stop_the_others(chat):
    hm = reply(chat, "Hm.")
    count = itertools.count()
    at = stage(chat, lambda _, turn: EngineError("gone") if next(count) % 10 == 3 else hm, concurrency=3)
    played = collect(some_jobs(8), at, seed="s", label="test")
    stops = {t.stop for t in played}
    assert stops == {Stop.ENGINE_ERROR, Stop.USER_STOP}
    summary = rollout.summary(played)
    assert summary["episodes"] == 16 and summary["stops"]["engine_error"] == sum(t.stop.ours for t in played)
    graded = [len(t.turns) for t in played if not t.stop.ours]
    assert summary["turns_mean"] == sum(graded) / len(graded)
    assert json.loads(json.dumps(summary)) == summary


def test_summary_says_what_happened():
    domain_mean = rollout.summary([finished([1, 2], [False, True], reward=1.0), finished([1], [True], reward=0.0)])
    assert domain_mean["pass_rate"] == 0.5 and domain_mean["reward_by_domain"] == {"desk": 0.5}
    assert domain_mean["tokens"] == 3 and domain_mean["tokens_said"] == 2 and domain_mean["length_max"] == 2
    only_broken = rollout.summary([finished([1], [False], stop=Stop.USER_ERROR)])
    assert only_broken["reward"] == 0.0 and only_broken["stops"] == {"user_error": 1}
    assert rollout.summary([])["episodes"] == 0


def test_seed_numbers_are_the_same_on_every_machine():
    assert rollout.seed_number("0:1") == 8613600020916457518
    numbers = {rollout.seed_number(f"{i}") for i in range(1000)}
    assert len(numbers) == 1000 and all(0 <= n < 2**63 for n in numbers)


def test_a_trajectory_with_everything_in_it_survives_json():
    call = Call("hold", {"parcel": "787", "deep": [{"é": None}], "x": 0.1})
    whole = finished([1, 2, 3], [False, True, True], [0.0, -0.1, -1e-17], reward=0.5)
    whole.evaluation = Evaluation(0.5, whole.evaluation.checks, "note")
    whole.turns = [Turn(1, 3, 7, "bad")]
    whole.messages = [Message("assistant", "x \u2028 ☃", (call,)), Message("tool", "")]
    whole.seconds = {"env": 0.25}
    for trajectory in (whole, dataclasses.replace(whole, stop=None, evaluation=None)):
        again = Trajectory.from_json(json.loads(json.dumps(trajectory.to_json())))
        assert again == trajectory
        assert type(again.stop) is type(trajectory.stop)
    with pytest.raises((KeyError, TypeError, ValueError)):
        Trajectory.from_json({**whole.to_json(), "stop": "boredom"})


# -- with the real engine ------------------------------------------------------------------------------------


def test_a_whole_rollout_repeats_bit_for_bit(chat, tiny_dir):
    model = load_model(tiny_dir).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(4.0)  # a random model this small is nearly uniform; this one repeats itself and stops
    cfg = config.Evaluation(domains=("desk", "locker"), max_new_tokens=24, max_turns=4, concurrency=5)
    tasks = [WORLD.tasks(domain, "train")[i] for i in range(2) for domain in cfg.domains]
    jobs = rollout.group_jobs(tasks, 3)  # more than run at once

    def run_once():
        engine = LocalEngine(model, chat.stop_ids, slots=cfg.concurrency, max_context=cfg.max_tokens + 1)
        played = collect(jobs, rollout.open_stage(cfg, WORLD, engine, chat), seed="0:1:0", label="test")
        engine.close()
        return [t.to_json() | {"seconds": {}} for t in played]

    first, second = run_once(), run_once()
    assert first == second  # ids, logprobs, stops, evaluations: everything but the clock
    assert len({json.dumps(t["ids"]) for t in first}) == len(jobs)
    assert sum(len(t["turns"]) for t in first) > 2 * len(jobs)
    for row in first:
        assert {said for said, x in zip(row["said"], row["logprobs"]) if x != 0.0} == {True}
        assert row["stop"] in set(Stop) and not Stop(row["stop"]).ours
