"""eval.py in process: its table, its files, and that an interrupted evaluation goes on without playing twice."""

import itertools
import json
import signal
import time
from collections import Counter, defaultdict

import pytest
import warm

import eval as script
from minitau import report, rollout
from minitau.engines import local
from minitau.envs.courier import Courier
from minitau.envs.courier.world import IDS
from minitau.episode import EnvError, Evaluation, Stop, Task, Trajectory, UserError
from minitau.estimators import bootstrap_interval, pass_at_k, pass_hat_k
from minitau.files import whole_lines
from minitau.script import run_script

KEYS = {"stage", "domain", "split", "tasks", "trials", "pass@1", "pass@4", "pass^4", "ci95", "seconds"}


@pytest.fixture
def plays(monkeypatch):
    """The (task, agent, seed) of every script that is played during the test."""
    played, demonstrate = [], Courier.demonstrate

    def counted(self, task, agent, seed):
        played.append((task, agent, seed))
        return demonstrate(self, task, agent, seed)

    monkeypatch.setattr(Courier, "demonstrate", counted)
    return played


def run(out, *flags):
    """(exit status, rows of results.json) of one evaluation."""
    status = run_script("script", script.main, ["--out", str(out), *map(str, flags)])
    path = out / "results.json"
    return status, json.loads(path.read_text()) if path.is_file() else None


def episodes(out):
    """The trajectories on disk, from whole lines only."""
    lines = [line for path in out.glob("episodes-*.jsonl") for line in path.read_text().splitlines()]
    return [Trajectory.from_json(json.loads(line)) for line in lines]


def test_the_gold_script_solves_everything(tmp_path, capsys):
    status, rows = run(tmp_path, "--agent", "gold", "--tasks", 3, "--num-trials", 4, "--stage", "ceiling")
    assert status == 0
    assert [row["domain"] for row in rows] == ["claims", "desk", "locker", "all"]
    for row in rows:
        assert row.keys() >= KEYS
        assert row["stage"] == "ceiling" and row["split"] == "test" and row["trials"] == 4
        assert row["tasks"] == (9 if row["domain"] == "all" else 3)
        assert row["pass@1"] == row["pass@4"] == row["pass^4"] == 1.0 and row["ci95"][1] == 1.0
        assert row["errors"] == 0 and row["seconds"] >= 0
    assert len(episodes(tmp_path)) == 36
    shown = capsys.readouterr().out
    assert "ceiling" in shown and "100.0 [66,100]" in shown
    assert "courier, split test, 4 trials a task, seed 0." in shown and "policy" not in shown
    assert "all: the mean over all tasks" in " ".join(shown.split())


def test_refusing_is_hardly_ever_paid(tmp_path):
    status, rows = run(tmp_path, "--agent", "refuse", "--tasks", 24, "--num-trials", 1)
    assert status == 0
    row = rows[-1]
    assert row["stage"] == "refuse" and row["domain"] == "all" and row["tasks"] == 72
    assert 0.0 <= row["ci95"][0] <= row["pass@1"] <= row["ci95"][1] < 0.2
    assert set(row["stops"]) == {"user_stop"}


def test_one_domain_is_one_row(tmp_path):
    _, rows = run(tmp_path, "--agent", "transfer", "--domains", "desk", "--tasks", 4, "--num-trials", 2)
    assert [(row["domain"], row["stage"], row["trials"]) for row in rows] == [("desk", "transfer", 2)]
    assert "pass^2" in rows[0] and "pass@4" not in rows[0]


