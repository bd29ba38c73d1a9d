"""The native core at its edges: errors, threads, the interpreter's lock."""

import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from span_cases import by_brute_force, ragged_rows, same, side_of

from reflux.tokenalign import _native
from reflux.tokenalign.byte_table import TEXT, ByteTable
from reflux.tokenalign.offsets import Side
from reflux.tokenalign.spans import align_spans, align_spans_ref


def random_batch(rows, tokens, seed=0):
    """Two cuts of equal random bytes into pieces of 1 to 3, over small alphabets."""
    rng = np.random.default_rng(seed)
    alphabet = [bytes(x) for n in (1, 2, 3) for x in np.ndindex(*[4] * n)]
    table, number = (
        ByteTable(tuple(alphabet), np.full(len(alphabet), TEXT, np.int8), "byte_level"),
        {},
    )
    number = {piece: i for i, piece in enumerate(alphabet)}

    def cut(text):
        ends = np.cumsum(rng.integers(1, 4, len(text)))
        ends = [0, *ends[ends < len(text)].tolist(), len(text)]
        return Side(
            table,
            np.array([number[text[a:b]] for a, b in zip(ends, ends[1:], strict=False)], np.int32),
            0,
            True,
        )

    texts = [rng.integers(0, 4, tokens * 2, dtype=np.uint8).tobytes() for _ in range(rows)]
    return [cut(text) for text in texts], [cut(text) for text in texts]


def arrays(pieces=(b"a", b"b"), ids=(0, 1), row=(0, 2), trim=()):
    """One side as the native core takes it."""
    return [
        _native.Table(*blob(pieces)),
        np.array(ids, np.int32),
        np.array(row, np.int64),
        np.array(trim, np.int64),
    ]


def blob(pieces):
    return np.frombuffer(b"".join(pieces), np.uint8), np.cumsum(
        [0, *map(len, pieces)], dtype=np.int64
    )


def test_threads_change_nothing():
    a, b = random_batch(rows=37, tokens=200)
    one, four = align_spans(a, b, threads=1), align_spans(a, b, threads=4)
    assert all(same(x, y) for x, y in zip(one, four, strict=True))
    assert all(x.exact.all() and x.num_spans > 1 for x in one)


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("bad", [3, -2, 2**31 - 1, -(2**31)])
# in a later window of the walk, too
@pytest.mark.parametrize("before", [0, 1, 5000], ids=lambda n: f"behind {n}")
def test_an_id_outside_the_table_is_located(side, bad, before):
    ids = np.zeros((2, before + 1), np.int32)
    row = (0, before + 1, 2 * before + 2)
    fine = arrays(ids=ids.ravel(), row=row)
    ids[1, before] = bad
    broken = arrays(ids=ids.ravel(), row=row)
    with pytest.raises(
        ValueError,
        match=f"side {side}, row 1, position {before}: id {bad} is outside its table of 2 ids",
    ):
        _native.align_ids(*(broken + fine if side == "a" else fine + broken), 1)


def test_ends_that_fall_are_located():
    end, row = np.array([1, 3, 2, -1, 4], np.int64), np.array([0, 1, 5], np.int64)
    with pytest.raises(
        ValueError, match="side b, row 1, position 1: the token ends before the one in front of it"
    ):
        _native.align_ends(np.sort(end), row, end, row, 1)
    with pytest.raises(ValueError, match="side a, row 0, position 0"):
        _native.align_ends(
            np.array([-2], np.int64), np.array([0, 1]), np.array([1]), np.array([0, 1]), 1
        )


@pytest.mark.parametrize(
    "position, dtype", [(1, np.int64), (1, np.float32), (2, np.int32), (3, np.int32)]
)
def test_nothing_is_cast(position, dtype):
    wrong = arrays()
    wrong[position] = wrong[position].astype(dtype)
    with pytest.raises(TypeError):
        _native.align_ids(*wrong, *arrays(), 1)


