"""Equations (3) and (4) against plain code, and the laws of eta: off is GRPO, the mode flips one
term and nothing else.
"""

from dataclasses import replace
from itertools import product
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import pytest
from calibration_cases import score, scored
from hypothesis import given
from hypothesis import strategies as st

from reflux.tokenalign.credit import following_span
from reflux.trainer.calibration.advantages import (
    Groups,
    TokenAdvantages,
    advantages,
    calibration_part,
    gate,
    group_normalise,
    group_std,
    margin_strength,
    mean_over,
    prefix_advantage,
    span_advantage,
    std_nats,
    task_part,
    winsorise,
)
from reflux.trainer.calibration.rewards import UNALIGNED
from reflux.trainer.config.sections import CalibrationSection

SEEDS = st.integers(0, 2**32 - 1)
SUM = CalibrationSection(score_norm="sum")
RAW = CalibrationSection(
    mode="distillable", score_norm="sum", winsor=0.0, span_clip=0.0, std_floor=0.0, cal_gate="none"
)


def group(seed: int, P: int = 3, G: int = 6, cal: CalibrationSection = RAW):
    """Random rewards, spans and lengths; about one rollout in eight unaligned."""
    rng = np.random.default_rng(seed)
    task = rng.integers(0, 2, (P, G)).astype(float)
    lengths = rng.integers(1, 9, (P, G))

    def one(n):
        if rng.random() < 0.12:
            return UNALIGNED
        span = np.repeat(np.arange(n), 1)[: max(n - 1, 0)]
        proxy, own = -rng.exponential(3.0, len(span)), -rng.exponential(2.0, len(span))
        return scored(
            proxy,
            own,
            float(rng.normal()),
            int(rng.integers(1, 40)),
            (len(span), len(span)),
            span,
            cal,
        )

    scores = [[one(n) for n in row] for row in lengths]
    return task, task > 0, lengths, scores


class Solved(NamedTuple):
    token: TokenAdvantages
    std_cal: float
    std_cal_nats: float
    cal_fraction: float


def solve(task, correct, lengths, scores, cal, eta) -> Solved:
    """Advantages of a step, and the statistics that belong to them."""
    groups = Groups(task, correct, lengths, np.ones_like(correct), scores)
    part = calibration_part(groups, cal)
    token = advantages(groups, part, cal, eta)
    if part is None:
        return Solved(token, 0.0, 0.0, 0.0)
    std = mean_over(part.std_P, part.used_P)
    return Solved(token, std, std_nats(groups, part, cal, eta), float(part.used_P.mean()))


def flat(adv) -> np.ndarray:
    return np.concatenate([a for row in adv.token for a in row])


# equation (3)
@given(SEEDS, st.floats(0.0, 3.0))
def test_group_normalisation_against_plain_code(seed, floor):
    rng = np.random.default_rng(seed)
    reward, keep = rng.normal(size=(4, 5)), rng.random((4, 5)) < 0.7
    got = group_normalise(reward, floor, keep)
    for p in range(4):
        kept = reward[p, keep[p]].tolist()
        std = stdev(kept) if len(kept) > 1 else 0.0
        scale = max(std, floor)
        want = [
            (x - mean(kept)) / scale if k and scale else 0.0 for x, k in zip(reward[p], keep[p])
        ]
        np.testing.assert_allclose(got[p], want, rtol=1e-12, atol=1e-12)
        assert group_std(reward, keep)[p] == pytest.approx(std, abs=1e-12)


def test_no_spread_means_no_advantage():
    for value in (0.0, 1.0, 0.1, 1e6):
        assert np.abs(task_part(np.full((2, 7), value))).max() < 1e-3 * max(value, 1)
    assert (task_part(np.array([[1.0], [0.0]])) == 0).all(), "alone in its group"


