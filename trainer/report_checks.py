"""What else a report says of a protected teacher: other defences beside it, and whether the collapse is more than broken form.

A defence is a run with a label `defence`: its teacher as served (role `defence`) and students of that. Two of the attacks are also what a
provider could serve: colder text, and answers without the way to them.
"""
from collections.abc import Mapping, Sequence
from typing import Any

from .report_entries import Entry, change, gain_ratio, labelled, with_role
from .stats import over_seeds
from .tables import mean_and_spread, score, table

ATTACK = "seq_kd"  # every defence is judged by students of sampled text
ATTACK_AS_DEFENCE = {"seq_kd_cold": "text at temperature 0.5", "answers_only": "answers only, reasoning withheld"}
REPAIRED = -0.5  # A5: the relative drop that has to survive a repair of the form


def defence_rows(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """defence -> accuracy of what is served, accuracy of its students, their change against the undefended original's, and score."""
    plain = [e for e in entries if "defence" not in e.labels]
    base, starts = _students(plain, "original", ATTACK), labelled(plain, role="start", student="student")
    original = labelled(plain, role="teacher", teacher="original")
    rows = {"none": (original, base), "undistillable": (labelled(plain, role="teacher", teacher="undistillable"),
                                                         _students(plain, "undistillable", ATTACK))}
    rows |= {words: (original, _students(plain, "original", attack)) for attack, words in ATTACK_AS_DEFENCE.items()}
    for name in dict.fromkeys(e.labels["defence"] for e in entries if "defence" in e.labels):
        mine = labelled(entries, defence=name)
        rows[name] = (with_role(mine, "defence"), with_role(mine, "student"))
    return {name: {"served": over_seeds([e.score("sampled") for e in served])._asdict(),
                   "student": over_seeds([e.score("sampled") for e in students])._asdict(),
                   "change": change(students, base)["sampled"], "score": gain_ratio(students, base, starts)}
            for name, (served, students) in rows.items() if students}


def _students(entries: Sequence[Entry], teacher: str, attack: str) -> list[Entry]:
    return labelled(entries, role="student", teacher=teacher, attack=attack)


def check_lines(entries: Sequence[Entry]) -> list[str]:
    """A5 beyond the shares of found answers: a repair of the form, and the likelihood of options."""
    lines = []
    repaired = {t: labelled(entries, role="repair", teacher=t) for t in ("original", "undistillable")}
    if all(repaired.values()):
        e = change(repaired["undistillable"], repaired["original"])["sampled"]
        means = {t: over_seeds([x.score("sampled") for x in rows]).mean for t, rows in repaired.items()}
        lines.append(f"after {_examples(repaired['undistillable'][0])} worked examples to repair the form, the student of the undistillable teacher "
                     f"has {means['undistillable']:.3f}, that of the original {means['original']:.3f} ({e['mean']:+.0%}): the drop "
                     f"{'survives' if e['n'] and e['mean'] <= REPAIRED else 'does not survive'}")
    chosen = {t: labelled(entries, role="choices", teacher=t) for t in ("original", "distillable", "undistillable")}
    means = {t: over_seeds([x.score("likelihood_sum") for x in rows]).mean for t, rows in chosen.items() if rows}
    if {"original", "undistillable"} <= means.keys():
        lower = means["undistillable"] < means["original"]
        lines.append("by the likelihood of options, without generating: " + ", ".join(f"student of {t} {m:.3f}" for t, m in means.items())
                     + f"; the undistillable teacher's is {'lower, too' if lower else 'not lower: generation and likelihood disagree'}")
    return lines


def _examples(entry: Entry) -> int:
    return entry.run.head["config"]["data"]["limit"]


def render_defences(rows: Mapping[str, Mapping[str, Any]]) -> str:
    change_of = lambda name, c: "" if name == "none" or not c["n"] else f"{c['mean']:+.0%}"
    return table(("defence", "accuracy of what is served", f"student by {ATTACK}", "change", "distillability"),
                 [(name, mean_and_spread(r["served"]), mean_and_spread(r["student"]), change_of(name, r["change"]), score(r["score"]))
                  for name, r in rows.items()])
