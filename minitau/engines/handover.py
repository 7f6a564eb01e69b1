"""Weights on their way to servers: cut into buckets, handed over without a copy through HTTP.

A bucket is one buffer that is filled, passed on, and filled again once the servers have taken their copy. So the
model never exists a second time in the trainer. To a server on the same device a bucket is lent by handle (CUDA IPC;
shared memory on a CPU): `lend`. To servers on other GPUs rank 0 broadcasts it, to all at once: `Broadcaster`. A server
may be spread over several GPUs (tensor parallelism, `tp`); then each of its workers takes its part of whole tensors.

    POST /update_weights_from_tensor, /init_weights_update_group, /update_weights_from_distributed,
    /destroy_weights_update_group
"""

from __future__ import annotations

import base64
import io
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.multiprocessing  # teaches ForkingPickler to pass tensors by handle
from torch import Tensor

from minitau import parallel
from minitau.engines.server import NoAnswer, Refused, request
from minitau.engines.upkeep import IN_VAIN

# Each bucket costs a request of some 4 ms, and is all the memory that a sync takes, on however many ranks: shards are
# gathered in it. The 8.04 GB of a 4B model (its embedding alone is 0.78) go into 6 of at most 1.38 GB; 1 GB would make
# it 8, 0.5 GB 17. Shared memory is dearer.
BUCKET_BYTES = {"cuda": 1_380_000_000, "cpu": 1 << 24}
ALIGN = 256  # bytes: where a tensor may begin in a bucket
GRACE = 10.0  # seconds in which the others may still finish what one of them has failed in
LEAVE_SECONDS = 10.0  # for a server to leave a group that is not used any more

NamedTensors = list[tuple[str, Tensor]]
Weights = Iterable[tuple[str, Tensor]]
Outcome = tuple[bool, str]  # whether a server has the weights now, and what went wrong with it


class Bucket(NamedTuple):
    """Tensors that travel together: views of one buffer, good only until the next bucket is asked for."""

    flat: Tensor  # all of them, bytes, with gaps
    tensors: NamedTensors
    last: bool


