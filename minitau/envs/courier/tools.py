"""What an agent is given: the policy to read, the tools to call, and what these change.

Arguments are checked for type and id, never for the policy. This file knows neither tasks nor
people, and keeps no state: `write` changes the database that it is handed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minitau.envs.courier.words import ACTS, DAYS
from minitau.episode import Call

COMMON = (
    "You serve the customers of a parcel company. First verify phone and PIN; look nothing up before. "
    "If verifying fails twice, transfer. Look a parcel up before you decide. If its owner is somebody "
    'else, refuse: "not yours". Before each change, name the parcel and the change and get a yes; right '
    "after it, tell the receipt. If a rule forbids a request, change nothing and give the reason in the "
    "quoted words. Transfer only where a rule says so. Age is in days.\n"
)
RULES = {
    "desk": (
        'A parcel "on the van" or "already delivered" cannot be changed. Saturday is "express only". '
        'Cancel up to age 3, not "over 3 days". A new address for a value over 100: transfer.'
    ),
    "claims": (
        "Any claim for a value over 200: transfer. Broken: refund the value or replace, as the customer "
        'likes, but nothing if "not insured" or "over 7 days" old. Lost: nothing if delivered ("signed '
        'for"), sorting or van ("on its way"); if missing, search up to age 7, refund the value after '
        'that. Late: refund 10, "express only".'
    ),
    "locker": (
        "Only the customer can press buttons. Go by the display. E1: press red. E2: unlock_door, then "
        'press blue. E3: extend_time, then press red; but "only once", and not for an age "over 5 days". '
        "E4: transfer. E5: tell the locker that the parcel is in. READY: press green. OPEN: solved. "
        "Any other press of blue breaks the locker."
    ),
}
POLICY = {family: COMMON + rules for family, rules in RULES.items()}

WORD = {"type": "string"}
ARGUMENTS = {  # the schema of each argument, wherever it is used
    "phone": WORD,
    "pin": WORD,
    "parcel": WORD,
    "day": {"type": "string", "enum": list(DAYS)},
    "address": {"type": "string", "minLength": 1, "maxLength": 40},
    "amount": {"type": "integer", "minimum": 1, "maximum": 1000},
}
TOOLS = {  # name -> description, arguments
    "verify": ("Check who the customer is.", ("phone", "pin")),
    "get_parcel": ("Look a parcel up.", ("parcel",)),
    "set_day": ("Change the delivery day.", ("parcel", "day")),
    "set_address": ("Change the address.", ("parcel", "address")),
    "hold": ("Hold at the depot.", ("parcel",)),
    "cancel": ("Cancel a parcel.", ("parcel",)),
    "refund": ("Pay money back.", ("parcel", "amount")),
    "replace": ("Send a new one.", ("parcel",)),
    "search": ("Start a search.", ("parcel",)),
    "unlock_door": ("Unlock the locker door.", ("parcel",)),
    "extend_time": ("Extend the time in the locker.", ("parcel",)),
    "transfer": ("Hand over to a human.", ()),
}
SHOWN = {  # what get_parcel reads out
    "desk": ("owner", "status", "day", "service", "age", "value"),
    "claims": ("owner", "status", "service", "age", "value", "insured"),
    "locker": ("owner", "locker", "age", "extended"),
}
WRITES: dict[str, Callable[..., dict[str, Any]]] = {  # what an act changes in the parcel's row
    "set_day": lambda row, day: {"day": day},
    "set_address": lambda row, address: {"address": address},
    "hold": lambda row: {"status": "held"},
    "cancel": lambda row: {"status": "cancelled"},
    "refund": lambda row, amount: {"refunded": row["refunded"] + amount},
    "replace": lambda row: {"replaced": True},
    "search": lambda row: {"searched": True},
    "unlock_door": lambda row: {"unlocked": True},
    "extend_time": lambda row: {"extended": True, "renewed": True},
}


def schemas(family: str) -> tuple[dict[str, Any], ...]:
    """The OpenAI function schemas of a family's tools."""
    out = []
    for name in ("verify", "get_parcel", *ACTS[family], "transfer"):
        description, arguments = TOOLS[name]
        parameters = {
            "type": "object",
            "properties": {argument: ARGUMENTS[argument] for argument in arguments},
            "required": list(arguments),
        }
        function = {"name": name, "description": description, "parameters": parameters}
        out.append({"type": "function", "function": function})
    return tuple(out)


def problem(call: Call, family: str) -> str:
    """What is wrong with a call, whatever JSON it was made of; "" if it fits its schema."""
    if call.name not in ("verify", "get_parcel", *ACTS[family], "transfer"):
        return "there is no such tool"
    wanted = TOOLS[call.name][1]
    if not isinstance(call.arguments, dict) or set(call.arguments) != set(wanted):
        return f"{call.name} takes exactly: {', '.join(wanted) or 'nothing'}"
    for name, value in call.arguments.items():
        schema = ARGUMENTS[name]
        if schema["type"] == "integer":
            if type(value) is not int or not schema["minimum"] <= value <= schema["maximum"]:
                return f"{name} must be a whole number from {schema['minimum']} to {schema['maximum']}"
        elif not isinstance(value, str):
            return f"{name} must be a string"
        elif value not in schema.get("enum", (value,)):
            return f"{name} must be one of {', '.join(schema['enum'])}"
        elif not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            return f"{name} must have {schema['minLength']} to {schema['maxLength']} characters"
    return ""


def write(db: dict[str, Any], act: Call) -> str:
    """Change the database; returns the receipt."""
    row = db["parcels"][act.arguments["parcel"]]
    row.update(WRITES[act.name](row, **{k: v for k, v in act.arguments.items() if k != "parcel"}))
    return row["receipt"]
