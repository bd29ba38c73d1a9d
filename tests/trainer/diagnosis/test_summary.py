"""A diagnosis adds up readings: every number on cases that a hand can compute, intervals over
prompts, verdicts both ways.
"""

import math
from dataclasses import replace

import pytest
from token_stats_cases import reading

from reflux.trainer.diagnosis.summary import diagnose_readings, estimate_text, flatten, verdict
from reflux.trainer.runs.stats import Estimate


def test_the_grid_has_both_directions_on_every_prefix():
    found = diagnose_readings(
        [
            reading(0, "student"),
            reading(1, "student", forward=(1.0, 1.0)),
            reading(0, "teacher", reverse=(2.0, 0.0)),
        ]
    )
    forward = found["grid"]["forward"]
    assert forward["student"]["per_token"]["mean"] == pytest.approx((0.6 + 2.0) / 4)
    assert forward["student"]["per_text"]["mean"] == pytest.approx(1.3) and forward["student"][
        "per_byte"
    ]["mean"] == pytest.approx(2.6 / 4)
    assert found["grid"]["reverse"]["teacher"]["per_token"]["mean"] == 1.0
    assert found["texts"] == {
        "teacher": {"texts": 1, "prompts": 1, "tokens": 2},
        "student": {"texts": 2, "prompts": 2, "tokens": 4},
    }


def test_sequence_kls_belong_to_their_own_writer_in_both_estimators():
    found = diagnose_readings(
        [reading(0, "teacher", student=(-3.0, -1.0), teacher=(-1.0, -1.0)), reading(0, "student")]
    )["sequence"]
    # log p_T - log p_S on the teacher's text
    assert found["forward"]["sampled_tokens"]["mean"] == pytest.approx(2.0)
    # the other way round on the student's
    assert found["reverse"]["sampled_tokens"]["mean"] == pytest.approx(1.0)
    assert found["forward"]["exact_tokens"]["mean"] == pytest.approx(0.6) and found["reverse"][
        "exact_tokens"
    ]["mean"] == pytest.approx(0.4)


def test_intervals_are_over_prompts_not_tokens():
    """Eight texts of one prompt are one observation: no interval. Two prompts that differ: from one
    value to the other.
    """
    one = diagnose_readings([reading(0, "student", forward=(float(i), 0.0)) for i in range(8)])[
        "grid"
    ]["forward"]["student"]["per_token"]
    assert one["n"] == 1 and math.isnan(one["low"])
    two = diagnose_readings(
        [reading(0, "student", forward=(0.0, 0.0)), reading(1, "student", forward=(2.0, 2.0))]
    )
    per_token = two["grid"]["forward"]["student"]["per_token"]
    assert (per_token["low"], per_token["mean"], per_token["high"]) == (0.0, 1.0, 2.0)


def test_the_tail_on_numbers_by_hand():
    tail = diagnose_readings([reading(0, "teacher")], share=0.8)["tail"]["forward"]
    # 0.5 / 0.6 is over 80 %
    assert tail["bucket"] == pytest.approx([0.25, 0.3]) and tail["k_share"] == 1
    assert tail["gradient_outside"] == pytest.approx(0.4)
    assert diagnose_readings([reading(0, "teacher")], share=0.9)["tail"]["forward"]["k_share"] == 10
    # function words: half the KL over half the tokens, a sixth of the first ten's: lift 1 / lift
    # 1/3
    assert tail["tail_noise_index"]["mean"] == pytest.approx(3.0)
    assert tail["types"]["function"] == pytest.approx(
        {"share": 0.5, "share_at_10": 1 / 6, "frequency": 0.5}
    )
    assert tail["sparsity"] == 1.0  # 0.4 of 0.6 is not 80 %: both tokens


def test_bands_compare_their_share_of_the_kl_with_that_of_the_tokens():
    rows = [reading(0, "teacher", bands=(0, 0)), reading(1, "teacher", bands=(0, 1))]
    bands = diagnose_readings(rows)["tail"]["forward"]["bands"]
    assert bands["top 10"] == pytest.approx(
        {"share": 0.5, "share_at_10": 0.25, "frequency": 0.75, "lift": 2 / 3, "lift_at_10": 1 / 3}
    )
    assert bands["11-100"]["lift"] == 0 and bands["11-100"]["frequency"] == 0.25
    assert bands["never seen"]["share"] == 0.5 and math.isnan(bands["never seen"]["lift"])
    for key in ("share", "share_at_10", "frequency"):
        assert sum(b[key] for b in bands.values()) == pytest.approx(1.0)
    assert diagnose_readings(rows[::-1])["tail"]["forward"]["bands"] == bands
    assert (
        diagnose_readings([replace(r, band_n=None) for r in rows])["tail"]["forward"]["bands"] == {}
    )


