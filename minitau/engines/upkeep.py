"""A server that stays up: whoever finds it dead or hanging has it started again, and the others wait.

Most servers are asked by one rank alone. With fewer servers than ranks a server has a host, the rank that starts it,
and guests, which say to their host that it is lost, are told that it is down and where it is afterwards. It knows
nothing of models.
"""

from __future__ import annotations

import contextlib
import threading

import torch

from minitau import parallel
from minitau.engines.server import Server, healthy
from minitau.episode import EngineError

DEATHS = 3  # in a row: then the server is not started again
IN_VAIN = "it waited in vain for the others"  # why a server hangs that did nothing wrong
LONG_LIFE = 600.0  # seconds: a server that lived so long does not die in a row with the one before
# What ranks announce to each other. All but the first are said of the server of a rank, LOST and DOWN of one life.
RESTARTED = "a server was started anew"
LOST = "the server of rank {} is lost in its life {}"
DOWN = "the server of rank {} is down after its life {}"
GIVEN_UP = "the server of rank {} is given up"


class Upkeep:
    """One server, of ours or not: see SGLangEngine. `ready` and what else changes does so under `changed`."""

    def __init__(
        self, server: Server | None, url: str, host: int | None, *, takes_weights: bool, timeout: float
    ) -> None:
        self.server, self.fixed_url, self.host = server, url.rstrip("/"), host
        self.takes_weights, self.timeout = takes_weights, timeout
        self.joint = takes_weights or host is not None  # after a start all ranks bring it weights, or learn where it is
        self.version = 0  # of the server's weights
        self.changed = threading.Condition()
        self.life = 0  # counts the server's starts: who lost a request says in which life
        self.deaths = 0  # since the last sync
        self.ready = not self.joint  # it stands, with the weights of `version`
        self.down = False  # it is being started again
        self.mending = False  # a thread looks after it
        self.given_up = ""  # why nothing more will come
        if server:
            server.start(timeout, shown=parallel.is_main())
        elif host is None and not healthy(self.fixed_url):
            raise EngineError(f"no healthy server at {self.fixed_url}; start it, or leave --engine-url out")

    @property
    def url(self) -> str:
        return self.server.url if self.server else self.fixed_url

    @property
    def leads(self) -> bool:
        """True but for a guest: this rank speaks for all who ask the server."""
        return self.server is not None or self.host is None

    def wait_until_ready(self) -> tuple[int, int]:
        """Wait for a server with weights to sample from; the life it is in, and their version.

        Raises EngineError if none will come.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.ready or self.given_up)
            if self.given_up:
                raise EngineError(self.given_up)
            return self.life, self.version

    def lost(self, life: int, why: str) -> None:
        """The server is dead or hangs, in its `life`. Whoever notices first starts it again, the others wait.

        Raises EngineError if it cannot be started, or not any more.
        """
        with self.changed:
            if self.mending:
                self.changed.wait_for(lambda: not self.mending)
            if life != self.life or self.given_up:
                return
            self.mending = True
        try:
            self.mend(life, why)
            if self.server and self.joint:
                parallel.announce(RESTARTED)
        finally:
            with self.changed:
                self.mending = False
                self.changed.notify_all()

    def mend(self, life: int, why: str) -> None:
        """Start the server again, or have its host do so; its weights are still to come. life: in which it was lost.

        Raises EngineError, now and for whoever asks later, if it is not ours, died too often or does not start.
        """
        if self.given_up or not self.server:
            if self.given_up or self.host is None:
                return self.give_up(f"{self.url} takes no weights: {why}")
            self.step_aside(life)
            return parallel.announce(LOST.format(self.host, life))
        if self.server.age() > LONG_LIFE + self.timeout:  # (a server that hangs is noticed so much later)
            self.deaths = 0
        with self.changed:
            self.ready, self.down = False, True
        if self.host is not None:
            parallel.announce(DOWN.format(self.host, life))
        while not self.given_up:
            self.deaths += why != IN_VAIN  # then it is another one's death
            words = self.server.last_words()
            self.server.close()
            if self.deaths >= DEATHS:
                return self.give_up(f"{self.server.name} died {self.deaths} times in a row: {why}; {words}")
            print(f"{self.server.name} is lost ({why}) and is started again; {words}", flush=True)
            torch.cuda.empty_cache()  # a server takes its part of what is free
            try:
                self.server.start(self.timeout, shown=False)
            except EngineError as error:
                why = str(error)
                continue
            with self.changed:
                self.life += 1
                self.ready, self.down = not self.joint, False
                return self.changed.notify_all()

    def give_up(self, why: str) -> None:
        """Tell everyone who waits or will ask. Raises EngineError."""
        with self.changed:
            self.given_up = self.given_up or why
            self.changed.notify_all()
        if self.server and self.host is not None:
            parallel.announce(GIVEN_UP.format(self.host))
        raise EngineError(self.given_up)

    # -- hosts and guests ------------------------------------------------------------------------------

    def listen(self) -> None:
        """Hear what guests say of this rank's server, or the host of this rank's: each notices when it asks."""
        with contextlib.suppress(EngineError):  # whoever waits for the server is told
            if not self.server:
                if parallel.was_announced(GIVEN_UP.format(self.host)):
                    self.give_up(f"the server of rank {self.host} is given up: that rank and the server's log say why")
                life = self.life
                if self.ready and parallel.was_announced(DOWN.format(self.host, life)):
                    self.step_aside(life)
            else:
                life = self.life
                if parallel.was_announced(LOST.format(self.host, life)):
                    self.lost(life, "another rank got no reply")

    def step_aside(self, life: int) -> None:
        """A guest's part while its server, lost in that life, is started again: ask nothing, and leave free what
        training left cached. A server that is spread over GPUs takes what is free on the fullest, and refuses if
        another has much more."""
        with self.changed:
            if self.life == life:  # (it may have been told of a new one since)
                self.ready = False
        torch.cuda.empty_cache()

    def find_host(self) -> None:
        """Learn where the host's server is now, and in which life; a new one has no weights. All ranks together."""
        url, life, down = parallel.gather((self.url, self.life, self.down))[self.host]
        with self.changed:
            if not self.server:
                self.ready = self.ready and life == self.life and not down
                self.fixed_url, self.life = url, life
            if not self.takes_weights:  # nothing else is to come (a host may have lost it again since)
                self.ready = life == self.life and not (down or self.down)
                self.changed.notify_all()
