"""What a made-up desk is made of, and the policy that says so in sentences.

The records stand first, then how each of them reads. This file knows neither how a desk is drawn nor how
people talk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from minitau.base import words

RECORD_STYLES = ("json", "spaced json", "plain", "colons")


@dataclass(frozen=True)
class Act:
    """Something that a customer can ask for, and the tool that does it."""

    tool: str
    verb: str
    argument: str = ""  # what the tool takes besides the thing: a key of words.CHOICES, or a field of the record
    complaint: str = ""  # what is wrong with a thing that needs this act; "" if people ask for it by its verb


@dataclass(frozen=True)
class Rule:
    """What the policy has against an act: a record whose `field` is `value`, or is over `value`."""

    verb: str  # "" for every act
    field: str
    value: str | int | bool
    over: bool
    reason: str  # what to tell the customer; "" means to do something else
    instead: Act | None = None  # that something; None means hand over

    def holds(self, record: dict[str, Any]) -> bool:
        return record[self.field] > self.value if self.over else record[self.field] == self.value


@dataclass(frozen=True)
class Fix:
    """What to do about a code on a machine's panel: a tool first, if there is one, then a part to move."""

    code: str
    tool: str
    move: str  # "turn the left dial"; "" means hand over


@dataclass(frozen=True)
class Domain:
    """A service desk. Tools are named as in the schemas, fields as in the records."""

    thing: str
    ids: tuple[str, ...]  # that may be used here
    login: str  # tool; "" if anybody is served
    asked: tuple[str, ...]  # what the login tool takes
    lookup: str  # tool
    hand_over: str  # tool
    acts: tuple[Act, ...]
    rules: tuple[Rule, ...]
    fixes: tuple[Fix, ...]  # a machine has them, a counter has none
    panel: str
    holder: str  # field with the owner's name; "" if anybody may ask
    holder_reason: str
    state: str  # field
    states: tuple[str, ...]
    number: str  # field
    flag: str  # field
    choice: str  # field, a key of words.CHOICES
    receipt: str  # field of an act's result that the customer is told; "" if none
    confirm: bool
    style: str  # of records, one of RECORD_STYLES
    policy: str = ""
    tools: tuple[dict[str, Any], ...] = ()

    def show(self, record: dict[str, Any]) -> str:
        """A record as a tool returns it."""
        if self.style == "json":
            return json.dumps(record, separators=(",", ":"))
        if self.style == "spaced json":
            return json.dumps(record)
        if self.style == "colons":
            return "; ".join(
                f"{field}: {str(value).lower() if value in (True, False) else value}" for field, value in record.items()
            )
        return ", ".join(
            (field if value else f"not {field}") if isinstance(value, bool) else f"{field} {value}"
            for field, value in record.items()
        )


# -- in sentences ---------------------------------------------------------------------------------------


