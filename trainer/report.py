"""A matrix folder -> report.md, plots and report.json: teachers, students under every attack, and what it adds up to.

    python -m reflux.trainer.report FOLDER

The acceptance rules are those of docs/method.md, "Acceptance". Everything is read from the runs' own logs and predictions.
"""
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .report_checks import check_lines, defence_rows, render_defences
from .report_entries import MODES, Entry, change, cost, finished_entries, grouped, labelled, paired, score, with_role
from .report_plots import plot_all
from .stats import over_seeds, relative_change
from .tables import mean_and_spread, table
from .tables import score as score_text

KEPT_POINTS = 0.02  # A1: teacher accuracy
GAIN, LOSS = 0.15, -0.50  # A2, A3: relative change of the student's accuracy
ANSWERED = 0.9  # A5: answers found, relative to the baseline
SWEEPS = {"eta", "ablation"}  # labels of runs that have a report of their own (knob.py, ablations.py)
ORDER = ("original", "task_only", "distillable", "undistillable")  # of the teachers in tables and plots


def write_report(folder: Path) -> str:
    """Writes report.md, report.json and plots into `folder`; returns the summary lines."""
    folder = Path(folder)
    matrix = json.loads((folder / "matrix.json").read_text())
    entries = [e for e in finished_entries(folder) if not SWEEPS & set(e.labels)]
    found = summarise([e for e in entries if "defence" not in e.labels], matrix["styles"])
    found["verdict"] += check_lines(entries)
    found["defences"] = defence_rows(entries)
    found["runs"] = [_run_row(e) for e in entries]
    found["title"] = matrix["title"]
    found["head"] = _head(entries, matrix)
    found["plots"] = plot_all(folder, entries, found)
    (folder / "report.json").write_text(json.dumps(found, indent=1, default=_plain) + "\n")
    (folder / "report.md").write_text(render(found))
    return "\n".join(found["verdict"])


def summarise(entries: list[Entry], styles: Mapping[str, str]) -> dict[str, Any]:
    """All numbers of the report as one nested table."""
    by_teacher = grouped(with_role(entries, "teacher"), "teacher")
    teachers = {name: _teacher(by_teacher[name], labelled(entries, role="teacher", teacher="original"), styles)
                for name in sorted(by_teacher, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))}
    students = {attack: {teacher: _student(rows, styles) for teacher, rows in grouped(rows, "teacher").items()}
                for attack, rows in grouped(with_role(entries, "student"), "attack").items()}
    baselines = {name: _student(rows, styles) for name, rows in grouped(with_role(entries, "baseline"), "attack").items()}
    for attack, row in students.items():
        for teacher, cell in row.items():
            if "original" in row and teacher != "original":
                cell["change"] = change(labelled(entries, role="student", attack=attack, teacher=teacher),
                                        labelled(entries, role="student", attack=attack, teacher="original"))
                cell["score"] = score(entries, attack, teacher)
    found = {"teachers": teachers, "students": students, "baselines": baselines}
    return found | {"verdict": verdict(found)}


def _teacher(rows: list[Entry], originals: list[Entry], styles: Mapping[str, str]) -> dict:
    out = _student(rows, styles)
    last = [e.run.steps[-1] for e in rows if e.run.steps]
    out["anchor_kl"] = over_seeds([s["anchor_kl"] for s in last if "anchor_kl" in s])._asdict()
    base = {e.labels["seed"]: e for e in originals}
    pairs = [(e, base[e.labels["seed"]]) for e in rows if e.labels["seed"] in base]
    out["difference"] = {mode: paired(pairs, mode)._asdict() for mode in MODES}
    return out


def _student(rows: list[Entry], styles: Mapping[str, str]) -> dict:
    out: dict[str, Any] = {mode: over_seeds([e.score(mode) for e in rows])._asdict() for mode in MODES}
    predictions = [p for e in rows for p in e.predictions() if p["mode"] == "sampled"]
    answered = [p for p in predictions if p["extracted"] is not None]
    out["answered"] = len(answered) / max(len(predictions), 1)
    out["right_if_answered"] = sum(bool(p["correct"]) for p in answered) / max(len(answered), 1)
    out["best"] = over_seeds([max(v["eval/sampled"] for v in e.evals()) for e in rows])._asdict()
    out["styles"] = _shares(predictions, styles)
    out["greedy_styles"] = _shares([p for e in rows for p in e.predictions() if p["mode"] == "greedy"], styles)
    out["seconds"] = over_seeds([e.run.summary["wall_s"] for e in rows])._asdict()
    out["cost"] = cost(rows[0])
    return out


