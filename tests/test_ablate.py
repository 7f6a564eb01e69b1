"""The ablations: what each setting changes, how the work is cut, what may be said, and two settings for real."""

import dataclasses
import json
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import warm

from minitau import ablate, cli, config, demo
from minitau.ablations import SETTINGS, by_name, markdown, sentence
from minitau.episode import BadInput
from minitau.parts import commits
from minitau.script import run_script

PLACES = {"model", "out", "seed", "steps", "episodes"}


@pytest.fixture
def rft(tmp_path, tiny_dir):
    """The model of an RFT run that played 12 episodes, beside an SFT model, as a demo leaves them."""
    for stage in ("sft", "rft"):
        shutil.copytree(tiny_dir, tmp_path / "demo" / stage / "model")
    (tmp_path / "demo" / "rft" / "metrics.jsonl").write_text('{"step": 1, "episodes": 12}\n{"step": 2}\n')
    return tmp_path / "demo" / "rft" / "model"


def settings_of(part):
    """What train.py or eval.py makes of a part's command."""
    _, script, *flags = part.command
    return cli.parse_stage(flags)[1] if script == "train" else cli.parse(config.Evaluation, "", "", flags)


def cfg_of(rft, tmp_path, **changes):
    return ablate.Ablations(**{"model": str(rft), "out": str(tmp_path / "out"), **changes})


CHANGES = {
    "default": {},
    "shaping-none": {"shaping": "none"},
    "shaping-additive": {"shaping": "additive"},
    "no-group-std": {"divide_by_std": False},
    "no-curriculum": {"curriculum": False},
    "no-dynamic-sampling": {"dynamic_sampling": False},
    "sequence-mean": {"aggregation": "sequence-mean"},
    "dr-grpo": {"aggregation": "dr-grpo"},
    "group-size-4": {"group_size": 4, "tasks_per_step": 16},
    "group-size-16": {"group_size": 16, "tasks_per_step": 4},
    "rounded": {"engine_round": 3},
    "rounded-uncorrected": {"engine_round": 3, "importance_cap": 0.0, "sequence_low": 0.0, "sequence_high": 1e9},
    "single-call": {"dialect": "single-call"},
    "no-rft": {},
}


def test_every_setting_changes_what_it_says_and_nothing_else(rft, tmp_path):
    cfg = cfg_of(rft, tmp_path)
    runs = {part.what: settings_of(part) for part in ablate.all_parts(cfg, tmp_path / "out") if part.seed == "1"}
    base = dataclasses.asdict(runs["default"])
    assert (base["shaping"], base["importance_cap"], base["group_size"]) == ("gated", 2.0, 8), "the demo's GRPO"
    assert base["tasks"] == 264 and base["lr"] == 1e-4 and base["seed"] == 1
    for name, changes in CHANGES.items():
        found = dataclasses.asdict(runs[name])
        assert {key: found[key] for key in found if found[key] != base[key] and key not in PLACES} == changes
        assert found["tasks_per_step"] * found["group_size"] == 64, "a step's episodes are as many"
        wanted = {"single-call": "start/single-call/rft/model", "no-rft": "start/sft/model"}
        assert found["model"] == wanted.get(name, "start/rft/model")
        assert found["episodes"] == (3852 if name == "no-rft" else 3840) and found["steps"] == found["episodes"]
        assert found["resume"] and runs[f"{name}-eval"].resume, "what was interrupted goes on"
        evaluation = runs[f"{name}-eval"]
        assert evaluation.model == f"{found['out']}/model" and evaluation.dialect == found["dialect"]
        assert (evaluation.num_trials, evaluation.tasks, evaluation.temperature, evaluation.seed) == (4, 0, 1.0, 1)
    assert CHANGES.keys() == {setting.name for setting in SETTINGS}
    assert all(by_name(setting.against) for setting in SETTINGS)


