import struct

from reflux.trainer.runs.stats import Estimate, over_seeds
from reflux.trainer.studies.figures import draw_figures
from reflux.trainer.studies.results import (
    AccuracyDifference,
    QueryCost,
    Results,
    StudentResult,
    TeacherResult,
)

NOTHING = over_seeds([])
MEASURED = {
    "sampled": Estimate(0.5, 0.1, 0.4, 0.6, 2),
    "greedy": NOTHING,
    "answered": 1.0,
    "correct_if_answered": 1.0,
    "best": NOTHING,
    "styles": {},
    "greedy_styles": {},
    "seconds": NOTHING,
    "cost": QueryCost(0, 0, 0, 0.0),
    "late_spike": 1.0,
}
TEACHER = TeacherResult(
    **MEASURED, reference_kl=NOTHING, difference=AccuracyDifference(*[NOTHING] * 4)
)


def results(attacks):
    students = {f"a{i}": {"original": StudentResult(**MEASURED)} for i in range(attacks)}
    return Results(teachers={"original": TEACHER}, students=students, baselines={})


def test_without_anything_to_draw_nothing_is_written(tmp_path):
    empty = Results(teachers={}, students={}, baselines={})
    assert draw_figures(tmp_path, [], empty) == {} and not list(tmp_path.iterdir())


def test_a_student_table_alone_gives_one_figure(tmp_path):
    assert list(draw_figures(tmp_path, [], results(1))) == ["students.png"]
    assert [p.name for p in tmp_path.iterdir()] == ["students.png"]
    assert (tmp_path / "students.png").read_bytes()[:4] == b"\x89PNG"


def test_many_attacks_are_wrapped(tmp_path):
    """Twenty attacks as three rows of bars, not as one that nobody can read."""
    size = {}
    for count in (7, 20):
        draw_figures(tmp_path, [], results(count))
        size[count] = struct.unpack(">II", (tmp_path / "students.png").read_bytes()[16:24])
    assert size[20][0] < 1.2 * size[7][0] and 2.5 < size[20][1] / size[7][1] < 3.6
