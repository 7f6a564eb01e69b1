"""Make a tiny Qwen3 with a tokenizer of its own: random weights, a real checkpoint otherwise.

The tokenizer is byte-level BPE trained on a world's own text. Only a word in small letters may take
the space before it into its token: a number and a capitalised word (an id, a name, a day) are the
same token wherever they stand. The directory loads like any Qwen3: here, in transformers, in SGLang.

`python -m minitau.tiny --out DIR` makes one for courier; `--env tau2` one for tau2-bench.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitau import cli, config, pretrained, sft
from minitau.config import setting
from minitau.envs import open_world
from minitau.episode import BadInput
from minitau.files import write_json
from minitau.model import ModelConfig, Qwen3, init_weights
from minitau.script import run_script

# Where a token must end. Punctuation keeps together across a space, as JSON writes it (`": "`).
WORDS = r" ?[a-z]+|[A-Z][A-Za-z]*|[0-9]{1,3}|[^A-Za-z0-9\s]+(?: [^A-Za-z0-9\s]+)*(?: (?=[A-Z0-9]))?|\s"
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LARGEST = {"vocab": 1 << 20, "hidden": 16_384, "layers": 1000, "heads": 1024}  # with more it is not tiny
MARKS = ("<tool_call>", "</tool_call>")  # tokens, but text like any other
# ChatML with one line a tool, `name(argument, argument)`: schemas or descriptions would be most of a
# tiny model's context, and it learns what a tool does from the policy and from conversations.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ "<|im_start|>" + message.role + "\\n" + message.content }}
{%- if loop.first and tools -%}
{%- for tool in tools -%}
{%- set f = tool.function -%}
{{ "\\n" + f.name + "(" + f.parameters.properties | join(", ") + ")" }}
{%- endfor -%}
{%- endif -%}
{{ "<|im_end|>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "<|im_start|>assistant\\n" }}
{%- endif -%}
"""


@dataclass(frozen=True, kw_only=True)
class Tiny(config.Domains):
    """A tiny random Qwen3 and its tokenizer."""

    out: str = setting("", "directory to write")
    vocab: int = setting(1280, "tokens at most; 256 of them are bytes")
    layers: int = setting(4, "blocks")
    hidden: int = setting(128, "hidden size")
    heads: int = setting(4, "query heads of 32; half as many key heads")
    max_tokens: int = setting(2048, "of a conversation that config.json has room for; 4096 at least")
    seed: int = setting(0, "of the random weights")
    corpus_tasks: int = setting(0, "training tasks a domain whose conversations the tokenizer reads; 0 is all")


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A transformers tokenizer with at most `vocab_size` tokens, trained on `texts`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(MARKS),
            special_tokens=list(CONTROL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def world_texts(cfg: Tiny) -> list[str]:
    """Conversations of the world's gold script, as JSON: they hold its words, schemas and punctuation."""
    world = open_world(cfg)
    tasks = [task for domain in cfg.domains for task in world.tasks(domain, "train")[: cfg.corpus_tasks or None]]
    rows = (sft.to_row(world.demonstrate(task, "gold", seed="corpus")) for task in tasks)
    return [json.dumps(row, ensure_ascii=False) for row in rows]


def check(cfg: Any) -> None:
    """Raise BadInput for an --out, --vocab, --hidden, --layers or --heads that cannot be."""
    if not cfg.out:
        raise BadInput("--out is needed")
    if (Path(cfg.out) / "config.json").exists():
        raise BadInput(f"{cfg.out} holds a model already; choose another --out")
    if cfg.vocab < 300 or cfg.heads < 2 or cfg.heads % 2:
        raise BadInput(f"--vocab {cfg.vocab} --heads {cfg.heads}: at least 300 tokens and an even number of heads")
    for name, most in LARGEST.items():
        if not 1 <= getattr(cfg, name) <= most:
            raise BadInput(f"--{name} {getattr(cfg, name)}: at least 1, and at most {most:,}")


def write_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int):
    """Train a tokenizer and save it, with the generation config that says where replies end; returns it."""
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_json(folder / "generation_config.json", ends)
    return tokenizer


def random_model(cfg: Any, vocabulary: int, max_tokens: int) -> Qwen3:
    """A small Qwen3 with random weights: `cfg` has its layers, hidden, heads and seed."""
    model_cfg = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=cfg.hidden,
        intermediate_size=3 * cfg.hidden,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.heads // 2,
        head_dim=32,
        rope_theta=10_000.0,
        max_position_embeddings=max(4096, max_tokens),
    )
    model = Qwen3(model_cfg)
    init_weights(model, cfg.seed)
    return model


def make(cfg: Tiny, texts: Iterable[str]) -> Path:
    """Write the directory and return it."""
    folder = Path(cfg.out)
    tokenizer = write_tokenizer(folder, texts, cfg.vocab)
    model = random_model(cfg, len(tokenizer), cfg.max_tokens)
    pretrained.save_model(folder, model.cfg, model.named_parameters(), torch.float32, folder)
    return folder


def main(argv: list[str]) -> None:
    cfg = cli.parse(Tiny, "python -m minitau.tiny", "Make a tiny random Qwen3 with its own tokenizer.", argv)
    check(cfg)
    print(f"wrote {make(cfg, world_texts(cfg))}")


if __name__ == "__main__":
    sys.exit(run_script("minitau.tiny", main, sys.argv[1:]))
