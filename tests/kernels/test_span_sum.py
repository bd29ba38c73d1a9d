"""span_sum against float64 sums, its gather backward, and what a cumulative sum would get wrong."""

import pytest
import torch
from close import DEVICE, PATHS, assert_no_worse, running
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from reflux.kernels import _triton
from reflux.kernels.span_sum import _op, span_sum, span_sum_ref

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("path", PATHS)
@given(
    T=st.integers(0, 60),
    S=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    is_sorted=st.booleans(),
    ids=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**31 - 1),
)
def test_sums_and_gradient_match_float64(path, T, S, dtype, is_sorted, ids, seed):
    g = torch.Generator().manual_seed(seed)
    x_T = torch.randn(T, generator=g).to(DEVICE, dtype).requires_grad_()
    # -2, S and above: no span, like -1
    span_T = torch.randint(-2, S + 3, (T,), generator=g, dtype=ids)
    span_T = (span_T.sort().values if is_sorted else span_T).to(DEVICE)
    upstream_S = torch.randn(S, generator=g).to(DEVICE)
    with running(path):
        sums_S = span_sum(x_T, span_T, S)
        (dx_T,) = torch.autograd.grad((sums_S * upstream_S).sum(), x_T)
    truth_S = torch.zeros(S, dtype=torch.float64, device=DEVICE)
    for t, s in enumerate(span_T.tolist()):
        if 0 <= s < S:
            truth_S[s] += x_T[t].double().cpu()
    assert_no_worse(
        sums_S.detach(), span_sum_ref(x_T.detach(), span_T, S), truth_S.to(DEVICE), "sums"
    )
    want_T = torch.stack(
        [upstream_S[s] if 0 <= s < S else upstream_S.new_zeros(()) for s in span_T.tolist()]
        or [dx_T.sum()]
    )
    torch.testing.assert_close(
        dx_T, want_T.to(dtype).reshape(dx_T.shape) if T else dx_T, rtol=0, atol=0
    )


@pytest.mark.parametrize("path", PATHS)
def test_a_large_prefix_costs_a_later_span_nothing(path):
    """A difference of cumulative sums would return 0 for the second span."""
    x_T = torch.tensor([1e8, 1.0, 2.0], device=DEVICE)
    with running(path):
        assert span_sum(x_T, torch.tensor([0, 1, 1], device=DEVICE), 2).tolist() == [1e8, 3.0]


@pytest.mark.parametrize("path", PATHS)
def test_long_and_empty_spans_and_no_spans_at_all(path):
    span_T = torch.tensor([2] * 41 + [-1] * 3, device=DEVICE)
    with running(path):
        assert span_sum(torch.ones(44, device=DEVICE), span_T, 4).tolist() == [0, 0, 41, 0]
        assert span_sum(
            torch.ones(2, device=DEVICE), torch.tensor([-1, -1], device=DEVICE), 0
        ).shape == (0,)


@pytest.mark.parametrize("path", PATHS)
def test_two_runs_are_bitwise_equal_and_in_token_order(path):
    g = torch.Generator().manual_seed(0)
    x_T, span_T = (
        torch.randn(200, generator=g).to(DEVICE),
        torch.randint(-1, 7, (200,), generator=g).to(DEVICE),
    )
    with running(path):
        assert torch.equal(span_sum(x_T, span_T, 7), span_sum(x_T, span_T, 7))


@pytest.mark.parametrize("path", PATHS)
def test_the_op_keeps_torch_librarys_contract(path):
    x_T = torch.randn(9, device=DEVICE, requires_grad=True)
    with running(path):
        torch.library.opcheck(_op, (x_T, torch.arange(9, device=DEVICE) // 2 - 1, 4))


@pytest.mark.parametrize("path", PATHS)
def test_a_span_has_the_same_sum_in_whatever_batch_it_is_packed(path):
    g = torch.Generator().manual_seed(1)
    rows = [
        (
            torch.randn(T, generator=g).to(DEVICE),
            torch.randint(-1, S, (T,), generator=g).to(DEVICE),
            S,
        )
        # the second holds spans of 40 tokens and more
        for T, S in ((9, 3), (120, 2), (1, 1), (0, 2))
    ]
    shift_B = [sum(S for *_, S in rows[:b]) for b in range(len(rows))]
    packed_T = torch.cat(
        [torch.where(span < 0, -1, span + shift) for (_, span, _), shift in zip(rows, shift_B)]
    )
    with running(path):
        alone_S = torch.cat([span_sum(*row) for row in rows])
        assert torch.equal(
            span_sum(torch.cat([x for x, *_ in rows]), packed_T, len(alone_S)), alone_S
        )


def test_it_compiles_retains_its_graph_and_never_waits_for_the_device():
    x_T = torch.randn(7, generator=torch.Generator().manual_seed(2)).to(DEVICE).requires_grad_()
    span_T, upstream_S = (
        torch.tensor([0, 0, 2, -1, 2, 1, 0], device=DEVICE),
        torch.tensor([1.0, -2.0, 3.0], device=DEVICE),
    )

    def loss(x_T):
        return (span_sum(x_T * 2, span_T, 3) * upstream_S).sum()

    total = torch.compile(loss, backend="aot_eager", fullgraph=True)(x_T)
    for times in (1, 2):
        total.backward(retain_graph=True)
        torch.testing.assert_close(
            x_T.grad, times * 2 * torch.tensor([1.0, 1, 3, 0, 3, -2, 1], device=DEVICE)
        )
    with FakeTensorMode():  # has no values: reading one raises
        x_T = torch.randn(7, requires_grad=True, device=DEVICE)
        span_sum(x_T, torch.zeros(7, dtype=torch.int32, device=DEVICE), 3).sum().backward()
        assert x_T.grad.shape == (7,)


@pytest.mark.parametrize(
    "x, span, match",
    [
        (
            torch.zeros(2, 3, device=DEVICE),
            torch.zeros(2, 3, dtype=torch.long, device=DEVICE),
            "Flatten a batch",
        ),
        (torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE), "int32 or int64"),
        (torch.zeros(3, device=DEVICE).long(), torch.zeros(3, device=DEVICE).long(), "bincount"),
        (torch.zeros(3, device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE), "id 2 of 2"),
    ],
)
def test_mistakes_say_how_to_fix_them(x, span, match, monkeypatch):
    monkeypatch.setattr(_triton, "DEBUG", True)
    with pytest.raises(ValueError, match=match):
        span_sum(x, span, 2)