def write_policy(rng: Random, d: Domain) -> str:
    """Procedure first, in the order of the work; then the rules, in any order."""
    company = rng.choice(words.COMPANIES)
    lines = [rng.choice((f"You work for {company}.", f"This is the desk of {company}.", ""))]
    if d.login:
        both = " and ".join(d.asked)
        lines += [
            rng.choice(
                (
                    f"Ask for the {both}, then {d.login}.",
                    f"Nobody is served before {d.login} has accepted the {both}.",
                    f"Start with {d.login}: it takes the {both}.",
                    f"{capital(both)} come first, for {d.login}.",
                    f"To begin, ask the {both} and {d.login}.",
                )
            ),
            rng.choice(
                (
                    f"If that fails two times, {d.hand_over}.",
                    f"Two failures: {d.hand_over}.",
                    f"When it has failed twice, {d.hand_over}.",
                )
            ),
        ]
    lines.append(rng.choice((f"Use {d.lookup} before deciding.", f"Always {d.lookup} next.", f"Now {d.lookup}.")))
    if d.holder:
        reason = d.holder_reason
        lines.append(
            rng.choice(
                (
                    f'Only the {d.holder} may ask, anyone else hears "{reason}".',
                    f'If the {d.holder} is a different one: "{reason}".',
                    f'Not the {d.holder}: "{reason}".',
                    f'When the {d.holder} has another name, say "{reason}".',
                )
            )
        )
    if d.confirm:
        lines.append(
            rng.choice(
                (
                    "Ask for consent before acting.",
                    "Repeat the wish and wait for agreement.",
                    "Say what you would do, and do it after a yes.",
                )
            )
        )
    if d.receipt:
        lines.append(
            rng.choice(
                (f"Afterwards tell the {d.receipt}.", f"Name the {d.receipt} at the end.", f"Then say the {d.receipt}.")
            )
        )
    special = [write_act(rng, d, act) for act in d.acts] + [write_fix(rng, d, fix) for fix in d.fixes]
    special.append(write_common(rng, d))
    rng.shuffle(special)
    return " ".join(line for line in (*lines, *special) if line)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def write_act(rng: Random, d: Domain, act: Act) -> str:
    """What the policy says about one act: when it is due, what it takes, what stands against it."""
    head = f"{capital(act.complaint)}: {act.verb}" if act.complaint else capital(act.verb)
    head += f" by the {act.argument}" if act.argument == d.number else ""
    rules = [rule for rule in d.rules if rule.verb == act.verb]
    noes = [rule for rule in rules if rule.reason]
    text = head
    if noes:
        clauses = [write_no(rng, rule) for rule in noes]
        lead = rng.choice((", but not if ", ", not if ", "; no if ", " unless "))
        text += lead + " or ".join(clauses)
        if len(noes) == 1 and noes[0].over and rng.random() < 0.3:
            text = f'{head} up to {noes[0].field} {noes[0].value}, or else "{noes[0].reason}"'
    for rule in rules:
        if not rule.reason:
            other = rule.instead
            what = d.hand_over if not other else other.verb + (f" by the {d.number}" if other.argument else "")
            when = write_condition(rng, rule)
            text += rng.choice((f", but if {when} {what}", f"; if {when}, {what}", f"; {what} if {when}"))
    return f"{text}." if rules or text != capital(act.verb) else ""


def write_no(rng: Random, rule: Rule) -> str:
    when = write_condition(rng, rule)
    return rng.choice((f'{when} ("{rule.reason}")', f'{when}: "{rule.reason}"', f'{when}, that is "{rule.reason}"'))


def write_condition(rng: Random, rule: Rule) -> str:
    if rule.over:
        how = rng.choice(("over", "over", "above", "more than"))
        return f"{rng.choice(('', 'the '))}{rule.field} is {how} {rule.value}"
    if isinstance(rule.value, bool):
        plain = rule.field if rule.value else f"not {rule.field}"
        return rng.choice((plain, f"it is {plain}", f"{rule.field} is {str(rule.value).lower()}"))
    return rng.choice((f"{rule.field} is {rule.value}", f"the {rule.field} is {rule.value}", f"it is {rule.value}"))


def write_common(rng: Random, d: Domain) -> str:
    """The rules against every act."""
    states = [rule for rule in d.rules if not rule.verb and not rule.over]
    text = ""
    if states and states[0].reason == states[0].value:
        shut = " or ".join(f'"{rule.value}"' for rule in states)
        text = rng.choice(
            (f"Do nothing when it is {shut}.", f"Touch none that is {shut}.", f"Leave alone what is {shut}.")
        )
    elif states:
        shut = " or ".join(f'{rule.value} ("{rule.reason}")' for rule in states)
        text = rng.choice((f"Do nothing when {d.state} is {shut}.", f"If {d.state} is {shut}, no act at all."))
    limits = [rule for rule in d.rules if not rule.verb and rule.over]
    for rule in limits:
        text += f" If {rule.field} is over {rule.value}, {d.hand_over}."
    return text.strip()


def write_fix(rng: Random, d: Domain, fix: Fix) -> str:
    if not fix.move:
        return f"{fix.code}: {d.hand_over}."
    if fix.tool:
        return rng.choice((f"{fix.code}: {fix.tool}, then {fix.move}.", f"{fix.code}: first {fix.tool}, {fix.move}."))
    return rng.choice((f"{fix.code}: {fix.move}.", f"On {fix.code} one must {fix.move}."))