def test_the_floor_keeps_a_flat_group_from_unit_noise():
    value = 1e-4 * np.array([[1.0, -1.0, 2.0, -2.0]])
    scores = [[score(v, n_bytes=50) for v in value[0]]]
    args = np.ones((1, 4)), np.ones((1, 4), bool), np.ones((1, 4), int), scores
    assert np.abs(flat(solve(*args, replace(RAW, std_floor=0.01), 1.0))).max() == pytest.approx(
        2e-4 / (0.01 * 50)
    )
    assert np.abs(flat(solve(*args, RAW, 1.0))).max() > 0.9


@pytest.mark.parametrize("norm", ["sum", "per_byte", "length_free"])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_rounding_is_no_spread_without_a_floor_either(norm, noise):
    """Equal rewards, or for `length_free` rewards that are a line in the bytes."""
    n_bytes = (5, 9, 14, 3, 5, 7, 8)
    line = np.array([-0.1 * n for n in n_bytes]) if norm == "length_free" else np.full(7, -3.3)
    values = line * (1 + noise * np.array([1, -1, 1, 1, -1, 0, -1]))
    scores = [[score(v, n_bytes=n) for v, n in zip(values.tolist(), n_bytes)]]
    args = np.ones((1, 7)), np.ones((1, 7), bool), np.ones((1, 7), int), scores
    got = flat(solve(*args, replace(RAW, score_norm=norm), 0.5))
    assert np.abs(got).max() < 0.1, "of the 0.5 that a spread of the texts has"


