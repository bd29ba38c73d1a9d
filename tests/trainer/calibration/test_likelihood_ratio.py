"""Credit by span: what counts as settled, and the refusal across tokenizers before anything is
loaded.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from runs import config

from reflux.tokenalign.credit import following_span
from reflux.trainer.calibration.likelihood_ratio import LikelihoodRatio
from reflux.trainer.config.roles import calibrate_advice
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.phase import TextScore
from reflux.trainer.rollouts.scoring import align_texts


def reward(talkers, tmp_path, proxy, engine=None, **calibration):
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        proxy={"path": str(talkers / proxy)},
        calibration={"mode": "distillable", "truncated": "score_prefix"} | calibration,
    )
    engine = engine or SimpleNamespace(frozen=lambda role: role.path)
    return LikelihoodRatio(cfg, engine, Chat(str(talkers / "policy")))


def test_span_credit_across_tokenizers_is_refused_before_the_proxy_is_loaded(talkers, tmp_path):
    def load(role):
        raise AssertionError("the proxy was loaded first")

    with pytest.raises(ValueError, match="Use calibration.credit = 'sequence'.*allow_biased"):
        reward(talkers, tmp_path, "proxy", SimpleNamespace(frozen=load), credit="span")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("same_ids", [False, True])
@pytest.mark.parametrize("credit", ["sequence", "span"])
def test_check_says_the_same(talkers, tmp_path, credit, same_ids, biased):
    calibration = {"credit": credit, "allow_biased": biased}
    cfg = config(talkers, tmp_path / "run", "calibrate", calibration=calibration)
    advice = calibrate_advice(cfg, same_ids)
    if credit == "span" and not same_ids and not biased:
        assert advice.level == "error" and "credit = 'sequence'" in advice.text
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
    score = by._score_one(rollout, aligned, proxy_score, np.full(len(ids), -1.0))
    if not earlier_spans:
        assert score.settled is None
        return
    want = following_span(score.span, len(score.span_value), len(ids))
    assert np.array_equal(score.settled, want) and want[-1] == len(want) - 1 or not by.same_ids
    assert len(score.settled) == len(ids) and score.settled[0] == 0 < score.settled[-1]
