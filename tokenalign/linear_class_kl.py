"""Class KL of two models given as hidden states and heads, by the fused kernels where they apply.

    total = sum_t D(Q[t], P[t]),  P and Q the class masses of `class_losses.class_kl`

`first_byte`, `common` and `prefix` are `kernels.bucket_kl`: no [T, V] softmax outside the kernels,
and class sums without atomics. A projection, whose W has weights, takes `linear_rows`.

T: tokens, N: classes.
"""

from functools import partial

from torch import Tensor

from reflux.kernels.bucket_kl import bucket_kl
from reflux.kernels.class_logprob import class_logprob
from reflux.kernels.linear_kl import LinearKL

from .class_losses import ClassIndex, PartitionIndex, class_kl
from .linear_rows import HeadLike, linear_rows


def linear_class_kl(
    student: HeadLike,
    teacher: HeadLike,
    partition: PartitionIndex,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> LinearKL:
    """(total [], kl [T]), fp32 (fp64 for fp64), in nats: `class_kl` of both models' logits.

    Row t of both models is one position. total is differentiable in the student's hidden and head.
    A row whose kl is inf or NaN keeps that value and contributes a zero gradient. ValueError on
    shapes and dtypes, and for a divergence that is infinite in every row: reverse, with a class
    that no teacher id is in.
    """
    student_classes = partition.student.kernel_classes
    teacher_classes = partition.teacher.kernel_classes
    if student_classes is None or teacher_classes is None:
        loss = partial(
            class_kl, partition=partition, divergence=divergence, beta=beta, temperature=temperature
        )
        return linear_rows(loss, student, teacher)
    return bucket_kl(
        student.hidden_TD,
        student.head_VD,
        student_classes,
        teacher.hidden_TD,
        teacher.head_VD,
        teacher_classes,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        student_vocab_size=student.vocab_size,
        teacher_vocab_size=teacher.vocab_size,
        student_softcap=student.softcap,
        teacher_softcap=teacher.softcap,
    )


def linear_class_logprob(model: HeadLike, index: ClassIndex, *, temperature: float = 1.0) -> Tensor:
    """log P [T, N] of each class, fp32 (fp64 for fp64): `class_logprob_of_logits` of the model's.

    What a teacher of another tokenizer has to store of a position (`class_losses.ClassLogProb`).
    Differentiable in hidden and head. ValueError: a projection's index, and as `class_logprob`.
    """
    if index.kernel_classes is None:
        raise ValueError(
            "linear_class_logprob: this side of a projection has weights; take "
            "class_logprob_of_logits on its logits."
        )
    return class_logprob(
        model.hidden_TD,
        model.head_VD,
        index.kernel_classes,
        temperature=temperature,
        vocab_size=model.vocab_size,
        softcap=model.softcap,
    )
