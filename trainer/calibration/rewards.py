"""The calibration reward of one text, equation (2) of docs/method.md, and which reward a run uses.

r_cal = [l_C(x, y) - sg(l_D(x, y))] / z(y)       C the proxy, D the policy or the reference
"""

import importlib
from dataclasses import replace

import numpy as np

from reflux.tokenalign.scores import Scores
from reflux.trainer.config.calibration_rewards import REWARDS
from reflux.trainer.config.roles import proxies_of
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import CalibrationSection
from reflux.trainer.data.chat import Chat
from reflux.trainer.phase import CalibrationReward, CalibrationScore, Engine

from .several_proxies import UNSCORED, SeveralProxies

# of a text that does not round-trip through the proxy's tokenizer, or is masked by rule
UNALIGNED = UNSCORED


def build_reward(cfg: Config, engine: Engine, chat: Chat) -> CalibrationReward:
    """The reward that calibration.reward names, with every proxy of the run. `chat`: the policy's
    tokenizer. Collective.
    """
    module, _, name = REWARDS[cfg.calibration.reward].partition(":")
    kind, cal = getattr(importlib.import_module(module), name), cfg.calibration
    if not cal.proxies:
        return kind(cfg, engine, chat)
    alone = replace(cal, proxies=(), proxy_aggregate="mean", proxy_route="")
    rewards = [
        kind(replace(cfg, proxy=proxy, calibration=alone), engine, chat)
        for proxy in proxies_of(cfg)
    ]
    return SeveralProxies(cfg, rewards)


def calibration_score(
    scores: Scores,
    span: np.ndarray,
    cal: CalibrationSection,
    settled: np.ndarray | None = None,
    before: np.ndarray | None = None,
) -> CalibrationScore:
    """r_cal from the scores of one text, the proxy being side a and the denominator side b. span:
    [n] of the policy's tokens; settled, before: as in CalibrationScore. With score_norm =
    "length_free" the sum in nats: what length explains is known only in the group (advantages.py).
    """
    alone = "sum" if cal.score_norm == "length_free" else cal.score_norm
    return CalibrationScore(
        value=scores.ratio(alone),
        raw=scores.log_ratio_unclipped,
        span_value=scores.span_ratio,
        span=span,
        stop=scores.stop_ratio,
        n_bytes=scores.num_bytes,
        clipped=scores.clipped_fraction,
        scored=True,
        settled=settled,
        before=before,
    )
