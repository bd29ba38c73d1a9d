"""From rewards to advantages: equations (3) and (4) of docs/method.md.

    norm(r)_i = (r_i - mean of the group) / max(std of the group, floor)                        (3)
    A_i       = norm(r_task)_i + eta * norm(r_cal)_i             the same on every token of i   (4)

With calibration.score_norm = "length_free" r_cal is what length does not explain in the group:

    r_i <- [r_i - mean r - slope (b_i - mean b)] / mean b       b bytes, least squares          (2')

Each reward is normalised by itself. With calibration.normalise = "joint" the sum is normalised
instead; with calibration.credit = "prefix" or "span" a token's calibration part leaves out what was
settled before it.

Everything here is float64 numpy: P prompts, G rollouts of each, n tokens of one response.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from reflux.tokenalign.credit import (
    following_span,
    mean_at,
    prefix_to_go,
    reward_to_go,
    settled_spans,
    span_to_go,
)
from reflux.trainer.config.sections import CalibrationSection
from reflux.trainer.phase import CalibrationScore

MAD_TO_STD = 1.4826  # of a normal distribution
MEAN_DEVIATION_TO_STD = 1.2533
# of byte lengths in a group, std / mean: below it the texts have one length, and a byte more or
# less may be all that tells their styles apart
ONE_LENGTH = 0.05
HALF_CORRECT_STD = 0.5  # of 0/1 rewards, the most such a group can have
TASK_STD_FLOOR = 1e-6
# of the largest reward in a group: a smaller std is rounding of float32 log-probabilities, which
# calibration.std_floor = 0 would scale up to unit advantages
ROUNDING = 1e-6

TokenAdvantages = list[list[np.ndarray]]  # [P][G] arrays [n]


@dataclass(frozen=True, eq=False)
class Groups:
    """The graded and scored rollouts of a step."""

    task_PG: np.ndarray  # r_task
    correct_PG: np.ndarray  # bool
    lengths_PG: np.ndarray  # response tokens, the stop token included
    graded_PG: np.ndarray  # bool; False where grading failed: out of the group, advantage 0
    scores_PG: Sequence[Sequence[CalibrationScore]] | None = None  # None: eta is 0
    # bool: the grader of the group knows no right and wrong, only rewards; None: of no group
    numeric_P: np.ndarray | None = None

    @property
    def numeric(self) -> np.ndarray:
        """numeric_P, all False where it is None."""
        return np.zeros(len(self.task_PG), bool) if self.numeric_P is None else self.numeric_P


@dataclass(frozen=True, eq=False)
class CalibrationPart:
    """The calibration rewards of a step, ready to be combined with the task's."""

    value_PG: np.ndarray  # r_cal, outliers pulled in
    scored_PG: np.ndarray  # bool: the rollout has a calibration reward
    weight_P: np.ndarray  # of the calibration term, by calibration.cal_gate
    floor_P1: np.ndarray  # the least std that is divided by, in the units of r_cal
    used_P: np.ndarray  # bool: groups that have a calibration term
    # of the variance of r_cal in a group, as it was scored: the fraction that a line through the
    # byte lengths explains; 0 where nothing varies
    length_r2_P: np.ndarray

    @property
    def std_P(self) -> np.ndarray:
        """Group std of r_cal, in its units."""
        return group_std(self.value_PG, self.scored_PG)


def advantages(
    groups: Groups, part: CalibrationPart | None, cal: CalibrationSection, eta: float
) -> TokenAdvantages:
    """Equation (4), per token. Without calibration rewards, or with eta = 0, plain GRPO."""
    task_PG = task_part(groups.task_PG, groups.graded_PG)
    if part is None or eta == 0:
        return spread_over_tokens(task_PG, groups.lengths_PG)
    if cal.normalise == "joint":
        total_PG = group_normalise(
            joint_reward(groups, part, eta), TASK_STD_FLOOR, groups.graded_PG
        )
        return spread_over_tokens(total_PG, groups.lengths_PG)
    if cal.credit == "sequence":
        cal_PG = group_normalise(part.value_PG, part.floor_P1, part.scored_PG)
        total_PG = task_PG + eta * part.weight_P[:, None] * cal_PG
        return spread_over_tokens(total_PG, groups.lengths_PG)
    return span_credit(groups, part, task_PG, eta, cal.credit)


def task_part(task_PG: np.ndarray, graded_PG: np.ndarray | None = None) -> np.ndarray:
    """norm(r_task), equation (3): all there is in plain GRPO."""
    return group_normalise(task_PG, TASK_STD_FLOOR, graded_PG)


