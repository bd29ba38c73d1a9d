"""A vLLM server for runs on other machines: it samples texts, scores texts for a served teacher,
and takes new weights.

    python -m reflux.trainer.rollouts.serve MODEL --port 8000 --max-len 4096

GET  /info              what is served: fingerprints, limits, the version of the weights
POST /texts             TextRequests -> texts, each with the version of the weights on it
POST /scores            ScoreRequests -> log-probabilities and top-k rows
POST /weights/begin     then chunks of tensors to /weights/chunk, then /weights/finish?version=NAME

Requests of all clients are decoded together. Weights change between texts, never inside of one: a
push waits for what is running. The server trusts whoever can reach its port, as vLLM's own does:
keep it inside the cluster.
"""

import argparse
import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from reflux.trainer.runs.signals import handled_by

from . import wire
from .engine_texts import ScoreRequest, TextRequest
from .fingerprint import model_fingerprint, tokenizer_fingerprint
from .vllm_engine import EngineOptions, VllmEngine

log = logging.getLogger("reflux.serve")

BODY_LIMIT = 1 << 34  # bytes of one request
QUIET_S = 0.02  # between two looks for new requests while nothing is decoded


@dataclass(eq=False)
class _Job:
    """Requests that are answered together; or, without requests, work between texts."""

    requests: Sequence[TextRequest | ScoreRequest] = ()
    work: Callable[[], None] | None = None
    future: Future = field(default_factory=Future)
    keys: list[str] = field(default_factory=list)
    done: dict[str, Any] = field(default_factory=dict)


