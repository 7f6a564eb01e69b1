"""What several test files share: one tiny checkpoint a session, and makers of small records.

Nothing here is a stand-in for something of ours: the checkpoint is a real one, with a real tokenizer.
"""

import os

# Before anything imports a Hugging Face library: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tau2_world import play, world  # noqa: F401  (fixtures of tau2-bench's tests)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitau import tiny
from minitau.engines.launch import ENVIRONMENT
from minitau.engines.server import Server
from minitau.episode import Check, Evaluation, Stop, Task, Trajectory
from minitau.model import ModelConfig, Qwen3, init_weights

# The smallest shape that still has every part: more than one block, grouped queries (H != K), head size not D / H.
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="session", autouse=True)
def heeds_ctrl_c():
    """A shell's background job ignores ctrl-C, and so would what a test starts to send it one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small gain nothing by a second thread, and where others want the cores they wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """A checkpoint with a tokenizer trained on courier's own words: 2 layers, hidden 64, about 700 tokens.

    Shared by the whole session: tests read it and write elsewhere.
    """
    cfg = tiny.Tiny(out=str(tmp_path_factory.mktemp("tiny") / "model"), vocab=700, layers=2, hidden=64, corpus_tasks=20)
    return tiny.make(cfg, tiny.world_texts(cfg))


def small_model(seed: int = 0, scale: float = 5.0, **changes) -> Qwen3:
    """A random Qwen3 of the SMALL shape. `scale` makes its logits differ enough for a test to see."""
    model = Qwen3(ModelConfig(**{**SMALL, **changes}))
    init_weights(model, seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed + 1)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
            else:  # norms of exactly one would hide a norm that is left out
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


ROOT = Path(__file__).resolve().parent.parent
FOR_THE_FAKE = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
FAKE_SGLANG = f"{sys.executable} {Path(__file__).with_name('fake_sglang.py')}"
# How SGLang is started, where it is there to be tested against: "python -m sglang.launch_server ...".
SGLANG = os.environ.get("MINITAU_SGLANG", FAKE_SGLANG)


@contextmanager
def sglang_server(model_dir: Path, log: Path, context: int, *flags: str, command: str = SGLANG) -> Iterator[Server]:
    """A running server with a directory's weights in fp32; the stand-in, unless MINITAU_SGLANG names the real one."""
    words = [*shlex.split(command), "--model-path", str(model_dir), "--host", "127.0.0.1", "--dtype", "float32"]
    words += ["--context-length", str(context), "--skip-tokenizer-init", "--skip-server-warmup", *flags]
    server = Server(
        lambda port: [*words, "--port", str(port)],
        log,
        "the test's server",
        environment={**ENVIRONMENT, **FOR_THE_FAKE},
    )
    server.start(300.0, shown=False)
    try:
        yield server
    finally:
        server.close()


def child_of(server: Server) -> int:
    """The pid of the server itself, which its keeper keeps."""
    keeper = server.process.pid
    return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])


class Allocations(TorchDispatchMode):
    """Counts the bytes of each tensor that torch makes anew in a `with`. Their sum is no less than the peak."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {storage_of(tensor) for tensor in tensors_in((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        new = {storage_of(tensor): tensor.untyped_storage().nbytes() for tensor in tensors_in(made)}
        self.sizes += [size for storage, size in new.items() if storage not in known]
        return made


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage_of(tensor):
    return tensor.untyped_storage()._cdata


def trajectory(
    ids: Sequence[int],
    said: Sequence[bool],
    logprobs: Sequence[float] | None = None,
    *,
    reward: float = 0.0,
    checks: Sequence[Check] = (),
    stop: Stop = Stop.USER_STOP,
    task: str = "0",
    sample: int = 0,
) -> Trajectory:
    """A finished episode with these tokens; what was heard has log-probability 0, as in real ones."""
    assert len(ids) == len(said)
    return Trajectory(
        task=Task("desk", "train", task),
        sample=sample,
        ids=list(ids),
        said=list(said),
        logprobs=list(logprobs) if logprobs is not None else [-1.0 if s else 0.0 for s in said],
        stop=stop,
        evaluation=None if stop.ours else Evaluation(reward, tuple(checks)),
    )
