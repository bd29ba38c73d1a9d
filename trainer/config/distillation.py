"""The table [distill] of a configuration, and the combinations it refuses."""

from dataclasses import dataclass
from typing import Literal

from .checks import above_zero, fraction, not_negative


@dataclass(frozen=True)
class DistillSection:
    # span, class: teacher and student with different tokenizers
    objective: Literal["nll", "kl", "span", "class"] = "kl"
    divergence: Literal["forward", "reverse", "jsd", "skew_forward", "skew_reverse"] = "reverse"
    beta: float = 0.5  # jsd, skew: weight of the teacher in the mixture
    # what becomes of the teacher outside its top k
    tail: Literal["full", "bucket", "renorm", "drop"] = "full"
    top_k: int = 0  # kept teacher entries per token; 0 with tail = full
    temperature: float = 1.0  # both softmaxes
    scale_t2: bool = False  # multiply the loss by temperature squared
    source: Literal["dataset", "teacher"] = "teacher"  # who wrote the off-policy texts
    on_policy: float = 1.0  # share of prompts answered by the student itself (GKD's lambda)
    correct_only: bool = False  # keep off-policy texts that the task's verifier accepts
    nll_weight: float = 0.0  # adds this times the negative log-likelihood of off-policy texts
    # objective = "class": the same for their tokens at which no distributions can be compared
    inner_weight: float = 1.0
    # texts bought from the teacher before the first step and then reused; 0: fresh ones every step
    query_budget: int = 0
    span_temperature: float = 100.0  # of the binarised span likelihoods (arXiv:2503.20083)
    # package.module:function(prompt, text) -> text or None, over what teachers write: an attacker's
    # clean-up
    rewrite: str = ""
    dedup: bool = False  # of a prompt's teacher texts only those that differ
    # what objective = "class" compares where both have read the same bytes (docs/tokenalign.md,
    # "Losses"); uld has no divergence
    partition: Literal["first_byte", "common", "prefix", "projection", "uld", "hybrid"] = "prefix"
    # folders beside teacher.path, with its dtype; losses are averaged, texts are drawn
    more_teachers: tuple[str, ...] = ()
    teacher_weights: tuple[float, ...] = ()  # one per teacher, teacher.path first; empty: equal

    def __post_init__(self):
        fraction(self, "on_policy")
        not_negative(self, "query_budget", "top_k", "nll_weight", "inner_weight")
        above_zero(self, "temperature", "span_temperature")
        _refuse_meaningless(self)


def _refuse_meaningless(d: DistillSection) -> None:
    """Combinations that run and teach nothing, or the wrong thing (docs/method.md, section
    "Refused").
    """
    if d.objective == "nll" and d.on_policy > 0:
        raise ValueError(
            f"objective = 'nll' with on_policy = {d.on_policy}: the likelihood of the student's "
            "own samples teaches it nothing new. Set on_policy = 0, or objective = 'kl'"
        )
    if d.objective not in ("kl", "class") and (d.tail != "full" or d.top_k):
        raise ValueError(
            f"tail = {d.tail!r}, top_k = {d.top_k} need objective = 'kl' or 'class', got "
            f"{d.objective!r}"
        )
    if d.objective not in ("kl", "class") and d.temperature != 1:
        raise ValueError(
            f"temperature = {d.temperature} needs objective = 'kl' or 'class'; {d.objective!r} has "
            "none"
        )
    if d.objective == "class":
        _refuse_meaningless_partition(d)
    if d.rewrite and d.objective == "span":
        raise ValueError(
            "objective = 'span' reads the teacher's own log-probabilities of its texts; a "
            "rewritten text has none. Use objective = 'nll', 'kl' or 'class' with rewrite"
        )
    teachers = 1 + len(d.more_teachers)
    if d.teacher_weights and (len(d.teacher_weights) != teachers or min(d.teacher_weights) <= 0):
        raise ValueError(
            f"teacher_weights = {list(d.teacher_weights)} for {teachers} teachers; want one number "
            "> 0 for each, teacher.path first"
        )
    if d.more_teachers and d.objective == "span":
        raise ValueError(
            "objective = 'span' takes one teacher; several can be compared with objective = "
            "'class' or 'kl'"
        )
    if (d.tail == "full") != (d.top_k == 0):
        raise ValueError(
            f"tail = {d.tail!r} with top_k = {d.top_k}: a truncated teacher needs both, e.g. "
            "tail = 'bucket' and top_k = 64; the whole vocabulary neither"
        )
    if d.tail == "renorm" and d.top_k == 1:
        raise ValueError("tail = 'renorm' with top_k = 1 is identically 0. Use tail = 'bucket'")
    if d.tail == "drop" and d.divergence != "forward":
        raise ValueError(
            f"tail = 'drop' with divergence = {d.divergence!r} can be lowered by moving mass out "
            "of the top k. Use tail = 'bucket'"
        )
    if d.divergence in ("jsd", "skew_forward", "skew_reverse") and not 0 < d.beta < 1:
        raise ValueError(
            f"beta = {d.beta}; want 0 < beta < 1. The ends are divergence = 'forward' and 'reverse'"
        )


def _refuse_meaningless_partition(d: DistillSection) -> None:
    if d.top_k and d.partition not in ("common", "projection", "uld"):
        raise ValueError(
            f"partition = {d.partition!r} with top_k = {d.top_k}: the top-k only bounds these masses "
            "from below. Use partition = 'common', or top_k = 0"
        )
    if d.top_k and d.tail != "bucket":
        raise ValueError(
            f"tail = {d.tail!r} with objective = 'class': what is not common belongs to the rest, "
            "which only tail = 'bucket' keeps"
        )
