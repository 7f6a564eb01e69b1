"""Cold start and rejection fine-tuning on tau2-bench itself; all of it skips where the benchmark is not installed.

The customer is a real HTTP server; what the policy says is scripted, see tests/rft_on_tau2.py. Demonstrations of all
training tasks are looked at with MINITAU_TAU2_ALL=1 (two minutes); without it, those of some.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import rft_on_tau2

from minitau import config, sft, tiny
from minitau.chat import load_chat
from minitau.conversations import conversation
from minitau.envs.tau2 import Tau2
from minitau.files import whole_lines, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("airline", "retail", "telecom")
EVERY = 1 if os.environ.get("MINITAU_TAU2_ALL") else 15


@pytest.fixture(scope="module")
def played(world):
    """Gold demonstrations of training tasks, with those tasks of retail among them whose references read in vain."""
    tasks = [task for domain in DOMAINS for task in world.tasks(domain, "train")[::EVERY]]
    tasks += [task for task in world.tasks("retail", "train") if task.id in ("2", "3") and task not in tasks]
    return [world.demonstrate(task, "gold", "0") for task in tasks]


@pytest.fixture(scope="module")
def base(played, tmp_path_factory):
    """A tiny model with a tokenizer that has read tau2-bench."""
    cfg = tiny.Tiny(
        out=str(tmp_path_factory.mktemp("base") / "model"), env="tau2", vocab=3000, layers=1, hidden=64, heads=2,
        max_tokens=32_768,
    )  # fmt: skip
    first = {demonstration.task.domain: json.dumps(sft.to_row(demonstration)) for demonstration in played[::-1]}
    return str(tiny.make(cfg, first.values()))


# -- demonstrations -----------------------------------------------------------------------------------------------


def test_only_training_tasks_are_demonstrated(world, tmp_path, monkeypatch, capsys):
    """Also by their ids: no test task may come in under the name of another split."""
    asked = []

    def watched(self, task, agent, seed):
        asked.append(task)
        return rest[0]

    rest = [world.demonstrate(world.tasks("telecom", "train")[0], "gold", "0")]
    monkeypatch.setattr(Tau2, "demonstrate", watched)
    sft.demonstrate(config.Demonstrations(env="tau2", domains=DOMAINS, out=str(tmp_path / "d.jsonl")))
    assert len(asked) == 30 + 74 + 74
    for domain in DOMAINS:
        test, ours = ({task.id for task in group if task.domain == domain} for group in (held_out(world), asked))
        assert ours and test and not ours & test
    (row,) = {line for line in whole_lines(tmp_path / "d.jsonl")}
    assert json.loads(row)["origin"] == {
        "source": "minitau's gold script", "env": "tau2", "test_tasks": "none", "customer": "a script",
        "tau2_commit": "337326e62d8e0ca74c353b004a9c5d748e0ba914",
    }  # fmt: skip


def held_out(world):
    return [task for domain in DOMAINS for task in world.tasks(domain, "test")]


def test_demonstrations_earn_the_reward_and_no_tool_answers_with_an_error(played):
    assert {demonstration.task.domain for demonstration in played} == set(DOMAINS)
    results = [m for demonstration in played for m in demonstration.messages if m.role == "tool"]
    assert len(results) > 20 and not [m.content for m in results if m.content.lower().startswith("error")]
    assert all(demonstration.evaluation.reward == 1.0 for demonstration in played)
    dropped = [d for d in played if any(c.kind == "action" and not c.passed for c in d.evaluation.checks)]
    assert {"2", "3"} <= {d.task.id for d in dropped} and {d.task.domain for d in dropped} == {"retail"}


@pytest.mark.parametrize("dialect", ["native", "single-call"])
def test_both_dialects_train_on_them_and_read_back_what_was_written(played, base, tmp_path, dialect):
    chat, path = load_chat(base, dialect), tmp_path / "d.jsonl"
    write_jsonl(path, map(sft.to_row, played))
    data = sft.load(str(path), chat, 32_768)
    assert len(data.trajectories) == len(played) and not data.refused and not data.untold
    for demonstration, trajectory in zip(played, data.trajectories):
        replies = [message for message in demonstration.messages if message.role == "assistant"]
        assert len(replies) == len(trajectory.turns)
        for reply, turn in zip(replies, trajectory.turns):
            action = chat.parse(trajectory.ids[turn.start : turn.end], demonstration.opening.tools)
            assert (action.text, action.calls, action.error) == (reply.content, reply.calls, "")
        row = json.loads(json.dumps(sft.to_row(demonstration)))
        given = conversation(row, 1)
        assert given.opening == demonstration.opening and given.messages == demonstration.messages


# -- rejection fine-tuning ----------------------------------------------------------------------------------------


class Customer:
    """An OpenAI-compatible endpoint that plays every customer: it asks for help, does as it is told, and leaves.

    Once `hold()` is true it answers nobody, until it is released.
    """

    def __init__(self):
        self.hold = lambda: False
        self.held, self.released = threading.Event(), threading.Event()
        customer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                heard = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]
                if customer.hold():
                    customer.held.set()
                    customer.released.wait(120)
                choice = {"index": 0, "finish_reason": "stop", "message": answer(heard)}
                data = json.dumps({"model": "customer", "choices": [choice]}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # who asked may have been killed
                    self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.flags = ["--user-model", "openai/c", "--user-api-base", f"http://127.0.0.1:{self.server.server_port}/v1"]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


def answer(heard):
    """What the customer says, or which of its tools it uses, when it last heard this."""
    said = heard["content"] or ""
    ask = "Please do this on your side: "
    if heard["role"] == "tool":
        return {"role": "assistant", "content": "I did that."}
    if said.startswith(ask):
        # "set network mode preference (mode 4g_5g_preferred)": what is said is the tool's name, and its arguments'.
        words, _, arguments = said.removeprefix(ask).rstrip(".").rstrip(")").partition(" (")
        pairs = {each.rpartition(" ")[0].replace(" ", "_"): each.rpartition(" ")[2] for each in arguments.split(", ")}
        function = {"name": words.replace(" ", "_"), "arguments": json.dumps(pairs if arguments else {})}
        call = {"id": "1", "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if said.endswith("?"):
        return {"role": "assistant", "content": "Yes, please." if said.startswith("May I ") else "Please help me."}
    return {"role": "assistant", "content": "###STOP###"}


@pytest.fixture
def customer():
    customer = Customer()
    yield customer
    customer.released.set()
    customer.server.shutdown()
    customer.server.server_close()


def episodes(out):
    """The collected rounds without the clock's readings."""
    return {
        path.name: [{**json.loads(line), "seconds": None} for line in whole_lines(path)]
        for path in sorted((out / "collected").iterdir())
    }


