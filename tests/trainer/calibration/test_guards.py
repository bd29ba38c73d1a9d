"""What stops a calibration, and that a resumed run stops at the same step."""

import json
import logging
import warnings
from itertools import accumulate
from types import SimpleNamespace

import pytest

from reflux.trainer.calibration.guards import KL_DECAY, MARKS, Guards
from reflux.trainer.config.data import DataSection, EvalPartSection
from reflux.trainer.config.evaluation import EvalSection
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import (
    CalibrationSection,
    FrozenSection,
    GuardSection,
    ModelSection,
    ReferenceSection,
    TaskSection,
)
from reflux.trainer.phase import Stop


def config(**parts) -> Config:
    return Config(
        "calibrate",
        "r",
        model=ModelSection("m"),
        proxy=FrozenSection("p"),
        data=DataSection("d"),
        task=TaskSection("math"),
        **parts,
    )


def stops_at(stats, *, guard=None, resume_at=None) -> tuple[int, Stop] | None:
    """Feeds (stats, found) step by step from step 1 on; resume_at: goes on from saved notes in a
    new process.
    """
    engine = engine_with({})
    guards = Guards(config(guard=guard or GuardSection()), engine)
    for step, (numbers, found) in enumerate(stats, 1):
        if step == resume_at:
            engine = engine_with(json.loads(json.dumps(engine.notes)), engine.saved)
            guards = Guards(config(guard=guard or GuardSection()), engine)
        try:
            guards.check(step, numbers, found)
        except Stop as stop:
            return step, stop
    return None


def engine_with(notes, saved=None):
    """The part of an engine that the guards use; `saved` counts the checkpoints they ask for."""
    saved = [] if saved is None else saved
    return SimpleNamespace(notes=notes, saved=saved, save_this_step=lambda: saved.append(1))


def saves(shares) -> list[int]:
    """How often more of MARKS were passed than ever before, at each share."""
    most = list(accumulate((sum(s > mark for mark in MARKS) for s in shares), max))
    return [len(set(most[: i + 1]) - {0}) for i in range(len(most))]


def kl(*values):
    return [({"reference_kl": v}, {}) for v in values]


def accuracy(*values):
    return [({}, {} if v is None else {"eval/sampled": v, "eval/greedy": 0.0}) for v in values]


def test_the_moving_average_of_the_kl_is_held_to_the_budget():
    path = [0.05, 0.0, 0.095, 0.4, 0.4, 0.4]
    averages = list(
        accumulate(path, lambda before, value: KL_DECAY * before + (1 - KL_DECAY) * value)
    )
    want = next(step for step, average in enumerate(averages, 1) if average > 0.10)
    step, stop = stops_at(kl(*path))
    assert step == want > 3 and f"in step {want}, over guard.kl_budget = 0.1" in str(stop)
    assert stop.restore == want - 2, "the weights of the last step within the budget"
    assert stops_at(kl(*[0.099] * 50)) is None
    assert (
        stops_at(kl(5.0, 5.0), guard=GuardSection(kl_budget=0.0)) is None
        and stops_at([({}, {})] * 3) is None
    )


def test_a_kl_that_is_no_number_stops():
    assert stops_at(kl(0.01, float("nan")))[0] == 2


@pytest.mark.parametrize(
    "path, want",
    [
        ((0.0, 0.9), (2, 0)),  # the first update alone: nothing else was ever inside
        ((0.0, 0.05, 0.6), (3, 1)),  # step 2 measured the weights of step 1
        # averages 0, 0.036, 0.066, 0.092, 0.104: the weights of step 1 have 0.18, nine tenths too
        # much, though their average is inside
        ((0.0, 0.18, 0.185, 0.2, 0.15), (5, 0)),
        ((0.0, 0.18, 0.02, 0.9), (4, 2)),  # noise in one step is forgotten in the next
    ],
)
def test_weights_are_restored_that_a_step_measured_inside(path, want):
    """The numbers of a step are of the weights before its update: checkpoint N is measured in step
    N + 1.
    """
    for resume_at in (None, *range(2, len(path) + 1)):
        step, stop = stops_at(kl(*path), resume_at=resume_at)
        assert (step, stop.restore) == want, resume_at
        assert ("back to those of the start" in str(stop)) == (want[1] == 0)


