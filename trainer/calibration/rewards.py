"""From grades and scores to advantages: the calibration reward and the separate group
normalisations.

    r_cal = [l_C(x, y) - sg(l_D(x, y))] / z(y)                 equation (2) of docs/method.md
    A     = norm(r_task) + eta * norm(r_cal)                   equations (3) and (4); norm(r_task +
          eta * r_cal) with `joint`

Everything here is plain float64 numpy on [P, G] arrays: P prompts, G rollouts of each; S spans, n
tokens of one response.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reflux.tokenalign.credit import following_span, span_to_go
from reflux.tokenalign.scores import Scores
from reflux.trainer.config.sections import Calibration

MAD_TO_STD = 1.4826  # of a normal distribution
MEAN_DEVIATION_TO_STD = 1.2533
HALF_RIGHT_STD = 0.5  # of 0/1 rewards, the most such a group can have
TASK_STD_FLOOR = 1e-6


@dataclass(frozen=True, eq=False)
class CalScore:
    """The calibration reward of one rollout and what it was made of. Nats unless said otherwise."""

    value: float  # r_cal
    raw: float  # the unclipped difference of the sequence scores, stop term included
    span_value: np.ndarray  # [S] clipped span differences, proxy minus denominator
    span: np.ndarray  # [n] span of each response token, -1 outside
    stop: float  # the stop term's difference; 0 if the rollout was cut or score_stop is off
    n_bytes: int
    clipped: float  # share of spans whose difference was clipped
    scored: bool  # False: the text does not round-trip, or the rollout is masked by rule


UNALIGNED = CalScore(0.0, 0.0, np.zeros(0), np.zeros(0, np.int64), 0.0, 0, 0.0, False)


def calibration_score(scores: Scores, span: np.ndarray, cal: Calibration) -> CalScore:
    """r_cal from the scores of one text, the proxy being side a and the denominator side b. span:
    [n] of the policy's tokens.
    """
    return CalScore(
        scores.ratio(cal.score_norm),
        scores.log_ratio_unclipped,
        scores.span_ratio,
        span,
        scores.stop_ratio,
        scores.num_bytes,
        scores.clipped_share,
        True,
    )


def group_normalise(
    reward_PG: np.ndarray, floor: float | np.ndarray, keep_PG: np.ndarray | None = None
) -> np.ndarray:
    """Equation (3): (r - mean) / max(std, floor) inside each group, sample std; 0 where not kept or
    alone.
    """
    keep_PG = np.ones_like(reward_PG, bool) if keep_PG is None else keep_PG
    kept_P1 = keep_PG.sum(1, keepdims=True)
    centred_PG = _centred(reward_PG, keep_PG)
    std_P1 = np.sqrt((centred_PG**2).sum(1, keepdims=True) / np.maximum(kept_P1 - 1, 1))
    scale_P1 = np.maximum(std_P1, floor)
    return np.where(scale_P1 > 0, centred_PG / np.where(scale_P1 > 0, scale_P1, 1.0), 0.0)


def group_std(reward_PG: np.ndarray, keep_PG: np.ndarray) -> np.ndarray:
    """[P] sample std over the kept rollouts; 0 where fewer than two are kept."""
    square_P = (_centred(reward_PG, keep_PG) ** 2).sum(1)
    return np.sqrt(square_P / np.maximum(keep_PG.sum(1) - 1, 1))


def winsorise(
    reward_PG: np.ndarray, mads: float, floor: np.ndarray, keep_PG: np.ndarray
) -> np.ndarray:
    """Pulls outliers in to median +- mads x scaled MAD of their group. `floor` [P, 1] is the least
    scale.

    A group in which most rollouts are the same text has MAD 0, and clipping to its median would
    erase the others: there the mean absolute deviation takes its place.
    """
    if not mads:
        return reward_PG
    out = reward_PG.copy()
    for p, keep_G in enumerate(keep_PG):
        if keep_G.sum() > 1:
            centre = np.median(reward_PG[p, keep_G])
            away = np.abs(reward_PG[p, keep_G] - centre)
            scale = max(
                MAD_TO_STD * np.median(away) or MEAN_DEVIATION_TO_STD * away.mean(),
                float(floor[p, 0]),
            )
            out[p] = np.clip(reward_PG[p], centre - mads * scale, centre + mads * scale)
    return out


def gate(correct_PG: np.ndarray, task_std_P: np.ndarray, rule: str) -> np.ndarray:
    """[P] weight of the calibration term per group: what to do when all rollouts are right or all
    are wrong.

    scale_by_task_std: the spread of the task rewards in units of a half-right 0/1 group's, at most
    1. It looks at one group alone, so that ranks and batches cannot change it.
    """
    all_wrong_P, all_right_P = ~correct_PG.any(1), correct_PG.all(1)
    return {
        "none": np.ones(len(correct_PG)),
        "skip_all_wrong": (~all_wrong_P).astype(float),
        "skip_degenerate": (~(all_wrong_P | all_right_P)).astype(float),
        "scale_by_task_std": np.minimum(task_std_P / HALF_RIGHT_STD, 1.0),
    }[rule]


@dataclass(frozen=True, eq=False)
class Advantages:
    """[P][G] lists of per-token advantages [n], and the group statistics a log line wants."""

    token: list[list[np.ndarray]]
    std_cal: float  # mean over groups with a calibration term, in the units of r_cal; 0 without one
    # what equation (3) divided by, for the whole sequence in nats: eta_eff = eta / std_cal_nats
    std_cal_nats: float
    cal_share: float  # groups that had a calibration term


def task_advantage(task_PG: np.ndarray) -> np.ndarray:
    """norm(r_task): plain GRPO."""
    return group_normalise(task_PG, TASK_STD_FLOOR)


def advantages(
    task_PG: np.ndarray,
    correct_PG: np.ndarray,
    lengths_PG: np.ndarray,
    scores_PG: Sequence[Sequence[CalScore]] | None,
    cal: Calibration,
    eta: float,
) -> Advantages:
    """Equation (4), per token. Without scores (eta = 0) this is exactly `task_advantage`, spread
    over the tokens.
    """
    task_adv_PG = task_advantage(task_PG)
    spread = lambda adv_PG: [
        [np.full(n, a) for a, n in zip(row, ns)] for row, ns in zip(adv_PG, lengths_PG)
    ]
    if scores_PG is None or eta == 0:
        return Advantages(spread(task_adv_PG), 0.0, 0.0, 0.0)
    value_PG = np.array([[s.value for s in row] for row in scores_PG])
    keep_PG = np.array([[s.scored for s in row] for row in scores_PG])
    bytes_PG = np.array([[s.n_bytes for s in row] for row in scores_PG], float)
    mean_bytes_P1 = np.where(keep_PG, bytes_PG, 0).sum(1, keepdims=True) / np.maximum(
        keep_PG.sum(1, keepdims=True), 1
    )
    floor_P1 = cal.std_floor * (
        mean_bytes_P1 if cal.score_norm == "sum" else np.ones_like(mean_bytes_P1)
    )
    value_PG = winsorise(value_PG, cal.winsor, floor_P1, keep_PG)
    std_P = group_std(value_PG, keep_PG)
    scale_P1 = np.maximum(std_P[:, None], floor_P1)
    weight_P = gate(correct_PG, group_std(task_PG, np.ones_like(keep_PG)), cal.cal_gate)
    if cal.normalise == "joint":
        total_PG = task_PG + eta * weight_P[:, None] * _centred(value_PG, keep_PG)
        scale_P1 = np.maximum(group_std(total_PG, np.ones_like(keep_PG))[:, None], TASK_STD_FLOOR)
    used_P = (weight_P > 0) & (keep_PG.sum(1) > 1)
    std_cal = float(std_P[used_P].mean()) if used_P.any() else 0.0
    nats = (
        float((scale_P1[:, 0] * _mean_divisor(scores_PG, lengths_PG, keep_PG, cal))[used_P].mean())
        if used_P.any()
        else 0.0
    )
    if cal.normalise == "joint":
        tokens = spread(group_normalise(total_PG, TASK_STD_FLOOR))
    elif cal.credit == "sequence":
        cal_adv_PG = group_normalise(value_PG, floor_P1, keep_PG)
        tokens = spread(task_adv_PG + eta * weight_P[:, None] * cal_adv_PG)
    else:
        scale_P1 = np.where(scale_P1 > 0, scale_P1, 1.0)
        tokens = [
            [
                np.full(n, task)
                + eta * weight_P[p] * _span_advantage(scores_PG[p], g, int(n)) / scale_P1[p, 0]
                for g, (task, n) in enumerate(zip(task_adv_PG[p], lengths_PG[p]))
            ]
            for p in range(len(task_PG))
        ]
    return Advantages(tokens, std_cal, nats, float(used_P.mean()))


def _centred(reward_PG: np.ndarray, keep_PG: np.ndarray) -> np.ndarray:
    """r - mean over the kept; 0 where not kept, so that a masked rollout is neither paid nor
    fined.
    """
    mean_P1 = np.where(keep_PG, reward_PG, 0).sum(1, keepdims=True) / np.maximum(
        keep_PG.sum(1, keepdims=True), 1
    )
    return np.where(keep_PG, reward_PG - mean_P1, 0.0)


def _mean_divisor(
    scores_PG: Sequence[Sequence[CalScore]],
    lengths_PG: np.ndarray,
    keep_PG: np.ndarray,
    cal: Calibration,
) -> np.ndarray:
    """[P] mean of z(y) in equation (2) over the kept rollouts: takes a spread of r_cal back to nats
    per sequence.
    """
    size_PG = {
        "sum": lambda: np.ones_like(keep_PG, float),
        "per_token": lambda: lengths_PG.astype(float),
        "per_byte": lambda: np.array([[float(s.n_bytes) for s in row] for row in scores_PG]),
    }[cal.score_norm]()
    return np.where(keep_PG, size_PG, 0).sum(1) / np.maximum(keep_PG.sum(1), 1)


def _span_advantage(group: Sequence[CalScore], g: int, n: int) -> np.ndarray:
    """[n] reward-to-go of the span values minus the others' mean reward-to-go from the same span on
    (score_norm = sum).

    Reward-to-go keeps the expected gradient of the sequence reward; the baseline does not depend on
    what follows the token. A token outside every span goes with the span that follows it, the stop
    token with the stop term.
    """
    mine = group[g]
    others = [s for i, s in enumerate(group) if s.scored and i != g]
    if not mine.scored or not others:
        return np.zeros(n)
    at_n = following_span(mine.span, len(mine.span_value), n)
    baseline_n = np.mean(
        [span_to_go(s.span_value, s.stop)[np.minimum(at_n, len(s.span_value))] for s in others], 0
    )
    return span_to_go(mine.span_value, mine.stop)[at_n] - baseline_n


def margin_strength(strength: float, beta: float, std_cal_nats: float) -> float:
    """The strength that keeps beta + eta_eff >= beta / 4, eta_eff = eta / std_cal (docs/method.md,
    "Guards").
    """
    return min(strength, 0.75 * beta * std_cal_nats)
