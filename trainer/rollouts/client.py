"""A run's side of its servers (serve.py): requests are shared among them, and a server that does
not answer is named and its requests are asked elsewhere.
"""

import http.client
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from . import wire
from .engine_texts import SampledText, ScoredText, ScoreRequest, TextRequest, check_versions
from .fingerprint import model_fingerprint, tokenizer_fingerprint

log = logging.getLogger(__name__)

PROTOCOL = 1  # "reflux" of /info
TOGETHER = 4  # requests of one POST
IN_FLIGHT = 64  # POSTs at a time
PAUSE_S = 0.5  # before a request is asked again; doubles each time, at most PAUSE_LIMIT_S
PAUSE_LIMIT_S = 30.0

Answer = TypeVar("Answer")


class ServerError(Exception):
    """A server did not answer, or said that its engine cannot."""


@dataclass(frozen=True)
class Server:
    """One address."""

    address: str  # http://host:port
    timeout_s: float

    def get(self, path: str) -> bytes:
        return self._ask("GET", path, b"")

    def post(self, path: str, body: bytes = b"") -> bytes:
        return self._ask("POST", path, body)

    def info(self) -> dict[str, Any]:
        """ServerError unless a server of this program answers."""
        try:
            table = json.loads(self.get("/info"))
            if table.get("reflux") == PROTOCOL:
                return table
        except (ValueError, AttributeError):
            pass
        raise ServerError(f"{self.address} is no server of reflux.trainer.rollouts.serve")

    def _ask(self, method: str, path: str, body: bytes) -> bytes:
        """ServerError where it cannot answer, ValueError where the request is wrong."""
        parts = urlsplit(self.address)
        connection = http.client.HTTPConnection(
            parts.hostname or "", parts.port, timeout=self.timeout_s
        )
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            why = f"{type(error).__name__}: {error}".rstrip(": ")
            raise ServerError(f"{self.address} does not answer ({why})") from error
        finally:
            connection.close()
        if answer.status == 200:
            return content
        words = content[:500].decode(errors="replace")
        if answer.status < 500:
            raise ValueError(f"{self.address} refuses {path}: {words}")
        raise ServerError(f"{self.address} cannot answer {path}: {words}")


