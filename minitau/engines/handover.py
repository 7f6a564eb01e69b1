"""Weights on their way to a server on the same device: cut into buckets, handed over without a copy through HTTP.

A bucket is one buffer that is filled, lent to the server as handles (CUDA IPC; shared memory on a CPU), and filled
again once the server has taken its copy. So the model never exists a second time in the trainer.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing  # teaches ForkingPickler to pass tensors by handle
from torch import Tensor

# Each bucket costs a request of some 3 ms; 1 GiB holds the embedding of a 4B model. Shared memory is dearer.
BUCKET_BYTES = {"cuda": 1 << 30, "cpu": 1 << 24}
ALIGN = 256  # bytes

NamedTensors = list[tuple[str, Tensor]]


def buckets(
    weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, device: torch.device, size: int = 0
) -> Iterator[tuple[NamedTensors, bool]]:
    """([(name, tensor), ...], is it the last?) of at most `size` bytes (0: what suits the device), or of one tensor
    that is larger.

    Names and shapes are those of `weights`, in order. The tensors are views of one buffer, good only until the
    next bucket is asked for.
    """
    size = size or BUCKET_BYTES[device.type]
    buffer = torch.empty(0, dtype=dtype, device=device)
    bucket: NamedTensors = []
    used = 0
    step = ALIGN // dtype.itemsize
    for name, tensor in weights:
        if bucket and (used + tensor.numel()) * dtype.itemsize > size:
            yield bucket, False
            bucket, used = [], 0
        if not bucket and len(buffer) < tensor.numel():
            buffer = torch.empty(max(size // dtype.itemsize, tensor.numel()), dtype=dtype, device=device)
        view = buffer[used : used + tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        bucket.append((name, view))
        used += -(-tensor.numel() // step) * step
    if bucket:
        yield bucket, True


def serialize(named: NamedTensors) -> str:
    """Handles of tensors as a server unpickles them: base64 of a pickle that holds no data. The tensors must stay
    as they are until it has answered."""
    if named[0][1].is_cuda:
        torch.cuda.current_stream().synchronize()  # the copies into the bucket are done before anybody reads it
        torch.cuda.ipc_collect()  # what servers have closed
    else:
        torch.multiprocessing.set_sharing_strategy("file_system")  # file descriptors do not travel over HTTP
    file = io.BytesIO()
    ForkingPickler(file, 4).dump([(name, tensor.detach()) for name, tensor in named])
    return base64.b64encode(file.getvalue()).decode()
