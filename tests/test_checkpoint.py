"""Checkpoints survive crashes and full disks, resume bit for bit, and a bad directory is one clear line."""

import json
import logging
import resource
import shutil
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import SMALL, small_model
from safetensors.torch import load_file, save_file

from minitau import checkpoint, config, host, parallel, pretrained
from minitau import run as runs
from minitau.attention import packed_attention
from minitau.episode import BadInput
from minitau.files import write_json
from minitau.pretrained import CheckpointError

# parallel.py silences it for real runs; pytest starts every test with filters of its own.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Crash(BaseException):
    """Stands for a power cut or a kill: nothing of ours may catch it."""


def new_run(seed=0, **changes):
    net = small_model(seed, **changes)
    return net, runs.adamw(net, config.SFT(lr=1e-2))


def train_steps(net, optimizer, steps):
    """A few real AdamW steps; what a step trains on depends on its number alone."""
    for step in steps:
        ids = torch.randint(SMALL["vocab_size"], (24,), generator=torch.Generator().manual_seed(step))
        attend = packed_attention([0, 24], "cpu", torch.float32)
        optimizer.zero_grad()
        net(ids, torch.arange(24), attend, torch.arange(23), ids[1:])[0].mean().neg().backward()
        optimizer.step()


def save(run_dir, step, net, optimizer, *, keep=2, state=None, dtype=torch.float32, tokenizer_dir=None):
    begin(run_dir, step, net, optimizer, keep=keep, state=state, dtype=dtype, tokenizer_dir=tokenizer_dir)
    return checkpoint.finish()


def begin(run_dir, step, net, optimizer, *, keep=2, state=None, dtype=torch.float32, tokenizer_dir=None):
    how = {"dtype": dtype, "tokenizer_dir": tokenizer_dir or run_dir, "keep": keep}
    checkpoint.begin(run_dir, step, net, optimizer, state or {}, **how)


def copy_of(net):
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def assert_holds(net, weights):
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def everything_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -- resume --------------------------------------------------------------------------------------------------


def test_resume_is_bit_for_bit(tmp_path):
    net, optimizer = new_run()
    train_steps(net, optimizer, range(3))
    at_three = copy_of(net)
    moments = {i: {k: v.clone() for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()}
    state = {"curriculum": {"tallies": {"desk/train/1": [0.1 + 0.2, 1e-17]}}}
    save(tmp_path, 3, net, optimizer, state=state)
    train_steps(net, optimizer, range(3, 5))

    again, fresh = new_run(seed=7)  # other weights, so that nothing agrees by chance
    assert checkpoint.load(tmp_path, again, fresh) == {"step": 3, **state}
    assert_holds(again, at_three)
    restored = fresh.state_dict()["state"]
    assert restored.keys() == moments.keys()
    for i, expected in moments.items():
        assert restored[i].keys() == expected.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(restored[i][k], expected[k]) for k in expected)
    assert [group["weight_decay"] for group in fresh.param_groups] == [0.01, 0.0]
    train_steps(again, fresh, range(3, 5))
    assert_holds(again, copy_of(net))


def test_settings_of_the_optimizer_come_back(tmp_path):
    """A schedule that is kept in the optimizer goes on where it stood."""
    net, optimizer = new_run()
    train_steps(net, optimizer, [0])
    for group in optimizer.param_groups:
        group["lr"] = 0.123
    save(tmp_path, 1, net, optimizer)
    again, fresh = new_run()
    checkpoint.load(tmp_path, again, fresh)
    assert [group["lr"] for group in fresh.param_groups] == [0.123, 0.123]


