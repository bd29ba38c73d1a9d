"""A matrix folder -> report.md, plots and report.json: teachers, students under every attack, and
what it adds up to.

    python -m reflux.trainer.studies.attack_report FOLDER

The acceptance rules are those of docs/method.md, "Acceptance". Everything is read from the runs'
own logs and predictions.
"""

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reflux.trainer.config.evaluation import LIKELIHOOD
from reflux.trainer.runs.markdown_table import write_json
from reflux.trainer.runs.plotting import plot_all
from reflux.trainer.runs.stats import may_be_zero, over_seeds, relative_change

from .defence_report import ATTACKS_AS_DEFENCE, check_lines, defence_rows, proxy_lines, proxy_rows
from .finished_runs import (
    MODES,
    FinishedRun,
    change,
    cost,
    grouped,
    labelled,
    late_spike,
    load_finished_runs,
    paired,
    score,
    with_role,
)
from .render import ORDER, render

KEPT_POINTS = 0.02  # A1: teacher accuracy
GAIN, LOSS = 0.15, -0.50  # A2, A3: relative change of the student's accuracy
ANSWERED = 0.9  # A5: answers found, relative to the baseline
# labels of runs that have a report of their own (knob.py, ablations.py)
SWEEPS = {"eta", "ablation"}
DIVERGED = 10.0  # A5: a gradient norm late in a run / the median there


def write_report(folder: Path) -> str:
    """Writes report.md, report.json and plots into `folder`; returns the summary lines."""
    folder = Path(folder)
    matrix = json.loads((folder / "matrix.json").read_text())
    everything = load_finished_runs(folder)
    entries = [e for e in everything if not SWEEPS & set(e.labels)]
    plain = [e for e in entries if "defence" not in e.labels]
    found = summarise(plain, matrix["styles"])
    found |= {
        "defences": defence_rows(entries),
        "proxies": proxy_rows(everything),
        "title": matrix["title"],
        "head": _head(entries, matrix),
    }
    found["verdict"] += check_lines(entries) + proxy_lines(found["proxies"])
    found["conclusion"] = conclusion(found)
    found["runs"] = [_run_row(e) for e in entries]
    found["plots"] = plot_all(folder, plain, found)
    write_json(folder / "report.json", found)
    (folder / "report.md").write_text(render(found))
    return "\n".join(found["verdict"])


def summarise(entries: list[FinishedRun], styles: Mapping[str, str]) -> dict[str, Any]:
    """All numbers of the report as one nested table."""
    by_teacher = grouped(with_role(entries, "teacher"), "teacher")
    teachers = {
        name: _teacher(
            by_teacher[name], labelled(entries, role="teacher", teacher="original"), styles
        )
        for name in sorted(
            by_teacher, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n)
        )
    }
    students = {
        attack: {
            teacher: _student(rows, styles) for teacher, rows in grouped(rows, "teacher").items()
        }
        for attack, rows in grouped(with_role(entries, "student"), "attack").items()
    }
    baselines = {
        name: _student(rows, styles)
        for name, rows in grouped(with_role(entries, "baseline"), "attack").items()
    }
    for attack, row in students.items():
        for teacher, cell in row.items():
            if "original" in row and teacher != "original":
                cell["change"] = change(
                    labelled(entries, role="student", attack=attack, teacher=teacher),
                    labelled(entries, role="student", attack=attack, teacher="original"),
                )
                cell["score"] = score(entries, attack, teacher)
    found = {"teachers": teachers, "students": students, "baselines": baselines}
    found["collapse"] = collapse_lines(found)
    return found | {"verdict": verdict(found)}


def _teacher(
    rows: list[FinishedRun], originals: list[FinishedRun], styles: Mapping[str, str]
) -> dict:
    out = _student(rows, styles)
    last = [e.run.steps[-1] for e in rows if e.run.steps]
    out["reference_kl"] = over_seeds(
        [s["reference_kl"] for s in last if "reference_kl" in s]
    )._asdict()
    base = {e.labels["seed"]: e for e in originals}
    pairs = [(e, base[e.labels["seed"]]) for e in rows if e.labels["seed"] in base]
    out["difference"] = {mode: paired(pairs, mode)._asdict() for mode in MODES}
    return out


