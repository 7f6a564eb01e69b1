"""tau2's own user simulator, through the real litellm, against a real HTTP server: what it may do, and how it may fail.

What fails and may pass is asked again, after pauses; what still fails ends the episode as the
customer's error, which is neither trained on nor scored; and no key ever gets into a log.
"""

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tau2_world import MOCK, ROAMING, ROOT, Customer, Raw

from minitau.envs.tau2 import Tau2, customer
from minitau.episode import Action, Call, Completion, Message, Sampling, Stop, Task, UserError
from minitau.rollout import Limits
from minitau.rollout import play as play_episode


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(customer, "FIRST_PAUSE", 0.02)


def test_the_customer_uses_its_tools_unseen(play):
    two = [("toggle_roaming", "{}"), ("run_speed_test", "{}")]
    env, opening, customer = play(
        ROAMING, [("check_status_bar", "{}")], "No internet.", two, [("check_network_status", "{}")],
        "It works!", "###STOP###",
    )  # fmt: skip
    assert opening.messages[-1] == Message("user", "No internet.")
    seen = env.step(Action("Please toggle roaming and test the speed."))
    assert seen.messages == (Message("user", "It works!"),) and seen.stop is None
    assert env.step(Action("Great.")).stop == Stop.USER_STOP
    evaluation = env.evaluate(Stop.USER_STOP)
    assert evaluation.reward == 1.0 and evaluation.note == ""

    assert len(customer.requests[0]["tools"]) == 30
    asked, *results = customer.requests[3]["messages"][-3:]
    assert [call["function"]["name"] for call in asked["tool_calls"]] == ["toggle_roaming", "run_speed_test"]
    assert [result["tool_call_id"] for result in results] == ["t0", "t1"]
    assert "Excellent" in results[1]["content"]


def test_half_a_character_does_not_reach_the_disk(play):
    """Some models send half of a pair (a lone surrogate), which JSON can say and no file can hold."""
    env, _, _ = play(MOCK, "Help \ud83d me.", [("check", {"text": "\ud83d"})], "Thanks.")
    seen = env.step(Action("What is it?"))
    assert seen.messages[0].content == "Thanks."
    assert "\ufffd" in customer.whole("a \ud83d b") and customer.whole("a \U0001f600 b") == "a \U0001f600 b"
    json.dumps([str(each) for each in env._record], ensure_ascii=False).encode()


def test_a_customer_lost_in_its_tools_uses_up_the_steps(play):
    """As in tau2: each request and what answers its calls are a step each, and the episode is scored."""
    env, opening, customer = play(ROAMING, [("check_status_bar", "{}")] * 2, max_steps=8)
    assert opening.stop == Stop.MAX_TURNS and len(customer.requests) == 4
    assert [message.role for message in opening.messages] == ["assistant"], "what it did there is its own"
    assert env.evaluate(opening.stop).reward == 0.0


def test_the_seed_reaches_the_customer(play):
    asked = [play(MOCK, "Help.", seed=seed)[2].requests[0] for seed in ("a", "a", "b")]
    seeds = [request["seed"] for request in asked]
    assert seeds[0] == seeds[1] != seeds[2]
    assert asked[0]["model"] == "customer" and asked[0]["temperature"] == 0.0


def test_a_customer_who_rambles_is_cut_short_if_that_is_asked_for(play):
    assert play(MOCK, "Help.", user_max_tokens=77)[2].requests[0]["max_tokens"] == 77
    assert "max_tokens" not in play(MOCK, "Help.")[2].requests[0], "as in tau2"


# --- what fails, and may pass ---

PASSES = {
    "read timeout": (Raw(seconds=1.5), "Timeout"),
    "timeout": (408, "status 408"),
    "too many requests": (429, "RateLimitError .status 429"),
    "500": (500, "InternalServerError .status 500"),
    "503": (503, "status 503"),
    "no JSON": (Raw(body="<html>busy</html>"), "APIError|APIConnectionError|OpenAIError|InternalServerError"),
    "half a JSON": (Raw(body='{"choices": [{"mess'), "APIError|APIConnectionError|OpenAIError|InternalServerError"),
    "no choice": (Raw(body='{"model": "customer", "choices": []}'), "."),
    "empty": ("", "its message was empty"),
    "a call that is no JSON": ([("toggle_roaming", "{oops")], "JSONDecodeError"),
}


