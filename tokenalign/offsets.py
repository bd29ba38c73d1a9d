"""What a sequence of ids spells, and one side of an alignment: where each token ends in a shared
source text.

The source is the bytes of the side that *produced* the ids (the sampler), never a re-encoding of
its text. The other side encodes the source, and its ids must give the same bytes back. Three things
may stand between ids and source:

    a space that the tokenizer put in front
        dropped, decided by comparison, once per stretch that was encoded on its own
    a normaliser N: the ids spell N(source)
        ends are mapped back (norm_map); nothing is lost
    anything else: an unknown character, collapsed or swallowed whitespace
        ends in equal parts are mapped; tokens that touch a changed part are marked, and their
        spans are never `exact`

n: tokens of a row. V: vocabulary.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np

from . import _native
from .byte_table import CONTROL, TEXT, ByteTable
from .norm_map import Normalize, source_ends

CONTROLS = ("event", "surface", "error")
ANCHOR = 8  # bytes; a shorter match inside a changed part of the text may be chance


@dataclass(frozen=True)
class Spelled:
    """The text of a sequence of ids."""

    bytes: bytes  # what the ids spell, up to the last whole character
    text: str | None  # the same as strict UTF-8; None if it is not: no other model can score it
    cut: bool  # the ids end inside a character (a length stop); its first bytes were left out


@dataclass(frozen=True, eq=False)
class Side:
    """One tokenization of the source text, ready for `align_spans`."""

    table: ByteTable
    ids: np.ndarray  # int32 [n]; -1 where a token is outside every span: masked, control, unknown
    # 1 where the first token with bytes starts with a space that the tokenizer put there, else 0
    skip: int
    # the ids spell the source, or N(source), and at most the start of a cut character after it
    reproduces: bool
    later_skips: tuple[int, ...] = ()  # tokens further on that start with such a space
    surface: bool = False  # control ids spell their names
    # int64 [n], bytes of the source up to each token's end; None: the sums of `lens`
    ends: np.ndarray | None = None
    # bool [n], tokens that touch bytes on which ids and source differ; None: none do
    changed: np.ndarray | None = None
    source: bytes | None = None

    @property
    def lens(self) -> np.ndarray:
        """int32 [n], bytes of each token in the source."""
        if self.ends is not None:
            return np.diff(self.ends, prepend=0).astype(np.int32)
        lens = spelling(self.table, self.surface).lens_of(self.ids)
        lens[self.skips] -= 1
        return lens

    @cached_property
    def skips(self) -> np.ndarray:
        """int64, positions of tokens whose first byte is a space that the tokenizer put there."""
        lens = spelling(self.table, self.surface).lens_of(self.ids)
        first = _first(lens) if self.skip else ()
        return np.array([*first, *self.later_skips], np.int64)


class Spelling:
    """A table in the native core's form, control ids as nothing or as their names."""

    def __init__(self, table: ByteTable, surface: bool):
        pieces = table.packed
        self.spells = (table.kind == TEXT) | (surface & (table.kind == CONTROL))  # bool [V]
        self.lens = np.where(self.spells, pieces.lens, 0).astype(np.int32)
        data = pieces.bytes_array[np.repeat(self.spells, pieces.lens)]
        self.native = _native.Table(
            data, np.concatenate([[0], np.cumsum(self.lens, dtype=np.int64)])
        )

    def lens_of(self, ids: np.ndarray) -> np.ndarray:
        """int32 [n]; 0 for -1 and for ids that spell nothing."""
        if not len(self.lens):
            return np.zeros(len(ids), np.int32)
        return np.where(ids >= 0, self.lens[ids], 0)


_SPELLINGS: "WeakKeyDictionary[ByteTable, dict[bool, Spelling]]" = WeakKeyDictionary()


def spelling(table: ByteTable, surface: bool) -> Spelling:
    """Made once per table."""
    built = _SPELLINGS.setdefault(table, {})
    if surface not in built:
        built[surface] = Spelling(table, surface)
    return built[surface]


def spell(
    table: ByteTable, ids: Sequence[int], *, control: str = "event", drop_space: bool = False
) -> Spelled:
    """Bytes and strict UTF-8 text of `ids`. -1, unknown and unused ids spell nothing.

    control: "event", a control id (stop, template, tool tag) spells nothing; "surface", it spells
    its name, for a reader that sees the name written out; "error", it is refused with a ValueError.
    drop_space: leave out one leading space, where the producer's tokenizer puts one before a reply
    (SentencePiece; a matter of the model's chat recipe) and readers are not to see it.
    ValueError for an id outside the table.
    """
    raw = _read(table, ids, control)[1]
    raw = raw[1:] if drop_space and raw.startswith(b" ") else raw
    whole = _whole_characters(raw)
    try:
        text = raw[:whole].decode()
    except UnicodeDecodeError:
        return Spelled(raw, None, False)
    return Spelled(raw[:whole], text, whole < len(raw))


