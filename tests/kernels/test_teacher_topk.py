"""teacher_topk against a full stable sort in float64: supports, ties, the exact tail, slices."""

import pytest
import torch
from close import DEVICE, PATHS, NoLargeTensor, running
from hypothesis import given
from hypothesis import strategies as st
from shards import run_on_ranks

from reflux.kernels._parallel import VocabShard
from reflux.kernels.linear_topk_kl import linear_topk_kl
from reflux.kernels.teacher_topk import (
    LEAST_TAIL,
    SUPPORTS,
    _op,
    tail_of_rounded,
    teacher_topk,
    teacher_topk_ref,
)

SEEDS = st.integers(0, 2**31 - 1)


def inputs(T, V, seed, D=6):
    """Teacher hidden, head, bias, student hidden, head: small integers, exact GEMMs, many ties."""
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randint(-2, 3, s, generator=g).to(DEVICE, torch.float64)
        for s in ((T, D), (V, D), (V,), (T, D), (V, D))
    ]


def options_of(support, student_TD, student_VD):
    return {} if support == "teacher" else dict(student_hidden=student_TD, student_head=student_VD)


@pytest.mark.parametrize("path", PATHS)
@given(
    T=st.integers(0, 5),
    V=st.integers(1, 200),
    k=st.integers(1, 20),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    softcap=st.sampled_from([None, 4.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    support=st.sampled_from(SUPPORTS),
    workspace_mb=st.sampled_from([0.001, 1200]),
    seed=SEEDS,
)
def test_is_a_full_stable_sort(
    path, T, V, k, temperature, softcap, dtype, support, workspace_mb, seed
):
    x_TD, w_VD, b_V, *student = (x.to(dtype) for x in inputs(T, V, seed))
    k = min(k, V)
    w_VD, b_V, student[1] = (
        torch.cat([x, torch.full_like(x[:1], 77.0).expand(3, *x.shape[1:])])
        for x in (w_VD, b_V, student[1])
    )
    # junk: T15
    options = dict(
        temperature=temperature, softcap=softcap, vocab_size=V, support=support, logit_scale=0.5
    )
    with running(path):
        got = teacher_topk(
            x_TD,
            w_VD,
            k,
            bias=b_V,
            workspace_mb=workspace_mb,
            **options,
            **options_of(support, *student),
        )
    truth = teacher_topk_ref(
        x_TD.double(),
        w_VD.double(),
        k,
        bias=b_V.double(),
        **options,
        **options_of(support, *(s.double() for s in student)),
    )
    assert got.ids.dtype == torch.int32 and (softcap is not None or torch.equal(got.ids, truth.ids))
    same = got.ids == truth.ids  # tanh may break or make ties at the last bit
    live = same & (truth.ids >= 0)
    torch.testing.assert_close(got.logp[live].double(), truth.logp[live], atol=1e-5, rtol=1e-5)
    assert (got.logp[got.ids < 0] == -torch.inf).all()
    if same.all():
        torch.testing.assert_close(got.tail.double(), truth.tail, atol=2e-5, rtol=1e-5)
    total_T = got.logp.exp().sum(1) + got.tail.exp()
    torch.testing.assert_close(total_T, torch.ones_like(total_T), atol=1e-5, rtol=0)
    for row in got.ids.tolist():
        named = [i for i in row if i >= 0]
        assert len(set(named)) == len(named) and row[len(named) :] == [-1] * (len(row) - len(named))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "logits, k, ids",
    [
        ([1, 3, 3, 3, 2, 3], 2, [1, 2]),
        ([0, 0, 0, 0, 0, 0], 4, [0, 1, 2, 3]),
        ([0.0, -0.0, 5, -0.0, 0.0, 1], 4, [2, 5, 0, 1]),
        ([-torch.inf, 7, -torch.inf, -torch.inf, 7, -torch.inf], 3, [1, 4, 0]),
        ([2, 1, 2, 1, 2, 1], 6, [0, 2, 4, 1, 3, 5]),
    ],
)
def test_of_equal_logits_the_lowest_ids_are_chosen(path, logits, k, ids):
    logits_TV = torch.tensor([logits], device=DEVICE, dtype=torch.float32)
    with running(path):
        got = teacher_topk(logits_TV, None, k)
        both = teacher_topk(logits_TV, None, k, support="union", student_hidden=logits_TV)
    assert got.ids.tolist() == [ids] and [i for i in both.ids[0].tolist() if i >= 0] == ids
    assert torch.equal(both.logp[:, :k], got.logp) and torch.equal(both.tail, got.tail)


def test_a_tail_far_below_fp32_resolution_is_exact():
    hidden_TD = torch.ones(1, 1, device=DEVICE)
    head_VD = torch.tensor([[40.0]] + [[0.0]] * 9, device=DEVICE)
    tail = teacher_topk(hidden_TD, head_VD, 1).tail.item()
    # log(1 - p) in fp32 would be -inf
    assert abs(tail - (torch.tensor(9.0, device=DEVICE).log().item() - 40)) < 1e-5


def test_logits_near_1e4_lose_nothing():
    logits_TV = (
        (torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 64)
        .round()
        .div(64)
        .to(DEVICE)
    )
    a, b = (teacher_topk(logits_TV + c, None, 5) for c in (0.0, 1e4))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_given_logits_are_those_of_the_head_and_stay_as_they_are():
    x_TD, w_VD, *_ = (x.float() for x in inputs(4, 30, 1))
    logits_TV = x_TD @ w_VD.t()
    before_TV = logits_TV.clone()
    for a, b in zip(teacher_topk(logits_TV, None, 5), teacher_topk(x_TD, w_VD, 5), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(logits_TV, before_TV)
    assert torch.equal(
        teacher_topk(logits_TV[:, 3:], None, 5, vocab_size=20).ids,
        teacher_topk(x_TD, w_VD[3:23], 5).ids,
    )


@pytest.mark.parametrize("support", SUPPORTS)
def test_only_chosen_rows_are_computed(support):
    x_TD, w_VD, _, *student = inputs(5, 30, 2)
    rows_M = torch.tensor([3, 1], device=DEVICE)
    whole = teacher_topk(x_TD, w_VD, 4, support=support, **options_of(support, *student))
    got = teacher_topk(x_TD, w_VD, 4, support=support, rows=rows_M, **options_of(support, *student))
    others = torch.tensor([0, 2, 4], device=DEVICE)
    for a, b in zip(got, whole, strict=True):
        assert torch.equal(a[rows_M], b[rows_M])
    assert (
        (got.ids[others] == -1).all()
        and (got.logp[others] == -torch.inf).all()
        and (got.tail[others] == 0).all()
    )


def test_what_the_loss_takes():
    """Union rows with padding, and rows left out, go into linear_topk_kl as they are."""
    x_TD, w_VD, _, *student = inputs(5, 30, 3)
    topk = teacher_topk(
        x_TD,
        w_VD,
        12,
        support="union",
        rows=torch.tensor([0, 2], device=DEVICE),
        **options_of("union", *student),
    )
    kl_T = linear_topk_kl(*student, *topk).kl
    assert (
        kl_T.isfinite().all()
        and (kl_T[[1, 3, 4]] == 0).all()
        and (kl_T[[0, 2]] > 0).all()
        and (topk.ids[0] == -1).any()
    )


def test_the_full_logits_never_exist_and_two_calls_agree():
    g = torch.Generator().manual_seed(0)
    x_TD, w_VD = (
        torch.randn(300, 8, generator=g).to(DEVICE),
        torch.randn(400, 8, generator=g).to(DEVICE),
    )
    with running("torch"), NoLargeTensor(300 * 400 // 2):
        a, b = (teacher_topk(x_TD, w_VD, 8, workspace_mb=0.5) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def on_slices(tensors, edges, support):
    from torch import distributed as dist

    start, end = edges[dist.get_rank()], edges[dist.get_rank() + 1]
    x_TD, w_VD, b_V, y_TD, v_VD = (
        x if i in (0, 3) else x[start:end] for i, x in enumerate(tensors)
    )
    return teacher_topk(
        x_TD,
        w_VD,
        5,
        bias=b_V,
        support=support,
        vocab_size=33,
        workspace_mb=0.001,
        shard=VocabShard(dist.group.WORLD.group_name, start),
        **options_of(support, y_TD, v_VD),
    )


def on_all_slices(tensors):
    return [
        on_slices(tensors, edges, support)
        for edges in ((0, 30, 40), (0, 33, 40))
        for support in SUPPORTS
    ]


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo ranks")
def test_slices_of_a_vocabulary_are_the_whole_one():
    """Uneven ones: fewer tokens than k in one, nothing but padding in the other."""
    tensors = inputs(4, 40, 4)
    for support, left, right in zip(
        SUPPORTS * 2, *run_on_ranks(on_all_slices, tensors), strict=True
    ):
        whole = teacher_topk(
            tensors[0],
            tensors[1],
            5,
            bias=tensors[2],
            support=support,
            vocab_size=33,
            **options_of(support, *tensors[3:]),
        )
        assert torch.equal(left.ids, whole.ids) and torch.equal(right.ids, whole.ids)
        for a, b, c in zip(left[1:], right[1:], whole[1:], strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_the_op_keeps_torch_librarys_contract(path):
    x_TD, w_VD, b_V, *student = (x.float() for x in inputs(3, 20, 0))
    rows_M, options = torch.tensor([1, 0], device=DEVICE), (1.0, 20, "", 0, 1200.0)
    heads = x_TD, w_VD, b_V, 1.0, 0.0, *student, None
    logits = x_TD @ w_VD.t(), None, None, 1.0, 0.0, None, None, None
    with running(path):
        torch.library.opcheck(_op, (*heads, rows_M, 5, "union", *options))
        torch.library.opcheck(_op, (*logits, None, 5, "teacher", *options))


def test_compiles_into_one_graph():
    x_TD, w_VD, _, *student = (x.float() for x in inputs(3, 20, 5))
    compiled = torch.compile(teacher_topk, fullgraph=True, backend="aot_eager")
    for support in SUPPORTS:
        options = dict(support=support, **options_of(support, *student))
        for a, b in zip(
            compiled(x_TD, w_VD, 4, **options), teacher_topk(x_TD, w_VD, 4, **options), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(k=6), "1 <= k <= V"),
        (dict(k=0), "1 <= k <= V"),
        (dict(support="both"), "one of teacher, student, union"),
        (dict(support="union"), "without student_hidden"),
        (dict(student_hidden=torch.zeros(2, 3, device=DEVICE)), "with student_hidden"),
        (dict(support="union", student_hidden=torch.zeros(2, 4, device=DEVICE)), "pass vocab_size"),
        (
            dict(support="union", student_hidden=torch.zeros(3, 5, device=DEVICE)),
            "the student has 3 rows",
        ),
        (dict(head_VE=None, softcap=3.0), "without a head"),
        (dict(head_VE=None, bias=torch.zeros(5, device=DEVICE)), "no bias"),
        (dict(temperature=0.0), "take the argmax"),
        (
            dict(hidden_TE=torch.zeros(2, 2, 3, device=DEVICE), head_VE=None),
            "Flatten batch and time",
        ),
    ],
)
def test_mistakes_say_how_to_fix_them(change, match):
    with pytest.raises(ValueError, match=match):
        teacher_topk(
            **(
                dict(
                    hidden_TE=torch.zeros(2, 3, device=DEVICE),
                    head_VE=torch.zeros(5, 3, device=DEVICE),
                    k=2,
                )
                | change
            )
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_tail_of_rounded_log_probabilities_is_never_nothing(dtype):
    mass_TK = torch.tensor([[0.5, 0.25], [0.75, 0.25], [1.0, 1e-5], [1.0 - 2**-8, 2**-9]])
    tail_T = tail_of_rounded(mass_TK.double().log().to(dtype))
    want_T = torch.tensor([0.25, LEAST_TAIL, LEAST_TAIL, 2**-9]).double().log()
    assert tail_T.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close = dict(rtol=1e-4, atol=0.0) if dtype != torch.bfloat16 else dict(rtol=0.2, atol=1.0)
    torch.testing.assert_close(tail_T.double(), want_T, **close)
