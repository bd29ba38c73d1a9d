"""What each form of the calibration reward pays for length: in a world where every group can be
listed, and at the optimum of the un-normalised objective (docs/method.md, "Length").
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from calibration_cases import score
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.calibration.advantages import (
    ONE_LENGTH,
    Groups,
    advantages,
    calibration_part,
    length_free,
    length_r2,
    std_nats,
    without_length,
)
from reflux.trainer.config.sections import CalibrationSection

SEEDS = st.integers(0, 2**32 - 1)
G = 4
WORDS = 4  # bytes of one
# every text of the world: (is it in the easy style?, words); the proxy is worse by 3 nats a word,
# and by 2 more for a text in the hard style, whatever its length
TEXTS = list(product((1.0, 0.0), (1, 2, 3)))
REWARD = {(easy, words): -3.0 * words - 2.0 * (1 - easy) for easy, words in TEXTS}
CAL = CalibrationSection(mode="distillable", winsor=0.0, std_floor=0.0, cal_gate="none")


def expected_gradients(norm: str, eta: float) -> tuple[float, float]:
    """Expected policy gradient along the length and along the style of texts, over all groups of G
    texts: sum over groups of P(group) sum_i A_i (feature_i - its mean), for a policy whose
    log-probability is linear in the number of words and in the style.
    """
    p = np.array([0.5 * chance for _ in (0, 1) for chance in (0.5, 0.3, 0.2)])
    words, easy = (np.array(x, float) for x in zip(*((n, e) for e, n in TEXTS)))
    draws = np.array(list(product(range(len(TEXTS)), repeat=G)))
    bytes_N = (WORDS * words).astype(int)
    values = np.array([REWARD[t] for t in TEXTS]) / (bytes_N if norm == "per_byte" else 1)
    scores = [score(v, n_bytes=n) for v, n in zip(values.tolist(), bytes_N.tolist())]
    ones = np.ones(draws.shape)
    groups = Groups(
        ones, ones > 0, np.ones(draws.shape, int), ones > 0, [[scores[i] for i in d] for d in draws]
    )
    cal = replace(CAL, score_norm=norm)
    token = advantages(groups, calibration_part(groups, cal), cal, eta)
    advantage = np.array([[a[0] for a in row] for row in token])
    chance = p[draws].prod(1)
    return tuple(
        float(chance @ (advantage * (feature[draws] - p @ feature)).sum(1))
        for feature in (words, easy)
    )


@pytest.mark.parametrize("eta", [0.5, -0.5])
def test_only_the_length_free_form_has_no_gradient_along_the_length(eta):
    """The sum makes texts shorter (distillable) or longer (undistillable) than the style asks for;
    per byte the constant of a style becomes a price of shortness; length-free is 0 in every group.
    The style is paid for by all.
    """
    gradients = {n: expected_gradients(n, eta) for n in ("sum", "per_byte", "length_free")}
    assert gradients["sum"][0] * eta < -0.1
    assert abs(gradients["per_byte"][0]) > 0.01
    assert gradients["length_free"][0] == pytest.approx(0.0, abs=1e-12)
    assert all(style * eta > 0.01 for _, style in gradients.values())
    # length hides most of the style from the sum
    assert abs(gradients["length_free"][1]) > 1.3 * abs(gradients["sum"][1])


def test_no_group_pays_for_length():
    """Not only on average: sum_i A_i and sum_i A_i bytes_i are 0, outliers pulled in or not."""
    g = np.random.default_rng(0)
    values = g.standard_cauchy((50, 6)) * 5
    bytes_PG = g.integers(5, 60, (50, 6))
    scores = [
        [score(v, n_bytes=int(n)) for v, n in zip(*row)] for row in zip(values.tolist(), bytes_PG)
    ]
    ones = np.ones(values.shape)
    groups = Groups(ones, ones > 0, np.ones(values.shape, int), ones > 0, scores)
    for winsor in (0.0, 3.0):
        cal = CalibrationSection(mode="distillable", winsor=winsor)
        token = advantages(groups, calibration_part(groups, cal), cal, 0.5)
        advantage = np.array([[a[0] for a in row] for row in token])
        assert np.abs(advantage.sum(1)).max() < 1e-9 and np.abs(advantage).max() > 0.3
        assert np.abs((advantage * bytes_PG).sum(1)).max() < 1e-7


@given(seed=SEEDS, constant=st.floats(-50, 50), slope=st.floats(-5, 5))
def test_what_grows_with_length_changes_nothing(seed, constant, slope):
    g = np.random.default_rng(seed)
    values, bytes_PG = g.normal(size=(3, 5)), g.integers(2, 90, (3, 5)).astype(float)
    scored_PG = g.random((3, 5)) < 0.8
    varied = [np.ptp(b[s]) > 20 for b, s in zip(bytes_PG, scored_PG) if s.any()]
    more = values + constant + slope * bytes_PG
    if all(varied) and len(varied) == 3:
        a, b = (length_free(x, bytes_PG, scored_PG) for x in (values, more))
        np.testing.assert_allclose(a, b, atol=1e-9)
    junk = np.where(scored_PG, values, 1e9)  # the unscored neither get nor give
    assert (without_length(junk, bytes_PG, scored_PG)[~scored_PG] == 0).all()
    one = without_length(junk, np.where(scored_PG, bytes_PG, 1e6), scored_PG)
    assert (one == without_length(values, bytes_PG, scored_PG)).all()


def test_texts_of_one_length_keep_their_difference():
    """18 and 19 bytes tell the styles of the miniature apart, and are no length to pay for."""
    values, scored_PG = np.array([[0.0, -2.0, -2.0, 0.0]]), np.ones((1, 4), bool)
    short, long = (np.array([[18.0, 19, 19, 18]]), np.array([[18.0, 38, 38, 18]]))
    assert np.std(short, ddof=1) / short.mean() < ONE_LENGTH
    np.testing.assert_allclose(without_length(values, short, scored_PG), values + 1)
    np.testing.assert_allclose(without_length(values, long, scored_PG), 0, atol=1e-12)
    assert length_r2(values, short, scored_PG) == length_r2(values, long, scored_PG) == [1.0]
    assert length_r2(values, np.full((1, 4), 9.0), scored_PG) == [0.0]


def part_of(values, lengths, cal, scored=None):
    """The calibration part of one group, all correct."""
    scored = scored or [True] * len(values)
    rows = zip(values, lengths, scored)
    scores = [replace(score(v, n_bytes=n), scored=ok) for v, n, ok in rows]
    ones = np.ones((1, len(values)))
    return calibration_part(Groups(ones, ones > 0, ones.astype(int), ones > 0, [scores]), cal)


@pytest.mark.parametrize("norm", ["sum", "per_byte", "length_free"])
def test_what_length_explains_is_that_of_the_rewards_as_they_were_scored(norm):
    """Before outliers are pulled in and length is taken out. The last one is not scored."""
    values, lengths = [-5.0, -9.0, -6.0, -90.0, -3.0, 1e6], [10, 20, 15, 30, 12, 99]
    cal = CalibrationSection(mode="distillable", score_norm=norm)
    found = part_of(values, lengths, cal, [True] * 5 + [False]).length_r2_P
    want = np.corrcoef(values[:5], lengths[:5])[0, 1] ** 2
    assert 0.6 < want < 0.9
    np.testing.assert_allclose(found, [want], rtol=1e-12)


@pytest.mark.parametrize(
    "norm, std_floor, floor",
    [
        ("sum", 0.01, 0.4),  # nats: times the mean of 40 bytes
        ("length_free", 0.01, 0.01),  # nats per byte
        ("per_byte", 0.01, 0.01),
        ("per_token", 0.01, 0.01),
        ("sum", 0.0, 8e-5),  # a millionth of the largest reward
        ("length_free", 0.0, 2e-6),  # the same per byte of the mean length
        ("per_byte", 0.0, 8e-5),
        ("per_token", 0.0, 8e-5),
    ],
)
def test_the_least_std_is_in_the_units_of_the_reward(norm, std_floor, floor):
    """Bytes 20, 40, 60 and a text without a score, whose size counts nowhere."""
    cal = CalibrationSection(mode="distillable", score_norm=norm, std_floor=std_floor)
    part = part_of([-20.0, -80.0, 60.0, 1e9], [20, 40, 60, 999], cal, [True] * 3 + [False])
    np.testing.assert_allclose(part.floor_P1, [[floor]], rtol=1e-12)


def test_per_nat_the_length_free_form_is_as_strong_as_it_says():
    """std_nats: a residual of one std is worth eta."""
    values, lengths = [-5.0, -9.0, -6.0, -14.0, -3.0], [10, 20, 15, 30, 12]
    scores = [[score(v, n_bytes=n) for v, n in zip(values, lengths)]]
    ones = np.ones((1, 5))
    groups = Groups(ones, ones > 0, np.ones((1, 5), int), ones > 0, scores)
    cal = CalibrationSection(mode="distillable", winsor=0.0, std_floor=0.0)
    part = calibration_part(groups, cal)
    residual = without_length(np.array([values]), np.array([lengths], float), ones > 0)[0]
    token = advantages(groups, part, cal, 0.5)[0]
    np.testing.assert_allclose(
        [a[0] for a in token], 0.5 * residual / std_nats(groups, part, cal, 0.5), rtol=1e-9
    )


# --- the optimum


def optimum(form: str, eta: float, beta: float, world) -> np.ndarray:
    """The fixed point of the expected gradient of E[eta sg(r) ] - beta KL(pi || T0) over all texts
    of a world, pi itself the denominator of r.
    """
    log_t0, log_c, words = world
    log_pi = log_t0.copy()
    for _ in range(4000):
        pi = np.exp(log_pi)
        reward = log_c - log_pi
        if form == "per_byte":
            reward = reward / words
        if form == "length_free":
            centred = words - pi @ words
            reward = reward - (pi @ (centred * reward)) / (pi @ centred**2) * centred
        log_pi = log_pi + 0.1 * (eta * reward - beta * (log_pi - log_t0))
        log_pi -= np.log(np.exp(log_pi).sum())
    return np.exp(log_pi)


@pytest.mark.parametrize("eta, beta", [(0.5, 1.0), (-0.4, 1.0)])
def test_the_optima_of_docs_method(eta, beta):
    """sum: T0^(beta/(beta+eta)) C^(eta/(beta+eta)), lengths included. length_free: the same among
    texts of one length, and lengths whose log-ratio to T0 has no slope.
    """
    g = np.random.default_rng(3)
    words = np.repeat(np.arange(1.0, 5.0), 3)
    normed = lambda x: x - np.log(np.exp(x).sum())  # noqa: E731
    log_t0 = normed(g.normal(size=12) - 0.3 * words)
    log_c = normed(g.normal(size=12) - 1.5 * words)
    world = (log_t0, log_c, words)
    pi = {form: optimum(form, eta, beta, world) for form in ("sum", "per_byte", "length_free")}
    closed = np.exp(normed((beta * log_t0 + eta * log_c) / (beta + eta)))
    np.testing.assert_allclose(pi["sum"], closed, atol=1e-8)
    for n in range(1, 5):
        same = words == n
        a, b = (pi[f][same] / pi[f][same].sum() for f in ("sum", "length_free"))
        np.testing.assert_allclose(a, b, atol=1e-8)

    def slope(p):
        """Of log p / T0 on words, under p."""
        centred = words - p @ words
        return float(p @ (centred * (np.log(p) - log_t0)) / (p @ centred**2))

    assert slope(pi["length_free"]) == pytest.approx(0.0, abs=1e-8)
    assert slope(pi["sum"]) * eta < -0.1 and abs(slope(pi["per_byte"])) > 0.02
    moved = {form: abs(p @ words - np.exp(log_t0) @ words) for form, p in pi.items()}
    assert moved["length_free"] < 0.5 * moved["sum"]