@pytest.mark.parametrize("answer, said", PASSES.values(), ids=PASSES)
def test_what_may_pass_is_asked_again(play, answer, said):
    env, opening, served = play(MOCK, answer, "Help.", answer, "Thanks. ###STOP###", user_timeout=1)
    assert opening.messages[-1].content == "Help."
    assert env.step(Action("Done.")).stop == Stop.USER_STOP
    first, again, second, again_too = served.requests
    assert first == again and second == again_too, "a failed question must not stay in the conversation"
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "user"]

    with pytest.raises(UserError, match=said) as caught:
        play(MOCK, answer, user_timeout=1)
    assert "\n" not in str(caught.value) and "openai/customer" in str(caught.value)
    assert len(play.customer.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_cannot_pass_fails_at_once(play, status):
    told = 400 if status == 422 else status  # litellm takes the one for the other in some of its versions
    with pytest.raises(UserError, match=f"status ({status}|{told})"):
        play(MOCK, status, user_retries=5)
    assert len(play.customer.requests) == 1


def test_nobody_listens(world, capfd):
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.server_close()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with pytest.raises(UserError, match="openai/customer, did not answer: nothing listens at its address"):
        Tau2(user_model="openai/customer", user_api_base=url, user_retries=2).env().reset(MOCK, "0")
    assert capfd.readouterr() == ("", "")


def test_a_server_that_never_accepts(world):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        options = {"user_api_base": f"http://127.0.0.1:{server.server_port}/v1", "user_timeout": 0.3, "user_retries": 1}
        started = time.monotonic()
        with pytest.raises(UserError, match="Timeout"):
            Tau2(user_model="openai/customer", **options).env().reset(MOCK, "0")
        assert 0.6 < time.monotonic() - started < 10


def test_pauses_grow_and_are_not_all_alike(monkeypatch):
    monkeypatch.setattr(customer, "FIRST_PAUSE", 0.5)
    for attempt in range(5):
        pauses = {customer.pause(attempt, 0.0) for _ in range(50)}
        assert len(pauses) > 40, "a hundred episodes that failed together must not come back together"
        assert 0.25 * 2**attempt <= min(pauses) and max(pauses) <= 0.75 * 2**attempt
    assert customer.pause(20, 0.0) == customer.LONGEST_PAUSE
    assert 7 <= customer.pause(0, 7.0) <= 8.75
    assert customer.pause(0, 1e9) == customer.LONGEST_PAUSE


def test_a_server_that_says_when_to_come_back_is_heard(play):
    answers = Raw(429, "{}", {"Retry-After": "0.7"}), Raw(503, "{}", {"Retry-After": "a date"}), "Help."
    play(MOCK, *answers, user_retries=2)
    first, second, third = play.customer.times
    assert second - first >= 0.7 and third - second < 0.5


def test_an_episode_knows_how_long_its_customer_took(play):
    """Its own tools, retries and pauses included; the agent's tools not."""
    slow = Raw(body=Customer.reply(None, "Go on.").body, seconds=0.3)
    env, opening, _ = play(MOCK, 503, slow)
    assert 0.3 + 0.5 * customer.FIRST_PAUSE < opening.user_seconds < 3
    assert 0.3 < env.step(Action(text="Well?")).user_seconds < 2
    assert env.step(Action(calls=(Call("get_users", {}),))).user_seconds == 0.0


def test_requests_at_once_have_a_connection_each(world):
    """Through one pool, as litellm has it, most of them would wait for others: it keeps 20."""
    from concurrent.futures import ThreadPoolExecutor

    served = Customer(Raw(body=Customer.reply(None, "Go on.").body, seconds=0.5))
    tau2 = Tau2(user_model="openai/customer", user_api_base=served.url)
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda i: tau2.env().reset(MOCK, str(i)), range(64)))
    idle = len(customer._idle)
    assert idle >= 32 and len(set(map(id, customer._idle))) == idle
    tau2.env().reset(MOCK, "again")
    assert len(customer._idle) == idle, "a connection is taken again before another is made"
    served.server.shutdown()


def test_of_several_endpoints_each_episode_keeps_to_one(world):
    """That one has the conversation cached; and each has as many."""
    served = [Customer(*["Go on."] * 9) for _ in range(2)]
    tau2 = Tau2(user_model="openai/customer", user_api_base=",".join(each.url for each in served))
    for number, took in enumerate([(3, 0), (3, 3), (6, 3)]):
        env = tau2.env()
        env.reset(MOCK, str(number))
        for _ in range(2):
            env.step(Action(text="Well?"))
        assert tuple(len(each.requests) for each in served) == took
    for each in served:
        each.server.shutdown()


