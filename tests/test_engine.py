"""The contract of an Engine, and what only the local one promises.

The first part knows an engine by its protocol alone: everything it says is held against a *reference*, a full,
uncached forward of the same weights. SGLang's runs against a stand-in, or against the real server where
MINITAU_SGLANG says how that is started ("python -m sglang.launch_server --enable-deterministic-inference ...").
The second part is about LocalEngine's cache, batching and patience.
"""

import copy
import math
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import sglang_server, small_model

from minitau import config, engines, pretrained
from minitau.attention import packed_attention
from minitau.engines.local import CACHE_STEP, SHARED_PREFIX, LocalEngine
from minitau.engines.rounded import rounded
from minitau.engines.sglang import SGLangEngine
from minitau.episode import Completion, EngineError, Sampling

ENGINES = ("local", "sglang")
STOP = frozenset({0, 1, 2, 3, 4})  # of 97 tokens: most replies of up to 12 tokens end by length, many by a stop
SLOTS = 6  # so that the tests with more sessions evict
TOLERANCE = 1e-4
SOFT = Sampling(temperature=0.7, max_new_tokens=12)
PATIENCE_OF_THE_TEST = 60.0  # seconds until a waiting thread counts as forgotten


@pytest.fixture(scope="module")
def reference():
    """The weights, as the trainer holds them. Scaled up, so that a wrong key or value shows in the logits."""
    return small_model(scale=8.0).requires_grad_(False)


@pytest.fixture(scope="module")
def server(reference, tmp_path_factory):
    """A server with the reference's weights, for all tests of this file."""
    folder = tmp_path_factory.mktemp("server")
    pretrained.save_model(folder, reference.cfg, reference.named_parameters(), torch.float32, folder)
    with sglang_server(folder, folder / "server.log", context=2048) as server:
        yield server


def open_engine(kind, model, request):
    """A running engine with weights of its own that equal `model`'s."""
    if kind == "local":
        return LocalEngine(copy.deepcopy(model), STOP, slots=SLOTS, max_context=2048)
    url = request.getfixturevalue("server").url
    engine = SGLangEngine(None, STOP, url=url, vocab_size=97, max_context=2048, dtype=torch.float32, timeout=60.0)
    engine.sync(list(model.named_parameters()), 0)
    return engine


@pytest.fixture(params=ENGINES)
def engine(request, reference):
    engine = open_engine(request.param, reference, request)
    yield engine
    engine.close()


def log_p(model, ids, temperature):
    """(T, V) log-probabilities after each position, by one full forward without any cache."""
    with torch.no_grad():
        attend = packed_attention([0, len(ids)], "cpu", torch.float32)
        hidden = model.hidden(torch.tensor(ids), torch.arange(len(ids)), attend)
        return torch.log_softmax(model.logits(hidden) / (temperature or 1.0), dim=-1)


def error_of(model, prompt, completion, sampling):
    """The largest |logprob - full forward's| of a completion."""
    ids = [*prompt, *completion.ids]
    rows = log_p(model, ids, sampling.temperature)[len(prompt) - 1 : -1]
    right = rows.gather(1, torch.tensor(completion.ids)[:, None]).squeeze(1)
    return float((right - torch.tensor(completion.logprobs)).abs().max())


def some_ids(rng, n):
    """`n` ids, none of which ends a reply."""
    return [rng.randrange(len(STOP), 97) for _ in range(n)]


def converse(engine, session, turns, sampling=SOFT, shared=(), pause=0.0):
    """A growing conversation as a rollout makes it: what was sampled stays, id for id, then more is heard.

    Returns every (prompt, completion).
    """
    rng = random.Random(session)
    ids = [*shared, *some_ids(rng, rng.randint(1, 20))]
    said = []
    for turn in range(turns):
        if pause:
            time.sleep(random.random() * pause)  # not seeded: the order of arrival shall differ from run to run
        completion = engine.generate(ids, sampling, session=session, seed=1000 * len(session) + turn)
        said.append((list(ids), completion))
        ids += completion.ids
        if completion.finish == "length":
            ids.append(2)  # the chat closes a reply that did not end by itself
        ids += some_ids(rng, rng.randint(1, 15))
    return said


