"""What people type, whole: the demo and a study's arms at their smallest, and GRPO under torchrun on CPUs."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import ANY

import pytest
import warm

import eval as evaluation
import train
from minitau import cli, config, demo, pretrained, sft, study
from minitau.claim import claim_for
from minitau.curriculum import Curriculum
from minitau.envs import open_world
from minitau.envs.courier.tasks import TURNS
from minitau.episode import BadInput, Check, Evaluation, Stop, Task, Trajectory
from minitau.estimators import bootstrap_interval
from minitau.files import whole_lines, write_jsonl
from minitau.pooled import episodes_played, gain, pooled
from minitau.script import run_script
from minitau.tasks import for_training

ROOT = Path(__file__).parent.parent
STAGES = ["refuse", "transfer", "base", "sft", "rft", "grpo"]
RUN, FLAGS = demo.run, demo.FLAGS  # which most tests replace
SHORT = "--max-turns 2 --max-new-tokens 12"
SMALL_FLAGS = {
    "sft": "--batch-size 8",
    "rft": f"--batch-size 8 --min-partial 0 {SHORT}",
    "grpo": f"--lr 1e-3 --tasks 6 --no-screen --tasks-per-step 3 --group-size 2 --max-rounds 2 {SHORT}",
    "eval": f"--temperature 1 --num-trials 4 {SHORT}",
}


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def ran():
    """The commands of the demo and of arms, which run in this process for as long as the fixture lives."""
    commands = []
    mains = {"train.py": train.main, "eval.py": evaluation.main, "minitau.sft": sft.main}

    def run(*words):
        commands.append(words)
        at = next(i for i, word in enumerate(words) if word in mains)
        if run_script(words[at], mains[words[at]], list(words[at + 1 :])):
            raise BadInput("the step failed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run", run)
        patch.setattr(demo, "FLAGS", SMALL_FLAGS)
        yield commands


@pytest.fixture(scope="module")
def played(ran, tiny_dir, tmp_path_factory):
    """A study's folder in which the first seed's demo is done, and the study's settings."""
    out = tmp_path_factory.mktemp("study")
    sizes = {"base": str(tiny_dir), "tasks": 1, "demonstrations": 24, "sft_epochs": 1, "rft_tasks": 3, "steps": 2}
    cfg = study.Study(out=str(out), seeds=("0",), **sizes)
    demo.main(list(study.demo_part(cfg, "0").command[2:]))
    return cfg


def test_the_demo_goes_through_every_stage(ran, played, capsys):
    out = Path(played.out) / "seed-0"
    rows = json.loads((out / "results.json").read_text())
    assert [row["stage"] for row in rows if row["domain"] == "all"] == STAGES
    assert [row["domain"] for row in rows[:4]] == ["claims", "desk", "locker", "all"]
    for row in rows:
        wanted = {"stage", "domain", "split", "tasks", "trials", "pass@1", "pass@4", "pass^4", "ci95", "seconds"}
        assert wanted <= row.keys()
        low, high = row["ci95"]
        assert 0 <= low <= row["pass@1"] <= high <= 1 and row["split"] == "test" and row["trials"] == 4
        assert row["temperature"] == 1
    assert (out / "learning.png").read_bytes().startswith(b"\x89PNG")
    models = [words[words.index("--model") + 1] for words in ran if words[0] == "train.py"]
    assert models[:3] == [played.base, str(out / "sft" / "model"), str(out / "rft" / "model")]

    # Interrupted before the end: the second run plays and trains nothing again, and ends the same.
    (out / "results.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}
    number = len(ran)
    demo.main(list(study.demo_part(played, "0").command[2:]))
    assert len(ran) == number and json.loads((out / "results.json").read_text()) == rows
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}
    shown = capsys.readouterr().out
    assert all(f"{stage} " in shown for stage in STAGES) and "claims" in shown, "the table is printed"
    places = [shown.index(text) for text in ("pass^4", "From RFT to GRPO: ", "before and after GRPO. ", "learning.png")]
    assert places == sorted(places) and "customer  " in shown


