"""Batches that are played beside the training, and what asks for them."""

import threading

import pytest
import torch

from minitau import cli, config
from minitau.ahead import Player
from minitau.curriculum import Curriculum
from minitau.engines import launch
from minitau.episode import BadInput, Task
from minitau.model import ModelConfig


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
    done = []
    player.wait(lambda: (go.set(), done.append(player.thread.is_alive())))  # what is to be done meanwhile is done
    assert done[0] and not done[-1], "and once more when all has been played"
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
        ({"engine_tp": 2, "engine": "local"}, "--engine-tp is for --engine sglang"),
        ({"engine_tp": 2, "engine_url": ("http://127.0.0.1:1",)}, "--engine-tp is for servers that are started"),
        ({"engine_tp": 0}, "--engine-tp is 0; it must be at least 1"),
    ],
)
def test_settings_that_cannot_go_together(settings, said):
    with pytest.raises(BadInput, match=said):
        cli.check(config.GRPO(**{**SGLANG, **settings}))


def test_which_server_a_rank_asks(monkeypatch):
    def hosts(gpus, ranks, takes_weights=True, tp=1):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        cfg = config.GRPO(engine_gpus=gpus, engine_tp=tp)
        found = []
        for rank in range(ranks):
            monkeypatch.setenv("RANK", str(rank))
            found.append(launch.host_of_rank(cfg, takes_weights))
        return found

    assert hosts(("4", "5", "6", "7"), 4) == [0, 1, 2, 3]
    assert hosts(("7", "6"), 5) == [0, 1, 0, 1, 0]
    assert hosts(("0",), 1, takes_weights=False) == [0]  # an evaluation trains nowhere
    assert hosts((), 3) == [None] * 3
    assert hosts((), 6, tp=2) == [0, 0, 2, 2, 4, 4] and hosts((), 2, takes_weights=False, tp=2) == [0, 0]
    assert hosts(("6", "7", "4", "5"), 4, tp=2) == [0, 1, 0, 1]
    assert hosts(("0", "1"), 1, takes_weights=False, tp=2) == [0]
    for gpus, ranks, takes_weights, tp, said in (
        (("4", "3"), 4, True, 1, "GPUs 0 to 3 are for the 4 ranks"),
        (("4", "03"), 4, True, 1, "GPUs 0 to 3 are for the 4 ranks"),
        (("4", "5"), 1, True, 1, "names 2 GPUs for 1 ranks"),
        (("4",), 2, False, 1, "names 1 GPUs for 2 ranks"),
        (("4", "5", "6"), 4, True, 2, "each server needs --engine-tp 2 GPUs that follow each other"),
        (("4", "6"), 4, True, 2, "each server needs --engine-tp 2 GPUs that follow each other"),
        (("1", "2", "3", "4"), 1, True, 2, "names 4 GPUs for 1 ranks: a server on every 2"),
        (("0", "1"), 2, False, 2, "names 2 GPUs for 2 ranks: a server on every 2"),
    ):
        with pytest.raises(BadInput, match=said):
            hosts(gpus, ranks, takes_weights, tp)


def launched(monkeypatch, rank, ranks, **settings):
    """{flag: value} of the server that a rank starts."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(launch.parallel, "device", lambda: torch.device("cuda", rank))
    cfg = config.GRPO(model="m", engine="sglang", engine_command="serve", concurrency=10, **settings)
    words = launch.launch_command(cfg, 30000, takes_weights=True)[1:]
    return {word: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}


@pytest.mark.parametrize(
    ("rank", "ranks", "settings", "gpu", "askers", "tp"),
    [
        (1, 2, {}, "1", 1, None),
        (2, 4, {"engine_tp": 2}, "2", 2, "2"),
        (1, 4, {"engine_tp": 2, "engine_gpus": ("4", "5", "6", "7")}, "6", 2, "2"),
        (0, 3, {"engine_tp": 2, "engine_gpus": ("3", "4")}, "3", 3, "2"),
    ],
)
def test_where_a_server_is_and_for_how_many_ranks(monkeypatch, rank, ranks, settings, gpu, askers, tp):
    flags = launched(monkeypatch, rank, ranks, **settings)
    assert (flags["--base-gpu-id"], flags.get("--tp-size")) == (gpu, tp)
    assert flags["--max-running-requests"] == str(10 * askers)


@pytest.mark.parametrize(
    ("tp", "ranks", "said"),
    [
        (2, 3, "3 ranks cannot form groups of 2"),
        (4, 2, "2 ranks cannot form groups of 4"),
        (3, 3, "does not divide the 8 key/value heads"),
        (16, 16, "does not divide the 8 key/value heads"),
    ],
)
def test_a_model_and_ranks_that_no_group_can_share(tp, ranks, said):
    launch.check_tp(8, 16, ModelConfig())
    with pytest.raises(BadInput, match=f"--engine-tp {tp}.*{said}"):
        launch.check_tp(tp, ranks, ModelConfig())