def in_threads(n, work, joining=None):
    """[work(0), ..., work(n-1)], each in a thread of its own; what a thread raised is raised here.

    `joining` is an engine that the threads join before the first one starts, as a rollout's do, and leave at their
    end. A thread that never comes back fails the test instead of hanging it.
    """
    outcomes = [None] * n
    problems = []

    def run(i):
        try:
            outcomes[i] = work(i)
        except BaseException as error:
            problems.append(error)
        finally:
            if joining:
                joining.leave()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(n)]
    for _ in range(n if joining else 0):
        joining.join()
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE_OF_THE_TEST
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if problems:
        raise problems[0]
    assert not any(thread.is_alive() for thread in threads), "a thread was forgotten"
    return outcomes


# -- the contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 0.0])
def test_every_logprob_of_a_growing_conversation_is_the_full_forwards(engine, reference, temperature):
    # A prototype let the next turn overwrite the cache slot of the stop token: single tokens were off by .84.
    sampling = Sampling(temperature, 12)
    said = converse(engine, "alone", 8, sampling)
    assert {completion.finish for _, completion in said} <= {"stop", "length"}
    for prompt, completion in said:
        assert len(completion.logprobs) == len(completion.ids) >= 1
        assert error_of(reference, prompt, completion, sampling) < TOLERANCE


@pytest.mark.parametrize("sessions", [5, 15], ids=["fewer sessions than slots", "more sessions than slots"])
@pytest.mark.parametrize("shared", [0, 50], ids=["nothing shared", "shared prefix"])
def test_sessions_interleaved_in_threads_do_not_disturb_each_other(engine, reference, sessions, shared):
    head = some_ids(random.Random("head"), shared)
    everyone = in_threads(sessions, lambda i: converse(engine, f"session {i}", 4, shared=head, pause=0.002))
    for said in everyone:
        assert max(error_of(reference, prompt, completion, SOFT) for prompt, completion in said) < TOLERANCE


def test_long_conversations_are_as_exact_as_short_ones(engine, reference):
    # Longer than CACHE_STEP twice over, beside a short one whose cache must survive the growth.
    short = converse(engine, "short", 1)[0]
    rng = random.Random(7)
    ids = some_ids(rng, CACHE_STEP - 4)
    for _ in range(3):
        completion = engine.generate(ids, SOFT, session="long", seed=len(ids))
        assert error_of(reference, ids, completion, SOFT) < TOLERANCE
        ids += [*completion.ids, *some_ids(rng, 300)]
    assert len(ids) > 2 * CACHE_STEP
    prompt = [*short[0], *short[1].ids, 9, 8, 7]
    assert error_of(reference, prompt, engine.generate(prompt, SOFT, session="short", seed=1), SOFT) < TOLERANCE


@pytest.mark.parametrize("change", ["shorter", "much shorter", "changed inside", "unrelated", "the same", "one token"])
def test_a_prompt_that_does_not_continue_the_last_one(engine, reference, change):
    rng = random.Random(change)
    before = some_ids(rng, 80)
    first = engine.generate(before, SOFT, session="s", seed=1)
    whole = [*before, *first.ids]
    after = {
        "shorter": whole[:-3],
        "much shorter": before[:10],
        "changed inside": [*whole[:40], *some_ids(rng, 3), *whole[43:], 50],
        "unrelated": some_ids(rng, 60),
        "the same": before,
        "one token": before[:1],
    }[change]
    second = engine.generate(after, SOFT, session="s", seed=2)
    assert error_of(reference, after, second, SOFT) < TOLERANCE
    onward = [*after, *second.ids, 40, 41]
    assert error_of(reference, onward, engine.generate(onward, SOFT, session="s", seed=3), SOFT) < TOLERANCE


def test_a_reply_ends_with_its_stop_token_or_at_its_length(engine):
    completions = in_threads(40, lambda i: engine.generate([40 + i], SOFT, session=f"{i}", seed=i))
    assert {completion.finish for completion in completions} == {"stop", "length"}  # else this shows nothing
    for completion in completions:
        assert isinstance(completion, Completion)
        assert not STOP & set(completion.ids[:-1])
        assert (completion.finish == "stop") == (completion.ids[-1] in STOP)
        assert len(completion.ids) == SOFT.max_new_tokens or completion.finish == "stop"
        assert all(type(i) is int for i in completion.ids) and all(type(x) is float for x in completion.logprobs)


