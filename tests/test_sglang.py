"""An SGLang server's life: started, fed with weights, killed, hung, given up, and gone whenever we are.

Against the stand-in of fake_sglang.py, a real process. What any engine must do is in test_engine.py; with
MINITAU_SGLANG set, that file holds the real server to it.
"""

import base64
import contextlib
import functools
import importlib.util
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import shared_server
import torch
import warm
from conftest import FAKE_SGLANG, FOR_THE_FAKE, ROOT, Allocations, child_of, small_model
from test_engine import STOP, error_of, some_ids

from minitau import checkpoint, config, parallel, pretrained, probe
from minitau.chat import load_chat
from minitau.engines import handover, upkeep
from minitau.engines import server as server_module
from minitau.engines.handover import ALIGN, BUCKET_BYTES, Broadcaster, buckets, serialize
from minitau.engines.server import NoAnswer, Server, free_port, request
from minitau.engines.sglang import SGLangEngine, read_completion
from minitau.episode import EngineError, Sampling
from minitau.model import ModelConfig, Qwen3

long = pytest.mark.skipif(not os.environ.get("MINITAU_SGLANG_ALL"), reason="long: MINITAU_SGLANG_ALL=1 runs it")
CPU = torch.device("cpu")
SOFT = Sampling(temperature=0.7, max_new_tokens=12)
LONG = Sampling(temperature=0.7, max_new_tokens=150)


@pytest.fixture(scope="module")
def reference():
    return small_model(scale=8.0).requires_grad_(False)