@pytest.mark.parametrize("fused", [False, True])
def test_a_checkpoint_goes_on_where_the_optimizer_is_computed_another_way(tmp_path, fused):
    """A run that was begun on a CPU goes on on a GPU, where AdamW is fused; and back."""
    runs_of = []
    for ways in ((fused, fused), (fused, not fused)):
        net = small_model()
        for steps, way in zip((range(3), range(3, 5)), ways):
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=way)
            checkpoint.load(tmp_path / str(ways), net, optimizer)
            assert optimizer.param_groups[0]["fused"] is way
            for step in steps:
                ids = torch.randint(SMALL["vocab_size"], (24,), generator=torch.Generator().manual_seed(step))
                attend = packed_attention([0, 24], "cpu", torch.float32)
                net(ids, torch.arange(24), attend, torch.arange(23), ids[1:])[0].mean().neg().backward()
                parallel.clipped_step(net, optimizer, 0.1)
                optimizer.zero_grad()
            save(tmp_path / str(ways), steps[-1], net, optimizer)
        runs_of.append(copy_of(net))
    for name, weight in runs_of[0].items():
        torch.testing.assert_close(runs_of[1][name], weight, rtol=1e-4, atol=1e-5)


def test_loading_does_not_step_or_leave_gradients(tmp_path):
    """torch makes an empty optimizer's state by a step with zero gradients: that must not show."""
    net, optimizer = new_run()
    train_steps(net, optimizer, range(2))
    before = copy_of(net)
    save(tmp_path, 2, net, optimizer)
    assert_holds(net, before)
    again, fresh = new_run()
    checkpoint.load(tmp_path, again, fresh)
    assert all(parameter.grad is None for parameter in again.parameters())
    assert {float(state["step"]) for state in fresh.state.values()} == {2.0}


def test_a_checkpoint_before_the_first_optimizer_step(tmp_path):
    """GRPO may save after steps in which no group taught anything. Going on must equal never having stopped."""
    straight, straight_optimizer = new_run()
    train_steps(straight, straight_optimizer, range(2))
    net, optimizer = new_run()
    before = copy_of(net)
    save(tmp_path, 1, net, optimizer)
    assert_holds(net, before)
    train_steps(net, optimizer, range(2))
    assert_holds(net, copy_of(straight))
    again, fresh = new_run(seed=7)
    checkpoint.load(tmp_path, again, fresh)
    assert_holds(again, before)
    train_steps(again, fresh, range(2))
    assert_holds(again, copy_of(straight))


def test_nothing_to_load(tmp_path):
    net, optimizer = new_run()
    before = copy_of(net)
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.load(tmp_path, net, optimizer) is None
    assert_holds(net, before)


def test_the_model_inside_is_a_hugging_face_directory(tmp_path, tiny_dir):
    """In the run's dtype and with the tokenizer, while the state beside it stays fp32."""
    net = pretrained.load_model(tiny_dir)
    optimizer = runs.adamw(net, config.SFT())
    place = save(tmp_path, 10, net, optimizer, dtype=torch.bfloat16, tokenizer_dir=Path(tiny_dir))
    assert place == tmp_path / "checkpoints" / "step-000010"
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (place / "model" / file).read_bytes() == (tiny_dir / file).read_bytes()
    rounded = pretrained.load_model(place / "model")
    assert rounded.cfg == net.cfg
    assert_holds(rounded, {name: p.bfloat16().float() for name, p in copy_of(net).items()})
    assert {t.dtype for t in load_file(place / "model" / "model.safetensors").values()} == {torch.bfloat16}
    again = pretrained.load_model(place / "model")
    fresh = runs.adamw(again, config.SFT())
    checkpoint.load(tmp_path, again, fresh)
    assert_holds(again, copy_of(net))


def test_only_the_newest_are_kept(tmp_path):
    net, optimizer = new_run()
    for step in (1, 2, 10, 9_999, 10_000):
        save(tmp_path, step, net, optimizer, keep=2)
        assert checkpoint.latest(tmp_path).name == f"step-{step:06d}"
    assert [path.name for path in checkpoint.all_checkpoints(tmp_path)] == ["step-009999", "step-010000"]
    assert everything_under(tmp_path / "checkpoints")[0] == "step-009999"  # and nothing else, hidden or not
    for step in (999_999, 1_000_000):
        save(tmp_path, step, net, optimizer, keep=1)
    assert [path.name for path in checkpoint.all_checkpoints(tmp_path)] == ["step-1000000"], "by number, not by name"


