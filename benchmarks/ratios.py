"""How many times as fast as others the trainer is, and what more GPUs bring: all of it in one go, in turn.

    python -m benchmarks.ratios --rounds 2 --ranks 2

runs benchmarks/trainer.py (speed) on one GPU and on --ranks, and benchmarks/peers.py for each peer, one after the
other, each in a process of its own, and that as often as asked: the same shape, tokens, GPU and run. Prints one JSON
object: tokens/s, MFU and peak memory of each by round, and of each round the ratios; how busy the host's cores were
before it, because a peer whose kernels are started one by one suffers more from that. What is measured shows on stderr
at once, so that a run cut short has not been for nothing.

`--shape tiny --attention sdpa --peers transformers` runs on a CPU, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.flags import among, at_least
from benchmarks.mfu import SHAPES, where
from benchmarks.peers import TRAIN
from benchmarks.random_run import lengths_of
from minitau.episode import BadInput
from minitau.script import run_script

Speed = dict[str, float]  # tokens_per_second, mfu, peak_gb
OURS = {"auto": "recompute auto", "all": "recompute all"}  # how blocks are recomputed: as the trainer's report has it


def output_of(command: Sequence[str], gpus: str | None = None) -> str:
    """What a benchmark prints that sees these GPUs, or all. Raises BadInput with its last words if it fails."""
    seen = os.environ | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=seen)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        raise BadInput(f"{' '.join(command)} ended with status {done.returncode}: {words[-1] if words else 'no word'}")
    return done.stdout


def ours(args: argparse.Namespace, ranks: int) -> dict[str, Speed]:
    """The speed of all ranks together (peak_gb: of one), by how many blocks are recomputed."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speed.json"
        what = ["-m", "benchmarks.trainer", "--parts", "speed", "--shape", args.shape, "--steps", str(args.steps)]
        output_of([*start, *what, "--out", str(out)])
        found = json.loads(out.read_text())["speed"]
    return {name: speed_of(found[setting]) for name, setting in OURS.items()}


def speed_of(row: dict[str, Any]) -> Speed:
    """What a benchmark's row says of it; no memory where there is no GPU."""
    return {name: row[name] for name in ("tokens_per_second", "mfu", "peak_gb") if name in row}


def shown(who: str, speed: Any) -> Any:
    """The same, once it stands on stderr."""
    print(f"{who}: {json.dumps(speed)}", file=sys.stderr, flush=True)
    return speed


def theirs(args: argparse.Namespace, peer: str) -> Speed:
    """The speed of a peer, which sees one GPU: transformers' Trainer would take all for one process."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["-m", "benchmarks.peers", "--which", peer, "--shape", args.shape, "--attention", args.attention]
    command += ["--lengths", ",".join(map(str, lengths_of(args))), "--steps", str(args.steps + 2)]
    row = json.loads(output_of([*command, *(["--liger"] if args.liger else [])], first).splitlines()[-1])
    if "tokens_per_second" not in row:
        raise BadInput(f"{peer}: {row.get('out_of_memory', 'it took no step')}")
    return speed_of(row)


def play_round(args: argparse.Namespace) -> dict[str, Any]:
    """Everybody once, and how they compare."""
    load = os.getloadavg()[0]
    one = shown("minitau", ours(args, 1))
    speeds: dict[str, Any] = {"minitau": one}
    ratios: dict[str, float] = {}

    def compare(name: str, speed: Speed, to: Speed, times: int = 1) -> None:
        ratios[name] = speed["tokens_per_second"] / to["tokens_per_second"] / times

    for peer in args.peers:
        speeds[peer] = shown(peer, theirs(args, peer))
        for name, speed in one.items():
            compare(f"recompute {name} / {peer}", speed, speeds[peer])
    if args.ranks > 1:
        together = f"minitau on {args.ranks} GPUs"
        speeds[together] = shown(together, ours(args, args.ranks))
        for name, speed in one.items():
            name_of_both = f"recompute {name} on {args.ranks} GPUs / {args.ranks} x one"
            compare(name_of_both, speeds[together][name], speed, args.ranks)
    return {"busy_cores": load, "speeds": speeds, "ratios": ratios}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=among(TRAIN), default=list(TRAIN), help="comma-separated")
    parser.add_argument("--liger", action="store_true", help="peers with Liger's kernels")
    parser.add_argument("--attention", default="flash_attention_4", help="the peers': what transformers calls it")
    parser.add_argument("--ranks", type=at_least(1), default=1, help="GPUs to compare one with; 1 leaves that out")
    parser.add_argument("--rounds", type=at_least(1), default=2)
    parser.add_argument("--steps", type=at_least(1), default=5, help="timed steps of each")
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"shape": args.shape, **where(), "cores": os.cpu_count(), "liger": args.liger}
    rounds = result["rounds"] = [play_round(args) for _ in range(args.rounds)]
    result["ratios"] = {
        name: statistics.median(each["ratios"][name] for each in rounds) for name in rounds[0]["ratios"]
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(run_script("benchmarks.ratios", main, sys.argv[1:]))
