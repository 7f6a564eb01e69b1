"""Every setting of every script: one frozen dataclass each, its flags derived from its fields.

A field's name is its flag, its default the default, its comment-like `help` the manual. Presets are
plain dicts of overrides. No config files: a run's settings stand in RUN/config.json, as written by
the run itself. This file knows names and numbers, and nothing of what they do.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import fcntl
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from minitau.episode import BadInput


def setting(default: Any, help: str, choices: tuple[Any, ...] | None = None, variable: str = "") -> Any:
    """`variable` names an environment variable that gives the default with --env tau2."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "variable": variable})


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """Where episodes happen and how the agent samples: shared by RFT, GRPO and evaluation."""

    env: str = setting("courier", "the world of tasks", ("courier", "tau2"))
    domains: tuple[str, ...] = setting(("desk", "claims", "locker"), "comma-separated domains of that world")
    task_file: str = setting("", "which tasks, as `python -m minitau.tasks` writes them; instead of domains and split")
    dialect: str = setting("native", "how the agent speaks and calls tools", ("native", "single-call"))
    engine: str = setting(
        "local", "what samples from the policy: a server a rank, or this process", ("local", "sglang")
    )
    engine_command: str = setting(
        "",
        "sglang: how a server is started, with more of its flags if wanted; '' is this Python's sglang.launch_server",
    )
    engine_url: tuple[str, ...] = setting((), "sglang: servers that run already, one a rank; none is started then")
    engine_gpus: tuple[str, ...] = setting(
        (),
        "sglang: GPUs for the servers alone, by number among the visible ones, and weights are broadcast to them: a "
        "server on each. Ranks train on the first GPUs; there is a server for each rank, or some share one (rank r "
        "asks server r modulo their number). Without it a server shares the GPU of its rank",
    )
    engine_mem: float = setting(0.4, "sglang: a server takes this part of what is free on its GPU when it starts")
    engine_timeout: float = setting(600.0, "sglang: seconds until a start, or a reply, counts as never coming")
    temperature: float = setting(1.0, "of the policy's sampling; 0 is greedy (evaluation only)")
    max_new_tokens: int = setting(128, "tokens of one reply at most")
    max_tokens: int = setting(2048, "tokens of one conversation at most")
    max_turns: int = setting(24, "replies of the agent in one conversation at most")
    max_steps: int = setting(
        100,
        "tau2: steps of one conversation at most, as tau2 counts them: messages of both sides, and the results of one "
        "message's calls",
        variable="TAU2_MAX_STEPS",
    )
    max_bad_calls: int = setting(3, "malformed replies in a row that end an episode")
    concurrency: int = setting(128, "episodes at once on one rank")
    patience: float = setting(
        86_400.0,
        "seconds the local engine waits, before a step, for customers to answer: for ever, as it were, where they "
        "answer at once (then a run repeats bit for bit), and not at all where a model plays them",
    )
    user_model: str = setting(
        "openai/Qwen/Qwen3-4B-Instruct-2507",
        "tau2: the customer's model, as litellm names it",
        variable="TAU2_USER_MODEL",
    )
    user_api_base: str = setting(
        "http://127.0.0.1:30001/v1",
        "tau2: the customer's OpenAI-compatible endpoint; '' for the provider's own",
        variable="TAU2_USER_API_BASE",
    )
    user_temperature: float = setting(0.7, "tau2: the customer's temperature", variable="TAU2_USER_TEMPERATURE")
    max_drift: float = setting(
        0.1, "sglang: end when, after a sync, engine and trainer differ by more nats a sampled token"
    )
    policy: tuple[str, ...] = setting(
        (), "tau2: a file whose text replaces the domain's policy; with several domains DOMAIN=FILE,DOMAIN=FILE"
    )


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all three stages share: the run, the model, the optimizer."""

    model: str = setting("", "a Hugging Face directory of a dense Qwen3 to start from")
    out: str = setting("", "folder of this run: config, metrics, checkpoints, the trained model")
    resume: bool = setting(False, "go on from the newest checkpoint in --out")
    seed: int = setting(0, "seeds every draw of the run")
    dtype: str = setting("float32", "of forward and backward; master weights are float32", ("float32", "bfloat16"))
    lr: float = setting(1e-5, "peak learning rate of AdamW")
    beta1: float = setting(0.9, "of AdamW")
    beta2: float = setting(0.98, "of AdamW")
    weight_decay: float = setting(0.01, "of AdamW")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this global norm")
    micro_batch_tokens: int = setting(16_384, "packed tokens of one forward at most")
    recompute: str = setting(
        "auto",
        "blocks whose activations backward computes again, to save memory: as many as a GPU's memory asks for (on a "
        "CPU none), all, or none",
        ("auto", "all", "none"),
    )
    compile: bool = setting(
        True, "in bfloat16 on a GPU: fuse each block's small kernels; costs about a minute at the start"
    )
    save_every: int = setting(10, "optimizer steps between checkpoints")
    keep: int = setting(2, "checkpoints kept")
    wandb: bool = setting(False, "also log to Weights & Biases (pip install wandb)")
    tensorboard: bool = setting(False, "also log to TensorBoard (pip install tensorboard)")


@dataclass(frozen=True, kw_only=True)
class SFT(Training):
    """Supervised fine-tuning on conversations: cross-entropy on what the agent said, per token."""

    data: str = setting("", "JSONL, one conversation a line under `messages` or `prompt`")
    dialect: str = setting("native", "how the agent speaks and calls tools", ("native", "single-call"))
    max_tokens: int = setting(16_384, "longer conversations are left out, and counted")
    max_refused: float = setting(0.1, "stop before training if a larger part of the conversations is left out")
    epochs: int = setting(2, "passes over the data")
    batch_size: int = setting(16, "conversations a step, over all ranks")
    warmup: float = setting(0.05, "part of the steps in which the learning rate rises; then it falls as a cosine")


@dataclass(frozen=True, kw_only=True)
class RFT(Training, Episodes):
    """Rejection fine-tuning: sample, keep the good episodes, SFT on them."""

    split: str = setting("train", "which tasks; those of the test split are left out, and counted")
    tasks: int = setting(0, "training tasks looked at, domains in turn, before any is screened out; 0 is all")
    screen: bool = setting(True, "leave out tasks that pay an agent for refusing or transferring at once")
    samples: int = setting(4, "attempts at each task")
    round_tasks: int = setting(32, "tasks sampled between two writes to disk")
    min_partial: float = setting(0.6, "a task nobody solved keeps its best attempt from this partial score on")
    temperature: float = setting(0.8, "of the policy's sampling")
    epochs: int = setting(2, "passes over what was kept")
    batch_size: int = setting(16, "conversations a step, over all ranks")
    warmup: float = setting(0.05, "part of the steps in which the learning rate rises; then it falls as a cosine")


@dataclass(frozen=True, kw_only=True)
class GRPO(Training, Episodes):
    """Group-relative policy optimisation over whole conversations."""

    steps: int = setting(200, "rollout batches")
    episodes: int = setting(0, "end after the step that reaches this many episodes in all; 0 leaves the end to --steps")
    tasks_per_step: int = setting(16, "different tasks in a batch (P)")
    group_size: int = setting(4, "attempts at each task (G)")
    updates_per_step: int = setting(1, "optimizer steps a batch is split into; 1 is strictly on-policy")
    split: str = setting("train", "which tasks; those of the test split are left out, and counted")
    tasks: int = setting(0, "training tasks looked at, domains in turn, before any is screened out; 0 is all")
    screen: bool = setting(True, "leave out tasks that pay an agent for refusing or transferring at once")
    curriculum: bool = setting(
        True, "draw tasks with success rates near one half more often", variable="TAU2_USE_CURRICULUM"
    )
    dynamic_sampling: bool = setting(True, "draw more tasks while groups without a difference leave the batch short")
    max_rounds: int = setting(3, "rounds of drawing in one step at most")
    shuffle_rewards: bool = setting(
        False, "a control: inside each group the rewards go to attempts drawn by lot, so that they teach nothing"
    )
    shaping: str = setting("gated", "where partial credit counts", ("none", "additive", "gated"))
    alpha: float = setting(0.25, "weight of partial credit", variable="TAU2_REWARD_ALPHA")
    divide_by_std: bool = setting(True, "divide advantages by their group's standard deviation")
    aggregation: str = setting(
        "token-mean", "how token losses are averaged", ("token-mean", "sequence-mean", "dr-grpo")
    )
    clip_low: float = setting(0.2, "lower clip of the ratio")
    clip_high: float = setting(0.28, "upper clip of the ratio")
    entropy: float = setting(0.001, "coefficient of the entropy bonus")
    kl: float = setting(0.01, "coefficient of k3 KL to the starting model; 0 loads no second model")
    importance_cap: float = setting(2.0, "cap of the trainer/engine importance weight; 0 turns it off")
    sequence_low: float = setting(0.5, "trajectories whose mean trainer/engine ratio is lower are masked")
    sequence_high: float = setting(2.0, "trajectories whose mean trainer/engine ratio is higher are masked")
    engine_round: int = setting(
        0, "a control: the local engine samples from weights rounded to so many bits, so that it drifts; 0 leaves them"
    )
    ahead: int = setting(
        0,
        "batches that are played while another is trained on: 1 samples with weights one step older, which "
        "--importance-cap then corrects for; for --engine-gpus or --engine-url",
        (0, 1),
    )
    engine_sleep: bool = setting(False, "sglang: give the KV cache's memory to the trainer while it trains")
    lr: float = setting(1e-6, "learning rate of AdamW, constant")
    weight_decay: float = setting(0.1, "of AdamW")


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What --dry-run cannot see: GPUs that nobody has rented yet, and how conversations will go (as on tau2-bench)."""

    gpus: int = setting(8, "GPUs of the node: a rank on each, and on --engine-gpus servers instead")
    gpu: str = setting("h100", "their kind: H100 80GB or H200", ("h100", "h200"))
    user_mem: float = setting(
        0.3, "tau2: serve_user.py's --mem-fraction, on a GPU that trains; 0 if the customers' model is elsewhere"
    )
    opening_tokens: int = setting(
        6000, "policy and tools: 4.8k airline and retail, 7.6k telecom, weighed by their training tasks"
    )
    turns: int = setting(
        20, "replies of the agent in a conversation, on average: the reference solutions take 10, with nothing to ask"
    )
    said_tokens: int = setting(80, "of a reply: 24 in the reference solutions, which say no more than they must")
    heard_tokens: int = setting(120, "from one reply to the next: 115 in the reference solutions")
    user_seconds: float = setting(
        1.0,
        "until customer or environment have answered a reply, on average: 50 tokens at 73 a second, two or three times "
        "where the customer has tools, and nothing where the reply was a call",
    )
    flat_groups: float = setting(
        0.375, "part of the groups whose attempts do not differ, which --dynamic-sampling draws again: 0.35 to 0.4"
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation(Episodes):
    """pass@k and pass^k of one agent on one split."""

    agent: str = setting("policy", "who plays", ("policy", "gold", "flawed", "refuse", "transfer"))
    model: str = setting("", "a Hugging Face directory of a dense Qwen3 (agent policy)")
    dtype: str = setting("float32", "of its weights", ("float32", "bfloat16"))
    out: str = setting("", "folder for the episodes and results.json")
    resume: bool = setting(False, "keep the finished episodes in --out and play the rest")
    split: str = setting("test", "which tasks")
    tasks: int = setting(0, "tasks a domain; 0 is all")
    num_trials: int = setting(4, "attempts at each task (n)")
    greedy: bool = setting(False, "always the likeliest token: the same as --temperature 0")
    floors: bool = setting(True, "beside a policy, what refusing and transferring at once earn on the same tasks")
    seed: int = setting(0, "seeds every draw, of the agent and of the customers")
    stage: str = setting("", "name of the row in results.json; the agent's name if empty")
    # As published, a local model plays the customer for training, and this one for evaluation.
    user_model: str = setting(
        "gpt-4.1-mini", "tau2: the customer's model, as litellm names it", variable="TAU2_USER_MODEL"
    )
    user_api_base: str = setting(
        "", "tau2: the customer's endpoint, if not the provider's own", variable="TAU2_USER_API_BASE"
    )


@dataclass(frozen=True, kw_only=True)
class Demonstrations(Episodes):
    """Conversations of a world's scripted agent on training tasks, for SFT."""

    agent: str = setting(
        "gold", "who plays; courier's `flawed` makes the mistakes that RFT filters", ("gold", "flawed")
    )
    split: str = setting("train", "which tasks; those of the test split are left out, and counted")
    tasks: int = setting(0, "training tasks looked at, domains in turn, before any is screened out; 0 is all")
    seed: int = setting(0, "of the customers' and the agent's whims")
    out: str = setting("", "JSONL file to write")
    keep_all: bool = setting(
        False, "gold: keep also what earns no reward, only says goodbye, or calls with ids that nobody told the agent"
    )


@dataclass(frozen=True, kw_only=True)
class Check:
    """What training would make of a file of conversations."""

    check: str = setting("", "JSONL file to look at; nothing is written")
    model: str = setting("", "a Hugging Face directory: its tokenizer and chat template")
    dialect: str = setting("native", "how the agent speaks and calls tools", ("native", "single-call"))
    max_tokens: int = setting(16_384, "longer conversations are left out, and counted")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Tasks to look at, or to keep in a file that the other scripts take as --task-file."""

    env: str = setting("courier", "the world of tasks", ("courier", "tau2"))
    domains: tuple[str, ...] = setting(("desk", "claims", "locker"), "comma-separated domains of that world")
    split: str = setting("train", "which tasks")
    match: str = setting("", "only tasks in whose id this regular expression is found")
    without_test: bool = setting(False, "leave out tasks that are in the test split as well, as training demands")
    tasks: int = setting(0, "tasks a domain at most; 0 is all")
    screen: bool = setting(False, "mark tasks that pay an agent for refusing or transferring at once")
    out: str = setting("", "JSONL file to write; without it the tasks are printed")


@dataclass(frozen=True, kw_only=True)
class Server:
    """The user simulator's endpoint."""

    model: str = setting("", "a Hugging Face directory of a dense Qwen3")
    engine: str = setting("sglang", "what samples from the model: SGLang, or this process", ("sglang", "local"))
    port: int = setting(30001, "on 127.0.0.1; 0 takes any that is free")
    gpus: tuple[str, ...] = setting((), "sglang: which GPUs, by number; those that are visible if empty")
    tp: int = setting(1, "sglang: GPUs that one copy of the model is spread over; the others hold further copies")
    mem_fraction: float = setting(
        0.85, "sglang: part to take of what is free on a GPU at the start; small beside a trainer"
    )
    engine_command: str = setting(
        "", "sglang: how it is started, with more of its flags if wanted; '' is this Python's sglang.launch_server"
    )
    engine_timeout: float = setting(600.0, "sglang: seconds until a start counts as never coming")
    log: str = setting("outputs/serve_user.log", "sglang: file that its log is appended to")
    dtype: str = setting("bfloat16", "of the weights", ("float32", "bfloat16"))
    temperature: float = setting(0.7, "local: where a request names none")
    max_new_tokens: int = setting(256, "local: tokens of one reply, where a request names no limit")
    max_tokens: int = setting(32_768, "tokens of one conversation at most")
    concurrency: int = setting(64, "conversations at once: whose prefix stays cached, and the largest batch")
    patience: float = setting(0.0, "local: seconds the engine waits before a step for others to join it")


STAGES = {"sft": SFT, "rft": RFT, "grpo": GRPO}

# Defaults that follow --env, for settings that a script has. The fields' own are courier's.
ENV_DEFAULTS: dict[str, dict[str, Any]] = {
    "courier": {},
    "tau2": {
        "domains": ("airline", "retail", "telecom"),
        "max_new_tokens": 1024,
        "max_tokens": 32_768,
        "max_turns": 200,  # --max-steps ends a conversation before
        "concurrency": 32,
        "patience": 0.0,
        "micro_batch_tokens": 32_768,
    },
}

# tau2-4b: the settings of the published pipeline.
TAU2_TRAINING = {"dtype": "bfloat16", "micro_batch_tokens": 32_768}
TAU2_EPISODES = {"env": "tau2", "max_new_tokens": 4096, "engine": "sglang"}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "courier": {"sft": {}, "rft": {}, "grpo": {}},
    "tau2-4b": {
        "sft": {**TAU2_TRAINING},
        "rft": {**TAU2_EPISODES, **TAU2_TRAINING},
        "grpo": {**TAU2_EPISODES, **TAU2_TRAINING, "temperature": 0.7},
    },
}


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake is one line that says what to do instead."""

    def error(self, message: str) -> Any:
        if message.startswith("unrecognized arguments: "):
            flag = message.split(": ")[1].split()[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            close = difflib.get_close_matches(flag, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; see --help"
            message = f"unknown flag {flag}{hint}"
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
    """Raise BadInput for flags that contradict each other."""
    for name, decided in DECIDED_BY.items():
        for other in decided:
            if typed.get(name) and other in typed:
                flag, extra = (each.replace("_", "-") for each in (name, other))
                raise BadInput(f"--{flag} leaves nothing for --{extra} to say; leave one of them out")


def parse_stage(argv: list[str]) -> tuple[str, Any, DryRun | None]:
    """The stage's name, its settings (see `settle`), and with --dry-run what that has been told."""
    first = OneLineParser("train.py", add_help=False, allow_abbrev=False)
    first.add_argument("--stage", choices=tuple(STAGES))
    known, _ = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    parser = OneLineParser("train.py", description="Train one stage: sft, rft or grpo.", allow_abbrev=False)
    parser.add_argument("--stage", choices=tuple(STAGES), required=True, help="what to train")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="courier", help="a set of defaults")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: print what memory and time it would take on GPUs that need not be there; of --model only "
        "config.json is read",
    )
    add_flags(parser, STAGES[known.stage or "grpo"])
    add_flags(parser.add_argument_group("for --dry-run"), DryRun)
    given = vars(parser.parse_args(argv))
    stage, preset, is_dry = given.pop("stage"), given.pop("preset"), given.pop("dry_run")
    told = {field.name: given.pop(field.name) for field in dataclasses.fields(DryRun) if field.name in given}
    if told and not is_dry:
        raise BadInput(f"--{next(iter(told)).replace('_', '-')} is for --dry-run (torchrun gives the GPUs of a run)")
    check_typed(given)
    cfg, dry_run = settle(STAGES[stage], given, PRESETS[preset][stage]), DryRun(**told) if is_dry else None
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
    follows = {name: value for name, value in ENV_DEFAULTS[env].items() if name in hints}
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
    if name in POSITIVE and value < 1:
        return "it must be at least 1"
    if name in NOT_NEGATIVE and not 0 <= value < math.inf:
        return "it must be a number from 0 up"
    if name in NOT_EMPTY and not value:
        return "it must not be empty"
    return ""