def test_off_policy_compares_prompts_that_both_answered():
    rows = [
        reading(0, "teacher", forward=(0.1, 0.1)),
        reading(0, "student", forward=(0.3, 0.3)),
        reading(1, "student", forward=(9.0, 9.0)),
    ]
    off = diagnose_readings(rows)["off_policy"]
    assert (
        off["prefix_ratio"]["forward"]["mean"] == pytest.approx(3.0)
        and off["prefix_ratio"]["forward"]["n"] == 1
    )
    assert off["effective_samples"]["whole"]["mean"] == pytest.approx(1.0)
    assert len(off["decile"]["forward"]["student"]) == 10
    assert off["decile"]["forward"]["teacher"][0] == pytest.approx(0.1) and math.isnan(
        off["decile"]["forward"]["teacher"][3]
    )


def test_effective_samples_fall_with_spread_weights_and_see_the_beginning_alone():
    same, far = (
        reading(0, "teacher", student=(-1.0, -1.0), teacher=(-1.0, -1.0)),
        reading(1, "teacher", student=(-50.0, -1.0), teacher=(-1.0, -1.0)),
    )
    ess = diagnose_readings([same, far])["off_policy"]["effective_samples"]
    # no text is longer than 16 tokens
    assert ess["whole"]["mean"] == pytest.approx(0.5) and list(ess) == ["whole"]


def test_log_ratios_have_no_sign_and_a_tail():
    rows = [
        reading(0, "teacher", student=(-3.0, -1.0), teacher=(-1.0, -1.0)),
        reading(1, "teacher", student=(-1.0, -1.0), teacher=(-1.0, -5.0)),
    ]
    size = diagnose_readings(rows)["off_policy"]["log_ratio"]  # 2, 0, 0, 4
    assert (
        size["mean"]["mean"] == pytest.approx(1.5)
        and size["max"] == 4.0
        and size["p99"] == pytest.approx(2 + 2 * 0.97)
    )
    assert "log_ratio" not in diagnose_readings([reading(0, "student")])["off_policy"]


def test_what_the_teacher_solves_is_asked_of_the_student():
    # the last id is the stop token
    rows = [
        reading(0, "teacher", right=True, student=(-2.0, -1.0), teacher=(-1.0, -1.0), ids=(5, 9)),
        reading(0, "teacher", right=False),
        reading(1, "teacher", right=True, student=(0.0, 0.0), teacher=(0.0, 0.0), ids=(5, 9)),
        reading(0, "student", right=True),
        reading(0, "student", right=False),
        reading(1, "student", right=False),
        reading(1, "student", right=False),
        reading(2, "student", right=True),
    ]
    gap = diagnose_readings(rows)["gap"]
    bits = gap["right_teacher_bits_per_byte"]  # one content token over two bytes each, two texts
    assert bits["student"]["mean"] == pytest.approx(2.0 / math.log(2) / 4) and bits["teacher"][
        "mean"
    ] == pytest.approx(1.0 / math.log(2) / 4)
    solved = gap["on_solved_by_teacher"]
    assert (
        solved["n"] == 2
        and solved["pass_at_n"]["mean"] == 0.5
        and solved["accuracy"]["mean"] == 0.25
        and solved["accuracy"]["n"] == 2
    )
    assert not {"right_teacher_bits_per_byte", "on_solved_by_teacher"} & set(
        diagnose_readings(rows[-3:])["gap"]
    )


def test_the_gap_needs_finished_graded_texts_of_the_student():
    rows = [
        reading(0, "student", right=True, teacher=(-4.0, -4.0)),
        reading(0, "student", right=False, teacher=(-1.0, -1.0)),
        reading(0, "student", right=False, ended=False),
        reading(0, "teacher", right=True),
    ]
    gap = diagnose_readings(rows)["gap"]
    assert gap["wrong_trace"]["graded_texts"] == 2 and gap["wrong_trace"]["pair"]["mean"] == 1.0
    assert gap["wrong_trace"]["margin"]["mean"] == pytest.approx(3.0) and gap[
        "degraded_prefix"
    ] == pytest.approx(1.0)
    assert gap["overlap"]["mean"] == pytest.approx(0.5) and gap["teachable"][
        "mean"
    ] == pytest.approx(0.8)
    assert "wrong_trace" not in diagnose_readings([reading()])["gap"]


