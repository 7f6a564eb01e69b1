"""How fast others train the same model on the same tokens: transformers in a plain loop, and TRL's SFTTrainer.

    python -m benchmarks.peers --which transformers --attention flash_attention_4
    python -m benchmarks.peers --which trl --attention flash_attention_4 --liger

A dense Qwen3 with random weights takes optimizer steps (forward, loss, backward, clipping, fused AdamW) on one
micro-batch of packed documents, every token predicted but the first of each. Prints one JSON object; the seconds are
the median after two steps to warm up. Both do as their manuals say:

transformers  DataCollatorWithFlattening with the boundaries of the documents, bf16 autocast, the model's own loss
trl           packing ("bfd", which is padding-free), bf16 autocast, the loss that never holds all logits: its
              defaults; the dataset is one epoch of one row, so that every step sees exactly these documents

--weights     float32 keeps fp32 master weights under autocast, which is what TRL does unless told otherwise;
              bfloat16 trains the bf16 weights themselves, with AdamW's moments in bf16
--attention   what transformers calls it: flash_attention_4 (needs the package flash-attn-4, and a GPU), sdpa, ...
--liger       Liger's Triton kernels: with TRL all but its loss, which TRL replaces
--checkpointing selective    TRL's own: what torch's attention gave is kept, the rest computed again

`--shape tiny --attention sdpa` runs on a CPU, to see that it works. Needs transformers 5 and accelerate, trl for trl.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from benchmarks.flags import at_least
from benchmarks.mfu import LENGTHS, SHAPES, mfu
from minitau.memory import parameters

WARM_UP = 2
PACKAGES = ("torch", "transformers", "accelerate", "trl", "datasets", "liger-kernel", "flash-attn-4", "triton")


@dataclass
class Measured:
    """What a run leaves behind: seconds and losses of each step, and what it really trained with."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


# -- what both train ---------------------------------------------------------------------------------------


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> float:
    """Seconds on a clock, once the GPU has done all it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def new_model(args: argparse.Namespace) -> transformers.PreTrainedModel:
    """A Qwen3 with random weights, made on the GPU. Raises ImportError for an attention that is not installed."""
    shape = SHAPES[args.shape]
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    config = transformers.Qwen3Config(**vars(shape), rope_parameters=rope)
    torch.manual_seed(0)
    with torch.device(device()):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=args.attention, dtype=getattr(torch, args.weights)
        )
    found = sum(each.numel() for each in model.parameters())
    assert found == parameters(shape), f"the model has {found} parameters, the shape {parameters(shape)}"
    return model


def documents(args: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Random ids, a document a length."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[args.shape].vocab_size
    return [{"input_ids": torch.randint(vocabulary, (n,), generator=generator).tolist()} for n in args.lengths]


def facts(model: transformers.PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read off the objects that trained, not off what was asked for."""
    moment = next(iter(optimizer.state.values()))["exp_avg"]
    return {
        "attention": model.config._attn_implementation,
        "weights": str(next(model.parameters()).dtype),
        "moments": str(moment.dtype),
        "checkpointing": model.is_gradient_checkpointing,
        "fused_adamw": bool(optimizer.param_groups[0].get("fused")),
    }


# -- transformers ------------------------------------------------------------------------------------------


