"""What agent and customer say, played by tau2's own orchestrator and grader, and by rollout.play: every message, the
end and the reward are the same.

Both sides are lists of replies, made by hand for the corners and drawn by lot else: right calls and wrong ones, several
at once, of tools that there are not, words beside them, on both sides; leaving early, late, at once and never.
"""

import copy
import itertools
from random import Random
from types import SimpleNamespace

import pytest

from minitau import rollout, tau2_results
from minitau.chat import load_chat
from minitau.envs.tau2 import Tau2, Tau2Env
from minitau.envs.tau2.domain import find, open_domain
from minitau.envs.tau2.gold import performed
from minitau.envs.tau2.install import load
from minitau.episode import Call, Completion, Message, Sampling

DOMAINS = ("airline", "retail", "telecom")
LOOKS = Call("check_network_status", {})  # a tool of telecom's customers
NONE = Call("fly", {"to": "the moon"})  # a tool of nobody's
ENDS = ("###STOP###", "Bye. ###TRANSFER###", "###OUT-OF-SCOPE###")


def says(text="", *calls):
    return Message("assistant", text, calls)


class Replies:
    """One side of a conversation, from a list; then it says its last words again and again. It is an agent of tau2's, a
    user of tau2's, and the player of a Customer of ours."""

    def __init__(self, kind, replies):
        self.kind, self.replies = kind, itertools.chain(replies, itertools.repeat(replies[-1]))
        self.numbers = itertools.count()

    def get_init_state(self, message_history=None):
        return SimpleNamespace(messages=list(message_history or []))

    def generate_next_message(self, heard, state):
        said, records = next(self.replies), load().message
        role = {"agent": "assistant", "user": "user"}[self.kind]
        calls = [
            records.ToolCall(
                id=f"{self.kind}-{next(self.numbers)}",
                name=call.name,
                arguments=copy.deepcopy(call.arguments),
                requestor=role,
            )
            for call in said.calls
        ]
        record = records.AssistantMessage if self.kind == "agent" else records.UserMessage
        return record(role=role, content=said.content or None, tool_calls=calls or None), state

    def is_stop(self, message):
        return self.kind == "user" and load().simulator.UserSimulator.is_stop(message)

    def stop(self, *_): ...


class Samples:
    """An engine that replies from a list, then with its last reply again and again."""

    def __init__(self, chat, replies):
        self.replies = itertools.chain(map(chat.write, replies), itertools.repeat(chat.write(replies[-1])))

    def generate(self, prompt_ids, sampling, *, session, seed):
        ids = tuple(next(self.replies))
        return Completion(ids, (0.0,) * len(ids), "stop", 0)


def by_tau2(task, agent, customer, max_steps):
    tau2, spec = load(), copy.deepcopy(find(task))
    environment = tau2.registry.get_env_constructor(task.domain)()
    sides = Replies("agent", agent), Replies("user", customer)
    play = tau2.orchestrator.Orchestrator(task.domain, *sides, environment, spec, max_steps=max_steps)
    run = play.run()
    verdict = tau2.evaluator.evaluate_simulation(
        simulation=run,
        task=spec,
        evaluation_type=tau2.evaluator.EvaluationType.ALL,
        solo_mode=False,
        domain=task.domain,
    )
    return told(run.messages), run.termination_reason.value, verdict.reward


def by_minitau(chat, task, agent, customer, max_steps):
    env = Tau2Env(Tau2(user_model="script", max_steps=max_steps), Replies("user", customer))
    limits = rollout.Limits(max_turns=1000, max_tokens=10**7)
    sampling = Sampling(max_new_tokens=10**6)
    engine = Samples(chat, agent)
    t = rollout.play(task, env, engine, chat, sampling=sampling, limits=limits, sample=0, seed="s")
    assert not t.stop.ours, t.detail
    return told(env._record), tau2_results.REASONS[t.stop], t.reward


def told(messages):
    return [
        (m.role, m.content or "", (m.requestor, m.error))
        if m.role == "tool"
        else (m.role, m.content or "", [(call.name, call.arguments, call.requestor) for call in m.tool_calls or ()])
        for m in messages
    ]


@pytest.fixture(scope="module")
def chat(tiny_dir):
    return load_chat(tiny_dir, "native")


@pytest.fixture
def same(world, chat):
    """Plays both ways; how it ended and what it earned."""

    def play(task, agent, customer, max_steps=100):
        theirs, ours = by_tau2(task, agent, customer, max_steps), by_minitau(chat, task, agent, customer, max_steps)
        assert ours == theirs, task.key
        return ours[1:]

    return play


