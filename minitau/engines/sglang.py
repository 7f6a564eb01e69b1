"""The policy behind an SGLang server: ids in, ids and log-probabilities out, weights handed over in place.

It speaks HTTP to the server and imports nothing of SGLang. A server of ours that dies or hangs is started again and
given the current weights; the requests it lost are sent again, and since a request carries its whole conversation,
no episode notices. How weights travel is in `handover`, how servers are started in `launch`. It knows no text, no
domain and no loss.

    POST /generate, /update_weights_from_disk, /abort_request, /{release,resume}_memory_occupation; GET /health
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitau import parallel
from minitau.engines.handover import Broadcaster, lend
from minitau.engines.server import NoAnswer, Refused, Server, healthy, request
from minitau.engines.upkeep import RESTARTED, Upkeep
from minitau.episode import Completion, EngineError, Sampling

TRIES = 4  # of a request that a server refuses with 5xx, or that a server which is not ours leaves unanswered
FIRST_PAUSE = 1.0  # seconds between two tries, doubled each time
KV_CACHE = {"tags": ["kv_cache"]}
TOO_SLOW = "; it is healthy, so the reply only takes longer: raise --engine-timeout"


class SGLangEngine(Upkeep):
    """An Engine over one server.

    server: one of ours, not started yet, or None for one that already runs at `url`, or that another rank starts.
    host: the rank whose server this rank asks; it may be this one. None for a server that is this rank's alone, on its
    own device. A host tends its server for its guests as well.
    tp: GPUs that the server is spread over: those of its host and guests, `tp` ranks that follow each other; or, with
    own_gpus, some where no rank trains, so that weights are broadcast.
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
        host: int | None = None,
        tp: int = 1,
        own_gpus: bool = False,
        vocab_size: int,
        max_context: int,
        dtype: torch.dtype,
        timeout: float = 600.0,
        takes_weights: bool = True,
        sleeps: bool = False,
    ):
        super().__init__(server, url, host, takes_weights=takes_weights, timeout=timeout)
        self.broadcaster = Broadcaster(tp)
        self.carry = self.broadcaster.hand_over if own_gpus else partial(lend, tp=tp)
        self.stop_ids = sorted(stop_ids)
        self.vocab_size, self.max_context = vocab_size, max_context
        self.dtype = dtype
        self.sleeps, self.asleep = sleeps, False
        self.loaded = ""  # the server's name for weights that it was told to load
        self.weights: Iterable[tuple[str, Tensor]] | None = None  # of the last sync
        self.asking: set[str] = set()  # names of requests under way

    # -- the Engine protocol --------------------------------------------------------------------------

    def join(self) -> None:
        """Nothing to do: the server batches whoever asks."""

    def leave(self) -> None:
        """Nothing to do either."""

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
        reply, version = self.ask(body)
        name = str(version) if self.takes_weights else self.loaded
        try:
            return read_completion(reply, version, name, self.stop_ids)
        except (KeyError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise EngineError(f"{self.url}: its reply cannot be read ({why}); is it a server of SGLang?") from None

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand `weights` over; all ranks together. Iterated again if a server must be started anew.

        Raises EngineError, on every rank, if one rank's server takes no weights or died too often.
        """
        torch.cuda.empty_cache()  # what training left cached in this process is not free for a server on its GPU
        self.wake()
        self.version, self.deaths = version, 0
        if not self.takes_weights:
            return
        self.weights, self.ready = weights, False
        while True:
            problem, fatal = self.hand_over(version), ""
            if problem:
                try:
                    self.mend(self.life, problem)
                except EngineError as error:
                    fatal = str(error)
            everyone = parallel.gather((problem, fatal))
            if fatal := next((fatal for _, fatal in everyone if fatal), ""):
                raise EngineError(fatal)
            if not any(problem for problem, _ in everyone):
                return

    def tend(self, version: int | None = None) -> None:
        """Bring the weights to servers that were started anew, on whatever rank: they need all ranks' shards, and so
        all main threads. In another thread only what a rank can do alone is done, and requests go on waiting.

        version: of the weights as they are now, if they are not those of the last sync. Raises EngineError once there
        is no server any more, so that nobody plays on without one.
        """
        if self.host is not None:
            self.listen()
        if self.given_up:
            raise EngineError(self.given_up)
        if threading.current_thread() is not threading.main_thread():
            return
        while parallel.announced(RESTARTED):
            life = self.life
            if problem := self.hand_over(self.version if version is None else version):
                with contextlib.suppress(EngineError):  # whoever waits for the server is told
                    self.lost(life, problem)
            parallel.barrier()  # one that was lost again has been announced again before any rank looks

    def sleep(self) -> None:
        """Give the KV cache's memory back until the next sync, if the engine was opened to do so. Until then
        nothing may be asked: it would hang."""
        if self.sleeps:
            if self.leads:
                self.control("release_memory_occupation", KV_CACHE)
            if self.host is not None:
                parallel.barrier()  # a guest must not train before the memory is there
            self.asleep = True

    def wake(self) -> None:
        if self.asleep:
            if self.host is not None:
                parallel.barrier()  # it is free on the guests' GPUs as well
            if self.leads:
                self.control("resume_memory_occupation", KV_CACHE)
            self.asleep = False

    def close(self) -> None:
        with self.changed:
            self.given_up = "the engine is closed"
            asking = list(self.asking)
            self.changed.notify_all()
        self.broadcaster.part()
        if self.server:
            return self.server.close()
        for name in asking:
            self.control("abort_request", {"rid": name})

    # -- asking, and what to do when nothing comes back ------------------------------------------------

    def ask(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """What the server makes of a request for tokens, sent again as often as it takes, and the version of the
        weights it had: they never change under a request.

        Raises EngineError once the server is given up, or a server that is healthy refuses or is too slow.
        """
        if self.takes_weights and self.weights is None:
            raise EngineError("no weights were handed over yet")
        for attempt in itertools.count(1):
            life, version = self.wait_until_ready()
            name = uuid.uuid4().hex
            try:
                with self.changed:
                    self.asking.add(name)
                return request(f"{self.url}/generate", {**body, "rid": name}, timeout=self.timeout), version
            except Refused as error:
                if error.status < 500 or attempt >= TRIES:
                    raise EngineError(f"the server refused: {error}") from None
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
            except NoAnswer as error:
                if self.given_up:
                    raise EngineError(self.given_up) from None
                well = (not self.server or self.server.alive()) and healthy(self.url)
                if not well and (self.server or self.host is not None):
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

    # -- weights and memory ----------------------------------------------------------------------------

    def hand_over(self, version: int) -> str:
        """Bring the weights, which are now of `version`, to every server that has none; all ranks together. What went
        wrong with this rank's, if anything did. Where none takes weights, guests only learn where theirs is."""
        if self.host is not None:
            self.find_host()
        if not self.takes_weights:
            return self.given_up
        # (A guest's host asks for both; a server that is still being started gets its weights after that.)
        wanted = self.leads and not (self.ready or self.down or self.given_up)
        has, problem = self.carry(self.weights, self.dtype, self.url, version, self.timeout, wanted=wanted)
        if has:
            with self.changed:
                self.ready, self.version = True, version
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


def read_completion(reply: dict[str, Any], version: int, name: str, stop_ids: Collection[int]) -> Completion:
    """A Completion from what /generate replies, sampled from weights `version`.

    name: what the server must call its weights; '' if it does not matter. Raises EngineError if it calls them
    otherwise or for an aborted request; KeyError, TypeError or ValueError for a reply of another form.
    """
    meta = reply["meta_info"]
    reason = meta["finish_reason"]
    if reason["type"] not in ("stop", "length"):
        raise EngineError(f"the server gave up a request: {reason.get('message', reason['type'])}")
    if name and meta["weight_version"] != name:
        raise EngineError(f"the server's weights are {meta['weight_version']}, not {name}: who else sends some?")
    pairs = [(int(token), float(logprob)) for logprob, token, _ in meta["output_token_logprobs"]]
    if not pairs:
        raise EngineError("the server replied without a single token")
    ids, logprobs = zip(*pairs)
    # The server looks at the length first: to it a reply that ends with its last token allowed was cut.
    return Completion(ids, logprobs, "stop" if ids[-1] in stop_ids else reason["type"], version)
