"""From verdicts to the number that GRPO compares: partial credit and how it may shape the reward.

The grader's reward itself is never changed; what is made here is another number beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from minitau.episode import Evaluation

SHAPINGS = ("none", "additive", "gated")

# The published weights. In telecom the customer does half of the work, so what it was told counts more.
# Database equality has no weight: in telecom it is false for most gold replays.
CHECK_WEIGHTS = {"action": 0.5, "communicate": 0.15, "env": 0.35, "db": 0.0}
TELECOM_WEIGHTS = {"action": 0.35, "communicate": 0.35, "env": 0.30, "db": 0.0}
DOMAIN_SCALES = {"retail": 0.8, "airline": 1.0, "telecom": 1.6}


def partial(evaluation: Evaluation | None, domain: str) -> float:
    """Weighted mean in [0, 1] over the kinds of checks that are present; 0 if there are none."""
    weights = TELECOM_WEIGHTS if domain == "telecom" else CHECK_WEIGHTS
    passed: dict[str, list[bool]] = {}
    for check in evaluation.checks if evaluation else ():
        passed.setdefault(check.kind, []).append(check.passed)
    present = [kind for kind in weights if kind in passed]  # in one order: `differs` compares exactly
    total = sum(weights[kind] for kind in present)
    if total == 0:
        return 0.0
    # A share first: 3 of 3 is exactly 1, but 0.35 x 3 / 3 is less than 0.35, and RFT's least partial score is a number
    # that such sums meet.
    return sum(weights[kind] * (sum(passed[kind]) / len(passed[kind])) for kind in present) / total


def shape(
    rewards: Sequence[float],
    partials: Sequence[float],
    counted: Sequence[bool],
    *,
    shaping: str,
    alpha: float,
    scale: float = 1.0,
) -> list[float]:
    """The rewards of one group as GRPO compares them: reward + alpha * scale * partial credit.

    `scale` is the domain's: partial credit means more in some than in others.

    none: the reward alone. additive: partial credit everywhere, also where every sample failed;
    normalised, those groups then push as hard as any. gated: partial credit only ranks samples
    inside a group whose outcomes differ. Episodes not `counted` do not open the gate.
    """
    outcomes = {reward for reward, counts in zip(rewards, counted) if counts}
    match shaping:
        case "none":
            use_partial = False
        case "additive":
            use_partial = True
        case "gated":
            use_partial = len(outcomes) > 1
        case _:
            raise ValueError(f"unknown shaping {shaping!r}; choose from {', '.join(SHAPINGS)}")
    credit = alpha if use_partial else 0.0
    return [reward + credit * scale * part for reward, part in zip(rewards, partials)]


def differs(shaped: Sequence[float], counted: Sequence[bool]) -> bool:
    """True if a group's counted rewards differ; otherwise all its advantages are 0 and it teaches nothing."""
    return len({value for value, counts in zip(shaped, counted) if counts}) > 1


def shuffled(shaped: Sequence[float], counted: Sequence[bool], rng: Random) -> list[float]:
    """A group's rewards handed out by lot among its `counted` attempts; the others keep theirs.

    Every permutation is as likely as any other, the one that changes nothing included. Were an
    attempt never given its own reward, it would on average be given the opposite advantage, and the
    control would learn to fail.
    """
    places = [i for i, counts in enumerate(counted) if counts]
    result = list(shaped)
    for place, source in zip(places, rng.sample(places, len(places))):
        result[place] = shaped[source]
    return result


def domain_scale(domain: str) -> float:
    return DOMAIN_SCALES.get(domain, 1.0)
