"""Bad input gets one clear line and a non-zero exit, and loses nothing.

The scripts' main functions run in this process (importing torch anew for each case would take
minutes); one case goes through a real shell command.
"""

import dataclasses
import errno
import functools
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm

import eval as evaluation
import serve_user
import train
from minitau import ablate, claim, cli, config, demo, plot, run, sft, study, tasks, tiny, view
from minitau.base import pretrain
from minitau.episode import BadInput
from minitau.log import metrics_of
from minitau.script import run_script

ROOT = Path(__file__).parent.parent


def refused(capsys, main, *flags) -> str:
    """Run a script that must refuse; its one line."""
    try:
        status = run_script("script", main, [str(flag) for flag in flags])
    except SystemExit as stop:  # argparse leaves by itself
        status = stop.code
    err = capsys.readouterr().err
    assert status not in (0, None)
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    path.write_text(3 * (json.dumps(row) + "\n"))
    return path


def test_a_gpu_without_enough_memory_is_one_line_with_what_takes_less(capsys, monkeypatch, tmp_path):
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB, of\n which 1 GiB"

    def fails(cfg):
        raise torch.OutOfMemoryError(f"{text} is free. See documentation for Memory Management")

    monkeypatch.setattr(train, "train_sft", fails)
    line = refused(capsys, train.main, "--stage", "sft", "--model", "m", "--data", "d", "--out", tmp_path)
    assert line.startswith("script: CUDA out of memory. Tried to allocate 2.00 GiB; ") and "documentation" not in line
    assert all(f"--{flag}" in line for flag in ("recompute all", "resume", "micro-batch-tokens", "engine-mem"))


def test_a_task_file_without_a_name_is_not_all_tasks(capsys, tmp_path, tiny_dir):
    flags = ("--stage", "grpo", "--model", tiny_dir, "--out", tmp_path / "run")
    assert "--task-file is empty" in refused(capsys, train.main, *flags, "--task-file", "")
    assert "a folder" in refused(capsys, train.main, *flags, "--task-file", tmp_path)


def test_unknown_flags_are_named_with_the_nearest_known_one(capsys):
    assert "did you mean --group-size?" in refused(capsys, train.main, "--stage", "grpo", "--group-sice", 4)
    assert "unknown flag --wat" in refused(capsys, evaluation.main, "--wat")
    assert "unknown flag --wat" in refused(capsys, serve_user.main, "--wat")
    assert "'grpo' stands alone" in refused(capsys, evaluation.main, "grpo")
    # An abbreviation would silently set another flag than the one that was meant.
    assert "unknown flag --temp" in refused(capsys, train.main, "--stage", "grpo", "--temp", 1)


def test_values_of_the_wrong_kind(capsys):
    assert "--steps" in refused(capsys, train.main, "--stage", "grpo", "--steps", "many")
    assert "--stage" in refused(capsys, train.main)
    assert "--shaping" in refused(capsys, train.main, "--stage", "grpo", "--shaping", "dense")


