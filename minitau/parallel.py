"""Everything that knows there is more than one process: the only file that imports torch.distributed.

At world size 1 all of it does nothing, so that `python train.py` and
`torchrun --nproc_per_node 8 train.py` run the same lines. Sharding is FSDP2, one group a block;
gloo on CPU, NCCL on CUDA. FSDP averages gradients over ranks, so `backward` scales by the world
size and every loss stays a sum over the global batch. It must not know what is being trained.
"""

from __future__ import annotations

import datetime
import itertools
import math
import os
import socket
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

# A single process saves without a process group on purpose; torch warns each time that it guesses so.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

# A rank may wait for the slowest episode of another: longer than any step, short of a lost night.
TIMEOUT = datetime.timedelta(hours=4)
LOOPBACK = "127.0.0.1"
BESIDE: dict[str, dist.ProcessGroup] = {}  # all ranks once more, for each thread that runs beside the training


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_here() -> int:
    """How many ranks run on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """This rank's device: its own GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def use_device() -> None:
    """What this thread does on a GPU it does on this rank's: each thread has to say so."""
    if device().type == "cuda":
        torch.cuda.set_device(device())


def start() -> None:
    """Join the process group that torchrun announced. Nothing to do for a single process.

    Raises OSError if this rank has no GPU where others have one.
    """
    if device().type == "cuda":
        if device().index >= torch.cuda.device_count():
            count = f"{torch.cuda.device_count()} GPUs are visible, one a rank is needed"
            raise OSError(
                f"rank {rank()} has no GPU: {count}; lower --nproc_per_node, or hide all: CUDA_VISIBLE_DEVICES=''"
            )
        use_device()
    if world_size() > 1:
        # Both backends: NCCL moves the shards, gloo the Python objects that live on the CPU.
        backend = "cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
        BESIDE.update({thread: dist.new_group(backend="gloo", timeout=TIMEOUT) for thread in ("rollout", "checkpoint")})


def stop() -> None:
    """Leave the process group, once all is done. Not after a failure: the others may be in the middle of a collective,
    and leaving waits for them, where a process that simply ends is seen by torchrun, which ends them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather(item: Any, *, beside: str = "") -> list[Any]:
    """Every rank's `item`, in rank order, on every rank.

    beside: for what may run in a thread of its own while the main thread trains: that thread's name in BESIDE. What all
    ranks do together must come in the same order on each of them, and the order of two threads is anybody's guess.
    """
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item, group=BESIDE.get(beside))
    return items


def gather_group(item: Any, size: int) -> list[Any]:
    """The `item` of each of this rank's group, in rank order: every `size` ranks that follow each other are one. All
    ranks together, unless each is a group by itself."""
    if size == 1:
        return [item]
    first = rank() // size * size
    return gather(item)[first : first + size]


def from_main(item: Any) -> Any:
    """Rank 0's `item`, on every rank."""
    return gather(item if is_main() else None)[0]


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Element-wise sum of dicts with the same keys on every rank."""
    everyone = gather(values)
    return {key: sum(one[key] for one in everyone) for key in values}


class SharedQueue:
    """The indices 0..n-1, each handed out once over all ranks and threads, to whoever asks first.

    `name` must be new for each queue and the same on every rank. With `each_rank` every rank gets them all.
    """

    def __init__(self, name: str, n: int, each_rank: bool = False):
        self.name, self.n = name, n
        self.counter = f"queue/{name}/{rank()}" if each_rank else f"queue/{name}"
        for counter in (self.counter, f"left/{name}"):
            COUNTS.pop(counter, None)  # a single process may play the same twice

    def take(self) -> int | None:
        """The next index, or None when there is none left."""
        index = count(self.counter) - 1
        return index if index < self.n else None

    def leave(self) -> None:
        """This rank is done with what it took."""
        count(f"left/{self.name}")

    def left(self) -> bool:
        """True once all ranks are."""
        return count(f"left/{self.name}", 0) >= world_size()


LOCK = threading.Lock()
COUNTS: Counter[str] = Counter()  # of a single process; otherwise they stand in the store that torchrun already runs
ANSWERED: Counter[str] = Counter()  # announcements that this rank has answered, by name


def count(name: str, more: int = 1) -> int:
    """Add to a counter that all ranks share; what it is then. Any thread may."""
    with LOCK:
        if dist.is_initialized() and world_size() > 1:
            return dist.distributed_c10d._get_default_store().add(f"count/{name}", more)
        COUNTS[name] += more
        return COUNTS[name]


def announce(name: str) -> None:
    """Ask every rank's main thread for something that all must do together: see `announced`."""
    count(f"announced/{name}")


def announced(name: str) -> bool:
    """True once on every rank for each `announce` of any rank. Ranks that poll it do the same things in turn; when they
    stop polling, all must have seen as many, or one of them waits for the others in vain."""
    if ANSWERED[name] < count(f"announced/{name}", 0):
        ANSWERED[name] += 1
        return True
    return False


