"""P18: hashes of prefixes are equal exactly at the boundaries up to the first differing byte. And
the device path as a whole.
"""

from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from span_cases import PAIRS, cut, encoded, side_of, tokenizations
from tokenizer_fixtures import TEXTS

from reflux.tokenalign.prefix_hash import BASE, P, PieceHashes, exact_spans, prefix_hashes
from reflux.tokenalign.spans import align_batch, align_spans


def by_definition(text):
    return sum((byte + 1) * pow(BASE, i, P) for i, byte in enumerate(text)) % P


def hashed(side, ids=None, mask=None):
    ids = torch.from_numpy(side.ids)[None] if ids is None else ids
    mask = ids >= 0 if mask is None else mask
    return mask, *prefix_hashes(
        PieceHashes.of(side.table), ids, mask, torch.tensor([side.skip]).expand(len(ids))
    )


def exact_of(a, b):
    """The device path over one row: spans, and which of them are exact."""
    (mask_a, len_a, hash_a), (mask_b, len_b, hash_b) = hashed(a), hashed(b)
    span_a, span_b, num = align_batch(len_a, len_b, mask_a, mask_b)
    return span_a[0], span_b[0], int(num), exact_spans(hash_a, span_a, hash_b, span_b)[0]


@given(tokenizations(1))
def test_hashes_are_those_of_the_definition(sides):
    (pieces,) = sides
    _, lens, hashes = hashed(side_of(pieces))
    assert lens[0].tolist() == list(map(len, pieces))
    assert hashes[0].tolist() == [by_definition(prefix) for prefix in accumulate(pieces)]


@given(tokenizations(), st.data())
def test_exact_up_to_the_first_byte_that_differs(sides, data):
    changed = bytearray(b"".join(sides[1]))
    at = data.draw(st.integers(0, len(changed) - 1))
    changed[at] ^= data.draw(st.integers(1, 255))
    ends = list(accumulate(map(len, sides[1])))
    moved = [bytes(changed[e - len(p) : e]) for e, p in zip(ends, sides[1], strict=True)]
    for other in (sides[1], moved):
        want = align_spans([side_of(sides[0])], [side_of(other)])[0]
        span_a, span_b, num, exact = exact_of(side_of(sides[0]), side_of(other))
        assert (span_a.tolist(), span_b.tolist(), num) == (
            want.span_a.tolist(),
            want.span_b.tolist(),
            want.num_spans,
        )
        assert exact[:num].tolist() == want.exact.tolist() and not exact[num:].any()


@given(TEXTS.filter(lambda text: text and "\u2581" not in text), st.sampled_from(PAIRS))
def test_encoded_texts_agree_with_the_native_core(text, pair):
    """Space prefixes too: the trimmed piece has a hash of its own."""
    a, b = (encoded(name, text) for name in pair)
    want = align_spans([a], [b])[0]
    span_a, span_b, num, exact = exact_of(a, b)
    assert (span_a.tolist(), span_b.tolist(), num) == (
        want.span_a.tolist(),
        want.span_b.tolist(),
        want.num_spans,
    )
    assert exact[:num].all()


@given(
    st.lists(
        st.tuples(st.binary(max_size=12), st.binary(max_size=12), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_padding_and_masks_change_nothing(texts, data):
    """Rows of one batch against each row alone: garbage ids under the mask, open tails, rows of no
    text.
    """
    rows = [
        (
            cut(data.draw, one) if one else [],
            cut(data.draw, one if same else two) if one or two else [],
        )
        for one, two, same in texts
    ]
    sides, padded = [], []
    for i in (0, 1):
        vocab = list(dict.fromkeys(p for row in rows for p in row[i])) or [b"x"]
        sides.append(side_of(vocab))
        width = max(len(row[i]) for row in rows) + data.draw(st.integers(0, 2))
        ids, mask = (
            torch.full((len(rows), width), 10**6, dtype=torch.int32),
            torch.zeros(len(rows), width, dtype=torch.bool),
        )
        for r, row in enumerate(rows):
            at = sorted(data.draw(st.permutations(range(width)))[: len(row[i])])
            ids[r, at], mask[r, at] = (
                torch.tensor([vocab.index(p) for p in row[i]], dtype=torch.int32),
                True,
            )
        padded.append(hashed(sides[i], ids, mask))
    (mask_a, len_a, hash_a), (mask_b, len_b, hash_b) = padded
    span_a, span_b, num = align_batch(len_a, len_b, mask_a, mask_b)
    exact = exact_spans(hash_a, span_a, hash_b, span_b)
    for r, (a, b) in enumerate(rows):
        want = align_spans([side_of(a or [b""])], [side_of(b or [b""])])[0]
        assert (
            num[r] == want.num_spans
            and exact[r, : num[r]].tolist() == want.exact.tolist()
            and not exact[r, num[r] :].any()
        )


def test_a_chance_match_behind_a_difference_is_not_exact():
    span = torch.arange(3)[None]
    assert exact_spans(
        torch.tensor([[1, 2, 3]]), span, torch.tensor([[1, 9, 3]]), span
    ).tolist() == [[True, False, False]]


def test_no_step_overflows():
    """Long pieces of the largest byte, far into a row: against exact integers."""
    pieces = [b"\xff" * 4096, b"\xfe" * 3, b"\xff" * 257]
    side = side_of(pieces)
    ids = torch.tensor([[0] * 1100 + [1, 2]])
    _, _, hashes = hashed(side, ids)
    # c + c * BASE + ... of equal bytes is a geometric sum; 4.5 MB, so that all three digits of the
    # position are used
    run = lambda byte, begin, n: (
        (byte + 1) * pow(BASE, begin, P) * (pow(BASE, n, P) - 1) * pow(BASE - 1, -1, P)
    )
    n = 4096 * 1100
    assert hashes[0, -1] == (run(255, 0, n) + run(254, n, 3) + run(255, n + 3, 257)) % P
    assert (hashes >= 0).all() and (hashes < P).all()


def test_every_position_has_its_own_weight():
    """A swap of two bytes is seen, wherever it is; a plain sum would not see it."""
    text = np.random.default_rng(0).permutation(256).astype(np.uint8).tobytes() * 20
    swapped = bytearray(text)
    for at in (0, 2047, 2048, 4095, 5000):
        swapped[:] = text
        swapped[at], swapped[at + 1] = swapped[at + 1], swapped[at]
        *_, exact = exact_of(
            side_of([text[i : i + 1] for i in range(len(text))]),
            side_of([bytes(swapped[i : i + 1]) for i in range(len(text))]),
        )
        assert exact.tolist() == [i < at for i in range(len(text))]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: no host sync on the device path"
)
def test_nothing_waits_for_the_device():
    sides = [encoded(name, "the catalog 12345") for name in PAIRS[0]]
    tables = [PieceHashes.of(side.table, "cuda") for side in sides]
    ids = [torch.from_numpy(side.ids)[None].cuda() for side in sides]
    torch.cuda.set_sync_debug_mode("error")
    try:
        (len_a, hash_a), (len_b, hash_b) = (
            prefix_hashes(t, i, i >= 0) for t, i in zip(tables, ids, strict=True)
        )
        span_a, span_b, _ = align_batch(len_a, len_b, ids[0] >= 0, ids[1] >= 0)
        exact = exact_spans(hash_a, span_a, hash_b, span_b)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert exact.any()
