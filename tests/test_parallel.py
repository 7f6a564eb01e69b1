"""Two real processes against one: the same gradients, the same weights, the same checkpoints.

A start costs seconds, so one does everything (tests/ranks.py) and the tests read what it found.
"""

import math

import pytest
import ranks
import torch
import warm
from conftest import SMALL, small_model

from minitau import checkpoint, parallel, pretrained

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """What is compared here is arithmetic on CPUs, also on a machine that has GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "device", lambda: torch.device("cpu"))
        yield


@pytest.fixture(scope="module")
def one():
    """What a single process does: weights after three and five steps, and the run they belong to."""
    run, reference = ranks.new_run(), ranks.new_reference()
    assert not parallel.is_sharded(run.model)
    metrics = ranks.train_steps(run, reference, range(3))
    return {"run": run, "reference": reference, "metrics": metrics, "at three": ranks.weights_of(run.model)}


@pytest.fixture(scope="module")
def two(tmp_path_factory, one):
    """(folder, what rank 0 found, what rank 1 found). Before they start, one process leaves them a checkpoint."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks.save(one["run"], folder / "by-one", 3)
    done = warm.run("tests/ranks.py", str(folder), ranks=2, PYTHONPATH=str(warm.ROOT), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, *(torch.load(folder / f"rank-{rank}.pt") for rank in range(2))


@torch.no_grad()
def assert_same(found, expected, error=0.0):
    """Names, shapes, and values up to `error` of the largest entry of each tensor; 0 is bit for bit."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].shape == expected[name].shape and found[name].dtype == expected[name].dtype, name
        scale = float(expected[name].abs().max())
        assert float((found[name] - expected[name]).abs().max()) <= error * scale, name


def test_gather_from_main_and_sums(two):
    _, *both = two
    for rank, found in enumerate(both):
        assert found["small talk"] == {
            "gather": [{"rank": 0}, {"rank": 1}],
            "groups of": {1: [rank], 2: [0, 1]},
            "from_main": "said by 0",
            "sum": {"a": 3.0, "b": 1.0},
        }


def test_one_process_talks_to_itself():
    assert (parallel.rank(), parallel.world_size(), parallel.is_main()) == (0, 1, True)
    assert parallel.gather("x") == ["x"] and parallel.from_main("x") == "x"
    assert parallel.sum_over_ranks({"a": 1.5}) == {"a": 1.5}
    parallel.barrier()


def test_a_queue_hands_out_each_index_once(two):
    """Over ranks and over threads; and both ranks got some, or this test would prove little."""
    _, first, second = two
    for name, n in ranks.QUEUES.items():
        assert sorted(first["queues"][name] + second["queues"][name]) == list(range(n))
    assert first["queues"]["many"] and second["queues"]["many"]
    for name, n in ranks.QUEUES.items():
        assert sorted(ranks.take_all(name, n)) == list(range(n))


@pytest.mark.parametrize("name, shape", [("tied", {}), ("untied", {"tie_word_embeddings": False})])
def test_gradients_of_two_ranks_are_those_of_one(two, name, shape):
    _, *both = two
    run, reference = ranks.new_run(**shape), ranks.new_reference(**shape)
    expected = ranks.gradients_of(run, reference, ranks.samples_of())
    norm = parallel.clip_grad_norm(run.model, 0.05)
    clipped = {n: ranks.whole(p.grad) for n, p in run.model.named_parameters()}
    assert norm > 0.05 and all(float(gradient.abs().max()) > 0 for gradient in expected.values())
    by_hand = sum(float(gradient.double().square().sum()) for gradient in expected.values()) ** 0.5
    assert norm == pytest.approx(by_hand, rel=1e-5)
    for found in both:
        assert_same(found[name]["start"], dict(small_model(**shape).named_parameters()))
        assert_same(found[name]["gradients"], expected, error=1e-5)
        assert found[name]["norm"] == pytest.approx(norm, rel=1e-5)
        assert_same(found[name]["clipped"], clipped, error=1e-5)
    assert_same(clipped, {n: gradient * 0.05 / norm for n, gradient in expected.items()}, error=1e-4)


def test_a_rank_without_work_takes_part(two):
    _, *both = two
    expected = ranks.gradients_of(ranks.new_run(), ranks.new_reference(), ranks.samples_of(n=1))
    for found in both:
        assert_same(found["one sample"], expected, error=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_sft_are_those_of_one_process(two, tied):
    _, *both = two
    expected = ranks.sft_gradients_of(ranks.new_run(tie_word_embeddings=tied), ranks.samples_of())
    for found in both:
        assert_same(found["sft"][tied], expected, error=1e-5)


def test_gradients_in_bf16_are_near_those_in_fp32(two):
    """On two ranks, whose FSDP rounds the weights, and on one, whose layers do."""
    _, *both = two
    exact = ranks.sft_gradients_of(ranks.new_run(), ranks.samples_of())
    alone = ranks.sft_gradients_of(ranks.new_run(dtype=torch.bfloat16), ranks.samples_of(), "bfloat16")
    for found in (alone, *(each["sft in bf16"] for each in both)):
        for name, gradient in exact.items():
            assert found[name].dtype == torch.float32
            assert 0 < float((found[name] - gradient).norm()) < 0.1 * float(gradient.norm()), name


def test_recomputing_blocks_under_sharding(two):
    """Activation checkpointing is inside the block: what backward gathers serves it as well."""
    _, *both = two
    for found in both:
        assert_same(found["recomputed"], found["tied"]["gradients"], error=1e-6)


def test_training_on_two_ranks_is_training_on_one(two, one):
    _, *both = two
    for found in both:
        assert_same(found["at three"], one["at three"], error=1e-3)  # Adam divides by small numbers
        assert len(found["metrics"]) == len(one["metrics"])
        for mine, theirs in zip(found["metrics"], one["metrics"]):
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert both[0]["metrics"] == both[1]["metrics"]  # what is logged is global, not the rank's own
    start = dict(small_model().named_parameters())
    assert (
        max(float((one["at three"][n] - start[n].detach()).abs().max()) for n in start) > 0.02
    )  # there was something to match


def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(two, one):
    folder, first, _ = two
    run = ranks.new_run(seed=7)
    assert checkpoint.load(folder / "by-two", run.model, run.optimizer) == {"step": 3, "mark": 3}
    assert_same(ranks.weights_of(run.model), first["at three"])
    assert {float(state["step"]) for state in run.optimizer.state.values()} == {3.0}
    ranks.train_steps(run, one["reference"], range(3, 5))
    assert_same(ranks.weights_of(run.model), first["at five"], error=1e-3)


def test_a_checkpoint_of_one_process_goes_on_on_two_ranks(two, one):
    folder, *both = two
    run = ranks.new_run(seed=7)
    checkpoint.load(folder / "by-one", run.model, run.optimizer)
    ranks.train_steps(run, one["reference"], range(3, 5))
    for found in both:
        assert found["loaded"]["state"] == {"step": 3, "mark": 3}
        assert_same(found["loaded"]["weights"], one["at three"])
        assert_same(found["resumed"], ranks.weights_of(run.model), error=1e-3)


def test_the_model_written_by_two_ranks_is_whole(two):
    folder, first, _ = two
    place = checkpoint.latest(folder / "by-two")
    assert_same(dict(pretrained.load_model(place / "model").named_parameters()), first["at three"])
    assert [path.name for path in (folder / "by-two" / "checkpoints").iterdir()] == ["step-000003"]


def test_whole_weights_in_and_out(two):
    """FullWeights gives back what load_weights took, on every rank and in every entry."""
    _, *both = two
    expected = dict(small_model(5).named_parameters())
    for found in both:
        assert_same(found["load_weights"], expected)
    run = ranks.new_run()
    ranks.load_weights(run.model, expected)
    assert_same(ranks.weights_of(run.model), expected)


def test_bfloat16_keeps_fp32_master_weights(two):
    """After a step with learning rate 0 they are what they were, to the last bit."""
    _, *both = two
    expected = dict(small_model(5).named_parameters())
    for found in both:
        assert_same(found["after bf16"], expected)
        assert 0 < found["bf16"]["grad_norm"] < float("inf")


def test_whole_weights_after_a_forward_without_backward(two):
    """Scoring leaves gathered bf16 copies behind; what is synced to the engine and saved must not be those."""
    _, *both = two
    expected = dict(small_model(5).named_parameters())
    for found in both:
        assert_same(found["after scoring"], expected)


def test_a_reference_that_is_kept_in_bf16_scores_the_same(two):
    """To the last bit: weights that do not change may be rounded once as well as each time."""
    _, *both = two
    for found in both:
        rounded_each_time, rounded_once = found["scores"].values()
        assert torch.equal(rounded_each_time, rounded_once) and rounded_once.std() > 0
    assert torch.equal(ranks.scores_in_bf16(torch.float32), ranks.scores_in_bf16(torch.bfloat16))


@pytest.mark.parametrize("size", ranks.BUCKETS)
def test_shards_are_gathered_in_the_bucket_and_take_no_other_memory(two, size):
    """97 rows of an embedding do not split evenly; the room for the rest counts as the bucket's."""
    _, *both = two
    expected = {name: weight.detach().bfloat16() for name, weight in small_model(5).named_parameters()}
    for found in both:
        got = found["buckets"][size]
        assert_same(got["weights"], expected)
        assert got["bytes"] == got["largest"] <= max(size, 98 * SMALL["hidden_size"] * 2)
    assert both[0]["buckets"][1 << 20]["bytes"] > both[0]["buckets"][5000]["bytes"]


def test_a_full_disk_on_one_rank_stops_both(two):
    """Neither waits for the other, both say the same, and nothing half written stays."""
    folder, first, second = two
    assert first["full disk"] == second["full disk"]
    for rank, text in enumerate(first["full disk"]):
        assert "step 9 was not written" in text and "File too large" in text and "\n" not in text
        assert list((folder / f"full-{rank}" / "checkpoints").iterdir()) == []


def test_a_rank_that_cannot_write_the_model_takes_what_the_others_give(two):
    folder, first, second = two
    assert first["lost model file"] == second["lost model file"]
    assert "step 9 was not written (the disk went away)" in first["lost model file"]
    assert list((folder / "lost" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("max_norm", [1e-3, 1e3], ids=["clipped", "not clipped"])
def test_a_fused_step_is_the_same_step(max_norm):
    """Scaling inside the optimizer, as on a GPU, against scaling before it."""
    weights = []
    for fused in (False, True):
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            norm = parallel.clipped_step(model, optimizer, max_norm)
            assert norm == pytest.approx(sum(p.numel() for p in model.parameters()) ** 0.5, rel=0.1)
        weights.append(dict(model.named_parameters()))
    assert_same(*weights, error=1e-5)
    start = dict(small_model().named_parameters())
    assert any(float((weights[0][name] - start[name]).abs().max()) > 1e-2 for name in start)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_no_step_with_a_gradient_that_is_not_finite(fused, poison):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.model.norm.weight.grad[3] = poison
    assert not math.isfinite(parallel.clipped_step(model, optimizer, 1.0))
    assert_same(dict(model.named_parameters()), before)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert math.isfinite(parallel.clipped_step(model, optimizer, 1.0))
    assert float((model.model.norm.weight - before["model.norm.weight"]).abs().max()) > 1e-3
