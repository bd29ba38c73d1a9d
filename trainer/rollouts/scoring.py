"""Scores one model's texts under another model: log-probabilities over the same bytes, cut into
aligned spans.

Two sides: the sampler wrote the text, and its sampled ids are never re-encoded. The scorer
tokenizes the text with its own template and tokenizer. Calibration scores the policy's texts under
the proxy; distillation across tokenizers scores the student's texts under the teacher.

Shapes: n tokens of the sampler, m of the scorer, S spans, T tokens of a batch, K stop ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from reflux.tokenalign.byte_trie import ByteTrie
from reflux.tokenalign.byte_windows import Tokens, byte_windows, settled_prefix_logp
from reflux.tokenalign.linear_next_byte import row_masses
from reflux.tokenalign.offsets import Side, side, spell
from reflux.tokenalign.span_starts import SpanStarts, span_starts
from reflux.tokenalign.spans import Alignment, align_spans
from reflux.trainer.data.batch import Batch, Prompt, Rollout, Sample, pack
from reflux.trainer.data.chat import Chat
from reflux.trainer.losses import HeadInputs, at_positions, token_logprob_of
from reflux.trainer.phase import Engine, ReadableModel, TextScore
from reflux.trainer.runs.progress import counted


@dataclass(frozen=True, eq=False)
class Aligned:
    """A sampler's text in the scorer's tokens. `spans` is None when the text is unaligned: one of
    the two tokenizers cannot spell it.
    """

    scorer_ids: tuple[int, ...]
    scorer_span: np.ndarray  # [m] span of each of the scorer's tokens, -1 outside
    sampler_span: np.ndarray  # [n] span of each of the sampler's content tokens, -1 outside
    spans: int | None
    n_bytes: int
    ended: bool  # by itself, so that a stop follows on both sides
    parts: tuple[Alignment, Side, Side] | None = None  # the sampler is side a

    @cached_property
    def starts(self) -> SpanStarts:
        """Aligned positions, at which both sides have read the same bytes: tokens of the sampler
        (a) and of the scorer (b) whose predictions can be compared.
        """
        if self.parts is not None:
            return span_starts(*self.parts, ended=self.ended)
        # the same tokens on both sides, or no text at all; the stop is a span start, too
        spans = self.spans or 0
        span = np.arange(spans + (self.ended and self.spans is not None))
        a = np.append(span[:spans], len(self.sampler_span))[: len(span)]
        b = np.append(span[:spans], len(self.scorer_ids))[: len(span)]
        return SpanStarts(a, b, span)


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Which texts' prefixes `score_ids` scores, and the values that it found, by text."""

    trie: ByteTrie  # of the scorer
    # by text: its first byte is a space that the scorer's tokenizer put there; None: a text whose
    # bytes its ids do not spell, which is left out
    spaces: Sequence[bool | None]
    found: dict[int, np.ndarray] = field(default_factory=dict)

    def score(self, out: HeadInputs, batch: Batch) -> None:
        """Adds those of a micro-batch."""
        usable_M = torch.tensor([s is not None for s in self.spaces] or [False])
        space_M = torch.tensor([bool(s) for s in self.spaces] or [False])
        rows = usable_M.to(batch.sample_T.device)[batch.sample_T].nonzero()[:, 0]
        sample_R = batch.sample_T[rows]
        space_R = space_M.to(sample_R.device)[sample_R]
        windows = byte_windows(self.trie, Tokens(batch.target_T[rows], sample_R, space_R))
        masses = row_masses(at_positions(out, rows), self.trie, windows)
        value_P = settled_prefix_logp(windows, masses).cpu().numpy()
        sample_P = sample_R[windows.row_P].cpu().numpy()
        self.found.update({int(i): value_P[sample_P == i] for i in np.unique(sample_P)})


