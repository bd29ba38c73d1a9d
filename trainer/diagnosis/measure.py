"""Texts as two models see them, token by token: what `diagnose` measures before it adds anything
up.

Both models read the same ids, each behind its own rendering of the prompt. Nothing of size [T, V]
outlives a micro-batch.

Shapes: n response tokens of one text (stop token included), K grid of kept classes, N token types,
M frequency bands, T tokens of a batch, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reflux.trainer.data.batch import Rollout, Sample, TeacherView, pack
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.graders import Grade
from reflux.trainer.losses import HeadInputs, token_logprob_of
from reflux.trainer.runs.progress import Advance, ignore

from .frequency_bands import BANDS
from .metrics import KLProfile, kl_profile, off_nucleus, top_overlap
from .token_classes import TYPES

DIRECTIONS = ("forward", "reverse")  # KL(teacher || student), KL(student || teacher)


@dataclass(frozen=True, eq=False)
class Curves:
    """Sums over a text's tokens of one direction's profile."""

    k: tuple[int, ...]
    raw_K: np.ndarray
    bucket_K: np.ndarray
    gradient_tail_K: np.ndarray  # divide by the number of tokens
    type_N: np.ndarray
    type_at_10_N: np.ndarray
    band_M: np.ndarray | None = None  # None: not measured
    band_at_10_M: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Across:
    """How two tokenizers meet in one text: the teacher's tokens, the span of every token, and where
    distributions were compared.
    """

    teacher_ids: tuple[int, ...]  # without the stop token
    student_span: np.ndarray  # [n] of the content tokens, -1 outside
    teacher_span: np.ndarray
    # [P] the span that begins at each place; the number of spans behind the text
    place_span: np.ndarray
    common_P2: np.ndarray  # mass of the tokens that both have, under student and teacher


@dataclass(frozen=True, eq=False)
class TokenStats:
    """One text. Per-token arrays are [n], nats. Of two tokenizers (`across`) log-probabilities are
    per span, and what compares distributions is per place.
    """

    rollout: Rollout
    writer: str  # "student", "teacher" or "dataset"
    right: bool | None  # None where nothing grades it
    start_n: np.ndarray  # byte of the text at which each token begins
    n_bytes: int
    type_n: np.ndarray  # index into TYPES
    student_n: np.ndarray  # log-probability of the token
    teacher_n: np.ndarray
    kl: dict[str, np.ndarray]  # direction -> [n]
    curves: dict[str, Curves]
    overlap_n: np.ndarray  # of the two top-K sets
    teachable_n: np.ndarray  # teacher mass inside the student's top K
    entropy_gap_n: np.ndarray  # H(teacher) - H(student)
    band_n: np.ndarray | None = None  # index into BANDS; None: not measured
    outside_n: np.ndarray | None = None  # bool: outside the teacher's top-p set; None: not measured
    answer: str | None = None  # what the grader took for the answer
    across: Across | None = None

    @property
    def tokens(self) -> int:
        """Of the student."""
        return len(self.student_n if self.across is None else self.rollout.ids)

    @property
    def states(self) -> int:
        """At how many places distributions were compared: at every token, where both models have
        one vocabulary.
        """
        return len(self.overlap_n)

    @property
    def state_start_n(self) -> np.ndarray:
        """Byte at which each of them lies."""
        return self.start_n if self.across is None else self.start_n[self.across.place_span]


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of every state beside its KL."""

    top: int  # K of the overlap of most likely classes
    type_V: Tensor  # index into TYPES
    band_V: Tensor  # index into BANDS

    def to(self, device: torch.device) -> "Asked":
        return Asked(self.top, self.type_V.to(device), self.band_V.to(device))


