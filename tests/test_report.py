"""What people look at: two conversations side by side, the sentence that says what changed, the tables."""

from random import Random

import pytest

from minitau import report
from minitau.episode import Call, Check, Evaluation, Message, Stop, Task, Trajectory


def episode(*messages, reward=0.0, checks=(), stop=Stop.USER_STOP, task="1", sample=0, domain="desk"):
    evaluation = None if stop.ours else Evaluation(reward, tuple(checks))
    detail = "it fell over" if stop.ours else ""
    return Trajectory(
        Task(domain, "test", task), sample, messages=list(messages), stop=stop, evaluation=evaluation, detail=detail
    )


OLD = episode(
    Message("system", "the secret policy"),
    Message("user", "Where is my parcel? " * 8),
    Message("assistant", "", (Call("look", {"parcel": "P1"}),)),
    Message("tool", "owner Eva"),
    Message("assistant", "I do not know."),
    checks=[Check("action", "verify(...)", False), Check("db", "database", True)],
    stop=Stop.TRANSFER,
)
NEW = episode(
    Message("user", "Hello"),
    Message("assistant", "let me see", (Call("look", {"parcel": "P1"}), Call("verify", {}))),
    reward=1.0,
    checks=[Check("action", "verify(...)", True)],
)


@pytest.mark.parametrize("width", [80, 120, 121])
def test_two_columns(width):
    text = report.side_by_side(OLD, NEW, ("before", "after"), width)
    lines = text.splitlines()
    assert all(report.columns(line) <= width for line in lines)
    column = (width - 3) // 2
    assert all(line[column : column + 3].rstrip() == " |" for line in lines)
    left, right = ([line[a:b].rstrip() for line in lines] for a, b in ((0, column), (column + 3, None)))
    assert left[:2] == ["before", "reward 0.00, ended by transfer"]
    assert right[:2] == ["after", "reward 1.00, ended by user_stop"]
    assert any(line.startswith("customer  Where is my parcel?") for line in left)
    assert 'call      look({"parcel": "P1"})' in left and "result    owner Eva" in left
    assert "agent     I do not know." in left
    assert {"thought   let me see", 'call      look({"parcel": "P1"})', "call      verify({})"} <= set(right)
    assert "failed action: verify(...)" in left and "all checks passed" in right
    assert left.index("failed action: verify(...)") == right.index("all checks passed"), "the feet are level"
    assert "secret" not in text and "database" not in text


def test_a_narrow_terminal_shows_one_under_the_other():
    lines = report.side_by_side(OLD, NEW, ("before", "after"), 79).splitlines()
    assert lines.index("before") == 0 and lines.index("after") > lines.index("failed action: verify(...)")
    assert all(len(line) <= 79 for line in lines) and not any(" | " in line for line in lines)
    assert report.side_by_side(OLD, NEW, ("before", "after"), 1)  # however narrow


def test_nothing_that_was_said_steers_the_terminal():
    said = Message("user", "\x1b[2J\x07a\tb\x00c\r\nd\u2028e\x9b31m \u202etxt.exe \u200dgo")
    text = report.side_by_side(episode(said), NEW, ("a\x1b", "b"), 120)
    assert all(c.isprintable() or c == "\n" for c in text)
    words = [line[:58].rstrip() for line in text.splitlines()]
    assert "customer  [2Ja bc" in words and " " * 10 + "d" in words and " " * 10 + "e31m txt.exe go" in words


