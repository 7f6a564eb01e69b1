"""The scripted agents: each is a generator that yields actions and is sent what it hears in return.

A script may read the agenda (it is a cheat sheet), but says and sends only what it has been told
by then, so that its episodes can be learned from. It must not know the database or the grading.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from random import Random

from minitau.envs.courier.words import DAYS, EXCEPTION, NOT_YOURS, Agenda, Wish
from minitau.episode import Action, Call

AGENTS = ("gold", "flawed", "refuse", "transfer")
# Wrong choices, never a wrong word, and how often a flawed agent makes each. Bad habits are common and policy is
# broken now and then: who copies these episodes knows the rules, and has much to unlearn.
FLAWS = {"unverified": 0.3, "unconfirmed": 0.35, "silent": 0.3, "lenient": 0.15, "hands_off": 0.1}

Script = Generator[Action, str, str]


def script(agent: str, agenda: Agenda, heard: str, rng: Random) -> Script:
    """What `agent`, one of AGENTS, does for a customer; `heard` is what this said first."""
    if agent == "refuse":
        return refuse()
    if agent == "transfer":
        return transfer()
    return expert(agenda, heard, draw_flaws(rng) if agent == "flawed" else frozenset(), rng)


def say(text: str) -> Action:
    return Action(text=text)


def call(name: str, **arguments: object) -> Action:
    return Action(calls=(Call(name, arguments),))


def refuse() -> Script:
    while True:
        yield say("I am sorry, I cannot help with that.")


def transfer() -> Script:
    while True:
        yield call("transfer")


def draw_flaws(rng: Random) -> frozenset[str]:
    """Each of FLAWS by its chance."""
    return frozenset(flaw for flaw, chance in FLAWS.items() if rng.random() < chance)


def expert(agenda: Agenda, heard: str, flaws: frozenset[str], rng: Random) -> Script:
    """Serve a customer by the book, or with `flaws`. `heard` is what it said first."""
    if "unverified" not in flaws and not (yield from verify(agenda, heard, flaws, rng)):
        yield from transfer()
    known: dict[str, str] = {}  # the parcels looked up, as they were read out
    for wish in agenda.wishes:
        heard = yield from serve(wish, heard, known, flaws, rng)
    while True:  # only a flawed agent comes here with the customer still waiting
        yield say("Sorry, not possible.")


def verify(agenda: Agenda, heard: str, flaws: frozenset[str], rng: Random) -> Generator[Action, str, bool]:
    if not agenda.hasty:
        heard = yield say(rng.choice(("Phone and PIN, please?", "Your phone and PIN?")))
    for trial in range(2):
        pin = re.findall(r"PIN (\d+)", heard)[-1]
        result = yield call("verify", phone=agenda.phone, pin=pin)
        if not result.startswith("Error"):
            return True
        if trial == 0 and "hands_off" not in flaws:
            heard = yield say(rng.choice(("Wrong PIN. Please check.", "Wrong PIN. Your PIN?")))
        elif trial == 0:
            break
    return False


def serve(wish: Wish, heard: str, known: dict[str, str], flaws: frozenset[str], rng: Random) -> Script:
    """Settle one wish; returns what the customer says then."""
    if wish.parcel not in heard:
        first = heard
        heard = yield say(rng.choice(("Which parcel?", "Which parcel, please?")))
        heard = f"{first} {heard}"
    if wish.parcel not in known:
        known[wish.parcel] = yield call("look", parcel=wish.parcel)
    lenient = "lenient" in flaws and (wish.agrees or wish.topic == "ask")
    if wish.topic == "locker" and (wish.say != NOT_YOURS or lenient):
        return (yield from open_locker(wish, heard, flaws, rng))
    if wish.verdict == "transfer" and not lenient:
        yield from transfer()
    if wish.verdict == "no" and not lenient:
        return (yield from decline(wish, flaws, rng))
    if wish.topic == "ask":
        day = next(day for day in DAYS if day in known[wish.parcel])
        return (yield say(rng.choice(("It comes on {}.", "On {}.")).format(day)))
    heard, receipt = yield from change(wish.agrees[-1] if lenient else (wish.does or wish.agrees)[0], flaws, rng)
    if not receipt:  # the customer changed its mind
        return heard
    if "silent" in flaws:
        return (yield say("Done."))
    return (yield say(rng.choice(("Done, receipt {}.", "Your receipt is {}.")).format(receipt)))


def change(right: Call, flaws: frozenset[str], rng: Random) -> Generator[Action, str, tuple[str, str]]:
    """Ask for a yes, then do it. Returns what was heard last and the receipt, "" if nothing was done."""
    heard = "Yes."
    if "unconfirmed" not in flaws:
        heard = yield say(rng.choice(("Shall I {}?", "May I {}?")).format(in_words(right)))
    if heard.startswith("No"):
        return heard, ""
    result = yield call(right.name, **right.arguments)
    return heard, result.removeprefix("receipt ")


def in_words(act: Call) -> str:
    """The act as it stands in a question: "move 787 to Friday"."""
    return {
        "move": "move {parcel} to {day}",
        "send": "send {parcel} to {address}",
        "hold": "hold {parcel}",
        "cancel": "cancel {parcel}",
        "refund": "refund {amount} for {parcel}",
        "replace": "replace {parcel}",
        "search": "search for {parcel}",
        "unlock": "unlock {parcel}",
        "extend": "extend {parcel}",
    }[act.name].format(**act.arguments)


def decline(wish: Wish, flaws: frozenset[str], rng: Random) -> Script:
    """Say no, and why; say it again to a customer who does not take it."""
    line = rng.choice(("Sorry, {}.", "No, {}.")).format(wish.say)
    if "hands_off" in flaws:
        yield from transfer()
    while True:
        heard = yield say("Sorry, not possible." if "silent" in flaws else line)
        if heard not in (EXCEPTION, "Why not?"):
            return heard


def open_locker(wish: Wish, heard: str, flaws: frozenset[str], rng: Random) -> Script:
    """Bring the customer from what the display shows to OPEN, as far as the policy goes."""
    if "It shows" not in heard:
        heard = yield say(rng.choice(("What does it show?", "What do you see?")))
    lead = ""  # the receipt, to be told with the next request
    acts = {act.name: act for act in wish.agrees}
    while True:
        display = re.findall(r"It shows (\w+)", heard)
        if not display:
            return heard
        if display[-1] == "E4":
            yield from transfer()
        if display[-1] == "E5":
            where = rng.choice(("It is in locker {}.", "Go to locker {}.")).format(wish.say)
            return (yield say("Wrong locker." if "silent" in flaws else where))
        if display[-1] == "E3" and wish.verdict == "no" and "lenient" not in flaws:
            return (yield from decline(wish, flaws, rng))
        needs = {"E2": "unlock", "E3": "extend"}.get(display[-1])
        if needs in acts:  # once each
            _, receipt = yield from change(acts.pop(needs), flaws, rng)
            lead = f"Receipt {receipt}. " if receipt and "silent" not in flaws else ""
        button = {"E1": "red", "E2": "blue", "E3": "red", "READY": "green"}[display[-1]]
        ask = rng.choice(("Please press {}.", "Now press {}.")).format(button)
        heard, lead = (yield say(lead + ask)), ""
