"""How SGLang's servers are started: which ranks have one, on which GPU, and with which flags."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from minitau import parallel
from minitau.engines.server import HOST, Server
from minitau.engines.sglang import SGLangEngine
from minitau.episode import BadInput
from minitau.model import ModelConfig
from minitau.pretrained import read_config

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
    host, own_gpus = host_of_rank(cfg, takes_weights), bool(cfg.engine_gpus)
    if not own_gpus:
        torch.cuda.empty_cache()  # of whole weights that have been sharded: a server takes its part of what is free
    if host is not None and not own_gpus:
        parallel.barrier()  # what all its ranks load is loaded: it shares the GPUs of all
    if not urls and host in (None, parallel.rank()):
        server = Server(
            lambda port: launch_command(cfg, port, takes_weights),
            Path(cfg.out) / f"engine-{parallel.rank()}.log",
            f"SGLang of rank {parallel.rank()}",
            environment=ENVIRONMENT | ({k: os.environ.get(k, v) for k, v in NCCL_MODE.items()} if own_gpus else {}),
        )
    engine = SGLangEngine(
        server,
        stop_ids,
        url=urls[parallel.rank() % len(urls)] if urls else "",
        host=host,
        tp=cfg.engine_tp,
        own_gpus=own_gpus,
        vocab_size=read_config(cfg.model).vocab_size,
        max_context=cfg.max_tokens + 1,
        dtype=getattr(torch, cfg.dtype),
        timeout=cfg.engine_timeout,
        takes_weights=takes_weights,
        sleeps=getattr(cfg, "engine_sleep", False),
    )
    if urls and not takes_weights:
        if parallel.rank() < len(urls):
            engine.load(cfg.model)
        engine.loaded = parallel.gather(engine.loaded)[parallel.rank() % len(urls)]  # some ranks may share a server
    elif not takes_weights and host is not None:
        engine.hand_over(0)
    return engine


def check(cfg: Any, takes_weights: bool) -> None:
    """Raise BadInput for settings with which no server can be had. Costs nothing: ask before a folder is claimed."""
    if parallel.device().type == "cuda" and cfg.dtype == "float32":
        raise BadInput("SGLang's CUDA kernels compute in half precision only: --engine sglang needs --dtype bfloat16")
    if bad := [url for url in cfg.engine_url if not is_address(url)]:
        raise BadInput(f"--engine-url {bad[0]}: http://HOST:PORT is needed")
    urls, ranks = len(cfg.engine_url), parallel.world_size()
    if urls and (urls != ranks if takes_weights else urls > ranks):
        need = "each rank needs its own" if takes_weights else "a rank asks one"
        raise BadInput(f"--engine-url names {urls} servers for {ranks} ranks; {need}")
    if cfg.engine_tp > 1:
        check_tp(cfg.engine_tp, 0 if cfg.engine_gpus else parallel.world_size(), read_config(cfg.model))
    if not cfg.engine_url and host_of_rank(cfg, takes_weights) in (None, parallel.rank()):
        launch_command(cfg, 0, takes_weights)


def is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")  # as a connection will have it
        return parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def check_tp(tp: int, ranks: int, shape: ModelConfig) -> None:
    """Raise BadInput if so many ranks are no groups of `tp`, or the model cannot be cut into `tp` equal parts."""
    if ranks % tp:
        raise BadInput(f"--engine-tp {tp}: {ranks} ranks cannot form groups of {tp}, each with a server on its GPUs")
    parts = {"key/value heads": shape.num_key_value_heads, "columns of an MLP": shape.intermediate_size}
    for what, count in parts.items():
        if count % tp:
            raise BadInput(f"--engine-tp {tp} does not divide the {count} {what} of the model")


def gpu_groups(gpus: Sequence[str], tp: int) -> list[list[int]]:
    """The GPUs of each server. Raises BadInput if they are not `tp` that follow each other, as SGLang takes them."""
    groups = [[int(gpu) for gpu in gpus[i : i + tp]] for i in range(0, len(gpus), tp)]
    if any(group != list(range(group[0], group[0] + tp)) for group in groups):
        raise BadInput(
            f"--engine-gpus {','.join(gpus)}: each server needs --engine-tp {tp} GPUs that follow each other"
        )
    return groups


def host_of_rank(cfg: Any, takes_weights: bool) -> int | None:
    """The rank whose server this rank asks; None if each has its own.

    Every --engine-tp ranks that follow each other ask the first one's. With --engine-gpus server i is of rank i, on
    as many of those GPUs, and rank r asks server r modulo their number. Raises BadInput for GPUs that are not free.
    """
    if not cfg.engine_gpus:
        return parallel.rank() // cfg.engine_tp * cfg.engine_tp if cfg.engine_tp > 1 else None
    gpus, tp, ranks = cfg.engine_gpus, cfg.engine_tp, parallel.world_size()
    if takes_weights and set(range(ranks)) & set(map(int, gpus)):
        raise BadInput(
            f"--engine-gpus {','.join(gpus)}: GPUs 0 to {ranks - 1} are for the {ranks} ranks that train; name others"
        )
    groups = gpu_groups(gpus, tp)
    if len(groups) > ranks or (len(groups) < ranks and not takes_weights):
        on = "each GPU" if tp == 1 else f"every {tp}"
        raise BadInput(
            f"--engine-gpus names {len(gpus)} GPUs for {ranks} ranks: a server on {on}, and for each rank one server, "
            f"which ranks that train may share"
        )
    if parallel.device().type == "cuda" and (beyond := [gpu for gpu in gpus if int(gpu) >= torch.cuda.device_count()]):
        raise BadInput(f"--engine-gpus: there is no GPU {beyond[0]} among the {torch.cuda.device_count()} visible ones")
    return parallel.rank() % len(groups)


def launch_command(cfg: Any, port: int, takes_weights: bool) -> list[str]:
    """How this rank's server is started on `port`. Raises BadInput if SGLang is not installed."""
    tp, gpus = cfg.engine_tp, cfg.engine_gpus
    askers = -(-parallel.world_size() // (len(gpus) // tp)) if gpus else tp  # ranks
    flags = {
        "--model-path": cfg.model,
        "--host": HOST,
        "--port": port,
        "--base-gpu-id": gpus[parallel.rank() * tp] if gpus else parallel.device().index or 0,
        "--dtype": cfg.dtype,
        "--context-length": cfg.max_tokens + CONTEXT_SLACK,
        "--mem-fraction-static": cfg.engine_mem,
        "--max-running-requests": cfg.concurrency * askers,
        "--random-seed": cfg.seed + parallel.rank(),
    }
    if tp > 1:
        flags["--tp-size"] = tp
    if takes_weights:
        flags["--load-format"] = "dummy"  # they are sent anyway
    switches = ["--skip-tokenizer-init", "--skip-server-warmup"]
    if getattr(cfg, "engine_sleep", False):
        switches.append("--enable-memory-saver")
    return command_line(cfg.engine_command, flags, switches)


def command_line(start: str, flags: dict[str, Any], switches: Sequence[str]) -> list[str]:
    """`start`, or this Python's SGLang, with those of the flags that `start` does not hold already.

    Raises BadInput if SGLang is not installed, and for an address of its own.
    """
    if not start and importlib.util.find_spec("sglang") is None:
        raise BadInput(
            "SGLang is not installed: pip install -r requirements-gpu.txt, say with --engine-command how it is started "
            "(PYTHON -m sglang.launch_server), or take --engine local"
        )
    try:
        words = shlex.split(start) or [sys.executable, "-m", "sglang.launch_server"]
    except ValueError as error:
        raise BadInput(f"--engine-command {start!r}: {str(error).lower()}; it must be a command of a shell") from None
    theirs = {word.partition("=")[0] for word in words}
    if taken := theirs & {"--host", "--port"} & flags.keys():
        raise BadInput(f"--engine-command names {min(taken)}, which is chosen here: servers listen on loopback only")
    ours = [(flag, str(value)) for flag, value in flags.items() if flag not in theirs]
    return [*words, *(word for pair in ours for word in pair), *(each for each in switches if each not in theirs)]
