"""The top-k of a teacher as the truncated divergences take it: checked, padding made uniform.

Shapes: T tokens, K top-k ids, V vocabulary.
"""

import torch
from torch import Tensor

from ._loss import LossOptions
from ._triton import check_ids

TAILS = ("bucket", "renorm", "drop", "sampled")  # their index is TAIL in the kernels
ZERO = "zero_outside_topk"  # a bucket whose tail is empty, of a teacher renormalised over S


def topk_inputs(
    ids_TK: Tensor,
    logp_TK: Tensor,
    tail_T: Tensor | None,
    tail: str,
    V: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, logp, log-mass of the tail) as the kernels want them.

    ids and logp are -1 and -inf where padded: ids < 0 or >= V, or logp -inf. The tail is -inf but
    for "bucket". A NaN is no padding: it must reach kl.
    """
    live_TK = (ids_TK >= 0) & (ids_TK < V) & (logp_TK != -torch.inf)
    logp_TK = torch.where(live_TK, logp_TK.detach(), -torch.inf).to(dtype)
    if tail == ZERO:
        logp_TK = renormalised(logp_TK)
    if tail == "bucket" and tail_T is not None:
        tail_T = tail_T.detach().to(dtype).contiguous()
    else:
        tail_T = logp_TK.new_full(ids_TK.shape[:1], -torch.inf)
    return torch.where(live_TK, ids_TK, -1).contiguous(), logp_TK.contiguous(), tail_T


def renormalised(logp_TK: Tensor) -> Tensor:
    """log of the masses over their sum; a row of padding stays -inf."""
    total_T1 = logp_TK.logsumexp(1, keepdim=True)
    return torch.where(total_T1 == -torch.inf, logp_TK, logp_TK - total_T1)


def kernel_tail(tail: str) -> str:
    """The name that the row functions know."""
    return "bucket" if tail == ZERO else tail


def local_ids(ids_TK: Tensor, start: int, width: int, group: str) -> Tensor:
    """ids counted from the first row of this rank's slice of the vocabulary, -1 outside it."""
    if not group:
        return ids_TK
    return torch.where((ids_TK >= start) & (ids_TK < start + width), ids_TK - start, -1)


def check_topk(
    op: str,
    V: int,
    T: int,
    ids_TK: Tensor,
    teacher_logp_TK: Tensor,
    teacher_tail_T: Tensor | None,
    tail: str,
) -> None:
    """Refuse what cannot be the top-k of a teacher over V tokens in T rows."""
    shape = ids_TK.shape
    if not (ids_TK.ndim == 2 and shape[0] == T and teacher_logp_TK.shape == shape):
        raise ValueError(
            f"{op}: ids is {list(shape)} and teacher_logp {list(teacher_logp_TK.shape)} for {T} "
            "rows; want [T, K] both"
        )
    if ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: ids is {ids_TK.dtype}; want int32 or int64")
    if teacher_logp_TK.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op}: teacher_logp is {teacher_logp_TK.dtype}; want float32. 16 bits are 0.06 apart "
            "at 8 nats, so store float32; casting here cannot restore them"
        )
    if not (1 <= shape[1] <= V):
        raise ValueError(
            f"{op}: K is {shape[1]} of {V} classes; want 1 <= K <= V. Drop the padding columns"
        )
    if not (tail != "renorm" or shape[1] > 1):
        raise ValueError(
            f"{op}: renorm at K = 1 is 0 whatever the student says. Use more ids, or tail='bucket'"
        )
    if not (tail != "bucket" or teacher_tail_T is not None):
        raise ValueError(
            f"{op}: bucket needs teacher_tail [T], the log of the teacher's mass outside ids at "
            "this temperature. teacher_topk returns it; without it use tail='renorm'"
        )
    if not (teacher_tail_T is None or teacher_tail_T.shape == (T,)):
        raise ValueError(
            f"{op}: teacher_tail is {list(getattr(teacher_tail_T, 'shape', []))} for {T} rows; "
            "want [T]"
        )
    check_ids(op, ids_TK, V)


def check_tail(
    op: str,
    tail: str,
    options: LossOptions,
    teacher_temperature: float | None = None,
    allow_drop: bool = False,
) -> None:
    """Refuse tails that teach nothing or the wrong thing, and a top-k of another temperature."""
    if tail not in (*TAILS, ZERO):
        raise ValueError(f"{op}: tail is {tail!r}; want one of {', '.join((*TAILS, ZERO))}")
    if tail == ZERO and options.divergence == "reverse":
        raise ValueError(
            f"{op}: tail={tail!r} with divergence='reverse' is infinite: the student has mass "
            "where this teacher has none. Use tail='bucket'"
        )
    if not (tail not in ("drop", "sampled") or options.divergence == "forward"):
        raise ValueError(
            f"{op}: tail={tail!r} with divergence={options.divergence!r}; want 'forward'. Any "
            "other falls when the whole support is pushed down: use tail='bucket'"
        )
    if not (tail != "drop" or allow_drop):
        raise ValueError(
            f"{op}: tail='drop' is no divergence: it can be negative, and a student equal to the "
            "teacher still gets a gradient. Use tail='bucket', or pass allow_drop=True to "
            "reproduce a result that was made with it"
        )
    if teacher_temperature not in (None, options.temperature):
        raise ValueError(
            f"{op}: temperature is {options.temperature} and the teacher's top-k holds at "
            f"{teacher_temperature}; want them equal. K log-probabilities at one temperature do "
            "not give the tail at another: make the top-k at this temperature"
        )
