"""Next-byte distributions and divergences from hidden states and heads: no [T, V] beyond a chunk.

    row_masses   sums of softmax rows over ranges of ids (`byte_windows.RowMasses`); differentiable
    next_bytes   distributions over 256 bytes and the end (`byte_windows.NextBytes`)
    byte_kl      their divergence from a teacher's, summed over positions

A chunk of logits costs one cumulative sum in the order of the trie, float64 beside the logits'
fp32: a mass of 1e-12 keeps four digits of its value at 32,768 times less. The backward pass makes
the logits of a chunk once more (one GEMM of four) and turns the gradient of ranges into that of ids
by another cumulative sum.

T: rows, D: hidden, V: ids, C: rows of a chunk, P: byte positions, S: symbols.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reflux.kernels._chunks import (
    WORKSPACE_MB,
    backproject,
    check_linear,
    check_softcap,
    chunks,
    gradient_buffers,
    needs_gradients,
    project,
    wide,
)
from reflux.kernels._divergence import check_divergence, divergence_ref
from reflux.kernels.teacher_topk import TopK

from .byte_trie import SYMBOLS, ByteTrie
from .byte_windows import ByteWindows, NextBytes, RowMasses, next_byte_logprob
from .linear_rows import HeadLike

BUFFERS = 8  # [C, V] in fp32 that a chunk keeps alive: logits, softmax in order, sums in fp64
LEAST_LOGP = -1000.0  # of a banned id: its weight is 0, and no number becomes NaN
POSITIONS = 8192  # of a chunk of distributions: 17 MB each in fp64


class ByteDivergence(NamedTuple):
    """Which divergence, and where. The temperature acts on the bytes: two models of equal byte
    distributions stay equal, whatever their tokens, which tempering tokens would undo.
    """

    divergence: str = "forward"  # of kernels._divergence
    beta: float = 0.5
    temperature: float = 1.0
    max_missing: float = 0.01  # positions at which more of either distribution is missing: left out


class ByteKL(NamedTuple):
    """total is differentiable in the student's hidden states and head; the rest is not."""

    total: Tensor  # [], summed over the compared positions
    kl_P: Tensor  # float64, 0 where not compared
    compared_P: Tensor  # bool
    missing_P: Tensor  # the student's share that was left out


def row_masses(
    model: HeadLike,
    trie: ByteTrie,
    windows: ByteWindows,
    *,
    workspace_mb: float = WORKSPACE_MB,
    frozen_head: bool = False,
) -> RowMasses:
    """What the windows want of softmax(logits), float64: sums over ranges of ids in the order of
    the trie, and log p of the rows' own ids. Differentiable in hidden states and head.

    Row t of `model.hidden_TD` predicts windows.ids_R[t]. Probabilities are fp32 (fp64 for fp64).
    ValueError: another number of rows, a head of other ids than the trie's.
    """
    V = check_linear("row_masses", model.hidden_TD, model.head_VD, model.vocab_size, 1.0)
    if len(model.hidden_TD) != len(windows.ids_R) or V != len(trie.order_V):
        raise ValueError(
            f"row_masses: {len(model.hidden_TD)} rows of hidden states and a head of {V} ids for "
            f"{len(windows.ids_R)} tokens and a trie of {len(trie.order_V)} ids; want one row per "
            "token, and Vocabulary(rows = the head's ids)"
        )
    softcap = check_softcap("row_masses", model.softcap)
    call = _Call(trie, windows, V, softcap, workspace_mb)
    need = needs_gradients(model.hidden_TD, model.head_VD, frozen_head)
    found = _RowMasses.apply(model.hidden_TD, model.head_VD, call, *need)
    entry_E, exact_X, stop_R, control_R, logp_R = found
    return RowMasses(entry_E, exact_X, stop_R, control_R, logp_R, torch.zeros_like(logp_R))


def next_bytes(
    model: HeadLike,
    trie: ByteTrie,
    windows: ByteWindows,
    *,
    symbols: Tensor | None = None,
    workspace_mb: float = WORKSPACE_MB,
) -> NextBytes:
    """Distributions over 256 bytes and the end at every position, without a gradient: of a teacher,
    or to look at. logp_PS is fp32, the rest fp64.
    """
    with torch.no_grad():
        masses = row_masses(model, trie, windows, workspace_mb=workspace_mb)
        return _next_bytes(windows, masses, symbols)