def train_transformers(args: argparse.Namespace, measured: Measured) -> None:
    """A loop as the manual writes it, around the model's own loss."""
    model = new_model(args).train()
    if args.liger:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, None)
    if args.checkpointing == "on":
        model.gradient_checkpointing_enable()
    if args.compile:
        model.compile()
    batch = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(documents(args))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
    precision = contextlib.nullcontext()
    if args.weights == "float32":
        precision = torch.autocast(device().type, torch.bfloat16)
    for _ in range(args.steps):
        start = now()
        on_device = {name: each.to(device()) if torch.is_tensor(each) else each for name, each in batch.items()}
        with precision:
            loss = model(**on_device, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        measured.seconds.append(now() - start)
        measured.losses.append(loss.item())
    measured.facts = facts(model, optimizer)


# -- TRL ---------------------------------------------------------------------------------------------------


class Watch(transformers.TrainerCallback):
    """Times the trainer's steps, and takes the losses from what it logs."""

    def __init__(self, measured: Measured):
        self.measured = measured
        self.start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.measured.seconds.append(now() - self.start)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.measured.losses.append(float(logs["loss"]))


def small_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """SFTTrainer wants one, to pad with. The documents are ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"<unk>": 0, "<pad>": 1, "<eos>": 2}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


def train_trl(args: argparse.Namespace, measured: Measured) -> None:
    """SFTTrainer with packing; only what its manual names, and what one micro-batch a step asks for, is set."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        cfg = SFTConfig(
            output_dir=folder,
            packing=True,
            max_length=sum(args.lengths),
            per_device_train_batch_size=1,
            max_steps=args.steps,
            gradient_checkpointing=args.checkpointing != "off",
            gradient_checkpointing_kwargs={"selective": True} if args.checkpointing == "selective" else None,
            use_liger_kernel=args.liger,
            torch_compile=args.compile,
            use_cpu=device().type == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = Dataset.from_list(documents(args))
        trainer = SFTTrainer(model=new_model(args), args=cfg, train_dataset=rows, processing_class=small_tokenizer())
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(Watch(measured))
        packed = [sorted(row["seq_lengths"]) for row in trainer.train_dataset]
        assert packed == [sorted(args.lengths)], f"packed into rows of {packed}"
        trainer.train()
    measured.facts = facts(trainer.model, trainer.optimizer.optimizer)
    measured.facts["packing"] = f"{cfg.packing_strategy}, padding_free {trainer.padding_free}"
    measured.facts["bf16_autocast"] = cfg.bf16


# -- the report --------------------------------------------------------------------------------------------

TRAIN: dict[str, Callable[[argparse.Namespace, Measured], None]] = {
    "transformers": train_transformers,
    "trl": train_trl,
}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report(args: argparse.Namespace, measured: Measured) -> dict[str, Any]:
    row: dict[str, Any] = vars(args) | {"tokens": sum(args.lengths), "trained_with": measured.facts}
    if len(measured.seconds) > WARM_UP:
        seconds = statistics.median(measured.seconds[WARM_UP:])
        row["tokens_per_second"] = sum(args.lengths) / seconds
        row["mfu"] = mfu(SHAPES[args.shape], args.lengths, seconds)
        row["seconds_per_step"] = seconds
    row |= {"seconds": measured.seconds, "losses": measured.losses}
    if torch.cuda.is_available():
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row["gpu"] = torch.cuda.get_device_name()
    row["versions"] = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    return row


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--which", choices=TRAIN, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens of each packed document")
    parser.add_argument("--steps", type=at_least(1), default=6)
    parser.add_argument("--checkpointing", choices=("on", "off", "selective"), default="on")
    parser.add_argument("--attention", default="flash_attention_4")
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile, as the trainer or the model offers it")
    args = parser.parse_args()
    try:
        args.lengths = [int(each) for each in args.lengths.split(",")]
    except ValueError:
        parser.error("--lengths: whole numbers with commas between them")
    if min(args.lengths) < 2:
        parser.error("--lengths: a document has at least 2 tokens, or nothing in it is predicted")
    if args.steps <= WARM_UP:
        parser.error(f"--steps: more than the {WARM_UP} that warm up")
    if args.checkpointing == "selective" and args.which != "trl":
        parser.error("--checkpointing selective is TRL's")
    return args


def main() -> None:
    args, measured, failed = arguments(), Measured(), {}
    try:
        TRAIN[args.which](args, measured)
    except ImportError as error:
        raise SystemExit(f"peers.py: {error}") from None
    except torch.OutOfMemoryError as error:
        failed = {"out_of_memory": str(error).split(". ")[0]}
    print(json.dumps(report(args, measured) | failed))


if __name__ == "__main__":
    main()