def buckets(weights: Weights, dtype: torch.dtype, device: torch.device, size: int = 0) -> Iterator[Bucket]:
    """Buckets of at most `size` bytes (0: what suits the device), or of one tensor that is larger; all ranks together
    if there are shards in `weights`.

    Names and shapes are those of `weights`, in order.
    """
    size = size or BUCKET_BYTES[device.type]
    parts = weights.parts() if isinstance(weights, parallel.FullWeights) else list(weights)
    step = ALIGN // dtype.itemsize
    plan: list[list[tuple[str, Tensor, int, int]]] = []  # by bucket: names, tensors, where each begins, and its room
    used = longest = 0
    for name, tensor in parts:
        length = parallel.room(tensor)
        if not plan or (used + length) * dtype.itemsize > size:
            plan.append([])
            used = 0
        plan[-1].append((name, tensor, used, length))
        longest = max(longest, used + length)
        used += -(-length // step) * step
    buffer = torch.empty(longest, dtype=dtype, device=device)
    for number, bucket in enumerate(plan, 1):
        places = [buffer[start : start + length] for _, _, start, length in bucket]
        parallel.gather_into(places, [tensor for _, tensor, _, _ in bucket])
        named = [
            (name, place[: math.prod(tensor.shape)].view(tensor.shape))
            for place, (name, tensor, _, _) in zip(places, bucket)
        ]
        yield Bucket(buffer.view(torch.uint8), named, number == len(plan))


def serialize(bucket: Bucket) -> str:
    """A handle of a bucket as a server unpickles it: base64 of a pickle that holds no data. The bucket must stay as
    it is until the server has answered.

    (One handle costs a server less than one a tensor; it copies each tensor from its view of the buffer.)
    """
    if bucket.flat.is_cuda:
        torch.cuda.current_stream().synchronize()  # the copies into the bucket are done before anybody reads it
        torch.cuda.ipc_collect()  # what servers have closed
    else:
        torch.multiprocessing.set_sharing_strategy("file_system")  # file descriptors do not travel over HTTP
    metadata = []
    for name, tensor in bucket.tensors:
        start = tensor.data_ptr() - bucket.flat.data_ptr()
        about = {"name": name, "shape": tensor.shape, "dtype": tensor.dtype, "numel": tensor.nbytes}  # in bytes
        metadata.append(SimpleNamespace(**about, start_idx=start, end_idx=start + tensor.nbytes))
    file = io.BytesIO()
    ForkingPickler(file, 4).dump({"flattened_tensor": bucket.flat, "metadata": metadata})
    return base64.b64encode(file.getvalue()).decode()


def lend(
    weights: Weights, dtype: torch.dtype, url: str, version: int, timeout: float, *, wanted: bool, tp: int = 1
) -> Outcome:
    """Hand weights over to the server at `url`, on the devices of this rank's group of `tp` ranks, if they are wanted
    there: the group's first rank says so, asks, and has the others know what went wrong.

    All ranks iterate the weights to the end, whether they send or not: each holds a part of them. A handle is good on
    the device where the bucket is, so that each rank of a group makes its own, for the worker there.
    """
    wanted, problem, sent = parallel.gather_group(wanted, tp)[0], "", 0
    for bucket in buckets(weights, dtype, parallel.device()):
        sent += len(bucket.tensors)
        lent = wanted and not problem
        handles = parallel.gather_group(serialize(bucket) if lent else "", tp)
        if lent and parallel.rank() % tp == 0:
            body = {
                "serialized_named_tensors": handles,  # worker i opens the i-th
                "load_format": "flattened_bucket",
                "flush_cache": bucket.last,
                "weight_version": str(version),
            }
            try:
                request(f"{url}/update_weights_from_tensor", body, timeout=timeout)
            except (NoAnswer, Refused) as error:
                problem = str(error)
        # Also what keeps a group's buckets as they are until the server has answered.
        problem = parallel.gather_group(problem, tp)[0]
    assert sent, "the weights of a sync must be there to be iterated again"
    return wanted and not problem, problem


class Broadcaster:
    """Brings weights to servers on other GPUs; rank 0 sends, the other ranks give their parts.

    The servers and rank 0 are a process group, which is made anew when others want weights than the last time: a
    server that was started again is another one. tp: GPUs of each server, every one of them a member.
    """

    def __init__(self, tp: int = 1) -> None:
        self.tp = tp
        self.group: parallel.Broadcast | None = None
        self.members: list[str] = []  # URLs, in the order of their ranks: 1 to tp, and so on

    def hand_over(
        self, weights: Weights, dtype: torch.dtype, url: str, version: int, timeout: float, *, wanted: bool
    ) -> Outcome:
        """Like `lend`, of all ranks together, to every server that one of them names with `wanted`. Whether the one
        at `url` has them now, which may be due to another rank, and what went wrong with it."""
        urls = list(dict.fromkeys(each for each in parallel.gather(url if wanted else "") if each))
        problems: dict[str, str] = {}
        if not parallel.is_main():
            for _ in buckets(weights, dtype, parallel.device()):
                pass
        else:
            problems = self.send(weights, dtype, urls, version, timeout)
        problems = parallel.from_main(problems)
        return url in urls and url not in problems, problems.get(url, "")

    def send(
        self, weights: Weights, dtype: torch.dtype, urls: list[str], version: int, timeout: float
    ) -> dict[str, str]:
        """Rank 0's part; what went wrong, by URL. After a problem the rest of the weights is iterated, not sent."""
        problems, sent = self.meet(urls, timeout), 0
        for _, tensors, last in buckets(weights, dtype, parallel.device()):
            sent += len(tensors)
            if not urls or problems:
                continue
            body = {
                "names": [name for name, _ in tensors],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
                "shapes": [list(tensor.shape) for _, tensor in tensors],
                "group_name": self.group.name,
                "flush_cache": last,
                "weight_version": str(version),
            }
            mine = self.group.sender([tensor for _, tensor in tensors])
            problems = self.together("update_weights_from_distributed", [body] * len(urls), mine, timeout)
        assert sent, "the weights of a sync must be there to be iterated again"
        return problems

    def meet(self, urls: list[str], timeout: float) -> dict[str, str]:
        """Have a group of just these servers; who did not come, and why."""
        if urls == self.members or not urls:
            return {}
        self.part()
        # (The servers' answers have a deadline. NCCL's own must come after it: it ends the process.)
        self.group, self.members = parallel.Broadcast(self.tp * len(urls), 2 * timeout + GRACE), urls
        join = {
            "master_address": parallel.LOOPBACK,
            "master_port": self.group.port,
            "world_size": self.group.size,
            "group_name": self.group.name,
            "backend": self.group.backend,
        }
        bodies = [{**join, "rank_offset": rank} for rank in range(1, self.group.size, self.tp)]
        return self.together("init_weights_update_group", bodies, self.group.join, timeout)

    def part(self) -> None:
        """Leave the group, with those of its servers that are still there."""
        if self.group and self.members:
            body = {"group_name": self.group.name}
            ask = partial(request, body=body, timeout=LEAVE_SECONDS)
            at_once([*(partial(ask, f"{url}/destroy_weights_update_group") for url in self.members), self.group.close])
        self.group, self.members = None, []

    def together(
        self, what: str, bodies: Sequence[dict[str, Any]], mine: Callable[[], None], timeout: float
    ) -> dict[str, str]:
        """Ask each member for `what` with its body, and do `mine`, at once: they wait for each other. What went
        wrong, by URL; then the group is given up."""
        asked = zip(self.members, bodies)
        calls = [partial(request, f"{url}/{what}", body, timeout=timeout) for url, body in asked]
        *theirs, own = at_once([*calls, mine])
        problems = {url: problem for url, problem in zip(self.members, theirs) if problem}
        if own and not problems:
            problems = dict.fromkeys(self.members, own)
        if problems:
            self.group.abort()
            self.group, self.members = None, []
        return problems


def at_once(calls: Sequence[Callable[[], Any]]) -> list[str]:
    """Do all of `calls` at the same time, each in a thread; what went wrong with each, "" if nothing did.

    When one has failed, the others have GRACE seconds left: what they wait for may never come.
    """
    problems: list[str | None] = [None] * len(calls)

    def do(i: int) -> None:
        try:
            calls[i]()
            problems[i] = ""
        except (NoAnswer, Refused, RuntimeError) as error:
            problems[i] = " ".join(str(error).split())[:300] or type(error).__name__

    threads = [threading.Thread(target=do, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    deadline = None
    while alive := [thread for thread in threads if thread.is_alive()]:
        alive[0].join(0.002)
        if deadline and time.monotonic() >= deadline:
            break
        if deadline is None and any(problems):
            deadline = time.monotonic() + GRACE
    return [IN_VAIN if problem is None else problem for problem in problems]
