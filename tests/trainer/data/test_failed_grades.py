"""When failed grades end a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.config.sections import TaskSection
from reflux.trainer.data.failed_grades import (
    FEW,
    NEWEST,
    FailedGrades,
    FailedGradesBudget,
    FailedGradesBudgets,
    add_parts,
    check_parts,
    count_by_part,
    count_failed,
)
from reflux.trainer.data.graders import Grade

BAD = "RuntimeError: boom"


def step(failed, graded):
    return count_failed([BAD] * failed + [None] * (graded - failed))


def test_counts_the_texts_that_were_graded_and_keeps_the_first_error():
    grades = [Grade(1.0, True), Grade(0.0, False, graded=False)]
    grades += [Grade(0.0, False, error=e) for e in ("first", "second")]
    count = count_failed(g.error for g in grades if g.graded)
    assert count == FailedGrades(3, 2, "first")
    assert [g.failed for g in grades] == [False, False, True, True]
    assert count_failed([]) + step(0, 2) + count + step(1, 1) == FailedGrades(6, 3, "first")


@pytest.mark.parametrize("failed, graded, holds", [(0, 0, 1), (5, 100, 1), (6, 100, 0), (1, 6, 0)])
def test_an_evaluation_is_refused_above_the_fraction(failed, graded, holds):
    if holds:
        step(failed, graded).check("exact", 0.05)
    else:
        with pytest.raises(ValueError, match=rf"{failed} of {graded} texts.*first error: {BAD}"):
            step(failed, graded).check("exact", 0.05)


def test_training_ends_at_once_where_every_grade_fails():
    with pytest.raises(ValueError, match="task mine:grade.*8 of 8 texts.*boom"):
        FailedGradesBudget("mine:grade", 0.05).add([step(4, 4), step(4, 4)])


def test_one_bad_response_ends_no_training():
    budget = FailedGradesBudget("exact", 0.05)
    assert budget.add([step(1, 8)]) == FailedGrades(8, 1, BAD)
    budget.add([step(1, 1)])
    for _ in range(3):
        budget.add([step(1, 8)])
    with pytest.raises(ValueError, match="6 of 41"):
        budget.add([step(1, 8)])


def test_a_grader_that_breaks_late_is_noticed_as_fast_as_one_that_never_worked():
    budget = FailedGradesBudget("exact", 0.05)
    for _ in range(1000):
        budget.add([step(0, 100)])
    with pytest.raises(ValueError, match="100 of 1000"):
        budget.add([step(100, 100)])


def test_a_budget_of_one_allows_all_and_a_budget_of_zero_none():
    FailedGradesBudget("exact", 1.0).add([step(8, 8)])
    with pytest.raises(ValueError, match="1 of 8"):
        FailedGradesBudget("exact", 0.0).add([step(1, 8)])


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=80))
def test_the_budget_is_that_of_the_newest_texts(steps):
    """Against a plain reading of the rule, over every history."""
    budget, seen = FailedGradesBudget("exact", 0.05), []
    for failed, fine in steps:
        seen.append((failed, failed + fine))
        window, k = seen[-1:], 2
        while sum(g for _, g in window) < NEWEST and k <= len(seen):
            window, k = seen[-k:], k + 1
        bad, total = sum(f for f, _ in window), sum(g for _, g in window)
        over = bad > 0.05 * (total if bad == total > 1 else max(total, FEW))
        try:
            budget.add([step(failed, failed + fine)])
            assert not over
        except ValueError:
            assert over
            return


def test_what_a_budget_remembers_does_not_grow():
    """Steps without a graded text, and steps beyond the newest texts, are forgotten."""
    budget = FailedGradesBudget("t", 0.5)
    for graded in (2, 0, 0, 3) * 1000:
        budget.add([FailedGrades(graded)])
    assert len(budget._steps) <= NEWEST / 2


TASKS = {
    "": TaskSection("exact", max_failed=0.5),
    "all": TaskSection("mine:grade", max_failed=1.0),
    "none": TaskSection("math", max_failed=0.0),
}


@pytest.mark.parametrize(
    "part, failed, ends",
    [("", 1, 0), ("", 2, 1), ("all", 2, 0), ("none", 0, 0), ("none", 1, 1), ("other", 2, 1)],
)
def test_each_part_has_the_budget_of_its_own_task(part, failed, ends):
    """One that no task is named for has that of a source without parts."""
    texts = [(part, BAD)] * failed + [(part, None)] * (2 - failed) + [("all", BAD)] * 9
    counts = add_parts([count_by_part(texts[::2]), count_by_part(texts[1::2])])
    assert counts[part].failed == failed + 9 * (part == "all")
    budgets = [lambda: check_parts(counts, TASKS)]
    if part in TASKS:
        halves = [count_by_part(texts[::2]), count_by_part(texts[1::2])]
        budgets.append(lambda: FailedGradesBudgets(TASKS).add(halves))
    for budget in budgets:
        if ends:
            name = TASKS.get(part, TASKS[""]).name + (f" of part {part}" if part else "")
            with pytest.raises(ValueError, match=f"task {name}: grading failed on {failed} of 2"):
                budget()
        else:
            budget()
