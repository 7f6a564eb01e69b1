"""Our scripts as processes that stand at once, for the tests that start many.

Each is forked from a process that has imported what takes every one of them seconds. It is a process like any other,
with its own settings, files, signals and exit status. Where the command that people type is the point, a test starts
that instead.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 1 << 20  # bytes of a request


class Script:
    """`python WORDS`, and as much of subprocess.Popen as tests need.

    WORDS begin with a file of the repository, -m or -c. stdout, stderr: open files. environment: what it gets beside
    this process's.
    """

    def __init__(self, *words: str, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **environment: str):
        self.args, self.returncode = words, None
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        with open(os.devnull, "r+") as null:
            files = [null if file == subprocess.DEVNULL else file for file in (stdout, stderr)]
            self.pid = ask({"words": words, "cwd": str(cwd), "env": env}, *(file.fileno() for file in files))

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = ask(self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(*words: str, ranks: int = 1, timeout: float = 240.0, **environment: str) -> subprocess.CompletedProcess:
    """Likewise of subprocess.run: what it printed is in `stdout` and `stderr`.

    ranks: so many processes, as torchrun would start them; when one fails, the others are ended.
    """
    places = [{}]
    if ranks > 1:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they meet, as long as it lives
        places = [place(rank, ranks, store.port) for rank in range(ranks)]
    # Files, not pipes: torch's shared memory manager holds them open as long as a server holds a tensor.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        scripts = [Script(*words, stdout=out, stderr=err, **each, **environment) for each in places]
        deadline = time.monotonic() + timeout
        try:
            while None in (ended := [script.poll() for script in scripts]) and not any(ended):
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(words, timeout)
                time.sleep(0.01)
        finally:
            for script in scripts:
                script.kill()
                script.wait(30)
        said = [(file.seek(0), file.read())[1] for file in (out, err)]
    return subprocess.CompletedProcess(words, next(filter(None, ended), 0), *said)


def place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank of itself and the others."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    meet["TORCHELASTIC_RESTART_COUNT"] = "0"
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), **meet}


@functools.cache
def parent() -> socket.socket:
    """Where to ask for a process. Their parent ends when this end is closed, as it is at the latest when we end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])
    atexit.register(process.wait)
    atexit.register(ours.close)  # first
    return ours


def ask(request, *files: int):
    socket.send_fds(parent(), [json.dumps(request).encode()], files)
    return json.loads(parent().recv(LONGEST))


# -- the other side --------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> dict:
    """Fork for every dict that comes, and say how a pid ended, or null. Returns in the new processes alone."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, LONGEST, 2)
        if not message:
            sys.exit()
        request = json.loads(message)
        if isinstance(request, dict):
            answer = os.fork()
            if not answer:
                connection.close()
                for number, file in enumerate(files, 1):
                    os.dup2(file, number)
                    os.close(file)
                return request
            for file in files:
                os.close(file)
        else:
            found, status = os.waitpid(request, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if found else None
        connection.send(json.dumps(answer).encode())


def become(words: list[str], cwd: str, env: dict[str, str]) -> None:
    """Run what `python WORDS` would."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))  # what the variable says is read when torch is imported
    signal.signal(signal.SIGINT, signal.default_int_handler)
    first, *rest = words
    here, places = (str(ROOT), str(Path(__file__).parent)), env.get("PYTHONPATH", "").split(os.pathsep)
    places.insert(0, cwd if first in ("-c", "-m") else str((ROOT / first).parent))
    sys.path[:] = [*filter(None, places), *(each for each in sys.path if each not in here)]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        sys.modules.pop(rest[0], None)  # or runpy warns
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(str(ROOT / first), run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for whoever asks
    sys.path.insert(0, str(ROOT))
    import torch

    for name in ("torch._dynamo", "transformers.models.auto.tokenization_auto", "train", "eval", "serve_user"):
        importlib.import_module(name)
    gc.freeze()  # or the end of every process copies all of this, to free it
    become(**serve(socket.socket(fileno=int(sys.argv[1]))))
