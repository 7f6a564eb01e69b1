"""Ranks whose servers all die under a request, again and again: what test_sglang.py runs on four of them.

many_deaths.py FOLDER          a rank
many_deaths.py --port PORT     its server, which stands in a moment, takes any weights and says one token
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROUNDS = 4
REPLY_SECONDS = 0.3  # in which the server is killed


def serve(port):
    version = ["none"]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.reply(None)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/generate":
                time.sleep(REPLY_SECONDS)
                about = {"finish_reason": {"type": "stop"}, "output_token_logprobs": [[-1.0, 1, None]]}
                return self.reply({"meta_info": {**about, "weight_version": version[0]}})
            version[0] = body["weight_version"]
            self.reply({"success": True})

        def reply(self, row):
            payload = json.dumps(row).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def play(folder):
    import torch
    from conftest import child_of, small_model

    from minitau import parallel
    from minitau.engines.server import Server
    from minitau.engines.sglang import SGLangEngine
    from minitau.engines.upkeep import RESTARTED
    from minitau.episode import Sampling
    from minitau.rollout import in_threads

    parallel.start()
    model = small_model()
    parallel.shard(model, model.model.layers, torch.float32)
    log = folder / f"server-{parallel.rank()}.log"
    server = Server(lambda port: [sys.executable, __file__, "--port", str(port)], log, f"server {parallel.rank()}")
    engine = SGLangEngine(server, [5], vocab_size=97, max_context=99, dtype=torch.float32, timeout=30.0)
    versions = []

    def ask(_):
        said = engine.generate([1, 2], Sampling(1.0, 8), session="s", seed=0)
        versions.append(said.weight_version)

    for number in range(1, ROUNDS + 1):
        engine.sync(parallel.FullWeights(model), number)
        at = parallel.from_main(time.time()) + REPLY_SECONDS / 2
        killing = threading.Timer(max(0.0, at - time.time()), lambda: os.kill(child_of(server), signal.SIGKILL))
        killing.start()
        in_threads(ask, parallel.SharedQueue(f"round {number}", 1, each_rank=True), 1, engine)
        killing.join()
        parallel.gather(number, beside="rollout")  # as rollout.collect does, and all must get there
    announced = parallel.count(f"announced/{RESTARTED}", 0)
    answered = parallel.ANSWERED[RESTARTED]
    (folder / f"rank-{parallel.rank()}.json").write_text(json.dumps([versions, announced, answered]))
    engine.close()
    parallel.stop()


if __name__ == "__main__":
    if sys.argv[1] == "--port":
        serve(int(sys.argv[2]))
    else:
        play(Path(sys.argv[1]))
