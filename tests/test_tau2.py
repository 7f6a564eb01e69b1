"""tau2-bench behind our protocols. Tests that need the benchmark skip where it is not installed.

Its traps, its databases, its customer and its settings have files of their own beside this one. The
training tasks are played whole with MINITAU_TAU2_ALL=1 only.
"""

import json
import os
import subprocess
import sys

import pytest
from tau2_world import CREATE, MAKE, MOCK, PATH, ROAMING, ROOT, package, shell

from minitau import sft, tau2_results, tiny
from minitau.envs.tau2.domain import find
from minitau.episode import Action, Call, Message, Stop, Task

ALL = bool(os.environ.get("MINITAU_TAU2_ALL"))


# --- installation: these tests never need tau2 ---


def test_import_needs_no_tau2():
    done = shell("import sys, minitau.envs.tau2; print([m for m in ('tau2', 'litellm') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "files, said", [(None, "is not installed: pip install"), (("registry.py", "agent/base.py"), "lacks a module")]
)
def test_a_missing_package_is_told_in_one_line(tmp_path, files, said):
    if files is None:
        done = shell("import sys; sys.modules['tau2'] = None\n" + MAKE)
    else:
        done = shell(MAKE, package(tmp_path, *files))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert said in done.stdout and "337326e62d8e0ca74c353b004a9c5d748e0ba914" in done.stdout


def test_missing_data_is_told_in_one_line(world, tmp_path):
    done = shell(MAKE, *PATH, TAU2_DATA_DIR=str(tmp_path / "nowhere"))
    assert done.stdout.count("\n") == 1 and "set TAU2_DATA_DIR=" in done.stdout, done.stderr
    (tmp_path / "tau2" / "user_simulator").mkdir(parents=True)
    ask = MAKE.replace("Tau2()", "Tau2().tasks('retail', 'test')")
    done = shell(ask, *PATH, TAU2_DATA_DIR=str(tmp_path))
    assert done.stdout.count("\n") == 1 and "tau2's data for retail cannot be read" in done.stdout


def test_a_litellm_without_its_tools_is_told_in_one_line(world):
    block = "import sys; sys.modules['mcp'] = None\n"
    done = shell(block + MAKE.replace("Tau2()", "Tau2(user_model='openai/customer')"), *PATH)
    assert done.returncode == 0, done.stderr
    if done.stdout:  # litellm before it had MCP says nothing, and works
        assert done.stdout.count("\n") == 1 and 'pip install "litellm[mcp]"' in done.stdout


def test_what_asks_no_model_needs_nothing_of_the_customers(world):
    block = "import sys; sys.modules['mcp'] = None\nfrom minitau import tasks\n"
    done = shell(block + "tasks.main('--env tau2 --domains mock --split base'.split())", *PATH)
    assert done.returncode == 0 and "9 tasks (mock 9)" in done.stdout, done.stderr


# --- tasks and scripts ---


def test_tasks(world):
    sizes = {"airline": (30, 20, 50), "retail": (74, 40, 114), "telecom": (74, 40, 114)}
    for domain, expected in sizes.items():
        splits = [world.tasks(domain, split) for split in ("train", "test", "base")]
        assert tuple(map(len, splits)) == expected
        train, test, base = ({task.id for task in split} for split in splits)
        assert not train & test and train | test == base
    assert [len(world.tasks("telecom", split)) for split in ("small", "full")] == [20, 2285]
    assert len(world.tasks("mock", "base")) == 9
    assert world.tasks("airline", "test") == world.tasks("airline", "test")


def test_unknown_names_are_told(world):
    with pytest.raises(ValueError, match="airline, retail, telecom, mock"):
        world.tasks("banking", "train")
    with pytest.raises(ValueError, match="mock has base"):
        world.tasks("mock", "train")
    with pytest.raises(ValueError, match="gold, refuse, transfer"):
        world.demonstrate(MOCK, "lazy", "0")
    with pytest.raises(ValueError, match="no such id"):
        world.demonstrate(Task("mock", "base", "nothing"), "gold", "0")
    with pytest.raises(ValueError, match="user_model"):
        world.env()


# Rewards of 1 that the three scripts earn on a whole split.
COUNTS = [
    ("airline", "train", (30, 13, 13)),
    ("airline", "test", (20, 6, 6)),
    ("retail", "train", (74, 5, 5)),
    ("retail", "test", (40, 2, 2)),
    ("telecom", "train", (74, 0, 8)),
    ("telecom", "test", (40, 0, 12)),
    ("mock", "base", (8, 1, 2)),
]


@pytest.mark.parametrize("domain, split, counts", COUNTS)
def test_scripts_on_whole_splits(world, domain, split, counts):
    if split == "train" and not ALL:
        pytest.skip("MINITAU_TAU2_ALL=1 plays the training tasks as well")
    for agent, count in zip(("gold", "refuse", "transfer"), counts, strict=True):
        shown = [world.demonstrate(task, agent, "0") for task in world.tasks(domain, split)]
        assert sum(demonstration.evaluation.reward == 1.0 for demonstration in shown) == count, agent


