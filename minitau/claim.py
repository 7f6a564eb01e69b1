"""A run's folder is its own: claimed with its settings, locked while it runs, and given to none that differs."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitau.episode import BadInput

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
    "data",  # likewise
    "floors",
    "engine_command",
    "engine_url",
    "engine_gpus",
    "engine_tp",
    "engine_mem",
    "engine_timeout",
    "engine_sleep",
    "max_drift",
    "recompute",
    "compile",
}

SHOWN = 5  # settings that differ are named, of what may be dozens


def claim_run_dir(
    out: str,
    resume: bool,
    settings: dict[str, Any],
    defaults: dict[str, Any],
    may_go_on: Callable[[dict[str, Any]], None],
) -> None:
    """Make `out` the folder of this run and record its settings there.

    defaults: of settings that a run of earlier code does not know. may_go_on: gets the settings that a run had which
    goes on, and raises BadInput if it cannot. Raises BadInput if `out` holds another run, or this one and `resume` was
    not asked for.
    """
    folder = Path(out)
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{out} is a file; --out must be a folder")
    if path.is_file():
        before = read_settings(path)
        known, now = (json.loads(json.dumps(each)) for each in ({**defaults, **before}, settings))
        if different := difference(known, now):
            raise BadInput(f"{out} holds {different}")
        if not resume:
            raise BadInput(f"{out} holds this run already; add --resume to go on, or choose another --out")
        may_go_on(before)
    elif folder.exists() and {entry.name for entry in folder.iterdir()} - {".lock", "config.tmp"}:
        # (Those two are all that a run leaves which was killed while it claimed the folder.)
        raise BadInput(f"{out} is not empty and holds no run of minitau; choose another --out")
    with refusing(out):
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder / ".lock")
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(settings, indent=1))
        scratch.replace(path)


def claim_for(marker: str, out: Path, identity: dict[str, Any], resume: bool) -> None:
    """Make `out` the folder of a command that runs others; without `resume` it starts empty.

    marker: name of the file by which such a folder is known. identity: what makes it this one, recorded there.
    A folder that holds something else is neither used nor, above all, removed. Raises BadInput for such a folder, and
    for one of another identity.
    """
    path, scratch = out / marker, out / f"{marker}.tmp"
    if out.is_file():
        raise BadInput(f"{out} is a file; --out must be a folder")
    if out.exists() and {entry.name for entry in out.iterdir()} - {scratch.name} and not path.is_file():
        # (The scratch file is all that a command leaves which was killed while it claimed the folder.)
        raise BadInput(f"{out} is not empty and was not made by this command; choose another --out")
    with refusing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock(out.with_name(f".{out.name}.lock"))  # beside it: one inside would go with the folder
        if not resume:
            shutil.rmtree(out, ignore_errors=True)
        out.mkdir(exist_ok=True)
    settings = json.dumps(identity)
    if not path.is_file():
        scratch.write_text(settings)
        scratch.replace(path)  # whole or not at all: half a marker would be other settings
    elif path.read_text() != settings:
        raise BadInput(
            f"{out} was begun with other settings or another base model; --no-resume starts over, or choose another "
            "--out"
        )


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What run it is that has these settings, and what to do, if it is another one; else ""."""
    kind, ours = (of.get("stage") or of.get("script") for of in (before, now))
    if kind != ours:
        return f"a run of {kind}; choose another --out"
    # A model is known by what it holds, if the run has noted that, as early ones did not; else by where it lies.
    free = FREE_ON_RESUME | {"model" if "model_sha256" in before else "model_sha256"}
    changed = sorted(k for k in before | now if k not in free and before.get(k) != now.get(k))
    if not changed:
        return ""
    told = [
        f"what --{name.removesuffix('_sha256').replace('_', '-')} holds"
        if name.endswith("_sha256")
        else f"{name} ({shortened(before.get(name))}, now {shortened(now.get(name))})"
        for name in changed
    ]
    more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
    return f"another run: {', '.join(told[:SHOWN])}{more}; choose another --out or repeat its settings"


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


@contextmanager
def refusing(out: str | Path) -> Iterator[None]:
    """Raise BadInput where the block finds `out` locked, or cannot write there."""
    try:
        yield
    except BlockingIOError:
        raise BadInput(f"another process is at work in {out}; wait for it, or choose another --out") from None
    except OSError as error:
        raise BadInput(f"{out} cannot be written ({error.strerror}); choose another --out") from None


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


def lock(path: Path) -> None:
    """Make `path` this process's until it ends. Raises BlockingIOError if it is another's."""
    if path.resolve() not in LOCKS:
        file = open(path, "w")  # noqa: SIM115  (closing it would give the lock away)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        LOCKS[path.resolve()] = file
