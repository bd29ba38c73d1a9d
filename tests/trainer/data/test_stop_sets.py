"""Two models with the same ids that stop at different ones."""

import shutil
from types import SimpleNamespace

import pytest
from runs import stops_at, with_other_stop

from reflux.trainer.data.chat import Chat
from reflux.trainer.data.stop_sets import name_them, stop_advice, unknown_stops


@pytest.fixture
def folders(talkers, tmp_path):
    """(student, teacher that ends its turns with <|pad|>): folders to be changed."""
    student = shutil.copytree(talkers / "policy", tmp_path / "student")
    return student, with_other_stop(talkers / "teacher", tmp_path / "teacher")


def advice(objective, student, teacher):
    return stop_advice(objective, Chat(str(student)), Chat(str(teacher)))


def test_the_teachers_stops_that_the_student_lacks(folders):
    student, teacher = map(Chat, map(str, folders))
    assert (student.stop_ids, teacher.stop_ids, teacher.stop_id) == ((2,), (0,), 0)
    assert unknown_stops(student, teacher) == (0,) and unknown_stops(student, student) == ()


def test_token_by_token_they_are_an_error_until_the_student_knows_them(folders):
    student, teacher = folders
    found = advice("kl", student, teacher)
    assert found.level == "error" and "'<|pad|>' (0)" in found.text
    assert f"{student}/generation_config.json: eos_token_id = [0, 2]" in found.text
    for objective in ("nll", "byte", "class", "span", "policy_gradient"):
        assert advice(objective, student, teacher) is None
    stops_at(student, 0, 2)
    assert advice("kl", student, teacher) is None


def test_a_further_stop_that_ends_no_turn_is_a_warning(folders, talkers):
    student, _ = folders
    teacher = stops_at(shutil.copytree(talkers / "teacher", student.parent / "both"), 0, 2)
    assert advice("kl", student, teacher).level == "warning"
    assert advice("kl", teacher, student) is None  # the student may know more


def test_a_model_of_the_hub_is_copied_before_it_is_changed():
    says = name_them(SimpleNamespace(path="someone/model", stop_ids=(2,)), [0])
    assert "of a local copy of someone/model: eos_token_id = [0, 2]" in says
