"""The acceptance rules, on runs and on results whose numbers are known."""

import math
from dataclasses import replace
from statistics import stdev

import pytest
from report_runs import edit_logs, write_matrix

from reflux.trainer.runs.stats import (
    Estimate,
    over_seeds,
    ratio_over_seeds,
    ratio_p,
    relative_over_seeds,
    t_tail,
)
from reflux.trainer.studies.attack_report import build_report
from reflux.trainer.studies.results import (
    Change,
    DefenceResult,
    QueryCost,
    Results,
    SeedPairs,
    StudentResult,
)
from reflux.trainer.studies.verdict import (
    AttackOutcome,
    attack_outcomes,
    check_rule,
    collapse_lines,
    conclusion,
    headline,
    headline_lines,
    verdict_lines,
    within_a1,
)

SHARED = (
    "the attacks share teachers, student starts and prompts, so they are no independent "
    "confirmations of each other"
)
PAID = {"original": 0.9, "distillable": 0.9, "undistillable": 0.8}  # teachers' accuracies


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("reflux.trainer.studies.attack_report.draw_figures", lambda *_: {})


def estimate(mean, half=0.01):
    return Estimate(mean, half, mean - half, mean + half, 3)


def student(last, best):
    """A student with these relative changes."""
    nothing = over_seeds([])
    return StudentResult(
        sampled=nothing,
        greedy=nothing,
        answered=1.0,
        correct_if_answered=1.0,
        best=nothing,
        styles={},
        greedy_styles={},
        seconds=nothing,
        cost=QueryCost(0, 0, 0, 0.0),
        late_spike=1.0,
        change=Change(sampled=last, greedy=nothing, best=best),
    )


def rows_of(teacher, students):
    """attack -> students of this teacher."""
    return {attack: {teacher: s} for attack, s in students.items()}


def test_an_attack_fails_only_by_the_whole_interval_of_both_checkpoints():
    low, wide, high = estimate(-0.8), estimate(-0.8, half=0.4), estimate(-0.2)
    changes = {
        "by both": (low, low),
        "early": (low, high),
        "early, wide": (low, wide),
        "late": (high, high),
        "wide": (wide, low),
        "wide, early": (wide, high),
        "one seed": (over_seeds([-0.8]), over_seeds([-0.8])),
        "two seeds": (over_seeds([-0.8, -0.8]), over_seeds([-0.8, -0.8])),
    }
    students = rows_of("undistillable", {a: student(*c) for a, c in changes.items()})
    assert attack_outcomes(students) == [
        AttackOutcome("by both", "failed"),
        AttackOutcome("late", "succeeded"),
        AttackOutcome("wide", "inconclusive"),
        AttackOutcome("one seed", "inconclusive"),
        AttackOutcome("two seeds", "inconclusive"),
        AttackOutcome("early", "succeeded", "best"),
        AttackOutcome("early, wide", "inconclusive", "best"),
        AttackOutcome("wide, early", "succeeded", "best"),
    ]


def with_pairs(after, before, best=None):
    """A student with these accuracies by seed at its last checkpoint, and at its best one."""

    def paired(values):
        n = len(values)
        return SeedPairs(tuple(map(str, range(n))), tuple(values), tuple(before[:n]))

    best = after if best is None else best
    made = student(*(relative_over_seeds(x, before[: len(x)]) for x in (after, best)))
    pairs = {"last": paired(after), "best": paired(best)}
    return replace(made, change=replace(made.change, pairs=pairs))


def test_the_p_of_an_attack_is_the_larger_of_both_checkpoints():
    """Whichever of them it is. A checkpoint with too few seeds for a verdict leaves none."""
    before, clear, wide = [0.60, 0.62, 0.61], [0.10, 0.11, 0.12], [0.10, 0.14, 0.16]
    least, most = (ratio_p(x, before, 0.5) for x in (clear, wide))
    assert least < most / 4
    students = {
        "late": with_pairs(wide, before, best=clear),
        "early": with_pairs(clear, before, best=wide),
        "clear": with_pairs(clear, before),
        "too few": with_pairs(clear, before, best=clear[:2]),
    }
    found = {o.attack: o.p for o in attack_outcomes(rows_of("undistillable", students))}
    assert found == pytest.approx(
        {"late": most, "early": most, "clear": least, "too few": math.nan}, nan_ok=True
    )


