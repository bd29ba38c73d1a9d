"""The table [distill] of a configuration, and the combinations that it does not accept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .checks import above_zero, fraction, not_negative

# of objective = "class": the settings under which a student that is right stays right, if none of
# its tokens begins with another one. tests/trainer/config/test_distillation.py lists all others
UNBIASED = {"on_policy": 0.0, "divergence": "forward", "inner_weight": 1.0, "temperature": 1.0}
UNBIASED_PARTITIONS = ("prefix", "first_byte")
# off by default, and without effect on the student's own texts; the first three are done to texts
# of a teacher alone, not to those of the data
OF_TEACHER_TEXTS = ("query_budget", "dedup", "rewrite")
OF_OFF_POLICY_TEXTS = (*OF_TEACHER_TEXTS, "correct_only", "nll_weight")


@dataclass(frozen=True)
class DistillSection:
    # byte: teacher and student with different tokenizers, exact; span, class: baselines for it;
    # policy_gradient: the teacher's log-probability of the student's own texts as a reward
    objective: Literal["nll", "kl", "byte", "policy_gradient", "span", "class"] = "kl"
    # KL of which side, or a mixture; forward covers the teacher, reverse is sharp (docs/method.md)
    divergence: Literal["forward", "reverse", "jsd", "skew_forward", "skew_reverse"] = "reverse"
    # weight in the mixture: of the teacher with jsd and skew_forward, of the student with
    # skew_reverse, whose mixture is the other one's with both models exchanged
    beta: float = 0.5
    # what becomes of the teacher's probability outside its top-k. sampled: top_k independent draws
    # in place of the top-k, whose expected gradient is that of the whole forward KL
    # (arXiv:2503.16870)
    tail: Literal["full", "bucket", "renorm", "drop", "zero_outside_topk", "sampled"] = "full"
    top_k: int = 0  # teacher tokens known per position; 0 with tail = full
    # whose likeliest top_k tokens those are: with union both models', each once
    support: Literal["teacher", "student", "union"] = "teacher"
    temperature: float = 1.0  # of both softmaxes; objective = "byte": of both byte distributions
    scale_t2: bool = False  # multiply the loss by temperature squared
    # log the student's entropy and how often its likeliest token is the teacher's, from the logits
    # of the loss; objective = "kl" with tail = "full"
    measures: bool = False
    source: Literal["dataset", "teacher"] = "teacher"  # which of them off-policy texts come from
    on_policy: float = 1.0  # fraction of prompts answered by the student itself (GKD's lambda)
    correct_only: bool = False  # use only off-policy texts that the grader accepts
    nll_weight: float = 0.0  # adds this times the negative log-likelihood of off-policy texts
    # objective = "class": the same for their tokens at positions that are not aligned
    inner_weight: float = 1.0
    # teacher texts sampled before the first step and then reused; 0: new ones every step
    query_budget: int = 0
    span_temperature: float = 100.0  # of the binarised span likelihoods (arXiv:2503.20083)
    # package.module:function(prompt, text) -> text or None, applied to teacher texts: an attacker's
    # filter
    rewrite: str = ""
    dedup: bool = False  # of equal teacher texts of a prompt, only the first
    # folder of a model that writes each text of the query budget anew; texts it does not end are
    # dropped
    paraphraser: str = ""
    paraphrase_template: str = "Say this in other words:\n{text}"  # it reads; {prompt}, {text}
    # fraction of the query budget's texts that are used: those that the student, as it starts,
    # finds likeliest per token
    keep_likeliest: float = 1.0
    # the classes that objective = "class" compares at aligned positions (docs/tokenalign.md,
    # "Losses"); uld has no divergence
    partition: Literal["first_byte", "common", "prefix", "projection", "uld", "hybrid"] = "prefix"
    # objective = "byte": byte positions at which more of either model's distribution could not be
    # summed up are not compared (docs/tokenalign.md, "Exact bytes")
    max_missing: float = 0.01
    # folders beside teacher.path, loaded alike, each with its own template (template_arguments are
    # for all); losses are averaged, and each text is sampled by one teacher, drawn by weight
    more_teachers: tuple[str, ...] = ()
    teacher_weights: tuple[float, ...] = ()  # one per teacher, teacher.path first; empty: equal
    # column of [data] that names the one teacher of a row, in place of weights: its number, or the
    # last part of its folder's path
    route: str = ""
    # column of [data] with a text that the teacher reads and the student does not: a solution, a
    # hint. With teacher.path = model.path: self-distillation (OPSD)
    privileged: str = ""
    # what the teacher reads in place of the last message of the user
    privileged_template: str = (
        "{prompt}\n\nA reference solution, for you alone:\n{privileged}\n\nAnswer the question."
    )
    # run an objective across tokenizers that trains a right student away from the truth, as a
    # baseline (docs/tokenalign.md, "Fixed points")
    allow_biased: bool = False

    def __post_init__(self):
        fraction(self, "on_policy", "max_missing")
        not_negative(self, "query_budget", "top_k", "nll_weight", "inner_weight")
        above_zero(self, "temperature", "span_temperature")
        _check_attacker(self)
        _check_combinations(self)
        _check_texts(self)


def _check_attacker(d: DistillSection) -> None:
    """ValueError for what is done to a query budget that is not there."""
    if not 0 < d.keep_likeliest <= 1:
        raise ValueError(f"keep_likeliest = {d.keep_likeliest}; want 0 < keep_likeliest <= 1")
    changes = d.keep_likeliest < 1 or d.paraphraser
    if changes and not (d.query_budget and d.source == "teacher" and d.on_policy < 1):
        raise ValueError(
            f"keep_likeliest = {d.keep_likeliest}, paraphraser = {d.paraphraser!r} with "
            f"query_budget = {d.query_budget}, source = {d.source!r}, on_policy = {d.on_policy}: "
            "both are done to texts that were bought before the first step. Set query_budget > 0, "
            "source = 'teacher' and on_policy < 1"
        )
    if d.paraphraser and "{text}" not in d.paraphrase_template:
        raise ValueError(
            f"paraphrase_template = {d.paraphrase_template!r} has no {{text}}: the paraphraser "
            "would not see what it has to write anew"
        )


def _check_texts(d: DistillSection) -> None:
    """ValueError for texts that are asked for and never read."""
    if d.on_policy == 1 and d.source == "dataset":
        raise ValueError(
            "source = 'dataset' with on_policy = 1.0, the default: every text is the student's "
            "own, and no response of the data is read. Set on_policy = 0, or a fraction below 1"
        )
    if d.on_policy == 1 and (idle := _that_are_set(d, OF_OFF_POLICY_TEXTS)):
        raise ValueError(
            f"{idle} with on_policy = 1.0, the default: every text is the student's own, and this "
            "is done to texts of a teacher or of the data. Set on_policy below 1, or turn it off"
        )
    if d.source == "dataset" and (idle := _that_are_set(d, OF_TEACHER_TEXTS)):
        raise ValueError(
            f"{idle} with source = 'dataset': no teacher writes a text, and this is done to a "
            "teacher's. Set source = 'teacher', or turn it off (query_budget = 0)"
        )
    if d.objective == "nll" and d.nll_weight:
        raise ValueError(
            f"nll_weight = {d.nll_weight} with objective = 'nll', which is that likelihood. Set "
            "nll_weight = 0.0"
        )


def _that_are_set(d: DistillSection, names: Sequence[str]) -> str:
    """`name = value` of those that are on, as a file writes them."""
    found = {name: getattr(d, name) for name in names if getattr(d, name)}
    return ", ".join(f"{k} = {'true' if v is True else repr(v)}" for k, v in found.items())


def _check_combinations(d: DistillSection) -> None:
    """ValueError for combinations that would train nothing, or the wrong thing (docs/method.md,
    "Refused").
    """
    if d.objective == "nll" and d.on_policy > 0:
        raise ValueError(
            f"objective = 'nll' with on_policy = {d.on_policy}: the likelihood of the student's "
            "own samples has an expected gradient of zero. Set on_policy = 0, or objective = 'kl'"
        )
    if d.objective not in ("kl", "class") and (d.tail != "full" or d.top_k):
        raise ValueError(
            f"tail = {d.tail!r}, top_k = {d.top_k} need objective = 'kl' or 'class', got "
            f"{d.objective!r}"
        )
    if d.objective not in ("kl", "byte", "class") and d.temperature != 1:
        raise ValueError(
            f"temperature = {d.temperature} needs objective = 'kl', 'byte' or 'class'; "
            f"{d.objective!r} has none"
        )
    if d.measures and (d.objective != "kl" or d.tail != "full"):
        raise ValueError(
            f"measures = true with objective = {d.objective!r}, tail = {d.tail!r}; want objective "
            "= 'kl' and tail = 'full', whose loss sees both models' logits"
        )
    if d.objective == "class":
        _check_partition(d)
    if (d.rewrite or d.paraphraser) and d.objective == "span":
        raise ValueError(
            "objective = 'span' uses the log-probabilities that the teacher sampled its texts "
            "with; a rewritten text has none. Use objective = 'nll', 'kl' or 'byte' with rewrite"
            " or paraphraser"
        )
    teachers = 1 + len(d.more_teachers)
    if d.teacher_weights and (len(d.teacher_weights) != teachers or min(d.teacher_weights) <= 0):
        raise ValueError(
            f"teacher_weights = {list(d.teacher_weights)} for {teachers} teachers; want one number "
            "> 0 for each, teacher.path first"
        )
    if d.objective == "policy_gradient" and (d.on_policy < 1 or d.nll_weight):
        raise ValueError(
            f"objective = 'policy_gradient' with on_policy = {d.on_policy}, nll_weight = "
            f"{d.nll_weight}: only the student's own texts have its probabilities. Set on_policy = "
            "1.0 and nll_weight = 0.0, or objective = 'byte'"
        )
    if d.more_teachers and d.objective in ("span", "policy_gradient"):
        raise ValueError(
            f"objective = {d.objective!r} takes one teacher; several can be compared with "
            "objective = 'byte' or 'kl'"
        )
    _check_reading(d)
    _check_top_k(d)
    if d.divergence in ("jsd", "skew_forward", "skew_reverse") and not 0 < d.beta < 1:
        raise ValueError(
            f"beta = {d.beta}; want 0 < beta < 1. The ends are divergence = 'forward' and 'reverse'"
        )
    if not d.allow_biased:
        _refuse_biased(d)


def _check_reading(d: DistillSection) -> None:
    """Which rows a teacher reads, and how."""
    if d.route and (not d.more_teachers or d.teacher_weights):
        raise ValueError(
            f"route = {d.route!r} with more_teachers = {list(d.more_teachers)}, teacher_weights = "
            f"{list(d.teacher_weights)}; want more_teachers to choose from, and no weights"
        )
    if d.route and d.objective not in ("kl", "nll"):
        raise ValueError(
            f"route = {d.route!r} with objective = {d.objective!r}; want 'kl' or 'nll'"
        )
    if d.privileged and d.objective != "kl":
        raise ValueError(
            f"privileged = {d.privileged!r} with objective = {d.objective!r}: a text that only the "
            "teacher reads changes its distributions. Use objective = 'kl'"
        )
    missing = [name for name in ("{prompt}", "{privileged}") if name not in d.privileged_template]
    if d.privileged and missing:
        raise ValueError(f"privileged_template has no {' and no '.join(missing)}; want both")


def _check_top_k(d: DistillSection) -> None:
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
    if d.tail == "zero_outside_topk" and d.divergence == "reverse":
        raise ValueError(
            "tail = 'zero_outside_topk' with divergence = 'reverse' is infinite: the student has "
            "mass where this teacher has none. Use tail = 'bucket'"
        )
    if d.tail == "sampled" and d.divergence != "forward":
        raise ValueError(
            f"tail = 'sampled' with divergence = {d.divergence!r}: only the forward KL is linear "
            "in the teacher, so only its gradient is unbiased. Use divergence = 'forward', or "
            "tail = 'bucket'"
        )
    if d.support != "teacher" and (d.objective != "kl" or d.tail not in ("bucket", "renorm")):
        raise ValueError(
            f"support = {d.support!r} with objective = {d.objective!r}, tail = {d.tail!r}; want "
            "objective = 'kl' and tail = 'bucket' or 'renorm'"
        )


def exact_settings(d: DistillSection) -> Mapping[str, Any]:
    """What objective = "class" has to set otherwise for an unbiased fixed point: name -> value."""
    wanted: dict[str, Any] = {k: want for k, want in UNBIASED.items() if getattr(d, k) != want}
    if d.partition not in UNBIASED_PARTITIONS:
        wanted["partition"] = "prefix"
    if d.top_k:
        wanted |= {"top_k": 0, "tail": "full"}
    return wanted


def _refuse_biased(d: DistillSection) -> None:
    """ValueError for a fixed point that is biased whatever the two tokenizers."""
    if d.objective == "class" and (wanted := exact_settings(d)):
        now = ", ".join(f"{name} = {getattr(d, name)!r}" for name in wanted)
        raise ValueError(
            f"objective = 'class' with {now}: across tokenizers a student that is right is trained "
            "away from the truth, for where a token ends depends on what follows. Write "
            + ", ".join(f"{name} = {want!r}" for name, want in wanted.items())
            + ", or objective = 'byte', which is exact with every setting, or allow_biased = true "
            "for a biased baseline (docs/tokenalign.md, 'Fixed points')"
        )
    if d.objective == "span":
        raise ValueError(
            "objective = 'span': its fixed point is biased across tokenizers, for the likelihood "
            "of a span is also that of its boundaries, which two models put in different places. "
            "Write objective = 'byte', or 'nll' with on_policy = 0.0, which are exact, or "
            "allow_biased = true for a biased baseline (docs/tokenalign.md, 'Fixed points')"
        )


def _check_partition(d: DistillSection) -> None:
    if d.top_k and d.partition not in ("common", "projection", "uld"):
        raise ValueError(
            f"partition = {d.partition!r} with top_k = {d.top_k}: the top-k only bounds these "
            "masses from below. Use top_k = 0, or partition = 'common', a biased baseline"
        )
    if d.top_k and d.tail != "bucket":
        raise ValueError(
            f"tail = {d.tail!r} with objective = 'class': what is not common belongs to the tail "
            "bucket. Use tail = 'bucket'"
        )
