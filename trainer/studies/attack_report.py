"""A matrix folder -> report.md, plots and report.json: teachers, students under every attack, and
the acceptance rules of docs/method.md.

    python -m reflux.trainer.studies.attack_report FOLDER

Everything is read from the runs' own logs and predictions. results.py has the types, verdict.py
the rules, render.py the page.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reflux.trainer.config.evaluation import LIKELIHOOD
from reflux.trainer.runs.files import to_json, write_json
from reflux.trainer.runs.stats import over_seeds

from .defence_report import check_lines, defence_results, proxy_lines, proxy_results
from .figures import draw_figures
from .finished_runs import (
    MODES,
    FinishedRun,
    accuracy_change,
    distillability,
    gap_by_seed,
    grouped,
    knows_correct,
    labelled,
    late_spike,
    load_finished_runs,
    mean_accuracy,
    paired_by_prompt,
    query_cost,
    same_seed,
    with_role,
)
from .labels import of_families
from .render import render
from .report_command import print_report
from .results import (
    TEACHERS,
    AccuracyDifference,
    AttackReport,
    ModelResult,
    Provenance,
    Results,
    RunRow,
    StudentResult,
    StyleFraction,
    TeacherResult,
)
from .run_warnings import run_warnings
from .verdict import collapse_lines, conclusion, verdict_lines

SWEEPS = {"eta", "ablation"}  # labels of runs that have a report of their own
COMMANDS = 3  # shown in the report


def write_report(folder: Path) -> str:
    """Writes report.md, report.json and plots into `folder`; returns the verdict lines. Where cells
    have a label `family`, one of each family into a folder of its own, report-FAMILY.
    """
    folder = Path(folder)
    cells = json.loads((folder / "matrix.json").read_text())["cells"]
    families = of_families(c["labels"] for c in cells)
    return "\n".join(line for family in families for line in _write(folder, family))


def _write(folder: Path, family: str) -> list[str]:
    out = folder / f"report-{re.sub(r'[^A-Za-z0-9_.-]+', '_', family)}" if family else folder
    out.mkdir(exist_ok=True)
    report = build_report(folder, out, family)
    # one flat object a run
    rows = [row.flat() for row in report.runs]
    write_json(out / "report.json", to_json(report) | {"runs": to_json(rows)})
    (out / "report.md").write_text(render(report))
    return [*([f"family {family}:"] if family else []), *report.verdict]


def build_report(folder: Path, out: Path | None = None, family: str = "") -> AttackReport:
    """Also draws the plots, into `out`. family: of whose runs; "" for all."""
    matrix = json.loads((folder / "matrix.json").read_text())
    everything = load_finished_runs(folder, family)
    runs = [r for r in everything if not SWEEPS & set(r.labels)]
    undefended = [r for r in runs if "defence" not in r.labels]
    results = Results(
        teachers=teacher_results(undefended, matrix["styles"]),
        students=student_results(undefended, matrix["styles"]),
        baselines={
            name: ModelResult(**_measured(rows, matrix["styles"]))
            for name, rows in grouped(with_role(undefended, "baseline"), "attack").items()
        },
        defences=defence_results(runs),
        proxies=proxy_results(everything),
    )
    collapse = collapse_lines(results.students)
    checks = [*check_lines(runs), *proxy_lines(results.proxies)]
    return AttackReport(
        **vars(results),
        title=", ".join(filter(None, [matrix["title"], family])),
        collapse=tuple(collapse),
        verdict=(*verdict_lines(results), *collapse, *checks),
        conclusion=conclusion(results),
        head=_provenance(runs, matrix),
        runs=tuple(_run_row(r) for r in runs),
        plots=draw_figures(out or folder, undefended, results),
        warnings=(*run_warnings(folder), *_of_rewards(runs)),
    )


def _of_rewards(runs: Sequence[FinishedRun]) -> list[str]:
    graded = [r for r in runs if not knows_correct(r.predictions())]
    if not graded:
        return []
    return [
        f"the grader of {len(graded)} of {len(runs)} runs gives rewards and knows no correct "
        "answers: their accuracies are mean rewards, and rewards below 0 have no relative change"
    ]


def teacher_results(
    runs: Sequence[FinishedRun], styles: Mapping[str, str]
) -> dict[str, TeacherResult]:
    """teacher -> result; those of TEACHERS first. `styles`: name -> regular expression."""
    by_teacher = grouped(with_role(runs, "teacher"), "teacher")
    known = [name for name in TEACHERS if name in by_teacher]
    others = sorted(by_teacher.keys() - set(TEACHERS))
    originals = by_teacher.get("original", [])
    return {name: _teacher(by_teacher[name], originals, styles) for name in [*known, *others]}


def _teacher(
    rows: Sequence[FinishedRun], originals: Sequence[FinishedRun], styles: Mapping[str, str]
) -> TeacherResult:
    pairs = same_seed(rows, originals)
    return TeacherResult(
        **_measured(rows, styles),
        reference_kl=over_seeds([r.reference_kl for r in rows if r.reference_kl is not None]),
        difference=AccuracyDifference(
            sampled=over_seeds(gap_by_seed(rows, originals)),
            greedy=over_seeds(gap_by_seed(rows, originals, "greedy")),
            sampled_items=paired_by_prompt(pairs, "sampled"),
            greedy_items=paired_by_prompt(pairs, "greedy"),
        ),
    )


def student_results(
    runs: Sequence[FinishedRun], styles: Mapping[str, str]
) -> dict[str, dict[str, StudentResult]]:
    """attack -> teacher -> result."""
    return {
        attack: {
            teacher: _student(runs, attack, teacher, styles) for teacher in grouped(rows, "teacher")
        }
        for attack, rows in grouped(with_role(runs, "student"), "attack").items()
    }


def _student(
    runs: Sequence[FinishedRun], attack: str, teacher: str, styles: Mapping[str, str]
) -> StudentResult:
    rows = labelled(runs, role="student", attack=attack, teacher=teacher)
    originals = labelled(runs, role="student", attack=attack, teacher="original")
    controls = labelled(runs, role="student", attack=attack, teacher="task_only")
    measured = _measured(rows, styles)
    if not originals or teacher == "original":
        return StudentResult(**measured)
    gaps = gap_by_seed(rows, controls) if teacher != "task_only" else []
    return StudentResult(
        **measured,
        change=accuracy_change(rows, originals),
        score=distillability(runs, attack, teacher),
        over_control=over_seeds(gaps) if gaps else None,
    )


def _measured(rows: Sequence[FinishedRun], styles: Mapping[str, str]) -> dict[str, Any]:
    """The fields of ModelResult."""
    predictions = [p for r in rows for p in r.predictions()]
    sampled = [p for p in predictions if p["mode"] == "sampled"]
    answered = [p for p in sampled if _has_answer(p)]
    known = knows_correct(sampled)
    return {
        "sampled": mean_accuracy(rows, "sampled"),
        "greedy": mean_accuracy(rows, "greedy"),
        "answered": len(answered) / max(len(sampled), 1) if known else math.nan,
        "correct_if_answered": _fraction_correct(answered) if known else math.nan,
        "best": over_seeds([r.best_accuracy() for r in rows if r.measures("sampled")]),
        "styles": style_fractions(sampled, styles),
        "greedy_styles": style_fractions([p for p in predictions if p["mode"] == "greedy"], styles),
        "seconds": over_seeds([r.seconds for r in rows]),
        "cost": query_cost(rows[0]),
        "late_spike": max((s for s in map(late_spike, rows) if s == s), default=math.nan),
    }


def _has_answer(prediction: Mapping[str, Any]) -> bool:
    """Where the grader is a function that names no answers, a text that is not cut off or refused
    counts as one (`outcome`, predictions.py).
    """
    named = prediction["extracted"] is not None
    return named or prediction.get("outcome") in ("correct", "wrong")


def _fraction_correct(predictions: Sequence[Mapping[str, Any]]) -> float:
    """NaN without any."""
    if not predictions:
        return math.nan
    return sum(bool(p["correct"]) for p in predictions) / len(predictions)


def style_fractions(
    predictions: Sequence[Mapping[str, Any]], styles: Mapping[str, str]
) -> dict[str, StyleFraction]:
    """How often each style occurs, and how often it is correct (NaN where it does not occur, or the
    grader knows no correct answers). A text has the first style whose regular expression it
    contains, else the style "other". Empty without styles.
    """
    if not styles:
        return {}
    groups: dict[str, list[Mapping[str, Any]]] = {name: [] for name in [*styles, "other"]}
    for p in predictions:
        name = next((n for n, pattern in styles.items() if re.search(pattern, p["text"])), "other")
        groups[name].append(p)
    known = knows_correct(predictions)
    return {
        name: StyleFraction(
            fraction=len(group) / max(len(predictions), 1),
            correct=_fraction_correct(group) if known else math.nan,
        )
        for name, group in groups.items()
    }


def _provenance(runs: Sequence[FinishedRun], matrix: Mapping[str, Any]) -> Provenance:
    head = runs[0].run.head if runs else {}
    commands = [c["command"] for c in matrix["cells"]]
    return Provenance(
        code=head.get("code"),
        versions=head.get("versions"),
        seeds=tuple(sorted({r.labels["seed"] for r in runs})),
        runs=len(runs),
        run_seconds=round(sum(r.seconds for r in runs)),
        commands=(*commands[:COMMANDS], "..."),
    )


def _run_row(run: FinishedRun) -> RunRow:
    last = run.evals()[-1]
    measured = {m: last[f"eval/{m}"] for m in (*MODES, *LIKELIHOOD) if f"eval/{m}" in last}
    if "sampled" in measured:
        measured["best"] = run.best_accuracy()
        at_start = (e for e in run.evals() if not e["step"])
        if begun := [e["eval/sampled"] for e in at_start if "eval/sampled" in e]:
            measured["at_start"] = begun[0]
    return RunRow(run.labels, measured, reference_kl=run.reference_kl, seconds=run.seconds)


if __name__ == "__main__":
    sys.exit(print_report("attack_report", write_report))