def side(
    table: ByteTable,
    ids: Sequence[int],
    source: bytes,
    *,
    normalize: Normalize | None = None,
    control: str = "event",
    starts: Sequence[int] = (),
    strict: bool = False,
) -> Side:
    """The ids of one tokenizer as a side of an alignment over `source`.

    ids: [n], -1 for a token to leave out (BOS, padding, template). Control, unknown and unused ids
    are left out too. normalize: the tokenizer's own normaliser (`byte_table.normalizer_of`); None
    takes every text to stay as it is. control: as in `spell`.
    starts: positions where the ids were encoded anew, as a completion is behind its prompt. There,
    at the first token and behind every one left out, the tokenizer may have put a space: it did iff
    the ids spell the source without it. strict: raise ValueError, with the first byte that differs,
    instead of returning a side that does not reproduce the source. Without it, look at
    `.reproduces`, or use only the spans that are `exact`. ValueError for an id outside the table.
    """
    text_ids, raw = _read(table, ids, control)
    surface = control == "surface"
    if raw == source:  # nearly always: nothing else is looked up
        return Side(table, text_ids, 0, True, surface=surface, source=source)
    lens = spelling(table, surface).lens_of(text_ids)
    skips = _find_skips(table, text_ids, lens, raw, source, starts)
    if skips is not None:
        skip, later_skips = _split_skips(skips, lens)
        return Side(table, text_ids, skip, True, later_skips, surface, source=source)
    text, image = _normalized(source, normalize)
    if text is not None:
        skips = _find_skips(table, text_ids, lens, raw, image, starts)
    reproduces = skips is not None
    if strict and not reproduces:
        raise ValueError(_difference(table, raw, image))
    if skips is None:  # the tokenizer put the first space if more of the text agrees without it
        skips = _first(lens) if _agrees_without_space(table, raw, image) else ()
    skip, later_skips = _split_skips(skips, lens)
    spelled = _without(raw, lens, skips)
    lens[list(skips)] -= 1
    ends, changed = np.cumsum(lens, dtype=np.int64), None
    if not reproduces:
        ends, changed = _map_ends(lens, spelled, image)
    if text is not None and normalize is not None:
        inside = source_ends(text, normalize, np.minimum(ends, len(image)))
        ends = np.maximum(ends - len(image), 0) + inside
    return Side(table, text_ids, skip, reproduces, later_skips, surface, ends, changed, source)


def _split_skips(skips: Sequence[int], lens: np.ndarray) -> tuple[int, tuple[int, ...]]:
    """`Side.skip` and `Side.later_skips`."""
    at_start = bool(skips) and skips[0] == _first(lens)[0]
    return int(at_start), tuple(skips[at_start:])


def _normalized(source: bytes, normalize: Normalize | None) -> tuple[str | None, bytes]:
    """(text of the source, bytes of N(text)); (None, source) if there is nothing to normalise."""
    if normalize is None:
        return None, source
    try:
        text = source.decode()
    except UnicodeDecodeError:
        return None, source
    return text, normalize(text).encode()


def _read(table: ByteTable, ids: Sequence[int], control: str) -> tuple[np.ndarray, bytes]:
    """Ids that spell something (else -1), and their bytes together."""
    if control not in CONTROLS:
        raise ValueError(f"control = {control!r}; want one of {', '.join(CONTROLS)}.")
    given = np.asarray(ids).reshape(-1)
    if given.dtype != np.int32:  # checked before it is narrowed
        given = given.astype(np.int64)
    if given.size and not (-1 <= given.min() and given.max() < len(table)):
        table.bytes_of(given.tolist())  # raises, with the position
    if control == "error":
        _refuse_control(table, given)
    how = spelling(table, control == "surface")
    text_ids = _native.mask(np.ascontiguousarray(given, np.int32), how.spells.view(np.uint8))
    return text_ids, how.native.spell(text_ids)


