"""What each part of a GRPO step on tau2-bench takes at a 4B model's shape: policy, customers and trainer on one set of
GPUs.

    python -m benchmarks.whole_step --ranks 2 --engine-command "python -m sglang.launch_server" --work DIR

makes a random Qwen3-4B, starts serve_user.py on them, runs `torchrun --nproc_per_node RANKS train.py --stage grpo
--preset tau2-4b` for a few steps of 16 tasks x 4 attempts, and prints one JSON object. Of each step: its seconds by
part, those of an episode by whom it waits for, the GPUs' memory, what the conversations were like, and what --dry-run
computes for such conversations. It is written to DIR/whole_step.json after every step. What follows `--` goes to
train.py. After the last step that was asked for the run is interrupted, without the checkpoint of the end; `--
--save-every 2` makes some before it, and benchmarks/checkpoints.py measures all that one takes.

The model knows nothing; what it says is noise of the right length. Its tokenizer is trained on tau2-bench and filled up
with pairs of its own tokens to the model's vocabulary, so that whatever is sampled is text, and the embedding of the
token that ends a reply is longer than others (`END`), so that replies end.

`--shape tiny --engine-command "env PYTHONPATH=. python tests/fake_sglang.py" --customers local` runs the same on a CPU,
to see that it works.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.flags import at_least
from benchmarks.mfu import SHAPES, where
from benchmarks.random_run import random_model
from minitau import cli, config, plan, pretrained, tiny
from minitau.budget import Case
from minitau.episode import BadInput, Trajectory
from minitau.files import whole_lines
from minitau.script import run_script

TOKENS = 4096  # that the tokenizer learns; the others are pairs of them
END = 7.0  # times as long as another token's is the embedding of the one that ends a reply: after 59 at 4B, on average
SCHEMAS = tiny.CHAT_TEMPLATE.replace('f.name + "(" + f.parameters.properties | join(", ") + ")"', "tool | tojson")


# -- a model that says something -----------------------------------------------------------------------------


def make_model(folder: Path, shape: str, domains: tuple[str, ...]) -> None:
    """Write a random Qwen3 of that shape, whose tokenizer has a text for every token."""
    cfg = tiny.Tiny(env="tau2", domains=domains, corpus_tasks=3)
    tokenizer = tiny.write_tokenizer(folder, tiny.world_texts(cfg), min(TOKENS, SHAPES[shape].vocab_size // 2))
    assert SCHEMAS != tiny.CHAT_TEMPLATE
    tokenizer.chat_template = SCHEMAS  # as long as a real one makes it
    tokenizer.save_pretrained(folder)
    fill(folder / "tokenizer.json", SHAPES[shape].vocab_size)
    model = random_model(SHAPES[shape])
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.eos_token_id] *= END
    pretrained.save_model(folder, model.cfg, model.named_parameters(), torch.bfloat16, folder)


def fill(path: Path, size: int) -> None:
    """Add merges of two words to a tokenizer's file until it has `size` tokens."""
    row = json.loads(path.read_text())
    vocab, merges = row["model"]["vocab"], row["model"]["merges"]
    taken = {*vocab, *(each["content"] for each in row["added_tokens"])}
    free = iter(range(len(taken), size))
    words = [word for word in vocab if word.isascii() and word.isalpha() and word.islower()]
    for first, second in itertools.product(words, repeat=2):
        if first + second not in taken:
            number = next(free, None)
            if number is None:
                break
            vocab[first + second] = number
            merges.append([first, second])
            taken.add(first + second)
    assert len(taken) == size, f"{len(words)} words make {len(taken)} tokens only"
    path.write_text(json.dumps(row))


# -- what is run -----------------------------------------------------------------------------------------------


