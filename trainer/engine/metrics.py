"""Sums and counts of whatever a step wants to report, kept apart so that ranks can add them before
the division.
"""

from collections.abc import Iterable


class MetricSums:
    """`add` entries under a name; the mean is taken over all ranks' entries (Engine.mean)."""

    def __init__(self):
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, values: Iterable[float] | float) -> None:
        row = self.sums.setdefault(name, [0.0, 0.0])
        for value in values if isinstance(values, Iterable) else [values]:
            row[0] += float(value)
            row[1] += 1.0
