"""The span losses against their closed forms in float64, at their edges, and as distances."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reflux.tokenalign.span_losses import KINDS, log1mexp, span_likelihood_kl

LOGP = st.floats(-300, -1e-3)
SPANS = st.lists(st.tuples(LOGP, LOGP), min_size=1, max_size=6)
TAU = st.sampled_from([0.7, 3.0, 100.0, 1e4])


def split(spans, dtype=torch.float64):
    student, teacher = torch.tensor(spans, dtype=dtype).T
    return student.clone().requires_grad_(), teacher.clone()


def gradient(student, teacher, **options):
    (grad,) = torch.autograd.grad(span_likelihood_kl(student, teacher, **options), student)
    return grad


@given(spans=SPANS, tau=TAU)
def test_the_gradient_is_the_closed_form(spans, tau):
    student, teacher = split(spans)
    u, v = (teacher / tau).exp(), (student.detach() / tau).exp()
    want = ((student.detach() / tau).expm1() - (teacher / tau).expm1()) / ((1 - v) * tau)
    assert torch.allclose(want, -(u - v) / ((1 - v) * tau), atol=1e-9)
    torch.testing.assert_close(gradient(student, teacher, temperature=tau, scale=False), want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(student, teacher, temperature=tau), want * tau, rtol=1e-9, atol=1e-12 * tau)


@given(spans=SPANS, tau=TAU)
def test_the_value_is_the_definition_and_the_sum(spans, tau):
    student, teacher = split(spans)
    want = 0.0
    for s, t in spans:
        u = math.exp(t / tau)
        rest = -math.expm1(t / tau) * (math.log(-math.expm1(t / tau)) - math.log(-math.expm1(s / tau)))
        want += u * (t - s) / tau + rest
    torch.testing.assert_close(span_likelihood_kl(student, teacher, temperature=tau, scale=False).item(), want, rtol=1e-9, atol=1e-11)


@given(spans=SPANS, tau=TAU, kind=st.sampled_from(KINDS))
def test_a_distance_zero_only_at_agreement(spans, tau, kind):
    student, teacher = split(spans)
    assert span_likelihood_kl(student, teacher, temperature=tau, kind=kind) >= -1e-10 * tau
    at_rest = teacher.clone().requires_grad_()
    assert span_likelihood_kl(at_rest, teacher, temperature=tau, kind=kind).item() == pytest.approx(0, abs=1e-10)
    assert gradient(at_rest, teacher, temperature=tau, kind=kind).abs().max() < 1e-9
    apart = (student.detach() - teacher).abs() > 1e-3
    if tau > 99 and apart.all():  # at a small temperature, likelihoods of e^-300 are equal to zero and to each other
        slope = gradient(student, teacher, temperature=tau, kind=kind)
        assert (slope.sign() == (student.detach() - teacher).sign()).all()


def test_scaled_gradients_do_not_shrink_with_the_temperature():
    student, teacher = split([(-5.0, -2.0), (-0.5, -8.0)])
    limit = teacher / student.detach() - 1
    torch.testing.assert_close(gradient(student, teacher, temperature=1e7), limit, rtol=1e-5, atol=0)
    assert gradient(student, teacher, temperature=1e7, scale=False).abs().max() < 1e-5


@given(spans=SPANS)
def test_single_precision_is_close_to_double(spans):
    narrow, wide = (gradient(*split(torch.tensor(spans, dtype=torch.float32).tolist(), dtype)) for dtype in
                    (torch.float32, torch.float64))
    torch.testing.assert_close(narrow.double(), wide, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_at_the_edges(dtype, kind):
    edges = [0.0, -1e-30, -1e-8, -1e-3, -50.0, -1e4]
    student, teacher = split([(s, t) for s in edges for t in edges], dtype)
    for tau in (1.0, 100.0):
        assert span_likelihood_kl(student, teacher, temperature=tau, kind=kind).isfinite()
        assert gradient(student, teacher, temperature=tau, kind=kind).isfinite().all()


def test_a_banned_span_is_finite():
    student, teacher = split([(-math.inf, -1.0), (-1.0, -math.inf), (-math.inf, -math.inf)])
    assert span_likelihood_kl(student, teacher).isfinite() and gradient(student, teacher).isfinite().all()


@given(st.floats(-700, -1e-12))
def test_log1mexp(x):
    got = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    log1mexp(got).backward()
    exact = math.log(-math.expm1(x)) if x > -0.7 else math.log1p(-math.exp(x))
    assert log1mexp(got).item() == pytest.approx(exact, rel=1e-12)
    assert got.grad.item() == pytest.approx(math.exp(x) / math.expm1(x), rel=1e-9, abs=1e-300)


def test_the_teacher_gets_no_gradient():
    student, teacher = split([(-2.0, -1.0)])
    teacher.requires_grad_()
    span_likelihood_kl(student, teacher).backward()
    assert teacher.grad is None


def test_half_precision_is_widened():
    student, teacher = torch.tensor([-2.0]).bfloat16(), torch.tensor([-1.0]).bfloat16()
    assert span_likelihood_kl(student, teacher).dtype == torch.float32


def test_what_people_get_wrong():
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"student is \[2\] and teacher \[3\]"):
        span_likelihood_kl(two, three)
    with pytest.raises(ValueError, match="kind = 'k3'; want one of binary, abs, k2"):
        span_likelihood_kl(two, two, kind="k3")
    with pytest.raises(ValueError, match="temperature = 0"):
        span_likelihood_kl(two, two, temperature=0)