def test_a_demo_does_not_go_on_with_other_settings_or_weights(ran, played, tmp_path, tiny_dir, capsys):
    out, flags = Path(played.out) / "seed-0", list(study.demo_part(played, "0").command[2:])
    before = (out / "results.json").read_bytes()
    assert run_script("make demo", demo.main, [*flags, "--steps", "3"]) == 2
    assert "other settings" in capsys.readouterr().err
    (tmp_path / "base").mkdir()
    for path in tiny_dir.iterdir():
        content = path.read_bytes()
        (tmp_path / "base" / path.name).write_bytes(content[:-1] + b"\0" if path.suffix == ".safetensors" else content)
    cfg = demo.Demo(base=str(tmp_path / "base"))
    assert demo.identity(cfg)["weights"] != demo.identity(demo.Demo(base=str(tiny_dir)))["weights"]
    assert (out / "results.json").read_bytes() == before


def test_a_demo_needs_a_base_model_and_a_folder_of_its_own(tmp_path, tiny_dir):
    out = tmp_path / "out"
    done = command("-m", "minitau.demo", "--base", str(tmp_path), "--out", str(out))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{tmp_path} holds no model" in done.stderr and "--base" in done.stderr and not out.exists()
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "letters.txt").write_text("mine")
    done = warm.run("-m", "minitau.demo", "--base", str(tiny_dir), "--out", str(stranger), "--no-resume")
    assert done.returncode == 2 and "not made by this command" in done.stderr
    assert (stranger / "letters.txt").read_text() == "mine"


@pytest.mark.parametrize("before", [{}, {"seed": 0}])
def test_a_demo_killed_while_it_claims_its_folder_goes_on(before, monkeypatch, tmp_path):
    out, settings = tmp_path / "out", {"seed": 0}
    if before:
        claim_for(demo.MARKER, out, before, resume=True)
        (out / "sft").mkdir()

    def killed(path, text):
        path.open("w").close()  # begun, and not a letter written
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        try:
            claim_for(demo.MARKER, out, settings, resume=True)
        except KeyboardInterrupt:
            assert not before, "what is written already is not written again"
    claim_for(demo.MARKER, out, settings, resume=True)
    assert json.loads((out / demo.MARKER).read_text()) == settings
    with pytest.raises(BadInput, match="other settings"):
        claim_for(demo.MARKER, out, {"seed": 1}, resume=True)


def test_the_curriculum_meets_tasks_again():
    """With the demo's numbers, when every second step plays a second round: it does so more often."""
    cfg = cli.parse(config.GRPO, "", "", ["--model", "m", "--out", "o", *FLAGS["grpo"].split()])
    tasks = list(for_training(cfg, open_world(cfg)))
    families = Counter(task.domain for task in tasks)
    assert set(families.values()) == {4 * len(TURNS["desk"])}, "each family's whole mixture, four times"
    curriculum, visits = Curriculum(tasks, seed=0), Counter()
    for step in range(1, demo.Demo().steps + 1):
        for task in curriculum.draw(step, cfg.tasks_per_step * (1 + step % 2)):
            curriculum.update(task, [True, False])
            visits[task] += 1
    assert len(visits) == len(tasks) and sum(count > 1 for count in visits.values()) > len(tasks) / 2


def test_a_demo_that_cannot_be_removes_nothing(tmp_path):
    """Neither for a size that no stage takes, nor under another process that is at work there."""
    out = tmp_path / "demo"
    out.mkdir()
    (out / demo.MARKER).write_text("{}")
    for flag, value in (("--demonstrations", "-5"), ("--sft-epochs", "0"), ("--rft-tasks", "-1")):
        with pytest.raises(BadInput, match=flag):
            demo.main(["--out", str(out), "--no-resume", flag, value])
    hold = "import sys, time; from pathlib import Path; from minitau.claim import lock"
    code = f"{hold}; lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / ".demo.lock")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match="another process is at work"):
            claim_for(demo.MARKER, out, {}, resume=False)
        assert (out / demo.MARKER).exists()
    finally:
        other.kill()
        other.wait()


def test_a_step_that_fails_ends_the_demo(capfd):
    RUN("-c", "print('fine')")
    with pytest.raises(BadInput, match="status 3"):
        RUN("-c", "raise SystemExit(3)")
    assert "$ python -c" in capfd.readouterr().out


