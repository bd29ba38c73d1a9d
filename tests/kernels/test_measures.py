"""linear_kl(measures=True): entropy and top-1 against float64, and what they must not change."""

import pytest
import torch
import torch.distributed as dist
from close import DEVICE, PATHS, assert_compiles, running
from hypothesis import given
from hypothesis import strategies as st
from shards import run_on_ranks

from reflux.kernels._chunks import project
from reflux.kernels._measures import UNKNOWN, top1_rows
from reflux.kernels.linear_kl import VocabShard, linear_kl, linear_kl_ref

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5}


def inputs(T: int, V: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (T, 5), (V, 5), (T, 7), (V, 7)
    return [(2 * torch.randn(s, generator=g)).to(DEVICE, dtype) for s in shapes]


def assert_likeliest(top1_T, hidden_TD, head_VD):
    """No id of the whole vocabulary is likelier, up to the rounding of a logit."""
    logits_TV = hidden_TD.double() @ head_VD.double().t()
    chosen_T = logits_TV.gather(1, top1_T[:, None])[:, 0]
    torch.testing.assert_close(chosen_T, logits_TV.amax(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@given(
    T=st.integers(1, 4),
    V=st.sampled_from([1, 2, 15, 64, 65, 129, 300]),
    dtype=st.sampled_from(list(TOLERANCE)),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    softcap=st.sampled_from([None, 4.0]),
    divergence=st.sampled_from(["forward", "reverse", "jsd"]),
    chosen=st.sampled_from([None, [0], []]),
    workspace_mb=st.sampled_from([0.001, 1200]),
    seed=st.integers(0, 2**31 - 1),
)
def test_measures_are_those_of_float64(
    path, T, V, dtype, temperature, softcap, divergence, chosen, workspace_mb, seed
):
    x_TD, head_VD, y_TE, teacher_VE = inputs(T, V, dtype, seed)
    options = dict(
        temperature=temperature,
        student_softcap=softcap,
        divergence=divergence,
        rows=None if chosen is None else torch.tensor(chosen, dtype=torch.long, device=DEVICE),
        measures=True,
    )
    with running(path, 64):
        x_TD.requires_grad_()
        out = linear_kl(x_TD, head_VD, y_TE, teacher_VE, workspace_mb=workspace_mb, **options)
        out.total.backward()
        plain = linear_kl(
            x_TD.detach().requires_grad_(),
            head_VD,
            y_TE,
            teacher_VE,
            workspace_mb=workspace_mb,
            **options | {"measures": False},
        )
    truth = linear_kl_ref(
        *(t.detach().double() for t in (x_TD, head_VD, y_TE, teacher_VE)), **options
    )
    assert torch.equal(out.kl, plain.kl) and plain.measures is None
    torch.testing.assert_close(
        out.measures.entropy.double(), truth.measures.entropy, rtol=0, atol=TOLERANCE[dtype] * 10
    )
    rows = list(range(T)) if chosen is None else chosen
    others = [t for t in range(T) if t not in rows]
    for got in (out.measures, truth.measures):
        assert_likeliest(got.student_top1[rows], x_TD.detach()[rows], head_VD)
        assert_likeliest(got.teacher_top1[rows], y_TE[rows], teacher_VE)
        assert (got.student_top1[others] == UNKNOWN).all() and not got.entropy[others].any()
        assert (got.teacher_top1[others] == UNKNOWN).all()
    assert not any(m.requires_grad for m in out.measures)


@pytest.mark.parametrize("path", PATHS)
def test_banned_tokens_and_padding_are_never_the_likeliest(path):
    x_TD, head_VD, y_TE, teacher_VE = inputs(3, 40, torch.float32, 1)
    bias_V = torch.zeros(40, device=DEVICE)
    bias_V[: 40 - 2] = -torch.inf  # tokens 38 and 39 remain, and 39 is padding of the head
    with running(path, 64):
        out = linear_kl(
            x_TD,
            head_VD,
            y_TE,
            teacher_VE,
            student_bias=bias_V,
            teacher_bias=bias_V,
            vocab_size=39,
            measures=True,
        )
    assert out.measures.student_top1.tolist() == out.measures.teacher_top1.tolist() == [38] * 3
    assert not out.measures.entropy.any()


def test_measures_compile_into_one_graph():
    x_TD, head_VD, y_TE, teacher_VE = inputs(3, 20, torch.float32, 2)

    def call(x_TD):
        out = linear_kl(x_TD * 2, head_VD, y_TE, teacher_VE, measures=True)
        same_T = (out.measures.student_top1 == out.measures.teacher_top1).float()
        return out.total + (out.measures.entropy + same_T).detach().sum()

    assert_compiles(call, [x_TD.requires_grad_()])


def slices_are_the_whole() -> None:
    tensors = inputs(6, 48, torch.float64, 3)
    options = dict(vocab_size=40, temperature=2.0, measures=True)
    whole = linear_kl(*tensors, **options).measures
    cut = slice(24 * dist.get_rank(), 24 * dist.get_rank() + 24)
    shard = VocabShard(dist.group.WORLD.group_name, cut.start)
    x_TD, head_VD, y_TE, teacher_VE = tensors
    got = linear_kl(x_TD, head_VD[cut], y_TE, teacher_VE[cut], shard=shard, **options).measures
    torch.testing.assert_close(got.entropy, whole.entropy, rtol=0, atol=1e-12)
    assert got.student_top1.tolist() == whole.student_top1.tolist()
    assert got.teacher_top1.tolist() == whole.teacher_top1.tolist()
    equal_CV = torch.full((2, 3), 1.0)
    assert top1_rows(equal_CV, shard.group, shard.start)[0].item() < 3  # the lowest slice's
    padding_CV = equal_CV[:, : 0 if dist.get_rank() == 0 else 3]
    assert top1_rows(padding_CV, shard.group, shard.start)[0].item() >= 24


def test_slices_of_the_vocabulary_measure_what_one_does():
    run_on_ranks(slices_are_the_whole)


def test_of_equal_logits_one_is_named():
    logits_CV = project(torch.ones(1, 2), torch.ones(4, 2))
    assert top1_rows(logits_CV, "", 10).item() in range(10, 14)