def test_a_reply_may_be_a_single_token(engine, reference):
    sampling = Sampling(0.7, 1)
    for turn, (prompt, completion) in enumerate(converse(engine, "one", 5, sampling)):
        assert len(completion.ids) == 1, turn
        assert error_of(reference, prompt, completion, sampling) < TOLERANCE


def test_temperature_zero_is_greedy_with_logprobs_at_temperature_one(engine, reference):
    sampling = Sampling(0.0, 12)
    for prompt, completion in converse(engine, "greedy", 3, sampling):
        rows = log_p(reference, [*prompt, *completion.ids], 1.0)[len(prompt) - 1 : -1]
        assert tuple(rows.argmax(-1).tolist()) == completion.ids
        assert rows.max(-1).values.tolist() == pytest.approx(completion.logprobs, abs=TOLERANCE)


def test_greedy_and_sampled_requests_share_a_batch(engine, reference):
    samplings = [Sampling((0.0, 0.7, 1.3)[i % 3], 10) for i in range(15)]
    prompts = [some_ids(random.Random(i), 12) for i in range(15)]
    completions = in_threads(15, lambda i: engine.generate(prompts[i], samplings[i], session=f"{i}", seed=i))
    for prompt, completion, sampling in zip(prompts, completions, samplings):
        assert error_of(reference, prompt, completion, sampling) < TOLERANCE


def test_the_draw_depends_on_the_seed_and_not_on_the_company(engine):
    prompt = some_ids(random.Random(3), 20)
    alone = engine.generate(prompt, SOFT, session="alone", seed=77)

    def one(i):
        mine = i == 13
        return engine.generate(
            prompt if mine else some_ids(random.Random(i), 5 + i), SOFT, session=f"{i}", seed=77 if mine else i
        )

    among = in_threads(31, one)[13]
    assert among.ids == alone.ids
    assert among.logprobs == pytest.approx(alone.logprobs, abs=TOLERANCE)
    others = [engine.generate(prompt, SOFT, session="alone", seed=seed).ids for seed in range(10)]
    assert len(set(others)) > 5  # different seeds, different replies


def test_sampling_frequencies_are_the_softmax(engine, reference):
    # 3000 first tokens after one prompt. Fixed seeds: passes or fails always, not sometimes.
    prompt, sampling = some_ids(random.Random(5), SHARED_PREFIX + 10), Sampling(0.8, 1)
    counts = torch.zeros(97)

    def some(i):
        return [engine.generate(prompt, sampling, session=f"{i}", seed=1000 * i + j).ids[0] for j in range(100)]

    for tokens in in_threads(30, some):
        counts += torch.bincount(torch.tensor(tokens), minlength=97)
    expected = log_p(reference, prompt, 0.8)[-1].exp() * counts.sum()
    common = expected >= 10  # rarer tokens are one bin together
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    assert len(seen) > 10
    chi2, freedom = float(((seen - wanted) ** 2 / wanted).sum()), len(seen) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_later_tokens_are_drawn_from_the_softmax_too(engine, reference):
    # log p of a draw has mean -entropy. Summed over all draws of many conversations this is a normal number.
    total = variance = 0.0
    for said in in_threads(12, lambda i: converse(engine, f"frequencies {i}", 6)):
        for prompt, completion in said:
            rows = log_p(reference, [*prompt, *completion.ids], 0.7)[len(prompt) - 1 : -1].double()
            mean = (rows.exp() * rows).sum(-1)
            variance += float(((rows.exp() * rows.square()).sum(-1) - mean.square()).sum())
            total += sum(completion.logprobs) - float(mean.sum())
    assert abs(total / math.sqrt(variance)) < 4


