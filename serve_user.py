"""The customer's side of tau2-bench, served from a model of one's own behind an OpenAI endpoint.

    python serve_user.py --model MODEL --port 30001                  SGLang, a server on each GPU
    python serve_user.py --model MODEL --port 30001 --engine local   this process, also on a CPU

tau2's user simulator reaches it through litellm, tools included. It listens on loopback only: it
asks for no password. SGLang's endpoint is its own, with a parser of tool calls; the local one has what
a user simulator needs: /v1/chat/completions (no streaming), /v1/models and /health.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import random
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from minitau import cli, config, parallel, pretrained
from minitau.chat import Chat, thought_and_reply
from minitau.conversations import read_message
from minitau.engines import open_engine
from minitau.engines.launch import ENVIRONMENT, command_line
from minitau.engines.server import HOST, Server, healthy, port_is_taken
from minitau.engines.upkeep import DEATHS, LONG_LIFE
from minitau.episode import Action, BadInput, Engine, EngineError, Opening, Sampling
from minitau.run import open_chat
from minitau.script import run_script

LOOK_SECONDS = 60.0  # between two looks whether SGLang is well
SILENT_SECONDS = 60.0  # after which a client that says nothing more is left
LARGEST = 64_000_000  # bytes of a request
NAME = "minitau-user"  # the model's name on the endpoint


def complete(body: Any, cfg: config.Server, chat: Chat, engine: Engine) -> dict[str, Any]:
    """One chat completion. Raises ValueError for a request that cannot be served, EngineError else."""
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise ValueError("`messages` must be a list that is not empty")
    if body.get("stream") or body.get("stop") or body.get("n") not in (None, 1):
        raise ValueError("`stream`, `stop` and several choices (`n`) are not supported")
    messages = [read_message(row) for row in body["messages"]]
    policy = messages.pop(0).content if messages[0].role == "system" else ""
    opening = Opening(policy, tuple(body.get("tools") or ()), tuple(messages))
    prompt_ids = chat.open(opening)
    if len(prompt_ids) >= cfg.max_tokens:
        raise ValueError(f"the conversation has {len(prompt_ids)} tokens; --max-tokens is {cfg.max_tokens}")
    limits = (body.get("max_completion_tokens"), body.get("max_tokens"), cfg.max_new_tokens)
    limit = int(next(each for each in limits if each is not None))
    temperature = cfg.temperature if body.get("temperature") is None else float(body["temperature"])
    seed = random.getrandbits(63) if body.get("seed") is None else int(body["seed"])
    if limit < 1 or not 0 <= temperature < math.inf:
        raise ValueError(f"max_tokens {limit} and temperature {temperature}: at least 1, and 0 or more")
    # Each request is a session of its own: the engine finds the conversation's earlier turns by their ids.
    session = uuid.uuid4().hex
    completion = engine.generate(prompt_ids, Sampling(temperature, limit), session=session, seed=seed)
    # tau2 answers a call of a tool that there is not; where there are none, who writes one is only speaking.
    action = chat.parse(completion.ids, None if opening.tools else ())
    cut = completion.finish == "length"
    return {
        "id": f"chatcmpl-{session}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": NAME,
        "choices": [{"index": 0, **choice(action, cut)}],
        "usage": {
            "prompt_tokens": len(prompt_ids),
            "completion_tokens": len(completion.ids),
            "total_tokens": len(prompt_ids) + len(completion.ids),
        },
    }


def choice(action: Action, cut: bool) -> dict[str, Any]:
    """What the model said, as OpenAI puts it. A malformed tool call is passed on as the text it is."""
    _, reply = thought_and_reply(action.text)
    message: dict[str, Any] = {"role": "assistant", "content": reply}
    if action.calls:
        # tau2 allows words or calls, never both.
        message = {"role": "assistant", "content": None, "tool_calls": []}
        for call in action.calls:
            function = {"name": call.name, "arguments": json.dumps(call.arguments)}
            message["tool_calls"].append({"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function})
    return {"message": message, "finish_reason": "tool_calls" if action.calls else "length" if cut else "stop"}


def make_server(cfg: config.Server, chat: Chat, engine: Engine) -> ThreadingHTTPServer:
    """An HTTP server on loopback, one thread a request; port 0 takes any that is free."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = SILENT_SECONDS

        def do_GET(self) -> None:
            if self.path == "/health":
                self.reply(200, {"status": "ok"})
            elif self.path == "/v1/models":
                self.reply(200, {"object": "list", "data": [{"id": NAME, "object": "model"}]})
            else:
                self.fail(404, f"no such path: {self.path}")

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or len(length) > len(str(LARGEST)) or int(length) > LARGEST:
                self.close_connection = True  # nobody knows where this request ends
                return self.fail(400, f"Content-Length must be the body's length in bytes, at most {LARGEST}")
            try:
                body = self.rfile.read(int(length))
            except (ConnectionError, TimeoutError):  # the client went in the middle of it
                self.close_connection = True
                return None
            if self.path != "/v1/chat/completions":
                return self.fail(404, f"no such path: {self.path}")
            try:
                self.reply(200, complete(json.loads(body), cfg, chat, engine))
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                self.fail(400, str(error))
            except EngineError as error:
                self.fail(503, str(error))

        def fail(self, status: int, message: str) -> None:
            self.reply(status, {"error": {"message": message, "type": "invalid_request_error"}})

        def reply(self, status: int, row: dict[str, Any]) -> None:
            payload = json.dumps(row).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)
            except ConnectionError:  # the client gave up waiting; it will ask again
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            """Say nothing: a line a request would drown everything else."""

    class Endpoint(ThreadingHTTPServer):
        request_queue_size = 128  # clients that may ask in the same moment

    return Endpoint((HOST, cfg.port), Handler)