POSITIVE = (  # noqa: SIM905  (a list of names reads better as a sentence)
    "max_new_tokens max_tokens max_turns max_steps max_bad_calls concurrency epochs batch_size samples round_tasks "
    "steps tasks_per_step updates_per_step max_rounds num_trials micro_batch_tokens save_every keep engine_timeout tp"
).split()

NOT_NEGATIVE = (  # noqa: SIM905  (likewise)
    "lr weight_decay max_grad_norm warmup alpha clip_low clip_high entropy kl importance_cap sequence_low "
    "sequence_high min_partial max_refused tasks episodes patience temperature user_temperature max_drift engine_round"
).split()

NOT_EMPTY = ("user_model",)


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
    if {"@", "?"} & set(values.get("user_api_base", "")):
        raise BadInput("--user-api-base may hold a key, which would stand in logs; put it into OPENAI_API_KEY")
    if values.get("policy") and values["env"] != "tau2":
        raise BadInput("--policy is for --env tau2; courier's policies are part of its tasks")
    if values.get("agent") == "flawed" and values["env"] == "tau2":
        raise BadInput("--agent flawed: tau2 has gold, refuse and transfer")
    if values.get("engine") == "local":
        for name in ("engine_url", "engine_command", "engine_gpus", "engine_sleep", "ahead"):
            if values.get(name):
                raise BadInput(f"--{name.replace('_', '-')} is for --engine sglang")
    elif values.get("engine_round"):
        raise BadInput("--engine-round is for --engine local")
    if values.get("engine_round") == 1:
        raise BadInput("--engine-round is 1, which rounds every weight to nothing; take 2 or more, or 0 to leave them")
    check_engines(values)
    if values.get("engine_url") and values["engine_command"]:
        raise BadInput("--engine-url names servers that run already; --engine-command has none to start")
    for name in ("engine_mem", "mem_fraction"):
        if not 0 < values.get(name, 0.5) < 1:
            raise BadInput(f"--{name.replace('_', '-')} is {values[name]}; it must be between 0 and 1")
    if isinstance(cfg, (RFT, GRPO)) and cfg.temperature <= 0:
        raise BadInput(f"--temperature is {cfg.temperature}; training samples need a temperature above 0")
    if isinstance(cfg, (RFT, GRPO)) and cfg.max_tokens > cfg.micro_batch_tokens:
        raise BadInput(f"--max-tokens {cfg.max_tokens} does not fit --micro-batch-tokens {cfg.micro_batch_tokens}")
    if values.get("updates_per_step", 1) > values.get("tasks_per_step", 1):
        raise BadInput("--updates-per-step cannot be more than --tasks-per-step")


