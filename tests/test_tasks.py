"""Tasks are listed, filtered, screened and kept in files; and nothing that trains ever gets one of the test split."""

import json
from types import SimpleNamespace

import pytest

import eval as evaluation
import train
from minitau import checkpoint, config, sft, tasks
from minitau.envs.courier import Courier
from minitau.envs.courier import world as courier
from minitau.episode import BadInput, Stop, Task, Trajectory
from minitau.files import whole_lines
from minitau.script import run_script

WORLD = Courier()
TRAIN, TEST = (len(courier.IDS[split]) for split in ("train", "test"))
FAMILIES = ("desk", "claims", "locker")


def write(path, *rows):
    """A task file of these rows, which may be tasks; its path."""
    as_rows = [{"domain": r.domain, "split": r.split, "id": r.id} if isinstance(r, Task) else r for r in rows]
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in as_rows))
    return path


def run(main, *flags) -> int:
    try:
        return run_script("script", main, [str(flag) for flag in flags])
    except SystemExit as error:  # by the parser
        return error.code


@pytest.fixture
def overlap(monkeypatch):
    """A split of courier that holds everything, test tasks too, as telecom's `full` does."""
    monkeypatch.setitem(courier.IDS, "full", courier.IDS["train"] + courier.IDS["test"])


@pytest.fixture
def scripts(monkeypatch):
    """The (task, agent) of every script that is played during the test."""
    played, demonstrate = [], Courier.demonstrate

    def counted(self, task, agent, seed):
        played.append((task, agent))
        return demonstrate(self, task, agent, seed)

    monkeypatch.setattr(Courier, "demonstrate", counted)
    return played


# -- choosing --------------------------------------------------------------------------------------------


def test_training_takes_the_domains_in_turn():
    chosen = list(tasks.for_training(config.RFT(tasks=7), WORLD))
    assert [t.domain for t in chosen] == ["desk", "claims", "locker"] * 2 + ["desk"]
    assert {t.split for t in chosen} == {"train"}
    assert len(tasks.for_training(config.GRPO(domains=("desk", "locker")), WORLD)) == 2 * TRAIN
    with pytest.raises(BadInput, match="moon"):
        tasks.for_training(config.RFT(domains=("moon",)), WORLD)


def test_a_split_with_test_tasks_is_trained_on_without_them(overlap):
    said = []
    chosen = tasks.for_training(config.GRPO(split="full"), WORLD, said.append)
    test_ids = {task.id for task in WORLD.tasks("desk", "test")}
    assert len(chosen) == 3 * TRAIN and not {task.id for task in chosen} & test_ids
    assert said == [
        f"{d}: {TEST} of {TRAIN + TEST} tasks of --split full are test tasks and left out" for d in FAMILIES
    ]
    assert len(tasks.for_training(config.GRPO(split="full", tasks=5), WORLD, said.append)) == 5
    with pytest.raises(BadInput, match="nothing to train on"):
        tasks.for_training(config.GRPO(split="test"), WORLD, said.append)
    assert len(tasks.for_evaluation(config.Evaluation(split="full"), WORLD)) == 3 * (TRAIN + TEST)


def test_what_pays_for_nothing_is_found():
    some = WORLD.tasks("desk", "train")[:60]
    free = {task: pays for task, pays in tasks.screen(WORLD, some).items() if pays}
    assert 0 < len(free) < 12 and set(free.values()) == {("transfer",)}
    assert all(WORLD.demonstrate(task, "gold", "s").stop == Stop.TRANSFER for task in free)


# -- the script ------------------------------------------------------------------------------------------


def test_a_list_is_kept_and_read_again(tmp_path, capsys):
    out = tmp_path / "new" / "some.jsonl"
    flags = ("--domains", "desk,locker", "--match", "^1[0-3]", "--tasks", 30, "--screen", "--out", out)
    assert run(tasks.main, *flags) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    numbers = [n for n in range(TRAIN) if str(n)[:2] in ("10", "11", "12", "13")][:30]
    assert [(row["domain"], row["id"]) for row in rows] == [(d, str(n)) for d in ("desk", "locker") for n in numbers]
    assert all(row["env"] == "courier" and row["split"] == "train" for row in rows)
    chosen = tasks.read(str(out), "courier", WORLD, training=True)
    assert list(chosen) == [Task(row["domain"], "train", row["id"]) for row in rows]
    assert chosen == tasks.screen(WORLD, list(chosen)) and 0 < sum(map(bool, chosen.values())) < 60
    assert f"60 tasks (desk 30, locker 30), {sum(map(bool, chosen.values()))} of them pay" in capsys.readouterr().out
    before = out.read_bytes()
    assert run(tasks.main, *flags) == 2 and "exists already" in capsys.readouterr().err and out.read_bytes() == before


