"""Who samples the trained model's texts, by rollout.engine: a Sampler in each case.

    embedded   the training weights themselves (generate.py)
    vllm       an engine in this process (vllm_engine.py)
    server     engines behind HTTP (server_source.py)

The last two hold weights of their own. They are given the trained ones before they sample, if those
have moved since, and every text is proven to be theirs by its stamp.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.phase import Advance, Engine, Sampler, Sampling
from reflux.trainer.runs.progress import ignore

from .engine_texts import SampledText, TextRequest, check_versions, rollout_of, text_request
from .generate import EmbeddedSampler
from .server_source import ServerSource
from .vllm_engine import EngineOptions, VllmEngine


class Source(Protocol):
    """An engine with weights of its own."""

    def start(self, requests: Sequence[TextRequest]) -> Callable[[], list[list[SampledText]]]:
        """Asks for texts as `texts` does, and returns what waits for them; unless overridden, they
        are there at once. Collective.
        """
        texts = self.texts(requests, ignore)
        return lambda: texts

    def texts(self, requests: Sequence[TextRequest], advance: Advance) -> list[list[SampledText]]:
        """[requests][n] texts of the present weights, which are handed over first if they have
        moved. Collective.
        """
        ...


def build_sampler(cfg: Config, engine: Engine, chat: Chat) -> Sampler:
    """The Sampler of the trained model. The phase and its evaluations share one engine. Collective.

    ValueError where the engine is missing or cannot take this model.
    """
    if cfg.rollout.engine == "embedded":
        return EmbeddedSampler(engine.gathered_weights, chat)
    if engine not in _SOURCES:
        source = VllmSource if cfg.rollout.engine == "vllm" else ServerSource
        _SOURCES[engine] = source(cfg, engine)
    return EngineSampler(_SOURCES[engine], chat)


_SOURCES: weakref.WeakKeyDictionary[Engine, Source] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class EngineSampler:
    """Samples by an engine that has weights of its own: a Sampler."""

    source: Source
    chat: Chat

    def sample(
        self,
        prompts: Sequence[Prompt],
        group: int,
        sampling: Sampling,
        advance: Advance = ignore,
    ) -> list[list[Rollout]]:
        """P prompts -> [P][G] rollouts. Collective."""
        requests = self._requests(prompts, group, sampling)
        return self._rollouts(prompts, requests, self.source.texts(requests, advance))

    def start(
        self, prompts: Sequence[Prompt], group: int, sampling: Sampling
    ) -> Callable[[], list[list[Rollout]]]:
        """Asks for the texts of the present weights; the result waits for them. Collective."""
        requests = self._requests(prompts, group, sampling)
        wait = self.source.start(requests)
        return lambda: self._rollouts(prompts, requests, wait())

    def _requests(
        self, prompts: Sequence[Prompt], group: int, sampling: Sampling
    ) -> list[TextRequest]:
        return [
            text_request(p, self.chat, group, replace(sampling, max_tokens=sampling.limit(i)))
            for i, p in enumerate(prompts)
        ]

    def _rollouts(
        self,
        prompts: Sequence[Prompt],
        requests: Sequence[TextRequest],
        texts_PG: Sequence[Sequence[SampledText]],
    ) -> list[list[Rollout]]:
        return [
            [rollout_of(prompt, request, text, self.chat) for text in texts]
            for prompt, request, texts in zip(prompts, requests, texts_PG)
        ]


class VllmSource(Source):
    """vLLM in this process, one engine per rank or per group of rollout.tensor_parallel ranks.

    With several ranks of one engine, each of them asks for the texts of all, for all have to do the
    same work, and keeps its own.
    """

    def __init__(self, cfg: Config, engine: Engine):
        r = cfg.rollout
        options = EngineOptions(
            cfg.model.path,
            engine.compute_dtype,
            engine.seq_len + 1,
            r.max_running,
            r.gpu_memory_fraction,
            r.tensor_parallel,
            sleeps=engine.device.type == "cuda",
        )
        self.trainer = engine
        self.peers = _peers(cfg, engine)
        self.engine = VllmEngine(options)
        engine.when_closing(self.engine.close)
        self.version = ""
        self.engine.sleep()

    def texts(self, requests: Sequence[TextRequest], advance: Advance) -> list[list[SampledText]]:
        """See Source."""
        asked, mine = self._of_peers(list(requests))
        self.engine.wake()
        self._push()
        texts = self.engine.generate(asked)[mine]
        self.engine.sleep()
        for text in (text for group in texts for text in group):
            check_versions(text.versions, self.version, "vLLM in this process")
        advance(sum(map(len, texts)))
        return texts

    def _push(self) -> None:
        version = self.trainer.weights_version
        if version != self.version or self.engine.options.sleeps:
            self.engine.load(version, self.trainer.named_weights())
            self.version = version

    def _of_peers(self, requests: list[TextRequest]) -> tuple[list[TextRequest], slice]:
        """The requests of all ranks of this engine, and which of them are this rank's."""
        if len(self.peers) == 1:
            return requests, slice(None)
        by_rank = self.trainer.gather([requests])
        before = sum(len(by_rank[r]) for r in self.peers if r < self.trainer.rank)
        asked = [request for r in self.peers for request in by_rank[r]]
        return asked, slice(before, before + len(requests))


def _peers(cfg: Config, engine: Engine) -> range:
    """The data-parallel ranks of this rank's engine."""
    size = cfg.rollout.tensor_parallel
    trained = cfg.ranks_of_a_row
    if trained > 1 and size != trained:
        raise ValueError(
            f"rollout.tensor_parallel = {size} with parallelism.tensor_parallel_degree = "
            f"{trained}; want {trained}: the ranks that share a row share an engine"
        )
    if trained > 1:
        return range(engine.rank, engine.rank + 1)
    if engine.world % size:
        raise ValueError(
            f"rollout.tensor_parallel = {size} with {engine.world} ranks; want a divisor of them"
        )
    first = engine.rank // size * size
    return range(first, first + size)
