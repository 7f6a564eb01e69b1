"""From flags, presets and the environment's variables to settings, or one line that says what is wrong with them.

It knows the settings by their names and what values they may have, and nothing of what they do.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import sys
from typing import Any, get_type_hints

from minitau import config
from minitau.episode import BadInput


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake is one line that says what to do instead."""

    def error(self, message: str) -> Any:
        if message.startswith("unrecognized arguments: "):
            flag = message.split(": ")[1].split()[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            close = difflib.get_close_matches(flag, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; see --help"
            message = f"unknown flag {flag}{hint}"
            if not flag.startswith("-"):
                message = f"{flag!r} stands alone: a value follows its --flag, folders come before all flags"
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def add_flags(parser: argparse._ActionsContainer, kind: type) -> None:
    """One flag a field. Defaults stay out of the namespace, so that presets can tell what was typed."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        flag, help = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if field.default not in ("", ()):
            shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
            help += f" (default: {shown})"
        if variable := field.metadata["variable"]:
            secret = variable == "TAU2_USER_API_BASE"  # people put keys into addresses
            now = f", now {'set' if secret else repr(os.environ[variable])}" if variable in os.environ else ""
            help += f" (with --env tau2: ${variable}{now})"
        common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": help.replace("%", "%%")}
        if hints[field.name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif hints[field.name] == tuple[str, ...]:
            parser.add_argument(flag, type=lambda text: tuple(text.split(",")), metavar="A,B", **common)
        else:
            choices = field.metadata["choices"]
            parser.add_argument(flag, type=hints[field.name], choices=choices, **common)


# Settings that a flag decides, so that typing them beside it can only be a mistake.
DECIDED_BY = {"task_file": ("domains", "split", "tasks"), "greedy": ("temperature",)}


def check_typed(typed: dict[str, Any]) -> None:
    """Raise BadInput for flags that contradict each other, or say nothing where much depends on it."""
    if typed.get("task_file") == "":
        raise BadInput("--task-file is empty: name a file, or leave the flag out to take all tasks")
    for name, decided in DECIDED_BY.items():
        for other in decided:
            if typed.get(name) and other in typed:
                flag, extra = (each.replace("_", "-") for each in (name, other))
                raise BadInput(f"--{flag} leaves nothing for --{extra} to say; leave one of them out")


def parse_stage(argv: list[str]) -> tuple[str, Any, config.DryRun | None]:
    """The stage's name, its settings (see `settle`), and with --dry-run what that has been told."""
    first = OneLineParser("train.py", add_help=False, allow_abbrev=False)
    first.add_argument("--stage", choices=tuple(config.STAGES))
    known, _ = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    parser = OneLineParser("train.py", description="Train one stage: sft, rft or grpo.", allow_abbrev=False)
    parser.add_argument("--stage", choices=tuple(config.STAGES), required=True, help="what to train")
    parser.add_argument("--preset", choices=tuple(config.PRESETS), default="courier", help="a set of defaults")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: print what memory and time it would take on GPUs that need not be there; of --model only "
        "config.json is read",
    )
    add_flags(parser, config.STAGES[known.stage or "grpo"])
    add_flags(parser.add_argument_group("for --dry-run"), config.DryRun)
    given = vars(parser.parse_args(argv))
    stage, preset, is_dry = given.pop("stage"), given.pop("preset"), given.pop("dry_run")
    told = {field.name: given.pop(field.name) for field in dataclasses.fields(config.DryRun) if field.name in given}
    if told and not is_dry:
        raise BadInput(f"--{next(iter(told)).replace('_', '-')} is for --dry-run (torchrun gives the GPUs of a run)")
    check_typed(given)
    cfg = settle(config.STAGES[stage], given, config.PRESETS[preset][stage])
    dry_run = config.DryRun(**told) if is_dry else None
    check(cfg, required=("model",) if is_dry else ("model", "out") + (("data",) if stage == "sft" else ()))
    if dry_run:
        check_dry_run(dry_run)
    return stage, cfg, dry_run


def parse(kind: type, prog: str, description: str, argv: list[str] | None = None) -> Any:
    """Settings of a script with a single dataclass."""
    parser = OneLineParser(prog, description=description, allow_abbrev=False)
    add_flags(parser, kind)
    typed = vars(parser.parse_args(argv))
    check_typed(typed)
    cfg = settle(kind, typed)
    check(cfg)
    return cfg


def settle(kind: type, given: dict[str, Any], preset: dict[str, Any] | None = None) -> Any:
    """Settings of `kind`: its defaults, then those that follow --env, then the preset's, then those of
    the environment's variables (with --env tau2), then what was `given`. Raises BadInput."""
    hints, values = get_type_hints(kind), {**(preset or {}), **given}
    env = values.get("env", "courier")
    variables = {
        field.name: from_variable(field.metadata["variable"], field.name, hints[field.name])
        for field in dataclasses.fields(kind)
        if env == "tau2" and field.name not in given and field.metadata["variable"] in os.environ
    }
    follows = {name: value for name, value in config.ENV_DEFAULTS[env].items() if name in hints}
    return kind(**{**follows, **values, **variables})


def from_variable(variable: str, name: str, hint: type) -> Any:
    """The value of setting `name` that the environment gives. Raises BadInput."""
    text = os.environ[variable].strip()
    wants = {str: "a name", int: "a whole number", float: "a number", bool: "0 or 1"}[hint]
    try:
        value = {"0": False, "1": True}[text] if hint is bool else hint(text)
    except (ValueError, KeyError):
        raise BadInput(f"the environment variable {variable} is {text!r}; it must be {wants}") from None
    if problem := out_of_range(name, value):
        raise BadInput(f"the environment variable {variable} is {text!r}; {problem}")
    return value


def out_of_range(name: str, value: Any) -> str:
    """What is wrong with a setting by itself; nothing if it is in range."""
    if name in POSITIVE and not 1 <= value < math.inf:
        return "it must be at least 1"
    if name in NOT_NEGATIVE and not 0 <= value < math.inf:
        return "it must be a number from 0 up"
    if name == "seed" and not -(2**63) <= value < 2**63:
        return "it must fit 64 bits"
    if name in SHARES and value > 1:
        return "it is a part of a whole, from 0 to 1"
    if name in ABOVE_ZERO and not value > 0:
        return "it must be above 0; a large one never scales gradients down"
    if name in NOT_EMPTY and not value:
        return "it must not be empty"
    if name in AT_MOST and value > AT_MOST[name]:
        return f"it must be at most {AT_MOST[name]}"
    return ""


POSITIVE = (  # noqa: SIM905  (a list of names reads better as a sentence)
    "max_new_tokens max_tokens max_turns max_steps max_bad_calls concurrency epochs batch_size samples round_tasks "
    "steps tasks_per_step updates_per_step max_rounds num_trials micro_batch_tokens save_every keep engine_timeout tp "
    "engine_tp sft_epochs"
).split()

NOT_NEGATIVE = (  # noqa: SIM905  (likewise)
    "lr weight_decay max_grad_norm warmup alpha negative_weight clip_low clip_high entropy kl importance_cap "
    "sequence_low sequence_high min_partial max_refused tasks episodes patience temperature user_temperature max_drift "
    "engine_round user_max_tokens corpus_tasks demonstrations rft_tasks heard_weight"
).split()

SHARES = ("max_refused", "warmup", "min_partial")

ABOVE_ZERO = ("max_grad_norm",)

NOT_EMPTY = ("user_model",)

AT_MOST = {  # what would take all memory, or for ever, is a slip of the hand
    "concurrency": 10_000,
    "max_rounds": 1000,
    "group_size": 10_000,
    "samples": 10_000,
    "num_trials": 1000,
}


def check(cfg: Any, required: tuple[str, ...] = ()) -> None:
    """Raise BadInput for settings that cannot work, before anything is loaded."""
    values = dataclasses.asdict(cfg)
    for name in required:
        if not values[name]:
            raise BadInput(f"--{name.replace('_', '-')} is needed")
    for name, value in values.items():
        if problem := out_of_range(name, value):
            raise BadInput(f"--{name.replace('_', '-')} is {value}; {problem}")
    if values.get("group_size", 2) < 2:
        raise BadInput(f"--group-size is {values['group_size']}; a group needs at least 2 attempts to compare")
    for name in ("beta1", "beta2"):
        if not 0 <= values.get(name, 0) < 1:
            raise BadInput(f"--{name} is {values[name]}; it must be at least 0 and under 1")
    if len(set(values.get("domains", ()))) < len(values.get("domains", ())):
        raise BadInput(f"--domains {','.join(values['domains'])}: a domain is named twice")
    addresses = values.get("user_api_base", "")
    if {"@", "?"} & set(addresses):
        raise BadInput("--user-api-base may hold a key, which would stand in logs; put it into OPENAI_API_KEY")
    if addresses and not all(each.startswith(("http://", "https://")) for each in addresses.split(",")):
        raise BadInput(f"--user-api-base {addresses}: http://HOST:PORT/v1 is needed, or https; commas between several")
    if values.get("policy") and values["env"] != "tau2":
        raise BadInput("--policy is for --env tau2; courier's policies are part of its tasks")
    if values.get("agent") == "flawed" and values["env"] == "tau2":
        raise BadInput("--agent flawed: tau2 has gold, refuse and transfer")
    if values.get("engine") == "local":
        for name in ("engine_url", "engine_command", "engine_gpus", "engine_sleep", "ahead"):
            if values.get(name):
                raise BadInput(f"--{name.replace('_', '-')} is for --engine sglang")
        if values.get("engine_tp", 1) > 1:
            raise BadInput("--engine-tp is for --engine sglang")
        if values.get("gpus") or values.get("tp", 1) > 1:
            raise BadInput("--gpus and --tp are for --engine sglang; the local one takes the first GPU that is visible")
    elif values.get("engine_round"):
        raise BadInput("--engine-round is for --engine local")
    if values.get("engine_round") == 1 or values.get("engine_round", 0) > 24:
        raise BadInput(
            f"--engine-round is {values['engine_round']}; take 2 to 24 bits, or 0 to leave weights as they are"
        )
    if values.get("sequence_low", 0) >= values.get("sequence_high", 1):
        low, high = values["sequence_low"], values["sequence_high"]
        raise BadInput(f"--sequence-low {low} --sequence-high {high} leaves no ratio that is trained on")
    check_engines(values)
    if values.get("engine_url") and values["engine_command"]:
        raise BadInput("--engine-url names servers that run already; --engine-command has none to start")
    for name in ("engine_mem", "mem_fraction"):
        if not 0 < values.get(name, 0.5) < 1:
            raise BadInput(f"--{name.replace('_', '-')} is {values[name]}; it must be between 0 and 1")
    if isinstance(cfg, (config.RFT, config.GRPO)) and cfg.temperature <= 0:
        raise BadInput(f"--temperature is {cfg.temperature}; training samples need a temperature above 0")
    if isinstance(cfg, (config.RFT, config.GRPO)) and cfg.max_tokens > cfg.micro_batch_tokens:
        raise BadInput(f"--max-tokens {cfg.max_tokens} does not fit --micro-batch-tokens {cfg.micro_batch_tokens}")
    if values.get("updates_per_step", 1) > values.get("tasks_per_step", 1):
        raise BadInput("--updates-per-step cannot be more than --tasks-per-step")


def check_engines(values: dict[str, Any]) -> None:
    """Raise BadInput for servers that cannot be where they are said to be, or do all that is asked of them."""
    gpus, urls, sleep = (values.get(f"engine_{name}") for name in ("gpus", "url", "sleep"))
    for flag, named in (("--engine-gpus", gpus), ("--gpus", values.get("gpus"))):
        if named and not all(gpu.isdecimal() for gpu in named):
            raise BadInput(f"{flag} {','.join(named)}: GPUs are named by numbers, as in 4,5,6,7")
        if named and len({int(gpu) for gpu in named}) < len(named):
            raise BadInput(f"{flag} {','.join(named)}: a GPU is named twice")
    if urls and len({url.rstrip("/") for url in urls}) < len(urls):
        raise BadInput(f"--engine-url {','.join(urls)}: a server is named twice")
    if gpus and urls:
        raise BadInput("--engine-gpus is for servers that are started, --engine-url for ones that run: leave one out")
    if urls and values["engine_tp"] > 1:
        raise BadInput("--engine-tp is for servers that are started, --engine-url for ones that run: leave one out")
    if sleep and (gpus or values["ahead"]):
        raise BadInput(f"--engine-sleep leaves nothing to --{'engine-gpus' if gpus else 'ahead'}: leave one out")
    if values.get("ahead") and not (gpus or urls):
        raise BadInput("--ahead 1 needs servers that share no GPU with the trainer: add --engine-gpus or --engine-url")


def check_dry_run(told: config.DryRun) -> None:
    """Raise BadInput for GPUs or conversations that there cannot be."""
    for name in ("gpus", "opening_tokens", "turns", "said_tokens", "heard_tokens"):
        if getattr(told, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} is {getattr(told, name)}; it must be at least 1")
    if told.gpus > 1024:
        raise BadInput(f"--gpus is {told.gpus}; it is those of one node")
    for name in ("user_mem", "flat_groups"):
        if not 0 <= getattr(told, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} is {getattr(told, name)}; it must be at least 0 and under 1")
    if not 0 <= told.user_seconds < math.inf:
        raise BadInput(f"--user-seconds is {told.user_seconds}; it must be a number from 0 up")