def was_announced(name: str) -> bool:
    """True from the first `announce` of any rank on. Any thread may ask, and no rank need."""
    return count(f"announced/{name}", 0) > 0


def shard(model: nn.Module, blocks: nn.ModuleList, compute_dtype: torch.dtype) -> None:
    """Shard `model` in place over all ranks: each block a group, the rest the root group.

    Parameters stay what they are (of a model that is trained fp32, the master weights); forward and backward get them
    in `compute_dtype`, gradients are reduced in fp32. One process has nothing to shard and keeps the plain module,
    which rounds them itself: see Qwen3.dtype.
    """
    if world_size() == 1:
        return
    mesh = init_device_mesh(device().type, (world_size(),))
    # Inputs are not cast: what a caller gives a block in fp32, as angles of positions, loses too much in bf16.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def reshard(model: nn.Module) -> None:
    """Give back what a forward gathered and, for want of a backward, still holds."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def backward(loss: Tensor) -> None:
    """Accumulate gradients of `loss`, this rank's part of a sum over all ranks."""
    (loss * world_size()).backward()


def clip_grad_norm(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients to a global L2 norm of at most `max_norm`; returns the norm before."""
    norm = grad_norm(model)
    nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return float(norm)


def grad_norm(model: nn.Module) -> Tensor:
    """The L2 norm of all gradients, over all ranks."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clipped_step(model: nn.Module, optimizer: torch.optim.AdamW, max_norm: float) -> float:
    """An optimizer step with gradients of a global L2 norm of at most `max_norm`; returns the norm before.

    If it is not finite there is no step: on no rank, because the norm is global. A fused optimizer is told so on the
    GPU, and scales as it goes, so that the host need not wait for backward before it can ask for the step.
    """
    if not optimizer.defaults["fused"]:
        norm = clip_grad_norm(model, max_norm)
        if math.isfinite(norm):
            optimizer.step()
        return norm
    norm = grad_norm(model)
    optimizer.grad_scale = (norm / max_norm).clamp(min=1.0)  # as torch.amp.GradScaler speaks to it: a divisor
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    return float(norm)


class FullWeights:
    """(name, whole tensor) of every parameter, one at a time; all ranks must iterate to the end, each time.

    A plain module gives its own parameters, not copies. Sharded ones are gathered in `dtype`, if one is given: half
    the bytes on the wire if that is half as wide.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None):
        self.model, self.dtype = model, dtype

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parts():
            yield name, whole(parameter, self.dtype)

    def parts(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of every one, as the ranks hold it: for those who gather many at once themselves."""
        if isinstance(self.model, FSDPModule):
            reshard(self.model)  # what is gathered is in the compute dtype
        return list(self.model.named_parameters())


def whole(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """All of a tensor that may be sharded along its rows, on every rank."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    place = torch.empty(room(tensor), dtype=dtype or tensor.dtype, device=tensor.device)
    gather_into([place], [tensor])
    return place[: tensor.numel()].view(tensor.shape)


def room(tensor: Tensor) -> int:
    """How many elements `gather_into` needs to make a tensor whole: as many rows from each rank."""
    if not isinstance(tensor, DTensor):
        return tensor.numel()
    rows, *row = tensor.shape
    ranks = world_size()
    return -(-rows // ranks) * ranks * math.prod(row)


@torch.no_grad()
def gather_into(places: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Fill each place, flat and `room` long, with a whole tensor and what may follow it; cast to the place's dtype.

    Tensors may be sharded along their rows; then all ranks do this together. No memory is taken beside the places:
    every rank but the last ones holds as many rows, so that each rank writes its own where they belong, and one
    collective for all tensors brings the others'.
    """
    held = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    ranks, mine = world_size(), rank()
    scattered = [isinstance(tensor, DTensor) for tensor in tensors]
    shares = [place.chunk(ranks)[mine] if cut else place for place, cut in zip(places, scattered)]
    filled = [(share[: part.numel()].view(part.shape), part) for share, part in zip(shares, held) if part.numel()]
    if filled:
        torch._foreach_copy_(*map(list, zip(*filled)))  # few kernels, which read fp32 and write bf16, for all of them
    if any(scattered):
        group = next(tensor.device_mesh.get_group() for tensor, cut in zip(tensors, scattered) if cut)
        with dist._coalescing_manager(group):
            for place, share, cut in zip(places, shares, scattered):
                if cut:
                    dist.all_gather_into_tensor(place, share, group)


class Broadcast:
    """A group of this process, its rank 0, and of `others` that are no ranks of ours: tensors go to all of them.

    They join it as ranks 1..others, at LOOPBACK and `port`, under `name`; `backend` is how. What a server of SGLang
    does to join (torch has no public way to have a group beside the default one) is done here likewise.
    """

    NUMBERS = itertools.count()

    def __init__(self, others: int, timeout: float):
        self.name, self.size = f"weights-{next(self.NUMBERS)}", others + 1
        self.backend = "nccl" if device().type == "cuda" else "gloo"
        self.timeout = datetime.timedelta(seconds=timeout)
        listener = socket.create_server((LOOPBACK, 0))  # a store's own would listen to the whole world
        self.port = listener.getsockname()[1]
        self.store = dist.TCPStore(
            LOOPBACK,
            self.port,
            is_master=True,
            timeout=self.timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self.group: dist.ProcessGroup | None = None

    def join(self) -> None:
        """Wait for the others. Raises RuntimeError if they do not come in time."""
        c10d = dist.distributed_c10d
        store = dist.PrefixStore(self.name, self.store)
        self.group, _ = c10d._new_process_group_helper(
            self.size, 0, [], dist.Backend(self.backend), store, group_name=self.name, timeout=self.timeout
        )
        c10d._world.pg_group_ranks[self.group] = {rank: rank for rank in range(self.size)}

    def sender(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """What sends the tensors, one by one and in order: it may be called in any thread, for it may hang when one
        of the others is gone. What this thread does with them later waits for it. It raises RuntimeError."""
        stream = torch.cuda.current_stream() if tensors[0].is_cuda else None

        def send() -> None:
            with torch.cuda.stream(stream):
                for work in [self.group.broadcast(tensor, 0) for tensor in tensors]:
                    work.wait()

        return send

    def close(self) -> None:
        """Leave the group, as the others do at the same time."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def abort(self) -> None:
        """Leave the group though one of the others hangs in it, or is gone. torch keeps what it has of the group: to
        take it down would wait for them."""
        if self.group is not None:
            threading.Thread(target=self.group.abort, daemon=True).start()
            self.group = None


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or a tensor like one, to be changed in place: all of it at world size 1."""
    whole = tensor.detach()
    return whole.to_local() if isinstance(whole, DTensor) else whole


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """fp32 weights and optimizer state as they are kept, this rank's shards: no copies."""
    fresh = not optimizer.state
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    if fresh:  # torch made the state by a step with zero gradients, and counted it
        for each in optimizer.state.values():
            each["step"].zero_()
    return state


def places_on_host(state: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]:
    """The like of what state_of gave, whose tensors stand in this host's memory and hold nothing yet; and of each its
    own part there with the one that belongs in it."""
    pairs = []

    def placed(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: placed(each) for key, each in item.items()}
        if isinstance(item, (list, tuple)):
            return type(item)(placed(each) for each in item)
        if not isinstance(item, Tensor):
            return item
        place = torch.empty_like(item, device="cpu", memory_format=torch.contiguous_format)
        pairs.append((local(place), local(item)))
        return place

    return placed(state), pairs


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write what state_of gave, or a copy, each rank its shards. In the thread of checkpoints. Raises OSError."""
    try:
        dcp.save(state, checkpoint_id=folder, process_group=BESIDE.get("checkpoint"), no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as error:
        raise os_error(error) from error


def weights_on_main(weights: dict[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) on rank 0, in its own memory, one at a time; on the other ranks, which all must iterate to
    the end, an empty one. For the thread of checkpoints: no GPU takes part, whose collectives are the main thread's."""
    for name, tensor in weights.items():
        part = local(tensor).cpu().to(dtype)
        yield name, collected(part, tensor.shape) if isinstance(tensor, DTensor) else part


def collected(part: Tensor, shape: torch.Size) -> Tensor:
    """On rank 0 a tensor of that shape, whose rows the ranks hold in order; every rank but the last ones as many."""
    rows, *row = shape
    share = -(-rows // world_size()) * math.prod(row)
    mine = part.new_zeros(share)
    mine[: part.numel()] = part.flatten()
    whole = part.new_empty(share * world_size() if is_main() else 0)
    places = [place.view(torch.uint8) for place in whole.chunk(world_size())] if is_main() else None
    dist.gather(mine.view(torch.uint8), places, group=BESIDE["checkpoint"])  # bytes: gloo does not know every dtype
    return whole[: shape.numel()].view(shape) if is_main() else whole


def os_error(error: dcp.api.CheckpointException) -> OSError:
    """The first rank's reason; torch's own exception is no Exception and has a traceback for a message."""
    causes = [cause for cause, _ in error.failures.values()]
    return next((c for c in causes if isinstance(c, OSError)), OSError(f"{type(causes[0]).__name__}: {causes[0]}"))


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read what save_state wrote, on any number of ranks. Raises OSError if it is not all there."""
    try:
        dcp.FileSystemReader(folder).read_metadata()  # else torch would look for older forms, and tell the console
    except Exception as error:  # whatever comes of a damaged pickle
        raise OSError(f"{folder.name}/.metadata: {type(error).__name__}: {error}") from error
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    try:
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as error:
        raise os_error(error) from error
    for group in state["optimizer"]["param_groups"]:  # a matter of the device that goes on, not of the run
        group["fused"] = optimizer.defaults["fused"]
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
