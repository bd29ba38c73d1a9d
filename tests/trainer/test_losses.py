"""Every loss against its definition: estimators by enumerating a small vocabulary, divergences in
float64, sums and not means.

Shapes: T prefixes, V vocabulary, D hidden. E over the vocabulary is exact: each loss is evaluated
at every token of every prefix.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.losses import (
    HeadInputs,
    distill_kl,
    exact_reference_kl,
    nll,
    nll_metrics,
    policy_gradient,
    reference_kl,
    span_kl,
    token_logprob_of,
)

T, V, D, PAD = 3, 5, 4, 2
SEEDS = st.integers(0, 2**32 - 1)


def outputs(
    seed: int, scale: float = 1.0, rows: int = T, vocab: int = V, softcap: float | None = None
) -> HeadInputs:
    """A head with PAD junk rows behind the vocabulary: padded columns must never count."""
    g = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(rows, D, generator=g, dtype=torch.float64)
    head = torch.randn(vocab + PAD, D, generator=g, dtype=torch.float64)
    head[vocab:] = 50.0
    return HeadInputs(hidden, head, softcap, vocab)


def logp_of(out: HeadInputs, temperature: float = 1.0) -> torch.Tensor:
    logits = out.hidden_TD @ out.head_VD[: out.vocab_size].t()
    logits = out.softcap * torch.tanh(logits / out.softcap) if out.softcap else logits
    return (logits / temperature).log_softmax(-1)


def trainable(seed: int, **options) -> HeadInputs:
    out = outputs(seed, **options)
    return out._replace(
        hidden_TD=out.hidden_TD.requires_grad_(), head_VD=out.head_VD.requires_grad_()
    )


def gradients(total, out: HeadInputs):
    return torch.autograd.grad(total, (out.hidden_TD, out.head_VD), retain_graph=True)


def same(got, want, atol=1e-9):
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=atol)


def every_token(out: HeadInputs) -> tuple[HeadInputs, torch.Tensor]:
    """Each prefix once per token of the vocabulary, and those tokens: [T * V]."""
    return out._replace(hidden_TD=out.hidden_TD.repeat_interleave(V, 0)), torch.arange(V).repeat(
        len(out.hidden_TD)
    )


def expected(loss_of_token: torch.Tensor, behaviour: HeadInputs) -> torch.Tensor:
    """E over tokens of the behaviour policy, summed over prefixes. The weights are no part of the
    graph.
    """
    return (logp_of(behaviour).exp().detach().flatten() * loss_of_token).sum()


def one_by_one(loss, *columns: torch.Tensor) -> torch.Tensor:
    """A loss that returns a sum, for each row alone."""
    return torch.stack([loss(*(c[i : i + 1] for c in columns))[0] for i in range(len(columns[0]))])


def reverse_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum()


@given(SEEDS)
def test_token_logprob_reads_the_vocabulary_and_not_the_padding(seed):
    out = trainable(seed, softcap=3.0)
    target = torch.tensor([0, 4, -1])
    lp = token_logprob_of(out, target, temperature=0.7, entropy=True)
    truth = logp_of(out, 0.7)
    torch.testing.assert_close(
        lp.logp, torch.stack([truth[0, 0], truth[1, 4], truth[0, 0] * 0]), rtol=1e-7, atol=1e-9
    )
    torch.testing.assert_close(
        lp.entropy, -(truth.exp() * truth).sum(-1) * torch.tensor([1, 1, 0]), rtol=1e-7, atol=1e-9
    )
    same(gradients(lp.logp.sum(), out), gradients(truth[0, 0] + truth[1, 4], out))


# equation (5)
def test_clipping_by_hand():
    """Inside 1 +- 0.2 the ratio, outside only where clipping is the pessimistic choice."""
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 2.0, 0.5, 0.9, 1.0, 1.1, 2.0], dtype=torch.float64)
    advantage = torch.tensor([1.0] * 5 + [-2.0] * 5, dtype=torch.float64)
    logp = ratio.log().requires_grad_()
    total, metrics = policy_gradient(logp, torch.zeros(10), advantage, 0.2)
    gain = torch.tensor(
        [0.5, 0.9, 1.0, 1.1, 1.2, -1.6, -1.8, -2.0, -2.2, -4.0], dtype=torch.float64
    )
    assert total.item() == pytest.approx(-gain.sum().item())
    slope = torch.autograd.grad(total, logp)[0]
    live = torch.tensor([1, 1, 1, 1, 0, 0, 1, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(slope, -ratio * advantage * live)
    assert metrics["clipped"] == 4 and metrics["max/mismatch"] == pytest.approx(
        torch.tensor(2.0).log().item()
    )
    assert metrics["ratio"].item() == pytest.approx(ratio.sum().item())
    assert metrics["approx_kl"].item() == pytest.approx((ratio - 1 - ratio.log()).sum().item())


@given(SEEDS)
def test_at_ratio_one_it_is_the_policy_gradient(seed):
    out, advantage = (
        trainable(seed),
        torch.randn(T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
    )
    target = torch.tensor([0, 2, 4])
    logp = token_logprob_of(out, target).logp
    total, metrics = policy_gradient(logp, logp.detach(), advantage, 0.2)
    same(gradients(total, out), gradients(-(advantage * logp).sum(), out))
    assert metrics["clipped"] == 0 and metrics["mismatch"] == 0


@given(SEEDS)
def test_k1_as_a_reward_is_the_reverse_kl(seed):
    policy, original = trainable(seed), outputs(seed + 1)
    rows, target = every_token(policy)
    logp = token_logprob_of(rows, target).logp
    reward = -(logp_of(policy) - logp_of(original)).detach().flatten()
    per_token = one_by_one(lambda *c: policy_gradient(*c, 0.2), logp, logp.detach(), reward)
    same(
        gradients(expected(per_token, policy), policy),
        gradients(reverse_kl(logp_of(policy), logp_of(original)), policy),
    )


@given(SEEDS)
def test_an_advantage_that_ignores_the_token_teaches_nothing(seed):
    """T7: a baseline is free, and a set mean over the top k as advantage is no signal."""
    policy = trainable(seed)
    rows, target = every_token(policy)
    logp = token_logprob_of(rows, target).logp
    per_prefix = torch.randn(
        T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).repeat_interleave(V)
    per_token = one_by_one(lambda *c: policy_gradient(*c, 0.2), logp, logp.detach(), per_prefix)
    same(gradients(expected(per_token, policy), policy), [torch.zeros_like(x) for x in policy[:2]])


# the anchor
@pytest.mark.parametrize(
    "estimator, direction, stale",
    [
        ("k2_loss", "reverse", False),
        ("k3_is", "reverse", False),
        ("k3_is", "reverse", True),
        ("k3_loss", "forward", False),
    ],
)
@given(seed=SEEDS)
def test_what_each_estimator_descends(estimator, direction, stale, seed):
    policy, original = trainable(seed), outputs(seed + 1)
    behaviour = outputs(seed + 2) if stale else policy
    rows, target = every_token(policy)
    logp = token_logprob_of(rows, target).logp
    old = logp_of(behaviour).detach().flatten()
    per_token = one_by_one(
        lambda *c: reference_kl(*c, estimator), logp, old, logp_of(original).flatten()
    )
    p, q = logp_of(policy), logp_of(original)
    truth = reverse_kl(p, q) if direction == "reverse" else reverse_kl(q, p)
    same(gradients(expected(per_token, behaviour), policy), gradients(truth, policy))
    if estimator != "k2_loss" and not stale:  # k3 estimates the value too
        assert expected(per_token, policy).item() == pytest.approx(
            reverse_kl(p, q).item(), abs=1e-10
        )


@given(SEEDS)
def test_k1_as_a_loss_has_no_gradient_which_is_why_it_is_refused(seed):
    policy = trainable(seed)
    rows, target = every_token(policy)
    k1 = token_logprob_of(rows, target).logp - logp_of(outputs(seed + 1)).flatten()
    same(gradients(expected(k1, policy), policy), [torch.zeros_like(x) for x in policy[:2]])
    with pytest.raises(KeyError):
        reference_kl(k1, k1, k1, "k1_loss")


@pytest.mark.parametrize("estimator", ["k2_loss", "k3_is", "k3_loss"])
def test_estimators_are_zero_at_the_start_and_never_touch_the_original(estimator):
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    original = logp.detach().clone().requires_grad_()
    total, metrics = reference_kl(logp, logp.detach(), original, estimator)
    assert total == 0 and metrics["reference_kl"] == 0
    slope, to_original = torch.autograd.grad(total, (logp, original), allow_unused=True)
    assert (slope == 0).all() and to_original is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@given(seed=SEEDS)
def test_the_exact_anchor_is_the_reverse_kl(temperature, seed):
    policy, original = trainable(seed, softcap=4.0), outputs(seed + 1, softcap=3.0)
    total, metrics = exact_reference_kl(policy, original, temperature=temperature)
    truth = reverse_kl(logp_of(policy, temperature), logp_of(original, temperature))
    assert total.item() == pytest.approx(truth.item(), rel=1e-9) and metrics[
        "reference_kl"
    ].item() == pytest.approx(truth.item())
    same(gradients(total, policy), gradients(truth, policy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exact_anchor_is_exactly_zero_before_the_first_step(dtype):
    start = outputs(0)
    start = start._replace(
        hidden_TD=start.hidden_TD.to(dtype).requires_grad_(),
        head_VD=start.head_VD.to(dtype).requires_grad_(),
    )
    copy = start._replace(
        hidden_TD=start.hidden_TD.detach().clone(), head_VD=start.head_VD.detach().clone()
    )
    total, _ = exact_reference_kl(start, copy, temperature=1.0)
    assert total == 0 and all((g == 0).all() for g in gradients(total, start))


# distillation
def divergence(p, q, spec: DistillSection) -> torch.Tensor:
    """Of logp rows, student p and teacher q, by the definitions of docs/method.md and
    arXiv:2306.13649, [T].
    """

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    mixture = torch.logaddexp(q + math.log(spec.beta), p + math.log(1 - spec.beta))
    return {
        "forward": lambda: kl(q, p),
        "reverse": lambda: kl(p, q),
        "jsd": lambda: spec.beta * kl(q, mixture) + (1 - spec.beta) * kl(p, mixture),
    }[spec.divergence]()


def with_tail(row: torch.Tensor, ids: torch.Tensor, tail: str) -> torch.Tensor:
    kept = row.gather(1, ids)
    if tail == "renorm":
        return kept.log_softmax(-1)
    if tail == "drop":
        return kept
    rest = row.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    if tail == "zero_outside_topk" and not row.requires_grad:  # the teacher's
        kept, rest = kept.log_softmax(-1), torch.full_like(rest, -1e4)  # a probability of 0.0
    return torch.cat([kept, rest], 1)


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize(
    "temperature, scale_t2", [(1.0, False), (2.0, False), (2.0, True), (0.5, True)]
)
@given(seed=SEEDS)
def test_full_vocabulary_distillation_is_the_definition(name, temperature, scale_t2, seed):
    """T8: one temperature for both softmaxes, and its square only when asked for."""
    spec = DistillSection(divergence=name, temperature=temperature, scale_t2=scale_t2, beta=0.3)
    student, teacher = trainable(seed, softcap=5.0), outputs(seed + 1)
    total, metrics = distill_kl(student, teacher, spec)
    kl = divergence(logp_of(student, temperature), logp_of(teacher, temperature), spec).sum()
    weight = temperature**2 if scale_t2 else 1.0
    assert total.item() == pytest.approx(weight * kl.item(), rel=1e-6)
    assert metrics["kl"].item() == pytest.approx(kl.item(), rel=1e-6), (
        "the number in the log has no weight"
    )
    same(gradients(total, student), gradients(weight * kl, student), atol=1e-7)


@given(seed=SEEDS)
def test_what_a_loss_measures_changes_nothing_of_it(seed):
    student, teacher = trainable(seed), outputs(seed + 1)
    plain, plain_metrics = distill_kl(student, teacher, DistillSection(temperature=2.0))
    total, metrics = distill_kl(student, teacher, DistillSection(temperature=2.0, measures=True))
    assert total.item() == plain.item() and set(plain_metrics) == {"kl"}
    p, q = logp_of(student, 2.0), logp_of(teacher, 2.0)
    assert metrics["entropy"].item() == pytest.approx(-(p.exp() * p).sum().item(), rel=1e-6)
    assert metrics["top1_agreement"].item() == (p.argmax(-1) == q.argmax(-1)).sum().item()
    _, same_model = distill_kl(student, student, DistillSection(measures=True))
    assert same_model["top1_agreement"].item() == T


TAILS = (
    [("bucket", d) for d in ("forward", "reverse", "jsd")]
    + [("renorm", d) for d in ("forward", "reverse")]
    + [("drop", "forward"), ("zero_outside_topk", "forward"), ("zero_outside_topk", "jsd")]
)


@pytest.mark.parametrize("tail, name", TAILS)
@given(seed=SEEDS, k=st.integers(2, V - 1))
def test_truncated_distillation_is_the_definition(tail, name, seed, k):
    """T8: the tail is the teacher's exact one at the temperature of the loss."""
    spec = DistillSection(
        divergence=name, tail=tail, top_k=k, temperature=1.7, scale_t2=True, beta=0.3
    )
    student, teacher = trainable(seed), outputs(seed + 1)
    total, metrics = distill_kl(student, teacher, spec)
    p, q = logp_of(student, 1.7), logp_of(teacher, 1.7)
    ids = q.topk(k, -1).indices
    kl = divergence(with_tail(p, ids, tail), with_tail(q, ids, tail), spec).sum()
    assert total.item() == pytest.approx(1.7**2 * kl.item(), rel=1e-6, abs=1e-9)
    same(gradients(total, student), gradients(1.7**2 * kl, student), atol=1e-7)
    assert metrics["teacher_mass"].item() == pytest.approx(
        q.gather(1, ids).exp().sum().item(), rel=1e-6
    )