def check_engines(values: dict[str, Any]) -> None:
    """Raise BadInput for servers that cannot be where they are said to be, or do all that is asked of them."""
    gpus, urls, sleep = (values.get(f"engine_{name}") for name in ("gpus", "url", "sleep"))
    if gpus and not all(gpu.isdecimal() for gpu in gpus):
        raise BadInput(f"--engine-gpus {','.join(gpus)}: GPUs are named by numbers, as in 4,5,6,7")
    if gpus and len({int(gpu) for gpu in gpus}) < len(gpus):
        raise BadInput(f"--engine-gpus {','.join(gpus)}: a GPU is named twice")
    if gpus and urls:
        raise BadInput("--engine-gpus is for servers that are started, --engine-url for ones that run: leave one out")
    if sleep and (gpus or values["ahead"]):
        raise BadInput(f"--engine-sleep leaves nothing to --{'engine-gpus' if gpus else 'ahead'}: leave one out")
    if values.get("ahead") and not (gpus or urls):
        raise BadInput("--ahead 1 needs servers that share no GPU with the trainer: add --engine-gpus or --engine-url")


def check_dry_run(told: DryRun) -> None:
    """Raise BadInput for GPUs or conversations that there cannot be."""
    for name in ("gpus", "opening_tokens", "turns", "said_tokens", "heard_tokens"):
        if getattr(told, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} is {getattr(told, name)}; it must be at least 1")
    for name in ("user_mem", "flat_groups"):
        if not 0 <= getattr(told, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} is {getattr(told, name)}; it must be at least 0 and under 1")
    if not 0 <= told.user_seconds < math.inf:
        raise BadInput(f"--user-seconds is {told.user_seconds}; it must be a number from 0 up")