def score_ids(
    scorer: ReadableModel,
    engine: Engine,
    jobs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    chat: Chat,
    *,
    tokens: int,
    temperature: float = 1.0,
    stop: bool = True,
    prefixes: Prefixes | None = None,
) -> list[TextScore]:
    """Scores of (prompt ids, content ids) pairs under `scorer`, a frozen model or the engine
    itself. Collective.

    chat: of the scorer. tokens: positions of a micro-batch. stop: score the stop set behind each
    text; that takes one position more than the text has. Without, TextScore.stop is that of the
    stop set in the place of the last id. prefixes: score the bytes before every
    position, too, at temperature 1; needs `stop`. ValueError, on every rank, where a
    log-probability is -inf or NaN: a reward made of it would teach nonsense.
    """
    samples = [_sample(prompt, (*ids, chat.stop_id) if stop else ids) for prompt, ids in jobs]
    logp = [np.zeros(len(s.rollout.ids)) for s in samples]
    stop_logp = np.zeros(len(samples))
    longest = max((len(prompt) + len(ids) for prompt, ids in jobs), default=1)
    batches = engine.pad_across_ranks(pack(samples, tokens=tokens, seq_len=longest))
    for batch in counted("scoring", batches, "micro-batches"):
        batch = batch.to(engine.device)
        last_T = _last_of_each_text(batch)
        stop_ids_K = torch.tensor(chat.stop_ids, device=engine.device)
        stop_TK = torch.where(last_T[:, None], stop_ids_K[None], -1)
        candidates = torch.cat([batch.target_T[:, None], stop_TK], 1)
        with engine.forward_no_grad(scorer, batch, chat.vocab_size) as out, torch.no_grad():
            scores = token_logprob_of(out, candidates, temperature=temperature).logp
            if prefixes is not None:
                prefixes.score(out, batch)
        scores_TK = scores.double().cpu().numpy()
        sample_T = batch.sample_T.cpu().numpy()
        for i in np.unique(sample_T):
            logp[i] = scores_TK[sample_T == i, 0]
        for t in np.flatnonzero(last_T.cpu().numpy()):
            stop_logp[sample_T[t]] = np.logaddexp.reduce(scores_TK[t, 1:])
    found = prefixes.found if prefixes is not None else {}
    results = [
        TextScore(x[:-1] if stop else x, float(s), found.get(i))
        for i, (x, s) in enumerate(zip(logp, stop_logp))
    ]
    # a model may ban stops inside a text
    _check_finite([np.append(s.logp, s.stop) if stop else s.logp for s in results], chat, engine)
    return results


def _check_finite(logp: Sequence[np.ndarray], chat: Chat, engine: Engine) -> None:
    bad = sum((~np.isfinite(x)).sum() for x in logp)
    total = int(engine.sum(float(bad)))
    if total:
        raise ValueError(
            f"{chat.path}: {total} log-probabilities of tokens under this model are -inf or NaN. "
            "Its logits overflow, or it bans tokens that texts hold. Take another model, or "
            'dtype = "float32" for it'
        )


def _sample(prompt_ids: tuple[int, ...], ids: tuple[int, ...]) -> Sample:
    return Sample(Rollout(Prompt(0, ()), prompt_ids, ids, (), 0.0, "", True))


def _last_of_each_text(batch: Batch) -> torch.Tensor:
    """bool [T]: the last token of its text."""
    end = batch.sample_T.new_full((1,), -1)
    following_T = torch.cat([batch.sample_T[1:], end])[: batch.tokens]
    return batch.sample_T != following_T


def align_texts(
    sampler: Chat, scorer: Chat, rollouts: Sequence[Rollout], *, same: bool
) -> list[Aligned]:
    """The scorer's tokens of each rollout's text, and the shortest byte spans that both
    tokenizations share.

    same: both have one id -> bytes map, so the scorer reads the sampler's ids and every token is
    its own span.
    """
    if same:
        return [_own_tokens(sampler, r) for r in rollouts]
    spelled = [spell(sampler.table, r.content_ids) for r in rollouts]
    scorer_ids = [scorer.encode(s.text) if s.text is not None else () for s in spelled]
    sides_a = [side(sampler.table, r.content_ids, s.bytes) for r, s in zip(rollouts, spelled)]
    sides_b = [
        side(scorer.table, ids, s.bytes, normalize=scorer.normalize)
        for ids, s in zip(scorer_ids, spelled)
    ]
    usable = [
        k
        for k, (s, a, b) in enumerate(zip(spelled, sides_a, sides_b))
        if s.text and a.reproduces and b.reproduces
    ]
    alignments = dict(
        zip(usable, align_spans([sides_a[k] for k in usable], [sides_b[k] for k in usable]))
    )
    aligned = []
    for k, (rollout, s) in enumerate(zip(rollouts, spelled)):
        if k in alignments:
            parts = alignments[k], sides_a[k], sides_b[k]
            aligned.append(_aligned(rollout, scorer_ids[k], len(s.bytes), parts))
        else:
            aligned.append(_without_spans(rollout, len(s.bytes), empty=s.text == ""))
    return aligned


def _aligned(
    rollout: Rollout,
    scorer_ids: tuple[int, ...],
    n_bytes: int,
    parts: tuple[Alignment, Side, Side],
) -> Aligned:
    found = parts[0]
    return Aligned(
        scorer_ids, found.span_b, found.span_a, found.num_spans, n_bytes, rollout.ended, parts
    )


def _without_spans(rollout: Rollout, n_bytes: int, *, empty: bool) -> Aligned:
    """An unaligned text, or an empty one, which has 0 spans."""
    outside = np.full(len(rollout.content_ids), -1)
    spans = 0 if empty else None
    return Aligned((), np.zeros(0, np.int64), outside, spans, n_bytes, rollout.ended)


def _own_tokens(chat: Chat, rollout: Rollout) -> Aligned:
    ids = rollout.content_ids
    own = np.arange(len(ids))
    n_bytes = int(chat.table.lens[list(ids)].sum()) if ids else 0
    return Aligned(ids, own, own, len(ids), n_bytes, rollout.ended)
