"""The rival reward by its definition: the proxy's mean log-probability of the solution's tokens
behind the text, plus the text's own log-ratio per token.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from runs import config

from reflux.trainer.calibration import solution_likelihood as module
from reflux.trainer.calibration.likelihood_ratio import LikelihoodRatio
from reflux.trainer.calibration.rewards import UNALIGNED
from reflux.trainer.calibration.solution_likelihood import SolutionLikelihood
from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.chat import Chat
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.phase import TextScore


def reward(talkers, tmp_path, **calibration):
    cfg = config(
        talkers,
        tmp_path / "run",
        "calibrate",
        proxy={"path": str(talkers / "proxy")},
        calibration={"mode": "distillable", "reward": "solution_likelihood"} | calibration,
    )
    engine = SimpleNamespace(frozen=lambda role: role.path, sum=float)
    return SolutionLikelihood(cfg, engine, Chat(str(talkers / "policy")))


def rollout(text, answer):
    prompt = Prompt(0, ({"role": "user", "content": "1+2?"},), answer=answer)
    return Rollout(prompt, (1,), (5, 6), (-1.0, -1.0), -0.5, text, True)


@pytest.mark.filterwarnings("ignore:calibration.score_norm")
def test_a_solution_that_the_proxy_has_no_positions_for_is_not_read(talkers, tmp_path, monkeypatch):
    by, seen = reward(talkers, tmp_path, score_norm="per_token"), []
    texts = [rollout("1+2 is => 3", answer) for answer in ("3", "it is three, and not four")]
    rows = [sum(map(len, by._read(r))) for r in texts]

    def score_ids(scorer, engine, jobs, chat, **options):
        seen.extend(len(prompt) + len(ids) for prompt, ids in jobs)
        return [TextScore(np.zeros(len(ids)), 0.0) for _, ids in jobs]

    monkeypatch.setattr(module, "score_ids", score_ids)
    aligned = SimpleNamespace(scorer_ids=())
    for room in (rows[1] - 1, rows[1] - 2):
        by.proxy_chat.positions = room
        by._solutions(texts)
        fits = [by.proxy_chat.has_room(by._row(r, aligned)) for r in texts]
        assert fits == [True, room == rows[1] - 1]
    assert seen == [rows[0], rows[1], rows[0]]


@pytest.mark.filterwarnings("ignore:calibration.score_norm")
def test_a_solution_is_scored_behind_its_text(talkers, tmp_path, monkeypatch):
    """Scores count down by position, so that the mean says which positions were meant."""
    by, seen = reward(talkers, tmp_path, score_norm="per_token"), []

    def score_ids(scorer, engine, jobs, chat, **options):
        seen.extend(jobs)
        assert options["stop"] is False and chat is by.proxy_chat
        return [TextScore(-np.arange(len(ids), dtype=float), 0.0) for _, ids in jobs]

    ratio = replace(UNALIGNED, value=-0.25, scored=True)
    monkeypatch.setattr(module, "score_ids", score_ids)
    monkeypatch.setattr(LikelihoodRatio, "score", lambda self, *_: [ratio, UNALIGNED])
    texts = [rollout("1+2 is => 3", "3 it is"), rollout("no", "4")]
    scores = by.score(texts, [], None, MetricSums())
    for (prompt, ids), r in zip(seen, texts):
        before = by.proxy_chat.encode(r.text + "\n")
        assert ids == (*before, *by.proxy_chat.encode(r.prompt.answer))
        assert prompt == by.proxy_chat.prompt_ids(r.prompt.messages)
    first = len(by.proxy_chat.encode("1+2 is => 3\n"))
    mean = -np.arange(first, len(seen[0][1])).mean()
    assert scores[0].value == pytest.approx(mean - 0.25)
    assert scores[1] is UNALIGNED  # has no reward, whatever its solution


@pytest.mark.filterwarnings("ignore:calibration.score_norm")
def test_the_reward_by_hand(talkers, tmp_path, monkeypatch):
    """The proxy finds a token of the solution at -2 nats, one of the text at -0.5 where the policy
    has it at -1.25: -2 + (1.25 - 0.5), a text that its student finds likelier being worth more.
    """
    by = reward(talkers, tmp_path, score_norm="per_token")

    def all_at(nats):
        def score_ids(scorer, engine, jobs, chat, **options):
            return [TextScore(np.full(len(ids), nats), -7.0) for _, ids in jobs]

        return score_ids

    monkeypatch.setattr("reflux.trainer.calibration.likelihood_ratio.score_ids", all_at(-0.5))
    monkeypatch.setattr(module, "score_ids", all_at(-2.0))
    ids = tuple(by.chat.encode("1+2 is => 3"))
    text = replace(rollout("1+2 is => 3", "3 it is"), ids=ids, logp=(-1.25,) * len(ids))
    policy = TextScore(np.full(len(ids), -1.25), -3.0)
    (found,) = by.score([text], [policy], None, MetricSums())
    assert found.scored and found.value == pytest.approx(-2.0 + 0.75)


@pytest.mark.filterwarnings("ignore:calibration.score_norm")
def test_what_it_cannot_do_is_said(talkers, tmp_path):
    with pytest.raises(ValueError, match="want 'per_token', as the reward is defined"):
        reward(talkers, tmp_path, score_norm="sum")
    by = reward(talkers, tmp_path, score_norm="per_token")
    with pytest.raises(ValueError, match="1 rollouts are of prompts without `answer`"):
        by.score([rollout("a", "b"), rollout("a", None)], [], None, MetricSums())


@pytest.mark.filterwarnings("ignore:calibration.score_norm")
def test_a_text_cut_inside_a_character_is_read_up_to_it(talkers, tmp_path, monkeypatch):
    by, seen = reward(talkers, tmp_path, score_norm="per_token"), []

    def score_ids(scorer, engine, jobs, chat, **options):
        seen.extend(ids for _, ids in jobs)
        return [TextScore(np.zeros(len(ids)), 0.0) for _, ids in jobs]

    monkeypatch.setattr(module, "score_ids", score_ids)
    ids = by.chat.encode("no €")[:-1]
    text = by.chat.decode(ids)
    assert "\ufffd" in text, "the euro sign has several tokens"
    cut = replace(rollout(text, "4"), ids=tuple(ids), logp=(-1.0,) * len(ids), ended=False)
    by._solutions([cut])
    assert seen == [(*by.proxy_chat.encode("no \n"), *by.proxy_chat.encode("4"))]
