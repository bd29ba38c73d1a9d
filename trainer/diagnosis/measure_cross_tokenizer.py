"""Texts as two models with different tokenizers see them: what `diagnose` measures where token by
token is not possible.

Each model reads the text in its own tokens behind its own template; sampled ids are never encoded
anew. Log-probabilities are those of the smallest byte spans that both tokenizers spell, with the
stop set as one span more. Distributions are compared at the aligned positions, between their masses
over the longest tokens that both vocabularies have ("cat" of one side counts as "ca" where the
other has no "cat"), and the stop set: a KL of coarser distributions, so a lower bound of what finer
classes would show.

Shapes: n tokens of one text, S spans, P aligned positions, C classes of the vocabulary partition,
T tokens of a batch, V student ids, W teacher ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from reflux.tokenalign.class_losses import PartitionIndex, partition_index
from reflux.tokenalign.scores import span_logprobs
from reflux.tokenalign.vocab_map import Vocabulary, common, prefix
from reflux.trainer.data.batch import Batch, Rollout, Sample, TeacherView, pack
from reflux.trainer.data.chat import Chat
from reflux.trainer.losses import HeadInputs, at_positions
from reflux.trainer.phase import Advance, Engine, FrozenModel
from reflux.trainer.rollouts.scoring import Aligned, TextScore, align_texts, score_ids
from reflux.trainer.runs.progress import ignore

from .measure import GradedText, SpanAlignment, TokenStats, curves_of
from .metrics import (
    DIVERGENCES,
    Divergence,
    KLProfile,
    chunked_logits,
    kl_profile,
    top_overlap,
)
from .token_classes import TYPES, token_types


@dataclass(frozen=True, eq=False)
class VocabularyPair:
    """Two vocabularies on one partition."""

    student: Chat
    teacher: Chat
    partition: PartitionIndex
    # bool [V] and [W]: ids that both spell in one token, and the stop sets
    shared: tuple[Tensor, Tensor]
    class_type_C: Tensor  # int64, of TYPES
    student_type_V: np.ndarray


def pair_of(
    student: Chat, teacher: Chat, rows: tuple[int, int], device: torch.device
) -> VocabularyPair:
    """rows: of the two heads that belong to ids of the tokenizers."""
    sides = [Vocabulary(c.table, c.stop_ids, n) for c, n in zip((student, teacher), rows)]
    partition, shared = prefix(*sides), common(*sides)
    type_V = token_types(student.table, student.stop_ids)
    shared_V, shared_W = (
        torch.from_numpy(classes != shared.control_class).to(device)
        for classes in (shared.student_class, shared.teacher_class)
    )
    ids = sorted(
        np.flatnonzero(partition.student_class >= 0).tolist(),
        key=lambda i: -len(sides[0].spellings[i]),
    )
    class_type_C = np.zeros(partition.num_classes, np.int64)
    # of several tokens the shortest, assigned last, names the class
    class_type_C[partition.student_class[ids]] = type_V[ids]
    class_type_C[partition.control_class] = TYPES.index("stop")
    return VocabularyPair(
        student,
        teacher,
        partition_index(partition, device),
        (shared_V, shared_W),
        torch.from_numpy(class_type_C).to(device),
        type_V,
    )


@dataclass(frozen=True, eq=False)
class _AlignedText:
    """One text in both models' tokens."""

    text: GradedText  # in the student's ids
    teacher_ids: tuple[int, ...]  # without the stop token
    student_span: np.ndarray  # [n] of the content tokens
    teacher_span: np.ndarray
    start_span: np.ndarray  # [P]
    student_position: np.ndarray  # [P] predictors among the student's tokens
    teacher_position: np.ndarray  # [P] the same among the teacher's
    bounds: np.ndarray  # [S] where each span ends, bytes

    @property
    def rollout(self) -> Rollout:
        return self.text.rollout


