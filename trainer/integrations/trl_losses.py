"""TRL 1.16.0 with our loss in the place of its own.

    from reflux.trainer.integrations import trl_losses

    trl_losses.use_in_distillation_trainer()   # DistillationTrainer: from hidden states
    trl_losses.use_in_gkd_trainer()            # experimental GKDTrainer: from logits

TRL's own losses project both heads once more in the backward, or hold [tokens, vocabulary] tensors.
beta weighs the teacher on both sides; 0 is forward KL and 1 reverse KL there, so here, too.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from reflux.kernels.linear_kl import linear_kl
from reflux.kernels.token_kl import token_kl

VERSION = "1.16.0"  # whose private names these are


def _divergence(beta: float) -> str:
    return "forward" if beta == 0 else "reverse" if beta == 1 else "jsd"


def divergence_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    temperature: float = 1.0,
    **scales: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean loss [], sum of the student's entropies [], number of tokens []) of hidden [B, T, D],
    as TRL's trainer calls it.
    """
    rows = completion_mask.flatten().nonzero()[:, 0]  # waits for the GPU, as TRL does here
    heads: Any = student_head, teacher_head, student_lm_head_bias, teacher_lm_head_bias
    head, other_head, bias, other_bias = (  # FSDP2: gathered, as TRL does
        t.full_tensor() if hasattr(t, "full_tensor") else t for t in heads
    )
    options = {
        name.replace("final_logit_softcapping", "softcap"): value for name, value in scales.items()
    }
    out = linear_kl(
        student_hidden.flatten(0, 1),
        head.to(student_hidden.dtype),
        teacher_hidden.flatten(0, 1),
        other_head.to(teacher_hidden.dtype),
        rows=rows,
        divergence=_divergence(beta),
        beta=beta,
        temperature=temperature,
        student_bias=bias,
        teacher_bias=other_bias,
        measures=True,
        **options,
    )
    assert out.measures is not None
    count = torch.tensor(len(rows), device=student_hidden.device)
    mean = out.total / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    return mean, out.measures.entropy.sum(), count


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """The loss [] of logits [B, T, V]; tokens with label -100 count nothing. ValueError: another
    reduction than batchmean or sum.
    """
    if reduction not in ("batchmean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; want 'batchmean' or 'sum'")
    V = student_logits.shape[-1]
    weight = None if labels is None else (labels != -100).flatten()
    total = token_kl(
        student_logits.reshape(-1, V),
        teacher_logits.reshape(-1, V),
        divergence=_divergence(beta),
        beta=beta,
        temperature=temperature,
        weight=weight,
    ).total
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    if reduction == "sum":
        return total
    return total / (student_logits.shape[0] if weight is None else weight.sum().clamp(min=1))


def _slot(module: str, name: str, owner: str = "") -> Any:
    """What holds TRL's loss. ValueError: it is not there, as in another version."""
    import trl

    place: Any = importlib.import_module(module)
    place = getattr(place, owner, None) if owner else place
    if not hasattr(place, name):
        raise ValueError(
            f"trl {trl.__version__} has no {module}.{owner or name}; want trl {VERSION}, whose "
            "trainer calls it, or put trl_losses.divergence_loss where yours computes its loss"
        )
    return place


def use_in_distillation_trainer() -> None:
    """For every DistillationTrainer of this process."""
    name = "_chunked_divergence_loss"
    setattr(_slot("trl.trainer.distillation_trainer", name), name, divergence_loss)


def use_in_gkd_trainer() -> None:
    """For every GKDTrainer of this process."""
    module, name = "trl.experimental.gkd.gkd_trainer", "generalized_jsd_loss"
    setattr(_slot(module, name, "GKDTrainer"), name, staticmethod(generalized_jsd_loss))
