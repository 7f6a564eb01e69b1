"""Plans keep their promises for any lengths, and packing shifts targets by exactly one."""

from random import Random

import pytest
import torch
from conftest import trajectory

from minitau.batch import BatchError, Sample, micro_batches, pack, plan
from minitau.episode import BadInput

# Lengths of every kind: none, one, equal, skewed as real episodes are, one giant, all at the budget.
RNG = Random(0)
LENGTHS = {
    "none": [],
    "one": [7],
    "equal": [10] * 12,
    "skewed": [min(100, int(RNG.lognormvariate(3, 1)) + 2) for _ in range(64)],
    "a giant": [100, *[2] * 30],
    "all full": [100] * 9,
    "just over half": [51] * 10,  # no two of them fit together
    "ones": [1] * 50,
}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("name", LENGTHS)
def test_a_plan_keeps_its_promises(name, world_size):
    lengths, budget = LENGTHS[name], 100
    bins = plan(lengths, budget, world_size)
    assert len(bins) == world_size
    assert len({len(of_rank) for of_rank in bins}) == 1  # each micro-batch is a collective forward
    assert len(bins[0]) >= 1
    everything = sorted(index for of_rank in bins for one in of_rank for index in one)
    assert everything == list(range(len(lengths)))
    for of_rank in bins:
        for one in of_rank:
            assert sum(lengths[index] for index in one) <= budget
    assert bins == plan(lengths, budget, world_size)  # every rank makes its own and must get the same


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_a_plan_is_balanced_and_not_wasteful(world_size):
    lengths, budget = LENGTHS["skewed"], 200
    bins = plan(lengths, budget, world_size)
    loads = [sum(lengths[i] for one in of_rank for i in one) for of_rank in bins]
    assert max(loads) - min(loads) <= max(lengths)  # Graham's bound for longest first is tighter still
    assert max(loads) <= 1.1 * sum(loads) / world_size
    # Not more forwards than the tokens need, but for one a rank that uneven lengths may cost.
    needed = -(-sum(lengths) // (budget * world_size))
    assert len(bins[0]) <= needed + 1


def test_a_plan_of_a_batch_that_fits_exactly():
    assert plan([50, 50, 50, 50], 100, 2) == [[[0, 2]], [[1, 3]]]
    assert plan([100, 100], 100, 1) == [[[0], [1]]]
    assert plan([3], 100, 2) == [[[0]], [[]]]


def test_a_trajectory_longer_than_the_budget_is_one_clear_line():
    with pytest.raises(BatchError) as refusal:
        plan([5, 101, 7], 100, 2)
    text = str(refusal.value)
    assert "101" in text and "--micro-batch-tokens 100" in text and "\n" not in text
    assert isinstance(refusal.value, BadInput)


# Two conversations; capitals mark what the agent said: 5 6 [7 8] 9 [4] and 1 [2] 3.
FIRST = trajectory(
    [5, 6, 7, 8, 9, 4], [False, False, True, True, False, True], [0.0, 0.0, -0.1, -0.2, 0.0, -0.3], sample=0
)
SECOND = trajectory([1, 2, 3], [False, True, False], [0.0, -0.4, 0.0], sample=1)


def test_pack_by_hand():
    mb = pack([Sample(FIRST, advantage=1.5, weight=0.25), Sample(SECOND, advantage=-2.0, weight=0.5)], "cpu")
    assert mb.ids_T.tolist() == [5, 6, 7, 8, 9, 4, 1, 2, 3]
    assert mb.positions_T.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert mb.cu_seqlens == [0, 6, 9]
    # Row t predicts ids[t + 1]: 7 stands at 2 and is predicted at row 1, after 5 6; 8 at row 2; 4 at row 4;
    # 2 of the second conversation stands at 6 + 1 and is predicted at row 6.
    assert mb.predict_N.tolist() == [1, 2, 4, 6]
    assert mb.targets_N.tolist() == [7, 8, 4, 2]
    assert mb.ids_T[mb.predict_N + 1].tolist() == mb.targets_N.tolist()
    assert mb.sequence_N.tolist() == [0, 0, 0, 1]
    assert mb.rollout_N.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4])
    assert mb.advantages_N.tolist() == [1.5, 1.5, 1.5, -2.0]
    assert mb.weights_N.tolist() == [0.25, 0.25, 0.25, 0.5]
    assert mb.old_N is None and mb.reference_N is None
    integers = (mb.ids_T, mb.positions_T, mb.predict_N, mb.targets_N, mb.sequence_N)
    assert {each.dtype for each in integers} == {torch.long}
    assert {each.dtype for each in (mb.rollout_N, mb.advantages_N, mb.weights_N)} == {torch.float32}