def right_calls(task):
    return [call for call, whose in performed(task) if whose == "assistant"]


@pytest.fixture
def solvable(world):
    """A task of retail with something to tell the customer, its calls, and that."""
    for task in world.tasks("retail", "test"):
        calls, wanted = right_calls(task), find(task).evaluation_criteria.communicate_info
        if len(calls) > 1 and wanted:
            return task, calls, f"It is {', '.join(wanted)}."
    raise AssertionError("there is none")


LEAVES = [says("Hi."), says("###STOP###")]


def test_words_beside_a_call_are_graded(same, solvable):
    task, calls, told = solvable
    agent = [*(says("", call) for call in calls[:-1]), says(told, calls[-1]), says("Anything else?")]
    assert same(task, agent, LEAVES) == ("user_stop", 1.0)
    assert same(task, [*(says("", call) for call in calls), says("Done.")], LEAVES) == ("user_stop", 0.0)


def test_a_call_of_no_tool_is_answered(same, solvable):
    task, calls, told = solvable
    one_by_one = [says("", call) for call in calls]
    assert same(task, [*[says("", NONE)] * 4, *one_by_one, says(told)], LEAVES) == ("user_stop", 1.0)
    assert same(task, [says("", *calls, NONE), says(told)], LEAVES) == ("user_stop", 1.0)
    between = [reply for _ in range(10) for reply in (says("", NONE), says("", calls[0]))]
    assert same(task, [*between, *one_by_one, says(told)], LEAVES) == ("too_many_errors", 0.0)


@pytest.mark.parametrize("end", ENDS)
def test_a_customer_leaves_at_once(same, world, end):
    earned = {same(task, [says("Hello?")], [says(end)]) for task in world.tasks("airline", "test")[:5]}
    assert earned == {("user_stop", 0.0), ("user_stop", 1.0)}


def test_a_customer_is_busy_with_its_own_tools(same, world):
    task, agent = world.tasks("telecom", "test")[0], [says("Please look.")]
    assert same(task, agent, [says("Hi."), *[says("", LOOKS)] * 40, says("###STOP###")]) == ("user_stop", 0.0)
    assert same(task, agent, [says("Hi."), *[says("", *[LOOKS] * 5)] * 8, says("###STOP###")]) == ("user_stop", 0.0)
    assert same(task, agent, [says("", LOOKS)]) == ("max_steps", 0.0)
    assert same(task, agent, [says("Hi."), says("###STOP### I look.", LOOKS), says("Ok."), says("###STOP###")])[1] == 0


@pytest.mark.parametrize("max_steps", range(1, 9))
def test_few_steps(same, world, max_steps):
    customer = [says("", LOOKS), says("Hi."), says("", LOOKS, LOOKS), says("###STOP###")]
    agent = [says("", Call("get_customer_by_phone", {"phone_number": "555-123-2002"})), says("Go on.")]
    assert same(world.tasks("telecom", "test")[0], agent, customer, max_steps)[1] == 0.0


@pytest.mark.parametrize("domain", DOMAINS)
def test_whatever_they_say(same, world, domain):
    rng, ends, tasks = Random(domain), set(), world.tasks(domain, "test")
    schemas = [tool["function"] for tool in open_domain(domain).tools]
    own = [LOOKS, Call("toggle_airplane_mode", {}), NONE] if domain == "telecom" else []
    for _ in range(12):
        task = rng.choice(tasks)
        right = right_calls(task)

        def call(right=right):
            if right and rng.random() < 0.6:
                return rng.choice(right)
            schema = rng.choice(schemas)
            drawn = {
                name: rng.choice(["x", "555-123-2002", 7, -1.5, "ü ☃", None, [1]])
                for name in schema["parameters"]["properties"]
            }
            return rng.choice([Call(schema["name"], drawn), Call(schema["name"], {}), NONE])

        def reply(make, often):
            calls = [make() for _ in range(rng.choice([1, 1, 2, 4]))] if rng.random() < often else []
            return says(rng.choice(["Hm. ☃", "Yes, please."]) if not calls or rng.random() < 0.3 else "", *calls)

        agent = [*(reply(call, 0.7) for _ in range(rng.randrange(2, 25))), says("Anything else?")]
        customer = [reply(lambda: rng.choice(own), 0.4 if own else 0.0) for _ in range(rng.randrange(1, 8))]
        ends.add(same(task, agent, [*customer, says(rng.choice(ENDS))], rng.choice([9, 30, 100]))[0])
    assert ends == {"user_stop", "max_steps", "too_many_errors"}
