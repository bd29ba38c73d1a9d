"""Spelling pays under the sampled ids, and not under the text's marginal; what is canonical."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from byte_cases import RandomModel
from runs import config

from reflux.tokenalign.next_byte import text_probability
from reflux.trainer.calibration import likelihood_ratio, spellings
from reflux.trainer.calibration.likelihood_ratio import LikelihoodRatio
from reflux.trainer.calibration.spellings import canonical_ids, canonical_share, marginal_excess
from reflux.trainer.config.sections import CalibrationSection
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.phase import TextScore
from reflux.trainer.rollouts.scoring import align_texts

PIECES = ["a", "b", "ab", "aba"]
TEXTS = [b"a", b"b", b"ab", b"aba", b"abab"]


def spellings_of(model, text):
    return [
        (*ids, model.stop)
        for n in range(1, len(text) + 1)
        for ids in product(range(model.stop), repeat=n)
        if b"".join(model.pieces[i] for i in ids) == text
    ]


class Respelled:
    """The byte distribution of `model`, its spellings drawn by `share` of the canonical one."""

    def __init__(self, model, share):
        self.model, self.share = model, share

    def logp(self, text, ids):
        """log p(text) + log p(ids | text)"""
        known = spellings_of(self.model, text)
        own = self.model.cut(text)
        others = (1 - self.share) / max(len(known) - 1, 1)
        given = 1.0 if len(known) == 1 else self.share if ids == own else others
        whole = text_probability(self.model, self.model.vocabulary, text)
        return np.log(whole) + np.log(given)


def test_two_policies_of_one_byte_distribution_get_equal_rewards_by_the_marginal():
    """Every text and every spelling. By the sampled ids, whoever spreads over spellings gains the
    entropy of its spelling; by the sum over spellings, nobody does.
    """
    policy, proxy = RandomModel(PIECES, seed=0), RandomModel(["a", "b"], seed=1)
    rewards: dict[str, list[float]] = {"ids": [], "marginal": []}
    for share in (1.0 - 1e-12, 0.6):
        writer, by_ids, by_text = Respelled(policy, share), 0.0, 0.0
        for text in TEXTS:
            score = np.log(text_probability(proxy, proxy.vocabulary, text))
            own = [writer.logp(text, ids) for ids in spellings_of(policy, text)]
            marginal = np.logaddexp.reduce(own)
            by_ids += sum(np.exp(x) * (score - x) for x in own)
            by_text += sum(np.exp(x) * (score - marginal) for x in own)
        rewards["ids"].append(by_ids)
        rewards["marginal"].append(by_text)
    assert rewards["ids"][1] > rewards["ids"][0] + 0.01
    assert rewards["marginal"][1] == pytest.approx(rewards["marginal"][0], abs=1e-12)


def rollout(chat, ids, ended=True):
    ids = (*ids, chat.stop_id) if ended else tuple(ids)
    text = chat.table.bytes_of(ids).decode(errors="replace")
    return Rollout(Prompt(0, ()), (1,), ids, (-1.0,) * len(ids), -0.5, text, ended)


@pytest.mark.parametrize("name", ["policy", "proxy"])
def test_the_canonical_spelling_is_the_tokenizers_own(talkers, name):
    chat = Chat(str(talkers / name))
    by_bytes = chat.table.by_bytes()
    own = chat.encode("1+2 is => 3")
    letters = [by_bytes[bytes([b])] for b in chat.table.bytes_of(own)]
    assert canonical_ids(chat, own) == own and canonical_ids(chat, letters) == own
    texts = [rollout(chat, own), rollout(chat, own, False), rollout(chat, letters)]
    half = rollout(chat, [by_bytes["é".encode()[:1]]], False)
    control = rollout(chat, (*own, chat.stop_id, *own), False)
    assert canonical_share(chat, [*texts, half, control]) == [1.0, 1.0, 0.0]
    assert canonical_ids(chat, half.ids) is None and canonical_ids(chat, control.ids) is None


def test_the_excess_is_what_the_other_spelling_adds(talkers, monkeypatch):
    chat = Chat(str(talkers / "policy"))
    own = chat.encode("1+2 is => 3")
    letters = [chat.table.by_bytes()[bytes([b])] for b in chat.table.bytes_of(own)]
    asked = []

    def score_ids(scorer, engine, jobs, chat, **options):
        asked.extend(jobs)
        return [TextScore(np.full(len(ids), -0.5), 0.0) for _, ids in jobs]

    monkeypatch.setattr(spellings, "score_ids", score_ids)
    texts = [rollout(chat, own), rollout(chat, letters)]
    logp = [np.full(len(r.ids), -1.0) for r in texts]
    got = marginal_excess(chat, None, texts, logp, tokens=64, temperature=1.0)
    assert asked == [((1,), (*own, chat.stop_id))]
    sampled, other = -float(len(letters) + 1), -0.5 * (len(own) + 1)
    assert got == [0.0, pytest.approx(np.log(np.exp(sampled) + np.exp(other)) - sampled)]


@pytest.mark.parametrize("norm", ["sum", "per_byte"])
def test_the_reward_is_lower_by_the_excess(talkers, tmp_path, monkeypatch, norm):
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        proxy={"path": str(talkers / "proxy")},
        calibration={"mode": "distillable", "denominator": "marginal", "score_norm": norm},
    )
    engine = SimpleNamespace(frozen=lambda role: role.path, sum=float)
    by = LikelihoodRatio(cfg, engine, Chat(str(talkers / "policy")))
    text = rollout(by.chat, by.chat.encode("1+2 is => 3"))
    (aligned,) = align_texts(by.chat, by.proxy_chat, [text], same=False)
    proxy = TextScore(np.full(len(aligned.scorer_ids), -2.0), -0.25)
    monkeypatch.setattr(likelihood_ratio, "score_ids", lambda *a, **k: [proxy])
    own = [TextScore(np.full(len(text.ids), -1.0), text.stop_logp)]
    found = []
    for excess in (0.0, 3.0):
        monkeypatch.setattr(likelihood_ratio, "marginal_excess", lambda *a, x=excess, **k: [x])
        sums = SimpleNamespace(add=lambda *a: None)
        found += by.score([text], own, None, sums)
    plain, less = found
    unit = plain.n_bytes if norm == "per_byte" else 1
    assert less.value == pytest.approx(plain.value - 3 / unit)
    assert less.raw == plain.raw - 3 and less.stop == plain.stop - 3


def test_spellings_have_different_numbers_of_tokens():
    with pytest.raises(ValueError, match="'marginal' with score_norm = 'per_token'"):
        CalibrationSection(denominator="marginal", score_norm="per_token")
