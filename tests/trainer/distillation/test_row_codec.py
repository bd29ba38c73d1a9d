"""Rows as bytes: what goes in comes out, within the error that the module states."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.data.batch import TopKRows
from reflux.trainer.distillation.row_codec import (
    Layout,
    decode_rows,
    encode_rows,
    largest_error,
    pack_bits,
    unpack_bits,
)

SEEDS = st.integers(0, 2**32 - 1)


def drawn_rows(n: int, V: int, k: int, seed: int, scale: float = 4.0) -> TopKRows:
    """The exact top k and tail of n random distributions, fp32."""
    logits_nV = np.random.default_rng(seed).normal(0, scale, (n, V))
    logp_nV = logits_nV - np.logaddexp.reduce(logits_nV, 1, keepdims=True)
    order_nV = np.argsort(-logp_nV, 1)
    sorted_nV = np.take_along_axis(logp_nV, order_nV, 1)
    rest_nV = np.concatenate([sorted_nV[:, k:], np.full((n, 1), -np.inf)], 1)
    tail_n = np.logaddexp.reduce(rest_nV, 1)
    return TopKRows(order_nV[:, :k], sorted_nV[:, :k].astype("f4"), tail_n.astype("f4"))


def allowed(rows: TopKRows, kind: str) -> np.ndarray:
    """The error that the module states for each entry, and what fp32 adds."""
    first_n1, last_n1 = rows.logp[:, :1], rows.logp.min(1, keepdims=True)
    bound = {
        "float32": np.zeros_like(rows.logp),
        "float16": 2.0**-11 * np.abs(rows.logp) + 3e-8,
        "uint8": (first_n1 - last_n1) / 508 + 2.0**-10 * np.abs(last_n1) + 0 * rows.logp,
    }[kind]
    return 2 * bound.max(1, keepdims=True) + 2e-6


@given(bits=st.integers(1, 20), count=st.integers(0, 40), seed=SEEDS)
def test_packed_integers_come_back_in_as_few_bytes_as_they_need(bits, count, seed):
    values = np.random.default_rng(seed).integers(0, 2**bits, count)
    packed = pack_bits(values, bits)
    assert len(packed) == -(-count * bits // 8)
    assert unpack_bits(packed, bits, count).tolist() == values.tolist()


@given(
    n=st.integers(0, 7),
    V=st.integers(1, 300),
    k=st.integers(1, 17),
    kind=st.sampled_from(["float32", "float16", "uint8"]),
    scale=st.sampled_from([0.1, 4.0, 60.0]),
    seed=SEEDS,
)
def test_a_row_comes_back_within_the_stated_error(n, V, k, kind, scale, seed):
    k = min(k, V)
    rows = drawn_rows(n, V, k, seed, scale)
    layout = Layout(V, k, "bucket", kind)
    got = decode_rows(encode_rows(rows, layout), n, layout)
    assert (got.ids == rows.ids).all()
    error = np.abs(got.logp.astype(np.float64) - rows.logp)
    assert (error <= allowed(rows, kind)).all(), (error.max(), kind)
    assert largest_error([rows], [got]) == pytest.approx(error.max(initial=0.0), rel=1e-6)
    if n:  # still a distribution
        total = np.exp(got.logp.astype(np.float64)).sum(1) + np.exp(got.tail.astype(np.float64))
        np.testing.assert_allclose(total, 1, atol=3e-6)


@given(n=st.integers(0, 6), V=st.integers(1, 70), draws=st.integers(1, 40), seed=SEEDS)
def test_counts_come_back_exactly(n, V, draws, seed):
    rng = np.random.default_rng(seed)
    ids, logp = np.full((n, draws), -1), np.full((n, draws), -np.inf, np.float32)
    for t in range(n):
        drawn, count = np.unique(rng.integers(0, V, draws), return_counts=True)
        order = np.argsort(-count, kind="stable")
        ids[t, : len(drawn)], logp[t, : len(drawn)] = drawn[order], np.log(count[order] / draws)
    rows = TopKRows(ids, logp, np.full(n, -np.inf, np.float32))
    layout = Layout(V, draws, "sampled", "counts")
    got = decode_rows(encode_rows(rows, layout), n, layout)
    width = got.ids.shape[1]
    assert (got.ids == ids[:, :width]).all() and (ids[:, width:] == -1).all()
    np.testing.assert_array_equal(got.logp, logp[:, :width])


def test_banned_tokens_stay_banned():
    rows = TopKRows(
        np.array([[3, 1, 0]]), np.array([[-0.1, -3.0, -np.inf]], "f4"), np.array([-4.0], "f4")
    )
    for kind in ("float32", "float16", "uint8"):
        layout = Layout(9, 3, "bucket", kind)
        got = decode_rows(encode_rows(rows, layout), 1, layout)
        assert got.logp[0, 2] == -np.inf and np.isfinite(got.logp[0, :2]).all()


def test_too_few_bytes_are_said():
    layout = Layout(50, 4, "bucket", "float16")
    data = encode_rows(drawn_rows(3, 50, 4, 0), layout)
    with pytest.raises(ValueError, match="a text of 4 tokens has .* too few for Layout"):
        decode_rows(data, 4, layout)
