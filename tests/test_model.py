"""The model against transformers' Qwen3, the chunked LM head against the naive one, and who may look at whom."""

import copy
import math
import shutil
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

from minitau import head, pretrained
from minitau.attention import causal_sdpa, packed_attention
from minitau.head import HeadLogprobs, WeightedLogprobs
from minitau.model import ModelConfig, Qwen3, RMSNorm, init_weights, rope_tables

# (query heads, key heads, head size): grouped, one each, all on one, and head sizes that are not hidden / heads.
HEADS = [(4, 2, 16), (4, 4, 8), (6, 1, 16), (8, 2, 4)]


def random_ids(n, seed=0, vocab=SMALL["vocab_size"]):
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed))


def hidden_of(net, *sequences):
    """Hidden states (T, D) of sequences packed end to end."""
    bounds = [0]
    for ids in sequences:
        bounds.append(bounds[-1] + len(ids))
    positions = torch.cat([torch.arange(len(ids)) for ids in sequences])
    attend = packed_attention(bounds, "cpu", net.head_weight.dtype)
    return net.hidden(torch.cat(sequences), positions, attend)


def logits_of(net, *sequences):
    return net.logits(hidden_of(net, *sequences))


def loss_of(net, sequences, temperature=1.0):
    """A loss that every row's log-probability and entropy goes into, each with a weight of its own."""
    bounds = [0]
    for ids in sequences:
        bounds.append(bounds[-1] + len(ids))
    ids = torch.cat(sequences)
    positions = torch.cat([torch.arange(len(each)) for each in sequences])
    predict = torch.cat([torch.arange(a, b - 1) for a, b in pairwise(bounds)])
    attend = packed_attention(bounds, "cpu", torch.float32)
    logprobs, entropy = net(ids, positions, attend, predict, ids[predict + 1], temperature)
    # The weight of a row depends on its token alone, so that packing cannot change it.
    weight = torch.cos(ids[predict].float())
    return (weight * logprobs + 0.3 * weight.square() * entropy).sum()


def gradients(net):
    found = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    return found


def assert_same_gradients(first, second, error=1e-5):
    """Relative to the largest entry of each parameter's gradient; and no gradient may be zero throughout."""
    assert first.keys() == second.keys()
    for name in first:
        scale = first[name].abs().max()
        assert scale > 0, name
        assert (first[name] - second[name]).abs().max() <= error * scale, name


