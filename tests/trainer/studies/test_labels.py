"""Where a report puts a run, by its labels."""

import pytest

from reflux.trainer.studies.labels import of_families, places, refuse_shared_places

STUDENT = {"role": "student", "teacher": "t", "attack": "kd"}


def differ(a, b):
    return not set(places(a)) & set(places(b))


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": "1"}, {"teacher": "u"}, {"attack": "sft"}, {"role": "baseline"}),
        *({"eta": "1"}, {"ablation": "x"}, {"defence": "d"}),
    ],
)
def test_labels_that_a_report_tells_apart(change):
    assert differ(STUDENT, STUDENT | change)


@pytest.mark.parametrize(
    "a, b",
    [
        (STUDENT, STUDENT | {"start": "s", "size": "big"}),
        (STUDENT, STUDENT | {"ablation": "default"}),
        (STUDENT | {"eta": "-0"}, STUDENT | {"eta": "0.0", "teacher": "u", "ablation": "x"}),
        (STUDENT | {"defence": "d"}, STUDENT | {"defence": "d", "teacher": "u"}),
        ({"role": "student", "defence": "d"}, STUDENT | {"defence": "d", "attack": "seq_kd"}),
        ({"role": "proxy"}, {"role": "proxy", "proxy": "default", "ablation": "x"}),
        ({"pair": "p"}, {"pair": "p", "role": "knowledge"}),
    ],
)
def test_labels_that_a_report_does_not_tell_apart(a, b):
    assert not differ(a, b)
    with pytest.raises(ValueError, match="runs: one and two stand in one place of a report"):
        refuse_shared_places("runs", [("one", a), ("two", b)])


def test_runs_that_no_table_shows_share_no_place():
    for labels in ({}, {"role": "knowledge"}, {"role": "start", "student": "s", "defence": "d"}):
        assert places(labels) == []
        refuse_shared_places("runs", [("one", labels), ("two", labels)])


def test_a_matrix_with_families_has_a_report_for_each():
    rows = [{"family": "a"}, {}, {"family": "b"}, {"family": "a"}]
    assert of_families(rows) == ["a", "b"] and of_families([{}]) == [""]
    assert of_families([*rows, {"eta": "1"}]) == [""], "the sweep over eta is of all"
