"""Prompts from files, folders, procedural generators or a user's function; the batch of a step as a
function of seed and step.

Which columns of a row are the prompt, the answer and the response is told by its shape
(shapes.py). A system message may stand in a column of its own. Every other column goes to
Prompt.extra; those that mostly are part of what is asked are named in a warning (unused.py).
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar, overload

import numpy as np

from reflux.trainer.config.data import SourceSection
from reflux.trainer.config.fit import nearest

from .options import Listing
from .prompt import Prompt
from .row import Row, read_text
from .shapes import SHAPES, Parts, detect_shape, gold_and_solution
from .sources import Lines, Location, Rows, open_source
from .unused import FIRST, warn_of_unused

Item = TypeVar("Item")
ROLES = ("prompt", "messages", "answer", "response")  # what `columns` can name
SYSTEM = ("system", "system_prompt")  # columns that hold the message of the system
ALPACA = ("instruction", "input", "output")


class PromptSequence(Sequence[Prompt]):
    """Prompts that are made on access, by `_at`."""

    @overload
    def __getitem__(self, i: int) -> Prompt: ...

    @overload
    def __getitem__(self, i: slice) -> list[Prompt]: ...

    def __getitem__(self, i: int | slice) -> Prompt | list[Prompt]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"prompt {i} of {len(self)}")
        return self._at(i % len(self))

    @abstractmethod
    def _at(self, i: int) -> Prompt:
        """The i-th prompt, from 0."""


class Prompts(PromptSequence):
    """Rows as prompts, each read on access."""

    def __init__(
        self,
        rows: Rows,
        location: Location,
        shape: str,
        names: Mapping[str, str],
        listing: Listing | None = None,
        system: str = "",
    ):
        """shape: a key of SHAPES. names: of columns, where they are not the shape's own. listing:
        of options under their questions; None: they are not. system: a message for conversations
        that have none of the system.
        """
        self.shape = shape
        self._rows, self._location, self._names = rows, location, names
        self._listing, self._system = listing, system

    def __len__(self) -> int:
        return len(self._rows)

    def _at(self, i: int) -> Prompt:
        prompt = _prompt(i, Row(self._rows[i], self._location(i), self._names), self.shape)
        if self._system and prompt.messages and prompt.messages[0]["role"] != "system":
            system = {"role": "system", "content": self._system}
            prompt = replace(prompt, messages=(system, *prompt.messages))
        return prompt if self._listing is None else self._listing.shown(prompt)

    def location(self, row: int) -> str:
        """Where a row of the source, a Prompt's `index`, comes from."""
        return self._location(row)

    def column(self, role: str) -> str:
        """The source's own name of a column."""
        return self._names.get(role, role)

    def of_row(self, row: int) -> Prompt:
        """The prompt of a row of the source, its `index`."""
        return self[row]

    def batch(self, step: int, count: int, *, seed: int, shuffle: bool = True) -> list[Prompt]:
        """The global batch of a step (from 0); see `epoch_indices`. A prompt that is in it twice is
        numbered, so that its rollouts differ.
        """
        return numbered(
            self[i] for i in epoch_indices(len(self), step, count, seed=seed, shuffle=shuffle)
        )


