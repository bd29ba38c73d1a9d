"""Ablations of the calibration, as one table of a matrix folder.

    python -m reflux.trainer.studies.ablations FOLDER

for a matrix whose teachers carry a label `ablation`, like configs/ablations.toml. The row `default`
is the unchanged calibration, `eta = 0` the control. Differences are paired by seed: of a teacher to
the original, of a student to the student of the default teacher of the same mode. An ablation whose
teachers are the default's to the last digit changes nothing in its world; it is named, and its row
left out.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reflux.trainer.runs.files import write_json
from reflux.trainer.runs.markdown_table import (
    mean_and_std,
    points_with_interval,
    render_template,
    score,
)
from reflux.trainer.runs.stats import Estimate, over_seeds

from .finished_runs import (
    FinishedRun,
    accuracy_by_prompt,
    gain_ratio,
    gap_by_seed,
    labelled,
    last_steps,
    length_ratio,
    load_finished_runs,
    mean_accuracy,
    with_role,
)
from .labels import ATTACK
from .report_command import print_report
from .results import Rule
from .run_warnings import as_markdown, run_warnings
from .verdict import A1_WORDS, within_a1

TEMPLATE = Path(__file__).with_name("ablations.md.jinja")
MODES = ("distillable", "undistillable")
CONTROL = "eta = 0"


@dataclass(frozen=True)
class AblationRow:
    """One changed calibration in one mode, over seeds."""

    teacher_gap: Estimate  # accuracy minus the original teacher's
    accuracy_preserved: Rule  # A1
    reference_kl: Estimate  # of the teacher, nats per token
    reward: Estimate  # its calibration reward, in the units of its score_norm
    length: Estimate  # of its texts over the last five steps / in the first step
    student: Estimate  # accuracy
    student_gap: Estimate  # minus that of the default teacher's student
    score: Estimate | None  # distillability

    def same_as(self, other: "AblationRow") -> bool:
        """Whether both are of the same teachers: every measured number of them is equal. Accuracies
        alone, which are fractions of a few prompts, tell nothing.
        """
        mine, others = (
            [(e.mean, e.n) for e in (r.teacher_gap, r.reference_kl, r.reward)]
            for r in (self, other)
        )
        return mine == others and max(self.reference_kl.n, self.reward.n) > 0


def ablation_rows(runs: Sequence[FinishedRun]) -> dict[str, dict[str, AblationRow]]:
    """mode -> ablation -> row, `default` and the control first. ValueError where an ablation has
    the control's name.
    """
    ablations = dict.fromkeys(r.labels["ablation"] for r in runs if "ablation" in r.labels)
    if CONTROL in ablations:
        raise ValueError(
            f"the label ablation = {CONTROL!r} is the name of the control's own row, the cells "
            'with teacher = "task_only"; want another name for it'
        )
    return {
        mode: {
            "default": _row(runs, mode, "default"),
            CONTROL: _row(runs, "task_only", "default", mode),
            **{name: _row(runs, mode, name) for name in ablations},
        }
        for mode in MODES
    }


def vacuous(rows: Mapping[str, Mapping[str, AblationRow]]) -> list[str]:
    """Ablations that are the default in every mode that has them."""
    names = next(iter(rows.values()))
    return [
        name
        for name in names
        if name not in ("default", CONTROL)
        and (found := [row for row in rows.values() if row[name].teacher_gap.n])
        and all(row[name].same_as(row["default"]) for row in found)
    ]


def _row(
    runs: Sequence[FinishedRun], teacher: str, name: str, mode: str | None = None
) -> AblationRow:
    """mode: whose default the students are compared with, if not `teacher`."""
    teachers, students = (_select(runs, role, teacher, name) for role in ("teacher", "student"))
    originals = labelled(with_role(runs, "teacher"), teacher="original")
    defaults = _select(runs, "student", mode or teacher, "default")
    teacher_gap = over_seeds(gap_by_seed(teachers, originals))
    return AblationRow(
        teacher_gap=teacher_gap,
        accuracy_preserved=within_a1(teacher_gap),
        reference_kl=last_steps(teachers, "reference_kl"),
        reward=last_steps(teachers, "reward/cal"),
        length=over_seeds([x for x in map(length_ratio, teachers) if not math.isnan(x)]),
        student=mean_accuracy(students),
        student_gap=over_seeds(gap_by_seed(students, defaults)),
        score=gain_ratio(
            students,
            _select(runs, "student", "original", "default"),
            accuracy_by_prompt(labelled(runs, role="start", student="student")),
        ),
    )


def _select(runs: Sequence[FinishedRun], role: str, teacher: str, name: str) -> list[FinishedRun]:
    """Runs of the eta sweep and of other defences are left out."""
    return [
        r
        for r in labelled(runs, role=role, teacher=teacher)
        if not {"eta", "defence"} & set(r.labels)
        and r.labels.get("ablation", "default") == name
        and r.labels.get("attack", ATTACK) == ATTACK
    ]


def render(rows: dict[str, dict[str, AblationRow]]) -> str:
    left_out = vacuous(rows)
    shown = {
        mode: {name: row for name, row in of_mode.items() if name not in left_out}
        for mode, of_mode in rows.items()
    }
    return render_template(
        TEMPLATE,
        attack=ATTACK,
        modes=shown,
        left_out=left_out,
        seeds=max(
            max(r.student.n, r.teacher_gap.n) for of_mode in rows.values() for r in of_mode.values()
        ),
        mean_and_std=mean_and_std,
        points=points_with_interval,
        score=score,
        words=A1_WORDS,
    )


def write_ablations(folder: Path) -> str:
    """ablations.md and ablations.json in the matrix folder; returns the page. ValueError without a
    label ablation.
    """
    folder = Path(folder)
    runs = load_finished_runs(folder)
    if not any("ablation" in r.labels for r in runs):
        raise ValueError(
            f"{folder}: no finished run carries a label ablation; want the folder of a matrix like "
            "configs/ablations.toml"
        )
    rows = ablation_rows(runs)
    text = render(rows) + as_markdown(run_warnings(folder))
    write_json(folder / "ablations.json", rows)
    (folder / "ablations.md").write_text(text)
    return text


if __name__ == "__main__":
    sys.exit(print_report("ablations", write_ablations))