class EngineThread:
    """Runs the engine: the one thread that touches it."""

    def __init__(self, engine: VllmEngine):
        self.engine = engine
        self._queue: queue.Queue[_Job] = queue.Queue()
        self._waiting: list[_Job] = []  # in order; behind work, which waits for running texts
        self._running: dict[str, _Job] = {}
        self._door = threading.Lock()  # a job is queued, or it reads that the engine has died
        self.broken: str | None = None
        self._stopping = False

    def ask(self, requests: Sequence[TextRequest | ScoreRequest]) -> list[Any]:
        """The answers, in order. Blocks; ValueError for what the engine refuses, RuntimeError once
        the engine has died.
        """
        return self._put(_Job(requests)) if requests else []

    def between_texts(self, work: Callable[[], None]) -> None:
        """Runs `work` when no text is being decoded. Blocks."""
        self._put(_Job(work=work))

    def _put(self, job: _Job) -> Any:
        with self._door:
            if self.broken:
                raise RuntimeError(self.broken)
            self._queue.put(job)
        return job.future.result()

    def stop(self, number: int = 0, frame: FrameType | None = None) -> None:
        """A handler of signals: run() ends after this turn. It raises nothing, for an exception in
        the middle of a queue leaves its lock in a state of its own.
        """
        self._stopping = True

    def run(self) -> None:
        """Until stop(); who still waits for an answer then is told so."""
        try:
            while not self._stopping:
                self._turn()
            self._refuse_all("the server was told to stop")
        except BaseException as error:
            log.exception("the engine has died")
            self._refuse_all(f"the engine has died: {error}")
            raise

    def _refuse_all(self, why: str) -> None:
        """Every job that has no answer yet, and every later one, ends with RuntimeError(why)."""
        with self._door:
            self.broken = why
            while not self._queue.empty():
                self._waiting.append(self._queue.get())
        for job in [*self._waiting, *self._running.values()]:
            if not job.future.done():  # a job of several requests is there once for each
                job.future.set_exception(RuntimeError(why))

    def _turn(self) -> None:
        self._take_new()
        while self._waiting and (self._waiting[0].work is None or not self._running):
            self._start(self._waiting[0])  # where that ends the engine, the job still waits
            self._waiting.pop(0)
        if not self._running:
            return
        for key, answer in self.engine.step().items():
            job = self._running.pop(key)
            job.done[key] = answer
            if len(job.done) == len(job.requests):
                job.future.set_result([job.done[k] for k in job.keys])

    def _take_new(self) -> None:
        idle = not self._running and not self._waiting
        try:
            self._waiting.append(self._queue.get(block=idle, timeout=QUIET_S if idle else None))
            while True:
                self._waiting.append(self._queue.get_nowait())
        except queue.Empty:
            pass

    def _start(self, job: _Job) -> None:
        try:
            if job.work is not None:
                job.work()
                job.future.set_result(None)
                return
            for request in job.requests:
                job.keys.append(self.engine.add(request))
            self._running |= dict.fromkeys(job.keys, job)
        except ValueError as error:
            self.engine.drop(job.keys)
            job.future.set_exception(error)


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        if urlsplit(self.path).path == "/info":
            self._answer(200, json.dumps(self.server.info()).encode(), "application/json")
        else:
            self._answer(404, b"unknown address; want /info")

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if size > BODY_LIMIT:
            self.close_connection = True
            return self._answer(413, b"the request is too large")
        body = self.rfile.read(size)
        parts = urlsplit(self.path)
        try:
            answer = self.server.post(parts.path, parse_qs(parts.query), body)
        except ValueError as error:  # of the client
            return self._answer(400, str(error).encode())
        except LookupError:
            return self._answer(404, b"unknown address")
        except BaseException as error:  # of the engine
            return self._answer(503, f"{type(error).__name__}: {error}".encode())
        self._answer(200, answer)

    def _answer(self, status: int, body: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


class Server(ThreadingHTTPServer):
    """The addresses of the server, on an engine that runs in the main thread."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int], engine: VllmEngine):
        super().__init__(address, Handler)
        options = engine.options
        self.engine_thread, self.engine = EngineThread(engine), engine
        self.facts = {
            "reflux": 1,  # of this protocol
            "vllm": engine.version,
            "path": os.path.abspath(options.path),
            "model": model_fingerprint(options.path),
            "tokenizer": tokenizer_fingerprint(options.path),
            "dtype": options.dtype,
            "max_len": options.max_len,
            "max_logprobs": options.max_logprobs,
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error of the server's."""
        if isinstance(sys.exc_info()[1], ConnectionError):
            log.debug("%s has gone", client_address)
        else:
            super().handle_error(request, client_address)

    def info(self) -> dict[str, Any]:
        state = {"version": self.engine.weights_version, "broken": self.engine_thread.broken}
        return self.facts | state

    def post(self, path: str, query: dict[str, list[str]], body: bytes) -> bytes:
        """The answer to one request. ValueError where it is the client's fault, LookupError for an
        unknown address.
        """
        thread, engine = self.engine_thread, self.engine
        if path == "/texts":
            return wire.pack_texts(thread.ask(wire.unpack_requests(body, TextRequest)))
        if path == "/scores":
            return wire.pack_scores(thread.ask(wire.unpack_requests(body, ScoreRequest)))
        if path == "/weights/begin":
            thread.between_texts(engine.begin_load)
        elif path == "/weights/chunk":
            chunk = wire.unpack_weights(body)
            thread.between_texts(lambda: engine.load_chunk(chunk))
        elif path == "/weights/finish":
            version = query["version"][0]
            thread.between_texts(lambda: engine.finish_load(version))
        else:
            raise LookupError(path)
        return b""


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = EngineOptions(
        args.model,
        args.dtype,
        args.max_len,
        args.max_running,
        args.gpu_memory_fraction,
        args.tensor_parallel,
        args.max_logprobs,
    )
    try:
        engine = VllmEngine(options, "reflux.trainer.rollouts.serve")
        server = Server((args.host, args.port), engine)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    threading.Thread(target=server.serve_forever, daemon=True).start()
    log.info("%s on http://%s:%d", args.model, *server.server_address[:2])
    with handled_by(server.engine_thread.stop):
        server.engine_thread.run()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.rollouts.serve",
        description="Serves a model to runs: texts, scores, and new weights (docs/engines.md).",
    )
    parser.add_argument("model", help="a Hugging Face folder")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: also from other machines")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--max-len", type=int, required=True, help="tokens of prompt and response")
    parser.add_argument("--max-running", type=int, default=256, help="sequences decoded together")
    parser.add_argument("--max-logprobs", type=int, default=64, help="largest top-k of a teacher")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs of the engine")
    parser.add_argument("--gpu-memory-fraction", type=float, default=0.9)
    return parser


if __name__ == "__main__":
    sys.exit(main())
