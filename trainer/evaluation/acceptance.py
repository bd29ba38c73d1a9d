"""Acceptance: does a metric hold its threshold, and by how much? (docs/method.md, "Acceptance")"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reflux.trainer.config.evaluation import AcceptSection
from reflux.trainer.runs.stats import Estimate

from .metrics import Difference, check_same, compare, estimate, metric_values
from .predictions import load_rows

NOT_ACCEPTED = 3  # exit code


@dataclass(frozen=True)
class Verdict:
    """`margin`: how far inside the threshold the value is; negative: how much is missing. `words`
    say all of it.
    """

    name: str
    holds: bool
    value: Estimate
    threshold: float
    margin: float
    words: str


def check_rule(name: str, rule: AcceptSection, expected: Sequence[dict]) -> None:
    """ValueError, before anything is answered, unless the runs that the rule names have answered
    the prompts they will be compared on.
    """
    ours = load_rows(rule.run, f"accept.{name}.run") if rule.run else expected
    mode = "sampled" if rule.metric.startswith("pass@") else rule.metric
    if not any(r["mode"] == mode for r in ours):
        raise ValueError(
            f"accept.{name}: {rule.run} has no {rule.metric} answers; want a run that measured it"
        )
    if rule.against:
        check_same(ours, load_rows(rule.against, f"accept.{name}.against"), rule.against, [mode])


def judge(name: str, rule: AcceptSection, rows: Sequence[dict]) -> Verdict:
    """One rule over this run's rows (or those of `rule.run`)."""
    values = metric_values(
        load_rows(rule.run, f"accept.{name}.run") if rule.run else rows, rule.metric
    )
    if not rule.against:
        return _verdict(name, rule, estimate(values), f"{rule.metric} {_show(estimate(values))}")
    found = compare(
        values, metric_values(load_rows(rule.against, f"accept.{name}.against"), rule.metric)
    )
    drop = rule.threshold == "max_drop"
    return _verdict(
        name,
        rule,
        found.difference if drop else found.change,
        _against(rule, found, "{:+.3f}" if drop else "{:+.0%}"),
    )


def _against(rule: AcceptSection, found: Difference, form: str) -> str:
    moved = found.difference if rule.threshold == "max_drop" else found.change
    return f"{rule.metric} {found.ours.mean:.3f}, in {rule.against} {found.theirs.mean:.3f}: {_show(moved, form)}"


def _verdict(name: str, rule: AcceptSection, value: Estimate, measured: str) -> Verdict:
    """Every threshold is a bound from below or from above on one value."""
    given = getattr(rule, rule.threshold)
    bound, below = (
        (-given if rule.threshold == "max_drop" else given),
        rule.threshold in ("max", "max_change"),
    )
    weak = (value.high if below else value.low) if rule.whole_interval else value.mean
    margin = bound - weak if below else weak - bound
    relative = rule.threshold.endswith("change")
    unsure = relative and rule.excludes_zero and not (value.low > 0 or value.high < 0)
    holds = margin >= 0 and not unsure
    form = "{:+.0%}" if relative else "{:+.3f}" if rule.threshold == "max_drop" else "{:.3f}"
    wanted = f"want {'at most' if below else 'at least'} {form.format(bound)}" + (
        " with the whole interval" if rule.whole_interval else ""
    )
    return Verdict(
        name,
        holds,
        value,
        bound,
        margin,
        f"{'holds' if holds else 'does NOT hold'}: {measured}; {wanted}"
        + _reason(value, margin, unsure, "{:.0%}" if relative else "{:.3f}"),
    )


def _reason(value: Estimate, margin: float, unsure: bool, form: str) -> str:
    if math.isnan(margin):
        return ", but it is no number: nothing to compare with, or one prompt only"
    words = f", {form.format(abs(margin))} {'to spare' if margin >= 0 else 'missing'}"
    return words + (", but the 95 % interval may hold 0" if unsure else "")


def _show(e: Estimate, form: str = "{:.3f}") -> str:
    interval = "" if math.isnan(e.low) else f" [{form.format(e.low)}, {form.format(e.high)}]"
    return f"{form.format(e.mean)}{interval} over {e.n} prompt{'s' if e.n != 1 else ''}"


def as_row(verdict: Verdict) -> dict[str, Any]:
    return {
        "name": verdict.name,
        "holds": verdict.holds,
        "value": verdict.value._asdict(),
        "threshold": verdict.threshold,
        "margin": verdict.margin,
        "words": verdict.words,
    }