def verdict(task, sample, reward, stop=Stop.USER_STOP):
    return Trajectory(task, sample, stop=stop, evaluation=None if stop.ours else Evaluation(reward))


def test_the_shown_task_is_the_first_that_came_right():
    tasks = [Task("desk", "test", f"{i}") for i in range(5)]

    def trials(*rewards):
        return {(task.key, 0): verdict(task, 0, reward) for task, reward in zip(tasks, rewards)}

    before, after = trials(1, 0, 0, 0, 0), trials(1, 0, 1, 1, 0)
    assert demo.choose(tasks, before, after) == (tasks[2], True)
    assert demo.choose(tasks[::-1], before, after) == (tasks[3], True)
    before[tasks[2].key, 0] = verdict(tasks[2], 0, 0, Stop.ENGINE_ERROR)
    assert demo.choose(tasks, before, after) == (tasks[3], True)
    del after[tasks[3].key, 0]
    after[tasks[4].key, 1] = verdict(tasks[4], 1, 1)  # a second trial shows nothing
    assert demo.choose(tasks, before, after) == (tasks[0], False)


def test_the_families_take_turns():
    tasks = demo.tasks_in_turn(demo.Demo(tasks=2))
    assert [task.domain for task in tasks] == ["desk", "claims", "locker"] * 2
    assert len(set(tasks)) == 6 and {task.split for task in tasks} == {"test"}


# -- a study ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", [*study.ARMS, study.TWO_RANKS])
def test_an_arm_starts_from_rft_and_plays_as_much_as_grpo(ran, played, arm):
    cfg = study.demo_of(played, "0")
    out, number = Path(cfg.out), len(ran)
    budget = episodes_played(out / "grpo")
    assert 12 <= budget <= 24
    study.play_arm(cfg, arm)
    assert len(ran) == number + 2
    settings = json.loads((out / arm / "config.json").read_text())
    assert settings["model"] == str(out / "rft" / "model") and (settings["seed"] == 0) == (arm != "more-rft")
    assert settings["stage"] == ("rft" if arm == "more-rft" else "grpo")
    if settings["stage"] == "grpo":
        assert settings["curriculum"] == (arm != "no-curriculum")
        assert settings["shuffle_rewards"] == (arm == "shuffled")
    more = episodes_played(out / arm) - budget
    assert arm == study.TWO_RANKS or 0 <= more < 12, "less than a step above the budget"
    if arm == "more-rft":  # the first RFT's attempts are not made once more
        first, second = (json.loads((out / run / "config.json").read_text())["seed"] for run in ("rft", arm))
        assert first != second and str(second) not in played.seeds
    rows = json.loads((out / f"eval-{arm}" / "results.json").read_text())
    assert rows[-1]["stage"] == arm and sum(rows[-1]["stops"].values()) == 12
    study.play_arm(cfg, arm)
    assert len(ran) == number + 2, "what is done is not done twice"


def test_an_arm_finds_its_demo_from_anywhere(monkeypatch, tmp_path):
    """The study is started in one folder, its arms in the repository."""
    monkeypatch.chdir(tmp_path)
    cfg = study.Study(out="here", seeds=("0",))
    first, arms = study.demo_part(cfg, "0"), study.arm_parts(cfg, "0")
    monkeypatch.chdir(ROOT)
    at = str(tmp_path / "here" / "seed-0")
    assert first.command[first.command.index("--out") + 1] == at
    for part in arms:
        theirs = cli.parse(study.Study, "", "", list(part.command[2:]))
        assert study.demo_of(theirs, "0").out == at and part.proof.is_relative_to(at)
        assert part.needs == (first.proof,)


def test_an_arm_needs_its_demo(ran, played):
    with pytest.raises(BadInput, match="no finished demo"):
        study.play_arm(study.demo_of(played, "7"), "shuffled")