@given(SEEDS, st.sampled_from(["forward", "reverse", "jsd", "skew_forward", "skew_reverse"]))
def test_keeping_everything_or_more_is_the_full_divergence(seed, name):
    student, teacher = trainable(seed), outputs(seed + 1)
    full = distill_kl(student, teacher, DistillSection(divergence=name))[0]
    wanted = gradients(full, student)
    for k in (V, V + 3):
        total, metrics = distill_kl(
            student, teacher, DistillSection(divergence=name, tail="bucket", top_k=k)
        )
        assert total.item() == pytest.approx(full.item(), rel=1e-6, abs=1e-9)
        assert metrics["teacher_mass"].item() == pytest.approx(T)
        same(gradients(total, student), wanted, atol=1e-7)


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd", "skew_forward", "skew_reverse"])
@pytest.mark.parametrize("tail, k", [("full", 0), ("bucket", 2), ("renorm", 2)])
def test_a_student_that_is_the_teacher_is_left_alone(name, tail, k):
    student, teacher = trainable(3), outputs(3)
    total, _ = distill_kl(student, teacher, DistillSection(divergence=name, tail=tail, top_k=k))
    assert abs(total.item()) < 1e-12 and all(
        g.abs().max() < 1e-12 for g in gradients(total, student)
    )


