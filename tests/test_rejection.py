"""What rejection fine-tuning keeps of the episodes that it sampled, and what it says that it lost."""

import pytest
from conftest import trajectory

from minitau import rejection
from minitau.episode import Check, Evaluation, Stop, Task, Turn


def attempt(reward=0.0, passed=(), sample=0, stop=Stop.USER_STOP):
    """An attempt with one check of kind `action` for each of `passed`."""
    checks = [Check("action", str(i), each) for i, each in enumerate(passed)]
    return trajectory([1, 2], [False, True], reward=reward, checks=checks, sample=sample, stop=stop)


def test_a_solved_task_keeps_every_success_and_nothing_else():
    group = [attempt(1.0, (True,), 0), attempt(0.0, (True,), 1), attempt(1.0, (False,), 2)]
    assert rejection.reject([group], 0.6) == [group[0], group[2]]


def test_an_unsolved_task_keeps_its_first_best_attempt_if_it_is_good_enough():
    group = [attempt(0.0, (True, False), 0), attempt(0.0, (True, True, False), 1), attempt(0.0, (True, True, False), 2)]
    kept = rejection.reject([group], 0.6)
    assert len(kept) == 1 and kept[0] is group[1]
    assert rejection.reject([group], 2 / 3) == [group[1]]  # "from this partial score on"
    assert rejection.reject([group], 0.7) == []
    assert rejection.reject([group[:1]], 0.6) == []


def test_malformed_replies_are_not_imitated():
    t = trajectory([1, 2, 3, 4, 5, 6], [False, True, True, False, True, False], reward=1.0)
    t.turns = [Turn(1, 3, 0, "not JSON"), Turn(4, 5, 0)]
    seen = rejection.without_mistakes(t)
    assert seen.ids == t.ids and seen.said == [False, False, False, False, True, False]
    assert t.said == [False, True, True, False, True, False], "the episode stays what it was"
    t.turns = [Turn(1, 3, 0, "not JSON"), Turn(4, 5, 0, "not JSON either")]
    assert rejection.reject([[t, attempt(0.0, (True, False))]], 0.4) == [attempt(0.0, (True, False))]
    assert rejection.reject([[t]], 0.0) == [], "there is nothing in it to imitate"
    (row,) = rejection.kept_rows([[t]], [])
    assert (row["solved"], row["partial"], row["lost"]) == (0, 0, 1)


def test_what_broke_on_our_side_is_never_kept():
    broken = [attempt(stop=stop) for stop in (Stop.USER_ERROR, Stop.ENGINE_ERROR, Stop.ENV_ERROR)]
    assert rejection.reject([broken], 0.0) == []
    good = attempt(0.0, (True, True), 1)
    assert rejection.reject([[*broken, good]], 0.6) == [good]
    assert rejection.reject([], 0.6) == [] and rejection.reject([[]], 0.6) == []


def test_the_groups_keep_their_order():
    groups = [[attempt(1.0, (), i)] for i in range(5)]
    assert [t.sample for t in rejection.reject(groups, 0.6)] == list(range(5))


# -- the report ---------------------------------------------------------------------------------------------------


def test_what_was_kept_and_lost_is_counted_by_domain_and_in_all():
    def group(domain, number, *attempts):
        for each in attempts:
            each.task = Task(domain, "train", str(number))
        return list(attempts)

    half, most = (True, False), (True, True, True, False)
    groups = [
        group("desk", 1, attempt(1.0, (True,)), attempt(0.0, half), attempt(1.0, (True,))),
        group("desk", 2, attempt(0.0, most), attempt(0.0, half), attempt(stop=Stop.USER_ERROR)),
        group("desk", 3, attempt(0.0, half), attempt(0.0, half), attempt(0.0, half)),
        group("claims", 4, *(attempt(stop=Stop.ENV_ERROR) for _ in range(3))),
        group("claims", 5, attempt(1.0, (True,)), attempt(stop=Stop.USER_ERROR), attempt(stop=Stop.USER_ERROR)),
    ]
    kept = rejection.reject(groups, 0.6)
    desk, claims, everything = rejection.kept_rows(groups, kept)
    assert desk == {
        "domain": "desk", "tasks": 3, "solved": 1, "partial": 1, "lost": 1, "broken": 0,
        "attempts": 9, "attempts_broken": 1, "kept": 3, "reward": 2 / 8,
        "partial_score": pytest.approx((1 + 0.5 + 1 + 0.75 + 0.5 + 3 * 0.5) / 8),
    }  # fmt: skip
    assert claims["tasks"] == 2 and claims["lost"] == claims["broken"] == 1 and claims["attempts_broken"] == 5
    assert claims["reward"] == 1.0 and claims["solved"] == claims["kept"] == 1
    assert everything["domain"] == "all" and everything["kept"] == len(kept) == 4
    for name in ("tasks", "solved", "partial", "lost", "broken", "attempts", "attempts_broken"):
        assert everything[name] == desk[name] + claims[name]
    table = [line.split() for line in rejection.kept_table([desk, claims, everything]).splitlines()]
    assert table[1] == ["desk", "3", "1", "1", "1", "0", "9", "1", "3", "0.250", "0.656"]
    assert len(rejection.kept_rows(groups[:3], kept)) == 1  # one domain needs no sum


def test_a_task_that_keeps_a_partial_attempt_beside_a_success_of_mistakes_is_no_solved_one():
    wrong = attempt(1.0, (True,))
    wrong.turns = [Turn(1, 2, 0, "there is no such tool")]
    group = [wrong, attempt(0.0, (True, True, False))]
    kept = rejection.reject([group], 0.6)
    assert kept == group[1:]
    (row,) = rejection.kept_rows([group], kept)
    assert (row["solved"], row["partial"], row["lost"]) == (0, 1, 0)


def test_a_database_that_differs_costs_nothing_in_telecom():
    """Most reference solutions of telecom fail that check: an attempt must not be dropped for it."""
    right = attempt(0.0, (True, True))
    right.task = Task("telecom", "train", "1")
    checks = (*right.evaluation.checks, Check("env", "paid", True), Check("db", "database", False))
    right.evaluation = Evaluation(0.0, checks)
    assert rejection.reject([[right]], 1.0) == [right]