def test_missing_and_foreign_models(capsys, tmp_path, data):
    def sft(*model):
        flags = ("--stage", "sft", "--data", data, "--out", tmp_path / "run", *model)
        return refused(capsys, train.main, *flags)

    assert "no such directory" in sft("--model", tmp_path / "nowhere")
    assert "--model is needed" in sft()
    assert "--model is needed" in refused(capsys, evaluation.main, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists(), "a refused run must not leave a folder behind"


def test_a_directory_that_is_not_qwen3(capsys, tmp_path, tiny_dir, data):
    other = tmp_path / "other"
    shutil.copytree(tiny_dir, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    line = refused(capsys, train.main, "--stage", "sft", "--model", other, "--data", data, "--out", tmp_path / "run")
    assert "'llama'" in line and "Qwen3" in line
    assert not (tmp_path / "run").exists()


def test_jsonl_broken_at_a_line(capsys, tmp_path, tiny_dir, data):
    data.write_text(data.read_text() + '{"messages": [\n')
    flags = ("--stage", "sft", "--model", tiny_dir, "--data", data, "--out", tmp_path / "run")
    assert f"{data}, line 4:" in refused(capsys, train.main, *flags)
    data.write_text("")
    assert "no conversations" in refused(capsys, train.main, *flags)
    assert "no such file" in refused(capsys, train.main, *flags[:5], tmp_path / "none.jsonl", *flags[6:])
    assert "a folder" in refused(capsys, train.main, *flags[:5], tmp_path, *flags[6:])


def test_domains_and_splits_that_do_not_exist(capsys, tmp_path, tiny_dir):
    out = ("--out", tmp_path / "run")
    line = refused(capsys, evaluation.main, "--agent", "gold", "--domains", "desk,kitchen", *out)
    assert "'kitchen'" in line and "locker" in line
    line = refused(capsys, evaluation.main, "--agent", "gold", "--split", "validation", *out)
    assert "'validation'" in line and "train" in line
    assert "'kitchen'" in refused(
        capsys, train.main, "--stage", "rft", "--model", tiny_dir, "--domains", "kitchen", *out
    )
    assert not (tmp_path / "run").exists()


def test_settings_that_cannot_work(capsys, tmp_path, tiny_dir):
    base = ("--stage", "grpo", "--model", tiny_dir, "--out", tmp_path / "run")
    assert "--group-size" in refused(capsys, train.main, *base, "--group-size", 1)
    assert "--temperature" in refused(capsys, train.main, *base, "--temperature", 0)
    assert "--steps" in refused(capsys, train.main, *base, "--steps", 0)
    assert "--micro-batch-tokens" in refused(capsys, train.main, *base, "--micro-batch-tokens", 100)
    assert "at most 10000" in refused(capsys, train.main, *base, "--concurrency", 10**8)
    assert "--group-size is 10000000; it must be at most" in refused(capsys, train.main, *base, "--group-size", 10**7)
    for name in ("vocab", "hidden", "layers", "heads"):
        flags = (f"--{name}", 10**8, "--out", tmp_path / "small")
        assert f"--{name} 100000000: at least 1, and at most" in refused(capsys, tiny.main, *flags)
    assert "--gpus" in refused(capsys, train.main, *base, "--preset", "tau2-4b", "--dry-run", "--gpus", 10**9)
    assert "--updates-per-step" in refused(capsys, train.main, *base, "--updates-per-step", 17)
    assert not (tmp_path / "run").exists()
    short = ("--max-tokens", 10, "--tasks", 3, "--tasks-per-step", 3, "--no-screen", "--steps", 1)
    assert run_script("train", train.main, [str(flag) for flag in (*base, *short)]) == 1
    assert "raise --max-tokens" in capsys.readouterr().err, "no reply would ever fit"


def test_an_output_folder_that_holds_another_run(capsys, tmp_path, tiny_dir, data):
    out = tmp_path / "run"
    flags = ("--stage", "sft", "--model", tiny_dir, "--data", data, "--out", out, "--epochs", 1)
    assert run_script("train", train.main, [str(flag) for flag in flags]) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "--resume" in refused(capsys, train.main, *flags)
    assert "lr (1e-05, now 0.5)" in refused(capsys, train.main, *flags, "--resume", "--lr", 0.5)
    line = refused(capsys, evaluation.main, "--agent", "gold", "--out", out, "--resume")
    assert f"{out} holds a run of sft; choose another --out" in line
    many = {f"s{i}": i for i in range(40)}
    told = claim.difference({"stage": "sft", **many}, {"stage": "sft", "s0": "x" * 999})
    assert "s0 (0, now 'xxx" in told and " and 35 more; " in told and len(told) < 400
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}, "nothing may be lost"
    stranger = tmp_path / "photos"
    stranger.mkdir()
    (stranger / "cat.jpg").write_text("meow")
    assert "not empty" in refused(capsys, train.main, *flags[:7], stranger)
    assert "is a file" in refused(capsys, train.main, *flags[:7], stranger / "cat.jpg")


def test_other_weights_under_the_same_name_are_another_run(capsys, tmp_path, tiny_dir, data):
    """Also where the folder of the model has moved, and they are the same, a run goes on."""
    model, out = shutil.copytree(tiny_dir, tmp_path / "model"), tmp_path / "run"
    flags = ("--stage", "sft", "--data", data, "--out", out, "--epochs", 1)
    assert run_script("train", train.main, [str(flag) for flag in (*flags, "--model", model)]) == 0
    moved = model.rename(tmp_path / "moved")
    assert run_script("train", train.main, [str(flag) for flag in (*flags, "--model", moved, "--resume")]) == 0
    other = tiny.Tiny(out=str(tmp_path / "other"), vocab=700, layers=2, hidden=64, corpus_tasks=20, seed=1)
    tiny.make(other, tiny.world_texts(other))
    shutil.copy(tmp_path / "other" / "model.safetensors", moved)
    capsys.readouterr()
    line = refused(capsys, train.main, *flags, "--model", moved, "--resume")
    assert f"{out} holds another run: what --model holds; choose another --out" in line
    settings = json.loads((out / "config.json").read_text())
    held = settings.pop("model_sha256")
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= held.keys()
    (out / "config.json").write_text(json.dumps(settings))  # as of a run that was begun when that was not noted
    assert f"model ('{moved}', now '{tiny_dir}')" in refused(
        capsys, train.main, *flags, "--model", tiny_dir, "--resume"
    )
    assert run_script("train", train.main, [str(flag) for flag in (*flags, "--model", moved, "--resume")]) == 0
    assert "model_sha256" in json.loads((out / "config.json").read_text())


def test_a_run_goes_on_with_its_data_elsewhere_and_settings_that_came_later(capsys, tmp_path, tiny_dir, data):
    out = tmp_path / "run"
    flags = ["--stage", "sft", "--model", str(tiny_dir), "--out", str(out), "--epochs", "1", "--resume", "--data"]
    assert run_script("train", train.main, [*flags, str(data)]) == 0
    moved = data.rename(tmp_path / "moved.jsonl")
    settings = json.loads((out / "config.json").read_text())
    del settings["max_refused"]  # as of code that did not have it
    (out / "config.json").write_text(json.dumps(settings))
    capsys.readouterr()
    assert "max_refused (0.1, now 0.5)" in refused(capsys, train.main, *flags, moved, "--max-refused", 0.5)
    assert run_script("train", train.main, [*flags, str(moved)]) == 0
    assert json.loads((out / "config.json").read_text())["max_refused"] == 0.1
    moved.write_text(moved.read_text() * 2)
    capsys.readouterr()
    assert "what --data holds" in refused(capsys, train.main, *flags, moved)


def test_settings_that_came_later_are_what_follows_the_environment(tmp_path):
    cfg = config.Evaluation(out=str(tmp_path / "run"), env="tau2", max_turns=200, resume=True)
    run.claim_on_main(cfg, {"script": "eval.py"})
    path = tmp_path / "run" / "config.json"
    settings = json.loads(path.read_text())
    del settings["max_turns"]
    path.write_text(json.dumps(settings))
    run.claim_on_main(cfg, {"script": "eval.py"})
    path.write_text(json.dumps(settings))
    with pytest.raises(BadInput, match=r"max_turns \(200, now 24\)"):
        run.claim_on_main(dataclasses.replace(cfg, max_turns=24), {"script": "eval.py"})


def test_a_log_that_is_not_installed(capsys, monkeypatch, tmp_path, tiny_dir, data):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for package in ("wandb", "tensorboard"):
        flags = ("--stage", "sft", "--model", tiny_dir, "--data", data, "--out", tmp_path / "run", f"--{package}")
        line = refused(capsys, train.main, *flags)
        assert f"--{package}: it is not installed; pip install {package}" in line
    assert not (tmp_path / "run").exists()


def test_no_room_for_the_model_at_the_end_of_a_run(capsys, monkeypatch, tmp_path, tiny_dir, data):
    """It is written by --resume, from the last checkpoint; nothing that is half there stays."""
    out = tmp_path / "run"
    flags = f"--stage sft --model {tiny_dir} --data {data} --out {out} --epochs 1 --resume".split()

    def full(source, to):
        (to / source.name).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(to / source.name))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", full)
        assert run_script("train", train.main, flags, resume="the same command with --resume goes on") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "No space left" in line and "; free some space, then the same command with --resume goes on" in line
    assert not list(out.glob("*model*")) and run_script("train", train.main, flags) == 0 and (out / "model").is_dir()