def test_beta_is_the_teachers_weight():
    """T29: towards beta = 0 jsd/beta is the forward KL (GKD's convention), towards 1 jsd/(1-beta)
    the reverse.
    """
    student, teacher = outputs(1), outputs(2)

    def of(**options):
        return distill_kl(student, teacher, DistillSection(**options))[0].item()

    assert of(divergence="jsd", beta=1e-5) / 1e-5 == pytest.approx(
        of(divergence="forward"), rel=1e-3
    )
    assert of(divergence="jsd", beta=1 - 1e-5) / 1e-5 == pytest.approx(
        of(divergence="reverse"), rel=1e-3
    )
    assert of(divergence="jsd", beta=0.3) != pytest.approx(of(divergence="jsd", beta=0.7), rel=1e-2)


# sums, spans, likelihood
def nll_loss(out, ref, target_T):
    total, logp_T = nll(out, target_T, torch.ones(len(target_T)))
    return total, nll_metrics(logp_T, torch.ones(len(target_T)))


@pytest.mark.parametrize(
    "loss",
    [
        lambda out, ref, t: policy_gradient(
            token_logprob_of(out, t).logp, -torch.ones(len(t)), torch.ones(len(t)), 0.2
        ),
        lambda out, ref, t: reference_kl(
            token_logprob_of(out, t).logp,
            -torch.ones(len(t)),
            token_logprob_of(ref, t).logp,
            "k3_is",
        ),
        lambda out, ref, t: exact_reference_kl(out, ref, temperature=1.0),
        lambda out, ref, t: distill_kl(out, ref, DistillSection()),
        lambda out, ref, t: distill_kl(out, ref, DistillSection(tail="bucket", top_k=2)),
        nll_loss,
    ],
    ids=[
        "policy_gradient",
        "reference_kl",
        "exact_reference_kl",
        "distill_kl",
        "distill_topk",
        "nll",
    ],
)
def test_losses_are_sums_so_a_split_changes_nothing(loss):
    """T10, and T11/T13: a rank with no token adds nothing and does not fail."""
    out, ref, target = outputs(1, rows=6), outputs(2, rows=6), torch.tensor([0, 1, 2, 3, 4, 0])
    whole, numbers = loss(out, ref, target)

    def cut(o, a, b):
        return o._replace(hidden_TD=o.hidden_TD[a:b])

    parts = [loss(cut(out, a, b), cut(ref, a, b), target[a:b]) for a, b in ((0, 1), (1, 1), (1, 6))]
    assert sum(p[0] for p in parts).item() == pytest.approx(whole.item(), rel=1e-6)
    for name, value in numbers.items():
        merge = max if name.startswith("max/") else sum
        assert merge([p[1][name] for p in parts]).item() == pytest.approx(value.item(), rel=1e-6), (
            name
        )