def test_what_a_person_put_there_is_neither_resumed_nor_pruned(tmp_path):
    """A copy that somebody keeps under another name is not ours."""
    net, optimizer = new_run()
    save(tmp_path, 1, net, optimizer)
    mine = tmp_path / "checkpoints" / "step-000001-best"
    shutil.copytree(tmp_path / "checkpoints" / "step-000001", mine)
    assert checkpoint.latest(tmp_path).name == "step-000001"
    for step in (2, 3, 4):
        save(tmp_path, step, net, optimizer)
    assert mine.is_dir()


def test_the_same_step_again_replaces_it(tmp_path):
    net, optimizer = new_run()
    save(tmp_path, 5, net, optimizer, state={"mark": "old"})
    train_steps(net, optimizer, [0])
    save(tmp_path, 5, net, optimizer, state={"mark": "new"})
    again, fresh = new_run(seed=7)
    assert checkpoint.load(tmp_path, again, fresh)["mark"] == "new"
    assert_holds(again, copy_of(net))


# -- crashes -------------------------------------------------------------------------------------------------


def crash(*_, **__):
    raise Crash


def crash_on_directories(path, target, rename=Path.rename):
    """The last rename moves the whole checkpoint; those of single shards go through."""
    if path.is_dir():
        raise Crash
    return rename(path, target)


CRASHES = {
    "before the state": (parallel, "save_state", crash),
    "before the model": (pretrained, "save_model", crash),
    "inside the model": (pretrained, "write_config", crash),
    "before state.json": (checkpoint, "write_json", crash),
    "before the rename": (Path, "rename", crash_on_directories),
}


@pytest.mark.parametrize("where", CRASHES)
def test_a_crash_leaves_the_previous_checkpoint(tmp_path, monkeypatch, where):
    net, optimizer = new_run()
    train_steps(net, optimizer, [0])
    save(tmp_path, 1, net, optimizer)
    before, weights = everything_under(tmp_path / "checkpoints" / "step-000001"), copy_of(net)
    train_steps(net, optimizer, [1])
    with monkeypatch.context() as patch:
        patch.setattr(*CRASHES[where])
        with pytest.raises(Crash):
            save(tmp_path, 2, net, optimizer)

    # What the next process finds: the earlier checkpoint, whole, whatever else lies about.
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-000001"
    assert everything_under(tmp_path / "checkpoints" / "step-000001") == before
    again, fresh = new_run(seed=7)
    assert checkpoint.load(tmp_path, again, fresh)["step"] == 1
    assert_holds(again, weights)
    train_steps(again, fresh, [1])
    assert_holds(again, copy_of(net))
    # And the leftovers are gone after it came by the same step.
    save(tmp_path, 2, again, fresh)
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["step-000001", "step-000002"]
    assert everything_under(tmp_path / "checkpoints" / "step-000002") == before


def test_leftovers_with_other_contents_do_not_get_into_a_checkpoint(tmp_path):
    net, optimizer = new_run()
    stale = tmp_path / "checkpoints" / ".step-000001.tmp" / "model"
    stale.mkdir(parents=True)
    (stale / "model.safetensors.index.json").write_text("{}")
    (stale / "model-00007-of-00009.safetensors").write_text("half of one")
    assert checkpoint.latest(tmp_path) is None
    place = save(tmp_path, 1, net, optimizer)
    assert_holds(pretrained.load_model(place / "model"), copy_of(net))
    assert not list(place.rglob("*00007*"))