@contextmanager
def customers(args: argparse.Namespace, model: Path) -> Iterator[str]:
    """serve_user.py on the GPUs, unless it runs already; the address of its endpoint."""
    if args.user_api_base:
        yield args.user_api_base
        return
    command = [sys.executable, "serve_user.py", "--model", str(model), "--port", "0", "--engine", args.customers]
    if args.customers == "sglang":
        gpus = args.customer_gpus or ",".join(map(str, range(args.ranks)))
        command += ["--gpus", gpus, "--mem-fraction", str(args.user_mem), "--engine-command", args.engine_command]
        command += ["--log", f"{args.work}/customers.log"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if found := re.search(r"TAU2_USER_API_BASE=(\S+)", line):
                yield found[1]
                return
        raise BadInput(f"serve_user.py ended with status {process.wait()}; its last words are above")
    finally:
        process.terminate()
        process.wait()


def train(
    args: argparse.Namespace, model: Path, out: Path, address: str, more: list[str]
) -> Iterator[dict[str, float]]:
    """Run GRPO; after each step the most memory that was in use meanwhile: see memory_in_use."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.ranks)]
    command = [sys.executable, *ranks, "train.py", *grpo_flags(args, model, out), *more]
    command += ["--user-model", "openai/minitau-user", "--user-api-base", address]
    process = subprocess.Popen(command)
    try:
        for step in range(1, args.steps + 1):
            most: dict[str, float] = {}
            while not done(out, step):
                if process.poll() is not None:
                    raise BadInput(f"train.py ended with status {process.returncode}; its last words are above")
                for gpu, used in memory_in_use().items():
                    most[gpu] = max(used, most.get(gpu, 0.0))
                time.sleep(0.5)
            yield most
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def done(out: Path, step: int) -> bool:
    """Whether all is written of a step: its line, and after it every episode."""
    lines = whole_lines(out / "metrics.jsonl")
    return len(lines) >= step and len(episodes(out, step)) == json.loads(lines[step - 1])["episodes"]


def episodes(out: Path, step: int) -> list[str]:
    return whole_lines(out / "trajectories" / f"step-{step:06d}.jsonl")


def grpo_flags(args: argparse.Namespace, model: Path, out: Path) -> list[str]:
    flags = f"--stage grpo --preset tau2-4b --model {model} --out {out} --steps {args.steps + 1}"
    flags += (
        f" --max-steps {args.messages} --tasks-per-step {args.tasks} --group-size 4 --no-dynamic-sampling --no-screen"
    )
    flags += " --max-new-tokens 512 --user-max-tokens 256"  # noise at times finds no end; real replies are shorter
    return [*flags.split(), "--engine-command", args.engine_command]


def memory_in_use() -> dict[str, float]:
    """GB by GPU, and of all GPUs by program; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    found = {gpu: mib * (1 << 20) / 1e9 for gpu, mib in ask_driver("--query-gpu=index,memory.used")}
    for pid, mib in ask_driver("--query-compute-apps=pid,used_memory"):
        words = Path(f"/proc/{pid}/cmdline")
        program = "train.py" if words.is_file() and "train.py" in words.read_text(errors="replace") else "others"
        found[program] = found.get(program, 0.0) + mib * (1 << 20) / 1e9
    return found


def ask_driver(query: str) -> Iterator[tuple[str, float]]:
    """Pairs that nvidia-smi answers; one whose number it does not know is left out."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        name, number = line.split(", ")
        if number.isdecimal():
            yield name, float(number)


# -- what came of it ----------------------------------------------------------------------------------------------


def report(args: argparse.Namespace, model: Path, out: Path, step: int, more: list[str]) -> dict[str, Any]:
    """What a step took, beside what it would by --dry-run."""
    line = json.loads(whole_lines(out / "metrics.jsonl")[step - 1])
    shown = ("seconds", "share", "episode_seconds", "tokens", "tokens_said", "stops", "drift", "sync_drift")
    told = conversations(out, step)
    return {
        **{name: line.get(name) for name in shown},
        "cache_tokens": cache_tokens(out),
        "conversations": told,
        "computed": computed(args, model, out, told, more),
    }


def conversations(out: Path, step: int) -> dict[str, Any]:
    """Means over the episodes of a step, as --dry-run asks for them; quartiles of their seconds, and the longest."""
    played = [Trajectory.from_json(json.loads(line)["trajectory"]) for line in episodes(out, step)]
    played = [t for t in played if t.turns]
    said, turns = sum(sum(t.said) for t in played), sum(len(t.turns) for t in played)
    opening = statistics.fmean(t.turns[0].start for t in played)
    whole = statistics.fmean(len(t.ids) for t in played)
    return {
        "opening_tokens": opening,
        "turns": turns / len(played),
        "said_tokens": said / turns,
        "heard_tokens": ((whole - opening) * len(played) - said) / turns,
        "user_seconds": sum(t.seconds["user"] for t in played) / turns,
        "tokens": whole,
        "seconds": statistics.quantiles((sum(t.seconds.values()) for t in played), n=4, method="inclusive"),
        "longest_seconds": max(sum(t.seconds.values()) for t in played),
    }


def cache_tokens(out: Path) -> list[int]:
    """What each engine's cache holds, as its log says."""
    logs = (path.read_text(errors="replace") for path in sorted(out.glob("engine-*.log")))
    return [int(found[-1]) for log in logs if (found := re.findall(r"max_total_num_tokens=(\d+)", log))]


def computed(args: argparse.Namespace, model: Path, out: Path, told: dict[str, Any], more: list[str]) -> dict[str, Any]:
    """Seconds by part, as --dry-run has them for such conversations."""
    stage, cfg, _ = cli.parse_stage([*grpo_flags(args, model, out), *more])
    numbers = {name: round(told[name]) for name in ("opening_tokens", "turns", "said_tokens", "heard_tokens")}
    dry = config.DryRun(
        gpus=args.ranks, gpu=args.gpu, user_mem=args.user_mem, user_seconds=told["user_seconds"], **numbers
    )
    parts = plan.step_parts(Case(stage, cfg, pretrained.read_config(model), dry))
    return {part.name: part.amount for part in parts}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-command", default="")
    parser.add_argument("--ranks", type=at_least(1), default=2, help="GPUs")
    parser.add_argument("--gpu", default="h200", help="their kind, as --dry-run has it")
    parser.add_argument("--user-mem", type=float, default=0.3, help="as serve_user.py's --mem-fraction")
    parser.add_argument("--customer-gpus", default="", help="as serve_user.py's --gpus; all of them if empty")
    parser.add_argument("--user-api-base", default="", help="of customers who are served already")
    parser.add_argument("--customers", choices=("sglang", "local"), default="sglang")
    parser.add_argument("--steps", type=at_least(1), default=3)
    parser.add_argument("--tasks", type=at_least(1), default=16, help="of a step, four attempts each")
    parser.add_argument("--messages", type=at_least(1), default=100, help="of a conversation: --max-steps")
    parser.add_argument("--work", default="outputs/benchmark-whole-step")
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    own, more = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    work = Path(args.work).resolve()
    model, out = work / f"model-{args.shape}", work / "run"
    if out.exists():
        raise BadInput(f"{out} is another run's, whose steps would be taken for this one's; choose another --work")
    start = time.perf_counter()
    result: dict[str, Any] = {"shape": args.shape, **where(), "ranks": args.ranks}
    if not (model / "config.json").is_file():
        make_model(model, args.shape, config.ENV_DEFAULTS["tau2"]["domains"])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    result["model_seconds"] = time.perf_counter() - start
    with customers(args, model) as address:
        result["until_customers_seconds"] = time.perf_counter() - start
        steps = result["steps"] = []
        for step, memory in enumerate(train(args, model, out, address, more), 1):
            steps.append({**report(args, model, out, step, more), "memory_gb": memory})
            result["seconds"] = time.perf_counter() - start
            (work / "whole_step.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(run_script("benchmarks.whole_step", main, sys.argv[1:]))
