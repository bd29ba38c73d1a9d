"""What an evaluation comes to, and its fields of the log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reflux.trainer.runs.stats import Estimate

from .acceptance import RuleVerdict
from .metrics import Difference


@dataclass(frozen=True)
class Evaluation:
    """All numbers of one evaluation, by metric, with their 95 % intervals."""

    estimates: Mapping[str, Estimate]
    differences: Mapping[str, Difference]  # to the run in eval.against; empty without one
    verdicts: tuple[RuleVerdict, ...] = ()  # of the [accept] rules
    harness: Mapping[str, float] = field(default_factory=dict)  # "harness/TASK/METRIC" -> value
    # part of [eval.parts] -> its own numbers by metric
    parts: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    chance: float | None = None  # accuracy of a guess among the options; None: not all have some

    @property
    def accepted(self) -> bool:
        return all(v.holds for v in self.verdicts)


def log_fields(evaluation: Evaluation, metrics: Sequence[str]) -> dict[str, Any]:
    """The event of the log: every mean, the interval of each of `metrics`, chance, differences
    to eval.against, the harness, verdicts in words.
    """
    fields: dict[str, Any] = {}
    for name, e in evaluation.estimates.items():
        fields[f"eval/{name}"] = e.mean
        if name in metrics:
            fields |= {f"eval/{name}_low": e.low, f"eval/{name}_high": e.high}
    if evaluation.chance is not None:
        fields["eval/chance"] = evaluation.chance
    for name, d in evaluation.differences.items():
        for part, value in (("difference", d.difference), ("change", d.change)):
            fields[f"eval/{name}_{part}"] = value.mean
            fields |= {f"eval/{name}_{part}_low": value.low, f"eval/{name}_{part}_high": value.high}
        fields[f"eval/{name}_p"] = d.p
    for part, estimates in evaluation.parts.items():
        for name in metrics:
            e = estimates[name]
            fields[f"eval/{part}/{name}"] = e.mean
            fields |= {f"eval/{part}/{name}_low": e.low, f"eval/{part}/{name}_high": e.high}
    verdicts = {f"accept/{v.name}": v.words for v in evaluation.verdicts}
    return {**fields, **evaluation.harness, **verdicts}
