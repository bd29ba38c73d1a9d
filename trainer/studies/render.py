"""report.md from the numbers of report.py: nothing is computed here."""

import json
from collections.abc import Mapping
from typing import Any

from reflux.trainer.runs.markdown_table import mean_and_spread, score, table

# of the teachers in tables and plots
ORDER = ("original", "task_only", "distillable", "undistillable")
NOTE = (
    "Accuracies are shares of held-out prompts answered right, sampled at temperature 1 unless "
    "said otherwise; "
    '+- is the standard deviation over seeds, intervals are 95 %. "Undistillable" means: '
    "reduces what the students "
    "tested here gain through the channels tested here at this budget."
)


def render(found: Mapping[str, Any]) -> str:
    """report.md."""
    collapse = found.get("collapse", [])
    parts = [f"# {found['title'] or 'Report'}"]
    if found.get("conclusion"):
        parts += ["## In plain words", found["conclusion"], "## The rules, one by one"]
    parts += [
        "\n".join(f"- {line}" for line in found["verdict"] if line not in collapse),
        NOTE,
        "## Teachers",
        teacher_table(found["teachers"]),
        "## Students",
        student_table(found),
    ]
    if any("score" in c for row in found["students"].values() for c in row.values()):
        parts += [
            "## Attacks in detail",
            "Cost is that of one run. The best checkpoint is the one that scored highest on these "
            "same prompts, an attacker's luck included. Distillability: what students gain / what "
            "they gain from the original.",
            attack_table(found["students"]),
        ]
    if collapse:
        parts += ["## Collapse or format failure", "\n".join(f"- {line}" for line in collapse)]
    if len(found.get("defences", {})) > 1:
        parts += [
            "## Other defences",
            "By what students of sampled text gain; accuracy is that of the texts served.",
            defence_table(found["defences"]),
        ]
    if len(found.get("proxies", {})) > 1:
        parts += [
            "## Sensitivity to the proxy",
            "Teachers calibrated against other proxies: distillability by attack.",
            proxy_table(found["proxies"]),
        ]
    parts += [f"## {title}\n![{title}]({name})" for name, title in found["plots"].items()]
    parts += ["## How it was made", "```\n" + json.dumps(found["head"], indent=1) + "\n```"]
    return "\n\n".join(parts) + "\n"


def teacher_table(teachers: Mapping[str, dict]) -> str:
    styles = next(iter(teachers.values()))["styles"] if teachers else {}
    rows = [
        [
            "teacher",
            "sampled",
            "greedy",
            "difference, points",
            "KL to original",
            *(f"{s}: share / right" for s in styles),
        ]
    ]
    for name, t in teachers.items():
        d = t["difference"]["sampled"]
        gap = (
            ""
            if name == "original"
            else f"{d['mean'] * 100:+.1f} [{d['low'] * 100:+.1f}, {d['high'] * 100:+.1f}] n {d['n']}"
        )
        kl = f"{t['reference_kl']['mean']:.4f}" if t["reference_kl"]["n"] else ""
        rows.append(
            [
                name,
                mean_and_spread(t["sampled"]),
                mean_and_spread(t["greedy"]),
                gap,
                kl,
                *(f"{v['share']:.0%} / {v['right']:.0%}" for v in t["styles"].values()),
            ]
        )
    return table(rows[0], rows[1:])


def student_table(found: Mapping[str, Any]) -> str:
    names = list(found["teachers"])
    rows = [["attack", *(f"from {n}" for n in names), "greedy: " + " / ".join(names)]]
    for attack, row in found["students"].items():
        greedy = " / ".join(f"{row[n]['greedy']['mean']:.3f}" if n in row else "-" for n in names)
        rows.append(
            [attack, *(_with_change(row.get(n), "sampled", "sampled") for n in names), greedy]
        )
    lines = [table(rows[0], rows[1:])]
    for name, b in found["baselines"].items():
        lines.append(
            f"Without a teacher, {name}: {mean_and_spread(b['sampled'])} sampled, "
            f"{b['greedy']['mean']:.3f} greedy."
        )
    return "\n\n".join(lines)


def _with_change(cell: Mapping | None, value: str, change: str) -> str:
    """Mean, spread, and the change against the original's student."""
    moved = cell and cell.get("change", {}).get(change)
    return (
        ""
        if not cell
        else mean_and_spread(cell[value])
        + (f" ({moved['mean']:+.0%})" if moved and moved["n"] else "")
    )


def attack_table(students: Mapping[str, Mapping[str, dict]]) -> str:
    """What an attack asked of the teacher, the best checkpoint of an attacker who stops early, and
    the distillability score.
    """
    names = [n for n in ORDER if any(n in row for row in students.values())]
    rows = [
        [
            "attack",
            "teacher texts written / read",
            "their tokens, about",
            "seconds",
            *(f"best, {n}" for n in names),
            *(f"distillability, {n}" for n in names if n != "original"),
        ]
    ]
    for attack, row in students.items():
        cost = next(iter(row.values()))["cost"]
        rows.append(
            [
                attack,
                f"{cost['written']} / {cost['read']}",
                f"{cost['tokens']}",
                f"{next(iter(row.values()))['seconds']['mean']:.0f}",
                *(_with_change(row.get(n), "best", "best") for n in names),
                *(score(row.get(n, {}).get("score")) for n in names if n != "original"),
            ]
        )
    return table(rows[0], rows[1:])


def defence_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        [
            "defence",
            "accuracy of what is served",
            "student by sampled text",
            "change",
            "distillability",
        ]
    ]
    for name, r in rows.items():
        c = r["change"]
        lines.append(
            [
                name,
                mean_and_spread(r["served"]),
                mean_and_spread(r["student"]),
                "" if name == "none" or not c["n"] else f"{c['mean']:+.0%}",
                score(r["score"]),
            ]
        )
    return table(lines[0], lines[1:])


def proxy_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Proxies down; teachers and scores of both modes across."""
    modes = [m for m in ORDER if any(m in r["modes"] for r in rows.values())]
    attacks = list(
        dict.fromkeys(a for r in rows.values() for m in r["modes"].values() for a in m["scores"])
    )
    lines = [
        [
            "proxy",
            "its accuracy",
            *(x for m in modes for x in (f"teacher, {m}", *(f"{m}: {a}" for a in attacks))),
        ]
    ]
    for name, r in rows.items():
        cells = (
            x
            for m in modes
            for x in (
                mean_and_spread(r["modes"][m]["teacher"]) if m in r["modes"] else "",
                *(score(r["modes"].get(m, {"scores": {}})["scores"].get(a)) for a in attacks),
            )
        )
        lines.append([name, mean_and_spread(r["accuracy"]), *cells])
    return table(lines[0], lines[1:])
