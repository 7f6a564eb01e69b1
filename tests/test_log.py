"""What a run writes: files whole or not at all, lines that any reader of JSON takes, and where the disk is full."""

import json
import signal
import socket
import subprocess
import sys

import pytest

from minitau.episode import BadInput
from minitau.log import MetricsLog, metrics_of, open_to_append, run_script, whole_lines, write_jsonl, written_whole


def test_numbers_that_json_cannot_say_are_null(tmp_path):
    log = MetricsLog(tmp_path, is_done=lambda step: False, enabled=True)
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
    MetricsLog(tmp_path, is_done=lambda step: step <= 3, enabled=False)
    assert len(metrics_of(tmp_path / "metrics.jsonl")) == 5, "only the first rank writes"
    MetricsLog(tmp_path, is_done=lambda step: step <= 3, enabled=True)
    assert [row["step"] for row in metrics_of(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_an_empty_line_is_none_and_moves_no_number(tmp_path):
    """People empty a line where they were told to remove it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n  \n{"step": 2}\n{"ste')
    assert [row["step"] for row in metrics_of(path)] == [1, 2]
    with open_to_append(path) as file:
        file.write('{"step": 3}\n')
    assert whole_lines(path) == ['{"step": 1}', '{"step": 2}', '{"step": 3}'], "only the half line goes"
    for damaged in ("{", "[" * 100_000):
        path.write_text(f'{{"step": 1}}\n\n{damaged}\n')
        with pytest.raises(BadInput, match="line 3: not a step's metrics"):
            metrics_of(path)


def test_a_reader_who_has_seen_enough_is_no_error():
    """As in `python -m minitau.view RUN | head -1`. A broken pipe that is not stdout is one."""
    many = "import sys; from minitau.log import run_script\n"
    many += "sys.exit(run_script('x', lambda argv: print('word\\n' * int(argv[0])), sys.argv[1:]))"
    for lines in ("100000", "3"):
        process = subprocess.Popen(
            [sys.executable, "-c", many, lines], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(60) == 128 + signal.SIGPIPE
        process.stderr.close()

    end, other = socket.socketpair()
    other.close()
    done = subprocess.run([sys.executable, "-c", many, "100000"], stdout=end, stderr=subprocess.PIPE, timeout=60)
    end.close()
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")

    def broken(argv):
        raise BrokenPipeError("Broken pipe of a server")

    assert run_script("x", broken, []) == 1


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