def test_span_gradient_reaches_only_tokens_in_spans():
    logp = -torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logp.requires_grad_()
    span, teacher = torch.tensor([0, 0, -1, 1, 2, -1]), torch.tensor([-3.0, -0.1, -1.0])
    total, metrics = span_kl(logp, span, teacher, temperature=100.0)
    (slope,) = torch.autograd.grad(total, logp)
    assert slope[2] == slope[5] == 0 and (slope[[0, 1, 3, 4]] != 0).all() and slope[0] == slope[1]
    student = torch.stack([logp[0] + logp[1], logp[3], logp[4]]).detach()
    assert metrics["aligned"] == 4 and metrics["span_gap"].item() == pytest.approx(
        (teacher - student).sum().item(), rel=1e-6
    )


@given(SEEDS)
def test_span_likelihoods_against_the_definition(seed):
    g = torch.Generator().manual_seed(seed)
    logp, teacher = (-3 * torch.rand(3, generator=g, dtype=torch.float64) - 0.01 for _ in range(2))
    total, _ = span_kl(logp, torch.arange(3), teacher, temperature=5.0)
    u, v = (teacher / 5).exp(), (logp / 5).exp()
    truth = 5 * (u * (u / v).log() + (1 - u) * ((1 - u) / (1 - v)).log()).sum()
    assert total.item() == pytest.approx(truth.item(), rel=1e-4, abs=1e-6)
    assert span_kl(teacher, torch.arange(3), teacher, temperature=5.0)[0].item() == pytest.approx(
        0, abs=1e-6
    )


