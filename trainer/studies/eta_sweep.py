"""The knob's curve: teacher and student against signed eta, as one table and one figure of a matrix
folder.

    python -m reflux.trainer.studies.eta_sweep FOLDER       # of a matrix whose calibrated teachers
        carry a label `eta`, like configs/knob.toml

Teachers are one point per eta and seed, students those of them; eta = 0 is the teacher trained on
the task alone. The recommended range is where every seed's teacher stays within A1 of the original
and the student's change has left zero (docs/method.md, "Acceptance").
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reflux.trainer.runs.markdown_table import mean_and_spread, table, write_json
from reflux.trainer.runs.stats import Estimate, over_seeds

from .attack_report import KEPT_POINTS
from .finished_runs import FinishedRun, load_finished_runs

COLUMNS = {
    "teacher": "teacher accuracy",
    "reference_kl": "KL to original, nats/token",
    "reward": "calibration reward, nats",
    "student": "student accuracy",
}


def knob_points(entries: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """One row per eta, rising: estimates over seeds of every column, and whether every seed's
    teacher was kept.
    """
    originals = {
        e.labels["seed"]: e.score("sampled")
        for e in entries
        if e.labels.get("teacher") == "original" and e.labels["role"] == "teacher"
    }
    points = []
    for eta in sorted({float(e.labels["eta"]) for e in entries if "eta" in e.labels}):
        mine = [e for e in entries if float(e.labels.get("eta", "nan")) == eta]
        teachers, students = (
            [e for e in mine if e.labels["role"] == role] for role in ("teacher", "student")
        )
        values = {
            "teacher": [e.score("sampled") for e in teachers],
            "student": [e.score("sampled") for e in students],
            "reference_kl": last_steps(teachers, "reference_kl"),
            "reward": last_steps(teachers, "reward/cal"),
        }
        kept = [
            abs(e.score("sampled") - originals[e.labels["seed"]]) <= KEPT_POINTS + 1e-9
            for e in teachers
            if e.labels["seed"] in originals
        ]
        points.append(
            {
                "eta": eta,
                "kept": bool(kept) and all(kept),
                **{k: over_seeds(v)._asdict() for k, v in values.items()},
            }
        )
    return points


def last_steps(entries: Iterable[FinishedRun], key: str) -> list[float]:
    """Mean of the last five logged steps of each run."""
    rows = [[s[key] for s in e.run.steps if key in s][-5:] for e in entries]
    return [sum(r) / len(r) for r in rows if r]


def recommended(points: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Per direction the etas whose teachers were all kept and whose students' interval lies on the
    right side of eta = 0's mean.
    """
    zero = next((p["student"]["mean"] for p in points if p["eta"] == 0), None)
    if zero is None:
        return {"distillable": [], "undistillable": []}
    moved = lambda e, up: e["n"] > 0 and (e["low"] > zero if up else e["high"] < zero)
    return {
        "distillable": [
            p["eta"] for p in points if p["eta"] > 0 and p["kept"] and moved(p["student"], True)
        ],
        "undistillable": [
            p["eta"] for p in points if p["eta"] < 0 and p["kept"] and moved(p["student"], False)
        ],
    }


def render(points: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            f"{p['eta']:+g}",
            *(mean_and_spread(p[key]) for key in COLUMNS),
            "yes" if p["kept"] else "no",
        )
        for p in points
    ]
    lines = ["# The knob", "", table(("eta", *COLUMNS.values(), "teacher within A1"), rows)]
    several = any(p["student"]["n"] > 1 for p in points)
    for name, etas in recommended(points).items():
        found = (
            f"eta from {min(etas):+g} to {max(etas):+g} moves the student with the teacher kept"
            if etas
            else "no eta here moves the student beyond its interval with the teacher kept"
        )
        lines.append(
            f"\n{name}: "
            + (found if several else "no range can be said from one seed, which has no interval")
        )
    lines.append(
        "\nMean and standard deviation over seeds, answers sampled at temperature 1.\n\n![the "
        "knob](knob.png)\n"
    )
    return "\n".join(lines)


def plot(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(COLUMNS), figsize=(3.4 * len(COLUMNS), 3.2))
    for ax, (key, title) in zip(axes, COLUMNS.items()):
        rows = [(p["eta"], Estimate(**p[key])) for p in points if p[key]["n"]]
        spread = [e.std if e.n > 1 else 0.0 for _, e in rows]
        ax.errorbar(
            [x for x, _ in rows],
            [e.mean for _, e in rows],
            yerr=spread,
            marker="o",
            ms=3,
            lw=1.2,
            capsize=2,
            color="#2563eb",
        )
        ax.set(xscale="symlog", xlabel="eta", title=title)
        ax.title.set_fontsize(9)
        ax.axvline(0, color="black", lw=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in (axes[0], axes[-1]):
        ax.set_ylim(0, 1.02)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def write_knob(folder: Path) -> str:
    """knob.md, knob.json and knob.png in the matrix folder; returns the table. ValueError without a
    label eta.
    """
    folder = Path(folder)
    points = knob_points(load_finished_runs(folder))
    if not points:
        raise ValueError(
            f"{folder}: no finished run carries a label eta; want the folder of a matrix like "
            "configs/knob.toml"
        )
    write_json(folder / "knob.json", {"points": points, "recommended": recommended(points)})
    plot(points, folder / "knob.png")
    (folder / "knob.md").write_text(render(points))
    return render(points)


if __name__ == "__main__":
    print(write_knob(Path(sys.argv[1])))