# equation (4)
@given(SEEDS, st.floats(0.01, 2.0))
def test_advantage_against_plain_code(seed, eta):
    task, correct, lengths, scores = group(seed)
    got = solve(task, correct, lengths, scores, RAW, eta)
    for p, row in enumerate(scores):
        kept = [s.value for s in row if s.scored]
        std = stdev(kept) if len(kept) > 1 else 0.0
        task_std = max(stdev(task[p].tolist()), 1e-6)
        for g, s in enumerate(row):
            cal = (s.value - mean(kept)) / std if s.scored and std else 0.0
            want = (task[p, g] - mean(task[p].tolist())) / task_std + eta * cal
            assert got.token[p][g].shape == (lengths[p, g],)
            np.testing.assert_allclose(got.token[p][g], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("credit", ["sequence", "span"])
@given(seed=SEEDS)
def test_off_is_plain_grpo_bit_for_bit(credit, seed):
    task, correct, lengths, scores = group(seed)
    plain = [np.full(n, a) for n, a in zip(lengths.ravel(), task_part(task).ravel())]
    for given_scores, eta in ((None, 0.0), (scores, 0.0), (scores, -0.0), (None, 0.5)):
        got = solve(task, correct, lengths, given_scores, replace(RAW, credit=credit), eta)
        assert all((a == b).all() for a, b in zip(plain, (a for row in got.token for a in row)))


@pytest.mark.parametrize("credit", ["sequence", "span"])
@given(seed=SEEDS, eta=st.floats(0.01, 2.0))
def test_the_other_word_negates_the_calibration_part_and_nothing_else(credit, seed, eta):
    task, correct, lengths, scores = group(seed, cal=SUM)
    cal = replace(SUM, credit=credit)
    plus, minus = (flat(solve(task, correct, lengths, scores, cal, e)) for e in (eta, -eta))
    plain = flat(solve(task, correct, lengths, None, cal, 0.0))
    # a rounding of a large sum, not more
    np.testing.assert_allclose(plus - plain, plain - minus, rtol=1e-14, atol=1e-14)
    silent = np.zeros_like(task)  # with no task part at all the negation is exact
    plus, minus = (flat(solve(silent, correct, lengths, scores, cal, e)) for e in (eta, -eta))
    assert (plus == -minus).all()


@given(SEEDS, st.floats(0.1, 30.0), st.floats(-50.0, 50.0))
def test_each_reward_is_normalised_by_itself(seed, scale, shift):
    """Re-scaling one reward changes neither part; a z-score of the sum would let one cancel the
    other.
    """
    task, correct, lengths, scores = group(seed)
    base = flat(solve(task, correct, lengths, scores, RAW, 0.5))
    moved = [
        [replace(s, value=scale * s.value + shift) if s.scored else s for s in row]
        for row in scores
    ]
    np.testing.assert_allclose(
        flat(solve(task, correct, lengths, moved, RAW, 0.5)), base, atol=1e-9
    )
    np.testing.assert_allclose(
        flat(solve(scale * task + shift, correct, lengths, scores, RAW, 0.5)), base, atol=1e-9
    )


def test_joint_normalisation_lets_one_reward_swallow_the_other():
    """r_cal spreads ten times as far as r_task: by itself it decides the joint sign, and half of
    the separate one.
    """
    cal, values = replace(RAW, normalise="joint", std_floor=0.0), (0.0, 10.0, 10.0, 20.0)
    args = (
        np.array([[1.0, 1.0, 0.0, 0.0]]),
        np.array([[True, True, False, False]]),
        np.ones((1, 4), int),
        [[score(v) for v in values]],
    )
    total = np.array([1.0, 1 + 5.0, 5.0, 10.0])  # r_task + 0.5 r_cal
    joint = solve(*args, cal, 0.5)
    np.testing.assert_allclose(flat(joint), (total - total.mean()) / total.std(ddof=1))
    separate = flat(solve(*args, replace(cal, normalise="separate"), 0.5))
    assert flat(joint)[0] < 0 < separate[0] and flat(joint)[3] > 0 > separate[3]
    # eta per nat, as the margin guard wants it
    assert joint.std_cal_nats == pytest.approx(total.std(ddof=1))


def test_joint_normalisation_leaves_masked_rollouts_with_their_task_reward():
    cal, scores = replace(RAW, normalise="joint"), [[score(4.0), UNALIGNED, score(-4.0)]]
    got = flat(
        solve(
            np.array([[1.0, 0.5, 0.0]]),
            np.ones((1, 3), bool),
            np.ones((1, 3), int),
            scores,
            cal,
            0.5,
        )
    )
    np.testing.assert_allclose(got, np.array([2.5, 0.0, -2.5]) / 2.5, atol=1e-12)
    off = flat(
        solve(
            np.array([[1.0, 0.5, 0.0]]),
            np.ones((1, 3), bool),
            np.ones((1, 3), int),
            scores,
            cal,
            0.0,
        )
    )
    assert (off == task_part(np.array([[1.0, 0.5, 0.0]]))[0]).all()


@given(SEEDS)
def test_unscored_rollouts_get_the_task_and_give_nothing(seed):
    task, correct, lengths, scores = group(seed)
    for cal in (
        RAW,
        SUM,
        replace(SUM, credit="span"),
        replace(SUM, normalise="joint"),
        CalibrationSection(),
    ):
        a = solve(task, correct, lengths, scores, cal, 0.5)
        junk = replace(UNALIGNED, value=1e9, raw=1e9, n_bytes=10**6, span_value=np.array([1e9]))
        b = solve(
            task,
            correct,
            lengths,
            [[s if s.scored else junk for s in row] for row in scores],
            cal,
            0.5,
        )
        assert (flat(a) == flat(b)).all() and (a.std_cal, a.std_cal_nats) == (
            b.std_cal,
            b.std_cal_nats,
        )
        for row, adv, plain in zip(scores, a.token, task_part(task)):
            assert cal.normalise == "joint" or all(
                (x == t).all() for s, x, t in zip(row, adv, plain) if not s.scored
            )


@pytest.mark.parametrize("norm, n_bytes", [("sum", 1), ("per_byte", 20), ("per_token", 20)])
@pytest.mark.parametrize("spread", [3.0, 1e-6])
def test_std_cal_nats_is_what_eta_is_divided_by(norm, n_bytes, spread):
    """The margin guard needs eta per nat: winsorised, floored and per sequence, as equation (3)
    used it.
    """
    cal = CalibrationSection(score_norm=norm, span_clip=0.0)
    nats = spread * np.array([[-1.0, 0.5, 0.2, 0.9, -0.6, 1000.0]])  # the last one is winsorised
    scores = [[replace(score(x / n_bytes), n_bytes=n_bytes, raw=x) for x in nats[0]]]
    adv = solve(np.ones((1, 6)), np.ones((1, 6), bool), np.full((1, 6), n_bytes), scores, cal, 0.5)
    slope = (adv.token[0][3][0] - adv.token[0][0][0]) / (nats[0, 3] - nats[0, 0])
    assert slope == pytest.approx(0.5 / adv.std_cal_nats, rel=1e-9)


# failed grades
def test_failed_grades_leave_their_group():
    """[1, 1, 1, failed]: nothing to choose between; a failure that counted as 0 would pay three."""
    task, graded = np.array([[1.0, 1.0, 1.0, 0.0]]), np.array([[True, True, True, False]])
    groups = Groups(task, task > 0, np.ones((1, 4), int), graded)
    token = advantages(groups, calibration_part(groups, RAW), RAW, 0.5)
    assert np.concatenate(token[0]).tolist() == [0.0] * 4


@pytest.mark.parametrize("options", [{}, {"credit": "span"}, {"normalise": "joint"}])
@given(seed=SEEDS)
def test_what_a_failed_grade_says_counts_nothing(options, seed):
    """Neither its reward nor its calibration score reaches the others, whatever they are: they get
    what a group without it gets.
    """
    task, correct, lengths, scores = group(seed)
    cal = replace(RAW, cal_gate="skip_degenerate", **options)
    graded = np.random.default_rng(seed).random(task.shape) < 0.7
    junk = [
        [s if g else replace(s, value=1e6) for s, g in zip(*row)] for row in zip(scores, graded)
    ]

    def token_of(task_PG, correct_PG, scores_PG):
        groups = Groups(task_PG, correct_PG, lengths, graded, scores_PG)
        return advantages(groups, calibration_part(groups, cal), cal, 0.5)

    got = token_of(task, correct, scores)
    other = token_of(np.where(graded, task, 7.0), np.where(graded, correct, True), junk)
    for p, row in enumerate(map(np.flatnonzero, graded)):
        alone = Groups(
            task[p : p + 1, row],
            correct[p : p + 1, row],
            lengths[p : p + 1, row],
            np.ones((1, len(row)), bool),
            [[scores[p][g] for g in row]],
        )
        if len(row):
            want = advantages(alone, calibration_part(alone, cal), cal, 0.5)[0]
            for g, advantage_n in zip(row, want):
                np.testing.assert_allclose(got[p][g], advantage_n, atol=1e-12)
                np.testing.assert_allclose(got[p][g], other[p][g], atol=1e-12)


# outliers and gates
def test_winsorising_by_hand():
    keep, floor = np.ones((1, 5), bool), np.zeros((1, 1))
    got = winsorise(np.array([[0.0, 1.0, 2.0, 3.0, 100.0]]), 3.0, floor, keep)
    np.testing.assert_allclose(got, [[0, 1, 2, 3, 2 + 3 * 1.4826]])
    np.testing.assert_allclose(  # on both sides
        winsorise(np.array([[0.0, -1.0, -2.0, -3.0, -100.0]]), 3.0, floor, keep), -got
    )
    equal = winsorise(np.array([[0.0, 0.0, 0.0, 1.0, 100.0]]), 3.0, floor, keep)
    np.testing.assert_allclose(equal, [[0, 0, 0, 1, 3 * 1.2533 * 101 / 5]])  # no MAD
    wide = winsorise(np.array([[0.0, 1.0, 2.0, 3.0, 100.0]]), 3.0, floor + 5, keep)
    np.testing.assert_allclose(wide, [[0, 1, 2, 3, 2 + 3 * 5]])  # the least scale
    assert (winsorise(got, 0.0, floor, keep) == got).all(), "0 is off"


@given(SEEDS, st.integers(2, 6), st.floats(0.0, 0.1))
def test_a_majority_of_equal_texts_does_not_erase_the_others(seed, same, floor):
    others = np.random.default_rng(seed).normal(5.0, 1.0, same - 1)
    value = np.array([[0.0] * same + others.tolist()])
    got = winsorise(value, 3.0, np.array([[floor]]), np.ones_like(value, bool))[0]
    assert (got[:same] == 0).all() and (got[same:] > 0.5).all(), (
        "clipped to the median, they would be 0"
    )


@given(SEEDS)
def test_winsorising_keeps_order_and_what_is_not_kept_counts_nothing(seed):
    rng = np.random.default_rng(seed)
    value, keep, floor = (
        rng.standard_t(1.5, (3, 7)),
        rng.random((3, 7)) < 0.8,
        np.full((3, 1), 0.01),
    )
    got = winsorise(value, 3.0, floor, keep)
    for p in range(3):
        order = np.argsort(value[p])
        assert (np.diff(got[p, order]) >= 0).all()
    other = np.where(keep, value, 1e6)
    assert (winsorise(other, 3.0, floor, keep)[keep] == got[keep]).all()


GATES = {
    "none": [1, 1, 1],
    "skip_all_wrong": [1, 0, 1],
    "skip_degenerate": [0, 0, 1],
    "scale_by_task_std": [0, 0, 1],
}


@pytest.mark.parametrize("rule", GATES)
def test_gates(rule):
    correct = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]], bool)
    task_std = group_std(correct.astype(float), np.ones_like(correct))
    assert gate(correct, task_std, rule, np.ones_like(correct)).tolist() == GATES[rule]
    scores = [[score(v) for v in (1.0, 2.0, 3.0, 5.0)]] * 3
    got = solve(
        correct.astype(float),
        correct,
        np.ones((3, 4), int),
        scores,
        replace(RAW, cal_gate=rule),
        0.5,
    )
    plain = task_part(correct.astype(float))
    moved = [int((np.concatenate(row) != plain[p]).any()) for p, row in enumerate(got.token)]
    assert moved == GATES[rule] and got.cal_fraction == pytest.approx(sum(moved) / 3)