def test_a_table_is_not_cast_either():
    for wrong in (
        (np.zeros(2, np.int8), np.array([0, 2])),
        (np.zeros(2, np.uint8), np.array([0, 2], np.int32)),
    ):
        with pytest.raises(TypeError):
            _native.Table(*wrong)


def test_a_strided_array_is_not_copied_in_silence():
    wrong = arrays()
    wrong[1] = np.array([0, 9, 1, 9], np.int32)[::2]
    with pytest.raises(TypeError):
        _native.align_ids(*wrong, *arrays(), 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"row": (0, 3)}, "row_a must rise from 0 to 2"),
        ({"row": (1, 2)}, "row_a must rise from 0 to 2"),
        ({"row": (0, 2, 1, 2)}, "row_a must rise"),
        ({"row": ()}, "row_a must rise"),
        ({"row": (0, 1, 2)}, "2 rows against 1"),
        ({"trim": (2,)}, "trim_a must be rising positions within the 2 tokens"),
        ({"trim": (-1,)}, "trim_a must be rising"),
        ({"trim": (1, 0)}, "trim_a must be rising"),
    ],
    ids=str,
)
def test_offsets_that_would_leave_an_array_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        _native.align_ids(*arrays(**change), *arrays(), 1)


@pytest.mark.parametrize("begin", [(), (0,), (1, 2), (0, 2, 1, 2), (0, 3)], ids=str)
def test_a_table_whose_pieces_leave_its_bytes_is_refused(begin):
    with pytest.raises(ValueError, match="begin must rise from 0 to 2"):
        _native.Table(np.zeros(2, np.uint8), np.array(begin, np.int64))


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=8), st.data())
def test_a_table_spells_pieces_of_every_length(pieces, data):
    """Pieces of up to 15 bytes lie in their entry, longer ones elsewhere."""
    ids = data.draw(st.lists(st.integers(-1, len(pieces) - 1), max_size=40))
    table = _native.Table(*blob(pieces))
    assert len(table) == len(pieces)
    assert table.spell(np.array(ids, np.int32)) == b"".join(pieces[i] for i in ids if i >= 0)
    with pytest.raises(
        ValueError,
        match=rf"id {len(pieces)} at position {len(ids)} is outside its table of {len(pieces)} ids",
    ):
        table.spell(np.array([*ids, len(pieces)], np.int32))


@given(st.lists(st.integers(-1, 4), max_size=20))
def test_masking_by_kind(ids):
    keep = np.array([1, 0, 1, 1, 0], np.uint8)
    assert _native.mask(np.array(ids, np.int32), keep).tolist() == [
        i if i >= 0 and keep[i] else -1 for i in ids
    ]
    for bad in (5, -2):
        with pytest.raises(
            ValueError, match=rf"id {bad} at position {len(ids)} is outside its table of 5 ids"
        ):
            _native.mask(np.array([*ids, bad], np.int32), keep)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 17, 40]))