def _refuse_control(table: ByteTable, ids: np.ndarray) -> None:
    positions = np.flatnonzero((ids >= 0) & (table.kind[ids] == CONTROL))
    if positions.size:
        at = positions[0]
        raise ValueError(
            f"id {ids[at]} ({table.pieces[ids[at]]!r}) at position {at} is a control token inside "
            "the content; cut the content at its stop token, or take "
            'control = "event" or "surface".'
        )


def _find_skips(
    table: ByteTable,
    ids: np.ndarray,
    lens: np.ndarray,
    raw: bytes,
    want: bytes,
    starts: Sequence[int],
) -> tuple[int, ...] | None:
    """Tokens whose leading space has to go for the ids to spell `want`, as few as possible.

    None when nothing helps. `raw` may end with the start of a character that was cut.
    """
    if raw == want:
        return ()
    tail = raw[_whole_characters(raw) :]
    wanted = [want, want + tail] if tail else [want]
    if raw in wanted:
        return ()
    if not table.space_prefix:
        return None
    return _skips_of_stretches(table, ids, lens, raw, wanted, starts)


def _skips_of_stretches(
    table: ByteTable,
    ids: np.ndarray,
    lens: np.ndarray,
    raw: bytes,
    wanted: list[bytes],
    starts: Sequence[int],
) -> tuple[int, ...] | None:
    """Every stretch between tokens left out, or behind an added token of text, was encoded by
    itself, maybe with a space in front.
    """
    restarts = np.isin(ids, [row.id for row in table.added if row.restarts])
    heads = np.unique([0, *starts, *(np.flatnonzero((ids < 0) | restarts) + 1), len(ids)])
    byte_at = np.concatenate([[0], np.cumsum(lens, dtype=np.int64)])[heads]
    for want in wanted:
        # bytes of `want` spelled so far -> spaces dropped on the way
        reached: dict[int, tuple[int, ...]] = {0: ()}
        for head, begin, end in zip(
            heads[:-1].tolist(), byte_at[:-1].tolist(), byte_at[1:].tolist()
        ):
            if begin == end:
                continue
            further: dict[int, tuple[int, ...]] = {}
            for at, skips in reached.items():
                if want.startswith(raw[begin:end], at):
                    further.setdefault(at + end - begin, skips)
                if raw[begin : begin + 1] == b" " and want.startswith(raw[begin + 1 : end], at):
                    further.setdefault(
                        at + end - begin - 1, (*skips, head + _first(lens[head:])[0])
                    )
            reached = further
        if len(want) in reached:
            return reached[len(want)]
    return None


def _map_ends(lens: np.ndarray, got: bytes, want: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where the tokens of `got` end in `want`, int64 [n], and which of them touch a byte that is
    not in both, bool [n].

    An end inside a changed part has no counterpart and takes that of the last end before it, as in
    norm_map.source_ends.
    """
    block = np.array(_equal_blocks(got, want) or [(0, 0, 0)], np.int64)
    at, want_at, size = block.T
    end = np.cumsum(lens, dtype=np.int64)
    k = np.maximum(np.searchsorted(at, end) - 1, 0)  # the last block that begins before the end
    following = np.minimum(k + 1, len(at) - 1)
    mapped = np.where(
        end <= at[k] + size[k],
        want_at[k] + end - at[k],
        np.where(at[following] == end, want_at[following], 0),
    )
    mapped[(end < at[0]) | (end == 0)] = 0
    mapped = np.maximum.accumulate(mapped) if len(mapped) else mapped

    def inside(position: np.ndarray, begin: np.ndarray) -> np.ndarray:
        """Bytes of equal blocks before `position`."""
        j = np.maximum(np.searchsorted(begin, position, side="right") - 1, 0)
        return (np.cumsum(size) - size)[j] + np.clip(position - begin[j], 0, size[j])

    changed = np.zeros(len(end), bool)
    for position, begin in ((end, at), (mapped, want_at)):
        start = inside(np.zeros(1, np.int64), begin)
        equal_bytes = np.diff(inside(position, begin), prepend=start)
        changed |= equal_bytes != np.diff(position, prepend=0)
    return mapped, changed


def _equal_blocks(
    got: bytes, want: bytes, at: int = 0, want_at: int = 0
) -> list[tuple[int, int, int]]:
    """Equal parts (position in `got`, position in `want`, bytes) in rising order: the common
    beginning and end, and between them what is anchored.

    An anchor is ANCHOR bytes that occur once on either side: patience diff over byte windows, at
    the cost of a sort.
    """
    head = _agree(got, want)
    got, want = got[head:], want[head:]
    tail = _agree(got[::-1], want[::-1])
    blocks = [(at, want_at, head)] if head else []
    at, want_at, end, want_end = at + head, want_at + head, len(got) - tail, len(want) - tail
    i = j = 0
    anchors = _anchors(got[:end], want[:want_end])
    for next_i, next_j, size in [*anchors, (end, want_end, tail)]:
        if anchors:
            blocks += _equal_blocks(got[i:next_i], want[j:next_j], at + i, want_at + j)
        if size:
            blocks.append((at + next_i, want_at + next_j, size))
        i, j = next_i + size, next_j + size
    return blocks


def _anchors(got: bytes, want: bytes) -> list[tuple[int, int, int]]:
    """Runs of windows that occur once on either side, in the same order, without overlap."""
    if min(len(got), len(want)) < ANCHOR:
        return []
    (keys, at), (other_keys, other_at) = _unique_windows(got), _unique_windows(want)
    _, k, j = np.intersect1d(keys, other_keys, assume_unique=True, return_indices=True)
    if not len(k):
        return []
    order = np.argsort(at[k])
    i, j = at[k][order], other_at[j][order]
    new = np.flatnonzero((np.diff(i, prepend=-2) != 1) | (np.diff(j, prepend=-2) != 1))
    last = np.append(new[1:], len(i)) - 1
    runs = zip(i[new].tolist(), j[new].tolist(), (i[last] - i[new] + ANCHOR).tolist())
    disjoint, free, other_free = [], 0, 0
    for x, y, size in _rising(list(runs)):
        cut = max(free - x, other_free - y, 0)  # windows overlap by up to ANCHOR - 1 bytes
        if cut < size:
            disjoint.append((x + cut, y + cut, size - cut))
            free, other_free = x + size, y + size
    return disjoint


def _unique_windows(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The ANCHOR-byte windows that occur once, as integers in rising order, and their positions."""
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(text, np.uint8), ANCHOR)
    keys, at, count = np.unique(
        np.ascontiguousarray(windows).view(np.uint64)[:, 0], return_index=True, return_counts=True
    )
    return keys[count == 1], at[count == 1]