@pytest.mark.parametrize(
    "domain, agent, rewards",
    [
        ("airline", "gold", {"0": 1.0, "3": 1.0, "7": 1.0}),
        ("airline", "refuse", {"0": 1.0, "3": 0.0}),
        ("airline", "transfer", {"1": 1.0, "7": 0.0}),
        ("retail", "gold", {"0": 1.0, "2": 1.0, "6": 1.0}),
        ("retail", "refuse", {"0": 0.0}),
        ("retail", "transfer", {"2": 0.0}),
    ],
)
def test_scripts_on_a_sample(world, domain, agent, rewards):
    for id, reward in rewards.items():
        demonstration = world.demonstrate(Task(domain, "base", id), agent, "0")
        assert demonstration.evaluation.reward == reward, id
        assert demonstration.stop == (Stop.TRANSFER if agent == "transfer" else Stop.USER_STOP)


def test_demonstration_is_what_the_agent_saw(world):
    demonstration = world.demonstrate(world.tasks("telecom", "train")[0], "gold", "0")
    opening = demonstration.opening
    assert "<policy>" in opening.policy and "customer service agent" in opening.policy
    assert len(opening.tools) == 13 and opening.tools[0]["function"]["name"] == "get_customer_by_phone"
    assert [message.role for message in opening.messages] == ["assistant", "user"]
    assert opening.messages[0].content == "Hi! How can I help you today?"
    roles = {message.role for message in demonstration.messages}
    assert roles == {"assistant", "user"}, "the customer's own calls are hidden"
    assert demonstration.messages[1].content.startswith("I did that. It says:")
    kinds = {check.kind for check in demonstration.evaluation.checks}
    assert kinds == {"action", "env", "db"}


# --- the agent's side ---


def test_only_the_grader_gets_text_beside_calls(play):
    task = Task("mock", "base", "update_task_with_initialization_data")
    env, _, customer = play(task, "Help.", "###STOP###")
    wanted = (
        "The agent acknowledged the previous context"  # said to nobody, it counts in tau2 as it would if said aloud
    )
    env.step(Action(wanted, calls=(Call("get_users", {}),)))
    env.step(Action("Done."))
    told = {check.name: check.passed for check in env.evaluate(Stop.USER_STOP).checks if check.kind == "communicate"}
    assert told[wanted] and not all(told.values()) and wanted not in json.dumps(customer.requests)


def test_a_call_of_no_tool_is_an_error_of_tau2s(play):
    """The calls beside it are made, and ten such errors end the episode."""
    env, opening, _ = play(MOCK, "Help.", "###STOP###")
    assert opening.answers_any_call
    unknown = Call("fly", {"to": "moon"})
    seen = env.step(Action(calls=(unknown, CREATE)))
    assert seen.messages[0].content == "Error: Tool 'fly' not found." and "Error" not in seen.messages[1].content
    assert env.step(Action("Done.")).stop == Stop.USER_STOP and env.evaluate(Stop.USER_STOP).reward == 1.0

    env, _, _ = play(MOCK, "Help.")
    assert [env.step(Action(calls=(unknown,))).stop for _ in range(10)] == [None] * 9 + [Stop.BAD_CALLS]


def test_a_history_is_part_of_the_opening(play):
    task = Task("mock", "base", "update_task_with_message_history")
    env, opening, customer = play(task, "Mark it as done.", "###STOP###")
    assert [m.role for m in opening.messages] == ["user", "assistant", "tool", "assistant", "user"]
    assert opening.messages[1].calls[0].name == "create_task"
    assert [m["role"] for m in customer.requests[0]["messages"]] == ["system", "assistant", "user"]
    env.step(Action(calls=(Call("update_task_status", {"task_id": "task_2", "status": "completed"}),)))
    env.step(Action("Done."))
    assert env.evaluate(Stop.USER_STOP).reward == 1.0


@pytest.mark.parametrize(
    "words, stop",
    [
        ("Thanks! ###STOP###", Stop.USER_STOP),
        ("###OUT-OF-SCOPE###", Stop.USER_STOP),
        ("Bye ###TRANSFER###", Stop.TRANSFER),
        ("Go on.", None),
    ],
)
def test_how_the_customer_ends(play, words, stop):
    env, _, _ = play(MOCK, "Help.", words)
    env.step(Action(calls=(CREATE,)))
    seen = env.step(Action("Done."))
    assert seen.stop == stop and seen.messages == (Message("user", words),)
    assert env.evaluate(stop or Stop.MAX_TURNS).reward == float(stop is not None)


def test_other_ends(play):
    env, _, _ = play(MOCK, "Help.")
    env.step(Action(calls=(CREATE,)))
    assert env.step(Action(done=True)).stop == Stop.AGENT_STOP
    assert env.evaluate(Stop.AGENT_STOP).reward == 1.0
    for stop in (Stop.MAX_TURNS, Stop.MAX_TOKENS, Stop.BAD_CALLS):
        cut_short = env.evaluate(stop)
        assert cut_short.reward == 0.0 and cut_short.checks == ()