def calibration_part(groups: Groups, cal: CalibrationSection) -> CalibrationPart | None:
    """r_cal of every rollout with outliers pulled in, and the weight of each group; None where
    nothing is scored.
    """
    if groups.scores_PG is None:
        return None
    raw_PG = _array(groups.scores_PG, "value")
    scored_PG = _array(groups.scores_PG, "scored").astype(bool) & groups.graded_PG
    bytes_PG = _array(groups.scores_PG, "n_bytes")
    mean_bytes_P1 = _mean_scored(bytes_PG, scored_PG)
    unit_P1 = mean_bytes_P1 if cal.score_norm == "sum" else np.ones_like(mean_bytes_P1)
    largest_P1 = np.where(scored_PG, np.abs(raw_PG), 0.0).max(1, keepdims=True)
    if cal.score_norm == "length_free":
        largest_P1 = largest_P1 / np.maximum(mean_bytes_P1, 1.0)
    floor_P1 = np.maximum(cal.std_floor * unit_P1, ROUNDING * largest_P1)
    value_PG = winsorise(
        length_free(raw_PG, bytes_PG, scored_PG) if cal.score_norm == "length_free" else raw_PG,
        cal.winsor,
        floor_P1,
        scored_PG,
    )
    if cal.score_norm == "length_free":  # pulling in an outlier makes a new slope
        value_PG = without_length(value_PG, bytes_PG, scored_PG)
    task_std_P = group_std(groups.task_PG, groups.graded_PG)
    weight_P = gate(groups.correct_PG, task_std_P, cal.cal_gate, groups.graded_PG, groups.numeric_P)
    return CalibrationPart(
        value_PG,
        scored_PG,
        weight_P,
        floor_P1,
        used_P=(weight_P > 0) & (scored_PG.sum(1) > 1),
        length_r2_P=length_r2(raw_PG, bytes_PG, scored_PG),
    )


def length_free(value_PG: np.ndarray, bytes_PG: np.ndarray, scored_PG: np.ndarray) -> np.ndarray:
    """Equation (2'): nats per byte of the group's mean length. 0 where a rollout is not scored."""
    mean_P1 = np.maximum(_mean_scored(bytes_PG, scored_PG), 1.0)
    return without_length(value_PG, bytes_PG, scored_PG) / mean_P1


def without_length(value_PG: np.ndarray, bytes_PG: np.ndarray, scored_PG: np.ndarray) -> np.ndarray:
    """The residuals of a least-squares line through (bytes, value) of each group's scored rollouts:
    their sum and their sum times bytes are 0, so no step along the length of texts is paid for.
    Only the mean is taken out where the lengths vary by less than ONE_LENGTH.
    """
    centred_PG, length_PG = _centred(value_PG, scored_PG), _centred(bytes_PG, scored_PG)
    square_P1 = (length_PG**2).sum(1, keepdims=True)
    std_P1 = group_std(bytes_PG, scored_PG)[:, None]
    varies_P1 = std_P1 > ONE_LENGTH * _mean_scored(bytes_PG, scored_PG)
    slope_P1 = (centred_PG * length_PG).sum(1, keepdims=True) / np.where(varies_P1, square_P1, 1.0)
    return centred_PG - np.where(varies_P1, slope_P1, 0.0) * length_PG


def length_r2(value_PG: np.ndarray, bytes_PG: np.ndarray, scored_PG: np.ndarray) -> np.ndarray:
    """[P] squared correlation of value and bytes over the scored rollouts of each group."""
    centred_PG, length_PG = _centred(value_PG, scored_PG), _centred(bytes_PG, scored_PG)
    squares_P = (centred_PG**2).sum(1) * (length_PG**2).sum(1)
    product_P = (centred_PG * length_PG).sum(1)
    return np.where(squares_P > 0, product_P**2 / np.where(squares_P > 0, squares_P, 1.0), 0.0)


def spread_over_tokens(advantage_PG: np.ndarray, lengths_PG: np.ndarray) -> TokenAdvantages:
    """The same advantage on every token of a rollout."""
    return [
        [np.full(n, advantage) for advantage, n in zip(row_G, lengths_G)]
        for row_G, lengths_G in zip(advantage_PG, lengths_PG)
    ]


def joint_reward(groups: Groups, part: CalibrationPart, eta: float) -> np.ndarray:
    """[P, G] r_task + eta * r_cal, the calibration reward centred in its group."""
    return groups.task_PG + eta * part.weight_P[:, None] * _centred(part.value_PG, part.scored_PG)


