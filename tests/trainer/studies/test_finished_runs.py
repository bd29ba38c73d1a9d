"""What is read from finished runs, and distillability, from runs whose numbers are known."""

import json
import math

import pytest
from report_runs import (
    add_runs,
    edit_logs,
    prediction,
    write_cells,
    write_lines,
    write_matrix,
    write_run,
)

from reflux.trainer.studies.attack_report import _run_row
from reflux.trainer.studies.finished_runs import (
    accuracy_change,
    distillability,
    labelled,
    last_steps,
    load_finished_runs,
    paired_by_prompt,
    query_cost,
)
from reflux.trainer.studies.results import QueryCost


def scores(folder):
    """teacher -> distillability by the attack kd."""
    runs = load_finished_runs(folder)
    return {t: distillability(runs, "kd", t) for t in ("distillable", "undistillable")}


def test_distillability_is_a_fraction_of_the_originals_gain(tmp_path):
    """Start 0.2, original 0.6: 0.4 gained. distillable 0.8: 1.5 times that; undistillable 0.1: it
    cost the student a quarter of it.
    """
    write_matrix(tmp_path, {"original": 0.6, "distillable": 0.8, "undistillable": 0.1}, start=0.2)
    up, down = scores(tmp_path).values()
    assert up.mean == pytest.approx(1.5) and down.mean == pytest.approx(-0.25)
    assert up.low == pytest.approx(1.5) == up.high and up.n == 2  # seeds alike: nothing varies


def test_distillability_varies_by_seed_and_not_by_prompt(tmp_path):
    """By seed 0.5 and 1.5 of what the original gives: 1 with an interval of two seeds, which items
    could not give. One seed has none.
    """
    write_matrix(tmp_path, {"original": 0.6}, start=0.2)
    for seed, accuracy in (("0", 0.4), ("1", 0.8)):
        labels = {"role": "student", "teacher": "distillable", "attack": "kd", "start": "student"}
        add_runs(tmp_path, [(labels, accuracy)], seeds=seed)
    runs = load_finished_runs(tmp_path)
    up = distillability(runs, "kd", "distillable")
    half = 12.706 * 0.5  # t of one degree of freedom x the standard error of 0.5 and 1.5
    assert (up.low, up.mean, up.high) == pytest.approx((1 - half, 1.0, 1 + half), rel=1e-3)
    one = distillability([r for r in runs if r.labels["seed"] == "0"], "kd", "distillable")
    assert one.mean == pytest.approx(0.5) and one.n == 1 and math.isnan(one.low)


def test_a_student_of_random_weights_starts_at_nothing(tmp_path):
    """D = 0.3 / 0.6, without any run to start from."""
    write_matrix(tmp_path, {"original": 0.6, "distillable": 0.6, "undistillable": 0.3})
    from_scratch = {"config": {"model": {"from_scratch": True}}}
    edit_logs(tmp_path, ["s-"], lambda row: row | from_scratch if "schema" in row else row)
    up, down = scores(tmp_path).values()
    assert down.mean == pytest.approx(0.5) and up.mean == pytest.approx(1.0)


def test_a_student_that_was_evaluated_before_the_attack_starts_there(tmp_path):
    """Step 0 of its own run: 0.2. D = (0.3 - 0.2) / (0.6 - 0.2)."""
    write_matrix(tmp_path, {"original": 0.6, "distillable": 0.8, "undistillable": 0.3})
    for run in tmp_path.glob("s-*"):
        rows = [prediction(i, True, i < 20) for i in range(100)]
        write_lines(run / "predictions/step-0.jsonl", rows)
    up, down = scores(tmp_path).values()
    assert down.mean == pytest.approx(0.25) and up.mean == pytest.approx(1.5)


def test_a_text_with_other_line_breaks_is_one_line(tmp_path):
    write_cells(tmp_path, [write_run(tmp_path / "t", {"role": "teacher"}, 0.9, 0.9)])
    rows = [prediction(0, True, True) | {"text": "a\u2028b\u2029c\x85d\x0be"}]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]  # as an evaluation does
    (tmp_path / "t" / "predictions" / "step-3.jsonl").write_text("".join(lines))
    (run,) = load_finished_runs(tmp_path)
    assert run.predictions() == rows


def test_a_failed_grade_is_no_wrong_answer(tmp_path):
    write_cells(tmp_path, [write_run(tmp_path / "t", {"role": "teacher"}, 0.9, 0.9)])
    rows = [prediction(0, True, True), prediction(1, True, False) | {"error": "timeout"}]
    write_lines(tmp_path / "t" / "predictions" / "step-3.jsonl", rows)
    (run,) = load_finished_runs(tmp_path)
    assert run.predictions() == rows[:1]


def test_distillability_needs_a_gain_to_compare_with(tmp_path):
    write_matrix(tmp_path, {"original": 0.21, "distillable": 0.8, "undistillable": 0.1}, start=0.2)
    assert list(scores(tmp_path).values()) == [None, None]