def test_what_fails_alone_need_not_fail_in_a_family():
    """Three seeds at a fifth of the original's, give or take: p 0.01 alone, times the family."""
    weak = with_pairs([0.10, 0.14, 0.16], [0.62, 0.60, 0.61])
    kept = with_pairs([0.55, 0.60, 0.62], [0.60, 0.62, 0.61])
    students = {f"a{i}": {"undistillable": weak} for i in range(8)}
    students["kept"] = {"undistillable": kept}
    outcomes = attack_outcomes(students)
    assert [o.verdict for o in outcomes] == ["failed"] * 8 + ["succeeded"]
    rest = [a - b / 2 for a, b in zip([0.10, 0.14, 0.16], [0.62, 0.60, 0.61])]
    p = t_tail(sum(rest) / 3 / (stdev(rest) / 3**0.5), 2)
    assert outcomes[0].p == pytest.approx(p) and 0.005 < p < 0.05 / 2
    assert outcomes[0].p_family == pytest.approx(8 * p) and 8 * p > 0.05  # "kept" comes first
    assert attack_outcomes({"a0": {"undistillable": weak}})[0].p_family == pytest.approx(p)
    line = next(
        x
        for x in verdict_lines(Results(teachers={}, students=students, baselines={}))
        if "Holm" in x
    )
    least, kept_p = outcomes[0].p_family, outcomes[-1].p_family
    assert f"0 of 8 failed, smallest adjusted p {least:.3f}" in line and kept_p <= 0.05
    assert f"1 of 1 succeeded (kept), smallest adjusted p {kept_p:.3f}; {SHARED}" in line


@pytest.mark.parametrize(
    "original, protected, says",
    [
        ((0.95, 0.0), (0.95, 0.0), "nothing to lose, for the original's student has no correct"),
        ((0.95, 0.0), (0.2, 0.5), "nothing to lose, for the original's student has no correct"),
        ((0.0, 0.0), (0.0, 0.0), "nothing to lose, for the original's student has no correct"),
        ((0.95, 0.8), (0.95, 0.7), "no collapse"),
        ((0.95, 0.8), (0.95, 0.1), "wrong answers, not missing ones"),
        ((0.95, 0.8), (0.3, 0.8), "mostly a format failure"),
        ((1.0, 0.4), (0.8, 0.4), "mostly a format failure"),
        ((1.0, 0.4), (0.8, 0.6), "no collapse"),  # fewer answers, and more of them correct
        ((1.0, 0.4), (0.3, 1.0), "mostly a format failure"),
        ((1.0, 0.4), (0.0, math.nan), "mostly a format failure, with answers in fewer than 5%"),
        ((1.0, 0.4), (0.04, 0.0), "mostly a format failure, with answers in fewer than 5%"),
        ((1.0, 0.4), (0.06, 0.0), "wrong answers, not missing ones"),
        ((0.04, 0.4), (0.04, 0.0), "wrong answers, not missing ones"),
        ((0.0, math.nan), (0.5, 0.4), "nothing to lose, for the original's student has no correct"),
    ],
)
def test_a_collapse_needs_something_to_lose(original, protected, says):
    """(fraction of answers found, fraction of these that are correct) of both students."""
    row = {
        name: replace(
            student(over_seeds([]), over_seeds([])),
            answered=found,
            correct_if_answered=correct,
            sampled=over_seeds([found * correct if found else 0.0]),
        )
        for name, (found, correct) in (("original", original), ("undistillable", protected))
    }
    (line,) = collapse_lines({"kd": row})
    assert says in line.rpartition(": ")[2] and "nan" not in line


def test_the_rules_have_their_own_side():
    changes = {"up": estimate(0.2), "little": estimate(0.1), "down": estimate(-0.6)}
    for teacher, holds in (("distillable", "up"), ("undistillable", "down")):
        students = {a: {teacher: student(c, c)} for a, c in changes.items()}
        rule = check_rule(students, teacher)
        assert rule.of("holds") == [holds]
        assert rule.of("violated") == [a for a in changes if a != holds]
    unmeasured = {"a": {"undistillable": student(over_seeds([]), over_seeds([]))}}
    assert check_rule(unmeasured, "undistillable").changes == {}