def span_credit(
    groups: Groups, part: CalibrationPart, task_PG: np.ndarray, eta: float, credit: str = "span"
) -> TokenAdvantages:
    """Equation (4) with the calibration term as a reward-to-go, of span values or of prefixes."""
    assert groups.scores_PG is not None

    def advantage(group: Sequence[CalibrationScore], g: int, n: int) -> np.ndarray:
        if credit == "prefix":
            return prefix_advantage(group, g, n)
        return span_advantage(group, g, n, group[g].settled)

    scale_P1 = _scale(part)
    scale_P1 = np.where(scale_P1 > 0, scale_P1, 1.0)
    return [
        [
            np.full(n, task)
            + eta * part.weight_P[p] * advantage(scores_G, g, int(n)) / scale_P1[p, 0]
            for g, (task, n) in enumerate(zip(task_PG[p], groups.lengths_PG[p]))
        ]
        for p, scores_G in enumerate(_scored_only(groups.scores_PG, part.scored_PG))
    ]


def span_advantage(
    group: Sequence[CalibrationScore], g: int, n: int, settled_n: np.ndarray | None = None
) -> np.ndarray:
    """[n] the span values that are not settled before each token, minus the others' mean of the
    same (score_norm = "sum").

    settled_n: how many spans from the start no continuation of the text before the token can
    change; None: none, so that every token gets the whole sum. What is left out and the baseline do
    not depend on what follows the token, so the expected gradient is that of the whole sum. A token
    outside every span goes with the span that follows it, the stop token with the stop term.
    """
    mine = group[g]
    others = [s for i, s in enumerate(group) if s.scored and i != g]
    if not mine.scored or not others:
        return np.zeros(n)
    at_n = settled_spans(settled_n, following_span(mine.span, len(mine.span_value), n))
    baseline_n = mean_at(at_n, [span_to_go(s.span_value, s.stop) for s in others])
    own_n = reward_to_go(mine.span_value, mine.span, settled=at_n, end=mine.stop, length=n)
    return own_n - baseline_n


def prefix_advantage(group: Sequence[CalibrationScore], g: int, n: int) -> np.ndarray:
    """[n] the whole reward without what the text before each token is worth, minus the others' mean
    of the same at that token, or at their last one (score_norm = "sum").

    Both are functions of what stands before the token, or of other texts, so the expected gradient
    is that of the whole reward.
    """
    others = [s for i, s in enumerate(group) if s.scored and i != g]
    if not group[g].scored or not others:
        return np.zeros(n)
    baseline_n = mean_at(np.arange(n), [_prefix_to_go(s) for s in others])
    return np.broadcast_to(_prefix_to_go(group[g]), n) - baseline_n


def _prefix_to_go(s: CalibrationScore) -> np.ndarray:
    """[n]; one number for all tokens where nothing is known of the prefixes."""
    before_n = np.zeros(1) if s.before is None or not len(s.before) else s.before
    return prefix_to_go(s.value, before_n, np.zeros_like(before_n))


def std_nats(groups: Groups, part: CalibrationPart, cal: CalibrationSection, eta: float) -> float:
    """What equation (3) divides r_cal by, for a whole sequence in nats, as a mean over the groups
    used: eta_eff = eta / std_nats. 0 without any.
    """
    scale_P1 = _scale(part)
    if cal.normalise == "joint":
        std_P = group_std(joint_reward(groups, part, eta), groups.graded_PG)
        scale_P1 = np.maximum(std_P[:, None], TASK_STD_FLOOR)
    return mean_over(scale_P1[:, 0] * _mean_divisor(groups, part.scored_PG, cal), part.used_P)


def margin_strength(strength: float, beta: float, std_cal_nats: float) -> float:
    """The strength that keeps beta + eta_eff >= beta / 4, eta_eff = eta / std_cal_nats
    (docs/method.md, "Guards").
    """
    return min(strength, 0.75 * beta * std_cal_nats)


# group statistics


def group_normalise(
    reward_PG: np.ndarray, floor: float | np.ndarray, scored_PG: np.ndarray | None = None
) -> np.ndarray:
    """Equation (3) with the sample std; 0 where a rollout is not scored, or the only one."""
    scored_PG = np.ones_like(reward_PG, bool) if scored_PG is None else scored_PG
    count_P1 = scored_PG.sum(1, keepdims=True)
    centred_PG = _centred(reward_PG, scored_PG)
    std_P1 = np.sqrt((centred_PG**2).sum(1, keepdims=True) / np.maximum(count_P1 - 1, 1))
    scale_P1 = np.maximum(std_P1, floor)
    return np.where(scale_P1 > 0, centred_PG / np.where(scale_P1 > 0, scale_P1, 1.0), 0.0)


def group_std(reward_PG: np.ndarray, scored_PG: np.ndarray) -> np.ndarray:
    """[P] sample std over the scored rollouts; 0 where there are fewer than two."""
    square_P = (_centred(reward_PG, scored_PG) ** 2).sum(1)
    return np.sqrt(square_P / np.maximum(scored_PG.sum(1) - 1, 1))


