"""The user simulator's endpoint: the real server on a free port, asked over HTTP as tau2's litellm asks it."""

import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch
import warm
from conftest import FAKE_SGLANG, FOR_THE_FAKE, ROOT

import serve_user
from minitau import cli, config
from minitau.chat import load_chat
from minitau.engines import open_engine
from minitau.envs.courier.tools import schemas
from minitau.episode import BadInput, Call, Completion, EngineError, Message
from minitau.pretrained import load_model
from minitau.script import run_script

TALK = [
    {"role": "system", "content": "You are Ada. You want 787."},
    {"role": "user", "content": "Hello, how can I help?"},
]
TOOLS = list(schemas("desk"))
CFG = config.Server(engine="local", port=0, max_new_tokens=12, max_tokens=512, concurrency=16)


@pytest.fixture(scope="module")
def chat(tiny_dir):
    return load_chat(tiny_dir, "native")


@contextmanager
def serving(chat, engine):
    """The base URL of a running server."""
    server = serve_user.make_server(CFG, chat, engine)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        engine.close()


@pytest.fixture(scope="module")
def base(chat, tiny_dir):
    """A server over the tiny model."""
    with serving(chat, open_engine(CFG, load_model(tiny_dir).requires_grad_(False), chat.stop_ids)) as url:
        yield url


class Says:
    """An engine that always says the same ids, or raises."""

    def __init__(self, reply):
        self.reply = reply

    def generate(self, prompt_ids, sampling, *, session, seed):
        if isinstance(self.reply, Exception):
            raise self.reply
        return Completion(tuple(self.reply), (-1.0,) * len(self.reply), "stop", 0)

    def close(self):
        pass


def ask(url, body=None):
    """(status, parsed reply) of a GET, or of a POST if there is a body (a row, or bytes as they are)."""
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=20) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def complete(base, **body):
    return ask(f"{base}/v1/chat/completions", {"messages": TALK, **body})


def test_health_models_and_unknown_paths(base):
    assert ask(f"{base}/health") == (200, {"status": "ok"})
    status, models = ask(f"{base}/v1/models")
    assert status == 200 and [row["id"] for row in models["data"]] == ["minitau-user"]
    for reply in (ask(f"{base}/nothing"), ask(f"{base}/v1/completions", {"prompt": "x"})):
        assert reply[0] == 404 and "no such path" in reply[1]["error"]["message"]


def test_it_listens_on_loopback_only(chat):
    server = serve_user.make_server(CFG, chat, Says([]))
    assert server.server_address[0] == server.socket.getsockname()[0] == "127.0.0.1"
    server.server_close()


def test_a_chat_completion(base, chat):
    status, row = complete(base, seed=1, temperature=1.0, tools=TOOLS)
    assert status == 200 and row["object"] == "chat.completion" and row["model"] == "minitau-user"
    (choice,) = row["choices"]
    assert choice["index"] == 0 and choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str) and "tool_calls" not in choice["message"]
    assert choice["finish_reason"] in ("stop", "length")
    usage = row["usage"]
    assert 1 <= usage["completion_tokens"] <= 12
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    assert usage["prompt_tokens"] > complete(base)[1]["usage"]["prompt_tokens"]  # the tools are in the prompt


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_length_of_a_reply_is_limited(base, name):
    row = complete(base, **{name: 3}, seed=1)[1]
    assert row["usage"]["completion_tokens"] == 3 and row["choices"][0]["finish_reason"] == "length"
    assert complete(base, **{name: 10_000}, seed=1)[0] == 200  # as much as the context has room for


def test_the_same_seed_gives_the_same_answer_and_others_differ(base):
    def text(**body):
        return complete(base, **body)[1]["choices"][0]["message"]["content"]

    assert text(seed=5) == text(seed=5)
    assert len({text(seed=seed) for seed in range(6)}) > 3
    assert len({text() for _ in range(6)}) > 3  # without a seed, each is drawn anew
    assert text(temperature=0) == text(temperature=0, seed=9)


def test_sixteen_at_once_are_each_answered_as_if_alone(base):
    def one(i):
        return ask(
            f"{base}/v1/chat/completions",
            {"messages": [*TALK, {"role": "user", "content": f"Number {i}"}], "seed": i},
        )

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(one, range(16)))
    assert [status for status, _ in together] == [200] * 16
    alone = [one(i) for i in range(16)]
    contents = [[row["choices"][0]["message"]["content"] for _, row in rows] for rows in (together, alone)]
    assert contents[0] == contents[1]
    assert len({row["id"] for _, row in together}) == 16