def measure_texts_cross_tokenizer(
    engine: Engine,
    teacher: FrozenModel,
    texts: Sequence[GradedText],
    pair: VocabularyPair,
    *,
    tokens: int,
    overlap_k: int,
    joined: bool = False,
    advance: Advance = ignore,
) -> tuple[list[TokenStats], list[TokenStats]]:
    """Token stats of texts in the ids of the model that sampled them, in their order, and those of
    unaligned texts: without a number, but with the text and its grade, which the symptoms need.
    Collective.
    """
    aligned = _align(texts, pair)
    comparable = [t for t in aligned if t is not None]
    student_scores = score_ids(
        engine,
        engine,
        [(t.rollout.prompt_ids, t.rollout.content_ids) for t in comparable],
        pair.student,
        tokens=tokens,
    )
    teacher_scores = score_ids(
        teacher,
        engine,
        [(pair.teacher.prompt_ids(t.rollout.prompt.messages), t.teacher_ids) for t in comparable],
        pair.teacher,
        tokens=tokens,
    )
    samples = [Sample(t.rollout, teacher_views=(_view(t, pair.teacher),)) for t in comparable]
    batches = pack(samples, tokens=tokens, seq_len=engine.seq_len, joined=joined)
    measured = _measure_positions(engine, teacher, batches, pair, overlap_k, advance)
    stats = [
        _token_stats(t, student, other, measured[i], pair)
        for i, (t, student, other) in enumerate(zip(comparable, student_scores, teacher_scores))
    ]
    return stats, [unaligned_stats(text) for text, t in zip(texts, aligned) if t is None]


def _align(texts: Sequence[GradedText], pair: VocabularyPair) -> list[_AlignedText | None]:
    aligned: list[_AlignedText | None] = [None] * len(texts)
    for by_teacher, chats in (
        (False, (pair.student, pair.teacher)),
        (True, (pair.teacher, pair.student)),
    ):
        mine = [i for i, t in enumerate(texts) if (t.sampled_by == "teacher") == by_teacher]
        for i, a in zip(mine, align_texts(*chats, [texts[i].rollout for i in mine], same=False)):
            aligned[i] = _aligned_text(texts[i], a, pair, by_teacher)
    return aligned


def _aligned_text(
    text: GradedText, a: Aligned, pair: VocabularyPair, by_teacher: bool
) -> _AlignedText | None:
    """None: the two tokenizers cannot both spell the text."""
    if not a.spans or a.parts is None:
        return None
    bounds, starts = a.parts[0].bounds, a.starts
    if not by_teacher:
        return _AlignedText(
            text,
            a.scorer_ids,
            student_span=a.sampler_span,
            teacher_span=a.scorer_span,
            start_span=starts.span,
            student_position=starts.a,
            teacher_position=starts.b,
            bounds=bounds,
        )
    rollout = text.rollout
    ids = a.scorer_ids + ((pair.student.stop_id,) if rollout.ended else ())
    in_student_ids = replace(
        rollout,
        prompt_ids=pair.student.prompt_ids(rollout.prompt.messages),
        ids=ids,
        logp=(0.0,) * len(ids),
    )
    return _AlignedText(
        replace(text, rollout=in_student_ids),
        rollout.content_ids,
        student_span=a.scorer_span,
        teacher_span=a.sampler_span,
        start_span=starts.span,
        student_position=starts.b,
        teacher_position=starts.a,
        bounds=bounds,
    )


def unaligned_stats(text: GradedText) -> TokenStats:
    """A text without numbers."""
    none, no_index = np.zeros(0), np.zeros(0, np.int64)
    return TokenStats(
        text.rollout,
        text.sampled_by,
        text.grade.correct,
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
        alignment=SpanAlignment((), no_index, no_index, no_index, np.zeros((0, 2))),
    )


@dataclass(frozen=True, eq=False)
class _Positions:
    """What was measured at aligned positions, on the host."""

    profiles: Mapping[Divergence, KLProfile]
    overlap_P: np.ndarray
    teachable_P: np.ndarray
    entropy_gap_P: np.ndarray
    common_P2: np.ndarray  # mass of the shared ids, student's and teacher's

    def rows(self, rows: np.ndarray) -> "_Positions":
        return _Positions(
            {d: p.rows(rows) for d, p in self.profiles.items()},
            self.overlap_P[rows],
            self.teachable_P[rows],
            self.entropy_gap_P[rows],
            self.common_P2[rows],
        )


