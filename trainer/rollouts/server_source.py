"""rollout.engine = "server": texts from vLLM on other machines, by the weights of this run."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from reflux.trainer.config.schema import Config
from reflux.trainer.phase import Advance, Engine

from . import wire
from .client import Servers, check_servers
from .engine_texts import SampledText, TextRequest
from .vllm_engine import chunks


class ServerSource:
    """Pushes the weights of the run to its servers and asks them for texts. Every rank asks for its
    own, one of those that hold the same rows for all of these; the first one pushes.
    """

    def __init__(self, cfg: Config, engine: Engine):
        """Collective. ValueError for a server that does not answer, or serves another model."""
        r = cfg.rollout
        self.trainer = engine
        self.servers = Servers(r.servers, r.server_timeout_s, r.server_retries)
        self.version = ""
        self._thread = ThreadPoolExecutor(1)
        self._pending: list[Future] = []
        engine.when_closing(partial(self._thread.shutdown, wait=False, cancel_futures=True))
        check = partial(check_servers, self.servers, cfg.model.path)
        facts = from_first_rank(engine, partial(check, weights=False, option="rollout.servers"))
        if facts["max_len"] < engine.seq_len + 1:
            raise ValueError(
                f"rollout.servers: --max-len {facts['max_len']} of a server; want at least "
                f"training.seq_len + 1 = {engine.seq_len + 1}"
            )

    def texts(self, requests: Sequence[TextRequest], advance: Advance) -> list[list[SampledText]]:
        """See Source."""
        texts = self.start(requests)()
        advance(sum(map(len, texts)))
        return texts

    def start(self, requests: Sequence[TextRequest]) -> Callable[[], list[list[SampledText]]]:
        """See Source."""
        self._push()
        pending: list[Future] = []  # of the rank that asks
        ask = partial(self._thread.submit, self.servers.texts, list(requests), self.version)
        once_per_row = self.trainer.once_per_row
        once_per_row(lambda: pending.append(ask()))
        self._pending = pending
        return lambda: once_per_row(lambda: pending[0].result())

    def _push(self) -> None:
        """The present weights, if the servers have others; texts that were asked for come first."""
        version = self.trainer.weights_version
        if version == self.version:
            return
        for pending in self._pending:
            pending.exception()  # whoever takes the result hears of it
        self.trainer.gather([None])  # no rank waits for a text any more
        bodies = self._bodies()
        for _ in bodies if not self.trainer.is_main else ():  # gathering is collective
            pass
        failed = from_first_rank(self.trainer, lambda: self._pushed(version, bodies))
        self.servers.ask_all_again()
        self.servers.leave_out(failed or {})
        self.version = version

    def _pushed(self, version: str, bodies: Iterator[bytes]) -> dict[str, str]:
        """Which servers did not take the weights, and why."""
        self.servers.push(version, bodies)
        return self.servers.failed

    def _bodies(self) -> Iterator[bytes]:
        for chunk in chunks(self.trainer.named_weights()):
            yield wire.pack_weights(chunk) if self.trainer.is_main else b""


def from_first_rank(engine: Engine, work: Callable[[], Any]) -> Any:
    """work() of the first rank, on every rank; its ValueError too. Collective."""
    result, error = None, None
    try:
        result = work() if engine.is_main else None
    except ValueError as caught:
        error = caught
    gathered = engine.gather([(result, None if error is None else str(error))])
    result, message = engine.once_per_row(lambda: gathered[0])
    if message is not None:
        raise ValueError(message) from error
    return result