def test_sync_changes_what_is_sampled_its_version_and_forgets_the_old_cache(engine, reference):
    trainer = copy.deepcopy(reference)
    prompt = some_ids(random.Random(11), 60)
    before = engine.generate(prompt, SOFT, session="s", seed=1)
    assert before.weight_version == 0
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert error_of(reference, prompt, engine.generate(prompt, SOFT, session="s", seed=1), SOFT) < TOLERANCE
    engine.sync(trainer.named_parameters(), 7)
    # The conversation goes on: what older weights computed for its beginning must not be used any more.
    longer = [*prompt, *before.ids, 50, 51]
    after = engine.generate(longer, SOFT, session="s", seed=2)
    assert after.weight_version == 7
    assert error_of(trainer, longer, after, SOFT) < TOLERANCE
    assert error_of(reference, longer, after, SOFT) > 0.1  # or the test would show nothing
    # Neither may a fresh session copy a stale prefix from another one.
    fresh = engine.generate(longer[:-1], SOFT, session="another", seed=3)
    assert error_of(trainer, longer[:-1], fresh, SOFT) < TOLERANCE
    engine.sync(iter(reference.named_parameters()), 8)
    again = engine.generate(prompt, SOFT, session="s", seed=1)
    assert again.ids == before.ids and again.weight_version == 8


def test_a_prompt_that_does_not_fit_is_an_error_and_hurts_nobody(engine, reference):
    with pytest.raises(EngineError):
        engine.generate([5] * 5000, SOFT, session="long", seed=0)
    with pytest.raises(EngineError):
        engine.generate([], SOFT, session="empty", seed=0)
    prompt = [9, 8, 7]
    assert error_of(reference, prompt, engine.generate(prompt, SOFT, session="s", seed=0), SOFT) < TOLERANCE


def test_close_wakes_who_waits_and_refuses_who_comes_later(engine):
    def ask(i):
        if i == 2 * SLOTS:  # has joined but does not ask: the engine may be waiting for it
            time.sleep(0.1)
            return engine.close()
        try:
            return engine.generate([30 + i] * 10, Sampling(1.0, 100_000), session=f"{i}", seed=i)
        except EngineError:
            return None

    replies = in_threads(2 * SLOTS + 1, ask, joining=engine)  # half of them have no slot
    assert all(reply.finish == "stop" for reply in replies if reply)  # an engine that waits for nobody replied in time
    with pytest.raises(EngineError):
        engine.generate([9], SOFT, session="late", seed=0)
    engine.close()  # twice does no harm


# -- the local engine only -----------------------------------------------------------------------------------


