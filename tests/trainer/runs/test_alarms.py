"""Alarms: after three steps, once each, and not for a run that is well."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.runs.alarms import STEPS, Alarms, tell_again

CFG = SimpleNamespace(
    rollout=SimpleNamespace(max_tokens=7),
    calibration=SimpleNamespace(score_norm="sum"),
)
WELL = {"grad_norm": 0.5, "truncated": 0.01, "entropy": 2.0, "length": 20.0, "accuracy": 0.5}
WELL |= {"groups/all_correct": 0.2, "groups/all_wrong": 0.2}
ILL = {
    "no_learning": ({"grad_norm": 0.0}, "gradient has been 0"),
    "groups_alike": ({"groups/all_correct": 0.8}, "100% of the groups"),
    "too_long": ({"too_long": 0.055}, "6% of the texts are longer than training.seq_len + 1"),
    "truncation": ({"truncated": 0.055}, "6% of the texts are truncated at rollout.max_tokens = 7"),
}


def test_texts_that_drift_into_other_spellings_are_reported():
    steps = [WELL | {"canonical": x} for x in (0.97, 0.93, 0.9, 0.9, 0.9, 0.5)]
    assert spoken(steps, {}) == [[], [], [], [], ["spelling"], []]
    assert spoken([WELL | {"canonical": 0.2}] * 6, {}) == [[]] * 6  # as it was from the first step


def spoken(steps, notes=None) -> list[list[str]]:
    alarms = Alarms(CFG, lambda: notes)
    return [[a.name for a in alarms.check(stats)] for stats in steps]


def test_a_run_that_is_well_hears_nothing():
    assert spoken([WELL] * 10, {}) == [[]] * 10


def test_an_alarm_that_is_told_later_names_its_step_and_what_became_of_its_number():
    event = {"step": 3, "alarm": "truncation", "message": "88% of the texts are truncated"}
    said = "step 3: 88% of the texts are truncated"
    assert tell_again(event, 9, {"truncated": 1.0}) == f"{said} (in step 9: 100%)"
    assert tell_again(event, 3, {"truncated": 0.88}) == said
    assert tell_again(event | {"alarm": "no_learning"}, 9, {"truncated": 1.0}) == said


@pytest.mark.parametrize("name", ILL)
def test_an_alarm_speaks_after_three_steps_and_only_once(name):
    bad = WELL | ILL[name][0]
    assert spoken([WELL, *[bad] * 8], {}) == [[]] * STEPS + [[name]] + [[]] * (8 - STEPS)
    (alarm,) = [a for _ in range(STEPS) for a in ALARMS.check(bad)]
    assert ILL[name][1] in alarm.message
    ALARMS._notes().clear()


NOTES: dict = {}
ALARMS = Alarms(CFG, lambda: NOTES)


def test_a_condition_that_passes_starts_anew():
    bad = WELL | {"truncated": 0.5}
    assert spoken([bad, bad, WELL, bad, bad], {}) == [[]] * 5


@given(cut=st.integers(0, 6))
def test_a_resumed_run_neither_repeats_nor_forgets(cut):
    steps = [WELL, *[WELL | {"entropy": 0.1, "grad_norm": 0.0}] * 5]
    notes: dict = {}
    first = spoken(steps[:cut], notes)
    notes = json.loads(json.dumps(notes))
    assert first + spoken(steps[cut:], notes) == spoken(steps, {})


@pytest.mark.parametrize(
    "more, says",
    [
        ({"truncated": 1.0}, "rollout.max_tokens = 7, and a truncated text has no reward"),
        ({"groups/all_correct": 1.0, "groups/all_wrong": 0.0}, "All rewards of a group are equal"),
        ({"passed_filter": 0.0}, "distill.correct_only"),
        ({}, "optim.lr"),
    ],
)
def test_nothing_learned_says_why(more, says):
    alarms, notes = None, {}
    alarms = Alarms(CFG, lambda: notes)
    messages = [a for _ in range(STEPS) for a in alarms.check(WELL | {"grad_norm": 0.0} | more)]
    assert says in next(a.message for a in messages if a.name == "no_learning")


@pytest.mark.parametrize("field", ["entropy", "length"])
@pytest.mark.parametrize("factor, speaks", [(2.9, False), (3.1, True), (0.4, False), (0.3, True)])
def test_drift_is_measured_from_the_first_step(field, factor, speaks):
    steps = [WELL, *[WELL | {field: factor * WELL[field]}] * 4]
    names = [name for step in spoken(steps, {}) for name in step]
    assert names == ([f"{field}_drift"] if speaks else [])


@pytest.mark.parametrize("factor, speaks", [(1.4, False), (1.6, True), (0.7, False), (0.6, True)])
def test_a_calibration_may_change_the_length_of_texts_less(factor, speaks):
    rewarded = WELL | {"reward/task": 0.5}
    steps = [rewarded, *[rewarded | {"length": factor * WELL["length"]}] * 4]
    names = [name for step in spoken(steps, {}) for name in step]
    assert names == (["length_drift"] if speaks else [])


def test_texts_that_grow_into_the_limit_are_told_from_those_that_always_did():
    always = [WELL | {"truncated": 0.3}] * 5
    assert [name for step in spoken(always, {}) for name in step] == ["truncation"]
    grow = [WELL, *[WELL | {"truncated": 0.3}] * 4]
    assert [name for step in spoken(grow, {}) for name in step] == [
        "truncation",
        "truncation_drift",
    ]


@pytest.mark.parametrize(
    "first, now, speaks",
    [(0.0, 0.049, False), (0.0, 0.051, True), (0.3, 0.349, False), (0.3, 0.351, True)],
)
def test_more_truncated_texts_are_five_in_a_hundred_more_than_at_first(first, now, speaks):
    """Not a multiple of the first fraction, whatever that was."""
    steps = [WELL | {"truncated": x} for x in (first, *[now] * 4)]
    names = [name for step in spoken(steps, {}) for name in step if name != "truncation"]
    assert names == (["truncation_drift"] if speaks else [])


@pytest.mark.parametrize(
    "nearly",
    [
        {"grad_norm": 1.1e-6},
        {"groups/all_correct": 0.7499},  # and 0.2 all wrong
        {"truncated": 0.05},
        {"too_long": 0.05},
        {"cal/length_r2": 0.5},
    ],
)
def test_what_nearly_reaches_a_limit_is_no_alarm(nearly):
    assert spoken([WELL | nearly] * 5, {}) == [[]] * 5


@pytest.mark.parametrize(
    "norm, says", [("sum", "'length_free' takes that out"), ("length_free", "may be small")]
)
def test_a_reward_for_length_is_named(norm, says):
    notes: dict = {}
    cfg = SimpleNamespace(**vars(CFG) | {"calibration": SimpleNamespace(score_norm=norm)})
    alarms = Alarms(cfg, lambda: notes)
    steps = [WELL | {"cal/length_r2": 0.6}] * STEPS
    (alarm,) = [a for stats in steps for a in alarms.check(stats)]
    assert alarm.name == "length_reward" and "length explains 60%" in alarm.message
    assert says in alarm.message
