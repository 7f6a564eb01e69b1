"""What samples from the policy. Each engine is one file here and fits episode.Engine."""

from __future__ import annotations

from typing import Any

import torch

from minitau import parallel
from minitau.engines import launch
from minitau.engines.local import LocalEngine
from minitau.engines.rounded import RoundedEngine
from minitau.episode import Engine
from minitau.model import Qwen3


def check_engine(cfg: Any, takes_weights: bool = True) -> None:
    """Raise BadInput for an engine that cannot be had here, before anything is claimed or loaded."""
    if cfg.engine == "sglang":
        launch.check(cfg, takes_weights)


def open_engine(cfg: Any, model: Qwen3 | None, stop_ids: frozenset[int], round_bits: int = 0) -> Engine:
    """The engine that `cfg.engine` names. It holds no weights of use before its first sync, unless it reads the plain
    (unsharded) model's own, if they are of the dtype that it computes in, or is an SGLang server without a `model`:
    then those in cfg.model.

    round_bits: to how many bits a local engine rounds its weights; 0 leaves them."""
    if cfg.engine == "sglang":
        return launch.open_sglang(cfg, stop_ids, takes_weights=model is not None)
    if round_bits or parallel.is_sharded(model) or model.dtype not in (None, model.head_weight.dtype):
        dtype = getattr(torch, cfg.dtype)
        with torch.device("meta"):
            whole = Qwen3(model.cfg)
        model = whole.to_empty(device=parallel.device()).to(dtype).requires_grad_(False)
    sizes = {"slots": cfg.concurrency, "max_context": cfg.max_tokens + 1, "patience": cfg.patience}
    if round_bits:
        return RoundedEngine(model, stop_ids, bits=round_bits, **sizes)
    return LocalEngine(model, stop_ids, **sizes)
