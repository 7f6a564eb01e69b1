"""Batches that are played beside the training, and what asks for them."""

import threading

import pytest

from minitau import cli, config
from minitau.ahead import Player
from minitau.curriculum import Curriculum
from minitau.engines import launch
from minitau.episode import BadInput, Task


def test_a_batch_that_was_started_is_played_once_and_beside():
    go, played = threading.Event(), []

    def play(number):
        if number == 2:
            assert go.wait(10)
        played.append((number, threading.current_thread() is threading.main_thread()))
        return f"batch {number}"

    player = Player(play)
    player.wait(lambda: None)  # there is nothing to wait for
    assert player.take(1) == "batch 1"
    player.start(2)
    assert played == [(1, True)]
    player.wait(go.set)  # what is to be done meanwhile is done
    assert player.take(2) == "batch 2" and player.take(3) == "batch 3"
    assert played == [(1, True), (2, False), (3, True)]


def test_what_goes_wrong_beside_is_raised_where_it_is_waited_for():
    def play(number):
        raise BadInput(f"no batch {number}")

    player = Player(play)
    player.start(4)
    with pytest.raises(BadInput, match="no batch 4"):
        player.wait(lambda: None)


def test_what_is_played_ahead_does_not_change_a_state_that_was_taken_before():
    tasks = [Task("desk", "train", str(i)) for i in range(3)]
    curriculum = Curriculum(tasks, seed=0)
    curriculum.update(tasks[0], [True, False])
    state = curriculum.state_dict()
    for task in tasks:
        curriculum.update(task, [True, True])
    assert state == {"tallies": {tasks[0].key: [1, 2]}}


SGLANG = {"model": "m", "out": "o", "engine": "sglang"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ahead": 1}, "add --engine-gpus or --engine-url"),
        ({"ahead": 1, "engine": "local"}, "--ahead is for --engine sglang"),
        ({"engine_gpus": ("1",), "engine": "local"}, "--engine-gpus is for --engine sglang"),
        ({"engine_gpus": ("1", "01")}, "a GPU is named twice"),
        ({"engine_gpus": ("1", "x")}, "GPUs are named by numbers"),
        ({"engine_gpus": ("1",), "engine_url": ("http://127.0.0.1:1",)}, "leave one out"),
        ({"engine_gpus": ("1",), "engine_sleep": True}, "--engine-sleep leaves nothing to --engine-gpus"),
        ({"ahead": 1, "engine_url": ("http://127.0.0.1:1",), "engine_sleep": True}, "nothing to --ahead"),
    ],
)
def test_settings_that_cannot_go_together(settings, said):
    with pytest.raises(BadInput, match=said):
        cli.check(config.GRPO(**{**SGLANG, **settings}))


def test_which_server_a_rank_asks(monkeypatch):
    def hosts(gpus, ranks, takes_weights=True):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        found = []
        for rank in range(ranks):
            monkeypatch.setenv("RANK", str(rank))
            found.append(launch.host_of_rank(gpus, takes_weights))
        return found

    assert hosts(("4", "5", "6", "7"), 4) == [0, 1, 2, 3]
    assert hosts(("7", "6"), 5) == [0, 1, 0, 1, 0]
    assert hosts(("0",), 1, takes_weights=False) == [0]  # an evaluation trains nowhere
    for gpus, ranks, takes_weights, said in (
        (("4", "3"), 4, True, "GPUs 0 to 3 are for the 4 ranks"),
        (("4", "5"), 1, True, "names 2 GPUs for 1 ranks"),
        (("4",), 2, False, "names 1 GPUs for 2 ranks"),
    ):
        with pytest.raises(BadInput, match=said):
            hosts(gpus, ranks, takes_weights)
