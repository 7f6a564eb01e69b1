"""What a training step is worth in FLOPs, against counts made another way; and what the benchmarks share beside it."""

import argparse
import json
from itertools import repeat

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import flags, mfu, ratios, same_numbers, trainer
from minitau import pace
from minitau.episode import BadInput
from minitau.model import Qwen3


def full_attention(q, k, v):
    """Every token looks at every token: the matmuls that the formula counts at half."""
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    scores = torch.bmm(q.transpose(0, 1), k.permute(1, 2, 0))
    return torch.bmm(scores, v.transpose(0, 1)).transpose(0, 1)


def test_flops_are_those_of_the_matmuls():
    shape, tokens = mfu.SHAPES["tiny"], 48
    with torch.device("meta"):
        model, ids = Qwen3(shape), torch.zeros(tokens, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            hidden = model.hidden(ids, torch.arange(tokens), repeat(full_attention))
            (hidden @ model.head_weight.T).sum().backward()
    twice = pace.flops(shape, [tokens], tokens)
    attention = 6 * 2 * 4 * 32 * tokens**2  # 6 L H d len^2: the other half
    norms = 6 * tokens * sum(each.numel() for each in model.model.layers.parameters() if each.ndim == 1)
    assert counter.get_total_flops() == twice + attention - norms


def test_a_count_is_a_whole_number_from_somewhere_up():
    assert flags.at_least(1)("3") == 3 and flags.at_least(0)("0") == 0
    for least, text in ((1, "0"), (0, "-1"), (1, "1.5"), (1, "many")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"is no whole number from {least} up"):
            flags.at_least(least)(text)


def test_packed_sequences_do_not_look_at_each_other():
    shape = mfu.SHAPES["4b"]
    one, four = pace.flops(shape, [4096], 4096), pace.flops(shape, [1024] * 4, 4096)
    assert one - four == 6 * 36 * 32 * 128 * (4096**2 - 4 * 1024**2)
    assert mfu.mfu(shape, [4096], 2.0) == pytest.approx(one / 2 / 989e12)


def test_gaps_are_the_times_in_which_no_kernel_ran():
    spans = [(10.0, 12.0, "c"), (0.0, 4.0, "a"), (1.0, 2.0, "b"), (4.0, 5.0, "d"), (12.5, 13.0, "e")]
    assert trainer.gaps(spans) == [(5.0, "d", "c"), (0.5, "c", "e")]


def test_numbers_are_within_their_tolerances_and_what_is_not_is_named():
    found = same_numbers.measure_numbers(argparse.Namespace(shape="tiny", dtype="bfloat16"))
    assert same_numbers.exceeded("numbers", found) == [] and same_numbers.exceeded("speed", {}) == []
    found["fp32"]["mean"] = 0.5
    found["bf16, eager"]["gradient_relative_to_compiled"] = float("nan")
    one, other = same_numbers.exceeded("numbers", found)
    assert one == "numbers, fp32: mean is 0.5, more than 0.0001"
    assert other.startswith("numbers, bf16, eager: gradient_relative_to_compiled is nan")


def test_ratios_are_of_one_round_and_their_median_of_all(monkeypatch, capsys):
    alone, together, peer = iter([100.0, 120.0, 90.0]), iter([150.0, 240.0, 171.0]), iter([50.0, 40.0, 60.0])

    def ours(args, ranks):
        speed = next(alone if ranks == 1 else together)
        return {"auto": {"tokens_per_second": speed}, "all": {"tokens_per_second": speed / 2}}

    monkeypatch.setattr(ratios, "ours", ours)
    monkeypatch.setattr(ratios, "theirs", lambda args, which: {"tokens_per_second": next(peer)})
    ratios.main(["--rounds", "3", "--ranks", "2", "--peers", "trl"])
    found = json.loads(capsys.readouterr().out)
    assert [each["ratios"]["recompute auto / trl"] for each in found["rounds"]] == [2.0, 3.0, 1.5]
    assert found["ratios"] == {
        "recompute auto / trl": 2.0,
        "recompute all / trl": 1.0,
        "recompute auto on 2 GPUs / 2 x one": pytest.approx(0.95),
        "recompute all on 2 GPUs / 2 x one": pytest.approx(0.95),
    }


def test_a_benchmark_that_fails_ends_the_ratios_with_its_last_word():
    with pytest.raises(BadInput, match=r"benchmarks\.peers .* ended with status 2: .*invalid choice"):
        ratios.output_of(["-m", "benchmarks.peers", "--which", "nobody"])


def test_a_peer_sees_one_gpu(monkeypatch):
    """TRL refuses several in one process."""
    seen = "import json, os; print(json.dumps({'tokens_per_second': 7, 'mfu': os.environ['CUDA_VISIBLE_DEVICES']}))"
    monkeypatch.setattr(ratios, "output_of", lambda command, gpus=None, run=ratios.output_of: run(["-c", seen], gpus))
    args = argparse.Namespace(shape="tiny", attention="sdpa", steps=1, liger=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert ratios.theirs(args, "trl") == {"tokens_per_second": 7, "mfu": "0"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert ratios.theirs(args, "trl")["mfu"] == "3"


def test_unknown_parts_of_a_benchmark_are_named():
    read = flags.among(("sync", "drift"))
    assert read("drift,sync") == ["drift", "sync"]
    with pytest.raises(argparse.ArgumentTypeError, match="there is no 'drifts'; there are sync, drift"):
        read("sync,drifts")
