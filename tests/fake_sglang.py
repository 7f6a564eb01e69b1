"""A stand-in for SGLang's server where there is none: the endpoints that minitau uses, over the embedded engine.

    python tests/fake_sglang.py --model-path DIR --port 30000 [--load-format dummy] [...]

A real process with real HTTP and real tensors by handle; only what computes is ours. What it accepts, refuses and
replies is what SGLang 0.5 was seen to, and so is what kills it: ids outside the vocabulary, a tensor of another shape,
weights that are not what load_format says, memory that is released twice or under a request. (A name that it does not
know does not.) With --tp-size N it wants N handles, and takes the i-th part of every tensor from the i-th, as N workers
would; that one more or less kills it is stricter than SGLang, which leaves out what is too much. For a test's sake the
environment may ask for trouble: FAKE_SGLANG_DIES=N ends it after N replies, in each of its lives, on every rank or on
that of FAKE_SGLANG_RANK.
"""

import argparse
import base64
import itertools
import json
import os
import pickle
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
import torch.distributed as dist
import torch.multiprocessing

from minitau import pretrained
from minitau.engines.local import LocalEngine
from minitau.episode import EngineError, Sampling
from minitau.model import init_weights

IGNORED = ("--mem-fraction-static", "--base-gpu-id", "--random-seed", "--max-running-requests")
IGNORED += ("--served-model-name", "--tool-call-parser")


class Fake:
    """The server's state: an engine that ends a reply at the stop tokens of its request."""

    def __init__(self, args):
        self.model = pretrained.load_model(args.model_path).requires_grad_(False)
        if args.load_format == "dummy":
            init_weights(self.model, seed=12345)
        self.model.to(getattr(torch, args.dtype))
        self.args, self.version, self.asleep = args, "default", False
        self.engines, self.lock, self.replies = {}, threading.Lock(), itertools.count(1)
        self.running, self.aborted = set(), set()
        mine = os.environ.get("FAKE_SGLANG_RANK", args.random_seed) == args.random_seed  # seed 0 and rank
        self.dies_after = int(os.environ.get("FAKE_SGLANG_DIES", 0)) if mine else 0
        self.groups = {}  # name -> a group of each worker

    def engine(self, stop_ids):
        with self.lock:
            if stop_ids not in self.engines:
                self.engines[stop_ids] = LocalEngine(
                    self.model, stop_ids, slots=16, max_context=self.args.context_length, patience=0.0
                )
            return self.engines[stop_ids]

    def generate(self, body):
        params, name = body["sampling_params"], body["rid"]
        assert body["return_logprob"] is True
        while self.asleep:  # such a request hangs until the memory is back
            time.sleep(0.05)
        if len(body["input_ids"]) >= self.args.context_length:
            raise ValueError(f"The input ({len(body['input_ids'])} tokens) is longer than the model's context length")
        sampling = Sampling(params["temperature"], 1)
        ids, logprobs, finish = list(body["input_ids"]), [], {"type": "length", "length": params["max_new_tokens"]}
        if not body["input_ids"] or not max(body["input_ids"]) < self.model.cfg.vocab_size:
            os._exit(9)
        self.running.add(name)
        engine = self.engine(frozenset(params["stop_token_ids"]))
        while len(logprobs) < params["max_new_tokens"]:
            if name in self.aborted:
                finish = {"type": "abort", "message": "Aborted", "status_code": None}
                break
            # Token by token, so that it can be aborted in between; the draws go on from one seed.
            seed = params["sampling_seed"] * 1_000_003 + len(logprobs)
            said = engine.generate(ids, sampling, session=name, seed=seed)
            ids.append(said.ids[0])
            logprobs.append(said.logprobs[0])
            if said.finish == "stop" and len(logprobs) < params["max_new_tokens"]:  # the real one goes by length first
                finish = {"type": "stop", "matched": said.ids[0]}
                break
        output = ids[len(body["input_ids"]) :]
        pairs = [[logprob, token, None] for logprob, token in zip(logprobs, output)]
        self.running.discard(name)
        if next(self.replies) == self.dies_after:
            os._exit(9)
        meta = {"id": name, "finish_reason": finish, "output_token_logprobs": pairs, "weight_version": self.version}
        return {"text": "", "output_ids": output, "meta_info": meta}

    def update(self, body):
        payloads, tp = body["serialized_named_tensors"], self.args.tp_size
        if len(payloads) != tp:
            print(f"{len(payloads)} handles for {tp} workers", flush=True)
            os._exit(9)
        for worker, payload in enumerate(payloads):
            try:
                named = unpacked(pickle.loads(base64.b64decode(payload)), body.get("load_format"))
            except Exception as error:
                print(f"{type(error).__name__}: {error}", flush=True)
                os._exit(9)
            self.take(named, worker)
        if body["flush_cache"]:
            self.flush()
        self.version = body["weight_version"]
        return {"success": True, "message": "Success"}

    def take(self, named, worker):
        """A worker's part of each tensor: of its rows, here."""
        own, tp = dict(self.model.named_parameters()), self.args.tp_size
        for name, tensor in named:
            if name not in own:
                print(f"Parameter {name} not found in params_dict", flush=True)
            elif own[name].shape != tensor.shape:
                os._exit(9)
            else:
                own[name].tensor_split(tp)[worker].copy_(tensor.tensor_split(tp)[worker])

    def join(self, body):
        """As SGLang does, each worker as a rank: its group knows no default one. It waits for the others."""
        c10d, rank, size = dist.distributed_c10d, body["rank_offset"], body["world_size"]
        where = f"tcp://{body['master_address']}:{body['master_port']}"
        store, _, _ = next(dist.rendezvous(where, rank, size, timeout=c10d.default_pg_timeout))
        name, backend = body["group_name"], dist.Backend(body["backend"])
        bare = [None] * self.args.tp_size

        def join_bare(worker):
            """A process has one group of a name: the workers after the first, here threads, do what is under it."""
            store = dist.TCPStore(body["master_address"], body["master_port"], wait_for_workers=False)
            for prefix in (name, f"{name}/", "cpu/"):
                store = dist.PrefixStore(prefix, store)
            bare[worker] = dist.ProcessGroupGloo(store, rank + worker, size, c10d.default_pg_timeout)

        others = [threading.Thread(target=join_bare, args=(i,), daemon=True) for i in range(1, len(bare))]
        for other in others:
            other.start()
        more = {"group_name": name, "timeout": c10d.default_pg_timeout}
        group, _ = c10d._new_process_group_helper(size, rank, [], backend, dist.PrefixStore(name, store), **more)
        c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
        for other in others:
            other.join()
        self.groups[name] = [group, *bare[1:]]
        self.device = f"cuda:{self.args.base_gpu_id}" if body["backend"] == "nccl" else "cpu"

    def receive(self, body):
        got = []
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
            for worker, group in enumerate(self.groups[body["group_name"]]):
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                got.append((name, tensor, worker, group.broadcast(tensor, 0)))
        for name, tensor, worker, work in got:
            work.wait()
            self.take([(name, tensor)], worker)
        if body["flush_cache"]:
            self.flush()
        self.version = body["weight_version"]

    def load(self, body):
        self.model.load_state_dict(pretrained.load_model(body["model_path"]).state_dict())
        self.version = body["weight_version"]
        self.flush()
        return {"success": True, "message": "Succeeded to update model weights."}

    def flush(self):
        for engine in self.engines.values():
            engine.sync([], 0)

    def memory(self, asleep):
        assert self.args.enable_memory_saver, "SGLang was not started with --enable-memory-saver"
        if self.asleep == asleep or (asleep and self.running):
            os._exit(9)
        self.asleep = asleep

    def answer(self, path, body):
        match path:
            case "/health":
                return None
            case "/model_info":
                return {"model_path": self.args.model_path, "weight_version": self.version}
            case "/generate":
                return self.generate(body)
            case "/update_weights_from_tensor":
                return self.update(body)
            case "/init_weights_update_group":
                self.join(body)
            case "/update_weights_from_distributed":
                self.receive(body)
            case "/destroy_weights_update_group":
                dist.destroy_process_group(self.groups.pop(body["group_name"])[0])
            case "/update_weights_from_disk":
                return self.load(body)
            case "/abort_request":
                self.aborted.add(body["rid"])
            case "/release_memory_occupation":
                self.memory(True)
            case "/resume_memory_occupation":
                self.memory(False)
            case _:
                raise LookupError(path)


