"""What a run writes: files whole or not at all, lines that any reader of JSON takes, and where the disk is full."""

import json
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from minitau.episode import BadInput
from minitau.files import open_to_append, whole_lines, write_jsonl, written_whole
from minitau.log import Clock, MetricsLog, metrics_of
from minitau.script import run_script


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


def test_other_logs_get_every_number_and_a_resumed_run_goes_on_in_them(tmp_path, monkeypatch):
    begun, rows, scalars = [], [], []
    (tmp_path / "config.json").write_text('{"lr": 1.0}')

    def init(**settings):
        begun.append(settings)
        return SimpleNamespace(
            log=rows.append, define_metric=lambda name, step_metric: rows.append((name, step_metric))
        )

    def writer(folder, purge_step):
        begun.append((folder, purge_step))
        return SimpleNamespace(add_scalar=lambda *each: scalars.append(each))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    for step, done in ((1, 0), (2, 1)):
        log = MetricsLog(tmp_path, is_done=lambda s: s <= done, enabled=True, wandb=True, tensorboard=True)  # noqa: B023
        log.start("GRPO", 2, done)
        log.write({"step": step, "reward": 0.5, "share": {"rollout": 0.25}, "stops": {}, "note": "text"}, ("reward",))
        log.finish()
    first, board, again, board_again = begun
    assert first["id"] == again["id"] and again["resume"] == "allow" and again["config"] == {"lr": 1.0}
    assert board == (str(tmp_path / "tensorboard"), 1) and board_again[1] == 2
    flat = [{"step": step, "reward": 0.5, "share/rollout": 0.25} for step in (1, 2)]
    assert rows == [("*", "step"), flat[0], ("*", "step"), flat[1]]
    assert scalars == [(name, value, row["step"]) for row in flat for name, value in row.items()]


def test_a_share_is_the_part_of_a_step_that_a_phase_took():
    clock = Clock()
    for _ in range(2):
        with clock.phase("rollout"):
            time.sleep(0.02)
    with clock.phase("update"):
        time.sleep(0.01)
    time.sleep(0.02)
    found = clock.report()
    seconds, share = found["seconds"], found["share"]
    assert seconds["rollout"] >= 0.04 and seconds["update"] >= 0.01
    assert seconds["total"] >= seconds["rollout"] + seconds["update"] + 0.02
    assert share == {name: pytest.approx(seconds[name] / seconds["total"]) for name in ("rollout", "update")}


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
    many = "import sys; from minitau.script import run_script\n"
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


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_a_script_ends_with_what_its_body_says(returned, status):
    assert run_script("script", lambda argv: returned, []) == status


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
