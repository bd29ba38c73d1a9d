"""How long the prompts of a source are in the tokens of a model: all of them, measured once.

The ranks share the rows; on a rank the tokenizer uses all cores. A measurement is cached in
$REFLUX_CACHE (else the user's cache): it belongs to the sha256 of the data and of all that the
tokenizer is loaded from, its template included. A cache that is torn, or cannot be written, costs
time and no more.

N: rows of the source.
"""

import hashlib
import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from reflux.tokenalign.table_cache import cache_folder
from reflux.trainer.config.data import SourceSection

from .chat import Chat
from .options import Listing
from .prompt import Prompt
from .sources import Location

log = logging.getLogger(__name__)

FORMAT = "reflux prompt lengths 4"  # raise the number whenever this file changes what it gives
CHUNK = 1024  # rows tokenized together
PATIENCE_S = 20.0  # between two lines that say how far it is


class Ranks(Protocol):
    """The part of an Engine that sharing work takes."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    @property
    def is_main(self) -> bool: ...

    def gather(self, rows: list, /) -> list: ...


class Host(Ranks, Protocol):
    """The part of an Engine that this takes."""

    @property
    def seq_len(self) -> int: ...

    @property
    def inputs(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class OneRank:
    """A process of its own."""

    rank: int = 0
    world: int = 1
    is_main: bool = True

    def gather(self, rows: list) -> list:
        return rows


@dataclass(frozen=True, eq=False)
class PromptLengths:
    """Of every row of a source."""

    prompt_N: np.ndarray  # int32, tokens of the rendered prompt
    # int32, tokens of the data's own response and its stop token; 0: the row has none, or they
    # were not asked for
    response_N: np.ndarray
    answered_N: np.ndarray  # bool: the row has an answer


def cache_key(
    data: Mapping[str, Any] | None,
    section: SourceSection,
    chat: Chat,
    *,
    responses: bool = False,
    listing: Listing | None = None,
) -> str | None:
    """data: the source's entry of engine.inputs. listing: of the options in the prompts. None for
    rows that a function makes: they may be others at every start.
    """
    generated = section.name.startswith("reasoning_gym:")
    if data is None or not data["files"] or (":" in section.name and not generated):
        return None
    spec: list[Any] = [FORMAT, responses, section.name if generated else ""]
    spec += [sorted(data["files"].items()), section.split, sorted(section.columns.items())]
    spec += [section.limit, section.shape, section.system, repr(listing), chat.key]
    return hashlib.sha256(json.dumps(spec).encode()).hexdigest()


def measure_prompts(
    prompts: Sequence[Prompt],
    chat: Chat,
    ranks: Ranks,
    key: str | None = None,
    *,
    location: Location,
    responses: bool = False,
) -> PromptLengths:
    """key: of the cache; None: there is none. location: of a row, by its number. responses: measure
    the data's own, too. Collective.

    ValueError, the same on every rank, for a row that is no prompt or that the template refuses.
    """
    # one rank looks, so that all of them either measure or do not
    cached = ranks.gather([load_columns(key, COLUMNS, len(prompts))] if ranks.rank == 0 else [])[0]
    if cached is not None:
        return PromptLengths(*cached)
    parts, error = _measure_part(prompts, chat, ranks, location, responses)
    messages = [m for m in ranks.gather([error]) if m]
    if messages:
        raise ValueError(messages[0])
    chunks = sorted(ranks.gather(parts), key=lambda part: part[0])
    columns = tuple(np.concatenate(column) for column in list(zip(*chunks))[1:])
    if ranks.is_main:
        save_columns(key, dict(zip(COLUMNS, columns)))
    return PromptLengths(*columns)


COLUMNS = ("prompt", "response", "answered")
Part = tuple[int, np.ndarray, np.ndarray, np.ndarray]  # first row, columns of PromptLengths


def _measure_part(
    prompts: Sequence[Prompt], chat: Chat, ranks: Ranks, location: Location, responses: bool
) -> tuple[list[Part], str | None]:
    """This rank's chunks, and what is wrong with a row."""
    parts: list[Part] = []
    starts = range(ranks.rank * CHUNK, len(prompts), ranks.world * CHUNK)
    told = time.monotonic()
    for start in starts:
        try:
            parts.append(_measure_chunk(prompts[start : start + CHUNK], chat, start, responses))
        except _RowError as error:
            return parts, f"{location(error.row)}: {error}"
        except ValueError as error:  # it names the row
            return parts, str(error)
        if ranks.is_main and time.monotonic() - told > PATIENCE_S:
            told = time.monotonic()
            log.warning(
                "lengths of %s of %s prompts are measured", f"{start:,}", f"{len(prompts):,}"
            )
    return parts, None


class _RowError(ValueError):
    def __init__(self, row: int, message: str):
        super().__init__(message)
        self.row = row


def _measure_chunk(chunk: Sequence[Prompt], chat: Chat, start: int, responses: bool) -> Part:
    try:
        lengths = chat.prompt_lengths([p.messages for p in chunk])
    except ValueError:
        for prompt in chunk:  # which one?
            try:
                chat.prompt_ids(prompt.messages)
            except ValueError as error:
                raise _RowError(prompt.index, str(error)) from None
        raise
    own = [
        len(chat.encode(p.response)) + 1 if responses and p.response is not None else 0
        for p in chunk
    ]
    answered = [bool((p.answer or "").strip()) for p in chunk]
    return start, np.array(lengths, np.int32), np.array(own, np.int32), np.array(answered, np.bool_)


# --- on disk: a line with the key, then an .npz


def load_columns(key: str | None, names: Sequence[str], rows: int) -> tuple[np.ndarray, ...] | None:
    """None where there are none of this key that are whole."""
    if key is None:
        return None
    try:
        content = _file(key).read_bytes()
        head, _, body = content.partition(b"\n")
        if head != f"{FORMAT} {key} {hashlib.sha256(body).hexdigest()}".encode():
            return None
        with np.load(io.BytesIO(body), allow_pickle=False) as table:
            columns = tuple(table[name] for name in names)
    except (OSError, ValueError, LookupError):
        return None
    return columns if all(len(c) == rows for c in columns) else None


def save_columns(key: str | None, columns: Mapping[str, np.ndarray]) -> None:
    """Nothing without a key."""
    if key is None:
        return
    body = io.BytesIO()
    np.savez_compressed(body, **dict(columns))  # type: ignore[arg-type]  # numpy: its own options
    head = f"{FORMAT} {key} {hashlib.sha256(body.getvalue()).hexdigest()}\n"
    file = _file(key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with open(handle, "wb") as out:
            out.write(head.encode() + body.getvalue())
        os.replace(name, file)
    except OSError:
        pass  # a full disk or a read-only home costs time, not the run


def _file(key: str) -> Path:
    return cache_folder() / f"{key[:32]}.lengths"
