"""The tables of the real language model are its records' numbers, seed by seed."""

import copy
import statistics

import pytest

from bench import language_tables
from bench.language_tables import (
    FLOAT32,
    PAST,
    PAST_GEMMA,
    READER,
    REPEATS,
    SHOWN,
    WORDS,
    language_answers,
    language_float32,
    language_reader,
    language_students,
    language_teachers,
    language_words,
)
from bench.report_record import Record, read_record
from reflux.trainer.studies.results import TEACHERS

ANSWERS_OF_FLOAT32 = "2026-11-30_language_past_float32_teachers.json"


def rows_of(table):
    """First cell -> the others."""
    head, _, *lines = table.splitlines()
    rows = [[x.strip() for x in line[1:-1].split("|")] for line in (head, *lines)]
    return {row[0]: row[1:] for row in rows}


def copy_of(name):
    """A record that may be changed."""
    return Record(copy.deepcopy(read_record(name).content))


def student(attack, teacher, sampled, **more):
    labels = {"role": "student", "attack": attack, "teacher": teacher, "seed": "321"}
    return labels | {"sampled": sampled, "best": sampled} | more


def test_teachers_and_students_by_hand():
    past, gemma = read_record(PAST), read_record(PAST_GEMMA)
    of = {"role": "teacher", "teacher": "distillable"}
    values = [r["sampled"] for r in past.rows if of.items() <= r.items()]
    cells = rows_of(language_teachers(past))["`distillable`"]
    assert len(values) == 5
    assert cells[0] == f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    assert cells[1:] == ["+4.3 [+2.6, +6.0]", "89 %"]
    rows = rows_of(language_students(past, gemma))
    assert rows["sampled text"][2:] == [
        "0.300 ± 0.028 (**+57 % [+28, +104]**)",
        "0.091 ± 0.014 (-52 % [-63, -36])",
        "inconclusive",
    ]
    other = rows["sampled text, Gemma-3-270M (start 0.000, n = 3)"]
    assert other[1] == "0.913 ± 0.013 (+1 % [-4, +6])" and other[-1] == "succeeded"


def test_what_a_rule_asks_for_is_bold_by_its_whole_interval():
    past = copy_of(PAST)
    for row in past.rows:
        if row["role"] == "student" and row["teacher"] == "undistillable":
            row["sampled"] = row["best"] = row["sampled"] / 10
    rows = rows_of(language_students(past, read_record(PAST_GEMMA)))
    assert rows["sampled text"][3].startswith("0.009 ± 0.001 (**-95 % [")
    assert rows["sampled text"][4] == "failed" and "**" not in rows["sampled text"][1]
    assert "**" not in rows["forward KL on teacher text"][2]  # +6 to +75


def test_students_of_two_starts_have_no_table_of_one():
    past = copy_of(PAST)
    row = next(r for r in past.rows if r.get("attack") == "kd_forward")
    row["at_start"] += 0.1
    with pytest.raises(ValueError, match="the head of the table names one start"):
        language_students(past, read_record(PAST_GEMMA))


def test_float32_shows_runs_starts_and_changes():
    table = language_float32(read_record(FLOAT32))
    head, rows = table.splitlines()[0], rows_of(table)
    starts = [
        next(r["at_start"] for r in read_record(FLOAT32).rows if r.get("attack") == attack)
        for attack in REPEATS
    ]
    assert f"starts {', '.join(f'{x:.3f}' for x in starts)}: {len(REPEATS)} runs |" in head
    runs = [float(x) for x in rows["`distillable`"][3].split(", ")]
    original = [float(x) for x in rows["original"][3].split(", ")]
    change = statistics.mean(runs) / statistics.mean(original) - 1
    mean = f"{statistics.mean(runs):.3f} ± {statistics.stdev(runs):.3f}"
    assert rows["`distillable`"][4] == f"{mean} ({100 * change:+.0f} %)"


def test_a_teacher_that_gets_more_students_gets_their_mean():
    before = read_record(FLOAT32)
    there = [a for a in REPEATS if before.student(a, "task_only")]
    content = copy.deepcopy(before.content)
    new = (student(a, "task_only", 0.2) for a in REPEATS if a not in there)
    content["report"]["runs"] += new
    rows = rows_of(language_float32(Record(content)))
    runs = [float(x) for x in rows["task reward only (eta = 0)"][3].split(", ")]
    assert len(runs) == len(REPEATS) and "nan" not in str(rows)
    assert rows["task reward only (eta = 0)"][4].startswith(f"{statistics.mean(runs):.3f} ± ")
    # one run has no spread
    content["report"]["runs"] = [
        r for r in content["report"]["runs"] if r.get("attack") not in REPEATS[1:]
    ]
    content["report"]["runs"] += [student(a, "original", 0.2, at_start=0.3) for a in REPEATS[1:]]
    assert rows_of(language_float32(Record(content)))["`distillable`"][4] == ""


