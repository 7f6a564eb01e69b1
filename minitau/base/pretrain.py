"""Pre-trains the base model: `python -m minitau.base.pretrain --out DIR`, or `make base`.

Conversations are drawn without end by worker processes, each from its own seed, so none is seen twice.
The loss is the plain one of a language model, over every token, with those of the agent weighing more.
It prints its loss curve and its scores on held-out domains, and keeps both in DIR/pretraining.json.
DIR loads like any Qwen3.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from minitau import cli, parallel, pretrained, tiny
from minitau.attention import packed_attention
from minitau.base import words
from minitau.base.talk import draw_conversation
from minitau.chat import Chat, call_text, load_chat
from minitau.config import setting
from minitau.engines.local import LocalEngine
from minitau.episode import BadInput, Message, Sampling
from minitau.files import write_json
from minitau.model import Qwen3
from minitau.run import adamw
from minitau.script import run_script
from minitau.sft import Conversation, to_trajectory

FORGETTING = 0.8  # part of the steps in which ids are forgotten
MAX_TOKENS = 1024  # longer conversations are left out: they hardly occur


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pre-training of the base model from random weights."""

    out: str = setting("", "directory to write")
    vocab: int = setting(5120, "tokens at most")
    layers: int = setting(5, "blocks")
    hidden: int = setting(192, "hidden size")
    heads: int = setting(6, "query heads of 32; half as many key heads")
    steps: int = setting(3285, "optimizer steps")
    batch_tokens: int = setting(131_072, "tokens of one step")
    lr: float = setting(2e-3, "peak learning rate of AdamW; 2% warm-up, then it falls as a cosine")
    heard_weight: float = setting(0.2, "weight in the loss of a token that the agent did not say; its own weigh 1")
    forget_every: int = setting(100, "steps between two times that half of the ids get new embeddings; 0 is never")
    weight_decay: float = setting(0.05, "of AdamW; only matrices decay")
    beta1: float = setting(0.9, "of AdamW")
    beta2: float = setting(0.98, "of AdamW")
    seed: int = setting(0, "of the weights and the conversations")
    workers: int = setting(0, "processes that draw conversations; 0 is one a core")
    scored: int = setting(256, "held-out conversations that the scores are measured on")


# -- data --------------------------------------------------------------------------------------------------


class Batches(Dataset):
    """The training data: batch i is the same whoever draws it, because `Random(f"{seed}:{i}")` decides.

    A batch is (ids (T,), said (T,), bounds (S+1,)): S whole conversations end to end, what the agent
    said in them, and where they begin and end. T is `batch_tokens` at most.
    """

    def __init__(self, cfg: Pretrain, folder: Path):
        self.cfg, self.folder = cfg, folder
        self.chat: Chat | None = None  # opened by the worker that needs it

    def __len__(self) -> int:
        return self.cfg.steps

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        self.chat = self.chat or load_chat(self.folder, "native")
        rng = Random(f"{self.cfg.seed}:{i}")
        ids: list[int] = []
        said: list[bool] = []
        bounds = [0]
        while True:
            more, spoken = encode(self.chat, draw_conversation(rng))
            if len(more) > MAX_TOKENS:
                continue
            if len(ids) + len(more) > self.cfg.batch_tokens:
                return torch.tensor(ids, dtype=torch.int32), torch.tensor(said), torch.tensor(bounds)
            ids, said = ids + more, said + spoken
            bounds.append(len(ids))


def encode(chat: Chat, talk: Conversation) -> tuple[list[int], list[bool]]:
    """The ids of sft.to_trajectory, and which of them the agent said, from one rendering of the whole.

    (A rollout must render turn by turn; here that would be most of the work.)
    """
    opening = talk.opening
    messages = [Message("system", opening.policy), *opening.messages, *talk.messages]
    ids = chat.encode(chat.render([chat.as_dict(m) for m in messages], list(opening.tools), reply_next=False))
    head = chat.encode("<|im_start|>assistant\n")
    starts = [i for i, token in enumerate(ids) if token == head[0]]
    said = [False] * len(ids)
    given = 1 + len(opening.messages)
    for message, start in list(zip(messages, starts, strict=True))[given:]:
        if message.role == "assistant":
            first, end = start + len(head), ids.index(chat.eos_id, start) + 1
            said[first:end] = [True] * (end - first)
    end = len(ids) - ids[::-1].index(chat.eos_id)  # what the template writes behind the last message is left out
    return ids[:end], said[:end]


# -- tokenizer and model -----------------------------------------------------------------------------------


