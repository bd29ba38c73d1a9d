"""Signal and noise of gradients: formulas on vectors by hand, the measured ones against
transformers' autograd, weights untouched.
"""

import math
import os
from functools import partial

import numpy as np
import pytest
import torch
from assets import free_port
from runs import config

from reflux.trainer.data.batch import Prompt, Rollout, TeacherView
from reflux.trainer.data.chat import Chat
from reflux.trainer.diagnosis.gradient_snr import (
    Moments,
    compare_gradients,
    deal,
    gradient_noise,
    gradients_of,
    last_block_only,
    signal_to_noise,
    token_divergence,
)
from reflux.trainer.diagnosis.measure import TokenStats
from reflux.trainer.engine.engine import Engine
from reflux.trainer.runs.stats import jackknife, over_seeds

TEXTS = [(3, 9, 4), (5, 8), (7, 7, 7, 20), (11, 2)]


def moments(vectors_BD) -> Moments:
    g = np.asarray(vectors_BD, float)
    return Moments((g**2).sum(1), g @ g.sum(0))


def text(prompt=0, sampled_by="student", ids=(5, 6), prompt_ids=(1, 4)) -> TokenStats:
    rollout = Rollout(
        Prompt(prompt, ({"role": "user", "content": f"Ask {prompt}"},)),
        prompt_ids,
        ids,
        (0.0,) * len(ids),
        0.0,
        "ab",
        True,
    )
    return TokenStats(rollout, sampled_by, None, *[None] * 10)


def noise_between(engine, teacher, chats, stats, **options):
    return gradient_noise(
        engine,
        deal(stats, 4),
        partial(token_divergence, engine, teacher),
        lambda s: TeacherView(chats[1].prompt_ids(s.rollout.prompt.messages)),
        **options,
    )


def test_two_gradients_by_hand():
    """1 + e and 1 - e: mean 1, mean squared deviation e^2; without bias (1 - e^2) / (2 e^2), the
    product of the two over v.
    """
    for e in (0.5, 2.0):
        m = moments([[1 + e], [1 - e]])
        assert signal_to_noise(*m.all(), unbiased=False) == pytest.approx(1 / e**2)
        assert signal_to_noise(*m.all()) == pytest.approx((1 - e**2) / (2 * e**2))


def test_equal_gradients_and_too_few_have_no_ratio():
    assert math.isnan(signal_to_noise(*moments([[1.0], [1.0]]).all()))
    assert math.isnan(signal_to_noise(*moments([[1.0]]).all()))
    assert math.isnan(signal_to_noise(*moments([[0.0], [0.0]]).all(), unbiased=False))


def test_unbiased_is_the_mean_product_of_different_gradients():
    g = np.random.default_rng(0).normal(0.3, 1, (7, 5))
    products = [g[a] @ g[b] for a in range(7) for b in range(7) if a != b]
    v = ((g - g.mean(0)) ** 2).sum() / 6
    assert signal_to_noise(*moments(g).all()) == pytest.approx(np.mean(products) / v)


def test_pure_noise_has_no_signal_on_average():
    # 1 / v has a bias of its own in few dimensions
    draws = np.random.default_rng(1).normal(size=(2000, 8, 200))
    unbiased = [signal_to_noise(*moments(g).all()) for g in draws]
    plain = [signal_to_noise(*moments(g).all(), unbiased=False) for g in draws]
    assert abs(np.mean(unbiased)) < 4 * np.std(unbiased) / math.sqrt(2000)
    assert np.mean(plain) == pytest.approx(1 / 7, rel=0.02)


def test_moments_without_a_gradient_are_those_of_the_others():
    g = np.random.default_rng(2).normal(size=(5, 4))
    for b in range(5):
        assert moments(g).without(b) == pytest.approx(moments(np.delete(g, b, 0)).all())


def test_scale_and_order_change_nothing():
    g = np.random.default_rng(3).normal(0.5, 1, (6, 4))
    want = compare_gradients({"student": moments(g)}).student.unbiased
    for other in (7.0 * g, g[::-1]):
        got = compare_gradients({"student": moments(other)}).student.unbiased
        assert got == pytest.approx(want)


def test_sources_are_compared_in_pairs():
    """The same noise in both: the interval of the difference is far narrower than those of the
    two.
    """
    g = np.random.default_rng(4).normal(1, 1, (16, 50))
    compared = compare_gradients({"student": moments(1.1 + g), "teacher": moments(g)})
    on, off, difference = (
        compared.student.unbiased,
        compared.teacher.unbiased,
        compared.on_minus_off,
    )
    assert difference.off == "teacher" and difference.n == 16
    assert difference.mean == pytest.approx(on.mean - off.mean) and difference.low > 0
    same = compare_gradients({"student": moments(g), "dataset": moments(g)}).on_minus_off
    assert same.mean == same.low == same.high == 0 and on.high > on.low
    assert compare_gradients({"teacher": moments(g)}).on_minus_off is None


