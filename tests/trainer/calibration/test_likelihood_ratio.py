"""Credit by span: what counts as settled, and the refusal across tokenizers before anything is
loaded.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from byte_cases import masses_of, tokens_of
from runs import config

from reflux.tokenalign.byte_trie import ByteTrie
from reflux.tokenalign.byte_windows import byte_windows, settled_prefix_logp
from reflux.tokenalign.credit import following_span
from reflux.tokenalign.vocab_map import Vocabulary
from reflux.trainer.calibration import likelihood_ratio
from reflux.trainer.calibration.likelihood_ratio import LikelihoodRatio
from reflux.trainer.config.roles import calibrate_advice
from reflux.trainer.data.batch import Prompt, Rollout, Sample, pack
from reflux.trainer.data.chat import Chat
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.losses import HeadInputs
from reflux.trainer.phase import TextScore
from reflux.trainer.rollouts.scoring import Prefixes, align_texts


def reward(talkers, tmp_path, proxy, engine=None, **calibration):
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        proxy={"path": str(talkers / proxy)},
        calibration={"mode": "distillable", "truncated": "score_prefix", "score_norm": "sum"}
        | calibration,
    )
    engine = engine or SimpleNamespace(frozen=lambda role: role.path)
    return LikelihoodRatio(cfg, engine, Chat(str(talkers / "policy")))


def test_span_credit_across_tokenizers_is_refused_before_the_proxy_is_loaded(talkers, tmp_path):
    def load(role):
        raise AssertionError("the proxy was loaded first")

    with pytest.raises(ValueError, match="Use calibration.credit = 'prefix' or.*allow_biased"):
        reward(talkers, tmp_path, "proxy", SimpleNamespace(frozen=load), credit="span")


def test_a_text_that_the_proxy_has_no_positions_for_is_unaligned(talkers, tmp_path, monkeypatch):
    """It ended the run, or was read beyond the proxy's context in silence."""
    engine = SimpleNamespace(frozen=lambda role: role.path, sum=float)
    by = reward(talkers, tmp_path, "proxy", engine, max_unaligned=0.5)
    short, long = (
        Rollout(Prompt(0, ()), (1,), ids, (-1.0,) * len(ids), -0.5, text, False)
        for text in ("1+2", "1+2 is => 3")
        for ids in [by.chat.encode(text)]
    )
    read = len(by.proxy_chat.prompt_ids(())) + len(by.proxy_chat.encode(long.text))
    seen, sums = [], MetricSums()
    monkeypatch.setattr(by, "_proxy_scores", lambda _, aligned, at: seen.append(at) or {})
    own = [TextScore(np.zeros(len(r.ids)), 0.0) for r in (short, long)]
    for room in (read, read - 1):  # the stop behind the text is predicted at its last token
        by.proxy_chat.positions = room
        by.score([short, long], own, None, sums)
    assert seen == [[0, 1], [0]] and sums.sums["cal/unaligned"] == [1.0, 4.0]
    by = reward(talkers, tmp_path, "proxy", engine, max_unaligned=0.4)
    by.proxy_chat.positions = read - 1
    with pytest.raises(
        ValueError,
        match=f"50% of the rollouts are longer than the {read - 1} positions of .*proxy; want at "
        "most 40% .*max_unaligned.. Lower rollout.max_tokens",
    ) as error:
        by.score([short, long], own, None, MetricSums())
    assert "round-trip" not in str(error.value)
    with pytest.raises(ValueError, match="100% of .* round-trip .* or are longer .*proxy .50%.; w"):
        by._check_unaligned(2.0, 1, 2)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("same_ids", [False, True])
@pytest.mark.parametrize("credit", ["sequence", "span"])
def test_check_says_the_same(talkers, tmp_path, credit, same_ids, biased):
    calibration = {"credit": credit, "allow_biased": biased, "score_norm": "sum"}
    cfg = config(talkers, tmp_path / "run", "calibrate", calibration=calibration)
    advice = calibrate_advice(cfg, same_ids)
    if credit == "span" and not same_ids and not biased:
        assert advice.level == "error" and "credit = 'prefix'" in advice.text
    else:
        assert advice is None


@pytest.mark.parametrize(
    "proxy, calibration, earlier_spans",
    [
        ("teacher", {"credit": "span"}, True),  # the policy's token ids
        ("proxy", {"credit": "span", "allow_biased": True}, True),  # as before
        ("proxy", {"credit": "sequence"}, False),
    ],
)
@pytest.mark.parametrize("ended", [False, True])
def test_what_is_settled(talkers, tmp_path, proxy, calibration, earlier_spans, ended):
    by = reward(talkers, tmp_path, proxy, **calibration)
    ids = by.chat.encode("1+2 is => 3") + ((by.chat.stop_id,) if ended else ())
    rollout = Rollout(Prompt(0, ()), (1,), ids, (-1.0,) * len(ids), -0.5, "1+2 is => 3", ended)
    (aligned,) = align_texts(by.chat, by.proxy_chat, [rollout], same=by.same_ids)
    proxy_score = TextScore(np.full(len(aligned.scorer_ids), -2.0), -0.25)
    score = by._score_one(rollout, aligned, proxy_score, TextScore(np.full(len(ids), -1.0), -0.5))
    if not earlier_spans:
        assert score.settled is None
        return
    want = following_span(score.span, len(score.span_value), len(ids))
    assert np.array_equal(score.settled, want) and want[-1] == len(want) - 1 or not by.same_ids
    assert len(score.settled) == len(ids) and score.settled[0] == 0 < score.settled[-1]


