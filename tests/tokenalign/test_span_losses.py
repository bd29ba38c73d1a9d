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
    torch.testing.assert_close(
        gradient(student, teacher, temperature=tau, scale=False), want, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(
        gradient(student, teacher, temperature=tau), want * tau, rtol=1e-9, atol=1e-12 * tau
    )


@given(spans=SPANS, tau=TAU)
def test_the_value_is_the_definition_and_the_sum(spans, tau):
    student, teacher = split(spans)
    want = 0.0
    for s, t in spans:
        u = math.exp(t / tau)
        complement = -math.expm1(t / tau) * (
            math.log(-math.expm1(t / tau)) - math.log(-math.expm1(s / tau))
        )
        want += u * (t - s) / tau + complement
    torch.testing.assert_close(
        span_likelihood_kl(student, teacher, temperature=tau, scale=False).item(),
        want,
        rtol=1e-9,
        atol=1e-11,
    )


@given(spans=SPANS, tau=TAU, kind=st.sampled_from([k for k in KINDS if k != "k3"]))
def test_a_distance_zero_only_at_agreement(spans, tau, kind):
    student, teacher = split(spans)
    assert span_likelihood_kl(student, teacher, temperature=tau, kind=kind) >= -1e-10 * tau
    at_rest = teacher.clone().requires_grad_()
    assert span_likelihood_kl(at_rest, teacher, temperature=tau, kind=kind).item() == pytest.approx(
        0, abs=1e-10
    )
    assert gradient(at_rest, teacher, temperature=tau, kind=kind).abs().max() < 1e-9
    apart = (student.detach() - teacher).abs() > 1e-3
    # at a small temperature, likelihoods of e^-300 are equal to zero and to each other
    if tau > 99 and apart.all():
        slope = gradient(student, teacher, temperature=tau, kind=kind)
        assert (slope.sign() == (student.detach() - teacher).sign()).all()


def test_scaled_gradients_do_not_shrink_with_the_temperature():
    student, teacher = split([(-5.0, -2.0), (-0.5, -8.0)])
    limit = teacher / student.detach() - 1
    torch.testing.assert_close(
        gradient(student, teacher, temperature=1e7), limit, rtol=1e-5, atol=0
    )
    assert gradient(student, teacher, temperature=1e7, scale=False).abs().max() < 1e-5


@given(spans=SPANS)
def test_limit_is_the_limit_and_its_gradient_is_the_closed_form(spans):
    student, teacher = split(spans)
    s = student.detach()
    torch.testing.assert_close(
        gradient(student, teacher, kind="limit"), teacher / s - 1, rtol=0, atol=1e-10
    )
    value = span_likelihood_kl(s, teacher, kind="limit", reduction="none")
    torch.testing.assert_close(
        value, (teacher - s) + teacher * (s / teacher).log(), rtol=0, atol=1e-10
    )
    tau = 1e6
    # a bound on it
    next_term = (teacher.square() + s.square()) * (1 + (s / teacher).log().abs()) / tau
    near = span_likelihood_kl(s, teacher, temperature=tau, reduction="none")
    assert ((near - value).abs() <= next_term + 1e-6).all()


@given(
    spans=st.lists(st.tuples(st.floats(-20, -1e-3), st.floats(-20, -1e-3)), min_size=1, max_size=6)
)
def test_k2_and_k3_in_closed_form(spans):
    student, teacher = split(spans)
    d = teacher - student.detach()
    torch.testing.assert_close(gradient(student, teacher, kind="k2"), -d, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        gradient(student, teacher, kind="k3"), 1 - d.exp(), rtol=1e-12, atol=1e-10
    )
    value = span_likelihood_kl(student.detach(), teacher, kind="k3", reduction="none")
    torch.testing.assert_close(value, d.exp() - 1 - d, rtol=1e-9, atol=1e-10)


def test_expected_gradients_on_the_students_own_text():
    """Over all of four texts: k2 descends the reverse KL, k3 the forward KL, the limit neither."""
    z = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([0.5, -0.2, -0.9, 0.4], dtype=torch.float64).log_softmax(0)
    logp = z.log_softmax(0)

    def grad(loss):
        return torch.autograd.grad(loss, z, retain_graph=True)[0]

    expected = {}
    for kind in ("k2", "k3", "limit"):
        loss = span_likelihood_kl(logp, teacher, kind=kind, reduction="none")
        expected[kind] = grad((logp.detach().exp() * loss).sum())
    reverse = grad((logp.exp() * (logp - teacher)).sum())
    forward = grad((teacher.exp() * (teacher - logp)).sum())
    torch.testing.assert_close(expected["k2"], reverse, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected["k3"], forward, rtol=0, atol=1e-12)
    assert min((expected["limit"] - x).abs().max() for x in (reverse, forward)) > 1e-2


@given(spans=SPANS, tau=TAU, kind=st.sampled_from([k for k in KINDS if k != "k3"]))
def test_the_sum_is_the_sum_of_the_spans(spans, tau, kind):
    student, teacher = split(spans)
    each = span_likelihood_kl(student, teacher, temperature=tau, kind=kind, reduction="none")
    assert each.shape == student.shape
    torch.testing.assert_close(
        each.sum(), span_likelihood_kl(student, teacher, temperature=tau, kind=kind)
    )
    alone = span_likelihood_kl(student[:1], teacher[:1], temperature=tau, kind=kind)
    torch.testing.assert_close(each[0], alone)


@given(spans=SPANS)
def test_single_precision_is_close_to_double(spans):
    narrow, wide = (
        gradient(*split(torch.tensor(spans, dtype=torch.float32).tolist(), dtype))
        for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(narrow.double(), wide, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "k3"])
def test_finite_at_the_edges(dtype, kind):
    edges = [0.0, -1e-30, -1e-8, -1e-3, -50.0, -1e4]
    student, teacher = split([(s, t) for s in edges for t in edges], dtype)
    for tau in (1.0, 100.0):
        assert span_likelihood_kl(student, teacher, temperature=tau, kind=kind).isfinite()
        assert gradient(student, teacher, temperature=tau, kind=kind).isfinite().all()


def test_a_banned_span_is_finite():
    student, teacher = split([(-math.inf, -1.0), (-1.0, -math.inf), (-math.inf, -math.inf)])
    for kind in ("binary", "limit", "abs"):
        assert span_likelihood_kl(student, teacher, kind=kind).isfinite()
        assert gradient(student, teacher, kind=kind).isfinite().all()


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
    with pytest.raises(ValueError, match="kind = 'k1'; want one of binary, limit, abs, k2, k3"):
        span_likelihood_kl(two, two, kind="k1")
    with pytest.raises(ValueError, match="reduction = 'mean'; want sum or none"):
        span_likelihood_kl(two, two, reduction="mean")
    with pytest.raises(ValueError, match="temperature = 0"):
        span_likelihood_kl(two, two, temperature=0)
