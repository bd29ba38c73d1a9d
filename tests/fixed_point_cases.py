"""Losses across tokenizers summed over every text of a small Markov source, in the logits of a
student that has a row for each history: gradients at the truth, and where descent ends.

N: texts. R: student rows, one per history. M: student tokens of all texts. P: aligned positions.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from byte_cases import masses_of, tokens_of
from torch import Tensor
from vocab_pairs import longest_first, table_of

from reflux.kernels._divergence import divergence_ref
from reflux.tokenalign import vocab_map
from reflux.tokenalign.byte_trie import ByteTrie
from reflux.tokenalign.byte_windows import byte_windows, next_byte_logprob
from reflux.tokenalign.class_losses import class_kl, hybrid, partition_index, uld
from reflux.tokenalign.offsets import side
from reflux.tokenalign.projection import Projection
from reflux.tokenalign.span_losses import span_likelihood_kl
from reflux.tokenalign.span_starts import span_starts
from reflux.tokenalign.spans import align_spans
from reflux.tokenalign.vocab_map import Vocabulary

LETTERS = "abc"
# p(a, b, c, end) after a, b, c and at the start
SOURCE = np.array(
    [[0.2, 0.5, 0.2, 0.1], [0.4, 0.2, 0.3, 0.1], [0.3, 0.3, 0.3, 0.1], [0.4, 0.3, 0.3, 0.0]]
)
# (student, teacher). Of the first four the student cuts letter by letter
PAIRS = {
    "no merge": ("a b c", "a b c"),
    "teacher merges 2": ("a b c", "a b c ab"),
    "teacher merges 3": ("a b c", "a b c abc"),
    "teacher merges 2 and 3": ("a b c", "a b c ab cab"),
    "student merges 2": ("a b c ab", "a b c"),
    "student merges 3": ("a b c abc", "a b c"),
    "both merge": ("a b c ab", "a b c bc"),
}
BUILD = {
    "first_byte": vocab_map.first_byte,
    "prefix": vocab_map.prefix,
    "common": vocab_map.common,
    "hybrid": vocab_map.common,
    "projection": Projection.build,
}


def source_texts(longest: int) -> dict[str, float]:
    """Text -> probability; a text of `longest` letters has ended for certain."""
    out: dict[str, float] = {}

    def grow(text, prob, last):
        if len(text) == longest:
            out[text] = prob
            return
        out[text] = prob * SOURCE[last, 3]
        for k, letter in enumerate(LETTERS):
            grow(text + letter, prob * SOURCE[last, k], k)

    grow("", 1.0, 3)
    return {text: prob for text, prob in out.items() if prob}


class Conditionals:
    """p(next token or stop | tokens so far) of the source cut longest-first; the stop is the last
    id.
    """

    def __init__(self, pieces: Sequence[str], texts: dict[str, float]):
        self.pieces, stop = list(pieces), len(pieces)
        self.ids = [(*longest_first(text, self.pieces), stop) for text in texts]
        count: dict[tuple[int, ...], np.ndarray] = {}
        for ids, prob in zip(self.ids, texts.values()):
            for t, i in enumerate(ids):
                count.setdefault(ids[:t], np.zeros(stop + 1))[i] += prob
        self.row = {history: r for r, history in enumerate(count)}
        self.prob_RV = np.array([c / c.sum() for c in count.values()])
        self.table = table_of([p.encode() for p in self.pieces])
        self.vocabulary = Vocabulary(self.table, [stop])

    def conditional(self, history: tuple[int, ...]) -> np.ndarray:
        """[V]; 0 for a history that no text has."""
        row = self.row.get(history)
        return np.zeros(self.prob_RV.shape[1]) if row is None else self.prob_RV[row]

    def logits(self, floor: float = 1e-300) -> Tensor:
        return torch.from_numpy(np.log(np.maximum(self.prob_RV, floor)))


class FixedPoint:
    """A student and a teacher of one source; the teacher is right."""

    def __init__(self, student: str, teacher: str, longest: int = 4, floor: float = 1e-300):
        texts = source_texts(longest)
        self.student, self.teacher = (
            Conditionals(pieces.split(), texts) for pieces in (student, teacher)
        )
        self.prob_N = torch.tensor(list(texts.values()), dtype=torch.float64)
        self.bytes_N = torch.tensor([len(text) for text in texts])
        self.teacher_logits = self.teacher.logits(floor)
        token, aligned, spans = [], [], 0
        span_logp = []
        for n, text in enumerate(texts):
            i, j = self.student.ids[n], self.teacher.ids[n]
            sides = [
                side(x.table, list(ids[:-1]), text.encode())
                for x, ids in ((self.student, i), (self.teacher, j))
            ]
            (alignment,) = align_spans(*([s] for s in sides))
            starts = span_starts(alignment, *sides, ended=True)
            aligned += [
                (self.student.row[i[:x]], self.teacher.row[j[:y]], n)
                for x, y in zip(starts.a.tolist(), starts.b.tolist())
            ]
            here = set(starts.a.tolist())
            # the stop is a span of its own
            span = spans + np.append(alignment.span_a, alignment.num_spans)
            token += [
                (self.student.row[i[:t]], i[t], n, span[t], t not in here) for t in range(len(i))
            ]
            logp = np.zeros(alignment.num_spans + 1)
            for t, k in enumerate((*alignment.span_b, alignment.num_spans)):
                logp[k] += np.log(self.teacher.prob_RV[self.teacher.row[j[:t]], j[t]])
            span_logp += logp.tolist()
            spans += len(logp)
        self.row_M, self.id_M, self.text_M, self.span_M, inner_M = torch.tensor(token).T
        self.inner_M = inner_M.bool()
        self.student_P, self.teacher_P, self.text_P = torch.tensor(aligned).T
        self.span_logp = torch.tensor(span_logp, dtype=torch.float64)
        self.text_S = torch.zeros(spans, dtype=torch.int64)
        self.text_S[self.span_M] = self.text_M

    def logp_M(self, z: Tensor) -> Tensor:
        return z.log_softmax(1)[self.row_M, self.id_M]

    def text_logp(self, z: Tensor) -> Tensor:
        """[N] the student's log-probability of each text in its own cutting."""
        return torch.zeros(len(self.prob_N)).double().index_add(0, self.text_M, self.logp_M(z))

    def nll(self, z: Tensor, prob_N: Tensor, where_M: Tensor | None = None) -> Tensor:
        weight = prob_N[self.text_M] * (1 if where_M is None else where_M)
        return -(weight * self.logp_M(z)).sum()

    def class_loss(
        self, z, prob_N, partition="prefix", divergence="forward", inner=1.0, temperature=1.0
    ) -> Tensor:
        student, teacher = z[self.student_P], self.teacher_logits[self.teacher_P]
        how = {"temperature": temperature}
        if partition == "uld":
            loss_P = uld(student, teacher, **how)
        else:
            index = partition_index(
                BUILD[partition](self.student.vocabulary, self.teacher.vocabulary)
            )
            of = hybrid if partition == "hybrid" else class_kl
            loss_P = of(student, teacher, index, divergence=divergence, **how)
        return (prob_N[self.text_P] * loss_P).sum() + inner * self.nll(z, prob_N, self.inner_M)

    def span_loss(self, z, prob_N, temperature=100.0) -> Tensor:
        student_S = torch.zeros(len(self.span_logp)).double()
        student_S = student_S.index_add(0, self.span_M, self.logp_M(z))
        loss_S = span_likelihood_kl(
            student_S, self.span_logp, temperature=temperature, reduction="none"
        )
        return (prob_N[self.text_S] * loss_S).sum()

    def byte_loss(self, z, prob_N, divergence="forward", temperature=1.0, missing=1e-9) -> Tensor:
        student, teacher = self.byte_sides
        with torch.no_grad():
            other = self._next_bytes(self.teacher_logits, *teacher)
        own = self._next_bytes(z, *student)
        p, q = ((x.logp_PS / temperature).log_softmax(1) for x in (own, other))
        used_P = own.missing_P.maximum(other.missing_P) <= missing
        text_P = torch.repeat_interleave(self.bytes_N + 1)
        kl_P = torch.where(used_P, divergence_ref(p, q, divergence, 0.5), 0.0)
        return (prob_N[text_P] * kl_P).sum()

    @cached_property
    def byte_sides(self):
        """Both sides' windows, trie, and the row of each token."""
        out = []
        for x in (self.student, self.teacher):
            trie = ByteTrie.of(x.vocabulary)
            row_R = torch.tensor([x.row[ids[:t]] for ids in x.ids for t in range(len(ids))])
            out.append((byte_windows(trie, tokens_of(x.ids)), trie, row_R))
        return out

    def _next_bytes(self, z, windows, trie, row_R):
        masses = masses_of(windows, trie, z[row_R].softmax(1))
        return next_byte_logprob(windows, masses)

    def gradient(self, loss) -> float:
        """Its norm at the truth; loss(z, prob_N)."""
        z = self.student.logits().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(z, self.prob_N), z)
        return float(gradient.norm())

    def descend(self, loss, on_policy=False, steps=500, start=None) -> Tensor:
        """Logits after Adam from `start`, None for the truth; on-policy the texts are weighted by
        the student's own probabilities of them.
        """
        z = (self.student.logits(1e-4) if start is None else start.clone()).requires_grad_()
        optimizer = torch.optim.Adam([z], lr=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
        for _ in range(steps):
            prob_N = self.text_logp(z.detach()).softmax(0) if on_policy else self.prob_N
            value = loss(z, prob_N)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
        return z.detach()

    def kl_per_byte(self, z: Tensor) -> float:
        """KL(source || student) of the texts in the student's cutting, nats a byte."""
        kl = (self.prob_N * (self.prob_N.log() - self.text_logp(z))).sum()
        return float(kl / (self.prob_N * self.bytes_N).sum())