def test_no_row_predicts_across_a_boundary():
    """The last token of one conversation never predicts the first of the next."""
    samples = [Sample(each, weight=1.0) for each in (FIRST, SECOND, FIRST, SECOND)]
    mb = pack(samples, "cpu")
    last_rows = {end - 1 for end in mb.cu_seqlens[1:]}
    assert not last_rows & set(mb.predict_N.tolist())
    for row, number in zip(mb.predict_N.tolist(), mb.sequence_N.tolist()):
        assert mb.cu_seqlens[number] <= row and row + 1 < mb.cu_seqlens[number + 1]


def test_a_first_token_that_was_said_has_nothing_to_be_predicted_from():
    mb = pack([Sample(trajectory([3, 4], [True, True]), weight=1.0)], "cpu")
    assert mb.predict_N.tolist() == [0] and mb.targets_N.tolist() == [4]


@pytest.mark.parametrize(
    "samples", [[], [Sample(trajectory([3, 4, 5], [False] * 3), weight=0.3)]], ids=["nobody", "nothing said"]
)
def test_a_rank_short_of_work_gets_a_batch_that_weighs_nothing(samples):
    mb = pack(samples, "cpu")
    assert len(mb.ids_T) == len(mb.positions_T) == mb.cu_seqlens[-1] == 2
    assert len(mb.predict_N) == 1  # a row must meet the head, or the head's gradients would not be reduced
    assert mb.weights_N.tolist() == [0.0] and mb.advantages_N.tolist() == [0.0]


def test_silent_trajectories_cost_nothing_beside_others():
    empty, silent = trajectory([], []), trajectory([3, 4, 5], [False] * 3)
    mb = pack([Sample(empty), Sample(silent, weight=0.3), Sample(SECOND, weight=0.5)], "cpu")
    assert mb.cu_seqlens == [0, 3]
    assert mb.predict_N.tolist() == [0] and mb.sequence_N.tolist() == [0] and mb.weights_N.tolist() == [0.5]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("budget", [23, 40, 1000])
def test_micro_batches_hold_every_said_token_once(budget, world_size):
    """Over all ranks; whatever the cut, the same rows with the same weights."""
    rng = Random(3)
    samples = []
    for i in range(11):
        n = rng.randint(2, 23)
        said = [False, *(rng.random() < 0.5 for _ in range(n - 1))]
        # The token names its place, so that each row can be told from every other.
        episode = trajectory([100 * i + t for t in range(n)], said, [-float(t) for t in range(n)], sample=i)
        samples.append(Sample(episode, advantage=float(i), weight=1.0 / (i + 1)))
    expected = sorted(
        (episode.ids[t], -float(t), sample.advantage)
        for sample in samples
        for episode in [sample.trajectory]
        for t in range(1, len(episode.ids))
        if episode.said[t]
    )
    parts = [
        micro_batches(samples, budget=budget, rank=rank, world_size=world_size, device="cpu")
        for rank in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1
    found = []
    for mb in (mb for part in parts for mb in part):
        assert len(mb.ids_T) <= max(budget, 2)
        live = mb.weights_N > 0
        rows = zip(mb.targets_N[live].tolist(), mb.rollout_N[live].tolist(), mb.advantages_N[live].tolist())
        found += rows
        # The token before a target is the one that its row reads.
        assert torch.equal(mb.ids_T[mb.predict_N[live]], mb.targets_N[live] - 1)
    assert sorted(found) == expected