@pytest.fixture
def local(reference):
    """Makes LocalEngines over one copy of the reference, and closes them."""
    engines = []

    def make(model=None, **settings):
        engines.append(LocalEngine(model or copy.deepcopy(reference), STOP, **{"slots": SLOTS, **settings}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def count_tokens(engine):
    """A list that grows by the number of tokens of every forward that the engine makes from now on."""
    fed, hidden = [], engine.model.hidden

    def counted(ids_T, positions_T, attend):
        fed.append(len(ids_T))
        return hidden(ids_T, positions_T, attend)

    engine.model.hidden = counted
    return fed


def test_no_position_of_a_conversation_is_computed_twice(local):
    engine = local()
    fed = count_tokens(engine)
    prompt, completion = converse(engine, "s", 6)[-1]
    assert sum(fed) == len(prompt) + len(completion.ids) - 1  # the very last sample is never fed


@pytest.mark.parametrize("together", [True, False], ids=["at once", "one after the other"])
def test_a_shared_prefix_is_computed_once(local, reference, together):
    engine = local(slots=16)
    fed = count_tokens(engine)
    head = some_ids(random.Random("policy"), 400)
    prompts = [[*head, 30 + i, *some_ids(random.Random(i), 9)] for i in range(16)]

    def work(i):
        return engine.generate(prompts[i], Sampling(0.7, 1), session=f"{i}", seed=i)

    completions = in_threads(16, work, joining=engine) if together else [work(i) for i in range(16)]
    assert sum(fed) == 400 + 16 * 10
    for prompt, completion in zip(prompts, completions):
        assert error_of(reference, prompt, completion, Sampling(0.7, 1)) < TOLERANCE


def test_identical_short_prompts_are_prefilled_together(local):
    # Too short to share, so nothing is won by letting one wait for the other.
    engine = local(slots=16)
    fed = count_tokens(engine)
    work = lambda i: engine.generate([9] * 10, Sampling(0.7, 1), session=f"{i}", seed=i)  # noqa: E731
    in_threads(16, work, joining=engine)
    assert len(fed) <= 2


def test_an_evicted_conversation_goes_on_exactly(local, reference):
    engine = local(slots=2)
    talks = {name: some_ids(random.Random(name), 40) for name in ("a", "b", "c")}
    for turn in range(3):
        for name, ids in talks.items():  # whoever comes next has just been evicted
            completion = engine.generate(ids, SOFT, session=name, seed=turn)
            assert error_of(reference, ids, completion, SOFT) < TOLERANCE
            ids += [*completion.ids, 60, 61]


@pytest.mark.parametrize("max_context", [700, 1610, 1700])
def test_a_conversation_may_fill_its_context_whatever_its_size(local, reference, max_context):
    engine = local(slots=2, max_context=max_context)
    rng = random.Random(max_context)
    for length in (500, 1000, 1100):  # the cache grows step by step up to its limit
        if length < max_context:
            engine.generate(some_ids(rng, length), Sampling(1.0, 1), session="s", seed=0)
    prompt = some_ids(rng, max_context - 10)
    engine.stop_ids = frozenset()
    completion = engine.generate(prompt, Sampling(1.0, 1000), session="s", seed=0)
    assert completion.finish == "length" and len(completion.ids) == 10
    assert error_of(reference, prompt, completion, Sampling(1.0)) < TOLERANCE


def test_an_engine_that_shares_the_models_parameters_copies_nothing(local):
    model = small_model(scale=8.0).requires_grad_(False)
    engine = local(model)
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    prompt = some_ids(random.Random(2), 50)
    engine.generate(prompt, SOFT, session="s", seed=1)
    engine.sync(model.named_parameters(), 1)
    assert {name: parameter._version for name, parameter in model.named_parameters()} == versions
    for parameter in model.parameters():  # an optimizer's step
        parameter += 0.1
    engine.sync(model.named_parameters(), 2)
    completion = engine.generate(prompt, SOFT, session="s", seed=1)
    assert completion.weight_version == 2
    assert error_of(model, prompt, completion, SOFT) < TOLERANCE


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rounded_weights_are_the_nearest_of_few(bits):
    weight = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0
    found = rounded(weight, bits)
    largest = weight.abs().amax(1)
    assert found.abs().amax(1).allclose(largest) and found.shape == weight.shape
    for row, kept, top in zip(weight[:3], found, largest):
        values = torch.linspace(-1, 1, 2**bits - 1) * top
        torch.testing.assert_close(kept, values[(row[:, None] - values).abs().argmin(1)])
    assert not found[3].any() and rounded(weight.bfloat16(), bits).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [0, 3])
def test_an_engine_may_sample_from_rounded_weights_and_leaves_the_trainers_alone(bits):
    model = small_model(scale=8.0).requires_grad_(False)
    engine = engines.open_engine(config.GRPO(max_tokens=200, concurrency=4), model, STOP, bits)
    prompt = some_ids(random.Random(2), 50)
    for version in (1, 2):  # another optimizer's step reaches it too
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        engine.sync(model.named_parameters(), version)
        completion = engine.generate(prompt, SOFT, session="s", seed=1)
        assert all(parameter.equal(before[name]) for name, parameter in model.named_parameters())
        told = small_model().requires_grad_(False)
        told.load_state_dict({name: rounded(tensor, bits) if bits else tensor for name, tensor in before.items()})
        assert completion.weight_version == version and error_of(told, prompt, completion, SOFT) < TOLERANCE
        assert (error_of(model, prompt, completion, SOFT) > 0.01) == (bits > 0)
        for parameter in model.parameters():
            parameter += 0.1
    engine.close()


def test_an_engine_in_bf16_has_weights_of_its_own():
    model = small_model(scale=8.0).requires_grad_(False)
    model.dtype = torch.bfloat16
    engine = engines.open_engine(config.GRPO(max_tokens=200, concurrency=4, dtype="bfloat16"), model, STOP)
    assert engine.model is not model and {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    engine.sync(model.named_parameters(), 1)
    for mine, theirs in zip(engine.model.parameters(), model.parameters()):
        assert torch.equal(mine, theirs.bfloat16())
    engine.close()


@pytest.mark.parametrize("when", [0, 2], ids=["while prefilling", "while decoding"])
def test_weights_do_not_change_under_a_request(local, reference, when):
    engine, calls = local(), []
    hidden = engine.model.hidden
    reached, go_on = threading.Event(), threading.Event()

    def stopping(*args):
        calls.append(0)
        if len(calls) == when + 1:
            reached.set()
            assert go_on.wait(PATIENCE_OF_THE_TEST)
        return hidden(*args)

    engine.stop_ids, engine.model.hidden = frozenset(), stopping
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(engine.generate, [9, 8, 7], SOFT, session="s", seed=0)
        assert reached.wait(PATIENCE_OF_THE_TEST)
        with pytest.raises(AssertionError, match="under a request"):
            engine.sync(reference.named_parameters(), 1)
        go_on.set()
        assert asked.result(PATIENCE_OF_THE_TEST).weight_version == 0


def ask_all(engine, n):
    """What each of `n` threads that ask at once gets: a Completion or an EngineError."""

    def ask(i):
        try:
            return engine.generate([20 + i] * 5, SOFT, session=f"{i}", seed=i)
        except EngineError as error:
            return error

    return in_threads(n, ask, joining=engine)


@pytest.mark.parametrize("when", [0, 1, 3], ids=["while prefilling", "at the first token", "while decoding"])
def test_a_failure_reaches_everyone_who_waits_and_the_engine_goes_on(local, reference, when):
    engine = local()
    engine.stop_ids = frozenset()
    hidden, calls = engine.model.hidden, []

    def failing(*args):
        calls.append(0)
        if len(calls) == when + 1:
            raise RuntimeError("out of memory, say")
        return hidden(*args)

    engine.model.hidden = failing
    outcomes = ask_all(engine, 2 * SLOTS)  # half of them have no slot yet
    assert all(isinstance(outcome, EngineError) for outcome in outcomes), outcomes
    assert "out of memory" in str(outcomes[0])
    prompt = [20] * 5
    assert error_of(reference, prompt, engine.generate(prompt, SOFT, session="0", seed=0), SOFT) < TOLERANCE


def test_the_engine_goes_on_after_it_could_not_grow_its_cache(local, reference, monkeypatch):
    engine = local()
    zeros, calls = torch.zeros, []

    def scarce(shape, **kwargs):
        calls.append(shape)
        if len(calls) == 2:  # memory for the first layer, none for the next
            raise RuntimeError("out of memory")
        return zeros(shape, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", scarce)
        outcome = ask_all(engine, 1)[0]
    assert isinstance(outcome, EngineError)
    outcome = ask_all(engine, 1)[0]
    assert isinstance(outcome, Completion), outcome
    assert error_of(reference, [20] * 5, outcome, SOFT) < TOLERANCE


def test_close_gives_the_cache_back(local):
    # The fine-tuning that follows a collection wants that memory, and its loop may still hold the engine.
    engine = local()
    engine.generate([9, 8, 7], SOFT, session="s", seed=0)
    engine.close()
    assert not engine.keys and not engine.values


def test_infinite_patience_waits_for_all_who_joined(local):
    engine = local()
    engine.join()
    engine.join()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(engine.generate, [9, 8, 7], SOFT, session="s", seed=0)
        time.sleep(0.2)
        assert not asked.done()
        engine.leave()  # the other one will not ask any more
        assert asked.result(PATIENCE_OF_THE_TEST).ids


def test_finite_patience_serves_who_is_there(local):
    engine = local(patience=0.01)
    engine.join()
    engine.join()
    assert engine.generate([9, 8, 7], Sampling(1.0, 3), session="s", seed=0).ids


@pytest.mark.parametrize("slots", [16, 6], ids=["a slot for everyone", "too few slots"])
def test_the_same_work_twice_is_bit_identical_however_slow_the_threads_are(local, slots):
    head = some_ids(random.Random("policy"), 60)

    def run():
        engine = local(slots=slots)

        # Of different lengths, so that threads leave at different times.
        work = lambda i: converse(engine, f"session {i}", 2 + i % 4, shared=head, pause=0.004)  # noqa: E731
        return in_threads(16, work, joining=engine)

    assert run() == run()  # ids, logprobs, everything, to the last bit
