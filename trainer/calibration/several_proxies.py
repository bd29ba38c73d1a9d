"""The calibration reward with several proxies: each scores the text with its own tokenizer, and

    mean      r_cal is the mean of theirs
    min, max  r_cal is the smallest or largest of them
    row       that of the proxy which the row names (calibration.proxy_route), the only one to score

A text that one of the proxies cannot spell is unaligned; with "row", if it is the row's own.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from reflux.trainer.config.schema import Config
from reflux.trainer.data.batch import Rollout
from reflux.trainer.data.row_choice import chosen_model
from reflux.trainer.engine.metrics import MetricSums
from reflux.trainer.phase import CalibrationReward, CalibrationScore, TextScore

UNSCORED = CalibrationScore(0.0, 0.0, np.zeros(0), np.zeros(0, np.int64), 0.0, 0, 0.0, False)


class SeveralProxies:
    """A CalibrationReward made of those of each proxy, proxy.path first."""

    def __init__(self, cfg: Config, rewards: Sequence[CalibrationReward]):
        self._cal, self._rewards = cfg.calibration, rewards
        self._paths = (cfg.proxy.path, *cfg.calibration.proxies)

    def score(
        self,
        rollouts: Sequence[Rollout],
        behaviour: Sequence[TextScore],
        reference: Sequence[TextScore] | None,
        metric_sums: MetricSums,
    ) -> list[CalibrationScore]:
        """One score per rollout; see phase.CalibrationReward. Collective."""
        route, everything = self._cal.proxy_route, range(len(rollouts))
        own = [
            chosen_model(r.prompt, route, self._paths, "calibration.proxy_route") if route else 0
            for r in rollouts
        ]
        scores_N: list[list[CalibrationScore]] = [[] for _ in rollouts]
        for i, reward in enumerate(self._rewards):
            rows = [n for n in everything if not route or own[n] == i]
            scored = reward.score(
                [rollouts[n] for n in rows],
                [behaviour[n] for n in rows],
                None if reference is None else [reference[n] for n in rows],
                metric_sums,
            )
            for n, score in zip(rows, scored):
                scores_N[n].append(score)
        return [self._aggregate(scores) for scores in scores_N]

    def _aggregate(self, scores: Sequence[CalibrationScore]) -> CalibrationScore:
        if not all(score.scored for score in scores):
            return UNSCORED
        how = self._cal.proxy_aggregate
        if how in ("min", "max"):
            return (min if how == "min" else max)(scores, key=lambda score: score.value)
        if len(scores) == 1:  # the row's own
            return scores[0]
        return replace(
            scores[0],
            value=float(np.mean([s.value for s in scores])),
            raw=float(np.mean([s.raw for s in scores])),
            stop=float(np.mean([s.stop for s in scores])),
            clipped=float(np.mean([s.clipped for s in scores])),
            before=_mean_before(scores),
        )


def _mean_before(scores: Sequence[CalibrationScore]) -> np.ndarray | None:
    """What the text before each token is worth to the mean; None where one of them does not say."""
    before = [s.before for s in scores if s.before is not None]
    return np.mean(before, axis=0) if len(before) == len(scores) else None
