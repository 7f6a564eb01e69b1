"""Plays batches: one when it is asked for, or beside what goes on meanwhile.

It knows nothing of what a batch is. What plays it beside the training must stay out of the training's way: see
`parallel.gather`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Batch = TypeVar("Batch")

LOOK_SECONDS = 0.05  # between two looks at a batch that is waited for


class Player(Generic[Batch]):
    """Plays batches by their number, one at a time. `play` may do so in another thread than the caller's."""

    def __init__(self, play: Callable[[int], Batch]):
        self.play = play
        self.thread: threading.Thread | None = None
        self.result: Batch | None = None
        self.problem: BaseException | None = None

    def start(self, number: int) -> None:
        """Begin to play batch `number`. It must be waited for, and taken, before the next one."""
        assert self.thread is None, "one batch at a time"

        def run() -> None:
            try:
                self.result = self.play(number)
            except BaseException as error:
                self.problem = error

        self.thread = threading.Thread(target=run, name=f"batch-{number}", daemon=True)
        self.thread.start()

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Until the batch that was started, if one was, has been played; `meanwhile` is called again and again, the
        last time when it has been. Raises what playing raised, then without that last call.
        """
        while self.thread and self.thread.is_alive():
            self.thread.join(LOOK_SECONDS)
            meanwhile()
        if self.thread and not self.problem:
            meanwhile()
        if self.problem:
            raise self.problem

    def take(self, number: int) -> Batch:
        """Batch `number`: the one that was started and waited for, or else played now, in this thread."""
        if self.thread is None:
            return self.play(number)
        assert not self.thread.is_alive(), "what was started is waited for first"
        batch, self.thread, self.result = self.result, None, None
        return batch
