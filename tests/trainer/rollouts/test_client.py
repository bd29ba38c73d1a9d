"""A run against servers that are slow, die, or lie. The HTTP server is the real one; only the
engine behind it is made up (a real one: tests/engines).
"""

import os
import queue
import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from assets import free_port

from reflux.trainer.rollouts import client, serve
from reflux.trainer.rollouts.client import Servers, check_servers
from reflux.trainer.rollouts.engine_texts import SampledText, ScoredText, ScoreRequest, TextRequest
from reflux.trainer.rollouts.vllm_engine import EngineOptions
from reflux.trainer.runs.signals import handled_by

VERSION = "run/1"


class FakeEngine:
    """Answers with its own number; `fault` says what is wrong with it."""

    version = "0"

    def __init__(self, path, number, fault=""):
        self.options = EngineOptions(str(path), "float32", 64)
        self.number, self.fault = number, fault
        self.weights_version, self.asked, self.loaded = VERSION, {}, []
        self.seen = 0

    def add(self, request):
        if isinstance(request, TextRequest) and request.max_tokens > 60:
            raise ValueError("longer than 64 tokens")
        self.seen += 1
        key = f"{self.seen}"
        self.asked[key] = request
        return key

    def drop(self, keys):
        for key in keys:
            self.asked.pop(key, None)

    def step(self):
        if self.fault == "dies":
            raise MemoryError("no room")
        if self.fault == "slow":
            time.sleep(1.0)
        key, request = self.asked.popitem()
        version = "folder" if self.fault == "restarted" else self.weights_version
        if isinstance(request, ScoreRequest):
            rows, k = len(request.ids) - request.start, request.top_k
            logp = np.zeros((rows, k - (self.fault == "short")), np.float32)
            return {key: ScoredText(logp[:, 0], logp.astype(np.int64), logp, (version,))}
        text = SampledText(
            np.array([request.seed, self.number]), np.zeros(2, np.float32), 0.0, (version,)
        )
        return {key: [text] * (request.n - (self.fault == "short"))}

    def begin_load(self):
        self.weights_version = "half-loaded"

    def load_chunk(self, chunk):
        if self.fault == "deaf":
            raise ValueError("no such tensor")
        self.loaded += [name for name, _ in chunk]

    def finish_load(self, version):
        self.weights_version = version


@contextmanager
def serving(path, *faults):
    """One server for each fault; "" is none."""
    servers = [
        serve.Server(("127.0.0.1", 0), FakeEngine(path, number, fault))
        for number, fault in enumerate(faults)
    ]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        threading.Thread(target=run_engine, args=(server.engine_thread,), daemon=True).start()
    try:
        yield servers
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def run_engine(thread):
    try:
        thread.run()
    except MemoryError:
        pass