@pytest.fixture(scope="module")
def model_dir(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pretrained.save_model(folder, reference.cfg, reference.named_parameters(), torch.float32, folder)
    return folder


def fake(model_dir, log, *flags, **environment):
    """A server of the stand-in, not started, with random weights."""
    words = [*shlex.split(FAKE_SGLANG), "--model-path", str(model_dir), "--host", "127.0.0.1"]
    words += ["--load-format", "dummy", "--context-length", "2048", *flags]
    return Server(
        lambda port: [*words, "--port", str(port)], log, "SGLang", environment={**FOR_THE_FAKE, **environment}
    )


@contextlib.contextmanager
def engine_of(server, reference, **changes):
    settings = {"vocab_size": 97, "max_context": 2048, "dtype": torch.float32, "timeout": 60.0, **changes}
    engine = SGLangEngine(server, STOP, **settings)
    try:
        engine.sync(list(reference.named_parameters()), 1)
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def shared(reference, model_dir, tmp_path_factory):
    """An engine for the tests that leave its server alive; each syncs what it needs."""
    log = tmp_path_factory.mktemp("shared") / "log"
    with engine_of(fake(model_dir, log, "--enable-memory-saver"), reference, sleeps=True) as engine:
        yield engine


@pytest.fixture
def engine(shared, reference):
    shared.sync(list(reference.named_parameters()), 1)
    return shared


@pytest.fixture(scope="module")
def mortals(reference, model_dir, tmp_path_factory):
    with engine_of(fake(model_dir, tmp_path_factory.mktemp("mortal") / "log"), reference) as engine:
        yield engine


@pytest.fixture
def mortal(mortals, reference, monkeypatch):
    """An engine whose server a test may end, for then it is started again: each begins with a life after a sync."""
    mortals.sync(list(reference.named_parameters()), 1)
    monkeypatch.setattr(mortals, "stop_ids", [])  # every reply takes its 150 steps
    monkeypatch.setattr(mortals, "timeout", 60.0)
    return mortals


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_within(seconds, *pids):
    deadline = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(is_running(pid) for pid in pids)


def ask_while_tending(engine, n, then=lambda: None):
    """n requests in threads, `then` a moment after they began, and this thread tending; their replies or errors."""
    replies = [None] * n
    prompts = [some_ids(Random(i), 20) for i in range(n)]

    def ask(i):
        try:
            replies[i] = prompts[i], engine.generate(prompts[i], LONG, session=f"s{i}", seed=i)
        except EngineError as error:
            replies[i] = error

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(n)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    then()
    deadline = time.monotonic() + 90
    for thread in threads:
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(0.05)
            with contextlib.suppress(EngineError):  # given up, as the replies say too
                engine.tend()
    assert None not in replies, "a request was forgotten"
    return replies


# -- it stays up ---------------------------------------------------------------------------------------------


def test_a_killed_server_is_started_again_with_the_current_weights_and_no_request_is_lost(mortal, reference, capsys):
    before = child_of(mortal.server)
    replies = ask_while_tending(mortal, 16, then=lambda: os.kill(before, signal.SIGKILL))
    assert child_of(mortal.server) != before and not is_running(before)
    # Fresh from its start it has other weights (it loads dummies), and a version that is no number.
    for prompt, completion in replies:
        assert completion.weight_version == 1
        assert error_of(reference, prompt, completion, LONG) < 1e-4
    assert "is started again" in capsys.readouterr().out


def test_a_hanging_server_is_noticed_by_the_deadline(mortal, reference, monkeypatch):
    monkeypatch.setattr(server_module, "HEALTH_SECONDS", 1.0)
    before = child_of(mortal.server)
    os.kill(before, signal.SIGSTOP)
    mortal.timeout = 2.0  # of the replies; the restart may take longer
    start = time.monotonic()
    replies = ask_while_tending(mortal, 4, then=lambda: setattr(mortal, "timeout", 60.0))
    assert all(error_of(reference, prompt, said, LONG) < 1e-4 for prompt, said in replies)
    assert not is_running(before) and time.monotonic() - start < 30


def test_a_slow_reply_of_a_healthy_server_is_an_error_of_that_request_alone(engine):
    pid, engine.timeout = child_of(engine.server), 0.2
    engine.stop_ids = []  # nothing ends this reply within the time it has
    with pytest.raises(EngineError, match=r"it is healthy, so .*raise --engine-timeout"):
        engine.generate([9], Sampling(1.0, 2000), session="slow", seed=0)
    engine.timeout, engine.stop_ids = 60.0, sorted(STOP)
    assert engine.generate([9], SOFT, session="s", seed=0).ids and child_of(engine.server) == pid


def test_three_deaths_in_a_row_end_it_with_the_servers_last_words(reference, model_dir, tmp_path):
    server = fake(model_dir, tmp_path / "log", FAKE_SGLANG_DIES="3")  # one reply in three is its last
    with engine_of(server, reference) as engine:
        replies = ask_while_tending(engine, 24)
        errors = [reply for reply in replies if isinstance(reply, EngineError)]
        assert errors and "died 3 times in a row" in str(errors[0]) and str(tmp_path / "log") in str(errors[0])
        with pytest.raises(EngineError, match="died 3 times"):
            engine.tend()
        with pytest.raises(EngineError, match="died 3 times"):
            engine.sync(list(reference.named_parameters()), 2)
        assert engine.server.process is None


@long
def test_deaths_are_counted_anew_after_a_sync(reference, model_dir, tmp_path):
    with engine_of(fake(model_dir, tmp_path / "log"), reference) as engine:
        for version in (2, 3, 4):  # as often as would be too often in a row
            os.kill(child_of(engine.server), signal.SIGKILL)
            engine.sync(list(reference.named_parameters()), version)  # finds it dead, and mends it
            assert engine.generate([9, 8], SOFT, session="s", seed=0).weight_version == version


def test_a_server_that_never_starts_says_why_in_one_line(tmp_path):
    code = "import sys; sys.exit('no such kernel image')"
    server = Server(lambda port: [sys.executable, "-c", code], tmp_path / "log", "SGLang")
    with pytest.raises(EngineError, match=r"died while it started; the end of .*log: .*no such kernel image") as caught:
        server.start(60.0, shown=False)
    assert "\n" not in str(caught.value)
    silent = Server(lambda port: [sys.executable, "-c", "raise SystemExit(1)"], tmp_path / "log", "SGLang")
    with pytest.raises(EngineError, match=r"the end of .*log: \(empty\)"):
        silent.start(60.0, shown=False)  # what stands there is another server's


def test_a_server_that_is_not_healthy_in_time_is_taken_down(tmp_path):
    server = Server(lambda port: ["sleep", "600"], tmp_path / "log", "a sleeper")
    with pytest.raises(EngineError, match="not healthy after 1 s"):
        server.start(1.0, shown=False)
    assert server.process is None


# -- it is gone when we are ----------------------------------------------------------------------------------

OWNER = """
import os, sys, time
from pathlib import Path
from minitau.engines.server import Server
from minitau.script import run_script
command = sys.argv[3:]
def body(_):
    server = Server(lambda port: [*command, "--port", str(port)], Path(sys.argv[1]), "SGLang")
    server.start(60.0, shown=False)
    keeper = server.process.pid
    child = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0]
    print(keeper, child, flush=True)
    while not (how := Path(sys.argv[2]).read_text()):
        time.sleep(0.05)
    if how == "exception":
        raise RuntimeError("a bug")
    if how == "close":
        return server.close()
    time.sleep(600)
sys.exit(run_script("owner", body, []))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_keeper_takes_its_server_along(tmp_path, number):
    """Else a new one would be started beside it, on the same GPU."""
    command = [sys.executable, str(ROOT / "tests" / "many_deaths.py")]
    server = Server(lambda port: [*command, "--port", str(port)], tmp_path / "log", "SGLang")
    server.start(60.0, shown=False)
    child = child_of(server)
    server.process.send_signal(number)
    server.process.wait(10)
    assert gone_within(10, child) and not server.alive()
    server.close()


STUBBORN = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open(sys.argv[1], 'w'); time.sleep(60)"
)


def test_a_second_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    """SGLang answers what it was asked before it ends; people press ctrl-C again meanwhile."""
    command = [sys.executable, "-c", STUBBORN, str(tmp_path / "stands")]
    server = Server(lambda port: command, tmp_path / "log", "SGLang")
    monkeypatch.setattr(server_module, "healthy", lambda url: (tmp_path / "stands").exists())
    server.start(60.0, shown=False)
    keeper, child = server.process, child_of(server)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        server.close()
    assert is_running(child), "it would not end at once"
    assert gone_within(10, child) and keeper.wait(5) is not None


@pytest.mark.parametrize(
    "end", ["SIGINT", "SIGKILL", *(pytest.param(each, marks=long) for each in ("close", "exception", "SIGTERM"))]
)
def test_no_server_outlives_its_owner(model_dir, tmp_path, end):
    command = [*shlex.split(FAKE_SGLANG), "--model-path", str(model_dir), "--host", "127.0.0.1"]
    how, said = tmp_path / "how", tmp_path / "said"
    how.touch()
    with open(said, "w") as file:
        owner = warm.Script("-c", OWNER, str(tmp_path / "log"), str(how), *command, stdout=file, **FOR_THE_FAKE)
    while not said.read_text() and owner.poll() is None:
        time.sleep(0.05)
    pids = [int(pid) for pid in said.read_text().split()]
    assert len(pids) == 2 and all(map(is_running, pids))
    how.write_text(end)
    if end.startswith("SIG"):
        time.sleep(0.3)
        owner.send_signal(getattr(signal, end))
    assert owner.wait(30) == {"close": 0, "exception": 1, "SIGKILL": -9}.get(end, 130)
    assert gone_within(15, *pids)


# -- weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4096, 20_000, 1 << 20])
def test_buckets_hold_every_tensor_once_in_order_and_no_more_than_fits(reference, size):
    wanted = list(reference.named_parameters())
    seen = []
    for flat, bucket, last in buckets(wanted, torch.bfloat16, CPU, size):
        starts = [tensor.data_ptr() - flat.data_ptr() for _, tensor in bucket]
        ends = [start + tensor.nbytes for start, (_, tensor) in zip(starts, bucket)]
        assert starts[0] == 0 and all(end <= start for end, start in zip(ends, starts[1:])) and ends[-1] <= len(flat)
        assert ends[-1] <= size or len(bucket) == 1
        assert not any(start % ALIGN for start in starts)
        seen += [(name, tensor.clone(), last) for name, tensor in bucket]
    assert [name for name, _, _ in seen] == [name for name, _ in wanted]
    assert all(torch.equal(got, tensor.bfloat16()) for (_, got, _), (_, tensor) in zip(seen, wanted))
    lasts = [last for _, _, last in seen]
    assert lasts[-1] and lasts == sorted(lasts) and (size > 4096 or not lasts[0])


def test_a_4b_model_takes_no_more_than_one_buffer_of_less_than_a_gigabyte_and_a_half():
    with torch.device("meta"):
        weights = parallel.FullWeights(Qwen3(ModelConfig()))
    size = BUCKET_BYTES["cuda"]
    made, lengths = Allocations(), []
    with made:
        for bucket in buckets(weights, torch.bfloat16, torch.device("meta"), size):
            lengths.append(sum(tensor.nbytes for _, tensor in bucket.tensors))
    assert sum(lengths) == 8_044_936_192 and len(lengths) == 6
    assert sum(made.sizes) == len(bucket.flat) <= 1.4e9


def test_the_buffer_of_a_small_model_is_small(reference):
    (bucket,) = buckets(list(reference.named_parameters()), torch.float32, CPU)
    assert len(bucket.flat) < 4 * sum(p.numel() for p in reference.parameters()) + ALIGN * len(bucket.tensors)


def test_a_payload_holds_handles_and_no_weights():
    (bucket,) = buckets([("a", torch.zeros(1 << 20)), ("b", torch.zeros(5))], torch.float32, CPU)
    assert len(serialize(bucket)) < 4096


def test_weights_arrive_bucket_by_bucket_and_the_last_one_flushes(engine, monkeypatch):
    other, sent = small_model(seed=5, scale=8.0), []
    monkeypatch.setattr(
        "minitau.engines.handover.buckets", lambda weights, dtype, device: buckets(weights, dtype, device, 8192)
    )
    monkeypatch.setattr(
        "minitau.engines.handover.request", lambda url, body, **to: sent.append(body) or request(url, body, **to)
    )
    engine.sync(list(other.named_parameters()), 5)
    assert len(sent) > 3 and [body["flush_cache"] for body in sent] == [False] * (len(sent) - 1) + [True]
    assert {(body["weight_version"], body["load_format"]) for body in sent} == {("5", "flattened_bucket")}
    said = engine.generate([9, 8, 7], SOFT, session="s", seed=0)
    assert said.weight_version == 5 and error_of(other, [9, 8, 7], said, SOFT) < 1e-4


# -- weights that are broadcast ------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2])
def test_broadcast_weights_arrive_and_a_server_that_was_started_again_rejoins(
    reference, model_dir, tmp_path, monkeypatch, tp
):
    monkeypatch.setattr(
        "minitau.engines.handover.buckets", lambda weights, dtype, device: buckets(weights, dtype, device, 8192)
    )
    other = small_model(seed=5, scale=8.0)
    server = fake(model_dir, tmp_path / "log", "--tp-size", str(tp))
    with engine_of(server, reference, host=0, tp=tp, own_gpus=True) as engine:
        assert engine.broadcaster.group.size == 1 + tp
        engine.sync(list(other.named_parameters()), 2)
        said = engine.generate([9, 8, 7], SOFT, session="s", seed=0)
        assert said.weight_version == 2 and error_of(other, [9, 8, 7], said, SOFT) < 1e-4
        paths = [line.split()[1] for line in (tmp_path / "log").read_text().splitlines() if "POST" in line]
        assert paths.count("/init_weights_update_group") == 1  # one group for both syncs
        assert paths.count("/update_weights_from_distributed") > 6
        # It dies under requests: those wait for the weights, which are by then those of another update.
        before, engine.stop_ids = child_of(engine.server), []
        monkeypatch.setattr(engine, "tend", lambda: SGLangEngine.tend(engine, 3))
        engine.weights = list(reference.named_parameters())
        replies = ask_while_tending(engine, 16, then=lambda: os.kill(before, signal.SIGKILL))
        for prompt, completion in replies:
            model = {2: other, 3: reference}[completion.weight_version]
            assert error_of(model, prompt, completion, LONG) < 1e-4
        assert 3 in {completion.weight_version for _, completion in replies}


def test_of_servers_in_one_group_only_the_dead_one_is_to_blame(reference, model_dir, tmp_path, monkeypatch):
    # (Its servers are its own: torch keeps the group that is given up, at the cost of a core while one of them lives.)
    monkeypatch.setattr("minitau.engines.handover.GRACE", 2.0)
    weights, second = list(reference.named_parameters()), fake(model_dir, tmp_path / "second")
    with engine_of(fake(model_dir, tmp_path / "first"), reference) as engine, contextlib.closing(second):
        second.start(60.0, shown=False)
        both, broadcaster = [engine.url, second.url], Broadcaster()
        assert broadcaster.send(weights, torch.float32, both, 3, 60.0) == {}
        os.kill(child_of(second), signal.SIGKILL)
        assert second.url in broadcaster.send(weights, torch.float32, both, 4, 60.0)
        assert broadcaster.members == []
        # Whoever is left is met again.
        other = small_model(seed=5, scale=8.0)
        assert broadcaster.send(list(other.named_parameters()), torch.float32, [engine.url], 5, 60.0) == {}
        engine.version = 5
        said = engine.generate([9, 8, 7], SOFT, session="s", seed=0)
        assert said.weight_version == 5 and error_of(other, [9, 8, 7], said, SOFT) < 1e-4
        broadcaster.part()


def test_without_weights_nothing_is_sampled(engine):
    new = SGLangEngine(None, STOP, url=engine.url, vocab_size=97, max_context=99, dtype=torch.float32, timeout=60)
    with pytest.raises(EngineError, match="no weights were handed over"):
        new.generate([9], SOFT, session="s", seed=0)


def test_weights_that_somebody_else_sent_are_noticed(engine, reference):
    (bucket,) = buckets(list(reference.named_parameters()), torch.float32, CPU)
    body = {"serialized_named_tensors": [serialize(bucket)], "load_format": "flattened_bucket", "weight_version": "9"}
    request(f"{engine.url}/update_weights_from_tensor", {**body, "flush_cache": True}, timeout=9)
    with pytest.raises(EngineError, match="weights are 9, not 1"):
        engine.generate([9], SOFT, session="s", seed=0)


def test_asleep_until_the_next_sync(engine, reference):
    log = engine.server.log.read_text()
    for version in (2, 3):
        engine.sleep()
        engine.sync(list(reference.named_parameters()), version)
        assert engine.generate([9], SOFT, session="s", seed=0).weight_version == version
    new = engine.server.log.read_text().removeprefix(log).splitlines()
    paths = [line.split()[1] for line in new if "POST" in line and "generate" not in line]
    one = ["/release_memory_occupation", "/resume_memory_occupation", "/update_weights_from_tensor"]
    assert paths == [*one, *one]


def test_an_engine_that_was_not_opened_to_sleep_does_not(engine, monkeypatch):
    monkeypatch.setattr(engine, "sleeps", False)
    engine.sleep()
    assert engine.generate([9], SOFT, session="s", seed=0).ids


@pytest.fixture(scope="module")
def policy(tiny_dir, tmp_path_factory):
    """What the probe takes of a run, its settings, and an engine of the same model."""
    model = pretrained.load_model(tiny_dir).requires_grad_(False)
    chat = load_chat(tiny_dir, "native")
    log = tmp_path_factory.mktemp("probed") / "log"
    size = {"vocab_size": model.cfg.vocab_size, "max_context": 1024, "dtype": torch.float32, "timeout": 60.0}
    with contextlib.closing(SGLangEngine(fake(tiny_dir, log), chat.stop_ids, **size)) as engine:
        yield SimpleNamespace(model=model, chat=chat), config.GRPO(engine="sglang", max_drift=0.01), engine


def test_the_probe_finds_that_all_is_well(policy):
    run, cfg, engine = policy
    assert 0 < probe.sync(engine, run, cfg, 3)["sync_drift"] < 1e-4


@pytest.mark.parametrize("tensor", ["embed_tokens", "layers.0.self_attn.v_proj", "layers.1.mlp.down_proj", "k_norm"])
@pytest.mark.parametrize("how", ["never sent", "mixed up"])
def test_the_probe_finds_one_tensor_that_did_not_arrive(policy, monkeypatch, tensor, how):
    run, cfg, engine = policy
    probe.sync(engine, run, cfg, 3)

    def damaged(weights, dtype, device):
        named = [(name, weight.clone()) for name, weight in weights]
        for name, weight in named:
            if tensor in name and how == "mixed up":
                weight.copy_(weight.flip(0) * 3)
        yield from buckets(
            [(f"x.{name}" if tensor in name and how == "never sent" else name, weight) for name, weight in named],
            dtype,
            device,
        )

    monkeypatch.setattr("minitau.engines.handover.buckets", damaged)
    kept = {name: parameter.clone() for name, parameter in run.model.named_parameters() if tensor in name}
    try:
        for name, parameter in run.model.named_parameters():
            if name in kept and how == "never sent":  # it has been trained since the last sync
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
        with pytest.raises(EngineError, match=r"after the sync of weights 4 .* of rank 0 differ by .*--max-drift"):
            probe.sync(engine, run, cfg, 4)
    finally:
        for name, value in kept.items():
            run.model.get_parameter(name).copy_(value)


@pytest.mark.parametrize(("drifts", "rank"), [([0.001, math.nan], 1), ([math.nan, 0.001], 0), ([0.001, 0.02], 1)])
def test_the_probe_counts_on_every_rank_and_nan_is_no_small_number(policy, monkeypatch, drifts, rank):
    run, cfg, engine = policy
    monkeypatch.setattr(probe.parallel, "gather", lambda _: drifts)
    monkeypatch.setattr(engine, "sync", lambda *_: None)
    monkeypatch.setattr(probe, "probe", lambda *_: 0.0)
    with pytest.raises(EngineError, match=f"trainer of rank {rank} differ"):
        probe.sync(engine, run, cfg, 3)


def test_a_server_that_dies_while_another_is_announced_is_one_death(mortal):
    # While a worker starts the server, another rank's announcement makes this thread look after weights.
    def kill_and_announce():
        os.kill(child_of(mortal.server), signal.SIGKILL)
        parallel.announce("a server was started anew")

    replies = ask_while_tending(mortal, 8, then=kill_and_announce)
    assert mortal.deaths == 1 and not any(isinstance(reply, EngineError) for reply in replies)


def test_servers_of_four_ranks_that_die_at_once_hold_nobody_up(tmp_path):
    """Each that was started again is announced, and weights are brought to all of them at once: what is left to answer
    then must be answered by all ranks or none, or one waits for the others for ever."""
    done = script("tests/many_deaths.py", str(tmp_path), ranks=4)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    for rank in range(4):
        versions, announced, answered = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert versions == [1, 2, 3, 4] and announced == answered == 16


def test_deaths_far_apart_are_not_in_a_row():
    age = upkeep.LONG_LIFE + 2.0
    server = SimpleNamespace(name="a server", age=lambda: age, start=lambda *_, **__: None, close=lambda: None)
    server.last_words = lambda: "nothing"
    mine = upkeep.Upkeep(server, "", None, takes_weights=True, timeout=1.0)
    for life in range(2 * upkeep.DEATHS):
        mine.mend(life, "no kernel image")
    assert (mine.life, mine.deaths) == (2 * upkeep.DEATHS, 1)


def test_a_port_that_a_run_waits_for_is_given_to_no_other(monkeypatch):
    """A server binds its port a minute after it was chosen."""
    monkeypatch.setattr("minitau.engines.server.PORTS", (23_450, 23_452))
    (first, kept), (second, also) = free_port(), free_port()
    assert {first, second} == {23_450, 23_451}
    for each in (kept, also):
        each.close()
    with socket.create_server(("127.0.0.1", first)):  # nor one that somebody listens on
        third, more = free_port()
    assert third == second
    more.close()


def test_calls_that_end_all_at_once(monkeypatch):
    """Between looking for one that goes on and waiting for it the last one may end."""
    alive = iter([True])
    monkeypatch.setattr(threading.Thread, "is_alive", lambda thread: next(alive, False))
    assert len(handover.at_once([lambda: None] * 3)) == 3


def test_who_hangs_because_another_died_does_not_die_itself(monkeypatch):
    server = SimpleNamespace(name="a server", age=lambda: 0.0, start=lambda *_, **__: None, close=lambda: None)
    server.last_words = lambda: "nothing"
    mine = upkeep.Upkeep(server, "", None, takes_weights=True, timeout=1.0)
    for life in range(upkeep.DEATHS + 1):
        mine.mend(life, upkeep.IN_VAIN)
    assert (mine.life, mine.deaths) == (upkeep.DEATHS + 1, 0)
    with pytest.raises(EngineError, match="died 3 times in a row: no kernel image"):
        for life in range(mine.life, mine.life + 3):
            mine.mend(life, "no kernel image")


# -- one server of two ranks ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(model_dir, tmp_path_factory):
    """What each of two ranks saw of a server that is spread over both, and the server's log: see shared_server.py."""
    folder = tmp_path_factory.mktemp("tp")
    (folder / "model").symlink_to(model_dir)
    done = script("tests/shared_server.py", str(folder), ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    seen = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]
    return SimpleNamespace(
        seen=seen, log=(folder / "out" / "engine-0.log").read_text(), printed=done.stdout, out=folder
    )


def answered(two_ranks, what, version):
    """Both ranks' prompts were answered from exactly these weights."""
    model = shared_server.weights_of_version(version)
    for rank, found in enumerate(two_ranks.seen):
        for i, said in enumerate(found[what]):
            assert not isinstance(said, str) and said.weight_version == version, said
            assert error_of(model, shared_server.prompt_of(rank, i), said, shared_server.SAMPLING) < 1e-4
    return [len(found[what]) for found in two_ranks.seen]


def test_a_server_of_two_ranks_gets_a_handle_of_each_for_every_bucket(two_ranks):
    leader, other = (found["sent"] for found in two_ranks.seen)
    assert len(leader) > 3 and not other  # the first rank asks for both
    wanted = dict(shared_server.weights_of_version(1).named_parameters())
    for body, buckets_of in leader:
        first, second = body["serialized_named_tensors"]
        for found, handle in zip(two_ranks.seen, (first, second)):  # in the order of ranks, each of its own memory
            assert f"/torch_{found['own pid']}_".encode() in base64.b64decode(handle)
        assert len(buckets_of) == 2
        for held in buckets_of:
            assert held and all(torch.equal(tensor, wanted[name]) for name, tensor in held.items())
    for worker in range(2):
        assert [name for _, buckets_of in leader for name in buckets_of[worker]] == list(wanted)
    assert [body["flush_cache"] for body, _ in leader] == [False] * (len(leader) - 1) + [True]
    assert {(body["weight_version"], body["load_format"]) for body, _ in leader} == {("1", "flattened_bucket")}


def test_it_answers_both_ranks_and_only_the_first_has_started_one(two_ranks):
    assert answered(two_ranks, "first", 1) == [3, 3] and answered(two_ranks, "second", 2) == [3, 3]
    assert [path.name for path in (two_ranks.out / "out").iterdir()] == ["engine-0.log"]
    starts = [line for line in two_ranks.log.splitlines() if "the fake server starts" in line]
    assert all("--tp-size 2 " in line and "--max-running-requests 16 " in line for line in starts)
    for path in ("release", "resume"):  # once for both
        assert two_ranks.log.count(f"POST /{path}_memory_occupation") == 1


def test_it_is_started_again_by_the_first_rank_with_the_weights_of_both(two_ranks):
    assert answered(two_ranks, "killed", 2) == [8, 8]
    assert answered(two_ranks, "mended", 3) == [2, 2]
    assert answered(two_ranks, "hung", 4) == [0, 4]  # the rank that noticed is not the one that started it
    assert "another rank got no reply" in two_ranks.printed
    assert [(found["life"], found["deaths"]) for found in two_ranks.seen] == [(3, 1), (3, 0)]
    assert len(set(two_ranks.seen[0]["pids"])) == 4 and not two_ranks.seen[1]["pids"]


def test_three_deaths_in_a_row_are_told_to_both_and_nothing_is_left(two_ranks):
    first, second = (found["given up"] for found in two_ranks.seen)
    assert all("died 3 times in a row" in said for said in first)
    assert all("the server of rank 0 is given up" in said for said in second)
    assert gone_within(1, *two_ranks.seen[0]["pids"]) and not processes_with(str(two_ranks.out))


def test_a_guest_says_in_which_life_its_server_was_lost(monkeypatch):
    """Also if it is told of a new one while it makes room: that one is not lost."""
    said, guest = [], upkeep.Upkeep(None, "http://127.0.0.1:1", 0, takes_weights=True, timeout=1.0)

    def told_of_a_new_one():
        guest.life, guest.ready = 1, True

    monkeypatch.setattr(parallel, "announce", said.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", told_of_a_new_one)
    guest.ready = True
    guest.lost(0, "no answer")
    assert said == [upkeep.LOST.format(0, 0)] and guest.ready
    guest.step_aside(0)
    assert guest.ready  # what was heard of the old one is no news of the new one


def processes_with(*words):
    """Command lines that hold all these words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if all(word in line for word in words)]


# -- replies -------------------------------------------------------------------------------------------------


def test_an_error_that_is_cut_in_half_is_no_answer():
    """A server that dies while it says why it cannot: it is started again, as if it had said nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            client, _ = listener.accept()
            with client:
                client.recv(1000)
                client.sendall(b"HTTP/1.1 500 Oh\r\nContent-Length: 100\r\n\r\nhalf")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(NoAnswer):
            request(f"http://127.0.0.1:{listener.getsockname()[1]}/generate", {}, timeout=5.0)


def meta(reason, pairs):
    return {"meta_info": {"finish_reason": reason, "output_token_logprobs": pairs, "weight_version": "1"}}


@pytest.mark.parametrize(
    "reply",
    [
        None,
        {},
        meta(None, []),
        meta({"type": "stop"}, []),
        meta({"type": "stop"}, [[None, 3, None]]),
        meta({"type": "stop"}, [[-1.0, 3]]),
        meta({"type": "abort", "message": "x"}, [[-1.0, 3, None]]),
    ],
)
def test_a_reply_of_another_form_is_an_engine_error(reply, monkeypatch):
    engine = SGLangEngine.__new__(SGLangEngine)
    engine.takes_weights, engine.vocab_size, engine.max_context, engine.stop_ids = True, 97, 99, sorted(STOP)
    monkeypatch.setattr(SGLangEngine, "url", "http://there")
    monkeypatch.setattr(engine, "ask", lambda body: (reply, 1))
    with pytest.raises(EngineError):
        engine.generate([1], Sampling(), session="", seed=0)


def test_a_reply_whose_last_token_allowed_is_its_stop_token_is_whole():
    """SGLang looks at the length first."""
    stop = min(STOP)
    for last, finish in ((stop, "stop"), (stop + 1, "length")):
        reply = meta({"type": "length"}, [[-1.0, 5, None], [-1.0, last, None]])
        assert read_completion(reply, 1, "1", {stop}).finish == finish


def test_a_dead_address_is_one_clear_line():
    port, _kept = free_port()
    with pytest.raises(EngineError, match=f"no healthy server at http://127.0.0.1:{port}; start it"):
        SGLangEngine(None, STOP, url=f"http://127.0.0.1:{port}/", vocab_size=97, max_context=99, dtype=torch.float32)
    with pytest.raises(NoAnswer):
        request(f"http://127.0.0.1:{port}/health", timeout=1.0)


# -- whole runs ----------------------------------------------------------------------------------------------

SMALL_GRPO = (
    "--stage grpo --steps 2 --tasks 8 --tasks-per-step 4 --group-size 2 --no-dynamic-sampling --no-screen --lr 1e-3 "
    "--max-new-tokens 16 --max-turns 3 --max-tokens 1200 --save-every 1 --engine sglang"
)


script = functools.partial(warm.run, **FOR_THE_FAKE)


@pytest.mark.parametrize(("ranks", "tp"), [pytest.param(1, 1, marks=long), (2, 1), pytest.param(2, 2, marks=long)])
def test_grpo_through_servers_of_its_own(tiny_dir, tmp_path, ranks, tp):
    out, others = tmp_path / "run", processes_with(str(tiny_dir), "fake_sglang")
    flags = [*SMALL_GRPO.split(), "--engine-command", FAKE_SGLANG, "--model", str(tiny_dir), "--out", str(out)]
    done = script("train.py", *flags, "--engine-sleep", "--engine-tp", str(tp), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["weight_versions"] for line in lines] == [[0], [1]]
    assert all(line["sync_drift"] < 1e-4 and line["drift"] < 1e-4 for line in lines), lines
    assert len(list(out.glob("engine-*.log"))) == ranks // tp
    assert "--load-format dummy" in (out / "engine-0.log").read_text()
    evaluated = tmp_path / "eval"
    words = ["--model", str(out / "model"), "--out", str(evaluated), "--tasks", "2", "--num-trials", "1", "--no-floors"]
    words += ["--engine", "sglang", "--engine-command", FAKE_SGLANG, "--max-new-tokens", "16", "--max-turns", "2"]
    if tp == 1:
        done = script("eval.py", *words)
    else:  # also a server that reads the weights itself has the other ranks told where it is, at the start and later
        done = script("eval.py", *words, "--engine-tp", str(tp), ranks=ranks, FAKE_SGLANG_DIES="7")
        assert done.stdout.count("is started again") == 1
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((evaluated / "results.json").read_text())[-1]["errors"] == 0
    assert processes_with(str(tiny_dir), "fake_sglang") == others


@long
def test_a_server_that_dies_on_one_of_two_ranks_gets_the_weights_of_both(tiny_dir, tmp_path):
    out = tmp_path / "run"
    flags = [*SMALL_GRPO.split(), "--engine-command", FAKE_SGLANG, "--model", str(tiny_dir), "--out", str(out)]
    # (The probe after each sync asks four times: the twelfth reply is in a rollout.)
    done = script("train.py", *flags, ranks=2, FAKE_SGLANG_DIES="12", FAKE_SGLANG_RANK="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "SGLang of rank 1 is lost" in done.stdout and "SGLang of rank 0 is lost" not in done.stdout
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["drift"] < 1e-4 for line in lines)
    assert not any(line["stops"].get("engine_error") for line in lines)


@long
def test_one_of_two_servers_of_two_ranks_each_dies_and_only_that_one_is_started_again(tiny_dir, tmp_path):
    out = tmp_path / "run"
    flags = [*SMALL_GRPO.split(), "--engine-command", FAKE_SGLANG, "--model", str(tiny_dir), "--out", str(out)]
    # (The probe after each sync asks eight times.)
    done = script("train.py", *flags, "--engine-tp", "2", ranks=4, FAKE_SGLANG_DIES="12", FAKE_SGLANG_RANK="2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "SGLang of rank 2 is lost" in done.stdout and "SGLang of rank 0 is lost" not in done.stdout
    assert sorted(path.name for path in out.glob("engine-*.log")) == ["engine-0.log", "engine-2.log"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["drift"] < 1e-4 for line in lines)
    assert not any(line["stops"].get("engine_error") for line in lines) and not processes_with(
        str(tiny_dir), "--tp-size 2 "
    )


@long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_server_of_two_ranks_is_gone_when_either_is_killed(tiny_dir, tmp_path, rank):
    out = tmp_path / "run"
    words = [*SMALL_GRPO.split(), "--engine-command", FAKE_SGLANG, "--model", str(tiny_dir), "--out", str(out)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with open(tmp_path / "said", "w") as said:
        run = subprocess.Popen(
            [*torchrun, "train.py", *words, "--steps", "1000", "--engine-tp", "2"],
            cwd=ROOT,
            env={**os.environ, **FOR_THE_FAKE, "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=said,
        )
        try:
            deadline = time.monotonic() + 120
            while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").read_text():
                assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()[-2000:]
                time.sleep(0.2)
            assert processes_with(str(tiny_dir), "--tp-size 2 ")
            os.kill(ranks_of(run.pid)[rank], signal.SIGKILL)
            assert run.wait(60) != 0
        finally:
            run.kill()
    deadline = time.monotonic() + 15
    while processes_with(str(tiny_dir), "--tp-size 2 ") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_with(str(tiny_dir), "--tp-size 2 ")


def ranks_of(torchrun):
    """The pids of the processes that torchrun started, by rank."""
    found = {}
    for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        with contextlib.suppress(OSError):
            names = dict(each.partition("=")[::2] for each in Path(f"/proc/{pid}/environ").read_text().split("\0"))
            found[int(names.get("RANK", -1))] = int(pid)
    return found


@long
def test_deaths_without_end_leave_the_checkpoint_whole(tiny_dir, tmp_path):
    out = tmp_path / "run"
    flags = [*SMALL_GRPO.split(), "--engine-command", FAKE_SGLANG, "--model", str(tiny_dir), "--out", str(out)]
    done = script("train.py", *flags, "--steps", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    done = script("train.py", *flags, "--resume", FAKE_SGLANG_DIES="6")
    assert done.returncode == 1 and "died 3 times in a row" in done.stderr and "Traceback" not in done.stderr
    assert checkpoint.latest(out).name == "step-000001"
    done = script("train.py", *flags, "--resume")
    assert done.returncode == 0 and checkpoint.latest(out).name == "step-000002"


def tasks_seen(out, step):
    state = json.loads((out / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())
    return set(state["curriculum"]["tallies"])


@long
def test_a_batch_is_played_while_another_is_trained_on(tiny_dir, tmp_path):
    out = tmp_path / "run"
    flags = [*SMALL_GRPO.split(), "--engine-command", FAKE_SGLANG, "--model", str(tiny_dir), "--out", str(out)]
    flags += ["--engine-gpus", "1", "--ahead", "1", "--keep", "9", "--lr", "1e-2"]
    done = script("train.py", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    done = script("train.py", *flags, "--steps", "3", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["weight_versions"] for line in lines] == [[0], [0], [2]]  # the third was played after the resume
    assert [line["staleness"] for line in lines] == [0, 1, 0]
    assert all(line["sync_drift"] < 1e-4 for line in lines)
    assert lines[0]["drift"] < 1e-4 < 10 * lines[1]["drift"] and lines[2]["drift"] < 1e-4, lines
    # The first checkpoint knows nothing of the second batch, though that was played by then.
    played = (json.loads(line) for line in (out / "trajectories" / "step-000001.jsonl").read_text().splitlines())
    first = {"/".join(row["trajectory"]["task"][name] for name in ("domain", "split", "id")) for row in played}
    assert tasks_seen(out, 1) == first and len(tasks_seen(out, 2)) == 2 * len(first)


@long
def test_two_ranks_share_a_server_that_dies_while_they_train(tiny_dir, tmp_path):
    out = tmp_path / "run"
    flags = [*SMALL_GRPO.split(), "--engine-command", FAKE_SGLANG, "--model", str(tiny_dir), "--out", str(out)]
    flags += ["--engine-gpus", "2", "--ahead", "1", "--steps", "3"]
    # (Eight replies of the probe, some 24 of the first batch: the 40th is of the second, which is played ahead.)
    done = script("train.py", *flags, ranks=2, FAKE_SGLANG_DIES="40")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is started again" in done.stdout and len(list(out.glob("engine-*.log"))) == 1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["sync_drift"] < 1e-4 for line in lines)
    assert not any(line["stops"].get("engine_error") for line in lines)
    assert lines[0]["staleness"] == 0 and all(0 < line["staleness"] <= 1 for line in lines[1:])


@long
def test_servers_that_are_there_already(tiny_dir, tmp_path):
    words = [*shlex.split(FAKE_SGLANG), "--model-path", str(tiny_dir), "--host", "127.0.0.1", "--load-format", "dummy"]
    server = Server(lambda port: [*words, "--port", str(port)], tmp_path / "log", "SGLang", environment=FOR_THE_FAKE)
    server.start(60.0, shown=False)
    try:
        flags = [
            *SMALL_GRPO.split(),
            "--engine-url",
            server.url,
            "--model",
            str(tiny_dir),
            "--out",
            str(tmp_path / "run"),
        ]
        done = script("train.py", *flags)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert all(line["drift"] < 1e-4 for line in lines)
        assert server.alive()  # it is not ours to end
        words = ["--model", str(tiny_dir), "--out", str(tmp_path / "eval"), "--tasks", "1", "--num-trials", "1"]
        words += ["--engine", "sglang", "--engine-url", server.url, "--max-new-tokens", "16", "--max-turns", "2"]
        done = script("eval.py", *words, "--no-floors")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "/update_weights_from_disk" in (tmp_path / "log").read_text()  # it had the run's weights, not --model's
    finally:
        server.close()


def test_two_ranks_of_an_evaluation_share_a_server(tiny_dir, tmp_path):
    """It loads the model once, and both know under which name."""
    words = [*shlex.split(FAKE_SGLANG), "--model-path", str(tiny_dir), "--host", "127.0.0.1"]
    server = Server(lambda port: [*words, "--port", str(port)], tmp_path / "log", "SGLang", environment=FOR_THE_FAKE)
    server.start(60.0, shown=False)
    try:
        flags = f"--model {tiny_dir} --out {tmp_path / 'eval'} --domains desk --tasks 2 --num-trials 2 --no-floors"
        flags += f" --engine sglang --engine-url {server.url} --max-new-tokens 8 --max-turns 1"
        done = script("eval.py", *flags.split(), ranks=2)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = json.loads((tmp_path / "eval" / "results.json").read_text())
        assert (
            all(row["errors"] == 0 for row in rows)
            and (tmp_path / "log").read_text().count("/update_weights_from_disk") == 1
        )
    finally:
        server.close()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--engine-url", "http://127.0.0.1:1"), "no healthy server at http://127.0.0.1:1"),
        (
            ("--engine-url", "http://127.0.0.1:1,http://127.0.0.1:2"),
            "names 2 servers for 1 ranks; each rank needs its own",
        ),
        (("--engine-url", "http://127.0.0.1:1,http://127.0.0.1:1/"), "a server is named twice"),
        (("--engine-url", "localhost:30000"), "http://HOST:PORT is needed"),
        (("--engine-command", "/no/such/python -m sglang"), "died while it started"),
        (("--engine-mem", "1.5"), "--engine-mem is 1.5"),
        (("--engine-tp", "2"), "--engine-tp 2: 1 ranks cannot form groups of 2"),
        (("--engine", "local", "--engine-sleep"), "--engine-sleep is for --engine sglang"),
    ],
)
def test_bad_input_is_one_line(tiny_dir, tmp_path, flags, said):
    done = script("train.py", *SMALL_GRPO.split(), "--model", str(tiny_dir), "--out", str(tmp_path / "run"), *flags)
    assert done.returncode in (1, 2) and said in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert len(done.stderr.strip().splitlines()[-1]) < 2000


@pytest.mark.skipif(importlib.util.find_spec("sglang") is not None, reason="SGLang is installed here")
def test_without_sglang_the_line_says_what_to_do_and_the_folder_is_free_for_it(tiny_dir, tmp_path):
    """The real command."""
    command = [
        sys.executable,
        "train.py",
        *SMALL_GRPO.split(),
        "--model",
        str(tiny_dir),
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "SGLang is not installed: pip install -r requirements-gpu.txt" in done.stderr
    assert not (tmp_path / "run").exists()
