"""The scripted customer. It knows its agenda and can press the buttons in front of it.

It understands free text by patterns, so that no agent has to learn a phrase. It must not know the
database, the tools, the grading, or whether a scripted agent or a model speaks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from random import Random

from minitau.envs.courier.words import (
    ACTS,
    DAYS,
    EXCEPTION,
    LOCKERS,
    PARCELS,
    REASONS,
    RECEIPTS,
    STREETS,
    Agenda,
)
from minitau.episode import Call

WANTS = {  # what a customer says it wants; {it} is the parcel, {to} a day or an address
    "ask": ("which day does {it} come?", "when will {it} come?"),
    "day": ("please move {it} to {to}.", "I need {it} on {to}."),
    "address": ("please send {it} to {to}.", "{it} must go to {to}."),
    "hold": ("please hold {it}.", "I am away, hold {it}."),
    "cancel": ("please cancel {it}.", "I do not need {it}, cancel it."),
    "broken": ("{it} is broken, please refund it.", "{it} came broken. My money back!"),
    "renew": ("{it} is broken, please replace it.", "{it} came broken. A new one, please."),
    "lost": ("{it} is lost, please refund it.", "{it} never came. My money back!"),
    "locker": ("I cannot get {it} out.", "the locker keeps {it}."),
}


def spots(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


def any_of(ids: tuple[str, ...]) -> str:
    """One of these numbers, whatever letters or signs stand around it ("P787", "#787")."""
    return rf"(?<!\d)(?:{'|'.join(ids)})(?!\d)"


AGE = "".join(rf"(?<!\b{lead} )" for lead in ("age", "aged", "age:", "age is", "age of"))
DAY = spots(rf"\b(?:{'|'.join(DAYS)})\b")
SPOKEN = {  # how the arguments of a call look in speech
    "parcel": spots(any_of(PARCELS)),
    "day": DAY,
    "address": spots(rf"\b\d+ (?:{'|'.join(STREETS)})\b"),
    # any number but an id, an age or an address
    "amount": spots(rf"(?<![\w.]){AGE}(?![78]\d\d\b)\d+\b(?! (?:days?|{'|'.join(STREETS)})\b)"),
}
MENTION = {  # how the acts themselves do
    "move": DAY,
    "send": SPOKEN["address"],
    "hold": spots(r"\bhold(?! on)"),
    "cancel": spots(r"\bcancel"),
    "refund": spots(r"\brefund|money back|\bpay"),
    "replace": spots(r"\breplace|new one"),
    "search": spots(r"\bsearch|look for"),
    "unlock": spots(r"\bunlock"),
    "extend": spots(r"\bexten|more time"),
}
PRESS = spots(r"\b(?:press|push|hit|tap)\b")
DO_NOT_PRESS = spots(r"(?:\bnot|n't|\bnever) (?:press|push|hit|tap) (?:the )?\w+")
BUTTON = spots(r"\b(?:red|green|blue)\b")
PHONE = spots(r"\bphone|\bverify\b|authenticate\b|credential|who you are")
PIN = spots(r"\bpin\b|\bverify\b|authenticate\b|credential|who you are")
ASKS = spots(r"\?|please|tell|give|need|confirm|shall i|provide|could you|may i")
REFUSES = spots(r"n't\b|\bcan ?not\b|unable|not able|not allowed|not possible|against|refuse\b")
DONE = spots(r"\bdone\b|\b(?:chang|mov|updat|cancell?|refund|replac|extend|unlock|start)ed\b|\bheld\b|has been")
RECEIPT = spots(r"\breceipt\b")
ELSE = spots(r"[^.!?]*(?:anything|something) else[^.!?]*[.!?]?")
WHICH = spots(r"parcel|which|package|\bid\b")
DISPLAY = spots(r"display|screen|shows?\b|see\b")


class Customer:
    """Follows its agenda through whatever an agent says. `over` once it has left.

    `look()` reads the locker's display, `press(button)` presses a button there. `agreed` are the
    changes to which it has said yes.
    """

    def __init__(self, agenda: Agenda, look: Callable[[], str], press: Callable[[str], None], rng: Random):
        self.agenda, self.look, self.press = agenda, look, press
        self.style = rng.randrange(4)  # two bits: how it asks and agrees, how it logs in
        self.agreed: list[Call] = []
        self.over = False
        self.open = not agenda.shy
        self.at = 0  # which wish
        self.pins_said = 0
        self.noes = 0  # refusals of this wish
        self.slips = agenda.slips
        self.patience = 3
        self.replies: set[str] = set()  # since something last moved

    def greet(self) -> str:
        login = f" {self.login(True, True)}" if self.agenda.hasty else ""
        return f"Hi, {self.want()}{login}"

    def hear(self, text: str) -> str:
        """Answer the agent. Saying the same thing again without anything moving costs patience."""
        reply = self.answer(text.replace("\u2019", "'").replace(".00", ""))
        self.patience -= reply in self.replies
        self.replies.add(reply)
        if self.patience <= 0 and not self.over:
            self.over, reply = True, "This leads nowhere. Goodbye."
        return reply

    def answer(self, text: str) -> str:
        wish = self.agenda.wishes[self.at]
        locker = wish.topic == "locker"
        closes, text = bool(ELSE.search(text)), ELSE.sub("", DO_NOT_PRESS.sub("", text))
        asks = bool(ASKS.search(text))
        reason = tells_any(text, REASONS[self.agenda.family])
        refuses = bool(REFUSES.search(text))
        if locker and PRESS.search(text) and BUTTON.search(text):
            return self.press_all(BUTTON.findall(text))
        if locker and self.look() == "E5" and tells_any(text, LOCKERS):
            return self.move_on("Oh, I am at the wrong one.")
        if wish.topic == "ask" and tells_any(text, DAYS):
            return self.move_on("Thank you.")
        if (reason and refuses) or ((reason or refuses) and "?" not in text):
            return self.refused(reason)
        receipt = RECEIPT.search(text) or tells_any(text, RECEIPTS)
        if receipt or (DONE.search(text) and "?" not in text) or (closes and not text.strip()):
            return self.shows() if locker else self.move_on("Thank you.")
        if asks and any(states(text, act) for act in wish.agrees):
            return self.agree(next(act for act in wish.agrees if states(text, act)))
        if asks and (PHONE.search(text) or PIN.search(text)):
            return self.login(bool(PHONE.search(text)), bool(PIN.search(text)))
        if locker and DISPLAY.search(text):
            return self.shows()
        stated = any(MENTION[act].search(text) for act in ACTS[self.agenda.family])
        if asks and WHICH.search(text) and not stated:
            self.open = True
            return f"It is {wish.parcel}."
        self.open = self.open or asks
        self.patience -= not asks
        return f"{'No. ' * (asks and stated)}{sentence(self.want())}"

    def want(self) -> str:
        wish = self.agenda.wishes[self.at]
        lines = WANTS[wish.topic]
        line = lines[self.style % len(lines)].format(it=wish.parcel if self.open else "my parcel", to=wish.to)
        return f"{line} {self.shows()}" if wish.topic == "locker" and self.open else line

    def login(self, phone: bool, pin: bool) -> str:
        number = self.agenda.phone
        if not pin:
            return f"Phone {number}."
        code = self.agenda.pins[min(self.pins_said, len(self.agenda.pins) - 1)]
        self.pins_said += 1
        if not phone:
            return f"PIN {code}."
        return (f"It is {number}, PIN {code}.", f"Phone {number}, PIN {code}.")[self.style // 2 % 2]

    def agree(self, act: Call) -> str:
        """Say yes to a change that was stated in full, unless this is where it changes its mind."""
        self.replies.clear()
        if self.agenda.wishes[self.at].dropped:
            self.at += 1
            return f"No, wait. {sentence(self.want())}"
        self.agreed.append(act)
        return ("Yes.", "Yes, please.")[self.style % 2]

    def refused(self, reason: bool) -> str:
        self.noes += 1
        if self.noes == 1 and not reason:
            return "Why not?"
        if self.noes == 1 and self.agenda.pushy:
            return EXCEPTION
        return self.move_on("Too bad.")

    def press_all(self, buttons: list[str]) -> str:
        before, lead = self.look(), ""
        for button in buttons:
            if self.slips and button.lower() != "green":
                self.slips, button, lead = False, "green", "Oops, I pressed green. "
            self.press(button.lower())
            if lead or self.look() == "OPEN":
                break
        if self.look() == "OPEN":
            return self.move_on("It is open.")
        if self.look() != before:
            self.replies.clear()
        return lead + self.shows()

    def shows(self) -> str:
        return f"It shows {self.look()}."

    def move_on(self, lead: str) -> str:
        """Bring up the next wish, or leave."""
        self.at, self.noes = self.at + 1, 0
        self.replies.clear()
        if self.at == len(self.agenda.wishes):
            self.over, self.at = True, self.at - 1
            return f"{lead} Bye."
        return f"{lead} {sentence('also, ' + self.want())}"


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def tells_any(text: str, words: tuple[str, ...]) -> bool:
    return any(tells(text, word) for word in words)


def tells(text: str, word: str) -> bool:
    """True if `text` says `word`: an id, a day or a reason. "It is not on the van" does not say "on the van",
    though "it is not insured" says "not insured"."""
    return any(not found["denied"] for found in telling(word).finditer(text))


@cache
def telling(word: str) -> re.Pattern[str]:
    whole = r"[\W_]+".join(word.split())
    said = any_of((word,)) if word.isdecimal() else rf"(?<![^\W_]){whole}(?![^\W_])"
    return spots(rf"""(?P<denied>(?:\bnot|n['\u2019]t)[\s"'*]+)?{said}""")


def states(text: str, act: Call) -> bool:
    """True if `text` names the act and each argument. Of several values the last is meant ("from
    Monday to Friday")."""
    for name, value in act.arguments.items():
        found = SPOKEN[name].findall(text)
        if not found or found[-1].lower() != str(value).lower():
            return False
    return bool(MENTION[act.name].search(text))
