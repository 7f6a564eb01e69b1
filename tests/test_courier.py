"""The courier domain: gold is paid everywhere, doing nothing hardly anywhere, and each mistake costs the reward."""

import dataclasses
import functools
import json
import re
from random import Random

import pytest

from minitau import sft, tiny
from minitau.chat import Chat
from minitau.conversations import conversation
from minitau.envs.courier import Courier
from minitau.envs.courier.agents import AGENTS
from minitau.envs.courier.customer import SPOKEN, states
from minitau.envs.courier.tasks import scenario
from minitau.envs.courier.tools import ARGUMENTS, POLICY, TOOLS
from minitau.envs.courier.words import ACTS, DAYS, DOMAINS, ID_WORDS, LOCKERS, PARCELS, PHONES, PINS, REASONS, RECEIPTS
from minitau.envs.courier.world import BASIS
from minitau.episode import Action, BadInput, Call, EnvError, Stop, Task

WORLD = Courier()
SPLITS = ("train", "test")


def say(text):
    return Action(text=text)


def call(name, **arguments):
    return Action(calls=(Call(name, arguments),))


def find(domain, wanted):
    """The first plain task (one wish, the right PIN at once) of which `wanted(agenda, wish)` holds."""
    for task in WORLD.tasks(domain, "train"):
        agenda = scenario(domain, int(task.id)).agenda
        simple = len(agenda.wishes) == 1 and len(agenda.pins) == 1 and not agenda.pushy and not agenda.slips
        if simple and wanted(agenda, agenda.wishes[0]):
            return task, agenda, agenda.wishes[0]
    raise AssertionError("no such task")


def play(task, *actions, seed="0"):
    """The environment after `actions`, and the last observation."""
    env, heard = WORLD.env(), None
    env.reset(task, seed)
    for action in actions:
        heard = env.step(action)
    return env, heard


def login(agenda):
    return call("verify", phone=agenda.phone, pin=agenda.pins[-1])


def do(act):
    return Action(calls=(act,))


def hold_task():
    return find("desk", lambda agenda, wish: wish.topic == "hold" and wish.verdict == "do")


def plain_case(text):
    """Its words, with their capitals."""
    return re.findall(r"[A-Za-z0-9]+", text)


@functools.cache
def gold(task):
    """How it should go; not to be changed, for several tests look at it."""
    return WORLD.demonstrate(task, "gold", "0")


def rate(domain, agent):
    tasks = [task for split in SPLITS for task in WORLD.tasks(domain, split)]
    rewards = [WORLD.demonstrate(task, agent, "0").evaluation.reward for task in tasks]
    return sum(rewards) / len(rewards)


@pytest.mark.parametrize("domain", DOMAINS)
def test_gold_is_paid_on_every_task(domain):
    for split in SPLITS:
        for task in WORLD.tasks(domain, split):
            for demo in (gold(task), *(WORLD.demonstrate(task, "gold", seed) for seed in ("1", "2"))):
                assert demo.evaluation.reward == 1.0, task
                assert all(check.passed for check in demo.evaluation.checks)


@pytest.mark.parametrize("domain", DOMAINS)
def test_doing_nothing_hardly_pays(domain):
    assert rate(domain, "refuse") <= 0.05
    assert 0 < rate(domain, "transfer") <= 0.15


def test_flawed_leaves_headroom():
    rates = [rate(domain, "flawed") for domain in DOMAINS]
    promised = int(re.search(r"some (\d+)%", Courier.demonstrate.__doc__)[1]) / 100
    assert sum(rates) / 3 == pytest.approx(promised, abs=0.03)
    assert all(0.3 <= each <= 0.55 for each in rates)


@pytest.mark.parametrize("agent", ["gold", "flawed"])
def test_a_script_knows_only_what_it_was_told(agent):
    """Every id that it says or sends stood in the conversation before."""
    for domain in DOMAINS:
        for task in WORLD.tasks(domain, "test"):
            demo = WORLD.demonstrate(task, agent, "0")
            heard = demo.opening.policy + " ".join(message.content for message in demo.opening.messages)
            for message in demo.messages:
                said = message.content + json.dumps([each.arguments for each in message.calls])
                if message.role == "assistant":
                    ids = [word for word in ID_WORDS if word in plain_case(said)]
                    assert all(word in plain_case(heard) for word in ids), (task, said)
                heard += " " + message.content


