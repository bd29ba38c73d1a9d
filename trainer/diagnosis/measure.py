"""Texts as two models see them, token by token: what `diagnose` measures before it adds anything
up.

Both models read the same ids, each behind its own rendering of the prompt. Nothing of size [T, V]
outlives a micro-batch.

Shapes: n response tokens of one text (stop token included), K grid of top-k sizes, N token types,
M frequency bands, T tokens of a batch, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reflux.trainer.data.batch import Rollout, Sample, TeacherView, pack
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.graders import Grade
from reflux.trainer.losses import HeadInputs, token_logprob_of
from reflux.trainer.phase import Advance, Engine, FrozenModel
from reflux.trainer.runs.progress import ignore

from .metrics import (
    DIVERGENCES,
    Divergence,
    KLProfile,
    TopOverlap,
    kl_profile,
    off_nucleus,
    top_overlap,
)
from .token_classes import BANDS, TYPES

SampledBy = Literal["dataset", "teacher", "student"]


@dataclass(frozen=True)
class GradedText:
    """A text to measure, in the ids of the model that sampled it."""

    rollout: Rollout
    sampled_by: SampledBy
    grade: Grade

    @property
    def correct(self) -> bool | None:
        """None: not graded, or the grader failed on it."""
        return correct_of(self.grade)


def correct_of(grade: Grade) -> bool | None:
    """A failed grade is neither right nor wrong."""
    return None if grade.failed else grade.correct


@dataclass(frozen=True, eq=False)
class KLCurves:
    """Sums over a text's positions of one divergence's profile; divide by their number."""

    k: tuple[int, ...]
    raw_K: np.ndarray
    bucket_K: np.ndarray
    gradient_tail_K: np.ndarray
    type_N: np.ndarray
    type_at_10_N: np.ndarray
    band_M: np.ndarray  # [0] where bands are not measured
    band_at_10_M: np.ndarray


@dataclass(frozen=True, eq=False)
class ByteAlignment:
    """One text in two tokenizers: what the teacher reads, how many byte positions there are, and
    between which compared positions each token begins.
    """

    view: TeacherView
    positions: int  # before every byte, and behind the last one of a text that ended
    student_unit: np.ndarray  # [n] of the content tokens
    teacher_unit: np.ndarray
    missing: tuple[float, float]  # shares left out, student's and teacher's, summed over positions

    @property
    def teacher_ids(self) -> tuple[int, ...]:
        """With the stop token of a text that ended."""
        return self.view.ids or ()


@dataclass(frozen=True, eq=False)
class TokenStats:
    """One text under both models. Arrays are per token, [n], nats. Of two tokenizers (`alignment`)
    they are per compared byte position.
    """

    rollout: Rollout
    sampled_by: SampledBy
    correct: bool | None  # None: not graded
    start_n: np.ndarray  # byte of the text at which each token begins
    n_bytes: int
    type_n: np.ndarray  # index into TYPES
    student_logp_n: np.ndarray
    teacher_logp_n: np.ndarray
    kl: Mapping[Divergence, np.ndarray]
    curves: Mapping[Divergence, KLCurves]
    overlap_n: np.ndarray  # of the two top-K sets
    teachable_n: np.ndarray  # teacher mass inside the student's top K
    entropy_gap_n: np.ndarray  # H(teacher) - H(student)
    band_n: np.ndarray | None = None  # index into BANDS; None: not measured
    outside_n: np.ndarray | None = None  # bool: outside the teacher's top-p set; None: not measured
    answer: str | None = None  # what the grader took for the answer
    alignment: ByteAlignment | None = None  # None: one tokenizer

    @property
    def prompt(self) -> int:
        return self.rollout.prompt.index

    @property
    def tokens(self) -> int:
        """Of the student."""
        return len(self.student_logp_n if self.alignment is None else self.rollout.ids)

    @property
    def positions(self) -> int:
        """Number of positions at which distributions were compared."""
        return len(self.overlap_n)


@dataclass(frozen=True, eq=False)
class StatsSpec:
    """What is measured at every position beside its KL. V: ids, or the 257 symbols of a byte."""

    overlap_k: int  # K of the overlap of top-K sets
    type_V: Tensor  # index into TYPES
    band_V: Tensor  # index into BANDS

    def to(self, device: torch.device) -> "StatsSpec":
        return StatsSpec(self.overlap_k, self.type_V.to(device), self.band_V.to(device))


def measure_texts(
    engine: Engine,
    teacher: FrozenModel,
    texts: Sequence[GradedText],
    chats: tuple[Chat, Chat],
    *,
    tokens: int,
    spec: StatsSpec,
    joined: bool = False,
    advance: Advance = ignore,
) -> list[TokenStats]:
    """Token stats of texts in the student's ids, in their order. chats: student's and teacher's.
    tokens, joined: of a micro-batch, as in `pack`. Collective.
    """
    student_chat, teacher_chat = chats
    samples = [
        Sample(
            t.rollout,
            teacher_views=(TeacherView(teacher_chat.prompt_ids(t.rollout.prompt.messages)),),
        )
        for t in texts
    ]
    stats: dict[int, TokenStats] = {}
    V = min(student_chat.vocab_size, teacher_chat.vocab_size)
    spec_here = spec.to(engine.device)
    for batch in engine.pad_across_ranks(
        pack(samples, tokens=tokens, seq_len=engine.seq_len, joined=joined)
    ):
        batch = batch.to(engine.device)
        with (
            engine.forward_no_grad(engine, batch, V) as student,
            engine.forward_no_grad(teacher, batch.for_teacher(), V) as other,
        ):
            measured = _measure(student, other, batch.target_T, spec_here)
        sample_T = batch.sample_T.cpu().numpy()
        here = np.unique(sample_T).tolist()
        for i in here:
            rows = np.flatnonzero(sample_T == i)
            stats[i] = _token_stats(texts[i], student_chat, spec, measured, rows)
        advance(len(here))
    return [stats[i] for i in range(len(texts))]


@dataclass(frozen=True, eq=False)
class _Measured:
    """A micro-batch's numbers on the host."""

    student_logp_T: np.ndarray
    teacher_logp_T: np.ndarray
    profiles: Mapping[Divergence, KLProfile]
    overlap: TopOverlap
    outside_T: np.ndarray


