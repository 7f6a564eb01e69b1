"""Weights go to the engine, and are seen to have arrived: `sync`.

A tensor that is missing, stale or mixed up on a server raises no error; it samples plausible text from another
policy. So after each sync of an engine that lives in another process both sides say how likely they find what it
samples from a few fixed prompts. Rounding in bf16 makes a difference of some 0.01 nats a token, a wrong tensor more.
"""

from __future__ import annotations

import itertools

import torch

from minitau import batch, config, parallel
from minitau.episode import Engine, EngineError, Message, Opening, Sampling, Task, Trajectory
from minitau.rollout import in_threads, seed_number
from minitau.run import Run, forward

ASKED = (  # any text does; it should lead to many kinds of tokens
    "Hello! Who are you, and what can you do for me?",
    "Count from one to thirty, then say the alphabet backwards.",
    "My order 1048 came broken. I want my money back, and I want it today.",
    "Write a short JSON object that describes a customer with a name, a city and two orders.",
)
SAMPLED = 64  # tokens at most from each prompt
PROBES = itertools.count()  # all ranks probe together, so that they count alike


def sync(engine: Engine, run: Run, cfg: config.RFT | config.GRPO, version: int) -> dict[str, float]:
    """Hand the model's weights to the engine and measure what `sync_drift` says, if it is another process:
    mean |engine's - trainer's log-probability| over sampled tokens, in nats, of the rank where it is largest.

    Raises EngineError if that is more than cfg.max_drift.
    """
    engine.sync(parallel.FullWeights(run.model, getattr(torch, cfg.dtype)), version)
    if cfg.engine == "local":
        return {}
    drifts = parallel.gather(probe(engine, run, cfg, version))
    for rank, drift in enumerate(drifts):
        if not drift <= cfg.max_drift:  # so that NaN is caught too
            raise EngineError(
                f"after the sync of weights {version} engine and trainer of rank {rank} differ by {drift:.3g} nats a "
                f"token: the engine samples from other weights, or in another precision. If you know that it is "
                f"precision, go on with a larger --max-drift ({cfg.max_drift:g}) and --resume"
            )
    return {"sync_drift": max(drifts)}


@torch.no_grad()
def probe(engine: Engine, run: Run, cfg: config.RFT | config.GRPO, version: int) -> float:
    """Mean |engine's - trainer's log-probability| over what this rank's engine samples from ASKED."""
    mb = sampled(engine, run, version)
    logprobs_N, _ = forward(run.model, mb, 1.0, cfg.dtype)
    return float((logprobs_N - mb.rollout_N).abs().mean())


def sampled(engine: Engine, run: Run, version: int) -> batch.MicroBatch:
    """What this rank's engine says to ASKED."""
    asked = [Trajectory(Task("probe", "", str(i)), i) for i in range(len(ASKED))]
    name = f"probe:{next(PROBES)}"

    def sample(i: int) -> None:
        asked[i].hear(run.chat.open(Opening("You help customers.", (), (Message("user", ASKED[i]),))))
        session = f"{name}:{version}:{i}"
        asked[i].say(engine.generate(asked[i].ids, Sampling(1.0, SAMPLED), session=session, seed=seed_number(session)))

    in_threads(sample, parallel.SharedQueue(name, len(ASKED), each_rank=True), len(ASKED), engine)
    return batch.pack([batch.Sample(t) for t in asked], parallel.device())
