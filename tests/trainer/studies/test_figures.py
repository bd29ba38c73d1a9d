import struct
from dataclasses import replace

from reflux.trainer.runs.logger import Run
from reflux.trainer.runs.stats import Estimate, over_seeds
from reflux.trainer.studies.figures import draw_figures, student_bars
from reflux.trainer.studies.finished_runs import FinishedRun
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


def axes_of(outcome, runs=()):
    return student_bars(runs, outcome).axes[0]


def test_a_missing_student_is_hatched_and_named_not_a_bar_of_0():
    outcome = results(2)
    outcome = replace(outcome, teachers={"original": TEACHER, "distillable": TEACHER})
    ax = axes_of(outcome)
    assert [t.get_text() for t in ax.texts] == ["not run", "not run"]
    hatched = [p for p in ax.patches if p.get_hatch()]
    assert len(hatched) == 2 and all(p.get_height() > 0.2 for p in hatched)
    assert sorted(p.get_height() for p in ax.patches if not p.get_hatch()) == [0.5, 0.5]


def test_names_are_words_and_lines_say_what_to_compare_with(tmp_path):
    outcome = results(1)
    outcome = replace(outcome, students={"seq_kd": outcome.students["a0"]})
    runs = [run_of(tmp_path, seed, 0.25 + 0.1 * seed) for seed in range(2)]
    ax = axes_of(outcome, runs)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["sequence KD"]
    said = ax.get_legend_handles_labels()[1]
    assert said == [
        "original teacher (0.50)",
        "students at the start (0.10)",
        "chance (0.25)",
        "from original",
    ]
    (points,) = ax.collections[-1:]
    assert sorted(y for _, y in points.get_offsets()) == [0.25, 0.35], "each seed is a point"


def run_of(folder, seed, accuracy):
    """A student with an evaluation at the start and one at the end, of four options: the correct
    one was never the third or fourth.
    """
    options = {f"eval/sampled_at_{i}": 0.5 for i in (1, 2)} | {"eval/chance": 0.25}
    events = [
        {"event": "eval", "step": 0, "eval/sampled": 0.1, **options},
        {"event": "eval", "step": 9, "eval/sampled": accuracy, **options},
    ]
    labels = {"role": "student", "teacher": "original", "attack": "seq_kd", "seed": str(seed)}
    return FinishedRun(labels, Run({}, [], events, {"wall_s": 1.0}), folder)
