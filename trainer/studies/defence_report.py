"""What else a report says of a protected teacher: other defences beside it, whether the collapse is
more than broken form, and what the result owes to the proxy.

A defence is a run with a label `defence`: its teacher as served (role `defence`) and students of
that. Two of the attacks are also what a provider could serve: colder text, and answers without the
way to them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from reflux.trainer.runs.stats import may_be_zero, over_seeds

from .finished_runs import (
    FinishedRun,
    before_attack,
    change,
    gain_ratio,
    items,
    labelled,
    with_role,
)

ATTACK = "seq_kd"  # every defence is judged by students of sampled text
ATTACKS_AS_DEFENCE = {
    "seq_kd_cold": "temperature 0.5",
    "answers_only": "answers only, reasoning withheld",
}
# by construction as right as the teacher's own text: nothing to measure
KEEPS_ANSWERS = "answers_only"
REPAIRED = -0.5  # A5: the relative drop that has to survive a repair of the form
PROXY_ATTACKS = ("seq_kd", "gkd_reverse")  # that the teachers of other proxies are tried with
OPEN = " in the mean; the spread over seeds allows no difference"
SIDES = ("distillable", "undistillable")


def defence_rows(entries: Sequence[FinishedRun]) -> dict[str, dict[str, Any]]:
    """defence -> accuracy of what is served, accuracy of its students, their change against the
    undefended original's, and score.
    """
    plain = [e for e in entries if "defence" not in e.labels]
    base, starts = (
        _students(plain, "original", ATTACK),
        items(labelled(plain, role="start", student="student")),
    )
    original = labelled(plain, role="teacher", teacher="original")
    rows = {
        "none": (original, base),
        "undistillable": (
            labelled(plain, role="teacher", teacher="undistillable"),
            _students(plain, "undistillable", ATTACK),
        ),
    }
    for attack, name in ATTACKS_AS_DEFENCE.items():
        rows[name] = (
            original
            if attack == KEEPS_ANSWERS
            else labelled(entries, role="defence", defence=name),
            _students(plain, "original", attack),
        )
    for name in dict.fromkeys(e.labels["defence"] for e in entries if "defence" in e.labels):
        mine = labelled(entries, defence=name)
        rows.setdefault(name, (with_role(mine, "defence"), with_role(mine, "student")))
    return {
        name: {
            "served": over_seeds([e.score("sampled") for e in served])._asdict(),
            "student": over_seeds([e.score("sampled") for e in students])._asdict(),
            "change": change(students, base)["sampled"],
            "score": gain_ratio(students, base, starts),
        }
        for name, (served, students) in rows.items()
        if students
    }


def _students(entries: Sequence[FinishedRun], teacher: str, attack: str) -> list[FinishedRun]:
    return labelled(entries, role="student", teacher=teacher, attack=attack)


def check_lines(entries: Sequence[FinishedRun]) -> list[str]:
    """A5 beyond the shares of found answers: a repair of the form, and the likelihood of
    options.
    """
    lines = []
    repaired = {
        t: labelled(entries, role="repair", teacher=t) for t in ("original", "undistillable")
    }
    if all(repaired.values()):
        e = change(repaired["undistillable"], repaired["original"])["sampled"]
        means = {
            t: over_seeds([x.score("sampled") for x in rows]).mean for t, rows in repaired.items()
        }
        lines.append(
            f"after {_examples(repaired['undistillable'][0])} worked examples to repair the form, the student of the undistillable teacher "
            f"has {means['undistillable']:.3f}, that of the original "
            f"{means['original']:.3f} ({e['mean']:+.0%}): the drop "
            f"{('survives' + OPEN * may_be_zero(e)) if e['n'] and e['mean'] <= REPAIRED else 'does not survive'}"
        )
    chosen = {
        t: labelled(entries, role="choices", teacher=t)
        for t in ("original", "distillable", "undistillable")
    }
    means = {
        t: over_seeds([x.score("likelihood_sum") for x in rows]).mean
        for t, rows in chosen.items()
        if rows
    }
    if {"original", "undistillable"} <= means.keys():
        gap = _gap(chosen["undistillable"], chosen["original"], "likelihood_sum")
        word = (
            "lower" + (OPEN if may_be_zero(gap) else ", too")
            if gap["mean"] < 0
            else "not lower: generation and likelihood disagree"
        )
        word = word if gap["n"] else "not compared: no seed has both"
        lines.append(
            "by the likelihood of options, without generating: "
            + ", ".join(f"student of {t} {m:.3f}" for t, m in means.items())
            + f" (chance {_chance(chosen['original'][0])})"
            + f"; the undistillable teacher's is {word}"
        )
    return lines


def _gap(
    after: Sequence[FinishedRun], before: Sequence[FinishedRun], reading: str
) -> dict[str, float]:
    """Difference by seed."""
    base = {e.labels["seed"]: e.score(reading) for e in before}
    return over_seeds(
        [e.score(reading) - base[e.labels["seed"]] for e in after if e.labels["seed"] in base]
    )._asdict()


def _examples(entry: FinishedRun) -> int:
    return entry.run.head["config"]["data"]["limit"]


def _chance(entry: FinishedRun) -> str:
    """Accuracy of a blind choice among a prompt's options."""
    shares = [1 / len(p["logp"]) for p in entry.predictions() if "logp" in p]
    return f"{sum(shares) / len(shares):.2f}" if shares else "unknown"


