"""The policy behind an SGLang server: ids in, ids and log-probabilities out, weights handed over in place.

It speaks HTTP to the server and imports nothing of SGLang. A server of ours that dies or hangs is started again and
given the current weights; the requests it lost are sent again, and since a request carries its whole conversation,
no episode notices. Weights go as CUDA IPC handles (shared memory on a CPU) to a server on the same device: see
`handover`. It knows no text, no domain and no loss.

    POST /generate, /update_weights_from_tensor, /abort_request, /{release,resume}_memory_occupation; GET /health
"""

from __future__ import annotations

import importlib.util
import itertools
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitau import parallel
from minitau.checkpoint import read_config
from minitau.engines.handover import buckets, serialize
from minitau.engines.server import FIRST_PORT, HOST, NoAnswer, Refused, Server, healthy, request
from minitau.episode import BadInput, Completion, EngineError, Sampling

DEATHS = 3  # in a row: then the server is not started again
LONG_LIFE = 600.0  # seconds: a server that lived so long does not die in a row with the one before
TRIES = 4  # of a request that a server refuses with 5xx, or that a server which is not ours leaves unanswered
FIRST_PAUSE = 1.0  # seconds between two tries, doubled each time
KV_CACHE = {"tags": ["kv_cache"]}
CONTEXT_SLACK = 8  # tokens beyond our own limit, so that the server's never cuts a reply
# A tiny model's config may name fewer positions than it is asked for; RoPE has no such limit.
ENVIRONMENT = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
RESTARTED = "a server was started anew"
TOO_SLOW = "; it is healthy, so the reply only takes longer: raise --engine-timeout"
PORTS_A_RANK = 100