def address(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


def asking(servers, timeout_s=20.0, retries=3):
    return Servers([address(s) for s in servers], timeout_s, retries)


def requests(count, n=2):
    return [TextRequest((1,), n, seed, 4, 1.0, 1.0, 0, (0,), 9) for seed in range(count)]


@pytest.fixture
def path(assets):
    return assets / "qwen3"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(client, "PAUSE_S", 0.05)


def test_texts_of_several_servers_come_back_in_order(path):
    with serving(path, "", "", "") as servers:
        texts = asking(servers).texts(requests(50), VERSION)
        assert [g[0].ids[0] for g in texts] == list(range(50)) and {len(g) for g in texts} == {2}
        assert {int(g[0].ids[1]) for g in texts} == {0, 1, 2}  # all of them were asked


@pytest.mark.parametrize("fault", ["dies", "slow", "restarted", "short"])
def test_a_faulty_server_is_named_and_its_texts_are_asked_elsewhere(path, fault, caplog):
    with serving(path, fault, "") as servers:
        asked = asking(servers, timeout_s=0.5)
        texts = asked.texts(requests(20), VERSION)
        assert [g[0].ids.tolist() for g in texts] == [[seed, 1] for seed in range(20)]
        assert list(asked.failed) == [address(servers[0])]
        assert sum(address(servers[0]) in r.message for r in caplog.records) == 1
        why = {
            "dies": "cannot answer /texts",
            "slow": "does not answer (TimeoutError: timed out)",
            "restarted": "answered with the weights folder; want run/1. It was restarted, or",
            "short": "another number of texts",
        }
        assert why[fault] in asked.failed[address(servers[0])]


def outcomes_of(asks):
    """What each of these calls raised, from threads of their own; None: it still waits."""
    raised = [None] * len(asks)

    def call(i, ask):
        try:
            ask()
        except Exception as error:
            raised[i] = error

    threads = [threading.Thread(target=call, args=x, daemon=True) for x in enumerate(asks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    return [x and f"{type(x).__name__}: {x}" for x in raised]


DEAD = "RuntimeError: the engine has died: no room"


def test_a_request_that_is_queued_while_the_engine_dies_is_answered(path):
    """It has read that the engine lives, and is queued only after the others have been refused."""
    queueing = threading.Event()

    class SlowQueue(queue.Queue):
        def put(self, job, *more):
            if len(job.requests) == 1:
                queueing.set()
                time.sleep(0.5)
            super().put(job, *more)

    class Engine(FakeEngine):
        def step(self):
            queueing.wait(5)
            raise MemoryError("no room")

    thread = serve.EngineThread(Engine(path, 0))
    thread._queue = SlowQueue()
    threading.Thread(target=run_engine, args=(thread,), daemon=True).start()
    asks = [lambda: thread.ask(requests(3)), lambda: thread.ask(requests(1))]
    assert outcomes_of(asks) == [DEAD, DEAD]
    with pytest.raises(RuntimeError, match="the engine has died: no room"):
        thread.ask(requests(1))


def test_work_that_ends_the_engine_is_answered(path):
    thread = serve.EngineThread(FakeEngine(path, 0))
    threading.Thread(target=run_engine, args=(thread,), daemon=True).start()

    def work():
        raise MemoryError("no room")

    assert outcomes_of([lambda: thread.between_texts(work)]) == [DEAD]


def test_a_signal_ends_the_server_between_turns_and_tells_who_waits(path):
    """An exception out of a handler, in the middle of the queue, was "release unlocked lock"."""

    class Engine(FakeEngine):
        def step(self):
            time.sleep(0.01)
            return {}  # never done

    thread, told = serve.EngineThread(Engine(path, 0)), []
    asks = [lambda: thread.ask(requests(2))]
    waiting = threading.Thread(target=lambda: told.extend(outcomes_of(asks)))
    waiting.start()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with handled_by(thread.stop):
        thread.run()
    waiting.join(5)
    assert told == ["RuntimeError: the server was told to stop"]
    with pytest.raises(RuntimeError, match="told to stop"):
        thread.ask(requests(1))


def test_a_server_that_is_alone_is_asked_again(path):
    with serving(path, "slow") as servers:
        asked = asking(servers, timeout_s=0.5, retries=5)
        threading.Timer(1.2, lambda: setattr(servers[0].engine, "fault", "")).start()
        assert asked.texts(requests(1), VERSION)[0][0].ids.tolist() == [0, 0]
        assert not asked.failed


def test_an_address_without_a_server_is_left_out(path):
    with serving(path, "") as servers:
        gone = f"http://127.0.0.1:{free_port()}"
        asked = Servers([gone, address(servers[0])], 5.0, 3)
        assert len(asked.texts(requests(8), VERSION)) == 8
        assert "ConnectionRefusedError" in asked.failed[gone]


def test_where_no_server_is_left_all_of_them_are_named(path):
    with serving(path, "short", "restarted") as servers:
        with pytest.raises(ValueError, match="no server answers any more") as error:
            asking(servers).texts(requests(4), VERSION)
        assert all(address(s) in str(error.value) for s in servers)
        assert "Start them again and resume the run" in str(error.value)


def test_a_push_reaches_all_servers_and_brings_one_back_that_had_failed(path):
    import torch

    from reflux.trainer.rollouts.wire import pack_weights

    bodies = [pack_weights([(name, torch.ones(2))]) for name in ("a", "b")]
    with serving(path, "", "deaf", "") as servers:
        asked = asking(servers)
        asked.leave_out({address(servers[2]): "was away"})
        asked.push("run/2", bodies)
        assert [s.engine.loaded for s in servers] == [["a", "b"], [], ["a", "b"]]
        assert servers[2].engine.weights_version == "run/2"
        assert "no such tensor" in asked.failed[address(servers[1])]
        texts = asked.texts(requests(12), "run/2")
        assert {int(g[0].ids[1]) for g in texts} <= {0, 2}
    with pytest.raises(ValueError, match="no server takes the weights"):
        asked.push("run/3", bodies)


def test_weights_wait_for_the_texts_that_are_being_sampled(path):
    with serving(path, "slow") as servers:
        asked = asking(servers)
        texts = []
        thread = threading.Thread(target=lambda: texts.extend(asked.texts(requests(1), VERSION)))
        thread.start()
        while not servers[0].engine.seen:
            time.sleep(0.01)
        asked.push("run/2", [])
        thread.join()
        assert texts[0][0].versions == (VERSION,)


def test_scores_of_other_shapes_are_refused(path):
    ask = [ScoreRequest((1, 2, 3, 4), 1, 2)]
    with serving(path, "", "short") as servers:
        assert asking(servers[:1]).scores(ask, VERSION)[0].topk_ids.shape == (3, 2)
        with pytest.raises(ValueError, match="rows of other shapes than asked"):
            asking(servers[1:]).scores(ask, VERSION)


def test_a_request_that_the_engine_refuses_says_why(path):
    long = [TextRequest((1,), 1, 0, 61, 1.0, 1.0, 0, (0,), 9)]
    with serving(path, "") as servers:
        with pytest.raises(ValueError, match="refuses /texts: longer than 64 tokens"):
            asking(servers).texts(long, VERSION)


def test_only_a_server_of_the_same_model_is_taken(assets, path):
    with serving(path, "", "") as servers:
        asked = asking(servers)
        assert check_servers(asked, str(path), weights=True, option="x")["max_len"] == 64
        for other, what in (
            ("gemma3", "another tokenizer|another architecture"),
            ("llama3", "another architecture"),
        ):
            with pytest.raises(ValueError, match=f"rollout.servers: {address(servers[0])} .*"):
                check_servers(asked, str(assets / other), weights=True, option="rollout.servers")
            with pytest.raises(ValueError, match=what):
                check_servers(asked, str(assets / other), weights=False, option="x")
        servers[1].facts["model"] = dict(servers[1].facts["model"], weights="0")
        check_servers(asked, str(path), weights=False, option="x")
        with pytest.raises(ValueError, match=f"{address(servers[1])} .* with other weights than"):
            check_servers(asked, str(path), weights=True, option="x")


def test_another_program_at_the_address_is_named(path):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello")

        def log_message(self, *args):
            pass

    other = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    with pytest.raises(ValueError, match="is no server of reflux.trainer.rollouts.serve"):
        check_servers(asking([other]), str(path), weights=True, option="x")
    other.shutdown()


def test_a_client_that_has_gone_is_no_error_of_the_server(capsys):
    server = serve.Server.__new__(serve.Server)
    for error, told in ((ConnectionResetError("gone"), ""), (ValueError("a fault"), "a fault")):
        try:
            raise error
        except Exception:
            server.handle_error(None, ("127.0.0.1", 1))
        assert told in (err := capsys.readouterr().err) and bool(told) == bool(err)
