"""Texts as two models with different tokenizers see them: what `diagnose` measures where token by
token is not possible.

Each model reads the text in its own tokens behind its own template; nobody's sampled ids are
encoded anew. Log-probabilities are those of the smallest byte spans that both tokenizers spell,
with the stop set as one span more. Distributions are compared where both have read the same bytes
(span starts), between their masses over the longest tokens that both vocabularies have ("cat" of
one side counts as "ca" where the other has no "cat"), and the stop set: a KL of coarser
distributions, so a lower bound of what finer classes would show.

Shapes: n tokens of one text, S spans, P places (span starts that can be compared), N classes, T
tokens of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reflux.tokenalign.class_losses import PartitionIndex, partition_index
from reflux.tokenalign.scores import span_logprobs
from reflux.tokenalign.vocab_map import Vocabulary, common, prefix
from reflux.trainer.data.batch import Rollout, Sample, TeacherView, pack
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.graders import Grade
from reflux.trainer.losses import HeadInputs, at_positions
from reflux.trainer.rollouts.scoring import Aligned, TextScore, align_texts, score_ids
from reflux.trainer.runs.progress import Advance, ignore

from .measure import DIRECTIONS, Across, TokenStats, curves_of, on_host
from .metrics import KLProfile, chunked_logits, kl_profile, top_overlap
from .token_classes import TYPES, token_types


@dataclass(frozen=True, eq=False)
class Pair:
    """Two vocabularies on one set of classes."""

    student: Chat
    teacher: Chat
    partition: PartitionIndex
    # bool [V] and [W]: ids that both spell in one token, and the stop sets
    shared: tuple[Tensor, Tensor]
    class_type_N: Tensor  # int64, of TYPES
    student_type_V: np.ndarray


def pair_of(student: Chat, teacher: Chat, rows: tuple[int, int], device: torch.device) -> Pair:
    """rows: of the two heads that belong to ids of the tokenizers."""
    sides = [Vocabulary(c.table, c.stop_ids, n) for c, n in zip((student, teacher), rows)]
    built, whole, types = (
        prefix(*sides),
        common(*sides),
        token_types(student.table, student.stop_ids),
    )
    shared = tuple(
        torch.from_numpy(x != whole.control_class).to(device)
        for x in (whole.student_class, whole.teacher_class)
    )
    class_type_N = np.zeros(built.num_classes, np.int64)
    ids = sorted(
        np.flatnonzero(built.student_class >= 0).tolist(), key=lambda i: -len(sides[0].spellings[i])
    )
    # of several tokens the shortest, assigned last, names the class
    class_type_N[built.student_class[ids]] = types[ids]
    class_type_N[built.control_class] = TYPES.index("stop")
    return Pair(
        student,
        teacher,
        partition_index(built, device),
        shared,
        torch.from_numpy(class_type_N).to(device),
        types,
    )


@dataclass(frozen=True, eq=False)
class _Text:
    """One text in both models' tokens."""

    rollout: Rollout  # in the student's ids
    writer: str
    grade: Grade
    teacher_ids: tuple[int, ...]  # without the stop token
    student_span: np.ndarray  # [n] of the content tokens
    teacher_span: np.ndarray
    place_span: np.ndarray  # [P]
    # [P] predictors among the student's and the teacher's tokens
    places: tuple[np.ndarray, np.ndarray]
    bounds: np.ndarray  # [S] where each span ends, bytes


def read_across(
    engine: Any,
    teacher: Any,
    texts: Sequence[tuple[Rollout, str, Grade]],
    pair: Pair,
    *,
    tokens: int,
    top: int,
    joined: bool = False,
    advance: Advance = ignore,
) -> tuple[list[TokenStats], list[TokenStats]]:
    """Readings of (rollout in its writer's ids, writer, its grade) in their order, and those of
    texts that could not be aligned: without a number, but with the text and its grade, which the
    symptoms need. Collective.
    """
    aligned = _align(texts, pair)
    kept = [t for t in aligned if t is not None]
    student_scores = score_ids(
        engine,
        engine,
        [(t.rollout.prompt_ids, t.rollout.content_ids) for t in kept],
        pair.student,
        tokens=tokens,
    )
    teacher_scores = score_ids(
        teacher,
        engine,
        [(pair.teacher.prompt_ids(t.rollout.prompt.messages), t.teacher_ids) for t in kept],
        pair.teacher,
        tokens=tokens,
    )
    measured = _measure_places(
        engine, teacher, kept, pair, tokens=tokens, top=top, joined=joined, advance=advance
    )
    found = [
        _reading(t, a, b, m, pair)
        for t, a, b, m in zip(kept, student_scores, teacher_scores, measured)
    ]
    return found, [_unread(text) for text, t in zip(texts, aligned) if t is None]


def _align(texts: Sequence[tuple[Rollout, str, Grade]], pair: Pair) -> list[_Text | None]:
    found: list[_Text | None] = [None] * len(texts)
    for by_teacher, chats in (
        (False, (pair.student, pair.teacher)),
        (True, (pair.teacher, pair.student)),
    ):
        mine = [i for i, (_, writer, _) in enumerate(texts) if (writer == "teacher") == by_teacher]
        for i, a in zip(mine, align_texts(*chats, [texts[i][0] for i in mine], same=False)):
            found[i] = _text(texts[i], a, pair, by_teacher) if a.spans else None
    return found