def test_a1_needs_the_whole_interval():
    """A4: two seeds are never sure, however alike."""
    assert within_a1(over_seeds([0.002, 0.001, 0.0])) == "holds"
    assert within_a1(over_seeds([0.02, -0.02, 0.0])) == "inconclusive"
    assert within_a1(over_seeds([0.1, 0.101, 0.1])) == "violated"
    assert within_a1(over_seeds([0.0, 0.0])) == within_a1(over_seeds([0.1, 0.1])) == "inconclusive"
    assert within_a1(over_seeds([0.0])) == within_a1(over_seeds([])) == "inconclusive"


def test_a_teacher_that_lost_accuracy_and_an_attack_that_succeeded_are_named(tmp_path):
    scores = {"original": 0.5, "distillable": 0.52, "undistillable": 0.45}
    write_matrix(tmp_path, scores, teachers=PAID, seeds="012")
    lines = build_report(tmp_path).verdict
    gap = "-10.0 [-10.0, -10.0]"
    limit = f"within 2 points (sampled {gap}, greedy {gap}; n = 3 seeds)"
    assert f"teacher undistillable: accuracy NOT preserved {limit}" in lines
    assert sum("0 of 1 attacks" in line for line in lines) == 3
    assert "not reached: kd +4% [+4%, +4%]" in lines
    assert "attack succeeded: kd -10% [-10%, -10%]" in lines


def test_the_conclusion_names_what_succeeded_and_what_the_teacher_paid(tmp_path):
    scores = {"original": 0.5, "distillable": 0.52, "undistillable": 0.45}
    write_matrix(tmp_path, scores, teachers=PAID, seeds="012")
    text = build_report(tmp_path).conclusion
    assert text.startswith(
        "The undistillable teacher lost accuracy itself. Of 1 attacks on it 0 failed"
    )
    assert "Succeeded: kd (0.450 against 0.500 from the original)." in text
    assert "by the whole interval, under 0 of 1 attacks; not under kd." in text
    assert "three seeds" not in text


@pytest.mark.parametrize("seeds", ["0", "01"])
def test_fewer_than_three_seeds_give_no_verdict(tmp_path, seeds):
    """A4. Two seeds of the same numbers have an interval of no width."""
    scores = {"original": 0.5, "task_only": 0.5, "distillable": 0.9, "undistillable": 0.1}
    write_matrix(tmp_path, scores, teachers=PAID, seeds=seeds)
    report = build_report(tmp_path)
    assert report.conclusion.endswith(". Fewer than three seeds give no verdict (A4).")
    assert "0 failed, 0 succeeded and 1 are inconclusive" in report.conclusion
    lines = "\n".join(report.verdict)
    assert lines.count("accuracy INCONCLUSIVE within 2 points") == 2
    control = "above the student of the task-only teacher (eta = 0), whole interval: 0 of 1 attacks"
    assert f"{control}, 1 inconclusive" in lines
    (outcome,) = attack_outcomes(report.students)
    assert math.isnan(outcome.p) and math.isnan(outcome.p_family)


def test_the_attacks_without_three_seeds_are_named(tmp_path):
    students = {
        name: {"undistillable": with_pairs([0.1, 0.11, 0.12][:n], [0.6, 0.61, 0.62][:n])}
        for name, n in (("kd", 3), ("gkd", 2))
    }
    students["gkd"]["original"] = students["gkd"]["undistillable"]
    text = conclusion(Results(teachers={}, students=students, baselines={}))
    assert "1 failed, 0 succeeded and 1 are inconclusive" in text
    assert text.endswith("Fewer than three seeds give no verdict (A4): gkd.")


