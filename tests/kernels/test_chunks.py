"""What the linear_* ops share: chunks, logits and their way back, checks of values."""

import pytest
import torch
from close import DEVICE, PATHS, running
from hypothesis import given
from hypothesis import strategies as st

from reflux.kernels import _triton
from reflux.kernels._chunks import (
    WORKSPACE_MB,
    backproject,
    chunks,
    fold_scale,
    gradient_buffers,
    padded,
    project,
    workspace_that_fits,
)
from reflux.kernels._triton import check_ids


@given(
    T=st.integers(0, 700),
    V=st.sampled_from([1, 1000, 262_144]),
    buffers=st.sampled_from([1, 2.5, 8]),
    workspace_mb=st.sampled_from([0.001, 4.0, 1200.0]),
    every=st.sampled_from([None, 1, 3]),
)
def test_chunks_cover_every_row_once_within_the_budget(T, V, buffers, workspace_mb, every):
    x_TD = torch.zeros(T, 1)
    rows_M = None if every is None else torch.arange(T).flip(0)[::every]
    parts = list(chunks(x_TD, V, buffers, workspace_mb, rows_M))
    wanted = torch.arange(T) if rows_M is None else rows_M
    assert torch.cat([torch.arange(T)[c] for c in parts] or [wanted[:0]]).equal(wanted)
    sizes = [len(x_TD[c]) for c in parts]
    assert all(n == 1 or n * V * 4 * buffers <= workspace_mb * 2**20 for n in sizes)
    assert len(set(sizes[:-1])) <= 1 and (not sizes[:-1] or sizes[0] < 128 or sizes[0] % 128 == 0)


@pytest.mark.parametrize("path", PATHS)
@given(
    C=st.integers(0, 3),
    V=st.sampled_from([0, 1, 63, 64, 65, 130]),
    softcap=st.sampled_from([0.0, 5.0]),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_logits_and_their_way_back(path, C, V, softcap, biased, dtype):
    """The gradients of sum(logits * d) for an arbitrary d, against autograd; V = 0, too."""
    g = torch.Generator().manual_seed(V)
    x_CD, w_VD = (torch.randn(n, 4, generator=g).to(DEVICE, dtype) for n in (C, V))
    b_V = torch.randn(V, generator=g).to(DEVICE, dtype) if biased else None
    leaves = [
        t.double().clone().requires_grad_()
        for t in (x_CD, w_VD, torch.zeros(V, device=DEVICE) if b_V is None else b_V)
    ]
    want_CV = 0.5 * (leaves[0] @ leaves[1].t() + leaves[2])
    want_CV = softcap * torch.tanh(want_CV / softcap) if softcap else want_CV
    with running(path):
        logits_CV = project(x_CD, w_VD, softcap, b_V, 0.5)
        scale, _ = fold_scale(1.0, 0.5, softcap)
        torch.testing.assert_close(
            logits_CV.double() * scale, want_CV.detach(), atol=1e-5, rtol=1e-5
        )
        assert (
            (padded(logits_CV)[:, V:] == -torch.inf).all()
            and padded(logits_CV).stride(0) % 64 == 0
            or path == "torch"
        )
        if not softcap:
            # any block that lies like one of project's
            d_CV = padded(project(x_CD.flip(1), w_VD))[:, :V]
            dx_CD, dw_VD = gradient_buffers(x_CD, w_VD, False, True)
            db_V = dw_VD.new_zeros(V)
            dx_CD = backproject(d_CV, x_CD, w_VD, True, dw_VD, db_V)
            truth = torch.autograd.grad((want_CV * 2 * d_CV.double()).sum(), leaves)
            for got, wanted in zip((dx_CD, dw_VD, db_V), truth):
                rough = (
                    2e-2
                    if got.dtype == torch.bfloat16
                    else 2e-3
                    if got.dtype == torch.float16
                    else 1e-5
                )
                torch.testing.assert_close(got.double(), wanted, atol=rough, rtol=rough)


def test_ids_are_checked_only_while_debugging(monkeypatch):
    ids_TK = torch.tensor([[0, -1, -1], [4, 2, 4]])
    check_ids("op", ids_TK, 3)
    monkeypatch.setattr(_triton, "DEBUG", True)
    check_ids("op", ids_TK[:1], 1)  # padding may repeat
    check_ids("op", ids_TK, 5, distinct=False)
    check_ids("op", ids_TK[:0], 1)
    for V, match in ((4, "id 4 of 4 classes"), (5, "1 ids occur twice")):
        with pytest.raises(ValueError, match=match):
            check_ids("op", ids_TK, V)


def test_a_workspace_takes_its_share_of_free_memory_once_asked(monkeypatch):
    assert workspace_that_fits("cpu") == WORKSPACE_MB
    for free_gib, want in ((1, 300), (5, 1200), (12, 2400), (100, 4800)):
        free = free_gib * 2**30
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        assert workspace_that_fits("cuda:0") == want
    assert workspace_that_fits("cuda:0", tokens=2048, vocab=32_000) == 1200
    with pytest.raises(ValueError, match="0 < share <= 1"):
        workspace_that_fits("cuda", 0.0)
