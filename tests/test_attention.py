"""Which attention is taken, what flash-attn-4's operators promise, and how often a model is compiled around one."""

import importlib.util
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import small_model

from minitau import attention, config, parallel
from minitau import run as runs
from minitau.attention import causal_sdpa, packed_attention
from minitau.model import Qwen3

# -- the kernel that is taken ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "capability", "taken"),
    [
        ({"flash_attn.cute", "flash_attn.flash_attn_interface"}, (9, 0), "flash_attn_4"),
        ({"flash_attn.cute"}, (10, 0), "flash_attn_4"),
        ({"flash_attn.cute", "flash_attn.flash_attn_interface"}, (8, 0), "flash_attn_2"),
        ({"flash_attn.flash_attn_interface"}, (9, 0), "flash_attn_2"),
        ({"flash_attn.cute"}, (8, 9), "torch_varlen"),
        (set(), (9, 0), "torch_varlen"),
    ],
)
def test_the_kernel_is_the_fastest_that_is_installed(monkeypatch, modules, capability, taken):
    def find_spec(name):
        if not modules:
            raise ModuleNotFoundError("No module named 'flash_attn'")
        return name if name in modules else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert attention.kernel.__wrapped__().__name__ == taken


@pytest.mark.parametrize(
    ("device", "dtype", "has"),
    [
        ("cuda", torch.bfloat16, True),
        ("cuda:1", torch.float16, True),
        ("cuda", torch.float32, False),
        ("cpu", torch.bfloat16, False),
    ],
)
def test_kernels_are_for_half_precision_on_a_gpu(device, dtype, has):
    assert attention.has_kernel(device, dtype) is has


# -- flash-attn-4's operators, over a stand-in -------------------------------------------------------------