def serve_local(cfg: config.Server) -> None:
    """Serve from this process until ctrl-C. Raises BadInput."""
    require_free(cfg.port)
    chat = open_chat(cfg.model, "native")
    model = pretrained.load_model(cfg.model).to(parallel.device(), getattr(torch, cfg.dtype)).requires_grad_(False)
    chat.check_vocabulary(model.cfg.vocab_size)
    try:
        engine = open_engine(cfg, model, chat.stop_ids)
        server = make_server(cfg, chat, engine)
    except OSError as error:
        raise BadInput(f"port {cfg.port}: {error}; choose another --port") from None
    say_ready(cfg, [server.server_port])
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        server.serve_forever()
    engine.close()  # after the step that it is in: the interpreter must not end under it


def serve_sglang(cfg: config.Server) -> None:
    """Keep a server of SGLang up on each GPU, or on every --tp of them, until ctrl-C, and say when all are ready.

    Each is an address of its own, because a conversation must go on where it is cached: SGLang's own --dp-size sends
    every request to the next copy, which then has to read again what the last one has read.

    Raises BadInput if they cannot be started as asked, EngineError if one does not start at all, or died too often.
    """
    servers = copies_of_sglang(cfg)
    news: queue.Queue[tuple[Server, bool | Exception]] = queue.Queue()
    ending = threading.Event()
    for server in servers:
        how = {"timeout": cfg.engine_timeout, "shown": server is servers[0], "news": news, "ending": ending}
        threading.Thread(target=keep_up, args=(server,), kwargs=how, daemon=True).start()
    ready = set()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                server, said = news.get()
                if isinstance(said, Exception):
                    raise said
                if said:
                    ready.add(server)
                else:
                    ready.discard(server)
                if len(ready) == len(servers):
                    say_ready(cfg, [each.port for each in servers])
    finally:
        ending.set()
        closing = [threading.Thread(target=server.close, daemon=True) for server in servers]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()  # (a second ctrl-C leaves the rest to the servers' keepers)


def copies_of_sglang(cfg: config.Server) -> list[Server]:
    """A server for each copy of the model, not started yet. Raises BadInput."""
    log, groups, servers = Path(cfg.log), gpu_groups(cfg), []
    if not log.name:
        raise BadInput("--log must name a file")
    for number, gpus in enumerate(groups):
        port = cfg.port and cfg.port + number
        require_free(port)
        one = len(groups) == 1
        servers.append(
            Server(
                lambda port: sglang_command(cfg, port),
                log if one else log.with_stem(f"{log.stem}-{number}"),
                "SGLang" if one else f"SGLang on GPU {','.join(gpus)}",
                environment={**ENVIRONMENT, **visible(gpus)},
                port=port,
            )
        )
    return servers