def test_less_than_half_with_an_interval_that_is_not_is_inconclusive(tmp_path):
    """Original 0.9 and 0.1 over two seeds, undistillable 0.05: -90 % in the mean, and an interval
    over two seeds that holds 0.
    """
    write_matrix(tmp_path, {"original": 0.5, "distillable": 0.6, "undistillable": 0.05})
    for seed, accuracy in (("0", 0.9), ("1", 0.1)):
        last = {"eval/sampled": accuracy, "eval/greedy": accuracy}

        def edit(row, last=last):
            return row | last if row.get("event") == "eval" and row["step"] == 3 else row

        edit_logs(tmp_path, [f"s-original-{seed}"], edit)
    report = build_report(tmp_path)
    # two seeds bound no ratio to 0.9 and 0.1
    assert "inconclusive: kd -90%" in report.verdict
    assert "Of 1 attacks on it 0 failed, 0 succeeded and 1 are" in report.conclusion
    assert "Inconclusive: kd (0.050 against 0.500 from the original)." in report.conclusion


def test_a_gain_that_training_on_the_task_gives_too_is_seen(tmp_path):
    scores = {"original": 0.4, "task_only": 0.7, "distillable": 0.6, "undistillable": 0.1}
    write_matrix(tmp_path, scores, seeds="012")
    line = "above the student of the task-only teacher (eta = 0), whole interval: 0 of 1 attacks"
    assert (
        f"{line}, 0 inconclusive; the control was not run for 0" in build_report(tmp_path).verdict
    )


def test_a_student_is_above_the_controls_by_the_whole_interval():
    gaps = {
        "above": over_seeds([0.1, 0.11, 0.12]),
        "above in the mean": over_seeds([0.2, 0.1, -0.1]),
        "below in the mean": over_seeds([-0.2, -0.1, 0.1]),
        "below": over_seeds([-0.1, -0.11, -0.12]),
        "the same": over_seeds([0.0, 0.0, 0.0]),
        "two seeds": over_seeds([0.1, 0.1]),
        "not run": None,
    }
    nothing = student(over_seeds([]), over_seeds([]))
    students = {a: replace(nothing, over_control=gap) for a, gap in gaps.items()}
    results = Results(teachers={}, students=rows_of("distillable", students), baselines={})
    assert verdict_lines(results) == [
        "above the student of the task-only teacher (eta = 0), whole interval: 1 of 6 attacks, "
        "3 inconclusive; the control was not run for 1"
    ]


@pytest.mark.parametrize(
    "spikes, which, largest",
    [
        ((3.0, 50.0, 7.0), "diverged under b", "50.0"),
        ((11.0, 4.0, 12.0), "diverged under a, c", "12.0"),
        ((3.0, 10.0, 2.0), "none diverged", "10.0"),
        ((math.nan, 3.0, 2.0), "none diverged", "3.0"),
    ],
)
def test_of_several_students_that_collapsed_the_largest_spike_is_told(spikes, which, largest):
    """What did not collapse may have any."""
    low, high = estimate(-0.8), estimate(-0.4)
    students = {a: replace(student(low, low), late_spike=s) for a, s in zip("abc", spikes)}
    students["d"] = replace(student(high, high), late_spike=99.0)
    results = Results(teachers={}, students=rows_of("undistillable", students), baselines={})
    (line,) = [x for x in verdict_lines(results) if x.startswith("training of")]
    assert line.endswith(
        f": {which} (largest gradient norm in the second half of a run {largest} times its median "
        "there; limit 10)"
    )


def test_the_headline_is_the_worst_attack(tmp_path):
    write_matrix(tmp_path, {"original": 0.6, "distillable": 0.8, "undistillable": 0.1}, start=0.2)
    text = "\n".join(build_report(tmp_path).verdict)
    most = "headline: largest distillability of the undistillable teacher over 1 attacks"
    one = " (1 = what the original gives)"
    assert f"{most}{one}: -0.25 [-0.25, -0.25] (kd; n = 2 seeds), mean over 1 attacks -0.25" in text
    assert f"smallest distillability of the distillable teacher over 1 attacks{one}: 1.50 [" in text
    # the original's gain of 0.01 is too small to compare with
    little = {"original": 0.21, "distillable": 0.8, "undistillable": 0.1}
    write_matrix(tmp_path / "little", little, start=0.2)
    assert "distillability" not in "\n".join(build_report(tmp_path / "little").verdict)