def test_a_grader_of_numbers_has_degenerate_groups_where_its_rewards_are_equal():
    """Nothing is correct or wrong there, which counts as correct elsewhere."""
    task = np.array([[0.3, 0.3, 0.3], [0.3, 0.7, 0.3], [1.0, 1.0, 0.0], [0.2, 0.2, 0.9]])
    graded = np.ones_like(task, bool)
    graded[3, 2] = False  # its grade failed
    correct = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]], bool)
    scores = [[score(v) for v in (1.0, 2.0, 5.0)]] * 4
    numeric = np.array([True, True, False, True])
    groups = Groups(task, correct, np.ones((4, 3), int), graded, scores, numeric)
    weights = {
        rule: calibration_part(groups, replace(RAW, cal_gate=rule)).weight_P.tolist()
        for rule in ("skip_degenerate", "skip_all_wrong")
    }
    assert weights == {"skip_degenerate": [0, 1, 1, 0], "skip_all_wrong": [1, 1, 1, 1]}


def test_scaling_by_spread_does_not_look_at_other_groups():
    correct = np.array([[1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]], bool)
    std = group_std(correct.astype(float), np.ones_like(correct))
    both = gate(correct, std, "scale_by_task_std", np.ones_like(correct))
    assert both.tolist() == [
        gate(correct[p : p + 1], std[p : p + 1], "scale_by_task_std", np.ones((1, 8), bool))[0]
        for p in (0, 1)
    ]
    np.testing.assert_allclose(both[0], np.sqrt(1 / 8) / 0.5)  # std of one in eight: 0.354
    assert both[0] < both[1] == 1


