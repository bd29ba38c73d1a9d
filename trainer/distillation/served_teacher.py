"""A teacher on other machines: vLLM servers answer what it thinks of a text, or write texts.

At each token of a response it says its top-k and their log-probabilities. The tail follows:

    tail = log(1 - sum over the top-k of p), log(2^-23) at least

so that distill.tail = "bucket", "renorm" and "drop" lose nothing against the teacher itself but
tails below what float32 log-probabilities say. The rows are those of temperature 1, for a server
does not say what all other ids would be at another.

Shapes: n tokens of one response, K top-k entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from reflux.kernels.teacher_topk import tail_of_rounded
from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Rollout, TeacherView, TopKRows
from reflux.trainer.data.chat import Chat, same_vocabulary
from reflux.trainer.phase import Advance, Engine, Sampler, Teacher
from reflux.trainer.rollouts.client import Servers, check_servers
from reflux.trainer.rollouts.engine_texts import (
    SampledText,
    ScoredText,
    ScoreRequest,
    TextRequest,
)
from reflux.trainer.rollouts.samplers import EngineSampler, Source

from .absent_teacher import AbsentTeacher

LOADED = "folder"  # the version of a server to which nobody has pushed


@dataclass(frozen=True, eq=False)
class TeacherTexts(Source):
    """The servers as a source of texts; nobody pushes to them. Collective over the ranks that hold
    the same rows.
    """

    servers: Servers
    engine: Engine

    def texts(self, requests: Sequence[TextRequest], advance: Advance) -> list[list[SampledText]]:
        """See Source."""
        texts = self.engine.once_per_row(lambda: self.servers.texts(requests, LOADED))
        advance(sum(map(len, texts)))
        return texts


@dataclass(frozen=True, eq=False, kw_only=True)
class ServedTeacher(AbsentTeacher):
    """Servers as the Teacher of a run."""

    servers: Servers
    engine: Engine

    @property
    def sampler(self) -> Sampler:
        return EngineSampler(TeacherTexts(self.servers, self.engine), self.chat)

    def views(self, rollouts: Sequence[Rollout], step: int) -> list[TeacherView | None]:
        """The teacher's rows for each text, behind its own rendering of the prompt."""
        requests = []
        for rollout in rollouts:
            prompt_ids = self.chat.prompt_ids(rollout.prompt.messages)
            ids = prompt_ids + rollout.ids
            requests.append(ScoreRequest(ids, len(prompt_ids), self.spec.top_k))
        scores = self.engine.once_per_row(lambda: self.servers.scores(requests, LOADED))
        return [TeacherView(r.prompt_ids, rows=rows_of(s)) for r, s in zip(rollouts, scores)]

    def kept_rows(self, rollout: Rollout) -> TopKRows | None:
        """None: it is asked."""
        return None


def rows_of(score: ScoredText) -> TopKRows:
    """Top-k and tail. ValueError for probabilities that are none: more than 1 together, or not in
    order.
    """
    logp = score.topk_logp.astype(np.float64)
    mass = np.exp(logp).sum(1)
    if not np.isfinite(logp).all() or (mass > 1 + 1e-4).any() or (np.diff(logp, axis=1) > 0).any():
        raise ValueError(
            "a served teacher's top-k log-probabilities are not finite, not in order, or sum to "
            f"{mass.max(initial=0):.4f}; want the log-probabilities of one distribution"
        )
    tail_n = tail_of_rounded(torch.from_numpy(logp)).numpy().astype(np.float32)
    return TopKRows(score.topk_ids, score.topk_logp, tail_n)


def load_served(cfg: Config, engine: Engine, chat: Chat, chats: Sequence[Chat]) -> list[Teacher]:
    """The servers of teacher.servers. ValueError where one does not answer, serves another model
    than teacher.path, or cannot answer what the configuration asks for.
    """
    t, r, (own,) = cfg.teacher, cfg.rollout, chats
    servers = Servers(t.servers, r.server_timeout_s, r.server_retries)
    facts = check_servers(servers, t.path, weights=True, option="teacher.servers")
    if facts["version"] != LOADED:
        raise ValueError(
            f"teacher.servers: {t.servers[0]} holds the weights {facts['version']}, which another "
            "run has pushed; want servers of the teacher alone"
        )
    if cfg.distill.top_k > facts["max_logprobs"]:
        raise ValueError(
            f"distill.top_k = {cfg.distill.top_k}, but the teacher's servers answer at most the "
            f"top {facts['max_logprobs']}. Lower it, or start them with --max-logprobs "
            f"{cfg.distill.top_k}"
        )
    if facts["max_len"] < engine.seq_len + 2:
        raise ValueError(
            f"teacher.servers: --max-len {facts['max_len']} of a server; want at least "
            f"training.seq_len + 2 = {engine.seq_len + 2}"
        )
    same = same_vocabulary(chat, own)
    return [ServedTeacher(cfg.distill, own, same, servers=servers, engine=engine)]


_TEACHER: type[Teacher] = ServedTeacher  # mypy proves that it keeps the contract
