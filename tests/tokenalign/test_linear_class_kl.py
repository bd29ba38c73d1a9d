"""Class KL of two heads: fused kernels and the plain form give the loss of the logits."""

from functools import partial

import pytest
import torch
from class_loss_cases import f64, gradient, logits_of
from hypothesis import given
from hypothesis import strategies as st
from vocab_pairs import pairs, table_of

from reflux.kernels._divergence import DIVERGENCES
from reflux.tokenalign import vocab_map
from reflux.tokenalign.class_losses import class_kl, class_logprob_of_logits, partition_index
from reflux.tokenalign.linear_class_kl import linear_class_kl, linear_class_logprob
from reflux.tokenalign.linear_rows import Linear
from reflux.tokenalign.projection import Projection
from reflux.tokenalign.vocab_map import Vocabulary

PARTITIONS = {
    "first_byte": vocab_map.first_byte,
    "common": vocab_map.common,
    "prefix": vocab_map.prefix,
    "projection": Projection.build,
}
SEEDS = st.integers(0, 2**32 - 1)
TOL = dict(rtol=0, atol=1e-10)


def head_of(num_ids, seed, padding=0, softcap=None, D=3, T=4):
    """Hidden states and a head of `num_ids` rows and `padding` more that no loss may see."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=g, dtype=f64).requires_grad_()
    head = 2 * torch.randn(num_ids + padding, D, generator=g, dtype=f64)
    head[num_ids:] = 1e3
    return Linear(hidden, head.requires_grad_(), softcap, num_ids)


def logits(x):
    z = x.hidden_TD @ x.head_VD[: x.vocab_size].T
    return x.softcap * torch.tanh(z / x.softcap) if x.softcap else z


@pytest.mark.parametrize("kind", PARTITIONS)
@given(
    pair=pairs,
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    softcap=st.sampled_from([None, 3.0]),
    padding=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_are_those_of_the_logits(
    kind, pair, divergence, temperature, softcap, padding, seed
):
    built = PARTITIONS[kind](*pair)
    if "reverse" in divergence and kind != "projection" and built.student_only:
        return
    student, teacher = (head_of(v.num_rows, seed + k, padding, softcap) for k, v in enumerate(pair))
    options = {"divergence": divergence, "beta": 0.3, "temperature": temperature}
    got = linear_class_kl(student, teacher, partition_index(built), **options)
    want = class_kl(logits(student), logits(teacher), partition_index(built), **options)
    if not want.isfinite().all():  # a projection has no check of its reverse
        return
    torch.testing.assert_close(got.kl, want, **TOL)
    leaves = (student.hidden_TD, student.head_VD)
    for a, b in zip(
        torch.autograd.grad(3 * got.total, leaves),
        torch.autograd.grad(3 * want.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **TOL)
    assert got.total.requires_grad and teacher.hidden_TD.grad is None


@given(
    pair=pairs,
    kind=st.sampled_from(["first_byte", "common", "prefix"]),
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    seed=SEEDS,
)
def test_bucket_kl_is_the_same_loss(pair, kind, divergence, temperature, seed):
    """On drawn logits: heads are identities."""
    built = PARTITIONS[kind](*pair)
    if divergence == "reverse" and built.student_only:
        return
    z, u = logits_of(pair[0], seed), logits_of(pair[1], seed + 1)
    hidden = z.clone().requires_grad_()
    options = {"divergence": divergence, "temperature": temperature}
    fused = linear_class_kl(
        Linear(hidden, torch.eye(z.shape[1], dtype=f64)),
        Linear(u, torch.eye(u.shape[1], dtype=f64)),
        partition_index(built),
        **options,
    )
    fused.total.backward()
    want, grad = gradient(partial(class_kl, partition=partition_index(built), **options), z, u)
    torch.testing.assert_close(fused.kl, want, **TOL)
    torch.testing.assert_close(hidden.grad, grad, **TOL)


@given(
    pair=pairs,
    kind=st.sampled_from(["first_byte", "common", "prefix"]),
    temperature=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_class_logprobs_of_a_head_are_those_of_its_logits(pair, kind, temperature, seed):
    index = partition_index(PARTITIONS[kind](*pair)).student
    model = head_of(pair[0].num_rows, seed, padding=1, softcap=3.0)
    got = linear_class_logprob(model, index, temperature=temperature)
    want = class_logprob_of_logits(logits(model), index, temperature=temperature)
    torch.testing.assert_close(got, want, **TOL)
    assert got.requires_grad


def test_what_people_get_wrong():
    few, many = Vocabulary(table_of([b"a"], 1)), Vocabulary(table_of([b"a", b"b"], 1))
    student, teacher = head_of(3, 0), head_of(2, 1)
    partition = partition_index(vocab_map.prefix(many, few))
    with pytest.raises(ValueError, match="reverse KL is infinite"):
        linear_class_kl(student, teacher, partition, divergence="reverse")
    projection = partition_index(Projection.build(many, many))
    with pytest.raises(ValueError, match="this side of a projection has weights"):
        linear_class_logprob(student, projection.student)
    assert linear_class_logprob(student, projection.teacher).shape == (4, 3)
