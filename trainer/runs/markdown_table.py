"""How reports write numbers down: Markdown tables, estimates in words, pages from templates."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .stats import Estimate


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def interval(e: Estimate, form: str = "{:.3f}") -> str:
    """[0.100, 0.150]; empty where there is none."""
    return "" if math.isnan(e.low) else f"[{form.format(e.low)}, {form.format(e.high)}]"


def with_interval(e: Estimate, form: str = "{:.3f}") -> str:
    """0.123 [0.100, 0.150]"""
    return f"{form.format(e.mean)} {interval(e, form)}".rstrip()


def mean_and_std(e: Estimate, seeds: int = 0) -> str:
    """0.123 +- 0.004 of an estimate over seeds; without a std for one, empty for none. Says n where
    it is not `seeds`, the number that the table's note names.
    """
    return _with_std(e, "{:.3f}", 1, seeds)


def points(e: Estimate, seeds: int = 0) -> str:
    """A difference of accuracies in points of 100, like mean_and_std."""
    return _with_std(e, "{:+.1f}", 100, seeds)


def points_with_interval(e: Estimate, seeds: int = 0) -> str:
    """-0.1 [-0.3, +0.1]: a difference of accuracies in points with its interval."""
    scaled = Estimate(100 * e.mean, 100 * e.std, 100 * e.low, 100 * e.high, e.n)
    return "" if not e.n else with_interval(scaled, "{:+.1f}") + other_n(e, seeds)


def _with_std(e: Estimate, form: str, factor: float, seeds: int) -> str:
    if not e.n:
        return ""
    std = f" +- {form.replace('+', '').format(factor * e.std)}" if e.n > 1 else ""
    return form.format(factor * e.mean) + std + other_n(e, seeds)


def other_n(e: Estimate, seeds: int) -> str:
    """(n 2) where an estimate is over another number of seeds than the table's note says."""
    return f" (n {e.n})" if seeds and e.n != seeds else ""


def score(e: Estimate | None) -> str:
    """0.50 [0.42, 0.58]; empty where it could not be measured; says where several runs bound no
    ratio.
    """
    if e is None:
        return ""
    unbounded = " [unbounded]" if e.n > 1 and math.isnan(e.low) else ""
    return with_interval(e, "{:.2f}") + unbounded


def render_template(template: Path, **values: Any) -> str:
    """The text of a jinja2 template. A line that is a tag alone leaves no line behind; a name that
    is missing in `values` is an error.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(values)