class Servers:
    """Several servers of one model. A failed one is left out until it is asked to come back."""

    def __init__(self, addresses: Sequence[str], timeout_s: float, retries: int):
        self.servers = [Server(address.rstrip("/"), timeout_s) for address in addresses]
        self.retries = retries
        self._failed: dict[Server, str] = {}
        self._lock = threading.Lock()

    @property
    def alive(self) -> list[Server]:
        with self._lock:
            return [s for s in self.servers if s not in self._failed]

    @property
    def failed(self) -> dict[str, str]:
        """Address -> what went wrong."""
        with self._lock:
            return {server.address: why for server, why in self._failed.items()}

    def leave_out(self, failed: dict[str, str]) -> None:
        """Also these; what other ranks have found."""
        with self._lock:
            for server in self.servers:
                if server.address in failed:
                    self._failed.setdefault(server, failed[server.address])

    def ask_all_again(self) -> None:
        with self._lock:
            self._failed.clear()

    def _recover(self, server: Server) -> None:
        with self._lock:
            if self._failed.pop(server, None) is not None:
                log.warning("%s answers again", server.address)

    def fail(self, server: Server, why: Exception) -> None:
        """Names a server once."""
        with self._lock:
            if server not in self._failed:
                log.warning("%s; its requests are asked elsewhere", why)
            self._failed[server] = str(why)

    def texts(self, requests: Sequence[TextRequest], version: str) -> list[list[SampledText]]:
        """[requests][n] texts, each proven to be sampled by the weights `version`."""

        def ask(server: Server, part: Sequence[TextRequest]) -> list[list[SampledText]]:
            body = server.post("/texts", wire.pack_requests(part))
            groups = wire.unpack_texts(body)
            if [len(g) for g in groups] != [r.n for r in part]:
                raise ValueError(f"{server.address} answered another number of texts than asked")
            for text in (text for group in groups for text in group):
                check_versions(text.versions, version, server.address)
            return groups

        return self._shared(requests, ask)

    def scores(self, requests: Sequence[ScoreRequest], version: str) -> list[ScoredText]:
        """What the servers' model thinks of each text."""

        def ask(server: Server, part: Sequence[ScoreRequest]) -> list[ScoredText]:
            scores = wire.unpack_scores(server.post("/scores", wire.pack_requests(part)))
            _check_scores(scores, part, server)
            for score in scores:
                check_versions(score.versions, version, server.address)
            return scores

        return self._shared(requests, ask)

    def _shared(
        self,
        requests: Sequence[Any],
        ask: Callable[[Server, Sequence[Any]], list[Answer]],
    ) -> list[Answer]:
        """The answers in order. ValueError where no server is left, or the retries are used up."""
        parts = [requests[i : i + TOGETHER] for i in range(0, len(requests), TOGETHER)]
        if not parts:
            return []
        with ThreadPoolExecutor(min(IN_FLIGHT, len(parts))) as pool:
            answers = pool.map(lambda job: self._ask_until(ask, *job), enumerate(parts))
            return [answer for part in answers for answer in part]

    def _ask_until(
        self, ask: Callable[[Server, Sequence[Any]], list[Answer]], turn: int, part: Sequence[Any]
    ) -> list[Answer]:
        last = "no server was asked"
        for attempt in range(self.retries + 1):
            alive = self.alive
            if not alive:  # perhaps only for a moment
                time.sleep(min(PAUSE_S * 2**attempt, PAUSE_LIMIT_S))
                alive = self.servers
            server = alive[(turn + attempt) % len(alive)]
            try:
                answers = ask(server, part)
            except (ServerError, ValueError) as error:
                # a wrong answer is an answer of a wrong server: another one may be right
                last = str(error)
                self.fail(server, error)
                continue
            self._recover(server)
            return answers
        raise ValueError(
            f"no server answers any more: {last}. All of them: "
            + "; ".join(self.failed.values() or [last])
            + ". Start them again and resume the run"
        )

    def push(self, version: str, chunks: Iterable[bytes]) -> None:
        """Gives these weights to all servers, chunk by chunk, and to those that had failed. One
        that fails now is left out; ValueError where none is left.
        """
        self.ask_all_again()
        self._each(lambda server: server.post("/weights/begin"))
        for chunk in chunks:
            self._each(partial(Server.post, path="/weights/chunk", body=chunk))
        name = quote(version, safe="")
        self._each(lambda server: server.post(f"/weights/finish?version={name}"))
        if not self.alive:
            raise ValueError("no server takes the weights: " + "; ".join(self.failed.values()))

    def _each(self, do: Callable[[Server], Any]) -> None:
        """On all servers at the same time."""

        def guarded(server: Server) -> None:
            try:
                do(server)
            except (ServerError, ValueError) as error:
                self.fail(server, error)

        if alive := self.alive:
            with ThreadPoolExecutor(len(alive)) as pool:
                list(pool.map(guarded, alive))


def _check_scores(
    scores: Sequence[ScoredText], part: Sequence[ScoreRequest], server: Server
) -> None:
    shapes = [(len(r.ids) - r.start, r.top_k) for r in part]
    if [s.topk_ids.shape for s in scores] != shapes or [len(s.logp) for s in scores] != [
        n for n, _ in shapes
    ]:
        raise ValueError(f"{server.address} answered rows of other shapes than asked")


def check_servers(servers: Servers, path: str, *, weights: bool, option: str) -> dict[str, Any]:
    """The facts of the first server, after each has proven to serve the model of the folder `path`:
    its architecture, its tokenizer and, with `weights`, its weights. ValueError, naming the server
    and what differs, for every other.

    option: what names the servers, for messages.
    """
    ours = {"tokenizer": tokenizer_fingerprint(path), **model_fingerprint(path)}
    facts = []
    for server in servers.servers:
        try:
            info = server.info()
        except (ServerError, ValueError) as error:
            raise ValueError(f"{option}: {error}") from error
        theirs = {"tokenizer": info["tokenizer"], **info["model"]}
        compared = ("config", "tokenizer", *(("weights",) if weights and ours["weights"] else ()))
        for what in compared:
            if theirs[what] != ours[what]:
                raise ValueError(
                    f"{option}: {server.address} serves {info['path']} with "
                    f"{_WORDS[what]} than {path}. Start it on the same model folder"
                )
        if info["broken"]:
            raise ValueError(f"{option}: {server.address}: {info['broken']}; start it again")
        facts.append(info)
    return facts[0] | {
        "max_len": min(f["max_len"] for f in facts),
        "max_logprobs": min(f["max_logprobs"] for f in facts),
    }


_WORDS = {
    "config": "another architecture (config.json)",
    "tokenizer": "another tokenizer",
    "weights": "other weights",
}