def test_texts_of_older_weights_say_nothing_of_newer_ones():
    """rollout.overlap: those of step N are of checkpoint N - 2, from the second step on."""
    overlapped = [
        ({"length": value, "staleness": float(i > 0)}, {})
        for i, value in enumerate([40.0, 40.0, 40.0, 400.0])
    ]
    step, stop = stops_at(overlapped, guard=GuardSection(length_drift=0.25))
    assert (step, stop.restore) == (4, 1)


@pytest.mark.parametrize(
    "last, restore",
    [
        ({"reference_kl": 9.0}, 3),  # where the length was inside as well
        ({"reference_kl": 0.0, "length": 900.0}, 3),
    ],
)
def test_what_one_guard_restores_the_others_have_let_pass(last, restore):
    steps = [({"reference_kl": 0.0, "length": n}, {}) for n in (40.0, 40.0, 40.0, 40.0, 52.0)]
    step, stop = stops_at([*steps, (last, {})], guard=GuardSection(length_drift=0.25))
    assert (step, stop.restore) == (6, restore)


@pytest.mark.parametrize("last, restore", [(0.4, 2), (0.5, 4)])
def test_a_low_accuracy_holds_back_the_other_guards(last, restore):
    """The weights after the evaluation that passed may be those that lost the task."""
    found = {2: 0.5, 4: last}
    steps = [
        ({"reference_kl": value}, {"eval/sampled": found[n]} if n in found else {})
        for n, value in enumerate([0.0, 0.0, 0.0, 0.0, 0.0, 9.0], 1)
    ]
    step, stop = stops_at(steps)
    assert (step, stop.restore) == (6, restore)


def test_notes_of_older_checkpoints_were_a_step_late():
    """They named the step whose numbers passed, and whose update nothing had measured."""
    notes = {"kl_accepted": 7.0, "drift_accepted": 8.0, "reference_kl": 0.01}
    guards = Guards(config(), engine_with(notes))
    with pytest.raises(Stop) as stop:
        guards.check(9, {"reference_kl": 9.0}, {})
    assert stop.value.restore == 6 and guards.accepted() == {6, 0}
    guards.notes["reference_kl"] = 0.01
    guards.check(9, {"reference_kl": 0.0}, {})
    assert guards.accepted() == {8, 0}, "measured by step 9"


def test_marks_on_the_way_to_the_budget_save_once_each():
    engine = engine_with({})
    guards = Guards(config(guard=GuardSection(kl_budget=1.0)), engine)
    saved = []
    for step, value in enumerate([0.4, 0.6, 0.6, 0.7, 2.0, 2.0]):
        try:
            guards.check(step, {"reference_kl": value}, {})
        except Stop:
            break
        saved.append(len(engine.saved))
    path = [0.4, 0.6, 0.6, 0.7, 2.0]
    averages = accumulate(path, lambda m, x: KL_DECAY * m + (1 - KL_DECAY) * x)
    # the step's own KL is ahead of the average, so that what is saved may still be measured inside
    assert saved == [a + b for a, b in zip(saves(averages), saves(path))]
    assert saved == [0, 1, 1, 2, 4], "0.6; the average 0.518; the average 0.814 and 2.0"


def test_half_the_budget_warns_once(caplog):
    with caplog.at_level(logging.WARNING):
        stops_at(kl(*[0.06] * 5))
    assert len(caplog.records) == 1 and "half of guard.kl_budget" in caplog.text


