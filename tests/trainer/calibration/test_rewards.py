"""Equation (2) by hand, and the table of rewards."""

from dataclasses import replace

import numpy as np
import pytest
from calibration_cases import scored

from reflux.trainer.calibration import rewards
from reflux.trainer.config.calibration_rewards import REWARDS
from reflux.trainer.config.sections import CalibrationSection


def test_sequence_score_by_hand():
    proxy, own, cal = (
        np.array([-1.0, -2.0, -30.0]),
        np.array([-2.0, -1.0, -1.0]),
        CalibrationSection(span_clip=10.0),
    )
    arguments = (proxy, own, 0.5, 5, (6, 3), np.array([0, 1, 2]))
    s = scored(*arguments, cal)
    assert (
        s.value == 1 - 1 - 10 + 0.5
        and s.raw == 1 - 1 - 29 + 0.5
        and s.clipped == pytest.approx(1 / 3)
        and s.scored
    )
    assert scored(*arguments, replace(cal, score_norm="per_byte")).value == s.value / 5
    assert scored(*arguments, replace(cal, span_clip=0.0)).value == s.raw
    per_token = scored(*arguments, replace(cal, score_norm="per_token"))
    assert per_token.value == pytest.approx(-33 / 6 + 4 / 3)


def test_an_empty_text_is_worth_its_stop():
    s = scored(np.zeros(0), np.zeros(0), -0.25, 0, (0, 0), np.zeros(0, int), CalibrationSection())
    assert s.value == s.raw == -0.25 and s.clipped == 0
    for norm in ("per_byte", "per_token"):
        assert np.isfinite(
            scored(
                np.zeros(0),
                np.zeros(0),
                -0.25,
                0,
                (0, 0),
                np.zeros(0, int),
                CalibrationSection(score_norm=norm),
            ).value
        )


def test_a_reward_is_one_class_and_one_line(monkeypatch):
    """What CONTRIBUTING.md promises: a class with `score`, a name in REWARDS, nothing else."""
    monkeypatch.setitem(REWARDS, "always_one", f"{OneForAll.__module__}:{OneForAll.__name__}")
    monkeypatch.setitem(__import__("sys").modules, OneForAll.__module__, _Here)
    section = CalibrationSection(reward="always_one")
    cfg = type("Config", (), {"calibration": section})()
    reward = rewards.build_reward(cfg, engine=None, chat=None)
    assert isinstance(reward, OneForAll) and reward.score([1, 2], [], None, None) == [1.0, 1.0]


def test_an_unknown_reward_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="reward = 'likelyhood'; want likelihood_ratio"):
        CalibrationSection(reward="likelyhood")


class OneForAll:
    def __init__(self, cfg, engine, chat):
        pass

    def score(self, rollouts, behaviour, reference, metric_sums):
        return [1.0] * len(rollouts)


class _Here:
    OneForAll = OneForAll