def test_symptoms_of_the_student_only():
    rows = [
        reading(0, "student", right=True, student=(0.0, 0.0)),
        reading(1, "student", right=False, student=(0.0, 0.0), ended=False),
        reading(0, "teacher", ended=False),
    ]
    s = diagnose_readings(rows)["symptoms"]
    assert s["off_nucleus"] == 0.5  # the teacher's text does not count
    assert (
        s["truncated"] == 0.5
        and s["confidence"]["confident_wrong"] == 0.5
        and s["confidence"]["overconfidence"] == 0.5
    )
    assert diagnose_readings([reading(0, "teacher")])["symptoms"] == {}


def many(tail, ratio, wrong_first):
    """Twelve prompts with the same story: noise in the tail or not, student prefixes worse or not,
    teacher likes wrong texts or not.
    """
    rows = []
    for i in range(12):
        first = (0.1, 0.5) if tail else (0.5, 0.1)
        kl = (0.1 * ratio, 0.1 * ratio + 0.01 * i)
        liked, other = (-1.0, -1.0), (-5.0, -5.0)
        rows += [
            reading(
                i,
                "teacher",
                forward=(0.1, 0.1 + 0.01 * i),
                reverse=(0.1, 0.1 + 0.01 * i),
                first_sums=first,
            ),
            reading(
                i,
                "student",
                right=True,
                forward=kl,
                reverse=kl,
                teacher=other if wrong_first else liked,
                first_sums=first,
            ),
            reading(
                i,
                "student",
                right=False,
                forward=kl,
                reverse=kl,
                teacher=liked if wrong_first else other,
                first_sums=first,
            ),
        ]
    return diagnose_readings(rows)


def test_verdicts_go_both_ways():
    sick, healthy = verdict(many(True, 4.0, True)), verdict(many(False, 0.5, False))
    assert (
        [t["trap"] for t in sick]
        == [t["trap"] for t in healthy]
        == ["tail noise", "off-policy instability", "teacher-student gap"]
    )
    assert all(t["present"] for t in sick) and not any(t["present"] for t in healthy)
    assert (
        "bucket" in sick[0]["advice"]
        and "on_policy" in sick[1]["advice"]
        and "distillable" in sick[2]["advice"]
    )
    assert all(t["low"] <= t["mean"] <= t["high"] for t in sick + healthy)


def test_a_number_without_an_interval_is_no_verdict():
    one = verdict(
        diagnose_readings(
            [
                reading(0, "teacher"),
                reading(0, "student", right=True),
                reading(0, "student", right=False),
            ]
        )
    )
    assert [t["present"] for t in one] == [None] * 3 and all(
        "cannot be said from 1 prompts" in t["advice"] for t in one
    )
    nobody = verdict(diagnose_readings([reading(i, "student", right=True) for i in range(3)]))[-1]
    assert nobody["present"] is None and nobody["n"] == 0


@pytest.mark.parametrize(
    "low, high, says",
    [(0.1, 0.3, "cleaner on the student's"), (-0.3, -0.1, "noisier on"), (-0.1, 0.3, "much alike")],
)
def test_the_gradient_joins_the_advice_and_not_the_verdict(low, high, says):
    found = many(False, 4.0, False)
    plain = verdict(found)
    one = {
        "student": {"unbiased": {"mean": 0.4}},
        "teacher": {"unbiased": {"mean": 0.2}},
        "on_minus_off": {"mean": 0.2, "low": low, "high": high, "off": "teacher"},
    }
    found["off_policy"]["gradient"] = {"forward": one, "reverse": one}
    told = verdict(found)
    assert (
        says in told[1]["advice"]
        and "signal to noise 0.4, and 0.2 on the teacher's" in told[1]["advice"]
    )
    assert [t | {"advice": ""} for t in told] == [t | {"advice": ""} for t in plain] and told[
        0
    ] == plain[0]


def test_without_student_texts_there_is_only_the_first_verdict():
    found = diagnose_readings([reading(i, "teacher") for i in range(3)])
    assert [t["trap"] for t in verdict(found)] == ["tail noise"]
    found["verdict"] = verdict(found)
    assert flatten(found) == {"diagnose/tail_noise": pytest.approx(3.0)}


def test_numbers_for_people():
    assert estimate_text(Estimate(0.5, 0.1, 0.4, 0.6, 3)) == "0.500 [0.400, 0.600]"