@pytest.mark.parametrize(
    "field, guard, values",
    [
        ("length", {"length_drift": 1.0}, [40.0, 80.0, 80.0, 80.0]),  # longer: 48, 54.4, 59.5
        ("length", {"length_drift": 1.0}, [40.0, 10.0, 5.0, 5.0]),  # shorter: 34, 28.2, 23.6
        ("truncated", {"truncation_drift": 0.4}, [0.0, 0.6, 0.6, 0.6]),  # 0.12, 0.216, 0.293
        ("entropy", {"entropy_drift": 1.0}, [0.0, 0.0]),  # no share of nothing
    ],
)
def test_marks_on_the_way_to_a_drift_save_too(caplog, field, guard, values):
    engine, limit = engine_with({}), next(iter(guard.values()))
    guards = Guards(config(guard=GuardSection(**guard)), engine)
    saved = []
    for step, value in enumerate(values, 1):
        guards.check(step, {field: value}, {})
        saved.append(len(engine.saved))
    averages = list(accumulate(values, lambda m, x: KL_DECAY * m + (1 - KL_DECAY) * x))
    if field == "truncated":
        used = [a / limit for a in averages]
    else:
        used = [max(a / values[0], values[0] / a) - 1 if a else 0.0 for a in averages]
    if field == "truncated":
        own = [v / limit for v in values]
    else:
        own = [max(v / values[0], values[0] / v) - 1 if v else 0.0 for v in values]
    assert saved == [a + b for a, b in zip(saves(used), saves(own))]
    warned = [f"half of guard.{next(iter(guard))} = {limit}"] * bool(saves(used)[-1])
    assert all(w in r.getMessage() for w, r in zip(warned, caplog.records, strict=True))


def test_an_evaluation_that_passes_is_saved_and_is_to_be_kept():
    """Not the start, whose weights are on the disk anyway."""
    engine = engine_with({})
    guards, saved, kept = Guards(config(), engine), [], []
    for step, value in enumerate([0.5, 0.5, 0.4, None, 0.6]):
        guards.check(step, {}, {} if value is None else {"eval/sampled": value})
        saved.append(len(engine.saved))
        kept.append(engine.notes["utility_passed"])
        assert {int(kept[-1]), max(step - 1, 0)} == engine.steps_to_keep(), "the latter: no drift"
    assert saved == [0, 1, 1, 1, 2] and kept == [0, 1, 1, 1, 4]
    off = engine_with({})
    Guards(config(guard=GuardSection(utility_drop=0.0)), off).check(1, {}, {"eval/sampled": 0.5})
    assert not off.saved


@pytest.mark.parametrize(
    "values, want",
    [
        ((0.5, 0.47, 0.47), (3, 1)),  # twice in a row, back to the start
        ((0.5, 0.47, 0.49, 0.47, 0.46), (5, 3)),  # a pass in between begins anew
        (
            (0.5, None, 0.6, None, 0.47, None, 0.4),
            (7, 3),
        ),  # steps without an evaluation are neither
        ((0.5, 0.47, 0.5, 0.47, 0.5), None),
        ((0.5, 0.481, 0.481), None),
        ((0.1, 0.9, 0.1, 0.1), None),
    ],
)
def test_two_failures_in_a_row_name_the_last_step_that_passed(values, want):
    for resume_at in (None, *range(2, len(values) + 1)):
        got = stops_at(accuracy(*values), resume_at=resume_at)
        assert (got and (got[0], got[1].restore)) == want, resume_at


def test_without_samples_the_greedy_accuracy_counts():
    found = [({}, {"eval/greedy": v}) for v in (0.5, 0.3, 0.3)]
    assert stops_at(found)[0] == 3 and stops_at(found, guard=GuardSection(utility_drop=0.0)) is None


@pytest.mark.parametrize("resume_at", range(2, 7))
def test_a_resumed_run_spends_the_same_budget(resume_at):
    path = kl(0.0, 0.05, 0.1, 0.2, 0.3, 0.3, 0.3)
    assert stops_at(path, resume_at=resume_at)[0] == stops_at(path)[0]


def test_a_restored_checkpoint_brings_its_own_notes():
    engine = engine_with({})
    guards = Guards(config(), engine)
    guards.check(1, {"reference_kl": 0.09}, {})
    engine.notes = {"reference_kl": 0.0}  # what loading does
    guards.check(2, {"reference_kl": 0.4}, {})
    assert engine.notes["reference_kl"] == pytest.approx(0.08)


