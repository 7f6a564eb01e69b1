"""GRPO's mathematics, with the arithmetic written out; and that cutting a batch up changes no gradient."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import SMALL, small_model, trajectory

import train
from minitau import batch, config, grpo
from minitau.attention import packed_attention
from minitau.curriculum import Curriculum
from minitau.episode import EpisodeError, Stop, Task

LN2 = math.log(2)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, error=1e-9):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=error, atol=error)


# -- advantages ----------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards = tensor([1.0, 0.0, 0.0, 1.0], [1.0, 0.25, 0.25, 0.5])
    everyone = torch.ones(2, 4, dtype=torch.bool)
    # Row 0: mean 2/4 = .5, differences .5, -.5, -.5, .5.
    # Row 1: mean 2/4 = .5, differences .5, -.25, -.25, 0.
    centred = [[0.5, -0.5, -0.5, 0.5], [0.5, -0.25, -0.25, 0.0]]
    close(grpo.advantages(rewards, everyone, divide_by_std=False), centred)
    # Sample standard deviations, over G - 1 = 3: row 0 sqrt(4 * .25 / 3) = sqrt(1/3);
    # row 1 sqrt((.25 + .0625 + .0625) / 3) = sqrt(.125).
    std0, std1 = math.sqrt(1 / 3), math.sqrt(0.125)
    divided = [[d / std0 for d in centred[0]], [d / std1 for d in centred[1]]]
    found = grpo.advantages(rewards, everyone, divide_by_std=True)
    close(found, divided, error=1e-5)  # 1e-6 stands beside the standard deviation
    close(found.sum(1), [0.0, 0.0])


def test_failures_count_less():
    found = tensor([0.5, -0.5, 0.0], [-1.0, 2.0, -1.0])
    assert torch.equal(grpo.asymmetric(found, 1.0), found)
    close(grpo.asymmetric(found, 0.25), [[0.5, -0.125, 0.0], [-0.25, 2.0, -0.25]])
    close(grpo.asymmetric(found, 0.0), [[0.5, 0.0, 0.0], [0.0, 2.0, 0.0]])


def test_episodes_that_do_not_count_are_in_no_statistic():
    rewards = tensor([1.0, 0.0, 0.0, 9.0], [0.0, 7.0, 1.0, 0.0])
    counted = torch.tensor([[True, True, False, False], [True, False, True, True]])
    # Row 0: of 1 and 0 the mean is .5 and the standard deviation sqrt(2 * .25 / 1) = sqrt(.5).
    # Row 1: of 0, 1, 0 the mean is 1/3; squares 1/9 + 4/9 + 1/9 = 2/3; sqrt(2/3 / 2) = sqrt(1/3).
    close(grpo.advantages(rewards, counted, divide_by_std=False), [[0.5, -0.5, 0.0, 0.0], [-1 / 3, 0.0, 2 / 3, -1 / 3]])
    a, b = math.sqrt(0.5), math.sqrt(3)
    expected = [[0.5 / a, -0.5 / a, 0.0, 0.0], [-b / 3, 0.0, 2 * b / 3, -b / 3]]
    close(grpo.advantages(rewards, counted, divide_by_std=True), expected, error=1e-5)
    # Exactly zero, and the same as if they had never been played.
    assert (grpo.advantages(rewards, counted, divide_by_std=True)[~counted] == 0).all()
    alone = grpo.advantages(tensor([0.0, 1.0, 0.0]), torch.ones(1, 3, dtype=torch.bool), divide_by_std=True)
    assert torch.equal(alone[0], grpo.advantages(rewards, counted, divide_by_std=True)[1][counted[1]])


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_groups_that_teach_nothing(divide_by_std):
    rewards = tensor([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.5, 1.0, 0.0], [1.0, 1.0, 0.0])
    counted = torch.tensor([[True] * 3, [True] * 3, [True, False, False], [False] * 3, [True, True, False]])
    assert (grpo.advantages(rewards, counted, divide_by_std=divide_by_std) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_value_throughout_gives_zeros_whatever_it_is(dtype):
    """The mean of equal numbers may be off in its last bit, and a division by 1e-6 would make that count."""
    for value in (0.1, 0.3, 1 / 3, 0.7, 0.256, 1.15):
        for size in range(2, 17):
            rewards = torch.full((1, size), value, dtype=dtype)
            found = grpo.advantages(rewards, torch.ones_like(rewards, dtype=torch.bool), divide_by_std=True)
            assert found.abs().max() < 1e-6, (value, size)


# -- the weight of a token -----------------------------------------------------------------------------------


def test_token_weights_by_hand():
    said = torch.tensor([1, 3])
    close(grpo.token_weights(said, "token-mean", max_tokens=10), [1 / 4, 1 / 4], 1e-6)
    close(grpo.token_weights(said, "sequence-mean", max_tokens=10), [1 / 2, 1 / 6], 1e-6)  # 1/2 * 1/1, 1/2 * 1/3
    close(grpo.token_weights(said, "dr-grpo", max_tokens=10), [1 / 20, 1 / 20], 1e-6)  # 1 / (2 * 10)
    # What the three mean: all weights of a batch sum to one; dr-grpo's to the share of the context that was used.
    for name in ("token-mean", "sequence-mean"):
        assert float(grpo.token_weights(said, name, max_tokens=10) @ said.float()) == pytest.approx(1.0)
    assert float(grpo.token_weights(said, "dr-grpo", max_tokens=10) @ said.float()) == pytest.approx(4 / 20)


def test_token_weights_of_a_trajectory_without_a_word():
    said = torch.tensor([0, 2])
    for name in grpo.AGGREGATIONS:
        assert grpo.token_weights(said, name, max_tokens=10).isfinite().all()
    close(grpo.token_weights(said, "token-mean", max_tokens=10), [1 / 2, 1 / 2])
    assert float(grpo.token_weights(said, "sequence-mean", max_tokens=10)[1]) == pytest.approx(1 / 4)
    assert grpo.token_weights(torch.tensor([0]), "token-mean", max_tokens=10).isfinite().all()


def test_token_weights_of_an_unknown_name():
    with pytest.raises(ValueError, match="token-mean, sequence-mean, dr-grpo"):
        grpo.token_weights(torch.tensor([1]), "mean", max_tokens=10)
    field = {f.name: f for f in config.dataclasses.fields(config.GRPO)}["aggregation"]
    assert field.metadata["choices"] == grpo.AGGREGATIONS  # what the command line offers is what there is


# -- the engine's rounding -----------------------------------------------------------------------------------


def test_importance_is_truncated_from_above_only():
    old = tensor(-1.0, -1.0, -1.0, -1.0).requires_grad_()
    rollout = tensor(-1.0, -1.0 - math.log(1.5), -1.0 - math.log(3), -1.0 + math.log(5))
    weight = grpo.truncated_importance(old, rollout, 2.0)
    close(weight, [1.0, 1.5, 2.0, 0.2])  # ratios 1, 1.5, 3 (capped) and 1/5
    assert not weight.requires_grad  # a correction, not a way for the gradient
    # Far enough out exp overflows; the cap still holds.
    close(grpo.truncated_importance(tensor(0.0), tensor(-2000.0), 2.0), [2.0])


def test_sequence_mask_by_hand():
    # Trajectory 0: ratios 4 and 1/2, geometric mean sqrt(2) = 1.41: in, although one ratio alone is out.
    # Trajectory 1: ratios 2.1, 2.1: out above. Trajectory 2: 1/2 and 1/3, mean sqrt(1/6) = .41: out below.
    # Trajectory 3: one ratio .51: in. Their tokens stand interleaved.
    ratios = tensor(4.0, 2.1, 1 / 2, 0.5, 2.1, 0.51, 1 / 3)
    sequence = torch.tensor([0, 1, 2, 0, 1, 3, 2])
    rollout = tensor(-1.0, -2.0, -0.5, -0.1, -3.0, -1.5, -4.0)
    mask = grpo.sequence_mask(rollout + ratios.log(), rollout, sequence, 0.5, 2.0)
    assert mask.tolist() == [1, 0, 0, 1, 0, 1, 0]
    assert mask.dtype == torch.float64
    # An arithmetic mean would have let trajectory 0 through as well, but not this one: 4 and 1/8 are sqrt(1/2) = .71.
    assert grpo.sequence_mask(tensor(4.0, 1 / 8).log(), tensor(0.0, 0.0), torch.tensor([0, 0]), 0.7, 2.0).all()
    assert not grpo.sequence_mask(tensor(4.0, 1 / 8).log(), tensor(0.0, 0.0), torch.tensor([0, 0]), 0.72, 2.0).any()


def test_sequence_mask_of_nothing():
    assert grpo.sequence_mask(tensor(), tensor(), torch.tensor([], dtype=torch.long), 0.5, 2.0).shape == (0,)


# -- the loss ------------------------------------------------------------------------------------------------

# ratio, advantage -> loss, gradient in log pi, clipped. The bounds are .8 and 1.28 as in the seed.
# min(r A, clip(r) A) follows r where the step was not yet taken too far, and is flat where it was.
CLIPPING = {
    "on policy": (1.0, 2.0, -2.0, -2.0, False),  # -A; gradient -r A
    "inside": (1.2, 2.0, -2.4, -2.4, False),
    "too far up, to be pushed up": (1.5, 2.0, -2.56, 0.0, True),  # -1.28 * 2
    "too far down, to be pushed up": (0.5, 2.0, -1.0, -1.0, False),  # the way back is open
    "inside, to be pushed down": (0.9, -2.0, 1.8, 1.8, False),
    "too far down, to be pushed down": (0.5, -2.0, 1.6, 0.0, True),  # .8 * 2
    "too far up, to be pushed down": (1.5, -2.0, 3.0, 3.0, False),
    "no advantage": (1.5, 0.0, 0.0, 0.0, False),
}


@pytest.mark.parametrize("case", CLIPPING)
def test_clipping_and_its_gradient(case):
    ratio, advantage, loss, gradient, clipped = CLIPPING[case]
    old = tensor(-0.7)
    logprobs = (old + math.log(ratio)).requires_grad_()
    found, flags = grpo.policy_loss(logprobs, old, tensor(advantage), clip_low=0.2, clip_high=0.28)
    close(found, [loss])
    assert flags.tolist() == [clipped]
    found.sum().backward()
    close(logprobs.grad, [gradient])


def test_policy_loss_on_policy_has_the_gradient_of_reinforce():
    """With old = current (detached) the loss's value is -A, its gradient -A d log pi."""
    logprobs, advantages = tensor(-1.0, -2.0, -0.1).requires_grad_(), tensor(1.0, -0.5, 0.0)
    found, flags = grpo.policy_loss(logprobs, logprobs.detach(), advantages, clip_low=0.2, clip_high=0.28)
    close(found, [-1.0, 0.5, 0.0])
    found.sum().backward()
    close(logprobs.grad, [-1.0, 0.5, 0.0])
    assert not flags.any()


