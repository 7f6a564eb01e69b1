"""benchmarks/learns.py: a CPU goes the whole way, and a line through rewards says how much they rise."""

import json
import statistics

import numpy as np
import pytest
import warm
from conftest import FAKE_SGLANG, FOR_THE_FAKE

from benchmarks import learns
from minitau import parts
from minitau.episode import BadInput


@pytest.fixture
def commands(monkeypatch):
    """The commands that were run, in processes that stand at once."""
    seen = []

    def run(command, to):
        seen.append(command)
        done = warm.run(*command, **FOR_THE_FAKE)
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(parts, "run", run)
    return seen


def test_a_model_goes_from_random_weights_to_a_curve(tmp_path, commands, capsys):
    words = ["courier", "--shape", "tiny", "--seed", "3", "--engine-command", FAKE_SGLANG, "--out", str(tmp_path)]
    learns.main(words)
    found = json.loads(capsys.readouterr().out)
    assert [command[:3] for command in commands] == [
        ["-m", "minitau.tiny", "--out"],
        *4 * [["-m", "minitau.sft", "--out"]],
        ["train.py", "--stage", "sft"],
        ["train.py", "--stage", "grpo"],
    ]
    assert len((tmp_path / "demonstrations.jsonl").read_text().splitlines()) == 4 * 8
    lines = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert found["grpo"]["steps"] == 2 and found["grpo"]["episodes"] == sum(line["episodes"] for line in lines) > 0
    assert found["grpo"]["seconds"] == pytest.approx(sum(line["seconds"]["total"] for line in lines))
    mean = pytest.approx(statistics.fmean(line["reward"] for line in lines))
    ends = {"first": lines[0]["reward"], "last": lines[1]["reward"]}
    assert found["reward"] == {**ends, "first_10": mean, "last_10": mean}
    assert [found["grpo"][name] for name in ("fewest_a_step", "most_a_step")] == sorted(x["episodes"] for x in lines)
    assert found["sft"]["steps"] == 8 and found["seed"] == 3 and found["parameters"] > 100_000
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((tmp_path / "grpo" / "config.json").read_text())
    assert (config["seed"], config["lr"], config["dtype"]) == (3, 3e-5, "float32"), "a recipe's flag is lost"

    commands.clear()
    (tmp_path / "demonstrations.jsonl").unlink()  # as if it had been killed between the files of these
    (tmp_path / "demonstrations-3.jsonl").unlink()
    learns.main(words)
    assert [command[1] for command in commands] == ["minitau.sft"]
    assert json.loads(capsys.readouterr().out) == found
    commands.clear()
    learns.main(words)
    assert not commands and json.loads(capsys.readouterr().out) == found, "what is done was done again"
    for other in (["retail", *words[1:]], [*words, "--seed", "4"], [*words, "--ranks", "2"]):
        with pytest.raises(BadInput, match="was begun with other settings"):
            learns.main(other)
    with pytest.raises(BadInput, match="was not made by this command"):
        learns.main([*words, "--out", str(tmp_path / "grpo")])


def test_the_rise_of_a_line_and_its_interval():
    """Exact for a line; for noise around one, 95 of 100 intervals hold what is true."""
    assert learns.rise([0.1, 0.2, 0.3, 0.4]) == {
        "rises_by": pytest.approx(0.3),
        "give_or_take": pytest.approx(0, abs=1e-9),
    }
    assert learns.rise([0.1, 0.9]) == {}
    rng, held = np.random.default_rng(0), []
    for _ in range(2000):
        found = learns.rise((np.linspace(0.5, 0.6, 8) + rng.normal(0, 0.1, 8)).tolist())
        held.append(abs(found["rises_by"] - 0.1) <= found["give_or_take"])
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)
