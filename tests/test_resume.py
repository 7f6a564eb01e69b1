"""kill -9 at any moment, then --resume: what follows equals the run that was never interrupted, bit for bit.

Real processes are killed, at a moment that is drawn anew each time. All three stages are tried with
the tiny random model; its rewards are all 0, so that in GRPO entropy and KL alone move the weights.
"""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import warm

from minitau import pretrained, sft
from minitau.files import whole_lines

# Flags of each stage, and how many lines of metrics it writes.
EPISODES = "--max-new-tokens 16 --max-turns 3 --max-tokens 1024"
STAGES = {
    "sft": ("--epochs 3 --batch-size 4 --lr 1e-3 --save-every 2", 9),
    "rft": (
        # Three rounds, and a step an epoch however many of the six tasks have a reply that can be imitated.
        "--tasks 6 --samples 2 --round-tasks 2 --min-partial 0 --epochs 6 --batch-size 6 --lr 1e-3 "
        f"--save-every 2 {EPISODES}",
        9,
    ),
    "grpo": (
        "--steps 4 --tasks 6 --tasks-per-step 3 --group-size 2 --no-dynamic-sampling --no-screen --lr 1e-3 "
        f"--save-every 2 --updates-per-step 2 {EPISODES}",
        4,
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "demonstrations.jsonl"
    sft.main(["--tasks", "12", "--out", str(path)])
    return path


def start(stage: str, model: Path, data: Path, out: Path) -> warm.Script:
    flags = f"--stage {stage} --model {model} --out {out} --resume {STAGES[stage][0]}"
    if stage == "sft":
        flags += f" --data {data}"
    with open(f"{out}.err", "w") as said:
        return warm.Script("train.py", *flags.split(), stderr=said)


def finish(process: warm.Script, out: Path) -> None:
    assert process.wait(120) == 0, Path(f"{out}.err").read_text()[-2000:]


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without the clock's readings."""
    lines = [json.loads(line) for line in whole_lines(out / "metrics.jsonl")]
    clock = ("seconds", "share", "episode_seconds")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


@pytest.mark.parametrize("stage", STAGES)
def test_kill_and_resume(stage, tiny_dir, data, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(stage, tiny_dir, data, whole), whole)
    process = start(stage, tiny_dir, data, broken)
    # Wait for a line, so that there is something to lose, then for a moment that nobody chose.
    lines, moment = random.randint(1, STAGES[stage][1] - 1), random.random()
    deadline = time.time() + 120
    while len(whole_lines(broken / "metrics.jsonl")) < lines and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    time.sleep(0.5 * moment)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    logged = len(metrics(broken))
    finish(start(stage, tiny_dir, data, broken), broken)
    where = f"killed after {lines} lines and {0.5 * moment:.3f} s, when {logged} were logged"
    assert len(metrics(whole)) == STAGES[stage][1]
    assert metrics(broken) == metrics(whole), where
    ours, theirs = (dict(pretrained.read_safetensors(out / "model")) for out in (broken, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), where
    start_weights = dict(pretrained.read_safetensors(tiny_dir))
    assert any(not torch.equal(ours[name], start_weights[name]) for name in ours), "the run trained nothing"


SLOW_DISK = """
import os, signal, sys, threading, time, train
from minitau import checkpoint, rollout, script
write, collect, events = checkpoint.write, rollout.collect, []
def slow(run_dir, step, fill, keep):
    time.sleep(3)
    place = write(run_dir, step, fill, keep)
    events.append(f"wrote {step}")
    return place
def noted(*args, **kwargs):
    events.append(f"plays {kwargs['label']}")
    if INTERRUPT and "wrote 1" not in events and "plays step 1" in events[:-1]:
        threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT]).start()
    return collect(*args, **kwargs)
checkpoint.write, rollout.collect = slow, noted
status = script.run_script("train.py", train.main, FLAGS)
print(*events, sep="\\n")
sys.exit(status)
"""


@pytest.mark.parametrize("interrupt", [False, True], ids=["to its end", "ctrl-C in the rollout beside"])
def test_a_slow_disk_holds_up_no_rollout_and_loses_nothing(tiny_dir, tmp_path, interrupt):
    """The next batch is played, and trained on, while a checkpoint is written; ctrl-C waits for it."""
    whole, slow = tmp_path / "whole", tmp_path / "slow"
    flags = "--stage grpo --model {} --out {} --resume " + STAGES["grpo"][0].replace("every 2", "every 1")
    flags = flags.replace("--steps 4", "--steps 2").replace("--max-new-tokens 16", "--max-new-tokens 48")
    done = warm.run("train.py", *flags.format(tiny_dir, whole).split())
    assert done.returncode == 0, done.stderr[-2000:]
    code = f"FLAGS, INTERRUPT = {flags.format(tiny_dir, slow).split()!r}, {interrupt}\n{SLOW_DISK}"
    done = warm.run("-c", code)
    assert done.returncode == (130 if interrupt else 0), done.stderr[-2000:]
    assert (slow / "checkpoints" / "step-000001").is_dir()
    if interrupt:
        assert len(metrics(slow)) == 1 and "interrupted" in done.stderr
        again = warm.run("train.py", *flags.format(tiny_dir, slow).split())
        assert again.returncode == 0 and "going on after step 1" in again.stdout
    else:
        events = done.stdout.split("\n")
        assert events.index("plays step 2") < events.index("wrote 1")
        seconds = json.loads(whole_lines(slow / "metrics.jsonl")[1])["seconds"]
        assert seconds["checkpoint"] < 2, "the update waited for the disk"
        of_both = [run / "checkpoints" / "step-000001" / "model" / "model.safetensors" for run in (whole, slow)]
        assert of_both[0].read_bytes() == of_both[1].read_bytes()
    assert metrics(slow) == metrics(whole)
