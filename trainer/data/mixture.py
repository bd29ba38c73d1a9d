"""Several sources as one: every step draws from each part by its weight.

The parts are concatenated: a prompt's `index` is its row behind the rows of the parts before it, so
that it still identifies the prompt and seeds its rollouts.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from .fitted_prompts import Fit, FittedPrompts
from .prompt import Prompt
from .prompts import PromptSequence, epoch_entries, numbered


class Parts(PromptSequence):
    """The prompts of all parts, each with the name of its part."""

    def __init__(self, parts: Mapping[str, FittedPrompts], rows: Mapping[str, int]):
        """rows: of each part's source, those that were left out too."""
        self._parts, self._names = parts, tuple(parts)
        self._starts = [0, *accumulate(len(part) for part in parts.values())]
        self._first_rows = [0, *accumulate(rows[name] for name in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def _at(self, i: int) -> Prompt:
        k = _part_of(self._starts, i)
        return self._named(k, self._parts[self._names[k]][i - self._starts[k]])

    def of_row(self, row: int) -> Prompt:
        """The prompt of this index."""
        k = _part_of(self._first_rows, row)
        return self._named(k, self._parts[self._names[k]].of_row(row - self._first_rows[k]))

    def location(self, row: int) -> str:
        k = _part_of(self._first_rows, row)
        return self._parts[self._names[k]].location(row - self._first_rows[k])

    def _named(self, k: int, prompt: Prompt) -> Prompt:
        return replace(prompt, index=prompt.index + self._first_rows[k], part=self._names[k])


class Mixture(Parts):
    """The prompts of a training run with [data.parts]."""

    def __init__(self, parts: Mapping[str, FittedPrompts], weights: Mapping[str, float]):
        """Parts without a prompt, of which there may be some but not all, are never drawn."""
        super().__init__(parts, {name: part.fit.rows for name, part in parts.items()})
        self._weights = weights
        left = {name: weights[name] if len(part) else 0.0 for name, part in parts.items()}
        total = sum(left.values())
        self._shares = np.array([left[name] / total for name in parts])
        self._turns = array("H")  # which part the n-th prompt of the run is of
        self._had = np.zeros(len(parts))
        self.fit = _sum_of([part.fit for part in parts.values()])

    def batch(self, step: int, count: int, *, seed: int, shuffle: bool = True) -> list[Prompt]:
        """The global batch of a step (from 0). After any number of prompts a part has had its share
        of them, to about one prompt; each of its epochs is a permutation of its own. A pure
        function of its arguments.
        """
        first, last = step * count, (step + 1) * count
        self._extend(last)
        had = np.bincount(self._turns[:first], minlength=len(self._names))
        now = np.bincount(self._turns[:last], minlength=len(self._names))
        rows = []
        for k, name in enumerate(self._names):
            entries = range(int(had[k]), int(now[k]))
            rows.append(iter(epoch_entries(len(self._parts[name]), entries, seed + k, shuffle)))
        turns = self._turns[first:last]
        return numbered(self._named(k, self._parts[self._names[k]][next(rows[k])]) for k in turns)

    def only(self, rows: Iterable[int]) -> "Mixture":
        """The prompts with these indices, drawn by the weights of their parts."""
        own: dict[str, list[int]] = {name: [] for name in self._names}
        for row in rows:
            k = _part_of(self._first_rows, row)
            own[self._names[k]].append(row - self._first_rows[k])
        parts = {name: self._parts[name].only(mine) for name, mine in own.items()}
        return Mixture(parts, self._weights)

    def _extend(self, count: int) -> None:
        """The turn is always that of the part that lacks most."""
        while len(self._turns) < count:
            due = self._shares * (len(self._turns) + 1) - self._had
            k = int(due.argmax())
            self._turns.append(k)
            self._had[k] += 1


def _part_of(starts: Sequence[int], i: int) -> int:
    """Which part the i-th entry is in; parts without entries have none."""
    return next(k for k in range(len(starts) - 1) if starts[k] <= i < starts[k + 1])


def _sum_of(fits: Sequence[Fit]) -> Fit:
    return Fit(
        rows=sum(f.rows for f in fits),
        too_long=sum(f.too_long for f in fits),
        dropped=sum(f.dropped for f in fits),
        truncated=sum(f.truncated for f in fits),
        longest=max(f.longest for f in fits),
    )