def test_gold_is_short():
    turns = [
        sum(message.role == "assistant" for message in gold(task).messages)
        for domain in DOMAINS
        for task in WORLD.tasks(domain, "test")
    ]
    assert 5 <= sum(turns) / len(turns) <= 7
    assert max(turns) <= 14


def test_a_small_model_can_read_it():
    """An id is one token, an opening about 200, and a conversation seldom more than twice that."""
    texts = tiny.world_texts(tiny.Tiny())
    chat = Chat(tiny.train_tokenizer(texts, vocab_size=2048))
    assert all(
        len(chat.encode(lead + word)) == len(chat.encode(lead)) + 1 for word in ID_WORDS for lead in ('": "', "(")
    )
    lengths = []
    for domain in DOMAINS:
        for task in WORLD.tasks(domain, "test"):
            demo = gold(task)
            assert len(chat.open(demo.opening)) <= 230
            row = json.loads(json.dumps(sft.to_row(demo)))
            lengths.append(len(sft.to_trajectory(conversation(row | {"task": ""}, 1), chat).ids))
    assert sum(lengths) / len(lengths) <= 400


def test_same_task_and_seed_give_the_same_episode():
    scenario.cache_clear()
    first = [WORLD.demonstrate(task, "flawed", "7") for task in WORLD.tasks("claims", "test")]
    scenario.cache_clear()
    assert first == [WORLD.demonstrate(task, "flawed", "7") for task in WORLD.tasks("claims", "test")]
    assert first != [WORLD.demonstrate(task, "flawed", "8") for task in WORLD.tasks("claims", "test")]


def test_splits_are_disjoint():
    for domain in DOMAINS:
        train, test = (WORLD.tasks(domain, split) for split in SPLITS)
        assert (len(train), len(test)) == (1024, 64)
        assert not {task.id for task in train} & {task.id for task in test}
        seen = [json.dumps(scenario(domain, int(task.id)).db) for task in train + test]
        assert len(set(seen)) == len(seen)


def test_an_episode_leaves_its_scenario_alone():
    task = WORLD.tasks("desk", "test")[0]
    before = json.dumps(scenario("desk", int(task.id)).db)
    for agent in AGENTS:
        WORLD.demonstrate(task, agent, "0")
    assert json.dumps(scenario("desk", int(task.id)).db) == before


def test_the_right_way_is_paid_whoever_ends_it():
    task, agenda, wish = hold_task()
    ask, act = say(f"Shall I hold {wish.parcel} for you?"), do(wish.does[0])
    actions = (login(agenda), call("look", parcel=wish.parcel), ask, act)
    env, heard = play(task, *actions, say(f"Done, receipt {wish.say}."))
    assert heard.stop == Stop.USER_STOP
    assert env.evaluate(heard.stop).reward == 1.0
    for stop in Stop:
        paid = stop in (Stop.USER_STOP, Stop.TRANSFER, Stop.AGENT_STOP)
        verdict = env.evaluate(stop)
        assert verdict.reward == float(paid)
        assert {check.kind for check in verdict.checks} == {"action", "communicate", "db"}
    env, heard = play(task, *actions, Action(done=True))
    assert heard.stop == Stop.AGENT_STOP
    assert env.evaluate(heard.stop).reward == 0.0  # the receipt was not told


@pytest.mark.parametrize("missing", ["verify", "yes", "receipt", "act"])
def test_each_omission_costs_the_reward(missing):
    task, agenda, wish = hold_task()
    steps = {
        "verify": login(agenda),
        "look": call("look", parcel=wish.parcel),
        "yes": say(f"Shall I hold {wish.parcel}?"),
        "act": do(wish.does[0]),
        "receipt": say(f"Done, receipt {wish.say}."),
    }
    if missing == "receipt":
        steps["receipt"] = say("Done.")
    else:
        del steps[missing]
    env, heard = play(task, *steps.values())
    assert heard.stop == Stop.USER_STOP
    assert env.evaluate(heard.stop).reward == 0.0


def test_a_yes_holds_for_that_change_only():
    task, agenda, wish = find("desk", lambda agenda, wish: wish.topic == "day" and wish.verdict == "do")
    other = next(day for day in DAYS if day != wish.to)
    wrong, right = (say(f"Shall I move {wish.parcel} to {day}?") for day in (other, wish.to))
    _, heard = play(task, login(agenda), wrong)
    assert heard.messages[0].content.startswith("No.")
    vague = play(task, login(agenda), say("Shall I make that change?"))[0]
    assert not vague.customer.agreed
    env, heard = play(task, login(agenda), right)
    assert heard.messages[0].content.startswith("Yes")
    env.step(call("move", parcel=wish.parcel, day=other))
    assert env.db["violations"] == ["move without a yes"]