def proxy_rows(entries: Sequence[FinishedRun]) -> dict[str, dict[str, Any]]:
    """proxy -> its own accuracy, and for each direction the teachers calibrated against it and
    their distillability by attack.

    `default` is the proxy of the main teachers; the others are named by the label `proxy`, their
    teachers by the same name as `ablation`.
    """
    entries = [e for e in entries if not {"eta", "defence"} & set(e.labels)]
    names = [
        "default",
        *dict.fromkeys(
            e.labels["proxy"] for e in with_role(entries, "proxy") if "proxy" in e.labels
        ),
    ]
    rows = {}
    for name in names:
        modes = {
            m: _proxy_cell(entries, name, m)
            for m in SIDES
            if _calibrated(entries, name, role="student", teacher=m)
        }
        if modes:
            own = [
                e for e in with_role(entries, "proxy") if e.labels.get("proxy", "default") == name
            ]
            rows[name] = {
                "accuracy": over_seeds([e.score("sampled") for e in own])._asdict(),
                "modes": modes,
            }
    return rows


def _proxy_cell(entries: Sequence[FinishedRun], name: str, mode: str) -> dict[str, Any]:
    originals = [e for e in entries if "ablation" not in e.labels]
    scores = {}
    for attack in PROXY_ATTACKS:
        rows = _calibrated(entries, name, role="student", teacher=mode, attack=attack)
        found = (
            gain_ratio(rows, _students(originals, "original", attack), before_attack(rows, entries))
            if rows
            else None
        )
        scores |= {attack: found} if found else {}
    return {
        "teacher": over_seeds(
            [e.score("sampled") for e in _calibrated(entries, name, role="teacher", teacher=mode)]
        )._asdict(),
        "scores": scores,
    }


def _calibrated(entries: Sequence[FinishedRun], proxy: str, **labels: str) -> list[FinishedRun]:
    return [e for e in labelled(entries, **labels) if e.labels.get("ablation", "default") == proxy]


def proxy_lines(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sensitivity to the proxy: the range of a score over the proxies, attack by attack."""
    lines = []
    for mode in SIDES if len(rows) > 1 else ():
        for attack in PROXY_ATTACKS:
            found = {
                name: r["modes"][mode]["scores"][attack]["mean"]
                for name, r in rows.items()
                if attack in r["modes"].get(mode, {"scores": ()})["scores"]
            }
            if len(found) > 1:
                low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
                lines.append(
                    f"sensitivity to the proxy, {mode} by {attack}: distillability from "
                    f"{found[low]:.2f} ({low}) to {found[high]:.2f} ({high}), a range of "
                    f"{found[high] - found[low]:.2f} over {len(found)} proxies"
                )
    return lines
