"""Texts as two models with different tokenizers see them: what `diagnose` measures where token by
token is not possible.

Each model reads the text in its own tokens behind its own template; sampled ids are never encoded
anew. What is compared is what both say of the next byte, given the bytes so far: P(x | b_1 .. b_k)
over 256 bytes and the end (reflux.tokenalign.linear_next_byte). So two models that give every text
the same probability read 0 here, however they cut it. Positions at which more than
`diagnose.max_missing` of either distribution could not be summed up are counted and not compared.

Log-probabilities are those of the bytes from one compared position to the next,

    log P(b_1 .. b_l) - log P(b_1 .. b_k),

so that they add up to that of the text whatever lies between.

Shapes: n tokens of one text, P byte positions of a batch or a text, U those that are compared,
S the 257 symbols.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reflux.tokenalign.byte_trie import END, SYMBOLS, ByteTrie, alphabet
from reflux.tokenalign.byte_windows import ByteWindows, NextBytes
from reflux.tokenalign.linear_next_byte import ByteDivergence, byte_kl, next_bytes
from reflux.tokenalign.vocab_map import Vocabulary
from reflux.trainer.data.batch import Batch, Rollout, Sample, TeacherView, pack
from reflux.trainer.data.byte_texts import byte_view, windows_of
from reflux.trainer.data.chat import Chat
from reflux.trainer.losses import HeadInputs, Loss
from reflux.trainer.phase import Advance, Engine, FrozenModel, LossFunction
from reflux.trainer.runs.progress import ignore

from .measure import ByteAlignment, GradedText, StatsSpec, TokenStats, curves_of
from .metrics import (
    DIVERGENCES,
    Divergence,
    KLProfile,
    TopOverlap,
    in_chunks,
    outside_nucleus,
    overlap_of,
    profile_of,
)
from .token_classes import BANDS, TYPES, type_of


@dataclass(frozen=True, eq=False)
class BytePair:
    """Two tokenizers as tries, on the engine's device."""

    student: Chat
    teacher: Chat
    tries: tuple[ByteTrie, ByteTrie]  # student's and teacher's
    symbols_S: Tensor  # bool: what both can spell
    max_missing: float

    @property
    def rows(self) -> tuple[int, int]:
        """Ids of the two heads."""
        student, teacher = (len(t.order_V) for t in self.tries)
        return student, teacher


def pair_of(
    student: Chat,
    teacher: Chat,
    rows: tuple[int, int],
    device: torch.device,
    max_missing: float = 0.01,
) -> BytePair:
    """rows: of the two heads that belong to ids of the tokenizers. ValueError for a tokenizer that
    does not spell its texts.
    """
    own, other = (
        ByteTrie.of(Vocabulary(c.table, c.stop_ids, n), device)
        for c, n in zip((student, teacher), rows)
    )
    return BytePair(student, teacher, (own, other), alphabet([own, other]), max_missing)


def symbol_types() -> np.ndarray:
    """int8 [S], an index into TYPES for every byte and the end. A letter is "content": it does not
    say of which word it is.
    """
    pieces = [bytes([b]) for b in range(END)]
    names = ["content" if p.isalpha() else type_of(p) for p in pieces]
    return np.array([TYPES.index(name) for name in [*names, "stop"]], np.int8)


def count_symbols(texts: Iterable[Rollout]) -> np.ndarray:
    """int64 [S] occurrences of every byte and of the end. Counts of parts of the texts add up."""
    count_S = np.zeros(SYMBOLS, np.int64)
    for r in texts:
        count_S += np.bincount(np.frombuffer(r.text.encode(), np.uint8), minlength=SYMBOLS)
        count_S[END] += r.ended
    return count_S


class _ByteText(NamedTuple):
    """One text as both models read it."""

    text: GradedText  # in the student's ids
    view: TeacherView


def measure_texts_cross_tokenizer(
    engine: Engine,
    teacher: FrozenModel,
    texts: Sequence[GradedText],
    pair: BytePair,
    *,
    tokens: int,
    spec: StatsSpec,
    joined: bool = False,
    advance: Advance = ignore,
) -> tuple[list[TokenStats], list[TokenStats]]:
    """Token stats of texts in the ids of the model that sampled them, in their order, and those of
    unaligned texts: without a number, but with the text and its grade, which the symptoms need.
    Unaligned is also a text of which no position can be compared. spec: of the symbols. Collective.
    """
    read = [_read(t, pair, engine.seq_len) for t in texts]
    spelled = [r for r in read if r is not None]
    samples = [Sample(r.text.rollout, teacher_views=(r.view,)) for r in spelled]
    batches = pack(samples, tokens=tokens, seq_len=engine.seq_len, joined=joined)
    measured = _measure_positions(engine, teacher, batches, pair, spec, advance)
    stats, others, at = [], [], 0
    for text, found in zip(texts, read):
        numbers = None
        if found is not None:
            numbers, at = measured[at], at + 1
        if found is None or numbers is None or not len(numbers.compared):
            others.append(unaligned_stats(text))
        else:
            stats.append(_token_stats(found, numbers, pair, spec))
    return stats, others


