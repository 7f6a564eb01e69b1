"""Many commands at once: one-line scripts stand for what a study or the ablations run."""

import os
import signal
import subprocess
import time

import pytest

from minitau import parts
from minitau.episode import BadInput
from minitau.parts import Part

FIRST, NEXT = "demo", ("more", "less", "shuffled")


def some(tmp_path, **codes):
    """Of two seeds a first part and three that need it: of `codes`, or ones that leave their proof."""

    def part(seed, what, needs=()):
        proof = tmp_path / f"{seed}-{what}"
        code = codes.get(what, f"open({str(proof)!r}, 'x').close()")
        return Part(seed, what, ("-c", code), proof, needs)

    first = [part(seed, FIRST) for seed in "01"]
    return [*first, *(part(one.seed, what, (one.proof,)) for one in first for what in NEXT)]


def test_the_others_go_on_after_a_failure(tmp_path, capsys):
    failing = some(tmp_path, shuffled="print('out of luck'); raise SystemExit(4)")
    failed = parts.play(failing, tmp_path / "logs", jobs=3)
    assert sorted(map(str, failed)) == ["seed 0, shuffled", "seed 1, shuffled"]
    log = tmp_path / "logs" / "seed-0-shuffled.txt"
    shown = capsys.readouterr().out.splitlines()
    assert f"seed 0, shuffled: failed with status 4; see {log}" in shown
    typed, said = log.read_text().splitlines()
    assert typed.startswith("$ python -c ") and "out of luck" in typed and said == "out of luck"
    assert sum(": done in" in line for line in shown) == 6
    begun = [line.partition(":")[0] for line in shown if ": started" in line]
    assert begun[:2] == ["seed 0, demo", "seed 1, demo"], "in order"
    ended = {what: next(i for i, line in enumerate(shown) if f"seed 1, {what}: " in line) for what in (FIRST, "more")}
    assert ended[FIRST] < ended["more"]

    assert parts.play(some(tmp_path), tmp_path / "logs", jobs=3) == []
    shown = capsys.readouterr().out
    assert shown.count("done before") == 6 and shown.count("started") == 2


def test_where_nothing_is_done_the_first_failure_is_named(tmp_path):
    several = some(tmp_path)
    parts.require_something(several, [], tmp_path)
    with pytest.raises(
        BadInput, match=rf"nothing is done: seed 1, demo failed, and {tmp_path}/seed-1-demo.txt says why"
    ):
        parts.require_something(several, several[1:2], tmp_path)
    several[0].proof.touch()
    parts.require_something(several, several[1:2], tmp_path)


def test_what_needs_something_that_failed_is_not_begun(tmp_path, capsys):
    failing = some(tmp_path, demo="pass")  # it ends well, and leaves nothing
    assert [part.what for part in parts.play(failing, tmp_path / "logs", jobs=3)] == [FIRST, FIRST]
    assert "more" not in capsys.readouterr().out


def test_no_more_jobs_at_once_than_asked_for(tmp_path, monkeypatch):
    running, most, begin = [], [], parts.start

    def start(*args):
        running[:] = [process for process in running if process.poll() is None]
        running.append(begin(*args))
        most.append(len(running))
        return running[-1]

    monkeypatch.setattr(parts, "start", start)
    assert parts.play(some(tmp_path), tmp_path / "logs", jobs=1) == []
    assert most == [1] * 8


def test_an_interruption_leaves_nobody_running(monkeypatch, tmp_path):
    waiting = some(tmp_path, demo="import time; print('here', flush=True); time.sleep(60)")
    begun, popen, sleep, started = [], parts.start, time.sleep, time.perf_counter()

    def starting(*args):
        begun.append(popen(*args))
        return begun[-1]

    def interrupted(seconds):
        monkeypatch.setattr(parts.time, "sleep", sleep)
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "start", starting)
    monkeypatch.setattr(parts.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        parts.play(waiting, tmp_path / "logs", jobs=3)
    assert [process.returncode for process in begun] == [-signal.SIGTERM] * 2
    assert time.perf_counter() - started < 10


def test_a_command_gets_its_share_of_the_cores_and_finds_minitau_anywhere(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    code = "import os, minitau; open('threads', 'w').write(os.environ['OMP_NUM_THREADS'])"
    part = Part("", "both", ("-c", code), tmp_path / "here" / "threads", processes=2)
    assert parts.play([part], tmp_path / "logs", 2, cwd=tmp_path / "here") == []
    assert part.proof.read_text() == "3" and part.log(tmp_path / "logs").name == "both.txt"


def test_a_log_knows_the_commits(monkeypatch, tmp_path):
    names = iter(["aaa1111", "aaa1111", "bbb2222 with changes"])
    monkeypatch.setattr(parts, "commit", lambda: next(names))
    part = Part("0", "run", ("-c", "print('$ python  # no commit of ours')"), tmp_path / "never")
    for _ in range(3):  # each time it fails, and so is run again
        parts.play([part], tmp_path / "logs", jobs=1)
    assert parts.commits(part.log(tmp_path / "logs")) == ["aaa1111", "bbb2222 with changes"]
    assert parts.commits(tmp_path / "logs" / "nobody.txt") == []


def test_the_commit_is_gits_or_unknown(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("old")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert parts.commit() == "unknown"
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = parts.commit()
    (tmp_path / "file").write_text("new")
    assert len(clean) >= 7 and parts.commit() == f"{clean} with changes"