LOOKS, FAILS = ("get_customer_by_phone", {"phone_number": "555-123-2002"}), ("get_customer_by_id", {"customer_id": "?"})
ASKED = [Action("Look, please."), Action(calls=(Call(*LOOKS),) * 2), Action(calls=(Call(*LOOKS),)), Action("So?")]
ENDS_IN = {
    "steps": ([*ASKED, Action("Bye.")], [("check_status_bar", "{}"), ("run_speed_test", "{}")]),
    "errors": ([*ASKED, *[Action(calls=(Call(*FAILS),) * 2)] * 7], [("no_such_tool", "{}")] * 3),
}


@pytest.mark.parametrize("kind, limits", [("steps", range(2, 15)), ("errors", (9, 12, 100))])
def test_an_episode_ends_where_tau2s_own_would(play, kind, limits):
    """Calls on both sides, played by tau2's own orchestrator and by us, with few steps, with more, and with all."""
    from tau2.orchestrator.orchestrator import Orchestrator
    from tau2.registry import registry
    from tau2.user.user_simulator import UserSimulator

    actions, uses = ENDS_IN[kind]
    says = ("Help me.", uses, "I looked.", "Yes?", "Bye. ###STOP###")
    stops, lengths = [], set()
    for limit in limits:
        env, _, customer = play(ROAMING, *says, max_steps=limit)
        stops.append(next(seen.stop for action in actions if (seen := env.step(action)).stop))

        customer.answers = list(says)
        environment, spec = registry.get_env_constructor("telecom")(), find(ROAMING)
        args = {"api_base": customer.url, "api_key": "none"}
        user = UserSimulator(environment.get_user_tools(), str(spec.user_scenario), "openai/customer", args)
        theirs = Orchestrator("telecom", Plays(actions), user, environment, spec, max_steps=limit).run()

        shown, wanted = (
            [(m.role, m.content, [c.name for c in m.tool_calls or ()] if m.role != "tool" else []) for m in messages]
            for messages in (env._record, theirs.messages)
        )
        assert shown == wanted, limit
        assert tau2_results.REASONS[stops[-1]] == theirs.termination_reason.value
        lengths.add(len(shown))
    assert stops[0] == Stop.MAX_TURNS and stops[-1] == (Stop.USER_STOP if kind == "steps" else Stop.BAD_CALLS)
    assert len(lengths) > len(limits) / 2


class Plays:
    """An agent of tau2's that does as a list says."""

    def __init__(self, actions):
        self.actions = iter(actions)

    def get_init_state(self, message_history):
        return None

    def generate_next_message(self, message, state):
        from tau2.data_model.message import AssistantMessage, ToolCall

        action = next(self.actions)
        calls = [ToolCall(id="1", name=call.name, arguments=call.arguments) for call in action.calls] or None
        return AssistantMessage(role="assistant", content=action.text or None, tool_calls=calls), state

    def is_stop(self, message):
        return False

    def stop(self, message, state):
        pass


def test_scripts_have_all_the_steps_they_need(world):
    limited = type(world)(max_steps=3)
    assert limited.demonstrate(Task("retail", "train", "0"), "gold", "0").evaluation.reward == 1.0


# --- the whole pipeline ---


def test_two_grpo_steps_on_real_tasks(world, tmp_path):
    """The commands themselves: a tiny agent, a tiny customer behind HTTP, real tasks, the official grader.

    The agent scores 0. Every episode must still end with a typed stop, and be trained on.
    """
    base, out = tmp_path / "base", tmp_path / "run"
    cfg = tiny.Tiny(out=str(base), env="tau2", domains=("retail", "telecom"), vocab=3000, layers=1, hidden=64, heads=2)
    texts = (json.dumps(sft.to_row(world.demonstrate(world.tasks(d, "train")[1], "gold", "s"))) for d in cfg.domains)
    tiny.make(cfg, texts)
    local = ("--engine", "local", "--port", "0", "--max-new-tokens", "16")
    server = subprocess.Popen(
        [sys.executable, "serve_user.py", "--model", str(base), *local],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        server.stdout.readline()
        exports = dict(server.stdout.readline().removeprefix("export ").strip().split("=", 1) for _ in range(2))
        flags = (
            f"--stage grpo --env tau2 --model {base} --out {out} --domains retail,airline,telecom --no-screen "
            "--steps 2 --tasks 3 --tasks-per-step 3 --group-size 2 --max-rounds 1 --max-new-tokens 16 --max-turns 3 "
            "--lr 1e-3"
        )
        done = subprocess.run(
            [sys.executable, "train.py", *flags.split()],
            cwd=ROOT, env={**os.environ, **exports}, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        server.kill()
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert sum(line["stops"].values()) == line["episodes"] == 6 and line["drift"] < 1e-4
        assert set(line["reward_by_domain"]) == {"retail", "airline", "telecom"}
    assert lines[1]["weight_versions"] == [1]

    # The same run without a customer ends at once, and says why.
    flags = flags.replace(str(out), str(tmp_path / "dead"))
    nobody = ("--user-model", "openai/nobody", "--user-api-base", "http://127.0.0.1:9/v1")
    command = [sys.executable, "train.py", *flags.split(), *nobody]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "broke on our side; the first by user_error" in done.stderr
