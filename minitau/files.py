"""Files as a run writes and reads them: whole or not at all, and JSON a line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from minitau.episode import BadInput


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where the block writes what `path` is to be: a reader sees the old file or the new one, never half of one, and
    nothing is left of one that failed."""
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, row: Any) -> None:
    """Write JSON whole or not at all, and have it on the disk."""
    with written_whole(path) as scratch, open(scratch, "w", encoding="utf-8") as file:
        json.dump(row, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSONL whole or not at all."""
    with written_whole(path) as scratch, open(scratch, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a JSONL file with their numbers, without empty ones, and without the last one if a crash cut it in
    half. Raises BadInput if it is no text."""
    if not path.is_file():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    try:
        return [(number, line) for number, line in enumerate(whole.decode("utf-8").split("\n"), 1) if line.strip()]
    except UnicodeDecodeError as error:
        number = whole.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}, line {number}: not UTF-8; remove the line to go on without it") from None


def whole_lines(path: Path) -> list[str]:
    """Those lines without their numbers."""
    return [line for _, line in numbered_lines(path)]


def open_to_append(path: Path) -> TextIO:
    """Open a JSONL file to append to; a last line that a crash cut in half is dropped first."""
    whole = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (the caller closes it)
    file.truncate(whole)
    return file


def file_sha256(path: str | Path) -> str:
    """What a file holds, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