def next_bytes_of_topk(
    rows: TopK,
    trie: ByteTrie,
    windows: ByteWindows,
    *,
    symbols: Tensor | None = None,
    workspace_mb: float = WORKSPACE_MB,
) -> NextBytes:
    """`next_bytes` of a teacher by its likeliest ids at every token of the texts, kept in a cache.

    A tail is missing mass wherever a token of its row may end. Where a token of the text is
    not among the ids, its weight is unknown: everything is missing at the positions that need it.
    """
    V, R = len(trie.order_V), len(windows.ids_R)
    rank_V = torch.empty_like(trie.order_V)
    rank_V[trie.order_V] = torch.arange(V, device=rank_V.device)
    known_RK = (rows.ids >= 0) & (rows.logp > -torch.inf)
    prob_RK = torch.where(known_RK, rows.logp.double().exp(), 0.0)
    place_RK = torch.where(known_RK, rank_V[rows.ids.clamp(min=0).long()], V)
    own_RK = known_RK & (rows.ids == windows.ids_R[:, None])
    own_R = (prob_RK * own_RK).sum(1)
    call = _Call(trie, windows, V, 0.0, workspace_mb)
    at_most_R = torch.where(own_R > 0, own_R, rows.tail.double().exp())
    masses = _empty_masses(windows, at_most_R.log().clamp(min=LEAST_LOGP))
    for c in call.chunks(prob_RK):
        p_CV = prob_RK.new_zeros(c.stop - c.start, V + 1)
        p_CV.scatter_add_(1, place_RK[c], prob_RK[c])
        call.take(p_CV[:, :V], c, masses)
    masses = masses._replace(unknown_R=rows.tail.double().exp())
    found = _next_bytes(windows, masses, symbols)
    unknown_R = torch.cat([own_R.new_zeros(1), (own_R == 0).double().cumsum(0)])
    needed_P = unknown_R[windows.row_P] > unknown_R[windows.reference_P] if R else own_R.bool()
    return found._replace(missing_P=torch.where(needed_P, 1.0, found.missing_P))


def _next_bytes(windows: ByteWindows, masses: RowMasses, symbols: Tensor | None) -> NextBytes:
    found = [next_byte_logprob(part, m, symbols) for part, m in _groups(windows, masses)]
    if not found:
        none = masses.logp_R
        return NextBytes(none.float().new_zeros(0, SYMBOLS), none, none)
    logp_PS, missing_P, prefix_P = zip(*found)
    return NextBytes(
        torch.cat([x.float() for x in logp_PS]), *map(torch.cat, (missing_P, prefix_P))
    )


def byte_kl(
    student: HeadLike,
    trie: ByteTrie,
    windows: ByteWindows,
    teacher: NextBytes,
    how: ByteDivergence,
    *,
    symbols: Tensor | None = None,
    workspace_mb: float = WORKSPACE_MB,
) -> ByteKL:
    """Sum over byte positions of D(Q, P), with P and Q student's and teacher's P(symbol | bytes so
    far) to the power 1 / temperature.

    teacher: `next_bytes` at the same positions. A position whose value is not finite keeps it and
    contributes no gradient. ValueError: another number of positions.
    """
    check_divergence("byte_kl", how.divergence, how.beta)
    if len(teacher.logp_PS) != windows.positions:
        raise ValueError(
            f"byte_kl: the teacher has {len(teacher.logp_PS)} byte positions and the student "
            f"{windows.positions}; want the same texts on both sides, byte for byte"
        )
    masses = row_masses(student, trie, windows, workspace_mb=workspace_mb)
    constant = [torch.zeros_like(x) for x in masses]
    results, start = [], 0
    for (part, own), (_, into) in zip(
        _groups(windows, RowMasses(*(x.detach() for x in masses))),
        _groups(windows, RowMasses(*constant)),
    ):
        end = start + part.positions
        other = NextBytes(*(x[start:end] for x in teacher))
        start = end
        leaves = [x.requires_grad_(masses.logp_R.requires_grad) for x in own]
        with torch.enable_grad():
            mine = next_byte_logprob(part, RowMasses(*leaves), symbols)
            kl_P = _divergence(mine.logp_PS, other.logp_PS, how)
        compared_P = mine.missing_P.maximum(other.missing_P) <= how.max_missing
        results.append((torch.where(compared_P, kl_P.detach(), 0.0), compared_P, mine.missing_P))
        if kl_P.requires_grad:
            used_P = (compared_P & kl_P.detach().isfinite()).to(kl_P.dtype)
            wanted = [leaves[0], leaves[2], leaves[4]]
            for grad, i in zip(torch.autograd.grad(kl_P, wanted, used_P), (0, 2, 4)):
                into[i].copy_(grad)
    total = sum(((x * g).sum() for x, g in zip(masses, constant)), masses.logp_R.new_zeros(()))
    if not results:
        none = total.new_zeros(0)
        return ByteKL(total, none, none.bool(), none)
    kl_P, compared_P, missing_P = map(torch.cat, zip(*results))
    # `total` is linear in the masses, with the gradient that was just taken; its value is the KL
    total = total - total.detach() + kl_P.sum()
    return ByteKL(total.to(wide(student.hidden_TD.dtype)), kl_P, compared_P, missing_P)