def _shares(predictions: list[dict], styles: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Share of each style (a regular expression on the text) and how often it is right."""
    groups: dict[str, list[bool]] = {name: [] for name in [*styles, "other"]} if styles else {}
    for p in predictions if styles else ():
        name = next((n for n, pattern in styles.items() if re.search(pattern, p["text"])), "other")
        groups[name].append(bool(p["correct"]))
    return {n: {"share": len(g) / max(len(predictions), 1), "right": sum(g) / max(len(g), 1)} for n, g in groups.items()}


def verdict(found: Mapping[str, Any]) -> list[str]:
    """The acceptance lines, in plain words."""
    lines = []
    for name, row in found["teachers"].items():
        if name != "original":
            gaps = {m: row["difference"][m]["mean"] for m in MODES}
            kept = all(abs(g) <= KEPT_POINTS for g in gaps.values())
            lines.append(f"teacher {name}: accuracy {'kept' if kept else 'NOT kept'} within {KEPT_POINTS * 100:.0f} points ("
                         + ", ".join(f"{m} {gaps[m] * 100:+.1f}" for m in MODES) + ")")
    lines += _student_lines(found, "distillable", lambda c: c >= GAIN, f">= {GAIN:+.0%}")
    lines += _student_lines(found, "undistillable", lambda c: c <= LOSS, f"<= {LOSS:+.0%}")
    lines += _score_lines(found)
    lines += _collapse_lines(found)
    return lines


def _student_lines(found: Mapping, teacher: str, accept: Callable[[float], bool], rule: str) -> list[str]:
    cells = {a: row[teacher]["change"]["sampled"] for a, row in found["students"].items() if "change" in row.get(teacher, {})}
    cells = {a: c for a, c in cells.items() if c["n"]}
    if not cells:
        return []
    held = [a for a, c in cells.items() if accept(c["mean"]) and not _may_be_zero(c)]
    missed = [a for a in cells if a not in held]
    words = lambda names: ", ".join(f"{a} {cells[a]['mean']:+.0%}" for a in names)
    out = [f"students of the {teacher} teacher, {rule} of the original's: {len(held)} of {len(cells)} attacks"
           + (f" ({words(held)})" if held else "")]
    if missed:
        out.append(f"not {'reached' if teacher == 'distillable' else 'stopped'}: {words(missed)}")
    if teacher == "distillable":
        out += _task_only_lines(found)
    return out


def _score_lines(found: Mapping) -> list[str]:
    """The headline of a protected teacher is its worst attack, that of a helpful one its least helped."""
    out = []
    for teacher, pick, word in (("undistillable", max, "most"), ("distillable", min, "least")):
        scores = {a: row[teacher]["score"] for a, row in found["students"].items() if row.get(teacher, {}).get("score")}
        if scores:
            a = pick(scores, key=lambda a: scores[a]["mean"])
            s = scores[a]
            out.append(f"distillability of the {teacher} teacher, the attack that gained {word}: {a}, {s['mean']:.2f} "
                       f"[{s['low']:.2f}, {s['high']:.2f}] of what the original gives (1 = no change; {len(scores)} attacks scored)")
    return out


def _may_be_zero(change: Mapping[str, float]) -> bool:
    """Several seeds whose 95 % interval of the change holds 0."""
    return change["n"] > 1 and change["low"] <= 0 <= change["high"]


def _task_only_lines(found: Mapping) -> list[str]:
    """A2's second half: better than a teacher that was merely trained on the task."""
    pairs = {a: (row["distillable"]["sampled"]["mean"], row["task_only"]["sampled"]["mean"])
             for a, row in found["students"].items() if "distillable" in row and "task_only" in row}
    if not pairs:
        return []
    above = [a for a, (ours, task) in pairs.items() if ours > task]
    return [f"above the student of the task-only teacher (eta = 0): {len(above)} of {len(pairs)} attacks"]


def _collapse_lines(found: Mapping) -> list[str]:
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
        out.append(f"{attack}: answers found {cell['answered']:.0%} (original {base['answered']:.0%}), right among them "
                   f"{cell['right_if_answered']:.0%} ({base['right_if_answered']:.0%}): {kind}")
    return out


def render(found: Mapping[str, Any]) -> str:
    """report.md."""
    parts = [f"# {found['title'] or 'Report'}", "\n".join(f"- {line}" for line in found["verdict"]),
             "Accuracies are shares of held-out prompts answered right, sampled at temperature 1 unless said otherwise; "
             "+- is the standard deviation over seeds, intervals are 95 %. \"Undistillable\" means: reduces what the students "
             "tested here gain through the channels tested here at this budget.",
             "## Teachers", _teacher_table(found["teachers"]), "## Students", _student_table(found)]
    if any("score" in c for row in found["students"].values() for c in row.values()):
        parts += ["## Attacks in detail", _attack_table(found["students"])]
    if len(found.get("defences", {})) > 1:
        parts += ["## Other defences", "By what students of sampled text gain; accuracy is that of the texts served.", render_defences(found["defences"])]
    parts += [f"## {title}\n![{title}]({name})" for name, title in found["plots"].items()]
    parts += ["## How it was made", "```\n" + json.dumps(found["head"], indent=1) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _teacher_table(teachers: Mapping[str, dict]) -> str:
    styles = next(iter(teachers.values()))["styles"] if teachers else {}
    rows = [["teacher", "sampled", "greedy", "difference, points", "KL to original", *(f"{s}: share / right" for s in styles)]]
    for name, t in teachers.items():
        d = t["difference"]["sampled"]
        gap = "" if name == "original" else f"{d['mean'] * 100:+.1f} [{d['low'] * 100:+.1f}, {d['high'] * 100:+.1f}] n {d['n']}"
        kl = f"{t['anchor_kl']['mean']:.4f}" if t["anchor_kl"]["n"] else ""
        rows.append([name, mean_and_spread(t["sampled"]), mean_and_spread(t["greedy"]), gap, kl,
                     *(f"{v['share']:.0%} / {v['right']:.0%}" for v in t["styles"].values())])
    return table(rows[0], rows[1:])


def _student_table(found: Mapping[str, Any]) -> str:
    names = list(found["teachers"])
    rows = [["attack", *(f"from {n}" for n in names), "greedy: " + " / ".join(names)]]
    for attack, row in found["students"].items():
        cells = []
        for n in names:
            c = row.get(n)
            change = c and c.get("change", {}).get("sampled")
            cells.append("" if not c else mean_and_spread(c["sampled"]) + (f" ({change['mean']:+.0%})" if change and change["n"] else ""))
        greedy = " / ".join(f"{row[n]['greedy']['mean']:.3f}" if n in row else "-" for n in names)
        rows.append([attack, *cells, greedy])
    lines = [table(rows[0], rows[1:])]
    for name, b in found["baselines"].items():
        lines.append(f"Without a teacher, {name}: {mean_and_spread(b['sampled'])} sampled, {b['greedy']['mean']:.3f} greedy.")
    return "\n\n".join(lines)


def _attack_table(students: Mapping[str, Mapping[str, dict]]) -> str:
    """What an attack asked of the teacher, the best checkpoint of an attacker who stops early, and the distillability score."""
    names = [n for n in ORDER if any(n in row for row in students.values())]
    rows = [["attack", "teacher texts written / read", "seconds", *(f"best, {n}" for n in names),
             *(f"distillability, {n}" for n in names if n != "original")]]
    for attack, row in students.items():
        first = next(iter(row.values()))
        scores = [row.get(n, {}).get("score") for n in names if n != "original"]
        rows.append([attack, f"{first['cost']['written']} / {first['cost']['read']}", f"{first['seconds']['mean']:.0f}",
                     *(f"{row[n]['best']['mean']:.3f}" if n in row else "" for n in names),
                     *(score_text(d) for d in scores)])
    return table(rows[0], rows[1:])


def _head(entries: list[Entry], matrix: Mapping) -> dict:
    head = dict(entries[0].run.head) if entries else {}
    seconds = sum(e.run.summary["wall_s"] for e in entries)
    return {"code": head.get("code"), "versions": head.get("versions"), "seeds": sorted({e.labels["seed"] for e in entries}),
            "runs": len(entries), "run_seconds": round(seconds), "commands": [c["command"] for c in matrix["cells"]][:3] + ["..."]}


def _run_row(entry: Entry) -> dict:
    """One run of the matrix in one line: what a record needs to be checked by."""
    last = entry.evals()[-1]
    kl = entry.run.steps[-1].get("anchor_kl") if entry.run.steps else None
    return {**entry.labels, "sampled": last["eval/sampled"], "greedy": last["eval/greedy"], "anchor_kl": kl,
            "seconds": entry.run.summary["wall_s"]}


def _plain(value: Any) -> Any:
    return float(value) if hasattr(value, "__float__") else str(value)


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