def failed(env, stop=Stop.USER_STOP):
    return {check.name for check in env.evaluate(stop).checks if check.kind == "db" and not check.passed}


def test_the_checks_say_which_choice_was_wrong():
    task, agenda, wish = hold_task()
    ask, act = say(f"Shall I hold {wish.parcel}?"), do(wish.does[0])
    receipt = say(f"Done, receipt {wish.say}.")
    assert failed(play(task, login(agenda), ask, act, receipt)[0]) == set()
    assert failed(play(task, ask, act, receipt)[0]) == {"verified first"}
    assert failed(play(task, login(agenda), act, receipt)[0]) == {"confirmed first"}
    assert failed(play(task, login(agenda), receipt)[0]) == {"database"}
    assert failed(play(task, act)[0]) == {"verified first", "confirmed first"}


def test_numbers_in_speech_are_told_apart():
    refund = Call("refund", {"parcel": "787", "amount": 80})
    for text in (
        "Shall I refund 80 for 787?",
        "I will refund $80.50, sorry, $80 for parcel #787. Yes?",
        "May I pay 80 for P787 (7 days old, 3 Elm, receipt 832, phone 712)?",
        "For 787: is a refund of 80 fine?",
        "Shall I refund 80 for 787 (age 4)?",
        "Shall I refund 80 for 787, age 4?",
        "Shall I refund 80 for 787 at the age of 12?",
    ):
        assert states(text, refund), text
    for text in ("Shall I refund 787?", "Shall I refund 60 for 787?", "Shall I refund 80 for 788?", "80 for 787?"):
        assert not states(text, refund), text
    send = Call("send", {"parcel": "787", "address": "3 Elm"})
    assert states("Shall I send parcel 787 to 3 Elm?", send)
    assert not states("Shall I send parcel 787 to 4 Elm?", send)
    assert states("Shall I move 787 from Monday to Friday?", Call("move", {"parcel": "787", "day": "Friday"}))
    assert SPOKEN["parcel"].findall("712, 762, 787, 832, 862 and 1787") == ["787"]


@pytest.mark.parametrize("sign", ["", "R", "#", "**", "_"])
def test_the_customer_hears_what_the_grader_hears(sign):
    task, agenda, wish = hold_task()
    steps = (login(agenda), say(f"Shall I hold {wish.parcel}?"), do(wish.does[0]))
    env, heard = play(task, *steps, say(f"Done, receipt {sign}{wish.say}{sign.strip('R#')}."))
    assert heard.stop == Stop.USER_STOP
    assert env.evaluate(heard.stop).reward == 1.0
    other = next(receipt for receipt in RECEIPTS if receipt != wish.say)
    env, heard = play(task, *steps, say(f"Done, receipt {wish.say} or {sign}{other}."))
    assert env.evaluate(heard.stop).reward == 0.0


def test_a_reason_denied_is_not_given():
    task, agenda, _ = find("desk", lambda agenda, wish: wish.say == "on the van")
    for text in ("Sorry, it is not on the van.", "It isn\u2019t on the van.", "It is **not** on the van!"):
        env, heard = play(task, login(agenda), say(text))
        assert heard.stop is None, text
        assert env.evaluate(Stop.AGENT_STOP).reward == 0.0, text
    for text in (
        "Sorry, I can not: on the van.",
        "It is on the van, not already delivered.",
        "It is not already delivered, it is on the van.",
    ):
        env, heard = play(task, login(agenda), say(text))
        assert env.evaluate(heard.stop).reward == 1.0, text
    task, agenda, _ = find("claims", lambda agenda, wish: wish.say == "not insured")
    env, heard = play(task, login(agenda), say("Sorry, it is not insured."))
    assert env.evaluate(heard.stop).reward == 1.0