def test_jackknife_of_a_mean_is_students_t():
    x = [1.0, 4.0, 2.0, 8.0]
    got, want = jackknife(np.mean(x), [np.mean(np.delete(x, i)) for i in range(4)]), over_seeds(x)
    assert got == pytest.approx(want) and math.isnan(jackknife(1.0, [2.0]).low)


def test_prompts_are_dealt_whole_and_alike():
    stats = [text(i, "student") for i in (0, 1, 2, 3, 4) for _ in range(3)]
    stats += [text(i, "teacher") for i in (4, 3, 1, 0) for _ in range(2)]
    prompts = {w: [[s.prompt for s in g] for g in groups] for w, groups in deal(stats, 3).items()}
    # prompt 2 has no text by the teacher
    assert prompts == {w: [[0, 0, 4, 4], [1, 1], [3, 3]] for w in ("student", "teacher")}
    assert len(deal(stats, 99)["student"]) == 4 and deal([], 4) == {}
    disjoint = [text(0, "student"), text(1, "teacher")]
    assert deal(disjoint, 4) == {"student": [], "teacher": []}


@pytest.fixture
def pair(talkers, tmp_path, titan_process):
    os.environ["MASTER_PORT"] = str(free_port())
    engine = Engine(config(talkers, tmp_path / "run", "diagnose"))
    chats = Chat(str(talkers / "policy")), Chat(str(talkers / "teacher"))
    engine.vocab_size = min(engine.vocab_size, chats[0].vocab_size)
    yield engine, engine.frozen(engine.cfg.teacher), chats
    engine.close()


def by_transformers(talkers, chat, ids, divergence) -> torch.Tensor:
    """The gradient of one text's KL in the last block and the head, flat, on one process; the
    embedding is a given.
    """
    from transformers import AutoModelForCausalLM

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(talkers / name, dtype=torch.float32)
        for name in ("policy", "teacher")
    )
    for p in student.parameters():
        p.requires_grad_(False)
    watched = [*student.model.layers[-1].parameters(), student.lm_head.weight]
    for p in watched:
        p.requires_grad_(True)
    prompt = chat.prompt_ids(({"role": "user", "content": f"Ask {TEXTS.index(ids)}"},))
    ids_NL = torch.tensor([prompt + ids])
    embedded_NLD = student.model.embed_tokens(ids_NL).detach()
    logp, logq = (
        z[0, len(prompt) - 1 : -1, : chat.vocab_size].log_softmax(-1)
        for z in (student(inputs_embeds=embedded_NLD).logits, teacher(ids_NL).logits.detach())
    )
    kl = (
        (logq.exp() * (logq - logp)).sum()
        if divergence == "forward"
        else (logp.exp() * (logp - logq)).sum()
    )
    return torch.cat([g.flatten() for g in torch.autograd.grad(kl, watched)]).double()


@pytest.mark.filterwarnings("ignore")
def test_gradients_are_those_of_transformers_and_leave_nothing_behind(talkers, pair):
    engine, teacher, chats = pair
    before = {n: p.full_tensor().clone() for n, p in engine.model.state_dict().items()}
    stats = [
        text(i, "student", ids, chats[0].prompt_ids(({"role": "user", "content": f"Ask {i}"},)))
        for i, ids in enumerate(TEXTS)
    ]
    advanced = []

    def noise_of(stats, **options):
        return noise_between(engine, teacher, chats, stats, **options)

    noise = noise_of(stats, tokens=999, advance=advanced.append)
    for d in ("forward", "reverse"):
        vectors = torch.stack([by_transformers(talkers, chats[0], ids, d) for ids in TEXTS]).numpy()
        want = signal_to_noise(*moments(vectors).all())
        assert noise.of(d).student.unbiased.mean == pytest.approx(want, rel=1e-4), d
    assert noise.batches == noise.texts_of_each == 4 and noise.tokens == {"student": 11}
    assert sum(advanced) == gradients_of(deal(stats, 4)) == 16
    assert all(p.grad is None for p in engine.model.parameters()) and torch.is_grad_enabled()
    assert all(
        torch.equal(p.full_tensor(), before[n]) for n, p in engine.model.state_dict().items()
    )
    assert noise_of(stats[:1], tokens=999) is None
    again = noise_of(stats[::-1], tokens=8).reverse.student.unbiased
    assert again == pytest.approx(noise.reverse.student.unbiased, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_only_the_last_block_keeps_a_graph(pair):
    engine, _, _ = pair
    from reflux.trainer.engine.forward import hidden_states

    ids_NL = torch.tensor([[3, 4, 5]])
    blocks = list(engine.model.layers.values())
    seen = []
    hooks = [
        b.register_forward_hook(lambda m, i, out: seen.append(out.requires_grad)) for b in blocks
    ]
    with last_block_only(engine.model):
        for _ in range(2):
            hidden_states(engine.model, ids_NL, torch.arange(3)[None]).sum().backward()
    hidden_states(engine.model, ids_NL, torch.arange(3)[None]).sum().backward()
    for hook in hooks:
        hook.remove()
    assert seen == [False, True] * 2 + [True, True]
