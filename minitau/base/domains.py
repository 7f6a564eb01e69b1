"""Draws made-up service domains: things, tools and rules.

Two kinds. At a counter the agent reads a record and changes it, unless a rule of the policy stands
against that. At a machine only the customer can touch the panel: the policy says what to do about each
code that it shows. Every word is drawn, so that a model can only do right by reading.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from minitau.base import words
from minitau.base.policy import RECORD_STYLES, Act, Domain, Fix, Rule, write_policy


def word(rng: Random, known: list[str]) -> str:
    """One of `known`, or any other word, or one that nobody has heard."""
    source = rng.random()
    if source < 0.1:
        return "".join(rng.sample(words.SYLLABLES, rng.choice((2, 2, 3))))
    return rng.choice(words.EVERYDAY if source < 0.3 else known)


def distinct(rng: Random, known: list[str], n: int, without: tuple[str, ...] = ()) -> list[str]:
    drawn: list[str] = []
    while len(drawn) < n:
        one = word(rng, known)
        if one not in drawn and one not in without:
            drawn.append(one)
    return drawn


def draw_domain(rng: Random, held_out: bool = False) -> Domain:
    """A domain at random. Held-out ones have things and ids that no other has."""
    machine = rng.random() < 0.3
    names: tuple[str, ...] = ()
    while len(set(names)) < 6:  # a record has no two fields of one name
        lists = (words.STATE_FIELDS, words.NUMBER_FIELDS, words.FLAG_FIELDS)
        thing = rng.choice(words.HELD_OUT_THINGS) if held_out else word(rng, words.THINGS)
        names = (thing, rng.choice(words.HOLDERS), rng.choice(tuple(words.CHOICES)), *(word(rng, w) for w in lists))
    thing, holder, choice, state, number, flag = names
    login = rng.choice(words.LOGINS) if rng.random() < 0.85 else ""
    draft = Domain(
        thing=thing,
        ids=words.HELD_OUT_IDS if held_out else words.TRAINED_IDS,
        login=login,
        asked=tuple(distinct(rng, words.LOGIN, rng.choice((1, 2, 2, 2)), (thing,))),
        lookup=rng.choice(words.LOOKUPS) + f"_{thing}" * (rng.random() < 0.6),
        hand_over=rng.choice(words.HAND_OVERS),
        acts=tuple(draw_acts(rng, thing, number, machine)),
        rules=(),
        fixes=(),
        panel=rng.choice(words.PANELS),
        holder=holder if login and rng.random() < 0.8 else "",  # the login tells the name
        holder_reason=draw_reason(rng),
        state=state,
        states=tuple(distinct(rng, words.STATES, 4)),
        number=number,
        flag=flag,
        choice=choice,
        receipt=rng.choice(words.RECEIPTS) if rng.random() < 0.8 else "",
        confirm=rng.random() < 0.8,
        style=rng.choice(RECORD_STYLES),
    )
    drawn = {"fixes": draw_fixes(rng, draft.acts)} if machine else {"rules": draw_rules(rng, draft)}
    draft = replace(draft, **drawn)
    return replace(draft, policy=write_policy(rng, draft), tools=write_tools(rng, draft))


def draw_acts(rng: Random, thing: str, number: str, machine: bool) -> list[Act]:
    taken = (thing, *words.LOOKUPS, *words.LOGINS, *words.HAND_OVERS)
    verbs = distinct(rng, words.VERBS, 2 if machine else rng.choice((2, 3, 3, 4)), taken)
    complaints = distinct(rng, words.COMPLAINTS, len(verbs))
    alone = rng.random() < 0.5  # tools named by their verb alone
    acts = []
    for verb, complaint in zip(verbs, complaints):
        kinds = [kind for kind in words.CHOICES if kind not in (thing, number)]
        argument = "" if machine or rng.random() < 0.35 else rng.choice((number, *kinds))
        complains = not machine and argument in ("", number) and rng.random() < 0.5
        acts.append(Act(verb if alone else f"{verb}_{thing}", verb, argument, complaint if complains else ""))
    return acts


def draw_reason(rng: Random) -> str:
    return f"{rng.choice(words.REASON_HEADS)} {rng.choice(words.REASON_TAILS)}"


def draw_rules(rng: Random, d: Domain) -> tuple[Rule, ...]:
    """Up to two rules an act, on different fields, and maybe some against every act."""
    shut = d.states[: rng.choice((0, 0, 1, 2))]
    own = rng.random() < 0.5  # the state itself is the reason
    rules = [Rule("", d.state, state, False, state if own else draw_reason(rng)) for state in shut]
    limited = rng.random() < 0.2  # one limit for every act
    if limited:
        rules.append(Rule("", d.number, rng.randint(4, 10), True, ""))
    for act in d.acts:
        about = [(d.state, rng.choice(d.states[len(shut) :]), False), (d.flag, rng.random() < 0.3, False)]
        about += [] if limited else 2 * [(d.number, rng.randint(2, 10), True)]
        drawn = rng.sample(about, rng.choice((0, 1, 1, 2)))
        others = [other for other in d.acts if other is not act and other.argument in ("", d.number)]
        for field, value, over in {field: (field, value, over) for field, value, over in drawn}.values():
            kind = rng.random()
            reason = draw_reason(rng) if kind < 0.7 else ""
            instead = rng.choice(others) if kind > 0.85 and others else None
            rules.append(Rule(act.verb, field, value, over, reason, instead))
    return tuple(rules)


def draw_fixes(rng: Random, acts: tuple[Act, ...]) -> tuple[Fix, ...]:
    """Codes in a row: the first need a tool, the last is beyond the desk."""
    codes = rng.sample([f"{letter}{n}" for letter in "ABCDEFHKLMT" for n in range(1, 10)], rng.choice((3, 4, 5)))
    parts = rng.sample(words.PARTS, len(codes))
    tools = [act.tool for act in acts] + [""] * len(codes)
    fixes = [
        Fix(code, tool, f"{rng.choice(words.PART_VERBS)} the {rng.choice(words.PART_COLOURS)}{part}")
        for code, tool, part in zip(codes, tools, parts)
    ]
    return (*fixes[:-1], Fix(codes[-1], "", ""))


def write_tools(rng: Random, d: Domain) -> tuple[dict[str, Any], ...]:
    """The OpenAI function schemas, in any order."""
    takes = {d.lookup: (d.thing,), d.hand_over: ()}
    if d.login:
        takes[d.login] = d.asked
    for act in d.acts:
        takes[act.tool] = (d.thing, act.argument) if act.argument else (d.thing,)
    names = list(takes)
    rng.shuffle(names)
    return tuple(schema(name, takes[name], d.number) for name in names)


def schema(name: str, arguments: tuple[str, ...], number: str) -> dict[str, Any]:
    types = {argument: {"type": "integer" if argument in ("sum", number) else "string"} for argument in arguments}
    parameters = {"type": "object", "properties": types, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}