def test_what_a_run_wrote_is_damaged(capsys, tmp_path, tiny_dir):
    out = tmp_path / "run"
    flags = ("--stage", "rft", "--model", tiny_dir, "--out", out, "--tasks", 1, "--round-tasks", 2, "--samples", 2)
    flags += ("--max-turns", 1, "--max-new-tokens", 4)
    assert run_script("train", train.main, [str(flag) for flag in flags]) == 0
    capsys.readouterr()

    def resumed() -> str:
        assert run_script("train", train.main, [str(flag) for flag in (*flags, "--resume")]) == 2
        return capsys.readouterr().err.splitlines()[-1]  # before it there is a bar

    path = out / "collected" / "round-0001.jsonl"
    whole = path.read_bytes()
    shutil.rmtree(out / "checkpoints")
    path.write_bytes(whole[:-300])  # a last line that is not whole is none
    count = whole.count(b"\n")
    said = f"{path}: these are not the {count} episodes of its round; remove {path.name}, and --resume plays that round"
    assert said in resumed()
    path.write_bytes(whole.replace(b'"ids"', b'"odd"', 1))
    assert f"{path}, line 1: no episode (KeyError: 'ids'); remove {path.name}" in resumed()
    path.write_bytes(whole)
    screened = out / "screened.json"
    screened.write_text("[")
    assert f"{screened}: damaged" in resumed()