def test_rft_keeps_what_was_solved_and_goes_on_after_a_kill_with_whole_rounds(world, base, customer, tmp_path):
    flags = (
        f"--stage rft --env tau2 --domains retail,telecom --tasks 4 --samples 2 --round-tasks 2 --epochs 1 --lr 1e-3 "
        f"--model {base} --resume --out"
    ).split()
    flags = [*customer.flags, *flags]
    script = str(ROOT / "tests" / "rft_on_tau2.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    # Killed in its second round, it leaves the first one whole and nothing of the second.
    broken = tmp_path / "broken"
    first = broken / "collected" / "round-0001.jsonl"
    customer.hold = lambda: first.is_file() and not customer.released.is_set()
    process = subprocess.Popen([sys.executable, script, *flags, str(broken)], **options)
    deadline = time.time() + 120
    while not customer.held.wait(0.1) and process.poll() is None and time.time() < deadline:
        pass
    assert customer.held.is_set(), process.communicate()[1][-2000:]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert os.listdir(first.parent) == [first.name]
    before = first.read_bytes()
    customer.released.set()

    # Two processes go on where it was; a third run was never interrupted.
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", script)
    done = subprocess.run([sys.executable, *torchrun, *flags, str(broken)], **options, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert first.read_bytes() == before
    whole = tmp_path / "whole"
    rft_on_tau2.main([*flags, str(whole)])
    assert episodes(broken) == episodes(whole) and len(episodes(whole)) == 2

    # Attempt 0 solved the first task of each domain and left something out in the second.
    report = json.loads((broken / "rft_report.json").read_text())
    assert report == json.loads((whole / "rft_report.json").read_text())
    rows = {row["domain"]: row for row in report}
    assert list(rows) == ["retail", "telecom", "all"]
    for row in rows.values():
        assert row["tasks"] == row["solved"] + row["partial"] + row["lost"] and not row["attempts_broken"]
    for domain in ("retail", "telecom"):
        assert rows[domain]["tasks"] == 2 and rows[domain]["attempts"] == 4 and rows[domain]["solved"] >= 1
    assert rows["all"]["lost"] >= 1 and rows["all"]["partial"] >= 1 and 0 < rows["all"]["reward"] < 1
    table = rft_table(done.stdout)
    assert table["all"] == [str(v) if isinstance(v, int) else f"{v:.3f}" for v in list(rows["all"].values())[1:]]

    # Both trained on exactly what was kept.
    kept = rows["all"]["kept"]
    rounds = [line for lines in episodes(whole).values() for line in lines]
    solved = sum(line["evaluation"]["reward"] == 1.0 for line in rounds)
    assert kept == solved + rows["all"]["partial"]
    lines = [json.loads(line) for line in whole_lines(broken / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [1, 2, 3]  # two rounds, one update
    assert (broken / "model" / "config.json").is_file()


def rft_table(text):
    return {cells[0]: cells[1:] for line in text.splitlines() if (cells := line.split())}