def _divergence(logp_PS: Tensor, logq_PS: Tensor, how: ByteDivergence) -> Tensor:
    logq_PS = logq_PS.to(logp_PS.dtype)
    if how.temperature != 1:
        logp_PS, logq_PS = ((x / how.temperature).log_softmax(1) for x in (logp_PS, logq_PS))
    return divergence_ref(logp_PS, logq_PS, how.divergence, how.beta)


def _groups(windows: ByteWindows, masses: RowMasses) -> Iterator[tuple[ByteWindows, RowMasses]]:
    """Whole texts of about POSITIONS positions together; the masses are views."""
    starts, start = windows.starts_R[:, 0], 0
    for row, following in zip(windows.text_rows[1:], [*windows.text_rows[2:], None]):
        if following is not None and starts[following] - starts[start] <= POSITIONS:
            continue
        (_, _, e, x), (_, _, e1, x1) = (windows.starts_R[i].tolist() for i in (start, row))
        yield (
            windows.rows(start, row),
            RowMasses(
                masses.entry_E[e:e1],
                masses.exact_X[x:x1],
                *(m[start:row] for m in masses[2:]),
            ),
        )
        start = row


class _Call(NamedTuple):
    trie: ByteTrie
    windows: ByteWindows
    vocab_size: int
    softcap: float
    workspace_mb: float

    def chunks(self, hidden_TD: Tensor) -> Iterator[slice]:
        for c in chunks(hidden_TD, self.vocab_size, BUFFERS, self.workspace_mb):
            assert isinstance(c, slice)
            yield slice(c.start, min(c.stop, len(hidden_TD)))

    def probabilities(
        self, hidden_CD: Tensor, head_VD: Tensor, ids_C: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(softmax [C, V], log p [C] of the ids, the cap's slope [C, V] or nothing)"""
        z_CV = project(hidden_CD, head_VD[: self.vocab_size], self.softcap)
        slope_CV = 1 - (z_CV / self.softcap).square() if self.softcap else z_CV.new_zeros(0)
        z_CV -= z_CV.logsumexp(1, keepdim=True)
        logp_C = z_CV.gather(1, ids_C[:, None])[:, 0]
        return z_CV.exp_(), logp_C, slope_CV

    def keeps(self, hidden_TD: Tensor) -> bool:
        """Whether all rows' softmax may wait for the backward pass: an eighth of the workspace."""
        size = len(hidden_TD) * self.vocab_size * wide(hidden_TD.dtype).itemsize
        return not self.softcap and 8 * size <= self.workspace_mb * 2**20

    def take(self, p_CV: Tensor, c: slice, masses: RowMasses) -> None:
        """The sums of a chunk's softmax, in the trie's order, into their places."""
        sums = p_CV.new_zeros(len(p_CV), p_CV.shape[1] + 1, dtype=torch.float64)
        torch.cumsum(p_CV, 1, dtype=torch.float64, out=sums[:, 1:])
        r = self.ranges(c)
        found = sums.flatten()[r.end] - sums.flatten()[r.begin]
        for out, part, into in zip(masses, found.split(r.counts), r.into):
            out[into] = part

    def ranges(self, c: slice) -> "_Ranges":
        """Of a chunk of rows, as flat positions in [C, V + 1]."""
        w, width = self.windows, self.vocab_size + 1
        (_, _, e, x), (_, _, e1, x1) = (w.starts_R[i].tolist() for i in (c.start, c.stop))
        row_E = (w.row_W[w.window_E[e:e1]] - c.start) * width
        row_X = (w.row_W[w.window_X[x:x1]] - c.start) * width
        row_C = torch.arange(c.stop - c.start, device=row_E.device) * width
        stop, rest = self.trie.text, self.trie.text + self.trie.stop
        begin = [row_E + w.begin_E[e:e1], row_X + w.begin_X[x:x1], row_C + stop, row_C + rest]
        end = [row_E + w.end_E[e:e1], row_X + w.end_X[x:x1], row_C + rest, row_C + width - 1]
        into = slice(e, e1), slice(x, x1), c, c
        return _Ranges(torch.cat(begin), torch.cat(end), tuple(map(len, begin)), into)


def _empty_masses(windows: ByteWindows, logp_R: Tensor) -> RowMasses:
    sizes = (len(windows.symbol_E), len(windows.window_X), len(logp_R), len(logp_R))
    entry_E, exact_X, stop_R, control_R = (logp_R.new_empty(n) for n in sizes)
    return RowMasses(entry_E, exact_X, stop_R, control_R, logp_R, torch.zeros_like(logp_R))


class _Ranges(NamedTuple):
    begin: Tensor
    end: Tensor
    counts: tuple[int, ...]  # of entry_E, exact_X, stop_R, control_R
    into: tuple[slice, ...]  # where they lie in those


class _RowMasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, head_VD, call, need_dhidden, need_dhead):
        ids_R = call.windows.ids_R
        logp_R = torch.empty(len(ids_R), dtype=torch.float64, device=ids_R.device)
        masses = _empty_masses(call.windows, logp_R)
        kept = []
        for c in call.chunks(hidden_TD):
            p_CV, logp_R[c], _ = call.probabilities(hidden_TD[c], head_VD, ids_R[c])
            call.take(p_CV.index_select(1, call.trie.order_V), c, masses)
            if (need_dhidden or need_dhead) and call.keeps(hidden_TD):
                kept.append(p_CV)
        ctx.kept = kept
        ctx.save_for_backward(hidden_TD, head_VD)
        ctx.call, ctx.needed = call, (need_dhidden, need_dhead)
        logp_R.clamp_(min=LEAST_LOGP)
        return masses[:5]  # of a model every id is known

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        hidden_TD, head_VD = ctx.saved_tensors
        call, (need_dhidden, need_dhead), V = ctx.call, ctx.needed, ctx.call.vocab_size
        dhidden_TD, dhead_VD = gradient_buffers(hidden_TD, head_VD, need_dhidden, need_dhead)
        dhead_used_VD = dhead_VD[:V] if need_dhead else None
        rank_V = torch.empty_like(call.trie.order_V)
        rank_V[call.trie.order_V] = torch.arange(V, device=rank_V.device)
        for i, c in enumerate(call.chunks(hidden_TD)):
            if ctx.kept:
                p_CV, slope_CV = ctx.kept[i], hidden_TD.new_zeros(0)
            else:
                ids_C = call.windows.ids_R[c]
                p_CV, _, slope_CV = call.probabilities(hidden_TD[c], head_VD, ids_C)
            dz_CV = _logit_gradient(call, p_CV, rank_V, c, grads)
            if call.softcap:
                dz_CV *= slope_CV
            dhidden_CD = backproject(dz_CV, hidden_TD[c], head_VD[:V], need_dhidden, dhead_used_VD)
            if dhidden_CD is not None:
                dhidden_TD[c] = dhidden_CD
        return (
            dhidden_TD if need_dhidden else None,
            dhead_VD.to(head_VD.dtype) if need_dhead else None,
            *(None,) * 3,
        )


def _logit_gradient(call: _Call, p_CV: Tensor, rank_V: Tensor, c: slice, grads) -> Tensor:
    """[C, V] from the gradients of the masses and of the own log-probabilities.

    A range's gradient is that of each of its ids: g at its begin, -g at its end, summed up.
    """
    r = call.ranges(c)
    g = torch.cat([grad[into] for grad, into in zip(grads, r.into)])
    steps = p_CV.new_zeros(p_CV.shape[0] * (p_CV.shape[1] + 1), dtype=torch.float64)
    steps.index_add_(0, r.begin, g).index_add_(0, r.end, -g)
    d_CV = steps.view(len(p_CV), -1).cumsum_(1).index_select(1, rank_V)
    dlogp_C = grads[4][c]
    d_CV -= ((d_CV * p_CV).sum(1) + dlogp_C)[:, None]
    dz_CV = p_CV * d_CV.to(p_CV.dtype)
    ids_C = call.windows.ids_R[c]
    dz_CV[torch.arange(len(ids_C), device=ids_C.device), ids_C] += dlogp_C.to(p_CV.dtype)
    return dz_CV