def test_a_list_is_printed(capsys, overlap):
    assert (
        run(tasks.main, "--domains", "desk", "--split", "full", "--match", "^(2|101.|102.|107.)$", "--without-test")
        == 0
    )
    *shown, count = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["domain", "split", "id"] and count == "15 tasks (desk 15)"
    assert [line.split() for line in shown[1:]] == [["desk", "full", str(n)] for n in (2, *range(1010, TRAIN))]
    assert run(tasks.main, "--domains", "desk", "--tasks", 25, "--screen") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("pays for nothing") and {line.split()[-1] for line in lines[1:-1]} == {"-", "transfer"}


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ("--match [", "not a regular expression"),
        ("--match nothing", "no task is left"),
        ("--split test --without-test", "no task is left"),
        ("--split dev", "courier has train, test"),
        ("--domains moon", "'moon'"),
        ("--tasks -1", "--tasks"),
    ],
)
def test_a_wrong_filter_is_one_line(tmp_path, capsys, flags, hint):
    assert run(tasks.main, *flags.split(), "--out", tmp_path / "out" / "f") == 2
    err = capsys.readouterr().err
    assert hint in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


# -- files -----------------------------------------------------------------------------------------------

GOOD = {"domain": "desk", "split": "train", "id": "3"}


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ('{"domain": "desk"', "not JSON"),
        (b"\xff\xfe".decode("latin-1"), "not JSON"),
        ("[1]", "not a task"),
        ("null", "not a task"),
        ({"domain": "desk", "split": "train"}, 'needs "domain", "split" and "id"'),
        ({**GOOD, "id": 3}, "all of them text"),
        ({**GOOD, "id": "9999"}, "no task '9999' in desk's split train"),
        ({**GOOD, "split": "dev"}, "unknown split 'dev'"),
        ({**GOOD, "domain": "retail"}, "unknown domain 'retail'"),
        ({**GOOD, "env": "tau2"}, "a task of --env tau2, and this is --env courier"),
        ({**GOOD, "id": "1"}, "desk's task '1' stands in line 1 already"),
        ({**GOOD, "split": "full", "id": "1"}, "stands in line 1 already"),
        ({**GOOD, "pays_for_nothing": "transfer"}, "not a list of scripts"),
    ],
)
def test_a_bad_line_is_named_by_every_script(tmp_path, tiny_dir, capsys, overlap, row, hint):
    path = write(tmp_path / "f.jsonl", Task("desk", "train", "1"), "", {**GOOD, "mine": [1]}, row)
    out = tmp_path / "out"
    flags = ("--task-file", path, "--out", out)
    for main, more in (
        (evaluation.main, ("--agent", "gold")),
        (sft.main, ()),
        (train.main, ("--stage", "rft", "--model", tiny_dir)),
        (train.main, ("--stage", "grpo", "--model", tiny_dir)),
    ):
        assert run(main, *flags, *more) == 2
        err = capsys.readouterr().err
        assert f"{path}, line 4: " in err and hint in err and err.count("\n") == 1, err
        assert not out.exists()


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_not_a_choice(tmp_path, text):
    (tmp_path / "f").write_text(text)
    with pytest.raises(BadInput, match="no tasks in it"):
        tasks.read(str(tmp_path / "f"), "courier", WORLD)
    with pytest.raises(BadInput, match="a folder; give a JSONL file"):
        tasks.read(str(tmp_path), "courier", WORLD)


@pytest.mark.parametrize("split", ["test", "full"])
def test_nothing_trains_on_a_file_with_a_test_task(tmp_path, tiny_dir, capsys, overlap, split):
    """Whatever split the file says that the task is of; to evaluate it is what it is for."""
    path = write(tmp_path / "f.jsonl", Task("locker", "train", "9"), Task("locker", split, "1030"))
    out = tmp_path / "out"
    for main, flags in (
        (sft.main, ()),
        (train.main, ("--stage", "rft", "--model", tiny_dir)),
        (train.main, ("--stage", "grpo", "--model", tiny_dir, "--no-screen")),
    ):
        assert run(main, "--task-file", path, "--out", out, *flags) == 2
        err = capsys.readouterr().err
        assert f"{path}, line 2: locker/{split}/1030 is a test task" in err and err.count("\n") == 1
        assert not out.exists()
    assert run(evaluation.main, "--agent", "gold", "--num-trials", 1, "--task-file", path, "--out", out) == 0
    (row,) = json.loads((out / "results.json").read_text())
    assert row["tasks"] == 2 and row["split"] == f"{'+'.join(sorted([split, 'train']))}" and row["domain"] == "locker"