def test_without_litellms_switch_it_still_works(play, monkeypatch):
    """Then litellm wants a client of the openai package, and gets none from us."""
    monkeypatch.setenv("EXPERIMENTAL_OPENAI_BASE_LLM_HTTP_HANDLER", "False")
    customer.takes_connection.cache_clear()
    try:
        assert play(MOCK, "Help.")[1].messages[-1].content == "Help."
    finally:
        customer.takes_connection.cache_clear()


def test_a_model_without_a_price_costs_nothing(world, play, capfd, monkeypatch):
    """litellm would look for its price after every reply. What it is asked to send stays as it was."""
    import litellm

    def ask(model):
        served = Customer("Help.")
        Tau2(user_model=model, user_api_base=served.url).env().reset(ROAMING, "0")
        served.server.shutdown()
        return served.requests[0]

    monkeypatch.setattr("minitau.envs.tau2.world.without_price", lambda model: None)
    before = ask("openai/ours-untold")
    with pytest.raises(Exception, match="mapped"):
        litellm.get_model_info("openai/ours-untold")
    monkeypatch.undo()
    assert ask("openai/ours-told") == {**before, "model": "ours-told"}
    assert litellm.completion_cost(model="openai/ours-told", prompt="Hi.", completion="Hello.") == 0.0

    known = litellm.get_model_info("openai/gpt-4.1")
    Tau2(user_model="openai/gpt-4.1")
    assert litellm.get_model_info("openai/gpt-4.1") == known and known["input_cost_per_token"] > 0
    Tau2(user_model="nobody-has-this")  # whose first request will say so
    assert capfd.readouterr() == ("", "")


# --- what still fails ---


class Polite:
    """Engine and chat: says one thing."""

    def generate(self, prompt_ids, sampling, *, session, seed):
        return Completion((1,), (0.0,), "stop", 0)

    def open(self, opening):
        return [0]

    def extend(self, ids, messages):
        return [*ids, 0]

    def parse(self, ids, tools, cut):
        return Action("How can I help?")


def episode(url):
    env = Tau2(user_model="openai/customer", user_api_base=url, user_retries=1).env()
    limits = Limits(max_turns=3, max_tokens=100)
    return play_episode(MOCK, env, Polite(), Polite(), sampling=Sampling(), limits=limits, sample=0, seed="0")


@pytest.mark.parametrize("answers", [(500,), ("Help.", 500), ("Help.", "Hm.", 401)])
def test_a_customer_that_does_not_answer_is_an_error_of_ours(world, answers):
    served = Customer(*answers)
    played = episode(served.url)
    served.server.shutdown()
    assert played.stop == Stop.USER_ERROR and played.stop.ours, "so it is out of loss and score"
    assert played.evaluation is None and "did not answer" in played.detail


SECRET = "sk-test-51H8very-secret"


def test_a_key_never_reaches_a_log(world):
    """The endpoints repeat the key in their errors, as some do. All that a process prints, and its trajectories."""
    served = [Customer(status) for status in (401, 403, 429, 500)]
    code = (
        "import sys, json, logging; from minitau.envs.tau2 import customer; customer.FIRST_PAUSE = 0.01\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "sys.path.insert(0, 'tests'); import test_tau2_customer as t\n"
        f"for url in {[each.url for each in served]!r}:\n"
        "    print(json.dumps(t.episode(url).to_json()))\n"
    )
    env = {**os.environ, "OPENAI_API_KEY": SECRET, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    for each in served:
        each.server.shutdown()
        assert set(each.keys) == {f"Bearer {SECRET}"}, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # litellm may log there, too
    details = [json.loads(line)["detail"] for line in lines]
    assert [detail.split("status ")[1][:3] for detail in details] == ["401", "403", "429", "500"], details
    assert "is the key in the environment" in details[0]
    for text in (done.stdout, done.stderr):
        assert SECRET not in text and SECRET[8:] not in text


def test_a_customer_that_leaves_at_once_is_scored(play):
    """As in tau2, where a task that wants nothing done is then solved."""
    env, opening, _ = play(MOCK, "###STOP###")
    assert opening.stop == Stop.USER_STOP and opening.messages[-1] == Message("user", "###STOP###")
    assert env.evaluate(Stop.USER_STOP).reward == 0.0
    nothing = Task("airline", "base", "0")
    env, opening, _ = play(nothing, "###OUT-OF-SCOPE###")
    assert opening.stop == Stop.USER_STOP and env.evaluate(opening.stop).reward == 1.0
