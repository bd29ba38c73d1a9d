"""A teacher's rows as bytes: ids packed by the width of the vocabulary, log-probabilities rounded.

    ids      ceil(log2(V)) bits each, one behind another, lowest bit first
    logp     float32: as they are; float16: |error| <= 2**-11 |logp|, and 3e-8 near 0
             uint8: a code of 0 to 254 between the first and the last log-probability of a position,
             both kept in float16; |error| <= (first - last) / 508 + 2**-10 |last|
    counts   of tail = "sampled": ceil(log2(n + 1)) bits each; log(count / n) is exact
    tail     float32

A rounded distribution sums to one no more: what is read is normalised again, so that the tail and
the ids together are one distribution, whose log-probabilities are off by at most twice the error.

Shapes: n tokens of a text, K entries of a position, N values.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from reflux.trainer.data.batch import TopKRows

BANNED = 255  # the code of a log-probability of -inf


class Layout(NamedTuple):
    """What the bytes of a cache mean."""

    vocab_size: int
    top_k: int  # entries of a position; draws, for tail = "sampled"
    tail: str  # bucket | sampled
    logp: str  # float32 | float16 | uint8

    @property
    def id_bits(self) -> int:
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def count_bits(self) -> int:
        return self.top_k.bit_length()


class Encoded(NamedTuple):
    """The rows of one text."""

    widths: bytes  # entries of each position, uint16; empty where all have top_k
    ids: bytes
    logp: bytes  # or counts
    tail: bytes


def pack_bits(values_N: np.ndarray, bits: int) -> bytes:
    """Non-negative integers below 2**bits, `bits` bits each."""
    bits_NB = (np.asarray(values_N, np.int64)[:, None] >> np.arange(bits)) & 1
    return np.packbits(bits_NB.astype(np.uint8), bitorder="little").tobytes()


def unpack_bits(data: bytes, bits: int, count: int) -> np.ndarray:
    """int64 [count], the inverse of `pack_bits`."""
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little")
    values_N = np.zeros(count, np.int64)
    for bit, column_N in enumerate(flat.reshape(count, bits).T):
        values_N |= column_N.astype(np.int64) << bit
    return values_N


def encode_rows(rows: TopKRows, layout: Layout) -> Encoded:
    """The rows of a text as bytes. A position's entries come by falling log-probability, as
    kernels.teacher_topk leaves them, padding last.
    """
    real_nK = rows.ids >= 0
    ids = pack_bits(rows.ids[real_nK], layout.id_bits)
    if layout.tail == "sampled":
        counts = np.rint(np.exp(rows.logp[real_nK].astype(np.float64)) * layout.top_k)
        widths = real_nK.sum(1).astype("<u2").tobytes()
        return Encoded(widths, ids, pack_bits(counts, layout.count_bits), b"")
    tail = rows.tail.astype("<f4").tobytes()
    return Encoded(b"", ids, _encode_logp(rows.logp, layout.logp), tail)


def decode_rows(data: Encoded, n: int, layout: Layout) -> TopKRows:
    """The rows of a text of n tokens. ValueError where the bytes are too few for them."""
    try:
        if layout.tail == "sampled":
            return _decode_counts(data, n, layout)
        shape = n, min(layout.top_k, layout.vocab_size)
        ids = unpack_bits(data.ids, layout.id_bits, shape[0] * shape[1]).reshape(shape)
        logp = _decode_logp(data.logp, shape, layout.logp)
        tail = np.frombuffer(data.tail, "<f4", n).astype(np.float32)
    except ValueError as error:
        raise ValueError(
            f"a text of {n} tokens has {len(data.ids)}, {len(data.logp)} and {len(data.tail)} "
            f"bytes of ids, log-probabilities and tails, too few for {layout}"
        ) from error
    return TopKRows(ids, *_normalised(logp, tail))


def _normalised(logp_nK: np.ndarray, tail_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total_n1 = np.logaddexp.reduce(
        np.concatenate([logp_nK, tail_n[:, None]], 1).astype(np.float64), 1, keepdims=True
    )
    return (logp_nK - total_n1).astype(np.float32), (tail_n - total_n1[:, 0]).astype(np.float32)


def _decode_counts(data: Encoded, n: int, layout: Layout) -> TopKRows:
    widths_n = np.frombuffer(data.widths, "<u2", n).astype(np.int64)
    filled_nK = np.arange(max(1, widths_n.max(initial=1))) < widths_n[:, None]
    total = int(widths_n.sum())
    ids_nK = np.full(filled_nK.shape, -1, np.int64)
    ids_nK[filled_nK] = unpack_bits(data.ids, layout.id_bits, total)
    logp_nK = np.full(filled_nK.shape, -np.inf, np.float32)
    counts = unpack_bits(data.logp, layout.count_bits, total)
    logp_nK[filled_nK] = np.log(counts / layout.top_k)
    return TopKRows(ids_nK, logp_nK, np.full(n, -np.inf, np.float32))


def _encode_logp(logp_nK: np.ndarray, kind: str) -> bytes:
    if kind == "float32":
        return logp_nK.astype("<f4").tobytes()
    if kind == "float16":
        return _half(logp_nK).tobytes()
    finite_nK = np.isfinite(logp_nK)
    first_n = _half(logp_nK[:, 0])
    last_n = _half(np.where(finite_nK, logp_nK, logp_nK[:, :1]).min(1, initial=0.0))
    start_n1, end_n1 = (x.astype(np.float64)[:, None] for x in (first_n, last_n))
    step_n1 = np.maximum(start_n1 - end_n1, 1e-30) / (BANNED - 1)
    code_nK = np.rint((start_n1 - np.where(finite_nK, logp_nK, 0.0)) / step_n1).clip(0, BANNED - 1)
    code_nK = np.where(finite_nK, code_nK, BANNED).astype(np.uint8)
    return first_n.tobytes() + last_n.tobytes() + code_nK.tobytes()


def _half(x: np.ndarray) -> np.ndarray:
    """float16; a finite number stays finite."""
    limit = float(np.finfo(np.float16).max)
    return np.where(np.isfinite(x), np.clip(x, -limit, limit), x).astype("<f2")


def _decode_logp(data: bytes, shape: tuple[int, int], kind: str) -> np.ndarray:
    n, K = shape
    if kind != "uint8":
        stored = np.frombuffer(data, "<f4" if kind == "float32" else "<f2", n * K)
        return stored.reshape(shape).astype(np.float64)
    first_n, last_n = np.frombuffer(data, "<f2", 2 * n).astype(np.float64).reshape(2, n)
    code_nK = np.frombuffer(data, np.uint8, n * K, offset=4 * n).reshape(shape)
    step_n1 = np.maximum(first_n - last_n, 1e-30)[:, None] / (BANNED - 1)
    return np.where(code_nK == BANNED, -np.inf, first_n[:, None] - code_nK * step_n1)


def largest_error(wanted: Sequence[TopKRows], got: Sequence[TopKRows]) -> float:
    """The largest difference of any stored log-probability, nats."""
    errors = [0.0]
    for a, b in zip(wanted, got):
        width = b.logp.shape[1]
        finite_nK = np.isfinite(a.logp[:, :width])
        difference = a.logp[:, :width][finite_nK] - b.logp[finite_nK]
        errors.append(float(np.abs(difference).max(initial=0.0)))
    return max(errors)
