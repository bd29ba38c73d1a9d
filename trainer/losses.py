"""The losses of both phases: pure functions of tensors that return (sum over tokens, metrics as
sums over tokens).

They call reflux.kernels and know neither ranks nor phases. The division by the global token count
happens once, in Engine.step. Metrics whose name starts with "max/" are maxima, all others are sums
over the same tokens.

Shapes: T tokens, D student hidden, E teacher hidden, V vocabulary, K top-k entries or draws, S
spans.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from reflux.kernels.linear_kl import KLMeasures, linear_kl
from reflux.kernels.linear_logprob import LogProb, linear_logprob
from reflux.kernels.linear_nll import linear_nll
from reflux.kernels.linear_topk_kl import linear_topk_kl
from reflux.kernels.span_sum import span_sum
from reflux.kernels.teacher_sample import teacher_sample
from reflux.kernels.teacher_topk import TopK, teacher_topk
from reflux.tokenalign.span_losses import span_likelihood_kl
from reflux.trainer.config.distillation import DistillSection

MAX_LOG_RATIO = 20.0  # nats; exp(20) = 4.9e8

Loss = tuple[Tensor, dict[str, Tensor]]


class HeadInputs(NamedTuple):
    """What a decoder leaves behind at the T predictor positions; logits are never formed here."""

    hidden_TD: Tensor
    head_VD: Tensor
    softcap: float | None  # logits are softcap * tanh(hidden @ head.T / softcap)
    vocab_size: int  # ids the tokenizer knows; the head may be padded


def token_logprob_of(
    out: HeadInputs, target: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> LogProb:
    """log p of the targets [T] or candidates [T, K], fused with the head."""
    return linear_logprob(
        out.hidden_TD,
        out.head_VD,
        target,
        temperature=temperature,
        entropy=entropy,
        softcap=out.softcap,
        vocab_size=out.vocab_size,
    )


def policy_gradient(logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, clip: float) -> Loss:
    """Equation (5): - sum min(rho A, clip(rho, 1 - clip, 1 + clip) A), rho = exp(logp - old).

    Finite at any log-ratio: beyond MAX_LOG_RATIO it is constant, so that one stale token cannot
    make a step infinite.
    """
    log_ratio_T = logp_T - old_logp_T
    ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped_T = ratio_T.clamp(1 - clip, 1 + clip)
    gain_T = torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    with torch.no_grad():
        metrics = {
            "clipped": (ratio_T != clipped_T).float().sum(),
            "mismatch": log_ratio_T.abs().sum(),
            "ratio": ratio_T.sum(),
            # KL(behaviour || policy) from the behaviour's samples: E[rho - 1 - log rho]
            "approx_kl": (ratio_T - 1 - log_ratio_T).sum(),
        }
        metrics["max/mismatch"] = log_ratio_T.abs().amax() if len(logp_T) else logp_T.new_zeros(())
    return -gain_T.sum(), metrics


def reference_kl(
    logp_T: Tensor, old_logp_T: Tensor, reference_logp_T: Tensor, estimator: str
) -> Loss:
    """KL(policy || reference) from the sampled tokens (estimators of docs/method.md, "Reference").

    k2_loss: half the squared log-ratio; its gradient is the reverse KL's, on-policy.
    k3_is:   pi/pi_old times k3, differentiated through both: the reverse KL, also for slightly
             stale rollouts.
    k3_loss: the common GRPO form; it descends the forward KL.
    """
    log_ratio_T = reference_logp_T.detach() - logp_T
    k3_T = log_ratio_T.exp() - log_ratio_T - 1
    value_T = {
        "k2_loss": lambda: 0.5 * log_ratio_T**2,
        "k3_is": lambda: (logp_T - old_logp_T).exp() * k3_T,
        "k3_loss": lambda: k3_T,
    }[estimator]()
    return value_T.sum(), {"reference_kl": k3_T.detach().sum()}


def exact_reference_kl(out: HeadInputs, reference: HeadInputs, *, temperature: float) -> Loss:
    """KL(policy || reference) over the whole vocabulary at the sampled prefixes."""
    result = linear_kl(
        out.hidden_TD,
        out.head_VD,
        reference.hidden_TD,
        reference.head_VD,
        divergence="reverse",
        temperature=temperature,
        vocab_size=out.vocab_size,
        student_softcap=out.softcap,
        teacher_softcap=reference.softcap,
    )
    return result.total, {"reference_kl": result.kl.detach().sum()}


def distill_kl(
    student: HeadInputs,
    teacher: HeadInputs,
    spec: DistillSection,
    uniform_TK: Tensor | None = None,
) -> Loss:
    """Token KL of GKD (arXiv:2306.13649): full vocabulary, the teacher's top k with its exact tail,
    or draws from it. uniform: of tail = "sampled", fp64 [T, top_k] in [0, 1).
    """
    if spec.tail == "sampled":
        assert uniform_TK is not None
        return topk_kl(student, teacher_draws(teacher, spec, uniform_TK, student.vocab_size), spec)
    if spec.tail != "full":
        return topk_kl(student, teacher_topk_of(teacher, spec, student.vocab_size, student), spec)
    result = linear_kl(
        student.hidden_TD,
        student.head_VD,
        teacher.hidden_TD,
        teacher.head_VD,
        divergence=spec.divergence,
        beta=spec.beta,
        temperature=spec.temperature,
        scale_t2=spec.scale_t2,
        vocab_size=student.vocab_size,
        student_softcap=student.softcap,
        teacher_softcap=teacher.softcap,
        measures=spec.measures,
    )
    return result.total, {"kl": result.kl.sum() / _t2(spec)} | _measured(result.measures)


def _measured(measures: KLMeasures | None) -> dict[str, Tensor]:
    """The student's entropy, and at how many tokens both models' likeliest token is one."""
    if measures is None:
        return {}
    same_T = measures.student_top1 == measures.teacher_top1
    return {"entropy": measures.entropy.sum(), "top1_agreement": same_T.float().sum()}


def _t2(spec: DistillSection) -> float:
    """What scale_t2 multiplies the loss with; the log shows the KL without it."""
    return spec.temperature**2 if spec.scale_t2 else 1.0


def teacher_topk_of(
    teacher: HeadInputs,
    spec: DistillSection,
    vocab_size: int | None = None,
    student: HeadInputs | None = None,
) -> TopK:
    """What an interface with top-k log-probabilities would show: ids, log p, and the exact tail.
    student: who helps to choose the ids, where spec.support asks for it.
    """
    V = teacher.vocab_size if vocab_size is None else vocab_size
    other = student if spec.support != "teacher" else None
    return teacher_topk(
        teacher.hidden_TD,
        teacher.head_VD,
        min(spec.top_k, V),
        support=spec.support if other else "teacher",
        student_hidden=other.hidden_TD.detach() if other else None,
        student_head=other.head_VD.detach() if other else None,
        temperature=spec.temperature,
        vocab_size=V,
        softcap=teacher.softcap,
    )


def teacher_draws(
    teacher: HeadInputs, spec: DistillSection, uniform_TK: Tensor, vocab_size: int
) -> TopK:
    """spec.top_k draws from the teacher at every token; log of their counts over their number."""
    return teacher_sample(
        teacher.hidden_TD,
        teacher.head_VD,
        spec.top_k,
        temperature=spec.temperature,
        uniform=uniform_TK,
        vocab_size=vocab_size,
        softcap=teacher.softcap,
    )


def topk_kl(student: HeadInputs, topk: TopK, spec: DistillSection) -> Loss:
    """Divergence from a teacher of which only the top-k is known, in the student's ids (-1: an id
    that the student lacks).
    """
    result = linear_topk_kl(
        student.hidden_TD,
        student.head_VD,
        topk.ids,
        topk.logp,
        topk.tail,
        divergence=spec.divergence,
        tail=spec.tail,
        allow_drop=spec.tail == "drop",
        beta=spec.beta,
        temperature=spec.temperature,
        scale_t2=spec.scale_t2,
        vocab_size=student.vocab_size,
        softcap=student.softcap,
    )
    return result.total, {"kl": result.kl.sum() / _t2(spec), "teacher_mass": topk.logp.exp().sum()}


def at_positions(out: HeadInputs, aligned_P: Tensor | None) -> HeadInputs:
    """The outputs at some of the T predictors."""
    return out if aligned_P is None else out._replace(hidden_TD=out.hidden_TD[aligned_P])


def span_kl(
    logp_T: Tensor, span_T: Tensor, teacher_span_logp_S: Tensor, *, temperature: float
) -> Loss:
    """Binary KL between the two models' likelihoods of each aligned span (ALM,
    arXiv:2503.20083).
    """
    student_S = span_sum(logp_T, span_T, len(teacher_span_logp_S))
    total = span_likelihood_kl(student_S, teacher_span_logp_S, temperature=temperature)
    gap = (teacher_span_logp_S - student_S.detach()).sum()
    return total, {"span_gap": gap, "aligned": (span_T >= 0).float().sum()}


def nll(out: HeadInputs, target_T: Tensor, weight_T: Tensor) -> tuple[Tensor, Tensor]:
    """- sum of weight * log p(target), fused with the head; and log p [T], detached."""
    result = linear_nll(
        out.hidden_TD,
        out.head_VD,
        target_T,
        weight=weight_T,
        softcap=out.softcap,
        vocab_size=out.vocab_size,
    )
    return result.total, result.logp


def nll_metrics(logp_T: Tensor, off_policy_T: Tensor) -> dict[str, Tensor]:
    """The negative log-likelihood of the off-policy tokens, and how many there are: both are sums,
    and the log's `nll` is per off-policy token (distillation/phase.py).
    """
    return {"nll": -(logp_T.detach() * off_policy_T).sum(), "off_policy": off_policy_T.sum()}