def test_k3_by_hand():
    # d = log reference - log pi: 0, ln 2, -ln 2. exp(d) - d - 1: 0, 2 - ln 2 - 1, 1/2 + ln 2 - 1.
    logprobs = tensor(-1.0, -1.0, -1.0).requires_grad_()
    found = grpo.k3(logprobs, tensor(-1.0, -1.0 + LN2, -1.0 - LN2))
    close(found, [0.0, 1 - LN2, LN2 - 0.5])
    found.sum().backward()
    close(logprobs.grad, [0.0, -1.0, 0.5])  # 1 - exp(d): towards the reference, zero at it


def test_k3_is_never_negative_and_right_on_average():
    generator = torch.Generator().manual_seed(0)
    pi, reference = (torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    each = grpo.k3(pi, reference)
    assert (each >= 0).all()
    assert float(pi.exp() @ each) == pytest.approx(float(pi.exp() @ (pi - reference)))  # the expectation under pi is KL
    noise = 1e-7 * torch.randn(1000, generator=generator)  # float32, where exp(d) - d - 1 cancels
    assert (grpo.k3(torch.zeros(1000), noise) >= -1e-6).all()


# -- a batch, whole and in pieces ----------------------------------------------------------------------------

CFG = config.GRPO(
    temperature=0.8, entropy=0.01, kl=0.05, clip_low=0.2, clip_high=0.28, max_tokens=64, importance_cap=1.1
)


def group_of(rewards, first, stops=None):
    """Random episodes of one task, some of what they hold said by the agent; the first token never is."""
    episodes = []
    for i, reward in enumerate(rewards):
        generator = torch.Generator().manual_seed(first + i)
        n = int(torch.randint(5, 24, (1,), generator=generator))
        ids = torch.randint(SMALL["vocab_size"], (n,), generator=generator).tolist()
        said = [False, *(torch.rand(n - 1, generator=generator) < 0.5).tolist()]
        said[-1] = True
        stop = stops[i] if stops else Stop.USER_STOP
        episodes.append(trajectory(ids, said, reward=reward, task=str(first), sample=i, stop=stop))
    return episodes, list(rewards)


def full_logits(net, ids):
    attend = packed_attention([0, len(ids)], "cpu", torch.float32)
    return net.logits(net.hidden(torch.tensor(ids), torch.arange(len(ids)), attend)).double()


def scored_groups(net):
    """Three groups whose sampler was `net` with some noise; one trajectory came from elsewhere, one does not count."""
    stops = [Stop.USER_STOP, Stop.ENV_ERROR, Stop.MAX_TURNS]
    groups = [
        group_of([1.0, 0.0, 0.0], first=10),
        group_of([1.0, 0.0, 0.25], first=20, stops=stops),
        group_of([0.0, 1.0, 1.0], first=30),
    ]
    for number, episode in enumerate(e for group, _ in groups for e in group):
        generator = torch.Generator().manual_seed(100 + number)
        with torch.no_grad():
            log_p = (full_logits(net, episode.ids) / CFG.temperature).log_softmax(-1)
        for t in range(1, len(episode.ids)):
            noise = 0.1 * float(torch.randn(1, generator=generator)) - (2.0 if number == 2 else 0.0)
            episode.logprobs[t] = float(log_p[t - 1, episode.ids[t]]) + noise if episode.said[t] else 0.0
    return groups


def loss_by_hand(net, old, reference, samples, aggregation):
    """The loss as the papers write it: one trajectory and one token at a time, over dense logits in float64."""
    said = [sum(sample.trajectory.said) for sample in samples]
    total = 0.0
    for sample, n in zip(samples, said):
        episode = sample.trajectory
        now = (full_logits(net, episode.ids) / CFG.temperature).log_softmax(-1)
        with torch.no_grad():
            before, ref = (
                (full_logits(each, episode.ids) / CFG.temperature).log_softmax(-1) for each in (old, reference)
            )
        tokens = [t for t in range(1, len(episode.ids)) if episode.said[t]]
        drift = sum(float(before[t - 1, episode.ids[t]]) - episode.logprobs[t] for t in tokens) / n
        near = CFG.sequence_low <= math.exp(drift) <= CFG.sequence_high
        weight = {"token-mean": 1 / sum(said), "sequence-mean": 1 / len(said) / n, "dr-grpo": 1 / len(said) / 64}
        for t in tokens:
            token = episode.ids[t]
            ratio = (now[t - 1, token] - before[t - 1, token]).exp()
            importance = min(math.exp(float(before[t - 1, token]) - episode.logprobs[t]), CFG.importance_cap)
            surrogate = torch.min(ratio * sample.advantage, ratio.clamp(0.8, 1.28) * sample.advantage)
            entropy = -(now[t - 1].exp() * now[t - 1]).sum()
            delta = ref[t - 1, token] - now[t - 1, token]
            k3 = delta.exp() - delta - 1
            loss = -surrogate * importance * near - CFG.entropy * entropy + CFG.kl * k3
            total = total + weight[aggregation] * loss
    return total


def drifts_by_hand(old, samples):
    """The trainer's log-probability minus the sampler's, of each token said."""
    drifts = []
    for sample in samples:
        episode = sample.trajectory
        with torch.no_grad():
            before = (full_logits(old, episode.ids) / CFG.temperature).log_softmax(-1)
        said = [t for t in range(1, len(episode.ids)) if episode.said[t]]
        drifts += [float(before[t - 1, episode.ids[t]]) - episode.logprobs[t] for t in said]
    return drifts


def run_batch(net, old, reference, samples, cfg, budget, world_size):
    """Loss, gradients and logged sums of a batch, cut into micro-batches for `world_size` ranks, one after another."""
    net.zero_grad()
    loss, sums, n_batches = 0.0, {}, 0
    for rank in range(world_size):
        mbs = batch.micro_batches(samples, budget=budget, rank=rank, world_size=world_size, device="cpu")
        for mb in mbs:
            n_batches += 1
            mb = train.score(reference, mb, cfg, "reference_N")
            mb = train.score(old, mb, cfg, "old_N") if old is not None else mb
            part, shown = train.grpo_loss(net, mb, cfg)
            part.backward()
            loss += float(part.detach())
            for name, value in shown.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
    return loss, [parameter.grad.clone() for parameter in net.parameters()], sums, n_batches


def relative_error(found, expected):
    """L2 distance of two lists of gradients over the length of the second."""
    difference = sum(float((a - b).double().square().sum()) for a, b in zip(found, expected))
    return math.sqrt(difference / sum(float(b.double().square().sum()) for b in expected))


@pytest.fixture(scope="module")
def policies():
    """The current policy, the one before this batch's updates, and the reference; each a bit off the next."""
    net, old, reference = (small_model(scale=4.0) for _ in range(3))
    with torch.no_grad():
        for other, size in ((old, 0.01), (reference, 0.03)):
            generator = torch.Generator().manual_seed(5)
            for parameter in other.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return net, old, reference


@pytest.mark.parametrize("aggregation", grpo.AGGREGATIONS)
def test_the_loss_is_that_of_the_papers_in_any_cut(policies, aggregation):
    net, old, reference = policies
    cfg = replace(CFG, aggregation=aggregation)
    samples = train.weigh(cfg, scored_groups(old))
    assert len(samples) == 8  # nine episodes were played, one of them broke on our side
    net.zero_grad()
    expected = loss_by_hand(net, old, reference, samples, aggregation)
    expected.backward()
    expected_gradients = [parameter.grad.clone() for parameter in net.parameters()]
    lengths = [len(sample.trajectory.ids) for sample in samples]
    cuts = [(10_000, 1), (max(lengths), 1), (2 * max(lengths), 1), (10_000, 2), (max(lengths), 3), (10_000, 11)]
    first_sums, sizes = None, []
    for budget, world_size in cuts:
        loss, gradients, sums, n = run_batch(net, old, reference, samples, cfg, budget, world_size)
        sizes.append(n)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        assert relative_error(gradients, expected_gradients) < 1e-5
        first_sums = first_sums or sums
        assert sums == pytest.approx(first_sums, rel=1e-4, abs=1e-5)
    assert sizes[0] == 1 and sizes[1] >= 4 and sizes[-1] == 11  # the last has three ranks without a trajectory
    # Every part of the loss was at work.
    tokens = sum(sum(sample.trajectory.said) for sample in samples)
    assert 0 < first_sums["clip_share"] < tokens and 0 < first_sums["masked_share"] < tokens
    assert first_sums["kl"] > 0 and first_sums["entropy"] > 0
    drifts = drifts_by_hand(old, samples)  # k3 of the trainer from the sampler, whose tokens these are
    assert first_sums["drift"] == pytest.approx(sum(map(abs, drifts)), rel=1e-4)
    assert first_sums["drift_k3"] == pytest.approx(sum(math.exp(d) - d - 1 for d in drifts), rel=1e-4)


def test_gradients_of_the_cuts_agree_with_each_other_more_closely(policies):
    """Against each other, not against another formula: only the order of sums differs."""
    net, old, reference = policies
    samples = train.weigh(CFG, scored_groups(old))
    longest = max(len(sample.trajectory.ids) for sample in samples)
    _, whole, _, _ = run_batch(net, old, reference, samples, CFG, 10_000, 1)
    for budget, world_size in ((longest, 1), (10_000, 2), (longest, 2)):
        _, parts, _, _ = run_batch(net, old, reference, samples, CFG, budget, world_size)
        assert relative_error(parts, whole) < 2e-6


def test_without_old_the_batch_is_on_policy(policies):
    """One update a batch: old is the current policy itself, the ratio is one and nothing is clipped."""
    net, _, reference = policies
    samples = train.weigh(CFG, scored_groups(net))
    loss, gradients, sums, _ = run_batch(net, None, reference, samples, CFG, 10_000, 1)
    tokens = sum(sum(sample.trajectory.said) for sample in samples)
    assert sums["clip_share"] == 0 and sums["ratio"] == pytest.approx(tokens)
    explicit, explicit_gradients, _, _ = run_batch(net, net, reference, samples, CFG, 10_000, 1)
    assert loss == pytest.approx(explicit, rel=1e-5)
    assert relative_error(gradients, explicit_gradients) < 1e-5


def test_a_masked_trajectory_adds_no_policy_gradient(policies):
    net, old, reference = policies
    cfg = replace(CFG, entropy=0.0, kl=0.0)
    samples = train.weigh(cfg, scored_groups(old))
    _, gradients, sums, _ = run_batch(net, old, reference, samples, cfg, 10_000, 1)
    masked = samples[2]  # the one whose sampler was far away; its weight stays in everyone's denominator
    assert sums["masked_share"] == sum(masked.trajectory.said)
    others = [sample for sample in samples if sample is not masked]
    _, without, _, _ = run_batch(net, old, reference, others, cfg, 10_000, 1)
    assert relative_error(gradients, without) < 1e-6
    _, alone, _, _ = run_batch(net, old, reference, [masked], cfg, 10_000, 1)
    assert max(float(gradient.abs().max()) for gradient in alone) == 0


def test_each_coefficient_reaches_the_gradient(policies):
    """Turning one off changes the loss by exactly its own part."""
    net, old, reference = policies
    samples = train.weigh(CFG, scored_groups(old))
    loss, _, sums, _ = run_batch(net, old, reference, samples, CFG, 10_000, 1)
    tokens = sum(sum(sample.trajectory.said) for sample in samples)
    without_entropy, *_ = run_batch(net, old, reference, samples, replace(CFG, entropy=0.0), 10_000, 1)
    assert loss - without_entropy == pytest.approx(-CFG.entropy * sums["entropy"] / tokens, rel=1e-4)
    without_kl, *_ = run_batch(net, old, reference, samples, replace(CFG, kl=0.0), 10_000, 1)
    assert loss - without_kl == pytest.approx(CFG.kl * sums["kl"] / tokens, rel=1e-4)


def test_turning_off_the_cap_leaves_the_sequence_mask_alone(policies):
    """--importance-cap 0 turns the *importance weight* off; --sequence-low and --sequence-high are other flags."""
    net, old, reference = policies
    samples = train.weigh(CFG, scored_groups(old))
    _, _, sums, _ = run_batch(net, old, reference, samples, replace(CFG, importance_cap=0.0), 10_000, 1)
    assert sums["masked_share"] == sum(samples[2].trajectory.said)


# -- from groups to samples ----------------------------------------------------------------------------------


def test_weigh_keeps_order_and_drops_what_broke():
    groups = [
        group_of([1.0, 0.0, 0.0], first=1, stops=[Stop.USER_STOP, Stop.USER_STOP, Stop.USER_ERROR]),
        group_of([0.0, 0.5, 1.0], first=2),
    ]
    samples = train.weigh(replace(CFG, divide_by_std=False), groups)
    assert [(s.trajectory.task.id, s.trajectory.sample) for s in samples] == [
        *(("1", 0), ("1", 1)),
        *(("2", 0), ("2", 1), ("2", 2)),
    ]
    assert [s.advantage for s in samples] == pytest.approx([0.5, -0.5, -0.5, 0.0, 0.5])
    samples = train.weigh(replace(CFG, divide_by_std=False, negative_weight=0.2), groups)
    assert [s.advantage for s in samples] == pytest.approx([0.5, -0.1, -0.1, 0.0, 0.5])


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n", [0, 1, 5, 8])
def test_split_makes_even_pieces(n, parts):
    groups = [group_of([1.0, 0.0], first=i) for i in range(n)]
    pieces = train.split(groups, parts)
    assert sorted(episodes[0].task.id for piece in pieces for episodes, _ in piece) == [str(i) for i in range(n)]
    assert len(pieces) <= parts and all(pieces)
    assert not pieces or max(map(len, pieces)) == math.ceil(n / parts)
    if parts == 2 and n == 5:
        assert pieces == [groups[::2], groups[1::2]], "tasks that were drawn first are in both"


def test_weights_of_the_pieces_each_sum_to_one():
    """Each optimizer step is a batch of its own: its denominator is what it holds."""
    groups = [group_of([1.0, 0.0, 0.0, 1.0], first=1), group_of([1.0, 0.0, 1.0, 1.0], first=9)]
    for piece in train.split(groups, 2):
        weighted = train.weigh(CFG, piece)
        assert sum(s.weight * sum(s.trajectory.said) for s in weighted) == pytest.approx(1.0)


def test_sequences_of_a_batch_have_every_boundary(policies):
    """The pieces that the batch tests rest on: packing the same trajectories gives the same log-probabilities."""
    net, _, _ = policies
    samples = train.weigh(CFG, scored_groups(net))
    mb = batch.pack(samples, "cpu")
    with torch.no_grad():
        packed, _ = train.forward(net, mb, CFG.temperature, "float32")
    bounds = list(pairwise(mb.cu_seqlens))
    assert len(bounds) == len(samples)
    for number, sample in enumerate(samples):
        episode = sample.trajectory
        with torch.no_grad():
            log_p = (full_logits(net, episode.ids) / CFG.temperature).log_softmax(-1)
        expected = [float(log_p[t - 1, episode.ids[t]]) for t in range(1, len(episode.ids)) if episode.said[t]]
        assert packed[mb.sequence_N == number].tolist() == pytest.approx(expected, abs=1e-4)


def test_shuffled_rewards_stay_in_their_group_and_repeat():
    groups = [(group_of([1.0, 0.0, 1.0, 0.0], 0)[0], [1.25, 0.0, 1.0, 0.1]), group_of([0.0] * 4, 4)] * 8
    control = train.shuffled(groups, seed="0:1:shuffle")
    assert [group for group, _ in control] == [group for group, _ in groups], "what happened is not touched"
    assert [sorted(shaped) for _, shaped in control] == [sorted(shaped) for _, shaped in groups]
    assert control != groups and control == train.shuffled(groups, seed="0:1:shuffle")
    assert control != train.shuffled(groups, seed="0:2:shuffle")


# -- which groups make a batch ---------------------------------------------------------------------------------

TEACHES, FAILS, SOLVES, BREAKS = (1.0, 0.0), (0.0, 0.0), (1.0, 1.0), None


def drawn(monkeypatch, outcomes, tasks=12, **settings):
    """train.draw_groups where the i-th group that is played turns out as outcomes[i]: the batch, all that was played,
    what it says of it, the tasks of each round and the curriculum."""
    rounds, left = [], iter(outcomes)

    def collect(jobs, stage, *, seed, label):
        rounds.append([task.id for task, sample in jobs if sample == 0])
        played = []
        for task_id in rounds[-1]:
            rewards = next(left)
            stops = [Stop.ENV_ERROR] * 2 if rewards is None else None
            played += group_of(rewards or (0.0, 0.0), first=int(task_id), stops=stops)[0]
        return played

    monkeypatch.setattr(train.rollout, "collect", collect)
    curriculum = Curriculum([Task("desk", "train", str(i)) for i in range(tasks)], seed=0)
    cfg = config.GRPO(tasks_per_step=3, group_size=2, **settings)
    groups, played, share = train.draw_groups(cfg, 1, curriculum, None)
    assert next(left, "none") == "none", "more should have been played"
    return [group[0].task.id for group, _ in groups], played, share, rounds, curriculum


def test_tasks_are_drawn_again_for_groups_that_teach_nothing(monkeypatch):
    outcomes = [TEACHES, FAILS, BREAKS, SOLVES, TEACHES, TEACHES]
    batch_ids, played, share, rounds, curriculum = drawn(monkeypatch, outcomes)
    assert [len(ids) for ids in rounds] == [3, 2, 1], "one for each that taught nothing"
    ids = [task_id for each in rounds for task_id in each]
    assert len(set(ids)) == 6 and batch_ids == [ids[0], ids[4], ids[5]] and len(played) == 12
    assert share == {"groups": 6, "rounds": 3, "zero_variance_share": pytest.approx(2 / 5)}  # of those with a verdict
    tallies = {task_id: tuple(curriculum.tallies[f"desk/train/{task_id}"]) for task_id in ids}
    expected = {TEACHES: (1, 2), FAILS: (0, 2), SOLVES: (2, 2), BREAKS: (0, 0)}
    assert tallies == {task_id: expected[outcome] for task_id, outcome in zip(ids, outcomes)}


def test_nothing_more_is_played_once_most_of_a_step_has_broken(monkeypatch):
    with pytest.raises(EpisodeError, match="4 of 6 episodes broke on our side"):
        drawn(monkeypatch, [BREAKS, TEACHES, BREAKS])
    _, _, _, rounds, _ = drawn(monkeypatch, [TEACHES, FAILS, TEACHES, BREAKS, TEACHES])
    assert list(map(len, rounds)) == [3, 1, 1], "a round of a few says little of the world"


def test_a_batch_that_stays_short_is_filled(monkeypatch):
    """By what has a verdict first, in the order in which it was drawn."""
    batch_ids, _, share, rounds, _ = drawn(monkeypatch, [BREAKS, FAILS, SOLVES, TEACHES, BREAKS, FAILS], max_rounds=2)
    assert [len(ids) for ids in rounds] == [3, 3] and batch_ids == [rounds[0][1], rounds[0][2], rounds[1][0]]
    assert share == {"groups": 6, "rounds": 2, "zero_variance_share": pytest.approx(3 / 4)}


@pytest.mark.parametrize(
    ("outcomes", "settings", "sizes"),
    [
        ([FAILS] * 3, {"dynamic_sampling": False}, [3]),
        ([FAILS] * 4, {"tasks": 4}, [3, 1]),
        ([FAILS] * 2, {"tasks": 2}, [2]),
        ([TEACHES] * 3, {}, [3]),
    ],
)
def test_when_drawing_ends(monkeypatch, outcomes, settings, sizes):
    batch_ids, _, _, rounds, _ = drawn(monkeypatch, outcomes, **settings)
    assert [len(ids) for ids in rounds] == sizes and len(batch_ids) == min(3, sum(sizes))


@pytest.mark.parametrize(("budget", "played", "over"), [(0, 10**9, False), (5, 4, False), (5, 5, True), (5, 6, True)])
def test_a_budget_of_episodes(budget, played, over):
    assert train.spent(config.GRPO(episodes=budget), played) is over