def numbered(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts of a step, each with how often it came before."""
    seen: Counter[int] = Counter()
    out = []
    for prompt in prompts:
        repeat = seen[prompt.index]
        out.append(replace(prompt, repeat=repeat) if repeat else prompt)
        seen[prompt.index] += 1
    return out


def epoch_indices(
    length: int, step: int, count: int, *, seed: int, shuffle: bool = True
) -> list[int]:
    """Rows of the global batch of a step (from 0): entries step*count ... (step+1)*count - 1 of the
    endless sequence epoch 0, epoch 1, ..., each epoch its own permutation of all `length` rows. A
    pure function of its arguments: nothing to checkpoint, and the same on every rank of any number
    of ranks.
    """
    if step < 0 or count < 1:
        raise ValueError(f"batch: step = {step}, count = {count}; want step >= 0 and count >= 1")
    return epoch_entries(length, range(step * count, (step + 1) * count), seed, shuffle)


def epoch_entries(length: int, entries: range, seed: int, shuffle: bool) -> list[int]:
    """Rows at these places of the endless sequence of epochs."""
    places = (divmod(k, length) for k in entries)
    return [_permutation(length, seed, epoch)[k] if shuffle else k for epoch, k in places]


@lru_cache(maxsize=4)  # a batch can touch two epochs
def _permutation(length: int, seed: int, epoch: int) -> list[int]:
    # RandomState's stream is frozen by numpy's policy (NEP 19). The newer generators may change in
    # a release: a run resumed after an upgrade would repeat some prompts and skip others.
    words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, epoch]
    return np.random.RandomState(words).permutation(length).tolist()


def shard(prompts: Sequence[Item], rank: int, world: int) -> list[Item]:
    """The contiguous part of a global batch that belongs to `rank`. ValueError where the parts
    would not be equal.
    """
    if len(prompts) % world:
        raise ValueError(
            f"{len(prompts)} prompts a step cannot be shared equally by {world} ranks; set prompts "
            f"per step to a multiple of {world}, for instance {-(-len(prompts) // world) * world}"
        )
    each = len(prompts) // world
    return list(prompts[rank * each : (rank + 1) * each])


def load_prompts(
    section: SourceSection | str,
    *,
    limit: int | None = None,
    listing: Listing | None = None,
    check_rows: bool = True,
    named: Collection[str] = (),
) -> Prompts:
    """Opens the source of [data] or [eval]; a text is a source without options.

    The shape `auto` is `plain` where columns names the prompt, `messages` where it names those,
    else what the columns and the first row tell. limit: only the first rows, instead of the
    section's. listing: writes the options of rows under their questions, for the shape `choices`,
    or `always`. In a source with the columns instruction, input and output (Alpaca) whose prompt is
    named `instruction`, an input that is not empty is joined to it. named: columns that options
    name (unused.named_columns); they are not told to be unused.

    JSONL rows are all checked here, unless check_rows says that they will be or were. Tables have a
    schema: their columns are checked here, a row when it is read. Raises ValueError with file, row
    and column, their value, and what is wanted.
    """
    if isinstance(section, str):
        section = SourceSection(section)
    names = dict(section.columns)
    for role in names:
        if role not in ROLES:
            raise ValueError(
                f"columns: unknown role {role!r}{nearest(role, ROLES)} Known: {', '.join(ROLES)}"
            )
    opened = open_source(section, limit or section.limit)
    rows, location = opened.rows, opened.location
    if not len(rows):
        raise ValueError(f"{opened.name}: no rows")
    first = Row(rows[0], location(0)).values
    existing = list(getattr(rows, "column_names", None) or first)
    shape = _shape(section.shape, names, existing, first, opened.name)
    if shape == "plain" and names.get("prompt") == "instruction" and {*ALPACA} <= {*existing}:
        names["input"] = "input"
    listed = listing is not None and (listing.always or shape == "choices")
    listing = listing if listed else None
    prompts = Prompts(rows, location, shape, names, listing, section.system)
    body = names.get("prompt") if shape == "plain" else None
    warn_of_unused(opened.name, list(_first_rows(opened.rows, names, shape)), named, body)
    if isinstance(rows, Lines) and check_rows:
        for _ in prompts:
            pass
    return prompts


# --- rows


def _shape(
    shape: str, names: Mapping[str, str], existing: list[str], first: Mapping, source: str
) -> str:
    """The shape of a source. ValueError for columns that it lacks."""
    named = [role for role in ("prompt", "messages") if role in names]
    if len(named) == 2:
        raise ValueError(
            f"columns: both prompt and messages are named; {source} is read by one of them"
        )
    if shape == "auto" and named:
        shape = {"prompt": "plain", "messages": "messages"}[named[0]]
    if shape == "auto":
        shape = detect_shape(existing, first) or "plain"
    body = SHAPES[shape].needs
    for role in dict.fromkeys([*names, *(group[0] for group in body if len(group) == 1)]):
        column = names.get(role, role)
        if column not in existing:
            raise ValueError(
                f"{source}: no column {column!r}{nearest(column, existing)} There are: "
                f"{', '.join(existing)}. {_separator(existing)}Name it in [data] or "
                f'[eval]: columns = {{{role} = "..."}}, or set shape to one of {", ".join(SHAPES)}'
            )
    return shape


def _separator(existing: list[str]) -> str:
    """What to do with a table whose one column holds several names."""
    found = next((s for s in ";|\t" if len(existing) == 1 and s in existing[0]), None)
    if found is None:
        return ""
    return f"That is one column with {found!r} in it: separate the columns by commas. "


def _first_rows(
    rows: Rows, names: Mapping[str, str], shape: str
) -> Iterator[tuple[Mapping[str, Any], Prompt]]:
    """The first rows, and what is read of them, up to one that is no prompt: it is told later."""
    try:
        for i in range(min(len(rows), FIRST)):
            row = Row(rows[i], "", names)
            yield row.values, _prompt(i, row, shape)
    except ValueError:
        return


def _prompt(index: int, row: Row, shape: str) -> Prompt:
    parts = _with_system(SHAPES[shape].read(row), row)
    used = {row.name(column) for column in parts.used}
    extra = {key: value for key, value in row.values.items() if key not in used}
    if parts.options:
        extra["choices"] = parts.options
    answer, solution = gold_and_solution(parts.answer)
    response = solution if parts.response is None else parts.response
    # an empty text would be trained on as a stop token alone
    if not (response and response.strip()) or (parts.messages and _is_rejected(parts, row)):
        response = None
    return Prompt(index, parts.messages, answer, response, extra)


def _is_rejected(parts: Parts, row: Row) -> bool:
    """A response with the label false, as KTO's rows have it. A number may be another label."""
    own = "label" not in {*parts.used, *row.names.values()}
    return own and str(row.values.get("label")).lower() == "false"


def _with_system(parts: Parts, row: Row) -> Parts:
    """With the message of a column of SYSTEM before a conversation that has none. Two such columns,
    and one with another meaning, stay what they are.
    """
    taken = {*parts.used, *row.names.values()}
    columns = [c for c in SYSTEM if c in row.values and c not in taken]
    if not parts.messages or parts.messages[0]["role"] == "system" or len(columns) != 1:
        return parts
    if not isinstance(row.values[columns[0]], str):
        return parts
    text = read_text(row.values[columns[0]], f"{row.location}, column {columns[0]}")
    system = ({"role": "system", "content": text},) if text and text.strip() else ()
    return replace(parts, messages=(*system, *parts.messages), used=(*parts.used, *columns))