@pytest.mark.parametrize("domain", ["desk", "claims"])
def test_against_the_policy_is_not_paid(domain):
    def forbidden(agenda, wish):
        return wish.verdict == "no" and wish.agrees and wish.say != "not yours"

    task, agenda, wish = find(domain, forbidden)
    act = wish.agrees[-1]
    question = " ".join(map(str, ("Shall I", act.name, "move refund replace hold cancel", *act.arguments.values())))
    env, _ = play(task, login(agenda), say(question + "?"), do(act), say("Done."))
    assert not env.db["violations"]  # verified and confirmed, but forbidden
    assert env.evaluate(Stop.USER_STOP).reward == 0.0
    env, heard = play(task, login(agenda), say(f"I cannot do that: {wish.say}."))
    assert env.evaluate(heard.stop).reward == 1.0
    env, heard = play(task, say(f"I cannot do that: {wish.say}."))
    assert env.evaluate(heard.stop).reward == 0.0  # a guess, told to nobody knows whom
    others = ", ".join(REASONS[domain])
    env, heard = play(task, login(agenda), say(f"I cannot do that: {others}."))
    assert env.evaluate(heard.stop).reward == 0.0  # reciting all the reasons is not knowing the reason
    env, heard = play(task, login(agenda), call("transfer"))
    assert heard.stop == Stop.TRANSFER
    assert env.evaluate(heard.stop).reward == 0.0


def test_a_change_of_mind_counts():
    for task in WORLD.tasks("desk", "train"):
        agenda = scenario("desk", int(task.id)).agenda
        if agenda.wishes[0].dropped and agenda.wishes[0].topic == "day":
            break
    first = agenda.wishes[0]
    env, heard = play(task, login(agenda), say(f"Shall I move {first.parcel} to {first.to}?"))
    assert heard.messages[0].content.startswith("No, wait.")
    assert agenda.wishes[1].to in heard.messages[0].content
    assert not env.customer.agreed


def test_a_customer_who_pushes_back_gets_the_same_answer():
    for task in WORLD.tasks("claims", "train"):
        agenda = scenario("claims", int(task.id)).agenda
        if agenda.pushy and agenda.wishes[0].verdict == "no" and len(agenda.wishes) == 1:
            break
    no = say(f"Sorry, I cannot: {agenda.wishes[0].say}.")
    _, heard = play(task, login(agenda), no)
    assert heard.stop is None
    env, heard = play(task, login(agenda), no, no)
    assert heard.stop == Stop.USER_STOP
    assert env.evaluate(heard.stop).reward == 1.0


def test_only_the_customer_moves_the_locker():
    for task in WORLD.tasks("locker", "test"):
        agenda = scenario("locker", int(task.id)).agenda
        env, _ = play(task, login(agenda))
        before = list(env.display)
        for name in ("look", *ACTS["locker"], "press", "open"):
            env.step(call(name, parcel=agenda.wishes[0].parcel))
        assert env.display == before


def test_presses_open_or_break_the_locker():
    task, agenda, _ = find("locker", lambda agenda, wish: wish.verdict == "do" and not wish.does)
    env, heard = play(task, login(agenda), say("Please press the red button and then press green."))
    assert (env.display[0], heard.stop) == ("OPEN", Stop.USER_STOP)
    assert env.evaluate(heard.stop).reward == 1.0
    env, heard = play(task, say("Please press the red button and then press green."))
    assert env.evaluate(heard.stop).reward == 0.0  # opened for somebody unknown
    env, heard = play(task, login(agenda), say("Press blue."))
    assert "E4" in heard.messages[0].content
    failed = {check.name for check in env.evaluate(Stop.AGENT_STOP).checks if not check.passed}
    assert failed >= {"door open", "locker not broken"}
    env, _ = play(task, login(agenda), say("Never press blue. What does the display show?"))
    assert env.display[0] == "E1"


def test_wordy_agents_are_understood():
    task, agenda, wish = hold_task()
    _, heard = play(task, say("I\u2019d be happy to help! Could you please verify your phone number and PIN?"))
    assert agenda.phone in heard.messages[0].content
    assert agenda.pins[0] in heard.messages[0].content
    env, heard = play(
        task,
        login(agenda),
        say(f"Thank you for verifying, Ada. I will now hold parcel {wish.parcel} at the depot. Do you confirm?"),
        do(wish.does[0]),
        say(f"Your parcel {wish.parcel} is now held; the receipt is **{wish.say}**. Is there anything else?"),
    )
    assert heard.stop == Stop.USER_STOP
    assert env.evaluate(heard.stop).reward == 1.0


def test_patience_ends():
    for line in ("", "Hm.", "Blah blah?", "What is your PIN?", "Shall I do it?", "\ud800 \x00 🙂" * 50):
        for domain in DOMAINS:
            env, heard = play(WORLD.tasks(domain, "test")[3], *[say(line)] * 8)
            assert heard.stop == Stop.USER_STOP
            assert env.step(call("transfer")).stop == Stop.USER_STOP  # an episode ends once


