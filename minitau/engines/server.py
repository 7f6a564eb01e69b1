"""A server process of ours: started on a free port, waited for, watched, and taken down on every exit.

It knows processes, ports and HTTP, and that /health answers 200 when all is well; nothing of models or tokens.
Servers listen on loopback only: their weight endpoints unpickle what they are sent, and ask for no password.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minitau.episode import BadInput, EngineError
from minitau.script import progress_bar

HOST = "127.0.0.1"
KEEPER = Path(__file__).with_name("keeper.py")
PORTS = (20_000, 32_000)  # below those that systems give away by themselves
LAST_LINES = 12  # of a log, shown when its server died
LOG_BYTES = 1 << 16  # of the log's end, which may be long
HEALTH_SECONDS = 30.0  # a server that is busy answers /health late, but it answers
END_SECONDS = 15.0  # for a server to end after it was asked to; more than the keeper's grace
# What torchrun says to its ranks is not for servers: they would take it for their own.
NOT_FOR_SERVERS = ("RANK", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "LOCAL_", "TORCHELASTIC_", "OMP_NUM_THREADS")
NOT_FOR_SERVERS += ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # nor what suits the trainer's memory


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback goes through no proxy


class NoAnswer(Exception):
    """A server did not answer, or not in time (`late`): it may be dead."""

    def __init__(self, said: str, late: bool):
        super().__init__(said)
        self.late = late


class Refused(Exception):
    """A server answered that it will not: `status` and what it said."""

    def __init__(self, status: int, said: str):
        super().__init__(f"HTTP {status}: {' '.join(said.split())[:300]}")
        self.status = status


def request(url: str, body: Any = None, *, timeout: float) -> Any:
    """POST `body` as JSON, or GET without one; the JSON that comes back, None if it is none.

    Raises Refused for an HTTP error, NoAnswer if the connection breaks or `timeout` seconds pass without a byte.
    """
    data = None if body is None else json.dumps(body).encode()
    message = urllib.request.Request(url, data, {"Content-Type": "application/json"} if data else {})
    try:
        try:
            with OPENER.open(message, timeout=timeout) as reply:
                said = reply.read()
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode("utf-8", "replace")) from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # refused, reset, timed out, cut in half; no URL
        reason = getattr(error, "reason", error)  # urllib wraps what happens before the request is out
        raise NoAnswer(f"{type(reason).__name__}: {reason}", isinstance(reason, TimeoutError)) from None
    try:
        return json.loads(said) if said else None
    except ValueError:
        return None


def healthy(url: str) -> bool:
    """True if the server at `url` says that it is well."""
    try:
        request(f"{url}/health", timeout=HEALTH_SECONDS)
    except (NoAnswer, Refused):
        return False
    return True


def free_port() -> tuple[int, socket.socket]:
    """A port that nobody listens on, drawn by lot, and what keeps it for us among all runs of this host until it is
    closed: a server takes a minute to bind its port, and whoever else found it would take our server for its own."""
    while True:
        port, kept = random.randrange(*PORTS), socket.socket(socket.AF_UNIX)
        try:
            kept.bind(f"\0minitau-port-{port}")  # a name without a file, which goes with its process
            if not port_is_taken(port):
                return port, kept
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # which would mean that another run keeps it
                raise
        kept.close()


def port_is_taken(port: int) -> bool:
    """True if somebody listens there, or nobody may (port 80, say). Raises BadInput for no port at all."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was left a moment ago is free
            probe.bind((HOST, port))
    except OverflowError:
        raise BadInput(f"--port is {port}; it must be from 0 to 65535") from None
    except OSError:
        return True
    return False


class Server:
    """One server, which may be started again and again.

    command: makes the command line for a port. log: file that it writes to, appended to. name: for people.
    environment: what it gets beside this process's. port: the one to take; 0 finds one at each start.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        log: Path,
        name: str,
        *,
        environment: dict[str, str] | None = None,
        port: int = 0,
    ):
        self.command, self.log, self.name = command, log, name
        self.environment = environment or {}
        self.wanted_port = self.port = port
        self.begun = 0  # where what it writes begins in its log
        self.kept_port: socket.socket | None = None
        self.process: subprocess.Popen | None = None
        self.started = time.monotonic()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def start(self, timeout: float, *, shown: bool = True) -> None:
        """Start it and wait until it is healthy, for `timeout` seconds at most.

        Raises EngineError with the last lines of its log if it dies or does not become healthy.
        """
        if not self.wanted_port:
            self.port, self.kept_port = free_port()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(NOT_FOR_SERVERS)}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as file:
            self.begun = file.tell()
            self.process = subprocess.Popen(
                [sys.executable, str(KEEPER), *self.command(self.port)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**inherited, **self.environment},
                start_new_session=True,  # ctrl-C is for us; we take it down ourselves
            )
        progress = progress_bar(f"starting {self.name} (log: {self.log})", None, "s", shown=shown)
        self.started = time.monotonic()
        try:
            while not healthy(self.url):
                waited = self.age()
                progress.update(int(waited) - progress.n)
                if not self.alive():
                    raise EngineError(f"{self.name} died while it started; {self.last_words()}")
                if waited > timeout:
                    raise EngineError(f"{self.name} is not healthy after {timeout:.0f} s; {self.last_words()}")
                time.sleep(0.2)
        except BaseException:
            self.close()
            raise
        finally:
            progress.close()

    def alive(self) -> bool:
        process = self.process  # another thread may be closing it
        return process is not None and process.poll() is None

    def age(self) -> float:
        """Seconds since it was last started."""
        return time.monotonic() - self.started

    def last_words(self) -> str:
        """Where its log is, and the end of it in one line."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(self.begun, self.log.stat().st_size - LOG_BYTES))  # of this start, not of an earlier one
                lines = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            lines = []
        words = [line.strip() for line in lines if line.strip(" ^~")][-LAST_LINES:]
        return f"the end of {self.log}: {' | '.join(words) or '(empty)'}"

    def close(self) -> None:
        """Take it down with all its children. Does nothing if it is down."""
        process, self.process = self.process, None  # first: another thread may be closing it as well
        kept, self.kept_port = self.kept_port, None
        with kept or contextlib.nullcontext():  # until the server is down
            if process is None:
                return
            with contextlib.suppress(OSError):
                process.stdin.close()  # its keeper ends it
            try:
                process.wait(END_SECONDS)  # (a second ctrl-C here leaves the rest to the keeper, which needs nobody)
            except subprocess.TimeoutExpired:
                process.kill()  # takes the server along
                process.wait()