def read_texts(
    engine: Any,
    teacher: Any,
    texts: Sequence[tuple[Rollout, str, Grade]],
    chats: tuple[Chat, Chat],
    *,
    tokens: int,
    asked: Asked,
    joined: bool = False,
    advance: Advance = ignore,
) -> list[TokenStats]:
    """Readings of (rollout in the student's ids, writer, its grade), in their order. chats:
    student's and teacher's. Collective.

    advance: told how many texts are new after every micro-batch.
    """
    student_chat, teacher_chat = chats
    samples = [
        Sample(r, teacher_views=(TeacherView(teacher_chat.prompt_ids(r.prompt.messages)),))
        for r, _, _ in texts
    ]
    found: list[TokenStats | None] = [None] * len(samples)
    V = min(student_chat.vocab_size, teacher_chat.vocab_size)
    for batch in engine.pad_across_ranks(
        pack(samples, tokens=tokens, seq_len=engine.seq_len, joined=joined)
    ):
        batch = batch.to(engine.device)
        with (
            engine.forward_no_grad(engine, batch, V) as student,
            engine.forward_no_grad(teacher, batch.for_teacher(), V) as other,
        ):
            measured = _measure(student, other, batch.target_T, asked.to(engine.device))
        which = batch.sample_T.cpu().numpy()
        for i in np.unique(which):
            found[i] = _reading(texts[i], student_chat, asked, measured, np.flatnonzero(which == i))
        advance(len(np.unique(which)))
    return found


@dataclass(frozen=True, eq=False)
class _Measured:
    """A micro-batch's numbers on the host."""

    student_T: np.ndarray
    teacher_T: np.ndarray
    profiles: dict[str, KLProfile]
    overlap_T: np.ndarray
    teachable_T: np.ndarray
    entropy_gap_T: np.ndarray
    outside_T: np.ndarray


def _measure(student: HeadInputs, teacher: HeadInputs, target_T: Tensor, asked: Asked) -> _Measured:
    with torch.no_grad():
        profiles = {
            d: on_host(
                kl_profile(student, teacher, d, asked.type_V, len(TYPES), asked.band_V, len(BANDS))
            )
            for d in DIRECTIONS
        }
        meeting, outside_T = (
            top_overlap(student, teacher, asked.top),
            off_nucleus(teacher, target_T),
        )
        logps = [
            token_logprob_of(out, target_T).logp.double().cpu().numpy()
            for out in (student, teacher)
        ]
    return _Measured(
        *logps, profiles, *(x.cpu().numpy() for x in (*vars(meeting).values(), outside_T))
    )


def on_host(profile: KLProfile) -> KLProfile:
    return KLProfile(profile.k, *(x.cpu() for name, x in vars(profile).items() if name != "k"))


def curves_of(profile: KLProfile) -> Curves:
    """Of one text's states, on the host."""
    return Curves(
        profile.k,
        *(
            getattr(profile, name).sum(0).numpy()
            for name in (
                "raw_TK",
                "bucket_TK",
                "gradient_tail_TK",
                "type_TN",
                "type_at_10_TN",
                "band_TM",
                "band_at_10_TM",
            )
        ),
    )


def _reading(
    text: tuple[Rollout, str, Grade], chat: Chat, asked: Asked, m: _Measured, rows: np.ndarray
) -> TokenStats:
    rollout, writer, grade = text
    ids = list(rollout.ids)
    length_n = chat.table.lens[ids]
    kl = {d: p.kl_T[rows].numpy() for d, p in m.profiles.items()}
    curves = {d: curves_of(p.rows(rows)) for d, p in m.profiles.items()}
    type_n, band_n = (x.cpu().numpy()[ids] for x in (asked.type_V, asked.band_V))
    return TokenStats(
        rollout,
        writer,
        grade.correct,
        np.cumsum(length_n) - length_n,
        int(length_n.sum()),
        type_n,
        m.student_T[rows],
        m.teacher_T[rows],
        kl,
        curves,
        m.overlap_T[rows],
        m.teachable_T[rows],
        m.entropy_gap_T[rows],
        band_n,
        m.outside_T[rows],
        grade.extracted,
    )


def per_prompt(
    readings: Sequence[TokenStats], value: Callable[[TokenStats], float]
) -> dict[int, float]:
    """Sums of a text's value over the texts of each prompt: what a bootstrap over prompts draws
    from.
    """
    sums: dict[int, float] = {}
    for r in readings:
        sums[r.rollout.prompt.index] = sums.get(r.rollout.prompt.index, 0.0) + value(r)
    return sums