def winsorise(
    reward_PG: np.ndarray, mads: float, floor_P1: np.ndarray, scored_PG: np.ndarray
) -> np.ndarray:
    """Pulls outliers in to median +- mads x scaled MAD of their group; `floor_P1` is the least
    scale.

    A group in which most rollouts are the same text has MAD 0, and clipping to its median would
    erase the others: there the mean absolute deviation takes its place.
    """
    if not mads:
        return reward_PG
    out_PG = reward_PG.copy()
    for p, scored_G in enumerate(scored_PG):
        if scored_G.sum() > 1:
            centre = np.median(reward_PG[p, scored_G])
            away = np.abs(reward_PG[p, scored_G] - centre)
            mad = MAD_TO_STD * np.median(away) or MEAN_DEVIATION_TO_STD * away.mean()
            scale = max(mad, float(floor_P1[p, 0]))
            out_PG[p] = np.clip(reward_PG[p], centre - mads * scale, centre + mads * scale)
    return out_PG


def gate(
    correct_PG: np.ndarray,
    task_std_P: np.ndarray,
    rule: str,
    graded_PG: np.ndarray,
    numeric_P: np.ndarray | None = None,
) -> np.ndarray:
    """[P] weight of the calibration term per group: what to do where all graded rollouts are
    correct, or none is.

    skip_degenerate: in groups that know no right and wrong (numeric_P), equal rewards are what all
    correct is elsewhere: the task prefers none of the texts.
    scale_by_task_std: the std of the task rewards in units of a half-correct 0/1 group's, at most
    1. It looks at one group alone, so that ranks and batches cannot change it.
    """
    none_correct_P = none_correct(correct_PG, graded_PG)
    alike_P = none_correct_P | all_correct(correct_PG, graded_PG)
    if numeric_P is not None:
        alike_P = np.where(numeric_P, task_std_P < TASK_STD_FLOOR, alike_P)
    return {
        "none": np.ones(len(correct_PG)),
        "skip_all_wrong": (~none_correct_P).astype(float),
        "skip_degenerate": (~alike_P).astype(float),
        "scale_by_task_std": np.minimum(task_std_P / HALF_CORRECT_STD, 1.0),
    }[rule]


def all_correct(correct_PG: np.ndarray, graded_PG: np.ndarray) -> np.ndarray:
    """bool [P]; groups without a grade, too."""
    return (correct_PG | ~graded_PG).all(1)


def none_correct(correct_PG: np.ndarray, graded_PG: np.ndarray) -> np.ndarray:
    """bool [P]."""
    return ~(correct_PG & graded_PG).any(1)


def mean_over(value_P: np.ndarray, used_P: np.ndarray) -> float:
    return float(value_P[used_P].mean()) if used_P.any() else 0.0


def _scale(part: CalibrationPart) -> np.ndarray:
    """[P, 1] what equation (3) divides r_cal by."""
    return np.maximum(group_std(part.value_PG, part.scored_PG)[:, None], part.floor_P1)


def _centred(reward_PG: np.ndarray, scored_PG: np.ndarray) -> np.ndarray:
    """r - mean over the scored; 0 where a rollout is not scored, which neither rewards nor
    penalises it.
    """
    return np.where(scored_PG, reward_PG - _mean_scored(reward_PG, scored_PG), 0.0)


def _mean_scored(value_PG: np.ndarray, scored_PG: np.ndarray) -> np.ndarray:
    """[P, 1] mean over the scored rollouts; 0 without any."""
    count_P1 = np.maximum(scored_PG.sum(1, keepdims=True), 1)
    return np.where(scored_PG, value_PG, 0).sum(1, keepdims=True) / count_P1


def _mean_divisor(groups: Groups, scored_PG: np.ndarray, cal: CalibrationSection) -> np.ndarray:
    """[P] mean of z(y) in equation (2) over the scored rollouts: takes a std of r_cal back to nats
    per sequence.
    """
    assert groups.scores_PG is not None
    size_PG = {
        "sum": np.ones_like(scored_PG, float),
        "length_free": _array(groups.scores_PG, "n_bytes"),
        "per_token": groups.lengths_PG.astype(float),
        "per_byte": _array(groups.scores_PG, "n_bytes"),
    }[cal.score_norm]
    return _mean_scored(size_PG, scored_PG)[:, 0]


def _scored_only(
    scores_PG: Sequence[Sequence[CalibrationScore]], scored_PG: np.ndarray
) -> list[list[CalibrationScore]]:
    """The scores, those of rollouts without a calibration reward marked as such."""
    return [
        [replace(s, scored=bool(ok)) for s, ok in zip(row_G, scored_G)]
        for row_G, scored_G in zip(scores_PG, scored_PG)
    ]


def _array(scores_PG: Sequence[Sequence[CalibrationScore]], name: str) -> np.ndarray:
    """[P, G] float64 of one field of the scores."""
    return np.array([[float(getattr(s, name)) for s in row] for row in scores_PG])