def test_a_policy_plays(tmp_path, tiny_dir):
    flags = ("--model", tiny_dir, "--domains", "desk", "--tasks", 2, "--max-turns", 2, "--max-new-tokens", 8)
    flags += ("--no-floors",)
    status, rows = run(tmp_path / "a", *flags)
    assert status == 0 and rows[0].keys() >= KEYS and not (tmp_path / "a" / "floors").exists()
    assert [(row["stage"], row["tasks"], row["trials"]) for row in rows] == [("policy", 2, 4)]
    played = episodes(tmp_path / "a")
    assert len(played) == 8
    assert all(t.turns and len(t.ids) == len(t.said) == len(t.logprobs) for t in played)
    assert {t.stop for t in played} <= {Stop.MAX_TURNS, Stop.USER_STOP, Stop.BAD_CALLS}
    # The same settings give the same episodes, to the last bit; another seed gives others.
    run(tmp_path / "b", *flags)
    run(tmp_path / "c", *flags, "--seed", 1)

    def logprobs(folder):
        return {(t.task.key, t.sample): t.logprobs for t in episodes(tmp_path / folder)}

    assert logprobs("a") == logprobs("b") != logprobs("c")


def test_resuming_plays_only_what_is_missing(tmp_path, plays, capsys):
    flags = ("--agent", "flawed", "--domains", "desk", "--tasks", 5, "--num-trials", 2)
    _, rows = run(tmp_path, *flags)
    path = tmp_path / "episodes-0.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(plays) == len(lines) == 10

    # Without --resume nothing is touched.
    assert run(tmp_path, *flags)[0] == 2
    assert path.read_bytes() == whole and "--resume" in capsys.readouterr().err

    # A finished one has nothing left to do.
    plays.clear()
    assert run(tmp_path, *flags, "--resume")[0] == 0
    assert plays == [] and path.read_bytes() == whole

    # One episode is missing, and a crash has cut the last line in half.
    path.write_bytes(b"".join([*lines[:3], *lines[4:9], lines[9][: len(lines[9]) // 2]]))
    (tmp_path / "results.json").unlink()
    status, again = run(tmp_path, *flags, "--resume")
    assert status == 0 and len(plays) == 2
    assert [(task.id, seed) for task, _, seed in plays] == [
        (json.loads(line)["task"]["id"], f"0:eval:desk/test/{json.loads(line)['task']['id']}:1")
        for line in (lines[3], lines[9])
    ]
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]


@pytest.mark.parametrize("left", [b"", b"half a line without an end"])
def test_a_file_with_nothing_whole_in_it_is_begun_anew(tmp_path, plays, left):
    flags = ("--agent", "gold", "--domains", "desk", "--tasks", 1, "--num-trials", 1)
    run(tmp_path, *flags)
    (tmp_path / "episodes-0.jsonl").write_bytes(left)
    assert run(tmp_path, *flags, "--resume")[0] == 0
    assert len(plays) == 2 and len(episodes(tmp_path)) == 1


def test_a_damaged_line_costs_one_episode(tmp_path, capsys):
    run(tmp_path, "--agent", "gold", "--tasks", 1, "--num-trials", 1)
    path = tmp_path / "episodes-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:40] + "\n" + lines[2])
    capsys.readouterr()
    assert run(tmp_path, "--agent", "gold", "--tasks", 1, "--num-trials", 1, "--resume")[0] == 2
    assert f"{path}, line 2: no episode" in (line := capsys.readouterr().err) and "remove the line" in line
    for left in (lines[0] + lines[2], lines[0] + "\n" + lines[2]):  # the line is removed, or emptied
        path.write_text(left)
        assert run(tmp_path, "--agent", "gold", "--tasks", 1, "--num-trials", 1, "--resume")[0] == 0
        assert len(report.read_episodes(tmp_path)) == 3


def test_no_room_for_a_reply_is_no_score(tmp_path, tiny_dir, capsys):
    flags = ("--model", tiny_dir, "--tasks", 1, "--num-trials", 1, "--max-tokens", 5, "--no-floors")
    status, rows = run(tmp_path, *flags)
    assert status == 1 and rows is None and "raise --max-tokens" in capsys.readouterr().err


def test_a_policy_resumes_too(tmp_path, tiny_dir, monkeypatch):
    flags = ("--model", tiny_dir, "--domains", "desk", "--tasks", 2, "--max-turns", 1, "--max-new-tokens", 4)
    run(tmp_path, *flags)
    path = tmp_path / "episodes-0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    sessions = []
    generate = local.LocalEngine.generate

    def counted(self, prompt_ids, sampling, *, session, seed):
        sessions.append(session)
        return generate(self, prompt_ids, sampling, session=session, seed=seed)

    monkeypatch.setattr(local.LocalEngine, "generate", counted)
    assert run(tmp_path, *flags, "--resume")[0] == 0
    assert len(sessions) == len(set(sessions)) == 3
    assert path.read_bytes().startswith(b"".join(lines[:5]))
    played = {(t.task.key, t.sample) for t in episodes(tmp_path)}
    assert len(played) == len(episodes(tmp_path)) == 8


def test_a_policy_is_shown_beside_the_floors(tmp_path, tiny_dir, plays, capsys):
    """On the same tasks, once each, kept in the run's folder; and their rows come before the policy's."""
    flags = ("--model", tiny_dir, "--domains", "desk,locker", "--tasks", 12, "--num-trials", 2, "--temperature", 0.5)
    flags += ("--max-turns", 1, "--max-new-tokens", 4, "--max-tokens", 1500)
    status, rows = run(tmp_path, *flags)
    assert status == 0
    order = [(row["stage"], row["domain"]) for row in rows]
    assert order == [(s, d) for s in ("refuse", "transfer", "policy") for d in ("desk", "locker", "all")]
    assert all(row["tasks"] == (24 if row["domain"] == "all" else 12) and row["trials"] == 2 for row in rows)
    assert Counter(agent for _, agent, _ in plays) == {"refuse": 24, "transfer": 24}
    transfer = rows[5]
    assert 0 < transfer["pass@1"] == transfer["pass@2"] == transfer["pass^2"] < 0.5
    alone = run(tmp_path / "alone", "--agent", "transfer", *flags[2:])[1][-1]  # every trial played
    same = ("pass@1", "pass^2", "intervals", "tasks_by_k", "stops", "episodes")
    assert {name: alone[name] for name in same} == {name: transfer[name] for name in same}
    shown = capsys.readouterr().out
    assert f"2 trials a task, seed 0, policy {tiny_dir}, temperature 0.5." in " ".join(shown.split())
    assert all(len(line) <= 120 for line in shown.splitlines() if str(tiny_dir) not in line)
    plays.clear()
    assert run(tmp_path, *flags, "--resume")[0] == 0 and plays == []


def test_every_score_has_its_interval(tmp_path, capsys):
    _, rows = run(tmp_path, "--agent", "flawed", "--tasks", 8, "--num-trials", 3)
    shown = [line.split() for line in capsys.readouterr().out.split("\n\n")[-1].splitlines()]
    assert shown[0] == ["flawed", "k=1", "k=2", "k=3"] and len(shown) == 9
    for (domain, name, *cells), (row, sign) in zip(shown[1:], itertools.product(rows, "@^")):
        assert (domain, name) == (row["domain"], f"pass{sign}k")
        assert [float(cell) for cell in cells[::2]] == [round(100 * row[f"pass{sign}{k}"], 1) for k in (1, 2, 3)]
    assert [row["domain"] for row in rows] == ["claims", "desk", "locker", "all"]
    for row in rows:
        played = [t for t in episodes(tmp_path) if row["domain"] in ("all", t.task.domain)]
        solved = Counter({t.task.key: 0 for t in played})
        solved.update(t.task.key for t in played if t.success)
        pairs = [(3, c) for c in solved.values()]
        assert row["intervals"].keys() == {f"pass{sign}{k}" for sign in "@^" for k in (1, 2, 3)}
        for k in (1, 2, 3):
            assert row["intervals"][f"pass@{k}"] == bootstrap_interval(pairs, pass_at_k, k)
            assert row["intervals"][f"pass^{k}"] == bootstrap_interval(pairs, pass_hat_k, k)
        assert all(low <= row[name] <= high for name, (low, high) in row["intervals"].items())
        assert row["ci95"] == row["intervals"]["pass@1"] == row["intervals"]["pass^1"]
    # Overall is the mean over tasks, so a domain counts as much as it has tasks.
    assert rows[3]["pass@1"] == pytest.approx(sum(row["pass@1"] for row in rows[:3]) / 3)


def test_greedy_says_the_same_in_every_trial(tmp_path, tiny_dir, capsys):
    flags = ("--model", tiny_dir, "--domains", "desk", "--tasks", 2, "--num-trials", 6, "--max-turns", 1)
    flags += ("--max-new-tokens", 6, "--no-floors")

    def first_replies(name, *more):
        """What was said first, by what had been heard: a customer draws from a few ways to put things."""
        found = defaultdict(list)
        assert run(tmp_path / name, *flags, *more)[0] == 0
        for t in episodes(tmp_path / name):
            found[tuple(t.ids[: t.turns[0].start])].append(tuple(t.ids[t.turns[0].start :]))
        assert max(map(len, found.values())) > 1
        return found

    greedy = first_replies("greedy", "--greedy")
    assert all(len(set(said)) == 1 for said in greedy.values())
    assert "greedy" in capsys.readouterr().out
    assert greedy == first_replies("zero", "--temperature", 0)
    assert any(len(set(said)) > 1 for said in first_replies("sampled").values())
    assert run(tmp_path / "greedy", *flags, "--temperature", 0, "--resume")[0] == 0, "it is one evaluation"


def test_kill_9_midway_and_no_trial_is_played_twice(tmp_path, tiny_dir, monkeypatch):
    """A real process is killed with some trials finished; its last line is torn as well. Then started are counted."""
    out = tmp_path / "out"
    flags = f"--model {tiny_dir} --out {out} --domains desk --tasks 8 --num-trials 3 --concurrency 2 --max-turns 4"
    flags = [*flags.split(), "--max-new-tokens", "48", "--resume"]
    process = warm.Script("eval.py", *flags)
    path = out / "episodes-0.jsonl"
    try:
        deadline = time.time() + 120
        while len(whole_lines(path)) < 5 and time.time() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    finally:
        process.kill()
    *finished, torn = whole_lines(path)
    assert 4 <= len(finished) < 22 and not (out / "results.json").exists()
    path.write_text("".join(line + "\n" for line in finished) + torn[: len(torn) // 2])

    started, play, scripts = [], rollout.play, []

    def counted(task, *args, sample, **options):
        started.append((task.key, sample))
        return play(task, *args, sample=sample, **options)

    monkeypatch.setattr(rollout, "play", counted)
    monkeypatch.setattr(Courier, "demonstrate", lambda *args, **options: scripts.append(args))
    assert run_script("script", script.main, flags) == 0
    before = [(t.task.key, t.sample) for t in (Trajectory.from_json(json.loads(line)) for line in finished)]
    everything = {(f"desk/test/{IDS['test'][i]}", sample) for i in range(8) for sample in range(3)}
    assert len(started) == len(set(started)) == 24 - len(finished)
    assert set(started) | set(before) == everything and not set(started) & set(before)
    assert scripts == [], "the floors were on disk"
    assert path.read_text().startswith("".join(line + "\n" for line in finished))
    played = [(t.task.key, t.sample) for t in episodes(out)]
    assert len(played) == 24 and set(played) == everything
    assert json.loads((out / "results.json").read_text())[-1]["episodes"] == 24


def test_two_ranks_share_an_evaluation_and_one_goes_on_with_it(tmp_path, tiny_dir, monkeypatch):
    out = tmp_path / "out"
    flags = f"--model {tiny_dir} --out {out} --domains desk --tasks 4 --num-trials 4 --concurrency 2 --max-turns 2"
    flags = [*flags.split(), "--max-new-tokens", "16", "--resume"]
    done = warm.run("eval.py", *flags, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("pass@1") == 1, "one table"
    parts = [whole_lines(out / f"episodes-{rank}.jsonl") for rank in (0, 1)]
    assert sum(map(len, parts)) == 16 and all(parts)
    floors = {path.relative_to(out / "floors").as_posix(): len(whole_lines(path)) for path in out.rglob("floors/*/*")}
    assert floors == {f"{floor}/episodes-{rank}.jsonl": 2 for floor in ("refuse", "transfer") for rank in (0, 1)}

    (out / "episodes-1.jsonl").write_text("".join(line + "\n" for line in parts[1][1:]) + parts[0][0][:50])
    lost = Trajectory.from_json(json.loads(parts[1][0]))
    started, play_one = [], rollout.play
    monkeypatch.setattr(
        rollout, "play", lambda task, *a, **k: started.append((task, k["sample"])) or play_one(task, *a, **k)
    )
    assert run_script("script", script.main, flags) == 0
    assert started == [(lost.task, lost.sample)]
    assert json.loads((out / "results.json").read_text())[-1]["episodes"] == 16


def test_another_evaluation_may_not_go_on_in_the_same_folder(tmp_path, capsys):
    run(tmp_path, "--agent", "gold", "--domains", "desk", "--tasks", 1, "--num-trials", 1)
    assert run(tmp_path, "--agent", "refuse", "--domains", "desk", "--tasks", 1, "--resume")[0] == 2
    assert "agent ('gold', now 'refuse')" in capsys.readouterr().err


def test_what_broke_on_our_side_is_not_in_the_denominator(tmp_path, monkeypatch, capsys):
    demonstrate = Courier.demonstrate

    def sometimes(self, task, agent, seed):
        if task.id == IDS["test"][0] or (task.id == IDS["test"][1] and seed.endswith(":1")):
            raise EnvError("the grader is out")
        return demonstrate(self, task, agent, seed)

    monkeypatch.setattr(Courier, "demonstrate", sometimes)
    status, rows = run(tmp_path, "--agent", "gold", "--domains", "desk", "--tasks", 3, "--num-trials", 4)
    row = rows[0]
    assert status == 0
    assert row["errors"] == 5 and row["stops"]["env_error"] == 5 and row["unreliable"]
    assert row["tasks"] == 2 and row["tasks_played"] == 3  # one task has no verdict at all
    assert row["tasks_by_k"] == {"1": 2, "2": 2, "3": 2, "4": 1}
    assert row["pass@1"] == 1.0 and row["pass^4"] == 1.0  # 5 of 12 would have been failures
    shown = capsys.readouterr().out
    assert "5 of 12 EPISODES BROKE ON OUR SIDE" in shown and " 2 of 3, k=4: 1 " in shown and " 5/12 " in shown
    broken = [t for t in episodes(tmp_path) if t.stop.ours]
    assert {t.detail for t in broken} == {"the grader is out"} and all(t.evaluation is None for t in broken)


def test_a_domain_that_broke_is_named_though_the_whole_is_sound(tmp_path, monkeypatch, capsys):
    demonstrate, broken = Courier.demonstrate, set(IDS["test"][:2])

    def sometimes(self, task, agent, seed):
        if task.domain == "locker" and task.id in broken:
            raise UserError("the customer hung up")
        return demonstrate(self, task, agent, seed)

    monkeypatch.setattr(Courier, "demonstrate", sometimes)
    flags = ("--agent", "gold", "--tasks", 15, "--num-trials", 1)
    _, rows = run(tmp_path, *flags)
    assert {row["domain"]: row["unreliable"] for row in rows} == {
        "claims": False,
        "desk": False,
        "locker": True,  # 2 of 15
        "all": False,  # 2 of 45
    }
    assert rows[-1]["stops"]["user_error"] == 2
    loud = [line for line in capsys.readouterr().out.splitlines() if "BROKE ON OUR SIDE" in line]
    assert len(loud) == 1 and "gold on locker: 2 of 15 EPISODES" in loud[0]
    broken.clear()  # what broke is played again, and nothing else is
    before = whole_lines(tmp_path / "episodes-0.jsonl")
    _, rows = run(tmp_path, *flags, "--resume")
    assert rows[-1]["errors"] == 0 and rows[-1]["pass@1"] == 1.0 and rows[-1]["episodes"] == 45
    assert len(whole_lines(tmp_path / "episodes-0.jsonl")) == len(before) + 2
    assert "BROKE" not in capsys.readouterr().out


def test_when_everything_broke_there_is_a_table_and_no_result(tmp_path, monkeypatch, capsys):
    def never(self, task, agent, seed):
        raise EnvError("the grader is out")

    monkeypatch.setattr(Courier, "demonstrate", never)
    flags = f"--agent gold --domains desk --tasks 1 --num-trials 1 --out {tmp_path}".split()
    assert run_script("script", script.main, flags) == 1
    told = capsys.readouterr()
    assert "gold" in told.out and "no episode has a verdict; the first broke by the grader is out" in told.err
    assert not (tmp_path / "results.json").exists()


def test_a_row_counts_tasks_and_not_episodes():
    cfg = script.config.Evaluation(num_trials=4, agent="gold")

    def episode(task, sample, reward, stop=Stop.USER_STOP):
        evaluation = None if stop.ours else Evaluation(reward)
        return Trajectory(Task("desk", "test", task), sample, stop=stop, evaluation=evaluation)

    played = [episode("a", i, float(i < 2)) for i in range(4)]  # 2 of 4
    played += [episode("b", i, 1.0) for i in range(3)] + [episode("b", 3, 0.0, Stop.USER_ERROR)]  # 3 of 3
    played += [episode("c", i, 0.9) for i in range(4)]  # almost is not solved
    played += [episode("d", i, 0.0, Stop.ENV_ERROR) for i in range(4)]
    row = script.row(cfg, "gold", "desk", played, 1.25)
    assert row["pass@1"] == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert row["pass@4"] == pytest.approx((1.0 + 0.0) / 2)  # b has no fourth trial
    assert row["pass^2"] == pytest.approx((1 / 6 + 1.0 + 0.0) / 3)
    assert row["errors"] == 5 and row["tasks"] == 3 and row["tasks_played"] == 4 and row["seconds"] == 1.2
    assert row["tasks_by_k"] == {"1": 3, "2": 3, "3": 3, "4": 2} and row["episodes"] == 16
    assert row["intervals"]["pass^4"] == bootstrap_interval([(4, 2), (4, 0)], pass_hat_k, 4)


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--agent", "gold", "--tasks", "1"], "--out is needed"),
        (["--out", "OUT"], "--model is needed"),
        (["--out", "OUT", "--agent", "gold", "--domains", "moon"], "moon"),
        (["--out", "OUT", "--agent", "gold", "--split", "dev"], "dev"),
        (["--out", "OUT", "--agent", "gold", "--num-trials", "0"], "--num-trials"),
        (["--out", "OUT", "--agent", "gold", "--tasks", "-1"], "--tasks"),
        (["--out", "OUT", "--model", "OUT/none"], "none"),
        (["--out", "OUT", "--model", "OUT/none", "--agent", "gold"], "--agent gold plays without a model"),
        (["--out", "OUT", "--agent", "gold", "--num-trials", "100000"], "at most 1000"),
        (["--out", "OUT", "--agent", "gold", "--greedy", "--temperature", "0.5"], "leaves nothing for --temperature"),
        (["--out", "OUT", "--agent", "gold", "--task-file", "OUT/f", "--split", "test"], "nothing for --split"),
        (["--out", "OUT", "--agent", "gold", "--task-file", "OUT/f"], "OUT/f: no such file"),
    ],
)
def test_a_wrong_setting_is_one_line_and_leaves_nothing_behind(tmp_path, capsys, flags, hint):
    out = tmp_path / "out"
    assert run_script("script", script.main, [flag.replace("OUT", str(out)) for flag in flags]) == 2
    err = capsys.readouterr().err
    assert hint.replace("OUT", str(out)) in err and err.count("\n") == 1
    assert not out.exists()
