"""What a diagnosis consists of: the frozen dataclasses behind diagnosis.json."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

from reflux.trainer.data.failed_grades import FailedGrades
from reflux.trainer.runs.stats import Estimate

from .gradient_snr import GradientNoise
from .measure import SampledBy
from .metrics import Divergence
from .symptoms import Symptoms
from .training_stability import TrainingStability

T = TypeVar("T")


@dataclass(frozen=True)
class BothModels(Generic[T]):
    student: T
    teacher: T


@dataclass(frozen=True)
class TextCount:
    texts: int
    prompts: int
    tokens: int


@dataclass(frozen=True)
class CrossTokenizer:
    """How much of the texts and of the next-byte distributions two tokenizers let us compare."""

    unaligned: int  # texts
    unaligned_by: dict[SampledBy, int]
    byte_positions: int  # of the other texts
    compared: float  # fraction of them
    missing: BothModels[float]  # mean share of a distribution that could not be summed up
    bits_per_byte_gap: dict[SampledBy, Estimate]  # student - teacher
    bytes_per_token: BothModels[float]


@dataclass(frozen=True)
class MeanKL:
    """Nats."""

    per_token: Estimate
    per_byte: Estimate
    per_text: Estimate


@dataclass(frozen=True)
class SequenceKL:
    """Two estimators of the KL between whole texts, nats: log-ratio of the sampled tokens, and
    exact KLs at every position along the texts. None: of two tokenizers too many were left out.
    """

    sampled_tokens: Estimate
    exact_tokens: Estimate | None = None


@dataclass(frozen=True)
class TypeKL:
    """A token type's fraction of the KL, of its first ten classes, and of the tokens."""

    fraction: float
    fraction_at_10: float
    frequency: float


@dataclass(frozen=True)
class BandKL:
    """The same of a frequency band; lift = fraction / frequency."""

    fraction: float
    fraction_at_10: float
    frequency: float
    lift: float
    lift_at_10: float


@dataclass(frozen=True)
class Tail:
    """Tail noise of one divergence. Lists are over `k`, means over tokens."""

    k: list[int]
    bucket: list[float]
    raw: list[float]
    gradient_tail: list[float]
    top_k: int  # the smallest k that holds kl_fraction of the KL
    kl_fraction: float
    gradient_outside: float  # of top_k
    tail_noise_index: Estimate
    sparsity: float
    types: dict[str, TypeKL]
    bands: dict[str, BandKL]  # empty: not measured


@dataclass(frozen=True)
class LogRatio:
    """|log p_student - log p_teacher| of the teacher's tokens, nats: what importance weights are
    made of.
    """

    mean: Estimate
    p99: float
    max: float


@dataclass(frozen=True)
class OffPolicy:
    """Off-policy instability. None: there are no texts of the source it needs."""

    decile: dict[Divergence, dict[SampledBy, list[float]]]  # KL by tenths of the text's bytes
    # ESS / n of w = p_student(y) / p_teacher(y), of whole teacher texts and of their first tokens
    effective_samples: dict[str, Estimate] | None = None
    log_ratio: LogRatio | None = None
    # KL per token on student prefixes / on teacher prefixes
    prefix_ratio: dict[Divergence, Estimate] | None = None
    drift: dict[Divergence, BothModels[float]] | None = None  # change along each source's texts
    gradient: GradientNoise | None = None


@dataclass(frozen=True)
class SolvedByTeacher:
    """The student on prompts that the teacher solved at least once."""

    n: int  # texts of a prompt
    pass_at_n: Estimate
    accuracy: Estimate


@dataclass(frozen=True)
class WrongTrace:
    """wrong_trace_preference over prompts."""

    pair: Estimate
    margin: Estimate
    pull: Estimate
    matched_pair: Estimate
    usable_prompts: int
    graded_texts: int
    length_gap: float


@dataclass(frozen=True)
class TeacherStudentGap:
    """Teacher-student gap. None: no task, or no texts of the kind."""

    overlap: Estimate  # of the top-K sets
    teachable: Estimate  # teacher mass in the student's top K
    entropy_gap: Estimate  # H(teacher) - H(student), nats
    correct_teacher_bits_per_byte: BothModels[Estimate] | None = None
    on_solved_by_teacher: SolvedByTeacher | None = None
    wrong_trace: WrongTrace | None = None
    degraded_prefix: float | None = None  # reverse KL on wrong / on correct student texts


@dataclass(frozen=True)
class TrapVerdict:
    """One trap: its number with an interval, the value of a healthy pair, what to do."""

    trap: str
    measure: str
    mean: float
    std: float
    low: float
    high: float
    n: int
    reference: float
    present: bool | None  # None: inconclusive, there is no interval
    advice: str
    missing: str | None = None  # why it was not measured; the numbers are NaN then


@dataclass(frozen=True)
class Diagnosis:
    """Everything in diagnosis.json. `runs`: of finished distillations, if any are named."""

    texts: dict[SampledBy, TextCount]
    cross_tokenizer: CrossTokenizer | None
    grid: dict[Divergence, dict[SampledBy, MeanKL]]
    sequence: dict[Divergence, SequenceKL]
    tail: dict[Divergence, Tail]
    off_policy: OffPolicy
    gap: TeacherStudentGap
    symptoms: Symptoms
    runs: TrainingStability | None = None
    failed_grades: FailedGrades | None = None  # left out of everything; None: there are none
    verdict: tuple[TrapVerdict, ...] = ()


def measured(x: Any) -> Any:
    """Dataclasses as tables, for JSON. A field that is None by default was not measured and is
    left out.
    """
    if is_dataclass(x) and not isinstance(x, type):
        values = [(f, getattr(x, f.name)) for f in fields(x)]
        return {f.name: measured(v) for f, v in values if v is not None or f.default is MISSING}
    if isinstance(x, Mapping):
        return {key: measured(value) for key, value in x.items()}
    if isinstance(x, list | tuple) and not hasattr(x, "_fields"):
        return [measured(value) for value in x]
    return x
