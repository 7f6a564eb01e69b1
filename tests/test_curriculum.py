"""Which task next: the same draws on every rank and after a resume, and the probabilities that were promised."""

import json
from collections import Counter

import pytest

from minitau.curriculum import FLOOR, Curriculum
from minitau.episode import Task

TASKS = [Task("desk", "train", str(i)) for i in range(20)]


def visited(rates, visits=50, seed=0, enabled=True):
    """A curriculum whose tasks have been seen often, with these success rates (in tenths of ten attempts)."""
    curriculum = Curriculum(TASKS[: len(rates)], seed=seed, enabled=enabled)
    for _ in range(visits):
        for task, rate in zip(TASKS, rates):
            curriculum.update(task, [i < round(10 * rate) for i in range(10)])
    return curriculum


def shares(curriculum, n=1, draws=4000):
    """How often each task is among `n` drawn, over many steps."""
    counts = Counter(task.id for step in range(draws) for task in curriculum.draw(step, n))
    return [counts[task.id] / draws for task in curriculum.tasks]


def outcomes(step, task):
    """What some policy did: any function of step and task will do."""
    return [(step * 7 + int(task.id) * 3 + i) % 5 < 2 for i in range(4)]


def run(curriculum, steps, n=5):
    drawn = []
    for step in steps:
        tasks = curriculum.draw(step, n)
        drawn.append(tasks)
        for task in tasks:
            curriculum.update(task, outcomes(step, task))
    return drawn


def test_every_rank_draws_the_same():
    first, second = Curriculum(TASKS, seed=3), Curriculum(TASKS, seed=3)
    assert run(first, range(30)) == run(second, range(30))
    assert first.state_dict() == second.state_dict()
    assert first.draw(99, 5) == first.draw(99, 5)  # drawing changes nothing


def test_seed_step_and_round_each_change_the_draw():
    rates = [0.5] * 20
    base = visited(rates).draw(1, 5)
    assert base != visited(rates, seed=1).draw(1, 5)
    assert base != visited(rates).draw(2, 5)
    assert base != visited(rates).draw(1, 5, round=1)


def test_resuming_draws_what_would_have_been_drawn():
    """Through JSON, as the checkpoint keeps it: floats come back to the last bit."""
    straight = Curriculum(TASKS, seed=3)
    drawn = run(straight, range(30))
    stopped = Curriculum(TASKS, seed=3)
    assert run(stopped, range(17)) == drawn[:17]
    resumed = Curriculum(TASKS, seed=3)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert run(resumed, range(17, 30)) == drawn[17:]
    assert resumed.state_dict() == straight.state_dict()


def test_a_loaded_state_is_a_copy():
    source = visited([0.5])
    state = source.state_dict()
    copy = Curriculum(TASKS, seed=0)
    copy.load_state_dict(state)
    copy.update(TASKS[0], [True])
    assert source.success_rate(TASKS[0]) == pytest.approx(0.5)


def test_unseen_tasks_go_first():
    curriculum = Curriculum(TASKS, seed=0)
    seen = []
    for step in range(4):  # 4 x 5 draws see all 20 tasks, each once
        drawn = curriculum.draw(step, 5)
        seen += drawn
        for task in drawn:
            curriculum.update(task, [True, False])  # the best rate there is does not come before the unseen
    assert sorted(seen, key=TASKS.index) == TASKS


def test_unseen_and_seen_fill_one_draw_together():
    curriculum = visited([0.5] * 18)
    curriculum.tasks = TASKS
    drawn = curriculum.draw(0, 5)
    assert set(drawn[:2]) == set(TASKS[18:]) and len(set(drawn)) == 5


def test_a_task_whose_attempts_are_always_lost_takes_no_place_from_the_others():
    curriculum = Curriculum(TASKS, seed=0)
    lost = Counter()
    for step in range(100):
        for task in curriculum.draw(step, 5):
            lost[task.key] += task in TASKS[:4]
            curriculum.update(task, [] if task in TASKS[:4] else [True, False])
    assert 4 < sum(lost.values()) < 40, "a tenth as often as the others, if not never"
    curriculum.update(TASKS[0], [True])  # it broke by chance
    assert curriculum.weight(TASKS[0]) > FLOOR