@pytest.mark.parametrize("proxy", ["teacher", "proxy"])
@pytest.mark.parametrize("ended", [False, True])
def test_what_the_text_before_a_token_is_worth(talkers, tmp_path, proxy, ended):
    """The proxy's byte prefixes at each token's first byte, minus the policy's tokens before."""
    by = reward(talkers, tmp_path, proxy, device_engine(), credit="prefix")
    ids = by.chat.encode("1+2 is => 3") + ((by.chat.stop_id,) if ended else ())
    rollout = Rollout(Prompt(0, ()), (1,), ids, (-1.0,) * len(ids), -0.5, "1+2 is => 3", ended)
    (aligned,) = align_texts(by.chat, by.proxy_chat, [rollout], same=by.same_ids)
    proxy_score = TextScore(np.full(len(aligned.scorer_ids), -2.0), -0.25, -np.arange(12.0) / 2)
    score = by._score_one(rollout, aligned, proxy_score, TextScore(np.full(len(ids), -1.0), -0.5))
    t = np.arange(len(ids))
    if by.same_ids:
        want = -2.0 * t + t
    else:
        start = [len(by.chat.table.bytes_of(ids[:k])) for k in t]
        want = -np.array(start) / 2 + t
    np.testing.assert_allclose(score.before, want)


@pytest.mark.parametrize("proxy", ["teacher", "proxy"])
@pytest.mark.parametrize("denominator, stop", [("policy", -1.5), ("reference", -0.125)])
def test_content_and_stop_are_of_one_denominator(
    talkers, tmp_path, monkeypatch, proxy, denominator, stop
):
    """The sampler's, the trained policy's and the reference's stop terms all differ."""
    engine = SimpleNamespace(frozen=lambda role: role.path, sum=float)
    by = reward(talkers, tmp_path, proxy, engine, denominator=denominator, span_clip=0.0)
    ids = (*by.chat.encode("1+2 is => 3"), by.chat.stop_id)
    text = Rollout(Prompt(0, ()), (1,), ids, (-9.0,) * len(ids), -9.0, "1+2 is => 3", True)
    (aligned,) = align_texts(by.chat, by.proxy_chat, [text], same=by.same_ids)
    found = TextScore(np.full(len(aligned.scorer_ids), -2.0), -0.25)
    monkeypatch.setattr(likelihood_ratio, "score_ids", lambda *a, **k: [found])
    policy = TextScore(np.full(len(ids), -1.0), -1.5)
    reference = TextScore(np.full(len(ids), -3.0), -0.125)
    (score,) = by.score([text], [policy], [reference], MetricSums())
    content = {"policy": -1.0, "reference": -3.0}[denominator] * (len(ids) - 1)
    assert score.stop == pytest.approx(-0.25 - stop)
    assert score.value == pytest.approx(found.logp.sum() - content + score.stop)


def device_engine():
    return SimpleNamespace(frozen=lambda role: role.path, device="cpu")


@pytest.mark.parametrize("text", ["1+2 is => 3", "x"])
def test_prefixes_of_a_scorer_are_those_of_its_own_rows(talkers, text):
    """Prefixes.score against the same quantity by sums over softmax rows."""
    chat = Chat(str(talkers / "proxy"))
    trie = ByteTrie.of(Vocabulary(chat.table, chat.stop_ids, chat.vocab_size))
    ids = (*chat.encode(text), chat.stop_id)
    g = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 8, generator=g) for n in (len(ids), chat.vocab_size))
    out = HeadInputs(hidden, head, None, chat.vocab_size)
    (batch,) = pack([Sample(Rollout(Prompt(0, ()), (1,), ids, (), 0.0, "", True))],
                    tokens=64, seq_len=64)  # fmt: skip
    space = chat.table.bytes_of(ids[:-1]) == b" " + text.encode()
    prefixes = Prefixes(trie, [space])
    prefixes.score(out, batch)
    windows = byte_windows(trie, tokens_of([ids], [space]))
    masses = masses_of(windows, trie, (hidden @ head.T).double().softmax(1))
    want = settled_prefix_logp(windows, masses).numpy()
    np.testing.assert_allclose(prefixes.found[0], want, atol=1e-5)
    assert want[0] <= 0 and len(want) == len(text) + 1 and (np.diff(want) < 1e-9).all()
    left_out = Prefixes(trie, [None])
    left_out.score(out, batch)
    assert left_out.found == {}
