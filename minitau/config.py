"""Every setting of every script: one frozen dataclass each, its flags derived from its fields.

A field's name is its flag, its default the default, its comment-like `help` the manual. Presets are
plain dicts of overrides. No config files: a run's settings stand in RUN/config.json, as written by
the run itself. How flags become settings is in cli.py. This file knows names and numbers, and
nothing of what they do.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


def setting(default: Any, help: str, choices: tuple[Any, ...] | None = None, variable: str = "") -> Any:
    """`variable` names an environment variable that gives the default with --env tau2."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "variable": variable})


ENVS = ("courier", "tau2")  # envs.open_world opens them, ENV_DEFAULTS has what follows them
SCRIPTED = "script"  # the user_model that is none, as envs/tau2/world.py has it, which knows no settings


@dataclass(frozen=True, kw_only=True)
class Domains:
    """Which world, and what of it."""

    env: str = setting("courier", "the world of tasks", ENVS)
    domains: tuple[str, ...] = setting(("desk", "claims", "locker"), "comma-separated domains of that world")
    policy: tuple[str, ...] = setting(
        (), "tau2: a file whose text replaces the domain's policy; with several domains DOMAIN=FILE,DOMAIN=FILE"
    )


@dataclass(frozen=True, kw_only=True)
class Tasks(Domains):
    """Which of its tasks."""

    task_file: str = setting("", "which tasks, as `python -m minitau.tasks` writes them; instead of domains and split")


@dataclass(frozen=True, kw_only=True)
class Episodes(Tasks):
    """How episodes are played and how the agent samples: shared by RFT, GRPO and evaluation."""

    dialect: str = setting("native", "how the agent speaks and calls tools", ("native", "single-call"))
    engine: str = setting(
        "local", "what samples from the policy: SGLang's servers, or this process", ("local", "sglang")
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
    engine_tp: int = setting(
        1,
        "sglang: GPUs that one server is spread over. So many ranks that follow each other share one, on their GPUs; "
        "with --engine-gpus a server takes so many of those, which follow each other. Not for --engine-url",
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
        "tau2: the customer's model, as litellm names it; `script` reads out the gold script's lines, and needs none",
        variable="TAU2_USER_MODEL",
    )
    user_api_base: str = setting(
        "http://127.0.0.1:30001/v1",
        "tau2: the customer's OpenAI-compatible endpoint, or several with commas between, to each of which go as many "
        "conversations; '' for the provider's own",
        variable="TAU2_USER_API_BASE",
    )
    user_temperature: float = setting(0.7, "tau2: the customer's temperature", variable="TAU2_USER_TEMPERATURE")
    user_max_tokens: int = setting(
        1024, "tau2: tokens of one reply of the customer's at most, for one that rambles holds up all; 0: no limit"
    )
    max_drift: float = setting(
        0.1, "sglang: end when, after a sync, engine and trainer differ by more nats a sampled token"
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
    updates_per_step: int = setting(
        1, "optimizer steps a batch is split into; 1 is strictly on-policy, without --ahead"
    )
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
    negative_weight: float = setting(1.0, "factor on advantages below 0; at 0 only successes teach")
    clip_low: float = setting(0.2, "lower clip of the ratio")
    clip_high: float = setting(0.28, "upper clip of the ratio")
    entropy: float = setting(0.001, "coefficient of the entropy bonus")
    kl: float = setting(0.01, "coefficient of k3 KL to the starting model; 0 loads no second model")
    importance_cap: float = setting(2.0, "cap of the trainer/engine importance weight; 0 turns it off")
    sequence_low: float = setting(
        0.5, "trajectories whose mean trainer/engine ratio is lower are left out of the policy loss"
    )
    sequence_high: float = setting(
        2.0, "trajectories whose mean trainer/engine ratio is higher are left out of the policy loss"
    )
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
        "gpt-4.1-mini",
        "tau2: the customer's model, as litellm names it; `script` reads out the gold script's lines, and needs none",
        variable="TAU2_USER_MODEL",
    )
    user_api_base: str = setting(
        "", "tau2: the customer's endpoint or endpoints, if not the provider's own", variable="TAU2_USER_API_BASE"
    )
    user_max_tokens: int = setting(0, "tau2: tokens of one reply of the customer's at most; 0, as in tau2: no limit")


@dataclass(frozen=True, kw_only=True)
class Demonstrations(Tasks):
    """Conversations of a world's scripted agent on training tasks, for SFT."""

    agent: str = setting(
        "gold", "who plays; courier's `flawed` makes the mistakes that RFT filters", ("gold", "flawed")
    )
    split: str = setting("train", "which tasks; those of the test split are left out, and counted")
    tasks: int = setting(0, "training tasks played, domains in turn; 0 is all")
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

    env: str = setting("courier", "the world of tasks", ENVS)
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
    port: int = setting(
        30001, "on 127.0.0.1; 0 takes any that is free. sglang: a second copy of the model has the next one, and so on"
    )
    gpus: tuple[str, ...] = setting((), "sglang: which GPUs, by number; those that are visible if empty")
    tp: int = setting(1, "sglang: GPUs that one copy of the model is spread over; the others hold further copies")
    mem_fraction: float = setting(
        0.85, "sglang: part to take of what is free on a GPU at the start; small beside a trainer"
    )
    engine_command: str = setting(
        "", "sglang: how it is started, with more of its flags if wanted; '' is this Python's sglang.launch_server"
    )
    engine_timeout: float = setting(600.0, "sglang: seconds until a start counts as never coming")
    log: str = setting("outputs/serve_user.log", "sglang: file to append its log to; of several copies each has one")
    dtype: str = setting("bfloat16", "of the weights", ("float32", "bfloat16"))
    temperature: float = setting(0.7, "local: where a request names none")
    max_new_tokens: int = setting(256, "local: tokens of one reply, where a request names no limit")
    max_tokens: int = setting(32_768, "tokens of one conversation at most")
    concurrency: int = setting(
        64, "conversations at once: whose prefix stays cached, and the largest batch (of each copy)"
    )
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
RARELY_SAVED = {"save_every": 50}  # steps take some seconds, and a 4B model is a minute on its way to the disk
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "courier": {"sft": {}, "rft": {}, "grpo": {}},
    "tau2-4b": {
        "sft": {**TAU2_TRAINING, **RARELY_SAVED},
        "rft": {**TAU2_EPISODES, **TAU2_TRAINING, **RARELY_SAVED},
        "grpo": {**TAU2_EPISODES, **TAU2_TRAINING, "temperature": 0.7},
    },
}