@pytest.mark.parametrize(
    "parts, says",
    [
        (
            dict(calibration=CalibrationSection(mode="undistillable", strength=0.5)),
            "beta = 0.04: calibration.margin_guard lowers the strength to 0.75 beta std_cal",
        ),
        (
            dict(calibration=CalibrationSection(mode="undistillable", margin_guard=False)),
            "no interior optimum there (docs/method.md, 'Optimum and guards'). Watch reference_kl, "
            "raise reference.beta, or set calibration.margin_guard = true",
        ),
        (dict(reference=ReferenceSection(estimator="k3_loss")), "descends the forward KL"),
        (
            dict(reference=ReferenceSection(beta=0.0)),
            "guard.kl_budget = 0.1 is not watched: with reference.beta = 0 no reference model is",
        ),
    ],
)
def test_dangerous_recipes_warn(parts, says):
    with pytest.warns(UserWarning) as caught:
        Guards(config(**parts), SimpleNamespace(notes={}))
    assert says in "".join(str(w.message) for w in caught)


def test_ordinary_recipes_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Guards(
            config(calibration=CalibrationSection(mode="distillable")), SimpleNamespace(notes={})
        )
        Guards(
            config(calibration=CalibrationSection(mode="undistillable", denominator="reference")),
            SimpleNamespace(notes={}),
        )
        unpulled = ReferenceSection(beta=0.0)
        Guards(
            config(reference=unpulled, guard=GuardSection(kl_budget=0.0)), SimpleNamespace(notes={})
        )
        measured = CalibrationSection(mode="distillable", denominator="reference")
        Guards(config(reference=unpulled, calibration=measured), SimpleNamespace(notes={}))


def test_every_part_keeps_its_own_accuracy():
    """The mean of both stays, and one of them falls."""
    parts = {"sums": EvalPartSection("a"), "facts": EvalPartSection("b")}
    engine = engine_with({})
    guards = Guards(config(eval=EvalSection(parts=parts)), engine)

    def found(sums: float, facts: float) -> dict:
        mean = (sums + facts) / 2
        return {"eval/sampled": mean, "eval/sums/sampled": sums, "eval/facts/sampled": facts}

    guards.check(0, {}, found(0.8, 0.6))
    guards.check(1, {}, found(0.9, 0.5))
    with pytest.raises(Stop, match="of part facts is more than guard.utility_drop") as stop:
        guards.check(2, {}, found(0.9, 0.5))
    assert stop.value.restore == 0


@pytest.mark.parametrize(
    # the steps that end the run, and that it goes back to: one before the last step whose own
    # number is inside
    "field, guard, values, want",
    [
        # averages 48, 54.4
        ("length", {"length_drift": 0.25}, [40.0] * 3 + [80.0] * 3, (5, 2)),
        # 36, 32.8, 30.2: below 32
        ("length", {"length_drift": 0.25}, [40.0] + [20.0] * 3, (4, 0)),
        ("length", {"length_drift": 0.25}, [40.0] + [48.0] * 20, None),
        ("length", {"length_drift": 0.25}, [40.0] + [49.0] * 4 + [99.0], (6, 4)),
        ("entropy", {"entropy_drift": 1.0}, [2.0] + [0.1] * 9, (5, 0)),
        ("truncated", {"truncation_drift": 0.1}, [0.3] + [0.9] * 3, (2, 0)),  # 0.42
        ("truncated", {"truncation_drift": 0.1}, [0.3] + [0.0] * 9, None),  # fewer are no harm
        ("length", {}, [1.0, 1e9], None),  # off
        ("length", {"length_drift": 0.25}, [40.0, float("nan")], (2, 0)),
    ],
)
def test_texts_are_held_to_those_of_the_first_step(field, guard, values, want):
    steps = [({field: v}, {}) for v in values]
    for resume_at in (None, 2, 3):
        got = stops_at(steps, guard=GuardSection(**guard), resume_at=resume_at)
        assert (got and (got[0], got[1].restore)) == want, resume_at
    if got:
        name = next(iter(guard))
        assert f"beyond guard.{name} = {guard[name]}" in str(got[1])
        assert f"{field} went from {values[0]:.3g}" in str(got[1])