@torch.no_grad()
def _measure(
    student: HeadInputs, teacher: HeadInputs, target_T: Tensor, spec: StatsSpec
) -> _Measured:
    profiles = {
        d: kl_profile(student, teacher, d, spec.type_V, len(TYPES), spec.band_V, len(BANDS)).cpu()
        for d in DIVERGENCES
    }
    overlap = top_overlap(student, teacher, spec.overlap_k).cpu()
    outside_T = off_nucleus(teacher, target_T).cpu().numpy()
    student_T, teacher_T = (
        token_logprob_of(out, target_T).logp.double().cpu().numpy() for out in (student, teacher)
    )
    return _Measured(student_T, teacher_T, profiles, overlap, outside_T)


def curves_of(profile: KLProfile) -> KLCurves:
    """Of one text's positions, on the host."""
    sums = profile.map(lambda x: x.sum(0))
    return KLCurves(
        sums.k,
        sums.raw_TK.numpy(),
        sums.bucket_TK.numpy(),
        sums.gradient_tail_TK.numpy(),
        sums.type_TN.numpy(),
        sums.type_at_10_TN.numpy(),
        sums.band_TM.numpy(),
        sums.band_at_10_TM.numpy(),
    )


def _token_stats(
    text: GradedText, chat: Chat, spec: StatsSpec, m: _Measured, rows: np.ndarray
) -> TokenStats:
    ids = list(text.rollout.ids)
    length_n = chat.table.lens[ids]
    profiles = {d: p.rows(rows) for d, p in m.profiles.items()}
    return TokenStats(
        text.rollout,
        text.sampled_by,
        text.correct,
        start_n=np.cumsum(length_n) - length_n,
        n_bytes=int(length_n.sum()),
        type_n=spec.type_V.cpu().numpy()[ids],
        student_logp_n=m.student_logp_T[rows],
        teacher_logp_n=m.teacher_logp_T[rows],
        kl={d: p.kl_T.numpy() for d, p in profiles.items()},
        curves={d: curves_of(p) for d, p in profiles.items()},
        overlap_n=m.overlap.overlap_T.numpy()[rows],
        teachable_n=m.overlap.teachable_T.numpy()[rows],
        entropy_gap_n=m.overlap.entropy_gap_T.numpy()[rows],
        band_n=spec.band_V.cpu().numpy()[ids],
        outside_n=m.outside_T[rows],
        answer=text.grade.extracted,
    )


def per_prompt(
    stats: Sequence[TokenStats], value: Callable[[TokenStats], float]
) -> dict[int, float]:
    """Sums of a text's value over the texts of each prompt: what a bootstrap over prompts draws
    from.
    """
    sums: dict[int, float] = {}
    for s in stats:
        sums[s.prompt] = sums.get(s.prompt, 0.0) + value(s)
    return sums