def test_a_conversation_with_calls_and_results_can_be_sent_back(base):
    call = {"id": "call_1", "type": "function", "function": {"name": "hold", "arguments": '{"parcel": "787"}'}}
    messages = [*TALK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "call_1", "content": '{"receipt":"832"}'}]
    assert complete(base, messages=messages, tools=TOOLS)[0] == 200


def test_a_tool_call_is_given_as_openai_gives_it(chat):
    calls = (Call("hold", {"parcel": "787", "é": [1, None]}), Call("cancel", {}))
    with serving(chat, Says(chat.write(Message("assistant", "I press it.", calls)))) as base:
        status, row = complete(base, tools=TOOLS)
    (choice,) = row["choices"]
    assert status == 200 and choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None  # tau2 allows words or calls, never both
    given = choice["message"]["tool_calls"]
    assert [(g["type"], g["function"]["name"]) for g in given] == [("function", "hold"), ("function", "cancel")]
    assert [json.loads(g["function"]["arguments"]) for g in given] == [calls[0].arguments, {}]
    assert len({g["id"] for g in given}) == 2


def test_words_are_words_and_a_malformed_call_is_passed_on_as_text(chat):
    call = '<tool_call>{"name": "fly", "arguments": {}}</tool_call>'
    for text, tools in (("I want 787. é ☃", TOOLS), ("<tool_call>{", TOOLS), (call, [])):
        with serving(chat, Says([*chat.encode(text), chat.eos_id])) as base:
            row = complete(base, tools=tools)[1]["choices"][0]
        assert row == {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    with serving(chat, Says([*chat.encode(call), chat.eos_id])) as base:
        row = complete(base, tools=TOOLS)[1]["choices"][0]
    assert row["message"]["tool_calls"][0]["function"]["name"] == "fly", "tau2 says that there is no such tool"


@pytest.mark.parametrize("said", ["Hello.", "<tool_call>{"])
def test_a_thought_is_not_passed_on(chat, said):
    with serving(chat, Says([*chat.encode(f"<think>###STOP###</think>\n\n{said}"), chat.eos_id])) as base:
        assert complete(base)[1]["choices"][0]["message"]["content"].strip() == said


BAD = {
    "not JSON": b"{",
    "empty": b"",
    "a list": [],
    "no messages": {},
    "no messages in it": {"messages": []},
    "messages are text": {"messages": "hello"},
    "a message is text": {"messages": ["hello"]},
    "unknown role": {"messages": [{"role": "robot", "content": "x"}]},
    "content is a list": {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
    "calls are a number": {"messages": [*TALK, {"role": "assistant", "tool_calls": 5}]},
    "streaming": {"messages": TALK, "stream": True},
    "several choices": {"messages": TALK, "n": 3},
    "words to stop at": {"messages": TALK, "stop": ["x"]},
    "no length at all": {"messages": TALK, "max_tokens": 0},
    "tools are text": {"messages": TALK, "tools": "hold"},
    "tools without names": {"messages": TALK, "tools": [{"type": "function"}]},
    "temperature is text": {"messages": TALK, "temperature": "warm"},
    "temperature is negative": {"messages": TALK, "temperature": -1},
    "temperature is not a number": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "seed is an object": {"messages": TALK, "seed": {}},
    "length is infinite": b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e999}',
    "length is negative": {"messages": TALK, "max_tokens": -3},
    "nested too deep": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_a_bad_request_is_answered_with_what_is_wrong(base, body):
    status, row = ask(f"{base}/v1/chat/completions", body)
    assert status == 400 and row["error"]["message"]
    assert ask(f"{base}/health")[0] == 200


def test_a_conversation_that_does_not_fit_is_refused(base):
    status, row = complete(base, messages=[{"role": "user", "content": "787 " * 1000}])
    assert status == 400 and "tokens" in row["error"]["message"], "a client would try a 503 again"


def test_an_engine_that_fails_is_503(chat):
    with serving(chat, Says(EngineError("out of memory"))) as base:
        status, row = complete(base)
    assert status == 503 and row["error"]["message"] == "out of memory"


@pytest.mark.parametrize("length", ["many", "-1", str(10**12), "9" * 5000])
def test_a_broken_header_is_answered(base, length):
    with socket.create_connection(("127.0.0.1", int(base.rsplit(":", 1)[1])), timeout=5) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode())
        reply = b"".join(iter(lambda: connection.recv(1000), b""))
        assert reply.startswith(b"HTTP/1.1 400")


def test_a_client_that_hangs_up_is_nobodys_problem(chat, capfd):
    # litellm gives up after its timeout; the server has nothing to say about that.
    asked, gone = threading.Event(), threading.Event()

    class Slow(Says):
        def generate(self, *args, **kwargs):
            asked.set()
            assert gone.wait(10)
            return super().generate(*args, **kwargs)

    with serving(chat, Slow(chat.write(Message("assistant", "Hello.")))) as base:
        client = socket.create_connection(("127.0.0.1", int(base.rsplit(":", 1)[1])), timeout=5)
        body = json.dumps({"messages": TALK}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        assert asked.wait(10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # hang up at once
        client.close()
        gone.set()
        assert complete(base)[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_it_ends_in_order_while_it_answers(tiny_dir, tmp_path):
    """The engine's thread is inside torch then, and the interpreter must not end under it."""
    said = tmp_path / "said"
    with open(said, "w") as file:
        flags = ("--engine", "local", "--port", "0", "--max-new-tokens", "2000", "--max-tokens", "4000")
        process = warm.Script("serve_user.py", "--model", str(tiny_dir), *flags, stdout=file)
    try:
        deadline = time.monotonic() + 60
        while "TAU2_USER_API_BASE=" not in said.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        base = said.read_text().split("TAU2_USER_API_BASE=")[1].split()[0].removesuffix("/v1")

        def answered():
            with suppress(OSError):
                complete(base)

        threads = [threading.Thread(target=answered, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_main_says_what_is_missing_in_one_line(tiny_dir, tmp_path, capsys, base):
    taken = base.rsplit(":", 1)[1]
    for flags in ([], ["--model", str(tmp_path)], ["--model", str(tiny_dir), "--port", taken]):
        assert run_script("serve_user.py", serve_user.main, flags) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 3 and "--model is needed" in err and "choose another --port" in err


def test_litellm_speaks_to_it(base, chat):
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no look-up in the network
    litellm = pytest.importorskip("litellm")
    options = {"model": "openai/minitau-user", "api_key": "none", "messages": TALK, "seed": 5, "temperature": 0.7}
    reply = litellm.completion(**options, api_base=f"{base}/v1", tools=TOOLS, max_tokens=8)
    assert (
        reply.choices[0].message.content
        == complete(base, seed=5, temperature=0.7, tools=TOOLS, max_tokens=8)[1]["choices"][0]["message"]["content"]
    )
    with serving(chat, Says(chat.write(Message("assistant", "", (Call("hold", {"parcel": "787"}),))))) as other:
        reply = litellm.completion(**options, api_base=f"{other}/v1", tools=TOOLS)
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == "hold" and json.loads(call.function.arguments) == {"parcel": "787"}
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**{**options, "messages": [{"role": "robot", "content": "x"}]}, api_base=f"{base}/v1")


def test_a_server_a_gpu_is_kept_up_until_it_is_interrupted(tiny_dir, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "serve_user.py", "--model", str(tiny_dir), "--port", "0", "--log", str(log)]
    with open(tmp_path / "said", "w+") as said, ExitStack() as at_the_end:
        process = subprocess.Popen(
            [*command, "--gpus", "2,3", "--mem-fraction", "0.2", "--engine-command", FAKE_SGLANG],
            cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, **FOR_THE_FAKE},
        )  # fmt: skip
        at_the_end.callback(process.kill)  # also when the test fails

        def bases(n):
            """The addresses that it said to be ready for the n-th time."""
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline and process.poll() is None:
                text = (tmp_path / "said").read_text()
                found = [line.split("=")[1] for line in text.splitlines() if "TAU2_USER_API_BASE=" in line]
                if len(found) == n:
                    return found[-1].split(",")
                time.sleep(0.1)
            raise AssertionError((tmp_path / "said").read_text())

        def alive(base):
            return ask(base.replace("/v1", "/model_info"))[0] == 200

        first = bases(1)
        assert len(set(first)) == 2 and all(map(alive, first))
        for i in (0, 1):
            words = (tmp_path / f"log-{i}").read_text()
            assert "--served-model-name minitau-user" in words and "--tool-call-parser qwen" in words
            assert "--tp-size 1 --mem-fraction-static 0.2" in words
        port = first[1].split(":")[-1].removesuffix("/v1")
        keeper = next(pid for pid in children(process.pid) if f"--port {port} " in command_of(pid))
        os.kill(children(keeper)[0], signal.SIGKILL)
        again = bases(2)
        assert again[0] == first[0] and all(map(alive, again))
        assert "SGLang on GPU 3 is lost and is started again" in (tmp_path / "said").read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        for base in again:
            with pytest.raises(OSError):
                alive(base)


class ServerThat:
    """A server that starts or not, each time as it is told, and dies at once."""

    port, name = 1, "SGLang"

    def __init__(self, starts):
        self.coming = iter(starts)

    def start(self, timeout, shown):
        if not next(self.coming):
            raise EngineError("not healthy")

    def alive(self):
        return False

    def age(self):
        return 0.0

    def last_words(self):
        return "the end of a log"

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("starts", "said"),
    [([False], "not healthy"), ([True, False, True], "died 3 times"), ([True, False, False], "died 3 times")],
)
def test_a_start_that_fails_is_a_death_but_for_the_first(monkeypatch, capsys, starts, said):
    server = ServerThat(starts)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(serve_user, "Server", lambda *_, **__: server)
    with pytest.raises(EngineError, match=said):
        serve_user.serve_sglang(config.Server(model="m", port=0))
    assert capsys.readouterr().out.count("TAU2_USER_API_BASE") == sum(starts)
    assert server.closed


class Puppet(ServerThat):
    """A server that starts and dies when a test says so."""

    def __init__(self):
        self.orders, self.starting, self.stands, self.falls = (queue.Queue(), *(threading.Event() for _ in range(3)))

    def start(self, timeout, shown):
        self.starting.set()
        if not self.orders.get(timeout=30):
            raise EngineError("not healthy")

    def up(self):
        self.orders.put(True)
        assert self.stands.wait(30)

    def down(self):
        self.starting.clear()
        self.falls.set()
        assert self.starting.wait(30)


def watched(server):
    server.stands.set()
    assert server.falls.wait(30)
    server.stands.clear()
    server.falls.clear()


def test_it_is_ready_when_all_are_at_the_same_time(monkeypatch, capsys):
    """Not when one that was lost is there again and another is still down."""
    first, second = Puppet(), Puppet()
    servers = iter([first, second])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(serve_user, "Server", lambda *_, **__: next(servers))
    monkeypatch.setattr(serve_user, "watch", watched)

    def play():
        for do in (first.up, second.up, first.down, second.down, first.up, second.up, second.down):
            do()
        second.orders.put(False)  # its third death is the end

    threading.Thread(target=play, daemon=True).start()
    with pytest.raises(EngineError, match="died 3 times"):
        serve_user.serve_sglang(config.Server(model="m", port=0))
    assert capsys.readouterr().out.count("TAU2_USER_API_BASE") == 2
    assert first.closed and second.closed


def test_one_that_does_not_start_ends_all(monkeypatch, capsys):
    """The others may take minutes to start: nobody waits for them."""
    waits = threading.Event()

    class Slow(ServerThat):
        def start(self, timeout, shown):
            assert waits.wait(30)

        def close(self):
            waits.set()

    servers = iter([Slow([]), ServerThat([False])])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(serve_user, "Server", lambda *_, **__: next(servers))
    with pytest.raises(EngineError, match="not healthy"):
        serve_user.serve_sglang(config.Server(model="m", port=0))
    assert waits.is_set() and "TAU2_USER_API_BASE" not in capsys.readouterr().out


def test_it_takes_the_gpus_that_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(serve_user, "require_free", lambda port: None)

    def copies(**settings):
        servers = serve_user.copies_of_sglang(config.Server(model="m", engine_command="sgl", port=30500, **settings))
        return {server.wanted_port: server.environment["CUDA_VISIBLE_DEVICES"] for server in servers}

    assert copies() == {30500: "4", 30501: "5", 30502: "6", 30503: "7"}
    assert copies(tp=2) == {30500: "4,5", 30501: "6,7"}
    assert copies(gpus=("1",)) == {30500: "5"}
    with pytest.raises(BadInput, match="--tp 3 does not divide 4 GPUs"):
        copies(tp=3)
    with pytest.raises(BadInput, match="--gpus 4: there are 4 GPUs here, numbered from 0"):
        copies(gpus=("0", "4"))
    with pytest.raises(BadInput, match="--log must name a file"):
        copies(log="")


@pytest.mark.parametrize(("gpus", "said"), [("1,1", "a GPU is named twice"), ("0,x", "named by numbers")])
def test_gpus_are_different_numbers(gpus, said):
    with pytest.raises(BadInput, match=f"--gpus {gpus}: .*{said}"):
        cli.check(config.Server(model="m", gpus=tuple(gpus.split(","))))


def test_every_port_must_be_free(base, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken = int(base.rsplit(":", 1)[1])
    with pytest.raises(BadInput, match=f"port ({taken - 1}|{taken}) is taken; choose another --port"):
        serve_user.copies_of_sglang(config.Server(model="m", port=taken - 1))


def children(pid):
    """Of all its threads."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(each) for file in files for each in file.read_text().split()]


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
