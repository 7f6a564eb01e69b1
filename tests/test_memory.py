"""What training needs of a GPU, by hand for a small shape, and how much of what is free goes to activations."""

import math
from types import SimpleNamespace

import pytest
import torch

from minitau import head, memory, parallel
from minitau.model import Block, ModelConfig, Qwen3, rope_tables

# D 10, I 20, 2 query heads and 1 key head of size 4: 8 queries, 4 keys, 4 values a token.
SMALL = ModelConfig(
    vocab_size=100,
    hidden_size=10,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)
BLOCK = 10 * (8 + 4 + 4) + 8 * 10 + 3 * 10 * 20 + 2 * 10 + 2 * 4  # q, k, v; o; the MLP; two norms; q and k norm
WHOLE = 3 * BLOCK + 100 * 10 + 10
# In and out of two norms; q and k before and after their norm and RoPE, v, the output; gate, up, product. In bf16.
KEPT = 2 * (4 * 10 + 2 * (8 + 4) + 4 + 8 + 3 * 20) + 4 * 2  # and a log-sum-exp a head in fp32
# Each norm's input and what it scales, in fp32; its output, q, k, v, the output; gate, silu, up, product. In bf16.
KEPT_EAGER = 4 * (4 * 10 + 2 * (8 + 4)) + 2 * (2 * 10 + 2 * 8 + 2 * 4 + 4 * 20) + 4 * 2


def test_parameters_are_those_of_the_model():
    with torch.device("meta"):
        assert sum(each.numel() for each in Qwen3(SMALL).parameters()) == memory.parameters(SMALL) == WHOLE
        assert sum(each.numel() for each in Block(SMALL).parameters()) == memory.block_parameters(SMALL) == BLOCK


def test_what_a_block_keeps():
    assert memory.kept_by_block(SMALL) == KEPT == 280
    assert memory.kept_by_block(SMALL, compiled=False) == KEPT_EAGER == 512
    assert memory.kept_by_recomputed(SMALL) == 20


