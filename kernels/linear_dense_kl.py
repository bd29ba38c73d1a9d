"""Divergence of a student, given as hidden states and head, from a teacher's distribution over the
whole vocabulary, given as it is: logits or log-probabilities, from a cache or another process.

    logits = softcap tanh(logit_scale (hidden @ head.T + bias) / softcap), no tanh without a softcap
    p = softmax(logits / temperature),  q = softmax(teacher / temperature)
    kl[t]  = D(p[t], q[t]), total = sum_t weight[t] kl[t]: D and options as in linear_kl

Log-probabilities are logits: softmax gives back what they stand for, and at another temperature
what the teacher's logits would have given. The student's [T, V] logits exist chunk by chunk; the
teacher's block is read where it lies, in its dtype, and upcast chunk by chunk. bf16 logits make a
KL of 1e-2 wrong by 13 % (docs/kernels.md, Numerics): store float32, or the exact top-k and its tail
(`teacher_topk`, 400 times smaller at V = 151,936).

Shapes: T tokens, M chosen rows, D hidden, V vocabulary, C rows of a chunk.
"""

import torch
from torch import Tensor

from ._chunks import (
    WORKSPACE_MB,
    Part,
    head_plan,
    logits_ref,
    padded,
    padded_copy,
    parts,
    wide,
)
from ._divergence import divergence_ref, largest_gradient
from ._head import Head, HeadGradients, checked_head
from ._kl_rows import KLSpec, kl_rows
from ._loss import (
    LinearKL,
    LossOptions,
    fake_head_loss,
    loss_factor,
    loss_ref,
    save_gradients,
    scale_gradients,
    weighted_total,
)
from ._parallel import VocabShard, common_width, local_width, slice_of

BLOCKS = 2, 8  # of logits alive at once beside the gradient: with kernels, with PyTorch alone


def linear_dense_kl_ref(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    teacher_TV: Tensor,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    scale_t2: bool = False,
    vocab_size: int | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> LinearKL:
    """The definition, with [T, V] in memory. fp32 arithmetic, or fp64 when given fp64."""
    z_TV = logits_ref(student_hidden_TD, student_head_VD, bias, logit_scale, softcap, vocab_size)
    u_TV = teacher_TV.detach()[:, :vocab_size].to(z_TV.dtype)
    logp_TV, logq_TV = ((x_TV / temperature).log_softmax(-1) for x_TV in (z_TV, u_TV))
    kl_T = divergence_ref(logp_TV, logq_TV, divergence, beta)
    return loss_ref(kl_T, weight, rows, temperature**2 if scale_t2 else 1.0)


@torch.library.custom_op("reflux::linear_dense_kl", mutates_args=())
def _op(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float,
    teacher_TV: Tensor,
    weight_T: Tensor,
    rows_M: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    scale_t2: bool,
    vocab_size: int,
    group: str,
    vocab_start: int,
    workspace_mb: float,
    need_dhidden: bool,
    need_dhead: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total [], kl [T], gradients of total in the student's hidden, head and bias or empty."""
    x_TD, V = student_hidden_TD, local_width(len(student_head_VD), vocab_size, vocab_start)
    student = Head(x_TD, student_head_VD, bias_V, logit_scale, softcap).cut(V)
    scale, gradient_scale = student.scales(temperature)
    spec = KLSpec(divergence, beta, (scale, 1 / temperature), softcap, group)
    t2 = loss_factor(temperature, scale_t2)
    factor, need = t2 * gradient_scale, (need_dhidden, need_dhead, need_dbias)
    width = common_width(vocab_size, group)
    plan = head_plan(x_TD, width, BLOCKS, 0, need, workspace_mb, rows_M)
    largest = largest_gradient(divergence) * factor * scale
    grads = HeadGradients.zeros(x_TD, student_head_VD, need, V, plan, largest)
    coeff_T = weight_T * (factor * grads.lift)
    kl_T = x_TD.new_zeros(x_TD.shape[0], dtype=wide(x_TD.dtype))

    # a function, so that its blocks are free before the next chunk's are made
    def step(part: Part) -> None:
        c = part.rows
        z_CV = student.logits(c)
        u_CV = padded_copy(teacher_TV[c, :V], z_CV)
        dz_CV = grads.block(part, z_CV)
        to_CV = padded(dz_CV) if any(need) else None
        kl_T[c] = kl_rows(padded(z_CV), u_CV, coeff_T[c], spec, to_CV)
        grads.add(part, dz_CV, student)

    for part in parts(plan, x_TD, rows_M):
        step(part)
    kl_T.mul_(t2)
    return weighted_total(kl_T, weight_T), kl_T, *grads.finish(student_head_VD, bias_V, group)


_op.register_fake(fake_head_loss)
_op.register_autograd(scale_gradients, setup_context=save_gradients)


def linear_dense_kl(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    teacher_TV: Tensor,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    scale_t2: bool = False,
    vocab_size: int | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    shard: VocabShard | None = None,
    workspace_mb: float = WORKSPACE_MB,
    frozen_student_head: bool = False,
) -> LinearKL:
    """(total [], kl [T]), fp32 (fp64 for fp64), in nats. The teacher gets no gradient.

    total is differentiable in hidden [T, D], head [V, D] and bias [V]. teacher [T, V]: logits or
    log-probabilities, any floating dtype, -inf for a token it bans; with shard this rank's columns.
    The options are those of `linear_kl`. ValueError on shapes, dtypes, or an option that has no
    meaning.
    """
    op, cut = "linear_dense_kl", (vocab_size, shard)
    side = student_hidden_TD, student_head_VD, bias, logit_scale, softcap
    head, V = checked_head(op, *side, *cut)
    _check_teacher(op, teacher_TV, head, local_width(len(head.head_VD), V, slice_of(shard)[1]))
    options = LossOptions(divergence, beta, temperature, weight, rows, scale_t2)
    student = options.read(op, head)
    total, kl_T, *_ = _op(
        *student,
        teacher_TV.detach() if teacher_TV.requires_grad else teacher_TV,
        *options.checked(op, student.hidden_TD),
        V,
        *slice_of(shard),
        workspace_mb,
        *student.needs(frozen_student_head),
    )
    return options.result(total, kl_T, student.hidden_TD)


def _check_teacher(op: str, teacher_TV: Tensor, student: Head, width: int) -> None:
    T, shape = student.hidden_TD.shape[0], teacher_TV.shape
    if not (len(shape) == 2 and teacher_TV.is_floating_point() and shape[0] == T):
        raise ValueError(
            f"{op}: teacher is {teacher_TV.dtype} {list(shape)} for {T} rows; want "
            "floats [T, V], logits or log-probabilities"
        )
    if shape[1] < width:
        raise ValueError(
            f"{op}: the teacher has {shape[1]} columns and the student's head {width} "
            "tokens. If only the head is padded, pass vocab_size; a part of the vocabulary is a "
            "top-k: linear_topk_kl"
        )
    if teacher_TV.device != student.hidden_TD.device:
        raise ValueError(
            f"{op}: teacher is on {teacher_TV.device} and hidden on {student.hidden_TD.device}; "
            "want one device"
        )
