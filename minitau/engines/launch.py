"""How SGLang's servers are started: which ranks have one, on which GPU, and with which flags."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from minitau import parallel
from minitau.checkpoint import read_config
from minitau.engines.server import HOST, Server
from minitau.engines.sglang import SGLangEngine
from minitau.episode import BadInput

CONTEXT_SLACK = 8  # tokens beyond our own limit, so that the server's never cuts a reply
# A tiny model's config may name fewer positions than it is asked for; RoPE has no such limit.
ENVIRONMENT = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
# Both ends of a broadcast must have NCCL in the same mode: SGLang changes these where they are not set, and what is
# given here is what NCCL does by itself in the trainer.
NCCL_MODE = {"NCCL_CUMEM_ENABLE": "-2", "NCCL_NVLS_ENABLE": "2"}


def open_sglang(cfg: Any, stop_ids: Iterable[int], takes_weights: bool) -> SGLangEngine:
    """The engine of this rank, as `cfg` (config.Episodes, with `model`, `dtype` and `out`) says.

    Without takes_weights the server samples from the model in cfg.model. Raises EngineError, and what check does.
    """
    check(cfg, takes_weights)
    urls, server = cfg.engine_url, None
    host = host_of_rank(cfg.engine_gpus, takes_weights) if cfg.engine_gpus else None
    if not urls and host in (None, parallel.rank()):
        server = Server(
            lambda port: launch_command(cfg, port, takes_weights),
            Path(cfg.out) / f"engine-{parallel.rank()}.log",
            f"SGLang of rank {parallel.rank()}",
            environment=ENVIRONMENT | ({} if host is None else {k: os.environ.get(k, v) for k, v in NCCL_MODE.items()}),
        )
    engine = SGLangEngine(
        server,
        stop_ids,
        url=urls[parallel.rank() % len(urls)] if urls else "",
        host=host,
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
    host = host_of_rank(cfg.engine_gpus, takes_weights) if cfg.engine_gpus else None
    if not cfg.engine_url and host in (None, parallel.rank()):
        launch_command(cfg, 0, takes_weights)


def host_of_rank(gpus: Sequence[str], takes_weights: bool) -> int:
    """The rank whose server this rank asks: server i is of rank i, on GPU number i of `gpus`, and rank r asks server
    r modulo their number. Raises BadInput for GPUs that are not free for them."""
    ranks = parallel.world_size()
    mine = {str(rank) for rank in range(ranks)} & set(gpus) if takes_weights else set()
    if mine:
        raise BadInput(
            f"--engine-gpus {','.join(gpus)}: GPUs 0 to {ranks - 1} are for the {ranks} ranks that train; name others"
        )
    if len(gpus) > ranks or (len(gpus) < ranks and not takes_weights):
        raise BadInput(
            f"--engine-gpus names {len(gpus)} GPUs for {ranks} ranks: a server on each GPU, and for each rank one "
            f"server, which ranks that train may share"
        )
    if parallel.device().type == "cuda" and (beyond := [gpu for gpu in gpus if int(gpu) >= torch.cuda.device_count()]):
        raise BadInput(f"--engine-gpus: there is no GPU {beyond[0]} among the {torch.cuda.device_count()} visible ones")
    return parallel.rank() % len(gpus)


def launch_command(cfg: Any, port: int, takes_weights: bool) -> list[str]:
    """How this rank's server is started on `port`. Raises BadInput if SGLang is not installed."""
    guests = -(-parallel.world_size() // len(cfg.engine_gpus)) if cfg.engine_gpus else 1
    flags = {
        "--model-path": cfg.model,
        "--host": HOST,
        "--port": port,
        "--base-gpu-id": cfg.engine_gpus[parallel.rank()] if cfg.engine_gpus else parallel.device().index or 0,
        "--dtype": cfg.dtype,
        "--context-length": cfg.max_tokens + CONTEXT_SLACK,
        "--mem-fraction-static": cfg.engine_mem,
        "--max-running-requests": cfg.concurrency * guests,
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
