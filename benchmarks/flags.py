"""What argparse makes of the benchmarks' flags, each with one line for what cannot be."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable


def among(parts: Iterable[str]) -> Callable[[str], list[str]]:
    """A reader of names of `parts`, separated by commas."""

    def read(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in parts]:
            raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}; there are {', '.join(parts)}")
        return text.split(",")

    return read


def at_least(least: int) -> Callable[[str], int]:
    """A reader of a whole number."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} up")
        return int(text)

    return read