# -- parity with transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_loads_what_transformers_saves(tmp_path, heads, tied, sharded):
    torch.manual_seed(0)
    shape = dict(zip(("num_attention_heads", "num_key_value_heads", "head_dim"), heads))
    settings = {**SMALL, **shape, "rms_norm_eps": 1e-3}  # an epsilon that is seen if it is not used
    theta = settings.pop("rope_theta")
    theirs = Qwen3ForCausalLM(
        Qwen3Config(**settings, rope_parameters={"rope_type": "default", "rope_theta": theta}, tie_word_embeddings=tied)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # logits of some size, and norms that are not all one
            parameter.mul_(6.0) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == sharded
    ours = pretrained.load_model(tmp_path)
    assert ours.cfg == ModelConfig(**{**SMALL, **shape, "rms_norm_eps": 1e-3, "tie_word_embeddings": tied})
    ids = random_ids(40)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        found = logits_of(ours, ids)
    assert expected.std() > 0.5  # a comparison of zeros would prove nothing
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_loads_what_we_save(tmp_path, monkeypatch, tied, sharded):
    if sharded:
        monkeypatch.setattr(pretrained, "SHARD_BYTES", 20_000)
    ours = small_model(tie_word_embeddings=tied, rms_norm_eps=1e-3)
    pretrained.save_model(tmp_path, ours.cfg, ours.named_parameters(), torch.float32, tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if sharded:
        assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        assert len(files) > 2
    else:
        assert files == ["model.safetensors"]
    assert not list(tmp_path.glob("*.tmp"))
    theirs, report = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.tie_word_embeddings == tied
    ids = random_ids(40)
    with torch.no_grad():
        expected = theirs.eval()(ids[None]).logits[0]
        found = logits_of(ours, ids)
        again = logits_of(pretrained.load_model(tmp_path), ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert torch.equal(found, again)


def test_gradients_equal_those_of_transformers(tmp_path):
    """The values could agree and a detach could still hide in our code."""
    ours = small_model()
    pretrained.save_model(tmp_path, ours.cfg, ours.named_parameters(), torch.float32, tmp_path)
    theirs = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = random_ids(30)
    loss_of(ours, [ids]).backward()
    log_p = theirs(ids[None]).logits[0, :-1].log_softmax(-1)
    weight = torch.cos(ids[:-1].float())
    logprobs = log_p.gather(1, ids[1:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    (weight * logprobs + 0.3 * weight.square() * entropy).sum().backward()
    assert_same_gradients(gradients(theirs), gradients(ours), error=1e-4)


# -- packing and causality ---------------------------------------------------------------------------------


def test_packed_equals_separate():
    net = small_model()
    sequences = [random_ids(n, seed=n) for n in (7, 2, 19, 3)]
    with torch.no_grad():
        packed = logits_of(net, *sequences)
        separate = torch.cat([logits_of(net, ids) for ids in sequences])
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5)
    whole = loss_of(net, sequences, temperature=0.8)
    whole.backward()
    together = gradients(net)
    parts = [loss_of(net, [ids], temperature=0.8) for ids in sequences]
    for part in parts:
        part.backward()
    torch.testing.assert_close(whole, sum(parts))
    assert_same_gradients(together, gradients(net))


def test_a_single_token_is_a_sequence():
    net = small_model()
    one, rest = random_ids(1), random_ids(6, seed=1)
    with torch.no_grad():
        packed = logits_of(net, one, rest)
        torch.testing.assert_close(packed[:1], logits_of(net, one), rtol=0, atol=1e-5)
        torch.testing.assert_close(packed[1:], logits_of(net, rest), rtol=0, atol=1e-5)


@pytest.mark.parametrize("changed", [0, 1, 8, 14, 15])
def test_nothing_looks_ahead_or_across_sequences(changed):
    """Another token at one position changes nothing before it and nothing in the other sequence."""
    net = small_model()
    first, second = random_ids(16), random_ids(9, seed=1)
    other = first.clone()
    other[changed] = (other[changed] + 1) % SMALL["vocab_size"]
    with torch.no_grad():
        before, after = logits_of(net, first, second), logits_of(net, other, second)
    assert torch.equal(before[:changed], after[:changed])
    assert torch.equal(before[16:], after[16:])
    # From there on every position sees it: the mask does not hide too much either.
    assert ((before[changed:16] - after[changed:16]).abs().amax(-1) > 1e-4).all()


def test_gradient_of_one_position_reaches_no_later_token():
    net = small_model()
    ids = random_ids(12)
    x = net.model.embed_tokens(ids).detach().requires_grad_()
    attends = packed_attention([0, 12], "cpu", torch.float32)
    cos, sin = rope_tables(torch.arange(12), net.cfg.head_dim, net.cfg.rope_theta)
    out, more = x, torch.zeros_like(x)
    for block, attend in zip(net.model.layers, attends):
        out, more = block(out, more, cos, sin, attend)
    (out + more)[5].sum().backward()
    reached = x.grad.abs().amax(-1) > 0
    assert reached.tolist() == [True] * 6 + [False] * 6


@pytest.mark.parametrize("new", [1, 3, 11, 12])
def test_attention_of_the_last_positions_is_the_tail_of_the_whole(new):
    """What the engine's prefill relies on: queries are the last ones, keys and values are all."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(12, heads, 8, generator=generator) for heads in (4, 2, 2))
    whole = causal_sdpa(q, k, v)
    torch.testing.assert_close(causal_sdpa(q[-new:], k, v), whole[-new:])
    # The definition, position by position; heads 0 and 1 share key head 0.
    for t in (0, 5, 11):
        scores = torch.einsum("hd,shd->hs", q[t], k[: t + 1].repeat_interleave(2, 1)) / math.sqrt(8)
        expected = torch.einsum("hs,shd->hd", scores.softmax(-1), v[: t + 1].repeat_interleave(2, 1))
        torch.testing.assert_close(whole[t], expected)


def test_an_empty_sequence_is_refused():
    with pytest.raises(AssertionError, match="empty sequence"):
        packed_attention([0, 3, 3], "cpu", torch.float32)


# -- the LM head ---------------------------------------------------------------------------------------------


def head_inputs(n, vocab=29, hidden=8):
    generator = torch.Generator().manual_seed(n)
    states = torch.randn(n, hidden, generator=generator)
    weight = torch.randn(vocab, hidden, generator=generator)
    targets = torch.randint(vocab, (n,), generator=generator)
    return states, weight, targets, torch.randn(n, generator=generator), torch.randn(n, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("n", [1, 4, 5, 13, 15])
def test_head_equals_naive_log_softmax(monkeypatch, n, temperature):
    """Values and gradients against autograd in float64. Ours is fp32 inside by design, so gradcheck is not for it."""
    monkeypatch.setitem(head.LOGITS, "cpu", 5 * 29)  # below, at, above and at a multiple of the chunk
    states, weight, targets, pull, pull_entropy = head_inputs(n)
    states64, weight64 = states.double().requires_grad_(), weight.double().requires_grad_()
    log_p = (states64 @ weight64.T / temperature).log_softmax(-1)
    logprobs64, entropy64 = log_p[torch.arange(n), targets], -(log_p.exp() * log_p).sum(-1)
    (pull.double() @ logprobs64 + pull_entropy.double() @ entropy64).backward()

    states, weight = states.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = HeadLogprobs.apply(states, weight, targets, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, logprobs64.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, entropy64.float(), rtol=1e-5, atol=1e-5)
    (pull @ logprobs + pull_entropy @ entropy).backward()
    torch.testing.assert_close(states.grad, states64.grad.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, weight64.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output", [0, 1], ids=["logprob", "entropy"])
def test_head_gradient_when_only_one_output_is_used(output):
    states, weight, targets, pull, _ = head_inputs(9)
    mine, naive = (
        (states.clone().requires_grad_(), weight.clone().requires_grad_()),
        (states.clone().requires_grad_(), weight.clone().requires_grad_()),
    )
    (pull @ HeadLogprobs.apply(*mine, targets, 0.9)[output]).backward()
    log_p = (naive[0] @ naive[1].T / 0.9).log_softmax(-1)
    (pull @ (log_p[torch.arange(9), targets], -(log_p.exp() * log_p).sum(-1))[output]).backward()
    for a, b in zip(mine, naive):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 4, 13])
def test_a_weighted_sum_is_that_of_the_log_probabilities(monkeypatch, n, dtype):
    """Its gradient too, by a factor that comes later; what it gives for show has none."""
    monkeypatch.setitem(head.LOGITS, "cpu", 5 * 29)
    states, weight, targets, pull, _ = head_inputs(n)
    found, expected = ([x.to(dtype).requires_grad_() for x in (states, weight)] for _ in range(2))
    total, logprobs, entropy = WeightedLogprobs.apply(*found, targets, pull, 0.7)
    naive, entropy_too = HeadLogprobs.apply(*expected, targets, 0.7)
    assert torch.equal(logprobs, naive) and torch.equal(entropy, entropy_too)
    assert torch.equal(total, (pull * naive).sum()) and not (logprobs.requires_grad or entropy.requires_grad)
    (-3 * total).backward()
    (-3 * (pull * naive).sum()).backward()
    for mine, theirs in zip(found, expected):
        assert mine.grad.dtype == dtype
        assert (mine.grad - theirs.grad).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * theirs.grad.norm()
    with torch.no_grad():
        assert torch.equal(WeightedLogprobs.apply(*found, targets, pull, 0.7)[0], total)


def test_head_survives_logits_of_any_size():
    """Logits of some hundreds: exp of one of them is infinite, the log-probabilities are not."""
    states, weight, targets, _, _ = head_inputs(6)
    states = (200 * states).requires_grad_()
    logprobs, entropy = HeadLogprobs.apply(states, weight, targets, 1.0)
    (logprobs + entropy).sum().backward()
    assert logprobs.isfinite().all() and (entropy >= -1e-4).all()
    assert states.grad.isfinite().all()
    torch.testing.assert_close(logprobs, (states @ weight.T).log_softmax(-1)[torch.arange(6), targets])


def test_head_without_a_row():
    states, weight, targets, _, _ = head_inputs(3)
    states, weight = states[:0].requires_grad_(), weight.requires_grad_()
    logprobs, entropy = HeadLogprobs.apply(states, weight, targets[:0], 1.0)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == (0,) and weight.grad.abs().max() == 0


def test_head_in_bfloat16():
    """Gradients come in the weights' type; the values are off by the rounding of the logits alone."""
    states, weight, targets, pull, _ = head_inputs(9)
    low_states, low_weight = states.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    logprobs, entropy = HeadLogprobs.apply(low_states, low_weight, targets, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    rounded = (low_states @ low_weight.T).float().log_softmax(-1)
    torch.testing.assert_close(logprobs, rounded[torch.arange(9), targets], rtol=1e-5, atol=1e-5)
    (pull @ logprobs).backward()
    assert low_states.grad.dtype == low_weight.grad.dtype == torch.bfloat16
    exact_states, exact_weight = states.requires_grad_(), weight.requires_grad_()
    (pull @ HeadLogprobs.apply(exact_states, exact_weight, targets, 1.0)[0]).backward()
    for low, exact in ((low_states.grad, exact_states.grad), (low_weight.grad, exact_weight.grad)):
        assert (low.float() - exact).norm() < 0.03 * exact.norm()


class Allocations(TorchDispatchMode):
    """The shape of every tensor that any operation returns, forward and backward."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.shapes |= {tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
        return out


def test_no_tensor_of_predictions_times_vocabulary(monkeypatch):
    """Forward and backward of the whole model: whatever has the vocabulary in its shape is small."""
    monkeypatch.setitem(head.LOGITS, "cpu", 8 * SMALL["vocab_size"])
    vocab, hidden = SMALL["vocab_size"], SMALL["hidden_size"]  # 97 stands for nothing else
    net = small_model()
    ids = random_ids(60)
    with Allocations() as seen:
        loss_of(net, [ids]).backward()
    with_vocab = {shape for shape in seen.shapes if vocab in shape}
    assert (8, vocab) in with_vocab and (vocab, hidden) in with_vocab
    allowed = {(rows, vocab) for rows in range(1, 9)} | {(vocab, rows) for rows in range(1, 9)}
    assert with_vocab <= allowed | {(vocab, hidden), (hidden, vocab), (vocab,)}
    # The recorder would have seen it: the naive way makes one, forward and backward.
    with Allocations() as seen:
        logits_of(net, ids).log_softmax(-1).sum().backward()
    assert (60, vocab) in seen.shapes


def test_only_predicted_rows_meet_the_head():
    net = small_model()
    ids = random_ids(50)
    rows = torch.tensor([3, 17, 48])
    attend = packed_attention([0, 50], "cpu", torch.float32)
    with Allocations() as seen, torch.no_grad():
        logprobs, entropy = net(ids, torch.arange(50), attend, rows, ids[rows + 1], 0.7)
    assert {shape for shape in seen.shapes if SMALL["vocab_size"] in shape} == {(3, 97), (32, 97)}
    with torch.no_grad():
        log_p = (logits_of(net, ids)[rows] / 0.7).log_softmax(-1)
    torch.testing.assert_close(logprobs, log_p.gather(1, ids[rows + 1][:, None])[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-4)


# -- memory, precision, initial weights ------------------------------------------------------------------------


def test_recomputing_changes_memory_only():
    sequences = [random_ids(n, seed=n) for n in (9, 14)]
    plain = small_model()
    saving = Qwen3(plain.cfg, keep=0)
    saving.load_state_dict(plain.state_dict())
    runs = []
    for block in saving.model.layers:
        block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    losses = [loss_of(net, sequences) for net in (plain, saving)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert_same_gradients(gradients(plain), gradients(saving), error=0.0)
    assert len(runs) == 2 * SMALL["num_hidden_layers"]  # each block once forward, once again in backward
    with torch.no_grad():
        loss_of(saving, sequences)
    assert len(runs) == 3 * SMALL["num_hidden_layers"]


def test_bfloat16_runs_on_a_cpu():
    exact = small_model(scale=3.0)
    low = small_model(scale=3.0).to(torch.bfloat16)
    sequences = [random_ids(n, seed=n) for n in (9, 14)]
    with torch.no_grad():
        expected, found = logits_of(exact, *sequences), logits_of(low, *sequences)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()
    ids = torch.cat(sequences)
    attend = packed_attention([0, 9, 23], "cpu", torch.bfloat16)
    positions = torch.cat([torch.arange(9), torch.arange(14)])
    logprobs, entropy = low(ids, positions, attend, torch.arange(22), ids[1:])
    assert logprobs.dtype == entropy.dtype == torch.float32
    (logprobs.sum() + entropy.sum()).backward()
    for name, gradient in gradients(low).items():
        assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all() and gradient.abs().max() > 0, name


def bf16_logprobs_of(net, ids):
    attend = packed_attention([0, len(ids)], "cpu", torch.bfloat16)
    return net(ids, torch.arange(len(ids)), attend, torch.arange(len(ids) - 1), ids[1:])[0]


@pytest.mark.parametrize("tied", [True, False])
def test_bf16_compute_over_fp32_weights_is_that_of_bf16_weights(tied):
    """Bit for bit, also after a weight has changed: what was rounded for one forward serves no other."""
    masters, ids, found = small_model(scale=50.0, tie_word_embeddings=tied), random_ids(40), None
    masters.dtype = torch.bfloat16
    for name, parameter in (("", None), *masters.named_parameters()):
        before = found
        with torch.no_grad():
            if parameter is not None:
                parameter.normal_()
            halves = copy.deepcopy(masters).bfloat16()
            found = bf16_logprobs_of(masters, ids)
            assert torch.equal(found, bf16_logprobs_of(halves, ids)), name
        assert before is None or not torch.equal(before, found), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_a_compiled_norm_rounds_its_weight():
    """The compiler would fuse the rounding away, and train with norms that no engine has."""
    norm, x = RMSNorm(64, 1e-6), torch.randn(50, 64).bfloat16()
    with torch.no_grad():
        norm.weight += 0.1 * torch.randn(64)
    rough = copy.deepcopy(norm).bfloat16()
    found = torch.compile(norm)(x)
    assert (found != rough(x)).float().mean() < 0.01  # the mean adds up in another order
    x32 = x.float()
    unrounded = (norm.weight * x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert (found != unrounded).float().mean() > 0.05
    found.float().sum().backward()
    rough(x).float().sum().backward()
    torch.testing.assert_close(norm.weight.grad, rough.weight.grad.float(), rtol=0.02, atol=0.02)
    assert norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("keep", [math.inf, 0.0])
def test_gradients_of_bf16_compute_add_up_in_fp32(keep):
    masters = small_model(scale=50.0, tie_word_embeddings=False)
    halves = copy.deepcopy(masters).bfloat16()
    masters.dtype, masters.keep, ids = torch.bfloat16, keep, random_ids(40)
    sums = {name: 0.0 for name, _ in halves.named_parameters()}
    for weight in (1.0, -0.25, 3.0):
        for net in (masters, halves):
            (weight * bf16_logprobs_of(net, ids).sum()).backward()
        for name, gradient in gradients(halves).items():
            sums[name] = sums[name] + gradient.float()
        halves.zero_grad(set_to_none=True)
    for name, parameter in masters.named_parameters():
        assert parameter.grad.dtype == torch.float32
        if name in ("lm_head.weight", "model.embed_tokens.weight"):  # of which even the sum over rows is fp32
            assert (parameter.grad - sums[name]).norm() < 0.01 * sums[name].norm()
        else:
            assert torch.equal(parameter.grad, sums[name]), name
        assert parameter.grad.abs().max() > 0, name


def test_rope_depends_on_differences_of_positions_only():
    """Shifting all positions changes no logit, so a packed position that is off by a constant would not be seen;
    stretching them does."""
    net = small_model()
    ids = random_ids(20)
    attend = packed_attention([0, 20], "cpu", torch.float32)
    with torch.no_grad():
        at_zero, shifted, stretched = (
            net.logits(net.hidden(ids, positions, attend))
            for positions in (torch.arange(20), torch.arange(20) + 33, 2 * torch.arange(20))
        )
    torch.testing.assert_close(at_zero, shifted, rtol=0, atol=1e-3)
    assert (at_zero - stretched).abs().max() > 0.1


def test_initial_weights_repeat_and_are_those_of_hugging_face():
    cfg = ModelConfig(**{**SMALL, "tie_word_embeddings": False})
    first, second, other = Qwen3(cfg), Qwen3(cfg), Qwen3(cfg)
    for net, seed in ((first, 3), (second, 3), (other, 4)):
        init_weights(net, seed)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters()):
        assert torch.equal(a, b), name
        if a.ndim == 1:
            assert (a == 1).all(), name
        else:
            assert not torch.equal(a, c), name
            assert abs(a.std() - 0.02) < 0.003 and abs(a.mean()) < 0.003, name


def test_names_and_sizes_are_those_of_transformers():
    """Also of the model that is trained for real: 4.02e9 parameters, counted without making them."""
    with torch.device("meta"):
        ours, theirs = Qwen3(ModelConfig()), Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, **real_shape()))
    assert {name: p.shape for name, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert sum(p.numel() for p in ours.parameters()) == pytest.approx(4.02e9, rel=0.002)


def real_shape():
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: getattr(ModelConfig(), name) for name in (*names, "num_key_value_heads", "head_dim")}


def test_logits_are_linear_in_the_head_weight():
    """tied: the head is the embedding itself, not a copy; untied: its own matrix."""
    tied, untied = small_model(), small_model(tie_word_embeddings=False)
    assert tied.head_weight is tied.model.embed_tokens.weight
    assert untied.head_weight is untied.lm_head.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    states = torch.randn(3, SMALL["hidden_size"])
    torch.testing.assert_close(untied.logits(states), F.linear(states, untied.lm_head.weight))