def tokenizer_texts() -> list[str]:
    """Numbers up to 999 and everyday words, often enough to be one token each; the rest is from conversations."""
    listed = words.EVERYDAY + words.CAPITALS + words.UNUSED
    whole = [str(n) for n in range(1000)] + listed + [f" {word}" for word in listed if word.islower()]
    texts = [line for line in whole for _ in range(2000)]
    for i in range(5000):
        talk = draw_conversation(Random(f"tokenizer:{i}"))
        texts += [talk.opening.policy, *(tool["function"]["name"] for tool in talk.opening.tools)]
        texts += [m.content or call_text(m.calls[0]) for m in (*talk.opening.messages, *talk.messages)]
    return texts


@torch.no_grad()
def redraw(weight_VD: Tensor, chosen_V: Tensor, known_V: Tensor, generator: torch.Generator) -> None:
    """Draw the embeddings of the chosen tokens anew, in place, like those of the known ones: from the normal
    distribution with their mean and covariance (Hewitt 2021, "Initializing new word embeddings for
    pretrained language models")."""
    known = weight_VD[known_V]
    noise = torch.randn(int(chosen_V.sum()), len(known), generator=generator).to(known)
    weight_VD[chosen_V] = known.mean(0) + noise @ (known - known.mean(0)) / math.sqrt(len(known))


def three_digits(chat: Chat) -> Tensor:
    """(V,) True for the numbers of three digits, which are ids wherever they stand."""
    texts = chat.tokenizer.convert_ids_to_tokens(range(len(chat.tokenizer)))
    return torch.tensor([text.isascii() and text.isdigit() and len(text) == 3 for text in texts])


# -- training ----------------------------------------------------------------------------------------------


