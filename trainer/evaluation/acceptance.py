"""Acceptance: whether a metric is within its threshold, and by how much (docs/method.md,
"Acceptance").
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from reflux.trainer.config.evaluation import AcceptSection
from reflux.trainer.config.sections import TaskSection
from reflux.trainer.data.failed_grades import check_parts
from reflux.trainer.runs.stats import Estimate, mean_over_prompts

from .metrics import Difference, check_same, compare, metric_values, of_mode, of_part
from .predictions import Prediction, Question, failed_grades, load_predictions
from .settings import Settings, check_settings, load_settings

NOT_ACCEPTED = 3  # exit code

Tasks = Mapping[str, TaskSection]  # of the parts (config/parts.py)
Outcome = Literal["succeeded", "failed", "inconclusive"]


@dataclass(frozen=True)
class RuleVerdict:
    """On one rule. Only `succeeded` is accepted; `inconclusive`: another part of the interval would
    say otherwise, or there is no number.
    """

    name: str
    outcome: Outcome
    value: Estimate
    threshold: float
    margin: float  # how far within the threshold the value is; negative: how much is missing
    words: str  # all of it

    @property
    def holds(self) -> bool:
        return self.outcome == "succeeded"


def check_rule(
    name: str,
    rule: AcceptSection,
    expected: Sequence[Question] | None,
    tasks: Tasks,
    settings: Settings | None = None,
) -> None:
    """ValueError, before anything is answered, unless the runs that the rule names have answered
    the questions they will be compared on, asked for alike, as often as the metric wants, with no
    more failed grades than task.max_failed. expected, tasks, settings: of this run; expected =
    None: not known yet, so what the runs say by themselves.
    """
    answers = load_graded(rule.run, f"accept.{name}.run", tasks) if rule.run else None
    ours: Sequence[Question] | None = expected if answers is None else answers
    mode = _mode(rule.metric)
    if ours is not None:
        ours = of_part(ours, rule.part)
        if not ours:
            raise ValueError(
                f"accept.{name}.part = {rule.part!r}: no question is of it; want a name in "
                "[eval.parts]"
            )
    if answers is not None:
        check_metric(f"accept.{name}.run", rule.run, of_part(answers, rule.part), rule.metric)
    if rule.against:
        theirs = of_part(load_graded(rule.against, f"accept.{name}.against", tasks), rule.part)
        if ours is not None:
            check_same(ours, theirs, rule.against, [mode])
            asked = load_settings(rule.run) if rule.run else settings or {}
            check_settings(asked, load_settings(rule.against), rule.against, [mode], rule.part)
        check_metric(f"accept.{name}.against", rule.against, theirs, rule.metric)


def check_metric(option: str, folder: str, answers: Sequence[Prediction], metric: str) -> None:
    """ValueError unless the metric can be computed of the answers, which are those of a folder."""
    if not of_mode(answers, _mode(metric)):
        text = f"{option} = {folder!r}: has no {metric} answers; want a run that measured it"
        raise ValueError(text)
    try:
        metric_values(answers, metric)
    except ValueError as error:
        raise ValueError(f"{option} = {folder!r}: {error}; name another run or metric") from None


def _mode(metric: str) -> str:
    return "sampled" if metric.startswith("pass@") else metric


def load_graded(folder: str, option: str, tasks: Tasks) -> list[Prediction]:
    """load_predictions; ValueError where more grades failed than task.max_failed allows."""
    predictions = load_predictions(folder, option)
    try:
        check_parts(failed_grades(predictions), tasks)
    except ValueError as error:
        raise ValueError(f"{option} = {folder!r}: there, {error}. Evaluate it again") from None
    return predictions


def judge(name: str, rule: AcceptSection, predictions: Sequence[Prediction]) -> RuleVerdict:
    """One rule over this run's predictions (or those of `rule.run`)."""
    ours = load_predictions(rule.run, f"accept.{name}.run") if rule.run else predictions
    values = metric_values(of_part(ours, rule.part), rule.metric)
    if not rule.against:
        value = mean_over_prompts(values)
        return _verdict(name, rule, value, f"{rule.metric} {_show(value)}")
    theirs = of_part(load_predictions(rule.against, f"accept.{name}.against"), rule.part)
    difference = compare(values, metric_values(theirs, rule.metric))
    moved = difference.difference if rule.threshold == "max_drop" else difference.change
    return _verdict(name, rule, moved, _against(rule, difference, moved))


def _against(rule: AcceptSection, d: Difference, moved: Estimate) -> str:
    return (
        f"{rule.metric} {d.ours.mean:.3f}, in {rule.against} {d.theirs.mean:.3f}: "
        f"{_show(moved, _form(rule))}"
    )


def _verdict(name: str, rule: AcceptSection, value: Estimate, measured: str) -> RuleVerdict:
    """Every threshold is a bound from below or from above on one value."""
    given = getattr(rule, rule.threshold)
    bound = -given if rule.threshold == "max_drop" else given
    below = rule.threshold in ("max", "max_change")
    low, high = (value.low, value.high) if rule.whole_interval else (value.mean, value.mean)
    worst, best = (bound - high, bound - low) if below else (low - bound, high - bound)
    relative = rule.threshold.endswith("change")
    zero_inside = relative and rule.excludes_zero and not (value.low > 0 or value.high < 0)
    outcome = _outcome(worst, best, zero_inside)
    side = "at most" if below else "at least"
    whole = " with the whole interval" if rule.whole_interval else ""
    reason = _reason(worst, zero_inside, "{:.0%}" if relative else "{:.3f}")
    words = f"{outcome}: {measured}; want {side} {_form(rule).format(bound)}{whole}{reason}"
    return RuleVerdict(name, outcome, value, bound, worst, words)


def _outcome(worst: float, best: float, zero_inside: bool) -> Outcome:
    """worst, best: margins at the two ends of what decides, the whole interval or the mean."""
    if math.isnan(worst):
        return "inconclusive"
    if worst >= 0:
        return "inconclusive" if zero_inside else "succeeded"
    return "inconclusive" if best >= 0 else "failed"


def _reason(margin: float, zero_inside: bool, form: str) -> str:
    if math.isnan(margin):
        return ", but it is not a number: nothing to compare with, or a single prompt"
    words = f", {form.format(abs(margin))} {'to spare' if margin >= 0 else 'missing'}"
    return words + (", but the 95 % interval may hold 0" if zero_inside else "")


def _form(rule: AcceptSection) -> str:
    """How a value of the rule is written."""
    if rule.threshold.endswith("change"):
        return "{:+.0%}"
    return "{:+.3f}" if rule.threshold == "max_drop" else "{:.3f}"


def _show(e: Estimate, form: str = "{:.3f}") -> str:
    interval = "" if math.isnan(e.low) else f" [{form.format(e.low)}, {form.format(e.high)}]"
    return f"{form.format(e.mean)}{interval} over {e.n} prompt{'s' if e.n != 1 else ''}"