def test_a_visit_whose_attempts_were_all_lost_says_nothing_of_a_task_that_was_seen():
    curriculum = visited([0.2])
    before = curriculum.success_rate(TASKS[0])
    curriculum.update(TASKS[0], [])
    assert curriculum.success_rate(TASKS[0]) == before


def test_draws_are_different_tasks():
    curriculum = visited([0.0, 0.2, 0.5, 0.8, 1.0, 0.5])
    for step in range(50):
        drawn = curriculum.draw(step, 4)
        assert len(set(drawn)) == len(drawn) == 4
    assert set(curriculum.draw(0, 100)) == set(TASKS[:6])  # fewer if there are no more
    assert curriculum.draw(0, 0) == []


def test_exclude():
    curriculum = visited([0.5] * 6)
    for step in range(50):
        assert not set(curriculum.draw(step, 3, exclude=set(TASKS[:3]))) & set(TASKS[:3])
    assert sorted(curriculum.draw(0, 9, exclude=TASKS[:4]), key=TASKS.index) == TASKS[4:6]
    assert curriculum.draw(0, 3, exclude=TASKS) == []


def test_weight_by_hand():
    # After many visits of ten attempts that fade by .8 a visit: 10 / (1 - .8) = 50 attempts count.
    # The rate is pulled to one half by half an imaginary attempt: (50 r + .25) / 50.5; the weight is 4 p (1 - p).
    for rate in (0.2, 0.5, 0.9):
        p = (50 * rate + 0.25) / 50.5
        curriculum = visited([rate])
        assert curriculum.success_rate(TASKS[0]) == pytest.approx(p, abs=1e-4)
        assert curriculum.weight(TASKS[0]) == pytest.approx(4 * p * (1 - p), abs=1e-3)
    for rate in (0.0, 1.0):  # 4 * .005 * .995 = .02 is under the floor
        assert visited([rate]).weight(TASKS[0]) == FLOOR
    fresh = Curriculum(TASKS, seed=0)
    assert fresh.success_rate(TASKS[0]) == 0.5 and fresh.weight(TASKS[0]) == 1.0
    fresh.update(TASKS[0], [True, False, True, True])
    assert fresh.success_rate(TASKS[0]) == pytest.approx(3.25 / 4.5)


def test_tasks_near_one_half_are_drawn_most_and_the_rest_stays_reachable():
    rates = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    curriculum = visited(rates)
    weights = [curriculum.weight(task) for task in curriculum.tasks]
    found = shares(curriculum)
    # One draw of one task is a draw in proportion to the weights: 4 standard errors of 4000 draws.
    for share, weight in zip(found, weights):
        p = weight / sum(weights)
        assert abs(share - p) < 4 * (p * (1 - p) / 4000) ** 0.5
    assert max(found) == found[3]
    assert found[0] > 0.01 and found[6] > 0.01


def test_old_outcomes_fade():
    """A policy that has learned a task is no longer held to what it could not do."""
    curriculum = visited([0.0])
    assert curriculum.success_rate(TASKS[0]) < 0.02
    for _ in range(4):
        curriculum.update(TASKS[0], [True] * 10)
    # 50 old attempts have faded to 50 * .8^4 = 20.5; the new ones count 10 * (1 + .8 + .64 + .512) = 29.5.
    assert curriculum.success_rate(TASKS[0]) == pytest.approx((29.52 + 0.5) / (50 + 1), abs=1e-3)


def test_disabled_is_uniform():
    """Whatever is known of the tasks, and without unseen ones going first."""
    curriculum = visited([0.0, 0.5, 1.0], enabled=False)
    curriculum.tasks = TASKS[:4]  # the fourth was never seen
    for share in shares(curriculum):
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    pairs = shares(curriculum, n=2, draws=2000)
    assert pairs == pytest.approx([0.5] * 4, abs=0.05)
