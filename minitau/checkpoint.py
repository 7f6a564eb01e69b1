"""Files in and out: Hugging Face directories of a dense Qwen3, and checkpoints to resume from.

A checkpoint is one folder, `RUN/checkpoints/step-000010/`, with `state.json` (step, curriculum,
whatever else the stage keeps), `state/` (fp32 weights and optimizer, a shard a rank) and `model/`
(a Hugging Face directory that eval.py, transformers and SGLang load). It is written beside its
place under another name and renamed when whole, so a crash leaves the previous one as it was; and by
a thread, so that what does not change the weights, a rollout, goes on meanwhile.
No random state is kept because there is none: every draw is seeded by (seed, step, task, sample).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitau import parallel
from minitau.episode import BadInput
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
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: damaged ({type(error).__name__}: {error})") from None
    else:
        files = ["model.safetensors"]
    for file in files:
        if not (model_dir / file).is_file():
            raise CheckpointError(f"{model_dir}: {file} is missing; is the download complete?")
        try:
            with safe_open(model_dir / file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{model_dir / file}: damaged ({error})") from None


def save_pretrained(
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


class Writing(threading.Thread):
    """A checkpoint on its way to the disk. All ranks write, each in such a thread."""

    def __init__(self, write: Callable[[], Path]):
        super().__init__(name="checkpoint", daemon=True)
        self.write = write
        self.place: Path | None = None
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            parallel.use_device()
            self.place = self.write()
        except BaseException as error:
            self.problem = error


UNDER_WAY: list[Writing] = []  # what this process writes: one at most


def begin(
    run_dir: Path,
    step: int,
    model: Qwen3,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    dtype: torch.dtype,
    tokenizer_dir: Path,
    keep: int,
) -> None:
    """Begin to write the checkpoint of `step`, which in the end drops all but the newest `keep`.

    Until `finish`, neither weights nor optimizer may change. Raises CheckpointError for the one before.
    """
    finish()
    weights = parallel.FullWeights(model).parts()
    shards = parallel.state_of(model, optimizer)

    def fill(folder: Path) -> None:
        parallel.save_state(folder / "state", shards)
        whole = parallel.weights_on_main(weights, dtype)
        try:
            if parallel.is_main():
                save_pretrained(folder / "model", model.cfg, whole, dtype, tokenizer_dir)
                write_json(folder / "state.json", {"step": step, **state})
        finally:
            deque(whole, maxlen=0)  # the others give what they hold; the first rank takes it also if the disk does not

    UNDER_WAY.append(Writing(lambda: write(run_dir, step, fill, keep)))
    UNDER_WAY[0].start()


def finish() -> Path | None:
    """Wait for what `begin` began, if it did: the checkpoint that is now whole.

    Raises CheckpointError, when what was half written has been removed, if the disk is full; the
    earlier checkpoints are untouched.
    """
    if not UNDER_WAY:
        return None
    writing = UNDER_WAY[0]
    with uninterrupted():
        writing.join()
        UNDER_WAY.clear()
    if writing.problem:
        raise writing.problem
    return writing.place


def write(run_dir: Path, step: int, fill: Callable[[Path], None], keep: int) -> Path:
    """Have all ranks fill a folder, and give it its name. In the thread of checkpoints, or where there is no other."""

    def gather(item: str) -> list[str]:
        return parallel.gather(item, beside="checkpoint")

    place = run_dir / "checkpoints" / f"step-{step:06d}"
    scratch = place.with_name(f".{place.name}.tmp")
    if parallel.is_main():
        for leftover in place.parent.glob(".step-*.tmp"):  # of a crash, of whichever step
            shutil.rmtree(leftover, ignore_errors=True)
    gather("removed")
    problem = ""
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        fill(scratch)
    except OSError as error:
        problem = str(error)
    if problems := [p for p in gather(problem) if p]:
        if parallel.is_main():
            shutil.rmtree(scratch, ignore_errors=True)
        kept = latest(run_dir)
        advice = f"free some space and go on from {kept} with --resume" if kept else "free some space"
        raise CheckpointError(f"checkpoint of step {step} was not written ({problems[0]}); {advice}")
    if parallel.is_main():
        if place.exists():  # a resumed run came by the same step again
            shutil.rmtree(place)
        scratch.rename(place)
        for old in all_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    gather("named")
    return place


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let ctrl-C wait until the block is done: what is written is worth the wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = {number: signal.signal(number, lambda *_: caught.append(1)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit())


def latest(run_dir: Path) -> Path | None:
    found = all_checkpoints(run_dir)
    return found[-1] if found else None


def load(run_dir: Path, model: Qwen3, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Restore the newest checkpoint in place; its state, or None if there is none yet."""
    place = latest(run_dir)
    if place is None:
        return None
    try:
        state = json.loads((place / "state.json").read_text())
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError("state.json does not say at which step")
        parallel.load_state(place / "state", model, optimizer)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        advice = "remove it to go on from the one before"
        if len(all_checkpoints(run_dir)) == 1:
            advice = "it is the only one: choose another --out, or remove the run to start over"
        raise CheckpointError(f"{place}: cannot be read ({why}); {advice}") from None
    return state


def write_json(path: Path, row: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    scratch = path.with_name(f".{path.name}.tmp")
    with open(scratch, "w", encoding="utf-8") as file:
        json.dump(row, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