def test_the_parts_of_a_setting_follow_each_other(rft, tmp_path):
    out = tmp_path / "out"
    parts = ablate.all_parts(cfg_of(rft, tmp_path), out)
    names = [(part.seed, part.what) for part in parts]
    assert len(set(names)) == len(names) == 3 + 2 * 3 * len(SETTINGS)
    made = [out / "start" / place / "config.json" for place in ("rft/model", "sft/model", "base")]
    for part in parts:  # what it needs is there at the start, or made by a part before it
        assert set(part.needs) <= set(made), part
        made.append(part.proof)
    assert not [word for part in parts for word in part.command if str(tmp_path) in word], "OUT may be moved"
    stages = [settings_of(part) for part in parts[1:3]]
    assert [type(each) for each in stages] == [config.SFT, config.RFT] and {s.dialect for s in stages} == {
        "single-call"
    }
    own = demo.Demo()
    assert (stages[0].epochs, stages[1].tasks, stages[1].samples) == (own.sft_epochs, own.rft_tasks, 4)


def test_a_plan_shows_what_is_chosen_and_writes_nothing(rft, tmp_path, capsys):
    flags = ["--model", str(rft), "--out", str(tmp_path / "out"), "--plan", "--only", "shaping,group-size"]
    ablate.main([*flags, "--seeds", "0,5"])
    shown = capsys.readouterr().out
    assert shown.count("python -m train") == shown.count("python -m eval") == 8 and "seed 5, group-size-16" in shown
    assert "default" not in shown and "16 commands, 8 of 8 GRPO runs" in shown and not (tmp_path / "out").exists()
    done = tmp_path / "out" / "shaping-none" / "seed-5" / "run" / "model" / "config.json"
    done.parent.mkdir(parents=True)
    done.touch()
    ablate.main([*flags, "--seeds", "0,5"])
    shown = capsys.readouterr().out
    assert "15 commands, 7 of 8 GRPO runs" in shown and "seed 5, shaping-none-eval" in shown


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--model", ""], "--model is needed"),
        (["--model", "nowhere"], "no model"),
        (["--only", "shaping,colour"], "no such group; there are default, shaping"),
        (["--episodes", "0"], "at least 1"),
        (["--seeds", "1,1"], "different whole numbers"),
        (["--only", "rft", "--sft", "nowhere"], "leave rft out of --only"),
        (["--only", "dialect", "--base", "nowhere"], "leave dialect out of --only"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(rft, tmp_path, capsys, flags, why):
    words = ["--model", str(rft), "--out", str(tmp_path / "out"), "--only", "default", *flags]
    assert run_script("minitau.ablate", ablate.main, words) == 2
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_rft_without_metrics_cannot_say_what_it_played(rft, tmp_path):
    (rft.parent / "metrics.jsonl").unlink()
    with pytest.raises(BadInput, match="leave rft out"):
        ablate.all_parts(cfg_of(rft, tmp_path), tmp_path)
    assert ablate.all_parts(cfg_of(rft, tmp_path, only=("shaping",)), tmp_path)


def test_out_keeps_what_runs_start_from(rft, tmp_path):
    """It is as good a start as the original, on another machine too, and takes no other model or size."""
    cfg, out = cfg_of(rft, tmp_path, only=("default", "rft")), tmp_path / "out"
    ablate.prepare(cfg, out)
    shutil.rmtree(rft.parent.parent)
    out = out.rename(tmp_path / "moved")
    moved = dataclasses.replace(cfg, model=str(out / "start" / "rft" / "model"), out=str(out))
    ablate.prepare(moved, out)
    assert ablate.budget(moved, by_name("no-rft")) == 3852
    with pytest.raises(BadInput, match="other settings"):
        ablate.prepare(dataclasses.replace(moved, tasks=7), out)
    other = tmp_path / "other" / "model"
    shutil.copytree(out / "start" / "rft" / "model", other)
    weights = next(other.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(BadInput, match="another rft/model"):
        ablate.prepare(dataclasses.replace(moved, model=str(other), only=("default",)), out)


# -- what may be said --------------------------------------------------------------------------------------


def change(low, high, *by_seed):
    return {"ci95": [low, high], "seeds": list(map(str, range(len(by_seed)))), "by_seed": dict(enumerate(by_seed))}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            change(0.01, 0.052, 0.01, 0.04, 0.03),
            "Better than the default by 1.0 to 5.2 points, and in each of 3 seeds.",
        ),
        (
            change(-0.2, -0.1, -0.1, -0.2, -0.1),
            "Worse than the default by 10.0 to 20.0 points, and in each of 3 seeds.",
        ),
        (
            change(-0.012, 0.034, 0.01, 0.01, 0.01),
            "No difference to the default that 3 seeds show; it may be up to 1.2 points worse or 3.4 better.",
        ),
        (
            change(0.0, 0.05, 0.01, 0.02, 0.03, 0.04),
            "No difference to the default that 4 seeds show; it may be up to 0.0 points worse or 5.0 better.",
        ),
        (
            change(0.01, 0.05, 0.09, 0.01, -0.01),
            "No difference to the default that 3 seeds show; the interval lies above 0, but the seeds disagree.",
        ),
        (
            change(-0.05, -0.01, -0.09, -0.01, 0.0),
            "No difference to the default that 3 seeds show; the interval lies below 0, but the seeds disagree.",
        ),
        (change(0.1, 0.5, 0.3, 0.3), "Nothing can be said yet: 2 of 3 seeds."),
        (None, "Not compared: there is no seed that the default has as well."),
    ],
)
def test_a_sentence_says_what_the_interval_and_the_seeds_carry(found, said):
    assert sentence("the default", found) == said


