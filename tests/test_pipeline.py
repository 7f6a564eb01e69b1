"""The commands that people type, whole: the demo at its smallest, and GRPO under torchrun on CPUs."""

import json
import subprocess
import sys
from pathlib import Path

from minitau import checkpoint
from minitau.log import whole_lines

ROOT = Path(__file__).parent.parent


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_the_demo_goes_through_every_stage(tmp_path):
    out = tmp_path / "demo"
    text = "--tasks 1 --demonstrations 24 --sft-epochs 1 --rft-tasks 3 --steps 1"
    flags = text.split()
    done = command("-m", "minitau.demo", "--out", str(out), *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((out / "results.json").read_text())
    stages = ["refuse", "transfer", "base", "sft", "rft", "grpo"]
    assert [row["stage"] for row in rows if row["domain"] == "all"] == stages
    for row in rows:
        wanted = {"stage", "domain", "split", "tasks", "trials", "pass@1", "pass@4", "pass^4", "ci95", "seconds"}
        assert wanted <= row.keys()
        low, high = row["ci95"]
        assert 0 <= low <= row["pass@1"] <= high <= 1 and row["split"] == "test" and row["trials"] == 4
    assert (out / "learning.png").read_bytes().startswith(b"\x89PNG")
    assert all(f"{stage} " in done.stdout for stage in stages), "the table is printed"

    # Interrupted before the table: the second run plays and trains nothing again, and ends the same.
    (out / "results.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}
    again = command("-m", "minitau.demo", "--out", str(out), *flags)
    assert again.returncode == 0 and "$ python" not in again.stdout
    assert json.loads((out / "results.json").read_text()) == rows
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}


def test_grpo_under_torchrun(tiny_dir, tmp_path):
    """Two sharded ranks share one queue of episodes; each plays some, and both train on all."""
    out = tmp_path / "run"
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "train.py")
    flags = (
        "--stage grpo --steps 2 --tasks 9 --tasks-per-step 3 --group-size 4 --no-dynamic-sampling "
        "--lr 1e-3 --max-new-tokens 16 --max-turns 3 --concurrency 4"
    )
    done = command(*torchrun, "--model", str(tiny_dir), "--out", str(out), *flags.split())
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in whole_lines(out / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["episodes"] == 12 and sum(line["stops"].values()) == 12 for line in lines)
    # The engine's whole copy and the shards it came from must be the same weights.
    assert all(line["drift"] < 1e-4 for line in lines)
    assert [line["weight_versions"] for line in lines] == [[0], [1]]
    trained, start = checkpoint.load_model(out / "model"), checkpoint.load_model(tiny_dir)
    assert not trained.head_weight.equal(start.head_weight)
