"""What a record's rows say, over seeds."""

import json
import math
import statistics

import pytest

from bench.language_tables import PAST, STUDENTS
from bench.records import FOLDER
from bench.report_record import Block, Record, read_record
from bench.tables import ATTACKS, RECORD
from reflux.trainer.runs.stats import ratio_p, relative_over_seeds


@pytest.fixture(scope="module")
def record():
    return read_record(RECORD)


def test_a_change_by_hand(record):
    """seq_kd from the undistillable teacher: by seed from the rows, -85 % in the mean; no bound
    below -100 %; the other is where a t test over three seeds is just at 5 %.
    """
    rows = record.report["runs"]

    def accuracy(teacher):
        wanted = {"role": "student", "attack": "seq_kd", "teacher": teacher}
        of = [r for r in rows if wanted.items() <= r.items() and "defence" not in r]
        return [r["sampled"] for r in sorted(of, key=lambda r: r["seed"])]

    mine, theirs = accuracy("undistillable"), accuracy("original")
    found = record.attack("seq_kd", "undistillable").change
    assert found.mean == pytest.approx(sum(mine) / sum(theirs) - 1) and found.low == -1.0
    rest = [a - (1 + found.high) * b for a, b in zip(mine, theirs)]
    t = statistics.mean(rest) / (statistics.stdev(rest) / math.sqrt(3))
    assert abs(t) == pytest.approx(4.302653, rel=1e-4)


def test_moments_of_the_best_checkpoint_determine_its_interval(record):
    """From the record's means and deviations the last checkpoint gets what its rows give."""
    for attack in ("seq_kd", "gkd_reverse", "mixed_teachers"):
        row = record.report["students"][attack]
        moved = {
            t: r
            | {"best": r["sampled"]}
            | ({"change": r["change"] | {"best": r["change"]["sampled"]}} if "change" in r else {})
            for t, r in row.items()
        }
        other = Record({"report": record.report | {"students": {attack: moved}}})
        found = other.attack(attack, "undistillable")
        for mine, theirs in zip(found.best[2:], found.change[2:]):
            assert mine == pytest.approx(theirs, abs=1e-6)


def test_no_interval_is_below_minus_all(record):
    rows = (r for r in record.rows if r["role"] == "student" and r["teacher"] != "original")
    cells = [record.attack(r["attack"], r["teacher"]) for r in rows]
    assert cells and all(c.change.low >= -1 and c.best.low >= -1 for c in cells)


def test_two_runs_of_one_seed_are_no_number():
    row = {"seed": "0", "role": "student", "attack": "kd", "teacher": "original", "sampled": 0.5}
    record = Record({"report": {"runs": [row, row | {"sampled": 0.6}]}})
    with pytest.raises(ValueError, match="two runs of one seed with .*'attack': 'kd'"):
        record.student("kd", "original")


def test_holm_counts_the_attacks_that_are_judged_and_no_others(record):
    alone, all_of_them = record.judge(["answers_only"]), record.judge(ATTACKS)
    assert alone["answers_only"].verdict == all_of_them["answers_only"].verdict == "succeeded"
    assert alone["answers_only"].p_family < all_of_them["answers_only"].p_family <= 0.05
    assert record.judge(["no such attack"]) == {}


LOW, WIDE, HIGH = [0.10, 0.11, 0.12], [0.10, 0.14, 0.45], [0.50, 0.52, 0.51]
ORIGINAL = [0.60, 0.62, 0.61]


def students_of(attack, teacher, last, best):
    labels = {"role": "student", "attack": attack, "teacher": teacher, "at_start": 0.0}
    pairs = enumerate(zip(last, best))
    return [labels | {"seed": str(s), "sampled": a, "best": b} for s, (a, b) in pairs]


@pytest.mark.parametrize(
    "last, best, word",
    [
        (LOW, LOW, "failed"),
        (LOW, WIDE, "inconclusive"),
        (LOW, HIGH, "succeeded"),
        (WIDE, LOW, "inconclusive"),
        (WIDE, HIGH, "succeeded"),
        (HIGH, HIGH, "succeeded"),
    ],
)
def test_an_attack_is_judged_by_the_worse_of_both_checkpoints(last, best, word):
    """p is the larger of both."""
    rows = students_of("kd", "original", ORIGINAL, ORIGINAL)
    rows += students_of("kd", "undistillable", last, best)
    no_score = {"kd": {"undistillable": {"score": None}}}
    record = Record({"report": {"runs": rows, "students": no_score}})
    attack = record.attack("kd", "undistillable")
    assert attack.change == relative_over_seeds(last, ORIGINAL)
    assert attack.best == relative_over_seeds(best, ORIGINAL)
    p = max(ratio_p(x, ORIGINAL, 0.5) for x in (last, best))
    outcome = record.judge(["kd"])["kd"]
    assert (outcome.verdict, outcome.p, outcome.p_family) == (word, p, p)


def test_a_block_reads_its_records_in_the_order_of_its_arguments():
    names = sorted(file.name for file in FOLDER.glob("*language_words*_models*.json"))
    block = Block(lambda *records: [r.content["command"] for r in records], tuple(names))
    assert len(names) > 1 and block.compute() == [
        json.loads((FOLDER / name).read_text())["command"] for name in names
    ]


def test_what_the_report_gave_no_distillability_has_none():
    """No student of these gained from the original, item by item."""
    past = read_record(PAST)
    assert all(past.attack(a, "undistillable").score is None for a in STUDENTS)


def test_two_seeds_have_no_verdict_and_no_p():
    report = read_record(PAST).report
    runs = [r for r in report["runs"] if r["seed"] in ("321", "322")]
    found = Record({"report": report | {"runs": runs}}).judge(STUDENTS).values()
    assert found and all(o.verdict == "inconclusive" and math.isnan(o.p_family) for o in found)