def test_likelihood_counts_what_is_weighted():
    """The fused loss and its gradient are those of the log-probabilities, to the bit in value."""
    out, target_T = outputs(3, rows=3), torch.tensor([1, 0, 4])
    weight_T = torch.tensor([1.0, 0.0, 0.5])
    hidden_TD = out.hidden_TD.detach().requires_grad_()
    out = out._replace(hidden_TD=hidden_TD)
    total, logp_T = nll(out, target_T, weight_T)
    want_T = token_logprob_of(out, target_T).logp
    want = -(want_T * weight_T).sum()
    assert total.item() == want.item() and not logp_T.requires_grad
    got_TD, want_TD = (torch.autograd.grad(x, hidden_TD)[0] for x in (total, want))
    torch.testing.assert_close(got_TD, want_TD, rtol=1e-5, atol=1e-7)
    metrics = nll_metrics(logp_T, weight_T)
    assert metrics["nll"].item() == want.item() and metrics["off_policy"] == 1.5


def documented(file: str, name: str) -> str:
    """The formula of a divergence, as Python: KL(a, b), teacher q, student p, mixture m."""
    text = (Path(__file__).parents[2] / file).read_text()
    (line,) = re.findall(rf"^(?:\| `{name}` \| |    {name} +)(.*)$", text, re.M)
    formula = re.split(r" \(\[| \| |,  m", line)[0]
    for old, new in (("−", "-"), ("‖", ","), ("||", ","), ("β", "beta")):
        formula = formula.replace(old, new)
    formula = formula.replace(" - ", "-").replace("(1-beta)", "(1-beta) ")
    return re.sub(r"(beta|\)) *(KL|[pq]\b)", r"\1 * \2", formula)


@pytest.mark.parametrize("file", ["docs/kernels.md", "kernels/_divergence.py"])
@pytest.mark.parametrize("beta", [0.2, 0.9])
@pytest.mark.parametrize("name", ["forward", "reverse", "jsd", "skew_forward", "skew_reverse"])
def test_a_divergence_is_what_its_documented_formula_gives(name, beta, file):
    """beta weighs the teacher of jsd and skew_forward, and the student of skew_reverse."""
    torch.manual_seed(0)
    student, teacher = (
        HeadInputs(torch.randn(5, 8).double(), torch.randn(30, 8).double(), None, 30)
        for _ in range(2)
    )
    p, q = ((x.hidden_TD @ x.head_VD.T).softmax(1) for x in (student, teacher))
    names = {"p": p, "q": q, "m": beta * q + (1 - beta) * p, "beta": beta}
    names["KL"] = lambda a, b: float((a * (a.log() - b.log())).sum())
    got = distill_kl(student, teacher, DistillSection(divergence=name, beta=beta))[0]
    assert float(got) == pytest.approx(eval(documented(file, name), names), rel=1e-9)
