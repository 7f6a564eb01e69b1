"""What test_parallel.py runs under torchrun: `torchrun --nproc_per_node 2 tests/ranks.py FOLDER`.

Also the recipe that both sides share: the same batch and the same training, whatever the number of
processes. Each rank writes FOLDER/rank-N.pt, a dict of what it found; the test compares.
"""

import dataclasses
import math
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from conftest import SMALL, Allocations, small_model, trajectory
from torch.distributed.tensor import DTensor

import train
from minitau import batch, checkpoint, config, grpo, parallel, pretrained
from minitau import run as runs
from minitau.engines.handover import buckets

CFG = config.GRPO(
    lr=1e-2, temperature=0.8, entropy=0.01, kl=0.05, max_tokens=64, micro_batch_tokens=40, max_grad_norm=0.05
)
QUEUES = {"many": 200, "few": 1, "none": 0}  # name -> indices
THREADS = 4
BUCKETS = (1, 5000, 1 << 20)  # bytes at most


def samples_of(first: int = 0, n: int = 7) -> list[batch.Sample]:
    """`n` random episodes with advantages, weighed; the same in every process."""
    episodes = []
    for i in range(first, first + n):
        generator = torch.Generator().manual_seed(i)
        length = int(torch.randint(6, 24, (1,), generator=generator))
        ids = torch.randint(SMALL["vocab_size"], (length,), generator=generator).tolist()
        said = [False, *(torch.rand(length - 1, generator=generator) < 0.5).tolist()]
        said[-1] = True
        logprobs = [-4.0 - float(torch.rand(1, generator=generator)) if s else 0.0 for s in said]
        episodes.append(batch.Sample(trajectory(ids, said, logprobs, sample=i), advantage=(-1.0) ** i * (1 + 0.1 * i)))
    weights = grpo.token_weights(torch.tensor([sum(e.trajectory.said) for e in episodes]), "token-mean", max_tokens=64)
    return [dataclasses.replace(episode, weight=weight) for episode, weight in zip(episodes, weights.tolist())]


def batches_of(samples: list[batch.Sample]) -> list[batch.MicroBatch]:
    return runs.micro_batches(CFG, samples)


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy whole tensors, given on every rank, into the (sharded) parameters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = weights[name].to(parameter.device, parameter.dtype)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                whole = DTensor.from_local(whole, mesh, run_check=False).redistribute(mesh, placements)
            parameter.copy_(whole)


def new_run(seed: int = 0, keep: float = math.inf, dtype: torch.dtype = torch.float32, **shape) -> runs.Run:
    """An open run without a folder: the model, sharded if there are ranks, and its optimizer."""
    model = small_model(seed, **shape)
    model.keep, model.dtype = keep, dtype
    parallel.shard(model, model.model.layers, dtype)
    return runs.Run(Path(), None, model, runs.adamw(model, CFG), None)


def new_reference(**shape) -> torch.nn.Module:
    model = small_model(1, **shape)
    parallel.shard(model, model.model.layers, torch.float32)
    return model.requires_grad_(False)


def scores_in_bf16(held: torch.dtype) -> torch.Tensor:
    """What a reference whose weights are kept in `held` makes of this rank's samples, computed in bf16."""
    model = small_model(1).to(held)
    model.dtype = torch.bfloat16
    parallel.shard(model, model.model.layers, torch.bfloat16)
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    found = [train.score(model, mb, cfg, "reference_N").reference_N for mb in batches_of(samples_of())]
    return torch.cat(found)


def gradients_of(run: runs.Run, reference, samples) -> dict[str, torch.Tensor]:
    """The whole gradients of the GRPO loss of a batch, on every rank."""
    run.optimizer.zero_grad()
    for mb in batches_of(samples):
        mb = train.score(reference, mb, CFG, "reference_N")
        parallel.backward(train.grpo_loss(run.model, mb, CFG)[0])
    return {name: whole(parameter.grad) for name, parameter in run.model.named_parameters()}