def test_a_round_that_is_gone_after_training_is_refused(capsys, tmp_path, tiny_dir):
    """Its tasks would be played by another model, and others learned from in another order."""
    out = tmp_path / "run"
    flags = f"--stage rft --model {tiny_dir} --out {out} --tasks 6 --round-tasks 3 --samples 3 --min-partial 0"
    flags += " --no-screen --max-turns 3 --max-new-tokens 24 --epochs 1 --resume"
    assert run_script("train", train.main, flags.split()) == 0
    path, steps = out / "collected" / "round-0002.jsonl", len(metrics_of(out / "metrics.jsonl"))
    assert steps > 2, "nothing was trained"
    whole = path.read_bytes()
    path.write_bytes(whole[:-300])
    capsys.readouterr()

    def resumed() -> str:
        assert run_script("train", train.main, flags.split()) == 2
        return capsys.readouterr().err.splitlines()[-1]  # before it there is a bar

    assert "these are not the 9 episodes of its round; There is a checkpoint of after the rounds" in resumed()
    path.unlink()
    assert f"{path} is gone. There is a checkpoint of after the rounds, so none is played again" in resumed()
    path.write_bytes(whole)
    assert run_script("train", train.main, flags.split()) == 0 and len(metrics_of(out / "metrics.jsonl")) == steps


def test_a_round_that_is_gone_is_played_again_and_no_other(tmp_path, tiny_dir):
    """And stands in the metrics once, as the others do."""
    out = tmp_path / "run"
    flags = f"--stage rft --model {tiny_dir} --out {out} --tasks 3 --round-tasks 1 --samples 2 --no-screen"
    flags += " --max-turns 1 --max-new-tokens 4"
    assert run_script("train", train.main, flags.split()) == 0
    folder, lines = out / "collected", metrics_of(out / "metrics.jsonl")
    before = {path.name: path.read_text() for path in folder.iterdir()}
    assert [line["step"] for line in lines] == [1, 2, 3]
    (folder / "round-0001.jsonl").unlink()
    shutil.rmtree(out / "checkpoints")
    assert run_script("train", train.main, [*flags.split(), "--resume"]) == 0
    again = metrics_of(out / "metrics.jsonl")
    assert [line["step"] for line in again] == [2, 3, 1] and again[:2] == lines[1:]
    for path in folder.iterdir():
        played, first = (
            [json.loads(line) for line in text.splitlines()] for text in (path.read_text(), before[path.name])
        )
        assert [row["ids"] for row in played] == [row["ids"] for row in first]
        assert path.name == "round-0001.jsonl" or path.read_text() == before[path.name]


def test_a_full_disk_is_said_with_what_to_do(capsys):
    def body(argv):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there/file")

    assert run_script("train", body, [], resume="the same command with --resume goes on") == 1
    line = capsys.readouterr().err
    assert "'there/file'; free some space, then the same command with --resume goes on" in line


