"""Every panel has a curve, or says why it has none."""

import pytest
from page_runs import calibration, evaluation, metrics

from reflux.trainer.config.loader import as_table
from reflux.trainer.config.sections import CalibrationSection, ReferenceSection
from reflux.trainer.runs.run_panels import (
    PANELS,
    evaluation_names,
    evaluation_panels,
    training_panels,
)

STEPS = [{"step": i, "wall_s": float(i), **metrics(i)} for i in (1, 2, 3)]


def panels_of(table, steps=STEPS, marks=()):
    return {p.title: p for p in training_panels(table, steps, 6, marks)}


def test_every_field_of_a_calibration_is_drawn(tmp_path):
    panels = panels_of(as_table(calibration(tmp_path)))
    assert len(panels) == len(PANELS)
    missing = {title for title, p in panels.items() if p.chart is None}
    assert missing == {"Entropy", "Groups"}, "these were not logged here"
    assert all(bool(p.chart) != bool(p.missing) for p in panels.values())
    (norm,) = panels["Gradient norm"].chart.lines
    assert len(norm.dots) == 2, "NaN is a gap"


def test_equal_fields_are_one_line(tmp_path):
    lines = panels_of(as_table(calibration(tmp_path)))["Task reward"].chart.lines
    assert [line.label for line in lines] == ["reward = correct"]


@pytest.mark.parametrize(
    "changes, title, words",
    [
        ({"calibration": CalibrationSection()}, "Calibration reward", "calibration.mode = 'off'"),
        ({"reference": ReferenceSection(beta=0.0)}, "KL", "reference.beta = 0"),
    ],
)
def test_a_panel_without_numbers_names_the_option(tmp_path, changes, title, words):
    steps = [{"step": 1, "loss": 1.0}]
    panel = panels_of(as_table(calibration(tmp_path, **changes)), steps)[title]
    assert panel.chart is None and words in panel.missing


def test_a_distillation_says_what_it_has_not():
    table = {"phase": "distill", "task": {"name": "exact"}, "distill": {"on_policy": 0.0}}
    panels = panels_of(table | {"distill": {"on_policy": 0.0, "objective": "nll"}}, [{"step": 1}])
    assert "on_policy = 0" in panels["Task reward"].missing
    assert "'distill' has no calibration reward" in panels["Calibration reward"].missing
    assert "'nll' compares no distributions" in panels["KL"].missing


def test_before_the_first_step_nothing_is_measured():
    assert {p.missing for p in panels_of({}, []).values()} == {"no step is finished yet"}


def test_evaluations_have_intervals_and_the_line_of_the_start():
    events = [{"event": "eval", "step": s, **evaluation(v)} for s, v in ((0, 0.4), (5, 0.5))]
    assert evaluation_names(events) == ["greedy", "sampled"]
    greedy, _ = evaluation_panels(events, 10)
    assert greedy.chart.rules[0].text == "start" and greedy.chart.lines[0].band
    assert greedy.chart.lines[0].dots[1].title == "step 5, greedy: 0.5 [0.4, 0.6]"
    assert evaluation_panels(events[:1], 10) == [], "one evaluation is no curve"