def scores_of(q, k, lse):
    """One sequence's probabilities (H,T,T), with each key head as often as it is asked."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    scores.masked_fill_(torch.ones(len(q), len(q), dtype=torch.bool).triu(1), -torch.inf)
    return scores if lse is None else (scores - lse[..., None]).exp()


def forward_stand_in(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, return_lse):
    assert causal and return_lse and cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    out, lse = torch.empty(q.shape), torch.empty(q.shape[1], q.shape[0])
    for start, end in pairwise(cu_seqlens_q.tolist()):
        part = slice(start, end)
        out[part] = causal_sdpa(q[part], k[part], v[part])
        lse[:, part] = scores_of(q[part], k[part], None).logsumexp(-1)
    return out, lse


def backward_stand_in(q, k, v, out, dout, lse, *, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """As Dao et al. 2022, algorithm 4: it needs the output and the log-sum-exp as they are."""
    assert causal and dout.is_contiguous() and max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    groups = q.shape[1] // k.shape[1]
    for start, end in pairwise(cu_seqlens_k.tolist()):
        part = slice(start, end)
        p = scores_of(q[part], k[part], lse[:, part])
        keys, values = (each[part].repeat_interleave(groups, dim=1) for each in (k, v))
        dp = torch.einsum("qhd,khd->hqk", dout[part], values)
        ds = p * (dp - (dout[part] * out[part]).sum(-1).T[..., None]) / q.shape[-1] ** 0.5
        dq[part] = torch.einsum("hqk,khd->qhd", ds, keys)
        for grad, whole in (
            (dk, torch.einsum("hqk,qhd->khd", ds, q[part])),
            (dv, torch.einsum("hqk,qhd->khd", p, dout[part])),
        ):
            grad[part] = whole.unflatten(1, (-1, groups)).sum(2)
    return dq, dk, dv


@pytest.fixture
def flash_attn(monkeypatch):
    """flash-attn-4 as far as it is used, on a CPU."""
    interface = SimpleNamespace(_flash_attn_fwd=forward_stand_in, _flash_attn_bwd=backward_stand_in)
    for name, module in (("", None), (".cute", None), (".cute.interface", interface)):
        monkeypatch.setitem(sys.modules, f"flash_attn{name}", module or SimpleNamespace(__path__=[]))


LENGTHS = [1, 7, 12, 3]
BOUNDS = torch.tensor([0, 1, 8, 20, 23], dtype=torch.int32)


def queries_keys_values(*, by_head=False):
    """Leaves; by_head: they lie in memory head by head."""
    torch.manual_seed(0)
    made = [torch.randn(sum(LENGTHS), heads, 16) for heads in (4, 2, 2)]
    if by_head:
        made = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in made]
    return [each.requires_grad_() for each in made]


@pytest.mark.parametrize("by_head", [False, True])
def test_operators_give_attention_and_its_gradients(flash_attn, by_head):
    found = queries_keys_values(by_head=by_head)
    exact = [each.detach().double().requires_grad_() for each in found]
    out = attention.flash_attn_4(*found, BOUNDS, max(LENGTHS))
    expected = torch.cat([causal_sdpa(*part) for part in zip(*(each.split(LENGTHS) for each in exact))])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    push = torch.randn(4, sum(LENGTHS), 16).transpose(0, 1)  # what comes back need not be contiguous
    (out * push).sum().backward()
    (expected * push.double()).sum().backward()
    for ours, theirs in zip(found, exact):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not attention.flash_attn_4(*found, BOUNDS, max(LENGTHS)).requires_grad


@pytest.mark.parametrize("by_head", [False, True])
def test_operators_are_what_they_tell_the_compiler(flash_attn, by_head):
    """Schema, shapes, strides and dtypes of what stands for them in a graph, and their place in autograd."""
    inputs = (*queries_keys_values(by_head=by_head), BOUNDS, max(LENGTHS))
    torch.library.opcheck(attention.flash_attn_4_forward, inputs)
    q, k, v, *rest = (each.detach() if isinstance(each, torch.Tensor) else each for each in inputs)
    out, lse = attention.flash_attn_4_forward(q, k, v, *rest)
    assert lse.shape == (4, sum(LENGTHS)) and lse.dtype == torch.float32
    torch.library.opcheck(attention.flash_attn_4_backward, (torch.randn_like(out), q, k, v, out, lse, *rest))


# -- a model that is compiled around attention -------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """What torch.compile makes graphs of, in order. They run as they are."""
    found, compiler = [], torch.compile

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **how: compiler(function, backend=backend, **how))
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def logprobs_of(model, lengths, attends):
    ids = torch.randint(5, 90, (sum(lengths),), generator=torch.Generator().manual_seed(sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return model(ids, positions, attends, torch.arange(sum(lengths) - 1), ids[1:])[0]


def as_on_a_gpu(monkeypatch):
    """packed_attention takes its kernel; what is pinned for a GPU stays here."""
    monkeypatch.setattr(attention, "has_kernel", lambda device, dtype: True)
    unpinned = {"tensor": lambda data, dtype, pin_memory: torch.tensor(data, dtype=dtype)}
    monkeypatch.setattr(attention, "torch", SimpleNamespace(**(vars(torch) | unpinned)))  # torch itself stays as it is


def varlen_stand_in(q, k, v, cu_q, cu_k, longest, same, *, window_size, enable_gqa=False):
    assert window_size == (-1, 0) and enable_gqa
    return attention.flash_attn_4(q, k, v, cu_q, longest)


@pytest.mark.parametrize("kernel", [attention.flash_attn_4, attention.torch_varlen])
def test_blocks_are_compiled_thrice(monkeypatch, flash_attn, graphs, kernel):
    """For what is kept, for what is recomputed and for no gradients; each for all layers, lengths and numbers of
    sequences. And it is the same function."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_stand_in)
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(attention, "kernel", lambda: kernel)
    model, plain = small_model(), small_model()
    model.compile_blocks()
    for lengths in ([5], [3, 4], [1, 1], [2] * 9):
        attends = packed_attention([0, *torch.tensor(lengths).cumsum(0).tolist()], "cpu", torch.float32)
        expected = logprobs_of(plain, lengths, attends)
        for model.keep in (float("inf"), sum(lengths)):  # all blocks, or one
            found = logprobs_of(model, lengths, attends)
            torch.testing.assert_close(found, expected)
            model.zero_grad()
            found.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(logprobs_of(model, lengths, attends), expected)
        plain.zero_grad()
        expected.sum().backward()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
        assert len(graphs) == 3, lengths


@pytest.mark.parametrize(("dtype", "compiled"), [("bfloat16", True), ("float32", False)])
def test_no_block_is_compiled_around_attention_that_goes_by_lengths(monkeypatch, tmp_path, tiny_dir, dtype, compiled):
    """fp32 on a GPU: one SDPA call a sequence, and a local engine that reads the trainer's own model."""
    asked = []
    monkeypatch.setattr(parallel, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(parallel, "shard", lambda *_: None)
    monkeypatch.setattr(Qwen3, "to", lambda model, device: model)
    monkeypatch.setattr(Qwen3, "compile_blocks", lambda model: asked.append(model))
    for name, flag in (("run", True), ("not", False)):
        runs.open_run("sft", config.SFT(model=str(tiny_dir), out=str(tmp_path / name), dtype=dtype, compile=flag))
    assert len(asked) == compiled
    assert torch.compile(lambda: torch.compiler.is_compiling())() is False  # --no-compile holds for the head as well
    torch.compiler.set_stance("default")
