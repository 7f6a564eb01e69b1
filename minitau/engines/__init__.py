"""What samples from the policy. Each engine is one file here and fits episode.Engine."""

from __future__ import annotations

from typing import Any

import torch

from minitau import parallel
from minitau.engines.launch import open_sglang
from minitau.engines.local import LocalEngine
from minitau.episode import Engine
from minitau.model import Qwen3


def open_engine(cfg: Any, model: Qwen3 | None, stop_ids: frozenset[int]) -> Engine:
    """The engine that `cfg.engine` names. It holds no weights of use before its first sync, unless it reads
    the plain (unsharded) model's own, or is an SGLang server without a `model`: then those in cfg.model."""
    if cfg.engine == "sglang":
        return open_sglang(cfg, stop_ids, takes_weights=model is not None)
    if parallel.is_sharded(model):
        dtype = getattr(torch, cfg.dtype)
        with torch.device("meta"):
            whole = Qwen3(model.cfg)
        model = whole.to_empty(device=parallel.device()).to(dtype).requires_grad_(False)
    return LocalEngine(model, stop_ids, slots=cfg.concurrency, max_context=cfg.max_tokens + 1, patience=cfg.patience)