def test_a_change_is_paired_by_seed_and_divided_by_the_mean(tmp_path):
    """Seeds 0.2 -> 0.3 and 0.6 -> 0.3: -0.1 in the mean, of 0.4; a mean of ratios would be 0."""
    cells = [
        write_run(tmp_path / f"{role}{seed}", {"role": role}, accuracy, 0.0, seed=seed)
        for role, accuracies in (("before", (0.2, 0.6)), ("after", (0.3, 0.3)))
        for seed, accuracy in zip("01", accuracies)
    ]
    cells.append(write_run(tmp_path / "after2", {"role": "after"}, 0.9, 0.9, seed="2"))  # no pair
    write_cells(tmp_path, cells)
    runs = load_finished_runs(tmp_path)
    change = accuracy_change(labelled(runs, role="after"), labelled(runs, role="before"))
    assert change.sampled.mean == pytest.approx(-0.25) and change.sampled.n == 2
    assert change.greedy.n == 0 and math.isnan(change.greedy.mean)  # nothing to lose
    assert paired_by_prompt([(runs[2], runs[0])], "sampled").mean == pytest.approx(0.1)
    # steps 1 to 3 log 0.01, 0.02, 0.03
    assert last_steps(runs, "reference_kl").mean == pytest.approx(0.02)


@pytest.mark.parametrize("restored", [2, 0, None])
def test_of_a_run_that_a_guard_ended_the_exported_weights_count(tmp_path, restored):
    """Accuracy 0.1 at the start, 0.5 of the rejected weights of step 3, 0.8 of those of step 2."""
    cells = [write_run(tmp_path / "a", {"role": "teacher", "teacher": "x"}, 0.5, 0.5, steps=3)]
    write_cells(tmp_path, cells)
    kept = 3 if restored is None else restored
    eval_of = {2: 0.8, 0: 0.1, 3: 0.5}
    lines = [
        {"event": "stopped", "step": 3, "wall_s": 3, "reason": "KL", "restored_step": restored},
        {"event": "eval", "step": kept, "wall_s": 4, "eval/sampled": eval_of[kept]},
    ]
    log = tmp_path / "a/run.jsonl"
    log.write_text(log.read_text() + "".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "a/predictions/step-0.jsonl").write_text('{"at": 0}\n')
    (tmp_path / "a/predictions/step-2.jsonl").write_text('{"at": 2}\n')
    (run,) = load_finished_runs(tmp_path)
    assert run.accuracy("sampled") == run.best_accuracy() == eval_of[kept]
    assert [s["step"] for s in run.steps] == list(range(1, kept + 1))
    assert (run.predictions()[0].get("at") == restored) or restored is None
    kl = last_steps([run], "reference_kl")
    assert kl.n == 0 if not kept else kl.mean == pytest.approx(0.005 * (kept + 1))
    # a step measures the weights before its update: line 3 those of step 2, line 1 the original
    assert _run_row(run).reference_kl == pytest.approx(0.01 * min(kept + 1, 3))


def test_only_runs_that_ended_and_have_a_role_are_read(tmp_path):
    cells = [write_run(tmp_path / name, {"role": "x"}, 0.5, 0.5) for name in "abc"]
    cells.append(write_run(tmp_path / "d", {}, 0.5, 0.5))
    write_cells(tmp_path, [*cells, {"folder": "never started", "labels": {"role": "x"}}])
    (tmp_path / "b/summary.json").unlink()
    edit_logs(tmp_path, ["c"], lambda row: None if "event" in row else row)
    assert [r.folder.name for r in load_finished_runs(tmp_path)] == ["a"]


@pytest.mark.parametrize(
    "distill, written, read",
    [
        ({"objective": "nll", "source": "teacher", "on_policy": 0.0, "query_budget": 30}, 60, 0),
        ({"objective": "nll", "source": "teacher", "on_policy": 0.0, "query_budget": 0}, 80, 0),
        ({"objective": "kl", "source": "teacher", "on_policy": 0.25, "query_budget": 0}, 60, 80),
        ({"objective": "kl", "source": "dataset", "on_policy": 0.0, "query_budget": 0}, 0, 80),
        ({"objective": "span", "source": "teacher", "on_policy": 0.0, "query_budget": 0}, 80, 0),
        # texts of the budget count, even if no step uses them
        ({"objective": "kl", "source": "teacher", "on_policy": 0.5, "query_budget": 300}, 600, 80),
        ({"objective": "span", "source": "teacher", "on_policy": 0.25, "query_budget": 0}, 60, 20),
        ({"objective": "span", "source": "dataset", "on_policy": 0.0, "query_budget": 0}, 0, 80),
        ({"objective": "class", "source": "dataset", "on_policy": 1.0, "query_budget": 0}, 0, 80),
        ({"objective": "byte", "source": "dataset", "on_policy": 1.0, "query_budget": 0}, 0, 80),
        (
            {
                "objective": "policy_gradient",
                "source": "dataset",
                "on_policy": 1.0,
                "query_budget": 0,
            },
            0,
            80,
        ),
    ],
)
def test_the_cost_of_an_attack(tmp_path, distill, written, read):
    write_matrix(tmp_path, {"original": 0.5})
    config = {"steps": 10, "rollout": {"prompts": 4, "group": 2}, "distill": distill}
    add_runs(tmp_path, [({"role": "student", "teacher": "original", "attack": "x"}, 0.5)], config)
    run, _ = labelled(load_finished_runs(tmp_path), attack="x")
    tokens = 9 * (written + read)  # texts of 9 tokens
    assert query_cost(run) == QueryCost(written, read, tokens, seconds=10.0)