def loss_of(model: Qwen3, batch: tuple[Tensor, Tensor, Tensor], cfg: Pretrain) -> tuple[Tensor, Tensor]:
    """The training loss of a batch, and the mean over what the agent said: nats per token."""
    device = parallel.device()
    ids_T, said_T = batch[0].to(device).long(), batch[1].to(device)
    bounds = batch[2].tolist()
    positions_T = torch.cat([torch.arange(end - start) for start, end in pairwise(bounds)]).to(device)
    targets_N = positions_T.nonzero().squeeze(1)  # every token but the first of each conversation
    attend = packed_attention(bounds, device, dtype_on(device))
    logprobs_N, _ = model(ids_T, positions_T, attend, targets_N - 1, ids_T[targets_N])
    said_N = said_T[targets_N].float()
    weights_N = said_N + cfg.heard_weight * (1 - said_N)
    return -(weights_N * logprobs_N).sum() / weights_N.sum(), -(said_N * logprobs_N).detach().sum() / said_N.sum()


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def train(cfg: Pretrain, model: Qwen3, folder: Path, ids_V: Tensor) -> tuple[list[dict[str, float]], Tensor]:
    """Train `model` in place; the loss curve, and which tokens it met (V,).

    A model that sees the same ids for long learns each by heart and copies no other. So half of their
    embeddings (`ids_V` says which tokens they are) are drawn anew every now and then, in the first part of
    the training: what is left to learn is to copy (after Chen et al. 2023, "Improving language plasticity via
    pretraining with active forgetting").
    """
    device = parallel.device()
    model.to(device)
    model.dtype = dtype_on(device)
    parallel.shard(model, model.model.layers, model.dtype)
    optimizer = adamw(model, cfg)
    workers = cfg.workers or os.cpu_count() or 1
    batches = DataLoader(Batches(cfg, folder), batch_size=None, num_workers=workers, prefetch_factor=4)
    seen_V = torch.zeros(model.cfg.vocab_size, dtype=torch.bool)
    curve: list[dict[str, float]] = []
    generator = torch.Generator().manual_seed(cfg.seed)
    tokens, since, start = 0, [], time.perf_counter()
    for step, batch in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, step / (0.02 * cfg.steps)) * schedule(step / cfg.steps)
        loss, said = loss_of(model, batch, cfg)
        optimizer.zero_grad()
        parallel.backward(loss)
        parallel.clipped_step(model, optimizer, 1.0)
        seen_V[batch[0].long()] = True
        if cfg.forget_every and step % cfg.forget_every == 0 and step < FORGETTING * cfg.steps:
            half_V = ids_V & (torch.rand(len(ids_V), generator=generator) < 0.5)
            redraw(parallel.local(model.model.embed_tokens.weight), half_V, ids_V & seen_V, generator)
        tokens += len(batch[0])
        since.append(said)
        if step % max(1, cfg.steps // 40) == 0 or step == cfg.steps:
            mean = float(torch.stack(since).mean())
            seconds = time.perf_counter() - start
            curve.append({"step": step, "tokens": tokens, "loss": mean, "seconds": round(seconds, 1)})
            since = []
            bar = "#" * round(40 * mean / curve[0]["loss"])
            print(f"step {step:6}  {tokens / 1e6:7.1f} M tokens  {seconds:6.0f} s  loss {mean:.4f} {bar}", flush=True)
    return curve, seen_V


def schedule(part: float) -> float:
    """Cosine from 1 to 0.02."""
    return 0.02 + 0.98 * (1 + math.cos(math.pi * part)) / 2


# -- scores ------------------------------------------------------------------------------------------------


@torch.no_grad()
def scores(cfg: Pretrain, model: Qwen3, chat: Chat) -> dict[str, float]:
    """What the model does in domains, and with ids, that training never drew.

    loss: of what the agent says, nats per token. copied_ids: of the three-digit numbers in it, the share
    that is the most probable token there. calls, speech: of the agent's turns that call a tool, or
    speak, the share in which a greedy reply to the same conversation makes the same call, or speaks.
    """
    rng = Random("held out")
    talks = [draw_conversation(rng, held_out=True) for _ in range(cfg.scored)]
    packed = [encode(chat, talk) for talk in talks]
    ids_V = three_digits(chat)
    losses, copied = [], []
    for ids, said in packed:
        ids_T, said_T = torch.tensor(ids), torch.tensor(said)
        attend = packed_attention([0, len(ids)], "cpu", torch.float32)
        logits = model.logits(model.hidden(ids_T, torch.arange(len(ids)), attend))[:-1].log_softmax(-1)
        targets, mask = ids_T[1:], said_T[1:]
        losses += (-logits.gather(1, targets[:, None]).squeeze(1)[mask]).tolist()
        numbers = mask & ids_V[targets]
        copied += (logits.argmax(-1) == targets)[numbers].tolist()
    engine = LocalEngine(model, chat.stop_ids, slots=16, max_context=4096, patience=0.0)
    with ThreadPoolExecutor(16) as pool:
        turns = [turn for each in pool.map(lambda talk: greedy_turns(engine, chat, talk), talks) for turn in each]
    engine.close()
    calls = [right for kind, right in turns if kind == "call"]
    speech = [right for kind, right in turns if kind == "speech"]
    share = {"loss": losses, "copied_ids": copied, "calls": calls, "speech": speech}
    return {name: round(sum(values) / len(values), 4) for name, values in share.items()}


def greedy_turns(engine: LocalEngine, chat: Chat, talk: Conversation) -> list[tuple[str, bool]]:
    """For each of the agent's turns: whether it is a call or speech, and whether a greedy reply is right."""
    turns = []
    trajectory = to_trajectory(talk, chat)
    replies = [message for message in talk.messages if message.role == "assistant"]
    session = str(id(talk))
    for turn, message in zip(trajectory.turns, replies, strict=True):
        reply = engine.generate(trajectory.ids[: turn.start], Sampling(0.0, 96), session=session, seed=0)
        action = chat.parse(reply.ids, talk.opening.tools, cut=reply.finish == "length")
        right = action.calls == message.calls and not action.error
        turns.append(("call" if message.calls else "speech", right))
    return turns


def main(argv: list[str]) -> None:
    cfg = cli.parse(Pretrain, "python -m minitau.base.pretrain", "Pre-train the base model.", argv)
    tiny.check(cfg)
    if cfg.batch_tokens < MAX_TOKENS or cfg.steps < 1 or cfg.scored < 1 or cfg.workers < 0 or cfg.forget_every < 0:
        raise BadInput(f"--batch-tokens must be {MAX_TOKENS} or more, --steps and --scored 1, the others 0")
    folder = Path(cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    tiny.write_tokenizer(folder, tokenizer_texts(), cfg.vocab)
    chat = load_chat(folder, "native")
    model = tiny.random_model(cfg, len(chat.tokenizer), MAX_TOKENS)
    size = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.perf_counter() - start
    print(f"{size / 1e6:.2f} M parameters, {len(chat.tokenizer)} tokens; the tokenizer took {seconds:.0f} s")
    ids_V = three_digits(chat)
    curve, seen_V = train(cfg, model, folder, ids_V)
    weights = {name: weight.float().cpu() for name, weight in parallel.FullWeights(model)}
    for kind_V in (ids_V, ~ids_V):  # training only pushed the tokens that it never met away
        generator = torch.Generator().manual_seed(cfg.seed)
        redraw(weights["model.embed_tokens.weight"], kind_V & ~seen_V, kind_V & seen_V, generator)
    pretrained.save_model(folder, model.cfg, weights.items(), torch.bfloat16, folder)
    held_out = scores(cfg, pretrained.load_model(folder).requires_grad_(False), chat)
    print(f"held-out domains: {json.dumps(held_out)}")
    settings = {**dataclasses.asdict(cfg), "out": ""}
    write_json(folder / "pretraining.json", {"settings": settings, "curve": curve, "held_out": held_out})
    print(f"wrote {folder} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(run_script("minitau.base.pretrain", main, sys.argv[1:]))