def _measure_positions(
    engine: Engine,
    teacher: FrozenModel,
    batches: Sequence[Batch],
    pair: VocabularyPair,
    overlap_k: int,
    advance: Advance,
) -> dict[int, _Positions]:
    """By index of the sample. Collective."""
    measured: dict[int, _Positions] = {}
    index = pair.partition
    for batch in engine.pad_across_ranks(batches):
        batch = batch.to(engine.device)
        aligned_P = batch.aligned_positions()
        with (
            engine.forward_no_grad(engine, batch, index.student.num_ids) as student,
            engine.forward_no_grad(teacher, batch.for_teacher(), index.teacher.num_ids) as other,
        ):
            here = _compare(at_positions(student, aligned_P), other, pair, overlap_k)
        sample_T = batch.sample_T.cpu().numpy()
        sample_P = sample_T[:0] if aligned_P is None else sample_T[aligned_P.cpu().numpy()]
        samples = np.unique(sample_T).tolist()
        for i in samples:
            measured[i] = here.rows(np.flatnonzero(sample_P == i))
        advance(len(samples))
    return measured


@torch.no_grad()
def _compare(
    student: HeadInputs, teacher: HeadInputs, pair: VocabularyPair, overlap_k: int
) -> _Positions:
    profiles = {
        d: kl_profile(
            student, teacher, d, pair.class_type_C, len(TYPES), partition=pair.partition
        ).cpu()
        for d in DIVERGENCES
    }
    overlap = top_overlap(student, teacher, overlap_k, pair.partition).cpu()
    common_2P = [_mass(out, ids) for out, ids in zip((student, teacher), pair.shared)]
    return _Positions(
        profiles,
        overlap.overlap_T.numpy(),
        overlap.teachable_T.numpy(),
        overlap.entropy_gap_T.numpy(),
        torch.stack(common_2P, 1).numpy(),
    )


def _mass(out: HeadInputs, ids_V: Tensor) -> Tensor:
    """float64 [P], on the host: mass of the marked ids."""
    masses = [(z_CV.softmax(1) * ids_V).sum(1) for z_CV in chunked_logits(out, len(ids_V))]
    return torch.cat(masses or [torch.zeros(0, dtype=torch.float64)]).cpu()


def _view(t: _AlignedText, teacher: Chat) -> TeacherView:
    ids = t.teacher_ids + ((teacher.stop_id,) if t.rollout.ended else ())
    prompt_ids = teacher.prompt_ids(t.rollout.prompt.messages)
    return TeacherView(prompt_ids, ids, t.student_position, t.teacher_position)


def _token_stats(
    t: _AlignedText, student: TextScore, teacher: TextScore, m: _Positions, pair: VocabularyPair
) -> TokenStats:
    spans = len(t.bounds)
    student_S = span_logprobs(student.logp, t.student_span, spans)
    teacher_S = span_logprobs(teacher.logp, t.teacher_span, spans)
    start_S = np.concatenate([[0], t.bounds[:-1]])[:spans]
    n_bytes = int(t.bounds[-1]) if spans else 0
    if t.rollout.ended:
        student_S, teacher_S = (
            np.append(student_S, student.stop),
            np.append(teacher_S, teacher.stop),
        )
        start_S = np.append(start_S, n_bytes)
    first_P = np.array(t.rollout.ids, np.int64)[t.student_position]
    grade = t.text.grade
    return TokenStats(
        t.rollout,
        t.text.sampled_by,
        grade.correct,
        start_n=start_S,
        n_bytes=n_bytes,
        type_n=pair.student_type_V[first_P],
        student_logp_n=student_S,
        teacher_logp_n=teacher_S,
        kl={d: p.kl_T.numpy() for d, p in m.profiles.items()},
        curves={d: curves_of(p) for d, p in m.profiles.items()},
        overlap_n=m.overlap_P,
        teachable_n=m.teachable_P,
        entropy_gap_n=m.entropy_gap_P,
        answer=grade.extracted,
        alignment=SpanAlignment(
            t.teacher_ids, t.student_span, t.teacher_span, t.start_span, m.common_P2
        ),
    )