def test_a_budget_holds_over_a_resume(ran, played, tmp_path):
    """Two commands play what one plays: the second one knows what the first has used up."""
    cfg = study.demo_of(played, "0")
    start = Path(cfg.out) / "rft" / "model"
    flags = [
        "--stage",
        "grpo",
        "--model",
        str(start),
        "--resume",
        "--no-dynamic-sampling",
        *SMALL_FLAGS["grpo"].split(),
    ]
    train.main([*flags, "--out", str(tmp_path / "a"), "--steps", "9", "--episodes", "13"])
    assert episodes_played(tmp_path / "a") == 18  # steps of 6
    for steps in ("2", "9", "9"):
        train.main([*flags, "--out", str(tmp_path / "b"), "--steps", steps, "--episodes", "13"])
    assert episodes_played(tmp_path / "b") == 18
    ours, theirs = (dict(pretrained.read_safetensors(tmp_path / name / "model")) for name in "ab")
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_the_summary_of_what_is_finished(ran, played):
    found = study.summary(dataclasses.replace(played, seeds=("0", "1")))
    stages = [row["stage"] for row in found["rows"] if row["domain"] == "all"]
    assert stages[:6] == STAGES and found["sampled"]["grpo"]["0"] >= 12
    assert all(row["episodes"] == (12 if row["domain"] == "all" else 4) for row in found["rows"])
    assert found["changes"].keys() == {"sft to grpo", "rft to grpo"}
    text = study.as_text(found)
    assert all(text.count(f"\n{stage} ") >= 4 for stage in STAGES) and "grpo over rft: " in text
    with pytest.raises(BadInput, match="nothing in"):
        study.summary(dataclasses.replace(played, seeds=("5",)))


def write_evaluation(part, reward):
    """What a part of a study leaves behind: four tasks whose one check passes or fails with the reward, and of a
    demo the same for RFT, and GRPO that solves them all."""
    folder = part.proof.parent if part.what != "demo" else part.proof.parent / "eval-rft"
    for place in (folder, *([folder.with_name("eval-grpo")] if part.what == "demo" else [])):
        place.mkdir(parents=True)
        rewarded = reward if place is folder else 1.0
        check = Check("action", "hold", rewarded == 1.0)
        played = [
            Trajectory(Task("desk", "test", name), i, stop=Stop.USER_STOP, evaluation=Evaluation(rewarded, (check,)))
            for name in "abcd"
            for i in range(4)
        ]
        write_jsonl(place / "episodes-0.jsonl", (t.to_json() for t in played))
        (place / "results.json").write_text("[]")
    part.proof.write_text("[]")


def test_a_study_plays_its_parts_and_says_what_grpo_adds(tmp_path, monkeypatch, capsys):
    seen = []

    def play(waiting, logs, jobs):
        seen.append((list(waiting), logs, jobs))
        for part in waiting:
            if part.what != "shuffled":
                write_evaluation(part, 0.0)
        return [part for part in waiting if part.what == "shuffled"]

    monkeypatch.setattr(study.parts, "play", play)
    with pytest.raises(BadInput, match=r"not all is done \(seed 0, shuffled; seed 1, shuffled failed\)"):
        study.main(["--out", str(tmp_path / "out"), "--seeds", "0,1", "--jobs", "3"])
    ((waiting, logs, jobs),) = seen
    assert logs == tmp_path / "out" / "logs" and jobs == 3
    names = ["more-rft", "no-curriculum", "shuffled"]
    assert [part.seed for part in waiting if part.what == "demo"] == ["0", "1"]
    assert [part.what for part in waiting if part.seed == "0"] == ["demo", *names, "two-ranks"]
    assert [part.what for part in waiting if part.seed == "1"] == ["demo", *names]
    assert [part.what for part in waiting if part.processes == 2] == ["two-ranks"]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    gains = {each["over"]: (each["gain"], each["seeds"]) for each in found["gains"]}
    assert gains["rft"] == gains["more-rft"] == (1.0, ["0", "1"]) and gains["two-ranks"] == (1.0, ["0"])
    assert "shuffled" not in gains and found["changes"] == {"rft to grpo": ANY}
    assert "More often right: calling hold (0% to 100%)" in found["changes"]["rft to grpo"]
    text = (tmp_path / "out" / "table.txt").read_text()
    assert text in capsys.readouterr().out and "grpo over rft: +100.0 points of pass@1" in text


