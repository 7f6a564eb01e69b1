"""What a run writes: files whole or not at all, lines that any reader of JSON takes, and where the disk is full."""

import json

import pytest

from minitau.log import MetricsLog, metrics_of, write_jsonl, written_whole


def test_numbers_that_json_cannot_say_are_null(tmp_path):
    log = MetricsLog(tmp_path, last_step=0, enabled=True)
    log.write({"step": 1, "grad_norm": float("nan"), "share": {"a": float("inf")}, "versions": [1, 0.5]}, ())
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(line, parse_constant=refuse) == {
        "step": 1,
        "grad_norm": None,
        "share": {"a": None},
        "versions": [1, 0.5],
    }


def test_a_resumed_run_drops_the_steps_that_come_again(tmp_path):
    write_jsonl(tmp_path / "metrics.jsonl", ({"step": step} for step in range(1, 6)))
    MetricsLog(tmp_path, last_step=3, enabled=False)
    assert len(metrics_of(tmp_path / "metrics.jsonl")) == 5, "only the first rank writes"
    MetricsLog(tmp_path, last_step=3, enabled=True)
    assert [row["step"] for row in metrics_of(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_file_is_whole_or_what_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"

    def rows(count):
        yield from ({"i": i} for i in range(count))
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        write_jsonl(path, rows(3))
    assert list(tmp_path.iterdir()) == [], "nothing is left of it"
    write_jsonl(path, [{"i": 7}])
    with pytest.raises(OSError, match="went away"):
        write_jsonl(path, rows(3))
    with pytest.raises(FileNotFoundError), written_whole(path):
        pass  # a block that wrote nothing
    assert path.read_text() == '{"i": 7}\n' and list(tmp_path.iterdir()) == [path]
