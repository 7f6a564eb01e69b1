"""Hugging Face directories of a dense Qwen3, in and out: config.json, safetensors, and the tokenizer's files.

What is written here transformers and SGLang load, and what they write is read. It knows one process and its CPU, and
neither optimizer nor run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitau.episode import BadInput
from minitau.files import file_sha256
from minitau.model import ModelConfig, Qwen3

SHARD_BYTES = 4 << 30
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


class CheckpointError(BadInput):
    """A directory that cannot be read or written, in one line that says what to do."""


def read_config(model_dir: str | Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory. Raises CheckpointError for anything but dense Qwen3."""
    path = Path(model_dir) / "config.json"
    if not Path(model_dir).is_dir():
        raise CheckpointError(f"{model_dir}: no such directory; give a Hugging Face model directory")
    if not path.is_file():
        raise CheckpointError(f"{model_dir}: no config.json here; give a Hugging Face model directory")
    try:
        row = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(row, dict) or row.get("model_type") != "qwen3":
        found = row.get("model_type") if isinstance(row, dict) else None
        raise CheckpointError(f"{path}: model_type is {found!r}; minitau runs dense Qwen3 (qwen3) only")
    # transformers 5 moved rope_theta into rope_parameters; hub checkpoints have it at the top.
    rope = row.get("rope_parameters") or row.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: rope_parameters is not an object")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError(f"{path}: RoPE scaling ({rope}) is not supported; remove it from config.json")
    if row.get("use_sliding_window") or row.get("attention_bias"):
        raise CheckpointError(f"{path}: sliding windows and attention biases are not supported")
    if row.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path}: hidden_act is {row['hidden_act']!r}; minitau's MLP is SwiGLU (silu) only")
    row.setdefault("rope_theta", rope.get("rope_theta"))
    row.setdefault("tie_word_embeddings", False)
    hints = get_type_hints(ModelConfig)
    for name, hint in hints.items():
        value = row.get(name)
        fits = type(value) is hint or (hint is float and type(value) is int)
        if not fits or (hint is not bool and not 0 < value < math.inf):
            wanted = {int: "a whole number from 1 up", float: "a number above 0", bool: "true or false"}[hint]
            raise CheckpointError(f"{path}: {name} is {json.dumps(value)}; it must be {wanted}")
    return ModelConfig(**{name: row[name] for name in hints})


def load_model(model_dir: str | Path) -> Qwen3:
    """A Qwen3 on the CPU in fp32 from single or sharded safetensors, tied or untied.

    Raises CheckpointError, naming the tensor or file, if the directory does not hold such a model.
    """
    cfg = read_config(model_dir)
    with torch.device("meta"):
        model = Qwen3(cfg)
    try:
        model.to_empty(device="cpu")
    except RuntimeError:
        size = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
        raise CheckpointError(f"{model_dir}: there is no memory for {size:,.0f} GB of fp32 weights") from None
    wanted = dict(model.named_parameters())
    seen = set()
    for name, tensor in read_safetensors(Path(model_dir)):
        if name == "lm_head.weight" and cfg.tie_word_embeddings:
            continue  # some exports write the tied head a second time
        if name not in wanted:
            raise CheckpointError(f"{model_dir}: tensor {name} is not part of a dense Qwen3")
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, config.json says {tuple(wanted[name].shape)}"
            raise CheckpointError(f"{model_dir}: {name} has shape {shapes}")
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise CheckpointError(f"{model_dir}: {name} is {tensor.dtype}; quantised weights are not supported")
        if not tensor.sum(dtype=torch.float32).isfinite():  # one pass: a sum is cheaper than to ask each element
            raise CheckpointError(f"{model_dir}: {name} holds NaN or infinite numbers; take an earlier checkpoint")
        with torch.no_grad():
            wanted[name].copy_(tensor)
        seen.add(name)
    if missing := sorted(set(wanted) - seen):
        raise CheckpointError(f"{model_dir}: {len(missing)} tensors missing, the first is {missing[0]}")
    return model


def read_safetensors(model_dir: Path) -> Iterable[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in the directory, one at a time."""
    for file in weight_files(model_dir):
        if not (model_dir / file).is_file():
            raise CheckpointError(f"{model_dir}: {file} is missing; is the download complete?")
        try:
            with safe_open(model_dir / file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{model_dir / file}: damaged ({error})") from None


def weight_files(model_dir: Path) -> list[str]:
    """The names of a directory's safetensors, as its index has them if it has one. Raises CheckpointError."""
    index = model_dir / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    try:
        return sorted(map(str, set(json.loads(index.read_text())["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: damaged ({type(error).__name__}: {error})") from None


def model_sha256(model_dir: Path) -> dict[str, str]:
    """What those of a directory's files hold that make the model what it is, by name. Raises CheckpointError."""
    names = ["config.json", *TOKENIZER_FILES, *weight_files(model_dir)]
    return {name: file_sha256(model_dir / name) for name in names if (model_dir / name).is_file()}


def save_model(
    folder: Path, cfg: ModelConfig, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, tokenizer_dir: Path
) -> None:
    """Write a Hugging Face directory: config, safetensors in shards of 4 GB, and the tokenizer's files. One process
    does. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = []  # {"names": [...], "file": temporary name}
    batch: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal batch, size
        if batch:
            file = f"shard-{len(shards)}.tmp"
            try:
                save_file(batch, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(str(error)) from error
            shards.append({"names": list(batch), "file": file})
        batch, size = {}, 0

    for name, tensor in weights:
        nbytes = tensor.numel() * dtype.itemsize
        if size + nbytes > SHARD_BYTES:
            flush()
        batch[name] = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        size, total = size + nbytes, total + nbytes
    flush()
    name_shards(folder, shards, total)
    write_config(folder, cfg, dtype, tokenizer_dir)
    for file in TOKENIZER_FILES:
        if (tokenizer_dir / file).is_file() and tokenizer_dir != folder:
            shutil.copyfile(Path(tokenizer_dir) / file, folder / file)


def name_shards(folder: Path, shards: list[dict[str, Any]], total: int) -> None:
    """Give the shards the names that Hugging Face expects, and an index if there are several."""
    if len(shards) == 1:
        (folder / shards[0]["file"]).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        (folder / shard["file"]).rename(folder / file)
        weight_map |= dict.fromkeys(shard["names"], file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_config(folder: Path, cfg: ModelConfig, dtype: torch.dtype, source: Path) -> None:
    """config.json: what the source's says of tokens and the like, and what the model is."""
    path = source / "config.json"
    row = json.loads(path.read_text()) if path.is_file() else {}
    row.pop("dtype", None)  # transformers 5 writes this name, any version reads the older one
    row |= {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **dataclasses.asdict(cfg),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(row, indent=1))
