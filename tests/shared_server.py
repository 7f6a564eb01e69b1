"""What test_sglang.py runs under torchrun: two ranks and one server of the stand-in, spread over both (--engine-tp 2).

    torchrun --nproc_per_node 2 tests/shared_server.py FOLDER      FOLDER/model: a checkpoint of the SMALL shape

The server answers, is killed, hangs, and is killed until it is given up. Each rank writes FOLDER/rank-N.pt, a dict of
what it saw; the test compares.
"""

import base64
import contextlib
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path
from random import Random

import torch
from conftest import FAKE_SGLANG, child_of, small_model
from fake_sglang import unpacked
from ranks import load_weights
from test_engine import STOP, some_ids

from minitau import config, parallel
from minitau.engines import handover, launch, server
from minitau.episode import EngineError, Sampling
from minitau.rollout import in_threads

SEEDS = {1: 0, 2: 5, 3: 6, 4: 7}  # version -> seed of the weights
SAMPLING = Sampling(temperature=0.7, max_new_tokens=150)
BUCKET = 8192  # bytes: several to a sync


def weights_of_version(version: int) -> torch.nn.Module:
    return small_model(SEEDS[version], scale=8.0).requires_grad_(False)


def prompt_of(rank: int, i: int) -> list[int]:
    return some_ids(Random(f"{rank}:{i}"), 20)


def ask(engine, name: str, count: int, during=lambda: None) -> list:
    """`count` replies, or errors, to this rank's prompts, from threads of it; the main threads of all ranks tend the
    engine until those of all are done. `during` runs beside them."""
    replies = [None] * count

    def work(i: int) -> None:
        try:
            replies[i] = engine.generate(prompt_of(parallel.rank(), i), SAMPLING, session=f"{name}:{i}", seed=i)
        except EngineError as error:
            replies[i] = str(error)

    beside = threading.Thread(target=during, daemon=True)
    beside.start()
    try:
        in_threads(work, parallel.SharedQueue(name, count, each_rank=True), max(1, count), engine)
    except EngineError as error:  # given up: nobody plays on without a server
        replies.append(str(error))
        deadline = time.monotonic() + 60
        while None in replies and time.monotonic() < deadline:  # whoever waits is told as well
            time.sleep(0.05)
    beside.join()
    return replies


def opened(payload: str) -> dict[str, torch.Tensor]:
    """Copies of what a handle leads to."""
    held = pickle.loads(base64.b64decode(payload))
    storage = held["flattened_tensor"].untyped_storage()
    storage._shared_incref()  # a handle is good for once, and the server opens it too
    return {name: tensor.clone() for name, tensor in unpacked(held, "flattened_bucket")}


def main(folder: Path) -> None:
    rank = parallel.rank()
    cfg = config.GRPO(
        model=str(folder / "model"),
        out=str(folder / "out"),
        engine="sglang",
        engine_command=FAKE_SGLANG,
        engine_tp=2,
        engine_sleep=True,
        engine_timeout=60.0,
        max_tokens=500,
        concurrency=8,
    )
    sent: list[tuple[dict, list[dict[str, torch.Tensor]]]] = []  # bodies of updates, and what their handles lead to
    post = handover.request

    def recorded(url, body, **to):
        time.sleep(0.1)  # a rank that did not wait would fill its bucket with the next tensors meanwhile
        sent.append(({**body, "url": url}, [opened(payload) for payload in body["serialized_named_tensors"]]))
        return post(url, body, **to)

    handover.request = recorded
    handover.BUCKET_BYTES["cpu"] = BUCKET
    server.HEALTH_SECONDS = 1.0
    found: dict = {"own pid": os.getpid(), "pids": []}  # the latter of the server's lives
    model = weights_of_version(1)
    parallel.shard(model, model.model.layers, torch.float32)
    engine = launch.open_sglang(cfg, STOP, takes_weights=True)
    own = engine.server is not None

    def pid() -> int:
        found["pids"].append(child_of(engine.server))
        return found["pids"][-1]

    def sync(version: int) -> None:
        load_weights(model, dict(weights_of_version(version).named_parameters()))
        engine.sync(parallel.FullWeights(model), version)

    def hit(how: int, after: float = 0.0) -> None:
        """Send the server a signal, if it is of this rank."""
        if own:
            time.sleep(after)
            os.kill(pid(), how)

    # It has the weights of both ranks' handles, and answers both.
    sync(1)
    found["first"] = ask(engine, "first", 3)
    found["sent"], sent[:] = list(sent), []
    # Asleep and awake again, with other weights.
    engine.sleep()
    sync(2)
    found["second"] = ask(engine, "second", 3)
    # Killed under requests of both.
    engine.stop_ids = []
    found["killed"] = ask(engine, "killed", 8, during=lambda: hit(signal.SIGKILL, after=0.1))
    # Killed while nobody asks: the sync finds it.
    hit(signal.SIGKILL)
    parallel.barrier()
    sync(3)
    found["mended"] = ask(engine, "mended", 2)
    # It hangs, and only the rank whose server it is not asks it.
    sync(4)
    if not own:
        engine.timeout = 3.0  # of replies
    hit(signal.SIGSTOP)
    parallel.barrier()
    found["hung"] = ask(engine, "hung", 0 if own else 4)
    engine.timeout = 60.0
    found["life"], found["deaths"] = engine.life, engine.deaths

    def kill_until_given_up() -> None:
        while not engine.given_up:
            with contextlib.suppress(OSError, AttributeError, IndexError):  # it is just being started
                os.kill(child_of(engine.server), signal.SIGKILL)
            time.sleep(0.3)

    if own:
        pid()
    found["given up"] = ask(engine, "given up", 4, during=kill_until_given_up if own else lambda: None)
    engine.close()
    torch.save(found, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parallel.start()
    main(Path(sys.argv[1]))
    parallel.stop()
