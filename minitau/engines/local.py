"""The embedded engine: continuous batching over a KV cache, in PyTorch, in the trainer's process.

Requests of many threads share each forward. Every episode (a `session`) owns a slot of the cache,
so that its next turn computes only what is new; a fresh session copies the prefix that another
slot already holds. What a slot caches is known by its ids, one per computed position: the last
sampled token has not been computed yet and is not among them.

A sample is drawn with the random numbers of its own request, whoever shares its batch. Floating
point still feels the batch in the last bit, so to make whole runs repeat bit for bit the engine
can wait, before each step, until every thread that joined is asking (`patience`).

It knows ids and weights; no text, no domain, no ranks.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minitau.attention import causal_sdpa
from minitau.episode import Completion, EngineError, Sampling
from minitau.model import Qwen3

AttendLayer = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q (T,H,d), k and v (T,K,d) -> (T,H,d)

SHARED_PREFIX = 32  # tokens that must agree before copying another slot's cache pays
PREFILL_TOKENS = 16_384  # at most so many new tokens in one forward
CACHE_STEP = 512  # the cache grows in steps of so many positions


@dataclass(eq=False)
class Slot:
    """One row of the KV cache. `ids[i]` is the token whose key and value stand at position i."""

    index: int
    ids: list[int] = field(default_factory=list)
    session: str = ""
    busy: bool = False
    used: int = 0  # when it last served, in requests


@dataclass(eq=False)
class Request:
    prompt_ids: list[int]
    sampling: Sampling
    session: str
    rng: random.Random
    wave: int  # the engine's steps when it came
    slot: Slot | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""
    error: str = ""
    version: int = 0
    answered: threading.Event = field(default_factory=threading.Event)


class LocalEngine:
    """An Engine over `model`, whose parameters it reads in place.

    stop_ids: tokens that end a reply. slots: sessions with a cached prefix, and the largest batch.
    max_context: tokens of one session at most. patience: seconds to wait, before a step, for
    threads that joined and are not asking; infinite makes a run repeat bit for bit, and is right
    when the customer answers at once; a slow customer wants a small one.
    """

    def __init__(
        self,
        model: Qwen3,
        stop_ids: Iterable[int],
        *,
        slots: int = 64,
        max_context: int = 4096,
        patience: float = math.inf,
    ):
        self.model = model
        self.stop_ids = frozenset(stop_ids)
        self.max_context = max_context
        self.patience = patience
        self.version = 0
        self.slots = [Slot(i) for i in range(slots)]
        self.keys: list[Tensor] = []  # per layer (slots, K, length, d), made at the first request
        self.values: list[Tensor] = []
        self.pending: list[Request] = []
        self.running: list[Request] = []
        self.joined = 0
        self.served = self.steps = 0
        self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.serve, name="local-engine", daemon=True)
        self.thread.start()

    # -- the Engine protocol, called from many threads ----------------------------------------------

    def join(self) -> None:
        with self.changed:
            self.joined += 1

    def leave(self) -> None:
        with self.changed:
            self.joined -= 1
            self.changed.notify_all()

    def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str, seed: int) -> Completion:
        if not prompt_ids or len(prompt_ids) >= self.max_context:
            raise EngineError(f"prompt of {len(prompt_ids)} tokens, the engine takes 1 to {self.max_context - 1}")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self.model.cfg.vocab_size:
            raise EngineError(f"a prompt has ids outside the vocabulary of {self.model.cfg.vocab_size}")
        with self.changed:
            if self.closed:
                raise EngineError("the engine is closed")
            request = Request(list(prompt_ids), sampling, session, random.Random(seed), self.steps)
            self.pending.append(request)
            self.changed.notify_all()
        request.answered.wait()
        if request.error:
            raise EngineError(request.error)
        return Completion(tuple(request.ids), tuple(request.logprobs), request.finish, request.version)

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over `weights` in place; those that already are the engine's own cost nothing."""
        with self.changed:
            assert not self.running and not self.pending, "weights must not change under a request"
            own = dict(self.model.named_parameters())
            with torch.no_grad():
                for name, tensor in weights:
                    if tensor.data_ptr() != own[name].data_ptr():
                        own[name].copy_(tensor)
            self.version = version
            self.slots = [Slot(slot.index) for slot in self.slots]  # older weights computed what they held

    def tend(self, version: int | None = None) -> None:
        """Nothing to do: it lives in this process."""

    def sleep(self) -> None:
        """Nothing to do: a cache for a CPU is small."""

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join()

    # -- the serving thread -------------------------------------------------------------------------

    def serve(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.pending or self.running)
                self.changed.wait_for(self.everyone_asks, None if self.patience == math.inf else self.patience)
                if self.closed:
                    return self.fail("the engine was closed")
            try:
                with torch.inference_mode():
                    self.step()
            except Exception as error:  # one bad batch must not hang every thread that waits
                with self.changed:
                    self.fail(f"{type(error).__name__}: {error}")

    def everyone_asks(self) -> bool:
        return self.closed or len(self.pending) + len(self.running) >= self.joined

    def fail(self, why: str) -> None:
        """Tell everyone who waits; give the cache back, whose state nobody knows now."""
        for request in self.pending + self.running:
            request.error = why
            request.answered.set()
        self.pending, self.running = [], []
        self.keys, self.values = [], []
        self.slots = [Slot(slot.index) for slot in self.slots]

    def step(self) -> None:
        """Admit who fits and prefill them; then one token for everyone who runs."""
        with self.changed:
            admitted = self.admit()
        while admitted:
            batch, tokens = [], 0
            while admitted and (not batch or tokens + new_tokens(admitted[0]) <= PREFILL_TOKENS):
                tokens += new_tokens(admitted[0])
                batch.append(admitted.pop(0))
            self.advance(batch, [r.prompt_ids[len(r.slot.ids) :] for r in batch])
        if self.running:
            self.advance(self.running, [r.ids[-1:] for r in self.running])

    def admit(self) -> list[Request]:
        """Give slots to waiting requests: who came earlier first, then in the order of their sessions' names.

        A fresh session waits one step if another one, admitted now, is about to compute the same
        prefix: it copies it then instead of computing it again.
        """
        self.steps += 1
        admitted, heads = [], set()
        for request in sorted(self.pending, key=lambda r: (r.wave, r.session)):
            free = [slot for slot in self.slots if not slot.busy]
            if not free:
                break
            slot = next((s for s in free if s.session == request.session), None)
            if slot is None:
                head = tuple(request.prompt_ids[:SHARED_PREFIX])
                if head in heads:
                    continue
                slot = min(free, key=lambda s: s.used)
                self.start_slot(slot, request)
                if len(slot.ids) < SHARED_PREFIX < len(request.prompt_ids):
                    heads.add(head)
            else:
                # The last token is computed again even if cached: its logits are what we sample from.
                del slot.ids[min(common_prefix(slot.ids, request.prompt_ids), len(request.prompt_ids) - 1) :]
            self.served += 1
            slot.busy, slot.used, slot.session = True, self.served, request.session
            request.slot = slot
            admitted.append(request)
        self.pending = [r for r in self.pending if r.slot is None]
        self.running += admitted
        return admitted

    def start_slot(self, slot: Slot, request: Request) -> None:
        """Fill `slot` with the longest prefix of the request that any slot holds."""
        prompt = request.prompt_ids[:-1]
        head = prompt[:SHARED_PREFIX]
        donors = [s for s in self.slots if len(head) == SHARED_PREFIX and s.ids[:SHARED_PREFIX] == head]
        shared = [(common_prefix(donor.ids, prompt), donor) for donor in donors]
        n, donor = max(shared, key=lambda pair: pair[0], default=(0, slot))
        slot.ids = prompt[:n]
        if donor is not slot and n:
            for cache in (*self.keys, *self.values):
                cache[slot.index, :, :n] = cache[donor.index, :, :n]

    def advance(self, requests: list[Request], feeds: list[list[int]]) -> None:
        """Run each request's new ids through the model, then sample one token for each."""
        device = self.model.head_weight.device
        starts = [len(r.slot.ids) for r in requests]
        self.grow_cache(max(start + len(feed) for start, feed in zip(starts, feeds)))
        ids_T = torch.tensor([i for feed in feeds for i in feed], device=device)
        positions_T = torch.cat([torch.arange(s, s + len(f)) for s, f in zip(starts, feeds)]).to(device)
        slots = [r.slot.index for r in requests]
        decode = all(len(feed) == 1 for feed in feeds)
        attend = (self.attend_one if decode else self.attend_many)(slots, starts, [len(f) for f in feeds], positions_T)
        layers = [partial(attend, layer) for layer in range(self.model.cfg.num_hidden_layers)]
        hidden_TD = self.model.hidden(ids_T, positions_T, layers)
        last_B = torch.tensor([len(feed) for feed in feeds], device=device).cumsum(0) - 1
        for request, feed in zip(requests, feeds):
            request.slot.ids += feed
        self.sample(requests, self.model.logits(hidden_TD[last_B]))

    def attend_many(self, slots: list[int], starts: list[int], lengths: list[int], positions_T: Tensor) -> AttendLayer:
        """Attention for prefill: each request's new tokens over its own slot, one SDPA call each."""
        slots_T = torch.tensor([s for s, n in zip(slots, lengths) for _ in range(n)], device=positions_T.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[slots_T, :, positions_T] = k
            values[slots_T, :, positions_T] = v
            out = []
            for slot, start, q_one in zip(slots, starts, q.split(lengths)):
                end = start + len(q_one)
                out.append(
                    causal_sdpa(q_one, keys[slot, :, :end].transpose(0, 1), values[slot, :, :end].transpose(0, 1))
                )
            return torch.cat(out)

        return attend

    def attend_one(self, slots: list[int], starts: list[int], lengths: list[int], positions_T: Tensor) -> AttendLayer:
        """Attention for decoding: one new token a request, all in one SDPA call over the cache.

        The call reads the cache in place, over the smallest range of slots that holds everyone; the
        query heads that share a key head stand as the rows of one attention matrix.
        """
        low, high = min(slots), max(slots) + 1
        slots_T = torch.tensor(slots, device=positions_T.device)
        rows_T = slots_T - low
        longest = math.ceil((max(starts) + 1) / 64) * 64
        last = torch.zeros(high - low, dtype=torch.long, device=positions_T.device)
        last[rows_T] = positions_T
        mask = (torch.arange(longest, device=positions_T.device) <= last[:, None])[:, None, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[slots_T, :, positions_T] = k
            values[slots_T, :, positions_T] = v
            grouped = q.unflatten(1, (k.shape[1], -1))  # (B, K, H/K, d)
            spread = grouped.new_zeros(high - low, *grouped.shape[1:])
            spread[rows_T] = grouped
            seen = slice(0, longest)
            out = F.scaled_dot_product_attention(
                spread, keys[low:high, :, seen], values[low:high, :, seen], attn_mask=mask
            )
            return out[rows_T].flatten(1, 2)

        return attend

    def grow_cache(self, length: int) -> None:
        """Make room for `length` positions in every slot, keeping what is there."""
        cfg, weight = self.model.cfg, self.model.head_weight
        have = self.keys[0].shape[2] if self.keys else 0
        if length <= have:
            return
        want = CACHE_STEP * math.ceil(max(length, min(2 * have, self.max_context)) / CACHE_STEP)
        shape = (len(self.slots), cfg.num_key_value_heads, want, cfg.head_dim)
        for caches in (self.keys, self.values):
            for layer in range(cfg.num_hidden_layers):
                fresh = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
                if have:
                    fresh[:, :, :have] = caches[layer]
                    caches[layer] = fresh
                else:
                    caches.append(fresh)

    def sample(self, requests: list[Request], logits_BV: Tensor) -> None:
        """Draw one token a request by inverting its cumulative distribution at a number of its own."""
        temperatures = torch.tensor([r.sampling.temperature or 1.0 for r in requests], device=logits_BV.device)
        log_p = F.log_softmax(logits_BV / temperatures[:, None], dim=-1)
        cumulative = log_p.double().exp().cumsum(-1)
        draws = torch.tensor([r.rng.random() for r in requests], dtype=torch.float64, device=logits_BV.device)
        drawn = torch.searchsorted(cumulative, (draws * cumulative[:, -1])[:, None], right=True).squeeze(1)
        greedy = torch.tensor([r.sampling.temperature == 0.0 for r in requests], device=logits_BV.device)
        chosen = torch.where(greedy, log_p.argmax(-1), drawn.clamp(max=log_p.shape[1] - 1))
        logprobs = log_p.gather(1, chosen[:, None]).squeeze(1)
        for request, token, logprob in zip(requests, chosen.tolist(), logprobs.tolist()):
            request.ids.append(token)
            request.logprobs.append(logprob)
        self.settle(requests)

    def settle(self, requests: list[Request]) -> None:
        """Answer those who are done; the others run on."""
        finished = []
        for request in requests:
            full = len(request.prompt_ids) + len(request.ids) >= self.max_context
            if request.ids[-1] in self.stop_ids:
                request.finish = "stop"
            elif len(request.ids) >= request.sampling.max_new_tokens or full:
                request.finish = "length"
            if request.finish:
                request.version = self.version
                request.slot.busy = False
                finished.append(request)
        with self.changed:
            self.running = [r for r in self.running if r not in finished]
        for request in finished:
            request.answered.set()


def new_tokens(request: Request) -> int:
    return len(request.prompt_ids) - len(request.slot.ids)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix, by bisection on slices that compare at C speed."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
