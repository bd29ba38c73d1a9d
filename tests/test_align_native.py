"""The native core at its edges: what it refuses, that threads change nothing, that Python runs meanwhile."""
import sys
import threading
import time

import numpy as np
import pytest
from test_spans import same, side_of

from reflux.tokenalign import _native
from reflux.tokenalign.byte_table import TEXT, ByteTable
from reflux.tokenalign.offsets import Side
from reflux.tokenalign.spans import align_spans


def random_batch(rows, tokens, seed=0):
    """Two cuts of the same random bytes into pieces of 1 to 3, over small alphabets so that tables are small."""
    rng = np.random.default_rng(seed)
    alphabet = [bytes(x) for n in (1, 2, 3) for x in np.ndindex(*[4] * n)]
    table, number = ByteTable(tuple(alphabet), np.full(len(alphabet), TEXT, np.int8), "byte_level"), {}
    number = {piece: i for i, piece in enumerate(alphabet)}

    def cut(text):
        ends = np.cumsum(rng.integers(1, 4, len(text)))
        ends = [0, *ends[ends < len(text)].tolist(), len(text)]
        return Side(table, np.array([number[text[a:b]] for a, b in zip(ends, ends[1:], strict=False)], np.int32), 0, True)

    texts = [rng.integers(0, 4, tokens * 2, dtype=np.uint8).tobytes() for _ in range(rows)]
    return [cut(text) for text in texts], [cut(text) for text in texts]


def arrays(pieces=(b"a", b"b"), ids=(0, 1), row=(0, 2), skip=(0,)):
    data, begin = side_of(pieces).table.blob
    return [data, begin, np.array(ids, np.int32), np.array(row, np.int64), np.array(skip, np.int32)]


def test_threads_change_nothing():
    a, b = random_batch(rows=37, tokens=200)
    one, four = align_spans(a, b, threads=1), align_spans(a, b, threads=4)
    assert all(same(x, y) for x, y in zip(one, four, strict=True))
    assert all(x.exact.all() and x.num_spans > 1 for x in one)


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("bad", [3, -2, 2**31 - 1])
def test_an_id_outside_the_table_is_located(side, bad):
    fine, broken = [(0, 1), (0, 1)], [(0, 1), (0, bad)]
    rows = [arrays(ids=np.ravel(x), row=(0, 2, 4), skip=(0, 0)) for x in ((broken, fine) if side == "a" else (fine, broken))]
    with pytest.raises(ValueError, match=f"side {side}, row 1, position 1: id {bad} is outside its table of 2 ids"):
        _native.align_rows(*rows[0], *rows[1], 1)


@pytest.mark.parametrize("position, dtype", [(0, np.int8), (1, np.int32), (2, np.int64), (2, np.float32), (3, np.int32), (4, np.int64)])
def test_nothing_is_cast(position, dtype):
    wrong = arrays()
    wrong[position] = wrong[position].astype(dtype)
    with pytest.raises(TypeError):
        _native.align_rows(*wrong, *arrays(), 1)


def test_a_strided_array_is_not_copied_in_silence():
    wrong = arrays()
    wrong[2] = np.array([0, 9, 1, 9], np.int32)[::2]
    with pytest.raises(TypeError):
        _native.align_rows(*wrong, *arrays(), 1)


@pytest.mark.parametrize("change, message", [
    ({"row": (0, 3)}, "row_a must rise from 0 to 2"), ({"row": (1, 2)}, "row_a must rise from 0 to 2"),
    ({"row": (0, 2, 1, 2), "skip": (0, 0, 0)}, "row_a must rise"), ({"row": ()}, "row_a must rise"),
    ({"skip": (0, 0)}, "one entry more than skip_a"), ({"skip": (-1,)}, "skip_a is below 0 in row 0"),
    ({"row": (0, 1, 2), "skip": (0, 0)}, "2 rows against 1")], ids=str)
def test_offsets_that_would_leave_an_array_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        _native.align_rows(*arrays(**change), *arrays(), 1)


def test_a_skipped_space_is_in_no_span_and_not_compared():
    want = align_spans([side_of([b"", b"ab", b"c"])], [side_of([b"a", b"bc"])])[0]
    got = align_spans([side_of([b"", b" ab", b"c"], skip=1)], [side_of([b"a", b"bc"])])[0]
    assert same(got, want) and got.bytes_a == 3


def test_a_skip_can_empty_a_token():
    got = align_spans([side_of([b" ", b"a"], skip=1)], [side_of([b"a"])])[0]
    assert got.span_a.tolist() == [0, 0] and got.exact.all() and got.bytes_a == 1


def test_results_do_not_share_memory_between_rows():
    """A row kept for later must not keep the batch alive, nor change with another."""
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
    """Timestamps from this thread fall into the middle of the other thread's call only if it let go of the interpreter's lock."""
    ids = np.zeros(8_000_000, np.int32)
    one_row = arrays(ids=ids, row=(0, len(ids)))
    call, ticks = [], []

    def work():
        call.append(time.perf_counter())
        _native.align_rows(*one_row, *one_row, 1)
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