def test_a_new_column_is_a_line(monkeypatch):
    name = "as much as it likes"
    monkeypatch.setitem(language_tables.VARIANTS, "likeliest", name)
    content = copy.deepcopy(read_record(FLOAT32).content)
    runs = [r for r in content["report"]["runs"] if r.get("attack") != "likeliest"]
    runs += [student("likeliest", "original", 0.2), student("likeliest", "distillable", 0.3)]
    content["report"]["runs"] = runs
    table = language_float32(Record(content))
    assert table.splitlines()[0].endswith(f"| {name} |")
    last = {teacher: cells[-1] for teacher, cells in rows_of(table).items()}
    assert (last["original"], last["`distillable`"]) == ("0.200", "0.300 (+50 %)")
    assert last["`undistillable`"] == "not run"


def test_two_seeds_do_not_fit_a_table_of_one():
    content = copy.deepcopy(read_record(FLOAT32).content)
    row = next(r for r in content["report"]["runs"] if r["role"] == "teacher")
    content["report"]["runs"].append(row | {"seed": "322"})
    with pytest.raises(ValueError, match="seeds 321, 322; want one for a table of one seed"):
        language_float32(Record(content))


@pytest.mark.parametrize(
    "report, answers",
    [(FLOAT32, ANSWERS_OF_FLOAT32), *((w.report, w.answers) for w in WORDS.values())],
)
def test_two_records_of_the_same_teachers_agree(report, answers):
    rows = {r["run"].split("/")[-1]: r for r in read_record(answers).content["runs"]}
    for name in TEACHERS:
        (accuracy,) = read_record(report).accuracy(role="teacher", teacher=name).values()
        assert rows[f"teacher-{name}"]["evals"][-1]["eval/sampled"] == pytest.approx(accuracy)


def test_gains_are_paired_with_the_start_of_the_same_seed():
    record = copy_of(language_tables.PAST)
    for row in record.rows:
        if row["role"] == "student":
            begin = 0.1 * int(row["seed"][-1])
            row["at_start"], row["sampled"] = begin, begin + 0.02
    _, *rows = rows_of(language_tables.language_gains(record)).values()
    for cells in rows:
        assert cells == ["+2.0 [+2.0, +2.0]"] * 4


def test_words_put_one_run_beside_the_other():
    table = language_words(*map(read_record, language_tables.BLOCKS["language_words"].records))
    head, rows = table.splitlines()[0], rows_of(table)
    starts = [
        next(r["at_start"] for r in read_record(w.report).rows if r["role"] == "student")
        for w in WORDS.values()
    ]
    assert head.endswith(f"its student, starts {', '.join(f'{x:.3f}' for x in starts)} |")
    assert rows["`undistillable`"][0].startswith("0.801, 0.755")
    assert all(len(cells[0].split(", ")) == len(WORDS) for cells in list(rows.values())[1:])


def test_a_teacher_that_a_run_lacks_is_not_run():
    names = language_tables.BLOCKS["language_words"].records
    records = {name: copy_of(name) for name in names}
    first, *_ = WORDS.values()
    answers = records[first.answers].content
    answers["runs"] = [r for r in answers["runs"] if "distillable" not in r["run"]]
    cells = rows_of(language_words(*records.values()))["`distillable`"]
    assert [c.startswith("not run, ") for c in cells[:3]] == [True] * 3


def test_a_reader_s_numbers_are_over_seeds():
    record = read_record(READER)
    cells = rows_of(language_reader(record))["`undistillable`"]
    of = [
        r
        for seed in record.content["texts"].values()
        for r in seed["runs"]
        if r["run"] == "teacher-undistillable"
    ]
    nats, changes = [r["nats_per_byte"]["mean"] for r in of], [r["change"]["mean"] for r in of]
    assert len(of) == 3
    assert cells[0] == f"{statistics.mean(nats):.3f} ± {statistics.stdev(nats):.3f}"
    half = 4.302653 * statistics.stdev(changes) / 3**0.5  # Student's t, three seeds
    mean = statistics.mean(changes)
    assert cells[1] == f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def test_shown_answers_are_the_record_s_and_wrong_ones_are_marked():
    rows = rows_of(language_answers(read_record(READER)))
    assert list(rows)[1:] == list(SHOWN)
    assert sum(cell.endswith(" (wrong)") for cells in rows.values() for cell in cells) == 1
    assert rows[SHOWN[2]][2] == "and yesterday they clung at the market (wrong)"