# -- two settings at their smallest ------------------------------------------------------------------------

SHORT = "--max-turns 2 --max-new-tokens 8"
SMALL = {
    "grpo": f"--lr 1e-3 --tasks 6 --no-screen --tasks-per-step 2 --group-size 2 --no-dynamic-sampling {SHORT}",
    "eval": f"--temperature 1 --num-trials 2 {SHORT}",
}


def warmly(command, *, cwd, env, stdout, **_):
    return warm.Script(*command[1:], cwd=cwd, stdout=stdout, stderr=stdout, **env)


def test_two_settings_from_one_model(rft, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo, "FLAGS", SMALL)
    monkeypatch.setattr(ablate, "SETTINGS", [by_name("default"), by_name("rounded")])
    monkeypatch.setattr("minitau.parts.subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": warmly}))
    out = tmp_path / "out"
    flags = ["--model", str(rft), "--out", str(out), "--episodes", "4", "--tasks", "1", "--jobs", "2", "--seeds", "7"]
    ablate.main([*flags, "--only", "default"])
    first = json.loads((out / "results.json").read_text())["rows"]
    assert [row["setting"] for row in first] == ["default"]
    ablate.main(flags)
    shown = capfd.readouterr().out
    assert "seed 7, default: done before\nseed 7, default-eval: done before\n" in shown
    base, rounded = json.loads((out / "results.json").read_text())["rows"]
    assert base == first[0] and base["difference"] is None
    assert rounded["difference"]["over"] == "default" and rounded["difference"]["seeds"] == ["7"]
    for row in (base, rounded):
        assert (
            row["episodes"] == {"7": 4} and row["tasks"] == 3 and row["trials"] == 2 and row["by_seed"].keys() == {"7"}
        )
        assert row["commits"] == commits(out / "logs" / f"seed-7-{row['setting']}.txt") != []
    assert base["drift"] < 1e-4 < rounded["drift"]
    table = (out / "table.md").read_text()
    assert table in shown and "--seeds 7 --episodes 4 --tasks 1" in table and str(tmp_path) not in table
    assert "Nothing can be said yet: 1 of 3 seeds." in table and "Mean drift" in table


def test_a_table_has_a_line_a_row_and_its_notes():
    row = {
        "group": "rft",
        "setting": "no-rft",
        "label": "SFT, then GRPO",
        "flags": "",
        "tasks": 192,
        "trials": 4,
        "pass@1": 0.9,
        "ci95": [0.875, 0.92],
        "by_seed": {"0": 0.91, "1": 0.89},
        "episodes": {"0": 4040, "1": 4032},
        "drift": 1e-7,
        "commits": ["abc1234"],
        "difference": {"gain": -0.0312, "ci95": [-0.05, -0.01]},
        "sentence": "So it is.",
    }
    dialect = {**row, "setting": "single-call", "flags": "--dialect single-call", "difference": None}
    text = markdown([row, dialect], "python -m minitau.ablate")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 4
    scores = "90.0 [87.5..92.0] | 0: 91.0 1: 89.0 | 4032..4040 | -3.1 [-5.0..-1.0]"
    assert lines[2] == f"| SFT, then GRPO |  | {scores} | abc1234 | So it is. |"
    assert "plays RFT's episodes in addition." in text and "192 held-out tasks, 4 trials" in text
    assert "Mean drift" not in text, "it is told where an engine was made to drift"
