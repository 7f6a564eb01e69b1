"""benchmarks/peers.py runs on a CPU, trains what it says, and reports it. TRL's half needs packages of its own."""

import json
import math
from importlib.util import find_spec

import pytest
import warm

from benchmarks import mfu

TINY = ["--shape", "tiny", "--attention", "sdpa", "--lengths", "40,16,8", "--steps", "4"]


def run(*flags):
    return warm.run("-m", "benchmarks.peers", *flags, CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize("which", ["transformers", "trl"])
def test_a_peer_trains_on_a_cpu(which):
    if which == "trl" and not find_spec("trl"):
        pytest.skip("trl is not installed")
    done = run("--which", which, *TINY)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert len(row["seconds"]) == len(row["losses"]) == 4
    assert row["losses"][0] == pytest.approx(math.log(2048), abs=0.1) and row["losses"][-1] < row["losses"][0]
    assert row["seconds_per_step"] == pytest.approx(sum(row["seconds"][2:]) / 2)
    assert row["mfu"] == pytest.approx(mfu.mfu(mfu.SHAPES["tiny"], [40, 16, 8], row["seconds_per_step"]))
    assert row["trained_with"]["weights"] == row["trained_with"]["moments"] == "torch.float32"
    assert row["trained_with"]["checkpointing"] and row["trained_with"]["attention"] == "sdpa"


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--lengths", "8,x"], "whole numbers"),
        (["--lengths", "8,1"], "at least 2 tokens"),
        (["--steps", "2"], "warm up"),
        (["--checkpointing", "selective"], "is TRL's"),
        (["--attention", "flash_attention_4"], "FlashAttention4"),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags, says):
    done = run("--which", "transformers", *TINY, *flags)
    assert done.returncode != 0 and says in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
