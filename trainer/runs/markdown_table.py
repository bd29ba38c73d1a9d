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


def mean_and_std(e: Estimate) -> str:
    """0.123 +- 0.004 of an estimate over seeds; without a std for one, empty for none."""
    return "" if not e.n else f"{e.mean:.3f}" + (f" +- {e.std:.3f}" if e.n > 1 else "")


def points(e: Estimate) -> str:
    """A difference of accuracies in points of 100."""
    return "" if not e.n else f"{100 * e.mean:+.1f}" + (f" +- {100 * e.std:.1f}" if e.n > 1 else "")


def score(e: Estimate | None) -> str:
    """0.50 [0.42, 0.58]; empty where it could not be measured."""
    return "" if e is None else with_interval(e, "{:.2f}")


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