class SGLangEngine:
    """An Engine over one server, which is this rank's alone.

    server: one of ours, not started yet, or None for one that already runs at `url`.
    stop_ids: tokens that end a reply. vocab_size, max_context: what a prompt may hold, and tokens of one session.
    dtype: of the weights on the server. timeout: seconds until a start, or a reply, counts as not coming.
    takes_weights: False if the server's own, from its model's directory, are the ones to sample from.
    sleeps: whether `sleep` does anything.
    """

    def __init__(
        self,
        server: Server | None,
        stop_ids: Iterable[int],
        *,
        url: str = "",
        vocab_size: int,
        max_context: int,
        dtype: torch.dtype,
        timeout: float = 600.0,
        takes_weights: bool = True,
        sleeps: bool = False,
    ):
        self.server, self.fixed_url = server, url.rstrip("/")
        self.stop_ids = sorted(stop_ids)
        self.vocab_size, self.max_context = vocab_size, max_context
        self.dtype, self.timeout, self.takes_weights = dtype, timeout, takes_weights
        self.sleeps, self.asleep = sleeps, False
        self.version = 0
        self.loaded = ""  # the server's name for weights that it was told to load
        self.weights: Iterable[tuple[str, Tensor]] | None = None  # of the last sync
        self.changed = threading.Condition()
        self.life = 0  # counts the server's starts: who lost a request says in which life
        self.deaths = 0  # since the last sync
        self.ready = not takes_weights  # it stands, with the weights of `version`
        self.mending = False
        self.given_up = ""  # why nothing more will come
        self.asking: set[str] = set()  # names of requests under way
        if server:
            server.start(timeout, shown=parallel.is_main())
        elif not healthy(self.fixed_url):
            raise EngineError(f"no healthy server at {self.fixed_url}; start it, or leave --engine-url out")

    @property
    def url(self) -> str:
        return self.server.url if self.server else self.fixed_url

    # -- the Engine protocol --------------------------------------------------------------------------

    def join(self) -> None:
        """Nothing to do: the server batches whoever asks."""

    def leave(self) -> None:
        """Likewise."""

    def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str, seed: int) -> Completion:
        if not prompt_ids or len(prompt_ids) >= self.max_context:
            raise EngineError(f"prompt of {len(prompt_ids)} tokens, the engine takes 1 to {self.max_context - 1}")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self.vocab_size:
            raise EngineError(f"a prompt has ids outside the vocabulary of {self.vocab_size}")
        body = {
            "input_ids": list(prompt_ids),
            "sampling_params": {
                "temperature": sampling.temperature,
                "max_new_tokens": min(sampling.max_new_tokens, self.max_context - len(prompt_ids)),
                "stop_token_ids": self.stop_ids,
                "sampling_seed": seed % 2**31,  # a server without --enable-deterministic-inference ignores it
            },
            "return_logprob": True,
            "logprob_start_len": -1,
        }
        version = self.version  # weights never change under a request
        return read_completion(self.ask(body), version, str(version) if self.takes_weights else self.loaded)

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand `weights` over; all ranks together. Iterated again if a server must be started anew.

        Raises EngineError, on every rank, if one rank's server takes no weights or died too often.
        """
        self.wake()
        self.version, self.deaths = version, 0
        if not self.takes_weights:
            return
        self.weights, self.ready = weights, False
        while True:
            problem, fatal = self.hand_over(), ""
            if problem:
                try:
                    self.mend(problem)
                except EngineError as error:
                    fatal = str(error)
            everyone = parallel.gather((problem, fatal))
            if fatal := next((fatal for _, fatal in everyone if fatal), ""):
                raise EngineError(fatal)
            if not any(problem for problem, _ in everyone):
                return

    def tend(self) -> None:
        """Bring the weights to servers that were started anew, on whatever rank: they need all ranks' shards.

        Raises EngineError once there is no server any more, so that nobody plays on without one.
        """
        if self.given_up:
            raise EngineError(self.given_up)
        if parallel.announced(RESTARTED) and (problem := self.hand_over()):
            self.lost(self.life, problem)

    def sleep(self) -> None:
        """Give the KV cache's memory back until the next sync, if the engine was opened to do so. Until then
        nothing may be asked: it would hang."""
        if self.sleeps:
            self.control("release_memory_occupation", KV_CACHE)
            self.asleep = True

    def wake(self) -> None:
        if self.asleep:
            torch.cuda.empty_cache()  # what training left cached in this process is not free for the server
            self.control("resume_memory_occupation", KV_CACHE)
            self.asleep = False

    def close(self) -> None:
        with self.changed:
            self.given_up = "the engine is closed"
            asking = list(self.asking)
            self.changed.notify_all()
        if self.server:
            return self.server.close()
        for name in asking:
            self.control("abort_request", {"rid": name})

    # -- asking, and what to do when nothing comes back ------------------------------------------------

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """What the server makes of a request for tokens, sent again as often as it takes.

        Raises EngineError once the server is given up, or a server that is healthy refuses or is too slow.
        """
        for attempt in itertools.count(1):
            life = self.wait_until_ready()
            name = uuid.uuid4().hex
            try:
                with self.changed:
                    self.asking.add(name)
                return request(f"{self.url}/generate", {**body, "rid": name}, timeout=self.timeout)
            except Refused as error:
                if error.status < 500 or attempt >= TRIES:
                    raise EngineError(f"the server refused: {error}") from None
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
            except NoAnswer as error:
                if self.given_up:
                    raise EngineError(self.given_up) from None
                well = (not self.server or self.server.alive()) and healthy(self.url)
                if self.server and not well:
                    self.lost(life, str(error))
                    continue
                if well:
                    self.control("abort_request", {"rid": name})  # or it would run on there
                if attempt >= TRIES or (well and error.late):
                    raise EngineError(f"no answer from {self.url} ({error}){TOO_SLOW if well else ''}") from None
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
            finally:
                with self.changed:
                    self.asking.discard(name)
        raise AssertionError("unreachable")

    def wait_until_ready(self) -> int:
        """Wait for a server with the current weights; the life it is in. Raises EngineError if none will come."""
        with self.changed:
            if self.takes_weights and self.weights is None:
                raise EngineError("no weights were handed over yet")
            self.changed.wait_for(lambda: self.ready or self.given_up)
            if self.given_up:
                raise EngineError(self.given_up)
            return self.life

    def lost(self, life: int, why: str) -> None:
        """The server of `life` is dead or hangs. Whoever notices first starts it again, the others wait.

        Raises EngineError if it cannot be started, or not any more.
        """
        with self.changed:
            if self.mending:
                self.changed.wait_for(lambda: not self.mending)
            if life != self.life or self.given_up:
                return
            self.mending = True
        try:
            self.mend(why)
            if self.takes_weights:
                parallel.announce(RESTARTED)
        finally:
            with self.changed:
                self.mending = False
                self.changed.notify_all()

    def mend(self, why: str) -> None:
        """Start the server again; its weights are still to come.

        Raises EngineError, now and for whoever asks later, if it is not ours, died too often or does not start.
        """
        if self.given_up or not self.server:
            return self.give_up(f"{self.url} takes no weights: {why}")
        if self.server.age() > LONG_LIFE + self.timeout:  # (a server that hangs is noticed so much later)
            self.deaths = 0
        with self.changed:
            self.ready = False
        while not self.given_up:
            self.deaths += 1
            words = self.server.last_words()
            self.server.close()
            if self.deaths >= DEATHS:
                return self.give_up(f"{self.server.name} died {self.deaths} times in a row: {why}; {words}")
            print(f"{self.server.name} is lost ({why}) and is started again; {words}", flush=True)
            torch.cuda.empty_cache()  # a server takes its part of what is free
            try:
                self.server.start(self.timeout, shown=False)
            except EngineError as error:
                why = str(error)
                continue
            with self.changed:
                self.life += 1
                self.ready = not self.takes_weights
                return self.changed.notify_all()

    def give_up(self, why: str) -> None:
        """Tell everyone who waits or will ask. Raises EngineError."""
        with self.changed:
            self.given_up = self.given_up or why
            self.changed.notify_all()
        raise EngineError(self.given_up)

    # -- weights and memory ----------------------------------------------------------------------------

    def hand_over(self) -> str:
        """Send the weights, unless this server has them; what went wrong, if anything did.

        All ranks iterate the weights to the end, whether they send or not: each holds a part of them.
        """
        with self.changed:  # (while a server is being started, its weights are announced afterwards)
            needed = not (self.ready or self.mending or self.given_up)
        problem, sent = "", 0
        for tensors, last in buckets(self.weights, self.dtype, parallel.device()):
            sent += len(tensors)
            if not needed or problem:
                continue
            body = {
                "serialized_named_tensors": [serialize(tensors)],
                "flush_cache": last,
                "weight_version": str(self.version),
            }
            try:
                request(f"{self.url}/update_weights_from_tensor", body, timeout=self.timeout)
            except (NoAnswer, Refused) as error:
                problem = str(error)
        assert sent, "the weights of a sync must be there to be iterated again"
        if needed and not problem:
            with self.changed:
                self.ready = True
                self.changed.notify_all()
        return problem or self.given_up

    def load(self, model_dir: str) -> None:
        """Make a server that is not ours sample from the model in a directory. Raises EngineError."""
        try:
            self.loaded = f"disk-{uuid.uuid4().hex}"  # no number: a training run on that server must notice
            body = {"model_path": str(Path(model_dir).resolve()), "flush_cache": True, "weight_version": self.loaded}
            request(f"{self.url}/update_weights_from_disk", body, timeout=self.timeout)
        except (NoAnswer, Refused) as error:
            raise EngineError(f"{self.url} could not load {model_dir}: {error}") from None

    def control(self, what: str, body: dict[str, Any]) -> None:
        """Ask for something whose failure is found, and mended, by the sync that follows."""
        try:
            request(f"{self.url}/{what}", body, timeout=60.0)
        except (NoAnswer, Refused) as error:
            print(f"{self.url}/{what}: {error}", flush=True)


def read_completion(reply: dict[str, Any], version: int, name: str) -> Completion:
    """A Completion from what /generate replies, sampled from weights `version`.

    name: what the server must call its weights; '' if it does not matter. Raises EngineError if it calls them
    otherwise, for an aborted request, or for a reply of another form.
    """
    try:
        meta = reply["meta_info"]
        reason = meta["finish_reason"]
        if reason["type"] not in ("stop", "length"):
            raise EngineError(f"the server gave up a request: {reason.get('message', reason['type'])}")
        if name and meta["weight_version"] != name:
            raise EngineError(f"the server's weights are {meta['weight_version']}, not {name}: who else sends some?")
        pairs = [(int(token), float(logprob)) for logprob, token, _ in meta["output_token_logprobs"]]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"the server's reply cannot be read ({type(error).__name__}: {error})") from None
    if not pairs:
        raise EngineError("the server replied without a single token")
    return Completion(tuple(i for i, _ in pairs), tuple(p for _, p in pairs), reason["type"], version)


def open_sglang(cfg: Any, stop_ids: Iterable[int], takes_weights: bool) -> SGLangEngine:
    """The engine of this rank, as `cfg` (config.Episodes, with `model`, `dtype` and `out`) says.

    Without takes_weights the server samples from the model in cfg.model. Raises EngineError, and what check does.
    """
    check(cfg, takes_weights)
    urls, server = cfg.engine_url, None
    if not urls:
        server = Server(
            lambda port: launch_command(cfg, port, takes_weights),
            Path(cfg.out) / f"engine-{parallel.rank()}.log",
            f"SGLang of rank {parallel.rank()}",
            environment=ENVIRONMENT,
            first_port=FIRST_PORT + PORTS_A_RANK * parallel.rank(),
        )
    engine = SGLangEngine(
        server,
        stop_ids,
        url=urls[parallel.rank() % len(urls)] if urls else "",
        vocab_size=read_config(cfg.model).vocab_size,
        max_context=cfg.max_tokens + 1,
        dtype=getattr(torch, cfg.dtype),
        timeout=cfg.engine_timeout,
        takes_weights=takes_weights,
        sleeps=getattr(cfg, "engine_sleep", False),
    )
    if urls and not takes_weights:
        engine.load(cfg.model)
    return engine


def check(cfg: Any, takes_weights: bool) -> None:
    """Raise BadInput for settings with which no server can be had. Costs nothing: ask before a folder is claimed."""
    if parallel.device().type == "cuda" and cfg.dtype == "float32":
        raise BadInput("SGLang's CUDA kernels compute in half precision only: --engine sglang needs --dtype bfloat16")
    if bad := [url for url in cfg.engine_url if not url.startswith("http://")]:
        raise BadInput(f"--engine-url {bad[0]}: http://HOST:PORT is needed")
    if takes_weights and cfg.engine_url and len(cfg.engine_url) != parallel.world_size():
        count = f"{len(cfg.engine_url)} servers; each of {parallel.world_size()} ranks needs its own"
        raise BadInput(f"--engine-url names {count}")
    if not cfg.engine_url:
        launch_command(cfg, 0, takes_weights)


def launch_command(cfg: Any, port: int, takes_weights: bool) -> list[str]:
    """How this rank's server is started on `port`. Raises BadInput if SGLang is not installed."""
    flags = {
        "--model-path": cfg.model,
        "--host": HOST,
        "--port": port,
        "--base-gpu-id": parallel.device().index or 0,
        "--dtype": cfg.dtype,
        "--context-length": cfg.max_tokens + CONTEXT_SLACK,
        "--mem-fraction-static": cfg.engine_mem,
        "--max-running-requests": cfg.concurrency,
        "--random-seed": cfg.seed + parallel.rank(),
    }
    if takes_weights:
        flags["--load-format"] = "dummy"  # they are sent anyway
    switches = ["--skip-tokenizer-init", "--skip-server-warmup"]
    if getattr(cfg, "engine_sleep", False):
        switches.append("--enable-memory-saver")
    return command_line(cfg.engine_command, flags, switches)


def command_line(start: str, flags: dict[str, Any], switches: Sequence[str]) -> list[str]:
    """`start`, or this Python's SGLang, with those of the flags that `start` does not hold already.

    Raises BadInput if SGLang is not installed.
    """
    if not start and importlib.util.find_spec("sglang") is None:
        raise BadInput(
            "SGLang is not installed: pip install -r requirements-gpu.txt, say with --engine-command how it is started "
            "(PYTHON -m sglang.launch_server), or take --engine local"
        )
    words = shlex.split(start) or [sys.executable, "-m", "sglang.launch_server"]
    theirs = {word.partition("=")[0] for word in words}
    ours = [(flag, str(value)) for flag, value in flags.items() if flag not in theirs]
    return [*words, *(word for pair in ours for word in pair), *(each for each in switches if each not in theirs)]