def keep_up(
    server: Server,
    *,
    timeout: float,
    shown: bool,
    news: queue.Queue[tuple[Server, bool | Exception]],
    ending: threading.Event,
) -> None:
    """Start `server`, and start it again when it dies, until `ending`.

    To `news` goes True each time that it is ready, False when it is lost, and at last why it is given up: a start that
    fails is a death, but for the first, which is the end.
    """
    deaths = 0
    try:
        while not ending.is_set():
            try:
                server.start(timeout, shown=shown and not deaths)
                news.put((server, True))
                watch(server)
            except EngineError:
                if not deaths:
                    raise
            if ending.is_set():
                return
            news.put((server, False))
            deaths = 1 if server.age() > LONG_LIFE + timeout else deaths + 1
            if deaths == DEATHS:
                raise EngineError(f"{server.name} died {deaths} times in a row; {server.last_words()}")
            print(f"{server.name} is lost and is started again; {server.last_words()}", flush=True)
            server.close()
    except Exception as error:
        news.put((server, error))


def watch(server: Server) -> None:
    """Return once the server is dead, or does not say in time that it is well."""
    looked = time.monotonic()
    while server.alive():
        time.sleep(1.0)
        if time.monotonic() - looked > LOOK_SECONDS:
            if not healthy(server.url):
                return
            looked = time.monotonic()


def visible(gpus: Sequence[str]) -> dict[str, str]:
    """What shows SGLang these GPUs alone, numbered as they are visible here. Raises BadInput."""
    if not gpus:
        return {}
    here = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = here.split(",") if here else [str(i) for i in range(torch.cuda.device_count())]
    if bad := [gpu for gpu in gpus if names and int(gpu) >= len(names)]:
        raise BadInput(f"--gpus {bad[0]}: there are {len(names)} GPUs here, numbered from 0")
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[int(gpu)] if names else gpu for gpu in gpus)}


def gpu_groups(cfg: config.Server) -> list[Sequence[str]]:
    """The GPUs of each copy of the model; one copy on none where there is none. Raises BadInput."""
    gpus = cfg.gpus or tuple(map(str, range(torch.cuda.device_count())))
    if len(gpus) % cfg.tp:
        raise BadInput(f"--tp {cfg.tp} does not divide {len(gpus)} GPUs; name others with --gpus")
    return [gpus[i : i + cfg.tp] for i in range(0, len(gpus), cfg.tp)] or [()]


def sglang_command(cfg: config.Server, port: int) -> list[str]:
    """How SGLang is started on `port`. Raises BadInput."""
    flags = {
        "--model-path": cfg.model,
        "--served-model-name": NAME,
        "--host": HOST,
        "--port": port,
        "--dtype": cfg.dtype,
        "--tp-size": cfg.tp,
        "--mem-fraction-static": cfg.mem_fraction,
        "--context-length": cfg.max_tokens,
        "--max-running-requests": cfg.concurrency,
        "--tool-call-parser": "qwen",
    }
    return command_line(cfg.engine_command, flags, [])


def require_free(port: int) -> None:
    """Raise BadInput for a port that is taken, before anything slow."""
    if port_is_taken(port):
        raise BadInput(f"port {port} is taken; choose another --port, or 0 for any that is free")


def say_ready(cfg: config.Server, ports: Sequence[int]) -> None:
    """Say that it is ready, and what to paste where train.py and eval.py are called."""
    print(f"serving {cfg.model}; for train.py and eval.py", flush=True)
    print(f"export TAU2_USER_MODEL=openai/{NAME}", flush=True)
    print(f"export TAU2_USER_API_BASE={','.join(f'http://{HOST}:{port}/v1' for port in ports)}", flush=True)


def main(argv: list[str]) -> None:
    cfg = cli.parse(config.Server, "serve_user.py", "Serve a user simulator over HTTP.", argv)
    if not cfg.model:
        raise BadInput("--model is needed")
    pretrained.read_config(cfg.model)  # before anything slow
    {"sglang": serve_sglang, "local": serve_local}[cfg.engine](cfg)


if __name__ == "__main__":
    sys.exit(run_script("serve_user.py", main, sys.argv[1:]))
