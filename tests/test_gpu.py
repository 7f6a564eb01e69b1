"""What only a GPU can show: varlen attention in bf16, the engine on CUDA, FSDP2 over NCCL.

These tests skip where there is no GPU. Figures are bounds on rounding, not on speed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import FAKE_SGLANG, FOR_THE_FAKE

from minitau import host, pretrained
from minitau.attention import causal_sdpa, packed_attention
from minitau.chat import load_chat
from minitau.engines.local import LocalEngine
from minitau.episode import Sampling
from minitau.model import ModelConfig, Qwen3, init_weights

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def test_varlen_attention_equals_one_sdpa_a_sequence():
    """Forward and gradients of the packed bf16 kernel against fp32 attention, sequence by sequence."""
    torch.manual_seed(0)
    lengths = [1, 17, 300, 64, 129]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    q, k, v = (torch.randn(sum(lengths), heads, 64, device="cuda", requires_grad=True) for heads in (8, 2, 2))
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    out = next(iter(packed_attention(bounds, "cuda", torch.bfloat16)))(*half)
    exact = torch.cat([causal_sdpa(*part) for part in zip(q.split(lengths), k.split(lengths), v.split(lengths))])
    push = torch.randn_like(exact)
    (out.float() * push).sum().backward()
    (exact * push).sum().backward()
    assert relative(out, exact) < 1e-2
    for rounded, precise in zip(half, (q, k, v)):
        assert relative(rounded.grad, precise.grad) < 2e-2


def test_tensors_come_into_the_hosts_memory_through_pinned_buffers(monkeypatch):
    """Whatever their sizes are, and what is written over them afterwards does not matter."""
    monkeypatch.setattr(host, "HOP", 1 << 10)
    shapes = [(3, 1000), (), (0, 7), (256,), (257, 3)]
    tensors = [torch.randn(shape, device="cuda") for shape in shapes]
    tensors += [torch.randn(20, 30, device="cuda").t(), torch.arange(999, device="cuda").bfloat16(), torch.ones(5)]
    wanted = [tensor.cpu().clone() for tensor in tensors]
    places = [torch.full(tensor.shape, -1, dtype=tensor.dtype) for tensor in tensors]
    threads = torch.get_num_threads()
    host.copy_into(list(zip(places, tensors)), 1)
    for tensor in tensors:
        tensor.zero_()
    assert all(torch.equal(place, tensor) for place, tensor in zip(places, wanted))
    assert torch.get_num_threads() == threads


def test_what_was_begun_on_the_gpu_is_waited_for():
    big, tensor = torch.randn(8192, 8192, device="cuda"), torch.zeros(1 << 20, device="cuda")
    place = torch.empty(tensor.shape)
    host.copy_into([(place, tensor)], 1)  # its buffers are kept from here on; to pin them may wait for the GPU
    for _ in range(20):
        big = big @ big / big.norm()
    tensor += 1 + 0 * big.flatten()[: len(tensor)].nan_to_num()  # some tenths of a second from now
    host.copy_into([(place, tensor)], 1)
    assert bool((place == 1).all())


def test_compiled_recomputed_and_eager_gradients_agree():
    """In bf16 each is as far from fp32 as the others, and no farther from each other."""
    torch.manual_seed(0)
    cfg = ModelConfig(512, 256, 512, 4, 4, 2, 64)
    exact = Qwen3(cfg)
    init_weights(exact, 0)
    exact.cuda()
    half = Qwen3(cfg).cuda().bfloat16()
    half.load_state_dict(exact.state_dict())
    half.compile_blocks()
    ids = torch.randint(0, 512, (300,), device="cuda")
    positions = torch.cat([torch.arange(200), torch.arange(100)]).cuda()
    rows = torch.arange(299, device="cuda")

    def gradient_of(model, dtype):
        model.zero_grad()
        attends = packed_attention([0, 200, 300], "cuda", dtype)
        logprobs, entropy = model(ids, positions, attends, rows, ids[1:], 0.7)
        (logprobs.mean() + 0.1 * entropy.mean()).backward()
        return torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])

    reference = gradient_of(exact, torch.float32)
    found = {"compiled": gradient_of(half, torch.bfloat16)}
    half.keep = 300 * 2  # two of four blocks
    assert half.recomputed(300) == 2
    found["recomputed"] = gradient_of(half, torch.bfloat16)
    with torch.compiler.set_stance("force_eager"):
        found["eager"] = gradient_of(half, torch.bfloat16)
    for name, each in found.items():
        assert relative(each, reference) < 0.05, name
        assert relative(each, found["compiled"]) < 0.05, name


def test_bf16_on_gpu_is_near_fp32_on_cpu():
    cfg = ModelConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = Qwen3(cfg)
    init_weights(model, 0)
    ids = torch.randint(0, 512, (300,), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(200), torch.arange(100)])
    rows = torch.arange(0, 299)

    def logprobs(model, device, dtype):
        attend = packed_attention([0, 200, 300], device, dtype)
        return model(ids.to(device), positions.to(device), attend, rows.to(device), ids[1:].to(device))[0].cpu()

    with torch.no_grad():
        exact = logprobs(model, "cpu", torch.float32)
        rounded = logprobs(model.to("cuda", torch.bfloat16), "cuda", torch.bfloat16)
    assert (exact - rounded).abs().mean() < 0.02


def test_engine_on_gpu_agrees_with_the_full_forward(tiny_dir):
    """fp32 on CUDA: what the engine says of its samples is what an uncached forward says."""
    chat = load_chat(tiny_dir, "native")
    model = pretrained.load_model(tiny_dir).cuda().requires_grad_(False)
    engine = LocalEngine(model, chat.stop_ids, slots=4, max_context=512)
    try:
        prompt = [Random(0).randrange(model.cfg.vocab_size) for _ in range(80)]
        for turn in range(3):
            said = engine.generate(prompt, Sampling(1.0, 20), session="a", seed=turn)
            ids = torch.tensor([*prompt, *said.ids], device="cuda")
            rows = torch.arange(len(prompt) - 1, len(ids) - 1, device="cuda")
            attend = packed_attention([0, len(ids)], "cuda", torch.float32)
            exact, _ = model(ids, torch.arange(len(ids), device="cuda"), attend, rows, ids[rows + 1])
            assert (exact.cpu() - torch.tensor(said.logprobs)).abs().max() < 1e-3
            prompt = [*ids.tolist(), 5, 6, 7]
    finally:
        engine.close()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_grpo_over_nccl(tiny_dir, tmp_path, ranks, dtype):
    """Two steps of GRPO with fp32 masters, sharded on two, bf16 compute and an engine synced in place; and all in fp32,
    where one rank's engine samples from the trainer's own model."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    out = tmp_path / "run"
    flags = (
        f"--stage grpo --dtype {dtype} --steps 2 --tasks 8 --tasks-per-step 4 --group-size 2 --no-dynamic-sampling "
        "--lr 1e-3 --max-new-tokens 24 --updates-per-step 2 --recompute all"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*torchrun, "train.py", "--model", str(tiny_dir), "--out", str(out), *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["weight_versions"] == [1]
    # Engine and trainer both round to bf16, in different orders; stale or missing weights would be far off.
    assert all(line["drift"] < 0.05 for line in lines), [line["drift"] for line in lines]
    assert pretrained.load_model(out / "model").cfg == pretrained.read_config(tiny_dir)


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_are_broadcast_over_nccl_to_a_server_that_dies(tiny_dir, tmp_path, ranks):
    """The stand-in computes on the CPU, but what it joins, receives and leaves is a group on GPUs of its own."""
    if torch.cuda.device_count() < ranks + 1:
        pytest.skip(f"needs {ranks + 1} GPUs")
    out = tmp_path / "run"
    flags = (
        "--stage grpo --dtype bfloat16 --steps 3 --tasks 8 --tasks-per-step 4 --group-size 2 --no-dynamic-sampling "
        f"--no-screen --lr 1e-3 --max-new-tokens 16 --max-turns 3 --engine sglang --engine-gpus {ranks} --ahead 1"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*torchrun, "train.py", "--model", str(tiny_dir), "--out", str(out), *flags.split()]
    environment = {**os.environ, **FOR_THE_FAKE, "FAKE_SGLANG_DIES": "40"}
    done = subprocess.run(
        [*command, "--engine-command", FAKE_SGLANG],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is started again" in done.stdout
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["sync_drift"] < 0.05 for line in lines), lines
    assert lines[0]["staleness"] == 0 < lines[1]["staleness"]
    assert not any(line["stops"].get("engine_error") for line in lines)