def test_seeds_are_pooled_task_by_task():
    tasks = [Task("desk", "test", "a"), Task("desk", "test", "b"), Task("locker", "test", "c")]

    def seed(*solved):  # how many of two trials of each task
        return [verdict(task, i, float(i < n)) for task, n in zip(tasks, solved) for i in range(2)]

    broken = verdict(tasks[2], 1, 0, Stop.USER_ERROR)
    by_seed = {"0": seed(2, 0, 1), "1": [*seed(1, 0, 1)[:-1], broken]}
    desk, locker, whole = pooled("grpo", by_seed)
    assert (desk["domain"], locker["domain"], whole["domain"]) == ("desk", "locker", "all")
    assert desk["pass@1"] == pytest.approx((3 / 4 + 0) / 2) and desk["tasks"] == 2 and desk["episodes"] == 8
    assert desk["by_seed"] == {"0": 0.5, "1": 0.25}
    assert desk["pass^2"] == pytest.approx((0.5 + 0) / 2) and desk["pass@2"] == pytest.approx(0.5)
    assert locker["pass@1"] == pytest.approx(2 / 3) and locker["errors"] == 1 and locker["pass@2"] == 1.0
    assert whole["ci95"] == bootstrap_interval([(4, 3), (4, 0), (3, 2)])
    change = gain({"0": seed(0, 0, 0), "1": seed(2, 2, 2)}, {"0": seed(1, 0, 2)}, "rft")
    assert change["seeds"] == ["0"] and change["gain"] == pytest.approx(0.5), "only the seeds that both have"
    change = gain({"0": seed(0, 0, 0), "1": seed(2, 2, 2)}, {"1": seed(2, 0, 2), "0": seed(2, 0, 2)}, "rft")
    assert change["gain"] == pytest.approx(1 / 6) and change["over"] == "rft"
    assert change["by_seed"] == {"0": pytest.approx(2 / 3), "1": pytest.approx(-1 / 3)}


@pytest.mark.parametrize(("budget", "available"), [(1, 768), (1024, 768), (3072, 768), (3073, 768), (9000, 7)])
def test_more_rft_gets_its_budget(budget, available):
    tasks, samples = study.spread(budget, available)
    assert 1 <= tasks <= available and samples >= 4 and budget <= tasks * samples < budget + samples


@pytest.mark.parametrize(
    "flags", ["--seeds 0,0", f"--seeds {10**20}", "--seeds a", "--seeds -1", "--jobs 0", "--arm rft"]
)
def test_a_study_with_wrong_settings_is_one_line(flags, tmp_path, capsys):
    out = tmp_path / "out"
    try:
        status = run_script("minitau.study", study.main, ["--out", str(out), *flags.replace(" -", "=-").split()])
    except SystemExit as error:  # by the parser
        status = error.code
    assert status == 2 and capsys.readouterr().err.count("\n") == 1 and not out.exists()


def test_grpo_under_torchrun(tiny_dir, tmp_path):
    """Two sharded ranks share one queue of episodes; each plays some, and both train on all."""
    out = tmp_path / "run"
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "train.py")
    flags = (
        "--stage grpo --steps 2 --tasks 9 --tasks-per-step 3 --group-size 4 --no-dynamic-sampling "
        "--lr 1e-3 --max-new-tokens 16 --max-turns 3 --concurrency 4"
    )
    done = command(*torchrun, "--model", str(tiny_dir), "--out", str(out), *flags.split())
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in whole_lines(out / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["episodes"] == 12 and sum(line["stops"].values()) == 12 for line in lines)
    # The engine's whole copy and the shards it came from must be the same weights.
    assert all(line["drift"] < 1e-4 for line in lines)
    assert [line["weight_versions"] for line in lines] == [[0], [1]]
    # What each rank's trainer thought of its tokens stands beside what the sampler did, whoever played the episode.
    for line in lines:
        rows = [json.loads(row) for row in whole_lines(out / "trajectories" / f"step-00000{line['step']}.jsonl")]
        pairs = [(row["old_logprobs"], row["trajectory"]) for row in rows]
        sampled = [[p for p, says in zip(t["logprobs"], t["said"]) if says] for _, t in pairs]
        drifts = [abs(a - b) for (old, _), said in zip(pairs, sampled) for a, b in zip(old, said, strict=True)]
        assert sum(drifts) / len(drifts) == pytest.approx(line["drift"], rel=1e-3)
    trained, start = pretrained.load_model(out / "model"), pretrained.load_model(tiny_dir)
    assert not trained.head_weight.equal(start.head_weight)