def test_rows_longer_than_a_window_are_cut_like_short_ones(seed, longest):
    """The core walks in windows of 512 tokens or 8 KiB; with masked tokens and a changed byte."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 3, rng.integers(1, 6000) * (longest // 3 + 1), dtype=np.uint8).tobytes()
    sides = []
    for n in (longest, rng.integers(1, 5)):
        ends = np.cumsum(rng.integers(0, n + 1, 4 * len(text) // n + 1))
        cuts = [0, *ends[ends < len(text)].tolist(), len(text)]
        sides.append([text[x:y] for x, y in zip(cuts, cuts[1:], strict=False)])
    got = align_spans([side_of(sides[0])], [side_of(sides[1])])[0]
    assert (got.span_a.tolist(), got.span_b.tolist(), got.num_spans) == align_spans_ref(*sides)
    assert got.equal_bytes == len(text) and got.exact.all()
    at = int(rng.integers(len(text)))
    other = bytearray(text)
    other[at] ^= 1
    ends = np.cumsum([len(p) for p in sides[1]]).tolist()
    changed = align_spans(
        [side_of(sides[0])],
        [side_of([bytes(other[x:y]) for x, y in zip([0, *ends], ends, strict=False)])],
    )[0]
    assert changed.equal_bytes == at and np.array_equal(changed.bounds, got.bounds)
    masked = np.flatnonzero(rng.random(len(sides[0])) < 0.1)
    dressed = Side(
        side_of(sides[0]).table,
        np.insert(np.arange(len(sides[0]), dtype=np.int32), masked, -1),
        0,
        True,
    )
    again = align_spans([dressed], [side_of(sides[1])])[0]
    assert (
        np.array_equal(again.span_a[dressed.ids >= 0], got.span_a)
        and (again.span_a[dressed.ids < 0] == -1).all()
    )
    assert np.array_equal(again.span_b, got.span_b)


@given(ragged_rows(), st.integers(1, 3))
def test_from_ends_it_is_the_same(rows, threads):
    tokens = [[row[i] for row in rows] for i in (0, 1)]
    flat = [
        np.array([e for row in side for e in np.cumsum([len(p) for p in row])], np.int64)
        for side in tokens
    ]
    row = [np.cumsum([0, *map(len, side)], dtype=np.int64) for side in tokens]
    span_a, span_b, bounds, spans, _, end_a, end_b = _native.align_ends(
        flat[0], row[0], flat[1], row[1], threads
    )
    for r, (a, b) in enumerate(rows):
        got = (
            bounds[row[0][r] : row[0][r] + spans[r]].tolist(),
            span_a[row[0][r] : row[0][r + 1]].tolist(),
            span_b[row[1][r] : row[1][r + 1]].tolist(),
        )
        assert got == by_brute_force(a, b)
        assert (end_a[r], end_b[r]) == (len(b"".join(a)), len(b"".join(b)))


def test_a_skipped_space_is_in_no_span_and_not_compared():
    want = align_spans([side_of([b"", b"ab", b"c"])], [side_of([b"a", b"bc"])])[0]
    got = align_spans([side_of([b"", b" ab", b"c"], skip=1)], [side_of([b"a", b"bc"])])[0]
    assert same(got, want) and got.bytes_a == 3


def test_a_skip_can_empty_a_token():
    got = align_spans([side_of([b" ", b"a"], skip=1)], [side_of([b"a"])])[0]
    assert got.span_a.tolist() == [0, 0] and got.exact.all() and got.bytes_a == 1


def test_results_do_not_share_memory_between_rows():
    """A stored row must not keep the memory of its batch, nor change with another."""
    first, second = align_spans(*random_batch(rows=2, tokens=5))
    assert first.span_a.base is None and second.bounds.base is None


def test_batches_of_nothing():
    assert align_spans([], []) == []
    empty = Side(side_of([b"a"]).table, np.empty(0, np.int32), 0, True)
    got = align_spans([empty], [empty])[0]
    assert (got.num_spans, got.span_a.size, got.equal_bytes) == (0, 0, 0)


def test_what_people_get_wrong():
    a, b = side_of([b"a"]), side_of([b"a"])
    with pytest.raises(ValueError, match="1 sides a against 2 sides b"):
        align_spans([a], [b, b])
    with pytest.raises(ValueError, match="row 1 of sides_a has another ByteTable"):
        align_spans([a, b], [b, b])
    with pytest.raises(ValueError, match="threads = -1"):
        align_spans([a], [b], threads=-1)


def test_python_runs_while_the_core_works():
    """This thread runs in the middle of the other's call: the call has released the lock."""
    ids = np.zeros(20_000_000, np.int32)
    one_row = arrays(ids=ids, row=(0, len(ids)))
    call, ticks = [], []

    def work():
        call.append(time.perf_counter())
        _native.align_ids(*one_row, *one_row, 1)
        call.append(time.perf_counter())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
    sys.setswitchinterval(interval)
    start, length = call[0], call[1] - call[0]
    assert any(start + 0.3 * length < t < start + 0.7 * length for t in ticks)