def test_a_command_with_a_quote_too_many(capsys, tmp_path, tiny_dir):
    flags = ("--stage", "grpo", "--model", tiny_dir, "--out", tmp_path / "run", "--engine", "sglang", "--no-screen")
    line = refused(capsys, train.main, *flags, "--dtype", "bfloat16", "--engine-command", "sglang '")
    assert '--engine-command "sglang \'": no closing quotation' in line
    for own in ("sglang --port 30000", "sglang --host=0.0.0.0"):
        line = refused(capsys, train.main, *flags, "--dtype", "bfloat16", "--engine-command", own)
        assert "which is chosen here: servers listen on loopback only" in line
    for url in ("http://[::1:30000", "http://.gpu1:30000", "http://gpu1:port", "http://", "https://gpu1:30000", "gpu1"):
        line = refused(capsys, train.main, *flags, "--dtype", "bfloat16", "--engine-url", url)
        assert f"--engine-url {url}: http://HOST:PORT is needed" in line
    assert not (tmp_path / "run").exists()


def test_a_run_that_lost_its_checkpoints_does_not_start_over(capsys, tmp_path, tiny_dir, data):
    out = tmp_path / "run"
    flags = ("--stage", "sft", "--model", tiny_dir, "--data", data, "--out", out, "--batch-size", 1, "--save-every", 2)
    assert run_script("train", train.main, [str(flag) for flag in flags]) == 0
    capsys.readouterr()
    metrics = (out / "metrics.jsonl").read_text()
    shutil.rmtree(out / "checkpoints")
    for every in (2, 10, 10):  # whatever is asked for now
        line = refused(capsys, train.main, *flags[:-1], every, "--resume")
        assert "no checkpoint to go on from" in line
    assert (out / "metrics.jsonl").read_text() == metrics, "nothing is lost"
    (out / "metrics.jsonl").write_text("".join(metrics.splitlines(keepends=True)[:5]))
    assert "metrics of 5 steps" in refused(capsys, train.main, *flags, "--resume")
    (out / "metrics.jsonl").write_text("".join(metrics.splitlines(keepends=True)[:4]))
    often = [*map(str, flags[:-1]), "1", "--resume"]
    assert run_script("train", train.main, often) == 0, "killed before the first was written, whatever is asked for now"
    capsys.readouterr()
    (out / "metrics.jsonl").write_text("{}\n")
    assert "metrics.jsonl, line 1: not a step's metrics" in refused(capsys, train.main, *flags, "--resume")


def test_a_run_killed_while_it_claimed_its_folder_goes_on(tmp_path, tiny_dir, data):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".lock").touch()
    (out / "config.tmp").write_text('{"stage"')
    flags = f"--stage sft --model {tiny_dir} --data {data} --out {out} --epochs 1 --resume"
    assert run_script("train.py", train.main, flags.split()) == 0 and (out / "model").is_dir()


def test_a_file_where_a_folder_is_needed(capsys, tmp_path):
    (tmp_path / "file").write_text("precious")
    for main, flags in ((tiny.main, []), (sft.main, ["--agent", "gold", "--tasks", 1]), (tasks.main, ["--tasks", 1])):
        line = refused(capsys, main, *flags, "--out", tmp_path / "file" / "x")
        assert f"{tmp_path / 'file'}" in line and "a file is where a folder is needed" in line and "Errno" not in line
    assert (tmp_path / "file").read_text() == "precious"


def test_a_folder_where_a_file_is_to_be(tmp_path, tiny_dir, capsys):
    out = tmp_path / "run"
    flags = ("--agent", "gold", "--tasks", 1, "--num-trials", 1, "--out", out)
    assert run_script("eval.py", evaluation.main, list(map(str, flags))) == 0
    (out / "results.json").unlink()
    (out / "results.json").mkdir()
    line = refused(capsys, evaluation.main, *flags, "--resume")
    assert f"{out / 'results.json'}: a folder is where a file is needed; remove it" in line and "Errno" not in line