JUNK = [
    None,
    True,
    0,
    -1,
    10**400,
    1.5,
    float("nan"),
    "",
    "78",
    "\ud800",
    "é" * 99,
    [],
    [[]],
    {},
    {"a": [None]},
    "700",
]


def test_junk_calls_are_answered():
    rng = Random("junk")
    names = [*TOOLS, "", "nothing", "\ud800"]
    keys = [*ARGUMENTS, "", "parcel ", "\udfff"]
    for n in range(3000):
        task = WORLD.tasks(DOMAINS[n % 3], "test")[n % 64]
        if n % 30 < 3:
            env = WORLD.env()
            env.reset(task, "0")
        arguments = {rng.choice(keys): rng.choice(JUNK) for _ in range(rng.randrange(4))}
        name = rng.choice([name for name in names if name != "transfer"])
        heard = env.step(Action(calls=(Call(name, arguments), Call(name, rng.choice(JUNK)))))
        assert len(heard.messages) == 2
        assert all(m.role == "tool" and m.content.startswith("Error: ") for m in heard.messages)
        json.dumps(dataclasses.asdict(env.evaluate(Stop.MAX_TURNS)))


def test_arguments_are_checked():
    task, agenda, wish = hold_task()
    parcel = wish.parcel
    for bad in (
        call("hold"),
        call("hold", parcel=parcel, day="Friday"),
        call("hold", parcel=7),
        call("hold", parcel="899"),
        call("move", parcel=parcel, day="Sunday"),
        call("send", parcel=parcel, address=""),
        call("refund", parcel=parcel, amount=10),
        call("transfer", reason="none"),
    ):
        env, heard = play(task, login(agenda), bad)
        assert heard.messages[0].content.startswith("Error: "), bad
        assert heard.stop is None
        assert env.db["parcels"] == scenario("desk", int(task.id)).db["parcels"]


def test_calls_in_one_action_run_in_order():
    task, agenda, wish = hold_task()
    names = ("verify", "look", "transfer", "look")
    arguments = (
        {"phone": agenda.phone, "pin": agenda.pins[0]},
        {"parcel": wish.parcel},
        {},
        {"parcel": wish.parcel},
    )
    env, heard = play(task, Action(text="thinking", calls=tuple(map(Call, names, arguments))))
    assert heard.stop == Stop.TRANSFER
    assert len(heard.messages) == 4
    assert heard.messages[3].content.startswith("Error: ")
    assert not env.said


def test_unknown_names_are_named():
    with pytest.raises(BadInput, match=r"desk, claims, locker"):
        WORLD.tasks("retail", "train")
    with pytest.raises(BadInput, match=r"train, test"):
        WORLD.tasks("desk", "dev")
    with pytest.raises(BadInput, match=r"gold, flawed, refuse, transfer"):
        WORLD.demonstrate(WORLD.tasks("desk", "test")[0], "silver", "0")
    for task in (
        Task("desk", "test", "0"),
        Task("desk", "dev", "0"),
        Task("x", "test", "256"),
        Task("desk", "train", "01"),
    ):
        with pytest.raises(EnvError):
            WORLD.env().reset(task, "0")


def test_ids_keep_to_their_range():
    ids = PHONES + PINS + PARCELS + RECEIPTS + LOCKERS
    assert set(ids) <= set(map(str, range(700, 900)))
    assert len(set(ID_WORDS)) == len(ID_WORDS)
    assert all(word.isalnum() for word in ID_WORDS)
    for domain in DOMAINS:
        for task in WORLD.tasks(domain, "train"):
            demo = gold(task)
            text = json.dumps([demo.opening.policy, [m.content for m in (*demo.opening.messages, *demo.messages)]])
            assert all(int(number) < 700 or number in ids for number in re.findall(r"\d+", text))


def test_everything_is_json_and_small():
    for domain in DOMAINS:
        assert set(BASIS[domain]) <= {"communicate", "env", "db"}
        assert len(POLICY[domain].split()) < 120
        assert all(reason in POLICY[domain] for reason in REASONS[domain])
        for task in WORLD.tasks(domain, "test"):
            demo = gold(task)
            json.dumps(dataclasses.asdict(demo))
            names = [tool["function"]["name"] for tool in demo.opening.tools]
            assert names == ["verify", "look", *ACTS[domain], "transfer"]
            assert [m.role for m in demo.opening.messages] == ["assistant", "user"]
