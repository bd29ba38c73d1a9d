"""align_spans against its definition on random cuts; properties of a minimal segmentation."""

import pytest
import torch
from close import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from reflux.kernels import _triton
from reflux.kernels.align_spans import _op, align_spans, align_spans_ref

SEEDS = st.integers(0, 2**31 - 1)


def cuts(B, n, m, seed, same_length=True):
    """Lengths, some 0, and masks; same_length: both sides spell equally many bytes."""
    g = torch.Generator().manual_seed(seed)
    len_a, len_b = (torch.randint(0, 4, (B, k), generator=g) for k in (n, m))
    mask_a, mask_b = (torch.rand(B, k, generator=g) > 0.2 for k in (n, m))
    if same_length and n and m:
        mask_a[:, -1] = mask_b[:, -1] = True
        missing = (len_b * mask_b).sum(1) - (len_a * mask_a).sum(1)
        len_a[:, -1] += missing.clamp(min=0)
        len_b[:, -1] += (-missing).clamp(min=0)
    return [t.to(DEVICE) for t in (len_a, len_b, mask_a, mask_b)]


@given(
    B=st.integers(0, 4),
    n=st.integers(0, 9),
    m=st.integers(0, 9),
    same=st.booleans(),
    dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]),
    seed=SEEDS,
)
def test_it_is_its_definition(B, n, m, same, dtype, seed):
    len_a, len_b, *masks = cuts(B, n, m, seed, same)
    got = align_spans(len_a.to(dtype), len_b.to(dtype), *masks)
    for a, b in zip(got, align_spans_ref(len_a, len_b, *masks), strict=True):
        assert a.dtype == torch.int64 and torch.equal(a, b)


@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=SEEDS)
def test_spans_are_ordered_equal_in_bytes_and_symmetric(n, m, seed):  # T17
    len_a, len_b, mask_a, mask_b = cuts(3, n, m, seed)
    span_a, span_b, count_B = align_spans(len_a, len_b, mask_a, mask_b)
    for r, k in enumerate(count_B.tolist()):
        sizes = []
        for span, length, mask in (
            (span_a[r], len_a[r], mask_a[r]),
            (span_b[r], len_b[r], mask_b[r]),
        ):
            inside = span[mask]
            assert (inside.diff() >= 0).all() and (span[~mask] == -1).all()
            sizes.append(
                torch.zeros(k + 1, dtype=torch.long, device=DEVICE).index_add_(
                    0, span.clamp(min=-1) % (k + 1), length * mask
                )
            )
        assert torch.equal(*sizes) and (sizes[0][:k] > 0).all() and sizes[0][k] == 0
    swapped = align_spans(len_b, len_a, mask_b, mask_a)
    assert (
        torch.equal(swapped[0], span_b)
        and torch.equal(swapped[1], span_a)
        and torch.equal(swapped[2], count_B)
    )


def test_the_picture_of_tokenaligns_docstring():
    """the| cat|alog against the| ca|talog."""
    span_a, span_b, count_B = align_spans(
        torch.tensor([[3, 4, 4]], device=DEVICE), torch.tensor([[3, 3, 5]], device=DEVICE)
    )
    assert (
        span_a.tolist() == [[0, 1, 1]]
        and span_b.tolist() == [[0, 1, 1]]
        and count_B.tolist() == [2]
    )


def test_one_tokenization_is_cut_everywhere_and_no_common_end_nowhere():
    lengths = torch.tensor([[2, 0, 3, 1]], device=DEVICE)
    assert align_spans(lengths, lengths)[0].tolist() == [[0, 1, 1, 2]]
    assert [
        t.tolist()
        for t in align_spans(
            torch.tensor([[2, 2]], device=DEVICE), torch.tensor([[3]], device=DEVICE)
        )
    ] == [
        [[-1, -1]],
        [[-1]],
        [0],
    ]
    assert align_spans(torch.tensor([[0, 0]], device=DEVICE), torch.tensor([[0]], device=DEVICE))[
        2
    ].tolist() == [0]


def test_a_row_does_not_know_its_batch_and_long_texts_do_not_overflow():
    long = torch.tensor([[2**40, 2**41, 5]], device=DEVICE).repeat(70, 1)
    other = torch.tensor([[2**40, 5, 2**41]], device=DEVICE).repeat(70, 1)
    span_a, span_b, count_B = align_spans(long, other)
    assert (
        (span_a == torch.tensor([0, 1, 1], device=DEVICE)).all()
        and (span_b == torch.tensor([0, 1, 1], device=DEVICE)).all()
        and (count_B == 2).all()
    )


def test_the_op_keeps_torch_librarys_contract_compiles_and_never_waits():
    args = cuts(2, 5, 4, seed=0)
    torch.library.opcheck(_op, args)
    compiled = torch.compile(align_spans, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*args), align_spans(*args)))
    with FakeTensorMode():
        assert [
            t.shape
            for t in align_spans(
                torch.ones(2, 5, device=DEVICE).long(), torch.ones(2, 3, device=DEVICE).long()
            )
        ] == [
            (2, 5),
            (2, 3),
            (2,),
        ]


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(len_a_BN=torch.zeros(2, 3, device=DEVICE)), "want integers"),
        (dict(len_b_BM=torch.zeros(4, device=DEVICE).long()), r"want integers \[B, tokens\]"),
        (dict(mask_a_BN=torch.ones(2, 3, device=DEVICE)), "want bool"),
        (dict(mask_b_BM=torch.ones(2, 3, dtype=torch.bool, device=DEVICE)), "for lengths"),
        (dict(len_b_BM=torch.zeros(3, 4, device=DEVICE).long()), "one text"),
        (dict(len_a_BN=torch.full((2, 3), -1, device=DEVICE)), "negative lengths"),
    ],
)
def test_mistakes_say_how_to_fix_them(change, match, monkeypatch):
    monkeypatch.setattr(_triton, "DEBUG", True)
    args = dict(
        len_a_BN=torch.zeros(2, 3, device=DEVICE).long(),
        len_b_BM=torch.zeros(2, 4, device=DEVICE).long(),
    )
    with pytest.raises(ValueError, match=match):
        align_spans(**(args | change))