def _read(text: GradedText, pair: BytePair, seq_len: int) -> _ByteText | None:
    """None: the two tokenizers cannot both spell the text, or one of the models has no room for it:
    the teacher's own texts may have more tokens in the student's tokenizer.
    """
    rollout, ids = text.rollout, None
    if text.sampled_by == "teacher":
        ids = rollout.content_ids
        own = pair.student.encode(rollout.text)
        own += (pair.student.stop_id,) if rollout.ended else ()
        prompt_ids = pair.student.prompt_ids(rollout.prompt.messages)
        rollout = replace(rollout, prompt_ids=prompt_ids, ids=own, logp=(0.0,) * len(own))
        if len(prompt_ids) + len(own) > seq_len + 1:
            return None
    view = byte_view(pair.student, pair.teacher, rollout, ids) if rollout.ids else None
    if view is None or not pair.teacher.has_room(len(view.prompt_ids) + len(view.ids or ())):
        return None
    return _ByteText(replace(text, rollout=rollout), view)


def unaligned_stats(text: GradedText) -> TokenStats:
    """A text without numbers."""
    none, no_index = np.zeros(0), np.zeros(0, np.int64)
    return TokenStats(
        text.rollout,
        text.sampled_by,
        text.correct,
        start_n=no_index,
        n_bytes=0,
        type_n=no_index,
        student_logp_n=none,
        teacher_logp_n=none,
        kl=dict.fromkeys(DIVERGENCES, none),
        curves={},
        overlap_n=none,
        teachable_n=none,
        entropy_gap_n=none,
        answer=text.grade.extracted,
        alignment=ByteAlignment(TeacherView((), ()), 0, no_index, no_index, (0.0, 0.0)),
    )


@dataclass(frozen=True, eq=False)
class _Numbers:
    """What was measured of one text, on the host."""

    byte_P: np.ndarray  # what follows each position
    compared: np.ndarray  # [U] positions
    logp_2U: np.ndarray  # of the bytes from each compared position on, student's and teacher's
    missing_2: tuple[float, float]  # sums over all positions
    profiles: Mapping[Divergence, KLProfile]
    overlap: TopOverlap
    outside_U: np.ndarray


def _measure_positions(
    engine: Engine,
    teacher: FrozenModel,
    batches: Sequence[Batch],
    pair: BytePair,
    spec: StatsSpec,
    advance: Advance,
) -> dict[int, _Numbers]:
    """By index of the sample. Collective."""
    measured: dict[int, _Numbers] = {}
    spec = spec.to(engine.device)
    for batch in engine.pad_across_ranks(batches):
        batch = batch.to(engine.device)
        with (
            engine.forward_no_grad(engine, batch, pair.rows[0]) as student,
            engine.forward_no_grad(teacher, batch.for_teacher(), pair.rows[1]) as other,
        ):
            windows = windows_of(pair.tries[0], batch)
            found = _next_bytes(student, other, batch, windows, pair)
        measured |= _compare(*found, batch, windows, spec, pair.max_missing)
        advance(len(batch.sample_T.unique()))
    return measured


def _next_bytes(
    student: HeadInputs, teacher: HeadInputs, batch: Batch, windows: ByteWindows, pair: BytePair
) -> tuple[NextBytes, NextBytes]:
    trie, other = pair.tries
    symbols = pair.symbols_S
    other_windows = windows_of(other, batch.for_teacher())
    return (
        next_bytes(student, trie, windows, symbols=symbols),
        next_bytes(teacher, other, other_windows, symbols=symbols),
    )