def unpacked(named, load_format):
    """[(name, tensor), ...]; those of a bucket are views of it."""
    if load_format == "flattened_bucket":
        flat = named["flattened_tensor"]
        about = [(each.name, each.start_idx, each.end_idx, each.dtype, each.shape) for each in named["metadata"]]
        return [(name, flat[start:end].view(dtype).reshape(shape)) for name, start, end, dtype, shape in about]
    if load_format is not None:
        raise NotImplementedError(f"Unknown load_format={load_format}")
    return [(name, tensor) for name, tensor in named]


def handler(fake):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
            try:
                status, row = 200, fake.answer(self.path, body)
            except LookupError:
                status, row = 404, {"detail": "Not Found"}
            except (ValueError, EngineError) as error:
                status, row = 400, {"error": {"message": str(error)}}
            except Exception as error:
                status, row = 500, {"error": {"message": f"{type(error).__name__}: {error}"}}
            payload = b"" if row is None else json.dumps(row).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, text, *values):
            print(text % values, flush=True)

    return Handler


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("--model-path", "--host", "--load-format", *IGNORED):
        parser.add_argument(flag, default="")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--port", type=int)
    parser.add_argument("--context-length", type=int, default=4096)
    parser.add_argument("--tp-size", type=int, default=1)
    for flag in ("--skip-tokenizer-init", "--skip-server-warmup", "--enable-memory-saver"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args()
    print(f"the fake server starts with {' '.join(sys.argv[1:])}", flush=True)
    torch.set_num_threads(1)
    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer((args.host, args.port), handler(Fake(args))).serve_forever()


if __name__ == "__main__":
    main()