# What a resumed run may change without becoming another run.
FREE_ON_RESUME = {
    "out",
    "steps",
    "episodes",
    "resume",
    "save_every",
    "keep",
    "wandb",
    "tensorboard",
    "concurrency",
    "user_api_base",
    "task_file",  # its content is recorded, and may not change
    "floors",
    "engine_command",
    "engine_url",
    "engine_gpus",
    "engine_mem",
    "engine_timeout",
    "engine_sleep",
    "max_drift",
}


def claim_run_dir(out: str, resume: bool, settings: dict[str, Any]) -> Path:
    """Make `out` the folder of this run and record its settings there.

    Raises BadInput if it holds another run, or this one and `resume` was not asked for.
    """
    folder = Path(out)
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{out} is a file; --out must be a folder")
    if path.is_file():
        before = read_settings(path)
        now = json.loads(json.dumps(settings))
        changed = sorted(k for k in before | now if k not in FREE_ON_RESUME and before.get(k) != now.get(k))
        if changed:
            what = ", ".join(f"{k} ({before.get(k)!r}, now {now.get(k)!r})" for k in changed)
            raise BadInput(f"{out} holds another run: {what}; choose another --out or repeat its settings")
        if not resume:
            raise BadInput(f"{out} holds this run already; add --resume to go on, or choose another --out")
    elif folder.exists() and {entry.name for entry in folder.iterdir()} - {".lock", "config.tmp"}:
        # (Those two are all that a run leaves which was killed while it claimed the folder.)
        raise BadInput(f"{out} is not empty and holds no run of minitau; choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(settings, indent=1))
        scratch.replace(path)
    except BlockingIOError:
        raise BadInput(f"another process is at work in {out}; wait for it, or choose another --out") from None
    except OSError as error:
        raise BadInput(f"{out} cannot be written ({error.strerror}); choose another --out") from None
    return folder


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a run recorded. Raises BadInput if the file is not that."""
    try:
        settings = json.loads(path.read_text())
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or not {"stage", "script"} & settings.keys():
        raise BadInput(f"{path} is not a run's of minitau; choose another --out")
    return settings


LOCKS: dict[Path, Any] = {}  # held until the process ends, however it ends


def lock(folder: Path) -> None:
    """Keep other processes out of a run's folder. Raises BlockingIOError if one is there."""
    if folder.resolve() not in LOCKS:
        file = open(folder / ".lock", "w")  # noqa: SIM115  (closing it would give the lock away)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        LOCKS[folder.resolve()] = file