def test_write_json_never_leaves_half_a_file(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": 2, "bad": object()})
    assert json.loads(path.read_text()) == {"step": 1} and list(tmp_path.iterdir()) == [path]


# -- beside what goes on ---------------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch):
    """An event; nothing is written before it is set."""
    gate, save_state = threading.Event(), parallel.save_state

    def wait_and_save(*args):
        assert gate.wait(60)
        save_state(*args)

    monkeypatch.setattr(parallel, "save_state", wait_and_save)
    yield gate
    gate.set()
    checkpoint.finish()


def test_it_is_written_beside_what_goes_on(tmp_path, slow_disk):
    net, optimizer = new_run()
    train_steps(net, optimizer, [0])
    before = copy_of(net)
    begin(tmp_path, 1, net, optimizer)
    assert checkpoint.latest(tmp_path) is None  # and we are here
    slow_disk.set()
    assert checkpoint.finish() == checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-000001"
    assert checkpoint.finish() is None
    train_steps(net, optimizer, [1])
    again, fresh = new_run(seed=7)
    checkpoint.load(tmp_path, again, fresh)
    assert_holds(again, before)


def test_what_it_holds_is_copied_before_weights_change(tmp_path, slow_disk):
    net, optimizer = new_run()
    train_steps(net, optimizer, [0])
    before = copy_of(net)
    moment = next(iter(optimizer.state.values()))["exp_avg"].clone()
    begin(tmp_path, 1, net, optimizer)
    checkpoint.wait_until_copied()
    train_steps(net, optimizer, [1])
    assert checkpoint.latest(tmp_path) is None
    slow_disk.set()
    checkpoint.finish()
    again, fresh = new_run(seed=7)
    checkpoint.load(tmp_path, again, fresh)
    assert_holds(again, before)
    assert torch.equal(next(iter(fresh.state.values()))["exp_avg"], moment)
    exported = dict(pretrained.read_safetensors(checkpoint.latest(tmp_path) / "model"))
    assert all(torch.equal(exported[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("free", [0, 1000])
def test_weights_wait_for_the_disk_where_the_host_has_no_room_for_a_copy(tmp_path, slow_disk, monkeypatch, free):
    monkeypatch.setattr(host, "free", lambda: free)
    net, optimizer = new_run()
    begin(tmp_path, 1, net, optimizer)
    threading.Timer(0.2, slow_disk.set).start()
    checkpoint.wait_until_copied()
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-000001"


def test_a_copy_takes_at_most_half_of_what_is_free(monkeypatch):
    net, _ = new_run()
    size = 12 * sum(parameter.numel() for parameter in net.parameters())
    for free, fits in ((2 * size, True), (2 * size - 1, False)):
        monkeypatch.setattr(host, "free", lambda free=free: free)
        assert checkpoint.copy_fits(net) == fits


def test_a_failure_is_known_before_the_next_change_of_the_weights(tmp_path):
    net, optimizer = new_run()
    (tmp_path / "checkpoints").write_text("a file is where the folder goes")
    begin(tmp_path, 1, net, optimizer)
    checkpoint.UNDER_WAY[0].join()
    with pytest.raises(checkpoint.NotWritten, match="step 1 was not written"):
        checkpoint.wait_until_copied()
    checkpoint.wait_until_copied()  # nothing is under way any more


def test_what_fails_on_one_rank_alone_ends_it_at_once(tmp_path, monkeypatch):
    """The other ranks' threads wait for it in vain, and so would this rank for theirs."""

    def fail(state):
        raise RuntimeError("no room after all")

    monkeypatch.setattr(checkpoint, "copy_on_host", fail)
    net, optimizer = new_run()
    begin(tmp_path, 1, net, optimizer)
    checkpoint.UNDER_WAY[0].join()
    monkeypatch.setattr(parallel, "gather", None)
    with pytest.raises(RuntimeError, match="no room after all"):
        checkpoint.wait_until_copied()


def test_the_next_one_waits_for_the_one_before(tmp_path, slow_disk):
    net, optimizer = new_run()
    begin(tmp_path, 1, net, optimizer)
    threading.Timer(0.2, slow_disk.set).start()
    begin(tmp_path, 2, net, optimizer)
    assert (tmp_path / "checkpoints" / "step-000001").is_dir()
    checkpoint.finish()
    assert checkpoint.latest(tmp_path).name == "step-000002"


def test_ctrl_c_waits_until_it_is_written(tmp_path, slow_disk):
    net, optimizer = new_run()
    begin(tmp_path, 1, net, optimizer)
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    threading.Timer(0.5, slow_disk.set).start()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.finish()
    assert checkpoint.latest(tmp_path).name == "step-000001"
    assert checkpoint.finish() is None


# -- a full disk ---------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size):
    """The kernel itself refuses to write on: a real OSError (EFBIG) out of write(2), as a full disk's ENOSPC is.

    Python ignores SIGXFSZ from the start, so the process lives.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The state file has three times the bytes of the model file, and state.json as many as we like.
FULL = {"the state": (20_000, {}), "state.json": (1_000_000, {"much": ["x" * 100] * 20_000})}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_is_one_line_and_costs_no_earlier_checkpoint(tmp_path, what):
    limit, state = FULL[what]
    net, optimizer = new_run()
    train_steps(net, optimizer, [0])
    save(tmp_path, 1, net, optimizer)
    weights = copy_of(net)
    train_steps(net, optimizer, [1])
    with files_of_at_most(limit), pytest.raises(checkpoint.NotWritten) as refusal:
        save(tmp_path, 2, net, optimizer, state=state)
    text = str(refusal.value)
    assert "\n" not in text and len(text) < 400
    assert "step 2" in text and "--resume" in text and "step-000001" in text
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001"]
    again, fresh = new_run(seed=7)
    assert checkpoint.load(tmp_path, again, fresh)["step"] == 1
    assert_holds(again, weights)
    save(tmp_path, 2, net, optimizer, state=state)  # once there is room, the same call goes through
    assert checkpoint.latest(tmp_path).name == "step-000002"


def test_a_full_disk_at_the_first_checkpoint(tmp_path):
    net, optimizer = new_run()
    with files_of_at_most(20_000), pytest.raises(checkpoint.NotWritten) as refusal:
        save(tmp_path, 1, net, optimizer)
    assert "free some space and go on from the start with --resume" in str(refusal.value)
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_a_full_disk_under_the_model_files(tmp_path, monkeypatch, sharded):
    monkeypatch.setattr(pretrained, "SHARD_BYTES", 30_000 if sharded else 4 << 30)
    net, _ = new_run()
    with files_of_at_most(10_000), pytest.raises(OSError, match=r"(?i)file too large|os error 27"):
        pretrained.save_model(tmp_path / "model", net.cfg, net.named_parameters(), torch.float32, tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    net, optimizer = new_run()
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(checkpoint.NotWritten, match="step 1 was not written") as refusal:
        save(tmp_path, 1, net, optimizer)
    assert "\n" not in str(refusal.value)


# -- refusals ------------------------------------------------------------------------------------------------


def change_config(**changes):
    def change(folder):
        path = folder / "config.json"
        row = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in row.items() if value is not None}))

    return change


def change_tensors(function):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        function(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, part):
    def change(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(part * len(whole))])

    return change


def index(content):
    return write("model.safetensors.index.json", content)


NORM = "model.layers.1.self_attn.q_norm.weight"
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
# What is done to a good directory, and what the refusal must name.
REFUSED_CONFIGS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "not JSON": (write("config.json", b"{"), ["config.json", "JSON"]),
    "not text": (write("config.json", b"\xff\xfe\x00"), ["config.json"]),
    "not an object": (write("config.json", b"[]"), ["config.json", "qwen3"]),
    "another family": (change_config(model_type="llama"), ["config.json", "llama", "qwen3"]),
    "experts": (change_config(model_type="qwen3_moe"), ["config.json", "qwen3_moe"]),
    "no family": (change_config(model_type=None), ["config.json"]),
    "a size is missing": (change_config(head_dim=None), ["config.json", "head_dim"]),
    "no theta": (change_config(rope_theta=None), ["config.json", "rope_theta"]),
    "half a token": (change_config(vocab_size=97.5), ["config.json", "vocab_size is 97.5", "whole number"]),
    "a size that is none": (change_config(hidden_size=True), ["config.json", "hidden_size is true"]),
    "fewer than no blocks": (change_config(num_hidden_layers=-1), ["config.json", "num_hidden_layers is -1"]),
    "RoPE scaling": (change_config(rope_scaling=YARN), ["config.json", "RoPE"]),
    "RoPE scaling, older name": (change_config(rope_scaling={"type": "linear", "factor": 2}), ["config.json", "RoPE"]),
    "RoPE scaling, newer place": (change_config(rope_parameters=YARN), ["config.json", "RoPE"]),
    "sliding window": (change_config(use_sliding_window=True), ["config.json", "sliding"]),
    "biases": (change_config(attention_bias=True), ["config.json", "bias"]),
    "another activation": (change_config(hidden_act="gelu"), ["config.json", "gelu"]),
}
REFUSED_WEIGHTS = {
    "no file": (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors"]),
    "no shard": (index(b'{"weight_map": {"x": "model-00002-of-00002.safetensors"}}'), ["model-00002"]),
    "cut in half": (cut("model.safetensors", 0.5), ["model.safetensors", "damaged"]),
    "cut in its header": (cut("model.safetensors", 0.001), ["model.safetensors", "damaged"]),
    "empty": (write("model.safetensors", b""), ["model.safetensors", "damaged"]),
    "rubbish": (write("model.safetensors", b"rubbish " * 100), ["model.safetensors", "damaged"]),
    "a pointer of git lfs": (write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), ["damaged"]),
    "a tensor is missing": (change_tensors(lambda t: t.pop(NORM)), ["missing", NORM]),
    "a wrong shape": (change_tensors(lambda t: t.update({NORM: torch.ones(5)})), [NORM, "(5,)", "(16,)"]),
    "whole numbers": (change_tensors(lambda t: t.update({NORM: torch.ones(16, dtype=torch.int8)})), [NORM, "int8"]),
    "not a number": (change_tensors(lambda t: t[NORM].fill_(float("nan"))), [NORM, "NaN"]),
    "too large for any memory": (change_config(hidden_size=10**9), ["no memory for"]),
    "a stranger": (change_tensors(lambda t: t.update({"model.layers.9.x": torch.ones(5)})), ["model.layers.9.x"]),
    "another size": (change_config(vocab_size=98), ["embed_tokens", "(97, 32)", "(98, 32)"]),
    "more blocks": (change_config(num_hidden_layers=3), ["missing", "model.layers.2"]),
    "an index that is not JSON": (index(b"{"), ["model.safetensors.index.json"]),
    "an index without a map": (index(b"{}"), ["model.safetensors.index.json"]),
    "an index of no files": (index(b'{"weight_map": {"x": 5}}'), ["5 is missing"]),
}


@pytest.fixture(scope="module")
def good_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    net = small_model()
    pretrained.save_model(folder, net.cfg, net.named_parameters(), torch.float32, folder)
    return folder


def assert_one_line(refusal, folder, words):
    text = str(refusal.value)
    assert "\n" not in text
    for word in (str(folder), *words):
        assert word in text, (word, text)
    assert isinstance(refusal.value, BadInput)  # what every script prints as one line


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_refused_configs(tmp_path, good_dir, case):
    spoil, words = REFUSED_CONFIGS[case]
    folder = shutil.copytree(good_dir, tmp_path / "model")
    spoil(folder)
    for read in (pretrained.read_config, pretrained.load_model):
        with pytest.raises(CheckpointError) as refusal:
            read(folder)
        assert_one_line(refusal, folder, words)


@pytest.mark.parametrize("case", REFUSED_WEIGHTS)
def test_refused_weights(tmp_path, good_dir, case):
    spoil, words = REFUSED_WEIGHTS[case]
    folder = shutil.copytree(good_dir, tmp_path / "model")
    spoil(folder)
    with pytest.raises(CheckpointError) as refusal:
        pretrained.load_model(folder)
    assert_one_line(refusal, folder, words)


def test_no_directory_at_all(tmp_path):
    with pytest.raises(CheckpointError) as refusal:
        pretrained.load_model(tmp_path / "nowhere")
    assert_one_line(refusal, tmp_path / "nowhere", ["no such directory"])


ACCEPTED = {
    "as it is": change_config(),
    "theta where transformers 5 writes it": change_config(
        rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}
    ),
    "theta where the hub has it": change_config(rope_scaling=None, sliding_window=None, max_window_layers=2),
    "the tied head a second time": change_tensors(
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_directories(tmp_path, good_dir, case):
    folder = shutil.copytree(good_dir, tmp_path / "model")
    ACCEPTED[case](folder)
    net = pretrained.load_model(folder)
    assert net.cfg == small_model().cfg
    assert_holds(net, copy_of(small_model()))


def test_half_precision_files_become_fp32(tmp_path):
    net = small_model()
    pretrained.save_model(tmp_path, net.cfg, net.named_parameters(), torch.bfloat16, tmp_path)
    loaded = pretrained.load_model(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in loaded.parameters())
    assert_holds(loaded, {name: p.bfloat16().float() for name, p in copy_of(net).items()})


def damage_state(place):
    for path in (place / "state").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])


DAMAGED = {
    "state.json cut": lambda place: (place / "state.json").write_text('{"step": '),
    "state.json without a step": lambda place: (place / "state.json").write_text("{}"),
    "state.json without the rest": lambda place: (place / "state.json").write_text('{"step": 1, "curriculum": {}}'),
    "state.json with another rest": lambda place: (place / "state.json").write_text(
        '{"step": 1, "curriculum": {}, "episodes": "many"}'
    ),
    "state.json of another kind": lambda place: (place / "state.json").write_text("[1]"),
    "state.json gone": lambda place: (place / "state.json").unlink(),
    "state cut": damage_state,
    "state gone": lambda place: shutil.rmtree(place / "state"),
    "metadata of another kind": lambda place: (place / "state" / ".metadata").write_bytes(b"\x1enoise"),
    "metadata gone": lambda place: (place / "state" / ".metadata").unlink(),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_one_line(tmp_path, caplog, case):
    """A disk that loses bytes, a copy that stopped halfway: --resume must say which folder to remove."""
    net, optimizer = new_run()
    keeps, state = (("curriculum", dict), ("episodes", int)), {"curriculum": {}, "episodes": 0}
    place = save(tmp_path, 1, net, optimizer, state=state)
    DAMAGED[case](place)
    again, fresh = new_run(seed=7)
    with pytest.raises(CheckpointError) as refusal:
        checkpoint.load(tmp_path, again, fresh, keeps)
    assert_one_line(refusal, place, ["it is the only one", "--out"])
    shown = [each for each in caplog.records if each.levelno >= logging.WARNING and "NullHandler" not in each.name]
    assert not shown, "torch logs tracebacks"
    assert not (case.startswith("state.json") and fresh.state), "nothing of it was taken"
    later = save(tmp_path, 2, net, optimizer, state=state)
    DAMAGED[case](later)
    with pytest.raises(CheckpointError, match="go on from the one before"):
        checkpoint.load(tmp_path, again, fresh, keeps)


def test_a_checkpoint_of_another_model_is_one_line(tmp_path):
    net, optimizer = new_run()
    place = save(tmp_path, 1, net, optimizer)
    other, fresh = new_run(hidden_size=64)
    with pytest.raises(CheckpointError) as refusal:
        checkpoint.load(tmp_path, other, fresh)
    assert_one_line(refusal, place, [])
