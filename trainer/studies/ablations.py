"""What each choice of the calibration is worth, as one table of a matrix folder.

    python -m reflux.trainer.studies.ablations FOLDER       # of a matrix whose teachers carry a
        label `ablation`, like configs/ablations.toml

The row `default` is the calibration without a change. Differences are paired by seed: of a teacher
to the original, of a student to the student of the default teacher of the same direction.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reflux.trainer.runs.markdown_table import mean_and_spread, points, score, table, write_json
from reflux.trainer.runs.stats import over_seeds

from .attack_report import KEPT_POINTS
from .eta_sweep import last_steps
from .finished_runs import FinishedRun, gain_ratio, items, labelled, load_finished_runs

MODES = ("distillable", "undistillable")
ATTACK = "seq_kd"
HEAD = (
    "calibration",
    "teacher - original, points",
    "KL to original, nats/token",
    "calibration reward, nats",
    "student accuracy",
    "student - default's, points",
    "distillability",
    "teacher within A1",
)


def ablation_rows(entries: Sequence[FinishedRun]) -> dict[str, dict[str, dict[str, Any]]]:
    """mode -> ablation -> estimates over seeds, `default` first."""
    originals = _by_seed(
        e
        for e in entries
        if e.labels["role"] == "teacher" and e.labels.get("teacher") == "original"
    )
    names = list(dict.fromkeys(e.labels["ablation"] for e in entries if "ablation" in e.labels))
    return {
        mode: {name: _row(entries, mode, name, originals) for name in ("default", *names)}
        for mode in MODES
    }


def _row(
    entries: Sequence[FinishedRun], mode: str, name: str, originals: Mapping[str, FinishedRun]
) -> dict[str, Any]:
    teachers, students = (
        _by_seed(_of(entries, role, mode, name)) for role in ("teacher", "student")
    )
    defaults = _by_seed(_of(entries, "student", mode, "default"))
    gaps = _differences(teachers, originals)
    return {
        "teacher_gap": over_seeds(gaps)._asdict(),
        "kept": bool(gaps) and all(abs(g) <= KEPT_POINTS + 1e-9 for g in gaps),
        "reference_kl": over_seeds(last_steps(teachers.values(), "reference_kl"))._asdict(),
        "reward": over_seeds(last_steps(teachers.values(), "reward/cal"))._asdict(),
        "student": over_seeds([e.score("sampled") for e in students.values()])._asdict(),
        "student_gap": over_seeds(_differences(students, defaults))._asdict(),
        "score": gain_ratio(
            [*students.values()],
            _of(entries, "student", "original", "default"),
            items(labelled(entries, role="start", student="student")),
        ),
    }


def _of(entries: Sequence[FinishedRun], role: str, mode: str, name: str) -> list[FinishedRun]:
    return [
        e
        for e in entries
        if e.labels["role"] == role
        and e.labels.get("teacher") == mode
        and "eta" not in e.labels
        and "defence" not in e.labels
        and e.labels.get("ablation", "default") == name
        and e.labels.get("attack", ATTACK) == ATTACK
    ]


def _by_seed(entries) -> dict[str, FinishedRun]:
    return {e.labels["seed"]: e for e in entries}


def _differences(
    after: Mapping[str, FinishedRun], before: Mapping[str, FinishedRun]
) -> list[float]:
    return [
        after[s].score("sampled") - before[s].score("sampled")
        for s in sorted(after.keys() & before.keys())
    ]


def render(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    parts = [
        "# Ablations of the calibration",
        f"One thing changed at a time; students by sampled text ({ATTACK}); mean +- standard "
        "deviation over seeds.",
    ]
    for mode, of_mode in rows.items():
        lines = [
            (
                name,
                points(r["teacher_gap"]),
                *(mean_and_spread(r[k]) for k in ("reference_kl", "reward", "student")),
                "" if name == "default" else points(r["student_gap"]),
                score(r["score"]),
                "yes" if r["kept"] else "no",
            )
            for name, r in of_mode.items()
        ]
        parts += [f"## {mode}", table(HEAD, lines)]
    return "\n\n".join(parts) + "\n"


def write_ablations(folder: Path) -> str:
    """ablations.md and ablations.json in the matrix folder; returns the table. ValueError without a
    label ablation.
    """
    folder = Path(folder)
    entries = load_finished_runs(folder)
    if not any("ablation" in e.labels for e in entries):
        raise ValueError(
            f"{folder}: no finished run carries a label ablation; want the folder of a matrix like "
            "configs/ablations.toml"
        )
    rows = ablation_rows(entries)
    write_json(folder / "ablations.json", rows)
    (folder / "ablations.md").write_text(render(rows))
    return render(rows)


if __name__ == "__main__":
    print(write_ablations(Path(sys.argv[1])))