def _student(rows: list[FinishedRun], styles: Mapping[str, str]) -> dict:
    out: dict[str, Any] = {
        mode: over_seeds([e.score(mode) for e in rows])._asdict() for mode in MODES
    }
    predictions = [p for e in rows for p in e.predictions() if p["mode"] == "sampled"]
    answered = [p for p in predictions if p["extracted"] is not None]
    out["answered"] = len(answered) / max(len(predictions), 1)
    out["right_if_answered"] = sum(bool(p["correct"]) for p in answered) / max(len(answered), 1)
    out["best"] = over_seeds([e.best() for e in rows])._asdict()
    out["styles"] = _shares(predictions, styles)
    out["greedy_styles"] = _shares(
        [p for e in rows for p in e.predictions() if p["mode"] == "greedy"], styles
    )
    out["seconds"] = over_seeds([e.run.summary["wall_s"] for e in rows])._asdict()
    out["cost"] = cost(rows[0])
    out["late_spike"] = max(map(late_spike, rows))
    return out


def _shares(predictions: list[dict], styles: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Share of each style (a regular expression on the text) and how often it is right."""
    groups: dict[str, list[bool]] = {name: [] for name in [*styles, "other"]} if styles else {}
    for p in predictions if styles else ():
        name = next((n for n, pattern in styles.items() if re.search(pattern, p["text"])), "other")
        groups[name].append(bool(p["correct"]))
    return {
        n: {"share": len(g) / max(len(predictions), 1), "right": sum(g) / max(len(g), 1)}
        for n, g in groups.items()
    }


def verdict(found: Mapping[str, Any]) -> list[str]:
    """The acceptance lines, in plain words."""
    lines = []
    for name, row in found["teachers"].items():
        if name != "original":
            gaps = {m: row["difference"][m]["mean"] for m in MODES}
            lines.append(
                f"teacher {name}: accuracy {'kept' if _kept(row) else 'NOT kept'} within "
                f"{KEPT_POINTS * 100:.0f} points ("
                + ", ".join(f"{m} {gaps[m] * 100:+.1f}" for m in MODES)
                + ")"
            )
    lines += _student_lines(found, "distillable") + _task_only_lines(found)
    lines += _student_lines(found, "undistillable") + _student_lines(found, "undistillable", "best")
    return lines + _score_lines(found) + _divergence_lines(found) + found["collapse"]


def _kept(teacher: Mapping[str, Any]) -> bool:
    """A1."""
    return all(abs(teacher["difference"][m]["mean"]) <= KEPT_POINTS for m in MODES)


def sort_attacks(
    found: Mapping, teacher: str, reading: str = "sampled"
) -> tuple[dict[str, dict], list[str]]:
    """The changes of all attacks on a teacher, and the attacks under which the rule for it (A2 or
    A3) holds. `reading`: of the last or of the best checkpoint.
    """
    accept = (lambda c: c >= GAIN) if teacher == "distillable" else (lambda c: c <= LOSS)
    cells = {
        a: row[teacher]["change"][reading]
        for a, row in found["students"].items()
        if "change" in row.get(teacher, {})
    }
    cells = {a: c for a, c in cells.items() if c["n"]}
    return cells, [a for a, c in cells.items() if accept(c["mean"]) and not may_be_zero(c)]


def _student_lines(found: Mapping, teacher: str, reading: str = "sampled") -> list[str]:
    cells, held = sort_attacks(found, teacher, reading)
    if not cells:
        return []
    missed = [a for a in cells if a not in held]
    words = lambda names: ", ".join(
        f"{a} {cells[a]['mean']:+.0%}"
        + " (its interval holds 0)" * (a in missed and may_be_zero(cells[a]))
        for a in names
    )
    rule = f">= {GAIN:+.0%}" if teacher == "distillable" else f"<= {LOSS:+.0%}"
    whose = f"students of the {teacher} teacher" + (
        ", each run's best checkpoint (the attacker stops early)" if reading == "best" else ""
    )
    out = [
        f"{whose}, {rule} of the original's: {len(held)} of {len(cells)} attacks"
        + (f" ({words(held)})" if held else "")
    ]
    if missed:
        out.append(
            f"not {'reached' if teacher == 'distillable' else 'stopped'}{' early' * (reading == 'best')}: {words(missed)}"
        )
    return out


def _score_lines(found: Mapping) -> list[str]:
    """The headline of a protected teacher is its worst attack, that of a helpful one its least
    helped.
    """
    out = []
    for teacher, pick, word in (("undistillable", max, "most"), ("distillable", min, "least")):
        scores = {
            a: row[teacher]["score"]
            for a, row in found["students"].items()
            if row.get(teacher, {}).get("score")
        }
        if scores:
            a = pick(scores, key=lambda a: scores[a]["mean"])
            s = scores[a]
            out.append(
                f"distillability of the {teacher} teacher, the attack that gained {word}: {a}, "
                f"{s['mean']:.2f} [{s['low']:.2f}, {s['high']:.2f}] of what the original gives (1 "
                f"= no change; {len(scores)} attacks scored)"
            )
    return out


def _task_only_lines(found: Mapping) -> list[str]:
    """A2's second half: better than a teacher that was merely trained on the task."""
    pairs = {
        a: (row["distillable"]["sampled"]["mean"], row["task_only"]["sampled"]["mean"])
        for a, row in found["students"].items()
        if "distillable" in row and "task_only" in row
    }
    if not pairs:
        return []
    above = [a for a, (ours, task) in pairs.items() if ours > task]
    return [
        f"above the student of the task-only teacher (eta = 0): {len(above)} of {len(pairs)} "
        "attacks"
    ]


def _divergence_lines(found: Mapping) -> list[str]:
    """A5: a student whose training broke down says nothing about its teacher. Asked of those that
    collapsed: near its optimum a run that succeeds has no gradient left to compare with.
    """
    spikes = {
        a: found["students"][a]["undistillable"]["late_spike"]
        for a in sort_attacks(found, "undistillable")[1]
    }
    spikes = {a: s for a, s in spikes.items() if not math.isnan(s)}
    if not spikes:
        return []
    broken = [a for a, s in spikes.items() if s > DIVERGED]
    return [
        "training of the undistillable teacher's students that collapsed: "
        f"{'diverged under ' + ', '.join(broken) if broken else 'none diverged'} (largest gradient "
        f"norm in the second half of a run {max(spikes.values()):.1f} times its median there; "
        f"limit {DIVERGED:.0f})"
    ]


def collapse_lines(found: Mapping) -> list[str]:
    """A5: is the undistillable student wrong, or does it merely fail to answer?"""
    out = []
    for attack, row in found["students"].items():
        base, cell = row.get("original"), row.get("undistillable")
        if not base or not cell:
            continue
        answered = cell["answered"] / max(base["answered"], 1e-9)
        drop = relative_change(cell["right_if_answered"], base["right_if_answered"])
        kind = "wrong answers, not missing ones" if drop <= LOSS else "mostly a format failure"
        kind = "no collapse" if answered >= ANSWERED and drop > LOSS else kind
        out.append(
            f"{attack}: answers found {cell['answered']:.0%} (original {base['answered']:.0%}), "
            f"right among them {cell['right_if_answered']:.0%} ({base['right_if_answered']:.0%}): "
            f"{kind}"
        )
    return out


def conclusion(found: Mapping[str, Any]) -> str:
    """What it adds up to, for a reader who knows no rule: who was stopped, who got through, what
    the seeds leave open, what else could have been done.
    """
    last, stopped = sort_attacks(found, "undistillable")
    early, stopped_early = sort_attacks(found, "undistillable", "best")
    through = {a: "" for a in last if a not in stopped} | {
        a: ", with its best checkpoint" for a in early if a in stopped and a not in stopped_early
    }
    unsettled = {
        a: how for a, how in through.items() if (early if how else last)[a]["mean"] <= LOSS
    }
    said = []
    if last:
        teacher = found["teachers"].get("undistillable")
        price = (
            "was not evaluated"
            if teacher is None
            else "kept its own accuracy"
            if _kept(teacher)
            else "lost accuracy itself"
        )
        said.append(
            f"The undistillable teacher {price}. Of {len(last)} attacks on it "
            f"{len(last) - len(through)} were stopped: their students end at half of what the same "
            "attack takes from the original, or less, at their last and at their best checkpoint. "
            + _through(
                found, "Got through", {a: how for a, how in through.items() if a not in unsettled}
            )
            + (
                " "
                + _through(
                    found,
                    "Less than half, too, but with a spread over seeds that allows no change",
                    unsettled,
                )
                if unsettled
                else ""
            )
        )
    helped, gained = sort_attacks(found, "distillable")
    if helped:
        rest = [a for a in helped if a not in gained]
        said.append(
            f"The distillable teacher gave at least {GAIN:.0%} more than the original under "
            f"{len(gained)} of {len(helped)} attacks"
            + (f"; not under {', '.join(rest)}." if rest else ".")
        )
    said += [
        _defence_words(name, r, found["defences"]["none"])
        for name, r in found.get("defences", {}).items()
        if name not in ("none", "undistillable")
        and r["change"]["n"]
        and "none" in found["defences"]
    ]
    seeds = max((c["n"] for c in [*last.values(), *helped.values()]), default=0)
    return " ".join(
        said + (["One seed: nothing here has a spread over seeds yet."] if seeds == 1 else [])
    )


def _through(found: Mapping[str, Any], what: str, attacks: Mapping[str, str]) -> str:
    """`attacks`: name -> "", or with which of its checkpoints."""

    def one(attack: str, how: str) -> str:
        row, key = found["students"][attack], "best" if how else "sampled"
        return f"{attack} ({row['undistillable'][key]['mean']:.3f} against {row['original'][key]['mean']:.3f} from the original{how})"

    return (
        f"{what}: {', '.join(one(*item) for item in attacks.items())}."
        if attacks
        else "None got through."
    )


def _defence_words(name: str, row: Mapping[str, Any], none: Mapping[str, Any]) -> str:
    """One other defence in a sentence: what it does to students of sampled text, and what it
    costs.
    """
    c, d, s = row["change"], row["score"], row["student"]["mean"]
    moved = "halves (or more)" if c["mean"] <= LOSS else "lowers" if c["mean"] < 0 else "raises"
    effect = (
        "does not change beyond its spread"
        if may_be_zero(c) or d is not None and d["low"] <= 1 <= d["high"]
        else moved
    )
    lost = (
        100 * (none["served"]["mean"] - row["served"]["mean"]) if row["served"]["n"] else math.nan
    )
    price = (
        "at a price not measured"
        if math.isnan(lost)
        else f"at {lost:.1f} points of served accuracy"
        if lost > 100 * KEPT_POINTS
        else "at the same served accuracy"
    )
    kind = " (an attacker's own move, too)" if name in ATTACKS_AS_DEFENCE.values() else ""
    return f'Serving "{name}"{kind} {effect} what students take ({none["student"]["mean"]:.3f} to {s:.3f}), {price}.'


def _head(entries: list[FinishedRun], matrix: Mapping) -> dict:
    head = dict(entries[0].run.head) if entries else {}
    seconds = sum(e.run.summary["wall_s"] for e in entries)
    return {
        "code": head.get("code"),
        "versions": head.get("versions"),
        "seeds": sorted({e.labels["seed"] for e in entries}),
        "runs": len(entries),
        "run_seconds": round(seconds),
        "commands": [c["command"] for c in matrix["cells"]][:3] + ["..."],
    }


def _run_row(entry: FinishedRun) -> dict:
    """One run of the matrix in one line: what a record needs to be checked by."""
    last = entry.evals()[-1]
    kl = entry.run.steps[-1].get("reference_kl") if entry.run.steps else None
    measured = {m: last[f"eval/{m}"] for m in (*MODES, *LIKELIHOOD) if f"eval/{m}" in last}
    return {**entry.labels, **measured, "reference_kl": kl, "seconds": entry.run.summary["wall_s"]}


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