def test_demonstrations_of_chosen_tasks(tmp_path):
    wanted = [Task("locker", "train", "9"), Task("desk", "train", "200")]
    path = write(tmp_path / "f.jsonl", *wanted)
    assert run(sft.main, "--task-file", path, "--out", tmp_path / "data.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == [task.key for task in wanted]


def test_a_file_leaves_nothing_else_to_choose(tmp_path, capsys):
    path = write(tmp_path / "f.jsonl", GOOD)
    for flags in ("--domains desk", "--split train", "--tasks 1"):
        assert run(train.main, "--stage", "rft", "--task-file", path, "--model", "m", "--out", "o", *flags.split()) == 2
        assert f"--task-file leaves nothing for {flags.split()[0]} to say" in capsys.readouterr().err


# -- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [config.RFT, config.GRPO])
def test_screening_looks_only_at_what_is_not_known(tmp_path, scripts, capsys, kind):
    some = WORLD.tasks("desk", "train")[:30]
    pays = tasks.screen(WORLD, some)
    free = [task for task in some if pays[task]]
    assert free and len(scripts) == 60
    run = SimpleNamespace(dir=tmp_path)
    half = {task: pays[task] if i % 2 else None for i, task in enumerate(some)}
    scripts.clear()
    kept = train.screened(kind(), half, WORLD, run)
    assert kept == [task for task in some if not pays[task]]
    assert {task for task, _ in scripts} == set(some[::2])
    assert sorted(json.loads((tmp_path / "screened.json").read_text())) == sorted(task.key for task in free)
    assert f"left out {len(free)} of 30 tasks" in capsys.readouterr().out
    scripts.clear()
    assert train.screened(kind(), half, WORLD, run) == kept and not scripts, "once a run"
    assert train.screened(kind(screen=False), half, WORLD, run) == some
    (tmp_path / "screened.json").unlink()
    assert train.screened(kind(), pays, WORLD, run) == kept and not scripts, "a frozen file says all of it"
    (tmp_path / "screened.json").unlink()
    with pytest.raises(BadInput, match="every task pays"):
        train.screened(kind(), dict.fromkeys(free), WORLD, run)


def test_rft_plays_the_tasks_of_its_file(tmp_path, tiny_dir, capsys):
    """Those that do not pay for nothing; and a run goes on with the file that it began with, wherever that lies."""
    rows = [{**GOOD, "id": str(i), "pays_for_nothing": ["refuse"] if i == 5 else []} for i in (4, 5, 6)]
    path, out = write(tmp_path / "f.jsonl", *rows), tmp_path / "out"
    flags = ("--stage", "rft", "--model", tiny_dir, "--out", out, "--samples", 2, "--min-partial", 0)
    flags += ("--max-turns", 1, "--max-new-tokens", 8, "--resume")
    assert run(train.main, *flags, "--task-file", path) == 0
    lines = [line for file in (out / "collected").glob("*.jsonl") for line in whole_lines(file)]
    assert [Trajectory.from_json(json.loads(line)).task.id for line in lines] == ["4", "4", "6", "6"]
    moved = path.rename(tmp_path / "elsewhere.jsonl")
    assert run(train.main, *flags, "--task-file", moved) == 0
    write(moved, *rows[:1])
    capsys.readouterr()
    assert run(train.main, *flags, "--task-file", moved) == 2
    assert "holds another run: what --task-file holds" in capsys.readouterr().err
    assert checkpoint.latest(out)


def test_a_policys_text_is_part_of_a_run(tmp_path):
    path = tmp_path / "mine.md"
    path.write_text("Be kind.")
    cfg = config.GRPO(env="tau2", policy=(f"retail={path}",))
    before = tasks.fingerprint(cfg)
    assert before == tasks.fingerprint(config.GRPO(env="tau2", policy=(str(path),)))
    path.write_text("Be brief.")
    assert tasks.fingerprint(cfg) != before and tasks.fingerprint(config.GRPO()) == {}


# -- tau2 ------------------------------------------------------------------------------------------------


def test_telecoms_large_pool_without_its_test_tasks(world, tmp_path, capsys):
    said = []
    chosen = tasks.for_training(config.GRPO(env="tau2", domains=("telecom",), split="full"), world, said.append)
    test_ids = {task.id for task in world.tasks("telecom", "test")}
    assert said == ["telecom: 40 of 2285 tasks of --split full are test tasks and left out"]
    assert len(chosen) == 2245 and not {task.id for task in chosen} & test_ids
    flags = ("--env", "tau2", "--domains", "telecom", "--split", "full")
    assert run(tasks.main, *flags, "--without-test", "--out", tmp_path / "pool.jsonl") == 0
    assert tasks.read(str(tmp_path / "pool.jsonl"), "tau2", world, training=True) == chosen
    assert run(tasks.main, *flags, "--out", tmp_path / "all.jsonl") == 0
    with pytest.raises(BadInput, match="is a test task"):
        tasks.read(str(tmp_path / "all.jsonl"), "tau2", world, training=True)
    assert len(tasks.read(str(tmp_path / "all.jsonl"), "tau2", world)) == 2285


def test_base_is_train_and_test(world):
    for domain, n in (("airline", 30), ("retail", 74), ("telecom", 74)):
        cfg = config.RFT(env="tau2", domains=(domain,), split="base")
        chosen = tasks.for_training(cfg, world, lambda line: None)
        assert [task.id for task in chosen] == [task.id for task in world.tasks(domain, "train")] and len(chosen) == n
    # A domain without a test split has nothing to hold out.
    assert len(tasks.for_training(config.RFT(env="tau2", domains=("mock",), split="base"), world)) == 9


def test_tau2s_free_tasks_are_marked(world):
    marks = tasks.screen(world, world.tasks("telecom", "test")[:20])
    assert {("transfer",), ()} == set(marks.values())