def test_no_disk_space_at_a_checkpoint(tmp_path, tiny_dir, data):
    """A limit on file sizes stands in for a full disk: the system refuses the write all the same."""
    flags = f"--stage sft --model {tiny_dir} --data {data} --out {tmp_path / 'run'} --batch-size 1 --save-every 1"
    code = (
        "import resource, signal, sys, train\n"
        "from minitau import checkpoint, script\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "begin = checkpoint.begin\n"
        "def save(run_dir, step, *args, **kwargs):\n"
        "    if step == 2:\n"  # the disk fills up after the first checkpoint
        "        checkpoint.finish()\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "    return begin(run_dir, step, *args, **kwargs)\n"
        "checkpoint.begin = save\n"
        f"sys.exit(script.run_script('train.py', train.main, {flags.split()!r}))\n"
    )
    done = warm.run("-c", code)
    assert done.returncode == 1
    # A carriage return is how the progress bar gets out of the way.
    lines = [line for line in done.stderr.replace("\r", "\n").split("\n") if line.startswith("train.py:")]
    assert len(lines) == 1 and "step 2 was not written" in lines[0] and "--resume" in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    assert run_script("train", train.main, [*flags.split(), "--resume"]) == 0, "with space again, the run goes on"


def test_ctrl_c_in_a_rollout_and_a_second_process(tmp_path, tiny_dir):
    """An orderly end in the middle of episodes, and until then nobody else gets into the folder."""
    flags = f"--stage grpo --model {tiny_dir} --out {tmp_path / 'run'} --max-new-tokens 100 --no-screen --resume"
    said = tmp_path / "said"
    with open(said, "w") as file:
        first = warm.Script("train.py", *flags.split(), stderr=file)
    try:
        deadline = time.time() + 120
        while "step 1: " not in said.read_text() and time.time() < deadline:  # the bar of its first episodes
            assert first.poll() is None
            time.sleep(0.05)
        second = warm.run("train.py", *flags.split())
        assert second.returncode == 2 and "another process is at work" in second.stderr, second.stderr
        assert first.poll() is None and not (tmp_path / "run" / "metrics.jsonl").read_text(), "it still plays"
        first.send_signal(signal.SIGINT)
        first.wait(60)
    finally:
        first.kill()
    err = said.read_text()
    assert first.returncode == 130 and "interrupted" in err and "Traceback" not in err, err[-2000:]


def test_tau2_that_is_not_there(tmp_path, tiny_dir):
    """The real command: without tau2-bench one line says how to get it."""
    command = f"eval.py --agent gold --env tau2 --domains retail --out {tmp_path / 'run'}"
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
        check=False,
    )
    if done.returncode == 0:
        pytest.skip("tau2-bench is installed here")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("max_grad_norm", 0.0, "it must be above 0"),
        ("engine_timeout", math.nan, "at least 1"),
        ("engine_round", 99, "take 2 to 24 bits"),
        ("sequence_low", 3.0, "leaves no ratio"),
        ("max_grad_norm", math.nan, "a number from 0 up"),
        ("lr", -1.0, "a number from 0 up"),
        ("user_max_tokens", -1, "a number from 0 up"),
        ("steps", 0, "at least 1"),
        ("seed", 10**20, "fit 64 bits"),
        ("user_api_base", "127.0.0.1:30001/v1", "http://HOST:PORT/v1 is needed"),
        ("user_api_base", "http://a:1/v1,b:1/v1", "commas between several"),
        ("user_api_base", "http://a:1/v1,", "commas between several"),
        ("user_model", "", "must not be empty"),
    ],
)
def test_a_setting_out_of_range(setting, value, said):
    cli.check(config.GRPO(model="m", out="o"))
    with pytest.raises(BadInput, match=said):
        cli.check(config.GRPO(**{"model": "m", "out": "o", setting: value}))
    with pytest.raises(BadInput, match="it is a part of a whole"):
        cli.check(config.RFT(model="m", out="o", min_partial=5.0))


