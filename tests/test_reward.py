"""Partial credit by hand, and where it may change what GRPO compares."""

from collections import Counter
from itertools import permutations, product
from random import Random

import pytest

from minitau import config, reward
from minitau.episode import Check, Evaluation


def graded(**kinds):
    """An evaluation; each argument is a kind of check with a string of + and -."""
    checks = [Check(kind, f"{kind} {i}", mark == "+") for kind, marks in kinds.items() for i, mark in enumerate(marks)]
    return Evaluation(0.0, tuple(checks))


# checks -> partial credit elsewhere, and in telecom. Weights: action .5, communicate .15, env .35, db 0;
# telecom .35, .35, .30. Only the kinds that are present share the whole.
PARTIAL = {
    "all passed": (graded(action="++", communicate="+", env="+", db="+"), 1.0, 1.0),
    "all failed": (graded(action="--", communicate="-", env="-", db="-"), 0.0, 0.0),
    "half of the actions": (graded(action="+-"), 0.5, 0.5),
    "actions of actions and words": (graded(action="++", communicate="-"), 0.5 / 0.65, 0.35 / 0.70),
    "a third, all, none": (
        graded(action="+--", communicate="++", env="-"),
        (0.5 / 3 + 0.15) / 1.0,
        (0.35 / 3 + 0.35) / 1.0,
    ),
    "words and state": (graded(communicate="+", env="-"), 0.15 / 0.5, 0.35 / 0.65),
    "the database weighs nothing": (graded(action="+", db="-"), 1.0, 1.0),
    "the database alone": (graded(db="+"), 0.0, 0.0),
    "no checks": (graded(), 0.0, 0.0),
    "no verdict": (None, 0.0, 0.0),
}


@pytest.mark.parametrize("case", PARTIAL)
def test_partial_by_hand(case):
    evaluation, elsewhere, telecom = PARTIAL[case]
    for domain in ("retail", "airline", "desk"):
        assert reward.partial(evaluation, domain) == pytest.approx(elsewhere)
    assert reward.partial(evaluation, "telecom") == pytest.approx(telecom)


def test_a_score_that_is_a_round_number_is_that_number():
    """RFT keeps from 0.6 on; 0.35 x 3 / 3 rounds to less than 0.35."""
    assert reward.partial(graded(action="+-", communicate="-", env="+++"), "retail") == 0.6
    assert reward.partial(graded(action="+++", communicate="++", env="+++"), "retail") == 1.0


def test_weights_are_whole():
    for weights in (reward.CHECK_WEIGHTS, reward.TELECOM_WEIGHTS):
        assert sum(weights.values()) == pytest.approx(1.0)
        assert set(weights) == {"action", "communicate", "env", "db"}  # the kinds that Check names


def test_partial_credit_is_the_same_number_in_any_order():
    """`differs` compares exactly: attempts that passed the same checks must not differ in the last bit."""
    for marks in product(("+", "+-", "++-", "+----"), repeat=3):
        kinds = dict(zip(("action", "communicate", "env"), marks))
        orders = permutations(kinds)
        assert len({reward.partial(graded(**{kind: kinds[kind] for kind in order}), "desk") for order in orders}) == 1


MIXED, FAILED, SOLVED = [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
PARTS = [1.0, 0.5, 0.0]
ALL = [True] * 3


def shape(rewards, shaping, *, counted=ALL, scale=1.0, parts=PARTS):
    return reward.shape(rewards, parts, counted, shaping=shaping, alpha=0.25, scale=scale)


def test_shaping_by_hand():
    for rewards in (MIXED, FAILED, SOLVED):
        assert shape(rewards, "none") == rewards
    assert shape(MIXED, "additive") == [1.25, 0.125, 0.0]
    assert shape(FAILED, "additive") == [0.25, 0.125, 0.0]
    assert shape(SOLVED, "additive") == [1.25, 1.125, 1.0]
    # gated: partial credit ranks inside a group whose outcomes differ, and nowhere else.
    assert shape(MIXED, "gated") == [1.25, 0.125, 0.0]
    assert shape(FAILED, "gated") == FAILED
    assert shape(SOLVED, "gated") == SOLVED


def test_scale_multiplies_the_partial_credit_and_not_the_reward():
    assert shape(MIXED, "gated", scale=1.6) == pytest.approx([1.4, 0.2, 0.0])
    assert shape(FAILED, "none", scale=0.8) == FAILED


@pytest.mark.parametrize("shaping", reward.SHAPINGS)
def test_no_failure_passes_a_success(shaping):
    """The best partial credit of a failure stays under the worst of a success, or shaping would teach failing well."""
    assert shape([0.0, 1.0], shaping, parts=[1.0, 0.0], counted=[True] * 2)[0] < 1.0


def test_an_episode_that_does_not_count_does_not_open_the_gate():
    """Its reward is 0.0 because there is no verdict; beside solved ones that is not a difference."""
    lost_last = [True, True, False]
    assert shape([1.0, 1.0, 0.0], "gated", counted=lost_last)[:2] == [1.0, 1.0]
    assert shape([1.0, 0.0, 0.0], "gated", counted=lost_last)[:2] == [1.25, 0.125]
    assert shape([1.0, 0.0, 0.0], "gated", counted=[False] * 3) == [1.0, 0.0, 0.0]


def test_unknown_shaping_names_the_choices():
    with pytest.raises(ValueError, match="none, additive, gated"):
        shape(MIXED, "dense")
    field = {f.name: f for f in config.dataclasses.fields(config.GRPO)}["shaping"]
    assert field.metadata["choices"] == reward.SHAPINGS


def test_differs():
    assert reward.differs([1.0, 0.0], [True, True])
    assert not reward.differs([1.0, 1.0], [True, True])
    assert not reward.differs([1.0, 0.0], [True, False])  # the other one says nothing
    assert not reward.differs([1.0, 0.0], [False, False])
    assert not reward.differs([], [])


def test_domain_scales():
    assert [reward.domain_scale(d) for d in ("retail", "airline", "telecom", "desk")] == [0.8, 1.0, 1.6, 1.0]


def test_shuffling_is_every_permutation_of_those_that_count():
    counted = [True, False, True, True]
    seen = Counter(tuple(reward.shuffled([1.0, 9.0, 2.0, 3.0], counted, Random(f"{i}"))) for i in range(1200))
    assert set(seen) == {(a, 9.0, b, c) for a, b, c in permutations((1.0, 2.0, 3.0))}
    assert min(seen.values()) > 140, "each, also the one that changes nothing, as often as the others"
    assert reward.shuffled([], [], Random(0)) == []
    assert reward.shuffled([1.0, 2.0], [False, False], Random(0)) == [1.0, 2.0]