def _rising(runs: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The chain of most bytes whose second entries rise too (the first ones do)."""
    # last entries of the best chains, rising, and their bytes rise with them
    tops: list[int] = []
    total: list[int] = []
    owner: list[int] = []
    before = []
    for n, (_, y, size) in enumerate(runs):
        at = bisect_left(tops, y)
        before.append(owner[at - 1] if at else -1)
        size += total[at - 1] if at else 0
        stop = bisect_right(total, size, lo=at)  # these end no earlier and are worth no more
        tops[at:stop], total[at:stop], owner[at:stop] = [y], [size], [n]
    chain, n = [], owner[-1] if owner else -1
    while n >= 0:
        chain.append(runs[n])
        n = before[n]
    return chain[::-1]


def _agree(one: bytes, two: bytes) -> int:
    """How many leading bytes are equal."""
    size = min(len(one), len(two))
    if one[:size] == two[:size]:
        return size
    return int(np.argmax(np.frombuffer(one, np.uint8, size) != np.frombuffer(two, np.uint8, size)))


def _agrees_without_space(table: ByteTable, raw: bytes, want: bytes) -> bool:
    return table.space_prefix and raw[:1] == b" " and _agree(raw[1:], want) > _agree(raw, want)


def _first(lens: np.ndarray) -> tuple[int, ...]:
    """The first token with bytes, if there is one."""
    return tuple(np.flatnonzero(lens)[:1].tolist())


def _without(raw: bytes, lens: np.ndarray, skips: Sequence[int]) -> bytes:
    begin = np.cumsum(lens, dtype=np.int64) - lens
    if not len(skips):
        return raw
    return np.delete(np.frombuffer(raw, np.uint8), begin[list(skips)]).tobytes()


def _difference(table: ByteTable, raw: bytes, want: bytes) -> str:
    raw = raw[1:] if _agrees_without_space(table, raw, want) else raw
    at = _agree(raw, want)
    begin = max(at - 16, 0)
    return (
        f"side: the ids spell another text than the source, from byte {at} on: behind "
        f"{want[begin:at]!r} come {raw[at : at + 16]!r} and {want[at : at + 16]!r} (of {len(raw)} "
        f"and {len(want)} bytes). Encode the source itself, give the tokenizer's `normalize`, or "
        "go on without `strict` and use the spans that are exact."
    )


def _whole_characters(raw: bytes) -> int:
    """How many leading bytes are left when a character cut off by the end of `raw` is dropped."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return error.start
    return len(raw)