@torch.no_grad()
def _compare(
    student: NextBytes,
    teacher: NextBytes,
    batch: Batch,
    windows: ByteWindows,
    spec: StatsSpec,
    max_missing: float,
) -> dict[int, _Numbers]:
    """Of every text of the batch, by index of the sample."""
    sides, byte_P = (student, teacher), windows.byte_P
    at_U = (student.missing_P.maximum(teacher.missing_P) <= max_missing).nonzero()[:, 0]
    p_US, q_US = student.logp_PS[at_U], teacher.logp_PS[at_U]
    profiles = {
        d: profile_of(
            in_chunks(p_US, q_US), SYMBOLS, d, spec.type_V, len(TYPES), spec.band_V, len(BANDS)
        ).cpu()
        for d in DIVERGENCES
    }
    overlap = overlap_of(in_chunks(p_US, q_US), min(spec.overlap_k, SYMBOLS)).cpu()
    outside_U = outside_nucleus(q_US.double().exp(), byte_P[at_U]).cpu().numpy()
    own = [_host(x.logp_PS.gather(1, byte_P[:, None])[:, 0]) for x in sides]
    prefix, missing = [_host(x.prefix_P) for x in sides], [_host(x.missing_P) for x in sides]
    at, follows_P = at_U.cpu().numpy(), byte_P.cpu().numpy()
    sample_P = batch.sample_T[windows.row_P].cpu().numpy()
    found = {}
    for i in batch.sample_T.unique().tolist():
        P = np.flatnonzero(sample_P == i)  # the text's positions, neighbours
        U = np.flatnonzero(sample_P[at] == i)
        here = at[U] - P[0] if len(P) else U
        found[i] = _Numbers(
            follows_P[P],
            here,
            np.stack([_logp_from(prefix[k][P], own[k][P], here) for k in (0, 1)]),
            (float(missing[0][P].sum()), float(missing[1][P].sum())),
            {d: p.rows(U) for d, p in profiles.items()},
            overlap.rows(U),
            outside_U[U],
        )
    return found


def _host(x_P: Tensor) -> np.ndarray:
    return x_P.double().cpu().numpy()


def _logp_from(prefix_P: np.ndarray, own_P: np.ndarray, at_U: np.ndarray) -> np.ndarray:
    """[U] log-probability of the bytes from each compared position to the next, the first one from
    the text's beginning, the last one to its end.

    prefix_P: log P(bytes so far); own_P: log P(what follows | bytes so far).
    """
    if not len(at_U):
        return np.zeros(0)
    # behind a space that its tokenizer has put in front: what that costs is no part of the text
    value_U = (prefix_P - prefix_P[0])[at_U]
    end = value_U[-1] + own_P[at_U[-1] :].sum()
    return np.diff(np.concatenate([[0.0], value_U[1:], [end]]))


def _token_stats(found: _ByteText, m: _Numbers, pair: BytePair, spec: StatsSpec) -> TokenStats:
    rollout, view, n = found.text.rollout, found.view, len(m.byte_P) - found.text.rollout.ended
    start_U = m.compared.copy()
    symbol_U = m.byte_P[start_U]
    start_U[0] = 0  # the bytes before it count with it
    assert view.ids is not None
    teacher_ids = view.ids[:-1] if rollout.ended else view.ids
    alignment = ByteAlignment(
        view,
        len(m.byte_P),
        _unit_of(pair.student, rollout.content_ids, start_U, space=view.student_space),
        _unit_of(pair.teacher, teacher_ids, start_U, space=view.space),
        m.missing_2,
    )
    return TokenStats(
        rollout,
        found.text.sampled_by,
        found.text.correct,
        start_n=start_U,
        n_bytes=n,
        type_n=spec.type_V.cpu().numpy()[symbol_U],
        student_logp_n=m.logp_2U[0],
        teacher_logp_n=m.logp_2U[1],
        kl={d: p.kl_T.numpy() for d, p in m.profiles.items()},
        curves={d: curves_of(p) for d, p in m.profiles.items()},
        overlap_n=m.overlap.overlap_T.numpy(),
        teachable_n=m.overlap.teachable_T.numpy(),
        entropy_gap_n=m.overlap.entropy_gap_T.numpy(),
        band_n=spec.band_V.cpu().numpy()[symbol_U],
        outside_n=m.outside_U,
        answer=found.text.grade.extracted,
        alignment=alignment,
    )


def _unit_of(chat: Chat, ids: Sequence[int], start_U: np.ndarray, *, space: bool) -> np.ndarray:
    """[n] in which unit each token begins."""
    lens_n = chat.table.lens[list(ids)].astype(np.int64)
    start_n = np.maximum(np.cumsum(lens_n) - lens_n - space, 0)
    return np.searchsorted(start_U, start_n, side="right") - 1


def byte_divergence(
    engine: Engine, teacher: FrozenModel, pair: BytePair, divergence: Divergence
) -> LossFunction:
    """Sum over the compared positions of KL(teacher || student) or KL(student || teacher) of the
    next byte, as a loss of the student.
    """
    how = ByteDivergence(divergence, max_missing=pair.max_missing)
    trie, other = pair.tries

    def loss(out: HeadInputs, batch: Batch) -> Loss:
        there = batch.for_teacher()
        with engine.forward_no_grad(teacher, there, pair.rows[1]) as theirs:
            wanted = next_bytes(theirs, other, windows_of(other, there), symbols=pair.symbols_S)
        windows = windows_of(trie, batch)
        return byte_kl(out, trie, windows, wanted, how, symbols=pair.symbols_S).total, {}

    return loss