def _text(text: tuple[Rollout, str, Grade], a: Aligned, pair: Pair, by_teacher: bool) -> _Text:
    rollout, writer, grade = text
    bounds = a.parts[0].bounds
    spans, places = (a.sampler_span, a.scorer_span), (a.starts.a, a.starts.b)
    if not by_teacher:
        return _Text(rollout, writer, grade, a.scorer_ids, *spans, a.starts.span, places, bounds)
    ids = a.scorer_ids + ((pair.student.stop_id,) if rollout.ended else ())
    own = replace(
        rollout,
        prompt_ids=pair.student.prompt_ids(rollout.prompt.messages),
        ids=ids,
        logp=(0.0,) * len(ids),
    )
    return _Text(
        own, writer, grade, rollout.content_ids, *spans[::-1], a.starts.span, places[::-1], bounds
    )


def _unread(text: tuple[Rollout, str, Grade]) -> TokenStats:
    rollout, writer, grade = text
    none, nowhere = np.zeros(0), np.zeros(0, np.int64)
    across = Across((), nowhere, nowhere, nowhere, np.zeros((0, 2)))
    return TokenStats(
        rollout,
        writer,
        grade.correct,
        nowhere,
        0,
        nowhere,
        none,
        none,
        dict.fromkeys(DIRECTIONS, none),
        {},
        none,
        none,
        none,
        answer=grade.extracted,
        across=across,
    )


@dataclass(frozen=True, eq=False)
class _Places:
    """What was measured at the places of one text, on the host."""

    profiles: dict[str, KLProfile]
    overlap_P: np.ndarray
    teachable_P: np.ndarray
    entropy_gap_P: np.ndarray
    common_P2: np.ndarray  # mass of the shared classes, student's and teacher's


def _measure_places(
    engine: Any,
    teacher: Any,
    texts: Sequence[_Text],
    pair: Pair,
    *,
    tokens: int,
    top: int,
    joined: bool,
    advance: Advance,
) -> list[_Places]:
    samples = [Sample(t.rollout, teacher_views=(_view(t, pair.teacher),)) for t in texts]
    found: list[Any] = [None] * len(texts)
    for batch in engine.pad_across_ranks(
        pack(samples, tokens=tokens, seq_len=engine.seq_len, joined=joined)
    ):
        batch = batch.to(engine.device)
        aligned_P = batch.aligned_positions()
        with (
            engine.forward_no_grad(engine, batch, pair.partition.student.num_ids) as student,
            engine.forward_no_grad(
                teacher, batch.for_teacher(), pair.partition.teacher.num_ids
            ) as other,
            torch.no_grad(),
        ):
            outputs = at_positions(student, aligned_P), other
            profiles = {
                d: on_host(
                    kl_profile(*outputs, d, pair.class_type_N, len(TYPES), partition=pair.partition)
                )
                for d in DIRECTIONS
            }
            meeting = [
                x.cpu().numpy() for x in vars(top_overlap(*outputs, top, pair.partition)).values()
            ]
            common_P2 = _common_mass(outputs, pair.shared)
        which_P = (
            batch.sample_T.cpu().numpy()[:0]
            if aligned_P is None
            else batch.sample_T[aligned_P].cpu().numpy()
        )
        for i in np.unique(batch.sample_T.cpu().numpy()):
            rows = np.flatnonzero(which_P == i)
            found[i] = _Places(
                {d: p.rows(rows) for d, p in profiles.items()},
                *(x[rows] for x in meeting),
                common_P2[rows],
            )
        advance(len(np.unique(batch.sample_T.cpu().numpy())))
    return found


def _view(t: _Text, teacher: Chat) -> TeacherView:
    ids = t.teacher_ids + ((teacher.stop_id,) if t.rollout.ended else ())
    return TeacherView(teacher.prompt_ids(t.rollout.prompt.messages), ids, *t.places)


def _common_mass(
    outputs: tuple[HeadInputs, HeadInputs], shared: tuple[Tensor, Tensor]
) -> np.ndarray:
    """[P, 2] mass of the ids that both spell in one token, under student and teacher."""
    columns = [
        [(logits.softmax(1) * mask_V).sum(1) for logits in chunked_logits(out, len(mask_V))]
        for out, mask_V in zip(outputs, shared)
    ]
    return torch.stack(
        [torch.cat(c or [torch.zeros(0, dtype=torch.float64)]).cpu() for c in columns], 1
    ).numpy()


def _reading(
    t: _Text, student: TextScore, teacher: TextScore, m: _Places, pair: Pair
) -> TokenStats:
    spans = len(t.bounds)
    sums = [
        span_logprobs(s.logp, span, spans)
        for s, span in ((student, t.student_span), (teacher, t.teacher_span))
    ]
    start_S = np.concatenate([[0], t.bounds[:-1]])[:spans]
    n_bytes = int(t.bounds[-1]) if spans else 0
    if t.rollout.ended:
        sums = [np.append(x, s.stop) for x, s in zip(sums, (student, teacher))]
        start_S = np.append(start_S, n_bytes)
    first = np.array(t.rollout.ids, np.int64)[t.places[0]]
    across = Across(t.teacher_ids, t.student_span, t.teacher_span, t.place_span, m.common_P2)
    return TokenStats(
        t.rollout,
        t.writer,
        t.grade.correct,
        start_S,
        n_bytes,
        pair.student_type_V[first],
        *sums,
        {d: p.kl_T.numpy() for d, p in m.profiles.items()},
        {d: curves_of(p) for d, p in m.profiles.items()},
        m.overlap_P,
        m.teachable_P,
        m.entropy_gap_P,
        answer=t.grade.extracted,
        across=across,
    )