# credit by span
@given(SEEDS)
def test_one_span_at_the_first_token_is_the_sequence_value_with_the_others_as_baseline(seed):
    """G/(G-1) because the baseline leaves the rollout itself out, equation (3) takes it in."""
    values, G = np.random.default_rng(seed).normal(size=5), 5
    args = np.ones((1, G)), np.ones((1, G), bool), np.full((1, G), 2), [[score(v) for v in values]]
    span, sequence = (
        solve(*args, replace(RAW, credit=c), 0.5).token[0] for c in ("span", "sequence")
    )
    for a, b in zip(span, sequence):
        assert a[0] == pytest.approx(b[0] * G / (G - 1), rel=1e-9)


@given(SEEDS)
def test_reward_to_go_drops_by_the_span_that_is_left(seed):
    rng = np.random.default_rng(seed)
    spans, stop = rng.normal(size=4), float(rng.normal())
    mine = replace(score(0.0, span=spans, stop=stop), span=np.array([0, 0, 1, -1, 2, 3]))
    silent = score(0.0, span=np.zeros(4))  # a baseline of zeros
    tail = np.append(np.cumsum(spans[::-1])[::-1], 0) + stop
    # nothing is settled: the whole sum
    np.testing.assert_allclose(span_advantage([mine, silent], 0, 7), tail[0], atol=1e-12)
    got = span_advantage([mine, silent], 0, 7, following_span(mine.span, 4, 7))
    # -1 goes with what follows; the last is the stop
    np.testing.assert_allclose(got, tail[[0, 0, 1, 2, 2, 3, 4]], atol=1e-12)


