"""How long a 4B model's checkpoint takes to write and to read, how many bytes it has, and whether it comes back exact.

    torchrun --nproc_per_node 2 -m benchmarks.checkpoints --work DIR     # writes, forgets, reads
    python -m benchmarks.checkpoints --work DIR --read                   # reads on one GPU what two have written

Random fp32 weights and AdamW's moments after one step, through checkpoint.begin, wait_until_copied, finish and load as
they are. Both commands print one JSON object, and end with status 1 if something did not come back. What was written is
known by sums over the bits of every tensor, which are the same on any number of ranks; where it is read again on the
ranks that wrote it, also every bit is compared. With --engine-command "python -m sglang.launch_server" SGLang serves
the checkpoint's Hugging Face directory, and what it samples is looked at through the weights that were read: status 1
if they disagree by more than --max-drift allows in training.

`--shape tiny` runs the same on a CPU, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import train
from benchmarks.mfu import SHAPES, where
from benchmarks.random_run import free_everything, micro_batch, open_run, peak_gb, synchronize
from minitau import checkpoint, config, parallel, probe, run, tiny
from minitau.chat import load_chat
from minitau.engines.launch import open_sglang
from minitau.episode import BadInput
from minitau.script import run_script


def tensors(opened: SimpleNamespace) -> Iterator[tuple[str, Tensor]]:
    """(name, this rank's part) of each weight and each of its moments."""
    for name, parameter in opened.model.named_parameters():
        yield name, parallel.local(parameter)
        for moment in ("exp_avg", "exp_avg_sq"):
            yield f"{name} {moment}", parallel.local(opened.optimizer.state[parameter][moment])


def fingerprint(opened: SimpleNamespace) -> dict[str, list[int]]:
    """Of each tensor, whole: the sum of its elements' bits, and that sum with each row times its number, modulo 2^64.
    So a row that is missing, doubled or in another's place shows."""
    found, whole = {}, {name: parameter.shape for name, parameter in opened.model.named_parameters()}
    for name, part in tensors(opened):
        rows = -(-whole[name.split(" ")[0]][0] // parallel.world_size())
        bits = part.view(torch.int32).flatten(1).sum(1) if part.ndim > 1 else part.view(torch.int32).long()
        numbers = torch.arange(1, len(bits) + 1, device=bits.device) + parallel.rank() * rows
        found[name] = [int(bits.sum()), int((bits * numbers).sum())]
    ranks = parallel.gather(found)
    return {name: [wrapped(sum(each[name][i] for each in ranks)) for i in (0, 1)] for name in found}


def wrapped(number: int) -> int:
    """As int64 would have it."""
    return (number + 2**63) % 2**64 - 2**63


def timed(do: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until all ranks are done, and what this one got."""
    synchronize()
    parallel.barrier()
    start = time.perf_counter()
    found = do()
    synchronize()
    parallel.barrier()
    return time.perf_counter() - start, found


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write(opened: SimpleNamespace, cfg: config.SFT, folder: Path) -> dict[str, Any]:
    """Save, change everything, load."""
    state = {"fingerprint": fingerprint(opened)}
    how = {"dtype": getattr(torch, cfg.dtype), "tokenizer_dir": folder / "tokenizer", "keep": 1}
    beginning, _ = timed(lambda: checkpoint.begin(folder, 1, opened.model, opened.optimizer, state, **how))
    copying, _ = timed(checkpoint.wait_until_copied)
    finishing, place = timed(checkpoint.finish)
    kept = {name: part.clone() for name, part in tensors(opened)}
    for _, part in tensors(opened):
        part.add_(1.0)
    found = read(opened, folder)
    same = all(torch.equal(part.view(torch.int32), kept[name].view(torch.int32)) for name, part in tensors(opened))
    parts = {part: size_of(place / part) for part in ("state", "model")}
    seconds = {"begin_seconds": beginning, "copied_seconds": beginning + copying}
    seconds["save_seconds"] = seconds["copied_seconds"] + finishing
    return {**seconds, "bytes": parts, **found, "every_bit_is_back": all(parallel.gather(same))}


def read(opened: SimpleNamespace, folder: Path) -> dict[str, Any]:
    """Load, and look."""
    loading, state = timed(lambda: checkpoint.load(folder, opened.model, opened.optimizer))
    if state is None:
        raise BadInput(f"{folder} holds no checkpoint; the command without --read writes one")
    return {"load_seconds": loading, "sums_are_those_written": state["fingerprint"] == fingerprint(opened)}


def serve(opened: SimpleNamespace, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """By how many nats a token SGLang, with what it loads from the newest checkpoint's directory, and the weights that
    were read differ on what it samples: see probe.py."""
    model_dir = str(checkpoint.latest(folder) / "model")
    cfg = config.GRPO(
        model=model_dir,
        out=args.work,
        engine="sglang",
        engine_command=args.engine_command,
        dtype=args.dtype,
        max_tokens=4096,
    )
    chat = load_chat(model_dir, "native")
    engine = open_sglang(cfg, chat.stop_ids, takes_weights=False)
    try:
        return {"served_drift": probe.probe(engine, SimpleNamespace(model=opened.model, chat=chat), cfg, 0)}
    finally:
        engine.close()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="outputs/benchmark-checkpoints", help="folder for the checkpoint")
    parser.add_argument("--read", action="store_true", help="only read what is there")
    parser.add_argument("--engine-command", default="", help="SGLang, to serve what was read")
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args(argv)
    folder = Path(args.work)
    parallel.start()
    if parallel.is_main() and not args.read:
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        tiny.write_tokenizer(folder / "tokenizer", ["Hello there, how can I help you today? " * 9], 300)
    parallel.barrier()
    cfg = config.SFT(dtype=args.dtype, micro_batch_tokens=64, compile=False)
    opened = open_run(args, cfg)
    mb = micro_batch(opened.model.cfg, [64])
    run.update(opened, cfg, [mb], lambda mb: train.sft_loss(opened.model, mb, cfg.dtype), 1e-3)
    free_everything()
    result = {"shape": args.shape, **where()}
    result |= read(opened, folder) if args.read else write(opened, cfg, folder)
    result["peak_gb"] = peak_gb()
    if args.engine_command:
        result |= serve(opened, args, folder)
    parallel.stop()
    if parallel.is_main():
        print(json.dumps(result, indent=1))
    back = result["sums_are_those_written"] and result.get("every_bit_is_back", True)
    return int(not (back and result.get("served_drift", 0.0) <= config.GRPO.max_drift))


if __name__ == "__main__":
    sys.exit(run_script("benchmarks.checkpoints", main, sys.argv[1:]))
