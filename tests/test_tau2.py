"""tau2-bench behind our protocols. Tests that need the benchmark skip where it is not installed.

The customer's model is a real HTTP server that reads its answers from a list. Whole task lists
are played with MINITAU_TAU2_ALL=1 (five minutes); without it, samples of the slow domains.
"""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minitau import sft, tiny
from minitau.envs.tau2 import Tau2, Tau2Error
from minitau.episode import Action, Call, Message, Stop, Task, UserError

ALL = bool(os.environ.get("MINITAU_TAU2_ALL"))
ROOT = Path(__file__).resolve().parents[1]
PATH = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


@pytest.fixture(scope="module")
def world():
    """For scripts, which need no model."""
    try:
        return Tau2()
    except Tau2Error as error:
        pytest.skip(str(error))


class Customer:
    """An OpenAI-compatible endpoint. An answer is words, a list of (tool, arguments), or an HTTP status;
    the last one is repeated."""

    def __init__(self, *answers):
        self.answers, self.requests, self.keys = list(answers), [], []
        customer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                customer.requests.append(json.loads(body))
                customer.keys.append(self.headers.get("Authorization"))
                answers = customer.answers
                status, reply = customer.reply(answers.pop(0) if len(answers) > 1 else answers[0])
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def reply(self, answer):
        if isinstance(answer, int):
            return answer, {"error": {"message": f"refused {self.keys[-1]}", "type": "error"}}
        message = {"role": "assistant", "content": answer if isinstance(answer, str) else None}
        if not isinstance(answer, str):
            message["tool_calls"] = [
                {"id": f"t{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
                for i, (name, arguments) in enumerate(answer)
            ]
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return 200, {"model": "customer", "choices": [choice]}  # all that tau2 and litellm need


@pytest.fixture
def play(world, monkeypatch):
    """play(task, *answers, **options) -> (env, opening, customer), against a live endpoint."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    open_servers = []

    def start(task, *answers, seed="0", **options):
        customer = Customer(*answers)
        open_servers.append(customer.server)
        options = {"user_retries": 1, "user_timeout": 20, **options}
        env = Tau2(user_model="openai/customer", user_api_base=customer.url, **options).env()
        start.customer = customer
        return env, env.reset(task, seed), customer

    yield start
    for server in open_servers:
        server.shutdown()
        server.server_close()


MOCK = Task("mock", "base", "create_task_1")
ROAMING = Task("telecom", "base", "[mobile_data_issue]user_abroad_roaming_enabled_off[PERSONA:None]")
CREATE = Call("create_task", {"user_id": "user_1", "title": "Important Meeting"})


# --- installation: these tests never need tau2 ---


def shell(code, *path, **variables):
    """Run `code` in a new interpreter that finds packages in `path` first; return its output."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), **variables}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


MAKE = """
from minitau.envs.tau2 import Tau2, Tau2Error
try:
    Tau2()
except Tau2Error as error:
    print(error)
"""


def package(root, *files):
    for file in ("__init__.py", *files):
        path = root / "tau2" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('must not be run')" if file == "__init__.py" and not files else "")
    return root


def test_import_needs_no_tau2():
    done = shell("import sys, minitau.envs.tau2; print([m for m in ('tau2', 'litellm') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "files, said",
    [
        (None, "is not installed: pip install"),
        ((), "PyPI computes magnetic relaxation rates"),
        (("cli.py", "raman_calculator.py"), "PyPI computes magnetic relaxation rates"),
        (("registry.py", "agent/base/__init__.py", "runner/__init__.py"), "is not the supported 337326e"),
        (("registry.py", "agent/base.py"), "lacks a module"),
    ],
)
def test_wrong_package_is_told_in_one_line(tmp_path, files, said):
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
    if done.stdout:  # litellm before it had MCP says nothing, and works
        assert done.stdout.count("\n") == 1 and 'pip install "litellm[mcp]"' in done.stdout


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
    if domain in ("airline", "retail") and not ALL:
        pytest.skip("MINITAU_TAU2_ALL=1 plays the slow domains whole")
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


def test_references_that_fail_are_left_out(world):
    for id in ("2", "13", "35"):
        shown = world.demonstrate(Task("retail", "train", id), "gold", "0")
        assert shown.evaluation.reward == 1.0
        assert not any(m.role == "tool" and m.content.startswith("Error") for m in shown.messages)


def test_threads_do_not_disturb_each_other(world):
    tasks = world.tasks("telecom", "train")[:16] * 4
    with ThreadPoolExecutor(64) as pool:
        rewards = list(pool.map(lambda task: world.demonstrate(task, "gold", "0").evaluation.reward, tasks))
    assert rewards == [1.0] * 64


# --- the agent's side ---


def test_the_requestor_is_always_the_agent(play):
    env, _, _ = play(ROAMING, "Help.", "###STOP###")
    for arguments in ({}, {"requestor": "user"}):
        (answer,) = env.step(Action(calls=(Call("toggle_roaming", arguments),))).messages
        assert answer.role == "tool" and answer.content.startswith("Error")
    assert env.step(Action("Bye.")).stop == Stop.USER_STOP
    assert env.evaluate(Stop.USER_STOP).reward == 0.0


def test_the_grader_gets_raw_outputs_and_the_agent_a_cut(play):
    env, _, _ = play(MOCK, "Help.", "###STOP###", max_tool_chars=12)
    title = 'Wichtig: "Über\\uns"\n\tSitzung \u2028 🙂'
    odd = Call("create_task", {"user_id": "user_1", "title": title})
    first, second = env.step(Action("I think so.", calls=(CREATE, odd))).messages
    assert first.content.startswith('{"task_id":') and first.content.endswith("more characters]")
    assert [message.role for message in (first, second)] == ["tool", "tool"]
    env.step(Action("Done."))
    evaluation = env.evaluate(Stop.USER_STOP)
    assert evaluation.note == "" and [c.passed for c in evaluation.checks if c.kind == "action"] == [True]


def test_text_beside_calls_is_a_thought(play):
    task = Task("mock", "base", "update_task_with_initialization_data")
    env, _, customer = play(task, "Help.", "###STOP###")
    thought = "The agent acknowledged the previous context"  # what this task wants said aloud
    env.step(Action(thought, calls=(Call("get_users", {}),)))
    env.step(Action("Done."))
    assert not any(c.passed for c in env.evaluate(Stop.USER_STOP).checks if c.kind == "communicate")
    assert thought not in json.dumps(customer.requests)


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


def test_a_random_bill_cannot_be_replayed(play):
    env, _, _ = play(ROAMING, "Help.")
    line = {"customer_id": "C1002", "line_id": "L1004"}
    refuel = Call("refuel_data", {**line, "gb_amount": 1.0})
    seen = env.step(Action(calls=(refuel, Call("get_bills_for_customer", {"customer_id": "C1002"}))))
    assert not any(message.content.startswith("Error") for message in seen.messages)
    evaluation = env.evaluate(Stop.AGENT_STOP)
    assert evaluation.reward == 0.0 and evaluation.checks == ()
    assert evaluation.note.startswith("the grader failed: ValueError") and "\n" not in evaluation.note


def test_a_huge_power_is_not_calculated(play):
    env, _, _ = play(Task("retail", "base", "0"), "Help.")
    for expression, answer in (("2 ** 10 + 1", "1025.0"), ("12.5 * 3", "37.5")):
        seen = env.step(Action(calls=(Call("calculate", {"expression": expression}),)))
        assert seen.messages[0].content == answer
    for expression in ("9**9**9", "9**(9**9)", "2**99999999", "(2 **\t9) ** 999999999"):
        before = list(env._record)
        both = (Call("calculate", {"expression": expression}), Call("calculate", {"expression": "1 + 1"}))
        seen = env.step(Action(calls=both))
        assert seen.messages[0].content.startswith("Error:") and seen.messages[1].content == "2.0"
        # The grader replays what is on record: the huge power must not be there.
        recorded = [message for message in env._record[len(before) :] if message.role == "assistant"]
        assert [call.arguments for call in recorded[0].tool_calls] == [{"expression": "1 + 1"}]


# --- the customer's side ---


def test_the_customer_uses_its_tools_unseen(play):
    two = [("toggle_roaming", "{}"), ("run_speed_test", "{}")]
    env, opening, customer = play(
        ROAMING, [("check_status_bar", "{}")], "No internet.", two, [("check_network_status", "{}")],
        "It works!", "###STOP###",
    )  # fmt: skip
    assert opening.messages[-1] == Message("user", "No internet.")
    seen = env.step(Action("Please toggle roaming and test the speed."))
    assert seen.messages == (Message("user", "It works!"),) and seen.stop is None
    assert env.step(Action("Great.")).stop == Stop.USER_STOP
    evaluation = env.evaluate(Stop.USER_STOP)
    assert evaluation.reward == 1.0 and evaluation.note == ""

    assert len(customer.requests[0]["tools"]) == 30
    asked, *results = customer.requests[3]["messages"][-3:]
    assert [call["function"]["name"] for call in asked["tool_calls"]] == ["toggle_roaming", "run_speed_test"]
    assert [result["tool_call_id"] for result in results] == ["t0", "t1"]
    assert "Excellent" in results[1]["content"]


def test_a_customer_lost_in_its_tools_is_an_error(play):
    with pytest.raises(UserError, match="6 calls of its own tools without a word"):
        play(ROAMING, [("check_status_bar", "{}")] * 2, max_user_calls=5)
    assert len(play.customer.requests) == 3


def test_the_seed_reaches_the_customer(play):
    asked = [play(MOCK, "Help.", seed=seed)[2].requests[0] for seed in ("a", "a", "b")]
    seeds = [request["seed"] for request in asked]
    assert seeds[0] == seeds[1] != seeds[2]
    assert asked[0]["model"] == "customer" and asked[0]["temperature"] == 0.0


def test_a_failed_request_is_made_again(play):
    env, opening, customer = play(MOCK, 500, "Help.", "", "Thanks. ###STOP###")
    assert opening.messages[-1].content == "Help."
    assert env.step(Action("Done.")).stop == Stop.USER_STOP
    assert len(customer.requests) == 4
    assert customer.requests[0] == customer.requests[1] and customer.requests[2] == customer.requests[3]


@pytest.mark.parametrize(
    "answer, said",
    [
        (500, "InternalServerError.*status 500"),
        (503, "status 503"),
        (429, "status 429"),
        ("", "empty"),
        ([("toggle", "{oops")], "JSONDecodeError"),
    ],
)
def test_a_customer_that_never_answers_is_an_error(play, answer, said):
    with pytest.raises(UserError, match=said) as caught:
        play(MOCK, answer)
    assert len(play.customer.requests) == 2 and "\n" not in str(caught.value)


def test_a_refused_key_is_not_shown_and_not_tried_again(play, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with pytest.raises(UserError, match="status 401") as caught:
        play(MOCK, 401)
    assert play.customer.keys == ["Bearer sk-very-secret"]
    out, err = capfd.readouterr()
    assert "secret" not in str(caught.value) + out + err


def test_a_dead_endpoint_is_an_error(world, capfd):
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.server_close()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    started = time.monotonic()
    with pytest.raises(UserError, match="openai/customer, did not answer") as caught:
        Tau2(user_model="openai/customer", user_api_base=url, user_retries=1).env().reset(MOCK, "0")
    assert "\n" not in str(caught.value) and time.monotonic() - started < 10
    assert capfd.readouterr() == ("", "")


def test_a_silent_endpoint_is_an_error(world):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # it never accepts
        url = f"http://127.0.0.1:{server.server_port}/v1"
        options = {"user_api_base": url, "user_timeout": 0.5, "user_retries": 1}
        started = time.monotonic()
        with pytest.raises(UserError, match="Timeout"):
            Tau2(user_model="openai/customer", **options).env().reset(MOCK, "0")
        assert time.monotonic() - started < 10


def test_a_customer_that_leaves_at_once_is_an_error(play):
    with pytest.raises(UserError, match="before the agent spoke"):
        play(MOCK, "###STOP###")


# --- the whole pipeline ---


def test_two_grpo_steps_on_real_tasks(world, tmp_path):
    """The commands themselves: a tiny agent, a tiny customer behind HTTP, real tasks, the official grader.

    The agent scores 0. Every episode must still end with a typed stop, and be trained on.
    """
    base, out = tmp_path / "base", tmp_path / "run"
    cfg = tiny.Tiny(out=str(base), env="tau2", domains=("retail", "telecom"), vocab=3000, layers=1, hidden=64, heads=2)
    texts = (json.dumps(sft.to_row(world.demonstrate(world.tasks(d, "train")[1], "gold", "s"))) for d in cfg.domains)
    tiny.make(cfg, texts)
    server = subprocess.Popen(
        [sys.executable, "serve_user.py", "--model", str(base), "--port", "0", "--max-new-tokens", "16"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        server.stdout.readline()
        customer = server.stdout.readline().split()
        flags = (
            f"--stage grpo --env tau2 --model {base} --out {out} --domains retail,airline,telecom --no-screen "
            "--steps 2 --tasks 3 --tasks-per-step 3 --group-size 2 --max-rounds 1 --max-new-tokens 16 --max-turns 3 "
            "--lr 1e-3"
        )
        done = subprocess.run(
            [sys.executable, "train.py", *flags.split(), *customer], cwd=ROOT, capture_output=True, text=True
        )
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
