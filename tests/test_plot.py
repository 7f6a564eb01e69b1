"""Curves: which runs are seeds of one thing, what their mean and its interval are, and what stands in the picture."""

import json
import math
import statistics
from random import Random

import pytest

from minitau import plot
from minitau.episode import BadInput
from minitau.script import run_script


@pytest.fixture
def make(tmp_path):
    def run(name, steps=4, seed=0, rewards=None, **settings):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        own = {"stage": "grpo", "seed": seed, "out": str(folder), "model": "base", "lr": 1e-4, **settings}
        (folder / "config.json").write_text(json.dumps(own))
        lines = [line(step, rewards[step - 1] if rewards else 0.1 * step + 0.05 * seed) for step in range(1, steps + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
        return folder

    return run


def line(step, reward):
    seconds = {"rollout": 6.0, "logprobs": 1.0, "update": 2.0, "sync": 0.001, "total": 10.0}
    numbers = {"reward": reward, "pass_rate": reward, "partial": 0.5, "drift": 1e-6 * step, "entropy": 1 / step}
    return {"step": step, **numbers, "length_mean": 100.0, "length_max": 150, "seconds": seconds}


def test_seeds_are_one_curve_and_other_settings_another(make):
    folders = [make("a", seed=0), make("b", seed=1), make("c", seed=2, lr=3e-4), make("d", seed=0, lr=3e-4, keep=9)]
    groups = plot.groups_of(folders)
    assert [(group.name, len(group.runs)) for group in groups] == [("lr 0.0001", 2), ("lr 0.0003", 2)]
    assert str(groups[0]) == "lr 0.0001, mean of 2 seeds and its 95% interval"
    assert [len(group.runs) for group in plot.groups_of(folders, together=True)] == [4]
    assert [str(group) for group in plot.groups_of(folders[:1])] == ["a"]


def test_groups_with_one_name_are_told_apart_by_their_paths(make):
    """As in an ablation's folder, whose runs are OUT/SETTING/seed-N/run."""
    settings = [{}, {"engine_round": 3}, {"engine_round": 3, "importance_cap": 0, "sequence_low": 0}]
    folders = [
        make(f"{name}/seed-{seed}/run", seed=seed, **more) for name, more in zip("abc", settings) for seed in (0, 1)
    ]
    root = folders[0].parents[2]
    assert [group.name for group in plot.groups_of(folders)] == [f"{root}/{name}/*/run" for name in "abc"]
    more = [make(f"d/{i}/run", seed=i % 2, **settings[1 + i // 2]) for i in range(4)]  # whose paths say nothing
    assert [group.name for group in plot.groups_of([folders[0], *more])] == [
        str(folders[0]),
        str(more[0]),
        str(more[2]),
    ]


def test_files_are_known_by_what_they_hold_and_models_by_their_path(make):
    by_file = [make(str(i), seed=i, task_file=f"{i}.jsonl", task_file_sha256=held) for i, held in enumerate("aab")]
    assert [len(group.runs) for group in plot.groups_of(by_file)] == [2, 1]
    by_model = [make(f"m{i}", seed=i, model=f"study/seed-{i}/model", model_sha256={"x": str(i)}) for i in range(3)]
    assert len(plot.groups_of(by_model)) == 1, "what follows from the seed makes no difference"


def test_the_same_seed_twice_is_no_second_seed(make):
    twice = [make("a"), make("b")]
    with pytest.raises(BadInput, match=r"a and .*b have the same settings and seed; leave one out"):
        plot.groups_of(twice)
    assert len(plot.groups_of(twice, together=True)) == 1, "if that is asked for"


def test_each_seed_may_start_from_its_own_model_but_not_from_another_one(make):
    own = [make(f"a{i}", seed=i, model=f"study/seed-{i}/rft/model") for i in range(3)]
    assert len(plot.groups_of(own)) == 1
    other = make("b", seed=3, model="study/seed-3/sft/model")
    assert [len(group.runs) for group in plot.groups_of([*own, other])] == [3, 1]
    assert len(plot.groups_of([make("c", model="Qwen3-4B"), make("d", seed=1, model="Qwen3-8B")])) == 2


def test_the_mean_and_its_interval(make):
    rewards = [0.2, 0.5, 0.8]
    folders = [make(str(i), seed=i, steps=3 + i, rewards=[value] * 5) for i, value in enumerate(rewards)]
    (group,) = plot.groups_of(folders)
    points = plot.curve(group, "reward")
    assert [step for step, _, _ in points] == [1, 2, 3], "only steps that all seeds have: else a mean would jump"
    assert points[0][1] == pytest.approx(0.5)
    assert points[0][2] == pytest.approx(4.303 * statistics.stdev(rewards) / math.sqrt(3))
    assert plot.half_width([0.3]) == 0 and plot.half_width([0.3, 0.3]) == 0
    # The interval of a normal sample's mean covers the truth 95 times in 100, whatever the number of seeds.
    rng = Random(0)
    for n in (2, 3, 5, 12):
        samples = [[rng.gauss(0, 1) for _ in range(n)] for _ in range(2000)]
        covered = statistics.fmean(abs(statistics.fmean(each)) <= plot.half_width(each) for each in samples)
        assert 0.93 < covered < 0.97, n


def test_values_that_are_missing_or_not_finite_are_left_out(make):
    folder = make("a", rewards=[0.1, float("nan"), 0.3, 0.4])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "loss": 1.0}) + '\n{"step": 6, "rew')  # and one that is being written
    (group,) = plot.groups_of([folder])
    assert [point[:2] for point in plot.curve(group, "reward")] == [(1, 0.1), (3, 0.3), (4, 0.4)]
    assert plot.shares(group) == {"rollout": 0.6, "logprobs": 0.1, "update": 0.2}


def test_the_picture(make, tmp_path, monkeypatch, capsys):
    """The curves that are drawn are those of the runs, in panels that say what they are."""
    from matplotlib import pyplot

    seen = {}
    monkeypatch.setattr(pyplot, "close", lambda figure: seen.update(figure=figure))
    folders = [make("a", seed=0), make("b", seed=1), make("c", lr=3e-4)]
    out = tmp_path / "curves.png"
    assert run_script("plot", plot.main, [*map(str, folders), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size < 300_000
    panels = {axes.get_title(loc="left").split(" (")[0].split(",")[0]: axes for axes in seen["figure"].axes}
    names = ["reward", "pass rate", "drift", "entropy", "tokens of an episode", "where the time went"]
    assert list(panels) == names
    mean, partial, other, _ = panels["reward"].get_lines()
    assert mean.get_ydata() == pytest.approx([0.125, 0.225, 0.325, 0.425]) and list(partial.get_ydata()) == [0.5] * 4
    assert other.get_ydata() == pytest.approx([0.1, 0.2, 0.3, 0.4]) and mean.get_color() != other.get_color()
    assert len(panels["reward"].collections) == 1, "a band for the two seeds, and none for the single run"
    assert [text.get_text() for text in panels["where the time went"].texts][:3] == ["60%", "10%", "20%"]
    assert "lr 0.0001, mean of 2 seeds and its 95% interval (4 steps); lr 0.0003 (4 steps)" in capsys.readouterr().out


def refused(capsys, *flags):
    assert run_script("plot", plot.main, [str(flag) for flag in flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_bad_input_is_one_line(make, tmp_path, capsys):
    assert "which runs?" in refused(capsys)
    assert "no such folder" in refused(capsys, tmp_path / "nowhere")
    assert "no finished step" in refused(capsys, make("empty", steps=0))
    sft = make("sft")
    (sft / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert "no step of these runs has any of reward" in refused(capsys, sft, "--out", tmp_path / "x.png")
    for line in (b"nonsense", b"{}", b"[]", b"\xff"):
        (sft / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n' + line + b"\n")
        assert "metrics.jsonl, line 2: not" in refused(capsys, sft)
    for name in (tmp_path / "x", tmp_path / "x.jpg", tmp_path, tmp_path / "nowhere" / "x.png"):
        assert "ends in .png, in a folder that is there" in refused(capsys, sft, "--out", name)
    (sft / "config.json").write_text("{")
    assert "not a run's settings" in refused(capsys, sft)
    assert not (tmp_path / "x.png").exists()
    with pytest.raises(BadInput):
        plot.read(tmp_path)