def student_of(score):
    return replace(student(over_seeds([]), over_seeds([])), score=score)


@pytest.mark.parametrize("order", [(0.4, 0.2, 0.7, 0.5), (0.7, 0.5, 0.2, 0.4)])
def test_of_several_attacks_the_headline_is_the_one_that_the_teacher_does_worst_under(order):
    """Most for who wants to give little, least for who wants to give more."""
    scores = {f"gives {x}": over_seeds([x - 0.01, x, x + 0.01]) for x in order}
    students = {a: {t: student_of(s) for t in PAID} for a, s in scores.items()}
    for teacher, attack in (("undistillable", "gives 0.7"), ("distillable", "gives 0.2")):
        found = headline(teacher, scores)
        assert (found.attack, found.score, found.attacks) == (attack, scores[attack], 4)
        assert found.mean.value == pytest.approx(0.45)
    undistillable, distillable = headline_lines(students)
    assert "largest distillability of the undistillable teacher over 4" in undistillable
    assert "0.70 [0.68, 0.72] (gives 0.7; n = 3 seeds), mean over 4 attacks 0.45" in undistillable
    assert "smallest distillability of the distillable teacher over 4" in distillable
    assert "0.20 [0.18, 0.22] (gives 0.2; n = 3 seeds), mean over 4 attacks 0.45" in distillable


def test_the_mean_leaves_out_attacks_without_a_bounded_interval_and_names_them():
    wide = ratio_over_seeds([0.5, 0.6, 0.4], [0.01, 0.2, 0.0])
    scores = {"kd": over_seeds([0.4, 0.5, 0.6]), "odd": wide, "rkl": over_seeds([0.2, 0.3, 0.4])}
    rows = {a: {"undistillable": student_of(s)} for a, s in scores.items()}
    (line,) = headline_lines(rows)
    assert "(odd; n = 3 seeds, no bounded interval), mean over 2 attacks 0.40, " in line
    assert line.endswith("2 of 3 bounded; without a bounded interval: odd")
    # one seed bounds nothing
    single = {a: over_seeds([s.mean]) for a, s in scores.items() if a != "odd"}
    (line,) = headline_lines({a: {"undistillable": student_of(s)} for a, s in single.items()})
    assert line.endswith("mean over 2 attacks 0.40, no bounded interval")


def defended(students, price):
    change = relative_over_seeds(students, [0.30, 0.31, 0.32][: len(students)])
    undefended = over_seeds([0.30, 0.31, 0.32][: len(students)])
    return DefenceResult(
        over_seeds([0.9]), over_seeds(students), change, None, over_seeds(price), undefended
    )


def words_of_defence(defence):
    defences = {"none": defended([0.3], [0.0]), "poe": defence}
    return conclusion(Results(teachers={}, students={}, baselines={}, defences=defences))


@pytest.mark.parametrize("n", [1, 2])
def test_a_defence_with_fewer_than_three_seeds_has_no_verdict(n):
    text = words_of_defence(defended([0.010, 0.012, 0.011][:n], [0.0, 0.001, 0.002][:n]))
    assert f'Serving "poe" gives no verdict, with n = {n}, on what students take' in text
    assert text.endswith("Fewer than three seeds give no verdict (A4).")
    assert "measurably" not in text and "lowers" not in text and "halves" not in text


@pytest.mark.parametrize(
    "price, words",
    [
        ([-0.30, -0.31, -0.29], "at +30.0 [+27.5, +32.5] points more of served accuracy"),
        ([0.30, 0.31, 0.29], "at +30.0 [+27.5, +32.5] points of served accuracy"),
        ([0.0, 0.001, -0.001], "at the same served accuracy within 2 points (lost: "),
        ([-0.05, 0.0, 0.05], "points of served accuracy, inconclusive"),
    ],
)
def test_a_defence_may_cost_accuracy_or_bring_some(price, words):
    text = words_of_defence(defended([0.1, 0.11, 0.12], price))
    assert words in text and "three seeds" not in text


def test_without_runs_there_is_nothing_to_conclude():
    results = Results(teachers={}, students={}, baselines={})
    assert verdict_lines(results) == [] and conclusion(results) == ""