def sft_gradients_of(run: runs.Run, samples, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """Likewise of the SFT loss."""
    run.optimizer.zero_grad()
    for mb in batches_of(samples):
        parallel.backward(train.sft_loss(run.model, mb, dtype)[0])
    return {name: whole(parameter.grad) for name, parameter in run.model.named_parameters()}


def whole(tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in parallel.FullWeights(model)}


def bucketed(model, size: int) -> dict[str, object]:
    """The weights as they travel to a server, and the bytes that the buckets took beside the model."""
    made, weights, largest = Allocations(), {}, 0
    filled = buckets(parallel.FullWeights(model), torch.bfloat16, torch.device("cpu"), size)
    while True:
        with made:
            bucket = next(filled, None)
        if bucket is None:
            return {"weights": weights, "bytes": sum(made.sizes), "largest": largest}
        weights |= {name: tensor.clone() for name, tensor in bucket.tensors}
        largest = max(largest, len(bucket.flat))


def train_steps(run: runs.Run, reference, steps) -> list[dict[str, float]]:
    """Real optimizer steps through train.update; what a step trains on depends on its number alone."""
    metrics = []
    for step in steps:
        mbs = [train.score(reference, mb, CFG, "reference_N") for mb in batches_of(samples_of(first=100 * step))]
        metrics.append(train.update(run, CFG, mbs, lambda mb: train.grpo_loss(run.model, mb, CFG), CFG.lr))
    return metrics


def take_all(name: str, n: int) -> list[int]:
    """Everything that this rank's threads got from a queue."""
    queue, taken, lock = parallel.SharedQueue(name, n), [], threading.Lock()
    parallel.barrier()

    def work():
        while (index := queue.take()) is not None:
            with lock:
                taken.append(index)
            time.sleep(0.005)  # as an episode would take: else one rank could have them all on a busy machine

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def begin(run: runs.Run, folder: Path, step: int) -> None:
    how = {"dtype": torch.float32, "tokenizer_dir": folder, "keep": 2}
    checkpoint.begin(folder, step, run.model, run.optimizer, {"mark": step}, **how)


def trained_before_the_disk(folder: Path, reference: torch.nn.Module) -> dict[str, object]:
    """Three steps, a checkpoint, two more before anything of it is on the disk."""
    run = new_run()
    found = {"metrics": train_steps(run, reference, range(3))}
    with late_disk():
        begin(run, folder, 3)
        found["at three"] = weights_of(run.model)
        checkpoint.wait_until_copied()
        train_steps(run, reference, range(3, 5))
        assert checkpoint.latest(folder) is None
    checkpoint.finish()
    return {**found, "at five": weights_of(run.model)}


def save(run: runs.Run, folder: Path, step: int) -> Path:
    begin(run, folder, step)
    return checkpoint.finish()


@contextmanager
def late_disk() -> Iterator[None]:
    """No state is written before this ends."""
    gate, save_state = threading.Event(), parallel.save_state

    def wait_and_save(*args: object) -> None:
        assert gate.wait(60)
        save_state(*args)

    parallel.save_state = wait_and_save
    try:
        yield
    finally:
        parallel.save_state = save_state
        gate.set()


def full_disk_on(rank: int, folder: Path) -> str:
    """Save while one rank cannot write files of more than 10 kB; what the refusal said."""
    run = new_run()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if parallel.rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        save(run, folder, 9)
    except checkpoint.NotWritten as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "saved"


def lost_model_file(folder: Path) -> str:
    """Save while the first rank cannot write the model's files; what the refusal said."""
    run, write = new_run(), pretrained.save_model

    def refuse(place: Path, cfg: object, weights: Iterator[object], *more: object) -> None:
        next(weights)
        raise OSError("the disk went away")

    pretrained.save_model = refuse
    try:
        save(run, folder, 9)
    except checkpoint.NotWritten as error:
        return str(error)
    finally:
        pretrained.save_model = write
    return "saved"


def main(folder: Path) -> None:
    found = {}
    found["small talk"] = {
        "gather": parallel.gather({"rank": parallel.rank()}),
        "groups of": {size: parallel.gather_group(parallel.rank(), size) for size in (1, 2)},
        "from_main": parallel.from_main(f"said by {parallel.rank()}"),
        "sum": parallel.sum_over_ranks({"a": 1.0 + parallel.rank(), "b": 0.5}),
    }
    found["queues"] = {name: take_all(name, n) for name, n in QUEUES.items()}

    for name, shape in {"tied": {}, "untied": {"tie_word_embeddings": False}}.items():
        run, reference = new_run(**shape), new_reference(**shape)
        assert parallel.is_sharded(run.model)
        found[name] = {
            "start": weights_of(run.model),
            "gradients": gradients_of(run, reference, samples_of()),
            "norm": parallel.clip_grad_norm(run.model, 0.05),
            "clipped": {n: whole(p.grad) for n, p in run.model.named_parameters()},
        }
    # One sample for two ranks: the second one only takes part.
    run, reference = new_run(), new_reference()
    found["one sample"] = gradients_of(run, reference, samples_of(n=1))
    found["sft"] = {tied: sft_gradients_of(new_run(tie_word_embeddings=tied), samples_of()) for tied in (True, False)}
    found["sft in bf16"] = sft_gradients_of(new_run(dtype=torch.bfloat16), samples_of(), "bfloat16")
    recomputing = new_run(keep=0)
    found["recomputed"] = gradients_of(recomputing, reference, samples_of())

    found |= trained_before_the_disk(folder / "by-two", reference)

    # The checkpoint of one process, read by two, and trained on.
    run = new_run(seed=7)
    state = checkpoint.load(folder / "by-one", run.model, run.optimizer)
    found["loaded"] = {"state": state, "weights": weights_of(run.model)}
    train_steps(run, reference, range(3, 5))
    found["resumed"] = weights_of(run.model)

    # Whole tensors into shards and out again, bit for bit; also under bf16, where the shards stay fp32 ...
    other = dict(small_model(5).named_parameters())
    run = new_run(dtype=torch.bfloat16)
    load_weights(run.model, other)
    found["load_weights"] = weights_of(run.model)
    mbs = [train.score(reference, mb, CFG, "reference_N") for mb in batches_of(samples_of())]
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    found["bf16"] = train.update(run, cfg, mbs, lambda mb: train.grpo_loss(run.model, mb, cfg), 0.0)
    found["after bf16"] = weights_of(run.model)
    # ... and also after a forward without a backward, which leaves the root group gathered in bf16.
    for mb in mbs:
        train.score(run.model, mb, cfg, "old_N")
    found["after scoring"] = weights_of(run.model)
    found["scores"] = {held: scores_in_bf16(held) for held in (torch.float32, torch.bfloat16)}
    found["buckets"] = {size: bucketed(run.model, size) for size in BUCKETS}

    found["lost model file"] = lost_model_file(folder / "lost")
    found["full disk"] = [full_disk_on(rank, folder / f"full-{rank}") for rank in range(2)]
    torch.save(found, folder / f"rank-{parallel.rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parallel.start()
    main(Path(sys.argv[1]))
    parallel.stop()