class Kernel(torch.autograd.Function):
    """Keeps what attention kernels keep."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = q.clone(), torch.zeros(q.shape[1], q.shape[0])
        ctx.save_for_backward(q, k, v, out, lse)
        return out


def test_a_block_that_is_not_compiled_keeps_so_much():
    """Counted in what autograd saves of a real one."""
    tokens, block = 7, Block(SMALL).bfloat16()
    tables = rope_tables(torch.arange(tokens), SMALL.head_dim, 1e4)
    others = {each.untyped_storage().data_ptr() for each in (*block.parameters(), *tables)}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    entering = torch.randn(tokens, SMALL.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(entering, torch.zeros_like(entering), *tables, Kernel.apply)
    found = sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in others)
    scales = 4 * (2 + 2 + 1)  # one number a norm and token, and one a head
    assert found == tokens * (KEPT_EAGER + scales)


@pytest.mark.parametrize("logits", [20, 100_000], ids=["the block is more", "the head is more"])
def test_needs_by_hand(monkeypatch, logits):
    monkeypatch.setitem(head.LOGITS, "cuda", logits)
    tokens = 50
    of_head = 2 * 2 * min(logits, 50 * 100) + 6 * 100 * 10
    alone = memory.needs(SMALL, tokens, ranks=1)
    assert (alone.weights, alone.optimizer, alone.gradients) == (4 * WHOLE, 8 * WHOLE, 4 * WHOLE)
    assert alone.gathered == 2 * (WHOLE - BLOCK + 2 * BLOCK)  # two of three blocks at a time
    assert alone.inputs == 50 * (3 + 4) * 20
    assert alone.working == max(of_head, 50 * 420) == (26_000 if logits > 20 else 21_000)
    assert alone.total == 16 * WHOLE + alone.gathered + alone.inputs + alone.working
    two = memory.needs(SMALL, tokens, ranks=2)
    assert (two.weights, two.optimizer, two.gradients) == (2 * WHOLE, 4 * WHOLE, 2 * WHOLE)
    assert (two.gathered, two.inputs, two.working) == (alone.gathered, alone.inputs, alone.working)
    assert memory.kept_weights(SMALL, 1) == 2 * BLOCK and memory.kept_weights(SMALL, 2) == 0
    eager = memory.needs(SMALL, tokens, ranks=1, compiled=False)
    more = 16 * min(logits, 50 * 100)  # the head in fp32
    assert eager.working == max(of_head + more, 50 * 768) and eager.inputs == alone.inputs


# -- how much may be kept ----------------------------------------------------------------------------------


@pytest.fixture
def model(monkeypatch):
    """A compiled model that says it is on a GPU."""
    made = Qwen3(SMALL)
    made.compiled = True
    monkeypatch.setattr(Qwen3, "head_weight", property(lambda _: SimpleNamespace(device=torch.device("cuda"))))
    return made


@pytest.fixture
def gpu(monkeypatch):
    """Sets what a GPU says: bytes free, of 1,000,000, and what this process holds and has handed out of it."""

    def says(free, reserved=0, allocated=0):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1_000_000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)

    return says


def an_optimizer(model, steps=1):
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return optimizer


def to_keep(model, optimizer, recompute="auto", tokens=50, dtype=torch.bfloat16):
    return memory.tokens_to_keep(recompute, model, optimizer, tokens, dtype)


# Gathered, inputs, working: see above; and each block's weights in bf16.
NEEDED = 2 * (WHOLE - BLOCK + 2 * BLOCK) + 50 * 7 * 20 + 26_000 + 3 * 2 * BLOCK
LEFT_ALONE = 40_000


def test_too_little_memory_keeps_nothing(model, gpu):
    gpu(free=1000)
    assert to_keep(model, an_optimizer(model)) == 0
    gpu(free=LEFT_ALONE + NEEDED + 4 * WHOLE)
    assert to_keep(model, an_optimizer(model)) == 0
    model.keep = 0.0
    assert model.recomputed(50) == 3


def test_what_is_free_beyond_the_needs_is_kept(model, gpu):
    optimizer = an_optimizer(model)
    gpu(free=LEFT_ALONE + NEEDED + 4 * WHOLE + 50 * (280 - 20))
    model.keep = to_keep(model, optimizer)
    assert model.keep == pytest.approx(50)
    gpu(free=1000, reserved=500_000, allocated=501_000 - (LEFT_ALONE + NEEDED + 4 * WHOLE + 120 * (280 - 20)))
    model.keep = to_keep(model, optimizer)  # what the process holds but has not handed out is free as well
    assert model.keep == pytest.approx(120) and model.recomputed(50) == 1


def test_plenty_keeps_more_than_there_is(model, gpu):
    gpu(free=900_000)
    model.keep = to_keep(model, an_optimizer(model))
    assert model.keep > 3 * 50 and model.recomputed(50) == 0


def test_a_state_that_the_optimizer_has_not_made_yet_counts(model, gpu):
    gpu(free=900_000)
    before, after = to_keep(model, an_optimizer(model, steps=0)), to_keep(model, an_optimizer(model))
    assert after - before == pytest.approx(8 * WHOLE / (280 - 20))


def test_several_ranks_hold_parts(model, gpu, monkeypatch):
    """Each counts what it has itself, and keeps no weights of blocks beside."""
    gpu(free=900_000)
    optimizer, alone = an_optimizer(model), to_keep(model, an_optimizer(model))
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "local", lambda parameter: parameter.flatten()[: parameter.numel() // 2])
    assert to_keep(model, optimizer) - alone == pytest.approx((4 * (WHOLE // 2) + 3 * 2 * BLOCK) / (280 - 20), rel=1e-3)


def test_blocks_that_are_not_compiled_and_fp32_take_more(model, gpu):
    gpu(free=900_000)
    optimizer = an_optimizer(model)
    room = 900_000 - LEFT_ALONE - 4 * WHOLE
    model.compiled = False
    needed = NEEDED + 16 * 50 * 100  # the head, still more than a block's 50 * 768
    assert to_keep(model, optimizer) == pytest.approx((room - needed) / (512 - 20))
    in_fp32 = room - 2 * (needed - 3 * 2 * BLOCK)  # twice of what computes; weights are as they are
    assert to_keep(model, optimizer, dtype=torch.float32) == pytest.approx(in_fp32 / 2 / (512 - 20))


def test_who_asks_for_all_or_none_or_has_no_gpu_is_not_measured(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", None)  # would raise
    assert to_keep(model, an_optimizer(model), "all") == 0 and to_keep(model, an_optimizer(model), "none") == math.inf
    monkeypatch.undo()
    assert to_keep(model, an_optimizer(model)) == math.inf and to_keep(model, an_optimizer(model), "all") == 0
    model.keep = math.inf
    assert model.recomputed(50) == model.recomputed(1) == 0