def test_spans_alone_in_the_group_earn_nothing():
    assert (span_advantage([score(3.0), UNALIGNED], 0, 3) == 0).all() and (
        span_advantage([score(3.0), UNALIGNED], 1, 3) == 0
    ).all()


def test_prefix_credit_without_prefixes_is_the_whole_reward():
    group = [score(3.0), score(1.0), UNALIGNED]
    np.testing.assert_allclose(prefix_advantage(group, 0, 3), 2.0)
    assert (prefix_advantage(group, 2, 3) == 0).all()
    assert (prefix_advantage([score(3.0), UNALIGNED], 0, 2) == 0).all()


# the direction of eta
@pytest.mark.parametrize("credit", ["sequence", "span"])
@pytest.mark.parametrize("mode, sign", [("distillable", 1), ("undistillable", -1), ("off", 0)])
@pytest.mark.parametrize("p_easy", [0.5, 0.2, 0.8])
def test_the_word_moves_the_teacher_towards_or_away_from_the_proxy(mode, sign, p_easy, credit):
    """Two texts, both correct; the proxy finds `easy` likelier. The exact expected policy gradient
    over groups of four.
    """
    cal = replace(RAW, mode=mode, credit=credit)
    teacher, proxy = np.log([p_easy, 1 - p_easy]), np.log([0.95, 0.05])
    gradient = 0.0  # of log odds of `easy`
    for ys in product((0, 1), repeat=4):
        scores = [scored(proxy[[y]], teacher[[y]], 0.0, 3, (1, 1), np.array([0]), cal) for y in ys]
        adv = solve(
            np.ones((1, 4)), np.ones((1, 4), bool), np.ones((1, 4), int), [scores], cal, cal.eta
        )
        for y, a in zip(ys, adv.token[0]):
            gradient += np.exp(teacher[list(ys)].sum()) * a[0] * ((y == 0) - p_easy)
    assert np.sign(round(gradient, 12)) == sign


def test_margin_guard_keeps_a_quarter_of_beta():
    for strength, beta, std in product((0.1, 0.5, 3.0), (0.0, 0.04, 0.5), (0.0, 0.3, 5.0, 100.0)):
        used = margin_strength(strength, beta, std)
        assert 0 <= used <= strength
        if std:
            assert beta - used / std >= beta / 4 - 1e-12, "beta + eta_eff >= beta / 4"
            assert used == strength or beta - used / std == pytest.approx(beta / 4), (
                "and not lower than needed"
            )
