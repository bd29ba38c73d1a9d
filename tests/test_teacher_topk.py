"""teacher_topk against a full sort in float64, and the exactness of its tail."""
import pytest
import torch
from close import DEVICE, PATHS, running
from hypothesis import given
from hypothesis import strategies as st

from reflux.kernels.teacher_topk import _op, teacher_topk, teacher_topk_ref


def inputs(T, V, D, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, D, generator=g).to(DEVICE), torch.randn(V, D, generator=g).to(DEVICE)


@given(T=st.integers(0, 5), V=st.integers(1, 200), k=st.integers(1, 20), temperature=st.sampled_from([0.5, 1.0, 2.0]),
       softcap=st.sampled_from([None, 4.0]), dtype=st.sampled_from([torch.float64, torch.float32]),
       workspace_mb=st.sampled_from([0.001, 1200]), seed=st.integers(0, 2**31 - 1))
def test_matches_a_full_sort(T, V, k, temperature, softcap, dtype, workspace_mb, seed):
    hidden_TD, head_VD = (x.to(dtype) for x in inputs(T, V, 6, seed))
    k = min(k, V)
    padded_VD = torch.cat([head_VD, torch.full((3, 6), 77.0, device=DEVICE, dtype=dtype)])  # T15
    options = dict(temperature=temperature, softcap=softcap, vocab_size=V)
    with running("torch"):
        got = teacher_topk(hidden_TD, padded_VD, k, workspace_mb=workspace_mb, **options)
    truth = teacher_topk_ref(hidden_TD.double(), padded_VD.double(), k, **options)
    # The ids may differ where two logits tie at this precision; the masses may not.
    torch.testing.assert_close(got.logp.double(), truth.logp, atol=1e-5, rtol=1e-5)
    if k < V:
        torch.testing.assert_close(got.tail.double(), truth.tail, atol=2e-5, rtol=1e-5)
    assert (k < V) or (got.tail == -torch.inf).all()
    total_T = got.logp.exp().sum(1) + got.tail.exp()
    torch.testing.assert_close(total_T, torch.ones_like(total_T), atol=1e-5, rtol=0)
    assert got.ids.dtype == torch.int32 and all(len(set(row)) == k for row in got.ids.tolist())


def test_a_tail_far_below_fp32_resolution_is_exact():
    hidden_TD = torch.ones(1, 1, device=DEVICE)
    head_VD = torch.tensor([[40.0]] + [[0.0]] * 9, device=DEVICE)
    tail = teacher_topk(hidden_TD, head_VD, 1).tail.item()
    assert abs(tail - (torch.tensor(9.0).log().item() - 40)) < 1e-5  # log(1 - p) in fp32 would be -inf


@pytest.mark.parametrize("path", PATHS)
def test_the_op_keeps_torch_librarys_contract(path):
    with running(path):
        torch.library.opcheck(_op, (*inputs(3, 20, 4, 0), 5, 1.0, 20, 0.0, 1200.0))


def test_more_classes_than_there_are():
    with pytest.raises(ValueError, match="1 <= k <= V"):
        teacher_topk(*inputs(2, 5, 3, 0), 6)
