"""What an evaluation measures, and what it takes to accept it: the tables [eval] and [accept.NAME]
of a configuration.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .data import EvalPartSection, SourceSection, check_parts

PASS_AT = re.compile(r"pass@([1-9]\d*)")
LIKELIHOOD = ("likelihood_sum", "likelihood_per_byte")
THRESHOLDS = ("min", "max", "max_drop", "min_change", "max_change")
REFUSAL = (
    r"(?i)^\W*(?:(?:i['’]?m|i am)?\s*(?:very |so |really )?sorry\b|"
    r"i\s+(?:can['’]?t|cannot|can not|won['’]?t|will not)\s|"
    r"i(?:['’]?m|\s+am)\s+(?:not able|unable)\b|as an ai\b)"
)


@dataclass(frozen=True)
class EvalSection(SourceSection):
    """Held-out prompts and what is measured on them; no source: no evaluation."""

    split: str = "test"  # of a Hugging Face data set
    # several sources, each with its own numbers: [eval.parts.NAME] with source and task
    parts: Mapping[str, EvalPartSection] = field(default_factory=dict)
    every: int = 0  # steps; 0: only before the first step and after the last
    samples: int = 1  # sampled answers per prompt, beside the greedy one
    at_start: bool = True  # also before the first step: what the run is compared with
    # k of pass@k: the probability that one of k sampled answers is correct; at most `samples`
    pass_at: tuple[int, ...] = ()
    # likelihood: the option a multiple-choice prompt makes likeliest
    by: Literal["generation", "likelihood", "both"] = "generation"
    # regular expression of a refusal: of texts that are not correct, those are no wrong answers;
    # empty: there is none
    refusal: str = REFUSAL
    # folder of another run: differences to its last predictions of the same prompts and samples
    against: str = ""
    # phase evaluate: tasks of lm-evaluation-harness on the same model folder (extra `harness`)
    harness: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        check_parts(self, self.parts)
        for name in ("every", "samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}; want >= 0")
        twice = len(set(self.pass_at)) < len(self.pass_at)
        if twice or any(not 1 <= k <= self.samples for k in self.pass_at):
            raise ValueError(
                f"pass_at = {list(self.pass_at)} with samples = {self.samples}; want each k once, "
                "from 1 to samples"
            )
        if self.pass_at and not self.generates:
            raise ValueError(
                f"pass_at = {list(self.pass_at)} with by = {self.by!r}: no answer is sampled. Set "
                "by = 'both'"
            )
        try:
            re.compile(self.refusal)
        except re.error as error:
            raise ValueError(f"refusal = {self.refusal!r}: {error}") from error

    @property
    def asks(self) -> bool:
        """Whether there are questions."""
        return bool(self.source or self.parts)

    @property
    def generates(self) -> bool:
        return self.by in ("generation", "both")

    @property
    def scores_options(self) -> bool:
        return self.by in ("likelihood", "both")

    @property
    def metrics(self) -> tuple[str, ...]:
        """What an accept rule can name: everything with one value a prompt."""
        sampled = ("sampled", *(f"pass@{k}" for k in self.pass_at)) if self.samples else ()
        generated = ("greedy", *sampled) if self.generates else ()
        return generated + (LIKELIHOOD if self.scores_options else ())


@dataclass(frozen=True)
class AcceptSection:
    """One threshold on one metric. Differences are paired by prompt; changes are relative to the
    mean of `against`.
    """

    metric: str = "sampled"  # sampled | greedy | pass@K | likelihood_sum | likelihood_per_byte
    part: str = ""  # of [eval.parts]; empty: all questions
    against: str = ""  # folder of the run to compare with; for max_drop, min_change, max_change
    run: str = ""  # folder of the run to judge; empty: this one
    min: float | None = None  # the metric itself, at least
    max: float | None = None  # the metric itself, at most
    # metric >= that of `against` - max_drop; 0.02 is two points of accuracy
    max_drop: float | None = None
    min_change: float | None = None  # 0.15: at least 15 % more than `against`
    max_change: float | None = None  # -0.5: at most half of `against`
    excludes_zero: bool = True  # a change also needs a 95 % interval without 0
    # not only the mean but the whole 95 % interval has to satisfy the threshold
    whole_interval: bool = False

    def __post_init__(self):
        known = self.metric in ("sampled", "greedy", *LIKELIHOOD)
        if not known and not PASS_AT.fullmatch(self.metric):
            raise ValueError(
                f"metric = {self.metric!r}; want sampled, greedy, pass@K, {' or '.join(LIKELIHOOD)}"
            )
        given = [name for name in THRESHOLDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'no threshold'} given; want exactly one of "
                f"{', '.join(THRESHOLDS)}. Several rules are several tables, [accept.one], "
                "[accept.other]"
            )
        if (given[0] in ("min", "max")) == bool(self.against):
            raise ValueError(
                f"{given[0]} with against = {self.against!r}; want a run folder for max_drop, "
                "min_change and max_change, and none for min and max"
            )
        if self.max_drop is not None and self.max_drop < 0:
            raise ValueError(f"max_drop = {self.max_drop}; want >= 0: how far the metric may fall")
        if self.max_change == 0 or self.min_change == 0:
            raise ValueError(f"{given[0]} = 0.0; want another number, or max_drop = 0.0")

    @property
    def threshold(self) -> str:
        """The name of the one that is set."""
        return next(name for name in THRESHOLDS if getattr(self, name) is not None)


def check_options(spec: EvalSection, task: str) -> None:
    """ValueError for an evaluation that this task does not support."""
    if task != "multiple_choice" and (spec.scores_options or spec.list_options):
        listed = "true" if spec.list_options is True else repr(spec.list_options)
        spelled = f"by = {spec.by!r}" if spec.scores_options else f"list_options = {listed}"
        raise ValueError(
            f"eval.{spelled} with task.name = {task!r}: only 'multiple_choice' has options"
        )
    if task == "reward_model" and spec.pass_at:
        raise ValueError(
            f"eval.pass_at = {list(spec.pass_at)} with task.name = 'reward_model', which calls "
            "nothing correct or wrong"
        )