def test_wide_letters_take_two_columns():
    assert report.columns("日本") == 4 and report.columns("e\u0301") == 1
    said = Message("user", "日本語の文章です" * 20 + " and more")
    text = report.side_by_side(episode(said), episode(said), ("a", "b"), 100)
    ends = {report.columns(line[: line.index("|")]) for line in text.splitlines()}
    assert ends == {49}
    assert all(report.columns(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize("width", [1, 2, 7, 40])
def test_wrapping_loses_no_word(width):
    text = "a bb  ccc dddddddddddddddddd e\n\nf"
    lines = report.wrap(text, width)
    assert all(report.columns(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert report.wrap("", width) == [""]


def test_an_episode_that_broke_or_was_not_checked_says_so():
    text = report.side_by_side(episode(stop=Stop.ENV_ERROR), episode(), ("a", "b"), 120)
    assert "no verdict: it fell over" in text and "nothing was checked" in text


def evaluation(tasks, rates, stops, seed=0):
    """Four trials of each task in which each check passes, and each stop comes, as often as `rates` and `stops` say."""
    rng = Random(f"{seed}")
    return [
        episode(
            checks=[Check(kind, name, rng.random() < rate) for (kind, name), rate in rates.items()],
            stop=Stop(rng.choices(list(stops), list(stops.values()))[0]),
            task=str(task),
            sample=sample,
        )
        for task in range(tasks)
        for sample in range(4)
    ]


RATES = {
    ("action", "look(1)"): 0.2,
    ("action", "look(2)"): 0.2,
    ("communicate", "lost"): 0.9,
    ("communicate", "late"): 0.9,
    ("env", "door open"): 0.5,
    ("db", "database"): 0.5,
}


def test_the_sentence_names_what_moved():
    after = {**RATES, ("action", "look(1)"): 0.8, ("action", "look(2)"): 0.8, ("communicate", "lost"): 0.1}
    after["communicate", "late"] = 0.1
    old = evaluation(54, RATES, {"user_stop": 1, "transfer": 9})
    new = evaluation(54, after, {"user_stop": 9, "transfer": 1}, seed=1)
    sentence = report.changes(old, new)
    assert sentence.count(".") == 1 and sentence.endswith(".") and "\n" not in sentence
    assert sentence.startswith("More often right: calling look (19% to 81%)")
    assert "less often right: saying what had to be said (90% to 11%)" in sentence
    assert "more episodes ended by user_stop (" in sentence and "fewer episodes ended by transfer (" in sentence
    assert "door" not in sentence and "database" not in sentence and "54 tasks" in sentence
    assert report.changes(old, old).startswith("No check's pass rate and no reason to stop moved")


def test_its_rates_are_means_over_tasks():
    def pair(first, second):
        return [
            episode(checks=[Check("db", "database", passed)], task=f"{task}", sample=i)
            for task in range(20)
            for i, passed in enumerate((first, second))
        ]

    assert "db: database (50% to 100%)" in report.changes(pair(True, False), pair(True, True))
    broken = [episode(stop=Stop.ENGINE_ERROR, task=f"{task}", sample=9) for task in range(20)]
    assert "db: database (50% to 100%)" in report.changes(pair(True, False) + broken, pair(True, True) + broken)


def test_only_the_few_that_moved_most_are_named():
    names = [("action", f"tool{i}()") for i in range(9)]
    old = evaluation(40, {name: 0.0 for name in names}, {"user_stop": 1})
    new = evaluation(40, {name: 0.5 + 0.05 * i for i, name in enumerate(names)}, {"user_stop": 1}, seed=1)
    sentence = report.changes(old, new)
    assert sentence.count("calling") == 4 and "tool8" in sentence and "tool0" not in sentence


def test_noise_is_hardly_ever_named():
    rates = {("env", f"check {i}"): 0.1 + 0.1 * (i % 8) for i in range(16)}
    stops = {"user_stop": 5, "transfer": 3, "bad_calls": 1}
    named = sum(
        not report.changes(evaluation(30, rates, stops, 2 * i), evaluation(30, rates, stops, 2 * i + 1)).startswith(
            "No "
        )
        for i in range(40)
    )
    assert named <= 6


@pytest.mark.parametrize("tasks", [0, 1, 2])
def test_two_tasks_prove_nothing(tasks):
    old = evaluation(tasks, {("db", "database"): 0.0}, {"user_stop": 1})
    new = evaluation(tasks, {("db", "database"): 1.0}, {"user_stop": 1})
    assert report.changes(old, new).startswith("No ")


def test_other_checks_of_the_same_tasks_are_not_compared():
    old = evaluation(30, {("db", "database"): 0.0}, {"user_stop": 1})
    new = evaluation(30, {("env", "door open"): 1.0}, {"user_stop": 1})
    assert report.changes(old, new).startswith("No ")


ROW = {"stage": "sft", "env": "courier", "domain": "all", "split": "test", "tasks": 3, "tasks_played": 3, "trials": 4}
ROW |= {"tasks_by_k": {"1": 3, "2": 3, "3": 3, "4": 3}, "episodes": 12, "errors": 0, "stops": {"transfer": 12}}
ROW |= {"pass@1": 0.5, "pass@4": 1.0, "pass^4": None, "ci95": [0.25, 0.75], "seed": 7, "model": "m/one"}
ROW |= {"temperature": 1.0, "user_model": "", "user_temperature": None}
ROW["intervals"] = {"pass@1": [0.25, 0.75], "pass@4": [0.8, 1.0], "pass^4": [0.0, 1.0]}


def test_tables_have_a_line_a_row():
    caption, table = report.table([ROW]).split("\n\n")
    assert caption.startswith("courier, split test, 4 trials a task, seed 7, policy m/one, temperature 1.\n")
    head, line = table.splitlines()
    assert head.split() == ["stage", "domain", "tasks", "pass@1", "pass@4", "pass^4", "ended", "by"]
    assert line.split() == ["sft", "all", "3", "50.0", "[25,75]", "100.0", "[80,100]", "-", "transfer", "100%"]
    pooled = {**ROW, "episodes": 24, "by_seed": {"0": 0.25, "1": None}}
    head, line = report.pooled_table([pooled]).splitlines()
    assert line.split() == ["sft", "all", "3", "24", "50.0", "25.0..75.0", "0:25.0", "1:-", "100.0", "-"]


def test_the_caption_says_what_all_rows_share():
    paid = {"user_model": "gpt-x", "user_temperature": 0.7, "temperature": 0.0}
    floor = {**ROW, "stage": "refuse", "model": "", "user_model": ""}
    caption = " ".join(report.table([floor, {**ROW, **paid}]).split("\n\n")[0].split())
    assert "policy m/one, greedy, customer gpt-x at temperature 0.7." in caption
    free = {"user_model": "script", "user_temperature": None}
    assert report.table([{**ROW, **free}]).split("\n\n")[0].split("\n")[0].endswith("temperature 1, customer script.")
    caption = report.table([ROW, {**ROW, "model": "m/two"}]).split("\n\n")[0]
    assert "m/" not in caption and "temperature 1" in caption, "two models have no one name"
    assert "policy" not in report.table([floor]) and "pass^" not in report.table([{**ROW, "trials": 1}])


def test_a_table_fits_in_120_columns():
    stops = {stop.value: 10 + i for i, stop in enumerate(Stop)}
    wide = {**ROW, "stops": stops, "episodes": sum(stops.values()), "errors": 39, "stage": "no-curriculum"}
    lines = report.table([wide, ROW]).split("\n\n")[1].splitlines()
    assert all(len(line) <= report.WIDTH for line in lines) and len(lines) > 3
    assert " 39/126 " in lines[1] and " 0/12 " in lines[-1]
    shares = " ".join(line[lines[0].index("ended by") :] for line in lines[1:-1])
    assert shares.split(", ")[0] == "env_error 14%" and len(shares.split(", ")) == len(Stop), shares
    assert not any(line.split()[-1].endswith(tuple(stops)) for line in lines[1:]), "a name and its share stay together"


def test_scores_over_fewer_tasks_are_marked():
    names = [f"pass{sign}{k}" for sign in "@^" for k in range(1, 5)]
    row = {**ROW, **dict.fromkeys(names, 0.5), "intervals": {name: [0.2, 0.8] for name in names}, "trials": 4}
    assert " of " not in report.every_k([row])
    head, at, hat, note = report.every_k([{**row, "tasks_by_k": {"1": 3, "2": 3, "3": 2, "4": 0}}]).splitlines()
    assert at.count("50.0 [20,80] of 2") == hat.count(" of 2") == 1 and note.startswith("of N: ")
    assert at.index(" of 2") < head.index("k=4")


def test_tasks_that_do_not_count_are_said():
    few = {**ROW, "tasks": 38, "tasks_played": 40, "tasks_by_k": {"1": 38, "2": 38, "3": 37, "4": 36}}
    assert report.task_counts(few, 4) == "38 of 40, k=4: 36"
    assert report.task_counts({**few, "tasks_played": 38}, 4) == "38, k=4: 36"
    assert report.task_counts({**few, "tasks_by_k": {"4": 38}}, 4) == "38 of 40"
    assert report.task_counts(ROW, 4) == "3"
