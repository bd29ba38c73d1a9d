"""How reports write numbers down: Markdown tables, estimates in words, JSON without NaN, files that
appear whole.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def mean_and_spread(e: Mapping[str, float]) -> str:
    """0.123 +- 0.004 of an estimate over seeds; without a spread for one, empty for none."""
    return "" if not e["n"] else f"{e['mean']:.3f}" + (f" +- {e['std']:.3f}" if e["n"] > 1 else "")


def points(e: Mapping[str, float]) -> str:
    """A difference of accuracies in points of 100."""
    return (
        ""
        if not e["n"]
        else f"{100 * e['mean']:+.1f}" + (f" +- {100 * e['std']:.1f}" if e["n"] > 1 else "")
    )


def score(e: Mapping[str, float] | None) -> str:
    """0.50 [0.42, 0.58]; empty where it could not be measured."""
    if e is None:
        return ""
    return f"{e['mean']:.2f}" + (
        "" if math.isnan(e["low"]) else f" [{e['low']:.2f}, {e['high']:.2f}]"
    )


def plain(x: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(x, Mapping):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    x = x.item() if hasattr(x, "item") else x  # numpy's numbers
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write_json(path: Path, found: Any) -> None:
    """`plain` numbers, the file whole."""
    write_whole(path, json.dumps(plain(found), indent=1, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """The file is the old one or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