SCRIPTS = {
    "train.py": cli.parse_stage,
    "eval.py": functools.partial(cli.parse, config.Evaluation, "eval.py", ""),
    "serve_user.py": functools.partial(cli.parse, config.Server, "serve_user.py", ""),
    "minitau.sft": functools.partial(cli.parse, config.Demonstrations, "minitau.sft", ""),
    "minitau.sft --check": functools.partial(cli.parse, config.Check, "minitau.sft", ""),
    "minitau.tasks": functools.partial(cli.parse, config.Listing, "minitau.tasks", ""),
    "minitau.tiny": functools.partial(cli.parse, tiny.Tiny, "minitau.tiny", ""),
    "minitau.ablate": functools.partial(cli.parse, ablate.Ablations, "minitau.ablate", ""),
    "minitau.study": functools.partial(cli.parse, study.Study, "minitau.study", ""),
    "minitau.demo": functools.partial(cli.parse, demo.Demo, "minitau.demo", ""),
    "minitau.base.pretrain": functools.partial(cli.parse, pretrain.Pretrain, "minitau.base.pretrain", ""),
    "minitau.view": lambda words: cli.parse(view.View, "minitau.view", "", behind_folders(words)),
    "minitau.plot": lambda words: cli.parse(plot.Plot, "minitau.plot", "", behind_folders(words)),
}
NOT_OURS = ("pytest", "sglang.launch_server")


def behind_folders(words):
    """The flags, which follow the folders there."""
    return words[next((i for i, word in enumerate(words) if word.startswith("-")), len(words)) :]


def readme_commands():
    """(script, flags) of every command in README.md that runs one of our scripts."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    prose, *rest = text.split("```\n")  # prose and blocks of code take turns
    blocks, prose = rest[::2], " ".join([prose, *rest[1::2]])
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    for command in (part for line in lines for part in re.split(r" && | & | &$", line)):
        if found := re.match(r"(?:python (?:-m )?|torchrun --nproc_per_node \S+ (?:-m )?)(\S+)(.*)", command):
            name, words = found[1], shlex.split(found[2], comments=True)
            yield f"{name} --check" if "--check" in words else name, [word for word in words if word != "..."]


def test_every_command_in_the_readme_has_flags_that_exist():
    found = list(readme_commands())
    assert len(found) > 15
    for script, words in found:
        if script in NOT_OURS:
            continue
        if script.startswith("benchmarks."):
            assert (ROOT / f"{script.replace('.', '/')}.py").is_file()
        else:
            SCRIPTS[script](words)


def test_every_place_to_edit_that_the_readme_names_exists():
    table = (ROOT / "README.md").read_text().split("## To try X, edit Y")[1].split("\n## ")[0]
    places = [name for name in re.findall(r"`(\w+(?:\.\w+)+)`", table) if "/" not in name]
    assert len(places) > 20
    for place in places:
        module, *names = place.split(".")
        found = importlib.import_module("train" if module == "train" else f"minitau.{module}")
        for name in names:
            fields = getattr(found, "__dataclass_fields__", {})
            assert hasattr(found, name) or name in fields, place
            found = getattr(found, name, None)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints",
        "engine",
        "killed",
        "learns",
        "peers",
        "ratios",
        "tau2_concurrent",
        "tau2_faithful",
        "trainer",
        "whole_step",
    ],
)
def test_a_benchmark_starts_as_the_readme_says(name):
    """From the repository's root, with nothing of ours installed. The first is typed for real."""
    command = ["-m", f"benchmarks.{name}", "--help"]
    if name == "checkpoints":
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    else:
        done = warm.run(*command)
    assert done.returncode == 0 and f"benchmarks.{name}" in done.stdout, done.stderr[-500:]


@pytest.mark.parametrize(
    ("script", "stage", "flags"),
    [(train, "train_sft", ["--stage", "sft", "--model", "M", "--data", "D", "--out", "O"]),
     (evaluation, "evaluate", ["--model", "M", "--out", "O"])],
)  # fmt: skip
def test_a_rank_that_fails_does_not_wait_for_the_others(monkeypatch, script, stage, flags):
    """With NCCL to leave the process group would: torchrun ends them once this one is gone."""
    left = []
    monkeypatch.setattr(script.parallel, "stop", lambda: left.append(True))

    def fail(cfg):
        raise BadInput("no")

    monkeypatch.setattr(script, stage, fail)
    with pytest.raises(BadInput, match="no"):
        script.main(flags)
    assert not left
