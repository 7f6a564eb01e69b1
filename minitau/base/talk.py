"""Draws a conversation at one of the made-up desks: a customer, and an agent that goes by the policy.

The agent is always right: what it can learn here is how to do a desk's work by reading, not how to err.
This file knows no tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from minitau.base import words
from minitau.base.domains import draw_domain
from minitau.base.policy import Act, Domain, Fix, Rule
from minitau.episode import Call, Message, Opening
from minitau.sft import Conversation

WANTS = (
    "please {verb} {it}{to}.",
    "I would like to {verb} {it}{to}.",
    "could you {verb} {it}{to}?",
    "can you {verb} {it}{to} for me?",
    "I want you to {verb} {it}{to}.",
)
ASKS = ("what is the {field} of {it}?", "can you tell me the {field} of {it}?", "I need the {field} of {it}.")
COMPLAINTS = (
    "{it} is {complaint}.",
    "{it} has become {complaint}!",
    "{it} came {complaint}.",
    "{it}? It is {complaint}.",
)
TROUBLES = ("{it} does not work.", "I have trouble with {it}.", "{it} has stopped.", "I cannot use {it}.")
YES = ("Yes.", "Yes, go on.", "Right.", "That is right.", "Sure.", "Do it.", "OK.")
NO = ("No, stop.", "No, I have thought again.", "No.", "Rather not.")
THANKS = ("Thank you.", "Great, thanks.", "Thanks a lot.", "Good.")
BEND = ("Are you sure?", "Can you not bend the rule?", "It is urgent!", "But I need it.", "Really?")
BYE = ("Bye.", "See you.", "Goodbye.", "That was all.")


@dataclass(frozen=True)
class Want:
    """One thing that a customer wants: an act, or the value of a field, or a machine that works."""

    id: str
    record: dict[str, Any]
    act: Act | None = None
    value: Any = None  # what the customer wants it to be given
    field: str = ""  # what is asked for, if there is no act
    codes: tuple[Fix, ...] = ()  # what the machine's panel shows, one after the other
    against: Rule | None = None
    foreign: bool = False  # the record is another person's
    dropped: bool = False  # the customer says no when asked to confirm


def draw_conversation(rng: Random, held_out: bool = False) -> Conversation:
    """A whole conversation in a domain of its own."""
    domain = draw_domain(rng, held_out)
    talk = Talk(domain, rng)
    return Conversation(Opening(domain.policy, domain.tools, tuple(talk.opening)), tuple(talk.messages), 0)


class Talk:
    """Writes `opening` and `messages` of one conversation, from the first word to the last."""

    def __init__(self, domain: Domain, rng: Random):
        self.d, self.rng = domain, rng
        self.name, self.stranger = rng.sample(words.NAMES, 2)
        ids = rng.sample(domain.ids, 12)
        self.credentials = [self.draw_credential(field, ids) for field in domain.asked]
        self.style = rng.randrange(60)
        self.shy = rng.random() < 0.3  # names the thing only when asked
        self.messages: list[Message] = []
        self.over = False
        self.wants = [self.draw_want(ids.pop()) for _ in range(1 if rng.random() < 0.8 else 2)]
        hasty = bool(domain.login) and rng.random() < 0.3
        first = f"{rng.choice(('Hi', 'Hello', 'Good day', 'Excuse me'))}, {self.words_for(self.wants[0])}"
        first = first + " " + self.my(domain.asked) if hasty else first
        greeting = [Message("assistant", rng.choice(("Hello!", "Good day, what is it?", "How may I be of use?")))]
        self.opening = greeting * (rng.random() < 0.7) + [Message("user", first)]
        if domain.login:
            self.identify(hasty, rng.choices(("right", "slip", "never"), (0.75, 0.17, 0.08))[0], ids)
        for want, following in zip(self.wants, [*self.wants[1:], None]):
            if not self.over:
                self.serve(want, following)

    # -- what there is ------------------------------------------------------------------------------------

    def draw_credential(self, field: str, ids: list[str]) -> str:
        if field in ("city", "colour") and self.rng.random() < 0.7:
            return self.rng.choice(words.CHOICES[field])
        return ids.pop()

    def draw_record(self) -> dict[str, Any]:
        d, rng = self.d, self.rng
        record = {
            d.state: rng.choice(d.states),
            d.number: rng.randint(1, 12),
            d.flag: rng.random() < 0.5,
            d.choice: rng.choice(words.CHOICES[d.choice]),
        }
        if d.holder:
            record[d.holder] = self.name
        return record

    def draw_want(self, id: str) -> Want:
        """A want that at most one rule stands against."""
        d, rng = self.d, self.rng
        act = rng.choice(d.acts) if rng.random() < 0.85 and not d.fixes else None
        mine = [rule for rule in d.rules if not rule.verb or (act and rule.verb == act.verb)]
        against = rng.choice(mine) if mine and act and rng.random() < 0.5 else None
        also = [rule for rule in d.rules if against and against.instead and rule.verb == against.instead.verb]
        record = self.draw_record()
        tries = 0
        while [rule for rule in mine + also if rule.holds(record)] != [against] * bool(against):
            record, tries = self.draw_record(), tries + 1
            if tries == 100:  # that act is never possible where this one is not
                against, also = None, []
        foreign = bool(d.holder) and not against and rng.random() < 0.12
        if foreign:
            record[d.holder] = self.stranger
        codes = tuple(rng.sample(d.fixes, rng.choice((1, 1, 2, 3)))) if d.fixes else ()
        if codes:
            handed = [i for i, fix in enumerate(codes) if not fix.move]
            codes = codes[: handed[0] + 1] if handed else codes
        value = rng.choice(words.CHOICES[act.argument]) if act and act.argument in words.CHOICES else None
        field = "" if act else rng.choice((d.state, d.number, d.choice))
        dropped = bool(act) and rng.random() < 0.1
        items = list(record.items())
        rng.shuffle(items)
        return Want(id, dict(items), act, value, field, codes, against, foreign, dropped)

    # -- how people put it --------------------------------------------------------------------------------

    def agent(self, *lines: str) -> None:
        self.messages.append(Message("assistant", self.rng.choice(lines)))

    def customer(self, *lines: str) -> None:
        self.messages.append(Message("user", self.rng.choice(lines)))

    def call(self, tool: str, arguments: dict[str, Any], result: Any) -> None:
        self.messages.append(Message("assistant", "", (Call(tool, arguments),)))
        self.messages.append(Message("tool", result if isinstance(result, str) else self.d.show(result)))

    def hand_over(self) -> None:
        self.call(self.d.hand_over, {}, "ok")
        self.over = True

    def my(self, fields: tuple[str, ...]) -> str:
        """The customer's credentials, in speech."""
        pairs = [(field, self.credentials[self.d.asked.index(field)]) for field in fields]
        forms = ("my {} is {}", "{} {}", "the {} is {}", "{}: {}")
        text = (", ", " and ")[self.style % 2].join(forms[self.style % 4].format(*pair) for pair in pairs)
        return f"{text[0].upper()}{text[1:]}."

    def words_for(self, want: Want) -> str:
        it = f"my {self.d.thing}" if self.shy else (f"{self.d.thing} {want.id}", want.id)[self.style % 2]
        if self.d.fixes:
            return self.rng.choice(TROUBLES).format(it=it)
        if not want.act:
            return self.rng.choice(ASKS).format(it=it, field=want.field)
        if want.act.complaint:
            return self.rng.choice(COMPLAINTS).format(it=it, complaint=want.act.complaint)
        to = self.towards(want) if want.value is not None else ""
        return self.rng.choice(WANTS).format(it=it, verb=want.act.verb, to=to)

    def towards(self, want: Want) -> str:
        return {"month": " in {}", "sum": " for {}", "number": " with {}"}.get(want.act.argument, " to {}").format(
            want.value
        )

    def ends(self, following: Want | None, lead: str = "") -> None:
        """The customer goes on to the next wish, or leaves."""
        thanks = lead + self.rng.choice(THANKS)
        if following is None:
            self.customer(f"{thanks} {self.rng.choice(BYE)}")
        else:
            self.shy = False
            text = self.words_for(following)
            self.customer(f"{thanks} {self.rng.choice(('And', 'Next,', 'One more:'))} {text}")

    # -- the agent's work, step by step ---------------------------------------------------------------------

    def identify(self, hasty: bool, course: str, ids: list[str]) -> None:
        """Ask who it is and check it; the second failure ends the conversation."""
        d = self.d
        both = " and ".join(d.asked)
        right = self.credentials
        wrong = [*right[:-1], ids.pop()]
        if hasty and course != "right":
            course = "right"  # what was said in the first line is already the right credential
        for attempt in range(2):
            self.credentials = wrong if course == "never" or (course == "slip" and attempt == 0) else right
            if attempt == 0 and not hasty:
                self.ask_credentials(both)
            elif attempt == 1:
                self.agent(f"That {d.asked[-1]} is not right. Again, please?", f"No match. Your {d.asked[-1]} again?")
                self.customer(self.my(d.asked[-1:]))
            accepted = self.credentials is right
            failure = self.rng.choice(("Error: no match", "Error: not accepted", "Error: wrong"))
            result = {"name": self.name} if accepted else failure
            self.call(d.login, dict(zip(d.asked, self.credentials)), result)
            if accepted:
                return
            wrong = [*wrong[:-1], ids.pop()]
        self.hand_over()

    def ask_credentials(self, both: str) -> None:
        if len(self.d.asked) == 2 and self.rng.random() < 0.25:
            for field in self.d.asked:
                self.agent(f"What is your {field}?", f"The {field}, please?")
                self.customer(self.my((field,)))
            return
        self.agent(
            f"May I have the {both}?", f"I need your {both}.", f"What are the {both}?", f"Tell me the {both}, please."
        )
        self.customer(self.my(self.d.asked))

    def serve(self, want: Want, following: Want | None) -> None:
        d = self.d
        if self.shy:
            self.agent(f"Which {d.thing} is it?", f"What is the number of the {d.thing}?", f"Which {d.thing}?")
            self.customer(f"It is {want.id}.", f"{want.id}.", f"Number {want.id}.")
            self.shy = False
        self.call(d.lookup, {d.thing: want.id}, want.record)
        if want.foreign:
            return self.decline(d.holder_reason, following)
        if want.codes:
            return self.mend(want, following)
        if not want.act:
            value = want.record[want.field]
            self.agent(f"The {want.field} is {value}.", f"It is {value}.", f"{want.field}: {value}.")
            return self.ends(following)
        against = want.against
        if against and not against.reason and not against.instead:
            return self.hand_over()
        if against and against.reason:
            return self.decline(against.reason, following)
        act = against.instead if against else want.act
        value = want.record[d.number] if act.argument == d.number else want.value
        to = f" by {value}" if act.argument == d.number else self.towards(want) if act.argument else ""
        if d.confirm:
            what = f"{act.verb} {want.id}{to}"
            self.agent(
                f"I would {what}. Agreed?", f"So I {what}, right?", f"Do you agree that I {what}?", f"Can I {what}?"
            )
            if want.dropped:
                self.customer(f"{self.rng.choice(NO)} {self.rng.choice(BYE)}")
                self.over = True
                return None
            self.customer(*YES)
        receipt = self.act(act, want.id, value)
        ready = self.rng.choice(("All set", "It is settled", "That worked", "Finished"))
        self.agent(f"{ready}: {d.receipt} {receipt}." if receipt else f"{ready}.")
        return self.ends(following)

    def act(self, act: Act, id: str, value: Any = None) -> str:
        """Call the tool; what it gives back to be told, "" if nothing."""
        receipt = self.rng.choice(self.d.ids)
        arguments = {self.d.thing: id} | ({act.argument: value} if act.argument else {})
        self.call(act.tool, arguments, {self.d.receipt: receipt} if self.d.receipt else "ok")
        return receipt if self.d.receipt else ""

    def decline(self, reason: str, following: Want | None) -> None:
        lines = (f"I am afraid not: {reason}.", f"That is ruled out: {reason}.", f"No: {reason}.")
        self.agent(*lines)
        if self.rng.random() < 0.3:
            self.customer(*BEND)
            self.agent(*lines)
        self.ends(following)

    def mend(self, want: Want, following: Want | None) -> None:
        """Bring a machine to work: the panel shows one code after the other."""
        d, rng = self.d, self.rng
        self.agent(f"What does the {d.panel} say?", f"What is on the {d.panel}?", f"Please read me the {d.panel}.")
        tools = {act.tool: act for act in d.acts}
        for i, fix in enumerate(want.codes):
            lead = "" if i == 0 else rng.choice(("Now ", "Then "))
            self.customer(f"{lead}{'it' if lead else 'It'} says {fix.code}.", f"{lead}{fix.code}.")
            if not fix.move:
                return self.hand_over()
            told = ""
            if fix.tool:
                if d.confirm:
                    self.agent(
                        f"I would {tools[fix.tool].verb} {want.id}. Agreed?",
                        f"Shall we {tools[fix.tool].verb} {want.id}?",
                    )
                    self.customer(*YES)
                receipt = self.act(tools[fix.tool], want.id)
                told = f"{d.receipt} {receipt}. " if receipt else ""
            self.agent(f"{told}Please {fix.move}.", f"{told}Now {fix.move}.", f"{told}Could you {fix.move}?")
        self.ends(following, self.rng.choice(("It works. ", "It runs again. ")))
